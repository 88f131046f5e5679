#include <math.h>

#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { CHUNK = 1 << 14 };

typedef struct job {
    const usli_grad_norm_args *a;
    const usli_vec *v;
    double *sums; /* of each chunk */
} job;

/* Chunk number -> parameter and place; every chunk belongs to one parameter. */
static const usli_param *find(const usli_grad_norm_args *a, int64_t chunk, int64_t *first) {
    for (int64_t i = 0;; i++) {
        int64_t chunks = (a->params[i].n + CHUNK - 1) / CHUNK;
        if (chunk < chunks) {
            *first = chunk * CHUNK;
            return &a->params[i];
        }
        chunk -= chunks;
    }
}

static void task_fn(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first;
    const usli_param *p = find(j->a, task, &first);
    int64_t n = p->n - first < CHUNK ? p->n - first : CHUNK;
    j->sums[task] = j->v->squares(p->g + first, n);
}

static int64_t chunks_of(const usli_grad_norm_args *a) {
    int64_t n = 0;
    for (int64_t i = 0; i < a->count; i++) n += (a->params[i].n + CHUNK - 1) / CHUNK;
    return n;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    (void)x, (void)pass;
    return (size_t)chunks_of(args) * sizeof(double);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)pass;
    job j = { args, usli_vec_best(), ws };
    int64_t chunks = chunks_of(j.a);
    usli_pool_run(x->ctx->pool, chunks, task_fn, &j);
    double sum = 0;
    for (int64_t i = 0; i < chunks; i++) sum += j.sums[i];
    usli_update *u = j.a->update;
    double norm = sqrt(sum) / (double)u->loss_scale;
    u->grad_norm = (float)norm;
    u->finite = isfinite(sum) && isfinite(u->loss_sum); /* a loss may overflow where its gradient does not */
    double clip = u->max_norm > 0 ? (double)u->max_norm / (norm + 1e-6) : 1;
    u->clip = (float)((clip < 1 ? clip : 1) / (double)u->loss_scale);
    return USL_OK;
}

const usli_op_impl usli_cpu_grad_norm = { run, workspace };
