/* Finding scales, a thread a sub-block: the arithmetic of core/quant (lanes.c, fit.c, iq4.c), operation by operation,
 * so that a GPU writes the very bytes that the CPU writes. There, eight sub-blocks are the lanes of a vector and
 * nothing is summed across lanes but in one written order; here a lane is a thread, or a number of an array where a
 * thread has a whole block. Whoever changes one changes the other: tests/ops/test_quantize.c compares them byte by
 * byte. */
#ifndef USLI_KERNELS_QUANTIZE_CUH
#define USLI_KERNELS_QUANTIZE_CUH

#include <cfloat>

#include "kernels/device.cuh"

extern "C" {
#include "core/quant/blocks.h"
}

/* ---- Numbers whose products and sums are rounded one by one, whatever the compiler would fuse ----------------------
 */

__device__ __forceinline__ float rounded_sum(float a, float b) {
    return __fadd_rn(a, b);
}
__device__ __forceinline__ float rounded_product(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ __forceinline__ float rounded_quotient(float a, float b) {
    return __fdiv_rn(a, b);
}
__device__ __forceinline__ double rounded_sum(double a, double b) {
    return __dadd_rn(a, b);
}
__device__ __forceinline__ double rounded_product(double a, double b) {
    return __dmul_rn(a, b);
}
__device__ __forceinline__ double rounded_quotient(double a, double b) {
    return __ddiv_rn(a, b);
}

template <typename T> struct usli_rounded {
    T v;
    usli_rounded() = default;
    __device__ __forceinline__ usli_rounded(T x) : v(x) {}
    friend __device__ __forceinline__ usli_rounded operator+(usli_rounded a, usli_rounded b) {
        return rounded_sum(a.v, b.v);
    }
    friend __device__ __forceinline__ usli_rounded operator-(usli_rounded a, usli_rounded b) {
        return rounded_sum(a.v, -b.v);
    }
    friend __device__ __forceinline__ usli_rounded operator*(usli_rounded a, usli_rounded b) {
        return rounded_product(a.v, b.v);
    }
    friend __device__ __forceinline__ usli_rounded operator/(usli_rounded a, usli_rounded b) {
        return rounded_quotient(a.v, b.v);
    }
    __device__ __forceinline__ usli_rounded operator-() const {
        return -v;
    }
    friend __device__ __forceinline__ bool operator<(usli_rounded a, usli_rounded b) {
        return a.v < b.v;
    }
    friend __device__ __forceinline__ bool operator>(usli_rounded a, usli_rounded b) {
        return a.v > b.v;
    }
    friend __device__ __forceinline__ bool operator==(usli_rounded a, usli_rounded b) {
        return a.v == b.v;
    }
    friend __device__ __forceinline__ bool operator!=(usli_rounded a, usli_rounded b) {
        return a.v != b.v;
    }
};
typedef usli_rounded<float> num;
typedef usli_rounded<double> wide;

__device__ __forceinline__ wide widened(num x) {
    return (double)x.v;
}
__device__ __forceinline__ num magnitude(num x) {
    return fabsf(x.v);
}
/* A NaN in a gives b, and so do equals: -0 and 0 are told apart. */
__device__ __forceinline__ num larger(num a, num b) {
    return a > b ? a : b;
}
__device__ __forceinline__ num smaller(num a, num b) {
    return a < b ? a : b;
}
/* A NaN gives lo. The sign of a zero is the device's own; nearest takes it away. */
__device__ __forceinline__ num clamp(num x, float lo, float hi) {
    return fminf(fmaxf(x.v, lo), hi);
}
/* To the nearest whole number, even on ties, below 2^22. */
__device__ __forceinline__ num nearest(num x) {
    return (x + 12582912.0f) - 12582912.0f;
}
/* 1 / x, and 0 for 0. */
__device__ __forceinline__ num inverse_of(num x) {
    return x != 0.0f ? num(1.0f) / x : num(0.0f);
}
__device__ __forceinline__ int code_of(num x, float lo, float hi) {
    return (int)nearest(clamp(x, lo, hi)).v;
}

/* Halves. What a NaN holds goes along, as in core/base/half.h. */
__device__ __forceinline__ uint16_t to_half(num x) {
    uint32_t bits = __float_as_uint(x.v), mag = bits & 0x7fffffffu;
    if (mag > 0x7f800000u) return (uint16_t)((bits >> 16 & 0x8000u) | 0x7e00u | (mag >> 13 & 0x3ffu));
    return __half_as_ushort(__float2half_rn(x.v));
}
__device__ __forceinline__ num from_half(uint16_t h) {
    uint32_t mag = h & 0x7fffu;
    if (mag > 0x7c00u) return __uint_as_float((uint32_t)(h & 0x8000u) << 16 | 0x7f800000u | mag << 13);
    return __half2float(__ushort_as_half(h));
}
/* One too small for a half becomes the smallest there is, never 0. */
__device__ __forceinline__ uint16_t scale_to_half(num scale) {
    uint16_t h = to_half(scale);
    return (h & 0x7fffu) == 0 && scale != 0.0f ? (uint16_t)(h | 1u) : h;
}
__device__ __forceinline__ num stored_scale(num scale) {
    return from_half(scale_to_half(scale));
}

/* ---- A sub-block: N values, and weights where W --------------------------------------------------------------------
 */

template <int N, bool W> struct usli_values {
    num x[N], w[W ? N : 1];
    __device__ __forceinline__ num weighted(int i, num v) const {
        return W ? w[W ? i : 0] * v : v;
    }
};

/* N values from the i-th on, both multiples of 16; x is 16-byte aligned. */
template <int N> __device__ __forceinline__ void load_values(const void *x, usl_dtype dtype, int64_t i, num *out) {
    if (dtype == USL_F32) {
        const float *p = static_cast<const float *>(x) + i;
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            usli_pack<float, 4> four = load_pack<float, 4>(p + k);
#pragma unroll
            for (int j = 0; j < 4; j++) out[k + j] = four.v[j];
        }
        return;
    }
    const uint16_t *p = static_cast<const uint16_t *>(x) + i;
#pragma unroll
    for (int k = 0; k < N; k += 8) {
        usli_pack<uint16_t, 8> eight = load_pack<uint16_t, 8>(p + k);
#pragma unroll
        for (int j = 0; j < 8; j++)
            out[k + j] = dtype == USL_BF16 ? num(__uint_as_float((uint32_t)eight.v[j] << 16)) : from_half(eight.v[j]);
    }
}

/* What an op's kernels read; per_row: blocks of a row. */
typedef struct usli_quantize_in {
    const void *x;
    usl_dtype dtype;
    const float *importance; /* (a row) or NULL */
    int64_t blocks;
    uint32_t per_row;
} usli_quantize_in;

/* Sub-block s of a block that holds `of` of them. */
template <int N, bool W>
__device__ __forceinline__ void load_sub_block(const usli_quantize_in &in, int64_t block, int s, int of,
                                               usli_values<N, W> *v) {
    load_values<N>(in.x, in.dtype, (block * of + s) * N, v->x);
    if constexpr (W) load_values<N>(in.importance, USL_F32, ((block % in.per_row) * of + s) * N, v->w);
}

/* ---- Super-blocks: G threads of a warp side by side, a sub-block each (lanes.c) ------------------------------------
 */

/* The scale that takes the largest, the first of equals, to top. */
template <int G> __device__ __forceinline__ uint16_t super_scale(num scale, int top) {
    num best = magnitude(scale) > 0.0f ? scale : num(0.0f);
#pragma unroll
    for (int by = 1; by < G; by *= 2) {
        num other = __shfl_xor_sync(0xffffffffu, best.v, by);
        bool second = threadIdx.x & by;
        num first = second ? other : best, last = second ? best : other;
        best = magnitude(last) > magnitude(first) ? last : first;
    }
    return scale_to_half(best / (float)top);
}

/* As usli_lane_sum, after sub-blocks 8 apart were added. */
template <int G> __device__ __forceinline__ num lane_total(num error) {
#pragma unroll
    for (int by = G / 2; by > 0; by /= 2) error = error + __shfl_xor_sync(0xffffffffu, error.v, by);
    return error;
}

template <int N, bool W, int TOP>
__device__ __forceinline__ void fit_affine(const usli_values<N, W> &v, num *scale, num *min) {
    num low = 0.0f, high = -FLT_MAX, sum_w = 0.0f, sum_wy = 0.0f, y[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        low = smaller(v.x[i], low);
        high = larger(v.x[i], high);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        y[i] = v.x[i] - low;
        sum_w = sum_w + v.weighted(i, 1.0f);
        sum_wy = sum_wy + v.weighted(i, y[i]);
    }
    bool flat = !(high > low);
    num range = high - low, per_range = inverse_of(flat ? num(0.0f) : range), best = FLT_MAX;
    *scale = flat ? num(0.0f) : range / (float)TOP;
    *min = low;
#pragma unroll 1
    for (int step = -10; step <= 10; step++) {
        num inverse = (num((float)TOP) + num(0.1f) * (float)step) * per_range;
        num qy = 0.0f, qq = 0.0f, q1 = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            num q = nearest(fminf((y[i] * inverse).v, (float)TOP)), wq = v.weighted(i, q);
            qy = qy + wq * y[i];
            qq = qq + wq * q;
            q1 = q1 + wq;
        }
        num det = sum_w * qq - q1 * q1, per_det = num(1.0f) / det;
        num d = (sum_w * qy - q1 * sum_wy) * per_det, m = (qq * sum_wy - q1 * qy) * per_det;
        bool over = !(det > 0.0f) || low + m > 0.0f;
        m = over ? -low : m;
        d = over ? (qy + low * q1) / qq : d;
        num error = d * (d * qq - num(2.0f) * qy) + m * (m * sum_w - num(2.0f) * sum_wy + num(2.0f) * d * q1);
        if (d > 0.0f && error < best && !flat) {
            best = error;
            *scale = d;
            *min = low + m;
        }
    }
}

template <int N, bool W, int TOP>
__device__ __forceinline__ num affine_error(const usli_values<N, W> &v, num scale, num min) {
    num inverse = inverse_of(scale), error = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        num q = nearest(clamp((v.x[i] - min) * inverse, 0.0f, (float)TOP));
        num e = v.x[i] - (scale * q + min);
        error = error + v.weighted(i, e) * e;
    }
    return error;
}

/* What packing reads, of a super-block, in shared memory. */
typedef struct usli_codes {
    uint8_t q[256];
    int8_t ls[16], lm[16];
    uint16_t d, dmin;
} usli_codes;

/* Codes of a sub-block, four at a time. */
template <int N, typename F> __device__ __forceinline__ void store_codes(uint8_t *q, F code) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        usli_pack<uint8_t, 4> four;
#pragma unroll
        for (int k = 0; k < 4; k++) four.v[k] = (uint8_t)code(i + k);
        store_pack<uint8_t, 4>(q + i, four);
    }
}

/* x = d ls q - dmin lm. */
template <int N, bool W, int TOP, int SCALE_TOP>
__device__ __forceinline__ void affine(const usli_values<N, W> &v, int s, usli_codes *out) {
    constexpr int G = 256 / N;
    constexpr float LIMIT = SCALE_TOP;
    num scale, min, least = 0.0f, ls_kept = 0.0f, lm_kept = 0.0f;
    fit_affine<N, W, TOP>(v, &scale, &min);
    min = -min;
    uint16_t dmin_half = super_scale<G>(min, SCALE_TOP), d_half = 0;
    num dmin = from_half(dmin_half), per_dmin = inverse_of(dmin);
#pragma unroll 1
    for (int less = 0; less < 3; less++) {
        uint16_t half = super_scale<G>(scale, SCALE_TOP - less);
        num d = from_half(half), per_d = inverse_of(d);
        num ls0 = nearest(clamp(scale * per_d, 0.0f, LIMIT)), lm0 = nearest(clamp(min * per_dmin, 0.0f, LIMIT));
        num best = FLT_MAX, ls_best = ls0, lm_best = lm0;
#pragma unroll 1
        for (int ab = 0; ab < 9; ab++) {
            num ls = clamp(ls0 + (float)(ab / 3 - 1), 0.0f, LIMIT), lm = clamp(lm0 + (float)(ab % 3 - 1), 0.0f, LIMIT);
            num error = affine_error<N, W, TOP>(v, d * ls, -dmin * lm);
            if (!(error < best)) continue;
            best = error;
            ls_best = ls;
            lm_best = lm;
        }
        num total = lane_total<G>(best);
        if (less && !(total < least)) continue;
        least = total;
        ls_kept = ls_best;
        lm_kept = lm_best;
        d_half = half;
    }
    num inverse = inverse_of(from_half(d_half) * ls_kept), m = dmin * lm_kept;
    store_codes<N>(out->q + N * s, [&](int i) { return code_of((v.x[i] + m) * inverse, 0.0f, (float)TOP); });
    out->ls[s] = (int8_t)ls_kept.v;
    out->lm[s] = (int8_t)lm_kept.v;
    if (s) return;
    out->d = d_half;
    out->dmin = dmin_half;
}

template <int N, bool W, int LO> __device__ __forceinline__ num fit_symmetric(const usli_values<N, W> &v) {
    num extreme = 0.0f, best_gain = 0.0f, best = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) extreme = magnitude(v.x[i]) > magnitude(extreme) ? v.x[i] : extreme;
    num per_extreme = inverse_of(extreme);
#pragma unroll 1
    for (int step = -4; step <= 4; step++) {
        num inverse = (num((float)LO) + num(0.22f) * (float)step) * per_extreme, qx = 0.0f, qq = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            num q = nearest(clamp(v.x[i] * inverse, (float)LO, (float)(-LO - 1))), wq = v.weighted(i, q);
            qx = qx + wq * v.x[i];
            qq = qq + wq * q;
        }
        num scale = qx / qq, gain = scale * qx;
        if (gain > best_gain) {
            best_gain = gain;
            best = scale;
        }
    }
    return best != 0.0f ? best : extreme / (float)LO;
}

template <int N, bool W, int LO> __device__ __forceinline__ num symmetric_error(const usli_values<N, W> &v, num scale) {
    num inverse = inverse_of(scale), error = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        num e = v.x[i] - scale * nearest(clamp(v.x[i] * inverse, (float)LO, (float)(-LO - 1)));
        error = error + v.weighted(i, e) * e;
    }
    return error;
}

/* x = d ls (q + LO). */
template <int N, bool W, int LO, int SCALE_LO>
__device__ __forceinline__ void symmetric(const usli_values<N, W> &v, int s, usli_codes *out) {
    constexpr float LEAST = SCALE_LO, MOST = -SCALE_LO - 1;
    num scale = fit_symmetric<N, W, LO>(v);
    uint16_t half = super_scale<256 / N>(scale, SCALE_LO);
    num d = from_half(half), per_d = inverse_of(d);
    num ls0 = nearest(clamp(scale * per_d, LEAST, MOST)), kept = ls0, best = FLT_MAX;
#pragma unroll 1
    for (int a = -1; a <= 1; a++) {
        num ls = clamp(ls0 + (float)a, LEAST, MOST);
        num error = symmetric_error<N, W, LO>(v, d * ls);
        if (!(error < best)) continue;
        best = error;
        kept = ls;
    }
    num inverse = inverse_of(d * kept);
    store_codes<N>(out->q + N * s, [&](int i) { return code_of(v.x[i] * inverse, (float)LO, (float)(-LO - 1)) - LO; });
    out->ls[s] = (int8_t)kept.v;
    if (!s) out->d = half;
}

/* ---- Blocks of 32, a thread each ----------------------------------------------------------------------------------
 */

typedef struct usli_eight {
    num v[8];
} usli_eight;

__device__ __forceinline__ usli_eight zeros() {
    usli_eight a;
#pragma unroll
    for (int k = 0; k < 8; k++) a.v[k] = 0.0f;
    return a;
}
/* As usli_lane_sum. */
__device__ __forceinline__ num lane_sum(const usli_eight &a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
/* As sum_across of lanes.c. */
__device__ __forceinline__ num sum_across(const usli_eight &a) {
    return ((a.v[0] + a.v[1]) + (a.v[2] + a.v[3])) + ((a.v[4] + a.v[5]) + (a.v[6] + a.v[7]));
}

/* Scale and offset as halves, and the codes. */
typedef struct usli_scaled {
    uint16_t d, m;
    int8_t q[USLI_QK];
} usli_scaled;

template <bool W> using usli_block_values = usli_values<USLI_QK, W>;

__device__ __forceinline__ void quick_codes(const usli_block_values<false> &v, num start, num inverse, float lo,
                                            float hi, int shift, usli_scaled *out) {
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) out->q[i] = (int8_t)(code_of((v.x[i] - start) * inverse, lo, hi) + shift);
}

/* group_symmetric of lanes.c. */
template <int HALF_RANGE>
__device__ __forceinline__ void quick_symmetric(const usli_block_values<false> &v, usli_scaled *out) {
    num high = 0.0f, low = 0.0f;
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) {
        high = larger(v.x[i], high);
        low = smaller(v.x[i], low);
    }
    num top = larger(high, -low), extreme = -low < top ? top : low;
    num inverse = clamp(inverse_of(extreme * (-1.0f / (float)HALF_RANGE)), -FLT_MAX, FLT_MAX);
    usli_eight qx = zeros(), qq = zeros();
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) {
        num q = nearest(fminf((v.x[i] * inverse).v, (float)(HALF_RANGE - 1)));
        qx.v[i % 8] = qx.v[i % 8] + q * v.x[i];
        qq.v[i % 8] = qq.v[i % 8] + q * q;
    }
    num sum_qx = sum_across(qx), sum_qq = sum_across(qq), scale = sum_qq > 0.0f ? sum_qx / sum_qq : num(0.0f);
    out->d = scale == scale ? scale_to_half(scale) : (uint16_t)0x7e00u;
    quick_codes(v, 0.0f, inverse_of(from_half(out->d)), -HALF_RANGE, HALF_RANGE - 1, HALF_RANGE, out);
}

/* group_affine. Of low ends that are equal, -0 and 0, the halves keep the one that the order of lanes picks. */
template <int TOP> __device__ __forceinline__ void quick_affine(const usli_block_values<false> &v, usli_scaled *out) {
    num high = -FLT_MAX, low[8];
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) {
        high = larger(v.x[i], high);
        low[i % 8] = smaller(v.x[i], i < 8 ? num(FLT_MAX) : low[i % 8]);
    }
    num least[4];
#pragma unroll
    for (int k = 0; k < 4; k++) least[k] = larger(-low[k], -low[k + 4]);
    num lowest = -larger(larger(least[0], least[2]), larger(least[1], least[3]));
    num start = high < lowest ? num(0.0f) : lowest, range = larger(high - start, 0.0f);
    out->d = scale_to_half(range * (1.0f / (float)TOP));
    out->m = to_half(clamp(start, -65504.0f, 65504.0f));
    quick_codes(v, from_half(out->m), inverse_of(from_half(out->d)), 0.0f, TOP, 0, out);
}

/* group_eight_bits. */
__device__ __forceinline__ void quick_eight_bits(const usli_block_values<false> &v, usli_scaled *out) {
    num top = 0.0f;
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) top = larger(magnitude(v.x[i]), top);
    out->d = scale_to_half(top / 127.0f);
    quick_codes(v, 0.0f, inverse_of(from_half(out->d)), -127.0f, 127.0f, 0, out);
}

/* ---- Blocks of 32 with weights (fit.c, legacy.c) ------------------------------------------------------------------
 */

typedef struct usli_fit_sums {
    num qx, qq, q;
} usli_fit_sums;

__device__ __forceinline__ usli_fit_sums sums_of(const usli_block_values<true> &v, num inverse, num shift, float lo,
                                                 float hi) {
    usli_eight qx = zeros(), qq = zeros(), q1 = zeros();
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) {
        num q = nearest(clamp((v.x[i] - shift) * inverse, lo, hi)), wq = v.w[i] * q;
        qx.v[i % 8] = qx.v[i % 8] + wq * v.x[i];
        qq.v[i % 8] = qq.v[i % 8] + wq * q;
        q1.v[i % 8] = q1.v[i % 8] + wq;
    }
    return { lane_sum(qx), lane_sum(qq), lane_sum(q1) };
}

template <int HALF_RANGE>
__device__ __forceinline__ void weighted_symmetric(const usli_block_values<true> &v, usli_scaled *out) {
    constexpr float LO = -HALF_RANGE, HI = HALF_RANGE - 1;
    num extreme = 0.0f, best = 0.0f;
    wide best_gain = 0.0;
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) extreme = magnitude(v.x[i]) > magnitude(extreme) ? v.x[i] : extreme;
    if (extreme != 0.0f) {
#pragma unroll 1
        for (int step = -9; step <= 9; step++) {
            usli_fit_sums s = sums_of(v, (num(LO) + num(0.1f) * (float)step) / extreme, 0.0f, LO, HI);
            if (!(s.qq > 0.0f)) continue;
            num scale = stored_scale(s.qx / s.qq);
            wide gain = widened(scale) * (wide(2.0) * widened(s.qx) - widened(scale) * widened(s.qq));
            if (gain > best_gain) {
                best_gain = gain;
                best = scale;
            }
        }
        if (best == 0.0f) best = stored_scale(extreme / LO);
    }
    num inverse = inverse_of(best);
    out->d = to_half(best);
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) out->q[i] = (int8_t)(code_of(v.x[i] * inverse, LO, HI) + HALF_RANGE);
}

template <int TOP> __device__ __forceinline__ void weighted_affine(const usli_block_values<true> &v, usli_scaled *out) {
    num low = v.x[0], high = v.x[0];
    wide sw = 0.0, sx = 0.0, best_error = INFINITY;
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) {
        low = v.x[i] < low ? v.x[i] : low;
        high = v.x[i] > high ? v.x[i] : high;
        sw = sw + widened(v.w[i]);
        sx = sx + widened(v.w[i]) * widened(v.x[i]);
    }
    num scale = stored_scale((high - low) / (float)TOP), min = from_half(to_half(low));
    if (!(high > low)) scale = 0.0f;
#pragma unroll 1
    for (int step = -10; high > low && step <= 10; step++) {
        usli_fit_sums s = sums_of(v, (num((float)TOP) + num(0.1f) * (float)step) / (high - low), low, 0.0f, (float)TOP);
        wide qq = widened(s.qq), qx = widened(s.qx), q = widened(s.q), det = sw * qq - q * q;
        wide exact_m = det > 0.0 ? (qq * sx - q * qx) / det : wide(0.0);
        wide exact_d = det > 0.0 ? (sw * qx - q * sx) / det : wide(0.0);
        if (det.v <= 0.0) {
            exact_m = 0.0;
            exact_d = s.qq > 0.0f ? qx / qq : wide(0.0);
        }
        num d_num = stored_scale((float)exact_d.v), m_num = from_half(to_half((float)exact_m.v));
        if (!(d_num > 0.0f)) continue;
        wide d = widened(d_num), m = widened(m_num);
        wide error = d * (d * qq - wide(2.0) * qx) + m * (m * sw - wide(2.0) * sx + wide(2.0) * d * q);
        if (error < best_error) {
            best_error = error;
            scale = d_num;
            min = m_num;
        }
    }
    num inverse = inverse_of(scale);
    out->d = to_half(scale);
    out->m = to_half(min);
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) out->q[i] = (int8_t)code_of((v.x[i] - min) * inverse, 0.0f, (float)TOP);
}

/* ---- Codes that index uneven steps (iq4.c) ------------------------------------------------------------------------
 */

/* The middles between neighbours of IQ4's 16 values and the steps over them; all whole numbers or halves, so that sums
 * of them are exact in any order. */
#define USLI_IQ4_BOUNDS -115.5f, -93.5f, -74, -57, -42, -28.5f, -16, -4.5f, 7, 19, 31.5f, 45.5f, 61, 79, 101
#define USLI_IQ4_STEPS 23, 21, 18, 16, 14, 13, 12, 11, 12, 12, 13, 15, 16, 20, 24

__device__ __forceinline__ num iq4_nearest(num x) {
    constexpr float BOUNDS[15] = { USLI_IQ4_BOUNDS }, STEPS[15] = { USLI_IQ4_STEPS };
    float value = -127;
#pragma unroll
    for (int k = 0; k < 15; k++) value += x.v > BOUNDS[k] ? STEPS[k] : 0.0f;
    return value;
}
__device__ __forceinline__ int iq4_code(num x) {
    constexpr float BOUNDS[15] = { USLI_IQ4_BOUNDS };
    int code = 0;
#pragma unroll
    for (int k = 0; k < 15; k++) code += x.v > BOUNDS[k];
    return code;
}

template <bool W, bool HALF> __device__ __forceinline__ num iq4_fit(const usli_block_values<W> &v) {
    num extreme = 0.0f, best = 0.0f;
    wide best_gain = 0.0;
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) extreme = magnitude(v.x[i]) > magnitude(extreme) ? v.x[i] : extreme;
    if (extreme == 0.0f) return 0.0f;
#pragma unroll 1
    for (int turn = 0; turn < 30; turn++) {
        num inverse = (num(turn < 15 ? -127.0f : 113.0f) + (float)(turn % 15 - 7)) / extreme;
        usli_eight qx = zeros(), qq = zeros();
#pragma unroll
        for (int i = 0; i < USLI_QK; i++) {
            num q = iq4_nearest(v.x[i] * inverse), wq = v.weighted(i, q);
            qx.v[i % 8] = qx.v[i % 8] + wq * v.x[i];
            qq.v[i % 8] = qq.v[i % 8] + wq * q;
        }
        num sum_qx = lane_sum(qx), sum_qq = lane_sum(qq), scale = sum_qq > 0.0f ? sum_qx / sum_qq : num(0.0f);
        if (HALF) scale = stored_scale(scale);
        wide gain = widened(scale) * (wide(2.0) * widened(sum_qx) - widened(scale) * widened(sum_qq));
        if (gain > best_gain) {
            best_gain = gain;
            best = scale;
        }
    }
    return best;
}

template <bool W> __device__ __forceinline__ num iq4_error(const usli_block_values<W> &v, num scale) {
    num inverse = inverse_of(scale);
    usli_eight error = zeros();
#pragma unroll
    for (int i = 0; i < USLI_QK; i++) {
        num e = v.x[i] - scale * iq4_nearest(v.x[i] * inverse);
        error.v[i % 8] = error.v[i % 8] + v.weighted(i, e) * e;
    }
    return lane_sum(error);
}

template <bool W> __device__ __forceinline__ void iq4_pack(const usli_block_values<W> &v, num scale, uint8_t *qs) {
    num inverse = inverse_of(scale);
#pragma unroll
    for (int j = 0; j < 16; j++) qs[j] = (uint8_t)(iq4_code(v.x[j] * inverse) | iq4_code(v.x[j + 16] * inverse) << 4);
}

#endif
