/* The chat templates that a tokenizer carries. */
#include <string.h>

#include "core/text/parts.h"

const char *usli_tokenizer_chat_template(const usli_tokenizer *tok) {
    return tok->chat_template;
}

const char *usli_tokenizer_template(const usli_tokenizer *tok, const char *name) {
    for (size_t i = 0; i < tok->template_count; i++)
        if (strcmp(tok->templates[i].name, name) == 0) return tok->templates[i].text;
    return NULL;
}

usl_status usli_tokenizer_add_template(usli_tokenizer *tok, const char *name, size_t name_len, const char *text,
                                       size_t len) {
    usl_ctx *ctx = tok->ctx;
    USLI_TRY(usli_grow(ctx, &tok->templates, &tok->template_cap, tok->template_count + 1, sizeof *tok->templates));
    usli_named_template t = { usli_strndup(ctx, name, name_len), usli_strndup(ctx, text, len) };
    if (!t.name || !t.text) {
        usli_free(ctx, t.name);
        usli_free(ctx, t.text);
        return usli_nomem(ctx, name_len + len + 2);
    }
    tok->templates[tok->template_count++] = t;
    return USL_OK;
}

usl_status usli_tokenizer_set_chat_template(usl_ctx *ctx, usli_tokenizer *tok, const char *text) {
    char *copy = usli_strdup(tok->ctx, text);
    if (!copy) return usli_nomem(ctx, strlen(text) + 1);
    usli_free(tok->ctx, tok->chat_template);
    tok->chat_template = copy;
    tok->template_file = true; /* which loaders read before the configuration's */
    return USL_OK;
}

usl_status usli_tokenizer_set_special(usl_ctx *ctx, usli_tokenizer *tok, usli_special which, int32_t id) {
    static const char *const KEYS[USLI_SPECIALS] = { "bos_token", "eos_token", "pad_token", "unk_token" };
    usli_token t;
    json_t *config = NULL;
    char *text;
    size_t len;
    usl_status st = USL_OK;
    if (!usli_tokenizer_token(tok, id, &t) || t.kind == USLI_TOKEN_UNUSED)
        return usli_fail(ctx, USL_ERR_INVALID, "no token has the id %d", (int)id);
    if (tok->config) {
        USLI_TRYGO(usli_json_parse(ctx, "tokenizer_config.json", tok->config, tok->config_len, &config));
        if (json_object_set_new(config, KEYS[which], json_stringn_nocheck(t.text, t.len)) != 0) {
            st = usli_nomem(ctx, t.len);
            goto done;
        }
        USLI_TRYGO(usli_json_dump(tok->ctx, config, 2, &text, &len));
        usli_free(tok->ctx, tok->config);
        tok->config = text;
        tok->config_len = len;
    }
    tok->special[which] = id;
done:
    json_decref(config);
    return st;
}
