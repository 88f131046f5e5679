/* Another spelling for a token: its id, and with it what the model knows of it, stays. */
#include <string.h>

#include "core/text/parts.h"

static usl_status quoted(usl_ctx *ctx, const char *text, size_t len, char **out) {
    usli_buf b = { 0 };
    usl_status st = usli_buf_json(ctx, &b, text, len);
    if (st == USL_OK) st = usli_buf_add(ctx, &b, "", 1);
    *out = b.data;
    return st;
}

static usl_status replaced(usl_ctx *ctx, const char *text, size_t len, const usli_renamed *r, usli_buf *out) {
    size_t n = strlen(r->from);
    const char *end = text + len;
    for (const char *p = text;;) {
        const char *hit = p;
        while (hit && (size_t)(end - hit) >= n && memcmp(hit, r->from, n) != 0)
            hit = memchr(hit + 1, '"', (size_t)(end - hit - 1));
        if (!hit || (size_t)(end - hit) < n) return usli_buf_add(ctx, out, p, (size_t)(end - p));
        USLI_TRY(usli_buf_add(ctx, out, p, (size_t)(hit - p)));
        USLI_TRY(usli_buf_add(ctx, out, r->to, strlen(r->to)));
        p = hit + n;
    }
}

usl_status usli_renamed_text(usl_ctx *ctx, const usli_tokenizer *tok, const char *text, size_t len, usli_buf *out) {
    usli_buf other = { 0 };
    usl_status st;
    USLI_TRYGO(usli_buf_add(ctx, out, text, len));
    for (size_t i = 0; i < tok->renamed_count; i++) {
        other.len = 0;
        USLI_TRYGO(replaced(ctx, out->data, out->len, &tok->renamed[i], &other));
        usli_buf t = *out;
        *out = other;
        other = t;
    }
done:
    usli_free(ctx, other.data);
    return st;
}

static bool has(const char *text, size_t len, const char *part) {
    size_t n = strlen(part);
    for (const char *p = text, *end = text + len; p && (size_t)(end - p) >= n;
         p = memchr(p + 1, '"', (size_t)(end - p - 1)))
        if (memcmp(p, part, n) == 0) return true;
    return false;
}

/* The configuration names tokens too. */
static usl_status rename_in_config(usli_tokenizer *tok, const usli_renamed *r) {
    usli_buf b = { 0 };
    if (!tok->config) return USL_OK;
    usl_status st = replaced(tok->ctx, tok->config, tok->config_len, r, &b);
    if (st == USL_OK) st = usli_buf_add(tok->ctx, &b, "", 1);
    if (st != USL_OK) {
        usli_free(tok->ctx, b.data);
        return st;
    }
    usli_free(tok->ctx, tok->config);
    tok->config = b.data;
    tok->config_len = b.len - 1;
    return USL_OK;
}

usl_status usli_tokenizer_rename(usl_ctx *ctx, usli_tokenizer *tok, int32_t id, const char *text, size_t len) {
    usli_token t;
    usli_renamed r = { 0 };
    size_t source_len;
    const char *source = usli_tokenizer_source(tok, &source_len);
    usl_status st;
    if (!usli_tokenizer_token(tok, id, &t) || t.kind == USLI_TOKEN_UNUSED)
        return usli_fail(ctx, USL_ERR_INVALID, "no token has the id %d", (int)id);
    if (!len || usli_vocab_find(&tok->vocab, text, len) >= 0)
        return usli_fail(ctx, USL_ERR_INVALID, "a token cannot be spelled \"%.*s\": %s", (int)(len < 100 ? len : 100),
                         text, len ? "another one is" : "that is nothing");
    USLI_TRYGO(quoted(tok->ctx, t.text, t.len, &r.from));
    USLI_TRYGO(quoted(tok->ctx, text, len, &r.to));
    if (source && !tok->renamed_count && !has(source, source_len, r.from)) {
        st = usli_fail(ctx, USL_ERR_UNSUPPORTED,
                       "tokenizer.json does not spell the token %s plainly, so it keeps its name", r.from);
        goto done;
    }
    USLI_TRYGO(usli_grow(tok->ctx, &tok->renamed, &tok->renamed_cap, tok->renamed_count + 1, sizeof *tok->renamed));
    st = usli_vocab_rename(tok->ctx, &tok->vocab, id, text, len);
    /* Also after a failure: the blob may have moved. */
    usl_status indexed = usli_tokenizer_index_added(tok);
    if (st == USL_OK) st = indexed;
    if (st == USL_OK) st = rename_in_config(tok, &r);
    if (st == USL_OK) {
        tok->renamed[tok->renamed_count++] = r;
        r = (usli_renamed){ 0 };
    }
done:
    usli_free(tok->ctx, r.from);
    usli_free(tok->ctx, r.to);
    return st;
}
