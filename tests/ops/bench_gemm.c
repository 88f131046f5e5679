/* The rate of the CPU's matrix products beside the library's own, on the shapes of a 135M model.
 *
 *   cc -O2 -I. tests/ops/bench_gemm.c build/libunsloth.a -ldnnl -ljansson -lpcre2-8 -lutf8proc -lm -ldl -lpthread \
 *      -o build/bench_gemm && OMP_NUM_THREADS=2 build/bench_gemm 2
 *
 * Prints the best of many repetitions, in GFLOP/s: ours, oneDNN's one call over all of it, the ratio. */
#define _POSIX_C_SOURCE 200809L
#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "core/base/dtype.h"
#include "core/cpu/cpu.h"
#include "core/cpu/gemm.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct problem {
    const char *name;
    int64_t m, n, k;
    int ta, tb, sum; /* sum: c += */
} problem;

typedef struct library {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_t primitive;
    dnnl_exec_arg_t args[3];
} library;

static void memory(library *l, int slot, int arg, int64_t rows, int64_t cols, int transposed, dnnl_data_type_t type,
                   void *data, dnnl_memory_desc_t *md) {
    dnnl_dims_t dims = { rows, cols }, strides = { transposed ? 1 : cols, transposed ? rows : 1 };
    dnnl_memory_desc_init_by_strides(md, 2, dims, type, strides);
    l->args[slot].arg = arg;
    dnnl_memory_create(&l->args[slot].memory, md, l->engine, data);
}

static int library_make(library *l, const problem *p, int bf16, void *a, void *b, void *c) {
    dnnl_memory_desc_t left, right, out;
    dnnl_data_type_t type = bf16 ? dnnl_bf16 : dnnl_f32;
    dnnl_engine_create(&l->engine, dnnl_cpu, 0);
    dnnl_stream_create(&l->stream, l->engine, dnnl_stream_default_flags);
    memory(l, 0, DNNL_ARG_SRC, p->m, p->k, p->ta, type, a, &left);
    memory(l, 1, DNNL_ARG_WEIGHTS, p->k, p->n, p->tb, type, b, &right);
    memory(l, 2, DNNL_ARG_DST, p->m, p->n, 0, dnnl_f32, c, &out);
    dnnl_matmul_desc_t desc;
    dnnl_primitive_desc_t pd;
    dnnl_matmul_desc_init(&desc, &left, &right, NULL, &out);
    if (dnnl_primitive_desc_create(&pd, &desc, NULL, l->engine, NULL) != dnnl_success) return 0;
    int ok = dnnl_primitive_create(&l->primitive, pd) == dnnl_success;
    dnnl_primitive_desc_destroy(pd);
    return ok;
}

static void library_free(library *l) {
    if (l->primitive) dnnl_primitive_destroy(l->primitive);
    for (int i = 0; i < 3; i++) dnnl_memory_destroy(l->args[i].memory);
    dnnl_stream_destroy(l->stream);
    dnnl_engine_destroy(l->engine);
}

enum { BUDGET_MS = 400, TURN = 5 };

static void measure(usli_exec *x, const problem *p, usl_dtype dtype) {
    size_t elem = usli_dtype_bytes(dtype);
    void *a = calloc((size_t)(p->m * p->k), elem), *b = calloc((size_t)(p->n * p->k), elem),
         *c = calloc((size_t)(p->m * p->n), 4);
    double flops = 2.0 * (double)p->m * (double)p->n * (double)p->k, ours = 1e9, theirs = 1e9;
    library l = { 0 };
    int has = library_make(&l, p, dtype == USL_BF16, a, b, c);
    double end = now() + BUDGET_MS * 1e-3;
    int64_t lda = p->ta ? p->m : p->k, ldb = p->tb ? p->k : p->n;
    /* In turn, so that a noisy neighbour hits both; several calls each, since OpenMP's threads spin on for a while. */
    do {
        for (int i = 0; i < TURN; i++) {
            double t = now();
            if (usli_gemm(x, p->ta, p->tb, p->m, p->n, p->k, 1, a, dtype, lda, b, dtype, ldb, p->sum ? 1 : 0, c,
                          USL_F32, p->n) != USL_OK)
                printf("%s\n", usl_ctx_errmsg(x->ctx));
            t = now() - t;
            if (t < ours) ours = t;
        }
        for (int i = 0; has && i < TURN; i++) {
            double t = now();
            dnnl_primitive_execute(l.primitive, l.stream, 3, l.args);
            dnnl_stream_wait(l.stream);
            t = now() - t;
            if (t < theirs) theirs = t;
        }
    } while (now() < end);
    printf("%-22s %5lld x %5lld x %5lld  %-5s %8.1f", p->name, (long long)p->m, (long long)p->n, (long long)p->k,
           usl_dtype_name(dtype), flops / ours * 1e-9);
    if (has)
        printf(" %8.1f  %.2f\n", flops / theirs * 1e-9, theirs / ours);
    else
        printf("        -\n");
    library_free(&l);
    free(a), free(b), free(c);
}

int main(int argc, char **argv) {
    static const problem problems[] = {
        { "gate, forward", 512, 1536, 576, 0, 1, 0 },
        { "o, forward", 2048, 576, 576, 0, 1, 0 },
        { "gate|up, forward", 2048, 3072, 576, 0, 1, 0 },
        { "down, forward", 2048, 576, 1536, 0, 1, 0 },
        { "gate|up, dx", 2048, 576, 3072, 0, 0, 0 },
        { "down, dx", 2048, 1536, 576, 0, 0, 0 },
        { "x A^T", 2048, 32, 576, 0, 1, 0 },
        { "dy B", 2048, 16, 1536, 0, 0, 0 },
        { "dA", 16, 576, 2048, 1, 0, 1 },
        { "dB", 1536, 16, 2048, 1, 0, 1 },
        { "dW", 1536, 576, 2048, 1, 0, 1 },
        { "head", 256, 49152, 576, 0, 1, 0 },
    };
    usl_ctx *ctx;
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    opts.threads = argc > 1 ? atoi(argv[1]) : 0;
    usli_exec x = { 0 };
    if (usl_ctx_new(&opts, &ctx) != USL_OK || usli_cpu_open(ctx, &x) != USL_OK) return 1;
    printf("%-22s %21s  %-5s %8s %8s  ratio\n", "", "m x n x k", "type", "ours", "oneDNN");
    for (size_t i = 0; i < sizeof problems / sizeof *problems; i++) {
        measure(&x, &problems[i], USL_F32);
        measure(&x, &problems[i], USL_BF16);
    }
    x.backend->close(&x);
    usl_ctx_free(ctx);
    return 0;
}
