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

static void check_table(const char *isa, const usli_vec *v) {
    check_conversions(isa, v);
    check_sums(isa, v);
    check_lut16(isa, v);
    check_drop(isa, v);
}

int main(void) {
    fill();
    check_table("generic", &usli_vec_generic);
#if defined(__x86_64__)
    const usli_vec *best = usli_vec_best();
    if (best != &usli_vec_generic)
        check_table("avx2", &usli_vec_avx2);
    else
        SKIP("avx2: not on this processor");
    if (best == &usli_vec_avx512)
        check_table("avx512", best);
    else
        SKIP("avx512: not on this processor");
#endif
    return test_end("test_vec");
}
