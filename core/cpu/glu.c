#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { ROWS = 8, COLS = 512 /* at a time: six rows of it stay in the first cache */ };

typedef struct job {
    const usli_glu_args *a;
    const usli_vec *v;
    usli_pass pass;
} job;

static void task_fn(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_glu_args *a = j->a;
    (void)worker;
    float g[COLS], u[COLS], d[COLS], h[COLS], dg[COLS], du[COLS];
    size_t e = usli_dtype_bytes(a->dtype);
    for (int64_t r = task * ROWS; r < a->rows && r < (task + 1) * ROWS; r++) {
        if (j->pass == USLI_BACKWARD && a->dweight) a->dweight[r] = 0;
        for (int64_t c = 0; c < a->cols; c += COLS) {
            int64_t n = a->cols - c < COLS ? a->cols - c : COLS;
            size_t gate = (size_t)(r * (a->ld ? a->ld : 2 * a->cols) + c) * e, up = gate + (size_t)a->cols * e,
                   one = (size_t)(r * a->cols + c) * e, to = (size_t)(r * (a->ldh ? a->ldh : a->cols) + c) * e;
            const float *gs = usli_row_load(j->v, (const char *)a->gate_up + gate, a->dtype, g, n);
            const float *us = usli_row_load(j->v, (const char *)a->gate_up + up, a->dtype, u, n);
            if (j->pass == USLI_FORWARD) {
                j->v->glu((int)a->act, gs, us, h, n);
                if (a->weight) j->v->scale(a->weight[r], h, n);
                usli_row_store(j->v, h, (char *)a->h + to, a->dtype, n);
                continue;
            }
            const float *dh = usli_row_load(j->v, (const char *)a->dh + one, a->dtype, d, n);
            j->v->glu_backward((int)a->act, gs, us, dh, dg, du, h, n);
            if (a->dweight) a->dweight[r] += j->v->dot(dh, h, n);
            if (a->weight) {
                j->v->scale(a->weight[r], h, n);
                j->v->scale(a->weight[r], dg, n);
                j->v->scale(a->weight[r], du, n);
            }
            if (a->h_out) usli_row_store(j->v, h, (char *)a->h_out + one, a->dtype, n);
            usli_row_store(j->v, dg, (char *)a->dgate_up + gate, a->dtype, n);
            usli_row_store(j->v, du, (char *)a->dgate_up + up, a->dtype, n);
        }
    }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)ws;
    job j = { args, usli_vec_best(), pass };
    usli_pool_run(x->ctx->pool, (j.a->rows + ROWS - 1) / ROWS, task_fn, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_glu = { run, NULL };
