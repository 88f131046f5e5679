/* rope, with and without the norm of heads, against its formulas in double; the gradient against central differences.
 */
#include "tests/ops/rig.h"

typedef struct spec {
    int64_t tokens;
    int heads, kv_heads, head_dim, rot_dim;
    bool interleaved, norm, no_k;
    usl_dtype dtype, norm_dtype;
    float offset;
    int gap; /* between heads */
} spec;

static int64_t step_of(const spec *s) {
    return s->head_dim + s->gap;
}

static const spec SPECS[] = {
    { 1, 1, 1, 2, 2, false, false, false, USL_F32, USL_F32, 0, 0 },
    { 40, 9, 3, 64, 64, false, false, false, USL_F32, USL_F32, 0, 0 },
    { 19, 2, 1, 20, 10, false, false, false, USL_F32, USL_F32, 0, 0 },
    { 19, 2, 1, 20, 10, true, false, false, USL_F32, USL_F32, 0, 0 },
    { 33, 4, 2, 16, 16, true, true, false, USL_F32, USL_F32, 0, 0 },
    { 33, 4, 2, 128, 128, false, true, false, USL_F32, USL_BF16, 1, 0 },
    { 33, 4, 2, 13, 6, false, true, false, USL_F32, USL_F32, 0, 0 },
    { 17, 3, 1, 16, 16, false, false, true, USL_F32, USL_F32, 0, 0 },
    { 40, 9, 3, 64, 64, false, false, false, USL_BF16, USL_F32, 0, 0 },
    { 33, 4, 2, 64, 32, true, true, false, USL_BF16, USL_BF16, 1, 0 },
    { 33, 4, 2, 64, 64, false, true, false, USL_F16, USL_F16, 0, 0 },
    { 3, 2, 2, 8, 0, false, true, false, USL_F32, USL_F32, 0, 0 },
    /* Of a head only a part, and a head that is a whole row. */
    { 21, 3, 1, 16, 16, true, false, false, USL_F32, USL_F32, 0, 8 },
    { 33, 4, 2, 24, 16, false, true, false, USL_BF16, USL_F32, 0, 5 },
    { 20, 4, 1, 64, 64, false, false, false, USL_BF16, USL_F32, 0, 128 },
    { 21, 1, 1, 200, 0, false, true, true, USL_F32, USL_F32, 0, 0 },
    /* More packs of a token than a GPU's block has threads, and a part of the head turned. */
    { 3, 72, 8, 128, 128, false, false, false, USL_BF16, USL_F32, 0, 0 },
    { 3, 40, 8, 128, 64, false, false, false, USL_F16, USL_F32, 0, 0 },
};

static const float EPS = 1e-3f;
enum { POSITIONS = 50 };

typedef struct side {
    int heads;
    int64_t stride;
    void *x, *d, *norm; /* as stored */
    float *xf, *df, *normf, *dnorm, *rstd;
} side;

typedef struct data {
    const spec *s;
    side q, k;
    int32_t *position;
    float *cos, *sin;
} data;

static side make_side(usli_rng *rng, const spec *s, int heads, int64_t pad) {
    side w = { .heads = heads, .stride = heads * step_of(s) + pad };
    w.x = rig_random(rng, s->dtype, s->tokens * w.stride, &w.xf);
    w.d = rig_random(rng, s->dtype, s->tokens * w.stride, &w.df);
    w.norm = rig_random(rng, s->norm_dtype, s->head_dim, &w.normf);
    w.dnorm = calloc((size_t)s->head_dim, sizeof(float));
    w.rstd = malloc(sizeof(float) * (size_t)(s->tokens * heads));
    return w;
}

static void free_side(side *w) {
    free(w->x), free(w->d), free(w->norm), free(w->xf), free(w->df), free(w->normf), free(w->dnorm), free(w->rstd);
}

static void make_data(const spec *s, data *d) {
    usli_rng rng;
    usli_rng_seed(&rng, 21);
    memset(d, 0, sizeof *d);
    d->s = s;
    d->q = make_side(&rng, s, s->heads, s->heads < 40 ? 5 : 8); /* 8: rows stay aligned */
    d->k = make_side(&rng, s, s->kv_heads, s->heads < 40 ? 3 : 16);
    d->position = malloc(sizeof(int32_t) * (size_t)s->tokens);
    for (int64_t t = 0; t < s->tokens; t++) d->position[t] = (int32_t)(t * 7 % POSITIONS);
    int64_t half = s->rot_dim / 2;
    d->cos = malloc(sizeof(float) * (size_t)(POSITIONS * half + 1)),
    d->sin = malloc(sizeof(float) * (size_t)(POSITIONS * half + 1));
    for (int64_t p = 0; p < POSITIONS; p++)
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)p * pow(100.0, -(double)i / (double)half);
            d->cos[p * half + i] = (float)(1.1 * cos(angle)), d->sin[p * half + i] = (float)(1.1 * sin(angle));
        }
}

static void free_data(data *d) {
    free_side(&d->q), free_side(&d->k);
    free(d->position), free(d->cos), free(d->sin);
}

/* One head: y and, from dy, dx and dw. */
static void oracle_head(const data *d, const float *w, int32_t position, const double *x, const double *dy, double *y,
                        double *dx, double *dw) {
    const spec *s = d->s;
    double u[256], g[256], square = 0, mean = 0, r = 1;
    int n = s->head_dim, half = s->rot_dim / 2;
    for (int i = 0; i < n; i++) square += x[i] * x[i];
    if (s->norm) r = 1 / sqrt(square / n + (double)EPS);
    for (int i = 0; i < n; i++) u[i] = s->norm ? x[i] * r * ((double)w[i] + (double)s->offset) : x[i];
    for (int i = 0; i < n; i++) y[i] = u[i], g[i] = dy[i];
    for (int i = 0; i < half; i++) {
        int a = s->interleaved ? 2 * i : i, b = s->interleaved ? 2 * i + 1 : i + half;
        double c = (double)d->cos[position * half + i], sn = (double)d->sin[position * half + i];
        y[a] = u[a] * c - u[b] * sn;
        y[b] = u[b] * c + u[a] * sn;
        g[a] = dy[a] * c + dy[b] * sn;
        g[b] = dy[b] * c - dy[a] * sn;
    }
    for (int i = 0; s->norm && i < n; i++) mean += g[i] * ((double)w[i] + (double)s->offset) * x[i] / n;
    for (int i = 0; i < n; i++) {
        dx[i] = s->norm ? r * (g[i] * ((double)w[i] + (double)s->offset) - x[i] * r * r * mean) : g[i];
        if (s->norm) dw[i] += g[i] * x[i] * r;
    }
}

static void check_oracle(const spec *s) {
    data d;
    make_data(s, &d);
    double x[256] = { 0 }, dy[256] = { 0 }, y[256], dx[256], dw[256] = { 0 }, other[256], rest[256];
    for (int i = 0; i < s->head_dim; i++) x[i] = (double)d.q.xf[i], dy[i] = (double)d.q.df[i];
    oracle_head(&d, d.q.normf, 13, x, dy, y, dx, dw);
    double worst = 0;
    for (int i = 0; i < s->head_dim; i++) {
        double f[2] = { 0 }, keep = x[i];
        for (int up = 0; up < 2; up++) {
            x[i] = keep + (up ? 1e-5 : -1e-5);
            oracle_head(&d, d.q.normf, 13, x, dy, y, other, rest);
            for (int c = 0; c < s->head_dim; c++) f[up] += dy[c] * y[c];
        }
        x[i] = keep;
        worst = fmax(worst, fabs((f[1] - f[0]) / 2e-5 - dx[i]));
    }
    CHECK(worst < 1e-7, "the oracle's gradient is off by %g", worst);
    free_data(&d);
}

static void compare(const spec *s, const char *what, const side *w, const void *got, const double *want,
                    const float *before) {
    int64_t n = s->tokens * w->stride, foreign = 0;
    float *g = malloc(sizeof *g * (size_t)n), *v = malloc(sizeof *v * (size_t)n);
    usli_to_f32(got, s->dtype, g, n);
    for (int64_t i = 0; i < n; i++) {
        v[i] = (float)want[i];
        int64_t in = i % w->stride;
        if (in >= w->heads * step_of(s) || in % step_of(s) >= s->head_dim)
            foreign += g[i] != before[i], g[i] = v[i] = 0;
    }
    double error = test_rel_error(g, v, (size_t)n), limit = s->dtype == USL_F32 ? 1e-6 : rig_epsilon(s->dtype);
    CHECK(error < limit && !foreign, "%s, head %d: %.2e, allowed %.2e; %lld values beside written", what, s->head_dim,
          error, limit, (long long)foreign);
    free(g), free(v);
}

typedef struct result {
    void *y[2], *dx[2];
    float *dw[2];
} result;

static result compute(const data *d, int threads) {
    const spec *s = d->s;
    const side *sides[] = { &d->q, &d->k };
    size_t e = usli_dtype_bytes(s->dtype);
    result out;
    for (int i = 0; i < 2; i++) {
        size_t bytes = (size_t)(s->tokens * sides[i]->stride) * e;
        out.y[i] = malloc(bytes), out.dx[i] = malloc(bytes), out.dw[i] = calloc((size_t)s->head_dim, sizeof(float));
        memcpy(out.y[i], sides[i]->x, bytes), memcpy(out.dx[i], sides[i]->d, bytes);
    }
    rig r;
    rig_open(&r, threads);
    bool norm = s->norm;
    usli_rope_args a = { .tokens = s->tokens,
                         .heads = s->heads,
                         .kv_heads = s->kv_heads,
                         .head_dim = s->head_dim,
                         .rot_dim = s->rot_dim,
                         .interleaved = s->interleaved,
                         .dtype = s->dtype,
                         .position = d->position,
                         .cos = d->cos,
                         .sin = d->sin,
                         .positions = POSITIONS,
                         .q = out.y[0],
                         .k = s->no_k ? NULL : out.y[1],
                         .q_stride = d->q.stride,
                         .k_stride = d->k.stride,
                         .head_stride = s->gap ? step_of(s) : 0,
                         .q_norm = norm ? d->q.norm : NULL,
                         .k_norm = norm ? d->k.norm : NULL,
                         .norm_dtype = s->norm_dtype,
                         .norm_eps = EPS,
                         .norm_offset = s->offset,
                         .q_in = d->q.x,
                         .k_in = d->k.x,
                         .q_rstd = norm ? d->q.rstd : NULL,
                         .k_rstd = norm ? d->k.rstd : NULL,
                         .dq = out.dx[0],
                         .dk = s->no_k ? NULL : out.dx[1],
                         .dq_norm = norm ? out.dw[0] : NULL,
                         .dk_norm = norm ? out.dw[1] : NULL };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_rope, &a, USLI_FORWARD));
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_rope, &a, USLI_BACKWARD));
    rig_close(&r);
    return out;
}

static void free_result(result *r) {
    for (int i = 0; i < 2; i++) free(r->y[i]), free(r->dx[i]), free(r->dw[i]);
}

static void check_spec(const spec *s) {
    data d;
    make_data(s, &d);
    const side *sides[] = { &d.q, &d.k };
    result one = compute(&d, 1);
    for (int i = 0; i < (s->no_k ? 1 : 2); i++) {
        const side *w = sides[i];
        size_t n = (size_t)(s->tokens * w->stride);
        double *y = calloc(n, sizeof *y), *dx = calloc(n, sizeof *dx), dw[256] = { 0 };
        for (int64_t t = 0; t < s->tokens; t++)
            for (int h = 0; h < w->heads; h++) {
                double x[256] = { 0 }, dy[256] = { 0 };
                int64_t at = t * w->stride + h * step_of(s);
                for (int c = 0; c < s->head_dim; c++) x[c] = (double)w->xf[at + c], dy[c] = (double)w->df[at + c];
                oracle_head(&d, w->normf, d.position[t], x, dy, y + at, dx + at, dw);
            }
        compare(s, "y", w, one.y[i], y, w->xf);
        compare(s, "dx", w, one.dx[i], dx, w->df);
        float want[256];
        for (int c = 0; c < s->head_dim; c++) want[c] = (float)dw[c];
        double error = test_rel_error(one.dw[i], want, (size_t)s->head_dim);
        CHECK(error < 1e-5, "dnorm: %.2e", error);
        free(y), free(dx);
    }
    for (int threads = 2; threads <= 5; threads += 3) {
        result more = compute(&d, threads);
        for (int i = 0; i < 2; i++) {
            size_t bytes = (size_t)(s->tokens * sides[i]->stride) * usli_dtype_bytes(s->dtype);
            CHECK(!memcmp(one.y[i], more.y[i], bytes) && !memcmp(one.dx[i], more.dx[i], bytes) &&
                      !memcmp(one.dw[i], more.dw[i], sizeof(float) * (size_t)s->head_dim),
                  "%d threads give other bits", threads);
        }
        free_result(&more);
    }
    free_result(&one);
    free_data(&d);
}

/* A device does not look: who makes positions checks them. */
static void check_positions(void) {
    data d;
    rig r;
    rig_open(&r, 1);
    if (!r.x.backend->host) {
        rig_close(&r);
        return;
    }
    make_data(&SPECS[1], &d);
    d.position[3] = POSITIONS;
    usli_rope_args a = { .tokens = 5,
                         .heads = 9,
                         .kv_heads = 3,
                         .head_dim = 64,
                         .rot_dim = 64,
                         .dtype = USL_F32,
                         .position = d.position,
                         .cos = d.cos,
                         .sin = d.sin,
                         .positions = POSITIONS,
                         .q = d.q.x,
                         .k = d.k.x,
                         .q_stride = d.q.stride,
                         .k_stride = d.k.stride };
    CHECK(rig_run(&r, USLI_OP_rope, &a, USLI_FORWARD) == USL_ERR_INVALID, "a position beyond the table");
    rig_close(&r);
    free_data(&d);
}

int main(void) {
    check_oracle(&SPECS[3]), check_oracle(&SPECS[5]);
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) check_spec(&SPECS[i]);
    check_positions();
    return test_end("rope");
}
