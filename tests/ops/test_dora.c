/* dora: lengths of the rows of W + scale B A against sums in double, for every kind of matrix. */
#include "core/quant/traits.h"
#include "tests/ops/rig.h"

enum { ROWS = 19, RANK = 5 };

/* gap: what stands behind the rows of a 16-bit matrix, which only a GPU's may have. */
static void check(rig *rigs, usl_dtype dtype, int64_t cols, float scale, int64_t gap) {
    usli_rng rng;
    usli_rng_seed(&rng, 3);
    int64_t n = ROWS * cols;
    float *w, *a, *b, *norm[2], *want = malloc(ROWS * sizeof *want), *scratch = malloc((size_t)n * sizeof *scratch);
    void *data = rig_random(&rng, USL_F32, n, &w);
    float *scales = malloc(ROWS * sizeof *scales);
    usli_matrix m = { .dtype = dtype, .rows = ROWS, .cols = cols };
    usli_nf4 q;
    if (dtype == USL_NF4 || dtype == USL_FP4) {
        free(data);
        data = aligned_alloc(64, (usli_nf4_bytes(n) + 63) / 64 * 64);
        usli_nf4_layout(data, n, &q);
        usli_nf4_quantize(&q, w, n, scratch);
        rig_nf4_tables(&q);
        usli_nf4_decode(&q, 0, n, w);
        m.nf4 = &q;
    } else if (dtype == USL_I8) {
        for (int64_t i = 0; i < n; i++) {
            scales[i / cols] = 0.02f + 0.001f * (float)(i / cols);
            ((int8_t *)data)[i] = (int8_t)fmaxf(-127, fminf(127, roundf(w[i] / scales[i / cols])));
            w[i] = (float)((int8_t *)data)[i] * scales[i / cols];
        }
        m.data = data;
        m.scale = scales;
    } else {
        const usli_traits *t = usli_traits_of(dtype);
        t->encode(w, NULL, data, n);
        t->decode(data, w, n);
        if (gap) {
            void *packed = data;
            m.ld = cols + gap;
            data = rig_spread(packed, ROWS, 2 * (size_t)cols, 2 * (size_t)m.ld);
            free(packed);
        }
        m.data = data;
    }
    free(rig_random(&rng, USL_F32, RANK * cols, &a)), free(rig_random(&rng, USL_F32, ROWS * RANK, &b));
    for (int i = 0; i < 2; i++) {
        norm[i] = malloc(ROWS * sizeof *norm[i]);
        usli_dora_args args = { m, { .rank = RANK, .scale = scale, .a = a, .b = b }, norm[i] };
        CHECK_OK(rigs[i].ctx, rig_run(&rigs[i], USLI_OP_dora, &args, USLI_FORWARD));
    }
    CHECK(memcmp(norm[0], norm[1], ROWS * sizeof *norm[0]) == 0, "other bits with other threads");
    for (int64_t r = 0; r < ROWS; r++) {
        double sum = 0;
        for (int64_t c = 0; c < cols; c++) {
            double v = (double)w[r * cols + c];
            for (int k = 0; k < RANK; k++)
                v += (double)scale * (double)b[r * RANK + k] * (double)a[(int64_t)k * cols + c];
            sum += v * v;
        }
        want[r] = (float)sqrt(sum);
    }
    double error = test_rel_error(norm[0], want, ROWS);
    CHECK(error < 5e-7, "%s, %lld columns: %g", usl_dtype_name(dtype), (long long)cols, error);
    free(data), free(w), free(a), free(b), free(want), free(scratch), free(scales), free(norm[0]), free(norm[1]);
}

int main(void) {
    static const usl_dtype types[] = { USL_F32, USL_F16, USL_BF16, USL_NF4, USL_I8, USL_Q8_0, USL_Q4_K };
    rig rigs[2];
    rig_open(&rigs[0], 1);
    rig_open(&rigs[1], 3);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) check(rigs, types[i], 512, 0.3f, 0);
    check(rigs, USL_NF4, 1111, 0.3f, 0);
    check(rigs, USL_F32, 1300, 2, 0);
    check(rigs, USL_I8, 7, 1, 0);
#ifdef USLI_RIG_CUDA
    check(rigs, USL_BF16, 512, 0.3f, 64);
    check(rigs, USL_F16, 515, 0.3f, 3);
#endif
    rig_close(&rigs[0]);
    rig_close(&rigs[1]);
    return test_end("test_dora");
}
