#include <stdatomic.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/processor.h"
#include "core/cpu/vec.h"

const usli_vec *usli_vec_amx_here(void) {
#ifdef USL_HAVE_AMX
    if (usli_may_use_amx()) return &usli_vec_amx;
#endif
    return NULL;
}

const usli_vec *usli_vec_avx512bf16_here(void) {
#ifdef USL_HAVE_AMX
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &usli_vec_avx512bf16;
#endif
    return NULL;
}

static const usli_vec *look(void) {
#if defined(__x86_64__)
    if (usli_vec_amx_here()) return usli_vec_amx_here();
    if (usli_vec_avx512bf16_here()) return usli_vec_avx512bf16_here();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return &usli_vec_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &usli_vec_avx2;
#endif
    return &usli_vec_generic;
}

/* Asked for in every task, and the processor stays the same. */
const usli_vec *usli_vec_best(void) {
    static _Atomic(const usli_vec *) found;
    const usli_vec *v = atomic_load_explicit(&found, memory_order_relaxed);
    if (v) return v;
    v = look();
    atomic_store_explicit(&found, v, memory_order_relaxed);
    return v;
}

const float *usli_row_load(const usli_vec *v, const void *row, usl_dtype dtype, float *buf, int64_t n) {
    if (dtype == USL_F32) return row;
    (dtype == USL_BF16 ? v->bf16_to_f32 : v->f16_to_f32)(row, buf, n);
    return buf;
}

void usli_row_store(const usli_vec *v, const float *row, void *dst, usl_dtype dtype, int64_t n) {
    if (dtype == USL_F32) {
        if (dst != row) memmove(dst, row, (size_t)n * sizeof *row);
    } else {
        (dtype == USL_BF16 ? v->f32_to_bf16 : v->f32_to_f16)(row, dst, n);
    }
}
