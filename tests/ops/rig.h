/* What op tests share: a context with so many threads, a backend, and a run that checks the memory plan too. The
 * backend is the CPU's; with USLI_RIG_CUDA defined the CUDA one, on a device or emulated. */
#ifndef TESTS_OPS_RIG_H
#define TESTS_OPS_RIG_H

#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "core/cpu/cpu.h"
#include "kernels/cuda.h"
#include "tests/test.h"

/* USLI_RIG_EMULATED: the kernels run on the CPU, a thousand times slower than on a device. */
#ifdef USLI_RIG_EMULATED
enum { RIG_SLOW = 1 };
#else
enum { RIG_SLOW = 0 };
#endif

/* On a real device, what tests allocate is host memory that the device reaches at the same address: so whatever an op
 * reads or writes is allocated, never an array on the stack. */
#if defined USLI_RIG_CUDA && !defined USLI_RIG_EMULATED
void *rig_pinned(size_t bytes); /* tests/gpu/pinned.cu; 256-byte aligned */
void *rig_pinned_zeroed(size_t count, size_t bytes);
void rig_unpin(void *p);
#define malloc(bytes) rig_pinned(bytes)
#define calloc(count, bytes) rig_pinned_zeroed(count, bytes)
#define aligned_alloc(alignment, bytes) rig_pinned(bytes)
#define free(p) rig_unpin(p)
#endif

typedef struct rig {
    usl_ctx *ctx;
    usli_exec x;
    usli_arena arena;
} rig;

static inline void rig_open(rig *r, int threads) {
#ifdef USLI_RIG_CUDA
    if (!usli_cuda_count()) {
        SKIP("no GPU is here");
        exit(77);
    }
#endif
    memset(r, 0, sizeof *r);
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    opts.threads = threads;
    CHECK_OK(NULL, usl_ctx_new(&opts, &r->ctx));
#ifdef USLI_RIG_CUDA
    CHECK_OK(r->ctx, usli_cuda_open(r->ctx, 0, &r->x));
#else
    CHECK_OK(r->ctx, usli_cpu_open(r->ctx, &r->x));
#endif
    r->x.arena = &r->arena;
}

static inline void rig_close(rig *r) {
    r->x.backend->close(&r->x);
    usl_ctx_free(r->ctx);
}

/* A dry run counts the workspace, the real one gets exactly that, in a block whose ends the sanitizer watches. */
static inline usl_status rig_run(rig *r, usli_op op, void *args, usli_pass pass) {
    if (!r->x.backend->ops[op]) {
        SKIP("the %s backend has no such op yet", r->x.backend->name);
        exit(77);
    }
    usli_arena_init_dry(&r->arena);
    usl_status st = usli_run(&r->x, op, args, pass);
    if (st != USL_OK) return st;
    size_t planned = r->arena.peak;
    size_t room = planned ? (planned + 63) / 64 * 64 : 64;
    void *block = aligned_alloc(64, room);
    memset(block, 0xff, room); /* NaN: nothing may be read before it is written */
    usli_arena_init(&r->arena, block, planned);
    st = usli_run(&r->x, op, args, pass);
    CHECK(st != USL_OK || (r->arena.peak == planned && r->arena.high == 0), "planned %zu, used %zu", planned,
          r->arena.peak);
    usl_status done = r->x.backend->sync ? r->x.backend->sync(&r->x) : USL_OK;
    free(block);
    return st != USL_OK ? st : done;
}

/* The tables of an NF4 weight where an op may read them; both last as long as the program. */
#define rig_nf4_tables(q)                                                \
    do {                                                                 \
        static float *tables;                                            \
        if (!tables) {                                                   \
            tables = malloc((16 + 256) * sizeof *tables);                \
            memcpy(tables, usli_nf4_table, 16 * sizeof *tables);         \
            memcpy(tables + 16, usli_dynamic_map, 256 * sizeof *tables); \
        }                                                                \
        (q)->table = tables;                                             \
        (q)->map = tables + 16;                                          \
    } while (0)

/* A copy that an op may read. New: free it. */
static inline void *rig_copy(const void *values, size_t bytes) {
    void *p = malloc(bytes + 1);
    memcpy(p, values, bytes);
    return p;
}

/* Random values of standard deviation 1, rounded to dtype; *values gets what was stored. New: free both. */
static inline void *rig_random(usli_rng *rng, usl_dtype dtype, int64_t n, float **values) {
    float *v = malloc(sizeof *v * (size_t)(n + 1));
    void *data = malloc(usli_dtype_bytes(dtype) * (size_t)(n + 1));
    for (int64_t i = 0; i < n; i++) v[i] = (float)usli_rng_normal(rng);
    usli_from_f32(v, data, dtype, n);
    usli_to_f32(data, dtype, v, n);
    if (values)
        *values = v;
    else
        free(v);
    return data;
}

/* Rows of so many bytes as they lie `ld` apart, with no numbers between them and behind the last. New: free it. */
static inline void *rig_spread(const void *packed, int64_t rows, size_t row, size_t ld) {
    char *p = malloc((size_t)rows * ld + 1);
    memset(p, 0xff, (size_t)rows * ld);
    for (int64_t i = 0; i < rows; i++) memcpy(p + (size_t)i * ld, (const char *)packed + (size_t)i * row, row);
    return p;
}

/* The way back, for what an op has written; what stands between the rows is as it was. */
static inline void rig_pack(const char *what, const void *spread, int64_t rows, size_t row, size_t ld, void *packed) {
    const unsigned char *p = spread;
    for (int64_t i = 0; i < rows; i++, p += ld) {
        memcpy((char *)packed + (size_t)i * row, p, row);
        for (size_t j = row; j < ld; j++)
            if (p[j] != 0xff) {
                CHECK(false, "%s: behind row %lld of %lld something is written", what, (long long)i, (long long)rows);
                break;
            }
    }
}

/* GPUs before compute capability 8.0 multiply no bfloat16. */
static inline bool rig_multiplies(const rig *r, usl_dtype dtype) {
#ifdef USLI_RIG_CUDA
    return dtype != USL_BF16 || r->x.backend->fast_dtype(&r->x) == USL_BF16;
#else
    (void)r;
    (void)dtype;
    return true;
#endif
}

/* Half a unit in the last place, relative: what one rounding may change. */
static inline double rig_epsilon(usl_dtype dtype) {
    return dtype == USL_BF16 ? 1.0 / 256 : dtype == USL_F16 ? 1.0 / 2048 : 1.0 / (1 << 24);
}

#endif
