/* The warpers of transformers' generate, in its order: repetition penalty, temperature, top-k, top-p, min-p. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/cpu/cpu.h"

typedef struct candidate {
    float logit;
    int32_t id;
} candidate;

/* Largest first; of equals the lowest id. */
static int by_logit(const void *pa, const void *pb) {
    const candidate *a = pa, *b = pb;
    if (a->logit != b->logit) return a->logit > b->logit ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

static void penalise(const usli_sample_args *a, int64_t r, candidate *c) {
    float penalty = a->repetition_penalty;
    for (int32_t i = a->cu_seen[r]; i < a->cu_seen[r + 1]; i++) {
        int32_t id = a->seen[i];
        if (id < 0 || id >= a->cols || c[id].id < 0) continue;
        c[id].logit = c[id].logit > 0 ? c[id].logit / penalty : c[id].logit * penalty;
        c[id].id = -1 - c[id].id; /* once each */
    }
    for (int64_t i = 0; i < a->cols; i++)
        if (c[i].id < 0) c[i].id = -1 - c[i].id;
}

static int32_t argmax(const candidate *c, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (c[i].logit > c[best].logit) best = i;
    return c[best].id;
}

static int32_t draw(const usli_sample_args *a, int64_t r, candidate *c) {
    int64_t n = a->cols;
    for (int64_t i = 0; i < n; i++) c[i].logit /= a->temperature;
    qsort(c, (size_t)n, sizeof *c, by_logit);
    if (a->top_k > 0 && a->top_k < n) n = a->top_k;
    double top = (double)c[0].logit, sum = 0, seen = 0;
    for (int64_t i = 0; i < n; i++) sum += exp((double)c[i].logit - top);
    if (a->top_p > 0 && a->top_p < 1) {
        /* The smallest set whose probability reaches top_p; at least one. */
        int64_t keep = 0;
        while (keep < n && seen < (double)a->top_p * sum) seen += exp((double)c[keep++].logit - top);
        n = keep > 0 ? keep : 1;
    }
    if (a->min_p > 0)
        while (n > 1 && exp((double)c[n - 1].logit - top) < (double)a->min_p) n--;
    sum = 0;
    for (int64_t i = 0; i < n; i++) sum += exp((double)c[i].logit - top);
    uint32_t word[4];
    usli_philox(a->seed, *a->offset, (uint64_t)r, word);
    double at = ((double)((uint64_t)word[0] << 21 | word[1] >> 11) / 9007199254740992.0) * sum;
    for (int64_t i = 0; i < n; i++) {
        at -= exp((double)c[i].logit - top);
        if (at < 0) return c[i].id;
    }
    return c[n - 1].id;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    (void)x, (void)pass;
    return (size_t)((const usli_sample_args *)args)->cols * sizeof(candidate);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_sample_args *a = args;
    candidate *c = ws;
    (void)pass;
    for (int64_t r = 0; r < a->rows; r++) {
        for (int64_t i = 0; i < a->cols; i++) {
            c[i] = (candidate){ a->logits[r * a->cols + i], (int32_t)i };
            if (!(c[i].logit < INFINITY))
                return usli_fail(x->ctx, USL_ERR_NUMERIC, "the logits are not numbers; the weights are damaged or overflow in this dtype");
        }
        if (a->cu_seen && a->repetition_penalty != 1.0f) penalise(a, r, c);
        a->out[r] = a->temperature > 0 ? draw(a, r, c) : argmax(c, a->cols);
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_sample = { run, workspace };
