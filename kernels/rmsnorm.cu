/* rmsnorm with the residual sum before it. Llama-3-8B, 4096 tokens, bfloat16: forward moves 4 x 33.5 MB (x, res in;
 * sum, y out), backward 4 x 33.5 MB (n, dy, dn in; dn out): 28 us at 4.8 TB/s, 40 us at 3.35. */
#include "kernels/device.cuh"

namespace {

enum { THREADS = 256 };

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
        store_any(a.y, a.dtype, at + i,
                  load_any(n, dtype, at + i) * rstd * (load_any(a.weight, a.weight_dtype, i) + a.weight_offset));
}

__global__ void __launch_bounds__(THREADS) backward_any(usli_rmsnorm_args a) {
    __shared__ float part[32];
    int64_t row = blockIdx.x, at = row * a.cols;
    float rstd = a.rstd[row], mean = 0;
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS)
        mean += load_any(a.dy, a.dtype, at + i) * (load_any(a.weight, a.weight_dtype, i) + a.weight_offset) *
                load_any(a.n, a.n_dtype, at + i);
    float k = rstd * rstd * (block_sum<THREADS>(mean, part) / (float)a.cols);
    for (int64_t i = threadIdx.x; i < a.cols; i += THREADS) {
        float g = load_any(a.dy, a.dtype, at + i) * (load_any(a.weight, a.weight_dtype, i) + a.weight_offset);
        float d = rstd * (g - load_any(a.n, a.n_dtype, at + i) * k);
        if (a.dn_mode == USLI_ACCUMULATE) d += load_any(a.dn, a.res_dtype, at + i);
        store_any(a.dn, a.res_dtype, at + i, d);
    }
}

/* ---- Rows of a multiple of V values, kept in registers: PACKS packs of V a thread ---- */

template <typename T, typename R, int PACKS>
__global__ void __launch_bounds__(THREADS) forward_row(usli_rmsnorm_args a) {
    constexpr int V = 16 / sizeof(T);
    __shared__ float part[32];
    int64_t at = (int64_t)blockIdx.x * a.cols;
    int packs = (int)(a.cols / V);
    const T *x = static_cast<const T *>(a.x);
    const R *res = static_cast<const R *>(a.res);
    float v[PACKS][V], square = 0;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * THREADS + (int)threadIdx.x;
        if (i >= packs) continue;
        if (res) {
            usli_pack<R, V> r = load_wide<R, V>(res + at + (int64_t)i * V);
            for (int k = 0; k < V; k++) v[p][k] = to_f32(r.v[k]);
            if (x) {
                usli_pack<T, V> b = load_pack<T, V>(x + at + (int64_t)i * V);
                for (int k = 0; k < V; k++) {
                    r.v[k] = from_f32<R>(v[p][k] + to_f32(b.v[k]));
                    v[p][k] = to_f32(r.v[k]);
                }
                store_wide<R, V>(static_cast<R *>(a.res_out) + at + (int64_t)i * V, r);
            }
        } else {
            usli_pack<T, V> b = load_pack<T, V>(x + at + (int64_t)i * V);
            for (int k = 0; k < V; k++) v[p][k] = to_f32(b.v[k]);
        }
        for (int k = 0; k < V; k++) square += v[p][k] * v[p][k];
    }
    float rstd = 1.0f / sqrtf(block_sum<THREADS>(square, part) / (float)a.cols + a.eps);
    if (threadIdx.x == 0 && a.rstd) a.rstd[blockIdx.x] = rstd;
    const float *weight = static_cast<const float *>(a.weight);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * THREADS + (int)threadIdx.x;
        if (i >= packs) continue;
        usli_pack<float, V> w = load_wide<float, V>(weight + (int64_t)i * V);
        usli_pack<T, V> y;
        for (int k = 0; k < V; k++) y.v[k] = from_f32<T>(v[p][k] * rstd * (w.v[k] + a.weight_offset));
        store_pack<T, V>(static_cast<T *>(a.y) + at + (int64_t)i * V, y);
    }
}

template <typename T, typename R, int PACKS>
__global__ void __launch_bounds__(THREADS) backward_row(usli_rmsnorm_args a) {
    constexpr int V = 16 / sizeof(T);
    __shared__ float part[32];
    int64_t at = (int64_t)blockIdx.x * a.cols;
    int packs = (int)(a.cols / V);
    const R *n = static_cast<const R *>(a.n);
    const T *dy = static_cast<const T *>(a.dy);
    R *dn = static_cast<R *>(a.dn);
    const float *weight = static_cast<const float *>(a.weight);
    float v[PACKS][V], g[PACKS][V], rstd = a.rstd[blockIdx.x], mean = 0;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * THREADS + (int)threadIdx.x;
        if (i >= packs) continue;
        usli_pack<R, V> r = load_wide<R, V>(n + at + (int64_t)i * V);
        usli_pack<T, V> d = load_pack<T, V>(dy + at + (int64_t)i * V);
        usli_pack<float, V> w = load_wide<float, V>(weight + (int64_t)i * V);
        for (int k = 0; k < V; k++) {
            v[p][k] = to_f32(r.v[k]);
            g[p][k] = to_f32(d.v[k]) * (w.v[k] + a.weight_offset);
            mean += g[p][k] * v[p][k];
        }
    }
    float c = rstd * rstd * (block_sum<THREADS>(mean, part) / (float)a.cols);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * THREADS + (int)threadIdx.x;
        if (i >= packs) continue;
        usli_pack<R, V> out;
        for (int k = 0; k < V; k++) g[p][k] = rstd * (g[p][k] - v[p][k] * c);
        if (a.dn_mode == USLI_ACCUMULATE) {
            out = load_wide<R, V>(dn + at + (int64_t)i * V);
            for (int k = 0; k < V; k++) g[p][k] += to_f32(out.v[k]);
        }
        for (int k = 0; k < V; k++) out.v[k] = from_f32<R>(g[p][k]);
        store_wide<R, V>(dn + at + (int64_t)i * V, out);
    }
}

/* ---- The weight's gradient: sums over SLICE rows, then over the slices in order ---- */

enum { SLICE = 64 };

__global__ void __launch_bounds__(THREADS) weight_slices(usli_rmsnorm_args a, float *sums) {
    int64_t col = (int64_t)blockIdx.x * THREADS + threadIdx.x, first = (int64_t)blockIdx.y * SLICE;
    if (col >= a.cols) return;
    float sum = 0;
    for (int64_t r = first; r < first + SLICE && r < a.rows; r++)
        sum += load_any(a.dy, a.dtype, r * a.cols + col) * load_any(a.n, a.n_dtype, r * a.cols + col) * a.rstd[r];
    sums[(int64_t)blockIdx.y * a.cols + col] = sum;
}

__global__ void __launch_bounds__(THREADS)
    weight_total(float *dweight, const float *sums, int64_t cols, int64_t slices) {
    int64_t col = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (col >= cols) return;
    float sum = 0;
    for (int64_t s = 0; s < slices; s++) sum += sums[s * cols + col];
    dweight[col] += sum;
}

/* Packs a thread for the register path; 0: the shape does not fit it. */
int packs_of(const usli_rmsnorm_args *a) {
    int v = a->dtype == USL_F32 ? 4 : 8;
    const void *all[] = { a->x, a->res, a->res_out, a->weight, a->y, a->n, a->dy, a->dn };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!usli_aligned16(all[i])) return 0;
    bool types = a->weight_dtype == USL_F32 && (a->res_dtype == a->dtype || a->res_dtype == USL_F32) &&
                 (!a->n || a->n_dtype == a->res_dtype);
    if (!types || a->cols % v) return 0;
    int64_t need = usli_ceil_div(a->cols / v, THREADS);
    return need <= 2 ? 2 : need <= 4 ? 4 : need <= 8 ? 8 : 0;
}

template <typename T, typename R> void launch_row(usli_exec *x, const usli_rmsnorm_args *a, bool back, int packs) {
    unsigned rows = (unsigned)a->rows;
    if (packs == 2) {
        if (back)
            USLI_LAUNCH(rows, THREADS, 0, x, backward_row<T, R, 2>)(*a);
        else
            USLI_LAUNCH(rows, THREADS, 0, x, forward_row<T, R, 2>)(*a);
    } else if (packs == 4) {
        if (back)
            USLI_LAUNCH(rows, THREADS, 0, x, backward_row<T, R, 4>)(*a);
        else
            USLI_LAUNCH(rows, THREADS, 0, x, forward_row<T, R, 4>)(*a);
    } else {
        if (back)
            USLI_LAUNCH(rows, THREADS, 0, x, backward_row<T, R, 8>)(*a);
        else
            USLI_LAUNCH(rows, THREADS, 0, x, forward_row<T, R, 8>)(*a);
    }
}

size_t workspace(const usli_exec *, const void *args, usli_pass pass) {
    const usli_rmsnorm_args *a = static_cast<const usli_rmsnorm_args *>(args);
    if (pass == USLI_FORWARD || !a->dweight) return 0;
    return (size_t)(usli_ceil_div(a->rows, SLICE) * a->cols) * sizeof(float);
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_rmsnorm_args *a = static_cast<const usli_rmsnorm_args *>(args);
    bool back = pass == USLI_BACKWARD;
    if (!a->rows) return USL_OK;
    if (back && a->dweight) { /* before dn, which may overwrite dy */
        float *sums = static_cast<float *>(ws);
        unsigned blocks = (unsigned)usli_ceil_div(a->cols, THREADS);
        int64_t slices = usli_ceil_div(a->rows, SLICE);
        USLI_LAUNCH(dim3(blocks, (unsigned)slices), THREADS, 0, x, weight_slices)(*a, sums);
        USLI_LAUNCH(blocks, THREADS, 0, x, weight_total)(a->dweight, sums, a->cols, slices);
    }
    if (back && !a->dn) return usli_launched(x, "rmsnorm");
    int packs = packs_of(a);
    if (packs) {
        USLI_BY_DTYPE(a->dtype, T, {
            if (a->res_dtype == a->dtype)
                launch_row<T, T>(x, a, back, packs);
            else
                launch_row<T, float>(x, a, back, packs);
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
