/* A loaded tokenizer at work. */
#include "core/text/tokenizer.h"

#include <stdio.h>
#include <string.h>

#include "core/text/parts.h"

usl_status usli_tokenizer_new(usl_ctx *ctx, usli_tokenizer **out) {
    usli_tokenizer *tok = usli_calloc(ctx, 1, sizeof *tok);
    *out = tok;
    if (!tok) return usli_nomem(ctx, sizeof *tok);
    tok->ctx = ctx;
    usli_ctx_retain(ctx);
    atomic_init(&tok->refs, 1);
    tok->model_unk = -1;
    for (int i = 0; i < USLI_SPECIALS; i++) tok->special[i] = -1;
    return USL_OK;
}

usli_tokenizer *usli_tokenizer_retain(usli_tokenizer *tok) {
    if (tok) atomic_fetch_add(&tok->refs, 1);
    return tok;
}

void usli_tokenizer_release(usli_tokenizer *tok) {
    if (!tok || atomic_fetch_sub(&tok->refs, 1) != 1) return;
    usl_ctx *ctx = tok->ctx;
    usli_vocab_free(ctx, &tok->vocab);
    usli_merges_free(ctx, &tok->merges);
    usli_unigram_free(ctx, &tok->unigram);
    usli_free(ctx, tok->score_rank);
    usli_free(ctx, tok->prefix);
    usli_free(ctx, tok->suffix);
    usli_added_free(ctx, &tok->raw);
    usli_added_free(ctx, &tok->normalized);
    usli_steps_free(ctx, &tok->normalizer);
    usli_steps_free(ctx, &tok->pre_tokenizer);
    usli_steps_free(ctx, &tok->decoder);
    usli_free(ctx, tok->extra.items);
    usli_free(ctx, tok->template_before.items);
    usli_free(ctx, tok->template_after.items);
    usli_free(ctx, tok->chat_template);
    for (size_t i = 0; i < tok->template_count; i++) {
        usli_free(ctx, tok->templates[i].name);
        usli_free(ctx, tok->templates[i].text);
    }
    usli_free(ctx, tok->templates);
    for (size_t i = 0; i < tok->renamed_count; i++) {
        usli_free(ctx, tok->renamed[i].from);
        usli_free(ctx, tok->renamed[i].to);
    }
    usli_free(ctx, tok->renamed);
    if (tok->source) usli_map_release(tok->source);
    usli_free(ctx, tok->config);
    usli_free(ctx, tok);
    usl_ctx_free(ctx);
}

/* ---- Putting together
 * ------------------------------------------------------------------------------------------------------ */

usl_status usli_tokenizer_add_token(usli_tokenizer *tok, const usli_added *flags) {
    usli_added token = *flags;
    usli_entry *e = &tok->vocab.entries[token.id];
    e->special = token.special;
    e->kind = token.special ? USLI_TOKEN_CONTROL : USLI_TOKEN_USER;
    if (e->len == 0) return USL_OK;
    return usli_added_add(tok->ctx, token.normalized ? &tok->normalized : &tok->raw, &token);
}

/* Added tokens that stand for normalised text are looked for in their normal form. */
static usl_status normalize_added(usli_tokenizer *tok, usli_added *token) {
    usli_work w = { 0 };
    usl_ctx *ctx = tok->ctx;
    usl_status st;
    USLI_TRYGO(usli_buf_add(ctx, &w.now.text, token->text, token->len));
    USLI_TRYGO(usli_normalize(ctx, &tok->normalizer, &w));
    char *text = usli_strndup(ctx, w.now.text.data, w.now.text.len);
    if (!text) {
        st = usli_nomem(ctx, w.now.text.len + 1);
        goto done;
    }
    token->text = text;
    token->len = w.now.text.len;
    token->owned = true;
done:
    usli_work_free(ctx, &w);
    return st;
}

usl_status usli_tokenizer_index_added(usli_tokenizer *tok) {
    usli_added_set *sets[] = { &tok->raw, &tok->normalized };
    usl_status st = USL_OK;
    for (int32_t c = 0; c < 0x800; c++) {
        char text[2] = { (char)(c < 0x80 ? c : 0xC0 | c >> 6), (char)(0x80 | (c & 63)) };
        tok->char_ids[c] = usli_vocab_find(&tok->vocab, text, c < 0x80 ? 1 : 2);
    }
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < sets[k]->count; i++) {
            usli_added *t = &sets[k]->items[i], old = *t;
            t->owned = false;
            t->text = usli_vocab_text(&tok->vocab, t->id);
            t->len = tok->vocab.entries[t->id].len;
            usl_status one = t->normalized ? normalize_added(tok, t) : USL_OK;
            if (st == USL_OK) st = one;
            if (one != USL_OK && old.owned)
                *t = old; /* what it had still stands */
            else if (old.owned)
                usli_free(tok->ctx, (char *)(uintptr_t)old.text);
        }
        size_t kept = 0;
        for (size_t i = 0; i < sets[k]->count; i++) {
            if (sets[k]->items[i].len)
                sets[k]->items[kept++] = sets[k]->items[i];
            else if (sets[k]->items[i].owned)
                usli_free(tok->ctx, (char *)sets[k]->items[i].text);
        }
        sets[k]->count = kept;
        usli_added_index(sets[k]);
    }
    return st;
}

usl_status usli_tokenizer_finish(usli_tokenizer *tok) {
    for (int i = 0; i < 256; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", i);
        tok->byte_ids[i] = usli_vocab_find(&tok->vocab, name, 6);
        if (tok->byte_fallback && tok->byte_ids[i] >= 0 &&
            tok->vocab.entries[tok->byte_ids[i]].kind == USLI_TOKEN_NORMAL)
            tok->vocab.entries[tok->byte_ids[i]].kind = USLI_TOKEN_BYTE;
    }
    if (tok->special[USLI_UNK] < 0) tok->special[USLI_UNK] = tok->model_unk;
    if (tok->model_unk >= 0) tok->vocab.entries[tok->model_unk].kind = USLI_TOKEN_UNKNOWN;
    usli_bpe_find_words(tok);
    usli_bpe_find_cuts(tok);
    /* A spelling lies in the vocabulary's blob, which has stopped moving only now. */
    return usli_tokenizer_index_added(tok);
}

/* ---- Ids to text
 * ----------------------------------------------------------------------------------------------------------- */

static usl_status bad_id(usl_ctx *ctx, int32_t id) {
    return usli_fail(ctx, USL_ERR_INVALID, "no token has the id %d; the ids come from another tokenizer", (int)id);
}

/* The spellings of ids as pieces; without a decoder they are joined by spaces. */
static usl_status spell(usl_ctx *ctx, const usli_tokenizer *tok, const int32_t *ids, size_t count, bool skip_special,
                        usli_work *w) {
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || (size_t)ids[i] >= tok->vocab.count || !tok->vocab.entries[ids[i]].used)
            return bad_id(ctx, ids[i]);
        const usli_entry *e = &tok->vocab.entries[ids[i]];
        if (skip_special && e->special) continue;
        if (!tok->has_decoder && w->now.text.len) USLI_TRY(usli_buf_add(ctx, &w->now.text, " ", 1));
        size_t start = w->now.text.len;
        USLI_TRY(usli_buf_add(ctx, &w->now.text, usli_vocab_text(&tok->vocab, ids[i]), e->len));
        USLI_TRY(usli_spans_add(ctx, &w->now.spans, start, w->now.text.len, false));
    }
    return USL_OK;
}

usl_status usli_tokenizer_decode(usl_ctx *ctx, const usli_tokenizer *tok, const int32_t *ids, size_t count,
                                 bool skip_special, char **text, size_t *len) {
    usli_work w = { 0 };
    usli_buf out = { 0 };
    usl_status st;
    *text = NULL;
    if (len) *len = 0;
    /* Both texts exist even when there is nothing to decode. */
    USLI_TRYGO(usli_buf_add(ctx, &w.now.text, "", 0));
    USLI_TRYGO(usli_buf_add(ctx, &w.next.text, "", 0));
    USLI_TRYGO(usli_buf_add(ctx, &out, "", 0));
    USLI_TRYGO(spell(ctx, tok, ids, count, skip_special, &w));
    if (tok->has_decoder) {
        USLI_TRYGO(usli_decode(ctx, &tok->decoder, &w));
        for (size_t i = 0; i < w.now.spans.count; i++) {
            usli_span s = w.now.spans.items[i];
            USLI_TRYGO(usli_buf_add(ctx, &out, w.now.text.data + s.start, s.end - s.start));
        }
    } else {
        USLI_TRYGO(usli_buf_add(ctx, &out, w.now.text.data, w.now.text.len));
    }
    *text = out.data;
    if (len) *len = out.len;
    out.data = NULL;
done:
    usli_work_free(ctx, &w);
    usli_free(ctx, out.data);
    return st;
}

/* ---- Questions
 * ------------------------------------------------------------------------------------------------------------- */

int64_t usli_tokenizer_size(const usli_tokenizer *tok) {
    return (int64_t)tok->vocab.count;
}

int32_t usli_tokenizer_id(const usli_tokenizer *tok, const char *text, size_t len) {
    return usli_vocab_find(&tok->vocab, text, len);
}

bool usli_tokenizer_token(const usli_tokenizer *tok, int32_t id, usli_token *out) {
    if (id < 0 || (size_t)id >= tok->vocab.count) return false;
    const usli_entry *e = &tok->vocab.entries[id];
    *out = (usli_token){ e->used ? usli_vocab_text(&tok->vocab, id) : "", e->len, (usli_token_kind)e->kind, e->score };
    return true;
}

int32_t usli_tokenizer_special(const usli_tokenizer *tok, usli_special which) {
    return tok->special[which];
}

bool usli_tokenizer_adds_bos(const usli_tokenizer *tok) {
    return tok->adds_bos;
}

bool usli_tokenizer_adds_eos(const usli_tokenizer *tok) {
    return tok->adds_eos;
}

bool usli_tokenizer_adds_space_prefix(const usli_tokenizer *tok) {
    for (size_t i = 0; i < tok->normalizer.count; i++)
        if (tok->normalizer.items[i].kind == USLI_NORM_PREPEND) return true;
    for (size_t i = 0; i < tok->pre_tokenizer.count; i++) {
        const usli_step *s = &tok->pre_tokenizer.items[i];
        if (s->kind == USLI_PRE_METASPACE && s->prepend != USLI_PREPEND_NEVER) return true;
        if (s->kind == USLI_PRE_BYTE_LEVEL && s->add_prefix_space) return true;
    }
    return false;
}

size_t usli_tokenizer_merges(const usli_tokenizer *tok) {
    return tok->merges.count;
}

void usli_tokenizer_merge(const usli_tokenizer *tok, size_t rank, int32_t *left, int32_t *right) {
    *left = tok->merges.pairs[3 * rank];
    *right = tok->merges.pairs[3 * rank + 1];
}

const char *usli_tokenizer_source(const usli_tokenizer *tok, size_t *len) {
    *len = tok->source ? tok->source->size : 0;
    return tok->source ? (const char *)tok->source->data : NULL;
}
