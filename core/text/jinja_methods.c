/* Methods of texts, lists and dictionaries as Python has them, and the global functions. Methods that would change a
 * value are unsafe in the sandbox, and said so. */
#include <string.h>
#include <time.h>
#include <utf8proc.h>

#include "core/text/jinja_parts.h"
#include "core/text/parts.h"

#define CALL(name) static usli_jval name(usli_jinja *j, usli_jval self, usli_jval *a, const usli_jargs *raw)
#define UNUSED (void)j, (void)self, (void)a, (void)raw

static bool given(usli_jval v) {
    return v.type != J_ABSENT && v.type != J_NONE;
}

static usli_jval like(usli_jval text, usli_jval of) {
    text.markup = of.markup;
    return text;
}

/* ---- Texts ---- */

CALL(str_upper) {
    UNUSED;
    return usli_j_case(j, self, J_UPPER);
}
CALL(str_lower) {
    UNUSED;
    return usli_j_case(j, self, J_LOWER);
}
CALL(str_title) {
    UNUSED;
    return usli_j_case(j, self, J_TITLE);
}
CALL(str_capitalize) {
    UNUSED;
    return usli_j_case(j, self, J_CAPITAL);
}
CALL(str_swapcase) {
    UNUSED;
    return usli_j_case(j, self, J_SWAP);
}
CALL(str_strip) {
    UNUSED;
    return usli_j_strip(j, self, a[0], true, true);
}
CALL(str_lstrip) {
    UNUSED;
    return usli_j_strip(j, self, a[0], true, false);
}
CALL(str_rstrip) {
    UNUSED;
    return usli_j_strip(j, self, a[0], false, true);
}
CALL(str_replace) {
    UNUSED;
    return usli_j_replace(j, self, a[0], a[1], a[2].type == J_ABSENT ? -1 : usli_j_want_int(j, a[2], "replace: count"));
}

static bool affix(usli_jinja *j, const usli_jstr *s, usli_jval v, bool end) {
    const usli_jstr *b = usli_j_want_str(j, v, end ? "endswith: the text" : "startswith: the text");
    return b->n <= s->n && memcmp(end ? s->p + s->n - b->n : s->p, b->p, b->n) == 0;
}

/* The part of a text between two positions that may be missing or count from the end. */
static usli_jstr part(usli_jinja *j, const usli_jstr *s, usli_jval start, usli_jval stop) {
    int64_t n = given(start) || given(stop) ? (int64_t)usli_j_chars(j, s) : 0;
    int64_t from = given(start) ? usli_j_want_int(j, start, "start") : 0,
            to = given(stop) ? usli_j_want_int(j, stop, "end") : n;
    if (from < 0) from = from < -n ? 0 : from + n;
    if (to < 0) to = to < -n ? 0 : to + n;
    size_t at = usli_j_offset(s, (size_t)from), end = given(stop) ? usli_j_offset(s, (size_t)to) : s->n;
    return (usli_jstr){ s->p + at, end > at ? end - at : 0, NULL };
}

static usli_jval any_affix(usli_jinja *j, usli_jval self, const usli_jval *a, bool end) {
    usli_jstr s = part(j, self.u.s, a[1], a[2]);
    if (a[0].type != J_SEQ || a[0].u.q->flavour != J_TUPLE) return usli_j_bool(affix(j, &s, a[0], end));
    for (size_t i = 0; i < a[0].u.q->count; i++)
        if (affix(j, &s, a[0].u.q->items[i], end)) return usli_j_bool(true);
    return usli_j_bool(false);
}
CALL(str_startswith) {
    UNUSED;
    return any_affix(j, self, a, false);
}
CALL(str_endswith) {
    UNUSED;
    return any_affix(j, self, a, true);
}
CALL(str_removeprefix) {
    UNUSED;
    size_t n = affix(j, self.u.s, a[0], false) ? a[0].u.s->n : 0;
    return like(usli_j_text(j, self.u.s->p + n, self.u.s->n - n), self);
}
CALL(str_removesuffix) {
    UNUSED;
    size_t n = affix(j, self.u.s, a[0], true) ? a[0].u.s->n : 0;
    return like(usli_j_text(j, self.u.s->p, self.u.s->n - n), self);
}

static size_t search_last(usli_jinja *j, const usli_jstr *s, const usli_jstr *b) {
    size_t found = SIZE_MAX;
    for (size_t at = 0, hit; (hit = usli_j_search(j, s, b, at)) != SIZE_MAX; at = hit + 1) {
        usli_j_step(j, 1);
        found = hit;
    }
    return found;
}

/* Where a text stands in another, in characters; -1: nowhere. */
static int64_t place(usli_jinja *j, usli_jval self, const usli_jval *a, bool last) {
    usli_jstr s = part(j, self.u.s, a[1], a[2]);
    const usli_jstr *b = usli_j_want_str(j, a[0], "find: the text");
    size_t at = last ? search_last(j, &s, b) : usli_j_search(j, &s, b, 0);
    if (at == SIZE_MAX) return -1;
    usli_jstr before = { self.u.s->p, (size_t)(s.p - self.u.s->p) + at, NULL };
    return (int64_t)usli_j_chars(j, &before);
}
CALL(str_find) {
    UNUSED;
    return usli_j_int(place(j, self, a, false));
}
CALL(str_rfind) {
    UNUSED;
    return usli_j_int(place(j, self, a, true));
}
CALL(str_index) {
    UNUSED;
    int64_t at = place(j, self, a, false);
    if (at < 0) usli_j_raise(j, "substring not found");
    return usli_j_int(at);
}
CALL(str_rindex) {
    UNUSED;
    int64_t at = place(j, self, a, true);
    if (at < 0) usli_j_raise(j, "substring not found");
    return usli_j_int(at);
}
CALL(str_count) {
    UNUSED;
    usli_jstr s = part(j, self.u.s, a[1], a[2]);
    const usli_jstr *b = usli_j_want_str(j, a[0], "count: the text");
    if (!b->n) return usli_j_int((int64_t)usli_j_chars(j, &s) + 1);
    int64_t n = 0;
    for (size_t at = 0; (at = usli_j_search(j, &s, b, at)) != SIZE_MAX; at += b->n) n++;
    usli_j_step(j, (uint64_t)n);
    return usli_j_int(n);
}

static void push_part(usli_jinja *j, usli_jval list, usli_jval of, size_t from, size_t to) {
    usli_j_push(j, list, like(usli_j_text(j, of.u.s->p + from, to - from), of));
}

static void reverse(usli_jseq *q) {
    for (size_t i = 0; i < q->count / 2; i++) {
        usli_jval t = q->items[i];
        q->items[i] = q->items[q->count - 1 - i];
        q->items[q->count - 1 - i] = t;
    }
}

static void split_spaces(usli_jinja *j, usli_jval self, usli_jval list, int64_t most) {
    const usli_jstr *s = self.u.s;
    const char *end = s->p + s->n;
    for (size_t at = 0, n; at < s->n; most--) {
        while (at < s->n && (n = usli_j_space_at(s->p + at, end))) at += n;
        size_t from = at;
        if (at >= s->n) return;
        if (most == 0) {
            size_t to = s->n;
            while (to > from && (n = usli_j_space_before(s->p + from, s->p + to))) to -= n;
            push_part(j, list, self, from, to);
            return;
        }
        while (at < s->n && !usli_j_space_at(s->p + at, end)) at += usli_utf8_step(s->p[at]);
        push_part(j, list, self, from, at);
    }
}

static void rsplit_spaces(usli_jinja *j, usli_jval self, usli_jval list, int64_t most) {
    const usli_jstr *s = self.u.s;
    for (size_t at = s->n, n; at > 0; most--) {
        while (at > 0 && (n = usli_j_space_before(s->p, s->p + at))) at -= n;
        size_t to = at;
        if (!at) break;
        if (most == 0) {
            size_t from = 0;
            while (from < to && (n = usli_j_space_at(s->p + from, s->p + to))) from += n;
            push_part(j, list, self, from, to);
            break;
        }
        while (at > 0 && !usli_j_space_before(s->p, s->p + at)) at--;
        push_part(j, list, self, at, to);
    }
    reverse(list.u.q);
}

static size_t search_before(usli_jinja *j, const usli_jstr *s, const usli_jstr *b, size_t end) {
    usli_j_step(j, 1);
    for (size_t at = end; at >= b->n && b->n; at--)
        if (memcmp(s->p + at - b->n, b->p, b->n) == 0) return at - b->n;
    return SIZE_MAX;
}

static usli_jval split(usli_jinja *j, usli_jval self, const usli_jval *a, bool right) {
    usli_jval list = usli_j_seq(j, J_LIST, 0);
    int64_t most = a[1].type == J_ABSENT ? -1 : usli_j_want_int(j, a[1], "split: maxsplit");
    const usli_jstr *s = self.u.s;
    usli_j_step(j, s->n >> 4);
    if (!given(a[0])) {
        (right ? rsplit_spaces : split_spaces)(j, self, list, most);
        return list;
    }
    const usli_jstr *b = usli_j_want_str(j, a[0], "split: the separator");
    if (!b->n) usli_j_raise(j, "empty separator");
    size_t at = 0, end = s->n, hit;
    for (; !right && most != 0 && (hit = usli_j_search(j, s, b, at)) != SIZE_MAX; most--, at = hit + b->n)
        push_part(j, list, self, at, hit);
    for (; right && most != 0 && (hit = search_before(j, s, b, end)) != SIZE_MAX; most--, end = hit)
        push_part(j, list, self, hit + b->n, end);
    push_part(j, list, self, at, end);
    if (right) reverse(list.u.q);
    return list;
}
CALL(str_split) {
    UNUSED;
    return split(j, self, a, false);
}
CALL(str_rsplit) {
    UNUSED;
    return split(j, self, a, true);
}
CALL(str_splitlines) {
    UNUSED;
    usli_jval list = usli_j_seq(j, J_LIST, 0);
    const usli_jstr *s = self.u.s;
    bool keep = usli_j_truth(j, a[0]);
    for (size_t at = 0, from = 0, n; at < s->n; at += n) {
        int32_t c = usli_utf8_get(s->p + at);
        n = usli_utf8_step(s->p[at]);
        bool end = (c >= 10 && c <= 13) || (c >= 28 && c <= 30) || c == 0x85 || c == 0x2028 || c == 0x2029;
        if (c == '\r' && at + 1 < s->n && s->p[at + 1] == '\n') n = 2;
        if (end) push_part(j, list, self, from, keep ? at + n : at);
        if (end) from = at + n;
        if (!end && at + n == s->n) push_part(j, list, self, from, s->n);
    }
    return list;
}

static usli_jval partition(usli_jinja *j, usli_jval self, usli_jval by, bool last) {
    const usli_jstr *s = self.u.s, *b = usli_j_want_str(j, by, "partition: the separator");
    if (!b->n) usli_j_raise(j, "empty separator");
    size_t hit = last ? search_before(j, s, b, s->n) : usli_j_search(j, s, b, 0), none = last ? 0 : s->n;
    usli_jval out = usli_j_seq(j, J_TUPLE, 3);
    bool found = hit != SIZE_MAX;
    push_part(j, out, self, 0, found ? hit : none);
    push_part(j, out, self, found ? hit : none, found ? hit + b->n : none);
    push_part(j, out, self, found ? hit + b->n : none, s->n);
    return out;
}
CALL(str_partition) {
    UNUSED;
    return partition(j, self, a[0], false);
}
CALL(str_rpartition) {
    UNUSED;
    return partition(j, self, a[0], true);
}
CALL(str_join) {
    UNUSED;
    const usli_jseq *q = usli_j_iterate(j, a[0]);
    usli_jout o = { 0 };
    for (size_t i = 0; i < q->count; i++) {
        if (i) usli_j_put(j, &o, self.u.s->p, self.u.s->n);
        const usli_jstr *s = usli_j_want_str(j, q->items[i], "join: each item");
        usli_j_put(j, &o, s->p, s->n);
    }
    return like(usli_j_taken(j, &o), self);
}

static usli_jval justify(usli_jinja *j, usli_jval self, usli_jval width, usli_jval fill, int where) {
    int64_t want = usli_j_want_int(j, width, "the width"), n = (int64_t)usli_j_chars(j, self.u.s);
    usli_jstr blank = { " ", 1, NULL };
    const usli_jstr *f = fill.type == J_ABSENT ? &blank : usli_j_want_str(j, fill, "the fill character");
    if (usli_j_chars(j, f) != 1) usli_j_raise(j, "the fill character must be exactly one character long");
    int64_t pad = want > n ? want - n : 0, left = where < 0 ? 0 : where > 0 ? pad : pad / 2 + (pad & want & 1);
    usli_jout o = { 0 };
    for (int64_t i = 0; i < left; i++, usli_j_step(j, 1)) usli_j_put(j, &o, f->p, f->n);
    usli_j_put(j, &o, self.u.s->p, self.u.s->n);
    for (int64_t i = left; i < pad; i++, usli_j_step(j, 1)) usli_j_put(j, &o, f->p, f->n);
    return like(usli_j_taken(j, &o), self);
}
CALL(str_ljust) {
    UNUSED;
    return justify(j, self, a[0], a[1], -1);
}
CALL(str_rjust) {
    UNUSED;
    return justify(j, self, a[0], a[1], 1);
}
CALL(str_center) {
    UNUSED;
    return justify(j, self, a[0], a[1], 0);
}
CALL(str_zfill) {
    UNUSED;
    const usli_jstr *s = self.u.s;
    size_t sign = s->n && (s->p[0] == '-' || s->p[0] == '+');
    usli_jval rest = usli_j_text(j, s->p + sign, s->n - sign);
    int64_t width = usli_j_want_int(j, a[0], "zfill: the width");
    usli_jval filled =
        justify(j, rest, usli_j_int(width > (int64_t)sign ? width - (int64_t)sign : 0), usli_j_cstr(j, "0"), 1);
    return usli_j_join(j, usli_j_text(j, s->p, sign), filled);
}

/* Whether every character is of a kind, and there is one. */
static usli_jval all_chars(usli_jinja *j, usli_jval self, bool (*is)(int32_t)) {
    const usli_jstr *s = self.u.s;
    usli_j_step(j, s->n >> 4);
    for (size_t i = 0; i < s->n; i += usli_utf8_step(s->p[i]))
        if (!is(usli_utf8_get(s->p + i))) return usli_j_bool(false);
    return usli_j_bool(s->n != 0);
}

static bool is_alpha(int32_t c) {
    utf8proc_category_t k = utf8proc_category(c);
    return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}
static bool is_decimal(int32_t c) {
    return utf8proc_category(c) == UTF8PROC_CATEGORY_ND;
}
static bool is_digit(int32_t c) {
    return is_decimal(c) || c == 0xB2 || c == 0xB3 || c == 0xB9 || c == 0x2070 || (c >= 0x2074 && c <= 0x2079) ||
           (c >= 0x2080 && c <= 0x2089);
}
static bool is_alnum(int32_t c) {
    return is_alpha(c) || usli_is_numeric(c);
}
static bool is_ascii(int32_t c) {
    return c < 0x80;
}
CALL(str_isalpha) {
    UNUSED;
    return all_chars(j, self, is_alpha);
}
CALL(str_isdecimal) {
    UNUSED;
    return all_chars(j, self, is_decimal);
}
CALL(str_isdigit) {
    UNUSED;
    return all_chars(j, self, is_digit);
}
CALL(str_isnumeric) {
    UNUSED;
    return all_chars(j, self, usli_is_numeric);
}
CALL(str_isalnum) {
    UNUSED;
    return all_chars(j, self, is_alnum);
}
CALL(str_isspace) {
    UNUSED;
    return all_chars(j, self, usli_j_is_space);
}
CALL(str_isascii) {
    UNUSED;
    return usli_j_bool(!self.u.s->n || all_chars(j, self, is_ascii).u.b);
}

static usli_jval has_case(usli_jinja *j, usli_jval self, utf8proc_category_t wanted) {
    const usli_jstr *s = self.u.s;
    bool found = false;
    usli_j_step(j, s->n >> 4);
    for (size_t i = 0; i < s->n; i += usli_utf8_step(s->p[i])) {
        utf8proc_category_t k = utf8proc_category(usli_utf8_get(s->p + i));
        if (k == wanted)
            found = true;
        else if (k <= UTF8PROC_CATEGORY_LT && k >= UTF8PROC_CATEGORY_LU)
            return usli_j_bool(false);
    }
    return usli_j_bool(found);
}
CALL(str_isupper) {
    UNUSED;
    return has_case(j, self, UTF8PROC_CATEGORY_LU);
}
CALL(str_islower) {
    UNUSED;
    return has_case(j, self, UTF8PROC_CATEGORY_LL);
}

/* "{} {0} {name}".format(...): fields without a format of their own. */
CALL(str_format) {
    (void)a;
    usli_jout o = { 0 };
    size_t next = 0;
    const usli_jstr *s = self.u.s;
    for (size_t i = 0; i < s->n; i++) {
        bool twice = i + 1 < s->n && s->p[i + 1] == s->p[i];
        if ((s->p[i] != '{' && s->p[i] != '}') || twice) {
            usli_j_put(j, &o, s->p + i, 1);
            if (s->p[i] == '{' || s->p[i] == '}') i++;
            continue;
        }
        const char *close = memchr(s->p + i, '}', s->n - i);
        if (s->p[i] == '}' || !close) usli_j_raise(j, "format: a brace stands alone");
        usli_jval field = usli_j_text(j, s->p + i + 1, (size_t)(close - s->p) - i - 1);
        size_t n = 0;
        bool number = true;
        for (size_t k = 0; k < field.u.s->n; k++) {
            number = number && field.u.s->p[k] >= '0' && field.u.s->p[k] <= '9' && k < 6;
            if (number) n = n * 10 + (size_t)(field.u.s->p[k] - '0');
            if (strchr(":!.[", field.u.s->p[k]))
                usli_j_raise(j, "format: '%.*s' is not supported; write {} or {name}", (int)field.u.s->n, field.u.s->p);
        }
        if (!field.u.s->n) n = next++;
        const usli_jval *named = number ? NULL : usli_jdict_get(j, &raw->named, field);
        if (number ? n >= raw->count : !named)
            usli_j_raise(j, "format: no argument for {%.*s}", (int)field.u.s->n, field.u.s->p);
        usli_j_put_str(j, &o, named ? *named : raw->items[n]);
        i = (size_t)(close - s->p);
    }
    return like(usli_j_taken(j, &o), self);
}

/* ---- Lists and dictionaries ---- */

CALL(seq_index) {
    UNUSED;
    for (size_t i = 0; i < self.u.q->count; i++)
        if (usli_j_equal(j, self.u.q->items[i], a[0])) return usli_j_int((int64_t)i);
    usli_j_raise(j, "index: the value is not in the list");
}
CALL(seq_count) {
    UNUSED;
    int64_t n = 0;
    for (size_t i = 0; i < self.u.q->count; i++) n += usli_j_equal(j, self.u.q->items[i], a[0]);
    return usli_j_int(n);
}
CALL(same) { /* copy(): values never change */
    UNUSED;
    return self;
}
CALL(dict_get) {
    UNUSED;
    const usli_jval *v = usli_jdict_get(j, self.u.m, a[0]);
    return v ? *v : a[1].type == J_ABSENT ? usli_j_none() : a[1];
}
CALL(dict_keys) {
    UNUSED;
    usli_jval out = usli_j_seq(j, J_KEYS, self.u.m->count);
    for (size_t i = 0; i < self.u.m->count; i++) usli_j_push(j, out, self.u.m->keys[i]);
    return out;
}
CALL(dict_values) {
    UNUSED;
    usli_jval out = usli_j_seq(j, J_VALUES, self.u.m->count);
    for (size_t i = 0; i < self.u.m->count; i++) usli_j_push(j, out, self.u.m->values[i]);
    return out;
}
CALL(dict_items) {
    UNUSED;
    usli_jval out = usli_j_seq(j, J_ITEMS, self.u.m->count);
    for (size_t i = 0; i < self.u.m->count; i++) {
        usli_jval pair = usli_j_seq(j, J_TUPLE, 2);
        usli_j_push(j, pair, self.u.m->keys[i]);
        usli_j_push(j, pair, self.u.m->values[i]);
        usli_j_push(j, out, pair);
    }
    return out;
}

/* ---- Loops ---- */

CALL(loop_cycle) {
    UNUSED;
    if (!raw->count) usli_j_raise(j, "no items for cycling given");
    return raw->items[self.u.loop->at % raw->count];
}
CALL(loop_changed) {
    UNUSED;
    usli_jval now = usli_j_seq(j, J_TUPLE, raw->count);
    for (size_t i = 0; i < raw->count; i++) usli_j_push(j, now, raw->items[i]);
    bool changed = self.u.loop->changed.type == J_ABSENT || !usli_j_equal(j, self.u.loop->changed, now);
    self.u.loop->changed = now;
    return usli_j_bool(changed);
}

static const usli_jrow METHODS[] = {
    { "upper", "", str_upper, J_STR },
    { "lower", "", str_lower, J_STR },
    { "casefold", "", str_lower, J_STR },
    { "title", "", str_title, J_STR },
    { "capitalize", "", str_capitalize, J_STR },
    { "swapcase", "", str_swapcase, J_STR },
    { "strip", "chars=", str_strip, J_STR },
    { "lstrip", "chars=", str_lstrip, J_STR },
    { "rstrip", "chars=", str_rstrip, J_STR },
    { "replace", "old,new,count=", str_replace, J_STR },
    { "startswith", "prefix,start=,end=", str_startswith, J_STR },
    { "endswith", "suffix,start=,end=", str_endswith, J_STR },
    { "removeprefix", "prefix", str_removeprefix, J_STR },
    { "removesuffix", "suffix", str_removesuffix, J_STR },
    { "find", "sub,start=,end=", str_find, J_STR },
    { "rfind", "sub,start=,end=", str_rfind, J_STR },
    { "index", "sub,start=,end=", str_index, J_STR },
    { "rindex", "sub,start=,end=", str_rindex, J_STR },
    { "count", "sub,start=,end=", str_count, J_STR },
    { "split", "sep=,maxsplit=", str_split, J_STR },
    { "rsplit", "sep=,maxsplit=", str_rsplit, J_STR },
    { "splitlines", "keepends=", str_splitlines, J_STR },
    { "partition", "sep", str_partition, J_STR },
    { "rpartition", "sep", str_rpartition, J_STR },
    { "join", "iterable", str_join, J_STR },
    { "ljust", "width,fillchar=", str_ljust, J_STR },
    { "rjust", "width,fillchar=", str_rjust, J_STR },
    { "center", "width,fillchar=", str_center, J_STR },
    { "zfill", "width", str_zfill, J_STR },
    { "isalpha", "", str_isalpha, J_STR },
    { "isdecimal", "", str_isdecimal, J_STR },
    { "isdigit", "", str_isdigit, J_STR },
    { "isnumeric", "", str_isnumeric, J_STR },
    { "isalnum", "", str_isalnum, J_STR },
    { "isspace", "", str_isspace, J_STR },
    { "isascii", "", str_isascii, J_STR },
    { "isupper", "", str_isupper, J_STR },
    { "islower", "", str_islower, J_STR },
    { "format", "*", str_format, J_STR },
    { "index", "value", seq_index, J_SEQ },
    { "count", "value", seq_count, J_SEQ },
    { "copy", "", same, J_SEQ },
    { "get", "key,default=", dict_get, J_DICT },
    { "keys", "", dict_keys, J_DICT },
    { "values", "", dict_values, J_DICT },
    { "items", "", dict_items, J_DICT },
    { "copy", "", same, J_DICT },
    { "cycle", "*", loop_cycle, J_LOOP },
    { "changed", "*", loop_changed, J_LOOP },
};

static const struct {
    int type;
    const char *name;
} UNSAFE[] = { { J_SEQ, "append" }, { J_SEQ, "clear" },  { J_SEQ, "extend" },   { J_SEQ, "insert" },
               { J_SEQ, "pop" },    { J_SEQ, "remove" }, { J_SEQ, "reverse" },  { J_SEQ, "sort" },
               { J_DICT, "clear" }, { J_DICT, "pop" },   { J_DICT, "popitem" }, { J_DICT, "setdefault" },
               { J_DICT, "update" } };

const usli_jrow *usli_j_method(usli_jval self, const usli_jstr *name, bool *unsafe) {
    usli_jval v = { .type = J_STR, .u.s = (usli_jstr *)(uintptr_t)name };
    if (self.type == J_SEQ && self.u.q->flavour > J_RANGE) return NULL;
    for (size_t i = 0; i < sizeof METHODS / sizeof *METHODS; i++)
        if (METHODS[i].type == self.type && usli_j_is_text(v, METHODS[i].name)) return &METHODS[i];
    bool tuple = self.type == J_SEQ && self.u.q->flavour != J_LIST;
    for (size_t i = 0; i < sizeof UNSAFE / sizeof *UNSAFE && !tuple; i++)
        if (UNSAFE[i].type == self.type && usli_j_is_text(v, UNSAFE[i].name)) *unsafe = true;
    return NULL;
}

/* ---- Globals ---- */

CALL(raise_exception) {
    UNUSED;
    const usli_jstr *s = usli_j_str(j, a[0]).u.s;
    usli_j_throw(j, usli_fail(j->ctx, USL_ERR_INVALID, "%s, line %d: %.*s", j->name, j->line,
                              (int)(s->n < 900 ? s->n : 900), s->p));
}

/* The directives of strftime that have no names of places in them. */
CALL(strftime_now) {
    UNUSED;
    static const char DAYS[] =
        "Sunday\0\0\0\0Monday\0\0\0\0Tuesday\0\0\0Wednesday\0Thursday\0\0Friday\0\0\0\0Saturday\0";
    static const char MONTHS[] =
        "January\0\0\0February\0\0March\0\0\0\0\0April\0\0\0\0\0May\0\0\0\0\0\0\0June\0\0\0\0\0\0"
        "July\0\0\0\0\0\0August\0\0\0\0September\0October\0\0\0November\0\0December\0";
    const usli_jstr *s = usli_j_want_str(j, a[0], "strftime_now: the format");
    time_t now = time(NULL);
    struct tm t;
    usli_jout o = { 0 };
    if (!localtime_r(&now, &t)) usli_j_raise(j, "strftime_now: there is no time");
    for (size_t i = 0; i < s->n; i++) {
        char text[64] = "";
        if (s->p[i] != '%' || i + 1 == s->n) {
            usli_j_put(j, &o, s->p + i, 1);
            continue;
        }
        bool plain = s->p[i + 1] == '-' && i + 2 < s->n; /* %-d: without the zero */
        if (plain) i++;
        int value = -1;
        switch (s->p[++i]) {
        case 'd': value = t.tm_mday; break;
        case 'm': value = t.tm_mon + 1; break;
        case 'H': value = t.tm_hour; break;
        case 'I': value = (t.tm_hour + 11) % 12 + 1; break;
        case 'M': value = t.tm_min; break;
        case 'S': value = t.tm_sec; break;
        case 'y': value = t.tm_year % 100; break;
        case 'Y': snprintf(text, sizeof text, "%d", t.tm_year + 1900); break;
        case 'j': snprintf(text, sizeof text, plain ? "%d" : "%03d", t.tm_yday + 1); break;
        case 'B': snprintf(text, sizeof text, "%s", MONTHS + 10 * t.tm_mon); break;
        case 'b': snprintf(text, sizeof text, "%.3s", MONTHS + 10 * t.tm_mon); break;
        case 'A': snprintf(text, sizeof text, "%s", DAYS + 10 * t.tm_wday); break;
        case 'a': snprintf(text, sizeof text, "%.3s", DAYS + 10 * t.tm_wday); break;
        case 'p': snprintf(text, sizeof text, "%s", t.tm_hour < 12 ? "AM" : "PM"); break;
        case 'F': snprintf(text, sizeof text, "%d-%02d-%02d", t.tm_year + 1900, t.tm_mon + 1, t.tm_mday); break;
        case 'T': snprintf(text, sizeof text, "%02d:%02d:%02d", t.tm_hour, t.tm_min, t.tm_sec); break;
        case '%': snprintf(text, sizeof text, "%%"); break;
        default: usli_j_raise(j, "strftime_now: %%%c is not supported", s->p[i]);
        }
        if (value >= 0) snprintf(text, sizeof text, plain ? "%d" : "%02d", value);
        usli_j_puts(j, &o, text);
    }
    return usli_j_taken(j, &o);
}

CALL(range) {
    UNUSED;
    int64_t start = usli_j_want_int(j, a[0], "range"), stop,
            step = a[2].type == J_ABSENT ? 1 : usli_j_want_int(j, a[2], "range");
    if (a[1].type == J_ABSENT) {
        stop = start;
        start = 0;
    } else {
        stop = usli_j_want_int(j, a[1], "range");
    }
    if (step == 0) usli_j_raise(j, "range() arg 3 must not be zero");
    double n = ((double)stop - (double)start) / (double)step;
    if (n > 100000) usli_j_raise(j, "range too big: the sandbox allows 100000 items");
    usli_jval out = usli_j_seq(j, J_RANGE, 0);
    for (int64_t i = start; n > 0 && (step > 0 ? i < stop : i > stop); i += step) {
        usli_j_push(j, out, usli_j_int(i));
        if (step > 0 ? i > stop - step : i < stop - step) break;
    }
    return out;
}

/* dict(mapping or pairs, name = value) and namespace(...) alike. */
static usli_jval members(usli_jinja *j, const usli_jargs *raw) {
    usli_jval out = usli_j_dict(j);
    if (raw->count > 1) usli_j_raise(j, "dict() and namespace() take one mapping");
    if (raw->count && raw->items[0].type == J_DICT) {
        const usli_jdict *m = raw->items[0].u.m;
        for (size_t i = 0; i < m->count; i++) usli_jdict_set(j, out.u.m, m->keys[i], m->values[i]);
    } else if (raw->count) {
        const usli_jseq *q = usli_j_iterate(j, raw->items[0]);
        for (size_t i = 0; i < q->count; i++) {
            const usli_jseq *pair = usli_j_iterate(j, q->items[i]);
            if (pair->count != 2) usli_j_raise(j, "dict() and namespace() take pairs of a name and a value");
            usli_jdict_set(j, out.u.m, pair->items[0], pair->items[1]);
        }
    }
    for (size_t i = 0; i < raw->named.count; i++) usli_jdict_set(j, out.u.m, raw->named.keys[i], raw->named.values[i]);
    return out;
}
CALL(dict) {
    UNUSED;
    return members(j, raw);
}
CALL(namespace_) {
    UNUSED;
    usli_jval out = members(j, raw);
    for (size_t i = 0; i < out.u.m->count; i++)
        if (out.u.m->keys[i].type == J_STR && out.u.m->keys[i].u.s->n && out.u.m->keys[i].u.s->p[0] == '_')
            usli_j_raise(j, "a namespace's names do not begin with an underscore: '%.*s'", (int)out.u.m->keys[i].u.s->n,
                         out.u.m->keys[i].u.s->p);
    out.type = J_NAMESPACE;
    return out;
}

/* joiner(sep): a function that gives nothing first and sep afterwards. */
CALL(joiner_next) {
    UNUSED;
    usli_jval v = self.u.f->state;
    self.u.f->state.markup = true;
    return v.markup ? (v.markup = false, v) : usli_j_cstr(j, "");
}
CALL(joiner) {
    UNUSED;
    static const usli_jrow NEXT = { "joiner", "", joiner_next, 0 };
    usli_jfunc *f = usli_j_alloc(j, sizeof *f);
    f->row = &NEXT;
    f->state = a[0].type == J_ABSENT ? usli_j_cstr(j, ", ") : usli_j_str(j, a[0]);
    f->state.markup = false; /* has not been called */
    return (usli_jval){ .type = J_FUNC, .u.f = f };
}

const usli_jrow usli_j_globals[] = { { "raise_exception", "message", raise_exception, 0 },
                                     { "strftime_now", "format", strftime_now, 0 },
                                     { "range", "start,stop=,step=", range, 0 },
                                     { "dict", "*", dict, 0 },
                                     { "namespace", "*", namespace_, 0 },
                                     { "joiner", "sep=", joiner, 0 },
                                     { NULL, NULL, NULL, 0 } };
