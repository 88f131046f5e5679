/* jansson's values from our reader, and back to text. */
#include <string.h>

#include "core/base/file.h"
#include "core/base/number.h"
#include "core/io/json.h"

static usl_status build_array(usli_json_reader *r, json_t *array) {
    for (;;) {
        json_t *item;
        USLI_TRY(usli_json_next(r));
        if (r->kind == USLI_JSON_ARRAY_END) return USL_OK;
        USLI_TRY(usli_json_build(r, &item));
        if (json_array_append_new(array, item) != 0) return usli_nomem(r->ctx, 0);
    }
}

static usl_status build_object(usli_json_reader *r, json_t *object) {
    for (;;) {
        json_t *item;
        USLI_TRY(usli_json_next(r));
        if (r->kind == USLI_JSON_OBJECT_END) return USL_OK;
        if (memchr(r->str, 0, r->len))
            return usli_fail(r->ctx, USL_ERR_UNSUPPORTED, "%s: a key holds the character NUL", r->name);
        char *key = usli_strndup(r->ctx, r->str, r->len);
        if (!key) return usli_nomem(r->ctx, r->len);
        usl_status st = usli_json_next(r);
        if (st == USL_OK) st = usli_json_build(r, &item);
        if (st == USL_OK && json_object_set_new_nocheck(object, key, item) != 0) st = usli_nomem(r->ctx, 0);
        usli_free(r->ctx, key);
        USLI_TRY(st);
    }
}

usl_status usli_json_build(usli_json_reader *r, json_t **out) {
    json_t *v = NULL;
    usl_status st = USL_OK;
    *out = NULL;
    switch (r->kind) {
    case USLI_JSON_NULL: v = json_null(); break;
    case USLI_JSON_BOOL: v = json_boolean(r->i); break;
    case USLI_JSON_INT: v = json_integer(r->i); break;
    case USLI_JSON_FLOAT: v = json_real(r->d); break;
    case USLI_JSON_STRING: v = json_stringn_nocheck(r->str, r->len); break;
    case USLI_JSON_ARRAY:
        if ((v = json_array())) st = build_array(r, v);
        break;
    default:
        if ((v = json_object())) st = build_object(r, v);
        break;
    }
    if (!v) return usli_nomem(r->ctx, 0);
    if (st != USL_OK) {
        json_decref(v);
        return st;
    }
    *out = v;
    return USL_OK;
}

usl_status usli_json_parse(usl_ctx *ctx, const char *name, const char *text, size_t len, json_t **out) {
    usli_json_reader r;
    usli_json_init(&r, ctx, name, text, len);
    *out = NULL;
    usl_status st = usli_json_next(&r);
    if (st == USL_OK) st = usli_json_build(&r, out);
    if (st == USL_OK) st = usli_json_next(&r);
    usli_json_done(&r);
    if (st != USL_OK && *out) {
        json_decref(*out);
        *out = NULL;
    }
    return st;
}

usl_status usli_json_load(usl_ctx *ctx, const char *path, json_t **out) {
    usli_map *map;
    *out = NULL;
    USLI_TRY(usli_map_open(ctx, path, &map));
    usl_status st = usli_json_parse(ctx, path, (const char *)map->data, map->size, out);
    usli_map_release(map);
    return st;
}

/* ---- Text
 * -------------------------------------------------------------------------------------------------------------------------
 */

typedef struct text {
    usl_ctx *ctx;
    char *data;
    size_t len, cap;
    int indent;
    usl_status st;
} text;

static void put(text *t, const char *s, size_t n) {
    if (t->st != USL_OK || (t->st = usli_grow(t->ctx, &t->data, &t->cap, t->len + n + 1, 1)) != USL_OK) return;
    memcpy(t->data + t->len, s, n);
    t->len += n;
}

static void put_text(text *t, const char *s) {
    put(t, s, strlen(s));
}

static void put_string(text *t, const char *s, size_t n) {
    put(t, "\"", 1);
    for (size_t i = 0, run = 0; i <= n; i++) {
        unsigned char c = i < n ? (unsigned char)s[i] : 0;
        if (i < n && c >= 0x20 && c != '"' && c != '\\') continue;
        put(t, s + run, i - run);
        run = i + 1;
        if (i == n) break;
        static const char FROM[] = "\"\\\b\f\n\r\t", TO[] = "\"\\bfnrt";
        const char *hit = c ? strchr(FROM, c) : NULL;
        char esc[8];
        if (hit)
            snprintf(esc, sizeof esc, "\\%c", TO[hit - FROM]);
        else
            snprintf(esc, sizeof esc, "\\u%04x", c);
        put_text(t, esc);
    }
    put(t, "\"", 1);
}

static void put_real(text *t, double d) {
    char buf[USLI_NUMBER_TEXT];
    usli_number_text(d, buf);
    put_text(t, buf);
}

static void new_line(text *t, int depth) {
    if (!t->indent) return;
    put(t, "\n", 1);
    for (int i = 0; i < depth * t->indent; i++) put(t, " ", 1);
}

static void dump(text *t, const json_t *v, int depth) {
    size_t i;
    const char *key;
    json_t *item;
    const char *comma = t->indent ? "," : ", ";
    bool first = true;
    char buf[32];
    switch (json_typeof(v)) {
    case JSON_NULL: put_text(t, "null"); break;
    case JSON_TRUE: put_text(t, "true"); break;
    case JSON_FALSE: put_text(t, "false"); break;
    case JSON_INTEGER:
        snprintf(buf, sizeof buf, "%lld", (long long)json_integer_value(v));
        put_text(t, buf);
        break;
    case JSON_REAL: put_real(t, json_real_value(v)); break;
    case JSON_STRING: put_string(t, json_string_value(v), json_string_length(v)); break;
    case JSON_ARRAY:
        put_text(t, "[");
        json_array_foreach(v, i, item) {
            if (!first) put_text(t, comma);
            first = false;
            new_line(t, depth + 1);
            dump(t, item, depth + 1);
        }
        if (!first) new_line(t, depth);
        put_text(t, "]");
        break;
    case JSON_OBJECT:
        put_text(t, "{");
        json_object_foreach((json_t *)(uintptr_t)v, key, item) {
            if (!first) put_text(t, comma);
            first = false;
            new_line(t, depth + 1);
            put_string(t, key, strlen(key));
            put_text(t, ": ");
            dump(t, item, depth + 1);
        }
        if (!first) new_line(t, depth);
        put_text(t, "}");
        break;
    }
}

usl_status usli_json_dump(usl_ctx *ctx, const json_t *value, int indent, char **out, size_t *len) {
    text t = { .ctx = ctx, .indent = indent };
    *out = NULL;
    dump(&t, value, 0);
    put(&t, "\n", indent ? 1 : 0); /* a text of lines is a file */
    if (t.st != USL_OK) {
        usli_free(ctx, t.data);
        return t.st;
    }
    t.data[t.len] = 0;
    *out = t.data;
    if (len) *len = t.len;
    return USL_OK;
}
