/* What a model is: sizes and switches, read from config.json (old and transformers 5 spelling) or GGUF metadata. */
#ifndef USLI_MODEL_CONFIG_H
#define USLI_MODEL_CONFIG_H

#include <jansson.h>

#include "core/io/gguf.h"
#include "core/ops/ops.h"

enum { USLI_MOST_LAYERS = 4096, USLI_MOST_FACTORS = 256 };

typedef enum usli_rope_kind {
    USLI_ROPE_DEFAULT,
    USLI_ROPE_LINEAR,
    USLI_ROPE_LLAMA3,
    USLI_ROPE_YARN,
    USLI_ROPE_DYNAMIC,
    USLI_ROPE_LONG,
} usli_rope_kind;

typedef struct usli_rope_config {
    usli_rope_kind kind;
    double theta, factor;
    double low_freq_factor, high_freq_factor; /* llama3 */
    double beta_fast, beta_slow;              /* yarn */
    double attention_factor;                  /* 0: by the kind's formula */
    double mscale, mscale_all_dim;            /* yarn; 0: absent */
    bool truncate;                            /* yarn: round the correction range to whole dimensions */
    int64_t original_context;
    float divisors[2][USLI_MOST_FACTORS]; /* longrope: (rot_dim / 2) of rows within the original context, of longer */
} usli_rope_config;

/* Which layers look back no further than the window, where the config does not list layer_types. */
typedef enum usli_window_rule {
    USLI_NO_WINDOW,
    USLI_WINDOW_ALL,
    USLI_WINDOW_ABOVE,   /* those from max_window_layers on */
    USLI_WINDOW_PATTERN, /* all but every window_pattern-th */
    USLI_WINDOW_OTHER,   /* every other one below max_window_layers, from the first on */
} usli_window_rule;

/* How a family mixes experts, and what its checkpoints call their tensors. */
typedef struct usli_mixture {
    const char *folder;     /* of router and experts: "mlp" */
    const char *words[3];   /* of an expert's gate, up and down: "gate_proj", ... */
    const char *shared;     /* of the expert that sees every token, or NULL */
    bool shared_gate;       /* its output is multiplied by a sigmoid of its own */
    bool sigmoid;           /* scores are sigmoids; else a softmax */
    bool by_pairs;          /* a group of experts is as good as its two best; else as its best */
    bool biased;            /* a correction is added to scores before experts are chosen */
    bool normalised;        /* chosen scores are divided by their sum, when the config is silent */
    bool always_normalised; /* whatever it says */
    bool gguf_normalised;   /* when a GGUF is silent */
    bool balanced;          /* transformers knows a load-balancing loss of it */
    /* When the config is silent. */
    int64_t experts, top_k, inter, shared_inter, first_dense, groups, best_groups;
    double scale;
} usli_mixture;

/* A family: a row of data. Nothing else in the engine asks which family it runs. */
typedef struct usli_arch {
    const char *name;         /* architectures[0] of config.json */
    const char *model_type;   /* model_type of config.json */
    const char *wrapper;      /* architectures[0] of a larger model whose text_config this is, or NULL */
    const char *gguf;         /* general.architecture */
    usli_act act;             /* when the config names none */
    bool gelu_is_tanh;        /* what it calls "gelu" is the approximation by tanh */
    float norm_offset;        /* the norm multiplies by (offset + weight) */
    bool post_norms;          /* the outputs of attention and MLP have norms too */
    bool qk_norm;             /* each head of q and k has one */
    bool qkv_bias;            /* q, k and v have biases, o has none, whatever the config says */
    bool fused;               /* q, k and v are one tensor and one module, gate and up another */
    bool scaled_embedding;    /* by the root of hidden_size */
    bool local_rope;          /* layers with a window have rope frequencies of their own */
    bool wide_stream;         /* the residual stream overflows float16 */
    bool gguf_permuted;       /* GGUF stores q and k rows for interleaved rope */
    int64_t gguf_wide_layers; /* a GGUF says no query_scalar: with so many layers it is hidden / heads, else head_dim */
    usli_window_rule window;
    bool window_asked;           /* there is one only when use_sliding_window is set */
    const usli_mixture *mixture; /* its layers choose among experts; NULL: they do not */
    bool latent;                 /* keys and values come from a narrow vector a token, queries may */
    int64_t q_lora, kv_lora, nope_dim, rope_dim, v_dim; /* with latent, when the config is silent */
    /* When the config is silent; 0: as the general rule says. */
    bool tied;
    int64_t vocab, heads, kv_heads, head_dim, context, original_context, sliding_window, window_pattern;
    double theta, query_scalar, attention_softcap, logit_softcap;
} usli_arch;

typedef struct usli_config {
    const usli_arch *arch;
    int64_t vocab, hidden, inter, layers, heads, kv_heads, head_dim, context, window;
    double norm_eps, init_range;
    bool interleaved;                       /* rope turns neighbours; else values half a head apart */
    uint8_t windowed[USLI_MOST_LAYERS / 8]; /* a bit a layer: the window applies */
    usli_act act;
    bool tied, attention_bias, output_bias, mlp_bias;
    int64_t v_dim;                        /* values of a head: head_dim, apart from it with latent attention */
    int64_t q_lora, kv_lora;              /* widths of the latent vectors; q_lora 0: queries have none */
    uint8_t sparse[USLI_MOST_LAYERS / 8]; /* a bit a layer: its MLP is a mixture of experts */
    double balance; /* times the load-balancing loss in training, where the config asks for it (output_router_logits) */
    int64_t experts, top_k, groups, best_groups;
    int64_t expert_inter, shared_inter; /* of one expert; of the one that sees all tokens, 0: there is none */
    bool normalised;                    /* the chosen scores add up to one */
    double routed_scale;
    double query_scalar;      /* scores are multiplied by 1 / sqrt(query_scalar) */
    double attention_softcap; /* 0: none */
    double logit_softcap;
    int64_t rot_dim;                   /* of head_dim values, so many are rotated */
    int64_t original_context;          /* which rope scaling starts from, when it does not say; 0: context */
    usli_rope_config rope, local_rope; /* local_rope: of layers with a window, where arch says so */
    int32_t bos, pad;
    int32_t eos[8];
    int eos_count;
    usl_dtype dtype;      /* as published, USL_DTYPE_AUTO when it does not say */
    int64_t fp8_block[2]; /* rows and columns that share a scale; 0: no weights are 8-bit floats */
    bool quantised;       /* the checkpoint is; what is not quantised in it stays so */
    int64_t stretched;    /* the max_seq_length that scaled rope at loading; 0: none did */
    json_t *source;       /* the config.json, made from the metadata for a GGUF; owned */
} usli_config;

const usli_arch *usli_arch_by_name(const char *name);
/* Llama and Mixtral, DeepSeek V2 and V3 have one name in a GGUF. */
const usli_arch *usli_arch_by_gguf(const char *name, size_t len, bool mixture, bool sigmoid);
/* For refusals: "the architecture X is not supported; the nearest one that is: Y; supported are ...". */
usl_status usli_arch_refuse(usl_ctx *ctx, const char *file, const char *name, size_t len);

/* name stands in errors. Of a larger model the part that reads text is taken. generation: generation_config.json's
 * value or NULL (its eos_token_id wins). */
usl_status usli_config_from_json(usl_ctx *ctx, const char *name, const json_t *json, const json_t *generation,
                                 usli_config *out);
usl_status usli_config_from_gguf(usl_ctx *ctx, const usli_gguf *file, usli_config *out);
/* What a reader of a GGUF takes for granted: query_scalar; what yarn multiplies cos and sin by, which attn_factor
 * multiplies once more (with latent attention and a log multiplier: nothing); and whether the windows are where the
 * family has them. */
double usli_gguf_query_scalar(const usli_config *config);
double usli_gguf_yarn_attention(const usli_config *config);
bool usli_gguf_has_windows(const usli_config *config);
/* The two tensors of longrope. */
extern const char *const usli_gguf_divisors[2];
/* Replaces the rope scaling by that of a JSON object ({"rope_type": ..., "factor": ...}). */
usl_status usli_config_set_rope(usl_ctx *ctx, const char *name, const json_t *scaling, usli_config *config);
void usli_config_free(usli_config *config);

static inline bool usli_layer_windowed(const usli_config *c, int64_t layer) {
    return c->window > 0 && (c->windowed[layer / 8] >> (layer % 8) & 1);
}

static inline bool usli_layer_sparse(const usli_config *c, int64_t layer) {
    return c->experts > 0 && (c->sparse[layer / 8] >> (layer % 8) & 1);
}

const char *usli_rope_name(usli_rope_kind kind); /* "longrope" */
/* Frequencies depend on how many tokens a row has, beyond the original context. */
static inline bool usli_rope_by_length(const usli_rope_config *rope) {
    return rope->kind == USLI_ROPE_DYNAMIC || rope->kind == USLI_ROPE_LONG;
}

/* What yarn multiplies cos and sin by, unless it is told. */
double usli_yarn_attention(double factor);
/* Fills inv_freq (dim / 2) for rows of so many tokens and returns the factor on cos and sin in *attention. As
 * transformers' ROPE_INIT_FUNCTIONS. divisors: NULL, or (dim / 2) frequency divisors of a GGUF's rope_freqs.weight,
 * used instead of the scaling. */
void usli_rope_frequencies(const usli_rope_config *rope, int64_t dim, const float *divisors, int64_t tokens,
                           double *inv_freq, double *attention);

#endif
