/* Tensors for Lua: 1-based, views, readable; and quantised strings. */
#include <math.h>
#include <string.h>

#include "lua/binding.h"

enum { MAX_DIMS = 8 };

static void release_tensor(void *ptr) {
    usl_tensor_free(ptr);
}

static usl_tensor *check_tensor(lua_State *L, int idx) {
    return ulua_ptr(L, idx, &ulua_tensor);
}

static uint64_t tensor_bytes(const usl_tensor *t) {
    return (uint64_t)usl_tensor_elements(t) * 4;
}

/* ---- Views ---- */

static int push_select(lua_State *L, usl_tensor *t, int64_t index) {
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_tensor_select(unsloth_lua_ctx(L), t, index, (usl_tensor **)&h->ptr));
    return 1;
}

/* A dense copy of the type wanted; pushes its handle. */
static usl_tensor *push_converted(lua_State *L, usl_tensor *t, usl_dtype dtype) {
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_tensor_to(unsloth_lua_ctx(L), t, dtype, (usl_tensor **)&h->ptr));
    ulua_account(L, tensor_bytes(h->ptr));
    return h->ptr;
}

static bool is_integer(usl_dtype d) {
    return d != USL_F32 && d != USL_F16 && d != USL_BF16 && d != USL_F64;
}

/* The same values, dense, as int64 or double: what Lua numbers are. Pushes the handle. */
static usl_tensor *push_numbers(lua_State *L, usl_tensor *t) {
    return push_converted(L, t, is_integer(usl_tensor_dtype(t)) ? USL_I64 : USL_F64);
}

static void push_number(lua_State *L, usl_tensor *numbers, int64_t i) {
    if (usl_tensor_dtype(numbers) == USL_I64)
        lua_pushinteger(L, ((const int64_t *)usl_tensor_data(numbers))[i]);
    else
        lua_pushnumber(L, ((const double *)usl_tensor_data(numbers))[i]);
}

static int tensor_item(lua_State *L) {
    usl_tensor *t = check_tensor(L, 1);
    if (usl_tensor_elements(t) != 1)
        return ulua_fail(L, USL_ERR_SHAPE, "item() wants a tensor of one value; this one has %I",
                         (LUAI_UACINT)usl_tensor_elements(t));
    push_number(L, push_numbers(L, t), 0);
    return 1;
}

static void push_shape(lua_State *L, const usl_tensor *t) {
    lua_createtable(L, usl_tensor_ndim(t), 0);
    for (int i = 0; i < usl_tensor_ndim(t); i++) {
        lua_pushinteger(L, usl_tensor_dim(t, i));
        lua_rawseti(L, -2, i + 1);
    }
}

/* t[{ 2, { 1, 3 }, {} }]: for each dimension a position, a range with both ends, or all; negative counts from the end.
 * Leaves the tensor, or the number when only positions were given. */
static int push_slice(lua_State *L, usl_tensor *t) {
    int kept = 0, n = (int)lua_rawlen(L, 2);
    if (n > usl_tensor_ndim(t))
        return ulua_fail(L, USL_ERR_SHAPE, "%d positions for a tensor of %d dimensions", n, usl_tensor_ndim(t));
    for (int i = 1; i <= n; i++) {
        int64_t length = usl_tensor_dim(t, kept), from = 1, to = length;
        int kind = lua_rawgeti(L, 2, i);
        if (kind == LUA_TTABLE && lua_rawlen(L, -1) > 0) {
            lua_rawgeti(L, -1, 1);
            lua_rawgeti(L, -2, 2);
            from = ulua_integer(L, -2, "a slice: its first position");
            to = lua_isnil(L, -1) ? length : ulua_integer(L, -1, "a slice: its last position");
            lua_pop(L, 2);
        } else if (kind != LUA_TTABLE) {
            from = to = ulua_integer(L, -1, "a slice: the position");
        }
        lua_pop(L, 1);
        if (from < 0) from += length + 1;
        if (to < 0) to += length + 1;
        if (from < 1 || to > length || from > to + 1)
            return ulua_fail(L, USL_ERR_INVALID, "%I to %I is outside dimension %d, which has %I, counted from 1",
                             (LUAI_UACINT)from, (LUAI_UACINT)to, i, (LUAI_UACINT)length);
        ulua_handle *h = ulua_new(L, &ulua_tensor);
        ULUA_TRY(L, usl_tensor_narrow(unsloth_lua_ctx(L), t, kept, from - 1, to, (usl_tensor **)&h->ptr));
        t = h->ptr;
        kept += kind == LUA_TTABLE;
        if (kind == LUA_TTABLE) continue;
        h = ulua_new(L, &ulua_tensor);
        ULUA_TRY(L, usl_tensor_squeeze(unsloth_lua_ctx(L), t, kept, (usl_tensor **)&h->ptr));
        t = h->ptr;
    }
    if (n && usl_tensor_ndim(t) == 0) push_number(L, push_numbers(L, t), 0);
    if (!n) lua_pushvalue(L, 1);
    return 1;
}

/* t[i], t.shape, t.dtype, t.ndim. Past the end is nil, as in any Lua array, so ipairs works. */
static bool tensor_get(lua_State *L, void *ptr, const char *key) {
    usl_tensor *t = ptr;
    if (key && strcmp(key, "shape") == 0) {
        push_shape(L, t);
    } else if (key && strcmp(key, "dtype") == 0) {
        static const struct {
            usl_dtype dtype;
            const char *name;
        } TORCH[] = { { USL_F32, "float32" }, { USL_F16, "float16" }, { USL_BF16, "bfloat16" },
                      { USL_F64, "float64" }, { USL_I32, "int32" },   { USL_I64, "int64" },
                      { USL_I16, "int16" },   { USL_I8, "int8" },     { USL_U8, "uint8" } };
        const char *name = usl_dtype_name(usl_tensor_dtype(t));
        for (size_t i = 0; i < sizeof TORCH / sizeof *TORCH; i++)
            if (TORCH[i].dtype == usl_tensor_dtype(t)) name = TORCH[i].name;
        lua_pushstring(L, name);
    } else if (key && strcmp(key, "device") == 0) {
        lua_pushliteral(L, "cpu");
    } else if (key && strcmp(key, "ndim") == 0) {
        lua_pushinteger(L, usl_tensor_ndim(t));
    } else if (lua_istable(L, 2)) {
        push_slice(L, t);
    } else {
        int ok = 0;
        lua_Integer i = key ? 0 : lua_tointegerx(L, 2, &ok);
        if (!ok || usl_tensor_ndim(t) == 0 || i < 1 || i > usl_tensor_dim(t, 0)) return false;
        push_select(L, t, i - 1);
        if (usl_tensor_ndim(t) == 1) {
            usl_tensor *one = ulua_ptr(L, -1, &ulua_tensor);
            push_number(L, push_numbers(L, one), 0);
        }
    }
    return true;
}

static int tensor_len(lua_State *L) {
    const usl_tensor *t = check_tensor(L, 1);
    if (usl_tensor_ndim(t) == 0)
        return ulua_fail(L, USL_ERR_SHAPE, "a tensor without dimensions has no length: use item()");
    lua_pushinteger(L, usl_tensor_dim(t, 0));
    return 1;
}

static int tensor_readonly(lua_State *L) {
    return ulua_fail(L, USL_ERR_INVALID, "tensors are read-only here: make a new one with unsloth.tensor");
}

static int tensor_select(lua_State *L) {
    usl_tensor *t = check_tensor(L, 1);
    int64_t i = ulua_integer(L, 2, "select: the index");
    if (i < 1 || (usl_tensor_ndim(t) > 0 && i > usl_tensor_dim(t, 0)))
        return ulua_fail(L, USL_ERR_INVALID, "select: position %I is outside a dimension of %I, counted from 1",
                         (LUAI_UACINT)i, (LUAI_UACINT)usl_tensor_dim(t, 0));
    return push_select(L, t, i - 1);
}

/* t:narrow(dim, start, length), torch's words, 1-based. */
static int tensor_narrow(lua_State *L) {
    usl_tensor *t = check_tensor(L, 1);
    int64_t dim = ulua_integer(L, 2, "narrow: the dimension"), start = ulua_integer(L, 3, "narrow: the start"),
            length = ulua_integer(L, 4, "narrow: the length");
    if (dim < 1 || dim > usl_tensor_ndim(t) || start < 1 || length < 0 || start - 1 > usl_tensor_dim(t, (int)dim - 1) ||
        length > usl_tensor_dim(t, (int)dim - 1) - (start - 1))
        return ulua_fail(L, USL_ERR_INVALID, "narrow(%I, %I, %I) reaches outside the tensor", (LUAI_UACINT)dim,
                         (LUAI_UACINT)start, (LUAI_UACINT)length);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_tensor_narrow(unsloth_lua_ctx(L), t, (int)dim - 1, start - 1, start - 1 + length,
                                  (usl_tensor **)&h->ptr));
    return 1;
}

static int tensor_to(lua_State *L) {
    usl_tensor *t = check_tensor(L, 1);
    usl_dtype dtype = ulua_dtype(L, 2);
    push_converted(L, t, dtype == USL_DTYPE_AUTO ? usl_tensor_dtype(t) : dtype);
    return 1;
}

/* ---- Out to Lua ---- */

static int64_t push_nested(lua_State *L, usl_tensor *numbers, int dim, int64_t at) {
    if (dim == usl_tensor_ndim(numbers)) {
        push_number(L, numbers, at);
        return at + 1;
    }
    luaL_checkstack(L, 4, "tensor");
    int64_t n = usl_tensor_dim(numbers, dim);
    lua_createtable(L, n < 1 << 26 ? (int)n : 1 << 26, 0);
    for (int64_t i = 1; i <= n; i++) {
        at = push_nested(L, numbers, dim + 1, at);
        lua_rawseti(L, -2, i);
    }
    return at;
}

static int tensor_totable(lua_State *L) {
    usl_tensor *numbers = push_numbers(L, check_tensor(L, 1));
    push_nested(L, numbers, 0, 0);
    return 1;
}

/* The position of the largest value of each last-dimension row, from 0: token ids. One id for one row, else an array.
 */
static int tensor_argmax_id(lua_State *L) {
    usl_tensor *t = push_converted(L, check_tensor(L, 1), USL_F32);
    int ndim = usl_tensor_ndim(t);
    int64_t cols = ndim ? usl_tensor_dim(t, ndim - 1) : 0;
    if (ndim < 1 || ndim > 2 || cols == 0)
        return ulua_fail(L, USL_ERR_SHAPE, "argmax_id wants a row of values, or rows of them");
    const float *data = usl_tensor_data(t);
    int64_t rows = ndim == 2 ? usl_tensor_dim(t, 0) : 1;
    if (ndim == 2) lua_createtable(L, (int)rows, 0);
    for (int64_t r = 0; r < rows; r++, data += cols) {
        int64_t best = 0;
        for (int64_t c = 1; c < cols; c++)
            if (data[c] > data[best]) best = c;
        lua_pushinteger(L, best);
        if (ndim == 2) lua_rawseti(L, -2, r + 1);
    }
    return 1;
}

/* t:distance(reference) -> ||t - reference|| / ||reference||, ||t - reference||, ||reference||, in double. */
static int tensor_distance(lua_State *L) {
    usl_tensor *a = push_converted(L, check_tensor(L, 1), USL_F64), *b = push_converted(L, check_tensor(L, 2), USL_F64);
    int64_t n = usl_tensor_elements(a);
    if (n != usl_tensor_elements(b)) return ulua_fail(L, USL_ERR_SHAPE, "distance wants two tensors of the same size");
    const double *x = usl_tensor_data(a), *y = usl_tensor_data(b);
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        diff += (x[i] - y[i]) * (x[i] - y[i]);
        norm += y[i] * y[i];
    }
    lua_pushnumber(L, sqrt(norm > 0 ? diff / norm : diff));
    lua_pushnumber(L, sqrt(diff));
    lua_pushnumber(L, sqrt(norm));
    return 3;
}

/* ---- In from Lua ---- */

static int shape_of_table(lua_State *L, int idx, int64_t shape[MAX_DIMS]) {
    int ndim = 0;
    lua_pushvalue(L, idx);
    while (lua_istable(L, -1)) {
        if (ndim == MAX_DIMS) ulua_fail(L, USL_ERR_SHAPE, "a tensor has at most %d dimensions", MAX_DIMS);
        shape[ndim++] = (int64_t)lua_rawlen(L, -1);
        lua_rawgeti(L, -1, 1);
        lua_remove(L, -2);
    }
    lua_pop(L, 1);
    return ndim;
}

static double *fill_from_table(lua_State *L, int dim, int ndim, const int64_t *shape, double *at) {
    if (dim == ndim) {
        if (lua_type(L, -1) != LUA_TNUMBER)
            ulua_fail(L, USL_ERR_INVALID, "a tensor holds numbers, not %s", luaL_typename(L, -1));
        *at = lua_tonumber(L, -1);
        return at + 1;
    }
    if (!lua_istable(L, -1) || (int64_t)lua_rawlen(L, -1) != shape[dim])
        ulua_fail(L, USL_ERR_SHAPE, "the nested tables of a tensor must all have the same length: %I was expected",
                  (LUAI_UACINT)shape[dim]);
    luaL_checkstack(L, 2, "tensor");
    for (int64_t i = 1; i <= shape[dim]; i++) {
        lua_rawgeti(L, -1, i);
        at = fill_from_table(L, dim + 1, ndim, shape, at);
        lua_pop(L, 1);
    }
    return at;
}

/* tensor(table [, dtype]) */
static int tensor_new(lua_State *L) {
    lua_settop(L, 2);
    usl_dtype dtype = ulua_dtype(L, 2);
    if (lua_type(L, 1) == LUA_TNUMBER) {
        lua_createtable(L, 1, 0);
        lua_pushvalue(L, 1);
        lua_rawseti(L, -2, 1);
        lua_replace(L, 1);
    }
    luaL_checktype(L, 1, LUA_TTABLE);
    int64_t shape[MAX_DIMS];
    int ndim = shape_of_table(L, 1, shape);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_tensor_new(unsloth_lua_ctx(L), USL_F64, ndim, shape, (usl_tensor **)&h->ptr));
    lua_pushvalue(L, 1);
    fill_from_table(L, 0, ndim, shape, usl_tensor_data(h->ptr));
    lua_pop(L, 1);
    push_converted(L, h->ptr, dtype == USL_DTYPE_AUTO ? USL_F32 : dtype);
    return 1;
}

/* ---- Quantised strings ---- */

static int quantize(lua_State *L) {
    usl_tensor *t = check_tensor(L, 1);
    luaL_checkstring(L, 2);
    usl_dtype dtype = ulua_dtype(L, 2);
    t = push_converted(L, t, USL_F32);
    int64_t n = usl_tensor_elements(t);
    size_t bytes = usl_quant_bytes(dtype, n);
    void *dst = ulua_buffer(L, bytes);
    ULUA_TRY(L, usl_quantize(unsloth_lua_ctx(L), dtype, usl_tensor_data(t), n, dst));
    lua_pushlstring(L, dst, bytes);
    return 1;
}

static int dequantize(lua_State *L) {
    size_t bytes;
    const char *src = luaL_checklstring(L, 1, &bytes);
    luaL_checkstring(L, 2);
    usl_dtype dtype = ulua_dtype(L, 2);
    int64_t n = ulua_integer(L, 3, "dequantize: the number of values");
    /* Checked before n values are asked for, so that a wrong n is a sentence and no large allocation. */
    if (n < 0 || usl_quant_bytes(dtype, n) != bytes)
        return ulua_fail(L, USL_ERR_SHAPE, "%I values of %s do not take the %I bytes that were given", (LUAI_UACINT)n,
                         usl_dtype_name(dtype), (LUAI_UACINT)bytes);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_tensor_new(unsloth_lua_ctx(L), USL_F32, 1, &n, (usl_tensor **)&h->ptr));
    ULUA_TRY(L, usl_dequantize(unsloth_lua_ctx(L), dtype, src, bytes, n, usl_tensor_data(h->ptr)));
    return 1;
}

/* ---- The class ---- */

static const luaL_Reg METHODS[] = {
    { "totable", tensor_totable },   { "item", tensor_item }, { "select", tensor_select },
    { "narrow", tensor_narrow },     { "to", tensor_to },     { "argmax_id", tensor_argmax_id },
    { "distance", tensor_distance }, { NULL, NULL }
};
static const luaL_Reg META[] = { { "__len", tensor_len }, { "__newindex", tensor_readonly }, { NULL, NULL } };
const ulua_class ulua_tensor = { "unsloth.Tensor", release_tensor, METHODS, META, tensor_get };

void ulua_tensor_open(lua_State *L) {
    ulua_define(L, &ulua_tensor);
    luaL_getmetatable(L, ulua_tensor.name);
    luaL_setfuncs(L, ulua_tensor_operators, 0);
    lua_pop(L, 1);
    lua_setfield(L, -2, "Tensor");
    static const luaL_Reg FUNCTIONS[] = {
        { "tensor", tensor_new }, { "quantize", quantize }, { "dequantize", dequantize }, { NULL, NULL }
    };
    luaL_setfuncs(L, FUNCTIONS, 0);
}
