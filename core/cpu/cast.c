#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/decode.h"

enum { VALUES = 65536 }; /* of a task, a multiple of every type's block */

/* A task is a piece of one row, or several short rows: plain arrays come as one long row. */
typedef struct job {
    const usli_cast_args *a;
    int64_t pieces; /* of a row */
    int64_t rows;   /* of a task */
} job;

static void cast_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_cast_args *a = j->a;
    (void)worker;
    int64_t col = task % j->pieces * VALUES, first = task / j->pieces * j->rows;
    int64_t n = a->src.cols - col < VALUES ? a->src.cols - col : VALUES;
    for (int64_t row = first; row < a->src.rows && row < first + j->rows; row++) {
        int64_t to = row * (a->ld ? a->ld : a->src.cols) + col;
        char *dst = (char *)a->dst + (size_t)to * usli_dtype_bytes(a->dtype);
        usli_matrix_decode(&a->src, row, col, n, 1, dst, a->dtype);
    }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_cast_args *a = args;
    (void)ws;
    if (pass == USLI_BACKWARD) return usli_fail(x->ctx, USL_ERR_INTERNAL, "cast: no backward pass");
    USLI_TRY(usli_matrix_check(x->ctx, &a->src, "cast"));
    job j = { a, (a->src.cols + VALUES - 1) / VALUES, 1 };
    if (a->src.cols < VALUES) j.rows = VALUES / a->src.cols;
    usli_pool_run(x->ctx->pool, j.pieces * ((a->src.rows + j.rows - 1) / j.rows), cast_task, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_cast = { run, NULL };
