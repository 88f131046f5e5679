/* The 32-value types: one or two halves as scale and offset, then 4, 5 or 8 bits a value. */
#include "core/quant/codecs.h"

#include "core/base/half.h"
#include "core/quant/blocks.h"

/* The high bits of Q5 come as one 32-bit number. */
static inline uint32_t load_u32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void usli_decode_q4_0(const void *src, float *dst, int64_t n) {
    const usli_block_q4_0 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)((b->qs[j] & 15) - 8);
            dst[j + 16] = d * (float)((b->qs[j] >> 4) - 8);
        }
    }
}

void usli_decode_q4_1(const void *src, float *dst, int64_t n) {
    const usli_block_q4_1 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d), m = usli_f16_to_f32(b->m);
        for (int j = 0; j < 16; j++) {
            dst[j] = (float)(b->qs[j] & 15) * d + m;
            dst[j + 16] = (float)(b->qs[j] >> 4) * d + m;
        }
    }
}

void usli_decode_q5_0(const void *src, float *dst, int64_t n) {
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

void usli_decode_q5_1(const void *src, float *dst, int64_t n) {
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

void usli_decode_q8_0(const void *src, float *dst, int64_t n) {
    const usli_block_q8_0 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK) {
        float d = usli_f16_to_f32(b->d);
        for (int j = 0; j < USLI_QK; j++) dst[j] = (float)b->qs[j] * d;
    }
}
