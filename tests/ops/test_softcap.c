/* softcap against its formula in double, for lengths around its pieces; values far beyond the cap reach it and no more.
 */
#include "tests/ops/rig.h"

static void check(int64_t n, float softcap) {
    usli_rng rng;
    usli_rng_seed(&rng, 5);
    float *z, *given = malloc((size_t)n * sizeof *given);
    void *raw = rig_random(&rng, USL_F32, n, &z);
    for (int64_t i = 0; i < n; i++) given[i] = z[i] = z[i] * softcap * 3;
    given[0] = z[0] = 1e30f;
    rig r;
    rig_open(&r, 2);
    usli_softcap_args a = { .n = n, .softcap = softcap, .z = z };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_softcap, &a, USLI_FORWARD));
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        double want = (double)softcap * tanh((double)given[i] / (double)softcap), error = fabs((double)z[i] - want);
        if (!(error <= worst)) worst = error;
    }
    CHECK(worst <= 2e-6 * (double)softcap, "%lld values capped at %g: off by %g", (long long)n, (double)softcap, worst);
    rig_close(&r);
    free(raw), free(z), free(given);
}

int main(void) {
    check(1, 30);
    check(4095, 30);
    check(4097, 30);
    check(20000, 0.5f);
    return test_end("softcap");
}
