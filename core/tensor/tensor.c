#include "core/tensor/tensor.h"

#include "core/base/dtype.h"
#include "core/tensor/arena.h"

usl_status usli_storage_new(usl_ctx *ctx, size_t bytes, usli_storage **out) {
    *out = NULL;
    usli_storage *s = usli_calloc(ctx, 1, sizeof *s);
    if (!s || !(s->data = usli_malloc_aligned(ctx, bytes ? bytes : 1))) {
        usli_free(ctx, s);
        return usli_nomem(ctx, bytes);
    }
    s->ctx = ctx;
    s->bytes = bytes;
    atomic_init(&s->refs, 1);
    usli_ctx_retain(ctx);
    *out = s;
    return USL_OK;
}

static usl_status borrow(usl_ctx *ctx, const void *data, size_t bytes, usli_storage **out) {
    *out = NULL;
    usli_storage *s = usli_calloc(ctx, 1, sizeof *s);
    if (!s) return usli_nomem(ctx, sizeof *s);
    s->ctx = ctx;
    s->data = (void *)(uintptr_t)data;
    s->bytes = bytes;
    atomic_init(&s->refs, 1);
    usli_ctx_retain(ctx);
    *out = s;
    return USL_OK;
}

usl_status usli_storage_map(usl_ctx *ctx, usli_map *map, const void *data, size_t bytes, usli_storage **out) {
    USLI_TRY(borrow(ctx, data, bytes, out));
    (*out)->map = usli_map_retain(map);
    return USL_OK;
}

usl_status usli_storage_plan(usl_ctx *ctx, size_t bytes, usli_storage **out) {
    USLI_TRY(borrow(ctx, USLI_NOWHERE, bytes, out));
    (*out)->planned = true;
    return USL_OK;
}

usli_storage *usli_storage_retain(usli_storage *s) {
    if (s) atomic_fetch_add(&s->refs, 1);
    return s;
}

void usli_storage_release(usli_storage *s) {
    if (!s || atomic_fetch_sub(&s->refs, 1) != 1) return;
    usl_ctx *ctx = s->ctx;
    if (s->map)
        usli_map_release(s->map);
    else if (!s->planned)
        usli_free_aligned(ctx, s->data);
    usli_free(ctx, s);
    usl_ctx_free(ctx);
}

int64_t usli_shape_elements(int ndim, const int64_t *shape, size_t elem_bytes) {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0) return -1;
        if (shape[i] && n > INT64_MAX / shape[i] / (int64_t)(elem_bytes ? elem_bytes : 1)) return -1;
        n *= shape[i];
    }
    return n;
}
