#include "core/model/block_parts.h"

#include <math.h>

#include "core/base/dtype.h"

/* Dropout's keys hold these numbers: they stay. A family that fuses slots has one for all of them, without biases. */
static const struct {
    usli_slot slot[4], bias[4];
    int count;
} GROUPS[] = {
    [USLI_GROUP_QKV] = { { USLI_Q, USLI_K, USLI_V, USLI_QKV }, { USLI_Q_BIAS, USLI_K_BIAS, USLI_V_BIAS }, 4 },
    [USLI_GROUP_OUT] = { { USLI_O }, { USLI_O_BIAS }, 1 },
    [USLI_GROUP_GATE_UP] = { { USLI_GATE, USLI_UP, USLI_GATE_UP }, { USLI_GATE_BIAS, USLI_UP_BIAS }, 3 },
    [USLI_GROUP_DOWN] = { { USLI_DOWN }, { USLI_DOWN_BIAS }, 1 },
    [USLI_GROUP_LATENT] = { { USLI_Q_A, USLI_KV_A }, { 0 }, 2 },
    [USLI_GROUP_QUERY] = { { USLI_Q, USLI_Q_B }, { 0 }, 2 },
    [USLI_GROUP_KEYS] = { { USLI_KV_B }, { 0 }, 1 },
    [USLI_GROUP_ROUTER] = { { USLI_ROUTER }, { 0 }, 1 },
    [USLI_GROUP_SHARED_GATE] = { { USLI_SHARED_GATE }, { 0 }, 1 },
    [USLI_GROUP_EXPERTS_IN] = { { USLI_EXPERTS_IN }, { 0 }, 1 },
    [USLI_GROUP_EXPERTS_OUT] = { { USLI_EXPERTS_OUT }, { 0 }, 1 },
};

int usli_group_slots(const usl_model *m, int64_t layer, usli_group_kind which, usli_slot *slot) {
    bool other = m->config.arch->latent ? which == USLI_GROUP_QKV : which == USLI_GROUP_QUERY; /* both may have q */
    int count = 0;
    for (int i = 0; i < GROUPS[which].count && !other; i++)
        if (usli_base_weight(m, GROUPS[which].slot[i], layer)->storage) slot[count++] = GROUPS[which].slot[i];
    return count;
}

int64_t usli_group_room(const usl_model *m, int ranks) {
    /* In latent attention and in mixtures rows are also other ops', which take them packed. */
    if (m->config.experts || m->config.arch->latent) return 0;
    return usli_linear_room(&m->exec, m->dtype, ranks);
}

/* The room beside matrices that are another model's is that one's, which may train at the same time. */
static bool borrows_room(const usl_model *m, const usli_group *g) {
    for (int i = 0; m->base && i < g->args.segments; i++)
        if (g->segment[i].w.ld) return true;
    return false;
}

void usli_group_make(usli_pass_state *s, int64_t layer, usli_group_kind which, usli_group *g) {
    const usl_model *m = s->model;
    const usli_batch *b = s->batch;
    g->args = (usli_linear_args){ .tokens = b->tokens, .dtype = m->dtype, .y_dtype = m->dtype, .segment = g->segment };
    for (int i = 0; i < GROUPS[which].count; i++) {
        usli_slot slot = GROUPS[which].slot[i];
        const usli_weight *w = usli_model_weight(m, slot, layer);
        if (!w->storage) continue;
        usli_segment *segment = &g->segment[g->args.segments++];
        *segment = (usli_segment){ .w = w->d, .dw = w->grad };
        if (GROUPS[which].bias[i]) {
            const usli_weight *bias = usli_model_weight(m, GROUPS[which].bias[i], layer);
            segment->bias = bias->d.data;
            segment->bias_dtype = USL_F32;
            segment->dbias = bias->grad;
        }
        int64_t experts = usli_slot_experts(&m->config, slot);
        g->args.in = w->m.cols;
        g->args.out += w->m.rows / (experts ? experts : 1);
        g->args.experts = (int)experts;
        if (experts) g->args.tokens = b->tokens * m->config.top_k;
        if (!m->active) continue;
        const usli_lora_module *l = usli_adapter_module(m, m->active, slot, layer);
        segment->lora = usli_pass_lora(m, l);
        if (s->drops && m->active->dropout > 0)
            g->args.dropout = (usli_dropout){ .p = (float)m->active->dropout,
                                              .seed = b->dropout_seed,
                                              .update = b->update,
                                              .row = b->row_of_token,
                                              .position = b->position,
                                              .layer = (uint32_t)layer,
                                              .module = (uint32_t)which };
    }
    g->room = s->training && !borrows_room(m, g) ? usli_group_room(m, usli_linear_ranks(&g->args)) : 0;
}

int64_t usli_group_stride(const usli_group *g) {
    return g->args.in + g->room;
}

int64_t usli_group_out_stride(const usli_group *g) {
    return g->args.out + g->room;
}

int64_t usli_gradient_stride(usli_pass_state *s) {
    static const usli_group_kind READERS[] = { USLI_GROUP_OUT, USLI_GROUP_DOWN };
    int64_t room = 0;
    usli_group g;
    for (int64_t l = 0; l < s->model->config.layers; l++)
        for (size_t i = 0; i < sizeof READERS / sizeof *READERS; i++) {
            usli_group_make(s, l, READERS[i], &g);
            if (g.room > room) room = g.room;
        }
    return s->model->config.hidden + room;
}

void usli_group_set_x(usli_group *g, const void *x) {
    g->args.x = x;
    g->args.ldx = usli_group_stride(g);
    g->args.room = g->room;
    g->args.lddx = g->args.in;
}

size_t usli_group_xa_bytes(const usli_group *g) {
    return (size_t)g->args.tokens * (size_t)usli_linear_ranks(&g->args) * usli_dtype_bytes(g->args.dtype);
}

bool usli_group_trains(const usli_group *g) {
    for (int i = 0; i < g->args.segments; i++)
        if (g->segment[i].dw || g->segment[i].dbias || g->segment[i].lora.da) return true;
    return false;
}

bool usli_is_whole(const usli_pass_state *s, int64_t layer) {
    return s->training && layer >= s->model->config.layers - s->whole;
}

usli_rmsnorm_args usli_norm_args(const usli_pass_state *s, usli_slot slot, int64_t layer) {
    const usl_model *m = s->model;
    const usli_weight *w = usli_model_weight(m, slot, layer);
    return (usli_rmsnorm_args){ .rows = s->batch->tokens,
                                .cols = m->config.hidden,
                                .eps = (float)m->config.norm_eps,
                                .weight_offset = m->config.arch->norm_offset,
                                .dtype = m->dtype,
                                .res_dtype = m->res_dtype,
                                .n_dtype = m->res_dtype,
                                .weight_dtype = USL_F32,
                                .weight = w->d.data,
                                .dweight = w->grad };
}

/* The norm behind a branch, before the stream takes its output: there is no sum in it. */
static usli_rmsnorm_args branch_norm_args(const usli_pass_state *s, usli_slot slot, int64_t layer) {
    usli_rmsnorm_args norm = usli_norm_args(s, slot, layer);
    norm.res_dtype = norm.n_dtype = norm.dtype;
    return norm;
}

usl_status usli_branch_take(usli_pass_state *s, bool keep, void **out, float **rstd) {
    const usl_model *m = s->model;
    size_t t = (size_t)s->batch->tokens;
    if (s->training) USLI_TAKE(*rstd, s->exec, keep, t * sizeof(float));
    USLI_TAKE(*out, s->exec, keep, t * (size_t)m->config.hidden * usli_dtype_bytes(m->dtype));
    return USL_OK;
}

usl_status usli_branch_norm(usli_pass_state *s, usli_slot slot, int64_t layer, const void *branch, float *rstd) {
    usli_rmsnorm_args norm = branch_norm_args(s, slot, layer);
    norm.x = branch;
    norm.y = s->x;
    norm.rstd = rstd;
    return usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD);
}

/* The gradient of a branch's output has the stream's value, in the activations' type. */
static usl_status branch_gradient(usli_pass_state *s, void *dn, const void **out) {
    const usl_model *m = s->model;
    *out = dn;
    if (m->res_dtype == m->dtype) return USL_OK;
    int64_t n = s->batch->tokens * s->ldn;
    void *copy;
    USLI_TAKE(copy, s->exec, false, (size_t)n * usli_dtype_bytes(m->dtype));
    usli_cast_args cast = { .src = { .dtype = m->res_dtype, .rows = 1, .cols = n, .data = dn },
                            .dtype = m->dtype,
                            .dst = copy };
    *out = copy;
    return usli_op_cast(s->exec, &cast, USLI_FORWARD);
}

usl_status usli_branch_backward(usli_pass_state *s, usli_slot slot, int64_t layer, const void *branch, float *rstd,
                                void *dn, const void **out) {
    const usl_model *m = s->model;
    USLI_TRY(branch_gradient(s, dn, out));
    if (!m->config.arch->post_norms) return USL_OK;
    void *d;
    USLI_TAKE(d, s->exec, false, (size_t)(s->batch->tokens * s->ldn) * usli_dtype_bytes(m->dtype));
    usli_rmsnorm_args norm = branch_norm_args(s, slot, layer);
    norm.n = branch;
    norm.rstd = rstd;
    norm.dy = *out;
    norm.dn = d;
    norm.lddy = norm.lddn = s->ldn;
    *out = d;
    return usli_op_rmsnorm(s->exec, &norm, USLI_BACKWARD);
}

usl_status usli_norm_again(usli_pass_state *s, usli_slot slot, int64_t layer, const void *n, void *y, int64_t ldy) {
    usli_rmsnorm_args norm = usli_norm_args(s, slot, layer);
    norm.res = n;
    norm.y = y;
    norm.ldy = ldy;
    return usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD);
}

usl_status usli_norm_backward(usli_pass_state *s, usli_slot slot, int64_t layer, const void *n, float *rstd,
                              const void *dy, void *dn) {
    usli_rmsnorm_args norm = usli_norm_args(s, slot, layer);
    norm.n = n;
    norm.rstd = rstd;
    norm.dy = dy;
    norm.dn = dn;
    norm.lddn = s->ldn;
    norm.dn_mode = USLI_ACCUMULATE;
    return usli_op_rmsnorm(s->exec, &norm, USLI_BACKWARD);
}

usli_attention_args usli_attention_args_of(const usli_pass_state *s, const usli_block_saved *saved) {
    const usli_config *c = &s->model->config;
    return (usli_attention_args){ .tokens_q = s->batch->tokens,
                                  .tokens_k = s->batch->tokens,
                                  .rows = s->batch->rows,
                                  .cu_q = s->batch->cu,
                                  .cu_k = s->batch->cu,
                                  .max_q = s->batch->longest,
                                  .max_k = s->batch->longest,
                                  .causal = true,
                                  .heads = (int)c->heads,
                                  .qk_dim = (int)c->head_dim,
                                  .scale = (float)(1 / sqrt(c->query_scalar)),
                                  .dtype = s->model->dtype,
                                  .o = saved->o,
                                  .lse = saved->lse,
                                  .deterministic = !s->any_order };
}
