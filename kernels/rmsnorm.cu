/* rmsnorm with the residual sum before it. Llama-3-8B, 4096 tokens, bfloat16: forward moves 4 x 33.5 MB (x, res in;
 * sum, y out), backward 4 x 33.5 MB (n, dy, dn in; dn out): 28 us at 4.8 TB/s, 40 us at 3.35. */
#include "kernels/device.cuh"

namespace {

enum { THREADS = 256, MOST_PACKS = 2048 };

/* ---- Any shape: one value at a time, rows read again for each step ---- */

__global__ void __launch_bounds__(THREADS) forward_any(usli_rmsnorm_args a) {
    __shared__ float part[32];
    int64_t row = blockIdx.x, at = row * a.cols;
    const void *n = a.res ? a.res : a.x;
    usl_dtype dtype = a.res ? a.res_dtype : a.dtype;
    bool both = a.res && a.x;
    float square = 0;
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS) {
        float v = load_any(n, dtype, at + i);
        if (both) {
            store_any(a.res_out, dtype, at + i, v + load_any(a.x, a.dtype, at + i));
            v = load_any(a.res_out, dtype, at + i); /* the norm sees what was stored */
        }
        square += v * v;
    }
    float rstd = 1.0f / sqrtf(block_sum<THREADS>(square, part) / (float)a.cols + a.eps);
    if (threadIdx.x == 0 && a.rstd) a.rstd[row] = rstd;
    if (both) n = a.res_out;
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS)
        store_any(a.y, a.dtype, row * a.ldy + i,
                  load_any(n, dtype, at + i) * rstd * (load_any(a.weight, a.weight_dtype, i) + a.weight_offset));
}

__global__ void __launch_bounds__(THREADS) backward_any(usli_rmsnorm_args a) {
    __shared__ float part[32];
    int64_t row = blockIdx.x, at = row * a.cols;
    float rstd = a.rstd[row], mean = 0;
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS)
        mean += load_any(a.dy, a.dtype, row * a.lddy + i) * (load_any(a.weight, a.weight_dtype, i) + a.weight_offset) *
                load_any(a.n, a.n_dtype, at + i);
    float k = rstd * rstd * (block_sum<THREADS>(mean, part) / (float)a.cols);
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS) {
        float g = load_any(a.dy, a.dtype, row * a.lddy + i) * (load_any(a.weight, a.weight_dtype, i) + a.weight_offset);
        float d = rstd * (g - load_any(a.n, a.n_dtype, at + i) * k);
        if (a.dn_mode == USLI_ACCUMULATE) d += load_any(a.dn, a.res_dtype, row * a.lddn + i);
        store_any(a.dn, a.res_dtype, row * a.lddn + i, d);
    }
}

/* ---- Rows of a multiple of V values, kept in registers: PACKS packs of V a thread of N. Blocks take every so many
 * rows, so that the weight is read once; all of a row is on its way before any of it is used. ---- */

template <typename T, typename R, int PACKS, int N>
__global__ void __launch_bounds__(N, 1024 / N) forward_row(usli_rmsnorm_args a) {
    constexpr int V = 16 / sizeof(T);
    __shared__ float part[32];
    int packs = (int)(a.cols / V);
    const T *x = static_cast<const T *>(a.x);
    const R *res = static_cast<const R *>(a.res);
    usli_pack<float, V> w[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * N + (int)threadIdx.x;
        if (i < packs) w[p] = load_wide<float, V>(static_cast<const float *>(a.weight) + i * V);
    }
    await_earlier();
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        int64_t at = row * a.cols;
        usli_pack<R, V> r[PACKS];
        usli_pack<T, V> b[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            int i = p * N + (int)threadIdx.x;
            if (res && i < packs) r[p] = load_wide<R, V>(res + at + i * V);
            if (x && i < packs) b[p] = load_pack<T, V>(x + at + i * V);
        }
        float v[PACKS][V], square = 0;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            int i = p * N + (int)threadIdx.x;
            if (i >= packs) continue;
            if (res && x) { /* the norm sees what is stored */
                for (int k = 0; k < V; k++) r[p].v[k] = from_f32<R>(to_f32(r[p].v[k]) + to_f32(b[p].v[k]));
                store_wide<R, V>(static_cast<R *>(a.res_out) + at + i * V, r[p]);
            }
            for (int k = 0; k < V; k++) {
                v[p][k] = res ? to_f32(r[p].v[k]) : to_f32(b[p].v[k]);
                square += v[p][k] * v[p][k];
            }
        }
        float rstd = 1.0f / sqrtf(block_sum<N>(square, part) / (float)a.cols + a.eps);
        if (threadIdx.x == 0 && a.rstd) a.rstd[row] = rstd;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            int i = p * N + (int)threadIdx.x;
            if (i >= packs) continue;
            usli_pack<T, V> y;
            for (int k = 0; k < V; k++) y.v[k] = from_f32<T>(v[p][k] * rstd * (w[p].v[k] + a.weight_offset));
            store_pack<T, V>(static_cast<T *>(a.y) + row * a.ldy + i * V, y);
        }
    }
}

template <typename T, typename R, int PACKS, int N>
__global__ void __launch_bounds__(N, 1024 / N) backward_row(usli_rmsnorm_args a) {
    constexpr int V = 16 / sizeof(T);
    __shared__ float part[32];
    int packs = (int)(a.cols / V);
    bool add = a.dn_mode == USLI_ACCUMULATE;
    usli_pack<float, V> w[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * N + (int)threadIdx.x;
        if (i < packs) w[p] = load_wide<float, V>(static_cast<const float *>(a.weight) + i * V);
    }
    await_earlier();
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        int64_t at = row * a.cols;
        const T *dy_row = static_cast<const T *>(a.dy) + row * a.lddy;
        R *dn = static_cast<R *>(a.dn) + row * a.lddn;
        usli_pack<R, V> n[PACKS], before[PACKS];
        usli_pack<T, V> dy[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            int i = p * N + (int)threadIdx.x;
            if (i >= packs) continue;
            n[p] = load_wide<R, V>(static_cast<const R *>(a.n) + at + i * V);
            dy[p] = load_pack<T, V>(dy_row + i * V);
            if (add) before[p] = load_wide<R, V>(dn + i * V);
        }
        float rstd = a.rstd[row], mean = 0;
#pragma unroll
        for (int p = 0; p < PACKS; p++)
            if (p * N + (int)threadIdx.x < packs)
                for (int k = 0; k < V; k++)
                    mean += to_f32(dy[p].v[k]) * (w[p].v[k] + a.weight_offset) * to_f32(n[p].v[k]);
        float c = rstd * rstd * (block_sum<N>(mean, part) / (float)a.cols);
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            int i = p * N + (int)threadIdx.x;
            if (i >= packs) continue;
            for (int k = 0; k < V; k++) {
                float d = rstd * (to_f32(dy[p].v[k]) * (w[p].v[k] + a.weight_offset) - to_f32(n[p].v[k]) * c);
                n[p].v[k] = from_f32<R>(add ? d + to_f32(before[p].v[k]) : d);
            }
            store_wide<R, V>(dn + i * V, n[p]);
        }
    }
}

/* ---- The weight's gradient: sums over SLICE rows, then over the slices in order ---- */

enum { SLICE = 32 };

__global__ void __launch_bounds__(THREADS) slices_any(usli_rmsnorm_args a, float *sums) {
    int64_t col = (int64_t)blockIdx.x * THREADS + threadIdx.x, first = (int64_t)blockIdx.y * SLICE;
    if (col >= a.cols) return;
    float sum = 0;
    for (int64_t r = first; r < first + SLICE && r < a.rows; r++)
        sum += load_any(a.dy, a.dtype, r * a.lddy + col) * load_any(a.n, a.n_dtype, r * a.cols + col) * a.rstd[r];
    sums[(int64_t)blockIdx.y * a.cols + col] = sum;
}

template <typename T, typename R> __global__ void __launch_bounds__(THREADS) slices(usli_rmsnorm_args a, float *sums) {
    constexpr int V = 16 / sizeof(T);
    int64_t col = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V, first = (int64_t)blockIdx.y * SLICE;
    int64_t end = first + SLICE < a.rows ? first + SLICE : a.rows;
    if (col >= a.cols) return;
    usli_pack<float, V> sum = {};
#pragma unroll 4
    for (int64_t r = first; r < end; r++) {
        usli_pack<T, V> dy = load_pack<T, V>(static_cast<const T *>(a.dy) + r * a.lddy + col);
        usli_pack<R, V> n = load_wide<R, V>(static_cast<const R *>(a.n) + r * a.cols + col);
        float rstd = a.rstd[r];
        for (int k = 0; k < V; k++) sum.v[k] += to_f32(dy.v[k]) * to_f32(n.v[k]) * rstd;
    }
    store_wide<float, V>(sums + (int64_t)blockIdx.y * a.cols + col, sum);
}

__global__ void __launch_bounds__(THREADS)
    slices_total(float *dweight, const float *sums, int64_t cols, int64_t count) {
    int64_t col = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (col >= cols) return;
    float sum = 0;
#pragma unroll 16
    for (int64_t s = 0; s < count; s++) sum += sums[s * cols + col];
    dweight[col] += sum;
}

/* Packs of a row for the register path; 0: the shape does not fit it. */
int packs_of(const usli_rmsnorm_args *a) {
    int v = a->dtype == USL_F32 ? 4 : 8;
    const void *all[] = { a->x, a->res, a->res_out, a->weight, a->y, a->n, a->dy, a->dn };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!usli_aligned16(all[i])) return 0;
    bool types = a->weight_dtype == USL_F32 && (a->res_dtype == a->dtype || a->res_dtype == USL_F32) &&
                 (!a->n || a->n_dtype == a->res_dtype);
    if (!types || a->cols % v || a->ldy % v || a->lddy % v || a->lddn % v) return 0;
    return a->cols / v <= MOST_PACKS ? (int)(a->cols / v) : 0;
}

template <typename T, typename R, int PACKS, int N>
void launch_row(usli_exec *x, const usli_rmsnorm_args *a, bool back) {
    int64_t most = 2048 / N * (int64_t)usli_cuda_of(x)->multiprocessors;
    unsigned blocks = (unsigned)(a->rows < most ? a->rows : most);
    if (back)
        USLI_LAUNCH_EARLY(blocks, N, 0, x, backward_row<T, R, PACKS, N>)(*a);
    else
        USLI_LAUNCH_EARLY(blocks, N, 0, x, forward_row<T, R, PACKS, N>)(*a);
}

template <typename T, typename R> void launch_rows(usli_exec *x, const usli_rmsnorm_args *a, bool back, int packs) {
    if (packs <= 256)
        launch_row<T, R, 1, 256>(x, a, back);
    else if (packs <= 512)
        launch_row<T, R, 1, 512>(x, a, back);
    else if (packs <= 1024)
        launch_row<T, R, 1, 1024>(x, a, back);
    else
        launch_row<T, R, 2, 1024>(x, a, back);
}

/* sums over slices of rows: before dn, which may overwrite dy. */
template <typename T, typename R> void launch_slices(usli_exec *x, const usli_rmsnorm_args *a, float *sums) {
    unsigned blocks = (unsigned)usli_ceil_div(a->cols, THREADS * (16 / sizeof(T)));
    USLI_LAUNCH(dim3(blocks, (unsigned)usli_ceil_div(a->rows, SLICE)), THREADS, 0, x, slices<T, R>)(*a, sums);
}

size_t workspace(const usli_exec *, const void *args, usli_pass pass) {
    const usli_rmsnorm_args *a = static_cast<const usli_rmsnorm_args *>(args);
    if (pass == USLI_FORWARD || !a->dweight) return 0;
    return (size_t)(usli_ceil_div(a->rows, SLICE) * a->cols) * sizeof(float);
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    usli_rmsnorm_args whole = *static_cast<const usli_rmsnorm_args *>(args), *a = &whole;
    for (int64_t *ld : { &whole.ldy, &whole.lddy, &whole.lddn })
        if (!*ld) *ld = whole.cols;
    bool back = pass == USLI_BACKWARD;
    int packs = packs_of(a);
    if (!a->rows) return USL_OK;
    if (back && a->dweight) {
        float *sums = static_cast<float *>(ws);
        unsigned blocks = (unsigned)usli_ceil_div(a->cols, THREADS);
        int64_t count = usli_ceil_div(a->rows, SLICE);
        if (packs) {
            USLI_BY_DTYPE(a->dtype, T, {
                if (a->n_dtype == a->dtype)
                    launch_slices<T, T>(x, a, sums);
                else
                    launch_slices<T, float>(x, a, sums);
            });
        } else {
            USLI_LAUNCH(dim3(blocks, (unsigned)count), THREADS, 0, x, slices_any)(*a, sums);
        }
        USLI_LAUNCH(blocks, THREADS, 0, x, slices_total)(a->dweight, sums, a->cols, count);
    }
    if (back && !a->dn) return usli_launched(x, "rmsnorm");
    if (packs) {
        USLI_BY_DTYPE(a->dtype, T, {
            if (a->res_dtype == a->dtype)
                launch_rows<T, T>(x, a, back, packs);
            else
                launch_rows<T, float>(x, a, back, packs);
        });
    } else if (back) {
        USLI_LAUNCH((unsigned)a->rows, THREADS, 0, x, backward_any)(*a);
    } else {
        USLI_LAUNCH((unsigned)a->rows, THREADS, 0, x, forward_any)(*a);
    }
    return usli_launched(x, "rmsnorm");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_rmsnorm = { run, workspace };
