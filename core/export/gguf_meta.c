/* What a .gguf says of a model and its tokenizer: a table of keys, which families extend by rows. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "core/export/export.h"

enum { PAD_NAME = 32, KEY_MAX = 128 };

typedef enum said {
    ALWAYS,
    POSITIVE,   /* where the value is */
    LOCAL_ROPE, /* where the family has rope frequencies of its own for layers with a window */
    SCALED,     /* where rope is */
    FACTOR,     /* where it is by a factor */
    YARN,       /* where it is scaled so */
    LATENT      /* where attention is */
} said;

/* Keys behind "ARCH."; where: of an int64_t (count) or a double in usli_config. */
static const struct {
    const char *key;
    bool real;
    size_t where;
    said said;
} KEYS[] = {
    { "vocab_size", false, offsetof(usli_config, vocab), ALWAYS },
    { "context_length", false, offsetof(usli_config, context), ALWAYS },
    { "embedding_length", false, offsetof(usli_config, hidden), ALWAYS },
    { "block_count", false, offsetof(usli_config, layers), ALWAYS },
    { "feed_forward_length", false, offsetof(usli_config, inter), ALWAYS },
    { "attention.head_count", false, offsetof(usli_config, heads), ALWAYS },
    { "attention.head_count_kv", false, offsetof(usli_config, kv_heads), ALWAYS },
    { "attention.key_length", false, offsetof(usli_config, head_dim), ALWAYS },
    { "attention.value_length", false, offsetof(usli_config, v_dim), ALWAYS },
    { "attention.layer_norm_rms_epsilon", true, offsetof(usli_config, norm_eps), ALWAYS },
    { "attention.q_lora_rank", false, offsetof(usli_config, q_lora), POSITIVE },
    { "attention.kv_lora_rank", false, offsetof(usli_config, kv_lora), POSITIVE },
    { "expert_count", false, offsetof(usli_config, experts), POSITIVE },
    { "expert_used_count", false, offsetof(usli_config, top_k), POSITIVE },
    { "expert_feed_forward_length", false, offsetof(usli_config, expert_inter), POSITIVE },
    { "expert_shared_feed_forward_length", false, offsetof(usli_config, shared_inter), POSITIVE },
    { "expert_weights_scale", true, offsetof(usli_config, routed_scale), LATENT },
    { "attention.sliding_window", false, offsetof(usli_config, window), POSITIVE },
    { "attn_logit_softcapping", true, offsetof(usli_config, attention_softcap), POSITIVE },
    { "final_logit_softcapping", true, offsetof(usli_config, logit_softcap), POSITIVE },
    { "rope.dimension_count", false, offsetof(usli_config, rot_dim), ALWAYS },
    { "rope.freq_base", true, offsetof(usli_config, rope.theta), ALWAYS },
    { "rope.freq_base_swa", true, offsetof(usli_config, local_rope.theta), LOCAL_ROPE },
    { "rope.scaling.factor", true, offsetof(usli_config, rope.factor), FACTOR },
    { "rope.scaling.original_context_length", false, offsetof(usli_config, rope.original_context), SCALED },
    { "rope.scaling.yarn_beta_fast", true, offsetof(usli_config, rope.beta_fast), YARN },
    { "rope.scaling.yarn_beta_slow", true, offsetof(usli_config, rope.beta_slow), YARN },
};

/* llama3's scaling is a tensor of divisors; what is left has a name. */
static const char *scaling_of(const usli_config *c) {
    switch (c->rope.kind) {
    case USLI_ROPE_LINEAR: return "linear";
    case USLI_ROPE_YARN: return "yarn";
    case USLI_ROPE_LONG: return "longrope";
    default: return NULL;
    }
}

static bool is_said(const usli_config *c, said when, double value) {
    switch (when) {
    case ALWAYS: return true;
    case POSITIVE: return value > 0;
    case LOCAL_ROPE: return c->arch->local_rope;
    case SCALED: return scaling_of(c) && value > 0;
    case FACTOR: return scaling_of(c) && c->rope.kind != USLI_ROPE_LONG;
    case YARN: return c->rope.kind == USLI_ROPE_YARN;
    case LATENT: return c->arch->latent;
    }
    return false;
}

static usl_status put_text(usli_gguf_writer *w, const char *key, const char *text) {
    return usli_gguf_put_string(w, key, text, strlen(text));
}

static const char *arch_key(const usli_config *c, const char *name, char buf[KEY_MAX]) {
    snprintf(buf, KEY_MAX, "%s.%s", c->arch->gguf, name);
    return buf;
}

/* All layers but every n-th have the window: n, or 0 when no n says it. */
static int64_t window_period(const usli_config *c) {
    for (int64_t n = 2; n <= c->layers + 1; n++) {
        bool fits = true;
        for (int64_t l = 0; l < c->layers && fits; l++) fits = usli_layer_windowed(c, l) == ((l + 1) % n != 0);
        if (fits) return n;
    }
    return 0;
}

static usl_status put_windows(usli_gguf_writer *w, const usl_model *m) {
    const usli_config *c = &m->config;
    bool pattern = c->arch->window == USLI_WINDOW_PATTERN;
    char key[KEY_MAX];
    if (c->window <= 0) return USL_OK;
    if (pattern ? !window_period(c) : !usli_gguf_has_windows(c))
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "which layers have a window of %lld tokens has no name in a .gguf; save_pretrained_merged "
                         "keeps it",
                         (long long)c->window);
    if (pattern)
        return usli_gguf_put_u32(w, arch_key(c, "attention.sliding_window_pattern", key), (uint32_t)window_period(c));
    if (c->window < c->context)
        usli_log(
            m->ctx, USL_LOG_WARN,
            "attention looks back %lld tokens, which readers of this family's .gguf do not mind: their answers differ "
            "beyond that length",
            (long long)c->window);
    return USL_OK;
}

static usl_status put_scaling(usli_gguf_writer *w, const usl_model *m) {
    const usli_config *c = &m->config;
    double attention, inv[1]; /* the factor on cosines and sines is the same for any width */
    char key[KEY_MAX];
    if (c->arch->local_rope && c->local_rope.kind != USLI_ROPE_DEFAULT)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "rope scaling of the layers with a window has no name in a .gguf; save_pretrained_merged "
                         "keeps it");
    if (c->rope.kind == USLI_ROPE_DYNAMIC)
        usli_log(m->ctx, USL_LOG_WARN,
                 "dynamic rope scaling has no name in a .gguf: its readers' answers differ beyond %lld tokens; "
                 "save_pretrained_merged keeps it",
                 (long long)c->rope.original_context);
    if (!scaling_of(c)) return USL_OK;
    USLI_TRY(put_text(w, arch_key(c, "rope.scaling.type", key), scaling_of(c)));
    if (c->rope.kind == USLI_ROPE_LINEAR) return USL_OK;
    usli_rope_frequencies(&c->rope, 2, NULL, 0, inv, &attention);
    if (c->rope.kind == USLI_ROPE_YARN) attention /= usli_gguf_yarn_attention(c);
    return usli_gguf_put_f32(w, arch_key(c, "rope.scaling.attn_factor", key), (float)attention);
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

/* What no field of the config says by itself. */
static usl_status put_mixture(usli_gguf_writer *w, const usl_model *m) {
    const usli_config *c = &m->config;
    const usli_mixture *mix = c->arch->mixture;
    int64_t dense = 0;
    char key[KEY_MAX];
    if (!mix) return USL_OK;
    USLI_TRY(check_dense(m, &dense));
    const struct {
        const char *key;
        int64_t value;
    } numbers[] = {
        { "expert_shared_count", mix->shared_gate ? 0 : c->shared_inter / c->expert_inter },
        { "expert_group_count", c->groups > 1 ? c->groups : mix->groups > 0 },
        { "expert_group_used_count", c->groups > 1 ? c->best_groups : mix->groups > 0 },
        { "expert_gating_func", mix->sigmoid      ? GGUF_SIGMOID
                                : c->arch->latent ? GGUF_SOFTMAX
                                                  : 0 },
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].value)
            USLI_TRY(usli_gguf_put_u32(w, arch_key(c, numbers[i].key, key), (uint32_t)numbers[i].value));
    if (!c->arch->latent) return USL_OK;
    USLI_TRY(usli_gguf_put_u32(w, arch_key(c, "leading_dense_block_count", key), (uint32_t)dense));
    return usli_gguf_put_bool(w, arch_key(c, "expert_weights_norm", key), c->normalised);
}

static usl_status put_latent(usli_gguf_writer *w, const usl_model *m) {
    const usli_config *c = &m->config;
    char key[KEY_MAX];
    if (!c->arch->latent || !(c->rope.mscale_all_dim > 0)) return USL_OK;
    return usli_gguf_put_f32(w, arch_key(c, "rope.scaling.yarn_log_multiplier", key),
                             (float)(0.1 * c->rope.mscale_all_dim));
}

usl_status usli_gguf_put_name(usli_gguf_writer *w, const usl_model *m) {
    USLI_TRY(put_text(w, "general.architecture", m->config.arch->gguf));
    const char *path = m->path ? m->path : m->config.arch->model_type, *slash = strrchr(path, '/');
    return put_text(w, "general.name", slash && slash[1] ? slash + 1 : path);
}

/* Readers know the scale of scores by the family and the number of layers; latent attention's follows from rope's. */
static usl_status check_scale(const usl_model *m) {
    const usli_config *c = &m->config;
    double known = usli_gguf_query_scalar(c);
    if (c->query_scalar == known || c->arch->latent) return USL_OK;
    return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                     "query_pre_attn_scalar is %g, which a .gguf cannot say: its readers take %g for this family; "
                     "save_pretrained_merged keeps it",
                     c->query_scalar, known);
}

usl_status usli_gguf_put_model(usli_gguf_writer *w, const usl_model *m, const usli_method *method) {
    const usli_config *c = &m->config;
    char key[KEY_MAX];
    USLI_TRY(check_scale(m));
    USLI_TRY(usli_gguf_put_name(w, m));
    USLI_TRY(put_text(w, "general.type", "model"));
    USLI_TRY(usli_gguf_put_u32(w, "general.file_type", method->file_type));
    USLI_TRY(usli_gguf_put_u32(w, "general.quantization_version", 2));
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
        const void *at = (const char *)c + KEYS[i].where;
        double value = KEYS[i].real ? *(const double *)at : (double)*(const int64_t *)at;
        if (!is_said(c, KEYS[i].said, value)) continue;
        arch_key(c, KEYS[i].key, key);
        USLI_TRY(KEYS[i].real ? usli_gguf_put_f32(w, key, (float)value) : usli_gguf_put_u32(w, key, (uint32_t)value));
    }
    USLI_TRY(put_scaling(w, m));
    USLI_TRY(put_mixture(w, m));
    USLI_TRY(put_latent(w, m));
    return put_windows(w, m);
}

/* ---- The tokenizer -------------------------------------------------------------------------------------------------
 */

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

static usl_status put_ends(usli_gguf_writer *w, const usl_model *m, const usli_tokenizer *tok) {
    static const char *const KEYS_OF[USLI_SPECIALS] = { "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                                        "tokenizer.ggml.padding_token_id",
                                                        "tokenizer.ggml.unknown_token_id" };
    int32_t ids[USLI_SPECIALS];
    for (int i = 0; i < USLI_SPECIALS; i++) ids[i] = usli_tokenizer_special(tok, (usli_special)i);
    if (ids[USLI_BOS] < 0) ids[USLI_BOS] = m->config.bos;
    if (ids[USLI_EOS] < 0 && m->config.eos_count) ids[USLI_EOS] = m->config.eos[0];
    if (ids[USLI_PAD] < 0) ids[USLI_PAD] = m->config.pad;
    for (int i = 0; i < USLI_SPECIALS; i++)
        if (ids[i] >= 0) USLI_TRY(usli_gguf_put_u32(w, KEYS_OF[i], (uint32_t)ids[i]));
    /* What else ends a text: the end of a turn, as a rule. */
    for (int i = 0; i < m->config.eos_count; i++)
        if (m->config.eos[i] != ids[USLI_EOS])
            return usli_gguf_put_u32(w, "tokenizer.ggml.eot_token_id", (uint32_t)m->config.eos[i]);
    return USL_OK;
}

usl_status usli_gguf_put_tokenizer(usli_gguf_writer *w, const usl_model *m, const usli_tokenizer *tok) {
    usl_ctx *ctx = m->ctx;
    bool gpt2 = strcmp(usli_tokenizer_ggml_model(tok), "gpt2") == 0;
    const char *pre = usli_tokenizer_ggml_pre(tok);
    if (!pre)
        return usli_fail(
            ctx, USL_ERR_UNSUPPORTED,
            "the tokenizer cuts text in a way that has no name in a .gguf, so that its readers would give "
            "the model other tokens; save_pretrained_merged (export --to merged_16bit) keeps tokenizer.json as it "
            "is");
    USLI_TRY(put_text(w, "tokenizer.ggml.model", usli_tokenizer_ggml_model(tok)));
    USLI_TRY(put_text(w, "tokenizer.ggml.pre", pre));
    USLI_TRY(put_tokens(ctx, w, tok, m->config.vocab));
    if (gpt2) USLI_TRY(put_merges(ctx, w, tok));
    USLI_TRY(put_ends(w, m, tok));
    USLI_TRY(usli_gguf_put_bool(w, "tokenizer.ggml.add_bos_token", usli_tokenizer_adds_bos(tok)));
    USLI_TRY(usli_gguf_put_bool(w, "tokenizer.ggml.add_eos_token", usli_tokenizer_adds_eos(tok)));
    if (!gpt2)
        USLI_TRY(usli_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", usli_tokenizer_adds_space_prefix(tok)));
    const char *template = usli_tokenizer_chat_template(tok);
    return template ? put_text(w, "tokenizer.chat_template", template) : USL_OK;
}
