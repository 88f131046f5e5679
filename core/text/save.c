/* tokenizer.json and tokenizer_config.json: copies of what was read, or made from the parts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/text/parts.h"

typedef struct saver {
    usl_ctx *ctx;
    const usli_tokenizer *tok;
    usli_buf out;
} saver;

static usl_status put(saver *s, const char *text) {
    return usli_buf_text(s->ctx, &s->out, text);
}

static usl_status put_token(saver *s, int32_t id) {
    return usli_buf_json(s->ctx, &s->out, usli_vocab_text(&s->tok->vocab, id), s->tok->vocab.entries[id].len);
}

static usl_status put_int(saver *s, int32_t value) {
    char text[16];
    snprintf(text, sizeof text, "%d", (int)value);
    return put(s, text);
}

static int by_id(const void *pa, const void *pb) {
    const usli_added *a = pa, *b = pb;
    return (a->id > b->id) - (a->id < b->id);
}

static usl_status put_added(saver *s, const usli_added *t) {
    USLI_TRY(put(s, "{\"id\": "));
    USLI_TRY(put_int(s, t->id));
    USLI_TRY(put(s, ", \"content\": "));
    USLI_TRY(put_token(s, t->id));
    USLI_TRY(put(s, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": "));
    USLI_TRY(put(s, t->rstrip ? "true" : "false"));
    USLI_TRY(put(s, ", \"normalized\": false, \"special\": "));
    return put(s, t->special ? "true}" : "false}");
}

static usl_status put_all_added(saver *s) {
    size_t n = s->tok->raw.count;
    usli_added *order = usli_calloc(s->ctx, n + 1, sizeof *order);
    usl_status st = USL_OK;
    if (!order) return usli_nomem(s->ctx, (n + 1) * sizeof *order);
    if (n) {
        memcpy(order, s->tok->raw.items, n * sizeof *order);
        qsort(order, n, sizeof *order, by_id);
    }
    for (size_t i = 0; i < n; i++) {
        if (i) USLI_TRYGO(put(s, ",\n    "));
        USLI_TRYGO(put_added(s, &order[i]));
    }
done:
    usli_free(s->ctx, order);
    return st;
}

static usl_status put_template_token(saver *s, const usli_ids *ids, const char *before, const char *after) {
    for (size_t i = 0; i < ids->count; i++) {
        USLI_TRY(put(s, before));
        USLI_TRY(put(s, "{\"SpecialToken\": {\"id\": "));
        USLI_TRY(put_token(s, ids->items[i]));
        USLI_TRY(put(s, ", \"type_id\": 0}}"));
        USLI_TRY(put(s, after));
    }
    return USL_OK;
}

static usl_status put_template_side(saver *s, const usli_ids *ids, bool *any) {
    for (size_t i = 0; i < ids->count; i++) {
        if (*any) USLI_TRY(put(s, ", "));
        *any = true;
        USLI_TRY(put_token(s, ids->items[i]));
        USLI_TRY(put(s, ": {\"id\": "));
        USLI_TRY(put_token(s, ids->items[i]));
        USLI_TRY(put(s, ", \"ids\": ["));
        USLI_TRY(put_int(s, ids->items[i]));
        USLI_TRY(put(s, "], \"tokens\": ["));
        USLI_TRY(put_token(s, ids->items[i]));
        USLI_TRY(put(s, "]}"));
    }
    return USL_OK;
}

static usl_status put_post_processor(saver *s) {
    const usli_ids *before = &s->tok->template_before, *after = &s->tok->template_after;
    bool any = false;
    if (!before->count && !after->count) return put(s, "null");
    USLI_TRY(put(s, "{\"type\": \"TemplateProcessing\", \"single\": ["));
    USLI_TRY(put_template_token(s, before, "", ", "));
    USLI_TRY(put(s, "{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}"));
    USLI_TRY(put_template_token(s, after, ", ", ""));
    USLI_TRY(put(s, "], \"pair\": [{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}, {\"Sequence\": {\"id\": \"B\", "
                    "\"type_id\": 1}}], "
                    "\"special_tokens\": {"));
    USLI_TRY(put_template_side(s, before, &any));
    /* The same token at both ends is described once. */
    if (!before->count || !after->count || before->items[0] != after->items[0])
        USLI_TRY(put_template_side(s, after, &any));
    return put(s, "}}");
}

/* ---- The model
 * --------------------------------------------------------------------------------------------------------------- */

typedef struct made_merge {
    float score;
    int32_t id, left, right;
} made_merge;

static int by_rank(const void *pa, const void *pb) {
    const made_merge *a = pa, *b = pb;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    if (a->id != b->id) return a->id < b->id ? -1 : 1;
    return (a->left > b->left) - (a->left < b->left);
}

static usl_status put_merge(saver *s, bool first, int32_t left, int32_t right) {
    USLI_TRY(put(s, first ? "\n      [" : ",\n      ["));
    USLI_TRY(put_token(s, left));
    USLI_TRY(put(s, ", "));
    USLI_TRY(put_token(s, right));
    return put(s, "]");
}

/* A SentencePiece vocabulary has no list of merges: every way to make a token of two others is one, the best score
 * first. */
static usl_status put_made_merges(saver *s) {
    const usli_vocab *v = &s->tok->vocab;
    made_merge *merges = NULL;
    size_t count = 0, cap = 0;
    usl_status st = USL_OK;
    for (size_t id = 0; id < v->count; id++) {
        const char *text = usli_vocab_text(v, (int32_t)id);
        size_t len = v->entries[id].len;
        if (v->entries[id].kind != USLI_TOKEN_NORMAL) continue;
        for (size_t i = len ? usli_utf8_step(text[0]) : len; i < len; i += usli_utf8_step(text[i])) {
            int32_t left = usli_vocab_find(v, text, i), right = usli_vocab_find(v, text + i, len - i);
            if (left < 0 || right < 0) continue;
            USLI_TRYGO(usli_grow(s->ctx, &merges, &cap, count + 1, sizeof *merges));
            merges[count++] = (made_merge){ v->entries[id].score, (int32_t)id, left, right };
        }
    }
    if (count) qsort(merges, count, sizeof *merges, by_rank);
    for (size_t i = 0; i < count; i++) USLI_TRYGO(put_merge(s, i == 0, merges[i].left, merges[i].right));
done:
    usli_free(s->ctx, merges);
    return st;
}

static usl_status put_merges(saver *s) {
    if (s->tok->model == USLI_MODEL_SPM) return put_made_merges(s);
    for (size_t i = 0; i < s->tok->merges.count; i++)
        USLI_TRY(put_merge(s, i == 0, s->tok->merges.pairs[3 * i], s->tok->merges.pairs[3 * i + 1]));
    return USL_OK;
}

static usl_status put_vocab(saver *s) {
    const usli_vocab *v = &s->tok->vocab;
    bool any = false;
    for (size_t id = 0; id < v->count; id++) {
        /* Of two tokens with one spelling only the one that is found can be written. */
        if (usli_vocab_find(v, usli_vocab_text(v, (int32_t)id), v->entries[id].len) != (int32_t)id) continue;
        USLI_TRY(put(s, any ? ",\n      " : "\n      "));
        any = true;
        USLI_TRY(put_token(s, (int32_t)id));
        USLI_TRY(put(s, ": "));
        USLI_TRY(put_int(s, (int32_t)id));
    }
    return USL_OK;
}

static usl_status put_model(saver *s) {
    const usli_tokenizer *t = s->tok;
    USLI_TRY(put(s, "{\"type\": \"BPE\", \"dropout\": null, \"unk_token\": "));
    USLI_TRY(t->model_unk >= 0 ? put_token(s, t->model_unk) : put(s, "null"));
    USLI_TRY(put(s, ", \"continuing_subword_prefix\": null, \"end_of_word_suffix\": null, \"fuse_unk\": "));
    USLI_TRY(put(s, t->fuse_unk ? "true" : "false"));
    USLI_TRY(put(s, ", \"byte_fallback\": "));
    USLI_TRY(put(s, t->byte_fallback ? "true" : "false"));
    USLI_TRY(put(s, ", \"ignore_merges\": "));
    USLI_TRY(put(s, t->ignore_merges ? "true" : "false"));
    USLI_TRY(put(s, ",\n    \"vocab\": {"));
    USLI_TRY(put_vocab(s));
    USLI_TRY(put(s, "},\n    \"merges\": ["));
    USLI_TRY(put_merges(s));
    return put(s, "]}");
}

static usl_status put_tokenizer(saver *s) {
    USLI_TRY(put(
        s, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [\n    "));
    USLI_TRY(put_all_added(s));
    USLI_TRY(put(s, "],\n  \"normalizer\": "));
    USLI_TRY(put(s, usli_ggml_normalizer(s->tok)));
    USLI_TRY(put(s, ",\n  \"pre_tokenizer\": "));
    USLI_TRY(s->tok->pre ? usli_ggml_pre_json(s->ctx, s->tok->pre, &s->out) : put(s, "null"));
    USLI_TRY(put(s, ",\n  \"post_processor\": "));
    USLI_TRY(put_post_processor(s));
    USLI_TRY(put(s, ",\n  \"decoder\": "));
    USLI_TRY(put(s, usli_ggml_decoder(s->tok)));
    USLI_TRY(put(s, ",\n  \"model\": "));
    USLI_TRY(put_model(s));
    return put(s, "\n}\n");
}

static usl_status put_config(saver *s) {
    static const char *const NAMES[USLI_SPECIALS] = { "bos", "eos", "pad", "unk" };
    const usli_tokenizer *t = s->tok;
    USLI_TRY(put(s, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"clean_up_tokenization_spaces\": "
                    "false,\n  \"add_bos_token\": "));
    USLI_TRY(put(s, t->adds_bos ? "true" : "false"));
    USLI_TRY(put(s, ",\n  \"add_eos_token\": "));
    USLI_TRY(put(s, t->adds_eos ? "true" : "false"));
    for (int i = 0; i < USLI_SPECIALS; i++) {
        if (t->special[i] < 0) continue;
        USLI_TRY(put(s, ",\n  \""));
        USLI_TRY(put(s, NAMES[i]));
        USLI_TRY(put(s, "_token\": "));
        USLI_TRY(put_token(s, t->special[i]));
    }
    if (t->chat_template && !t->template_file) {
        USLI_TRY(put(s, ",\n  \"chat_template\": "));
        USLI_TRY(usli_buf_json(s->ctx, &s->out, t->chat_template, strlen(t->chat_template)));
    }
    return put(s, "\n}\n");
}

static usl_status write_in(usl_ctx *ctx, const char *dir, const char *name, const char *data, size_t len) {
    char *path = usli_path_join(ctx, dir, name);
    if (!path) return usli_nomem(ctx, strlen(dir) + strlen(name) + 2);
    usl_status st = usli_write_file(ctx, path, data, len);
    usli_free(ctx, path);
    return st;
}

static usl_status write_made(saver *s, const char *dir, const char *name, usl_status (*make)(saver *s)) {
    s->out.len = 0;
    USLI_TRY(make(s));
    return write_in(s->ctx, dir, name, s->out.data, s->out.len);
}

usl_status usli_tokenizer_save(usl_ctx *ctx, const usli_tokenizer *tok, const char *dir) {
    static const char TOKENIZER[] = "tokenizer.json", CONFIG[] = "tokenizer_config.json";
    saver s = { .ctx = ctx, .tok = tok };
    usli_buf extended = { 0 };
    size_t len;
    const char *source = usli_tokenizer_source(tok, &len);
    usl_status st;
    USLI_TRYGO(usli_make_dirs(ctx, dir));
    if (source && tok->extra.count) {
        USLI_TRYGO(usli_extended_text(ctx, tok, source, len, &extended));
        source = extended.data;
        len = extended.len;
    }
    if (source && tok->renamed_count) {
        USLI_TRYGO(usli_renamed_text(ctx, tok, source, len, &s.out));
        source = s.out.data;
        len = s.out.len;
    }
    USLI_TRYGO(source ? write_in(ctx, dir, TOKENIZER, source, len) : write_made(&s, dir, TOKENIZER, put_tokenizer));
    USLI_TRYGO(tok->config ? write_in(ctx, dir, CONFIG, tok->config, tok->config_len)
                           : write_made(&s, dir, CONFIG, put_config));
    if (tok->template_file)
        USLI_TRYGO(write_in(ctx, dir, "chat_template.jinja", tok->chat_template, strlen(tok->chat_template)));
done:
    usli_free(ctx, extended.data);
    usli_free(ctx, s.out.data);
    return st;
}
