#include "core/data/dataset.h"

#include <stdio.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/io/json.h"

struct usli_source {
    size_t refs;
    bool lines;
    char name[];
};

typedef struct entry {
    json_t *row;
    usli_source *source; /* NULL: from no file */
    int64_t number;      /* from 1: the line, or the place in the list */
} entry;

struct usl_dataset {
    usl_ctx *ctx;
    atomic_int refs;
    bool from_file;
    entry *entries;
    size_t count, cap;
};

usl_status usli_source_new(usl_ctx *ctx, const char *name, bool lines, usli_source **out) {
    size_t len = strlen(name) + 1;
    usli_source *s = *out = usli_malloc(ctx, sizeof *s + len);
    if (!s) return usli_nomem(ctx, sizeof *s + len);
    s->refs = 1;
    s->lines = lines;
    memcpy(s->name, name, len);
    return USL_OK;
}

void usli_source_release(usl_ctx *ctx, usli_source *s) {
    if (s && --s->refs == 0) usli_free(ctx, s);
}

usl_status usli_dataset_new(usl_ctx *ctx, usli_dataset **out) {
    usli_dataset *ds = *out = usli_calloc(ctx, 1, sizeof *ds);
    if (!ds) return usli_nomem(ctx, sizeof *ds);
    ds->ctx = ctx;
    usli_ctx_retain(ctx);
    atomic_init(&ds->refs, 1);
    return USL_OK;
}

usli_dataset *usli_dataset_retain(usli_dataset *ds) {
    if (ds) atomic_fetch_add(&ds->refs, 1);
    return ds;
}

void usli_dataset_release(usli_dataset *ds) {
    if (!ds || atomic_fetch_sub(&ds->refs, 1) != 1) return;
    usl_ctx *ctx = ds->ctx;
    for (size_t i = 0; i < ds->count; i++) {
        json_decref(ds->entries[i].row);
        usli_source_release(ctx, ds->entries[i].source);
    }
    usli_free(ctx, ds->entries);
    usli_free(ctx, ds);
    usl_ctx_free(ctx);
}

usl_ctx *usli_dataset_ctx(const usli_dataset *ds) {
    return ds->ctx;
}

int64_t usli_dataset_rows(const usli_dataset *ds) {
    return (int64_t)ds->count;
}

const json_t *usli_dataset_row(const usli_dataset *ds, int64_t i) {
    return ds->entries[i].row;
}

const char *usli_dataset_where(const usli_dataset *ds, int64_t i, char *buf, size_t size) {
    const entry *e = &ds->entries[i];
    if (!size) return buf;
    if (!e->source) {
        snprintf(buf, size, "row %lld", (long long)e->number);
        return buf;
    }
    /* The number is worth more than the first folders of a path. */
    char place[40];
    size_t tail =
        (size_t)snprintf(place, sizeof place, ": %s %lld", e->source->lines ? "line" : "row", (long long)e->number);
    size_t len = strlen(e->source->name), room = size > tail + 1 ? size - tail - 1 : 0;
    snprintf(buf, size, "%s%s", e->source->name + (len > room ? len - room : 0), place);
    return buf;
}

const char *usli_json_type_name(const json_t *value) {
    static const char *const NAMES[] = { "an object", "a list", "a string", "a number",
                                         "a number",  "true",   "false",    "null" };
    return value ? NAMES[json_typeof(value)] : "missing";
}

usl_status usli_dataset_push(usli_dataset *ds, usli_source *source, int64_t number, json_t *row) {
    usl_status st = usli_grow(ds->ctx, &ds->entries, &ds->cap, ds->count + 1, sizeof *ds->entries);
    if (st != USL_OK) {
        json_decref(row);
        return st;
    }
    if (source) {
        source->refs++;
        ds->from_file = true;
    }
    ds->entries[ds->count++] = (entry){ row, source, number };
    return USL_OK;
}

usl_status usli_dataset_append(usli_dataset *ds, const char *json, size_t len) {
    usl_ctx *ctx = ds->ctx;
    char name[40];
    json_t *row;
    if (ds->from_file || atomic_load(&ds->refs) != 1)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "rows cannot be added to a data set that came from a file or is in use; make a new one");
    snprintf(name, sizeof name, "row %zu", ds->count + 1);
    USLI_TRY(usli_json_parse(ctx, name, json, len, &row));
    if (!json_is_object(row)) {
        usli_fail(ctx, USL_ERR_FORMAT, "%s is %s; a row is an object, like {\"text\": \"...\"}", name,
                  usli_json_type_name(row));
        json_decref(row);
        return USL_ERR_FORMAT;
    }
    return usli_dataset_push(ds, NULL, (int64_t)ds->count + 1, row);
}

usl_status usli_dataset_add(usli_dataset *ds, const usli_dataset *from, int64_t i, json_t *row) {
    const entry *e = &from->entries[i];
    return usli_dataset_push(ds, e->source, e->number, row ? row : json_incref(e->row));
}

usl_status usli_dataset_select(const usli_dataset *ds, const int64_t *index, int64_t count, usli_dataset **out) {
    usl_ctx *ctx = ds->ctx;
    *out = NULL;
    if (count < 0) return usli_fail(ctx, USL_ERR_INVALID, "a data set cannot have %lld rows", (long long)count);
    for (int64_t i = 0; i < count; i++)
        if (index[i] < 0 || index[i] >= (int64_t)ds->count)
            return usli_fail(ctx, USL_ERR_INVALID, "there is no row %lld in a data set of %zu rows (counted from 0)",
                             (long long)index[i], ds->count);
    USLI_TRY(usli_dataset_new(ctx, out));
    for (int64_t i = 0; i < count; i++) {
        usl_status st = usli_dataset_add(*out, ds, index[i], NULL);
        if (st != USL_OK) {
            usli_dataset_release(*out);
            *out = NULL;
            return st;
        }
    }
    return USL_OK;
}

usl_status usli_dataset_shuffle(const usli_dataset *ds, uint32_t seed, usli_dataset **out) {
    usl_ctx *ctx = ds->ctx;
    *out = NULL;
    int64_t *order = usli_malloc(ctx, (ds->count + 1) * sizeof *order);
    if (!order) return usli_nomem(ctx, (ds->count + 1) * sizeof *order);
    usli_randperm(seed, (int64_t)ds->count, order);
    usl_status st = usli_dataset_select(ds, order, (int64_t)ds->count, out);
    usli_free(ctx, order);
    return st;
}
