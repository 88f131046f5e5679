/* linear against formulas in double: every storage type, fused segments, adapters, dropout, write modes, strides. The
 * formulas of the backward pass are themselves checked against central differences of the forward one. */
#include "core/base/half.h"
#include "core/ops/dropout.h"
#include "core/quant/traits.h"
#include "tests/ops/rig.h"

typedef struct spec {
    const char *name;
    int64_t tokens, in;
    int segments;
    int64_t rows[USLI_MAX_SEGMENTS];
    usl_dtype weight[USLI_MAX_SEGMENTS];
    int rank[USLI_MAX_SEGMENTS];
    usl_dtype dtype, y_dtype;
    float p;
    bool bias, keep_xa;
    int pads; /* 1: rows of x and y are longer than they say; 2: by whole pieces of 16 bytes */
    bool accumulate, full;
    bool dora; /* segments with an adapter have a magnitude */
} spec;

typedef struct segment_data {
    void *storage;
    float *scratch, *w; /* w: the exact values of what is stored */
    usli_nf4 nf4;
    float row_scale[128]; /* I8: at most so many rows */
    void *bias;
    float *bias_values;
    float *a, *b, *magnitude, *norm; /* these two NULL: none */
} segment_data;

typedef struct data {
    const spec *s;
    int64_t out, ldx, ldy;
    int ranks;
    segment_data seg[USLI_MAX_SEGMENTS];
    void *x, *dy, *y0, *dx0;
    float *xv, *dyv, *y0v, *dx0v, *keep; /* keep: (tokens, in) factor of dropout */
    int32_t update, row[512], position[512];
    usli_dropout dropout;
} data;

static void store_weight(usli_rng *rng, usl_dtype dtype, int64_t rows, int64_t cols, segment_data *d) {
    int64_t n = rows * cols;
    float *v;
    free(rig_random(rng, USL_F32, n, &v));
    d->w = malloc(sizeof(float) * (size_t)n);
    if (dtype == USL_NF4 || dtype == USL_FP4) {
        static float *fp4;
        if (!fp4) fp4 = rig_copy(usli_fp4_table, 16 * sizeof *fp4);
        d->storage = aligned_alloc(64, (usli_nf4_bytes(n) + 63) / 64 * 64);
        d->scratch = malloc(sizeof(float) * (size_t)usli_nf4_blocks(n));
        usli_nf4_layout(d->storage, n, &d->nf4);
        if (dtype == USL_FP4) d->nf4.table = usli_fp4_table;
        usli_nf4_quantize(&d->nf4, v, n, d->scratch);
        usli_nf4_decode(&d->nf4, 0, n, d->w);
        rig_nf4_tables(&d->nf4);
        if (dtype == USL_FP4) d->nf4.table = fp4;
    } else if (dtype == USL_I8) {
        int8_t *q = d->storage = malloc((size_t)n);
        for (int64_t i = 0; i < n; i++) {
            d->row_scale[i / cols] = 3.0f / (float)(127 + i / cols);
            q[i] = (int8_t)fmaxf(-127, fminf(127, roundf(v[i] / d->row_scale[i / cols])));
            d->w[i] = (float)q[i] * d->row_scale[i / cols];
        }
    } else {
        const usli_traits *t = usli_traits_of(dtype);
        size_t bytes = (size_t)(n / t->block) * (size_t)t->block_bytes;
        d->storage = malloc(bytes);
        usli_from_f32(v, d->storage, dtype, n);
        /* Any bytes are a block; without these bits no half in it is large or no number. */
        for (size_t i = 0; t->block > 1 && i < bytes; i++) ((uint8_t *)d->storage)[i] = usli_rng_u32(rng) & 0x37;
        t->decode(d->storage, d->w, n);
    }
    free(v);
}

static void make_data(const spec *s, data *d) {
    usli_rng rng;
    usli_rng_seed(&rng, 11);
    memset(d, 0, sizeof *d);
    d->s = s;
    for (int i = 0; i < s->segments; i++) {
        segment_data *g = &d->seg[i];
        store_weight(&rng, s->weight[i], s->rows[i], s->in, g);
        if (s->bias) g->bias = rig_random(&rng, USL_BF16, s->rows[i], &g->bias_values);
        free(rig_random(&rng, USL_F32, s->rank[i] * s->in, &g->a));
        free(rig_random(&rng, USL_F32, s->rank[i] * s->rows[i], &g->b));
        if (s->dora && s->rank[i]) {
            free(rig_random(&rng, USL_F32, s->rows[i], &g->magnitude));
            free(rig_random(&rng, USL_F32, s->rows[i], &g->norm));
            for (int64_t o = 0; o < s->rows[i]; o++) g->norm[o] = 0.5f + g->norm[o] * g->norm[o];
        }
        d->out += s->rows[i];
        d->ranks += s->rank[i];
    }
    d->ldx = s->in + (s->pads == 2 ? 8 : s->pads ? 7 : 0);
    d->ldy = d->out + (s->pads == 2 ? 16 : s->pads ? 9 : 0);
    d->x = rig_random(&rng, s->dtype, s->tokens * d->ldx, &d->xv);
    d->dx0 = rig_random(&rng, s->dtype, s->tokens * d->ldx, &d->dx0v);
    d->dy = rig_random(&rng, s->y_dtype, s->tokens * d->ldy, &d->dyv);
    d->y0 = rig_random(&rng, s->y_dtype, s->tokens * d->ldy, &d->y0v);
    d->update = 3;
    for (int t = 0; t < s->tokens; t++) d->row[t] = 40 + t / 5, d->position[t] = t % 5;
    d->dropout = (usli_dropout){ s->p, 3407, &d->update, d->row, d->position, 2, 1 };
    d->keep = malloc(sizeof(float) * (size_t)(s->tokens * s->in));
    for (int64_t t = 0; t < s->tokens; t++)
        for (int64_t i = 0; i < s->in; i++) {
            uint32_t words[4];
            usli_dropout_words(&d->dropout, usli_dropout_key(&d->dropout), t, i / 4, words);
            d->keep[t * s->in + i] =
                s->p > 0 ? ((double)words[i % 4] / 4294967296.0 < (double)s->p ? 0 : 1 / (1 - s->p)) : 1;
        }
}

static void free_data(data *d) {
    for (int i = 0; i < d->s->segments; i++) {
        segment_data *g = &d->seg[i];
        free(g->storage), free(g->scratch), free(g->w), free(g->bias), free(g->bias_values), free(g->a), free(g->b),
            free(g->magnitude), free(g->norm);
    }
    free(d->x), free(d->dy), free(d->y0), free(d->dx0), free(d->xv), free(d->dyv), free(d->y0v), free(d->dx0v),
        free(d->keep);
}

static float scale_of(int segment) {
    return 0.5f + 0.3f * (float)segment;
}

/* ---- The formulas
 * --------------------------------------------------------------------------------------------------------- */

/* What DoRA multiplies a column of y by. */
static double factor(const data *d, int seg, int64_t row) {
    const segment_data *g = &d->seg[seg];
    return g->magnitude ? (double)g->magnitude[row] / (double)g->norm[row] : 1;
}

static double dropped(const data *d, int64_t t, int64_t i) {
    return (double)d->xv[t * d->ldx + i] * (double)d->keep[t * d->s->in + i];
}

static double dot_a(const data *d, int seg, int64_t t, int r) {
    double sum = 0;
    for (int64_t i = 0; i < d->s->in; i++) sum += dropped(d, t, i) * (double)d->seg[seg].a[r * d->s->in + i];
    return sum;
}

/* y without what was there. (tokens, out) */
static void oracle_forward(const data *d, double *y) {
    const spec *s = d->s;
    double xa[64];
    for (int64_t t = 0; t < s->tokens; t++) {
        double *row = y + t * d->out;
        for (int g = 0; g < s->segments; row += s->rows[g], g++) {
            for (int r = 0; r < s->rank[g]; r++) xa[r] = dot_a(d, g, t, r);
            for (int64_t o = 0; o < s->rows[g]; o++) {
                double sum = 0, low = 0;
                for (int64_t i = 0; i < s->in; i++)
                    sum += (double)d->xv[t * d->ldx + i] * (double)d->seg[g].w[o * s->in + i];
                for (int r = 0; r < s->rank[g]; r++) low += xa[r] * (double)d->seg[g].b[o * s->rank[g] + r];
                row[o] = (s->bias ? (double)d->seg[g].bias_values[o] : 0) +
                         factor(d, g, o) * (sum + (double)scale_of(g) * low);
            }
        }
    }
}

typedef struct grads {
    float *dx; /* (tokens, in) */
    float *da[USLI_MAX_SEGMENTS], *db[USLI_MAX_SEGMENTS], *dw[USLI_MAX_SEGMENTS], *dbias[USLI_MAX_SEGMENTS],
        *dmagnitude[USLI_MAX_SEGMENTS];
} grads;

static float *filled(int64_t n, float value) {
    float *v = malloc(sizeof(float) * (size_t)(n + 1));
    for (int64_t i = 0; i < n; i++) v[i] = value;
    return v;
}

static void new_grads(const data *d, grads *g, float value) {
    const spec *s = d->s;
    g->dx = filled(s->tokens * s->in, 0);
    for (int i = 0; i < s->segments; i++) {
        g->da[i] = filled(s->rank[i] * s->in, value);
        g->db[i] = filled(s->rank[i] * s->rows[i], value);
        g->dw[i] = filled(s->rows[i] * s->in, value);
        g->dbias[i] = filled(s->rows[i], value);
        g->dmagnitude[i] = filled(s->rows[i], value);
    }
}

static void free_grads(const data *d, grads *g) {
    free(g->dx);
    for (int i = 0; i < d->s->segments; i++)
        free(g->da[i]), free(g->db[i]), free(g->dw[i]), free(g->dbias[i]), free(g->dmagnitude[i]);
}

/* Adds into zeroed float arrays by way of doubles a row at a time; the sums are over few tokens. */
static void oracle_backward(const data *d, grads *g) {
    const spec *s = d->s;
    double *dx = calloc((size_t)(s->tokens * s->in), sizeof *dx);
    int64_t offset = 0;
    for (int seg = 0; seg < s->segments; offset += s->rows[seg], seg++) {
        const segment_data *w = &d->seg[seg];
        int rank = s->rank[seg];
        int64_t rows = s->rows[seg];
        double *dw = calloc((size_t)(rows * s->in), sizeof *dw), *dbias = calloc((size_t)rows, sizeof *dbias),
               *dmagnitude = calloc((size_t)rows, sizeof *dmagnitude), *dy = calloc((size_t)rows, sizeof *dy);
        double *da = calloc((size_t)(rank * s->in + 1), sizeof *da),
               *db = calloc((size_t)(rows * rank + 1), sizeof *db);
        for (int64_t t = 0; t < s->tokens; t++) {
            const float *given = d->dyv + t * d->ldy + offset;
            for (int64_t o = 0; o < rows; o++) {
                dy[o] = (double)given[o] * factor(d, seg, o);
                dbias[o] += (double)given[o];
                if (w->magnitude) {
                    double z = 0;
                    for (int64_t i = 0; i < s->in; i++)
                        z += (double)d->xv[t * d->ldx + i] * (double)w->w[o * s->in + i];
                    dmagnitude[o] += (double)given[o] * z / (double)w->norm[o];
                }
                for (int64_t i = 0; i < s->in; i++) dx[t * s->in + i] += dy[o] * (double)w->w[o * s->in + i];
                for (int64_t i = 0; s->full && i < s->in; i++)
                    dw[o * s->in + i] += dy[o] * (double)d->xv[t * d->ldx + i];
            }
            for (int r = 0; r < rank; r++) {
                double dyb = 0, xa = dot_a(d, seg, t, r), scale = (double)scale_of(seg);
                for (int64_t o = 0; o < rows; o++) {
                    dyb += dy[o] * (double)w->b[o * rank + r];
                    db[o * rank + r] += scale * dy[o] * xa;
                    if (w->magnitude)
                        dmagnitude[o] +=
                            (double)given[o] * scale * xa * (double)w->b[o * rank + r] / (double)w->norm[o];
                }
                for (int64_t i = 0; i < s->in; i++) {
                    dx[t * s->in + i] += scale * dyb * (double)w->a[r * s->in + i] * (double)d->keep[t * s->in + i];
                    da[r * s->in + i] += scale * dyb * dropped(d, t, i);
                }
            }
        }
        for (int64_t i = 0; i < rows * s->in; i++) g->dw[seg][i] += (float)dw[i];
        for (int64_t i = 0; i < rank * s->in; i++) g->da[seg][i] += (float)da[i];
        for (int64_t i = 0; i < rows * rank; i++) g->db[seg][i] += (float)db[i];
        for (int64_t i = 0; i < rows; i++) g->dbias[seg][i] += (float)dbias[i];
        for (int64_t i = 0; i < rows; i++) g->dmagnitude[seg][i] += (float)dmagnitude[i];
        free(dw), free(dbias), free(dmagnitude), free(dy), free(da), free(db);
    }
    for (int64_t i = 0; i < s->tokens * s->in; i++) g->dx[i] = (float)dx[i];
    free(dx);
}

/* ---- Cases
 * ------------------------------------------------------------------------------------------------------------------ */

typedef struct outputs {
    void *y, *dx;
    uint16_t xa[1 << 15]; /* bytes enough */
    grads g;
} outputs;

static bool is_4bit(usl_dtype dtype) {
    return dtype == USL_NF4 || dtype == USL_FP4;
}

static void fill_segments(const data *d, const grads *g, usli_segment *segs) {
    const spec *s = d->s;
    for (int i = 0; i < s->segments; i++) {
        const segment_data *w = &d->seg[i];
        segs[i] = (usli_segment){ .w = { .dtype = s->weight[i],
                                         .rows = s->rows[i],
                                         .cols = s->in,
                                         .data = is_4bit(s->weight[i]) ? NULL : w->storage,
                                         .nf4 = is_4bit(s->weight[i]) ? &w->nf4 : NULL,
                                         .scale = s->weight[i] == USL_I8 ? w->row_scale : NULL },
                                  .bias = w->bias,
                                  .bias_dtype = USL_BF16,
                                  .lora = { .rank = s->rank[i],
                                            .scale = scale_of(i),
                                            .a = w->a,
                                            .b = w->b,
                                            .da = g->da[i],
                                            .db = g->db[i],
                                            .magnitude = w->magnitude,
                                            .norm = w->norm,
                                            .dmagnitude = w->magnitude ? g->dmagnitude[i] : NULL },
                                  .dw = s->full ? g->dw[i] : NULL,
                                  .dbias = s->bias ? g->dbias[i] : NULL };
    }
}

static void run_case(rig *r, const data *d, outputs *o) {
    const spec *s = d->s;
    size_t y_bytes = (size_t)(s->tokens * d->ldy) * usli_dtype_bytes(s->y_dtype);
    size_t x_bytes = (size_t)(s->tokens * d->ldx) * usli_dtype_bytes(s->dtype);
    memset(o, 0, sizeof *o);
    o->y = malloc(y_bytes + 1), o->dx = malloc(x_bytes + 1);
    memcpy(o->y, d->y0, y_bytes), memcpy(o->dx, d->dx0, x_bytes);
    new_grads(d, &o->g, 0.5f);
    usli_segment segs[USLI_MAX_SEGMENTS];
    fill_segments(d, &o->g, segs);
    usli_linear_args a = { .tokens = s->tokens,
                           .in = s->in,
                           .out = d->out,
                           .segments = s->segments,
                           .segment = segs,
                           .dtype = s->dtype,
                           .y_dtype = s->y_dtype,
                           .x = d->x,
                           .y = o->y,
                           .ldx = s->pads ? d->ldx : 0,
                           .ldy = s->pads ? d->ldy : 0,
                           .y_mode = s->accumulate ? USLI_ACCUMULATE : USLI_ASSIGN,
                           .xa = s->keep_xa && d->ranks ? o->xa : NULL,
                           .dropout = d->dropout,
                           .dy = d->dy,
                           .dx = o->dx,
                           .dx_mode = s->accumulate ? USLI_ACCUMULATE : USLI_ASSIGN };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_linear, &a, USLI_FORWARD));
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_linear, &a, USLI_BACKWARD));
}

static void free_outputs(const data *d, outputs *o) {
    free(o->y), free(o->dx);
    free_grads(d, &o->g);
}

static double worst;

static void compare(const spec *s, const char *what, int segment, const float *got, const float *want, int64_t n,
                    double bound) {
    double error = test_rel_error(got, want, (size_t)n);
    if (error / bound > worst) worst = error / bound;
    CHECK(error <= bound, "%s: %s %d: %g > %g", s->name, what, segment, error, bound);
}

/* Four roundings at most stand between an input and a result: weight or B, xa or dy B, dy, and the store; each
 * is at most epsilon and uniformly spread. */
static double bound_of(const spec *s) {
    usl_dtype lowest = s->dtype != USL_F32 ? s->dtype : s->y_dtype;
    return lowest == USL_F32 ? 1e-6 : 4 * rig_epsilon(lowest) / sqrt(3);
}

static void check_outputs(const data *d, const outputs *o) {
    const spec *s = d->s;
    double bound = bound_of(s), *y = malloc(sizeof(double) * (size_t)(s->tokens * d->out));
    float *want = malloc(sizeof(float) * (size_t)(s->tokens * d->ldy)),
          *got = malloc(sizeof(float) * (size_t)(s->tokens * d->ldy));
    oracle_forward(d, y);
    for (int64_t t = 0; t < s->tokens; t++)
        for (int64_t i = 0; i < d->ldy; i++) {
            float before = d->y0v[t * d->ldy + i];
            want[t * d->ldy + i] =
                i >= d->out ? before : (float)(y[t * d->out + i] + (s->accumulate ? (double)before : 0));
        }
    usli_to_f32(o->y, s->y_dtype, got, s->tokens * d->ldy);
    compare(s, "y", 0, got, want, s->tokens * d->ldy, bound);
    grads g;
    new_grads(d, &g, 0.5f);
    oracle_backward(d, &g);
    float *dx = malloc(sizeof(float) * (size_t)(s->tokens * d->ldx)),
          *dx_want = malloc(sizeof(float) * (size_t)(s->tokens * d->ldx));
    for (int64_t t = 0; t < s->tokens; t++)
        for (int64_t i = 0; i < d->ldx; i++) {
            float before = d->dx0v[t * d->ldx + i];
            dx_want[t * d->ldx + i] = i >= s->in ? before : g.dx[t * s->in + i] + (s->accumulate ? before : 0);
        }
    usli_to_f32(o->dx, s->dtype, dx, s->tokens * d->ldx);
    compare(s, "dx", 0, dx, dx_want, s->tokens * d->ldx, bound);
    for (int i = 0; i < s->segments; i++) {
        compare(s, "dA", i, o->g.da[i], g.da[i], s->rank[i] * s->in, bound);
        compare(s, "dB", i, o->g.db[i], g.db[i], s->rank[i] * s->rows[i], bound);
        if (s->full) compare(s, "dW", i, o->g.dw[i], g.dw[i], s->rows[i] * s->in, bound);
        if (s->bias) compare(s, "dbias", i, o->g.dbias[i], g.dbias[i], s->rows[i], bound);
        if (d->seg[i].magnitude) compare(s, "dmagnitude", i, o->g.dmagnitude[i], g.dmagnitude[i], s->rows[i], bound);
    }
    free_grads(d, &g);
    free(y), free(want), free(got), free(dx), free(dx_want);
}

static void check_same(const data *d, const outputs *a, const outputs *b) {
    const spec *s = d->s;
    CHECK(memcmp(a->y, b->y, (size_t)(s->tokens * d->ldy) * usli_dtype_bytes(s->y_dtype)) == 0, "%s: y differs",
          s->name);
    CHECK(memcmp(a->dx, b->dx, (size_t)(s->tokens * d->ldx) * usli_dtype_bytes(s->dtype)) == 0, "%s: dx differs",
          s->name);
    CHECK(memcmp(a->xa, b->xa, sizeof a->xa) == 0, "%s: xa differs", s->name);
    for (int i = 0; i < s->segments; i++) {
        CHECK(memcmp(a->g.da[i], b->g.da[i], sizeof(float) * (size_t)(s->rank[i] * s->in)) == 0, "%s: dA differs",
              s->name);
        CHECK(memcmp(a->g.db[i], b->g.db[i], sizeof(float) * (size_t)(s->rank[i] * s->rows[i])) == 0, "%s: dB differs",
              s->name);
        CHECK(memcmp(a->g.dw[i], b->g.dw[i], sizeof(float) * (size_t)(s->rows[i] * s->in)) == 0, "%s: dW differs",
              s->name);
        CHECK(memcmp(a->g.dbias[i], b->g.dbias[i], sizeof(float) * (size_t)s->rows[i]) == 0, "%s: dbias differs",
              s->name);
        CHECK(memcmp(a->g.dmagnitude[i], b->g.dmagnitude[i], sizeof(float) * (size_t)s->rows[i]) == 0,
              "%s: dmagnitude differs", s->name);
    }
}

static void check_spec(rig *rigs, const spec *s) {
    data *d = malloc(sizeof *d);
    outputs *first = malloc(sizeof *first), *other = malloc(sizeof *other);
    make_data(s, d);
    run_case(&rigs[0], d, first);
    check_outputs(d, first);
    for (int i = 1; i < (RIG_SLOW ? 2 : 3); i++) {
        run_case(&rigs[i], d, other);
        check_same(d, first, other);
        free_outputs(d, other);
    }
    free_outputs(d, first);
    free_data(d);
    free(d), free(first), free(other);
}

/* The sum of y * dy is linear in each input alone, so central differences with a large step are exact. */
static double objective(const data *d) {
    static double y[4096];
    double sum = 0;
    oracle_forward(d, y);
    for (int64_t t = 0; t < d->s->tokens; t++)
        for (int64_t i = 0; i < d->out; i++) sum += y[t * d->out + i] * (double)d->dyv[t * d->ldy + i];
    return sum;
}

static void check_difference(const data *d, const char *what, float *input, float gradient) {
    float saved = *input;
    *input = saved + 1;
    double high = objective(d), step_high = (double)*input;
    *input = saved - 1;
    double low = objective(d), step_low = (double)*input;
    *input = saved;
    double want = (high - low) / (step_high - step_low);
    CHECK(fabs(want - (double)gradient) <= 1e-5 * (1 + fabs(want)), "%s: formula %g, difference %g", what,
          (double)gradient, want);
}

static void test_formulas(bool dora) {
    spec s = { "formulas", 5,    9,     2,    { 4, 3 }, { USL_F32, USL_F32 }, { 2, 3 }, USL_F32, USL_F32, 0.25f, true,
               false,      true, false, true, dora };
    static data d;
    make_data(&s, &d);
    grads g;
    new_grads(&d, &g, 0);
    oracle_backward(&d, &g);
    for (int64_t t = 0; t < s.tokens; t++)
        for (int64_t i = 0; i < s.in; i++) check_difference(&d, "dx", &d.xv[t * d.ldx + i], g.dx[t * s.in + i]);
    for (int seg = 0; seg < 2; seg++) {
        for (int64_t i = 0; i < s.rank[seg] * s.in; i++) check_difference(&d, "dA", &d.seg[seg].a[i], g.da[seg][i]);
        for (int64_t i = 0; i < s.rank[seg] * s.rows[seg]; i++)
            check_difference(&d, "dB", &d.seg[seg].b[i], g.db[seg][i]);
        for (int64_t i = 0; i < s.rows[seg] * s.in; i++) check_difference(&d, "dW", &d.seg[seg].w[i], g.dw[seg][i]);
        for (int64_t i = 0; i < s.rows[seg]; i++)
            check_difference(&d, "dbias", &d.seg[seg].bias_values[i], g.dbias[seg][i]);
        for (int64_t i = 0; dora && i < s.rows[seg]; i++)
            check_difference(&d, "dmagnitude", &d.seg[seg].magnitude[i], g.dmagnitude[seg][i]);
    }
    free_grads(&d, &g);
    free_data(&d);
}

static void test_dropout_share(void) {
    int32_t update = 1, row = 5, position = 9;
    usli_dropout d = { 0.3f, 3407, &update, &row, &position, 1, 2 };
    int drops = 0, same = 0, n = 40000;
    for (int g = 0; g < n / 4; g++) {
        uint32_t words[4], moved[4];
        position = 9;
        usli_dropout_words(&d, usli_dropout_key(&d), 0, g, words);
        position = 10;
        usli_dropout_words(&d, usli_dropout_key(&d), 0, g, moved);
        for (int i = 0; i < 4; i++) drops += words[i] < usli_dropout_threshold(d.p), same += words[i] == moved[i];
    }
    double share = (double)drops / n;
    CHECK(fabs(share - 0.3) < 5 * sqrt(0.3 * 0.7 / n), "%g of the values dropped", share);
    CHECK(same < 3, "%d of %d draws are those of the position before", same, n);
}

static void test_refusals(rig *r) {
    float x[4] = { 1, 1, 1, 1 }, y[4], one = 1;
    uint8_t w[16] = { 0 };
    usli_segment s = { .w = { .dtype = USL_F8_E4M3, .rows = 2, .cols = 2, .data = w } };
    usli_linear_args a = { .tokens = 2, .in = 2, .out = 2, .segments = 1, .segment = &s, .x = x, .y = y };
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_UNSUPPORTED, "fp8: %s", usl_ctx_errmsg(r->ctx));
    s.w.dtype = USL_Q8_0;
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_SHAPE, "half a block: %s", usl_ctx_errmsg(r->ctx));
    s.w.dtype = USL_F32, a.segment = &s;
    s.lora = (usli_lora){ .rank = 1, .scale = 1, .a = x, .b = x, .magnitude = &one };
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_INTERNAL, "no norms: %s", usl_ctx_errmsg(r->ctx));
}

static const spec SPECS[] = {
    { "one token", 1, 1, 1, { 1 }, { USL_F32 }, { 1 }, USL_F32, USL_F32, 0, true, true, false, false, true, false },
    { "few tokens",
      8,
      65,
      2,
      { 17, 3 },
      { USL_F32, USL_BF16 },
      { 3, 0 },
      USL_F32,
      USL_F32,
      0,
      true,
      true,
      true,
      true,
      true,
      false },
    { "few tokens, bf16",
      3,
      65,
      2,
      { 17, 30 },
      { USL_NF4, USL_BF16 },
      { 3, 5 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      true,
      true,
      true,
      false },
    { "one token, bf16",
      1,
      65,
      2,
      { 17, 30 },
      { USL_BF16, USL_NF4 },
      { 3, 5 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      true,
      true,
      true,
      false },
    { "few tokens, f16",
      5,
      64,
      2,
      { 17, 30 },
      { USL_Q8_0, USL_F16 },
      { 3, 5 },
      USL_F16,
      USL_F16,
      0,
      true,
      false,
      true,
      true,
      true,
      false },
    { "few tokens, dropout",
      4,
      33,
      1,
      { 17 },
      { USL_F32 },
      { 3 },
      USL_F32,
      USL_F32,
      0.25f,
      false,
      false,
      false,
      false,
      false,
      false },
    { "one token, aligned",
      1,
      576,
      3,
      { 17, 30, 1 },
      { USL_NF4, USL_NF4, USL_BF16 },
      { 3, 5, 0 },
      USL_BF16,
      USL_F32,
      0,
      true,
      true,
      false,
      true,
      true,
      false },
    { "eight tokens, aligned",
      8,
      256,
      4,
      { 9, 8, 3, 5 },
      { USL_NF4, USL_Q4_K, USL_F16, USL_I8 },
      { 3, 0, 5, 1 },
      USL_F16,
      USL_F16,
      0,
      false,
      false,
      2,
      false,
      true,
      false },
    { "plain f32",
      17,
      65,
      1,
      { 33 },
      { USL_F32 },
      { 0 },
      USL_F32,
      USL_F32,
      0,
      false,
      false,
      false,
      false,
      true,
      false },
    { "q|k|v f32",
      65,
      100,
      3,
      { 100, 37, 37 },
      { USL_F32, USL_F32, USL_F32 },
      { 16, 16, 16 },
      USL_F32,
      USL_F32,
      0,
      true,
      true,
      true,
      true,
      true,
      false },
    { "q|k|v nf4, f32",
      65,
      100,
      3,
      { 100, 37, 37 },
      { USL_NF4, USL_NF4, USL_NF4 },
      { 16, 8, 0 },
      USL_F32,
      USL_F32,
      0.1f,
      false,
      true,
      true,
      false,
      false,
      false },
    { "q|k|v nf4, bf16",
      65,
      100,
      3,
      { 100, 37, 37 },
      { USL_NF4, USL_NF4, USL_NF4 },
      { 16, 8, 0 },
      USL_BF16,
      USL_BF16,
      0.1f,
      true,
      false,
      true,
      true,
      false,
      false },
    { "gguf blocks, f32",
      33,
      256,
      4,
      { 19, 5, 3, 7 },
      { USL_Q4_K, USL_Q6_K, USL_Q8_0, USL_Q5_0 },
      { 4, 0, 2, 1 },
      USL_F32,
      USL_F32,
      0,
      true,
      true,
      false,
      false,
      true,
      false },
    { "gguf blocks, bf16",
      33,
      256,
      4,
      { 19, 5, 3, 7 },
      { USL_Q2_K, USL_Q3_K, USL_Q4_0, USL_Q5_K },
      { 4, 0, 2, 1 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      false,
      false,
      true,
      false },
    { "bf16 in place",
      300,
      65,
      2,
      { 40, 40 },
      { USL_BF16, USL_BF16 },
      { 8, 8 },
      USL_BF16,
      USL_BF16,
      0,
      false,
      true,
      false,
      true,
      true,
      false },
    { "bf16 over f32 and f16",
      20,
      65,
      2,
      { 40, 40 },
      { USL_F32, USL_F16 },
      { 8, 8 },
      USL_BF16,
      USL_BF16,
      0,
      false,
      false,
      false,
      false,
      true,
      false },
    { "logits", 20, 65, 1, { 128 }, { USL_BF16 }, { 0 }, USL_BF16, USL_F32, 0, false, false, true, false, true, false },
    { "logits with adapter",
      20,
      65,
      1,
      { 128 },
      { USL_NF4 },
      { 4 },
      USL_BF16,
      USL_F32,
      0.3f,
      true,
      false,
      true,
      true,
      true,
      false },
    { "f16",
      20,
      65,
      2,
      { 40, 17 },
      { USL_F16, USL_F32 },
      { 8, 3 },
      USL_F16,
      USL_F16,
      0.2f,
      true,
      true,
      true,
      true,
      true,
      false },
    { "i8",
      20,
      65,
      2,
      { 40, 17 },
      { USL_I8, USL_I8 },
      { 8, 3 },
      USL_F32,
      USL_F32,
      0,
      true,
      true,
      false,
      false,
      true,
      false },
    /* More decoded values than one panel holds: rows of a segment are split forward, columns backward. */
    { "panels",
      9,
      4352,
      3,
      { 3900, 40, 128 },
      { USL_Q8_0, USL_F32, USL_Q8_0 },
      { 2, 0, 3 },
      USL_F32,
      USL_F32,
      0.1f,
      false,
      true,
      false,
      true,
      false,
      false },
    /* Decode steps as the GPU has kernels for: up to 8 tokens of every type, tiles of 16 rows that are not full. */
    { "decode, nf4 q|k|v",
      1,
      320,
      3,
      { 40, 17, 16 },
      { USL_NF4, USL_NF4, USL_NF4 },
      { 16, 8, 0 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      0,
      false,
      false,
      false },
    { "decode, nf4, 8 tokens",
      8,
      1152,
      2,
      { 33, 50 },
      { USL_NF4, USL_NF4 },
      { 5, 16 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      2,
      true,
      false,
      false },
    { "decode, nf4, f16",
      5,
      256,
      1,
      { 20 },
      { USL_NF4 },
      { 4 },
      USL_F16,
      USL_F16,
      0,
      false,
      false,
      2,
      false,
      false,
      false },
    { "decode, logits",
      3,
      192,
      1,
      { 100 },
      { USL_BF16 },
      { 0 },
      USL_BF16,
      USL_F32,
      0,
      false,
      false,
      0,
      false,
      false,
      false },
    { "decode, nf4 logits",
      2,
      128,
      1,
      { 100 },
      { USL_NF4 },
      { 8 },
      USL_BF16,
      USL_F32,
      0,
      true,
      false,
      0,
      true,
      false,
      false },
    { "decode, plain",
      4,
      128,
      4,
      { 20, 16, 9, 3 },
      { USL_F16, USL_BF16, USL_F32, USL_F16 },
      { 2, 3, 1, 0 },
      USL_F16,
      USL_F16,
      0,
      true,
      true,
      0,
      false,
      false,
      false },
    { "decode, K blocks",
      8,
      768,
      4,
      { 18, 16, 5, 7 },
      { USL_Q4_K, USL_Q5_K, USL_Q6_K, USL_Q3_K },
      { 4, 0, 2, 1 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      2,
      false,
      false,
      false },
    { "decode, more K blocks",
      1,
      256,
      4,
      { 18, 3, 5, 7 },
      { USL_Q2_K, USL_IQ4_XS, USL_Q6_K, USL_Q4_K },
      { 4, 0, 2, 1 },
      USL_F16,
      USL_F16,
      0,
      false,
      true,
      0,
      false,
      false,
      false },
    { "decode, blocks",
      7,
      192,
      4,
      { 18, 16, 5, 7 },
      { USL_Q4_0, USL_Q8_0, USL_Q4_1, USL_Q5_0 },
      { 4, 0, 2, 1 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      false,
      0,
      true,
      false,
      false },
    { "decode, more blocks",
      2,
      64,
      4,
      { 18, 16, 5, 7 },
      { USL_Q5_1, USL_IQ4_NL, USL_MXFP4, USL_Q8_0 },
      { 4, 0, 2, 1 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      0,
      false,
      false,
      false },
    /* Whole stages of 256 columns: more of them than warps, and fewer. */
    { .name = "decode, NF4 in stages",
      .tokens = 3,
      .in = 2304,
      .segments = 3,
      .rows = { 150, 16, 9 },
      .weight = { USL_NF4, USL_NF4, USL_NF4 },
      .rank = { 16, 20, 0 },
      .dtype = USL_BF16,
      .y_dtype = USL_BF16,
      .bias = true,
      .keep_xa = true,
      .pads = 2 },
    { .name = "decode, FP4 in stages",
      .tokens = 8,
      .in = 256,
      .segments = 1,
      .rows = { 40 },
      .weight = { USL_FP4 },
      .rank = { 3 },
      .dtype = USL_F16,
      .y_dtype = USL_F16,
      .accumulate = true },
    /* Whole pieces of 16 bytes everywhere: the GPU has kernels of its own for the adapters then. */
    { "aligned, dropout",
      150,
      520,
      3,
      { 136, 64, 72 },
      { USL_BF16, USL_NF4, USL_BF16 },
      { 16, 8, 0 },
      USL_BF16,
      USL_BF16,
      0.1f,
      true,
      false,
      2,
      true,
      false,
      false },
    { "aligned, odd ranks",
      70,
      64,
      2,
      { 64, 72 },
      { USL_F16, USL_F16 },
      { 3, 4 },
      USL_F16,
      USL_F16,
      0,
      false,
      true,
      false,
      false,
      true,
      false },
    { "aligned, many ranks",
      130,
      72,
      2,
      { 40, 96 },
      { USL_BF16, USL_BF16 },
      { 40, 24 },
      USL_BF16,
      USL_BF16,
      0.2f,
      false,
      true,
      false,
      false,
      false,
      false },
    { "aligned, 48 ranks",
      33,
      136,
      3,
      { 128, 8, 8 },
      { USL_NF4, USL_NF4, USL_NF4 },
      { 16, 16, 16 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      2,
      true,
      true,
      false },
    { "aligned, bias alone",
      20,
      64,
      2,
      { 40, 24 },
      { USL_BF16, USL_BF16 },
      { 0, 0 },
      USL_BF16,
      USL_BF16,
      0,
      true,
      true,
      false,
      false,
      true,
      false },
    { .name = "FP4, few tokens",
      .tokens = 5,
      .in = 128,
      .segments = 2,
      .rows = { 32, 17 },
      .weight = { USL_FP4, USL_FP4 },
      .dtype = USL_BF16,
      .y_dtype = USL_BF16 },
    { .name = "FP4",
      .tokens = 40,
      .in = 130,
      .segments = 2,
      .rows = { 33, 8 },
      .weight = { USL_FP4, USL_I8 },
      .rank = { 4, 2 },
      .dtype = USL_F32,
      .y_dtype = USL_F32,
      .bias = true },
    { .name = "DoRA, few tokens",
      .tokens = 7,
      .in = 65,
      .segments = 2,
      .rows = { 17, 30 },
      .weight = { USL_NF4, USL_BF16 },
      .rank = { 4, 0 },
      .dtype = USL_F32,
      .y_dtype = USL_F32,
      .bias = true,
      .keep_xa = true,
      .pads = 1,
      .accumulate = true,
      .full = true,
      .dora = true },
    { .name = "DoRA with dropout",
      .tokens = 37,
      .in = 70,
      .segments = 3,
      .rows = { 33, 5, 12 },
      .weight = { USL_F32, USL_I8, USL_BF16 },
      .rank = { 3, 0, 5 },
      .dtype = USL_F32,
      .y_dtype = USL_F32,
      .p = 0.2f,
      .bias = true,
      .pads = 1,
      .dora = true },
    { .name = "DoRA, aligned, bf16",
      .tokens = 33,
      .in = 136,
      .segments = 3,
      .rows = { 128, 8, 8 },
      .weight = { USL_NF4, USL_NF4, USL_NF4 },
      .rank = { 16, 16, 16 },
      .dtype = USL_BF16,
      .y_dtype = USL_BF16,
      .bias = true,
      .keep_xa = true,
      .pads = 2,
      .dora = true },
    { "f32 over bf16",
      280,
      130,
      1,
      { 270 },
      { USL_BF16 },
      { 5 },
      USL_F32,
      USL_F32,
      0,
      true,
      true,
      true,
      false,
      true,
      false },
};

int main(void) {
    static const int threads[3] = { 1, 2, 5 };
    rig rigs[3];
    for (int i = 0; i < 3; i++) rig_open(&rigs[i], threads[i]);
    test_formulas(false);
    test_formulas(true);
    test_dropout_share();
    test_refusals(&rigs[1]);
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) check_spec(rigs, &SPECS[i]);
    printf("largest error: %.2f of its bound\n", worst);
    for (int i = 0; i < 3; i++) rig_close(&rigs[i]);
    return test_end("test_linear");
}
