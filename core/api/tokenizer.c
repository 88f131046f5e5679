/* usl_tokenizer_*: the handle is core/text's own. */
#include <string.h>

#include "core/api/need.h"
#include "core/text/chat.h"

usl_status usl_tokenizer_open(usl_ctx *ctx, const char *path, usl_tokenizer **out) {
    if (!out) return usli_fail(ctx, USL_ERR_INVALID, "usl_tokenizer_open needs a place for the tokenizer");
    *out = NULL;
    if (!path) return usli_fail(ctx, USL_ERR_INVALID, "usl_tokenizer_open needs a path");
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_READ));
    return usli_tokenizer_open(ctx, path, out);
}

void usl_tokenizer_free(usl_tokenizer *tok) {
    usli_tokenizer_release(tok);
}

usl_status usl_tokenizer_encode(usl_ctx *ctx, const usl_tokenizer *tok, const char *text, size_t len, int add_special,
                                int32_t **ids, size_t *count) {
    return usli_tokenizer_encode(ctx, tok, text, len, add_special ? USLI_ENCODE_SPECIAL : 0, ids, count);
}

usl_status usl_tokenizer_encode_batch(usl_ctx *ctx, const usl_tokenizer *tok, const char *const *texts,
                                      const size_t *lens, size_t count, int add_special, int32_t **ids,
                                      size_t **offsets) {
    return usli_tokenizer_encode_batch(ctx, tok, texts, lens, count, add_special ? USLI_ENCODE_SPECIAL : 0, ids,
                                       offsets);
}

usl_status usl_tokenizer_decode(usl_ctx *ctx, const usl_tokenizer *tok, const int32_t *ids, size_t count,
                                int skip_special, char **text, size_t *len) {
    return usli_tokenizer_decode(ctx, tok, ids, count, skip_special != 0, text, len);
}

usl_status usl_text_stream_new(usl_ctx *ctx, usl_tokenizer *tok, const int32_t *before, size_t count, int skip_special,
                               usl_text_stream **out) {
    return usli_text_stream_new(ctx, tok, before, count, skip_special != 0, out);
}

void usl_text_stream_free(usl_text_stream *stream) {
    usli_text_stream_free(stream);
}

usl_status usl_text_stream_push(usl_text_stream *stream, int32_t id, const char **piece, size_t *len) {
    return usli_text_stream_push(stream, id, piece, len);
}

usl_status usl_text_stream_end(usl_text_stream *stream, const char **piece, size_t *len) {
    return usli_text_stream_end(stream, piece, len);
}

int64_t usl_tokenizer_vocab_size(const usl_tokenizer *tok) {
    return usli_tokenizer_size(tok);
}

/* USLI_SPECIALS: there is none of that name. */
static usli_special special_by_name(const char *which) {
    static const char *const NAMES[USLI_SPECIALS] = { "bos", "eos", "pad", "unk" };
    int i = 0;
    while (i < USLI_SPECIALS && strcmp(which, NAMES[i]) != 0) i++;
    return (usli_special)i;
}

int32_t usl_tokenizer_special(const usl_tokenizer *tok, const char *which) {
    usli_special s = special_by_name(which);
    return s < USLI_SPECIALS ? usli_tokenizer_special(tok, s) : -1;
}

usl_status usl_tokenizer_set_special(usl_ctx *ctx, usl_tokenizer *tok, const char *which, int32_t id) {
    usli_special s = special_by_name(which);
    if (s == USLI_SPECIALS) return usli_fail(ctx, USL_ERR_INVALID, "\"%s\" is none of bos, eos, pad and unk", which);
    return usli_tokenizer_set_special(ctx, tok, s, id);
}

usl_status usl_tokenizer_add_tokens(usl_ctx *ctx, usl_tokenizer *tok, const char *const *tokens, const size_t *lens,
                                    size_t count, int special, size_t *added) {
    size_t n;
    usl_status st = usli_tokenizer_add_tokens(ctx, tok, tokens, lens, count, special != 0, &n);
    if (added) *added = n;
    return st;
}

usl_status usl_tokenizer_rename(usl_ctx *ctx, usl_tokenizer *tok, int32_t id, const char *text, size_t len) {
    return usli_tokenizer_rename(ctx, tok, id, text, len);
}

int32_t usl_tokenizer_id(const usl_tokenizer *tok, const char *token, size_t len) {
    return usli_tokenizer_id(tok, token, len);
}

const char *usl_tokenizer_token(const usl_tokenizer *tok, int32_t id, size_t *len) {
    usli_token t;
    if (!usli_tokenizer_token(tok, id, &t)) return NULL;
    if (len) *len = t.len;
    return t.text;
}

const char *usl_tokenizer_chat_template(const usl_tokenizer *tok) {
    return usli_tokenizer_chat_template(tok);
}

usl_status usl_tokenizer_set_chat_template(usl_ctx *ctx, usl_tokenizer *tok, const char *text) {
    if (!text) return usli_fail(ctx, USL_ERR_INVALID, "usl_tokenizer_set_chat_template needs a template");
    return usli_tokenizer_set_chat_template(ctx, tok, text);
}

usl_status usl_tokenizer_apply_chat_template(usl_ctx *ctx, const usl_tokenizer *tok, const char *messages,
                                             const usl_chat_opts *opts, char **text, size_t *len, size_t **spans,
                                             size_t *span_count) {
    usli_jinja_result r;
    *text = NULL;
    if (spans) *spans = NULL;
    USLI_TRY(usli_chat_apply(ctx, tok, messages, opts, &r));
    if (spans && r.span_count) {
        *spans = usli_calloc(ctx, r.span_count, 2 * sizeof **spans);
        if (!*spans) {
            usli_jinja_result_free(ctx, &r);
            return usli_nomem(ctx, r.span_count * 2 * sizeof **spans);
        }
        for (size_t i = 0; i < 2 * r.span_count; i++) (*spans)[i] = i % 2 ? r.spans[i / 2].end : r.spans[i / 2].begin;
    }
    if (span_count) *span_count = r.span_count;
    if (len) *len = r.len;
    *text = r.text;
    usli_free(ctx, r.spans);
    return USL_OK;
}

usl_status usl_chat_template_render(usl_ctx *ctx, const char *source, size_t source_len, const char *variables,
                                    char **text, size_t *len) {
    usli_jinja_result r;
    *text = NULL;
    USLI_TRY(usli_chat_render(ctx, source, source_len, variables, &r));
    if (len) *len = r.len;
    *text = r.text;
    usli_free(ctx, r.spans);
    return USL_OK;
}

usl_status usl_tokenizer_save(usl_ctx *ctx, const usl_tokenizer *tok, const char *dir) {
    USLI_NEED_PATH(ctx, dir, USL_ACCESS_WRITE);
    return usli_tokenizer_save(ctx, tok, dir);
}
