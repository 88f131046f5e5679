/* NF4 with double quantisation, code for code as bitsandbytes makes it (QLoRA, Dettmers et al. 2023): blocks of 64
 * values share an absmax; absmax minus its mean is quantised to 8 bits by the dynamic map in blocks of 256.
 *
 *   value i = NF4[code i] * absmax[i / 64]          code: 4 bits, the even value in the high half of its byte
 *   absmax j = map[absmax_q j] * absmax2[j / 256] + offset
 */
#ifndef USLI_QUANT_NF4_H
#define USLI_QUANT_NF4_H

#include "core/base/ctx.h"

enum { USLI_NF4_BLOCK = 64, USLI_NF4_NEST = 256 };

extern const float usli_nf4_table[16];
extern const float usli_fp4_table[16];
/* bitsandbytes' create_dynamic_map(signed=True) and (signed=False): 256 ascending values. */
extern const float usli_dynamic_map[256];
extern const float usli_dynamic_map_unsigned[256];

/* The constants of one quantised weight of n values. Every array is borrowed. */
typedef struct usli_nf4 {
    const uint8_t *codes;    /* (n + 1) / 2 */
    const uint8_t *absmax_q; /* one a block of 64; NULL when absmax is plain */
    const float *absmax2;    /* one a 256 blocks */
    float offset;
    const float *absmax; /* one a block of 64, when not doubly quantised */
    const float *table;  /* usli_nf4_table or usli_fp4_table */
    const float *map;    /* usli_dynamic_map */
} usli_nf4;

static inline int64_t usli_nf4_blocks(int64_t n) {
    return (n + USLI_NF4_BLOCK - 1) / USLI_NF4_BLOCK;
}
static inline int64_t usli_nf4_nests(int64_t n) {
    return (usli_nf4_blocks(n) + USLI_NF4_NEST - 1) / USLI_NF4_NEST;
}
/* Bytes of one weight of n values laid out as codes | absmax2 | absmax_q, each 64-byte aligned (0 when n is negative or
 * far beyond memory), and the views into it, with NF4's table and the signed map. */
size_t usli_nf4_bytes(int64_t n);
void usli_nf4_layout(void *storage, int64_t n, usli_nf4 *out);
/* Quantises n values into a layout made by usli_nf4_layout; sets q->offset. scratch: usli_nf4_blocks(n) floats, which
 * hold the plain absmax afterwards. A q->table set to usli_fp4_table gives FP4. */
void usli_nf4_quantize(usli_nf4 *q, const float *src, int64_t n, float *scratch);
/* Codes, (n + 1) / 2 bytes, and plain absmax, one a block of 64, of n values by usli_nf4_table or usli_fp4_table. */
void usli_nf4_quantize_plain(const float *table, const float *src, int64_t n, uint8_t *codes, float *absmax);
/* The two steps of usli_nf4_quantize apart, for a weight that comes in pieces of whole blocks: codes and plain absmax
 * are there, and absmax is quantised. */
void usli_nf4_nest(usli_nf4 *q, const float *absmax, int64_t blocks);
/* Decodes values first .. first + count - 1 (any alignment). */
void usli_nf4_decode(const usli_nf4 *q, int64_t first, int64_t count, float *dst);

#endif
