#include <string.h>

#include "core/io/gguf.h"
#include "core/quant/traits.h"

enum { ALIGNMENT = 32 };

typedef struct bytes {
    uint8_t *data;
    size_t len, cap;
} bytes;

struct usli_gguf_writer {
    usl_ctx *ctx;
    usli_writer *file;
    bytes kv, tensors;
    uint64_t kv_count, tensor_count;
    uint64_t offset;     /* of the next tensor described */
    uint64_t *ends;      /* unpadded end of each tensor, from the start of the data */
    size_t ends_cap, at; /* at: tensor being written */
    uint64_t start;
};

static usl_status put(usli_gguf_writer *w, bytes *b, const void *data, size_t n) {
    USLI_TRY(usli_grow(w->ctx, &b->data, &b->cap, b->len + n, 1));
    if (n) memcpy(b->data + b->len, data, n);
    b->len += n;
    return USL_OK;
}

static usl_status put_number(usli_gguf_writer *w, bytes *b, uint64_t v, int n) {
    uint8_t raw[8];
    for (int i = 0; i < n; i++) raw[i] = (uint8_t)(v >> (8 * i));
    return put(w, b, raw, (size_t)n);
}

static usl_status put_str(usli_gguf_writer *w, bytes *b, const char *text, size_t len) {
    USLI_TRY(put_number(w, b, len, 8));
    return put(w, b, text, len);
}

static usl_status put_key(usli_gguf_writer *w, const char *key, usli_gguf_type type) {
    w->kv_count++;
    USLI_TRY(put_str(w, &w->kv, key, strlen(key)));
    return put_number(w, &w->kv, type, 4);
}

usl_status usli_gguf_create(usl_ctx *ctx, const char *path, usli_gguf_writer **out) {
    *out = NULL;
    usli_gguf_writer *w = usli_calloc(ctx, 1, sizeof *w);
    if (!w) return usli_nomem(ctx, sizeof *w);
    w->ctx = ctx;
    usl_status st = usli_writer_open(ctx, path, &w->file);
    if (st != USL_OK) {
        usli_free(ctx, w);
        return st;
    }
    *out = w;
    return USL_OK;
}

static usl_status put_plain(usli_gguf_writer *w, const char *key, usli_gguf_type type, uint64_t v, int n) {
    USLI_TRY(put_key(w, key, type));
    return put_number(w, &w->kv, v, n);
}

usl_status usli_gguf_put_u32(usli_gguf_writer *w, const char *key, uint32_t v) {
    return put_plain(w, key, USLI_GGUF_U32, v, 4);
}

usl_status usli_gguf_put_i32(usli_gguf_writer *w, const char *key, int32_t v) {
    return put_plain(w, key, USLI_GGUF_I32, (uint32_t)v, 4);
}

usl_status usli_gguf_put_u64(usli_gguf_writer *w, const char *key, uint64_t v) {
    return put_plain(w, key, USLI_GGUF_U64, v, 8);
}

usl_status usli_gguf_put_f32(usli_gguf_writer *w, const char *key, float v) {
    uint32_t raw;
    memcpy(&raw, &v, sizeof raw);
    return put_plain(w, key, USLI_GGUF_F32, raw, 4);
}

usl_status usli_gguf_put_bool(usli_gguf_writer *w, const char *key, bool v) {
    return put_plain(w, key, USLI_GGUF_BOOL, v, 1);
}

usl_status usli_gguf_put_string(usli_gguf_writer *w, const char *key, const char *text, size_t len) {
    USLI_TRY(put_key(w, key, USLI_GGUF_STRING));
    return put_str(w, &w->kv, text, len);
}

usl_status usli_gguf_put_strings(usli_gguf_writer *w, const char *key, const usli_gguf_str *items, uint64_t count) {
    USLI_TRY(put_key(w, key, USLI_GGUF_ARRAY));
    USLI_TRY(put_number(w, &w->kv, USLI_GGUF_STRING, 4));
    USLI_TRY(put_number(w, &w->kv, count, 8));
    for (uint64_t i = 0; i < count; i++) USLI_TRY(put_str(w, &w->kv, items[i].data, items[i].len));
    return USL_OK;
}

static size_t elem_bytes(usli_gguf_type type) {
    static const size_t BYTES[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return BYTES[type];
}

/* Numbers of the machine, which is little-endian, as is the file. */
usl_status usli_gguf_put_array(usli_gguf_writer *w, const char *key, usli_gguf_type elem, const void *items,
                               uint64_t count) {
    USLI_TRY(put_key(w, key, USLI_GGUF_ARRAY));
    USLI_TRY(put_number(w, &w->kv, elem, 4));
    USLI_TRY(put_number(w, &w->kv, count, 8));
    return put(w, &w->kv, items, (size_t)count * elem_bytes(elem));
}

usl_status usli_gguf_copy_kv(usli_gguf_writer *w, const usli_gguf_kv *kv) {
    if (kv->type == USLI_GGUF_STRING) return usli_gguf_put_string(w, kv->key, kv->strings[0].data, kv->strings[0].len);
    if (kv->type != USLI_GGUF_ARRAY) {
        USLI_TRY(put_key(w, kv->key, kv->type));
        return put(w, &w->kv, kv->data, elem_bytes(kv->type));
    }
    if (kv->elem == USLI_GGUF_STRING) return usli_gguf_put_strings(w, kv->key, kv->strings, kv->count);
    return usli_gguf_put_array(w, kv->key, kv->elem, kv->data, kv->count);
}

static uint64_t padded(uint64_t n) {
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

usl_status usli_gguf_add(usli_gguf_writer *w, const char *name, usl_dtype dtype, int ndim, const int64_t *shape) {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= shape[i];
    size_t size = usli_row_bytes(dtype, n);
    if (!size || dtype >= 64)
        return usli_fail(w->ctx, USL_ERR_SHAPE, "tensor \"%s\" does not fit the type %s", name, usl_dtype_name(dtype));
    USLI_TRY(put_str(w, &w->tensors, name, strlen(name)));
    USLI_TRY(put_number(w, &w->tensors, (uint64_t)ndim, 4));
    for (int i = ndim; i-- > 0;) USLI_TRY(put_number(w, &w->tensors, (uint64_t)shape[i], 8));
    USLI_TRY(put_number(w, &w->tensors, (uint64_t)dtype, 4));
    USLI_TRY(put_number(w, &w->tensors, w->offset, 8));
    USLI_TRY(usli_grow(w->ctx, &w->ends, &w->ends_cap, (size_t)w->tensor_count + 1, sizeof *w->ends));
    w->ends[w->tensor_count++] = w->offset + size;
    w->offset = padded(w->offset + size);
    return USL_OK;
}

usl_status usli_gguf_begin(usli_gguf_writer *w) {
    bytes head = { NULL, 0, 0 };
    usl_status st = put(w, &head, "GGUF", 4);
    if (st == USL_OK) st = put_number(w, &head, 3, 4);
    if (st == USL_OK) st = put_number(w, &head, w->tensor_count, 8);
    if (st == USL_OK) st = put_number(w, &head, w->kv_count, 8);
    if (st == USL_OK) st = usli_writer_write(w->file, head.data, head.len);
    usli_free(w->ctx, head.data);
    if (st == USL_OK) st = usli_writer_write(w->file, w->kv.data, w->kv.len);
    if (st == USL_OK) st = usli_writer_write(w->file, w->tensors.data, w->tensors.len);
    if (st == USL_OK) st = usli_writer_pad(w->file, ALIGNMENT);
    w->start = usli_writer_offset(w->file);
    return st;
}

usl_status usli_gguf_write(usli_gguf_writer *w, const void *data, size_t n) {
    uint64_t at = usli_writer_offset(w->file) - w->start;
    if (w->at >= w->tensor_count || at + n > w->ends[w->at])
        return usli_fail(w->ctx, USL_ERR_INTERNAL, "more bytes were written than the tensors described hold");
    USLI_TRY(usli_writer_write(w->file, data, n));
    if (at + n < w->ends[w->at]) return USL_OK;
    w->at++;
    return usli_writer_pad(w->file, ALIGNMENT);
}

usl_status usli_gguf_finish(usli_gguf_writer *w) {
    if (w->at != w->tensor_count)
        return usli_fail(w->ctx, USL_ERR_INTERNAL, "%llu of %llu tensors were written", (unsigned long long)w->at,
                         (unsigned long long)w->tensor_count);
    return usli_writer_finish(w->file);
}

const char *usli_gguf_temporary(const usli_gguf_writer *w) {
    return usli_writer_temporary(w->file);
}

usl_status usli_gguf_commit(usli_gguf_writer *w) {
    USLI_TRY(usli_gguf_finish(w));
    return usli_writer_commit(w->file);
}

void usli_gguf_abandon(usli_gguf_writer *w) {
    if (!w) return;
    usli_writer_close(w->file);
    usli_free(w->ctx, w->kv.data);
    usli_free(w->ctx, w->tensors.data);
    usli_free(w->ctx, w->ends);
    usli_free(w->ctx, w);
}
