/* balance: the loss against its formula in double, and its gradient against central differences of that. */
#include "tests/ops/rig.h"

enum { EXPERTS = 70, MICROS = 3, LAYERS = 5 };

static double loss(const int32_t *counts, const double *mass, int experts, double n, double coefficient) {
    double sum = 0;
    for (int e = 0; e < experts; e++) sum += counts[e] / n * mass[e] / n;
    return coefficient * experts * sum;
}

static void check(rig *r, int experts) {
    usli_rng rng;
    usli_rng_seed(&rng, 4);
    size_t all = (size_t)(MICROS * experts);
    int32_t *micro = malloc((MICROS + 1) * sizeof *micro), *counts = malloc(all * sizeof *counts);
    float *mass = malloc(all * sizeof *mass), *dmass = malloc(all * sizeof *dmass);
    usli_update *u = rig_copy(&(usli_update){ .loss_scale = 8, .balance = 2 }, sizeof *u);
    for (int m = 0; m <= MICROS; m++) micro[m] = m * 37;
    for (size_t i = 0; i < all; i++) {
        counts[i] = (int32_t)(usli_rng_u32(&rng) % 100);
        mass[i] = (float)(usli_rng_uniform(&rng) * 40);
    }
    usli_balance_args a = { .micros = MICROS,
                            .experts = experts,
                            .layers = LAYERS,
                            .coefficient = 0.3f,
                            .micro = micro,
                            .counts = counts,
                            .mass = mass,
                            .dmass = dmass,
                            .update = u };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_balance, &a, USLI_FORWARD));
    double want = 2, worst = 0, moved[EXPERTS];
    for (int m = 0; m < MICROS; m++) {
        const int32_t *c = counts + m * experts;
        for (int e = 0; e < experts; e++) moved[e] = (double)mass[m * experts + e];
        want += loss(c, moved, experts, LAYERS * 37.0, (double)a.coefficient);
        for (int e = 0; e < experts; e++) {
            double f[2], keep = moved[e];
            for (int up = 0; up < 2; up++) {
                moved[e] = keep + (up ? 1 : -1);
                f[up] = loss(c, moved, experts, LAYERS * 37.0, (double)a.coefficient);
            }
            moved[e] = keep;
            worst = fmax(worst, fabs(8 * (f[1] - f[0]) / 2 - (double)dmass[m * experts + e]));
        }
    }
    CHECK(fabs(u->balance - want) < 1e-9, "%d experts: %.12g, not %.12g", experts, u->balance, want);
    CHECK(worst < 1e-7, "%d experts: a gradient is off by %g", experts, worst);
    free(micro), free(counts), free(mass), free(dmass), free(u);
}

int main(void) {
    rig r;
    rig_open(&r, 1);
    check(&r, 3);
    check(&r, EXPERTS);
    rig_close(&r);
    return test_end("test_balance");
}
