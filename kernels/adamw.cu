/* adamw for all parameters in one launch. States in 8 bits: a warp takes a block of 256 values, 8 a lane. Llama-3-8B,
 * r = 16 on seven modules, 8 bits: w, g in and out, states in and out, 20 bytes a value, 0.84 GB: 175 us at 4.8 TB/s.
 */
#include "kernels/params.cuh"

extern "C" {
#include "core/quant/optim8.h"
}

namespace {

constexpr int THREADS = 256, BLOCK = USLI_OPTIM8_BLOCK, PER_LANE = BLOCK / USLI_WARP;

/* Both maps of 8-bit states, as they travel: in the kernel's parameters. */
struct maps {
    float m[256], v[256];
};

struct factors {
    float beta1, rest1, beta2, rest2, root2, eps, step, decay, clip;
};

/* In double and rounded once, as torch does it. */
__device__ factors factors_of(const usli_update *u, const usli_param &p, double beta1, double beta2, double eps) {
    double lr = (double)u->lr[p.group];
    return { (float)beta1,
             (float)(1 - beta1),
             (float)beta2,
             (float)(1 - beta2),
             (float)sqrt(1 - pow(beta2, (double)u->step)),
             (float)eps,
             (float)(lr / (1 - pow(beta1, (double)u->step))),
             (float)(1 - lr * (double)p.weight_decay),
             u->clip };
}

__device__ __forceinline__ float update_one(const factors &f, float w, float g, float &m, float &v) {
    g *= f.clip;
    m = f.beta1 * m + f.rest1 * g;
    v = f.beta2 * v + f.rest2 * g * g;
    return w * f.decay - f.step * m / (sqrtf(v) / f.root2 + f.eps);
}

/* The number of bounds below x; bounds lie in the middle between neighbours of the map, the last is infinite. */
__device__ __forceinline__ uint8_t code_of(const float *bounds, float x) {
    unsigned at = 0;
#pragma unroll
    for (unsigned step = 128; step; step >>= 1) at += bounds[at + step - 1] < x ? step : 0;
    return (uint8_t)at;
}

__device__ __forceinline__ void store_codes(const float *value, int n, int lane, const float *bounds, uint8_t *codes,
                                            float *absmax) {
    float most = 0;
    for (int k = 0; k < PER_LANE; k++)
        if (k * USLI_WARP + lane < n) most = fmaxf(most, fabsf(value[k]));
    most = warp_max(most);
    if (lane == 0) *absmax = most;
    float inverse = most > 0 ? 1.0f / most : 0.0f;
    for (int k = 0; k < PER_LANE; k++)
        if (k * USLI_WARP + lane < n)
            codes[k * USLI_WARP + lane] = code_of(bounds, most > 0 ? value[k] * inverse : -2.0f);
}

__device__ void update_blocks(const factors &f, const usli_param &p, int64_t first, int64_t n, const maps &map,
                              const maps &bounds) {
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP;
    for (int64_t at = warp * BLOCK; at < n; at += THREADS / USLI_WARP * BLOCK) {
        int here = (int)(n - at < BLOCK ? n - at : BLOCK);
        int64_t from = first + at, block = from / BLOCK;
        uint8_t *m_codes = static_cast<uint8_t *>(p.m) + from, *v_codes = static_cast<uint8_t *>(p.v) + from;
        float m_absmax = p.m_absmax[block], v_absmax = p.v_absmax[block], m[PER_LANE], v[PER_LANE];
        for (int k = 0; k < PER_LANE; k++) {
            int i = k * USLI_WARP + lane;
            if (i >= here) continue;
            m[k] = map.m[m_codes[i]] * m_absmax;
            v[k] = map.v[v_codes[i]] * v_absmax;
            p.w[from + i] = update_one(f, p.w[from + i], p.g[from + i], m[k], v[k]);
            p.g[from + i] = 0;
        }
        __syncwarp(); /* all lanes have read the old absmax */
        store_codes(m, here, lane, bounds.m, m_codes, &p.m_absmax[block]);
        store_codes(v, here, lane, bounds.v, v_codes, &p.v_absmax[block]);
    }
}

__global__ void __launch_bounds__(THREADS) update_all(const usli_listed *list, int64_t count, double beta1,
                                                      double beta2, double eps, const usli_update *u, maps given) {
    __shared__ maps map, bounds;
    __shared__ factors f;
    const usli_listed &item = usli_find_param(list, count, blockIdx.x);
    const usli_param &p = item.p;
    int64_t first = ((int64_t)blockIdx.x - item.first) * USLI_PARAM_CHUNK;
    int64_t n = p.n - first < USLI_PARAM_CHUNK ? p.n - first : USLI_PARAM_CHUNK;
    int t = (int)threadIdx.x;
    if (!u->finite) {
        for (int64_t i = t; i < n; i += THREADS) p.g[first + i] = 0;
        return;
    }
    map.m[t] = given.m[t];
    map.v[t] = given.v[t];
    bounds.m[t] = t < 255 ? 0.5f * (given.m[t] + given.m[t + 1]) : INFINITY;
    bounds.v[t] = t < 255 ? 0.5f * (given.v[t] + given.v[t + 1]) : INFINITY;
    if (t == 0) f = factors_of(u, p, beta1, beta2, eps);
    __syncthreads();
    if (p.state == USL_U8) {
        update_blocks(f, p, first, n, map, bounds);
        return;
    }
    float *m = static_cast<float *>(p.m) + first, *v = static_cast<float *>(p.v) + first;
    for (int64_t i = t; i < n; i += THREADS) {
        float mi = m[i], vi = v[i];
        p.w[first + i] = update_one(f, p.w[first + i], p.g[first + i], mi, vi);
        p.g[first + i] = 0;
        m[i] = mi;
        v[i] = vi;
    }
}

size_t workspace(const usli_exec *, const void *args, usli_pass) {
    return (size_t) static_cast<const usli_adamw_args *>(args)->count * sizeof(usli_listed);
}

usl_status run(usli_exec *x, void *args, usli_pass, void *ws) {
    const usli_adamw_args *a = static_cast<const usli_adamw_args *>(args);
    usli_listed *list = static_cast<usli_listed *>(ws);
    int64_t chunks = usli_param_chunks(a->params, a->count);
    if (!chunks) return USL_OK;
    maps given;
    for (int i = 0; i < 256; i++) {
        given.m[i] = usli_dynamic_map[i];
        given.v[i] = usli_dynamic_map_unsigned[i];
    }
    usli_send_params(x, a->params, a->count, list);
    USLI_LAUNCH((unsigned)chunks, THREADS, 0, x, update_all)
    (list, a->count, a->beta1, a->beta2, a->eps, a->update, given);
    return usli_launched(x, "adamw");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_adamw = { run, workspace };
