/* dora: lengths of the rows of W + scale B A. A block has eight rows, so that A, which lies in L2, is read once for
 * them: a block of Llama-3-8B with rank 16 is 218 M values, each read once and multiplied 16 times: 7 GFLOP. */
#include "kernels/decode.cuh"

namespace {

constexpr int THREADS = 256, ROWS = 8, ANY_NF4 = -1, ANY_I8 = -2; /* beside the types of the traits table */

template <int TYPE>
__device__ __forceinline__ float value_at(const usli_dora_args &a, const usli_nf4 &q, int64_t row, int64_t col) {
    int64_t i = row * a.w.cols + col;
    if constexpr (TYPE == ANY_NF4)
        return nf4_value(q, i);
    else if constexpr (TYPE == ANY_I8)
        return (float)static_cast<const int8_t *>(a.w.data)[i] * a.w.scale[row];
    else
        return value_of<TYPE>(a.w.data, row * a.w.ld + col);
}

template <int TYPE>
__global__ void __launch_bounds__(THREADS)
    lengths(const __grid_constant__ usli_dora_args a, const __grid_constant__ usli_nf4 q) {
    __shared__ float part[USLI_WARP];
    int64_t row0 = (int64_t)blockIdx.x * ROWS;
    int rows = (int)min((int64_t)ROWS, a.w.rows - row0), rank = a.lora.rank;
    float sum[ROWS] = {};
    for (int64_t col = threadIdx.x; col < a.w.cols; col += THREADS) {
        float low[ROWS] = {};
        for (int k = 0; k < rank; k++) {
            float v = a.lora.a[k * a.w.cols + col];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (r < rows) low[r] += a.lora.b[(row0 + r) * rank + k] * v;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < rows) {
                float v = value_at<TYPE>(a, q, row0 + r, col) + a.lora.scale * low[r];
                sum[r] += v * v;
            }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float all = block_sum<THREADS>(sum[r], part);
        if (threadIdx.x == 0 && r < rows) a.norm[row0 + r] = sqrtf(all);
    }
}

template <int TYPE> void launch(usli_exec *x, const usli_dora_args *a) {
    usli_nf4 q = {};
    if (a->w.nf4) q = *a->w.nf4;
    USLI_LAUNCH((unsigned)usli_ceil_div(a->w.rows, ROWS), THREADS, 0, x, lengths<TYPE>)(*a, q);
}

usl_status run(usli_exec *x, void *args, usli_pass, void *) {
    usli_dora_args whole = *static_cast<const usli_dora_args *>(args), *a = &whole;
    if (!a->w.ld) a->w.ld = a->w.cols;
    USLI_TRY(usli_cuda_decode_check(x, &a->w, "dora"));
    if (a->w.nf4)
        launch<ANY_NF4>(x, a);
    else if (a->w.dtype == USL_I8)
        launch<ANY_I8>(x, a);
    else
        USLI_BY_TYPE(a->w.dtype, TYPE, (launch<TYPE>(x, a)))
    return usli_launched(x, "dora");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_dora = { run, nullptr };
