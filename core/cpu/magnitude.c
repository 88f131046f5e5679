#include "core/cpu/magnitude.h"

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/vec.h"

enum { ROWS = 16, COLS = 64 }; /* of a task: of y and of its gradient, of sums over tokens */

static size_t aligned(size_t bytes) {
    return (bytes + 63) & ~(size_t)63;
}

static size_t z_bytes(const usli_linear_args *a) {
    return aligned((size_t)(a->tokens * a->out) * sizeof(float));
}

size_t usli_magnitude_room(const usli_linear_args *a, usli_pass pass) {
    size_t dz = aligned((size_t)(a->tokens * a->out) * usli_dtype_bytes(a->y_dtype));
    return z_bytes(a) + (pass == USLI_BACKWARD ? dz : 0);
}

usli_linear_args usli_without_magnitude(const usli_linear_args *a, usli_segment *segment, usli_pass pass, void *room) {
    usli_linear_args one = *a;
    for (int i = 0; i < a->segments; i++) {
        segment[i] = a->segment[i];
        segment[i].bias = NULL;
        segment[i].dbias = NULL;
        segment[i].lora.magnitude = NULL;
    }
    one.segment = segment;
    one.ldy = 0;
    if (pass == USLI_FORWARD) {
        one.y = room;
        one.y_dtype = USL_F32;
        one.y_mode = USLI_ASSIGN;
    } else {
        one.dy = room ? (char *)room + z_bytes(a) : NULL;
    }
    return one;
}

bool usli_wants_magnitude(const usli_linear_args *a) {
    for (int i = 0; i < a->segments; i++)
        if (a->segment[i].lora.dmagnitude) return true;
    return false;
}

typedef struct job {
    const usli_linear_args *a;
    const usli_vec *v;
    const float *z;
    char *dz;
    int64_t ldy;
} job;

static job job_of(const usli_linear_args *a, void *room) {
    return (job){ a, usli_vec_best(), room, (char *)room + z_bytes(a), a->ldy ? a->ldy : a->out };
}

static float factor(const usli_lora *l, int64_t row) {
    return l->magnitude ? l->magnitude[row] / l->norm[row] : 1;
}

static void *at(const void *data, usl_dtype dtype, int64_t i) {
    return (char *)(uintptr_t)data + (size_t)i * usli_dtype_bytes(dtype);
}

/* Columns of one token, COLS at a time: all of one segment. */
typedef void (*columns_fn)(const job *j, const usli_segment *s, int64_t token, int64_t row, int64_t col, int64_t n);

static void each_columns(const job *j, int64_t token, columns_fn fn) {
    int64_t first = 0;
    for (int i = 0; i < j->a->segments; i++) {
        const usli_segment *s = &j->a->segment[i];
        for (int64_t row = 0; row < s->w.rows; row += COLS)
            fn(j, s, token, row, first + row, s->w.rows - row < COLS ? s->w.rows - row : COLS);
        first += s->w.rows;
    }
}

static void magnify_columns(const job *j, const usli_segment *s, int64_t token, int64_t row, int64_t col, int64_t n) {
    const usli_linear_args *a = j->a;
    void *y = at(a->y, a->y_dtype, token * j->ldy + col);
    const float *z = j->z + token * a->out + col;
    float out[COLS], room[COLS];
    const float *before = a->y_mode == USLI_ACCUMULATE ? usli_row_load(j->v, y, a->y_dtype, room, n) : NULL;
    for (int64_t i = 0; i < n; i++) {
        out[i] = z[i] * factor(&s->lora, row + i);
        if (s->bias) out[i] += usli_get_float(s->bias, s->bias_dtype, row + i);
        if (before) out[i] += before[i];
    }
    usli_row_store(j->v, out, y, a->y_dtype, n);
}

static void magnify_rows(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    for (int64_t t = task * ROWS; t < j->a->tokens && t < (task + 1) * ROWS; t++) each_columns(j, t, magnify_columns);
}

static int64_t row_tasks(const usli_linear_args *a) {
    return (a->tokens + ROWS - 1) / ROWS;
}

void usli_magnify(usli_exec *x, const usli_linear_args *a, void *room) {
    job j = job_of(a, room);
    usli_pool_run(x->ctx->pool, row_tasks(a), magnify_rows, &j);
}

static void scale_columns(const job *j, const usli_segment *s, int64_t token, int64_t row, int64_t col, int64_t n) {
    const usli_linear_args *a = j->a;
    float out[COLS], room[COLS];
    const float *dy = usli_row_load(j->v, at(a->dy, a->y_dtype, token * j->ldy + col), a->y_dtype, room, n);
    for (int64_t i = 0; i < n; i++) out[i] = dy[i] * factor(&s->lora, row + i);
    usli_row_store(j->v, out, at(j->dz, a->y_dtype, token * a->out + col), a->y_dtype, n);
}

static void scale_rows(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    for (int64_t t = task * ROWS; t < j->a->tokens && t < (task + 1) * ROWS; t++) each_columns(j, t, scale_columns);
}

typedef struct sums {
    job j;
    const usli_segment *s;
    int64_t first; /* column of the segment */
} sums;

/* A task owns some columns and walks all tokens in order. */
static void sum_columns(void *arg, int64_t task, int worker) {
    const sums *k = arg;
    const usli_linear_args *a = k->j.a;
    const usli_segment *s = k->s;
    (void)worker;
    int64_t row = task * COLS, n = s->w.rows - row < COLS ? s->w.rows - row : COLS;
    float magnitude[COLS] = { 0 }, bias[COLS] = { 0 }, room[COLS];
    for (int64_t t = 0; t < a->tokens; t++) {
        int64_t col = k->first + row;
        const float *dy = usli_row_load(k->j.v, at(a->dy, a->y_dtype, t * k->j.ldy + col), a->y_dtype, room, n);
        if (s->lora.dmagnitude) k->j.v->add_times(1, dy, k->j.z + t * a->out + col, magnitude, n);
        k->j.v->axpy(1, dy, bias, n);
    }
    for (int64_t i = 0; s->lora.dmagnitude && i < n; i++)
        s->lora.dmagnitude[row + i] += magnitude[i] / s->lora.norm[row + i];
    if (s->dbias) k->j.v->axpy(1, bias, s->dbias + row, n);
}

void usli_magnify_backward(usli_exec *x, const usli_linear_args *a, void *room) {
    sums k = { .j = job_of(a, room) };
    for (int i = 0; i < a->segments; i++) {
        k.s = &a->segment[i];
        if (k.s->dbias || k.s->lora.dmagnitude)
            usli_pool_run(x->ctx->pool, (k.s->w.rows + COLS - 1) / COLS, sum_columns, &k);
        k.first += k.s->w.rows;
    }
    usli_pool_run(x->ctx->pool, row_tasks(a), scale_rows, &k.j);
}
