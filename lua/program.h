/* What the files of the program share: main.c runs things, interrupt.c takes Ctrl-C, prompt.c talks with a person. */
#ifndef UNSLOTH_PROGRAM_H
#define UNSLOTH_PROGRAM_H

#include <lua.h>
#include <signal.h>
#include <stdbool.h>

#include "core/unsloth.h"

#define PROGRAM "unsloth-lua"

/* Beside LUA_OK and Lua's own statuses: Ctrl-C ended the call. */
enum { PROGRAM_INTERRUPTED = 100 };
/* The exit status of a program that SIGINT ended. */
enum { EXIT_INTERRUPTED = 128 + SIGINT };

/* The program talks with a person, to whom it comes back. */
extern volatile sig_atomic_t program_has_prompt;
/* The prompt is there, or a script reads a line; Ctrl-C was pressed. */
extern volatile sig_atomic_t program_prompting, program_interrupted;
/* An interrupt became an error, and no prompt has come since. */
extern volatile sig_atomic_t program_raised;

/* Calls as lua_pcall does, with a traceback; Ctrl-C stops it. */
int program_call(lua_State *L, int nargs, int nresults);
/* Says what a failed call left on the stack, and takes it away. */
int program_report(lua_State *L, int status);

/* Takes SIGINT from now on: with nothing running it ends the program. */
void interrupt_take(void);
/* L is the state that is stopped, with coroutines that can be. */
void interrupt_open(lua_State *L);
/* The context whose work is stopped; NULL: none. */
void interrupt_watch(usl_ctx *ctx);
/* Around each call. */
void interrupt_begin(void);
void interrupt_end(void);

/* The prompt, until the end of input. */
void prompt_run(lua_State *L);
/* The module unsloth.prompt: read(text) -> a line; nil at the end of input, false at Ctrl-C. remember(line). */
int prompt_open(lua_State *L);

#endif
