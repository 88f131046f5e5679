#include "core/io/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/utf8.h"
#include "core/io/json.h"

enum { MAX_HEADER = 100000000 };

static const struct {
    const char *name;
    usl_dtype dtype;
} DTYPES[] = {
    { "F64", USL_F64 },   { "F32", USL_F32 },         { "F16", USL_F16 },         { "BF16", USL_BF16 },
    { "I64", USL_I64 },   { "I32", USL_I32 },         { "I16", USL_I16 },         { "I8", USL_I8 },
    { "U8", USL_U8 },     { "U16", USL_U16 },         { "U32", USL_U32 },         { "U64", USL_U64 },
    { "BOOL", USL_BOOL }, { "F8_E4M3", USL_F8_E4M3 }, { "F8_E5M2", USL_F8_E5M2 },
};
enum { DTYPE_COUNT = sizeof DTYPES / sizeof *DTYPES };

/* ---- Reading
 * -------------------------------------------------------------------------------------------------------------------
 */

typedef struct parser {
    usl_ctx *ctx;
    usli_json_reader r;
    usli_safetensors *file;
    usli_map *map;
    const uint8_t *data; /* behind the header */
    size_t data_size;
    size_t tensor_cap, meta_cap, first; /* first: of this map */
} parser;

static usl_status bad_tensor(parser *p, const char *name, const char *what) {
    return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: tensor \"%s\": %s", p->map->path, name, what);
}

static usl_status read_dtype(parser *p, usli_file_tensor *t) {
    USLI_TRY(usli_json_expect(&p->r, USLI_JSON_STRING, "dtype"));
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (usli_json_is(&p->r, DTYPES[i].name)) {
            t->dtype = DTYPES[i].dtype;
            return USL_OK;
        }
    return usli_fail(p->ctx, USL_ERR_UNSUPPORTED, "%s: tensor \"%s\" has the type \"%.*s\", which is not known",
                     p->map->path, t->name, (int)(p->r.len < 32 ? p->r.len : 32), p->r.str);
}

static usl_status read_shape(parser *p, usli_file_tensor *t) {
    USLI_TRY(usli_json_expect(&p->r, USLI_JSON_ARRAY, "shape"));
    for (;;) {
        USLI_TRY(usli_json_next(&p->r));
        if (p->r.kind == USLI_JSON_ARRAY_END) return USL_OK;
        if (p->r.kind != USLI_JSON_INT || p->r.i < 0) return bad_tensor(p, t->name, "its shape is not a list of sizes");
        if (t->ndim == USLI_MAX_DIMS) return bad_tensor(p, t->name, "it has more than 8 dimensions");
        t->shape[t->ndim++] = p->r.i;
    }
}

static usl_status read_offsets(parser *p, usli_file_tensor *t, uint64_t offset[2]) {
    USLI_TRY(usli_json_expect(&p->r, USLI_JSON_ARRAY, "data_offsets"));
    for (int i = 0; i < 2; i++) {
        USLI_TRY(usli_json_expect(&p->r, USLI_JSON_INT, "a data offset"));
        if (p->r.i < 0) return bad_tensor(p, t->name, "an offset is negative");
        offset[i] = (uint64_t)p->r.i;
    }
    USLI_TRY(usli_json_expect(&p->r, USLI_JSON_ARRAY_END, "data_offsets"));
    if (offset[0] > offset[1] || offset[1] > p->data_size)
        return bad_tensor(p, t->name, "its offsets lie outside the file; the file is cut off or damaged");
    t->data = p->data + offset[0];
    t->bytes = (size_t)(offset[1] - offset[0]);
    return USL_OK;
}

static usl_status check_size(parser *p, const usli_file_tensor *t) {
    uint64_t bytes = usli_dtype_bytes(t->dtype);
    for (int i = 0; i < t->ndim; i++)
        if (__builtin_mul_overflow(bytes, (uint64_t)t->shape[i], &bytes))
            return bad_tensor(p, t->name, "its shape is impossibly large");
    return bytes == t->bytes ? USL_OK : bad_tensor(p, t->name, "its offsets do not hold what its shape needs");
}

static usl_status read_tensor(parser *p, const char *name, size_t len) {
    usli_safetensors *f = p->file;
    USLI_TRY(usli_grow(p->ctx, &f->tensors, &p->tensor_cap, f->count + 1, sizeof *f->tensors));
    usli_file_tensor *t = &f->tensors[f->count];
    memset(t, 0, sizeof *t);
    if (!(t->name = usli_strndup(p->ctx, name, len))) return usli_nomem(p->ctx, len);
    f->count++;
    t->map = p->map;
    uint64_t offset[2];
    bool have[3] = { false };
    USLI_TRY(usli_json_expect(&p->r, USLI_JSON_OBJECT, "a tensor's description"));
    for (;;) {
        USLI_TRY(usli_json_next(&p->r));
        if (p->r.kind == USLI_JSON_OBJECT_END) break;
        int which = usli_json_is(&p->r, "dtype")          ? 0
                    : usli_json_is(&p->r, "shape")        ? 1
                    : usli_json_is(&p->r, "data_offsets") ? 2
                                                          : 3;
        if (which == 3 || have[which]) return bad_tensor(p, t->name, "its description holds an unknown or doubled key");
        have[which] = true;
        USLI_TRY(which == 0 ? read_dtype(p, t) : which == 1 ? read_shape(p, t) : read_offsets(p, t, offset));
    }
    if (!have[0] || !have[1] || !have[2]) return bad_tensor(p, t->name, "dtype, shape or data_offsets is missing");
    return check_size(p, t);
}

static usl_status read_meta(parser *p) {
    usli_safetensors *f = p->file;
    USLI_TRY(usli_json_expect(&p->r, USLI_JSON_OBJECT, "__metadata__"));
    for (;;) {
        USLI_TRY(usli_json_next(&p->r));
        if (p->r.kind == USLI_JSON_OBJECT_END) return USL_OK;
        for (int i = 0; i < 2; i++) {
            if (i) USLI_TRY(usli_json_expect(&p->r, USLI_JSON_STRING, "a value of __metadata__"));
            USLI_TRY(usli_grow(p->ctx, &f->meta, &p->meta_cap, 2 * f->meta_count + 2, sizeof *f->meta));
            char *copy = usli_strndup(p->ctx, p->r.str, p->r.len);
            if (!copy) return usli_nomem(p->ctx, p->r.len);
            if (i == 0) {
                f->meta[2 * f->meta_count] = copy;
                f->meta[2 * f->meta_count + 1] = NULL;
                f->meta_count++;
            } else {
                f->meta[2 * f->meta_count - 1] = copy;
            }
        }
    }
}

static int by_data(const void *pa, const void *pb) {
    const usli_file_tensor *a = pa, *b = pb;
    if (a->data != b->data) return (const char *)a->data < (const char *)b->data ? -1 : 1;
    return (a->bytes > b->bytes) - (a->bytes < b->bytes);
}

/* The tensors must tile the data: no overlap, no hole, nothing behind. */
static usl_status check_tiling(parser *p) {
    usli_safetensors *f = p->file;
    const uint8_t *at = p->data;
    if (f->count > p->first) qsort(f->tensors + p->first, f->count - p->first, sizeof *f->tensors, by_data);
    for (size_t i = p->first; i < f->count; i++) {
        const usli_file_tensor *t = &f->tensors[i];
        if ((const uint8_t *)t->data != at)
            return bad_tensor(p, t->name,
                              (const uint8_t *)t->data < at ? "it overlaps another" : "there is a hole before it");
        at += t->bytes;
    }
    if (at != p->data + p->data_size)
        return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: %zu bytes follow the last tensor; the file is damaged",
                         p->map->path, (size_t)(p->data + p->data_size - at));
    return USL_OK;
}

static usl_status read_header(parser *p) {
    USLI_TRY(usli_json_expect(&p->r, USLI_JSON_OBJECT, "the header"));
    for (;;) {
        USLI_TRY(usli_json_next(&p->r));
        if (p->r.kind == USLI_JSON_OBJECT_END) break;
        if (usli_json_is(&p->r, "__metadata__")) {
            USLI_TRY(read_meta(p));
        } else {
            char *name = usli_strndup(p->ctx, p->r.str, p->r.len);
            if (!name) return usli_nomem(p->ctx, p->r.len);
            usl_status st = read_tensor(p, name, p->r.len);
            usli_free(p->ctx, name);
            USLI_TRY(st);
        }
    }
    USLI_TRY(usli_json_next(&p->r)); /* nothing may follow */
    return check_tiling(p);
}

static usl_status add_file(parser *p, const char *path) {
    usl_ctx *ctx = p->ctx;
    usli_safetensors *f = p->file;
    usli_map **maps = usli_realloc(ctx, f->maps, (f->map_count + 1) * sizeof *maps);
    if (!maps) return usli_nomem(ctx, sizeof *maps);
    f->maps = maps;
    USLI_TRY(usli_map_open(ctx, path, &p->map));
    f->maps[f->map_count++] = p->map;
    const uint8_t *b = p->map->data;
    uint64_t len = 0;
    if (p->map->size < 8)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: is no safetensors file: it has %zu bytes", path, p->map->size);
    for (int i = 8; i-- > 0;) len = len << 8 | b[i];
    if (len > MAX_HEADER || len > p->map->size - 8)
        return usli_fail(ctx, USL_ERR_FORMAT,
                         "%s: its header claims %llu bytes and the file has %zu; it is cut off, or no safetensors",
                         path, (unsigned long long)len, p->map->size);
    p->data = b + 8 + len;
    p->data_size = p->map->size - 8 - (size_t)len;
    p->first = f->count;
    usli_json_init(&p->r, ctx, path, (const char *)b + 8, (size_t)len);
    usl_status st = read_header(p);
    usli_json_done(&p->r);
    return st;
}

/* ---- A sharded set
 * ------------------------------------------------------------------------------------------------------------------ */

static usl_status add_shards(parser *p, const char *index) {
    usl_ctx *ctx = p->ctx;
    json_t *json, *seen = json_object();
    char *dir = usli_strdup(ctx, index);
    usl_status st = USL_OK;
    const char *key;
    json_t *value;
    if (!seen || !dir) {
        if (seen) json_decref(seen);
        usli_free(ctx, dir);
        return usli_nomem(ctx, strlen(index));
    }
    char *slash = strrchr(dir, '/');
    if (slash)
        *slash = 0;
    else
        strcpy(dir, *dir ? "." : "");
    USLI_TRYGO(usli_json_load(ctx, index, &json));
    json_t *map = json_object_get(json, "weight_map");
    if (!json_is_object(map)) st = usli_fail(ctx, USL_ERR_FORMAT, "%s: there is no weight_map", index);
    json_object_foreach(map, key, value) {
        if (st != USL_OK) break;
        const char *name = json_string_value(value);
        if (!name || strchr(name, '/') || !*name) {
            st = usli_fail(ctx, USL_ERR_FORMAT, "%s: the file of \"%s\" is not a plain name", index, key);
        } else if (!json_object_get(seen, name)) {
            char *path = usli_path_join(ctx, dir, name);
            st = path && json_object_set_new(seen, name, json_true()) == 0 ? add_file(p, path) : usli_nomem(ctx, 0);
            usli_free(ctx, path);
        }
    }
    json_decref(json);
done:
    json_decref(seen);
    usli_free(ctx, dir);
    return st;
}

static int by_name(const void *pa, const void *pb) {
    return strcmp(((const usli_file_tensor *)pa)->name, ((const usli_file_tensor *)pb)->name);
}

static usl_status open_any(parser *p, const char *path) {
    usl_ctx *ctx = p->ctx;
    if (!usli_is_dir(path)) {
        size_t n = strlen(path);
        return n > 5 && strcmp(path + n - 5, ".json") == 0 ? add_shards(p, path) : add_file(p, path);
    }
    char *one = usli_path_join(ctx, path, "model.safetensors"),
         *index = usli_path_join(ctx, path, "model.safetensors.index.json");
    usl_status st;
    if (!one || !index)
        st = usli_nomem(ctx, strlen(path));
    else if (usli_is_file(one))
        st = add_file(p, one);
    else if (usli_is_file(index))
        st = add_shards(p, index);
    else
        st = usli_fail(ctx, USL_ERR_NOT_FOUND,
                       "%s: there is neither model.safetensors nor model.safetensors.index.json", path);
    usli_free(ctx, one);
    usli_free(ctx, index);
    return st;
}

usl_status usli_safetensors_open(usl_ctx *ctx, const char *path, usli_safetensors **out) {
    *out = NULL;
    usli_safetensors *f = usli_calloc(ctx, 1, sizeof *f);
    if (!f) return usli_nomem(ctx, sizeof *f);
    f->ctx = ctx;
    usli_ctx_retain(ctx);
    parser p = { .ctx = ctx, .file = f };
    usl_status st = open_any(&p, path);
    if (st == USL_OK && f->count) qsort(f->tensors, f->count, sizeof *f->tensors, by_name);
    for (size_t i = 1; st == USL_OK && i < f->count; i++)
        if (strcmp(f->tensors[i - 1].name, f->tensors[i].name) == 0)
            st = usli_fail(ctx, USL_ERR_FORMAT, "%s: tensor \"%s\" is there twice", path, f->tensors[i].name);
    if (st != USL_OK) {
        usli_safetensors_close(f);
        return st;
    }
    *out = f;
    return USL_OK;
}

void usli_safetensors_close(usli_safetensors *f) {
    if (!f) return;
    usl_ctx *ctx = f->ctx;
    for (size_t i = 0; i < f->count; i++) usli_free(ctx, f->tensors[i].name);
    for (size_t i = 0; i < 2 * f->meta_count; i++) usli_free(ctx, f->meta[i]);
    for (size_t i = 0; i < f->map_count; i++) usli_map_release(f->maps[i]);
    usli_free(ctx, f->tensors);
    usli_free(ctx, f->meta);
    usli_free(ctx, f->maps);
    usli_free(ctx, f);
    usl_ctx_free(ctx);
}

const usli_file_tensor *usli_safetensors_find(const usli_safetensors *f, const char *name) {
    usli_file_tensor key = { .name = (char *)(uintptr_t)name };
    return f->count ? bsearch(&key, f->tensors, f->count, sizeof *f->tensors, by_name) : NULL;
}

/* ---- Writing
 * ---------------------------------------------------------------------------------------------------------------------------
 */

struct usli_safetensors_writer {
    usl_ctx *ctx;
    usli_writer *file;
    json_t *meta;   /* object */
    json_t *header; /* object, in order */
    uint64_t total, start;
};

usl_status usli_safetensors_create(usl_ctx *ctx, const char *path, usli_safetensors_writer **out) {
    *out = NULL;
    usli_safetensors_writer *w = usli_calloc(ctx, 1, sizeof *w);
    if (!w) return usli_nomem(ctx, sizeof *w);
    w->ctx = ctx;
    w->meta = json_object();
    w->header = json_object();
    usl_status st = w->meta && w->header ? usli_writer_open(ctx, path, &w->file) : usli_nomem(ctx, 0);
    if (st != USL_OK) {
        usli_safetensors_abandon(w);
        return st;
    }
    *out = w;
    return USL_OK;
}

/* The header is JSON: text that is not UTF-8 cannot stand in it. */
static usl_status check_text(const usli_safetensors_writer *w, const char *what, const char *text) {
    if (usli_utf8_is_text(text)) return USL_OK;
    return usli_fail(w->ctx, USL_ERR_INVALID, "%s in a safetensors file must be valid UTF-8", what);
}

usl_status usli_safetensors_meta(usli_safetensors_writer *w, const char *key, const char *value) {
    USLI_TRY(check_text(w, "metadata", key));
    USLI_TRY(check_text(w, "metadata", value));
    return json_object_set_new(w->meta, key, json_string(value)) == 0 ? USL_OK : usli_nomem(w->ctx, 0);
}

usl_status usli_safetensors_add(usli_safetensors_writer *w, const char *name, usl_dtype dtype, int ndim,
                                const int64_t *shape) {
    const char *type = NULL;
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (DTYPES[i].dtype == dtype) type = DTYPES[i].name;
    if (!type)
        return usli_fail(w->ctx, USL_ERR_UNSUPPORTED, "safetensors cannot hold the type %s", usl_dtype_name(dtype));
    USLI_TRY(check_text(w, "a tensor's name", name));
    if (json_object_get(w->header, name))
        return usli_fail(w->ctx, USL_ERR_INVALID, "tensor \"%s\" is given twice", name);
    uint64_t bytes = usli_dtype_bytes(dtype);
    json_t *dims = json_array();
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0 || __builtin_mul_overflow(bytes, (uint64_t)shape[i], &bytes)) {
            json_decref(dims);
            return usli_fail(w->ctx, USL_ERR_SHAPE, "tensor \"%s\" has an impossible shape", name);
        }
        json_array_append_new(dims, json_integer(shape[i]));
    }
    json_t *entry = json_pack("{s:s,s:o,s:[I,I]}", "dtype", type, "shape", dims, "data_offsets", (json_int_t)w->total,
                              (json_int_t)(w->total + bytes));
    if (!entry || json_object_set_new(w->header, name, entry) != 0) return usli_nomem(w->ctx, 0);
    w->total += bytes;
    return USL_OK;
}

usl_status usli_safetensors_begin(usli_safetensors_writer *w) {
    json_t *all = json_object();
    if (!all) return usli_nomem(w->ctx, 0);
    int bad = json_object_size(w->meta) ? json_object_set(all, "__metadata__", w->meta) : 0;
    bad |= json_object_update(all, w->header);
    char *text = NULL;
    size_t len = 0;
    usl_status st = bad ? usli_nomem(w->ctx, 0) : usli_json_dump(w->ctx, all, 0, &text, &len);
    json_decref(all);
    if (st != USL_OK) return st;
    uint64_t padded = (len + 7) & ~(uint64_t)7;
    uint8_t size[8];
    for (int i = 0; i < 8; i++) size[i] = (uint8_t)(padded >> (8 * i));
    st = usli_writer_write(w->file, size, 8);
    if (st == USL_OK) st = usli_writer_write(w->file, text, len);
    if (st == USL_OK) st = usli_writer_write(w->file, "       ", (size_t)(padded - len));
    usli_free(w->ctx, text);
    w->start = usli_writer_offset(w->file);
    return st;
}

usl_status usli_safetensors_write(usli_safetensors_writer *w, const void *data, size_t bytes) {
    return usli_writer_write(w->file, data, bytes);
}

usl_status usli_safetensors_commit(usli_safetensors_writer *w) {
    uint64_t written = usli_writer_offset(w->file) - w->start;
    if (written != w->total)
        return usli_fail(w->ctx, USL_ERR_INTERNAL, "%llu of %llu bytes of tensors were written",
                         (unsigned long long)written, (unsigned long long)w->total);
    return usli_writer_commit(w->file);
}

void usli_safetensors_abandon(usli_safetensors_writer *w) {
    if (!w) return;
    usli_writer_close(w->file);
    if (w->meta) json_decref(w->meta);
    if (w->header) json_decref(w->header);
    usli_free(w->ctx, w);
}
