#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

enum { TOKENS = 16 /* of a task */, COLS = 512 /* at a time */ };

typedef struct job {
    const usli_latent_args *a;
    size_t e; /* bytes of a value */
} job;

static char *at(const job *j, const void *data, int64_t i) {
    return (char *)(uintptr_t)data + (size_t)i * j->e;
}

static void join_tokens(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_latent_args *a = j->a;
    (void)worker;
    int64_t both = a->narrow + a->v_dim, key = a->narrow + a->rotated;
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++)
        for (int64_t i = t * a->heads; i < (t + 1) * a->heads; i++) {
            memcpy(at(j, a->k, i * key), at(j, a->kv, i * both), (size_t)a->narrow * j->e);
            memcpy(at(j, a->k, i * key + a->narrow), at(j, a->shared, t * a->shared_stride), (size_t)a->rotated * j->e);
            memcpy(at(j, a->v, i * a->v_dim), at(j, a->kv, i * both + a->narrow), (size_t)a->v_dim * j->e);
        }
}

/* Heads are summed in their order. */
static void sum_shared(const job *j, int64_t t) {
    const usli_latent_args *a = j->a;
    const usli_vec *v = usli_vec_best();
    int64_t key = a->narrow + a->rotated;
    float sum[COLS], room[COLS];
    for (int64_t c = 0; c < a->rotated; c += COLS) {
        int64_t n = a->rotated - c < COLS ? a->rotated - c : COLS;
        for (int64_t i = 0; i < n; i++) sum[i] = 0;
        for (int64_t h = t * a->heads; h < (t + 1) * a->heads; h++)
            v->axpy(1, usli_row_load(v, at(j, a->dk, h * key + a->narrow + c), a->dtype, room, n), sum, n);
        usli_row_store(v, sum, at(j, a->dshared, t * a->shared_stride + c), a->dtype, n);
    }
}

static void part_tokens(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_latent_args *a = j->a;
    (void)worker;
    int64_t both = a->narrow + a->v_dim, key = a->narrow + a->rotated;
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++) {
        for (int64_t i = t * a->heads; i < (t + 1) * a->heads; i++) {
            memcpy(at(j, a->dkv, i * both), at(j, a->dk, i * key), (size_t)a->narrow * j->e);
            memcpy(at(j, a->dkv, i * both + a->narrow), at(j, a->dv, i * a->v_dim), (size_t)a->v_dim * j->e);
        }
        sum_shared(j, t);
    }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_latent_args *a = args;
    (void)ws;
    job j = { a, usli_dtype_bytes(a->dtype) };
    usli_pool_run(x->ctx->pool, (a->tokens + TOKENS - 1) / TOKENS, pass == USLI_FORWARD ? join_tokens : part_tokens,
                  &j);
    return USL_OK;
}

const usli_op_impl usli_cpu_latent = { run, NULL };
