/* rmsnorm against its formula in double, whose gradient is checked against central differences. */
#include "tests/ops/rig.h"

enum { X = 1, RES = 2 };

typedef struct spec {
    int64_t rows, cols;
    int given; /* X, RES or both */
    usl_dtype dtype, res_dtype, weight_dtype;
    float offset;
    bool accumulate, alias; /* alias: res_out over res, dn over dy */
} spec;

static const spec SPECS[] = {
    { 1, 3, X, USL_F32, USL_F32, USL_F32, 0, false, false },
    { 37, 65, X | RES, USL_F32, USL_F32, USL_F32, 0, false, false },
    { 33, 576, X | RES, USL_F32, USL_F32, USL_F32, 1, true, false },
    { 17, 576, X | RES, USL_F32, USL_F32, USL_BF16, 0, false, true },
    { 5, 100, RES, USL_F32, USL_F32, USL_F32, 0, false, false },
    { 40, 576, X | RES, USL_BF16, USL_BF16, USL_BF16, 0, false, true },
    { 20, 77, X, USL_BF16, USL_BF16, USL_F32, 1, true, false },
    { 20, 77, X | RES, USL_BF16, USL_F32, USL_F32, 0, true, false },
    { 20, 77, RES, USL_BF16, USL_F32, USL_F32, 0, false, false },
    { 20, 128, X | RES, USL_F16, USL_F32, USL_F16, 0, true, false },
    { 20, 128, X | RES, USL_F16, USL_F16, USL_F16, 0, false, true },
    /* Weights in float32 and whole packs: rows that a GPU keeps in the registers of 256, 512 and 1024 threads, rows
     * beyond, and more rows than blocks. */
    { 70, 136, X | RES, USL_BF16, USL_BF16, USL_F32, 0, true, false },
    { 3, 4096, X | RES, USL_BF16, USL_BF16, USL_F32, 0, true, false },
    { 3, 4104, X | RES, USL_F16, USL_F32, USL_F32, 1, false, false },
    { 2, 8200, X, USL_BF16, USL_BF16, USL_F32, 0, false, true },
    { 2, 2052, RES, USL_F32, USL_F32, USL_F32, 0, false, false },
    { 2, 8196, X | RES, USL_F32, USL_F32, USL_F32, 0, true, false },
};

/* What stands behind the rows of y, dy and dn: whole packs, and so that one stride or another is none of them. */
typedef struct gaps {
    int64_t y, dy, dn;
} gaps;
static const gaps NO_GAPS, WHOLE = { 64, 8, 16 }, ODD[] = { { 3, 0, 0 }, { 0, 5, 0 }, { 0, 0, 2 } };

static const float EPS = 1e-3f;

/* y and the gradients of dot(dy, y) of one row. */
static void oracle_row(const spec *s, const double *n, const float *w, const float *dy, double *y, double *dn,
                       double *dw, double *rstd) {
    double square = 0, mean = 0;
    for (int64_t i = 0; i < s->cols; i++) square += n[i] * n[i];
    double r = *rstd = 1 / sqrt(square / (double)s->cols + (double)EPS);
    for (int64_t i = 0; i < s->cols; i++)
        mean += (double)dy[i] * ((double)w[i] + (double)s->offset) * n[i] / (double)s->cols;
    for (int64_t i = 0; i < s->cols; i++) {
        double scale = (double)w[i] + (double)s->offset;
        y[i] = n[i] * r * scale;
        dn[i] = r * ((double)dy[i] * scale - n[i] * r * r * mean);
        dw[i] += (double)dy[i] * n[i] * r;
    }
}

static void check_oracle(void) {
    enum { N = 7 };
    const spec s = { .rows = 1, .cols = N, .offset = 0.5f };
    usli_rng rng;
    usli_rng_seed(&rng, 3);
    double n[N], y[N], dn[N], dw[N] = { 0 }, r, ignored[N], other[N];
    float w[N], dy[N];
    for (int i = 0; i < N; i++)
        n[i] = usli_rng_normal(&rng), w[i] = (float)usli_rng_normal(&rng), dy[i] = (float)usli_rng_normal(&rng);
    oracle_row(&s, n, w, dy, y, dn, dw, &r);
    for (int i = 0; i < N; i++) {
        double f[2], keep = n[i];
        for (int side = 0; side < 2; side++) {
            n[i] = keep + (side ? -1e-5 : 1e-5);
            oracle_row(&s, n, w, dy, y, ignored, other, &r);
            f[side] = 0;
            for (int j = 0; j < N; j++) f[side] += (double)dy[j] * y[j];
        }
        n[i] = keep;
        CHECK(fabs((f[0] - f[1]) / 2e-5 - dn[i]) < 1e-8, "dn %d", i);
    }
}

typedef struct output {
    void *sum, *y, *dn;
    float *rstd, *dw;
} output;

static void close_to(const spec *s, const char *what, usl_dtype dtype, const void *got, const double *want, int64_t n) {
    float *g = malloc(sizeof *g * (size_t)n), *w = malloc(sizeof *w * (size_t)n);
    usli_to_f32(got, dtype, g, n);
    for (int64_t i = 0; i < n; i++) w[i] = (float)want[i];
    double error = test_rel_error(g, w, (size_t)n), limit = dtype == USL_F32 ? 1e-6 : rig_epsilon(dtype);
    CHECK(error < limit, "%s of %lld x %lld: %.2e, allowed %.2e", what, (long long)s->rows, (long long)s->cols, error,
          limit);
    free(g), free(w);
}

static output compute(const spec *s, gaps gap, int threads, bool check) {
    usli_rng rng;
    usli_rng_seed(&rng, 5);
    int64_t total = s->rows * s->cols;
    size_t e = usli_dtype_bytes(s->dtype), re = usli_dtype_bytes(s->res_dtype);
    float *xf, *rf, *wf, *dyf, *before, *start;
    void *x = rig_random(&rng, s->dtype, total, &xf), *res = rig_random(&rng, s->res_dtype, total, &rf);
    void *weight = rig_random(&rng, s->weight_dtype, s->cols, &wf), *dy = rig_random(&rng, s->dtype, total, &dyf);
    void *dn = rig_random(&rng, s->res_dtype, total, &before);
    output out = { malloc((size_t)total * re), malloc((size_t)total * e), NULL, malloc(sizeof(float) * (size_t)s->rows),
                   NULL };
    size_t row = (size_t)s->cols * e, res_row = (size_t)s->cols * re;
    if (s->alias) gap.dn = gap.dy;
    int64_t ldy = s->cols + gap.y, lddy = s->cols + gap.dy, lddn = s->cols + gap.dn;
    void *y_rows = rig_spread(dy, s->rows, row, (size_t)ldy * e),
         *dy_rows = rig_spread(dy, s->rows, row, (size_t)lddy * e),
         *dn_rows = rig_spread(dn, s->rows, res_row, (size_t)lddn * re);
    out.dw = rig_random(&rng, USL_F32, s->cols, &start);
    bool both = s->given == (X | RES);
    rig r;
    rig_open(&r, threads);
    usli_rmsnorm_args a = { .rows = s->rows,
                            .cols = s->cols,
                            .eps = EPS,
                            .weight_offset = s->offset,
                            .dtype = s->dtype,
                            .res_dtype = s->res_dtype,
                            .weight_dtype = s->weight_dtype,
                            .x = s->given & X ? x : NULL,
                            .res = s->given & RES ? res : NULL,
                            .res_out = both ? (s->alias ? res : out.sum) : NULL,
                            .weight = weight,
                            .y = y_rows,
                            .ldy = gap.y ? ldy : 0,
                            .rstd = out.rstd };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_rmsnorm, &a, USLI_FORWARD));
    rig_pack("y", y_rows, s->rows, row, (size_t)ldy * e, out.y);
    if (both && s->alias) memcpy(out.sum, res, (size_t)total * re);
    a.n_dtype = s->given & RES ? s->res_dtype : s->dtype;
    a.n = both ? out.sum : s->given & RES ? res : x;
    if (!both) memcpy(out.sum, a.n, (size_t)total * usli_dtype_bytes(a.n_dtype));
    a.dy = dy_rows, a.dn = s->alias ? dy_rows : dn_rows, a.dn_mode = s->accumulate ? USLI_ACCUMULATE : USLI_ASSIGN,
    a.dweight = out.dw;
    a.lddy = gap.dy ? lddy : 0, a.lddn = gap.dn ? lddn : 0;
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_rmsnorm, &a, USLI_BACKWARD));
    rig_pack("dn", a.dn, s->rows, res_row, (size_t)lddn * re, dn);
    out.dn = dn;
    if (check) {
        double *n = malloc(sizeof *n * (size_t)total), *y = malloc(sizeof *y * (size_t)total),
               *g = malloc(sizeof *g * (size_t)total);
        double *dw = calloc((size_t)s->cols, sizeof *dw), *rstd = malloc(sizeof *rstd * (size_t)s->rows);
        float *stored = malloc(sizeof *stored * (size_t)total);
        for (int64_t i = 0; i < total; i++)
            n[i] = (s->given & X ? (double)xf[i] : 0) + (s->given & RES ? (double)rf[i] : 0);
        if (both) close_to(s, "sum", s->res_dtype, out.sum, n, total);
        /* The norm is of what was stored. */
        usli_to_f32(out.sum, a.n_dtype, stored, total);
        for (int64_t i = 0; i < total; i++) n[i] = (double)stored[i];
        for (int64_t t = 0; t < s->rows; t++) {
            int64_t at = t * s->cols;
            oracle_row(s, n + at, wf, dyf + at, y + at, g + at, dw, &rstd[t]);
            for (int64_t i = at; s->accumulate && i < at + s->cols; i++) g[i] += (double)before[i];
        }
        for (int64_t i = 0; i < s->cols; i++) dw[i] += (double)start[i];
        close_to(s, "y", s->dtype, out.y, y, total);
        close_to(s, "dn", s->res_dtype, out.dn, g, total);
        close_to(s, "dweight", USL_F32, out.dw, dw, s->cols);
        close_to(s, "rstd", USL_F32, out.rstd, rstd, s->rows);
        free(n), free(y), free(g), free(dw), free(rstd), free(stored);
    }
    rig_close(&r);
    free(x), free(res), free(weight), free(dy), free(y_rows), free(dy_rows), free(dn_rows), free(xf), free(rf),
        free(wf), free(dyf), free(before), free(start);
    return out;
}

static void free_output(output *o) {
    free(o->sum), free(o->y), free(o->dn), free(o->rstd), free(o->dw);
}

static void check_spec(const spec *s, gaps odd) {
    output one = compute(s, NO_GAPS, 1, true), other = compute(s, odd, 2, true);
    for (int threads = 2; threads <= 5; threads += 3) {
        output more = compute(s, threads == 2 ? NO_GAPS : WHOLE, threads, false);
        size_t total = (size_t)(s->rows * s->cols);
        CHECK(!memcmp(one.y, more.y, total * usli_dtype_bytes(s->dtype)) &&
                  !memcmp(one.dn, more.dn, total * usli_dtype_bytes(s->res_dtype)) &&
                  !memcmp(one.dw, more.dw, (size_t)s->cols * sizeof(float)),
              "%d threads give other bits", threads);
        free_output(&more);
    }
    free_output(&one), free_output(&other);
}

int main(void) {
    check_oracle();
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) check_spec(&SPECS[i], ODD[i % 3]);
    return test_end("rmsnorm");
}
