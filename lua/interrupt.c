/* Ctrl-C: stops the library at its next safe point, Lua at its next instruction, in whichever coroutine it is. */
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include "lua/binding.h"
#include "lua/program.h"

/* Signal handlers see nothing but globals. */
static lua_State *main_state;
static usl_ctx *main_ctx;
static pthread_t main_thread;
static volatile sig_atomic_t is_running;
static volatile sig_atomic_t for_good;
static volatile time_t raised_at;
volatile sig_atomic_t program_has_prompt, program_prompting, program_interrupted, program_raised;

/* The coroutines that run, the innermost first, below them the main state: a hook belongs to one of these alone. */
typedef struct running {
    lua_State *L;
    struct running *volatile up;
} running;
static running *volatile innermost;

static void set_hooks(lua_Hook hook) {
    int mask = hook ? LUA_MASKCALL | LUA_MASKRET | LUA_MASKLINE | LUA_MASKCOUNT : 0;
    for (running *r = innermost; r; r = r->up) lua_sethook(r->L, hook, mask, 1);
    lua_sethook(main_state, hook, mask, 1);
}

/* A script that catches the error may go on, and be stopped again. */
static void forget_interrupt(void) {
    set_hooks(NULL);
    if (main_ctx) usl_ctx_uncancel(main_ctx);
    program_interrupted = 0;
}

/* Once it is for good every instruction raises, so that whoever catches the error gets no further than to the next. */
static void stop_hook(lua_State *L, lua_Debug *ar) {
    (void)ar;
    if (!for_good) {
        bool stale = !program_interrupted; /* a coroutine that was left before its hook came to raise */
        lua_sethook(L, NULL, 0, 0);
        if (stale) return;
        forget_interrupt();
    } else {
        set_hooks(stop_hook);
    }
    program_raised = 1;
    raised_at = time(NULL);
    ulua_error_push(L, USL_ERR_CANCELLED, "interrupted: what was saved before is whole");
    lua_error(L);
}

/* What a script that catches its errors may take to be stopped once more, not to be ended. */
enum { IMPATIENT = 2 /* seconds */ };

static void stop(void) {
    if (main_ctx) usl_ctx_cancel(main_ctx);
    set_hooks(stop_hook);
}

/* The library stops at its next safe point, Lua at its next instruction; at the prompt the line is left. The second
 * Ctrl-C of a call stops it for good, whatever it catches. One while nothing runs ends the program, and so does a
 * second one before Lua has stopped, or soon after an error that the script has caught: at the prompt, where there is
 * something to come back to, the third. */
static void on_interrupt(int number) {
    if (!pthread_equal(pthread_self(), main_thread)) {
        pthread_kill(main_thread, number);
        return;
    }
    bool again = program_interrupted || program_raised;
    bool soon = program_interrupted || (program_raised && time(NULL) - raised_at <= IMPATIENT);
    if (!program_prompting && (!is_running || (program_has_prompt ? for_good : soon))) _exit(EXIT_INTERRUPTED);
    program_interrupted = 1;
    if (program_prompting) return;
    for_good = for_good || again;
    stop();
}

void interrupt_take(void) {
    main_thread = pthread_self();
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt; /* without SA_RESTART: a read that waits ends */
    sigaction(SIGINT, &action, NULL);
}

void interrupt_begin(void) {
    is_running = 1;
    if (program_interrupted) stop(); /* the prompt has noted it between the line and its call */
}

void interrupt_end(void) {
    is_running = 0;
    for_good = 0;
    forget_interrupt();
}

void interrupt_watch(usl_ctx *ctx) {
    main_ctx = ctx;
}

/* ---- Coroutines: Lua's own functions, but for that they say which one runs ---- */

/* Moves n values and resumes; leaves the results or the error on L, and their number, -1 for an error. */
static int resume(lua_State *L, lua_State *co, int n) {
    int results = 0, status;
    if (!lua_checkstack(co, n)) {
        lua_pushliteral(L, "too many arguments to resume");
        return -1;
    }
    lua_xmove(L, co, n);
    running here = { co, innermost };
    innermost = &here; /* from here to the next assignment nothing raises on L */
    if (lua_gethook(L) == stop_hook) lua_sethook(co, stop_hook, lua_gethookmask(L), 1);
    status = lua_resume(co, L, n, &results);
    innermost = here.up;
    if (status != LUA_OK && status != LUA_YIELD) {
        lua_xmove(co, L, 1);
        return -1;
    }
    if (!lua_checkstack(L, results + 1)) {
        lua_pop(co, results);
        lua_pushliteral(L, "too many results to resume");
        return -1;
    }
    lua_xmove(co, L, results);
    return results;
}

static int coroutine_resume(lua_State *L) {
    lua_State *co = lua_tothread(L, 1);
    luaL_argexpected(L, co, 1, "coroutine");
    int n = resume(L, co, lua_gettop(L) - 1);
    lua_pushboolean(L, n >= 0);
    lua_insert(L, n >= 0 ? -(n + 1) : -2);
    return n >= 0 ? n + 1 : 2;
}

/* An error closes what the coroutine has open, and says where the call was. Upvalue: the coroutine. */
static int wrapped(lua_State *L) {
    lua_State *co = lua_tothread(L, lua_upvalueindex(1));
    int n = resume(L, co, lua_gettop(L));
    if (n >= 0) return n;
    int status = lua_status(co);
    if (status != LUA_OK && status != LUA_YIELD) {
        lua_pushvalue(L, -1);
        lua_xmove(L, co, 1); /* it was the coroutine's, whose status it goes with */
        status = lua_resetthread(co);
        lua_xmove(co, L, 1);
    }
    if (status != LUA_ERRMEM && lua_type(L, -1) == LUA_TSTRING) {
        luaL_where(L, 1);
        lua_insert(L, -2);
        lua_concat(L, 2);
    }
    return lua_error(L);
}

static int coroutine_wrap(lua_State *L) {
    luaL_checktype(L, 1, LUA_TFUNCTION);
    lua_State *co = lua_newthread(L);
    lua_pushvalue(L, 1);
    lua_xmove(L, co, 1);
    lua_pushcclosure(L, wrapped, 1);
    return 1;
}

void interrupt_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "resume", coroutine_resume }, { "wrap", coroutine_wrap }, { NULL, NULL } };
    main_state = L;
    lua_getglobal(L, LUA_COLIBNAME);
    luaL_setfuncs(L, FUNCTIONS, 0);
    lua_pop(L, 1);
}
