/* embedding: rows of a table of any type. Llama-3-8B, 4096 tokens: 67 MB, 14 us at 4.8 TB/s. */
#include "kernels/decode.cuh"

namespace {

constexpr int THREADS = 256, COLUMNS = 4; /* of a thread, backward */

/* What an adapter adds to value c of a row of the table. */
struct beside {
    int rank;
    int64_t rows;
    float scale;
    const float *a, *b;
    __device__ __forceinline__ float operator()(int64_t row, int64_t c) const {
        float low = 0;
        for (int r = 0; r < rank; r++) low += b[c * rank + r] * a[r * rows + row];
        return scale * low;
    }
};

template <int TYPE, typename T>
__global__ void __launch_bounds__(THREADS)
    look_up(const void *table, const int32_t *ids, T *y, int64_t cols, float scale, beside adapter) {
    int64_t row = ids[blockIdx.x], from = row * cols, to = (int64_t)blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS)
        y[to + i] = from_f32<T>(scale * (value_of<TYPE>(table, from + i) + adapter(row, i)));
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    look_up_nf4(usli_nf4 q, const int32_t *ids, T *y, int64_t cols, float scale, beside adapter) {
    int64_t row = ids[blockIdx.x], from = row * cols, to = (int64_t)blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS)
        y[to + i] = from_f32<T>(scale * (nf4_value(q, from + i) + adapter(row, i)));
}

template <typename T>
__global__ void __launch_bounds__(THREADS) look_up_i8(const int8_t *table, const float *scales, const int32_t *ids,
                                                      T *y, int64_t cols, float scale, beside adapter) {
    int64_t row = ids[blockIdx.x], to = (int64_t)blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS)
        y[to + i] = from_f32<T>(scale * ((float)table[row * cols + i] * scales[row] + adapter(row, i)));
}

/* A block per token, and 1024 columns: the first token of its id adds what all tokens of that id bring, in their order;
 * the others have nothing to do. 4096 tokens of Llama-3-8B: 34 MB of dy, 134 MB of dtable at most: 35 us at 4.8 TB/s;
 * each block also reads the ids, 67 MB from L2 in all. */
template <typename T>
__global__ void __launch_bounds__(THREADS) add_rows(const __grid_constant__ usli_embedding_args a) {
    __shared__ uint32_t votes[THREADS / USLI_WARP];
    int64_t token = blockIdx.x;
    int32_t id = a.ids[token];
    for (int64_t t = threadIdx.x; t < (token + THREADS - 1) / THREADS * THREADS; t += THREADS)
        if (__syncthreads_or(t < token && a.ids[t] == id)) return;
    int64_t col[COLUMNS];
    float sum[COLUMNS];
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) {
        col[k] = ((int64_t)blockIdx.y * COLUMNS + k) * THREADS + threadIdx.x;
        sum[k] = col[k] < a.cols ? a.dtable[(int64_t)id * a.cols + col[k]] : 0.0f;
    }
    for (int64_t first = token; first < a.tokens; first += THREADS) {
        int64_t t = first + threadIdx.x;
        bool same = t < a.tokens && a.ids[t] == id;
        uint32_t vote = __ballot_sync(0xffffffffu, same);
        __syncthreads();
        if (threadIdx.x % USLI_WARP == 0) votes[threadIdx.x / USLI_WARP] = vote;
        if (!__syncthreads_or(same)) continue;
        for (int w = 0; w < THREADS / USLI_WARP; w++)
            for (uint32_t left = votes[w]; left; left &= left - 1) {
                int64_t from = (first + w * USLI_WARP + __ffs((int)left) - 1) * a.lddy;
#pragma unroll
                for (int k = 0; k < COLUMNS; k++)
                    if (col[k] < a.cols) sum[k] += a.scale * to_f32(static_cast<const T *>(a.dy)[from + col[k]]);
            }
    }
#pragma unroll
    for (int k = 0; k < COLUMNS; k++)
        if (col[k] < a.cols) a.dtable[(int64_t)id * a.cols + col[k]] = sum[k];
}

/* ---- The adapter's gradients: p = dy B and A[:, ids] are (tokens, rank) in the workspace ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS)
    make_p(const __grid_constant__ usli_embedding_args a, float *p, float *picked) {
    __shared__ float part[USLI_WARP];
    int64_t t = blockIdx.x;
    const T *dy = static_cast<const T *>(a.dy) + t * a.lddy;
    for (int r = 0; r < a.lora.rank; r++) {
        float sum = 0;
        for (int64_t c = threadIdx.x; c < a.cols; c += THREADS) sum += to_f32(dy[c]) * a.lora.b[c * a.lora.rank + r];
        sum = block_sum<THREADS>(sum, part);
        if (threadIdx.x) continue;
        p[t * a.lora.rank + r] = a.scale * a.lora.scale * sum;
        picked[t * a.lora.rank + r] = a.lora.a[r * a.table.rows + a.ids[t]];
    }
}

/* A thread per token and rank: the first token of its id adds what all tokens of that id bring, in their order. */
__global__ void __launch_bounds__(THREADS) add_a(const __grid_constant__ usli_embedding_args a, const float *p) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.tokens * a.lora.rank) return;
    int64_t first = i / a.lora.rank;
    int r = (int)(i - first * a.lora.rank);
    int32_t id = a.ids[first];
    for (int64_t t = 0; t < first; t++)
        if (a.ids[t] == id) return;
    float sum = a.lora.da[r * a.table.rows + id];
    for (int64_t t = first; t < a.tokens; t++)
        if (a.ids[t] == id) sum += p[t * a.lora.rank + r];
    a.lora.da[r * a.table.rows + id] = sum;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) add_b(const __grid_constant__ usli_embedding_args a, const float *picked) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.cols * a.lora.rank) return;
    int64_t c = i / a.lora.rank;
    int r = (int)(i - c * a.lora.rank);
    float sum = 0;
    for (int64_t t = 0; t < a.tokens; t++)
        sum += to_f32(static_cast<const T *>(a.dy)[t * a.lddy + c]) * picked[t * a.lora.rank + r];
    a.lora.db[i] += a.scale * a.lora.scale * sum;
}

template <typename T> void adapter_backward(usli_exec *x, const usli_embedding_args *a, float *p) {
    float *picked = p + a->tokens * a->lora.rank;
    USLI_LAUNCH((unsigned)a->tokens, THREADS, 0, x, make_p<T>)(*a, p, picked);
    if (a->lora.da) USLI_LAUNCH((unsigned)usli_ceil_div(a->tokens * a->lora.rank, THREADS), THREADS, 0, x, add_a)
    (*a, p);
    if (a->lora.db) USLI_LAUNCH((unsigned)usli_ceil_div(a->cols * a->lora.rank, THREADS), THREADS, 0, x, add_b<T>)
    (*a, picked);
}

template <typename T> void forward(usli_exec *x, const usli_embedding_args *a) {
    const usli_matrix *w = &a->table;
    beside adapter = { a->lora.rank, w->rows, a->lora.scale, a->lora.a, a->lora.b };
    unsigned tokens = (unsigned)a->tokens;
    T *y = static_cast<T *>(a->y);
    if (w->nf4) {
        USLI_LAUNCH(tokens, THREADS, 0, x, look_up_nf4<T>)(*w->nf4, a->ids, y, a->cols, a->scale, adapter);
    } else if (w->dtype == USL_I8) {
        USLI_LAUNCH(tokens, THREADS, 0, x, look_up_i8<T>)
        (static_cast<const int8_t *>(w->data), w->scale, a->ids, y, a->cols, a->scale, adapter);
    } else {
        USLI_BY_TYPE(
            w->dtype, TYPE,
            (USLI_LAUNCH(tokens, THREADS, 0, x, look_up<TYPE, T>)(w->data, a->ids, y, a->cols, a->scale, adapter)))
    }
}

size_t workspace(const usli_exec *, const void *args, usli_pass pass) {
    const usli_embedding_args *a = static_cast<const usli_embedding_args *>(args);
    return pass == USLI_BACKWARD ? 2 * (size_t)(a->tokens * a->lora.rank) * sizeof(float) : 0;
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    usli_embedding_args whole = *static_cast<const usli_embedding_args *>(args), *a = &whole;
    if (!a->tokens) return USL_OK;
    if (!a->lddy) a->lddy = a->cols;
    if (pass == USLI_FORWARD) {
        USLI_TRY(usli_cuda_decode_check(x, &a->table, "embedding"));
        USLI_BY_DTYPE(a->dtype, T, forward<T>(x, a));
    } else {
        dim3 grid((unsigned)a->tokens, (unsigned)usli_ceil_div(a->cols, THREADS * COLUMNS));
        if (a->dtable) USLI_BY_DTYPE(a->dtype, T, USLI_LAUNCH(grid, THREADS, 0, x, add_rows<T>)(*a));
        if (a->lora.da || a->lora.db) USLI_BY_DTYPE(a->dtype, T, adapter_backward<T>(x, a, static_cast<float *>(ws)));
    }
    return usli_launched(x, "embedding");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_embedding = { run, workspace };
