#include <math.h>
#include <string.h>

#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/quant/optim8.h"

enum { CHUNK = 1 << 14 /* of a task: whole blocks of 256 */ };

typedef struct job {
    const usli_adamw_args *a;
    float bounds_m[256], bounds_v[256];
    float correction1, correction2; /* 1 - b1^t, sqrt(1 - b2^t) */
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

static void update(const job *j, const usli_param *p, int64_t first, int64_t n, float *m, float *v) {
    const usli_adamw_args *a = j->a;
    const usli_update *u = a->update;
    float lr = u->lr[p->group], decay = 1.0f - lr * p->weight_decay, step = lr / j->correction1, clip = u->clip;
    float *w = p->w + first, *g = p->g + first;
    for (int64_t i = 0; i < n; i++) {
        float d = g[i] * clip;
        m[i] = a->beta1 * m[i] + (1.0f - a->beta1) * d;
        v[i] = a->beta2 * v[i] + (1.0f - a->beta2) * d * d;
        w[i] = w[i] * decay - step * m[i] / (sqrtf(v[i]) / j->correction2 + a->eps);
    }
}

static void task_fn(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    int64_t first;
    const usli_param *p = find(j->a, task, &first);
    int64_t n = p->n - first < CHUNK ? p->n - first : CHUNK;
    if (j->a->update->finite && p->state == USL_F32) {
        update(j, p, first, n, (float *)p->m + first, (float *)p->v + first);
    } else if (j->a->update->finite) {
        for (int64_t at = first; at < first + n; at += USLI_OPTIM8_BLOCK) {
            int64_t k = first + n - at < USLI_OPTIM8_BLOCK ? first + n - at : USLI_OPTIM8_BLOCK, block = at / USLI_OPTIM8_BLOCK;
            float m[USLI_OPTIM8_BLOCK], v[USLI_OPTIM8_BLOCK];
            usli_dequantize_blockwise((uint8_t *)p->m + at, k, usli_dynamic_map, &p->m_absmax[block], m);
            usli_dequantize_blockwise((uint8_t *)p->v + at, k, usli_dynamic_map_unsigned, &p->v_absmax[block], v);
            update(j, p, at, k, m, v);
            usli_quantize_block(m, (int)k, j->bounds_m, (uint8_t *)p->m + at, &p->m_absmax[block]);
            usli_quantize_block(v, (int)k, j->bounds_v, (uint8_t *)p->v + at, &p->v_absmax[block]);
        }
    }
    memset(p->g + first, 0, (size_t)n * sizeof *p->g);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)pass, (void)ws;
    job j = { .a = args };
    usli_map_bounds(usli_dynamic_map, j.bounds_m);
    usli_map_bounds(usli_dynamic_map_unsigned, j.bounds_v);
    j.correction1 = (float)(1.0 - pow((double)j.a->beta1, j.a->update->step));
    j.correction2 = (float)sqrt(1.0 - pow((double)j.a->beta2, j.a->update->step));
    int64_t chunks = 0;
    for (int64_t i = 0; i < j.a->count; i++) chunks += (j.a->params[i].n + CHUNK - 1) / CHUNK;
    usli_pool_run(x->ctx->pool, chunks, task_fn, &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_adamw = { run, NULL };
