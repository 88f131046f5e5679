/* sample: a block a row, the steps of core/cpu/sample.c. Nothing is sorted: the k-th largest score and the last weight
 * that top-p keeps are found bit by bit over order-preserving keys, one pass over the row for each bit. Every thread
 * owns a stretch of ids, so sums have one order and a prefix over threads is a prefix over ids. out is -1 where the
 * logits are not numbers. */
#include "core/base/philox.h"
#include "kernels/device.cuh"

namespace {

constexpr int THREADS = 1024;

struct stretch {
    int64_t first, last;
};

__device__ __forceinline__ stretch mine(int64_t cols) {
    int64_t each = (cols + THREADS - 1) / THREADS, first = each * threadIdx.x;
    return { first < cols ? first : cols, first + each < cols ? first + each : cols };
}

/* Keys order as floats do. */
__device__ __forceinline__ uint32_t key_of(float v) {
    uint32_t bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Sum over the block in thread order; `before` gets the sum of the threads before this one. room: THREADS values. */
template <typename N> __device__ N scan(N v, N *before, N *room) {
    int t = (int)threadIdx.x;
    __syncthreads();
    room[t] = v;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
        N other = t >= step ? room[t - step] : N(0);
        __syncthreads();
        room[t] += other;
        __syncthreads();
    }
    N all = room[THREADS - 1];
    *before = t ? room[t - 1] : N(0);
    return all;
}

struct shared_room {
    double sums[THREADS];
    int64_t counts[THREADS];
    float part[32];
    int64_t found;
    int32_t lowest;
};

__device__ void penalise(const usli_sample_args &a, float *z, int32_t *done) {
    int64_t row = blockIdx.x;
    for (int32_t i = a.cu_seen[row] + (int32_t)threadIdx.x; i < a.cu_seen[row + 1]; i += THREADS)
        if (a.seen[i] >= 0 && a.seen[i] < a.cols) done[a.seen[i]] = 0;
    __syncthreads();
    for (int32_t i = a.cu_seen[row] + (int32_t)threadIdx.x; i < a.cu_seen[row + 1]; i += THREADS) {
        int32_t id = a.seen[i];
        if (id < 0 || id >= a.cols || atomicExch(&done[id], 1)) continue; /* once, however often it was seen */
        z[id] = z[id] > 0 ? z[id] / a.repetition_penalty : z[id] * a.repetition_penalty;
    }
    __syncthreads();
}

/* The largest key that at least k of the values reach: the k-th largest's. Neighbouring threads read neighbours. */
__device__ uint32_t kth_key(const float *z, int64_t cols, int64_t k, shared_room *room) {
    uint32_t key = 0;
    __syncthreads();
    for (int bit = 31; bit >= 0; bit--) {
        uint32_t next = key | 1u << bit;
        int64_t count = 0, before;
        for (int64_t i = threadIdx.x; i < cols; i += THREADS) count += key_of(z[i]) >= next;
        if (scan(count, &before, room->counts) >= k) key = next;
    }
    return key;
}

/* Keeps the smallest set of weights that reaches `want`, of equals those of lowest id. */
__device__ void keep_most(float *z, int64_t cols, double want, shared_room *room) {
    stretch s = mine(cols);
    uint32_t key = 0; /* the largest key whose weights and larger ones together reach `want` */
    double before_sum;
    for (int bit = 31; bit >= 0; bit--) {
        uint32_t next = key | 1u << bit;
        double sum = 0;
        for (int64_t i = threadIdx.x; i < cols; i += THREADS)
            if (key_of(z[i]) >= next) sum += (double)z[i];
        if (scan(sum, &before_sum, room->sums) >= want) key = next;
    }
    double larger = 0;
    int64_t equal = 0, before;
    float value = 0;
    for (int64_t i = s.first; i < s.last; i++) {
        if (key_of(z[i]) > key) larger += (double)z[i];
        if (key_of(z[i]) == key) {
            equal++;
            value = z[i];
        }
    }
    larger = scan(larger, &before_sum, room->sums);
    scan(equal, &before, room->counts);
    int64_t at = before; /* equals before this one */
    for (int64_t i = s.first; i < s.last; i++) {
        if (key_of(z[i]) < key)
            z[i] = 0;
        else if (key_of(z[i]) == key && larger + (double)at++ * (double)value >= want && at > 1)
            z[i] = 0;
    }
    __syncthreads();
}

__device__ double sum_of(const float *z, stretch s, double *before, shared_room *room) {
    double sum = 0;
    for (int64_t i = s.first; i < s.last; i++) sum += (double)z[i];
    return scan(sum, before, room->sums);
}

__device__ int32_t draw(const usli_sample_args &a, float *z, float top, shared_room *room) {
    stretch s = mine(a.cols);
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS) z[i] = (z[i] - top) / a.temperature;
    if (a.top_k > 0 && a.top_k < a.cols) {
        uint32_t least = kth_key(z, a.cols, a.top_k, room);
        for (int64_t i = threadIdx.x; i < a.cols; i += THREADS)
            if (key_of(z[i]) < least) z[i] = -INFINITY;
    }
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS) z[i] = expf(z[i]);
    __syncthreads();
    double before, sum = sum_of(z, s, &before, room);
    if (a.top_p < 1) {
        keep_most(z, a.cols, (double)a.top_p * sum, room);
        sum = sum_of(z, s, &before, room);
    }
    if (a.min_p > 0) {
        for (int64_t i = s.first; i < s.last; i++)
            if (z[i] < a.min_p) z[i] = 0;
        sum = sum_of(z, s, &before, room);
    }
    uint32_t word[4];
    usli_philox_words(a.seed, *a.offset, (uint64_t)blockIdx.x, word);
    double at = ((double)((uint64_t)word[0] << 21 | word[1] >> 11) / 9007199254740992.0) * sum;
    /* The first id at which the running sum passes `at`; the last that counts when rounding leaves none. */
    int64_t hit = -1, last = -1, ignored;
    double reached = before;
    for (int64_t i = s.first; i < s.last; i++) {
        if (z[i] == 0) continue;
        last = i;
        reached += (double)z[i];
        if (reached > at && before <= at && hit < 0) hit = i;
    }
    int64_t hits = scan((int64_t)(hit >= 0), &ignored, room->counts);
    if (threadIdx.x == 0) room->found = 0;
    __syncthreads();
    if (hits) {
        if (hit >= 0 && ignored == 0) room->found = hit;
    } else {
        int64_t counting = scan((int64_t)(last >= 0), &ignored, room->counts);
        if (last >= 0 && ignored == counting - 1) room->found = last;
    }
    __syncthreads();
    return (int32_t)room->found;
}

__global__ void __launch_bounds__(THREADS) sample_row(usli_sample_args a, float *scores, int32_t *marks) {
    __shared__ shared_room room;
    int64_t row = blockIdx.x;
    const float *logits = a.logits + row * a.stride;
    float *z = scores + row * a.cols, best = -INFINITY;
    bool numbers = true, penalises = a.cu_seen && a.repetition_penalty != 1.0f;
    bool changes = a.temperature > 0 || penalises; /* else the logits are read once, where they are */
    int64_t at = a.cols;                           /* the first of this thread's that is the best of them */
    if (changes)
        for (int64_t i = threadIdx.x; i < a.cols; i += THREADS) z[i] = logits[i];
    __syncthreads();
    if (penalises) penalise(a, z, marks + row * a.cols);
    const float *scored = changes ? z : logits;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS) {
        float v = scored[i];
        numbers = numbers && v < INFINITY;
        if (v > best) best = v, at = i;
    }
    float top = block_max<THREADS>(best, room.part);
    if (!__syncthreads_and(numbers) || top == -INFINITY) {
        if (threadIdx.x == 0) a.out[row] = -1;
        return;
    }
    if (a.temperature > 0) {
        int32_t id = draw(a, z, top, &room);
        if (threadIdx.x == 0) a.out[row] = id;
        return;
    }
    if (threadIdx.x == 0) room.lowest = INT32_MAX;
    __syncthreads();
    if (best == top) atomicMin(&room.lowest, (int32_t)at);
    __syncthreads();
    if (threadIdx.x == 0) a.out[row] = room.lowest;
}

size_t workspace(const usli_exec *, const void *args, usli_pass) {
    const usli_sample_args *a = static_cast<const usli_sample_args *>(args);
    return (size_t)(a->rows * a->cols) * (a->cu_seen ? 8 : 4) + 64;
}

usl_status run(usli_exec *x, void *args, usli_pass, void *ws) {
    const usli_sample_args *a = static_cast<const usli_sample_args *>(args);
    float *scores = static_cast<float *>(ws);
    if (!a->rows) return USL_OK;
    USLI_LAUNCH((unsigned)a->rows, THREADS, 0, x, sample_row)
    (*a, scores, reinterpret_cast<int32_t *>(scores + a->rows * a->cols));
    return usli_launched(x, "sample");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_sample = { run, workspace };
