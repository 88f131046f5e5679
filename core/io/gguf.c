#include "core/io/gguf.h"

#include <stdlib.h>
#include <string.h>

#include "core/quant/traits.h"

/* ---- A cursor that cannot leave the file
 * ------------------------------------------------------------------------------------ */

typedef struct parser {
    usl_ctx *ctx;
    usli_gguf *file;
    const uint8_t *pos, *end;
    bool failed; /* ran past the end */
} parser;

static usl_status cut(parser *p) {
    return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: the file ends in the middle of its header; it is cut off or damaged",
                     p->file->map->path);
}

static uint64_t get(parser *p, int bytes) {
    if (p->end - p->pos < bytes) {
        p->failed = true;
        p->pos = p->end;
        return 0;
    }
    uint64_t v = 0;
    for (int i = bytes; i-- > 0;) v = v << 8 | p->pos[i];
    p->pos += bytes;
    return v;
}

static usl_status get_str(parser *p, usli_gguf_str *out) {
    uint64_t len = get(p, 8);
    if (p->failed || len > (uint64_t)(p->end - p->pos)) return cut(p);
    out->data = (const char *)p->pos;
    out->len = (size_t)len;
    p->pos += len;
    return USL_OK;
}

static int type_bytes(usli_gguf_type type) {
    static const int BYTES[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return (unsigned)type < sizeof BYTES / sizeof *BYTES ? BYTES[type] : 0;
}

/* ---- Metadata
 * ----------------------------------------------------------------------------------------------------------------------
 */

static usl_status bad_key(parser *p, const usli_gguf_kv *kv, const char *what) {
    return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: metadata \"%s\": %s", p->file->map->path, kv->key, what);
}

static usl_status read_strings(parser *p, usli_gguf_kv *kv, uint64_t count) {
    /* Each string takes 8 bytes at least: a lying count cannot ask for more memory than the file explains. */
    if (count > (uint64_t)(p->end - p->pos) / 8) return bad_key(p, kv, "its length lies outside the file");
    if (!(kv->strings = usli_calloc(p->ctx, (size_t)count + 1, sizeof *kv->strings)))
        return usli_nomem(p->ctx, (size_t)count * 16);
    for (uint64_t i = 0; i < count; i++) USLI_TRY(get_str(p, &kv->strings[i]));
    return USL_OK;
}

static usl_status read_value(parser *p, usli_gguf_kv *kv) {
    kv->type = (usli_gguf_type)get(p, 4);
    if (p->failed) return cut(p);
    if (kv->type == USLI_GGUF_STRING) {
        kv->count = 1;
        return read_strings(p, kv, 1);
    }
    if (kv->type == USLI_GGUF_ARRAY) {
        kv->elem = (usli_gguf_type)get(p, 4);
        kv->count = get(p, 8);
        if (p->failed) return cut(p);
        if (kv->elem == USLI_GGUF_STRING) return read_strings(p, kv, kv->count);
        int size = type_bytes(kv->elem);
        if (!size) return bad_key(p, kv, "the type of its elements is not known");
        if (kv->count > (uint64_t)(p->end - p->pos) / (uint64_t)size)
            return bad_key(p, kv, "its length lies outside the file");
        kv->data = p->pos;
        p->pos += kv->count * (uint64_t)size;
        return USL_OK;
    }
    int size = type_bytes(kv->type);
    if (!size) return bad_key(p, kv, "its type is not known");
    if (p->end - p->pos < size) return cut(p);
    kv->count = 1;
    kv->data = p->pos;
    p->pos += size;
    return USL_OK;
}

static usl_status read_metadata(parser *p, uint64_t count) {
    usli_gguf *f = p->file;
    size_t cap = 0;
    for (uint64_t i = 0; i < count; i++) {
        USLI_TRY(usli_grow(p->ctx, &f->kv, &cap, f->kv_count + 1, sizeof *f->kv));
        usli_gguf_kv *kv = &f->kv[f->kv_count];
        usli_gguf_str key = { 0 };
        memset(kv, 0, sizeof *kv);
        USLI_TRY(get_str(p, &key));
        if (key.len > 65535) return cut(p);
        if (!(kv->key = usli_strndup(p->ctx, key.data, key.len))) return usli_nomem(p->ctx, key.len);
        f->kv_count++;
        USLI_TRY(read_value(p, kv));
    }
    return USL_OK;
}

/* ---- Tensors
 * -------------------------------------------------------------------------------------------------------------------------
 */

static usl_status bad_tensor(parser *p, const usli_file_tensor *t, const char *what) {
    return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: tensor \"%s\": %s", p->file->map->path, t->name, what);
}

static usl_status read_tensor(parser *p, usli_file_tensor *t, uint64_t *offset) {
    uint64_t dims = get(p, 4), elements = 1;
    if (p->failed) return cut(p);
    if (dims > 4) return bad_tensor(p, t, "it has more than 4 dimensions");
    t->ndim = (int)dims;
    for (int i = t->ndim; i-- > 0;) {
        uint64_t d = get(p, 8);
        if (d > INT64_MAX || (d && elements > INT64_MAX / d))
            return bad_tensor(p, t, "its dimensions are impossibly large");
        t->shape[i] = (int64_t)d;
        elements *= d;
    }
    uint32_t type = (uint32_t)get(p, 4);
    *offset = get(p, 8);
    if (p->failed) return cut(p);
    const usli_traits *traits = type < 64 ? usli_traits_of((usl_dtype)type) : NULL;
    if (!traits)
        return usli_fail(p->ctx, USL_ERR_UNSUPPORTED, "%s: tensor \"%s\" has type %u, which is not known",
                         p->file->map->path, t->name, type);
    t->dtype = (usl_dtype)type;
    int64_t row = t->ndim ? t->shape[t->ndim - 1] : 1;
    if (row % traits->block) return bad_tensor(p, t, "its rows are no whole number of blocks");
    t->bytes = usli_row_bytes(t->dtype, (int64_t)elements);
    if (elements && !t->bytes) return bad_tensor(p, t, "its dimensions are impossibly large");
    return USL_OK;
}

typedef struct place {
    uint64_t offset;
    size_t index;
} place;

static int by_offset(const void *pa, const void *pb) {
    const place *a = pa, *b = pb;
    return (a->offset > b->offset) - (a->offset < b->offset);
}

static int by_name(const void *pa, const void *pb) {
    const usli_file_tensor *const *a = pa, *const *b = pb;
    return strcmp((*a)->name, (*b)->name);
}

/* Offsets aligned, inside the file, not overlapping; names once each. */
static usl_status check_tensors(parser *p, place *places, const usli_file_tensor **names) {
    usli_gguf *f = p->file;
    size_t header = (size_t)(p->pos - f->map->data), start = (header + f->alignment - 1) / f->alignment * f->alignment;
    size_t room = f->map->size > start ? f->map->size - start : 0;
    for (size_t i = 0; i < f->tensor_count; i++) {
        usli_file_tensor *t = &f->tensors[i];
        if (places[i].offset % f->alignment) return bad_tensor(p, t, "its offset is not aligned");
        if (places[i].offset > room || t->bytes > room - places[i].offset)
            return bad_tensor(p, t, "its data lies outside the file; the file is cut off");
        t->data = f->map->data + start + places[i].offset;
        t->map = f->map;
        names[i] = t;
    }
    if (!f->tensor_count) return USL_OK;
    qsort(places, f->tensor_count, sizeof *places, by_offset);
    qsort(names, f->tensor_count, sizeof *names, by_name);
    for (size_t i = 1; i < f->tensor_count; i++) {
        const usli_file_tensor *a = &f->tensors[places[i - 1].index], *b = &f->tensors[places[i].index];
        if (places[i - 1].offset + a->bytes > places[i].offset) return bad_tensor(p, b, "it overlaps another");
        if (strcmp(names[i - 1]->name, names[i]->name) == 0) return bad_tensor(p, names[i], "it is there twice");
    }
    return USL_OK;
}

static usl_status read_tensors(parser *p, uint64_t count) {
    usli_gguf *f = p->file;
    /* A description takes 24 bytes at least. */
    if (count > (uint64_t)(p->end - p->pos) / 24)
        return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: claims %llu tensors, more than the file can hold", f->map->path,
                         (unsigned long long)count);
    size_t n = (size_t)count;
    f->tensors = usli_calloc(p->ctx, n + 1, sizeof *f->tensors);
    place *places = usli_calloc(p->ctx, n + 1, sizeof *places);
    const usli_file_tensor **names = usli_calloc(p->ctx, n + 1, sizeof *names);
    usl_status st = f->tensors && places && names ? USL_OK : usli_nomem(p->ctx, (n + 1) * sizeof *f->tensors);
    for (size_t i = 0; st == USL_OK && i < n; i++) {
        usli_gguf_str name = { 0 };
        if ((st = get_str(p, &name)) != USL_OK) break;
        if (!(f->tensors[i].name = usli_strndup(p->ctx, name.data, name.len))) {
            st = usli_nomem(p->ctx, name.len);
            break;
        }
        f->tensor_count++;
        places[i].index = i;
        st = read_tensor(p, &f->tensors[i], &places[i].offset);
    }
    if (st == USL_OK) st = check_tensors(p, places, names);
    usli_free(p->ctx, places);
    usli_free(p->ctx, names);
    return st;
}

static usl_status read_file(parser *p) {
    usli_gguf *f = p->file;
    const char *path = f->map->path;
    if (f->map->size < 4 || memcmp(f->map->data, "GGUF", 4) != 0)
        return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: is no GGUF file", path);
    p->pos = f->map->data + 4;
    p->end = f->map->data + f->map->size;
    f->version = (uint32_t)get(p, 4);
    if (p->failed) return cut(p);
    if (f->version != 2 && f->version != 3)
        return usli_fail(p->ctx, USL_ERR_UNSUPPORTED, "%s: is GGUF version %u; versions 2 and 3 are read", path,
                         f->version);
    uint64_t tensors = get(p, 8), keys = get(p, 8);
    if (p->failed) return cut(p);
    USLI_TRY(read_metadata(p, keys));
    int64_t alignment = usli_gguf_int(f, "general.alignment", 32);
    if (alignment < 1 || alignment > 1 << 20 || (alignment & (alignment - 1)))
        return usli_fail(p->ctx, USL_ERR_FORMAT, "%s: general.alignment is %lld, no power of two", path,
                         (long long)alignment);
    f->alignment = (size_t)alignment;
    return read_tensors(p, tensors);
}

usl_status usli_gguf_open(usl_ctx *ctx, const char *path, usli_gguf **out) {
    *out = NULL;
    usli_gguf *f = usli_calloc(ctx, 1, sizeof *f);
    if (!f) return usli_nomem(ctx, sizeof *f);
    f->ctx = ctx;
    usli_ctx_retain(ctx);
    parser p = { .ctx = ctx, .file = f };
    usl_status st = usli_map_open(ctx, path, &f->map);
    if (st == USL_OK) st = read_file(&p);
    if (st != USL_OK) {
        usli_gguf_close(f);
        return st;
    }
    *out = f;
    return USL_OK;
}

void usli_gguf_close(usli_gguf *f) {
    if (!f) return;
    usl_ctx *ctx = f->ctx;
    for (size_t i = 0; i < f->kv_count; i++) {
        usli_free(ctx, f->kv[i].key);
        usli_free(ctx, f->kv[i].strings);
    }
    for (size_t i = 0; i < f->tensor_count; i++) usli_free(ctx, f->tensors[i].name);
    usli_free(ctx, f->kv);
    usli_free(ctx, f->tensors);
    usli_map_release(f->map);
    usli_free(ctx, f);
    usl_ctx_free(ctx);
}

/* ---- Looking up
 * ------------------------------------------------------------------------------------------------------------------------
 */

const usli_gguf_kv *usli_gguf_find(const usli_gguf *f, const char *key) {
    for (size_t i = 0; i < f->kv_count; i++)
        if (strcmp(f->kv[i].key, key) == 0) return &f->kv[i];
    return NULL;
}

const usli_file_tensor *usli_gguf_tensor(const usli_gguf *f, const char *name) {
    for (size_t i = 0; i < f->tensor_count; i++)
        if (strcmp(f->tensors[i].name, name) == 0) return &f->tensors[i];
    return NULL;
}

static uint64_t little(const uint8_t *p, int bytes) {
    uint64_t v = 0;
    for (int i = bytes; i-- > 0;) v = v << 8 | p[i];
    return v;
}

static double number(usli_gguf_type type, const uint8_t *p, int64_t *integer) {
    uint64_t v = little(p, type_bytes(type));
    uint32_t v32 = (uint32_t)v;
    float f;
    double d;
    switch (type) {
    case USLI_GGUF_I8: *integer = (int8_t)v; break;
    case USLI_GGUF_I16: *integer = (int16_t)v; break;
    case USLI_GGUF_I32: *integer = (int32_t)v; break;
    case USLI_GGUF_F32:
        memcpy(&f, &v32, sizeof f);
        *integer = f > -9e18f && f < 9e18f ? (int64_t)f : 0;
        return (double)f;
    case USLI_GGUF_F64:
        memcpy(&d, &v, sizeof d);
        *integer = d > -9e18 && d < 9e18 ? (int64_t)d : 0;
        return d;
    default: *integer = (int64_t)v; break;
    }
    return type == USLI_GGUF_U64 ? (double)v : (double)*integer;
}

static bool is_number(const usli_gguf_kv *kv) {
    return kv && kv->type != USLI_GGUF_STRING && kv->type != USLI_GGUF_ARRAY;
}

int64_t usli_gguf_int(const usli_gguf *f, const char *key, int64_t fallback) {
    const usli_gguf_kv *kv = usli_gguf_find(f, key);
    int64_t i = fallback;
    if (is_number(kv)) number(kv->type, kv->data, &i);
    return i;
}

double usli_gguf_float(const usli_gguf *f, const char *key, double fallback) {
    const usli_gguf_kv *kv = usli_gguf_find(f, key);
    int64_t i;
    return is_number(kv) ? number(kv->type, kv->data, &i) : fallback;
}

bool usli_gguf_bool(const usli_gguf *f, const char *key, bool fallback) {
    return usli_gguf_int(f, key, fallback) != 0;
}

usli_gguf_str usli_gguf_string(const usli_gguf *f, const char *key) {
    const usli_gguf_kv *kv = usli_gguf_find(f, key);
    return kv && kv->type == USLI_GGUF_STRING ? kv->strings[0] : (usli_gguf_str){ NULL, 0 };
}

int64_t usli_gguf_array_int(const usli_gguf_kv *kv, uint64_t i) {
    int64_t v = 0;
    if (kv->data && i < kv->count) number(kv->elem, kv->data + i * (uint64_t)type_bytes(kv->elem), &v);
    return v;
}

double usli_gguf_array_float(const usli_gguf_kv *kv, uint64_t i) {
    int64_t v;
    return kv->data && i < kv->count ? number(kv->elem, kv->data + i * (uint64_t)type_bytes(kv->elem), &v) : 0;
}
