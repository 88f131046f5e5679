/* cross_entropy and its gradient in place, against formulas in double; the gradient against central differences. */
#include "tests/ops/rig.h"

typedef struct spec {
    int64_t rows, cols, ld;
    usl_dtype dtype;
    float scale, softcap, spread;
} spec;

static const spec SPECS[] = {
    { 1, 1, 0, USL_F32, 1, 0, 1 },     { 5, 7, 0, USL_F32, 1, 0, 1 },          { 7, 1001, 1010, USL_F32, 1, 0, 10 },
    { 4, 49152, 0, USL_F32, 1, 0, 3 }, { 6, 100, 0, USL_F32, 0.5f, 3, 5 },     { 6, 100, 103, USL_F32, 1, 30, 20 },
    { 3, 4096, 0, USL_BF16, 1, 0, 3 }, { 3, 333, 0, USL_BF16, 2, 5, 3 },       { 3, 333, 340, USL_F16, 1, 0, 3 },
    { 3, 50, 0, USL_F32, 1, 0, 1000 }, { 2, 20008, 20016, USL_BF16, 1, 0, 3 }, { 2, 8200, 0, USL_F16, 1, 30, 3 },
};

/* Of one row: the loss, and its gradient when g is not NULL. */
static double oracle_row(const spec *s, const double *logits, int32_t target, double *g) {
    double *z = calloc((size_t)s->cols, sizeof *z), top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < s->cols; i++) {
        z[i] = (double)s->scale * logits[i];
        if (s->softcap > 0) z[i] = (double)s->softcap * tanh(z[i] / (double)s->softcap);
        top = fmax(top, z[i]);
    }
    for (int64_t i = 0; i < s->cols; i++) sum += exp(z[i] - top);
    double loss = top + log(sum) - z[target];
    for (int64_t i = 0; g && i < s->cols; i++) {
        double t = s->softcap > 0 ? z[i] / (double)s->softcap : 0;
        g[i] = (exp(z[i] - top) / sum - (i == target)) * (1 - t * t) * (double)s->scale;
    }
    free(z);
    return loss;
}

static void check_oracle(void) {
    enum { N = 9 };
    const spec s = { 1, N, 0, USL_F32, 0.7f, 2, 1 };
    usli_rng rng;
    usli_rng_seed(&rng, 1);
    double z[N], g[N];
    for (int i = 0; i < N; i++) z[i] = 3 * usli_rng_normal(&rng);
    oracle_row(&s, z, 4, g);
    for (int i = 0; i < N; i++) {
        double keep = z[i];
        z[i] = keep + 1e-5;
        double high = oracle_row(&s, z, 4, NULL);
        z[i] = keep - 1e-5;
        double low = oracle_row(&s, z, 4, NULL);
        z[i] = keep;
        CHECK(fabs((high - low) / 2e-5 - g[i]) < 1e-9, "gradient %d", i);
    }
}

typedef struct result {
    void *logits;
    float losses[8];
    usli_update update;
} result;

static result compute(const spec *s, const void *logits, const int32_t *target, bool gradient, int threads) {
    int64_t ld = s->ld ? s->ld : s->cols;
    size_t bytes = (size_t)(s->rows * ld) * usli_dtype_bytes(s->dtype);
    result out = { .update = { .inv_counted = 0.25f, .loss_scale = 8, .loss_sum = 100, .correct = 5 } };
    out.logits = rig_copy(logits, bytes);
    usli_update *update = rig_copy(&out.update, sizeof out.update);
    float *losses = calloc(8, sizeof *losses);
    int32_t *labels = rig_copy(target, sizeof *labels * (size_t)s->rows);
    rig r;
    rig_open(&r, threads);
    usli_cross_entropy_args a = { .rows = s->rows,
                                  .cols = s->cols,
                                  .dtype = s->dtype,
                                  .logit_scale = s->scale,
                                  .softcap = s->softcap,
                                  .with_gradient = gradient,
                                  .logits = out.logits,
                                  .ld = s->ld,
                                  .target = labels,
                                  .losses = losses,
                                  .update = update };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_cross_entropy, &a, USLI_FORWARD));
    rig_close(&r);
    out.update = *update;
    memcpy(out.losses, losses, sizeof out.losses);
    free(update), free(losses), free(labels);
    return out;
}

static void check_spec(const spec *s) {
    usli_rng rng;
    usli_rng_seed(&rng, 4);
    int64_t ld = s->ld ? s->ld : s->cols, total = s->rows * ld, correct = 5, foreign = 0;
    float *v, *got = malloc(sizeof *got * (size_t)total), *want = malloc(sizeof *want * (size_t)total);
    void *logits = malloc((size_t)total * usli_dtype_bytes(s->dtype));
    double *z = calloc((size_t)s->cols, sizeof *z), *g = malloc(sizeof *g * (size_t)s->cols), sum = 100;
    free(rig_random(&rng, USL_F32, total, &v));
    for (int64_t i = 0; i < total; i++) v[i] *= s->spread;
    int32_t target[8] = { 0 };
    for (int64_t r = 0; r < s->rows; r++) {
        target[r] = (int32_t)(usli_rng_u32(&rng) % (uint32_t)s->cols);
        if (r == 1) v[r * ld + target[r]] = 6 * s->spread; /* this one is right */
        if (r == 2) v[r * ld + s->cols / 2] = -INFINITY, target[r] = 0;
    }
    usli_from_f32(v, logits, s->dtype, total);
    usli_to_f32(logits, s->dtype, v, total);
    result one = compute(s, logits, target, true, 1);
    usli_to_f32(one.logits, s->dtype, got, total);
    for (int64_t r = 0; r < s->rows; r++) {
        int64_t best = 0;
        for (int64_t i = 0; i < s->cols; i++) {
            z[i] = (double)v[r * ld + i];
            if (z[i] > z[best]) best = i;
        }
        correct += best == target[r];
        double loss = oracle_row(s, z, target[r], g);
        sum += loss;
        CHECK(fabs((double)one.losses[r] - loss) <= 2e-6 * (fabs(loss) + 1) + 1e-7 * (double)s->spread * 6,
              "loss %g, not %g", (double)one.losses[r], loss);
        for (int64_t i = 0; i < ld; i++) {
            want[r * ld + i] = i < s->cols ? (float)(2 * g[i]) : got[r * ld + i];
            foreign += i >= s->cols && got[r * ld + i] != v[r * ld + i];
        }
    }
    for (int64_t i = 0; i < total; i++)
        if (i % ld >= s->cols) got[i] = want[i] = 0;
    double error = test_rel_error(got, want, (size_t)total), limit = s->dtype == USL_F32 ? 3e-6 : rig_epsilon(s->dtype);
    CHECK(error < limit || s->cols == 1, "gradient of %lld columns: %.2e, allowed %.2e", (long long)s->cols, error,
          limit);
    CHECK(!foreign, "%lld values beyond the columns were written", (long long)foreign);
    CHECK(fabs(one.update.loss_sum - sum) < 1e-5 * sum, "loss sum %g, not %g", one.update.loss_sum, sum);
    CHECK(one.update.correct == correct, "%lld correct, not %lld", (long long)one.update.correct, (long long)correct);
    for (int threads = 1; threads <= 5; threads += threads == 1 ? 1 : 3) {
        result more = compute(s, logits, target, true, threads), plain = compute(s, logits, target, false, threads);
        size_t bytes = (size_t)total * usli_dtype_bytes(s->dtype);
        CHECK(!memcmp(one.logits, more.logits, bytes) && one.update.loss_sum == more.update.loss_sum,
              "%d threads give other bits", threads);
        CHECK(plain.update.loss_sum == one.update.loss_sum && plain.update.correct == one.update.correct,
              "without a gradient");
        free(more.logits), free(plain.logits);
    }
    free(one.logits), free(v), free(got), free(want), free(logits), free(z), free(g);
}

static void check_bad(void) {
    const spec s = { 2, 40, 0, USL_F32, 1, 0, 1 };
    float logits[80] = { 0 };
    int32_t target[] = { 0, 39 };
    logits[50] = NAN;
    result one = compute(&s, logits, target, true, 2);
    CHECK(isnan(one.losses[1]) && isnan(one.update.loss_sum) && !isnan(one.losses[0]), "a NaN shows in the loss");
    free(one.logits);
    /* A device does not look at labels: who makes them checks them. */
    rig r;
    rig_open(&r, 1);
    if (!r.x.backend->host) {
        rig_close(&r);
        return;
    }
    usli_update update = { .inv_counted = 1, .loss_scale = 1 };
    float losses[2];
    usli_cross_entropy_args a = { .rows = 2,
                                  .cols = 40,
                                  .dtype = USL_F32,
                                  .logit_scale = 1,
                                  .logits = logits,
                                  .target = target,
                                  .losses = losses,
                                  .update = &update };
    target[1] = 40;
    CHECK(rig_run(&r, USLI_OP_cross_entropy, &a, USLI_FORWARD) == USL_ERR_INVALID, "a label beyond the vocabulary");
    target[1] = -100;
    CHECK(rig_run(&r, USLI_OP_cross_entropy, &a, USLI_FORWARD) == USL_ERR_INVALID, "a negative label");
    rig_close(&r);
}

int main(void) {
    check_oracle();
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) check_spec(&SPECS[i]);
    check_bad();
    return test_end("cross_entropy");
}
