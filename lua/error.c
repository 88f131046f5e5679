/* Error objects: tables { code, message } whose tostring is the sentence. */
#include <stdarg.h>

#include "lua/binding.h"

static const char ERROR_NAME[] = "unsloth.Error";

static int error_tostring(lua_State *L) {
    lua_getfield(L, 1, "message");
    return 1;
}

/* So that `"prefix: " .. err` works as it does with plain messages. */
static int error_concat(lua_State *L) {
    luaL_tolstring(L, 1, NULL);
    luaL_tolstring(L, 2, NULL);
    lua_concat(L, 2);
    return 1;
}

void ulua_error_open(lua_State *L) {
    static const luaL_Reg META[] = { { "__tostring", error_tostring }, { "__concat", error_concat }, { NULL, NULL } };
    if (luaL_newmetatable(L, ERROR_NAME)) luaL_setfuncs(L, META, 0);
    lua_pop(L, 1);
}

void ulua_error_push(lua_State *L, usl_status st, const char *message) {
    lua_createtable(L, 0, 2);
    lua_pushstring(L, usl_status_name(st));
    lua_setfield(L, -2, "code");
    lua_pushstring(L, message);
    lua_setfield(L, -2, "message");
    luaL_setmetatable(L, ERROR_NAME);
}

int ulua_raise(lua_State *L, usl_status st) {
    const char *message = usl_ctx_errmsg(unsloth_lua_ctx(L));
    ulua_error_push(L, st, message[0] ? message : usl_status_name(st));
    return lua_error(L);
}

int ulua_fail(lua_State *L, usl_status st, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    lua_pushvfstring(L, fmt, args);
    va_end(args);
    ulua_error_push(L, st, lua_tostring(L, -1));
    return lua_error(L);
}

int ulua_error_new(lua_State *L) {
    luaL_checkstring(L, 1);
    luaL_checkstring(L, 2);
    lua_createtable(L, 0, 2);
    lua_pushvalue(L, 1);
    lua_setfield(L, -2, "code");
    lua_pushvalue(L, 2);
    lua_setfield(L, -2, "message");
    luaL_setmetatable(L, ERROR_NAME);
    return 1;
}
