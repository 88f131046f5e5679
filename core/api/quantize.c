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

/* The public string has plain absmax, so it is made from the table itself: the nearest of 16 levels. */
static void nf4_encode(const float *src, int64_t n, uint8_t *codes, float *absmax) {
    memset(codes, 0, nf4_code_bytes(n));
    for (int64_t b = 0; b * USLI_NF4_BLOCK < n; b++) {
        int64_t first = b * USLI_NF4_BLOCK, last = first + USLI_NF4_BLOCK < n ? first + USLI_NF4_BLOCK : n;
        float top = 0;
        for (int64_t i = first; i < last; i++) {
            float a = src[i] < 0 ? -src[i] : src[i];
            if (a > top) top = a;
        }
        absmax[b] = top;
        float scale = top > 0 ? 1.0f / top : 0.0f;
        for (int64_t i = first; i < last; i++) {
            float v = src[i] * scale;
            int code = 0;
            while (code < 15 && v > 0.5f * (usli_nf4_table[code] + usli_nf4_table[code + 1])) code++;
            codes[i / 2] |= (uint8_t)(code << (i % 2 ? 0 : 4));
        }
    }
}

usl_status usl_quantize(usl_ctx *ctx, usl_dtype dtype, const float *src, int64_t n, void *dst) {
    size_t bytes;
    USLI_TRY(check(ctx, dtype, n, &bytes));
    if (dtype == USL_NF4) {
        float *absmax = usli_malloc(ctx, (size_t)usli_nf4_blocks(n) * sizeof *absmax + 1);
        if (!absmax) return usli_nomem(ctx, bytes);
        nf4_encode(src, n, dst, absmax);
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
        size_t code_bytes = nf4_code_bytes(n);
        const uint8_t *codes = copy;
        for (int64_t i = 0; i < n; i++) {
            float absmax;
            memcpy(&absmax, codes + code_bytes + (size_t)(i / USLI_NF4_BLOCK) * sizeof absmax, sizeof absmax);
            dst[i] = usli_nf4_table[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax;
        }
    } else {
        t->decode(copy, dst, n);
    }
    usli_free_aligned(ctx, copy);
    return USL_OK;
}
