/* The 32-value types: one or two halves as scale and offset, then 4, 5 or 8 bits a value. */
#include "core/quant/codecs.h"

#include <math.h>
#include <stddef.h>

#include "core/base/half.h"
#include "core/quant/blocks.h"
#include "core/quant/fit.h"
#include "core/quant/lanes.h"

/* The high bits of Q5 come as one 32-bit number. */
static inline uint32_t load_u32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

USLI_WIDE void usli_decode_q4_0(const void *src, float *dst, int64_t n) {
    const usli_block_q4_0 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)((b->qs[j] & 15) - 8);
            dst[j + 16] = d * (float)((b->qs[j] >> 4) - 8);
        }
    }
}

USLI_WIDE void usli_decode_q4_1(const void *src, float *dst, int64_t n) {
    const usli_block_q4_1 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d), m = usli_f16_to_f32(b->m);
        for (int j = 0; j < 16; j++) {
            dst[j] = (float)(b->qs[j] & 15) * d + m;
            dst[j + 16] = (float)(b->qs[j] >> 4) * d + m;
        }
    }
}

USLI_WIDE void usli_decode_q5_0(const void *src, float *dst, int64_t n) {
    const usli_block_q5_0 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d);
        uint32_t qh = load_u32(b->qh);
        for (int j = 0; j < 16; j++) {
            uint32_t lo = (b->qs[j] & 15u) | (qh >> j & 1u) << 4;
            uint32_t hi = (b->qs[j] >> 4) | (qh >> (j + 16) & 1u) << 4;
            dst[j] = d * (float)((int)lo - 16);
            dst[j + 16] = d * (float)((int)hi - 16);
        }
    }
}

USLI_WIDE void usli_decode_q5_1(const void *src, float *dst, int64_t n) {
    const usli_block_q5_1 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d), m = usli_f16_to_f32(b->m);
        uint32_t qh = load_u32(b->qh);
        for (int j = 0; j < 16; j++) {
            uint32_t lo = (b->qs[j] & 15u) | (qh >> j & 1u) << 4;
            uint32_t hi = (b->qs[j] >> 4) | (qh >> (j + 16) & 1u) << 4;
            dst[j] = (float)(int)lo * d + m;
            dst[j + 16] = (float)(int)hi * d + m;
        }
    }
}

USLI_WIDE void usli_decode_q8_0(const void *src, float *dst, int64_t n) {
    const usli_block_q8_0 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d);
        for (int j = 0; j < USLI_QK; j++) dst[j] = (float)b->qs[j] * d;
    }
}

/* ---- Encoding ------------------------------------------------------------------------------------------------------
 */

/* Codes 0 .. top, value j of each half in its own nibble; a fifth bit goes to qh where there is one. */
static void pack(const int codes[USLI_QK], uint8_t qs[16], uint8_t *qh) {
    uint32_t high = 0;
    for (int j = 0; j < 16; j++) qs[j] = (uint8_t)((codes[j] & 15) | (codes[j + 16] & 15) << 4);
    for (int j = 0; j < USLI_QK; j++) high |= ((uint32_t)codes[j] >> 4 & 1u) << j;
    for (int k = 0; qh && k < 4; k++) qh[k] = (uint8_t)(high >> (8 * k));
}

static void encode_symmetric(const float *x, const float *w, int half_range, uint16_t *d, uint8_t *qs, uint8_t *qh) {
    int codes[USLI_QK];
    float lo = (float)-half_range, hi = (float)(half_range - 1);
    float scale = usli_fit_symmetric(x, w, USLI_QK, -half_range, half_range - 1, true), inverse = usli_inverse(scale);
    *d = usli_f32_to_f16(scale);
    for (int j = 0; j < USLI_QK; j++) codes[j] = usli_code_of(x[j], inverse, lo, hi) + half_range;
    pack(codes, qs, qh);
}

static void encode_affine(const float *x, const float *w, int top, uint16_t *d, uint16_t *m, uint8_t *qs, uint8_t *qh) {
    int codes[USLI_QK];
    float scale, min;
    usli_fit_affine(x, w, USLI_QK, top, true, &scale, &min);
    float inverse = usli_inverse(scale);
    *d = usli_f32_to_f16(scale);
    *m = usli_f32_to_f16(min);
    for (int j = 0; j < USLI_QK; j++) codes[j] = usli_code_of(x[j] - min, inverse, 0, (float)top);
    pack(codes, qs, qh);
}

void usli_encode_q4_0(const float *src, const float *importance, void *dst, int64_t n) {
    if (!importance) {
        usli_lanes_best()->q4_0(src, dst, n);
        return;
    }
    usli_block_q4_0 *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK, b++) encode_symmetric(src + i, importance + i, 8, &b->d, b->qs, NULL);
}

void usli_encode_q4_1(const float *src, const float *importance, void *dst, int64_t n) {
    if (!importance) {
        usli_lanes_best()->q4_1(src, dst, n);
        return;
    }
    usli_block_q4_1 *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK, b++) encode_affine(src + i, importance + i, 15, &b->d, &b->m, b->qs, NULL);
}

void usli_encode_q5_0(const float *src, const float *importance, void *dst, int64_t n) {
    if (!importance) {
        usli_lanes_best()->q5_0(src, dst, n);
        return;
    }
    usli_block_q5_0 *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK, b++) encode_symmetric(src + i, importance + i, 16, &b->d, b->qs, b->qh);
}

void usli_encode_q5_1(const float *src, const float *importance, void *dst, int64_t n) {
    if (!importance) {
        usli_lanes_best()->q5_1(src, dst, n);
        return;
    }
    usli_block_q5_1 *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK, b++)
        encode_affine(src + i, importance + i, 31, &b->d, &b->m, b->qs, b->qh);
}

/* With 8 bits weights have nothing to choose. */
void usli_encode_q8_0(const float *src, const float *importance, void *dst, int64_t n) {
    (void)importance;
    usli_lanes_best()->q8_0(src, dst, n);
}
