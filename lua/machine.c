/* The machine and its files, for the Lua modules. */
#include <stdlib.h>
#include <string.h>

#include "lua/binding.h"

static int clock_(lua_State *L) {
    lua_pushnumber(L, usl_clock());
    return 1;
}

static int peak_memory(lua_State *L) {
    lua_pushinteger(L, (lua_Integer)usl_peak_memory());
    return 1;
}

static int threads(lua_State *L) {
    lua_pushinteger(L, usl_ctx_threads(unsloth_lua_ctx(L)));
    return 1;
}

/* is_terminal(0 | 1 | 2) */
static int is_terminal(lua_State *L) {
    int stream = (int)luaL_checkinteger(L, 1);
    lua_pushboolean(L, !ulua_is_hosted(L) && usl_is_terminal(stream));
    return 1;
}

/* path_kind(path) -> "file", "folder" or nil */
static int path_kind(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    ULUA_TRY(L, usl_ctx_may(unsloth_lua_ctx(L), path, USL_ACCESS_READ));
    usl_path_kind kind = usl_path_look(path);
    if (kind == USL_PATH_NONE) return 0;
    lua_pushstring(L, kind == USL_PATH_DIR ? "folder" : "file");
    return 1;
}

/* Names one after the other, each with its 0: collected outside Lua. */
typedef struct name_list {
    char *text;
    size_t len;
} name_list;

static int add_name(void *ud, const char *name) {
    name_list *list = ud;
    size_t len = strlen(name) + 1;
    char *text = realloc(list->text, list->len + len);
    if (!text) return 1;
    memcpy(text + list->len, name, len);
    list->text = text;
    list->len += len;
    return 0;
}

static int free_names(lua_State *L) {
    name_list *list = lua_touserdata(L, 1);
    free(list->text);
    list->text = NULL;
    return 0;
}

/* list_dir(path) -> sorted names */
static int list_dir(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    name_list *list = lua_newuserdatauv(L, sizeof *list, 0);
    memset(list, 0, sizeof *list);
    if (luaL_newmetatable(L, "unsloth.name_list")) {
        lua_pushcfunction(L, free_names);
        lua_setfield(L, -2, "__gc");
    }
    lua_setmetatable(L, -2);
    usl_status st = usl_dir_list(unsloth_lua_ctx(L), path, add_name, list);
    if (st == USL_ERR_CALLBACK) return ulua_fail(L, USL_ERR_NOMEM, "%s: out of memory", path);
    if (st != USL_OK) return ulua_raise(L, st);
    lua_newtable(L);
    lua_Integer n = 0;
    for (size_t at = 0; at < list->len; at += strlen(list->text + at) + 1) {
        lua_pushstring(L, list->text + at);
        lua_rawseti(L, -2, ++n);
    }
    return 1;
}

static int make_dir(lua_State *L) {
    ULUA_TRY(L, usl_dir_make(unsloth_lua_ctx(L), luaL_checkstring(L, 1)));
    return 0;
}

static int remove_path(lua_State *L) {
    ULUA_TRY(L, usl_path_remove(unsloth_lua_ctx(L), luaL_checkstring(L, 1)));
    return 0;
}

void ulua_machine_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "clock", clock_ },
                                          { "peak_memory", peak_memory },
                                          { "threads", threads },
                                          { "is_terminal", is_terminal },
                                          { "path_kind", path_kind },
                                          { "list_dir", list_dir },
                                          { "make_dir", make_dir },
                                          { "remove_path", remove_path },
                                          { NULL, NULL } };
    luaL_setfuncs(L, FUNCTIONS, 0);
}
