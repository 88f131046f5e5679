/* route against formulas in double, whose derivative is checked against central differences; the choice against a plain
 * search, the rows against their definition. */
#include "tests/ops/rig.h"

typedef struct spec {
    const char *name;
    int64_t tokens;
    int experts, top_k, groups, best_groups;
    bool sigmoid, normalised, by_pairs, corrected, ties, identity;
    int micros;
} spec;

static const spec SPECS[] = {
    { "mixtral", 75, 8, 2, 0, 0, false, true, false, false, false, false, 3 },
    { "qwen2 moe", 41, 60, 4, 0, 0, false, false, false, false, false, false, 2 },
    { "qwen3 moe", 300, 128, 8, 0, 0, false, true, false, false, false, false, 1 },
    { "deepseek v2", 33, 24, 3, 4, 2, false, false, false, false, false, false, 0 },
    { "deepseek v3", 40, 256, 8, 8, 4, true, true, true, true, false, false, 0 },
    { "small groups", 50, 12, 5, 6, 3, true, true, true, true, false, false, 0 },
    { "equal logits", 20, 9, 4, 3, 2, false, true, true, false, true, false, 2 },
    { "equal logits, no groups", 20, 40, 4, 0, 0, false, true, false, false, true, false, 0 },
    { "all experts", 7, 5, 5, 0, 0, false, true, false, false, false, false, 0 },
    { "one token", 1, 33, 2, 0, 0, false, true, false, false, false, false, 1 },
    { "many rows", 700, 3, 2, 0, 0, false, false, false, false, false, false, 0 },
    { "a shared expert's gate", 45, 1, 1, 0, 0, true, false, false, false, false, true, 0 },
};
enum { MOST = 256 };
static const float SCALE = 2.5f;

typedef struct data {
    const spec *s;
    float *logits, *correction, *dweight, *dmass, *weight, *dlogits, *mass;
    int32_t *chosen, *offsets, *row, *token, *micro, *counts;
} data;

static void scores(const spec *s, const double *z, double *out) {
    double sum = 0;
    for (int e = 0; e < s->experts; e++) sum += out[e] = s->sigmoid ? 1 / (1 + exp(-z[e])) : exp(z[e]);
    for (int e = 0; !s->sigmoid && e < s->experts; e++) out[e] /= sum;
}

/* How many experts (or groups) are better: the place of each in the order. */
static int place_of(const double *v, int n, int i) {
    int place = 0;
    for (int j = 0; j < n; j++) place += v[j] > v[i] || (v[j] >= v[i] && j < i);
    return place;
}

static void choose(const data *d, const double *s, int *chosen) {
    const spec *p = d->s;
    double choice[MOST], worth[USLI_MAX_GROUPS];
    for (int e = 0; e < p->experts; e++) choice[e] = s[e] + (d->correction ? (double)d->correction[e] : 0);
    if (p->groups > 1) {
        int size = p->experts / p->groups;
        for (int g = 0; g < p->groups; g++) {
            worth[g] = 0;
            for (int i = 0; i < size; i++)
                if (place_of(choice + g * size, size, i) < (p->by_pairs ? 2 : 1)) worth[g] += choice[g * size + i];
        }
        for (int e = 0; e < p->experts; e++)
            if (place_of(worth, p->groups, e / size) >= p->best_groups) choice[e] = -INFINITY;
    }
    for (int e = 0; e < p->experts; e++) {
        int place = place_of(choice, p->experts, e);
        if (place < p->top_k) chosen[place] = e;
    }
}

static int64_t row_of(const data *d, int64_t slot) {
    return d->s->identity ? slot : d->row[slot];
}

/* Sum of weights times dweight and of s times dmass, for one token whose choice is fixed. */
static double objective(const data *d, int64_t t, const double *z) {
    const spec *p = d->s;
    double s[MOST], over = 1, sum = 0;
    const int32_t *chosen = d->chosen + t * p->top_k;
    scores(p, z, s);
    if (p->normalised) {
        over = 0;
        for (int k = 0; k < p->top_k; k++) over += s[chosen[k]];
    }
    for (int k = 0; k < p->top_k; k++)
        sum += (double)SCALE * s[chosen[k]] / over * (double)d->dweight[row_of(d, t * p->top_k + k)];
    for (int m = 0; m < p->micros; m++)
        for (int e = 0; e < p->experts && t >= d->micro[m] && t < d->micro[m + 1]; e++)
            sum += s[e] * (double)d->dmass[m * p->experts + e];
    return sum;
}

static void check_token(const data *d, int64_t t) {
    const spec *p = d->s;
    double z[MOST] = { 0 }, s[MOST], over = 1;
    int want[MOST];
    for (int e = 0; e < p->experts; e++) z[e] = (double)d->logits[t * p->experts + e];
    scores(p, z, s);
    choose(d, s, want);
    for (int k = 0; p->normalised && k < p->top_k; k++) over = (k ? over : 0) + s[want[k]];
    for (int k = 0; k < p->top_k; k++) {
        CHECK(d->chosen[t * p->top_k + k] == want[k], "%s: token %d, slot %d: %d, not %d", p->name, (int)t, k,
              (int)d->chosen[t * p->top_k + k], want[k]);
        double weight = s[want[k]] / over * (double)SCALE, got = (double)d->weight[row_of(d, t * p->top_k + k)];
        CHECK(fabs(got - weight) <= 2e-6 * fabs(weight), "%s: weight %g, not %g", p->name, got, weight);
    }
    for (int e = 0; e < p->experts; e++) {
        double saved = z[e], high, low;
        z[e] = saved + 1e-4;
        high = objective(d, t, z);
        z[e] = saved - 1e-4;
        low = objective(d, t, z);
        z[e] = saved;
        double gradient = (high - low) / 2e-4, got = (double)d->dlogits[t * p->experts + e];
        CHECK(fabs(gradient - got) <= 2e-5, "%s: gradient %g, not %g", p->name, got, gradient);
    }
}

static void check_rows(const data *d) {
    const spec *p = d->s;
    int32_t row = 0;
    for (int e = 0; e < p->experts; e++) {
        CHECK(d->offsets[e] == row, "%s: expert %d begins at %d, not %d", p->name, e, (int)d->offsets[e], (int)row);
        for (int64_t i = 0; i < p->tokens * p->top_k; i++) {
            if (d->chosen[i] != e) continue;
            CHECK(d->row[i] == row && d->token[row] == i / p->top_k, "%s: slot %d in row %d, not %d", p->name, (int)i,
                  (int)d->row[i], (int)row);
            row++;
        }
    }
    CHECK(d->offsets[p->experts] == row, "%s: %d rows", p->name, (int)d->offsets[p->experts]);
}

static void check_micros(const data *d) {
    const spec *p = d->s;
    for (int m = 0; m < p->micros; m++)
        for (int e = 0; e < p->experts; e++) {
            int count = 7;
            double mass = 0.5, z[MOST] = { 0 }, s[MOST];
            for (int64_t t = d->micro[m]; t < d->micro[m + 1]; t++) {
                for (int i = 0; i < p->experts; i++) z[i] = (double)d->logits[t * p->experts + i];
                scores(p, z, s);
                mass += s[e];
                for (int k = 0; k < p->top_k; k++) count += d->chosen[t * p->top_k + k] == e;
            }
            CHECK(d->counts[m * p->experts + e] == count, "%s: micro-batch %d, expert %d: %d, not %d", p->name, m, e,
                  (int)d->counts[m * p->experts + e], count);
            double got = (double)d->mass[m * p->experts + e];
            CHECK(fabs(got - mass) <= 1e-5 * mass, "%s: mass %g, not %g", p->name, got, mass);
        }
}

static float *normal(usli_rng *rng, int64_t n) {
    float *v;
    free(rig_random(rng, USL_F32, n, &v));
    return v;
}

enum { FIRST = 11 };

static void check(rig *rigs, const spec *s) {
    usli_rng rng;
    usli_rng_seed(&rng, 7);
    size_t slots = (size_t)s->tokens * (size_t)s->top_k, cells = (size_t)s->tokens * (size_t)s->experts,
           tallies = (size_t)(s->micros * s->experts) + 1;
    data d = { .s = s, .logits = normal(&rng, (int64_t)cells), .dweight = normal(&rng, (int64_t)slots) };
    for (size_t i = 0; s->ties && i < cells; i++) d.logits[i] = roundf(d.logits[i]);
    if (s->corrected) {
        d.correction = normal(&rng, s->experts);
        for (int e = 0; e < s->experts; e++) d.correction[e] *= 0.3f;
    }
    d.dmass = normal(&rng, (int64_t)tallies);
    d.weight = malloc(slots * sizeof *d.weight);
    d.dlogits = malloc(cells * sizeof *d.dlogits);
    d.chosen = malloc(slots * sizeof *d.chosen);
    d.row = malloc(slots * sizeof *d.row);
    d.token = malloc(slots * sizeof *d.token);
    d.offsets = malloc((size_t)(s->experts + 1) * sizeof *d.offsets);
    d.micro = malloc((size_t)(s->micros + 1) * sizeof *d.micro);
    d.counts = malloc(tallies * sizeof *d.counts);
    d.mass = malloc(tallies * sizeof *d.mass);
    /* Two tokens stand behind the last micro-batch: they count nowhere. */
    for (int m = 0; m <= s->micros; m++)
        d.micro[m] =
            (int32_t)((s->tokens > 2 && s->micros ? s->tokens - 2 : s->tokens) * m / (s->micros ? s->micros : 1));
    /* The op is given some tokens of a pass, the first micro-batch began before them. */
    int32_t *given = malloc((size_t)(s->micros + 1) * sizeof *given);
    for (int m = 0; m <= s->micros; m++) given[m] = d.micro[m] + FIRST - (m ? 0 : 4);
    float *first = malloc(cells * sizeof *first);
    for (int i = 0; i < 2; i++) {
        for (size_t j = 0; j < tallies; j++) d.counts[j] = 7, d.mass[j] = 0.5f;
        usli_route_args a = { .tokens = s->tokens,
                              .experts = s->experts,
                              .top_k = s->top_k,
                              .groups = s->groups,
                              .best_groups = s->best_groups,
                              .sigmoid = s->sigmoid,
                              .normalised = s->normalised,
                              .by_pairs = s->by_pairs,
                              .scale = SCALE,
                              .logits = d.logits,
                              .correction = d.correction,
                              .chosen = d.chosen,
                              .offsets = s->identity ? NULL : d.offsets,
                              .row = s->identity ? NULL : d.row,
                              .token = s->identity ? NULL : d.token,
                              .weight = d.weight,
                              .first = FIRST,
                              .micros = s->micros,
                              .micro = s->micros ? given : NULL,
                              .counts = s->micros ? d.counts : NULL,
                              .mass = s->micros ? d.mass : NULL,
                              .dweight = d.dweight,
                              .dmass = s->micros ? d.dmass : NULL,
                              .dlogits = d.dlogits };
        CHECK_OK(rigs[i].ctx, rig_run(&rigs[i], USLI_OP_route, &a, USLI_FORWARD));
        CHECK_OK(rigs[i].ctx, rig_run(&rigs[i], USLI_OP_route, &a, USLI_BACKWARD));
        if (i == 0) memcpy(first, d.dlogits, cells * sizeof *first);
        CHECK(!memcmp(first, d.dlogits, cells * sizeof *first), "%s: the number of threads shows", s->name);
    }
    for (int64_t t = 0; t < s->tokens; t++) check_token(&d, t);
    if (!s->identity) check_rows(&d);
    check_micros(&d);
    free(d.logits), free(d.correction), free(d.dweight), free(d.dmass), free(d.weight), free(d.dlogits), free(d.chosen);
    free(d.row), free(d.token), free(d.offsets), free(d.micro), free(d.counts), free(d.mass), free(given), free(first);
}

int main(void) {
    rig rigs[2];
    for (int i = 0; i < 2; i++) rig_open(&rigs[i], 1 + 2 * i);
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) check(rigs, &SPECS[i]);
    for (int i = 0; i < 2; i++) rig_close(&rigs[i]);
    return test_end("test_route");
}
