/* usli_svd against matrices whose singular values and vectors are known: small ones, ones of every proportion, and ones
 * that go through the range finder. */
#include "core/base/rng.h"
#include "core/model/adapter.h"
#include "tests/test.h"

/* Rows of x (n, m) become orthonormal. */
static void orthonormal(double *x, int n, int m) {
    for (int k = 0; k < n; k++)
        for (int pass = 0; pass < 2; pass++) {
            double norm = 0;
            for (int j = 0; j < k; j++) {
                double dot = 0;
                for (int i = 0; i < m; i++) dot += x[k * m + i] * x[j * m + i];
                for (int i = 0; i < m; i++) x[k * m + i] -= dot * x[j * m + i];
            }
            for (int i = 0; i < m; i++) norm += x[k * m + i] * x[k * m + i];
            for (int i = 0; i < m; i++) x[k * m + i] /= sqrt(norm);
        }
}

static void check(usl_ctx **ctx, int rows, int cols, int known, int rank, int iterations, double falls, double limit) {
    usli_rng rng;
    usli_rng_seed(&rng, 17);
    double *u = malloc(sizeof *u * (size_t)(known * rows)), *v = malloc(sizeof *v * (size_t)(known * cols));
    float *w = calloc((size_t)(rows * cols), sizeof *w), *got[2][3];
    for (int i = 0; i < known * rows; i++) u[i] = usli_rng_normal(&rng);
    for (int i = 0; i < known * cols; i++) v[i] = usli_rng_normal(&rng);
    orthonormal(u, known, rows);
    orthonormal(v, known, cols);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            double sum = 0;
            for (int k = 0; k < known; k++) sum += 3 * pow(falls, k) * u[k * rows + r] * v[k * cols + c];
            w[r * cols + c] = (float)sum;
        }
    size_t sizes[3] = { (size_t)(rows * rank), (size_t)rank, (size_t)(rank * cols) };
    for (int t = 0; t < 2; t++) {
        for (int i = 0; i < 3; i++) got[t][i] = malloc(sizeof(float) * sizes[i]);
        CHECK_OK(ctx[t], usli_svd(ctx[t], w, rows, cols, rank, iterations, got[t][0], got[t][1], got[t][2]));
    }
    double worst_value = 0, worst = 0, norm = 0;
    for (int k = 0; k < rank; k++) {
        double error = fabs((double)got[0][1][k] / (3 * pow(falls, k)) - 1);
        if (!(error <= worst_value)) worst_value = error;
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            double sum = 0, want = 0;
            for (int k = 0; k < rank; k++) {
                sum += (double)got[0][0][r * rank + k] * (double)got[0][1][k] * (double)got[0][2][k * cols + c];
                want += 3 * pow(falls, k) * u[k * rows + r] * v[k * cols + c];
            }
            worst += (sum - want) * (sum - want);
            norm += want * want;
        }
    CHECK(worst_value < limit && sqrt(worst / norm) < 10 * limit, "%dx%d, rank %d: values %g, product %g", rows, cols,
          rank, worst_value, sqrt(worst / norm));
    for (int i = 0; i < 3; i++)
        CHECK(memcmp(got[0][i], got[1][i], sizeof(float) * sizes[i]) == 0, "%dx%d: other bits with other threads", rows,
              cols);
    for (int i = 0; i < 6; i++) free(got[i / 3][i % 3]);
    free(u), free(v), free(w);
}

int main(void) {
    usl_ctx *ctx[2];
    for (int i = 0; i < 2; i++) {
        usl_ctx_opts opts = USL_CTX_OPTS_INIT;
        opts.threads = i ? 3 : 1;
        CHECK_OK(NULL, usl_ctx_new(&opts, &ctx[i]));
    }
    check(ctx, 1, 5, 1, 1, -1, 1, 1e-6);
    check(ctx, 20, 20, 20, 20, -1, 0.8, 1e-5);
    check(ctx, 40, 24, 24, 5, -1, 0.9, 1e-6);
    check(ctx, 24, 40, 24, 5, -1, 0.9, 1e-6);
    check(ctx, 260, 230, 90, 6, -1, 0.9, 1e-6); /* the range finder, until it stands */
    check(ctx, 300, 210, 60, 8, 4, 0.8, 1e-6);  /* and for four steps */
    float x[4] = { 1, 0, 0, 1 }, out[16];
    CHECK(usli_svd(ctx[0], x, 2, 2, 3, -1, out, out, out) == USL_ERR_INVALID, "%s", usl_ctx_errmsg(ctx[0]));
    for (int i = 0; i < 2; i++) usl_ctx_free(ctx[i]);
    return test_end("svd");
}
