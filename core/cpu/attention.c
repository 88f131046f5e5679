/* Attention over packed rows, in tiles: queries of one kv head's group together against a tile of keys, softmax kept
 * running, never a whole score matrix. Forward tasks own a tile of queries; backward runs in two sweeps that own a tile of
 * queries (dq) and a tile of keys (dk, dv), so nothing is summed across tasks and the bits do not depend on threads.
 *
 * Decode is the same code: a row of one query makes `group` rows of scores against each tile of keys. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { TQ = 32, TK = 64 }; /* queries and keys of a tile */

typedef struct job {
    const usli_attention_args *a;
    const usli_vec *v;
    int group;          /* query heads of a kv head */
    int64_t tiles_q, tiles_k; /* of the longest row */
    float *room;        /* a worker's tiles */
    size_t room_floats;
    float *delta;       /* (heads, tokens_q) dot(do, o) */
} job;

/* A tile of rows of q, k, v or do as float32, one head: (count, dim), or transposed (dim, TK). */
static void load(const job *j, const void *base, int64_t stride, int64_t token, int64_t count, int64_t column, int64_t dim,
                 float *dst) {
    size_t e = usli_dtype_bytes(j->a->dtype);
    for (int64_t i = 0; i < count; i++) {
        const char *at = (const char *)base + (size_t)((token + i) * stride + column) * e;
        usli_row_store(j->v, usli_row_load(j->v, at, j->a->dtype, dst + i * dim, dim), dst + i * dim, USL_F32, dim);
    }
}

static void transpose(const float *src, int64_t rows, int64_t cols, float *dst, int64_t ld) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < cols; c++) dst[c * ld + i] = src[i * cols + c];
    for (int64_t c = 0; c < cols; c++)
        for (int64_t i = rows; i < ld; i++) dst[c * ld + i] = 0;
}

static void store(const job *j, const float *src, void *base, int64_t stride, int64_t token, int64_t count, int64_t column,
                  int64_t dim) {
    size_t e = usli_dtype_bytes(j->a->dtype);
    for (int64_t i = 0; i < count; i++)
        usli_row_store(j->v, src + i * dim, (char *)base + (size_t)((token + i) * stride + column) * e, j->a->dtype, dim);
}

typedef struct row {
    int64_t q0, nq, k0, nk, shift; /* query i sees keys up to i + shift */
} row;

static row row_of(const usli_attention_args *a, int64_t r) {
    row w = { .q0 = a->cu_q[r], .nq = a->cu_q[r + 1] - a->cu_q[r], .k0 = a->cu_k[r] };
    w.nk = a->k_lens ? a->k_lens[r] : a->cu_k[r + 1] - a->cu_k[r];
    w.shift = w.nk - w.nq;
    return w;
}

/* Keys that any of the queries first .. last sees: [*from, *to). */
static void key_range(const usli_attention_args *a, const row *w, int64_t first, int64_t last, int64_t *from, int64_t *to) {
    *to = a->causal && last + w->shift + 1 < w->nk ? last + w->shift + 1 : w->nk;
    *from = a->window && first + w->shift - a->window + 1 > 0 ? first + w->shift - a->window + 1 : 0;
}

static bool sees(const usli_attention_args *a, const row *w, int64_t query, int64_t key) {
    int64_t end = query + w->shift;
    return !(a->causal && key > end) && !(a->window && key <= end - a->window);
}

/* s = softcap(scale q k^T) with -inf where unseen; cap_slope, when asked for, gets d capped / d raw. */
static void scores(const job *j, const row *w, const float *q, int64_t q_first, int64_t nq, const float *kt, int64_t k_first,
                   int64_t nk, float *s, float *cap_slope) {
    const usli_attention_args *a = j->a;
    j->v->mul(nq, TK, a->qk_dim, a->scale, q, a->qk_dim, 1, kt, TK, s, TK, 0);
    if (a->softcap > 0) {
        j->v->scale(1.0f / a->softcap, s, nq * TK);
        j->v->tanh(s, nq * TK);
        for (int64_t i = 0; cap_slope && i < nq * TK; i++) cap_slope[i] = 1.0f - s[i] * s[i];
        j->v->scale(a->softcap, s, nq * TK);
    }
    for (int64_t i = 0; i < nq; i++) {
        for (int64_t c = nk; c < TK; c++) s[i * TK + c] = -INFINITY;
        if (sees(a, w, q_first + i, k_first) && sees(a, w, q_first + i, k_first + nk - 1)) continue;
        for (int64_t c = 0; c < nk; c++)
            if (!sees(a, w, q_first + i, k_first + c)) s[i * TK + c] = -INFINITY;
    }
}

static float *worker_room(const job *j, int worker) {
    return j->room + (size_t)worker * j->room_floats;
}

/* ---- Forward: a task is (row, kv head, tile of queries) ---------------------------------------------------------------------- */

static void forward_head(const job *j, const row *w, int64_t kv, int64_t h, int64_t q_first, int64_t nq, float *room) {
    const usli_attention_args *a = j->a;
    int64_t dq = a->qk_dim, dv = a->v_dim;
    float *q = room, *k = q + TQ * dq, *kt = k + TK * dq, *v = kt + TK * dq, *s = v + TK * dv, *o = s + TQ * TK;
    float top[TQ], sum[TQ];
    load(j, a->q, a->q_stride, w->q0 + q_first, nq, h * dq, dq, q);
    memset(o, 0, (size_t)(nq * dv) * sizeof *o);
    for (int64_t i = 0; i < nq; i++) top[i] = -INFINITY, sum[i] = 0;
    int64_t from, to;
    key_range(a, w, q_first, q_first + nq - 1, &from, &to);
    for (int64_t kf = from / TK * TK; kf < to; kf += TK) {
        int64_t nk = to - kf < TK ? to - kf : TK;
        load(j, a->k, a->k_stride, w->k0 + kf, nk, kv * dq, dq, k);
        transpose(k, nk, dq, kt, TK);
        load(j, a->v, a->v_stride, w->k0 + kf, nk, kv * dv, dv, v);
        scores(j, w, q, q_first, nq, kt, kf, nk, s, NULL);
        for (int64_t i = 0; i < nq; i++) {
            float m = j->v->max(s + i * TK, TK), best = m > top[i] ? m : top[i];
            if (best == -INFINITY) {
                memset(s + i * TK, 0, TK * sizeof *s);
                continue;
            }
            float keep = top[i] == -INFINITY ? 0 : expf(top[i] - best);
            sum[i] = sum[i] * keep + j->v->exp_sum(s + i * TK, best, TK);
            if (keep != 1.0f) j->v->scale(keep, o + i * dv, dv);
            top[i] = best;
        }
        j->v->mul(nq, dv, nk, 1.0f, s, TK, 1, v, dv, o, dv, 1);
    }
    for (int64_t i = 0; i < nq; i++) {
        j->v->scale(sum[i] > 0 ? 1.0f / sum[i] : 0, o + i * dv, dv);
        if (a->lse) a->lse[h * a->tokens_q + w->q0 + q_first + i] = sum[i] > 0 ? top[i] + logf(sum[i]) : -INFINITY;
    }
    store(j, o, a->o, a->o_stride, w->q0 + q_first, nq, h * dv, dv);
}

static void forward_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    int64_t tile = task % j->tiles_q, h = task / j->tiles_q % a->heads, r = task / j->tiles_q / a->heads;
    row w = row_of(a, r);
    int64_t first = tile * TQ;
    if (first >= w.nq) return;
    forward_head(j, &w, h / j->group, h, first, w.nq - first < TQ ? w.nq - first : TQ, worker_room(j, worker));
}

/* ---- Backward -------------------------------------------------------------------------------------------------------------------- */

static void delta_task(void *arg, int64_t t, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    float *o = worker_room(j, worker), *d = o + a->v_dim;
    for (int64_t h = 0; h < a->heads; h++) {
        load(j, a->o, a->o_stride, t, 1, h * a->v_dim, a->v_dim, o);
        load(j, a->d_o, a->o_stride, t, 1, h * a->v_dim, a->v_dim, d);
        j->delta[h * a->tokens_q + t] = j->v->dot(o, d, a->v_dim);
    }
}

/* p and ds of one tile of queries against one of keys; p may be NULL-free scratch: both (nq, TK). */
static void tile_gradient(const job *j, const row *w, int64_t h, const float *q, const float *d_o, int64_t q_first, int64_t nq,
                          const float *kt, const float *vt, int64_t k_first, int64_t nk, float *p, float *ds, float *slope) {
    const usli_attention_args *a = j->a;
    scores(j, w, q, q_first, nq, kt, k_first, nk, p, a->softcap > 0 ? slope : NULL);
    j->v->mul(nq, TK, a->v_dim, 1.0f, d_o, a->v_dim, 1, vt, TK, ds, TK, 0);
    for (int64_t i = 0; i < nq; i++) {
        int64_t at = h * a->tokens_q + w->q0 + q_first + i;
        float *pi = p + i * TK, *di = ds + i * TK, delta = j->delta[at];
        if (a->lse[at] == -INFINITY) {
            memset(pi, 0, TK * sizeof *pi);
            memset(di, 0, TK * sizeof *di);
            continue;
        }
        j->v->exp_sum(pi, a->lse[at], TK);
        for (int64_t c = 0; c < TK; c++) di[c] = pi[c] * (di[c] - delta);
    }
    if (a->softcap > 0)
        for (int64_t i = 0; i < nq * TK; i++) ds[i] *= slope[i];
}

/* dq of a tile of queries. */
static void dq_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    int64_t tile = task % j->tiles_q, h = task / j->tiles_q % a->heads, r = task / j->tiles_q / a->heads, kv = h / j->group;
    row w = row_of(a, r);
    int64_t first = tile * TQ, nq = w.nq - first < TQ ? w.nq - first : TQ, dq = a->qk_dim, dv = a->v_dim;
    if (first >= w.nq) return;
    float *q = worker_room(j, worker), *d_o = q + TQ * dq, *k = d_o + TQ * dv, *kt = k + TK * dq, *v = kt + TK * dq;
    float *vt = v + TK * dv, *p = vt + TK * dv, *ds = p + TQ * TK, *slope = ds + TQ * TK, *out = slope + TQ * TK;
    load(j, a->q, a->q_stride, w.q0 + first, nq, h * dq, dq, q);
    load(j, a->d_o, a->o_stride, w.q0 + first, nq, h * dv, dv, d_o);
    memset(out, 0, (size_t)(nq * dq) * sizeof *out);
    int64_t from, to;
    key_range(a, &w, first, first + nq - 1, &from, &to);
    for (int64_t kf = from / TK * TK; kf < to; kf += TK) {
        int64_t nk = to - kf < TK ? to - kf : TK;
        load(j, a->k, a->k_stride, w.k0 + kf, nk, kv * dq, dq, k);
        load(j, a->v, a->v_stride, w.k0 + kf, nk, kv * dv, dv, v);
        transpose(k, nk, dq, kt, TK);
        transpose(v, nk, dv, vt, TK);
        tile_gradient(j, &w, h, q, d_o, first, nq, kt, vt, kf, nk, p, ds, slope);
        j->v->mul(nq, dq, nk, a->scale, ds, TK, 1, k, dq, out, dq, 1);
    }
    store(j, out, a->dq, a->q_stride, w.q0 + first, nq, h * dq, dq);
}

/* dk and dv of a tile of keys: all query heads of the group, all queries that see it, in order. */
static void dkv_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    int64_t tile = task % j->tiles_k, kv = task / j->tiles_k % a->kv_heads, r = task / j->tiles_k / a->kv_heads;
    row w = row_of(a, r);
    int64_t kf = tile * TK, nk = w.nk - kf < TK ? w.nk - kf : TK, dq = a->qk_dim, dv = a->v_dim;
    if (kf >= w.nk) return;
    float *q = worker_room(j, worker), *d_o = q + TQ * dq, *k = d_o + TQ * dv, *kt = k + TK * dq, *v = kt + TK * dq;
    float *vt = v + TK * dv, *p = vt + TK * dv, *ds = p + TQ * TK, *slope = ds + TQ * TK, *dk = slope + TQ * TK, *dvs = dk + TK * dq;
    load(j, a->k, a->k_stride, w.k0 + kf, nk, kv * dq, dq, k);
    load(j, a->v, a->v_stride, w.k0 + kf, nk, kv * dv, dv, v);
    transpose(k, nk, dq, kt, TK);
    transpose(v, nk, dv, vt, TK);
    memset(dk, 0, (size_t)(TK * (dq + dv)) * sizeof *dk);
    /* Queries that see any of these keys. */
    int64_t first = a->causal && kf - w.shift > 0 ? (kf - w.shift) / TQ * TQ : 0, last = w.nq;
    if (a->window && kf + nk - 1 + a->window - w.shift < last) last = kf + nk - 1 + a->window - w.shift;
    for (int64_t h = kv * j->group; h < (kv + 1) * j->group; h++)
        for (int64_t qf = first; qf < last; qf += TQ) {
            int64_t nq = w.nq - qf < TQ ? w.nq - qf : TQ;
            load(j, a->q, a->q_stride, w.q0 + qf, nq, h * dq, dq, q);
            load(j, a->d_o, a->o_stride, w.q0 + qf, nq, h * dv, dv, d_o);
            tile_gradient(j, &w, h, q, d_o, qf, nq, kt, vt, kf, nk, p, ds, slope);
            j->v->mul(nk, dq, nq, a->scale, ds, 1, TK, q, dq, dk, dq, 1);
            j->v->mul(nk, dv, nq, 1.0f, p, 1, TK, d_o, dv, dvs, dv, 1);
        }
    store(j, dk, a->dk, a->k_stride, w.k0 + kf, nk, kv * dq, dq);
    store(j, dvs, a->dv, a->v_stride, w.k0 + kf, nk, kv * dv, dv);
}

/* ---- Running ------------------------------------------------------------------------------------------------------------------------ */

static size_t room_floats(const usli_attention_args *a) {
    size_t dq = (size_t)a->qk_dim, dv = (size_t)a->v_dim;
    size_t n = TQ * (dq + dv) + 3 * TK * (dq + dv) + 3 * (size_t)TQ * TK + TK * (dq + dv);
    return (n + 15) & ~(size_t)15;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_attention_args *a = args;
    size_t n = room_floats(a) * (size_t)usli_pool_threads(x->ctx->pool);
    if (pass == USLI_BACKWARD) n += (size_t)a->heads * (size_t)a->tokens_q;
    return n * sizeof(float);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_attention_args *a = args;
    job j = { .a = a, .v = usli_vec_best(), .group = a->heads / a->kv_heads, .room = ws, .room_floats = room_floats(a) };
    j.tiles_q = (a->max_q + TQ - 1) / TQ;
    j.tiles_k = (a->max_k + TK - 1) / TK;
    if (pass == USLI_FORWARD) {
        usli_pool_run(x->ctx->pool, a->rows * a->heads * j.tiles_q, forward_task, &j);
        return USL_OK;
    }
    j.delta = j.room + j.room_floats * (size_t)usli_pool_threads(x->ctx->pool);
    usli_pool_run(x->ctx->pool, a->tokens_q, delta_task, &j);
    usli_pool_run(x->ctx->pool, a->rows * a->heads * j.tiles_q, dq_task, &j);
    usli_pool_run(x->ctx->pool, a->rows * a->kv_heads * j.tiles_k, dkv_task, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_attention = { run, workspace };
