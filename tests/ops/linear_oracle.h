/* A linear's case made at random, and the formulas of both passes in double. */
#ifndef TESTS_OPS_LINEAR_ORACLE_H
#define TESTS_OPS_LINEAR_ORACLE_H

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
    int room;  /* 1: behind the rows of x and y is room for 64 ranks; 2: and matrices are kept decoded, with room too;
                3: and they lie like that where they are */
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
    int64_t out, ldx, ldy, lddx;
    int ranks;
    segment_data seg[USLI_MAX_SEGMENTS];
    void *x, *dy, *y0, *dx0;
    void *decoded;                       /* NULL: matrices are not kept decoded */
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

enum { ROOM = 64 };

/* What stands behind rows of 16-bit values is no number until an op has written it. */
static void spoil_room(void *rows, int64_t ld, int64_t cols, const spec *s) {
    for (int64_t t = 0; t < s->tokens; t++)
        memset((uint16_t *)rows + t * ld + cols, 0xff, (size_t)(ld - cols) * sizeof(uint16_t));
}

/* All matrices behind one another in the products' type. */
static void keep_decoded(data *d) {
    const spec *s = d->s;
    size_t ld = (size_t)(s->in + ROOM), bytes = ld * (size_t)(d->out + ROOM) * sizeof(uint16_t);
    uint16_t *at = d->decoded = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(at, 0xff, bytes);
    for (int i = 0; i < s->segments; i++)
        for (int64_t r = 0; r < s->rows[i]; r++, at += ld) usli_from_f32(d->seg[i].w + r * s->in, at, s->dtype, s->in);
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
    d->ldx = s->in + (s->room ? ROOM + 8 : s->pads == 2 ? 8 : s->pads ? 7 : 0);
    d->ldy = d->out + (s->room ? ROOM + 16 : s->pads == 2 ? 16 : s->pads ? 9 : 0);
    d->lddx = s->room ? s->in + (s->room == 2 ? 24 : 0) : s->pads == 1 ? s->in + 5 : d->ldx;
    d->x = rig_random(&rng, s->dtype, s->tokens * d->ldx, &d->xv);
    d->dx0 = rig_random(&rng, s->dtype, s->tokens * d->lddx, &d->dx0v);
    d->dy = rig_random(&rng, s->y_dtype, s->tokens * d->ldy, &d->dyv);
    d->y0 = rig_random(&rng, s->y_dtype, s->tokens * d->ldy, &d->y0v);
    if (s->room) {
        spoil_room(d->x, d->ldx, s->in, s);
        spoil_room(d->dy, d->ldy, d->out, s);
    }
    if (s->room >= 2) keep_decoded(d);
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
        free(d->keep), free(d->decoded);
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

#endif
