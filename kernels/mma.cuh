/* Tensor-core products and the loads that feed them, one wrapper each; sm_75 takes two steps of 8 where sm_80 takes one
 * of 16, and copies through registers where sm_80 copies asynchronously. */
#ifndef USLI_KERNELS_MMA_CUH
#define USLI_KERNELS_MMA_CUH

#include "kernels/device.cuh"

#ifndef USLI_EMULATED

/* d (16x8, float32) += a (16x16) b (16x8). Fragments as PTX's m16n8k16: with g = lane / 4 and t = lane % 4,
 *   d[0..1] = row g,   columns 2t, 2t+1;     d[2..3] = row g+8, the same columns
 *   a[0] = row g, k 2t..2t+1; a[1] = row g+8, the same; a[2] = row g, k 2t+8..2t+9; a[3] = row g+8, the same
 *   b[0] = k 2t..2t+1, column g; b[1] = k 2t+8..2t+9, column g      (two 16-bit values a word, the lower k low) */
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16816<usli_f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int i = 0; i < 2; i++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}
template <>
__device__ __forceinline__ void mma_16816<usli_bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    (void)a, (void)b, (void)d; /* usli_cuda_open's callers never reach bfloat16 on sm_75 */
#endif
}

/* Four 8x8 matrices of 16-bit values; lane i gives the address (16-byte aligned) of row i % 8 of matrix i / 8. r[m]
 * gets row lane / 4, columns 2 (lane % 4) and the next, of matrix m; with _trans, of its transpose. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *shared) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *shared) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/* 16 bytes from global to shared memory, both 16-byte aligned; zeros when not valid (the address is then not read). */
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool valid) {
#if __CUDA_ARCH__ >= 800
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#else
    *(uint4 *)shared = valid ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}
/* A word, both addresses aligned to it. */
__device__ __forceinline__ void cp_async4(void *shared, const void *global) {
#if __CUDA_ARCH__ >= 800
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
#else
    *(uint32_t *)shared = *(const uint32_t *)global;
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/* Waits until all but the newest N groups have arrived (for this thread: a __syncthreads makes it so for the block). */
template <int N> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#endif

/* 2 to the x in one instruction, to 2 units in the last place; results below the normal range become 0. */
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef USLI_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* 1 / x in one instruction, to 1 unit in the last place. */
__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef USLI_EMULATED
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* Two values as one word of a fragment, the first low. */
template <typename T> __device__ __forceinline__ uint32_t pack_two(float low, float high);
template <> __device__ __forceinline__ uint32_t pack_two<usli_bf16>(float low, float high) {
    usli_pack<usli_bf16, 2> p = { { from_f32<usli_bf16>(low), from_f32<usli_bf16>(high) } };
    return *reinterpret_cast<uint32_t *>(&p);
}
template <> __device__ __forceinline__ uint32_t pack_two<usli_f16>(float low, float high) {
    usli_pack<usli_f16, 2> p = { { from_f32<usli_f16>(low), from_f32<usli_f16>(high) } };
    return *reinterpret_cast<uint32_t *>(&p);
}

#endif
