/* Attention of few queries against many keys (decode): the keys of a row are cut into chunks, a block for each; all
 * query heads of a kv head stand in one tile of 16 rows, so the cache is read once. Each warp has its own keys, copies
 * them itself two stages ahead and never waits for another warp; the block's and then the chunks' parts are merged in
 * order. Bytes: the cache once: at 4096 keys of Llama-3-8B 16.8 MB a layer, 3.5 us on H200. */
#ifndef USLI_KERNELS_ATTENTION_DECODE_CUH
#define USLI_KERNELS_ATTENTION_DECODE_CUH

#include "kernels/attention_forward.cuh"

/* DECODE_BLOCKS: how many blocks a launch aims at, by the length of the chunks. */
static constexpr int DECODE_WARPS = 2, DECODE_STAGES = 2, DECODE_KEYS = 16, DECODE_ROWS = 16, DECODE_BLOCKS = 1024;

/* A chunk's part of each query head: o before division (DV floats), top (as exp2 takes it) and sum. Rows are numbered
 * query * group + head of the group. */
typedef struct decode_parts {
    float *o, *top, *sum;
    int chunks, rows, width; /* rows: of the longest row's queries; width: DV */
} decode_parts;

static __device__ __forceinline__ int64_t part_at(const decode_parts &p, const attention &a, int row, int kv, int chunk,
                                                  int m) {
    return (((int64_t)row * a.kv_heads + kv) * p.chunks + chunk) * p.rows + m;
}

template <int D, int DV> struct decode_shape {
    static constexpr int STAGE = DECODE_KEYS * (D + DV); /* values of a warp's stage */
    static constexpr int KEYS_BYTES = DECODE_WARPS * DECODE_STAGES * STAGE * 2;
    static constexpr int MERGE_BYTES = DECODE_WARPS * DECODE_ROWS * (DV + 2) * (int)sizeof(float);
    static constexpr int SHARED = DECODE_ROWS * D * 2 + (KEYS_BYTES > MERGE_BYTES ? KEYS_BYTES : MERGE_BYTES);
};

/* A warp copies 16 rows into its tile. */
template <int D, typename T>
static __device__ __forceinline__ void load_rows16(T *tile, const T *from, int64_t stride, int rows, int dim) {
    int lane = (int)threadIdx.x % USLI_WARP;
#pragma unroll
    for (int i = 0; i < 16 * D / 8 / USLI_WARP; i++) {
        int at = i * USLI_WARP + lane, row = at / (D / 8), unit = at % (D / 8);
        bool valid = row < rows && unit * 8 < dim;
        cp_async16(unit_at<D>(tile, row, unit), valid ? from + row * stride + unit * 8 : from, valid);
    }
}

/* Query heads from `base` on into the tile of Q. */
template <int D, typename T>
static __device__ __forceinline__ void load_heads(T *tile, const attention &a, const attention_row &w, int kv,
                                                  int base) {
    const T *from = (const T *)a.q + w.q0 * a.q_stride + kv * a.group * a.qk_dim;
    for (int at = (int)threadIdx.x; at < DECODE_ROWS * D / 8; at += DECODE_WARPS * USLI_WARP) {
        int row = at / (D / 8), unit = at % (D / 8), i = (base + row) / a.group, g = (base + row) % a.group;
        bool valid = i < w.nq && unit * 8 < a.qk_dim;
        cp_async16(unit_at<D>(tile, row, unit), valid ? from + i * a.q_stride + g * a.qk_dim + unit * 8 : from, valid);
    }
}

/* Grid (kv_heads * tiles of 16 query heads, chunks, rows). */
template <typename T, int D, int DV>
static __global__ void __launch_bounds__(DECODE_WARPS * 32) attention_decode(attention a, decode_parts parts) {
    typedef decode_shape<D, DV> shape;
    USLI_SHARED(T, q);
    await_earlier();
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP, r = (int)blockIdx.z;
    int kv = (int)blockIdx.x % a.kv_heads, base = (int)blockIdx.x / a.kv_heads * DECODE_ROWS;
    attention_row w = row_at(a, r);
    if (base >= w.nq * a.group) return;
    T *room = q + DECODE_ROWS * D, *mine = room + warp * DECODE_STAGES * shape::STAGE;
    int from, to, step = DECODE_WARPS * DECODE_KEYS;
    keys_seen(a, w, 0, w.nq, &from, &to);
    int chunk = (to - from + parts.chunks - 1) / parts.chunks;
    chunk = (chunk + step - 1) / step * step;
    from += (int)blockIdx.y * chunk;
    if (from + chunk < to) to = from + chunk;

    const T *kg = (const T *)a.k + w.k0 * a.k_stride + kv * a.qk_dim;
    const T *vg = (const T *)a.v + w.k0 * a.v_stride + kv * a.v_dim;
    load_heads<D>(q, a, w, kv, base);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    float o[1][DV / 8][4];
    softmax_state<1> state;
    clear(o);
    for (int half = 0; half < 2; half++) state.top[0][half] = -INFINITY, state.sum[0][half] = 0.0f;
    int seen_from[2], seen_to[2]; /* keys of this thread's two rows */
    for (int half = 0; half < 2; half++)
        keys_of(a, w, (base + lane / 4 + half * 8) / a.group, &seen_from[half], &seen_to[half]);

    int begin = from + warp * DECODE_KEYS, next = begin;
    for (int i = 0;; i++) {
        if (next < to) {
            T *k = mine + i % DECODE_STAGES * shape::STAGE;
            load_rows16<D>(k, kg + next * a.k_stride, a.k_stride, w.nk - next, a.qk_dim);
            load_rows16<DV>(k + DECODE_KEYS * D, vg + next * a.v_stride, a.v_stride, w.nk - next, a.v_dim);
        }
        cp_async_commit();
        next += step;
        if (i < DECODE_STAGES - 1) continue;
        int key = begin + (i - DECODE_STAGES + 1) * step;
        if (key >= to) break;
        cp_async_wait<DECODE_STAGES - 1>();
        __syncwarp();
        const T *k = mine + (i + 1) % DECODE_STAGES * shape::STAGE;
        float s[1][2][4];
        clear(s);
        add_rows_by_rows<D>(s, q, k);
        cap_scores(a, s);
        for (int half = 0; half < 2; half++) {
            int end = seen_to[half] < to ? seen_to[half] : to, begin_at = key + lane % 4 * 2;
            hide_outside(seen_from[half] - begin_at, end - begin_at, half, s[0]);
        }
        softmax_step(a.factor, state, s, o);
        add_scores_by_columns<DV>(o, s, k + DECODE_KEYS * D);
        __syncwarp();
    }
    cp_async_wait<0>();
    __syncthreads();

    /* The warps' parts, over the keys' place: o (warps, 16, DV), then top and sum. */
    float *merge = reinterpret_cast<float *>(room), *tops = merge + DECODE_WARPS * DECODE_ROWS * DV;
    float *sums = tops + DECODE_WARPS * DECODE_ROWS;
    for (int half = 0; half < 2; half++) {
        int row = warp * DECODE_ROWS + lane / 4 + half * 8;
        float sum = state.sum[0][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) tops[row] = state.top[0][half] * a.factor, sums[row] = sum;
#pragma unroll
        for (int n = 0; n < DV / 8; n++)
            for (int e = 0; e < 2; e++) merge[row * DV + n * 8 + lane % 4 * 2 + e] = o[0][n][half * 2 + e];
    }
    __syncthreads();
    for (int u = (int)threadIdx.x; u < DECODE_ROWS * DV; u += DECODE_WARPS * USLI_WARP) {
        int m = u / DV, c = u % DV;
        if (base + m >= w.nq * a.group) break;
        float top = -INFINITY, sum = 0.0f, value = 0.0f;
        for (int i = 0; i < DECODE_WARPS; i++) top = fmaxf(top, tops[i * DECODE_ROWS + m]);
        float shift = top == -INFINITY ? 0.0f : top;
        for (int i = 0; i < DECODE_WARPS; i++) {
            float part = exp2_fast(tops[i * DECODE_ROWS + m] - shift);
            sum += part * sums[i * DECODE_ROWS + m];
            value += part * merge[(i * DECODE_ROWS + m) * DV + c];
        }
        int64_t at = part_at(parts, a, r, kv, (int)blockIdx.y, base + m);
        parts.o[at * DV + c] = value;
        if (c == 0) parts.top[at] = top, parts.sum[at] = sum;
    }
}

/* Grid (heads, tokens_q), 128 threads: the chunks' parts of one query and head, in order. */
template <typename T> static __global__ void __launch_bounds__(128) attention_merge(attention a, decode_parts parts) {
    await_earlier();
    int r, query, count, head = (int)blockIdx.x, kv = head / a.group;
    if (!find_tile<false>(a, 1, (int)blockIdx.y, &r, &query, &count)) return;
    int64_t token = a.cu_q[r] + query, at = part_at(parts, a, r, kv, 0, query * a.group + head % a.group);
    float top = -INFINITY, sum = 0.0f;
    for (int i = 0; i < parts.chunks; i++) top = fmaxf(top, parts.top[at + (int64_t)i * parts.rows]);
    float shift = top == -INFINITY ? 0.0f : top;
    for (int i = 0; i < parts.chunks; i++) {
        int64_t p = at + (int64_t)i * parts.rows;
        sum += exp2_fast(parts.top[p] - shift) * parts.sum[p];
    }
    float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int c = (int)threadIdx.x; c < a.v_dim; c += 128) {
        float value = 0.0f;
        for (int i = 0; i < parts.chunks; i++) {
            int64_t p = at + (int64_t)i * parts.rows;
            value += exp2_fast(parts.top[p] - shift) * parts.o[p * parts.width + c];
        }
        ((T *)a.o)[token * a.o_stride + head * a.v_dim + c] = from_f32<T>(value * share);
    }
    if (a.lse && threadIdx.x == 0)
        a.lse[head * a.tokens_q + token] = sum == 0.0f ? -INFINITY : top * 0.693147180559945f + logf(sum);
}

#endif
