/* GGUF v2 and v3, little-endian: reading (mapped, whole structure checked, no large allocation on the word of a file)
 * and writing (streamed). Block types are described by core/quant/traits.h. */
#ifndef USLI_IO_GGUF_H
#define USLI_IO_GGUF_H

#include "core/io/safetensors.h"

typedef enum usli_gguf_type {
    USLI_GGUF_U8,
    USLI_GGUF_I8,
    USLI_GGUF_U16,
    USLI_GGUF_I16,
    USLI_GGUF_U32,
    USLI_GGUF_I32,
    USLI_GGUF_F32,
    USLI_GGUF_BOOL,
    USLI_GGUF_STRING,
    USLI_GGUF_ARRAY,
    USLI_GGUF_U64,
    USLI_GGUF_I64,
    USLI_GGUF_F64
} usli_gguf_type;

typedef struct usli_gguf_str {
    const char *data; /* in the mapping, not 0-terminated, may hold NUL */
    size_t len;
} usli_gguf_str;

typedef struct usli_gguf_kv {
    char *key; /* 0-terminated copy */
    usli_gguf_type type;
    usli_gguf_type elem; /* ARRAY: of its elements (an array of arrays is refused) */
    uint64_t count;      /* ARRAY */
    const uint8_t
        *data; /* ARRAY of plain numbers: unaligned, in the mapping. STRING, ARRAY of STRING: use the getters */
    usli_gguf_str *strings; /* STRING (one) and ARRAY of STRING */
} usli_gguf_kv;

typedef struct usli_gguf {
    usl_ctx *ctx;
    usli_map *map;
    uint32_t version;
    size_t alignment;
    usli_gguf_kv *kv; /* in file order */
    size_t kv_count;
    usli_file_tensor *tensors; /* in file order; shape outermost first, so a weight is (out, in) as in torch */
    size_t tensor_count;
} usli_gguf;

usl_status usli_gguf_open(usl_ctx *ctx, const char *path, usli_gguf **out);
void usli_gguf_close(usli_gguf *file);
const usli_gguf_kv *usli_gguf_find(const usli_gguf *file, const char *key);
const usli_file_tensor *usli_gguf_tensor(const usli_gguf *file, const char *name);
/* Values with a fallback when the key is absent or of another kind; any integer or float type is converted. */
int64_t usli_gguf_int(const usli_gguf *file, const char *key, int64_t fallback);
double usli_gguf_float(const usli_gguf *file, const char *key, double fallback);
bool usli_gguf_bool(const usli_gguf *file, const char *key, bool fallback);
usli_gguf_str usli_gguf_string(const usli_gguf *file, const char *key); /* data NULL when absent */
/* Element i of a numeric array. */
int64_t usli_gguf_array_int(const usli_gguf_kv *kv, uint64_t i);
double usli_gguf_array_float(const usli_gguf_kv *kv, uint64_t i);

/* Writing: metadata and tensor descriptions in any order, then begin, then each tensor's bytes in the order described.
 */
typedef struct usli_gguf_writer usli_gguf_writer;
usl_status usli_gguf_create(usl_ctx *ctx, const char *path, usli_gguf_writer **out);
usl_status usli_gguf_put_u32(usli_gguf_writer *w, const char *key, uint32_t value);
usl_status usli_gguf_put_i32(usli_gguf_writer *w, const char *key, int32_t value);
usl_status usli_gguf_put_u64(usli_gguf_writer *w, const char *key, uint64_t value);
usl_status usli_gguf_put_f32(usli_gguf_writer *w, const char *key, float value);
usl_status usli_gguf_put_bool(usli_gguf_writer *w, const char *key, bool value);
usl_status usli_gguf_put_string(usli_gguf_writer *w, const char *key, const char *text, size_t len);
usl_status usli_gguf_put_strings(usli_gguf_writer *w, const char *key, const usli_gguf_str *items, uint64_t count);
usl_status usli_gguf_put_array(usli_gguf_writer *w, const char *key, usli_gguf_type elem, const void *items,
                               uint64_t count);
usl_status usli_gguf_copy_kv(usli_gguf_writer *w, const usli_gguf_kv *kv);
usl_status usli_gguf_add(usli_gguf_writer *w, const char *name, usl_dtype dtype, int ndim, const int64_t *shape);
usl_status usli_gguf_begin(usli_gguf_writer *w);
usl_status usli_gguf_write(usli_gguf_writer *w, const void *data, size_t bytes);
/* Whole under its temporary name, for a look before commit. */
usl_status usli_gguf_finish(usli_gguf_writer *w);
const char *usli_gguf_temporary(const usli_gguf_writer *w);
usl_status usli_gguf_commit(usli_gguf_writer *w);
void usli_gguf_abandon(usli_gguf_writer *w);

#endif
