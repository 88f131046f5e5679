#include "core/cpu/gemm.h"

#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/blas.h"
#include "core/cpu/vec.h"

/* Where the library has bfloat16 tiles are tall and narrow, since it packs the right operand anew for each; elsewhere
 * they are square, since both are copied here. Copies to float32 go over k in steps, so that a worker's scratch has one
 * size. */
enum {
    TALL_ROWS = 512,
    TALL_COLS = 128,
    SQUARE = 256,
    MAX_COLS = SQUARE,
    MIN_ROWS = 128, /* where there would be fewer than ENOUGH tiles */
    ENOUGH = 8,
    STEP = 512,
    LONG = 64,
    GRAIN = 64,
    PAD = 16
};

typedef struct gemm_state {
    usl_ctx *ctx;
    usli_blas *blas;
    const usli_vec *vec;
    int64_t rows, cols; /* of a whole tile; cols is also the distance of a sum's rows */
    int workers;
    struct {
        float *sum;   /* (rows, cols) */
        float *left;  /* (rows, STEP), a block as float32; made when first needed */
        float *right; /* (cols, STEP), likewise */
    } worker[];
} gemm_state;

typedef struct batch {
    gemm_state *state;
    const usli_product *products;
    atomic_int failed;
} batch;

typedef struct tile {
    const usli_product *p;
    int64_t row, rows, col, cols;
} tile;

usl_status usli_gemm_open(usl_ctx *ctx, void **state) {
    *state = NULL;
    int workers = usli_pool_threads(ctx->pool);
    gemm_state *s = usli_calloc(ctx, 1, sizeof *s + (size_t)workers * sizeof s->worker[0]);
    if (!s) return usli_nomem(ctx, sizeof *s);
    s->ctx = ctx;
    s->workers = workers;
    s->vec = usli_vec_best();
    usl_status st;
    USLI_TRYGO(usli_blas_new(ctx, &s->blas));
    bool tall = usli_blas_has_bf16(s->blas);
    s->rows = tall ? TALL_ROWS : SQUARE;
    s->cols = tall ? TALL_COLS : SQUARE;
    size_t bytes = sizeof(float) * (size_t)(s->rows * s->cols);
    for (int i = 0; i < workers; i++) {
        s->worker[i].sum = usli_malloc_aligned(ctx, bytes);
        if (!s->worker[i].sum) USLI_TRYGO(usli_nomem(ctx, bytes));
    }
    *state = s;
    return USL_OK;
done:
    usli_gemm_close(s);
    return st;
}

void usli_gemm_close(void *state) {
    gemm_state *s = state;
    if (!s) return;
    usli_blas_free(s->blas);
    for (int i = 0; i < s->workers; i++) {
        usli_free_aligned(s->ctx, s->worker[i].sum);
        usli_free_aligned(s->ctx, s->worker[i].left);
        usli_free_aligned(s->ctx, s->worker[i].right);
    }
    usli_free(s->ctx, s);
}

bool usli_gemm_has_bf16(const usli_exec *x) {
    const gemm_state *s = x->state;
    return usli_blas_has_bf16(s->blas);
}

static usl_status make_copying_room(gemm_state *s) {
    /* Rows of either are padded, and either may be stored transposed. */
    size_t left = sizeof(float) * (size_t)(s->rows * STEP + PAD * (s->rows > STEP ? s->rows : STEP));
    size_t right = sizeof(float) * (size_t)(s->cols * STEP + PAD * (s->cols > STEP ? s->cols : STEP));
    for (int i = 0; i < s->workers; i++) {
        if (!s->worker[i].left) s->worker[i].left = usli_malloc_aligned(s->ctx, left);
        if (!s->worker[i].right) s->worker[i].right = usli_malloc_aligned(s->ctx, right);
        if (!s->worker[i].left || !s->worker[i].right) return usli_nomem(s->ctx, left + right);
    }
    return USL_OK;
}

/* ---- Cutting
 * ---------------------------------------------------------------------------------------------------------- */

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* Columns are cut evenly (they are a model's: few distinct shapes); rows in whole tiles and a rest (they are tokens).
 */
static int64_t tile_cols(const gemm_state *s, int64_t n) {
    int64_t even = ceil_div(n, ceil_div(n, s->cols));
    int64_t width = ceil_div(even, GRAIN) * GRAIN;
    return width < s->cols ? width : s->cols;
}

/* Lower tiles where there would be too few for several threads. */
static int64_t tile_rows(const gemm_state *s, const usli_product *p) {
    int64_t rows = s->rows, across = ceil_div(p->n, tile_cols(s, p->n));
    while (rows > MIN_ROWS && ceil_div(p->m, rows) * across < ENOUGH) rows /= 2;
    return rows;
}

static int64_t tiles_of(const gemm_state *s, const usli_product *p) {
    return p->m && p->n ? ceil_div(p->m, tile_rows(s, p)) * ceil_div(p->n, tile_cols(s, p->n)) : 0;
}

static tile tile_at(const batch *b, int64_t task) {
    const gemm_state *s = b->state;
    const usli_product *p = b->products;
    for (; task >= tiles_of(s, p); p++) task -= tiles_of(s, p);
    int64_t height = tile_rows(s, p), width = tile_cols(s, p->n), down = ceil_div(p->m, height);
    tile t = { .p = p, .row = task % down * height, .col = task / down * width };
    t.rows = p->m - t.row < height ? p->m - t.row : height;
    t.cols = p->n - t.col < width ? p->n - t.col : width;
    return t;
}

/* ---- One tile
 * ----------------------------------------------------------------------------------------------------------- */

/* The same walk prepares the calls of a tile and later runs them: worker < 0 only prepares. */
typedef struct walk {
    gemm_state *s;
    int worker;
    usl_status st;
} walk;

static void product_call(walk *w, const usli_blas_call *call, const void *left, const void *right, float *out) {
    if (w->st != USL_OK) return;
    if (w->worker < 0)
        w->st = usli_blas_prepare(w->s->blas, call);
    else if (!usli_blas_run(w->s->blas, call, left, right, out, w->worker))
        w->st = USL_ERR_INTERNAL;
}

static const void *element(const void *data, usl_dtype dtype, int64_t i) {
    return (const char *)data + (size_t)i * usli_dtype_bytes(dtype);
}

/* A block (rows, cols) as float32 in room. PAD keeps rows from falling on the same cache sets. */
static void copy_block(const usli_vec *v, const void *data, usl_dtype dtype, int64_t ld, int64_t rows, int64_t cols,
                       float *room) {
    for (int64_t i = 0; i < rows; i++) {
        float *to = room + i * (cols + PAD);
        const float *row = usli_row_load(v, element(data, dtype, i * ld), dtype, to, cols);
        if (row != to) memcpy(to, row, (size_t)cols * sizeof *to);
    }
}

static void copied_term(walk *w, const tile *t, const usli_term *e, bool accumulate, float *out, int64_t ldc) {
    bool run = w->worker >= 0;
    if (!run && w->st == USL_OK) w->st = make_copying_room(w->s);
    int64_t even = ceil_div(e->k, ceil_div(e->k, STEP)), step = ceil_div(even, PAD) * PAD;
    for (int64_t k = 0; k < e->k; k += step) {
        int64_t kb = e->k - k < step ? e->k - k : step;
        int64_t left_rows = e->ta ? kb : t->rows, left_cols = e->ta ? t->rows : kb;
        int64_t right_rows = e->tb ? t->cols : kb, right_cols = e->tb ? kb : t->cols;
        float *left = run ? w->s->worker[w->worker].left : NULL, *right = run ? w->s->worker[w->worker].right : NULL;
        if (run) {
            const void *a = element(e->a, e->adt, e->ta ? k * e->lda + t->row : t->row * e->lda + k);
            const void *b = element(e->b, e->bdt, e->tb ? t->col * e->ldb + k : k * e->ldb + t->col);
            copy_block(w->s->vec, a, e->adt, e->lda, left_rows, left_cols, left);
            copy_block(w->s->vec, b, e->bdt, e->ldb, right_rows, right_cols, right);
        }
        usli_blas_call call = { .m = t->rows,
                                .n = t->cols,
                                .k = kb,
                                .lda = left_cols + PAD,
                                .ldb = right_cols + PAD,
                                .ldc = ldc,
                                .ta = e->ta,
                                .tb = e->tb,
                                .accumulate = accumulate || k > 0 };
        product_call(w, &call, left, right, out);
    }
}

/* Copying pays where each value is used often. */
static bool is_long(const gemm_state *s, const tile *t, const usli_term *e) {
    return usli_blas_wants_blocks(s->blas) && t->rows >= LONG && t->cols >= LONG && e->k >= LONG;
}

static void term(walk *w, const tile *t, const usli_term *e, bool accumulate, float *out, int64_t ldc) {
    bool bf16 = e->adt == USL_BF16 && e->bdt == USL_BF16 && usli_blas_has_bf16(w->s->blas);
    bool floats = e->adt == USL_F32 && e->bdt == USL_F32;
    if (!bf16 && (!floats || is_long(w->s, t, e))) {
        copied_term(w, t, e, accumulate, out, ldc);
        return;
    }
    usli_blas_call call = { .m = t->rows,
                            .n = t->cols,
                            .k = e->k,
                            .lda = e->lda,
                            .ldb = e->ldb,
                            .ldc = ldc,
                            .bf16 = bf16,
                            .ta = e->ta,
                            .tb = e->tb,
                            .accumulate = accumulate };
    product_call(w, &call, element(e->a, e->adt, e->ta ? t->row : t->row * e->lda),
                 element(e->b, e->bdt, e->tb ? t->col * e->ldb : t->col), out);
}

static void scale_and_mask(const gemm_state *s, const tile *t, float *sum) {
    const usli_product *p = t->p;
    for (int64_t i = 0; p->alpha != 1 && i < t->rows; i++) s->vec->scale(p->alpha, sum + i * s->cols, t->cols);
    if (p->mask) p->mask(p->mask_ud, sum, s->cols, t->row, t->rows, t->col, t->cols);
}

static void store(const gemm_state *s, const tile *t, float *sum) {
    const usli_vec *v = s->vec;
    const usli_product *p = t->p;
    size_t size = usli_dtype_bytes(p->cdt);
    float bias_room[MAX_COLS], room[MAX_COLS];
    const float *bias =
        p->bias ? usli_row_load(v, element(p->bias, p->bias_dtype, t->col), p->bias_dtype, bias_room, t->cols) : NULL;
    for (int64_t i = 0; i < t->rows; i++) {
        float *row = sum + i * s->cols;
        void *c = (char *)p->c + (size_t)((t->row + i) * p->ldc + t->col) * size;
        if (bias) v->axpy(1, bias, row, t->cols);
        if (p->beta != 0) v->axpy(p->beta, usli_row_load(v, c, p->cdt, room, t->cols), row, t->cols);
        usli_row_store(v, row, c, p->cdt, t->cols);
    }
}

/* The library writes float32 sums straight into c when nothing else happens to them. Not where it has bfloat16: its
 * sums are quick enough there to gain by a tile that stays in the cache. */
static bool is_direct(const gemm_state *s, const usli_product *p) {
    return !usli_blas_has_bf16(s->blas) && p->cdt == USL_F32 && (p->beta == 0 || p->beta == 1) && !p->bias &&
           (!p->scaled || (p->alpha == 1 && !p->mask)) && p->terms > 0;
}

static void walk_tile(walk *w, const tile *t) {
    const usli_product *p = t->p;
    bool direct = is_direct(w->s, p), accumulate = direct && p->beta == 1;
    float *sum = w->worker < 0 ? NULL : w->s->worker[w->worker].sum;
    float *out = direct ? (float *)p->c + t->row * p->ldc + t->col : sum;
    int64_t ldc = direct ? p->ldc : w->s->cols;
    bool run = w->worker >= 0;
    if (run && !direct && (p->terms == 0))
        for (int64_t i = 0; i < t->rows * w->s->cols; i++) sum[i] = 0;
    for (int i = 0; i < p->terms; i++) {
        term(w, t, &p->term[i], accumulate, out, ldc);
        accumulate = true;
        if (run && !direct && i + 1 == p->scaled) scale_and_mask(w->s, t, sum);
    }
    if (run && !direct) store(w->s, t, sum);
}

static void run_task(void *arg, int64_t task, int worker) {
    batch *b = arg;
    tile t = tile_at(b, task);
    walk w = { b->state, worker, USL_OK };
    walk_tile(&w, &t);
    if (w.st != USL_OK) atomic_store(&b->failed, 1);
}

usl_status usli_gemm_products(usli_exec *x, const usli_product *products, int count) {
    batch b = { .state = x->state, .products = products };
    atomic_init(&b.failed, 0);
    int64_t tasks = 0;
    for (int i = 0; i < count; i++) tasks += tiles_of(b.state, &products[i]);
    usli_blas_trim(b.state->blas);
    walk w = { b.state, -1, USL_OK };
    for (int64_t i = 0; i < tasks && w.st == USL_OK; i++) {
        tile t = tile_at(&b, i);
        walk_tile(&w, &t);
    }
    USLI_TRY(w.st);
    usli_pool_run(x->ctx->pool, tasks, run_task, &b);
    if (atomic_load(&b.failed)) return usli_fail(x->ctx, USL_ERR_INTERNAL, "the matrix library failed in a product");
    return USL_OK;
}

usl_status usli_gemm(usli_exec *x, bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const void *a,
                     usl_dtype adt, int64_t lda, const void *b, usl_dtype bdt, int64_t ldb, float beta, void *c,
                     usl_dtype cdt, int64_t ldc) {
    usli_product p = {
        .m = m, .n = n, .terms = k > 0, .scaled = k > 0, .alpha = alpha, .beta = beta, .c = c, .cdt = cdt, .ldc = ldc
    };
    p.term[0] = (usli_term){ ta, tb, k, a, b, adt, bdt, lda, ldb };
    return usli_gemm_products(x, &p, 1);
}
