/* The 256-value "K" types: 8 sub-blocks of 32 or 16 of 16, whose scales (and minima) are themselves quantised. */
#include "core/quant/codecs.h"

#include "core/base/half.h"
#include "core/quant/blocks.h"

void usli_decode_q2_k(const void *src, float *dst, int64_t n) {
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

void usli_decode_q3_k(const void *src, float *dst, int64_t n) {
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

void usli_decode_q4_k(const void *src, float *dst, int64_t n) {
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

void usli_decode_q5_k(const void *src, float *dst, int64_t n) {
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

void usli_decode_q6_k(const void *src, float *dst, int64_t n) {
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
