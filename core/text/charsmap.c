/* SentencePiece's precompiled map of characters, as T5, XLM-R and their like have it in tokenizer.json: the bytes of a
 * trie (a double array of 32-bit units, as Darts writes it), then the replacements, each with a 0 behind it.
 *
 * What is looked up is what Hugging Face's tokenizers look up: a grapheme of up to five bytes whole, else its
 * characters one by one. Of all beginnings that the trie knows the shortest counts, and stands for the whole. */
#include <string.h>
#include <utf8proc.h>

#include "core/text/parts.h"

enum { SHORT = 6 }; /* bytes: graphemes below are looked up whole */

/* -1: it is not of the alphabet. */
static int digit_of(char c) {
    static const char DIGITS[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c ? strchr(DIGITS, c) : NULL;
    return at ? (int)(at - DIGITS) : -1;
}

/* Decodes base64 in place; false: it is none. */
static bool from_base64(char *text, size_t *len) {
    size_t n = *len, out = 0;
    uint32_t bits = 0;
    int count = 0;
    while (n && text[n - 1] == '=') n--;
    for (size_t i = 0; i < n; i++) {
        int digit = digit_of(text[i]);
        if (digit < 0) return false;
        bits = bits << 6 | (uint32_t)digit;
        count += 6;
        if (count < 8) continue;
        count -= 8;
        text[out++] = (char)(bits >> count & 255);
    }
    *len = out;
    return true;
}

static uint32_t unit_at(const char *units, size_t i) {
    const unsigned char *p = (const unsigned char *)units + 4 * i;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

usl_status usli_charsmap_read(usl_ctx *ctx, const char *base64, size_t len, usli_step *step) {
    if (!(step->text = usli_strndup(ctx, base64, len))) return usli_nomem(ctx, len + 1);
    step->text_len = len;
    bool sound = from_base64(step->text, &step->text_len) && step->text_len >= 8;
    step->left = sound ? (int64_t)unit_at(step->text, 0) : 0;
    size_t after = step->text_len - 4, words = after - (size_t)step->left, broken;
    sound = sound && step->left >= 4 && step->left % 4 == 0 && (uint64_t)step->left < after &&
            step->text[step->text_len - 1] == 0 &&
            usli_utf8_valid(step->text + 4 + step->left, words, &broken) == words;
    return sound ? USL_OK : usli_fail(ctx, USL_ERR_FORMAT, "Precompiled needs a valid \"precompiled_charsmap\"");
}

static size_t offset_of(uint32_t unit) {
    return (size_t)(unit >> 10) << ((unit & 1u << 9) >> 6);
}

/* What stands for a text; NULL: nothing does. */
static const char *look_up(const usli_step *step, const char *text, size_t len) {
    const char *units = step->text + 4, *words = units + step->left;
    size_t count = (size_t)step->left / 4, most = step->text_len - 4 - (size_t)step->left;
    size_t at = offset_of(unit_at(units, 0));
    for (size_t i = 0; i < len && text[i]; i++) {
        at ^= (unsigned char)text[i];
        if (at >= count) return NULL;
        uint32_t unit = unit_at(units, at);
        if ((unit & (1u << 31 | 255u)) != (unsigned char)text[i]) return NULL;
        at ^= offset_of(unit);
        if (!(unit >> 8 & 1)) continue;
        if (at >= count) return NULL;
        size_t place = unit_at(units, at) & ~(1u << 31);
        if (place >= most || (words[place] & 0xC0) == 0x80) return NULL; /* not the beginning of a character */
        return words + place;                                            /* a 0 ends the last one */
    }
    return NULL;
}

/* The end of the grapheme that begins at `at`. */
static size_t grapheme_end(const char *text, size_t len, size_t at) {
    utf8proc_int32_t state = 0;
    int32_t c = usli_utf8_get(text + at);
    for (at += usli_utf8_step(text[at]); at < len; at += usli_utf8_step(text[at])) {
        int32_t next = usli_utf8_get(text + at);
        if (utf8proc_grapheme_break_stateful(c, next, &state)) break;
        c = next;
    }
    return at;
}

usl_status usli_charsmap_apply(usl_ctx *ctx, const usli_step *step, const char *text, size_t len, usli_buf *out) {
    for (size_t at = 0, end; at < len; at = end) {
        end = grapheme_end(text, len, at);
        const char *whole = end - at < SHORT ? look_up(step, text + at, end - at) : NULL;
        if (whole) {
            USLI_TRY(usli_buf_text(ctx, out, whole));
            continue;
        }
        for (size_t n; at < end; at += n) {
            n = usli_utf8_step(text[at]);
            const char *one = look_up(step, text + at, n);
            USLI_TRY(one ? usli_buf_text(ctx, out, one) : usli_buf_add(ctx, out, text + at, n));
        }
    }
    return USL_OK;
}
