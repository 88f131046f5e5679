/* Llama-3-8B, 4096 tokens, 16 ranks a module, bytes of a block (4.8 TB/s of an H200 / 3.35 of an H100):
 *   narrow    forward reads x of four groups, 218 MB: 45 / 65 us; backward reads dy, 352 MB: 73 / 105 us
 *   expand    forward writes y, 352 MB: 73 / 105 us; backward writes dx, 218 MB: 45 / 65 us
 *   gradient  reads x and dy, 570 MB: 119 / 170 us; with what dy is narrowed to from the same reading 352 MB less
 * The products themselves are 2 x 0.05 TFLOP each, some 0.1 ms of tensor cores in all, under the copies. */
#include "kernels/skinny.cuh"

#include "kernels/mma.cuh"

extern "C" {
#include "core/ops/dropout.h"
}

namespace {

constexpr int STAGES = 3;

int64_t round_up(int64_t n, int64_t to) {
    return usli_ceil_div(n, to) * to;
}

int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Drops eight values of one token, or divides them by 1 - p. */
template <typename V>
__device__ __forceinline__ void drop_eight(const usli_dropout &d, int64_t token, int64_t col, V &&each) {
    uint32_t threshold = usli_dropout_threshold(d.p), word[4];
    float keep = 1.0f / (1.0f - d.p);
    uint64_t key = usli_dropout_key(&d);
#pragma unroll
    for (int g = 0; g < 2; g++) {
        usli_dropout_words(&d, key, token, col / 4 + g, word);
#pragma unroll
        for (int k = 0; k < 4; k++) each(4 * g + k, word[k] < threshold ? 0.0f : keep);
    }
}

/* The same in shared memory, by the thread that has just copied them there. */
template <typename T> __device__ __forceinline__ void drop_chunk(const usli_dropout &d, int64_t t, int64_t col, T *p) {
    usli_pack<T, 8> v = load_pack<T, 8>(p);
    drop_eight(d, t, col, [&](int k, float factor) { v.v[k] = from_f32<T>(to_f32(v.v[k]) * factor); });
    store_pack<T, 8>(p, v);
}

/* ---- narrow --------------------------------------------------------------------------------------------------------
 * 64 tokens a block, a share of the columns each, 64 at a time; four warps of 16 tokens. */

constexpr int DOWN_TOKENS = 64, DOWN_STEP = 64, DOWN_LINE = DOWN_STEP + 8, DOWN_THREADS = 128;

template <int RT> constexpr size_t down_shared() {
    return (size_t)STAGES * (DOWN_TOKENS + 16 * RT) * DOWN_LINE * 2;
}

template <typename T> struct narrow_args {
    const T *x, *a;
    T *out, *also; /* one share: the result */
    float *part;   /* several: (shares, tokens, 16 RT) */
    int64_t ldx, lda, ld_also, tokens, cols, share;
    int ranks;
    usli_dropout d;
};

/* Value r of token t; also's rows are whole. */
template <typename T>
__device__ __forceinline__ void narrow_store(T *out, T *also, int64_t ld_also, int ranks, int64_t t, int r, float v) {
    if (r < ranks) out[t * ranks + r] = from_f32<T>(v);
    if (also) also[t * ld_also + r] = from_f32<T>(r < ranks ? v : 0.0f);
}

template <typename T, int RT>
__device__ __forceinline__ void narrow_load(const narrow_args<T> &g, T *stage, int64_t t0, int64_t col, int64_t end) {
#pragma unroll
    for (int j = 0; j < (DOWN_TOKENS + 16 * RT) * (DOWN_STEP / 8) / DOWN_THREADS; j++) {
        int i = j * DOWN_THREADS + (int)threadIdx.x;
        int line = i / (DOWN_STEP / 8), c = i % (DOWN_STEP / 8) * 8, r = line - DOWN_TOKENS;
        const T *from = g.x;
        bool valid = col + c < end;
        if (line < DOWN_TOKENS) {
            valid = valid && t0 + line < g.tokens;
            if (valid) from = g.x + (t0 + line) * g.ldx + col + c;
        } else {
            valid = valid && r < g.ranks;
            if (valid) from = g.a + r * g.lda + col + c;
        }
        cp_async16(stage + line * DOWN_LINE + c, from, valid);
    }
}

template <typename T, int RT, bool DROPS> __global__ void __launch_bounds__(DOWN_THREADS) narrow(narrow_args<T> g) {
    USLI_SHARED(T, shared);
    await_earlier();
    constexpr int STAGE = (DOWN_TOKENS + 16 * RT) * DOWN_LINE;
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int64_t t0 = (int64_t)blockIdx.x * DOWN_TOKENS, begin = blockIdx.y * g.share, end = begin + g.share;
    if (end > g.cols) end = g.cols;
    int steps = (int)((end - begin + DOWN_STEP - 1) / DOWN_STEP);
    float sum[2 * RT][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) narrow_load<T, RT>(g, shared + s * STAGE, t0, begin + s * DOWN_STEP, end);
        cp_async_commit();
    }
    for (int s = 0; s < steps; s++) {
        T *stage = shared + s % STAGES * STAGE;
        cp_async_wait<STAGES - 2>();
        if (DROPS)
            for (int i = (int)threadIdx.x; i < DOWN_TOKENS * (DOWN_STEP / 8); i += DOWN_THREADS) {
                int line = i / (DOWN_STEP / 8), c = i % (DOWN_STEP / 8) * 8;
                int64_t col = begin + s * DOWN_STEP + c;
                if (t0 + line < g.tokens && col < end) drop_chunk<T>(g.d, t0 + line, col, stage + line * DOWN_LINE + c);
            }
        __syncthreads();
        int ahead = s + STAGES - 1;
        if (ahead < steps) narrow_load<T, RT>(g, shared + ahead % STAGES * STAGE, t0, begin + ahead * DOWN_STEP, end);
        cp_async_commit();
        const T *x = stage + warp * 16 * DOWN_LINE, *a = stage + DOWN_TOKENS * DOWN_LINE;
#pragma unroll
        for (int k = 0; k < DOWN_STEP; k += 16) {
            uint32_t fx[4];
            ldmatrix_x4(fx, x + lane % 16 * DOWN_LINE + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < RT; n++) {
                uint32_t f[4];
                ldmatrix_x4(f, a + (n * 16 + lane / 16 * 8 + lane % 8) * DOWN_LINE + k + lane / 8 % 2 * 8);
                uint32_t low[2] = { f[0], f[1] }, high[2] = { f[2], f[3] };
                mma_16816<T>(sum[2 * n], fx, low);
                mma_16816<T>(sum[2 * n + 1], fx, high);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 2 * RT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int64_t t = t0 + warp * 16 + lane / 4 + half * 8;
            int r = n * 8 + lane % 4 * 2;
            if (t >= g.tokens) continue;
            float first = sum[n][2 * half], second = sum[n][2 * half + 1];
            if (gridDim.y > 1) {
                usli_pack<float, 2> v = { { first, second } };
                store_pack<float, 2>(g.part + (blockIdx.y * g.tokens + t) * (16 * RT) + r, v);
            } else {
                narrow_store(g.out, g.also, g.ld_also, g.ranks, t, r, first);
                narrow_store(g.out, g.also, g.ld_also, g.ranks, t, r + 1, second);
            }
        }
}

constexpr int THREADS = 256;

template <typename T>
__global__ void __launch_bounds__(THREADS)
    add_shares(const float *part, int shares, int64_t tokens, int width, int ranks, T *out, T *also, int64_t ld_also) {
    await_earlier();
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, plane = tokens * width;
    if (i >= plane) return;
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < shares; s++) sum += part[s * plane + i];
    int64_t t = i / width;
    int r = (int)(i - t * width);
    narrow_store(out, also, ld_also, ranks, t, r, sum);
}

/* Columns of a block's share: enough blocks for the largest device, by shapes alone. */
int64_t narrow_share(int64_t tokens, int64_t cols) {
    int64_t tiles = usli_ceil_div(tokens, DOWN_TOKENS);
    int64_t shares = least(least(usli_ceil_div(640, tiles), usli_ceil_div(cols, 256)), 32);
    return round_up(usli_ceil_div(cols, shares), DOWN_STEP);
}

template <typename T, int RT> usl_status launch_narrow(usli_exec *x, const usli_wide *w, narrow_args<T> *g) {
    constexpr size_t SHARED = down_shared<RT>();
    int64_t shares = usli_ceil_div(w->cols, g->share);
    dim3 grid((unsigned)usli_ceil_div(w->tokens, DOWN_TOKENS), (unsigned)shares);
    if (w->dropout) {
        USLI_TRY(USLI_ALLOW_SHARED(x, SHARED, narrow<T, RT, true>));
        USLI_LAUNCH_EARLY(grid, DOWN_THREADS, SHARED, x, narrow<T, RT, true>)(*g);
    } else {
        USLI_TRY(USLI_ALLOW_SHARED(x, SHARED, narrow<T, RT, false>));
        USLI_LAUNCH_EARLY(grid, DOWN_THREADS, SHARED, x, narrow<T, RT, false>)(*g);
    }
    if (shares > 1)
        USLI_LAUNCH_EARLY((unsigned)usli_ceil_div(w->tokens * 16 * RT, THREADS), THREADS, 0, x, add_shares<T>)
    (g->part, (int)shares, w->tokens, 16 * RT, g->ranks, g->out, g->also, g->ld_also);
    return usli_launched(x, "linear");
}

/* ---- expand --------------------------------------------------------------------------------------------------------
 * 128 x 128 of y a block, eight warps of 32 x 64, 16 rows at a time. The four lanes of a row exchange their sums, so
 * that each stores 16 bytes and together 64: through shared memory it took two barriers and half the warps. */

constexpr int UP_TILE = 128, UP_THREADS = 256;

template <typename T> struct expand_args {
    T *y;
    const T *p, *b;
    const float *bias;
    int64_t ldy, tokens, cols;
    int ranks, width; /* width: ranks, rounded up to 16 */
    bool add, wide;   /* wide: rows of p and b are whole pieces of 16 bytes */
    usli_dropout d;
};

template <typename T>
__device__ __forceinline__ void expand_load(const expand_args<T> &g, T *tile, const T *from, int64_t row,
                                            int64_t rows) {
    int line = g.width + 8;
    if (g.wide)
        for (int i = (int)threadIdx.x; i < UP_TILE * (g.width / 8); i += UP_THREADS) {
            int n = i / (g.width / 8), r = i % (g.width / 8) * 8;
            bool valid = row + n < rows && r < g.ranks;
            cp_async16(tile + n * line + r, valid ? from + (row + n) * g.ranks + r : from, valid);
        }
    else
        for (int i = (int)threadIdx.x; i < UP_TILE * g.width; i += UP_THREADS) {
            int n = i / g.width, r = i % g.width;
            tile[n * line + r] = row + n < rows && r < g.ranks ? from[(row + n) * g.ranks + r] : from_f32<T>(0.0f);
        }
}

template <typename T, bool DROPS>
__device__ __forceinline__ void expand_store(const expand_args<T> &g, int64_t t, int64_t col, float (&v)[8]) {
    T *y = g.y + t * g.ldy + col;
    if (DROPS) drop_eight(g.d, t, col, [&](int k, float factor) { v[k] *= factor; });
    if (g.bias) {
        usli_pack<float, 8> bias = load_wide<float, 8>(g.bias + col);
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] += bias.v[k];
    }
    if (g.add) {
        usli_pack<T, 8> before = load_pack<T, 8>(y);
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] += to_f32(before.v[k]);
    }
    usli_pack<T, 8> out;
#pragma unroll
    for (int k = 0; k < 8; k += 2) store_two<T>(&out.v[k], v[k], v[k + 1]);
    store_pack<T, 8>(y, out);
}

/* Lane t of four holds columns 2t, 2t + 1 of four tiles of 8; it gets all of tile t. */
__device__ __forceinline__ void exchange(float (&v)[8]) {
    int lane = (int)threadIdx.x;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (n & bit) continue;
            bool upper = lane & bit;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float got = __shfl_xor_sync(0xffffffffu, upper ? v[2 * n + e] : v[2 * (n | bit) + e], bit);
                v[2 * n + e] = upper ? got : v[2 * n + e];
                v[2 * (n | bit) + e] = upper ? v[2 * (n | bit) + e] : got;
            }
        }
}

template <typename T, bool DROPS> __global__ void __launch_bounds__(UP_THREADS, 3) expand(expand_args<T> g) {
    USLI_SHARED(T, shared);
    await_earlier();
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP, line = g.width + 8;
    int row0 = warp / 2 * 32, first = warp % 2 * 64;
    int64_t t0 = (int64_t)blockIdx.y * UP_TILE, col0 = (int64_t)blockIdx.x * UP_TILE;
    T *p = shared, *b = shared + UP_TILE * line;
    expand_load(g, p, g.p, t0, g.tokens);
    expand_load(g, b, g.b, col0, g.cols);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int m = 0; m < 2; m++) {
        float sum[8][4] = {};
        for (int k = 0; k < g.width; k += 16) {
            uint32_t fp[4];
            ldmatrix_x4(fp, p + (row0 + m * 16 + lane % 16) * line + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t f[4];
                ldmatrix_x4(f, b + (first + n * 8 + lane / 16 * 8 + lane % 8) * line + k + lane / 8 % 2 * 8);
                uint32_t low[2] = { f[0], f[1] }, high[2] = { f[2], f[3] };
                mma_16816<T>(sum[n], fp, low);
                mma_16816<T>(sum[n + 1], fp, high);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 8; n += 4) {
                float v[8];
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] = sum[n + i / 2][2 * half + i % 2];
                exchange(v);
                int64_t t = t0 + row0 + m * 16 + half * 8 + lane / 4, col = col0 + first + (n + lane % 4) * 8;
                if (t < g.tokens && col < g.cols) expand_store<T, DROPS>(g, t, col, v);
            }
    }
}

template <typename T>
usl_status launch_expand(usli_exec *x, const usli_wide *y, const void *p, const void *b, int ranks, const float *bias,
                         bool add) {
    expand_args<T> g = {};
    g.y = static_cast<T *>(y->data), g.p = static_cast<const T *>(p), g.b = static_cast<const T *>(b), g.bias = bias;
    g.ldy = y->ld, g.tokens = y->tokens, g.cols = y->cols, g.ranks = ranks, g.width = (int)round_up(ranks, 16);
    g.add = add, g.wide = ranks % 8 == 0 && usli_aligned16(p) && usli_aligned16(b);
    if (y->dropout) g.d = *y->dropout;
    size_t bytes = (size_t)2 * UP_TILE * (g.width + 8) * sizeof(T);
    dim3 grid((unsigned)usli_ceil_div(y->cols, UP_TILE), (unsigned)usli_ceil_div(y->tokens, UP_TILE));
    if (y->dropout)
        USLI_LAUNCH_EARLY(grid, UP_THREADS, bytes, x, expand<T, true>)(g);
    else
        USLI_LAUNCH_EARLY(grid, UP_THREADS, bytes, x, expand<T, false>)(g);
    return usli_launched(x, "linear");
}

/* ---- gradient ------------------------------------------------------------------------------------------------------
 * 128 columns a block, a share of the tokens each, 32 at a time; four warps of 32 columns. */

constexpr int SUM_COLS = 128, SUM_STEP = 32, SUM_LINE = SUM_COLS + 8, SUM_THREADS = 128;

template <typename T> struct gradient_args {
    const T *x, *p;
    float *parts;
    int64_t ldx, tokens, cols, share;
    int64_t row_step, col_step; /* of a part */
    int ranks;
    bool wide, drops;
    usli_dropout d;
    int tiles, blocks; /* of columns; with all shares of the tokens */
};

/* dB's, then dA's: one launch, so that the one's end is the other's begin. */
template <typename T> struct gradient_pair { gradient_args<T> side[2]; };

/* STEP tokens from t on, those before end: COLS columns of x from col0 on, and behind them their rows of p (., ranks);
 * by N threads. wide: rows of p are whole pieces of 16 bytes. */
template <typename T, int RT, int STEP, int COLS, int N>
__device__ __forceinline__ void load_tokens(T *stage, const T *x, int64_t ld, int64_t cols, int64_t col0, const T *p,
                                            int ranks, bool wide, int64_t t, int64_t end) {
    constexpr int LINE = COLS + 8, P_LINE = 16 * RT + 8;
    T *p_stage = stage + STEP * LINE;
#pragma unroll
    for (int j = 0; j < STEP * (COLS / 8) / N; j++) {
        int i = j * N + (int)threadIdx.x;
        int line = i / (COLS / 8), c = i % (COLS / 8) * 8;
        bool valid = t + line < end && col0 + c < cols;
        cp_async16(stage + line * LINE + c, valid ? x + (t + line) * ld + col0 + c : x, valid);
    }
    if (wide)
        for (int i = (int)threadIdx.x; i < STEP * 2 * RT; i += N) {
            int line = i / (2 * RT), r = i % (2 * RT) * 8;
            bool valid = t + line < end && r < ranks;
            cp_async16(p_stage + line * P_LINE + r, valid ? p + (t + line) * ranks + r : p, valid);
        }
    else
        for (int i = (int)threadIdx.x; i < STEP * 16 * RT; i += N) {
            int line = i / (16 * RT), r = i % (16 * RT);
            p_stage[line * P_LINE + r] = t + line < end && r < ranks ? p[(t + line) * ranks + r] : from_f32<T>(0.0f);
        }
}

template <typename T, int RT>
__device__ __forceinline__ void gradient_load(const gradient_args<T> &g, T *stage, int64_t t, int64_t end,
                                              int64_t col0) {
    load_tokens<T, RT, SUM_STEP, SUM_COLS, SUM_THREADS>(stage, g.x, g.ldx, g.cols, col0, g.p, g.ranks, g.wide, t, end);
}

template <typename T, int RT, bool DROPS>
__global__ void __launch_bounds__(SUM_THREADS) gradient(const __grid_constant__ gradient_pair<T> both) {
    constexpr int LINE = 16 * RT + 8, STAGE = SUM_STEP * (SUM_LINE + LINE);
    __shared__ __align__(16) T shared[STAGES * STAGE];
    await_earlier();
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP, block = (int)blockIdx.x;
    bool second = block >= both.side[0].blocks;
    const gradient_args<T> &g = both.side[second];
    if (second) block -= both.side[0].blocks;
    int of = block / g.tiles;
    int64_t col0 = (int64_t)(block - of * g.tiles) * SUM_COLS, begin = of * g.share, end = begin + g.share;
    if (end > g.tokens) end = g.tokens;
    int steps = (int)((end - begin + SUM_STEP - 1) / SUM_STEP);
    float sum[RT][4][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) gradient_load<T, RT>(g, shared + s * STAGE, begin + s * SUM_STEP, end, col0);
        cp_async_commit();
    }
    for (int s = 0; s < steps; s++) {
        T *x = shared + s % STAGES * STAGE;
        const T *p = x + SUM_STEP * SUM_LINE;
        cp_async_wait<STAGES - 2>();
        if (DROPS && g.drops)
            for (int i = (int)threadIdx.x; i < SUM_STEP * (SUM_COLS / 8); i += SUM_THREADS) {
                int line = i / (SUM_COLS / 8), c = i % (SUM_COLS / 8) * 8;
                int64_t t = begin + s * SUM_STEP + line;
                if (t < end && col0 + c < g.cols) drop_chunk<T>(g.d, t, col0 + c, x + line * SUM_LINE + c);
            }
        __syncthreads();
        int ahead = s + STAGES - 1;
        if (ahead < steps)
            gradient_load<T, RT>(g, shared + ahead % STAGES * STAGE, begin + ahead * SUM_STEP, end, col0);
        cp_async_commit();
#pragma unroll
        for (int k = 0; k < SUM_STEP; k += 16) {
            uint32_t fp[RT][4];
#pragma unroll
            for (int m = 0; m < RT; m++)
                ldmatrix_x4_trans(fp[m], p + (k + lane / 16 * 8 + lane % 8) * LINE + m * 16 + lane / 8 % 2 * 8);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                uint32_t f[4];
                ldmatrix_x4_trans(f,
                                  x + (k + lane / 8 % 2 * 8 + lane % 8) * SUM_LINE + warp * 32 + n * 8 + lane / 16 * 8);
                uint32_t low[2] = { f[0], f[1] }, high[2] = { f[2], f[3] };
#pragma unroll
                for (int m = 0; m < RT; m++) {
                    mma_16816<T>(sum[m][n], fp[m], low);
                    mma_16816<T>(sum[m][n + 1], fp[m], high);
                }
            }
        }
    }
    float *part = g.parts + of * (g.cols * g.ranks);
#pragma unroll
    for (int m = 0; m < RT; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int r = m * 16 + lane / 4 + e / 2 * 8;
                int64_t col = col0 + warp * 32 + n * 8 + lane % 4 * 2 + e % 2;
                if (r < g.ranks && col < g.cols) part[r * g.row_step + col * g.col_step] = sum[m][n][e];
            }
}

/* Tokens of a block's share. */
int64_t gradient_share(int64_t tokens, int64_t cols) {
    int64_t tiles = usli_ceil_div(cols, SUM_COLS);
    int64_t shares = least(least(usli_ceil_div(480, tiles), usli_ceil_div(tokens, 128)), 32);
    return round_up(usli_ceil_div(tokens, shares), SUM_STEP);
}

template <typename T, int RT> usl_status launch_gradient(usli_exec *x, const gradient_pair<T> *g) {
    unsigned blocks = (unsigned)(g->side[0].blocks + g->side[1].blocks);
    if (g->side[0].drops || g->side[1].drops)
        USLI_LAUNCH_EARLY(blocks, SUM_THREADS, 0, x, gradient<T, RT, true>)(*g);
    else
        USLI_LAUNCH_EARLY(blocks, SUM_THREADS, 0, x, gradient<T, RT, false>)(*g);
    return usli_launched(x, "linear");
}

/* ---- dy, read once -------------------------------------------------------------------------------------------------
 * 512 columns a block, a share of the tokens each, 32 at a time; eight warps. For dB a warp has 64 columns; for dyb it
 * has 16 tokens and a quarter of the columns, and the quarters are added in shared memory: so few blocks share a token
 * that what they leave to be added (a seventh of dy where there are 32 ranks) stays in the L2 cache. */

constexpr int DY_COLS = 512, DY_STEP = 32, DY_LINE = DY_COLS + 8, DY_THREADS = 256, DY_QUARTERS = 4;

template <int RT> constexpr int dy_stage() {
    return DY_STEP * (DY_LINE + 16 * RT + 8);
}
template <int RT> constexpr size_t dy_shared() {
    return (size_t)(STAGES * dy_stage<RT>() + 16 * RT * DY_LINE) * 2 + (size_t)DY_QUARTERS * DY_STEP * 16 * RT * 4;
}

template <typename T> struct dy_args {
    const T *dy, *b, *xa;
    float *part, *db; /* (chunks, tokens, 16 RT); (shares, cols, ranks) */
    int64_t ld, tokens, cols, share;
    int ranks, chunks;
    bool wide; /* rows of xa are whole pieces of 16 bytes */
};

template <typename T, int RT>
__device__ __forceinline__ void dy_load(const dy_args<T> &g, T *stage, int64_t t, int64_t end, int64_t col0) {
    load_tokens<T, RT, DY_STEP, DY_COLS, DY_THREADS>(stage, g.dy, g.ld, g.cols, col0, g.xa, g.ranks, g.wide, t, end);
}

/* This warp's tokens and quarter of dy b, to where quarters are added. */
template <typename T, int RT> __device__ __forceinline__ void dy_narrow(const T *x, const T *b, float *quarters) {
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int t0 = warp % 2 * 16, quarter = warp / 2, first = quarter * (DY_COLS / DY_QUARTERS);
    float sum[2 * RT][4] = {};
#pragma unroll
    for (int k = first; k < first + DY_COLS / DY_QUARTERS; k += 16) {
        uint32_t fx[4];
        ldmatrix_x4(fx, x + (t0 + lane % 16) * DY_LINE + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < RT; n++) {
            uint32_t f[4];
            ldmatrix_x4(f, b + (n * 16 + lane / 16 * 8 + lane % 8) * DY_LINE + k + lane / 8 % 2 * 8);
            uint32_t low[2] = { f[0], f[1] }, high[2] = { f[2], f[3] };
            mma_16816<T>(sum[2 * n], fx, low);
            mma_16816<T>(sum[2 * n + 1], fx, high);
        }
    }
#pragma unroll
    for (int n = 0; n < 2 * RT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            usli_pack<float, 2> v = { { sum[n][2 * half], sum[n][2 * half + 1] } };
            int t = t0 + lane / 4 + half * 8;
            store_pack<float, 2>(quarters + (quarter * DY_STEP + t) * 16 * RT + n * 8 + lane % 4 * 2, v);
        }
}

/* This warp's columns of dy^T xa, added to sum. */
template <typename T, int RT> __device__ __forceinline__ void dy_gradient(const T *x, float (&sum)[RT][8][4]) {
    constexpr int LINE = 16 * RT + 8;
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    const T *p = x + DY_STEP * DY_LINE;
#pragma unroll
    for (int k = 0; k < DY_STEP; k += 16) {
        uint32_t fp[RT][4];
#pragma unroll
        for (int m = 0; m < RT; m++)
            ldmatrix_x4_trans(fp[m], p + (k + lane / 16 * 8 + lane % 8) * LINE + m * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t f[4];
            ldmatrix_x4_trans(f, x + (k + lane / 8 % 2 * 8 + lane % 8) * DY_LINE + warp * 64 + n * 8 + lane / 16 * 8);
            uint32_t low[2] = { f[0], f[1] }, high[2] = { f[2], f[3] };
#pragma unroll
            for (int m = 0; m < RT; m++) {
                mma_16816<T>(sum[m][n], fp[m], low);
                mma_16816<T>(sum[m][n + 1], fp[m], high);
            }
        }
    }
}

template <typename T, int RT>
__global__ void __launch_bounds__(DY_THREADS, 1) dy_products(const __grid_constant__ dy_args<T> g) {
    constexpr int STAGE = dy_stage<RT>();
    USLI_SHARED(T, shared);
    T *b = shared + STAGES * STAGE;
    float *quarters = reinterpret_cast<float *>(b + 16 * RT * DY_LINE);
    await_earlier();
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int of = (int)blockIdx.x / g.chunks, chunk = (int)blockIdx.x - of * g.chunks;
    int64_t col0 = (int64_t)chunk * DY_COLS, begin = of * g.share, end = begin + g.share;
    if (end > g.tokens) end = g.tokens;
    int steps = (int)((end - begin + DY_STEP - 1) / DY_STEP);
    for (int i = (int)threadIdx.x; i < 16 * RT * (DY_COLS / 8); i += DY_THREADS) {
        int r = i / (DY_COLS / 8), c = i % (DY_COLS / 8) * 8;
        bool valid = r < g.ranks && col0 + c < g.cols;
        cp_async16(b + r * DY_LINE + c, valid ? g.b + r * g.cols + col0 + c : g.b, valid);
    }
    float sum[RT][8][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) dy_load<T, RT>(g, shared + s * STAGE, begin + s * DY_STEP, end, col0);
        cp_async_commit();
    }
    for (int s = 0; s < steps; s++) {
        const T *x = shared + s % STAGES * STAGE;
        cp_async_wait<STAGES - 2>();
        __syncthreads(); /* and the quarters of the step before are added */
        int ahead = s + STAGES - 1;
        if (ahead < steps) dy_load<T, RT>(g, shared + ahead % STAGES * STAGE, begin + ahead * DY_STEP, end, col0);
        cp_async_commit();
        dy_narrow<T, RT>(x, b, quarters);
        dy_gradient<T, RT>(x, sum);
        __syncthreads();
        int64_t t0 = begin + s * DY_STEP;
        for (int i = (int)threadIdx.x; i < DY_STEP * 16 * RT; i += DY_THREADS) {
            float v = 0;
#pragma unroll
            for (int q = 0; q < DY_QUARTERS; q++) v += quarters[q * DY_STEP * 16 * RT + i];
            if (t0 + i / (16 * RT) < end) g.part[(chunk * g.tokens + t0) * 16 * RT + i] = v;
        }
    }
    float *db = g.db + of * (g.cols * g.ranks);
#pragma unroll
    for (int m = 0; m < RT; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int r = m * 16 + lane / 4 + e / 2 * 8;
                int64_t col = col0 + warp * 64 + n * 8 + lane % 4 * 2 + e % 2;
                if (r < g.ranks && col < g.cols) db[col * g.ranks + r] = sum[m][n][e];
            }
}

/* Tokens of a block's share: by shapes alone, so that blocks, one a multiprocessor, end together on 132 of them. A
 * block begins with what 64 tokens take, and each share is dB once more. */
int64_t dy_share(int64_t tokens, int64_t cols) {
    int64_t chunks = usli_ceil_div(cols, DY_COLS), best = round_up(tokens, DY_STEP), least_cost = INT64_MAX;
    for (int64_t shares = 1; shares <= 32; shares++) {
        int64_t share = round_up(usli_ceil_div(tokens, shares), DY_STEP);
        int64_t cost = usli_ceil_div(chunks * usli_ceil_div(tokens, share), 132) * (share + 64) + 8 * shares;
        if (cost < least_cost) least_cost = cost, best = share;
    }
    return best;
}

template <typename T, int RT>
usl_status launch_dy(usli_exec *x, dy_args<T> *g, void *dyb, void *also, int64_t ld_also) {
    constexpr size_t SHARED = dy_shared<RT>();
    unsigned shares = (unsigned)usli_ceil_div(g->tokens, g->share);
    USLI_TRY(USLI_ALLOW_SHARED(x, SHARED, dy_products<T, RT>));
    USLI_LAUNCH_EARLY(shares * (unsigned)g->chunks, DY_THREADS, SHARED, x, dy_products<T, RT>)(*g);
    USLI_LAUNCH_EARLY((unsigned)usli_ceil_div(g->tokens * 16 * RT, THREADS), THREADS, 0, x, add_shares<T>)
    (g->part, g->chunks, g->tokens, 16 * RT, g->ranks, static_cast<T *>(dyb), static_cast<T *>(also), ld_also);
    return usli_launched(x, "linear");
}

/* Calls f<T, RT>(...) with RT the ranks in sixteens. */
#define BY_RANKS(ranks, f, T, ...)          \
    ((ranks) <= 16   ? f<T, 1>(__VA_ARGS__) \
     : (ranks) <= 32 ? f<T, 2>(__VA_ARGS__) \
     : (ranks) <= 48 ? f<T, 3>(__VA_ARGS__) \
                     : f<T, 4>(__VA_ARGS__))

template <typename T>
usl_status narrow_of(usli_exec *x, const usli_wide *w, const void *a, int64_t lda, int ranks, void *out, void *also,
                     int64_t ld_also, float *room) {
    narrow_args<T> g = {};
    g.x = static_cast<const T *>(w->data), g.a = static_cast<const T *>(a), g.out = static_cast<T *>(out);
    g.also = static_cast<T *>(also), g.ld_also = ld_also, g.lda = lda;
    g.part = room, g.ldx = w->ld, g.tokens = w->tokens, g.cols = w->cols, g.ranks = ranks;
    g.share = narrow_share(w->tokens, w->cols);
    if (w->dropout) g.d = *w->dropout;
    return BY_RANKS(ranks, launch_narrow, T, x, w, &g);
}

template <typename T>
gradient_args<T> gradient_of(const usli_wide *w, const void *p, int ranks, bool turned, float *parts) {
    gradient_args<T> g = {};
    g.x = static_cast<const T *>(w->data), g.p = static_cast<const T *>(p), g.parts = parts;
    g.ldx = w->ld, g.tokens = w->tokens, g.cols = w->cols, g.ranks = ranks;
    g.share = gradient_share(w->tokens, w->cols);
    g.row_step = turned ? 1 : w->cols, g.col_step = turned ? ranks : 1;
    g.wide = ranks % 8 == 0 && usli_aligned16(p);
    g.drops = w->dropout;
    if (w->dropout) g.d = *w->dropout;
    g.tiles = (int)usli_ceil_div(w->cols, SUM_COLS);
    g.blocks = g.tiles * (int)usli_ceil_div(w->tokens, g.share);
    return g;
}

template <typename T>
usl_status gradients_of(usli_exec *x, const usli_wide *in, const usli_wide *dy, const void *dyb, const void *xa,
                        int ranks, float *da, float *db) {
    gradient_pair<T> g = { { gradient_of<T>(dy, xa, ranks, true, db), gradient_of<T>(in, dyb, ranks, false, da) } };
    if (!db) g.side[0].blocks = 0;
    return BY_RANKS(ranks, launch_gradient, T, x, &g);
}

template <typename T>
usl_status dy_of(usli_exec *x, const usli_wide *dy, const void *b, const void *xa, int ranks, void *dyb, void *also,
                 int64_t ld_also, float *db, float *room) {
    dy_args<T> g = {};
    g.dy = static_cast<const T *>(dy->data), g.b = static_cast<const T *>(b), g.xa = static_cast<const T *>(xa);
    g.part = room, g.db = db, g.ld = dy->ld, g.tokens = dy->tokens, g.cols = dy->cols, g.ranks = ranks;
    g.share = dy_share(dy->tokens, dy->cols), g.chunks = (int)usli_ceil_div(dy->cols, DY_COLS);
    g.wide = ranks % 8 == 0 && usli_aligned16(xa);
    return BY_RANKS(ranks, launch_dy, T, x, &g, dyb, also, ld_also);
}

} // namespace

bool usli_dy_fits(const usli_exec *x, int ranks) {
    static const size_t SHARED[] = { dy_shared<1>(), dy_shared<2>(), dy_shared<3>(), dy_shared<4>() };
    return ranks > 0 && ranks <= USLI_MOST_RANKS && SHARED[(ranks - 1) / 16] <= usli_cuda_of(x)->shared_most;
}

int usli_dy_parts(int64_t tokens, int64_t cols) {
    return (int)usli_ceil_div(tokens, dy_share(tokens, cols));
}

int64_t usli_dy_room(int64_t tokens, int64_t cols, int ranks) {
    return usli_ceil_div(cols, DY_COLS) * tokens * round_up(ranks, 16);
}

usl_status usli_dy_products(usli_exec *x, usl_dtype dtype, const usli_wide *dy, const void *b_turned, const void *xa,
                            int ranks, void *dyb, void *also, int64_t ld_also, float *db, float *room) {
    return dtype == USL_BF16 ? dy_of<usli_bf16>(x, dy, b_turned, xa, ranks, dyb, also, ld_also, db, room)
                             : dy_of<usli_f16>(x, dy, b_turned, xa, ranks, dyb, also, ld_also, db, room);
}

int64_t usli_narrow_room(int64_t tokens, int64_t cols, int ranks) {
    int64_t shares = usli_ceil_div(cols, narrow_share(tokens, cols));
    return shares > 1 ? shares * tokens * round_up(ranks, 16) : 0;
}

usl_status usli_narrow(usli_exec *x, usl_dtype dtype, const usli_wide *w, const void *a, int64_t lda, int ranks,
                       void *out, void *also, int64_t ld_also, float *room) {
    return dtype == USL_BF16 ? narrow_of<usli_bf16>(x, w, a, lda, ranks, out, also, ld_also, room)
                             : narrow_of<usli_f16>(x, w, a, lda, ranks, out, also, ld_also, room);
}

usl_status usli_expand(usli_exec *x, usl_dtype dtype, const usli_wide *y, const void *p, const void *b, int ranks,
                       const float *bias, bool add) {
    return dtype == USL_BF16 ? launch_expand<usli_bf16>(x, y, p, b, ranks, bias, add)
                             : launch_expand<usli_f16>(x, y, p, b, ranks, bias, add);
}

int usli_gradient_parts(int64_t tokens, int64_t cols) {
    return (int)usli_ceil_div(tokens, gradient_share(tokens, cols));
}

usl_status usli_gradients(usli_exec *x, usl_dtype dtype, const usli_wide *in, const usli_wide *dy, const void *dyb,
                          const void *xa, int ranks, float *da, float *db) {
    return dtype == USL_BF16 ? gradients_of<usli_bf16>(x, in, dy, dyb, xa, ranks, da, db)
                             : gradients_of<usli_f16>(x, in, dy, dyb, xa, ranks, da, db);
}
