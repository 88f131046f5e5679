/* UTF-8 and what Unicode says about characters, from utf8proc's tables. */
#include <string.h>
#include <utf8proc.h>

#include "core/text/parts.h"

int32_t usli_utf8_get(const char *text) {
    const unsigned char *p = (const unsigned char *)text;
    if (p[0] < 0x80) return p[0];
    if (p[0] < 0xE0) return (p[0] & 31) << 6 | (p[1] & 63);
    if (p[0] < 0xF0) return (p[0] & 15) << 12 | (p[1] & 63) << 6 | (p[2] & 63);
    return (p[0] & 7) << 18 | (p[1] & 63) << 12 | (p[2] & 63) << 6 | (p[3] & 63);
}

/* The length of the sequence at p; or 0, and *bad is the length of its longest valid beginning, at least 1. */
static size_t sequence(const unsigned char *p, size_t left, size_t *bad) {
    unsigned c = p[0];
    if (c < 0x80) return 1;
    *bad = 1;
    if (c < 0xC2 || c > 0xF4) return 0;
    size_t n = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    unsigned low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    unsigned high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    for (size_t i = 1; i < n; i++, low = 0x80, high = 0xBF) {
        if (i >= left || p[i] < low || p[i] > high) return 0;
        *bad = i + 1;
    }
    return n;
}

size_t usli_utf8_valid(const char *text, size_t len, size_t *bad_len) {
    const unsigned char *p = (const unsigned char *)text;
    size_t i = 0;
    *bad_len = 0;
    while (i < len) {
        uint64_t eight;
        if (i + 8 <= len && (memcpy(&eight, p + i, 8), (eight & 0x8080808080808080u) == 0)) {
            i += 8;
            continue;
        }
        size_t bad, n = sequence(p + i, len - i, &bad);
        if (!n) {
            *bad_len = bad;
            return i;
        }
        i += n;
    }
    return len;
}

bool usli_is_space(int32_t c) {
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
    return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 ||
           c == 0x202F || c == 0x205F || c == 0x3000;
}

bool usli_is_numeric(int32_t c) {
    utf8proc_category_t k = utf8proc_category(c);
    return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
}

bool usli_is_punctuation(int32_t c) {
    if (c < 0x80) return (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) || (c >= 123 && c <= 126);
    utf8proc_category_t k = utf8proc_category(c);
    return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO;
}

bool usli_is_word(int32_t c) {
    utf8proc_category_t k = utf8proc_category(c);
    return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC;
}

static bool is_ascii(const char *text, size_t len) {
    unsigned char all = 0;
    for (size_t i = 0; i < len; i++) all |= (unsigned char)text[i];
    return all < 0x80;
}

typedef struct codes {
    int32_t *items;
    size_t count, cap;
} codes;

static usl_status bad_text(usl_ctx *ctx, utf8proc_ssize_t error) {
    return usli_fail(ctx, USL_ERR_INVALID, "the text cannot be normalised: %s", utf8proc_errmsg(error));
}

static usl_status decompose(usl_ctx *ctx, const char *text, size_t len, utf8proc_option_t options, codes *out) {
    for (size_t i = 0; i < len; i += usli_utf8_step(text[i])) {
        int boundary = 0;
        utf8proc_ssize_t n = 1;
        do {
            USLI_TRY(usli_grow(ctx, &out->items, &out->cap, out->count + (size_t)n, sizeof *out->items));
            size_t room = out->cap - out->count;
            n = utf8proc_decompose_char(usli_utf8_get(text + i), out->items + out->count, (utf8proc_ssize_t)room,
                                        options, &boundary);
            if (n < 0) return bad_text(ctx, n);
            if ((size_t)n <= room) break;
        } while (true);
        out->count += (size_t)n;
    }
    return USL_OK;
}

static int combining_class(int32_t code) {
    return (int)utf8proc_get_property(code)->combining_class;
}

/* Counts instead of comparing: a text may be one long run of marks. */
static void order_run(int32_t *run, size_t n, int32_t *spare) {
    size_t start[257] = { 0 };
    for (size_t i = 0; i < n; i++) start[combining_class(run[i]) + 1]++;
    for (int c = 0; c < 256; c++) start[c + 1] += start[c];
    for (size_t i = 0; i < n; i++) spare[start[combining_class(run[i])]++] = run[i];
    memcpy(run, spare, n * sizeof *run);
}

/* Sorts each run of combining marks by their class, keeping the order of equal ones. */
static usl_status order_marks(usl_ctx *ctx, codes *c) {
    int32_t *spare = NULL;
    for (size_t i = 0; i < c->count;) {
        size_t start = i;
        bool ordered = true;
        for (int last = 0, now; i < c->count && (now = combining_class(c->items[i])) != 0; i++, last = now)
            ordered = ordered && now >= last;
        if (!ordered && !spare && !(spare = usli_calloc(ctx, c->count, sizeof *spare)))
            return usli_nomem(ctx, c->count * sizeof *spare);
        if (!ordered) order_run(c->items + start, i - start, spare);
        if (i == start) i++;
    }
    usli_free(ctx, spare);
    return USL_OK;
}

usl_status usli_unicode_normalize(usl_ctx *ctx, const char *text, size_t len, int options, usli_buf *out) {
    if (is_ascii(text, len)) return usli_buf_add(ctx, out, text, len);
    utf8proc_option_t opts = (utf8proc_option_t)options;
    codes c = { 0 };
    usl_status st;
    USLI_TRYGO(decompose(ctx, text, len, opts, &c));
    USLI_TRYGO(order_marks(ctx, &c));
    utf8proc_ssize_t n = utf8proc_normalize_utf32(c.items, (utf8proc_ssize_t)c.count, opts);
    if (n < 0) st = bad_text(ctx, n);
    for (utf8proc_ssize_t i = 0; st == USL_OK && i < n; i++) st = usli_buf_code(ctx, out, c.items[i]);
done:
    usli_free(ctx, c.items);
    return st;
}

/* Bytes that print stand for themselves; the 68 others are moved up, in order, to 256 and beyond. */
static bool prints(int byte) {
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

int32_t usli_byte_char(unsigned char byte) {
    if (prints(byte)) return byte;
    if (byte <= 32) return 256 + byte;
    if (byte <= 160) return 256 + 33 + (byte - 127);
    return 256 + 67;
}

int usli_char_byte(int32_t c) {
    if (c < 256) return c >= 0 && prints(c) ? c : -1;
    if (c < 256 + 33) return c - 256;
    if (c < 256 + 67) return c - 256 - 33 + 127;
    return c == 256 + 67 ? 173 : -1;
}
