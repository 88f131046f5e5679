#include <math.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { PIECE = 2048 /* values at a time, in the first cache */ };

typedef struct job {
    const usli_cross_entropy_args *a;
    const usli_vec *v;
    float *rows;     /* (threads, 2, cols) */
    int32_t *argmax; /* (rows) 1 where the target is the largest */
} job;

/* z = what the loss sees of some logits, slope = d z / d capped; returns the largest. */
static float load_piece(const job *j, const char *at, float *z, float *slope, int64_t n) {
    const usli_cross_entropy_args *a = j->a;
    usli_row_store(j->v, usli_row_load(j->v, at, a->dtype, z, n), z, USL_F32, n);
    if (a->logit_scale != 1.0f) j->v->scale(a->logit_scale, z, n);
    if (a->softcap > 0) {
        j->v->scale(1.0f / a->softcap, z, n);
        j->v->tanh(z, n);
        for (int64_t i = 0; i < n; i++) slope[i] = 1.0f - z[i] * z[i];
        j->v->scale(a->softcap, z, n);
    }
    return j->v->max(z, n);
}

static void store_piece(const job *j, float *z, const float *slope, float factor, char *at, int64_t n) {
    const usli_cross_entropy_args *a = j->a;
    j->v->scale(factor, z, n);
    for (int64_t i = 0; a->softcap > 0 && i < n; i++) z[i] *= slope[i];
    usli_row_store(j->v, z, at, a->dtype, n);
}

static void task_fn(void *arg, int64_t r, int worker) {
    const job *j = arg;
    const usli_cross_entropy_args *a = j->a;
    int64_t n = a->cols, ld = a->ld ? a->ld : n, label = a->target[r];
    size_t e = usli_dtype_bytes(a->dtype);
    float *z = j->rows + (int64_t)worker * 2 * n, *slope = z + n, top = -INFINITY;
    char *at = (char *)a->logits + (size_t)(r * ld) * e;
    for (int64_t i = 0; i < n; i += PIECE) {
        float m = load_piece(j, at + (size_t)i * e, z + i, slope + i, n - i < PIECE ? n - i : PIECE);
        top = m > top ? m : top;
    }
    float target = z[label], sum = j->v->exp_sum(z, top, n);
    j->argmax[r] = target == top;
    a->losses[r] = isnan(sum) ? NAN : logf(sum) + top - target;
    if (!a->with_gradient) return;
    float k = a->update->inv_counted * a->update->loss_scale;
    z[label] -= sum; /* p / sum - 1 once divided, and exactly so where p is sum */
    for (int64_t i = 0; i < n; i += PIECE)
        store_piece(j, z + i, slope + i, k * a->logit_scale / sum, at + (size_t)i * e, n - i < PIECE ? n - i : PIECE);
}

static size_t rows_bytes(const usli_exec *x, const usli_cross_entropy_args *a) {
    return 2 * (size_t)usli_pool_threads(x->ctx->pool) * (size_t)a->cols * sizeof(float);
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_cross_entropy_args *a = args;
    (void)pass;
    return rows_bytes(x, a) + (size_t)a->rows * sizeof(int32_t);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_cross_entropy_args *a = args;
    (void)pass;
    for (int64_t r = 0; r < a->rows; r++)
        if (a->target[r] < 0 || a->target[r] >= a->cols)
            return usli_fail(x->ctx, USL_ERR_INVALID, "label %d is outside the vocabulary of %lld", a->target[r],
                             (long long)a->cols);
    job j = { a, usli_vec_best(), ws, (int32_t *)(void *)((char *)ws + rows_bytes(x, a)) };
    usli_pool_run(x->ctx->pool, a->rows, task_fn, &j);
    for (int64_t r = 0; r < a->rows; r++) {
        a->update->loss_sum += (double)a->losses[r];
        a->update->correct += j.argmax[r];
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_cross_entropy = { run, workspace };
