/* 16-bit floats: round to nearest even, NaN stays NaN. Plain C that compilers vectorise. */
#ifndef USLI_BASE_HALF_H
#define USLI_BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline float usli_u32_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t usli_float_as_u32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float usli_bf16_to_f32(uint16_t h) {
    return usli_u32_as_float((uint32_t)h << 16);
}

static inline uint16_t usli_f32_to_bf16(float f) {
    uint32_t u = usli_float_as_u32(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint32_t nan = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

static inline float usli_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t mag = h & 0x7fffu;
    /* Normal numbers move their exponent; subnormals are made by a subtraction that is exact. */
    float normal = usli_u32_as_float((mag << 13) + 0x38000000u);
    float subnormal = usli_u32_as_float((mag << 13) + 0x38800000u) - usli_u32_as_float(0x38800000u);
    float special = usli_u32_as_float((mag << 13) | 0x7f800000u);
    float value = mag >= 0x7c00u ? special : mag < 0x0400u ? subnormal : normal;
    return usli_u32_as_float(usli_float_as_u32(value) | sign);
}

static inline uint16_t usli_f32_to_f16(float f) {
    uint32_t u = usli_float_as_u32(f);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t mag = u & 0x7fffffffu;
    uint32_t out;
    if (mag > 0x7f800000u)
        out = 0x7e00u | ((mag >> 13) & 0x3ffu);
    else if (mag >= 0x477ff000u)
        out = 0x7c00u; /* 65520 and more round to infinity */
    else if (mag < 0x38800000u)
        out = usli_float_as_u32(usli_u32_as_float(mag) + 0.5f) -
              0x3f000000u; /* adding 0.5 aligns and rounds a subnormal */
    else
        out = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
    return (uint16_t)(sign | out);
}

#endif
