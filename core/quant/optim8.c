#include "core/quant/optim8.h"

#include <math.h>
#include <string.h>

void usli_map_bounds(const float *map, float *bounds) {
    for (int i = 0; i < 255; i++) bounds[i] = 0.5f * (map[i] + map[i + 1]);
    bounds[255] = INFINITY;
}

void usli_quantize_block(const float *src, int n, const float *bounds, uint8_t *codes, float *absmax) {
    float max = 0;
    for (int i = 0; i < n; i++) max = fabsf(src[i]) > max ? fabsf(src[i]) : max;
    *absmax = max;
    if (max == 0) {
        memset(codes, 0, (size_t)n);
        return;
    }
    float inverse = 1.0f / max;
    for (int i = 0; i < n; i++) codes[i] = usli_map_code(bounds, src[i] * inverse);
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
