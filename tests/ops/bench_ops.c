/* The rate of the CPU's ops other than matrix products, on the shapes of a 135M model: 4 rows of 512 tokens.
 *
 *   cc -O2 -I. tests/ops/bench_ops.c build/libunsloth.a -ldnnl -ljansson -lpcre2-8 -lutf8proc -lm -ldl -lpthread -o
 * bench_ops
 *   ./bench_ops THREADS [WORD]        only those whose name contains WORD
 *
 * Prints the best of many repetitions: milliseconds, and GFLOP/s (attention: the causal half counted, five products in
 * backward) or GB/s (what the op must read and write once). */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "core/cpu/cpu.h"

enum {
    ROWS = 4,
    LEN = 512,
    T = ROWS * LEN,
    HEADS = 9,
    KV = 3,
    DIM = 64,
    HIDDEN = 576,
    INTER = 1536,
    VOCAB = 49152,
    CHUNK = 256,
    CACHE = 2048,
    PARAMS = 5 * 1000 * 1000,
    QKV = (HEADS + 2 * KV) * DIM
};

static usl_ctx *ctx;
static usli_exec x;
static usli_arena arena;
static const char *only = "";

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *filled(usl_dtype dtype, int64_t n) {
    enum { PERIOD = 4099 };
    usli_rng rng;
    usli_rng_seed(&rng, 3);
    float v[PERIOD];
    size_t e = usli_dtype_bytes(dtype);
    char *p = malloc((size_t)n * e);
    for (int i = 0; i < PERIOD; i++) v[i] = (float)usli_rng_normal(&rng);
    for (int64_t i = 0; i < n; i += PERIOD) usli_from_f32(v, p + (size_t)i * e, dtype, n - i < PERIOD ? n - i : PERIOD);
    return p;
}

/* work: floating-point operations or bytes of one run. */
static void measure(const char *name, usl_dtype dtype, usli_op op, void *args, usli_pass pass, double work,
                    const char *unit) {
    if (!strstr(name, only)) return;
    double best = 1e9, end = now() + 0.5;
    do {
        double t = now();
        if (usli_run(&x, op, args, pass) != USL_OK) {
            printf("%s: %s\n", name, usl_ctx_errmsg(ctx));
            return;
        }
        t = now() - t;
        if (t < best) best = t;
    } while (now() < end);
    printf("%-26s %-5s %9.3f ms %8.1f %s\n", name, usl_dtype_name(dtype), best * 1e3, work / best * 1e-9, unit);
}

static void attention(usl_dtype dtype) {
    int32_t cu[ROWS + 1], cu_q[ROWS + 1], cu_k[ROWS + 1];
    for (int i = 0; i <= ROWS; i++) cu[i] = i * LEN, cu_q[i] = i, cu_k[i] = i * CACHE;
    char *qkv = filled(dtype, (int64_t)T * QKV), *d = filled(dtype, (int64_t)T * QKV),
         *cache = filled(dtype, 2LL * ROWS * CACHE * KV * DIM);
    void *o = filled(dtype, T * HIDDEN), *d_o = filled(dtype, T * HIDDEN);
    float *lse = malloc(sizeof *lse * T * HEADS);
    size_t e = usli_dtype_bytes(dtype), k = HEADS * DIM * e, v = (HEADS + KV) * DIM * e;
    usli_attention_args a = { .tokens_q = T,
                              .tokens_k = T,
                              .rows = ROWS,
                              .cu_q = cu,
                              .cu_k = cu,
                              .max_q = LEN,
                              .max_k = LEN,
                              .causal = true,
                              .heads = HEADS,
                              .kv_heads = KV,
                              .qk_dim = DIM,
                              .v_dim = DIM,
                              .scale = 0.125f,
                              .dtype = dtype,
                              .q = qkv,
                              .k = qkv + k,
                              .v = qkv + v,
                              .q_stride = QKV,
                              .k_stride = QKV,
                              .v_stride = QKV,
                              .o = o,
                              .o_stride = HIDDEN,
                              .lse = lse,
                              .d_o = d_o,
                              .dq = d,
                              .dk = d + k,
                              .dv = d + v };
    double product = 2.0 * ROWS * HEADS * DIM * LEN * (LEN + 1) / 2;
    measure("attention, forward", dtype, USLI_OP_attention, &a, USLI_FORWARD, 2 * product, "GFLOP/s");
    measure("attention, backward", dtype, USLI_OP_attention, &a, USLI_BACKWARD, 5 * product, "GFLOP/s");
    a.tokens_q = ROWS, a.tokens_k = ROWS * CACHE, a.cu_q = cu_q, a.cu_k = cu_k, a.max_q = 1, a.max_k = CACHE,
    a.lse = NULL;
    a.k = cache, a.v = cache + (size_t)ROWS * CACHE * KV * DIM * e, a.k_stride = a.v_stride = KV * DIM;
    measure("attention, decode", dtype, USLI_OP_attention, &a, USLI_FORWARD, 2.0 * ROWS * CACHE * KV * DIM * (double)e,
            "GB/s");
    free(qkv), free(d), free(cache), free(o), free(d_o), free(lse);
}

static void rows(usl_dtype dtype) {
    double e = (double)usli_dtype_bytes(dtype), n = (double)T * HIDDEN;
    void *a = filled(dtype, T * HIDDEN), *b = filled(dtype, T * HIDDEN), *c = filled(dtype, T * HIDDEN),
         *w = filled(dtype, HIDDEN);
    float *rstd = malloc(sizeof *rstd * T), *dw = calloc(HIDDEN, sizeof *dw);
    usli_rmsnorm_args norm = { .rows = T,
                               .cols = HIDDEN,
                               .eps = 1e-5f,
                               .dtype = dtype,
                               .res_dtype = dtype,
                               .weight_dtype = dtype,
                               .x = a,
                               .res = b,
                               .res_out = b,
                               .weight = w,
                               .y = c,
                               .rstd = rstd,
                               .n = b,
                               .n_dtype = dtype,
                               .dy = a,
                               .dn = c,
                               .dn_mode = USLI_ACCUMULATE };
    measure("rmsnorm, forward", dtype, USLI_OP_rmsnorm, &norm, USLI_FORWARD, 4 * n * e, "GB/s");
    measure("rmsnorm, backward", dtype, USLI_OP_rmsnorm, &norm, USLI_BACKWARD, 4 * n * e, "GB/s");
    norm.dweight = dw;
    measure("rmsnorm, with dweight", dtype, USLI_OP_rmsnorm, &norm, USLI_BACKWARD, 4 * n * e, "GB/s");
    void *gate_up = filled(dtype, 2LL * T * INTER), *h = filled(dtype, (int64_t)T * INTER);
    usli_glu_args glu = { .rows = T,
                          .cols = INTER,
                          .act = USLI_SILU,
                          .dtype = dtype,
                          .gate_up = gate_up,
                          .h = h,
                          .dh = h,
                          .dgate_up = gate_up,
                          .h_out = h };
    measure("glu, forward", dtype, USLI_OP_glu, &glu, USLI_FORWARD, 3.0 * T * INTER * e, "GB/s");
    measure("glu, backward", dtype, USLI_OP_glu, &glu, USLI_BACKWARD, 6.0 * T * INTER * e, "GB/s");
    float *cos = filled(USL_F32, LEN * DIM / 2), *sin = filled(USL_F32, LEN * DIM / 2);
    int32_t *position = malloc(sizeof *position * T);
    for (int i = 0; i < T; i++) position[i] = i % LEN;
    char *qkv = filled(dtype, (int64_t)T * QKV);
    usli_rope_args rope = { .tokens = T,
                            .heads = HEADS,
                            .kv_heads = KV,
                            .head_dim = DIM,
                            .rot_dim = DIM,
                            .dtype = dtype,
                            .position = position,
                            .cos = cos,
                            .sin = sin,
                            .positions = LEN,
                            .q = qkv,
                            .k = qkv + (size_t)(HEADS * DIM) * (size_t)e,
                            .q_stride = QKV,
                            .k_stride = QKV };
    rope.dq = rope.q, rope.dk = rope.k;
    measure("rope, forward", dtype, USLI_OP_rope, &rope, USLI_FORWARD, 2.0 * T * (HEADS + KV) * DIM * e, "GB/s");
    measure("rope, backward", dtype, USLI_OP_rope, &rope, USLI_BACKWARD, 2.0 * T * (HEADS + KV) * DIM * e, "GB/s");
    void *logits = filled(dtype, (int64_t)CHUNK * VOCAB);
    int32_t target[CHUNK] = { 0 };
    float losses[CHUNK];
    usli_update update = { .inv_counted = 1, .loss_scale = 1 };
    usli_cross_entropy_args ce = { .rows = CHUNK,
                                   .cols = VOCAB,
                                   .dtype = dtype,
                                   .logit_scale = 1,
                                   .with_gradient = true,
                                   .logits = logits,
                                   .target = target,
                                   .losses = losses,
                                   .update = &update };
    measure("cross_entropy", dtype, USLI_OP_cross_entropy, &ce, USLI_FORWARD, 2.0 * CHUNK * VOCAB * e, "GB/s");
    free(a), free(b), free(c), free(w), free(rstd), free(dw), free(gate_up), free(h), free(cos), free(sin),
        free(position), free(qkv), free(logits);
}

static void updates(void) {
    usli_param p = { .w = filled(USL_F32, PARAMS),
                     .g = filled(USL_F32, PARAMS),
                     .n = PARAMS,
                     .weight_decay = 0.01f,
                     .state = USL_F32,
                     .m = calloc(PARAMS, 4),
                     .v = calloc(PARAMS, 4),
                     .m_absmax = calloc(PARAMS / 256 + 1, 4),
                     .v_absmax = calloc(PARAMS / 256 + 1, 4) };
    usli_update u = { .lr = { 1e-4f }, .loss_scale = 1, .max_norm = 1, .step = 1, .clip = 1, .finite = 1 };
    usli_grad_norm_args norm = { &p, 1, &u };
    usli_adamw_args adamw = { .params = &p, .count = 1, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .update = &u };
    measure("grad_norm", USL_F32, USLI_OP_grad_norm, &norm, USLI_FORWARD, 4.0 * PARAMS, "GB/s");
    measure("adamw", USL_F32, USLI_OP_adamw, &adamw, USLI_FORWARD, 32.0 * PARAMS, "GB/s");
    p.state = USL_U8;
    measure("adamw", USL_U8, USLI_OP_adamw, &adamw, USLI_FORWARD, 20.0 * PARAMS, "GB/s");
    free(p.w), free(p.g), free(p.m), free(p.v), free(p.m_absmax), free(p.v_absmax);
    float *logits = filled(USL_F32, VOCAB);
    int32_t out;
    uint64_t offset = 1;
    usli_sample_args s = { .rows = 1,
                           .cols = VOCAB,
                           .stride = VOCAB,
                           .logits = logits,
                           .temperature = 0,
                           .top_p = 1,
                           .repetition_penalty = 1,
                           .offset = &offset,
                           .out = &out };
    measure("sample, greedy", USL_F32, USLI_OP_sample, &s, USLI_FORWARD, 4.0 * VOCAB, "GB/s");
    s.temperature = 1;
    measure("sample, plain", USL_F32, USLI_OP_sample, &s, USLI_FORWARD, 4.0 * VOCAB, "GB/s");
    s.top_p = 0.9f, s.top_k = 50;
    measure("sample, top-k, top-p", USL_F32, USLI_OP_sample, &s, USLI_FORWARD, 4.0 * VOCAB, "GB/s");
    free(logits);
}

int main(int argc, char **argv) {
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    opts.threads = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 2) only = argv[2];
    enum { ROOM = 64 << 20 };
    void *room = aligned_alloc(64, ROOM);
    if (!room || usl_ctx_new(&opts, &ctx) != USL_OK || usli_cpu_open(ctx, &x) != USL_OK) return 1;
    usli_arena_init(&arena, room, ROOM);
    x.arena = &arena;
    attention(USL_F32), attention(USL_BF16), attention(USL_F16);
    rows(USL_F32), rows(USL_BF16);
    updates();
    x.backend->close(&x);
    usl_ctx_free(ctx);
    free(room);
    return 0;
}
