/* Tokens that are added to a loaded tokenizer, and how the files that are saved tell of them. */
#include <stdio.h>
#include <string.h>

#include "core/text/parts.h"

static bool is_added(const usli_added_set *set, int32_t id) {
    for (size_t i = 0; i < set->count; i++)
        if (set->items[i].id == id) return true;
    return false;
}

/* SentencePiece's ranks have room for one more token, which every other one goes before. */
static usl_status widen_ranks(usli_tokenizer *tok) {
    size_t n = tok->vocab.count;
    if (!tok->score_rank) return USL_OK;
    uint32_t *grown = usli_realloc(tok->ctx, tok->score_rank, (n + 1) * sizeof *grown);
    if (!grown) return usli_nomem(tok->ctx, (n + 1) * sizeof *grown);
    grown[n] = UINT32_MAX;
    tok->score_rank = grown;
    return USL_OK;
}

static usl_status add_one(usli_tokenizer *tok, const char *text, size_t len, bool special, size_t *added) {
    int32_t id = usli_vocab_find(&tok->vocab, text, len);
    if (!len || (id >= 0 && (is_added(&tok->raw, id) || is_added(&tok->normalized, id)))) return USL_OK;
    if (id < 0) {
        if (tok->vocab.count >= INT32_MAX - 1)
            return usli_fail(tok->ctx, USL_ERR_INVALID, "there are no more token ids");
        USLI_TRY(widen_ranks(tok));
        id = (int32_t)tok->vocab.count;
        USLI_TRY(usli_vocab_add(tok->ctx, &tok->vocab, text, len, id, false));
        tok->vocab.entries[id].score = -1000; /* as llama.cpp's converter writes it */
    }
    /* transformers looks for tokens that are not special in the normalised text, llama.cpp never does. */
    usli_added token = { .id = id, .special = special, .normalized = !special && tok->source };
    USLI_TRY(usli_ids_add(tok->ctx, &tok->extra, id));
    usl_status st = usli_tokenizer_add_token(tok, &token);
    if (st != USL_OK) tok->extra.count--;
    if (st == USL_OK) ++*added;
    return st;
}

static json_t *flags_of(const usli_tokenizer *tok, int32_t id) {
    const usli_entry *e = &tok->vocab.entries[id];
    return json_pack("{s:o,s:b,s:b,s:b,s:b,s:b}", "content", json_stringn(usli_vocab_text(&tok->vocab, id), e->len),
                     "lstrip", 0, "normalized", is_added(&tok->normalized, id), "rstrip", 0, "single_word", 0,
                     "special", (int)e->special);
}

/* tokenizer_config.json lists added tokens too, and special ones by name. */
static usl_status tell_config(usli_tokenizer *tok, size_t first) {
    usl_ctx *ctx = tok->ctx;
    json_t *config = NULL;
    char *text;
    size_t len;
    usl_status st;
    if (!tok->config || first == tok->extra.count) return USL_OK;
    USLI_TRY(usli_json_parse(ctx, "tokenizer_config.json", tok->config, tok->config_len, &config));
    json_t *decoder = json_object_get(config, "added_tokens_decoder");
    json_t *named = json_object_get(config, "additional_special_tokens");
    int bad = 0;
    if (!json_is_array(named)) {
        named = json_array();
        bad |= json_object_set_new(config, "additional_special_tokens", named);
    }
    for (size_t i = first; i < tok->extra.count && !bad; i++) {
        int32_t id = tok->extra.items[i];
        const usli_entry *e = &tok->vocab.entries[id];
        char key[16];
        snprintf(key, sizeof key, "%d", (int)id);
        if (json_is_object(decoder)) bad |= json_object_set_new(decoder, key, flags_of(tok, id));
        if (e->special) bad |= json_array_append_new(named, json_stringn(usli_vocab_text(&tok->vocab, id), e->len));
    }
    if (bad) {
        json_decref(config);
        return usli_nomem(ctx, tok->config_len);
    }
    if (json_array_size(named) == 0) json_object_del(config, "additional_special_tokens");
    st = usli_json_dump(ctx, config, 2, &text, &len);
    json_decref(config);
    if (st != USL_OK) return st;
    usli_free(ctx, tok->config);
    tok->config = text;
    tok->config_len = len;
    return USL_OK;
}

usl_status usli_tokenizer_add_tokens(usl_ctx *ctx, usli_tokenizer *tok, const char *const *texts, const size_t *lens,
                                     size_t count, bool special, size_t *added) {
    size_t first = tok->extra.count, broken;
    usl_status st = USL_OK;
    *added = 0;
    for (size_t i = 0; i < count; i++)
        if (usli_utf8_valid(texts[i], lens[i], &broken) != lens[i])
            return usli_fail(ctx, USL_ERR_INVALID, "token %zu of those to be added is not valid UTF-8", i + 1);
    for (size_t i = 0; i < count && st == USL_OK; i++) st = add_one(tok, texts[i], lens[i], special, added);
    /* Also after a failure: the spellings may have moved. */
    usl_status indexed = usli_tokenizer_index_added(tok);
    if (st == USL_OK) st = indexed;
    if (st == USL_OK) st = tell_config(tok, first);
    /* What went wrong stands in the context that the tokenizer was made in. */
    return st == USL_OK || ctx == tok->ctx ? st : usli_fail(ctx, st, "%s", usl_ctx_errmsg(tok->ctx));
}

/* ---- What is saved
 * -------------------------------------------------------------------------------------------------------- */

/* The place in tokenizer.json where further added tokens go, and what must stand around them there. */
static usl_status find_place(usl_ctx *ctx, const char *source, size_t len, size_t *at, const char **before,
                             const char **after) {
    usli_json_reader r;
    usl_status st;
    usli_json_init(&r, ctx, "tokenizer.json", source, len);
    USLI_TRYGO(usli_json_expect(&r, USLI_JSON_OBJECT, "a tokenizer"));
    *at = (size_t)(r.pos - source);
    *before = "\"added_tokens\":[";
    *after = "],";
    for (;;) {
        USLI_TRYGO(usli_json_next(&r));
        if (r.kind == USLI_JSON_OBJECT_END) break;
        bool here = usli_json_is(&r, "added_tokens");
        USLI_TRYGO(usli_json_next(&r));
        if (!here) {
            USLI_TRYGO(usli_json_skip(&r));
            continue;
        }
        if (r.kind != USLI_JSON_ARRAY) {
            st = usli_fail(ctx, USL_ERR_UNSUPPORTED, "tokenizer.json: added_tokens is no array, so none can be added");
            goto done;
        }
        const char *from = r.pos;
        USLI_TRYGO(usli_json_skip(&r));
        const char *end = r.pos - 1;
        while (end > from && strchr(" \t\r\n", end[-1])) end--;
        *at = (size_t)(end - source);
        *before = end == from ? "" : ",";
        *after = "";
        break;
    }
done:
    usli_json_done(&r);
    return st;
}

usl_status usli_extended_text(usl_ctx *ctx, const usli_tokenizer *tok, const char *source, size_t len, usli_buf *out) {
    const char *before = "", *after = "";
    size_t at;
    USLI_TRY(find_place(ctx, source, len, &at, &before, &after));
    USLI_TRY(usli_buf_add(ctx, out, source, at));
    USLI_TRY(usli_buf_text(ctx, out, before));
    for (size_t i = 0; i < tok->extra.count; i++) {
        int32_t id = tok->extra.items[i];
        const usli_entry *e = &tok->vocab.entries[id];
        char head[64];
        snprintf(head, sizeof head, "%s\n    {\"id\": %d, \"content\": ", i ? "," : "", (int)id);
        USLI_TRY(usli_buf_text(ctx, out, head));
        USLI_TRY(usli_buf_json(ctx, out, usli_vocab_text(&tok->vocab, id), e->len));
        USLI_TRY(usli_buf_text(ctx, out,
                               ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": "));
        USLI_TRY(usli_buf_text(ctx, out, is_added(&tok->normalized, id) ? "true" : "false"));
        USLI_TRY(usli_buf_text(ctx, out, e->special ? ", \"special\": true}" : ", \"special\": false}"));
    }
    USLI_TRY(usli_buf_text(ctx, out, after));
    return usli_buf_add(ctx, out, source + at, len - at);
}
