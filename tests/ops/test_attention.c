/* attention against whole score matrices in double: packed rows, grouped heads, windows, soft-caps, caches. The
 * formulas of the backward pass are themselves checked against central differences of the forward one. */
#include "tests/ops/rig.h"

/* USLI_RIG_PAIRED: the CPU's other way with bfloat16 (paired_attention.c). */
#ifdef USLI_RIG_PAIRED
extern const usli_op_impl paired_attention;
static usli_backend paired;

static void open_rig(rig *r, int threads) {
    rig_open(r, threads);
    paired = *r->x.backend;
    paired.ops[USLI_OP_attention] = &paired_attention;
    r->x.backend = &paired;
}
enum { RIG_PAIRED = 1 };
#else
enum { RIG_PAIRED = 0 };
#define open_rig rig_open
#endif

enum { MAX_ROWS = 8 };

typedef struct spec {
    const char *name;
    int rows;
    int32_t q_len[MAX_ROWS], k_len[MAX_ROWS];
    int heads, kv_heads, qk_dim, v_dim;
    float softcap;
    int64_t window;
    bool bidirectional, k_lens; /* k_lens: keys lie in a cache with holes between rows */
    usl_dtype dtype;
    bool aligned; /* tokens begin at multiples of 16 bytes */
} spec;

static const spec SPECS[] = {
    { "one token", 1, { 1 }, { 1 }, 1, 1, 4, 4, 0, 0, false, false, USL_F32, false },
    { "packed rows",
      5,
      { 1, 70, 33, 1, 129 },
      { 1, 70, 33, 1, 129 },
      6,
      2,
      16,
      16,
      0,
      0,
      false,
      false,
      USL_F32,
      false },
    { "heads of 64", 2, { 150, 64 }, { 150, 64 }, 9, 3, 64, 64, 0, 0, false, false, USL_F32, false },
    { "odd sizes", 3, { 65, 3, 31 }, { 65, 3, 31 }, 3, 1, 7, 13, 0, 0, false, false, USL_F32, false },
    { "wide heads", 2, { 40, 97 }, { 40, 97 }, 2, 1, 192, 128, 0, 0, false, false, USL_F32, false },
    { "window", 3, { 200, 9, 65 }, { 200, 9, 65 }, 4, 2, 16, 8, 0, 20, false, false, USL_F32, false },
    { "window of one", 1, { 70 }, { 70 }, 2, 2, 8, 8, 0, 1, false, false, USL_F32, false },
    { "window over tiles", 1, { 300 }, { 300 }, 4, 4, 16, 16, 0, 130, false, false, USL_F32, false },
    { "softcap", 2, { 100, 30 }, { 100, 30 }, 4, 2, 16, 24, 2.0f, 0, false, false, USL_F32, false },
    { "softcap, window", 2, { 100, 30 }, { 100, 30 }, 4, 1, 16, 16, 1.5f, 33, false, false, USL_F32, false },
    { "not causal", 2, { 70, 10 }, { 90, 65 }, 4, 2, 16, 16, 0, 0, true, false, USL_F32, false },
    { "more keys", 3, { 5, 1, 40 }, { 100, 64, 41 }, 4, 2, 16, 16, 0, 0, false, false, USL_F32, false },
    { "more queries", 2, { 70, 9 }, { 20, 1 }, 4, 2, 16, 16, 0, 0, false, false, USL_F32, false },
    { "no keys", 2, { 5, 3 }, { 0, 7 }, 4, 2, 16, 16, 0, 0, false, false, USL_F32, false },
    { "no queries", 3, { 0, 3, 0 }, { 5, 7, 0 }, 4, 2, 16, 16, 0, 0, false, false, USL_F32, false },
    { "one kv head of many", 1, { 30 }, { 30 }, 128, 1, 8, 8, 0, 0, false, false, USL_F32, false },
    { "decode", 4, { 1, 1, 1, 1 }, { 1, 63, 64, 300 }, 9, 3, 64, 64, 0, 0, false, true, USL_F32, false },
    { "decode, window", 2, { 1, 1 }, { 500, 40 }, 4, 2, 32, 32, 0, 100, false, true, USL_F32, false },
    { "prefill of a cache", 2, { 37, 80 }, { 70, 80 }, 4, 2, 32, 32, 0, 0, false, true, USL_F32, false },
    { "bf16", 3, { 1, 130, 70 }, { 1, 130, 70 }, 9, 3, 64, 64, 0, 0, false, false, USL_BF16, false },
    { "bf16, odd", 3, { 65, 3, 31 }, { 65, 3, 31 }, 3, 1, 7, 13, 0, 0, false, false, USL_BF16, false },
    { "bf16, softcap, window", 2, { 100, 30 }, { 100, 30 }, 4, 2, 16, 32, 2.0f, 40, false, false, USL_BF16, false },
    { "bf16, decode", 2, { 1, 1 }, { 300, 17 }, 9, 3, 64, 64, 0, 0, false, true, USL_BF16, false },
    { "bf16, more keys", 2, { 33, 1 }, { 100, 64 }, 4, 2, 32, 32, 0, 0, false, false, USL_BF16, false },
    { "f16", 2, { 130, 70 }, { 130, 70 }, 9, 3, 64, 64, 0, 0, false, false, USL_F16, false },
    /* Rows 16 bytes apart, as models have them: the CUDA backend's tensor-core kernels. */
    { "quick, packed",
      5,
      { 1, 70, 33, 129, 200 },
      { 1, 70, 33, 129, 200 },
      4,
      1,
      128,
      128,
      0,
      0,
      false,
      false,
      USL_BF16,
      true },
    { "quick, heads of 64", 3, { 130, 1, 270 }, { 130, 1, 270 }, 6, 2, 64, 64, 0, 0, false, false, USL_BF16, true },
    { "quick, heads of 80, padded", 2, { 65, 3 }, { 65, 3 }, 2, 1, 80, 72, 0, 0, false, false, USL_F16, true },
    { "quick, heads of 96", 1, { 140 }, { 140 }, 2, 2, 96, 96, 0, 0, false, false, USL_F16, true },
    { "quick, wide heads", 2, { 40, 97 }, { 40, 97 }, 2, 1, 192, 128, 0, 0, false, false, USL_BF16, true },
    { "quick, heads of 256", 2, { 90, 31 }, { 90, 31 }, 2, 1, 256, 256, 0, 0, false, false, USL_BF16, true },
    { "quick, window", 2, { 300, 70 }, { 300, 70 }, 4, 2, 64, 64, 0, 90, false, false, USL_BF16, true },
    { "quick, window of one", 1, { 70 }, { 70 }, 2, 2, 128, 128, 0, 1, false, false, USL_F16, true },
    { "quick, window, not causal", 1, { 140 }, { 150 }, 2, 1, 64, 64, 0, 40, true, false, USL_F16, true },
    { "quick, softcap", 2, { 150, 30 }, { 150, 30 }, 4, 2, 128, 128, 2.0f, 50, false, false, USL_F16, true },
    { "quick, not causal", 2, { 70, 140 }, { 165, 65 }, 2, 1, 128, 128, 0, 0, true, false, USL_BF16, true },
    { "quick, more queries", 2, { 140, 9 }, { 20, 1 }, 4, 2, 128, 128, 0, 0, false, false, USL_BF16, true },
    { "quick, no keys or queries",
      4,
      { 70, 0, 30, 0 },
      { 0, 80, 70, 0 },
      2,
      1,
      128,
      128,
      0,
      0,
      false,
      false,
      USL_BF16,
      true },
    { "quick, prefill of a cache", 2, { 37, 130 }, { 170, 130 }, 4, 2, 128, 128, 0, 0, false, true, USL_BF16, true },
    { "quick, decode", 4, { 1, 1, 1, 1 }, { 1, 63, 0, 700 }, 8, 2, 128, 128, 0, 0, false, true, USL_BF16, true },
    { "quick, decode, many heads", 2, { 1, 1 }, { 200, 33 }, 40, 2, 64, 64, 0, 0, false, true, USL_F16, true },
    { "quick, decode, several queries",
      3,
      { 3, 1, 0 },
      { 290, 1, 5 },
      6,
      2,
      96,
      96,
      0,
      0,
      false,
      true,
      USL_BF16,
      true },
    { "quick, decode, window, softcap",
      2,
      { 2, 1 },
      { 500, 40 },
      4,
      2,
      256,
      256,
      3.0f,
      100,
      false,
      true,
      USL_BF16,
      true },
    { "quick, decode, wide heads", 1, { 1 }, { 100 }, 16, 1, 192, 128, 0, 0, false, true, USL_F16, true },
    /* Rows of one length: cuDNN's, where it is. */
    { "equal rows", 2, { 512, 512 }, { 512, 512 }, 4, 2, 128, 128, 0, 0, false, false, USL_BF16, true },
    { "equal rows, heads of 64", 2, { 640, 640 }, { 640, 640 }, 3, 1, 64, 64, 0, 0, false, false, USL_F16, true },
    { "equal rows, heads of 80", 1, { 1024 }, { 1024 }, 2, 1, 80, 80, 0, 0, false, false, USL_F16, true },
    { "equal rows, heads alone", 1, { 768 }, { 768 }, 2, 2, 64, 64, 0, 0, false, false, USL_BF16, true },
};

typedef struct data {
    const spec *s;
    int32_t *cu_q, *cu_k, *k_lens;  /* k_lens: a copy of the spec's */
    int64_t tq, tk, sq, sk, sv, so; /* tokens, strides */
    void *q, *k, *v, *d_o;
    float *qf, *kf, *vf, *dof;
    double *o, *lse, *dq, *dk, *dv;
    double scale;
} data;

static void make_data(const spec *s, data *d) {
    usli_rng rng;
    usli_rng_seed(&rng, 7);
    memset(d, 0, sizeof *d);
    d->s = s;
    d->cu_q = calloc(MAX_ROWS + 1, sizeof *d->cu_q), d->cu_k = calloc(MAX_ROWS + 1, sizeof *d->cu_k);
    d->k_lens = rig_copy(s->k_len, sizeof s->k_len);
    for (int r = 0; r < s->rows; r++) {
        d->cu_q[r + 1] = d->cu_q[r] + s->q_len[r];
        d->cu_k[r + 1] = d->cu_k[r] + s->k_len[r] + (s->k_lens ? 11 : 0);
    }
    d->tq = d->cu_q[s->rows], d->tk = d->cu_k[s->rows];
    d->sq = s->heads * s->qk_dim + (s->aligned ? 8 : 5), d->sk = s->kv_heads * s->qk_dim + (s->aligned ? 8 : 3);
    d->sv = s->kv_heads * s->v_dim + (s->aligned ? 8 : 2), d->so = s->heads * s->v_dim + (s->aligned ? 8 : 7);
    d->scale = 1.0 / sqrt(s->qk_dim) * 1.1;
    d->q = rig_random(&rng, s->dtype, d->tq * d->sq, &d->qf);
    d->k = rig_random(&rng, s->dtype, d->tk * d->sk, &d->kf);
    d->v = rig_random(&rng, s->dtype, d->tk * d->sv, &d->vf);
    d->d_o = rig_random(&rng, s->dtype, d->tq * d->so, &d->dof);
    d->o = calloc((size_t)(d->tq * d->so), sizeof(double));
    d->lse = calloc((size_t)(d->tq * s->heads), sizeof(double));
    d->dq = calloc((size_t)(d->tq * d->sq), sizeof(double));
    d->dk = calloc((size_t)(d->tk * d->sk), sizeof(double));
    d->dv = calloc((size_t)(d->tk * d->sv), sizeof(double));
}

static void free_data(data *d) {
    free(d->q), free(d->k), free(d->v), free(d->d_o), free(d->qf), free(d->kf), free(d->vf), free(d->dof);
    free(d->o), free(d->lse), free(d->dq), free(d->dk), free(d->dv);
    free(d->cu_q), free(d->cu_k), free(d->k_lens);
}

static bool seen(const spec *s, int r, int64_t i, int64_t j) {
    int64_t end = i + s->k_len[r] - s->q_len[r];
    return (s->bidirectional || j <= end) && (!s->window || j > end - s->window);
}

/* One query of one head: p over the row's keys, or all 0; returns lse. slope: d capped / d raw. */
static double probabilities(const data *d, int r, int64_t i, int h, double *p, double *slope) {
    const spec *s = d->s;
    int kv = h / (s->heads / s->kv_heads);
    const float *q = d->qf + (d->cu_q[r] + i) * d->sq + h * s->qk_dim;
    double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < s->k_len[r]; j++) {
        const float *k = d->kf + (d->cu_k[r] + j) * d->sk + kv * s->qk_dim;
        double z = 0;
        for (int c = 0; c < s->qk_dim; c++) z += (double)q[c] * (double)k[c];
        z *= d->scale;
        slope[j] = 1;
        if (s->softcap > 0) {
            double t = tanh(z / (double)s->softcap);
            z = (double)s->softcap * t;
            slope[j] = 1 - t * t;
        }
        p[j] = seen(s, r, i, j) ? z : -INFINITY;
        top = fmax(top, p[j]);
    }
    for (int64_t j = 0; j < s->k_len[r]; j++) {
        p[j] = top == -INFINITY ? 0 : exp(p[j] - top);
        sum += p[j];
    }
    for (int64_t j = 0; sum > 0 && j < s->k_len[r]; j++) p[j] /= sum;
    return sum > 0 ? top + log(sum) : -INFINITY;
}

static void oracle(data *d) {
    const spec *s = d->s;
    double *p = malloc(sizeof *p * 1024), *slope = malloc(sizeof *slope * 1024), *dp = malloc(sizeof *dp * 1024);
    memset(d->o, 0, sizeof(double) * (size_t)(d->tq * d->so));
    for (int r = 0; r < s->rows; r++)
        for (int64_t i = 0; i < s->q_len[r]; i++)
            for (int h = 0; h < s->heads; h++) {
                int kv = h / (s->heads / s->kv_heads);
                int64_t t = d->cu_q[r] + i;
                d->lse[h * d->tq + t] = probabilities(d, r, i, h, p, slope);
                double *o = d->o + t * d->so + h * s->v_dim, delta = 0;
                const float *g = d->dof + t * d->so + h * s->v_dim;
                for (int64_t j = 0; j < s->k_len[r]; j++) {
                    int64_t at = (d->cu_k[r] + j) * d->sv + kv * s->v_dim;
                    dp[j] = 0;
                    for (int c = 0; c < s->v_dim; c++) {
                        o[c] += p[j] * (double)d->vf[at + c];
                        dp[j] += (double)g[c] * (double)d->vf[at + c];
                        d->dv[at + c] += p[j] * (double)g[c];
                    }
                    delta += p[j] * dp[j];
                }
                for (int64_t j = 0; j < s->k_len[r]; j++) {
                    double ds = d->scale * p[j] * (dp[j] - delta) * slope[j];
                    int64_t kt = (d->cu_k[r] + j) * d->sk + kv * s->qk_dim, qt = t * d->sq + h * s->qk_dim;
                    for (int c = 0; c < s->qk_dim; c++) {
                        d->dq[qt + c] += ds * (double)d->kf[kt + c];
                        d->dk[kt + c] += ds * (double)d->qf[qt + c];
                    }
                }
            }
    free(p), free(slope), free(dp);
}

/* dot(do, o), whose derivatives are dq, dk, dv. */
static double objective(data *d) {
    data copy = *d;
    size_t nq = (size_t)(d->tq * d->sq), nk = (size_t)(d->tk * d->sk), nv = (size_t)(d->tk * d->sv);
    copy.dq = calloc(nq, sizeof(double)), copy.dk = calloc(nk, sizeof(double)), copy.dv = calloc(nv, sizeof(double));
    oracle(&copy);
    free(copy.dq), free(copy.dk), free(copy.dv);
    double sum = 0;
    for (int64_t i = 0; i < d->tq * d->so; i++) sum += d->o[i] * (double)d->dof[i];
    return sum;
}

static void check_oracle(void) {
    spec s = { "", 2, { 5, 2 }, { 7, 2 }, 4, 2, 3, 2, 1.5f, 3, false, false, USL_F32, false };
    data d;
    make_data(&s, &d);
    oracle(&d);
    struct {
        float *x;
        const double *g;
        int64_t n;
    } sides[] = { { d.qf, d.dq, d.tq * d.sq }, { d.kf, d.dk, d.tk * d.sk }, { d.vf, d.dv, d.tk * d.sv } };
    double worst = 0;
    for (int side = 0; side < 3; side++)
        for (int64_t i = 0; i < sides[side].n; i++) {
            float *x = &sides[side].x[i], keep = *x, step = 1.0f / 1024;
            *x = keep + step;
            double up = *x, high = objective(&d);
            *x = keep - step;
            double down = *x, low = objective(&d);
            *x = keep;
            worst = fmax(worst, fabs((high - low) / (up - down) - sides[side].g[i]));
        }
    CHECK(worst < 1e-5, "the oracle's gradient is off by %g", worst);
    free_data(&d);
}

typedef struct result {
    void *o, *dq, *dk, *dv;
    float *lse;
} result;

/* Outputs begin as a pattern, so that what must not be written shows. */
static void *patterned(const data *d, int64_t n) {
    size_t bytes = (size_t)n * usli_dtype_bytes(d->s->dtype);
    void *p = malloc(bytes);
    memset(p, 0x3c, bytes);
    return p;
}

static result compute(const data *d, int threads) {
    const spec *s = d->s;
    rig r;
    open_rig(&r, threads);
    result out = { patterned(d, d->tq * d->so), patterned(d, d->tq * d->sq), patterned(d, d->tk * d->sk),
                   patterned(d, d->tk * d->sv), malloc(sizeof(float) * (size_t)(d->tq * s->heads)) };
    usli_attention_args a = { .tokens_q = d->tq,
                              .tokens_k = d->tk,
                              .rows = s->rows,
                              .cu_q = d->cu_q,
                              .cu_k = d->cu_k,
                              .k_lens = s->k_lens ? d->k_lens : NULL,
                              .causal = !s->bidirectional,
                              .heads = s->heads,
                              .kv_heads = s->kv_heads,
                              .qk_dim = s->qk_dim,
                              .v_dim = s->v_dim,
                              .scale = (float)d->scale,
                              .softcap = s->softcap,
                              .window = s->window,
                              .dtype = s->dtype,
                              .q = d->q,
                              .k = d->k,
                              .v = d->v,
                              .q_stride = d->sq,
                              .k_stride = d->sk,
                              .v_stride = d->sv,
                              .o = out.o,
                              .o_stride = d->so,
                              .lse = out.lse,
                              .deterministic = true,
                              .d_o = d->d_o,
                              .dq = out.dq,
                              .dk = out.dk,
                              .dv = out.dv };
    for (int i = 0; i < s->rows; i++) {
        if (s->q_len[i] > a.max_q) a.max_q = s->q_len[i];
        if (s->k_len[i] > a.max_k) a.max_k = s->k_len[i];
    }
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_attention, &a, USLI_FORWARD));
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_attention, &a, USLI_BACKWARD));
    /* In inference nothing is saved; the output is the same. */
    void *again = patterned(d, d->tq * d->so);
    a.o = again, a.lse = NULL;
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_attention, &a, USLI_FORWARD));
    CHECK(!memcmp(again, out.o, (size_t)(d->tq * d->so) * usli_dtype_bytes(s->dtype)), "%s: without lse", s->name);
    free(again);
    /* Where it was asked for, the rows that are meant for cuDNN must have come to it. */
    const char *choice = getenv("USL_ATTENTION");
    if (choice && !strcmp(choice, "cudnn") && s->q_len[0] >= 512 && r.x.backend->libraries)
        CHECK(strstr(r.x.backend->libraries(&r.x), "cuDNN"), "%s: cuDNN did not take it", s->name);
    rig_close(&r);
    return out;
}

static void free_result(result *r) {
    free(r->o), free(r->dq), free(r->dk), free(r->dv), free(r->lse);
}

/* Values (tokens, width) of rows stride apart; all others must still be the pattern. Tokens of holes are not given. */
static void compare(const data *d, const char *what, const void *got, const double *want, int64_t stride, int64_t width,
                    bool keys, double limit) {
    const spec *s = d->s;
    int64_t n = 0, total = (keys ? d->tk : d->tq) * stride, foreign = 0;
    float *g = malloc(sizeof *g * (size_t)total), *w = malloc(sizeof *w * (size_t)total);
    char *given = calloc((size_t)total, 1);
    float *values = malloc(sizeof *values * (size_t)total), pattern;
    uint8_t bytes[4] = { 0x3c, 0x3c, 0x3c, 0x3c };
    usli_to_f32(bytes, s->dtype, &pattern, 1);
    usli_to_f32(got, s->dtype, values, total);
    for (int r = 0; r < s->rows; r++)
        for (int64_t i = 0; i < (keys ? s->k_len[r] : s->q_len[r]); i++)
            for (int64_t c = 0; c < width; c++) {
                int64_t at = ((keys ? d->cu_k[r] : d->cu_q[r]) + i) * stride + c;
                given[at] = 1, g[n] = values[at], w[n++] = (float)want[at];
            }
    for (int64_t i = 0; i < total; i++) foreign += !given[i] && values[i] != pattern;
    double error = test_rel_error(g, w, (size_t)n), size = 0;
    for (int64_t i = 0; i < n; i++) size += fabs((double)w[i]);
    if (size == 0) error /= sqrt((double)n + 1); /* differences that cancel leave each value its own rounding error */
    CHECK(error < limit, "%s: %s is off by %.2e, allowed %.2e", s->name, what, error, limit);
    CHECK(!foreign, "%s: %s: %lld values beside it were written", s->name, what, (long long)foreign);
    free(g), free(w), free(given), free(values);
}

static void check_spec(const spec *s) {
    data d;
    make_data(s, &d);
    oracle(&d);
    result one = compute(&d, 1);
    double limit = s->dtype == USL_F32 ? 2e-6 : rig_epsilon(s->dtype);
    compare(&d, "o", one.o, d.o, d.so, s->heads * s->v_dim, false, limit);
    compare(&d, "dq", one.dq, d.dq, d.sq, s->heads * s->qk_dim, false, limit);
    compare(&d, "dk", one.dk, d.dk, d.sk, s->kv_heads * s->qk_dim, true, limit);
    compare(&d, "dv", one.dv, d.dv, d.sv, s->kv_heads * s->v_dim, true, limit);
    for (int64_t i = 0; i < d.tq * s->heads; i++) {
        bool same = d.lse[i] == -INFINITY ? one.lse[i] == -INFINITY : fabs((double)one.lse[i] - d.lse[i]) < 1e-5;
        if (!same) {
            CHECK(same, "%s: lse %lld is %g, not %g", s->name, (long long)i, (double)one.lse[i], d.lse[i]);
            break;
        }
    }
    const int threads[] = { 2, 5 };
    for (int i = 0; i < (RIG_SLOW ? 1 : 2); i++) {
        result more = compute(&d, threads[i]);
        size_t e = usli_dtype_bytes(s->dtype);
        CHECK(!memcmp(one.o, more.o, e * (size_t)(d.tq * d.so)) &&
                  !memcmp(one.dq, more.dq, e * (size_t)(d.tq * d.sq)) &&
                  !memcmp(one.dk, more.dk, e * (size_t)(d.tk * d.sk)) &&
                  !memcmp(one.dv, more.dv, e * (size_t)(d.tk * d.sv)) &&
                  !memcmp(one.lse, more.lse, sizeof(float) * (size_t)(d.tq * s->heads)),
              "%s: %d threads give other bits", s->name, threads[i]);
        free_result(&more);
    }
    free_result(&one);
    free_data(&d);
}

/* Scores beyond what exp can hold, and gradients of a row that sees one key only. */
static void check_extremes(void) {
    enum { N = 70, D = 8 };
    rig r;
    open_rig(&r, 2);
    int32_t *cu = rig_copy((int32_t[]){ 0, N }, 2 * sizeof *cu);
    float *q = calloc(N * D, sizeof *q), *o = malloc(sizeof *o * N * D), *lse = malloc(sizeof *lse * N);
    for (int i = 0; i < N * D; i++) q[i] = (float)(i / D) * (i / D % 2 ? 1.0f : -1.0f);
    usli_attention_args a = { .tokens_q = N,
                              .tokens_k = N,
                              .rows = 1,
                              .cu_q = cu,
                              .cu_k = cu,
                              .max_q = N,
                              .max_k = N,
                              .causal = true,
                              .heads = 1,
                              .kv_heads = 1,
                              .qk_dim = D,
                              .v_dim = D,
                              .scale = 10,
                              .dtype = USL_F32,
                              .q = q,
                              .k = q,
                              .v = q,
                              .q_stride = D,
                              .k_stride = D,
                              .v_stride = D,
                              .o = o,
                              .o_stride = D,
                              .lse = lse };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_attention, &a, USLI_FORWARD));
    int bad = 0; /* a query's own key is its best by far */
    for (int i = 0; i < N * D; i++) bad += !(fabsf(o[i] - q[i]) <= 1e-6f * fabsf(q[i]));
    CHECK(!bad, "%d of %d values", bad, N * D);
    free(cu), free(q), free(o), free(lse);
    rig_close(&r);
}

int main(void) {
    check_oracle();
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++)
        if ((!RIG_SLOW || SPECS[i].q_len[0] < 512) && (!RIG_PAIRED || SPECS[i].dtype == USL_BF16))
            check_spec(&SPECS[i]);
    check_extremes();
    return test_end("attention");
}
