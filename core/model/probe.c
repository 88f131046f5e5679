/* How quick matrix products are here, so that a benchmark can say which share of them a step reaches. */
#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "core/model/model.h"

enum { TOKENS = 1024, REPEATS = 12 };

static usl_status measure(usli_exec *x, const usl_model *m, void *in, void *w, void *out, double *best) {
    const usli_config *c = &m->config;
    usli_segment segment = { .w = { .dtype = m->dtype, .rows = c->inter, .cols = c->hidden, .data = w } };
    usli_linear_args a = { .tokens = TOKENS,
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
        double rate = 2.0 * TOKENS * (double)c->hidden * (double)c->inter / (usli_now() - start);
        if (rate > *best) *best = rate;
    }
    return USL_OK;
}

static void fill(void *dst, usl_dtype dtype, int64_t n) {
    usli_rng rng;
    usli_rng_seed(&rng, 1);
    for (int64_t i = 0; i < n; i++) {
        float v = (float)(usli_rng_uniform(&rng) - 0.5);
        usli_from_f32(&v, (char *)dst + (size_t)i * usli_dtype_bytes(dtype), dtype, 1);
    }
}

usl_status usli_model_gemm_rate(usl_model *m, double *flops) {
    usl_ctx *ctx = m->ctx;
    size_t e = usli_dtype_bytes(m->dtype), d = (size_t)m->config.hidden, f = (size_t)m->config.inter;
    void *in = usli_malloc_aligned(ctx, TOKENS * d * e), *w = usli_malloc_aligned(ctx, d * f * e);
    void *out = usli_malloc_aligned(ctx, TOKENS * f * e), *base = usli_malloc_aligned(ctx, (size_t)1 << 26);
    usl_status st = in && w && out && base ? USL_OK : usli_nomem(ctx, d * f * e);
    if (st == USL_OK) {
        usli_arena arena;
        usli_arena_init(&arena, base, (size_t)1 << 26);
        usli_exec x = m->exec;
        x.arena = &arena;
        fill(in, m->dtype, (int64_t)(TOKENS * d));
        fill(w, m->dtype, (int64_t)(d * f));
        st = measure(&x, m, in, w, out, flops);
    }
    usli_free_aligned(ctx, in);
    usli_free_aligned(ctx, w);
    usli_free_aligned(ctx, out);
    usli_free_aligned(ctx, base);
    return st;
}
