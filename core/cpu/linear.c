/* linear: base product, adapter and bias in one sum that is rounded once. Operands of products are float32 with dtype
 * F32 and F16 and bfloat16 with BF16; weights that are neither are decoded into a panel of bounded size, once a call.
 */
#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/decode.h"
#include "core/cpu/gemm.h"
#include "core/cpu/gemv.h"
#include "core/cpu/magnitude.h"
#include "core/cpu/vec.h"
#include "core/ops/dropout.h"

enum {
    PANEL = 16 << 20,      /* values decoded at a time */
    PANEL_COLS = 256,      /* panels of columns are whole multiples of it, so of every block */
    DECODE_TASK = 1 << 15, /* values a task */
    COLS = 64,             /* of a task that sums columns */
    ROWS = 16,             /* of a task that converts rows */
    CHUNK = 1024           /* values converted at a time */
};

typedef struct linear {
    const usli_linear_args *a;
    usl_dtype product; /* type of decoded and converted operands */
    int64_t ldx, ldy, lddx;
    int ranks, adapters;
    const void *lora_a;                    /* (ranks, in), of type product */
    const void *lora_b[USLI_MAX_SEGMENTS]; /* (rows, rank), of type product */
    void *a_room, *b_room[USLI_MAX_SEGMENTS];
    void *dropped; /* (tokens, in) of dtype, rows ld_dropped apart; x itself without dropout */
    int64_t ld_dropped;
    void *xa;  /* (tokens, ranks) of dtype */
    void *dyb; /* (tokens, ranks) of type product: scale dy B */
    const void *dy;
    void *dy_room; /* dy rounded to the products' type, packed */
    usl_dtype dy_dtype;
    int64_t ld_dy;
    void *panel;
    int64_t panel_values;
} linear;

/* ---- Workspace
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct counter {
    char *base; /* NULL: only count */
    size_t used;
} counter;

static void *take(counter *r, int64_t values, usl_dtype dtype) {
    size_t bytes = ((size_t)values * usli_dtype_bytes(dtype) + 63) & ~(size_t)63;
    void *p = r->base ? r->base + r->used : NULL;
    r->used += bytes;
    return p;
}

/* float32 products read 16-bit weights in place: a tile is converted on the way. */
static bool in_place(const usli_matrix *w, usl_dtype product) {
    return w->dtype == product || (product == USL_F32 && (w->dtype == USL_BF16 || w->dtype == USL_F16));
}

static int64_t decoded_rows(const linear *l) {
    int64_t rows = 0;
    for (int i = 0; i < l->a->segments; i++)
        if (!in_place(&l->a->segment[i].w, l->product)) rows += l->a->segment[i].w.rows;
    return rows;
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Columns of a backward panel. */
static int64_t panel_cols(const linear *l) {
    int64_t rows = decoded_rows(l);
    if (rows == 0 || rows * l->a->in <= PANEL) return l->a->in;
    int64_t cols = PANEL / rows / PANEL_COLS * PANEL_COLS;
    return min64(l->a->in, cols ? cols : PANEL_COLS);
}

/* Only adapters, types and shapes matter, so that a dry run counts what a real one takes. */
static size_t lay_out(linear *l, const usli_linear_args *a, usli_pass pass, void *ws) {
    counter r = { ws, 0 };
    *l = (linear){ .a = a, .product = a->dtype == USL_BF16 ? USL_BF16 : USL_F32, .ranks = usli_linear_ranks(a) };
    l->ldx = a->ldx ? a->ldx : a->in;
    l->lddx = a->lddx ? a->lddx : l->ldx;
    l->ldy = a->ldy ? a->ldy : a->out;
    for (int i = 0; i < a->segments; i++) l->adapters += a->segment[i].lora.rank > 0;
    if (l->product != USL_F32 || l->adapters > 1) l->a_room = take(&r, l->ranks * a->in, l->product);
    for (int i = 0; i < a->segments && l->product != USL_F32; i++)
        l->b_room[i] = take(&r, a->segment[i].w.rows * a->segment[i].lora.rank, l->product);
    l->dropped = (void *)(uintptr_t)a->x;
    l->ld_dropped = l->ldx;
    if (l->adapters && a->dropout.p > 0) {
        l->dropped = take(&r, a->tokens * a->in, a->dtype);
        l->ld_dropped = a->in;
    }
    l->xa = a->xa ? a->xa : take(&r, a->tokens * l->ranks, a->dtype);
    if (pass == USLI_BACKWARD) {
        l->dyb = take(&r, a->tokens * l->ranks, l->product);
        l->dy = a->dy;
        l->dy_dtype = a->y_dtype;
        l->ld_dy = l->ldy;
        if (l->product == USL_BF16 && a->y_dtype != USL_BF16) {
            l->dy = l->dy_room = take(&r, a->tokens * a->out, l->product);
            l->dy_dtype = l->product;
            l->ld_dy = a->out;
        }
    }
    int64_t rows = decoded_rows(l);
    /* A forward panel holds whole rows, a backward one whole columns. */
    if (pass == USLI_FORWARD)
        l->panel_values = rows * a->in <= PANEL ? rows * a->in : (PANEL / a->in ? PANEL / a->in : 1) * a->in;
    else
        l->panel_values = rows * panel_cols(l);
    l->panel = take(&r, l->panel_values, l->product);
    return r.used;
}

static size_t plain_workspace(const usli_linear_args *a, usli_pass pass) {
    linear l;
    if (pass == USLI_FORWARD && usli_gemv_fits(a)) return usli_gemv_workspace(a);
    return lay_out(&l, a, pass, NULL);
}

/* ---- Getting operands ready
 * ----------------------------------------------------------------------------------------------- */

static void *at(const void *data, usl_dtype dtype, int64_t i) {
    return (char *)(uintptr_t)data + (size_t)i * usli_dtype_bytes(dtype);
}

static void prepare_adapters(linear *l) {
    const usli_linear_args *a = l->a;
    int64_t row = 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_lora *lora = &a->segment[i].lora;
        l->lora_b[i] = l->b_room[i] ? l->b_room[i] : lora->b;
        if (!lora->rank) continue;
        if (l->b_room[i]) usli_from_f32(lora->b, l->b_room[i], l->product, a->segment[i].w.rows * lora->rank);
        if (l->a_room)
            usli_from_f32(lora->a, at(l->a_room, l->product, row * a->in), l->product, lora->rank * a->in);
        else
            l->lora_a = lora->a;
        row += lora->rank;
    }
    if (l->a_room) l->lora_a = l->a_room;
}

/* Values of a token's features col .. col + n - 1, dropped or divided by 1 - p; col is a multiple of 4. */
static void drop_values(const usli_dropout *d, int64_t token, int64_t col, const float *x, float *y, int64_t n) {
    usli_vec_best()->drop(usli_dropout_key(d), (uint32_t)(col / 4), (uint32_t)d->position[token],
                          (uint32_t)d->row[token], (uint32_t)*d->update, usli_dropout_threshold(d->p),
                          1.0f / (1.0f - d->p), x, y, n);
}

static void drop_rows(void *arg, int64_t task, int worker) {
    const linear *l = arg;
    const usli_linear_args *a = l->a;
    const usli_vec *v = usli_vec_best();
    (void)worker;
    float room[CHUNK], out[CHUNK];
    for (int64_t t = task * ROWS; t < a->tokens && t < (task + 1) * ROWS; t++)
        for (int64_t i = 0; i < a->in; i += CHUNK) {
            int64_t n = min64(CHUNK, a->in - i);
            const float *x = usli_row_load(v, at(a->x, a->dtype, t * l->ldx + i), a->dtype, room, n);
            drop_values(&a->dropout, t, i, x, out, n);
            usli_row_store(v, out, at(l->dropped, a->dtype, t * a->in + i), a->dtype, n);
        }
}

static void round_dy_rows(void *arg, int64_t task, int worker) {
    const linear *l = arg;
    const usli_linear_args *a = l->a;
    (void)worker;
    const usli_vec *v = usli_vec_best();
    float room[CHUNK];
    for (int64_t t = task * ROWS; t < a->tokens && t < (task + 1) * ROWS; t++)
        for (int64_t i = 0; i < a->out; i += CHUNK) {
            int64_t n = min64(CHUNK, a->out - i);
            const float *dy = usli_row_load(v, at(a->dy, a->y_dtype, t * l->ldy + i), a->y_dtype, room, n);
            usli_row_store(v, dy, at(l->dy_room, l->product, t * a->out + i), l->product, n);
        }
}

static int64_t row_tasks(const linear *l) {
    return (l->a->tokens + ROWS - 1) / ROWS;
}

/* Part of a segment's matrix as an operand: decoded into the panel, or in place. */
typedef struct piece {
    int segment;
    int64_t row, rows, col, cols;
    const void *data; /* first element; rows ld apart */
    usl_dtype dtype;
    int64_t ld;
    void *room; /* NULL: in place */
    int64_t rows_a_task, tasks;
} piece;

typedef struct pieces {
    const linear *l;
    int count;
    piece item[USLI_MAX_SEGMENTS];
    int64_t used; /* values of the panel */
} pieces;

static void add_piece(pieces *ps, int segment, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    const linear *l = ps->l;
    const usli_matrix *w = &l->a->segment[segment].w;
    piece *p = &ps->item[ps->count++];
    *p = (piece){
        .segment = segment, .row = row, .rows = rows, .col = col, .cols = cols, .dtype = w->dtype, .ld = w->cols
    };
    if (in_place(w, l->product)) {
        p->data = usli_matrix_at(w, row, col);
        return;
    }
    p->data = p->room = at(l->panel, l->product, ps->used);
    p->dtype = l->product;
    p->ld = cols;
    p->rows_a_task = cols < DECODE_TASK ? DECODE_TASK / cols : 1;
    p->tasks = (rows + p->rows_a_task - 1) / p->rows_a_task;
    ps->used += rows * cols;
}

static void decode_task(void *arg, int64_t task, int worker) {
    const pieces *ps = arg;
    (void)worker;
    const piece *p = ps->item;
    for (; task >= p->tasks; p++) task -= p->tasks;
    const usli_matrix *w = &ps->l->a->segment[p->segment].w;
    int64_t first = task * p->rows_a_task, last = min64(p->rows, first + p->rows_a_task);
    for (int64_t i = first; i < last; i++)
        usli_matrix_decode(w, p->row + i, p->col, p->cols, 1, at(p->room, p->dtype, i * p->cols), p->dtype);
}

static void decode_pieces(usli_exec *x, pieces *ps) {
    int64_t tasks = 0;
    for (int i = 0; i < ps->count; i++) tasks += ps->item[i].tasks;
    usli_pool_run(x->ctx->pool, tasks, decode_task, ps);
}

/* ---- Products
 * -------------------------------------------------------------------------------------------------------------- */

/* xa = drop(x) A^T for all adapters at once. */
static usl_status make_xa(usli_exec *x, linear *l) {
    const usli_linear_args *a = l->a;
    return usli_gemm(x, false, true, a->tokens, l->ranks, a->in, 1, l->dropped, a->dtype, l->ld_dropped, l->lora_a,
                     l->product, a->in, 0, l->xa, a->dtype, l->ranks);
}

static int64_t row_offset(const usli_linear_args *a, int segment) {
    int64_t offset = 0;
    for (int i = 0; i < segment; i++) offset += a->segment[i].w.rows;
    return offset;
}

static int rank_offset(const usli_linear_args *a, int segment) {
    int offset = 0;
    for (int i = 0; i < segment; i++) offset += a->segment[i].lora.rank;
    return offset;
}

static usli_product forward_product(const linear *l, const piece *w) {
    const usli_linear_args *a = l->a;
    const usli_segment *s = &a->segment[w->segment];
    usli_product p = { .m = a->tokens,
                       .n = w->rows,
                       .alpha = s->lora.scale,
                       .beta = a->y_mode == USLI_ACCUMULATE,
                       .cdt = a->y_dtype,
                       .ldc = l->ldy };
    p.c = at(a->y, a->y_dtype, row_offset(a, w->segment) + w->row);
    if (s->bias) {
        p.bias = at(s->bias, s->bias_dtype, w->row);
        p.bias_dtype = s->bias_dtype;
    }
    if (s->lora.rank) {
        const void *xa = at(l->xa, a->dtype, rank_offset(a, w->segment));
        const void *b = at(l->lora_b[w->segment], l->product, w->row * s->lora.rank);
        p.term[p.terms++] =
            (usli_term){ false, true, s->lora.rank, xa, b, a->dtype, l->product, l->ranks, s->lora.rank };
        p.scaled = 1;
    }
    p.term[p.terms++] = (usli_term){ false, true, a->in, a->x, w->data, a->dtype, w->dtype, l->ldx, w->ld };
    return p;
}

static usl_status forward(usli_exec *x, linear *l) {
    const usli_linear_args *a = l->a;
    if (l->adapters) {
        prepare_adapters(l);
        if (a->dropout.p > 0) usli_pool_run(x->ctx->pool, row_tasks(l), drop_rows, l);
        USLI_TRY(make_xa(x, l));
    }
    int segment = 0;
    int64_t row = 0;
    while (segment < a->segments) {
        pieces ps = { .l = l };
        /* As many rows as the panel holds, over several segments. */
        while (segment < a->segments) {
            const usli_matrix *w = &a->segment[segment].w;
            int64_t rows = w->rows - row;
            if (!in_place(w, l->product)) rows = min64(rows, (l->panel_values - ps.used) / a->in);
            if (rows == 0) break;
            add_piece(&ps, segment, row, rows, 0, a->in);
            row += rows;
            if (row < w->rows) break;
            segment++;
            row = 0;
        }
        decode_pieces(x, &ps);
        usli_product p[USLI_MAX_SEGMENTS];
        for (int i = 0; i < ps.count; i++) p[i] = forward_product(l, &ps.item[i]);
        USLI_TRY(usli_gemm_products(x, p, ps.count));
    }
    return USL_OK;
}

/* What the adapter adds to dx goes through the same mask as x did; col0 is where a panel of columns begins. */
typedef struct dx_mask {
    const usli_dropout *d;
    int64_t col0;
} dx_mask;

static void mask_dx(void *ud, float *tile, int64_t ld, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    const dx_mask *m = ud;
    for (int64_t i = 0; i < rows; i++) drop_values(m->d, row + i, m->col0 + col, tile + i * ld, tile + i * ld, cols);
}

static usl_status make_dx(usli_exec *x, linear *l) {
    const usli_linear_args *a = l->a;
    int64_t width = panel_cols(l);
    for (int64_t col = 0; col < a->in; col += width) {
        int64_t cols = min64(width, a->in - col);
        pieces ps = { .l = l };
        for (int i = 0; i < a->segments; i++) add_piece(&ps, i, 0, a->segment[i].w.rows, col, cols);
        decode_pieces(x, &ps);
        dx_mask mask = { &a->dropout, col };
        usli_product p = { .m = a->tokens,
                           .n = cols,
                           .alpha = 1,
                           .beta = a->dx_mode == USLI_ACCUMULATE,
                           .cdt = a->dtype,
                           .ldc = l->lddx };
        p.c = at(a->dx, a->dtype, col);
        if (l->adapters) { /* dyb is scaled already, so one term does for all adapters */
            p.term[p.terms++] = (usli_term){ false,      false,      l->ranks, l->dyb, at(l->lora_a, l->product, col),
                                             l->product, l->product, l->ranks, a->in };
            p.scaled = 1;
            if (a->dropout.p > 0) p.mask = mask_dx, p.mask_ud = &mask;
        }
        for (int i = 0; i < a->segments; i++) {
            const piece *w = &ps.item[i];
            const void *dy = at(l->dy, l->dy_dtype, row_offset(a, i));
            p.term[p.terms++] =
                (usli_term){ false, false, w->rows, dy, w->data, l->dy_dtype, w->dtype, l->ld_dy, w->ld };
        }
        USLI_TRY(usli_gemm_products(x, &p, 1));
    }
    return USL_OK;
}

static usl_status make_dyb(usli_exec *x, linear *l) {
    const usli_linear_args *a = l->a;
    usli_product p[USLI_MAX_SEGMENTS];
    int count = 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        if (!s->lora.rank) continue;
        usli_product *q = &p[count++];
        *q = (usli_product){ .m = a->tokens,
                             .n = s->lora.rank,
                             .terms = 1,
                             .scaled = 1,
                             .alpha = s->lora.scale,
                             .cdt = l->product,
                             .ldc = l->ranks };
        q->c = at(l->dyb, l->product, rank_offset(a, i));
        q->term[0] = (usli_term){ false,        false,       s->w.rows,  at(l->dy, l->dy_dtype, row_offset(a, i)),
                                  l->lora_b[i], l->dy_dtype, l->product, l->ld_dy,
                                  s->lora.rank };
    }
    return usli_gemm_products(x, p, count);
}

/* dA, dB and dW: sums over tokens, added to what is there. */
static usl_status make_parameter_gradients(usli_exec *x, linear *l) {
    const usli_linear_args *a = l->a;
    usli_product p[3 * USLI_MAX_SEGMENTS];
    int count = 0;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        const usli_lora *lora = &s->lora;
        const void *dy = at(l->dy, l->dy_dtype, row_offset(a, i));
        usli_product sum = { .terms = 1, .scaled = 1, .alpha = 1, .beta = 1, .cdt = USL_F32 };
        if (lora->rank && lora->da) {
            usli_product *q = &p[count++];
            *q = sum;
            q->m = lora->rank, q->n = a->in, q->c = lora->da, q->ldc = a->in;
            q->term[0] = (usli_term){ true,         false,      a->tokens, at(l->dyb, l->product, rank_offset(a, i)),
                                      l->dropped,   l->product, a->dtype,  l->ranks,
                                      l->ld_dropped };
        }
        if (lora->rank && lora->db) {
            usli_product *q = &p[count++];
            *q = sum;
            q->m = s->w.rows, q->n = lora->rank, q->c = lora->db, q->ldc = lora->rank, q->alpha = lora->scale;
            q->term[0] = (usli_term){ true,        false,    a->tokens, dy,      at(l->xa, a->dtype, rank_offset(a, i)),
                                      l->dy_dtype, a->dtype, l->ld_dy,  l->ranks };
        }
        if (s->dw) {
            usli_product *q = &p[count++];
            *q = sum;
            q->m = s->w.rows, q->n = a->in, q->c = s->dw, q->ldc = a->in;
            q->term[0] = (usli_term){ true, false, a->tokens, dy, a->x, l->dy_dtype, a->dtype, l->ld_dy, l->ldx };
        }
    }
    return usli_gemm_products(x, p, count);
}

typedef struct bias_job {
    const linear *l;
    int segment;
} bias_job;

static void sum_columns(void *arg, int64_t task, int worker) {
    const bias_job *j = arg;
    const usli_linear_args *a = j->l->a;
    const usli_segment *s = &a->segment[j->segment];
    (void)worker;
    int64_t col = task * COLS, n = min64(COLS, s->w.rows - col);
    const usli_vec *v = usli_vec_best();
    float sum[COLS] = { 0 }, room[COLS];
    for (int64_t t = 0; t < a->tokens; t++)
        v->axpy(1,
                usli_row_load(v, at(a->dy, a->y_dtype, t * j->l->ldy + row_offset(a, j->segment) + col), a->y_dtype,
                              room, n),
                sum, n);
    v->axpy(1, sum, s->dbias + col, n);
}

static usl_status backward(usli_exec *x, linear *l) {
    const usli_linear_args *a = l->a;
    bool wants_x = false;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        wants_x |= s->dw || (s->lora.rank && (s->lora.da || s->lora.db));
        bias_job j = { l, i };
        if (s->dbias) usli_pool_run(x->ctx->pool, (s->w.rows + COLS - 1) / COLS, sum_columns, &j);
    }
    if (wants_x && !a->x) return usli_fail(x->ctx, USL_ERR_INTERNAL, "linear: parameter gradients need x");
    if (l->dy_room) usli_pool_run(x->ctx->pool, row_tasks(l), round_dy_rows, l);
    if (l->adapters) {
        prepare_adapters(l);
        if (wants_x && a->dropout.p > 0) usli_pool_run(x->ctx->pool, row_tasks(l), drop_rows, l);
        if (wants_x && !a->xa) USLI_TRY(make_xa(x, l));
        USLI_TRY(make_dyb(x, l));
    }
    USLI_TRY(make_parameter_gradients(x, l));
    /* Last: dx may stand where x stood. */
    return a->dx ? make_dx(x, l) : USL_OK;
}

static usl_status run_plain(usli_exec *x, const usli_linear_args *a, usli_pass pass, void *ws) {
    if (a->tokens == 0) return USL_OK;
    if (pass == USLI_FORWARD && usli_gemv_fits(a)) {
        usli_gemv_run(x, a, ws);
        return USL_OK;
    }
    linear l;
    lay_out(&l, a, pass, ws);
    return pass == USLI_FORWARD ? forward(x, &l) : backward(x, &l);
}

/* ---- Mixtures: one expert after the other
 * ------------------------------------------------------------------------------- */

static float *stacked(const float *all, int expert, int64_t each) {
    return all ? (float *)(uintptr_t)all + expert * each : NULL;
}

/* What expert e does with tokens first .. first + tokens - 1; segment has room for the segments. */
static usli_linear_args expert_args(const usli_linear_args *a, int e, int64_t first, int64_t tokens,
                                    usli_segment *segment) {
    usli_linear_args one = *a;
    one.experts = 0;
    one.tokens = tokens;
    one.segment = segment;
    for (int i = 0; i < a->segments; i++) {
        usli_segment *s = &segment[i];
        *s = a->segment[i];
        int64_t rows = s->w.rows /= a->experts;
        s->w.first_row = e * rows;
        s->dw = stacked(s->dw, e, rows * a->in);
        usli_lora *l = &s->lora;
        l->a = stacked(l->a, e, l->rank * a->in);
        l->da = stacked(l->da, e, l->rank * a->in);
        l->b = stacked(l->b, e, rows * l->rank);
        l->db = stacked(l->db, e, rows * l->rank);
    }
    int64_t ldx = a->ldx ? a->ldx : a->in, ldy = a->ldy ? a->ldy : a->out;
    if (a->x) one.x = at(a->x, a->dtype, first * ldx);
    if (a->dx) one.dx = at(a->dx, a->dtype, first * ldx);
    if (a->y) one.y = at(a->y, a->y_dtype, first * ldy);
    if (a->dy) one.dy = at(a->dy, a->y_dtype, first * ldy);
    if (a->xa) one.xa = at(a->xa, a->dtype, first * usli_linear_ranks(a));
    if (a->dropout.row) one.dropout.row += first;
    if (a->dropout.position) one.dropout.position += first;
    return one;
}

static usl_status run_experts(usli_exec *x, const usli_linear_args *a, usli_pass pass, void *ws) {
    usli_segment segment[USLI_MAX_SEGMENTS];
    for (int e = 0; e < a->experts; e++) {
        int64_t first = a->expert_offsets[e], last = a->expert_offsets[e + 1];
        if (first < 0 || last < first || last > a->tokens)
            return usli_fail(x->ctx, USL_ERR_INTERNAL, "linear: the offsets of expert %d are %lld and %lld", e,
                             (long long)first, (long long)last);
        usli_linear_args one = expert_args(a, e, first, last - first, segment);
        USLI_TRY(run_plain(x, &one, pass, ws));
    }
    return USL_OK;
}

/* ---- DoRA: the plain op between two walks over y or dy
 * ------------------------------------------------------------------ */

static size_t magnified_workspace(const usli_linear_args *a, usli_pass pass) {
    usli_segment segment[USLI_MAX_SEGMENTS];
    usli_linear_args forward = usli_without_magnitude(a, segment, USLI_FORWARD, NULL);
    size_t inner = plain_workspace(&forward, USLI_FORWARD);
    if (pass == USLI_BACKWARD) {
        usli_linear_args backward = usli_without_magnitude(a, segment, USLI_BACKWARD, NULL);
        size_t other = plain_workspace(&backward, USLI_BACKWARD);
        if (other > inner) inner = other;
    }
    return usli_magnitude_room(a, pass) + inner;
}

static usl_status run_magnified(usli_exec *x, const usli_linear_args *a, usli_pass pass, void *ws) {
    usli_segment segment[USLI_MAX_SEGMENTS];
    void *inner = (char *)ws + usli_magnitude_room(a, pass);
    if (pass == USLI_FORWARD || usli_wants_magnitude(a)) {
        usli_linear_args one = usli_without_magnitude(a, segment, USLI_FORWARD, ws);
        if (pass == USLI_BACKWARD) one.xa = NULL; /* what was saved stays */
        USLI_TRY(run_plain(x, &one, USLI_FORWARD, inner));
    }
    if (pass == USLI_FORWARD) {
        usli_magnify(x, a, ws);
        return USL_OK;
    }
    usli_magnify_backward(x, a, ws);
    usli_linear_args one = usli_without_magnitude(a, segment, USLI_BACKWARD, ws);
    return run_plain(x, &one, USLI_BACKWARD, inner);
}

static bool is_magnified(const usli_linear_args *a) {
    for (int i = 0; i < a->segments; i++)
        if (a->segment[i].lora.magnitude) return true;
    return false;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_linear_args *a = args;
    usli_segment segment[USLI_MAX_SEGMENTS];
    (void)x;
    if (is_magnified(a)) return magnified_workspace(a, pass);
    if (!a->experts) return plain_workspace(a, pass);
    /* An expert may see all tokens, or so few that other room is needed. */
    usli_linear_args all = expert_args(a, 0, 0, a->tokens, segment), few = all;
    linear l;
    size_t most = lay_out(&l, &all, pass, NULL);
    few.tokens = min64(a->tokens, USLI_GEMV_TOKENS);
    size_t other = pass == USLI_FORWARD && usli_gemv_fits(&few) ? usli_gemv_workspace(&few) : 0;
    return most > other ? most : other;
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_linear_args *a = args;
    for (int i = 0; i < a->segments; i++) USLI_TRY(usli_matrix_check(x->ctx, &a->segment[i].w, "linear"));
    if (is_magnified(a)) return run_magnified(x, a, pass, ws);
    return a->experts ? run_experts(x, a, pass, ws) : run_plain(x, a, pass, ws);
}

const usli_op_impl usli_cpu_linear = { run, workspace };
