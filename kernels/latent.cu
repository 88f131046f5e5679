/* latent: keys and values of latent attention put together, and their gradients taken apart. DeepSeek-V2-Lite, 4096
 * tokens of 16 heads, bfloat16: 76 MB, 16 us at 4.8 TB/s. */
#include "kernels/device.cuh"

namespace {

enum { THREADS = 128 };

/* A block a token. */
template <typename T> __global__ void __launch_bounds__(THREADS) join(usli_latent_args a) {
    int64_t t = blockIdx.x;
    int both = a.narrow + a.v_dim, key = a.narrow + a.rotated, own = a.heads * both, all = own + a.heads * a.rotated;
    const T *kv = static_cast<const T *>(a.kv) + t * own,
            *shared = static_cast<const T *>(a.shared) + t * a.shared_stride;
    T *k = static_cast<T *>(a.k) + t * a.heads * key, *v = static_cast<T *>(a.v) + t * a.heads * a.v_dim;
    for (int i = (int)threadIdx.x; i < all; i += THREADS) {
        if (i >= own) {
            int head = (i - own) / a.rotated, c = i - own - head * a.rotated;
            k[head * key + a.narrow + c] = shared[c];
            continue;
        }
        int head = i / both, c = i - head * both;
        if (c < a.narrow)
            k[head * key + c] = kv[i];
        else
            v[head * a.v_dim + c - a.narrow] = kv[i];
    }
}

/* Heads are summed in their order. */
template <typename T> __global__ void __launch_bounds__(THREADS) part(usli_latent_args a) {
    int64_t t = blockIdx.x;
    int both = a.narrow + a.v_dim, key = a.narrow + a.rotated, own = a.heads * both;
    const T *dk = static_cast<const T *>(a.dk) + t * a.heads * key;
    const T *dv = static_cast<const T *>(a.dv) + t * a.heads * a.v_dim;
    T *dkv = static_cast<T *>(a.dkv) + t * own, *dshared = static_cast<T *>(a.dshared) + t * a.shared_stride;
    for (int i = (int)threadIdx.x; i < own; i += THREADS) {
        int head = i / both, c = i - head * both;
        dkv[i] = c < a.narrow ? dk[head * key + c] : dv[head * a.v_dim + c - a.narrow];
    }
    for (int c = (int)threadIdx.x; c < a.rotated; c += THREADS) {
        float sum = 0;
        for (int h = 0; h < a.heads; h++) sum += to_f32(dk[h * key + a.narrow + c]);
        dshared[c] = from_f32<T>(sum);
    }
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *) {
    const usli_latent_args *a = static_cast<const usli_latent_args *>(args);
    if (!a->tokens) return USL_OK;
    USLI_BY_DTYPE(a->dtype, T, {
        if (pass == USLI_FORWARD)
            USLI_LAUNCH((unsigned)a->tokens, THREADS, 0, x, join<T>)(*a);
        else
            USLI_LAUNCH((unsigned)a->tokens, THREADS, 0, x, part<T>)(*a);
    });
    return usli_launched(x, "latent");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_latent = { run, nullptr };
