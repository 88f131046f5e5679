#include <math.h>

#include "core/base/dtype.h"
#include "core/model/block_parts.h"

/* width: from row to row of qkv. */
static usli_rope_args rope_args(const usli_pass_state *s, int64_t layer, void *qkv, int64_t width) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    const usli_rope_table *angles = usli_model_rope(m, layer);
    const usli_weight *qn = usli_model_weight(m, USLI_Q_NORM, layer), *kn = usli_model_weight(m, USLI_K_NORM, layer);
    int64_t q = c->heads * c->head_dim;
    return (usli_rope_args){ .tokens = s->batch->tokens,
                             .heads = (int)c->heads,
                             .kv_heads = (int)c->kv_heads,
                             .head_dim = (int)c->head_dim,
                             .rot_dim = (int)c->rot_dim,
                             .dtype = m->dtype,
                             .position = s->batch->angle,
                             .cos = angles->cos,
                             .sin = angles->sin,
                             .positions = angles->rows,
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

/* qkv: after rope, rows width apart; o's rows are o_stride apart. */
static usli_attention_args attention_args(const usli_pass_state *s, int64_t layer, char *qkv, int64_t width,
                                          int64_t o_stride, const usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    size_t e = usli_dtype_bytes(m->dtype);
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    usli_attention_args a = usli_attention_args_of(s, saved);
    a.kv_heads = (int)c->kv_heads;
    a.v_dim = (int)c->head_dim;
    a.softcap = (float)c->attention_softcap;
    a.window = usli_layer_windowed(c, layer) ? c->window : 0;
    a.q = qkv;
    a.k = qkv + (size_t)q * e;
    a.v = qkv + (size_t)(q + kv) * e;
    a.q_stride = a.k_stride = a.v_stride = width;
    a.o_stride = o_stride;
    return a;
}

/* Keys and values of the new tokens go into the cache; attention then reads the cache. */
usl_status usli_attention_cache(usli_pass_state *s, int64_t layer, const usli_cache *cache, usli_attention_args *a) {
    size_t cells = (size_t)layer * (size_t)cache->slots * (size_t)cache->length, e = usli_dtype_bytes(cache->dtype);
    void *k = (char *)cache->k + cells * (size_t)cache->width * e,
         *v = (char *)cache->v + cells * (size_t)cache->v_width * e;
    usli_scatter_args put = { .rows = a->tokens_q,
                              .cols = cache->width,
                              .dtype = cache->dtype,
                              .index = cache->store,
                              .x = a->k,
                              .ldx = a->k_stride,
                              .y = k };
    USLI_TRY(usli_op_scatter(s->exec, &put, USLI_FORWARD));
    put.cols = cache->v_width;
    put.x = a->v;
    put.ldx = a->v_stride;
    put.y = v;
    USLI_TRY(usli_op_scatter(s->exec, &put, USLI_FORWARD));
    a->k = k;
    a->v = v;
    a->k_stride = cache->width;
    a->v_stride = cache->v_width;
    a->cu_k = cache->begin;
    a->k_lens = cache->k_lens;
    a->tokens_k = cache->slots * cache->length;
    a->max_k = cache->longest;
    return USL_OK;
}

/* Where heads have norms, backward wants them as they were before: those that are kept are turned in a copy. */
usl_status usli_copy_heads(usli_pass_state *s, const void *qkv, size_t bytes, void **out) {
    const usl_model *m = s->model;
    USLI_TAKE(*out, s->exec, false, bytes);
    usli_cast_args copy = {
        .src = { .dtype = m->dtype, .rows = 1, .cols = (int64_t)(bytes / usli_dtype_bytes(m->dtype)), .data = qkv },
        .dtype = m->dtype,
        .dst = *out
    };
    return usli_op_cast(s->exec, &copy, USLI_FORWARD);
}

static usl_status plain_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                                const void *x, bool keep, usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(m->dtype);
    usli_group g, out;
    void *y;
    usli_group_make(s, layer, USLI_GROUP_QKV, &g);
    usli_group_make(s, layer, USLI_GROUP_OUT, &out);
    int64_t width = usli_group_out_stride(&g);
    size_t qkv_bytes = t * (size_t)width * e, y_bytes = t * (size_t)usli_group_stride(&g) * e;
    if (s->training) {
        USLI_TAKE(saved->rstd1, s->exec, keep, t * sizeof(float));
        USLI_TAKE(saved->xa_qkv, s->exec, keep, usli_group_xa_bytes(&g));
        USLI_TAKE(saved->lse, s->exec, keep, t * (size_t)c->heads * sizeof(float));
    }
    USLI_TAKE(saved->qkv, s->exec, keep, qkv_bytes);
    USLI_TAKE(saved->o, s->exec, keep, t * (size_t)usli_group_stride(&out) * e);
    if (keep && usli_is_whole(s, layer) && usli_group_trains(&g)) USLI_TAKE(saved->y_attn, s->exec, true, y_bytes);
    size_t mark = s->exec->arena->high;
    if (!(y = saved->y_attn)) USLI_TAKE(y, s->exec, false, y_bytes);
    usli_rmsnorm_args norm = usli_norm_args(s, USLI_ATTN_NORM, layer);
    norm.res = res;
    norm.x = x;
    norm.res_out = saved->n1;
    norm.y = y;
    norm.ldy = usli_group_stride(&g);
    norm.rstd = saved->rstd1;
    USLI_TRY(usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD));
    usli_group_set_x(&g, y);
    g.args.y = saved->qkv;
    g.args.ldy = width;
    g.args.xa = saved->xa_qkv;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    s->exec->arena->high = mark;
    void *turned = saved->qkv;
    if (keep && c->arch->qk_norm) USLI_TRY(usli_copy_heads(s, saved->qkv, qkv_bytes, &turned));
    usli_rope_args rope = rope_args(s, layer, turned, width);
    USLI_TRY(usli_op_rope(s->exec, &rope, USLI_FORWARD));
    usli_attention_args attn = attention_args(s, layer, turned, width, usli_group_stride(&out), saved);
    if (cache) USLI_TRY(usli_attention_cache(s, layer, cache, &attn));
    USLI_TRY(usli_op_attention(s->exec, &attn, USLI_FORWARD));
    s->exec->arena->high = mark;
    return USL_OK;
}

/* x = o Wo, and the norm behind it where there is one. */
static usl_status attention_out(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved) {
    const usli_config *c = &s->model->config;
    usli_group g;
    usli_group_make(s, layer, USLI_GROUP_OUT, &g);
    if (s->training) USLI_TAKE(saved->xa_o, s->exec, keep, usli_group_xa_bytes(&g));
    if (c->arch->post_norms) USLI_TRY(usli_branch_take(s, keep, &saved->attn, &saved->rstd_attn));
    usli_group_set_x(&g, saved->o);
    g.args.y = c->arch->post_norms ? saved->attn : s->x;
    g.args.xa = saved->xa_o;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    if (!c->arch->post_norms) return USL_OK;
    return usli_branch_norm(s, USLI_POST_ATTN_NORM, layer, saved->attn, saved->rstd_attn);
}

usl_status usli_attention_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                                  const void *x, bool keep, usli_block_saved *saved) {
    bool latent = s->model->config.arch->latent;
    USLI_TRY((latent ? usli_latent_forward : plain_forward)(s, layer, cache, res, x, keep, saved));
    return attention_out(s, layer, keep, saved);
}

usl_status usli_attention_out_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *dx,
                                       void *d_o) {
    usli_group g;
    usli_group_make(s, layer, USLI_GROUP_OUT, &g);
    usli_group_set_x(&g, saved->o);
    g.args.xa = saved->xa_o;
    g.args.dy = dx;
    g.args.ldy = s->ldn;
    g.args.dx = d_o;
    g.args.lddx = usli_group_stride(&g); /* as attention has o */
    return usli_op_linear(s->exec, &g.args, USLI_BACKWARD);
}

static usl_status plain_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn,
                                 bool wants_input) {
    const usli_config *c = &s->model->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(s->model->dtype), mark = s->exec->arena->high;
    size_t q = (size_t)(c->heads * c->head_dim), kv = (size_t)(c->kv_heads * c->head_dim);
    usli_group g, out;
    usli_group_make(s, layer, USLI_GROUP_QKV, &g);
    usli_group_make(s, layer, USLI_GROUP_OUT, &out);
    int64_t width = usli_group_out_stride(&g), o_stride = usli_group_stride(&out);
    size_t qkv_bytes = t * (size_t)width * e, y_bytes = t * (size_t)usli_group_stride(&g) * e;
    char *dqkv;
    void *d_o, *y = saved->y_attn, *dy = NULL, *turned = saved->qkv;
    const void *dx;
    USLI_TRY(usli_branch_backward(s, USLI_POST_ATTN_NORM, layer, saved->attn, saved->rstd_attn, dn, &dx));
    USLI_TAKE(dqkv, s->exec, false, qkv_bytes);
    float *rstd = NULL;
    if (c->arch->qk_norm) USLI_TAKE(rstd, s->exec, false, t * (size_t)(c->heads + c->kv_heads) * sizeof(float));
    size_t inner = s->exec->arena->high;
    USLI_TAKE(d_o, s->exec, false, t * (size_t)o_stride * e);
    USLI_TRY(usli_attention_out_backward(s, layer, saved, dx, d_o));
    if (c->arch->qk_norm) {
        USLI_TRY(usli_copy_heads(s, saved->qkv, qkv_bytes, &turned));
        usli_rope_args again = rope_args(s, layer, turned, width);
        again.q_rstd = rstd;
        again.k_rstd = rstd + t * (size_t)c->heads;
        USLI_TRY(usli_op_rope(s->exec, &again, USLI_FORWARD));
    }
    usli_attention_args attn = attention_args(s, layer, turned, width, o_stride, saved);
    attn.d_o = d_o;
    attn.dq = dqkv;
    attn.dk = dqkv + q * e;
    attn.dv = dqkv + (q + kv) * e;
    USLI_TRY(usli_op_attention(s->exec, &attn, USLI_BACKWARD));
    s->exec->arena->high = inner;
    usli_rope_args rope = rope_args(s, layer, saved->qkv, width);
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
    bool trained = usli_group_trains(&g);
    if (trained && !y) {
        USLI_TAKE(y, s->exec, false, y_bytes);
        USLI_TRY(usli_norm_again(s, USLI_ATTN_NORM, layer, saved->n1, y, usli_group_stride(&g)));
    }
    if (wants_input) USLI_TAKE(dy, s->exec, false, t * (size_t)c->hidden * e);
    usli_group_set_x(&g, y);
    g.args.xa = saved->xa_qkv;
    g.args.dy = dqkv;
    g.args.ldy = width;
    g.args.dx = dy;
    if (trained || wants_input) USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    if (wants_input) USLI_TRY(usli_norm_backward(s, USLI_ATTN_NORM, layer, saved->n1, saved->rstd1, dy, dn));
    s->exec->arena->high = mark;
    return USL_OK;
}

usl_status usli_attention_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn,
                                   bool wants_input) {
    bool latent = s->model->config.arch->latent;
    return (latent ? usli_latent_backward : plain_backward)(s, layer, saved, dn, wants_input);
}
