#include <math.h>

#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/decode.h"
#include "core/cpu/vec.h"

enum { ROWS = 16 /* of a task */, CHUNK = 1024 /* a multiple of every type's block */ };

static void norm_rows(void *arg, int64_t task, int worker) {
    const usli_dora_args *a = arg;
    const usli_lora *l = &a->lora;
    const usli_vec *v = usli_vec_best();
    (void)worker;
    float row[CHUNK];
    for (int64_t o = task * ROWS; o < a->w.rows && o < (task + 1) * ROWS; o++) {
        double sum = 0;
        for (int64_t col = 0; col < a->w.cols; col += CHUNK) {
            int64_t n = a->w.cols - col < CHUNK ? a->w.cols - col : CHUNK;
            usli_matrix_read(&a->w, o, col, n, USL_F32, row);
            for (int r = 0; r < l->rank; r++)
                v->axpy(l->scale * l->b[o * l->rank + r], l->a + r * a->w.cols + col, row, n);
            sum += v->squares(row, n);
        }
        a->norm[o] = (float)sqrt(sum);
    }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    usli_dora_args *a = args;
    (void)pass, (void)ws;
    USLI_TRY(usli_matrix_check(x->ctx, &a->w, "dora"));
    usli_pool_run(x->ctx->pool, (a->w.rows + ROWS - 1) / ROWS, norm_rows, a);
    return USL_OK;
}

const usli_op_impl usli_cpu_dora = { run, NULL };
