/* Times attention on the GPU, own kernels against cuDNN's, at the shapes of Llama-3-8B: medians of 20 after 3, by
 * CUDA's events. "first" is the first call, with building cuDNN's plan; "differs" is how far cuDNN's result is from the
 * own kernels', of its size; "repeats" says whether two runs gave the same bits.
 *
 *     build/tests/time_attention */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "kernels/device.cuh"

extern "C" {
#include "core/tensor/arena.h"
#include "core/base/ctx.h"
}

enum { HEADS = 32, KV_HEADS = 8, DIM = 128, WIDTH = (HEADS + 2 * KV_HEADS) * DIM, RUNS = 20, WARM = 3 };

typedef struct shape {
    int rows;
    int64_t length;
} shape;

typedef struct way {
    const char *name, *choice;
    bool deterministic;
} way;

static const shape SHAPES[] = { { 2, 2048 }, { 1, 8192 }, { 2, 4096 } };
static const way WAYS[] = { { "own", "own", true },
                            { "cuDNN", "cudnn", true },
                            { "cuDNN, any order", "cudnn", false } };

/* Device memory: all that one shape needs. */
typedef struct buffers {
    unsigned short *qkv, *o, *d_o, *d_qkv;
    float *lse;
    int32_t *cu;
    void *arena;
    size_t arena_bytes;
} buffers;

__global__ void fill(unsigned short *p, int64_t n, uint32_t seed) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 2654435761u + seed;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13, h *= 3266489917u, h ^= h >> 16;
        float v = ((float)(h & 0xffff) + (float)(h >> 16)) / 65536.0f - 1.0f; /* a triangle about 0 */
        p[i] = __bfloat16_as_ushort(__float2bfloat16_rn(2.4f * v));
    }
}

static void must(bool good, const char *what) {
    if (good) return;
    fprintf(stderr, "time_attention: %s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
    exit(1);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static usli_attention_args args_of(const shape *s, const buffers *b, bool deterministic) {
    usli_attention_args a = {};
    a.rows = s->rows, a.max_q = a.max_k = s->length, a.tokens_q = a.tokens_k = s->rows * s->length;
    a.cu_q = a.cu_k = b->cu;
    a.causal = true, a.heads = HEADS, a.kv_heads = KV_HEADS, a.qk_dim = a.v_dim = DIM, a.scale = 1 / sqrtf(DIM);
    a.dtype = USL_BF16;
    a.q = b->qkv, a.k = b->qkv + HEADS * DIM, a.v = b->qkv + (HEADS + KV_HEADS) * DIM;
    a.q_stride = a.k_stride = a.v_stride = WIDTH, a.o_stride = HEADS * DIM;
    a.o = b->o, a.lse = b->lse, a.deterministic = deterministic, a.d_o = b->d_o;
    a.dq = b->d_qkv, a.dk = b->d_qkv + HEADS * DIM, a.dv = b->d_qkv + (HEADS + KV_HEADS) * DIM;
    return a;
}

static void run(usli_exec *x, usli_attention_args *a, usli_pass pass, const buffers *b) {
    usli_arena_init(x->arena, b->arena, b->arena_bytes);
    must(usli_run(x, USLI_OP_attention, a, pass) == USL_OK, usl_ctx_errmsg(x->ctx));
}

static int ascending(const void *a, const void *b) {
    float d = *(const float *)a - *(const float *)b;
    return d < 0 ? -1 : d > 0;
}

/* Median milliseconds; *first gets the first call's. */
static float time_pass(usli_exec *x, usli_attention_args *a, usli_pass pass, const buffers *b, double *first) {
    cudaEvent_t begin, end;
    cudaStream_t stream = static_cast<cudaStream_t>(x->stream);
    float ms[RUNS];
    must(cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess, "events");
    double t = seconds();
    run(x, a, pass, b);
    must(cudaStreamSynchronize(stream) == cudaSuccess, "the first run");
    *first = 1e3 * (seconds() - t);
    for (int i = -WARM; i < RUNS; i++) {
        cudaEventRecord(begin, stream);
        run(x, a, pass, b);
        cudaEventRecord(end, stream);
        must(cudaEventSynchronize(end) == cudaSuccess, "a run");
        if (i >= 0) cudaEventElapsedTime(&ms[i], begin, end);
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    qsort(ms, RUNS, sizeof *ms, ascending);
    return (ms[RUNS / 2] + ms[(RUNS - 1) / 2]) / 2;
}

/* o, then the gradients; on the host. */
static unsigned short *results(const shape *s, const buffers *b, int64_t *count) {
    int64_t tokens = s->rows * s->length, n = tokens * HEADS * DIM, all = n + tokens * WIDTH;
    unsigned short *host = (unsigned short *)malloc((size_t)all * 2);
    must(host && cudaMemcpy(host, b->o, (size_t)n * 2, cudaMemcpyDeviceToHost) == cudaSuccess &&
             cudaMemcpy(host + n, b->d_qkv, (size_t)(all - n) * 2, cudaMemcpyDeviceToHost) == cudaSuccess,
         "results");
    *count = all;
    return host;
}

static double as_number(unsigned short bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

static double difference(const unsigned short *got, const unsigned short *want, int64_t from, int64_t to) {
    double wrong = 0, size = 0;
    for (int64_t i = from; i < to; i++) {
        double d = as_number(got[i]) - as_number(want[i]);
        wrong += d * d, size += as_number(want[i]) * as_number(want[i]);
    }
    return sqrt(wrong / size);
}

static void time_shape(usl_ctx *ctx, const shape *s) {
    int64_t tokens = s->rows * s->length, all = 0;
    buffers b = {};
    int32_t cu[3] = { 0, (int32_t)s->length, (int32_t)(2 * s->length) };
    b.arena_bytes = (size_t)3 << 30;
    must(cudaMalloc(&b.qkv, (size_t)tokens * WIDTH * 2) == cudaSuccess &&
             cudaMalloc(&b.d_qkv, (size_t)tokens * WIDTH * 2) == cudaSuccess &&
             cudaMalloc(&b.o, (size_t)tokens * HEADS * DIM * 2) == cudaSuccess &&
             cudaMalloc(&b.d_o, (size_t)tokens * HEADS * DIM * 2) == cudaSuccess &&
             cudaMalloc(&b.lse, (size_t)tokens * HEADS * sizeof(float)) == cudaSuccess &&
             cudaMalloc(&b.cu, sizeof cu) == cudaSuccess && cudaMalloc(&b.arena, b.arena_bytes) == cudaSuccess,
         "memory");
    fill<<<1024, 256>>>(b.qkv, tokens * WIDTH, 1);
    fill<<<1024, 256>>>(b.d_o, tokens * HEADS * DIM, 2);
    must(cudaMemcpy(b.cu, cu, sizeof cu, cudaMemcpyHostToDevice) == cudaSuccess, "the rows");
    double flops = 2.0 * (double)(s->rows * s->length * s->length * HEADS * DIM); /* 2 products, half of each */
    unsigned short *own = nullptr;
    for (const way &w : WAYS) {
        usli_exec x = {};
        usli_arena arena;
        setenv("USL_ATTENTION", w.choice, 1);
        must(usli_cuda_open(ctx, 0, &x) == USL_OK, usl_ctx_errmsg(ctx));
        x.arena = &arena;
        usli_attention_args a = args_of(s, &b, w.deterministic);
        double first[2];
        size_t room = x.backend->ops[USLI_OP_attention]->workspace(&x, &a, USLI_BACKWARD);
        float forward = time_pass(&x, &a, USLI_FORWARD, &b, &first[0]);
        float backward = time_pass(&x, &a, USLI_BACKWARD, &b, &first[1]);
        unsigned short *once = results(s, &b, &all);
        must(cudaMemset(b.d_qkv, 0x3c, (size_t)tokens * WIDTH * 2) == cudaSuccess, "clearing");
        run(&x, &a, USLI_FORWARD, &b);
        run(&x, &a, USLI_BACKWARD, &b);
        must(cudaStreamSynchronize(static_cast<cudaStream_t>(x.stream)) == cudaSuccess, "the second run");
        unsigned short *twice = results(s, &b, &all);
        if (!own) own = once;
        int64_t n = tokens * HEADS * DIM;
        const char *libraries = x.backend->libraries(&x);
        printf("%dx%-5lld %-17s %8.3f %7.0f  %8.3f %7.0f  %7.0f %7.0f/%-7.0f %.1e/%.1e  %-3s  %s\n", s->rows,
               (long long)s->length, w.name, forward, flops / forward * 1e-9, backward, 2.5 * flops / backward * 1e-9,
               (double)room / (1 << 20), first[0], first[1], difference(once, own, 0, n), difference(once, own, n, all),
               memcmp(once, twice, (size_t)all * 2) ? "no" : "yes", libraries);
        fflush(stdout);
        free(twice);
        if (once != own) free(once);
        x.backend->close(&x);
    }
    free(own);
    cudaFree(b.qkv), cudaFree(b.d_qkv), cudaFree(b.o), cudaFree(b.d_o), cudaFree(b.lse), cudaFree(b.cu);
    cudaFree(b.arena);
}

int main(void) {
    usl_ctx *ctx = nullptr;
    if (!usli_cuda_count()) {
        puts("SKIP: no GPU is here");
        return 77;
    }
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    must(usl_ctx_new(&opts, &ctx) == USL_OK, "the context");
    puts("rows      by                 forward TFLOP/s  backward TFLOP/s  MiB room first ms, f/b   differs o/gradients "
         "repeats  libraries");
    for (const shape &s : SHAPES) time_shape(ctx, &s);
    usl_ctx_free(ctx);
    return 0;
}
