/* A tokenizer from GGUF's metadata, which does what llama.cpp does with the same file. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/text/parts.h"

typedef struct source {
    usl_ctx *ctx;
    const usli_gguf *file;
    usli_tokenizer *tok;
} source;

#define KEY "tokenizer.ggml."

/* An array whose elements suit; *out is NULL when it is absent and need not be there. */
static usl_status find_array(const source *s, const char *key, bool strings, bool needed, uint64_t count,
                             const usli_gguf_kv **out) {
    const usli_gguf_kv *kv = usli_gguf_find(s->file, key);
    *out = kv;
    if (!kv && !needed) return USL_OK;
    if (!kv) return usli_fail(s->ctx, USL_ERR_FORMAT, "the file has no %s; it was written without a tokenizer", key);
    if (kv->type != USLI_GGUF_ARRAY || (kv->elem == USLI_GGUF_STRING) != strings)
        return usli_fail(s->ctx, USL_ERR_FORMAT, "%s is not an array of %s", key, strings ? "texts" : "numbers");
    if (count && kv->count != count)
        return usli_fail(s->ctx, USL_ERR_FORMAT, "%s has %llu entries and the vocabulary %llu", key,
                         (unsigned long long)kv->count, (unsigned long long)count);
    return USL_OK;
}

static usl_status read_tokens(source *s) {
    const usli_gguf_kv *tokens, *types, *scores;
    usli_vocab *v = &s->tok->vocab;
    bool spm = s->tok->model == USLI_MODEL_SPM;
    USLI_TRY(find_array(s, KEY "tokens", true, true, 0, &tokens));
    USLI_TRY(find_array(s, KEY "token_type", false, false, tokens->count, &types));
    USLI_TRY(find_array(s, KEY "scores", false, spm, tokens->count, &scores));
    for (uint64_t i = 0; i < tokens->count; i++) {
        usli_gguf_str text = tokens->strings[i];
        size_t broken, valid = usli_utf8_valid(text.data, text.len, &broken);
        if (valid != text.len)
            return usli_fail(s->ctx, USL_ERR_FORMAT, KEY "tokens: token %llu is not valid UTF-8",
                             (unsigned long long)i);
        USLI_TRY(usli_vocab_add(s->ctx, v, text.data, text.len, (int64_t)i, true));
        int64_t type = types ? usli_gguf_array_int(types, i) : USLI_TOKEN_NORMAL;
        double score = scores ? usli_gguf_array_float(scores, i) : 0;
        if (isnan(score))
            return usli_fail(s->ctx, USL_ERR_FORMAT, KEY "scores: score %llu is no number", (unsigned long long)i);
        v->entries[i].kind = (uint8_t)(type >= USLI_TOKEN_NORMAL && type <= USLI_TOKEN_BYTE ? type : USLI_TOKEN_NORMAL);
        v->entries[i].score = (float)score;
    }
    if (!v->count) return usli_fail(s->ctx, USL_ERR_FORMAT, KEY "tokens is empty");
    return USL_OK;
}

/* Ends of a turn are special whatever the file says: many converters forgot. */
static bool must_be_control(const char *text) {
    static const char *const NAMES[] = { "<|eot_id|>",    "<|eom_id|>",    "<|im_end|>",      "<|end|>",
                                         "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>" };
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(text, NAMES[i]) == 0) return true;
    return false;
}

static bool is_one_of(const char *text, const char *const *names) {
    for (; *names; names++)
        if (strcmp(text, *names) == 0) return true;
    return false;
}

static bool contains_phi3(usli_gguf_str name) {
    for (size_t i = 0; i + 4 <= name.len; i++) {
        const char *p = name.data + i;
        if ((p[0] | 32) == 'p' && (p[1] | 32) == 'h' && (p[2] | 32) == 'i' &&
            (p[3] == '3' || (i + 5 <= name.len && memcmp(p + 3, "-3", 2) == 0)))
            return true;
    }
    return false;
}

/* Control, user-defined and unknown tokens are looked for in the text first. Those of Phi-3 eat the spaces behind them.
 */
static usl_status add_special(source *s) {
    static const char *const KEEP_SPACES[] = { "<unk>", "<s>", "<|endoftext|>", NULL };
    bool phi3 = contains_phi3(usli_gguf_string(s->file, "general.name"));
    usli_vocab *v = &s->tok->vocab;
    for (size_t i = 0; i < v->count; i++) {
        usli_entry *e = &v->entries[i];
        const char *text = usli_vocab_text(v, (int32_t)i);
        if (e->kind != USLI_TOKEN_CONTROL && must_be_control(text)) e->kind = USLI_TOKEN_CONTROL;
        uint8_t kind = e->kind;
        if (kind != USLI_TOKEN_CONTROL && kind != USLI_TOKEN_USER && kind != USLI_TOKEN_UNKNOWN) continue;
        usli_added token = { .id = (int32_t)i,
                             .special = kind != USLI_TOKEN_USER,
                             .rstrip = phi3 && !is_one_of(text, KEEP_SPACES) };
        USLI_TRY(usli_tokenizer_add_token(s->tok, &token));
        e->kind = kind;
    }
    return USL_OK;
}

static usl_status read_merges(source *s) {
    const usli_gguf_kv *merges;
    usli_tokenizer *tok = s->tok;
    USLI_TRY(find_array(s, KEY "merges", true, true, 0, &merges));
    for (uint64_t i = 0; i < merges->count; i++) {
        usli_gguf_str m = merges->strings[i];
        /* The first character may be a space itself. */
        const char *space = m.len > 2 ? memchr(m.data + 1, ' ', m.len - 2) : NULL;
        if (!space)
            return usli_fail(s->ctx, USL_ERR_FORMAT, KEY "merges: merge %llu is not two tokens", (unsigned long long)i);
        size_t left_len = (size_t)(space - m.data), right_len = m.len - left_len - 1;
        int32_t left = usli_vocab_find(&tok->vocab, m.data, left_len);
        int32_t right = usli_vocab_find(&tok->vocab, space + 1, right_len);
        usli_buf joined = { 0 };
        usl_status st = usli_buf_add(s->ctx, &joined, m.data, left_len);
        if (st == USL_OK) st = usli_buf_add(s->ctx, &joined, space + 1, right_len);
        int32_t result = st == USL_OK ? usli_vocab_find(&tok->vocab, joined.data, joined.len) : -1;
        usli_free(s->ctx, joined.data);
        USLI_TRY(st);
        if (left < 0 || right < 0 || result < 0)
            return usli_fail(s->ctx, USL_ERR_FORMAT,
                             KEY "merges: merge %llu names a token that is not in the vocabulary",
                             (unsigned long long)i);
        USLI_TRY(usli_merges_add(s->ctx, &tok->merges, left, right, result));
    }
    return usli_merges_index(s->ctx, &tok->merges);
}

typedef struct scored {
    float score;
    int32_t id;
} scored;

static int by_score(const void *pa, const void *pb) {
    const scored *a = pa, *b = pb;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

/* The best score is rank 0; equal scores are equal ranks, so that the leftmost pair goes first. */
static usl_status rank_scores(source *s) {
    usli_tokenizer *tok = s->tok;
    size_t n = tok->vocab.count;
    scored *order = usli_calloc(s->ctx, n, sizeof *order);
    tok->score_rank = usli_calloc(s->ctx, n, sizeof *tok->score_rank);
    if (!order || !tok->score_rank) {
        usli_free(s->ctx, order);
        return usli_nomem(s->ctx, n * sizeof *order);
    }
    for (size_t i = 0; i < n; i++) order[i] = (scored){ tok->vocab.entries[i].score, (int32_t)i };
    qsort(order, n, sizeof *order, by_score);
    for (size_t i = 1; i < n; i++)
        tok->score_rank[order[i].id] = tok->score_rank[order[i - 1].id] + (order[i].score < order[i - 1].score);
    usli_free(s->ctx, order);
    return USL_OK;
}

static usl_status special_id(source *s, const char *key, int32_t fallback, int32_t *out) {
    int64_t id = usli_gguf_int(s->file, key, fallback);
    if (id < -1 || id >= (int64_t)s->tok->vocab.count)
        return usli_fail(s->ctx, USL_ERR_FORMAT, "%s is %lld, which is not in the vocabulary", key, (long long)id);
    *out = (int32_t)id;
    return USL_OK;
}

/* tokenizer.chat_template.tool_use and the like, beside tokenizer.chat_template. */
static usl_status named_templates(source *s) {
    static const char PREFIX[] = "tokenizer.chat_template.";
    for (uint64_t i = 0; i < s->file->kv_count; i++) {
        const usli_gguf_kv *kv = &s->file->kv[i];
        size_t n = sizeof PREFIX - 1;
        if (kv->type != USLI_GGUF_STRING || strncmp(kv->key, PREFIX, n) != 0) continue;
        USLI_TRY(usli_tokenizer_add_template(s->tok, kv->key + n, strlen(kv->key + n), kv->strings[0].data,
                                             kv->strings[0].len));
    }
    return USL_OK;
}

static usl_status read_ends(source *s) {
    usli_tokenizer *tok = s->tok;
    bool spm = tok->model == USLI_MODEL_SPM;
    USLI_TRY(special_id(s, KEY "bos_token_id", spm && tok->vocab.count > 1 ? 1 : -1, &tok->special[USLI_BOS]));
    USLI_TRY(special_id(s, KEY "eos_token_id", spm && tok->vocab.count > 2 ? 2 : -1, &tok->special[USLI_EOS]));
    USLI_TRY(special_id(s, KEY "padding_token_id", -1, &tok->special[USLI_PAD]));
    USLI_TRY(special_id(s, KEY "unknown_token_id", spm ? 0 : -1, &tok->special[USLI_UNK]));
    if (spm) tok->model_unk = tok->special[USLI_UNK];
    tok->adds_bos =
        usli_gguf_bool(s->file, KEY "add_bos_token", spm || tok->pre->add_bos) && tok->special[USLI_BOS] >= 0;
    tok->adds_eos = usli_gguf_bool(s->file, KEY "add_eos_token", false) && tok->special[USLI_EOS] >= 0;
    if (tok->adds_bos) USLI_TRY(usli_ids_add(s->ctx, &tok->template_before, tok->special[USLI_BOS]));
    if (tok->adds_eos) USLI_TRY(usli_ids_add(s->ctx, &tok->template_after, tok->special[USLI_EOS]));
    USLI_TRY(named_templates(s));
    usli_gguf_str chat = usli_gguf_string(s->file, "tokenizer.chat_template");
    if (!chat.data) return USL_OK;
    tok->chat_template = usli_strndup(s->ctx, chat.data, chat.len);
    return tok->chat_template ? USL_OK : usli_nomem(s->ctx, chat.len + 1);
}

static usl_status read_kind(source *s) {
    usli_gguf_str model = usli_gguf_string(s->file, KEY "model"), pre = usli_gguf_string(s->file, KEY "pre");
    usli_tokenizer *tok = s->tok;
    if (!model.data)
        return usli_fail(s->ctx, USL_ERR_FORMAT, "the file has no " KEY "model; it was written without a tokenizer");
    tok->has_decoder = true;
    if (model.len == 5 && memcmp(model.data, "llama", 5) == 0) {
        tok->model = USLI_MODEL_SPM;
        tok->byte_fallback = tok->fuse_unk = true;
        tok->space_prefix = usli_gguf_bool(s->file, KEY "add_space_prefix", true);
        return USL_OK;
    }
    if (model.len != 4 || memcmp(model.data, "gpt2", 4) != 0)
        return usli_fail(s->ctx, USL_ERR_UNSUPPORTED, KEY "model \"%.*s\" is not supported; llama and gpt2 are",
                         (int)(model.len < 50 ? model.len : 50), model.data);
    if (!pre.data) pre = (usli_gguf_str){ "default", 7 };
    tok->pre = usli_ggml_pre_find(pre.data, pre.len);
    if (!tok->pre)
        return usli_fail(s->ctx, USL_ERR_UNSUPPORTED, KEY "pre \"%.*s\" is not supported",
                         (int)(pre.len < 50 ? pre.len : 50), pre.data);
    tok->keep_unknown = true;
    tok->ignore_merges = tok->pre->ignore_merges;
    return USL_OK;
}

static usl_status parse(usl_ctx *ctx, const char *text, usl_status (*read)(usl_ctx *, const json_t *, usli_steps *),
                        usli_steps *out) {
    json_t *json = NULL;
    USLI_TRY(usli_json_parse(ctx, "tokenizer", text, strlen(text), &json));
    usl_status st = read(ctx, json, out);
    json_decref(json);
    return st;
}

/* The steps are made of the same JSON that a tokenizer.json would hold, so that saving it changes nothing. */
static usl_status make_steps(source *s) {
    usli_tokenizer *tok = s->tok;
    usli_buf text = { 0 };
    usl_status st;
    USLI_TRYGO(parse(s->ctx, usli_ggml_normalizer(tok), usli_read_normalizer, &tok->normalizer));
    USLI_TRYGO(parse(s->ctx, usli_ggml_decoder(tok), usli_read_decoder, &tok->decoder));
    if (tok->pre) {
        USLI_TRYGO(usli_ggml_pre_json(s->ctx, tok->pre, &text));
        USLI_TRYGO(parse(s->ctx, text.data, usli_read_pre_tokenizer, &tok->pre_tokenizer));
    }
done:
    usli_free(s->ctx, text.data);
    return st;
}

static usl_status load(source *s) {
    USLI_TRY(read_kind(s));
    USLI_TRY(read_tokens(s));
    USLI_TRY(s->tok->model == USLI_MODEL_SPM ? rank_scores(s) : read_merges(s));
    USLI_TRY(read_ends(s));
    USLI_TRY(make_steps(s));
    USLI_TRY(add_special(s));
    return usli_tokenizer_finish(s->tok);
}

usl_status usli_tokenizer_from_gguf(usl_ctx *ctx, const usli_gguf *file, usli_tokenizer **out) {
    source s = { .ctx = ctx, .file = file };
    *out = NULL;
    USLI_TRY(usli_tokenizer_new(ctx, &s.tok));
    usl_status st = load(&s);
    if (st == USL_OK)
        *out = s.tok;
    else
        usli_tokenizer_release(s.tok);
    if (st != USL_OK && st != USL_ERR_NOMEM && file->map) return usli_fail_prefix(ctx, "%s", file->map->path);
    return st;
}
