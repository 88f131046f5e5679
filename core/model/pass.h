/* A pass: packed rows through the decoder, and back. Everything lives in the exec's arena; with a dry arena the same
 * calls only count bytes, which is how the plan is made.
 *
 * The stream between blocks is a pair: `res`, and `x`, the last branch's output that the next norm adds to it.
 *
 *   block forward: n1 = res + x; y = norm(n1); qkv = y Wqkv; rope; o = attention; x = o Wo
 *                  n2 = n1 + x;  y = norm(n2); gu = y Wgu; h = glu(gu); x = h Wdown            -> (n2, x)
 *   kept:          n1, rstd1, xa_qkv, qkv, o, lse, xa_o, n2, rstd2, xa_gu, gu, xa_down   (recomputed blocks: n1 only)
 *   Norms behind the branches (x = norm(o Wo), ...), where a family has them, keep their inputs. Norms of q's and k's
 *   heads keep nothing: qkv is then kept as it was before them, and they and rope are done again in a copy.
 *   Latent attention keeps q, k, v and, in place of qkv, what they were made of (latent.c).
 *   A mixture keeps its routing and the experts' gu in place of gu (mixture.c).
 *   backward is its mirror image; y and h are rebuilt, unless there is memory to keep them: the bits are the same. */
#ifndef USLI_MODEL_PASS_H
#define USLI_MODEL_PASS_H

#include "core/model/model.h"

/* Packed rows on the device. */
typedef struct usli_batch {
    int64_t tokens;
    int rows;
    const int32_t *ids, *position; /* (tokens) */
    const int32_t *angle;          /* (tokens) rows of the rope tables, see usli_model_angles */
    const int32_t *cu;             /* (rows + 1) */
    int64_t longest;
    int64_t dead; /* tokens at the end that are there to fill the pass: nobody reads what they come to */
    /* dropout's keys; may be NULL without dropout */
    const int32_t *row_of_token; /* (tokens) data-set row */
    const int32_t *update;       /* (1) */
    uint64_t dropout_seed;
} usli_batch;

/* Where keys and values of earlier tokens are (inference); NULL in training. */
typedef struct usli_cache {
    usl_dtype dtype;
    int64_t layers, slots, length, width, v_width; /* width: kv_heads * head_dim */
    void *k, *v;                                   /* (layers, slots * length, width), of v v_width */
    const int32_t *store;                          /* (tokens) row of the cache that each new token's k and v go to */
    const int32_t *begin;                          /* (rows + 1) first cache row of each row of the batch */
    const int32_t *k_lens;                         /* (rows) keys each row has, the new ones included */
    int64_t longest;                               /* of k_lens */
} usli_cache;

/* What a mixture's router decided, see usli_route_args; of a gate of one value only logits, weight and chosen. */
typedef struct usli_routing {
    float *logits, *weight;
    int32_t *chosen, *offsets, *row, *token;
} usli_routing;

/* What forward keeps of one block for backward. */
typedef struct usli_block_saved {
    void *n1, *n2, *qkv, *o, *gate_up;
    void *y_attn, *y_mlp, *h; /* NULL: backward makes them again */
    void *attn, *mlp;         /* a branch's output before the norm behind it, where the family has one */
    float *rstd1, *rstd2, *rstd_attn, *rstd_mlp, *lse;
    void *xa_qkv, *xa_o, *xa_gate_up, *xa_down; /* xa_down NULL: backward makes it again */
    void *q, *k, *v; /* of latent attention, after rope; qkv is then the narrow vectors before their norms */
    void *xa_query, *xa_keys;
    usli_routing route, shared; /* of a mixture; shared: of the expert that sees every token */
    void *experts;              /* gate_up of the chosen experts */
    void *xa_router, *xa_shared, *xa_in, *xa_out;
    size_t low; /* the arena's low end before the block */
} usli_block_saved;

/* The load-balancing loss of mixtures, where it is wanted: routing is counted in the forward, and its gradient goes the
 * way of the router's. Device arrays of (micros, experts). */
typedef struct usli_balance {
    int micros;
    const int32_t *micro; /* (micros + 1) first token of each micro-batch */
    int32_t *counts;
    float *mass, *dmass;
} usli_balance;

typedef struct usli_pass_state {
    const usl_model *model;
    const usli_batch *batch;
    usli_exec *exec;
    int64_t recomputed; /* the first so many blocks keep their input only */
    int64_t whole;      /* the last so many keep y and h too */
    int64_t piece; /* tokens at a time of their MLPs and, at most, of the head; 0: all. Adapters' gradients are sums
                      over pieces in their order */
    char *inputs;  /* recomputed blocks' inputs go here, host memory of usli_pass_input_bytes each; NULL: they stay */
    void *ring[2]; /* then the inputs in flight: block l's is in ring[l % 2] */
    usli_balance balance;     /* micros 0: not wanted */
    int64_t first;            /* number of the first token in the pass: where MLPs run piece by piece */
    bool training, again;     /* again: backward repeats a forward */
    bool drops;               /* adapters drop values; not when only a loss is wanted */
    bool any_order;           /* attention's gradients need not repeat bit for bit */
    int64_t ldn;              /* from row to row of the hidden states at the end and of the stream's gradient */
    void *x;                  /* (tokens, hidden) the branch output in flight */
    usli_block_saved *blocks; /* (layers), host memory, the caller's */
    void *final_n;            /* (tokens, hidden) */
    float *final_rstd;
} usli_pass_state;

/* An adapter's part in a product, as passes find it. */
usli_lora usli_pass_lora(const usl_model *m, const usli_lora_module *l);
/* The head with its adapter, for products of its own. */
usli_segment usli_pass_head(const usl_model *m);
/* Whether the head's adapter drops values of its input in training. */
bool usli_pass_head_drops(const usl_model *m);
/* The norms that DoRA divides by, before a pass that shall not make them: where no layer's weights are streamed. */
usl_status usli_pass_norms(usli_exec *x, const usl_model *m);
/* Bytes of a block's input. */
size_t usli_pass_input_bytes(const usl_model *m, int64_t tokens);
/* Runs all blocks and the final norm: *hidden is (tokens, hidden) model->dtype, rows s->ldn apart, arena scratch that
 * lives until the caller resets exec->arena->high. s->model, batch, exec, recomputed, piece, inputs, blocks are set by
 * the caller.
 */
usl_status usli_pass_forward(usli_pass_state *s, void **hidden);
/* dhidden: like *hidden, its gradient; overwritten. Adds to the gradients of every trainable
 * parameter. Releases what forward kept. */
usl_status usli_pass_backward(usli_pass_state *s, void *dhidden);
/* The same forward without keeping, against a cache (or none: cache NULL). */
usl_status usli_pass_infer(usli_exec *x, const usl_model *m, const usli_batch *batch, const usli_cache *cache,
                           void **hidden);
/* The same without a cache, and a look at what happens on the way. A dry run calls the functions too; NULL is fine. */
typedef struct usli_probe {
    /* After a layer: queries, keys and values of all tokens as attention read them, turned. */
    usl_status (*qkv_fn)(void *ud, usli_exec *x, int64_t layer, const void *qkv);
    /* Before a layer: the sum of both is the stream; branch is NULL before layer 0. */
    usl_status (*stream_fn)(void *ud, usli_exec *x, int64_t layer, const void *stream, const void *branch);
    void *ud;
} usli_probe;
usl_status usli_pass_probe(usli_exec *x, const usl_model *m, const usli_batch *batch, const usli_probe *probe,
                           void **hidden);
/* What stands at the end of a pass, for any stream: normed = norm(stream), (rows, hidden) of model->dtype. stream is
 * float32. */
usl_status usli_pass_final_norm(usli_exec *x, const usl_model *m, int64_t rows, const float *stream, void *normed);
/* logits = hidden W^T for `rows` rows, float32 (rows, vocab). */
usl_status usli_pass_logits(usli_exec *x, const usl_model *m, const void *hidden, int64_t rows, float *logits);

#endif
