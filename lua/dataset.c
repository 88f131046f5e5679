/* Data sets (rows of JSON) and tokenised rows. map, filter and the like are Lua, in unsloth/dataset.lua. */
#include <string.h>

#include "lua/binding.h"

static void release_dataset(void *ptr) {
    usl_dataset_free(ptr);
}
static void release_rows(void *ptr) {
    usl_rows_free(ptr);
}

static usl_dataset *check_dataset(lua_State *L, int idx) {
    return ulua_ptr(L, idx, &ulua_dataset);
}
static usl_rows *check_rows(lua_State *L, int idx) {
    return ulua_ptr(L, idx, &ulua_rows);
}

/* dataset_load(kind, { path, ... }) */
static int dataset_load(lua_State *L) {
    const char *kind = luaL_checkstring(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    size_t count = (size_t)lua_rawlen(L, 2);
    const char **paths = ulua_buffer(L, (count + 1) * sizeof *paths);
    for (size_t i = 0; i < count; i++) {
        lua_rawgeti(L, 2, (lua_Integer)i + 1);
        if (lua_type(L, -1) != LUA_TSTRING)
            return ulua_fail(L, USL_ERR_INVALID, "data_files is a path or an array of paths");
        paths[i] = lua_tostring(L, -1); /* the table keeps it */
        lua_pop(L, 1);
    }
    ulua_handle *h = ulua_new(L, &ulua_dataset);
    ULUA_TRY(L, usl_dataset_load(unsloth_lua_ctx(L), kind, paths, count, (usl_dataset **)&h->ptr));
    return 1;
}

/* dataset_new() -> an empty one, for append */
static int dataset_new(lua_State *L) {
    ulua_handle *h = ulua_new(L, &ulua_dataset);
    ULUA_TRY(L, usl_dataset_new(unsloth_lua_ctx(L), (usl_dataset **)&h->ptr));
    return 1;
}

/* ds:append(row): a table, or the text of one JSON object */
static int dataset_append(lua_State *L) {
    usl_dataset *ds = check_dataset(L, 1);
    size_t len;
    lua_settop(L, 2);
    if (lua_type(L, 2) != LUA_TSTRING) ulua_json_encode(L, 2);
    const char *text = lua_tolstring(L, -1, &len);
    ULUA_TRY(L, usl_dataset_append(ds, text, len));
    return 0;
}

static int dataset_len(lua_State *L) {
    lua_pushinteger(L, usl_dataset_rows(check_dataset(L, 1)));
    return 1;
}

static void push_row(lua_State *L, const usl_dataset *ds, int64_t i) {
    ulua_tape *tape = ulua_tape_new(L);
    lua_toclose(L, lua_gettop(L));
    usl_status st = usl_dataset_visit(ds, i, &ulua_tape_visitor, tape);
    if (st != USL_OK) ulua_tape_raise(L, tape, st);
    ulua_tape_push(L, tape, true);
    lua_closeslot(L, -2); /* frees the tape now: there may be many rows */
    lua_remove(L, -2);
}

/* ds[i]: nil past the end. */
static bool dataset_get(lua_State *L, void *ptr, const char *key) {
    int ok = 0;
    lua_Integer i = key ? 0 : lua_tointegerx(L, 2, &ok);
    if (!ok || i < 1 || i > usl_dataset_rows(ptr)) return false;
    push_row(L, ptr, i - 1);
    return true;
}

static int dataset_where(lua_State *L) {
    char buf[512];
    const usl_dataset *ds = check_dataset(L, 1);
    int64_t i = ulua_integer(L, 2, "where: the row");
    if (i < 1 || i > usl_dataset_rows(ds)) return 0;
    lua_pushstring(L, usl_dataset_where(ds, i - 1, buf, sizeof buf));
    return 1;
}

/* ds:pick(indices): rows by 1-based number. */
static int dataset_pick(lua_State *L) {
    const usl_dataset *ds = check_dataset(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    int64_t count = (int64_t)lua_rawlen(L, 2), rows = usl_dataset_rows(ds);
    int64_t *index = ulua_buffer(L, (size_t)count * sizeof *index);
    for (int64_t i = 0; i < count; i++) {
        lua_rawgeti(L, 2, i + 1);
        int64_t row = ulua_integer(L, -1, "select: a row's number");
        if (row < 1 || row > rows)
            return ulua_fail(L, USL_ERR_INVALID, "select: there is no row %I in a data set of %I (rows count from 1)",
                             (LUAI_UACINT)row, (LUAI_UACINT)rows);
        index[i] = row - 1;
        lua_pop(L, 1);
    }
    ulua_handle *h = ulua_new(L, &ulua_dataset);
    ULUA_TRY(L, usl_dataset_select(ds, index, count, (usl_dataset **)&h->ptr));
    return 1;
}

static int dataset_permute(lua_State *L) {
    const usl_dataset *ds = check_dataset(L, 1);
    int64_t seed = ulua_integer(L, 2, "shuffle: the seed");
    ulua_handle *h = ulua_new(L, &ulua_dataset);
    ULUA_TRY(L, usl_dataset_shuffle(ds, (uint32_t)seed, (usl_dataset **)&h->ptr));
    return 1;
}

static int dataset_standardize(lua_State *L) {
    const usl_dataset *ds = check_dataset(L, 1);
    ulua_handle *h = ulua_new(L, &ulua_dataset);
    ULUA_TRY(L, usl_dataset_standardize(ds, (usl_dataset **)&h->ptr));
    return 1;
}

static const luaL_Reg DATASET_METHODS[] = { { "append", dataset_append },
                                            { "where", dataset_where },
                                            { "pick", dataset_pick },
                                            { "permute", dataset_permute },
                                            { "standardize", dataset_standardize },
                                            { NULL, NULL } };
static const luaL_Reg DATASET_META[] = { { "__len", dataset_len }, { NULL, NULL } };
const ulua_class ulua_dataset = { "unsloth.Dataset", release_dataset, DATASET_METHODS, DATASET_META, dataset_get };

/* ---- Tokenised rows ---- */

/* rows_new(max_length): 0 is no limit */
static int rows_new(lua_State *L) {
    int64_t max_length = ulua_integer(L, 1, "max_length");
    ulua_handle *h = ulua_new(L, &ulua_rows);
    ULUA_TRY(L, usl_rows_new(unsloth_lua_ctx(L), max_length, (usl_rows **)&h->ptr));
    return 1;
}

/* rows:add(ids [, labels]) */
static int rows_add(lua_State *L) {
    usl_rows *rows = check_rows(L, 1);
    lua_settop(L, 3);
    size_t count, label_count;
    const int32_t *ids = ulua_ids(L, 2, &count), *labels = NULL;
    if (!lua_isnil(L, 3)) {
        labels = ulua_ids(L, 3, &label_count);
        if (label_count != count)
            return ulua_fail(L, USL_ERR_SHAPE, "%I labels for %I ids: there must be one each", (LUAI_UACINT)label_count,
                             (LUAI_UACINT)count);
    }
    ULUA_TRY(L, usl_rows_add(rows, ids, labels, count));
    return 0;
}

static int rows_stats(lua_State *L) {
    usl_rows_stats s;
    memset(&s, 0, sizeof s);
    s.size = sizeof s;
    usl_rows_get_stats(check_rows(L, 1), &s);
    const struct {
        const char *name;
        int64_t value;
    } fields[] = { { "rows", s.rows },       { "tokens", s.tokens },       { "counted", s.counted },
                   { "longest", s.longest }, { "truncated", s.truncated }, { "dropped", s.dropped } };
    lua_createtable(L, 0, (int)(sizeof fields / sizeof *fields));
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        lua_pushinteger(L, fields[i].value);
        lua_setfield(L, -2, fields[i].name);
    }
    return 1;
}

/* rows:get(i) -> ids, labels */
static int rows_get(lua_State *L) {
    const usl_rows *rows = check_rows(L, 1);
    int64_t i = ulua_integer(L, 2, "rows: the number");
    const int32_t *ids, *labels;
    size_t count;
    if (i < 1) return ulua_fail(L, USL_ERR_INVALID, "rows count from 1; there is no row %I", (LUAI_UACINT)i);
    ULUA_TRY(L, usl_rows_get(rows, i - 1, &ids, &labels, &count));
    ulua_push_ids(L, ids, count);
    if (labels)
        ulua_push_ids(L, labels, count);
    else
        lua_pushvalue(L, -1);
    return 2;
}

/* rows:mask_responses(instruction_ids, response_ids, last_only) -> new rows */
static int rows_mask_responses(lua_State *L) {
    const usl_rows *rows = check_rows(L, 1);
    size_t instruction_count, response_count;
    lua_settop(L, 4);
    const int32_t *instruction = ulua_ids(L, 2, &instruction_count), *response = ulua_ids(L, 3, &response_count);
    ulua_handle *h = ulua_new(L, &ulua_rows);
    ULUA_TRY(L, usl_rows_mask_responses(rows, instruction, instruction_count, response, response_count,
                                        lua_toboolean(L, 4), (usl_rows **)&h->ptr));
    return 1;
}

static int rows_len(lua_State *L) {
    usl_rows_stats s;
    memset(&s, 0, sizeof s);
    s.size = sizeof s;
    usl_rows_get_stats(check_rows(L, 1), &s);
    lua_pushinteger(L, s.rows);
    return 1;
}

static const luaL_Reg ROWS_METHODS[] = { { "add", rows_add },
                                         { "stats", rows_stats },
                                         { "get", rows_get },
                                         { "mask_responses", rows_mask_responses },
                                         { NULL, NULL } };
static const luaL_Reg ROWS_META[] = { { "__len", rows_len }, { NULL, NULL } };
const ulua_class ulua_rows = { "unsloth.Rows", release_rows, ROWS_METHODS, ROWS_META, NULL };

void ulua_dataset_open(lua_State *L) {
    ulua_define(L, &ulua_dataset);
    lua_setfield(L, -2, "Dataset");
    ulua_define(L, &ulua_rows);
    lua_setfield(L, -2, "Rows");
    static const luaL_Reg FUNCTIONS[] = {
        { "dataset_load", dataset_load }, { "dataset_new", dataset_new }, { "rows_new", rows_new }, { NULL, NULL }
    };
    luaL_setfuncs(L, FUNCTIONS, 0);
}
