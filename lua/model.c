/* Models: opening, adapters, parameters, logits, generation. What Unsloth's names mean is Lua, in unsloth/model.lua. */
#include <string.h>

#include "lua/binding.h"

static void release_model(void *ptr) {
    usl_model_free(ptr);
}
static void release_generator(void *ptr) {
    usl_generator_free(ptr);
}

static usl_model *check_model(lua_State *L, int idx) {
    return ulua_ptr(L, idx, &ulua_model);
}

static const ulua_option MODEL_OPTIONS[] = { { "device", ULUA_STRING, offsetof(usl_model_opts, device) },
                                             { "dtype", ULUA_DTYPE, offsetof(usl_model_opts, dtype) },
                                             { "load_in_4bit", ULUA_BOOL, offsetof(usl_model_opts, load_in_4bit) },
                                             { "full_finetuning", ULUA_BOOL,
                                               offsetof(usl_model_opts, full_finetuning) },
                                             { "max_seq_length", ULUA_INT64, offsetof(usl_model_opts, max_seq_length) },
                                             { "rope_scaling", ULUA_STRING, offsetof(usl_model_opts, rope_scaling) },
                                             { "plan_only", ULUA_BOOL, offsetof(usl_model_opts, plan_only) } };
#define COUNT(list) (sizeof(list) / sizeof *(list))

static void account_model(lua_State *L, const usl_model *model) {
    usl_model_info info;
    memset(&info, 0, sizeof info);
    info.size = sizeof info;
    usl_model_get_info(model, &info);
    ulua_account(L, info.weight_bytes);
}

/* model_open(path, opts) */
static int model_open(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    ulua_options(L, 2, "model_open", MODEL_OPTIONS, COUNT(MODEL_OPTIONS), NULL, &opts);
    ulua_handle *h = ulua_new(L, &ulua_model);
    ULUA_TRY(L, usl_model_open(unsloth_lua_ctx(L), path, &opts, (usl_model **)&h->ptr));
    if (!opts.plan_only) account_model(L, h->ptr);
    return 1;
}

/* With the fields that from_pretrained sets. */
int unsloth_lua_push_model(lua_State *L, usl_model *model) {
    usl_model_info info = { .size = sizeof info };
    ulua_handle *h = ulua_new(L, &ulua_model);
    ULUA_TRY(L, usl_model_share(unsloth_lua_ctx(L), model, (usl_model **)&h->ptr));
    usl_model_get_info(h->ptr, &info);
    lua_pushinteger(L, info.context);
    lua_setfield(L, -2, "max_seq_length");
    lua_pushstring(L, info.device);
    lua_setfield(L, -2, "device");
    lua_pushstring(L, usl_dtype_name(info.dtype));
    lua_setfield(L, -2, "dtype");
    return 1;
}

/* model_share(model) -> another one with the same frozen weights, and adapters of its own */
static int model_share(lua_State *L) {
    return unsloth_lua_push_model(L, check_model(L, 1));
}

/* model_random(config_json, seed, opts) */
static int model_random(lua_State *L) {
    const char *config = luaL_checkstring(L, 1);
    int64_t seed = ulua_integer(L, 2, "the seed");
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    ulua_options(L, 3, "model_random", MODEL_OPTIONS, COUNT(MODEL_OPTIONS), NULL, &opts);
    ulua_handle *h = ulua_new(L, &ulua_model);
    ULUA_TRY(L, usl_model_random(unsloth_lua_ctx(L), config, (uint64_t)seed, &opts, (usl_model **)&h->ptr));
    if (!opts.plan_only) account_model(L, h->ptr);
    return 1;
}

/* memory(model) -> bytes in use on its device */
static int memory(lua_State *L) {
    lua_pushinteger(L, (lua_Integer)usl_model_memory(check_model(L, 1)));
    return 1;
}

/* gemm_rate(model) -> floating-point operations a second */
static int gemm_rate(lua_State *L) {
    double rate;
    ULUA_TRY(L, usl_model_gemm_rate(check_model(L, 1), &rate));
    lua_pushnumber(L, rate);
    return 1;
}

/* decode_rate(model, rows, prompt, new_tokens) -> a table of usl_decode_rate's fields */
static int decode_rate(lua_State *L) {
    usl_decode_rate r;
    lua_Integer rows = luaL_checkinteger(L, 2);
    luaL_argcheck(L, rows > 0 && rows <= 1 << 16, 2, "from 1 to 65536 rows are wanted");
    ULUA_TRY(L,
             usl_model_decode_rate(check_model(L, 1), (int)rows, luaL_checkinteger(L, 3), luaL_checkinteger(L, 4), &r));
    lua_createtable(L, 0, 4);
    lua_pushnumber(L, r.first_seconds);
    lua_setfield(L, -2, "first_seconds");
    lua_pushnumber(L, r.step_seconds);
    lua_setfield(L, -2, "step_seconds");
    lua_pushinteger(L, (lua_Integer)r.step_bytes);
    lua_setfield(L, -2, "step_bytes");
    lua_pushnumber(L, r.copy_rate);
    lua_setfield(L, -2, "copy_rate");
    return 1;
}

/* inspect(path) -> what lies there, as usl_inspect describes it */
static int inspect(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    ulua_tape *tape = ulua_tape_new(L);
    usl_status st = usl_inspect(unsloth_lua_ctx(L), path, &ulua_tape_visitor, tape);
    if (st != USL_OK) return ulua_tape_raise(L, tape, st);
    ulua_tape_push(L, tape, true);
    return 1;
}

static int model_info(lua_State *L) {
    usl_model_info m;
    memset(&m, 0, sizeof m);
    m.size = sizeof m;
    usl_model_get_info(check_model(L, 1), &m);
    const struct {
        const char *name;
        int64_t value;
    } numbers[] = { { "layers", m.layers },
                    { "hidden", m.hidden },
                    { "intermediate", m.intermediate },
                    { "heads", m.heads },
                    { "kv_heads", m.kv_heads },
                    { "head_dim", m.head_dim },
                    { "vocab", m.vocab },
                    { "context", m.context },
                    { "parameters", m.parameters },
                    { "trainable", m.trainable },
                    { "weight_bytes", (int64_t)m.weight_bytes },
                    { "shared", m.shared } };
    lua_createtable(L, 0, 16);
    for (size_t i = 0; i < COUNT(numbers); i++) {
        lua_pushinteger(L, numbers[i].value);
        lua_setfield(L, -2, numbers[i].name);
    }
    lua_pushstring(L, m.architecture);
    lua_setfield(L, -2, "architecture");
    lua_pushstring(L, m.device);
    lua_setfield(L, -2, "device");
    lua_pushstring(L, usl_dtype_name(m.dtype));
    lua_setfield(L, -2, "dtype");
    lua_pushboolean(L, m.tied);
    lua_setfield(L, -2, "tied");
    return 1;
}

/* ---- Adapters ---- */

static int model_add_lora(lua_State *L) {
    static const ulua_option LIST[] = { { "name", ULUA_STRING, offsetof(usl_lora_opts, name) },
                                        { "rank", ULUA_INT, offsetof(usl_lora_opts, rank) },
                                        { "alpha", ULUA_DOUBLE, offsetof(usl_lora_opts, alpha) },
                                        { "dropout", ULUA_DOUBLE, offsetof(usl_lora_opts, dropout) },
                                        { "target_modules", ULUA_STRING, offsetof(usl_lora_opts, target_modules) },
                                        { "layers", ULUA_STRING, offsetof(usl_lora_opts, layers) },
                                        { "use_rslora", ULUA_BOOL, offsetof(usl_lora_opts, use_rslora) },
                                        { "init", ULUA_STRING, offsetof(usl_lora_opts, init) },
                                        { "seed", ULUA_UINT64, offsetof(usl_lora_opts, seed) },
                                        { "target_pattern", ULUA_STRING, offsetof(usl_lora_opts, target_pattern) },
                                        { "exclude_modules", ULUA_STRING, offsetof(usl_lora_opts, exclude_modules) },
                                        { "layers_pattern", ULUA_STRING, offsetof(usl_lora_opts, layers_pattern) },
                                        { "modules_to_save", ULUA_STRING, offsetof(usl_lora_opts, modules_to_save) },
                                        { "rank_pattern", ULUA_STRING, offsetof(usl_lora_opts, rank_pattern) },
                                        { "alpha_pattern", ULUA_STRING, offsetof(usl_lora_opts, alpha_pattern) },
                                        { "bias", ULUA_STRING, offsetof(usl_lora_opts, bias) },
                                        { "use_dora", ULUA_BOOL, offsetof(usl_lora_opts, use_dora) },
                                        { "ensure_weight_tying", ULUA_BOOL,
                                          offsetof(usl_lora_opts, ensure_weight_tying) },
                                        { "loftq_bits", ULUA_INT, offsetof(usl_lora_opts, loftq_bits) },
                                        { "loftq_iter", ULUA_INT, offsetof(usl_lora_opts, loftq_iter) } };
    usl_model *model = check_model(L, 1);
    usl_lora_opts opts = USL_LORA_OPTS_INIT;
    ulua_options(L, 2, "add_lora", LIST, COUNT(LIST), NULL, &opts);
    ULUA_TRY(L, usl_model_add_lora(model, &opts));
    return 0;
}

static int model_load_adapter(lua_State *L) {
    usl_model *model = check_model(L, 1);
    ULUA_TRY(L, usl_model_load_adapter(model, luaL_checkstring(L, 2), luaL_optstring(L, 3, NULL)));
    return 0;
}

static int model_set_adapter(lua_State *L) {
    usl_model *model = check_model(L, 1);
    ULUA_TRY(L, usl_model_set_adapter(model, luaL_optstring(L, 2, NULL)));
    return 0;
}

static int model_adapter(lua_State *L) {
    lua_pushstring(L, usl_model_adapter(check_model(L, 1)));
    return 1;
}

/* model:save_adapter(dir, [base], [as_lora]) */
static int model_save_adapter(lua_State *L) {
    usl_model *model = check_model(L, 1);
    const char *dir = luaL_checkstring(L, 2), *base = luaL_optstring(L, 3, NULL);
    if (lua_toboolean(L, 4))
        ULUA_TRY(L, usl_model_save_adapter_as_lora(model, dir, base));
    else
        ULUA_TRY(L, usl_model_save_adapter(model, dir, base));
    return 0;
}

/* resize_vocab(rows, mean_of) */
static int model_resize_vocab(lua_State *L) {
    usl_model *model = check_model(L, 1);
    int64_t rows = ulua_integer(L, 2, "the number of tokens");
    int64_t mean_of = lua_isnoneornil(L, 3) ? 0 : ulua_integer(L, 3, "mean_of");
    ULUA_TRY(L, usl_model_resize_vocab(model, rows, mean_of));
    return 0;
}

/* blend_row(id, ids, weight) */
static int model_blend_row(lua_State *L) {
    usl_model *model = check_model(L, 1);
    int64_t row = ulua_integer(L, 2, "the token's id");
    double weight = luaL_checknumber(L, 4);
    size_t count;
    const int32_t *ids = ulua_ids(L, 3, &count);
    ULUA_TRY(L, usl_model_blend_row(model, row, ids, count, weight));
    return 0;
}

/* ---- Parameters ---- */

/* model:params() -> array of names, { name = trainable } */
static int model_params(lua_State *L) {
    usl_model *model = check_model(L, 1);
    lua_newtable(L);
    lua_newtable(L);
    const char *name;
    int trainable = 0;
    for (int64_t i = 0; (name = usl_model_param_name(model, i, &trainable)); i++) {
        lua_pushstring(L, name);
        lua_pushvalue(L, -1);
        lua_rawseti(L, -4, i + 1);
        lua_pushboolean(L, trainable);
        lua_rawset(L, -3);
    }
    return 2;
}

/* model:param_list() -> array of { name, shape, dtype, bytes, trainable } */
static int model_param_list(lua_State *L) {
    usl_model *model = check_model(L, 1);
    usl_param_info p;
    memset(&p, 0, sizeof p);
    p.size = sizeof p;
    lua_newtable(L);
    for (int64_t i = 0; usl_model_param_info(model, i, &p); i++) {
        lua_createtable(L, 0, 5);
        lua_pushstring(L, usl_model_param_name(model, i, NULL));
        lua_setfield(L, -2, "name");
        lua_createtable(L, p.ndim, 0);
        for (int d = 0; d < p.ndim; d++) {
            lua_pushinteger(L, p.shape[d]);
            lua_rawseti(L, -2, d + 1);
        }
        lua_setfield(L, -2, "shape");
        lua_pushstring(L, usl_dtype_name(p.dtype));
        lua_setfield(L, -2, "dtype");
        lua_pushinteger(L, (lua_Integer)p.bytes);
        lua_setfield(L, -2, "bytes");
        lua_pushboolean(L, p.trainable);
        lua_setfield(L, -2, "trainable");
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static int model_get_param(lua_State *L) {
    usl_model *model = check_model(L, 1);
    const char *name = luaL_checkstring(L, 2);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_model_get_param(model, name, (usl_tensor **)&h->ptr));
    return 1;
}

static int model_set_param(lua_State *L) {
    usl_model *model = check_model(L, 1);
    ULUA_TRY(L, usl_model_set_param(model, luaL_checkstring(L, 2), ulua_ptr(L, 3, &ulua_tensor)));
    return 0;
}

/* ---- Answers ---- */

static int model_logits(lua_State *L) {
    usl_model *model = check_model(L, 1);
    size_t count;
    const int32_t *ids = ulua_ids(L, 2, &count);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_model_logits(model, ids, count, (usl_tensor **)&h->ptr));
    ulua_account(L, (uint64_t)usl_tensor_elements(h->ptr) * sizeof(float));
    return 1;
}

/* model:hidden_states(ids) -> (layers + 1, count, hidden) */
static int model_hidden_states(lua_State *L) {
    usl_model *model = check_model(L, 1);
    size_t count;
    const int32_t *ids = ulua_ids(L, 2, &count);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_model_hidden_states(model, ids, count, (usl_tensor **)&h->ptr));
    ulua_account(L, (uint64_t)usl_tensor_elements(h->ptr) * sizeof(float));
    return 1;
}

/* model:attentions(ids, layer): layer from 0 -> (heads, count, count) */
static int model_attentions(lua_State *L) {
    usl_model *model = check_model(L, 1);
    size_t count;
    int64_t layer = ulua_integer(L, 3, "attentions: the layer");
    const int32_t *ids = ulua_ids(L, 2, &count);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_model_attentions(model, ids, count, layer, (usl_tensor **)&h->ptr));
    ulua_account(L, (uint64_t)usl_tensor_elements(h->ptr) * sizeof(float));
    return 1;
}

/* model:unembed(states): (rows, hidden) -> (rows, vocabulary) */
static int model_unembed(lua_State *L) {
    usl_model *model = check_model(L, 1);
    const usl_tensor *states = ulua_ptr(L, 2, &ulua_tensor);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_model_unembed(model, states, (usl_tensor **)&h->ptr));
    ulua_account(L, (uint64_t)usl_tensor_elements(h->ptr) * sizeof(float));
    return 1;
}

/* model:generator(ids, opts) -> an object whose next() gives an id, nil at the end */
static int model_generator(lua_State *L) {
    static const ulua_option LIST[] = { { "max_new_tokens", ULUA_INT64, offsetof(usl_generate_opts, max_new_tokens) },
                                        { "temperature", ULUA_DOUBLE, offsetof(usl_generate_opts, temperature) },
                                        { "top_k", ULUA_INT, offsetof(usl_generate_opts, top_k) },
                                        { "top_p", ULUA_DOUBLE, offsetof(usl_generate_opts, top_p) },
                                        { "min_p", ULUA_DOUBLE, offsetof(usl_generate_opts, min_p) },
                                        { "repetition_penalty", ULUA_DOUBLE,
                                          offsetof(usl_generate_opts, repetition_penalty) },
                                        { "seed", ULUA_UINT64, offsetof(usl_generate_opts, seed) },
                                        { "vocab", ULUA_INT64, offsetof(usl_generate_opts, vocab) } };
    static const char *const ALSO[] = { "stop_ids", NULL };
    usl_model *model = check_model(L, 1);
    lua_settop(L, 3);
    usl_generate_opts opts = USL_GENERATE_OPTS_INIT;
    ulua_options(L, 3, "generate", LIST, COUNT(LIST), ALSO, &opts);
    size_t count, stop_count;
    if (lua_istable(L, 3) && lua_getfield(L, 3, "stop_ids") != LUA_TNIL) {
        opts.stop_ids = ulua_ids(L, -1, &stop_count);
        opts.stop_count = (int64_t)stop_count;
    }
    const int32_t *ids = ulua_ids(L, 2, &count);
    ulua_handle *h = ulua_new(L, &ulua_generator);
    ULUA_TRY(L, usl_generator_new(model, ids, count, &opts, (usl_generator **)&h->ptr));
    return 1;
}

static int generator_next(lua_State *L) {
    int32_t id;
    usl_generator *g = ulua_ptr(L, 1, &ulua_generator);
    ULUA_TRY(L, usl_generator_next(g, &id));
    if (id < 0) return 0;
    lua_pushinteger(L, id);
    return 1;
}

static const luaL_Reg GENERATOR_METHODS[] = { { "next", generator_next }, { NULL, NULL } };
const ulua_class ulua_generator = { "unsloth.Generator", release_generator, GENERATOR_METHODS, NULL, NULL };

static const luaL_Reg MODEL_METHODS[] = { { "info", model_info },
                                          { "add_lora", model_add_lora },
                                          { "load_adapter", model_load_adapter },
                                          { "activate", model_set_adapter },
                                          { "active_adapter", model_adapter },
                                          { "save_adapter", model_save_adapter },
                                          { "params", model_params },
                                          { "param_list", model_param_list },
                                          { "get_param", model_get_param },
                                          { "set_param", model_set_param },
                                          { "resize_vocab", model_resize_vocab },
                                          { "blend_row", model_blend_row },
                                          { "logits", model_logits },
                                          { "hidden_states", model_hidden_states },
                                          { "attentions", model_attentions },
                                          { "unembed", model_unembed },
                                          { "generator", model_generator },
                                          { NULL, NULL } };
const ulua_class ulua_model = { "unsloth.Model", release_model, MODEL_METHODS, NULL, NULL };

void ulua_model_open(lua_State *L) {
    ulua_define(L, &ulua_model);
    lua_setfield(L, -2, "Model");
    ulua_define(L, &ulua_generator);
    lua_setfield(L, -2, "Generator");
    static const luaL_Reg FUNCTIONS[] = { { "model_open", model_open },   { "model_random", model_random },
                                          { "model_share", model_share }, { "inspect", inspect },
                                          { "gemm_rate", gemm_rate },     { "memory", memory },
                                          { "decode_rate", decode_rate }, { NULL, NULL } };
    luaL_setfuncs(L, FUNCTIONS, 0);
}
