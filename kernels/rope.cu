/* rope with optional q and k norm, in place: a warp a head. Llama-3-8B, 4096 tokens, bfloat16: 40 heads of 128 in and
 * out, 84 MB: 17 us at 4.8 TB/s. */
#include "kernels/device.cuh"

namespace {

enum { WARPS = 8, THREADS = WARPS * USLI_WARP, MOST = 512, SLICE = 64 };

/* q or k, as one of the two sides of the op. */
struct side {
    void *x; /* or its gradient */
    int64_t stride;
    int heads;
    const void *norm, *in;
    float *rstd, *dnorm;
};

__device__ __forceinline__ int64_t head_stride(const usli_rope_args &a) {
    return a.head_stride ? a.head_stride : a.head_dim;
}

__device__ __forceinline__ float norm_weight(const usli_rope_args &a, const side &s, int i) {
    return load_any(s.norm, a.norm_dtype, i) + a.norm_offset;
}

/* Places of the pair's two values in a head. */
__device__ __forceinline__ void places(const usli_rope_args &a, int pair, int *first, int *second) {
    *first = a.interleaved ? 2 * pair : pair;
    *second = a.interleaved ? 2 * pair + 1 : pair + a.rot_dim / 2;
}

/* Lane i owns pairs i, i + 32, ... of the rotated values, then the values behind them two by two. */
template <typename T, bool BACK>
__device__ void turn_head(const usli_rope_args &a, const side &s, int64_t token, int head) {
    int lane = (int)threadIdx.x % USLI_WARP, half = a.rot_dim / 2, d = a.head_dim,
        pairs = half + (d - a.rot_dim + 1) / 2;
    int64_t at = token * s.stride + head * head_stride(a);
    T *x = static_cast<T *>(s.x) + at;
    const T *in = s.norm && BACK ? static_cast<const T *>(s.in) + at : nullptr;
    const float *cosine = a.cos + (int64_t)a.position[token] * half, *sine = a.sin + (int64_t)a.position[token] * half;
    float square = 0, mean = 0, r = 1;
    if (s.norm && !BACK) {
        for (int i = lane; i < d; i += USLI_WARP) square += to_f32(x[i]) * to_f32(x[i]);
        r = 1.0f / sqrtf(warp_sum(square) / (float)d + a.norm_eps);
        if (lane == 0 && s.rstd) s.rstd[token * s.heads + head] = r;
    }
    for (int step = 0; step < (s.norm && BACK ? 2 : 1); step++) {
        /* The norm's gradient wants a sum over the turned-back head first. */
        bool last = !(s.norm && BACK) || step == 1;
        float k = 0;
        if (s.norm && BACK) {
            r = s.rstd[token * s.heads + head];
            if (last) k = r * r * (warp_sum(mean) / (float)d);
        }
        for (int p = lane; p < pairs; p += USLI_WARP) {
            int i, j;
            bool turned = p < half;
            if (turned) {
                places(a, p, &i, &j);
            } else {
                i = a.rot_dim + 2 * (p - half);
                j = i + 1;
            }
            bool two = j < d;
            float u = to_f32(x[i]), w = two ? to_f32(x[j]) : 0;
            if (s.norm && !BACK) {
                u = u * r * norm_weight(a, s, i);
                if (two) w = w * r * norm_weight(a, s, j);
            }
            if (turned) {
                float c = cosine[p], sn = BACK ? -sine[p] : sine[p], t = u * c - w * sn;
                w = w * c + u * sn;
                u = t;
            }
            if (s.norm && BACK) {
                float gu = u * norm_weight(a, s, i), nu = to_f32(in[i]), gw = 0, nw = 0;
                if (two) {
                    gw = w * norm_weight(a, s, j);
                    nw = to_f32(in[j]);
                }
                if (!last) {
                    mean += gu * nu + gw * nw;
                    continue;
                }
                u = r * (gu - nu * k);
                w = r * (gw - nw * k);
            }
            x[i] = from_f32<T>(u);
            if (two) x[j] = from_f32<T>(w);
        }
    }
}

template <typename T, bool BACK> __global__ void __launch_bounds__(THREADS) turn(usli_rope_args a, side q, side k) {
    int64_t all = a.tokens * (q.heads + k.heads);
    int64_t i = (int64_t)blockIdx.x * WARPS + threadIdx.x / USLI_WARP;
    if (i >= all) return;
    int64_t token = i / (q.heads + k.heads);
    int head = (int)(i - token * (q.heads + k.heads));
    if (head < q.heads)
        turn_head<T, BACK>(a, q, token, head);
    else
        turn_head<T, BACK>(a, k, token, head - q.heads);
}

/* Without a norm and with whole packs: V pairs (i, i + half) a thread, a block a token. */
template <typename T, int V>
__global__ void __launch_bounds__(MOST) turn_packs(usli_rope_args a, T *q, T *k, float sign) {
    await_earlier();
    unsigned half = (unsigned)a.rot_dim / 2, per_head = half / V, heads = (unsigned)(a.heads + (k ? a.kv_heads : 0));
    int64_t token = blockIdx.x, angles = (int64_t)a.position[token] * half;
    for (unsigned i = threadIdx.x; i < heads * per_head; i += blockDim.x) {
        unsigned head = i / per_head, c = (i - head * per_head) * V;
        T *x = (int)head < a.heads ? q + token * a.q_stride + head * head_stride(a)
                                   : k + token * a.k_stride + ((int)head - a.heads) * head_stride(a);
        usli_pack<T, V> u = load_pack<T, V>(x + c), w = load_pack<T, V>(x + half + c);
        usli_pack<float, V> cosine = load_wide<float, V>(a.cos + angles + c);
        usli_pack<float, V> sine = load_wide<float, V>(a.sin + angles + c);
#pragma unroll
        for (int p = 0; p < V; p++) {
            float uv = to_f32(u.v[p]), wv = to_f32(w.v[p]), s = sign * sine.v[p];
            u.v[p] = from_f32<T>(uv * cosine.v[p] - wv * s);
            w.v[p] = from_f32<T>(wv * cosine.v[p] + uv * s);
        }
        store_pack<T, V>(x + c, u);
        store_pack<T, V>(x + half + c, w);
    }
}

/* dnorm[i] = sum over tokens and heads of g_i * n_i * rstd, with g the head's gradient turned back: before it is
 * overwritten. A block takes SLICE tokens and writes a row of sums; `total` adds the rows in order. */
template <typename T> __global__ void norm_slices(usli_rope_args a, side s, float *sums) {
    int64_t first = (int64_t)blockIdx.x * SLICE;
    int half = a.rot_dim / 2;
    for (int i = (int)threadIdx.x; i < a.head_dim; i += (int)blockDim.x) {
        int pair = i, first_of = i, second_of = i;
        bool turned = i < a.rot_dim;
        if (turned) {
            pair = a.interleaved ? i / 2 : i % half;
            places(a, pair, &first_of, &second_of);
        }
        float sum = 0;
        for (int64_t t = first; t < first + SLICE && t < a.tokens; t++) {
            float c = turned ? a.cos[(int64_t)a.position[t] * half + pair] : 1;
            float sn = turned ? -a.sin[(int64_t)a.position[t] * half + pair] : 0;
            for (int h = 0; h < s.heads; h++) {
                int64_t at = t * s.stride + h * head_stride(a);
                const T *g = static_cast<const T *>(s.x) + at;
                float u = to_f32(g[first_of]), w = to_f32(g[second_of]);
                float turned_back = !turned ? u : i == first_of ? u * c - w * sn : w * c + u * sn;
                sum += turned_back * to_f32(static_cast<const T *>(s.in)[at + i]) * s.rstd[t * s.heads + h];
            }
        }
        sums[(int64_t)blockIdx.x * a.head_dim + i] = sum;
    }
}

__global__ void norm_total(float *dnorm, const float *sums, int dim, int64_t slices) {
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        float sum = 0;
        for (int64_t s = 0; s < slices; s++) sum += sums[s * dim + i];
        dnorm[i] += sum;
    }
}

template <typename T> void norm_gradient(usli_exec *x, const usli_rope_args *a, const side &s, float *sums) {
    if (!s.dnorm) return;
    int64_t slices = usli_ceil_div(a->tokens, SLICE);
    USLI_LAUNCH((unsigned)slices, 128, 0, x, norm_slices<T>)(*a, s, sums);
    USLI_LAUNCH(1, 128, 0, x, norm_total)(s.dnorm, sums, a->head_dim, slices);
}

template <typename T> bool whole_packs(const usli_rope_args *a, const side &q, const side &k) {
    constexpr int V = 16 / sizeof(T);
    return !a->interleaved && !q.norm && !k.norm && a->rot_dim / 2 % V == 0 && a->head_dim % V == 0 &&
           a->head_stride % V == 0 && q.stride % V == 0 && (!k.x || k.stride % V == 0) && usli_aligned16(q.x) &&
           usli_aligned16(k.x) && usli_aligned16(a->cos) && usli_aligned16(a->sin) && a->rot_dim > 0;
}

template <typename T>
void launch(usli_exec *x, const usli_rope_args *a, const side &q, const side &k, bool back, float *sums) {
    constexpr int V = 16 / sizeof(T);
    if (whole_packs<T>(a, q, k)) {
        /* Equal turns for all threads: 40 heads of 128 in 16 bits are 320 threads. */
        int64_t packs = (int64_t)(q.heads + k.heads) * (a->rot_dim / 2 / V), turns = usli_ceil_div(packs, MOST);
        unsigned threads = (unsigned)(usli_ceil_div(usli_ceil_div(packs, turns), USLI_WARP) * USLI_WARP);
        USLI_LAUNCH_EARLY((unsigned)a->tokens, threads, 0, x, turn_packs<T, V>)
        (*a, static_cast<T *>(q.x), static_cast<T *>(k.x), back ? -1.0f : 1.0f);
        return;
    }
    unsigned blocks = (unsigned)usli_ceil_div(a->tokens * (q.heads + k.heads), WARPS);
    if (!back) {
        USLI_LAUNCH(blocks, THREADS, 0, x, turn<T, false>)(*a, q, k);
        return;
    }
    norm_gradient<T>(x, a, q, sums);
    norm_gradient<T>(x, a, k, sums);
    USLI_LAUNCH(blocks, THREADS, 0, x, turn<T, true>)(*a, q, k);
}

size_t workspace(const usli_exec *, const void *args, usli_pass pass) {
    const usli_rope_args *a = static_cast<const usli_rope_args *>(args);
    if (pass == USLI_FORWARD || !(a->dq_norm || a->dk_norm)) return 0;
    return (size_t)(usli_ceil_div(a->tokens, SLICE) * a->head_dim) * sizeof(float);
}

usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_rope_args *a = static_cast<const usli_rope_args *>(args);
    bool back = pass == USLI_BACKWARD;
    if (!a->tokens) return USL_OK;
    side q = { back ? a->dq : a->q, a->q_stride, a->heads, a->q_norm, a->q_in, a->q_rstd, back ? a->dq_norm : nullptr };
    side k = {
        back ? a->dk : a->k, a->k_stride, a->kv_heads, a->k_norm, a->k_in, a->k_rstd, back ? a->dk_norm : nullptr
    };
    if (!k.x) k.heads = 0;
    USLI_BY_DTYPE(a->dtype, T, launch<T>(x, a, q, k, back, static_cast<float *>(ws)));
    return usli_launched(x, "rope");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_rope = { run, workspace };
