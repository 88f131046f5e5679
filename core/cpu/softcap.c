#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { PIECE = 4096 };

typedef struct job {
    const usli_softcap_args *a;
    const usli_vec *v;
} job;

static void task_fn(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first = task * PIECE, n = j->a->n - first < PIECE ? j->a->n - first : PIECE;
    float *z = j->a->z + first;
    j->v->scale(1.0f / j->a->softcap, z, n);
    j->v->tanh(z, n);
    j->v->scale(j->a->softcap, z, n);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)pass;
    (void)ws;
    job j = { args, usli_vec_best() };
    usli_pool_run(x->ctx->pool, (j.a->n + PIECE - 1) / PIECE, task_fn, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_softcap = { run, NULL };
