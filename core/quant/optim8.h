/* Blockwise 8-bit codes as bitsandbytes stores optimiser states (Dettmers et al. 2022): a block of 256 values shares
 * its absmax; a code indexes a map of 256 ascending values. Adam uses usli_dynamic_map for m, usli_dynamic_map_unsigned
 * for v (core/quant/nf4.h).
 *
 *   value i = map[code i] * absmax[i / 256]
 *
 * The code is the nearest of the map to value * (1 / absmax), the lower of two at the same distance: bitsandbytes on a
 * GPU, but for exact ties. (Its newer CPU code first rounds to a grid of 65536 steps over -1 .. 1, on which zero moves
 * and second moments below absmax / 65536 are lost; that would disturb training, so it is not imitated here.) */
#ifndef USLI_QUANT_OPTIM8_H
#define USLI_QUANT_OPTIM8_H

#include "core/base/ctx.h"

enum { USLI_OPTIM8_BLOCK = 256 };

/* absmax: (n + 255) / 256 values. An all-zero block has codes 0 and absmax 0. */
void usli_quantize_blockwise(const float *src, int64_t n, const float *map, uint8_t *codes, float *absmax);
void usli_dequantize_blockwise(const uint8_t *codes, int64_t n, const float *map, const float *absmax, float *dst);

/* The same by single blocks, for a fused update. bounds[i] is the middle between map[i] and map[i + 1], the last is
 * infinite: made once for a map. n is at most 256. */
void usli_map_bounds(const float *map, float *bounds);
void usli_quantize_block(const float *src, int n, const float *bounds, uint8_t *codes, float *absmax);

/* The number of bounds below x, by halving without branches. NaN gives 0. */
static inline uint8_t usli_map_code(const float *bounds, float x) {
    uint32_t at = 0;
    for (uint32_t step = 128; step; step >>= 1) at += bounds[at + step - 1] < x ? step : 0;
    return (uint8_t)at;
}

#endif
