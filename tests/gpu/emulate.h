/* Enough of CUDA's language and runtime that g++ compiles the .cu files of kernels/ for the CPU, so that machines
 * without a GPU test the kernels' logic. The emulated build gives it to every file with -include, and defines
 * USLI_EMULATED.
 *
 * The threads of a block are fibers on one OS thread; blocks run one after another. A fiber runs until it waits at a
 * barrier or for the other lanes of a warp's collective; which fiber goes on is drawn anew, from a fixed seed, so a
 * missing barrier shows as a wrong result. What the emulator finds wrong (a barrier that some thread never reaches, a
 * bad address, a bad launch) is printed and becomes the launch's error. Shared memory begins as NaNs.
 *
 * USLI_EMULATED_SM in the environment is the compute capability that the device claims: 75, 80 (when unset), 90. */
#ifndef TESTS_GPU_EMULATE_H
#define TESTS_GPU_EMULATE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
/* One block runs at a time, so a block's memory may be static. */
#define __shared__ static

/* ---- Vectors ----------------------------------------------------------------------------------------------------- */

#define USLI_VECTORS(T, base, align2, align4)                  \
    struct base##1 {                                           \
        T x;                                                   \
    };                                                         \
    struct alignas(align2) base##2 {                           \
        T x, y;                                                \
    };                                                         \
    struct base##3 {                                           \
        T x, y, z;                                             \
    };                                                         \
    struct alignas(align4) base##4 {                           \
        T x, y, z, w;                                          \
    };                                                         \
    static inline base##1 make_##base##1(T x) {                \
        return { x };                                          \
    }                                                          \
    static inline base##2 make_##base##2(T x, T y) {           \
        return { x, y };                                       \
    }                                                          \
    static inline base##3 make_##base##3(T x, T y, T z) {      \
        return { x, y, z };                                    \
    }                                                          \
    static inline base##4 make_##base##4(T x, T y, T z, T w) { \
        return { x, y, z, w };                                 \
    }
USLI_VECTORS(signed char, char, 2, 4)
USLI_VECTORS(unsigned char, uchar, 2, 4)
USLI_VECTORS(short, short, 4, 8)
USLI_VECTORS(unsigned short, ushort, 4, 8)
USLI_VECTORS(int, int, 8, 16)
USLI_VECTORS(unsigned, uint, 8, 16)
USLI_VECTORS(long long, longlong, 16, 16)
USLI_VECTORS(unsigned long long, ulonglong, 16, 16)
USLI_VECTORS(float, float, 8, 16)
USLI_VECTORS(double, double, 16, 16)
#undef USLI_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx; /* set when a fiber goes on */
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

/* ---- The runtime ------------------------------------------------------------------------------------------------- */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
};
typedef struct usli_emulated_stream *cudaStream_t;
typedef struct usli_emulated_event *cudaEvent_t;
typedef struct usli_emulated_graph *cudaGraph_t;
typedef struct usli_emulated_graph *cudaGraphExec_t;
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum { cudaStreamDefault, cudaStreamNonBlocking };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, l2CacheSize;
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
};

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemGetInfo(size_t *left, size_t *total);
cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void *dst, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamCreate(cudaStream_t *out);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t *out);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to);
/* While a stream captures, its launches, their arguments as they are then, its memsets and its copies on the device are
 * kept for the graph and do not run. What a graph could not repeat, or must not wait for, spoils the capture: copies
 * from and to the host, taking or freeing memory, waiting, events. */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
/* Memory of the device that a graph takes for each of its nodes. */
constexpr size_t USLI_EMULATED_NODE = 64;

cudaError_t usli_emulated_set_attribute(const void *kernel, cudaFuncAttribute attribute, int value);
template <typename F>
static inline cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute attribute, int value) {
    return usli_emulated_set_attribute((const void *)kernel, attribute, value);
}

/* ---- Launching --------------------------------------------------------------------------------------------------- */

/* thread(call) is run once for each thread of each block. call: bytes that may be moved. */
void usli_emulated_launch(cudaStream_t stream, dim3 grid, dim3 block, size_t shared, const char *name,
                          const void *kernel, void (*thread)(void *call), void *call, size_t bytes);
void *usli_emulated_shared(); /* the block's dynamic shared memory */

template <typename... P> struct usli_emulated_kernel {
    cudaStream_t stream;
    dim3 grid, block;
    size_t shared;
    const char *name;
    void (*kernel)(P...);
    void operator()(P... p) const {
        auto call = [k = kernel, p...] { k(p...); };
        static_assert(__is_trivially_copyable(decltype(call)), "arguments are bytes");
        usli_emulated_launch(
            stream, grid, block, shared, name, (const void *)kernel, [](void *c) { (*(decltype(call) *)c)(); }, &call,
            sizeof call);
    }
};
template <typename... P>
static inline usli_emulated_kernel<P...> usli_emulated_at(dim3 grid, dim3 block, size_t shared, const void *stream,
                                                          const char *name, void (*kernel)(P...)) {
    return { (cudaStream_t)stream, grid, block, shared, name, kernel };
}
#define USLI_LAUNCH(grid, block, shared, x, ...) \
    usli_emulated_at((grid), (block), (size_t)(shared), (x)->stream, #__VA_ARGS__, __VA_ARGS__)
#define USLI_LAUNCH_EARLY USLI_LAUNCH
#define USLI_SHARED(type, name) type *name = reinterpret_cast<type *>(usli_emulated_shared())

/* ---- Barriers and collectives ------------------------------------------------------------------------------------ */

/* What a warp does together: waits until every lane of mask has come with the same run, which is then called once with
 * what each lane brought (NULL beyond the mask). name is for messages. */
typedef void (*usli_emulated_collective)(unsigned mask, void *const *lanes);
void usli_emulated_meet(unsigned mask, const char *name, usli_emulated_collective run, void *lane);
/* The block's barrier; returns how many threads came with a value that is not 0. */
int usli_emulated_barrier(int value);
void usli_emulated_yield();
/* Prints what is wrong with the running thread and makes it the launch's error. */
void usli_emulated_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
int usli_emulated_lane();
int usli_emulated_sm();

static inline void __syncthreads() {
    usli_emulated_barrier(0);
}
static inline int __syncthreads_count(int value) {
    return usli_emulated_barrier(value);
}
static inline int __syncthreads_or(int value) {
    return usli_emulated_barrier(value) != 0;
}
static inline int __syncthreads_and(int value) {
    return usli_emulated_barrier(!value) == 0;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    usli_emulated_meet(
        mask, "__syncwarp", [](unsigned, void *const *) {}, nullptr);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned) {
    usli_emulated_yield();
}

template <typename T> struct usli_emulated_shuffle {
    T in, out;
    int from;
};
/* from lies outside the mask: what arrives is undefined, so here it is all ones. */
template <typename T> static inline T usli_emulated_shuffled(unsigned mask, const char *name, T value, int from) {
    static_assert(sizeof(T) <= 8, "shuffles move 8 bytes at most");
    usli_emulated_shuffle<T> own;
    own.in = value;
    own.from = from;
    usli_emulated_meet(
        mask, name,
        [](unsigned m, void *const *lanes) {
            for (int i = 0; i < 32; i++) {
                auto *lane = (usli_emulated_shuffle<T> *)lanes[i];
                if (!lane) continue;
                if (m >> lane->from & 1)
                    lane->out = ((usli_emulated_shuffle<T> *)lanes[lane->from])->in;
                else
                    memset((void *)&lane->out, 0xff, sizeof(T));
            }
        },
        &own);
    return own.out;
}
template <typename T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
    int lane = usli_emulated_lane();
    return usli_emulated_shuffled(mask, "__shfl_sync", v, (lane & -width) | (from & (width - 1)));
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32) {
    int lane = usli_emulated_lane(), from = lane ^ with;
    return usli_emulated_shuffled(mask, "__shfl_xor_sync", v, from >= (lane & -width) + width ? lane : from);
}
template <typename T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
    int lane = usli_emulated_lane(), from = lane - (int)by;
    return usli_emulated_shuffled(mask, "__shfl_up_sync", v, from < (lane & -width) ? lane : from);
}
template <typename T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
    int lane = usli_emulated_lane(), from = lane + (int)by;
    return usli_emulated_shuffled(mask, "__shfl_down_sync", v, from >= (lane & -width) + width ? lane : from);
}
struct usli_emulated_vote {
    unsigned in, out;
};
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    usli_emulated_vote own = { predicate != 0, 0 };
    usli_emulated_meet(
        mask, "__ballot_sync",
        [](unsigned, void *const *lanes) {
            unsigned votes = 0;
            for (int i = 0; i < 32; i++)
                if (lanes[i]) votes |= ((usli_emulated_vote *)lanes[i])->in << i;
            for (int i = 0; i < 32; i++)
                if (lanes[i]) ((usli_emulated_vote *)lanes[i])->out = votes;
        },
        &own);
    return own.out;
}
static inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
static inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, !predicate) == 0;
}
/* Any set that holds the lane itself would be a right answer; this is the least helpful one. */
static inline unsigned __activemask() {
    return 1u << usli_emulated_lane();
}

/* ---- Atomics, of integers only: sums of floats must not depend on the order ---------------------------------------
 */

template <typename T, typename U> static inline T atomicAdd(T *p, U v) {
    static_assert(!__is_same(T, float) && !__is_same(T, double), "no atomics on floats");
    T old = *p;
    *p = (T)(old + (T)v);
    return old;
}
template <typename T, typename U> static inline T atomicMax(T *p, U v) {
    T old = *p;
    if ((T)v > old) *p = (T)v;
    return old;
}
template <typename T, typename U> static inline T atomicMin(T *p, U v) {
    T old = *p;
    if ((T)v < old) *p = (T)v;
    return old;
}
template <typename T, typename U> static inline T atomicOr(T *p, U v) {
    T old = *p;
    *p = (T)(old | (T)v);
    return old;
}
template <typename T, typename U> static inline T atomicAnd(T *p, U v) {
    T old = *p;
    *p = (T)(old & (T)v);
    return old;
}
template <typename T, typename U> static inline T atomicExch(T *p, U v) {
    T old = *p;
    *p = (T)v;
    return old;
}
template <typename T, typename U, typename V> static inline T atomicCAS(T *p, U compare, V v) {
    T old = *p;
    if (old == (T)compare) *p = (T)v;
    return old;
}
static inline unsigned atomicInc(unsigned *p, unsigned most) {
    unsigned old = *p;
    *p = old >= most ? 0 : old + 1;
    return old;
}

/* ---- Loads, stores, bits, arithmetic ----------------------------------------------------------------------------- */

template <typename T> static inline T __ldg(const T *p) {
    return *p;
}
template <typename T> static inline T __ldcs(const T *p) {
    return *p;
}
template <typename T> static inline T __ldcg(const T *p) {
    return *p;
}
template <typename T> static inline T __ldca(const T *p) {
    return *p;
}
template <typename T> static inline void __stcs(T *p, T v) {
    *p = v;
}
template <typename T> static inline void __stcg(T *p, T v) {
    *p = v;
}
template <typename T> static inline void __stwt(T *p, T v) {
    *p = v;
}

template <typename To, typename From> static inline To usli_emulated_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To out;
    memcpy(&out, &v, sizeof out);
    return out;
}
static inline unsigned __float_as_uint(float v) {
    return usli_emulated_bits<unsigned>(v);
}
static inline int __float_as_int(float v) {
    return usli_emulated_bits<int>(v);
}
static inline float __uint_as_float(unsigned v) {
    return usli_emulated_bits<float>(v);
}
static inline float __int_as_float(int v) {
    return usli_emulated_bits<float>(v);
}
static inline long long __double_as_longlong(double v) {
    return usli_emulated_bits<long long>(v);
}
static inline double __longlong_as_double(long long v) {
    return usli_emulated_bits<double>(v);
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((uint64_t)a * b >> 32);
}
static inline int __mulhi(int a, int b) {
    return (int)((int64_t)a * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
static inline int __popcll(unsigned long long v) {
    return __builtin_popcountll(v);
}
static inline int __ffs(int v) {
    return __builtin_ffs(v);
}
static inline int __clz(int v) {
    return v ? __builtin_clz((unsigned)v) : 32;
}
static inline unsigned __brev(unsigned v) {
    unsigned out = 0;
    for (int i = 0; i < 32; i++) out |= (v >> i & 1) << (31 - i);
    return out;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t all = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = s >> (4 * i) & 15, byte = (unsigned)(all >> (8 * (pick & 7))) & 0xff;
        out |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return out;
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
    return (unsigned)(((uint64_t)hi << 32 | lo) << (by & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
    return (unsigned)(((uint64_t)hi << 32 | lo) >> (by & 31));
}

static inline float rsqrtf(float v) {
    return 1.0f / sqrtf(v);
}
static inline double rsqrt(double v) {
    return 1.0 / sqrt(v);
}
/* glibc has some of these names for itself. */
#define __expf usli_emulated_expf
#define __exp10f usli_emulated_exp10f
#define __logf usli_emulated_logf
#define __log2f usli_emulated_log2f
#define __powf usli_emulated_powf
#define __sinf usli_emulated_sinf
#define __cosf usli_emulated_cosf
/* The quick ones go by powers of 2, as the device's do, so that errors grow with large exponents here too. */
static inline float __expf(float v) {
    return exp2f(v * 1.44269504f);
}
static inline float __exp10f(float v) {
    return exp2f(v * 3.32192809f);
}
static inline float __logf(float v) {
    return log2f(v) * 0.693147181f;
}
static inline float __log2f(float v) {
    return log2f(v);
}
static inline float __powf(float a, float b) {
    return exp2f(b * log2f(a));
}
static inline float __sinf(float v) {
    return sinf(v);
}
static inline float __cosf(float v) {
    return cosf(v);
}
static inline float __fdividef(float a, float b) {
    return a / b;
}
static inline float __frcp_rn(float v) {
    return 1.0f / v;
}
static inline float __fsqrt_rn(float v) {
    return sqrtf(v);
}
static inline float __frsqrt_rn(float v) {
    return (float)(1.0 / sqrt((double)v));
}
static inline float __fadd_rn(float a, float b) {
    return a + b;
}
static inline float __fsub_rn(float a, float b) {
    return a - b;
}
static inline float __fmul_rn(float a, float b) {
    return a * b;
}
static inline float __fdiv_rn(float a, float b) {
    return a / b;
}
static inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
static inline double __dadd_rn(double a, double b) {
    return a + b;
}
static inline double __dmul_rn(double a, double b) {
    return a * b;
}
static inline double __ddiv_rn(double a, double b) {
    return a / b;
}
static inline double __dsqrt_rn(double v) {
    return sqrt(v);
}
static inline double __fma_rn(double a, double b, double c) {
    return fma(a, b, c);
}
static inline float __saturatef(float v) {
    return v > 0 ? (v < 1 ? v : 1.0f) : 0.0f;
}
static inline int __float2int_rn(float v) {
    return (int)rintf(v);
}
static inline int __float2int_rz(float v) {
    return (int)v;
}
static inline int __float2int_rd(float v) {
    return (int)floorf(v);
}
static inline unsigned __float2uint_rn(float v) {
    return (unsigned)rintf(v);
}
static inline unsigned __float2uint_rz(float v) {
    return (unsigned)v;
}
static inline float __int2float_rn(int v) {
    return (float)v;
}
static inline float __uint2float_rn(unsigned v) {
    return (float)v;
}
static inline float __double2float_rn(double v) {
    return (float)v;
}

#define USLI_MIN_MAX(T)             \
    static inline T min(T a, T b) { \
        return b < a ? b : a;       \
    }                               \
    static inline T max(T a, T b) { \
        return a < b ? b : a;       \
    }
USLI_MIN_MAX(int)
USLI_MIN_MAX(unsigned)
USLI_MIN_MAX(long)
USLI_MIN_MAX(unsigned long)
USLI_MIN_MAX(long long)
USLI_MIN_MAX(unsigned long long)
#undef USLI_MIN_MAX
static inline float min(float a, float b) {
    return fminf(a, b);
}
static inline float max(float a, float b) {
    return fmaxf(a, b);
}
static inline double min(double a, double b) {
    return fmin(a, b);
}
static inline double max(double a, double b) {
    return fmax(a, b);
}

long long clock64();

/* ---- 16-bit types ------------------------------------------------------------------------------------------------ */

static inline uint16_t usli_emulated_to_bf16(float v) {
    uint32_t u = usli_emulated_bits<uint32_t>(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
static inline float usli_emulated_of_bf16(uint16_t v) {
    return usli_emulated_bits<float>((uint32_t)v << 16);
}
static inline uint16_t usli_emulated_to_f16(float v) {
    uint32_t u = usli_emulated_bits<uint32_t>(v), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 65536 and more */
    if (magnitude < 0x38800000u) { /* below 2^-14: steps of 2^-24; adding 1/2 rounds to them */
        float rounded = usli_emulated_bits<float>(magnitude) + 0.5f;
        return (uint16_t)(sign | (usli_emulated_bits<uint32_t>(rounded) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}
static inline float usli_emulated_of_f16(uint16_t v) {
    uint32_t sign = (uint32_t)(v & 0x8000u) << 16, exponent = v >> 10 & 31, fraction = v & 0x3ffu;
    if (exponent == 31) return usli_emulated_bits<float>(sign | 0x7f800000u | fraction << 13);
    if (exponent) return usli_emulated_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
    float small = (float)fraction * (1.0f / 16777216.0f);
    return sign ? -small : small;
}

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float v) : bits(usli_emulated_to_bf16(v)) {}
    operator float() const {
        return usli_emulated_of_bf16(bits);
    }
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(float v) : bits(usli_emulated_to_f16(v)) {}
    operator float() const {
        return usli_emulated_of_f16(bits);
    }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;

static inline float __bfloat162float(__nv_bfloat16 v) {
    return v;
}
static inline __nv_bfloat16 __float2bfloat16(float v) {
    return v;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    return v;
}
static inline float __half2float(__half v) {
    return v;
}
static inline __half __float2half(float v) {
    return v;
}
static inline __half __float2half_rn(float v) {
    return v;
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return { x, y };
}
static inline __half2 __floats2half2_rn(float x, float y) {
    return { x, y };
}
static inline float2 __bfloat1622float2(__nv_bfloat162 v) {
    return { v.x, v.y };
}
static inline float2 __half22float2(__half2 v) {
    return { v.x, v.y };
}
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) {
    return v.bits;
}
static inline unsigned short __half_as_ushort(__half v) {
    return v.bits;
}
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) {
    return usli_emulated_bits<__nv_bfloat16>(v);
}
static inline __half __ushort_as_half(unsigned short v) {
    return usli_emulated_bits<__half>(v);
}

/* ---- Twins of the wrappers of kernels/mma.cuh, which says what each does ------------------------------------------
 */

struct usli_emulated_product {
    float *d;
    const uint32_t *a, *b;
};
template <typename T> static inline float usli_emulated_element(uint32_t word, int high) {
    return (float)usli_emulated_bits<T>((uint16_t)(word >> (16 * high)));
}
template <typename T> static inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(__is_same(T, __half) || __is_same(T, __nv_bfloat16), "16-bit factors");
    if (__is_same(T, __nv_bfloat16) && usli_emulated_sm() < 80) usli_emulated_fault("bfloat16 products need sm_80");
    usli_emulated_product own = { d, a, b };
    usli_emulated_meet(
        0xffffffffu, "mma_16816",
        [](unsigned, void *const *lanes) {
            float left[16][16], right[16][8];
            for (int lane = 0; lane < 32; lane++) {
                auto *p = (usli_emulated_product *)lanes[lane];
                int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++)
                    for (int e = 0; e < 2; e++)
                        left[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = usli_emulated_element<T>(p->a[i], e);
                for (int i = 0; i < 2; i++)
                    for (int e = 0; e < 2; e++) right[2 * t + i * 8 + e][g] = usli_emulated_element<T>(p->b[i], e);
            }
            for (int lane = 0; lane < 32; lane++) {
                auto *p = (usli_emulated_product *)lanes[lane];
                for (int i = 0; i < 4; i++) {
                    int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
                    float sum = p->d[i];
                    for (int k = 0; k < 16; k++) sum += left[row][k] * right[k][col];
                    p->d[i] = sum;
                }
            }
        },
        &own);
}

struct usli_emulated_rows {
    uint32_t *r;
    const char *row;
};
/* Whether a 16-byte copy may go there or come from there; says so if not. */
bool usli_emulated_aligned(const void *p, const char *what);
static inline void ldmatrix_x4(uint32_t (&r)[4], const void *shared) {
    if (!usli_emulated_aligned(shared, "ldmatrix_x4")) return;
    usli_emulated_rows own = { r, (const char *)shared };
    usli_emulated_meet(
        0xffffffffu, "ldmatrix_x4",
        [](unsigned, void *const *lanes) {
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++)
                    memcpy(&((usli_emulated_rows *)lanes[lane])->r[m],
                           ((usli_emulated_rows *)lanes[m * 8 + lane / 4])->row + lane % 4 * 4, 4);
        },
        &own);
}
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *shared) {
    if (!usli_emulated_aligned(shared, "ldmatrix_x4_trans")) return;
    usli_emulated_rows own = { r, (const char *)shared };
    usli_emulated_meet(
        0xffffffffu, "ldmatrix_x4_trans",
        [](unsigned, void *const *lanes) {
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++) {
                    uint16_t two[2]; /* the transpose's row lane / 4 is this column */
                    for (int e = 0; e < 2; e++)
                        memcpy(&two[e], ((usli_emulated_rows *)lanes[m * 8 + lane % 4 * 2 + e])->row + lane / 4 * 2, 2);
                    memcpy(&((usli_emulated_rows *)lanes[lane])->r[m], two, 4);
                }
        },
        &own);
}

/* The place is full of NaNs until the copy is waited for, and only then is the source read: a missing wait or barrier
 * on either side shows. */
void cp_async16(void *shared, const void *global, bool valid);
void cp_async4(void *shared, const void *global);
void cp_async_commit();
void usli_emulated_cp_wait(int newest);
template <int N> static inline void cp_async_wait() {
    usli_emulated_cp_wait(N);
}

#endif
