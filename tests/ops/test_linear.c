/* linear against formulas in double (linear_oracle.h): every storage type, fused segments, adapters, dropout, write
 * modes, strides (linear_cases.h). The formulas of the backward pass are themselves checked against central differences
 * of the forward one. */
#include "tests/ops/linear_cases.h"

/* ---- Running a case
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
    const uint16_t *decoded = d->decoded;
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
        if (!decoded) continue;
        segs[i].w.cached = decoded;
        segs[i].w.cached_ld = s->in + ROOM;
#ifdef USLI_RIG_CUDA
        if (s->room == 3) { /* not a copy of anything */
            segs[i].w.data = decoded;
            segs[i].w.cached = NULL;
            segs[i].w.ld = s->in + ROOM;
        }
#endif
        decoded += s->rows[i] * (s->in + ROOM);
    }
}

/* Where base and adapters can be one product, they are: something stands behind the rows. */
static void check_growth(const data *d, const void *rows, int64_t ld, int64_t cols, bool apart) {
#ifdef USLI_RIG_CUDA
    const spec *s = d->s;
    bool grows = s->room && d->ranks && d->ranks <= USLI_MOST_RANKS && !apart;
    for (int i = 0; i < s->segments; i++) grows = grows && (s->weight[i] != s->dtype || s->room == 3);
    for (int64_t t = 0; s->room && t < s->tokens; t++)
        CHECK((((const uint16_t *)rows)[t * ld + cols] != 0xffff) == grows, "%s: token %d", s->name, (int)t);
#else
    (void)d, (void)rows, (void)ld, (void)cols, (void)apart;
#endif
}

static void run_case(rig *r, const data *d, outputs *o) {
    const spec *s = d->s;
    size_t y_bytes = (size_t)(s->tokens * d->ldy) * usli_dtype_bytes(s->y_dtype);
    size_t dx_bytes = (size_t)(s->tokens * d->lddx) * usli_dtype_bytes(s->dtype);
    memset(o, 0, sizeof *o);
    o->y = malloc(y_bytes + 1), o->dx = malloc(dx_bytes + 1);
    memcpy(o->y, d->y0, y_bytes), memcpy(o->dx, d->dx0, dx_bytes);
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
                           .ldx = s->pads || s->room ? d->ldx : 0,
                           .ldy = s->pads || s->room ? d->ldy : 0,
                           .room = s->room ? ROOM : 0,
                           .y_mode = s->accumulate ? USLI_ACCUMULATE : USLI_ASSIGN,
                           .xa = s->keep_xa && d->ranks ? o->xa : NULL,
                           .dropout = d->dropout,
                           .dy = d->dy,
                           .dx = o->dx,
                           .lddx = s->pads == 1 || s->room ? d->lddx : 0,
                           .dx_mode = s->accumulate ? USLI_ACCUMULATE : USLI_ASSIGN };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_linear, &a, USLI_FORWARD));
    check_growth(d, d->x, d->ldx, s->in, s->bias || s->tokens <= 8); /* few go another way */
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_linear, &a, USLI_BACKWARD));
    if (!s->dora) check_growth(d, d->dy, d->ldy, d->out, s->p > 0);
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
    float *dx = malloc(sizeof(float) * (size_t)(s->tokens * d->lddx)),
          *dx_want = malloc(sizeof(float) * (size_t)(s->tokens * d->lddx));
    for (int64_t t = 0; t < s->tokens; t++)
        for (int64_t i = 0; i < d->lddx; i++) {
            float before = d->dx0v[t * d->lddx + i];
            dx_want[t * d->lddx + i] = i >= s->in ? before : g.dx[t * s->in + i] + (s->accumulate ? before : 0);
        }
    usli_to_f32(o->dx, s->dtype, dx, s->tokens * d->lddx);
    compare(s, "dx", 0, dx, dx_want, s->tokens * d->lddx, bound);
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
    CHECK(memcmp(a->dx, b->dx, (size_t)(s->tokens * d->lddx) * usli_dtype_bytes(s->dtype)) == 0, "%s: dx differs",
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
    if (!rig_multiplies(&rigs[0], s->dtype)) {
        SKIP("%s: this GPU multiplies no bfloat16", s->name);
        return;
    }
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
    spec s = { "formulas", 5,       9,       2,     { 4, 3 }, { USL_F32, USL_F32 },
               { 2, 3 },   USL_F32, USL_F32, 0.25f, true,     false,
               0,          false,   true,    dora,  0 };
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

/* What the CPU decodes and the kernels do not is refused, at every number of tokens: it never comes out as nothing. */
static void test_types(rig *r) {
    enum { COLS = 256, ROWS = 2, MOST = 16 };
    uint8_t *w = calloc(ROWS, usli_row_bytes(USL_F64, COLS)); /* the widest */
    float *x = calloc(MOST * COLS, sizeof *x), *y = malloc(MOST * ROWS * sizeof *y);
    for (int type = 0; type < 64; type++) {
        const usli_traits *t = usli_traits_of((usl_dtype)type);
        if (!t || !t->decode || type == USL_NF4 || type == USL_FP4) continue;
        for (int tokens = 2; tokens <= MOST; tokens += MOST - 2) {
            usli_segment s = { .w = { .dtype = (usl_dtype)type, .rows = ROWS, .cols = COLS, .data = w } };
            usli_linear_args a = {
                .tokens = tokens, .in = COLS, .out = ROWS, .segments = 1, .segment = &s, .x = x, .y = y
            };
            memset(y, 0x7f, MOST * ROWS * sizeof *y);
            usl_status st = rig_run(r, USLI_OP_linear, &a, USLI_FORWARD);
            if (st == USL_OK)
                for (int i = 0; i < tokens * ROWS; i++)
                    CHECK(y[i] == 0, "%s, %d tokens: y[%d] is %g", usl_dtype_name((usl_dtype)type), tokens, i,
                          (double)y[i]);
            else
                CHECK(st == USL_ERR_UNSUPPORTED && strstr(usl_ctx_errmsg(r->ctx), "cpu"), "%s: %s",
                      usl_dtype_name((usl_dtype)type), usl_ctx_errmsg(r->ctx));
        }
    }
    free(w), free(x), free(y);
}

static void test_refusals(rig *r) {
    float x[4] = { 1, 1, 1, 1 }, y[4], one = 1;
    uint8_t w[16] = { 0 };
    usli_segment s = { .w = { .dtype = USL_F8_E4M3, .rows = 2, .cols = 2, .data = w } };
    usli_linear_args a = { .tokens = 2, .in = 2, .out = 2, .segments = 1, .segment = &s, .x = x, .y = y };
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_UNSUPPORTED, "fp8: %s", usl_ctx_errmsg(r->ctx));
    s.w.dtype = USL_Q8_0;
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_SHAPE, "half a block: %s", usl_ctx_errmsg(r->ctx));
#ifdef USLI_RIG_CUDA
    s.w.dtype = USL_IQ3_S;
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_UNSUPPORTED, "iq3_s: %s", usl_ctx_errmsg(r->ctx));
#endif
    s.w.dtype = USL_F32, a.segment = &s;
    s.lora = (usli_lora){ .rank = 1, .scale = 1, .a = x, .b = x, .magnitude = &one };
    CHECK(rig_run(r, USLI_OP_linear, &a, USLI_FORWARD) == USL_ERR_INTERNAL, "no norms: %s", usl_ctx_errmsg(r->ctx));
}

/* On a GPU the library's algorithms take turns until the quickest is known: one result from all of them. */
static void test_turns(rig *r) {
#ifdef USL_REAL_GPU
    enum { CALLS = 48 };
    static const spec s = { "turns", 512, 1024, 1, { 1536 }, { USL_F16 }, { 0 }, USL_F16, USL_F16, .pads = 0 };
    data *d = malloc(sizeof *d);
    outputs *first = malloc(sizeof *first), *other = malloc(sizeof *other);
    make_data(&s, d);
    run_case(r, d, first);
    for (int i = 0; i < CALLS; i++) {
        run_case(r, d, other);
        check_same(d, first, other);
        free_outputs(d, other);
    }
    free_outputs(d, first);
    free_data(d);
    free(d), free(first), free(other);
#else
    (void)r;
#endif
}

int main(void) {
    static const int threads[3] = { 1, 2, 5 };
    rig rigs[3];
    for (int i = 0; i < 3; i++) rig_open(&rigs[i], threads[i]);
    test_formulas(false);
    test_formulas(true);
    test_dropout_share();
    test_refusals(&rigs[1]);
    test_types(&rigs[1]);
    test_turns(&rigs[1]);
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++) check_spec(rigs, &SPECS[i]);
    printf("largest error: %.2f of its bound\n", worst);
    for (int i = 0; i < 3; i++) rig_close(&rigs[i]);
    return test_end("test_linear");
}
