/* unsloth-lua: an interpreter like Lua's own with the module built in. The program
 * alone may print, exit and take signals (interrupt.c). */
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#define LUA_INIT_VAR "LUA_INIT"

#include "lua/binding.h"
#include "lua/program.h"

static const char USAGE[] =
    "usage: " PROGRAM " [options] [script [args]]\n"
    "  -e stat   execute string 'stat'\n"
    "  -l name   require library 'name' into global 'name'\n"
    "  -i        enter interactive mode after executing 'script'\n"
    "  -v        show version information\n"
    "  -E        ignore environment variables\n"
    "  -W        turn warnings on\n"
    "  -h        show this help\n"
    "  --        stop handling options\n"
    "  -         execute stdin and stop handling options\n"
    "A first word that is no file but a verb runs a built-in tool: info, download, chat, "
    "generate, export,\nbench, plan (each with --help).\n"
    "Threads: as many as processors that the process may run on (taskset, a container's set), or "
    "as\nUNSLOTH_LUA_THREADS says. Results do not depend on the number.\n";

/* What files say may stand in a sentence: it must not steer the terminal. */
static void complain(const char *text) {
    fprintf(stderr, "%s: ", PROGRAM);
    ulua_plain_write(stderr, text);
    fputc('\n', stderr);
    fflush(stderr);
}

/* ---- Standard output ---- */

/* What was printed may stand in a buffer until the very end: only then is it known whether it could be written. */
static void check_output(void) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return;
    complain("standard output cannot be written (a full disk?): what was printed is lost, what was saved is whole");
    _exit(EXIT_FAILURE);
}

/* ---- Calls ---- */

/* Whether Ctrl-C made the error at idx; the field may be asked for where errors must not be raised. */
static bool is_interrupt(lua_State *L, int idx) {
    if (!lua_istable(L, idx)) return false;
    lua_pushvalue(L, idx);
    lua_pushliteral(L, "code");
    const char *code = lua_rawget(L, -2) == LUA_TSTRING ? lua_tostring(L, -1) : "";
    bool is = strcmp(code, usl_status_name(USL_ERR_CANCELLED)) == 0;
    lua_pop(L, 2);
    return is;
}

/* Puts what unsloth.explain makes of the message on top in its place: the line, the name that was probably meant. Where
 * the module cannot be had the message stays. */
static void explain(lua_State *L) {
    int top = lua_gettop(L);
    if (lua_checkstack(L, LUA_MINSTACK) && lua_getglobal(L, "require") == LUA_TFUNCTION) {
        lua_pushliteral(L, "unsloth.explain");
        if (lua_pcall(L, 1, 1, 0) == LUA_OK && lua_istable(L, -1) && lua_getfield(L, -1, "message") == LUA_TFUNCTION) {
            lua_pushvalue(L, top);
            lua_pushinteger(L, 2); /* this handler, then what raised */
            if (lua_pcall(L, 2, 1, 0) == LUA_OK && lua_isstring(L, -1)) {
                lua_replace(L, top);
            }
        }
    }
    lua_settop(L, top);
}

/* Whether the value at 1 is one of the library's error objects. */
static bool is_sentence(lua_State *L) {
    bool is = lua_istable(L, 1) && lua_getmetatable(L, 1);
    if (is) is = luaL_getmetatable(L, "unsloth.Error") == LUA_TTABLE && lua_rawequal(L, -1, -2);
    lua_settop(L, 1);
    return is;
}

/* Pushes "\n\t(at script.lua:7)", the innermost line that is no module's of ours, or "". */
static void push_place(lua_State *L) {
    lua_Debug ar;
    for (int level = 1; lua_getstack(L, level, &ar); level++) {
        lua_getinfo(L, "Sl", &ar);
        if (ar.currentline > 0 && !strstr(ar.source, "/unsloth/")) {
            lua_pushfstring(L, "\n\t(at %s:%d)", ar.short_src, ar.currentline);
            return;
        }
    }
    lua_pushliteral(L, "");
}

/* Plain messages get a traceback, once; error objects are a sentence already and get the script's line. These stay
 * objects, so that what is closed on the way may add to the sentence. Ctrl-C is nobody's mistake. */
static int message_handler(lua_State *L) {
    if (is_interrupt(L, 1)) return 1;
    if (is_sentence(L)) {
        lua_pushliteral(L, "place");
        if (lua_rawget(L, 1) == LUA_TNIL) {
            lua_pushliteral(L, "place");
            push_place(L);
            lua_rawset(L, 1);
        }
        lua_settop(L, 1);
        return 1;
    }
    const char *text = lua_type(L, 1) == LUA_TSTRING ? lua_tostring(L, 1) : "";
    if (strstr(text, "\nstack traceback:\n") || strstr(text, "\n\t(at ")) return 1; /* it has been here */
    if (lua_isstring(L, 1)) {
        luaL_traceback(L, L, NULL, 1);
        lua_insert(L, 1);
        lua_settop(L, 2);
        explain(L);
        lua_pushfstring(L, "%s\n%s", lua_tostring(L, 2), lua_tostring(L, 1));
        return 1;
    }
    if (!luaL_callmeta(L, 1, "__tostring")) {
        luaL_traceback(L, L, lua_pushfstring(L, "(error object is a %s value)", luaL_typename(L, 1)), 1);
        return 1;
    }
    push_place(L);
    lua_concat(L, 2);
    return 1;
}

int program_call(lua_State *L, int nargs, int nresults) {
    int base = lua_gettop(L) - nargs, was_prompting = program_prompting;
    lua_pushcfunction(L, message_handler);
    lua_insert(L, base);
    program_prompting = 0;
    interrupt_begin();
    int status = lua_pcall(L, nargs, nresults, base);
    program_prompting = was_prompting;
    interrupt_end();
    lua_remove(L, base);
    return status;
}

/* An error object is on top: pushes its sentence and its place. */
static void put_into_words(lua_State *L) {
    static const char *const PARTS[] = { "message", "place" };
    int object = lua_gettop(L);
    for (int i = 0; i < 2; i++) {
        lua_pushstring(L, PARTS[i]);
        if (lua_rawget(L, object) != LUA_TSTRING) {
            lua_pop(L, 1);
            lua_pushliteral(L, "");
        }
    }
    lua_concat(L, 2);
}

int program_report(lua_State *L, int status) {
    if (status == LUA_OK) return status;
    int top = lua_gettop(L);
    if (is_interrupt(L, -1)) status = PROGRAM_INTERRUPTED;
    if (lua_istable(L, -1)) put_into_words(L);
    const char *text = lua_tostring(L, -1);
    fflush(stdout);
    complain(text ? text : "(error message is no text)");
    lua_settop(L, top - 1);
    return status;
}

static int run_chunk(lua_State *L, int status) {
    if (status == LUA_OK) status = program_call(L, 0, 0);
    return program_report(L, status);
}

static int run_library(lua_State *L, const char *name) {
    const char *equals = strchr(name, '=');
    const char *module = equals ? equals + 1 : name;
    lua_getglobal(L, "require");
    lua_pushstring(L, module);
    int status = program_call(L, 1, 1);
    if (status == LUA_OK) {
        lua_pushlstring(L, name, equals ? (size_t)(equals - name) : strlen(name));
        lua_insert(L, -2);
        lua_pushglobaltable(L);
        lua_insert(L, -3);
        lua_rawset(L, -3);
        lua_pop(L, 1);
    }
    return program_report(L, status);
}

/* ---- Scripts and verbs ---- */

/* Anything that is there and no folder: looked at, never opened, since a pipe can be read only once. */
static bool is_file(const char *path) {
    return usl_path_look(path) != USL_PATH_DIR && access(path, F_OK) == 0;
}

/* Leaves the path of the verb's script, when the word is one. */
static bool push_verb(lua_State *L, const char *word) {
    if (!*word || strspn(word, "abcdefghijklmnopqrstuvwxyz_") != strlen(word)) return false;
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "searchpath");
    lua_pushfstring(L, "unsloth.cli.%s", word);
    lua_getfield(L, -3, "path");
    lua_call(L, 2, 1);
    lua_remove(L, -2);
    if (lua_isstring(L, -1)) return true;
    lua_pop(L, 1);
    return false;
}

static int push_arguments(lua_State *L) {
    lua_getglobal(L, "arg");
    if (!lua_istable(L, -1)) luaL_error(L, "'arg' is no table");
    int n = (int)luaL_len(L, -1);
    luaL_checkstack(L, n + 3, "too many arguments to script");
    for (int i = 1; i <= n; i++) lua_rawgeti(L, -i, i);
    lua_remove(L, -n - 1);
    return n;
}

static int run_script(lua_State *L, const char *name, bool is_stdin) {
    int status;
    if (is_stdin) {
        status = luaL_loadfile(L, NULL);
    } else if (is_file(name)) {
        status = luaL_loadfile(L, name);
    } else if (push_verb(L, name)) {
        status = luaL_loadfile(L, lua_tostring(L, -1));
        lua_remove(L, -2);
    } else {
        if (usl_path_look(name) == USL_PATH_DIR)
            lua_pushfstring(L,
                            "%s is a folder, and a script or a verb is wanted: unsloth-lua info %s tells what it holds",
                            name, name);
        else if (!*name)
            lua_pushliteral(L, "the script's name is empty");
        else
            lua_pushfstring(L,
                            "cannot open %s: there is no such file, and no verb of that name (info, chat, generate, "
                            "download, export, bench, plan)",
                            name);
        status = LUA_ERRFILE;
    }
    if (status == LUA_OK) status = program_call(L, push_arguments(L), LUA_MULTRET);
    return program_report(L, status);
}

/* arg[0] is the script, what stands before it has negative numbers. */
static void make_arg(lua_State *L, char **argv, int argc, int script) {
    if (script == argc) script = 0;
    lua_createtable(L, argc, argc);
    for (int i = 0; i < argc; i++) {
        lua_pushstring(L, argv[i]);
        lua_rawseti(L, -2, i - script);
    }
    lua_setglobal(L, "arg");
}

static void print_version(void) {
    puts(PROGRAM " " USL_VERSION " (" LUA_RELEASE ")");
    fflush(stdout);
}

/* ---- Options ---- */

typedef struct command_line {
    int script; /* index of the script, argc when there is none */
    bool interactive, version, help, executes, no_environment;
    const char *wrong; /* the option that cannot be read */
} command_line;

static command_line read_command_line(int argc, char **argv) {
    command_line c = { argc, false, false, false, false, false, NULL };
    int i = 1;
    for (; i < argc && argv[i][0] == '-' && argv[i][1] != '\0'; i++) {
        const char *a = argv[i];
        if (strcmp(a, "--") == 0) {
            i++;
            break;
        }
        if (strcmp(a, "-i") == 0) {
            c.interactive = true;
        } else if (strcmp(a, "-v") == 0) {
            c.version = true;
        } else if (strcmp(a, "-E") == 0) {
            c.no_environment = true;
        } else if (strcmp(a, "-W") == 0) {
            continue; /* stands in the order of -e and -l */
        } else if (strcmp(a, "-h") == 0 || strcmp(a, "--help") == 0) {
            c.help = true;
        } else if (a[1] == 'e' || a[1] == 'l') {
            c.executes = c.executes || a[1] == 'e';
            if (a[2] == '\0' && ++i == argc) {
                c.wrong = a;
                break;
            }
        } else {
            c.wrong = a;
            break;
        }
    }
    c.script = i < argc ? i : argc;
    return c;
}

/* -e, -l and -W in the order they stand. */
static int run_options(lua_State *L, char **argv, int end) {
    for (int i = 1; i < end; i++) {
        char kind = argv[i][1];
        if (strcmp(argv[i], "-W") == 0) lua_warning(L, "@on", 0);
        if (strcmp(argv[i], "--") == 0 || (kind != 'e' && kind != 'l')) continue;
        const char *value = argv[i][2] ? argv[i] + 2 : argv[++i];
        int status = kind == 'l' ? run_library(L, value)
                                 : run_chunk(L, luaL_loadbuffer(L, value, strlen(value), "=(command line)"));
        if (status != LUA_OK) return status;
    }
    return LUA_OK;
}

/* LUA_INIT_5_4, else LUA_INIT: a chunk, or "@file". */
static int run_environment(lua_State *L) {
    const char *name = "=" LUA_INIT_VAR LUA_VERSUFFIX, *text = getenv(name + 1);
    if (!text) text = getenv((name = "=" LUA_INIT_VAR) + 1);
    if (!text) return LUA_OK;
    return run_chunk(L, *text == '@' ? luaL_loadfile(L, text + 1) : luaL_loadbuffer(L, text, strlen(text), name));
}

/* ---- The Lua modules ---- */

static void open_modules(lua_State *L) {
    luaL_openlibs(L);
    interrupt_open(L);
    ulua_error_open(L);
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
    lua_pushcfunction(L, luaopen_unsloth_core);
    lua_setfield(L, -2, "unsloth.core");
    lua_pushcfunction(L, prompt_open);
    lua_setfield(L, -2, "unsloth.prompt");
    lua_pop(L, 1);
    ulua_push_root(L);
    const char *root = lua_tostring(L, -1);
    lua_getglobal(L, "package");
    lua_pushfstring(L, "%s/?.lua;%s/?/init.lua;", root, root);
    lua_getfield(L, -2, "path");
    lua_concat(L, 2);
    lua_setfield(L, -2, "path");
    lua_pop(L, 2);
    interrupt_watch(unsloth_lua_ctx(L));
}

/* What the command line asks for, one after the other, until something fails. */
static int run_all(lua_State *L, const command_line *c, char **argv, int argc) {
    bool has_script = c->script < argc;
    int status = c->no_environment ? LUA_OK : run_environment(L);
    if (status == LUA_OK) status = run_options(L, argv, c->script);
    if (status == LUA_OK && has_script)
        status =
            run_script(L, argv[c->script], strcmp(argv[c->script], "-") == 0 && strcmp(argv[c->script - 1], "--") != 0);
    if (status != LUA_OK || !(c->interactive || (!has_script && !c->executes && !c->version))) return status;
    if (!c->interactive && !usl_is_terminal(0)) return run_script(L, NULL, true);
    print_version();
    prompt_run(L);
    return LUA_OK;
}

/* Leaves the exit status. */
static int protected_main(lua_State *L) {
    int argc = (int)lua_tointeger(L, 1);
    char **argv = lua_touserdata(L, 2);
    command_line c = read_command_line(argc, argv);
    if (c.wrong) complain(lua_pushfstring(L, "option '%s' is not known, or what belongs to it is missing", c.wrong));
    if (c.wrong || c.help) {
        fputs(USAGE, c.wrong ? stderr : stdout);
        lua_pushinteger(L, c.wrong ? EXIT_FAILURE : EXIT_SUCCESS);
        return 1;
    }
    if (c.version) print_version();
    lua_settop(L, 0);
    lua_pushboolean(L, c.no_environment);
    lua_setfield(L, LUA_REGISTRYINDEX, "LUA_NOENV");
    open_modules(L);
    make_arg(L, argv, argc, c.script);
    int status = run_all(L, &c, argv, argc);
    lua_pushinteger(L, status == LUA_OK                ? EXIT_SUCCESS
                       : status == PROGRAM_INTERRUPTED ? EXIT_INTERRUPTED
                                                       : EXIT_FAILURE);
    return 1;
}

int main(int argc, char **argv) {
    interrupt_take();
    atexit(check_output);
    lua_State *L = luaL_newstate();
    if (!L) {
        complain("not enough memory for a Lua state");
        return EXIT_FAILURE;
    }
    signal(SIGXFSZ, SIG_IGN); /* a file that may grow no more is an error, as a full disk is */
    lua_pushcfunction(L, protected_main);
    lua_pushinteger(L, argc);
    lua_pushlightuserdata(L, argv);
    int status = lua_pcall(L, 2, 1, 0), code = EXIT_FAILURE;
    if (status == LUA_OK) code = (int)lua_tointeger(L, -1);
    program_report(L, status);
    interrupt_watch(NULL);
    lua_close(L);
    return code;
}
