/* Lua's functions that a stranger could abuse, each behind a check of its arguments. The modules in the same state use
 * them too, through the methods of strings, and are trusted with patterns. */
#include <math.h>
#include <string.h>
#include <time.h>

#include "lua/sandbox.h"

/* Elements or repetitions that one call may go through. */
static const lua_Integer MOST = 10000000;
/* Steps that the worst text makes of a pattern. */
static const double MOST_STEPS = 1e9;
/* Of time spent inside C, what counts as one instruction. */
static const double SECONDS_PER_INSTRUCTION = 1e-9;

/* Of this thread's work, so that a busy machine changes nothing. */
static double seconds_worked(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Calls Lua's own function, upvalue 1, with all arguments; its time is charged, since no hook counts there. */
static int call_own(lua_State *L) {
    unsloth_sandbox *box = usandbox_of(L);
    usandbox_check(L);
    double started = seconds_worked();
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
    box->used += (uint64_t)((seconds_worked() - started) / SECONDS_PER_INSTRUCTION);
    usandbox_check(L);
    return lua_gettop(L);
}

/* ---- The base library ---- */

/* load(text, name, mode, env): text only, and never under the name of a module. Upvalue 2: the scripts' globals. */
static int load_text(lua_State *L) {
    if (lua_type(L, 1) != LUA_TSTRING) return luaL_error(L, "load takes text in a sandbox, no function");
    const char *name = luaL_optstring(L, 2, "=(load)");
    bool has_env = !lua_isnone(L, 4);
    lua_settop(L, 4);
    size_t len;
    const char *text = lua_tolstring(L, 1, &len);
    if (name[0] == '@') name = lua_pushfstring(L, "=%s", name + 1);
    if (luaL_loadbufferx(L, text, len, name, "t") != LUA_OK) {
        luaL_pushfail(L);
        lua_insert(L, -2);
        return 2;
    }
    lua_pushvalue(L, has_env ? 4 : lua_upvalueindex(2));
    if (!lua_setupvalue(L, -2, 1)) lua_pop(L, 1);
    return 1;
}

/* Finalizers run where hooks do not: there are none. */
static int set_metatable(lua_State *L) {
    if (lua_istable(L, 2)) {
        lua_pushliteral(L, "__gc");
        if (lua_rawget(L, 2) != LUA_TNIL) return luaL_error(L, "__gc is not to be had in a sandbox; use __close");
        lua_pop(L, 1);
    }
    return call_own(L);
}

/* Metatables of strings, handles and of the library's own tables are nobody's business. Upvalue 2: those that scripts
 * have set, as weak keys. */
static int set_own_metatable(lua_State *L) {
    if (lua_istable(L, 2)) {
        lua_pushvalue(L, 2);
        lua_pushboolean(L, 1);
        lua_rawset(L, lua_upvalueindex(2));
    }
    return set_metatable(L);
}

static int get_metatable(lua_State *L) {
    luaL_checkany(L, 1);
    if (!lua_istable(L, 1) || !lua_getmetatable(L, 1)) return 0;
    lua_pushvalue(L, -1);
    if (lua_rawget(L, lua_upvalueindex(2)) == LUA_TNIL) {
        lua_pushboolean(L, 0);
        return 1;
    }
    lua_settop(L, 1);
    return call_own(L);
}

/* ---- Coroutines: each counts for itself, up to a count that is not told ---- */

static int make_coroutine(lua_State *L) {
    usandbox_of(L)->used += 1000;
    return call_own(L);
}

/* A coroutine that the hook has ended is never closed: what it would close runs where no hook counts. */
static int close_coroutine(lua_State *L) {
    usandbox_check(L);
    return call_own(L);
}

static int fail_wrapped(lua_State *L, lua_State *co, int status) {
    usandbox_check(L);
    if (status != LUA_OK && status != LUA_YIELD) lua_resetthread(co);
    lua_xmove(co, L, 1);
    return lua_error(L);
}

/* What coroutine.wrap returns. Upvalue: the coroutine. */
static int resume_wrapped(lua_State *L) {
    lua_State *co = lua_tothread(L, lua_upvalueindex(1));
    int given = lua_gettop(L), results, status;
    usandbox_check(L);
    if (lua_status(co) == LUA_OK && lua_gettop(co) == 0) return luaL_error(L, "cannot resume dead coroutine");
    if (!lua_checkstack(co, given)) return luaL_error(L, "too many arguments to resume");
    lua_xmove(L, co, given);
    status = lua_resume(co, L, given, &results);
    if (status != LUA_OK && status != LUA_YIELD) return fail_wrapped(L, co, status);
    if (!lua_checkstack(L, results)) return luaL_error(L, "too many results to resume");
    lua_xmove(co, L, results);
    return results;
}

static int wrap_coroutine(lua_State *L) {
    luaL_checktype(L, 1, LUA_TFUNCTION);
    make_coroutine(L);
    lua_settop(L, 1);
    lua_pushcclosure(L, resume_wrapped, 1);
    return 1;
}

/* ---- Error handlers: one that the hook's error calls runs where no hook counts ---- */

/* Upvalue: the script's own. */
static int handle(lua_State *L) {
    if (usandbox_is_stopped(usandbox_of(L))) return 1;
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_call(L, 1, 1);
    return 1;
}

/* xpcall(f, handler, ...). Upvalue: Lua's own, with which it may be yielded across. */
static int handled_again(lua_State *L, int status, lua_KContext base) {
    (void)status;
    return lua_gettop(L) - (int)base;
}

static int call_handled(lua_State *L) {
    luaL_checktype(L, 2, LUA_TFUNCTION);
    usandbox_check(L);
    lua_pushvalue(L, 2);
    lua_pushcclosure(L, handle, 1);
    lua_replace(L, 2);
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_callk(L, lua_gettop(L) - 1, LUA_MULTRET, 0, handled_again);
    return handled_again(L, LUA_OK, 0);
}

/* ---- Strings ---- */

static int repeat(lua_State *L) {
    if (luaL_checkinteger(L, 2) > MOST)
        return luaL_error(L, "string.rep repeats %I times at most in a sandbox", (LUAI_UACINT)MOST);
    return call_own(L);
}

/* Whether a module of ours calls: its patterns are known. Chunks of scripts never have a name that begins so. */
static bool is_trusted(lua_State *L) {
    lua_Debug ar;
    return lua_getstack(L, 1, &ar) && lua_getinfo(L, "S", &ar) && ar.source[0] == '@';
}

/* Steps of the worst text: each repetition may end at every byte, and an unanchored pattern begins at every byte. */
static double worst_steps(const char *pattern, size_t len, size_t text, bool anchors) {
    int repeats = anchors && len && pattern[0] == '^' ? 0 : 1;
    for (size_t i = 0; i < len; i++) {
        if (pattern[i] == '%') {
            i++;
            if (i < len && pattern[i] == 'b') repeats++;
        } else if (pattern[i] && strchr("*+-?", pattern[i])) {
            repeats++;
        }
    }
    return pow((double)text + 1, repeats);
}

static void check_pattern(lua_State *L, bool anchors) {
    size_t text, len;
    luaL_checklstring(L, 1, &text);
    const char *pattern = luaL_checklstring(L, 2, &len);
    if (!is_trusted(L) && worst_steps(pattern, len, text, anchors) > MOST_STEPS)
        luaL_error(
            L,
            "the pattern could take too long over %I bytes for a sandbox; anchor it with ^, repeat less in it, or "
            "take shorter texts",
            (LUAI_UACINT)text);
}

static int match(lua_State *L) {
    check_pattern(L, true);
    return call_own(L);
}

/* find(text, words, init, plain) */
static int find(lua_State *L) {
    if (!lua_toboolean(L, 4)) check_pattern(L, true);
    return call_own(L);
}

static int match_all(lua_State *L) {
    check_pattern(L, false);
    call_own(L);
    lua_settop(L, 1);
    lua_pushcclosure(L, call_own, 1); /* the iterator's time counts too */
    return 1;
}

/* ---- Tables: their length is what is there, not what __len says ---- */

static void check_length(lua_State *L) {
    luaL_checkany(L, 1);
    if (luaL_getmetafield(L, 1, "__len") != LUA_TNIL)
        luaL_error(L, "tables with __len are not taken here in a sandbox");
}

static int change_table(lua_State *L) {
    check_length(L);
    return call_own(L);
}

static void check_range(lua_State *L, int first, int last) {
    lua_Integer a = luaL_optinteger(L, first, 1), b = luaL_optinteger(L, last, 0);
    if (b > a && (lua_Unsigned)b - (lua_Unsigned)a > (lua_Unsigned)MOST)
        luaL_error(L, "a range of more than %I elements is not taken in a sandbox", (LUAI_UACINT)MOST);
}

static int join(lua_State *L) {
    check_length(L);
    check_range(L, 3, 4);
    return call_own(L);
}

static int move(lua_State *L) {
    check_range(L, 2, 3);
    return call_own(L);
}

/* ---- All of them ---- */

typedef struct replacement {
    const char *library, *name; /* library NULL: the base library's */
    lua_CFunction f;            /* NULL: taken away */
} replacement;

static const replacement GUARDS[] = {
    { NULL, "setmetatable", set_metatable },
    { NULL, "xpcall", call_handled },
    { NULL, "dofile", NULL },
    { NULL, "loadfile", NULL },
    { NULL, "collectgarbage", NULL },
    { "string", "dump", NULL },
    { "string", "rep", repeat },
    { "string", "find", find },
    { "string", "match", match },
    { "string", "gsub", match },
    { "string", "gmatch", match_all },
    { "table", "insert", change_table },
    { "table", "remove", change_table },
    { "table", "sort", change_table },
    { "table", "unpack", change_table },
    { "table", "concat", join },
    { "table", "move", move },
    { "coroutine", "create", make_coroutine },
    { "coroutine", "close", close_coroutine },
};

static void push_library(lua_State *L, const char *library) {
    if (library)
        lua_getglobal(L, library);
    else
        lua_pushglobaltable(L);
}

/* A closure over Lua's own function and the table at `extra`, as field `name` of the table at `to`. */
static void guard_global(lua_State *L, int to, const char *name, lua_CFunction f, int extra) {
    lua_getglobal(L, name);
    lua_pushvalue(L, extra);
    lua_pushcclosure(L, f, 2);
    lua_setfield(L, to, name);
}

void usandbox_guard(lua_State *L, int globals) {
    for (size_t i = 0; i < sizeof GUARDS / sizeof *GUARDS; i++) {
        const replacement *g = &GUARDS[i];
        push_library(L, g->library);
        if (g->f) {
            lua_getfield(L, -1, g->name);
            lua_pushcclosure(L, g->f, 1);
        } else {
            lua_pushnil(L);
        }
        lua_setfield(L, -2, g->name);
        lua_pop(L, 1);
    }
    lua_getglobal(L, "coroutine"); /* over the guarded create */
    lua_getfield(L, -1, "create");
    lua_getupvalue(L, -1, 1);
    lua_pushcclosure(L, wrap_coroutine, 1);
    lua_setfield(L, -3, "wrap");
    lua_newtable(L);
    int set_here = lua_gettop(L);
    lua_newtable(L);
    lua_pushliteral(L, "k");
    lua_setfield(L, -2, "__mode");
    lua_setmetatable(L, set_here);
    guard_global(L, globals, "load", load_text, globals);
    guard_global(L, globals, "getmetatable", get_metatable, set_here);
    lua_getglobal(L, "setmetatable"); /* the guarded one's own is one deeper */
    lua_getupvalue(L, -1, 1);
    lua_pushvalue(L, set_here);
    lua_pushcclosure(L, set_own_metatable, 2);
    lua_setfield(L, globals, "setmetatable");
    lua_settop(L, globals);
}
