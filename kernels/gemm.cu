/* The own matrix product: tensor cores for 16 bits, plain multiply-add for float32.
 *
 * 16 bits: tiles of 128 x 128, 32 of k at a time, three tiles of each operand in shared memory: one is multiplied while
 * two are on their way. An operand lies there as it lies in memory; the loads of fragments turn what must be turned.
 * Eight warps of 32 x 64 read 12 fragments of 16 x 16 for 32 products of 16 x 8 x 16: on sm_80 and sm_86 tensor cores
 * are the limit, on sm_90 these instructions reach two thirds of what its own could. */
#include "kernels/cublaslt.cuh"
#include "kernels/mma.cuh"

namespace {

constexpr int TILE = 128, STEP = 32, THREADS = 256, STAGES = 3;
constexpr int ALONG = STEP + 8, ACROSS = TILE + 8; /* lines in shared memory: 8 values of padding, no bank conflicts */
constexpr int OPERAND = TILE * ALONG;              /* values; STEP * ACROSS is less */
constexpr int BAND = 8;                            /* rows of tiles whose blocks run together, to share what L2 holds */

/* Element (i, k) of an operand with `rows` x k; trans: stored (k, rows). */
template <typename T>
__device__ __forceinline__ T element(const T *p, int64_t ld, bool trans, int64_t i, int64_t k, int64_t rows,
                                     int64_t depth) {
    if (i >= rows || k >= depth) return from_f32<T>(0.0f);
    return trans ? p[k * ld + i] : p[i * ld + k];
}

/* One operand: rows x depth, stored with k along memory (ALONG_K) or rows. wide: by whole pieces of 16 bytes. */
template <typename T> struct operand {
    const T *p;
    int64_t ld, rows, depth;
    bool wide;
};

template <typename T, bool ALONG_K>
__device__ __forceinline__ void load_tile(T *tile, const operand<T> &o, int64_t row, int64_t k) {
    constexpr int WIDTH = ALONG_K ? STEP : TILE, LINE = ALONG_K ? ALONG : ACROSS;
    int64_t line0 = ALONG_K ? row : k, lines = ALONG_K ? o.rows : o.depth;
    int64_t col0 = ALONG_K ? k : row, cols = ALONG_K ? o.depth : o.rows;
    if (o.wide) {
#pragma unroll
        for (int j = 0; j < TILE * STEP / 8 / THREADS; j++) {
            int i = j * THREADS + (int)threadIdx.x, line = i / (WIDTH / 8), c = i % (WIDTH / 8) * 8;
            bool valid = line0 + line < lines && col0 + c < cols;
            cp_async16(tile + line * LINE + c, valid ? o.p + (line0 + line) * o.ld + col0 + c : o.p, valid);
        }
    } else {
        for (int i = (int)threadIdx.x; i < TILE * STEP; i += THREADS) {
            int line = i / WIDTH, c = i % WIDTH;
            bool valid = line0 + line < lines && col0 + c < cols;
            tile[line * LINE + c] = valid ? o.p[(line0 + line) * o.ld + col0 + c] : from_f32<T>(0.0f);
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

/* A warp's 32 x 64 of c, from row i and column j on; two neighbours at once where that is aligned. */
template <typename C>
__device__ __forceinline__ void put_all(const usli_gemm_args &g, const float (&sum)[2][8][4], int64_t i0, int64_t j0,
                                        bool pairs) {
    C *base = static_cast<C *>(g.c);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64_t i = i0 + m * 16 + half * 8, j = j0 + n * 8;
                C *c = base + i * g.ldc + j;
                float first = g.alpha * sum[m][n][2 * half], second = g.alpha * sum[m][n][2 * half + 1];
                bool one = i < g.m && j < g.n, two = i < g.m && j + 1 < g.n;
                if (g.beta != 0) {
                    if (one) first += g.beta * to_f32(c[0]);
                    if (two) second += g.beta * to_f32(c[1]);
                }
                if (two && pairs) {
                    store_two<C>(c, first, second);
                } else {
                    if (one) c[0] = from_f32<C>(first);
                    if (two) c[1] = from_f32<C>(second);
                }
            }
}

/* Rows row .. row+15 of a tile as the left operand, and as the right one (two fragments). */
template <typename T, bool ALONG_K>
__device__ __forceinline__ void left(uint32_t (&f)[4], const T *tile, int row, int k, int lane) {
    if (ALONG_K)
        ldmatrix_x4(f, tile + (row + lane % 16) * ALONG + k + lane / 16 * 8);
    else
        ldmatrix_x4_trans(f, tile + (k + lane / 16 * 8 + lane % 8) * ACROSS + row + lane / 8 % 2 * 8);
}
template <typename T, bool ALONG_K>
__device__ __forceinline__ void right(uint32_t (&f)[4], const T *tile, int row, int k, int lane) {
    if (ALONG_K)
        ldmatrix_x4(f, tile + (row + lane / 16 * 8 + lane % 8) * ALONG + k + lane / 8 % 2 * 8);
    else
        ldmatrix_x4_trans(f, tile + (k + lane / 8 % 2 * 8 + lane % 8) * ACROSS + row + lane / 16 * 8);
}

/* The tile of c that begins at (i0, j0). */
template <typename T, bool TRANS_A, bool TRANS_B>
__device__ __forceinline__ void multiply16(const usli_gemm_args &g, const operand<T> &a, const operand<T> &b,
                                           bool pairs, int64_t i0, int64_t j0) {
    USLI_SHARED(T, shared);
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int row0 = warp / 2 * 32, col0 = warp % 2 * 64;
    int64_t steps = (g.k + STEP - 1) / STEP;
    float sum[2][8][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        T *stage = shared + s * 2 * OPERAND;
        if (s < steps) load_tile<T, !TRANS_A>(stage, a, i0, s * STEP);
        if (s < steps) load_tile<T, TRANS_B>(stage + OPERAND, b, j0, s * STEP);
        cp_async_commit();
    }
    int at = 0, ahead = STAGES - 1;
    for (int64_t s = 0; s < steps; s++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (s + STAGES - 1 < steps) {
            T *stage = shared + ahead * 2 * OPERAND;
            load_tile<T, !TRANS_A>(stage, a, i0, (s + STAGES - 1) * STEP);
            load_tile<T, TRANS_B>(stage + OPERAND, b, j0, (s + STAGES - 1) * STEP);
        }
        cp_async_commit();
        const T *ta = shared + at * 2 * OPERAND, *tb = ta + OPERAND;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t fa[2][4], fb[8][2];
#pragma unroll
            for (int m = 0; m < 2; m++) left<T, !TRANS_A>(fa[m], ta, row0 + m * 16, k, lane);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t f[4];
                right<T, TRANS_B>(f, tb, col0 + n * 8, k, lane);
                fb[n][0] = f[0], fb[n][1] = f[1], fb[n + 1][0] = f[2], fb[n + 1][1] = f[3];
            }
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < 8; n++) mma_16816<T>(sum[m][n], fa[m], fb[n]);
        }
        at = at + 1 == STAGES ? 0 : at + 1;
        ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
    }
    i0 += row0 + lane / 4, j0 += col0 + lane % 4 * 2;
    if (g.c_type == USL_F32)
        put_all<float>(g, sum, i0, j0, pairs);
    else
        put_all<T>(g, sum, i0, j0, pairs);
}

template <typename T, bool TRANS_A, bool TRANS_B>
__global__ void __launch_bounds__(THREADS) product16(usli_gemm_args g, operand<T> a, operand<T> b, bool pairs) {
    int64_t across = (g.n + TILE - 1) / TILE, down = (g.m + TILE - 1) / TILE, band = blockIdx.x / (BAND * across);
    int64_t in_band = blockIdx.x - band * BAND * across, high = min((int64_t)BAND, down - band * BAND);
    multiply16<T, TRANS_A, TRANS_B>(g, a, b, pairs, (band * BAND + in_band % high) * TILE, in_band / high * TILE);
}

/* Groups of rows: tile number `tile` of `height` rows, when each group's tiles are numbered after those of the group
 * before. False: there are not so many. Every warp finds it by itself. */
__device__ __forceinline__ bool find_group(const usli_gemm_args &g, int64_t tile, int height, int *group,
                                           int64_t *row) {
    int lane = (int)threadIdx.x % USLI_WARP;
    int64_t before = 0;
    for (int first = 0; first < g.groups; first += USLI_WARP) {
        int at = first + lane, rows = at < g.groups ? g.offsets[at + 1] - g.offsets[at] : 0;
        int tiles = (rows + height - 1) / height, sum = tiles;
        for (int i = 1; i < USLI_WARP; i *= 2) {
            int other = __shfl_up_sync(0xffffffffu, sum, (unsigned)i);
            if (lane >= i) sum += other;
        }
        unsigned beyond = __ballot_sync(0xffffffffu, tile < before + sum);
        if (beyond) {
            int source = __ffs((int)beyond) - 1;
            *group = first + source;
            *row = (tile - before - __shfl_sync(0xffffffffu, sum - tiles, source)) * height;
            return true;
        }
        before += __shfl_sync(0xffffffffu, sum, USLI_WARP - 1);
    }
    return false;
}

/* The product of one group, from its first row i0 on; false: there is none for this block. */
__device__ __forceinline__ bool enter_group(usli_gemm_args &g, size_t size, int height, int64_t *i0) {
    int group = (int)blockIdx.z;
    if (!g.trans_a && !find_group(g, blockIdx.y, height, &group, i0)) return false;
    if (g.trans_a) *i0 = (int64_t)blockIdx.y * height;
    int64_t first = g.offsets[group], rows = g.offsets[group + 1] - first;
    size_t c_size = g.c_type == USL_F32 ? 4 : 2;
    g.a = static_cast<const char *>(g.a) + (size_t)(first * g.lda) * size;
    if (g.trans_a) {
        g.k = rows;
        g.b = static_cast<const char *>(g.b) + (size_t)(first * g.ldb) * size;
        g.c = static_cast<char *>(g.c) + (size_t)(group * g.stride) * c_size;
    } else {
        g.m = rows;
        g.b = static_cast<const char *>(g.b) + (size_t)(group * g.stride) * size;
        g.c = static_cast<char *>(g.c) + (size_t)(first * g.ldc) * c_size;
    }
    return true;
}

template <typename T, bool TRANS_A, bool TRANS_B>
__global__ void __launch_bounds__(THREADS) grouped16(usli_gemm_args g, bool wide_a, bool wide_b, bool pairs) {
    int64_t i0;
    if (!enter_group(g, sizeof(T), TILE, &i0)) return;
    operand<T> a = { static_cast<const T *>(g.a), g.lda, g.m, g.k, wide_a };
    operand<T> b = { static_cast<const T *>(g.b), g.ldb, g.n, g.k, wide_b };
    multiply16<T, TRANS_A, TRANS_B>(g, a, b, pairs, i0, (int64_t)blockIdx.x * TILE);
}

constexpr int SMALL = 64, DEEP = 16;

/* float32: 64 x 64 of c a block, 4 x 4 a thread. */
__device__ __forceinline__ void multiply32(const usli_gemm_args &g, int64_t i0, int64_t j0) {
    __shared__ float a[DEEP][SMALL + 1], b[DEEP][SMALL + 1];
    int tx = (int)threadIdx.x % 16, ty = (int)threadIdx.x / 16;
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

__global__ void __launch_bounds__(THREADS) product32(usli_gemm_args g) {
    multiply32(g, (int64_t)blockIdx.y * SMALL, (int64_t)blockIdx.x * SMALL);
}

__global__ void __launch_bounds__(THREADS) grouped32(usli_gemm_args g) {
    int64_t i0;
    if (enter_group(g, sizeof(float), SMALL, &i0)) multiply32(g, i0, (int64_t)blockIdx.x * SMALL);
}

template <typename T> operand<T> operand_of(const void *p, int64_t ld, int64_t rows, int64_t depth, bool along_k) {
    bool wide = usli_aligned16(p) && ld % 8 == 0 && (along_k ? depth : rows) % 8 == 0;
    return { static_cast<const T *>(p), ld, rows, depth, wide };
}

/* Blocks for the worst case: each group that has a row wastes less than a tile. */
dim3 grouped_grid(const usli_gemm_args *g, int tile) {
    int64_t down = usli_ceil_div(g->m, tile);
    if (!g->trans_a) down += g->groups < g->m ? g->groups : g->m;
    return dim3((unsigned)usli_ceil_div(g->n, tile), (unsigned)down, g->trans_a ? (unsigned)g->groups : 1);
}

template <typename T, bool TRANS_A, bool TRANS_B> usl_status launch16(usli_exec *x, const usli_gemm_args *g) {
    constexpr size_t SHARED = (size_t)STAGES * 2 * OPERAND * sizeof(T);
    operand<T> a = operand_of<T>(g->a, g->lda, g->m, g->k, !TRANS_A);
    operand<T> b = operand_of<T>(g->b, g->ldb, g->n, g->k, TRANS_B);
    size_t c = g->c_type == USL_F32 ? 4 : 2;
    bool pairs = g->ldc % 2 == 0 && reinterpret_cast<uintptr_t>(g->c) % (2 * c) == 0;
    if (g->groups) {
        bool aligned = g->trans_a || g->stride % 8 == 0;
        pairs = pairs && (!g->trans_a || g->stride % 2 == 0);
        USLI_TRY(USLI_ALLOW_SHARED(x, SHARED, grouped16<T, TRANS_A, TRANS_B>));
        USLI_LAUNCH(grouped_grid(g, TILE), THREADS, SHARED, x, grouped16<T, TRANS_A, TRANS_B>)
        (*g, a.wide, b.wide && aligned, pairs);
        return usli_launched(x, "grouped matrix product");
    }
    USLI_TRY(USLI_ALLOW_SHARED(x, SHARED, product16<T, TRANS_A, TRANS_B>));
    unsigned blocks = (unsigned)(usli_ceil_div(g->n, TILE) * usli_ceil_div(g->m, TILE));
    USLI_LAUNCH(blocks, THREADS, SHARED, x, product16<T, TRANS_A, TRANS_B>)(*g, a, b, pairs);
    return usli_launched(x, "matrix product");
}

template <typename T> usl_status launch(usli_exec *x, const usli_gemm_args *g) {
    if (g->trans_a) return g->trans_b ? launch16<T, true, true>(x, g) : launch16<T, true, false>(x, g);
    return g->trans_b ? launch16<T, false, true>(x, g) : launch16<T, false, false>(x, g);
}

} // namespace

usl_status usli_own_gemm(usli_exec *x, const usli_gemm_args *g) {
    if (g->type == USL_BF16) return launch<usli_bf16>(x, g);
    if (g->type == USL_F16) return launch<usli_f16>(x, g);
    if (g->groups)
        USLI_LAUNCH(grouped_grid(g, SMALL), THREADS, 0, x, grouped32)(*g);
    else
        USLI_LAUNCH(dim3((unsigned)usli_ceil_div(g->n, SMALL), (unsigned)usli_ceil_div(g->m, SMALL)), THREADS, 0, x,
                    product32)
    (*g);
    return usli_launched(x, "matrix product");
}

usl_status usli_gemm(usli_exec *x, const usli_gemm_args *g) {
    usl_status st = USL_OK;
    if (!g->m || !g->n) return USL_OK;
    return !g->groups && usli_cublaslt_gemm(x, g, &st) ? st : usli_own_gemm(x, g);
}
