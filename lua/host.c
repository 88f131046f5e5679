/* unsloth_lua_open: the Lua modules in an environment of their own, so that a host's state needs no io, os, package or
 * debug, and so that files and words go through the host's context. */
#include <string.h>

#include <lualib.h>

#include "lua/binding.h"

static const char HOSTED[] = "unsloth.hosted";

bool ulua_is_hosted(lua_State *L) {
    bool is = lua_getfield(L, LUA_REGISTRYINDEX, HOSTED) == LUA_TBOOLEAN;
    lua_pop(L, 1);
    return is;
}

/* ---- Files ---- */

/* Upvalue 2 is the modules' own folder, which is the library's and no business of the host's. */
static bool is_own(lua_State *L, const char *path) {
    size_t n;
    const char *root = lua_tolstring(L, lua_upvalueindex(2), &n);
    return strncmp(path, root, n) == 0 && path[n] == '/' && !strstr(path, "..");
}

static bool may(lua_State *L, const char *path, usl_access access) {
    return usl_ctx_may(unsloth_lua_ctx(L), path, access) == USL_OK;
}

static int refuse(lua_State *L) {
    luaL_pushfail(L);
    lua_pushstring(L, usl_ctx_errmsg(unsloth_lua_ctx(L)));
    return 2;
}

/* Upvalue 1 is Lua's own function. */
static int call_own(lua_State *L) {
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
    return lua_gettop(L);
}

/* io.open */
static int open_file(lua_State *L) {
    const char *path = luaL_checkstring(L, 1), *mode = luaL_optstring(L, 2, "r");
    bool writes = mode[0] != 'r' || strchr(mode, '+'), reads = mode[0] == 'r' || strchr(mode, '+');
    if (!writes && is_own(L, path)) return call_own(L);
    if ((reads && !may(L, path, USL_ACCESS_READ)) || (writes && !may(L, path, USL_ACCESS_WRITE))) return refuse(L);
    return call_own(L);
}

/* os.remove(path), os.rename(from, to) */
static int change_files(lua_State *L) {
    for (int i = 1; i <= lua_gettop(L); i++)
        if (!may(L, luaL_checkstring(L, i), USL_ACCESS_WRITE)) return refuse(L);
    return call_own(L);
}

/* ---- Words ---- */

/* Says the whole lines of the text on top; leaves what stands behind the last. */
static void say_lines(lua_State *L, usl_log_level level) {
    size_t len;
    const char *text = lua_tolstring(L, -1, &len), *end;
    while ((end = memchr(text, '\n', len))) {
        lua_pushlstring(L, text, (size_t)(end - text));
        usl_ctx_log(unsloth_lua_ctx(L), level, lua_tostring(L, -1));
        lua_pop(L, 1);
        len -= (size_t)(end - text) + 1;
        text = end + 1;
    }
    lua_pushlstring(L, text, len);
    lua_remove(L, -2);
}

/* stream:write(...), for a stream that is a table with what waits for the end of its line. */
static int stream_write(lua_State *L) {
    luaL_checktype(L, 1, LUA_TTABLE);
    int n = lua_gettop(L);
    lua_getfield(L, 1, "pending");
    for (int i = 2; i <= n; i++) {
        luaL_checkstring(L, i);
        lua_pushvalue(L, i);
    }
    lua_concat(L, n);
    lua_getfield(L, 1, "level");
    usl_log_level level = (usl_log_level)lua_tointeger(L, -1);
    lua_pop(L, 1);
    say_lines(L, level);
    lua_setfield(L, 1, "pending");
    lua_settop(L, 1);
    return 1;
}

static int stream_nothing(lua_State *L) {
    lua_settop(L, 1);
    return 1;
}

/* io.write(...): upvalue 1 is the stream. */
static int write_out(lua_State *L) {
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    return stream_write(L);
}

static int print_line(lua_State *L) {
    int n = lua_gettop(L);
    luaL_Buffer b;
    luaL_buffinit(L, &b);
    for (int i = 1; i <= n; i++) {
        if (i > 1) luaL_addchar(&b, '\t');
        luaL_tolstring(L, i, NULL);
        luaL_addvalue(&b);
    }
    luaL_addchar(&b, '\n');
    luaL_pushresult(&b);
    say_lines(L, USL_LOG_INFO);
    return 0;
}

static void push_stream(lua_State *L, usl_log_level level) {
    static const luaL_Reg METHODS[] = {
        { "write", stream_write }, { "flush", stream_nothing }, { "setvbuf", stream_nothing }, { NULL, NULL }
    };
    luaL_newlib(L, METHODS);
    lua_pushinteger(L, level);
    lua_setfield(L, -2, "level");
    lua_pushliteral(L, "");
    lua_setfield(L, -2, "pending");
}

/* ---- The environment ---- */

/* Sets field `name` of the table on top to a C function over Lua's own of that name, in the library at `from`. */
static void guard(lua_State *L, int from, int root, const char *name, lua_CFunction f) {
    lua_getfield(L, from, name);
    lua_pushvalue(L, root);
    lua_pushcclosure(L, f, 2);
    lua_setfield(L, -2, name);
}

/* Copies fields of the library at `from` to the table on top. */
static void take(lua_State *L, int from, const char *const *names) {
    for (; *names; names++) {
        lua_getfield(L, from, *names);
        lua_setfield(L, -2, *names);
    }
}

/* Leaves a table for a library's parts behind the library itself. */
static int begin_library(lua_State *L, lua_CFunction open) {
    lua_pushcfunction(L, open);
    lua_call(L, 0, 1);
    lua_newtable(L);
    return lua_gettop(L) - 1;
}

static void end_library(lua_State *L, int environment, const char *name) {
    lua_setfield(L, environment, name);
    lua_pop(L, 1);
}

static void add_libraries(lua_State *L, int environment, int root) {
    static const char *const IO[] = { "type", NULL }, *const SPOKEN[] = { "stdout", "stderr", "write", NULL },
                             *const OS[] = { "getenv", "time", "date", "clock", "difftime", NULL },
                             *const DEBUG[] = { "getinfo", "getmetatable", "traceback", NULL };
    int io = begin_library(L, luaopen_io);
    take(L, io, IO);
    guard(L, io, root, "open", open_file);
    if (ulua_is_hosted(L)) {
        push_stream(L, USL_LOG_WARN);
        lua_setfield(L, -2, "stderr");
        push_stream(L, USL_LOG_INFO);
        lua_pushvalue(L, -1);
        lua_setfield(L, -3, "stdout");
        lua_pushcclosure(L, write_out, 1);
        lua_setfield(L, -2, "write");
        lua_pushcfunction(L, print_line);
        lua_setfield(L, environment, "print");
    } else {
        take(L, io, SPOKEN);
    }
    end_library(L, environment, "io");
    int os = begin_library(L, luaopen_os);
    take(L, os, OS);
    guard(L, os, root, "remove", change_files);
    guard(L, os, root, "rename", change_files);
    end_library(L, environment, "os");
    int debug = begin_library(L, luaopen_debug);
    take(L, debug, DEBUG);
    end_library(L, environment, "debug");
}

/* ---- Modules ---- */

/* Leaves the chunk of a module of ours: "unsloth.sft" is unsloth/sft.lua or unsloth/sft/init.lua. */
static void load_module(lua_State *L, const char *root, const char *name) {
    static const char *const ENDINGS[] = { ".lua", "/init.lua" };
    const char *stem = luaL_gsub(L, name, ".", "/");
    int status = LUA_ERRFILE;
    for (size_t i = 0; i < 2 && status == LUA_ERRFILE; i++) {
        if (i) lua_pop(L, 1);
        const char *path = lua_pushfstring(L, "%s/%s%s", root, stem, ENDINGS[i]);
        status = luaL_loadfilex(L, path, "t");
        lua_remove(L, -2);
    }
    lua_remove(L, -2);
    if (status != LUA_OK) luaL_error(L, "the Lua modules of unsloth are missing: %s", lua_tostring(L, -1));
}

static bool is_ours(const char *name) {
    static const char PREFIX[] = "unsloth.";
    if (strncmp(name, PREFIX, sizeof PREFIX - 1) != 0) return strcmp(name, "unsloth") == 0;
    return strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_.") == strlen(name) && !strstr(name, "..");
}

/* The modules' require. Upvalues: environment, root. What is loaded stands where a host's own require looks first. */
static int require_module(lua_State *L) {
    const char *name = luaL_checkstring(L, 1);
    lua_settop(L, 1);
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    if (lua_getfield(L, 2, name) != LUA_TNIL) return 1;
    lua_pop(L, 1);
    if (strcmp(name, "unsloth.core") == 0) {
        lua_pushcfunction(L, luaopen_unsloth_core);
    } else if (is_ours(name)) {
        load_module(L, lua_tostring(L, lua_upvalueindex(2)), name);
        lua_pushvalue(L, lua_upvalueindex(1));
        lua_setupvalue(L, -2, 1);
    } else {
        lua_getglobal(L, "require");
        if (lua_isnil(L, -1)) return luaL_error(L, "module '%s' is not unsloth's, and this state has no require", name);
    }
    lua_pushvalue(L, 1);
    lua_call(L, 1, 1);
    if (lua_isnil(L, -1)) {
        lua_pop(L, 1);
        lua_pushboolean(L, 1);
    }
    lua_pushvalue(L, -1);
    lua_setfield(L, 2, name);
    return 1;
}

int unsloth_lua_open(lua_State *L, usl_ctx *ctx, const char *modules) {
    luaL_checkstack(L, 16, "unsloth");
    if (ctx) {
        ulua_set_ctx(L, ctx);
        lua_pushboolean(L, 1);
        lua_setfield(L, LUA_REGISTRYINDEX, HOSTED);
    }
    if (modules)
        lua_pushstring(L, modules);
    else
        ulua_push_root(L);
    int root = lua_gettop(L), environment = root + 1;
    lua_newtable(L);
    lua_createtable(L, 0, 1);
    lua_pushglobaltable(L);
    lua_setfield(L, -2, "__index");
    lua_setmetatable(L, environment);
    add_libraries(L, environment, root);
    lua_pushvalue(L, environment);
    lua_pushvalue(L, root);
    lua_pushcclosure(L, require_module, 2);
    lua_pushvalue(L, -1);
    lua_setfield(L, environment, "require");
    lua_pushliteral(L, "unsloth");
    lua_call(L, 1, 1);
    lua_replace(L, root);
    lua_settop(L, root);
    return 1;
}
