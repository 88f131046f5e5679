/* The prompt: lines with editing, history and completion where libedit is, plain ones elsewhere. What values look like,
 * what may complete a word and what an error means is Lua: unsloth.show, unsloth.complete, unsloth.explain. */
#include <errno.h>
#include <locale.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <unistd.h>
#include <wchar.h>

#include <lauxlib.h>
#include <lua.h>

#include "lua/binding.h"
#include "lua/program.h"

#ifdef USL_HAVE_EDIT
#include <editline/readline.h>
#endif

enum { HISTORY = 2000 };

/* ---- Lines ---- */

#ifdef USL_HAVE_EDIT
static lua_State *completing; /* libedit's functions see nothing but globals */

/* Keys go to the program before the prompt is shown: a Ctrl-D typed in between would be the terminal's and lost. */
static int take_keys(void) {
    rl_prep_terminal(1);
    return 0;
}

/* Waits for input or Ctrl-C: the signal is let in only while this waits, so none falls between look and wait. */
static bool await_key(void) {
    sigset_t interrupt, before;
    fd_set in;
    int ready = -1;
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    pthread_sigmask(SIG_BLOCK, &interrupt, &before);
    while (!program_interrupted && ready < 0) {
        FD_ZERO(&in);
        FD_SET(STDIN_FILENO, &in);
        ready = pselect(STDIN_FILENO + 1, &in, NULL, NULL, NULL, &before);
        if (ready < 0 && errno != EINTR) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ready > 0;
}

/* A character; -1 at the end of input and at Ctrl-C. */
static int read_key(FILE *in) {
    (void)in;
    mbstate_t state;
    memset(&state, 0, sizeof state);
    while (await_key()) {
        char byte;
        wchar_t key;
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n < 0 && errno == EINTR) continue;
        if (n != 1) return -1;
        size_t used = mbrtowc(&key, &byte, 1, &state);
        if (used != (size_t)-2) return used == (size_t)-1 ? '?' : (int)key;
    }
    return -1;
}

/* Leaves { candidates }, first byte of the word that they replace: what unsloth.complete says of a line. */
static int ask_completion(lua_State *L) {
    lua_getglobal(L, "require");
    lua_pushliteral(L, "unsloth.complete");
    lua_call(L, 1, 1);
    lua_getfield(L, -1, "complete");
    lua_pushvalue(L, 1);
    lua_call(L, 1, 2);
    return 2;
}

static size_t common(const char *a, const char *b, size_t most) {
    size_t n = 0;
    while (n < most && a[n] == b[n]) n++;
    return n;
}

/* libedit's array: what all candidates begin with, then each, 0 at the end; all of malloc. `skip` bytes of each
 * candidate stand in the line before the word as libedit cuts it. */
static char **match_list(lua_State *L, int idx, size_t skip) {
    size_t n = (size_t)lua_rawlen(L, idx), prefix = SIZE_MAX;
    if (n == 0) return NULL;
    char **list = calloc(n + 2, sizeof *list);
    if (!list) return NULL;
    for (size_t i = 1; i <= n; i++) {
        size_t len;
        lua_rawgeti(L, idx, (lua_Integer)i);
        const char *word = lua_tolstring(L, -1, &len);
        if (!word || len < skip) word = "", len = skip = 0;
        list[i] = strdup(word + skip);
        lua_pop(L, 1);
        if (!list[i]) {
            while (i > 0) free(list[i--]);
            free(list);
            return NULL;
        }
        prefix = i == 1 ? strlen(list[1]) : common(list[1], list[i], prefix);
    }
    list[0] = strndup(list[1], prefix);
    if (!list[0]) list[0] = strdup("");
    return list;
}

static char **complete_word(const char *text, int start, int end) {
    lua_State *L = completing;
    char **list = NULL;
    int top = lua_gettop(L);
    (void)text;
    rl_attempted_completion_over = 1; /* no file names of libedit's own */
    rl_completion_append_character = '\0';
    if (!lua_checkstack(L, LUA_MINSTACK)) return NULL;
    lua_pushcfunction(L, ask_completion);
    lua_pushlstring(L, rl_line_buffer, (size_t)end);
    if (lua_pcall(L, 1, 2, 0) == LUA_OK && lua_istable(L, top + 1)) {
        lua_Integer first = lua_tointeger(L, top + 2) - 1;
        if (first <= start) list = match_list(L, top + 1, (size_t)(start - first));
    }
    lua_settop(L, top);
    return list;
}

/* What is there of the history, in $HOME; UNSLOTH_LUA_HISTORY names another file, or none when it is empty. */
static const char *history_path(lua_State *L) {
    const char *path = getenv("UNSLOTH_LUA_HISTORY"), *home = getenv("HOME");
    if (path) return *path ? lua_pushstring(L, path) : NULL;
    return home && *home ? lua_pushfstring(L, "%s/.unsloth_lua_history", home) : NULL;
}

static void open_lines(lua_State *L) {
    static bool is_open;
    int top = lua_gettop(L);
    completing = L;
    if (is_open) return;
    is_open = true;
    setlocale(LC_CTYPE, ""); /* for the editor: what is typed may be any text */
    rl_readline_name = PROGRAM;
    rl_attempted_completion_function = complete_word;
    rl_basic_word_break_characters = " \t\n\"\\'`@$><=;|&{}()[]+-*/^%#~,.:!?";
    rl_pre_input_hook = take_keys;
    rl_getc_function = read_key; /* looked at when libedit begins, which the next line makes it do */
    using_history();
    stifle_history(HISTORY);
    const char *path = usl_is_terminal(0) ? history_path(L) : NULL;
    if (path) read_history(path);
    lua_settop(L, top);
}

static bool push_line(lua_State *L, const char *prompt) {
    open_lines(L);
    char *line = readline(prompt);
    if (!line) return false;
    lua_pushstring(L, line);
    free(line);
    return true;
}

static void remember(lua_State *L, const char *text) {
    int top = lua_gettop(L);
    if (!*text) return;
    add_history(text);
    const char *path = usl_is_terminal(0) ? history_path(L) : NULL;
    if (path) write_history(path); /* at once: a run may end in any way */
    lua_settop(L, top);
}
#else
static bool push_line(lua_State *L, const char *prompt) {
    fputs(prompt, stdout);
    fflush(stdout);
    luaL_Buffer b;
    luaL_buffinit(L, &b);
    int c;
    while ((c = getchar()) != EOF && c != '\n') luaL_addchar(&b, (char)c);
    luaL_pushresult(&b);
    clearerr(stdin); /* Ctrl-C makes an error of it */
    return !program_interrupted && (c != EOF || lua_rawlen(L, -1) > 0);
}

static void remember(lua_State *L, const char *text) {
    (void)L;
    (void)text;
}
#endif

/* Ctrl-C is noted from here on (1), or stops what runs (0). Held back meanwhile, so that the one or the other meets it.
 * Tells whether one was noted. */
static bool set_prompting(int is) {
    sigset_t interrupt, before;
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    pthread_sigmask(SIG_BLOCK, &interrupt, &before);
    bool noted = program_prompting && program_interrupted;
    if (is && !program_prompting) program_interrupted = 0;
    program_raised = 0;
    program_prompting = is;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return noted;
}

/* False at the end of input, and at Ctrl-C, when program_interrupted tells: also when it came behind the Enter. */
static bool read_prompted(lua_State *L, const char *prompt) {
    int was_prompting = program_prompting;
    set_prompting(1);
    bool ok = !program_interrupted && push_line(L, prompt);
    return !set_prompting(was_prompting) && ok;
}

static bool read_line(lua_State *L, bool first) {
    lua_getglobal(L, first ? "_PROMPT" : "_PROMPT2");
    return read_prompted(L, lua_isnil(L, -1) ? (first ? "> " : ">> ") : luaL_tolstring(L, -1, NULL));
}

/* ---- For scripts that ask ---- */

static int prompt_read(lua_State *L) {
    const char *prompt = luaL_optstring(L, 1, "");
    if (read_prompted(L, prompt)) return 1;
    if (program_interrupted) {
        program_interrupted = 0;
        lua_pushboolean(L, 0);
    } else {
        lua_pushnil(L);
    }
    return 1;
}

static int prompt_remember(lua_State *L) {
    remember(L, luaL_checkstring(L, 1));
    return 0;
}

int prompt_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "read", prompt_read }, { "remember", prompt_remember }, { NULL, NULL } };
    luaL_newlib(L, FUNCTIONS);
    return 1;
}

/* ---- Statements ---- */

/* True when the chunk only stopped too early: another line may complete it. The message is on top. */
static bool is_incomplete(lua_State *L, int status) {
    size_t len;
    const char *text = status == LUA_ERRSYNTAX ? lua_tolstring(L, -1, &len) : NULL;
    static const char MARK[] = "<eof>";
    return text && len >= sizeof MARK - 1 && strcmp(text + len - (sizeof MARK - 1), MARK) == 0;
}

/* Calls a function of a Lua module with what is above `base` and leaves its one result; false when that fails. */
static bool ask(lua_State *L, const char *module, const char *name, int base) {
    lua_getglobal(L, "require");
    lua_pushstring(L, module);
    if (program_call(L, 1, 1) != LUA_OK) return false;
    lua_getfield(L, -1, name);
    lua_insert(L, base + 1);
    lua_pop(L, 1);
    return program_call(L, lua_gettop(L) - base - 1, 1) == LUA_OK;
}

/* unsloth.explain looks lines up in what was typed. */
static void keep_chunk(lua_State *L) {
    int top = lua_gettop(L);
    if (luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE) &&
        lua_getfield(L, -1, "unsloth.explain") == LUA_TTABLE) {
        lua_pushvalue(L, 1);
        lua_setfield(L, -2, "chunk");
    }
    lua_settop(L, top);
}

/* A chunk is on top: in its place the one whose locals of the top level are globals, which the next line sees. */
static void keep_locals(lua_State *L) {
    size_t len;
    int top = lua_gettop(L);
    if (!strstr(lua_tostring(L, 1), "local")) return;
    lua_pushvalue(L, 1);
    const char *text = ask(L, "unsloth.toplevel", "globals", top) ? lua_tolstring(L, -1, &len) : NULL;
    if (text && luaL_loadbuffer(L, text, len, "=stdin") == LUA_OK) lua_replace(L, top);
    lua_settop(L, top);
}

/* Index 1 holds the line. Leaves the chunk, or the message; lines that continue it are read as needed. */
static int load_statement(lua_State *L) {
    for (;;) {
        size_t len;
        const char *text = lua_tolstring(L, 1, &len);
        int status = luaL_loadbuffer(L, text, len, "=stdin");
        if (!is_incomplete(L, status)) {
            remember(L, text);
            keep_chunk(L);
            if (status == LUA_OK) keep_locals(L);
            return status;
        }
        lua_settop(L, 1);
        if (!read_line(L, false)) {
            lua_settop(L, 1);
            return program_interrupted ? PROGRAM_INTERRUPTED : luaL_loadbuffer(L, text, len, "=stdin");
        }
        lua_pushfstring(L, "%s\n%s", text, lua_tostring(L, -1));
        lua_replace(L, 1);
        lua_settop(L, 1);
    }
}

/* Whether the line is one of these words alone, and no variable of the user's has that name. */
static bool is_word(lua_State *L, const char *line, const char *const *words) {
    size_t space = strspn(line, " \t"), n = strcspn(line + space, " \t();");
    const char *rest = line + space + n;
    for (; *words; words++) {
        if (strlen(*words) != n || strncmp(line + space, *words, n) != 0) continue;
        if (strspn(rest, " \t();") != strlen(rest)) return false;
        bool is_free = lua_getglobal(L, *words) == LUA_TNIL;
        lua_pop(L, 1);
        return is_free;
    }
    return false;
}

/* What people type to leave. */
static const char *const LEAVING[] = { "quit", "exit", NULL };

/* -1 at the end of input, PROGRAM_INTERRUPTED when the line was left. An expression is tried first. */
static int load_line(lua_State *L) {
    lua_settop(L, 0);
    if (!read_line(L, true)) return program_interrupted ? PROGRAM_INTERRUPTED : -1;
    lua_replace(L, 1);
    lua_settop(L, 1);
    keep_chunk(L);
    const char *line = lua_tostring(L, 1), *expression = line[0] == '=' ? line + 1 : line;
    if (is_word(L, line, LEAVING)) return -1;
    const char *returned = lua_pushfstring(L, "return %s", expression);
    int status = luaL_loadbuffer(L, returned, strlen(returned), "=stdin");
    if (status == LUA_OK) {
        remember(L, line);
    } else {
        lua_settop(L, 1);
        status = load_statement(L);
        if (status == LUA_ERRSYNTAX) {
            lua_pushvalue(L, 1);
            if (!ask(L, "unsloth.explain", "syntax", 1)) lua_pop(L, 1);
        }
    }
    lua_replace(L, 1);
    lua_settop(L, 1);
    return status;
}

/* With the pretty printer; `print` when a script has put its own in its place. */
static void print_results(lua_State *L) {
    int n = lua_gettop(L);
    if (n == 0) return;
    luaL_checkstack(L, LUA_MINSTACK, "too many results to print");
    if (!ask(L, "unsloth.show", "results", 0)) {
        program_report(L, LUA_ERRRUN);
        return;
    }
    lua_getglobal(L, "print");
    lua_insert(L, 1);
    if (program_call(L, 1, 0) != LUA_OK) program_report(L, LUA_ERRRUN);
}

/* The globals of a prompt: `unsloth` and `help`. */
static void open_prompt(lua_State *L) {
    static const char CODE[] = "unsloth = unsloth or require 'unsloth' "
                               "help = help or unsloth.help "
                               "require('unsloth.explain')";
    int status = luaL_loadbuffer(L, CODE, sizeof CODE - 1, "=prompt");
    if (status == LUA_OK) status = program_call(L, 0, 0);
    program_report(L, status);
}

void prompt_run(lua_State *L) {
    program_has_prompt = 1;
    puts("help() tells what there is, Ctrl-D or quit leaves");
    fflush(stdout);
    set_prompting(1); /* until the end: between two calls nothing runs that Ctrl-C could end */
    open_prompt(L);
    for (int status; (status = load_line(L)) != -1;) {
        if (status == PROGRAM_INTERRUPTED) {
            program_interrupted = 0;
            puts("");
            continue;
        }
        if (status == LUA_OK) status = program_call(L, 0, LUA_MULTRET);
        if (status == LUA_OK)
            print_results(L);
        else
            program_report(L, status);
    }
    set_prompting(0);
    lua_settop(L, 0);
    puts("");
}
