#include <math.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { TOKENS = 16, MAX_HEAD = 4096 };

typedef struct side {
    char *x;        /* q or k, or their gradients */
    int64_t stride; /* elements */
    int heads;
    const void *norm, *in;
    float *rstd, *partial;
} side;

typedef struct job {
    const usli_rope_args *a;
    const usli_vec *v;
    usli_pass pass;
    side q, k;
} job;

/* x: one head. sign -1 turns back. */
static void rotate(const usli_rope_args *a, int64_t token, float sign, float *x) {
    int half = a->rot_dim / 2;
    const float *c = a->cos + (int64_t)a->position[token] * half, *s = a->sin + (int64_t)a->position[token] * half;
    for (int i = 0; i < half; i++) {
        float *p = a->interleaved ? &x[2 * i] : &x[i], *q = a->interleaved ? &x[2 * i + 1] : &x[i + half];
        float u = *p, w = *q, sn = sign * s[i];
        *p = u * c[i] - w * sn;
        *q = w * c[i] + u * sn;
    }
}

static void forward_heads(const job *j, const side *s, int64_t t) {
    const usli_rope_args *a = j->a;
    float buf[MAX_HEAD];
    size_t e = usli_dtype_bytes(a->dtype);
    for (int h = 0; h < s->heads; h++) {
        char *at = s->x + (size_t)(t * s->stride + (int64_t)h * a->head_dim) * e;
        float *x = (float *)(uintptr_t)usli_row_load(j->v, at, a->dtype, buf, a->head_dim);
        if (s->norm) {
            float r = 1.0f / sqrtf(j->v->dot(x, x, a->head_dim) / (float)a->head_dim + a->norm_eps);
            if (s->rstd) s->rstd[t * s->heads + h] = r;
            for (int i = 0; i < a->head_dim; i++) x[i] *= r * (usli_get_float(s->norm, a->norm_dtype, i) + a->norm_offset);
        }
        rotate(a, t, 1.0f, x);
        usli_row_store(j->v, x, at, a->dtype, a->head_dim);
    }
}

static void backward_heads(const job *j, const side *s, int64_t t, float *partial) {
    const usli_rope_args *a = j->a;
    float buf[MAX_HEAD], in[MAX_HEAD], w[MAX_HEAD];
    size_t e = usli_dtype_bytes(a->dtype);
    int d = a->head_dim;
    for (int h = 0; h < s->heads; h++) {
        char *at = s->x + (size_t)(t * s->stride + (int64_t)h * d) * e;
        float *g = (float *)(uintptr_t)usli_row_load(j->v, at, a->dtype, buf, d);
        rotate(a, t, -1.0f, g);
        if (s->norm) {
            const float *n = usli_row_load(j->v, (const char *)s->in + (size_t)(t * s->stride + (int64_t)h * d) * e, a->dtype, in, d);
            float r = s->rstd[t * s->heads + h];
            for (int i = 0; i < d; i++) w[i] = usli_get_float(s->norm, a->norm_dtype, i) + a->norm_offset;
            float k = r * r * j->v->dot3(g, w, n, d) / (float)d;
            for (int i = 0; i < d; i++) {
                if (partial) partial[i] += g[i] * n[i] * r;
                g[i] = r * (g[i] * w[i] - n[i] * k);
            }
        }
        usli_row_store(j->v, g, at, a->dtype, d);
    }
}

static void task_fn(void *arg, int64_t task, int worker) {
    const job *j = arg;
    (void)worker;
    for (int64_t t = task * TOKENS; t < j->a->tokens && t < (task + 1) * TOKENS; t++) {
        const side *sides[] = { &j->q, &j->k };
        for (int i = 0; i < 2; i++) {
            if (j->pass == USLI_FORWARD)
                forward_heads(j, sides[i], t);
            else
                backward_heads(j, sides[i], t, sides[i]->partial ? sides[i]->partial + task * j->a->head_dim : NULL);
        }
    }
}

static int64_t tasks_of(const usli_rope_args *a) {
    return (a->tokens + TOKENS - 1) / TOKENS;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_rope_args *a = args;
    (void)x;
    size_t sums = pass == USLI_BACKWARD ? (size_t)(a->dq_norm != NULL) + (size_t)(a->dk_norm != NULL) : 0;
    return sums * (size_t)tasks_of(a) * (size_t)a->head_dim * sizeof(float);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_rope_args *a = args;
    if (a->head_dim > MAX_HEAD) return usli_fail(x->ctx, USL_ERR_UNSUPPORTED, "rope: heads of %d values are too wide", a->head_dim);
    for (int64_t t = 0; t < a->tokens; t++)
        if (a->position[t] < 0 || a->position[t] >= a->positions)
            return usli_fail(x->ctx, USL_ERR_INVALID, "position %d is beyond the %lld that rope was prepared for; raise max_seq_length",
                             a->position[t], (long long)a->positions);
    bool back = pass == USLI_BACKWARD;
    job j = { a, usli_vec_best(), pass,
              { back ? a->dq : a->q, a->q_stride, a->heads, a->q_norm, a->q_in, a->q_rstd, NULL },
              { back ? a->dk : a->k, a->k_stride, a->k || a->dk ? a->kv_heads : 0, a->k_norm, a->k_in, a->k_rstd, NULL } };
    int64_t sums = tasks_of(a) * a->head_dim;
    float *room = ws;
    for (int64_t i = 0; i < (back ? ((a->dq_norm != NULL) + (a->dk_norm != NULL)) * sums : 0); i++) room[i] = 0;
    if (back && a->dq_norm) j.q.partial = room, room += sums;
    if (back && a->dk_norm) j.k.partial = room;
    usli_pool_run(x->ctx->pool, tasks_of(a), task_fn, &j);
    for (int64_t t = 0; t < tasks_of(a); t++) {
        if (j.q.partial) j.v->axpy(1.0f, j.q.partial + t * a->head_dim, a->dq_norm, a->head_dim);
        if (j.k.partial) j.v->axpy(1.0f, j.k.partial + t * a->head_dim, a->dk_norm, a->head_dim);
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_rope = { run, workspace };
