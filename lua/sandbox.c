/* Recipes from strangers: limits that a script cannot catch, and what it may reach. The parts of Lua's libraries that
 * could run for long inside C, where no hook counts, are in sandbox_guards.c. */
#define _GNU_SOURCE
#include "lua/sandbox.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include <lualib.h>

static const char GLOBALS[] = "unsloth.sandbox.globals";

/* Instructions between two counts. */
enum { EVERY = 1000 };

/* ---- Stopping ---- */

void usandbox_stop(unsloth_sandbox *box, usandbox_reason reason) {
    int none = USANDBOX_RUNS;
    atomic_compare_exchange_strong(&box->reason, &none, (int)reason);
}

/* Once a limit is passed every instruction raises, so that whoever catches the error gets no further than to the next
 * one. A coroutine inherits the hook, and main code meets it again when the coroutine has died. */
static void on_count(lua_State *L, lua_Debug *ar) {
    unsloth_sandbox *box = usandbox_of(L);
    (void)ar;
    if (!usandbox_is_stopped(box)) box->used += EVERY;
    usandbox_check(L);
}

void usandbox_check(lua_State *L) {
    unsloth_sandbox *box = usandbox_of(L);
    if (box->used > box->opts.instructions) usandbox_stop(box, USANDBOX_INSTRUCTIONS);
    if (!usandbox_is_stopped(box)) return;
    lua_sethook(L, on_count, LUA_MASKCALL | LUA_MASKRET | LUA_MASKLINE | LUA_MASKCOUNT, 1);
    luaL_error(L, "stopped");
}

/* ---- Memory ---- */

static bool take(unsloth_sandbox *box, size_t bytes) {
    if (atomic_fetch_add(&box->held, bytes) + bytes <= box->opts.memory) return true;
    atomic_fetch_sub(&box->held, bytes);
    return false;
}

static void give(unsloth_sandbox *box, size_t bytes) {
    atomic_fetch_sub(&box->held, bytes);
}

/* What may be refused before it is the end: by catching the error a script could go on for ever. */
enum { REFUSALS = 32 };

/* Lua asks again for the same after it has collected all garbage: the second refusal is the end. */
static void *lua_memory(void *ud, void *ptr, size_t old, size_t size) {
    unsloth_sandbox *box = ud;
    if (!ptr) old = 0;
    if (size == 0) {
        free(ptr);
        give(box, old);
        return NULL;
    }
    if (size > old && !take(box, size - old)) {
        if (box->refused == size || ++box->lua_refusals > REFUSALS) usandbox_stop(box, USANDBOX_MEMORY);
        box->refused = size;
        return NULL;
    }
    void *out = realloc(ptr, size);
    if (!out) {
        if (size > old) give(box, size - old);
        return NULL;
    }
    if (size > old)
        box->refused = 0;
    else
        give(box, old - size);
    return out;
}

/* Blocks of the library, which does not say how large the old one was. [ size | 16-byte aligned block ] */
enum { HEAD = 16 };

static void *library_memory(void *ud, void *ptr, size_t size) {
    unsloth_sandbox *box = ud;
    char *block = ptr ? (char *)ptr - HEAD : NULL;
    size_t old = 0, whole = size + HEAD;
    if (block) memcpy(&old, block, sizeof old);
    if (size == 0) {
        free(block);
        give(box, old);
        return NULL;
    }
    if (whole < size || (whole > old && !take(box, whole - old))) {
        /* The binding collects garbage and tries once more. */
        if (atomic_fetch_add(&box->refusals, 1) > 0) usandbox_stop(box, USANDBOX_MEMORY);
        return NULL;
    }
    char *out = realloc(block, whole);
    if (!out) {
        if (whole > old) give(box, whole - old);
        return NULL;
    }
    if (whole < old) give(box, old - whole);
    memcpy(out, &whole, sizeof whole);
    return out + HEAD;
}

/* ---- Time ---- */

/* Asks the library to stop again and again: each request is answered by one call, and a script may make many. */
static void *watch(void *arg) {
    unsloth_sandbox *box = arg;
    struct timespec t;
    double until = usl_clock() + box->opts.seconds;
    pthread_mutex_lock(&box->lock);
    while (box->running) {
        if (usl_clock() > until) usandbox_stop(box, USANDBOX_SECONDS);
        if (usandbox_is_stopped(box)) usl_ctx_cancel(box->ctx);
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_nsec += 2 * 1000 * 1000;
        if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
        pthread_cond_timedwait(&box->ended, &box->lock, &t);
    }
    pthread_mutex_unlock(&box->lock);
    return NULL;
}

static bool start_watch(unsloth_sandbox *box) {
    sigset_t all, before;
    box->running = true;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the host's threads */
    bool ok = pthread_create(&box->watcher, NULL, watch, box) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}

static void end_watch(unsloth_sandbox *box) {
    pthread_mutex_lock(&box->lock);
    box->running = false;
    pthread_cond_signal(&box->ended);
    pthread_mutex_unlock(&box->lock);
    pthread_join(box->watcher, NULL);
    usl_ctx_uncancel(box->ctx);
}

/* ---- Files ---- */

static bool is_below(const char *path, const char *folder) {
    size_t n = strlen(folder);
    if (n == 1) return true; /* "/" */
    return strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == '\0');
}

/* Non-zero unless the path, all links followed, is in the folder. Of a path that is not there yet the part that is
 * counts, and nothing behind it may lead back. */
static int refuse_path(void *ud, const char *path, usl_access access) {
    const unsloth_sandbox *box = ud;
    char there[PATH_MAX], real[PATH_MAX];
    struct stat sb;
    size_t n = strlen(path);
    (void)access;
    if (!box->folder || n == 0 || n >= sizeof there) return 1;
    memcpy(there, path, n + 1);
    while (!realpath(*there ? there : ".", real)) {
        if (errno != ENOENT || lstat(there, &sb) == 0) return 1; /* a link to nowhere may become one to somewhere */
        char *slash = strrchr(there, '/');
        const char *last = slash ? slash + 1 : there;
        if (strcmp(last, "..") == 0) return 1;
        if (!slash)
            *there = '\0';
        else
            slash[slash == there] = '\0';
        if (slash == there && strlen(path) == 1) return 1;
    }
    return !is_below(real, box->folder);
}

/* ---- Words ---- */

static void on_log(void *ud, usl_log_level level, const char *text) {
    unsloth_sandbox *box = ud;
    if (box->opts.log_fn) box->opts.log_fn(box->opts.log_ud, level, text);
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
    luaL_pushresult(&b);
    on_log(usandbox_of(L), USL_LOG_INFO, lua_tostring(L, -1));
    return 0;
}

/* ---- The state ---- */

/* The one module that there is. Upvalue: it. */
static int require_unsloth(lua_State *L) {
    if (strcmp(luaL_checkstring(L, 1), "unsloth") != 0)
        return luaL_error(L, "module '%s' is not to be had in a sandbox: there is unsloth alone", lua_tostring(L, 1));
    lua_pushvalue(L, lua_upvalueindex(1));
    return 1;
}

static void open_libraries(lua_State *L) {
    static const luaL_Reg LIBRARIES[] = { { LUA_GNAME, luaopen_base },       { LUA_STRLIBNAME, luaopen_string },
                                          { LUA_TABLIBNAME, luaopen_table }, { LUA_MATHLIBNAME, luaopen_math },
                                          { LUA_UTF8LIBNAME, luaopen_utf8 }, { LUA_COLIBNAME, luaopen_coroutine } };
    for (size_t i = 0; i < sizeof LIBRARIES / sizeof *LIBRARIES; i++) {
        luaL_requiref(L, LIBRARIES[i].name, LIBRARIES[i].func, 1);
        lua_pop(L, 1);
    }
}

/* Copies names from the global tables, so that what a script changes there changes nothing for the modules. */
static void add_globals(lua_State *L, int globals) {
    static const char *const NAMES[] = { "assert",   "error",    "ipairs",   "next",    "pairs",  "pcall",
                                         "rawequal", "rawget",   "rawlen",   "rawset",  "select", "type",
                                         "xpcall",   "tonumber", "tostring", "_VERSION" };
    static const char *const TABLES[] = { "string", "table", "math", "utf8", "coroutine" };
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        lua_getglobal(L, NAMES[i]);
        lua_setfield(L, globals, NAMES[i]);
    }
    for (size_t i = 0; i < sizeof TABLES / sizeof *TABLES; i++) {
        lua_newtable(L);
        lua_getglobal(L, TABLES[i]);
        for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1)) {
            lua_pushvalue(L, -2);
            lua_pushvalue(L, -2);
            lua_settable(L, -6);
        }
        lua_pop(L, 1);
        lua_setfield(L, globals, TABLES[i]);
    }
    lua_pushcfunction(L, print_line);
    lua_setfield(L, globals, "print");
    lua_pushvalue(L, globals);
    lua_setfield(L, globals, "_G");
}

static int set_up(lua_State *L) {
    unsloth_sandbox *box = lua_touserdata(L, 1);
    open_libraries(L);
    lua_newtable(L);
    int globals = lua_gettop(L);
    usandbox_guard(L, globals);
    add_globals(L, globals);
    unsloth_lua_open(L, box->ctx, NULL);
    lua_pushvalue(L, -1);
    lua_setfield(L, globals, "unsloth");
    lua_pushcclosure(L, require_unsloth, 1);
    lua_setfield(L, globals, "require");
    if (box->folder) {
        lua_pushstring(L, box->folder);
        lua_setfield(L, globals, "folder");
    }
    lua_pushvalue(L, globals);
    lua_setfield(L, LUA_REGISTRYINDEX, GLOBALS);
    return 0;
}

/* Puts the error on top into words; __tostring is the script's, so this runs protected and counted as well. */
static int put_into_words(lua_State *L) {
    unsloth_sandbox *box = lua_touserdata(L, 2);
    snprintf(box->message, sizeof box->message, "%s", luaL_tolstring(L, 1, NULL));
    return 0;
}

static void keep_message(unsloth_sandbox *box) {
    lua_State *L = box->L;
    snprintf(box->message, sizeof box->message, "the script failed, and its error cannot be put into words");
    lua_pushcfunction(L, put_into_words);
    lua_insert(L, -2);
    lua_pushlightuserdata(L, box);
    if (lua_pcall(L, 2, 0, 0) != LUA_OK) lua_pop(L, 1);
}

static void say_why_stopped(unsloth_sandbox *box) {
    static const char *const WORDS[] = { "", "memory", "instructions", "time", "" };
    int reason = atomic_load(&box->reason);
    char limit[64] = "";
    if (reason == USANDBOX_MEMORY)
        snprintf(limit, sizeof limit, "%.3g MiB", (double)box->opts.memory / (1 << 20));
    else if (reason == USANDBOX_INSTRUCTIONS)
        snprintf(limit, sizeof limit, "%llu", (unsigned long long)box->opts.instructions);
    else
        snprintf(limit, sizeof limit, "%.3g s", box->opts.seconds);
    if (reason == USANDBOX_STOPPED)
        snprintf(box->message, sizeof box->message, "the script was stopped by its host");
    else
        snprintf(box->message, sizeof box->message, "the script was stopped: it is over its limit of %s (%s)",
                 WORDS[reason], limit);
}

typedef struct script {
    const char *name, *text;
    size_t len;
} script;

static int run_script(lua_State *L) {
    const script *s = lua_touserdata(L, 1);
    const char *name = lua_pushfstring(L, "=%s", s->name);
    if (luaL_loadbufferx(L, s->text, s->len, name, "t") != LUA_OK) return lua_error(L);
    lua_getfield(L, LUA_REGISTRYINDEX, GLOBALS);
    lua_setupvalue(L, -2, 1);
    lua_call(L, 0, 0);
    return 0;
}

usl_status unsloth_sandbox_run(unsloth_sandbox *box, const char *name, const char *text, size_t len) {
    script s = { name ? name : "script", text ? text : "", text ? len : 0 };
    box->message[0] = '\0';
    if (usandbox_is_stopped(box)) {
        say_why_stopped(box);
        return USL_ERR_CANCELLED;
    }
    if (!start_watch(box)) {
        snprintf(box->message, sizeof box->message, "there is no thread to watch the script's time");
        return USL_ERR_NOMEM;
    }
    lua_settop(box->L, 0);
    lua_pushcfunction(box->L, run_script);
    lua_pushlightuserdata(box->L, &s);
    bool ok = lua_pcall(box->L, 1, 0, 0) == LUA_OK;
    if (!ok) keep_message(box);
    end_watch(box);
    if (usandbox_is_stopped(box)) {
        say_why_stopped(box);
        return USL_ERR_CANCELLED;
    }
    return ok ? USL_OK : USL_ERR_CALLBACK;
}

/* ---- Making and freeing ---- */

static usl_status begin(unsloth_sandbox *box) {
    usl_ctx_opts c = USL_CTX_OPTS_INIT;
    const char *folder = box->opts.folder;
    box->opts.folder = NULL; /* the caller's text goes */
    if (folder && !(box->folder = realpath(folder, NULL))) {
        snprintf(box->message, sizeof box->message, "%s: there is no such folder; make it first", folder);
        return USL_ERR_NOT_FOUND;
    }
    c.realloc_fn = library_memory;
    c.log_fn = on_log;
    c.access_fn = refuse_path;
    c.realloc_ud = c.log_ud = c.access_ud = box;
    c.threads = box->opts.threads;
    snprintf(box->message, sizeof box->message, "there is no memory for a sandbox; raise its limit");
    if (usl_ctx_new(&c, &box->ctx) != USL_OK || !(box->L = lua_newstate(lua_memory, box))) return USL_ERR_NOMEM;
    *(unsloth_sandbox **)lua_getextraspace(box->L) = box;
    lua_pushcfunction(box->L, set_up);
    lua_pushlightuserdata(box->L, box);
    if (lua_pcall(box->L, 1, 0, 0) != LUA_OK) {
        keep_message(box);
        return atomic_load(&box->reason) == USANDBOX_MEMORY ? USL_ERR_NOMEM : USL_ERR_IO;
    }
    lua_sethook(box->L, on_count, LUA_MASKCOUNT, EVERY);
    box->message[0] = '\0';
    return USL_OK;
}

usl_status unsloth_sandbox_new(const unsloth_sandbox_opts *opts, unsloth_sandbox **out, char *text, size_t text_size) {
    *out = NULL;
    if (text && text_size) snprintf(text, text_size, "there is no memory for a sandbox");
    unsloth_sandbox *box = calloc(1, sizeof *box);
    if (!box) return USL_ERR_NOMEM;
    box->opts = (unsloth_sandbox_opts)UNSLOTH_SANDBOX_OPTS_INIT;
    if (opts) memcpy(&box->opts, opts, opts->size < sizeof box->opts ? opts->size : sizeof box->opts);
    pthread_mutex_init(&box->lock, NULL);
    pthread_cond_init(&box->ended, NULL);
    usl_status st = begin(box);
    if (st != USL_OK) {
        if (text && text_size) snprintf(text, text_size, "%s", box->message);
        unsloth_sandbox_free(box);
        return st;
    }
    *out = box;
    return USL_OK;
}

void unsloth_sandbox_free(unsloth_sandbox *box) {
    if (!box) return;
    if (box->L) lua_close(box->L);
    usl_ctx_free(box->ctx);
    pthread_cond_destroy(&box->ended);
    pthread_mutex_destroy(&box->lock);
    free(box->folder);
    free(box);
}

const char *unsloth_sandbox_errmsg(const unsloth_sandbox *box) {
    return box->message;
}

void unsloth_sandbox_stop(unsloth_sandbox *box) {
    usandbox_stop(box, USANDBOX_STOPPED);
}

lua_State *unsloth_sandbox_state(unsloth_sandbox *box) {
    return box->L;
}

void unsloth_sandbox_globals(unsloth_sandbox *box) {
    lua_getfield(box->L, LUA_REGISTRYINDEX, GLOBALS);
}
