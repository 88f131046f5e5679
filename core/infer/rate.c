/* How quick generation is here, for benchmarks. */
#include <stdlib.h>

#include "core/base/rng.h"
#include "core/infer/generate.h"
#include "core/quant/traits.h"

enum { COPIES = 6 };

/* ---- Bytes ---------------------------------------------------------------------------------------------------------
 */

static uint64_t matrix_bytes(const usli_matrix *w) {
    return w->nf4 ? usli_nf4_bytes(w->rows * w->cols) : (uint64_t)w->rows * usli_row_bytes(w->dtype, w->cols);
}

/* The share of a stack that so many tokens read when no two choose the same expert. */
static double share_read(const usl_model *m, usli_slot slot, int rows) {
    int64_t experts = usli_slot_experts(&m->config, slot), chosen = rows * m->config.top_k;
    return !experts || chosen >= experts ? 1 : (double)chosen / (double)experts;
}

static uint64_t step_bytes(const usl_model *m, int rows) {
    uint64_t bytes = matrix_bytes(&usli_model_head(m)->d);
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++) {
            const usli_matrix *w = &usli_model_weight(m, (usli_slot)s, l)->d;
            if (!usli_model_weight(m, (usli_slot)s, l)->storage) continue;
            bytes += (uint64_t)((double)matrix_bytes(w) * share_read(m, (usli_slot)s, rows));
            if (m->active)
                bytes += (uint64_t)usli_adapter_module(m, m->active, (usli_slot)s, l)->rank *
                         (uint64_t)(w->rows + w->cols) * sizeof(float);
        }
    return bytes;
}

static usl_status measure_copies(usli_exec *x, double *best) {
    size_t bytes = (size_t)1 << (x->backend->host ? 26 : 30);
    void *from = NULL, *to = NULL;
    usl_status st;
    *best = 0;
    USLI_TRYGO(usli_device_alloc(x, bytes, &from));
    USLI_TRYGO(usli_device_alloc(x, bytes, &to));
    USLI_TRYGO(x->backend->zero(x, from, bytes));
    for (int i = 0; i < COPIES; i++) {
        USLI_TRYGO(x->backend->sync(x));
        double start = usli_now();
        USLI_TRYGO(x->backend->copy_beside(x, to, from, bytes, 0));
        USLI_TRYGO(x->backend->await_copy(x, 0));
        USLI_TRYGO(x->backend->sync(x));
        double rate = 2.0 * (double)bytes / (usli_now() - start);
        if (rate > *best) *best = rate;
    }
    st = USL_OK;
done:
    usli_device_free(x, from);
    usli_device_free(x, to);
    return st;
}

/* ---- Time ----------------------------------------------------------------------------------------------------------
 */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static usl_status measure_steps(usl_generator *g, int64_t steps, double *seconds, usl_decode_rate *out) {
    int32_t id;
    for (int64_t i = 0; i <= steps; i++) {
        double start = usli_now();
        USLI_TRY(usli_generator_next(g, &id));
        *(i ? &seconds[i - 1] : &out->first_seconds) = usli_now() - start;
    }
    qsort(seconds, (size_t)steps, sizeof *seconds, by_value);
    out->step_seconds = seconds[steps / 2];
    return USL_OK;
}

static void random_prompts(usl_model *m, int rows, int64_t tokens, int32_t *ids, usli_prompt *prompts) {
    usli_rng rng;
    usli_rng_seed(&rng, 1);
    for (int64_t i = 0; i < rows * tokens; i++) ids[i] = (int32_t)(usli_rng_uniform(&rng) * (double)m->config.vocab);
    for (int i = 0; i < rows; i++) prompts[i] = (usli_prompt){ ids + i * tokens, tokens };
}

usl_status usli_decode_rate(usl_model *m, int rows, int64_t prompt, int64_t new_tokens, usl_decode_rate *out) {
    usl_ctx *ctx = m->ctx;
    if (rows < 1 || prompt < 1 || new_tokens < 2 || prompt > m->context || new_tokens > m->context - prompt)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "%d rows of %lld tokens and %lld new ones cannot be measured; give a row or more, a token or "
                         "more of prompt, two or more new ones, and no more together than max_seq_length %lld",
                         rows, (long long)prompt, (long long)new_tokens, (long long)m->context);
    usl_generate_opts opts = USL_GENERATE_OPTS_INIT;
    opts.max_new_tokens = new_tokens;
    opts.stop_ids = &(int32_t){ 0 };
    opts.stop_count = 0;
    usl_generator *g = NULL;
    usl_status st;
    *out = (usl_decode_rate){ .step_bytes = step_bytes(m, rows) };
    int32_t *ids = usli_calloc(ctx, (size_t)rows * (size_t)prompt, sizeof *ids);
    usli_prompt *prompts = usli_calloc(ctx, (size_t)rows, sizeof *prompts);
    double *seconds = usli_calloc(ctx, (size_t)new_tokens, sizeof *seconds);
    if (!ids || !prompts || !seconds) {
        st = usli_nomem(ctx, (size_t)rows * (size_t)prompt * sizeof *ids);
        goto done;
    }
    USLI_TRYGO(usli_model_check_weights(m));
    random_prompts(m, rows, prompt, ids, prompts);
    USLI_TRYGO(usli_generator_new(m, prompts, rows, &opts, &g));
    USLI_TRYGO(measure_steps(g, new_tokens - 1, seconds, out));
    usli_exec x = m->exec;
    USLI_TRYGO(measure_copies(&x, &out->copy_rate));
done:
    usli_generator_free(g);
    usli_free(ctx, ids);
    usli_free(ctx, prompts);
    usli_free(ctx, seconds);
    return st;
}
