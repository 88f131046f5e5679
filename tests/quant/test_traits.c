/* Every type of the traits table against ggml's own blocks and values (../shared/data/gguf/quant_blocks). */
#include "tests/test.h"

#include "core/quant/traits.h"

enum { ROWS = 8, COLS = 1024, COUNT = ROWS * COLS };

static const usl_dtype TYPES[] = { USL_F16,  USL_BF16, USL_Q4_0, USL_Q4_1, USL_Q5_0,   USL_Q5_1,   USL_Q8_0, USL_Q2_K,
                                   USL_Q3_K, USL_Q4_K, USL_Q5_K, USL_Q6_K, USL_IQ4_NL, USL_IQ4_XS, USL_MXFP4 };
enum { TYPE_COUNT = sizeof TYPES / sizeof *TYPES };

/* Reads exactly `size` bytes; false when the file is not there. */
static bool read_data(const char *type, const char *suffix, void *dst, size_t size) {
    const char *shared = getenv("USL_SHARED");
    char path[512], name[64];
    snprintf(name, sizeof name, "%s%s", type, suffix);
    for (char *c = name; *c && *c != '.'; c++)
        if (strcmp(type, "src") != 0 && *c >= 'a' && *c <= 'z') *c = (char)(*c - 'a' + 'A');
    snprintf(path, sizeof path, "%s/data/gguf/quant_blocks/%s", shared ? shared : "../shared", name);
    FILE *f = fopen(path, "rb");
    if (!f) return false;
    size_t got = fread(dst, 1, size, f);
    CHECK(got == size && fgetc(f) == EOF, "%s is not %zu bytes", path, size);
    fclose(f);
    return true;
}

static float source[COUNT], expected[COUNT], decoded[COUNT];
static unsigned char blocks[COUNT * 4];

static void test_decode(usl_dtype type) {
    const char *name = usl_dtype_name(type);
    const usli_traits *t = usli_traits_of(type);
    size_t bytes = usli_row_bytes(type, COUNT);
    if (!read_data(name, ".quant", blocks, bytes) || !read_data(name, ".deq.f32", expected, sizeof expected)) {
        SKIP("%s: ggml's blocks are not there", name);
        return;
    }
    t->decode(blocks, decoded, COUNT);
    size_t differ = 0;
    for (int i = 0; i < COUNT; i++) differ += memcmp(&decoded[i], &expected[i], sizeof *decoded) != 0;
    CHECK(differ == 0, "%s: %zu of %d values differ from ggml's", name, differ, COUNT);
}

static double row_error(const float *values, int row) {
    return test_rel_error(values + row * COLS, source + row * COLS, COLS);
}

/* Our blocks, decoded, are no further from the source than 1.05 times ggml's, row by row. */
static void test_encode(usl_dtype type) {
    const char *name = usl_dtype_name(type);
    const usli_traits *t = usli_traits_of(type);
    if (!read_data("src", ".f32", source, sizeof source) || !read_data(name, ".deq.f32", expected, sizeof expected)) {
        SKIP("%s: ggml's values are not there", name);
        return;
    }
    t->encode(source, NULL, blocks, COUNT);
    t->decode(blocks, decoded, COUNT);
    printf("%-7s error against ggml's, by row:", name);
    for (int row = 0; row < ROWS; row++) {
        double ours = row_error(decoded, row), theirs = row_error(expected, row);
        printf(" %.4f", theirs > 0 ? ours / theirs : ours);
        CHECK(ours <= 1.05 * theirs, "%s row %d: error %g, ggml's %g", name, row, ours, theirs);
    }
    printf("\n");
}

static void test_sizes(void) {
    static const struct {
        usl_dtype type;
        int64_t n;
        size_t bytes;
    } CASES[] = {
        { USL_F32, 3, 12 },       { USL_BF16, 0, 0 },     { USL_Q4_0, 64, 36 },    { USL_Q4_0, 33, 0 },
        { USL_Q4_0, -32, 0 },     { USL_Q8_1, 32, 36 },   { USL_Q6_K, 512, 420 },  { USL_Q6_K, 128, 0 },
        { USL_Q8_K, 256, 292 },   { USL_IQ1_S, 256, 50 }, { USL_IQ3_XXS, 256, 98 }, { USL_MXFP4, 32, 17 },
        { USL_F32, INT64_MAX, 0 }, { USL_Q8_0, INT64_MAX / 32 * 32, 0 }, { USL_I8, 5, 5 }, { USL_NF4, 64, 36 },
        { (usl_dtype)63, 256, 0 }, { USL_DTYPE_AUTO, 256, 0 },
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        size_t got = usli_row_bytes(CASES[i].type, CASES[i].n);
        CHECK(got == CASES[i].bytes, "%s x %lld: %zu bytes, not %zu", usl_dtype_name(CASES[i].type),
              (long long)CASES[i].n, got, CASES[i].bytes);
    }
    CHECK(usli_traits_of((usl_dtype)63) == NULL, "63 is no type");
#define X(name, value, text) CHECK(usli_traits_of(USL_##name) && usli_traits_of(USL_##name)->dtype == USL_##name, text);
    USL_DTYPE_MAP(X)
#undef X
}

int main(void) {
    test_sizes();
    for (int i = 0; i < TYPE_COUNT; i++) {
        test_decode(TYPES[i]);
        test_encode(TYPES[i]);
    }
    return test_end("traits");
}
