/* JSON in and out of Lua. Decoding goes through a tape: the visitor only appends bytes, and the Lua value is built when
 * core has returned. A decoded object is a plain table whose metatable knows the order of its keys; objects with the
 * same keys share one metatable, so a data set of a million rows has one. An array's metatable says that it is one,
 * also when it is empty. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lua/binding.h"

/* ---- The tape ---- */

typedef enum tape_tag {
    TAPE_NULL,
    TAPE_FALSE,
    TAPE_TRUE,
    TAPE_INT,
    TAPE_REAL,
    TAPE_STRING,
    TAPE_KEY,
    TAPE_ARRAY,
    TAPE_OBJECT,
    TAPE_END
} tape_tag;

struct ulua_tape {
    char *data;
    size_t len, cap;
    bool no_memory;
};

static int tape_put(ulua_tape *tape, tape_tag tag, const void *payload, size_t payload_len, const void *text,
                    size_t text_len) {
    size_t need = 1 + payload_len + text_len;
    if (tape->cap - tape->len < need) {
        size_t cap = tape->cap ? tape->cap : 256;
        while (cap - tape->len < need && cap < SIZE_MAX / 2) cap *= 2;
        char *data = cap - tape->len < need ? NULL : realloc(tape->data, cap);
        if (!data) {
            tape->no_memory = true;
            return 1;
        }
        tape->data = data;
        tape->cap = cap;
    }
    tape->data[tape->len++] = (char)tag;
    if (payload_len) memcpy(tape->data + tape->len, payload, payload_len);
    tape->len += payload_len;
    if (text_len) memcpy(tape->data + tape->len, text, text_len);
    tape->len += text_len;
    return 0;
}

static int on_null(void *ud) {
    return tape_put(ud, TAPE_NULL, NULL, 0, NULL, 0);
}
static int on_boolean(void *ud, int value) {
    return tape_put(ud, value ? TAPE_TRUE : TAPE_FALSE, NULL, 0, NULL, 0);
}
static int on_integer(void *ud, int64_t value) {
    return tape_put(ud, TAPE_INT, &value, sizeof value, NULL, 0);
}
static int on_real(void *ud, double value) {
    return tape_put(ud, TAPE_REAL, &value, sizeof value, NULL, 0);
}
static int on_string(void *ud, const char *text, size_t len) {
    return tape_put(ud, TAPE_STRING, &len, sizeof len, text, len);
}
static int on_key(void *ud, const char *text, size_t len) {
    return tape_put(ud, TAPE_KEY, &len, sizeof len, text, len);
}
static int on_array(void *ud) {
    return tape_put(ud, TAPE_ARRAY, NULL, 0, NULL, 0);
}
static int on_object(void *ud) {
    return tape_put(ud, TAPE_OBJECT, NULL, 0, NULL, 0);
}
static int on_end(void *ud) {
    return tape_put(ud, TAPE_END, NULL, 0, NULL, 0);
}

const usl_json_visitor ulua_tape_visitor = { sizeof(usl_json_visitor),
                                             on_null,
                                             on_boolean,
                                             on_integer,
                                             on_real,
                                             on_string,
                                             on_array,
                                             on_end,
                                             on_object,
                                             on_key,
                                             on_end };

static int tape_free(lua_State *L) {
    ulua_tape *tape = lua_touserdata(L, 1);
    free(tape->data);
    memset(tape, 0, sizeof *tape);
    return 0;
}

ulua_tape *ulua_tape_new(lua_State *L) {
    ulua_tape *tape = lua_newuserdatauv(L, sizeof *tape, 0);
    memset(tape, 0, sizeof *tape);
    if (luaL_newmetatable(L, "unsloth.tape")) {
        lua_pushcfunction(L, tape_free);
        lua_setfield(L, -2, "__gc");
        lua_pushcfunction(L, tape_free);
        lua_setfield(L, -2, "__close");
    }
    lua_setmetatable(L, -2);
    return tape;
}

void ulua_tape_clear(ulua_tape *tape) {
    tape->len = 0;
    tape->no_memory = false;
}

int ulua_tape_raise(lua_State *L, const ulua_tape *tape, usl_status st) {
    if (tape->no_memory) return ulua_fail(L, USL_ERR_NOMEM, "out of memory while reading JSON");
    return ulua_raise(L, st);
}

/* ---- Metatables ---- */

static const char ARRAY_NAME[] = "unsloth.json.array", OBJECT_NAME[] = "unsloth.json.object",
                  NULL_NAME[] = "unsloth.json.null", SHAPES_NAME[] = "unsloth.json.shapes";

static void push_null(lua_State *L) {
    lua_getfield(L, LUA_REGISTRYINDEX, NULL_NAME);
}

static bool is_null(lua_State *L, int idx) {
    idx = lua_absindex(L, idx);
    push_null(L);
    bool same = lua_rawequal(L, idx, -1);
    lua_pop(L, 1);
    return same;
}

/* The ordered keys of the object at idx that hold a value now, then new ones sorted: pushes an array. */
static void push_keys(lua_State *L, int idx);

/* The iterator of pairs: upvalues keys, position. */
static int next_pair(lua_State *L) {
    for (;;) {
        lua_Integer i = lua_tointeger(L, lua_upvalueindex(2)) + 1;
        lua_pushinteger(L, i);
        lua_replace(L, lua_upvalueindex(2));
        if (lua_rawgeti(L, lua_upvalueindex(1), i) == LUA_TNIL) return 1;
        lua_pushvalue(L, -1);
        if (lua_rawget(L, 1) != LUA_TNIL) return 2;
        lua_pop(L, 2); /* removed while the loop ran */
    }
}

static int object_pairs(lua_State *L) {
    luaL_checktype(L, 1, LUA_TTABLE);
    push_keys(L, 1);
    lua_pushinteger(L, 0);
    lua_pushcclosure(L, next_pair, 2);
    lua_pushvalue(L, 1);
    return 2;
}

/* Keys array on top: leaves the metatable that objects with these keys share. */
static void push_shape(lua_State *L) {
    int keys = lua_gettop(L);
    lua_getfield(L, LUA_REGISTRYINDEX, SHAPES_NAME);
    luaL_Buffer b;
    luaL_buffinit(L, &b);
    for (lua_Integer i = 1, n = (lua_Integer)lua_rawlen(L, keys); i <= n; i++) {
        lua_rawgeti(L, keys, i);
        size_t len = (size_t)lua_rawlen(L, -1);
        char head[32];
        snprintf(head, sizeof head, "%zu:", len);
        lua_pop(L, 1);
        luaL_addstring(&b, head);
        lua_rawgeti(L, keys, i);
        luaL_addvalue(&b);
    }
    luaL_pushresult(&b);
    lua_pushvalue(L, -1);
    if (lua_rawget(L, keys + 1) == LUA_TNIL) {
        lua_pop(L, 1);
        lua_createtable(L, 0, 3);
        lua_pushvalue(L, keys);
        lua_setfield(L, -2, "keys");
        lua_pushcfunction(L, object_pairs);
        lua_setfield(L, -2, "__pairs");
        lua_pushstring(L, OBJECT_NAME);
        lua_setfield(L, -2, "__name");
        lua_pushvalue(L, -2);
        lua_pushvalue(L, -2);
        lua_rawset(L, keys + 1);
    }
    lua_replace(L, keys);
    lua_settop(L, keys);
}

static bool has_name(lua_State *L, int idx, const char *name) {
    if (!lua_getmetatable(L, idx)) return false;
    lua_pushstring(L, "__name");
    lua_rawget(L, -2);
    const char *have = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : "";
    bool same = strcmp(have, name) == 0;
    lua_pop(L, 2);
    return same;
}

static void sort_keys(lua_State *L, int from, int to);

static void push_keys(lua_State *L, int idx) {
    idx = lua_absindex(L, idx);
    lua_newtable(L);
    int out = lua_gettop(L);
    lua_newtable(L);
    int seen = out + 1;
    lua_Integer n = 0;
    if (has_name(L, idx, OBJECT_NAME)) {
        lua_getmetatable(L, idx);
        lua_getfield(L, -1, "keys");
        for (lua_Integer i = 1; lua_rawgeti(L, -1, i) != LUA_TNIL; i++) {
            lua_pushvalue(L, -1);
            if (lua_rawget(L, idx) != LUA_TNIL) {
                lua_pushvalue(L, -2);
                lua_rawseti(L, out, ++n);
                lua_pushvalue(L, -2);
                lua_pushboolean(L, 1);
                lua_rawset(L, seen);
            }
            lua_pop(L, 2);
        }
        lua_settop(L, seen);
    }
    lua_Integer ordered = n;
    for (lua_pushnil(L); lua_next(L, idx); lua_pop(L, 1)) {
        lua_pushvalue(L, -2);
        bool is_new = lua_rawget(L, seen) == LUA_TNIL;
        lua_pop(L, 1);
        if (!is_new) continue;
        lua_pushvalue(L, -2);
        lua_rawseti(L, out, ++n);
    }
    lua_settop(L, out);
    if (n - ordered > 1) sort_keys(L, (int)ordered + 1, (int)n);
}

static bool text_less(lua_State *L, int ia, int ib) {
    size_t na, nb;
    const char *a = lua_tolstring(L, ia, &na), *b = lua_tolstring(L, ib, &nb);
    int order = memcmp(a, b, na < nb ? na : nb);
    return order ? order < 0 : na < nb;
}

/* Lua has no stable order of its own, so keys that nobody ordered come sorted. Only strings are compared as strings,
 * by their bytes, since Lua's own comparison follows the locale; anything else keeps its place, and encoding refuses it
 * later. The array is on top. Heap sort: no recursion, no surprise. */
static bool key_less(lua_State *L, int a, int b) {
    lua_rawgeti(L, -1, a);
    lua_rawgeti(L, -2, b);
    bool both = lua_type(L, -1) == LUA_TSTRING && lua_type(L, -2) == LUA_TSTRING;
    bool less = both ? text_less(L, -2, -1) : lua_type(L, -2) > lua_type(L, -1);
    lua_pop(L, 2);
    return less;
}

static void swap_keys(lua_State *L, int a, int b) {
    lua_rawgeti(L, -1, a);
    lua_rawgeti(L, -2, b);
    lua_rawseti(L, -3, a);
    lua_rawseti(L, -2, b);
}

static void sift_down(lua_State *L, int from, int root, int count) {
    for (int child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && key_less(L, from + child, from + child + 1)) child++;
        if (!key_less(L, from + root, from + child)) return;
        swap_keys(L, from + root, from + child);
    }
}

static void sort_keys(lua_State *L, int from, int to) {
    int count = to - from + 1;
    for (int i = count / 2; i-- > 0;) sift_down(L, from, i, count);
    for (int i = count - 1; i > 0; i--) {
        swap_keys(L, from, from + i);
        sift_down(L, from, 0, i);
    }
}

/* ---- Tape to values ---- */

typedef struct tape_reader {
    const char *pos, *end;
    bool row;
} tape_reader;

static bool push_value(lua_State *L, tape_reader *r);

static size_t take_text(tape_reader *r) {
    size_t len;
    memcpy(&len, r->pos, sizeof len);
    r->pos += sizeof len;
    return len;
}

static void push_array(lua_State *L, tape_reader *r) {
    lua_newtable(L);
    for (lua_Integer n = 0; *r->pos != TAPE_END;) {
        if (!push_value(L, r)) push_null(L);
        lua_rawseti(L, -2, ++n);
    }
    r->pos++;
    luaL_setmetatable(L, ARRAY_NAME);
}

static void push_object(lua_State *L, tape_reader *r) {
    lua_newtable(L);
    lua_newtable(L); /* keys */
    int object = lua_gettop(L) - 1;
    for (lua_Integer n = 0; *r->pos != TAPE_END;) {
        r->pos++;
        size_t len = take_text(r);
        lua_pushlstring(L, r->pos, len);
        r->pos += len;
        lua_pushvalue(L, -1);
        bool is_new = lua_rawget(L, object) == LUA_TNIL;
        lua_pop(L, 1);
        if (is_new) {
            lua_pushvalue(L, -1);
            lua_rawseti(L, object + 1, ++n);
        }
        if (!push_value(L, r)) {
            if (r->row)
                lua_pushnil(L);
            else
                push_null(L);
        }
        lua_rawset(L, object);
    }
    r->pos++;
    push_shape(L);
    lua_setmetatable(L, object);
}

/* False for null, which pushes nothing: the caller knows what null is there. */
static bool push_value(lua_State *L, tape_reader *r) {
    luaL_checkstack(L, 12, "JSON nests too deeply");
    int64_t i;
    double d;
    size_t len;
    switch ((tape_tag)*r->pos++) {
    case TAPE_NULL: return false;
    case TAPE_FALSE: lua_pushboolean(L, 0); break;
    case TAPE_TRUE: lua_pushboolean(L, 1); break;
    case TAPE_INT:
        memcpy(&i, r->pos, sizeof i);
        r->pos += sizeof i;
        lua_pushinteger(L, i);
        break;
    case TAPE_REAL:
        memcpy(&d, r->pos, sizeof d);
        r->pos += sizeof d;
        lua_pushnumber(L, d);
        break;
    case TAPE_STRING:
        len = take_text(r);
        lua_pushlstring(L, r->pos, len);
        r->pos += len;
        break;
    case TAPE_ARRAY: push_array(L, r); break;
    case TAPE_OBJECT: push_object(L, r); break;
    case TAPE_KEY:
    case TAPE_END: return false;
    }
    return true;
}

void ulua_tape_push(lua_State *L, const ulua_tape *tape, bool row) {
    tape_reader r = { tape->data, tape->data + tape->len, row };
    if (tape->len == 0 || !push_value(L, &r)) push_null(L);
}

static int json_decode(lua_State *L) {
    size_t len;
    const char *text = luaL_checklstring(L, 1, &len);
    const char *name = luaL_optstring(L, 2, "JSON");
    ulua_tape *tape = ulua_tape_new(L);
    lua_toclose(L, lua_gettop(L));
    usl_status st = usl_json_visit(unsloth_lua_ctx(L), name, text, len, &ulua_tape_visitor, tape);
    if (st != USL_OK) return ulua_tape_raise(L, tape, st);
    ulua_tape_push(L, tape, false);
    return 1;
}

/* ---- Values to text ---- */

typedef struct writer {
    lua_State *L;
    int slot; /* of the buffer's userdata */
    char *data;
    size_t len, cap;
    int indent; /* 0: compact */
} writer;

static void put(writer *w, const char *text, size_t len) {
    if (w->cap - w->len < len) {
        size_t cap = w->cap * 2 > w->len + len ? w->cap * 2 : w->len + len + 64;
        char *data = ulua_buffer(w->L, cap);
        if (w->len) memcpy(data, w->data, w->len);
        lua_replace(w->L, w->slot);
        w->data = data;
        w->cap = cap;
    }
    memcpy(w->data + w->len, text, len);
    w->len += len;
}

static void puts_(writer *w, const char *text) {
    put(w, text, strlen(text));
}

static void new_line(writer *w, int depth) {
    if (!w->indent) return;
    puts_(w, "\n");
    for (int i = 0; i < depth * w->indent; i++) puts_(w, " ");
}

static void put_string(writer *w, const char *s, size_t len) {
    puts_(w, "\"");
    size_t done = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        put(w, s + done, i - done);
        done = i + 1;
        static const char PLAIN[] = "\"\\\b\f\n\r\t", LETTER[] = "\"\\bfnrt";
        const char *at = c ? strchr(PLAIN, c) : NULL;
        char escape[8];
        if (at)
            snprintf(escape, sizeof escape, "\\%c", LETTER[at - PLAIN]);
        else
            snprintf(escape, sizeof escape, "\\u%04x", (unsigned)c);
        puts_(w, escape);
    }
    put(w, s + done, len - done);
    puts_(w, "\"");
}

/* A host's locale may write another sign, of several bytes even, where JSON wants a point. */
static void point_it(char *text) {
    char *to = text;
    for (const char *from = text; *from;) {
        if (strchr("0123456789+-e", *from)) {
            *to++ = *from++;
        } else {
            *to++ = '.';
            while (*from && !strchr("0123456789+-e", *from)) from++;
        }
    }
    *to = '\0';
}

/* The shortest digits that read back as the same number, laid out as Python's repr does, so that a float stays a float.
 */
static void put_real(writer *w, double v) {
    if (!isfinite(v))
        ulua_fail(w->L, USL_ERR_INVALID, "JSON has no word for %f: encode a finite number or json.null", v);
    char digits[40], text[64];
    int precision = 0;
    do snprintf(digits, sizeof digits, "%.*e", precision, v);
    while (strtod(digits, NULL) != v && precision++ < 17);
    int exponent = atoi(strchr(digits, 'e') + 1);
    if (exponent >= -4 && exponent < 16)
        snprintf(text, sizeof text, "%.*f", precision - exponent > 1 ? precision - exponent : 1, v);
    else
        snprintf(text, sizeof text, "%s", digits);
    point_it(text);
    puts_(w, text);
}

static void put_value(writer *w, int idx, int depth);

/* Arrays are what decode made, what json.array marked, and plain tables whose keys are 1 .. n. */
static bool is_array(lua_State *L, int idx) {
    if (has_name(L, idx, ARRAY_NAME)) return true;
    if (has_name(L, idx, OBJECT_NAME)) return false;
    lua_Integer n = (lua_Integer)lua_rawlen(L, idx), seen = 0;
    for (lua_pushnil(L); lua_next(L, idx); lua_pop(L, 1)) {
        if (!lua_isinteger(L, -2) || lua_tointeger(L, -2) < 1 || lua_tointeger(L, -2) > n) {
            lua_pop(L, 2);
            return false;
        }
        seen++;
    }
    return n > 0 && seen == n;
}

static void put_array(writer *w, int idx, int depth) {
    lua_Integer n = (lua_Integer)lua_rawlen(w->L, idx);
    puts_(w, "[");
    for (lua_Integer i = 1; i <= n; i++) {
        if (i > 1) puts_(w, ",");
        new_line(w, depth + 1);
        lua_rawgeti(w->L, idx, i);
        put_value(w, lua_gettop(w->L), depth + 1);
        lua_pop(w->L, 1);
    }
    if (n) new_line(w, depth);
    puts_(w, "]");
}

static void put_object(writer *w, int idx, int depth) {
    lua_State *L = w->L;
    push_keys(L, idx);
    int keys = lua_gettop(L);
    lua_Integer n = (lua_Integer)lua_rawlen(L, keys);
    puts_(w, "{");
    for (lua_Integer i = 1; i <= n; i++) {
        if (i > 1) puts_(w, ",");
        new_line(w, depth + 1);
        lua_rawgeti(L, keys, i);
        if (lua_type(L, -1) != LUA_TSTRING)
            ulua_fail(L, USL_ERR_INVALID, "JSON keys are strings: a table holds the key %s beside others",
                      luaL_tolstring(L, -1, NULL));
        size_t len;
        const char *key = lua_tolstring(L, -1, &len);
        put_string(w, key, len);
        puts_(w, w->indent ? ": " : ":");
        lua_rawget(L, idx);
        put_value(w, lua_gettop(L), depth + 1);
        lua_pop(L, 1);
    }
    if (n) new_line(w, depth);
    puts_(w, "}");
    lua_settop(L, keys - 1);
}

static void put_value(writer *w, int idx, int depth) {
    lua_State *L = w->L;
    if (depth > 512) ulua_fail(L, USL_ERR_INVALID, "a value nests deeper than 512 levels, or holds itself");
    luaL_checkstack(L, 12, "JSON nests too deeply");
    size_t len;
    const char *text;
    char number[32];
    switch (lua_type(L, idx)) {
    case LUA_TNIL: puts_(w, "null"); return;
    case LUA_TBOOLEAN: puts_(w, lua_toboolean(L, idx) ? "true" : "false"); return;
    case LUA_TNUMBER:
        if (!lua_isinteger(L, idx)) {
            put_real(w, lua_tonumber(L, idx));
            return;
        }
        snprintf(number, sizeof number, "%lld", (long long)lua_tointeger(L, idx));
        puts_(w, number);
        return;
    case LUA_TSTRING:
        text = lua_tolstring(L, idx, &len);
        put_string(w, text, len);
        return;
    case LUA_TTABLE:
        if (is_array(L, idx))
            put_array(w, idx, depth);
        else
            put_object(w, idx, depth);
        return;
    default:
        if (!is_null(L, idx)) ulua_fail(L, USL_ERR_INVALID, "JSON has no word for a %s", luaL_typename(L, idx));
        puts_(w, "null");
    }
}

static void encode_value(lua_State *L, int idx, int indent) {
    idx = lua_absindex(L, idx);
    lua_pushnil(L);
    writer w = { L, lua_gettop(L), NULL, 0, 0, indent };
    put_value(&w, idx, 0);
    lua_pushlstring(L, w.data, w.len);
    lua_replace(L, w.slot);
}

void ulua_json_encode(lua_State *L, int idx) {
    encode_value(L, idx, 0);
}

static int json_encode(lua_State *L) {
    luaL_checkany(L, 1);
    lua_settop(L, 2);
    int indent = 0;
    if (!lua_isnil(L, 2)) {
        static const ulua_option LIST[] = { { "indent", ULUA_INT, 0 } };
        ulua_options(L, 2, "json.encode", LIST, 1, NULL, &indent);
        if (indent < 0 || indent > 16)
            return ulua_fail(L, USL_ERR_INVALID, "json.encode: indent is 0 to 16, not %d", indent);
    }
    encode_value(L, 1, indent);
    return 1;
}

/* array(t) marks a table as an array, also when it is empty. */
static int json_array(lua_State *L) {
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_settop(L, 1);
    luaL_setmetatable(L, ARRAY_NAME);
    return 1;
}

/* object(t, keys) gives a table an order of keys; is_array and is_object ask. */
static int json_object(lua_State *L) {
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_settop(L, 2);
    if (lua_isnil(L, 2)) {
        lua_newtable(L);
        lua_replace(L, 2);
    }
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_newtable(L); /* a copy: the shape keeps it */
    lua_Integer n = (lua_Integer)lua_rawlen(L, 2);
    for (lua_Integer i = 1; i <= n; i++) {
        lua_rawgeti(L, 2, i);
        luaL_checktype(L, -1, LUA_TSTRING);
        lua_rawseti(L, 3, i);
    }
    push_shape(L);
    lua_setmetatable(L, 1);
    lua_settop(L, 1);
    return 1;
}

static int json_is_array(lua_State *L) {
    lua_pushboolean(L, lua_istable(L, 1) && is_array(L, 1));
    return 1;
}

static int null_tostring(lua_State *L) {
    lua_pushliteral(L, "null");
    return 1;
}

void ulua_json_open(lua_State *L) {
    lua_newuserdatauv(L, 0, 0);
    lua_createtable(L, 0, 2);
    lua_pushcfunction(L, null_tostring);
    lua_setfield(L, -2, "__tostring");
    lua_pushstring(L, NULL_NAME);
    lua_setfield(L, -2, "__name");
    lua_setmetatable(L, -2);
    lua_setfield(L, LUA_REGISTRYINDEX, NULL_NAME);
    luaL_newmetatable(L, ARRAY_NAME);
    lua_pop(L, 1);
    lua_newtable(L); /* shapes that no object has any more may go */
    lua_createtable(L, 0, 1);
    lua_pushliteral(L, "v");
    lua_setfield(L, -2, "__mode");
    lua_setmetatable(L, -2);
    lua_setfield(L, LUA_REGISTRYINDEX, SHAPES_NAME);
    static const luaL_Reg FUNCTIONS[] = { { "decode", json_decode },     { "encode", json_encode },
                                          { "array", json_array },       { "object", json_object },
                                          { "is_array", json_is_array }, { NULL, NULL } };
    luaL_newlib(L, FUNCTIONS);
    push_null(L);
    lua_setfield(L, -2, "null");
    lua_setfield(L, -2, "json");
}
