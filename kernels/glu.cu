/* glu. Llama-3-8B, 4096 tokens, bfloat16: forward moves 352 MB (gate|up in, h out): 73 us at 4.8 TB/s; backward 704 MB
 * (gate|up, dh in; dgate|dup, h out): 147 us. One exponential a value: 16 a clock and multiprocessor are 17 us. */
#include "kernels/mma.cuh"

namespace {

enum { THREADS = 256 };

/* float32 is exact; where a 16-bit type rounds the result, the quick instructions are close enough. */
template <typename T> __device__ __forceinline__ float exponential(float x) {
    return sizeof(T) == 4 ? expf(x) : exp2_fast(1.4426950408889634f * x);
}
template <typename T> __device__ __forceinline__ float sigmoid(float x) {
    float e = 1.0f + exponential<T>(-x);
    return sizeof(T) == 4 ? 1.0f / e : reciprocal_fast(e);
}

/* act(g), and its slope. */
template <typename T, usli_act ACT> __device__ __forceinline__ float activate(float g, float *slope) {
    if (ACT == USLI_SILU) {
        float s = sigmoid<T>(g);
        *slope = s * (1.0f + g * (1.0f - s));
        return g * s;
    }
    if (ACT == USLI_GELU_TANH) {
        /* s = (1 + tanh(u)) / 2 as a sigmoid of 2 u, because 1 + tanh cancels on the left. */
        float v = 1.5957691216057308f * (g + 0.044715f * g * g * g), s = sigmoid<T>(v);
        float dv = 1.5957691216057308f * (1.0f + 3 * 0.044715f * g * g);
        *slope = s + g * s * (1.0f - s) * dv;
        return g * s;
    }
    float c = 0.5f * erfcf(g * -0.70710678118654752f);
    *slope = c + g * 0.3989422804014327f * exponential<T>(-0.5f * g * g);
    return g * c;
}

/* A row is cut into shares of THREADS packs, so that one short division finds a block's row. */
__device__ __forceinline__ int64_t place(unsigned shares, int width, int64_t *row) {
    unsigned r = blockIdx.x / shares;
    *row = r;
    return ((int64_t)(blockIdx.x - r * shares) * THREADS + threadIdx.x) * width;
}

template <typename T, int V, usli_act ACT>
__global__ void __launch_bounds__(THREADS) forward(usli_glu_args a, unsigned shares) {
    await_earlier();
    int64_t row, c = place(shares, V, &row);
    if (c >= a.cols) return;
    const T *gate = static_cast<const T *>(a.gate_up) + row * a.ld + c;
    usli_pack<T, V> g = load_pack<T, V>(gate), u = load_pack<T, V>(gate + a.cols), h;
    float slope, weight = a.weight ? a.weight[row] : 1.0f;
#pragma unroll
    for (int k = 0; k < V; k++)
        h.v[k] = from_f32<T>(activate<T, ACT>(to_f32(g.v[k]), &slope) * to_f32(u.v[k]) * weight);
    store_pack<T, V>(static_cast<T *>(a.h) + row * a.ldh + c, h);
}

/* V columns of a row; returns their part of the weight's gradient. */
template <typename T, int V, usli_act ACT>
__device__ __forceinline__ float columns_back(const usli_glu_args &a, int64_t row, int64_t c, float weight) {
    int64_t one = row * a.cols + c, two = row * a.ld + c;
    const T *gate = static_cast<const T *>(a.gate_up) + two;
    usli_pack<T, V> g = load_pack<T, V>(gate), u = load_pack<T, V>(gate + a.cols);
    usli_pack<T, V> d = load_pack<T, V>(static_cast<const T *>(a.dh) + one), h;
    float dweight = 0;
#pragma unroll
    for (int k = 0; k < V; k++) {
        float slope, up = to_f32(u.v[k]), dh = to_f32(d.v[k]), act = activate<T, ACT>(to_f32(g.v[k]), &slope);
        dweight += dh * (act * up);
        h.v[k] = from_f32<T>(act * up * weight);
        g.v[k] = from_f32<T>(dh * up * slope * weight);
        u.v[k] = from_f32<T>(dh * act * weight);
    }
    if (a.h_out) store_pack<T, V>(static_cast<T *>(a.h_out) + one, h);
    T *out = static_cast<T *>(a.dgate_up) + two;
    store_pack<T, V>(out, g);
    store_pack<T, V>(out + a.cols, u);
    return dweight;
}

template <typename T, int V, usli_act ACT>
__global__ void __launch_bounds__(THREADS) backward(usli_glu_args a, unsigned shares) {
    await_earlier();
    int64_t row, c = place(shares, V, &row);
    if (c < a.cols) columns_back<T, V, ACT>(a, row, c, 1.0f);
}

/* A block a row, which has a weight. */
template <typename T, int V, usli_act ACT> __global__ void __launch_bounds__(THREADS) weighted_back(usli_glu_args a) {
    __shared__ float part[USLI_WARP];
    int64_t row = blockIdx.x;
    float weight = a.weight[row], dweight = 0;
    for (int64_t c = (int64_t)threadIdx.x * V; c < a.cols; c += THREADS * V)
        dweight += columns_back<T, V, ACT>(a, row, c, weight);
    dweight = block_sum<THREADS>(dweight, part);
    if (a.dweight && threadIdx.x == 0) a.dweight[row] = dweight;
}

template <typename T, int V, usli_act ACT> void launch(usli_exec *x, const usli_glu_args *a, usli_pass pass) {
    unsigned shares = (unsigned)usli_ceil_div(a->cols / V, THREADS), blocks = (unsigned)a->rows * shares;
    if (pass == USLI_FORWARD)
        USLI_LAUNCH_EARLY(blocks, THREADS, 0, x, forward<T, V, ACT>)(*a, shares);
    else if (a->weight)
        USLI_LAUNCH((unsigned)a->rows, THREADS, 0, x, weighted_back<T, V, ACT>)(*a);
    else
        USLI_LAUNCH_EARLY(blocks, THREADS, 0, x, backward<T, V, ACT>)(*a, shares);
}

template <typename T, int V> void launch_act(usli_exec *x, const usli_glu_args *a, usli_pass pass) {
    if (a->act == USLI_SILU)
        launch<T, V, USLI_SILU>(x, a, pass);
    else if (a->act == USLI_GELU_TANH)
        launch<T, V, USLI_GELU_TANH>(x, a, pass);
    else
        launch<T, V, USLI_GELU>(x, a, pass);
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *) {
    usli_glu_args whole = *static_cast<const usli_glu_args *>(args), *a = &whole;
    if (!a->rows || !a->cols) return USL_OK;
    if (!a->ld) a->ld = 2 * a->cols;
    if (!a->ldh) a->ldh = a->cols;
    const void *all[] = { a->gate_up, a->h, a->dh, a->dgate_up, a->h_out };
    bool wide = true;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) wide = wide && usli_aligned16(all[i]);
    USLI_BY_DTYPE(a->dtype, T, {
        constexpr int V = 16 / sizeof(T);
        if (wide && a->cols % V == 0 && a->ld % V == 0 && a->ldh % V == 0)
            launch_act<T, V>(x, a, pass);
        else
            launch_act<T, 1>(x, a, pass);
    });
    return usli_launched(x, "glu");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_glu = { run, nullptr };
