/* A host with Lua inside: it scripts training from its own lua_State, under its own allocator, log and file access, and
 * gives the script two functions of its own: one is the data set, one the reward.
 *
 *     03_lua_host MODEL SCRIPT.lua */
#include <lauxlib.h>
#include <lualib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unsloth_lua.h>

typedef struct host {
    size_t lua_bytes;
    int logged, files;
} host;

static void *lua_memory(void *ud, void *ptr, size_t old, size_t size) {
    host *h = ud;
    if (!ptr) old = 0;
    h->lua_bytes += size - old;
    if (size) return realloc(ptr, size);
    free(ptr);
    return NULL;
}

static void on_log(void *ud, usl_log_level level, const char *text) {
    host *h = ud;
    (void)level;
    h->logged++;
    printf("  log: %s\n", text);
}

/* What the library wants to open. This host lets it, and writes nothing. */
static int on_access(void *ud, const char *path, usl_access access) {
    host *h = ud;
    (void)path;
    h->files++;
    return access == USL_ACCESS_WRITE;
}

/* host_row(i): row i of data that only the host has; nil behind the last. */
static int host_row(lua_State *L) {
    static const char *const COLOURS[] = { "sky blue", "sea blue", "grass green", "sun yellow" };
    lua_Integer i = luaL_checkinteger(L, 1);
    char thing[32], colour[32];
    if (i < 1 || i > (lua_Integer)(sizeof COLOURS / sizeof *COLOURS)) return 0;
    sscanf(COLOURS[i - 1], "%31s %31s", thing, colour);
    lua_newtable(L);
    lua_pushfstring(L, "The %s is %s.", thing, colour);
    lua_setfield(L, -2, "text");
    return 1;
}

/* host_reward(text): what the host thinks of an answer. */
static int host_reward(lua_State *L) {
    const char *text = luaL_checkstring(L, 1);
    lua_pushnumber(L, strstr(text, "blue") ? 1.0 : -0.01 * (double)strlen(text));
    return 1;
}

/* Protected: every error of what follows comes out of lua_pcall. */
static int run(lua_State *L) {
    const char *model = lua_touserdata(L, 1), *script = lua_touserdata(L, 2);
    usl_ctx *ctx = lua_touserdata(L, 3);
    luaL_openlibs(L);
    unsloth_lua_open(L, ctx, NULL);
    lua_setglobal(L, "unsloth");
    lua_register(L, "host_row", host_row);
    lua_register(L, "host_reward", host_reward);
    if (luaL_loadfile(L, script) != LUA_OK) return lua_error(L);
    lua_pushstring(L, model);
    lua_call(L, 1, 0);
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 3) return fprintf(stderr, "usage: %s MODEL SCRIPT.lua\n", argv[0]), 1;
    host h = { 0, 0, 0 };
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    opts.log_fn = on_log;
    opts.access_fn = on_access;
    opts.log_ud = opts.access_ud = &h;
    if (usl_ctx_new(&opts, &ctx) != USL_OK) return 1;
    lua_State *L = lua_newstate(lua_memory, &h);
    if (!L) return 1;
    lua_pushcfunction(L, run);
    lua_pushlightuserdata(L, argv[1]);
    lua_pushlightuserdata(L, argv[2]);
    lua_pushlightuserdata(L, ctx);
    int status = lua_pcall(L, 3, 0, 0);
    if (status != LUA_OK) fprintf(stderr, "%s\n", luaL_tolstring(L, -1, NULL));
    lua_close(L);
    usl_ctx_free(ctx);
    printf("%d lines logged, %d paths asked for, %zu bytes of Lua left\n", h.logged, h.files, h.lua_bytes);
    return status != LUA_OK || h.lua_bytes != 0;
}
