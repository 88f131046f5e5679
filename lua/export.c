/* Merged weights and GGUF files. */
#include "lua/binding.h"

static const usl_tokenizer *optional_tokenizer(lua_State *L, int idx) {
    return lua_isnoneornil(L, idx) ? NULL : ulua_ptr(L, idx, &ulua_tokenizer);
}

/* export_merged(model, tokenizer or nil, dir, dtype) */
static int export_merged(lua_State *L) {
    usl_model *model = ulua_ptr(L, 1, &ulua_model);
    const usl_tokenizer *tok = optional_tokenizer(L, 2);
    const char *dir = luaL_checkstring(L, 3);
    usl_dtype dtype = ulua_dtype(L, 4);
    ULUA_TRY(L, usl_export_merged(model, tok, dir, dtype));
    return 0;
}

/* export_gguf(model, tokenizer or nil, path, method) */
static int export_gguf(lua_State *L) {
    usl_model *model = ulua_ptr(L, 1, &ulua_model);
    const usl_tokenizer *tok = optional_tokenizer(L, 2);
    ULUA_TRY(L, usl_export_gguf(model, tok, luaL_checkstring(L, 3), luaL_checkstring(L, 4)));
    return 0;
}

void ulua_export_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "export_merged", export_merged },
                                          { "export_gguf", export_gguf },
                                          { NULL, NULL } };
    luaL_setfuncs(L, FUNCTIONS, 0);
}
