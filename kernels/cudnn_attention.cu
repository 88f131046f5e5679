/* Attention as a graph of cuDNN's backend API. cuDNN has one kernel for the whole of it, but is asked in single
 * operations (two products, a mask, the parts of a softmax), and looks for a kernel whose pattern they are: so the
 * operations below, their order and their types are what it knows, not what would be shortest.
 *
 * Rows have one length, so that q, k, v and o are (rows, heads, length, dim) with strides. The log of the sums is
 * written where the op keeps it, (heads, tokens), by strides too. */
#include "kernels/cudnn_attention.cuh"

#ifndef USLI_EMULATED

#include <cstdlib>
#include <cstring>

#include <dlfcn.h>

#include "kernels/cudnn.cuh"

namespace {

typedef cudnnBackendDescriptor_t desc;

/* Tensors that are memory; all others live in registers of the kernel and count on from VIRTUAL. */
enum uid { Q = 1, K, V, O, LSE, D_O, DQ, DK, DV, SCALE, ONE, HIDDEN, SUMS, DQ_SUM, VIRTUAL = 100 };

enum { MOST_MADE = 192, MOST_OPS = 40, MOST_ENGINES = 16, ALIGNMENT = 256 };

/* What decides a plan. */
struct key {
    int64_t rows, length, heads, kv_heads, dim, q_stride, k_stride, v_stride, o_stride, lse_stride;
    int dtype, pass, deterministic;
};

struct entry {
    struct key key;
    desc plan; /* NULL: cuDNN does not take these shapes */
    size_t plan_bytes;
    desc made[MOST_MADE];
    int count;
};

} // namespace

struct usli_cudnn : cudnn_functions {
    bool off; /* it failed */
    void *library;
    cudnnHandle_t handle;
    struct entry **entries;
    size_t count, cap;
};

namespace {

template <typename F> bool find_function(void *library, const char *name, F *function) {
    *function = reinterpret_cast<F>(dlsym(library, name));
    return *function != nullptr;
}

bool find_functions(usli_cudnn *c) {
#define FOUND(name) find_function(c->library, "cudnn" #name, &c->name)
    return FOUND(GetVersion) && FOUND(Create) && FOUND(Destroy) && FOUND(SetStream) && FOUND(BackendCreateDescriptor) &&
           FOUND(BackendDestroyDescriptor) && FOUND(BackendSetAttribute) && FOUND(BackendGetAttribute) &&
           FOUND(BackendFinalize) && FOUND(BackendExecute);
#undef FOUND
}

/* ---- Descriptors: after a failure the rest does nothing ---------------------------------------------------------- */

struct graph {
    const usli_cudnn *c;
    struct entry *e;
    bool ok;
    int64_t next;
    desc ops[MOST_OPS];
    int op_count;
};

struct shape {
    int64_t dim[4], stride[4];
};

desc make(graph *g, int kind) {
    desc d = nullptr;
    g->ok = g->ok && g->e->count < MOST_MADE && g->c->BackendCreateDescriptor(kind, &d) == CUDNN_STATUS_SUCCESS;
    if (!g->ok) return nullptr;
    g->e->made[g->e->count++] = d;
    return d;
}

void set(graph *g, desc d, int name, int type, int64_t count, const void *values) {
    g->ok = g->ok && g->c->BackendSetAttribute(d, name, type, count, values) == CUDNN_STATUS_SUCCESS;
}

void set_desc(graph *g, desc d, int name, desc value) {
    set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

desc finish(graph *g, desc d) {
    g->ok = g->ok && g->c->BackendFinalize(d) == CUDNN_STATUS_SUCCESS;
    return d;
}

void add_op(graph *g, desc d) {
    finish(g, d);
    g->ok = g->ok && g->op_count < MOST_OPS;
    if (g->ok) g->ops[g->op_count++] = d;
}

desc tensor(graph *g, int64_t id, cudnnDataType_t type, const shape &s, bool in_memory, bool by_value) {
    desc d = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    int64_t alignment = by_value ? 4 : 16;
    bool is_virtual = !in_memory;
    set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id);
    set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, s.dim);
    set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, s.stride);
    set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    if (is_virtual) set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
    if (by_value) set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
    return finish(g, d);
}

desc in_memory(graph *g, int64_t id, cudnnDataType_t type, const shape &s) {
    return tensor(g, id, type, s, true, false);
}
/* A number that the host gives with each run. */
desc number(graph *g, int64_t id) {
    return tensor(g, id, CUDNN_DATA_FLOAT, { { 1, 1, 1, 1 }, { 1, 1, 1, 1 } }, true, true);
}
desc between(graph *g, cudnnDataType_t type, const shape &s) {
    return tensor(g, g->next++, type, s, false, false);
}

/* ---- Operations -------------------------------------------------------------------------------------------------- */

void pointwise(graph *g, cudnnPointwiseMode_t mode, cudnnDataType_t math, desc x, desc b, desc t, desc y,
               int64_t axis = -1) {
    desc how = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    set(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    set(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &math);
    if (axis >= 0) set(g, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
    finish(g, how);
    desc op = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    if (b) set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
    if (t) set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t);
    add_op(g, op);
}

/* In float32, into a new tensor in registers. */
desc computed(graph *g, cudnnPointwiseMode_t mode, desc x, desc b, const shape &s) {
    desc y = between(g, CUDNN_DATA_FLOAT, s);
    pointwise(g, mode, CUDNN_DATA_FLOAT, x, b, nullptr, y);
    return y;
}

void product(graph *g, desc a, desc b, desc c) {
    cudnnDataType_t math = CUDNN_DATA_FLOAT;
    desc how = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    set(g, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &math);
    finish(g, how);
    desc op = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, how);
    add_op(g, op);
}

void reduce(graph *g, cudnnReduceTensorOp_t what, desc x, desc y) {
    cudnnDataType_t math = CUDNN_DATA_FLOAT;
    desc how = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    set(g, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &what);
    set(g, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &math);
    finish(g, how);
    desc op = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how);
    add_op(g, op);
}

/* y is x with its last two dimensions exchanged. */
desc reshaped(graph *g, desc x, cudnnDataType_t type, const shape &s) {
    desc y = between(g, type, s);
    desc op = make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    set_desc(g, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    set_desc(g, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
    add_op(g, op);
    return y;
}

/* ---- The graphs -------------------------------------------------------------------------------------------------- */

struct shapes {
    cudnnDataType_t type;
    shape q, k, k_turned, v, v_turned, o, scores, scores_turned, lse, sums, full;
};

shape turned(const shape &s) {
    return { { s.dim[0], s.dim[1], s.dim[3], s.dim[2] }, { s.stride[0], s.stride[1], s.stride[3], s.stride[2] } };
}

/* (rows, heads, length, dim) of tokens that are `stride` apart. */
shape of_tokens(const key &k, int64_t heads, int64_t stride) {
    return { { k.rows, heads, k.length, k.dim }, { k.length * stride, k.dim, stride, 1 } };
}

shapes shapes_of(const key &k) {
    int64_t b = k.rows, h = k.heads, s = k.length;
    shapes t;
    t.type = k.dtype == USL_BF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF;
    t.q = of_tokens(k, h, k.q_stride);
    t.k = of_tokens(k, k.kv_heads, k.k_stride);
    t.v = of_tokens(k, k.kv_heads, k.v_stride);
    t.o = of_tokens(k, h, k.o_stride);
    t.k_turned = turned(t.k);
    t.v_turned = turned(t.v);
    t.scores = { { b, h, s, s }, { h * s * s, s * s, s, 1 } };
    t.scores_turned = turned(t.scores);
    t.lse = { { b, h, s, 1 }, { s, k.lse_stride, 1, 1 } };
    t.sums = { { b, h, s, 1 }, { h * s, s, 1, 1 } };
    t.full = { { b, h, s, k.dim }, { h * s * k.dim, s * k.dim, k.dim, 1 } };
    return t;
}

/* Scores of keys after the query become -inf. */
desc causal(graph *g, const shapes &t, desc scores) {
    desc row = between(g, CUDNN_DATA_INT32, t.scores), column = between(g, CUDNN_DATA_INT32, t.scores);
    desc seen = between(g, CUDNN_DATA_BOOLEAN, t.scores), out = between(g, CUDNN_DATA_FLOAT, t.scores);
    pointwise(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, scores, nullptr, nullptr, row, 2);
    pointwise(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, scores, nullptr, nullptr, column, 3);
    pointwise(g, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, row, column, nullptr, seen);
    pointwise(g, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, scores, number(g, HIDDEN), seen, out);
    return out;
}

void describe_forward(graph *g, const shapes &t) {
    desc s = between(g, CUDNN_DATA_FLOAT, t.scores);
    product(g, in_memory(g, Q, t.type, t.q), in_memory(g, K, t.type, t.k_turned), s);
    s = causal(g, t, computed(g, CUDNN_POINTWISE_MUL, s, number(g, SCALE), t.scores));
    desc top = between(g, CUDNN_DATA_FLOAT, t.sums), sum = between(g, CUDNN_DATA_FLOAT, t.sums);
    reduce(g, CUDNN_REDUCE_TENSOR_MAX, s, top);
    desc e = computed(g, CUDNN_POINTWISE_EXP, computed(g, CUDNN_POINTWISE_SUB, s, top, t.scores), nullptr, t.scores);
    reduce(g, CUDNN_REDUCE_TENSOR_ADD, e, sum);
    desc log = computed(g, CUDNN_POINTWISE_LOG, sum, nullptr, t.sums);
    pointwise(g, CUDNN_POINTWISE_ADD, CUDNN_DATA_FLOAT, top, log, nullptr, in_memory(g, LSE, CUDNN_DATA_FLOAT, t.lse));
    desc p = between(g, t.type, t.scores);
    pointwise(g, CUDNN_POINTWISE_DIV, CUDNN_DATA_FLOAT, e, sum, nullptr, p);
    product(g, p, in_memory(g, V, t.type, t.v), in_memory(g, O, t.type, t.o));
}

/* The gradient of keys or values, summed over the heads that share them. */
void describe_shared(graph *g, const key &k, const shapes &t, desc scores, desc with, desc out) {
    desc turn = reshaped(g, scores, t.type, t.scores_turned);
    if (k.heads == k.kv_heads) {
        product(g, turn, with, out);
        return;
    }
    desc full = between(g, t.type, t.full);
    product(g, turn, with, full);
    reduce(g, CUDNN_REDUCE_TENSOR_ADD, full, out);
}

void describe_backward(graph *g, const key &k, const shapes &t) {
    desc q = in_memory(g, Q, t.type, t.q), key_t = in_memory(g, K, t.type, t.k_turned);
    desc v_t = in_memory(g, V, t.type, t.v_turned), d_o = in_memory(g, D_O, t.type, t.o);
    desc scale = number(g, SCALE);

    desc both = computed(g, CUDNN_POINTWISE_MUL, d_o, in_memory(g, O, t.type, t.o), t.full);
    desc sum = between(g, CUDNN_DATA_FLOAT, t.sums), delta = in_memory(g, SUMS, CUDNN_DATA_FLOAT, t.sums);
    reduce(g, CUDNN_REDUCE_TENSOR_ADD, both, sum);
    pointwise(g, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, sum, number(g, ONE), nullptr, delta);

    desc s = between(g, CUDNN_DATA_FLOAT, t.scores);
    product(g, q, key_t, s);
    s = computed(g, CUDNN_POINTWISE_MUL, s, scale, t.scores);
    s = computed(g, CUDNN_POINTWISE_SUB, s, in_memory(g, LSE, CUDNN_DATA_FLOAT, t.lse), t.scores);
    desc p = computed(g, CUDNN_POINTWISE_EXP, causal(g, t, s), nullptr, t.scores);
    describe_shared(g, k, t, p, d_o, in_memory(g, DV, t.type, t.v));

    desc dp = between(g, CUDNN_DATA_FLOAT, t.scores);
    product(g, d_o, v_t, dp);
    desc ds = computed(g, CUDNN_POINTWISE_MUL, computed(g, CUDNN_POINTWISE_SUB, dp, delta, t.scores), p, t.scores);
    ds = computed(g, CUDNN_POINTWISE_MUL, ds, scale, t.scores);
    describe_shared(g, k, t, ds, q, in_memory(g, DK, t.type, t.k));

    /* dq in float32, to which blocks add in whatever order; or, so that it repeats, dq at once. */
    desc keys = reshaped(g, key_t, t.type, t.k), dq = in_memory(g, DQ, t.type, t.q);
    if (k.deterministic) {
        product(g, ds, keys, dq);
    } else {
        desc part = in_memory(g, DQ_SUM, CUDNN_DATA_FLOAT, t.full);
        product(g, ds, keys, part);
        pointwise(g, CUDNN_POINTWISE_IDENTITY, CUDNN_DATA_FLOAT, part, nullptr, nullptr, dq);
    }
}

/* ---- Plans ------------------------------------------------------------------------------------------------------- */

/* The first engine of the heuristic's that builds. */
bool choose(graph *g, desc operations) {
    int mode = CUDNN_HEUR_MODE_A;
    desc heuristic = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR), configs[MOST_ENGINES];
    set_desc(g, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, operations);
    set(g, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    finish(g, heuristic);
    for (int i = 0; i < MOST_ENGINES; i++) configs[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    int64_t found = 0;
    if (!g->ok || g->c->BackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                            MOST_ENGINES, &found, configs) != CUDNN_STATUS_SUCCESS)
        return false;
    for (int64_t i = 0; i < found && i < MOST_ENGINES; i++) {
        int64_t bytes = 0;
        desc plan = make(g, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
        set(g, plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &g->c->handle);
        set_desc(g, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configs[i]);
        finish(g, plan);
        if (g->ok && g->c->BackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1,
                                               nullptr, &bytes) == CUDNN_STATUS_SUCCESS) {
            g->e->plan = plan;
            g->e->plan_bytes = (size_t)bytes;
            return true;
        }
        g->ok = g->e->count < MOST_MADE;
    }
    return false;
}

size_t up(size_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}
bool describe(const usli_cudnn *c, entry *e) {
    graph g = {};
    g.c = c;
    g.e = e;
    g.ok = true;
    g.next = VIRTUAL;
    shapes t = shapes_of(e->key);
    if (e->key.pass == USLI_FORWARD)
        describe_forward(&g, t);
    else
        describe_backward(&g, e->key, t);
    desc operations = make(&g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    set(&g, operations, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g.op_count, g.ops);
    set(&g, operations, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &c->handle);
    finish(&g, operations);
    if (!g.ok || !choose(&g, operations)) return false;
    return true;
}

/* ---- Which attention is cuDNN's ---------------------------------------------------------------------------------- */

/* Decided by shapes alone, so that a run and its repetition choose alike. Each length has its plans, which take up to a
 * second to build: lengths are multiples of LENGTH_STEP, of which there are few, and worth it. */
enum { LENGTH_STEP = 128, LENGTH_LEAST = 512 };

/* For gradients that repeat, cuDNN keeps those of all scores in memory, in 16 bits. So many rows and kv heads go at a
 * time that its workspace is ROOM_A_TOKEN bytes for each token, and ROOM_MOST in all: the larger, the quicker. */
enum : int64_t { ROOM_A_TOKEN = 144 << 10, ROOM_MOST = (int64_t)1100 << 20 };
/* What cuDNN may want beyond what is known of it. */
enum { SLACK = 1 << 20 };

int64_t room_of_plan(const usli_attention_args *a, usli_pass pass) {
    int64_t gradients = a->tokens_q * a->heads * a->qk_dim * 2 * 2; /* dk, dv of all heads, before they are summed */
    if (pass == USLI_FORWARD) return 0;
    if (!a->deterministic) return gradients;
    return a->tokens_q < ROOM_MOST / ROOM_A_TOKEN ? a->tokens_q * ROOM_A_TOKEN : (int64_t)ROOM_MOST;
}

struct part {
    int64_t rows, kv_heads; /* 0: one is too long */
};

part part_of(const usli_attention_args *a, usli_pass pass) {
    part p = { a->rows, a->kv_heads };
    if (pass == USLI_FORWARD || !a->deterministic) return p;
    int64_t one = a->heads / a->kv_heads * a->max_q * (a->max_q + 2 * a->qk_dim) * 2, room = room_of_plan(a, pass);
    if (p.rows * p.kv_heads * one > room) p.rows = 1;
    while (p.kv_heads && (p.kv_heads * one > room / p.rows || a->kv_heads % p.kv_heads)) p.kv_heads--;
    return p;
}

/* Whether there may be rows, of at most the longest's length, that cuDNN takes. Then their workspace is counted
 * whatever the rows are, so that a plan for the most tokens has room for fewer. */
bool may_take(const usli_cudnn *c, const usli_attention_args *a) {
    if (!c || c->off || a->dtype == USL_F32 || !a->causal || a->prefix || a->softcap > 0 || a->k_lens) return false;
    if (a->max_q != a->max_k || a->max_q < LENGTH_LEAST || (a->window && a->window < LENGTH_LEAST)) return false;
    if (a->qk_dim != a->v_dim || a->qk_dim < 64 || a->qk_dim > 128 || a->qk_dim % 8 || !(a->scale > 0)) return false;
    return a->q_stride % 8 == 0 && a->k_stride % 8 == 0 && a->v_stride % 8 == 0 && a->o_stride % 8 == 0;
}

bool takes(const usli_cudnn *c, const usli_attention_args *a, usli_pass pass) {
    if (!may_take(c, a) || (a->window && a->window < a->max_k)) return false;
    /* No row is longer than the longest: so all are as long. */
    if (a->rows * a->max_q != a->tokens_q || a->tokens_q != a->tokens_k || a->max_q % LENGTH_STEP) return false;
    return part_of(a, pass).kv_heads > 0;
}

key key_of(const usli_attention_args *a, usli_pass pass) {
    part p = part_of(a, pass);
    key k;
    memset(&k, 0, sizeof k);
    k.rows = p.rows, k.length = a->max_q, k.kv_heads = p.kv_heads, k.dim = a->qk_dim;
    k.heads = p.kv_heads * (a->heads / a->kv_heads);
    k.lse_stride = a->tokens_q;
    k.q_stride = a->q_stride, k.k_stride = a->k_stride, k.v_stride = a->v_stride, k.o_stride = a->o_stride;
    k.dtype = a->dtype, k.pass = pass;
    k.deterministic = pass == USLI_BACKWARD && a->deterministic;
    return k;
}

/* Before 9.10 it hides scores by another number than -inf; 9.10.0 and 9.10.1 are known to be wrong. */
enum { OLDEST = 91002 };

void *open_library() {
    static const char *const PLACES[] = { "libcudnn.so.9", "/usr/local/cuda/lib64/libcudnn.so.9",
                                          "/usr/lib/x86_64-linux-gnu/libcudnn.so.9" };
    for (const char *place : PLACES) {
        void *library = dlopen(place, RTLD_NOW | RTLD_LOCAL);
        if (library) return library;
    }
    return nullptr;
}

/* With the first plan, because it loads some hundred MB of libraries. */
bool ready(const usli_exec *x, usli_cudnn *c) {
    if (c->handle) return true;
    cudaSetDevice(usli_cuda_of(x)->device);
    c->off =
        c->Create(&c->handle) != CUDNN_STATUS_SUCCESS || c->SetStream(c->handle, x->stream) != CUDNN_STATUS_SUCCESS;
    return !c->off;
}

void forget(const usli_cudnn *c, entry *e) {
    for (int i = e->count; i-- > 0;) c->BackendDestroyDescriptor(e->made[i]);
    e->count = 0;
    e->plan = nullptr;
}

/* ---- The workspace: cuDNN's, then tensors of the graph that nobody else reads ------------------------------------ */

struct places {
    size_t sums, dq_sum, lse, all;
};

/* Where nothing is saved, cuDNN writes the logs to the workspace: one plan, and one result, for both. */
places places_of(const usli_attention_args *a, usli_pass pass) {
    places p;
    size_t values = (size_t)(a->tokens_q * a->heads), last = up((size_t)room_of_plan(a, pass)) + SLACK;
    p.sums = last, last += pass == USLI_BACKWARD ? up(values * sizeof(float)) : 0;
    p.dq_sum = last, last += pass == USLI_BACKWARD && !a->deterministic ? up(values * a->qk_dim * sizeof(float)) : 0;
    p.lse = last, last += a->lse ? 0 : up(values * sizeof(float));
    p.all = last + ALIGNMENT;
    return p;
}

/* NULL: not for cuDNN. Want of host memory turns it off for good, so that workspace and run answer alike. */
const entry *find(const usli_exec *x, const usli_attention_args *a, usli_pass pass) {
    usli_cudnn *c = usli_cuda_of(x)->cudnn;
    if (!takes(c, a, pass)) return nullptr;
    key k = key_of(a, pass);
    for (size_t i = c->count; i-- > 0;)
        if (memcmp(&c->entries[i]->key, &k, sizeof k) == 0) return c->entries[i]->plan ? c->entries[i] : nullptr;
    if (!ready(x, c)) return nullptr;
    entry *e = nullptr;
    if (usli_grow(x->ctx, &c->entries, &c->cap, c->count + 1, sizeof *c->entries) == USL_OK)
        e = static_cast<entry *>(usli_calloc(x->ctx, 1, sizeof *e));
    c->off = !e;
    if (!e) return nullptr;
    c->entries[c->count++] = e;
    e->key = k;
    if (!describe(c, e) || e->plan_bytes > (size_t)room_of_plan(a, pass) + SLACK) forget(c, e);
    return e->plan ? e : nullptr;
}

/* ---- Running a plan ---------------------------------------------------------------------------------------------- */

bool aligned(const usli_attention_args *a, usli_pass pass) {
    bool fine = usli_aligned16(a->q) && usli_aligned16(a->k) && usli_aligned16(a->v) && usli_aligned16(a->o) &&
                usli_aligned16(a->lse);
    if (pass == USLI_FORWARD) return fine;
    return fine && usli_aligned16(a->d_o) && usli_aligned16(a->dq) && usli_aligned16(a->dk) && usli_aligned16(a->dv);
}

cudnnStatus_t execute(const usli_cudnn *c, const entry *e, int count, const int64_t *ids, void *const *pointers,
                      void *ws) {
    desc pack = nullptr;
    cudnnStatus_t st = c->BackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
    if (st != CUDNN_STATUS_SUCCESS) return st;
    st = c->BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, ids);
    if (st == CUDNN_STATUS_SUCCESS)
        st = c->BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, pointers);
    if (st == CUDNN_STATUS_SUCCESS)
        st = c->BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &ws);
    if (st == CUDNN_STATUS_SUCCESS) st = c->BackendFinalize(pack);
    if (st == CUDNN_STATUS_SUCCESS) st = c->BackendExecute(c->handle, e->plan, pack);
    c->BackendDestroyDescriptor(pack);
    return st;
}

/* Rows from `row` on and kv heads from `head` on, as many as the plan is for. */
cudnnStatus_t run_part(const usli_cudnn *c, const entry *e, const usli_attention_args *a, int64_t row, int64_t head,
                       char *ws) {
    const key &k = e->key;
    places at = places_of(a, static_cast<usli_pass>(k.pass));
    int64_t token = row * k.length, q_head = head * (a->heads / a->kv_heads);
    int64_t q = 2 * (token * k.q_stride + q_head * k.dim), o = 2 * (token * k.o_stride + q_head * k.dim);
    int64_t key_at = 2 * (token * k.k_stride + head * k.dim), v = 2 * (token * k.v_stride + head * k.dim);
    float scale = a->scale, one = 1.0f, hidden = -INFINITY;
    float *lse = (a->lse ? a->lse : reinterpret_cast<float *>(ws + at.lse)) + q_head * k.lse_stride + token;
    const struct {
        int64_t id;
        void *at;
    } all[] = {
        { Q, (char *)a->q + q },
        { K, (char *)a->k + key_at },
        { V, (char *)a->v + v },
        { O, (char *)a->o + o },
        { LSE, lse },
        { SCALE, &scale },
        { HIDDEN, &hidden },
        { D_O, (char *)a->d_o + o },
        { DQ, (char *)a->dq + q },
        { DK, (char *)a->dk + key_at },
        { DV, (char *)a->dv + v },
        { ONE, &one },
        { SUMS, ws + at.sums },
        { DQ_SUM, ws + at.dq_sum },
    };
    int count = k.pass == USLI_FORWARD ? 7 : k.deterministic ? 13 : 14;
    int64_t ids[14];
    void *pointers[14];
    for (int i = 0; i < count; i++) ids[i] = all[i].id, pointers[i] = all[i].at;
    return execute(c, e, count, ids, pointers, ws);
}

} // namespace

size_t usli_cudnn_attention_workspace(const usli_exec *x, const usli_attention_args *a, usli_pass pass) {
    return may_take(usli_cuda_of(x)->cudnn, a) ? places_of(a, pass).all : 0;
}

bool usli_cudnn_attention(usli_exec *x, const usli_attention_args *a, usli_pass pass, void *ws, usl_status *st) {
    const entry *e = find(x, a, pass);
    if (!e || !aligned(a, pass)) return false;
    char *base = reinterpret_cast<char *>(up(reinterpret_cast<uintptr_t>(ws)));
    cudnnStatus_t status = CUDNN_STATUS_SUCCESS;
    for (int64_t row = 0; row < a->rows; row += e->key.rows)
        for (int64_t head = 0; head < a->kv_heads && status == CUDNN_STATUS_SUCCESS; head += e->key.kv_heads)
            status = run_part(usli_cuda_of(x)->cudnn, e, a, row, head, base);
    *st = status == CUDNN_STATUS_SUCCESS
              ? USL_OK
              : usli_fail(x->ctx, USL_ERR_DEVICE,
                          "cuDNN answers status %d for an attention of %d rows of %lld; USL_ATTENTION=own does without",
                          (int)status, a->rows, (long long)a->max_q);
    return true;
}

/* Where it is the quicker one, as measured: Hopper, 1.3 to 1.8 times as quick as the own kernels. Older GPUs keep
 * these. */
enum { QUICKER_FROM = 90 };

usl_status usli_cudnn_open(usli_exec *x) {
    const char *choice = getenv("USL_ATTENTION");
    if (choice && strcmp(choice, "own") && strcmp(choice, "cudnn"))
        return usli_fail(x->ctx, USL_ERR_INVALID, "USL_ATTENTION is \"%s\"; it may be own or cudnn", choice);
    if (choice ? !strcmp(choice, "own") : usli_cuda_of(x)->sm < QUICKER_FROM) return USL_OK;
    usli_cudnn *c = static_cast<usli_cudnn *>(usli_calloc(x->ctx, 1, sizeof *c));
    if (!c) return usli_nomem(x->ctx, sizeof *c);
    usli_cuda_of(x)->cudnn = c;
    c->library = open_library();
    if (!c->library || !find_functions(c) || c->GetVersion() < OLDEST) usli_cudnn_close(x);
    return USL_OK;
}

usl_status usli_cudnn_open_absent(usli_exec *x) {
    usli_cuda_of(x)->cudnn = static_cast<usli_cudnn *>(usli_calloc(x->ctx, 1, sizeof(usli_cudnn)));
    return usli_cuda_of(x)->cudnn ? USL_OK : usli_nomem(x->ctx, sizeof(usli_cudnn));
}

void usli_cudnn_close(usli_exec *x) {
    usli_cudnn *c = usli_cuda_of(x)->cudnn;
    if (!c) return;
    for (size_t i = 0; i < c->count; i++) {
        forget(c, c->entries[i]);
        usli_free(x->ctx, c->entries[i]);
    }
    usli_free(x->ctx, c->entries);
    if (c->handle) c->Destroy(c->handle);
    if (c->library) dlclose(c->library);
    usli_free(x->ctx, c);
    usli_cuda_of(x)->cudnn = nullptr;
}

bool usli_cudnn_used(const usli_exec *x) {
    const usli_cudnn *c = usli_cuda_of(x)->cudnn;
    for (size_t i = 0; c && i < c->count; i++)
        if (c->entries[i]->plan) return true;
    return false;
}

#else

size_t usli_cudnn_attention_workspace(const usli_exec *, const usli_attention_args *, usli_pass) {
    return 0;
}

bool usli_cudnn_attention(usli_exec *, const usli_attention_args *, usli_pass, void *, usl_status *) {
    return false;
}

usl_status usli_cudnn_open(usli_exec *) {
    return USL_OK;
}

usl_status usli_cudnn_open_absent(usli_exec *) {
    return USL_OK;
}

void usli_cudnn_close(usli_exec *) {}

bool usli_cudnn_used(const usli_exec *) {
    return false;
}

#endif
