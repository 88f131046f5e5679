/* NF4, FP4 and the 8-bit maps against what bitsandbytes made (nf4_reference.bin, by make_nf4_reference.py). */
#include "tests/test.h"

#include "core/quant/nf4.h"
#include "core/quant/optim8.h"
#include "core/quant/traits.h"

static FILE *reference;

static void take(void *dst, size_t bytes) {
    size_t got = fread(dst, 1, bytes, reference);
    CHECK(got == bytes, "the reference ends early");
}

/* The generator of make_nf4_reference.py. */
static float *make_values(int64_t n, float scale, uint64_t seed, int64_t zeros) {
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        int64_t total = 0;
        for (int k = 0; k < 4; k++) {
            seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            total += (int64_t)(seed >> 44);
        }
        x[i] = (float)(total - (1 << 21)) / 1048576.0f * scale;
        if (i < zeros) x[i] = 0;
    }
    return x;
}

static size_t count_different(const void *a, const void *b, size_t n, size_t size) {
    size_t differ = 0;
    for (size_t i = 0; i < n; i++) differ += memcmp((const char *)a + i * size, (const char *)b + i * size, size) != 0;
    return differ;
}

static void test_tables(void) {
    float map[256], table[16];
    take(map, sizeof map);
    CHECK(count_different(map, usli_dynamic_map, 256, 4) == 0, "the signed map");
    take(map, sizeof map);
    CHECK(count_different(map, usli_dynamic_map_unsigned, 256, 4) == 0, "the unsigned map");
    take(table, sizeof table);
    CHECK(count_different(table, usli_nf4_table, 16, 4) == 0, "the NF4 table");
    take(table, sizeof table);
    for (int i = 0; i < 16; i++) CHECK(table[i] == usli_fp4_table[i], "FP4 value %d", i);
}

static void test_nf4(int64_t n, float scale, uint64_t seed, int64_t zeros) {
    float *x = make_values(n, scale, seed, zeros), *scratch = malloc((size_t)usli_nf4_blocks(n) * sizeof(float));
    float *decoded = malloc((size_t)n * sizeof(float));
    size_t bytes = usli_nf4_bytes(n), code_bytes = (size_t)(n + 1) / 2, blocks = (size_t)usli_nf4_blocks(n);
    size_t nests = (size_t)usli_nf4_nests(n);
    uint8_t *storage = aligned_alloc(64, bytes), *codes = malloc(code_bytes), *absmax_q = malloc(blocks);
    float *absmax2 = malloc(nests * sizeof(float)), offset, picks[16];
    take(codes, code_bytes);
    take(absmax_q, blocks);
    take(absmax2, nests * sizeof(float));
    take(&offset, sizeof offset);
    take(picks, sizeof picks);

    usli_nf4 q;
    usli_nf4_layout(storage, n, &q);
    CHECK(q.absmax_q + blocks <= storage + bytes, "the layout of %lld values fits", (long long)n);
    usli_nf4_quantize(&q, x, n, scratch);
    size_t differ = count_different(q.codes, codes, code_bytes, 1);
    CHECK(differ == 0, "%lld x %g: %zu of %zu code bytes differ", (long long)n, (double)scale, differ, code_bytes);
    differ = count_different(q.absmax_q, absmax_q, blocks, 1);
    CHECK(differ == 0, "%lld x %g: %zu of %zu absmax codes differ", (long long)n, (double)scale, differ, blocks);
    /* torch's mean rounds in an order of its own; ours is rounded once. */
    CHECK(fabsf(q.offset - offset) <= 1.2e-7f * fabsf(offset), "offset %.9g, not %.9g", (double)q.offset,
          (double)offset);
    for (size_t i = 0; i < nests; i++)
        CHECK(fabsf(q.absmax2[i] - absmax2[i]) <= 2.4e-7f * fabsf(offset), "absmax2 %.9g, not %.9g",
              (double)q.absmax2[i], (double)absmax2[i]);

    /* With bitsandbytes' constants the decoded values are its own to the bit. */
    usli_nf4 theirs = { .codes = codes,
                        .absmax_q = absmax_q,
                        .absmax2 = absmax2,
                        .offset = offset,
                        .table = usli_nf4_table,
                        .map = usli_dynamic_map };
    usli_nf4_decode(&theirs, 0, n, decoded);
    for (int64_t i = 0; i < 16; i++) {
        float got = decoded[i * n / 16];
        CHECK(got == picks[i], "%lld values: value %lld is %.9g, not %.9g", (long long)n, (long long)(i * n / 16),
              (double)got, (double)picks[i]);
    }
    /* Any cut gives the values of the whole. */
    for (int64_t first = 0; first < n; first += 37) {
        float part[200];
        int64_t count = n - first < 200 ? n - first : 200;
        usli_nf4_decode(&theirs, first, count, part);
        CHECK(memcmp(part, decoded + first, (size_t)count * sizeof *part) == 0, "%lld values from %lld",
              (long long)count, (long long)first);
    }
    free(x), free(scratch), free(decoded), free(storage), free(codes), free(absmax_q), free(absmax2);
}

/* Through the traits, which take whole blocks only; the reference's last short block is left out. */
static void test_fp4(int64_t n, float scale, uint64_t seed, int64_t zeros) {
    float *x = make_values(n, scale, seed, zeros);
    size_t code_bytes = (size_t)(n + 1) / 2, blocks = (size_t)usli_nf4_blocks(n);
    uint8_t codes[256], row[256];
    float absmax[16], decoded[256];
    take(codes, code_bytes);
    take(absmax, blocks * sizeof *absmax);
    int64_t whole = n / 64 * 64;
    const usli_traits *t = usli_traits_of(USL_FP4);
    t->encode(x, NULL, row, whole);
    CHECK(memcmp(row, codes, (size_t)whole / 2) == 0, "FP4 codes");
    CHECK(memcmp(row + whole / 2, absmax, (size_t)whole / 64 * 4) == 0, "FP4 absmax");
    t->decode(row, decoded, whole);
    for (int64_t i = 0; i < whole; i++) {
        float want = usli_fp4_table[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax[i / 64];
        CHECK(decoded[i] == want, "FP4 value %lld", (long long)i);
    }
    free(x);
}

/* bitsandbytes' CPU rounding to 65536 steps, which ours leaves out: with it applied the codes must be the same. */
static float grid_step(float x) {
    return -1.0f + 2.0f * (float)(int)fmaf((x + 1.0f) * 0.5f, 65535.0f, 0.5f) / 65535.0f;
}

static void test_map(int64_t n, float scale, uint64_t seed, int64_t zeros, bool is_signed) {
    const float *map = is_signed ? usli_dynamic_map : usli_dynamic_map_unsigned;
    float *x = make_values(n, scale, seed, zeros), absmax[4], want_absmax[4], bounds[256], decoded[1024];
    uint8_t codes[1024], want[1024];
    take(want, (size_t)n);
    take(want_absmax, (size_t)(n + 255) / 256 * sizeof *absmax);
    for (int64_t i = 0; i < n; i++) x[i] = is_signed ? x[i] : x[i] * x[i];
    usli_quantize_blockwise(x, n, map, codes, absmax);
    CHECK(memcmp(absmax, want_absmax, (size_t)(n + 255) / 256 * sizeof *absmax) == 0, "absmax of %lld", (long long)n);
    usli_map_bounds(map, bounds);
    usli_dequantize_blockwise(codes, n, map, absmax, decoded);
    for (int64_t i = 0; i < n; i++) {
        float block = absmax[i / 256], z = block > 0 ? x[i] * (1.0f / block) : 0;
        int grid = block > 0 ? usli_map_code(bounds, grid_step(z)) : 0, nearest = 0;
        CHECK(grid == want[i], "value %lld: code %d, not %d", (long long)i, grid, want[i]);
        if (block == 0) continue;
        for (int k = 1; k < 256; k++)
            if (fabs((double)map[k] - (double)z) < fabs((double)map[nearest] - (double)z)) nearest = k;
        CHECK(codes[i] == nearest, "value %lld: code %d is not the nearest, %d", (long long)i, codes[i], nearest);
        CHECK(decoded[i] == map[nearest] * block, "value %lld decoded", (long long)i);
    }
    free(x);
}

/* Every entry of a map is its own nearest, also after a sign of zero, and NaN stays inside the table. */
static void test_map_edges(void) {
    for (int m = 0; m < 2; m++) {
        const float *map = m ? usli_dynamic_map_unsigned : usli_dynamic_map;
        float bounds[256];
        usli_map_bounds(map, bounds);
        for (int i = 0; i < 256; i++) {
            CHECK(usli_map_code(bounds, map[i]) == i, "entry %d", i);
            if (i == 255) continue;
            CHECK(usli_map_code(bounds, bounds[i]) == i, "the middle above entry %d", i);
            CHECK(usli_map_code(bounds, nextafterf(bounds[i], 2)) == i + 1, "just past the middle above %d", i);
        }
        CHECK(usli_map_code(bounds, INFINITY) == 255 && usli_map_code(bounds, -INFINITY) == 0, "infinities");
        CHECK(usli_map_code(bounds, NAN) == 0, "NaN");
    }
    CHECK(usli_nf4_bytes(-1) == 0 && usli_nf4_bytes(INT64_MAX) == 0, "hostile counts");
    CHECK(usli_nf4_bytes(0) == 0 && usli_nf4_bytes(1) == 192, "small counts");
}

int main(void) {
    test_map_edges();
    reference = fopen("tests/quant/nf4_reference.bin", "rb");
    if (!reference) {
        SKIP("tests/quant/nf4_reference.bin: run from the root of the repository");
        return test_end("nf4");
    }
    test_tables();
    test_nf4(64, 1.0f, 1, 0);
    test_nf4(4096, 0.02f, 2, 0);
    test_nf4(300, 1e-3f, 3, 0);
    test_nf4(1001, 50.0f, 4, 0);
    test_nf4(20032, 1.0f, 5, 128);
    test_nf4(64, 1e-30f, 6, 0);
    test_nf4(1, 3.0f, 7, 0);
    test_nf4(130, 1.0f, 8, 130);
    test_fp4(192, 1.0f, 9, 0);
    test_fp4(77, 0.1f, 10, 0);
    test_map(1024, 1.0f, 11, 0, true);
    test_map(700, 1e-4f, 12, 256, true);
    test_map(600, 1e-8f, 13, 0, false);
    CHECK(fgetc(reference) == EOF, "the reference holds more");
    fclose(reference);
    return test_end("nf4");
}
