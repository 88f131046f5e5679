/* The 256-value "K" types: 8 sub-blocks of 32 or 16 of 16, whose scales (and minima) are themselves quantised. */
#include "core/quant/codecs.h"

#include <math.h>
#include <string.h>

#include "core/base/half.h"
#include "core/quant/blocks.h"
#include "core/quant/fit.h"

USLI_WIDE void usli_decode_q2_k(const void *src, float *dst, int64_t n) {
    const usli_block_q2_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d), dmin = usli_f16_to_f32(b->dmin);
        for (int s = 0; s < 16; s++) {
            float scale = d * (float)(b->scales[s] & 15), min = dmin * (float)(b->scales[s] >> 4);
            const uint8_t *qs = b->qs + 32 * (s / 8) + 16 * (s % 2);
            int shift = 2 * (s / 2 % 4);
            for (int l = 0; l < 16; l++) dst[16 * s + l] = scale * (float)(qs[l] >> shift & 3) - min;
        }
    }
}

static int q3_k_scale(const uint8_t *scales, int s) {
    int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4;
    int high = scales[8 + s % 4] >> (2 * (s / 4)) & 3;
    return (low | high << 4) - 32;
}

USLI_WIDE void usli_decode_q3_k(const void *src, float *dst, int64_t n) {
    const usli_block_q3_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d);
        for (int s = 0; s < 16; s++) {
            float scale = d * (float)q3_k_scale(b->scales, s);
            const uint8_t *qs = b->qs + 32 * (s / 8) + 16 * (s % 2), *mask = b->hmask + 16 * (s % 2);
            int shift = 2 * (s / 2 % 4), bit = s / 2;
            for (int l = 0; l < 16; l++)
                dst[16 * s + l] = scale * (float)((qs[l] >> shift & 3) + (mask[l] >> bit & 1) * 4 - 4);
        }
    }
}

/* Scale s of Q4_K and Q5_K; their minima lie four bytes on. */
static void q4_k_scale(const uint8_t *scales, int s, int *scale, int *min) {
    if (s < 4) {
        *scale = scales[s] & 63;
        *min = scales[s + 4] & 63;
    } else {
        *scale = (scales[s + 4] & 15) | scales[s - 4] >> 6 << 4;
        *min = scales[s + 4] >> 4 | scales[s] >> 6 << 4;
    }
}

USLI_WIDE void usli_decode_q4_k(const void *src, float *dst, int64_t n) {
    const usli_block_q4_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d), dmin = usli_f16_to_f32(b->dmin);
        for (int s = 0; s < 8; s++) {
            int ls, lm;
            q4_k_scale(b->scales, s, &ls, &lm);
            float scale = d * (float)ls, min = dmin * (float)lm;
            const uint8_t *qs = b->qs + 32 * (s / 2);
            int shift = 4 * (s % 2);
            for (int l = 0; l < 32; l++) dst[32 * s + l] = scale * (float)(qs[l] >> shift & 15) - min;
        }
    }
}

USLI_WIDE void usli_decode_q5_k(const void *src, float *dst, int64_t n) {
    const usli_block_q5_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d), dmin = usli_f16_to_f32(b->dmin);
        for (int s = 0; s < 8; s++) {
            int ls, lm;
            q4_k_scale(b->scales, s, &ls, &lm);
            float scale = d * (float)ls, min = dmin * (float)lm;
            const uint8_t *qs = b->qs + 32 * (s / 2);
            int shift = 4 * (s % 2);
            for (int l = 0; l < 32; l++)
                dst[32 * s + l] = scale * (float)((qs[l] >> shift & 15) | (b->qh[l] >> s & 1) << 4) - min;
        }
    }
}

USLI_WIDE void usli_decode_q6_k(const void *src, float *dst, int64_t n) {
    const usli_block_q6_k *b = src;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++, dst += USLI_QK_K) {
        float d = usli_f16_to_f32(b->d);
        for (int s = 0; s < 16; s++) {
            float scale = d * (float)b->scales[s];
            int half = s / 8, part = s / 2 % 4, at = 16 * (s % 2);
            const uint8_t *ql = b->ql + 64 * half + 32 * (part % 2) + at, *qh = b->qh + 32 * half + at;
            int shift = 4 * (part / 2), high = 2 * part;
            for (int l = 0; l < 16; l++)
                dst[16 * s + l] = scale * (float)(((ql[l] >> shift & 15) | (qh[l] >> high & 3) << 4) - 32);
        }
    }
}

/* ---- Encoding ------------------------------------------------------------------------------------------------------
 */

/* A super-block before packing: sub-block s holds codes q[size * s ..] with the quantised scale ls[s] (and min lm[s]).
 */
typedef struct super {
    uint16_t d, dmin;
    int ls[16], lm[16];
    int q[USLI_QK_K];
} super;

/* Quantises scales and minima to 0 .. scale_top in units of out->d and out->dmin, and moves each by one step where that
 * lowers the error: the steps are coarse against what the fit chose. Returns the error. */
static float quantise_affine_scales(const float *x, const float *w, int size, int top, int scale_top,
                                    const float *scales, const float *mins, super *out) {
    float d = usli_f16_to_f32(out->d), dmin = usli_f16_to_f32(out->dmin), limit = (float)scale_top, total = 0;
    float inverse_d = usli_inverse(d), inverse_dmin = usli_inverse(dmin);
    for (int s = 0; s < USLI_QK_K / size; s++) {
        int ls0 = usli_code_of(scales[s], inverse_d, 0, limit), lm0 = usli_code_of(mins[s], inverse_dmin, 0, limit);
        float best = INFINITY;
        out->ls[s] = ls0;
        out->lm[s] = lm0;
        for (int ls = ls0 > 0 ? ls0 - 1 : 0; ls <= ls0 + 1 && ls <= scale_top; ls++)
            for (int lm = lm0 > 0 ? lm0 - 1 : 0; lm <= lm0 + 1 && lm <= scale_top; lm++) {
                float error =
                    usli_error_affine(x + size * s, w + size * s, size, d * (float)ls, -dmin * (float)lm, top);
                if (error < best) {
                    best = error;
                    out->ls[s] = ls;
                    out->lm[s] = lm;
                }
            }
        total += best;
    }
    return total;
}

static void round_affine(const float *x, int size, int top, super *out) {
    float d = usli_f16_to_f32(out->d), dmin = usli_f16_to_f32(out->dmin);
    for (int l = 0; l < USLI_QK_K; l++) {
        int s = l / size;
        float inverse = usli_inverse(d * (float)out->ls[s]), min = dmin * (float)out->lm[s];
        out->q[l] = usli_code_of(x[l] + min, inverse, 0, (float)top);
    }
}

/* Sub-blocks are fitted freely first; then a few units of the scales are tried, which differ in how they round. */
static void fit_affine_super(const float *x, const float *w, int size, int top, int scale_top, super *out) {
    float scales[16], mins[16], best = INFINITY;
    int count = USLI_QK_K / size;
    for (int s = 0; s < count; s++) {
        usli_fit_affine(x + size * s, w + size * s, size, top, false, &scales[s], &mins[s]);
        mins[s] = -mins[s];
    }
    for (int less = 0; less < 3; less++) {
        super guess;
        guess.d = usli_super_scale(scales, count, scale_top - less);
        guess.dmin = usli_super_scale(mins, count, scale_top);
        float error = quantise_affine_scales(x, w, size, top, scale_top, scales, mins, &guess);
        if (less == 0 || error < best) {
            best = error;
            *out = guess;
        }
    }
    round_affine(x, size, top, out);
}

/* The same without minima: scales are signed, scale_lo .. -scale_lo - 1, sub-blocks of 16, codes lo .. -lo - 1. */
static void fit_symmetric_super(const float *x, const float *w, int lo, int scale_lo, super *out) {
    float scales[16];
    for (int s = 0; s < 16; s++) scales[s] = usli_fit_symmetric(x + 16 * s, w + 16 * s, 16, lo, -lo - 1, false);
    out->d = usli_super_scale(scales, 16, scale_lo);
    float d = usli_f16_to_f32(out->d), inverse_d = usli_inverse(d);
    for (int s = 0; s < 16; s++) {
        const float *xs = x + 16 * s, *ws = w + 16 * s;
        int ls0 = usli_code_of(scales[s], inverse_d, (float)scale_lo, (float)(-scale_lo - 1));
        float best = INFINITY;
        out->ls[s] = ls0;
        for (int ls = ls0 - 1; ls <= ls0 + 1; ls++) {
            if (ls < scale_lo || ls > -scale_lo - 1) continue;
            float error = usli_error_symmetric(xs, ws, 16, d * (float)ls, lo, -lo - 1);
            if (error < best) {
                best = error;
                out->ls[s] = ls;
            }
        }
        float inverse = usli_inverse(d * (float)out->ls[s]);
        for (int l = 0; l < 16; l++)
            out->q[16 * s + l] = usli_code_of(xs[l], inverse, (float)lo, (float)(-lo - 1)) - lo;
    }
}

/* Two low bits of each code, four values a byte. */
static void pack_pairs(const int *q, uint8_t qs[64]) {
    for (int h = 0; h < 2; h++)
        for (int l = 0; l < 32; l++) {
            const int *v = q + 128 * h + l;
            qs[32 * h + l] = (uint8_t)((v[0] & 3) | (v[32] & 3) << 2 | (v[64] & 3) << 4 | (v[96] & 3) << 6);
        }
}

void usli_encode_q2_k(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_q2_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        super s;
        fit_affine_super(src + i, importance ? importance + i : usli_fit_ones, 16, 3, 15, &s);
        b->d = s.d;
        b->dmin = s.dmin;
        for (int k = 0; k < 16; k++) b->scales[k] = (uint8_t)(s.ls[k] | s.lm[k] << 4);
        pack_pairs(s.q, b->qs);
    }
}

void usli_encode_q3_k(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_q3_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        super s;
        fit_symmetric_super(src + i, importance ? importance + i : usli_fit_ones, -4, -32, &s);
        b->d = s.d;
        memset(b->scales, 0, sizeof b->scales);
        memset(b->hmask, 0, sizeof b->hmask);
        for (int k = 0; k < 16; k++) {
            int ls = s.ls[k] + 32;
            b->scales[k % 8] |= (uint8_t)((ls & 15) << (k < 8 ? 0 : 4));
            b->scales[8 + k % 4] |= (uint8_t)((ls >> 4) << (2 * (k / 4)));
        }
        for (int l = 0; l < USLI_QK_K; l++) b->hmask[l % 32] |= (uint8_t)((s.q[l] >> 2) << (l / 32));
        pack_pairs(s.q, b->qs);
    }
}

static void pack_q4_k(const super *s, uint8_t scales[12], uint8_t qs[128]) {
    for (int k = 0; k < 4; k++) {
        scales[k] = (uint8_t)(s->ls[k] | (s->ls[k + 4] >> 4) << 6);
        scales[k + 4] = (uint8_t)(s->lm[k] | (s->lm[k + 4] >> 4) << 6);
        scales[k + 8] = (uint8_t)((s->ls[k + 4] & 15) | (s->lm[k + 4] & 15) << 4);
    }
    for (int c = 0; c < 4; c++)
        for (int l = 0; l < 32; l++)
            qs[32 * c + l] = (uint8_t)((s->q[64 * c + l] & 15) | (s->q[64 * c + 32 + l] & 15) << 4);
}

void usli_encode_q4_k(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_q4_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        super s;
        fit_affine_super(src + i, importance ? importance + i : usli_fit_ones, 32, 15, 63, &s);
        b->d = s.d;
        b->dmin = s.dmin;
        pack_q4_k(&s, b->scales, b->qs);
    }
}

void usli_encode_q5_k(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_q5_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        super s;
        fit_affine_super(src + i, importance ? importance + i : usli_fit_ones, 32, 31, 63, &s);
        b->d = s.d;
        b->dmin = s.dmin;
        pack_q4_k(&s, b->scales, b->qs);
        memset(b->qh, 0, sizeof b->qh);
        for (int l = 0; l < USLI_QK_K; l++) b->qh[l % 32] |= (uint8_t)((s.q[l] >> 4) << (l / 32));
    }
}

void usli_encode_q6_k(const float *src, const float *importance, void *dst, int64_t n) {
    usli_block_q6_k *b = dst;
    for (int64_t i = 0; i < n; i += USLI_QK_K, b++) {
        super s;
        fit_symmetric_super(src + i, importance ? importance + i : usli_fit_ones, -32, -128, &s);
        b->d = s.d;
        for (int k = 0; k < 16; k++) b->scales[k] = (int8_t)s.ls[k];
        for (int h = 0; h < 2; h++)
            for (int l = 0; l < 32; l++) {
                const int *v = s.q + 128 * h + l;
                b->ql[64 * h + l] = (uint8_t)((v[0] & 15) | (v[64] & 15) << 4);
                b->ql[64 * h + 32 + l] = (uint8_t)((v[32] & 15) | (v[96] & 15) << 4);
                b->qh[32 * h + l] = (uint8_t)(v[0] >> 4 | (v[32] >> 4) << 2 | (v[64] >> 4) << 4 | (v[96] >> 4) << 6);
            }
    }
}
