/* What a model is: sizes and switches, read from config.json (old and transformers 5 spelling) or GGUF metadata. */
#ifndef USLI_MODEL_CONFIG_H
#define USLI_MODEL_CONFIG_H

#include <jansson.h>

#include "core/io/gguf.h"
#include "core/ops/ops.h"

typedef enum usli_rope_kind { USLI_ROPE_DEFAULT, USLI_ROPE_LINEAR, USLI_ROPE_LLAMA3, USLI_ROPE_YARN } usli_rope_kind;

typedef struct usli_rope_config {
    usli_rope_kind kind;
    double theta, factor;
    double low_freq_factor, high_freq_factor; /* llama3 */
    double beta_fast, beta_slow;              /* yarn */
    double attention_factor;                  /* 0: by the kind's formula */
    double mscale, mscale_all_dim;            /* yarn; 0: absent */
    bool truncate;                            /* yarn: round the correction range to whole dimensions */
    int64_t original_context;
} usli_rope_config;

/* A family: a row of data. Nothing else in the engine asks which family it runs. */
typedef struct usli_arch {
    const char *name;       /* architectures[0] of config.json */
    const char *model_type; /* model_type of config.json */
    const char *gguf;       /* general.architecture */
    usli_act act;           /* when the config names none */
    float norm_offset;      /* the norm multiplies by (offset + weight) */
    bool tied;              /* tie_word_embeddings when the config is silent */
    bool window;            /* sliding_window applies */
    bool gguf_permuted;     /* GGUF stores q and k rows for interleaved rope */
} usli_arch;

typedef struct usli_config {
    const usli_arch *arch;
    int64_t vocab, hidden, inter, layers, heads, kv_heads, head_dim, context, window;
    double norm_eps, init_range;
    usli_act act;
    bool tied, attention_bias, output_bias, mlp_bias;
    usli_rope_config rope;
    int32_t bos, pad;
    int32_t eos[8];
    int eos_count;
    usl_dtype dtype; /* as published, USL_DTYPE_AUTO when it does not say */
    json_t *source;  /* the config.json, made from the metadata for a GGUF; owned */
} usli_config;

const usli_arch *usli_arch_by_name(const char *name);
const usli_arch *usli_arch_by_gguf(const char *name, size_t len);
/* "LlamaForCausalLM, MistralForCausalLM": for refusals. */
void usli_arch_list(char *buf, size_t size);

/* name stands in errors. generation: generation_config.json's value or NULL (its eos_token_id wins). */
usl_status usli_config_from_json(usl_ctx *ctx, const char *name, const json_t *json, const json_t *generation,
                                 usli_config *out);
usl_status usli_config_from_gguf(usl_ctx *ctx, const usli_gguf *file, usli_config *out);
/* Replaces the rope scaling by that of a JSON object ({"rope_type": ..., "factor": ...}). */
usl_status usli_config_set_rope(usl_ctx *ctx, const char *name, const json_t *scaling, usli_config *config);
void usli_config_free(usli_config *config);

/* Fills inv_freq (head_dim / 2) and returns the factor on cos and sin in *attention. As transformers'
 * ROPE_INIT_FUNCTIONS. divisors: NULL, or (head_dim / 2) frequency divisors of a GGUF's rope_freqs.weight, used instead
 * of the scaling. */
void usli_rope_frequencies(const usli_config *config, const float *divisors, double *inv_freq, double *attention);

#endif
