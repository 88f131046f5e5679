/* What the files of the Jinja engine share.
 *
 * Everything a rendering makes (tree, values, text) lies in one arena that is freed at its end, so values need no
 * counting and an error may leave from any depth: usli_j_raise jumps to the one place that frees the arena. No function
 * here owns memory of another kind across a call that can raise. */
#ifndef USLI_TEXT_JINJA_PARTS_H
#define USLI_TEXT_JINJA_PARTS_H

#include <setjmp.h>

#include "core/io/json.h"
#include "core/text/jinja.h"

/* ---- Values ---- */

typedef enum usli_jtype {
    J_ABSENT, /* an argument that was not given */
    J_UNDEFINED,
    J_NONE,
    J_BOOL,
    J_INT,
    J_FLOAT,
    J_STR,
    J_SEQ,
    J_DICT,
    J_NAMESPACE,
    J_LOOP,
    J_FUNC
} usli_jtype;

/* Texts are immutable. One that was made by joining may have room behind it, which the next join takes when nobody else
 * has: `s = s + x` in a loop stays linear. */
typedef struct usli_jroom {
    size_t used, cap;
} usli_jroom;
typedef struct usli_jstr {
    const char *p;
    size_t n;
    usli_jroom *room; /* NULL: none */
} usli_jstr;

typedef struct usli_jseq usli_jseq;
typedef struct usli_jdict usli_jdict;
typedef struct usli_jloop usli_jloop;
typedef struct usli_jfunc usli_jfunc;

typedef struct usli_jval {
    uint8_t type;
    bool markup; /* J_STR: came through `safe` or `escape`; joining escapes the other side */
    union {
        bool b;
        int64_t i;
        double d;
        usli_jstr *s; /* J_UNDEFINED: the sentence that using it raises */
        usli_jseq *q;
        usli_jdict *m; /* J_NAMESPACE too */
        usli_jloop *loop;
        usli_jfunc *f;
    } u;
} usli_jval;

typedef enum usli_jflavour { J_LIST, J_TUPLE, J_RANGE, J_KEYS, J_VALUES, J_ITEMS, J_GENERATOR } usli_jflavour;
struct usli_jseq {
    usli_jval *items;
    size_t count, cap;
    usli_jflavour flavour;
    bool spent; /* a generator gives its items once */
    bool group; /* a pair that groupby made: (grouper, list) */
};

/* Keys in the order of their coming. Small ones are searched one by one. */
struct usli_jdict {
    usli_jval *keys, *values;
    size_t count, cap;
    uint32_t *slots;
    size_t slot_count;
};

typedef struct usli_jenv usli_jenv;
struct usli_jenv {
    usli_jenv *parent;
    usli_jdict vars;
    bool captured; /* a macro refers to it: it cannot be used again for the next turn of a loop */
};

/* ---- The tree ---- */

typedef enum usli_jkind {
    /* expressions */
    JN_CONST, /* value */
    JN_NAME,  /* text */
    JN_HOLE,  /* what a filter block filters */
    JN_TUPLE,
    JN_LIST,   /* kids */
    JN_DICT,   /* kids: key, value, key, ... */
    JN_ATTR,   /* a.text */
    JN_ITEM,   /* a[b] */
    JN_SLICE,  /* a:b:c, inside JN_ITEM */
    JN_CALL,   /* a(kids) */
    JN_FILTER, /* a | text(kids) */
    JN_TEST,   /* a is text(kids) */
    JN_ARG,    /* a, named text; op '*' and '**' spread */
    JN_NOT,
    JN_NEG,
    JN_POS,
    JN_AND,
    JN_OR,
    JN_COND,    /* a if b else c */
    JN_BINARY,  /* a op b */
    JN_CONCAT,  /* kids */
    JN_COMPARE, /* a, then kids: JN_OPERAND (op, a) */
    JN_OPERAND,
    /* statements */
    JN_DATA,   /* value */
    JN_OUTPUT, /* a */
    JN_IF,     /* kids: JN_BRANCH (a, or NULL for else; body) */
    JN_BRANCH,
    JN_FOR,       /* for a in b if c: body; else_body; op: recursive */
    JN_SET,       /* a = b */
    JN_SET_BLOCK, /* a = body through the filter b */
    JN_MACRO,     /* text(kids: JN_PARAM (text, a the default)): body; op: USES_* */
    JN_PARAM,
    JN_CALL_BLOCK,   /* a(caller = macro b) */
    JN_FILTER_BLOCK, /* body through the filter a */
    JN_WITH,         /* kids: JN_SET; body */
    JN_BREAK,
    JN_CONTINUE,
    JN_GENERATION, /* body */
    JN_NSREF       /* text.(value): the target of a set */
} usli_jkind;

enum { J_USES_VARARGS = 1, J_USES_KWARGS = 2, J_USES_CALLER = 4 };

typedef struct usli_jnode usli_jnode;
struct usli_jnode {
    uint8_t kind;
    int line, op;
    usli_jnode *next;
    usli_jnode *a, *b, *c, *kids, *body, *else_body;
    usli_jstr *text;
    usli_jval value;
};

struct usli_jloop {
    const usli_jnode *node;
    usli_jenv *outer;
    usli_jseq *items;
    size_t at;
    int depth;
    usli_jval changed; /* what changed() saw last */
};

/* ---- Functions ---- */

typedef struct usli_jargs {
    usli_jval *items; /* by position */
    size_t count;
    usli_jdict named;
} usli_jargs;

typedef struct usli_jinja usli_jinja;
/* a: the arguments by the names of the row, J_ABSENT where not given; raw: as they came. */
typedef usli_jval (*usli_jcall)(usli_jinja *j, usli_jval self, usli_jval *a, const usli_jargs *raw);
typedef struct usli_jrow {
    const char *name;
    const char *params; /* "a,b=,c=": those with = need not be given; "*" takes any */
    usli_jcall call;
    int type; /* methods: of which type; J_SEQ counts for lists and tuples */
} usli_jrow;
enum { J_MAX_PARAMS = 8 };

struct usli_jfunc {
    const usli_jrow *row; /* a method of self, or a global; NULL: a macro */
    usli_jval self;
    const usli_jnode *macro;
    usli_jenv *env;
    usli_jval state; /* joiner, cycler */
};

/* ---- The engine ---- */

typedef struct usli_jout {
    char *data;
    size_t len, cap;
} usli_jout;

typedef enum usli_jtoken_type {
    JT_END,
    JT_DATA,
    JT_VARIABLE_BEGIN,
    JT_VARIABLE_END,
    JT_BLOCK_BEGIN,
    JT_BLOCK_END,
    JT_NAME,
    JT_STRING,
    JT_INT,
    JT_FLOAT,
    JT_OP
} usli_jtoken_type;
#define J_OP2(a, b) ((a) | (b) << 8)
typedef struct usli_jtoken {
    usli_jtoken_type type;
    int line, op; /* JT_OP: the character, or J_OP2 */
    usli_jval value;
} usli_jtoken;

typedef struct usli_jblock usli_jblock;
struct usli_jinja {
    usl_ctx *ctx;
    const char *name;
    jmp_buf jump;
    usl_status st;
    usli_jblock *blocks;
    size_t used, limit; /* bytes */
    uint64_t steps;
    int depth, line;
    usli_json_reader reader; /* freed with the arena */
    usli_jtoken *tokens;
    size_t token_count;
    usli_jenv *globals, *root;
    usli_jout *output; /* of the whole text */
    usli_jval hole;
    usli_jinja_span *spans;
    size_t span_count, span_cap;
};

/* Never return. */
_Noreturn void usli_j_throw(usli_jinja *j, usl_status st); /* the sentence is set */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
_Noreturn void
usli_j_raise(usli_jinja *j, const char *fmt, ...);
/* Counts work; raises when a template does too much of it. */
void usli_j_step(usli_jinja *j, uint64_t n);
/* Each recursion stands between these. */
void usli_j_enter(usli_jinja *j);
static inline void usli_j_leave(usli_jinja *j) {
    j->depth--;
}
void *usli_j_alloc(usli_jinja *j, size_t size); /* zeroed */
void usli_j_free(usli_jinja *j);                /* the arena */
/* Room for need elements in an array of the arena. */
void *usli_j_grow(usli_jinja *j, void *items, size_t *cap, size_t need, size_t size);

/* Makers. */
usli_jval usli_j_none(void);
usli_jval usli_j_bool(bool b);
usli_jval usli_j_int(int64_t i);
usli_jval usli_j_float(double d);
usli_jstr *usli_j_new_str(usli_jinja *j, const char *p, size_t n); /* borrows p */
usli_jval usli_j_text(usli_jinja *j, const char *p, size_t n);     /* borrows p */
usli_jval usli_j_copy(usli_jinja *j, const char *p, size_t n);
usli_jval usli_j_cstr(usli_jinja *j, const char *p); /* borrows p */
usli_jval usli_j_taken(usli_jinja *j, const usli_jout *o);
usli_jval usli_j_join(usli_jinja *j, usli_jval a, usli_jval b); /* two texts */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
usli_jval
usli_j_undefined(usli_jinja *j, const char *fmt, ...);
usli_jval usli_j_seq(usli_jinja *j, usli_jflavour flavour, size_t cap);
void usli_j_push(usli_jinja *j, usli_jval seq, usli_jval item);
usli_jval usli_j_dict(usli_jinja *j);

void usli_j_put(usli_jinja *j, usli_jout *o, const char *p, size_t n);
void usli_j_puts(usli_jinja *j, usli_jout *o, const char *p);
void usli_j_put_str(usli_jinja *j, usli_jout *o, usli_jval v);  /* str(v) */
void usli_j_put_repr(usli_jinja *j, usli_jout *o, usli_jval v); /* repr(v) */
usli_jval usli_j_str(usli_jinja *j, usli_jval v);               /* str(v) */

void usli_jdict_set(usli_jinja *j, usli_jdict *m, usli_jval key, usli_jval value);
const usli_jval *usli_jdict_get(usli_jinja *j, const usli_jdict *m, usli_jval key); /* NULL: not there */
const usli_jval *usli_jdict_find(usli_jinja *j, const usli_jdict *m, const char *name);

/* Questions. */
const char *usli_j_type_name(usli_jval v); /* as Python's type(v).__name__ */
const char *usli_j_object(usli_jval v);    /* as jinja2 names it in errors: "dict object", "None" */
bool usli_j_truth(usli_jinja *j, usli_jval v);
bool usli_j_equal(usli_jinja *j, usli_jval a, usli_jval b);
int usli_j_compare(usli_jinja *j, usli_jval a, usli_jval b, const char *op); /* raises when they have no order */
bool usli_j_contains(usli_jinja *j, usli_jval box, usli_jval item);
bool usli_j_is_number(usli_jval v); /* bool counts, as in Python */
double usli_j_number(usli_jval v);
bool usli_j_is_text(usli_jval v, const char *text);
/* Raises unless v is an int (or a bool). */
int64_t usli_j_want_int(usli_jinja *j, usli_jval v, const char *what);
usli_jstr *usli_j_want_str(usli_jinja *j, usli_jval v, const char *what);
void usli_j_defined(usli_jinja *j, usli_jval v); /* raises when it is undefined */
/* A sequence with the items that iterating gives (a list is itself); spends a generator. */
usli_jseq *usli_j_iterate(usli_jinja *j, usli_jval v);
int64_t usli_j_length(usli_jinja *j, usli_jval v);

/* Values from JSON text and back (jinja_json.c). */
usli_jval usli_j_from_json(usli_jinja *j, const char *what, const char *text, size_t len);
usli_jval usli_j_to_json(usli_jinja *j, usli_jval self, usli_jval *a, const usli_jargs *raw);

/* Characters (jinja_chars.c). Positions are code points, as in Python. */
bool usli_j_is_space(int32_t code);
size_t usli_j_space_at(const char *p, const char *end);     /* bytes of a white-space character there; 0: none */
size_t usli_j_space_before(const char *p, const char *end); /* the same before end */
size_t usli_j_chars(usli_jinja *j, const usli_jstr *s);
size_t usli_j_offset(const usli_jstr *s, size_t chars); /* bytes before that character */
/* The first place of b in a at or after byte from; SIZE_MAX: none. */
size_t usli_j_search(usli_jinja *j, const usli_jstr *a, const usli_jstr *b, size_t from);
typedef enum usli_jcase { J_UPPER, J_LOWER, J_TITLE, J_CAPITAL, J_SWAP } usli_jcase;
usli_jval usli_j_case(usli_jinja *j, usli_jval text, usli_jcase how);
usli_jval usli_j_strip(usli_jinja *j, usli_jval text, usli_jval chars, bool left, bool right);
usli_jval usli_j_replace(usli_jinja *j, usli_jval text, usli_jval from, usli_jval to, int64_t count);
usli_jval usli_j_escape(usli_jinja *j, usli_jval v);
bool usli_j_printable(int32_t code);
usli_jval usli_j_format(usli_jinja *j, usli_jval format, usli_jval args); /* the % operator */

/* Rows (jinja_filters.c, jinja_tests.c, jinja_methods.c). NULL: there is none. */
const usli_jrow *usli_j_filter(const usli_jstr *name);
const usli_jrow *usli_j_test(const usli_jstr *name);
const usli_jrow *usli_j_method(usli_jval self, const usli_jstr *name, bool *unsafe);
extern const usli_jrow usli_j_globals[]; /* ends with a name of NULL */

/* At work (jinja_eval.c). */
void usli_j_tokenize(usli_jinja *j, const char *source, size_t len);
usli_jnode *usli_j_parse(usli_jinja *j);
usli_jval usli_j_call_row(usli_jinja *j, const usli_jrow *row, usli_jval self, const usli_jargs *args,
                          const char *what);
usli_jval usli_j_call(usli_jinja *j, usli_jval f, const usli_jargs *args);
usli_jval usli_j_attr(usli_jinja *j, usli_jval v, usli_jval name);
usli_jval usli_j_item(usli_jinja *j, usli_jval v, usli_jval key);
usli_jval usli_j_binary(usli_jinja *j, int op, usli_jval a, usli_jval b);

#endif
