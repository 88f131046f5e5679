/* The hub: names that are no paths here. */
#include "lua/binding.h"

static const ulua_option OPTIONS[] = {
    { "revision", ULUA_STRING, offsetof(usl_hub_opts, revision) },
    { "token", ULUA_STRING, offsetof(usl_hub_opts, token) },
    { "local_files_only", ULUA_BOOL, offsetof(usl_hub_opts, local_files_only) },
    { "refresh", ULUA_BOOL, offsetof(usl_hub_opts, refresh) },
    { "tokenizer_only", ULUA_BOOL, offsetof(usl_hub_opts, tokenizer_only) },
    { "private", ULUA_BOOL, offsetof(usl_hub_opts, is_private) },
    { "commit_message", ULUA_STRING, offsetof(usl_hub_opts, message) },
};

static usl_hub_opts read_options(lua_State *L, int idx, const char *what) {
    usl_hub_opts opts = USL_HUB_OPTS_INIT;
    ulua_options(L, idx, what, OPTIONS, sizeof OPTIONS / sizeof *OPTIONS, NULL, &opts);
    return opts;
}

/* hub_is_name(text) */
static int hub_is_name(lua_State *L) {
    lua_pushboolean(L, usl_hub_is_name(luaL_checkstring(L, 1)));
    return 1;
}

/* hub_get(name, opts) -> path */
static int hub_get(lua_State *L) {
    const char *name = luaL_checkstring(L, 1);
    usl_hub_opts opts = read_options(L, 2, "hub_get");
    void **path = ulua_adopt(L);
    ULUA_TRY(L, usl_hub_get(unsloth_lua_ctx(L), name, &opts, (char **)path));
    lua_pushstring(L, *path);
    return 1;
}

/* hub_outline(name, dir, opts) -> path */
static int hub_outline(lua_State *L) {
    const char *name = luaL_checkstring(L, 1), *dir = luaL_checkstring(L, 2);
    usl_hub_opts opts = read_options(L, 3, "hub_outline");
    void **path = ulua_adopt(L);
    ULUA_TRY(L, usl_hub_outline(unsloth_lua_ctx(L), name, dir, &opts, (char **)path));
    lua_pushstring(L, *path);
    return 1;
}

/* hub_push(name, dir, opts) */
static int hub_push(lua_State *L) {
    const char *name = luaL_checkstring(L, 1), *dir = luaL_checkstring(L, 2);
    usl_hub_opts opts = read_options(L, 3, "hub_push");
    ULUA_TRY(L, usl_hub_push(unsloth_lua_ctx(L), name, dir, &opts));
    return 0;
}

void ulua_hub_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "hub_is_name", hub_is_name },
                                          { "hub_get", hub_get },
                                          { "hub_outline", hub_outline },
                                          { "hub_push", hub_push },
                                          { NULL, NULL } };
    luaL_setfuncs(L, FUNCTIONS, 0);
}
