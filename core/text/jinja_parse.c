/* A template's tree, by recursive descent with jinja2's grammar. */
#include <string.h>

#include "core/text/jinja_parts.h"

typedef struct parser {
    usli_jinja *j;
    const usli_jtoken *t; /* the current token */
    int loops;            /* break and continue belong to one */
    int uses;             /* J_USES_* of the macro that is being read */
} parser;

static usli_jnode *expression(parser *p);
static usli_jnode *disjunction(parser *p);
static usli_jnode *unary(parser *p, bool filters);
static usli_jnode *statements(parser *p, const char *const *ends);

/* ---- Tokens ---- */

static const char *described(parser *p, const usli_jtoken *t) {
    static const char *const NAMES[] = { "end of template", "text", "'{{'", "'}}'", "'{%'", "'%}'" };
    if (t->type <= JT_BLOCK_END) return NAMES[t->type];
    char *text = usli_j_alloc(p->j, 64);
    if (t->type == JT_OP)
        snprintf(text, 64, "'%c%c'", t->op & 255, t->op >> 8 ? t->op >> 8 : '\'');
    else if (t->type == JT_NAME)
        snprintf(text, 64, "'%.*s'", (int)(t->value.u.s->n < 50 ? t->value.u.s->n : 50), t->value.u.s->p);
    else
        snprintf(text, 64, "%s", t->type == JT_STRING ? "a text" : "a number");
    if (t->type == JT_OP && !(t->op >> 8)) text[3] = 0;
    return text;
}

_Noreturn static void unexpected(parser *p, const char *wanted) {
    p->j->line = p->t->line;
    if (wanted) usli_j_raise(p->j, "expected %s, got %s", wanted, described(p, p->t));
    usli_j_raise(p->j, "unexpected %s", described(p, p->t));
}

_Noreturn static void fail(parser *p, const char *what) {
    p->j->line = p->t->line;
    usli_j_raise(p->j, "%s", what);
}

static bool at_op(const parser *p, int op) {
    return p->t->type == JT_OP && p->t->op == op;
}

static bool token_is(const usli_jtoken *t, const char *name) {
    return t->type == JT_NAME && usli_j_is_text(t->value, name);
}

static bool at_name(const parser *p, const char *name) {
    return token_is(p->t, name);
}

static bool skip_op(parser *p, int op) {
    if (!at_op(p, op)) return false;
    p->t++;
    return true;
}

static bool skip_name(parser *p, const char *name) {
    if (!at_name(p, name)) return false;
    p->t++;
    return true;
}

static void want_op(parser *p, int op) {
    usli_jtoken t = { JT_OP, 0, op, { 0 } };
    if (!skip_op(p, op)) unexpected(p, described(p, &t));
}

static usli_jstr *want_name(parser *p) {
    if (p->t->type != JT_NAME) unexpected(p, "a name");
    return (p->t++)->value.u.s;
}

static void want_type(parser *p, usli_jtoken_type type) {
    usli_jtoken t = { type, 0, 0, { 0 } };
    if (p->t->type != type) unexpected(p, described(p, &t));
    p->t++;
}

static usli_jnode *node_at(parser *p, usli_jkind kind, int line) {
    usli_jnode *n = usli_j_alloc(p->j, sizeof *n);
    n->kind = (uint8_t)kind;
    n->line = line;
    return n;
}

static usli_jnode *node(parser *p, usli_jkind kind) {
    return node_at(p, kind, p->t->line);
}

/* ---- Expressions ---- */

/* name ends a tuple that stands before that word; NULL: none. */
static bool tuple_ends(const parser *p, const char *name) {
    return p->t->type == JT_VARIABLE_END || p->t->type == JT_BLOCK_END || at_op(p, ')') || (name && at_name(p, name));
}

/* One expression, or several with commas between them as a tuple. */
static usli_jnode *tuple(parser *p, usli_jnode *(*one)(parser *), const char *ends, bool parentheses) {
    usli_jnode *list = node(p, JN_TUPLE), **last = &list->kids;
    bool comma = false;
    while (!tuple_ends(p, ends)) {
        *last = one(p);
        last = &(*last)->next;
        if (!skip_op(p, ',')) break;
        comma = true;
    }
    if (comma) return list;
    if (list->kids) return list->kids;
    if (!parentheses) unexpected(p, "an expression");
    return list;
}

static usli_jnode *bracketed(parser *p, usli_jkind kind, int close) {
    usli_jnode *list = node(p, kind), **last = &list->kids;
    p->t++;
    while (!at_op(p, close)) {
        *last = expression(p);
        last = &(*last)->next;
        if (kind == JN_DICT) {
            want_op(p, ':');
            *last = expression(p);
            last = &(*last)->next;
        }
        if (!at_op(p, close)) want_op(p, ',');
    }
    p->t++;
    return list;
}

static usli_jnode *texts(parser *p) {
    usli_jnode *n = node(p, JN_CONST);
    n->value = (p->t++)->value;
    for (; p->t->type == JT_STRING; p->t++) n->value = usli_j_join(p->j, n->value, p->t->value);
    return n;
}

static usli_jnode *name(parser *p) {
    static const struct {
        const char *word;
        int value; /* -1: none */
    } WORDS[] = { { "true", 1 }, { "True", 1 }, { "false", 0 }, { "False", 0 }, { "none", -1 }, { "None", -1 } };
    usli_jnode *n = node(p, JN_NAME);
    n->text = want_name(p);
    usli_jval v = { .type = J_STR, .u.s = n->text };
    for (size_t i = 0; i < sizeof WORDS / sizeof *WORDS; i++)
        if (usli_j_is_text(v, WORDS[i].word)) {
            n->kind = JN_CONST;
            n->value = WORDS[i].value < 0 ? usli_j_none() : usli_j_bool(WORDS[i].value != 0);
            return n;
        }
    static const char *const IMPLICIT[] = { "varargs", "kwargs", "caller" };
    for (int i = 0; i < 3; i++)
        if (usli_j_is_text(v, IMPLICIT[i])) p->uses |= 1 << i;
    return n;
}

static usli_jnode *primary(parser *p) {
    usli_jnode *n;
    switch (p->t->type) {
    case JT_NAME: return name(p);
    case JT_STRING: return texts(p);
    case JT_INT:
    case JT_FLOAT:
        n = node(p, JN_CONST);
        n->value = (p->t++)->value;
        return n;
    default: break;
    }
    if (at_op(p, '[')) return bracketed(p, JN_LIST, ']');
    if (at_op(p, '{')) return bracketed(p, JN_DICT, '}');
    if (!skip_op(p, '(')) unexpected(p, NULL);
    n = tuple(p, expression, NULL, true);
    want_op(p, ')');
    return n;
}

static usli_jnode *subscript(parser *p) {
    usli_jnode *n = node(p, JN_SLICE), **part[] = { &n->a, &n->b, &n->c };
    if (!at_op(p, ':')) {
        n->a = expression(p);
        if (!at_op(p, ':')) return n->a;
    }
    for (int i = 1; i < 3 && skip_op(p, ':'); i++)
        if (!at_op(p, ':') && !at_op(p, ']') && !at_op(p, ',')) *part[i] = expression(p);
    return n;
}

static usli_jnode *subscripts(parser *p, usli_jnode *of) {
    usli_jnode *n = node(p, JN_ITEM);
    n->a = of;
    if (skip_op(p, '.')) {
        if (p->t->type == JT_INT) {
            n->b = node(p, JN_CONST);
            n->b->value = (p->t++)->value;
            return n;
        }
        n->kind = JN_ATTR;
        n->value = p->t->value;
        n->text = want_name(p);
        return n;
    }
    p->t++;
    usli_jnode *list = node(p, JN_TUPLE), **last = &list->kids;
    while (!at_op(p, ']')) {
        *last = subscript(p);
        last = &(*last)->next;
        if (!at_op(p, ']')) want_op(p, ',');
    }
    p->t++;
    n->b = list->kids && !list->kids->next ? list->kids : list;
    return n;
}

static usli_jnode *arguments(parser *p) {
    usli_jnode *first = NULL, **last = &first;
    bool named = false, spread = false;
    want_op(p, '(');
    while (!at_op(p, ')')) {
        usli_jnode *n = node(p, JN_ARG);
        if (skip_op(p, '*')) {
            n->op = '*';
            spread = true;
        } else if (skip_op(p, J_OP2('*', '*'))) {
            n->op = J_OP2('*', '*');
            named = true;
        } else if (p->t->type == JT_NAME && p->t[1].type == JT_OP && p->t[1].op == '=') {
            n->text = want_name(p);
            p->t++;
            named = true;
        } else if (named || spread) {
            fail(p, "an argument without a name stands behind one with a name");
        }
        n->a = expression(p);
        *last = n;
        last = &n->next;
        if (!at_op(p, ')')) want_op(p, ',');
    }
    p->t++;
    return first;
}

static usli_jnode *call(parser *p, usli_jnode *of) {
    usli_jnode *n = node(p, JN_CALL);
    n->a = of;
    n->kids = arguments(p);
    return n;
}

static usli_jnode *postfix(parser *p, usli_jnode *n) {
    for (;;) {
        if (at_op(p, '.') || at_op(p, '['))
            n = subscripts(p, n);
        else if (at_op(p, '('))
            n = call(p, n);
        else
            return n;
    }
}

static usli_jstr *dotted_name(parser *p) {
    usli_jval v = { .type = J_STR, .u.s = want_name(p) };
    while (skip_op(p, '.')) {
        usli_jval more = { .type = J_STR, .u.s = want_name(p) };
        v = usli_j_join(p->j, usli_j_join(p->j, v, usli_j_cstr(p->j, ".")), more);
    }
    return v.u.s;
}

static usli_jnode *filter(parser *p, usli_jnode *of) {
    usli_jnode *n = node(p, JN_FILTER);
    n->a = of;
    n->text = dotted_name(p);
    if (at_op(p, '(')) n->kids = arguments(p);
    return n;
}

static bool test_argument_follows(const parser *p) {
    switch (p->t->type) {
    case JT_NAME: return !at_name(p, "else") && !at_name(p, "or") && !at_name(p, "and");
    case JT_STRING:
    case JT_INT:
    case JT_FLOAT: return true;
    default: return at_op(p, '[') || at_op(p, '{');
    }
}

static usli_jnode *test(parser *p, usli_jnode *of) {
    usli_jnode *n = node(p, JN_TEST);
    bool negated = skip_name(p, "not");
    n->a = of;
    n->text = dotted_name(p);
    if (at_op(p, '(')) {
        n->kids = arguments(p);
    } else if (test_argument_follows(p)) {
        if (at_name(p, "is")) fail(p, "tests with 'is' cannot be chained");
        n->kids = node(p, JN_ARG);
        usli_jnode *a = primary(p);
        n->kids->a = postfix(p, a);
    }
    if (!negated) return n;
    usli_jnode *inverse = node_at(p, JN_NOT, n->line);
    inverse->a = n;
    return inverse;
}

static usli_jnode *filters(parser *p, usli_jnode *n) {
    for (;;) {
        if (skip_op(p, '|'))
            n = filter(p, n);
        else if (skip_name(p, "is"))
            n = test(p, n);
        else if (at_op(p, '('))
            n = call(p, n);
        else
            return n;
    }
}

static usli_jnode *unary(parser *p, bool with_filters) {
    usli_jnode *n = node(p, at_op(p, '-') ? JN_NEG : JN_POS);
    usli_j_enter(p->j);
    if (skip_op(p, '-') || skip_op(p, '+'))
        n->a = unary(p, false);
    else
        n = primary(p);
    n = postfix(p, n);
    if (with_filters) n = filters(p, n);
    usli_j_leave(p->j);
    return n;
}

static usli_jnode *binary(parser *p, int op, int line, usli_jnode *a, usli_jnode *b) {
    usli_jnode *n = node_at(p, JN_BINARY, line);
    n->op = op;
    n->a = a;
    n->b = b;
    return n;
}

static usli_jnode *power(parser *p) {
    usli_jnode *n = unary(p, true);
    while (at_op(p, J_OP2('*', '*'))) {
        int line = (p->t++)->line;
        n = binary(p, J_OP2('*', '*'), line, n, unary(p, true));
    }
    return n;
}

static usli_jnode *product(parser *p) {
    usli_jnode *n = power(p);
    while (at_op(p, '*') || at_op(p, '/') || at_op(p, '%') || at_op(p, J_OP2('/', '/'))) {
        const usli_jtoken *t = p->t++;
        n = binary(p, t->op, t->line, n, power(p));
    }
    return n;
}

static usli_jnode *concatenation(parser *p) {
    usli_jnode *n = node(p, JN_CONCAT), **last = &n->kids;
    do {
        *last = product(p);
        last = &(*last)->next;
    } while (skip_op(p, '~'));
    return n->kids->next ? n : n->kids;
}

static usli_jnode *sum(parser *p) {
    usli_jnode *n = concatenation(p);
    while (at_op(p, '+') || at_op(p, '-')) {
        const usli_jtoken *t = p->t++;
        n = binary(p, t->op, t->line, n, concatenation(p));
    }
    return n;
}

/* The comparison that stands here (in: 'i', not in: 'n'), 0: none. */
static int comparison_op(parser *p) {
    static const int OPS[] = { '<', '>', J_OP2('=', '='), J_OP2('!', '='), J_OP2('<', '='), J_OP2('>', '=') };
    for (size_t i = 0; i < sizeof OPS / sizeof *OPS; i++)
        if (skip_op(p, OPS[i])) return OPS[i];
    if (skip_name(p, "in")) return 'i';
    if (!at_name(p, "not") || !token_is(&p->t[1], "in")) return 0;
    p->t += 2;
    return 'n';
}

static usli_jnode *comparison(parser *p) {
    usli_jnode *n = node(p, JN_COMPARE), **last = &n->kids;
    n->a = sum(p);
    for (int op; (op = comparison_op(p)) != 0; last = &(*last)->next) {
        *last = node(p, JN_OPERAND);
        (*last)->op = op;
        (*last)->a = sum(p);
    }
    return n->kids ? n : n->a;
}

static usli_jnode *negation(parser *p) {
    if (!at_name(p, "not")) return comparison(p);
    usli_jnode *n = node(p, JN_NOT);
    usli_j_enter(p->j);
    p->t++;
    n->a = negation(p);
    usli_j_leave(p->j);
    return n;
}

static usli_jnode *conjunction(parser *p) {
    usli_jnode *n = negation(p);
    while (at_name(p, "and")) {
        usli_jnode *both = node(p, JN_AND);
        p->t++;
        both->a = n;
        both->b = negation(p);
        n = both;
    }
    return n;
}

static usli_jnode *disjunction(parser *p) {
    usli_jnode *n = conjunction(p);
    while (at_name(p, "or")) {
        usli_jnode *either = node(p, JN_OR);
        p->t++;
        either->a = n;
        either->b = conjunction(p);
        n = either;
    }
    return n;
}

static usli_jnode *expression(parser *p) {
    usli_j_enter(p->j);
    usli_jnode *n = disjunction(p);
    while (at_name(p, "if")) {
        usli_jnode *choice = node(p, JN_COND);
        p->t++;
        choice->b = n;
        choice->a = disjunction(p);
        if (skip_name(p, "else")) choice->c = expression(p);
        n = choice;
    }
    usli_j_leave(p->j);
    return n;
}

/* ---- Statements ---- */

static const char *const NONE[] = { NULL };

/* {% ... %} text {% end %}: the tag's end, the body, and the name that ended it, whose %} still stands. */
static usli_jnode *body_until(parser *p, const char *const *ends) {
    skip_op(p, ':');
    want_type(p, JT_BLOCK_END);
    usli_jnode *first = statements(p, ends);
    if (p->t->type != JT_END) return first;
    p->j->line = p->t->line;
    usli_j_raise(p->j, "the template ends before '%s'", ends[0]);
}

static usli_jnode *body(parser *p, const char *end) {
    const char *const ends[] = { end, NULL };
    usli_jnode *first = body_until(p, ends);
    p->t++;
    return first;
}

static usli_jnode *target_name(parser *p) {
    usli_jnode *n = name(p);
    if (n->kind != JN_NAME) fail(p, "a constant cannot be set");
    return n;
}

static usli_jnode *target_part(parser *p) {
    if (!at_op(p, '(')) return target_name(p);
    p->t++;
    usli_j_enter(p->j);
    usli_jnode *n = tuple(p, target_part, NULL, true);
    usli_j_leave(p->j);
    want_op(p, ')');
    return n;
}

static usli_jnode *set_target_part(parser *p) {
    usli_jnode *n = target_part(p);
    if (n->kind != JN_NAME || !skip_op(p, '.')) return n;
    n->kind = JN_NSREF;
    n->value = p->t->value;
    want_name(p);
    return n;
}

static usli_jnode *if_statement(parser *p) {
    static const char *const ENDS[] = { "endif", "elif", "else", NULL };
    usli_jnode *n = node(p, JN_IF), **last = &n->kids;
    for (bool more = true; more;) {
        usli_jnode *branch = node(p, JN_BRANCH);
        bool otherwise = n->kids && at_name(p, "else");
        p->t++;
        if (!otherwise) branch->a = tuple(p, disjunction, NULL, false);
        branch->body = body_until(p, otherwise ? (const char *const[]){ "endif", NULL } : ENDS);
        *last = branch;
        last = &branch->next;
        more = !at_name(p, "endif");
    }
    p->t++;
    return n;
}

static usli_jnode *for_statement(parser *p) {
    static const char *const ENDS[] = { "endfor", "else", NULL };
    usli_jnode *n = node(p, JN_FOR);
    p->t++;
    n->a = tuple(p, target_part, "in", false);
    if (!skip_name(p, "in")) unexpected(p, "'in'");
    n->b = tuple(p, disjunction, "recursive", false);
    if (skip_name(p, "if")) n->c = expression(p);
    n->op = skip_name(p, "recursive");
    p->loops++;
    n->body = body_until(p, ENDS);
    p->loops--;
    if (skip_name(p, "else"))
        n->else_body = body(p, "endfor");
    else
        p->t++;
    return n;
}

static usli_jnode *set_statement(parser *p) {
    usli_jnode *n = node(p, JN_SET);
    p->t++;
    n->a = tuple(p, set_target_part, NULL, false);
    if (skip_op(p, '=')) {
        n->b = tuple(p, expression, NULL, false);
        return n;
    }
    n->kind = JN_SET_BLOCK;
    if (at_op(p, '|')) n->b = node(p, JN_HOLE);
    while (skip_op(p, '|')) n->b = filter(p, n->b);
    n->body = body(p, "endset");
    return n;
}

/* (name, name = default) */
static usli_jnode *parameters(parser *p) {
    usli_jnode *first = NULL, **last = &first;
    bool defaults = false;
    want_op(p, '(');
    while (!at_op(p, ')')) {
        usli_jnode *param = target_name(p);
        param->kind = JN_PARAM;
        if (skip_op(p, '='))
            param->a = expression(p);
        else if (defaults)
            fail(p, "a parameter without a default stands behind one with a default");
        defaults = param->a != NULL;
        *last = param;
        last = &param->next;
        if (!at_op(p, ')')) want_op(p, ',');
    }
    p->t++;
    return first;
}

static void macro_body(parser *p, usli_jnode *n, const char *end) {
    int uses = p->uses, loops = p->loops;
    p->uses = p->loops = 0;
    n->body = body(p, end);
    n->op = p->uses;
    p->uses = uses;
    p->loops = loops;
}

static usli_jnode *macro_statement(parser *p) {
    usli_jnode *n = node(p, JN_MACRO);
    p->t++;
    n->text = target_name(p)->text;
    n->kids = parameters(p);
    macro_body(p, n, "endmacro");
    return n;
}

static usli_jnode *call_statement(parser *p) {
    usli_jnode *n = node(p, JN_CALL_BLOCK), *macro = node(p, JN_MACRO);
    p->t++;
    if (at_op(p, '(')) macro->kids = parameters(p);
    n->a = expression(p);
    if (n->a->kind != JN_CALL) fail(p, "a call must follow 'call'");
    macro->text = usli_j_new_str(p->j, "caller", 6);
    macro_body(p, macro, "endcall");
    n->b = macro;
    return n;
}

static usli_jnode *filter_statement(parser *p) {
    usli_jnode *n = node(p, JN_FILTER_BLOCK);
    p->t++;
    n->a = filter(p, node(p, JN_HOLE));
    while (skip_op(p, '|')) n->a = filter(p, n->a);
    n->body = body(p, "endfilter");
    return n;
}

static usli_jnode *with_statement(parser *p) {
    usli_jnode *n = node(p, JN_WITH), **last = &n->kids;
    p->t++;
    while (p->t->type != JT_BLOCK_END) {
        if (n->kids) want_op(p, ',');
        usli_jnode *set = node(p, JN_SET);
        set->a = target_part(p);
        want_op(p, '=');
        set->b = expression(p);
        *last = set;
        last = &set->next;
    }
    n->body = body(p, "endwith");
    return n;
}

static usli_jnode *print_statement(parser *p) {
    usli_jnode *first = NULL, **last = &first;
    p->t++;
    do {
        *last = node(p, JN_OUTPUT);
        (*last)->a = expression(p);
        last = &(*last)->next;
    } while (skip_op(p, ','));
    return first;
}

static usli_jnode *jump_statement(parser *p) {
    usli_jnode *n = node(p, at_name(p, "break") ? JN_BREAK : JN_CONTINUE);
    if (!p->loops) fail(p, "'break' and 'continue' stand only in a loop");
    p->t++;
    return n;
}

static usli_jnode *generation_statement(parser *p) {
    usli_jnode *n = node(p, JN_GENERATION);
    int loops = p->loops;
    p->t++;
    p->loops = 0;
    n->body = body(p, "endgeneration");
    p->loops = loops;
    return n;
}

static usli_jnode *statement(parser *p) {
    static const struct {
        const char *word;
        usli_jnode *(*read)(parser *);
    } WORDS[] = { { "if", if_statement },
                  { "for", for_statement },
                  { "set", set_statement },
                  { "macro", macro_statement },
                  { "call", call_statement },
                  { "filter", filter_statement },
                  { "with", with_statement },
                  { "print", print_statement },
                  { "break", jump_statement },
                  { "continue", jump_statement },
                  { "generation", generation_statement } };
    if (p->t->type != JT_NAME) unexpected(p, "a tag's name");
    for (size_t i = 0; i < sizeof WORDS / sizeof *WORDS; i++)
        if (at_name(p, WORDS[i].word)) return WORDS[i].read(p);
    p->j->line = p->t->line;
    static const char *const FILES[] = { "extends", "include", "import", "from", "block", "autoescape" };
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++)
        if (at_name(p, FILES[i])) usli_j_raise(p->j, "the tag '%s' has no use in a chat template", FILES[i]);
    usli_j_raise(p->j, "unknown tag %s", described(p, p->t));
}

/* Up to the end of the template, or {% one of these names, which stays current. */
static usli_jnode *statements(parser *p, const char *const *ends) {
    usli_jnode *first = NULL, **last = &first;
    usli_j_enter(p->j);
    while (p->t->type != JT_END) {
        if (p->t->type == JT_DATA) {
            *last = node(p, JN_DATA);
            (*last)->value = (p->t++)->value;
        } else if (p->t->type == JT_VARIABLE_BEGIN) {
            *last = node(p, JN_OUTPUT);
            p->t++;
            (*last)->a = tuple(p, expression, NULL, false);
            want_type(p, JT_VARIABLE_END);
        } else {
            p->t++;
            bool ended = false;
            for (size_t i = 0; ends[i] && !ended; i++) ended = at_name(p, ends[i]);
            if (ended) break;
            *last = statement(p);
            want_type(p, JT_BLOCK_END);
        }
        while (*last) last = &(*last)->next;
    }
    usli_j_leave(p->j);
    return first;
}

usli_jnode *usli_j_parse(usli_jinja *j) {
    parser p = { .j = j, .t = j->tokens };
    return statements(&p, NONE);
}
