/* A template at work: expressions, statements, loops, macros. */
#include <math.h>
#include <string.h>

#include "core/text/jinja_parts.h"

typedef enum flow { GO_ON, BREAK, CONTINUE } flow;

static usli_jval eval(usli_jinja *j, usli_jenv *e, const usli_jnode *n);
static flow exec(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jout *o);

/* ---- Names ---- */

static usli_jenv *new_env(usli_jinja *j, usli_jenv *parent) {
    usli_jenv *e = usli_j_alloc(j, sizeof *e);
    e->parent = parent;
    return e;
}

static void set_var(usli_jinja *j, usli_jenv *e, usli_jstr *name, usli_jval v) {
    usli_jdict_set(j, &e->vars, (usli_jval){ .type = J_STR, .u.s = name }, v);
}

static usli_jval look_up(usli_jinja *j, const usli_jenv *e, usli_jstr *name) {
    usli_jval key = { .type = J_STR, .u.s = name };
    for (; e; e = e->parent) {
        const usli_jval *v = usli_jdict_get(j, &e->vars, key);
        if (v) return *v;
    }
    return usli_j_undefined(j, "'%.*s' is undefined", (int)(name->n < 200 ? name->n : 200), name->p);
}

/* ---- Members ---- */

static usli_jval method(usli_jinja *j, const usli_jrow *row, usli_jval self) {
    usli_jfunc *f = usli_j_alloc(j, sizeof *f);
    f->row = row;
    f->self = self;
    return (usli_jval){ .type = J_FUNC, .u.f = f };
}

static usli_jval loop_member(usli_jinja *j, const usli_jloop *l, usli_jval name) {
    size_t n = l->items->count;
    const struct {
        const char *name;
        int64_t value;
    } NUMBERS[] = { { "index", (int64_t)l->at + 1 },
                    { "index0", (int64_t)l->at },
                    { "revindex", (int64_t)(n - l->at) },
                    { "revindex0", (int64_t)(n - l->at) - 1 },
                    { "length", (int64_t)n },
                    { "depth", l->depth + 1 },
                    { "depth0", l->depth } };
    for (size_t i = 0; i < sizeof NUMBERS / sizeof *NUMBERS; i++)
        if (usli_j_is_text(name, NUMBERS[i].name)) return usli_j_int(NUMBERS[i].value);
    if (usli_j_is_text(name, "first")) return usli_j_bool(l->at == 0);
    if (usli_j_is_text(name, "last")) return usli_j_bool(l->at + 1 == n);
    if (usli_j_is_text(name, "previtem"))
        return l->at ? l->items->items[l->at - 1] : usli_j_undefined(j, "there is no previous item");
    if (usli_j_is_text(name, "nextitem"))
        return l->at + 1 < n ? l->items->items[l->at + 1] : usli_j_undefined(j, "there is no next item");
    return (usli_jval){ .type = J_ABSENT };
}

/* What Python's getattr finds; J_ABSENT: nothing. */
static usli_jval attribute(usli_jinja *j, usli_jval v, usli_jval name) {
    bool unsafe = false;
    const usli_jrow *row = usli_j_method(v, name.u.s, &unsafe);
    if (unsafe)
        return usli_j_undefined(j, "access to attribute '%.*s' of '%s' object is unsafe", (int)name.u.s->n, name.u.s->p,
                                usli_j_type_name(v));
    if (row) return method(j, row, v);
    if (v.type == J_LOOP) return loop_member(j, v.u.loop, name);
    if (v.type == J_SEQ && v.u.q->group && usli_j_is_text(name, "grouper")) return v.u.q->items[0];
    if (v.type == J_SEQ && v.u.q->group && usli_j_is_text(name, "list")) return v.u.q->items[1];
    const usli_jval *member = v.type == J_NAMESPACE ? usli_jdict_get(j, v.u.m, name) : NULL;
    return member ? *member : (usli_jval){ .type = J_ABSENT };
}

static usli_jval no_member(usli_jinja *j, usli_jval v, usli_jval key) {
    if (key.type == J_STR)
        return usli_j_undefined(j, "'%s' has no attribute '%.*s'", usli_j_object(v),
                                (int)(key.u.s->n < 200 ? key.u.s->n : 200), key.u.s->p);
    usli_jout o = { 0 };
    usli_j_put_repr(j, &o, key);
    return usli_j_undefined(j, "%s has no element %.*s", usli_j_object(v), (int)(o.len < 200 ? o.len : 200), o.data);
}

static usli_jval subscript(usli_jinja *j, usli_jval v, usli_jval key) {
    usli_jval absent = { .type = J_ABSENT };
    if (v.type == J_DICT) {
        if (key.type == J_DICT || (key.type == J_SEQ && key.u.q->flavour != J_TUPLE)) return absent;
        const usli_jval *item = usli_jdict_get(j, v.u.m, key);
        return item ? *item : absent;
    }
    if (key.type != J_INT && key.type != J_BOOL) return absent;
    int64_t i = usli_j_want_int(j, key, "");
    if (v.type == J_SEQ && v.u.q->flavour <= J_RANGE) {
        int64_t n = (int64_t)v.u.q->count;
        if (i < 0) i += n;
        return i >= 0 && i < n ? v.u.q->items[i] : absent;
    }
    if (v.type != J_STR) return absent;
    int64_t n = (int64_t)usli_j_chars(j, v.u.s);
    if (i < 0) i += n;
    if (i < 0 || i >= n) return absent;
    size_t at = usli_j_offset(v.u.s, (size_t)i);
    usli_jstr rest = { v.u.s->p + at, v.u.s->n - at, NULL };
    return usli_j_text(j, rest.p, usli_j_offset(&rest, 1));
}

usli_jval usli_j_attr(usli_jinja *j, usli_jval v, usli_jval name) {
    usli_j_defined(j, v);
    usli_jval found = attribute(j, v, name);
    if (found.type == J_ABSENT) found = subscript(j, v, name);
    return found.type == J_ABSENT ? no_member(j, v, name) : found;
}

usli_jval usli_j_item(usli_jinja *j, usli_jval v, usli_jval key) {
    usli_j_defined(j, v);
    usli_jval found = subscript(j, v, key);
    if (found.type == J_ABSENT && key.type == J_STR) found = attribute(j, v, key);
    return found.type == J_ABSENT ? no_member(j, v, key) : found;
}

static int64_t slice_part(usli_jinja *j, usli_jenv *e, const usli_jnode *n, int64_t absent) {
    if (!n) return absent;
    usli_jval v = eval(j, e, n);
    return v.type == J_NONE ? absent : usli_j_want_int(j, v, "a slice's index");
}

static int64_t clamp(int64_t i, int64_t n, int64_t low, int64_t high) {
    if (i < 0) i = i < -n ? low : i + n;
    return i < low ? low : i > high ? high : i;
}

static usli_jval slice(usli_jinja *j, usli_jenv *e, usli_jval v, const usli_jnode *n) {
    if (v.type == J_UNDEFINED) usli_j_defined(j, v);
    if (v.type != J_STR && (v.type != J_SEQ || v.u.q->flavour > J_RANGE))
        return no_member(j, v, usli_j_cstr(j, "slice"));
    const usli_jseq *q = usli_j_iterate(j, v);
    int64_t count = (int64_t)q->count, step = slice_part(j, e, n->c, 1), edge = step < 0 ? -1 : 0;
    if (step == 0) usli_j_raise(j, "slice step cannot be zero");
    int64_t start = slice_part(j, e, n->a, INT64_MAX), stop = slice_part(j, e, n->b, INT64_MAX);
    bool from_end = !n->b || stop == INT64_MAX;
    start = start == INT64_MAX ? (step < 0 ? count - 1 : 0) : clamp(start, count, edge, count + edge);
    stop = from_end ? (step < 0 ? -1 : count) : clamp(stop, count, edge, count + edge);
    usli_jval out = usli_j_seq(j, v.type == J_SEQ ? v.u.q->flavour : J_LIST, 0);
    usli_jout text = { 0 };
    for (int64_t i = start; step > 0 ? i < stop : i > stop; i += step) {
        if (v.type == J_SEQ)
            usli_j_push(j, out, q->items[i]);
        else
            usli_j_put(j, &text, q->items[i].u.s->p, q->items[i].u.s->n);
        if (step > count || step < -count) break;
    }
    if (v.type == J_SEQ) return out;
    out = usli_j_taken(j, &text);
    out.markup = v.markup;
    return out;
}

/* ---- Arithmetic ---- */

_Noreturn static void no_operation(usli_jinja *j, const char *op, usli_jval a, usli_jval b) {
    usli_j_defined(j, a);
    usli_j_defined(j, b);
    if (a.type == J_STR && strcmp(op, "+") == 0)
        usli_j_raise(j, "can only concatenate str (not \"%s\") to str", usli_j_type_name(b));
    usli_j_raise(j, "unsupported operand type(s) for %s: '%s' and '%s'", op, usli_j_type_name(a), usli_j_type_name(b));
}

static usli_jval repeat(usli_jinja *j, usli_jval what, int64_t times) {
    usli_jval out = usli_j_seq(j, what.type == J_SEQ ? what.u.q->flavour : J_LIST, 0);
    usli_jout text = { 0 };
    for (int64_t i = 0; i < times; i++) {
        usli_j_step(j, 1);
        if (what.type == J_STR) {
            if (!what.u.s->n) break;
            usli_j_put(j, &text, what.u.s->p, what.u.s->n);
        }
        for (size_t k = 0; what.type == J_SEQ && k < what.u.q->count; k++) usli_j_push(j, out, what.u.q->items[k]);
    }
    if (what.type == J_SEQ) return out;
    out = usli_j_taken(j, &text);
    out.markup = what.markup;
    return out;
}

static double floor_mod(double a, double b) {
    double m = fmod(a, b);
    return m != 0 && (m < 0) != (b < 0) ? m + b : m;
}

static usli_jval real_operation(usli_jinja *j, int op, double a, double b) {
    if (b == 0 && (op == '/' || op == '%' || op == J_OP2('/', '/'))) usli_j_raise(j, "division by zero");
    switch (op) {
    case '+': return usli_j_float(a + b);
    case '-': return usli_j_float(a - b);
    case '*': return usli_j_float(a * b);
    case '/': return usli_j_float(a / b);
    case '%': return usli_j_float(floor_mod(a, b));
    case J_OP2('/', '/'): return usli_j_float(floor((a - floor_mod(a, b)) / b + 0.5));
    default: return usli_j_float(pow(a, b));
    }
}

_Noreturn static void overflow(usli_jinja *j) {
    usli_j_raise(j, "an integer grows beyond 64 bits");
}

static usli_jval whole_power(usli_jinja *j, int64_t a, int64_t b) {
    int64_t v = 1;
    if (b < 0) return usli_j_float(pow((double)a, (double)b));
    for (; b > 0; b--) {
        if (a == 0 || a == 1) return usli_j_int(a);
        if (a == -1) return usli_j_int(b % 2 ? -v : v);
        if (v > INT64_MAX / (a < 0 ? -a : a) || v < -INT64_MAX / (a < 0 ? -a : a)) overflow(j);
        v *= a;
    }
    return usli_j_int(v);
}

static usli_jval whole_operation(usli_jinja *j, int op, int64_t a, int64_t b) {
    if (b == 0 && (op == '/' || op == '%' || op == J_OP2('/', '/'))) usli_j_raise(j, "division by zero");
    if (a == INT64_MIN || b == INT64_MIN) overflow(j);
    int64_t size = b < 0 ? -b : b, m;
    switch (op) {
    case '-': b = -b; /* fall through */
    case '+':
        if (b > 0 ? a > INT64_MAX - b : a < -INT64_MAX - b) overflow(j);
        return usli_j_int(a + b);
    case '*':
        if (size && (a < 0 ? -a : a) > INT64_MAX / size) overflow(j);
        return usli_j_int(a * b);
    case '/': return usli_j_float((double)a / (double)b);
    case '%':
    case J_OP2('/', '/'):
        m = a % b;
        if (m != 0 && (m < 0) != (b < 0)) m += b;
        return usli_j_int(op == '%' ? m : (a - m) / b);
    default: return whole_power(j, a, b);
    }
}

static usli_jval add_texts(usli_jinja *j, usli_jval a, usli_jval b) {
    bool markup = a.markup || b.markup;
    if (markup && !a.markup) a = usli_j_escape(j, a);
    if (markup && !b.markup) b = usli_j_escape(j, b);
    usli_jval v = usli_j_join(j, a, b);
    v.markup = markup;
    return v;
}

static bool is_list(usli_jval v) {
    return v.type == J_SEQ && v.u.q->flavour <= J_TUPLE;
}

usli_jval usli_j_binary(usli_jinja *j, int op, usli_jval a, usli_jval b) {
    if (usli_j_is_number(a) && usli_j_is_number(b)) {
        if (a.type == J_FLOAT || b.type == J_FLOAT) return real_operation(j, op, usli_j_number(a), usli_j_number(b));
        return whole_operation(j, op, usli_j_want_int(j, a, ""), usli_j_want_int(j, b, ""));
    }
    if (op == '+' && a.type == J_STR && b.type == J_STR) return add_texts(j, a, b);
    if (op == '+' && is_list(a) && is_list(b) && a.u.q->flavour == b.u.q->flavour) {
        usli_jval out = usli_j_seq(j, a.u.q->flavour, a.u.q->count + b.u.q->count);
        for (size_t i = 0; i < a.u.q->count; i++) usli_j_push(j, out, a.u.q->items[i]);
        for (size_t i = 0; i < b.u.q->count; i++) usli_j_push(j, out, b.u.q->items[i]);
        return out;
    }
    if (op == '*' && (a.type == J_INT || a.type == J_BOOL) && (b.type == J_STR || is_list(b)))
        return repeat(j, b, usli_j_want_int(j, a, ""));
    if (op == '*' && (b.type == J_INT || b.type == J_BOOL) && (a.type == J_STR || is_list(a)))
        return repeat(j, a, usli_j_want_int(j, b, ""));
    if (op == '%' && a.type == J_STR) return usli_j_format(j, a, b);
    char name[3] = { (char)(op & 255), (char)(op >> 8), 0 };
    no_operation(j, name, a, b);
}

static bool compare(usli_jinja *j, int op, usli_jval a, usli_jval b) {
    switch (op) {
    case J_OP2('=', '='): return usli_j_equal(j, a, b);
    case J_OP2('!', '='): return !usli_j_equal(j, a, b);
    case 'i': return usli_j_contains(j, b, a);
    case 'n': return !usli_j_contains(j, b, a);
    case '<': return usli_j_compare(j, a, b, "<") < 0;
    case '>': return usli_j_compare(j, a, b, ">") > 0;
    case J_OP2('<', '='): return usli_j_compare(j, a, b, "<=") <= 0;
    default: return usli_j_compare(j, a, b, ">=") >= 0;
    }
}

/* ---- Calls ---- */

static void push_arg(usli_jinja *j, usli_jargs *args, usli_jval v) {
    usli_jval list = usli_j_seq(j, J_LIST, 0);
    *list.u.q = (usli_jseq){ args->items, args->count, args->count, J_LIST, false, false };
    usli_j_push(j, list, v);
    args->items = list.u.q->items;
    args->count = list.u.q->count;
}

static usli_jargs arguments(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jargs args = { 0 };
    for (; n; n = n->next) {
        usli_jval v = eval(j, e, n->a);
        if (n->op == '*') {
            const usli_jseq *q = usli_j_iterate(j, v);
            for (size_t i = 0; i < q->count; i++) push_arg(j, &args, q->items[i]);
        } else if (n->op) {
            if (v.type != J_DICT) usli_j_raise(j, "the value behind ** must be a mapping, not %s", usli_j_type_name(v));
            for (size_t i = 0; i < v.u.m->count; i++) usli_jdict_set(j, &args.named, v.u.m->keys[i], v.u.m->values[i]);
        } else if (n->text) {
            usli_jval key = { .type = J_STR, .u.s = n->text };
            if (usli_jdict_get(j, &args.named, key))
                usli_j_raise(j, "keyword argument repeated: %.*s", (int)n->text->n, n->text->p);
            usli_jdict_set(j, &args.named, key, v);
        } else {
            push_arg(j, &args, v);
        }
    }
    return args;
}

/* Puts arguments where a row's parameters want them. */
static void bind(usli_jinja *j, const usli_jrow *row, const usli_jargs *args, usli_jval *slots, const char *what) {
    size_t count = 0, named = 0;
    for (const char *p = row->params; *p; count++) {
        size_t n = strcspn(p, "=,");
        usli_jstr name = { p, n, NULL };
        bool optional = p[n] == '=';
        const usli_jval *v = usli_jdict_get(j, &args->named, (usli_jval){ .type = J_STR, .u.s = &name });
        slots[count] = (usli_jval){ .type = J_ABSENT };
        if (count < args->count)
            slots[count] = args->items[count];
        else if (v)
            slots[count] = *v;
        else if (!optional)
            usli_j_raise(j, "%s%s() misses its argument '%.*s'", what, row->name, (int)n, p);
        if (v) named++;
        if (v && count < args->count) usli_j_raise(j, "%s%s() got '%.*s' twice", what, row->name, (int)n, p);
        p += n + optional;
        if (*p == ',') p++;
    }
    if (args->count > count)
        usli_j_raise(j, "%s%s() takes at most %zu arguments, not %zu", what, row->name, count, args->count);
    if (named < args->named.count)
        usli_j_raise(j, "%s%s() got an argument whose name it does not know", what, row->name);
}

usli_jval usli_j_call_row(usli_jinja *j, const usli_jrow *row, usli_jval self, const usli_jargs *args,
                          const char *what) {
    usli_jval slots[J_MAX_PARAMS];
    usli_j_step(j, 1);
    if (strcmp(row->params, "*") != 0) bind(j, row, args, slots, what);
    return row->call(j, self, slots, args);
}

static usli_jval capture(usli_jinja *j, usli_jenv *e, const usli_jnode *body) {
    usli_jout o = { 0 };
    exec(j, e, body, &o);
    return usli_j_taken(j, &o);
}

static usli_jval take_named(usli_jinja *j, const usli_jargs *args, usli_jstr *name, size_t *used) {
    const usli_jval *v = usli_jdict_get(j, &args->named, (usli_jval){ .type = J_STR, .u.s = name });
    if (!v) return (usli_jval){ .type = J_ABSENT };
    ++*used;
    return *v;
}

static void bind_macro(usli_jinja *j, const usli_jnode *m, usli_jenv *e, const usli_jargs *args) {
    size_t i = 0, used = 0;
    for (const usli_jnode *p = m->kids; p; p = p->next, i++) {
        usli_jval v = i < args->count ? args->items[i] : take_named(j, args, p->text, &used);
        if (v.type == J_ABSENT)
            v = p->a ? eval(j, e, p->a)
                     : usli_j_undefined(j, "parameter '%.*s' was not provided", (int)p->text->n, p->text->p);
        set_var(j, e, p->text, v);
    }
    usli_jval rest = usli_j_seq(j, J_TUPLE, 0), named = usli_j_dict(j);
    if (i < args->count && !(m->op & J_USES_VARARGS))
        usli_j_raise(j, "macro '%.*s' takes not more than %zu argument(s)", (int)m->text->n, m->text->p, i);
    for (; i < args->count; i++) usli_j_push(j, rest, args->items[i]);
    usli_jstr caller = { "caller", 6, NULL };
    if (m->op & J_USES_CALLER) {
        usli_jval v = take_named(j, args, &caller, &used);
        usli_jstr *name = usli_j_new_str(j, "caller", 6);
        set_var(j, e, name, v.type == J_ABSENT ? usli_j_undefined(j, "no caller defined") : v);
    }
    if (m->op & J_USES_VARARGS) set_var(j, e, usli_j_new_str(j, "varargs", 7), rest);
    for (size_t k = 0; k < args->named.count; k++) {
        bool known = usli_j_is_text(args->named.keys[k], "caller") && (m->op & J_USES_CALLER);
        for (const usli_jnode *p = m->kids; p && !known; p = p->next)
            known = usli_j_equal(j, args->named.keys[k], (usli_jval){ .type = J_STR, .u.s = p->text });
        if (known) continue;
        if (!(m->op & J_USES_KWARGS))
            usli_j_raise(j, "macro '%.*s' takes no keyword argument '%.*s'", (int)m->text->n, m->text->p,
                         (int)args->named.keys[k].u.s->n, args->named.keys[k].u.s->p);
        usli_jdict_set(j, named.u.m, args->named.keys[k], args->named.values[k]);
    }
    if (m->op & J_USES_KWARGS) set_var(j, e, usli_j_new_str(j, "kwargs", 6), named);
}

static flow loop_over(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jval over, int depth, usli_jout *o);

usli_jval usli_j_call(usli_jinja *j, usli_jval f, const usli_jargs *args) {
    usli_j_defined(j, f);
    if (f.type == J_LOOP) {
        if (!f.u.loop->node->op)
            usli_j_raise(j, "the loop is not recursive: write 'recursive' behind what it goes over");
        if (args->count != 1) usli_j_raise(j, "loop() takes one argument");
        usli_jout o = { 0 };
        usli_j_enter(j);
        loop_over(j, f.u.loop->outer, f.u.loop->node, args->items[0], f.u.loop->depth + 1, &o);
        usli_j_leave(j);
        return usli_j_taken(j, &o);
    }
    if (f.type != J_FUNC) usli_j_raise(j, "'%s' object is not callable", usli_j_type_name(f));
    usli_jfunc *fn = f.u.f;
    if (fn->row) return usli_j_call_row(j, fn->row, fn->self.type == J_ABSENT ? f : fn->self, args, "");
    usli_jenv *e = new_env(j, fn->env);
    usli_j_enter(j);
    bind_macro(j, fn->macro, e, args);
    usli_jval text = capture(j, e, fn->macro->body);
    usli_j_leave(j);
    return text;
}

static usli_jval new_macro(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jfunc *f = usli_j_alloc(j, sizeof *f);
    f->macro = n;
    f->env = e;
    for (usli_jenv *up = e; up && !up->captured; up = up->parent) up->captured = true;
    return (usli_jval){ .type = J_FUNC, .u.f = f };
}

/* ---- Expressions ---- */

static usli_jval apply(usli_jinja *j, usli_jenv *e, const usli_jnode *n, bool is_test) {
    const usli_jrow *row = is_test ? usli_j_test(n->text) : usli_j_filter(n->text);
    usli_jval self = eval(j, e, n->a);
    usli_jargs args = arguments(j, e, n->kids);
    j->line = n->line;
    if (!row) usli_j_raise(j, "no %s named '%.*s'", is_test ? "test" : "filter", (int)n->text->n, n->text->p);
    return usli_j_call_row(j, row, self, &args, is_test ? "test " : "filter ");
}

static usli_jval eval_compare(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval left = eval(j, e, n->a);
    for (const usli_jnode *k = n->kids; k; k = k->next) {
        usli_jval right = eval(j, e, k->a);
        j->line = k->line;
        if (!compare(j, k->op, left, right)) return usli_j_bool(false);
        left = right;
    }
    return usli_j_bool(true);
}

static usli_jval eval_sign(usli_jinja *j, usli_jval v, bool minus) {
    usli_j_defined(j, v);
    if (v.type == J_FLOAT) return usli_j_float(minus ? -v.u.d : v.u.d);
    if (!usli_j_is_number(v))
        usli_j_raise(j, "bad operand type for unary %c: '%s'", minus ? '-' : '+', usli_j_type_name(v));
    int64_t i = usli_j_want_int(j, v, "");
    if (minus && i == INT64_MIN) overflow(j);
    return usli_j_int(minus ? -i : i);
}

static usli_jval eval_items(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jflavour flavour) {
    usli_jval v = usli_j_seq(j, flavour, 0);
    for (const usli_jnode *k = n->kids; k; k = k->next) usli_j_push(j, v, eval(j, e, k));
    return v;
}

static usli_jval eval_dict(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval v = usli_j_dict(j);
    for (const usli_jnode *k = n->kids; k; k = k->next->next) {
        usli_jval key = eval(j, e, k);
        usli_jdict_set(j, v.u.m, key, eval(j, e, k->next));
    }
    return v;
}

static usli_jval eval_concat(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval v = usli_j_cstr(j, "");
    for (const usli_jnode *k = n->kids; k; k = k->next) v = usli_j_join(j, v, usli_j_str(j, eval(j, e, k)));
    v.markup = false;
    return v;
}

static usli_jval eval_cond(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    if (usli_j_truth(j, eval(j, e, n->a))) return eval(j, e, n->b);
    if (n->c) return eval(j, e, n->c);
    return usli_j_undefined(j, "the inline if-expression on line %d evaluated to false and no else section was defined",
                            n->line);
}

static usli_jval eval_binary(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval a = eval(j, e, n->a), b = eval(j, e, n->b);
    j->line = n->line;
    return usli_j_binary(j, n->op, a, b);
}

static usli_jval eval_item(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval v = eval(j, e, n->a);
    if (n->b->kind == JN_SLICE) return slice(j, e, v, n->b);
    usli_jval key = eval(j, e, n->b);
    j->line = n->line;
    return usli_j_item(j, v, key);
}

static usli_jval eval_attr(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval v = eval(j, e, n->a);
    j->line = n->line;
    return usli_j_attr(j, v, n->value);
}

static usli_jval eval_call(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval f = eval(j, e, n->a);
    usli_jargs args = arguments(j, e, n->kids);
    j->line = n->line;
    return usli_j_call(j, f, &args);
}

static usli_jval eval_kind(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    usli_jval v;
    switch (n->kind) {
    case JN_NAME: return look_up(j, e, n->text);
    case JN_HOLE: return j->hole;
    case JN_TUPLE: return eval_items(j, e, n, J_TUPLE);
    case JN_LIST: return eval_items(j, e, n, J_LIST);
    case JN_DICT: return eval_dict(j, e, n);
    case JN_ATTR: return eval_attr(j, e, n);
    case JN_ITEM: return eval_item(j, e, n);
    case JN_CALL: return eval_call(j, e, n);
    case JN_FILTER: return apply(j, e, n, false);
    case JN_TEST: return apply(j, e, n, true);
    case JN_NOT: return usli_j_bool(!usli_j_truth(j, eval(j, e, n->a)));
    case JN_NEG: return eval_sign(j, eval(j, e, n->a), true);
    case JN_POS: return eval_sign(j, eval(j, e, n->a), false);
    case JN_AND: v = eval(j, e, n->a); return usli_j_truth(j, v) ? eval(j, e, n->b) : v;
    case JN_OR: v = eval(j, e, n->a); return usli_j_truth(j, v) ? v : eval(j, e, n->b);
    case JN_COND: return eval_cond(j, e, n);
    case JN_CONCAT: return eval_concat(j, e, n);
    case JN_COMPARE: return eval_compare(j, e, n);
    case JN_SLICE: usli_j_raise(j, "a slice stands only alone between brackets");
    default: return eval_binary(j, e, n);
    }
}

static usli_jval eval(usli_jinja *j, usli_jenv *e, const usli_jnode *n) {
    if (n->kind == JN_CONST) return n->value;
    usli_j_enter(j);
    usli_j_step(j, 1);
    j->line = n->line;
    usli_jval v = eval_kind(j, e, n);
    usli_j_leave(j);
    return v;
}

/* ---- Statements ---- */

static void assign(usli_jinja *j, usli_jenv *e, const usli_jnode *target, usli_jval v) {
    if (target->kind == JN_NAME) {
        set_var(j, e, target->text, v);
    } else if (target->kind == JN_NSREF) {
        usli_jval ns = look_up(j, e, target->text);
        if (ns.type != J_NAMESPACE) usli_j_raise(j, "cannot assign attribute on non-namespace object");
        if (target->value.u.s->p[0] == '_')
            usli_j_raise(j, "a namespace's names do not begin with an underscore: '%.*s'", (int)target->value.u.s->n,
                         target->value.u.s->p);
        usli_jdict_set(j, ns.u.m, target->value, v);
    } else {
        const usli_jseq *q = usli_j_iterate(j, v);
        size_t want = 0;
        for (const usli_jnode *k = target->kids; k; k = k->next) want++;
        if (q->count < want) usli_j_raise(j, "not enough values to unpack (expected %zu, got %zu)", want, q->count);
        if (q->count > want) usli_j_raise(j, "too many values to unpack (expected %zu)", want);
        usli_j_enter(j);
        size_t i = 0;
        for (const usli_jnode *k = target->kids; k; k = k->next) assign(j, e, k, q->items[i++]);
        usli_j_leave(j);
    }
}

/* What the loop goes over: the items that its condition lets through. */
static usli_jseq *chosen(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jval over) {
    usli_jseq *all = usli_j_iterate(j, over);
    if (!n->c) return all;
    usli_jval list = usli_j_seq(j, J_LIST, 0);
    usli_jenv *turn = new_env(j, e);
    for (size_t i = 0; i < all->count; i++) {
        assign(j, turn, n->a, all->items[i]);
        if (usli_j_truth(j, eval(j, turn, n->c))) usli_j_push(j, list, all->items[i]);
    }
    return list.u.q;
}

static flow loop_over(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jval over, int depth, usli_jout *o) {
    usli_jloop *loop = usli_j_alloc(j, sizeof *loop);
    *loop = (usli_jloop){ n, e, chosen(j, e, n, over), 0, depth, { .type = J_ABSENT } };
    usli_jstr *name = usli_j_new_str(j, "loop", 4);
    usli_jenv *turn = NULL;
    for (; loop->at < loop->items->count; loop->at++) {
        if (!turn || turn->captured) turn = new_env(j, e);
        turn->vars.count = 0;
        turn->vars.slots = NULL;
        set_var(j, turn, name, (usli_jval){ .type = J_LOOP, .u.loop = loop });
        assign(j, turn, n->a, loop->items->items[loop->at]);
        usli_j_step(j, 1);
        if (exec(j, turn, n->body, o) == BREAK) break;
    }
    if (!loop->items->count && n->else_body) return exec(j, new_env(j, e), n->else_body, o);
    return GO_ON;
}

static flow exec_if(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jout *o) {
    for (const usli_jnode *k = n->kids; k; k = k->next)
        if (!k->a || usli_j_truth(j, eval(j, e, k->a))) return exec(j, e, k->body, o);
    return GO_ON;
}

/* The captured text through a chain of filters that begins at JN_HOLE. */
static usli_jval filtered(usli_jinja *j, usli_jenv *e, usli_jval text, const usli_jnode *filter) {
    usli_jval outer = j->hole;
    if (!filter) return text;
    j->hole = text;
    text = eval(j, e, filter);
    j->hole = outer;
    return text;
}

static flow exec_with(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jout *o) {
    usli_jenv *inner = new_env(j, e);
    for (const usli_jnode *k = n->kids; k; k = k->next) assign(j, inner, k->a, eval(j, e, k->b));
    return exec(j, inner, n->body, o);
}

static void exec_call_block(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jout *o) {
    usli_jval f = eval(j, e, n->a->a);
    usli_jargs args = arguments(j, e, n->a->kids);
    usli_jdict_set(j, &args.named, usli_j_cstr(j, "caller"), new_macro(j, e, n->b));
    j->line = n->line;
    usli_j_put_str(j, o, usli_j_call(j, f, &args));
}

static void exec_generation(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jout *o) {
    usli_jval text = capture(j, new_env(j, e), n->body);
    usli_jinja_span span = { j->output->len, j->output->len + text.u.s->n };
    j->spans = usli_j_grow(j, j->spans, &j->span_cap, j->span_count + 1, sizeof span);
    j->spans[j->span_count++] = span;
    usli_j_put_str(j, o, text);
}

static flow exec_one(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jout *o) {
    usli_jout inner = { 0 };
    flow f = GO_ON;
    switch (n->kind) {
    case JN_DATA: usli_j_put(j, o, n->value.u.s->p, n->value.u.s->n); break;
    case JN_OUTPUT: usli_j_put_str(j, o, eval(j, e, n->a)); break;
    case JN_IF: return exec_if(j, e, n, o);
    case JN_FOR: return loop_over(j, e, n, eval(j, e, n->b), 0, o);
    case JN_SET: assign(j, e, n->a, eval(j, e, n->b)); break;
    case JN_SET_BLOCK:
        f = exec(j, new_env(j, e), n->body, &inner);
        assign(j, e, n->a, filtered(j, e, usli_j_taken(j, &inner), n->b));
        return f;
    case JN_MACRO: set_var(j, e, n->text, new_macro(j, e, n)); break;
    case JN_CALL_BLOCK: exec_call_block(j, e, n, o); break;
    case JN_FILTER_BLOCK:
        f = exec(j, new_env(j, e), n->body, &inner);
        usli_j_put_str(j, o, filtered(j, e, usli_j_taken(j, &inner), n->a));
        return f;
    case JN_WITH: return exec_with(j, e, n, o);
    case JN_BREAK: return BREAK;
    case JN_CONTINUE: return CONTINUE;
    case JN_GENERATION: exec_generation(j, e, n, o); break;
    default: break;
    }
    return f;
}

static flow exec(usli_jinja *j, usli_jenv *e, const usli_jnode *n, usli_jout *o) {
    flow f = GO_ON;
    usli_j_enter(j);
    for (; n && f == GO_ON; n = n->next) {
        usli_j_step(j, 1);
        j->line = n->line;
        f = exec_one(j, e, n, o);
    }
    usli_j_leave(j);
    return f;
}

/* ---- From outside ---- */

static void set_variables(usli_jinja *j, const usli_jinja_var *vars, size_t count) {
    j->globals = new_env(j, NULL);
    j->root = new_env(j, j->globals);
    for (const usli_jrow *row = usli_j_globals; row->name; row++)
        set_var(j, j->globals, usli_j_new_str(j, row->name, strlen(row->name)),
                method(j, row, (usli_jval){ .type = J_ABSENT }));
    for (size_t i = 0; i < count; i++) {
        const usli_jinja_var *v = &vars[i];
        usli_jval value = v->kind == USLI_JINJA_TEXT ? usli_j_copy(j, v->text, v->len)
                                                     : usli_j_from_json(j, v->name, v->text, v->len);
        if (v->kind != USLI_JINJA_FIELDS) {
            set_var(j, j->root, usli_j_new_str(j, v->name, strlen(v->name)), value);
            continue;
        }
        if (value.type != J_DICT)
            usli_j_throw(j, usli_fail(j->ctx, USL_ERR_INVALID, "%s must be a JSON object", v->name));
        for (size_t k = 0; k < value.u.m->count; k++)
            usli_jdict_set(j, &j->root->vars, value.u.m->keys[k], value.u.m->values[k]);
    }
}

typedef struct job {
    const char *source;
    size_t len;
    const usli_jinja_var *vars;
    size_t count;
    usli_jout out;
} job;

static void render(usli_jinja *j, job *w) {
    set_variables(j, w->vars, w->count);
    usli_j_tokenize(j, w->source, w->len);
    const usli_jnode *tree = usli_j_parse(j);
    j->output = &w->out;
    exec(j, j->root, tree, &w->out);
}

static usl_status guarded(usli_jinja *j, job *w) {
    if (setjmp(j->jump)) return j->st;
    render(j, w);
    return USL_OK;
}

void usli_jinja_result_free(usl_ctx *ctx, usli_jinja_result *result) {
    usli_free(ctx, result->text);
    usli_free(ctx, result->spans);
    *result = (usli_jinja_result){ 0 };
}

static usl_status take(usl_ctx *ctx, const usli_jinja *j, const usli_jout *o, usli_jinja_result *out) {
    out->text = usli_strndup(ctx, o->len ? o->data : "", o->len);
    if (!out->text) return usli_nomem(ctx, o->len + 1);
    out->len = o->len;
    if (!j->span_count) return USL_OK;
    out->spans = usli_malloc(ctx, j->span_count * sizeof *out->spans);
    if (!out->spans) {
        usli_jinja_result_free(ctx, out);
        return usli_nomem(ctx, j->span_count * sizeof *j->spans);
    }
    memcpy(out->spans, j->spans, j->span_count * sizeof *out->spans);
    out->span_count = j->span_count;
    return USL_OK;
}

usl_status usli_jinja_render(usl_ctx *ctx, const char *name, const char *source, size_t len, const usli_jinja_var *vars,
                             size_t count, usli_jinja_result *out) {
    job w = { source, len, vars, count, { 0 } };
    size_t given = len;
    *out = (usli_jinja_result){ 0 };
    for (size_t i = 0; i < count; i++) given += vars[i].len;
    usli_jinja *j = usli_calloc(ctx, 1, sizeof *j);
    if (!j) return usli_nomem(ctx, sizeof *j);
    j->ctx = ctx;
    j->name = name;
    usli_json_init(&j->reader, ctx, name, "", 0);
    j->limit = ((size_t)256 << 20) + (given < SIZE_MAX / 256 ? given * 64 : 0);
    usl_status st = guarded(j, &w);
    if (st == USL_OK) st = take(ctx, j, &w.out, out);
    usli_json_done(&j->reader);
    usli_j_free(j);
    usli_free(ctx, j);
    return st;
}
