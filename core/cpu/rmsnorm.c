#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { ROWS = 16 /* of a task; dweight is summed by tasks, then over tasks in order */ };

typedef struct job {
    const usli_rmsnorm_args *a;
    const usli_vec *v;
    float *rows;    /* (threads, 4, cols) */
    float *partial; /* (tasks, cols) of dweight, or NULL */
    float *w;       /* (cols) weight + offset */
} job;

static int64_t tasks_of(const usli_rmsnorm_args *a) {
    return (a->rows + ROWS - 1) / ROWS;
}

static char *row_at(const void *p, usl_dtype dtype, int64_t row, int64_t ld) {
    return (char *)(uintptr_t)p + (size_t)(row * ld) * usli_dtype_bytes(dtype);
}

static void forward_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_rmsnorm_args *a = j->a;
    int64_t n = a->cols;
    float *buf = j->rows + worker * 4 * n, *sum = buf + n, *y = buf + 2 * n;
    for (int64_t r = task * ROWS; r < a->rows && r < (task + 1) * ROWS; r++) {
        const float *v;
        if (a->res && a->x) {
            const float *res = usli_row_load(j->v, row_at(a->res, a->res_dtype, r, n), a->res_dtype, sum, n);
            const float *x = usli_row_load(j->v, row_at(a->x, a->dtype, r, n), a->dtype, buf, n);
            j->v->add(res, x, sum, n);
            char *out = (char *)a->res_out + (size_t)(r * n) * usli_dtype_bytes(a->res_dtype);
            usli_row_store(j->v, sum, out, a->res_dtype, n);
            v = usli_row_load(j->v, out, a->res_dtype, sum, n); /* the norm sees what was stored */
        } else if (a->res) {
            v = usli_row_load(j->v, row_at(a->res, a->res_dtype, r, n), a->res_dtype, sum, n);
        } else {
            v = usli_row_load(j->v, row_at(a->x, a->dtype, r, n), a->dtype, sum, n);
        }
        float rstd = 1.0f / sqrtf(j->v->dot(v, v, n) / (float)n + a->eps);
        if (a->rstd) a->rstd[r] = rstd;
        j->v->times(rstd, v, j->w, y, n);
        usli_row_store(j->v, y, row_at(a->y, a->dtype, r, a->ldy ? a->ldy : n), a->dtype, n);
    }
}

static void backward_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_rmsnorm_args *a = j->a;
    int64_t n = a->cols;
    float *b0 = j->rows + worker * 4 * n, *b1 = b0 + n, *g = b0 + 2 * n, *b3 = b0 + 3 * n;
    float *dw = j->partial ? j->partial + task * n : NULL;
    if (dw) memset(dw, 0, (size_t)n * sizeof *dw);
    for (int64_t r = task * ROWS; r < a->rows && r < (task + 1) * ROWS; r++) {
        const float *v = usli_row_load(j->v, row_at(a->n, a->n_dtype, r, n), a->n_dtype, b0, n);
        const float *dy = usli_row_load(j->v, row_at(a->dy, a->dtype, r, a->lddy ? a->lddy : n), a->dtype, b1, n);
        float rstd = a->rstd[r], mean = j->v->dot3(dy, j->w, v, n) / (float)n, k = rstd * rstd * mean;
        if (dw) j->v->add_times(rstd, dy, v, dw, n);
        if (!a->dn) continue;
        j->v->norm_backward(rstd, k, v, j->w, dy, g, n);
        char *dn = row_at(a->dn, a->res_dtype, r, a->lddn ? a->lddn : n);
        if (a->dn_mode == USLI_ACCUMULATE) j->v->axpy(1.0f, usli_row_load(j->v, dn, a->res_dtype, b3, n), g, n);
        usli_row_store(j->v, g, dn, a->res_dtype, n);
    }
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_rmsnorm_args *a = args;
    size_t rows = 4 * (size_t)usli_pool_threads(x->ctx->pool) + 1;
    if (pass == USLI_BACKWARD && a->dweight) rows += (size_t)tasks_of(a);
    return rows * (size_t)a->cols * sizeof(float);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_rmsnorm_args *a = args;
    job j = { a, usli_vec_best(), ws, NULL, NULL };
    j.w = j.rows + 4 * usli_pool_threads(x->ctx->pool) * a->cols;
    usli_to_f32(a->weight, a->weight_dtype, j.w, a->cols);
    for (int64_t i = 0; i < a->cols; i++) j.w[i] += a->weight_offset;
    if (pass == USLI_FORWARD) {
        usli_pool_run(x->ctx->pool, tasks_of(a), forward_task, &j);
        return USL_OK;
    }
    if (a->dweight) j.partial = j.w + a->cols;
    usli_pool_run(x->ctx->pool, tasks_of(a), backward_task, &j);
    for (int64_t t = 0; a->dweight && t < tasks_of(a); t++)
        j.v->axpy(1.0f, j.partial + t * a->cols, a->dweight, a->cols);
    return USL_OK;
}

const usli_op_impl usli_cpu_rmsnorm = { run, workspace };
