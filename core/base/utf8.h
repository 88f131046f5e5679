/* Questions about UTF-8 that several floors ask. */
#ifndef USLI_BASE_UTF8_H
#define USLI_BASE_UTF8_H

#include <stdbool.h>
#include <string.h>

/* Length of the sequence at text, 0 when it is none (overlong, surrogate, too large, cut off). text < end. */
static inline int usli_utf8_length(const char *text, const char *end) {
    const unsigned char *p = (const unsigned char *)text;
    unsigned c = *p;
    if (c < 0x80) return 1;
    int n = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
    if (c < 0xC2 || c > 0xF4 || end - text < n) return 0;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((c == 0xE0 && p[1] < 0xA0) || (c == 0xED && p[1] > 0x9F) || (c == 0xF0 && p[1] < 0x90) ||
        (c == 0xF4 && p[1] > 0x8F))
        return 0;
    return n;
}

static inline bool usli_utf8_is_text(const char *text) {
    const char *end = text + strlen(text);
    for (int n; text < end; text += n)
        if (!(n = usli_utf8_length(text, end))) return false;
    return true;
}

#endif
