/* Finding scales, a block at a time: what encoders share that lanes.h does not serve. A block x is written as scale * q
 * (symmetric: lo <= q <= hi) or as scale * q + min (affine: 0 <= q <= top) with whole q, so that the squared error
 * weighted by w is small.
 *
 * For given q the best scale (and min) is a small least-squares problem; so the fits guess a scale, round, solve, and
 * keep the best of a row of guesses. Everything is summed in eight lanes of fixed order: it vectorises, and the bytes
 * do not depend on the machine. A NaN rounds to the lowest code. n is a multiple of 8, at most 32. */
#ifndef USLI_QUANT_FIT_H
#define USLI_QUANT_FIT_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/half.h"

enum { USLI_FIT_LANES = 8 };

/* Weights for when the caller has none: 256 ones. */
extern const float usli_fit_ones[256];

/* NaN gives lo. */
static inline float usli_clampf(float x, float lo, float hi) {
    x = x > lo ? x : lo;
    return x < hi ? x : hi;
}
/* To the nearest whole number, even on ties, for |x| below 2^22: the sum has no bits left for the fraction. */
static inline float usli_roundf(float x) {
    return (x + 12582912.0f) - 12582912.0f;
}
/* x / scale to the nearest code. A scale of 0 has inverse 0. */
static inline int usli_code_of(float x, float inverse, float lo, float hi) {
    return (int)usli_roundf(usli_clampf(x * inverse, lo, hi));
}
static inline float usli_inverse(float scale) {
    return scale != 0 ? 1.0f / scale : 0;
}
/* A scale as its half holds it; one too small for a half becomes the smallest there is, never 0. */
static inline uint16_t usli_scale_to_f16(float scale) {
    uint16_t h = usli_f32_to_f16(scale);
    return (h & 0x7fffu) == 0 && scale != 0 ? (uint16_t)(h | 1u) : h;
}

/* half: the scale (and min) will be stored as f16, so guesses are judged after that rounding, and min may have any
 * sign. Otherwise a super-block will quantise them, and min is never above 0. */
float usli_fit_symmetric(const float *x, const float *w, int n, int lo, int hi, bool half);
void usli_fit_affine(const float *x, const float *w, int n, int top, bool half, float *scale, float *min);

/* The scale that takes the largest (by magnitude) of count scales to `top`, as its half. */
uint16_t usli_super_scale(const float *scales, int count, int top);

static inline float usli_lane_sum(const float a[USLI_FIT_LANES]) {
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

#endif
