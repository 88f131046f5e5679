/* Merged weights, GGUF files, adapters. */
#include <string.h>

#include "lua/binding.h"

static void release_imatrix(void *ptr) {
    usl_imatrix_free(ptr);
}
static const luaL_Reg NO_METHODS[] = { { NULL, NULL } };
static const ulua_class imatrix_class = { "unsloth.Imatrix", release_imatrix, NO_METHODS, NULL, NULL };

static const usl_tokenizer *optional_tokenizer(lua_State *L, int idx) {
    return lua_isnoneornil(L, idx) ? NULL : ulua_ptr(L, idx, &ulua_tokenizer);
}

/* What a call holds: options, and handles that no callback may close meanwhile. */
typedef struct call {
    usl_export_opts opts;
    ulua_handle *held[4];
    int count;
} call;

static void hold(lua_State *L, call *c, int idx, const ulua_class *cls) {
    if (!lua_isnoneornil(L, idx)) c->held[c->count++] = ulua_check(L, idx, cls);
}

/* Reads { verify, base, imatrix, progress } at idx; leaves the function of progress, or nil, on top. Nothing may raise
 * between this and end. */
static void begin(lua_State *L, int idx, call *c) {
    c->opts = (usl_export_opts)USL_EXPORT_OPTS_INIT;
    c->count = 0;
    hold(L, c, 1, &ulua_model);
    hold(L, c, 2, &ulua_tokenizer);
    if (lua_istable(L, idx)) {
        c->opts.verify = ulua_flag(L, idx, "verify", true);
        if (lua_getfield(L, idx, "base") != LUA_TNIL) {
            c->opts.base = ulua_ptr(L, -1, &ulua_model);
            hold(L, c, lua_gettop(L), &ulua_model);
        }
        if (lua_getfield(L, idx, "imatrix") != LUA_TNIL) {
            c->opts.imatrix = ulua_ptr(L, -1, &imatrix_class);
            hold(L, c, lua_gettop(L), &imatrix_class);
        }
        if (lua_getfield(L, idx, "progress") != LUA_TNIL) luaL_checktype(L, -1, LUA_TFUNCTION);
    } else {
        lua_pushnil(L);
    }
    luaL_checkstack(L, 8, NULL);
    *ulua_progress_of(L) = (ulua_progress){ lua_isnil(L, -1) ? NULL : L, lua_gettop(L), false };
    for (int i = 0; i < c->count; i++) c->held[i]->busy++;
}

/* Raises what the call or the function failed with. */
static void end(lua_State *L, call *c, usl_status st) {
    ulua_progress *p = ulua_progress_of(L);
    for (int i = 0; i < c->count; i++) c->held[i]->busy--;
    p->L = NULL;
    if (p->failed) {
        ulua_explain_yield(L);
        lua_error(L);
    }
    if (st != USL_OK) ulua_raise(L, st);
}

static void push_report(lua_State *L, const usl_export_report *r) {
    lua_createtable(L, 0, 4);
    lua_pushinteger(L, (lua_Integer)r->bytes);
    lua_setfield(L, -2, "bytes");
    static const char *const ONTO[] = { NULL, "float weights", "decoded weights" };
    if (ONTO[r->merged_onto]) {
        lua_pushstring(L, ONTO[r->merged_onto]);
        lua_setfield(L, -2, "merged_onto");
    }
    if (!r->checked) return;
    const struct {
        const char *name;
        double value;
    } numbers[] = { { "weights", r->weights }, { "logits", r->logits }, { "expected", r->expected } };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (numbers[i].value != numbers[i].value) continue;
        lua_pushnumber(L, numbers[i].value);
        lua_setfield(L, -2, numbers[i].name);
    }
}

/* export_merged(model, tokenizer or nil, dir, dtype, opts) -> report */
static int export_merged(lua_State *L) {
    usl_model *model = ulua_ptr(L, 1, &ulua_model);
    const usl_tokenizer *tok = optional_tokenizer(L, 2);
    const char *dir = luaL_checkstring(L, 3);
    usl_dtype dtype = ulua_dtype(L, 4);
    call c;
    usl_export_report report = { .size = sizeof report };
    begin(L, 5, &c);
    end(L, &c, usl_export_folder(model, tok, dir, dtype, &c.opts, &report));
    push_report(L, &report);
    return 1;
}

/* An array of strings at idx; pushes the buffer that holds the pointers. */
static const char **strings_at(lua_State *L, int idx, int count) {
    const char **list = ulua_buffer(L, (size_t)count * sizeof *list + 1);
    for (int i = 0; i < count; i++) {
        lua_rawgeti(L, idx, i + 1);
        list[i] = luaL_checkstring(L, -1);
        lua_pop(L, 1); /* the table keeps it */
    }
    return list;
}

/* export_gguf(model, tokenizer or nil, { path, ... }, { method, ... }, opts) -> { report, ... } */
static int export_gguf(lua_State *L) {
    usl_model *model = ulua_ptr(L, 1, &ulua_model);
    const usl_tokenizer *tok = optional_tokenizer(L, 2);
    luaL_checktype(L, 3, LUA_TTABLE);
    luaL_checktype(L, 4, LUA_TTABLE);
    lua_settop(L, 5);
    int count = (int)luaL_len(L, 3);
    luaL_argcheck(L, luaL_len(L, 4) == count, 4, "a method for each path is wanted");
    const char **paths = strings_at(L, 3, count), **methods = strings_at(L, 4, count);
    usl_export_report *reports = ulua_buffer(L, (size_t)count * sizeof *reports + 1);
    call c;
    for (int i = 0; i < count; i++) reports[i] = (usl_export_report){ .size = sizeof *reports };
    begin(L, 5, &c);
    end(L, &c, usl_export_ggufs(model, tok, count, paths, methods, &c.opts, reports));
    lua_createtable(L, count, 0);
    for (int i = 0; i < count; i++) {
        push_report(L, &reports[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

/* export_lora(model, path) */
static int export_lora(lua_State *L) {
    usl_model *model = ulua_ptr(L, 1, &ulua_model);
    ULUA_TRY(L, usl_export_lora(model, luaL_checkstring(L, 2)));
    return 0;
}

/* export_method(name) -> the name it stands for, or nil */
static int export_method(lua_State *L) {
    lua_pushstring(L, usl_export_method(luaL_checkstring(L, 1)));
    return 1;
}

/* imatrix(model, tokenizer, text, { progress }) */
static int imatrix(lua_State *L) {
    usl_model *model = ulua_ptr(L, 1, &ulua_model);
    const usl_tokenizer *tok = ulua_ptr(L, 2, &ulua_tokenizer);
    size_t len;
    const char *text = luaL_checklstring(L, 3, &len);
    call c;
    lua_settop(L, 4);
    ulua_handle *h = ulua_new(L, &imatrix_class);
    begin(L, 4, &c);
    end(L, &c, usl_imatrix_new(model, tok, text, len, (usl_imatrix **)&h->ptr));
    lua_pushvalue(L, 5);
    return 1;
}

void ulua_export_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = {
        { "export_merged", export_merged }, { "export_gguf", export_gguf }, { "export_lora", export_lora },
        { "export_method", export_method }, { "imatrix", imatrix },         { NULL, NULL }
    };
    ulua_define(L, &imatrix_class);
    lua_pop(L, 1);
    luaL_setfuncs(L, FUNCTIONS, 0);
}
