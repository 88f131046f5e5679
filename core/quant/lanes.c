/* Finding scales for eight sub-blocks at once, built for several instruction sets under several names.
 *
 * For given codes the best scale (and min) is a small least-squares problem; so the fits guess a scale, round, solve,
 * and keep the best of a row of guesses. Values of a super-block are transposed first: lane k of every vector belongs
 * to sub-block k, so that nothing is ever summed across lanes. A NaN takes some code; what it spoils stays in its
 * sub-block, or in its super-block where it is an infinity. */
#include "core/quant/lanes.h"

#include <float.h>
#include <stdbool.h>
#include <string.h>

#include "core/base/half.h"
#include "core/quant/blocks.h"
#include "core/quant/fit.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

enum { LANES = 8, MOST = 32 /* values of a sub-block */ };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t lanes_i __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline lanes splat(float x) {
    return (lanes){ x, x, x, x, x, x, x, x };
}
static inline lanes pick(lanes_i mask, lanes a, lanes b) {
    return (lanes)((mask & (lanes_i)a) | (~mask & (lanes_i)b));
}
/* A NaN in a gives b. */
static inline lanes larger(lanes a, lanes b) {
#if defined(__AVX2__)
    return (lanes)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}
static inline lanes smaller(lanes a, lanes b) {
#if defined(__AVX2__)
    return (lanes)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return pick(a < b, a, b);
#endif
}
static inline lanes clamp(lanes x, lanes lo, lanes hi) {
    return smaller(larger(x, lo), hi);
}
static inline lanes magnitude(lanes x) {
    lanes_i mask = { 0 };
    return (lanes)((lanes_i)x & (mask + 0x7fffffff));
}
/* As usli_roundf. */
static inline lanes nearest(lanes x) {
    return (x + 12582912.0f) - 12582912.0f;
}
/* 1 / x, and 0 for 0. */
static inline lanes inverse_of(lanes x) {
    return pick(x != 0, 1.0f / x, splat(0));
}
static inline lanes load(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* ---- Super-blocks --------------------------------------------------------------------------------------------------
 */

/* Eight sub-blocks of n values: values and weights, transposed. */
typedef struct tile {
    lanes x[MOST], w[MOST];
} tile;

static void transpose(const float *src, int n, lanes *dst) {
    for (int i = 0; i < n; i += LANES) {
#if defined(__AVX2__)
        __m256 r[8], s[8];
        for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps(src + k * n + i);
        for (int k = 0; k < 8; k += 2) {
            s[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
            s[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
        }
        for (int k = 0; k < 8; k += 4)
            for (int h = 0; h < 2; h++) {
                r[k + 2 * h] = _mm256_shuffle_ps(s[k + h], s[k + h + 2], 0x44);
                r[k + 2 * h + 1] = _mm256_shuffle_ps(s[k + h], s[k + h + 2], 0xee);
            }
        for (int k = 0; k < 4; k++) {
            dst[i + k] = (lanes)_mm256_permute2f128_ps(r[k], r[k + 4], 0x20);
            dst[i + k + 4] = (lanes)_mm256_permute2f128_ps(r[k], r[k + 4], 0x31);
        }
#else
        for (int j = i; j < i + LANES; j++)
            for (int k = 0; k < LANES; k++) dst[j][k] = src[k * n + j];
#endif
    }
}

static inline lanes weight(const tile *t, int i, bool weighted) {
    return weighted ? t->w[i] : splat(1);
}

/* The low end is held while the high end is stretched or clipped; min is never above 0. */
static inline void fit_affine(const tile *t, int n, bool weighted, int top, lanes *scale, lanes *min) {
    lanes low = splat(0), high = splat(-FLT_MAX), sum_w = splat(0), sum_wy = splat(0), y[MOST];
    for (int i = 0; i < n; i++) {
        low = smaller(t->x[i], low);
        high = larger(t->x[i], high);
    }
    for (int i = 0; i < n; i++) {
        y[i] = t->x[i] - low;
        sum_w += weight(t, i, weighted);
        sum_wy += weight(t, i, weighted) * y[i];
    }
    lanes_i flat = ~(high > low);
    lanes range = high - low, per_range = inverse_of(pick(flat, splat(0), range)), best = splat(FLT_MAX);
    *scale = pick(flat, splat(0), range / (float)top);
    *min = low;
    for (int step = -10; step <= 10; step++) {
        lanes inverse = ((float)top + 0.1f * (float)step) * per_range;
        lanes qy = splat(0), qq = splat(0), q1 = splat(0);
        for (int i = 0; i < n; i++) {
            lanes q = nearest(smaller(y[i] * inverse, splat((float)top))), wq = weight(t, i, weighted) * q;
            qy += wq * y[i];
            qq += wq * q;
            q1 += wq;
        }
        /* y = d q + m by least squares, where y is x less its low end. */
        lanes det = sum_w * qq - q1 * q1, per_det = 1.0f / det;
        lanes d = (sum_w * qy - q1 * sum_wy) * per_det, m = (qq * sum_wy - q1 * qy) * per_det;
        lanes_i over = ~(det > 0) | (low + m > 0);
        m = pick(over, -low, m);
        d = pick(over, (qy + low * q1) / qq, d);
        lanes error = d * (d * qq - 2.0f * qy) + m * (m * sum_w - 2.0f * sum_wy + 2.0f * d * q1);
        lanes_i better = (d > 0) & (error < best) & ~flat;
        best = pick(better, error, best);
        *scale = pick(better, d, *scale);
        *min = pick(better, low + m, *min);
    }
}

static inline lanes affine_error(const tile *t, int n, bool weighted, lanes scale, lanes min, int top) {
    lanes inverse = inverse_of(scale), error = splat(0);
    for (int i = 0; i < n; i++) {
        lanes q = nearest(clamp((t->x[i] - min) * inverse, splat(0), splat((float)top)));
        lanes e = t->x[i] - (scale * q + min);
        error += weight(t, i, weighted) * e * e;
    }
    return error;
}

/* Codes in the order of the values. */
static inline void store_codes(const lanes_i *q, int n, uint8_t *dst) {
    for (int i = 0; i < n; i++)
        for (int k = 0; k < LANES; k++) dst[k * n + i] = (uint8_t)q[i][k];
}

/* Scales and minima of a guess, each moved by one step where that lowers the error: the steps are coarse against what
 * the fit chose. */
typedef struct guess {
    float d, dmin, error;
    lanes ls[2], lm[2];
} guess;

static inline void quantise_affine(const tile *t, int size, bool weighted, int top, int scale_top, const lanes *scales,
                                   const lanes *mins, guess *g) {
    lanes limit = splat((float)scale_top), total = splat(0);
    float per_d = usli_inverse(g->d), per_dmin = usli_inverse(g->dmin);
    for (int part = 0; part < 256 / size / LANES; part++) {
        lanes ls0 = nearest(clamp(scales[part] * per_d, splat(0), limit));
        lanes lm0 = nearest(clamp(mins[part] * per_dmin, splat(0), limit)), best = splat(FLT_MAX);
        g->ls[part] = ls0;
        g->lm[part] = lm0;
        for (int a = -1; a <= 1; a++)
            for (int b = -1; b <= 1; b++) {
                lanes ls = clamp(ls0 + (float)a, splat(0), limit), lm = clamp(lm0 + (float)b, splat(0), limit);
                lanes error = affine_error(&t[part], size, weighted, g->d * ls, -g->dmin * lm, top);
                lanes_i better = error < best;
                best = pick(better, error, best);
                g->ls[part] = pick(better, ls, g->ls[part]);
                g->lm[part] = pick(better, lm, g->lm[part]);
            }
        total += best;
    }
    float sums[LANES];
    memcpy(sums, &total, sizeof sums);
    g->error = usli_lane_sum(sums);
}

/* Sub-blocks are fitted freely first; then a few units of the scales are tried, which differ in how they round. */
static inline void affine_of(const float *x, const float *w, bool weighted, int size, int top, int scale_top,
                             usli_super *out) {
    tile t[2];
    lanes scales[2], mins[2];
    float scale[16], min[16];
    int parts = 256 / size / LANES;
    for (int part = 0; part < parts; part++) {
        transpose(x + part * LANES * size, size, t[part].x);
        if (weighted) transpose(w + part * LANES * size, size, t[part].w);
        fit_affine(&t[part], size, weighted, top, &scales[part], &mins[part]);
        mins[part] = -mins[part];
        memcpy(scale + part * LANES, &scales[part], sizeof scales[part]);
        memcpy(min + part * LANES, &mins[part], sizeof mins[part]);
    }
    guess best = { .error = 0 };
    out->dmin = usli_super_scale(min, parts * LANES, scale_top);
    for (int less = 0; less < 3; less++) {
        uint16_t d = usli_super_scale(scale, parts * LANES, scale_top - less);
        guess g = { .d = usli_f16_to_f32(d), .dmin = usli_f16_to_f32(out->dmin) };
        quantise_affine(t, size, weighted, top, scale_top, scales, mins, &g);
        if (less && !(g.error < best.error)) continue;
        best = g;
        out->d = d;
    }
    for (int part = 0; part < parts; part++) {
        lanes inverse = inverse_of(best.d * best.ls[part]), m = best.dmin * best.lm[part];
        lanes_i q[MOST], ls = __builtin_convertvector(best.ls[part], lanes_i),
                         lm = __builtin_convertvector(best.lm[part], lanes_i);
        for (int i = 0; i < size; i++)
            q[i] = __builtin_convertvector(nearest(clamp((t[part].x[i] + m) * inverse, splat(0), splat((float)top))),
                                           lanes_i);
        store_codes(q, size, out->q + part * LANES * size);
        memcpy(out->ls + part * LANES, &ls, sizeof ls);
        memcpy(out->lm + part * LANES, &lm, sizeof lm);
    }
}

static void affine(const float *x, const float *w, int size, int top, int scale_top, usli_super *out) {
    if (!w && size == 32)
        affine_of(x, w, false, 32, top, scale_top, out);
    else if (!w)
        affine_of(x, w, false, 16, top, scale_top, out);
    else
        affine_of(x, w, true, size, top, scale_top, out);
}

enum { SIXTEEN = 16 };

/* The extreme goes to about lo, whose side has one code more; past it the extreme itself is clipped. */
static inline lanes fit_symmetric(const tile *t, bool weighted, int lo) {
    lanes extreme = splat(0), best_gain = splat(0), best = splat(0), least = splat((float)lo),
          most = splat((float)(-lo - 1));
    for (int i = 0; i < SIXTEEN; i++) extreme = pick(magnitude(t->x[i]) > magnitude(extreme), t->x[i], extreme);
    lanes per_extreme = inverse_of(extreme);
    for (int step = -4; step <= 4; step++) {
        lanes inverse = ((float)lo + 0.22f * (float)step) * per_extreme, qx = splat(0), qq = splat(0);
        for (int i = 0; i < SIXTEEN; i++) {
            lanes q = nearest(clamp(t->x[i] * inverse, least, most)), wq = weight(t, i, weighted) * q;
            qx += wq * t->x[i];
            qq += wq * q;
        }
        lanes scale = qx / qq, gain = scale * qx;
        lanes_i better = gain > best_gain;
        best_gain = pick(better, gain, best_gain);
        best = pick(better, scale, best);
    }
    return pick(best != 0, best, extreme / (float)lo);
}

static inline lanes symmetric_error(const tile *t, bool weighted, lanes scale, int lo) {
    lanes inverse = inverse_of(scale), error = splat(0);
    for (int i = 0; i < SIXTEEN; i++) {
        lanes e = t->x[i] - scale * nearest(clamp(t->x[i] * inverse, splat((float)lo), splat((float)(-lo - 1))));
        error += weight(t, i, weighted) * e * e;
    }
    return error;
}

static inline void symmetric_of(const float *x, const float *w, bool weighted, int lo, int scale_lo, usli_super *out) {
    tile t[2];
    lanes scales[2];
    float scale[16];
    for (int part = 0; part < 2; part++) {
        transpose(x + part * 128, SIXTEEN, t[part].x);
        if (weighted) transpose(w + part * 128, SIXTEEN, t[part].w);
        scales[part] = fit_symmetric(&t[part], weighted, lo);
        memcpy(scale + part * LANES, &scales[part], sizeof scales[part]);
    }
    out->d = usli_super_scale(scale, 16, scale_lo);
    float d = usli_f16_to_f32(out->d), per_d = usli_inverse(d);
    lanes least = splat((float)scale_lo), most = splat((float)(-scale_lo - 1));
    for (int part = 0; part < 2; part++) {
        lanes ls0 = nearest(clamp(scales[part] * per_d, least, most)), kept = ls0, best = splat(FLT_MAX);
        for (int a = -1; a <= 1; a++) {
            lanes ls = clamp(ls0 + (float)a, least, most);
            lanes error = symmetric_error(&t[part], weighted, d * ls, lo);
            lanes_i better = error < best;
            best = pick(better, error, best);
            kept = pick(better, ls, kept);
        }
        lanes inverse = inverse_of(d * kept);
        lanes_i q[SIXTEEN], ls = __builtin_convertvector(kept, lanes_i);
        for (int i = 0; i < SIXTEEN; i++)
            q[i] = __builtin_convertvector(
                       nearest(clamp(t[part].x[i] * inverse, splat((float)lo), splat((float)(-lo - 1)))), lanes_i) -
                   lo;
        store_codes(q, SIXTEEN, out->q + part * 128);
        memcpy(out->ls + part * LANES, &ls, sizeof ls);
    }
}

static void symmetric(const float *x, const float *w, int lo, int scale_lo, usli_super *out) {
    if (w)
        symmetric_of(x, w, true, lo, scale_lo, out);
    else
        symmetric_of(x, w, false, lo, scale_lo, out);
}

/* ---- Blocks of 32 --------------------------------------------------------------------------------------------------
 * The scale that just holds the extremes; without a minimum it is solved once by least squares for the codes that it
 * gives, which cannot raise the error. */

#define ACROSS(v, op)                                                     \
    do {                                                                  \
        v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)); \
        v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)); \
        v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6)); \
    } while (0)

/* The sums across four vectors. */
static inline void sum_across(lanes a, lanes b, lanes c, lanes d, float out[4]) {
#if defined(__AVX2__)
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    const lanes all[4] = { a, b, c, d };
    for (int i = 0; i < 4; i++)
        out[i] =
            ((all[i][0] + all[i][1]) + (all[i][2] + all[i][3])) + ((all[i][4] + all[i][5]) + (all[i][6] + all[i][7]));
#endif
}

/* Scales (as usli_scale_to_f16) or minima as halves, and what those hold. */
static inline lanes to_halves(lanes x, bool scales, uint16_t h[LANES]) {
    lanes back;
#if defined(__F16C__)
    _mm_storeu_si128((__m128i *)(void *)h, _mm256_cvtps_ph((__m256)x, 0));
#else
    for (int k = 0; k < LANES; k++) h[k] = usli_f32_to_f16(x[k]);
#endif
#if defined(__AVX2__)
    if (scales) {
        __m128i all = _mm_loadu_si128((const __m128i *)(const void *)h), none = _mm_setzero_si128();
        __m256i some = (__m256i)(x != 0);
        __m128i some_16 = _mm_packs_epi32(_mm256_castsi256_si128(some), _mm256_extracti128_si256(some, 1));
        __m128i lost = _mm_and_si128(_mm_cmpeq_epi16(_mm_slli_epi16(all, 1), none), some_16);
        _mm_storeu_si128((__m128i *)(void *)h, _mm_or_si128(all, _mm_srli_epi16(lost, 15)));
    }
#else
    for (int k = 0; scales && k < LANES; k++) h[k] |= (uint16_t)((h[k] & 0x7fffu) == 0 && x[k] != 0);
#endif
#if defined(__F16C__)
    back = (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)h));
#else
    for (int k = 0; k < LANES; k++) back[k] = usli_f16_to_f32(h[k]);
#endif
    return back;
}

/* q = (x - start) times inverse to the nearest whole number from lo to hi, plus shift, in the order of the values. */
static inline void codes_of(const float *x, float start, float inverse, int lo, int hi, int shift, int8_t q[USLI_QK]) {
    lanes v[4];
    for (int i = 0; i < 4; i++) v[i] = (load(x + LANES * i) - splat(start)) * splat(inverse);
#if defined(__AVX2__)
    __m256i w[4];
    for (int i = 0; i < 4; i++) w[i] = _mm256_cvtps_epi32((__m256)v[i]);
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(w[0], w[1]), _mm256_packs_epi32(w[2], w[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    bytes = _mm256_min_epi8(_mm256_max_epi8(bytes, _mm256_set1_epi8((char)lo)), _mm256_set1_epi8((char)hi));
    _mm256_storeu_si256((__m256i *)(void *)q, _mm256_add_epi8(bytes, _mm256_set1_epi8((char)shift)));
#else
    for (int i = 0; i < 4; i++) {
        lanes_i w = __builtin_convertvector(nearest(clamp(v[i], splat((float)lo), splat((float)hi))), lanes_i);
        for (int k = 0; k < LANES; k++) q[LANES * i + k] = (int8_t)(w[k] + shift);
    }
#endif
}

/* Codes as codes_of makes them, each beside the one 16 further on. */
static inline void nibbles_of(const float *x, float start, float inverse, int lo, int hi, int shift, uint8_t qs[16]) {
#if defined(__AVX2__)
    __m256i w[4];
    for (int i = 0; i < 4; i++)
        w[i] = _mm256_cvtps_epi32((__m256)((load(x + LANES * i) - splat(start)) * splat(inverse)));
    __m256i least = _mm256_set1_epi16((short)lo), most = _mm256_set1_epi16((short)hi);
    for (int i = 0; i < 2; i++) {
        w[i] = _mm256_packs_epi32(w[2 * i], w[2 * i + 1]);
        w[i] = _mm256_add_epi16(_mm256_min_epi16(_mm256_max_epi16(w[i], least), most), _mm256_set1_epi16((short)shift));
    }
    __m256i both = _mm256_or_si256(w[0], _mm256_slli_epi16(w[1], 4));
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storeu_si128((__m128i *)(void *)qs, _mm_shuffle_epi32(bytes, 0xd8));
#else
    int8_t q[USLI_QK];
    codes_of(x, start, inverse, lo, hi, shift, q);
    for (int j = 0; j < 16; j++) qs[j] = (uint8_t)((q[j] & 15) | (q[j + 16] & 15) << 4);
#endif
}

/* Up to eight blocks together, so that their scales are solved for side by side. */
typedef struct group {
    uint16_t d[LANES], m[LANES];
    float inverses[LANES], starts[LANES];
    int8_t q[LANES][USLI_QK];
} group;

/* Codes 0 .. 2 half_range - 1. */
static inline void group_symmetric(const float *x, int blocks, int half_range, group *g) {
    float extremes[LANES] = { 0 }, inverses[LANES], qx[LANES] = { 0 }, qq[LANES] = { 0 };
    for (int b = 0; b < blocks; b++) {
        lanes high = splat(0), low = splat(0);
        for (int i = 0; i < 4; i++) {
            high = larger(load(x + USLI_QK * b + LANES * i), high);
            low = smaller(load(x + USLI_QK * b + LANES * i), low);
        }
        lanes top = larger(high, -low);
        ACROSS(top, larger);
        ACROSS(low, smaller);
        extremes[b] = -low[0] < top[0] ? top[0] : low[0];
    }
    /* The extreme takes the lowest code, whose side has one more. Of values that are nothing to a half the inverse is
     * no number. */
    lanes inverse = inverse_of(load(extremes) * (-1.0f / (float)half_range));
    inverse = clamp(inverse, splat(-FLT_MAX), splat(FLT_MAX));
    memcpy(inverses, &inverse, sizeof inverses);
    for (int b = 0; b < blocks; b++) {
        lanes sum_qx = splat(0), sum_qq = splat(0);
        float sums[4];
        for (int i = 0; i < 4; i++) {
            lanes v = load(x + USLI_QK * b + LANES * i);
            lanes q = nearest(smaller(v * splat(inverses[b]), splat((float)(half_range - 1))));
            sum_qx += q * v;
            sum_qq += q * q;
        }
        sum_across(sum_qx, sum_qq, sum_qx, sum_qq, sums);
        qx[b] = sums[0];
        qq[b] = sums[1];
    }
    lanes scale = pick(load(qq) > 0, load(qx) / load(qq), splat(0));
    /* A NaN has many forms, and which of them comes out is the machine's own. */
    scale = pick(scale == scale, scale, splat(__builtin_nanf("")));
    inverse = inverse_of(to_halves(scale, true, g->d));
    memcpy(inverses, &inverse, sizeof inverses);
    for (int b = 0; b < blocks; b++)
        codes_of(x + USLI_QK * b, 0, inverses[b], -half_range, half_range - 1, half_range, g->q[b]);
}

/* The larger of lanes 0 and 2, and of 1 and 3, of both halves of a and b: then side by side those of a and b. */
static inline lanes larger_halves(lanes a, lanes b) {
    return larger(__builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13),
                  __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15));
}
static inline lanes larger_quarters(lanes ab, lanes cd) {
    return larger(__builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13),
                  __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15));
}

/* The codes are those for the scale and the start as their halves hold them. Solving for both gains four hundredths of
 * the error and takes as long as all the rest: a type of four bits or five that is chosen for its speed does without.
 */
static inline void group_affine(const float *x, int blocks, int top, group *g) {
    lanes ends[LANES];
    for (int b = 0; b < LANES; b++) {
        if (b >= blocks) {
            ends[b] = ends[0];
            continue;
        }
        lanes high = splat(-FLT_MAX), low = splat(FLT_MAX);
        for (int i = 0; i < 4; i++) {
            high = larger(load(x + USLI_QK * b + LANES * i), high);
            low = smaller(load(x + USLI_QK * b + LANES * i), low);
        }
        /* Four of the high end, and four of the low one less than 0. */
        ends[b] = larger(__builtin_shufflevector(high, -low, 0, 1, 2, 3, 8, 9, 10, 11),
                         __builtin_shufflevector(high, -low, 4, 5, 6, 7, 12, 13, 14, 15));
    }
    for (int b = 0; b < LANES; b += 4)
        ends[b] = larger_quarters(larger_halves(ends[b], ends[b + 1]), larger_halves(ends[b + 2], ends[b + 3]));
    lanes highs = __builtin_shufflevector(ends[0], ends[4], 0, 1, 2, 3, 8, 9, 10, 11);
    lanes lows = -__builtin_shufflevector(ends[0], ends[4], 4, 5, 6, 7, 12, 13, 14, 15);
    /* Nothing but NaN leaves the ends the wrong way round. */
    lanes start = pick(highs < lows, splat(0), lows), range = larger(highs - start, splat(0));
    lanes inverse = inverse_of(to_halves(range * (1.0f / (float)top), true, g->d));
    start = to_halves(clamp(start, splat(-65504), splat(65504)), false, g->m);
    memcpy(g->inverses, &inverse, sizeof inverse);
    memcpy(g->starts, &start, sizeof start);
}

static inline void group_eight_bits(const float *x, int blocks, group *g) {
    float tops[LANES] = { 0 }, inverses[LANES];
    for (int b = 0; b < blocks; b++) {
        lanes top = splat(0);
        for (int i = 0; i < 4; i++) top = larger(magnitude(load(x + USLI_QK * b + LANES * i)), top);
        ACROSS(top, larger);
        tops[b] = top[0];
    }
    lanes inverse = inverse_of(to_halves(load(tops) / 127.0f, true, g->d));
    memcpy(inverses, &inverse, sizeof inverses);
    for (int b = 0; b < blocks; b++) codes_of(x + USLI_QK * b, 0, inverses[b], -127, 127, 0, g->q[b]);
}

static inline void pack_nibbles(const int8_t *q, uint8_t *qs) {
    for (int j = 0; j < 16; j++) qs[j] = (uint8_t)((q[j] & 15) | (q[j + 16] & 15) << 4);
}

/* Bit 4 of each code. */
static inline void pack_fifth(const int8_t *q, uint8_t *qh) {
#if defined(__AVX2__)
    __m256i all = _mm256_loadu_si256((const __m256i *)(const void *)q);
    uint32_t bits = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(all, 3));
    memcpy(qh, &bits, sizeof bits);
#else
    memset(qh, 0, 4);
    for (int j = 0; j < 32; j++) qh[j / 8] |= (uint8_t)((q[j] >> 4 & 1) << j % 8);
#endif
}

static inline int group_size(int64_t n) {
    return n < LANES * USLI_QK ? (int)(n / USLI_QK) : LANES;
}

static void q4_0(const float *x, void *dst, int64_t n) {
    usli_block_q4_0 *out = dst;
    group g;
    for (int size; (size = group_size(n)) > 0; n -= size * USLI_QK, x += size * USLI_QK) {
        group_symmetric(x, size, 8, &g);
        for (int b = 0; b < size; b++, out++) {
            out->d = g.d[b];
            pack_nibbles(g.q[b], out->qs);
        }
    }
}

/* The scales of the next blocks are under way while the codes of these are packed. */
static void q4_1(const float *x, void *dst, int64_t n) {
    usli_block_q4_1 *out = dst;
    group g[2];
    int size = group_size(n), next;
    if (size > 0) group_affine(x, size, 15, &g[0]);
    for (int at = 0; size > 0; at = 1 - at, x += size * USLI_QK, size = next) {
        n -= size * USLI_QK;
        next = group_size(n);
        if (next > 0) group_affine(x + size * USLI_QK, next, 15, &g[1 - at]);
        for (int b = 0; b < size; b++, out++) {
            out->d = g[at].d[b];
            out->m = g[at].m[b];
            nibbles_of(x + USLI_QK * b, g[at].starts[b], g[at].inverses[b], 0, 15, 0, out->qs);
        }
    }
}

static void q5_0(const float *x, void *dst, int64_t n) {
    usli_block_q5_0 *out = dst;
    group g;
    for (int size; (size = group_size(n)) > 0; n -= size * USLI_QK, x += size * USLI_QK) {
        group_symmetric(x, size, 16, &g);
        for (int b = 0; b < size; b++, out++) {
            out->d = g.d[b];
            pack_nibbles(g.q[b], out->qs);
            pack_fifth(g.q[b], out->qh);
        }
    }
}

static void q5_1(const float *x, void *dst, int64_t n) {
    usli_block_q5_1 *out = dst;
    group g;
    for (int size; (size = group_size(n)) > 0; n -= size * USLI_QK, x += size * USLI_QK) {
        group_affine(x, size, 31, &g);
        for (int b = 0; b < size; b++) codes_of(x + USLI_QK * b, g.starts[b], g.inverses[b], 0, 31, 0, g.q[b]);
        for (int b = 0; b < size; b++, out++) {
            out->d = g.d[b];
            out->m = g.m[b];
            pack_nibbles(g.q[b], out->qs);
            pack_fifth(g.q[b], out->qh);
        }
    }
}

/* With 8 bits nothing is gained by solving. */
static void q8_0(const float *x, void *dst, int64_t n) {
    usli_block_q8_0 *out = dst;
    group g;
    for (int size; (size = group_size(n)) > 0; n -= size * USLI_QK, x += size * USLI_QK) {
        group_eight_bits(x, size, &g);
        for (int b = 0; b < size; b++, out++) {
            out->d = g.d[b];
            memcpy(out->qs, g.q[b], sizeof out->qs);
        }
    }
}

const usli_lanes JOIN(usli_lanes_, USLI_LANES_ISA) = { affine, symmetric, q4_0, q4_1,
                                                       q5_0,   q5_1,      q8_0, JOIN(usli_points_, USLI_LANES_ISA) };
