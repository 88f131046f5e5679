#include "core/io/json.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/number.h"
#include "core/base/utf8.h"

enum { MAX_DEPTH = 512, BEFORE_VALUE = 0, AFTER_VALUE, FIRST_IN_ARRAY, FIRST_IN_OBJECT, BEFORE_KEY, AFTER_KEY, DONE };

void usli_json_init(usli_json_reader *r, usl_ctx *ctx, const char *name, const char *text, size_t len) {
    memset(r, 0, sizeof *r);
    r->ctx = ctx;
    r->name = name;
    r->text = r->pos = text;
    r->end = text + len;
    if (len >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) r->pos += 3;
    r->state = BEFORE_VALUE;
}

void usli_json_done(usli_json_reader *r) {
    usli_free(r->ctx, r->scratch);
    r->scratch = NULL;
    r->scratch_cap = 0;
}

static usl_status bad(usli_json_reader *r, const char *at, const char *what) {
    size_t line = 1;
    for (const char *p = r->text; p < at && p < r->end; p++) line += *p == '\n';
    return usli_fail(r->ctx, USL_ERR_FORMAT, "%s: line %zu: %s", r->name, line, what);
}

/* ---- Strings
 * ------------------------------------------------------------------------------------------------------------------ */

static int hex4(const char *p, const char *end) {
    int v = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
        if (d < 0) return -1;
        v = v * 16 + d;
    }
    return v;
}

static size_t put_utf8(char *out, unsigned cp) {
    if (cp < 0x80) return (void)(out[0] = (char)cp), 1;
    if (cp < 0x800) return (void)(out[0] = (char)(0xC0 | cp >> 6)), out[1] = (char)(0x80 | (cp & 63)), 2;
    if (cp < 0x10000) {
        out[0] = (char)(0xE0 | cp >> 12);
        out[1] = (char)(0x80 | (cp >> 6 & 63));
        out[2] = (char)(0x80 | (cp & 63));
        return 3;
    }
    out[0] = (char)(0xF0 | cp >> 18);
    out[1] = (char)(0x80 | (cp >> 12 & 63));
    out[2] = (char)(0x80 | (cp >> 6 & 63));
    out[3] = (char)(0x80 | (cp & 63));
    return 4;
}

/* *p at the backslash; a lone surrogate becomes U+FFFD. */
static usl_status escape(usli_json_reader *r, const char **p, char *out, size_t *n) {
    static const char FROM[] = "\"\\/bfnrt", TO[] = "\"\\/\b\f\n\r\t";
    const char *at = *p;
    if (r->end - at < 2) return bad(r, at, "the string is cut off");
    const char *hit = at[1] ? strchr(FROM, at[1]) : NULL;
    if (hit) {
        out[(*n)++] = TO[hit - FROM];
        *p = at + 2;
        return USL_OK;
    }
    int u = at[1] == 'u' ? hex4(at + 2, r->end) : -1;
    if (u < 0) return bad(r, at, "an escape in a string is not valid");
    at += 6;
    unsigned cp = (unsigned)u;
    if (u >= 0xD800 && u < 0xDC00 && r->end - at >= 6 && at[0] == '\\' && at[1] == 'u') {
        int low = hex4(at + 2, r->end);
        if (low >= 0xDC00 && low < 0xE000) {
            cp = 0x10000u + ((unsigned)(u - 0xD800) << 10) + (unsigned)(low - 0xDC00);
            at += 6;
        }
    }
    if (cp >= 0xD800 && cp < 0xE000) cp = 0xFFFD;
    *n += put_utf8(out + *n, cp);
    *p = at;
    return USL_OK;
}

static bool plain(unsigned char c) {
    return c >= 0x20 && c < 0x80 && c != '"' && c != '\\';
}

/* r->pos just after the opening quote. Without an escape the text itself is the string. */
static usl_status read_string(usli_json_reader *r) {
    const char *start = r->pos, *p = start;
    while (p < r->end && plain((unsigned char)*p)) p++;
    bool copied = false;
    size_t n = 0;
    for (;;) {
        if (p >= r->end) return bad(r, p, "the string is cut off");
        unsigned char c = (unsigned char)*p;
        if (c == '"') break;
        if (c < 0x20) return bad(r, p, "a string holds a raw control character; write it as \\u00XX");
        if (c == '\\') {
            /* Never longer than what is read; the rest of the string fits behind it. */
            if (!copied) {
                n = (size_t)(p - start);
                copied = true;
                USLI_TRY(usli_grow(r->ctx, &r->scratch, &r->scratch_cap, n + 64, 1));
                memcpy(r->scratch, start, n);
            }
            USLI_TRY(usli_grow(r->ctx, &r->scratch, &r->scratch_cap, n + 64, 1));
            USLI_TRY(escape(r, &p, r->scratch, &n));
            continue;
        }
        const char *run = p;
        while (p < r->end && plain((unsigned char)*p)) p++;
        if (p == run) {
            int len = usli_utf8_length(p, r->end);
            if (!len) return bad(r, p, "a string is not valid UTF-8; save the file as UTF-8");
            p += len;
        }
        if (copied) {
            size_t add = (size_t)(p - run);
            USLI_TRY(usli_grow(r->ctx, &r->scratch, &r->scratch_cap, n + add + 64, 1));
            memcpy(r->scratch + n, run, add);
            n += add;
        }
    }
    r->str = copied ? r->scratch : start;
    r->len = copied ? n : (size_t)(p - start);
    r->pos = p + 1;
    return USL_OK;
}

/* ---- Numbers and words
 * ----------------------------------------------------------------------------------------------------------- */

static bool digit(const char *p, const char *end) {
    return p < end && *p >= '0' && *p <= '9';
}

static usl_status read_number(usli_json_reader *r) {
    const char *p = r->pos, *start = p;
    bool real = false;
    if (*p == '-') p++;
    if (!digit(p, r->end)) return bad(r, start, "a value is expected (JSON knows no NaN, single quotes or comments)");
    if (*p == '0' && digit(p + 1, r->end)) return bad(r, start, "a number has a leading zero");
    while (digit(p, r->end)) p++;
    if (p < r->end && *p == '.') {
        real = true;
        if (!digit(++p, r->end)) return bad(r, start, "a number ends in its point");
        while (digit(p, r->end)) p++;
    }
    if (p < r->end && (*p == 'e' || *p == 'E')) {
        real = true;
        p++;
        if (p < r->end && (*p == '+' || *p == '-')) p++;
        if (!digit(p, r->end)) return bad(r, start, "a number has no exponent");
        while (digit(p, r->end)) p++;
    }
    char buf[512];
    size_t n = (size_t)(p - start);
    if (n >= sizeof buf) return bad(r, start, "a number has more than 500 characters");
    memcpy(buf, start, n);
    buf[n] = 0;
    r->pos = p;
    errno = 0;
    if (!real) {
        r->i = strtoll(buf, NULL, 10);
        if (errno == 0) {
            r->kind = USLI_JSON_INT;
            r->d = (double)r->i;
            return USL_OK;
        }
    }
    r->kind = USLI_JSON_FLOAT;
    r->d = usli_number_parse(buf);
    if (isinf(r->d)) return bad(r, start, "a number is too large");
    return USL_OK;
}

static usl_status read_word(usli_json_reader *r) {
    static const struct {
        const char *word;
        usli_json_kind kind;
        int64_t value;
    } WORDS[] = { { "true", USLI_JSON_BOOL, 1 }, { "false", USLI_JSON_BOOL, 0 }, { "null", USLI_JSON_NULL, 0 } };
    for (size_t i = 0; i < 3; i++) {
        size_t n = strlen(WORDS[i].word);
        if ((size_t)(r->end - r->pos) < n || memcmp(r->pos, WORDS[i].word, n) != 0) continue;
        r->pos += n;
        r->kind = WORDS[i].kind;
        r->i = WORDS[i].value;
        return USL_OK;
    }
    return read_number(r);
}

/* ---- Structure
 * ---------------------------------------------------------------------------------------------------------------------
 */

static bool in_object(const usli_json_reader *r) {
    return r->depth && (r->in_object[(r->depth - 1) / 64] >> ((r->depth - 1) % 64) & 1);
}

static usl_status push(usli_json_reader *r, bool object) {
    if (r->depth == MAX_DEPTH) return bad(r, r->pos, "values are nested deeper than 512");
    uint64_t bit = (uint64_t)1 << (r->depth % 64), *word = &r->in_object[r->depth / 64];
    *word = object ? *word | bit : *word & ~bit;
    r->depth++;
    r->pos++;
    r->kind = object ? USLI_JSON_OBJECT : USLI_JSON_ARRAY;
    r->state = object ? FIRST_IN_OBJECT : FIRST_IN_ARRAY;
    return USL_OK;
}

static usl_status pop(usli_json_reader *r) {
    r->kind = in_object(r) ? USLI_JSON_OBJECT_END : USLI_JSON_ARRAY_END;
    r->pos++;
    r->depth--;
    r->state = r->depth ? AFTER_VALUE : DONE;
    return USL_OK;
}

static void skip_space(usli_json_reader *r) {
    while (r->pos < r->end && (*r->pos == ' ' || *r->pos == '\n' || *r->pos == '\r' || *r->pos == '\t')) r->pos++;
}

static usl_status read_value(usli_json_reader *r) {
    if (r->pos >= r->end) return bad(r, r->pos, "the text ends where a value is expected");
    if (*r->pos == '{' || *r->pos == '[') return push(r, *r->pos == '{');
    if (*r->pos == '"') {
        r->pos++;
        USLI_TRY(read_string(r));
        r->kind = USLI_JSON_STRING;
    } else {
        USLI_TRY(read_word(r));
    }
    r->state = r->depth ? AFTER_VALUE : DONE;
    return USL_OK;
}

static usl_status read_key(usli_json_reader *r) {
    if (r->pos >= r->end || *r->pos != '"') return bad(r, r->pos, "a key in double quotes is expected");
    r->pos++;
    USLI_TRY(read_string(r));
    skip_space(r);
    if (r->pos >= r->end || *r->pos != ':') return bad(r, r->pos, "\":\" is expected after a key");
    r->pos++;
    r->kind = USLI_JSON_KEY;
    r->state = AFTER_KEY;
    return USL_OK;
}

usl_status usli_json_next(usli_json_reader *r) {
    skip_space(r);
    char c = r->pos < r->end ? *r->pos : 0;
    switch (r->state) {
    case DONE:
        if (r->pos < r->end) return bad(r, r->pos, "there is more text after the value");
        r->kind = USLI_JSON_END;
        return USL_OK;
    case FIRST_IN_ARRAY: return c == ']' ? pop(r) : read_value(r);
    case FIRST_IN_OBJECT: return c == '}' ? pop(r) : read_key(r);
    case AFTER_VALUE:
        if (c == (in_object(r) ? '}' : ']')) return pop(r);
        if (c != ',')
            return bad(r, r->pos, r->pos < r->end ? "\",\" or the end of the list is expected" : "the text is cut off");
        r->pos++;
        skip_space(r);
        return in_object(r) ? read_key(r) : read_value(r);
    default: return read_value(r);
    }
}

usl_status usli_json_skip(usli_json_reader *r) {
    if (r->kind == USLI_JSON_KEY) USLI_TRY(usli_json_next(r));
    if (r->kind != USLI_JSON_ARRAY && r->kind != USLI_JSON_OBJECT) return USL_OK;
    for (int depth = r->depth; r->depth >= depth;) USLI_TRY(usli_json_next(r));
    return USL_OK;
}

usl_status usli_json_expect(usli_json_reader *r, usli_json_kind kind, const char *what) {
    static const char *const KINDS[] = { "the end",
                                         "null",
                                         "true or false",
                                         "a whole number",
                                         "a number",
                                         "a string",
                                         "an array",
                                         "the end of an array",
                                         "an object",
                                         "a key",
                                         "the end of an object" };
    USLI_TRY(usli_json_next(r));
    if (r->kind == kind) return USL_OK;
    char text[160];
    snprintf(text, sizeof text, "%s should be %s", what, KINDS[kind]);
    return bad(r, r->pos, text);
}

bool usli_json_is(const usli_json_reader *r, const char *text) {
    return strlen(text) == r->len && memcmp(text, r->str, r->len) == 0;
}
