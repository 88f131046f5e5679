/* The module: unsloth.core, the state's context, and how the Lua modules beside it are found. */
#include <stdio.h>
#include <string.h>

#include <lualib.h>

#include "lua/binding.h"

#define CORE_NAME "unsloth.core"
static const char CTX_NAME[] = "unsloth.ctx";

/* ---- The context ---- */

typedef struct context {
    usl_ctx *ctx;
    ulua_progress progress;
} context;

static int ctx_close(lua_State *L) {
    context *slot = lua_touserdata(L, 1);
    usl_ctx *ctx = slot->ctx;
    slot->ctx = NULL;
    usl_ctx_free(ctx);
    return 0;
}

static void log_to_stderr(void *ud, usl_log_level level, const char *text) {
    (void)ud;
    if (level >= USL_LOG_INFO) fprintf(stderr, "unsloth: %s\n", text);
}

/* An error of the function stays on its stack, for the binding to raise once core has unwound. */
static int call_progress(void *ud, const char *what, uint64_t done, uint64_t total) {
    ulua_progress *p = ud;
    if (!p->L) return 0;
    lua_pushvalue(p->L, p->fn);
    lua_pushstring(p->L, what);
    lua_pushinteger(p->L, (lua_Integer)done);
    lua_pushinteger(p->L, (lua_Integer)total);
    p->failed = lua_pcall(p->L, 3, 0, 0) != LUA_OK;
    return p->failed;
}

static context *find_context(lua_State *L) {
    lua_getfield(L, LUA_REGISTRYINDEX, CTX_NAME);
    context *slot = lua_touserdata(L, -1);
    lua_pop(L, 1);
    return slot && slot->ctx ? slot : NULL;
}

/* Pushes an empty owner. */
static context *new_slot(lua_State *L) {
    context *slot = lua_newuserdatauv(L, sizeof *slot, 0);
    *slot = (context){ NULL, { NULL, 0, false } };
    lua_createtable(L, 0, 1);
    lua_pushcfunction(L, ctx_close);
    lua_setfield(L, -2, "__gc");
    lua_setmetatable(L, -2);
    return slot;
}

void ulua_set_ctx(lua_State *L, usl_ctx *ctx) {
    if (find_context(L))
        luaL_error(L, "unsloth is open in this state already: give it a context when it is opened first");
    new_slot(L)->ctx = usl_ctx_retain(ctx);
    lua_setfield(L, LUA_REGISTRYINDEX, CTX_NAME);
}

static context *context_of(lua_State *L) {
    context *slot = find_context(L);
    if (slot) return slot;
    slot = new_slot(L);
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    opts.log_fn = log_to_stderr;
    opts.progress_fn = call_progress;
    opts.progress_ud = &slot->progress;
    if (usl_ctx_new(&opts, &slot->ctx) != USL_OK) luaL_error(L, "unsloth: no memory or threads for a context");
    lua_setfield(L, LUA_REGISTRYINDEX, CTX_NAME);
    return slot;
}

usl_ctx *unsloth_lua_ctx(lua_State *L) {
    return context_of(L)->ctx;
}

ulua_progress *ulua_progress_of(lua_State *L) {
    return &context_of(L)->progress;
}

/* ---- The C part ---- */

int luaopen_unsloth_core(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = {
        { "nearest", ulua_nearest }, { "error", ulua_error_new }, { "call", ulua_callback }, { NULL, NULL }
    };
    static void (*const OPEN[])(lua_State *) = { ulua_machine_open,     ulua_json_open,      ulua_tensor_open,
                                                 ulua_safetensors_open, ulua_tokenizer_open, ulua_dataset_open,
                                                 ulua_model_open,       ulua_trainer_open,   ulua_export_open };
    ulua_error_open(L);
    unsloth_lua_ctx(L);
    luaL_newlib(L, FUNCTIONS);
    for (size_t i = 0; i < sizeof OPEN / sizeof *OPEN; i++) OPEN[i](L);
    lua_pushliteral(L, USL_VERSION);
    lua_setfield(L, -2, "version");
    return 1;
}

/* ---- The whole module ---- */

/* Leaves the folder that holds unsloth/init.lua: beside the loaded library, or where ulua_push_root finds it. */
static void push_root(lua_State *L, const char *library) {
    const char *slash = library ? strrchr(library, '/') : NULL;
    if (slash) {
        lua_pushlstring(L, library, (size_t)(slash - library));
        FILE *f = fopen(lua_pushfstring(L, "%s/unsloth/init.lua", lua_tostring(L, -1)), "r");
        lua_pop(L, 1);
        if (f) {
            fclose(f);
            return;
        }
        lua_pop(L, 1);
    }
    ulua_push_root(L);
}

int luaopen_unsloth(lua_State *L) {
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
    lua_pushcfunction(L, luaopen_unsloth_core);
    lua_setfield(L, -2, CORE_NAME);
    push_root(L, lua_tostring(L, 2));
    const char *root = lua_tostring(L, -1);
    lua_getglobal(L, "package");
    lua_pushfstring(L, "%s/?.lua;%s/?/init.lua;", root, root);
    lua_getfield(L, -2, "path");
    lua_concat(L, 2);
    lua_setfield(L, -2, "path");
    if (luaL_loadfile(L, lua_pushfstring(L, "%s/unsloth/init.lua", root)) != LUA_OK)
        return luaL_error(L, "the Lua modules of unsloth are missing: %s", lua_tostring(L, -1));
    lua_pushliteral(L, "unsloth");
    lua_call(L, 1, 1);
    return 1;
}
