#include "core/model/block.h"

#include <math.h>

#include "core/base/dtype.h"

/* ---- The ops of a block, with everything that does not change between passes filled in
 * ---------------------------------- */

/* Three slots at most share one product: q|k|v, gate|up. */
typedef struct group {
    usli_segment segment[3];
    usli_linear_args args;
} group;

static const struct {
    int count;
    usli_slot slot[3], bias[3];
} GROUPS[] = {
    { 3, { USLI_Q, USLI_K, USLI_V }, { USLI_Q_BIAS, USLI_K_BIAS, USLI_V_BIAS } },
    { 1, { USLI_O }, { USLI_O_BIAS } },
    { 2, { USLI_GATE, USLI_UP }, { USLI_GATE_BIAS, USLI_UP_BIAS } },
    { 1, { USLI_DOWN }, { USLI_DOWN_BIAS } },
};
enum { QKV, OUT, GATE_UP, DOWN };

static void make_group(usli_pass_state *s, int64_t layer, int which, group *g) {
    const usl_model *m = s->model;
    const usli_batch *b = s->batch;
    g->args = (usli_linear_args){ .tokens = b->tokens,
                                  .dtype = m->dtype,
                                  .y_dtype = m->dtype,
                                  .segment = g->segment,
                                  .segments = GROUPS[which].count };
    for (int i = 0; i < GROUPS[which].count; i++) {
        usli_slot slot = GROUPS[which].slot[i];
        usli_weight *w = usli_model_weight(m, slot, layer), *bias = usli_model_weight(m, GROUPS[which].bias[i], layer);
        g->segment[i] = (usli_segment){
            .w = w->d, .bias = bias->d.data, .bias_dtype = USL_F32, .dw = w->grad, .dbias = bias->grad
        };
        g->args.in = w->m.cols;
        g->args.out += w->m.rows;
        if (!m->active) continue;
        const usli_lora_module *l = usli_adapter_module(m, m->active, slot, layer);
        g->segment[i].lora = usli_pass_lora(m, l);
        if (s->drops && m->active->dropout > 0)
            g->args.dropout = (usli_dropout){ .p = (float)m->active->dropout,
                                              .seed = b->dropout_seed,
                                              .update = b->update,
                                              .row = b->row_of_token,
                                              .position = b->position,
                                              .layer = (uint32_t)layer,
                                              .module = (uint32_t)which };
    }
}

static size_t xa_bytes(const usli_pass_state *s, const group *g) {
    return (size_t)s->batch->tokens * (size_t)usli_linear_ranks(&g->args) * usli_dtype_bytes(s->model->dtype);
}

static bool trains(const group *g) {
    for (int i = 0; i < g->args.segments; i++)
        if (g->segment[i].dw || g->segment[i].dbias || g->segment[i].lora.da) return true;
    return false;
}

/* Whether the group's input is kept for its adapters' or weights' gradients, not made again. */
static bool is_whole(const usli_pass_state *s, int64_t layer, const group *g) {
    return s->training && layer >= s->model->config.layers - s->whole && trains(g);
}

static usli_rmsnorm_args norm_args(const usli_pass_state *s, usli_slot slot, int64_t layer) {
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
    usli_rmsnorm_args norm = norm_args(s, slot, layer);
    norm.res_dtype = norm.n_dtype = norm.dtype;
    return norm;
}

static usli_rope_args rope_args(const usli_pass_state *s, int64_t layer, void *qkv) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    const usli_rope_table *angles = usli_model_rope(m, layer);
    const usli_weight *qn = usli_model_weight(m, USLI_Q_NORM, layer), *kn = usli_model_weight(m, USLI_K_NORM, layer);
    int64_t q = c->heads * c->head_dim, width = q + 2 * c->kv_heads * c->head_dim;
    return (usli_rope_args){ .tokens = s->batch->tokens,
                             .heads = (int)c->heads,
                             .kv_heads = (int)c->kv_heads,
                             .head_dim = (int)c->head_dim,
                             .rot_dim = (int)c->rot_dim,
                             .dtype = m->dtype,
                             .position = s->batch->position,
                             .cos = angles->cos,
                             .sin = angles->sin,
                             .positions = m->context,
                             .q = qkv,
                             .k = (char *)qkv + (size_t)q * usli_dtype_bytes(m->dtype),
                             .q_stride = width,
                             .k_stride = width,
                             .q_norm = qn->d.data,
                             .k_norm = kn->d.data,
                             .norm_dtype = USL_F32,
                             .norm_eps = (float)c->norm_eps,
                             .norm_offset = c->arch->norm_offset };
}

/* qkv: after rope. */
static usli_attention_args attention_args(const usli_pass_state *s, int64_t layer, char *qkv,
                                          const usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    size_t e = usli_dtype_bytes(m->dtype);
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, width = q + 2 * kv;
    return (usli_attention_args){ .tokens_q = s->batch->tokens,
                                  .tokens_k = s->batch->tokens,
                                  .rows = s->batch->rows,
                                  .cu_q = s->batch->cu,
                                  .cu_k = s->batch->cu,
                                  .max_q = s->batch->longest,
                                  .max_k = s->batch->longest,
                                  .causal = true,
                                  .heads = (int)c->heads,
                                  .kv_heads = (int)c->kv_heads,
                                  .qk_dim = (int)c->head_dim,
                                  .v_dim = (int)c->head_dim,
                                  .scale = (float)(1 / sqrt(c->query_scalar)),
                                  .softcap = (float)c->attention_softcap,
                                  .window = usli_layer_windowed(c, layer) ? c->window : 0,
                                  .dtype = m->dtype,
                                  .q = qkv,
                                  .k = qkv + (size_t)q * e,
                                  .v = qkv + (size_t)(q + kv) * e,
                                  .q_stride = width,
                                  .k_stride = width,
                                  .v_stride = width,
                                  .o = saved->o,
                                  .o_stride = q,
                                  .lse = saved->lse,
                                  .deterministic = !s->any_order };
}

static usli_glu_args glu_args(const usli_pass_state *s, const usli_block_saved *saved) {
    return (usli_glu_args){ .rows = s->batch->tokens,
                            .cols = s->model->config.inter,
                            .act = s->model->config.act,
                            .dtype = s->model->dtype,
                            .gate_up = saved->gate_up };
}

/* Keys and values of the new tokens go into the cache; attention then reads the cache. */
static usl_status use_cache(usli_pass_state *s, int64_t layer, const usli_cache *cache, usli_attention_args *a) {
    size_t plane = (size_t)cache->slots * (size_t)cache->length * (size_t)cache->width * usli_dtype_bytes(cache->dtype);
    void *k = (char *)cache->k + (size_t)layer * plane, *v = (char *)cache->v + (size_t)layer * plane;
    usli_scatter_args put = { .rows = a->tokens_q,
                              .cols = cache->width,
                              .dtype = cache->dtype,
                              .index = cache->store,
                              .x = a->k,
                              .ldx = a->k_stride,
                              .y = k };
    USLI_TRY(usli_op_scatter(s->exec, &put, USLI_FORWARD));
    put.x = a->v;
    put.y = v;
    USLI_TRY(usli_op_scatter(s->exec, &put, USLI_FORWARD));
    a->k = k;
    a->v = v;
    a->k_stride = a->v_stride = cache->width;
    a->cu_k = cache->begin;
    a->k_lens = cache->k_lens;
    a->tokens_k = cache->slots * cache->length;
    a->max_k = cache->longest;
    return USL_OK;
}

/* ---- Forward
 * ---------------------------------------------------------------------------------------------------------------------
 */

/* Where heads have norms, backward wants them as they were before: those that are kept are turned in a copy. */
static usl_status copy_heads(usli_pass_state *s, const void *qkv, size_t bytes, void **out) {
    const usl_model *m = s->model;
    USLI_TAKE(*out, s->exec, false, bytes);
    usli_cast_args copy = {
        .src = { .dtype = m->dtype, .rows = 1, .cols = (int64_t)(bytes / usli_dtype_bytes(m->dtype)), .data = qkv },
        .dtype = m->dtype,
        .dst = *out
    };
    return usli_op_cast(s->exec, &copy, USLI_FORWARD);
}

/* Where a branch has a norm behind it, what the branch made is kept for backward. */
static usl_status take_branch(usli_pass_state *s, bool keep, void **out, float **rstd) {
    const usl_model *m = s->model;
    size_t t = (size_t)s->batch->tokens;
    if (s->training) USLI_TAKE(*rstd, s->exec, keep, t * sizeof(float));
    USLI_TAKE(*out, s->exec, keep, t * (size_t)m->config.hidden * usli_dtype_bytes(m->dtype));
    return USL_OK;
}

static usl_status branch_norm(usli_pass_state *s, usli_slot slot, int64_t layer, const void *branch, float *rstd) {
    usli_rmsnorm_args norm = branch_norm_args(s, slot, layer);
    norm.x = branch;
    norm.y = s->x;
    norm.rstd = rstd;
    return usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD);
}

static usl_status attention_half(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                                 const void *x, bool keep, usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(m->dtype);
    size_t q = (size_t)(c->heads * c->head_dim), width = q + 2 * (size_t)(c->kv_heads * c->head_dim);
    group g;
    void *y;
    make_group(s, layer, QKV, &g);
    if (s->training) {
        USLI_TAKE(saved->rstd1, s->exec, keep, t * sizeof(float));
        USLI_TAKE(saved->xa_qkv, s->exec, keep, xa_bytes(s, &g));
        USLI_TAKE(saved->lse, s->exec, keep, t * (size_t)c->heads * sizeof(float));
    }
    USLI_TAKE(saved->qkv, s->exec, keep, t * width * e);
    USLI_TAKE(saved->o, s->exec, keep, t * q * e);
    if (keep && is_whole(s, layer, &g)) USLI_TAKE(saved->y_attn, s->exec, true, t * (size_t)c->hidden * e);
    size_t mark = s->exec->arena->high;
    if (!(y = saved->y_attn)) USLI_TAKE(y, s->exec, false, t * (size_t)c->hidden * e);
    usli_rmsnorm_args norm = norm_args(s, USLI_ATTN_NORM, layer);
    norm.res = res;
    norm.x = x;
    norm.res_out = saved->n1;
    norm.y = y;
    norm.rstd = saved->rstd1;
    USLI_TRY(usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD));
    g.args.x = y;
    g.args.y = saved->qkv;
    g.args.xa = saved->xa_qkv;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    s->exec->arena->high = mark;
    void *turned = saved->qkv;
    if (keep && c->arch->qk_norm) USLI_TRY(copy_heads(s, saved->qkv, t * width * e, &turned));
    usli_rope_args rope = rope_args(s, layer, turned);
    USLI_TRY(usli_op_rope(s->exec, &rope, USLI_FORWARD));
    usli_attention_args attn = attention_args(s, layer, turned, saved);
    if (cache) USLI_TRY(use_cache(s, layer, cache, &attn));
    USLI_TRY(usli_op_attention(s->exec, &attn, USLI_FORWARD));
    s->exec->arena->high = mark;
    make_group(s, layer, OUT, &g);
    if (s->training) USLI_TAKE(saved->xa_o, s->exec, keep, xa_bytes(s, &g));
    if (c->arch->post_norms) USLI_TRY(take_branch(s, keep, &saved->attn, &saved->rstd_attn));
    g.args.x = saved->o;
    g.args.y = c->arch->post_norms ? saved->attn : s->x;
    g.args.xa = saved->xa_o;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    if (!c->arch->post_norms) return USL_OK;
    return branch_norm(s, USLI_POST_ATTN_NORM, layer, saved->attn, saved->rstd_attn);
}

static usl_status mlp_half(usli_pass_state *s, int64_t layer, bool keep, bool output, usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(m->dtype);
    group g;
    void *y, *h;
    make_group(s, layer, GATE_UP, &g);
    if (s->training) {
        USLI_TAKE(saved->rstd2, s->exec, keep, t * sizeof(float));
        USLI_TAKE(saved->xa_gate_up, s->exec, keep, xa_bytes(s, &g));
    }
    USLI_TAKE(saved->gate_up, s->exec, keep, 2 * t * (size_t)c->inter * e);
    if (keep && is_whole(s, layer, &g)) USLI_TAKE(saved->y_mlp, s->exec, true, t * (size_t)c->hidden * e);
    size_t mark = s->exec->arena->high;
    if (!(y = saved->y_mlp)) USLI_TAKE(y, s->exec, false, t * (size_t)c->hidden * e);
    usli_rmsnorm_args norm = norm_args(s, USLI_MLP_NORM, layer);
    norm.res = saved->n1;
    norm.x = s->x;
    norm.res_out = saved->n2;
    norm.y = y;
    norm.rstd = saved->rstd2;
    USLI_TRY(usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD));
    g.args.x = y;
    g.args.y = saved->gate_up;
    g.args.xa = saved->xa_gate_up;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    s->exec->arena->high = mark;
    if (!output && !c->arch->post_norms) return USL_OK;
    make_group(s, layer, DOWN, &g);
    if (s->training) USLI_TAKE(saved->xa_down, s->exec, keep, xa_bytes(s, &g));
    if (c->arch->post_norms) USLI_TRY(take_branch(s, keep, &saved->mlp, &saved->rstd_mlp));
    if (keep && is_whole(s, layer, &g)) USLI_TAKE(saved->h, s->exec, true, t * (size_t)c->inter * e);
    mark = s->exec->arena->high;
    if (!(h = saved->h)) USLI_TAKE(h, s->exec, false, t * (size_t)c->inter * e);
    usli_glu_args glu = glu_args(s, saved);
    glu.h = h;
    USLI_TRY(usli_op_glu(s->exec, &glu, USLI_FORWARD));
    g.args.x = h;
    g.args.y = c->arch->post_norms ? saved->mlp : s->x;
    g.args.xa = saved->xa_down;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    s->exec->arena->high = mark;
    if (!c->arch->post_norms) return USL_OK;
    return branch_norm(s, USLI_POST_MLP_NORM, layer, saved->mlp, saved->rstd_mlp);
}

/* The same block over some of the tokens: an MLP does not mix them. */
typedef struct part {
    usli_batch batch;
    usli_pass_state s;
    usli_block_saved saved;
    void *dn;
} part;

static void make_part(const usli_pass_state *s, const usli_block_saved *saved, void *dn, int64_t first, part *p) {
    const usl_model *m = s->model;
    size_t cells = (size_t)first * (size_t)m->config.hidden, stream = cells * usli_dtype_bytes(m->res_dtype);
    int64_t left = s->batch->tokens - first;
    p->batch = *s->batch;
    p->batch.tokens = s->piece && s->piece < left ? s->piece : left;
    if (p->batch.row_of_token) p->batch.row_of_token += first;
    p->batch.position += first;
    p->s = *s;
    p->s.batch = &p->batch;
    p->s.x = (char *)s->x + cells * usli_dtype_bytes(m->dtype);
    p->saved =
        (usli_block_saved){ .n1 = (char *)saved->n1 + stream, .n2 = saved->n2 ? (char *)saved->n2 + stream : NULL };
    p->dn = dn ? (char *)dn + stream : NULL;
}

usl_status usli_block_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                              const void *x, bool keep, usli_block_saved *saved) {
    USLI_TRY(attention_half(s, layer, cache, res, x, keep, saved));
    if (keep) return mlp_half(s, layer, true, true, saved);
    size_t mark = s->exec->arena->high;
    part p;
    for (int64_t first = 0; first < s->batch->tokens; first += p.batch.tokens) {
        make_part(s, saved, NULL, first, &p);
        USLI_TRY(mlp_half(&p.s, layer, false, true, &p.saved));
        s->exec->arena->high = mark;
    }
    return USL_OK;
}

/* ---- Backward
 * ----------------------------------------------------------------------------------------------------------------------
 */

/* The gradient of a branch's output has the stream's value, in the activations' type. */
static usl_status branch_gradient(usli_pass_state *s, void *dn, const void **out) {
    const usl_model *m = s->model;
    *out = dn;
    if (m->res_dtype == m->dtype) return USL_OK;
    int64_t n = s->batch->tokens * m->config.hidden;
    void *copy;
    USLI_TAKE(copy, s->exec, false, (size_t)n * usli_dtype_bytes(m->dtype));
    usli_cast_args cast = { .src = { .dtype = m->res_dtype, .rows = 1, .cols = n, .data = dn },
                            .dtype = m->dtype,
                            .dst = copy };
    *out = copy;
    return usli_op_cast(s->exec, &cast, USLI_FORWARD);
}

/* The gradient of what a branch made, before the norm behind it where there is one. */
static usl_status branch_backward(usli_pass_state *s, usli_slot slot, int64_t layer, const void *branch, float *rstd,
                                  void *dn, const void **out) {
    const usl_model *m = s->model;
    USLI_TRY(branch_gradient(s, dn, out));
    if (!m->config.arch->post_norms) return USL_OK;
    void *d;
    USLI_TAKE(d, s->exec, false, (size_t)s->batch->tokens * (size_t)m->config.hidden * usli_dtype_bytes(m->dtype));
    usli_rmsnorm_args norm = branch_norm_args(s, slot, layer);
    norm.n = branch;
    norm.rstd = rstd;
    norm.dy = *out;
    norm.dn = d;
    *out = d;
    return usli_op_rmsnorm(s->exec, &norm, USLI_BACKWARD);
}

/* y = norm(n) again, for the adapters' and weights' gradients. */
static usl_status rebuild_norm(usli_pass_state *s, usli_slot slot, int64_t layer, const void *n, void *y) {
    usli_rmsnorm_args norm = norm_args(s, slot, layer);
    norm.res = n;
    norm.y = y;
    return usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD);
}

static usl_status norm_backward(usli_pass_state *s, usli_slot slot, int64_t layer, const void *n, float *rstd,
                                const void *dy, void *dn) {
    usli_rmsnorm_args norm = norm_args(s, slot, layer);
    norm.n = n;
    norm.rstd = rstd;
    norm.dy = dy;
    norm.dn = dn;
    norm.dn_mode = USLI_ACCUMULATE;
    return usli_op_rmsnorm(s->exec, &norm, USLI_BACKWARD);
}

static usl_status mlp_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn) {
    const usli_config *c = &s->model->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(s->model->dtype), mark = s->exec->arena->high;
    group g;
    void *dh, *h = saved->h, *y = saved->y_mlp, *dy;
    const void *dx;
    USLI_TRY(branch_backward(s, USLI_POST_MLP_NORM, layer, saved->mlp, saved->rstd_mlp, dn, &dx));
    USLI_TAKE(dh, s->exec, false, t * (size_t)c->inter * e);
    size_t inner = s->exec->arena->high;
    make_group(s, layer, DOWN, &g);
    usli_glu_args glu = glu_args(s, saved);
    if (!h && trains(&g)) {
        USLI_TAKE(h, s->exec, false, t * (size_t)c->inter * e);
        glu.h = h;
        USLI_TRY(usli_op_glu(s->exec, &glu, USLI_FORWARD));
    }
    g.args.x = h;
    g.args.xa = saved->xa_down;
    g.args.dy = dx;
    g.args.dx = dh;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    s->exec->arena->high = inner;
    glu.dh = dh;
    glu.dgate_up = saved->gate_up;
    USLI_TRY(usli_op_glu(s->exec, &glu, USLI_BACKWARD));
    s->exec->arena->high = mark;
    make_group(s, layer, GATE_UP, &g);
    USLI_TAKE(dy, s->exec, false, t * (size_t)c->hidden * e);
    if (!y && trains(&g)) {
        USLI_TAKE(y, s->exec, false, t * (size_t)c->hidden * e);
        USLI_TRY(rebuild_norm(s, USLI_MLP_NORM, layer, saved->n2, y));
    }
    g.args.x = y;
    g.args.xa = saved->xa_gate_up;
    g.args.dy = saved->gate_up;
    g.args.dx = dy;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    USLI_TRY(norm_backward(s, USLI_MLP_NORM, layer, saved->n2, saved->rstd2, dy, dn));
    s->exec->arena->high = mark;
    return USL_OK;
}

static usl_status attention_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn,
                                     bool wants_input) {
    const usli_config *c = &s->model->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(s->model->dtype), mark = s->exec->arena->high;
    size_t q = (size_t)(c->heads * c->head_dim), kv = (size_t)(c->kv_heads * c->head_dim), width = q + 2 * kv;
    group g;
    char *dqkv;
    void *d_o, *y = saved->y_attn, *dy = NULL, *turned = saved->qkv;
    const void *dx;
    USLI_TRY(branch_backward(s, USLI_POST_ATTN_NORM, layer, saved->attn, saved->rstd_attn, dn, &dx));
    USLI_TAKE(dqkv, s->exec, false, t * width * e);
    float *rstd = NULL;
    if (c->arch->qk_norm) USLI_TAKE(rstd, s->exec, false, t * (size_t)(c->heads + c->kv_heads) * sizeof(float));
    size_t inner = s->exec->arena->high;
    USLI_TAKE(d_o, s->exec, false, t * q * e);
    make_group(s, layer, OUT, &g);
    g.args.x = saved->o;
    g.args.xa = saved->xa_o;
    g.args.dy = dx;
    g.args.dx = d_o;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    if (c->arch->qk_norm) {
        USLI_TRY(copy_heads(s, saved->qkv, t * width * e, &turned));
        usli_rope_args again = rope_args(s, layer, turned);
        again.q_rstd = rstd;
        again.k_rstd = rstd + t * (size_t)c->heads;
        USLI_TRY(usli_op_rope(s->exec, &again, USLI_FORWARD));
    }
    usli_attention_args attn = attention_args(s, layer, turned, saved);
    attn.d_o = d_o;
    attn.dq = dqkv;
    attn.dk = dqkv + q * e;
    attn.dv = dqkv + (q + kv) * e;
    USLI_TRY(usli_op_attention(s->exec, &attn, USLI_BACKWARD));
    s->exec->arena->high = inner;
    usli_rope_args rope = rope_args(s, layer, saved->qkv);
    if (c->arch->qk_norm) {
        rope.q_in = rope.q;
        rope.k_in = rope.k;
        rope.q_rstd = rstd;
        rope.k_rstd = rstd + t * (size_t)c->heads;
        rope.dq_norm = usli_model_weight(s->model, USLI_Q_NORM, layer)->grad;
        rope.dk_norm = usli_model_weight(s->model, USLI_K_NORM, layer)->grad;
    }
    rope.dq = attn.dq;
    rope.dk = attn.dk;
    USLI_TRY(usli_op_rope(s->exec, &rope, USLI_BACKWARD));
    make_group(s, layer, QKV, &g);
    bool trained = trains(&g);
    if (trained && !y) {
        USLI_TAKE(y, s->exec, false, t * (size_t)c->hidden * e);
        USLI_TRY(rebuild_norm(s, USLI_ATTN_NORM, layer, saved->n1, y));
    }
    if (wants_input) USLI_TAKE(dy, s->exec, false, t * (size_t)c->hidden * e);
    g.args.x = y;
    g.args.xa = saved->xa_qkv;
    g.args.dy = dqkv;
    g.args.dx = dy;
    if (trained || wants_input) USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    if (wants_input) USLI_TRY(norm_backward(s, USLI_ATTN_NORM, layer, saved->n1, saved->rstd1, dy, dn));
    s->exec->arena->high = mark;
    return USL_OK;
}

usl_status usli_block_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input) {
    USLI_TRY(mlp_backward(s, layer, saved, dn));
    return attention_backward(s, layer, saved, dn, wants_input);
}

usl_status usli_block_again(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input) {
    const usl_model *m = s->model;
    size_t row = (size_t)m->config.hidden * usli_dtype_bytes(m->res_dtype), mark = s->exec->arena->high;
    part p;
    USLI_TRY(attention_half(s, layer, NULL, saved->n1, NULL, true, saved));
    s->exec->arena->high = mark;
    for (int64_t first = 0; first < s->batch->tokens; first += p.batch.tokens) {
        make_part(s, saved, dn, first, &p);
        USLI_TAKE(p.saved.n2, s->exec, false, (size_t)p.batch.tokens * row);
        USLI_TRY(mlp_half(&p.s, layer, false, false, &p.saved));
        USLI_TRY(mlp_backward(&p.s, layer, &p.saved, p.dn));
        s->exec->arena->high = mark;
    }
    return attention_backward(s, layer, saved, dn, wants_input);
}
