#include "core/cpu/cpu.h"

#include <string.h>

#include "core/cpu/gemm.h"

static void *cpu_alloc(usli_exec *x, size_t bytes) {
    return usli_malloc_aligned(x->ctx, bytes);
}

static void cpu_free(usli_exec *x, void *ptr) {
    usli_free_aligned(x->ctx, ptr);
}

static usl_status cpu_copy(usli_exec *x, void *dst, const void *src, size_t bytes) {
    (void)x;
    if (bytes && dst != src) memcpy(dst, src, bytes);
    return USL_OK;
}

static usl_status cpu_zero(usli_exec *x, void *dst, size_t bytes) {
    (void)x;
    if (bytes) memset(dst, 0, bytes);
    return USL_OK;
}

/* Every op has ended when it returns. */
static usl_status cpu_sync(usli_exec *x) {
    (void)x;
    return USL_OK;
}

static usl_status cpu_copy_beside(usli_exec *x, void *dst, const void *src, size_t bytes, int slot) {
    (void)slot;
    return cpu_copy(x, dst, src, bytes);
}

static usl_status cpu_await_copy(usli_exec *x, int slot) {
    (void)x, (void)slot;
    return USL_OK;
}

static usl_dtype cpu_fast_dtype(const usli_exec *x) {
    (void)x;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16")) return USL_BF16;
#endif
    return USL_F32;
}

static void cpu_close(usli_exec *x) {
    usli_gemm_close(x->state);
    x->state = NULL;
}

static const usli_backend CPU = {
    .name = "cpu",
    .host = true,
    .ops = {
#define USLI_OP(name) [USLI_OP_##name] = &usli_cpu_##name,
#include "core/ops/ops.def"
#undef USLI_OP
    },
    .alloc = cpu_alloc,
    .free = cpu_free,
    .copy_in = cpu_copy,
    .copy_out = cpu_copy,
    .zero = cpu_zero,
    .sync = cpu_sync,
    .alloc_host = cpu_alloc,
    .free_host = cpu_free,
    .copy_beside = cpu_copy_beside,
    .await_copy = cpu_await_copy,
    .fast_dtype = cpu_fast_dtype,
    .close = cpu_close,
};

usl_status usli_cpu_open(usl_ctx *ctx, usli_exec *x) {
    x->ctx = ctx;
    x->backend = &CPU;
    return usli_gemm_open(ctx, &x->state);
}
