/* embedding: rows of a table of any type. Llama-3-8B, 4096 tokens: 67 MB, 14 us at 4.8 TB/s. */
#include "kernels/decode.cuh"

namespace {

constexpr int THREADS = 256, COLUMNS = 64;

template <int TYPE, typename T>
__global__ void __launch_bounds__(THREADS)
    look_up(const void *table, const int32_t *ids, T *y, int64_t cols, float scale) {
    int64_t from = (int64_t)ids[blockIdx.x] * cols, to = (int64_t)blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS)
        y[to + i] = from_f32<T>(scale * value_of<TYPE>(table, from + i));
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    look_up_nf4(usli_nf4 q, const int32_t *ids, T *y, int64_t cols, float scale) {
    int64_t from = (int64_t)ids[blockIdx.x] * cols, to = (int64_t)blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS) y[to + i] = from_f32<T>(scale * nf4_value(q, from + i));
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    look_up_i8(const int8_t *table, const float *scales, const int32_t *ids, T *y, int64_t cols, float scale) {
    int64_t row = ids[blockIdx.x], to = (int64_t)blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS)
        y[to + i] = from_f32<T>(scale * ((float)table[row * cols + i] * scales[row]));
}

/* A thread owns a column and walks all tokens in order: one id may occur many times. */
template <typename T> __global__ void __launch_bounds__(COLUMNS) add_columns(usli_embedding_args a) {
    int64_t col = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
    if (col >= a.cols) return;
    for (int64_t t = 0; t < a.tokens; t++)
        a.dtable[(int64_t)a.ids[t] * a.cols + col] += a.scale * to_f32(static_cast<const T *>(a.dy)[t * a.cols + col]);
}

template <typename T> void forward(usli_exec *x, const usli_embedding_args *a) {
    const usli_matrix *w = &a->table;
    unsigned tokens = (unsigned)a->tokens;
    T *y = static_cast<T *>(a->y);
    if (w->nf4) {
        USLI_LAUNCH(tokens, THREADS, 0, x, look_up_nf4<T>)(*w->nf4, a->ids, y, a->cols, a->scale);
    } else if (w->dtype == USL_I8) {
        USLI_LAUNCH(tokens, THREADS, 0, x, look_up_i8<T>)
        (static_cast<const int8_t *>(w->data), w->scale, a->ids, y, a->cols, a->scale);
    } else {
        USLI_BY_TYPE(w->dtype, TYPE,
                     (USLI_LAUNCH(tokens, THREADS, 0, x, look_up<TYPE, T>)(w->data, a->ids, y, a->cols, a->scale)))
    }
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *) {
    const usli_embedding_args *a = static_cast<const usli_embedding_args *>(args);
    if (!a->tokens) return USL_OK;
    if (pass == USLI_FORWARD) {
        USLI_TRY(usli_cuda_decode_check(x, &a->table, "embedding"));
        USLI_BY_DTYPE(a->dtype, T, forward<T>(x, a));
    } else {
        USLI_BY_DTYPE(a->dtype, T,
                      USLI_LAUNCH((unsigned)usli_ceil_div(a->cols, COLUMNS), COLUMNS, 0, x, add_columns<T>)(*a));
    }
    return usli_launched(x, "embedding");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_embedding = { run, nullptr };
