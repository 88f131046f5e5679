/* The types below four bits: decoding, and packing what points.c finds. */
#include "core/quant/codecs.h"

#include <stdbool.h>
#include <string.h>

#include "core/base/half.h"
#include "core/quant/blocks.h"
#include "core/quant/grids.h"
#include "core/quant/lanes.h"
#include "core/quant/points.h"

static inline uint32_t load_u32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static inline void store_u32(uint8_t *p, uint32_t x) {
    for (int k = 0; k < 4; k++) p[k] = (uint8_t)(x >> (8 * k));
}

/* Eight signs from seven bits. */
static inline unsigned even_signs(unsigned seven) {
    return seven | (unsigned)(__builtin_popcount(seven) & 1) << 7;
}

/* ---- Decoding: every product is exact ------------------------------------------------------------------------------
 */

/* The values of a point. */
static inline void put_point(const usli_grid *grid, unsigned at, unsigned signs, float scale, float *dst) {
    unsigned point = grid->points[at], mask = (1u << grid->bits) - 1;
    for (int i = 0; i < grid->digits; i++) {
        float v = scale * grid->levels[point >> (grid->bits * i) & mask];
        dst[i] = signs >> i & 1 ? -v : v;
    }
}

static inline void put_shifted(unsigned at, bool down, float scale, float *dst) {
    unsigned point = usli_grid_iq1.points[at];
    for (int i = 0; i < 8; i++) dst[i] = scale * ((float)((int)(point >> (2 * i) & 3) - 1) + (down ? -0.125f : 0.125f));
}

void usli_decode_iq2_xxs(const void *src, float *dst, int64_t n) {
    const usli_block_iq2_xxs *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++)
        for (int s = 0; s < 8; s++) {
            const uint8_t *qs = b->qs + 8 * s;
            uint32_t gas = load_u32(qs + 4);
            float scale = usli_f16_to_f32(b->d) * (float)(2 * (gas >> 28) + 1);
            for (int g = 0; g < 4; g++, dst += 8)
                put_point(&usli_grid_iq2_xxs, qs[g], even_signs(gas >> (7 * g) & 127), scale, dst);
        }
}

void usli_decode_iq2_xs(const void *src, float *dst, int64_t n) {
    const usli_block_iq2_xs *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++)
        for (int g = 0; g < 32; g++, dst += 8) {
            float scale = usli_f16_to_f32(b->d) * (float)(2 * (b->scales[g / 4] >> (4 * (g / 2 % 2)) & 15) + 1);
            put_point(&usli_grid_iq2_xs, b->qs[g] & 511, even_signs(b->qs[g] >> 9), scale, dst);
        }
}

void usli_decode_iq2_s(const void *src, float *dst, int64_t n) {
    const usli_block_iq2_s *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++)
        for (int g = 0; g < 32; g++, dst += 8) {
            float scale = usli_f16_to_f32(b->d) * (float)(2 * (b->scales[g / 4] >> (4 * (g / 2 % 2)) & 15) + 1);
            unsigned high = b->qh[g / 4] >> (2 * (g % 4)) & 3;
            put_point(&usli_grid_iq2_s, b->qs[g] | high << 8, b->signs[g], scale, dst);
        }
}

void usli_decode_iq3_xxs(const void *src, float *dst, int64_t n) {
    const usli_block_iq3_xxs *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++)
        for (int g = 0; g < 32; g++, dst += 8) {
            uint32_t gas = load_u32(b->gas + 4 * (g / 4));
            float scale = usli_f16_to_f32(b->d) * (float)(2 * (gas >> 28) + 1);
            unsigned signs = even_signs(gas >> (7 * (g % 4)) & 127);
            put_point(&usli_grid_iq3_xxs, b->qs[2 * g], signs, scale, dst);
            put_point(&usli_grid_iq3_xxs, b->qs[2 * g + 1], signs >> 4, scale, dst + 4);
        }
}

void usli_decode_iq3_s(const void *src, float *dst, int64_t n) {
    const usli_block_iq3_s *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++)
        for (int g = 0; g < 32; g++, dst += 8) {
            float scale = usli_f16_to_f32(b->d) * (float)(2 * (b->scales[g / 8] >> (4 * (g / 4 % 2)) & 15) + 1);
            unsigned high = b->qh[g / 4] >> (2 * (g % 4));
            put_point(&usli_grid_iq3_s, b->qs[2 * g] | (high & 1) << 8, b->signs[g], scale, dst);
            put_point(&usli_grid_iq3_s, b->qs[2 * g + 1] | (high >> 1 & 1) << 8, b->signs[g] >> 4, scale, dst + 4);
        }
}

void usli_decode_iq1_s(const void *src, float *dst, int64_t n) {
    const usli_block_iq1_s *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++)
        for (int g = 0; g < 32; g++, dst += 8) {
            unsigned qh = b->qh[g / 4];
            float scale = usli_f16_to_f32(b->d) * (float)(2 * (qh >> 12 & 7) + 1);
            put_shifted(b->qs[g] | (qh >> (3 * (g % 4)) & 7) << 8, qh >> 15, scale, dst);
        }
}

void usli_decode_iq1_m(const void *src, float *dst, int64_t n) {
    const usli_block_iq1_m *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        uint16_t d = 0;
        for (int k = 0; k < 4; k++) d |= (uint16_t)((b->scales[k] >> 12) << (4 * k));
        for (int g = 0; g < 32; g++, dst += 8) {
            unsigned qh = b->qh[g / 2] >> (4 * (g % 2));
            float scale = usli_f16_to_f32(d) * (float)(2 * (b->scales[g / 8] >> (3 * (g / 2 % 4)) & 7) + 1);
            put_shifted(b->qs[g] | (qh & 7) << 8, qh >> 3 & 1, scale, dst);
        }
    }
}

/* ---- Encoding ------------------------------------------------------------------------------------------------------
 */

#define ENCODE(name, GRID, SPAN, TOP, SIGNS)                                                   \
    void usli_encode_##name(const float *src, const float *importance, void *dst, int64_t n) { \
        static const usli_lattice KIND = { &usli_grid_##GRID, SPAN, TOP, SIGNS };              \
        const usli_lanes *fit = usli_lanes_best();                                             \
        usli_block_##name *b = dst;                                                            \
        usli_runs runs;                                                                        \
        usli_points p;                                                                         \
        usli_runs_of(KIND.grid, &runs);                                                        \
        for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {                                      \
            fit->points(&KIND, &runs, src + i, importance ? importance + i : NULL, &p);        \
            memset(b, 0, sizeof *b);                                                           \
            pack_##name(&p, b);                                                                \
        }                                                                                      \
    }

static void pack_iq2_xxs(const usli_points *p, usli_block_iq2_xxs *b) {
    b->d = p->d;
    for (int s = 0; s < 8; s++) {
        uint32_t gas = (uint32_t)p->ls[s] << 28;
        for (int g = 0; g < 4; g++) {
            b->qs[8 * s + g] = (uint8_t)p->at[4 * s + g];
            gas |= (p->signs[4 * s + g] & 127u) << (7 * g);
        }
        store_u32(b->qs + 8 * s + 4, gas);
    }
}

static void pack_iq2_xs(const usli_points *p, usli_block_iq2_xs *b) {
    b->d = p->d;
    for (int g = 0; g < 32; g++) b->qs[g] = (uint16_t)(p->at[g] | (p->signs[g] & 127) << 9);
    for (int k = 0; k < 8; k++) b->scales[k] = (uint8_t)(p->ls[2 * k] | p->ls[2 * k + 1] << 4);
}

static void pack_iq2_s(const usli_points *p, usli_block_iq2_s *b) {
    b->d = p->d;
    memcpy(b->signs, p->signs, sizeof b->signs);
    for (int g = 0; g < 32; g++) {
        b->qs[g] = (uint8_t)p->at[g];
        b->qh[g / 4] |= (uint8_t)((p->at[g] >> 8) << (2 * (g % 4)));
    }
    for (int k = 0; k < 8; k++) b->scales[k] = (uint8_t)(p->ls[2 * k] | p->ls[2 * k + 1] << 4);
}

static void pack_iq3_xxs(const usli_points *p, usli_block_iq3_xxs *b) {
    b->d = p->d;
    for (int k = 0; k < 64; k++) b->qs[k] = (uint8_t)p->at[k];
    for (int s = 0; s < 8; s++) {
        uint32_t gas = (uint32_t)p->ls[s] << 28;
        for (int g = 0; g < 4; g++) gas |= (p->signs[4 * s + g] & 127u) << (7 * g);
        store_u32(b->gas + 4 * s, gas);
    }
}

static void pack_iq3_s(const usli_points *p, usli_block_iq3_s *b) {
    b->d = p->d;
    memcpy(b->signs, p->signs, sizeof b->signs);
    for (int k = 0; k < 64; k++) {
        b->qs[k] = (uint8_t)p->at[k];
        b->qh[k / 8] |= (uint8_t)((p->at[k] >> 8) << (k % 8));
    }
    for (int k = 0; k < 4; k++) b->scales[k] = (uint8_t)(p->ls[2 * k] | p->ls[2 * k + 1] << 4);
}

static void pack_iq1_s(const usli_points *p, usli_block_iq1_s *b) {
    b->d = p->d;
    for (int g = 0; g < 32; g++) {
        b->qs[g] = (uint8_t)p->at[g];
        b->qh[g / 4] |= (uint16_t)((p->at[g] >> 8) << (3 * (g % 4)));
    }
    for (int s = 0; s < 8; s++) b->qh[s] |= (uint16_t)(p->ls[s] << 12 | (p->signs[4 * s] & 1) << 15);
}

static void pack_iq1_m(const usli_points *p, usli_block_iq1_m *b) {
    for (int g = 0; g < 32; g++) {
        b->qs[g] = (uint8_t)p->at[g];
        b->qh[g / 2] |= (uint8_t)((p->at[g] >> 8 | (p->signs[g] & 8)) << (4 * (g % 2)));
    }
    for (int s = 0; s < 16; s++) b->scales[s / 4] |= (uint16_t)(p->ls[s] << (3 * (s % 4)));
    for (int k = 0; k < 4; k++) b->scales[k] |= (uint16_t)((p->d >> (4 * k) & 15) << 12);
}

ENCODE(iq2_xxs, iq2_xxs, 32, 15, USLI_SIGNS_EVEN)
ENCODE(iq2_xs, iq2_xs, 16, 15, USLI_SIGNS_EVEN)
ENCODE(iq2_s, iq2_s, 16, 15, USLI_SIGNS_FREE)
ENCODE(iq3_xxs, iq3_xxs, 32, 15, USLI_SIGNS_EVEN)
ENCODE(iq3_s, iq3_s, 32, 15, USLI_SIGNS_FREE)
ENCODE(iq1_s, iq1, 32, 7, USLI_SIGNS_SHIFT)
ENCODE(iq1_m, iq1, 16, 7, USLI_SIGNS_SHIFTS)
