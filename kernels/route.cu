/* route. A warp a token; the rows are sorted by counting, in three steps whose sums are of integers, so that their
 * order is always the same. Qwen3-30B-A3B, 4096 tokens, 128 experts, 8 slots: 2 MB of logits and 0.5 MB of rows:
 * launches are what it costs. */
#include "kernels/device.cuh"

namespace {

constexpr int WARPS = 4, THREADS = WARPS * USLI_WARP, SHARE = 256 /* slots that are placed by one warp */;
constexpr int SORTERS = 512;
static_assert(SORTERS >= USLI_MAX_EXPERTS, "a thread an expert");

/* The best of a warp's values, the lowest index of equals; index -1: none. All lanes get it. */
__device__ __forceinline__ void warp_best(float &v, int &index) {
    for (int i = 16; i > 0; i /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, v, i);
        int at = __shfl_xor_sync(0xffffffffu, index, i);
        if (at >= 0 && (index < 0 || other > v || (other == v && at < index))) {
            v = other;
            index = at;
        }
    }
}

/* s of one token, into shared memory. */
__device__ __forceinline__ void scores(const usli_route_args &a, int64_t t, float *s, int lane) {
    const float *z = a.logits + t * a.experts;
    if (a.sigmoid) {
        for (int e = lane; e < a.experts; e += USLI_WARP) s[e] = 1.0f / (1.0f + expf(-z[e]));
    } else {
        float top = -INFINITY, sum = 0;
        for (int e = lane; e < a.experts; e += USLI_WARP) top = fmaxf(top, z[e]);
        top = warp_max(top);
        for (int e = lane; e < a.experts; e += USLI_WARP) sum += s[e] = expf(z[e] - top);
        sum = warp_sum(sum);
        for (int e = lane; e < a.experts; e += USLI_WARP) s[e] /= sum;
    }
    __syncwarp();
}

/* Index of the largest of n values in shared memory. */
__device__ __forceinline__ int best_of(const float *v, int n, int lane) {
    float best = -INFINITY;
    int index = -1;
    for (int i = lane; i < n; i += USLI_WARP)
        if (index < 0 || v[i] > best) {
            best = v[i];
            index = i;
        }
    warp_best(best, index);
    return index;
}

/* Leaves -infinity in the place of experts outside the best groups. A lane a group. */
__device__ __forceinline__ void keep_best_groups(const usli_route_args &a, float *choice, int lane) {
    int size = a.experts / a.groups;
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; lane < a.groups && i < size; i++) {
        float v = choice[lane * size + i];
        if (v > first)
            second = first, first = v;
        else if (v > second)
            second = v;
    }
    float worth = a.by_pairs ? first + second : first;
    bool open = lane < a.groups;
    for (int i = 0; i < a.best_groups; i++) {
        float v = worth;
        int index = open ? lane : -1;
        warp_best(v, index);
        if (lane == index) open = false;
    }
    for (int i = 0; open && i < size; i++) choice[lane * size + i] = -INFINITY;
    __syncwarp();
}

__device__ __forceinline__ float chosen_sum(const usli_route_args &a, const int32_t *chosen, const float *s) {
    float sum = 1e-20f;
    for (int k = 0; k < a.top_k; k++) sum += s[chosen[k]];
    return sum;
}
__device__ __forceinline__ int64_t row_of(const usli_route_args &a, int64_t slot) {
    return a.row ? a.row[slot] : slot;
}

__global__ void __launch_bounds__(THREADS) choose(usli_route_args a) {
    USLI_SHARED(float, shared);
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int64_t t = (int64_t)blockIdx.x * WARPS + warp;
    if (t >= a.tokens) return;
    float *choice = shared + warp * a.experts;
    scores(a, t, choice, lane);
    for (int e = lane; a.correction && e < a.experts; e += USLI_WARP) choice[e] += a.correction[e];
    __syncwarp();
    if (a.groups > 1) keep_best_groups(a, choice, lane);
    for (int k = 0; k < a.top_k; k++) {
        int e = best_of(choice, a.experts, lane);
        __syncwarp();
        if (lane == 0) {
            a.chosen[t * a.top_k + k] = e;
            choice[e] = -INFINITY;
        }
        __syncwarp();
    }
}

__global__ void __launch_bounds__(THREADS) weigh(usli_route_args a) {
    USLI_SHARED(float, shared);
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int64_t t = (int64_t)blockIdx.x * WARPS + warp;
    if (t >= a.tokens) return;
    float *s = shared + warp * a.experts;
    const int32_t *chosen = a.chosen + t * a.top_k;
    scores(a, t, s, lane);
    float over = a.normalised ? chosen_sum(a, chosen, s) : 1.0f;
    for (int k = lane; k < a.top_k; k += USLI_WARP)
        a.weight[row_of(a, t * a.top_k + k)] = s[chosen[k]] / over * a.scale;
}

/* ---- The rows ------------------------------------------------------------------------------------------------------
 */

/* How many of the warp's lanes below this one have the same expert, and how many at all. */
__device__ __forceinline__ void among_equals(int expert, int lane, int *before, int *all) {
    *before = *all = 0;
    for (int i = 0; i < USLI_WARP; i++) {
        int other = __shfl_sync(0xffffffffu, expert, i);
        *before += other == expert && i < lane;
        *all += other == expert;
    }
}

/* A warp walks through its share of the slots. place false: how many of each expert it has, into counts (shares,
 * experts); true: counts says where its first of each expert goes. */
__global__ void __launch_bounds__(USLI_WARP) walk(usli_route_args a, int32_t *counts, bool place) {
    USLI_SHARED(int32_t, next);
    int lane = (int)threadIdx.x;
    int32_t *own = counts + (int64_t)blockIdx.x * a.experts;
    for (int e = lane; e < a.experts; e += USLI_WARP) next[e] = place ? own[e] : 0;
    __syncwarp();
    int64_t first = (int64_t)blockIdx.x * SHARE, slots = a.tokens * a.top_k;
    for (int64_t i = first + lane; i - lane < slots && i < first + SHARE + lane; i += USLI_WARP) {
        int expert = i < slots ? a.chosen[i] : -1, before, all;
        among_equals(expert, lane, &before, &all);
        int32_t row = expert >= 0 ? next[expert] + before : 0;
        __syncwarp();
        if (expert >= 0 && before == 0) next[expert] += all;
        __syncwarp();
        if (place && expert >= 0) {
            a.row[i] = row;
            a.token[row] = (int32_t)(i / a.top_k);
        }
    }
    for (int e = lane; !place && e < a.experts; e += USLI_WARP) own[e] = next[e];
}

/* From how many each share has of each expert to where its first goes. */
__global__ void __launch_bounds__(SORTERS) begin_rows(usli_route_args a, int32_t *counts, int64_t shares) {
    __shared__ int32_t ends[SORTERS];
    int e = (int)threadIdx.x;
    int32_t sum = 0;
    for (int64_t i = 0; e < a.experts && i < shares; i++) sum += counts[i * a.experts + e];
    ends[e] = sum;
    __syncthreads();
    for (int step = 1; step < SORTERS; step *= 2) {
        int32_t before = e >= step ? ends[e - step] : 0;
        __syncthreads();
        ends[e] += before;
        __syncthreads();
    }
    if (e >= a.experts) return;
    int32_t next = ends[e] - sum;
    a.offsets[e] = next;
    if (e == a.experts - 1) a.offsets[a.experts] = ends[e];
    for (int64_t i = 0; i < shares; i++) {
        int32_t count = counts[i * a.experts + e];
        counts[i * a.experts + e] = next;
        next += count;
    }
}

/* ---- Balance, and back ---------------------------------------------------------------------------------------------
 */

/* A block a micro-batch and 32 experts: a warp takes every fourth token, a lane one expert. */
__global__ void __launch_bounds__(THREADS) count(usli_route_args a) {
    USLI_SHARED(float, shared);
    __shared__ float mass[WARPS][USLI_WARP];
    __shared__ int32_t counts[WARPS][USLI_WARP];
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int64_t m = blockIdx.y, e = (int64_t)blockIdx.x * USLI_WARP + lane;
    float *s = shared + warp * a.experts, sum = 0;
    int32_t found = 0;
    int64_t begin = a.micro[m] - a.first, end = a.micro[m + 1] - a.first;
    if (begin < 0) begin = 0;
    if (end > a.tokens) end = a.tokens;
    for (int64_t t = begin + warp; t < end; t += WARPS) {
        __syncwarp();
        scores(a, t, s, lane);
        if (e < a.experts) sum += s[e];
        for (int k = 0; k < a.top_k; k++) found += a.chosen[t * a.top_k + k] == e;
    }
    mass[warp][lane] = sum;
    counts[warp][lane] = found;
    __syncthreads();
    if (warp || e >= a.experts) return;
    for (int i = 1; i < WARPS; i++) {
        sum += mass[i][lane];
        found += counts[i][lane];
    }
    a.mass[m * a.experts + e] += sum;
    a.counts[m * a.experts + e] += found;
}

__device__ __forceinline__ const float *dmass_of(const usli_route_args &a, int64_t t) {
    if (!a.dmass) return nullptr;
    int m = 0;
    t += a.first;
    while (m + 1 < a.micros && t >= a.micro[m + 1]) m++;
    return t >= a.micro[m] && t < a.micro[m + 1] ? a.dmass + (int64_t)m * a.experts : nullptr;
}

__global__ void __launch_bounds__(THREADS) differentiate(usli_route_args a) {
    USLI_SHARED(float, shared);
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    int64_t t = (int64_t)blockIdx.x * WARPS + warp;
    if (t >= a.tokens) return;
    float *s = shared + warp * 2 * a.experts, *ds = s + a.experts, *dz = a.dlogits + t * a.experts;
    const int32_t *chosen = a.chosen + t * a.top_k;
    const float *dmass = dmass_of(a, t);
    scores(a, t, s, lane);
    for (int e = lane; e < a.experts; e += USLI_WARP) ds[e] = dmass ? dmass[e] : 0.0f;
    __syncwarp();
    float over = a.normalised ? chosen_sum(a, chosen, s) : 1.0f, shared_part = 0, inner = 0;
    for (int k = 0; a.normalised && k < a.top_k; k++)
        shared_part += a.dweight[row_of(a, t * a.top_k + k)] * s[chosen[k]] / over;
    for (int k = lane; k < a.top_k; k += USLI_WARP) /* a token's experts are distinct */
        ds[chosen[k]] += (a.dweight[row_of(a, t * a.top_k + k)] - shared_part) * a.scale / over;
    __syncwarp();
    for (int e = lane; !a.sigmoid && e < a.experts; e += USLI_WARP) inner += s[e] * ds[e];
    inner = warp_sum(inner);
    for (int e = lane; e < a.experts; e += USLI_WARP)
        dz[e] = s[e] * (a.sigmoid ? (1.0f - s[e]) * ds[e] : ds[e] - inner);
}

int64_t shares_of(const usli_route_args *a) {
    return usli_ceil_div(a->tokens * a->top_k, SHARE);
}

size_t workspace(const usli_exec *, const void *args, usli_pass pass) {
    const usli_route_args *a = static_cast<const usli_route_args *>(args);
    return pass == USLI_FORWARD && a->row ? (size_t)(shares_of(a) * a->experts) * sizeof(int32_t) : 0;
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_route_args *a = static_cast<const usli_route_args *>(args);
    unsigned blocks = (unsigned)usli_ceil_div(a->tokens, WARPS), shares = (unsigned)shares_of(a);
    size_t one = (size_t)a->experts * sizeof(float);
    int32_t *counts = static_cast<int32_t *>(ws);
    if (!a->tokens) return USL_OK;
    if (pass == USLI_BACKWARD) {
        USLI_LAUNCH(blocks, THREADS, 2 * WARPS * one, x, differentiate)(*a);
        return usli_launched(x, "route");
    }
    USLI_LAUNCH(blocks, THREADS, WARPS * one, x, choose)(*a);
    if (a->row) {
        USLI_LAUNCH(shares, USLI_WARP, one, x, walk)(*a, counts, false);
        USLI_LAUNCH(1, SORTERS, 0, x, begin_rows)(*a, counts, shares);
        USLI_LAUNCH(shares, USLI_WARP, one, x, walk)(*a, counts, true);
    }
    USLI_LAUNCH(blocks, THREADS, WARPS * one, x, weigh)(*a);
    if (a->counts)
        USLI_LAUNCH(dim3((unsigned)usli_ceil_div(a->experts, USLI_WARP), (unsigned)a->micros), THREADS, WARPS * one, x,
                    count)
    (*a);
    return usli_launched(x, "route");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_route = { run, workspace };
