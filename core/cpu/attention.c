/* Attention over packed rows, in tiles: the queries of all heads that share a kv head, side by side, against a tile of
 * keys; softmax kept running, never a whole score matrix. Scores stand transposed, keys by queries: keys and values are
 * read as they lie, and all that softmax does to a query (largest, sum, factor) is done to whole rows of columns.
 *
 *   forward    s = k (scale q)^T    p = exp(s - top)    o^T += v^T p               a task: row, kv head, tile of queries
 *   backward   dp = v do^T    ds = p (dp - delta)    dq += ds^T k                  a task: row, kv head; dk and dv are
 *              dv += p do     dk += ds (scale q)                                   summed in it, tile after tile
 *
 * So no two tasks write one output, and the bits do not depend on threads. Decode is the same code. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { COLUMNS = 96, KEYS = 64 }; /* of a tile; columns are (query head, query) */

typedef struct job {
    const usli_attention_args *a;
    const usli_vec *v;
    int group;           /* query heads of a kv head */
    int64_t tile;        /* queries of a tile */
    int64_t tiles;       /* of the longest row */
    float *room;         /* a worker's tiles */
    size_t room_floats;
} job;

/* A worker's tiles. Columns are padded to `width` with zeros. */
typedef struct room {
    float *qt, *s, *ot, *k, *v; /* (qk_dim, width), (KEYS, width), (v_dim, width), (KEYS, qk_dim), (KEYS, v_dim) */
    float *top, *sum, *factor;              /* (width) */
    float *q, *d_o, *dot, *dp, *slope, *dq; /* backward: (width, qk_dim), (width, v_dim), (v_dim, width), (KEYS, width) twice, (width, qk_dim) */
    float *dk, *dv;                         /* (max_k, qk_dim), (max_k, v_dim) */
} room;

typedef struct row {
    int64_t q0, nq, k0, nk, shift; /* query i sees keys up to i + shift */
} row;

/* A tile of queries of one kv head. */
typedef struct tile {
    row w;
    int64_t kv, first, count, width; /* column g * count + i is query first + i of head kv * group + g */
    int64_t from, to;                /* keys that any of them sees */
} tile;

static row row_of(const usli_attention_args *a, int64_t r) {
    row w = { .q0 = a->cu_q[r], .nq = a->cu_q[r + 1] - a->cu_q[r], .k0 = a->cu_k[r] };
    w.nk = a->k_lens ? a->k_lens[r] : a->cu_k[r + 1] - a->cu_k[r];
    w.shift = w.nk - w.nq;
    return w;
}

static int64_t padded(const job *j, int64_t columns) {
    return (columns + j->v->lanes - 1) / j->v->lanes * j->v->lanes;
}

static tile tile_of(const job *j, const row *w, int64_t kv, int64_t first) {
    const usli_attention_args *a = j->a;
    tile t = { .w = *w, .kv = kv, .first = first, .count = w->nq - first < j->tile ? w->nq - first : j->tile, .to = w->nk };
    t.width = padded(j, t.count * j->group);
    int64_t begin = first + w->shift, end = begin + t.count;
    if (a->causal && end < t.to) t.to = end;
    if (a->window && begin - a->window + 1 > 0) t.from = begin - a->window + 1;
    return t;
}

/* ---- Reading and writing tiles --------------------------------------------------------------------------------------- */

static void load_rows(const job *j, const void *base, int64_t stride, int64_t token, int64_t count, int64_t column, int64_t dim,
                      float *dst) {
    size_t e = usli_dtype_bytes(j->a->dtype);
    for (int64_t i = 0; i < count; i++, dst += dim) {
        const char *at = (const char *)base + (size_t)((token + i) * stride + column) * e;
        usli_row_store(j->v, usli_row_load(j->v, at, j->a->dtype, dst, dim), dst, USL_F32, dim);
    }
}

static void store_rows(const job *j, const float *src, void *base, int64_t stride, int64_t token, int64_t count, int64_t column,
                       int64_t dim) {
    size_t e = usli_dtype_bytes(j->a->dtype);
    for (int64_t i = 0; i < count; i++)
        usli_row_store(j->v, src + i * dim, (char *)base + (size_t)((token + i) * stride + column) * e, j->a->dtype, dim);
}

/* The tile's queries (or do) as rows, one a column of the tile, zeros for the padding. */
static void load_columns(const job *j, const tile *t, const void *base, int64_t stride, int64_t dim, float *rows) {
    for (int g = 0; g < j->group; g++)
        load_rows(j, base, stride, t->w.q0 + t->first, t->count, (t->kv * j->group + g) * dim, dim, rows + g * t->count * dim);
    int64_t used = t->count * j->group;
    memset(rows + used * dim, 0, (size_t)((t->width - used) * dim) * sizeof *rows);
}

static void store_columns(const job *j, const tile *t, const float *rows, void *base, int64_t stride, int64_t dim) {
    for (int g = 0; g < j->group; g++)
        store_rows(j, rows + g * t->count * dim, base, stride, t->w.q0 + t->first, t->count, (t->kv * j->group + g) * dim, dim);
}

static void transpose(const float *src, int64_t rows, int64_t cols, float *dst) {
    enum { STRIP = 16 };
    for (int64_t from = 0; from < rows; from += STRIP) {
        int64_t to = from + STRIP < rows ? from + STRIP : rows;
        for (int64_t c = 0; c < cols; c++)
            for (int64_t i = from; i < to; i++) dst[c * rows + i] = src[i * cols + c];
    }
}

static void load_keys(const job *j, const tile *t, int64_t key, int64_t count, const room *m) {
    const usli_attention_args *a = j->a;
    load_rows(j, a->k, a->k_stride, t->w.k0 + key, count, t->kv * a->qk_dim, a->qk_dim, m->k);
    load_rows(j, a->v, a->v_stride, t->w.k0 + key, count, t->kv * a->v_dim, a->v_dim, m->v);
}

/* -inf where a query does not see a key: for one key, the queries before it and those a window behind. */
static void hide(const job *j, const tile *t, int64_t key, int64_t count, float *s) {
    const usli_attention_args *a = j->a;
    for (int64_t k = 0; k < count; k++) {
        int64_t own = key + k - t->w.shift - t->first, before = a->causal ? own : 0, after = a->window ? own + a->window : t->count;
        if (before > t->count) before = t->count;
        for (int g = 0; g < j->group; g++) {
            float *at = s + k * t->width + g * t->count;
            for (int64_t i = 0; i < before; i++) at[i] = -INFINITY;
            for (int64_t i = after > 0 ? after : 0; i < t->count; i++) at[i] = -INFINITY;
        }
    }
}

/* m->s = softcap(k (scale q)^T) with what is not seen at -inf; m->slope, when there is one, gets d capped / d raw. */
static void scores(const job *j, const tile *t, int64_t key, int64_t count, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t n = count * t->width;
    j->v->mul(count, t->width, a->qk_dim, m->k, a->qk_dim, 1, m->qt, t->width, m->s, t->width, 0);
    if (a->softcap > 0) {
        j->v->scale(1.0f / a->softcap, m->s, n);
        j->v->tanh(m->s, n);
        for (int64_t i = 0; m->slope && i < n; i++) m->slope[i] = 1.0f - m->s[i] * m->s[i];
        j->v->scale(a->softcap, m->s, n);
    }
    hide(j, t, key, count, m->s);
}

static void load_queries(const job *j, const tile *t, float *rows, const room *m) {
    const usli_attention_args *a = j->a;
    load_columns(j, t, a->q, a->q_stride, a->qk_dim, rows);
    j->v->scale(a->scale, rows, t->width * a->qk_dim);
    transpose(rows, t->width, a->qk_dim, m->qt);
}

/* ---- Forward ------------------------------------------------------------------------------------------------------------ */

/* Brings in the scores of some keys: the running largest, sum and output of every column. */
static void absorb(const job *j, const tile *t, int64_t count, const room *m) {
    int64_t n = t->width, dv = j->a->v_dim;
    bool moved = false;
    memcpy(m->factor, m->top, (size_t)n * sizeof *m->top);
    j->v->column_max(m->s, count, n, m->top);
    for (int64_t i = 0; i < n; i++) {
        moved = moved || m->factor[i] != m->top[i];
        m->factor[i] = m->factor[i] == m->top[i] ? 1 : m->factor[i] == -INFINITY ? 0 : expf(m->factor[i] - m->top[i]);
    }
    if (moved) {
        j->v->column_scale(m->sum, 1, n, m->factor);
        j->v->column_scale(m->ot, dv, n, m->factor);
    }
    /* A column that has seen nothing yet holds only -inf, and exp of that less 0 is 0. */
    for (int64_t i = 0; i < n; i++) m->factor[i] = m->top[i] == -INFINITY ? 0 : m->top[i];
    j->v->column_exp(m->s, count, n, m->factor, m->sum);
    j->v->mul(dv, n, count, m->v, 1, dv, m->s, n, m->ot, n, 1);
}

static void finish(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t n = t->width;
    for (int64_t i = 0; i < t->count * j->group; i++) {
        float sum = m->sum[i];
        if (a->lse) {
            int64_t h = t->kv * j->group + i / t->count, token = t->w.q0 + t->first + i % t->count;
            a->lse[h * a->tokens_q + token] = sum > 0 ? m->top[i] + logf(sum) : sum == 0 ? -INFINITY : sum;
        }
        m->factor[i] = sum == 0 ? 0 : 1.0f / sum;
    }
    for (int64_t i = t->count * j->group; i < n; i++) m->factor[i] = 0;
    j->v->column_scale(m->ot, a->v_dim, n, m->factor);
    transpose(m->ot, a->v_dim, n, m->q);
    store_columns(j, t, m->q, a->o, a->o_stride, a->v_dim);
}

static room room_of(const job *j, int worker, usli_pass pass) {
    const usli_attention_args *a = j->a;
    int64_t n = padded(j, j->tile * j->group), dq = a->qk_dim, dv = a->v_dim, d = dq > dv ? dq : dv;
    float *at = j->room + (size_t)worker * j->room_floats;
    room m = { 0 };
#define PART(name, floats) m.name = at, at += (floats)
    PART(qt, dq * n), PART(s, KEYS * n), PART(q, d * n), PART(k, KEYS * dq), PART(v, KEYS * dv);
    PART(top, n), PART(sum, n), PART(factor, n);
    if (pass == USLI_FORWARD) {
        PART(ot, dv * n);
        return m;
    }
    PART(d_o, dv * n), PART(dot, dv * n), PART(dp, KEYS * n), PART(dq, dq * n);
    PART(dk, a->max_k * dq), PART(dv, a->max_k * dv);
    if (a->softcap > 0) PART(slope, KEYS * n);
#undef PART
    return m;
}

static void forward_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    int64_t first = task % j->tiles * j->tile, kv = task / j->tiles % a->kv_heads;
    row w = row_of(a, task / j->tiles / a->kv_heads);
    if (first >= w.nq) return;
    tile t = tile_of(j, &w, kv, first);
    room m = room_of(j, worker, USLI_FORWARD);
    load_queries(j, &t, m.q, &m);
    memset(m.ot, 0, (size_t)(t.width * a->v_dim) * sizeof *m.ot);
    for (int64_t i = 0; i < t.width; i++) m.top[i] = -INFINITY, m.sum[i] = 0;
    for (int64_t key = t.from; key < t.to; key += KEYS) {
        int64_t count = t.to - key < KEYS ? t.to - key : KEYS;
        load_keys(j, &t, key, count, &m);
        scores(j, &t, key, count, &m);
        absorb(j, &t, count, &m);
    }
    finish(j, &t, &m);
}

/* ---- Backward -------------------------------------------------------------------------------------------------------------- */

/* m->top = lse, m->factor = delta = dot(do, o), of every column. The output is read into dq's room. */
static void load_gradient(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t dv = a->v_dim;
    load_columns(j, t, a->d_o, a->o_stride, dv, m->d_o);
    transpose(m->d_o, t->width, dv, m->dot);
    for (int64_t i = 0; i < t->width; i++) m->top[i] = m->factor[i] = 0;
    for (int64_t i = 0; i < t->count * j->group; i++) {
        int64_t h = t->kv * j->group + i / t->count, token = t->w.q0 + t->first + i % t->count;
        float lse = a->lse[h * a->tokens_q + token];
        m->top[i] = lse == -INFINITY ? 0 : lse; /* it saw nothing: all of its scores are -inf */
        load_rows(j, a->o, a->o_stride, token, 1, h * dv, dv, m->v);
        m->factor[i] = j->v->dot(m->v, m->d_o + i * dv, dv);
    }
}

static void backward_tile(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t n = t->width, dq = a->qk_dim, dv = a->v_dim;
    load_gradient(j, t, m);
    load_queries(j, t, m->q, m);
    memset(m->dq, 0, (size_t)(n * dq) * sizeof *m->dq);
    for (int64_t key = t->from; key < t->to; key += KEYS) {
        int64_t count = t->to - key < KEYS ? t->to - key : KEYS;
        load_keys(j, t, key, count, m);
        scores(j, t, key, count, m);
        j->v->column_exp(m->s, count, n, m->top, NULL);
        j->v->mul(count, n, dv, m->v, dv, 1, m->dot, n, m->dp, n, 0);
        j->v->mul(count, dv, n, m->s, n, 1, m->d_o, dv, m->dv + key * dv, dv, 1);
        j->v->column_softmax_backward(m->s, m->dp, count, n, m->factor);
        for (int64_t i = 0; m->slope && i < count * n; i++) m->dp[i] *= m->slope[i];
        j->v->mul(count, dq, n, m->dp, n, 1, m->q, dq, m->dk + key * dq, dq, 1);
        j->v->mul(n, dq, count, m->dp, 1, n, m->k, dq, m->dq, dq, 1);
    }
    j->v->scale(a->scale, m->dq, n * dq);
    store_columns(j, t, m->dq, a->dq, a->q_stride, dq);
}

static void backward_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    int64_t kv = task % a->kv_heads;
    row w = row_of(a, task / a->kv_heads);
    room m = room_of(j, worker, USLI_BACKWARD);
    memset(m.dk, 0, (size_t)(w.nk * a->qk_dim) * sizeof *m.dk);
    memset(m.dv, 0, (size_t)(w.nk * a->v_dim) * sizeof *m.dv);
    for (int64_t first = 0; first < w.nq; first += j->tile) {
        tile t = tile_of(j, &w, kv, first);
        backward_tile(j, &t, &m);
    }
    store_rows(j, m.dk, a->dk, a->k_stride, w.k0, w.nk, kv * a->qk_dim, a->qk_dim);
    store_rows(j, m.dv, a->dv, a->v_stride, w.k0, w.nk, kv * a->v_dim, a->v_dim);
}

/* ---- Running ---------------------------------------------------------------------------------------------------------------- */

static job job_of(const usli_attention_args *a) {
    job j = { .a = a, .v = usli_vec_best(), .group = a->heads / a->kv_heads };
    j.tile = COLUMNS / j.group > 1 ? COLUMNS / j.group : 1;
    if (j.tile > a->max_q && a->max_q > 0) j.tile = a->max_q;
    j.tiles = (a->max_q + j.tile - 1) / j.tile;
    return j;
}

static size_t room_floats(const job *j, usli_pass pass) {
    const usli_attention_args *a = j->a;
    size_t n = (size_t)padded(j, j->tile * j->group), dq = (size_t)a->qk_dim, dv = (size_t)a->v_dim, keys = (size_t)a->max_k;
    size_t floats = n * (dq + KEYS + (dq > dv ? dq : dv) + 3) + KEYS * (dq + dv);
    if (pass == USLI_FORWARD)
        floats += dv * n;
    else
        floats += n * (2 * dv + KEYS + dq) + keys * (dq + dv) + (a->softcap > 0 ? KEYS * n : 0);
    return (floats + 15) & ~(size_t)15;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    job j = job_of(args);
    return room_floats(&j, pass) * (size_t)usli_pool_threads(x->ctx->pool) * sizeof(float);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_attention_args *a = args;
    job j = job_of(a);
    j.room = ws;
    j.room_floats = room_floats(&j, pass);
    if (pass == USLI_FORWARD)
        usli_pool_run(x->ctx->pool, a->rows * a->kv_heads * j.tiles, forward_task, &j);
    else
        usli_pool_run(x->ctx->pool, (int64_t)a->rows * a->kv_heads, backward_task, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_attention = { run, workspace };
