/* Tensors that people hold: shape, strides, a counted storage. Inside a pass the engine works on plain pointers into an
 * arena; a tensor is what goes in and out. */
#ifndef USLI_TENSOR_TENSOR_H
#define USLI_TENSOR_TENSOR_H

#include "core/base/ctx.h"
#include "core/base/dtype.h"
#include "core/base/file.h"

enum { USLI_TENSOR_DIMS = 8 };

/* Bytes with an owner: memory of the context, or a mapped file that is kept open. */
typedef struct usli_storage {
    usl_ctx *ctx;
    void *data;
    size_t bytes;
    usli_map *map; /* NULL: data is ours (usli_malloc_aligned), or planned */
    bool planned;  /* only counted: data is nowhere */
    atomic_int refs;
} usli_storage;

usl_status usli_storage_new(usl_ctx *ctx, size_t bytes, usli_storage **out);  /* contents undefined */
usl_status usli_storage_plan(usl_ctx *ctx, size_t bytes, usli_storage **out); /* no memory is taken */
usl_status usli_storage_map(usl_ctx *ctx, usli_map *map, const void *data, size_t bytes, usli_storage **out);
usli_storage *usli_storage_retain(usli_storage *s);
void usli_storage_release(usli_storage *s);

struct usl_tensor {
    usli_storage *storage;
    usl_dtype dtype;                                           /* a plain type */
    int ndim;                                                  /* 0: a scalar */
    int64_t shape[USLI_TENSOR_DIMS], stride[USLI_TENSOR_DIMS]; /* elements */
    int64_t offset;                                            /* elements from the start of the storage */
    atomic_int refs;
};

/* Elements of a shape; -1 when a dimension is negative or the product of elements and bytes overflows. */
int64_t usli_shape_elements(int ndim, const int64_t *shape, size_t elem_bytes);
static inline void *usli_tensor_at(const usl_tensor *t, int64_t element) {
    return (char *)t->storage->data + (size_t)(t->offset + element) * usli_dtype_bytes(t->dtype);
}

#endif
