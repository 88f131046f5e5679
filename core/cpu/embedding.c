#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/decode.h"
#include "core/cpu/vec.h"

enum { TOKENS = 16, COLS = 64 /* of a task, forward and backward */, CHUNK = 1024 };

static int64_t dy_at(const usli_embedding_args *a, int64_t token, int64_t col) {
    return token * (a->lddy ? a->lddy : a->cols) + col;
}

static void look_up(void *arg, int64_t task, int worker) {
    const usli_embedding_args *a = arg;
    (void)worker;
    size_t row_bytes = (size_t)a->cols * usli_dtype_bytes(a->dtype);
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++)
        usli_matrix_decode(&a->table, a->ids[t], 0, a->cols, a->scale, (char *)a->y + (size_t)t * row_bytes, a->dtype);
}

/* The same with an adapter beside the table. */
static void look_up_adapted(void *arg, int64_t task, int worker) {
    const usli_embedding_args *a = arg;
    const usli_lora *l = &a->lora;
    const usli_vec *v = usli_vec_best();
    (void)worker;
    float row[CHUNK];
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++)
        for (int64_t col = 0; col < a->cols; col += CHUNK) {
            int64_t n = a->cols - col < CHUNK ? a->cols - col : CHUNK;
            usli_matrix_read(&a->table, a->ids[t], col, n, USL_F32, row);
            for (int64_t i = 0; i < n; i++) {
                float low = 0;
                for (int r = 0; r < l->rank; r++)
                    low += l->b[(col + i) * l->rank + r] * l->a[r * a->table.rows + a->ids[t]];
                row[i] = a->scale * (row[i] + l->scale * low);
            }
            usli_row_store(v, row, (char *)a->y + (size_t)(t * a->cols + col) * usli_dtype_bytes(a->dtype), a->dtype,
                           n);
        }
}

/* ---- The adapter's gradients: p = dy B and A[:, ids] are (tokens, rank) in the workspace ---- */

typedef struct adapter {
    const usli_embedding_args *a;
    float *p, *picked;
    float scale;
} adapter;

static void make_p(void *arg, int64_t task, int worker) {
    const adapter *j = arg;
    const usli_embedding_args *a = j->a;
    const usli_lora *l = &a->lora;
    (void)worker;
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++)
        for (int r = 0; r < l->rank; r++) {
            double sum = 0;
            for (int64_t i = 0; i < a->cols; i++)
                sum += (double)usli_get_float(a->dy, a->dtype, dy_at(a, t, i)) * (double)l->b[i * l->rank + r];
            j->p[t * l->rank + r] = j->scale * (float)sum;
            j->picked[t * l->rank + r] = l->a[r * a->table.rows + a->ids[t]];
        }
}

static void add_a(void *arg, int64_t r, int worker) {
    const adapter *j = arg;
    const usli_embedding_args *a = j->a;
    (void)worker;
    for (int64_t t = 0; t < a->tokens; t++) a->lora.da[r * a->table.rows + a->ids[t]] += j->p[t * a->lora.rank + r];
}

static void add_b(void *arg, int64_t task, int worker) {
    const adapter *j = arg;
    const usli_embedding_args *a = j->a;
    const usli_vec *v = usli_vec_best();
    int rank = a->lora.rank;
    (void)worker;
    for (int64_t i = task * COLS; i < a->cols && i < (task + 1) * COLS; i++)
        for (int64_t t = 0; t < a->tokens; t++)
            v->axpy(j->scale * usli_get_float(a->dy, a->dtype, dy_at(a, t, i)), j->picked + t * rank,
                    a->lora.db + i * rank, rank);
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_embedding_args *a = args;
    (void)x;
    return pass == USLI_BACKWARD ? 2 * (size_t)(a->tokens * a->lora.rank) * sizeof(float) : 0;
}

static void adapter_backward(usli_exec *x, const usli_embedding_args *a, float *ws) {
    adapter j = { a, ws, ws + a->tokens * a->lora.rank, a->scale * a->lora.scale };
    usli_pool_run(x->ctx->pool, (a->tokens + TOKENS - 1) / TOKENS, make_p, &j);
    if (a->lora.da) usli_pool_run(x->ctx->pool, a->lora.rank, add_a, &j);
    if (a->lora.db) usli_pool_run(x->ctx->pool, (a->cols + COLS - 1) / COLS, add_b, &j);
}

/* A task owns some columns and walks all tokens in order: one id may occur many times. */
static void add_columns(void *arg, int64_t task, int worker) {
    const usli_embedding_args *a = arg;
    (void)worker;
    const usli_vec *v = usli_vec_best();
    float room[COLS];
    int64_t col = task * COLS, n = a->cols - col < COLS ? a->cols - col : COLS;
    for (int64_t t = 0; t < a->tokens; t++) {
        const void *dy = (const char *)a->dy + (size_t)dy_at(a, t, col) * usli_dtype_bytes(a->dtype);
        v->axpy(a->scale, usli_row_load(v, dy, a->dtype, room, n), a->dtable + a->ids[t] * a->cols + col, n);
    }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    usli_embedding_args *a = args;
    for (int64_t t = 0; t < a->tokens; t++)
        if (a->ids[t] < 0 || a->ids[t] >= a->table.rows)
            return usli_fail(x->ctx, USL_ERR_INVALID,
                             "token id %d is outside the vocabulary of %lld; the tokenizer and the model differ",
                             (int)a->ids[t], (long long)a->table.rows);
    if (pass == USLI_FORWARD) {
        USLI_TRY(usli_matrix_check(x->ctx, &a->table, "embedding"));
        usli_pool_run(x->ctx->pool, (a->tokens + TOKENS - 1) / TOKENS, a->lora.rank ? look_up_adapted : look_up, a);
    } else {
        if (a->dtable) usli_pool_run(x->ctx->pool, (a->cols + COLS - 1) / COLS, add_columns, a);
        if (a->lora.da || a->lora.db) adapter_backward(x, a, ws);
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_embedding = { run, workspace };
