/* The op attention on the GPU: which kernels take it, with what tiles. */
#include "kernels/attention.cuh"
#include "kernels/attention_backward.cuh"
#include "kernels/attention_decode.cuh"
#include "kernels/attention_forward.cuh"
#include "kernels/attention_simt.cuh"
#include "kernels/cudnn_attention.cuh"

extern "C" const usli_op_impl usli_cuda_attention;

static attention kernel_args(const usli_attention_args *a) {
    attention k = {};
    k.q = a->q, k.k = a->k, k.v = a->v, k.d_o = a->d_o;
    k.o = a->o, k.dq = a->dq, k.dk = a->dk, k.dv = a->dv;
    k.lse = a->lse;
    k.cu_q = a->cu_q, k.cu_k = a->cu_k, k.k_lens = a->k_lens;
    k.q_stride = a->q_stride, k.k_stride = a->k_stride, k.v_stride = a->v_stride, k.o_stride = a->o_stride;
    k.tokens_q = a->tokens_q;
    k.slots = (usli_ceil_div(a->tokens_q, SUMS_TILE) + a->rows) * SUMS_TILE;
    k.rows = a->rows, k.heads = a->heads, k.kv_heads = a->kv_heads, k.group = a->heads / a->kv_heads;
    k.qk_dim = a->qk_dim, k.v_dim = a->v_dim;
    k.window = a->window < a->max_k ? (int)a->window : 0; /* a wider one hides nothing */
    k.causal = a->causal;
    k.scale = a->scale, k.softcap = a->softcap;
    k.factor = 1.44269504088896f * (a->softcap > 0 ? 1.0f : a->scale);
    return k;
}

/* ---- Widths of heads --------------------------------------------------------------------------------------------- */

/* The quick kernels are compiled for these widths of q and k, and of v; others are padded to the next in shared memory.
 */
typedef enum width { W64, W96, W128, W192, W256, W_NONE } width;

static width width_of(const usli_attention_args *a) {
    static const struct { int qk, v; } widths[] = { { 64, 64 }, { 96, 96 }, { 128, 128 }, { 192, 128 }, { 256, 256 } };
    for (int i = 0; i < W_NONE; i++)
        if (a->qk_dim <= widths[i].qk && a->v_dim <= widths[i].v) return static_cast<width>(i);
    return W_NONE;
}

static bool copies_by_16(const void *p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 8 == 0;
}

/* Whether the tensor-core kernels can take it: the rest of the answer is whether their tiles fit. */
static bool quick(const usli_exec *x, const usli_attention_args *a, usli_pass pass) {
    if (a->dtype == USL_F32 || (a->dtype == USL_BF16 && usli_cuda_of(x)->sm < 80)) return false;
    if (width_of(a) == W_NONE || a->qk_dim % 8 || a->v_dim % 8 || !(a->scale > 0)) return false;
    bool fine = copies_by_16(a->q, a->q_stride) && copies_by_16(a->k, a->k_stride) && copies_by_16(a->v, a->v_stride) &&
                copies_by_16(a->o, a->o_stride);
    if (pass == USLI_BACKWARD)
        fine = fine && copies_by_16(a->dq, a->q_stride) && copies_by_16(a->dk, a->k_stride) &&
               copies_by_16(a->dv, a->v_stride) && copies_by_16(a->d_o, a->o_stride);
    return fine;
}

/* ---- Launches: each answers USL_ERR_UNSUPPORTED, without a sentence, when its tiles do not fit ------------------- */

static bool fits(const usli_exec *x, int shared) {
    return (size_t)shared <= usli_cuda_of(x)->shared_most;
}
static dim3 tiles_of(int heads, int64_t tokens, int tile, int rows) {
    return dim3((unsigned)heads, (unsigned)(usli_ceil_div(tokens, tile) + rows));
}

template <typename T, int D, int DV, int WARPS, int MT, int BN>
static usl_status launch_forward(usli_exec *x, const attention &k) {
    typedef forward_shape<D, DV, WARPS, MT, BN> shape;
    if (!fits(x, shape::SHARED)) return USL_ERR_UNSUPPORTED;
    USLI_TRY(USLI_ALLOW_SHARED(x, shape::SHARED, attention_forward<T, D, DV, WARPS, MT, BN>));
    USLI_LAUNCH(tiles_of(k.heads, k.tokens_q, shape::QUERIES, k.rows), shape::THREADS, shape::SHARED, x,
                attention_forward<T, D, DV, WARPS, MT, BN>)
    (k);
    return usli_launched(x, "attention");
}

template <typename T, int D, int DV, int WARPS, int QUERIES, int STAGES, int SPLIT>
static usl_status launch_dkv(usli_exec *x, const attention &k, int64_t tokens_k) {
    typedef dkv_shape<D, DV, WARPS, QUERIES, STAGES, SPLIT> shape;
    if (!fits(x, shape::SHARED)) return USL_ERR_UNSUPPORTED;
    USLI_TRY(USLI_ALLOW_SHARED(x, shape::SHARED, attention_dkv<T, D, DV, WARPS, QUERIES, STAGES, SPLIT>));
    USLI_LAUNCH(tiles_of(k.kv_heads * SPLIT, tokens_k, shape::KEYS, k.rows), shape::THREADS, shape::SHARED, x,
                attention_dkv<T, D, DV, WARPS, QUERIES, STAGES, SPLIT>)
    (k);
    return usli_launched(x, "attention");
}

template <typename T, int D, int DV, int WARPS, int MT, int BN, int STAGES>
static usl_status launch_dq(usli_exec *x, const attention &k) {
    typedef dq_shape<D, DV, WARPS, MT, BN, STAGES> shape;
    if (!fits(x, shape::SHARED)) return USL_ERR_UNSUPPORTED;
    USLI_TRY(USLI_ALLOW_SHARED(x, shape::SHARED, attention_dq<T, D, DV, WARPS, MT, BN, STAGES>));
    USLI_LAUNCH(tiles_of(k.heads, k.tokens_q, shape::QUERIES, k.rows), shape::THREADS, shape::SHARED, x,
                attention_dq<T, D, DV, WARPS, MT, BN, STAGES>)
    (k);
    return usli_launched(x, "attention");
}

template <typename T> static usl_status run_forward(usli_exec *x, const attention &k, width w) {
    switch (w) {
    case W64: return launch_forward<T, 64, 64, 4, 2, 64>(x, k);
    case W96: return launch_forward<T, 96, 96, 4, 2, 64>(x, k);
    case W128: return launch_forward<T, 128, 128, 4, 2, 64>(x, k);
    case W192: return launch_forward<T, 192, 128, 4, 2, 64>(x, k);
    default: return launch_forward<T, 256, 256, 4, 1, 32>(x, k);
    }
}

/* The second of two tiles is for GPUs with 64 KiB of shared memory a block. */
template <typename T> static usl_status run_dkv(usli_exec *x, const attention &k, width w, int64_t tokens_k) {
    usl_status st;
    switch (w) {
    case W64: return launch_dkv<T, 64, 64, 4, 64, 2, 1>(x, k, tokens_k);
    case W96:
        st = launch_dkv<T, 96, 96, 4, 64, 2, 1>(x, k, tokens_k);
        return st == USL_ERR_UNSUPPORTED ? launch_dkv<T, 96, 96, 4, 32, 1, 1>(x, k, tokens_k) : st;
    case W128:
        st = launch_dkv<T, 128, 128, 4, 64, 2, 1>(x, k, tokens_k);
        return st == USL_ERR_UNSUPPORTED ? launch_dkv<T, 128, 128, 4, 32, 1, 1>(x, k, tokens_k) : st;
    case W192: return launch_dkv<T, 192, 128, 4, 32, 2, 1>(x, k, tokens_k);
    default: return launch_dkv<T, 256, 256, 4, 32, 1, 2>(x, k, tokens_k);
    }
}

template <typename T> static usl_status run_dq(usli_exec *x, const attention &k, width w) {
    usl_status st;
    switch (w) {
    case W64: return launch_dq<T, 64, 64, 4, 2, 64, 2>(x, k);
    case W96:
        st = launch_dq<T, 96, 96, 4, 2, 32, 2>(x, k);
        return st == USL_ERR_UNSUPPORTED ? launch_dq<T, 96, 96, 4, 1, 32, 1>(x, k) : st;
    case W128:
        st = launch_dq<T, 128, 128, 4, 2, 32, 2>(x, k);
        return st == USL_ERR_UNSUPPORTED ? launch_dq<T, 128, 128, 4, 1, 32, 1>(x, k) : st;
    case W192: return launch_dq<T, 192, 128, 4, 1, 32, 2>(x, k);
    default: return launch_dq<T, 256, 256, 4, 1, 32, 1>(x, k);
    }
}

template <typename T> static usl_status run_backward(usli_exec *x, const attention &k, width w, int64_t tokens_k) {
    USLI_LAUNCH(tiles_of(k.heads, k.tokens_q, SUMS_TILE, k.rows), 256, 0, x, attention_sums_of<T>)(k);
    USLI_TRY(usli_launched(x, "attention"));
    USLI_TRY(run_dkv<T>(x, k, w, tokens_k));
    return run_dq<T>(x, k, w);
}

/* ---- Decode ------------------------------------------------------------------------------------------------------ */

/* Few queries a row, so that a tile of them would be nearly empty. */
static bool is_decode(const usli_attention_args *a, usli_pass pass) {
    return pass == USLI_FORWARD && a->dtype != USL_F32 && width_of(a) != W_NONE && a->max_q > 0 &&
           (a->max_q == 1 || a->max_q * (a->heads / a->kv_heads) <= 2 * DECODE_ROWS);
}

static decode_parts parts_of(const usli_attention_args *a, void *ws, size_t *bytes) {
    static const int v_widths[] = { 64, 96, 128, 128, 256 };
    decode_parts p = {};
    p.rows = (int)a->max_q * (a->heads / a->kv_heads);
    p.width = v_widths[width_of(a)];
    int64_t others = (int64_t)a->rows * a->kv_heads * usli_ceil_div(p.rows, DECODE_ROWS);
    int64_t most = usli_ceil_div(a->max_k, 4 * DECODE_WARPS * DECODE_KEYS); /* a chunk worth a block */
    int64_t chunks = usli_ceil_div(DECODE_BLOCKS, others > 0 ? others : 1);
    chunks = chunks < most ? chunks : most;
    p.chunks = (int)(chunks > 0 ? chunks : 1);
    int64_t count = (int64_t)a->rows * a->kv_heads * p.chunks * p.rows;
    *bytes = (size_t)count * (size_t)(p.width + 2) * sizeof(float);
    p.o = static_cast<float *>(ws);
    if (ws) p.top = p.o + count * p.width, p.sum = p.top + count;
    return p;
}

template <typename T, int D, int DV>
static usl_status launch_decode(usli_exec *x, const attention &k, const decode_parts &p) {
    typedef decode_shape<D, DV> shape;
    if (!fits(x, shape::SHARED)) return USL_ERR_UNSUPPORTED;
    dim3 grid((unsigned)(k.kv_heads * usli_ceil_div(p.rows, DECODE_ROWS)), (unsigned)p.chunks, (unsigned)k.rows);
    USLI_TRY(USLI_ALLOW_SHARED(x, shape::SHARED, attention_decode<T, D, DV>));
    USLI_LAUNCH_EARLY(grid, DECODE_WARPS * USLI_WARP, shape::SHARED, x, attention_decode<T, D, DV>)(k, p);
    USLI_TRY(usli_launched(x, "attention"));
    USLI_LAUNCH_EARLY(dim3((unsigned)k.heads, (unsigned)k.tokens_q), 128, 0, x, attention_merge<T>)(k, p);
    return usli_launched(x, "attention");
}

template <typename T> static usl_status run_decode(usli_exec *x, const attention &k, width w, const decode_parts &p) {
    switch (w) {
    case W64: return launch_decode<T, 64, 64>(x, k, p);
    case W96: return launch_decode<T, 96, 96>(x, k, p);
    case W128: return launch_decode<T, 128, 128>(x, k, p);
    case W192: return launch_decode<T, 192, 128>(x, k, p);
    default: return launch_decode<T, 256, 256>(x, k, p);
    }
}

/* ---- The op ------------------------------------------------------------------------------------------------------ */

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    const usli_attention_args *a = static_cast<const usli_attention_args *>(args);
    size_t bytes = 0, other = usli_cudnn_attention_workspace(x, a, pass);
    if (a->dtype == USL_F32) return 0;
    if (pass == USLI_BACKWARD) {
        bytes = (size_t)kernel_args(a).slots * (size_t)a->heads * sizeof(attention_sums);
    } else if (is_decode(a, pass)) {
        parts_of(a, nullptr, &bytes);
    }
    return bytes > other ? bytes : other;
}

template <typename T>
static usl_status run_quick(usli_exec *x, const usli_attention_args *a, usli_pass pass, void *ws) {
    attention k = kernel_args(a);
    width w = width_of(a);
    size_t bytes;
    if (is_decode(a, pass)) return run_decode<T>(x, k, w, parts_of(a, ws, &bytes));
    if (pass == USLI_FORWARD) return run_forward<T>(x, k, w);
    k.sums = static_cast<attention_sums *>(ws);
    return run_backward<T>(x, k, w, a->tokens_k);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_attention_args *a = static_cast<const usli_attention_args *>(args);
    usl_status st = USL_ERR_UNSUPPORTED;
    if (a->rows == 0 || (a->tokens_q == 0 && (pass == USLI_FORWARD || a->tokens_k == 0))) return USL_OK;
    if (usli_cudnn_attention(x, a, pass, ws, &st)) return st;
    if (quick(x, a, pass))
        st = a->dtype == USL_BF16 ? run_quick<usli_bf16>(x, a, pass, ws) : run_quick<usli_f16>(x, a, pass, ws);
    if (st != USL_ERR_UNSUPPORTED) return st;
    USLI_BY_DTYPE(a->dtype, T, return simt_run<T>(x, kernel_args(a), a->tokens_k, pass));
    return USL_OK;
}

const usli_op_impl usli_cuda_attention = { run, workspace };
