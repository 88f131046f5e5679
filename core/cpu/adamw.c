#include <math.h>
#include <string.h>

#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"
#include "core/quant/optim8.h"

enum { CHUNK = 1 << 14 /* of a task: whole blocks of 256 */ };

typedef struct job {
    const usli_adamw_args *a;
    const usli_vec *v;
    float bounds_m[256], bounds_v[256];
    double correction1, root2; /* 1 - b1^t, sqrt(1 - b2^t) */
} job;

static const usli_param *find(const usli_adamw_args *a, int64_t chunk, int64_t *first) {
    for (int64_t i = 0;; i++) {
        int64_t chunks = (a->params[i].n + CHUNK - 1) / CHUNK;
        if (chunk < chunks) {
            *first = chunk * CHUNK;
            return &a->params[i];
        }
        chunk -= chunks;
    }
}

/* In double and rounded once, as torch does it. */
static usli_adamw_factors factors_of(const job *j, const usli_param *p) {
    const usli_adamw_args *a = j->a;
    double lr = (double)a->update->lr[p->group];
    return (usli_adamw_factors){ .beta1 = (float)a->beta1,
                                 .rest1 = (float)(1 - a->beta1),
                                 .beta2 = (float)a->beta2,
                                 .rest2 = (float)(1 - a->beta2),
                                 .root2 = (float)j->root2,
                                 .eps = (float)a->eps,
                                 .step = (float)(lr / j->correction1),
                                 .decay = (float)(1 - lr * (double)p->weight_decay),
                                 .clip = a->update->clip };
}

/* One block whose state is codes. */
static void update_block(const job *j, const usli_adamw_factors *f, const usli_param *p, int64_t at, int64_t n) {
    float m[USLI_OPTIM8_BLOCK], v[USLI_OPTIM8_BLOCK];
    uint8_t *m_codes = (uint8_t *)p->m + at, *v_codes = (uint8_t *)p->v + at;
    float *m_absmax = &p->m_absmax[at / USLI_OPTIM8_BLOCK], *v_absmax = &p->v_absmax[at / USLI_OPTIM8_BLOCK];
    usli_dequantize_blockwise(m_codes, n, usli_dynamic_map, m_absmax, m);
    usli_dequantize_blockwise(v_codes, n, usli_dynamic_map_unsigned, v_absmax, v);
    j->v->adamw(f, p->w + at, p->g + at, m, v, n);
    usli_quantize_block(m, (int)n, j->bounds_m, m_codes, m_absmax);
    usli_quantize_block(v, (int)n, j->bounds_v, v_codes, v_absmax);
}

static void task_fn(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first;
    const usli_param *p = find(j->a, task, &first);
    int64_t n = p->n - first < CHUNK ? p->n - first : CHUNK;
    usli_adamw_factors f = factors_of(j, p);
    if (!j->a->update->finite)
        memset(p->g + first, 0, (size_t)n * sizeof *p->g);
    else if (p->state == USL_F32)
        j->v->adamw(&f, p->w + first, p->g + first, (float *)p->m + first, (float *)p->v + first, n);
    else
        for (int64_t at = first; at < first + n; at += USLI_OPTIM8_BLOCK)
            update_block(j, &f, p, at, first + n - at < USLI_OPTIM8_BLOCK ? first + n - at : USLI_OPTIM8_BLOCK);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)pass, (void)ws;
    job j = { .a = args, .v = usli_vec_best() };
    usli_map_bounds(usli_dynamic_map, j.bounds_m);
    usli_map_bounds(usli_dynamic_map_unsigned, j.bounds_v);
    j.correction1 = 1 - pow(j.a->beta1, j.a->update->step);
    j.root2 = sqrt(1 - pow(j.a->beta2, j.a->update->step));
    int64_t chunks = 0;
    for (int64_t i = 0; i < j.a->count; i++) chunks += (j.a->params[i].n + CHUNK - 1) / CHUNK;
    usli_pool_run(x->ctx->pool, chunks, task_fn, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_adamw = { run, NULL };
