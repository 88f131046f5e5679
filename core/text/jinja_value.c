/* Values of templates: the arena they lie in, Python's text of them, equality, order, dictionaries. */
#include <math.h>
#include <string.h>

#include "core/base/number.h"
#include "core/text/jinja_parts.h"
#include "core/text/parts.h"

/* ---- The arena ---- */

struct usli_jblock {
    usli_jblock *next;
    size_t used, size;
};
#define BLOCK_HEAD ((sizeof(usli_jblock) + 15) & ~(size_t)15)

enum { MAX_DEPTH = 900 };
#define MAX_STEPS ((uint64_t)40000000)

_Noreturn void usli_j_throw(usli_jinja *j, usl_status st) {
    j->st = st;
    longjmp(j->jump, 1);
}

_Noreturn void usli_j_raise(usli_jinja *j, const char *fmt, ...) {
    char text[900];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    usli_j_throw(j, usli_fail(j->ctx, USL_ERR_FORMAT, "%s, line %d: %s", j->name, j->line ? j->line : 1, text));
}

void usli_j_step(usli_jinja *j, uint64_t n) {
    j->steps += n;
    if (j->steps > MAX_STEPS)
        usli_j_raise(j, "the template does not come to an end in %llu steps", (unsigned long long)MAX_STEPS);
}

void usli_j_enter(usli_jinja *j) {
    if (++j->depth > MAX_DEPTH) usli_j_raise(j, "the template or its values nest deeper than %d levels", MAX_DEPTH);
}

static void new_block(usli_jinja *j, size_t size) {
    size_t room = size > 32768 ? size : 65536;
    if (size > j->limit - j->used) usli_j_raise(j, "the template wants more than %zu MiB of memory", j->limit >> 20);
    usli_jblock *b = usli_malloc(j->ctx, BLOCK_HEAD + room);
    if (!b) usli_j_throw(j, usli_nomem(j->ctx, BLOCK_HEAD + room));
    b->used = 0;
    b->size = room;
    j->used += room < j->limit - j->used ? room : j->limit - j->used;
    if (size > 32768 && j->blocks) { /* a block of its own: the current one still has room */
        b->next = j->blocks->next;
        j->blocks->next = b;
        b->used = room;
    } else {
        b->next = j->blocks;
        j->blocks = b;
    }
}

void *usli_j_alloc(usli_jinja *j, size_t size) {
    size = (size + 15) & ~(size_t)15;
    usli_jblock *b = j->blocks;
    if (!b || size > b->size - b->used) {
        new_block(j, size);
        if (size > 32768 && b) {
            void *own = (char *)j->blocks->next + BLOCK_HEAD;
            return memset(own, 0, size);
        }
        b = j->blocks;
    }
    void *p = (char *)b + BLOCK_HEAD + b->used;
    b->used += size;
    return memset(p, 0, size);
}

void *usli_j_grow(usli_jinja *j, void *items, size_t *cap, size_t need, size_t size) {
    if (need <= *cap) return items;
    size_t n = *cap ? *cap * 2 : 8;
    if (n < need) n = need;
    if (n > j->limit / size) usli_j_raise(j, "the template wants more than %zu MiB of memory", j->limit >> 20);
    void *fresh = usli_j_alloc(j, n * size);
    if (*cap) memcpy(fresh, items, *cap * size);
    *cap = n;
    return fresh;
}

void usli_j_free(usli_jinja *j) {
    for (usli_jblock *b = j->blocks, *after; b; b = after) {
        after = b->next;
        usli_free(j->ctx, b);
    }
}

/* ---- Makers ---- */

usli_jval usli_j_none(void) {
    return (usli_jval){ .type = J_NONE };
}

usli_jval usli_j_bool(bool b) {
    return (usli_jval){ .type = J_BOOL, .u.b = b };
}

usli_jval usli_j_int(int64_t i) {
    return (usli_jval){ .type = J_INT, .u.i = i };
}

usli_jval usli_j_float(double d) {
    return (usli_jval){ .type = J_FLOAT, .u.d = d };
}

usli_jstr *usli_j_new_str(usli_jinja *j, const char *p, size_t n) {
    usli_jstr *s = usli_j_alloc(j, sizeof *s);
    *s = (usli_jstr){ n ? p : "", n, NULL };
    return s;
}

usli_jval usli_j_text(usli_jinja *j, const char *p, size_t n) {
    return (usli_jval){ .type = J_STR, .u.s = usli_j_new_str(j, p, n) };
}

usli_jval usli_j_copy(usli_jinja *j, const char *p, size_t n) {
    char *copy = usli_j_alloc(j, n + 1);
    if (n) memcpy(copy, p, n);
    return usli_j_text(j, copy, n);
}

usli_jval usli_j_cstr(usli_jinja *j, const char *p) {
    return usli_j_text(j, p, strlen(p));
}

usli_jval usli_j_taken(usli_jinja *j, const usli_jout *o) {
    return usli_j_text(j, o->data, o->len);
}

usli_jval usli_j_join(usli_jinja *j, usli_jval a, usli_jval b) {
    const usli_jstr *x = a.u.s, *y = b.u.s;
    if (!y->n) return a;
    if (!x->n) return b;
    usli_j_step(j, y->n >> 6);
    usli_jroom *room = x->room;
    if (!room || room->used != x->n || room->cap - room->used < y->n) {
        size_t cap = (x->n + y->n) * 2;
        usli_j_step(j, x->n >> 6);
        room = usli_j_alloc(j, sizeof *room);
        char *data = usli_j_alloc(j, cap);
        memcpy(data, x->p, x->n);
        *room = (usli_jroom){ x->n, cap };
        x = usli_j_new_str(j, data, x->n);
    }
    memcpy((char *)(uintptr_t)x->p + x->n, y->p, y->n);
    room->used += y->n;
    usli_jval v = usli_j_text(j, x->p, x->n + y->n);
    v.u.s->room = room;
    return v;
}

usli_jval usli_j_undefined(usli_jinja *j, const char *fmt, ...) {
    char text[300];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    usli_jval v = usli_j_copy(j, text, n < 0 ? 0 : (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
    v.type = J_UNDEFINED;
    return v;
}

usli_jval usli_j_seq(usli_jinja *j, usli_jflavour flavour, size_t cap) {
    usli_jseq *q = usli_j_alloc(j, sizeof *q);
    q->flavour = flavour;
    if (cap) q->items = usli_j_grow(j, NULL, &q->cap, cap, sizeof *q->items);
    return (usli_jval){ .type = J_SEQ, .u.q = q };
}

void usli_j_push(usli_jinja *j, usli_jval seq, usli_jval item) {
    usli_jseq *q = seq.u.q;
    usli_j_step(j, 1);
    q->items = usli_j_grow(j, q->items, &q->cap, q->count + 1, sizeof *q->items);
    q->items[q->count++] = item;
}

usli_jval usli_j_dict(usli_jinja *j) {
    return (usli_jval){ .type = J_DICT, .u.m = usli_j_alloc(j, sizeof(usli_jdict)) };
}

/* ---- Dictionaries ---- */

static uint64_t hash_number(double d) {
    uint64_t bits;
    memcpy(&bits, &d, sizeof bits);
    return d == 0 ? 0 : bits * 0x9E3779B97F4A7C15u;
}

static uint64_t hash(usli_jinja *j, usli_jval v) {
    uint64_t h = 7;
    switch (v.type) {
    case J_STR: return usli_hash_bytes(v.u.s->p, v.u.s->n);
    case J_NONE:
    case J_UNDEFINED: return v.type;
    case J_BOOL:
    case J_INT:
    case J_FLOAT: return hash_number(usli_j_number(v));
    case J_FUNC:
    case J_NAMESPACE:
    case J_LOOP: return (uint64_t)(uintptr_t)v.u.f * 0x9E3779B97F4A7C15u;
    default: break;
    }
    if (v.type != J_SEQ || v.u.q->flavour != J_TUPLE) usli_j_raise(j, "unhashable type: '%s'", usli_j_type_name(v));
    usli_j_enter(j);
    for (size_t i = 0; i < v.u.q->count; i++) h = h * 31 + hash(j, v.u.q->items[i]);
    usli_j_leave(j);
    return h;
}

static size_t slot_of(usli_jinja *j, const usli_jdict *m, usli_jval key) {
    size_t mask = m->slot_count - 1, at = (size_t)(hash(j, key) >> 7) & mask;
    for (; m->slots[at]; at = (at + 1) & mask)
        if (usli_j_equal(j, m->keys[m->slots[at] - 1], key)) break;
    return at;
}

static void index_keys(usli_jinja *j, usli_jdict *m) {
    m->slot_count = 32;
    while (m->slot_count < m->cap * 2) m->slot_count *= 2;
    m->slots = usli_j_alloc(j, m->slot_count * sizeof *m->slots);
    for (size_t i = 0; i < m->count; i++) m->slots[slot_of(j, m, m->keys[i])] = (uint32_t)i + 1;
}

enum { SMALL_DICT = 8 };

const usli_jval *usli_jdict_get(usli_jinja *j, const usli_jdict *m, usli_jval key) {
    usli_j_step(j, 1);
    if (m->slots) {
        uint32_t at = m->slots[slot_of(j, m, key)];
        return at ? &m->values[at - 1] : NULL;
    }
    if (key.type == J_SEQ || key.type == J_DICT) hash(j, key); /* raises for what cannot be a key */
    for (size_t i = 0; i < m->count; i++)
        if (usli_j_equal(j, m->keys[i], key)) return &m->values[i];
    return NULL;
}

const usli_jval *usli_jdict_find(usli_jinja *j, const usli_jdict *m, const char *name) {
    usli_jstr s = { name, strlen(name), NULL };
    return usli_jdict_get(j, m, (usli_jval){ .type = J_STR, .u.s = &s });
}

void usli_jdict_set(usli_jinja *j, usli_jdict *m, usli_jval key, usli_jval value) {
    usli_jval *old = (usli_jval *)(uintptr_t)usli_jdict_get(j, m, key);
    if (old) {
        *old = value;
        return;
    }
    if (m->count == m->cap) {
        size_t cap = m->cap;
        m->keys = usli_j_grow(j, m->keys, &cap, m->count + 1, sizeof *m->keys);
        m->values = usli_j_grow(j, m->values, &m->cap, m->count + 1, sizeof *m->values);
        m->slots = NULL;
    }
    m->keys[m->count] = key;
    m->values[m->count++] = value;
    if (m->slots)
        m->slots[slot_of(j, m, key)] = (uint32_t)m->count;
    else if (m->count > SMALL_DICT)
        index_keys(j, m);
}

/* ---- Questions ---- */

const char *usli_j_type_name(usli_jval v) {
    static const char *const FLAVOURS[] = { "list",        "tuple",      "range",    "dict_keys",
                                            "dict_values", "dict_items", "generator" };
    static const char *const NAMES[] = { "absent", "Undefined", "NoneType", "bool",      "int",         "float",
                                         "str",    "list",      "dict",     "Namespace", "LoopContext", "function" };
    if (v.type == J_STR && v.markup) return "Markup";
    return v.type == J_SEQ ? FLAVOURS[v.u.q->flavour] : NAMES[v.type];
}

const char *usli_j_object(usli_jval v) {
    static const char *const NAMES[] = {
        "",           "Undefined object", "None",        "bool object",      "int object",         "float object",
        "str object", "list object",      "dict object", "Namespace object", "LoopContext object", "function object"
    };
    return v.type == J_SEQ && v.u.q->flavour != J_LIST ? usli_j_type_name(v) : NAMES[v.type];
}

bool usli_j_is_number(usli_jval v) {
    return v.type == J_INT || v.type == J_FLOAT || v.type == J_BOOL;
}

double usli_j_number(usli_jval v) {
    return v.type == J_FLOAT ? v.u.d : v.type == J_BOOL ? (double)v.u.b : (double)v.u.i;
}

bool usli_j_is_text(usli_jval v, const char *text) {
    size_t n = strlen(text);
    return v.type == J_STR && v.u.s->n == n && memcmp(v.u.s->p, text, n) == 0;
}

void usli_j_defined(usli_jinja *j, usli_jval v) {
    if (v.type == J_UNDEFINED) usli_j_raise(j, "%.*s", (int)v.u.s->n, v.u.s->p);
}

int64_t usli_j_want_int(usli_jinja *j, usli_jval v, const char *what) {
    usli_j_defined(j, v);
    if (v.type == J_BOOL) return v.u.b;
    if (v.type != J_INT) usli_j_raise(j, "%s must be an integer, not %s", what, usli_j_type_name(v));
    return v.u.i;
}

usli_jstr *usli_j_want_str(usli_jinja *j, usli_jval v, const char *what) {
    usli_j_defined(j, v);
    if (v.type != J_STR) usli_j_raise(j, "%s must be str, not %s", what, usli_j_type_name(v));
    return v.u.s;
}

bool usli_j_truth(usli_jinja *j, usli_jval v) {
    (void)j;
    switch (v.type) {
    case J_ABSENT:
    case J_UNDEFINED:
    case J_NONE: return false;
    case J_BOOL: return v.u.b;
    case J_INT: return v.u.i != 0;
    case J_FLOAT: return v.u.d != 0;
    case J_STR: return v.u.s->n != 0;
    case J_SEQ: return v.u.q->count != 0 || v.u.q->flavour == J_GENERATOR;
    case J_DICT: return v.u.m->count != 0;
    default: return true;
    }
}

static bool equal_seqs(usli_jinja *j, const usli_jseq *a, const usli_jseq *b) {
    if (a == b) return true;
    if (a->flavour != b->flavour || a->count != b->count || a->flavour == J_GENERATOR || a->flavour == J_VALUES)
        return false;
    for (size_t i = 0; i < a->count; i++)
        if (!usli_j_equal(j, a->items[i], b->items[i])) return false;
    return true;
}

static bool equal_dicts(usli_jinja *j, const usli_jdict *a, const usli_jdict *b) {
    if (a == b) return true;
    if (a->count != b->count) return false;
    for (size_t i = 0; i < a->count; i++) {
        const usli_jval *other = usli_jdict_get(j, b, a->keys[i]);
        if (!other || !usli_j_equal(j, a->values[i], *other)) return false;
    }
    return true;
}

bool usli_j_equal(usli_jinja *j, usli_jval a, usli_jval b) {
    usli_j_step(j, 1);
    if (usli_j_is_number(a) && usli_j_is_number(b)) {
        if (a.type != J_FLOAT && b.type != J_FLOAT) return usli_j_want_int(j, a, "") == usli_j_want_int(j, b, "");
        return usli_j_number(a) == usli_j_number(b);
    }
    if (a.type != b.type) return false;
    bool same = false;
    usli_j_enter(j);
    switch (a.type) {
    case J_ABSENT:
    case J_UNDEFINED:
    case J_NONE: same = true; break;
    case J_STR:
        usli_j_step(j, a.u.s->n >> 8);
        same = a.u.s->n == b.u.s->n && memcmp(a.u.s->p, b.u.s->p, a.u.s->n) == 0;
        break;
    case J_SEQ: same = equal_seqs(j, a.u.q, b.u.q); break;
    case J_DICT: same = equal_dicts(j, a.u.m, b.u.m); break;
    default: same = a.u.f == b.u.f; break;
    }
    usli_j_leave(j);
    return same;
}

static int sign(double d) {
    return d < 0 ? -1 : d > 0;
}

int usli_j_compare(usli_jinja *j, usli_jval a, usli_jval b, const char *op) {
    usli_j_step(j, 1);
    usli_j_defined(j, a);
    usli_j_defined(j, b);
    if (usli_j_is_number(a) && usli_j_is_number(b)) {
        if (a.type == J_FLOAT || b.type == J_FLOAT) return sign(usli_j_number(a) - usli_j_number(b));
        int64_t x = usli_j_want_int(j, a, ""), y = usli_j_want_int(j, b, "");
        return x < y ? -1 : x > y;
    }
    if (a.type == J_STR && b.type == J_STR) {
        size_t n = a.u.s->n < b.u.s->n ? a.u.s->n : b.u.s->n;
        int c = n ? memcmp(a.u.s->p, b.u.s->p, n) : 0;
        usli_j_step(j, n >> 8);
        return c ? c : a.u.s->n < b.u.s->n ? -1 : a.u.s->n > b.u.s->n;
    }
    if (a.type == J_SEQ && b.type == J_SEQ && a.u.q->flavour == b.u.q->flavour && a.u.q->flavour <= J_TUPLE) {
        const usli_jseq *x = a.u.q, *y = b.u.q;
        for (size_t i = 0; i < x->count && i < y->count; i++) {
            if (usli_j_equal(j, x->items[i], y->items[i])) continue;
            usli_j_enter(j);
            int c = usli_j_compare(j, x->items[i], y->items[i], op);
            usli_j_leave(j);
            return c;
        }
        return x->count < y->count ? -1 : x->count > y->count;
    }
    usli_j_raise(j, "'%s' not supported between instances of '%s' and '%s'", op, usli_j_type_name(a),
                 usli_j_type_name(b));
}

bool usli_j_contains(usli_jinja *j, usli_jval box, usli_jval item) {
    if (box.type == J_STR) {
        if (item.type != J_STR) {
            usli_j_defined(j, item);
            usli_j_raise(j, "'in <string>' requires string as left operand, not %s", usli_j_type_name(item));
        }
        return usli_j_search(j, box.u.s, item.u.s, 0) != SIZE_MAX;
    }
    if (box.type == J_DICT) return usli_jdict_get(j, box.u.m, item) != NULL;
    if (box.type != J_SEQ && box.type != J_UNDEFINED && box.type != J_LOOP)
        usli_j_raise(j, "argument of type '%s' is not iterable", usli_j_type_name(box));
    const usli_jseq *q = usli_j_iterate(j, box);
    for (size_t i = 0; i < q->count; i++)
        if (usli_j_equal(j, q->items[i], item)) return true;
    return false;
}

usli_jseq *usli_j_iterate(usli_jinja *j, usli_jval v) {
    usli_jval out;
    switch (v.type) {
    case J_SEQ:
        if (v.u.q->flavour != J_GENERATOR) return v.u.q;
        out = usli_j_seq(j, J_LIST, 0);
        if (!v.u.q->spent) *out.u.q = *v.u.q;
        out.u.q->flavour = J_LIST;
        v.u.q->spent = true;
        return out.u.q;
    case J_UNDEFINED: return usli_j_seq(j, J_LIST, 0).u.q;
    case J_STR:
        out = usli_j_seq(j, J_LIST, 0);
        for (size_t i = 0, n; i < v.u.s->n; i += n) {
            n = usli_utf8_step(v.u.s->p[i]);
            usli_j_push(j, out, usli_j_text(j, v.u.s->p + i, n));
        }
        return out.u.q;
    case J_DICT:
        out = usli_j_seq(j, J_LIST, v.u.m->count);
        for (size_t i = 0; i < v.u.m->count; i++) usli_j_push(j, out, v.u.m->keys[i]);
        return out.u.q;
    default: usli_j_raise(j, "'%s' object is not iterable", usli_j_type_name(v));
    }
}

int64_t usli_j_length(usli_jinja *j, usli_jval v) {
    switch (v.type) {
    case J_UNDEFINED: return 0;
    case J_STR: return (int64_t)usli_j_chars(j, v.u.s);
    case J_DICT: return (int64_t)v.u.m->count;
    case J_LOOP: return (int64_t)v.u.loop->items->count;
    case J_SEQ:
        if (v.u.q->flavour != J_GENERATOR) return (int64_t)v.u.q->count;
        break;
    default: break;
    }
    usli_j_raise(j, "object of type '%s' has no len()", usli_j_type_name(v));
}

/* ---- Text of values ---- */

void usli_j_put(usli_jinja *j, usli_jout *o, const char *p, size_t n) {
    if (!n) return;
    usli_j_step(j, n >> 6);
    o->data = usli_j_grow(j, o->data, &o->cap, o->len + n, 1);
    memcpy(o->data + o->len, p, n);
    o->len += n;
}

void usli_j_puts(usli_jinja *j, usli_jout *o, const char *p) {
    usli_j_put(j, o, p, strlen(p));
}

static void put_quoted(usli_jinja *j, usli_jout *o, const usli_jstr *s) {
    char quote = memchr(s->p, '\'', s->n) && !memchr(s->p, '"', s->n) ? '"' : '\'';
    char escape[16];
    usli_j_put(j, o, &quote, 1);
    for (size_t i = 0, n; i < s->n; i += n) {
        n = usli_utf8_step(s->p[i]);
        int32_t code = usli_utf8_get(s->p + i);
        const char *letter = code == '\n'   ? "\\n"
                             : code == '\r' ? "\\r"
                             : code == '\t' ? "\\t"
                             : code == '\\' ? "\\\\"
                                            : NULL;
        if (letter) {
            usli_j_puts(j, o, letter);
        } else if (code == quote) {
            usli_j_put(j, o, "\\'", 2);
        } else if (usli_j_printable(code)) {
            usli_j_put(j, o, s->p + i, n);
        } else {
            const char *form = code < 0x100 ? "\\x%02x" : code < 0x10000 ? "\\u%04x" : "\\U%08x";
            snprintf(escape, sizeof escape, form, (unsigned)code);
            usli_j_puts(j, o, escape);
        }
    }
    usli_j_put(j, o, &quote, 1);
}

static void put_number(usli_jinja *j, usli_jout *o, usli_jval v) {
    char text[USLI_NUMBER_TEXT];
    if (v.type == J_INT)
        snprintf(text, sizeof text, "%lld", (long long)v.u.i);
    else if (!isfinite(v.u.d))
        snprintf(text, sizeof text, "%s", isnan(v.u.d) ? "nan" : v.u.d < 0 ? "-inf" : "inf");
    else
        usli_number_text(v.u.d, text);
    usli_j_puts(j, o, text);
}

static void put_items(usli_jinja *j, usli_jout *o, const usli_jval *items, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (i) usli_j_put(j, o, ", ", 2);
        usli_j_put_repr(j, o, items[i]);
    }
}

static void put_seq(usli_jinja *j, usli_jout *o, const usli_jseq *q) {
    char text[64];
    switch (q->flavour) {
    case J_GENERATOR: usli_j_puts(j, o, "<generator object>"); return;
    case J_RANGE:
        snprintf(text, sizeof text, "range(%lld, %lld)", (long long)(q->count ? q->items[0].u.i : 0),
                 (long long)(q->count ? q->items[q->count - 1].u.i + 1 : 0));
        usli_j_puts(j, o, text);
        return;
    case J_TUPLE:
        usli_j_put(j, o, "(", 1);
        put_items(j, o, q->items, q->count);
        usli_j_puts(j, o, q->count == 1 ? ",)" : ")");
        return;
    default: break;
    }
    usli_jval self = { .type = J_SEQ, .u.q = (usli_jseq *)(uintptr_t)q };
    if (q->flavour != J_LIST) {
        usli_j_puts(j, o, usli_j_type_name(self));
        usli_j_put(j, o, "(", 1);
    }
    usli_j_put(j, o, "[", 1);
    put_items(j, o, q->items, q->count);
    usli_j_puts(j, o, q->flavour == J_LIST ? "]" : "])");
}

static void put_dict(usli_jinja *j, usli_jout *o, const usli_jdict *m) {
    usli_j_put(j, o, "{", 1);
    for (size_t i = 0; i < m->count; i++) {
        if (i) usli_j_put(j, o, ", ", 2);
        usli_j_put_repr(j, o, m->keys[i]);
        usli_j_put(j, o, ": ", 2);
        usli_j_put_repr(j, o, m->values[i]);
    }
    usli_j_put(j, o, "}", 1);
}

void usli_j_put_repr(usli_jinja *j, usli_jout *o, usli_jval v) {
    usli_j_enter(j);
    usli_j_step(j, 1);
    switch (v.type) {
    case J_ABSENT:
    case J_UNDEFINED: usli_j_puts(j, o, "Undefined"); break;
    case J_NONE: usli_j_puts(j, o, "None"); break;
    case J_BOOL: usli_j_puts(j, o, v.u.b ? "True" : "False"); break;
    case J_INT:
    case J_FLOAT: put_number(j, o, v); break;
    case J_STR:
        if (v.markup) usli_j_puts(j, o, "Markup(");
        put_quoted(j, o, v.u.s);
        if (v.markup) usli_j_puts(j, o, ")");
        break;
    case J_SEQ: put_seq(j, o, v.u.q); break;
    case J_DICT: put_dict(j, o, v.u.m); break;
    case J_NAMESPACE:
        usli_j_puts(j, o, "<Namespace ");
        put_dict(j, o, v.u.m);
        usli_j_puts(j, o, ">");
        break;
    case J_LOOP: usli_j_puts(j, o, "<LoopContext>"); break;
    case J_FUNC:
        usli_j_puts(j, o, v.u.f->macro ? "<Macro '" : "<function ");
        if (v.u.f->macro)
            usli_j_put(j, o, v.u.f->macro->text->p, v.u.f->macro->text->n);
        else
            usli_j_puts(j, o, v.u.f->row->name);
        usli_j_puts(j, o, v.u.f->macro ? "'>" : ">");
        break;
    }
    usli_j_leave(j);
}

void usli_j_put_str(usli_jinja *j, usli_jout *o, usli_jval v) {
    if (v.type == J_STR)
        usli_j_put(j, o, v.u.s->p, v.u.s->n);
    else if (v.type != J_UNDEFINED)
        usli_j_put_repr(j, o, v);
}

usli_jval usli_j_str(usli_jinja *j, usli_jval v) {
    if (v.type == J_STR) return v;
    usli_jout o = { 0 };
    usli_j_put_str(j, &o, v);
    return usli_j_taken(j, &o);
}
