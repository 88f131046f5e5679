/* GGUF as llama.cpp reads it: metadata keys, tensor names, the order of q and k rows and the mix of k-quant types are
 * those of its converter and of its quantiser. */
#include <math.h>
#include <string.h>

#include "core/export/export.h"
#include "core/io/gguf.h"
#include "core/quant/traits.h"

static const struct {
    const char *name;
    usl_dtype matrix; /* of most matrices */
    uint32_t file_type;
    bool mixed; /* some matrices get more bits */
} METHODS[] = {
    { "f32", USL_F32, 0, false },   { "f16", USL_F16, 1, false },     { "bf16", USL_BF16, 32, false },
    { "q8_0", USL_Q8_0, 7, false }, { "q4_k_m", USL_Q4_K, 15, true },
};
enum { METHOD_COUNT = sizeof METHODS / sizeof *METHODS, PAD_NAME = 32 };

/* llama.cpp gives the first and last eighth of the layers, and every third between, more bits. */
static bool more_bits(int64_t layer, int64_t layers) {
    return layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
}

static usl_dtype type_of(const usl_model *m, int method, usli_slot slot, int64_t layer) {
    int64_t rows, cols;
    usli_slot_shape(&m->config, slot, layer, &rows, &cols);
    if (!cols || slot == USLI_ROUTER || slot == USLI_SHARED_GATE) return USL_F32;
    usl_dtype t = METHODS[method].matrix;
    if (METHODS[method].mixed) {
        bool output = slot == USLI_HEAD || (slot == USLI_EMBED && m->config.tied);
        if (output ||
            ((slot == USLI_V || slot == USLI_DOWN || slot == USLI_EXPERTS_OUT) && more_bits(layer, m->config.layers)))
            t = USL_Q6_K;
    }
    /* Rows that do not fit a block fall back as llama.cpp's do. */
    if (cols % usli_traits_of(t)->block) t = t == USL_Q4_K ? USL_Q5_0 : t == USL_Q6_K ? USL_Q8_0 : USL_F16;
    if (cols % usli_traits_of(t)->block) t = USL_F16;
    return t;
}

/* ---- Metadata
 * ----------------------------------------------------------------------------------------------------------------------
 */

typedef struct meta {
    usli_gguf_writer *w;
    const char *arch;
    char key[128];
} meta;

static const char *arch_key(meta *k, const char *name) {
    snprintf(k->key, sizeof k->key, "%s.%s", k->arch, name);
    return k->key;
}

static usl_status put_text(usli_gguf_writer *w, const char *key, const char *text) {
    return usli_gguf_put_string(w, key, text, strlen(text));
}

static usl_status put_scaling(const usli_config *c, meta *k) {
    static const char *const KINDS[] = {
        [USLI_ROPE_LINEAR] = "linear", [USLI_ROPE_YARN] = "yarn", [USLI_ROPE_LONG] = "longrope"
    };
    size_t kind = (size_t)c->rope.kind;
    if (kind >= sizeof KINDS / sizeof *KINDS || !KINDS[kind]) return USL_OK;
    USLI_TRY(put_text(k->w, arch_key(k, "rope.scaling.type"), KINDS[kind]));
    if (kind != USLI_ROPE_LONG)
        USLI_TRY(usli_gguf_put_f32(k->w, arch_key(k, "rope.scaling.factor"), (float)c->rope.factor));
    if (kind != USLI_ROPE_LINEAR) {
        double attention, inv[1]; /* the factor is the same for any width */
        usli_rope_frequencies(&c->rope, 2, NULL, 0, inv, &attention);
        if (kind == USLI_ROPE_YARN) attention /= usli_gguf_yarn_attention(c);
        USLI_TRY(usli_gguf_put_f32(k->w, arch_key(k, "rope.scaling.attn_factor"), (float)attention));
    }
    return usli_gguf_put_u32(k->w, arch_key(k, "rope.scaling.original_context_length"),
                             (uint32_t)c->rope.original_context);
}

/* llama.cpp's numbers of ways to score experts. */
enum { GGUF_SOFTMAX = 1, GGUF_SIGMOID = 2 };

/* Its mixtures have no dense layers but the first ones of DeepSeek. */
static usl_status check_dense(const usl_model *m, int64_t *first) {
    const usli_config *c = &m->config;
    *first = 0;
    while (*first < c->layers && !usli_layer_sparse(c, *first)) ++*first;
    bool plain = *first == 0 || c->arch->latent;
    for (int64_t l = *first; plain && l < c->layers; l++) plain = usli_layer_sparse(c, l);
    if (plain) return USL_OK;
    return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                     "a .gguf of a %s cannot say which layers are dense; save_pretrained_merged can", c->arch->name);
}

static usl_status put_mixture(const usl_model *m, meta *k) {
    const usli_config *c = &m->config;
    const usli_mixture *mix = c->arch->mixture;
    int64_t dense = 0;
    if (!mix) return USL_OK;
    USLI_TRY(check_dense(m, &dense));
    const struct {
        const char *key;
        int64_t value;
    } sizes[] = {
        { "expert_count", c->experts },
        { "expert_used_count", c->top_k },
        { "expert_feed_forward_length", c->expert_inter },
        { "expert_shared_feed_forward_length", c->shared_inter },
        { "expert_shared_count", mix->shared_gate ? 0 : c->shared_inter / c->expert_inter },
        { "expert_group_count", c->groups > 1 ? c->groups : mix->groups > 0 },
        { "expert_group_used_count", c->groups > 1 ? c->best_groups : mix->groups > 0 },
        { "expert_gating_func", mix->sigmoid      ? GGUF_SIGMOID
                                : c->arch->latent ? GGUF_SOFTMAX
                                                  : 0 },
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value) USLI_TRY(usli_gguf_put_u32(k->w, arch_key(k, sizes[i].key), (uint32_t)sizes[i].value));
    if (!c->arch->latent) return USL_OK;
    USLI_TRY(usli_gguf_put_u32(k->w, arch_key(k, "leading_dense_block_count"), (uint32_t)dense));
    USLI_TRY(usli_gguf_put_f32(k->w, arch_key(k, "expert_weights_scale"), (float)c->routed_scale));
    return usli_gguf_put_bool(k->w, arch_key(k, "expert_weights_norm"), c->normalised);
}

static usl_status put_latent(const usl_model *m, meta *k) {
    const usli_config *c = &m->config;
    if (!c->arch->latent) return USL_OK;
    if (c->q_lora) USLI_TRY(usli_gguf_put_u32(k->w, arch_key(k, "attention.q_lora_rank"), (uint32_t)c->q_lora));
    USLI_TRY(usli_gguf_put_u32(k->w, arch_key(k, "attention.kv_lora_rank"), (uint32_t)c->kv_lora));
    if (!(c->rope.mscale_all_dim > 0)) return USL_OK;
    return usli_gguf_put_f32(k->w, arch_key(k, "rope.scaling.yarn_log_multiplier"),
                             (float)(0.1 * c->rope.mscale_all_dim));
}

static usl_status put_model(const usl_model *m, int method, meta *k) {
    const usli_config *c = &m->config;
    usli_gguf_writer *w = k->w;
    USLI_TRY(put_text(w, "general.architecture", k->arch));
    USLI_TRY(put_text(w, "general.type", "model"));
    const char *name = m->path ? strrchr(m->path, '/') : NULL;
    USLI_TRY(put_text(w, "general.name", name && name[1] ? name + 1 : m->path ? m->path : c->arch->model_type));
    USLI_TRY(usli_gguf_put_u32(w, "general.file_type", METHODS[method].file_type));
    USLI_TRY(usli_gguf_put_u32(w, "general.quantization_version", 2));
    const struct {
        const char *key;
        int64_t value;
    } sizes[] = {
        { "vocab_size", c->vocab },
        { "context_length", c->context },
        { "embedding_length", c->hidden },
        { "block_count", c->layers },
        { "feed_forward_length", c->inter },
        { "attention.head_count", c->heads },
        { "attention.head_count_kv", c->kv_heads },
        { "rope.dimension_count", c->rot_dim },
        { "attention.key_length", c->head_dim },
        { "attention.value_length", c->v_dim },
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        USLI_TRY(usli_gguf_put_u32(w, arch_key(k, sizes[i].key), (uint32_t)sizes[i].value));
    USLI_TRY(put_mixture(m, k));
    USLI_TRY(put_latent(m, k));
    USLI_TRY(usli_gguf_put_f32(w, arch_key(k, "attention.layer_norm_rms_epsilon"), (float)c->norm_eps));
    USLI_TRY(usli_gguf_put_f32(w, arch_key(k, "rope.freq_base"), (float)c->rope.theta));
    return put_scaling(c, k);
}

/* What only some families have. */
static usl_status put_family(const usl_model *m, meta *k) {
    const usli_config *c = &m->config;
    if (c->arch->query_scalar > 0 && c->query_scalar != usli_gguf_query_scalar(c))
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "query_pre_attn_scalar is %g, and readers of a .gguf would take %g; save_pretrained_merged "
                         "keeps it",
                         c->query_scalar, usli_gguf_query_scalar(c));
    if (c->arch->local_rope && c->local_rope.kind != USLI_ROPE_DEFAULT)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "rope scaling of the layers with a window has no name in a .gguf; save_pretrained_merged "
                         "keeps it");
    if (c->window > 0 && !usli_gguf_has_windows(c))
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "which layers have a window of %lld tokens has no name in a .gguf; save_pretrained_merged "
                         "keeps it",
                         (long long)c->window);
    const struct {
        const char *key;
        double value;
    } numbers[] = {
        { "attn_logit_softcapping", c->attention_softcap },
        { "final_logit_softcapping", c->logit_softcap },
        { "rope.freq_base_swa", c->arch->local_rope ? c->local_rope.theta : 0 },
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].value > 0)
            USLI_TRY(usli_gguf_put_f32(k->w, arch_key(k, numbers[i].key), (float)numbers[i].value));
    if (c->window <= 0) return USL_OK;
    return usli_gguf_put_u32(k->w, arch_key(k, "attention.sliding_window"), (uint32_t)c->window);
}

static usl_status put_tokens(usl_ctx *ctx, usli_gguf_writer *w, const usli_tokenizer *tok, int64_t n) {
    usli_gguf_str *texts = usli_calloc(ctx, (size_t)n, sizeof *texts);
    float *scores = usli_calloc(ctx, (size_t)n, sizeof *scores);
    int32_t *kinds = usli_calloc(ctx, (size_t)n, sizeof *kinds);
    char *pads = usli_calloc(ctx, (size_t)n, PAD_NAME);
    usl_status st = USL_OK;
    if (!texts || !scores || !kinds || !pads) {
        st = usli_nomem(ctx, (size_t)n * 64);
        goto done;
    }
    for (int64_t i = 0; i < n; i++) {
        usli_token t;
        if (usli_tokenizer_token(tok, (int32_t)i, &t) && t.kind != USLI_TOKEN_UNUSED) {
            texts[i] = (usli_gguf_str){ t.text, t.len };
            scores[i] = t.score;
            kinds[i] = (int32_t)t.kind;
        } else { /* rows of the embedding that no token uses need a name each */
            snprintf(pads + i * PAD_NAME, PAD_NAME, "[PAD%lld]", (long long)i);
            texts[i] = (usli_gguf_str){ pads + i * PAD_NAME, strlen(pads + i * PAD_NAME) };
            kinds[i] = USLI_TOKEN_UNUSED;
        }
    }
    USLI_TRYGO(usli_gguf_put_strings(w, "tokenizer.ggml.tokens", texts, (uint64_t)n));
    USLI_TRYGO(usli_gguf_put_array(w, "tokenizer.ggml.scores", USLI_GGUF_F32, scores, (uint64_t)n));
    USLI_TRYGO(usli_gguf_put_array(w, "tokenizer.ggml.token_type", USLI_GGUF_I32, kinds, (uint64_t)n));
done:
    usli_free(ctx, texts);
    usli_free(ctx, scores);
    usli_free(ctx, kinds);
    usli_free(ctx, pads);
    return st;
}

/* "left right" of each merge, by rank. */
static usl_status put_merges(usl_ctx *ctx, usli_gguf_writer *w, const usli_tokenizer *tok) {
    size_t n = usli_tokenizer_merges(tok), bytes = 0;
    usli_gguf_str *items = usli_calloc(ctx, n + 1, sizeof *items);
    char *blob = NULL;
    usl_status st = USL_OK;
    for (int writing = 0; writing < 2; writing++) {
        if (writing) blob = usli_malloc(ctx, bytes + 1);
        if (!items || (writing && !blob)) {
            st = usli_nomem(ctx, bytes);
            goto done;
        }
        char *at = blob;
        for (size_t i = 0; i < n; i++) {
            int32_t left, right;
            usli_token a, b;
            usli_tokenizer_merge(tok, i, &left, &right);
            usli_tokenizer_token(tok, left, &a);
            usli_tokenizer_token(tok, right, &b);
            size_t len = a.len + 1 + b.len;
            if (writing) {
                items[i] = (usli_gguf_str){ at, len };
                memcpy(at, a.text, a.len);
                at[a.len] = ' ';
                memcpy(at + a.len + 1, b.text, b.len);
                at += len;
            } else {
                bytes += len;
            }
        }
    }
    st = usli_gguf_put_strings(w, "tokenizer.ggml.merges", items, n);
done:
    usli_free(ctx, items);
    usli_free(ctx, blob);
    return st;
}

static usl_status put_tokenizer(const usl_model *m, const usli_tokenizer *tok, usli_gguf_writer *w) {
    usl_ctx *ctx = m->ctx;
    bool gpt2 = strcmp(usli_tokenizer_ggml_model(tok), "gpt2") == 0;
    const char *pre = usli_tokenizer_ggml_pre(tok);
    if (!pre)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "the tokenizer cuts text in a way that has no name in a .gguf, so that its readers would give "
                         "the model other tokens; save_pretrained_merged keeps tokenizer.json as it is");
    USLI_TRY(put_text(w, "tokenizer.ggml.model", usli_tokenizer_ggml_model(tok)));
    USLI_TRY(put_text(w, "tokenizer.ggml.pre", pre));
    USLI_TRY(put_tokens(ctx, w, tok, m->config.vocab));
    if (gpt2) USLI_TRY(put_merges(ctx, w, tok));
    static const char *const KEYS[USLI_SPECIALS] = { "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                                     "tokenizer.ggml.padding_token_id",
                                                     "tokenizer.ggml.unknown_token_id" };
    int32_t ids[USLI_SPECIALS];
    for (int i = 0; i < USLI_SPECIALS; i++) ids[i] = usli_tokenizer_special(tok, (usli_special)i);
    if (ids[USLI_BOS] < 0) ids[USLI_BOS] = m->config.bos;
    if (ids[USLI_EOS] < 0 && m->config.eos_count) ids[USLI_EOS] = m->config.eos[0];
    if (ids[USLI_PAD] < 0) ids[USLI_PAD] = m->config.pad;
    for (int i = 0; i < USLI_SPECIALS; i++)
        if (ids[i] >= 0) USLI_TRY(usli_gguf_put_u32(w, KEYS[i], (uint32_t)ids[i]));
    USLI_TRY(usli_gguf_put_bool(w, "tokenizer.ggml.add_bos_token", usli_tokenizer_adds_bos(tok)));
    USLI_TRY(usli_gguf_put_bool(w, "tokenizer.ggml.add_eos_token", usli_tokenizer_adds_eos(tok)));
    if (!gpt2)
        USLI_TRY(usli_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", usli_tokenizer_adds_space_prefix(tok)));
    const char *template = usli_tokenizer_chat_template(tok);
    return template ? put_text(w, "tokenizer.chat_template", template) : USL_OK;
}

/* ---- Tensors
 * --------------------------------------------------------------------------------------------------------------------------
 */

static usl_status sink(void *ud, const void *data, size_t bytes) {
    return usli_gguf_write(ud, data, bytes);
}

/* Llama 3.1's scaling is a tensor of frequency divisors in GGUF. */
static bool has_divisors(const usl_model *m) {
    return m->rope_divisors || m->config.rope.kind == USLI_ROPE_LLAMA3;
}

static usl_status write_divisors(const usl_model *m, usli_gguf_writer *w) {
    int64_t half = m->config.rot_dim / 2;
    double *inv = usli_malloc(m->ctx, (size_t)half * sizeof *inv), attention;
    if (!inv) return usli_nomem(m->ctx, (size_t)half * sizeof *inv);
    usli_rope_frequencies(&m->config.rope, 2 * half, m->rope_divisors, 0, inv, &attention);
    usl_status st = USL_OK;
    for (int64_t i = 0; i < half && st == USL_OK; i++) {
        float d = (float)(pow(m->config.rope.theta, -(double)i / (double)half) / inv[i]);
        st = usli_gguf_write(w, &d, sizeof d);
    }
    usli_free(m->ctx, inv);
    return st;
}

static usl_status describe(const usl_model *m, int method, usli_gguf_writer *w, uint64_t *bytes) {
    usli_slot slot;
    int64_t layer;
    usli_piece p;
    for (int64_t i = 0; i < usli_export_slots(m); i++) {
        if (!usli_export_slot(m, i, &slot, &layer)) continue;
        usl_dtype t = type_of(m, method, slot, layer);
        for (int64_t k = 0; k < usli_slot_pieces(&m->config, slot, USLI_FORM_GGUF); k++) {
            usli_slot_piece(&m->config, slot, layer, USLI_FORM_GGUF, k, &p);
            *bytes += usli_row_bytes(t, p.rows * (p.ndim > 1 ? p.shape[p.ndim - 1] : 1));
            USLI_TRY(usli_gguf_add(w, p.name, t, p.ndim, p.shape));
        }
    }
    int64_t half = m->config.rot_dim / 2;
    for (int i = 0; i < 2 && m->config.rope.kind == USLI_ROPE_LONG; i++)
        USLI_TRY(usli_gguf_add(w, usli_gguf_divisors[i], USL_F32, 1, &half));
    return has_divisors(m) ? usli_gguf_add(w, "rope_freqs.weight", USL_F32, 1, &half) : USL_OK;
}

static usl_status write_tensors(usl_model *m, int method, usli_gguf_writer *w) {
    usli_slot slot;
    usli_piece p;
    int64_t layer, count = usli_export_slots(m);
    for (int64_t i = 0; i < count; i++) {
        USLI_TRY(usli_progress(m->ctx, "exporting", (uint64_t)i, (uint64_t)count));
        if (!usli_export_slot(m, i, &slot, &layer)) continue;
        for (int64_t k = 0; k < usli_slot_pieces(&m->config, slot, USLI_FORM_GGUF); k++) {
            usli_slot_piece(&m->config, slot, layer, USLI_FORM_GGUF, k, &p);
            USLI_TRY(usli_export_tensor(m, slot, layer, &p, type_of(m, method, slot, layer), true, sink, w));
        }
    }
    size_t bytes = (size_t)m->config.rot_dim / 2 * sizeof(float);
    for (int i = 0; i < 2 && m->config.rope.kind == USLI_ROPE_LONG; i++)
        USLI_TRY(usli_gguf_write(w, m->config.rope.divisors[i], bytes));
    return has_divisors(m) ? write_divisors(m, w) : USL_OK;
}

usl_status usli_export_gguf(usl_model *m, const usli_tokenizer *tok, const char *path, const char *name) {
    usl_ctx *ctx = m->ctx;
    int method = 0;
    while (method < METHOD_COUNT && strcmp(METHODS[method].name, name) != 0) method++;
    if (method == METHOD_COUNT)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "quantization_method \"%s\" is not supported; use f32, f16, bf16, q8_0 or q4_k_m", name);
    if (!tok) return usli_fail(ctx, USL_ERR_INVALID, "%s: a GGUF holds the tokenizer; give it", path);
    if (usli_tokenizer_size(tok) > m->config.vocab)
        return usli_fail(ctx, USL_ERR_SHAPE,
                         "%s: the tokenizer has %lld tokens and the model %lld; they do not belong together", path,
                         (long long)usli_tokenizer_size(tok), (long long)m->config.vocab);
    usli_gguf_writer *w;
    uint64_t bytes = 0;
    usl_status st;
    USLI_TRY(usli_gguf_create(ctx, path, &w));
    meta k = { .w = w, .arch = m->config.arch->gguf };
    USLI_TRYGO(put_model(m, method, &k));
    USLI_TRYGO(put_family(m, &k));
    USLI_TRYGO(put_tokenizer(m, tok, w));
    USLI_TRYGO(describe(m, method, w, &bytes));
    USLI_TRYGO(usli_export_check_disk(ctx, path, bytes));
    USLI_TRYGO(usli_gguf_begin(w));
    USLI_TRYGO(write_tensors(m, method, w));
    st = usli_gguf_commit(w);
done:
    usli_gguf_abandon(w);
    return st;
}
