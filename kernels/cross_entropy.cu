/* cross_entropy on a chunk of logits: a block a row, which is read twice and written once, AHEAD bytes a thread on
 * their way at a time. The second reading goes backwards, because the L2 cache still holds what was read last. 1,000
 * rows of Llama 3's vocabulary in bfloat16: 0.51 GB and what the cache missed of another 0.26: 107 to 160 us at
 * 4.8 TB/s; two exponentials a value, 16 a clock and multiprocessor, are 70 us of that. */
#include "kernels/mma.cuh"

namespace {

enum { THREADS = 512, AHEAD = 32 };

/* What the loss sees of a logit. */
template <bool CAP> __device__ __forceinline__ float seen(const usli_cross_entropy_args &a, float logit) {
    float z = a.logit_scale * logit;
    return CAP ? a.softcap * tanhf(z / a.softcap) : z;
}

template <typename T> __device__ __forceinline__ float exponential(float v) {
    return sizeof(T) == 4 ? expf(v) : exp2_fast(1.4426950408889634f * v);
}

/* Packs first, first + THREADS, ... below count: p, and what the loss sees of them; -inf beyond. */
template <typename T, int V, bool CAP, int N>
__device__ __forceinline__ void load_ahead(const usli_cross_entropy_args &a, const T *row, int64_t first, int64_t count,
                                           float (&z)[N][V]) {
    usli_pack<T, V> p[N];
#pragma unroll
    for (int j = 0; j < N; j++)
        if (first + j * THREADS < count) p[j] = load_pack<T, V>(row + (first + j * THREADS) * V);
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int k = 0; k < V; k++) z[j][k] = first + j * THREADS < count ? seen<CAP>(a, to_f32(p[j].v[k])) : -INFINITY;
}

template <typename T, int V, bool CAP>
__global__ void __launch_bounds__(THREADS, 2) row_loss(usli_cross_entropy_args a, int64_t ld, int32_t *hits) {
    constexpr int N = CAP || V == 1 ? 1 : (int)(AHEAD / V / sizeof(T)); /* with a cap arithmetic decides */
    __shared__ float part[32];
    T *row = static_cast<T *>(a.logits) + (int64_t)blockIdx.x * ld;
    int32_t label = a.target[blockIdx.x];
    float target = seen<CAP>(a, to_f32(row[label])), top = -INFINITY, sum = 0, z[N][V];
    int64_t packs = a.cols / V;
    for (int64_t i = threadIdx.x; i < packs; i += N * THREADS) {
        load_ahead<T, V, CAP>(a, row, i, packs, z);
        float most = top;
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int k = 0; k < V; k++) most = fmaxf(most, z[j][k]);
        if (most > top) {
            sum *= exponential<T>(top - most);
            top = most;
        }
        float shift = top == -INFINITY ? 0.0f : top; /* logits of -inf alone add nothing */
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int k = 0; k < V; k++) sum += exponential<T>(z[j][k] - shift);
    }
    float all = block_max<THREADS>(top, part);
    sum = block_sum<THREADS>(top == -INFINITY && sum == 0 ? 0.0f : sum * exponential<T>(top - all), part);
    if (threadIdx.x == 0) {
        a.losses[blockIdx.x] = logf(sum) + all - target;
        hits[blockIdx.x] = target == all;
    }
    if (!a.with_gradient) return;
    __syncthreads(); /* everybody has read row[label] */
    float factor = a.update->inv_counted * a.update->loss_scale * a.logit_scale / sum;
    for (int64_t r = (packs - 1) / (N * THREADS); r >= 0; r--) {
        int64_t first = r * N * THREADS + threadIdx.x;
        load_ahead<T, V, CAP>(a, row, first, packs, z);
#pragma unroll
        for (int j = 0; j < N; j++) {
            int64_t i = first + j * THREADS;
            if (i >= packs) continue;
            usli_pack<T, V> p;
#pragma unroll
            for (int k = 0; k < V; k++) {
                float g = exponential<T>(z[j][k] - all);
                if (i * V + k == label) g -= sum; /* p / sum - 1 once divided */
                g *= factor;
                if (CAP) g *= 1.0f - (z[j][k] / a.softcap) * (z[j][k] / a.softcap);
                p.v[k] = from_f32<T>(g);
            }
            store_pack<T, V>(row + i * V, p);
        }
    }
}

template <typename T, int V> void launch(usli_exec *x, const usli_cross_entropy_args *a, int64_t ld, int32_t *hits) {
    unsigned rows = (unsigned)a->rows;
    if (a->softcap > 0)
        USLI_LAUNCH(rows, THREADS, 0, x, row_loss<T, V, true>)(*a, ld, hits);
    else
        USLI_LAUNCH(rows, THREADS, 0, x, row_loss<T, V, false>)(*a, ld, hits);
}

enum { TOTAL = 256 };

/* One order always: each thread its strided rows, then a tree. */
__global__ void __launch_bounds__(TOTAL)
    add_losses(const float *losses, const int32_t *hits, int64_t rows, usli_update *u) {
    __shared__ double sums[TOTAL];
    __shared__ int64_t counts[TOTAL];
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = threadIdx.x; i < rows; i += TOTAL) {
        sum += (double)losses[i];
        count += hits[i];
    }
    sums[threadIdx.x] = sum;
    counts[threadIdx.x] = count;
    __syncthreads();
    for (int half = TOTAL / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            counts[threadIdx.x] += counts[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        u->loss_sum += sums[0];
        u->correct += counts[0];
    }
}

size_t workspace(const usli_exec *, const void *args, usli_pass) {
    return (size_t) static_cast<const usli_cross_entropy_args *>(args)->rows * sizeof(int32_t);
}

usl_status run(usli_exec *x, void *args, usli_pass, void *ws) {
    const usli_cross_entropy_args *a = static_cast<const usli_cross_entropy_args *>(args);
    int32_t *hits = static_cast<int32_t *>(ws);
    int64_t ld = a->ld ? a->ld : a->cols;
    if (!a->rows) return USL_OK;
    USLI_BY_DTYPE(a->dtype, T, {
        constexpr int V = 16 / sizeof(T);
        if (a->cols % V == 0 && ld % V == 0 && usli_aligned16(a->logits))
            launch<T, V>(x, a, ld, hits);
        else
            launch<T, 1>(x, a, ld, hits);
    });
    USLI_LAUNCH(1, TOTAL, 0, x, add_losses)(a->losses, hits, a->rows, a->update);
    return usli_launched(x, "cross_entropy");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_cross_entropy = { run, workspace };
