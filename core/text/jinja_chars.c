/* Characters of template values as Python's str sees them. */
#include <math.h>
#include <string.h>
#include <utf8proc.h>

#include "core/base/number.h"
#include "core/text/jinja_parts.h"
#include "core/text/parts.h"

bool usli_j_is_space(int32_t c) {
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

size_t usli_j_space_at(const char *p, const char *end) {
    if (p >= end) return 0;
    if ((unsigned char)*p < 0x80) return usli_j_is_space(*p);
    size_t n = usli_utf8_step(*p);
    return (size_t)(end - p) >= n && usli_j_is_space(usli_utf8_get(p)) ? n : 0;
}

size_t usli_j_space_before(const char *p, const char *end) {
    const char *at = end;
    if (at == p) return 0;
    do at--;
    while (at > p && ((unsigned char)*at & 0xC0) == 0x80);
    return usli_j_space_at(at, end);
}

size_t usli_j_chars(usli_jinja *j, const usli_jstr *s) {
    size_t n = 0;
    usli_j_step(j, s->n >> 5);
    for (size_t i = 0; i < s->n; i++) n += ((unsigned char)s->p[i] & 0xC0) != 0x80;
    return n;
}

size_t usli_j_offset(const usli_jstr *s, size_t chars) {
    size_t at = 0;
    for (; chars && at < s->n; chars--) at += usli_utf8_step(s->p[at]);
    return at;
}

size_t usli_j_search(usli_jinja *j, const usli_jstr *a, const usli_jstr *b, size_t from) {
    if (from > a->n || b->n > a->n - from) return SIZE_MAX;
    if (!b->n) return from;
    const char *p = a->p + from, *last = a->p + a->n - b->n;
    usli_j_step(j, (uint64_t)(last - p) >> 6);
    for (; p <= last && (p = memchr(p, b->p[0], (size_t)(last - p) + 1)); p++) {
        usli_j_step(j, b->n >> 6);
        if (memcmp(p, b->p, b->n) == 0) return (size_t)(p - a->p);
    }
    return SIZE_MAX;
}

bool usli_j_printable(int32_t code) {
    if (code < 0x7F) return code >= 0x20;
    switch (utf8proc_category(code)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS: return false;
    default: return true;
    }
}

/* ---- Case ---- */

static void put_code(usli_jinja *j, usli_jout *o, int32_t code) {
    utf8proc_uint8_t c[4];
    utf8proc_ssize_t n = utf8proc_encode_char(code, c);
    usli_j_put(j, o, (const char *)c, (size_t)n);
}

/* Letters that become several. */
static const char *long_case(int32_t code, bool upper, bool title) {
    static const struct {
        int32_t code;
        const char *upper, *title;
    } LIST[] = { { 0xDF, "SS", "Ss" },     { 0x149, "\xCA\xBCN", "\xCA\xBCN" },
                 { 0xFB00, "FF", "Ff" },   { 0xFB01, "FI", "Fi" },
                 { 0xFB02, "FL", "Fl" },   { 0xFB03, "FFI", "Ffi" },
                 { 0xFB04, "FFL", "Ffl" }, { 0xFB05, "ST", "St" },
                 { 0xFB06, "ST", "St" } };
    if (code == 0x130 && !upper && !title) return "i\xCC\x87";
    for (size_t i = 0; i < sizeof LIST / sizeof *LIST && (upper || title); i++)
        if (LIST[i].code == code) return title ? LIST[i].title : LIST[i].upper;
    return NULL;
}

static bool cased(int32_t code) {
    utf8proc_category_t c = utf8proc_category(code);
    return c == UTF8PROC_CATEGORY_LU || c == UTF8PROC_CATEGORY_LL || c == UTF8PROC_CATEGORY_LT;
}

static void put_cased(usli_jinja *j, usli_jout *o, int32_t code, bool upper, bool title) {
    const char *several = long_case(code, upper, title);
    if (several)
        usli_j_puts(j, o, several);
    else
        put_code(j, o, title ? utf8proc_totitle(code) : upper ? utf8proc_toupper(code) : utf8proc_tolower(code));
}

usli_jval usli_j_case(usli_jinja *j, usli_jval text, usli_jcase how) {
    const usli_jstr *s = text.u.s;
    usli_jout o = { 0 };
    bool inside = false; /* the character before is a letter with case */
    for (size_t i = 0; i < s->n; i += usli_utf8_step(s->p[i])) {
        int32_t code = usli_utf8_get(s->p + i);
        bool title = (how == J_CAPITAL && i == 0) || (how == J_TITLE && !inside);
        bool upper = how == J_UPPER || (how == J_SWAP && utf8proc_category(code) == UTF8PROC_CATEGORY_LL);
        bool last_sigma = code == 0x3A3 && !upper && !title && inside;
        inside = cased(code);
        if (last_sigma && i + 2 < s->n) last_sigma = !cased(usli_utf8_get(s->p + i + 2));
        if (last_sigma)
            put_code(j, &o, 0x3C2);
        else
            put_cased(j, &o, code, upper, title);
    }
    usli_jval out = usli_j_taken(j, &o);
    out.markup = text.markup;
    return out;
}

/* ---- Parts ---- */

static bool in_set(const usli_jstr *set, const char *p, size_t n) {
    for (size_t i = 0; i < set->n; i += usli_utf8_step(set->p[i]))
        if (set->n - i >= n && usli_utf8_step(set->p[i]) == n && memcmp(set->p + i, p, n) == 0) return true;
    return false;
}

usli_jval usli_j_strip(usli_jinja *j, usli_jval text, usli_jval chars, bool left, bool right) {
    const usli_jstr *s = text.u.s;
    const usli_jstr *set =
        chars.type == J_ABSENT || chars.type == J_NONE ? NULL : usli_j_want_str(j, chars, "strip: the characters");
    size_t start = 0, end = s->n;
    usli_j_step(j, (s->n >> 6) + (set ? set->n >> 4 : 0));
    while (left && start < end) {
        size_t n = usli_utf8_step(s->p[start]);
        if (set ? !in_set(set, s->p + start, n) : !usli_j_space_at(s->p + start, s->p + end)) break;
        start += n;
    }
    while (right && end > start) {
        size_t at = end - 1;
        while (at > start && ((unsigned char)s->p[at] & 0xC0) == 0x80) at--;
        if (set ? !in_set(set, s->p + at, end - at) : !usli_j_space_at(s->p + at, s->p + end)) break;
        end = at;
    }
    usli_jval out = usli_j_text(j, s->p + start, end - start);
    out.markup = text.markup;
    return out;
}

usli_jval usli_j_replace(usli_jinja *j, usli_jval text, usli_jval from, usli_jval to, int64_t count) {
    const usli_jstr *s = text.u.s, *a = usli_j_want_str(j, from, "replace: the old text"),
                    *b = usli_j_want_str(j, to, "replace: the new text");
    usli_jout o = { 0 };
    size_t at = 0;
    for (int64_t done = 0; count < 0 || done < count; done++) {
        size_t hit = usli_j_search(j, s, a, a->n || !done ? at : at + (at < s->n ? usli_utf8_step(s->p[at]) : 1));
        if (hit == SIZE_MAX) break;
        usli_j_step(j, 1);
        usli_j_put(j, &o, s->p + at, hit - at);
        usli_j_put(j, &o, b->p, b->n);
        at = hit + a->n;
    }
    usli_j_put(j, &o, s->p + at, s->n - at);
    usli_jval out = usli_j_taken(j, &o);
    out.markup = text.markup;
    return out;
}

usli_jval usli_j_escape(usli_jinja *j, usli_jval v) {
    static const struct {
        char c;
        const char *entity;
    } LIST[] = { { '&', "&amp;" }, { '<', "&lt;" }, { '>', "&gt;" }, { '"', "&#34;" }, { '\'', "&#39;" } };
    if (v.type == J_STR && v.markup) return v;
    const usli_jstr *s = usli_j_str(j, v).u.s;
    usli_jout o = { 0 };
    for (size_t i = 0; i < s->n; i++) {
        const char *entity = NULL;
        for (size_t k = 0; k < sizeof LIST / sizeof *LIST && !entity; k++)
            if (s->p[i] == LIST[k].c) entity = LIST[k].entity;
        usli_j_put(j, &o, entity ? entity : s->p + i, entity ? strlen(entity) : 1);
    }
    usli_jval out = usli_j_taken(j, &o);
    out.markup = true;
    return out;
}

/* ---- The % operator ---- */

typedef struct formatter {
    usli_jinja *j;
    usli_jout out;
    usli_jval args;
    size_t next;
} formatter;

static usli_jval next_arg(formatter *f) {
    bool many = f->args.type == J_SEQ && f->args.u.q->flavour == J_TUPLE;
    if (f->next >= (many ? f->args.u.q->count : 1)) usli_j_raise(f->j, "not enough arguments for format string");
    return many ? f->args.u.q->items[f->next++] : (f->next++, f->args);
}

static void put_padded(formatter *f, const usli_jstr *s, size_t width, const char *flags) {
    size_t n = usli_j_chars(f->j, s), sign = s->n && (s->p[0] == '-' || s->p[0] == '+');
    bool left = strchr(flags, '-') != NULL, zeros = !left && strchr(flags, '0') != NULL;
    if (zeros) usli_j_put(f->j, &f->out, s->p, sign);
    for (size_t i = n; i < width && !left; i++) usli_j_put(f->j, &f->out, zeros ? "0" : " ", 1);
    usli_j_put(f->j, &f->out, s->p + (zeros ? sign : 0), s->n - (zeros ? sign : 0));
    for (size_t i = n; i < width && left; i++) usli_j_put(f->j, &f->out, " ", 1);
}

static usli_jval number_text(formatter *f, char kind, int precision, bool plus, usli_jval v) {
    char text[USLI_NUMBER_FIXED + 1] = "+";
    char *at = plus ? text + 1 : text;
    usli_j_defined(f->j, v);
    if (!usli_j_is_number(v))
        usli_j_raise(f->j, "%%%c format: a real number is required, not %s", kind, usli_j_type_name(v));
    double d = usli_j_number(v);
    if (kind != 'f' && v.type == J_FLOAT && !(fabs(d) < 9e18))
        usli_j_raise(f->j, "%%%c format: the number is too large", kind);
    long long i = v.type == J_FLOAT ? (long long)d : (long long)usli_j_want_int(f->j, v, "");
    if (kind == 'f') {
        if (!(fabs(d) < 1e60) || precision > 60) usli_j_raise(f->j, "%%f format: the number is too long");
        usli_number_fixed(d, precision < 0 ? 6 : precision, at);
    } else if (kind == 'x' || kind == 'X') {
        if (i < 0) usli_j_raise(f->j, "%%x format: a negative number is not supported");
        snprintf(at, USLI_NUMBER_FIXED, kind == 'x' ? "%llx" : "%llX", (unsigned long long)i);
    } else {
        snprintf(at, USLI_NUMBER_FIXED, "%lld", i);
    }
    return usli_j_copy(f->j, *at == '-' ? at : text, strlen(*at == '-' ? at : text));
}

static usli_jval named_arg(formatter *f, const char **p, const char *end) {
    const char *close = memchr(*p, ')', (size_t)(end - *p));
    if (!close || f->args.type != J_DICT) usli_j_raise(f->j, "format requires a mapping");
    usli_jval key = usli_j_text(f->j, *p + 1, (size_t)(close - *p) - 1);
    const usli_jval *v = usli_jdict_get(f->j, f->args.u.m, key);
    if (!v) usli_j_raise(f->j, "the format names '%.*s', which the mapping lacks", (int)key.u.s->n, key.u.s->p);
    *p = close + 1;
    return *v;
}

static size_t format_number(const char **p, const char *end) {
    size_t n = 0;
    for (; *p < end && **p >= '0' && **p <= '9' && n < 100000; ++*p) n = n * 10 + (size_t)(**p - '0');
    return n;
}

/* One conversion, p behind the percent sign; returns what follows it. */
static const char *conversion(formatter *f, const char *p, const char *end) {
    char flags[8] = "";
    usli_jval v = { .type = J_ABSENT };
    if (p < end && *p == '(') v = named_arg(f, &p, end);
    for (size_t n = 0; p < end && n < 6 && *p && strchr("-+ 0#", *p); p++) flags[n++] = *p;
    size_t width = format_number(&p, end);
    int precision = -1;
    if (p < end && *p == '.') {
        p++;
        precision = (int)format_number(&p, end);
    }
    if (p >= end) usli_j_raise(f->j, "incomplete format");
    char kind = *p++;
    if (kind == '%') {
        usli_j_put(f->j, &f->out, "%", 1);
        return p;
    }
    if (v.type == J_ABSENT) v = next_arg(f);
    usli_jout repr = { 0 };
    switch (kind) {
    case 's': v = usli_j_str(f->j, v); break;
    case 'r':
        usli_j_put_repr(f->j, &repr, v);
        v = usli_j_taken(f->j, &repr);
        break;
    case 'i':
    case 'd':
    case 'x':
    case 'X':
    case 'f': put_padded(f, number_text(f, kind, precision, strchr(flags, '+') != NULL, v).u.s, width, flags); return p;
    default: usli_j_raise(f->j, "unsupported format character '%c'", kind);
    }
    usli_jstr cut = *v.u.s;
    if (precision >= 0) cut.n = usli_j_offset(&cut, (size_t)precision);
    put_padded(f, &cut, width, flags[0] == '-' ? "-" : "");
    return p;
}

usli_jval usli_j_format(usli_jinja *j, usli_jval format, usli_jval args) {
    formatter f = { .j = j, .args = args };
    const usli_jstr *s = format.u.s;
    for (const char *p = s->p, *end = p + s->n; p < end;) {
        const char *run = p;
        while (p < end && *p != '%') p++;
        usli_j_put(j, &f.out, run, (size_t)(p - run));
        if (p < end) p = conversion(&f, p + 1, end);
    }
    if (args.type == J_SEQ && args.u.q->flavour == J_TUPLE ? f.next < args.u.q->count : !f.next && args.type != J_DICT)
        usli_j_raise(j, "not all arguments converted during string formatting");
    usli_jval out = usli_j_taken(j, &f.out);
    out.markup = format.markup;
    return out;
}
