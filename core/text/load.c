/* tokenizer.json and the files beside it. The large parts (vocabulary, merges) are pulled event by event; the small
 * ones are read as values. */
#include <string.h>

#include "core/base/file.h"
#include "core/text/parts.h"

typedef struct loader {
    usl_ctx *ctx;
    usli_tokenizer *tok;
    const char *name; /* of the file, for errors */
    usli_buf key;     /* an entry's name, while its value is read */
    const char *merges, *merges_end;
    usli_cut cuts[2]; /* for the cache; whatever stands there twice is not kept */
    bool twice;
    json_t *parts[6];
    char unk[256];
    size_t unk_len;
    bool has_unk, has_vocab, scored;
} loader;

enum { NORMALIZER, PRE_TOKENIZER, POST_PROCESSOR, DECODER, ADDED_TOKENS, PART_COUNT };
static const char *const PARTS[PART_COUNT] = { "normalizer", "pre_tokenizer", "post_processor", "decoder",
                                               "added_tokens" };

/* ---- The model
 * ----------------------------------------------------------------------------------------------------------- */

static usl_status keep_key(loader *l, const usli_json_reader *r) {
    l->key.len = 0;
    return usli_buf_add(l->ctx, &l->key, r->str, r->len);
}

/* Unigram's: an array of [token, score], whose places are the ids. */
static usl_status read_scored(loader *l, usli_json_reader *r) {
    for (int64_t id = 0;; id++) {
        USLI_TRY(usli_json_next(r));
        if (r->kind == USLI_JSON_ARRAY_END) return USL_OK;
        if (r->kind != USLI_JSON_ARRAY)
            return usli_fail(l->ctx, USL_ERR_FORMAT, "entry %lld of the model's vocab must be a token and its score",
                             (long long)id + 1);
        USLI_TRY(usli_json_expect(r, USLI_JSON_STRING, "a token"));
        USLI_TRY(keep_key(l, r));
        USLI_TRY(usli_json_next(r));
        if (r->kind != USLI_JSON_FLOAT && r->kind != USLI_JSON_INT)
            return usli_fail(l->ctx, USL_ERR_FORMAT, "the score of token %lld must be a number", (long long)id);
        double score = r->d;
        USLI_TRY(usli_json_expect(r, USLI_JSON_ARRAY_END, "the end of a token's entry"));
        USLI_TRY(usli_vocab_add(l->ctx, &l->tok->vocab, l->key.data, l->key.len, id, true));
        USLI_TRY(usli_unigram_add(l->ctx, &l->tok->unigram, l->key.len, score));
        l->tok->vocab.entries[id].score = (float)score;
    }
}

static usl_status read_vocab(loader *l, usli_json_reader *r) {
    if (r->kind == USLI_JSON_ARRAY) {
        l->has_vocab = l->scored = true;
        return read_scored(l, r);
    }
    if (r->kind != USLI_JSON_OBJECT) return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's vocab must be an object");
    l->has_vocab = true;
    for (;;) {
        USLI_TRY(usli_json_next(r));
        if (r->kind == USLI_JSON_OBJECT_END) return USL_OK;
        USLI_TRY(keep_key(l, r));
        USLI_TRY(usli_json_expect(r, USLI_JSON_INT, "a token's id"));
        USLI_TRY(usli_vocab_add(l->ctx, &l->tok->vocab, l->key.data, l->key.len, r->i, false));
    }
}

static usl_status merge_id(loader *l, const char *text, size_t len, int32_t *id) {
    *id = usli_vocab_find(&l->tok->vocab, text, len);
    if (*id >= 0) return USL_OK;
    return usli_fail(l->ctx, USL_ERR_FORMAT, "merge %zu names \"%.*s\", which is not in the vocabulary",
                     l->tok->merges.count + 1, (int)(len < 100 ? len : 100), text);
}

/* l->key holds the left part and then the right one. */
static usl_status add_merge(loader *l, size_t left_len) {
    int32_t left, right, result;
    char *text = l->key.data;
    size_t skip = l->tok->prefix_len, len = l->key.len;
    USLI_TRY(merge_id(l, text, left_len, &left));
    USLI_TRY(merge_id(l, text + left_len, len - left_len, &right));
    /* The joined word keeps only its first part's prefix. */
    if (skip && len - left_len >= skip) {
        memmove(text + left_len, text + left_len + skip, len - left_len - skip);
        len -= skip;
    }
    USLI_TRY(merge_id(l, text, len, &result));
    return usli_merges_add(l->ctx, &l->tok->merges, left, right, result);
}

static usl_status read_merge(loader *l, usli_json_reader *r) {
    l->key.len = 0;
    if (r->kind == USLI_JSON_STRING) {
        const char *space = memchr(r->str, ' ', r->len), *end = r->str + r->len;
        if (r->len >= 8 && memcmp(r->str, "#version", 8) == 0) return USL_OK;
        if (!space || memchr(space + 1, ' ', (size_t)(end - space) - 1))
            return usli_fail(l->ctx, USL_ERR_FORMAT, "merge %zu must be two tokens with a space between them",
                             l->tok->merges.count + 1);
        size_t left = (size_t)(space - r->str);
        USLI_TRY(usli_buf_add(l->ctx, &l->key, r->str, left));
        USLI_TRY(usli_buf_add(l->ctx, &l->key, space + 1, r->len - left - 1));
        return add_merge(l, left);
    }
    if (r->kind != USLI_JSON_ARRAY)
        return usli_fail(l->ctx, USL_ERR_FORMAT, "merge %zu must be a text or a pair", l->tok->merges.count + 1);
    USLI_TRY(usli_json_expect(r, USLI_JSON_STRING, "the left part of a merge"));
    USLI_TRY(usli_buf_add(l->ctx, &l->key, r->str, r->len));
    size_t left = l->key.len;
    USLI_TRY(usli_json_expect(r, USLI_JSON_STRING, "the right part of a merge"));
    USLI_TRY(usli_buf_add(l->ctx, &l->key, r->str, r->len));
    USLI_TRY(usli_json_expect(r, USLI_JSON_ARRAY_END, "the end of a merge"));
    return add_merge(l, left);
}

/* After the vocabulary, whichever came first in the file. */
static usl_status read_merges(loader *l) {
    usli_json_reader r;
    usl_status st;
    usli_json_init(&r, l->ctx, l->name, l->merges, (size_t)(l->merges_end - l->merges));
    USLI_TRYGO(usli_json_expect(&r, USLI_JSON_ARRAY, "the model's merges"));
    for (;;) {
        USLI_TRYGO(usli_json_next(&r));
        if (r.kind == USLI_JSON_ARRAY_END) break;
        USLI_TRYGO(read_merge(l, &r));
    }
    st = usli_merges_index(l->ctx, &l->tok->merges);
done:
    usli_json_done(&r);
    return st;
}

static usl_status model_flag(loader *l, const usli_json_reader *r, const char *what, bool *out) {
    if (r->kind == USLI_JSON_NULL) return USL_OK;
    if (r->kind != USLI_JSON_BOOL)
        return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's %s must be true or false", what);
    *out = r->i != 0;
    return USL_OK;
}

static usl_status model_text(loader *l, const usli_json_reader *r, const char *what, char **out, size_t *len) {
    if (r->kind == USLI_JSON_NULL || (r->kind == USLI_JSON_STRING && r->len == 0)) return USL_OK;
    if (r->kind != USLI_JSON_STRING) return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's %s must be a text", what);
    usli_free(l->ctx, *out);
    *out = usli_strndup(l->ctx, r->str, r->len);
    *len = r->len;
    return *out ? USL_OK : usli_nomem(l->ctx, r->len + 1);
}

static usl_status model_unk(loader *l, const usli_json_reader *r) {
    if (r->kind == USLI_JSON_NULL) return USL_OK;
    if (r->kind != USLI_JSON_STRING || r->len >= sizeof l->unk)
        return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's unk_token must be a short text");
    memcpy(l->unk, r->str, r->len);
    l->unk_len = r->len;
    l->has_unk = true;
    return USL_OK;
}

static usl_status model_unk_id(loader *l, const usli_json_reader *r) {
    if (r->kind == USLI_JSON_NULL) return USL_OK;
    if (r->kind != USLI_JSON_INT || r->i < 0 || r->i > INT32_MAX)
        return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's unk_id must be a token's id");
    l->tok->model_unk = (int32_t)r->i;
    return USL_OK;
}

static usl_status model_dropout(loader *l, const usli_json_reader *r) {
    if (r->kind == USLI_JSON_NULL || ((r->kind == USLI_JSON_INT || r->kind == USLI_JSON_FLOAT) && r->d == 0))
        return USL_OK;
    return usli_fail(l->ctx, USL_ERR_UNSUPPORTED, "a BPE model with dropout is not supported");
}

static usl_status model_type(loader *l, const usli_json_reader *r) {
    if (r->kind == USLI_JSON_STRING && usli_json_is(r, "BPE")) return USL_OK;
    if (r->kind == USLI_JSON_STRING && usli_json_is(r, "Unigram")) {
        l->tok->model = USLI_MODEL_UNIGRAM;
        l->tok->fuse_unk = true;
        return USL_OK;
    }
    if (r->kind != USLI_JSON_STRING) return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's type must be a text");
    return usli_fail(l->ctx, USL_ERR_UNSUPPORTED, "the model %.*s is not supported; BPE and Unigram are",
                     (int)(r->len < 50 ? r->len : 50), r->str);
}

static void note_cut(loader *l, int i, const char *from, const char *to) {
    l->twice |= l->cuts[i].from != NULL;
    l->cuts[i] = (usli_cut){ from, to };
}

static usl_status model_field(loader *l, const char *key, usli_json_reader *r) {
    usli_tokenizer *t = l->tok;
    if (strcmp(key, "vocab") == 0) {
        const char *from = r->pos - 1;
        USLI_TRY(read_vocab(l, r));
        note_cut(l, 0, from, r->pos);
        return USL_OK;
    }
    if (strcmp(key, "merges") == 0) {
        if (r->kind != USLI_JSON_ARRAY) return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's merges must be an array");
        l->merges = r->pos - 1;
        USLI_TRY(usli_json_skip(r));
        l->merges_end = r->pos;
        note_cut(l, 1, l->merges, r->pos);
        return USL_OK;
    }
    if (strcmp(key, "type") == 0) return model_type(l, r);
    if (strcmp(key, "dropout") == 0) return model_dropout(l, r);
    if (strcmp(key, "unk_token") == 0) return model_unk(l, r);
    if (strcmp(key, "unk_id") == 0) return model_unk_id(l, r);
    if (strcmp(key, "byte_fallback") == 0) return model_flag(l, r, key, &t->byte_fallback);
    if (strcmp(key, "ignore_merges") == 0) return model_flag(l, r, key, &t->ignore_merges);
    if (strcmp(key, "fuse_unk") == 0) return model_flag(l, r, key, &t->fuse_unk);
    if (strcmp(key, "continuing_subword_prefix") == 0) return model_text(l, r, key, &t->prefix, &t->prefix_len);
    if (strcmp(key, "end_of_word_suffix") == 0) return model_text(l, r, key, &t->suffix, &t->suffix_len);
    return usli_json_skip(r);
}

static usl_status read_model(loader *l, usli_json_reader *r) {
    if (r->kind != USLI_JSON_OBJECT) return usli_fail(l->ctx, USL_ERR_FORMAT, "the model must be an object");
    for (;;) {
        char key[64];
        USLI_TRY(usli_json_next(r));
        if (r->kind == USLI_JSON_OBJECT_END) return USL_OK;
        size_t len = r->len < sizeof key ? r->len : 0;
        memcpy(key, r->str, len);
        key[len] = 0;
        USLI_TRY(usli_json_next(r));
        USLI_TRY(model_field(l, key, r));
    }
}

/* ---- The other parts
 * ------------------------------------------------------------------------------------------------------- */

static usl_status read_part(loader *l, usli_json_reader *r, json_t **out) {
    if (r->kind != USLI_JSON_OBJECT && r->kind != USLI_JSON_ARRAY) return USL_OK;
    const char *start = r->pos - 1;
    USLI_TRY(usli_json_skip(r));
    json_decref(*out);
    *out = NULL;
    return usli_json_parse(l->ctx, l->name, start, (size_t)(r->pos - start), out);
}

static usl_status read_top(loader *l, usli_json_reader *r) {
    bool has_model = false;
    USLI_TRY(usli_json_expect(r, USLI_JSON_OBJECT, "a tokenizer"));
    for (;;) {
        int part = 0;
        USLI_TRY(usli_json_next(r));
        if (r->kind == USLI_JSON_OBJECT_END) break;
        bool model = usli_json_is(r, "model");
        while (part < PART_COUNT && !usli_json_is(r, PARTS[part])) part++;
        USLI_TRY(usli_json_next(r));
        if (model && has_model) return usli_fail(l->ctx, USL_ERR_FORMAT, "there are two models");
        has_model |= model;
        USLI_TRY(model ? read_model(l, r) : part < PART_COUNT ? read_part(l, r, &l->parts[part]) : usli_json_skip(r));
    }
    USLI_TRY(usli_json_next(r));
    if (!has_model || !l->has_vocab)
        return usli_fail(l->ctx, USL_ERR_FORMAT, "there is no model with a vocab; is this a tokenizer.json?");
    return USL_OK;
}

static usl_status read_added_token(loader *l, const json_t *json) {
    const json_t *content = json_object_get(json, "content"), *id = json_object_get(json, "id");
    if (!json_is_string(content) || !json_is_integer(id))
        return usli_fail(l->ctx, USL_ERR_FORMAT, "an added token needs a content and an id");
    const char *text = json_string_value(content);
    size_t len = json_string_length(content);
    int32_t known = usli_vocab_find(&l->tok->vocab, text, len);
    if (known < 0) {
        USLI_TRY(usli_vocab_add(l->ctx, &l->tok->vocab, text, len, json_integer_value(id), false));
        known = (int32_t)json_integer_value(id);
    } else if (known != json_integer_value(id)) {
        return usli_fail(l->ctx, USL_ERR_FORMAT,
                         "the added token \"%.100s\" has the id %lld here and %d in the vocabulary", text,
                         (long long)json_integer_value(id), (int)known);
    }
    usli_added token = { .id = known,
                         .special = json_is_true(json_object_get(json, "special")),
                         .normalized = json_is_true(json_object_get(json, "normalized")),
                         .lstrip = json_is_true(json_object_get(json, "lstrip")),
                         .rstrip = json_is_true(json_object_get(json, "rstrip")),
                         .single_word = json_is_true(json_object_get(json, "single_word")) };
    return usli_tokenizer_add_token(l->tok, &token);
}

static usl_status template_ids(loader *l, const json_t *post, const char *name, usli_ids *out) {
    const json_t *ids = json_object_get(json_object_get(json_object_get(post, "special_tokens"), name), "ids");
    if (!json_is_array(ids))
        return usli_fail(l->ctx, USL_ERR_FORMAT,
                         "the post-processor's template names \"%.100s\" and gives no ids for it", name);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= (int64_t)l->tok->vocab.count)
            return usli_fail(l->ctx, USL_ERR_FORMAT,
                             "the post-processor's token \"%.100s\" has an id that is not in the vocabulary", name);
        USLI_TRY(usli_ids_add(l->ctx, out, (int32_t)json_integer_value(id)));
    }
    return USL_OK;
}

static usl_status read_template(loader *l, const json_t *post) {
    const json_t *single = json_object_get(post, "single");
    usli_tokenizer *t = l->tok;
    bool seen = false;
    if (t->template_before.count || t->template_after.count)
        return usli_fail(l->ctx, USL_ERR_UNSUPPORTED, "two post-processors with a template are not supported");
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *item = json_array_get(single, i);
        const char *name = json_string_value(json_object_get(json_object_get(item, "SpecialToken"), "id"));
        if (name)
            USLI_TRY(template_ids(l, post, name, seen ? &t->template_after : &t->template_before));
        else if (json_object_get(item, "Sequence") && !seen)
            seen = true;
        else
            return usli_fail(l->ctx, USL_ERR_UNSUPPORTED,
                             "the post-processor's template must hold tokens and the text once");
    }
    if (!seen) return usli_fail(l->ctx, USL_ERR_FORMAT, "the post-processor's template leaves out the text");
    return USL_OK;
}

static usl_status read_post_processor(loader *l, const json_t *post) {
    if (!post) return USL_OK;
    const char *type = json_string_value(json_object_get(post, "type"));
    if (!type) return usli_fail(l->ctx, USL_ERR_FORMAT, "the post-processor has no type");
    if (strcmp(type, "ByteLevel") == 0) return USL_OK; /* moves offsets only */
    if (strcmp(type, "TemplateProcessing") == 0) return read_template(l, post);
    if (strcmp(type, "Sequence") != 0)
        return usli_fail(l->ctx, USL_ERR_UNSUPPORTED, "the post-processor %.100s is not supported", type);
    const json_t *list = json_object_get(post, "processors");
    for (size_t i = 0; i < json_array_size(list); i++) USLI_TRY(read_post_processor(l, json_array_get(list, i)));
    return USL_OK;
}

/* ---- Scores and kinds
 * ------------------------------------------------------------------------------------------------------- */

/* A SentencePiece vocabulary ranks by score: a token's is how early a merge makes it. */
static void score_by_merges(usli_tokenizer *t) {
    for (size_t i = 0; i < t->vocab.count; i++) t->vocab.entries[i].score = -1.0f - (float)t->merges.count;
    for (size_t i = t->merges.count; i-- > 0;) t->vocab.entries[t->merges.pairs[3 * i + 2]].score = -(float)i;
}

static usl_status put_together(loader *l) {
    usli_tokenizer *t = l->tok;
    bool unigram = t->model == USLI_MODEL_UNIGRAM;
    if (unigram != l->scored)
        return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's vocab must be %s",
                         unigram ? "a list of tokens with scores" : "an object");
    if (unigram && t->model_unk >= (int32_t)t->unigram.count)
        return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's unk_id %d is not in the vocabulary", (int)t->model_unk);
    if (l->merges && !unigram) USLI_TRY(read_merges(l));
    if (l->has_unk) {
        t->model_unk = usli_vocab_find(&t->vocab, l->unk, l->unk_len);
        if (t->model_unk < 0)
            return usli_fail(l->ctx, USL_ERR_FORMAT, "the model's unk_token \"%.100s\" is not in the vocabulary",
                             l->unk);
    }
    const json_t *added = l->parts[ADDED_TOKENS];
    for (size_t i = 0; i < json_array_size(added); i++) USLI_TRY(read_added_token(l, json_array_get(added, i)));
    USLI_TRY(usli_read_normalizer(l->ctx, l->parts[NORMALIZER], &t->normalizer));
    USLI_TRY(usli_read_pre_tokenizer(l->ctx, l->parts[PRE_TOKENIZER], &t->pre_tokenizer));
    USLI_TRY(usli_read_decoder(l->ctx, l->parts[DECODER], &t->decoder));
    t->has_decoder = l->parts[DECODER] != NULL;
    USLI_TRY(read_post_processor(l, l->parts[POST_PROCESSOR]));
    USLI_TRY(usli_tokenizer_finish(t));
    if (!unigram) score_by_merges(t);
    return USL_OK;
}

static usl_status load_json(usl_ctx *ctx, usli_tokenizer *tok, const char *path) {
    loader l = { .ctx = ctx, .tok = tok, .name = path };
    usli_json_reader r;
    usli_buf rest = { 0 };
    USLI_TRY(usli_map_open(ctx, path, &tok->source));
    bool kept = usli_cache_load(ctx, tok, path, &rest);
    const char *text = kept ? rest.data : (const char *)tok->source->data;
    usli_json_init(&r, ctx, path, text, kept ? rest.len : tok->source->size);
    usl_status st = read_top(&l, &r);
    if (st == USL_OK) st = put_together(&l);
    if (st == USL_OK && !kept && !l.scored && !l.twice) usli_cache_store(ctx, tok, path, l.cuts);
    usli_json_done(&r);
    usli_free(ctx, rest.data);
    usli_free(ctx, l.key.data);
    for (int i = 0; i < PART_COUNT; i++) json_decref(l.parts[i]);
    /* The reader's own errors name the file already. */
    if (st != USL_OK && st != USL_ERR_NOMEM && strncmp(usl_ctx_errmsg(ctx), path, strlen(path)) != 0)
        st = usli_fail_prefix(ctx, "%s", path);
    return st;
}

/* ---- tokenizer_config.json and its like
 * ---------------------------------------------------------------------------------------- */

static const char *const SPECIAL_KEYS[USLI_SPECIALS] = { "bos_token", "eos_token", "pad_token", "unk_token" };

/* A text, or {"content": text}. */
static void special_tokens(usli_tokenizer *tok, const json_t *config) {
    for (int i = 0; i < USLI_SPECIALS; i++) {
        const json_t *value = json_object_get(config, SPECIAL_KEYS[i]);
        if (json_is_object(value)) value = json_object_get(value, "content");
        if (!json_is_string(value) || tok->special[i] >= 0) continue;
        tok->special[i] = usli_vocab_find(&tok->vocab, json_string_value(value), json_string_length(value));
    }
}

/* What models without any configuration call these tokens; only added tokens count. */
static void guess_special(usli_tokenizer *tok) {
    static const char *const NAMES[2][7] = {
        { "<s>", "<|begin_of_text|>", "<bos>",
          "<\xEF\xBD\x9C"
          "begin\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>",
          NULL },
        { "</s>", "<|end_of_text|>", "<eos>",
          "<\xEF\xBD\x9C"
          "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>",
          "<|im_end|>", "<|endoftext|>", NULL },
    };
    for (int which = 0; which < 2; which++)
        for (int i = 0; NAMES[which][i] && tok->special[which] < 0; i++) {
            int32_t id = usli_vocab_find(&tok->vocab, NAMES[which][i], strlen(NAMES[which][i]));
            if (id >= 0 && tok->vocab.entries[id].special) tok->special[which] = id;
        }
}

static usl_status keep_default(usl_ctx *ctx, usli_tokenizer *tok, const json_t *text) {
    usli_free(ctx, tok->chat_template);
    tok->chat_template = usli_strdup(ctx, json_string_value(text));
    return tok->chat_template ? USL_OK : usli_nomem(ctx, json_string_length(text) + 1);
}

/* One template, or a list of them with names. Of a list the one called default counts, or an only one. */
static usl_status keep_template(usl_ctx *ctx, usli_tokenizer *tok, const json_t *value) {
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *one = json_array_get(value, i), *name = json_object_get(one, "name"),
                     *text = json_object_get(one, "template");
        if (!json_is_string(name) || !json_is_string(text)) continue;
        USLI_TRY(usli_tokenizer_add_template(tok, json_string_value(name), json_string_length(name),
                                             json_string_value(text), json_string_length(text)));
        if (json_array_size(value) == 1 || strcmp(json_string_value(name), "default") == 0)
            USLI_TRY(keep_default(ctx, tok, text));
    }
    return json_is_string(value) ? keep_default(ctx, tok, value) : USL_OK;
}

static void read_adds(usli_tokenizer *tok, const json_t *config) {
    const json_t *bos = json_object_get(config, "add_bos_token"), *eos = json_object_get(config, "add_eos_token");
    const usli_ids *before = &tok->template_before, *after = &tok->template_after;
    tok->adds_bos = tok->special[USLI_BOS] >= 0 && before->count && before->items[0] == tok->special[USLI_BOS];
    tok->adds_eos =
        tok->special[USLI_EOS] >= 0 && after->count && after->items[after->count - 1] == tok->special[USLI_EOS];
    if (json_is_boolean(bos)) tok->adds_bos = json_is_true(bos);
    if (json_is_boolean(eos)) tok->adds_eos = json_is_true(eos);
}

/* *text stays NULL when dir has no such file. */
static usl_status read_beside(usl_ctx *ctx, const char *dir, const char *name, char **text, size_t *len) {
    char *path = usli_path_join(ctx, dir, name);
    if (!path) return usli_nomem(ctx, strlen(dir) + strlen(name) + 2);
    usl_status st = usli_is_file(path) ? usli_read_file(ctx, path, text, len) : USL_OK;
    usli_free(ctx, path);
    return st;
}

static usl_status load_beside(usl_ctx *ctx, usli_tokenizer *tok, const char *dir) {
    static const char CONFIG[] = "tokenizer_config.json", MAP[] = "special_tokens_map.json";
    json_t *config = NULL, *map = NULL;
    char *text = NULL;
    size_t len;
    usl_status st;
    USLI_TRYGO(read_beside(ctx, dir, CONFIG, &tok->config, &tok->config_len));
    if (tok->config) USLI_TRYGO(usli_json_parse(ctx, CONFIG, tok->config, tok->config_len, &config));
    USLI_TRYGO(read_beside(ctx, dir, MAP, &text, &len));
    if (text) USLI_TRYGO(usli_json_parse(ctx, MAP, text, len, &map));
    /* What the configuration says comes before the model's own unknown token. */
    if (json_object_get(config, "unk_token")) tok->special[USLI_UNK] = -1;
    special_tokens(tok, config);
    special_tokens(tok, map);
    if (tok->special[USLI_UNK] < 0) tok->special[USLI_UNK] = tok->model_unk;
    guess_special(tok);
    read_adds(tok, config);
    USLI_TRYGO(read_beside(ctx, dir, "chat_template.jinja", &tok->chat_template, &len));
    tok->template_file = tok->chat_template != NULL;
    if (!tok->chat_template) st = keep_template(ctx, tok, json_object_get(config, "chat_template"));
done:
    json_decref(config);
    json_decref(map);
    usli_free(ctx, text);
    return st;
}

/* The folder of a file, new. */
static char *folder_of(usl_ctx *ctx, const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? usli_strndup(ctx, path, slash == path ? 1 : (size_t)(slash - path)) : usli_strdup(ctx, ".");
}

usl_status usli_tokenizer_load(usl_ctx *ctx, const char *path, usli_tokenizer **out) {
    bool folder = usli_is_dir(path);
    usli_tokenizer *tok = NULL;
    char *file = folder ? usli_path_join(ctx, path, "tokenizer.json") : usli_strdup(ctx, path);
    char *dir = folder ? usli_strdup(ctx, path) : folder_of(ctx, path);
    usl_status st = USL_OK;
    *out = NULL;
    if (!file || !dir) {
        st = usli_nomem(ctx, strlen(path) + 1);
        goto done;
    }
    USLI_TRYGO(usli_tokenizer_new(ctx, &tok));
    USLI_TRYGO(load_json(ctx, tok, file));
    USLI_TRYGO(load_beside(ctx, tok, dir));
    *out = tok;
    tok = NULL;
done:
    usli_tokenizer_release(tok);
    usli_free(ctx, file);
    usli_free(ctx, dir);
    return st;
}
