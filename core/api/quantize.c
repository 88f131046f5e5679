/* Whole arrays through the type table. NF4's string here is codes, then absmax as float32, without nesting. */
#include <string.h>

#include "core/quant/nf4.h"
#include "core/quant/traits.h"

static size_t nf4_code_bytes(int64_t n) {
    return ((size_t)n + 1) / 2;
}

size_t usl_quant_bytes(usl_dtype dtype, int64_t n) {
    if (n < 0) return 0;
    if (dtype == USL_NF4) {
        if (n > INT64_MAX / 2) return 0;
        return nf4_code_bytes(n) + (size_t)usli_nf4_blocks(n) * sizeof(float);
    }
    return usli_row_bytes(dtype, n);
}

static usl_status check(usl_ctx *ctx, usl_dtype dtype, int64_t n, size_t *bytes) {
    const usli_traits *t = usli_traits_of(dtype);
    *bytes = usl_quant_bytes(dtype, n);
    if (n < 0 || (n > 0 && *bytes == 0))
        return usli_fail(ctx, USL_ERR_SHAPE,
                         "%lld values do not fill blocks of %s: their number must be a multiple of %d", (long long)n,
                         usl_dtype_name(dtype), t ? t->block : 1);
    return USL_OK;
}

usl_status usl_quantize(usl_ctx *ctx, usl_dtype dtype, const float *src, int64_t n, void *dst) {
    size_t bytes;
    USLI_TRY(check(ctx, dtype, n, &bytes));
    if (dtype == USL_NF4) {
        float *absmax = usli_malloc(ctx, (size_t)usli_nf4_blocks(n) * sizeof *absmax + 1);
        if (!absmax) return usli_nomem(ctx, bytes);
        usli_nf4_quantize_plain(usli_nf4_table, src, n, dst, absmax);
        memcpy((char *)dst + nf4_code_bytes(n), absmax, (size_t)usli_nf4_blocks(n) * sizeof *absmax);
        usli_free(ctx, absmax);
        return USL_OK;
    }
    const usli_traits *t = usli_traits_of(dtype);
    if (!t || !t->encode)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED, "quantising to %s is not possible here", usl_dtype_name(dtype));
    if (n > 0) t->encode(src, NULL, dst, n);
    return USL_OK;
}

usl_status usl_dequantize(usl_ctx *ctx, usl_dtype dtype, const void *src, size_t bytes, int64_t n, float *dst) {
    size_t want;
    USLI_TRY(check(ctx, dtype, n, &want));
    if (bytes != want)
        return usli_fail(ctx, USL_ERR_SHAPE, "%lld values of %s take %zu bytes; %zu were given", (long long)n,
                         usl_dtype_name(dtype), want, bytes);
    const usli_traits *t = usli_traits_of(dtype);
    if (dtype != USL_NF4 && (!t || !t->decode))
        return usli_fail(ctx, USL_ERR_UNSUPPORTED, "decoding %s is not possible here", usl_dtype_name(dtype));
    if (n == 0) return USL_OK;
    /* The bytes may stand anywhere in a string; blocks want their alignment. */
    void *copy = usli_malloc_aligned(ctx, bytes);
    if (!copy) return usli_nomem(ctx, bytes);
    memcpy(copy, src, bytes);
    if (dtype == USL_NF4) {
        /* The absmax behind the codes need not be aligned. */
        float *absmax = usli_malloc(ctx, bytes);
        if (!absmax) {
            usli_free_aligned(ctx, copy);
            return usli_nomem(ctx, bytes);
        }
        memcpy(absmax, (const char *)copy + nf4_code_bytes(n), bytes - nf4_code_bytes(n));
        usli_nf4 q = { .codes = copy, .absmax = absmax, .table = usli_nf4_table };
        usli_nf4_decode(&q, 0, n, dst);
        usli_free(ctx, absmax);
    } else {
        t->decode(copy, dst, n);
    }
    usli_free_aligned(ctx, copy);
    return USL_OK;
}
