/* embedding: looked-up rows of every kind of table, and gradients that add up in token order. */
#include "core/base/half.h"
#include "tests/ops/rig.h"

enum { VOCAB = 11, COLS = 130, TOKENS = 37, MANY_TOKENS = 530, MANY_COLS = 1030 };

static int32_t *ids;

static void fill_ids(void) {
    ids = malloc(MANY_TOKENS * sizeof *ids);
    for (int t = 0; t < MANY_TOKENS; t++)
        ids[t] = (t * 7 + t / 3) % (VOCAB - 1); /* many repeats; the last row is nobody's */
}

static void check_forward(rig *r, usl_dtype table, usl_dtype dtype) {
    usli_rng rng;
    usli_rng_seed(&rng, 5);
    float *w, got[TOKENS * COLS];
    void *data = rig_random(&rng, table, VOCAB * COLS, &w), *y = malloc(sizeof got);
    usli_embedding_args a = { .tokens = TOKENS,
                              .cols = COLS,
                              .dtype = dtype,
                              .scale = 1.5f,
                              .ids = ids,
                              .y = y,
                              .table = { .dtype = table, .rows = VOCAB, .cols = COLS, .data = data } };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_embedding, &a, USLI_FORWARD));
    usli_to_f32(y, dtype, got, TOKENS * COLS);
    for (int i = 0; i < TOKENS * COLS; i++) {
        float want = 1.5f * w[ids[i / COLS] * COLS + i % COLS];
        CHECK(fabs((double)(got[i] - want)) <= rig_epsilon(dtype) * fabs((double)want), "value %d: %g, not %g", i,
              (double)got[i], (double)want);
    }
    free(data), free(w), free(y);
}

static void check_nf4(rig *r) {
    usli_rng rng;
    usli_rng_seed(&rng, 6);
    float *w, scratch[VOCAB * COLS], row[COLS], *y = malloc(TOKENS * COLS * sizeof *y);
    free(rig_random(&rng, USL_F32, VOCAB * COLS, &w));
    void *storage = aligned_alloc(64, (usli_nf4_bytes(VOCAB * COLS) + 63) / 64 * 64);
    usli_nf4 q;
    usli_nf4_layout(storage, VOCAB * COLS, &q);
    usli_nf4_quantize(&q, w, VOCAB * COLS, scratch);
    rig_nf4_tables(&q);
    usli_embedding_args a = { .tokens = TOKENS,
                              .cols = COLS,
                              .dtype = USL_F32,
                              .scale = 1,
                              .ids = ids,
                              .y = y,
                              .table = { .dtype = USL_NF4, .rows = VOCAB, .cols = COLS, .nf4 = &q } };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_embedding, &a, USLI_FORWARD));
    for (int t = 0; t < TOKENS; t++) {
        usli_nf4_decode(&q, ids[t] * COLS, COLS, row);
        CHECK(memcmp(row, y + t * COLS, sizeof row) == 0, "row %d", t);
    }
    free(storage), free(w), free(y);
}

static void check_backward(rig *rigs, usl_dtype dtype, int tokens, int cols) {
    usli_rng rng;
    usli_rng_seed(&rng, 8);
    float *got[3];
    float *dyv;
    void *packed = rig_random(&rng, dtype, tokens * cols, &dyv);
    size_t e = usli_dtype_bytes(dtype);
    for (int i = 0; i < 3; i++) {
        int64_t lddy = cols + 5 * i; /* rows of dy may be longer than they say */
        void *dy = rig_spread(packed, tokens, (size_t)cols * e, (size_t)lddy * e);
        got[i] = malloc((size_t)(VOCAB * cols) * sizeof **got);
        for (int j = 0; j < VOCAB * cols; j++) got[i][j] = 0.25f;
        usli_embedding_args a = { .tokens = tokens,
                                  .cols = cols,
                                  .dtype = dtype,
                                  .scale = 1.5f,
                                  .ids = ids,
                                  .dy = dy,
                                  .lddy = i ? lddy : 0,
                                  .dtable = got[i],
                                  .table = { .dtype = USL_F32, .rows = VOCAB, .cols = cols } };
        CHECK_OK(rigs[i].ctx, rig_run(&rigs[i], USLI_OP_embedding, &a, USLI_BACKWARD));
        CHECK(memcmp(got[0], got[i], (size_t)(VOCAB * cols) * sizeof **got) == 0, "other bits with other threads");
        free(dy);
    }
    float *want = malloc(sizeof(float) * (size_t)(VOCAB * cols));
    for (int j = 0; j < VOCAB * cols; j++) {
        double sum = 0.25;
        for (int t = 0; t < tokens; t++)
            if (ids[t] == j / cols) sum += 1.5 * (double)dyv[t * cols + j % cols];
        want[j] = (float)sum;
    }
    double error = test_rel_error(got[0], want, (size_t)(VOCAB * cols));
    CHECK(error < 2e-7, "dtable: %g", error);
    CHECK(got[0][(VOCAB - 1) * cols] == 0.25f, "a row nobody looked up changed");
    free(packed), free(dyv), free(want);
    for (int i = 0; i < 3; i++) free(got[i]);
}

/* y = 1.5 (table[id] + 0.7 B A[:, id]) and its gradients, in double. */
static void check_adapter(rig *rigs, usl_dtype table, usl_dtype dtype) {
    enum { RANK = 3, A = RANK * VOCAB, B = COLS * RANK };
    usli_rng rng;
    usli_rng_seed(&rng, 9);
    float *w, *a, *b, *dyv, got[TOKENS * COLS], *want = malloc(TOKENS * COLS * sizeof *want), *da[2], *db[2];
    void *data = rig_random(&rng, table, VOCAB * COLS, &w), *y = malloc(sizeof got);
    void *packed = rig_random(&rng, dtype, TOKENS * COLS, &dyv);
    size_t e = usli_dtype_bytes(dtype);
    free(rig_random(&rng, USL_F32, A, &a)), free(rig_random(&rng, USL_F32, B, &b));
    for (int i = 0; i < 2; i++) {
        da[i] = malloc(A * sizeof *da[i]), db[i] = malloc(B * sizeof *db[i]);
        for (int j = 0; j < A; j++) da[i][j] = 0.25f;
        for (int j = 0; j < B; j++) db[i][j] = 0.25f;
        int64_t lddy = COLS + 6 * i;
        void *dy = rig_spread(packed, TOKENS, COLS * e, (size_t)lddy * e);
        usli_embedding_args args = { .tokens = TOKENS,
                                     .cols = COLS,
                                     .dtype = dtype,
                                     .scale = 1.5f,
                                     .ids = ids,
                                     .y = y,
                                     .dy = dy,
                                     .lddy = i ? lddy : 0,
                                     .table = { .dtype = table, .rows = VOCAB, .cols = COLS, .data = data },
                                     .lora = {
                                         .rank = RANK, .scale = 0.7f, .a = a, .b = b, .da = da[i], .db = db[i] } };
        CHECK_OK(rigs[i].ctx, rig_run(&rigs[i], USLI_OP_embedding, &args, USLI_FORWARD));
        CHECK_OK(rigs[i].ctx, rig_run(&rigs[i], USLI_OP_embedding, &args, USLI_BACKWARD));
        free(dy);
    }
    CHECK(memcmp(da[0], da[1], A * sizeof *da[0]) == 0 && memcmp(db[0], db[1], B * sizeof *db[0]) == 0,
          "other bits with other threads");
    double a_sum[A], b_sum[B];
    for (int j = 0; j < A; j++) a_sum[j] = 0.25;
    for (int j = 0; j < B; j++) b_sum[j] = 0.25;
    for (int t = 0; t < TOKENS; t++)
        for (int c = 0; c < COLS; c++) {
            double low = 0, d = (double)dyv[t * COLS + c] * 1.5 * 0.7f;
            for (int k = 0; k < RANK; k++) {
                low += (double)b[c * RANK + k] * (double)a[k * VOCAB + ids[t]];
                a_sum[k * VOCAB + ids[t]] += d * (double)b[c * RANK + k];
                b_sum[c * RANK + k] += d * (double)a[k * VOCAB + ids[t]];
            }
            want[t * COLS + c] = (float)(1.5 * ((double)w[ids[t] * COLS + c] + (double)0.7f * low));
        }
    usli_to_f32(y, dtype, got, TOKENS * COLS);
    double error = test_rel_error(got, want, TOKENS * COLS);
    CHECK(error <= 2 * rig_epsilon(dtype), "adapted rows: %g", error);
    float gradient[A > B ? A : B];
    for (int j = 0; j < A; j++) gradient[j] = (float)a_sum[j];
    error = test_rel_error(da[0], gradient, A);
    CHECK(error < 1e-6, "dA: %g", error);
    for (int j = 0; j < B; j++) gradient[j] = (float)b_sum[j];
    error = test_rel_error(db[0], gradient, B);
    CHECK(error < 1e-6, "dB: %g", error);
    free(data), free(w), free(a), free(b), free(packed), free(dyv), free(y), free(want);
    for (int i = 0; i < 2; i++) free(da[i]), free(db[i]);
}

/* A device does not look: who makes ids checks them. */
static void check_bad_id(rig *r) {
    if (!r->x.backend->host) return;
    float w[4] = { 0 }, y[4];
    int32_t bad[] = { 0, 2 };
    usli_embedding_args a = { .tokens = 2,
                              .cols = 2,
                              .dtype = USL_F32,
                              .scale = 1,
                              .ids = bad,
                              .y = y,
                              .table = { .dtype = USL_F32, .rows = 2, .cols = 2, .data = w } };
    CHECK(rig_run(r, USLI_OP_embedding, &a, USLI_FORWARD) == USL_ERR_INVALID, "%s", usl_ctx_errmsg(r->ctx));
    bad[1] = -1;
    CHECK(rig_run(r, USLI_OP_embedding, &a, USLI_FORWARD) == USL_ERR_INVALID, "%s", usl_ctx_errmsg(r->ctx));
}

int main(void) {
    static const int threads[3] = { 1, 2, 5 };
    static const usl_dtype types[3] = { USL_F32, USL_BF16, USL_F16 };
    rig rigs[3];
    for (int i = 0; i < 3; i++) rig_open(&rigs[i], threads[i]);
    fill_ids();
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) check_forward(&rigs[i], types[i], types[j]);
    check_nf4(&rigs[1]);
    for (int i = 0; i < 3; i++) check_backward(rigs, types[i], TOKENS, COLS);
    check_backward(rigs, USL_BF16, MANY_TOKENS, MANY_COLS);
    for (int i = 0; i < 3; i++) check_adapter(rigs, types[i], types[2 - i]);
    check_bad_id(&rigs[0]);
    for (int i = 0; i < 3; i++) rig_close(&rigs[i]);
    free(ids);
    return test_end("test_embedding");
}
