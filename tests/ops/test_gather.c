/* gather: rows picked, and their gradients put back among zeros. scatter: rows put among others that stay. */
#include "tests/ops/rig.h"

enum { X_ROWS = 203, ROWS = 71 };

/* gap: what stands behind the rows of x; of its gradient's it is cleared. */
static void check_type(rig *r, usl_dtype dtype, int64_t cols, int64_t gap) {
    usli_rng rng;
    usli_rng_seed(&rng, 2);
    int32_t *index = malloc(ROWS * sizeof *index);
    for (int i = 0; i < ROWS; i++) index[i] = (i * 37 + 5) % X_ROWS; /* 37 and 203 are coprime: distinct */
    size_t row = (size_t)cols * usli_dtype_bytes(dtype), ld = row + (size_t)gap * usli_dtype_bytes(dtype);
    char *packed = rig_random(&rng, dtype, X_ROWS * cols, NULL), *x = rig_spread(packed, X_ROWS, row, ld),
         *y = malloc(ROWS * row), *dx = malloc(X_ROWS * ld);
    memset(dx, 0xff, X_ROWS * ld);
    usli_gather_args a = { .rows = ROWS,
                           .cols = cols,
                           .x_rows = X_ROWS,
                           .dtype = dtype,
                           .index = index,
                           .x = x,
                           .y = y,
                           .dy = y,
                           .dx = dx,
                           .ldx = gap ? cols + gap : 0 };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_gather, &a, USLI_FORWARD));
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_gather, &a, USLI_BACKWARD));
    bool taken[X_ROWS] = { false };
    for (int i = 0; i < ROWS; i++) {
        taken[index[i]] = true;
        CHECK(memcmp(y + (size_t)i * row, packed + (size_t)index[i] * row, row) == 0, "row %d", i);
        CHECK(memcmp(dx + (size_t)index[i] * ld, y + (size_t)i * row, row) == 0, "gradient of row %d", i);
    }
    for (int i = 0; i < X_ROWS; i++) {
        size_t first = taken[i] ? row : 0;
        while (first < ld && dx[(size_t)i * ld + first] == 0) first++;
        CHECK(first == ld, "row %d is not zero", i);
    }
    free(index), free(packed), free(x), free(y), free(dx);
}

/* A device does not look: who makes indices checks them. */
static void check_bad_index(rig *r) {
    if (!r->x.backend->host) return;
    float x[2] = { 0 }, y[2];
    int32_t index[] = { 0, 2 };
    usli_gather_args a = { .rows = 2, .cols = 1, .x_rows = 2, .dtype = USL_F32, .index = index, .x = x, .y = y };
    CHECK(rig_run(r, USLI_OP_gather, &a, USLI_FORWARD) == USL_ERR_INTERNAL, "%s", usl_ctx_errmsg(r->ctx));
}

/* Forward, a row may be wanted more than once, and more rows than there are. */
static void check_repeated(rig *r) {
    float *x = rig_copy((float[]){ 1, 2, 3, 4 }, 4 * sizeof *x), *y = malloc(6 * sizeof *y);
    int32_t *index = rig_copy((int32_t[]){ 1, 0, 1 }, 3 * sizeof *index);
    usli_gather_args a = { .rows = 3, .cols = 2, .x_rows = 2, .dtype = USL_F32, .index = index, .x = x, .y = y };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_gather, &a, USLI_FORWARD));
    float want[6] = { 3, 4, 1, 2, 3, 4 };
    CHECK(memcmp(y, want, sizeof want) == 0, "%g %g %g", (double)y[0], (double)y[2], (double)y[4]);
    free(x), free(y), free(index);
}

static void check_scatter(rig *r) {
    float *x = rig_copy((float[]){ 1, 2, -1, 3, 4, -1 }, 6 * sizeof *x);
    float *y = rig_copy((float[]){ 9, 9, 9, 9, 9, 9, 9, 9 }, 8 * sizeof *y);
    int32_t *index = rig_copy((int32_t[]){ 3, 1 }, 2 * sizeof *index);
    usli_scatter_args a = { .rows = 2, .cols = 2, .dtype = USL_F32, .index = index, .x = x, .ldx = 3, .y = y };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_scatter, &a, USLI_FORWARD));
    float want[8] = { 9, 9, 3, 4, 9, 9, 1, 2 };
    CHECK(memcmp(y, want, sizeof want) == 0, "%g %g %g %g", (double)y[2], (double)y[3], (double)y[6], (double)y[7]);
    free(x), free(y), free(index);
}

int main(void) {
    for (int threads = 1; threads <= 3; threads++) {
        rig r;
        rig_open(&r, threads);
        for (int64_t cols = 19; cols <= 2072; cols += 2053) {
            for (int64_t gap = 0; gap <= 16; gap = gap ? 2 * gap + 6 : 5) { /* 0, 5, 16 */
                check_type(&r, USL_F32, cols, gap);
                check_type(&r, USL_BF16, cols, gap);
                check_type(&r, USL_F16, cols, gap);
            }
        }
        check_bad_index(&r);
        check_repeated(&r);
        check_scatter(&r);
        rig_close(&r);
    }
    return test_end("test_gather");
}
