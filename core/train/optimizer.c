#include "core/train/optimizer.h"

#include <string.h>

#include "core/quant/optim8.h"

enum { EIGHT_BIT_FROM = 4096 };

static size_t align64(size_t n) {
    return (n + 63) & ~(size_t)63;
}

static bool is_embedding(const usli_param_ref *p) {
    return (p->slot == USLI_EMBED || p->slot == USLI_HEAD) && (p->part == 0 || p->part == 4);
}

static size_t blocks(int64_t n) {
    return (size_t)(n + USLI_OPTIM8_BLOCK - 1) / USLI_OPTIM8_BLOCK;
}

static bool uses_8bit(const usli_param_ref *p, bool eight_bit) {
    return eight_bit && p->count >= EIGHT_BIT_FROM && !is_embedding(p);
}

static size_t state_bytes(const usli_param_ref *p, bool eight_bit) {
    int64_t n = p->count;
    if (!uses_8bit(p, eight_bit)) return 2 * align64((size_t)n * sizeof(float));
    return 2 * (align64((size_t)n) + align64(blocks(n) * sizeof(float)));
}

void usli_optimizer_bytes(const usl_model *m, bool eight_bit, uint64_t *parameters, uint64_t *gradients,
                          uint64_t *states) {
    usli_param_ref p;
    *parameters = *gradients = *states = 0;
    for (int64_t i = 0; usli_model_param(m, i, &p); i++) {
        if (!p.trainable) continue;
        size_t bytes = (size_t)(p.count) * sizeof(float);
        *parameters += bytes;
        *gradients += align64(bytes);
        *states += state_bytes(&p, eight_bit);
    }
}

/* The codes of a block of zeros, in device memory: 0 is a code of the map, not the byte 0. */
static usl_status fill_codes(usli_optimizer *o, void *dst, int64_t n, const float *map) {
    usli_exec *x = &o->model->exec;
    if (o->model->plan_only) return USL_OK;
    uint8_t codes[USLI_OPTIM8_BLOCK];
    float zeros[USLI_OPTIM8_BLOCK] = { 0 }, absmax;
    usli_quantize_blockwise(zeros, USLI_OPTIM8_BLOCK, map, codes, &absmax);
    void *bytes = usli_malloc(o->ctx, (size_t)n);
    if (!bytes) return usli_nomem(o->ctx, (size_t)n);
    memset(bytes, codes[0], (size_t)n);
    usl_status st = x->backend->copy_in(x, dst, bytes, (size_t)n);
    usli_free(o->ctx, bytes);
    return st;
}

static usl_status set_param(usli_optimizer *o, int64_t i, const usli_param_ref *p, bool eight_bit, double weight_decay,
                            float *grad, char *state) {
    int64_t n = p->count;
    bool decays = (p->part != 0 && p->part != 4) || p->ndim > 1;
    usli_param *out = &o->params[i];
    *out = (usli_param){ .w = p->device,
                         .g = grad,
                         .n = n,
                         .weight_decay = decays ? (float)weight_decay : 0,
                         .group = is_embedding(p),
                         .state = uses_8bit(p, eight_bit) ? USL_U8 : USL_F32 };
    size_t half = state_bytes(p, eight_bit) / 2;
    out->m = state;
    out->v = state + half;
    if (out->state != USL_U8) return USL_OK;
    out->m_absmax = (float *)(void *)(state + align64((size_t)n));
    out->v_absmax = (float *)(void *)(state + half + align64((size_t)n));
    USLI_TRY(fill_codes(o, out->m, n, usli_dynamic_map));
    return fill_codes(o, out->v, n, usli_dynamic_map_unsigned);
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
    usl_status st = o->params && o->ref ? USL_OK : usli_nomem(ctx, (size_t)o->count * sizeof *o->params);
    if (st == USL_OK) st = usli_device_alloc(&m->exec, grads, &o->grads);
    if (st == USL_OK) st = usli_device_alloc(&m->exec, states, &o->states);
    if (st == USL_OK) st = m->exec.backend->zero(&m->exec, o->states, states);
    char *grad = (char *)o->grads, *state = o->states;
    for (int64_t i = 0, k = 0; st == USL_OK && usli_model_param(m, i, &p); i++) {
        if (!p.trainable) continue;
        st = set_param(o, k, &p, eight_bit, weight_decay, (float *)(void *)grad, state);
        o->ref[k++] = i;
        *p.grad = (float *)(void *)grad;
        grad += align64((size_t)(p.count) * sizeof(float));
        state += state_bytes(&p, eight_bit);
    }
    if (st == USL_OK) st = usli_optimizer_zero(o);
    if (st != USL_OK) usli_optimizer_done(o);
    return st;
}

usl_status usli_optimizer_zero(usli_optimizer *o) {
    return o->model->exec.backend->zero(&o->model->exec, o->grads, o->grad_bytes);
}

void usli_optimizer_done(usli_optimizer *o) {
    usli_param_ref p;
    for (int64_t i = 0; o->model && usli_model_param(o->model, i, &p); i++)
        if (p.grad) *p.grad = NULL;
    usli_free(o->ctx, o->params);
    usli_free(o->ctx, o->ref);
    if (o->model) {
        usli_device_free(&o->model->exec, o->grads);
        usli_device_free(&o->model->exec, o->states);
    }
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
