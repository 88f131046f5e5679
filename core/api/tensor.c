/* Tensors of the public header: shapes and views over counted storage, and conversion between plain types. */
#include <string.h>

#include "core/api/need.h"
#include "core/tensor/tensor.h"

static void strides_of(usl_tensor *t) {
    int64_t step = 1;
    for (int i = t->ndim; i-- > 0;) {
        t->stride[i] = step;
        step *= t->shape[i];
    }
}

usl_status usl_tensor_new(usl_ctx *ctx, usl_dtype dtype, int ndim, const int64_t *shape, usl_tensor **out) {
    *out = NULL;
    size_t elem = usli_dtype_bytes(dtype);
    if (!elem)
        return usli_fail(ctx, USL_ERR_INVALID, "%s is no plain type: a tensor holds floats or integers",
                         usl_dtype_name(dtype));
    if (ndim < 0 || ndim > USLI_TENSOR_DIMS)
        return usli_fail(ctx, USL_ERR_SHAPE, "a tensor has 0 to %d dimensions, not %d", USLI_TENSOR_DIMS, ndim);
    if (ndim) USLI_NEED(ctx, shape);
    int64_t n = usli_shape_elements(ndim, shape, elem);
    if (n < 0) return usli_fail(ctx, USL_ERR_SHAPE, "the shape of the tensor is negative or too large");
    usl_tensor *t = usli_calloc(ctx, 1, sizeof *t);
    if (!t) return usli_nomem(ctx, sizeof *t);
    usl_status st = usli_storage_new(ctx, (size_t)n * elem, &t->storage);
    if (st != USL_OK) {
        usli_free(ctx, t);
        return st;
    }
    t->dtype = dtype;
    t->ndim = ndim;
    for (int i = 0; i < ndim; i++) t->shape[i] = shape[i];
    strides_of(t);
    *out = t;
    return USL_OK;
}

void usl_tensor_free(usl_tensor *t) {
    if (!t) return;
    usli_storage *s = t->storage;
    /* The storage holds the context, so the tensor goes first. */
    usli_free(s->ctx, t);
    usli_storage_release(s);
}

usl_dtype usl_tensor_dtype(const usl_tensor *t) {
    return t->dtype;
}

int usl_tensor_ndim(const usl_tensor *t) {
    return t->ndim;
}

int64_t usl_tensor_dim(const usl_tensor *t, int dim) {
    return dim >= 0 && dim < t->ndim ? t->shape[dim] : 0;
}

int64_t usl_tensor_elements(const usl_tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

static bool is_dense(const usl_tensor *t) {
    int64_t step = 1;
    for (int i = t->ndim; i-- > 0;) {
        if (t->shape[i] != 1 && t->stride[i] != step) return false;
        step *= t->shape[i];
    }
    return true;
}

void *usl_tensor_data(usl_tensor *t) {
    return is_dense(t) || usl_tensor_elements(t) == 0 ? usli_tensor_at(t, 0) : NULL;
}

static usl_status view_of(usl_ctx *ctx, const usl_tensor *t, usl_tensor **out) {
    usl_tensor *v = usli_malloc(ctx, sizeof *v);
    if (!v) return usli_nomem(ctx, sizeof *v);
    memcpy(v, t, sizeof *v);
    usli_storage_retain(v->storage);
    *out = v;
    return USL_OK;
}

usl_status usl_tensor_select(usl_ctx *ctx, usl_tensor *t, int64_t index, usl_tensor **out) {
    *out = NULL;
    if (t->ndim == 0) return usli_fail(ctx, USL_ERR_SHAPE, "a scalar has no dimension to select from");
    if (index < 0 || index >= t->shape[0])
        return usli_fail(ctx, USL_ERR_INVALID, "index %lld is outside a dimension of %lld", (long long)index,
                         (long long)t->shape[0]);
    usl_tensor *v = NULL;
    USLI_TRY(view_of(ctx, t, &v));
    v->offset += index * v->stride[0];
    v->ndim--;
    memmove(v->shape, v->shape + 1, (size_t)v->ndim * sizeof *v->shape);
    memmove(v->stride, v->stride + 1, (size_t)v->ndim * sizeof *v->stride);
    *out = v;
    return USL_OK;
}

usl_status usl_tensor_narrow(usl_ctx *ctx, usl_tensor *t, int dim, int64_t start, int64_t stop, usl_tensor **out) {
    *out = NULL;
    if (dim < 0 || dim >= t->ndim)
        return usli_fail(ctx, USL_ERR_SHAPE, "dimension %d of a tensor that has %d", dim, t->ndim);
    if (start < 0 || stop < start || stop > t->shape[dim])
        return usli_fail(ctx, USL_ERR_INVALID, "%lld to %lld is outside a dimension of %lld", (long long)start,
                         (long long)stop, (long long)t->shape[dim]);
    usl_tensor *v = NULL;
    USLI_TRY(view_of(ctx, t, &v));
    v->offset += start * v->stride[dim];
    v->shape[dim] = stop - start;
    *out = v;
    return USL_OK;
}

usl_status usl_tensor_squeeze(usl_ctx *ctx, usl_tensor *t, int dim, usl_tensor **out) {
    *out = NULL;
    if (dim < 0 || dim >= t->ndim || t->shape[dim] != 1)
        return usli_fail(ctx, USL_ERR_SHAPE, "dimension %d is none of length 1", dim);
    usl_tensor *v = NULL;
    USLI_TRY(view_of(ctx, t, &v));
    size_t behind = (size_t)(--v->ndim - dim);
    memmove(v->shape + dim, v->shape + dim + 1, behind * sizeof *v->shape);
    memmove(v->stride + dim, v->stride + dim + 1, behind * sizeof *v->stride);
    *out = v;
    return USL_OK;
}

static bool is_float(usl_dtype d) {
    return d == USL_F32 || d == USL_F16 || d == USL_BF16 || d == USL_F64;
}

static int64_t load_int(const void *p, usl_dtype d) {
    switch (d) {
    case USL_I64: return *(const int64_t *)p;
    case USL_U64: return (int64_t) * (const uint64_t *)p;
    case USL_I32: return *(const int32_t *)p;
    case USL_U32: return *(const uint32_t *)p;
    case USL_I16: return *(const int16_t *)p;
    case USL_U16: return *(const uint16_t *)p;
    case USL_I8: return *(const int8_t *)p;
    default: return *(const uint8_t *)p;
    }
}

static void store_int(void *p, usl_dtype d, int64_t v) {
    switch (d) {
    case USL_I64: *(int64_t *)p = v; break;
    case USL_U64: *(uint64_t *)p = (uint64_t)v; break;
    case USL_I32: *(int32_t *)p = (int32_t)v; break;
    case USL_U32: *(uint32_t *)p = (uint32_t)v; break;
    case USL_I16: *(int16_t *)p = (int16_t)v; break;
    case USL_U16: *(uint16_t *)p = (uint16_t)v; break;
    case USL_I8: *(int8_t *)p = (int8_t)v; break;
    default: *(uint8_t *)p = d == USL_BOOL ? v != 0 : (uint8_t)v; break;
    }
}

static double load_float(const void *p, usl_dtype d) {
    return d == USL_F64 ? *(const double *)p : (double)usli_get_float(p, d, 0);
}

static void store_float(void *p, usl_dtype d, double v) {
    float f = (float)v;
    if (d == USL_F64)
        *(double *)p = v;
    else
        usli_from_f32(&f, p, d, 1);
}

/* Out of range is pinned to the ends and NaN to 0: C leaves both open. */
static int64_t float_to_int(double v) {
    if (!(v == v)) return 0;
    return v >= 9.2233720368547758e18 ? INT64_MAX : v <= -9.2233720368547758e18 ? INT64_MIN : (int64_t)v;
}

static void convert_one(const void *src, usl_dtype from, void *dst, usl_dtype to) {
    if (is_float(from) && is_float(to))
        store_float(dst, to, load_float(src, from));
    else if (is_float(from))
        store_int(dst, to, float_to_int(load_float(src, from)));
    else if (is_float(to))
        store_float(dst, to, (double)load_int(src, from));
    else
        store_int(dst, to, load_int(src, from));
}

usl_status usl_tensor_to(usl_ctx *ctx, const usl_tensor *t, usl_dtype dtype, usl_tensor **out) {
    *out = NULL;
    bool fp8 = t->dtype == USL_F8_E4M3 || t->dtype == USL_F8_E5M2 || dtype == USL_F8_E4M3 || dtype == USL_F8_E5M2;
    if (fp8 && t->dtype != dtype)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED, "%s cannot be converted to %s here", usl_dtype_name(t->dtype),
                         usl_dtype_name(dtype));
    USLI_TRY(usl_tensor_new(ctx, dtype, t->ndim, t->shape, out));
    size_t from = usli_dtype_bytes(t->dtype), to = usli_dtype_bytes(dtype);
    int64_t n = usl_tensor_elements(t), index[USLI_TENSOR_DIMS] = { 0 }, at = 0;
    char *dst = usli_tensor_at(*out, 0);
    for (int64_t i = 0; i < n; i++, dst += to) {
        const void *src = usli_tensor_at(t, at);
        if (t->dtype == dtype)
            memcpy(dst, src, from);
        else
            convert_one(src, t->dtype, dst, dtype);
        for (int d = t->ndim; d-- > 0;) {
            at += t->stride[d];
            if (++index[d] < t->shape[d]) break;
            at -= index[d] * t->stride[d];
            index[d] = 0;
        }
    }
    return USL_OK;
}
