#define _GNU_SOURCE
#include "core/cpu/blas.h"

#include <dlfcn.h>
#include <string.h>

#include "core/base/pool.h"

/* A symbol of a library that is loaded anyway, or NULL: how many threads a call uses is not in any C header we have. */
typedef void (*set_threads_fn)(int);
typedef int (*get_threads_fn)(void);
typedef union symbol {
    void *object;
    set_threads_fn set;
    get_threads_fn get;
} symbol;

static symbol find(const char *name) {
    symbol s;
    s.object = dlsym(RTLD_DEFAULT, name);
    return s;
}

#ifdef USL_HAVE_DNNL
#include <oneapi/dnnl/dnnl.h>

enum { SLOTS = 4096, FULL = 512, NOTE_ARGS = 4 };

/* A primitive with its descriptors, found by its call. */
typedef struct entry {
    usli_blas_call call;
    dnnl_primitive_t primitive; /* NULL: a free slot */
    const dnnl_memory_desc_t *left, *right, *out, *scratch;
    size_t scratch_bytes;
} entry;

struct usli_blas {
    usl_ctx *ctx;
    dnnl_engine_t engine;
    set_threads_fn set_threads; /* OpenMP's, of the calling thread alone */
    get_threads_fn get_threads;
    bool bf16;
    int entries;
    entry table[SLOTS];
    size_t scratch_bytes;
    int workers;
    struct {
        dnnl_stream_t stream;
        void *scratch;
    } worker[];
};

static usl_status library_failed(usl_ctx *ctx, dnnl_status_t st) {
    if (st == dnnl_out_of_memory) return usli_nomem(ctx, 0);
    return usli_fail(ctx, USL_ERR_INTERNAL, "oneDNN: status %d", (int)st);
}

/* AVX-512 without bfloat16 instructions would emulate them, more slowly than float32. */
static bool processor_has_bf16(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

usl_status usli_blas_new(usl_ctx *ctx, usli_blas **out) {
    *out = NULL;
    int workers = usli_pool_threads(ctx->pool);
    usli_blas *b = usli_calloc(ctx, 1, sizeof *b + (size_t)workers * sizeof b->worker[0]);
    if (!b) return usli_nomem(ctx, sizeof *b);
    b->ctx = ctx;
    b->workers = workers;
    b->bf16 = processor_has_bf16();
    b->set_threads = find("omp_set_num_threads").set;
    b->get_threads = find("omp_get_max_threads").get;
    dnnl_status_t st = dnnl_engine_create(&b->engine, dnnl_cpu, 0);
    for (int i = 0; st == dnnl_success && i < workers; i++)
        st = dnnl_stream_create(&b->worker[i].stream, b->engine, dnnl_stream_default_flags);
    if (st != dnnl_success) {
        usli_blas_free(b);
        return library_failed(ctx, st);
    }
    *out = b;
    return USL_OK;
}

static void forget(usli_blas *b) {
    for (int i = 0; i < SLOTS; i++)
        if (b->table[i].primitive) dnnl_primitive_destroy(b->table[i].primitive);
    memset(b->table, 0, sizeof b->table);
    b->entries = 0;
}

void usli_blas_free(usli_blas *b) {
    if (!b) return;
    forget(b);
    for (int i = 0; i < b->workers; i++) {
        if (b->worker[i].stream) dnnl_stream_destroy(b->worker[i].stream);
        usli_free_aligned(b->ctx, b->worker[i].scratch);
    }
    if (b->engine) dnnl_engine_destroy(b->engine);
    usli_free(b->ctx, b);
}

bool usli_blas_has_bf16(const usli_blas *b) {
    return b->bf16;
}

bool usli_blas_wants_blocks(const usli_blas *b) {
    (void)b;
#if defined(__x86_64__)
    return !__builtin_cpu_supports("avx512f");
#else
    return false;
#endif
}

void usli_blas_trim(usli_blas *b) {
    if (b->entries > FULL) forget(b);
}

/* The slot that holds the call, or the free one where it belongs. */
static entry *slot_of(usli_blas *b, const usli_blas_call *call) {
    const unsigned char *bytes = (const unsigned char *)call;
    uint64_t h = 0x9E3779B97F4A7C15u;
    for (size_t i = 0; i < sizeof *call; i += 8) {
        uint64_t word;
        memcpy(&word, bytes + i, 8);
        h = (h ^ word) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    entry *e = &b->table[h % SLOTS];
    while (e->primitive && memcmp(&e->call, call, sizeof *call) != 0) e = e == &b->table[SLOTS - 1] ? b->table : e + 1;
    return e;
}

/* (rows, cols) as the product sees them, stored with the other order when transposed. */
static dnnl_status_t describe(dnnl_memory_desc_t *md, int64_t rows, int64_t cols, bool transposed, int64_t ld,
                              dnnl_data_type_t type) {
    dnnl_dims_t dims = { rows, cols };
    dnnl_dims_t strides = { transposed ? 1 : ld, transposed ? ld : 1 };
    return dnnl_memory_desc_init_by_strides(md, 2, dims, type, strides);
}

static dnnl_status_t make_attributes(dnnl_primitive_attr_t *attr, bool accumulate) {
    dnnl_post_ops_t ops = NULL;
    dnnl_status_t st = dnnl_primitive_attr_create(attr);
    /* The library's own scratch belongs to the thread that made the primitive; ours to the worker that runs it. */
    if (st == dnnl_success) st = dnnl_primitive_attr_set_scratchpad_mode(*attr, dnnl_scratchpad_mode_user);
    if (st == dnnl_success && accumulate) {
        st = dnnl_post_ops_create(&ops);
        if (st == dnnl_success) st = dnnl_post_ops_append_sum(ops, 1.0f);
        if (st == dnnl_success) st = dnnl_primitive_attr_set_post_ops(*attr, ops);
        if (ops) dnnl_post_ops_destroy(ops);
    }
    return st;
}

static dnnl_status_t make_primitive(usli_blas *b, const usli_blas_call *c, entry *e) {
    dnnl_data_type_t type = c->bf16 ? dnnl_bf16 : dnnl_f32;
    dnnl_memory_desc_t left, right, out;
    dnnl_matmul_desc_t desc;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_status_t st = describe(&left, c->m, c->k, c->ta, c->lda, type);
    if (st == dnnl_success) st = describe(&right, c->k, c->n, c->tb, c->ldb, type);
    if (st == dnnl_success) st = describe(&out, c->m, c->n, false, c->ldc, dnnl_f32);
    if (st == dnnl_success) st = dnnl_matmul_desc_init(&desc, &left, &right, NULL, &out);
    if (st == dnnl_success) st = make_attributes(&attr, c->accumulate);
    if (st == dnnl_success) st = dnnl_primitive_desc_create(&pd, &desc, attr, b->engine, NULL);
    if (st == dnnl_success) st = dnnl_primitive_create(&e->primitive, pd);
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (attr) dnnl_primitive_attr_destroy(attr);
    if (st != dnnl_success) {
        e->primitive = NULL;
        return st;
    }
    const_dnnl_primitive_desc_t own; /* lives as long as the primitive */
    dnnl_primitive_get_primitive_desc(e->primitive, &own);
    e->left = dnnl_primitive_desc_query_md(own, dnnl_query_src_md, 0);
    e->right = dnnl_primitive_desc_query_md(own, dnnl_query_weights_md, 0);
    e->out = dnnl_primitive_desc_query_md(own, dnnl_query_dst_md, 0);
    e->scratch = dnnl_primitive_desc_query_md(own, dnnl_query_scratchpad_md, 0);
    e->scratch_bytes = e->scratch ? dnnl_memory_desc_get_size(e->scratch) : 0;
    e->call = *c;
    return dnnl_success;
}

static usl_status grow_scratch(usli_blas *b, size_t bytes) {
    if (bytes <= b->scratch_bytes) return USL_OK;
    b->scratch_bytes = 0;
    for (int i = 0; i < b->workers; i++) {
        usli_free_aligned(b->ctx, b->worker[i].scratch);
        b->worker[i].scratch = usli_malloc_aligned(b->ctx, bytes);
        if (!b->worker[i].scratch) return usli_nomem(b->ctx, bytes);
    }
    b->scratch_bytes = bytes;
    return USL_OK;
}

/* OpenMP must neither start threads of its own nor keep our setting in the host's thread. */
static int hush(const usli_blas *b) {
    int before = b->get_threads ? b->get_threads() : 1;
    if (before != 1 && b->set_threads) b->set_threads(1);
    return before;
}

static void unhush(const usli_blas *b, int before) {
    if (before != 1 && b->set_threads) b->set_threads(before);
}

usl_status usli_blas_prepare(usli_blas *b, const usli_blas_call *call) {
    entry *e = slot_of(b, call);
    if (!e->primitive) {
        /* Primitives are cut for the number of threads that is set when they are made. */
        int before = hush(b);
        dnnl_status_t st = make_primitive(b, call, e);
        unhush(b, before);
        if (st != dnnl_success) return library_failed(b->ctx, st);
        b->entries++;
    }
    return grow_scratch(b, e->scratch_bytes);
}

typedef struct execution {
    dnnl_primitive_t primitive;
    dnnl_stream_t stream;
    int count;
    const dnnl_exec_arg_t *args;
    dnnl_status_t status;
} execution;

static void execute(void *arg) {
    execution *e = arg;
    e->status = dnnl_primitive_execute(e->primitive, e->stream, e->count, e->args);
}

bool usli_blas_run(usli_blas *b, const usli_blas_call *call, const void *left, const void *right, float *out,
                   int worker) {
    const entry *e = slot_of(b, call);
    if (!e->primitive) return false;
    const dnnl_memory_desc_t *md[NOTE_ARGS] = { e->left, e->right, e->out, e->scratch };
    /* The library takes writable pointers to what it only reads. */
    void *data[NOTE_ARGS] = { (void *)(uintptr_t)left, (void *)(uintptr_t)right, out, b->worker[worker].scratch };
    dnnl_exec_arg_t args[NOTE_ARGS] = {
        { DNNL_ARG_SRC, NULL }, { DNNL_ARG_WEIGHTS, NULL }, { DNNL_ARG_DST, NULL }, { DNNL_ARG_SCRATCHPAD, NULL }
    };
    int count = e->scratch_bytes ? NOTE_ARGS : NOTE_ARGS - 1;
    int before = hush(b);
    dnnl_status_t st = dnnl_success;
    for (int i = 0; i < count && st == dnnl_success; i++)
        st = dnnl_memory_create(&args[i].memory, md[i], b->engine, data[i]);
    if (st == dnnl_success) {
        /* oneDNN's generated code uses the stack pointer for numbers that point anywhere: a signal's frame would be
         * written over the heap. */
        execution run = { e->primitive, b->worker[worker].stream, count, args, dnnl_success };
        usli_without_signals(execute, &run);
        st = run.status;
    }
    for (int i = 0; i < count; i++)
        if (args[i].memory) dnnl_memory_destroy(args[i].memory);
    unhush(b, before);
    return st == dnnl_success;
}

#else
#include <cblas.h>

struct usli_blas {
    usl_ctx *ctx;
};

usl_status usli_blas_new(usl_ctx *ctx, usli_blas **out) {
    *out = usli_calloc(ctx, 1, sizeof **out);
    if (!*out) return usli_nomem(ctx, sizeof **out);
    (*out)->ctx = ctx;
    /* OpenBLAS' setting is the whole process's; calls from several of our threads must not start more. */
    symbol set = find("openblas_set_num_threads");
    if (set.set) set.set(1);
    return USL_OK;
}

void usli_blas_free(usli_blas *b) {
    if (b) usli_free(b->ctx, b);
}

bool usli_blas_has_bf16(const usli_blas *b) {
    (void)b;
    return false;
}

bool usli_blas_wants_blocks(const usli_blas *b) {
    (void)b;
    return false;
}

usl_status usli_blas_prepare(usli_blas *b, const usli_blas_call *call) {
    if (call->m <= INT32_MAX && call->n <= INT32_MAX && call->k <= INT32_MAX && call->lda <= INT32_MAX &&
        call->ldb <= INT32_MAX && call->ldc <= INT32_MAX)
        return USL_OK;
    return usli_fail(b->ctx, USL_ERR_UNSUPPORTED,
                     "CBLAS: a matrix has more than 2^31 rows or columns; build with oneDNN");
}

void usli_blas_trim(usli_blas *b) {
    (void)b;
}

bool usli_blas_run(usli_blas *b, const usli_blas_call *call, const void *left, const void *right, float *out,
                   int worker) {
    (void)b, (void)worker;
    cblas_sgemm(CblasRowMajor, call->ta ? CblasTrans : CblasNoTrans, call->tb ? CblasTrans : CblasNoTrans, (int)call->m,
                (int)call->n, (int)call->k, 1.0f, left, (int)call->lda, right, (int)call->ldb,
                call->accumulate ? 1.0f : 0.0f, out, (int)call->ldc);
    return true;
}
#endif
