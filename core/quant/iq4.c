/* Four-bit types whose codes index a fixed table of uneven steps: IQ4_NL, IQ4_XS, MXFP4. */
#include "core/quant/codecs.h"

#include "core/base/half.h"
#include "core/quant/blocks.h"

static const float IQ4_VALUES[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
/* Twice e2m1, so that the scale below is half the block's and 2^(e - 128) can be made for every e. */
static const float MXFP4_VALUES[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

static inline void decode_nibbles(const uint8_t qs[16], float scale, const float table[16], float *dst) {
    for (int j = 0; j < 16; j++) {
        dst[j] = scale * table[qs[j] & 15];
        dst[j + 16] = scale * table[qs[j] >> 4];
    }
}

void usli_decode_iq4_nl(const void *src, float *dst, int64_t n) {
    const usli_block_iq4_nl *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK)
        decode_nibbles(b->qs, usli_f16_to_f32(b->d), IQ4_VALUES, dst);
}

static int iq4_xs_scale(const usli_block_iq4_xs *b, int s) {
    return ((b->scales_l[s / 2] >> (4 * (s % 2)) & 15) | (b->scales_h >> (2 * s) & 3) << 4) - 32;
}

void usli_decode_iq4_xs(const void *src, float *dst, int64_t n) {
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

void usli_decode_mxfp4(const void *src, float *dst, int64_t n) {
    const usli_block_mxfp4 *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK, b++, dst += USLI_QK)
        decode_nibbles(b->qs, mxfp4_half_scale(b->e), MXFP4_VALUES, dst);
}
