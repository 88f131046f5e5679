/* safetensors: [u64 header length][JSON header][tensor bytes]. One file or a sharded set with
 * model.safetensors.index.json. Opening checks the whole structure (lengths, overlaps, holes, sizes, duplicate names)
 * and reads no tensor. */
#ifndef USLI_IO_SAFETENSORS_H
#define USLI_IO_SAFETENSORS_H

#include "core/base/file.h"

enum { USLI_MAX_DIMS = 8 };

typedef struct usli_file_tensor {
    char *name;
    usl_dtype dtype;
    int ndim;
    int64_t shape[USLI_MAX_DIMS]; /* outermost first, as torch prints it (gguf.h reverses ggml's order) */
    const void *data;             /* in the mapping */
    size_t bytes;
    usli_map *map; /* borrowed from the file object: retain it to outlive that */
} usli_file_tensor;

typedef struct usli_safetensors {
    usl_ctx *ctx;
    usli_map **maps;
    size_t map_count;
    usli_file_tensor *tensors; /* sorted by name */
    size_t count;
    char **meta; /* __metadata__: key, value, key, value ... */
    size_t meta_count;
} usli_safetensors;

/* path: a .safetensors file, an index .json, or a folder with model.safetensors(.index.json). *out is new. */
usl_status usli_safetensors_open(usl_ctx *ctx, const char *path, usli_safetensors **out);
void usli_safetensors_close(usli_safetensors *file); /* NULL is fine */
/* NULL when there is none of that name. */
const usli_file_tensor *usli_safetensors_find(const usli_safetensors *file, const char *name);

/* Writing: describe all, then begin, then the bytes of each in the order described, then commit. */
typedef struct usli_safetensors_writer usli_safetensors_writer;
usl_status usli_safetensors_create(usl_ctx *ctx, const char *path, usli_safetensors_writer **out);
usl_status usli_safetensors_meta(usli_safetensors_writer *w, const char *key, const char *value);
usl_status usli_safetensors_add(usli_safetensors_writer *w, const char *name, usl_dtype dtype, int ndim,
                                const int64_t *shape);
usl_status usli_safetensors_begin(usli_safetensors_writer *w);
usl_status usli_safetensors_write(usli_safetensors_writer *w, const void *data,
                                  size_t bytes);                /* any pieces, in order */
usl_status usli_safetensors_commit(usli_safetensors_writer *w); /* checks that every byte came */
void usli_safetensors_abandon(usli_safetensors_writer *w);      /* always at the end; NULL is fine */

#endif
