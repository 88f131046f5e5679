/* usl_dataset_*: the handle is core/data's own. */
#include <string.h>

#include "core/api/need.h"
#include "core/data/formats.h"

usl_status usl_dataset_load(usl_ctx *ctx, const char *kind, const char *const *paths, size_t count, usl_dataset **out) {
    if (!out) return usli_fail(ctx, USL_ERR_INVALID, "usl_dataset_load needs a place for the data set");
    *out = NULL;
    if (!kind || (count && !paths)) return usli_fail(ctx, USL_ERR_INVALID, "usl_dataset_load needs a kind and paths");
    for (size_t i = 0; i < count; i++) USLI_NEED_PATH(ctx, paths[i], USL_ACCESS_READ);
    return usli_dataset_load(ctx, kind, paths, count, out);
}

usl_status usl_dataset_new(usl_ctx *ctx, usl_dataset **out) {
    return usli_dataset_new(ctx, out);
}

void usl_dataset_free(usl_dataset *ds) {
    usli_dataset_release(ds);
}

usl_status usl_dataset_append(usl_dataset *ds, const char *json, size_t len) {
    return usli_dataset_append(ds, json, len);
}

int64_t usl_dataset_rows(const usl_dataset *ds) {
    return usli_dataset_rows(ds);
}

static int visit(const json_t *value, const usl_json_visitor *v, void *ud) {
    size_t i;
    const char *key;
    json_t *item;
    int stop = 0;
    switch (json_typeof(value)) {
    case JSON_NULL: return v->null ? v->null(ud) : 0;
    case JSON_TRUE:
    case JSON_FALSE: return v->boolean ? v->boolean(ud, json_is_true(value)) : 0;
    case JSON_INTEGER: return v->integer ? v->integer(ud, json_integer_value(value)) : 0;
    case JSON_REAL: return v->real ? v->real(ud, json_real_value(value)) : 0;
    case JSON_STRING: return v->string ? v->string(ud, json_string_value(value), json_string_length(value)) : 0;
    case JSON_ARRAY:
        if (v->begin_array && (stop = v->begin_array(ud))) return stop;
        json_array_foreach(value, i, item) if ((stop = visit(item, v, ud))) return stop;
        return v->end_array ? v->end_array(ud) : 0;
    case JSON_OBJECT:
        if (v->begin_object && (stop = v->begin_object(ud))) return stop;
        json_object_foreach((json_t *)(uintptr_t)value, key, item) {
            if (v->key && (stop = v->key(ud, key, strlen(key)))) return stop;
            if ((stop = visit(item, v, ud))) return stop;
        }
        return v->end_object ? v->end_object(ud) : 0;
    }
    return 0;
}

static usl_status check_row(const usl_dataset *ds, int64_t i) {
    int64_t rows = usli_dataset_rows(ds);
    if (i >= 0 && i < rows) return USL_OK;
    return usli_fail(usli_dataset_ctx(ds), USL_ERR_INVALID,
                     "there is no row %lld in a data set of %lld rows (counted from 0)", (long long)i, (long long)rows);
}

usl_status usl_dataset_visit(const usl_dataset *ds, int64_t i, const usl_json_visitor *v, void *ud) {
    usl_json_visitor visitor;
    char where[USLI_WHERE_MAX];
    USLI_TRY(check_row(ds, i));
    memset(&visitor, 0, sizeof visitor);
    memcpy(&visitor, v, v->size < sizeof visitor ? v->size : sizeof visitor);
    if (!visit(usli_dataset_row(ds, i), &visitor, ud)) return USL_OK;
    return usli_fail(usli_dataset_ctx(ds), USL_ERR_CALLBACK, "%s: the caller stopped",
                     usli_dataset_where(ds, i, where, sizeof where));
}

const char *usl_dataset_where(const usl_dataset *ds, int64_t i, char *buf, size_t size) {
    if (check_row(ds, i) == USL_OK) return usli_dataset_where(ds, i, buf, size);
    if (size) buf[0] = 0;
    return buf;
}

usl_status usl_dataset_select(const usl_dataset *ds, const int64_t *index, int64_t count, usl_dataset **out) {
    return usli_dataset_select(ds, index, count, out);
}

usl_status usl_dataset_shuffle(const usl_dataset *ds, uint32_t seed, usl_dataset **out) {
    return usli_dataset_shuffle(ds, seed, out);
}

usl_status usl_dataset_standardize(const usl_dataset *ds, usl_dataset **out) {
    return usli_standardize(ds, out);
}
