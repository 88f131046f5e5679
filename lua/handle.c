/* Handles: a full userdata around a pointer of core. __gc, __close and :close() are one idempotent function. */
#include <string.h>

#include "lua/binding.h"

static int handle_close(lua_State *L) {
    ulua_handle *h = lua_touserdata(L, 1);
    if (!h || !h->ptr) return 0;
    if (h->busy)
        return ulua_fail(L, USL_ERR_INVALID, "%s is in use: a callback may not close what calls it", h->cls->name);
    void *ptr = h->ptr;
    h->ptr = NULL;
    h->cls->release(ptr);
    return 0;
}

static int handle_close_method(lua_State *L) {
    const ulua_class *cls = lua_touserdata(L, lua_upvalueindex(1));
    luaL_checkudata(L, 1, cls->name);
    return handle_close(L);
}

/* Methods first, then what a script has set, then the class's own fields. Upvalues: methods, class. */
static int handle_index(lua_State *L) {
    const ulua_class *cls = lua_touserdata(L, lua_upvalueindex(2));
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL) return 1;
    ulua_handle *h = lua_touserdata(L, 1);
    if (lua_getiuservalue(L, 1, 1) == LUA_TTABLE) {
        lua_pushvalue(L, 2);
        if (lua_rawget(L, -2) != LUA_TNIL) return 1;
    }
    if (!cls->get) return 0;
    if (!h->ptr) return ulua_fail(L, USL_ERR_INVALID, "%s is closed", cls->name);
    const char *key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : NULL;
    return cls->get(L, h->ptr, key) ? 1 : 0;
}

static int handle_newindex(lua_State *L) {
    if (lua_getiuservalue(L, 1, 1) != LUA_TTABLE) {
        lua_newtable(L);
        lua_pushvalue(L, -1);
        lua_setiuservalue(L, 1, 1);
    }
    lua_pushvalue(L, 2);
    lua_pushvalue(L, 3);
    lua_rawset(L, -3);
    return 0;
}

/* A class's method `describe`, which Lua modules set, says more. Upvalue: methods. */
static int handle_tostring(lua_State *L) {
    const ulua_handle *h = lua_touserdata(L, 1);
    if (h->ptr && lua_getfield(L, lua_upvalueindex(1), "describe") == LUA_TFUNCTION) {
        lua_pushvalue(L, 1);
        lua_call(L, 1, 1);
        if (lua_isstring(L, -1)) return 1;
    }
    if (h->ptr)
        lua_pushfstring(L, "%s: %p", h->cls->name, h->ptr);
    else
        lua_pushfstring(L, "%s (closed)", h->cls->name);
    return 1;
}

void ulua_define(lua_State *L, const ulua_class *cls) {
    luaL_newmetatable(L, cls->name);
    lua_newtable(L); /* methods */
    luaL_setfuncs(L, cls->methods, 0);
    lua_pushlightuserdata(L, (void *)(uintptr_t)cls);
    lua_pushcclosure(L, handle_close_method, 1);
    lua_setfield(L, -2, "close");
    lua_pushvalue(L, -1);
    lua_pushlightuserdata(L, (void *)(uintptr_t)cls);
    lua_pushcclosure(L, handle_index, 2);
    lua_setfield(L, -3, "__index");
    static const luaL_Reg META[] = {
        { "__gc", handle_close }, { "__close", handle_close }, { "__newindex", handle_newindex }, { NULL, NULL }
    };
    lua_pushvalue(L, -1);
    lua_pushcclosure(L, handle_tostring, 1);
    lua_setfield(L, -3, "__tostring");
    lua_insert(L, -2);
    luaL_setfuncs(L, META, 0);
    if (cls->meta) luaL_setfuncs(L, cls->meta, 0);
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    lua_pop(L, 1);
}

ulua_handle *ulua_new(lua_State *L, const ulua_class *cls) {
    ulua_handle *h = lua_newuserdatauv(L, sizeof *h, 2);
    memset(h, 0, sizeof *h);
    h->cls = cls;
    luaL_setmetatable(L, cls->name);
    return h;
}

ulua_handle *ulua_test(lua_State *L, int idx, const ulua_class *cls) {
    return luaL_testudata(L, idx, cls->name);
}

ulua_handle *ulua_check(lua_State *L, int idx, const ulua_class *cls) {
    ulua_handle *h = luaL_checkudata(L, idx, cls->name);
    if (!h->ptr) ulua_fail(L, USL_ERR_INVALID, "%s is closed: open it again before using it", cls->name);
    if (h->busy) ulua_fail(L, USL_ERR_INVALID, "%s is in use: a callback may not call what calls it", cls->name);
    return h;
}

void *ulua_ptr(lua_State *L, int idx, const ulua_class *cls) {
    return ulua_check(L, idx, cls)->ptr;
}

void ulua_account(lua_State *L, uint64_t bytes) {
    uint64_t kib = bytes / 1024;
    if (kib > 0) lua_gc(L, LUA_GCSTEP, kib < 1 << 30 ? (int)kib : 1 << 30);
}

void *ulua_buffer(lua_State *L, size_t bytes) {
    return lua_newuserdatauv(L, bytes ? bytes : 1, 0);
}

static int adopted_free(lua_State *L) {
    void **slot = lua_touserdata(L, 1);
    usl_free(unsloth_lua_ctx(L), *slot);
    *slot = NULL;
    return 0;
}

void **ulua_adopt(lua_State *L) {
    void **slot = lua_newuserdatauv(L, sizeof *slot, 0);
    *slot = NULL;
    if (luaL_newmetatable(L, "unsloth.memory")) {
        lua_pushcfunction(L, adopted_free);
        lua_setfield(L, -2, "__gc");
    }
    lua_setmetatable(L, -2);
    return slot;
}

/* Lua's own words for a yield where none is possible come without a position. */
void ulua_explain_yield(lua_State *L) {
    const char *message = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : "";
    if (strcmp(message, "attempt to yield across a C-call boundary") != 0 &&
        strcmp(message, "attempt to yield from outside a coroutine") != 0)
        return;
    lua_pop(L, 1);
    ulua_error_push(L, USL_ERR_INVALID,
                    "a callback may not yield: let it return, and yield in the code that called it");
}

int ulua_callback(lua_State *L) {
    luaL_checkany(L, 1);
    bool main_thread = lua_pushthread(L);
    lua_pop(L, 1);
    /* Unprotected, an error keeps its traceback; the main thread cannot yield in any case. */
    if (main_thread)
        lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
    else if (lua_pcall(L, lua_gettop(L) - 1, LUA_MULTRET, 0) != LUA_OK) {
        ulua_explain_yield(L);
        return lua_error(L);
    }
    return lua_gettop(L);
}
