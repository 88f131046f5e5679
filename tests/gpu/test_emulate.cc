/* The emulator itself: products and fragments against plain sums, collectives, conversions; and that it finds what it
 * is there to find: barriers and waits that are missing, lanes that never come, bad addresses. */
#include "kernels/mma.cuh"

extern "C" {
#include "core/base/half.h"
#include "tests/test.h"
}

namespace {

const struct { void *stream; } nowhere = { nullptr };
const auto *const x = &nowhere;

/* ---- Products ---------------------------------------------------------------------------------------------------- */

enum { LINE = 24 }; /* values between rows: a multiple of 8, so that rows are 16-byte aligned */

/* c = a b of 16 x 16 and 16 x 8, everything by way of shared memory and ldmatrix; b_rows: b is stored (k, n), else (n,
 * k). */
template <typename T, bool b_rows> __global__ void product(const T *a, const T *b, float *c) {
    USLI_SHARED(T, tile);
    T *left = tile, *right = tile + 16 * LINE;
    int lane = (int)threadIdx.x, g = lane / 4, t = lane % 4;
    cp_async16(left + lane / 2 * LINE + lane % 2 * 8, a + lane / 2 * 16 + lane % 2 * 8, true);
    if (lane < 16) {
        int row = b_rows ? lane : lane / 2, col = b_rows ? 0 : lane % 2 * 8;
        cp_async16(right + row * LINE + col, b + row * (b_rows ? 8 : 16) + col, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t fa[4], fb[4], two[2];
    ldmatrix_x4(fa, left + lane % 16 * LINE + lane / 16 * 8);
    if (b_rows)
        ldmatrix_x4_trans(fb, right + lane % 16 * LINE);
    else
        ldmatrix_x4(fb, right + lane % 8 * LINE + lane / 8 % 2 * 8);
    two[0] = fb[0], two[1] = fb[1];
    float d[4] = { 1, 1, 1, 1 };
    mma_16816<T>(d, fa, two);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

template <typename T, bool b_rows> void check_product() {
    alignas(16) T a[256], b[128];
    float c[128];
    for (int i = 0; i < 256; i++) a[i] = (float)((i * 37 + 11) % 61 - 30) / 16;
    for (int i = 0; i < 128; i++) b[i] = (float)((i * 53 + 7) % 59 - 29) / 8;
    USLI_LAUNCH(1, 32, sizeof(T) * 32 * LINE, x, product<T, b_rows>)(a, b, c);
    CHECK(cudaGetLastError() == cudaSuccess, "product");
    int bad = 0;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double sum = 1;
            for (int k = 0; k < 16; k++)
                sum += (double)(float)a[i * 16 + k] * (double)(float)b[b_rows ? k * 8 + j : j * 16 + k];
            bad += (double)c[i * 8 + j] != sum; /* these values' sums are exact */
        }
    CHECK(!bad, "%d of 128 values of a product are wrong", bad);
}

/* ---- Collectives ------------------------------------------------------------------------------------------------- */

__global__ void lanes(int *out) {
    int lane = (int)threadIdx.x;
    int *o = out + lane * 8;
    o[0] = __shfl_sync(0xffffffffu, lane * 3, 5);
    o[1] = __shfl_xor_sync(0xffffffffu, lane, 6);
    o[2] = __shfl_up_sync(0xffffffffu, lane, 2, 8);
    o[3] = __shfl_down_sync(0xffffffffu, lane, 3);
    o[4] = (int)__ballot_sync(0xffffffffu, lane % 3 == 0);
    if (lane < 16)
        o[5] = (int)__shfl_sync(0xffffu, (double)lane, 15); /* the halves meet apart */
    else
        o[5] = __any_sync(0xffff0000u, lane == 20);
    o[6] = __all_sync(0xffffffffu, lane < 31);
    o[7] = __syncthreads_count(lane % 2);
}

void check_lanes() {
    int out[32][8], bad = 0;
    USLI_LAUNCH(1, 32, 0, x, lanes)(out[0]);
    CHECK(cudaGetLastError() == cudaSuccess, "lanes");
    for (int i = 0; i < 32; i++) {
        int want[8] = { 15, i ^ 6, i % 8 < 2 ? i : i - 2, i + 3 > 31 ? i : i + 3, 0x49249249, i < 16 ? 15 : 1, 0, 16 };
        bad += memcmp(out[i], want, sizeof want) != 0;
    }
    CHECK(!bad, "%d lanes got something else", bad);
}

__global__ void indices(int *out) {
    int i = (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
    int b = (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    atomicAdd(&out[b * 60 + i], 1);
}

void check_indices() {
    int out[24 * 60] = { 0 }, bad = 0;
    USLI_LAUNCH(dim3(2, 3, 4), dim3(5, 4, 3), 0, x, indices)(out);
    for (int i = 0; i < 24 * 60; i++) bad += out[i] != 1;
    CHECK(!bad && cudaGetLastError() == cudaSuccess, "%d threads ran not once", bad);
}

/* ---- What must be found ------------------------------------------------------------------------------------------ */

template <bool barrier> __global__ void turn(const float *in, float *out) {
    USLI_SHARED(float, room);
    room[threadIdx.x] = in[threadIdx.x];
    if (barrier) __syncthreads();
    out[threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
}

template <bool wait> __global__ void copy_late(const float *in, float *out) {
    USLI_SHARED(float, room);
    cp_async16(room + threadIdx.x * 4, in + threadIdx.x * 4, true);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = room[threadIdx.x * 4 + i];
}

template <typename T> __global__ void old_values(int *news) {
    __shared__ T room[32];
    USLI_SHARED(T, more);
    if (isnan((float)room[threadIdx.x]) && isnan((float)more[threadIdx.x])) atomicAdd(news, 1);
    room[threadIdx.x] = more[threadIdx.x] = 1.0f;
}

int wrong(const float *got, const float *want, int n, bool turned) {
    int bad = 0;
    for (int i = 0; i < n; i++) bad += !(got[i] == want[turned ? n - 1 - i : i]);
    return bad;
}

void check_missing_barrier() {
    enum { N = 256 };
    alignas(16) float in[N], out[N];
    for (int i = 0; i < N; i++) in[i] = (float)i;
    USLI_LAUNCH(1, N, sizeof in, x, turn<true>)(in, out);
    CHECK(!wrong(out, in, N, true), "with a barrier");
    USLI_LAUNCH(1, N, sizeof in, x, turn<false>)(in, out);
    CHECK(wrong(out, in, N, true) > N / 4, "a missing barrier shows");
    USLI_LAUNCH(1, N / 4, sizeof in, x, copy_late<true>)(in, out);
    CHECK(!wrong(out, in, N, false), "a copy that is waited for");
    USLI_LAUNCH(1, N / 4, sizeof in, x, copy_late<false>)(in, out);
    CHECK(wrong(out, in, N, false) == N, "a missing wait shows");
    int news = 0;
    USLI_LAUNCH(3, 32, 128, x, old_values<float>)(&news);
    USLI_LAUNCH(3, 32, 64, x, old_values<__half>)(&news);
    CHECK(news == 192, "%d of 192 threads find shared memory that nobody wrote", news);
    CHECK(cudaGetLastError() == cudaSuccess, "none of these is an error of its own");
}

template <int which> __global__ void stuck(int *out) {
    int i = (int)threadIdx.x;
    if (which == 0 && i != 40) __syncthreads();                        /* 40 returns */
    if (which == 1 && i != 7) out[0] = __shfl_sync(0xffffffffu, 1, 0); /* 7 returns */
    if (which == 2 && i % 2) __syncwarp();                             /* at two places */
    if (which == 2 && i % 2 == 0) out[0] = (int)__ballot_sync(0xffffffffu, 1);
    if (which == 3) out[0] = __shfl_sync(i < 16 ? 0xffffu : 0xffffffffu, 1, 0); /* two masks */
}

template <int which> __global__ void bad_address(const float *in) {
    USLI_SHARED(float, room);
    if (which == 0) cp_async16(room, in + 1, true);
    if (which == 1) cp_async16(room + 2, in, true);
    uint32_t r[4];
    if (which == 2) ldmatrix_x4(r, room + 1);
}

void fails(const char *what) {
    cudaError_t error = cudaGetLastError();
    CHECK(error == cudaErrorLaunchFailure, "%s is found: %s", what, cudaGetErrorString(error));
    int out[32][8];
    USLI_LAUNCH(1, 32, 0, x, lanes)(out[0]);
    CHECK(cudaGetLastError() == cudaSuccess && out[3][1] == 5, "and the next launch runs");
}

void check_faults() {
    int out[1];
    alignas(16) float in[8] = { 0 };
    USLI_LAUNCH(1, 64, 0, x, stuck<0>)(out);
    fails("a thread that misses a barrier");
    USLI_LAUNCH(1, 64, 0, x, stuck<1>)(out);
    fails("a lane that misses a shuffle");
    USLI_LAUNCH(1, 32, 0, x, stuck<2>)(out);
    fails("lanes at two collectives");
    USLI_LAUNCH(1, 32, 0, x, stuck<3>)(out);
    fails("lanes with two masks");
    USLI_LAUNCH(1, 20, 0, x, stuck<1>)(out);
    fails("a mask of lanes that are not there");
    USLI_LAUNCH(1, 32, 64, x, bad_address<0>)(in);
    fails("a source that is not aligned");
    USLI_LAUNCH(1, 32, 64, x, bad_address<1>)(in);
    fails("a destination that is not aligned");
    USLI_LAUNCH(1, 32, 64, x, bad_address<2>)(in);
    fails("a row that is not aligned");
    USLI_LAUNCH(1, 1025, 0, x, indices)(out);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration, "too many threads");
    USLI_LAUNCH(1, 32, 50000, x, turn<true>)(in, in);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue, "shared memory that was not asked for");
    CHECK(cudaFuncSetAttribute(turn<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) != cudaSuccess &&
              cudaGetLastError() != cudaSuccess,
          "shared memory that is not there");
}

/* ---- Graphs ------------------------------------------------------------------------------------------------------ */

__global__ void add_to(int *sum, int what) {
    atomicAdd(sum, what);
}

void check_graphs() {
    struct {
        cudaStream_t stream;
    } own, *const y = &own;
    int *sum = nullptr, *copy = nullptr, what = 5, host = 0;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    CHECK(!cudaStreamCreate(&own.stream) && !cudaMalloc((void **)&sum, 4) && !cudaMalloc((void **)&copy, 4), "memory");
    *sum = *copy = 1;
    CHECK(!cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeThreadLocal), "begin");
    cudaMemsetAsync(sum, 0, 4, own.stream);
    USLI_LAUNCH(1, 32, 0, y, add_to)(sum, what);
    what = 7; /* the graph has the 5 */
    cudaMemcpyAsync(copy, sum, 4, cudaMemcpyDeviceToDevice, own.stream);
    CHECK(!cudaStreamEndCapture(own.stream, &graph) && graph && *sum == 1 && *copy == 1, "captured work runs");
    CHECK(!cudaGraphInstantiate(&ready, graph) && !cudaGraphDestroy(graph), "ready");
    for (int i = 0; i < 2; i++) {
        *sum = 100, *copy = 0;
        CHECK(!cudaGraphLaunch(ready, own.stream) && *sum == 160 && *copy == 160, "%d and %d", *sum, *copy);
    }
    cudaGraphExecDestroy(ready);
    for (int i = 0; i < 4; i++) {
        void *more = nullptr;
        CHECK(!cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeThreadLocal), "begin");
        if (i == 0) cudaMemcpyAsync(sum, &host, 4, cudaMemcpyHostToDevice, own.stream);
        if (i == 1) cudaStreamSynchronize(own.stream);
        if (i == 2) cudaMalloc(&more, 4);
        if (i == 3) cudaMemcpy(sum, copy, 4, cudaMemcpyDeviceToDevice);
        CHECK(cudaStreamEndCapture(own.stream, &graph) && !graph && cudaGetLastError(), "%d can be captured", i);
    }
    cudaFree(sum), cudaFree(copy), cudaStreamDestroy(own.stream);
}

/* ---- 16-bit types ------------------------------------------------------------------------------------------------ */

void check_types() {
    int bad = 0;
    uint32_t seed = 1;
    for (uint32_t i = 0; i < 65536; i++) {
        __half h = __ushort_as_half((uint16_t)i);
        __nv_bfloat16 b = __ushort_as_bfloat16((uint16_t)i);
        float f = usli_f16_to_f32((uint16_t)i), g = usli_bf16_to_f32((uint16_t)i);
        bad += isnan(f) ? !isnan((float)h) : (float)h != f || signbit((float)h) != signbit(f) || __half(f).bits != i;
        bad += isnan(g) ? !isnan((float)b) : (float)b != g || __nv_bfloat16(g).bits != i;
    }
    CHECK(!bad, "%d 16-bit values are read otherwise", bad);
    for (uint32_t i = 0; i < 4000000; i++) {
        seed = seed * 1664525 + 1013904223;
        float f = __uint_as_float(i % 2 ? seed : (seed & 0x9fffffffu) | 0x20000000u); /* half of them near halves */
        if (isnan(f)) continue;
        bad += __half(f).bits != usli_f32_to_f16(f);
        bad += __nv_bfloat16(f).bits != usli_f32_to_bf16(f);
    }
    CHECK(!bad, "%d floats are rounded otherwise", bad);
    CHECK(isnan((float)__half(NAN)) && isnan((float)__nv_bfloat16(NAN)), "NaN");
    CHECK(__umulhi(0xffffffffu, 0xfffffffeu) == 0xfffffffdu && __ffs(8) == 4 && __clz(1) == 31 && __popc(7) == 3 &&
              __brev(1) == 0x80000000u && __byte_perm(0x33221100u, 0x77665544u, 0x7250u) == 0x77225500u,
          "bits");
}

} // namespace

int main() {
    check_product<__half, false>(), check_product<__half, true>();
    check_product<__nv_bfloat16, false>(), check_product<__nv_bfloat16, true>();
    check_lanes(), check_indices();
    check_missing_barrier(), check_faults();
    check_graphs();
    check_types();
    return test_end("emulate");
}
