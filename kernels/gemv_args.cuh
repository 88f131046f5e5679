/* What gemv's kernels share: arguments, and the end of every sum. */
#ifndef USLI_KERNELS_GEMV_ARGS_CUH
#define USLI_KERNELS_GEMV_ARGS_CUH

#include "kernels/decode.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / USLI_WARP, MOST_TOKENS = 8;

/* Segments of one storage type that lie behind one another. */
struct gemv_segment {
    const void *data;
    usli_nf4 nf4;
    const float *scale; /* of rows: I8 */
    int64_t row_bytes, rows, row0;
    const void *bias;
    usl_dtype bias_dtype;
    const float *b;
    float lora_scale;
    int rank, rank0, tiles;
};

constexpr int TILE_ROWS = 16;

struct gemv_args {
    gemv_segment s[USLI_MAX_SEGMENTS];
    int count, tokens, ranks;
    usl_dtype dtype, y_dtype;
    bool wide, add; /* wide: rows of x and of the matrices are whole pieces of 16 values, aligned */
    int64_t in, ldx, ldy;
    const void *x;
    void *y;
    const float *xa; /* (tokens, ranks) */
};

/* What comes to the product of one row and token: the bias and what is there. */
__device__ __forceinline__ float gemv_rest(const gemv_args &g, const gemv_segment &s, int64_t row, int t) {
    float v = s.bias ? load_any(s.bias, s.bias_dtype, row) : 0.0f;
    return g.add ? v + load_any(g.y, g.y_dtype, t * g.ldy + s.row0 + row) : v;
}
/* And the adapter's share. */
__device__ __forceinline__ float gemv_beside(const gemv_args &g, const gemv_segment &s, int64_t row, int t) {
    float low = 0;
    const float *xa = g.xa + t * g.ranks + s.rank0, *b = s.b + row * s.rank;
#pragma unroll 8
    for (int r = 0; r < s.rank; r++) low += xa[r] * b[r];
    return low * s.lora_scale + gemv_rest(g, s, row, t);
}

constexpr int LOW_RANKS = THREADS / TILE_ROWS;

/* The adapter's share of a tile by a whole block, 16 threads a row and each a rank of 16: B is asked for when the tile
 * begins, so that its end does not wait for it. */
struct gemv_low {
    float b;
    int row, rank;
    __device__ __forceinline__ gemv_low(const gemv_segment &s, int first_row)
        : b(0.0f), row(first_row + (int)threadIdx.x / LOW_RANKS), rank((int)threadIdx.x % LOW_RANKS) {
        if (row < s.rows && rank < s.rank) b = s.b[(int64_t)row * s.rank + rank];
    }
    __device__ __forceinline__ void add(const gemv_args &g, const gemv_segment &s,
                                        float (&low)[TILE_ROWS][MOST_TOKENS]) const {
        for (int t = 0; t < g.tokens; t++) {
            const float *xa = g.xa + t * g.ranks + s.rank0;
            float v = rank < s.rank ? b * xa[rank] : 0.0f;
            if (row < s.rows)
                for (int r = rank + LOW_RANKS; r < s.rank; r += LOW_RANKS) v += s.b[(int64_t)row * s.rank + r] * xa[r];
            for (int i = LOW_RANKS / 2; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
            if (rank == 0) low[threadIdx.x / LOW_RANKS][t] = v * s.lora_scale;
        }
    }
};

} // namespace

#endif
