/* How quick matrix products are here, so that a benchmark can say which share of them a step reaches. */
#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "core/model/model.h"

enum { REPEATS = 12 };

static usl_status measure(usli_exec *x, const usl_model *m, int64_t tokens, void *in, void *w, void *out,
                          double *best) {
    const usli_config *c = &m->config;
    usli_segment segment = { .w = { .dtype = m->dtype, .rows = c->inter, .cols = c->hidden, .data = w } };
    usli_linear_args a = { .tokens = tokens,
                           .in = c->hidden,
                           .out = c->inter,
                           .segments = 1,
                           .segment = &segment,
                           .dtype = m->dtype,
                           .y_dtype = m->dtype,
                           .x = in,
                           .y = out };
    *best = 0;
    for (int i = 0; i < REPEATS; i++) {
        double start = usli_now();
        USLI_TRY(usli_op_linear(x, &a, USLI_FORWARD));
        USLI_TRY(x->backend->sync(x));
        double rate = 2.0 * (double)tokens * (double)c->hidden * (double)c->inter / (usli_now() - start);
        if (rate > *best) *best = rate;
    }
    return USL_OK;
}

/* New device memory with small random numbers. */
static usl_status numbers(usli_exec *x, usl_dtype dtype, int64_t n, void **out) {
    size_t bytes = (size_t)n * usli_dtype_bytes(dtype);
    char *host = usli_malloc(x->ctx, bytes);
    usli_rng rng;
    usl_status st = host ? usli_device_alloc(x, bytes, out) : usli_nomem(x->ctx, bytes);
    usli_rng_seed(&rng, 1);
    for (int64_t i = 0; st == USL_OK && i < n; i++) {
        float v = (float)(usli_rng_uniform(&rng) - 0.5);
        usli_from_f32(&v, host + (size_t)i * usli_dtype_bytes(dtype), dtype, 1);
    }
    if (st == USL_OK) st = x->backend->copy_in(x, *out, host, bytes);
    usli_free(x->ctx, host);
    return st;
}

usl_status usli_model_gemm_rate(usl_model *m, double *flops) {
    int64_t tokens = m->exec.backend->host ? 1024 : 4096, d = m->config.hidden, f = m->config.inter;
    size_t scratch = (size_t)1 << (m->exec.backend->host ? 26 : 30);
    usli_exec x = m->exec;
    usli_arena arena;
    x.arena = &arena;
    void *in = NULL, *w = NULL, *out = NULL, *base = NULL;
    usl_status st;
    USLI_TRYGO(numbers(&x, m->dtype, tokens * d, &in));
    USLI_TRYGO(numbers(&x, m->dtype, d * f, &w));
    USLI_TRYGO(usli_device_alloc(&x, (size_t)(tokens * f) * usli_dtype_bytes(m->dtype), &out));
    USLI_TRYGO(usli_device_alloc(&x, scratch, &base));
    usli_arena_init(&arena, base, scratch);
    st = measure(&x, m, tokens, in, w, out, flops);
done:
    usli_device_free(&x, in);
    usli_device_free(&x, w);
    usli_device_free(&x, out);
    usli_device_free(&x, base);
    return st;
}
