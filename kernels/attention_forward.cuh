/* Attention forward on tensor cores: a block holds 16 * MT * WARPS queries of one head in shared memory and goes over
 * the row's keys in tiles of BN with a running softmax. Keys of the next tile arrive during softmax and the second
 * product, values during the first: one buffer each, so that two blocks fit on a multiprocessor. */
#ifndef USLI_KERNELS_ATTENTION_FORWARD_CUH
#define USLI_KERNELS_ATTENTION_FORWARD_CUH

#include "kernels/attention.cuh"

template <int D, int DV, int WARPS, int MT, int BN> struct forward_shape {
    static constexpr int QUERIES = 16 * MT * WARPS, THREADS = 32 * WARPS, SHARED = 2 * (QUERIES * D + BN * (D + DV));
};

/* Largest so far and sum of each of a thread's 2 MT query rows; the sum is of this thread's columns only. */
template <int MT> struct softmax_state { float top[MT][2], sum[MT][2]; };

/* Scores become probabilities before division; top, sum and o are brought to the new largest score. */
template <int MT, int N, int NO>
static __device__ __forceinline__ void softmax_step(float factor, softmax_state<MT> &state, float (&s)[MT][N][4],
                                                    float (&o)[MT][NO][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = state.top[m][half];
#pragma unroll
            for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            float shift = top == -INFINITY ? 0.0f : top * factor, sum = 0.0f;
            float shrink = exp2_fast(state.top[m][half] * factor - shift);
            state.top[m][half] = top;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; e++) {
                    s[m][n][e] = exp2_fast(s[m][n][e] * factor - shift);
                    sum += s[m][n][e];
                }
            state.sum[m][half] = state.sum[m][half] * shrink + sum;
#pragma unroll
            for (int n = 0; n < NO; n++) o[m][n][half * 2] *= shrink, o[m][n][half * 2 + 1] *= shrink;
        }
}

/* Grid (heads, tiles). Tiles with many keys start first. */
template <typename T, int D, int DV, int WARPS, int MT, int BN>
static __global__ void __launch_bounds__(32 * WARPS, 256 / (32 * WARPS)) attention_forward(attention a) {
    typedef forward_shape<D, DV, WARPS, MT, BN> shape;
    constexpr int QUERIES = shape::QUERIES, THREADS = shape::THREADS;
    USLI_SHARED(T, q);
    T *k = q + QUERIES * D, *v = k + BN * D;
    int r, tile, tiles;
    if (!find_tile<false>(a, QUERIES, (int)blockIdx.y, &r, &tile, &tiles)) return;
    attention_row w = row_at(a, r);
    int head = (int)blockIdx.x, kv = head / a.group, lane = (int)threadIdx.x % USLI_WARP;
    int first = (tiles - 1 - tile) * QUERIES, own = (int)threadIdx.x / USLI_WARP * 16 * MT, query = first + own;
    int count = w.nq - first < QUERIES ? w.nq - first : QUERIES, from, to;
    keys_seen(a, w, first, count, &from, &to);
    from = from / BN * BN;
    int own_from, own_to; /* this warp's queries see no other keys */
    keys_seen(a, w, query, 16 * MT, &own_from, &own_to);

    const T *kg = (const T *)a.k + w.k0 * a.k_stride + kv * a.qk_dim;
    const T *vg = (const T *)a.v + w.k0 * a.v_stride + kv * a.v_dim;
    load_tile<D, QUERIES, THREADS>(q, (const T *)a.q + (w.q0 + first) * a.q_stride + head * a.qk_dim, a.q_stride, count,
                                   a.qk_dim);
    if (from < to) load_tile<D, BN, THREADS>(k, kg + from * a.k_stride, a.k_stride, w.nk - from, a.qk_dim);
    cp_async_commit();

    float o[MT][DV / 8][4];
    softmax_state<MT> state;
    clear(o);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) state.top[m][half] = -INFINITY, state.sum[m][half] = 0.0f;

    for (int key = from; key < to; key += BN) {
        bool seen = key < own_to && key + BN > own_from;
        float s[MT][BN / 8][4];
        cp_async_wait<0>();
        __syncthreads();
        load_tile<DV, BN, THREADS>(v, vg + key * a.v_stride, a.v_stride, w.nk - key, a.v_dim);
        cp_async_commit();
        if (seen) {
            clear(s);
            add_rows_by_rows<D>(s, q + own * D, k);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (key + BN < to) {
            load_tile<D, BN, THREADS>(k, kg + (key + BN) * a.k_stride, a.k_stride, w.nk - key - BN, a.qk_dim);
            cp_async_commit();
        }
        if (!seen) continue;
        cap_scores(a, s);
        hide_scores(a, w, query, key, s);
        softmax_step(a.factor, state, s, o);
        add_scores_by_columns<DV>(o, s, v);
    }

    cp_async_wait<0>(); /* a tile without keys has only its queries under way */
    __syncthreads();
    T *og = (T *)a.o + (w.q0 + first + own) * a.o_stride + head * a.v_dim;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        float share[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = state.sum[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            share[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
            int i = query + m * 16 + half * 8 + lane / 4;
            if (a.lse && lane % 4 == 0 && i < w.nq)
                a.lse[head * a.tokens_q + w.q0 + i] =
                    sum == 0.0f ? -INFINITY : (state.top[m][half] * a.factor) * 0.693147180559945f + logf(sum);
        }
        /* The warp's own queries are done with: their place takes its rows of o, on the way to whole 16 bytes. */
        T *stage = q + own * D;
        __syncwarp();
        put_rows16<DV>(stage, m * 16, o[m], share[0], share[1], 0);
        __syncwarp();
        store_columns16<DV, DV / 8>(stage, m * 16, 0, og + m * 16 * a.o_stride, a.o_stride, count - own - m * 16,
                                    a.v_dim);
    }
}

#endif
