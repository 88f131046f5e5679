/* Attention backward on tensor cores, three launches: attention_sums (dot(do, o) and lse of each query), attention_dkv
 * (a block owns a tile of keys, goes over the queries of its group's heads) and attention_dq (a block owns a tile of
 * queries, goes over the keys). Scores are computed in both, 7 products instead of 5, but each gradient is summed in
 * registers in one order: no atomics, no partial dq in memory. At 1x8192, 32/8 heads of 128, that is 1.92 TFLOP; the
 * other way, partial dq in float32 summed in order, is 1.37 TFLOP and 8.7 GB, or turns to wait for.
 *
 * Here a warp's probabilities stay in its registers: they leave the first products as accumulators and enter the next
 * ones as fragments A, so warps meet only where tiles change. */
#ifndef USLI_KERNELS_ATTENTION_BACKWARD_CUH
#define USLI_KERNELS_ATTENTION_BACKWARD_CUH

#include "kernels/attention.cuh"

/* Grid (heads, tiles of SUMS_TILE queries), 256 threads; 16 lanes a query. Bytes: o and do once; 67 MB at 4096 tokens
 * of Llama-3-8B, 22 us on H100. */
template <typename T> static __global__ void __launch_bounds__(256) attention_sums_of(attention a) {
    int r, tile, tiles, head = (int)blockIdx.x;
    if (!find_tile<false>(a, SUMS_TILE, (int)blockIdx.y, &r, &tile, &tiles)) return;
    attention_row w = row_at(a, r);
    attention_sums *to = a.sums + head * a.slots + sums_begin(w.q0, r) + tile * SUMS_TILE;
    int lane = (int)threadIdx.x % 16;
    for (int i = (int)threadIdx.x / 16; i < SUMS_TILE; i += 16) {
        int query = tile * SUMS_TILE + i;
        float sum = 0.0f, lse = -INFINITY;
        if (query < w.nq) {
            int64_t at = (w.q0 + query) * a.o_stride + head * a.v_dim;
            lse = a.lse[head * a.tokens_q + w.q0 + query];
            for (int c = lane * 8; c < a.v_dim; c += 128) {
                usli_pack<T, 8> o = load_pack<T, 8>((const T *)a.o + at + c),
                                g = load_pack<T, 8>((const T *)a.d_o + at + c);
                for (int e = 0; e < 8; e++) sum += to_f32(o.v[e]) * to_f32(g.v[e]);
            }
        }
        for (int e = 8; e > 0; e /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, e);
        if (lane == 0) {
            to[i].lse2 = lse == -INFINITY ? INFINITY : lse * 1.44269504088896f;
            to[i].delta = sum;
        }
    }
}

/* A score's gradient is ds = p (dp - delta), p = exp2(s - lse2), and where there is a soft-cap times its slope,
 * 1 - (s / softcap)^2, at the capped score s. This is the slope. */
template <int MT, int N>
static __device__ __forceinline__ void cap_gradients(const attention &a, const float (&s)[MT][N][4],
                                                     float (&ds)[MT][N][4]) {
    if (!(a.softcap > 0.0f)) return;
    float inverse = 1.0f / a.softcap;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float part = s[m][n][e] * inverse;
                ds[m][n][e] *= 1.0f - part * part;
            }
}

/* ---- dk, dv ------------------------------------------------------------------------------------------------------ */

/* SPLIT blocks share a tile of keys, each with its part of the columns of dk and dv, where all of them would not fit in
 * registers: they compute the same scores. */
template <int D, int DV, int WARPS, int QUERIES, int STAGES, int SPLIT> struct dkv_shape {
    static constexpr int KEYS = 16 * WARPS, THREADS = 32 * WARPS;
    static constexpr int STAGE = QUERIES * (D + DV) * 2 + QUERIES * (int)sizeof(attention_sums);
    static constexpr int SHARED = KEYS * (D + DV) * 2 + STAGES * STAGE;
};

template <typename T, int D, int DV, int QUERIES, int THREADS> struct query_stage {
    T *q, *d_o;
    attention_sums *sums;
    __device__ __forceinline__ query_stage(unsigned char *at) {
        q = reinterpret_cast<T *>(at);
        d_o = q + QUERIES * D;
        sums = reinterpret_cast<attention_sums *>(d_o + QUERIES * DV);
    }
    /* Starts copying queries first.. of a row; first is a multiple of QUERIES. */
    __device__ __forceinline__ void load(const attention &a, const attention_row &w, int64_t slot, int head,
                                         int first) {
        int64_t token = w.q0 + first;
        load_tile<D, QUERIES, THREADS>(q, (const T *)a.q + token * a.q_stride + head * a.qk_dim, a.q_stride,
                                       w.nq - first, a.qk_dim);
        load_tile<DV, QUERIES, THREADS>(d_o, (const T *)a.d_o + token * a.o_stride + head * a.v_dim, a.o_stride,
                                        w.nq - first, a.v_dim);
        if ((int)threadIdx.x < QUERIES / 2)
            cp_async16(sums + threadIdx.x * 2, a.sums + head * a.slots + slot + first + threadIdx.x * 2, true);
        cp_async_commit();
    }
};

/* -inf where a key is not seen by a query; keys are rows. The warp's first key and the tile's first query are given. */
template <int N>
static __device__ __forceinline__ void hide_columns(const attention &a, const attention_row &w, int key, int query,
                                                    float (&s)[1][N][4]) {
    if (!(a.causal && key + 15 > query + w.shift) && !(a.window && key < query + N * 8 + w.shift - a.window)) return;
    int lane = (int)threadIdx.x % USLI_WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int from, to;
        queries_of(a, w, key + half * 8 + lane / 4, 1, &from, &to);
        hide_outside(from - query - lane % 4 * 2, to - query - lane % 4 * 2, half, s[0]);
    }
}

/* Scores transposed, keys by queries, of a warp's 16 keys (the first is `key`) and a tile of queries become p, dp ds.
 */
template <int N>
static __device__ __forceinline__ void column_gradients(const attention &a, const attention_row &w, int key, int query,
                                                        const attention_sums *sums, float (&s)[1][N][4],
                                                        float (&dp)[1][N][4]) {
    const attention_sums *own = sums + (int)threadIdx.x % 4 * 2;
    cap_scores(a, s);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) dp[0][n][e] -= own[n * 8 + e % 2].delta;
    cap_gradients(a, s, dp);
    hide_columns(a, w, key, query, s);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[0][n][e] = exp2_fast(s[0][n][e] * a.factor - own[n * 8 + e % 2].lse2);
            dp[0][n][e] *= s[0][n][e];
        }
}

/* Grid (kv_heads * SPLIT, tiles of keys). The first keys of a row are seen by most queries and start first. */
template <typename T, int D, int DV, int WARPS, int QUERIES, int STAGES, int SPLIT>
static __global__ void __launch_bounds__(32 * WARPS, 256 / (32 * WARPS)) attention_dkv(attention a) {
    typedef dkv_shape<D, DV, WARPS, QUERIES, STAGES, SPLIT> shape;
    typedef query_stage<T, D, DV, QUERIES, shape::THREADS> stage;
    constexpr int KEYS = shape::KEYS, THREADS = shape::THREADS, NK = D / 8 / SPLIT, NV = DV / 8 / SPLIT;
    USLI_SHARED(unsigned char, bytes);
    unsigned char *stages = bytes + KEYS * (D + DV) * 2;
    T *k = reinterpret_cast<T *>(bytes), *v = k + KEYS * D;
    int r, tile, tiles, kv = (int)blockIdx.x / SPLIT, part = (int)blockIdx.x % SPLIT;
    if (!find_tile<true>(a, KEYS, (int)blockIdx.y, &r, &tile, &tiles)) return;
    attention_row w = row_at(a, r);
    int first = tile * KEYS, own = (int)threadIdx.x / USLI_WARP * 16, from, to;
    int64_t slot = sums_begin(w.q0, r), token = w.k0 + first;
    load_tile<D, KEYS, THREADS>(k, (const T *)a.k + token * a.k_stride + kv * a.qk_dim, a.k_stride, w.nk - first,
                                a.qk_dim);
    load_tile<DV, KEYS, THREADS>(v, (const T *)a.v + token * a.v_stride + kv * a.v_dim, a.v_stride, w.nk - first,
                                 a.v_dim);
    cp_async_commit();
    queries_of(a, w, first, KEYS, &from, &to);
    from = from / QUERIES * QUERIES;
    int own_from, own_to;
    queries_of(a, w, first + own, 16, &own_from, &own_to);

    float dk[1][NK][4], dv[1][NV][4];
    clear(dk);
    clear(dv);
    /* One loop over (head of the group, tile of queries). */
    int each = from < to ? (to - from + QUERIES - 1) / QUERIES : 0, steps = each * a.group;
    int head = kv * a.group, query = from, next_head = head, next_query = from;
    for (int step = 0; step < steps + (STAGES - 1); step++) {
        /* With two stages the copy of a step starts a step ahead. */
        if (STAGES == 2 && step > 0) {
            cp_async_wait<0>();
            __syncthreads();
        }
        if (step < steps) {
            stage(stages + step % STAGES * shape::STAGE).load(a, w, slot, next_head, next_query);
            next_query += QUERIES;
            if (next_query >= to) next_query = from, next_head++;
        }
        if (STAGES == 2 && step == 0) continue;
        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads();
        }
        if (query < own_to && query + QUERIES > own_from && first + own < w.nk) {
            stage now(stages + (step + STAGES - 1) % STAGES * shape::STAGE);
            float s[1][QUERIES / 8][4], dp[1][QUERIES / 8][4];
            clear(s);
            add_rows_by_rows<D>(s, k + own * D, now.q);
            clear(dp);
            add_rows_by_rows<DV>(dp, v + own * DV, now.d_o);
            column_gradients(a, w, first + own, query, now.sums, s, dp);
            add_scores_by_columns<DV>(dv, s, now.d_o + part * NV * 8);
            add_scores_by_columns<D>(dk, dp, now.q + part * NK * 8);
        }
        if (STAGES == 1) __syncthreads();
        query += QUERIES;
        if (query >= to) query = from, head++;
    }

    /* The warp's own rows of k and v are done with: they take dk and dv on the way to whole 16 bytes. */
    cp_async_wait<0>();
    __syncthreads();
    put_rows16<D>(k, own, dk[0], a.scale, a.scale, part * NK);
    put_rows16<DV>(v, own, dv[0], 1.0f, 1.0f, part * NV);
    __syncwarp();
    store_columns16<D, NK>(k, own, part * NK, (T *)a.dk + (token + own) * a.k_stride + kv * a.qk_dim, a.k_stride,
                           w.nk - first - own, a.qk_dim);
    store_columns16<DV, NV>(v, own, part * NV, (T *)a.dv + (token + own) * a.v_stride + kv * a.v_dim, a.v_stride,
                            w.nk - first - own, a.v_dim);
}

/* ---- dq ---------------------------------------------------------------------------------------------------------- */

template <int D, int DV, int WARPS, int MT, int BN, int STAGES> struct dq_shape {
    static constexpr int QUERIES = 16 * MT * WARPS, THREADS = 32 * WARPS;
    static constexpr int SHARED = (QUERIES + STAGES * BN) * (D + DV) * 2;
};

/* Scores, queries by keys, become p, dp ds. */
template <int MT, int N>
static __device__ __forceinline__ void row_gradients(const attention &a, const attention_row &w, int query, int key,
                                                     const attention_sums (&sums)[MT][2], float (&s)[MT][N][4],
                                                     float (&dp)[MT][N][4]) {
    cap_scores(a, s);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) dp[m][n][e] -= sums[m][e / 2].delta;
    cap_gradients(a, s, dp);
    hide_scores(a, w, query, key, s);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[m][n][e] = exp2_fast(s[m][n][e] * a.factor - sums[m][e / 2].lse2);
                dp[m][n][e] *= s[m][n][e];
            }
}

/* Grid (heads, tiles of queries), tiles with many keys first. */
template <typename T, int D, int DV, int WARPS, int MT, int BN, int STAGES>
static __global__ void __launch_bounds__(32 * WARPS, 256 / (32 * WARPS)) attention_dq(attention a) {
    typedef dq_shape<D, DV, WARPS, MT, BN, STAGES> shape;
    constexpr int QUERIES = shape::QUERIES, THREADS = shape::THREADS;
    USLI_SHARED(T, q);
    T *d_o = q + QUERIES * D, *stages = d_o + QUERIES * DV;
    int r, tile, tiles, head = (int)blockIdx.x, kv = head / a.group, lane = (int)threadIdx.x % USLI_WARP;
    if (!find_tile<false>(a, QUERIES, (int)blockIdx.y, &r, &tile, &tiles)) return;
    attention_row w = row_at(a, r);
    int first = (tiles - 1 - tile) * QUERIES, own = (int)threadIdx.x / USLI_WARP * 16 * MT, query = first + own;
    int count = w.nq - first < QUERIES ? w.nq - first : QUERIES, from, to, own_from, own_to;
    keys_seen(a, w, first, count, &from, &to);
    from = from / BN * BN;
    keys_seen(a, w, query, 16 * MT, &own_from, &own_to);

    const T *kg = (const T *)a.k + w.k0 * a.k_stride + kv * a.qk_dim;
    const T *vg = (const T *)a.v + w.k0 * a.v_stride + kv * a.v_dim;
    int64_t token = w.q0 + first;
    load_tile<D, QUERIES, THREADS>(q, (const T *)a.q + token * a.q_stride + head * a.qk_dim, a.q_stride, count,
                                   a.qk_dim);
    load_tile<DV, QUERIES, THREADS>(d_o, (const T *)a.d_o + token * a.o_stride + head * a.v_dim, a.o_stride, count,
                                    a.v_dim);
    cp_async_commit();
    attention_sums sums[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = query + m * 16 + half * 8 + lane / 4;
            attention_sums none = { INFINITY, 0.0f };
            sums[m][half] = i < w.nq ? a.sums[head * a.slots + sums_begin(w.q0, r) + i] : none;
        }

    float dq[MT][D / 8][4];
    clear(dq);
    int next = from;
    for (int key = from - (STAGES - 1) * BN; key < to; key += BN) {
        if (STAGES == 2 && key >= from) {
            cp_async_wait<0>();
            __syncthreads();
        }
        if (next < to) {
            T *k = stages + next / BN % STAGES * BN * (D + DV);
            load_tile<D, BN, THREADS>(k, kg + next * a.k_stride, a.k_stride, w.nk - next, a.qk_dim);
            load_tile<DV, BN, THREADS>(k + BN * D, vg + next * a.v_stride, a.v_stride, w.nk - next, a.v_dim);
            next += BN;
        }
        cp_async_commit();
        if (STAGES == 2 && key < from) continue;
        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads();
        }
        if (key < own_to && key + BN > own_from) {
            const T *k = stages + key / BN % STAGES * BN * (D + DV);
            float s[MT][BN / 8][4], dp[MT][BN / 8][4];
            clear(s);
            add_rows_by_rows<D>(s, q + own * D, k);
            clear(dp);
            add_rows_by_rows<DV>(dp, d_o + own * DV, k + BN * D);
            row_gradients(a, w, query, key, sums, s, dp);
            add_scores_by_columns<D>(dq, dp, k);
        }
        if (STAGES == 1) __syncthreads();
    }

    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MT; m++) {
        put_rows16<D>(q, own + m * 16, dq[m], a.scale, a.scale, 0);
        __syncwarp();
        store_columns16<D, D / 8>(q, own + m * 16, 0, (T *)a.dq + (token + own + m * 16) * a.q_stride + head * a.qk_dim,
                                  a.q_stride, count - own - m * 16, a.qk_dim);
    }
}

#endif
