/* Named tensors in .safetensors files. Loading collects outside Lua and builds the table when core has returned. */
#include <stdlib.h>
#include <string.h>

#include "lua/binding.h"

typedef struct named_list {
    struct named {
        char *name;
        usl_tensor *tensor;
    } * items;
    size_t count, cap;
} named_list;

static int named_list_free(lua_State *L) {
    named_list *list = lua_touserdata(L, 1);
    for (size_t i = 0; i < list->count; i++) {
        free(list->items[i].name);
        usl_tensor_free(list->items[i].tensor);
    }
    free(list->items);
    memset(list, 0, sizeof *list);
    return 0;
}

static int collect(void *ud, const char *name, usl_tensor *t) {
    named_list *list = ud;
    if (list->count == list->cap) {
        size_t cap = list->cap ? 2 * list->cap : 64;
        void *items = realloc(list->items, cap * sizeof *list->items);
        if (!items) goto fail;
        list->items = items;
        list->cap = cap;
    }
    size_t len = strlen(name) + 1;
    char *copy = malloc(len);
    if (!copy) goto fail;
    memcpy(copy, name, len);
    list->items[list->count].name = copy;
    list->items[list->count++].tensor = t;
    return 0;
fail:
    usl_tensor_free(t);
    return 1;
}

static int safetensors_load(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    named_list *list = lua_newuserdatauv(L, sizeof *list, 0);
    memset(list, 0, sizeof *list);
    if (luaL_newmetatable(L, "unsloth.named_list")) {
        lua_pushcfunction(L, named_list_free);
        lua_setfield(L, -2, "__gc");
        lua_pushcfunction(L, named_list_free);
        lua_setfield(L, -2, "__close");
    }
    lua_setmetatable(L, -2);
    lua_toclose(L, lua_gettop(L));
    usl_status st = usl_safetensors_load(unsloth_lua_ctx(L), path, collect, list);
    if (st == USL_ERR_CALLBACK) return ulua_fail(L, USL_ERR_NOMEM, "%s: out of memory", path);
    if (st != USL_OK) return ulua_raise(L, st);
    lua_newtable(L);
    for (size_t i = 0; i < list->count; i++) {
        ulua_handle *h = ulua_new(L, &ulua_tensor);
        h->ptr = list->items[i].tensor;
        list->items[i].tensor = NULL;
        lua_setfield(L, -2, list->items[i].name);
    }
    return 1;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* save(path, { name = tensor } [, { key = value } of metadata]) */
static int safetensors_save(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 3);
    size_t count = 0, pairs = 0;
    for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1), count++) {
        if (lua_type(L, -2) != LUA_TSTRING)
            return ulua_fail(L, USL_ERR_INVALID, "safetensors.save takes { name = tensor }");
        ulua_ptr(L, -1, &ulua_tensor);
    }
    if (!lua_isnil(L, 3)) luaL_checktype(L, 3, LUA_TTABLE);
    if (lua_istable(L, 3))
        for (lua_pushnil(L); lua_next(L, 3); lua_pop(L, 1), pairs++)
            if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TSTRING)
                return ulua_fail(L, USL_ERR_INVALID, "metadata of a safetensors file is { name = text }");
    const char **names = ulua_buffer(L, (count + 1) * sizeof *names);
    usl_tensor **tensors = ulua_buffer(L, (count + 1) * sizeof *tensors);
    const char **meta = ulua_buffer(L, (2 * pairs + 1) * sizeof *meta);
    size_t n = 0;
    for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) names[n++] = lua_tostring(L, -2);
    qsort(names, count, sizeof *names, compare_names); /* the same file for the same table */
    for (size_t i = 0; i < count; i++) {
        lua_getfield(L, 2, names[i]);
        tensors[i] = ulua_ptr(L, -1, &ulua_tensor);
        lua_pop(L, 1);
    }
    n = 0;
    if (lua_istable(L, 3))
        for (lua_pushnil(L); lua_next(L, 3); lua_pop(L, 1)) {
            meta[n++] = lua_tostring(L, -2);
            meta[n++] = lua_tostring(L, -1);
        }
    meta[n] = NULL;
    ULUA_TRY(L, usl_safetensors_save(unsloth_lua_ctx(L), path, count, names, tensors, meta));
    return 0;
}

void ulua_safetensors_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "safetensors_load", safetensors_load },
                                          { "safetensors_save", safetensors_save },
                                          { NULL, NULL } };
    luaL_setfuncs(L, FUNCTIONS, 0);
}
