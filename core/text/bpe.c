/* Byte-pair encoding of one piece: characters become symbols, and the best pair of neighbours is joined until none is
 * left. The two models differ only in what makes two neighbours a pair and how good it is. */
#include <string.h>

#include "core/text/parts.h"

enum { WORDS_MIN = 32, WORDS_MAX = 16384, SHORT = 40 };

usl_status usli_bpe_work_new(usl_ctx *ctx, usli_bpe_work *w, size_t len) {
    w->word_count = WORDS_MIN;
    while (w->word_count < WORDS_MAX && w->word_count < len / 8) w->word_count *= 2;
    w->words = usli_calloc(ctx, w->word_count, sizeof *w->words);
    return w->words ? USL_OK : usli_nomem(ctx, w->word_count * sizeof *w->words);
}

void usli_bpe_work_free(usl_ctx *ctx, usli_bpe_work *w) {
    usli_free(ctx, w->words);
    usli_free(ctx, w->symbols);
    usli_free(ctx, w->ends);
    usli_free(ctx, w->heap);
    usli_free(ctx, w->affixed.data);
    usli_free(ctx, w->spelled.data);
    memset(w, 0, sizeof *w);
}

static usl_status add_symbol(usl_ctx *ctx, usli_bpe_work *w, size_t start, size_t len, int32_t id) {
    USLI_TRY(usli_grow(ctx, &w->symbols, &w->symbol_cap, w->symbol_count + 1, sizeof *w->symbols));
    int32_t i = (int32_t)w->symbol_count++;
    w->symbols[i] = (usli_symbol){ (uint32_t)start, (uint32_t)len, i - 1, i + 1, id };
    return USL_OK;
}

/* ---- The heap: the lowest rank first, of equal ones the leftmost
 * -------------------------------------------------------- */

static bool before(const usli_bigram *a, const usli_bigram *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static usl_status push(usl_ctx *ctx, usli_bpe_work *w, usli_bigram item) {
    USLI_TRY(usli_grow(ctx, &w->heap, &w->heap_cap, w->heap_count + 1, sizeof *w->heap));
    size_t i = w->heap_count++;
    for (; i && before(&item, &w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = item;
    return USL_OK;
}

static usli_bigram pop(usli_bpe_work *w) {
    usli_bigram top = w->heap[0], last = w->heap[--w->heap_count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < w->heap_count; i = child) {
        if (child + 1 < w->heap_count && before(&w->heap[child + 1], &w->heap[child])) child++;
        if (!before(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
    }
    if (w->heap_count) w->heap[i] = last;
    return top;
}

/* ---- Pairs
 * ------------------------------------------------------------------------------------------------------------------ */

static usl_status try_pair(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, int32_t left) {
    if (left < 0) return USL_OK;
    const usli_symbol *a = &w->symbols[left];
    if (a->next < 0) return USL_OK;
    const usli_symbol *b = &w->symbols[a->next];
    usli_bigram pair = { 0, (uint32_t)left, a->len + b->len, -1 };
    if (tok->model == USLI_MODEL_SPM) {
        pair.id = usli_vocab_find(&tok->vocab, text + a->start, pair.len);
        if (pair.id < 0) return USL_OK;
        pair.rank = tok->score_rank[pair.id];
    } else {
        const usli_merge *merge = a->id < 0 || b->id < 0 ? NULL : usli_merges_find(&tok->merges, a->id, b->id);
        if (!merge) return USL_OK;
        pair.rank = merge->rank1;
        pair.id = merge->result;
    }
    return push(ctx, w, pair);
}

static usl_status merge_all(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text) {
    w->heap_count = 0;
    if (w->symbol_count) w->symbols[w->symbol_count - 1].next = -1;
    for (size_t i = 0; i + 1 < w->symbol_count; i++) USLI_TRY(try_pair(ctx, tok, w, text, (int32_t)i));
    while (w->heap_count) {
        usli_bigram best = pop(w);
        usli_symbol *a = &w->symbols[best.left];
        if (a->len == 0 || a->next < 0) continue;
        usli_symbol *b = &w->symbols[a->next];
        /* Symbols only grow, so the same length means the same pair. */
        if (a->len + b->len != best.len) continue;
        a->len = best.len;
        a->id = best.id;
        a->next = b->next;
        b->len = 0;
        if (a->next >= 0) w->symbols[a->next].prev = (int32_t)best.left;
        USLI_TRY(try_pair(ctx, tok, w, text, a->prev));
        USLI_TRY(try_pair(ctx, tok, w, text, (int32_t)best.left));
    }
    return USL_OK;
}

/* The same without a heap, for as few symbols as most words have: the best pair is looked for anew each time. */
static usl_status merge_short(usl_ctx *ctx, const usli_tokenizer *tok, const usli_bpe_work *w, usli_ids *out) {
    int32_t ids[SHORT + 1], results[SHORT + 1];
    uint32_t ranks[SHORT + 1]; /* of the pair that begins here; UINT32_MAX: none */
    size_t n = w->symbol_count;
    for (size_t i = 0; i < n; i++) ids[i] = w->symbols[i].id;
#define RANK(i)                                                                                           \
    do {                                                                                                  \
        const usli_merge *m_ =                                                                            \
            ids[i] < 0 || ids[(i) + 1] < 0 ? NULL : usli_merges_find(&tok->merges, ids[i], ids[(i) + 1]); \
        ranks[i] = m_ ? m_->rank1 : UINT32_MAX;                                                           \
        results[i] = m_ ? m_->result : -1;                                                                \
    } while (0)
    for (size_t i = 0; i + 1 < n; i++) RANK(i);
    while (n > 1) {
        size_t best = 0;
        uint32_t rank = ranks[0];
        for (size_t i = 1; i + 1 < n; i++)
            if (ranks[i] < rank) rank = ranks[best = i];
        if (rank == UINT32_MAX) break;
        ids[best] = results[best];
        n--;
        for (size_t i = best + 1; i < n; i++) {
            ids[i] = ids[i + 1];
            ranks[i] = ranks[i + 1];
            results[i] = results[i + 1];
        }
        if (best + 1 < n) RANK(best);
        if (best) RANK(best - 1);
    }
#undef RANK
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= 0) USLI_TRY(usli_ids_add(ctx, out, ids[i]));
    return USL_OK;
}

/* ---- Symbols
 * ------------------------------------------------------------------------------------------------------------------ */

/* The id of a character with what stands around a word's inner and last characters in the vocabulary. */
static usl_status char_id(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len,
                          size_t at, size_t n, int32_t *id) {
    bool prefix = tok->prefix && at > 0, suffix = tok->suffix && at + n == len;
    if (!prefix && !suffix) {
        *id = n <= 2 ? tok->char_ids[usli_utf8_get(text + at)] : usli_vocab_find(&tok->vocab, text + at, n);
        return USL_OK;
    }
    w->affixed.len = 0;
    if (prefix) USLI_TRY(usli_buf_add(ctx, &w->affixed, tok->prefix, tok->prefix_len));
    USLI_TRY(usli_buf_add(ctx, &w->affixed, text + at, n));
    if (suffix) USLI_TRY(usli_buf_add(ctx, &w->affixed, tok->suffix, tok->suffix_len));
    *id = usli_vocab_find(&tok->vocab, w->affixed.data, w->affixed.len);
    return USL_OK;
}

static bool all_bytes_known(const usli_tokenizer *tok, const char *text, size_t len) {
    for (size_t i = 0; i < len; i++)
        if (tok->byte_ids[(unsigned char)text[i]] < 0) return false;
    return true;
}

static usl_status bpe_symbols(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len) {
    size_t unknown = 0; /* bytes of unknown characters that wait to become one symbol */
    for (size_t i = 0, n; i < len; i += n) {
        n = usli_utf8_step(text[i]);
        int32_t id;
        USLI_TRY(char_id(ctx, tok, w, text, len, i, n, &id));
        if (id >= 0) {
            if (unknown) USLI_TRY(add_symbol(ctx, w, i - unknown, unknown, tok->model_unk));
            unknown = 0;
            USLI_TRY(add_symbol(ctx, w, i, n, id));
        } else if (tok->byte_fallback && all_bytes_known(tok, text + i, n)) {
            for (size_t k = 0; k < n; k++)
                USLI_TRY(add_symbol(ctx, w, i + k, 1, tok->byte_ids[(unsigned char)text[i + k]]));
        } else if (tok->model_unk >= 0) {
            if (unknown && !tok->fuse_unk) {
                USLI_TRY(add_symbol(ctx, w, i - unknown, unknown, tok->model_unk));
                unknown = 0;
            }
            unknown += n;
        } else if (tok->keep_unknown) {
            USLI_TRY(add_symbol(ctx, w, i, n, -1));
        }
    }
    return unknown ? add_symbol(ctx, w, len - unknown, unknown, tok->model_unk) : USL_OK;
}

static usl_status spm_symbols(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len) {
    for (size_t i = 0, n; i < len; i += n) {
        n = usli_utf8_step(text[i]);
        USLI_TRY(add_symbol(ctx, w, i, n, usli_vocab_find(&tok->vocab, text + i, n)));
    }
    return USL_OK;
}

/* A symbol of the SentencePiece model that is no token becomes its bytes. */
static usl_status add_bytes(usl_ctx *ctx, const usli_tokenizer *tok, const char *text, size_t len, usli_ids *out) {
    for (size_t i = 0; i < len; i++) {
        int32_t id = tok->byte_ids[(unsigned char)text[i]];
        if (id < 0) id = tok->model_unk;
        if (id >= 0) USLI_TRY(usli_ids_add(ctx, out, id));
    }
    return USL_OK;
}

static usl_status spell(usl_ctx *ctx, usli_buf *out, const char *text, size_t len) {
    USLI_TRY(usli_grow(ctx, &out->data, &out->cap, 2 * len + 1, 1));
    char *p = out->data;
    for (size_t i = 0; i < len; i++) {
        int32_t code = usli_byte_char((unsigned char)text[i]);
        if (code >= 0x80) {
            *p++ = (char)(0xC0 | code >> 6);
            *p++ = (char)(0x80 | (code & 63));
        } else {
            *p++ = (char)code;
        }
    }
    out->len = (size_t)(p - out->data);
    return USL_OK;
}

static usl_status encode_anew(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len,
                              usli_ids *out) {
    if (tok->direct) {
        USLI_TRY(spell(ctx, &w->spelled, text, len));
        text = w->spelled.data;
        len = w->spelled.len;
    }
    if (tok->model == USLI_MODEL_UNIGRAM) return usli_unigram_encode(ctx, tok, w, text, len, out);
    if (tok->ignore_merges) {
        int32_t id = usli_vocab_find(&tok->vocab, text, len);
        if (id >= 0) return usli_ids_add(ctx, out, id);
    }
    w->symbol_count = 0;
    USLI_TRY(tok->model == USLI_MODEL_SPM ? spm_symbols(ctx, tok, w, text, len) : bpe_symbols(ctx, tok, w, text, len));
    if (tok->model == USLI_MODEL_BPE && w->symbol_count <= SHORT) return merge_short(ctx, tok, w, out);
    USLI_TRY(merge_all(ctx, tok, w, text));
    for (int32_t i = w->symbol_count ? 0 : -1; i >= 0; i = w->symbols[i].next) {
        const usli_symbol *s = &w->symbols[i];
        if (s->id >= 0)
            USLI_TRY(usli_ids_add(ctx, out, s->id));
        else if (tok->model == USLI_MODEL_SPM)
            USLI_TRY(add_bytes(ctx, tok, text + s->start, s->len, out));
    }
    return USL_OK;
}

/* ---- Words
 * --------------------------------------------------------------------------------------------------------------------
 */

/* Texts repeat their words: the ids of a short one are kept. */
static usl_status encode_word(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len,
                              usli_ids *out) {
    if (len > sizeof w->words->text || len == 0) return encode_anew(ctx, tok, w, text, len, out);
    usli_word *known = &w->words[usli_hash_bytes(text, len) & (w->word_count - 1)];
    size_t at = out->count;
    if (known->len == len && memcmp(known->text, text, len) == 0) {
        if (known->count == 1) return usli_ids_add(ctx, out, known->ids[0]);
        for (int i = 0; i < known->count; i++) USLI_TRY(usli_ids_add(ctx, out, known->ids[i]));
        return USL_OK;
    }
    USLI_TRY(encode_anew(ctx, tok, w, text, len, out));
    size_t count = out->count - at;
    if (count > sizeof known->ids / sizeof *known->ids) return USL_OK;
    for (size_t i = 0; i < count; i++) known->ids[i] = out->items[at + i];
    known->count = (uint8_t)count;
    known->len = (uint8_t)len;
    memcpy(known->text, text, len);
    return USL_OK;
}

enum { SIGN = sizeof USLI_SPACE_SIGN - 1 };

static bool is_sign(const char *text, size_t len) {
    return len >= SIGN && memcmp(text, USLI_SPACE_SIGN, SIGN) == 0;
}

/* The next place after a character that is no space sign where one begins; len when there is none. */
static size_t word_end(const char *text, size_t len) {
    size_t i = 0;
    while (is_sign(text + i, len - i)) i += SIGN;
    while (i < len) {
        const char *hit = memchr(text + i, USLI_SPACE_SIGN[0], len - i);
        if (!hit) return len;
        i = (size_t)(hit - text);
        if (is_sign(hit, len - i)) return i;
        i++;
    }
    return len;
}

/* Notes the bytes before which a token that can come to be lies across the beginning of a word. */
static void note_joints(usli_tokenizer *tok, int32_t id) {
    const char *text = usli_vocab_text(&tok->vocab, id);
    size_t len = tok->vocab.entries[id].len;
    for (size_t at = 0; (at += word_end(text + at, len - at)) < len;) tok->joint[(unsigned char)text[at - 1]] = true;
}

static bool spells_itself(const usli_tokenizer *tok, int32_t id) {
    uint8_t kind = tok->vocab.entries[id].kind;
    return kind != USLI_TOKEN_BYTE && kind != USLI_TOKEN_UNKNOWN;
}

void usli_bpe_find_words(usli_tokenizer *tok) {
    /* These look at where a piece begins and ends. */
    if (tok->prefix || tok->suffix || tok->ignore_merges || tok->model == USLI_MODEL_UNIGRAM) return;
    /* Unknown characters on both sides may become one token. */
    if (usli_vocab_find(&tok->vocab, USLI_SPACE_SIGN, SIGN) < 0) return;
    if (tok->model == USLI_MODEL_SPM)
        for (size_t i = 0; i < tok->vocab.count; i++) note_joints(tok, (int32_t)i);
    for (size_t i = 0; i < tok->merges.count; i++) {
        const int32_t *pair = tok->merges.pairs + 3 * i;
        if (!spells_itself(tok, pair[0]) || !spells_itself(tok, pair[1])) return;
        note_joints(tok, pair[2]);
    }
    tok->words_part = true;
}

void usli_bpe_find_cuts(usli_tokenizer *tok) {
    const usli_steps *steps = &tok->pre_tokenizer;
    const usli_step *last = steps->count ? &steps->items[steps->count - 1] : NULL;
    tok->direct = false;
    tok->cut_count = 0;
    if (tok->model != USLI_MODEL_BPE || tok->prefix || tok->suffix || tok->words_part) return;
    if (!last || last->kind != USLI_PRE_BYTE_LEVEL || last->add_prefix_space) return;
    for (size_t i = 0; i < steps->count; i++) {
        const usli_step *s = &steps->items[i];
        usli_scan_fn scan = s->regex ? usli_regex_scan(s->regex) : s->kind == USLI_PRE_DIGITS ? usli_scan_number : NULL;
        if (s == last && !s->regex) continue;
        if (!scan || s->behavior != USLI_ISOLATED || tok->cut_count == sizeof tok->cuts / sizeof *tok->cuts) return;
        if (s != last && s->kind != USLI_PRE_SPLIT && s->kind != USLI_PRE_DIGITS) return;
        tok->cuts[tok->cut_count++] = scan;
    }
    tok->direct = true;
}

usl_status usli_bpe_encode(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len,
                           usli_ids *out) {
    for (size_t n; len; text += n, len -= n) {
        n = tok->words_part ? word_end(text, len) : len;
        while (n < len && tok->joint[(unsigned char)text[n - 1]]) n += word_end(text + n, len - n);
        USLI_TRY(encode_word(ctx, tok, w, text, n, out));
    }
    return USL_OK;
}
