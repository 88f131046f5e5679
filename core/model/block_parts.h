/* What the halves of a block share: the ops with everything that does not change between passes filled in. */
#ifndef USLI_MODEL_BLOCK_PARTS_H
#define USLI_MODEL_BLOCK_PARTS_H

#include "core/model/pass.h"

/* Three slots at most share one product: q|k|v, gate|up. Those that a layer lacks are left out. */
typedef struct usli_group {
    usli_segment segment[3];
    usli_linear_args args;
    int64_t room; /* what training wants behind the rows of x and dy */
} usli_group;
typedef enum usli_group_kind {
    USLI_GROUP_QKV,
    USLI_GROUP_OUT,
    USLI_GROUP_GATE_UP,
    USLI_GROUP_DOWN,
    USLI_GROUP_LATENT,
    USLI_GROUP_QUERY,
    USLI_GROUP_KEYS,
    USLI_GROUP_ROUTER,
    USLI_GROUP_SHARED_GATE,
    USLI_GROUP_EXPERTS_IN,
    USLI_GROUP_EXPERTS_OUT,
    USLI_GROUP_KINDS
} usli_group_kind;
/* The slots of a group that a layer has, four at most; how many. */
int usli_group_slots(const usl_model *m, int64_t layer, usli_group_kind which, usli_slot *slot);
/* What training wants behind the rows of a group with so many ranks, see usli_linear_room. */
int64_t usli_group_room(const usl_model *m, int ranks);
void usli_group_make(usli_pass_state *s, int64_t layer, usli_group_kind which, usli_group *g);
/* From row to row of x, and of y and dy, with that room between them. */
int64_t usli_group_stride(const usli_group *g);
int64_t usli_group_out_stride(const usli_group *g);
/* x has such rows, and the product may use the room; dx is packed. */
void usli_group_set_x(usli_group *g, const void *x);
/* The same of the gradient of the stream, which several groups' products read. */
int64_t usli_gradient_stride(usli_pass_state *s);
size_t usli_group_xa_bytes(const usli_group *g);
/* Something in it is trained: backward wants its x. */
bool usli_group_trains(const usli_group *g);
/* The block keeps also what backward could make again. */
bool usli_is_whole(const usli_pass_state *s, int64_t layer);

usli_rmsnorm_args usli_norm_args(const usli_pass_state *s, usli_slot slot, int64_t layer);
/* y = norm(n) again, its rows ldy apart, for the adapters' and weights' gradients. */
usl_status usli_norm_again(usli_pass_state *s, usli_slot slot, int64_t layer, const void *n, void *y, int64_t ldy);
/* Adds to dn, whose rows are s->ldn apart. */
usl_status usli_norm_backward(usli_pass_state *s, usli_slot slot, int64_t layer, const void *n, float *rstd,
                              const void *dy, void *dn);

/* Where a branch has a norm behind it, what the branch made is kept for backward. */
usl_status usli_branch_take(usli_pass_state *s, bool keep, void **out, float **rstd);
usl_status usli_branch_norm(usli_pass_state *s, usli_slot slot, int64_t layer, const void *branch, float *rstd);
/* The gradient of what a branch made, before the norm behind it where there is one; rows s->ldn apart. */
usl_status usli_branch_backward(usli_pass_state *s, usli_slot slot, int64_t layer, const void *branch, float *rstd,
                                void *dn, const void **out);

/* attention.c, mlp.c: the halves. output: false when backward is all that follows. */
usl_status usli_attention_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                                  const void *x, bool keep, usli_block_saved *saved);
usl_status usli_attention_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn,
                                   bool wants_input);
usl_status usli_mlp_forward(usli_pass_state *s, int64_t layer, bool keep, bool output, usli_block_saved *saved);
usl_status usli_mlp_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn);
/* mixture.c: what a mixture does with y, the normed stream, and with the gradient of its output. */
usl_status usli_mixture_take(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved);
usl_status usli_mixture_in(usli_pass_state *s, int64_t layer, const void *y, usli_block_saved *saved);
usl_status usli_mixture_out(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved, void *out);
usl_status usli_mixture_out_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *dx,
                                     float *dlogits);
usl_status usli_mixture_in_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *y,
                                    const float *dlogits, float *dshared, void *dy);
bool usli_mixture_trains(usli_pass_state *s, int64_t layer);
/* What every attention of a pass has; heads of keys, widths and places are the caller's. */
usli_attention_args usli_attention_args_of(const usli_pass_state *s, const usli_block_saved *saved);
/* attention.c, for latent.c too. */
usl_status usli_attention_cache(usli_pass_state *s, int64_t layer, const usli_cache *cache, usli_attention_args *a);
usl_status usli_copy_heads(usli_pass_state *s, const void *qkv, size_t bytes, void **out);
usl_status usli_attention_out_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *dx,
                                       void *d_o);
/* latent.c: attention whose keys and values come from a narrow vector, up to saved->o. */
usl_status usli_latent_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                               const void *x, bool keep, usli_block_saved *saved);
usl_status usli_latent_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input);

#endif
