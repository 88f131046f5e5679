#include "core/train/optimizer.h"

#include <string.h>

#include "core/quant/optim8.h"

enum { EIGHT_BIT_FROM = 4096 };

static size_t align64(size_t n) {
    return (n + 63) & ~(size_t)63;
}

static bool is_embedding(const usli_param_ref *p) {
    return p->slot == USLI_EMBED || p->slot == USLI_HEAD;
}

static size_t blocks(int64_t n) {
    return (size_t)(n + USLI_OPTIM8_BLOCK - 1) / USLI_OPTIM8_BLOCK;
}

static bool uses_8bit(const usli_param_ref *p, bool eight_bit) {
    return eight_bit && p->shape[0] * p->shape[1] >= EIGHT_BIT_FROM && !is_embedding(p);
}

static size_t state_bytes(const usli_param_ref *p, bool eight_bit) {
    int64_t n = p->shape[0] * p->shape[1];
    if (!uses_8bit(p, eight_bit)) return 2 * align64((size_t)n * sizeof(float));
    return 2 * (align64((size_t)n) + align64(blocks(n) * sizeof(float)));
}

void usli_optimizer_bytes(const usl_model *m, bool eight_bit, uint64_t *parameters, uint64_t *gradients,
                          uint64_t *states) {
    usli_param_ref p;
    *parameters = *gradients = *states = 0;
    for (int64_t i = 0; usli_model_param(m, i, &p); i++) {
        if (!p.trainable) continue;
        size_t bytes = (size_t)(p.shape[0] * p.shape[1]) * sizeof(float);
        *parameters += bytes;
        *gradients += align64(bytes);
        *states += state_bytes(&p, eight_bit);
    }
}

static void set_param(usli_optimizer *o, int64_t i, const usli_param_ref *p, bool eight_bit, double weight_decay,
                      float *grad, char *state) {
    int64_t n = p->shape[0] * p->shape[1];
    bool decays = p->part != 0 || p->ndim > 1;
    usli_param *out = &o->params[i];
    *out = (usli_param){ .w = p->data,
                         .g = grad,
                         .n = n,
                         .weight_decay = decays ? (float)weight_decay : 0,
                         .group = is_embedding(p),
                         .state = uses_8bit(p, eight_bit) ? USL_U8 : USL_F32 };
    size_t half = state_bytes(p, eight_bit) / 2;
    out->m = state;
    out->v = state + half;
    if (out->state != USL_U8) return;
    out->m_absmax = (float *)(void *)(state + align64((size_t)n));
    out->v_absmax = (float *)(void *)(state + half + align64((size_t)n));
    /* Zero is a code of the map, not the number 0. */
    float zeros[USLI_OPTIM8_BLOCK] = { 0 }, absmax;
    uint8_t code_m[USLI_OPTIM8_BLOCK], code_v[USLI_OPTIM8_BLOCK];
    usli_quantize_blockwise(zeros, USLI_OPTIM8_BLOCK, usli_dynamic_map, code_m, &absmax);
    usli_quantize_blockwise(zeros, USLI_OPTIM8_BLOCK, usli_dynamic_map_unsigned, code_v, &absmax);
    memset(out->m, code_m[0], (size_t)n);
    memset(out->v, code_v[0], (size_t)n);
}

usl_status usli_optimizer_init(usli_optimizer *o, usl_model *m, bool eight_bit, double weight_decay) {
    usl_ctx *ctx = m->ctx;
    usli_param_ref p;
    uint64_t weights, grads, states;
    *o = (usli_optimizer){ .ctx = ctx, .model = m, .beta1 = 0.9, .beta2 = 0.999, .epsilon = 1e-8 };
    for (int64_t i = 0; usli_model_param(m, i, &p); i++) o->count += p.trainable;
    if (!o->count)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "the model has nothing to train; add an adapter with get_peft_model, or load it with "
                         "full_finetuning = true");
    usli_optimizer_bytes(m, eight_bit, &weights, &grads, &states);
    o->grad_bytes = grads;
    o->state_bytes = states;
    o->params = usli_calloc(ctx, (size_t)o->count, sizeof *o->params);
    o->ref = usli_calloc(ctx, (size_t)o->count, sizeof *o->ref);
    o->grads = usli_malloc_aligned(ctx, grads);
    o->states = usli_malloc_aligned(ctx, states);
    if (!o->params || !o->ref || !o->grads || !o->states) {
        usli_optimizer_done(o);
        return usli_nomem(ctx, grads + states);
    }
    memset(o->states, 0, states);
    char *grad = (char *)o->grads, *state = o->states;
    for (int64_t i = 0, k = 0; usli_model_param(m, i, &p); i++) {
        if (!p.trainable) continue;
        set_param(o, k, &p, eight_bit, weight_decay, (float *)(void *)grad, state);
        o->ref[k++] = i;
        *p.grad = (float *)(void *)grad;
        grad += align64((size_t)(p.shape[0] * p.shape[1]) * sizeof(float));
        state += state_bytes(&p, eight_bit);
    }
    usli_optimizer_zero(o);
    return USL_OK;
}

void usli_optimizer_zero(usli_optimizer *o) {
    memset(o->grads, 0, o->grad_bytes);
}

void usli_optimizer_done(usli_optimizer *o) {
    usli_param_ref p;
    for (int64_t i = 0; o->model && usli_model_param(o->model, i, &p); i++)
        if (p.grad) *p.grad = NULL;
    usli_free(o->ctx, o->params);
    usli_free(o->ctx, o->ref);
    usli_free_aligned(o->ctx, o->grads);
    usli_free_aligned(o->ctx, o->states);
    *o = (usli_optimizer){ 0 };
}

usl_status usli_optimizer_step(usli_optimizer *o, usli_exec *x, usli_update *update) {
    usli_grad_norm_args norm = { .params = o->params, .count = o->count, .update = update };
    USLI_TRY(usli_op_grad_norm(x, &norm, USLI_FORWARD));
    usli_adamw_args step = { .params = o->params,
                             .count = o->count,
                             .beta1 = o->beta1,
                             .beta2 = o->beta2,
                             .eps = o->epsilon,
                             .update = update };
    return usli_op_adamw(x, &step, USLI_FORWARD);
}
