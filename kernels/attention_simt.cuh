/* Attention without tensor cores: float32 (its products are true float32), and whatever the quick kernels do not take:
 * odd sizes, unaligned rows, heads too wide. All tiles are float32 in shared memory; R, the tile's rows, is as large as
 * fits. Gradients as in attention_backward.cuh: one kernel for dk and dv, one for dq. */
#ifndef USLI_KERNELS_ATTENTION_SIMT_CUH
#define USLI_KERNELS_ATTENTION_SIMT_CUH

#include "kernels/attention.cuh"

enum { SIMT_THREADS = 128, SIMT_LARGEST = 32 };

/* A matrix in shared memory: (i, j) is at[i * row + j * column]. */
typedef struct simt_matrix {
    float *at;
    int row, column;
} simt_matrix;

static __device__ __forceinline__ simt_matrix flipped(simt_matrix m) {
    simt_matrix f = { m.at, m.column, m.row };
    return f;
}

/* Cuts the next matrix from shared memory. Rows are an odd count of floats apart: columns are free of bank conflicts.
 */
static __device__ __forceinline__ simt_matrix take_matrix(float **room, int rows, int cols) {
    simt_matrix m = { *room, cols | 1, 1 };
    *room += rows * m.row;
    return m;
}
static inline size_t simt_floats(int rows, int cols) {
    return (size_t)rows * (size_t)(cols | 1);
}

/* c (m, n) = or += a (m, k) b (k, n); m is a multiple of 4. */
static __device__ void simt_product(int m, int n, int k, simt_matrix a, simt_matrix b, simt_matrix c, bool add) {
    for (int u = (int)threadIdx.x; u < m / 4 * n; u += SIMT_THREADS) {
        int j = u % n, i = u / n * 4;
        const float *pa = a.at + i * a.row, *pb = b.at + j * b.column;
        float sum[4];
#pragma unroll
        for (int x = 0; x < 4; x++) sum[x] = add ? c.at[(i + x) * c.row + j * c.column] : 0.0f;
        for (int l = 0; l < k; l++) {
            float f = pb[l * b.row];
#pragma unroll
            for (int x = 0; x < 4; x++) sum[x] = fmaf(pa[x * a.row + l * a.column], f, sum[x]);
        }
#pragma unroll
        for (int x = 0; x < 4; x++) c.at[(i + x) * c.row + j * c.column] = sum[x];
    }
}

/* count rows of the matrix from memory, zeros in the rest of its `rows`. */
template <typename T>
static __device__ void simt_load(simt_matrix m, int rows, const T *from, int64_t stride, int count, int dim) {
    for (int u = (int)threadIdx.x; u < rows * dim; u += SIMT_THREADS) {
        int i = u / dim, j = u % dim;
        m.at[i * m.row + j] = i < count ? to_f32(from[i * stride + j]) : 0.0f;
    }
}
template <typename T>
static __device__ void simt_store(simt_matrix m, float scale, T *to, int64_t stride, int count, int rows, int dim) {
    for (int u = (int)threadIdx.x; u < (count < rows ? count : rows) * dim; u += SIMT_THREADS) {
        int i = u / dim, j = u % dim;
        to[i * stride + j] = from_f32<T>(m.at[i * m.row + j] * scale);
    }
}
static __device__ void simt_clear(simt_matrix m, int rows, int dim) {
    for (int u = (int)threadIdx.x; u < rows * dim; u += SIMT_THREADS) m.at[u / dim * m.row + u % dim] = 0.0f;
}

/* Raw product to score; *slope gets its derivative by s * scale. */
static __device__ __forceinline__ float simt_score(const attention &a, float raw, float *slope) {
    float s = raw * a.scale;
    *slope = 1.0f;
    if (a.softcap > 0.0f) {
        float t = tanhf(s / a.softcap);
        *slope = 1.0f - t * t;
        s = a.softcap * t;
    }
    return s;
}

static __device__ __forceinline__ bool simt_sees(const attention &a, const attention_row &w, int query, int key) {
    int from, to;
    keys_of(a, w, query, &from, &to);
    return query < w.nq && key >= from && key < to;
}

/* Grid (heads, tiles). A warp does the softmax of its rows, a lane a key. */
template <typename T> static __global__ void __launch_bounds__(SIMT_THREADS) simt_forward(attention a, int R) {
    USLI_SHARED(float, room);
    int r, tile, tiles, head = (int)blockIdx.x, kv = head / a.group, from, to;
    if (!find_tile<false>(a, R, (int)blockIdx.y, &r, &tile, &tiles)) return;
    attention_row w = row_at(a, r);
    int first = (tiles - 1 - tile) * R, lane = (int)threadIdx.x % USLI_WARP, warp = (int)threadIdx.x / USLI_WARP;
    simt_matrix q = take_matrix(&room, R, a.qk_dim), k = take_matrix(&room, R, a.qk_dim);
    simt_matrix v = take_matrix(&room, R, a.v_dim), o = take_matrix(&room, R, a.v_dim), s = take_matrix(&room, R, R);
    float *top = room, *sum = room + R;
    simt_load(q, R, (const T *)a.q + (w.q0 + first) * a.q_stride + head * a.qk_dim, a.q_stride, w.nq - first, a.qk_dim);
    simt_clear(o, R, a.v_dim);
    if ((int)threadIdx.x < R) top[threadIdx.x] = -INFINITY, sum[threadIdx.x] = 0.0f;
    keys_seen(a, w, first, w.nq - first < R ? w.nq - first : R, &from, &to);
    for (int key = from; key < to; key += R) {
        __syncthreads();
        simt_load(k, R, (const T *)a.k + (w.k0 + key) * a.k_stride + kv * a.qk_dim, a.k_stride, w.nk - key, a.qk_dim);
        simt_load(v, R, (const T *)a.v + (w.k0 + key) * a.v_stride + kv * a.v_dim, a.v_stride, w.nk - key, a.v_dim);
        __syncthreads();
        simt_product(R, R, a.qk_dim, q, flipped(k), s, false);
        __syncthreads();
        for (int i = warp; i < R; i += SIMT_THREADS / USLI_WARP) {
            float slope, x = -INFINITY, was = top[i];
            if (lane < R && simt_sees(a, w, first + i, key + lane)) x = simt_score(a, s.at[i * s.row + lane], &slope);
            float now = fmaxf(was, warp_max(x)), shift = now == -INFINITY ? 0.0f : now;
            float p = expf(x - shift), shrink = expf(was - shift), total = warp_sum(p);
            if (lane < R) s.at[i * s.row + lane] = p;
            for (int j = lane; j < a.v_dim; j += USLI_WARP) o.at[i * o.row + j] *= shrink;
            if (lane == 0) top[i] = now, sum[i] = sum[i] * shrink + total;
        }
        __syncthreads();
        simt_product(R, a.v_dim, R, s, v, o, true);
    }
    __syncthreads();
    for (int i = warp; i < R && first + i < w.nq; i += SIMT_THREADS / USLI_WARP) {
        int64_t token = w.q0 + first + i;
        float total = sum[i], share = total == 0.0f ? 0.0f : 1.0f / total;
        T *to_o = (T *)a.o + token * a.o_stride + head * a.v_dim;
        for (int j = lane; j < a.v_dim; j += USLI_WARP) to_o[j] = from_f32<T>(o.at[i * o.row + j] * share);
        if (a.lse && lane == 0) a.lse[head * a.tokens_q + token] = total == 0.0f ? -INFINITY : top[i] + logf(total);
    }
}

/* lse and dot(do, o) of a tile's queries, into shared memory; the rows of d_o must be there. The order of the sum is
 * that of simt_product, so that a query with one key, whose o is v, gets a ds of 0. */
template <typename T>
static __device__ void simt_sums(const attention &a, const attention_row &w, int head, int first, int R,
                                 simt_matrix d_o, float *lse, float *delta) {
    int i = (int)threadIdx.x;
    if (i >= R) return;
    int64_t token = w.q0 + first + i;
    bool there = first + i < w.nq;
    const T *o = (const T *)a.o + token * a.o_stride + head * a.v_dim;
    float sum = 0.0f;
    for (int j = 0; there && j < a.v_dim; j++) sum = fmaf(d_o.at[i * d_o.row + j], to_f32(o[j]), sum);
    delta[i] = sum;
    lse[i] = there ? a.lse[head * a.tokens_q + token] : -INFINITY;
}

/* s and dp of a tile (queries by keys) become p and ds. */
static __device__ void simt_gradients(const attention &a, const attention_row &w, int query, int key, int R,
                                      simt_matrix s, simt_matrix dp, const float *lse, const float *delta) {
    for (int u = (int)threadIdx.x; u < R * R; u += SIMT_THREADS) {
        int i = u / R, j = u % R;
        float slope, x = simt_score(a, s.at[i * s.row + j], &slope), *d = &dp.at[i * dp.row + j];
        float p = simt_sees(a, w, query + i, key + j) ? expf(x - lse[i]) : 0.0f;
        s.at[i * s.row + j] = p;
        *d = p * (*d - delta[i]) * slope;
    }
}

/* The tiles of the backward kernels. */
typedef struct simt_tiles {
    simt_matrix q, d_o, k, v, s, dp;
    float *lse, *delta;
} simt_tiles;

static __device__ __forceinline__ simt_tiles take_tiles(const attention &a, float **room, int R) {
    simt_tiles t;
    t.q = take_matrix(room, R, a.qk_dim), t.d_o = take_matrix(room, R, a.v_dim);
    t.k = take_matrix(room, R, a.qk_dim), t.v = take_matrix(room, R, a.v_dim);
    t.s = take_matrix(room, R, R), t.dp = take_matrix(room, R, R);
    t.lse = *room, t.delta = *room + R;
    *room += 2 * R;
    return t;
}

template <typename T>
static __device__ void load_queries(const attention &a, const attention_row &w, int head, int first, int R,
                                    const simt_tiles &t) {
    int64_t token = w.q0 + first;
    simt_load(t.q, R, (const T *)a.q + token * a.q_stride + head * a.qk_dim, a.q_stride, w.nq - first, a.qk_dim);
    simt_load(t.d_o, R, (const T *)a.d_o + token * a.o_stride + head * a.v_dim, a.o_stride, w.nq - first, a.v_dim);
    __syncthreads();
    simt_sums<T>(a, w, head, first, R, t.d_o, t.lse, t.delta);
}
template <typename T>
static __device__ void load_keys(const attention &a, const attention_row &w, int kv, int first, int R,
                                 const simt_tiles &t) {
    int64_t token = w.k0 + first;
    simt_load(t.k, R, (const T *)a.k + token * a.k_stride + kv * a.qk_dim, a.k_stride, w.nk - first, a.qk_dim);
    simt_load(t.v, R, (const T *)a.v + token * a.v_stride + kv * a.v_dim, a.v_stride, w.nk - first, a.v_dim);
}
/* p and ds of the loaded tiles. */
static __device__ void tile_gradients(const attention &a, const attention_row &w, int query, int key, int R,
                                      const simt_tiles &t) {
    simt_product(R, R, a.qk_dim, t.q, flipped(t.k), t.s, false);
    simt_product(R, R, a.v_dim, t.d_o, flipped(t.v), t.dp, false);
    __syncthreads();
    simt_gradients(a, w, query, key, R, t.s, t.dp, t.lse, t.delta);
    __syncthreads();
}

/* Grid (heads, tiles of queries). */
template <typename T> static __global__ void __launch_bounds__(SIMT_THREADS) simt_dq(attention a, int R) {
    USLI_SHARED(float, room);
    int r, tile, tiles, head = (int)blockIdx.x, kv = head / a.group, from, to;
    if (!find_tile<false>(a, R, (int)blockIdx.y, &r, &tile, &tiles)) return;
    attention_row w = row_at(a, r);
    int first = (tiles - 1 - tile) * R, count = w.nq - first;
    simt_tiles t = take_tiles(a, &room, R);
    simt_matrix dq = take_matrix(&room, R, a.qk_dim);
    load_queries<T>(a, w, head, first, R, t);
    simt_clear(dq, R, a.qk_dim);
    keys_seen(a, w, first, count < R ? count : R, &from, &to);
    for (int key = from; key < to; key += R) {
        __syncthreads();
        load_keys<T>(a, w, kv, key, R, t);
        __syncthreads();
        tile_gradients(a, w, first, key, R, t);
        simt_product(R, a.qk_dim, R, t.dp, t.k, dq, true);
    }
    __syncthreads();
    simt_store(dq, a.scale, (T *)a.dq + (w.q0 + first) * a.q_stride + head * a.qk_dim, a.q_stride, count, R, a.qk_dim);
}

/* Grid (kv_heads, tiles of keys). */
template <typename T> static __global__ void __launch_bounds__(SIMT_THREADS) simt_dkv(attention a, int R) {
    USLI_SHARED(float, room);
    int r, tile, tiles, kv = (int)blockIdx.x, from, to;
    if (!find_tile<true>(a, R, (int)blockIdx.y, &r, &tile, &tiles)) return;
    attention_row w = row_at(a, r);
    int first = tile * R, count = w.nk - first;
    int64_t token = w.k0 + first;
    simt_tiles t = take_tiles(a, &room, R);
    simt_matrix dk = take_matrix(&room, R, a.qk_dim), dv = take_matrix(&room, R, a.v_dim);
    load_keys<T>(a, w, kv, first, R, t);
    simt_clear(dk, R, a.qk_dim);
    simt_clear(dv, R, a.v_dim);
    queries_of(a, w, first, count < R ? count : R, &from, &to);
    for (int head = kv * a.group; head < (kv + 1) * a.group; head++)
        for (int query = from; query < to; query += R) {
            __syncthreads();
            load_queries<T>(a, w, head, query, R, t);
            __syncthreads();
            tile_gradients(a, w, query, first, R, t);
            simt_product(R, a.v_dim, R, flipped(t.s), t.d_o, dv, true);
            simt_product(R, a.qk_dim, R, flipped(t.dp), t.q, dk, true);
        }
    __syncthreads();
    simt_store(dk, a.scale, (T *)a.dk + token * a.k_stride + kv * a.qk_dim, a.k_stride, count, R, a.qk_dim);
    simt_store(dv, 1.0f, (T *)a.dv + token * a.v_stride + kv * a.v_dim, a.v_stride, count, R, a.v_dim);
}

/* ---- Host -------------------------------------------------------------------------------------------------------- */

static size_t simt_shared(const attention &a, int R, usli_pass pass) {
    size_t dims = simt_floats(R, a.qk_dim) + simt_floats(R, a.v_dim);
    size_t floats = pass == USLI_FORWARD ? 2 * dims + simt_floats(R, R) : 3 * dims + 2 * simt_floats(R, R);
    return (floats + 2 * (size_t)R) * sizeof(float);
}

template <typename T> static usl_status simt_run(usli_exec *x, const attention &a, int64_t tokens_k, usli_pass pass) {
    int R = SIMT_LARGEST;
    while (R > 4 && simt_shared(a, R, pass) > usli_cuda_of(x)->shared_most) R /= 2;
    size_t shared = simt_shared(a, R, pass);
    if (shared > usli_cuda_of(x)->shared_most)
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED,
                         "attention: heads of %d are too wide for this GPU's shared memory; use device = \"cpu\"",
                         a.qk_dim);
    dim3 queries((unsigned)a.heads, (unsigned)(usli_ceil_div(a.tokens_q, R) + a.rows));
    dim3 keys((unsigned)a.kv_heads, (unsigned)(usli_ceil_div(tokens_k, R) + a.rows));
    if (pass == USLI_FORWARD) {
        USLI_TRY(USLI_ALLOW_SHARED(x, shared, simt_forward<T>));
        USLI_LAUNCH(queries, SIMT_THREADS, shared, x, simt_forward<T>)(a, R);
    } else {
        USLI_TRY(USLI_ALLOW_SHARED(x, shared, simt_dkv<T>));
        USLI_LAUNCH(keys, SIMT_THREADS, shared, x, simt_dkv<T>)(a, R);
        USLI_TRY(USLI_ALLOW_SHARED(x, shared, simt_dq<T>));
        USLI_LAUNCH(queries, SIMT_THREADS, shared, x, simt_dq<T>)(a, R);
    }
    return usli_launched(x, "attention");
}

#endif
