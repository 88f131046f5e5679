/* unsloth_lua.h: the `unsloth` module for a host with its own lua_State (link libunsloth-lua), and for `require` from a
 * stock lua5.4 (unsloth.so).
 *
 *     luaL_requiref(L, "unsloth", luaopen_unsloth, 0);   // needs the standard libraries `package`, `string`, `table`,
 * ...
 *
 * One state has one usl_ctx, made at the first use and closed with the state. */
#ifndef UNSLOTH_LUA_H
#define UNSLOTH_LUA_H

#include <lua.h>

#include "core/unsloth.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Opens the whole module: the C part and the Lua modules beside it. */
USL_API int luaopen_unsloth(lua_State *L);
/* Opens the C part alone, `unsloth.core`. */
USL_API int luaopen_unsloth_core(lua_State *L);
/* The context of this state; borrowed. Raises a Lua error for want of memory. usl_ctx_cancel on it stops what runs. */
USL_API usl_ctx *unsloth_lua_ctx(lua_State *L);

#ifdef __cplusplus
}
#endif

#endif
