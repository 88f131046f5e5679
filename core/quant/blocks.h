/* Byte layouts of ggml's quantised blocks, as they lie in GGUF files. One header for C and CUDA C++; it includes
 * nothing but <stdint.h>. Numbers are little-endian; f16 means the bits of a half; no block is padded, so a row is an
 * array.
 *
 * Nibbles of the 32-value types: byte j holds value j in its low half and value j + 16 in its high half.
 * In the 256-value types ("K"), sub-blocks of 16 or 32 values have small scales of their own. */
#ifndef USLI_QUANT_BLOCKS_H
#define USLI_QUANT_BLOCKS_H

#include <stdint.h>

#ifdef __cplusplus
#define USLI_BLOCK_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type " has the wrong size")
#else
#define USLI_BLOCK_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " has the wrong size")
#endif

enum { USLI_QK = 32, USLI_QK_K = 256 };

/* | d f16 | qs 16 |                  x = d * (q - 8) */
typedef struct usli_block_q4_0 {
    uint16_t d;
    uint8_t qs[16];
} usli_block_q4_0;
USLI_BLOCK_SIZE(usli_block_q4_0, 18);

/* | d f16 | m f16 | qs 16 |          x = d * q + m */
typedef struct usli_block_q4_1 {
    uint16_t d, m;
    uint8_t qs[16];
} usli_block_q4_1;
USLI_BLOCK_SIZE(usli_block_q4_1, 20);

/* | d f16 | qh 4 | qs 16 |           x = d * (q - 16), the fifth bit of value i is bit i of qh */
typedef struct usli_block_q5_0 {
    uint16_t d;
    uint8_t qh[4];
    uint8_t qs[16];
} usli_block_q5_0;
USLI_BLOCK_SIZE(usli_block_q5_0, 22);

/* | d f16 | m f16 | qh 4 | qs 16 |   x = d * q + m */
typedef struct usli_block_q5_1 {
    uint16_t d, m;
    uint8_t qh[4];
    uint8_t qs[16];
} usli_block_q5_1;
USLI_BLOCK_SIZE(usli_block_q5_1, 24);

/* | d f16 | qs 32 x int8 |           x = d * q */
typedef struct usli_block_q8_0 {
    uint16_t d;
    int8_t qs[32];
} usli_block_q8_0;
USLI_BLOCK_SIZE(usli_block_q8_0, 34);

/* | d f16 | s f16 | qs 32 x int8 |   x = d * q, s = d * sum of q: activations in memory, never in a file */
typedef struct usli_block_q8_1 {
    uint16_t d, s;
    int8_t qs[32];
} usli_block_q8_1;
USLI_BLOCK_SIZE(usli_block_q8_1, 36);

/* | scales 16 | qs 64 | d f16 | dmin f16 |     16 sub-blocks of 16
 * x = d * (scales[s] & 15) * q - dmin * (scales[s] >> 4)
 * qs: value 128 h + 32 k + l is bits 2k, 2k+1 of byte 32 h + l. */
typedef struct usli_block_q2_k {
    uint8_t scales[16];
    uint8_t qs[64];
    uint16_t d, dmin;
} usli_block_q2_k;
USLI_BLOCK_SIZE(usli_block_q2_k, 84);

/* | hmask 32 | qs 64 | scales 12 | d f16 |     16 sub-blocks of 16
 * x = d * (scale s - 32) * (q - 4), q's low two bits as in Q2_K, its third: value 32 b + l is bit b of hmask[l].
 * scales, 6 bits each: low four of scale s in the halves of bytes 0..7 (s < 8 low, else high half of byte s - 8);
 * high two at bits 2 (s / 4) of byte 8 + s % 4. */
typedef struct usli_block_q3_k {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;
} usli_block_q3_k;
USLI_BLOCK_SIZE(usli_block_q3_k, 110);

/* | d f16 | dmin f16 | scales 12 | qs 128 |    8 sub-blocks of 32
 * x = d * scale s * q - dmin * min s
 * scales, 6 bits each:  byte 0..3   scale 0..3, above it the high two bits of scale 4..7
 *                       byte 4..7   min 0..3,   above it the high two bits of min 4..7
 *                       byte 8..11  low four bits of scale 4..7, then of min 4..7 in the high half
 * qs: value 64 c + l is the low half of byte 32 c + l, value 64 c + 32 + l its high half. */
typedef struct usli_block_q4_k {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qs[128];
} usli_block_q4_k;
USLI_BLOCK_SIZE(usli_block_q4_k, 144);

/* | d f16 | dmin f16 | scales 12 | qh 32 | qs 128 |    Q4_K with a fifth bit: value 32 s + l is bit s of qh[l] */
typedef struct usli_block_q5_k {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
} usli_block_q5_k;
USLI_BLOCK_SIZE(usli_block_q5_k, 176);

/* | ql 128 | qh 64 | scales 16 x int8 | d f16 |        16 sub-blocks of 16
 * x = d * scales[s] * (q - 32). In half h of the block (128 values), value 32 k + l has its low four bits in byte
 * 64 h + 32 (k % 2) + l of ql (low half for k < 2, else high) and its high two at bits 2k of qh[32 h + l]. */
typedef struct usli_block_q6_k {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
} usli_block_q6_k;
USLI_BLOCK_SIZE(usli_block_q6_k, 210);

/* | d f32 | qs 256 x int8 | bsums 16 x int16 |         x = d * q; bsums: sums of 16. Never in a file */
typedef struct usli_block_q8_k {
    float d;
    int8_t qs[256];
    int16_t bsums[16];
} usli_block_q8_k;
USLI_BLOCK_SIZE(usli_block_q8_k, 292);

/* | d f16 | qs 16 |                  x = d * usli_iq4_values[q] */
typedef struct usli_block_iq4_nl {
    uint16_t d;
    uint8_t qs[16];
} usli_block_iq4_nl;
USLI_BLOCK_SIZE(usli_block_iq4_nl, 18);

/* | d f16 | scales_h 2 | scales_l 4 | qs 128 |         8 sub-blocks of 32, each with nibbles as in IQ4_NL
 * x = d * (scale s - 32) * usli_iq4_values[q]; scale s: low four bits in half s % 2 of scales_l[s / 2], high two at
 * bits 2s of scales_h. */
typedef struct usli_block_iq4_xs {
    uint16_t d, scales_h;
    uint8_t scales_l[4];
    uint8_t qs[128];
} usli_block_iq4_xs;
USLI_BLOCK_SIZE(usli_block_iq4_xs, 136);

/* | e 1 | qs 16 |                    x = 2^(e - 127) * e2m1[q], e2m1 = 0 0.5 1 1.5 2 3 4 6 and their negatives */
typedef struct usli_block_mxfp4 {
    uint8_t e;
    uint8_t qs[16];
} usli_block_mxfp4;
USLI_BLOCK_SIZE(usli_block_mxfp4, 17);

/* ---- Types below four bits: points of lattices (core/quant/grids.h), 256 values ------------------------------------
 * x = d * (2 scale + 1) * level, with a sign. "Even" signs of eight values are seven bits, low first; the eighth makes
 * the number of minuses even. */

/* | d f16 | qs 64 |                  per 32 values 8 bytes: 4 points, then 32 bits: 4 x 7 even signs, the scale above
 * x = d * (scale + 0.5) / 4 * level, levels 8 25 43 */
typedef struct usli_block_iq2_xxs {
    uint16_t d;
    uint8_t qs[64];
} usli_block_iq2_xxs;
USLI_BLOCK_SIZE(usli_block_iq2_xxs, 66);

/* | d f16 | qs 32 x u16 | scales 8 |     qs: nine bits of point, seven of even signs; a scale for 16 values, low half
 * first
 */
typedef struct usli_block_iq2_xs {
    uint16_t d, qs[32];
    uint8_t scales[8];
} usli_block_iq2_xs;
USLI_BLOCK_SIZE(usli_block_iq2_xs, 74);

/* | d f16 | qs 32 | signs 32 | qh 8 | scales 8 |     qh: bits 8 and 9 of point k at bits 2 (k % 4) of byte k / 4 */
typedef struct usli_block_iq2_s {
    uint16_t d;
    uint8_t qs[32], signs[32], qh[8], scales[8];
} usli_block_iq2_s;
USLI_BLOCK_SIZE(usli_block_iq2_s, 82);

/* | d f16 | qs 64 | gas 32 |             points of 4 values; gas: per 32 values 4 x 7 even signs, the scale above
 * x = d * (scale + 0.5) / 2 * level, levels 4 12 20 28 36 44 52 62 */
typedef struct usli_block_iq3_xxs {
    uint16_t d;
    uint8_t qs[64], gas[32];
} usli_block_iq3_xxs;
USLI_BLOCK_SIZE(usli_block_iq3_xxs, 98);

/* | d f16 | qs 64 | qh 8 | signs 32 | scales 4 |     points of 4 values, bit 8 of point k is bit k % 8 of qh[k / 8];
 * a scale for 32 values; levels 1 3 .. 15 */
typedef struct usli_block_iq3_s {
    uint16_t d;
    uint8_t qs[64], qh[8], signs[32], scales[4];
} usli_block_iq3_s;
USLI_BLOCK_SIZE(usli_block_iq3_s, 110);

/* | d f16 | qs 32 | qh 8 x u16 |         qh, per 32 values: 4 x bits 8 to 10 of the points, the scale, the shift's sign
 * x = d * (2 scale + 1) * (level +- 1/8), levels -1 0 1 */
typedef struct usli_block_iq1_s {
    uint16_t d;
    uint8_t qs[32];
    uint16_t qh[8];
} usli_block_iq1_s;
USLI_BLOCK_SIZE(usli_block_iq1_s, 50);

/* | qs 32 | qh 16 | scales 4 x u16 |     qh, per 16 values: twice bits 8 to 10 of the point and the shift's sign
 * scales: 4 x 3 bits of scales for 16 values, above them a quarter of d's bits, the lowest first */
typedef struct usli_block_iq1_m {
    uint8_t qs[32], qh[16];
    uint16_t scales[4];
} usli_block_iq1_m;
USLI_BLOCK_SIZE(usli_block_iq1_m, 56);

#endif
