/* A mixture of experts. Each token's slots become rows, sorted by expert, of one product over all experts:
 *
 *   logits = y Wrouter; route: slots, rows and their weights; x = y of each row's token; gu = x W[expert]
 *   h = weight * glu(gu); z = h W'[expert]; out = sum over a token's rows of z
 *
 * The expert that sees every token is the dense MLP (mlp.c), whose hidden values are weighted where it has a gate.
 * kept: logits, slots, rows, weights, gu. */
#include "core/base/dtype.h"
#include "core/model/block_parts.h"

static int64_t row_count(const usli_pass_state *s) {
    return s->batch->tokens * s->model->config.top_k;
}

/* The experts' matrices, over rows instead of tokens. */
static usl_status experts_group(usli_pass_state *s, int64_t layer, usli_group_kind which, const usli_block_saved *saved,
                                usli_group *g) {
    usli_group_make(s, layer, which, g);
    g->args.expert_offsets = saved->route.offsets;
    if (!(g->args.dropout.p > 0)) return USL_OK;
    /* Dropout's keys are those of a row's token. */
    const int32_t **keys[] = { &g->args.dropout.row, &g->args.dropout.position };
    for (int i = 0; i < 2; i++) {
        void *copy;
        USLI_TAKE(copy, s->exec, false, (size_t)g->args.tokens * sizeof(int32_t));
        usli_gather_args pick = { .rows = g->args.tokens,
                                  .cols = 1,
                                  .x_rows = s->batch->tokens,
                                  .dtype = USL_F32,
                                  .index = saved->route.token,
                                  .x = *keys[i],
                                  .y = copy };
        USLI_TRY(usli_op_gather(s->exec, &pick, USLI_FORWARD));
        *keys[i] = copy;
    }
    return USL_OK;
}

static usli_route_args route_args(const usli_pass_state *s, int64_t layer, const usli_routing *r) {
    const usli_config *c = &s->model->config;
    return (usli_route_args){ .tokens = s->batch->tokens,
                              .experts = (int)c->experts,
                              .top_k = (int)c->top_k,
                              .groups = (int)c->groups,
                              .best_groups = (int)c->best_groups,
                              .sigmoid = c->arch->mixture->sigmoid,
                              .normalised = c->normalised,
                              .by_pairs = c->arch->mixture->by_pairs && c->groups > 1,
                              .scale = (float)c->routed_scale,
                              .logits = r->logits,
                              .correction = usli_model_weight(s->model, USLI_ROUTER_BIAS, layer)->d.data,
                              .chosen = r->chosen,
                              .offsets = r->offsets,
                              .row = r->row,
                              .token = r->token,
                              .weight = r->weight };
}

/* A gate of one value: the sigmoid is the weight of the only expert. */
static usli_route_args gate_args(const usli_pass_state *s, const usli_routing *r) {
    return (usli_route_args){ .tokens = s->batch->tokens,
                              .experts = 1,
                              .top_k = 1,
                              .sigmoid = true,
                              .scale = 1,
                              .logits = r->logits,
                              .chosen = r->chosen,
                              .weight = r->weight };
}

static usli_glu_args glu_args(const usli_pass_state *s, const usli_block_saved *saved) {
    return (usli_glu_args){ .rows = row_count(s),
                            .cols = s->model->config.expert_inter,
                            .act = s->model->config.act,
                            .dtype = s->model->dtype,
                            .gate_up = saved->experts,
                            .weight = saved->route.weight };
}

/* Rows of tokens' vectors: y[i] = x[token of row i]. */
static usl_status spread(usli_pass_state *s, const usli_block_saved *saved, const void *x, void **rows) {
    const usl_model *m = s->model;
    USLI_TAKE(*rows, s->exec, false, (size_t)(row_count(s) * m->config.hidden) * usli_dtype_bytes(m->dtype));
    usli_gather_args g = { .rows = row_count(s),
                           .cols = m->config.hidden,
                           .x_rows = s->batch->tokens,
                           .dtype = m->dtype,
                           .index = saved->route.token,
                           .x = x,
                           .y = *rows };
    return usli_op_gather(s->exec, &g, USLI_FORWARD);
}

/* Tokens' sums of their rows: the other way. */
static usl_status collect(usli_pass_state *s, const usli_block_saved *saved, const void *rows, void *y) {
    const usl_model *m = s->model;
    usli_combine_args c = { .tokens = s->batch->tokens,
                            .cols = m->config.hidden,
                            .top_k = (int)m->config.top_k,
                            .dtype = m->dtype,
                            .row = saved->route.row,
                            .x = rows,
                            .y = y };
    return usli_op_combine(s->exec, &c, USLI_FORWARD);
}

/* ---- Forward -------------------------------------------------------------------------------------------------------
 */

static usl_status take_gate(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved) {
    size_t t = (size_t)s->batch->tokens;
    usli_group g;
    usli_group_make(s, layer, USLI_GROUP_SHARED_GATE, &g);
    if (!g.args.segments) return USL_OK;
    USLI_TAKE(saved->shared.logits, s->exec, keep, t * sizeof(float));
    USLI_TAKE(saved->shared.weight, s->exec, keep, t * sizeof(float));
    USLI_TAKE(saved->shared.chosen, s->exec, keep, t * sizeof(int32_t));
    if (s->training) USLI_TAKE(saved->xa_shared, s->exec, keep, usli_group_xa_bytes(&g));
    return USL_OK;
}

usl_status usli_mixture_take(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved) {
    const usli_config *c = &s->model->config;
    size_t t = (size_t)s->batch->tokens, rows = (size_t)row_count(s), experts = (size_t)c->experts;
    usli_routing *r = &saved->route;
    usli_group g;
    USLI_TAKE(r->logits, s->exec, keep, t * experts * sizeof(float));
    USLI_TAKE(r->weight, s->exec, keep, rows * sizeof(float));
    USLI_TAKE(r->chosen, s->exec, keep, rows * sizeof(int32_t));
    USLI_TAKE(r->row, s->exec, keep, rows * sizeof(int32_t));
    USLI_TAKE(r->token, s->exec, keep, rows * sizeof(int32_t));
    USLI_TAKE(r->offsets, s->exec, keep, (experts + 1) * sizeof(int32_t));
    if (s->training) {
        usli_group_make(s, layer, USLI_GROUP_ROUTER, &g);
        USLI_TAKE(saved->xa_router, s->exec, keep, usli_group_xa_bytes(&g));
        usli_group_make(s, layer, USLI_GROUP_EXPERTS_IN, &g);
        USLI_TAKE(saved->xa_in, s->exec, keep, usli_group_xa_bytes(&g));
    }
    USLI_TAKE(saved->experts, s->exec, keep, 2 * rows * (size_t)c->expert_inter * usli_dtype_bytes(s->model->dtype));
    return take_gate(s, layer, keep, saved);
}

/* logits = y W^T in float32, and the router's own decision on them. */
static usl_status decide(usli_pass_state *s, int64_t layer, usli_group_kind which, const void *y, void *xa,
                         usli_route_args *route) {
    usli_group g;
    usli_group_make(s, layer, which, &g);
    g.args.y_dtype = USL_F32;
    g.args.x = y;
    g.args.y = (void *)(uintptr_t)route->logits;
    g.args.xa = xa;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    return usli_op_route(s->exec, route, USLI_FORWARD);
}

usl_status usli_mixture_in(usli_pass_state *s, int64_t layer, const void *y, usli_block_saved *saved) {
    size_t mark = s->exec->arena->high;
    usli_group g;
    void *x;
    usli_route_args route = route_args(s, layer, &saved->route);
    const usli_balance *b = &s->balance;
    if (b->micros && !s->again) {
        route.first = s->first;
        route.micros = b->micros;
        route.micro = b->micro;
        route.counts = b->counts;
        route.mass = b->mass;
    }
    USLI_TRY(decide(s, layer, USLI_GROUP_ROUTER, y, saved->xa_router, &route));
    if (saved->shared.weight) {
        usli_route_args gate = gate_args(s, &saved->shared);
        USLI_TRY(decide(s, layer, USLI_GROUP_SHARED_GATE, y, saved->xa_shared, &gate));
    }
    USLI_TRY(spread(s, saved, y, &x));
    USLI_TRY(experts_group(s, layer, USLI_GROUP_EXPERTS_IN, saved, &g));
    g.args.x = x;
    g.args.y = saved->experts;
    g.args.xa = saved->xa_in;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    s->exec->arena->high = mark;
    return USL_OK;
}

usl_status usli_mixture_out(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved, void *out) {
    const usl_model *m = s->model;
    usli_glu_args glu = glu_args(s, saved);
    usli_group g;
    void *h, *z;
    usli_group_make(s, layer, USLI_GROUP_EXPERTS_OUT, &g);
    if (s->training) USLI_TAKE(saved->xa_out, s->exec, keep, usli_group_xa_bytes(&g));
    size_t mark = s->exec->arena->high;
    USLI_TAKE(h, s->exec, false, (size_t)(glu.rows * glu.cols) * usli_dtype_bytes(m->dtype));
    USLI_TAKE(z, s->exec, false, (size_t)(glu.rows * m->config.hidden) * usli_dtype_bytes(m->dtype));
    glu.h = h;
    USLI_TRY(usli_op_glu(s->exec, &glu, USLI_FORWARD));
    USLI_TRY(experts_group(s, layer, USLI_GROUP_EXPERTS_OUT, saved, &g));
    g.args.x = h;
    g.args.y = z;
    g.args.xa = saved->xa_out;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    USLI_TRY(collect(s, saved, z, out));
    s->exec->arena->high = mark;
    return USL_OK;
}

/* ---- Backward ------------------------------------------------------------------------------------------------------
 */

bool usli_mixture_trains(usli_pass_state *s, int64_t layer) {
    static const usli_group_kind WANT_Y[] = { USLI_GROUP_ROUTER, USLI_GROUP_SHARED_GATE, USLI_GROUP_EXPERTS_IN };
    usli_group g;
    for (size_t i = 0; i < sizeof WANT_Y / sizeof *WANT_Y; i++) {
        usli_group_make(s, layer, WANT_Y[i], &g);
        if (usli_group_trains(&g)) return true;
    }
    return false;
}

usl_status usli_mixture_out_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *dx,
                                     float *dlogits) {
    const usl_model *m = s->model;
    size_t mark = s->exec->arena->high;
    usli_glu_args glu = glu_args(s, saved);
    size_t bytes = (size_t)(glu.rows * glu.cols) * usli_dtype_bytes(m->dtype);
    usli_group g;
    float *dweight;
    void *dh, *dz, *h = NULL;
    USLI_TAKE(dweight, s->exec, false, (size_t)glu.rows * sizeof(float));
    USLI_TAKE(dh, s->exec, false, bytes);
    size_t inner = s->exec->arena->high;
    USLI_TRY(spread(s, saved, dx, &dz));
    USLI_TRY(experts_group(s, layer, USLI_GROUP_EXPERTS_OUT, saved, &g));
    if (usli_group_trains(&g)) {
        USLI_TAKE(h, s->exec, false, bytes);
        glu.h = h;
        USLI_TRY(usli_op_glu(s->exec, &glu, USLI_FORWARD));
    }
    g.args.x = h;
    g.args.xa = saved->xa_out;
    g.args.dy = dz;
    g.args.dx = dh;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    s->exec->arena->high = inner;
    glu.dh = dh;
    glu.dgate_up = saved->experts;
    glu.dweight = dweight;
    USLI_TRY(usli_op_glu(s->exec, &glu, USLI_BACKWARD));
    usli_route_args route = route_args(s, layer, &saved->route);
    route.dweight = dweight;
    route.dlogits = dlogits;
    if (s->balance.micros) {
        route.first = s->first;
        route.micros = s->balance.micros;
        route.micro = s->balance.micro;
        route.dmass = s->balance.dmass;
    }
    USLI_TRY(usli_op_route(s->exec, &route, USLI_BACKWARD));
    s->exec->arena->high = mark;
    return USL_OK;
}

/* Adds to dy. */
static usl_status decide_backward(usli_pass_state *s, int64_t layer, usli_group_kind which, const void *y, void *xa,
                                  const float *dlogits, void *dy) {
    usli_group g;
    usli_group_make(s, layer, which, &g);
    g.args.y_dtype = USL_F32;
    g.args.x = y;
    g.args.xa = xa;
    g.args.dy = dlogits;
    g.args.dx = dy;
    g.args.dx_mode = USLI_ACCUMULATE;
    return usli_op_linear(s->exec, &g.args, USLI_BACKWARD);
}

usl_status usli_mixture_in_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *y,
                                    const float *dlogits, float *dshared, void *dy) {
    const usl_model *m = s->model;
    size_t mark = s->exec->arena->high;
    usli_group g;
    void *x = NULL, *dx;
    USLI_TAKE(dx, s->exec, false, (size_t)(row_count(s) * m->config.hidden) * usli_dtype_bytes(m->dtype));
    USLI_TRY(experts_group(s, layer, USLI_GROUP_EXPERTS_IN, saved, &g));
    if (usli_group_trains(&g)) USLI_TRY(spread(s, saved, y, &x));
    g.args.x = x;
    g.args.xa = saved->xa_in;
    g.args.dy = saved->experts;
    g.args.dx = dx;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    USLI_TRY(collect(s, saved, dx, dy));
    s->exec->arena->high = mark;
    USLI_TRY(decide_backward(s, layer, USLI_GROUP_ROUTER, y, saved->xa_router, dlogits, dy));
    if (!saved->shared.weight) return USL_OK;
    usli_route_args gate = gate_args(s, &saved->shared);
    float *dgate;
    USLI_TAKE(dgate, s->exec, false, (size_t)s->batch->tokens * sizeof(float));
    gate.dweight = dshared;
    gate.dlogits = dgate;
    USLI_TRY(usli_op_route(s->exec, &gate, USLI_BACKWARD));
    USLI_TRY(decide_backward(s, layer, USLI_GROUP_SHARED_GATE, y, saved->xa_shared, dgate, dy));
    s->exec->arena->high = mark;
    return USL_OK;
}
