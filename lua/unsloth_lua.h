/* unsloth_lua.h: `unsloth` inside a host's own lua_State. Link libunsloth-lua and the Lua 5.4 that the host uses; the
 * library leaves lua_* to it.
 *
 *     lua_State *L = luaL_newstate();
 *     luaL_openlibs(L);
 *     unsloth_lua_open(L, NULL, NULL);      // leaves the module, as `require "unsloth"` would
 *     lua_setglobal(L, "unsloth");
 *
 * One state has one usl_ctx. As with every lua_CFunction, errors are Lua's: call what follows in protected mode. */
#ifndef UNSLOTH_LUA_H
#define UNSLOTH_LUA_H

#include <lua.h>
#include <unsloth.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Pushes the module and makes `require "unsloth"` find it. Of the standard libraries the base, string, table, math,
 * coroutine and utf8 ones must be open; what the modules need of io, os and debug they have to themselves.
 *
 * ctx: the host's own, with its allocator, log, progress, cancelling and file access; the state holds it until it is
 * closed. Every file that the library or its Lua modules open is asked of its access_fn first, and what the modules say
 * goes to its log_fn (USL_LOG_INFO, a line at a time) and nowhere else. NULL: one is made, notes go to stderr and
 * progress to stdout.
 * modules: the folder that holds unsloth/init.lua; NULL: it is found beside the library. Returns 1. */
USL_API int unsloth_lua_open(lua_State *L, usl_ctx *ctx, const char *modules);

/* The context of this state; borrowed; made when there is none. usl_ctx_cancel on it stops what runs. */
USL_API usl_ctx *unsloth_lua_ctx(lua_State *L);

/* For `require` and luaL_requiref: the whole module found through package.path, and its C part alone, `unsloth.core`.
 */
USL_API int luaopen_unsloth(lua_State *L);
USL_API int luaopen_unsloth_core(lua_State *L);

/* Pushes a core handle on a model (what `model_open` of unsloth.core gives), which shares the weights of one that the
 * host holds: many states, one base. Not while another thread uses the model. Returns 1. */
USL_API int unsloth_lua_push_model(lua_State *L, usl_model *model);

/* ---- Recipes from strangers ---- */

/* A state of its own in which a script reaches nothing but `unsloth`, safe parts of Lua's libraries and what the host
 * adds; no io, os, package, debug; text chunks only. Whoever passes a limit is stopped: pcall, coroutines, finalizers
 * and __close do not help. What runs inside C at that moment, an update or a pattern, first comes to its end or to its
 * next safe point. One thread at a time. */
typedef struct unsloth_sandbox unsloth_sandbox;

typedef struct unsloth_sandbox_opts {
    size_t size;
    const char *folder;    /* files are read, written and seen there alone; NULL: nowhere */
    uint64_t memory;       /* bytes, of Lua and of the library together; mapped files are not counted */
    uint64_t instructions; /* of Lua, in all */
    double seconds;        /* of the clock, for each run */
    usl_log_fn log_fn;     /* what scripts print (USL_LOG_INFO) and what the library notes; NULL: nowhere */
    void *log_ud;
    int threads; /* as in usl_ctx_opts */
} unsloth_sandbox_opts;
#define UNSLOTH_SANDBOX_OPTS_INIT \
    { sizeof(unsloth_sandbox_opts), NULL, (uint64_t)1 << 30, 1000000000, 3600.0, NULL, NULL, 0 }

/* *out is new: unsloth_sandbox_free. On failure *out is NULL; text, when it is not NULL, then says why. */
USL_API usl_status unsloth_sandbox_new(const unsloth_sandbox_opts *opts, unsloth_sandbox **out, char *text,
                                       size_t text_size);
USL_API void unsloth_sandbox_free(unsloth_sandbox *box);
/* Runs a script. USL_ERR_CANCELLED when a limit or unsloth_sandbox_stop ended it, after which the sandbox runs nothing
 * more; USL_ERR_CALLBACK when it raised an error. unsloth_sandbox_errmsg says which. */
USL_API usl_status unsloth_sandbox_run(unsloth_sandbox *box, const char *name, const char *text, size_t len);
/* The sentence of the last run that failed, "" otherwise. Valid until the next call. */
USL_API const char *unsloth_sandbox_errmsg(const unsloth_sandbox *box);
/* Ends what runs. Any thread. */
USL_API void unsloth_sandbox_stop(unsloth_sandbox *box);
/* The state, for adding functions of the host to the scripts' globals, which unsloth_sandbox_globals pushes. What is
 * put there is trusted. */
USL_API lua_State *unsloth_sandbox_state(unsloth_sandbox *box);
USL_API void unsloth_sandbox_globals(unsloth_sandbox *box);

#ifdef __cplusplus
}
#endif

#endif
