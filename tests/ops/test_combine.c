/* combine: sums of a token's rows, against sums in double. */
#include "tests/ops/rig.h"

static void check(rig *r, usl_dtype dtype, int64_t tokens, int top_k, int64_t cols) {
    usli_rng rng;
    usli_rng_seed(&rng, 5);
    int64_t rows = tokens * top_k;
    float *v;
    void *x = rig_random(&rng, dtype, rows * cols, &v);
    char *y = malloc((size_t)(tokens * cols) * usli_dtype_bytes(dtype));
    int32_t *row = malloc((size_t)rows * sizeof *row);
    for (int64_t i = 0; i < rows; i++) row[i] = (int32_t)i;
    for (int64_t i = rows - 1; i > 0; i--) {
        int64_t j = (int64_t)(usli_rng_u32(&rng) % (uint32_t)(i + 1));
        int32_t t = row[i];
        row[i] = row[j], row[j] = t;
    }
    usli_combine_args a = {
        .tokens = tokens, .cols = cols, .top_k = top_k, .dtype = dtype, .row = row, .x = x, .y = y
    };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_combine, &a, USLI_FORWARD));
    float *want = malloc(sizeof *want * (size_t)(tokens * cols)), *got = malloc(sizeof *got * (size_t)(tokens * cols));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < cols; c++) {
            double sum = 0;
            for (int k = 0; k < top_k; k++) sum += (double)v[row[t * top_k + k] * cols + c];
            want[t * cols + c] = (float)sum;
        }
    usli_to_f32(y, dtype, got, tokens * cols);
    double error = test_rel_error(got, want, (size_t)(tokens * cols)),
           bound = dtype == USL_F32 ? 1e-6 : rig_epsilon(dtype);
    CHECK(error <= bound, "%s, %lldx%lld of %d: %g", usl_dtype_name(dtype), (long long)tokens, (long long)cols, top_k,
          error);
    free(x), free(y), free(v), free(row), free(want), free(got);
}

int main(void) {
    for (int threads = 1; threads <= 3; threads++) {
        rig r;
        rig_open(&r, threads);
        static const usl_dtype dtypes[] = { USL_F32, USL_BF16, USL_F16 };
        for (int i = 0; i < 3; i++) {
            check(&r, dtypes[i], 1, 1, 1);
            check(&r, dtypes[i], 37, 3, 19);
            check(&r, dtypes[i], 20, 8, 1032);
        }
        rig_close(&r);
    }
    return test_end("test_combine");
}
