/* grad_norm: the norm over all parameters, the clip factor, the flag of finiteness. */
#include "tests/ops/rig.h"

enum { PARAMS = 4 };
static const int64_t SIZES[PARAMS] = { 1, 16384, 50001, 300 };

static usli_update run_from(usli_update u, usli_param *params, int64_t count, int threads) {
    rig r;
    rig_open(&r, threads);
    usli_update *update = rig_copy(&u, sizeof u);
    usli_grad_norm_args a = { params, count, update };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_grad_norm, &a, USLI_FORWARD));
    rig_close(&r);
    u = *update;
    free(update);
    return u;
}

static usli_update run_on(usli_param *params, int64_t count, float max_norm, float loss_scale, int threads) {
    usli_update u = { .max_norm = max_norm, .loss_scale = loss_scale, .grad_norm = -1, .clip = -1, .finite = -1 };
    return run_from(u, params, count, threads);
}

/* As many parameters as the largest models have, of 1 to 7 values that lie anywhere; then one that is no number. */
static void check_many(void) {
    enum { MANY = 2000 };
    usli_param *params = calloc(MANY, sizeof *params);
    float *g = malloc(7 * MANY * sizeof *g);
    double square = 0;
    int64_t at = 0;
    for (int i = 0; i < MANY; i++) {
        params[i] = (usli_param){ .g = g + at, .n = 1 + i % 7 };
        for (int64_t k = 0; k < params[i].n; k++, at++) {
            g[at] = (float)(at % 31) - 12;
            square += (double)g[at] * (double)g[at];
        }
    }
    usli_update u = run_on(params, MANY, 1, 1, 2);
    CHECK(fabs((double)u.grad_norm / sqrt(square) - 1) < 1e-7 && u.finite == 1, "norm of many: %g, not %g",
          (double)u.grad_norm, sqrt(square));
    g[at - 1] = NAN;
    CHECK(run_on(params, MANY, 1, 1, 2).finite == 0, "the last value of the last parameter is seen");
    free(params), free(g);
}

int main(void) {
    check_many();
    usli_rng rng;
    usli_rng_seed(&rng, 8);
    usli_param params[PARAMS];
    double square = 0;
    memset(params, 0, sizeof params);
    for (int i = 0; i < PARAMS; i++) {
        params[i].n = SIZES[i];
        free(rig_random(&rng, USL_F32, SIZES[i], &params[i].g));
        for (int64_t k = 0; k < SIZES[i]; k++) square += (double)params[i].g[k] * (double)params[i].g[k];
    }
    double norm = sqrt(square);
    static const struct {
        float max_norm, loss_scale;
    } cases[] = { { 1, 1 }, { 0, 1 }, { 1e6f, 1 }, { 1, 1024 }, { 0, 65536 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double scale = (double)cases[i].loss_scale, limit = (double)cases[i].max_norm, true_norm = norm / scale;
        double clip = limit > 0 ? fmin(1, limit / (true_norm + 1e-6)) : 1;
        usli_update u = run_on(params, PARAMS, cases[i].max_norm, cases[i].loss_scale, 1);
        CHECK(fabs((double)u.grad_norm / true_norm - 1) < 1e-7, "norm %g, not %g", (double)u.grad_norm, true_norm);
        CHECK(fabs((double)u.clip * scale / clip - 1) < 1e-7, "clip %g, not %g", (double)u.clip, clip / scale);
        CHECK(u.finite == 1, "finite");
        for (int threads = 2; threads <= 5; threads += 3) {
            usli_update other = run_on(params, PARAMS, cases[i].max_norm, cases[i].loss_scale, threads);
            CHECK(other.grad_norm == u.grad_norm && other.clip == u.clip, "%d threads give other bits", threads);
        }
    }
    CHECK(run_on(params, 0, 1, 1, 2).grad_norm == 0, "no parameters");
    /* Values whose squares float32 cannot hold. */
    params[0].g[0] = 1e30f;
    usli_update u = run_on(params, PARAMS, 1, 1, 1);
    CHECK(u.finite == 1 && fabs((double)u.grad_norm / (double)1e30f - 1) < 1e-6, "norm %g", (double)u.grad_norm);
    /* A loss that is too large for a number skips the update though its gradient is none. */
    u.loss_sum = INFINITY;
    CHECK(run_from(u, params, PARAMS, 1).finite == 0, "an infinite loss is seen");
    static const float bad[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < 3; i++) {
        params[2].g[50000] = bad[i];
        CHECK(run_on(params, PARAMS, 1, 1, 2).finite == 0, "%g is seen", (double)bad[i]);
    }
    for (int i = 0; i < PARAMS; i++) free(params[i].g);
    return test_end("grad_norm");
}
