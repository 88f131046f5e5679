#include "core/quant/optim8.h"

#include <math.h>

#include "core/quant/codecs.h"

void usli_map_bounds(const float *map, float *bounds) {
    for (int i = 0; i < 255; i++) bounds[i] = 0.5f * (map[i] + map[i + 1]);
    bounds[255] = INFINITY;
}

/* usli_map_code for a whole block, halving step by halving step, so that the inner loop is one of independent values.
 */
USLI_WIDE void usli_quantize_block(const float *src, int n, const float *bounds, uint8_t *codes, float *absmax) {
    float max = 0, scaled[USLI_OPTIM8_BLOCK];
    int32_t at[USLI_OPTIM8_BLOCK] = { 0 };
    for (int i = 0; i < n; i++) max = fabsf(src[i]) > max ? fabsf(src[i]) : max;
    *absmax = max;
    float inverse = max > 0 ? 1.0f / max : 0;
    /* A block of zeros lies below every bound, so that its codes are 0. */
    for (int i = 0; i < n; i++) scaled[i] = max > 0 ? src[i] * inverse : -2;
    for (int32_t step = 128; step; step >>= 1)
        for (int i = 0; i < n; i++) at[i] += bounds[at[i] + step - 1] < scaled[i] ? step : 0;
    for (int i = 0; i < n; i++) codes[i] = (uint8_t)at[i];
}

void usli_quantize_blockwise(const float *src, int64_t n, const float *map, uint8_t *codes, float *absmax) {
    float bounds[256];
    usli_map_bounds(map, bounds);
    for (int64_t i = 0; i < n; i += USLI_OPTIM8_BLOCK) {
        int count = n - i < USLI_OPTIM8_BLOCK ? (int)(n - i) : USLI_OPTIM8_BLOCK;
        usli_quantize_block(src + i, count, bounds, codes + i, absmax++);
    }
}

void usli_dequantize_blockwise(const uint8_t *codes, int64_t n, const float *map, const float *absmax, float *dst) {
    for (int64_t i = 0; i < n; i++) dst[i] = map[codes[i]] * absmax[i / USLI_OPTIM8_BLOCK];
}
