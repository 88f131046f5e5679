/* Unigram: of all ways to write a piece as tokens, the one whose logarithms of probability add up to the most. A
 * character that no token begins with counts as the unknown one, at a penalty. */
#include <string.h>

#include "core/text/parts.h"

static const double UNKNOWN_PENALTY = 10; /* below the least likely token, as in SentencePiece */

void usli_unigram_free(usl_ctx *ctx, usli_unigram *u) {
    usli_free(ctx, u->scores);
    memset(u, 0, sizeof *u);
}

usl_status usli_unigram_add(usl_ctx *ctx, usli_unigram *u, size_t len, double score) {
    USLI_TRY(usli_grow(ctx, &u->scores, &u->cap, u->count + 1, sizeof *u->scores));
    if (!u->count || score < u->least) u->least = score;
    if (len > u->longest) u->longest = len;
    u->scores[u->count++] = score;
    return USL_OK;
}

static void offer(usli_unigram_end *end, size_t start, int32_t id, double score) {
    if (end->start != SIZE_MAX && !(score > end->score)) return;
    *end = (usli_unigram_end){ score, start, id, SIZE_MAX };
}

/* Tokens, or what an unknown run becomes: its bytes where there are tokens for all of them, else the unknown token. */
static usl_status put(usl_ctx *ctx, const usli_tokenizer *tok, const char *text, size_t len, int32_t id,
                      usli_ids *out) {
    if (id >= 0) return usli_ids_add(ctx, out, id);
    bool bytes = tok->byte_fallback;
    for (size_t i = 0; i < len && bytes; i++) bytes = tok->byte_ids[(unsigned char)text[i]] >= 0;
    for (size_t i = 0; i < len && bytes; i++) USLI_TRY(usli_ids_add(ctx, out, tok->byte_ids[(unsigned char)text[i]]));
    if (bytes) return USL_OK;
    if (tok->model_unk < 0)
        return usli_fail(ctx, USL_ERR_INVALID, "the text holds \"%.*s\", and the tokenizer has no unknown token",
                         (int)(len < 60 ? len : 60), text);
    return usli_ids_add(ctx, out, tok->model_unk);
}

usl_status usli_unigram_encode(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len,
                               usli_ids *out) {
    const usli_unigram *u = &tok->unigram;
    USLI_TRY(usli_grow(ctx, &w->ends, &w->ends_cap, len + 1, sizeof *w->ends));
    usli_unigram_end *ends = w->ends;
    for (size_t i = 0; i <= len; i++) ends[i] = (usli_unigram_end){ 0, SIZE_MAX, -1, SIZE_MAX };
    for (size_t at = 0, step; at < len; at += step) {
        bool single = false;
        step = usli_utf8_step(text[at]);
        for (size_t end = at + step; end <= len && end - at <= u->longest; end += usli_utf8_step(text[end])) {
            int32_t id = usli_vocab_find(&tok->vocab, text + at, end - at);
            if (id >= 0 && (size_t)id < u->count) {
                offer(&ends[end], at, id, ends[at].score + u->scores[id]);
                single = single || end - at == step;
            }
            if (end == len) break;
        }
        if (!single) offer(&ends[at + step], at, -1, ends[at].score + u->least - UNKNOWN_PENALTY);
    }
    /* The way back, turned round: each end learns where the token behind it ends. */
    size_t next = SIZE_MAX;
    for (size_t at = len; at > 0;) {
        size_t start = ends[at].start;
        ends[at].next = next;
        next = at;
        at = start;
    }
    for (size_t at = 0, end = next; at < len; at = end, end = ends[at].next) {
        int32_t id = ends[end].id;
        /* Unknown characters side by side are one. */
        while (tok->fuse_unk && id < 0 && end < len && ends[ends[end].next].id < 0) end = ends[end].next;
        USLI_TRY(put(ctx, tok, text + at, end - at, id, out));
    }
    return USL_OK;
}
