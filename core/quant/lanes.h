/* The encoders' inner work, eight sub-blocks or eight values side by side: compiled once per instruction set (lanes.c)
 * and picked at run time (lanes_table.c). Products and sums are never fused and have one order, so every build gives
 * the same bytes. */
#ifndef USLI_QUANT_LANES_H
#define USLI_QUANT_LANES_H

#include <stdint.h>

#include "core/quant/points.h"

/* A super-block of 256 values before packing: sub-block s of `size` values holds codes q[size * s ..] with the
 * quantised scale ls[s] (and min lm[s]). d and dmin are halves. */
typedef struct usli_super {
    uint16_t d, dmin;
    int32_t ls[16], lm[16];
    uint8_t q[256];
} usli_super;

typedef struct usli_lanes {
    /* x = d ls q - dmin lm, with codes 0 .. top and scales and minima 0 .. scale_top; w: weights (256) or NULL. */
    void (*affine)(const float *x, const float *w, int size, int top, int scale_top, usli_super *out);
    /* x = d ls (q + lo), sub-blocks of 16, codes 0 .. -2 lo - 1, scales scale_lo .. -scale_lo - 1. */
    void (*symmetric)(const float *x, const float *w, int lo, int scale_lo, usli_super *out);
    /* Blocks of 32 values without weights; n is a multiple of 32. */
    void (*q4_0)(const float *x, void *dst, int64_t n);
    void (*q4_1)(const float *x, void *dst, int64_t n);
    void (*q5_0)(const float *x, void *dst, int64_t n);
    void (*q5_1)(const float *x, void *dst, int64_t n);
    void (*q8_0)(const float *x, void *dst, int64_t n);
    /* 256 values as points of a lattice (points.c); w: weights (256) or NULL. */
    void (*points)(const usli_lattice *kind, const usli_runs *runs, const float *x, const float *w, usli_points *out);
} usli_lanes;

/* points.c */
void usli_points_generic(const usli_lattice *kind, const usli_runs *runs, const float *x, const float *w,
                         usli_points *out);
void usli_points_avx2(const usli_lattice *kind, const usli_runs *runs, const float *x, const float *w,
                      usli_points *out);

/* The best this processor runs. */
const usli_lanes *usli_lanes_best(void);

extern const usli_lanes usli_lanes_generic;
#if defined(__x86_64__)
extern const usli_lanes usli_lanes_avx2;
#endif

#endif
