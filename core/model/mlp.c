/* The MLP half of a block: dense, a mixture, or a mixture beside an expert that sees every token. */
#include "core/base/dtype.h"
#include "core/model/block_parts.h"

/* Columns of the dense part; 0: the layer has none. */
static int64_t dense_width(const usl_model *m, int64_t layer) {
    return usli_model_weight(m, USLI_DOWN, layer)->m.cols;
}

static usli_glu_args glu_args(usli_pass_state *s, int64_t layer, const usli_block_saved *saved) {
    usli_group in, out;
    usli_group_make(s, layer, USLI_GROUP_GATE_UP, &in);
    usli_group_make(s, layer, USLI_GROUP_DOWN, &out);
    return (usli_glu_args){ .rows = s->batch->tokens,
                            .cols = dense_width(s->model, layer),
                            .ld = usli_group_out_stride(&in),
                            .ldh = usli_group_stride(&out),
                            .act = s->model->config.act,
                            .dtype = s->model->dtype,
                            .gate_up = saved->gate_up,
                            .weight = saved->shared.weight };
}

static usl_status dense_take(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved) {
    usli_group g;
    usli_group_make(s, layer, USLI_GROUP_GATE_UP, &g);
    if (s->training) USLI_TAKE(saved->xa_gate_up, s->exec, keep, usli_group_xa_bytes(&g));
    size_t row = (size_t)usli_group_out_stride(&g) * usli_dtype_bytes(s->model->dtype);
    USLI_TAKE(saved->gate_up, s->exec, keep, (size_t)g.args.tokens * row);
    return USL_OK;
}

static usl_status dense_in(usli_pass_state *s, int64_t layer, const void *y, usli_block_saved *saved) {
    usli_group g;
    usli_group_make(s, layer, USLI_GROUP_GATE_UP, &g);
    usli_group_set_x(&g, y);
    g.args.y = saved->gate_up;
    g.args.ldy = usli_group_out_stride(&g);
    g.args.xa = saved->xa_gate_up;
    return usli_op_linear(s->exec, &g.args, USLI_FORWARD);
}

static usl_status dense_out(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved, void *out,
                            usli_write mode) {
    usli_group g;
    void *h;
    usli_glu_args glu = glu_args(s, layer, saved);
    size_t bytes = (size_t)(glu.rows * glu.ldh) * usli_dtype_bytes(glu.dtype);
    usli_group_make(s, layer, USLI_GROUP_DOWN, &g);
    if (keep && usli_is_whole(s, layer) && usli_group_trains(&g)) USLI_TAKE(saved->h, s->exec, true, bytes);
    size_t mark = s->exec->arena->high;
    if (!(h = saved->h)) USLI_TAKE(h, s->exec, false, bytes);
    glu.h = h;
    USLI_TRY(usli_op_glu(s->exec, &glu, USLI_FORWARD));
    usli_group_set_x(&g, h);
    g.args.y = out;
    g.args.y_mode = mode;
    g.args.xa = saved->xa_down;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    s->exec->arena->high = mark;
    return USL_OK;
}

/* Backward wants y. */
static bool wants_y(usli_pass_state *s, int64_t layer) {
    usli_group g;
    usli_group_make(s, layer, USLI_GROUP_GATE_UP, &g);
    return usli_group_trains(&g) || (usli_layer_sparse(&s->model->config, layer) && usli_mixture_trains(s, layer));
}

usl_status usli_mlp_forward(usli_pass_state *s, int64_t layer, bool keep, bool output, usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(m->dtype);
    bool dense = dense_width(m, layer) > 0, sparse = usli_layer_sparse(c, layer);
    usli_group g;
    usli_group_make(s, layer, USLI_GROUP_GATE_UP, &g);
    size_t y_bytes = t * (size_t)(c->hidden + g.room) * e;
    void *y;
    if (s->training) USLI_TAKE(saved->rstd2, s->exec, keep, t * sizeof(float));
    if (dense) USLI_TRY(dense_take(s, layer, keep, saved));
    if (sparse) USLI_TRY(usli_mixture_take(s, layer, keep, saved));
    if (keep && usli_is_whole(s, layer) && wants_y(s, layer)) USLI_TAKE(saved->y_mlp, s->exec, true, y_bytes);
    size_t mark = s->exec->arena->high;
    if (!(y = saved->y_mlp)) USLI_TAKE(y, s->exec, false, y_bytes);
    usli_rmsnorm_args norm = usli_norm_args(s, USLI_MLP_NORM, layer);
    norm.res = saved->n1;
    norm.x = s->x;
    norm.res_out = saved->n2;
    norm.y = y;
    norm.ldy = c->hidden + g.room;
    norm.rstd = saved->rstd2;
    USLI_TRY(usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD));
    if (dense) USLI_TRY(dense_in(s, layer, y, saved));
    if (sparse) USLI_TRY(usli_mixture_in(s, layer, y, saved));
    s->exec->arena->high = mark;
    if (!output && !c->arch->post_norms) return USL_OK;
    usli_group_make(s, layer, USLI_GROUP_DOWN, &g);
    if (s->training && dense) USLI_TAKE(saved->xa_down, s->exec, keep, usli_group_xa_bytes(&g));
    if (c->arch->post_norms) USLI_TRY(usli_branch_take(s, keep, &saved->mlp, &saved->rstd_mlp));
    void *out = c->arch->post_norms ? saved->mlp : s->x;
    if (sparse) USLI_TRY(usli_mixture_out(s, layer, keep, saved, out));
    if (dense) USLI_TRY(dense_out(s, layer, keep, saved, out, sparse ? USLI_ACCUMULATE : USLI_ASSIGN));
    if (!c->arch->post_norms) return USL_OK;
    return usli_branch_norm(s, USLI_POST_MLP_NORM, layer, saved->mlp, saved->rstd_mlp);
}

/* Leaves the gradient of gate|up in their place, and of the tokens' weights, where they have some, in dweight. */
static usl_status dense_out_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *dx,
                                     float *dweight) {
    size_t mark = s->exec->arena->high;
    usli_group g;
    void *dh, *h = saved->h;
    usli_glu_args glu = glu_args(s, layer, saved);
    size_t e = usli_dtype_bytes(glu.dtype);
    USLI_TAKE(dh, s->exec, false, (size_t)(glu.rows * glu.cols) * e);
    size_t inner = s->exec->arena->high;
    usli_group_make(s, layer, USLI_GROUP_DOWN, &g);
    if (!h && usli_group_trains(&g)) {
        USLI_TAKE(h, s->exec, false, (size_t)(glu.rows * glu.ldh) * e);
        glu.h = h;
        USLI_TRY(usli_op_glu(s->exec, &glu, USLI_FORWARD));
    }
    usli_group_set_x(&g, h);
    g.args.xa = saved->xa_down;
    g.args.dy = dx;
    g.args.ldy = s->ldn;
    g.args.dx = dh;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    s->exec->arena->high = inner;
    glu.dh = dh;
    glu.dgate_up = saved->gate_up;
    glu.dweight = dweight;
    USLI_TRY(usli_op_glu(s->exec, &glu, USLI_BACKWARD));
    s->exec->arena->high = mark;
    return USL_OK;
}

usl_status usli_mlp_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn) {
    const usli_config *c = &s->model->config;
    size_t t = (size_t)s->batch->tokens, e = usli_dtype_bytes(s->model->dtype), mark = s->exec->arena->high;
    bool dense = dense_width(s->model, layer) > 0, sparse = usli_layer_sparse(c, layer);
    usli_group g;
    void *y = saved->y_mlp, *dy;
    float *dlogits = NULL, *dshared = NULL;
    const void *dx;
    if (sparse) USLI_TAKE(dlogits, s->exec, false, t * (size_t)c->experts * sizeof(float));
    if (saved->shared.weight) USLI_TAKE(dshared, s->exec, false, t * sizeof(float));
    size_t inner = s->exec->arena->high;
    USLI_TRY(usli_branch_backward(s, USLI_POST_MLP_NORM, layer, saved->mlp, saved->rstd_mlp, dn, &dx));
    if (dense) USLI_TRY(dense_out_backward(s, layer, saved, dx, dshared));
    if (sparse) USLI_TRY(usli_mixture_out_backward(s, layer, saved, dx, dlogits));
    s->exec->arena->high = inner;
    usli_group_make(s, layer, USLI_GROUP_GATE_UP, &g);
    USLI_TAKE(dy, s->exec, false, t * (size_t)c->hidden * e);
    if (!y && wants_y(s, layer)) {
        USLI_TAKE(y, s->exec, false, t * (size_t)(c->hidden + g.room) * e);
        USLI_TRY(usli_norm_again(s, USLI_MLP_NORM, layer, saved->n2, y, c->hidden + g.room));
    }
    if (sparse) USLI_TRY(usli_mixture_in_backward(s, layer, saved, y, dlogits, dshared, dy));
    usli_group_set_x(&g, y);
    g.args.xa = saved->xa_gate_up;
    g.args.dy = saved->gate_up;
    g.args.ldy = usli_group_out_stride(&g);
    g.args.dx = dy;
    g.args.dx_mode = sparse ? USLI_ACCUMULATE : USLI_ASSIGN;
    if (dense) USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    USLI_TRY(usli_norm_backward(s, USLI_MLP_NORM, layer, saved->n2, saved->rstd2, dy, dn));
    s->exec->arena->high = mark;
    return USL_OK;
}
