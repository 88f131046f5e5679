/* The row helpers: every instruction set this processor has gives what plain loops in double give, and exactly the same
 * where nothing is summed. */
#include "core/cpu/vec.h"

#include "core/base/half.h"
#include "tests/ops/rig.h"

enum { N = 203 };

static float x[N], y[N];
static uint16_t h[N];
static uint8_t codes[N];

static void fill(void) {
    usli_rng rng;
    usli_rng_seed(&rng, 4);
    for (int i = 0; i < N; i++) {
        x[i] = (float)usli_rng_normal(&rng);
        y[i] = (float)usli_rng_normal(&rng);
        h[i] = usli_f32_to_bf16((float)usli_rng_normal(&rng));
        codes[i] = (uint8_t)usli_rng_u32(&rng);
    }
}

static void check_conversions(const char *isa, const usli_vec *v) {
    static float f[65536], back[65536];
    static uint16_t all[65536], again[65536];
    for (int i = 0; i < 65536; i++) all[i] = (uint16_t)i;
    v->bf16_to_f32(all, f, 65536);
    v->f32_to_bf16(f, again, 65536);
    for (int i = 0; i < 65536; i++)
        CHECK(again[i] == usli_f32_to_bf16(usli_bf16_to_f32(all[i])), "%s: bf16 %x", isa, i);
    v->f16_to_f32(all, back, 65536);
    v->f32_to_f16(f, again, 65536);
    for (int i = 0; i < 65536; i++) {
        uint32_t want = usli_float_as_u32(usli_f16_to_f32(all[i]));
        CHECK(usli_float_as_u32(back[i]) == want, "%s: f16 %x", isa, i);
        CHECK(again[i] == usli_f32_to_f16(f[i]), "%s: to f16, %g", isa, (double)f[i]);
    }
}

static void check_sums(const char *isa, const usli_vec *v) {
    for (int n = 0; n <= N; n += 7) {
        double dot = 0, dot_h = 0, dot3 = 0, size = 1e-6;
        float max = -INFINITY;
        for (int i = 0; i < n; i++) {
            dot += (double)x[i] * (double)y[i];
            dot_h += (double)usli_bf16_to_f32(h[i]) * (double)y[i];
            dot3 += (double)x[i] * (double)y[i] * (double)x[i];
            size += fabs((double)x[i] * (double)y[i]) * (1 + fabs((double)x[i]));
            max = x[i] > max ? x[i] : max;
        }
        CHECK(fabs(dot - (double)v->dot(x, y, n)) <= 1e-6 * size, "%s: dot of %d", isa, n);
        CHECK(fabs(dot_h - (double)v->dot_bf16(h, y, n)) <= 1e-5 * size, "%s: dot_bf16 of %d", isa, n);
        CHECK(fabs(dot3 - (double)v->dot3(x, y, x, n)) <= 1e-6 * size, "%s: dot3 of %d", isa, n);
        CHECK(v->max(x, n) == max, "%s: max of %d", isa, n);
    }
}

static void check_lut16(const char *isa, const usli_vec *v) {
    for (int n = 0; n <= 2 * N; n += 2)
        for (int round = 0; round < 2; round++) {
            float got[2 * N];
            v->lut16(codes, x, 0.37f, round, got, n);
            for (int i = 0; i < n; i++) {
                float want = x[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * 0.37f;
                if (round) want = usli_bf16_to_f32(usli_f32_to_bf16(want));
                CHECK(got[i] == want, "%s: value %d of %d: %g, not %g", isa, i, n, (double)got[i], (double)want);
            }
        }
}

static void check_drop(const char *isa, const usli_vec *v) {
    float got[N];
    for (int n = 1; n <= N; n += 5) {
        v->drop(0x123456789abcdefu, 7, 1, 2, 3, 0x50000000u, 1.5f, x, got, n);
        for (int i = 0; i < n; i++) {
            uint32_t words[4];
            usli_philox(0x123456789abcdefu, (uint64_t)(7 + i / 4) | (uint64_t)1 << 32, (uint64_t)2 | (uint64_t)3 << 32,
                        words);
            CHECK(got[i] == (words[i % 4] < 0x50000000u ? 0 : x[i] * 1.5f), "%s: value %d of %d", isa, i, n);
        }
    }
}

/* exp is within an ulp from where it is a normal number up to 88; below it is 0, and no number stays none. */
static void check_exp(const char *isa, const usli_vec *v) {
    double worst = 0;
    for (int i = 0; i < 100000; i++) {
        float in = -87.2f + (float)i * (175.0f / 100000), e = in;
        v->exp_sum(&e, 0, 1);
        worst = fmax(worst, fabs((double)e / exp((double)in) - 1));
    }
    CHECK(worst < 1.3e-7, "%s: exp is off by %g", isa, worst);
    float edge[40] = { -INFINITY, -89, -1e30f, NAN, 0, 1 };
    float sum = v->exp_sum(edge, 0, 3);
    CHECK(sum == 0 && edge[0] == 0 && edge[1] == 0 && edge[2] == 0, "%s: exp far below", isa);
    CHECK(v->exp_sum(edge + 4, 0, 1) == 1 && isnan(v->exp_sum(edge + 3, 0, 1)), "%s: exp of 0 and of no number", isa);
    for (int i = 0; i < 40; i++) edge[i] = i == 17 ? NAN : -1;
    CHECK(isnan(v->exp_sum(edge, 0, 40)) && isnan(edge[17]) && !isnan(edge[16]), "%s: exp among others", isa);
    /* A large value and many small ones: their sum is lost at most within the large one's piece of 256. */
    enum { LONG = 100000 };
    float *many = malloc(sizeof *many * LONG);
    for (int i = 0; i < LONG; i++) many[i] = i ? -16 : 0;
    double want = 1 + (LONG - 1) * exp(-16.0);
    CHECK(fabs((double)v->exp_sum(many, 0, LONG) / want - 1) < 1e-6, "%s: sum of many", isa);
    free(many);
}

static void check_tanh(const char *isa, const usli_vec *v) {
    double worst = 0;
    for (int i = 0; i < 100000; i++) {
        float in = -12 + (float)i * (24.0f / 100000), t = in;
        v->tanh(&t, 1);
        worst = fmax(worst, fabs((double)t - tanh((double)in)) / (fabs(tanh((double)in)) + 1e-30));
    }
    CHECK(worst < 4e-7, "%s: tanh is off by %g", isa, worst);
}

static void check_rows(const char *isa, const usli_vec *v) {
    float a[N], b[N], c[N];
    for (int n = 0; n <= N; n += 29) {
        memcpy(a, y, sizeof a), memcpy(b, y, sizeof b), memcpy(c, y, sizeof c);
        v->add_times(0.5f, x, y, a, n), v->norm_backward(0.7f, 0.3f, x, y, b, b, n), v->times(0.5f, x, y, c, n);
        for (int i = 0; i < N; i++) {
            double xi = (double)x[i], yi = (double)y[i];
            CHECK(fabs((double)a[i] - (i < n ? yi + 0.5 * xi * yi : yi)) < 1e-6, "%s: add_times", isa);
            CHECK(fabs((double)b[i] - (i < n ? 0.7 * (yi * yi - xi * 0.3) : yi)) < 2e-6, "%s: norm_backward", isa);
            CHECK(fabs((double)c[i] - (i < n ? 0.5 * xi * yi : yi)) < 1e-6, "%s: times", isa);
        }
    }
}

/* Every remainder of tiles, both orders of a, both modes. */
static void check_mul(const char *isa, const usli_vec *v) {
    enum { M = 21, WIDTH = 71, K = 19, LD = WIDTH + 2 };
    static float a[M * K], b[K * LD], c[M * LD], before[M * LD];
    usli_rng rng;
    usli_rng_seed(&rng, 12);
    for (int i = 0; i < M * K; i++) a[i] = (float)usli_rng_normal(&rng);
    for (int i = 0; i < K * LD; i++) b[i] = (float)usli_rng_normal(&rng);
    for (int i = 0; i < M * LD; i++) before[i] = (float)usli_rng_normal(&rng);
    for (int m = 1; m <= M; m += 3)
        for (int n = 1; n <= WIDTH; n += 5)
            for (int mode = 0; mode < 4; mode++) {
                bool turned = mode & 1, accumulate = mode & 2;
                int k = m % 2 ? K : 1, wrong = 0;
                memcpy(c, before, sizeof c);
                v->mul(m, n, k, a, turned ? 1 : K, turned ? M : 1, b, LD, c, LD, accumulate);
                for (int i = 0; i < M; i++)
                    for (int j = 0; j < LD; j++) {
                        double sum = accumulate ? (double)before[i * LD + j] : 0;
                        for (int p = 0; p < k; p++)
                            sum += (double)a[turned ? i + p * M : i * K + p] * (double)b[p * LD + j];
                        if (i >= m || j >= n) sum = (double)before[i * LD + j];
                        wrong += !(fabs((double)c[i * LD + j] - sum) < 1e-5);
                    }
                CHECK(!wrong, "%s: %d x %d x %d, mode %d: %d values", isa, m, n, k, mode, wrong);
            }
}

static void check_transpose(const char *isa, const usli_vec *v) {
    enum { ROWS = 29, COLS = 27, LD = COLS + 3, LDD = ROWS + 2 };
    static float src[ROWS * LD], dst[COLS * LDD];
    for (int i = 0; i < ROWS * LD; i++) src[i] = (float)i;
    for (int rows = 1; rows <= ROWS; rows += 4)
        for (int cols = 1; cols <= COLS; cols += 2) {
            int wrong = 0;
            memset(dst, 0, sizeof dst);
            v->transpose(src, rows, cols, LD, dst, LDD);
            for (int c = 0; c < COLS; c++)
                for (int r = 0; r < LDD; r++) wrong += dst[c * LDD + r] != (r < rows && c < cols ? src[r * LD + c] : 0);
            CHECK(!wrong, "%s: transpose of %d by %d", isa, rows, cols);
        }
}

/* Every remainder of tiles, odd and even sums, both modes: against double. */
static void check_pairs(const char *isa, const usli_vec *v) {
    enum { M = 70, WIDTH = 71, K = 75, EVEN = K + 1, LD = WIDTH + 2 };
    static float values[K * WIDTH], c[M * LD], before[M * LD];
    static uint16_t a[M * EVEN], b[K * WIDTH];
    static uint32_t pairs[EVEN / 2 * WIDTH], again[EVEN / 2 * WIDTH];
    usli_rng rng;
    usli_rng_seed(&rng, 13);
    for (int i = 0; i < K * WIDTH; i++) values[i] = (float)usli_rng_normal(&rng);
    for (int i = 0; i < M * LD; i++) before[i] = (float)usli_rng_normal(&rng);
    const struct {
        int m, n, k;
    } sizes[] = { { 1, 1, 1 },    { 3, 7, 5 },    { 16, 16, 32 }, { 32, 32, 64 }, { 64, 64, 64 }, { 33, 32, 32 },
                  { 16, 31, 33 }, { 17, 16, 31 }, { 70, 71, 75 }, { 48, 48, 75 }, { 37, 50, 40 }, { 5, 64, 64 } };
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            int m = sizes[s].m, n = sizes[s].n, k = sizes[s].k, deep = (k + 1) / 2, wrong = 0;
            for (int i = 0; i < M * EVEN; i++) a[i] = usli_f32_to_bf16(i % EVEN < k ? values[i % (K * WIDTH)] : 0);
            v->f32_to_bf16(values, b, k * n);
            v->round_pairs(values, k, n, pairs);
            v->pair_rows(b, k, n, n, again);
            CHECK(!memcmp(pairs, again, (size_t)(deep * n) * sizeof *pairs), "%s: pairs of %d by %d", isa, k, n);
            memcpy(c, before, sizeof c);
            v->mul_pairs(m, n, deep, a, EVEN, pairs, n, c, LD, accumulate);
            for (int i = 0; i < M; i++)
                for (int j = 0; j < LD; j++) {
                    double want = accumulate ? (double)before[i * LD + j] : 0, size = 1;
                    for (int p = 0; p < k && i < m && j < n; p++) {
                        double term =
                            (double)usli_bf16_to_f32(a[i * EVEN + p]) * (double)usli_bf16_to_f32(b[p * n + j]);
                        want += term, size += fabs(term);
                    }
                    if (i >= m || j >= n) want = (double)before[i * LD + j];
                    wrong += !(fabs((double)c[i * LD + j] - want) <= 1e-6 * size);
                }
            CHECK(!wrong, "%s: mul_pairs of %d by %d by %d, accumulate %d: %d values are off", isa, m, n, k, accumulate,
                  wrong);
        }
}

static void check_table(const char *isa, const usli_vec *v) {
    check_conversions(isa, v);
    check_sums(isa, v);
    check_lut16(isa, v);
    check_drop(isa, v);
    check_exp(isa, v);
    check_tanh(isa, v);
    check_rows(isa, v);
    check_mul(isa, v);
    check_transpose(isa, v);
    check_pairs(isa, v);
}

static void check_if(const char *isa, const usli_vec *here) {
    if (here)
        check_table(isa, here);
    else
        SKIP("%s: not on this processor", isa);
}

extern const usli_vec usli_vec_tiles; /* AMX's tiles in plain C */

int main(void) {
    fill();
    check_table("generic", &usli_vec_generic);
    check_pairs("tiles in C", &usli_vec_tiles);
#if defined(__x86_64__)
    const usli_vec *best = usli_vec_best();
    check_if("avx2", best == &usli_vec_generic ? NULL : &usli_vec_avx2);
    check_if("avx512", best == &usli_vec_generic || best == &usli_vec_avx2 ? NULL : &usli_vec_avx512);
    check_if("avx512bf16", usli_vec_avx512bf16_here());
    check_if("amx", usli_vec_amx_here());
#endif
    return test_end("test_vec");
}
