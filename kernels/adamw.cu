/* adamw for all parameters in one launch. States in 8 bits: a warp takes a block of 256 values, 8 a lane. Llama-3-8B,
 * r = 16 on seven modules, 8 bits: w, g in and out, states in and out, 20 bytes a value, 0.84 GB: 175 us at 4.8 TB/s.
 */
#include "kernels/params.cuh"

extern "C" {
#include "core/quant/optim8.h"
}

namespace {

constexpr int THREADS = 256, BLOCK = USLI_OPTIM8_BLOCK, PER_LANE = BLOCK / USLI_WARP;

/* Both maps of 8-bit states, as they travel: in a kernel's parameters. */
struct maps {
    float m[256], v[256];
};

/* What 8-bit states need. A tree holds the 255 bounds, in the middle between neighbours of the map: the middle one at
 * 1, and those that follow node k at 2k and 2k + 1. So a level's bounds are neighbours, and the lanes of a warp, each
 * on a path of its own, seldom ask one bank of shared memory for two of them. */
struct alignas(16) tables {
    maps map, tree;
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

/* What is the same for all values of a parameter, and the tables: once, because double is slow on most cards. */
__global__ void __launch_bounds__(THREADS)
    prepare(const usli_listed *list, int64_t count, double beta1, double beta2, double eps, const usli_update *u,
            maps given, factors *f, tables *t) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) f[i] = factors_of(u, list[i].p, beta1, beta2, eps);
    if (blockIdx.x) return;
    unsigned k = threadIdx.x, level = 1, step = 128;
    t->map.m[k] = given.m[k];
    t->map.v[k] = given.v[k];
    while (2 * level <= k) level *= 2, step /= 2;
    unsigned at = k ? (k - level) * 2 * step + step - 1 : 0; /* node 0 is not used */
    t->tree.m[k] = 0.5f * (given.m[at] + given.m[at + 1]);
    t->tree.v[k] = 0.5f * (given.v[at] + given.v[at + 1]);
}

/* Contracted by hand, so that every path of a value gives the same bits. */
__device__ __forceinline__ float update_one(const factors &f, float w, float g, float &m, float &v) {
    g *= f.clip;
    m = fmaf(f.rest1, g, f.beta1 * m);
    v = fmaf(f.rest2 * g, g, f.beta2 * v);
    return fmaf(w, f.decay, -(f.step * m / (sqrtf(v) / f.root2 + f.eps)));
}

/* The number of bounds below x, as usli_map_code. */
__device__ __forceinline__ uint8_t code_of(const float *tree, float x) {
    unsigned k = 1;
#pragma unroll
    for (int level = 0; level < 8; level++) k = 2 * k + (tree[k] < x);
    return (uint8_t)(k - 256);
}

/* The codes of a block's values, zeros beyond its end. */
__device__ __forceinline__ usli_pack<uint8_t, PER_LANE> encode(const float (&value)[PER_LANE], const float *tree,
                                                               float *absmax) {
    usli_pack<uint8_t, PER_LANE> codes;
    float most = 0;
    for (int k = 0; k < PER_LANE; k++) most = fmaxf(most, fabsf(value[k]));
    most = warp_max(most);
    if (threadIdx.x % USLI_WARP == 0) *absmax = most;
    float inverse = most > 0 ? 1.0f / most : 0.0f;
    for (int k = 0; k < PER_LANE; k++) codes.v[k] = code_of(tree, most > 0 ? value[k] * inverse : -2.0f);
    return codes;
}

/* n values from `from` on, by a warp. WIDE: a whole block whose arrays are aligned, neighbours in one lane; else lane i
 * has values i, i + 32, ... */
template <bool WIDE>
__device__ __forceinline__ void update_block(const factors &f, const usli_param &p, int64_t from, int n,
                                             const tables &t) {
    int lane = (int)threadIdx.x % USLI_WARP, step = WIDE ? 1 : (int)USLI_WARP;
    int64_t at = from + (WIDE ? lane * PER_LANE : lane), block = from / BLOCK;
    float *w_at = p.w + at, *g_at = p.g + at;
    uint8_t *m_at = static_cast<uint8_t *>(p.m) + at, *v_at = static_cast<uint8_t *>(p.v) + at;
    usli_pack<float, PER_LANE> w = {}, g = {}, zero = {};
    usli_pack<uint8_t, PER_LANE> m_codes = {}, v_codes = {};
    float m_absmax = p.m_absmax[block], v_absmax = p.v_absmax[block], m[PER_LANE], v[PER_LANE];
    if (WIDE) {
        w = load_wide<float, PER_LANE>(w_at), g = load_wide<float, PER_LANE>(g_at);
        m_codes = load_pack<uint8_t, PER_LANE>(m_at), v_codes = load_pack<uint8_t, PER_LANE>(v_at);
    } else {
        for (int k = 0; k < PER_LANE; k++)
            if (k * step + lane < n) {
                w.v[k] = w_at[k * step], g.v[k] = g_at[k * step];
                m_codes.v[k] = m_at[k * step], v_codes.v[k] = v_at[k * step];
            }
    }
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        bool in = WIDE || k * step + lane < n;
        m[k] = in ? t.map.m[m_codes.v[k]] * m_absmax : 0.0f;
        v[k] = in ? t.map.v[v_codes.v[k]] * v_absmax : 0.0f;
        w.v[k] = update_one(f, w.v[k], g.v[k], m[k], v[k]);
    }
    __syncwarp(); /* all lanes have read the old absmax */
    m_codes = encode(m, t.tree.m, &p.m_absmax[block]), v_codes = encode(v, t.tree.v, &p.v_absmax[block]);
    if (WIDE) {
        store_wide<float, PER_LANE>(w_at, w), store_wide<float, PER_LANE>(g_at, zero);
        store_pack<uint8_t, PER_LANE>(m_at, m_codes), store_pack<uint8_t, PER_LANE>(v_at, v_codes);
    } else {
        for (int k = 0; k < PER_LANE; k++)
            if (k * step + lane < n) {
                w_at[k * step] = w.v[k], g_at[k * step] = 0;
                m_at[k * step] = m_codes.v[k], v_at[k * step] = v_codes.v[k];
            }
    }
}

__device__ __forceinline__ bool multiple(const void *p, unsigned bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

__device__ void update_blocks(const factors &f, const usli_param &p, int64_t first, int64_t n, const tables &t) {
    bool aligned = multiple(p.w, 16) && multiple(p.g, 16) && multiple(p.m, 8) && multiple(p.v, 8);
    for (int64_t at = threadIdx.x / USLI_WARP * BLOCK; at < n; at += THREADS / USLI_WARP * BLOCK) {
        if (aligned && n - at >= BLOCK)
            update_block<true>(f, p, first + at, BLOCK, t);
        else
            update_block<false>(f, p, first + at, (int)(n - at < BLOCK ? n - at : BLOCK), t);
    }
}

/* States in float32; N values a thread. */
template <int N>
__device__ __forceinline__ void update_floats(const factors &f, const usli_param &p, int64_t first, int64_t n) {
    for (int64_t i = (int64_t)threadIdx.x * N; i < n; i += THREADS * N) {
        float *w_at = p.w + first + i, *g_at = p.g + first + i;
        float *m_at = static_cast<float *>(p.m) + first + i, *v_at = static_cast<float *>(p.v) + first + i;
        usli_pack<float, N> w = load_pack<float, N>(w_at), g = load_pack<float, N>(g_at), zero = {};
        usli_pack<float, N> m = load_pack<float, N>(m_at), v = load_pack<float, N>(v_at);
        for (int k = 0; k < N; k++) w.v[k] = update_one(f, w.v[k], g.v[k], m.v[k], v.v[k]);
        store_pack<float, N>(w_at, w), store_pack<float, N>(g_at, zero);
        store_pack<float, N>(m_at, m), store_pack<float, N>(v_at, v);
    }
}

__global__ void __launch_bounds__(THREADS, 3)
    update_all(const usli_listed *list, int64_t count, const factors *all, const tables *from, const usli_update *u) {
    __shared__ tables t;
    const usli_listed &item = usli_find_param(list, count, blockIdx.x);
    usli_param p = item.p;
    int64_t first = ((int64_t)blockIdx.x - item.first) * USLI_PARAM_CHUNK;
    int64_t n = p.n - first < USLI_PARAM_CHUNK ? p.n - first : USLI_PARAM_CHUNK;
    if (!u->finite) {
        for (int64_t i = threadIdx.x; i < n; i += THREADS) p.g[first + i] = 0;
        return;
    }
    factors f = all[&item - list];
    if (p.state == USL_U8) {
        static_assert(sizeof t == THREADS * 4 * sizeof(float), "four values of the tables a thread");
        int at = 4 * (int)threadIdx.x;
        store_pack<float, 4>(reinterpret_cast<float *>(&t) + at,
                             load_pack<float, 4>(reinterpret_cast<const float *>(from) + at));
        __syncthreads();
        update_blocks(f, p, first, n, t);
    } else if (n % 4 == 0 && multiple(p.w, 16) && multiple(p.g, 16) && multiple(p.m, 16) && multiple(p.v, 16)) {
        update_floats<4>(f, p, first, n);
    } else {
        update_floats<1>(f, p, first, n);
    }
}

size_t rounded(size_t bytes) {
    return (bytes + 63) & ~(size_t)63;
}

/* The tables, the list, the factors. */
size_t workspace(const usli_exec *, const void *args, usli_pass) {
    size_t count = (size_t) static_cast<const usli_adamw_args *>(args)->count;
    return rounded(sizeof(tables)) + rounded(count * sizeof(usli_listed)) + count * sizeof(factors);
}

usl_status run(usli_exec *x, void *args, usli_pass, void *ws) {
    const usli_adamw_args *a = static_cast<const usli_adamw_args *>(args);
    char *room = static_cast<char *>(ws) + rounded(sizeof(tables));
    tables *t = static_cast<tables *>(ws);
    usli_listed *list = reinterpret_cast<usli_listed *>(room);
    factors *f = reinterpret_cast<factors *>(room + rounded((size_t)a->count * sizeof(usli_listed)));
    int64_t chunks = usli_param_chunks(a->params, a->count);
    if (!chunks) return USL_OK;
    maps given;
    for (int i = 0; i < 256; i++) {
        given.m[i] = usli_dynamic_map[i];
        given.v[i] = usli_dynamic_map_unsigned[i];
    }
    usli_send_params(x, a->params, a->count, list);
    USLI_LAUNCH((unsigned)usli_ceil_div(a->count, THREADS), THREADS, 0, x, prepare)
    (list, a->count, a->beta1, a->beta2, a->eps, a->update, given, f, t);
    USLI_LAUNCH((unsigned)chunks, THREADS, 0, x, update_all)(list, a->count, f, t, a->update);
    return usli_launched(x, "adamw");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_adamw = { run, workspace };
