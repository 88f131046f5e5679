#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { TOKENS = 16 /* of a task */, COLS = 512 /* at a time */ };

static void sum_tokens(void *arg, int64_t task, int worker) {
    const usli_combine_args *a = arg;
    const usli_vec *v = usli_vec_best();
    size_t e = usli_dtype_bytes(a->dtype);
    (void)worker;
    float sum[COLS], room[COLS];
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++)
        for (int64_t c = 0; c < a->cols; c += COLS) {
            int64_t n = a->cols - c < COLS ? a->cols - c : COLS;
            for (int64_t i = 0; i < n; i++) sum[i] = 0;
            for (int k = 0; k < a->top_k; k++) {
                const char *x = (const char *)a->x + (size_t)(a->row[t * a->top_k + k] * a->cols + c) * e;
                v->axpy(1, usli_row_load(v, x, a->dtype, room, n), sum, n);
            }
            usli_row_store(v, sum, (char *)a->y + (size_t)(t * a->cols + c) * e, a->dtype, n);
        }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    usli_combine_args *a = args;
    (void)pass;
    (void)ws;
    usli_pool_run(x->ctx->pool, (a->tokens + TOKENS - 1) / TOKENS, sum_tokens, a);
    return USL_OK;
}

const usli_op_impl usli_cpu_combine = { run, NULL };
