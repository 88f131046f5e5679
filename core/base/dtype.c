#include "core/base/dtype.h"

#include <string.h>

#include "core/base/half.h"

static const struct {
    usl_dtype dtype;
    const char *name;
} NAMES[] = {
#define X(name, value, text) { USL_##name, text },
    USL_DTYPE_MAP(X)
#undef X
    /* torch's and safetensors' spellings */
    { USL_F32, "float32" },
    { USL_F16, "float16" },
    { USL_BF16, "bfloat16" },
    { USL_F64, "float64" },
    { USL_F32, "float" },
    { USL_F16, "half" },
    { USL_I32, "int32" },
    { USL_I64, "int64" },
    { USL_I16, "int16" },
    { USL_I8, "int8" },
    { USL_U8, "uint8" },
    { USL_F8_E4M3, "float8_e4m3fn" },
    { USL_F8_E5M2, "float8_e5m2" },
};

const char *usl_dtype_name(usl_dtype dtype) {
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (NAMES[i].dtype == dtype) return NAMES[i].name;
    return "?";
}

usl_dtype usl_dtype_parse(const char *name) {
    for (size_t i = 0; name && i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(NAMES[i].name, name) == 0) return NAMES[i].dtype;
    return USL_DTYPE_AUTO;
}

size_t usli_dtype_bytes(usl_dtype dtype) {
    switch (dtype) {
    case USL_F64:
    case USL_I64:
    case USL_U64: return 8;
    case USL_F32:
    case USL_I32:
    case USL_U32: return 4;
    case USL_F16:
    case USL_BF16:
    case USL_I16:
    case USL_U16: return 2;
    case USL_I8:
    case USL_U8:
    case USL_BOOL:
    case USL_F8_E4M3:
    case USL_F8_E5M2: return 1;
    default: return 0;
    }
}

float usli_get_float(const void *data, usl_dtype dtype, int64_t i) {
    switch (dtype) {
    case USL_F32: return ((const float *)data)[i];
    case USL_F16: return usli_f16_to_f32(((const uint16_t *)data)[i]);
    case USL_BF16: return usli_bf16_to_f32(((const uint16_t *)data)[i]);
    case USL_F64: return (float)((const double *)data)[i];
    default: return 0;
    }
}

void usli_to_f32(const void *src, usl_dtype dtype, float *dst, int64_t n) {
    if (dtype == USL_F32) {
        memcpy(dst, src, (size_t)n * sizeof *dst);
    } else if (dtype == USL_BF16) {
        const uint16_t *s = src;
        for (int64_t i = 0; i < n; i++) dst[i] = usli_bf16_to_f32(s[i]);
    } else if (dtype == USL_F16) {
        const uint16_t *s = src;
        for (int64_t i = 0; i < n; i++) dst[i] = usli_f16_to_f32(s[i]);
    }
}

void usli_from_f32(const float *src, void *dst, usl_dtype dtype, int64_t n) {
    if (dtype == USL_F32) {
        memcpy(dst, src, (size_t)n * sizeof *src);
    } else if (dtype == USL_BF16) {
        uint16_t *d = dst;
        for (int64_t i = 0; i < n; i++) d[i] = usli_f32_to_bf16(src[i]);
    } else if (dtype == USL_F16) {
        uint16_t *d = dst;
        for (int64_t i = 0; i < n; i++) d[i] = usli_f32_to_f16(src[i]);
    }
}
