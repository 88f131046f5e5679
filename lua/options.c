/* Option tables into option structs, by data; and the nearest known name for a misspelt one. */
#include <limits.h>
#include <string.h>

#include "lua/binding.h"

/* Levenshtein's distance with a limit on the words' length: longer ones are cut, which only matters for nonsense. */
enum { WORD_MAX = 64 };

static int distance(const char *a, const char *b) {
    int row[WORD_MAX + 1];
    int n = (int)strnlen(a, WORD_MAX), m = (int)strnlen(b, WORD_MAX);
    for (int j = 0; j <= m; j++) row[j] = j;
    for (int i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= m; j++) {
            int up = row[j], best = diagonal + (a[i - 1] != b[j - 1]);
            if (up + 1 < best) best = up + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = up;
            row[j] = best;
        }
    }
    return row[m];
}

typedef struct nearest_word {
    const char *name;
    int distance;
} nearest_word;

static void consider(nearest_word *best, const char *word, const char *name) {
    int d = distance(word, name);
    if (!best->name || d < best->distance) {
        best->name = name;
        best->distance = d;
    }
}

/* A name that shares less than half of its letters would only mislead. */
static bool is_near(const nearest_word *best, const char *word) {
    return best->name && best->distance <= 2 + (int)strlen(word) / 2;
}

int ulua_nearest(lua_State *L) {
    const char *word = luaL_checkstring(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    nearest_word best = { NULL, 0 };
    /* The table keeps the names; a list may be longer than the stack. */
    for (lua_Integer i = 1; lua_rawgeti(L, 2, i) == LUA_TSTRING; i++) {
        consider(&best, word, lua_tostring(L, -1));
        lua_pop(L, 1);
    }
    if (!is_near(&best, word)) return 0;
    lua_pushstring(L, best.name);
    return 1;
}

static bool to_integer(lua_State *L, int idx, lua_Integer *out) {
    int ok = 0;
    if (lua_type(L, idx) == LUA_TNUMBER) *out = lua_tointegerx(L, idx, &ok);
    return ok;
}

int64_t ulua_integer(lua_State *L, int idx, const char *what) {
    lua_Integer v = 0;
    if (!to_integer(L, idx, &v))
        ulua_fail(L, USL_ERR_INVALID, "%s must be an integer, not %s", what, luaL_tolstring(L, idx, NULL));
    return v;
}

usl_dtype ulua_dtype(lua_State *L, int idx) {
    if (lua_isnoneornil(L, idx) || (lua_isboolean(L, idx) && !lua_toboolean(L, idx))) return USL_DTYPE_AUTO;
    const char *name = lua_type(L, idx) == LUA_TSTRING ? lua_tostring(L, idx) : NULL;
    usl_dtype dtype = usl_dtype_parse(name);
    if (dtype == USL_DTYPE_AUTO)
        ulua_fail(L, USL_ERR_INVALID,
                  "dtype %s is not known: float32, bfloat16, float16, or a name of ggml's such as q4_k",
                  luaL_tolstring(L, idx, NULL));
    return dtype;
}

bool ulua_flag(lua_State *L, int idx, const char *name, bool fallback) {
    if (lua_isnoneornil(L, idx)) return fallback;
    luaL_checktype(L, idx, LUA_TTABLE);
    bool value = lua_getfield(L, idx, name) == LUA_TNIL ? fallback : lua_toboolean(L, -1);
    lua_pop(L, 1);
    return value;
}

static int wrong(lua_State *L, const char *what, const ulua_option *o, const char *wanted) {
    return ulua_fail(L, USL_ERR_INVALID, "%s: %s must be %s, not %s", what, o->name, wanted,
                     luaL_tolstring(L, -1, NULL));
}

/* The value is on top. `false` stands for Python's None: the default stays. */
static void set_option(lua_State *L, const char *what, const ulua_option *o, void *opts) {
    char *at = (char *)opts + o->offset;
    lua_Integer i = 0;
    if (o->kind == ULUA_BOOL) {
        if (!lua_isboolean(L, -1)) wrong(L, what, o, "true or false");
        *(int *)(void *)at = lua_toboolean(L, -1);
        return;
    }
    if (lua_isboolean(L, -1) && !lua_toboolean(L, -1)) return;
    switch (o->kind) {
    case ULUA_INT:
        if (!to_integer(L, -1, &i) || i < INT_MIN || i > INT_MAX) wrong(L, what, o, "an integer");
        *(int *)(void *)at = (int)i;
        break;
    case ULUA_INT64:
        if (!to_integer(L, -1, &i)) wrong(L, what, o, "an integer");
        *(int64_t *)(void *)at = i;
        break;
    case ULUA_UINT64:
        if (!to_integer(L, -1, &i) || i < 0) wrong(L, what, o, "an integer from 0 up");
        *(uint64_t *)(void *)at = (uint64_t)i;
        break;
    case ULUA_DOUBLE:
        if (lua_type(L, -1) != LUA_TNUMBER) wrong(L, what, o, "a number");
        *(double *)(void *)at = lua_tonumber(L, -1);
        break;
    case ULUA_STRING:
        if (lua_type(L, -1) != LUA_TSTRING) wrong(L, what, o, "a string");
        *(const char **)(void *)at = lua_tostring(L, -1);
        break;
    case ULUA_DTYPE: *(usl_dtype *)(void *)at = ulua_dtype(L, -1); break;
    case ULUA_BOOL: break;
    }
}

static const ulua_option *find_option(const ulua_option *list, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++)
        if (strcmp(list[i].name, name) == 0) return &list[i];
    return NULL;
}

static int unknown(lua_State *L, const char *what, const ulua_option *list, size_t count, const char *const *also,
                   const char *name) {
    nearest_word best = { NULL, 0 };
    for (size_t i = 0; i < count; i++) consider(&best, name, list[i].name);
    for (; also && *also; also++) consider(&best, name, *also);
    if (is_near(&best, name))
        return ulua_fail(L, USL_ERR_INVALID, "%s does not know the option \"%s\": did you mean \"%s\"?", what, name,
                         best.name);
    return ulua_fail(L, USL_ERR_INVALID, "%s does not know the option \"%s\"", what, name);
}

static bool is_listed(const char *const *list, const char *name) {
    for (; list && *list; list++)
        if (strcmp(*list, name) == 0) return true;
    return false;
}

void ulua_options(lua_State *L, int idx, const char *what, const ulua_option *list, size_t count,
                  const char *const *also, void *opts) {
    if (lua_isnoneornil(L, idx)) return;
    idx = lua_absindex(L, idx);
    if (!lua_istable(L, idx))
        ulua_fail(L, USL_ERR_INVALID, "%s takes a table of options, not %s", what, luaL_typename(L, idx));
    for (lua_pushnil(L); lua_next(L, idx); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING)
            ulua_fail(L, USL_ERR_INVALID, "%s: options have names; %s is none", what, luaL_tolstring(L, -2, NULL));
        const char *name = lua_tostring(L, -2);
        const ulua_option *o = find_option(list, count, name);
        if (o)
            set_option(L, what, o, opts);
        else if (!is_listed(also, name))
            unknown(L, what, list, count, also, name);
    }
}

int32_t *ulua_ids(lua_State *L, int idx, size_t *count) {
    idx = lua_absindex(L, idx);
    if (!lua_istable(L, idx))
        ulua_fail(L, USL_ERR_INVALID, "token ids are an array of integers, not %s", luaL_typename(L, idx));
    size_t n = (size_t)lua_rawlen(L, idx);
    int32_t *ids = ulua_buffer(L, n * sizeof *ids);
    for (size_t i = 0; i < n; i++) {
        lua_Integer v = 0;
        lua_rawgeti(L, idx, (lua_Integer)i + 1);
        if (!to_integer(L, -1, &v) || v < INT32_MIN || v > INT32_MAX)
            ulua_fail(L, USL_ERR_INVALID, "token id %d of the array is %s, which is no 32-bit integer", (int)i + 1,
                      luaL_tolstring(L, -1, NULL));
        ids[i] = (int32_t)v;
        lua_pop(L, 1);
    }
    *count = n;
    return ids;
}

void ulua_push_ids(lua_State *L, const int32_t *ids, size_t count) {
    lua_createtable(L, count < INT_MAX ? (int)count : INT_MAX, 0);
    for (size_t i = 0; i < count; i++) {
        lua_pushinteger(L, ids[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
}
