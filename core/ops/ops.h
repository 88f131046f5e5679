/* The ops: one struct each for both passes, inputs first, then outputs, what is saved, gradients. Shapes stand on the
 * fields; "dtype" is the type of activations (F32, BF16, F16) and everything accumulates in float32. A gradient that is
 * NULL is not wanted; activation gradients are written as the struct's write mode says, parameter gradients accumulate.
 *
 *   op             stored                  computed           accumulated  rounded
 *   embedding      dtype                   float32            -            once, at the store (x scale in float32)
 *   rmsnorm        y dtype, res res_dtype  float32            float32      x*rstd*w in float32, once at the store
 *   linear         y y_dtype               dtype products     float32      once at the store (base + adapter + bias);
 *                                                                          x A^T to dtype, as autocast does
 *   rope           dtype                   float32            -            once
 *   attention      dtype                   dtype products     float32      probabilities may be rounded to dtype before
 * V glu            dtype                   float32            -            once cross_entropy  logits F32 or dtype
 * float32            float32      gradient once at the store adamw          float32 master, state F32 or 8-bit blocks
 * of 256        state after each update
 *
 * Memory: a struct's saved fields are the caller's (arena low end), workspace is taken by usli_run (arena high end).
 * Values that change from update to update live in usli_update, in device memory, so that a recorded graph replays. */
#ifndef USLI_OPS_OPS_H
#define USLI_OPS_OPS_H

#include "core/ops/exec.h"
#include "core/quant/nf4.h"

/* ---- What all ops share ------------------------------------------------------------------------------------------ */

/* A frozen or trainable matrix (rows, cols) of any storage type of the traits table, row-major; never owned. */
typedef struct usli_matrix {
    usl_dtype dtype;
    int64_t rows, cols;
    const void *data;    /* NULL for NF4 and FP4 */
    const usli_nf4 *nf4; /* NF4, FP4: the whole (rows * cols) weight's constants; blocks may straddle rows */
    const float *scale;  /* I8: (rows) absmax / 127; fp8: per-block scales; else NULL */
    int64_t first_row;   /* rows that stand before these in data: those of a stack's other matrices. CPU only; else 0 */
    const void *cached;  /* the same numbers decoded to the type of the products, or NULL */
    int64_t ld, cached_ld; /* from row to row of data, of 16-bit types alone, and of cached; 0: cols */
} usli_matrix;

/* Written by the host before an update and by ops during it; one lives on the device of each rank. */
typedef struct usli_update {
    float lr[4];       /* by parameter group: 0 all, 1 embeddings */
    float inv_counted; /* 1 / counted labels of the whole window, all ranks */
    float loss_scale;  /* 1 unless float16 */
    float max_norm;    /* 0: no clipping */
    float grad_norm;   /* of the unscaled gradients, before clipping: written by grad_norm */
    float clip;        /* factor for the gradients, 1/loss_scale included: written by grad_norm */
    int32_t finite;    /* 0: the update is skipped: written by grad_norm */
    int32_t step;      /* 1 for the first update: bias correction */
    double loss_sum;   /* sum over counted labels, accumulated by cross_entropy */
    int64_t correct;   /* counted labels that were the argmax, accumulated by cross_entropy */
    double balance;    /* sum of micro-batches' balancing losses, accumulated by balance */
} usli_update;

/* Dropout: probability and the words that make its Philox key; with the data-set row and position of each token, so
 * that neither recompute nor packing nor ranks change which values drop. p == 0: everything here is ignored. */
typedef struct usli_dropout {
    float p;
    uint64_t seed;
    const int32_t *update;   /* (1) on the device */
    const int32_t *row;      /* (tokens) data-set row of the token */
    const int32_t *position; /* (tokens) */
    uint32_t layer, module;
} usli_dropout;

/* A low-rank adapter beside a matrix (out, in); linear says what it does. */
typedef struct usli_lora {
    int rank; /* 0: no adapter */
    float scale;
    const float *a;         /* (rank, in) float32 masters */
    const float *b;         /* (out, rank) */
    float *da, *db;         /* like a, b */
    const float *magnitude; /* (out) DoRA, with norm = the row norms of W + scale B A; NULL: none */
    const float *norm;      /* (out), as dora makes them */
    float *dmagnitude;
} usli_lora;

/* ---- embedding:  y[t] = scale * table[ids[t]]          backward: dtable[ids[t]] += scale * dy[t], in token order ----
 * With an adapter: y[t] = scale * (table[ids[t]] + lora.scale * B A[:, ids[t]]), A (rank, vocabulary), B (cols, rank);
 * dA[:, ids[t]] += scale * lora.scale * B^T dy[t];  dB += scale * lora.scale * sum over t of dy[t] A[:, ids[t]]^T. */
typedef struct usli_embedding_args {
    int64_t tokens, cols;
    usl_dtype dtype;   /* of y, dy: the residual stream's */
    usli_matrix table; /* (vocabulary, cols) */
    float scale;
    const int32_t *ids; /* (tokens) */
    void *y;            /* (tokens, cols) */
    const void *dy;     /* rows lddy apart; 0: cols */
    int64_t lddy;
    float *dtable;  /* (vocabulary, cols), accumulated; NULL: not wanted */
    usli_lora lora; /* no magnitude */
} usli_embedding_args;

/* ---- rmsnorm, with the residual sum before it ----------------------------------------------------------------------
 *   n = res + x         (res NULL: n = x; x NULL: n = res)     res_out = n, written only when both are given
 *   y = n * r * (w + weight_offset),  r = 1 / sqrt(mean(n^2) + eps)
 * backward: g = dy * (w + weight_offset);  d = r * (g - n * r^2 * mean(g * n));  dn is written as dn_mode says
 *           (accumulate: the residual stream's gradient is already there); dweight += sum over rows of dy * n * r.
 * n must be given in `n` for backward (res_out, res or x of the forward). dn may alias dy when both have one type. */
typedef struct usli_rmsnorm_args {
    int64_t rows, cols;
    float eps, weight_offset;
    usl_dtype dtype;     /* x, y, dy */
    usl_dtype res_dtype; /* res, res_out, n when it is the stream, dn */
    usl_dtype weight_dtype;
    const void *x;      /* (rows, cols) or NULL */
    const void *res;    /* (rows, cols) or NULL */
    void *res_out;      /* (rows, cols); may alias res */
    const void *weight; /* (cols) */
    void *y;            /* (rows, cols) */
    float *rstd;        /* (rows) saved; NULL in inference */
    const void *n;      /* (rows, cols) saved, res_dtype when res was given, else dtype */
    usl_dtype n_dtype;
    const void *dy;
    void *dn;
    int64_t ldy, lddy, lddn; /* from row to row of y, dy, dn; 0: cols */
    usli_write dn_mode;
    float *dweight; /* (cols) */
} usli_rmsnorm_args;

/* ---- linear: one product over fused segments (q|k|v, gate|up), each with its own quantisation, bias and adapter
 * ------ y_s = x W_s^T + b_s + scale_s * (drop(x) A_s^T) B_s^T           y = [y_1 | y_2 | ...], y_mode may accumulate
 * backward: dx (+)= dy W + sum_s scale_s * drop'((dy_s B_s) A_s)
 *           dA_s += scale_s * (dy_s B_s)^T drop(x);  dB_s += scale_s * dy_s^T (drop(x) A_s^T);  dW_s += dy_s^T x;
 *           db_s += sum over tokens of dy_s
 * With a magnitude (DoRA): z_s = x W_s^T + scale_s * (drop(x) A_s^T) B_s^T;  y_s = b_s + z_s * magnitude_s / norm_s,
 *           and everything but db_s takes dy_s * magnitude_s / norm_s for dy_s;  dmagnitude_s += sum over tokens of
 *           dy_s * z_s / norm_s, for which z_s is made again. The norms are constants to the gradient. (In training
 * with dropout PEFT takes drop(x) W_s^T for a part of the base's product; here that sees x whole, the same mean.)
 * saved: x (the caller's) and xa. experts > 0: tokens are sorted by expert, expert_offsets (on the device) says where
 * each begins, every segment's matrix stacks those of the experts, of rows / experts rows each, A, B and the gradients
 * are stacked likewise, and there are no biases and no magnitudes. */
typedef struct usli_segment {
    usli_matrix w;    /* (rows, in) */
    const void *bias; /* (rows) or NULL */
    usl_dtype bias_dtype;
    usli_lora lora;
    float *dw;    /* (rows, in) */
    float *dbias; /* (rows) */
} usli_segment;

enum { USLI_MAX_SEGMENTS = 4 };

typedef struct usli_linear_args {
    int64_t tokens, in, out; /* out: the rows of all segments, of one expert */
    int segments;
    const usli_segment *segment;
    usl_dtype dtype;   /* x, dx, dy and what products round their operands to */
    usl_dtype y_dtype; /* y: dtype, or F32 for logits */
    const void *x;     /* (tokens, in), rows ldx apart */
    void *y;           /* (tokens, out), rows ldy apart */
    int64_t ldx, ldy;  /* 0: packed */
    int64_t room;      /* columns behind x's and dy's rows that the op may write; see usli_linear_room */
    usli_write y_mode;
    void *xa; /* (tokens, sum of ranks) dtype, saved; NULL: recomputed in backward, not written in forward */
    usli_dropout dropout;
    int experts;
    const int32_t *expert_offsets; /* (experts + 1) */
    const void *dy;                /* (tokens, out), y_dtype, rows ldy apart */
    void *dx;                      /* (tokens, in), rows lddx apart */
    int64_t lddx;                  /* 0: as ldx */
    usli_write dx_mode;
} usli_linear_args;

/* ---- dora: norm[o] = ||W[o] + scale * (B A)[o]||, the length of each row, in float32. No backward pass. -------------
 */
typedef struct usli_dora_args {
    usli_matrix w;  /* (rows, in) */
    usli_lora lora; /* rank, scale, a, b */
    float *norm;    /* (rows) */
} usli_dora_args;

/* ---- rope with optional q and k norm, in place on rows of a fused q|k|v buffer
 * --------------------------------------- For each token and head: u = head * rstd * (w + norm_offset) when a norm
 * weight is given, then the first rot_dim values are rotated by the angles of the token's position: pairs (i, i +
 * rot_dim/2), or (2i, 2i+1) when interleaved. backward: rotation by the negative angle, then the norm's, in place on
 * dq, dk; needs the heads before the norm in q_in, k_in when there is one (the same layout). */
typedef struct usli_rope_args {
    int64_t tokens;
    int heads, kv_heads, head_dim, rot_dim;
    bool interleaved;
    usl_dtype dtype;
    const int32_t *position; /* (tokens) */
    const float *cos, *sin;  /* (positions, rot_dim / 2), attention factor included */
    int64_t positions;
    void *q, *k; /* token t's heads begin at t * q_stride, t * k_stride elements */
    int64_t q_stride, k_stride;
    int64_t head_stride;         /* from a token's head to its next; 0: head_dim */
    const void *q_norm, *k_norm; /* (head_dim) or NULL */
    usl_dtype norm_dtype;
    float norm_eps, norm_offset;
    const void *q_in, *k_in; /* saved, only with a norm; strides as q, k */
    float *q_rstd, *k_rstd;  /* (tokens, heads), (tokens, kv_heads) saved, only with a norm */
    void *dq, *dk;           /* strides as q, k */
    float *dq_norm, *dk_norm;
} usli_rope_args;

/* ---- latent: keys and values from what latent attention (DeepSeek) makes of a narrow vector
 * -------------------------------------- A head of k is its own `narrow` values, then the `rotated` ones that all heads
 * share; kv holds each head's own part of k beside its v. backward: dkv likewise, dshared = sum over heads. */
typedef struct usli_latent_args {
    int64_t tokens;
    int heads, narrow, rotated, v_dim;
    usl_dtype dtype;
    const void *kv;     /* (tokens, heads, narrow + v_dim) */
    const void *shared; /* (tokens, rotated), rows shared_stride apart */
    int64_t shared_stride;
    void *k;             /* (tokens, heads, narrow + rotated) */
    void *v;             /* (tokens, heads, v_dim) */
    const void *dk, *dv; /* like k, v */
    void *dkv, *dshared; /* assigned; rows of dshared shared_stride apart */
} usli_latent_args;

/* ---- attention over packed rows
 * --------------------------------------------------------------------------------------- Row r: queries cu_q[r] ..
 * cu_q[r+1]-1, keys k_begin .. k_begin + k_len-1 with k_begin = cu_k[r] and k_len = k_lens ? k_lens[r] : cu_k[r+1] -
 * cu_k[r]. The last query sees the last key (bottom-right causal); query i sees key j when i + k_len - q_len - window <
 * j <= i + k_len - q_len (window 0: no lower bound). Head h uses kv head h / (heads/kv_heads). s = scale * q.k; softcap
 * > 0: s = softcap * tanh(s / softcap);  p = softmax(s);  o = p v;  lse = log sum exp s backward: D = dot(do, o); ds =
 * p * (do.v - D) * (1 - (s/softcap)^2); dq += scale ds k; dk += scale ds q; dv += p do. The same struct serves
 * training, decode (one query a row against a cache) and rollouts. */
typedef struct usli_attention_args {
    int64_t tokens_q, tokens_k;
    int rows;
    const int32_t *cu_q, *cu_k; /* (rows + 1); on the device */
    const int32_t *k_lens;      /* (rows) or NULL */
    int64_t max_q, max_k;       /* longest row of each */
    int64_t prefix;             /* keys 0 .. prefix-1 are shared by all rows and seen by all queries; 0: none */
    bool causal;
    int heads, kv_heads, qk_dim, v_dim;
    float scale, softcap;
    int64_t window;
    usl_dtype dtype;
    const void *q, *k, *v; /* token t begins at t * stride elements; heads of one token are adjacent */
    int64_t q_stride, k_stride, v_stride;
    void *o; /* (tokens_q, heads, v_dim), rows o_stride apart */
    int64_t o_stride;
    float *lse; /* (heads, tokens_q) saved; NULL in inference */
    bool deterministic;
    const void *d_o;    /* like o */
    void *dq, *dk, *dv; /* strides as q, k, v; assigned */
} usli_attention_args;

/* ---- glu: h = weight * act(gate) * up; gate|up are the halves of one row of 2 * cols; weight NULL: 1 ----------------
 * backward: dgate = weight * dh * up * act'(gate), dup = weight * dh * act(gate); dweight = sum over the row of
 * dh * act(gate) * up; dgate_up may alias gate_up (in place). h is rebuilt into h_out when that is not NULL, for
 * adapters that need it. */
typedef enum usli_act { USLI_SILU, USLI_GELU_TANH, USLI_GELU } usli_act;
typedef struct usli_glu_args {
    int64_t rows, cols;
    usli_act act;
    usl_dtype dtype;
    const void *gate_up; /* (rows, 2 * cols), rows ld apart */
    void *h;             /* (rows, cols), rows ldh apart */
    const void *dh;      /* (rows, cols); h_out may alias it */
    void *dgate_up;      /* like gate_up */
    void *h_out;         /* (rows, cols) */
    int64_t ld, ldh;     /* 0: packed */
    const float *weight; /* (rows) or NULL */
    float *dweight;      /* (rows), assigned; with weight only */
} usli_glu_args;

/* ---- route: which experts see a token, and the rows of the grouped products that follow
 * ------------------------------ s = softmax(logits) or sigmoid(logits);  choice = s + correction groups > 1: experts
 * outside the best_groups best groups cannot be chosen; a group is as good as its best choice, or its two best together
 * when by_pairs. A token's slots are its top_k choices, falling, the lowest expert of equals. weight = scale * s, over
 * the sum of the token's chosen s (+ 1e-20) when normalised. The rows: all slots of all tokens, sorted by expert, then
 * token. Weights stand by rows. offsets, row and token NULL: there is one expert, and the rows are the tokens. For the
 * balancing loss, each micro-batch's counts += how often its tokens chose each expert, mass += the sum of s. backward:
 * d logits of weights through s and the sum, and of s itself, whose gradient is dmass of the token's micro-batch;
 * assigned. */
enum { USLI_MAX_EXPERTS = 512, USLI_MAX_GROUPS = 32 };
typedef struct usli_route_args {
    int64_t tokens;
    int experts, top_k, groups, best_groups;
    bool sigmoid, normalised, by_pairs;
    float scale;
    const float *logits;     /* (tokens, experts) */
    const float *correction; /* (experts) or NULL */
    int32_t *chosen;         /* (tokens, top_k) saved */
    int32_t *offsets;        /* (experts + 1) */
    int32_t *row;            /* (tokens, top_k) where each slot's row is, saved */
    int32_t *token;          /* (tokens * top_k) of each row */
    float *weight;           /* (tokens * top_k) */
    int64_t first;           /* what micro calls the first of these tokens */
    int micros;
    const int32_t *micro; /* (micros + 1) first token of each micro-batch */
    int32_t *counts;      /* (micros, experts) or NULL */
    float *mass;          /* (micros, experts) or NULL */
    const float *dweight; /* (tokens * top_k) */
    const float *dmass;   /* (micros, experts) or NULL */
    float *dlogits;       /* (tokens, experts) */
} usli_route_args;

/* ---- balance: the load-balancing loss of each micro-batch over all mixtures together (Switch Transformer, as
 * transformers has it), from what route counted in each: n = layers * tokens,
 *   loss = coefficient * experts * sum over e of counts[e] / n * mass[e] / n
 * update->balance += the losses; dmass = their gradient, times update->loss_scale. No backward pass. */
typedef struct usli_balance_args {
    int micros, experts;
    int64_t layers;
    float coefficient;
    const int32_t *micro;  /* (micros + 1) */
    const int32_t *counts; /* (micros, experts) */
    const float *mass;     /* (micros, experts) */
    float *dmass;          /* (micros, experts) */
    usli_update *update;
} usli_balance_args;

/* ---- combine: y[t] = sum over slots k of x[row[t * top_k + k]], in their order. Its gradient is a gather. */
typedef struct usli_combine_args {
    int64_t tokens, cols;
    int top_k;
    usl_dtype dtype;
    const int32_t *row; /* (tokens, top_k) */
    const void *x;      /* (tokens * top_k, cols) */
    void *y;            /* (tokens, cols) */
} usli_combine_args;

/* ---- gather: y[i] = x[index[i]]      backward: dx = 0, then dx[index[i]] = dy[i]; there indices are distinct --------
 */
typedef struct usli_gather_args {
    int64_t rows, cols, x_rows;
    usl_dtype dtype;
    const int32_t *index; /* (rows) */
    const void *x;        /* (x_rows, cols), rows ldx apart */
    void *y;              /* (rows, cols) */
    const void *dy;
    void *dx;    /* like x; what lies between its rows is cleared too */
    int64_t ldx; /* 0: cols */
} usli_gather_args;

/* ---- scatter: y[index[i]] = x[i], the rest of y stays; for keys and values into their cache. No backward pass.
 * ----------- */
typedef struct usli_scatter_args {
    int64_t rows, cols;
    usl_dtype dtype;
    const int32_t *index; /* (rows), distinct */
    const void *x;        /* (rows, cols), rows ldx apart */
    int64_t ldx;          /* 0: cols */
    void *y;              /* (., cols) */
} usli_scatter_args;

/* ---- cross_entropy on a chunk of logits
 * --------------------------------------------------------------------------------- z = logit_scale * logits;  softcap
 * > 0: z = softcap * tanh(z / softcap);  loss = log sum exp z - z[target] Forward adds to update->loss_sum (in row
 * order) and writes losses; with_gradient: logits become d loss / d logits times update->inv_counted * loss_scale, at
 * once, in place. Targets are all valid (counted rows only). No backward pass. */
typedef struct usli_cross_entropy_args {
    int64_t rows, cols;
    usl_dtype dtype;
    float logit_scale, softcap;
    bool with_gradient;
    void *logits;          /* (rows, cols), rows ld apart; changed in place */
    int64_t ld;            /* 0: cols */
    const int32_t *target; /* (rows) */
    float *losses;         /* (rows) */
    usli_update *update;
} usli_cross_entropy_args;

/* ---- softcap: z = softcap * tanh(z / softcap), in place: logits that are read, as cross_entropy caps those of a loss.
 * No backward pass. */
typedef struct usli_softcap_args {
    int64_t n;
    float softcap;
    float *z; /* (n) */
} usli_softcap_args;

/* ---- Parameters of an update
 * ---------------------------------------------------------------------------------------------- */
typedef struct usli_param {
    float *w, *g;
    int64_t n;
    float weight_decay;
    int group;                  /* index into update->lr */
    usl_dtype state;            /* F32, or U8 for blocks of 256 */
    void *m, *v;                /* (n) */
    float *m_absmax, *v_absmax; /* (ceil(n / 256)) with U8 */
} usli_param;

/* grad_norm: update->grad_norm = ||g|| / loss_scale over all params, ->clip = min(1, max_norm / (norm + 1e-6)) /
 * loss_scale, ->finite = gradients and ->loss_sum are. Fixed order of summation. */
typedef struct usli_grad_norm_args {
    const usli_param *params;
    int64_t count;
    usli_update *update;
} usli_grad_norm_args;

/* adamw: g *= clip; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= lr * wd * w;
 *        w -= lr / (1-b1^t) * m / (sqrt(v) / sqrt(1-b2^t) + eps); g = 0. Skipped (g = 0 only) when update->finite is 0.
 */
typedef struct usli_adamw_args {
    const usli_param *params;
    int64_t count;
    double beta1, beta2, eps;
    usli_update *update;
} usli_adamw_args;

/* ---- cast: decodes a matrix (or a plain array as one row) into F32, BF16 or F16
 * --------------------------------------------- */
typedef struct usli_cast_args {
    usli_matrix src;
    usl_dtype dtype; /* of dst */
    void *dst;       /* (rows, cols), rows ld apart */
    int64_t ld;      /* 0: cols */
} usli_cast_args;

/* ---- quantize: rows of numbers as blocks of a storage type, as its encoder in the traits table makes them: both
 * backends give the same bytes. The CUDA backend has the types from Q2_K to Q8_0, IQ4_NL and IQ4_XS. No backward pass.
 */
typedef struct usli_quantize_args {
    int64_t rows, cols;      /* cols: a multiple of the type's block */
    usl_dtype dtype;         /* of x: F32, BF16 or F16 */
    const void *x;           /* (rows, cols); 16-byte aligned, as importance is */
    const float *importance; /* (cols) weights of the columns, or NULL */
    usl_dtype type;          /* not NF4 or FP4, whose constants lie behind all codes */
    void *y;                 /* (rows) of usli_row_bytes(type, cols) */
} usli_quantize_args;

/* ---- sample: the next token of each row
 * --------------------------------------------------------------------------------------- Penalty, temperature, top-k,
 * top-p, min-p in that order; temperature 0 is argmax (the lowest id of equals). */
typedef struct usli_sample_args {
    int64_t rows, cols;
    int64_t stride;      /* from row to row, at least cols: what stands behind cols is never drawn */
    const float *logits; /* (rows, stride); scratch of one row is workspace */
    float temperature, top_p, min_p, repetition_penalty;
    int32_t top_k;
    const int32_t *seen;    /* ids already there, row after row */
    const int32_t *cu_seen; /* (rows + 1); NULL: no penalty */
    uint64_t seed;          /* Philox key */
    const uint64_t *offset; /* (1) on the device: Philox counter, one a sampled token */
    int32_t *out;           /* (rows) */
} usli_sample_args;

/* Typed doors: usli_op_linear(x, &args, USLI_BACKWARD). */
#define USLI_OP(name)                                                                                 \
    static inline usl_status usli_op_##name(usli_exec *x, usli_##name##_args *args, usli_pass pass) { \
        return usli_run(x, USLI_OP_##name, args, pass);                                               \
    }
#include "core/ops/ops.def"
#undef USLI_OP

/* Sum of the segments' ranks: the width of xa. */
static inline int usli_linear_ranks(const usli_linear_args *a) {
    int ranks = 0;
    for (int i = 0; i < a->segments; i++) ranks += a->segment[i].lora.rank;
    return ranks;
}

/* Columns that a group of so many ranks would like behind the rows of x, of dy and of its decoded matrices, and rows
 * behind the last of these: with xa, dy B, B and A there, base and adapters are one product. 0: it can use none. */
enum { USLI_MOST_RANKS = 64 };
static inline int64_t usli_linear_room(const usli_exec *x, usl_dtype dtype, int ranks) {
    bool fits = !x->backend->host && dtype != USL_F32 && ranks <= USLI_MOST_RANKS;
    return fits ? (ranks + 15) / 16 * 16 : 0;
}

#endif
