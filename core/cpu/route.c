#include <math.h>
#include <string.h>

#include "core/base/pool.h"
#include "core/cpu/cpu.h"

enum { TOKENS = 32 /* of a task */ };

/* s of one token, exactly as both passes need it. */
static void scores(const usli_route_args *a, int64_t t, float *s) {
    const float *z = a->logits + t * a->experts;
    if (a->sigmoid) {
        for (int e = 0; e < a->experts; e++) s[e] = 1.0f / (1.0f + expf(-z[e]));
        return;
    }
    float top = z[0], sum = 0;
    for (int e = 1; e < a->experts; e++) top = fmaxf(top, z[e]);
    for (int e = 0; e < a->experts; e++) sum += s[e] = expf(z[e] - top);
    for (int e = 0; e < a->experts; e++) s[e] /= sum;
}

/* The index of the largest of n values, the lowest of equals; a NaN is never larger. */
static int best_of(const float *v, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (v[i] > v[best]) best = i;
    return best;
}

/* Leaves -infinity in the place of experts outside the best groups. */
static void keep_best_groups(const usli_route_args *a, float *choice) {
    int size = a->experts / a->groups;
    float worth[USLI_MAX_GROUPS];
    bool kept[USLI_MAX_GROUPS] = { false };
    for (int g = 0; g < a->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int i = 0; i < size; i++) {
            float v = choice[g * size + i];
            if (v > first)
                second = first, first = v;
            else if (v > second)
                second = v;
        }
        worth[g] = a->by_pairs ? first + second : first;
    }
    for (int i = 0; i < a->best_groups; i++) {
        int g = best_of(worth, a->groups);
        kept[g] = true;
        worth[g] = -INFINITY;
    }
    for (int e = 0; e < a->experts; e++)
        if (!kept[e / size]) choice[e] = -INFINITY;
}

static float chosen_sum(const usli_route_args *a, const int32_t *chosen, const float *s) {
    float sum = 1e-20f;
    for (int k = 0; k < a->top_k; k++) sum += s[chosen[k]];
    return sum;
}

static void choose_tokens(void *arg, int64_t task, int worker) {
    const usli_route_args *a = arg;
    (void)worker;
    float s[USLI_MAX_EXPERTS], choice[USLI_MAX_EXPERTS];
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++) {
        int32_t *chosen = a->chosen + t * a->top_k;
        scores(a, t, s);
        for (int e = 0; e < a->experts; e++) choice[e] = s[e] + (a->correction ? a->correction[e] : 0);
        if (a->groups > 1) keep_best_groups(a, choice);
        for (int k = 0; k < a->top_k; k++) {
            chosen[k] = best_of(choice, a->experts);
            choice[chosen[k]] = -INFINITY;
        }
    }
}

/* A stable sort by counting. */
static void sort_rows(const usli_route_args *a) {
    int32_t next[USLI_MAX_EXPERTS] = { 0 };
    int64_t slots = a->tokens * a->top_k;
    for (int64_t i = 0; i < slots; i++) next[a->chosen[i]]++;
    a->offsets[0] = 0;
    for (int e = 0; e < a->experts; e++) {
        a->offsets[e + 1] = a->offsets[e] + next[e];
        next[e] = a->offsets[e];
    }
    for (int64_t i = 0; i < slots; i++) {
        int32_t row = next[a->chosen[i]]++;
        a->row[i] = row;
        a->token[row] = (int32_t)(i / a->top_k);
    }
}

static int64_t row_of(const usli_route_args *a, int64_t slot) {
    return a->row ? a->row[slot] : slot;
}

static void weigh_tokens(void *arg, int64_t task, int worker) {
    const usli_route_args *a = arg;
    (void)worker;
    float s[USLI_MAX_EXPERTS];
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++) {
        const int32_t *chosen = a->chosen + t * a->top_k;
        scores(a, t, s);
        float over = a->normalised ? chosen_sum(a, chosen, s) : 1;
        for (int k = 0; k < a->top_k; k++) a->weight[row_of(a, t * a->top_k + k)] = s[chosen[k]] / over * a->scale;
    }
}

/* A task is a micro-batch. */
static void count_micro(void *arg, int64_t task, int worker) {
    const usli_route_args *a = arg;
    (void)worker;
    float s[USLI_MAX_EXPERTS];
    double sum[USLI_MAX_EXPERTS] = { 0 };
    int32_t *counts = a->counts + task * a->experts;
    int64_t first = a->micro[task] - a->first, last = a->micro[task + 1] - a->first;
    for (int64_t t = first > 0 ? first : 0; t < last && t < a->tokens; t++) {
        scores(a, t, s);
        for (int e = 0; e < a->experts; e++) sum[e] += (double)s[e];
        for (int k = 0; k < a->top_k; k++) counts[a->chosen[t * a->top_k + k]]++;
    }
    for (int e = 0; e < a->experts; e++) a->mass[task * a->experts + e] += (float)sum[e];
}

static const float *dmass_of(const usli_route_args *a, int64_t t) {
    int m = 0;
    t += a->first;
    while (m + 1 < a->micros && t >= a->micro[m + 1]) m++;
    return t >= a->micro[m] && t < a->micro[m + 1] ? a->dmass + (int64_t)m * a->experts : NULL;
}

static void differentiate_tokens(void *arg, int64_t task, int worker) {
    const usli_route_args *a = arg;
    (void)worker;
    float s[USLI_MAX_EXPERTS], ds[USLI_MAX_EXPERTS];
    for (int64_t t = task * TOKENS; t < a->tokens && t < (task + 1) * TOKENS; t++) {
        const int32_t *chosen = a->chosen + t * a->top_k;
        const float *dmass = a->dmass ? dmass_of(a, t) : NULL;
        float *dz = a->dlogits + t * a->experts, inner = 0;
        scores(a, t, s);
        for (int e = 0; e < a->experts; e++) ds[e] = dmass ? dmass[e] : 0;
        float over = a->normalised ? chosen_sum(a, chosen, s) : 1, shared = 0;
        for (int k = 0; a->normalised && k < a->top_k; k++)
            shared += a->dweight[row_of(a, t * a->top_k + k)] * s[chosen[k]] / over;
        for (int k = 0; k < a->top_k; k++)
            ds[chosen[k]] += (a->dweight[row_of(a, t * a->top_k + k)] - shared) * a->scale / over;
        for (int e = 0; !a->sigmoid && e < a->experts; e++) inner += s[e] * ds[e];
        for (int e = 0; e < a->experts; e++) dz[e] = s[e] * (a->sigmoid ? (1 - s[e]) * ds[e] : ds[e] - inner);
    }
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    usli_route_args *a = args;
    (void)ws;
    int64_t tasks = (a->tokens + TOKENS - 1) / TOKENS;
    if (pass == USLI_BACKWARD) {
        usli_pool_run(x->ctx->pool, tasks, differentiate_tokens, a);
        return USL_OK;
    }
    usli_pool_run(x->ctx->pool, tasks, choose_tokens, a);
    if (a->row) sort_rows(a);
    usli_pool_run(x->ctx->pool, tasks, weigh_tokens, a);
    if (a->counts) usli_pool_run(x->ctx->pool, a->micros, count_micro, a);
    return USL_OK;
}

const usli_op_impl usli_cpu_route = { run, NULL };
