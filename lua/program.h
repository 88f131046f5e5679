/* What the files of the program share: main.c runs things and takes signals, prompt.c talks with a person. */
#ifndef UNSLOTH_PROGRAM_H
#define UNSLOTH_PROGRAM_H

#include <lua.h>
#include <signal.h>
#include <stdbool.h>

#define PROGRAM "unsloth-lua"

/* Beside LUA_OK and Lua's own statuses: Ctrl-C ended the call. */
enum { PROGRAM_INTERRUPTED = 100 };

/* The prompt is there, or a script reads a line; Ctrl-C was pressed. */
extern volatile sig_atomic_t program_prompting, program_interrupted;
/* An interrupt became an error, and no prompt has come since. */
extern volatile sig_atomic_t program_raised;

/* Calls as lua_pcall does, with a traceback; Ctrl-C stops it. */
int program_call(lua_State *L, int nargs, int nresults);
/* Says what a failed call left on the stack, and takes it away. */
int program_report(lua_State *L, int status);

/* The prompt, until the end of input. */
void prompt_run(lua_State *L);
/* The module unsloth.prompt: read(text) -> a line; nil at the end of input, false at Ctrl-C. remember(line). */
int prompt_open(lua_State *L);

#endif
