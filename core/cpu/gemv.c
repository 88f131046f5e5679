#include "core/cpu/gemv.h"

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/decode.h"
#include "core/cpu/vec.h"

enum { ROWS = 16 /* of a task */, CHUNK = 1024 /* a multiple of every type's block */ };

typedef struct gemv {
    const usli_linear_args *a;
    const usli_vec *vec;
    int ranks;
    float *x;  /* (tokens, in) */
    float *xa; /* (tokens, ranks), rounded to dtype */
} gemv;

bool usli_gemv_fits(const usli_linear_args *a) {
    return a->tokens <= USLI_GEMV_TOKENS && a->dropout.p == 0;
}

static size_t aligned(int64_t floats) {
    return ((size_t)floats * sizeof(float) + 63) & ~(size_t)63;
}

size_t usli_gemv_workspace(const usli_linear_args *a) {
    return aligned(a->tokens * a->in) + aligned(a->tokens * usli_linear_ranks(a));
}

static void round_to(const usli_vec *v, float *values, usl_dtype dtype, int64_t n) {
    uint16_t rounded[CHUNK]; /* n <= CHUNK */
    if (dtype == USL_F32) return;
    usli_row_store(v, values, rounded, dtype, n);
    usli_row_load(v, rounded, dtype, values, n);
}

/* sums[t] += row . x_t for a row of a matrix that is rounded to bfloat16 where products are. */
static void multiply_row(const gemv *g, const usli_matrix *w, int64_t row, const float *x, float *sums) {
    usl_dtype round = g->a->dtype == USL_BF16 ? USL_BF16 : USL_F32;
    if (w->dtype == USL_BF16 && g->a->tokens == 1) {
        sums[0] += g->vec->dot_bf16(usli_matrix_at(w, row, 0), x, w->cols);
        return;
    }
    float chunk[CHUNK];
    for (int64_t i = 0; i < w->cols; i += CHUNK) {
        int64_t n = w->cols - i < CHUNK ? w->cols - i : CHUNK;
        const float *values = chunk;
        if (w->dtype == USL_F32 && round == USL_F32)
            values = usli_matrix_at(w, row, i);
        else
            usli_matrix_read(w, row, i, n, round, chunk);
        for (int64_t t = 0; t < g->a->tokens; t++) sums[t] += g->vec->dot(values, x + t * w->cols + i, n);
    }
}

/* The segment whose A holds row r of all the A together; r becomes the row in it. */
static const usli_segment *segment_of_rank(const usli_linear_args *a, int64_t *r) {
    const usli_segment *s = a->segment;
    for (; *r >= s->lora.rank; s++) *r -= s->lora.rank;
    return s;
}

static void multiply_a(void *arg, int64_t task, int worker) {
    const gemv *g = arg;
    (void)worker;
    int64_t row = task;
    const usli_segment *s = segment_of_rank(g->a, &row);
    usli_matrix a = { .dtype = USL_F32, .rows = s->lora.rank, .cols = g->a->in, .data = s->lora.a };
    float sums[USLI_GEMV_TOKENS] = { 0 };
    multiply_row(g, &a, row, g->x, sums);
    round_to(g->vec, sums, g->a->dtype, g->a->tokens);
    for (int64_t t = 0; t < g->a->tokens; t++) g->xa[t * g->ranks + task] = sums[t];
}

static void add_adapter(const gemv *g, const usli_segment *s, int64_t row, int rank_offset, float *sums) {
    enum { PIECE = 64 };
    float b[PIECE], added[USLI_GEMV_TOKENS] = { 0 };
    for (int64_t i = 0; i < s->lora.rank; i += PIECE) {
        int64_t n = s->lora.rank - i < PIECE ? s->lora.rank - i : PIECE;
        usli_to_f32(s->lora.b + row * s->lora.rank + i, USL_F32, b, n);
        if (g->a->dtype == USL_BF16) round_to(g->vec, b, USL_BF16, n);
        for (int64_t t = 0; t < g->a->tokens; t++)
            added[t] += g->vec->dot(b, g->xa + t * g->ranks + rank_offset + i, n);
    }
    for (int64_t t = 0; t < g->a->tokens; t++) sums[t] += s->lora.scale * added[t];
}

static void multiply_w(void *arg, int64_t task, int worker) {
    const gemv *g = arg;
    const usli_linear_args *a = g->a;
    (void)worker;
    for (int64_t out = task * ROWS; out < a->out && out < (task + 1) * ROWS; out++) {
        const usli_segment *s = a->segment;
        int64_t row = out;
        int rank_offset = 0;
        for (; row >= s->w.rows; s++) {
            row -= s->w.rows;
            rank_offset += s->lora.rank;
        }
        float sums[USLI_GEMV_TOKENS] = { 0 };
        multiply_row(g, &s->w, row, g->x, sums);
        if (s->lora.rank) add_adapter(g, s, row, rank_offset, sums);
        float bias = s->bias ? usli_get_float(s->bias, s->bias_dtype, row) : 0;
        int64_t ldy = a->ldy ? a->ldy : a->out;
        for (int64_t t = 0; t < a->tokens; t++) {
            void *y = (char *)a->y + (size_t)(t * ldy + out) * usli_dtype_bytes(a->y_dtype);
            float value = sums[t] + bias;
            if (a->y_mode == USLI_ACCUMULATE) value += usli_get_float(y, a->y_dtype, 0);
            usli_from_f32(&value, y, a->y_dtype, 1);
        }
    }
}

void usli_gemv_run(usli_exec *x, const usli_linear_args *a, void *ws) {
    gemv g = { .a = a, .vec = usli_vec_best(), .ranks = usli_linear_ranks(a), .x = ws };
    g.xa = (float *)((char *)ws + aligned(a->tokens * a->in));
    int64_t ldx = a->ldx ? a->ldx : a->in;
    for (int64_t t = 0; t < a->tokens; t++)
        usli_to_f32((const char *)a->x + (size_t)(t * ldx) * usli_dtype_bytes(a->dtype), a->dtype, g.x + t * a->in,
                    a->in);
    if (g.ranks) usli_pool_run(x->ctx->pool, g.ranks, multiply_a, &g);
    if (a->xa) usli_from_f32(g.xa, a->xa, a->dtype, a->tokens * g.ranks);
    usli_pool_run(x->ctx->pool, (a->out + ROWS - 1) / ROWS, multiply_w, &g);
}
