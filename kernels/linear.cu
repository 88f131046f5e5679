/* linear: one product over fused segments. What is not stored in the products' type is decoded into the workspace, all
 * segments in one matrix. The adapters of a group are one stacked A (ranks, in) and one block-diagonal B (out, ranks)
 * with their scales in it, so a group costs two skinny products each way, however many segments it has.
 *
 *   forward   xa = drop(x) A^T;  y = bias + xa B^T;  y += x W^T                    (the largest term last: rounded
 * once) backward  dyb = dy B;  dA = dyb^T drop(x);  dB = dy^T xa;  dx = drop'(dyb A);  dx += dy W
 *
 * Llama-3-8B, 4096 tokens: 2 x 218 M x 4096 = 1.79 TFLOP a block and direction, 2.4 ms at 750 TFLOP/s. */
#include "kernels/decode.cuh"
#include "kernels/gemm.cuh"

extern "C" {
#include "core/ops/dropout.h"
}

namespace {

constexpr int THREADS = 256;

/* A matrix as products take it: rows of y from `row` on. */
struct piece {
    int64_t row, rows;
    const void *data;
    bool decoded;
};

struct layout {
    const usli_linear_args *a;
    usl_dtype dtype;
    size_t e;
    int64_t ldx, ldy, ldd;
    int ranks;
    bool drops;
    void *lora_a, *lora_b, *xa, *dyb, *dy_room, *dx_room, *weights;
    const void *dropped, *dy;
    int64_t lddy;
    float *grad_a, *grad_b;
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

/* Consecutive segments that lie behind one another in memory, or in the workspace, are one piece. */
void add_pieces(layout *l, counter *c) {
    const usli_linear_args *a = l->a;
    int64_t decoded = 0, row = 0;
    for (int i = 0; i < a->segments; i++)
        if (!stored(l, &a->segment[i].w)) decoded += a->segment[i].w.rows * a->in;
    l->weights = c->take(decoded, l->e);
    const char *room = static_cast<const char *>(l->weights);
    for (int i = 0; i < a->segments; i++) {
        const usli_matrix *w = &a->segment[i].w;
        size_t bytes = (size_t)(w->rows * a->in) * l->e;
        piece p = { row, w->rows, stored(l, w), false };
        if (!p.data) {
            p.data = room;
            p.decoded = true;
            room += bytes;
        }
        row += w->rows;
        piece *last = l->pieces ? &l->piece[l->pieces - 1] : nullptr;
        bool joins = last && last->decoded == p.decoded &&
                     static_cast<const char *>(last->data) + (size_t)(last->rows * a->in) * l->e == p.data;
        if (joins)
            last->rows += p.rows;
        else
            l->piece[l->pieces++] = p;
    }
}

size_t lay_out(layout *l, const usli_linear_args *a, usli_pass pass, void *ws) {
    counter c = { static_cast<char *>(ws), 0 };
    bool back = pass == USLI_BACKWARD;
    *l = layout{};
    l->a = a;
    l->dtype = a->dtype;
    l->e = bytes_of(a->dtype);
    l->ldx = a->ldx ? a->ldx : a->in;
    l->ldy = a->ldy ? a->ldy : a->out;
    l->ranks = usli_linear_ranks(a);
    l->drops = l->ranks && a->dropout.p > 0;
    l->lora_a = c.take(l->ranks * a->in, l->e);
    l->lora_b = c.take(l->ranks * a->out, l->e);
    l->xa = a->xa ? a->xa : c.take(a->tokens * l->ranks, l->e);
    l->dropped = l->drops ? c.take(a->tokens * a->in, l->e) : a->x;
    l->ldd = l->drops ? a->in : l->ldx;
    l->dy = a->dy;
    l->lddy = l->ldy;
    if (back) {
        l->dyb = c.take(a->tokens * l->ranks, l->e);
        l->grad_a = static_cast<float *>(c.take(l->ranks * a->in, 4));
        l->grad_b = static_cast<float *>(c.take(l->ranks * a->out, 4));
        if (l->drops) l->dx_room = c.take(a->tokens * a->in, l->e);
        if (a->y_dtype != a->dtype) {
            l->dy = l->dy_room = c.take(a->tokens * a->out, l->e);
            l->lddy = a->out;
        }
    }
    add_pieces(l, &c);
    return c.used;
}

/* ---- Small kernels -------------------------------------------------------------------------------------------------
 */

/* The adapters of a group, as kernels want them. */
struct adapters {
    int count, ranks;
    int64_t in, out;
    struct {
        const float *a, *b;
        float *da, *db, scale;
        int rank, rank0;
        int64_t rows, row0;
    } s[USLI_MAX_SEGMENTS];
};

adapters adapters_of(const layout *l) {
    adapters g = {};
    g.ranks = l->ranks;
    g.in = l->a->in;
    g.out = l->a->out;
    int rank0 = 0;
    int64_t row0 = 0;
    for (int i = 0; i < l->a->segments; i++) {
        const usli_segment *s = &l->a->segment[i];
        if (s->lora.rank) {
            auto &d = g.s[g.count++];
            d.a = s->lora.a, d.b = s->lora.b, d.da = s->lora.da, d.db = s->lora.db, d.scale = s->lora.scale;
            d.rank = s->lora.rank, d.rank0 = rank0, d.rows = s->w.rows, d.row0 = row0;
        }
        rank0 += s->lora.rank;
        row0 += s->w.rows;
    }
    return g;
}

template <typename T> __global__ void __launch_bounds__(THREADS) stack(adapters g, T *a, T *b) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, all_a = g.ranks * g.in;
    if (i < all_a) {
        int64_t r = i / g.in;
        for (int s = 0; s < g.count; s++)
            if (r >= g.s[s].rank0 && r < g.s[s].rank0 + g.s[s].rank)
                a[i] = from_f32<T>(g.s[s].a[i - g.s[s].rank0 * g.in]);
        return;
    }
    i -= all_a;
    if (i >= g.ranks * g.out) return;
    int64_t o = i / g.ranks;
    int r = (int)(i - o * g.ranks);
    float v = 0;
    for (int s = 0; s < g.count; s++)
        if (r >= g.s[s].rank0 && r < g.s[s].rank0 + g.s[s].rank && o >= g.s[s].row0 && o < g.s[s].row0 + g.s[s].rows)
            v = g.s[s].scale * g.s[s].b[(o - g.s[s].row0) * g.s[s].rank + r - g.s[s].rank0];
    b[i] = from_f32<T>(v);
}

/* Adds the stacked gradients to each adapter's own. */
__global__ void __launch_bounds__(THREADS) unstack(adapters g, const float *da, const float *db) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, all_a = g.ranks * g.in;
    if (i < all_a) {
        int64_t r = i / g.in;
        for (int s = 0; s < g.count; s++)
            if (g.s[s].da && r >= g.s[s].rank0 && r < g.s[s].rank0 + g.s[s].rank)
                g.s[s].da[i - g.s[s].rank0 * g.in] += da[i];
        return;
    }
    i -= all_a;
    if (i >= g.ranks * g.out) return;
    int64_t o = i / g.ranks;
    int r = (int)(i - o * g.ranks);
    for (int s = 0; s < g.count; s++)
        if (g.s[s].db && r >= g.s[s].rank0 && r < g.s[s].rank0 + g.s[s].rank && o >= g.s[s].row0 &&
            o < g.s[s].row0 + g.s[s].rows)
            g.s[s].db[(o - g.s[s].row0) * g.s[s].rank + r - g.s[s].rank0] += g.s[s].scale * db[i];
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

__global__ void __launch_bounds__(THREADS)
    sum_columns(const void *dy, usl_dtype dtype, int64_t ld, int64_t col0, int64_t cols, int64_t tokens, float *sum) {
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c >= cols) return;
    float v = 0;
    for (int64_t t = 0; t < tokens; t++) v += load_any(dy, dtype, t * ld + col0 + c);
    sum[c] += v;
}

unsigned blocks_for(int64_t n) {
    return (unsigned)usli_ceil_div(n, THREADS);
}

/* ---- Steps ---------------------------------------------------------------------------------------------------------
 */

usl_status product(usli_exec *x, const layout *l, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const void *a,
                   int64_t lda, const void *b, int64_t ldb, void *c, usl_dtype c_type, int64_t ldc, bool add) {
    usli_gemm_args g = { m, n, k, ta, tb, l->dtype, c_type, a, b, c, lda, ldb, ldc, 1.0f, add ? 1.0f : 0.0f };
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
        USLI_TRY(usli_cuda_decode(x, w, l->dtype, room, l->a->in));
        room += (size_t)(w->rows * l->a->in) * l->e;
    }
    return USL_OK;
}

void stack_adapters(usli_exec *x, const layout *l) {
    adapters g = adapters_of(l);
    USLI_BY_DTYPE(l->dtype, T,
                  USLI_LAUNCH(blocks_for(g.ranks * (g.in + g.out)), THREADS, 0, x,
                              stack<T>)(g, static_cast<T *>(l->lora_a), static_cast<T *>(l->lora_b)));
}

void launch_drop(usli_exec *x, const layout *l, const void *from, int64_t ld_from, void *to, int64_t ld_to, bool add) {
    const usli_linear_args *a = l->a;
    USLI_BY_DTYPE(l->dtype, T,
                  USLI_LAUNCH(blocks_for(a->tokens * ((a->in + 3) / 4)), THREADS, 0, x,
                              drop<T>)(a->dropout, static_cast<const T *>(from), ld_from, static_cast<T *>(to), ld_to,
                                       a->in, a->tokens, add));
}

usl_status make_xa(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    return product(x, l, false, true, a->tokens, l->ranks, a->in, l->dropped, l->ldd, l->lora_a, a->in, l->xa, l->dtype,
                   l->ranks, false);
}

usl_status forward(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    size_t ye = bytes_of(a->y_dtype);
    bool started = a->y_mode == USLI_ACCUMULATE, biased = false;
    for (int i = 0; i < a->segments; i++) biased = biased || a->segment[i].bias;
    if (biased) {
        int64_t col = 0;
        for (int i = 0; i < a->segments; i++) {
            const usli_segment *s = &a->segment[i];
            USLI_LAUNCH(blocks_for(a->tokens * s->w.rows), THREADS, 0, x, put_bias)
            (a->y, a->y_dtype, l->ldy, s->bias, s->bias_dtype, col, s->w.rows, a->tokens, started);
            col += s->w.rows;
        }
        started = true;
    }
    if (l->ranks) {
        stack_adapters(x, l);
        if (l->drops) launch_drop(x, l, a->x, l->ldx, const_cast<void *>(l->dropped), a->in, false);
        USLI_TRY(make_xa(x, l));
        USLI_TRY(product(x, l, false, true, a->tokens, a->out, l->ranks, l->xa, l->ranks, l->lora_b, l->ranks, a->y,
                         a->y_dtype, l->ldy, started));
        started = true;
    }
    USLI_TRY(decode_weights(x, l));
    for (int i = 0; i < l->pieces; i++) {
        const piece *p = &l->piece[i];
        USLI_TRY(product(x, l, false, true, a->tokens, p->rows, a->in, a->x, l->ldx, p->data, a->in,
                         offset(a->y, ye, p->row), a->y_dtype, l->ldy, started));
    }
    return usli_launched(x, "linear");
}

usl_status adapter_gradients(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    adapters g = adapters_of(l);
    USLI_TRY(product(x, l, true, false, l->ranks, a->in, a->tokens, l->dyb, l->ranks, l->dropped, l->ldd, l->grad_a,
                     USL_F32, a->in, false));
    USLI_TRY(product(x, l, true, false, a->out, l->ranks, a->tokens, l->dy, l->lddy, l->xa, l->ranks, l->grad_b,
                     USL_F32, l->ranks, false));
    USLI_LAUNCH(blocks_for(g.ranks * (g.in + g.out)), THREADS, 0, x, unstack)(g, l->grad_a, l->grad_b);
    return USL_OK;
}

usl_status make_dx(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    bool started = a->dx_mode == USLI_ACCUMULATE;
    if (l->ranks) {
        void *to = l->drops ? l->dx_room : a->dx;
        USLI_TRY(product(x, l, false, false, a->tokens, a->in, l->ranks, l->dyb, l->ranks, l->lora_a, a->in, to,
                         l->dtype, l->drops ? a->in : l->ldx, !l->drops && started));
        if (l->drops) launch_drop(x, l, to, a->in, a->dx, l->ldx, started);
        started = true;
    }
    USLI_TRY(decode_weights(x, l));
    for (int i = 0; i < l->pieces; i++) {
        const piece *p = &l->piece[i];
        USLI_TRY(product(x, l, false, false, a->tokens, a->in, p->rows, offset(l->dy, l->e, p->row), l->lddy, p->data,
                         a->in, a->dx, l->dtype, l->ldx, started));
        started = true;
    }
    return USL_OK;
}

usl_status backward(usli_exec *x, const layout *l) {
    const usli_linear_args *a = l->a;
    bool adapts = false, wants_x = false;
    int64_t col = 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        adapts = adapts || (s->lora.rank && (s->lora.da || s->lora.db));
        wants_x = wants_x || s->dw;
        if (s->dbias) USLI_LAUNCH(blocks_for(s->w.rows), THREADS, 0, x, sum_columns)
        (a->dy, a->y_dtype, l->ldy, col, s->w.rows, a->tokens, s->dbias);
        col += s->w.rows;
    }
    if ((adapts || wants_x) && !a->x) return usli_fail(x->ctx, USL_ERR_INTERNAL, "linear: parameter gradients need x");
    if (l->dy_room)
        USLI_BY_DTYPE(l->dtype, T,
                      USLI_LAUNCH(blocks_for(a->tokens * a->out), THREADS, 0, x, round_rows<T>)(
                          a->dy, a->y_dtype, l->ldy, static_cast<T *>(l->dy_room), a->out, a->tokens * a->out));
    if (l->ranks) {
        stack_adapters(x, l);
        if (adapts && l->drops) launch_drop(x, l, a->x, l->ldx, const_cast<void *>(l->dropped), a->in, false);
        if (adapts && !a->xa) USLI_TRY(make_xa(x, l));
        USLI_TRY(product(x, l, false, false, a->tokens, l->ranks, a->out, l->dy, l->lddy, l->lora_b, l->ranks, l->dyb,
                         l->dtype, l->ranks, false));
    }
    if (adapts) USLI_TRY(adapter_gradients(x, l));
    col = 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        if (s->dw)
            USLI_TRY(product(x, l, true, false, s->w.rows, a->in, a->tokens, offset(l->dy, l->e, col), l->lddy, a->x,
                             l->ldx, s->dw, USL_F32, a->in, true));
        col += s->w.rows;
    }
    if (a->dx) USLI_TRY(make_dx(x, l)); /* last: dx may stand where x stood */
    return usli_launched(x, "linear");
}

size_t workspace(const usli_exec *, const void *args, usli_pass pass) {
    layout l;
    return lay_out(&l, static_cast<const usli_linear_args *>(args), pass, nullptr);
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_linear_args *a = static_cast<const usli_linear_args *>(args);
    for (int i = 0; i < a->segments; i++) {
        USLI_TRY(usli_cuda_decode_check(x, &a->segment[i].w, "linear"));
        if (a->segment[i].lora.magnitude)
            return usli_fail(x->ctx, USL_ERR_UNSUPPORTED,
                             "linear: DoRA is not supported by this backend; use use_dora = false");
    }
    if (!a->tokens) return USL_OK;
    layout l;
    lay_out(&l, a, pass, ws);
    return pass == USLI_FORWARD ? forward(x, &l) : backward(x, &l);
}

} // namespace

extern "C" const usli_op_impl usli_cuda_linear = { run, workspace };
