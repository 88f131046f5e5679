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
    int rank, rank0;
};

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

/* What comes to the product: the adapter's share, the bias and what is there. */
__device__ __forceinline__ float gemv_beside(const gemv_args &g, const gemv_segment &s, int64_t row, int t) {
    float low = 0;
    const float *xa = g.xa + t * g.ranks + s.rank0, *b = s.b + row * s.rank;
#pragma unroll 8
    for (int r = 0; r < s.rank; r++) low += xa[r] * b[r];
    low *= s.lora_scale;
    if (s.bias) low += load_any(s.bias, s.bias_dtype, row);
    if (g.add) low += load_any(g.y, g.y_dtype, t * g.ldy + s.row0 + row);
    return low;
}

} // namespace

#endif
