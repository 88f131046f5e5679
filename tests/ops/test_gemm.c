/* Matrix products against a sum in double, and the same bits with any number of threads. */
#include "core/cpu/gemm.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include "tests/ops/rig.h"

typedef struct shape {
    int64_t m, n, k;
    bool ta, tb;
    usl_dtype adt, bdt, cdt;
    float alpha, beta;
} shape;

static void make(rig *r, const shape *s, void *c, const void *a, const void *b) {
    int64_t lda = (s->ta ? s->m : s->k) + 3, ldb = (s->tb ? s->k : s->n) + 5, ldc = s->n + 1;
    CHECK_OK(r->ctx, usli_gemm(&r->x, s->ta, s->tb, s->m, s->n, s->k, s->alpha, a, s->adt, lda, b, s->bdt, ldb, s->beta,
                               c, s->cdt, ldc));
}

static void check(rig *rigs, const shape *s) {
    usli_rng rng;
    usli_rng_seed(&rng, 7);
    int64_t lda = (s->ta ? s->m : s->k) + 3, ldb = (s->tb ? s->k : s->n) + 5, ldc = s->n + 1;
    float *av, *bv, *cv;
    void *a = rig_random(&rng, s->adt, (s->ta ? s->k : s->m) * lda, &av);
    void *b = rig_random(&rng, s->bdt, (s->tb ? s->n : s->k) * ldb, &bv);
    size_t bytes = (size_t)(s->m * ldc) * usli_dtype_bytes(s->cdt);
    void *c0 = rig_random(&rng, s->cdt, s->m * ldc, &cv), *c = malloc(bytes + 1), *other = malloc(bytes + 1);
    float *want = malloc(sizeof(float) * (size_t)(s->m * ldc + 1)),
          *got = malloc(sizeof(float) * (size_t)(s->m * ldc + 1));
    for (int64_t i = 0; i < s->m; i++)
        for (int64_t j = 0; j < ldc; j++) {
            double sum = 0;
            for (int64_t k = 0; k < s->k && j < s->n; k++)
                sum += (double)av[s->ta ? k * lda + i : i * lda + k] * (double)bv[s->tb ? j * ldb + k : k * ldb + j];
            float *w = &want[i * ldc + j];
            *w = j < s->n ? (float)((double)s->alpha * sum + (double)s->beta * (double)cv[i * ldc + j])
                          : cv[i * ldc + j];
        }
    memcpy(c, c0, bytes);
    make(&rigs[0], s, c, a, b);
    usli_to_f32(c, s->cdt, got, s->m * ldc);
    double error = test_rel_error(got, want, (size_t)(s->m * ldc)),
           bound = s->cdt == USL_F32 ? 1e-6 : rig_epsilon(s->cdt);
    CHECK(error <= bound, "%lld x %lld x %lld, ta %d tb %d, %s %s %s: %g > %g", (long long)s->m, (long long)s->n,
          (long long)s->k, s->ta, s->tb, usl_dtype_name(s->adt), usl_dtype_name(s->bdt), usl_dtype_name(s->cdt), error,
          bound);
    for (int64_t i = 0; i < s->m; i++)
        CHECK(got[i * ldc + s->n] == cv[i * ldc + s->n], "the gap of row %lld was written", (long long)i);
    for (int i = 1; i < 3; i++) {
        memcpy(other, c0, bytes);
        make(&rigs[i], s, other, a, b);
        CHECK(memcmp(c, other, bytes) == 0, "other bits with other threads");
    }
    free(a), free(b), free(c0), free(c), free(other), free(want), free(got), free(av), free(bv), free(cv);
}

static void test_shapes(rig *rigs) {
    static const int64_t sizes[][3] = { { 1, 1, 1 },      { 1, 17, 65 },    { 3, 65, 17 },
                                        { 17, 3, 1 },     { 65, 1, 300 },   { 257, 16, 33 },
                                        { 300, 520, 70 }, { 16, 530, 600 }, { 70, 131, 1100 } };
    static const usl_dtype types[][3] = { { USL_F32, USL_F32, USL_F32 },
                                          { USL_BF16, USL_BF16, USL_F32 },
                                          { USL_BF16, USL_BF16, USL_BF16 },
                                          { USL_F16, USL_F32, USL_F16 },
                                          { USL_F32, USL_BF16, USL_F32 } };
    int turn = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t t = 0; t < sizeof types / sizeof *types; t++)
            for (int order = 0; order < 4; order++, turn++) {
                shape s = { sizes[i][0],
                            sizes[i][1],
                            sizes[i][2],
                            order & 1,
                            order >> 1,
                            types[t][0],
                            types[t][1],
                            types[t][2],
                            turn % 3 == 0 ? 0.5f : 1,
                            turn % 5 == 0   ? 1.0f
                            : turn % 7 == 0 ? 0.25f
                                            : 0 };
                check(rigs, &s);
            }
}

/* beta = 0 must not read what was there, and no terms at all are a zero. */
static void test_assign_over_nan(rig *r) {
    float a[6] = { 1, 2, 3, 4, 5, 6 }, c[4] = { NAN, NAN, NAN, NAN };
    uint16_t half[4] = { 0x7fff, 0x7fff, 0x7fff, 0x7fff };
    CHECK_OK(r->ctx, usli_gemm(&r->x, false, true, 2, 2, 3, 1, a, USL_F32, 3, a, USL_F32, 3, 0, c, USL_F32, 2));
    CHECK(c[0] == 14 && c[1] == 32 && c[2] == 32 && c[3] == 77, "%g %g %g %g", (double)c[0], (double)c[1], (double)c[2],
          (double)c[3]);
    CHECK_OK(r->ctx, usli_gemm(&r->x, false, true, 2, 2, 3, 1, a, USL_F32, 3, a, USL_F32, 3, 0, half, USL_BF16, 2));
    CHECK(half[0] == 0x4160, "%x", half[0]);
    c[0] = NAN;
    CHECK_OK(r->ctx, usli_gemm(&r->x, false, true, 2, 2, 0, 1, a, USL_F32, 3, a, USL_F32, 3, 0, c, USL_F32, 2));
    CHECK(c[0] == 0 && c[3] == 0, "%g", (double)c[0]);
}

/* More shapes than are remembered. */
static void test_many_shapes(rig *r) {
    static float a[64 * 64], c[64 * 64];
    for (int i = 0; i < 64 * 64; i++) a[i] = 1;
    int wrong = 0;
    for (int m = 1; m <= 40; m++)
        for (int n = 1; n <= 40; n++) {
            CHECK_OK(r->ctx,
                     usli_gemm(&r->x, false, false, m, n, 3, 1, a, USL_F32, 64, a, USL_F32, 64, 0, c, USL_F32, 64));
            wrong += c[(m - 1) * 64 + n - 1] != 3;
        }
    CHECK(wrong == 0, "%d of 1600 products are wrong", wrong);
}

/* Every allocation fails in turn: an error, nothing lost, and the next try works. */
typedef struct scarce {
    int left;
} scarce;

static void *scarce_realloc(void *ud, void *ptr, size_t size) {
    scarce *s = ud;
    if (size == 0) {
        free(ptr);
        return NULL;
    }
    if (s->left == 0) return NULL;
    if (s->left > 0) s->left--;
    return realloc(ptr, size);
}

static void test_no_memory(void) {
    static uint16_t a[100 * 600];
    static float c[100 * 100];
    int fails = 0;
    for (int n = 0;; n++) {
        scarce s = { n };
        usl_ctx_opts opts = USL_CTX_OPTS_INIT;
        opts.realloc_fn = scarce_realloc;
        opts.realloc_ud = &s;
        opts.threads = 2;
        usl_ctx *ctx;
        usl_status st = usl_ctx_new(&opts, &ctx);
        if (st == USL_OK) {
            usli_exec x = { 0 };
            st = usli_cpu_open(ctx, &x);
            if (st == USL_OK) {
                for (int again = 0; again < 2; again++) {
                    usl_status run = usli_gemm(&x, true, false, 100, 100, 600, 1, a, USL_F16, 100, a, USL_F16, 100, 0,
                                               c, USL_F32, 100);
                    if (again)
                        CHECK_OK(ctx, run);
                    else
                        st = run;
                    s.left = -1;
                }
                x.backend->close(&x);
            }
            usl_ctx_free(ctx);
        }
        CHECK(st == USL_OK || st == USL_ERR_NOMEM, "%s", usl_status_name(st));
        if (st == USL_OK) break;
        fails++;
    }
    CHECK(fails >= 5, "only %d allocations", fails);
}

/* A second thread sends one signal after the other to the one that multiplies; their frames must lie on its stack. */
static atomic_int signals_taken, signals_astray, signals_end;
static char *stack_of_main;

static void take_signal(int number) {
    char here[1];
    (void)number;
    uintptr_t below = (uintptr_t)stack_of_main - (uintptr_t)here;
    atomic_fetch_add(&signals_astray, below > 1 << 20);
    atomic_fetch_add(&signals_taken, 1);
}

static void *send_signals(void *arg) {
    for (int sent = 0; !atomic_load(&signals_end);) {
        if (sent > atomic_load(&signals_taken))
            sched_yield();
        else if (++sent)
            pthread_kill(*(pthread_t *)arg, SIGUSR1);
    }
    return NULL;
}

static void test_signals(rig *r) {
    enum { M = 128, N = 256, K = 256, TURNS = 100 };
    usli_rng rng;
    usli_rng_seed(&rng, 11);
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = take_signal;
    sigaction(SIGUSR1, &action, &before);
    char frame[1];
    stack_of_main = frame;
    pthread_t self = pthread_self(), sender;
    for (int t = 0; t < 8; t++) {
        usl_dtype dt = t & 1 ? USL_BF16 : USL_F32;
        bool ta = t & 2, tb = t & 4;
        float *values, *want = malloc(sizeof(float) * M * N), *got = malloc(sizeof(float) * M * N);
        void *a = rig_random(&rng, dt, M * K, &values);
        free(values);
        void *b = rig_random(&rng, dt, K * N, &values);
        free(values);
        CHECK_OK(r->ctx,
                 usli_gemm(&r->x, ta, tb, M, N, K, 1, a, dt, ta ? M : K, b, dt, tb ? K : N, 0, want, USL_F32, N));
        atomic_store(&signals_taken, 0);
        atomic_store(&signals_end, 0);
        CHECK(pthread_create(&sender, NULL, send_signals, &self) == 0, "no thread");
        int wrong = 0;
        for (int i = 0; i < TURNS || atomic_load(&signals_taken) == 0; i++) {
            usl_status st =
                usli_gemm(&r->x, ta, tb, M, N, K, 1, a, dt, ta ? M : K, b, dt, tb ? K : N, 0, got, USL_F32, N);
            wrong += st != USL_OK || memcmp(want, got, sizeof(float) * M * N) != 0;
        }
        atomic_store(&signals_end, 1);
        pthread_join(sender, NULL);
        CHECK(wrong == 0, "%s, ta %d tb %d: %d products are wrong", usl_dtype_name(dt), ta, tb, wrong);
        int astray = atomic_exchange(&signals_astray, 0), taken = atomic_load(&signals_taken);
        CHECK(astray == 0, "%s, ta %d tb %d: %d of %d frames beside the stack", usl_dtype_name(dt), ta, tb, astray,
              taken);
        free(a), free(b), free(want), free(got);
    }
    sigaction(SIGUSR1, &before, NULL);
}

int main(void) {
    static const int threads[3] = { 1, 2, 5 };
    rig rigs[3];
    for (int i = 0; i < 3; i++) rig_open(&rigs[i], threads[i]);
    printf("bfloat16 products: %s\n", usli_gemm_has_bf16(&rigs[0].x) ? "the processor's" : "converted to float32");
    test_shapes(rigs);
    test_assign_over_nan(&rigs[1]);
    test_many_shapes(&rigs[1]);
    test_signals(&rigs[0]);
    test_no_memory();
    for (int i = 0; i < 3; i++) rig_close(&rigs[i]);
    return test_end("test_gemm");
}
