/* linear over experts: what it makes of sorted tokens is what a plain linear makes of each expert's alone, whose own
 * test has the formulas; here they stand once more in double, without frills. */
#include "core/ops/dropout.h"
#include "core/quant/traits.h"
#include "tests/ops/rig.h"

enum { MAX_EXPERTS = 40 };

typedef struct spec {
    const char *name;
    int64_t tokens, in;
    int experts, segments;
    int64_t rows[2]; /* of one expert */
    usl_dtype weight[2];
    int rank[2];
    usl_dtype dtype;
    float p;
    bool accumulate, full, keep_xa;
    int skew; /* of 8 tokens, how many go to expert 1 */
} spec;

static const spec SPECS[] = {
    { "mlp in", 37, 24, 4, 2, { 20, 12 }, { USL_F32, USL_F32 }, { 3, 2 }, USL_F32, 0, false, true, true, 0 },
    { "one expert has nearly all", 60, 33, 5, 1, { 17 }, { USL_F32 }, { 4 }, USL_F32, 0, true, true, false, 7 },
    { "more experts than tokens",
      6,
      16,
      40,
      2,
      { 8, 8 },
      { USL_F32, USL_F32 },
      { 2, 2 },
      USL_F32,
      0,
      false,
      true,
      true,
      0 },
    { "no adapter", 50, 40, 3, 2, { 33, 31 }, { USL_F32, USL_F32 }, { 0, 0 }, USL_F32, 0, false, true, false, 0 },
    { "dropout", 30, 36, 4, 1, { 10 }, { USL_F32 }, { 4 }, USL_F32, 0.25f, true, false, true, 2 },
    { "nf4, blocks across experts",
      45,
      40,
      3,
      2,
      { 5, 9 },
      { USL_NF4, USL_NF4 },
      { 2, 0 },
      USL_F32,
      0,
      false,
      false,
      true,
      0 },
    { "nf4, bf16", 150, 64, 4, 2, { 48, 48 }, { USL_NF4, USL_NF4 }, { 8, 8 }, USL_BF16, 0, false, false, true, 3 },
    { "q8_0", 40, 64, 3, 1, { 16 }, { USL_Q8_0 }, { 4 }, USL_F32, 0, false, false, true, 0 },
    { "bf16", 300, 64, 3, 2, { 40, 40 }, { USL_BF16, USL_BF16 }, { 8, 4 }, USL_BF16, 0, true, true, true, 4 },
    { "f16, odd", 70, 37, 4, 1, { 21 }, { USL_F16 }, { 3 }, USL_F16, 0, false, true, false, 0 },
};

typedef struct segment_data {
    void *storage;
    float *w, *a, *b, *da, *db, *dw;
    usli_nf4 nf4;
} segment_data;

typedef struct data {
    const spec *s;
    int64_t out;
    int ranks;
    segment_data seg[2];
    void *x, *dy, *y, *dx, *y0, *dx0, *xa;
    float *xv, *dyv, *y0v, *dx0v, *keep;
    int32_t *offsets, *update, *row, *position;
    usli_dropout dropout;
} data;

static void store_weight(usli_rng *rng, usl_dtype dtype, int64_t n, segment_data *d) {
    float *v;
    free(rig_random(rng, USL_F32, n, &v));
    d->w = malloc(sizeof(float) * (size_t)n);
    if (dtype == USL_NF4) {
        float *scratch = malloc(sizeof(float) * (size_t)usli_nf4_blocks(n));
        d->storage = aligned_alloc(64, (usli_nf4_bytes(n) + 63) / 64 * 64);
        usli_nf4_layout(d->storage, n, &d->nf4);
        usli_nf4_quantize(&d->nf4, v, n, scratch);
        usli_nf4_decode(&d->nf4, 0, n, d->w);
        rig_nf4_tables(&d->nf4);
        free(scratch);
    } else {
        const usli_traits *t = usli_traits_of(dtype);
        size_t bytes = (size_t)(n / t->block) * (size_t)t->block_bytes;
        d->storage = malloc(bytes);
        if (t->block == 1) usli_from_f32(v, d->storage, dtype, n);
        /* Any bytes are a block; without these bits no half in it is large or no number. */
        for (size_t i = 0; t->block > 1 && i < bytes; i++) ((uint8_t *)d->storage)[i] = usli_rng_u32(rng) & 0x37;
        t->decode(d->storage, d->w, n);
    }
    free(v);
}

static float *filled(int64_t n, float value) {
    float *v = malloc(sizeof(float) * (size_t)(n + 1));
    for (int64_t i = 0; i < n; i++) v[i] = value;
    return v;
}

static void make_data(const spec *s, data *d) {
    usli_rng rng;
    usli_rng_seed(&rng, 11);
    memset(d, 0, sizeof *d);
    d->s = s;
    for (int i = 0; i < s->segments; i++) {
        segment_data *g = &d->seg[i];
        store_weight(&rng, s->weight[i], s->experts * s->rows[i] * s->in, g);
        free(rig_random(&rng, USL_F32, s->experts * s->rank[i] * s->in, &g->a));
        free(rig_random(&rng, USL_F32, s->experts * s->rank[i] * s->rows[i], &g->b));
        d->out += s->rows[i];
        d->ranks += s->rank[i];
    }
    d->x = rig_random(&rng, s->dtype, s->tokens * s->in, &d->xv);
    d->dx0 = rig_random(&rng, s->dtype, s->tokens * s->in, &d->dx0v);
    d->dy = rig_random(&rng, s->dtype, s->tokens * d->out, &d->dyv);
    d->y0 = rig_random(&rng, s->dtype, s->tokens * d->out, &d->y0v);
    d->offsets = calloc(MAX_EXPERTS + 1, sizeof *d->offsets);
    for (int64_t t = 0; t < s->tokens; t++) {
        uint32_t e = usli_rng_u32(&rng);
        d->offsets[(int)(e >> 8 & 7) < s->skew ? 2 : (e >> 12) % (uint32_t)s->experts + 1]++;
    }
    for (int e = 0; e < s->experts; e++) d->offsets[e + 1] += d->offsets[e];
    size_t tokens = (size_t)s->tokens;
    d->update = rig_copy(&(int32_t){ 3 }, sizeof(int32_t));
    d->row = malloc(tokens * sizeof *d->row), d->position = malloc(tokens * sizeof *d->position);
    for (int t = 0; t < s->tokens; t++) d->row[t] = 40 + t / 5, d->position[t] = t % 5;
    d->dropout = (usli_dropout){ s->p, 3407, d->update, d->row, d->position, 2, 1 };
    d->keep = malloc(sizeof(float) * (size_t)(s->tokens * s->in));
    for (int64_t t = 0; t < s->tokens; t++)
        for (int64_t i = 0; i < s->in; i++) {
            uint32_t words[4];
            usli_dropout_words(&d->dropout, usli_dropout_key(&d->dropout), t, i / 4, words);
            d->keep[t * s->in + i] = s->p > 0 ? (words[i % 4] < usli_dropout_threshold(s->p) ? 0 : 1 / (1 - s->p)) : 1;
        }
    d->y = malloc(tokens * (size_t)d->out * usli_dtype_bytes(s->dtype));
    d->dx = malloc(tokens * (size_t)s->in * usli_dtype_bytes(s->dtype));
    d->xa = malloc(tokens * (size_t)(d->ranks + 1) * usli_dtype_bytes(s->dtype));
}

static void free_data(data *d) {
    for (int i = 0; i < d->s->segments; i++) {
        segment_data *g = &d->seg[i];
        free(g->storage), free(g->w), free(g->a), free(g->b), free(g->da), free(g->db), free(g->dw);
    }
    free(d->x), free(d->dy), free(d->y0), free(d->dx0), free(d->xv), free(d->dyv), free(d->y0v), free(d->dx0v);
    free(d->keep), free(d->offsets), free(d->update), free(d->row), free(d->position), free(d->y), free(d->dx),
        free(d->xa);
}

static void run(rig *r, data *d) {
    const spec *s = d->s;
    usli_segment segs[2];
    memcpy(d->y, d->y0, (size_t)(s->tokens * d->out) * usli_dtype_bytes(s->dtype));
    memcpy(d->dx, d->dx0, (size_t)(s->tokens * s->in) * usli_dtype_bytes(s->dtype));
    for (int i = 0; i < s->segments; i++) {
        segment_data *g = &d->seg[i];
        free(g->da), free(g->db), free(g->dw);
        g->da = filled(s->experts * s->rank[i] * s->in, 0.5f);
        g->db = filled(s->experts * s->rank[i] * s->rows[i], 0.5f);
        g->dw = filled(s->experts * s->rows[i] * s->in, 0.5f);
        segs[i] = (usli_segment){ .w = { .dtype = s->weight[i],
                                         .rows = s->experts * s->rows[i],
                                         .cols = s->in,
                                         .data = s->weight[i] == USL_NF4 ? NULL : g->storage,
                                         .nf4 = s->weight[i] == USL_NF4 ? &g->nf4 : NULL },
                                  .dw = s->full ? g->dw : NULL };
        if (s->rank[i])
            segs[i].lora = (usli_lora){
                .rank = s->rank[i], .scale = 0.5f + (float)i, .a = g->a, .b = g->b, .da = g->da, .db = g->db
            };
    }
    usli_linear_args a = { .tokens = s->tokens,
                           .in = s->in,
                           .out = d->out,
                           .segments = s->segments,
                           .segment = segs,
                           .dtype = s->dtype,
                           .y_dtype = s->dtype,
                           .x = d->x,
                           .y = d->y,
                           .y_mode = s->accumulate ? USLI_ACCUMULATE : USLI_ASSIGN,
                           .xa = s->keep_xa && d->ranks ? d->xa : NULL,
                           .dropout = d->dropout,
                           .experts = s->experts,
                           .expert_offsets = d->offsets,
                           .dy = d->dy,
                           .dx = d->dx,
                           .dx_mode = s->accumulate ? USLI_ACCUMULATE : USLI_ASSIGN };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_linear, &a, USLI_FORWARD));
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_linear, &a, USLI_BACKWARD));
}

static double *zeros(int64_t n) {
    double *v = calloc((size_t)n + 1, sizeof *v);
    return v;
}

static void compare(const spec *s, const char *what, const float *got, double *want, int64_t n) {
    float *w = malloc(sizeof *w * (size_t)(n + 1));
    for (int64_t i = 0; i < n; i++) w[i] = (float)want[i];
    /* As in linear's own test: four roundings at most, uniformly spread. */
    double bound = s->dtype == USL_F32 ? 1e-6 : 4 * rig_epsilon(s->dtype) / sqrt(3);
    double error = test_rel_error(got, w, (size_t)n);
    CHECK(error <= bound, "%s: %s: %g > %g", s->name, what, error, bound);
    free(w), free(want);
}

static void check(const data *d) {
    const spec *s = d->s;
    double *y = zeros(s->tokens * d->out), *dx = zeros(s->tokens * s->in);
    int64_t col = 0;
    for (int i = 0; i < s->segments; col += s->rows[i], i++) {
        const segment_data *g = &d->seg[i];
        int64_t rows = s->rows[i], rank = s->rank[i], in = s->in;
        double scale = 0.5 + i, *da = zeros(s->experts * rank * in), *db = zeros(s->experts * rank * rows),
               *dw = zeros(s->experts * rows * in);
        for (int64_t k = 0; k < s->experts * rank * in; k++) da[k] = 0.5;
        for (int64_t k = 0; k < s->experts * rank * rows; k++) db[k] = 0.5;
        for (int64_t k = 0; k < s->experts * rows * in; k++) dw[k] = 0.5;
        for (int e = 0; e < s->experts; e++)
            for (int64_t t = d->offsets[e]; t < d->offsets[e + 1]; t++) {
                const float *w = g->w + e * rows * in, *a = g->a + e * rank * in, *b = g->b + e * rows * rank;
                const float *x = d->xv + t * in, *keep = d->keep + t * in, *dy = d->dyv + t * d->out + col;
                for (int64_t o = 0; o < rows; o++)
                    for (int64_t k = 0; k < in; k++) {
                        y[t * d->out + col + o] += (double)x[k] * (double)w[o * in + k];
                        dx[t * in + k] += (double)dy[o] * (double)w[o * in + k];
                        dw[(e * rows + o) * in + k] += (double)dy[o] * (double)x[k];
                    }
                for (int64_t r = 0; r < rank; r++) {
                    double xa = 0, dyb = 0;
                    for (int64_t k = 0; k < in; k++) xa += (double)(x[k] * keep[k]) * (double)a[r * in + k];
                    for (int64_t o = 0; o < rows; o++) {
                        y[t * d->out + col + o] += scale * xa * (double)b[o * rank + r];
                        dyb += scale * (double)dy[o] * (double)b[o * rank + r];
                        db[(e * rows + o) * rank + r] += scale * (double)dy[o] * xa;
                    }
                    for (int64_t k = 0; k < in; k++) {
                        dx[t * in + k] += dyb * (double)(a[r * in + k] * keep[k]);
                        da[(e * rank + r) * in + k] += dyb * (double)(x[k] * keep[k]);
                    }
                }
            }
        compare(s, "dA", g->da, da, s->experts * rank * in);
        compare(s, "dB", g->db, db, s->experts * rank * rows);
        if (s->full)
            compare(s, "dW", g->dw, dw, s->experts * rows * in);
        else
            free(dw);
    }
    for (int64_t i = 0; s->accumulate && i < s->tokens * d->out; i++) y[i] += (double)d->y0v[i];
    for (int64_t i = 0; s->accumulate && i < s->tokens * s->in; i++) dx[i] += (double)d->dx0v[i];
    float *v = malloc(sizeof *v * (size_t)(s->tokens * (d->out + s->in)));
    usli_to_f32(d->y, s->dtype, v, s->tokens * d->out);
    compare(s, "y", v, y, s->tokens * d->out);
    usli_to_f32(d->dx, s->dtype, v, s->tokens * s->in);
    compare(s, "dx", v, dx, s->tokens * s->in);
    free(v);
}

static void check_refusal(rig *r) {
    float x[2] = { 0 };
    int32_t offsets[] = { 0, 1 };
    usli_segment s = { .w = { .dtype = USL_F32, .rows = 1, .cols = 1, .data = x }, .bias = x, .bias_dtype = USL_F32 };
    usli_linear_args a = { .tokens = 1, .in = 1, .out = 1, .segments = 1, .segment = &s, .x = x, .y = x, .experts = 1 };
    a.expert_offsets = offsets;
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_INTERNAL, "a bias of experts");
    s.bias = NULL;
    offsets[1] = 2;
    if (r->x.backend->host)
        CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_INTERNAL, "%s", usl_ctx_errmsg(r->ctx));
}

int main(void) {
    rig rigs[2];
    for (int i = 0; i < 2; i++) rig_open(&rigs[i], 1 + 2 * i);
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) {
        data d;
        if (!rig_multiplies(&rigs[0], SPECS[i].dtype)) {
            SKIP("%s: this GPU multiplies no bfloat16", SPECS[i].name);
            continue;
        }
        make_data(&SPECS[i], &d);
        size_t bytes = (size_t)(SPECS[i].tokens * d.out) * usli_dtype_bytes(SPECS[i].dtype);
        run(&rigs[1], &d);
        void *first = rig_copy(d.y, bytes);
        run(&rigs[0], &d);
        CHECK(!memcmp(first, d.y, bytes), "%s: the number of threads shows", SPECS[i].name);
        free(first);
        check(&d);
        free_data(&d);
    }
    check_refusal(&rigs[0]);
    for (int i = 0; i < 2; i++) rig_close(&rigs[i]);
    return test_end("test_experts");
}
