/* Written so that compilers vectorise every loop; built for several instruction sets under several names. */
#include "core/cpu/vec.h"

#include <math.h>
#include <string.h>

#include "core/base/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { PIECE = 256 /* of a long sum */ };

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

static void bf16_to_f32(const uint16_t *src, float *dst, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dst[i] = usli_bf16_to_f32(src[i]);
}

static void f32_to_bf16(const float *src, uint16_t *dst, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dst[i] = usli_f32_to_bf16(src[i]);
}

static void f16_to_f32(const uint16_t *src, float *dst, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dst[i] = usli_f16_to_f32(src[i]);
}

static void f32_to_f16(const float *src, uint16_t *dst, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dst[i] = usli_f32_to_f16(src[i]);
}

/* Table look-ups are the one loop compilers do not see through: a byte in a 64-bit lane, shifted right by 4 in the
 * lower half and as it is in the upper one, is the index of two neighbours; permutations ignore the bits above. There
 * are but 16 values: they are scaled and rounded first. */
static void lut16(const uint8_t *codes, const float *values, float s, int round, float *dst, int64_t n) {
    float table[16];
    for (int j = 0; j < 16; j++) table[j] = values[j] * s;
    if (round)
        for (int j = 0; j < 16; j++) table[j] = usli_bf16_to_f32(usli_f32_to_bf16(table[j]));
    int64_t i = 0;
#if defined(__AVX512F__)
    __m512 all = _mm512_loadu_ps(table);
    for (; i + 16 <= n; i += 16) {
        __m512i lanes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(const void *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(lanes, 4), _mm512_slli_epi64(lanes, 32));
        _mm512_storeu_ps(dst + i, _mm512_permutexvar_ps(index, all));
    }
#elif defined(__AVX2__)
    __m256 low = _mm256_loadu_ps(table);
    __m256 high = _mm256_loadu_ps(table + 8);
    for (; i + 8 <= n; i += 8) {
        int32_t bytes;
        memcpy(&bytes, codes + i / 2, sizeof bytes);
        __m256i lanes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
        __m256i index = _mm256_or_si256(_mm256_srli_epi64(lanes, 4), _mm256_slli_epi64(lanes, 32));
        __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        _mm256_storeu_ps(dst + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                   _mm256_permutevar8x32_ps(high, index), is_high));
    }
#endif
    for (; i < n; i += 2) {
        dst[i] = table[codes[i / 2] >> 4];
        dst[i + 1] = table[codes[i / 2] & 15];
    }
}

static float dot(const float *a, const float *b, int64_t n) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

static float dot_bf16(const uint16_t *a, const float *b, int64_t n) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += usli_bf16_to_f32(a[i]) * b[i];
    return s;
}

static float dot3(const float *a, const float *b, const float *c, int64_t n) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i] * c[i];
    return s;
}

static void drop(uint64_t key, uint32_t group, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t threshold, float keep,
                 const float *x, float *y, int64_t n) {
    enum { GROUPS = 16 };
    uint32_t words[4 * GROUPS];
    for (int64_t begin = 0; begin < n; begin += 4 * GROUPS, group += GROUPS) {
#pragma omp simd
        for (uint32_t i = 0; i < GROUPS; i++) {
            uint32_t a = group + i, b = c1, c = c2, d = c3, k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
            for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
                uint64_t p0 = (uint64_t)0xD2511F53u * a, p1 = (uint64_t)0xCD9E8D57u * c;
                a = (uint32_t)(p1 >> 32) ^ b ^ k0;
                b = (uint32_t)p1;
                c = (uint32_t)(p0 >> 32) ^ d ^ k1;
                d = (uint32_t)p0;
            }
            words[4 * i] = a, words[4 * i + 1] = b, words[4 * i + 2] = c, words[4 * i + 3] = d;
        }
        int64_t count = n - begin < 4 * GROUPS ? n - begin : 4 * GROUPS;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) y[begin + i] = words[i] < threshold ? 0.0f : x[begin + i] * keep;
    }
}

static float max_of(const float *x, int64_t n) {
    enum { LANES = 16 };
    float lane[LANES], m = -INFINITY;
    for (int j = 0; j < LANES; j++) lane[j] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    for (int j = 0; j < LANES; j++) m = lane[j] > m ? lane[j] : m;
    return m;
}

static double squares(const float *x, int64_t n) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)x[i];
    return s;
}

static void axpy(float s, const float *x, float *y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += s * x[i];
}

static void scale(float s, float *y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] *= s;
}

/* exp by 2^k * p(r), |r| <= ln2/2: the Taylor polynomial of degree 7 leaves less than 1 ulp; the result is 0 below -87.3,
 * stays at e^88.3 above, and is no number where x is none. */
static inline float exp_one(float x) {
    float c = x > -88.0f ? x : -88.0f;
    c = c < 88.3f ? c : 88.3f;
    float t = c * 1.44269504088896f + 12582912.0f; /* rounds to the nearest integer, which stands in the low bits */
    float k = t - 12582912.0f;
    float r = c - k * 0.693359375f;
    r -= k * -2.12194440e-4f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    float y = usli_u32_as_float(usli_float_as_u32(p) + (usli_float_as_u32(t) << 23));
    y = x > -87.3f ? y : 0.0f;
    return x != x ? x : y;
}

/* Piece by piece: one large value among many small ones would swallow their sum in float32. */
static float exp_sum(float *x, float shift, int64_t n) {
    double total = 0;
    for (int64_t from = 0; from < n; from += PIECE) {
        int64_t to = from + PIECE < n ? from + PIECE : n;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = from; i < to; i++) {
            float e = exp_one(x[i] - shift);
            x[i] = e;
            s += e;
        }
        total += (double)s;
    }
    return (float)total;
}

static inline float tanh_one(float x) {
    /* Near 0 the quotient would lose digits: an odd polynomial there. */
    float a = x < 0 ? -x : x, q = x * x;
    float small = x + x * q * (-0.333333333f + q * (0.133333333f + q * (-0.0539682540f + q * 0.0218694885f)));
    float e = exp_one(-2.0f * a);
    float big = (1.0f - e) / (1.0f + e);
    big = x < 0 ? -big : big;
    return a < 0.25f ? small : big;
}

static void tanh_all(float *x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = tanh_one(x[i]);
}

/* gelu by erf is rare, so libm's is used, one value at a time. */
static inline void gelu_erf(float x, float *y, float *dy) {
    float cdf = 0.5f * erfcf(x * -0.70710678f);
    *y = x * cdf;
    *dy = cdf + x * 0.39894228f * exp_one(-0.5f * x * x);
}

/* (1 + tanh u) / 2 is the sigmoid of 2 u, which keeps its digits where tanh is near -1. */
static inline void gelu_tanh(float x, float *y, float *dy) {
    float u = 1.59576912f * (x + 0.044715f * x * x * x), e = exp_one(-u), s = 1.0f / (1.0f + e);
    *y = x * s;
    *dy = s + x * s * (e * s) * 1.59576912f * (1.0f + 3.0f * 0.044715f * x * x);
}

static inline void silu(float x, float *y, float *dy) {
    float s = 1.0f / (1.0f + exp_one(-x));
    *y = x * s;
    *dy = s * (1.0f + x * (1.0f - s));
}

#define SIMD _Pragma("omp simd")
#define PLAIN /* libm's functions are not vectorised */
#define GLU_LOOPS(name, act, how)                                                                                   \
    static void name##_glu(const float *g, const float *u, float *h, int64_t n) {                                   \
        how for (int64_t i = 0; i < n; i++) {                                                                       \
            float y, dy;                                                                                            \
            act(g[i], &y, &dy);                                                                                     \
            h[i] = y * u[i];                                                                                        \
        }                                                                                                           \
    }                                                                                                               \
    static void name##_backward(const float *g, const float *u, const float *dh, float *dg, float *du, int64_t n) { \
        how for (int64_t i = 0; i < n; i++) {                                                                       \
            float y, dy, d = dh[i], up = u[i];                                                                      \
            act(g[i], &y, &dy);                                                                                     \
            dg[i] = d * up * dy;                                                                                    \
            du[i] = d * y;                                                                                          \
        }                                                                                                           \
    }
GLU_LOOPS(silu, silu, SIMD)
GLU_LOOPS(gelu_tanh, gelu_tanh, SIMD)
GLU_LOOPS(gelu_erf, gelu_erf, PLAIN)

static void glu(int act, const float *g, const float *u, float *h, int64_t n) {
    (act == 0 ? silu_glu : act == 1 ? gelu_tanh_glu : gelu_erf_glu)(g, u, h, n);
}

static void glu_backward(int act, const float *g, const float *u, const float *dh, float *dg, float *du, int64_t n) {
    (act == 0 ? silu_backward : act == 1 ? gelu_tanh_backward : gelu_erf_backward)(g, u, dh, dg, du, n);
}

static void adamw(const usli_adamw_factors *factors, float *w, float *g, float *m, float *v, int64_t n) {
    const usli_adamw_factors f = *factors;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float d = g[i] * f.clip, mi = f.beta1 * m[i] + f.rest1 * d, vi = f.beta2 * v[i] + f.rest2 * d * d;
        m[i] = mi, v[i] = vi, g[i] = 0;
        w[i] = w[i] * f.decay - f.step * mi / (sqrtf(vi) / f.root2 + f.eps);
    }
}

static void column_max(const float *x, int64_t rows, int64_t n, float *top) {
    for (int64_t r = 0; r < rows; r++, x += n)
#pragma omp simd
        for (int64_t i = 0; i < n; i++) top[i] = x[i] > top[i] ? x[i] : top[i];
}

static void column_exp(float *x, int64_t rows, int64_t n, const float *shift, float *sum) {
    for (int64_t r = 0; r < rows; r++, x += n) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) x[i] = exp_one(x[i] - shift[i]);
        if (!sum) continue;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) sum[i] += x[i];
    }
}

static void column_scale(float *x, int64_t rows, int64_t n, const float *factor) {
    for (int64_t r = 0; r < rows; r++, x += n)
#pragma omp simd
        for (int64_t i = 0; i < n; i++) x[i] *= factor[i];
}

static void column_softmax_backward(const float *p, float *dp, int64_t rows, int64_t n, const float *delta) {
    for (int64_t r = 0; r < rows; r++, p += n, dp += n)
#pragma omp simd
        for (int64_t i = 0; i < n; i++) dp[i] = p[i] * (dp[i] - delta[i]);
}

/* A tile of c stays in registers while k runs: TALL rows of WIDE registers, sized for 32 registers with AVX-512, 16
 * elsewhere. */
#if defined(__AVX512F__)
enum { LANES = 16, TALL = 8, WIDE = 2 };
#elif defined(__AVX2__)
enum { LANES = 8, TALL = 6, WIDE = 2 };
#else
enum { LANES = 4, TALL = 4, WIDE = 2 };
#endif
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

static inline lanes load_lanes(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline __attribute__((always_inline)) void tile(int tall, int wide, int64_t k, const float *a, int64_t ia, int64_t pa,
                                                       const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
    lanes acc[TALL][WIDE];
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) acc[i][j] = accumulate ? load_lanes(c + i * ldc + j * LANES) : (lanes){ 0 };
    for (int64_t p = 0; p < k; p++, a += pa, b += ldb) {
        lanes row[WIDE];
        for (int j = 0; j < wide; j++) row[j] = load_lanes(b + j * LANES);
        for (int i = 0; i < tall; i++)
            for (int j = 0; j < wide; j++) acc[i][j] += a[i * ia] * row[j];
    }
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) memcpy(c + i * ldc + j * LANES, &acc[i][j], sizeof acc[i][j]);
}

/* All rows of one panel of columns; the number of columns is a constant wherever this is inlined. */
static inline __attribute__((always_inline)) void panel(int wide, int64_t m, int64_t k, const float *a, int64_t ia, int64_t pa,
                                                        const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
    int64_t i = 0;
    for (; i + TALL <= m; i += TALL) tile(TALL, wide, k, a + i * ia, ia, pa, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 2 <= m; i += 2) tile(2, wide, k, a + i * ia, ia, pa, b, ldb, c + i * ldc, ldc, accumulate);
    if (i < m) tile(1, wide, k, a + i * ia, ia, pa, b, ldb, c + i * ldc, ldc, accumulate);
}

static void mul(int64_t m, int64_t n, int64_t k, const float *a, int64_t ia, int64_t pa, const float *b, int64_t ldb, float *c,
                int64_t ldc, int accumulate) {
    int64_t j = 0;
    for (; j + WIDE * LANES <= n; j += WIDE * LANES) panel(WIDE, m, k, a, ia, pa, b + j, ldb, c + j, ldc, accumulate);
    for (; j + LANES <= n; j += LANES) panel(1, m, k, a, ia, pa, b + j, ldb, c + j, ldc, accumulate);
    if (j == n) return;
    for (int64_t i = 0; i < m; i++) {
        float acc[LANES] = { 0 };
        for (int64_t p = 0; p < k; p++) {
            float s = a[i * ia + p * pa];
            for (int64_t q = 0; q < n - j; q++) acc[q] += s * b[p * ldb + j + q];
        }
        for (int64_t q = 0; q < n - j; q++) c[i * ldc + j + q] = (accumulate ? c[i * ldc + j + q] : 0.0f) + acc[q];
    }
}

const usli_vec JOIN(usli_vec_, USLI_VEC_ISA) = {
    .bf16_to_f32 = bf16_to_f32,
    .f32_to_bf16 = f32_to_bf16,
    .f16_to_f32 = f16_to_f32,
    .f32_to_f16 = f32_to_f16,
    .lut16 = lut16,
    .dot = dot,
    .dot_bf16 = dot_bf16,
    .dot3 = dot3,
    .drop = drop,
    .max = max_of,
    .squares = squares,
    .axpy = axpy,
    .scale = scale,
    .exp_sum = exp_sum,
    .glu = glu,
    .glu_backward = glu_backward,
    .tanh = tanh_all,
    .adamw = adamw,
    .column_max = column_max,
    .column_exp = column_exp,
    .column_scale = column_scale,
    .column_softmax_backward = column_softmax_backward,
    .mul = mul,
    .lanes = LANES,
};
