/* What the attention kernels share: the op's fields as a kernel takes them, the search for a block's tile, and tiles of
 * 16-bit values in shared memory with the fragments read from them.
 *
 * Tiles never cross rows. A grid has ceil(tokens / tile) + rows tiles, which is enough for any lengths, so it depends
 * on shapes alone; each block finds its row in cu_q or cu_k, and those left over return. */
#ifndef USLI_KERNELS_ATTENTION_CUH
#define USLI_KERNELS_ATTENTION_CUH

#include "kernels/device.cuh"
#include "kernels/mma.cuh"

typedef struct attention_sums {
    float lse2;  /* log2 of the sum of exp over the scores; +inf where a query saw nothing, so that exp2 gives 0 */
    float delta; /* dot(do, o) */
} attention_sums;

typedef struct attention {
    const void *q, *k, *v, *d_o;
    void *o, *dq, *dk, *dv;
    float *lse;
    attention_sums *sums; /* (heads, slots): backward's, a row's begin at sums_begin */
    const int32_t *cu_q, *cu_k, *k_lens;
    int64_t q_stride, k_stride, v_stride, o_stride, tokens_q, slots;
    int rows, heads, kv_heads, group, qk_dim, v_dim, window;
    bool causal;
    float scale, softcap;
    float factor; /* of scores, so that exp2 of them is wanted: log2(e), and scale unless softcap applied it */
} attention;

typedef struct attention_row {
    int q0, nq, k0, nk, shift; /* query i sees keys up to i + shift */
} attention_row;

static __device__ __forceinline__ attention_row row_at(const attention &a, int r) {
    attention_row w;
    w.q0 = a.cu_q[r];
    w.nq = a.cu_q[r + 1] - w.q0;
    w.k0 = a.cu_k[r];
    w.nk = a.k_lens ? a.k_lens[r] : a.cu_k[r + 1] - w.k0;
    w.shift = w.nk - w.nq;
    return w;
}

/* Which row holds tile `index` when rows are cut into tiles of `size` queries (or keys): false when there are fewer.
 * Every warp searches for itself. *count gets the row's tiles, *at the tile's number in it. */
template <bool KEYS>
static __device__ __forceinline__ bool find_tile(const attention &a, int size, int index, int *row, int *at,
                                                 int *count) {
    int lane = (int)threadIdx.x % USLI_WARP;
    for (int base = 0; base < a.rows; base += USLI_WARP) {
        int r = base + lane, n = 0;
        if (r < a.rows) {
            int len = KEYS ? (a.k_lens ? a.k_lens[r] : a.cu_k[r + 1] - a.cu_k[r]) : a.cu_q[r + 1] - a.cu_q[r];
            n = (len + size - 1) / size;
        }
        int upto = n;
        for (int i = 1; i < USLI_WARP; i *= 2) {
            int other = __shfl_up_sync(0xffffffffu, upto, i);
            if (lane >= i) upto += other;
        }
        int total = __shfl_sync(0xffffffffu, upto, USLI_WARP - 1);
        if (index < total) {
            int owner = upto <= index;
            for (int i = 16; i > 0; i /= 2) owner += __shfl_xor_sync(0xffffffffu, owner, i);
            *count = __shfl_sync(0xffffffffu, n, owner);
            *at = index - __shfl_sync(0xffffffffu, upto - n, owner);
            *row = base + owner;
            return true;
        }
        index -= total;
    }
    return false;
}

/* Keys that some query of first .. first + count - 1 sees. */
static __device__ __forceinline__ void keys_seen(const attention &a, const attention_row &w, int first, int count,
                                                 int *from, int *to) {
    int begin = first + w.shift, end = begin + count;
    *to = a.causal && end < w.nk ? end : w.nk;
    *from = a.window && begin - a.window + 1 > 0 ? begin - a.window + 1 : 0;
}
/* The same for one query. */
static __device__ __forceinline__ void keys_of(const attention &a, const attention_row &w, int query, int *from,
                                               int *to) {
    keys_seen(a, w, query, 1, from, to);
}

/* Queries that see some key of first .. first + count - 1. */
static __device__ __forceinline__ void queries_of(const attention &a, const attention_row &w, int first, int count,
                                                  int *from, int *to) {
    int begin = first - w.shift, end = begin + count - 1 + a.window;
    *from = a.causal && begin > 0 ? begin : 0;
    *to = a.window && end < w.nq ? end : w.nq;
}

/* Rows of sums begin at multiples of SUMS_TILE, so that a tile of them is copied by 16 bytes and has its own padding.
 */
enum { SUMS_TILE = 64 };
static __host__ __device__ __forceinline__ int64_t sums_begin(int64_t q0, int64_t row) {
    return (q0 + row * SUMS_TILE) / SUMS_TILE * SUMS_TILE;
}

/* ---- Tiles of 16-bit values in shared memory --------------------------------------------------------------------- */

/* Where 16-byte unit `unit` of a row lies: rows of D values, units exchanged so that the eight rows that ldmatrix reads
 * together are in different banks. */
template <int D, typename T> static __device__ __forceinline__ T *unit_at(T *tile, int row, int unit) {
    int turn = D % 64 == 0 ? row & 7 : row >> 1 & 3;
    return tile + row * D + (unit ^ turn) * 8;
}

/* Starts copying ROWS rows of dim values, stride apart, into a tile of width D; what is outside becomes zero. A thread
 * stays in one column of a part of the width, so that its addresses are one step apart. */
template <int D, int ROWS, int THREADS, typename T>
static __device__ __forceinline__ void load_tile(T *tile, const T *from, int64_t stride, int rows, int dim) {
    constexpr int UNITS = D % 64 == 0 ? 8 : 4, STEP = THREADS / UNITS, PARTS = D / 8 / UNITS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a step must not change how units are exchanged");
    int row = (int)threadIdx.x / UNITS, unit = (int)threadIdx.x % UNITS;
    const T *at = from + row * stride + unit * 8;
    T *to = unit_at<D>(tile, row, unit);
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            bool valid = row + i * STEP < rows && (part * UNITS + unit) * 8 < dim;
            cp_async16(to + i * STEP * D + part * UNITS * 8, valid ? at + part * UNITS * 8 : from, valid);
        }
        at += STEP * stride;
    }
}

/* One warp writes UNITS 16-byte units, from `first` on, of 16 rows of a tile to memory. */
template <int D, int UNITS, typename T>
static __device__ __forceinline__ void store_columns16(const T *tile, int row, int first, T *to, int64_t stride,
                                                       int rows, int dim) {
    int lane = (int)threadIdx.x % USLI_WARP;
#pragma unroll
    for (int i = 0; i < 16 * UNITS / USLI_WARP; i++) {
        int at = i * USLI_WARP + lane, r = at / UNITS, unit = first + at % UNITS;
        if (r < rows && unit * 8 < dim)
            store_pack<T, 8>(to + r * stride + unit * 8, load_pack<T, 8>(unit_at<D>(tile, row + r, unit)));
    }
}

/* Where a lane finds columns 16 * step.. (its own unit of them, 0 or 1) of a row below 16: the exchange of units makes
 * the steps of one period an exclusive or of each other. */
template <int D> static __device__ __forceinline__ int lane_at(int row, int unit, int step) {
    constexpr int PERIOD = D % 64 == 0 ? 4 : 2;
    int turn = D % 64 == 0 ? row & 7 : row >> 1 & 3;
    return ((row * D + (unit ^ turn) * 8) ^ (step % PERIOD * 16)) + step / PERIOD * PERIOD * 16;
}

/* A 16x16 fragment A: 16 rows of a tile, columns 16 * step... Here and below the rows' first is a multiple of 16. */
template <int D, typename T> static __device__ __forceinline__ void load_a(uint32_t (&f)[4], const T *rows, int step) {
    int lane = (int)threadIdx.x % USLI_WARP;
    ldmatrix_x4(f, rows + lane_at<D>(lane % 16, lane / 16, step));
}
/* Two 16x8 fragments B whose 16 columns are the tile's rows: the product with its transpose. */
template <int D, typename T>
static __device__ __forceinline__ void load_b_rows(uint32_t (&f)[2][2], const T *rows, int step) {
    int lane = (int)threadIdx.x % USLI_WARP;
    uint32_t r[4];
    ldmatrix_x4(r, rows + lane_at<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2, step));
    f[0][0] = r[0], f[0][1] = r[1], f[1][0] = r[2], f[1][1] = r[3];
}
/* The same whose columns are the tile's columns 16 * pair.., and whose k are its rows. */
template <int D, typename T>
static __device__ __forceinline__ void load_b_columns(uint32_t (&f)[2][2], const T *rows, int pair) {
    int lane = (int)threadIdx.x % USLI_WARP;
    uint32_t r[4];
    ldmatrix_x4_trans(r, rows + lane_at<D>(lane % 16, lane / 16, pair));
    f[0][0] = r[0], f[0][1] = r[1], f[1][0] = r[2], f[1][1] = r[3];
}

/* acc (16 MT rows, 8 N columns) += a's rows x b's rows transposed, over D columns of both. */
template <int D, int MT, int N, typename T>
static __device__ __forceinline__ void add_rows_by_rows(float (&acc)[MT][N][4], const T *a, const T *b) {
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t fa[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) load_a<D>(fa[m], a + m * 16 * D, step);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[2][2];
            load_b_rows<D>(fb, b + n * 8 * D, step);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_16816<T>(acc[m][n], fa[m], fb[0]);
                mma_16816<T>(acc[m][n + 1], fa[m], fb[1]);
            }
        }
    }
}

/* acc (16 MT rows, 8 N columns) += s, K * 8 columns wide and rounded to T, x the tile b's columns 16 * PAIR... */
template <int D, int MT, int N, int K, typename T>
static __device__ __forceinline__ void add_scores_by_columns(float (&acc)[MT][N][4], const float (&s)[MT][K][4],
                                                             const T *b) {
#pragma unroll
    for (int k = 0; k < K; k += 2) {
        uint32_t fa[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            fa[m][0] = pack_two<T>(s[m][k][0], s[m][k][1]);
            fa[m][1] = pack_two<T>(s[m][k][2], s[m][k][3]);
            fa[m][2] = pack_two<T>(s[m][k + 1][0], s[m][k + 1][1]);
            fa[m][3] = pack_two<T>(s[m][k + 1][2], s[m][k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[2][2];
            load_b_columns<D>(fb, b + k * 8 * D, n / 2);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_16816<T>(acc[m][n], fa[m], fb[0]);
                mma_16816<T>(acc[m][n + 1], fa[m], fb[1]);
            }
        }
    }
}

template <int MT, int N> static __device__ __forceinline__ void clear(float (&acc)[MT][N][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[m][n][e] = 0.0f;
}

/* Rounds 16 rows of acc times factor (rows g and g + 8 of each thread) into a tile's rows, columns 8 * first... */
template <int D, int N, typename T>
static __device__ __forceinline__ void put_rows16(T *tile, int row, const float (&acc)[N][4], float low, float high,
                                                  int first) {
    int lane = (int)threadIdx.x % USLI_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
        *reinterpret_cast<uint32_t *>(unit_at<D>(tile, row + g, first + n) + 2 * t) =
            pack_two<T>(acc[n][0] * low, acc[n][1] * low);
        *reinterpret_cast<uint32_t *>(unit_at<D>(tile, row + g + 8, first + n) + 2 * t) =
            pack_two<T>(acc[n][2] * high, acc[n][3] * high);
    }
}

/* The soft-cap of a warp's scores, softcap * tanh(s * scale / softcap) by one exp2 and one reciprocal each. */
template <int MT, int N> static __device__ __forceinline__ void cap_scores(const attention &a, float (&s)[MT][N][4]) {
    if (!(a.softcap > 0.0f)) return;
    float speed = 2.0f * 1.44269504089f * a.scale / a.softcap;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n][e] = a.softcap * (1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(s[m][n][e] * speed)));
}

/* -inf for columns before `from` and not before `to`, counted from the thread's first, in one half of a tile's rows. */
template <int N> static __device__ __forceinline__ void hide_outside(int from, int to, int half, float (&s)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (n * 8 + e >= to) s[n][half * 2 + e] = -INFINITY;
    if (from <= 0) return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (n * 8 + e < from) s[n][half * 2 + e] = -INFINITY;
}

/* -inf where a query does not see a key; queries are rows. The tile's first query of the warp and first key are given.
 */
template <int MT, int N>
static __device__ __forceinline__ void hide_scores(const attention &a, const attention_row &w, int query, int key,
                                                   float (&s)[MT][N][4]) {
    int lane = (int)threadIdx.x % USLI_WARP;
    if (key + N * 8 <= w.nk && !(a.causal && key + N * 8 - 1 > query + w.shift) &&
        !(a.window && key < query + 16 * MT + w.shift - a.window))
        return;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int from, to;
            keys_of(a, w, query + m * 16 + half * 8 + lane / 4, &from, &to);
            hide_outside(from - key - lane % 4 * 2, to - key - lane % 4 * 2, half, s[m]);
        }
}

#endif
