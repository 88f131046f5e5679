/* quantize: the bytes of the traits' encoders, for every type that the backend has, with weights and without, over
 * ggml's test rows (../shared/data/gguf/quant_blocks), random ones, and ones that nobody would wish for. */
#include "core/base/half.h"
#include "core/quant/traits.h"
#include "tests/ops/rig.h"

enum { ROWS = 4, COLS = 1024, COUNT = ROWS * COLS };

static const usl_dtype TYPES[] = { USL_Q4_0, USL_Q4_1, USL_Q5_0, USL_Q5_1, USL_Q8_0,   USL_Q2_K,
                                   USL_Q3_K, USL_Q4_K, USL_Q5_K, USL_Q6_K, USL_IQ4_NL, USL_IQ4_XS };
enum { TYPE_COUNT = sizeof TYPES / sizeof *TYPES };

static const float ODD[] = { NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-42f, 0, -0.0f, 70000, -7e4f, 65520, 7 };
enum { ODD_COUNT = sizeof ODD / sizeof *ODD };

/* ---- Values --------------------------------------------------------------------------------------------------------
 */

static void normal(usli_rng *rng, float *x, float scale) {
    for (int i = 0; i < COUNT; i++) x[i] = scale * (float)usli_rng_normal(rng);
}
static void plain_rows(usli_rng *rng, float *x) {
    normal(rng, x, 0.02f);
}
static void small(usli_rng *rng, float *x) {
    normal(rng, x, 3e-8f);
}
static void smaller_than_halves(usli_rng *rng, float *x) {
    for (int i = 0; i < COUNT; i++) x[i] = (float)usli_rng_normal(rng) * (i / 256 % 2 ? 1e-39f : 1e-36f);
}
static void large(usli_rng *rng, float *x) {
    for (int i = 0; i < COUNT; i++) x[i] = (float)usli_rng_normal(rng) * (i / 256 % 2 ? 3e5f : 2e4f);
}
/* Outliers, zeros of both signs, sub-blocks that lie on one side. */
static void uneven(usli_rng *rng, float *x) {
    for (int i = 0; i < COUNT; i++) {
        uint32_t draw = usli_rng_u32(rng);
        x[i] = (float)usli_rng_normal(rng) + (i / 32 % 4 == 1 ? 3.0f : i / 32 % 4 == 2 ? -3.0f : 0.0f);
        if (i / 256 % 3 == 1) x[i] = draw % 3 ? 0.0f : -0.0f;
        if (draw % 61 == 0) x[i] *= 40;
        if (draw % 7 == 1) x[i] = -0.0f;
    }
}
static void constant(usli_rng *rng, float *x) {
    for (int i = 0; i < COUNT; i++) x[i] = i % 32 ? x[i - 1] : i / 32 % 5 ? (float)usli_rng_normal(rng) : 0.0f;
}
/* Now and then one that is odd. */
static void sprinkled(usli_rng *rng, float *x) {
    for (int i = 0; i < COUNT; i++) {
        uint32_t draw = usli_rng_u32(rng);
        x[i] = draw % 97 ? (float)usli_rng_normal(rng) : ODD[draw / 97 % ODD_COUNT];
    }
}
/* Nothing but odd ones, whole blocks of one and mixtures of two. */
static void hostile(usli_rng *rng, float *x) {
    for (int i = 0; i < COUNT; i++) {
        uint32_t block = (uint32_t)i / 32;
        x[i] = ODD[(usli_rng_u32(rng) % 3 ? block : block / ODD_COUNT) % ODD_COUNT];
    }
}
/* One NaN in a block, first or later, of any form. */
static void nans(usli_rng *rng, float *x) {
    for (int i = 0; i < COUNT; i++) {
        uint32_t draw = usli_rng_u32(rng);
        x[i] = (float)usli_rng_normal(rng);
        if (i % 32 == i / 32 % 8 * 4) x[i] = usli_u32_as_float(0x7fc00000u | (draw & 0x803fffffu));
    }
}
/* ggml's own rows, where they are. */
static void real(usli_rng *rng, float *x) {
    const char *shared = getenv("USL_SHARED");
    char path[512];
    snprintf(path, sizeof path, "%s/data/gguf/quant_blocks/src.f32", shared ? shared : "../shared");
    FILE *f = fopen(path, "rb");
    size_t got = f ? fread(x, sizeof *x, COUNT, f) : 0;
    if (f) fclose(f);
    if (got == COUNT) return;
    SKIP("%s is not there: random rows in its place", path);
    plain_rows(rng, x);
}

static const struct {
    const char *name;
    void (*fill)(usli_rng *rng, float *x);
} KINDS[] = { { "plain", plain_rows }, { "ggml's", real },   { "small", small },       { "tiny", smaller_than_halves },
              { "large", large },      { "uneven", uneven }, { "constant", constant }, { "sprinkled", sprinkled },
              { "hostile", hostile },  { "nans", nans } };
enum { KIND_COUNT = sizeof KINDS / sizeof *KINDS };

/* ---- Comparing -----------------------------------------------------------------------------------------------------
 */

static void compare(rig *r, usl_dtype type, usl_dtype dtype, const float *values, const float *importance,
                    const char *kind) {
    const usli_traits *t = usli_traits_of(type);
    size_t row = usli_row_bytes(type, COLS);
    char *got = malloc(ROWS * row + 64), *want = malloc(ROWS * row);
    void *x = malloc(COUNT * sizeof(float));
    float *read = malloc(COUNT * sizeof(float));
    usli_from_f32(values, x, dtype, COUNT);
    usli_to_f32(x, dtype, read, COUNT);
    memset(got, 0xa5, ROWS * row + 64);
    for (int i = 0; i < ROWS; i++) t->encode(read + i * COLS, importance, want + (size_t)i * row, COLS);
    usli_quantize_args a = {
        .rows = ROWS, .cols = COLS, .dtype = dtype, .x = x, .importance = importance, .type = type, .y = got
    };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_quantize, &a, USLI_FORWARD));
    int differ = 0, first = -1;
    for (size_t i = 0; i < ROWS * row; i++) {
        if (got[i] == want[i]) continue;
        if (first < 0) first = (int)i;
        differ++;
    }
    int size = t->block_bytes;
    CHECK(!differ, "%s from %s, %s rows%s: %d of %zu bytes differ, the first of block %d at %d", usl_dtype_name(type),
          usl_dtype_name(dtype), kind, importance ? ", weighted" : "", differ, ROWS * row, first / size, first % size);
    CHECK((unsigned char)got[ROWS * row] == 0xa5, "%s: wrote past the end", usl_dtype_name(type));
    free(got), free(want), free(x), free(read);
}

static void check_refusals(rig *r) {
    char *room = calloc(64, 64);
    usli_quantize_args a = { .rows = 1, .cols = 128, .dtype = USL_F32, .x = room, .type = USL_Q4_K, .y = room };
    CHECK(rig_run(r, USLI_OP_quantize, &a, USLI_FORWARD) == USL_ERR_INTERNAL, "rows that do not fill a block");
    a.type = USL_NF4;
    CHECK(rig_run(r, USLI_OP_quantize, &a, USLI_FORWARD) == USL_ERR_INTERNAL, "nf4");
    a.type = USL_Q8_0, a.rows = 0;
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_quantize, &a, USLI_FORWARD));
    a.type = USL_IQ2_S, a.cols = 256;
    usl_status st = rig_run(r, USLI_OP_quantize, &a, USLI_FORWARD);
    CHECK(st == (r->x.backend->host ? USL_OK : USL_ERR_UNSUPPORTED), "iq2_s: %s", usl_ctx_errmsg(r->ctx));
    free(room);
}

int main(void) {
    rig r;
    usli_rng rng;
    rig_open(&r, 2);
    usli_rng_seed(&rng, 17);
    float *values = malloc(COUNT * sizeof *values), *importance = malloc(COLS * sizeof *importance);
    for (int i = 0; i < COLS; i++) {
        float draw = (float)usli_rng_uniform(&rng);
        importance[i] = i % 11 == 3 || i / 32 == 5 ? 0.0f : draw * draw * 4;
    }
    for (int kind = 0; kind < KIND_COUNT; kind++) {
        KINDS[kind].fill(&rng, values);
        for (int t = 0; t < TYPE_COUNT; t++) {
            compare(&r, TYPES[t], USL_F32, values, NULL, KINDS[kind].name);
            compare(&r, TYPES[t], USL_F32, values, importance, KINDS[kind].name);
            if (kind % 3 == 0) compare(&r, TYPES[t], kind % 2 ? USL_F16 : USL_BF16, values, NULL, KINDS[kind].name);
        }
    }
    check_refusals(&r);
    free(values), free(importance);
    rig_close(&r);
    return test_end("test_quantize");
}
