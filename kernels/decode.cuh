/* Frozen matrices of any storage type as numbers: one value, or a whole matrix into memory. */
#ifndef USLI_KERNELS_DECODE_CUH
#define USLI_KERNELS_DECODE_CUH

#include "kernels/device.cuh"

extern "C" {
#include "core/quant/blocks.h"
#include "core/quant/traits.h"
}

/* Decodes w (rows, cols) to dst, rows ld elements apart, rounded to dtype once. */
usl_status usli_cuda_decode(usli_exec *x, const usli_matrix *w, usl_dtype dtype, void *dst, int64_t ld);
/* USL_OK when w can be decoded; else a sentence that begins with `what`. */
usl_status usli_cuda_decode_check(usli_exec *x, const usli_matrix *w, const char *what);

/* ---- One value: products and sums are rounded one by one, as on the CPU --------------------------------------------
 */

__device__ __forceinline__ float half_bits(uint16_t bits) {
    return to_f32(*reinterpret_cast<const usli_f16 *>(&bits));
}
__device__ __forceinline__ float times_plus(float a, float b, float c) {
    return __fadd_rn(__fmul_rn(a, b), c);
}

__device__ __forceinline__ float nf4_absmax(const usli_nf4 &q, int64_t block) {
    return q.absmax_q ? times_plus(q.map[q.absmax_q[block]], q.absmax2[block / USLI_NF4_NEST], q.offset)
                      : q.absmax[block];
}
__device__ __forceinline__ float nf4_value(const usli_nf4 &q, int64_t i) {
    int byte = q.codes[i / 2], code = i % 2 ? byte & 15 : byte >> 4;
    return q.table[code] * nf4_absmax(q, i / USLI_NF4_BLOCK);
}

/* Nibble j of a block of 32: the low halves come first. */
__device__ __forceinline__ int nibble(const uint8_t *qs, int j) {
    return j < 16 ? qs[j] & 15 : qs[j - 16] >> 4;
}
__device__ __forceinline__ int fifth_bit(const uint8_t *qh, int j) {
    return (qh[j / 8] >> (j % 8) & 1) << 4;
}
/* Scale and minimum of sub-block s of Q4_K and Q5_K. */
__device__ __forceinline__ void k_scale_min(const uint8_t *p, int s, int *scale, int *minimum) {
    if (s < 4) {
        *scale = p[s] & 63;
        *minimum = p[s + 4] & 63;
    } else {
        *scale = (p[s + 4] & 15) | (p[s - 4] >> 6) << 4;
        *minimum = (p[s + 4] >> 4) | (p[s] >> 6) << 4;
    }
}

__device__ __forceinline__ float iq4_value(int code) {
    /* The 16 levels of IQ4, in two words a sign apart. */
    constexpr int8_t LEVEL[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
    return (float)LEVEL[code];
}

/* Value i of a row of blocks of type TYPE. */
template <int TYPE> __device__ __forceinline__ float value_of(const void *row, int64_t i);
template <> __device__ __forceinline__ float value_of<USL_F32>(const void *row, int64_t i) {
    return static_cast<const float *>(row)[i];
}
template <> __device__ __forceinline__ float value_of<USL_F16>(const void *row, int64_t i) {
    return to_f32(static_cast<const usli_f16 *>(row)[i]);
}
template <> __device__ __forceinline__ float value_of<USL_BF16>(const void *row, int64_t i) {
    return to_f32(static_cast<const usli_bf16 *>(row)[i]);
}
template <> __device__ __forceinline__ float value_of<USL_F64>(const void *row, int64_t i) {
    return (float)static_cast<const double *>(row)[i];
}
template <> __device__ __forceinline__ float value_of<USL_Q4_0>(const void *row, int64_t i) {
    const usli_block_q4_0 &b = static_cast<const usli_block_q4_0 *>(row)[i / USLI_QK];
    return half_bits(b.d) * (float)(nibble(b.qs, (int)(i % USLI_QK)) - 8);
}
template <> __device__ __forceinline__ float value_of<USL_Q4_1>(const void *row, int64_t i) {
    const usli_block_q4_1 &b = static_cast<const usli_block_q4_1 *>(row)[i / USLI_QK];
    return times_plus(half_bits(b.d), (float)nibble(b.qs, (int)(i % USLI_QK)), half_bits(b.m));
}
template <> __device__ __forceinline__ float value_of<USL_Q5_0>(const void *row, int64_t i) {
    const usli_block_q5_0 &b = static_cast<const usli_block_q5_0 *>(row)[i / USLI_QK];
    int j = (int)(i % USLI_QK);
    return half_bits(b.d) * (float)((nibble(b.qs, j) | fifth_bit(b.qh, j)) - 16);
}
template <> __device__ __forceinline__ float value_of<USL_Q5_1>(const void *row, int64_t i) {
    const usli_block_q5_1 &b = static_cast<const usli_block_q5_1 *>(row)[i / USLI_QK];
    int j = (int)(i % USLI_QK);
    return times_plus(half_bits(b.d), (float)(nibble(b.qs, j) | fifth_bit(b.qh, j)), half_bits(b.m));
}
template <> __device__ __forceinline__ float value_of<USL_Q8_0>(const void *row, int64_t i) {
    const usli_block_q8_0 &b = static_cast<const usli_block_q8_0 *>(row)[i / USLI_QK];
    return half_bits(b.d) * (float)b.qs[i % USLI_QK];
}
template <> __device__ __forceinline__ float value_of<USL_Q2_K>(const void *row, int64_t i) {
    const usli_block_q2_k &b = static_cast<const usli_block_q2_k *>(row)[i / USLI_QK_K];
    int j = (int)(i % USLI_QK_K), h = j / 128, k = j % 128 / 32, l = j % 32, s = b.scales[j / 16];
    float q = (float)(b.qs[32 * h + l] >> (2 * k) & 3);
    return __fsub_rn(__fmul_rn(__fmul_rn(half_bits(b.d), (float)(s & 15)), q),
                     __fmul_rn(half_bits(b.dmin), (float)(s >> 4)));
}
template <> __device__ __forceinline__ float value_of<USL_Q3_K>(const void *row, int64_t i) {
    const usli_block_q3_k &b = static_cast<const usli_block_q3_k *>(row)[i / USLI_QK_K];
    int j = (int)(i % USLI_QK_K), h = j / 128, k = j % 128 / 32, l = j % 32, s = j / 16;
    int low = s < 8 ? b.scales[s] & 15 : b.scales[s - 8] >> 4, high = b.scales[8 + s % 4] >> (2 * (s / 4)) & 3;
    int q = (b.qs[32 * h + l] >> (2 * k) & 3) | (b.hmask[l] >> (j / 32) & 1) << 2;
    return __fmul_rn(__fmul_rn(half_bits(b.d), (float)((low | high << 4) - 32)), (float)(q - 4));
}
template <> __device__ __forceinline__ float value_of<USL_Q4_K>(const void *row, int64_t i) {
    const usli_block_q4_k &b = static_cast<const usli_block_q4_k *>(row)[i / USLI_QK_K];
    int j = (int)(i % USLI_QK_K), s = j / 32, byte = b.qs[32 * (s / 2) + j % 32], scale, minimum;
    k_scale_min(b.scales, s, &scale, &minimum);
    return __fsub_rn(__fmul_rn(__fmul_rn(half_bits(b.d), (float)scale), (float)(s % 2 ? byte >> 4 : byte & 15)),
                     __fmul_rn(half_bits(b.dmin), (float)minimum));
}
template <> __device__ __forceinline__ float value_of<USL_Q5_K>(const void *row, int64_t i) {
    const usli_block_q5_k &b = static_cast<const usli_block_q5_k *>(row)[i / USLI_QK_K];
    int j = (int)(i % USLI_QK_K), s = j / 32, byte = b.qs[32 * (s / 2) + j % 32], scale, minimum;
    k_scale_min(b.scales, s, &scale, &minimum);
    int q = (s % 2 ? byte >> 4 : byte & 15) | (b.qh[j % 32] >> s & 1) << 4;
    return __fsub_rn(__fmul_rn(__fmul_rn(half_bits(b.d), (float)scale), (float)q),
                     __fmul_rn(half_bits(b.dmin), (float)minimum));
}
template <> __device__ __forceinline__ float value_of<USL_Q6_K>(const void *row, int64_t i) {
    const usli_block_q6_k &b = static_cast<const usli_block_q6_k *>(row)[i / USLI_QK_K];
    int j = (int)(i % USLI_QK_K), h = j / 128, k = j % 128 / 32, l = j % 32, byte = b.ql[64 * h + 32 * (k % 2) + l];
    int q = (k < 2 ? byte & 15 : byte >> 4) | (b.qh[32 * h + l] >> (2 * k) & 3) << 4;
    return __fmul_rn(__fmul_rn(half_bits(b.d), (float)b.scales[j / 16]), (float)(q - 32));
}
template <> __device__ __forceinline__ float value_of<USL_IQ4_NL>(const void *row, int64_t i) {
    const usli_block_iq4_nl &b = static_cast<const usli_block_iq4_nl *>(row)[i / USLI_QK];
    return half_bits(b.d) * iq4_value(nibble(b.qs, (int)(i % USLI_QK)));
}
template <> __device__ __forceinline__ float value_of<USL_IQ4_XS>(const void *row, int64_t i) {
    const usli_block_iq4_xs &b = static_cast<const usli_block_iq4_xs *>(row)[i / USLI_QK_K];
    int j = (int)(i % USLI_QK_K), s = j / 32;
    int low = s % 2 ? b.scales_l[s / 2] >> 4 : b.scales_l[s / 2] & 15, high = b.scales_h >> (2 * s) & 3;
    return __fmul_rn(__fmul_rn(half_bits(b.d), (float)((low | high << 4) - 32)),
                     iq4_value(nibble(b.qs + 16 * s, j % 32)));
}
template <> __device__ __forceinline__ float value_of<USL_MXFP4>(const void *row, int64_t i) {
    const usli_block_mxfp4 &b = static_cast<const usli_block_mxfp4 *>(row)[i / USLI_QK];
    int code = nibble(b.qs, (int)(i % USLI_QK)), size = code & 7;
    float v = size < 2 ? 0.5f * (float)size : ldexpf(1.0f + 0.5f * (float)(size & 1), (size >> 1) - 1);
    return ldexpf(code & 8 ? -v : v, (int)b.e - 127);
}

/* ---- 16 neighbours of a row, the first at a multiple of 16 of a 16-byte aligned matrix ---- */

/* SHARED: what they have in common is read once. */
template <int TYPE> struct values16 {
    static constexpr bool SHARED = false;
    static __device__ __forceinline__ void get(const void *row, int64_t i, float (&v)[16]) {
#pragma unroll
        for (int k = 0; k < 16; k++) v[k] = value_of<TYPE>(row, i + k);
    }
};
/* Blocks of 32: 16 nibbles all lie in the same half of their bytes, and those at even addresses. */
__device__ __forceinline__ void load_even(const void *p, uint8_t (&to)[16]) {
#pragma unroll
    for (int k = 0; k < 16; k += 2) {
        uint16_t two = reinterpret_cast<const uint16_t *>(p)[k / 2];
        to[k] = (uint8_t)two;
        to[k + 1] = (uint8_t)(two >> 8);
    }
}
template <> struct values16<USL_Q4_0> {
    static constexpr bool SHARED = true;
    static __device__ __forceinline__ void get(const void *row, int64_t i, float (&v)[16]) {
        const usli_block_q4_0 &b = static_cast<const usli_block_q4_0 *>(row)[i / USLI_QK];
        int shift = (int)(i % USLI_QK) / 16 * 4;
        float d = half_bits(b.d);
        uint8_t q[16];
        load_even(b.qs, q);
#pragma unroll
        for (int k = 0; k < 16; k++) v[k] = d * (float)((q[k] >> shift & 15) - 8);
    }
};
template <> struct values16<USL_Q4_1> {
    static constexpr bool SHARED = true;
    static __device__ __forceinline__ void get(const void *row, int64_t i, float (&v)[16]) {
        const usli_block_q4_1 &b = static_cast<const usli_block_q4_1 *>(row)[i / USLI_QK];
        int shift = (int)(i % USLI_QK) / 16 * 4;
        float d = half_bits(b.d), m = half_bits(b.m);
        uint8_t q[16];
        load_even(b.qs, q);
#pragma unroll
        for (int k = 0; k < 16; k++) v[k] = times_plus(d, (float)(q[k] >> shift & 15), m);
    }
};
template <> struct values16<USL_Q8_0> {
    static constexpr bool SHARED = true;
    static __device__ __forceinline__ void get(const void *row, int64_t i, float (&v)[16]) {
        const usli_block_q8_0 &b = static_cast<const usli_block_q8_0 *>(row)[i / USLI_QK];
        float d = half_bits(b.d);
        uint8_t q[16];
        load_even(b.qs + i % USLI_QK, q);
#pragma unroll
        for (int k = 0; k < 16; k++) v[k] = d * (float)(int8_t)q[k];
    }
};
/* Blocks of 256: 144 and 176 bytes, so what these two load is 16-byte aligned; 210 bytes, so Q6_K's is at even
 * addresses. 16 values share a sub-block. */
template <> struct values16<USL_Q4_K> {
    static constexpr bool SHARED = true;
    static __device__ __forceinline__ void get(const void *row, int64_t i, float (&v)[16]) {
        const usli_block_q4_k &b = static_cast<const usli_block_q4_k *>(row)[i / USLI_QK_K];
        int j = (int)(i % USLI_QK_K), s = j / 32, shift = s % 2 * 4, scale, minimum;
        k_scale_min(b.scales, s, &scale, &minimum);
        float d = __fmul_rn(half_bits(b.d), (float)scale), m = __fmul_rn(half_bits(b.dmin), (float)minimum);
        usli_pack<uint8_t, 16> q = load_pack<uint8_t, 16>(b.qs + 32 * (s / 2) + j % 32);
#pragma unroll
        for (int k = 0; k < 16; k++) v[k] = __fsub_rn(__fmul_rn(d, (float)(q.v[k] >> shift & 15)), m);
    }
};
template <> struct values16<USL_Q5_K> {
    static constexpr bool SHARED = true;
    static __device__ __forceinline__ void get(const void *row, int64_t i, float (&v)[16]) {
        const usli_block_q5_k &b = static_cast<const usli_block_q5_k *>(row)[i / USLI_QK_K];
        int j = (int)(i % USLI_QK_K), s = j / 32, shift = s % 2 * 4, scale, minimum;
        k_scale_min(b.scales, s, &scale, &minimum);
        float d = __fmul_rn(half_bits(b.d), (float)scale), m = __fmul_rn(half_bits(b.dmin), (float)minimum);
        usli_pack<uint8_t, 16> q = load_pack<uint8_t, 16>(b.qs + 32 * (s / 2) + j % 32);
        usli_pack<uint8_t, 16> high = load_pack<uint8_t, 16>(b.qh + j % 32);
#pragma unroll
        for (int k = 0; k < 16; k++) {
            int code = (q.v[k] >> shift & 15) | (high.v[k] >> s & 1) << 4;
            v[k] = __fsub_rn(__fmul_rn(d, (float)code), m);
        }
    }
};
template <> struct values16<USL_Q6_K> {
    static constexpr bool SHARED = true;
    static __device__ __forceinline__ void get(const void *row, int64_t i, float (&v)[16]) {
        const usli_block_q6_k &b = static_cast<const usli_block_q6_k *>(row)[i / USLI_QK_K];
        int j = (int)(i % USLI_QK_K), h = j / 128, part = j % 128 / 32, l = j % 32, shift = part / 2 * 4;
        float d = __fmul_rn(half_bits(b.d), (float)b.scales[j / 16]);
        uint8_t low[16], high[16];
        load_even(b.ql + 64 * h + 32 * (part % 2) + l, low);
        load_even(b.qh + 32 * h + l, high);
#pragma unroll
        for (int k = 0; k < 16; k++)
            v[k] = __fmul_rn(d, (float)(((low[k] >> shift & 15) | (high[k] >> (2 * part) & 3) << 4) - 32));
    }
};

/* Calls body with TYPE a constant, for every type that value_of knows; otherwise body_else. */
#define USLI_BY_TYPE(type, TYPE, body)         \
    switch (type) {                            \
        USLI_TYPE_CASE(USL_F32, TYPE, body)    \
        USLI_TYPE_CASE(USL_F16, TYPE, body)    \
        USLI_TYPE_CASE(USL_BF16, TYPE, body)   \
        USLI_TYPE_CASE(USL_F64, TYPE, body)    \
        USLI_TYPE_CASE(USL_Q4_0, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q4_1, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q5_0, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q5_1, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q8_0, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q2_K, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q3_K, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q4_K, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q5_K, TYPE, body)   \
        USLI_TYPE_CASE(USL_Q6_K, TYPE, body)   \
        USLI_TYPE_CASE(USL_IQ4_NL, TYPE, body) \
        USLI_TYPE_CASE(USL_IQ4_XS, TYPE, body) \
        USLI_TYPE_CASE(USL_MXFP4, TYPE, body)  \
    default: break;                            \
    }
#define USLI_TYPE_CASE(value, TYPE, body) \
    case value: {                         \
        constexpr int TYPE = value;       \
        body;                             \
    } break;

#endif
