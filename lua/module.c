/* The module: unsloth.core, the state's context, and how the Lua modules beside it are found. */
#include <stdlib.h>
#include <string.h>

#include <lualib.h>

#include "lua/binding.h"

#define CORE_NAME "unsloth.core"
static const char CTX_NAME[] = "unsloth.ctx";
enum { MAX_THREADS = 256 };

/* ---- The context ---- */

/* What of Lua's hears of core's progress. */
typedef struct progress_calls {
    bool own;            /* the context is the state's, and not a host's */
    lua_State *thread;   /* the function is its only value; NULL: there is none */
    ulua_progress given; /* one for the length of a call: it is asked instead */
} progress_calls;

static const char PROGRESS_NAME[] = "unsloth.progress";

/* Leaves them on top, or nil. */
static progress_calls *push_progress(lua_State *L) {
    lua_getfield(L, LUA_REGISTRYINDEX, PROGRESS_NAME);
    return lua_touserdata(L, -1);
}

/* A host may keep the context for longer than the state: nobody hears of its progress then. */
static int ctx_close(lua_State *L) {
    usl_ctx **slot = lua_touserdata(L, 1);
    usl_ctx *ctx = *slot;
    *slot = NULL;
    const progress_calls *p = push_progress(L);
    if (ctx && p && p->own) usl_ctx_set_progress(ctx, NULL, NULL);
    usl_ctx_free(ctx);
    return 0;
}

static void log_to_stderr(void *ud, usl_log_level level, const char *text) {
    (void)ud;
    if (level < USL_LOG_INFO) return;
    fputs("unsloth: ", stderr);
    ulua_plain_write(stderr, text);
    fputc('\n', stderr);
}

/* ---- Progress: a function of Lua's, on a thread of its own, since any thread may be the one that calls ---- */

typedef struct progress_news {
    const char *what;
    uint64_t done, total;
} progress_news;

static int tell_progress(lua_State *T) {
    const progress_news *news = lua_touserdata(T, 2);
    lua_settop(T, 1);
    lua_pushstring(T, news->what);
    lua_pushinteger(T, (lua_Integer)news->done);
    lua_pushinteger(T, (lua_Integer)news->total);
    lua_call(T, 3, 0);
    return 0;
}

/* An error of a function that is given for a call stays on its stack, for the binding to raise once core has unwound.
 */
static int tell_given(ulua_progress *p, progress_news *news) {
    lua_pushcfunction(p->L, tell_progress);
    lua_pushvalue(p->L, p->fn);
    lua_pushlightuserdata(p->L, news);
    p->failed = lua_pcall(p->L, 2, 0, 0) != LUA_OK;
    return p->failed;
}

/* Nothing before the protected call may raise: core's frames stand below. */
static int call_progress(void *ud, const char *what, uint64_t done, uint64_t total) {
    progress_calls *p = ud;
    lua_State *T = p->thread;
    progress_news news = { what ? what : "", done, total };
    if (p->given.L) return tell_given(&p->given, &news);
    if (!T || lua_gettop(T) != 1 || !lua_checkstack(T, 4)) return 0; /* more than 1: it is running */
    lua_pushcfunction(T, tell_progress);
    lua_pushvalue(T, 1);
    lua_pushlightuserdata(T, &news);
    (void)lua_pcall(T, 2, 0, 0); /* a line that cannot be drawn stops nothing */
    lua_settop(T, 1);
    return 0;
}

/* set_progress(fn): fn(what, done, total) hears of what core is doing; nil: nobody */
static int set_progress(lua_State *L) {
    if (!lua_isnoneornil(L, 1)) luaL_checktype(L, 1, LUA_TFUNCTION);
    lua_settop(L, 1);
    progress_calls *p = push_progress(L);
    if (!p || !p->own) return 0; /* the context is a host's, and so is its progress */
    p->thread = NULL;
    lua_pushnil(L);
    lua_setiuservalue(L, 2, 1);
    if (lua_isnil(L, 1)) return 0;
    lua_State *T = lua_newthread(L);
    lua_setiuservalue(L, 2, 1);
    lua_pushvalue(L, 1);
    lua_xmove(L, T, 1);
    p->thread = T;
    return 0;
}

ulua_progress *ulua_progress_of(lua_State *L) {
    unsloth_lua_ctx(L);
    progress_calls *p = push_progress(L);
    lua_pop(L, 1);
    return &p->given;
}

static usl_ctx *find_ctx(lua_State *L) {
    lua_getfield(L, LUA_REGISTRYINDEX, CTX_NAME);
    usl_ctx **slot = lua_touserdata(L, -1);
    lua_pop(L, 1);
    return slot ? *slot : NULL;
}

/* Pushes an empty owner. */
static usl_ctx **new_slot(lua_State *L) {
    progress_calls *progress = lua_newuserdatauv(L, sizeof *progress, 1);
    *progress = (progress_calls){ .own = false };
    lua_setfield(L, LUA_REGISTRYINDEX, PROGRESS_NAME);
    usl_ctx **slot = lua_newuserdatauv(L, sizeof *slot, 0);
    *slot = NULL;
    lua_createtable(L, 0, 1);
    lua_pushcfunction(L, ctx_close);
    lua_setfield(L, -2, "__gc");
    lua_setmetatable(L, -2);
    return slot;
}

void ulua_set_ctx(lua_State *L, usl_ctx *ctx) {
    if (find_ctx(L)) luaL_error(L, "unsloth is open in this state already: give it a context when it is opened first");
    *new_slot(L) = usl_ctx_retain(ctx);
    lua_setfield(L, LUA_REGISTRYINDEX, CTX_NAME);
}

static const char THREADS_VAR[] = "UNSLOTH_LUA_THREADS";

/* 0, which stands for the processors that this process may run on, when the environment says nothing. */
static int wanted_threads(lua_State *L) {
    const char *text = getenv(THREADS_VAR);
    char *end;
    if (!text || !*text) return 0;
    long n = strtol(text, &end, 10);
    if (*end || n < 1 || n > MAX_THREADS)
        luaL_error(L, "unsloth: %s is \"%s\"; a number of threads from 1 to %d is wanted", THREADS_VAR, text,
                   (int)MAX_THREADS);
    return (int)n;
}

usl_ctx *unsloth_lua_ctx(lua_State *L) {
    usl_ctx *ctx = find_ctx(L);
    if (ctx) return ctx;
    usl_ctx **slot = new_slot(L);
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    opts.threads = wanted_threads(L);
    opts.log_fn = log_to_stderr;
    opts.progress_fn = call_progress;
    opts.progress_ud = push_progress(L);
    ((progress_calls *)opts.progress_ud)->own = true;
    lua_pop(L, 1);
    if (usl_ctx_new(&opts, slot) != USL_OK) luaL_error(L, "unsloth: no memory or threads for a context");
    lua_setfield(L, LUA_REGISTRYINDEX, CTX_NAME);
    return *slot;
}

/* ---- The C part ---- */

int luaopen_unsloth_core(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "nearest", ulua_nearest },      { "error", ulua_error_new },
                                          { "call", ulua_callback },        { "printable", ulua_printable },
                                          { "set_progress", set_progress }, { NULL, NULL } };
    static void (*const OPEN[])(lua_State *) = { ulua_machine_open,     ulua_json_open,        ulua_tensor_open,
                                                 ulua_tensor_math_open, ulua_safetensors_open, ulua_tokenizer_open,
                                                 ulua_dataset_open,     ulua_model_open,       ulua_trainer_open,
                                                 ulua_export_open,      ulua_hub_open };
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
