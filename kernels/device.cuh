/* What every kernel file includes: the ops' structs, 16-bit types, loads and stores of 16 bytes, sums over warps and
 * blocks, and the launch. Kernels use nothing of CUDA's language that this header does not wrap or that
 * tests/gpu/emulate.h does not provide, so the same files also run, slowly, on a CPU in the tests.
 *
 * Rules: no atomics on floats (results must repeat bit for bit); no allocation, no synchronisation, no copy from
 * pageable memory inside an op; sizes of more than 2^31 elements are int64_t. */
#ifndef USLI_KERNELS_DEVICE_CUH
#define USLI_KERNELS_DEVICE_CUH

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>

#ifndef USLI_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
/* USLI_LAUNCH(blocks, threads, shared bytes, x, kernel<...>)(arguments); blocks and threads may be dim3. */
#define USLI_LAUNCH(grid, block, shared, x, ...) __VA_ARGS__<<<(grid), (block), (shared), (cudaStream_t)(x)->stream>>>
/* The same, for kernels all of whose threads call await_earlier: these may be on the device before the kernel that
 * they follow is done. A decode step is some 400 short kernels, and what lies between two is as long as some. */
#define USLI_LAUNCH_EARLY(grid, block, shared, x, ...) usli_early_launch((grid), (block), (shared), (x), __VA_ARGS__)
/* The dynamic shared memory of a block, as an array of type; 16-byte aligned. */
#define USLI_SHARED(type, name)                                        \
    extern __shared__ __align__(16) unsigned char usli_shared_bytes[]; \
    type *name = reinterpret_cast<type *>(usli_shared_bytes)
#endif

extern "C" {
#include "kernels/cuda.h"
}

/* x->state. */
struct usli_cublaslt;
struct usli_cudnn;
typedef struct usli_cuda {
    int device, sm; /* sm: 75, 80, 90, ...: what the device can and the kernels were compiled for */
    int multiprocessors;
    size_t shared_most;                  /* bytes of dynamic shared memory a block may ask for */
    cudaStream_t copies[2];              /* beside the exec's stream: of inputs, of weights */
    cudaEvent_t ready;                   /* what a copy waits for */
    cudaEvent_t copied[USLI_COPY_SLOTS]; /* what work waits for */
    struct usli_cublaslt *blas;          /* NULL: no cuBLASLt here, own GEMM */
    struct usli_cudnn *cudnn;            /* NULL: own attention */
} usli_cuda;

static inline usli_cuda *usli_cuda_of(const usli_exec *x) {
    return static_cast<usli_cuda *>(x->state);
}
/* After launches: what CUDA says, as a status with a sentence that names the op. */
usl_status usli_cuda_check(usli_exec *x, cudaError_t error, const char *what);
static inline usl_status usli_launched(usli_exec *x, const char *what) {
    return usli_cuda_check(x, cudaGetLastError(), what);
}
/* Kernels that want more than 48 KiB of dynamic shared memory ask once before each launch. */
#define USLI_ALLOW_SHARED(x, bytes, ...)                                                                              \
    usli_cuda_check(                                                                                                  \
        x,                                                                                                            \
        cudaFuncSetAttribute((const void *)(__VA_ARGS__), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)), \
        "shared memory")

#ifndef USLI_EMULATED
template <typename... P> struct usli_early {
    cudaLaunchConfig_t config;
    bool early;
    void (*kernel)(P...);
    void operator()(P... p) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &attribute, config.numAttrs = early;
        cudaLaunchKernelEx(&config, kernel, p...); /* usli_launched asks how it went */
    }
};
template <typename... P>
static inline usli_early<P...> usli_early_launch(dim3 grid, dim3 block, size_t shared, const usli_exec *x,
                                                 void (*kernel)(P...)) {
    usli_early<P...> launch = { {}, usli_cuda_of(x)->sm >= 90, kernel };
    launch.config.gridDim = grid, launch.config.blockDim = block, launch.config.dynamicSmemBytes = shared;
    launch.config.stream = static_cast<cudaStream_t>(x->stream);
    return launch;
}
#endif

/* Lets the kernel behind this one be launched, then waits for the one before it. What comes before the call must touch
 * nothing that kernels write, weights alone; no thread may leave before it, or the one behind could overtake both. */
__device__ __forceinline__ void await_earlier() {
#if !defined(USLI_EMULATED) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

enum { USLI_WARP = 32 };

static inline int64_t usli_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* ---- Types ------------------------------------------------------------------------------------------------------- */

typedef __nv_bfloat16 usli_bf16;
typedef __half usli_f16;

__device__ __forceinline__ float to_f32(float v) {
    return v;
}
__device__ __forceinline__ float to_f32(usli_bf16 v) {
    return __bfloat162float(v);
}
__device__ __forceinline__ float to_f32(usli_f16 v) {
    return __half2float(v);
}
template <typename T> __device__ __forceinline__ T from_f32(float v);
template <> __device__ __forceinline__ float from_f32<float>(float v) {
    return v;
}
template <> __device__ __forceinline__ usli_bf16 from_f32<usli_bf16>(float v) {
    return __float2bfloat16_rn(v);
}
template <> __device__ __forceinline__ usli_f16 from_f32<usli_f16>(float v) {
    return __float2half_rn(v);
}

/* Two neighbours at once: one instruction rounds both. The address is a multiple of two values. */
template <typename T> __device__ __forceinline__ void store_two(T *p, float first, float second) {
    p[0] = from_f32<T>(first);
    p[1] = from_f32<T>(second);
}
#ifndef USLI_EMULATED
template <> __device__ __forceinline__ void store_two<usli_bf16>(usli_bf16 *p, float first, float second) {
    *reinterpret_cast<__nv_bfloat162 *>(p) = __floats2bfloat162_rn(first, second);
}
template <> __device__ __forceinline__ void store_two<usli_f16>(usli_f16 *p, float first, float second) {
    *reinterpret_cast<__half2 *>(p) = __floats2half2_rn(first, second);
}
#endif

/* N values side by side, loaded and stored at once: N * sizeof(T) is 2, 4, 8 or 16 bytes, the address a multiple. */
template <typename T, int N> struct alignas(sizeof(T) * N) usli_pack { T v[N]; };
template <typename T, int N> __device__ __forceinline__ usli_pack<T, N> load_pack(const T *p) {
    return *reinterpret_cast<const usli_pack<T, N> *>(p);
}
template <typename T, int N> __device__ __forceinline__ void store_pack(T *p, const usli_pack<T, N> &v) {
    *reinterpret_cast<usli_pack<T, N> *>(p) = v;
}

/* The same for N values of any size, in pieces of 16 bytes. */
template <typename T, int N> __device__ __forceinline__ usli_pack<T, N> load_wide(const T *p) {
    constexpr int STEP = N * sizeof(T) > 16 ? (int)(16 / sizeof(T)) : N;
    usli_pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i += STEP) {
        usli_pack<T, STEP> part = load_pack<T, STEP>(p + i);
        for (int k = 0; k < STEP; k++) out.v[i + k] = part.v[k];
    }
    return out;
}
template <typename T, int N> __device__ __forceinline__ void store_wide(T *p, const usli_pack<T, N> &v) {
    constexpr int STEP = N * sizeof(T) > 16 ? (int)(16 / sizeof(T)) : N;
#pragma unroll
    for (int i = 0; i < N; i += STEP) {
        usli_pack<T, STEP> part;
        for (int k = 0; k < STEP; k++) part.v[k] = v.v[i + k];
        store_pack<T, STEP>(p + i, part);
    }
}

/* A value of any float type; for paths that take every shape. */
__device__ __forceinline__ float load_any(const void *p, usl_dtype dtype, int64_t i) {
    if (dtype == USL_BF16) return to_f32(static_cast<const usli_bf16 *>(p)[i]);
    if (dtype == USL_F16) return to_f32(static_cast<const usli_f16 *>(p)[i]);
    return static_cast<const float *>(p)[i];
}
__device__ __forceinline__ void store_any(void *p, usl_dtype dtype, int64_t i, float v) {
    if (dtype == USL_BF16)
        static_cast<usli_bf16 *>(p)[i] = from_f32<usli_bf16>(v);
    else if (dtype == USL_F16)
        static_cast<usli_f16 *>(p)[i] = from_f32<usli_f16>(v);
    else
        static_cast<float *>(p)[i] = v;
}
static inline bool usli_aligned16(const void *p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

/* Calls body with T the C++ type of a dtype that is F32, F16 or BF16:  USLI_BY_DTYPE(a->dtype, T, { ... }) */
#define USLI_BY_DTYPE(dtype, T, ...) \
    do {                             \
        switch (dtype) {             \
        case USL_BF16: {             \
            typedef usli_bf16 T;     \
            __VA_ARGS__;             \
        } break;                     \
        case USL_F16: {              \
            typedef usli_f16 T;      \
            __VA_ARGS__;             \
        } break;                     \
        default: {                   \
            typedef float T;         \
            __VA_ARGS__;             \
        } break;                     \
        }                            \
    } while (0)

/* ---- Sums: one order always -------------------------------------------------------------------------------------- */

__device__ __forceinline__ float warp_sum(float v) {
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
    return v;
}
/* Over a block of THREADS (a multiple of 32, 1024 at most); every thread gets the sum. part: 32 floats of shared memory
 * that no thread reads or writes meanwhile. */
template <int THREADS> __device__ __forceinline__ float block_sum(float v, float *part) {
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    v = warp_sum(v);
    if (THREADS == USLI_WARP) return v;
    __syncthreads();
    if (lane == 0) part[warp] = v;
    __syncthreads();
    v = lane < THREADS / USLI_WARP ? part[lane] : 0.0f;
    return warp_sum(v);
}
template <int THREADS> __device__ __forceinline__ float block_max(float v, float *part) {
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    v = warp_max(v);
    if (THREADS == USLI_WARP) return v;
    __syncthreads();
    if (lane == 0) part[warp] = v;
    __syncthreads();
    v = lane < THREADS / USLI_WARP ? part[lane] : -INFINITY;
    return warp_max(v);
}

#endif
