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

usl_status usli_unicode_normalize(usl_ctx *ctx, const char *text, size_t len, int options, usli_buf *out) {
    if (is_ascii(text, len)) return usli_buf_add(ctx, out, text, len);
    const utf8proc_uint8_t *bytes = (const utf8proc_uint8_t *)text;
    utf8proc_option_t opts = (utf8proc_option_t)options;
    utf8proc_ssize_t need = utf8proc_decompose(bytes, (utf8proc_ssize_t)len, NULL, 0, opts);
    if (need < 0) return usli_fail(ctx, USL_ERR_INVALID, "the text cannot be normalised: %s", utf8proc_errmsg(need));
    utf8proc_int32_t *codes = usli_calloc(ctx, (size_t)need + 1, sizeof *codes);
    if (!codes) return usli_nomem(ctx, ((size_t)need + 1) * sizeof *codes);
    usl_status st = USL_OK;
    utf8proc_ssize_t n = utf8proc_decompose(bytes, (utf8proc_ssize_t)len, codes, need, opts);
    if (n >= 0) n = utf8proc_normalize_utf32(codes, n, opts);
    if (n < 0) st = usli_fail(ctx, USL_ERR_INVALID, "the text cannot be normalised: %s", utf8proc_errmsg(n));
    for (utf8proc_ssize_t i = 0; st == USL_OK && i < n; i++) st = usli_buf_code(ctx, out, codes[i]);
    usli_free(ctx, codes);
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
