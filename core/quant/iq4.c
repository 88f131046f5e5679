/* Four-bit types whose codes index a fixed table of uneven steps: IQ4_NL, IQ4_XS, MXFP4. */
#include "core/quant/codecs.h"

#include <math.h>
#include <string.h>

#include "core/base/half.h"
#include "core/quant/blocks.h"
#include "core/quant/fit.h"

static const float IQ4_VALUES[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
/* Twice e2m1, so that the scale below is half the block's and 2^(e - 128) can be made for every e. */
static const float MXFP4_VALUES[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

static inline void decode_nibbles(const uint8_t qs[16], float scale, const float table[16], float *dst) {
    for (int j = 0; j < 16; j++) {
        dst[j] = scale * table[qs[j] & 15];
        dst[j + 16] = scale * table[qs[j] >> 4];
    }
}

USLI_WIDE void usli_decode_iq4_nl(const void *src, float *dst, int64_t n) {
    const usli_block_iq4_nl *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK)
        decode_nibbles(b->qs, usli_f16_to_f32(b->d), IQ4_VALUES, dst);
}

static int iq4_xs_scale(const usli_block_iq4_xs *b, int s) {
    return ((b->scales_l[s / 2] >> (4 * (s % 2)) & 15) | (b->scales_h >> (2 * s) & 3) << 4) - 32;
}

USLI_WIDE void usli_decode_iq4_xs(const void *src, float *dst, int64_t n) {
    const usli_block_iq4_xs *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d);
        for (int s = 0; s < 8; s++)
            decode_nibbles(b->qs + 16 * s, d * (float)iq4_xs_scale(b, s), IQ4_VALUES, dst + 32 * s);
    }
}

/* 2^(e - 128): the two smallest are subnormal. */
static float mxfp4_half_scale(uint8_t e) {
    return usli_u32_as_float(e < 2 ? UINT32_C(0x00200000) << e : (uint32_t)(e - 1) << 23);
}

USLI_WIDE void usli_decode_mxfp4(const void *src, float *dst, int64_t n) {
    const usli_block_mxfp4 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK)
        decode_nibbles(b->qs, mxfp4_half_scale(b->e), MXFP4_VALUES, dst);
}

/* ---- Encoding ------------------------------------------------------------------------------------------------------
 */

/* The middles between neighbours of IQ4_VALUES and the steps over them. */
static const float IQ4_BOUNDS[15] = { -115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                      7,       19,     31.5f, 45.5f, 61,  79,     101 };
static const float IQ4_STEPS[15] = { 23, 21, 18, 16, 14, 13, 12, 11, 12, 12, 13, 15, 16, 20, 24 };

/* The nearest of IQ4_VALUES, without a branch; NaN gives the first. */
static inline float iq4_nearest(float x) {
    float value = -127;
    for (int k = 0; k < 15; k++) value += x > IQ4_BOUNDS[k] ? IQ4_STEPS[k] : 0;
    return value;
}

static inline int iq4_code(float x) {
    int code = 0;
    for (int k = 0; k < 15; k++) code += x > IQ4_BOUNDS[k];
    return code;
}

/* Adds to the lanes the weighted sums of q x and q q for one scale. */
static void iq4_sums(const float *x, const float *w, float inverse, float *sum_qx, float *sum_qq) {
    float qx[USLI_FIT_LANES] = { 0 }, qq[USLI_FIT_LANES] = { 0 };
    for (int i = 0; i < USLI_QK; i += USLI_FIT_LANES)
        for (int k = 0; k < USLI_FIT_LANES; k++) {
            float q = iq4_nearest(x[i + k] * inverse), wq = w[i + k] * q;
            qx[k] += wq * x[i + k];
            qq[k] += wq * q;
        }
    *sum_qx = usli_lane_sum(qx);
    *sum_qq = usli_lane_sum(qq);
}

static float iq4_fit(const float *x, const float *w, bool half) {
    float extreme = 0, best = 0;
    double best_gain = 0;
    for (int i = 0; i < USLI_QK; i++) extreme = fabsf(x[i]) > fabsf(extreme) ? x[i] : extreme;
    if (extreme == 0) return 0;
    /* The extreme goes to about the first value or, with the other sign of the scale, to about the last. */
    for (int side = 0; side < 2; side++)
        for (int step = -7; step <= 7; step++) {
            float inverse = ((side ? IQ4_VALUES[15] : IQ4_VALUES[0]) + (float)step) / extreme, qx, qq;
            iq4_sums(x, w, inverse, &qx, &qq);
            float scale = qq > 0 ? qx / qq : 0;
            if (half) scale = usli_f16_to_f32(usli_scale_to_f16(scale));
            double gain = (double)scale * (2.0 * (double)qx - (double)scale * (double)qq);
            if (gain > best_gain) {
                best_gain = gain;
                best = scale;
            }
        }
    return best;
}

static float iq4_error(const float *x, const float *w, float scale) {
    float inverse = usli_inverse(scale), error[USLI_FIT_LANES] = { 0 };
    for (int i = 0; i < USLI_QK; i += USLI_FIT_LANES)
        for (int k = 0; k < USLI_FIT_LANES; k++) {
            float e = x[i + k] - scale * iq4_nearest(x[i + k] * inverse);
            error[k] += w[i + k] * e * e;
        }
    return usli_lane_sum(error);
}

static void iq4_pack(const float *x, float scale, uint8_t qs[16]) {
    float inverse = usli_inverse(scale);
    for (int j = 0; j < 16; j++) qs[j] = (uint8_t)(iq4_code(x[j] * inverse) | iq4_code(x[j + 16] * inverse) << 4);
}

void usli_encode_iq4_nl(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_iq4_nl *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK, b++) {
        float scale = iq4_fit(src + i, importance ? importance + i : usli_fit_ones, true);
        b->d = usli_f32_to_f16(scale);
        iq4_pack(src + i, scale, b->qs);
    }
}

void usli_encode_iq4_xs(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_iq4_xs *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        const float *x = src + i, *w = importance ? importance + i : usli_fit_ones;
        float scales[8];
        for (int s = 0; s < 8; s++) scales[s] = iq4_fit(x + 32 * s, w + 32 * s, false);
        b->d = usli_super_scale(scales, 8, -32);
        b->scales_h = 0;
        memset(b->scales_l, 0, sizeof b->scales_l);
        float d = usli_f16_to_f32(b->d), inverse = usli_inverse(d);
        for (int s = 0; s < 8; s++) {
            int near = usli_code_of(scales[s], inverse, -32, 31), ls = near;
            float best = INFINITY;
            for (int k = near - 1; k <= near + 1; k++) {
                float error = k >= -32 && k <= 31 ? iq4_error(x + 32 * s, w + 32 * s, d * (float)k) : INFINITY;
                if (error < best) {
                    best = error;
                    ls = k;
                }
            }
            iq4_pack(x + 32 * s, d * (float)ls, b->qs + 16 * s);
            b->scales_l[s / 2] |= (uint8_t)(((ls + 32) & 15) << (4 * (s % 2)));
            b->scales_h |= (uint16_t)(((ls + 32) >> 4) << (2 * s));
        }
    }
}

/* Codes of |x| / half scale: the middles between 0 1 2 3 4 6 8 12. A middle goes down. */
static int mxfp4_code(float x) {
    static const float BOUNDS[7] = { 0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10 };
    int code = x < 0 ? 8 : 0;
    for (int k = 0; k < 7; k++) code += fabsf(x) > BOUNDS[k];
    return code;
}

static double mxfp4_error(const float *x, const float *w, int e) {
    float scale = mxfp4_half_scale((uint8_t)e), inverse = 1.0f / scale;
    double error = 0;
    for (int j = 0; j < USLI_QK; j++) {
        double diff = (double)x[j] - (double)(scale * MXFP4_VALUES[mxfp4_code(x[j] * inverse)]);
        error += (double)w[j] * diff * diff;
    }
    return error;
}

void usli_encode_mxfp4(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_mxfp4 *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK, b++) {
        const float *x = src + i, *w = importance ? importance + i : usli_fit_ones;
        float max = 0;
        for (int j = 0; j < USLI_QK; j++) max = fabsf(x[j]) > max ? fabsf(x[j]) : max;
        /* The scale that brings the largest into 4 .. 8 clips it at 6 at worst; the neighbours may still be better. The
         * ends of the range are left out, where the scale or its inverse is not normal. */
        int near = max > 0 ? (int)(usli_float_as_u32(max) >> 23) - 2 : 0, best = 0;
        double best_error = INFINITY;
        for (int e = near - 1; max > 0 && e <= near + 1; e++) {
            int inside = e < 2 ? 2 : e > 253 ? 253 : e;
            double error = mxfp4_error(x, w, inside);
            if (error < best_error) {
                best_error = error;
                best = inside;
            }
        }
        b->e = (uint8_t)best;
        float inverse = 1.0f / mxfp4_half_scale(b->e);
        for (int j = 0; j < 16; j++)
            b->qs[j] = (uint8_t)(max > 0 ? mxfp4_code(x[j] * inverse) | mxfp4_code(x[j + 16] * inverse) << 4 : 0);
    }
}
