/* Latent attention (DeepSeek V2 and V3), keys and values made whole:
 *
 *   a|c|p = y W    narrow vectors of the queries (where they have one) and of keys and values, and the part of k that
 *                  carries positions, one for all heads
 *   q = norm(a) Wq, or y Wq; its last values and p are turned by rope;  kv = norm(c) Wkv;  k, v = join(kv, p)
 *   o = attention
 * kept: a|c|p, q, k, v; the norms are done again. */
#include <math.h>

#include "core/base/dtype.h"
#include "core/model/block_parts.h"

/* transformers' and DeepSeek's own code leave these norms' epsilon at this, whatever the config says of others. */
static const float EPS = 1e-6f;

/* Where things stand in a row of a|c|p, in values. */
typedef struct places {
    int64_t c, p, width;
} places;

static places places_of(const usli_config *config) {
    int64_t c = config->q_lora, p = c + config->kv_lora;
    return (places){ c, p, p + config->rot_dim };
}

static char *at(const usl_model *m, void *data, int64_t i) {
    return (char *)data + (size_t)i * usli_dtype_bytes(m->dtype);
}

static size_t bytes_of(const usli_pass_state *s, int64_t width) {
    return (size_t)(s->batch->tokens * width) * usli_dtype_bytes(s->model->dtype);
}

/* The norm of n values of every row, as that of a single head that is not turned. */
static usli_rope_args norm_args(const usli_pass_state *s, usli_slot slot, int64_t layer, int64_t n, float *rstd) {
    const usl_model *m = s->model;
    return (usli_rope_args){ .tokens = s->batch->tokens,
                             .heads = 1,
                             .head_dim = (int)n,
                             .dtype = m->dtype,
                             .position = s->batch->angle,
                             .cos = m->rope.cos,
                             .sin = m->rope.sin,
                             .positions = m->rope.rows,
                             .q_stride = places_of(&m->config).width,
                             .q_norm = usli_model_weight(m, slot, layer)->d.data,
                             .norm_dtype = USL_F32,
                             .norm_eps = EPS,
                             .q_rstd = rstd };
}

/* The queries' last values, and p. */
static usli_rope_args turn_args(const usli_pass_state *s) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    return (usli_rope_args){ .tokens = s->batch->tokens,
                             .heads = (int)c->heads,
                             .kv_heads = 1,
                             .head_dim = (int)c->rot_dim,
                             .rot_dim = (int)c->rot_dim,
                             .interleaved = c->interleaved,
                             .dtype = m->dtype,
                             .position = s->batch->angle,
                             .cos = m->rope.cos,
                             .sin = m->rope.sin,
                             .positions = m->rope.rows,
                             .q_stride = c->heads * c->head_dim,
                             .k_stride = places_of(c).width,
                             .head_stride = c->head_dim };
}

static usli_latent_args latent_args(const usli_pass_state *s) {
    const usli_config *c = &s->model->config;
    return (usli_latent_args){ .tokens = s->batch->tokens,
                               .heads = (int)c->heads,
                               .narrow = (int)(c->head_dim - c->rot_dim),
                               .rotated = (int)c->rot_dim,
                               .v_dim = (int)c->v_dim,
                               .dtype = s->model->dtype,
                               .shared_stride = places_of(c).width };
}

static usli_attention_args attention_args(const usli_pass_state *s, const usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    usli_attention_args a = usli_attention_args_of(s, saved);
    a.kv_heads = (int)c->heads;
    a.v_dim = (int)c->v_dim;
    a.q = saved->q;
    a.k = saved->k;
    a.v = saved->v;
    a.q_stride = a.k_stride = c->heads * c->head_dim;
    a.v_stride = a.o_stride = c->heads * c->v_dim;
    return a;
}

/* One product of a row's part of a|c|p, or of y. */
static void set_input(usli_group *g, const void *x, int64_t stride) {
    g->args.x = x;
    g->args.ldx = stride;
}

/* Norms of a and c in place. rstd: (2, tokens) or NULL. */
static usl_status norm_latents(usli_pass_state *s, int64_t layer, char *row, float *rstd) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    if (c->q_lora) {
        usli_rope_args a = norm_args(s, USLI_Q_A_NORM, layer, c->q_lora, rstd);
        a.q = row;
        USLI_TRY(usli_op_rope(s->exec, &a, USLI_FORWARD));
    }
    usli_rope_args a = norm_args(s, USLI_KV_A_NORM, layer, c->kv_lora, rstd ? rstd + s->batch->tokens : NULL);
    a.q = at(m, row, places_of(c).c);
    return usli_op_rope(s->exec, &a, USLI_FORWARD);
}

static usl_status take_saved(usli_pass_state *s, int64_t layer, bool keep, usli_block_saved *saved) {
    const usli_config *c = &s->model->config;
    usli_group g;
    if (s->training) {
        size_t t = (size_t)s->batch->tokens;
        USLI_TAKE(saved->rstd1, s->exec, keep, t * sizeof(float));
        USLI_TAKE(saved->lse, s->exec, keep, t * (size_t)c->heads * sizeof(float));
        usli_group_make(s, layer, USLI_GROUP_LATENT, &g);
        USLI_TAKE(saved->xa_qkv, s->exec, keep, usli_group_xa_bytes(&g));
        usli_group_make(s, layer, USLI_GROUP_QUERY, &g);
        USLI_TAKE(saved->xa_query, s->exec, keep, usli_group_xa_bytes(&g));
        usli_group_make(s, layer, USLI_GROUP_KEYS, &g);
        USLI_TAKE(saved->xa_keys, s->exec, keep, usli_group_xa_bytes(&g));
    }
    USLI_TAKE(saved->qkv, s->exec, keep, bytes_of(s, places_of(c).width));
    USLI_TAKE(saved->q, s->exec, keep, bytes_of(s, c->heads * c->head_dim));
    USLI_TAKE(saved->k, s->exec, keep, bytes_of(s, c->heads * c->head_dim));
    USLI_TAKE(saved->v, s->exec, keep, bytes_of(s, c->heads * c->v_dim));
    USLI_TAKE(saved->o, s->exec, keep, bytes_of(s, c->heads * c->v_dim));
    return USL_OK;
}

/* a|c|p, and q where it comes straight from the stream. */
static usl_status project(usli_pass_state *s, int64_t layer, const void *res, const void *x, usli_block_saved *saved) {
    const usl_model *m = s->model;
    usli_group g;
    void *y;
    USLI_TAKE(y, s->exec, false, bytes_of(s, m->config.hidden));
    usli_rmsnorm_args norm = usli_norm_args(s, USLI_ATTN_NORM, layer);
    norm.res = res;
    norm.x = x;
    norm.res_out = saved->n1;
    norm.y = y;
    norm.rstd = saved->rstd1;
    USLI_TRY(usli_op_rmsnorm(s->exec, &norm, USLI_FORWARD));
    usli_group_make(s, layer, USLI_GROUP_LATENT, &g);
    g.args.x = y;
    g.args.y = saved->qkv;
    g.args.xa = saved->xa_qkv;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    if (m->config.q_lora) return USL_OK;
    usli_group_make(s, layer, USLI_GROUP_QUERY, &g);
    g.args.x = y;
    g.args.y = saved->q;
    g.args.xa = saved->xa_query;
    return usli_op_linear(s->exec, &g.args, USLI_FORWARD);
}

/* q, where it has a narrow vector, k and v, from the normed a|c|p. */
static usl_status widen(usli_pass_state *s, int64_t layer, char *row, usli_block_saved *saved) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    places p = places_of(c);
    usli_group g;
    if (c->q_lora) {
        usli_group_make(s, layer, USLI_GROUP_QUERY, &g);
        set_input(&g, row, p.width);
        g.args.y = saved->q;
        g.args.xa = saved->xa_query;
        USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    }
    usli_latent_args join = latent_args(s);
    void *kv;
    usli_group_make(s, layer, USLI_GROUP_KEYS, &g);
    USLI_TAKE(kv, s->exec, false, bytes_of(s, g.args.out));
    set_input(&g, at(m, row, p.c), p.width);
    g.args.y = kv;
    g.args.xa = saved->xa_keys;
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_FORWARD));
    usli_rope_args turn = turn_args(s);
    turn.q = at(m, saved->q, c->head_dim - c->rot_dim);
    turn.k = at(m, row, p.p);
    USLI_TRY(usli_op_rope(s->exec, &turn, USLI_FORWARD));
    join.kv = kv;
    join.shared = turn.k;
    join.k = saved->k;
    join.v = saved->v;
    return usli_op_latent(s->exec, &join, USLI_FORWARD);
}

usl_status usli_latent_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                               const void *x, bool keep, usli_block_saved *saved) {
    USLI_TRY(take_saved(s, layer, keep, saved));
    size_t mark = s->exec->arena->high;
    USLI_TRY(project(s, layer, res, x, saved));
    s->exec->arena->high = mark;
    void *row = saved->qkv;
    if (keep) USLI_TRY(usli_copy_heads(s, saved->qkv, bytes_of(s, places_of(&s->model->config).width), &row));
    USLI_TRY(norm_latents(s, layer, row, NULL));
    USLI_TRY(widen(s, layer, row, saved));
    usli_attention_args attn = attention_args(s, saved);
    if (cache) USLI_TRY(usli_attention_cache(s, layer, cache, &attn));
    USLI_TRY(usli_op_attention(s->exec, &attn, USLI_FORWARD));
    s->exec->arena->high = mark;
    return USL_OK;
}

/* ---- Backward ------------------------------------------------------------------------------------------------------
 */

/* From the gradient of o to those of q, in dq, and of c and p, in drow. row: a|c|p normed. */
static usl_status keys_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, const void *dx, char *row,
                                char *dq, char *drow) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    places p = places_of(c);
    size_t mark = s->exec->arena->high;
    usli_group g;
    void *d_o, *dk, *dv, *dkv;
    USLI_TAKE(d_o, s->exec, false, bytes_of(s, c->heads * c->v_dim));
    USLI_TAKE(dk, s->exec, false, bytes_of(s, c->heads * c->head_dim));
    USLI_TAKE(dv, s->exec, false, bytes_of(s, c->heads * c->v_dim));
    USLI_TRY(usli_attention_out_backward(s, layer, saved, dx, d_o));
    usli_attention_args attn = attention_args(s, saved);
    attn.d_o = d_o;
    attn.dq = dq;
    attn.dk = dk;
    attn.dv = dv;
    USLI_TRY(usli_op_attention(s->exec, &attn, USLI_BACKWARD));
    usli_group_make(s, layer, USLI_GROUP_KEYS, &g);
    USLI_TAKE(dkv, s->exec, false, bytes_of(s, g.args.out));
    usli_latent_args join = latent_args(s);
    join.dk = dk;
    join.dv = dv;
    join.dkv = dkv;
    join.dshared = at(m, drow, p.p);
    USLI_TRY(usli_op_latent(s->exec, &join, USLI_BACKWARD));
    usli_rope_args turn = turn_args(s);
    turn.dq = at(m, dq, c->head_dim - c->rot_dim);
    turn.dk = join.dshared;
    USLI_TRY(usli_op_rope(s->exec, &turn, USLI_BACKWARD));
    set_input(&g, at(m, row, p.c), p.width);
    g.args.xa = saved->xa_keys;
    g.args.dy = dkv;
    g.args.dx = at(m, drow, p.c);
    USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    s->exec->arena->high = mark;
    return USL_OK;
}

/* Through the norms, in place. raw: a|c|p before them. */
static usl_status norms_backward(usli_pass_state *s, int64_t layer, void *raw, float *rstd, char *drow) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    if (c->q_lora) {
        usli_rope_args a = norm_args(s, USLI_Q_A_NORM, layer, c->q_lora, rstd);
        a.q_in = raw;
        a.dq = drow;
        a.dq_norm = usli_model_weight(m, USLI_Q_A_NORM, layer)->grad;
        USLI_TRY(usli_op_rope(s->exec, &a, USLI_BACKWARD));
    }
    usli_rope_args a = norm_args(s, USLI_KV_A_NORM, layer, c->kv_lora, rstd + s->batch->tokens);
    a.q_in = at(m, raw, places_of(c).c);
    a.dq = at(m, drow, places_of(c).c);
    a.dq_norm = usli_model_weight(m, USLI_KV_A_NORM, layer)->grad;
    return usli_op_rope(s->exec, &a, USLI_BACKWARD);
}

usl_status usli_latent_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn,
                                bool wants_input) {
    const usl_model *m = s->model;
    const usli_config *c = &m->config;
    int64_t width = places_of(c).width;
    size_t mark = s->exec->arena->high;
    usli_group g, query;
    void *row, *y = NULL;
    char *dq, *drow, *dy = NULL;
    float *rstd;
    const void *dx;
    USLI_TRY(usli_branch_backward(s, USLI_POST_ATTN_NORM, layer, saved->attn, saved->rstd_attn, dn, &dx));
    USLI_TAKE(dq, s->exec, false, bytes_of(s, c->heads * c->head_dim));
    USLI_TAKE(drow, s->exec, false, bytes_of(s, width));
    size_t inner = s->exec->arena->high;
    USLI_TAKE(rstd, s->exec, false, 2 * (size_t)s->batch->tokens * sizeof(float));
    USLI_TRY(usli_copy_heads(s, saved->qkv, bytes_of(s, width), &row));
    USLI_TRY(norm_latents(s, layer, row, rstd));
    USLI_TRY(keys_backward(s, layer, saved, dx, row, dq, drow));
    usli_group_make(s, layer, USLI_GROUP_QUERY, &query);
    query.args.xa = saved->xa_query;
    query.args.dy = dq;
    if (c->q_lora) {
        set_input(&query, row, width);
        query.args.dx = drow;
        USLI_TRY(usli_op_linear(s->exec, &query.args, USLI_BACKWARD));
    }
    USLI_TRY(norms_backward(s, layer, saved->qkv, rstd, drow));
    s->exec->arena->high = inner;
    usli_group_make(s, layer, USLI_GROUP_LATENT, &g);
    bool trained = usli_group_trains(&g) || (!c->q_lora && usli_group_trains(&query));
    if (trained) {
        USLI_TAKE(y, s->exec, false, bytes_of(s, c->hidden));
        USLI_TRY(usli_norm_again(s, USLI_ATTN_NORM, layer, saved->n1, y, 0));
    }
    if (wants_input) USLI_TAKE(dy, s->exec, false, bytes_of(s, c->hidden));
    g.args.x = query.args.x = y;
    g.args.xa = saved->xa_qkv;
    g.args.dy = drow;
    g.args.dx = query.args.dx = dy;
    query.args.dx_mode = USLI_ACCUMULATE;
    if (trained || wants_input) USLI_TRY(usli_op_linear(s->exec, &g.args, USLI_BACKWARD));
    if ((trained || wants_input) && !c->q_lora) USLI_TRY(usli_op_linear(s->exec, &query.args, USLI_BACKWARD));
    if (wants_input) USLI_TRY(usli_norm_backward(s, USLI_ATTN_NORM, layer, saved->n1, saved->rstd1, dy, dn));
    s->exec->arena->high = mark;
    return USL_OK;
}
