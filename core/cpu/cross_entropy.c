#include <math.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

typedef struct job {
    const usli_cross_entropy_args *a;
    const usli_vec *v;
    float *rows;     /* (threads, 2, cols) */
    int32_t *argmax; /* (rows) 1 where the target is the largest */
} job;

static void task_fn(void *arg, int64_t r, int worker) {
    const job *j = arg;
    const usli_cross_entropy_args *a = j->a;
    int64_t n = a->cols, ld = a->ld ? a->ld : n;
    float *z = j->rows + (int64_t)worker * 2 * n, *capped = z + n;
    char *at = (char *)a->logits + (size_t)(r * ld) * usli_dtype_bytes(a->dtype);
    usli_row_store(j->v, usli_row_load(j->v, at, a->dtype, z, n), z, USL_F32, n);
    if (a->logit_scale != 1.0f) j->v->scale(a->logit_scale, z, n);
    if (a->softcap > 0) {
        j->v->scale(1.0f / a->softcap, z, n);
        j->v->tanh(z, n);
        for (int64_t i = 0; i < n; i++) capped[i] = 1.0f - z[i] * z[i]; /* the cap's derivative */
        j->v->scale(a->softcap, z, n);
    }
    float top = j->v->max(z, n), target = z[a->target[r]];
    j->argmax[r] = target == top;
    float sum = j->v->exp_sum(z, top, n);
    a->losses[r] = logf(sum) + top - target;
    if (isnan(sum)) a->losses[r] = NAN;
    if (!a->with_gradient) return;
    float k = a->update->inv_counted * a->update->loss_scale;
    j->v->scale(k / sum, z, n);
    z[a->target[r]] -= k;
    if (a->softcap > 0)
        for (int64_t i = 0; i < n; i++) z[i] *= capped[i];
    if (a->logit_scale != 1.0f) j->v->scale(a->logit_scale, z, n);
    usli_row_store(j->v, z, at, a->dtype, n);
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
            return usli_fail(x->ctx, USL_ERR_INVALID, "label %d is outside the vocabulary of %lld", a->target[r], (long long)a->cols);
    job j = { a, usli_vec_best(), ws, (int32_t *)(void *)((char *)ws + rows_bytes(x, a)) };
    usli_pool_run(x->ctx->pool, a->rows, task_fn, &j);
    for (int64_t r = 0; r < a->rows; r++) {
        a->update->loss_sum += (double)a->losses[r];
        a->update->correct += j.argmax[r];
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_cross_entropy = { run, workspace };
