#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/decode.h"
#include "core/cpu/vec.h"

enum { TOKENS = 16, COLS = 64 }; /* of a task, forward and backward */

static void look_up(void *arg, int64_t task, int worker) {
    const usli_embedding_args *a = arg;
    (void)worker;
    size_t row_bytes = (size_t)a->cols * usli_dtype_bytes(a->dtype);
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++)
        usli_matrix_decode(&a->table, a->ids[t], 0, a->cols, a->scale, (char *)a->y + (size_t)t * row_bytes, a->dtype);
}

/* A task owns some columns and walks all tokens in order: one id may occur many times. */
static void add_columns(void *arg, int64_t task, int worker) {
    const usli_embedding_args *a = arg;
    (void)worker;
    const usli_vec *v = usli_vec_best();
    float room[COLS];
    int64_t col = task * COLS, n = a->cols - col < COLS ? a->cols - col : COLS;
    for (int64_t t = 0; t < a->tokens; t++) {
        const void *dy = (const char *)a->dy + (size_t)(t * a->cols + col) * usli_dtype_bytes(a->dtype);
        v->axpy(a->scale, usli_row_load(v, dy, a->dtype, room, n), a->dtable + a->ids[t] * a->cols + col, n);
    }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    usli_embedding_args *a = args;
    (void)ws;
    for (int64_t t = 0; t < a->tokens; t++)
        if (a->ids[t] < 0 || a->ids[t] >= a->table.rows)
            return usli_fail(x->ctx, USL_ERR_INVALID,
                             "token id %d is outside the vocabulary of %lld; the tokenizer and the model differ",
                             (int)a->ids[t], (long long)a->table.rows);
    if (pass == USLI_FORWARD) {
        USLI_TRY(usli_matrix_check(x->ctx, &a->table, "embedding"));
        usli_pool_run(x->ctx->pool, (a->tokens + TOKENS - 1) / TOKENS, look_up, a);
    } else {
        usli_pool_run(x->ctx->pool, (a->cols + COLS - 1) / COLS, add_columns, a);
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_embedding = { run, NULL };
