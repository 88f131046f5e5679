/* Every type of the traits table against ggml's own blocks and values (../shared/data/gguf/quant_blocks). */
#include "tests/test.h"

#include "core/quant/blocks.h"
#include "core/quant/lanes.h"
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
        { USL_F32, 3, 12 },        { USL_BF16, 0, 0 },
        { USL_Q4_0, 64, 36 },      { USL_Q4_0, 33, 0 },
        { USL_Q4_0, -32, 0 },      { USL_Q8_1, 32, 36 },
        { USL_Q6_K, 512, 420 },    { USL_Q6_K, 128, 0 },
        { USL_Q8_K, 256, 292 },    { USL_IQ1_S, 256, 50 },
        { USL_IQ3_XXS, 256, 98 },  { USL_MXFP4, 32, 17 },
        { USL_F32, INT64_MAX, 0 }, { USL_Q8_0, INT64_MAX / 32 * 32, 0 },
        { USL_I8, 5, 5 },          { USL_NF4, 64, 36 },
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

/* Blocks of values that no fit can describe are written and read without harm, and a block at a time gives the bytes of
 * the whole: nothing leaks from one block into the next. */
static void test_hostile(usl_dtype type) {
    static const float WORST[] = { NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-45f, -0.0f, 0.0f };
    static unsigned char again[COUNT * 4];
    const usli_traits *t = usli_traits_of(type);
    for (int i = 0; i < COUNT; i++) source[i] = i % 7 ? WORST[(i / 256 + (i % 5 == 0)) % 8] : 1.0f;
    size_t bytes = usli_row_bytes(type, COUNT);
    memset(blocks, 0xa5, sizeof blocks);
    memset(again, 0x5a, sizeof again);
    t->encode(source, NULL, blocks, COUNT);
    for (int i = 0; i < COUNT; i += 512) t->encode(source + i, NULL, again + usli_row_bytes(type, i), 512);
    bool cut = type == USL_NF4 || type == USL_FP4; /* their absmax follow all codes */
    CHECK(cut || memcmp(blocks, again, bytes) == 0, "%s: cut in pieces, the bytes differ", usl_dtype_name(type));
    CHECK(blocks[bytes] == 0xa5, "%s: wrote past the end", usl_dtype_name(type));
    t->decode(blocks, decoded, COUNT);
    for (size_t i = 0; i < bytes; i++) blocks[i] = (unsigned char)(i * 37 + i / 251);
    t->decode(blocks, decoded, COUNT);
}

/* What is nothing to a half becomes nothing, never NaN. */
static void test_tiny(usl_dtype type) {
    const usli_traits *t = usli_traits_of(type);
    for (int i = 0; i < COUNT; i++)
        source[i] = (i % 3 ? 1.0f : -1.0f) * (float)(i % 32) * (i / 256 % 2 ? 1e-40f : 3e-38f);
    t->encode(source, NULL, blocks, COUNT);
    t->decode(blocks, decoded, COUNT);
    int bad = 0;
    for (int i = 0; i < COUNT; i++) bad += !(fabsf(decoded[i]) < 1e-4f);
    CHECK(bad == 0, "%s: %d of %d tiny values became something", usl_dtype_name(type), bad, COUNT);
}

/* Zeros stay zeros, and weights draw the error to where they are small. */
static void test_weights(usl_dtype type) {
    const usli_traits *t = usli_traits_of(type);
    float *weights = expected;
    uint32_t seed = 7;
    memset(source, 0, sizeof source);
    t->encode(source, NULL, blocks, COUNT);
    t->decode(blocks, decoded, COUNT);
    size_t differ = 0;
    for (int i = 0; i < COUNT; i++) differ += decoded[i] != 0;
    CHECK(differ == 0, "%s: %zu zeros became something", usl_dtype_name(type), differ);
    for (int i = 0; i < COUNT; i++) {
        seed = seed * 1664525u + 1013904223u;
        source[i] = (float)(seed >> 8) / 16777216.0f - 0.5f;
        weights[i] = i % 4 ? 0.01f : 1.0f;
    }
    double error[2] = { 0, 0 };
    for (int weighted = 0; weighted < 2; weighted++) {
        t->encode(source, weighted ? weights : NULL, blocks, COUNT);
        t->decode(blocks, decoded, COUNT);
        for (int i = 0; i < COUNT; i += 4) error[weighted] += pow((double)decoded[i] - (double)source[i], 2);
    }
    CHECK(error[1] < error[0], "%s: error of the weighted values %g, without weights %g", usl_dtype_name(type),
          error[1], error[0]);
}

/* The types below four bits with an importance matrix, against ggml's blocks (iquants_reference.bin, by
 * make_iquants_reference.py): they decode to the same bits, and ours are no further from the source, by the error
 * weighted with the importance and by the plain one over all rows. */
static void test_lattices(void) {
    enum { SIX = 6, WIDE = 512 };
    static const usl_dtype LATTICES[] = { USL_IQ2_XXS, USL_IQ2_XS, USL_IQ2_S, USL_IQ3_XXS,
                                          USL_IQ3_S,   USL_IQ1_S,  USL_IQ1_M };
    static float importance[WIDE], theirs[SIX * WIDE];
    FILE *f = fopen("tests/quant/iquants_reference.bin", "rb");
    if (!f) {
        SKIP("tests/quant/iquants_reference.bin: run from the root of the repository");
        return;
    }
    bool whole = fread(importance, sizeof importance, 1, f) == 1 && fread(source, sizeof theirs, 1, f) == 1;
    for (size_t k = 0; whole && k < sizeof LATTICES / sizeof *LATTICES; k++) {
        const usli_traits *t = usli_traits_of(LATTICES[k]);
        const char *name = usl_dtype_name(t->dtype);
        uint64_t wanted, digest = 0xcbf29ce484222325u;
        whole = fread(blocks, usli_row_bytes(t->dtype, SIX * WIDE), 1, f) == 1 && fread(&wanted, 8, 1, f) == 1;
        t->decode(blocks, theirs, SIX * WIDE);
        for (size_t i = 0; i < sizeof theirs; i++) digest = (digest ^ ((unsigned char *)theirs)[i]) * 0x100000001b3u;
        CHECK(digest == wanted, "%s decodes to other values than ggml's", name);
        printf("%-7s error against ggml's, weighted (plain), by row:", name);
        for (int r = 0; r < SIX; r++) {
            double sums[4] = { 0, 0, 0, 0 };
            t->encode(source + r * WIDE, importance, blocks, WIDE);
            t->decode(blocks, decoded, WIDE);
            for (int c = 0; c < WIDE; c++) {
                double ours = pow((double)decoded[c] - (double)source[r * WIDE + c], 2);
                double ggml = pow((double)theirs[r * WIDE + c] - (double)source[r * WIDE + c], 2);
                sums[0] += ours * (double)importance[c];
                sums[1] += ggml * (double)importance[c];
                sums[2] += ours;
                sums[3] += ggml;
            }
            double weighted = sqrt(sums[0] / sums[1]), plain = sqrt(sums[2] / sums[3]);
            printf(" %.3f (%.3f)", weighted, plain);
            CHECK(weighted <= 1.05, "%s row %d: error %g of ggml's", name, r, weighted);
        }
        printf("\n");
    }
    CHECK(whole, "tests/quant/iquants_reference.bin is cut off");
    fclose(f);
}

/* Of importances only the proportions count, however large or small they are. */
static void test_importances(usl_dtype type) {
    static const float SCALES[] = { 0x1p100f, 0x1p-100f, 0x1p120f };
    static unsigned char again[COUNT * 4];
    static float scaled[COUNT];
    const usli_traits *t = usli_traits_of(type);
    uint32_t seed = 3;
    for (int i = 0; i < COUNT; i++) {
        seed = seed * 1664525u + 1013904223u;
        source[i] = (float)(seed >> 8) / 16777216.0f - 0.5f;
        expected[i] = (float)(seed >> 24) / 64.0f;
    }
    t->encode(source, expected, blocks, COUNT);
    for (size_t k = 0; k < sizeof SCALES / sizeof *SCALES; k++) {
        for (int i = 0; i < COUNT; i++) scaled[i] = SCALES[k] * expected[i];
        t->encode(source, scaled, again, COUNT);
        CHECK(memcmp(blocks, again, usli_row_bytes(type, COUNT)) == 0, "%s: importances times %g change the bytes",
              usl_dtype_name(type), (double)SCALES[k]);
    }
}

/* Every instruction set gives the same bytes, for values of any kind. */
static void test_builds(void) {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2")) {
        SKIP("this processor runs one build of the encoders alone");
        return;
    }
    const usli_lanes *a = &usli_lanes_generic, *b = &usli_lanes_avx2;
    static const float ODD[] = { NAN, INFINITY, -INFINITY, 3e38f, 1e-42f, 0, -0.0f, 7 };
    static unsigned char again[COUNT * 4];
    static const usli_lattice KINDS[] = {
        { &usli_grid_iq2_xxs, 32, 15, USLI_SIGNS_EVEN }, { &usli_grid_iq2_xs, 16, 15, USLI_SIGNS_EVEN },
        { &usli_grid_iq2_s, 16, 15, USLI_SIGNS_FREE },   { &usli_grid_iq3_xxs, 32, 15, USLI_SIGNS_EVEN },
        { &usli_grid_iq3_s, 32, 15, USLI_SIGNS_FREE },   { &usli_grid_iq1, 32, 7, USLI_SIGNS_SHIFT },
        { &usli_grid_iq1, 16, 7, USLI_SIGNS_SHIFTS },
    };
    float *weights = expected;
    for (int round = 0; round < 4; round++) {
        uint32_t seed = 11 + (uint32_t)round;
        for (int i = 0; i < COUNT; i++) {
            seed = seed * 1664525u + 1013904223u;
            source[i] = ((float)(seed >> 8) / 16777216.0f - 0.4f) * (round == 1 ? 1e-6f : 1);
            weights[i] = (float)(seed >> 20) / 4096.0f;
            if (round == 2 && seed >> 27 == 0) source[i] = ODD[seed >> 9 & 7];
            if (round == 3) source[i] = ODD[i / 64 & 7] * (float)(i % 5);
        }
        const struct {
            const char *name;
            void (*a)(const float *, void *, int64_t), (*b)(const float *, void *, int64_t);
            size_t bytes;
        } SIMPLE[] = { { "q4_0", a->q4_0, b->q4_0, sizeof(usli_block_q4_0) },
                       { "q4_1", a->q4_1, b->q4_1, sizeof(usli_block_q4_1) },
                       { "q5_0", a->q5_0, b->q5_0, sizeof(usli_block_q5_0) },
                       { "q5_1", a->q5_1, b->q5_1, sizeof(usli_block_q5_1) },
                       { "q8_0", a->q8_0, b->q8_0, sizeof(usli_block_q8_0) } };
        for (size_t t = 0; t < sizeof SIMPLE / sizeof *SIMPLE; t++) {
            SIMPLE[t].a(source, blocks, COUNT);
            SIMPLE[t].b(source, again, COUNT);
            CHECK(memcmp(blocks, again, COUNT / 32 * SIMPLE[t].bytes) == 0, "%s, round %d: the builds differ",
                  SIMPLE[t].name, round);
        }
        int differ = 0;
        for (int i = 0; i + 256 <= COUNT; i += 256)
            for (int kind = 0; kind < 10; kind++) {
                usli_super one, two;
                memset(&one, 0, sizeof one);
                memset(&two, 0, sizeof two);
                const float *w = kind >= 5 ? weights + i : NULL;
                static const int AFFINE[3][3] = { { 16, 3, 15 }, { 32, 15, 63 }, { 32, 31, 63 } };
                if (kind % 5 < 3) {
                    const int *k = AFFINE[kind % 5];
                    a->affine(source + i, w, k[0], k[1], k[2], &one);
                    b->affine(source + i, w, k[0], k[1], k[2], &two);
                } else {
                    a->symmetric(source + i, w, kind % 5 == 3 ? -4 : -32, kind % 5 == 3 ? -32 : -128, &one);
                    b->symmetric(source + i, w, kind % 5 == 3 ? -4 : -32, kind % 5 == 3 ? -32 : -128, &two);
                }
                differ += memcmp(&one, &two, sizeof one) != 0;
            }
        for (size_t k = 0; k < sizeof KINDS / sizeof *KINDS; k++) {
            usli_runs runs;
            usli_points one, two;
            usli_runs_of(KINDS[k].grid, &runs);
            for (int i = 0; i < COUNT; i += 1024) {
                a->points(&KINDS[k], &runs, source + i, k % 2 ? weights + i : NULL, &one);
                b->points(&KINDS[k], &runs, source + i, k % 2 ? weights + i : NULL, &two);
                differ += memcmp(&one, &two, sizeof one) != 0;
            }
        }
        CHECK(differ == 0, "round %d: %d super-blocks differ between the builds", round, differ);
    }
#endif
}

int main(void) {
    test_sizes();
    test_builds();
    for (int i = 0; i < TYPE_COUNT; i++) {
        test_decode(TYPES[i]);
        test_encode(TYPES[i]);
        test_hostile(TYPES[i]);
        test_tiny(TYPES[i]);
        /* 16 bits and Q8_0 leave weights nothing to choose. */
        if (TYPES[i] != USL_F16 && TYPES[i] != USL_BF16 && TYPES[i] != USL_Q8_0) test_weights(TYPES[i]);
    }
    test_lattices();
    for (int i = USL_IQ2_XXS; i <= USL_IQ1_M; i++)
        if (usli_traits_of((usl_dtype)i) && usli_traits_of((usl_dtype)i)->block == 256 && i != USL_IQ4_XS) {
            test_hostile((usl_dtype)i);
            test_weights((usl_dtype)i);
            test_importances((usl_dtype)i);
        }
    test_hostile(USL_NF4);
    test_hostile(USL_FP4);
    return test_end("traits");
}
