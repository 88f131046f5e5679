/* glu against its formulas in double; the derivatives against central differences. */
#include "tests/ops/rig.h"

static double act(usli_act kind, double x) {
    if (kind == USLI_SILU) return x / (1 + exp(-x));
    if (kind == USLI_GELU) return 0.5 * x * (1 + erf(x / sqrt(2)));
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

static double slope(usli_act kind, double x) {
    return (act(kind, x + 1e-5) - act(kind, x - 1e-5)) / 2e-5;
}

typedef struct output {
    void *h, *h_out, *dgate_up;
} output;

/* Each value within its own rounding, and a little absolutely where terms cancel. */
static void close_to(const char *what, usli_act kind, usl_dtype dtype, const void *got, const double *want, int64_t n) {
    float *g = malloc(sizeof *g * (size_t)n);
    usli_to_f32(got, dtype, g, n);
    double worst = 0, relative = dtype == USL_F32 ? 2e-6 : 1.01 * rig_epsilon(dtype);
    for (int64_t i = 0; i < n; i++) {
        double excess = fabs((double)g[i] - want[i]) / (relative * fabs(want[i]) + 1e-6);
        if (!(excess <= worst)) worst = excess;
    }
    CHECK(worst <= 1, "%s of activation %d in %s: %g times what is allowed", what, (int)kind, usl_dtype_name(dtype),
          worst);
    free(g);
}

/* How it is computed; gap, gap_h: what stands behind the rows of gate|up and of h. */
typedef struct way {
    bool in_place;
    int threads;
    int64_t gap, gap_h;
} way;

static output compute(usli_act kind, usl_dtype dtype, int64_t rows, int64_t cols, way how, bool check) {
    usli_rng rng;
    usli_rng_seed(&rng, 9);
    int64_t n = rows * cols;
    size_t e = usli_dtype_bytes(dtype);
    float *gu, *dh;
    void *raw = rig_random(&rng, USL_F32, 2 * n, &gu), *grad = rig_random(&rng, dtype, n, &dh),
         *gate_up = malloc(2 * (size_t)n * e);
    free(raw);
    for (int64_t i = 0; i < 2 * n; i++) gu[i] *= 3; /* into the tails */
    gu[0] = -95, gu[1 % (2 * n)] = 60;
    usli_from_f32(gu, gate_up, dtype, 2 * n);
    usli_to_f32(gate_up, dtype, gu, 2 * n);
    size_t row = (size_t)cols * e, ld = 2 * row + (size_t)how.gap * e, ldh = row + (size_t)how.gap_h * e;
    output out = { malloc((size_t)n * e), how.in_place ? grad : malloc((size_t)n * e), malloc(2 * (size_t)n * e) };
    void *in_rows = rig_spread(gate_up, rows, 2 * row, ld), *h_rows = rig_spread(grad, rows, row, ldh),
         *out_rows = how.in_place ? in_rows : rig_spread(gate_up, rows, 2 * row, ld);
    rig r;
    rig_open(&r, how.threads);
    usli_glu_args a = { .rows = rows,
                        .cols = cols,
                        .act = kind,
                        .dtype = dtype,
                        .gate_up = in_rows,
                        .h = h_rows,
                        .dh = grad,
                        .dgate_up = out_rows,
                        .h_out = out.h_out,
                        .ld = how.gap ? 2 * cols + how.gap : 0,
                        .ldh = how.gap_h ? cols + how.gap_h : 0 };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_glu, &a, USLI_FORWARD));
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_glu, &a, USLI_BACKWARD));
    rig_pack("h", h_rows, rows, row, ldh, out.h);
    rig_pack("dgate|dup", out_rows, rows, 2 * row, ld, out.dgate_up);
    CHECK(!memcmp(out.h, out.h_out, (size_t)n * e), "h is rebuilt as it was");
    if (check) {
        double *h = malloc(sizeof *h * (size_t)n), *d = malloc(sizeof *d * 2 * (size_t)n);
        for (int64_t t = 0; t < rows; t++)
            for (int64_t c = 0; c < cols; c++) {
                double g = (double)gu[t * 2 * cols + c], u = (double)gu[t * 2 * cols + cols + c],
                       up = (double)dh[t * cols + c];
                h[t * cols + c] = act(kind, g) * u;
                d[t * 2 * cols + c] = up * u * slope(kind, g);
                d[t * 2 * cols + cols + c] = up * act(kind, g);
            }
        close_to("h", kind, dtype, out.h, h, n);
        close_to("dgate|dup", kind, dtype, out.dgate_up, d, 2 * n);
        free(h), free(d);
    }
    if (!how.in_place) free(grad), free(out_rows);
    rig_close(&r);
    free(gu), free(dh), free(gate_up), free(in_rows), free(h_rows);
    return out;
}

static void free_output(output *o) {
    free(o->h), free(o->h_out), free(o->dgate_up);
}

/* Weighted rows: those without weights times them, and the gradient of each is its row's dot product. */
static void check_weights(usl_dtype dtype, int64_t rows, int64_t cols) {
    usli_rng rng;
    usli_rng_seed(&rng, 21);
    float *gu, *dh, *w;
    int64_t n = rows * cols;
    size_t e = usli_dtype_bytes(dtype);
    void *gate_up = rig_random(&rng, dtype, 2 * n, &gu), *grad = rig_random(&rng, dtype, n, &dh);
    free(rig_random(&rng, USL_F32, rows, &w));
    void *h = malloc((size_t)n * e), *dgu = malloc(2 * (size_t)n * e);
    float *dw = malloc((size_t)rows * sizeof *dw);
    rig r;
    rig_open(&r, 2);
    usli_glu_args a = { .rows = rows,
                        .cols = cols,
                        .dtype = dtype,
                        .gate_up = gate_up,
                        .h = h,
                        .dh = grad,
                        .dgate_up = dgu,
                        .h_out = grad,
                        .weight = w,
                        .dweight = dw };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_glu, &a, USLI_FORWARD));
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_glu, &a, USLI_BACKWARD));
    CHECK(!memcmp(h, grad, (size_t)n * e), "h is rebuilt as it was");
    double *want = malloc(sizeof *want * (size_t)n), *d = malloc(sizeof *d * 2 * (size_t)n);
    float *dw_want = malloc(sizeof *dw_want * (size_t)rows);
    for (int64_t t = 0; t < rows; t++) {
        double sum = 0;
        for (int64_t c = 0; c < cols; c++) {
            double g = (double)gu[t * 2 * cols + c], u = (double)gu[t * 2 * cols + cols + c],
                   up = (double)dh[t * cols + c], weight = (double)w[t];
            want[t * cols + c] = weight * act(USLI_SILU, g) * u;
            d[t * 2 * cols + c] = weight * up * u * slope(USLI_SILU, g);
            d[t * 2 * cols + cols + c] = weight * up * act(USLI_SILU, g);
            sum += up * act(USLI_SILU, g) * u;
        }
        dw_want[t] = (float)sum;
    }
    close_to("weighted h", USLI_SILU, dtype, h, want, n);
    close_to("weighted dgate|dup", USLI_SILU, dtype, dgu, d, 2 * n);
    double error = test_rel_error(dw, dw_want, (size_t)rows);
    CHECK(error <= 2e-6, "dweight in %s: %g", usl_dtype_name(dtype), error);
    rig_close(&r);
    free(gu), free(dh), free(w), free(gate_up), free(grad), free(h), free(dgu), free(dw), free(want), free(d),
        free(dw_want);
}

int main(void) {
    static const int64_t shapes[][2] = { { 1, 1 }, { 3, 7 }, { 9, 513 }, { 20, 1536 }, { 2, 2056 } };
    static const usl_dtype dtypes[] = { USL_F32, USL_BF16, USL_F16 };
    static const way plain = { false, 1, 0, 0 },
                     others[] = { { true, 2, 0, 0 }, { true, 5, 16, 8 }, { false, 2, 3, 5 } };
    for (int kind = 0; kind < 3; kind++)
        for (int t = 0; t < 3; t++)
            for (int s = 0; s < 5; s++) {
                size_t bytes = (size_t)(shapes[s][0] * shapes[s][1]) * usli_dtype_bytes(dtypes[t]);
                output one = compute((usli_act)kind, dtypes[t], shapes[s][0], shapes[s][1], plain, true);
                for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
                    output more = compute((usli_act)kind, dtypes[t], shapes[s][0], shapes[s][1], others[i], false);
                    CHECK(!memcmp(one.h, more.h, bytes) && !memcmp(one.dgate_up, more.dgate_up, 2 * bytes),
                          "way %zu, %d threads: other bits", i, others[i].threads);
                    free_output(&more);
                }
                free_output(&one);
            }
    for (int t = 0; t < 3; t++)
        for (int s = 0; s < 5; s++) check_weights(dtypes[t], shapes[s][0], shapes[s][1]);
    return test_end("glu");
}
