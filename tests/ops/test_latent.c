/* latent: values go where they belong, and the shared part's gradient is the sum over heads, against sums in double. */
#include "tests/ops/rig.h"

typedef struct spec {
    int64_t tokens, beside; /* values between rows of the shared part */
    int heads, narrow, rotated, v_dim;
    usl_dtype dtype;
} spec;

static const spec SPECS[] = {
    { 1, 0, 1, 1, 2, 1, USL_F32 },
    { 37, 5, 3, 6, 4, 7, USL_F32 },
    { 20, 512, 16, 128, 64, 128, USL_BF16 },
    { 33, 3, 5, 10, 6, 3, USL_F16 },
};

static void check(const spec *s, int threads) {
    rig r;
    rig_open(&r, threads);
    usli_rng rng;
    usli_rng_seed(&rng, 9);
    int64_t t = s->tokens, both = s->narrow + s->v_dim, key = s->narrow + s->rotated, stride = s->rotated + s->beside,
            rows = t * s->heads;
    size_t e = usli_dtype_bytes(s->dtype);
    float *kvf, *sharedf, *dkf, *dvf, *dsf;
    void *kv = rig_random(&rng, s->dtype, rows * both, &kvf),
         *shared = rig_random(&rng, s->dtype, t * stride, &sharedf), *dk = rig_random(&rng, s->dtype, rows * key, &dkf),
         *dv = rig_random(&rng, s->dtype, rows * s->v_dim, &dvf), *ds = rig_random(&rng, s->dtype, t * stride, &dsf);
    char *k = malloc((size_t)(rows * key) * e), *v = malloc((size_t)(rows * s->v_dim) * e),
         *dkv = malloc((size_t)(rows * both) * e);
    usli_latent_args a = { .tokens = t,
                           .heads = s->heads,
                           .narrow = s->narrow,
                           .rotated = s->rotated,
                           .v_dim = s->v_dim,
                           .dtype = s->dtype,
                           .kv = kv,
                           .shared = shared,
                           .shared_stride = stride,
                           .k = k,
                           .v = v,
                           .dk = dk,
                           .dv = dv,
                           .dkv = dkv,
                           .dshared = ds };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_latent, &a, USLI_FORWARD));
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_latent, &a, USLI_BACKWARD));
    float *kf = malloc(sizeof(float) * (size_t)(rows * key)), *vf = malloc(sizeof(float) * (size_t)(rows * s->v_dim)),
          *dkvf = malloc(sizeof(float) * (size_t)(rows * both)), *got = malloc(sizeof(float) * (size_t)(t * stride)),
          *want = malloc(sizeof(float) * (size_t)(t * stride));
    usli_to_f32(k, s->dtype, kf, rows * key), usli_to_f32(v, s->dtype, vf, rows * s->v_dim);
    usli_to_f32(dkv, s->dtype, dkvf, rows * both), usli_to_f32(ds, s->dtype, got, t * stride);
    int64_t wrong = 0, foreign = 0;
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t c = 0; c < key; c++)
            wrong +=
                kf[i * key + c] != (c < s->narrow ? kvf[i * both + c] : sharedf[i / s->heads * stride + c - s->narrow]);
        for (int64_t c = 0; c < s->v_dim; c++) wrong += vf[i * s->v_dim + c] != kvf[i * both + s->narrow + c];
        for (int64_t c = 0; c < both; c++)
            wrong += dkvf[i * both + c] != (c < s->narrow ? dkf[i * key + c] : dvf[i * s->v_dim + c - s->narrow]);
    }
    for (int64_t i = 0; i < t * stride; i++) {
        double sum = 0;
        for (int64_t h = 0; h < s->heads && i % stride < s->rotated; h++)
            sum += (double)dkf[(i / stride * s->heads + h) * key + s->narrow + i % stride];
        want[i] = (float)sum;
        if (i % stride >= s->rotated) foreign += got[i] != dsf[i], got[i] = 0;
    }
    double error = test_rel_error(got, want, (size_t)(t * stride)),
           limit = s->dtype == USL_F32 ? 1e-6 : rig_epsilon(s->dtype);
    CHECK(!wrong && !foreign && error < limit, "%d heads of %d: %lld wrong, %lld beside written, dshared %.2e",
          s->heads, s->narrow, (long long)wrong, (long long)foreign, error);
    free(kv), free(shared), free(dk), free(dv), free(ds), free(k), free(v), free(dkv);
    free(kvf), free(sharedf), free(dkf), free(dvf), free(dsf), free(kf), free(vf), free(dkvf), free(got), free(want);
    rig_close(&r);
}

int main(void) {
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) check(&SPECS[i], 1), check(&SPECS[i], 3);
    return test_end("test_latent");
}
