/* Whole matrices into memory. NF4, a block of Llama-3-8B (218 M values): 112 MB of codes and constants in, 436 MB of
 * bfloat16 out: 114 us at 4.8 TB/s, 164 us at 3.35. */
#include "kernels/decode.cuh"

namespace {

constexpr int THREADS = 256, PIECE = 8 /* values of NF4: 4 bytes of codes */, PIECES = 4 /* a thread */;

/* Rows of a multiple of 8 values. Neighbouring threads take neighbouring pieces, so that a warp reads and writes whole
 * lines; a thread's other pieces lie a block's width further. The table's 16 values lie in 16 banks. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    nf4_rows(const __grid_constant__ usli_nf4 q, T *dst, uint32_t pieces, uint32_t per_row, int64_t ld) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = q.table[threadIdx.x];
    __syncthreads();
    uint32_t first = blockIdx.x * (uint32_t)(THREADS * PIECES) + threadIdx.x;
    usli_pack<uint8_t, PIECE / 2> codes[PIECES] = {};
    float absmax[PIECES] = {};
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        uint32_t i = first + p * THREADS;
        if (i >= pieces) break;
        codes[p] = load_pack<uint8_t, PIECE / 2>(q.codes + (int64_t)i * (PIECE / 2));
        absmax[p] = nf4_absmax(q, i / (USLI_NF4_BLOCK / PIECE));
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        uint32_t i = first + p * THREADS, row = ld == (int64_t)per_row * PIECE ? 0 : i / per_row;
        if (i >= pieces) break;
        usli_pack<T, PIECE> out;
#pragma unroll
        for (int k = 0; k < PIECE; k += 2) {
            int byte = codes[p].v[k / 2];
            store_two<T>(&out.v[k], table[byte >> 4] * absmax[p], table[byte & 15] * absmax[p]);
        }
        store_wide<T, PIECE>(dst + row * ld + (int64_t)(i - row * per_row) * PIECE, out);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) nf4_any(usli_nf4 q, T *dst, int64_t n, int64_t cols, int64_t ld) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    dst[i / cols * ld + i % cols] = from_f32<T>(nf4_value(q, i));
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    i8_any(const int8_t *src, const float *scale, T *dst, int64_t n, int64_t cols, int64_t ld) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    int64_t row = i / cols;
    dst[row * ld + (i - row * cols)] = from_f32<T>((float)src[i] * scale[row]);
}

/* V values a thread, all of one row. */
template <int TYPE, typename T, int V>
__global__ void __launch_bounds__(THREADS)
    rows(const void *src, int64_t src_ld, T *dst, int64_t pieces, int64_t per_row, int64_t ld) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= pieces) return;
    int64_t row = i / per_row, col = (i - row * per_row) * V;
    usli_pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; k++) out.v[k] = from_f32<T>(value_of<TYPE>(src, row * src_ld + col + k));
    store_pack<T, V>(dst + row * ld + col, out);
}

/* 16 values a thread, all of one sub-block. */
template <int TYPE, typename T>
__global__ void __launch_bounds__(THREADS)
    rows16(const void *src, T *dst, int64_t pieces, int64_t per_row, int64_t ld) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= pieces) return;
    int64_t row = i / per_row;
    float v[16];
    values16<TYPE>::get(src, i * 16, v); /* blocks: their rows are packed */
    usli_pack<T, 16> out;
#pragma unroll
    for (int k = 0; k < 16; k += 2) store_two<T>(&out.v[k], v[k], v[k + 1]);
    store_wide<T, 16>(dst + row * ld + (i - row * per_row) * 16, out);
}

template <int TYPE, typename T> void launch(usli_exec *x, const usli_matrix *w, T *dst, int64_t ld) {
    constexpr int V = 16 / sizeof(T);
    int64_t n = w->rows * w->cols, src_ld = w->ld ? w->ld : w->cols;
    bool aligned = ld % V == 0 && usli_aligned16(dst);
    if constexpr (values16<TYPE>::SHARED)
        if (aligned && w->cols % 16 == 0 && usli_aligned16(w->data)) {
            USLI_LAUNCH((unsigned)usli_ceil_div(n / 16, THREADS), THREADS, 0, x, rows16<TYPE, T>)
            (w->data, dst, n / 16, w->cols / 16, ld);
            return;
        }
    if (aligned && w->cols % V == 0)
        USLI_LAUNCH((unsigned)usli_ceil_div(n / V, THREADS), THREADS, 0, x, rows<TYPE, T, V>)
    (w->data, src_ld, dst, n / V, w->cols / V, ld);
    else USLI_LAUNCH((unsigned)usli_ceil_div(n, THREADS), THREADS, 0, x, rows<TYPE, T, 1>)(w->data, src_ld, dst, n,
                                                                                           w->cols, ld);
}

template <typename T> void decode(usli_exec *x, const usli_matrix *w, T *dst, int64_t ld) {
    int64_t n = w->rows * w->cols;
    unsigned blocks = (unsigned)usli_ceil_div(n, THREADS);
    if (w->nf4 && w->cols % PIECE == 0 && ld % 8 == 0 && usli_aligned16(dst) && usli_aligned16(w->nf4->codes) &&
        n / PIECE < UINT32_MAX - THREADS * PIECES) {
        uint32_t pieces = (uint32_t)(n / PIECE);
        USLI_LAUNCH((unsigned)usli_ceil_div(pieces, THREADS * PIECES), THREADS, 0, x, nf4_rows<T>)
        (*w->nf4, dst, pieces, (uint32_t)(w->cols / PIECE), ld);
    } else if (w->nf4) {
        USLI_LAUNCH(blocks, THREADS, 0, x, nf4_any<T>)(*w->nf4, dst, n, w->cols, ld);
    } else if (w->dtype == USL_I8) {
        USLI_LAUNCH(blocks, THREADS, 0, x, i8_any<T>)
        (static_cast<const int8_t *>(w->data), w->scale, dst, n, w->cols, ld);
    } else {
        USLI_BY_TYPE(w->dtype, TYPE, (launch<TYPE, T>(x, w, dst, ld)))
    }
}

} // namespace

usl_status usli_cuda_decode_check(usli_exec *x, const usli_matrix *w, const char *what) {
    if (w->dtype == USL_NF4 || w->dtype == USL_FP4)
        return w->nf4 ? USL_OK : usli_fail(x->ctx, USL_ERR_INTERNAL, "%s: a 4-bit matrix has no constants", what);
    if (w->dtype == USL_I8)
        return w->scale ? USL_OK : usli_fail(x->ctx, USL_ERR_INTERNAL, "%s: int8 without scales", what);
    const usli_traits *t = usli_traits_of(w->dtype);
    if (!t || !t->decode)
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED,
                         "%s: weights of type %s cannot be read here; use f32, bf16, f16, nf4 or a GGUF type", what,
                         usl_dtype_name(w->dtype));
    bool known = false;
    USLI_BY_TYPE(w->dtype, TYPE, (known = TYPE == w->dtype))
    if (!known)
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED,
                         "%s: weights of type %s are decoded on the CPU alone; use device = \"cpu\", or a file of "
                         "another type",
                         what, usl_dtype_name(w->dtype));
    if (w->cols % t->block != 0)
        return usli_fail(x->ctx, USL_ERR_SHAPE, "%s: rows of %lld values do not fill blocks of %d (%s)", what,
                         (long long)w->cols, t->block, usl_dtype_name(w->dtype));
    return USL_OK;
}

usl_status usli_cuda_decode(usli_exec *x, const usli_matrix *w, usl_dtype dtype, void *dst, int64_t ld) {
    USLI_TRY(usli_cuda_decode_check(x, w, "decode"));
    if (!w->rows || !w->cols) return USL_OK;
    USLI_BY_DTYPE(dtype, T, decode<T>(x, w, static_cast<T *>(dst), ld));
    return usli_launched(x, "decode");
}
