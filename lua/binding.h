/* What the files of the binding share. Rules:
 *   - a handle is made closed first, then opened, so that a Lua error between the two leaks nothing;
 *   - no Lua error ever jumps across a frame of core: callbacks catch, core unwinds, the binding raises again;
 *   - C memory that must survive a Lua call stands in a userdata (ulua_buffer, ulua_adopt). */
#ifndef ULUA_BINDING_H
#define ULUA_BINDING_H

#include <lauxlib.h>
#include <lua.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "lua/unsloth_lua.h"

/* ---- Errors (error.c) ---- */

/* Raises the error object { code, message } of a failed call on the state's context. Never returns. */
int ulua_raise(lua_State *L, usl_status st);
/* The same with a sentence of the binding's own; fmt as in lua_pushfstring. */
int ulua_fail(lua_State *L, usl_status st, const char *fmt, ...);
/* Pushes such an error object. */
void ulua_error_push(lua_State *L, usl_status st, const char *message);
/* Makes the error object's metatable; pushes nothing. */
void ulua_error_open(lua_State *L);
/* error(code, message) for the Lua modules. */
int ulua_error_new(lua_State *L);

/* Evaluates a usl call; when memory is short collects all garbage and tries once more; raises what is left. */
#define ULUA_TRY(L, expr)                                  \
    do {                                                   \
        usl_status ulua_st_ = (expr);                      \
        if (ulua_st_ == USL_ERR_NOMEM) {                   \
            lua_gc((L), LUA_GCCOLLECT, 0);                 \
            ulua_st_ = (expr);                             \
        }                                                  \
        if (ulua_st_ != USL_OK) ulua_raise((L), ulua_st_); \
    } while (0)

/* ---- Handles (handle.c) ---- */

typedef struct ulua_class {
    const char *name;           /* "unsloth.Tensor": the metatable's key and __name */
    void (*release)(void *ptr); /* NULL is never passed */
    const luaL_Reg *methods;
    const luaL_Reg *meta; /* further metamethods, may be NULL */
    /* Pushes the value of a field that is no method and returns true; NULL: there are none. Key is at index 2. */
    bool (*get)(lua_State *L, void *ptr, const char *key);
} ulua_class;

typedef struct ulua_handle {
    const ulua_class *cls;
    void *ptr; /* NULL once closed */
    int busy;  /* a call on it is running, so a callback may not close it or call it again */
} ulua_handle;

/* Registers the metatable and pushes the class's table of methods, which Lua modules may extend. */
void ulua_define(lua_State *L, const ulua_class *cls);
/* Pushes a closed handle. */
ulua_handle *ulua_new(lua_State *L, const ulua_class *cls);
/* The open handle at idx, or an error that says what was expected. */
ulua_handle *ulua_check(lua_State *L, int idx, const ulua_class *cls);
void *ulua_ptr(lua_State *L, int idx, const ulua_class *cls);
/* NULL when the value is none of that class. */
ulua_handle *ulua_test(lua_State *L, int idx, const ulua_class *cls);
/* Tells the collector that a handle brought this many bytes which it cannot see. */
void ulua_account(lua_State *L, uint64_t bytes);

/* Pushes a userdata of this many bytes, freed by the collector. */
void *ulua_buffer(lua_State *L, size_t bytes);
/* Pushes an owner for memory that core made new: set *slot and it is freed with usl_free. */
void **ulua_adopt(lua_State *L);

/* When the error value on top is Lua's about a yield where none is possible, puts an error object in its place. */
void ulua_explain_yield(lua_State *L);
/* call(fn, ...) for the Lua modules: a callback's results; a callback that yields is an error that says so. */
int ulua_callback(lua_State *L);

/* ---- Progress (module.c) ---- */

/* Who is told how far a long operation is: set for the length of a call. failed: the function raised, and its error
 * lies on top of L's stack. */
typedef struct ulua_progress {
    lua_State *L;
    int fn; /* stack index of the function */
    bool failed;
} ulua_progress;
ulua_progress *ulua_progress_of(lua_State *L);

/* ---- Arguments (options.c) ---- */

typedef enum ulua_kind { ULUA_INT, ULUA_INT64, ULUA_UINT64, ULUA_DOUBLE, ULUA_BOOL, ULUA_STRING, ULUA_DTYPE } ulua_kind;
typedef struct ulua_option {
    const char *name;
    ulua_kind kind;
    size_t offset;
} ulua_option;
/* Fills an option struct from the table at idx (nil and none: nothing to do); an unknown key is an error that names the
 * nearest known one. Strings are borrowed from the table. `also` are names handled by the caller, NULL at the end. */
void ulua_options(lua_State *L, int idx, const char *what, const ulua_option *list, size_t count,
                  const char *const *also, void *opts);
/* nearest(word, {names}) -> the name with the smallest edit distance, or nil when none is near. */
int ulua_nearest(lua_State *L);
/* An integer argument; integral floats count. */
int64_t ulua_integer(lua_State *L, int idx, const char *what);
/* A dtype by name; USL_DTYPE_AUTO for nil. */
usl_dtype ulua_dtype(lua_State *L, int idx);
/* A field of the option table at idx: nil counts as the fallback. */
bool ulua_flag(lua_State *L, int idx, const char *name, bool fallback);
/* The array of token ids at idx as int32; pushes the buffer that holds them. */
int32_t *ulua_ids(lua_State *L, int idx, size_t *count);
/* Pushes an array of ids. */
void ulua_push_ids(lua_State *L, const int32_t *ids, size_t count);

/* ---- Text for a terminal (plain.c) ---- */

typedef struct ulua_plain {
    const char *text; /* in the text, or in buf */
    size_t len;
    char buf[12];
} ulua_plain;
/* The next character as it may be shown: controls as \x1B, also \n and \t when it is to be one line. Returns how many
 * bytes of the text it is; len is above 0. */
size_t ulua_plain_next(const char *text, size_t len, bool one_line, ulua_plain *out);
void ulua_plain_write(FILE *f, const char *text);
/* printable(text, one_line) -> the text as it may be shown */
int ulua_printable(lua_State *L);

/* ---- JSON (json.c): values through a tape, so that no Lua error can cross core's frames ---- */

typedef struct ulua_tape ulua_tape;
extern const usl_json_visitor ulua_tape_visitor;
/* Pushes the tape's owner. Then: usl_*_visit(..., &ulua_tape_visitor, tape); ulua_tape_push. */
ulua_tape *ulua_tape_new(lua_State *L);
void ulua_tape_clear(ulua_tape *tape);
/* Raises: the visitor stopped since the tape had no memory, or what core says. */
int ulua_tape_raise(lua_State *L, const ulua_tape *tape, usl_status st);
/* Pushes the recorded value. row: null in an object is nil, as a data-set row wants it. */
void ulua_tape_push(lua_State *L, const ulua_tape *tape, bool row);
/* Pushes the JSON text of the value at idx. */
void ulua_json_encode(lua_State *L, int idx);

/* ---- Places and hosts (root.c, host.c) ---- */

/* Pushes the folder that holds unsloth/init.lua. */
void ulua_push_root(lua_State *L);
/* True when a host gave the state its context: then its log hears what the modules say, and no terminal is drawn on. */
bool ulua_is_hosted(lua_State *L);
/* Gives the state this context; an error when it has one. */
void ulua_set_ctx(lua_State *L, usl_ctx *ctx);

/* ---- Classes ---- */

extern const ulua_class ulua_tensor, ulua_tokenizer, ulua_text_stream, ulua_dataset, ulua_rows, ulua_model,
    ulua_generator, ulua_trainer;

extern const luaL_Reg ulua_tensor_operators[]; /* of tensor_math.c */
void ulua_tensor_open(lua_State *L);           /* each adds its functions to the table on top */
void ulua_tensor_math_open(lua_State *L);
void ulua_safetensors_open(lua_State *L);
void ulua_json_open(lua_State *L);
void ulua_tokenizer_open(lua_State *L);
void ulua_dataset_open(lua_State *L);
void ulua_model_open(lua_State *L);
void ulua_trainer_open(lua_State *L);
void ulua_export_open(lua_State *L);
void ulua_hub_open(lua_State *L);
void ulua_machine_open(lua_State *L);

#endif
