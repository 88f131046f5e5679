/* The 256-value "K" types: 8 sub-blocks of 32 or 16 of 16, whose scales (and minima) are themselves quantised. */
#include "core/quant/codecs.h"

#include <stddef.h>
#include <string.h>

#include "core/base/half.h"
#include "core/quant/blocks.h"
#include "core/quant/lanes.h"

USLI_WIDE void usli_decode_q2_k(const void *src, float *dst, int64_t n) {
    const usli_block_q2_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d), dmin = usli_f16_to_f32(b->dmin);
        for (int s = 0; s < 16; s++) {
            float scale = d * (float)(b->scales[s] & 15), min = dmin * (float)(b->scales[s] >> 4);
            const uint8_t *qs = b->qs + 32 * (s / 8) + 16 * (s % 2);
            int shift = 2 * (s / 2 % 4);
            for (int l = 0; l < 16; l++) dst[16 * s + l] = scale * (float)(qs[l] >> shift & 3) - min;
        }
    }
}

static int q3_k_scale(const uint8_t *scales, int s) {
    int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4;
    int high = scales[8 + s % 4] >> (2 * (s / 4)) & 3;
    return (low | high << 4) - 32;
}

USLI_WIDE void usli_decode_q3_k(const void *src, float *dst, int64_t n) {
    const usli_block_q3_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d);
        for (int s = 0; s < 16; s++) {
            float scale = d * (float)q3_k_scale(b->scales, s);
            const uint8_t *qs = b->qs + 32 * (s / 8) + 16 * (s % 2), *mask = b->hmask + 16 * (s % 2);
            int shift = 2 * (s / 2 % 4), bit = s / 2;
            for (int l = 0; l < 16; l++)
                dst[16 * s + l] = scale * (float)((qs[l] >> shift & 3) + (mask[l] >> bit & 1) * 4 - 4);
        }
    }
}

/* Scale s of Q4_K and Q5_K; their minima lie four bytes on. */
static void q4_k_scale(const uint8_t *scales, int s, int *scale, int *min) {
    if (s < 4) {
        *scale = scales[s] & 63;
        *min = scales[s + 4] & 63;
    } else {
        *scale = (scales[s + 4] & 15) | scales[s - 4] >> 6 << 4;
        *min = scales[s + 4] >> 4 | scales[s] >> 6 << 4;
    }
}

USLI_WIDE void usli_decode_q4_k(const void *src, float *dst, int64_t n) {
    const usli_block_q4_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d), dmin = usli_f16_to_f32(b->dmin);
        for (int s = 0; s < 8; s++) {
            int ls, lm;
            q4_k_scale(b->scales, s, &ls, &lm);
            float scale = d * (float)ls, min = dmin * (float)lm;
            const uint8_t *qs = b->qs + 32 * (s / 2);
            int shift = 4 * (s % 2);
            for (int l = 0; l < 32; l++) dst[32 * s + l] = scale * (float)(qs[l] >> shift & 15) - min;
        }
    }
}

USLI_WIDE void usli_decode_q5_k(const void *src, float *dst, int64_t n) {
    const usli_block_q5_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d), dmin = usli_f16_to_f32(b->dmin);
        for (int s = 0; s < 8; s++) {
            int ls, lm;
            q4_k_scale(b->scales, s, &ls, &lm);
            float scale = d * (float)ls, min = dmin * (float)lm;
            const uint8_t *qs = b->qs + 32 * (s / 2);
            int shift = 4 * (s % 2);
            for (int l = 0; l < 32; l++)
                dst[32 * s + l] = scale * (float)((qs[l] >> shift & 15) | (b->qh[l] >> s & 1) << 4) - min;
        }
    }
}

USLI_WIDE void usli_decode_q6_k(const void *src, float *dst, int64_t n) {
    const usli_block_q6_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d);
        for (int s = 0; s < 16; s++) {
            float scale = d * (float)b->scales[s];
            int half = s / 8, part = s / 2 % 4, at = 16 * (s % 2);
            const uint8_t *ql = b->ql + 64 * half + 32 * (part % 2) + at, *qh = b->qh + 32 * half + at;
            int shift = 4 * (part / 2), high = 2 * part;
            for (int l = 0; l < 16; l++)
                dst[16 * s + l] = scale * (float)(((ql[l] >> shift & 15) | (qh[l] >> high & 3) << 4) - 32);
        }
    }
}

/* ---- Encoding ------------------------------------------------------------------------------------------------------
 */

/* Two low bits of each code, four values a byte. */
static void pack_pairs(const uint8_t *q, uint8_t qs[64]) {
    for (int h = 0; h < 2; h++)
        for (int l = 0; l < 32; l++) {
            const uint8_t *v = q + 128 * h + l;
            qs[32 * h + l] = (uint8_t)((v[0] & 3) | (v[32] & 3) << 2 | (v[64] & 3) << 4 | (v[96] & 3) << 6);
        }
}

void usli_encode_q2_k(const float *src, const float *importance, void *dst, int64_t n) {
    const usli_lanes *fit = usli_lanes_best();
    usli_block_q2_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        usli_super s;
        fit->affine(src + i, importance ? importance + i : NULL, 16, 3, 15, &s);
        b->d = s.d;
        b->dmin = s.dmin;
        for (int k = 0; k < 16; k++) b->scales[k] = (uint8_t)(s.ls[k] | s.lm[k] << 4);
        pack_pairs(s.q, b->qs);
    }
}

void usli_encode_q3_k(const float *src, const float *importance, void *dst, int64_t n) {
    const usli_lanes *fit = usli_lanes_best();
    usli_block_q3_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        usli_super s;
        fit->symmetric(src + i, importance ? importance + i : NULL, -4, -32, &s);
        b->d = s.d;
        memset(b->scales, 0, sizeof b->scales);
        memset(b->hmask, 0, sizeof b->hmask);
        for (int k = 0; k < 16; k++) {
            int ls = s.ls[k] + 32;
            b->scales[k % 8] |= (uint8_t)((ls & 15) << (k < 8 ? 0 : 4));
            b->scales[8 + k % 4] |= (uint8_t)((ls >> 4) << (2 * (k / 4)));
        }
        for (int l = 0; l < USLI_QK_K; l++) b->hmask[l % 32] |= (uint8_t)((s.q[l] >> 2) << (l / 32));
        pack_pairs(s.q, b->qs);
    }
}

static void pack_q4_k(const usli_super *s, uint8_t scales[12], uint8_t qs[128]) {
    for (int k = 0; k < 4; k++) {
        scales[k] = (uint8_t)(s->ls[k] | (s->ls[k + 4] >> 4) << 6);
        scales[k + 4] = (uint8_t)(s->lm[k] | (s->lm[k + 4] >> 4) << 6);
        scales[k + 8] = (uint8_t)((s->ls[k + 4] & 15) | (s->lm[k + 4] & 15) << 4);
    }
    for (int c = 0; c < 4; c++)
        for (int l = 0; l < 32; l++)
            qs[32 * c + l] = (uint8_t)((s->q[64 * c + l] & 15) | (s->q[64 * c + 32 + l] & 15) << 4);
}

void usli_encode_q4_k(const float *src, const float *importance, void *dst, int64_t n) {
    const usli_lanes *fit = usli_lanes_best();
    usli_block_q4_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        usli_super s;
        fit->affine(src + i, importance ? importance + i : NULL, 32, 15, 63, &s);
        b->d = s.d;
        b->dmin = s.dmin;
        pack_q4_k(&s, b->scales, b->qs);
    }
}

void usli_encode_q5_k(const float *src, const float *importance, void *dst, int64_t n) {
    const usli_lanes *fit = usli_lanes_best();
    usli_block_q5_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        usli_super s;
        fit->affine(src + i, importance ? importance + i : NULL, 32, 31, 63, &s);
        b->d = s.d;
        b->dmin = s.dmin;
        pack_q4_k(&s, b->scales, b->qs);
        memset(b->qh, 0, sizeof b->qh);
        for (int l = 0; l < USLI_QK_K; l++) b->qh[l % 32] |= (uint8_t)((s.q[l] >> 4) << (l / 32));
    }
}

void usli_encode_q6_k(const float *src, const float *importance, void *dst, int64_t n) {
    const usli_lanes *fit = usli_lanes_best();
    usli_block_q6_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        usli_super s;
        fit->symmetric(src + i, importance ? importance + i : NULL, -32, -128, &s);
        b->d = s.d;
        for (int k = 0; k < 16; k++) b->scales[k] = (int8_t)s.ls[k];
        for (int h = 0; h < 2; h++)
            for (int l = 0; l < 32; l++) {
                const uint8_t *v = s.q + 128 * h + l;
                b->ql[64 * h + l] = (uint8_t)((v[0] & 15) | (v[64] & 15) << 4);
                b->ql[64 * h + 32 + l] = (uint8_t)((v[32] & 15) | (v[96] & 15) << 4);
                b->qh[32 * h + l] = (uint8_t)(v[0] >> 4 | (v[32] >> 4) << 2 | (v[64] >> 4) << 4 | (v[96] >> 4) << 6);
            }
    }
}
