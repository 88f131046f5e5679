#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"

enum { ROWS = 64 }; /* rows of a task */

typedef struct job {
    const usli_gather_args *a;
    size_t row_bytes, ld_bytes; /* ld: of x and dx */
} job;

static void gather_rows(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_gather_args *a = j->a;
    (void)worker;
    for (int64_t i = task * ROWS; i < a->rows && i < (task + 1) * ROWS; i++)
        memcpy((char *)a->y + (size_t)i * j->row_bytes, (const char *)a->x + (size_t)a->index[i] * j->ld_bytes,
               j->row_bytes);
}

static void zero_rows(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first = task * ROWS, rows = j->a->x_rows - first < ROWS ? j->a->x_rows - first : ROWS;
    memset((char *)j->a->dx + (size_t)first * j->ld_bytes, 0, (size_t)rows * j->ld_bytes);
}

/* The indices are distinct, so no two tasks write one row. */
static void scatter_rows(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_gather_args *a = j->a;
    (void)worker;
    for (int64_t i = task * ROWS; i < a->rows && i < (task + 1) * ROWS; i++)
        memcpy((char *)a->dx + (size_t)a->index[i] * j->ld_bytes, (const char *)a->dy + (size_t)i * j->row_bytes,
               j->row_bytes);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_gather_args *a = args;
    (void)ws;
    for (int64_t i = 0; i < a->rows; i++)
        if (a->index[i] < 0 || a->index[i] >= a->x_rows)
            return usli_fail(x->ctx, USL_ERR_INTERNAL, "gather: index %d of %lld rows", (int)a->index[i],
                             (long long)a->x_rows);
    size_t e = usli_dtype_bytes(a->dtype);
    job j = { a, (size_t)a->cols * e, (size_t)(a->ldx ? a->ldx : a->cols) * e };
    int64_t tasks = (a->rows + ROWS - 1) / ROWS;
    if (pass == USLI_FORWARD) {
        usli_pool_run(x->ctx->pool, tasks, gather_rows, &j);
    } else {
        usli_pool_run(x->ctx->pool, (a->x_rows + ROWS - 1) / ROWS, zero_rows, &j);
        usli_pool_run(x->ctx->pool, tasks, scatter_rows, &j);
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_gather = { run, NULL };
