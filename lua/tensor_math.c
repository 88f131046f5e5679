/* Arithmetic for the prompt: element by element with broadcasting, products, reductions, softmax. Inputs stay as they
 * are, results are new: float32, or float64 where an input is float64 or an integer. Sums are made in double. */
#include <math.h>
#include <string.h>

#include "lua/binding.h"

enum { MAX_DIMS = 8 };

/* An input as dense floats or doubles; what holds it is on the stack or an argument. */
typedef struct values {
    const float *f;
    const double *d; /* when f is NULL */
    int ndim;
    int64_t shape[MAX_DIMS], count;
} values;

/* A result; one of the two is set. */
typedef struct result {
    float *f;
    double *d;
} result;

static double get(const values *v, int64_t i) {
    return v->f ? (double)v->f[i] : v->d[i];
}

static void put(const result *r, int64_t i, double value) {
    if (r->f)
        r->f[i] = (float)value;
    else
        r->d[i] = value;
}

static bool is_single(usl_dtype d) {
    return d == USL_F32 || d == USL_F16 || d == USL_BF16;
}

static void describe(values *v, usl_tensor *t) {
    v->ndim = usl_tensor_ndim(t);
    v->count = usl_tensor_elements(t);
    for (int i = 0; i < v->ndim; i++) v->shape[i] = usl_tensor_dim(t, i);
    v->f = usl_tensor_dtype(t) == USL_F32 ? usl_tensor_data(t) : NULL;
    v->d = usl_tensor_dtype(t) == USL_F64 ? usl_tensor_data(t) : NULL;
}

/* The argument at idx, a tensor or a number; may push what holds a dense copy. */
static values check_values(lua_State *L, int idx) {
    values v;
    memset(&v, 0, sizeof v);
    if (lua_type(L, idx) == LUA_TNUMBER) {
        float *one = ulua_buffer(L, sizeof *one);
        *one = (float)lua_tonumber(L, idx);
        v.f = one;
        v.count = 1;
        return v;
    }
    usl_tensor *t = ulua_ptr(L, idx, &ulua_tensor);
    usl_dtype dtype = usl_tensor_dtype(t), wanted = is_single(dtype) ? USL_F32 : USL_F64;
    if (dtype != wanted || !usl_tensor_data(t)) {
        ulua_handle *h = ulua_new(L, &ulua_tensor);
        ULUA_TRY(L, usl_tensor_to(unsloth_lua_ctx(L), t, wanted, (usl_tensor **)&h->ptr));
        ulua_account(L, (uint64_t)usl_tensor_elements(h->ptr) * sizeof(double));
        t = h->ptr;
    }
    describe(&v, t);
    return v;
}

/* Pushes a new tensor of float32, or of float64 when wide. */
static result push_result(lua_State *L, bool wide, int ndim, const int64_t *shape) {
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_tensor_new(unsloth_lua_ctx(L), wide ? USL_F64 : USL_F32, ndim, shape, (usl_tensor **)&h->ptr));
    ulua_account(L, (uint64_t)usl_tensor_elements(h->ptr) * sizeof(double));
    void *data = usl_tensor_data(h->ptr);
    return (result){ wide ? NULL : data, wide ? data : NULL };
}

/* ---- Element by element ---- */

typedef double (*unary_fn)(double x);

static double negative(double x) {
    return -x;
}
static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}
static double relu(double x) {
    return x > 0 ? x : 0;
}
static double silu(double x) {
    return x * sigmoid(x);
}
static double gelu(double x) {
    return 0.5 * x * (1 + erf(x * 0.70710678118654752440));
}
static double square(double x) {
    return x * x;
}
static double rsqrt(double x) {
    return 1 / sqrt(x);
}

static const struct {
    const char *name;
    unary_fn fn;
} UNARY[] = { { "neg", negative }, { "abs", fabs },        { "exp", exp },   { "log", log },   { "sqrt", sqrt },
              { "rsqrt", rsqrt },  { "square", square },   { "sin", sin },   { "cos", cos },   { "tanh", tanh },
              { "erf", erf },      { "sigmoid", sigmoid }, { "relu", relu }, { "silu", silu }, { "gelu", gelu },
              { "round", rint },   { "floor", floor },     { "ceil", ceil } };

static int unary(lua_State *L) {
    unary_fn fn = UNARY[lua_tointeger(L, lua_upvalueindex(1))].fn;
    values x = check_values(L, 1);
    result y = push_result(L, !x.f, x.ndim, x.shape);
    for (int64_t i = 0; i < x.count; i++) put(&y, i, fn(get(&x, i)));
    return 1;
}

typedef double (*binary_fn)(double a, double b);

static double add(double a, double b) {
    return a + b;
}
static double sub(double a, double b) {
    return a - b;
}
static double mul(double a, double b) {
    return a * b;
}
static double divide(double a, double b) {
    return a / b;
}
static double equal(double a, double b) {
    return a == b;
}
static double less(double a, double b) {
    return a < b;
}
static double less_equal(double a, double b) {
    return a <= b;
}
static double greater(double a, double b) {
    return a > b;
}
static double greater_equal(double a, double b) {
    return a >= b;
}

static const struct {
    const char *name;
    binary_fn fn;
} BINARY[] = { { "add", add }, { "sub", sub },       { "mul", mul },      { "div", divide },
               { "pow", pow }, { "maximum", fmax },  { "minimum", fmin }, { "eq", equal },
               { "lt", less }, { "le", less_equal }, { "gt", greater },   { "ge", greater_equal } };

static int refuse_shapes(lua_State *L, const char *what, const values *a, const values *b) {
    luaL_Buffer text;
    luaL_buffinit(L, &text);
    for (int side = 0; side < 2; side++) {
        const values *v = side ? b : a;
        if (side) luaL_addstring(&text, " and ");
        luaL_addchar(&text, '(');
        for (int i = 0; i < v->ndim; i++) {
            lua_pushfstring(L, i ? ", %I" : "%I", (LUAI_UACINT)v->shape[i]);
            luaL_addvalue(&text);
        }
        luaL_addchar(&text, ')');
    }
    luaL_pushresult(&text);
    return ulua_fail(L, USL_ERR_SHAPE, "%s: the shapes %s do not go together", what, lua_tostring(L, -1));
}

/* Steps through an input of the result's shape; 0 along dimensions of length 1. */
static void broadcast_strides(const values *v, int ndim, int64_t *stride) {
    int64_t step = 1;
    for (int i = ndim, k = v->ndim; i-- > 0;) {
        int64_t n = k > 0 ? v->shape[--k] : 1;
        stride[i] = n == 1 ? 0 : step;
        step *= n;
    }
}

static int combine(lua_State *L, const char *name, binary_fn fn) {
    lua_settop(L, 2);
    values a = check_values(L, 1), b = check_values(L, 2);
    int ndim = a.ndim > b.ndim ? a.ndim : b.ndim;
    int64_t shape[MAX_DIMS], sa[MAX_DIMS], sb[MAX_DIMS], index[MAX_DIMS] = { 0 }, count = 1;
    for (int i = 0; i < ndim; i++) {
        int ia = i - (ndim - a.ndim), ib = i - (ndim - b.ndim);
        int64_t na = ia < 0 ? 1 : a.shape[ia], nb = ib < 0 ? 1 : b.shape[ib];
        if (na != nb && na != 1 && nb != 1) return refuse_shapes(L, name, &a, &b);
        shape[i] = na == 1 ? nb : na;
        count *= shape[i];
    }
    broadcast_strides(&a, ndim, sa);
    broadcast_strides(&b, ndim, sb);
    result y = push_result(L, !a.f || !b.f, ndim, shape);
    int64_t at_a = 0, at_b = 0;
    for (int64_t i = 0; i < count; i++) {
        put(&y, i, fn(get(&a, at_a), get(&b, at_b)));
        for (int d = ndim; d-- > 0;) {
            at_a += sa[d];
            at_b += sb[d];
            if (++index[d] < shape[d]) break;
            at_a -= index[d] * sa[d];
            at_b -= index[d] * sb[d];
            index[d] = 0;
        }
    }
    return 1;
}

static int binary(lua_State *L) {
    lua_Integer i = lua_tointeger(L, lua_upvalueindex(1));
    return combine(L, BINARY[i].name, BINARY[i].fn);
}

/* The operators, which have no upvalue to tell them apart. */
static int operator_add(lua_State *L) {
    return combine(L, "add", add);
}
static int operator_sub(lua_State *L) {
    return combine(L, "sub", sub);
}
static int operator_mul(lua_State *L) {
    return combine(L, "mul", mul);
}
static int operator_div(lua_State *L) {
    return combine(L, "div", divide);
}
static int operator_pow(lua_State *L) {
    return combine(L, "pow", pow);
}
static int operator_unm(lua_State *L) {
    values x = check_values(L, 1);
    result y = push_result(L, !x.f, x.ndim, x.shape);
    for (int64_t i = 0; i < x.count; i++) put(&y, i, -get(&x, i));
    return 1;
}

/* ---- Along a dimension ---- */

/* A tensor as (outer, n, inner) around one dimension. */
typedef struct lanes {
    int64_t outer, n, inner;
} lanes;

/* Dimension at idx, from 1, or from the end when negative; 0 when there is none: all of the tensor is one lane. */
static int check_dim(lua_State *L, int idx, const values *x) {
    if (lua_isnoneornil(L, idx)) return 0;
    int64_t dim = ulua_integer(L, idx, "the dimension");
    if (dim < 0) dim += x->ndim + 1;
    if (dim < 1 || dim > x->ndim)
        ulua_fail(L, USL_ERR_SHAPE, "there is no dimension %I: this tensor has %d, counted from 1",
                  (LUAI_UACINT)lua_tointeger(L, idx), x->ndim);
    return (int)dim;
}

static lanes lanes_of(const values *x, int dim) {
    lanes l = { 1, dim ? x->shape[dim - 1] : x->count, 1 };
    for (int i = 0; dim && i < x->ndim; i++) {
        if (i < dim - 1) l.outer *= x->shape[i];
        if (i > dim - 1) l.inner *= x->shape[i];
    }
    return l;
}

typedef double (*reduce_fn)(const values *x, int64_t first, int64_t n, int64_t step);

static double sum_of(const values *x, int64_t first, int64_t n, int64_t step) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += get(x, first + i * step);
    return sum;
}

static double mean_of(const values *x, int64_t first, int64_t n, int64_t step) {
    return sum_of(x, first, n, step) / (double)n;
}

/* As torch: of a sample, by n - 1. */
static double var_of(const values *x, int64_t first, int64_t n, int64_t step) {
    double mean = mean_of(x, first, n, step), sum = 0;
    for (int64_t i = 0; i < n; i++) sum += square(get(x, first + i * step) - mean);
    return sum / (double)(n - 1);
}

static double std_of(const values *x, int64_t first, int64_t n, int64_t step) {
    return sqrt(var_of(x, first, n, step));
}

static double norm_of(const values *x, int64_t first, int64_t n, int64_t step) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += square(get(x, first + i * step));
    return sqrt(sum);
}

static double prod_of(const values *x, int64_t first, int64_t n, int64_t step) {
    double product = 1;
    for (int64_t i = 0; i < n; i++) product *= get(x, first + i * step);
    return product;
}

/* The position of the largest; NaN is larger than all, as in torch. */
static int64_t best_of(const values *x, int64_t first, int64_t n, int64_t step, double sign) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) {
        double v = sign * get(x, first + i * step), most = sign * get(x, first + best * step);
        if (v > most || (isnan(v) && !isnan(most))) best = i;
    }
    return best;
}

static double max_of(const values *x, int64_t first, int64_t n, int64_t step) {
    return get(x, first + best_of(x, first, n, step, 1) * step);
}
static double min_of(const values *x, int64_t first, int64_t n, int64_t step) {
    return get(x, first + best_of(x, first, n, step, -1) * step);
}
static double argmax_of(const values *x, int64_t first, int64_t n, int64_t step) {
    return (double)best_of(x, first, n, step, 1) + 1;
}
static double argmin_of(const values *x, int64_t first, int64_t n, int64_t step) {
    return (double)best_of(x, first, n, step, -1) + 1;
}

static const struct {
    const char *name;
    reduce_fn fn;
    bool needs_one; /* what no value has */
} REDUCE[] = { { "sum", sum_of, false },     { "prod", prod_of, false }, { "mean", mean_of, true },
               { "var", var_of, true },      { "std", std_of, true },    { "norm", norm_of, false },
               { "max", max_of, true },      { "min", min_of, true },    { "argmax", argmax_of, true },
               { "argmin", argmin_of, true } };

/* t:sum() -> a number; t:sum(dim [, keepdim]) -> a tensor */
static int reduce(lua_State *L) {
    lua_Integer which = lua_tointeger(L, lua_upvalueindex(1));
    bool keep = lua_toboolean(L, 3);
    lua_settop(L, 2);
    values x = check_values(L, 1);
    int dim = check_dim(L, 2, &x);
    lanes l = lanes_of(&x, dim);
    if (l.n == 0 && REDUCE[which].needs_one)
        return ulua_fail(L, USL_ERR_SHAPE, "%s: there is nothing in an empty dimension", REDUCE[which].name);
    if (!dim) {
        lua_pushnumber(L, REDUCE[which].fn(&x, 0, x.count, 1));
        if (strncmp(REDUCE[which].name, "arg", 3) == 0) lua_pushinteger(L, (lua_Integer)lua_tonumber(L, -1));
        return 1;
    }
    int64_t shape[MAX_DIMS];
    int ndim = 0;
    for (int i = 0; i < x.ndim; i++) {
        if (i == dim - 1 && !keep) continue;
        shape[ndim++] = i == dim - 1 ? 1 : x.shape[i];
    }
    result y = push_result(L, !x.f, ndim, shape);
    for (int64_t o = 0; o < l.outer; o++)
        for (int64_t i = 0; i < l.inner; i++)
            put(&y, o * l.inner + i, REDUCE[which].fn(&x, o * l.n * l.inner + i, l.n, l.inner));
    return 1;
}

/* t:softmax(dim), t:log_softmax(dim): the last dimension unless told otherwise. Upvalue: whether logarithms. */
static int softmax(lua_State *L) {
    bool logs = lua_toboolean(L, lua_upvalueindex(1));
    lua_settop(L, 2);
    values x = check_values(L, 1);
    int dim = lua_isnil(L, 2) ? x.ndim : check_dim(L, 2, &x);
    lanes l = lanes_of(&x, dim);
    result y = push_result(L, !x.f, x.ndim, x.shape);
    for (int64_t lane = 0; lane < l.outer * l.inner && l.n > 0; lane++) {
        int64_t first = lane / l.inner * l.n * l.inner + lane % l.inner;
        double most = max_of(&x, first, l.n, l.inner), sum = 0;
        for (int64_t i = 0; i < l.n; i++) sum += exp(get(&x, first + i * l.inner) - most);
        for (int64_t i = 0; i < l.n; i++) {
            double z = get(&x, first + i * l.inner) - most;
            put(&y, first + i * l.inner, logs ? z - log(sum) : exp(z) / sum);
        }
    }
    return 1;
}

/* ---- Products ---- */

static void add_floats(double *restrict sum, double left, const float *restrict row, int64_t m) {
    for (int64_t c = 0; c < m; c++) sum[c] += left * (double)row[c];
}

static void add_doubles(double *restrict sum, double left, const double *restrict row, int64_t m) {
    for (int64_t c = 0; c < m; c++) sum[c] += left * row[c];
}

/* a:matmul(b): (n, k) and (k, m), with a vector on either side; batches of the same number in front. */
static int matmul(lua_State *L) {
    lua_settop(L, 2);
    values a = check_values(L, 1), b = check_values(L, 2);
    if (a.ndim == 0 || b.ndim == 0) return refuse_shapes(L, "matmul", &a, &b);
    bool row = a.ndim == 1, column = b.ndim == 1;
    int64_t n = row ? 1 : a.shape[a.ndim - 2], k = a.shape[a.ndim - 1], m = column ? 1 : b.shape[b.ndim - 1];
    int64_t shape[MAX_DIMS], batches = 1, step_b = 0;
    int ndim = 0, front = a.ndim > 2 ? a.ndim - 2 : 0, front_b = b.ndim > 2 ? b.ndim - 2 : 0;
    if (k != b.shape[column ? 0 : b.ndim - 2] || (front_b && front_b != front))
        return refuse_shapes(L, "matmul", &a, &b);
    for (int i = 0; i < front; i++) {
        if (front_b && b.shape[i] != a.shape[i]) return refuse_shapes(L, "matmul", &a, &b);
        batches *= shape[ndim++] = a.shape[i];
    }
    if (front_b) step_b = k * m;
    if (!row) shape[ndim++] = n;
    if (!column) shape[ndim++] = m;
    double *sum = ulua_buffer(L, (size_t)m * sizeof *sum);
    result y = push_result(L, !a.f || !b.f, ndim, shape);
    usl_ctx *ctx = unsloth_lua_ctx(L);
    for (int64_t r = 0; r < batches * n; r++) {
        int64_t base = r / n * step_b;
        for (int64_t c = 0; c < m; c++) sum[c] = 0;
        ULUA_TRY(L, usl_ctx_safe_point(ctx));
        for (int64_t i = 0; i < k; i++) {
            double left = get(&a, r * k + i);
            if (b.f)
                add_floats(sum, left, b.f + base + i * m, m);
            else
                add_doubles(sum, left, b.d + base + i * m, m);
        }
        for (int64_t c = 0; c < m; c++) put(&y, r * m + c, sum[c]);
    }
    return 1;
}

/* ---- Shapes ---- */

/* tensor_permute(t, { dims }): new, dense */
static int permute(lua_State *L) {
    values x = check_values(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    int64_t shape[MAX_DIMS], stride[MAX_DIMS], from[MAX_DIMS], index[MAX_DIMS] = { 0 }, step = 1, at = 0;
    unsigned seen = 0;
    for (int i = x.ndim; i-- > 0; step *= x.shape[i]) stride[i] = step;
    for (int i = 0; i < x.ndim; i++) {
        lua_rawgeti(L, 2, i + 1);
        int64_t d = ulua_integer(L, -1, "permute: a dimension");
        lua_pop(L, 1);
        if (d < 1 || d > x.ndim || seen & 1u << d)
            return ulua_fail(L, USL_ERR_SHAPE, "permute wants each of the dimensions 1 to %d once", x.ndim);
        seen |= 1u << d;
        shape[i] = x.shape[d - 1];
        from[i] = stride[d - 1];
    }
    result y = push_result(L, !x.f, x.ndim, shape);
    for (int64_t i = 0; i < x.count; i++) {
        put(&y, i, get(&x, at));
        for (int d = x.ndim; d-- > 0;) {
            at += from[d];
            if (++index[d] < shape[d]) break;
            at -= index[d] * from[d];
            index[d] = 0;
        }
    }
    return 1;
}

static int check_shape(lua_State *L, int idx, int64_t *shape) {
    luaL_checktype(L, idx, LUA_TTABLE);
    int ndim = (int)lua_rawlen(L, idx);
    if (ndim > MAX_DIMS) ulua_fail(L, USL_ERR_SHAPE, "a tensor has at most %d dimensions", MAX_DIMS);
    for (int i = 0; i < ndim; i++) {
        lua_rawgeti(L, idx, i + 1);
        shape[i] = ulua_integer(L, -1, "a length of the shape");
        lua_pop(L, 1);
    }
    return ndim;
}

/* tensor_reshape(t, { shape }): new, dense; one length may be -1 */
static int reshape(lua_State *L) {
    values x = check_values(L, 1);
    int64_t shape[MAX_DIMS], known = 1;
    int ndim = check_shape(L, 2, shape), open = -1;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] == -1 && open < 0)
            open = i;
        else
            known *= shape[i];
    }
    if (open >= 0 && known > 0) known *= shape[open] = x.count / known;
    if (known != x.count)
        return ulua_fail(L, USL_ERR_SHAPE, "reshape: %I values do not fill that shape", (LUAI_UACINT)x.count);
    result y = push_result(L, !x.f, ndim, shape);
    for (int64_t i = 0; i < x.count; i++) put(&y, i, get(&x, i));
    return 1;
}

/* ---- New ones ---- */

/* tensor_full({ shape }, value) */
static int full(lua_State *L) {
    int64_t shape[MAX_DIMS], n = 1;
    int ndim = check_shape(L, 1, shape);
    double value = luaL_checknumber(L, 2);
    result y = push_result(L, false, ndim, shape);
    for (int i = 0; i < ndim; i++) n *= shape[i];
    for (int64_t i = 0; i < n; i++) put(&y, i, value);
    return 1;
}

/* tensor_range(n, first, step) */
static int range(lua_State *L) {
    int64_t n = ulua_integer(L, 1, "the length");
    double first = luaL_checknumber(L, 2), step = luaL_checknumber(L, 3);
    result y = push_result(L, false, 1, &n);
    for (int64_t i = 0; i < n; i++) put(&y, i, first + (double)i * step);
    return 1;
}

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static double uniform(uint64_t *state) {
    return ((double)(next_random(state) >> 11) + 0.5) * 0x1p-53;
}

/* tensor_random({ shape }, seed, normal) */
static int random_(lua_State *L) {
    int64_t shape[MAX_DIMS], n = 1;
    int ndim = check_shape(L, 1, shape);
    uint64_t state = (uint64_t)ulua_integer(L, 2, "the seed");
    bool normal = lua_toboolean(L, 3);
    result y = push_result(L, false, ndim, shape);
    for (int i = 0; i < ndim; i++) n *= shape[i];
    for (int64_t i = 0; i < n; i++) {
        double u = uniform(&state);
        put(&y, i, normal ? sqrt(-2 * log(u)) * cos(6.28318530717958647692 * uniform(&state)) : u);
    }
    return 1;
}

/* ---- The functions ---- */

const luaL_Reg ulua_tensor_operators[] = { { "__add", operator_add },
                                           { "__sub", operator_sub },
                                           { "__mul", operator_mul },
                                           { "__div", operator_div },
                                           { "__pow", operator_pow },
                                           { "__unm", operator_unm },
                                           { NULL, NULL } };

/* Adds to the table of methods on top. */
static void add_methods(lua_State *L) {
    lua_pushcfunction(L, matmul);
    lua_setfield(L, -2, "matmul");
    for (size_t i = 0; i < sizeof UNARY / sizeof *UNARY; i++) {
        lua_pushinteger(L, (lua_Integer)i);
        lua_pushcclosure(L, unary, 1);
        lua_setfield(L, -2, UNARY[i].name);
    }
    for (size_t i = 0; i < sizeof BINARY / sizeof *BINARY; i++) {
        lua_pushinteger(L, (lua_Integer)i);
        lua_pushcclosure(L, binary, 1);
        lua_setfield(L, -2, BINARY[i].name);
    }
    for (size_t i = 0; i < sizeof REDUCE / sizeof *REDUCE; i++) {
        lua_pushinteger(L, (lua_Integer)i);
        lua_pushcclosure(L, reduce, 1);
        lua_setfield(L, -2, REDUCE[i].name);
    }
    for (int logs = 0; logs < 2; logs++) {
        lua_pushboolean(L, logs);
        lua_pushcclosure(L, softmax, 1);
        lua_setfield(L, -2, logs ? "log_softmax" : "softmax");
    }
}

void ulua_tensor_math_open(lua_State *L) {
    static const luaL_Reg FUNCTIONS[] = { { "tensor_full", full },       { "tensor_range", range },
                                          { "tensor_random", random_ },  { "tensor_permute", permute },
                                          { "tensor_reshape", reshape }, { NULL, NULL } };
    luaL_setfuncs(L, FUNCTIONS, 0);
    lua_getfield(L, -1, "Tensor");
    add_methods(L);
    lua_pop(L, 1);
}
