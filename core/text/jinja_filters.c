/* Filters, as jinja2 has them. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/number.h"
#include "core/text/jinja_parts.h"
#include "core/text/parts.h"

#define CALL(name) static usli_jval name(usli_jinja *j, usli_jval self, usli_jval *a, const usli_jargs *raw)
#define UNUSED (void)j, (void)self, (void)a, (void)raw

static bool given(usli_jval v) {
    return v.type != J_ABSENT && v.type != J_NONE;
}

/* ---- Texts ---- */

CALL(upper) {
    UNUSED;
    return usli_j_case(j, usli_j_str(j, self), J_UPPER);
}
CALL(lower) {
    UNUSED;
    return usli_j_case(j, usli_j_str(j, self), J_LOWER);
}
CALL(capitalize) {
    UNUSED;
    return usli_j_case(j, usli_j_str(j, self), J_CAPITAL);
}
/* Words begin behind white space, hyphens and opening brackets. */
CALL(title) {
    UNUSED;
    const usli_jstr *s = usli_j_str(j, self).u.s;
    usli_jval out = usli_j_cstr(j, "");
    for (size_t i = 0, from = 0; i < s->n;) {
        size_t space = usli_j_space_at(s->p + i, s->p + s->n), n = space ? space : usli_utf8_step(s->p[i]);
        bool gap = space || strchr("-({[<", s->p[i]);
        if (gap) {
            out = usli_j_join(j, out, usli_j_case(j, usli_j_text(j, s->p + from, i - from), J_CAPITAL));
            out = usli_j_join(j, out, usli_j_text(j, s->p + i, n));
            from = i + n;
        }
        i += n;
        if (i == s->n) out = usli_j_join(j, out, usli_j_case(j, usli_j_text(j, s->p + from, i - from), J_CAPITAL));
    }
    return out;
}
CALL(trim) {
    UNUSED;
    return usli_j_strip(j, usli_j_str(j, self), a[0], true, true);
}
CALL(string) {
    UNUSED;
    return usli_j_str(j, self);
}
CALL(safe) {
    UNUSED;
    usli_jval v = usli_j_str(j, self);
    v.markup = true;
    return v;
}
CALL(escape) {
    UNUSED;
    return usli_j_escape(j, self);
}
CALL(force_escape) {
    UNUSED;
    self = usli_j_str(j, self);
    self.markup = false;
    return usli_j_escape(j, self);
}
CALL(replace) {
    UNUSED;
    return usli_j_replace(j, usli_j_str(j, self), usli_j_str(j, a[0]), usli_j_str(j, a[1]),
                          given(a[2]) ? usli_j_want_int(j, a[2], "replace: count") : -1);
}
CALL(format) {
    UNUSED;
    usli_jval args = usli_j_seq(j, J_TUPLE, raw->count);
    if (raw->count && raw->named.count)
        usli_j_raise(j, "filter format() takes arguments by position or by name, not both");
    if (raw->named.count) {
        args = usli_j_dict(j);
        *args.u.m = raw->named;
    }
    for (size_t i = 0; i < raw->count; i++) usli_j_push(j, args, raw->items[i]);
    return usli_j_format(j, usli_j_str(j, self), args);
}
CALL(center) {
    UNUSED;
    static const usli_jstr NAME = { "center", 6, NULL };
    bool unsafe;
    usli_jval text = usli_j_str(j, self), width = a[0].type == J_ABSENT ? usli_j_int(80) : a[0];
    usli_jargs args = { .items = &width, .count = 1 };
    return usli_j_call_row(j, usli_j_method(text, &NAME, &unsafe), text, &args, "");
}

static usli_jval lines_of(usli_jinja *j, usli_jval text) {
    static const usli_jstr NAME = { "splitlines", 10, NULL };
    bool unsafe;
    usli_jargs none = { 0 };
    return usli_j_call_row(j, usli_j_method(text, &NAME, &unsafe), text, &none, "");
}

CALL(indent) {
    UNUSED;
    usli_jval text = usli_j_join(j, usli_j_str(j, self), usli_j_cstr(j, "\n")), lines = lines_of(j, text);
    usli_jout o = { 0 };
    int64_t width = a[0].type == J_STR || a[0].type == J_ABSENT ? 4 : usli_j_want_int(j, a[0], "indent: the width");
    bool first = usli_j_truth(j, a[1]), blank = usli_j_truth(j, a[2]);
    for (size_t i = 0; i < lines.u.q->count; i++) {
        const usli_jstr *line = lines.u.q->items[i].u.s;
        if (i) usli_j_put(j, &o, "\n", 1);
        bool pad = i ? blank || line->n : first;
        if (pad && a[0].type == J_STR) usli_j_put(j, &o, a[0].u.s->p, a[0].u.s->n);
        for (int64_t k = 0; pad && a[0].type != J_STR && k < width; k++, usli_j_step(j, 1)) usli_j_put(j, &o, " ", 1);
        usli_j_put(j, &o, line->p, line->n);
    }
    return usli_j_taken(j, &o);
}

CALL(truncate) {
    UNUSED;
    int64_t length = given(a[0]) ? usli_j_want_int(j, a[0], "truncate: the length") : 255;
    usli_jval text = usli_j_str(j, self), end = given(a[2]) ? usli_j_str(j, a[2]) : usli_j_cstr(j, "...");
    int64_t leeway = given(a[3]) ? usli_j_want_int(j, a[3], "truncate: leeway") : 5,
            n = (int64_t)usli_j_chars(j, text.u.s);
    int64_t end_chars = (int64_t)usli_j_chars(j, end.u.s);
    if (length < end_chars || leeway < 0) usli_j_raise(j, "truncate: expected length >= %lld", (long long)end_chars);
    if (n - leeway <= length) return text;
    size_t cut = usli_j_offset(text.u.s, (size_t)(length - end_chars)), word = cut;
    if (!usli_j_truth(j, a[1])) {
        while (word > 0 && text.u.s->p[word - 1] != ' ') word--;
        if (word > 0) cut = word - 1;
    }
    return usli_j_join(j, usli_j_text(j, text.u.s->p, cut), end);
}

CALL(wordcount) {
    UNUSED;
    const usli_jstr *s = usli_j_str(j, self).u.s;
    int64_t n = 0;
    bool inside = false;
    for (size_t i = 0; i < s->n; i += usli_utf8_step(s->p[i])) {
        bool word = usli_is_word(usli_utf8_get(s->p + i));
        n += word && !inside;
        inside = word;
    }
    return usli_j_int(n);
}

CALL(urlencode) {
    UNUSED;
    if (self.type != J_STR) usli_j_raise(j, "urlencode is supported for texts only");
    usli_jout o = { 0 };
    for (size_t i = 0; i < self.u.s->n; i++) {
        unsigned char c = (unsigned char)self.u.s->p[i];
        bool plain = (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || (c && strchr("_.-~/", c));
        char text[8];
        snprintf(text, sizeof text, plain ? "%c" : "%%%02X", c);
        usli_j_puts(j, &o, text);
    }
    return usli_j_taken(j, &o);
}

/* ---- Numbers ---- */

/* A number that a text spells wholly, white space around it aside; J_ABSENT: none. */
static usli_jval spelled(usli_jinja *j, const usli_jstr *s, int base, bool real) {
    usli_jval t =
        usli_j_strip(j, (usli_jval){ .type = J_STR, .u.s = (usli_jstr *)(uintptr_t)s }, (usli_jval){ 0 }, true, true);
    char text[64];
    const char *p = text;
    if (t.u.s->n >= sizeof text || !t.u.s->n) return (usli_jval){ 0 };
    memcpy(text, t.u.s->p, t.u.s->n);
    text[t.u.s->n] = 0;
    if (strlen(text) != t.u.s->n) return (usli_jval){ 0 };
    p += *p == '-' || *p == '+';
    if (real) {
        size_t n = strspn(p, "0123456789"), m = p[n] == '.' ? strspn(p + n + 1, "0123456789") + 1 : 0;
        const char *e = p + n + m;
        if (n + m - (m != 0) == 0) return (usli_jval){ 0 };
        if (*e == 'e' || *e == 'E') {
            e += 1 + (e[1] == '-' || e[1] == '+');
            size_t k = strspn(e, "0123456789");
            e = k ? e + k : text;
        }
        return *e ? (usli_jval){ 0 } : usli_j_float(usli_number_parse(text));
    }
    if (p[0] == '0' &&
        ((base == 16 && (p[1] | 32) == 'x') || (base == 8 && (p[1] | 32) == 'o') || (base == 2 && (p[1] | 32) == 'b')))
        p += 2;
    int64_t v = 0;
    if (!*p) return (usli_jval){ 0 };
    for (; *p; p++) {
        int d = *p >= '0' && *p <= '9' ? *p - '0' : (*p | 32) >= 'a' && (*p | 32) <= 'z' ? (*p | 32) - 'a' + 10 : 99;
        if (d >= base) return (usli_jval){ 0 };
        if (v > (INT64_MAX - d) / base) usli_j_raise(j, "an integer grows beyond 64 bits");
        v = v * base + d;
    }
    return usli_j_int(text[0] == '-' ? -v : v);
}

static usli_jval whole(usli_jinja *j, double d, usli_jval otherwise) {
    if (!isfinite(d)) return otherwise;
    if (fabs(d) >= 9.2e18) usli_j_raise(j, "an integer grows beyond 64 bits");
    return usli_j_int((int64_t)d);
}

CALL(to_int) {
    UNUSED;
    usli_jval otherwise = a[0].type == J_ABSENT ? usli_j_int(0) : a[0];
    int64_t base = given(a[1]) ? usli_j_want_int(j, a[1], "int: the base") : 10;
    usli_j_defined(j, self);
    if (base < 2 || base > 36) usli_j_raise(j, "int: the base is 2 to 36");
    if (self.type == J_FLOAT) return whole(j, self.u.d, otherwise);
    if (usli_j_is_number(self)) return usli_j_int(usli_j_want_int(j, self, ""));
    if (self.type != J_STR) return otherwise;
    usli_jval v = spelled(j, self.u.s, (int)base, false);
    if (v.type == J_ABSENT) v = spelled(j, self.u.s, 10, true);
    return v.type == J_FLOAT ? whole(j, v.u.d, otherwise) : v.type == J_ABSENT ? otherwise : v;
}
CALL(to_float) {
    UNUSED;
    usli_j_defined(j, self);
    if (usli_j_is_number(self)) return usli_j_float(usli_j_number(self));
    usli_jval v = self.type == J_STR ? spelled(j, self.u.s, 10, true) : (usli_jval){ 0 };
    return v.type != J_ABSENT ? v : a[0].type == J_ABSENT ? usli_j_float(0) : a[0];
}
CALL(absolute) {
    UNUSED;
    usli_j_defined(j, self);
    if (!usli_j_is_number(self)) usli_j_raise(j, "bad operand type for abs(): '%s'", usli_j_type_name(self));
    if (self.type == J_FLOAT) return usli_j_float(fabs(self.u.d));
    int64_t i = usli_j_want_int(j, self, "");
    return i < 0 ? usli_j_binary(j, '-', usli_j_int(0), usli_j_int(i)) : usli_j_int(i);
}
CALL(round_) {
    UNUSED;
    int64_t digits = given(a[0]) ? usli_j_want_int(j, a[0], "round: the precision") : 0;
    char text[USLI_NUMBER_FIXED];
    usli_j_defined(j, self);
    if (!usli_j_is_number(self)) usli_j_raise(j, "round wants a number, not %s", usli_j_type_name(self));
    double d = usli_j_number(self), scale = pow(10, (double)digits);
    if (digits < -18 || digits > 18) usli_j_raise(j, "round: the precision is -18 to 18");
    if (a[1].type != J_ABSENT && usli_j_is_text(a[1], "ceil")) return usli_j_float(ceil(d * scale) / scale);
    if (a[1].type != J_ABSENT && usli_j_is_text(a[1], "floor")) return usli_j_float(floor(d * scale) / scale);
    if (a[1].type != J_ABSENT && !usli_j_is_text(a[1], "common"))
        usli_j_raise(j, "method must be common, ceil or floor");
    if (digits < 0 || fabs(d) > 1e60 || !isfinite(d))
        return usli_j_float(digits < 0 ? nearbyint(d * scale) / scale : d);
    usli_number_fixed(d, (int)digits, text);
    usli_jval v = usli_j_float(usli_number_parse(text));
    return self.type == J_FLOAT ? v : usli_j_int((int64_t)v.u.d);
}

/* ---- Sequences ---- */

CALL(length) {
    UNUSED;
    return usli_j_int(usli_j_length(j, self));
}
CALL(list) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    usli_jval out = usli_j_seq(j, J_LIST, q->count);
    for (size_t i = 0; i < q->count; i++) usli_j_push(j, out, q->items[i]);
    return out;
}
CALL(first) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    return q->count ? q->items[0] : usli_j_undefined(j, "No first item, sequence was empty.");
}
CALL(last) {
    UNUSED;
    if (self.type == J_SEQ && self.u.q->flavour == J_GENERATOR) usli_j_raise(j, "'generator' object is not reversible");
    const usli_jseq *q = usli_j_iterate(j, self);
    return q->count ? q->items[q->count - 1] : usli_j_undefined(j, "No last item, sequence was empty.");
}
CALL(reverse) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    usli_jval out = usli_j_seq(j, J_GENERATOR, q->count);
    usli_jout text = { 0 };
    for (size_t i = q->count; i-- > 0;) {
        if (self.type == J_STR) usli_j_put(j, &text, q->items[i].u.s->p, q->items[i].u.s->n);
        usli_j_push(j, out, q->items[i]);
    }
    return self.type == J_STR ? usli_j_taken(j, &text) : out;
}

/* The value that an attribute's path ("a.b.0") finds in an item. */
static usli_jval walk(usli_jinja *j, usli_jval item, usli_jval path) {
    if (path.type == J_INT) return usli_j_item(j, item, path);
    const usli_jstr *s = usli_j_want_str(j, path, "an attribute's name");
    for (size_t at = 0; at <= s->n;) {
        const char *dot = memchr(s->p + at, '.', s->n - at);
        usli_jval name = usli_j_text(j, s->p + at, dot ? (size_t)(dot - s->p) - at : s->n - at);
        bool number = name.u.s->n > 0 && name.u.s->n < 10;
        int64_t index = 0;
        for (size_t i = 0; i < name.u.s->n && number; i++) {
            number = name.u.s->p[i] >= '0' && name.u.s->p[i] <= '9';
            index = index * 10 + name.u.s->p[i] - '0';
        }
        item = usli_j_item(j, item, number ? usli_j_int(index) : name);
        at += name.u.s->n + 1;
    }
    return item;
}

CALL(join) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    usli_jval by = given(a[0]) ? usli_j_str(j, a[0]) : usli_j_cstr(j, "");
    usli_jout o = { 0 };
    for (size_t i = 0; i < q->count; i++) {
        if (i) usli_j_put_str(j, &o, by);
        usli_j_put_str(j, &o, given(a[1]) ? walk(j, q->items[i], a[1]) : q->items[i]);
    }
    return usli_j_taken(j, &o);
}

CALL(attr) {
    UNUSED;
    usli_jval name = usli_j_str(j, a[0]);
    bool unsafe = false;
    if (self.type == J_DICT && !usli_j_method(self, name.u.s, &unsafe)) /* attributes only, not items */
        return usli_j_undefined(j, "'dict object' has no attribute '%.*s'", (int)name.u.s->n, name.u.s->p);
    return usli_j_attr(j, self, name);
}

CALL(items) {
    UNUSED;
    usli_jval out = usli_j_seq(j, J_GENERATOR, 0);
    if (self.type == J_UNDEFINED) return out;
    if (self.type != J_DICT) usli_j_raise(j, "Can only get item pairs from a mapping.");
    for (size_t i = 0; i < self.u.m->count; i++) {
        usli_jval pair = usli_j_seq(j, J_TUPLE, 2);
        usli_j_push(j, pair, self.u.m->keys[i]);
        usli_j_push(j, pair, self.u.m->values[i]);
        usli_j_push(j, out, pair);
    }
    return out;
}

CALL(default_) {
    UNUSED;
    bool missing = self.type == J_UNDEFINED || (usli_j_truth(j, a[1]) && !usli_j_truth(j, self));
    return !missing ? self : a[0].type == J_ABSENT ? usli_j_cstr(j, "") : a[0];
}

/* ---- Order ---- */

/* What a value is ordered by: its lower case unless case counts. */
static usli_jval order_key(usli_jinja *j, usli_jval item, usli_jval attribute, bool with_case) {
    if (given(attribute)) item = walk(j, item, attribute);
    return item.type == J_STR && !with_case ? usli_j_case(j, item, J_LOWER) : item;
}

/* Attributes, with commas between several, are a tuple: two that are undefined are equal in one. */
static usli_jval sort_key(usli_jinja *j, usli_jval item, usli_jval attribute, bool with_case) {
    if (attribute.type != J_STR) return order_key(j, item, attribute, with_case);
    usli_jval key = usli_j_seq(j, J_TUPLE, 0);
    const usli_jstr *s = attribute.u.s;
    for (size_t at = 0; at <= s->n;) {
        const char *comma = memchr(s->p + at, ',', s->n - at);
        size_t n = comma ? (size_t)(comma - s->p) - at : s->n - at;
        usli_j_push(j, key, order_key(j, item, usli_j_text(j, s->p + at, n), with_case));
        at += n + 1;
    }
    return key;
}

/* Merge sort, stable in both directions as Python's. */
static void merge_sort(usli_jinja *j, usli_jval *keys, usli_jval *items, size_t n, bool down, usli_jval *k,
                       usli_jval *v) {
    if (n < 2) return;
    size_t half = n / 2, a = 0, b = half;
    merge_sort(j, keys, items, half, down, k, v);
    merge_sort(j, keys + half, items + half, n - half, down, k, v);
    for (size_t i = 0; i < n; i++) {
        bool second = a == half;
        if (a < half && b < n)
            second = down ? usli_j_compare(j, keys[a], keys[b], "<") < 0 : usli_j_compare(j, keys[b], keys[a], "<") < 0;
        k[i] = keys[second ? b : a];
        v[i] = items[second ? b++ : a++];
    }
    memcpy(keys, k, n * sizeof *k);
    memcpy(items, v, n * sizeof *v);
}

static void sort_by(usli_jinja *j, usli_jval keys, usli_jval items, bool down) {
    size_t n = keys.u.q->count, bytes = (n + 1) * sizeof(usli_jval);
    merge_sort(j, keys.u.q->items, items.u.q->items, n, down, usli_j_alloc(j, bytes), usli_j_alloc(j, bytes));
}

/* sort(reverse, case_sensitive, attribute) */
CALL(sort) {
    usli_jval out = list(j, self, a, raw), keys = usli_j_seq(j, J_LIST, 0);
    for (size_t i = 0; i < out.u.q->count; i++)
        usli_j_push(j, keys, sort_key(j, out.u.q->items[i], a[2], usli_j_truth(j, a[1])));
    sort_by(j, keys, out, usli_j_truth(j, a[0]));
    return out;
}

/* dictsort(case_sensitive, by, reverse) */
CALL(dictsort) {
    usli_j_defined(j, self);
    if (self.type != J_DICT) usli_j_raise(j, "dictsort wants a mapping, not %s", usli_j_type_name(self));
    usli_jval out = items(j, self, a, raw), keys = usli_j_seq(j, J_LIST, 0);
    bool by_value = given(a[1]) && usli_j_is_text(a[1], "value");
    out.u.q->flavour = J_LIST;
    if (given(a[1]) && !by_value && !usli_j_is_text(a[1], "key"))
        usli_j_raise(j, "You can only sort by either \"key\" or \"value\"");
    for (size_t i = 0; i < out.u.q->count; i++)
        usli_j_push(j, keys,
                    order_key(j, out.u.q->items[i].u.q->items[by_value], usli_j_none(), usli_j_truth(j, a[0])));
    sort_by(j, keys, out, usli_j_truth(j, a[2]));
    return out;
}

/* unique(case_sensitive, attribute) */
CALL(unique) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    usli_jval out = usli_j_seq(j, J_GENERATOR, 0), seen = usli_j_dict(j);
    for (size_t i = 0; i < q->count; i++) {
        usli_jval key = order_key(j, q->items[i], a[1], usli_j_truth(j, a[0]));
        if (usli_jdict_get(j, seen.u.m, key)) continue;
        usli_jdict_set(j, seen.u.m, key, usli_j_none());
        usli_j_push(j, out, q->items[i]);
    }
    return out;
}

static usli_jval extreme(usli_jinja *j, usli_jval self, const usli_jval *a, bool most) {
    const usli_jseq *q = usli_j_iterate(j, self);
    if (!q->count) return usli_j_undefined(j, "No aggregated item, sequence was empty.");
    usli_jval best = q->items[0], key = order_key(j, best, a[1], usli_j_truth(j, a[0]));
    for (size_t i = 1; i < q->count; i++) {
        usli_jval other = order_key(j, q->items[i], a[1], usli_j_truth(j, a[0]));
        int c = usli_j_compare(j, other, key, most ? ">" : "<");
        if (most ? c <= 0 : c >= 0) continue;
        best = q->items[i];
        key = other;
    }
    return best;
}
CALL(min) {
    UNUSED;
    return extreme(j, self, a, false);
}
CALL(max) {
    UNUSED;
    return extreme(j, self, a, true);
}
CALL(sum) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    usli_jval total = a[1].type == J_ABSENT ? usli_j_int(0) : a[1];
    for (size_t i = 0; i < q->count; i++)
        total = usli_j_binary(j, '+', total, given(a[0]) ? walk(j, q->items[i], a[0]) : q->items[i]);
    return total;
}

/* groupby(attribute, default, case_sensitive): pairs of the value and its items. */
CALL(groupby) {
    usli_jval all = list(j, self, a, raw), keys = usli_j_seq(j, J_LIST, 0), out = usli_j_seq(j, J_LIST, 0);
    for (size_t i = 0; i < all.u.q->count; i++) {
        usli_jval key = walk(j, all.u.q->items[i], a[0]);
        if (key.type == J_UNDEFINED && a[1].type != J_ABSENT) key = a[1];
        usli_j_push(j, keys, key.type == J_STR && !usli_j_truth(j, a[2]) ? usli_j_case(j, key, J_LOWER) : key);
    }
    sort_by(j, keys, all, false);
    for (size_t i = 0; i < all.u.q->count; i++) {
        if (!i || !usli_j_equal(j, keys.u.q->items[i], keys.u.q->items[i - 1])) {
            usli_jval pair = usli_j_seq(j, J_TUPLE, 2), name = walk(j, all.u.q->items[i], a[0]);
            usli_j_push(j, pair, name.type == J_UNDEFINED && a[1].type != J_ABSENT ? a[1] : name);
            usli_j_push(j, pair, usli_j_seq(j, J_LIST, 0));
            pair.u.q->group = true;
            usli_j_push(j, out, pair);
        }
        usli_j_push(j, out.u.q->items[out.u.q->count - 1].u.q->items[1], all.u.q->items[i]);
    }
    return out;
}

/* batch(linecount, fill_with): lists of that many. */
CALL(batch) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    int64_t n = usli_j_want_int(j, a[0], "batch: the count");
    usli_jval out = usli_j_seq(j, J_GENERATOR, 0), row = { 0 };
    if (n < 1 || n > 100000) usli_j_raise(j, "batch: the count is 1 to 100000");
    for (size_t i = 0; i < q->count; i++) {
        if (i % (size_t)n == 0) usli_j_push(j, out, row = usli_j_seq(j, J_LIST, 0));
        usli_j_push(j, row, q->items[i]);
    }
    while (q->count && given(a[1]) && row.u.q->count < (size_t)n) usli_j_push(j, row, a[1]);
    return out;
}

/* slice(slices, fill_with): that many lists. */
CALL(slice) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, self);
    int64_t n = usli_j_want_int(j, a[0], "slice: the count");
    usli_jval out = usli_j_seq(j, J_GENERATOR, 0);
    if (n < 1 || n > 100000) usli_j_raise(j, "slice: the count is 1 to 100000");
    size_t each = q->count / (size_t)n, more = q->count % (size_t)n, at = 0;
    for (size_t k = 0; k < (size_t)n; k++) {
        usli_jval row = usli_j_seq(j, J_LIST, 0);
        for (size_t i = 0; i < each + (k < more); i++) usli_j_push(j, row, q->items[at++]);
        if (given(a[1]) && k >= more) usli_j_push(j, row, a[1]);
        usli_j_push(j, out, row);
    }
    return out;
}

/* ---- map, select and their kin ---- */

/* What these filters go over: nothing for a false value, None among them. */
static const usli_jseq *over(usli_jinja *j, usli_jval v) {
    return usli_j_truth(j, v) ? usli_j_iterate(j, v) : usli_j_seq(j, J_LIST, 0).u.q;
}

/* The arguments behind the first n. */
static usli_jargs behind(const usli_jargs *raw, size_t n) {
    usli_jargs args = *raw;
    n = n < raw->count ? n : raw->count;
    args.items += n;
    args.count -= n;
    return args;
}

/* map("filter", ...) or map(attribute="name", default=...) */
CALL(map) {
    (void)a;
    const usli_jseq *q = over(j, self);
    usli_jval out = usli_j_seq(j, J_GENERATOR, 0);
    const usli_jval *attribute = raw->count ? NULL : usli_jdict_find(j, &raw->named, "attribute");
    const usli_jval *otherwise = attribute ? usli_jdict_find(j, &raw->named, "default") : NULL;
    if (!raw->count && !attribute) usli_j_raise(j, "map requires a filter argument");
    const usli_jrow *row =
        attribute ? NULL : usli_j_filter(usli_j_want_str(j, raw->items[0], "map: the filter's name"));
    usli_jargs rest = behind(raw, 1);
    if (!attribute && !row) usli_j_raise(j, "no filter named '%.*s'", (int)raw->items[0].u.s->n, raw->items[0].u.s->p);
    for (size_t i = 0; i < q->count; i++) {
        usli_jval v = row ? usli_j_call_row(j, row, q->items[i], &rest, "filter ") : walk(j, q->items[i], *attribute);
        if (v.type == J_UNDEFINED && otherwise) v = *otherwise;
        usli_j_push(j, out, v);
    }
    return out;
}

static usli_jval sift(usli_jinja *j, usli_jval self, const usli_jargs *raw, bool by_attribute, bool keep) {
    const usli_jseq *q = over(j, self);
    usli_jval out = usli_j_seq(j, J_GENERATOR, 0);
    size_t skip = by_attribute ? 1 : 0;
    if (raw->count < skip) usli_j_raise(j, "the filter misses the name of an attribute");
    const usli_jrow *row = NULL;
    if (raw->count > skip) {
        row = usli_j_test(usli_j_want_str(j, raw->items[skip], "the test's name"));
        if (!row) usli_j_raise(j, "no test named '%.*s'", (int)raw->items[skip].u.s->n, raw->items[skip].u.s->p);
    }
    usli_jargs rest = behind(raw, skip + 1);
    for (size_t i = 0; i < q->count; i++) {
        usli_jval v = by_attribute ? walk(j, q->items[i], raw->items[0]) : q->items[i];
        if (row) v = usli_j_call_row(j, row, v, &rest, "test ");
        if (usli_j_truth(j, v) == keep) usli_j_push(j, out, q->items[i]);
    }
    return out;
}
CALL(select_) {
    (void)a;
    return sift(j, self, raw, false, true);
}
CALL(reject) {
    (void)a;
    return sift(j, self, raw, false, false);
}
CALL(selectattr) {
    (void)a;
    return sift(j, self, raw, true, true);
}
CALL(rejectattr) {
    (void)a;
    return sift(j, self, raw, true, false);
}

static const usli_jrow FILTERS[] = {
    { "abs", "", absolute, 0 },
    { "attr", "name", attr, 0 },
    { "batch", "linecount,fill_with=", batch, 0 },
    { "capitalize", "", capitalize, 0 },
    { "center", "width=", center, 0 },
    { "count", "", length, 0 },
    { "d", "default_value=,boolean=", default_, 0 },
    { "default", "default_value=,boolean=", default_, 0 },
    { "dictsort", "case_sensitive=,by=,reverse=", dictsort, 0 },
    { "e", "", escape, 0 },
    { "escape", "", escape, 0 },
    { "first", "", first, 0 },
    { "float", "default=", to_float, 0 },
    { "forceescape", "", force_escape, 0 },
    { "format", "*", format, 0 },
    { "groupby", "attribute,default=,case_sensitive=", groupby, 0 },
    { "indent", "width=,first=,blank=", indent, 0 },
    { "int", "default=,base=", to_int, 0 },
    { "items", "", items, 0 },
    { "join", "d=,attribute=", join, 0 },
    { "last", "", last, 0 },
    { "length", "", length, 0 },
    { "list", "", list, 0 },
    { "lower", "", lower, 0 },
    { "map", "*", map, 0 },
    { "max", "case_sensitive=,attribute=", max, 0 },
    { "min", "case_sensitive=,attribute=", min, 0 },
    { "reject", "*", reject, 0 },
    { "rejectattr", "*", rejectattr, 0 },
    { "replace", "old,new,count=", replace, 0 },
    { "reverse", "", reverse, 0 },
    { "round", "precision=,method=", round_, 0 },
    { "safe", "", safe, 0 },
    { "select", "*", select_, 0 },
    { "selectattr", "*", selectattr, 0 },
    { "slice", "slices,fill_with=", slice, 0 },
    { "sort", "reverse=,case_sensitive=,attribute=", sort, 0 },
    { "string", "", string, 0 },
    { "sum", "attribute=,start=", sum, 0 },
    { "title", "", title, 0 },
    { "tojson", "ensure_ascii=,indent=,separators=,sort_keys=", usli_j_to_json, 0 },
    { "trim", "chars=", trim, 0 },
    { "truncate", "length=,killwords=,end=,leeway=", truncate, 0 },
    { "unique", "case_sensitive=,attribute=", unique, 0 },
    { "upper", "", upper, 0 },
    { "urlencode", "", urlencode, 0 },
    { "wordcount", "", wordcount, 0 },
};

const usli_jrow *usli_j_filter(const usli_jstr *name) {
    usli_jval v = { .type = J_STR, .u.s = (usli_jstr *)(uintptr_t)name };
    for (size_t i = 0; i < sizeof FILTERS / sizeof *FILTERS; i++)
        if (usli_j_is_text(v, FILTERS[i].name)) return &FILTERS[i];
    return NULL;
}
