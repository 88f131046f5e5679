#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { TOKENS = 16, MAX_HEAD = 4096 };

typedef struct side {
    char *x;        /* q or k, or their gradients */
    int64_t stride; /* elements */
    int heads;
    const float *norm; /* weight + offset, or NULL */
    const void *in;
    float *rstd, *partial;
} side;

typedef struct job {
    const usli_rope_args *a;
    const usli_vec *v;
    usli_pass pass;
    side q, k;
} job;

static int64_t head_stride(const usli_rope_args *a) {
    return a->head_stride ? a->head_stride : a->head_dim;
}

/* x: one head. sign -1 turns back. */
static void rotate(const job *j, int64_t token, float sign, float *x) {
    const usli_rope_args *a = j->a;
    int half = a->rot_dim / 2;
    const float *c = a->cos + (int64_t)a->position[token] * half, *s = a->sin + (int64_t)a->position[token] * half;
    if (!a->interleaved) {
        j->v->rotate(c, s, sign, x, half);
        return;
    }
    for (int i = 0; i < half; i++) {
        float u = x[2 * i], w = x[2 * i + 1], sn = sign * s[i];
        x[2 * i] = u * c[i] - w * sn;
        x[2 * i + 1] = w * c[i] + u * sn;
    }
}

static void forward_heads(const job *j, const side *s, int64_t t) {
    const usli_rope_args *a = j->a;
    float buf[MAX_HEAD];
    size_t e = usli_dtype_bytes(a->dtype);
    for (int h = 0; h < s->heads; h++) {
        char *at = s->x + (size_t)(t * s->stride + h * head_stride(a)) * e;
        float *x = (float *)(uintptr_t)usli_row_load(j->v, at, a->dtype, buf, a->head_dim);
        if (s->norm) {
            float r = 1.0f / sqrtf(j->v->dot(x, x, a->head_dim) / (float)a->head_dim + a->norm_eps);
            if (s->rstd) s->rstd[t * s->heads + h] = r;
            j->v->times(r, x, s->norm, x, a->head_dim);
        }
        rotate(j, t, 1.0f, x);
        usli_row_store(j->v, x, at, a->dtype, a->head_dim);
    }
}

static void backward_heads(const job *j, const side *s, int64_t t, float *partial) {
    const usli_rope_args *a = j->a;
    float buf[MAX_HEAD], in[MAX_HEAD];
    size_t e = usli_dtype_bytes(a->dtype);
    int d = a->head_dim;
    for (int h = 0; h < s->heads; h++) {
        size_t at = (size_t)(t * s->stride + h * head_stride(a)) * e;
        float *g = (float *)(uintptr_t)usli_row_load(j->v, s->x + at, a->dtype, buf, d);
        rotate(j, t, -1.0f, g);
        if (s->norm) {
            const float *n = usli_row_load(j->v, (const char *)s->in + at, a->dtype, in, d);
            float r = s->rstd[t * s->heads + h], k = r * r * j->v->dot3(g, s->norm, n, d) / (float)d;
            if (partial) j->v->add_times(r, g, n, partial, d);
            j->v->norm_backward(r, k, n, s->norm, g, g, d);
        }
        usli_row_store(j->v, g, s->x + at, a->dtype, d);
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
    size_t weights = (size_t)(a->q_norm != NULL) + (size_t)(a->k_norm != NULL);
    return (weights + sums * (size_t)tasks_of(a)) * (size_t)a->head_dim * sizeof(float);
}

/* A norm's weight + offset, taken from the workspace. */
static const float *norm_weight(const usli_rope_args *a, const void *norm, float **room) {
    if (!norm) return NULL;
    float *w = *room;
    *room += a->head_dim;
    usli_to_f32(norm, a->norm_dtype, w, a->head_dim);
    for (int i = 0; i < a->head_dim; i++) w[i] += a->norm_offset;
    return w;
}

/* Zeros for the tasks' sums of a norm's gradient. */
static float *norm_sums(const usli_rope_args *a, const float *gradient, float **room) {
    if (!gradient) return NULL;
    float *sums = *room;
    *room += tasks_of(a) * a->head_dim;
    memset(sums, 0, (size_t)(tasks_of(a) * a->head_dim) * sizeof *sums);
    return sums;
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_rope_args *a = args;
    if (a->head_dim > MAX_HEAD)
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED, "rope: heads of %d values are too wide", a->head_dim);
    for (int64_t t = 0; t < a->tokens; t++)
        if (a->position[t] < 0 || a->position[t] >= a->positions)
            return usli_fail(x->ctx, USL_ERR_INVALID,
                             "position %d is beyond the %lld that rope was prepared for; raise max_seq_length",
                             a->position[t], (long long)a->positions);
    bool back = pass == USLI_BACKWARD;
    float *room = ws;
    job j = { .a = a, .v = usli_vec_best(), .pass = pass };
    j.q = (side){
        back ? a->dq : a->q, a->q_stride, a->heads, norm_weight(a, a->q_norm, &room), a->q_in, a->q_rstd, NULL
    };
    j.k = (side){
        back ? a->dk : a->k, a->k_stride, a->k || a->dk ? a->kv_heads : 0, norm_weight(a, a->k_norm, &room), a->k_in,
        a->k_rstd,           NULL
    };
    if (back) {
        j.q.partial = norm_sums(a, a->dq_norm, &room);
        j.k.partial = norm_sums(a, a->dk_norm, &room);
    }
    usli_pool_run(x->ctx->pool, tasks_of(a), task_fn, &j);
    for (int64_t t = 0; t < tasks_of(a); t++) {
        if (j.q.partial) j.v->axpy(1.0f, j.q.partial + t * a->head_dim, a->dq_norm, a->head_dim);
        if (j.k.partial) j.v->axpy(1.0f, j.k.partial + t * a->head_dim, a->dk_norm, a->head_dim);
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_rope = { run, workspace };
