/* Rows from files: JSON lists, JSON lines, text, CSV. */
#include <stdio.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/utf8.h"
#include "core/data/dataset.h"
#include "core/io/json.h"

typedef struct reading {
    usl_ctx *ctx;
    const char *path;
    const char *text, *end; /* the whole file; text is after the byte order mark */
    usli_dataset *ds;
    usli_source *source;
} reading;

static bool space(char c) {
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static usl_status begin_rows(reading *in, bool lines) {
    return usli_source_new(in->ctx, in->path, lines, &in->source);
}

/* Every sentence about a broken file ends in what to do; some do already. */
static usl_status add_remedy(reading *in, usl_status st, const char *remedy) {
    const char *said = in->ctx->errmsg;
    size_t path = strlen(in->path);
    if (st != USL_ERR_FORMAT || strstr(said + (strncmp(said, in->path, path) == 0 ? path : 0), "; ")) return st;
    char message[sizeof in->ctx->errmsg];
    memcpy(message, in->ctx->errmsg, sizeof message);
    return usli_fail(in->ctx, st, "%s; %s", message, remedy);
}

/* ---- JSON
 * --------------------------------------------------------------------------------------------------------------- */

static usl_status push_object(reading *in, int64_t number, json_t *row, const char *place) {
    if (json_is_object(row)) return usli_dataset_push(in->ds, in->source, number, row);
    usl_status st =
        usli_fail(in->ctx, USL_ERR_FORMAT, "%s: %s %lld is %s; a row is an object, like {\"text\": \"...\"}", in->path,
                  place, (long long)number, usli_json_type_name(row));
    json_decref(row);
    return st;
}

/* A list at the top, one row at a time: errors then know the row. name has room for the path and the row. */
static usl_status read_items(reading *in, usli_json_reader *r, char *name, size_t size) {
    USLI_TRY(usli_json_next(r));
    r->name = name;
    for (int64_t number = 1;; number++) {
        json_t *row;
        snprintf(name, size, "%s: row %lld", in->path, (long long)number);
        USLI_TRY(usli_checkpoint(in->ctx));
        USLI_TRY(usli_json_next(r));
        if (r->kind == USLI_JSON_ARRAY_END) break;
        USLI_TRY(usli_json_build(r, &row));
        USLI_TRY(push_object(in, number, row, "row"));
    }
    r->name = in->path;
    return usli_json_next(r);
}

static usl_status read_list(reading *in) {
    usli_json_reader r;
    size_t size = strlen(in->path) + 40;
    USLI_TRY(begin_rows(in, false));
    char *name = usli_malloc(in->ctx, size);
    if (!name) return usli_nomem(in->ctx, size);
    usli_json_init(&r, in->ctx, in->path, in->text, (size_t)(in->end - in->text));
    usl_status st = add_remedy(in, read_items(in, &r, name, size), "correct this row or take it out");
    usli_json_done(&r);
    usli_free(in->ctx, name);
    return st;
}

static usl_status read_lines(reading *in) {
    USLI_TRY(begin_rows(in, true));
    int64_t number = 1;
    for (const char *p = in->text, *stop; p < in->end; p = stop + 1, number++) {
        stop = memchr(p, '\n', (size_t)(in->end - p));
        if (!stop) stop = in->end;
        while (p < stop && space(*p)) p++;
        if (p == stop) continue;
        usli_json_reader r;
        json_t *row = NULL;
        USLI_TRY(usli_checkpoint(in->ctx));
        /* The reader counts lines from the top of the file, and sees this one only. */
        usli_json_init(&r, in->ctx, in->path, in->text, (size_t)(stop - in->text));
        r.pos = p;
        usl_status st = usli_json_next(&r);
        if (st == USL_OK) st = usli_json_build(&r, &row);
        if (st == USL_OK) st = usli_json_next(&r);
        usli_json_done(&r);
        if (st == USL_OK) {
            st = push_object(in, number, row, "line");
        } else {
            json_decref(row);
        }
        USLI_TRY(add_remedy(in, st, "correct this line or take it out"));
    }
    return USL_OK;
}

static usl_status push_whole(reading *in, json_t *whole) {
    const json_t *list = json_object_get(whole, "data");
    USLI_TRY(begin_rows(in, false));
    if (!json_is_array(list)) return usli_dataset_push(in->ds, in->source, 1, json_incref(whole));
    for (size_t i = 0; i < json_array_size(list); i++)
        USLI_TRY(push_object(in, (int64_t)i + 1, json_incref(json_array_get(list, i)), "row"));
    return USL_OK;
}

/* An object first: one line of many, unless it is all the file holds and spans lines or has a list under "data". */
static usl_status read_objects(reading *in, const char *first) {
    const char *stop = memchr(first, '\n', (size_t)(in->end - first)), *last = stop ? stop : in->end;
    while (last > first && space(last[-1])) last--;
    usli_json_reader r;
    json_t *whole = NULL;
    usli_json_init(&r, in->ctx, in->path, in->text, (size_t)(in->end - in->text));
    usl_status st = usli_json_next(&r);
    if (st == USL_OK) st = usli_json_build(&r, &whole);
    const char *rest = r.pos;
    usli_json_done(&r);
    if (st == USL_OK) {
        bool spans = rest > last;
        while (rest < in->end && space(*rest)) rest++;
        bool only = rest == in->end && (spans || json_is_array(json_object_get(whole, "data")));
        st = only ? push_whole(in, whole) : read_lines(in);
        json_decref(whole);
        return st;
    }
    /* A first line that ends in an open bracket begins an indented value; any other is a broken row. */
    bool opening = stop && (last[-1] == '{' || last[-1] == '[');
    if (st == USL_ERR_FORMAT && !opening) return read_lines(in);
    return add_remedy(in, st, "write a list of objects, or one JSON object a line");
}

static usl_status read_json(reading *in) {
    const char *p = in->text;
    while (p < in->end && space(*p)) p++;
    if (p == in->end) return USL_OK;
    if (*p == '[') return read_list(in);
    if (*p == '{') return read_objects(in, p);
    json_t *whole;
    usl_status st = usli_json_parse(in->ctx, in->path, in->text, (size_t)(in->end - in->text), &whole);
    USLI_TRY(add_remedy(in, st, "write a list of objects, or one JSON object a line"));
    st = usli_fail(in->ctx, USL_ERR_FORMAT, "%s holds %s; a data set is a list of objects, or one object a line",
                   in->path, usli_json_type_name(whole));
    json_decref(whole);
    return st;
}

/* ---- Text and CSV
 * ------------------------------------------------------------------------------------------------------- */

static int64_t line_of(const reading *in, const char *at) {
    int64_t line = 1;
    for (const char *p = in->text; p < at; p++) line += *p == '\n';
    return line;
}

static usl_status bad_line(const reading *in, const char *at, const char *what) {
    return usli_fail(in->ctx, USL_ERR_FORMAT, "%s: line %lld: %s", in->path, (long long)line_of(in, at), what);
}

static usl_status check_text(const reading *in) {
    for (const char *p = in->text; p < in->end;) {
        int n = usli_utf8_length(p, in->end);
        if (!n) return bad_line(in, p, "not valid UTF-8; save the file as UTF-8");
        if (!*p) return bad_line(in, p, "a NUL byte, so this is no text; take it out");
        p += n;
    }
    return USL_OK;
}

static usl_status read_text(reading *in) {
    USLI_TRY(check_text(in));
    USLI_TRY(begin_rows(in, true));
    int64_t number = 1;
    for (const char *p = in->text, *stop; p < in->end; p = stop + 1, number++) {
        stop = memchr(p, '\n', (size_t)(in->end - p));
        if (!stop) stop = in->end;
        const char *last = stop > p && stop[-1] == '\r' ? stop - 1 : stop, *q = p;
        while (q < last && space(*q)) q++;
        if (q == last) continue;
        json_t *row = json_object();
        if (!row || json_object_set_new_nocheck(row, "text", json_stringn_nocheck(p, (size_t)(last - p))) != 0) {
            json_decref(row);
            return usli_nomem(in->ctx, (size_t)(last - p));
        }
        USLI_TRY(usli_dataset_push(in->ds, in->source, number, row));
    }
    return USL_OK;
}

typedef struct csv {
    reading *in;
    const char *pos;
    char *field; /* the current one */
    size_t len, cap;
} csv;

static usl_status csv_put(csv *c, const char *text, size_t len) {
    USLI_TRY(usli_grow(c->in->ctx, &c->field, &c->cap, c->len + len + 1, 1));
    memcpy(c->field + c->len, text, len);
    c->len += len;
    c->field[c->len] = 0;
    return USL_OK;
}

/* After the opening quote. */
static usl_status csv_quoted(csv *c) {
    const char *open = c->pos - 1;
    for (;;) {
        const char *quote = memchr(c->pos, '"', (size_t)(c->in->end - c->pos));
        if (!quote) return bad_line(c->in, open, "a quoted field has no end; close its double quote");
        USLI_TRY(csv_put(c, c->pos, (size_t)(quote - c->pos)));
        c->pos = quote + 1;
        if (c->pos == c->in->end || *c->pos != '"') return USL_OK;
        USLI_TRY(csv_put(c, "\"", 1));
        c->pos++;
    }
}

/* Reads a field and what ends it; *more: another field follows in this record. */
static usl_status csv_field(csv *c, bool *more) {
    const char *end = c->in->end;
    c->len = 0;
    USLI_TRY(csv_put(c, "", 0));
    if (c->pos < end && *c->pos == '"') {
        c->pos++;
        USLI_TRY(csv_quoted(c));
    } else {
        const char *p = c->pos;
        while (p < end && *p != ',' && *p != '\n' && *p != '"' && !(*p == '\r' && (p + 1 == end || p[1] == '\n'))) p++;
        if (p < end && *p == '"')
            return bad_line(c->in, p, "a double quote inside a field; put the field in quotes and double it");
        USLI_TRY(csv_put(c, c->pos, (size_t)(p - c->pos)));
        c->pos = p;
    }
    *more = c->pos < end && *c->pos == ',';
    if (c->pos < end && *c->pos == '\r') c->pos++;
    if (c->pos == end) return USL_OK;
    if (*c->pos != ',' && *c->pos != '\n')
        return bad_line(c->in, c->pos, "text after a closing quote; double a quote inside a field");
    c->pos++;
    return USL_OK;
}

static usl_status csv_header(csv *c, json_t *names) {
    bool more = true;
    while (more) {
        USLI_TRY(csv_field(c, &more));
        if (!c->len) return bad_line(c->in, c->pos - 1, "a column has no name; the first row names the columns");
        for (size_t i = 0; i < json_array_size(names); i++)
            if (strcmp(json_string_value(json_array_get(names, i)), c->field) == 0)
                return bad_line(c->in, c->pos - 1, "two columns have the same name; rename one");
        if (json_array_append_new(names, json_stringn_nocheck(c->field, c->len)) != 0)
            return usli_nomem(c->in->ctx, c->len);
    }
    return USL_OK;
}

static usl_status csv_record(csv *c, const json_t *names, json_t *row) {
    const char *start = c->pos;
    size_t columns = json_array_size(names), i = 0;
    bool more = true;
    for (; more; i++) {
        USLI_TRY(csv_field(c, &more));
        if (i >= columns) continue;
        const char *name = json_string_value(json_array_get(names, i));
        if (json_object_set_new_nocheck(row, name, json_stringn_nocheck(c->field, c->len)) != 0)
            return usli_nomem(c->in->ctx, c->len);
    }
    if (i == columns) return USL_OK;
    char what[120];
    snprintf(what, sizeof what, "%zu fields where the first row names %zu columns; add or quote what is missing", i,
             columns);
    return bad_line(c->in, start, what);
}

static usl_status csv_rows(csv *c, json_t *names) {
    const char *end = c->in->end, *counted = c->in->text;
    int64_t line = 1;
    bool header = true;
    for (;;) {
        while (c->pos < end && (*c->pos == '\n' || *c->pos == '\r')) c->pos++;
        if (c->pos == end) return USL_OK;
        for (; counted < c->pos; counted++) line += *counted == '\n';
        if (header) {
            USLI_TRY(csv_header(c, names));
            header = false;
            continue;
        }
        json_t *row = json_object();
        if (!row) return usli_nomem(c->in->ctx, 0);
        usl_status st = csv_record(c, names, row);
        if (st != USL_OK) {
            json_decref(row);
            return st;
        }
        USLI_TRY(usli_dataset_push(c->in->ds, c->in->source, line, row));
    }
}

static usl_status read_csv(reading *in) {
    USLI_TRY(check_text(in));
    USLI_TRY(begin_rows(in, true));
    csv c = { .in = in, .pos = in->text };
    json_t *names = json_array();
    usl_status st = names ? csv_rows(&c, names) : usli_nomem(in->ctx, 0);
    json_decref(names);
    usli_free(in->ctx, c.field);
    return st;
}

/* ---- Files
 * -------------------------------------------------------------------------------------------------------------- */

/* What people hand over instead of text, by its first bytes. */
static usl_status refuse_binary(const reading *in) {
    static const struct {
        const char *magic;
        size_t len;
        const char *what;
    } MAGIC[] = {
        { "\x1F\x8B", 2, "is compressed with gzip; unpack it with gunzip first" },
        { "\x28\xB5\x2F\xFD", 4, "is compressed with zstd; unpack it with unzstd first" },
        { "\xFD"
          "7zXZ",
          5, "is compressed with xz; unpack it with unxz first" },
        { "PK\x03\x04", 4, "is a zip archive; unpack it first" },
        { "PAR1", 4, "is a Parquet file; convert it to JSON lines first" },
        { "ARROW1", 6, "is an Arrow file; convert it to JSON lines first" },
        { "\xFF\xFE", 2, "is UTF-16; save it as UTF-8" },
        { "\xFE\xFF", 2, "is UTF-16; save it as UTF-8" },
    };
    for (size_t i = 0; i < sizeof MAGIC / sizeof *MAGIC; i++)
        if ((size_t)(in->end - in->text) >= MAGIC[i].len && memcmp(in->text, MAGIC[i].magic, MAGIC[i].len) == 0)
            return usli_fail(in->ctx, USL_ERR_FORMAT, "%s %s", in->path, MAGIC[i].what);
    return USL_OK;
}

static usl_status read_file(reading *in, usl_status (*read)(reading *)) {
    USLI_TRY(refuse_binary(in));
    if (in->end - in->text >= 3 && memcmp(in->text, "\xEF\xBB\xBF", 3) == 0) in->text += 3;
    int64_t before = usli_dataset_rows(in->ds);
    USLI_TRY(read(in));
    if (usli_dataset_rows(in->ds) > before) return USL_OK;
    return usli_fail(in->ctx, USL_ERR_FORMAT, "%s holds no rows; give a file with at least one", in->path);
}

usl_status usli_dataset_load(usl_ctx *ctx, const char *kind, const char *const *paths, size_t count,
                             usli_dataset **out) {
    static const struct {
        const char *kind;
        usl_status (*read)(reading *);
    } KINDS[] = { { "json", read_json }, { "text", read_text }, { "csv", read_csv } };
    size_t k = 0;
    *out = NULL;
    while (k < 3 && strcmp(kind, KINDS[k].kind) != 0) k++;
    if (k == 3)
        return usli_fail(
            ctx, USL_ERR_INVALID,
            "data sets of kind \"%.60s\" are not known; use \"json\" (also for JSON lines), \"text\" or \"csv\"", kind);
    if (!count) return usli_fail(ctx, USL_ERR_INVALID, "no file was given to load a data set from; name at least one");
    usli_dataset *ds;
    USLI_TRY(usli_dataset_new(ctx, &ds));
    usl_status st = USL_OK;
    for (size_t i = 0; i < count && st == USL_OK; i++) {
        usli_map *map;
        if ((st = usli_map_open(ctx, paths[i], &map)) != USL_OK) break;
        const char *text = (const char *)map->data;
        reading in = { ctx, paths[i], text, text + map->size, ds, NULL };
        st = read_file(&in, KINDS[k].read);
        usli_source_release(ctx, in.source);
        usli_map_release(map);
    }
    if (st != USL_OK) {
        usli_dataset_release(ds);
        return st;
    }
    *out = ds;
    return USL_OK;
}
