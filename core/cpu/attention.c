/* Attention over packed rows, in tiles: the queries of all heads that share a kv head, side by side, against a tile of
 * keys; softmax kept running, never a whole score matrix. Scores stand transposed, keys by queries: keys and values are
 * read as they lie, and what softmax does to a query's scores (largest, exp, sum) is done to whole rows of columns.
 *
 *   forward    s = k (scale q)^T    p = exp(s - top)    o += p^T v                 a task: row, kv head, some tiles of
 * queries backward   dp = v do^T    ds = p (dp - delta)    dq += ds^T k                  a task: row, kv head; dk and
 * dv are dv += p do     dk += ds (scale q)                                   summed in it, tile after tile
 *
 * So no two tasks write one output, and the bits do not depend on threads. Decode is the same code. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

/* Of a tile; columns are (query head, query). A forward task has TILES of them, so that keys are converted less often.
 */
enum { COLUMNS = 96, KEYS = 64, TILES = 4 };

typedef struct job {
    const usli_attention_args *a;
    const usli_vec *v;
    int group;     /* query heads of a kv head */
    int64_t tile;  /* queries of a tile */
    int64_t tiles; /* of a forward task */
    int64_t tasks; /* of the longest row */
    float *room;   /* a worker's tiles */
    size_t room_floats;
} job;

/* A worker's tiles. Columns are padded to `width` with zeros. */
typedef struct room {
    float *k, *v;     /* (keys, qk_dim), (keys, v_dim): KEYS of them, or in backward the whole row's */
    float *q, *s;     /* (width, larger dim), (KEYS, width) */
    float *qt, *o;    /* (qk_dim, width), (width, v_dim): forward has TILES of these and the next two */
    float *top, *sum; /* (width) */
    float *factor;    /* (width) */
    float *d_o, *dot, *dp, *dq,
        *slope;     /* backward: (width, v_dim), (v_dim, width), (KEYS, width), (width, qk_dim), (KEYS, width) */
    float *dk, *dv; /* like k, v */
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
    tile t = {
        .w = *w, .kv = kv, .first = first, .count = w->nq - first < j->tile ? w->nq - first : j->tile, .to = w->nk
    };
    t.width = padded(j, t.count * j->group);
    int64_t begin = first + w->shift, end = begin + t.count;
    if (a->causal && end < t.to) t.to = end;
    if (a->window && begin - a->window + 1 > 0) t.from = begin - a->window + 1;
    return t;
}

/* ---- Reading and writing tiles
 * --------------------------------------------------------------------------------------- */

static void load_rows(const job *j, const void *base, int64_t stride, int64_t token, int64_t count, int64_t column,
                      int64_t dim, float *dst) {
    size_t e = usli_dtype_bytes(j->a->dtype);
    for (int64_t i = 0; i < count; i++, dst += dim) {
        const char *at = (const char *)base + (size_t)((token + i) * stride + column) * e;
        usli_row_store(j->v, usli_row_load(j->v, at, j->a->dtype, dst, dim), dst, USL_F32, dim);
    }
}

static void store_rows(const job *j, const float *src, void *base, int64_t stride, int64_t token, int64_t count,
                       int64_t column, int64_t dim) {
    size_t e = usli_dtype_bytes(j->a->dtype);
    for (int64_t i = 0; i < count; i++)
        usli_row_store(j->v, src + i * dim, (char *)base + (size_t)((token + i) * stride + column) * e, j->a->dtype,
                       dim);
}

/* The tile's queries (or do) as rows, one a column of the tile, zeros for the padding. */
static void load_columns(const job *j, const tile *t, const void *base, int64_t stride, int64_t dim, float *rows) {
    for (int g = 0; g < j->group; g++)
        load_rows(j, base, stride, t->w.q0 + t->first, t->count, (t->kv * j->group + g) * dim, dim,
                  rows + g * t->count * dim);
    int64_t used = t->count * j->group;
    memset(rows + used * dim, 0, (size_t)((t->width - used) * dim) * sizeof *rows);
}

static void store_columns(const job *j, const tile *t, const float *rows, void *base, int64_t stride, int64_t dim) {
    for (int g = 0; g < j->group; g++)
        store_rows(j, rows + g * t->count * dim, base, stride, t->w.q0 + t->first, t->count,
                   (t->kv * j->group + g) * dim, dim);
}

static void transpose(const float *src, int64_t rows, int64_t cols, float *dst) {
    enum { STRIP = 16 };
    for (int64_t from = 0; from < rows; from += STRIP) {
        int64_t to = from + STRIP < rows ? from + STRIP : rows;
        for (int64_t c = 0; c < cols; c++)
            for (int64_t i = from; i < to; i++) dst[c * rows + i] = src[i * cols + c];
    }
}

static void load_keys(const job *j, const row *w, int64_t kv, int64_t key, int64_t count, const room *m) {
    const usli_attention_args *a = j->a;
    load_rows(j, a->k, a->k_stride, w->k0 + key, count, kv * a->qk_dim, a->qk_dim, m->k);
    load_rows(j, a->v, a->v_stride, w->k0 + key, count, kv * a->v_dim, a->v_dim, m->v);
}

/* -inf where a query does not see a key: for one key, the queries before it and those a window behind. */
static void hide(const job *j, const tile *t, int64_t key, int64_t count, float *s) {
    const usli_attention_args *a = j->a;
    for (int64_t k = 0; k < count; k++) {
        int64_t own = key + k - t->w.shift - t->first, before = a->causal ? own : 0,
                after = a->window ? own + a->window : t->count;
        if (before > t->count) before = t->count;
        for (int g = 0; g < j->group; g++) {
            float *at = s + k * t->width + g * t->count;
            for (int64_t i = 0; i < before; i++) at[i] = -INFINITY;
            for (int64_t i = after > 0 ? after : 0; i < t->count; i++) at[i] = -INFINITY;
        }
    }
}

/* m->s = softcap(k (scale q)^T) with what is not seen at -inf; m->slope, when there is one, gets d capped / d raw. */
static void scores(const job *j, const tile *t, int64_t key, int64_t count, const float *k, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t n = count * t->width;
    j->v->mul(count, t->width, a->qk_dim, k, a->qk_dim, 1, m->qt, t->width, m->s, t->width, 0);
    if (a->softcap > 0) {
        j->v->scale(1.0f / a->softcap, m->s, n);
        j->v->tanh(m->s, n);
        for (int64_t i = 0; m->slope && i < n; i++) m->slope[i] = 1.0f - m->s[i] * m->s[i];
        j->v->scale(a->softcap, m->s, n);
    }
    hide(j, t, key, count, m->s);
}

static void load_queries(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    load_columns(j, t, a->q, a->q_stride, a->qk_dim, m->q);
    j->v->scale(a->scale, m->q, t->width * a->qk_dim);
    transpose(m->q, t->width, a->qk_dim, m->qt);
}

/* ---- Forward
 * ------------------------------------------------------------------------------------------------------------ */

/* Brings in the scores of some keys: the running largest, sum and output of every column. */
static void absorb(const job *j, const tile *t, int64_t count, const room *m) {
    int64_t n = t->width, dv = j->a->v_dim;
    float *shift = m->q; /* free by now */
    memcpy(m->factor, m->top, (size_t)n * sizeof *m->top);
    j->v->column_max(m->s, count, n, m->top);
    /* A column that has seen nothing yet holds only -inf, and exp of that less 0 is 0. */
    for (int64_t i = 0; i < n; i++) shift[i] = m->top[i] == -INFINITY ? 0 : m->top[i];
    j->v->column_exp(m->factor, 1, n, shift, NULL);
    j->v->times(1, m->sum, m->factor, m->sum, n);
    for (int64_t i = 0; i < t->count * j->group; i++)
        if (m->factor[i] != 1) j->v->scale(m->factor[i], m->o + i * dv, dv);
    j->v->column_exp(m->s, count, n, shift, m->sum);
    j->v->mul(t->count * j->group, dv, count, m->s, 1, n, m->v, dv, m->o, dv, 1);
}

static void finish(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    for (int64_t i = 0; i < t->count * j->group; i++) {
        float sum = m->sum[i];
        int64_t h = t->kv * j->group + i / t->count, token = t->w.q0 + t->first + i % t->count;
        if (a->lse) a->lse[h * a->tokens_q + token] = sum == 0 ? -INFINITY : m->top[i] + logf(sum);
        j->v->scale(sum == 0 ? 0 : 1.0f / sum, m->o + i * a->v_dim, a->v_dim);
    }
    store_columns(j, t, m->o, a->o, a->o_stride, a->v_dim);
}

/* Lays a worker's tiles out from `at`, or only counts where that is NULL; returns how many floats they take. */
static size_t lay_out(const job *j, usli_pass pass, float *at, room *m) {
    const usli_attention_args *a = j->a;
    bool back = pass == USLI_BACKWARD;
    size_t n = (size_t)padded(j, j->tile * j->group), dq = (size_t)a->qk_dim, dv = (size_t)a->v_dim, used = 0;
    size_t keys = back ? (size_t)a->max_k : KEYS, tiles = back ? 1 : (size_t)j->tiles;
    const struct {
        float **part;
        size_t floats;
    } parts[] = { { &m->k, keys * dq },
                  { &m->v, keys * dv },
                  { &m->q, n * (dq > dv ? dq : dv) },
                  { &m->s, KEYS * n },
                  { &m->qt, tiles * dq * n },
                  { &m->o, back ? 0 : tiles * dv * n },
                  { &m->top, tiles * n },
                  { &m->sum, tiles * n },
                  { &m->factor, n },
                  { &m->d_o, back ? n * dv : 0 },
                  { &m->dot, back ? dv * n : 0 },
                  { &m->dp, back ? KEYS * n : 0 },
                  { &m->dq, back ? n * dq : 0 },
                  { &m->slope, back && a->softcap > 0 ? KEYS * n : 0 },
                  { &m->dk, back ? keys * dq : 0 },
                  { &m->dv, back ? keys * dv : 0 } };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].part = at && parts[i].floats ? at + used : NULL;
        used += (parts[i].floats + 15) & ~(size_t)15; /* each begins at 64 bytes */
    }
    return used;
}

static room room_of(const job *j, int worker, usli_pass pass) {
    room m;
    lay_out(j, pass, j->room + (size_t)worker * j->room_floats, &m);
    return m;
}

/* The part of the room that is tile i's own. */
static room of_tile(const job *j, const room *m, int64_t i) {
    room own = *m;
    int64_t n = padded(j, j->tile * j->group);
    own.qt += i * j->a->qk_dim * n;
    own.o += i * j->a->v_dim * n;
    own.top += i * n;
    own.sum += i * n;
    return own;
}

static void begin(const job *j, const tile *t, const room *m) {
    load_queries(j, t, m);
    memset(m->o, 0, (size_t)(t->width * j->a->v_dim) * sizeof *m->o);
    for (int64_t i = 0; i < t->width; i++) m->top[i] = -INFINITY, m->sum[i] = 0;
}

static void forward_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    int64_t first = task % j->tasks * j->tiles * j->tile, kv = task / j->tasks % a->kv_heads, from = INT64_MAX, to = 0,
            tiles = 0;
    row w = row_of(a, task / j->tasks / a->kv_heads);
    room m = room_of(j, worker, USLI_FORWARD), own[TILES];
    tile t[TILES];
    for (; tiles < j->tiles && first < w.nq; tiles++, first += j->tile) {
        t[tiles] = tile_of(j, &w, kv, first);
        own[tiles] = of_tile(j, &m, tiles);
        begin(j, &t[tiles], &own[tiles]);
        if (t[tiles].from < from) from = t[tiles].from;
        if (t[tiles].to > to) to = t[tiles].to;
    }
    for (int64_t key = from; key < to; key += KEYS) {
        int64_t end = to - key < KEYS ? to : key + KEYS;
        load_keys(j, &w, kv, key, end - key, &m);
        for (int64_t i = 0; i < tiles; i++) {
            int64_t count = (t[i].to < end ? t[i].to : end) - key;
            if (count <= 0 || end <= t[i].from) continue;
            scores(j, &t[i], key, count, m.k, &own[i]);
            absorb(j, &t[i], count, &own[i]);
        }
    }
    for (int64_t i = 0; i < tiles; i++) finish(j, &t[i], &own[i]);
}

/* ---- Backward
 * -------------------------------------------------------------------------------------------------------------- */

/* m->top = lse, m->factor = delta = dot(do, o), of every column. */
static void load_gradient(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t dv = a->v_dim;
    load_columns(j, t, a->o, a->o_stride, dv, m->q);
    load_columns(j, t, a->d_o, a->o_stride, dv, m->d_o);
    transpose(m->d_o, t->width, dv, m->dot);
    for (int64_t i = 0; i < t->width; i++) {
        int64_t h = t->kv * j->group + i / t->count, token = t->w.q0 + t->first + i % t->count;
        float lse = i < t->count * j->group ? a->lse[h * a->tokens_q + token] : 0;
        m->top[i] = lse == -INFINITY ? 0 : lse; /* it saw nothing: all of its scores are -inf */
        m->factor[i] = j->v->dot(m->q + i * dv, m->d_o + i * dv, dv);
    }
}

static void backward_tile(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t n = t->width, dq = a->qk_dim, dv = a->v_dim;
    load_gradient(j, t, m);
    load_queries(j, t, m);
    memset(m->dq, 0, (size_t)(n * dq) * sizeof *m->dq);
    for (int64_t key = t->from; key < t->to; key += KEYS) {
        int64_t count = t->to - key < KEYS ? t->to - key : KEYS;
        const float *k = m->k + key * dq, *v = m->v + key * dv;
        scores(j, t, key, count, k, m);
        j->v->column_exp(m->s, count, n, m->top, NULL);
        j->v->mul(count, n, dv, v, dv, 1, m->dot, n, m->dp, n, 0);
        j->v->mul(count, dv, n, m->s, n, 1, m->d_o, dv, m->dv + key * dv, dv, 1);
        j->v->column_softmax_backward(m->s, m->dp, count, n, m->factor);
        for (int64_t i = 0; m->slope && i < count * n; i++) m->dp[i] *= m->slope[i];
        j->v->mul(count, dq, n, m->dp, n, 1, m->q, dq, m->dk + key * dq, dq, 1);
        j->v->mul(n, dq, count, m->dp, 1, n, k, dq, m->dq, dq, 1);
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
    load_keys(j, &w, kv, 0, w.nk, &m);
    if (w.nk > 0) {
        memset(m.dk, 0, (size_t)(w.nk * a->qk_dim) * sizeof *m.dk);
        memset(m.dv, 0, (size_t)(w.nk * a->v_dim) * sizeof *m.dv);
    }
    for (int64_t first = 0; first < w.nq; first += j->tile) {
        tile t = tile_of(j, &w, kv, first);
        backward_tile(j, &t, &m);
    }
    store_rows(j, m.dk, a->dk, a->k_stride, w.k0, w.nk, kv * a->qk_dim, a->qk_dim);
    store_rows(j, m.dv, a->dv, a->v_stride, w.k0, w.nk, kv * a->v_dim, a->v_dim);
}

/* ---- Running
 * ---------------------------------------------------------------------------------------------------------------- */

static job job_of(const usli_attention_args *a) {
    job j = { .a = a, .v = usli_vec_best(), .group = a->heads / a->kv_heads };
    j.tile = COLUMNS / j.group > 1 ? COLUMNS / j.group : 1;
    if (j.tile > a->max_q && a->max_q > 0) j.tile = a->max_q;
    int64_t tiles = (a->max_q + j.tile - 1) / j.tile;
    j.tiles = tiles < TILES ? tiles : TILES;
    j.tasks = tiles ? (tiles + j.tiles - 1) / j.tiles : 0;
    return j;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    job j = job_of(args);
    room m;
    return lay_out(&j, pass, NULL, &m) * (size_t)usli_pool_threads(x->ctx->pool) * sizeof(float);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_attention_args *a = args;
    job j = job_of(a);
    j.room = ws;
    room m;
    j.room_floats = lay_out(&j, pass, NULL, &m);
    if (pass == USLI_FORWARD)
        usli_pool_run(x->ctx->pool, a->rows * a->kv_heads * j.tasks, forward_task, &j);
    else
        usli_pool_run(x->ctx->pool, (int64_t)a->rows * a->kv_heads, backward_task, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_attention = { run, workspace };
