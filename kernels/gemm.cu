/* The own matrix product: tensor cores for 16 bits, plain multiply-add for float32. Tiles of 128 x 128, steps of 32 in
 * k; whatever is stored transposed is turned on its way into shared memory, so one inner loop serves all four layouts.
 */
#include "kernels/cublaslt.cuh"
#include "kernels/mma.cuh"

namespace {

constexpr int TILE = 128, STEP = 32, THREADS = 256, LINE = STEP + 8; /* 8 values of padding: no bank conflicts */

/* Element (i, k) of an operand with `rows` x k; trans: stored (k, rows). */
template <typename T>
__device__ __forceinline__ T element(const T *p, int64_t ld, bool trans, int64_t i, int64_t k, int64_t rows,
                                     int64_t depth) {
    if (i >= rows || k >= depth) return from_f32<T>(0.0f);
    return trans ? p[k * ld + i] : p[i * ld + k];
}

/* A tile of 128 rows by 32 of an operand into shared memory as (row, k). along: stored with k along memory. */
template <typename T>
__device__ void load_tile(T *tile, const T *p, int64_t ld, bool along, bool wide, int64_t row, int64_t k, int64_t rows,
                          int64_t depth) {
    constexpr int V = 16 / sizeof(T);
    if (along && wide && row + TILE <= rows && k + STEP <= depth) {
        for (int i = (int)threadIdx.x; i < TILE * STEP / V; i += THREADS) {
            int r = i / (STEP / V), c = i % (STEP / V) * V;
            store_pack<T, V>(tile + r * LINE + c, load_pack<T, V>(p + (row + r) * ld + k + c));
        }
    } else if (!along && wide && row + TILE <= rows && k + STEP <= depth) {
        for (int i = (int)threadIdx.x; i < TILE * STEP / V; i += THREADS) {
            int c = i / (TILE / V), r = i % (TILE / V) * V;
            usli_pack<T, V> v = load_pack<T, V>(p + (k + c) * ld + row + r);
            for (int j = 0; j < V; j++) tile[(r + j) * LINE + c] = v.v[j];
        }
    } else {
        for (int i = (int)threadIdx.x; i < TILE * STEP; i += THREADS) {
            int r = along ? i / STEP : i % TILE, c = along ? i % STEP : i / TILE;
            tile[r * LINE + c] = element(p, ld, !along, row + r, k + c, rows, depth);
        }
    }
}

__device__ __forceinline__ void put(const usli_gemm_args &g, int64_t i, int64_t j, float v) {
    if (i >= g.m || j >= g.n) return;
    int64_t at = i * g.ldc + j;
    v *= g.alpha;
    if (g.beta != 0) v += g.beta * load_any(g.c, g.c_type, at);
    store_any(g.c, g.c_type, at, v);
}

/* Eight warps, 4 x 2, each 32 x 64 of the tile. */
template <typename T> __global__ void __launch_bounds__(THREADS) product16(usli_gemm_args g, bool wide_a, bool wide_b) {
    __shared__ __align__(16) T a[TILE * LINE], b[TILE * LINE];
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int row0 = warp / 2 * 32, col0 = warp % 2 * 64;
    int64_t i0 = (int64_t)blockIdx.y * TILE, j0 = (int64_t)blockIdx.x * TILE;
    float sum[2][8][4] = {};
    for (int64_t k = 0; k < g.k; k += STEP) {
        load_tile<T>(a, static_cast<const T *>(g.a), g.lda, !g.trans_a, wide_a, i0, k, g.m, g.k);
        load_tile<T>(b, static_cast<const T *>(g.b), g.ldb, g.trans_b, wide_b, j0, k, g.n, g.k);
        __syncthreads();
#pragma unroll
        for (int s = 0; s < STEP; s += 16) {
            uint32_t fa[2][4], fb[8][2];
#pragma unroll
            for (int m = 0; m < 2; m++) ldmatrix_x4(fa[m], a + (row0 + m * 16 + lane % 16) * LINE + s + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t f[4];
                ldmatrix_x4(f, b + (col0 + n * 8 + lane / 16 * 8 + lane % 8) * LINE + s + lane / 8 % 2 * 8);
                fb[n][0] = f[0], fb[n][1] = f[1], fb[n + 1][0] = f[2], fb[n + 1][1] = f[3];
            }
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < 8; n++) mma_16816<T>(sum[m][n], fa[m], fb[n]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                put(g, i0 + row0 + m * 16 + lane / 4 + e / 2 * 8, j0 + col0 + n * 8 + lane % 4 * 2 + e % 2,
                    sum[m][n][e]);
}

constexpr int SMALL = 64, DEEP = 16;

/* float32: 64 x 64 of c a block, 4 x 4 a thread. */
__global__ void __launch_bounds__(THREADS) product32(usli_gemm_args g) {
    __shared__ float a[DEEP][SMALL + 1], b[DEEP][SMALL + 1];
    int tx = (int)threadIdx.x % 16, ty = (int)threadIdx.x / 16;
    int64_t i0 = (int64_t)blockIdx.y * SMALL, j0 = (int64_t)blockIdx.x * SMALL;
    const float *pa = static_cast<const float *>(g.a), *pb = static_cast<const float *>(g.b);
    float sum[4][4] = {}, part[4][4] = {}; /* in two levels: long sums keep their last digits */
    for (int64_t k = 0; k < g.k; k += DEEP) {
        for (int e = (int)threadIdx.x; e < SMALL * DEEP; e += THREADS) {
            int r = g.trans_a ? e % SMALL : e / DEEP, c = g.trans_a ? e / SMALL : e % DEEP;
            a[c][r] = element(pa, g.lda, g.trans_a, i0 + r, k + c, g.m, g.k);
            r = g.trans_b ? e / DEEP : e % SMALL, c = g.trans_b ? e % DEEP : e / SMALL;
            b[c][r] = element(pb, g.ldb, !g.trans_b, j0 + r, k + c, g.n, g.k);
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < DEEP; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) part[i][j] += a[c][ty + 16 * i] * b[c][tx + 16 * j];
        __syncthreads();
        if (k / DEEP % 16 != 15 && k + DEEP < g.k) continue;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sum[i][j] += part[i][j];
                part[i][j] = 0;
            }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) put(g, i0 + ty + 16 * i, j0 + tx + 16 * j, sum[i][j]);
}

template <typename T> bool wide(const void *p, int64_t ld) {
    return usli_aligned16(p) && ld % (int64_t)(16 / sizeof(T)) == 0;
}

template <typename T> void launch16(usli_exec *x, const usli_gemm_args *g) {
    dim3 grid((unsigned)usli_ceil_div(g->n, TILE), (unsigned)usli_ceil_div(g->m, TILE));
    USLI_LAUNCH(grid, THREADS, 0, x, product16<T>)(*g, wide<T>(g->a, g->lda), wide<T>(g->b, g->ldb));
}

} // namespace

usl_status usli_own_gemm(usli_exec *x, const usli_gemm_args *g) {
    if (g->type == USL_BF16)
        launch16<usli_bf16>(x, g);
    else if (g->type == USL_F16)
        launch16<usli_f16>(x, g);
    else
        USLI_LAUNCH(dim3((unsigned)usli_ceil_div(g->n, SMALL), (unsigned)usli_ceil_div(g->m, SMALL)), THREADS, 0, x,
                    product32)
    (*g);
    return usli_launched(x, "matrix product");
}

usl_status usli_gemm(usli_exec *x, const usli_gemm_args *g) {
    usl_status st = USL_OK;
    if (!g->m || !g->n) return USL_OK;
    return usli_cublaslt_gemm(x, g, &st) ? st : usli_own_gemm(x, g);
}
