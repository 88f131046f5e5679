/* linear: one product over fused segments. What is not stored in the products' type is decoded into the workspace, all
 * segments in one matrix. The adapters of a group are one stacked A (ranks, in) and one block-diagonal B (out, ranks)
 * with their scales in it, so a group costs two skinny products each way, however many segments it has.
 *
 *   forward   xa = drop(x) A^T;  y = bias + xa B^T;  y += x W^T               (the largest term last)
 *   backward  dyb = dy B;  dB = dy^T xa;  dA = dyb^T drop(x);  dx = drop'(dyb A);  dx += dy W
 *
 * The skinny ones go to kernels of their own (skinny.cuh), dropout inside, where the shapes allow; else they are matrix
 * products like any other. Where there is room behind the rows (usli_linear_room), the second halves are no products of
 * their own: k grows by the ranks, and one product does for base and adapters,
 *
 *   forward   y = [x | xa] [W | B]^T        backward   dx = [dy | dyb] [W; A]
 *
 * on one matrix [[W, B], [A, .]], decoded into the workspace or kept decoded. That saves writing y and dx and reading
 * them again, 13 ms of the 255 of a step below.
 *
 * Llama-3-8B, 4096 tokens: 2 x 218 M x 4096 = 1.79 TFLOP a block and direction, 2.4 ms at 750 TFLOP/s. */
#include "kernels/decode.cuh"
#include "kernels/gemm.cuh"
#include "kernels/gemv.cuh"
#include "kernels/magnitude.cuh"
#include "kernels/skinny.cuh"

extern "C" {
#include "core/ops/dropout.h"
}

namespace {

constexpr int THREADS = 256, ROWS_AT_ONCE = THREADS / USLI_WARP;

/* A matrix as products take it: rows of y from `row` on, ld apart. */
struct piece {
    int64_t row, rows, ld;
    const void *data;
    bool decoded;
};

struct layout {
    const usli_linear_args *a;
    int64_t experts; /* 1 without any */
    usl_dtype dtype;
    size_t e;
    int64_t ldx, ldy, lddx, ldd;
    int64_t grown;  /* by how much k is; 0: it is not */
    int64_t beside; /* columns behind the rows of decoded matrices */
    int ranks;
    bool drops, biased, skinny, adapts; /* adapts: gradients of adapters are wanted */
    bool once;                          /* dy is read once for dyb and dB */
    void *lora_a, *a_turned, *lora_b,
        *b_turned;        /* (ranks, in), (in, ranks), (out, ranks), (ranks, out); NULL: not needed */
    int64_t lda, ldb;     /* of lora_a and lora_b */
    int width_a, width_b; /* their ranks, with those that are padding */
    float *bias;          /* (out), for skinny products */
    void *xa, *dyb, *dy_room, *dx_room, *weights;
    const void *dropped, *dy;
    int64_t lddy;
    float *room, *grad_a, *grad_b; /* gradients in parts that are to be added */
    int parts_a, parts_b;
    int pieces;
    struct piece piece[USLI_MAX_SEGMENTS];
};

size_t bytes_of(usl_dtype d) {
    return d == USL_F32 ? 4 : 2;
}

struct counter {
    char *base;
    size_t used;
    void *take(int64_t values, size_t e) {
        void *p = base ? base + used : nullptr;
        used += ((size_t)values * e + 255) & ~(size_t)255;
        return p;
    }
};

/* The matrix as products take it, when it is there already. */
const void *stored(const layout *l, const usli_matrix *w) {
    return w->cached ? w->cached : w->dtype == l->dtype && !w->nf4 ? w->data : nullptr;
}

/* From row to row of a matrix that is there. */
int64_t ld_of(const layout *l, const usli_matrix *w) {
    int64_t ld = w->cached ? w->cached_ld : w->ld;
    return ld ? ld : l->a->in;
}

/* Consecutive segments that lie behind one another in memory, or in the workspace, are one piece, but for those that
 * are stacks of experts' matrices. */
void add_pieces(layout *l, counter *c) {
    const usli_linear_args *a = l->a;
    int64_t decoded = 0, row = 0, ld = a->in + l->beside;
    for (int i = 0; i < a->segments; i++)
        if (!stored(l, &a->segment[i].w)) decoded += a->segment[i].w.rows;
    l->weights = c->take(decoded ? (decoded + l->grown) * ld : 0, l->e);
    const char *room = static_cast<const char *>(l->weights);
    for (int i = 0; i < a->segments; i++) {
        const usli_matrix *w = &a->segment[i].w;
        piece p = { row, w->rows / l->experts, ld_of(l, w), stored(l, w), false };
        if (!p.data) {
            p.data = room;
            p.ld = ld;
            p.decoded = true;
            room += (size_t)(w->rows * ld) * l->e;
        }
        row += p.rows;
        piece *last = l->pieces ? &l->piece[l->pieces - 1] : nullptr;
        bool joins = last && !a->experts && last->decoded == p.decoded && last->ld == p.ld &&
                     static_cast<const char *>(last->data) + (size_t)(last->rows * p.ld) * l->e == p.data;
        if (joins)
            last->rows += p.rows;
        else
            l->piece[l->pieces++] = p;
    }
}

int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* The same in a dry run, whose addresses are aligned as the real ones. */
bool skinny_fits(const layout *l, usli_pass pass) {
    const usli_linear_args *a = l->a;
    if (a->experts || l->e != 2 || a->y_dtype != a->dtype || l->ranks > USLI_MOST_RANKS) return false;
    if (!usli_skinny_fits(a->x, a->in, l->ldx)) return false;
    return pass == USLI_FORWARD ? usli_skinny_fits(a->y, a->out, l->ldy)
                                : usli_skinny_fits(a->dy, a->out, l->ldy) && usli_skinny_fits(a->dx, a->in, l->lddx);
}

/* Decoded matrices have room behind their rows as those have it that are kept decoded (place.c), used or not: libraries
 * choose their algorithms by strides too, and bits must not depend on what is kept. */
int64_t room_beside(const layout *l, const usli_linear_args *a) {
    if (a->experts || l->e != 2 || a->in % 8 || l->ranks > USLI_MOST_RANKS) return 0;
    for (int i = 0; i < a->segments; i++)
        if (!a->segment[i].w.cached && stored(l, &a->segment[i].w)) return 0;
    return usli_ceil_div(l->ranks, 16) * 16;
}

/* By how much k may grow: there is room behind the rows of both operands, all matrices are decoded in the workspace or
 * all lie behind one another with room, and nothing happens to the adapters' part alone. */
int64_t growth(const layout *l, const usli_linear_args *a, usli_pass pass) {
    int64_t width = usli_ceil_div(l->ranks, 16) * 16;
    if (!l->skinny || !l->ranks || a->room < width) return 0;
    if (pass == USLI_FORWARD ? l->biased : l->drops || !a->dx) return 0;
    const char *next = nullptr;
    for (int i = 0; i < a->segments; i++) {
        const usli_matrix *w = &a->segment[i].w;
        const char *data = static_cast<const char *>(stored(l, w));
        int64_t ld = ld_of(l, w);
        if (i && (data != next || ld != ld_of(l, &a->segment[0].w))) return 0;
        if (data && ld < a->in + width) return 0;
        next = data ? data + (size_t)(w->rows * ld) * l->e : nullptr;
    }
    return width;
}

/* Where B stands in the grown matrix, and A. */
void *grown_b(const layout *l) {
    return static_cast<char *>(const_cast<void *>(l->piece[0].data)) + (size_t)l->a->in * l->e;
}
void *grown_a(const layout *l) {
    return static_cast<char *>(const_cast<void *>(l->piece[0].data)) + (size_t)(l->a->out * l->piece[0].ld) * l->e;
}

void take_forward(layout *l, counter *c) {
    const usli_linear_args *a = l->a;
    l->lora_a = c->take(l->experts * l->ranks * a->in, l->e);
    if (!l->grown) l->lora_b = c->take(l->experts * l->ranks * a->out, l->e);
    if (l->skinny) {
        if (l->biased) l->bias = static_cast<float *>(c->take(a->out, 4));
        if (l->ranks) l->room = static_cast<float *>(c->take(usli_narrow_room(a->tokens, a->in, l->ranks), 4));
    } else if (l->drops) {
        l->dropped = c->take(a->tokens * a->in, l->e);
    }
}

void take_backward(layout *l, counter *c) {
    const usli_linear_args *a = l->a;
    if (a->y_dtype != a->dtype) {
        l->dy = l->dy_room = c->take(a->tokens * a->out, l->e);
        l->lddy = a->out;
    }
    if (!l->ranks) return;
    if (!l->grown) l->lora_a = c->take(l->experts * l->ranks * a->in, l->e);
    l->dyb = c->take(a->tokens * l->ranks, l->e);
    l->parts_a = l->parts_b = 1;
    if (l->skinny) {
        if (!l->grown) l->a_turned = c->take(l->ranks * a->in, l->e);
        l->b_turned = c->take(l->ranks * a->out, l->e);
        l->parts_a = usli_gradient_parts(a->tokens, a->in);
        l->parts_b = l->once ? usli_dy_parts(a->tokens, a->out) : usli_gradient_parts(a->tokens, a->out);
        int64_t in = usli_narrow_room(a->tokens, a->in, l->ranks);
        int64_t out =
            l->once ? usli_dy_room(a->tokens, a->out, l->ranks) : usli_narrow_room(a->tokens, a->out, l->ranks);
        l->room = static_cast<float *>(c->take(most(in, out), 4));
    } else {
        l->lora_b = c->take(l->experts * l->ranks * a->out, l->e);
        if (l->drops) l->dropped = c->take(a->tokens * a->in, l->e);
        if (l->drops) l->dx_room = c->take(a->tokens * a->in, l->e);
    }
    l->grad_a = static_cast<float *>(c->take(l->parts_a * l->experts * l->ranks * a->in, 4));
    l->grad_b = static_cast<float *>(c->take(l->parts_b * l->experts * l->ranks * a->out, 4));
}

size_t lay_out(const usli_exec *x, layout *l, const usli_linear_args *a, usli_pass pass, void *ws) {
    counter c = { static_cast<char *>(ws), 0 };
    *l = layout{};
    l->a = a;
    l->experts = a->experts ? a->experts : 1;
    l->dtype = a->dtype;
    l->e = bytes_of(a->dtype);
    l->ldx = a->ldx ? a->ldx : a->in;
    l->ldy = a->ldy ? a->ldy : a->out;
    l->lddx = a->lddx ? a->lddx : l->ldx;
    l->ranks = usli_linear_ranks(a);
    l->drops = l->ranks && a->dropout.p > 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_lora *lora = &a->segment[i].lora;
        l->biased = l->biased || a->segment[i].bias;
        l->adapts = l->adapts || (lora->rank && (lora->da || lora->db));
    }
    l->skinny = skinny_fits(l, pass);
    l->once = l->skinny && l->adapts && usli_dy_fits(x, l->ranks);
    l->grown = growth(l, a, pass);
    l->beside = room_beside(l, a);
    l->xa = a->xa ? a->xa : c.take(a->tokens * l->ranks, l->e);
    l->dropped = a->x;
    l->dy = a->dy;
    l->lddy = l->ldy;
    if (pass == USLI_FORWARD)
        take_forward(l, &c);
    else
        take_backward(l, &c);
    l->ldd = l->dropped == a->x ? l->ldx : a->in;
    add_pieces(l, &c);
    l->lda = a->in;
    l->ldb = l->width_a = l->width_b = l->ranks;
    if (l->grown && pass == USLI_FORWARD) l->lora_b = grown_b(l), l->ldb = l->piece[0].ld, l->width_b = (int)l->grown;
    if (l->grown && pass == USLI_BACKWARD) l->lora_a = grown_a(l), l->lda = l->piece[0].ld, l->width_a = (int)l->grown;
    return c.used;
}

/* ---- Small kernels -------------------------------------------------------------------------------------------------
 */

/* The adapters of a group, as kernels want them. */
struct adapters {
    int count, ranks;
    int64_t in, out, experts;
    struct {
        const float *a, *b;
        float *da, *db, scale;
        const void *bias;
        usl_dtype bias_dtype;
        int rank, rank0;
        int64_t rows, row0;
    } s[USLI_MAX_SEGMENTS];
};

adapters adapters_of(const layout *l) {
    adapters g = {};
    g.ranks = l->ranks;
    g.in = l->a->in;
    g.out = l->a->out;
    g.experts = l->experts;
    int rank0 = 0;
    int64_t row0 = 0;
    for (int i = 0; i < l->a->segments; i++) {
        const usli_segment *s = &l->a->segment[i];
        auto &d = g.s[g.count++];
        d.a = s->lora.a, d.b = s->lora.b, d.da = s->lora.da, d.db = s->lora.db, d.scale = s->lora.scale;
        d.bias = s->bias, d.bias_dtype = s->bias_dtype;
        d.rank = s->lora.rank, d.rank0 = rank0, d.rows = s->w.rows / l->experts, d.row0 = row0;
        rank0 += d.rank;
        row0 += d.rows;
    }
    return g;
}

/* Where stacked adapters go; NULL: not wanted. Rows of a and of b lie lda and ldb apart; they have width_a and width_b
 * ranks, those beyond the ranks that there are being zero. */
template <typename T> struct stacked {
    T *a, *a_turned, *b, *b_turned;
    float *bias;
    int64_t lda, ldb;
    int width_a, width_b;
};

constexpr int RANKS_A_THREAD = 8;

__device__ __forceinline__ int segment_of_rank(const adapters &g, int r) {
    int s = 0;
    while (s + 1 < g.count && r >= g.s[s + 1].rank0) s++;
    return s;
}

/* Eight ranks of a row, those that there are. */
template <typename T> __device__ __forceinline__ void store_ranks(T *to, const float *v, int count) {
    if (count == RANKS_A_THREAD && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        usli_pack<T, RANKS_A_THREAD> all;
#pragma unroll
        for (int k = 0; k < RANKS_A_THREAD; k++) all.v[k] = from_f32<T>(v[k]);
        store_wide<T, RANKS_A_THREAD>(to, all);
        return;
    }
#pragma unroll
    for (int k = 0; k < RANKS_A_THREAD; k++)
        if (k < count) to[k] = from_f32<T>(v[k]);
}

/* A thread per column of A, then per row of B, for eight ranks of one expert: all eight loads are under way at once. */
template <typename T>
__global__ void __launch_bounds__(THREADS) stack(const __grid_constant__ adapters g, stacked<T> to) {
    await_earlier();
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int first = (int)blockIdx.y * RANKS_A_THREAD, s = 0, count = min(g.ranks - first, RANKS_A_THREAD);
    int64_t expert = blockIdx.z;
    float v[RANKS_A_THREAD] = {};
    if (i < g.in) {
#pragma unroll
        for (int k = 0; k < RANKS_A_THREAD; k++) {
            int r = first + k;
            if (r >= g.ranks) break;
            const auto &d = g.s[segment_of_rank(g, r)];
            v[k] = d.a[(expert * d.rank + r - d.rank0) * g.in + i];
        }
        if (to.a_turned) store_ranks(to.a_turned + i * g.ranks + first, v, count);
#pragma unroll
        for (int k = 0; k < RANKS_A_THREAD; k++)
            if (to.a && first + k < to.width_a) to.a[(expert * g.ranks + first + k) * to.lda + i] = from_f32<T>(v[k]);
        return;
    }
    i -= g.in;
    if (i >= g.out) return;
    while (i >= g.s[s].row0 + g.s[s].rows) s++;
    int64_t row = i - g.s[s].row0;
    if (to.bias && blockIdx.y == 0) to.bias[i] = g.s[s].bias ? load_any(g.s[s].bias, g.s[s].bias_dtype, row) : 0.0f;
    const float *b = g.s[s].b + (expert * g.s[s].rows + row) * g.s[s].rank;
#pragma unroll
    for (int k = 0; k < RANKS_A_THREAD; k++) {
        int own = first + k - g.s[s].rank0;
        v[k] = own >= 0 && own < g.s[s].rank ? g.s[s].scale * b[own] : 0.0f;
    }
    if (to.b) store_ranks(to.b + (expert * g.out + i) * to.ldb + first, v, min(to.width_b - first, RANKS_A_THREAD));
#pragma unroll
    for (int k = 0; k < RANKS_A_THREAD; k++)
        if (to.b_turned && k < count) to.b_turned[(first + k) * g.out + i] = from_f32<T>(v[k]);
}

/* Adds the parts of the stacked gradients to each adapter's own. */
__global__ void __launch_bounds__(THREADS)
    unstack(const __grid_constant__ adapters g, const float *da, int parts_a, const float *db, int parts_b) {
    await_earlier();
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int64_t all_a = g.experts * g.ranks * g.in, all_b = g.experts * g.ranks * g.out;
    int s = 0;
    float sum = 0;
    if (i < all_a) {
        int64_t expert = i / (g.ranks * g.in), r = i / g.in - expert * g.ranks;
        while (r >= g.s[s].rank0 + g.s[s].rank) s++;
        if (!g.s[s].da) return;
#pragma unroll 8
        for (int p = 0; p < parts_a; p++) sum += da[p * all_a + i];
        g.s[s].da[(expert * g.s[s].rank + r - g.s[s].rank0) * g.in + i % g.in] += sum;
        return;
    }
    i -= all_a;
    if (i >= all_b) return;
    int64_t expert = i / (g.ranks * g.out), o = i / g.ranks - expert * g.out;
    int r = (int)(i % g.ranks);
    while (o >= g.s[s].row0 + g.s[s].rows) s++;
    if (!g.s[s].db || r < g.s[s].rank0 || r >= g.s[s].rank0 + g.s[s].rank) return;
#pragma unroll 8
    for (int p = 0; p < parts_b; p++) sum += db[p * all_b + i];
    g.s[s].db[(expert * g.s[s].rows + o - g.s[s].row0) * g.s[s].rank + r - g.s[s].rank0] += g.s[s].scale * sum;
}

/* y = drop(x), or with `add` y += drop(x); four features a thread share a draw. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    drop(usli_dropout d, const T *x, int64_t ldx, T *y, int64_t ldy, int64_t cols, int64_t tokens, bool add) {
    int64_t groups = (cols + 3) / 4, i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= tokens * groups) return;
    int64_t t = i / groups, group = i - t * groups;
    uint32_t word[4], threshold = usli_dropout_threshold(d.p);
    float keep = 1.0f / (1.0f - d.p);
    usli_dropout_words(&d, usli_dropout_key(&d), t, group, word);
    for (int k = 0; k < 4 && group * 4 + k < cols; k++) {
        int64_t c = group * 4 + k;
        float v = word[k] < threshold ? 0.0f : to_f32(x[t * ldx + c]) * keep;
        if (add) v += to_f32(y[t * ldy + c]);
        y[t * ldy + c] = from_f32<T>(v);
    }
}

/* dy in the products' type. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    round_rows(const void *dy, usl_dtype from, int64_t ld, T *to, int64_t cols, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    int64_t t = i / cols;
    to[i] = from_f32<T>(load_any(dy, from, t * ld + (i - t * cols)));
}

/* y[:, 0..cols) = bias, or y += bias. */
__global__ void __launch_bounds__(THREADS)
    put_bias(void *y, usl_dtype dtype, int64_t ld, const void *bias, usl_dtype bias_dtype, int64_t col0, int64_t cols,
             int64_t tokens, bool add) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= tokens * cols) return;
    int64_t t = i / cols, c = i - t * cols, at = t * ld + col0 + c;
    float v = bias ? load_any(bias, bias_dtype, c) : 0.0f;
    if (add) v += load_any(y, dtype, at);
    store_any(y, dtype, at, v);
}

/* Each warp takes every eighth row of 32 columns. */
__global__ void __launch_bounds__(THREADS)
    sum_columns(const void *dy, usl_dtype dtype, int64_t ld, int64_t col0, int64_t cols, int64_t tokens, float *sum) {
    __shared__ float part[ROWS_AT_ONCE][USLI_WARP];
    int lane = (int)threadIdx.x % USLI_WARP, row = (int)threadIdx.x / USLI_WARP;
    int64_t c = (int64_t)blockIdx.x * USLI_WARP + lane;
    float v = 0;
    if (c < cols)
        for (int64_t t = row; t < tokens; t += ROWS_AT_ONCE) v += load_any(dy, dtype, t * ld + col0 + c);
    part[row][lane] = v;
    __syncthreads();
    if (row || c >= cols) return;
    for (int i = 1; i < ROWS_AT_ONCE; i++) v += part[i][lane];
    sum[c] += v;
}

unsigned blocks_for(int64_t n) {
    return (unsigned)usli_ceil_div(n, THREADS);
}

/* ---- Steps ---------------------------------------------------------------------------------------------------------
 */

usl_status product(usli_exec *x, const layout *l, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const void *a,
                   int64_t lda, const void *b, int64_t ldb, void *c, usl_dtype c_type, int64_t ldc, bool add) {
    usli_gemm_args g = {};
    g.m = m, g.n = n, g.k = k;
    g.trans_a = ta, g.trans_b = tb;
    g.type = l->dtype, g.c_type = c_type;
    g.a = a, g.b = b, g.c = c;
    g.lda = lda, g.ldb = ldb, g.ldc = ldc;
    g.alpha = 1.0f, g.beta = add ? 1.0f : 0.0f;
    /* What an expert has of its own is packed, one after the other. */
    g.groups = l->a->experts, g.offsets = l->a->expert_offsets, g.stride = ta ? m * n : n * k;
    return usli_gemm(x, &g);
}

void *offset(const void *p, size_t e, int64_t i) {
    return const_cast<char *>(static_cast<const char *>(p)) + (size_t)i * e;
}

usl_status decode_weights(usli_exec *x, const layout *l) {
    char *room = static_cast<char *>(l->weights);
    for (int i = 0; i < l->a->segments; i++) {
        const usli_matrix *w = &l->a->segment[i].w;
        if (stored(l, w)) continue;
        USLI_TRY(usli_cuda_decode(x, w, l->dtype, room, l->a->in + l->beside));
        room += (size_t)(w->rows * (l->a->in + l->beside)) * l->e;
    }
    return USL_OK;
}

void stack_adapters(usli_exec *x, const layout *l) {
    adapters g = adapters_of(l);
    int64_t width = most(most(l->width_a, l->width_b), 1);
    dim3 grid(blocks_for(g.in + g.out), (unsigned)usli_ceil_div(width, RANKS_A_THREAD), (unsigned)g.experts);
    USLI_BY_DTYPE(l->dtype, T,
                  stacked<T> to = { static_cast<T *>(l->lora_a), static_cast<T *>(l->a_turned),
                                    static_cast<T *>(l->lora_b), static_cast<T *>(l->b_turned), l->bias, l->lda, l->ldb,
                                    l->width_a, l->width_b };
                  USLI_LAUNCH_EARLY(grid, THREADS, 0, x, stack<T>)(g, to));
}

void launch_drop(usli_exec *x, const layout *l, const void *from, int64_t ld_from, void *to, int64_t ld_to, bool add) {
    const usli_linear_args *a = l->a;
    USLI_BY_DTYPE(l->dtype, T,
                  USLI_LAUNCH(blocks_for(a->tokens * ((a->in + 3) / 4)), THREADS, 0, x,
                              drop<T>)(a->dropout, static_cast<const T *>(from), ld_from, static_cast<T *>(to), ld_to,
                                       a->in, a->tokens, add));
}

usli_wide wide_x(const layout *l, const void *x) {
    return { const_cast<void *>(x), l->a->tokens, l->a->in, l->ldx, l->drops ? &l->a->dropout : nullptr };
}

usli_wide wide_y(const layout *l, const void *y) {
    return { const_cast<void *>(y), l->a->tokens, l->a->out, l->ldy, nullptr };
}

/* `beside` x too, where k grows. */
usl_status make_xa(usli_exec *x, const layout *l, bool beside) {
    const usli_linear_args *a = l->a;
    if (l->skinny) {
        usli_wide w = wide_x(l, a->x);
        return usli_narrow(x, l->dtype, &w, l->lora_a, l->lda, l->ranks, l->xa,
                           beside ? offset(a->x, l->e, a->in) : nullptr, l->ldx, l->room);
    }
    if (l->drops) launch_drop(x, l, a->x, l->ldx, const_cast<void *>(l->dropped), a->in, false);
    return product(x, l, false, true, a->tokens, l->ranks, a->in, l->dropped, l->ldd, l->lora_a, a->in, l->xa, l->dtype,
                   l->ranks, false);
}

/* y = bias + xa B^T; *started: y has something in it. */
usl_status add_adapters(usli_exec *x, const layout *l, bool *started) {
    const usli_linear_args *a = l->a;
    *started = a->y_mode == USLI_ACCUMULATE;
    if (!l->ranks && !l->biased) return USL_OK;
    if (l->ranks || l->skinny) stack_adapters(x, l);
    if (l->ranks) USLI_TRY(make_xa(x, l, l->grown));
    if (l->grown) return USL_OK;
    bool add = *started;
    *started = true;
    if (l->skinny) {
        usli_wide y = wide_y(l, a->y);
        return usli_expand(x, l->dtype, &y, l->xa, l->lora_b, l->ranks, l->bias, add);
    }
    int64_t col = 0;
    for (int i = 0; l->biased && i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        USLI_LAUNCH(blocks_for(a->tokens * s->w.rows), THREADS, 0, x, put_bias)
        (a->y, a->y_dtype, l->ldy, s->bias, s->bias_dtype, col, s->w.rows, a->tokens, add);
        col += s->w.rows;
    }
    return l->ranks ? product(x, l, false, true, a->tokens, a->out, l->ranks, l->xa, l->ranks, l->lora_b, l->ranks,
                              a->y, a->y_dtype, l->ldy, add || l->biased)
                    : USL_OK;
}

usl_status forward(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    bool started;
    USLI_TRY(add_adapters(x, l, &started));
    USLI_TRY(decode_weights(x, l));
    for (int i = 0; i < l->pieces; i++) {
        const piece *p = &l->piece[i];
        USLI_TRY(product(x, l, false, true, a->tokens, p->rows, a->in + l->grown, a->x, l->ldx, p->data, p->ld,
                         offset(a->y, bytes_of(a->y_dtype), p->row), a->y_dtype, l->ldy, started));
    }
    return usli_launched(x, "linear");
}

/* And dB, from the same reading of dy. */
usl_status make_dyb(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    if (!l->skinny)
        return product(x, l, false, false, a->tokens, l->ranks, a->out, l->dy, l->lddy, l->lora_b, l->ranks, l->dyb,
                       l->dtype, l->ranks, false);
    usli_wide dy = wide_y(l, l->dy);
    void *beside = l->grown ? offset(l->dy, l->e, a->out) : nullptr;
    if (l->once)
        return usli_dy_products(x, l->dtype, &dy, l->b_turned, l->xa, l->ranks, l->dyb, beside, l->lddy, l->grad_b,
                                l->room);
    return usli_narrow(x, l->dtype, &dy, l->b_turned, a->out, l->ranks, l->dyb, beside, l->lddy, l->room);
}

usl_status adapter_gradients(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    adapters g = adapters_of(l);
    if (l->skinny) {
        usli_wide in = wide_x(l, a->x), dy = wide_y(l, l->dy);
        float *db = l->once ? nullptr : l->grad_b;
        USLI_TRY(usli_gradients(x, l->dtype, &in, &dy, l->dyb, l->xa, l->ranks, l->grad_a, db));
    } else {
        if (l->drops && a->xa) launch_drop(x, l, a->x, l->ldx, const_cast<void *>(l->dropped), a->in, false);
        USLI_TRY(product(x, l, true, false, l->ranks, a->in, a->tokens, l->dyb, l->ranks, l->dropped, l->ldd, l->grad_a,
                         USL_F32, a->in, false));
        USLI_TRY(product(x, l, true, false, a->out, l->ranks, a->tokens, l->dy, l->lddy, l->xa, l->ranks, l->grad_b,
                         USL_F32, l->ranks, false));
    }
    USLI_LAUNCH_EARLY(blocks_for(g.experts * g.ranks * (g.in + g.out)), THREADS, 0, x, unstack)
    (g, l->grad_a, l->parts_a, l->grad_b, l->parts_b);
    return USL_OK;
}

/* dx (+)= drop'(dyb A). */
usl_status start_dx(usli_exec *x, const layout *l, bool add) {
    const usli_linear_args *a = l->a;
    if (l->skinny) {
        usli_wide dx = wide_x(l, a->dx);
        dx.ld = l->lddx;
        return usli_expand(x, l->dtype, &dx, l->dyb, l->a_turned, l->ranks, nullptr, add);
    }
    void *to = l->drops ? l->dx_room : a->dx;
    USLI_TRY(product(x, l, false, false, a->tokens, a->in, l->ranks, l->dyb, l->ranks, l->lora_a, a->in, to, l->dtype,
                     l->drops ? a->in : l->lddx, !l->drops && add));
    if (l->drops) launch_drop(x, l, to, a->in, a->dx, l->lddx, add);
    return USL_OK;
}

usl_status make_dx(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    bool started = a->dx_mode == USLI_ACCUMULATE;
    if (l->ranks && !l->grown) {
        USLI_TRY(start_dx(x, l, started));
        started = true;
    }
    USLI_TRY(decode_weights(x, l));
    for (int i = 0; i < l->pieces; i++) {
        const piece *p = &l->piece[i];
        USLI_TRY(product(x, l, false, false, a->tokens, a->in, p->rows + l->grown, offset(l->dy, l->e, p->row), l->lddy,
                         p->data, p->ld, a->dx, l->dtype, l->lddx, started));
        started = true;
    }
    return USL_OK;
}

usl_status backward(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    bool wants_x = false;
    int64_t col = 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        wants_x = wants_x || s->dw;
        if (s->dbias) USLI_LAUNCH((unsigned)usli_ceil_div(s->w.rows, USLI_WARP), THREADS, 0, x, sum_columns)
        (a->dy, a->y_dtype, l->ldy, col, s->w.rows, a->tokens, s->dbias);
        col += s->w.rows;
    }
    if ((l->adapts || wants_x) && !a->x)
        return usli_fail(x->ctx, USL_ERR_INTERNAL, "linear: parameter gradients need x");
    if (l->dy_room)
        USLI_BY_DTYPE(l->dtype, T,
                      USLI_LAUNCH(blocks_for(a->tokens * a->out), THREADS, 0, x, round_rows<T>)(
                          a->dy, a->y_dtype, l->ldy, static_cast<T *>(l->dy_room), a->out, a->tokens * a->out));
    if (l->ranks) {
        stack_adapters(x, l);
        if (l->adapts && !a->xa) USLI_TRY(make_xa(x, l, false));
        USLI_TRY(make_dyb(x, l));
    }
    if (l->adapts) USLI_TRY(adapter_gradients(x, l));
    col = 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        int64_t rows = s->w.rows / l->experts;
        if (s->dw)
            USLI_TRY(product(x, l, true, false, rows, a->in, a->tokens, offset(l->dy, l->e, col), l->lddy, a->x, l->ldx,
                             s->dw, USL_F32, a->in, true));
        col += rows;
    }
    if (a->dx) USLI_TRY(make_dx(x, l)); /* last: dx may stand where x stood */
    return usli_launched(x, "linear");
}

size_t plain_workspace(const usli_exec *x, const usli_linear_args *a, usli_pass pass) {
    layout l;
    if (pass == USLI_FORWARD && !a->experts && usli_cuda_gemv_fits(a)) return usli_cuda_gemv_workspace(a);
    return lay_out(x, &l, a, pass, nullptr);
}

usl_status run_plain(usli_exec *x, const usli_linear_args *a, usli_pass pass, void *ws) {
    if (pass == USLI_FORWARD && !a->experts && usli_cuda_gemv_fits(a)) return usli_cuda_gemv(x, a, ws);
    layout l;
    lay_out(x, &l, a, pass, ws);
    return pass == USLI_FORWARD ? forward(x, &l) : backward(x, &l);
}

/* ---- DoRA: the plain op between two walks over y or dy -------------------------------------------------------------
 */

bool is_magnified(const usli_linear_args *a) {
    for (int i = 0; i < a->segments; i++)
        if (a->segment[i].lora.magnitude) return true;
    return false;
}

struct magnified {
    usli_segment segment[USLI_MAX_SEGMENTS];
    usli_linear_args forward, backward; /* the plain ops */
    bool again;                         /* backward needs z, which it makes again */
    void *z, *dz, *inner;
    size_t bytes; /* up to inner */
};

void lay_out(magnified *g, const usli_linear_args *a, usli_pass pass, void *ws) {
    counter c = { static_cast<char *>(ws), 0 };
    *g = magnified{};
    for (int i = 0; i < a->segments; i++) {
        g->segment[i] = a->segment[i];
        g->segment[i].bias = nullptr, g->segment[i].dbias = nullptr, g->segment[i].lora.magnitude = nullptr;
        g->again = g->again || (pass == USLI_BACKWARD && a->segment[i].lora.dmagnitude);
    }
    g->forward = g->backward = *a;
    g->forward.segment = g->backward.segment = g->segment;
    if (pass == USLI_BACKWARD || a->y_mode == USLI_ACCUMULATE) {
        if (g->again || pass == USLI_FORWARD) g->z = c.take(a->tokens * a->out, bytes_of(a->y_dtype));
        g->forward.y = g->z, g->forward.ldy = 0, g->forward.y_mode = USLI_ASSIGN;
    } else {
        g->z = a->y;
    }
    if (pass == USLI_BACKWARD) {
        g->forward.xa = nullptr; /* what was saved stays */
        g->dz = c.take(a->tokens * a->out, bytes_of(a->y_dtype));
        g->backward.dy = g->dz, g->backward.ldy = g->backward.room = 0;
    }
    g->bytes = c.used;
    g->inner = c.take(0, 1);
}

size_t magnified_workspace(const usli_exec *x, const usli_linear_args *a, usli_pass pass) {
    magnified g;
    lay_out(&g, a, pass, nullptr);
    size_t inner = pass == USLI_FORWARD || g.again ? plain_workspace(x, &g.forward, USLI_FORWARD) : 0;
    if (pass == USLI_BACKWARD) {
        size_t other = plain_workspace(x, &g.backward, USLI_BACKWARD);
        inner = inner > other ? inner : other;
    }
    return g.bytes + inner;
}

usl_status run_magnified(usli_exec *x, const usli_linear_args *a, usli_pass pass, void *ws) {
    magnified g;
    lay_out(&g, a, pass, ws);
    if (pass == USLI_FORWARD || g.again) USLI_TRY(run_plain(x, &g.forward, USLI_FORWARD, g.inner));
    if (pass == USLI_FORWARD) return usli_magnify(x, a, g.z, g.z != a->y ? a->out : a->ldy ? a->ldy : a->out);
    USLI_TRY(usli_magnify_backward(x, a, g.z, g.dz));
    return run_plain(x, &g.backward, USLI_BACKWARD, g.inner);
}

size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_linear_args *a = static_cast<const usli_linear_args *>(args);
    return is_magnified(a) ? magnified_workspace(x, a, pass) : plain_workspace(x, a, pass);
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_linear_args *a = static_cast<const usli_linear_args *>(args);
    for (int i = 0; i < a->segments; i++) USLI_TRY(usli_cuda_decode_check(x, &a->segment[i].w, "linear"));
    if (!a->tokens) return USL_OK;
    return is_magnified(a) ? run_magnified(x, a, pass, ws) : run_plain(x, a, pass, ws);
}

} // namespace

extern "C" const usli_op_impl usli_cuda_linear = { run, workspace };
