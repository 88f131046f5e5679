/* sample: what the warpers leave, checked by drawing often; ties, penalties, repeatability. */
#include "tests/ops/rig.h"

typedef struct options {
    float temperature, top_p, min_p, penalty;
    int32_t top_k;
} options;

static const options NONE = { 1, 1, 0, 1, 0 };

/* Ids behind cols, a padded vocabulary's, would win every draw. */
enum { PADDING = 3 };

static usl_status draw(rig *r, const float *logits, int64_t rows, int64_t cols, options o, const int32_t *seen,
                       const int32_t *cu, uint64_t offset, int32_t *out) {
    uint64_t *at = rig_copy(&offset, sizeof offset);
    int32_t *ids = malloc(sizeof *ids * (size_t)rows);
    float *values = malloc(sizeof *values * (size_t)(rows * (cols + PADDING)));
    for (int64_t row = 0; row < rows; row++) {
        float *to = values + row * (cols + PADDING);
        memcpy(to, logits + row * cols, sizeof *to * (size_t)cols);
        for (int i = 0; i < PADDING; i++) to[cols + i] = 1000;
    }
    int32_t *before = cu ? rig_copy(seen, sizeof *before * (size_t)cu[rows]) : NULL;
    int32_t *ends = cu ? rig_copy(cu, sizeof *ends * (size_t)(rows + 1)) : NULL;
    usli_sample_args a = { .rows = rows,
                           .cols = cols,
                           .stride = cols + PADDING,
                           .logits = values,
                           .temperature = o.temperature,
                           .top_p = o.top_p,
                           .min_p = o.min_p,
                           .repetition_penalty = o.penalty,
                           .top_k = o.top_k,
                           .seen = before,
                           .cu_seen = ends,
                           .seed = 3407,
                           .offset = at,
                           .out = ids };
    usl_status st = rig_run(r, USLI_OP_sample, &a, USLI_FORWARD);
    if (st == USL_OK) memcpy(out, ids, sizeof *ids * (size_t)rows);
    free(at), free(ids), free(values), free(before), free(ends);
    return st;
}

/* The warpers as written in transformers, over all values: which ids stay, with what probability. */
static void oracle(const float *logits, int64_t n, options o, const int32_t *seen, int32_t seen_count, double *p) {
    double *z = malloc(sizeof *z * (size_t)n), top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) z[i] = (double)logits[i];
    for (int32_t k = 0; k < seen_count; k++) {
        bool again = false;
        for (int32_t q = 0; q < k; q++) again = again || seen[q] == seen[k];
        if (!again) z[seen[k]] = z[seen[k]] < 0 ? z[seen[k]] * (double)o.penalty : z[seen[k]] / (double)o.penalty;
    }
    for (int64_t i = 0; i < n; i++) z[i] /= (double)o.temperature;
    if (o.top_k > 0 && o.top_k < n)
        for (int64_t i = 0; i < n; i++) { /* those with fewer than top_k above them: ties with the last one stay */
            int64_t above = 0;
            for (int64_t q = 0; q < n; q++) above += z[q] > z[i] && z[q] != -INFINITY;
            p[i] = above < o.top_k ? z[i] : -INFINITY;
        }
    else
        memcpy(p, z, sizeof *p * (size_t)n);
    for (int64_t i = 0; i < n; i++) top = fmax(top, p[i]);
    for (int64_t i = 0; i < n; i++) sum += p[i] = exp(p[i] - top);
    for (int64_t i = 0; i < n; i++) p[i] /= sum;
    memcpy(z, p, sizeof *p * (size_t)n);
    for (int64_t i = 0; o.top_p < 1 && i < n; i++) { /* what is above it does not yet reach top_p */
        double above = 0;
        for (int64_t q = 0; q < n; q++) above += z[q] > z[i] ? z[q] : 0;
        if (above >= (double)o.top_p) p[i] = 0;
    }
    top = sum = 0;
    for (int64_t i = 0; i < n; i++) top = fmax(top, p[i]);
    for (int64_t i = 0; i < n; i++) sum += p[i] = p[i] < (double)o.min_p * top ? 0 : p[i];
    for (int64_t i = 0; i < n; i++) p[i] /= sum;
    free(z);
}

/* Draws often; compares with the oracle's probabilities by Pearson's chi-square. */
static void check_distribution(rig *r, const char *name, options o, int64_t cols, const int32_t *seen,
                               int32_t seen_count) {
    enum { DRAWS = RIG_SLOW ? 80 : 4000, ROWS = 40 };
    usli_rng rng;
    usli_rng_seed(&rng, 6);
    float *v, *logits = malloc(sizeof *logits * (size_t)(ROWS * cols));
    free(rig_random(&rng, USL_F32, cols, &v));
    for (int64_t i = 0; i < cols; i++) v[i] *= 2;
    for (int t = 0; t < ROWS; t++) memcpy(logits + t * cols, v, sizeof *v * (size_t)cols);
    double *p = malloc(sizeof *p * (size_t)cols), chi = 0;
    oracle(v, cols, o, seen, seen_count, p);
    int32_t out[ROWS], *all = malloc(sizeof *all * (size_t)(ROWS * (seen_count + 1))), cu[ROWS + 1] = { 0 };
    for (int t = 0; t < ROWS; t++) {
        memcpy(all + cu[t], seen, sizeof *seen * (size_t)seen_count);
        cu[t + 1] = cu[t] + seen_count;
    }
    int *count = calloc((size_t)cols, sizeof *count), wrong = 0, kinds = 0;
    for (uint64_t i = 0; i < DRAWS / ROWS; i++) {
        CHECK_OK(r->ctx, draw(r, logits, ROWS, cols, o, all, seen_count ? cu : NULL, i, out));
        for (int t = 0; t < ROWS; t++) {
            if (out[t] < 0 || out[t] >= cols || p[out[t]] == 0)
                wrong++;
            else
                count[out[t]]++;
        }
    }
    double rare = 0, rare_count = 0; /* those expected less than five times count together */
    for (int64_t i = 0; i < cols; i++) {
        double expected = DRAWS * p[i], off = count[i] - expected;
        if (expected >= 5)
            chi += off * off / expected, kinds++;
        else
            rare += expected, rare_count += count[i];
    }
    if (rare >= 5) chi += (rare_count - rare) * (rare_count - rare) / rare, kinds++;
    CHECK(!wrong, "%s: %d draws of what was left out", name, wrong);
    /* Mean kinds - 1, variance about twice that; the draws are fixed, so this either holds or does not. */
    CHECK(chi < kinds - 1 + 4 * sqrt(2.0 * kinds) + 1, "%s: chi-square %g over %d ids", name, chi, kinds);
    free(v), free(logits), free(p), free(all), free(count);
}

static void check_greedy(rig *r) {
    enum { N = 300 };
    float logits[2 * N] = { 0 };
    int32_t out[2];
    options o = NONE;
    o.temperature = 0;
    logits[77] = logits[200] = 2, logits[N + 299] = 1;
    CHECK_OK(r->ctx, draw(r, logits, 2, N, o, NULL, NULL, 0, out));
    CHECK(out[0] == 77 && out[1] == 299, "argmax %d %d", out[0], out[1]);
    /* Penalised once however often it was seen; a negative score moves down too. */
    const int32_t seen[] = { 77, 77, 77, 5, 5 }, cu[] = { 0, 3, 5 };
    o.penalty = 1.5f;
    logits[200] = 1.4f;
    CHECK_OK(r->ctx, draw(r, logits, 1, N, o, seen, cu, 0, out));
    CHECK(out[0] == 200, "2 / 1.5 < 1.4: %d", out[0]);
    logits[200] = 1.3f;
    CHECK_OK(r->ctx, draw(r, logits, 1, N, o, seen, cu, 0, out));
    CHECK(out[0] == 77, "2 / 1.5 > 1.3: %d", out[0]);
    for (int i = 0; i < N; i++) logits[i] = i == 5 ? -1.0f : i == 6 ? -1.2f : -9.0f;
    const int32_t only[] = { 5 }, cu_only[] = { 0, 1 };
    CHECK_OK(r->ctx, draw(r, logits, 1, N, o, only, cu_only, 0, out));
    CHECK(out[0] == 6, "-1 x 1.5 < -1.2: %d", out[0]);
}

static void check_repeats(rig *r) {
    enum { N = 1000, ROWS = 3 };
    usli_rng rng;
    usli_rng_seed(&rng, 2);
    float *v;
    int32_t first[ROWS], again[ROWS], later[40], same = 0;
    free(rig_random(&rng, USL_F32, ROWS * N, &v));
    CHECK_OK(r->ctx, draw(r, v, ROWS, N, NONE, NULL, NULL, 12, first));
    CHECK_OK(r->ctx, draw(r, v, ROWS, N, NONE, NULL, NULL, 12, again));
    CHECK(!memcmp(first, again, sizeof first), "the same seed and offset draw the same");
    for (uint64_t i = 0; i < 40; i++) {
        CHECK_OK(r->ctx, draw(r, v, 1, N, NONE, NULL, NULL, i, &later[i]));
        same += later[i] == later[0];
    }
    CHECK(same < 10, "%d of 40 offsets draw the same", same);
    static const float bad[] = { NAN, INFINITY };
    for (int i = 0; i < 2; i++) {
        v[500] = bad[i];
        usl_status st = draw(r, v, 1, N, NONE, NULL, NULL, 0, again);
        /* A device cannot answer with a status: its id is -1. */
        CHECK(r->x.backend->host ? st == USL_ERR_NUMERIC : again[0] == -1, "%g is an error", (double)bad[i]);
    }
    for (int i = 0; i < N; i++) v[i] = i == 321 ? 0 : -INFINITY;
    CHECK_OK(r->ctx, draw(r, v, 1, N, NONE, NULL, NULL, 0, again));
    CHECK(again[0] == 321, "the only one: %d", again[0]);
    free(v);
}

int main(void) {
    static const struct {
        const char *name;
        options o;
        int64_t cols;
    } cases[] = {
        { "plain", { 1, 1, 0, 1, 0 }, 50 },
        { "hot", { 2.5f, 1, 0, 1, 0 }, 50 },
        { "cold", { 0.3f, 1, 0, 1, 0 }, 50 },
        { "top-k", { 1, 1, 0, 1, 7 }, 500 },
        { "top-k of all", { 1, 1, 0, 1, 99 }, 50 },
        { "top-p", { 1, 0.6f, 0, 1, 0 }, 500 },
        { "top-p, tiny", { 1, 1e-6f, 0, 1, 0 }, 500 },
        { "min-p", { 1, 1, 0.2f, 1, 0 }, 500 },
        { "all", { 0.8f, 0.9f, 0.05f, 1.3f, 40 }, 500 },
        { "penalty", { 1, 1, 0, 1.8f, 0 }, 40 },
        { "many", { 0.7f, 0.8f, 0, 1, 0 }, 5000 },
    };
    static const int32_t seen[] = { 3, 9, 9, 30, 3, 17 };
    rig r;
    rig_open(&r, 2);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_distribution(&r, cases[i].name, cases[i].o, cases[i].cols, seen, cases[i].o.penalty > 1 ? 6 : 0);
    check_greedy(&r);
    check_repeats(&r);
    rig_close(&r);
    return test_end("sample");
}
