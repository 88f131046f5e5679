/* A template's tokens, with the rules of white space around tags: trim_blocks, lstrip_blocks, and the signs - and +. */
#include <string.h>

#include "core/base/number.h"
#include "core/text/jinja_parts.h"
#include "core/text/parts.h"

typedef struct lexer {
    usli_jinja *j;
    const char *p, *end;
    const char *begin;
    size_t cap;
    int line;
    bool at_line_start; /* the last tag took the newline behind it */
} lexer;

static void emit(lexer *x, usli_jtoken_type type, int line, int op, usli_jval value) {
    usli_jinja *j = x->j;
    j->tokens = usli_j_grow(j, j->tokens, &x->cap, j->token_count + 1, sizeof *j->tokens);
    j->tokens[j->token_count++] = (usli_jtoken){ type, line, op, value };
}

_Noreturn static void fail(lexer *x, const char *what) {
    x->j->line = x->line;
    usli_j_raise(x->j, "%s", what);
}

/* Moves on, counting lines. */
static void advance(lexer *x, const char *to) {
    for (; x->p < to; x->p++)
        if (*x->p == '\n') x->line++;
}

static const char *skip_space(const char *p, const char *end) {
    for (size_t n; p < end && (n = usli_j_space_at(p, end)) > 0; p += n) continue;
    return p;
}

static bool starts(const char *p, const char *end, const char *word) {
    size_t n = strlen(word);
    return (size_t)(end - p) >= n && memcmp(p, word, n) == 0;
}

/* ---- Inside tags ---- */

static const char *digits(const char *p, const char *end) {
    const char *start = p;
    while (p < end &&
           ((*p >= '0' && *p <= '9') || (*p == '_' && p > start && p + 1 < end && p[1] >= '0' && p[1] <= '9')))
        p++;
    return p;
}

/* The digits without the signs between them. */
static char *plain_digits(lexer *x, const char *to) {
    char *text = usli_j_alloc(x->j, (size_t)(to - x->p) + 1), *w = text;
    for (const char *p = x->p; p < to; p++)
        if (*p != '_') *w++ = *p;
    return text;
}

static int64_t whole_number(lexer *x, const char *text, int base) {
    int64_t v = 0;
    for (; *text; text++) {
        int c = *text, d = c <= '9' ? c - '0' : (c | 32) - 'a' + 10;
        if (v > (INT64_MAX - d) / base) fail(x, "an integer here is too large");
        v = v * base + d;
    }
    return v;
}

static bool radix_number(lexer *x) {
    static const char LETTERS[] = "box";
    static const int BASES[] = { 2, 8, 16 };
    if (*x->p != '0' || x->end - x->p < 3) return false;
    const char *letter = strchr(LETTERS, x->p[1] | 32);
    if (!letter || !x->p[1]) return false;
    int base = BASES[letter - LETTERS];
    const char *p = x->p + 2;
    for (; p < x->end; p++) {
        int c = *p, d = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : 99;
        if (c != '_' && d >= base) break;
    }
    if (p == x->p + 2) return false;
    x->p += 2;
    emit(x, JT_INT, x->line, 0, usli_j_int(whole_number(x, plain_digits(x, p), base)));
    x->p = p;
    return true;
}

static void number(lexer *x) {
    if (radix_number(x)) return;
    const char *p = digits(x->p, x->end), *whole = p;
    bool real = false, after_point = x->p > x->begin && x->p[-1] == '.';
    if (!after_point) {
        if (p + 1 < x->end && *p == '.' && p[1] >= '0' && p[1] <= '9') {
            p = digits(p + 1, x->end);
            real = true;
        }
        const char *e = p;
        if (e < x->end && (*e | 32) == 'e') {
            e++;
            if (e < x->end && (*e == '+' || *e == '-')) e++;
            if (e < x->end && *e >= '0' && *e <= '9') {
                p = digits(e, x->end);
                real = true;
            }
        }
    }
    if (real)
        emit(x, JT_FLOAT, x->line, 0, usli_j_float(usli_number_parse(plain_digits(x, p))));
    else
        emit(x, JT_INT, x->line, 0, usli_j_int(whole_number(x, plain_digits(x, p = whole), 10)));
    x->p = p;
}

static int hex_value(const char *p, const char *end, int n, int32_t *out) {
    *out = 0;
    if (end - p < n) return 0;
    for (int i = 0; i < n; i++) {
        int c = p[i], d = c >= '0' && c <= '9'                 ? c - '0'
                          : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                               : -1;
        if (d < 0 || *out > 0x10FFFF) return 0;
        *out = *out * 16 + d;
    }
    return *out <= 0x10FFFF && (*out < 0xD800 || *out > 0xDFFF);
}

static void put_code(lexer *x, usli_jout *o, int32_t code) {
    char c[4];
    size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned char LEAD[] = { 0, 0, 0xC0, 0xE0, 0xF0 };
    for (size_t i = n; i-- > 1; code >>= 6) c[i] = (char)(0x80 | (code & 63));
    c[0] = (char)(LEAD[n] | code);
    usli_j_put(x->j, o, c, n);
}

/* One escape of Python's texts, p behind the backslash; returns what follows it. */
static const char *escape(lexer *x, usli_jout *o, const char *p, const char *end) {
    static const char FROM[] = "ntrabfv\\'\"", TO[] = "\n\t\r\a\b\f\v\\'\"";
    char c = *p++;
    const char *hit = c ? strchr(FROM, c) : NULL;
    int32_t code = 0;
    if (hit) {
        usli_j_put(x->j, o, &TO[hit - FROM], 1);
    } else if (c == '\n') {
        return p;
    } else if (c >= '0' && c <= '7') {
        code = c - '0';
        for (int i = 0; i < 2 && p < end && *p >= '0' && *p <= '7'; i++) code = code * 8 + *p++ - '0';
        put_code(x, o, code);
    } else if (c == 'x' || c == 'u' || c == 'U') {
        int n = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        if (!hex_value(p, end, n, &code)) fail(x, "a text holds a broken \\x, \\u or \\U escape");
        put_code(x, o, code);
        p += n;
    } else if (c == 'N') {
        fail(x, "\\N escapes are not supported; write \\u and the number");
    } else {
        usli_j_put(x->j, o, "\\", 1);
        return p - 1;
    }
    return p;
}

static void string(lexer *x) {
    const char *close = x->p + 1;
    while (close < x->end && *close != *x->p) close += *close == '\\' ? 2 : 1;
    if (close >= x->end) fail(x, "a text here has no end");
    usli_jout o = { 0 };
    for (const char *p = x->p + 1; p < close;) {
        const char *run = p;
        while (p < close && *p != '\\') p++;
        usli_j_put(x->j, &o, run, (size_t)(p - run));
        if (p < close) p = escape(x, &o, p + 1, close);
    }
    emit(x, JT_STRING, x->line, 0, usli_j_taken(x->j, &o));
    advance(x, close + 1);
}

static bool in_name(char c) {
    return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '_' || (unsigned char)c >= 0x80;
}

static void operation(lexer *x) {
    static const char *const PAIRS[] = { "**", "//", "==", "!=", ">=", "<=" };
    for (size_t i = 0; i < sizeof PAIRS / sizeof *PAIRS; i++)
        if (starts(x->p, x->end, PAIRS[i])) {
            emit(x, JT_OP, x->line, J_OP2(PAIRS[i][0], PAIRS[i][1]), usli_j_none());
            x->p += 2;
            return;
        }
    if (!*x->p || !strchr("+-/*%~[](){}><=.:|,;", *x->p)) {
        x->j->line = x->line;
        usli_j_raise(x->j, "unexpected character '%c'", *x->p >= ' ' ? *x->p : '?');
    }
    emit(x, JT_OP, x->line, *x->p, usli_j_none());
    x->p++;
}

/* The end of a tag, and the white space that it takes; NULL when it does not stand here. */
static const char *tag_end(const lexer *x, const char *close, bool block) {
    const char *p = x->p;
    char sign = *p == '-' || (block && *p == '+') ? *p++ : 0;
    if (!starts(p, x->end, close)) return NULL;
    p += 2;
    if (sign == '-') return skip_space(p, x->end);
    if (block && !sign && p < x->end && *p == '\n') p++;
    return p;
}

static void took(lexer *x, const char *to) {
    advance(x, to);
    x->at_line_start = to > x->begin && to[-1] == '\n';
}

static void inside(lexer *x, const char *close, bool block) {
    char stack[256];
    size_t depth = 0;
    for (;;) {
        advance(x, skip_space(x->p, x->end));
        if (x->p >= x->end) return; /* the parser says what is missing */
        const char *to = depth == 0 ? tag_end(x, close, block) : NULL;
        if (to) {
            emit(x, block ? JT_BLOCK_END : JT_VARIABLE_END, x->line, 0, usli_j_none());
            took(x, to);
            return;
        }
        char c = *x->p;
        if (c >= '0' && c <= '9') {
            number(x);
        } else if (c == '"' || c == '\'') {
            string(x);
        } else if (in_name(c)) {
            const char *start = x->p;
            while (x->p < x->end && in_name(*x->p)) x->p++;
            emit(x, JT_NAME, x->line, 0, usli_j_text(x->j, start, (size_t)(x->p - start)));
        } else {
            const char *open = strchr("([{", c), *shut = strchr(")]}", c);
            if (open) {
                if (depth == sizeof stack) fail(x, "brackets nest too deeply");
                stack[depth++] = c == '(' ? ')' : c == '[' ? ']' : '}';
            } else if (shut && (depth == 0 || stack[--depth] != c)) {
                x->j->line = x->line;
                usli_j_raise(x->j, "unexpected '%c'", c);
            }
            operation(x);
        }
    }
}

/* ---- Between tags ---- */

/* Emits the text before a tag at `tag` that begins with this sign; lstrip says that the tag may take the blanks before
 * it on its line. */
static void data(lexer *x, const char *tag, char sign, bool lstrip) {
    const char *start = x->p, *stop = tag;
    if (sign == '-') {
        for (size_t n; stop > start && (n = usli_j_space_before(start, stop)) > 0; stop -= n) continue;
    } else if (sign != '+' && lstrip) {
        const char *line = stop;
        while (line > start && line[-1] != '\n') line--;
        if ((line > start || x->at_line_start) && skip_space(line, stop) == stop) stop = line;
    }
    if (stop > start) emit(x, JT_DATA, x->line, 0, usli_j_text(x->j, start, (size_t)(stop - start)));
    advance(x, tag);
}

/* The tag {% word %} at p: what follows it, NULL when it is another. body: where its text begins or NULL. */
static const char *word_tag(const lexer *x, const char *p, const char *word, bool is_end) {
    p += 2;
    if (p < x->end && (*p == '-' || *p == '+')) p++;
    p = skip_space(p, x->end);
    if (!starts(p, x->end, word)) return NULL;
    p = skip_space(p + strlen(word), x->end);
    lexer here = *x;
    here.p = p;
    if (p >= x->end || (!is_end && *p == '+')) return NULL;
    if (is_end || *p == '-') return tag_end(&here, "%}", true);
    return starts(p, x->end, "%}") ? p + 2 : NULL; /* {% raw %} keeps the newline behind it */
}

static void raw(lexer *x, const char *body) {
    took(x, body);
    for (const char *p = x->p; p + 1 < x->end; p++) {
        const char *to = p[0] == '{' && p[1] == '%' ? word_tag(x, p, "endraw", true) : NULL;
        if (!to) continue;
        data(x, p, p[2], true);
        took(x, to);
        return;
    }
    fail(x, "missing end of raw directive");
}

static void comment(lexer *x) {
    for (const char *p = x->p; p + 1 < x->end; p++) {
        if (p[0] != '#' || p[1] != '}') continue;
        char sign = p > x->p ? p[-1] : 0;
        p += 2;
        if (sign == '-')
            p = skip_space(p, x->end);
        else if (sign != '+' && p < x->end && *p == '\n')
            p++;
        took(x, p);
        return;
    }
    fail(x, "missing end of comment tag");
}

/* Line ends become \n, and one at the very end goes. */
static size_t normalize(char *to, const char *from, size_t len) {
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (from[i] == '\r' && i + 1 < len && from[i + 1] == '\n') continue;
        to[n++] = from[i];
        if (from[i] == '\r') to[n - 1] = '\n';
    }
    return n && to[n - 1] == '\n' ? n - 1 : n;
}

void usli_j_tokenize(usli_jinja *j, const char *source, size_t len) {
    char *copy = usli_j_alloc(j, len + 1);
    size_t n = normalize(copy, source, len);
    lexer x = { .j = j, .p = copy, .begin = copy, .end = copy + n, .line = 1, .at_line_start = true };
    while (x.p < x.end) {
        const char *tag = x.p;
        while (tag + 1 < x.end && (tag[0] != '{' || (tag[1] != '%' && tag[1] != '{' && tag[1] != '#'))) tag++;
        if (tag + 1 >= x.end) {
            emit(&x, JT_DATA, x.line, 0, usli_j_text(j, x.p, (size_t)(x.end - x.p)));
            break;
        }
        char kind = tag[1], sign = tag + 2 < x.end ? tag[2] : 0;
        data(&x, tag, sign, kind != '{');
        const char *after_raw = kind == '%' ? word_tag(&x, tag, "raw", false) : NULL;
        if (after_raw) {
            raw(&x, after_raw);
            continue;
        }
        x.p += sign == '-' || sign == '+' ? 3 : 2;
        if (kind == '#') {
            comment(&x);
        } else {
            emit(&x, kind == '%' ? JT_BLOCK_BEGIN : JT_VARIABLE_BEGIN, x.line, 0, usli_j_none());
            inside(&x, kind == '%' ? "%}" : "}}", kind == '%');
        }
    }
    emit(&x, JT_END, x.line, 0, usli_j_none());
}
