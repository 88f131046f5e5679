/* Rows of numbers as blocks of a storage type. Of q4_k a sub-block of 32 values is tried with 21 guesses and 27 pairs
 * of scales, some 500 operations a value: 16 million values are 0.4 ms of an H100's arithmetic, as long as the link
 * takes for them in 16 bits. The types below four bits look up points of lattices, which is work of another kind: they
 * stay on the CPU (core/export/device.c asks for no more than what stands here). */
#include "kernels/quantize.cuh"

extern "C" {
#include "core/quant/traits.h"
}

namespace {

constexpr int THREADS = 128;

/* ---- Super-blocks: a thread a sub-block; T of a block's threads pack it (kquants.c) --------------------------------
 */

/* Two low bits of each code, four values a byte. */
template <int T> __device__ __forceinline__ void pack_pairs(const uint8_t *q, int t, uint8_t *qs) {
    for (int i = t; i < 64; i += T) {
        const uint8_t *v = q + i / 32 * 128 + i % 32;
        qs[i] = (uint8_t)((v[0] & 3) | (v[32] & 3) << 2 | (v[64] & 3) << 4 | (v[96] & 3) << 6);
    }
}

/* Bit `bit` of each code: value 32 b + l is bit b of byte l. */
template <int T> __device__ __forceinline__ void pack_bits(const uint8_t *q, int bit, int t, uint8_t *bytes) {
    for (int l = t; l < 32; l += T) {
        int byte = 0;
        for (int b = 0; b < 8; b++) byte |= (q[32 * b + l] >> bit & 1) << b;
        bytes[l] = (uint8_t)byte;
    }
}

/* Scales, minima and nibbles of Q4_K and Q5_K. */
template <int T> __device__ __forceinline__ void pack_q4_k(const usli_codes &c, int t, uint8_t *scales, uint8_t *qs) {
    for (int k = t; k < 4; k += T) {
        int ls = c.ls[k + 4], lm = c.lm[k + 4];
        scales[k] = (uint8_t)(c.ls[k] | (ls >> 4) << 6);
        scales[k + 4] = (uint8_t)(c.lm[k] | (lm >> 4) << 6);
        scales[k + 8] = (uint8_t)((ls & 15) | (lm & 15) << 4);
    }
    for (int i = t; i < 128; i += T) {
        const uint8_t *v = c.q + i / 32 * 64 + i % 32;
        qs[i] = (uint8_t)((v[0] & 15) | (v[32] & 15) << 4);
    }
}

struct as_q2_k {
    typedef usli_block_q2_k block;
    static constexpr int SIZE = 16;
    template <bool W> static __device__ __forceinline__ void fit(const usli_values<16, W> &v, int s, usli_codes *c) {
        affine<16, W, 3, 15>(v, s, c);
    }
    static __device__ __forceinline__ void pack(const usli_codes &c, int t, block *b) {
        b->scales[t] = (uint8_t)(c.ls[t] | c.lm[t] << 4);
        pack_pairs<16>(c.q, t, b->qs);
        if (t) return;
        b->d = c.d;
        b->dmin = c.dmin;
    }
};

struct as_q3_k {
    typedef usli_block_q3_k block;
    static constexpr int SIZE = 16;
    template <bool W> static __device__ __forceinline__ void fit(const usli_values<16, W> &v, int s, usli_codes *c) {
        symmetric<16, W, -4, -32>(v, s, c);
    }
    static __device__ __forceinline__ void pack(const usli_codes &c, int t, block *b) {
        if (t < 8) b->scales[t] = (uint8_t)(((c.ls[t] + 32) & 15) | ((c.ls[t + 8] + 32) & 15) << 4);
        if (t < 4) {
            int high = 0;
            for (int k = 0; k < 4; k++) high |= ((c.ls[4 * k + t] + 32) >> 4) << (2 * k);
            b->scales[8 + t] = (uint8_t)high;
        }
        pack_bits<16>(c.q, 2, t, b->hmask);
        pack_pairs<16>(c.q, t, b->qs);
        if (!t) b->d = c.d;
    }
};

struct as_q4_k {
    typedef usli_block_q4_k block;
    static constexpr int SIZE = 32;
    template <bool W> static __device__ __forceinline__ void fit(const usli_values<32, W> &v, int s, usli_codes *c) {
        affine<32, W, 15, 63>(v, s, c);
    }
    static __device__ __forceinline__ void pack(const usli_codes &c, int t, block *b) {
        pack_q4_k<8>(c, t, b->scales, b->qs);
        if (t) return;
        b->d = c.d;
        b->dmin = c.dmin;
    }
};

struct as_q5_k {
    typedef usli_block_q5_k block;
    static constexpr int SIZE = 32;
    template <bool W> static __device__ __forceinline__ void fit(const usli_values<32, W> &v, int s, usli_codes *c) {
        affine<32, W, 31, 63>(v, s, c);
    }
    static __device__ __forceinline__ void pack(const usli_codes &c, int t, block *b) {
        pack_q4_k<8>(c, t, b->scales, b->qs);
        pack_bits<8>(c.q, 4, t, b->qh);
        if (t) return;
        b->d = c.d;
        b->dmin = c.dmin;
    }
};

struct as_q6_k {
    typedef usli_block_q6_k block;
    static constexpr int SIZE = 16;
    template <bool W> static __device__ __forceinline__ void fit(const usli_values<16, W> &v, int s, usli_codes *c) {
        symmetric<16, W, -32, -128>(v, s, c);
    }
    static __device__ __forceinline__ void pack(const usli_codes &c, int t, block *b) {
        b->scales[t] = c.ls[t];
        for (int i = t; i < 64; i += 16) {
            int h = i / 32, l = i % 32;
            const uint8_t *v = c.q + 128 * h + l;
            b->ql[64 * h + l] = (uint8_t)((v[0] & 15) | (v[64] & 15) << 4);
            b->ql[64 * h + 32 + l] = (uint8_t)((v[32] & 15) | (v[96] & 15) << 4);
            b->qh[i] = (uint8_t)(v[0] >> 4 | (v[32] >> 4) << 2 | (v[64] >> 4) << 4 | (v[96] >> 4) << 6);
        }
        if (!t) b->d = c.d;
    }
};

/* Threads past the end do the last block once more, since a warp works together, and store nothing. */
template <typename K, bool W> __global__ void __launch_bounds__(THREADS) super_blocks(usli_quantize_in in, void *y) {
    constexpr int G = USLI_QK_K / K::SIZE;
    __shared__ usli_codes codes[THREADS / G];
    int64_t thread = (int64_t)blockIdx.x * THREADS + threadIdx.x, block = thread / G;
    int s = (int)threadIdx.x % G;
    bool past = block >= in.blocks;
    usli_codes *c = &codes[threadIdx.x / G];
    usli_values<K::SIZE, W> v;
    load_sub_block(in, past ? in.blocks - 1 : block, s, G, &v);
    K::template fit<W>(v, s, c);
    __syncwarp();
    if (!past) K::pack(*c, s, static_cast<typename K::block *>(y) + block);
}

/* ---- IQ4_XS: eight threads a block, each with its sub-block's nibbles ----------------------------------------------
 */

template <bool W> __global__ void __launch_bounds__(THREADS) iq4_xs(usli_quantize_in in, void *y) {
    int64_t thread = (int64_t)blockIdx.x * THREADS + threadIdx.x, block = thread / 8;
    int s = (int)threadIdx.x % 8;
    bool past = block >= in.blocks;
    usli_block_values<W> v;
    load_sub_block(in, past ? in.blocks - 1 : block, s, 8, &v);
    num scale = iq4_fit<W, false>(v);
    uint16_t half = super_scale<8>(scale, -32);
    num d = from_half(half), best = INFINITY;
    int near = code_of(scale * inverse_of(d), -32.0f, 31.0f), ls = near;
#pragma unroll 1
    for (int k = near - 1; k <= near + 1; k++) {
        if (k < -32 || k > 31) continue;
        num error = iq4_error(v, d * (float)k);
        if (!(error < best)) continue;
        best = error;
        ls = k;
    }
    /* Bits of all eight scales, each from its thread. */
    unsigned low = (unsigned)((ls + 32) & 15) << 4 * s, high = (unsigned)((ls + 32) >> 4) << 2 * s;
#pragma unroll
    for (int by = 1; by < 8; by *= 2) {
        low |= __shfl_xor_sync(0xffffffffu, low, by);
        high |= __shfl_xor_sync(0xffffffffu, high, by);
    }
    if (past) return;
    usli_block_iq4_xs *b = static_cast<usli_block_iq4_xs *>(y) + block;
    iq4_pack(v, d * (float)ls, b->qs + 16 * s);
    if (s < 4) b->scales_l[s] = (uint8_t)(low >> 8 * s);
    if (s) return;
    b->d = half;
    b->scales_h = (uint16_t)high;
}

/* ---- Blocks of 32: a thread each (legacy.c, iq4.c) -----------------------------------------------------------------
 */

__device__ __forceinline__ void pack_nibbles(const usli_scaled &s, uint8_t *qs) {
#pragma unroll
    for (int j = 0; j < 16; j++) qs[j] = (uint8_t)((s.q[j] & 15) | (s.q[j + 16] & 15) << 4);
}
__device__ __forceinline__ void pack_fifth(const usli_scaled &s, uint8_t *qh) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < USLI_QK; j++) bits |= (uint32_t)(s.q[j] >> 4 & 1) << j;
#pragma unroll
    for (int k = 0; k < 4; k++) qh[k] = (uint8_t)(bits >> 8 * k);
}

struct as_q4_0 {
    typedef usli_block_q4_0 block;
    template <bool W> static __device__ __forceinline__ void encode(const usli_block_values<W> &v, block *b) {
        usli_scaled s;
        if constexpr (W)
            weighted_symmetric<8>(v, &s);
        else
            quick_symmetric<8>(v, &s);
        b->d = s.d;
        pack_nibbles(s, b->qs);
    }
};
struct as_q5_0 {
    typedef usli_block_q5_0 block;
    template <bool W> static __device__ __forceinline__ void encode(const usli_block_values<W> &v, block *b) {
        usli_scaled s;
        if constexpr (W)
            weighted_symmetric<16>(v, &s);
        else
            quick_symmetric<16>(v, &s);
        b->d = s.d;
        pack_nibbles(s, b->qs);
        pack_fifth(s, b->qh);
    }
};
struct as_q4_1 {
    typedef usli_block_q4_1 block;
    template <bool W> static __device__ __forceinline__ void encode(const usli_block_values<W> &v, block *b) {
        usli_scaled s;
        if constexpr (W)
            weighted_affine<15>(v, &s);
        else
            quick_affine<15>(v, &s);
        b->d = s.d;
        b->m = s.m;
        pack_nibbles(s, b->qs);
    }
};
struct as_q5_1 {
    typedef usli_block_q5_1 block;
    template <bool W> static __device__ __forceinline__ void encode(const usli_block_values<W> &v, block *b) {
        usli_scaled s;
        if constexpr (W)
            weighted_affine<31>(v, &s);
        else
            quick_affine<31>(v, &s);
        b->d = s.d;
        b->m = s.m;
        pack_nibbles(s, b->qs);
        pack_fifth(s, b->qh);
    }
};
/* With 8 bits weights have nothing to choose. */
struct as_q8_0 {
    typedef usli_block_q8_0 block;
    template <bool W> static __device__ __forceinline__ void encode(const usli_block_values<W> &v, block *b) {
        usli_scaled s;
        quick_eight_bits(v, &s);
        b->d = s.d;
#pragma unroll
        for (int j = 0; j < USLI_QK; j++) b->qs[j] = s.q[j];
    }
};
struct as_iq4_nl {
    typedef usli_block_iq4_nl block;
    template <bool W> static __device__ __forceinline__ void encode(const usli_block_values<W> &v, block *b) {
        num scale = iq4_fit<W, true>(v);
        b->d = to_half(scale);
        iq4_pack(v, scale, b->qs);
    }
};

template <typename K, bool W> __global__ void __launch_bounds__(THREADS) blocks_of_32(usli_quantize_in in, void *y) {
    int64_t block = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (block >= in.blocks) return;
    usli_block_values<W> v;
    load_sub_block(in, block, 0, 1, &v);
    K::template encode<W>(v, static_cast<typename K::block *>(y) + block);
}

/* ---- The op --------------------------------------------------------------------------------------------------------
 */

unsigned launch_blocks(const usli_quantize_in &in, int threads_a_block) {
    return (unsigned)usli_ceil_div(in.blocks * threads_a_block, THREADS);
}

template <typename K> void run_super(usli_exec *x, const usli_quantize_in &in, void *y) {
    unsigned grid = launch_blocks(in, USLI_QK_K / K::SIZE);
    if (in.importance)
        USLI_LAUNCH(grid, THREADS, 0, x, super_blocks<K, true>)(in, y);
    else
        USLI_LAUNCH(grid, THREADS, 0, x, super_blocks<K, false>)(in, y);
}

template <typename K, bool W> void run_32_as(usli_exec *x, const usli_quantize_in &in, void *y) {
    USLI_LAUNCH(launch_blocks(in, 1), THREADS, 0, x, blocks_of_32<K, W>)(in, y);
}
template <typename K> void run_32(usli_exec *x, const usli_quantize_in &in, void *y) {
    if (in.importance)
        run_32_as<K, true>(x, in, y);
    else
        run_32_as<K, false>(x, in, y);
}

void run_iq4_xs(usli_exec *x, const usli_quantize_in &in, void *y) {
    if (in.importance)
        USLI_LAUNCH(launch_blocks(in, 8), THREADS, 0, x, iq4_xs<true>)(in, y);
    else
        USLI_LAUNCH(launch_blocks(in, 8), THREADS, 0, x, iq4_xs<false>)(in, y);
}

usl_status run(usli_exec *x, void *args, usli_pass, void *) {
    const usli_quantize_args *a = static_cast<const usli_quantize_args *>(args);
    int block = usli_traits_of(a->type)->block;
    usli_quantize_in in = { a->x, a->dtype, a->importance, a->rows * (a->cols / block), (uint32_t)(a->cols / block) };
    void (*go)(usli_exec *, const usli_quantize_in &, void *) = nullptr;
    switch (a->type) {
    case USL_Q2_K: go = run_super<as_q2_k>; break;
    case USL_Q3_K: go = run_super<as_q3_k>; break;
    case USL_Q4_K: go = run_super<as_q4_k>; break;
    case USL_Q5_K: go = run_super<as_q5_k>; break;
    case USL_Q6_K: go = run_super<as_q6_k>; break;
    case USL_Q4_0: go = run_32<as_q4_0>; break;
    case USL_Q4_1: go = run_32<as_q4_1>; break;
    case USL_Q5_0: go = run_32<as_q5_0>; break;
    case USL_Q5_1: go = run_32<as_q5_1>; break;
    case USL_Q8_0: go = run_32_as<as_q8_0, false>; break;
    case USL_IQ4_NL: go = run_32<as_iq4_nl>; break;
    case USL_IQ4_XS: go = run_iq4_xs; break;
    default:
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED, "quantize: blocks of type %s are made on the CPU alone",
                         usl_dtype_name(a->type));
    }
    if (!in.blocks) return USL_OK;
    go(x, in, a->y);
    return usli_launched(x, "quantize");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_quantize = { run, nullptr };
