/* Text of strangers (model files, data sets, answers) on a terminal: what would steer it is shown, not obeyed. */
#include <stdio.h>
#include <string.h>

#include "lua/binding.h"

/* The bytes of the character at s; 0 when it is no UTF-8. */
static size_t character(const unsigned char *s, size_t len) {
    size_t n = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    if (n > len) return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    return n;
}

/* The controls: those of ASCII, and U+0080 to U+009F. */
static bool steers(const unsigned char *s, size_t n) {
    return n == 0 || (n == 1 && (s[0] < 32 || s[0] == 127)) || (n == 2 && s[0] == 0xC2 && s[1] < 0xA0);
}

size_t ulua_plain_next(const char *text, size_t len, bool one_line, ulua_plain *out) {
    const unsigned char *s = (const unsigned char *)text;
    size_t n = character(s, len);
    out->text = text;
    out->len = n;
    if (!steers(s, n)) return n;
    if (*text == '\n' || *text == '\t') {
        if (one_line) out->len = (size_t)sprintf(out->buf, *text == '\n' ? "\\n" : "\\t");
    } else {
        out->len = 0;
        for (size_t i = 0; i < (n ? n : 1); i++) out->len += (size_t)sprintf(out->buf + out->len, "\\x%02X", s[i]);
    }
    if (out->len != n) out->text = out->buf;
    return n ? n : 1;
}

void ulua_plain_write(FILE *f, const char *text) {
    ulua_plain part;
    for (size_t len = strlen(text); len;) {
        size_t n = ulua_plain_next(text, len, false, &part);
        fwrite(part.text, 1, part.len, f);
        text += n;
        len -= n;
    }
}

int ulua_printable(lua_State *L) {
    size_t len;
    const char *text = luaL_checklstring(L, 1, &len);
    bool one_line = lua_toboolean(L, 2);
    ulua_plain part;
    luaL_Buffer b;
    luaL_buffinit(L, &b);
    while (len) {
        size_t n = ulua_plain_next(text, len, one_line, &part);
        luaL_addlstring(&b, part.text, part.len);
        text += n;
        len -= n;
    }
    luaL_pushresult(&b);
    return 1;
}
