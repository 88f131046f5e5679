/* Products of 16-bit values over whole steps of 64 columns go to the tensor cores (gemv_tile.cuh). The others stand
 * here: a warp makes two of y's columns for all tokens in float32; of weights that are plain numbers lanes take 16 of a
 * row in turn, of others one value. */
#include "kernels/gemv.cuh"

#include "kernels/gemv_nf4.cuh"

namespace {

constexpr int ROWS = 2, AT_ONCE = 16;

/* ---- Sixteen weights -----------------------------------------------------------------------------------------------
 */

constexpr int ANY_NF4 = -1, ANY_I8 = -2; /* beside the storage types of the traits table */

template <int TYPE>
__device__ __forceinline__ float value_at(const gemv_segment &s, int64_t row, int64_t col, int64_t in) {
    if constexpr (TYPE == ANY_NF4)
        return nf4_value(s.nf4, row * in + col);
    else if constexpr (TYPE == ANY_I8)
        return (float)static_cast<const int8_t *>(s.data)[row * in + col] * s.scale[row];
    else
        return value_of<TYPE>(static_cast<const char *>(s.data) + row * s.row_bytes, col);
}

template <typename T> __device__ __forceinline__ void read16(const T *p, float (&w)[AT_ONCE]) {
    usli_pack<T, AT_ONCE> v = load_wide<T, AT_ONCE>(p);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) w[k] = to_f32(v.v[k]);
}

/* The types that are read 16 values at a time; of others a lane takes one value in turn. */
constexpr bool by16(int type) {
    return type == USL_BF16 || type == USL_F16 || type == USL_F32;
}

template <int TYPE>
__device__ __forceinline__ void weights16(const gemv_segment &s, int64_t row, int64_t col, float (&w)[AT_ONCE]) {
    const char *line = static_cast<const char *>(s.data) + row * s.row_bytes;
    if constexpr (TYPE == USL_BF16)
        read16(reinterpret_cast<const usli_bf16 *>(line) + col, w);
    else if constexpr (TYPE == USL_F16)
        read16(reinterpret_cast<const usli_f16 *>(line) + col, w);
    else
        read16(reinterpret_cast<const float *>(line) + col, w);
}

__device__ __forceinline__ void x16(const gemv_args &g, int t, int64_t col, float (&x)[AT_ONCE]) {
    int64_t i = t * g.ldx + col;
    if (g.dtype == USL_BF16)
        read16(static_cast<const usli_bf16 *>(g.x) + i, x);
    else if (g.dtype == USL_F16)
        read16(static_cast<const usli_f16 *>(g.x) + i, x);
    else
        read16(static_cast<const float *>(g.x) + i, x);
}

/* ---- The product ---------------------------------------------------------------------------------------------------
 */

template <int TYPE>
__device__ __forceinline__ void multiply_wide(const gemv_args &g, const gemv_segment &s, int64_t row, int rows,
                                              float (&sum)[ROWS][MOST_TOKENS]) {
    int lane = (int)threadIdx.x % USLI_WARP;
#pragma unroll 2
    for (int64_t col = lane * AT_ONCE; col < g.in; col += USLI_WARP * AT_ONCE) {
        float w[ROWS][AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS; r++) weights16<TYPE>(s, row + (r < rows ? r : 0), col, w[r]);
#pragma unroll
        for (int t = 0; t < MOST_TOKENS; t++) {
            if (t >= g.tokens) break;
            float x[AT_ONCE];
            x16(g, t, col, x);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float part = 0;
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) part += w[r][k] * x[k];
                sum[r][t] += part;
            }
        }
    }
}

template <int TYPE>
__device__ __forceinline__ void multiply_any(const gemv_args &g, const gemv_segment &s, int64_t row, int rows,
                                             float (&sum)[ROWS][MOST_TOKENS]) {
#pragma unroll 1
    for (int64_t col = threadIdx.x % USLI_WARP; col < g.in; col += USLI_WARP)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float w = value_at<TYPE>(s, row + (r < rows ? r : 0), col, g.in);
#pragma unroll
            for (int t = 0; t < MOST_TOKENS; t++)
                if (t < g.tokens) sum[r][t] += w * load_any(g.x, g.dtype, t * g.ldx + col);
        }
}

template <int TYPE> __global__ void __launch_bounds__(THREADS) gemv(const __grid_constant__ gemv_args g) {
    int lane = (int)threadIdx.x % USLI_WARP;
    int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / USLI_WARP;
    int which = 0;
    while (which < g.count && unit >= (g.s[which].rows + ROWS - 1) / ROWS)
        unit -= (g.s[which++].rows + ROWS - 1) / ROWS;
    if (which == g.count) return;
    const gemv_segment &s = g.s[which];
    int64_t row = unit * ROWS;
    int rows = (int)min((int64_t)ROWS, s.rows - row);
    float sum[ROWS][MOST_TOKENS] = {};
    bool done = false;
    if constexpr (by16(TYPE)) {
        if (g.wide) multiply_wide<TYPE>(g, s, row, rows, sum);
        done = g.wide;
    }
    if (!done) multiply_any<TYPE>(g, s, row, rows, sum);
    float mine = 0;
#pragma unroll
    for (int i = 0; i < ROWS * MOST_TOKENS; i++) {
        float all = warp_sum(sum[i / MOST_TOKENS][i % MOST_TOKENS]);
        if (lane == i) mine = all;
    }
    int r = lane / MOST_TOKENS, t = lane % MOST_TOKENS;
    if (r < rows && t < g.tokens)
        store_any(g.y, g.y_dtype, t * g.ldy + s.row0 + row + r, mine + gemv_beside(g, s, row + r, t));
}

/* ---- xa = x A^T, a block per rank ----------------------------------------------------------------------------------
 * A row of A is 16 to 57 KB: all of it is under way at once. */

constexpr int RANK_THREADS = 512, RANK_WARPS = RANK_THREADS / USLI_WARP;

struct rank_args {
    const float *a[USLI_MAX_SEGMENTS];
    int rank0[USLI_MAX_SEGMENTS + 1]; /* where each segment's ranks begin, and the end of all */
    int tokens, ranks;
    bool wide; /* rows of a and x are whole pieces of four values, aligned */
    int64_t in, ldx;
    const void *x;
    float *xa;
    void *saved; /* the same in x's type, or NULL */
};

template <typename T, int V>
__device__ __forceinline__ void rank_sums(const rank_args &g, const float *a, float (&sum)[MOST_TOKENS]) {
    const T *x = static_cast<const T *>(g.x);
#pragma unroll 4
    for (int64_t i = (int64_t)threadIdx.x * V; i < g.in; i += RANK_THREADS * V) {
        usli_pack<float, V> v = load_pack<float, V>(a + i);
#pragma unroll
        for (int t = 0; t < MOST_TOKENS; t++) {
            if (t >= g.tokens) break;
            usli_pack<T, V> xs = load_pack<T, V>(x + t * g.ldx + i);
#pragma unroll
            for (int k = 0; k < V; k++) sum[t] += v.v[k] * to_f32(xs.v[k]);
        }
    }
}

template <typename T> __global__ void __launch_bounds__(RANK_THREADS) ranks(const __grid_constant__ rank_args g) {
    __shared__ float part[MOST_TOKENS][RANK_WARPS];
    await_earlier();
    int r = (int)blockIdx.x, s = 0, warp = (int)threadIdx.x / USLI_WARP;
    while (r >= g.rank0[s + 1]) s++;
    const float *a = g.a[s] + (r - g.rank0[s]) * g.in;
    float sum[MOST_TOKENS] = {};
    if (g.wide)
        rank_sums<T, 4>(g, a, sum);
    else
        rank_sums<T, 1>(g, a, sum);
#pragma unroll
    for (int t = 0; t < MOST_TOKENS; t++) {
        float v = warp_sum(sum[t]);
        if (threadIdx.x % USLI_WARP == 0) part[t][warp] = v;
    }
    __syncthreads();
    int t = (int)threadIdx.x;
    if (t >= g.tokens) return;
    float v = 0;
    for (int w = 0; w < RANK_WARPS; w++) v += part[t][w];
    T rounded = from_f32<T>(v);
    g.xa[t * g.ranks + r] = to_f32(rounded);
    if (g.saved) static_cast<T *>(g.saved)[t * g.ranks + r] = rounded;
}

void launch_ranks(usli_exec *x, const usli_linear_args *a, float *xa) {
    rank_args g = {};
    g.ldx = a->ldx ? a->ldx : a->in;
    g.wide = a->in % 4 == 0 && g.ldx % 4 == 0 && usli_aligned16(a->x);
    for (int i = 0; i < a->segments; i++) {
        g.a[i] = a->segment[i].lora.a;
        g.wide = g.wide && usli_aligned16(g.a[i]);
        g.rank0[i + 1] = g.rank0[i] + a->segment[i].lora.rank;
    }
    g.ranks = g.rank0[a->segments];
    g.tokens = (int)a->tokens, g.in = a->in, g.x = a->x, g.xa = xa, g.saved = a->xa;
    USLI_BY_DTYPE(a->dtype, T, USLI_LAUNCH_EARLY((unsigned)g.ranks, RANK_THREADS, 0, x, ranks<T>)(g));
}

/* ---- Launching -----------------------------------------------------------------------------------------------------
 */

template <int TYPE> void launch_type(usli_exec *x, const gemv_args *g) {
    int64_t units = 0;
    for (int i = 0; i < g->count; i++) units += usli_ceil_div(g->s[i].rows, ROWS);
    unsigned blocks = (unsigned)usli_ceil_div(units, WARPS);
    USLI_LAUNCH(blocks, THREADS, 0, x, gemv<TYPE>)(*g);
}

template <typename T> usl_status launch_steps(usli_exec *x, const usli_matrix *w, const gemv_args *g) {
    if (w->nf4 && nf4_fits(x, g)) return launch_nf4<T>(x, g);
    launch_tiles<T>(x, w, g);
    return USL_OK;
}

usl_status launch(usli_exec *x, const usli_matrix *w, const gemv_args *g) {
    bool steps = g->wide && g->in % STEP == 0;
    if (steps && g->dtype == USL_BF16) return launch_steps<usli_bf16>(x, w, g);
    if (steps && g->dtype == USL_F16) return launch_steps<usli_f16>(x, w, g);
    if (w->nf4)
        launch_type<ANY_NF4>(x, g);
    else if (w->dtype == USL_I8)
        launch_type<ANY_I8>(x, g);
    else
        USLI_BY_TYPE(w->dtype, TYPE, (launch_type<TYPE>(x, g)))
    return USL_OK;
}

bool same_kind(const usli_matrix *a, const usli_matrix *b) {
    if (!a->nf4 || !b->nf4) return !a->nf4 && !b->nf4 && a->dtype == b->dtype;
    return a->nf4->table == b->nf4->table && a->nf4->map == b->nf4->map; /* which a block reads once */
}

gemv_segment segment_of(const usli_segment *from, int64_t row0, int rank0) {
    gemv_segment s = {};
    const usli_matrix *w = &from->w;
    const usli_traits *t = usli_traits_of(w->dtype);
    s.data = w->data, s.scale = w->scale, s.rows = w->rows, s.row0 = row0;
    s.tiles = (int)usli_ceil_div(w->rows, TILE_ROWS);
    if (w->nf4)
        s.nf4 = *w->nf4;
    else if (w->dtype != USL_I8)
        s.row_bytes = (w->ld ? w->ld : w->cols) / t->block * t->block_bytes;
    s.bias = from->bias, s.bias_dtype = from->bias_dtype;
    s.b = from->lora.b, s.lora_scale = from->lora.scale, s.rank = from->lora.rank, s.rank0 = rank0;
    return s;
}

bool aligned(const usli_matrix *w) {
    return usli_aligned16(w->nf4 ? w->nf4->codes : w->data) && w->ld % 8 == 0;
}

} // namespace

bool usli_cuda_gemv_fits(const usli_linear_args *a) {
    return a->tokens <= MOST_TOKENS && (a->dropout.p == 0 || !usli_linear_ranks(a));
}

size_t usli_cuda_gemv_workspace(const usli_linear_args *a) {
    return (size_t)(a->tokens * usli_linear_ranks(a)) * sizeof(float);
}

usl_status usli_cuda_gemv(usli_exec *x, const usli_linear_args *a, void *ws) {
    gemv_args g = {};
    g.tokens = (int)a->tokens, g.ranks = usli_linear_ranks(a), g.dtype = a->dtype, g.y_dtype = a->y_dtype;
    g.add = a->y_mode == USLI_ACCUMULATE, g.in = a->in;
    g.ldx = a->ldx ? a->ldx : a->in, g.ldy = a->ldy ? a->ldy : a->out;
    g.x = a->x, g.y = a->y, g.xa = static_cast<const float *>(ws);
    if (g.ranks) launch_ranks(x, a, static_cast<float *>(ws));
    int64_t row0 = 0;
    int rank0 = 0;
    for (int i = 0; i < a->segments;) {
        const usli_matrix *w = &a->segment[i].w;
        g.wide = a->in % AT_ONCE == 0 && g.ldx % 8 == 0 && usli_aligned16(a->x);
        for (g.count = 0; i < a->segments && same_kind(w, &a->segment[i].w); i++) {
            g.s[g.count++] = segment_of(&a->segment[i], row0, rank0);
            g.wide = g.wide && aligned(&a->segment[i].w);
            row0 += a->segment[i].w.rows;
            rank0 += a->segment[i].lora.rank;
        }
        USLI_TRY(launch(x, w, &g));
    }
    return usli_launched(x, "linear");
}
