/* Values of templates from JSON text, and `tojson` as transformers has it: Python's json.dumps. */
#include <math.h>
#include <string.h>

#include "core/text/jinja_parts.h"
#include "core/text/parts.h"

/* ---- In ---- */

static void next(usli_jinja *j) {
    usl_status st = usli_json_next(&j->reader);
    if (st != USL_OK) usli_j_throw(j, st);
}

static usli_jval value(usli_jinja *j) {
    usli_json_reader *r = &j->reader;
    usli_jval v;
    switch (r->kind) {
    case USLI_JSON_NULL: return usli_j_none();
    case USLI_JSON_BOOL: return usli_j_bool(r->i != 0);
    case USLI_JSON_INT: return usli_j_int(r->i);
    case USLI_JSON_FLOAT: return usli_j_float(r->d);
    case USLI_JSON_STRING: return usli_j_copy(j, r->str, r->len);
    case USLI_JSON_ARRAY:
        v = usli_j_seq(j, J_LIST, 0);
        for (next(j); r->kind != USLI_JSON_ARRAY_END; next(j)) usli_j_push(j, v, value(j));
        return v;
    default: break;
    }
    v = usli_j_dict(j);
    for (next(j); r->kind != USLI_JSON_OBJECT_END; next(j)) {
        usli_jval key = usli_j_copy(j, r->str, r->len);
        next(j);
        usli_jdict_set(j, v.u.m, key, value(j));
    }
    return v;
}

usli_jval usli_j_from_json(usli_jinja *j, const char *what, const char *text, size_t len) {
    usli_json_done(&j->reader);
    usli_json_init(&j->reader, j->ctx, what, text, len);
    next(j);
    usli_jval v = value(j);
    next(j);
    return v;
}

/* ---- Out ---- */

typedef struct writer {
    usli_jinja *j;
    usli_jout out;
    bool ascii, sort;
    const usli_jstr *indent; /* NULL: all in one line */
    const usli_jstr *comma, *colon;
} writer;

static void put_escape(writer *w, unsigned code) {
    char text[16];
    if (code >= 0x10000) {
        code -= 0x10000;
        snprintf(text, sizeof text, "\\u%04x\\u%04x", 0xD800 + (code >> 10), 0xDC00 + (code & 0x3FF));
    } else {
        snprintf(text, sizeof text, "\\u%04x", code);
    }
    usli_j_puts(w->j, &w->out, text);
}

static void put_string(writer *w, const usli_jstr *s) {
    static const char FROM[] = "\"\\\b\f\n\r\t", TO[] = "\"\\bfnrt";
    usli_j_put(w->j, &w->out, "\"", 1);
    for (size_t i = 0, n; i < s->n; i += n) {
        size_t run = i;
        n = 0;
        while (run < s->n && (unsigned char)s->p[run] >= 0x20 && s->p[run] != '"' && s->p[run] != '\\' &&
               !(w->ascii && (unsigned char)s->p[run] >= 0x7F))
            run++;
        usli_j_put(w->j, &w->out, s->p + i, run - i);
        if ((i = run) == s->n) break;
        n = usli_utf8_step(s->p[i]);
        const char *hit = s->p[i] ? strchr(FROM, s->p[i]) : NULL;
        char pair[2] = { '\\', hit ? TO[hit - FROM] : 0 };
        if (hit)
            usli_j_put(w->j, &w->out, pair, 2);
        else if (s->p[i] == 0x7F) /* Python writes it as it is */
            usli_j_put(w->j, &w->out, s->p + i, 1);
        else
            put_escape(w, (unsigned)usli_utf8_get(s->p + i));
    }
    usli_j_put(w->j, &w->out, "\"", 1);
}

static void put(writer *w, usli_jval v, int depth);

static void new_line(writer *w, int depth) {
    if (!w->indent) return;
    usli_j_put(w->j, &w->out, "\n", 1);
    for (int i = 0; i < depth; i++) usli_j_put(w->j, &w->out, w->indent->p, w->indent->n);
}

static void put_array(writer *w, const usli_jseq *q, int depth) {
    usli_j_put(w->j, &w->out, "[", 1);
    for (size_t i = 0; i < q->count; i++) {
        if (i) usli_j_put(w->j, &w->out, w->comma->p, w->comma->n);
        new_line(w, depth + 1);
        put(w, q->items[i], depth + 1);
    }
    if (q->count) new_line(w, depth);
    usli_j_put(w->j, &w->out, "]", 1);
}

static void put_number(writer *w, usli_jval v) {
    if (v.type == J_FLOAT && !isfinite(v.u.d))
        usli_j_puts(w->j, &w->out, isnan(v.u.d) ? "NaN" : v.u.d < 0 ? "-Infinity" : "Infinity");
    else
        usli_j_put_repr(w->j, &w->out, v);
}

static void put_key(writer *w, usli_jval key) {
    if (key.type == J_STR) {
        put_string(w, key.u.s);
        return;
    }
    if (key.type != J_NONE && !usli_j_is_number(key))
        usli_j_raise(w->j, "tojson: keys must be str, int, float, bool or None, not %s", usli_j_type_name(key));
    usli_j_put(w->j, &w->out, "\"", 1);
    put(w, key, 0);
    usli_j_put(w->j, &w->out, "\"", 1);
}

/* The places of the keys in the order they are written. */
static size_t *ordered(writer *w, const usli_jdict *m) {
    size_t *order = usli_j_alloc(w->j, (m->count + 1) * sizeof *order);
    for (size_t i = 0; i < m->count; i++) {
        size_t k = i;
        for (; w->sort && k > 0 && usli_j_compare(w->j, m->keys[i], m->keys[order[k - 1]], "<") < 0; k--)
            order[k] = order[k - 1];
        order[k] = i;
    }
    return order;
}

static void put_object(writer *w, const usli_jdict *m, int depth) {
    const size_t *order = ordered(w, m);
    usli_j_put(w->j, &w->out, "{", 1);
    for (size_t i = 0; i < m->count; i++) {
        if (i) usli_j_put(w->j, &w->out, w->comma->p, w->comma->n);
        new_line(w, depth + 1);
        put_key(w, m->keys[order[i]]);
        usli_j_put(w->j, &w->out, w->colon->p, w->colon->n);
        put(w, m->values[order[i]], depth + 1);
    }
    if (m->count) new_line(w, depth);
    usli_j_put(w->j, &w->out, "}", 1);
}

static void put(writer *w, usli_jval v, int depth) {
    usli_j_enter(w->j);
    usli_j_step(w->j, 1);
    if (v.type == J_NONE)
        usli_j_puts(w->j, &w->out, "null");
    else if (v.type == J_BOOL)
        usli_j_puts(w->j, &w->out, v.u.b ? "true" : "false");
    else if (usli_j_is_number(v))
        put_number(w, v);
    else if (v.type == J_STR)
        put_string(w, v.u.s);
    else if (v.type == J_SEQ && v.u.q->flavour <= J_TUPLE)
        put_array(w, v.u.q, depth);
    else if (v.type == J_DICT)
        put_object(w, v.u.m, depth);
    else
        usli_j_raise(w->j, "Object of type %s is not JSON serializable", usli_j_type_name(v));
    usli_j_leave(w->j);
}

/* tojson(ensure_ascii, indent, separators, sort_keys) */
usli_jval usli_j_to_json(usli_jinja *j, usli_jval self, usli_jval *a, const usli_jargs *raw) {
    (void)raw;
    writer w = { .j = j, .ascii = usli_j_truth(j, a[0]), .sort = usli_j_truth(j, a[3]) };
    usli_jstr blanks = { "", 0, NULL }, comma = { ", ", 2, NULL }, colon = { ": ", 2, NULL };
    if (a[1].type == J_STR) {
        w.indent = a[1].u.s;
    } else if (a[1].type != J_ABSENT && a[1].type != J_NONE) {
        int64_t n = usli_j_want_int(j, a[1], "tojson: indent");
        if (n > 64) usli_j_raise(j, "tojson: an indent of %lld blanks is too large", (long long)n);
        blanks.n = n > 0 ? (size_t)n : 0;
        blanks.p = "                                                                ";
        w.indent = &blanks;
    }
    if (w.indent) comma.n = 1;
    w.comma = &comma;
    w.colon = &colon;
    if (a[2].type != J_ABSENT && a[2].type != J_NONE) {
        if (a[2].type != J_SEQ || a[2].u.q->count != 2) usli_j_raise(j, "tojson: separators are two texts");
        w.comma = usli_j_want_str(j, a[2].u.q->items[0], "tojson: a separator");
        w.colon = usli_j_want_str(j, a[2].u.q->items[1], "tojson: a separator");
    }
    put(&w, self, 0);
    return usli_j_taken(j, &w.out);
}
