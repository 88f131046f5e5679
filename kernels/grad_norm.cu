/* grad_norm over all parameters in one launch: squares of a chunk in double, chunks added in order by one block.
 * Llama-3-8B, r = 16 on seven modules: 168 MB read, 35 us at 4.8 TB/s. */
#include "kernels/params.cuh"

namespace {

enum { THREADS = 256 };

__device__ double sum_of_block(double v, double *room) {
    room[threadIdx.x] = v;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
        __syncthreads();
    }
    return room[0];
}

__global__ void __launch_bounds__(THREADS) chunk_squares(const usli_listed *list, int64_t count, double *sums) {
    __shared__ double room[THREADS];
    const usli_listed &item = usli_find_param(list, count, blockIdx.x);
    int64_t at = ((int64_t)blockIdx.x - item.first) * USLI_PARAM_CHUNK;
    int64_t n = item.p.n - at < USLI_PARAM_CHUNK ? item.p.n - at : USLI_PARAM_CHUNK;
    const float *g = item.p.g + at;
    double sum = 0;
    if (reinterpret_cast<uintptr_t>(g) % 16 == 0 && n == USLI_PARAM_CHUNK) {
#pragma unroll
        for (int i = 0; i < USLI_PARAM_CHUNK / 4 / THREADS; i++) {
            usli_pack<float, 4> p = load_pack<float, 4>(g + 4 * (i * THREADS + (int)threadIdx.x));
            for (int k = 0; k < 4; k++) sum += (double)p.v[k] * (double)p.v[k];
        }
    } else {
        for (int64_t i = threadIdx.x; i < n; i += THREADS) sum += (double)g[i] * (double)g[i];
    }
    sum = sum_of_block(sum, room);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) finish(const double *sums, int64_t chunks, usli_update *u) {
    __shared__ double room[THREADS];
    double sum = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < chunks; i += THREADS) sum += sums[i];
    sum = sum_of_block(sum, room);
    if (threadIdx.x) return;
    double norm = sqrt(sum) / (double)u->loss_scale;
    u->grad_norm = (float)norm;
    u->finite = isfinite(sum) && isfinite(u->loss_sum); /* a loss may overflow where its gradient does not */
    double clip = u->max_norm > 0 ? (double)u->max_norm / (norm + 1e-6) : 1;
    u->clip = (float)((clip < 1 ? clip : 1) / (double)u->loss_scale);
}

size_t list_bytes(int64_t count) {
    return ((size_t)count * sizeof(usli_listed) + 63) & ~(size_t)63;
}

size_t workspace(const usli_exec *, const void *args, usli_pass) {
    const usli_grad_norm_args *a = static_cast<const usli_grad_norm_args *>(args);
    return list_bytes(a->count) + (size_t)usli_param_chunks(a->params, a->count) * sizeof(double) + 64;
}

usl_status run(usli_exec *x, void *args, usli_pass, void *ws) {
    const usli_grad_norm_args *a = static_cast<const usli_grad_norm_args *>(args);
    usli_listed *list = static_cast<usli_listed *>(ws);
    double *sums = reinterpret_cast<double *>(static_cast<char *>(ws) + list_bytes(a->count));
    int64_t chunks = usli_param_chunks(a->params, a->count);
    usli_send_params(x, a->params, a->count, list);
    if (chunks) USLI_LAUNCH((unsigned)chunks, THREADS, 0, x, chunk_squares)(list, a->count, sums);
    USLI_LAUNCH(1, THREADS, 0, x, finish)(sums, chunks, a->update);
    return usli_launched(x, "grad_norm");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_grad_norm = { run, workspace };
