/* Written so that compilers vectorise every loop; built for several instruction sets under several names. */
#include "core/cpu/vec.h"

#include <math.h>
#include <string.h>

#include "core/base/half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { PIECE = 256 /* of a long sum */ };

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

/* A register, and how many of them a product's tile takes: sized for 32 registers with AVX-512, 16 elsewhere. */
#if defined(__AVX512F__)
enum { LANES = 16, TALL = 8, WIDE = 2 };
#elif defined(__AVX2__)
enum { LANES = 8, TALL = 6, WIDE = 2 };
#else
enum { LANES = 4, TALL = 4, WIDE = 2 };
#endif
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t lanes_u32 __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t lanes_u16 __attribute__((vector_size(LANES * sizeof(uint16_t))));

static inline lanes load_lanes(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline lanes load_bf16_lanes(const uint16_t *p) {
    lanes_u16 h;
    memcpy(&h, p, sizeof h);
    lanes_u32 u = __builtin_convertvector(h, lanes_u32) << 16;
    lanes v;
    memcpy(&v, &u, sizeof v);
    return v;
}

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
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(const void *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(dst + i, _mm512_permutexvar_ps(index, all));
    }
#elif defined(__AVX2__)
    __m256 low = _mm256_loadu_ps(table);
    __m256 high = _mm256_loadu_ps(table + 8);
    for (; i + 8 <= n; i += 8) {
        int32_t bytes;
        memcpy(&bytes, codes + i / 2, sizeof bytes);
        __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
        __m256i index = _mm256_or_si256(_mm256_srli_epi64(wide, 4), _mm256_slli_epi64(wide, 32));
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

/* Sums in CHAINS registers at a time, since one would wait for its last addition. */
enum { CHAINS = 4 };

static inline float sum_lanes(const lanes *acc) {
    lanes v = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    float s = 0;
    for (int j = 0; j < LANES; j++) s += v[j];
    return s;
}

#define DOT(name, type, load_a, one)                                                                              \
    static float name(const type *a, const float *b, int64_t n) {                                                 \
        lanes acc[CHAINS] = { 0 };                                                                                \
        int64_t i = 0;                                                                                            \
        for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)                                                      \
            for (int c = 0; c < CHAINS; c++) acc[c] += load_a(a + i + c * LANES) * load_lanes(b + i + c * LANES); \
        for (; i + LANES <= n; i += LANES) acc[0] += load_a(a + i) * load_lanes(b + i);                           \
        float s = sum_lanes(acc);                                                                                 \
        for (; i < n; i++) s += one(a[i]) * b[i];                                                                 \
        return s;                                                                                                 \
    }
#define SAME(x) (x)
DOT(dot, float, load_lanes, SAME)
DOT(dot_bf16, uint16_t, load_bf16_lanes, usli_bf16_to_f32)

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
    float lane[CHAINS * LANES], m = -INFINITY;
    for (int j = 0; j < CHAINS * LANES; j++) lane[j] = -INFINITY;
    int64_t i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
        for (int j = 0; j < CHAINS * LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    for (int j = 0; j < CHAINS * LANES; j++) m = lane[j] > m ? lane[j] : m;
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

static void add(const float *a, const float *b, float *y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = a[i] + b[i];
}

static void times(float s, const float *a, const float *b, float *y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = s * a[i] * b[i];
}

static void add_times(float s, const float *a, const float *b, float *y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += s * a[i] * b[i];
}

static void norm_backward(float rstd, float k, const float *x, const float *w, const float *dy, float *dx, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dx[i] = rstd * (dy[i] * w[i] - x[i] * k);
}

static void rotate(const float *cosine, const float *sine, float sign, float *x, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float u = x[i], v = x[i + half], s = sign * sine[i];
        x[i] = u * cosine[i] - v * s;
        x[i + half] = v * cosine[i] + u * s;
    }
}

static void scale(float s, float *y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] *= s;
}

/* exp by 2^k * p(r), |r| <= ln2/2, p of degree 6 with the smallest largest relative error there, 4e-9, in few steps
 * that wait for each other. k = -127 makes a factor of 0, so the result is 0 below -88; x must not be above 88, which
 * saves a comparison. The comparison is turned so that what is no number stays so. */
static inline float exp_one(float x) {
    float c = -88.1f > x ? -88.1f : x;
    float t = c * 1.44269504088896f + 12582912.0f; /* rounds to the nearest integer, which stands in the low bits */
    float k = t - 12582912.0f, factor = usli_u32_as_float((usli_float_as_u32(t) + 127) << 23);
    float r = (c - k * 0.693359375f) - k * -2.12194440e-4f, r2 = r * r;
    float low = 0.49999994f + 0.16666521f * r, high = (0.04166839f + 0.008368745f * r) + 0.0013814539f * r2;
    return ((1.0f + r) + r2 * (low + r2 * high)) * factor;
}

/* 1 / (1 + exp(-x)), by exp of what is not positive. */
static inline float sigmoid(float x) {
    float e = exp_one(x < 0 ? x : -x);
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

static float sum_of(const float *x, int64_t n) {
    lanes acc[CHAINS] = { 0 };
    int64_t i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
        for (int c = 0; c < CHAINS; c++) acc[c] += load_lanes(x + i + c * LANES);
    float s = sum_lanes(acc);
    for (; i < n; i++) s += x[i];
    return s;
}

/* Piece by piece: one large value among many small ones would swallow their sum in float32. */
static float exp_sum(float *x, float shift, int64_t n) {
    double total = 0;
    for (int64_t from = 0; from < n; from += PIECE) {
        int64_t to = from + PIECE < n ? from + PIECE : n;
#pragma omp simd
        for (int64_t i = from; i < to; i++) x[i] = exp_one(x[i] - shift);
        total += (double)sum_of(x + from, to - from);
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
    float u = 1.59576912f * (x + 0.044715f * x * x * x), s = sigmoid(u);
    *y = x * s;
    *dy = s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 3.0f * 0.044715f * x * x);
}

static inline void silu(float x, float *y, float *dy) {
    float s = sigmoid(x);
    *y = x * s;
    *dy = s * (1.0f + x * (1.0f - s));
}

#define SIMD _Pragma("omp simd")
#define PLAIN /* libm's functions are not vectorised */
#define GLU_LOOPS(name, act, how)                                                                                \
    static void name##_glu(const float *g, const float *u, float *h, int64_t n) {                                \
        how for (int64_t i = 0; i < n; i++) {                                                                    \
            float y, dy;                                                                                         \
            act(g[i], &y, &dy);                                                                                  \
            h[i] = y * u[i];                                                                                     \
        }                                                                                                        \
    }                                                                                                            \
    static void name##_backward(const float *g, const float *u, const float *dh, float *dg, float *du, float *h, \
                                int64_t n) {                                                                     \
        how for (int64_t i = 0; i < n; i++) {                                                                    \
            float y, dy, d = dh[i], up = u[i];                                                                   \
            act(g[i], &y, &dy);                                                                                  \
            dg[i] = d * up * dy;                                                                                 \
            du[i] = d * y;                                                                                       \
            h[i] = y * up;                                                                                       \
        }                                                                                                        \
    }
GLU_LOOPS(silu, silu, SIMD)
GLU_LOOPS(gelu_tanh, gelu_tanh, SIMD)
GLU_LOOPS(gelu_erf, gelu_erf, PLAIN)

static void glu(int act, const float *g, const float *u, float *h, int64_t n) {
    (act == 0 ? silu_glu : act == 1 ? gelu_tanh_glu : gelu_erf_glu)(g, u, h, n);
}

static void glu_backward(int act, const float *g, const float *u, const float *dh, float *dg, float *du, float *h,
                         int64_t n) {
    (act == 0 ? silu_backward : act == 1 ? gelu_tanh_backward : gelu_erf_backward)(g, u, dh, dg, du, h, n);
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

static void column_exp(float factor, float *x, int64_t rows, int64_t n, const float *shift, float *sum) {
    for (int64_t r = 0; r < rows; r++, x += n)
        if (sum) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                float e = exp_one(factor * x[i] - shift[i]);
                x[i] = e;
                sum[i] += e;
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) x[i] = exp_one(factor * x[i] - shift[i]);
        }
}

static void column_softmax_backward(const float *p, float *dp, int64_t rows, int64_t n, const float *delta) {
    for (int64_t r = 0; r < rows; r++, p += n, dp += n)
#pragma omp simd
        for (int64_t i = 0; i < n; i++) dp[i] = p[i] * (dp[i] - delta[i]);
}

/* A tile of c stays in registers while k runs: TALL rows of WIDE registers. */
static inline __attribute__((always_inline)) void tile(int tall, int wide, int64_t k, const float *a, int64_t ia,
                                                       int64_t pa, const float *b, int64_t ldb, float *c, int64_t ldc,
                                                       int accumulate) {
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
static inline __attribute__((always_inline)) void panel(int wide, int64_t m, int64_t k, const float *a, int64_t ia,
                                                        int64_t pa, const float *b, int64_t ldb, float *c, int64_t ldc,
                                                        int accumulate) {
    int64_t i = 0;
    for (; i + TALL <= m; i += TALL) tile(TALL, wide, k, a + i * ia, ia, pa, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 4 <= m; i += 4) tile(4, wide, k, a + i * ia, ia, pa, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 2 <= m; i += 2) tile(2, wide, k, a + i * ia, ia, pa, b, ldb, c + i * ldc, ldc, accumulate);
    if (i < m) tile(1, wide, k, a + i * ia, ia, pa, b, ldb, c + i * ldc, ldc, accumulate);
}

static void mul(int64_t m, int64_t n, int64_t k, const float *a, int64_t ia, int64_t pa, const float *b, int64_t ldb,
                float *c, int64_t ldc, int accumulate) {
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

/* 32 bits each. Blocks of 8 by 8 in registers; else strips, so that lines of either side are used while they are there.
 */
#if defined(__AVX2__)
static void transpose_block(const float *src, int64_t ld, float *dst, int64_t ldd) {
    enum { SIDES = 8 };
    __m256 row[SIDES], pair[SIDES], four[SIDES];
    for (int i = 0; i < SIDES; i++) row[i] = _mm256_loadu_ps(src + i * ld);
    for (int i = 0; i < SIDES; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < SIDES; i += 4)
        for (int k = 0; k < 2; k++) {
            four[i + 2 * k] = _mm256_shuffle_ps(pair[i + k], pair[i + 2 + k], 0x44);
            four[i + 2 * k + 1] = _mm256_shuffle_ps(pair[i + k], pair[i + 2 + k], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + i * ldd, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(dst + (i + 4) * ldd, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}
#endif

static void transpose_strip(const float *src, int64_t rows, int64_t cols, int64_t ld, float *dst, int64_t ldd) {
    for (int64_t c = 0; c < cols; c++)
        for (int64_t i = 0; i < rows; i++) dst[c * ldd + i] = src[i * ld + c];
}

static void transpose(const float *src, int64_t rows, int64_t cols, int64_t ld, float *dst, int64_t ldd) {
    enum { STRIP = 8 };
    for (int64_t r = 0; r < rows; r += STRIP, src += STRIP * ld, dst += STRIP) {
        int64_t c = 0;
#if defined(__AVX2__)
        for (; rows - r >= STRIP && c + STRIP <= cols; c += STRIP) transpose_block(src + c, ld, dst + c * ldd, ldd);
#endif
        transpose_strip(src + c, rows - r < STRIP ? rows - r : STRIP, cols - c, ld, dst + c * ldd, ldd);
    }
}

/* ---- Pairs: products of bfloat16 numbers, two of a sum in one word --------------------------------------------------
 */

static void pair_rows(const uint16_t *x, int64_t rows, int64_t n, int64_t ld, uint32_t *dst) {
    for (int64_t r = 0; r < rows; r += 2, x += 2 * ld, dst += n) {
        const uint16_t *odd = x + ld;
        if (r + 1 < rows) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) dst[i] = x[i] | (uint32_t)odd[i] << 16;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) dst[i] = x[i];
        }
    }
}

static void round_pairs(const float *x, int64_t rows, int64_t n, uint32_t *dst) {
    for (int64_t r = 0; r < rows; r += 2, x += 2 * n, dst += n) {
        const float *odd = x + n;
        if (r + 1 < rows) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) dst[i] = usli_f32_to_bf16(x[i]) | (uint32_t)usli_f32_to_bf16(odd[i]) << 16;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) dst[i] = usli_f32_to_bf16(x[i]);
        }
    }
}

static inline uint32_t load_word(const uint16_t *p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

static inline lanes_u32 load_words(const uint32_t *p) {
    lanes_u32 v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* acc += both products of each word's halves. */
static inline lanes add_pairs(lanes acc, lanes_u32 a, lanes_u32 b) {
#if defined(__AVX512BF16__)
    return (lanes)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    lanes low_a = (lanes)(a << 16), low_b = (lanes)(b << 16), high_a = (lanes)(a & 0xffff0000u),
          high_b = (lanes)(b & 0xffff0000u);
    return acc + low_a * low_b + high_a * high_b;
#endif
}

static inline __attribute__((always_inline)) void pair_tile(int tall, int wide, int64_t k, const uint16_t *a,
                                                            int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                                                            int64_t ldc, int accumulate) {
    lanes acc[TALL][WIDE];
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) acc[i][j] = accumulate ? load_lanes(c + i * ldc + j * LANES) : (lanes){ 0 };
    for (int64_t p = 0; p < k; p++, a += 2, b += ldb) {
        lanes_u32 row[WIDE];
        for (int j = 0; j < wide; j++) row[j] = load_words(b + j * LANES);
        for (int i = 0; i < tall; i++) {
            lanes_u32 word = load_word(a + i * lda) - (lanes_u32){ 0 };
            for (int j = 0; j < wide; j++) acc[i][j] = add_pairs(acc[i][j], word, row[j]);
        }
    }
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) memcpy(c + i * ldc + j * LANES, &acc[i][j], sizeof acc[i][j]);
}

static inline __attribute__((always_inline)) void pair_panel(int wide, int64_t m, int64_t k, const uint16_t *a,
                                                             int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                                                             int64_t ldc, int accumulate) {
    int64_t i = 0;
    for (; i + TALL <= m; i += TALL) pair_tile(TALL, wide, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 4 <= m; i += 4) pair_tile(4, wide, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i < m; i++) pair_tile(1, wide, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
}

static void vector_mul_pairs(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint32_t *b,
                             int64_t ldb, float *c, int64_t ldc, int accumulate) {
    int64_t j = 0;
    for (; j + WIDE * LANES <= n; j += WIDE * LANES) pair_panel(WIDE, m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
    for (; j + LANES <= n; j += LANES) pair_panel(1, m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
    for (int64_t i = 0; i < m && j < n; i++) {
        float acc[LANES] = { 0 };
        for (int64_t p = 0; p < k; p++) {
            float low = usli_bf16_to_f32(a[i * lda + 2 * p]), high = usli_bf16_to_f32(a[i * lda + 2 * p + 1]);
            for (int64_t q = 0; q < n - j; q++) {
                uint32_t word = b[p * ldb + j + q];
                acc[q] += low * usli_u32_as_float(word << 16) + high * usli_u32_as_float(word & 0xffff0000u);
            }
        }
        for (int64_t q = 0; q < n - j; q++) c[i * ldc + j + q] = (accumulate ? c[i * ldc + j + q] : 0.0f) + acc[q];
    }
}

/* ---- AMX: tiles of 16 by 16 sums, 32 numbers of each at a time
 * --------------------------------------------------- */

#if defined(__AMX_BF16__)
enum { SIDE = 16, DEEP = 16 /* words */ };
#define LOAD_TILE(tile, at, bytes) _tile_loadd(tile, at, bytes)
#define STORE_TILE(tile, at, bytes) _tile_stored(tile, at, bytes)
#define CLEAR_TILE(tile) _tile_zero(tile)
#define MULTIPLY_TILES(sum, a, b) _tile_dpbf16ps(sum, a, b)

/* All eight tiles whole: 16 rows of 64 bytes. */
static void begin_tiles(void) {
    static const struct {
        uint8_t palette, start_row, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = { .palette = 1,
                 .bytes = { 64, 64, 64, 64, 64, 64, 64, 64 },
                 .rows = { SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE } };
    __asm__ volatile("" ::: "memory"); /* what tiles read is in memory by now */
    _tile_loadconfig(&config);
}

static void end_tiles(void) {
    _tile_release();
}
#elif defined(USLI_VEC_TILES)
/* The same in plain C, for a test. */
enum { SIDE = 16, DEEP = 16 };
static _Thread_local uint32_t tile_words[8][SIDE][DEEP];

static void load_tile(int tile, const void *at, int64_t bytes) {
    for (int i = 0; i < SIDE; i++) memcpy(tile_words[tile][i], (const char *)at + i * bytes, 4 * DEEP);
}

static void store_tile(int tile, void *at, int64_t bytes) {
    for (int i = 0; i < SIDE; i++) memcpy((char *)at + i * bytes, tile_words[tile][i], 4 * DEEP);
}

static void multiply_tiles(int sum, int a, int b) {
    for (int m = 0; m < SIDE; m++)
        for (int k = 0; k < DEEP; k++)
            for (int n = 0; n < SIDE; n++) {
                uint32_t left = tile_words[a][m][k], right = tile_words[b][k][n];
                float s = usli_u32_as_float(tile_words[sum][m][n]);
                s += usli_u32_as_float(left << 16) * usli_u32_as_float(right << 16);
                s += usli_u32_as_float(left & 0xffff0000u) * usli_u32_as_float(right & 0xffff0000u);
                tile_words[sum][m][n] = usli_float_as_u32(s);
            }
}
#define LOAD_TILE(tile, at, bytes) load_tile(tile, at, bytes)
#define STORE_TILE(tile, at, bytes) store_tile(tile, at, bytes)
#define CLEAR_TILE(tile) memset(tile_words[tile], 0, sizeof tile_words[tile])
#define MULTIPLY_TILES(sum, a, b) multiply_tiles(sum, a, b)
static void begin_tiles(void) {}
static void end_tiles(void) {}
#endif

#if defined(__AMX_BF16__) || defined(USLI_VEC_TILES)
/* One or two tiles down and across; tiles 0 to 3 are sums, 4 and 5 of a, 6 and 7 of b. k: words, a multiple of DEEP. */
static inline __attribute__((always_inline)) void block(int tall, int wide, int64_t k, const uint16_t *a, int64_t lda,
                                                        const uint32_t *b, int64_t ldb, float *c, int64_t ldc,
                                                        int accumulate) {
    int64_t from_a = lda * (int64_t)sizeof *a, from_b = ldb * (int64_t)sizeof *b, from_c = ldc * (int64_t)sizeof *c;
    float *below = c + SIDE * ldc;
    if (accumulate) {
        LOAD_TILE(0, c, from_c);
        if (wide > 1) LOAD_TILE(1, c + SIDE, from_c);
        if (tall > 1) LOAD_TILE(2, below, from_c);
        if (tall > 1 && wide > 1) LOAD_TILE(3, below + SIDE, from_c);
    } else {
        CLEAR_TILE(0);
        CLEAR_TILE(1);
        CLEAR_TILE(2);
        CLEAR_TILE(3);
    }
    for (int64_t p = 0; p < k; p += DEEP, a += 2 * DEEP, b += DEEP * ldb) {
        LOAD_TILE(6, b, from_b);
        LOAD_TILE(4, a, from_a);
        MULTIPLY_TILES(0, 4, 6);
        if (wide > 1) {
            LOAD_TILE(7, b + SIDE, from_b);
            MULTIPLY_TILES(1, 4, 7);
        }
        if (tall > 1) {
            LOAD_TILE(5, a + SIDE * lda, from_a);
            MULTIPLY_TILES(2, 5, 6);
            if (wide > 1) MULTIPLY_TILES(3, 5, 7);
        }
    }
    STORE_TILE(0, c, from_c);
    if (wide > 1) STORE_TILE(1, c + SIDE, from_c);
    if (tall > 1) STORE_TILE(2, below, from_c);
    if (tall > 1 && wide > 1) STORE_TILE(3, below + SIDE, from_c);
}

static inline __attribute__((always_inline)) void block_panel(int wide, int64_t m, int64_t k, const uint16_t *a,
                                                              int64_t lda, const uint32_t *b, int64_t ldb, float *c,
                                                              int64_t ldc, int accumulate) {
    int64_t i = 0;
    for (; i + 2 * SIDE <= m; i += 2 * SIDE) block(2, wide, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    if (i < m) block(1, wide, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
}

/* Whole tiles by AMX, what is left at the three edges by vectors. */
static void tiled_mul_pairs(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint32_t *b,
                            int64_t ldb, float *c, int64_t ldc, int accumulate) {
    int64_t mt = m / SIDE * SIDE, nt = n / SIDE * SIDE, kt = k / DEEP * DEEP, j = 0;
    if (mt == 0 || nt == 0 || kt == 0) {
        vector_mul_pairs(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
        return;
    }
    begin_tiles();
    for (; j + 2 * SIDE <= nt; j += 2 * SIDE) block_panel(2, mt, kt, a, lda, b + j, ldb, c + j, ldc, accumulate);
    if (j < nt) block_panel(1, mt, kt, a, lda, b + j, ldb, c + j, ldc, accumulate);
    end_tiles();
    if (kt < k) vector_mul_pairs(mt, nt, k - kt, a + 2 * kt, lda, b + kt * ldb, ldb, c, ldc, 1);
    if (nt < n) vector_mul_pairs(mt, n - nt, k, a, lda, b + nt, ldb, c + nt, ldc, accumulate);
    if (mt < m) vector_mul_pairs(m - mt, n, k, a + mt * lda, lda, b, ldb, c + mt * ldc, ldc, accumulate);
}
#define BEST_MUL_PAIRS tiled_mul_pairs
#else
#define BEST_MUL_PAIRS vector_mul_pairs
#endif

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
    .add = add,
    .times = times,
    .add_times = add_times,
    .norm_backward = norm_backward,
    .rotate = rotate,
    .scale = scale,
    .exp_sum = exp_sum,
    .glu = glu,
    .glu_backward = glu_backward,
    .tanh = tanh_all,
    .adamw = adamw,
    .column_max = column_max,
    .column_exp = column_exp,
    .column_softmax_backward = column_softmax_backward,
    .mul = mul,
    .transpose = transpose,
    .pair_rows = pair_rows,
    .round_pairs = round_pairs,
    .mul_pairs = BEST_MUL_PAIRS,
#if defined(__AVX512BF16__) || defined(USLI_VEC_TILES)
    .pairs = 1,
#endif
    .lanes = LANES,
};
