/* Named tensors in and out of a .safetensors file. Loaded ones are views of the mapping. */
#include <string.h>

#include "core/api/need.h"
#include "core/io/safetensors.h"
#include "core/tensor/tensor.h"

static usl_status mapped_tensor(usl_ctx *ctx, const usli_file_tensor *f, usl_tensor **out) {
    *out = NULL;
    usl_tensor *t = usli_calloc(ctx, 1, sizeof *t);
    if (!t) return usli_nomem(ctx, sizeof *t);
    usl_status st = usli_storage_map(ctx, f->map, f->data, f->bytes, &t->storage);
    if (st != USL_OK) {
        usli_free(ctx, t);
        return st;
    }
    t->dtype = f->dtype;
    t->ndim = f->ndim;
    int64_t step = 1;
    for (int i = f->ndim; i-- > 0;) {
        t->shape[i] = f->shape[i];
        t->stride[i] = step;
        step *= f->shape[i];
    }
    *out = t;
    return USL_OK;
}

/* A file may put a tensor at any byte; what could not be read in place is copied. */
static usl_status aligned_tensor(usl_ctx *ctx, const usli_file_tensor *f, usl_tensor **out) {
    if ((uintptr_t)f->data % usli_dtype_bytes(f->dtype) == 0) return mapped_tensor(ctx, f, out);
    USLI_TRY(usl_tensor_new(ctx, f->dtype, f->ndim, f->shape, out));
    if (f->bytes) memcpy(usl_tensor_data(*out), f->data, f->bytes);
    return USL_OK;
}

usl_status usl_safetensors_load(usl_ctx *ctx, const char *path, usl_named_tensor_fn fn, void *ud) {
    USLI_NEED_PATH(ctx, path, USL_ACCESS_READ);
    usli_safetensors *file;
    usl_status st = usli_safetensors_open(ctx, path, &file);
    if (st != USL_OK) return st;
    for (size_t i = 0; i < file->count && st == USL_OK; i++) {
        usl_tensor *t;
        st = aligned_tensor(ctx, &file->tensors[i], &t);
        if (st == USL_OK && fn(ud, file->tensors[i].name, t))
            st = usli_fail(ctx, USL_ERR_CALLBACK, "%s: the caller stopped at tensor \"%s\"", path,
                           file->tensors[i].name);
    }
    usli_safetensors_close(file);
    return st;
}

static usl_status write_all(usli_safetensors_writer *w, usl_ctx *ctx, size_t count, const char *const *names,
                            usl_tensor *const *tensors, const char *const *meta) {
    for (size_t i = 0; meta && meta[i]; i += 2) USLI_TRY(usli_safetensors_meta(w, meta[i], meta[i + 1]));
    for (size_t i = 0; i < count; i++)
        USLI_TRY(usli_safetensors_add(w, names[i], tensors[i]->dtype, tensors[i]->ndim, tensors[i]->shape));
    USLI_TRY(usli_safetensors_begin(w));
    for (size_t i = 0; i < count; i++) {
        usl_tensor *dense = tensors[i], *copy = NULL;
        if (!usl_tensor_data(dense)) {
            USLI_TRY(usl_tensor_to(ctx, dense, dense->dtype, &copy));
            dense = copy;
        }
        size_t bytes = (size_t)usl_tensor_elements(dense) * usli_dtype_bytes(dense->dtype);
        usl_status st = usli_safetensors_write(w, usl_tensor_data(dense), bytes);
        usl_tensor_free(copy);
        USLI_TRY(st);
    }
    return usli_safetensors_commit(w);
}

usl_status usl_safetensors_save(usl_ctx *ctx, const char *path, size_t count, const char *const *names,
                                usl_tensor *const *tensors, const char *const *meta) {
    USLI_NEED_PATH(ctx, path, USL_ACCESS_WRITE);
    usli_safetensors_writer *w;
    USLI_TRY(usli_safetensors_create(ctx, path, &w));
    usl_status st = write_all(w, ctx, count, names, tensors, meta);
    usli_safetensors_abandon(w);
    return st;
}
