/* The trainer: one update at a time. The loop, logging and checkpoints on disk are Lua, in unsloth/trainer.lua. */
#include <string.h>

#include "lua/binding.h"

/* What the rate callback needs while a call runs; stands in the handle's second user value beside the function. */
typedef struct rate_call {
    lua_State *L; /* the thread that calls */
    usl_ctx *ctx;
    int function, slot; /* stack indices: the function, and where its error is put */
    bool failed, no_number;
} rate_call;

enum { USER_CALL = 2 };

static void release_trainer(void *ptr) {
    usl_trainer_free(ptr);
}

/* An error cancels the update, which leaves the weights as they were; the binding raises it when core has unwound. */
static double call_rate(void *ud, int64_t step, int64_t total) {
    rate_call *call = ud;
    lua_State *L = call->L;
    if (call->failed) return 0;
    lua_pushvalue(L, call->function);
    lua_pushinteger(L, step);
    lua_pushinteger(L, total);
    if (lua_pcall(L, 2, 1, 0) == LUA_OK) {
        int is_number = 0;
        double rate = lua_tonumberx(L, -1, &is_number);
        lua_pop(L, 1);
        if (is_number) return rate;
        call->no_number = true;
    } else {
        lua_replace(L, call->slot);
    }
    call->failed = true;
    usl_ctx_cancel(call->ctx);
    return 0;
}

/* Prepares the stack for calls that may run the rate function; trainer at index 1. NULL when there is none. */
static rate_call *begin_call(lua_State *L, int handle) {
    luaL_checkstack(L, 16, "trainer");
    if (lua_getiuservalue(L, handle, USER_CALL) != LUA_TTABLE) return NULL;
    lua_rawgeti(L, -1, 1);
    rate_call *call = lua_touserdata(L, -1);
    lua_rawgeti(L, -2, 2);
    lua_pushnil(L);
    call->L = L;
    call->slot = lua_gettop(L);
    call->function = call->slot - 1;
    call->failed = call->no_number = false;
    return call;
}

/* Raises what the rate function raised, unchanged; else the status. Only here may anything be made: want of memory is
 * an error too, which must not jump over core. */
static void end_call(lua_State *L, const rate_call *call, usl_status st) {
    if (call && call->failed) {
        usl_ctx_uncancel(call->ctx);
        lua_pushvalue(L, call->slot);
        if (call->no_number) lua_pushliteral(L, "the learning rate function must return a number");
        ulua_explain_yield(L);
        lua_error(L);
    }
    if (st != USL_OK) ulua_raise(L, st);
}

static const ulua_option OPTIONS[] = {
    { "batch", ULUA_INT64, offsetof(usl_train_opts, batch) },
    { "accumulation", ULUA_INT64, offsetof(usl_train_opts, accumulation) },
    { "epochs", ULUA_DOUBLE, offsetof(usl_train_opts, epochs) },
    { "max_steps", ULUA_INT64, offsetof(usl_train_opts, max_steps) },
    { "learning_rate", ULUA_DOUBLE, offsetof(usl_train_opts, learning_rate) },
    { "embedding_learning_rate", ULUA_DOUBLE, offsetof(usl_train_opts, embedding_learning_rate) },
    { "schedule", ULUA_STRING, offsetof(usl_train_opts, schedule) },
    { "warmup_steps", ULUA_INT64, offsetof(usl_train_opts, warmup_steps) },
    { "warmup_ratio", ULUA_DOUBLE, offsetof(usl_train_opts, warmup_ratio) },
    { "weight_decay", ULUA_DOUBLE, offsetof(usl_train_opts, weight_decay) },
    { "beta1", ULUA_DOUBLE, offsetof(usl_train_opts, beta1) },
    { "beta2", ULUA_DOUBLE, offsetof(usl_train_opts, beta2) },
    { "epsilon", ULUA_DOUBLE, offsetof(usl_train_opts, epsilon) },
    { "max_grad_norm", ULUA_DOUBLE, offsetof(usl_train_opts, max_grad_norm) },
    { "optimizer", ULUA_STRING, offsetof(usl_train_opts, optimizer) },
    { "seed", ULUA_UINT64, offsetof(usl_train_opts, seed) },
    { "shuffle", ULUA_BOOL, offsetof(usl_train_opts, shuffle) },
    { "recompute", ULUA_STRING, offsetof(usl_train_opts, recompute) },
    { "deterministic", ULUA_BOOL, offsetof(usl_train_opts, deterministic) },
    { "memory_limit", ULUA_UINT64, offsetof(usl_train_opts, memory_limit) },
    { "router_aux_loss_coef", ULUA_DOUBLE, offsetof(usl_train_opts, router_aux_loss_coef) },
};

/* Leaves { call, function } on the stack and sets the options' callback. */
static void push_rate_call(lua_State *L, int function, usl_train_opts *opts) {
    lua_createtable(L, 2, 0);
    rate_call *call = lua_newuserdatauv(L, sizeof *call, 0);
    memset(call, 0, sizeof *call);
    call->ctx = unsloth_lua_ctx(L);
    lua_rawseti(L, -2, 1);
    lua_pushvalue(L, function);
    lua_rawseti(L, -2, 2);
    opts->lr_fn = call_rate;
    opts->lr_ud = call;
}

/* trainer_new(model, rows, eval_rows or nil, opts, lr_fn or nil) */
static int trainer_new(lua_State *L) {
    usl_model *model = ulua_ptr(L, 1, &ulua_model);
    usl_rows *rows = ulua_ptr(L, 2, &ulua_rows), *eval = lua_isnoneornil(L, 3) ? NULL : ulua_ptr(L, 3, &ulua_rows);
    lua_settop(L, 5);
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    ulua_options(L, 4, "trainer_new", OPTIONS, sizeof OPTIONS / sizeof *OPTIONS, NULL, &opts);
    ulua_handle *h = ulua_new(L, &ulua_trainer);
    int handle = lua_gettop(L);
    if (!lua_isnil(L, 5)) {
        luaL_checktype(L, 5, LUA_TFUNCTION);
        push_rate_call(L, 5, &opts);
        lua_setiuservalue(L, handle, USER_CALL);
    }
    rate_call *call = begin_call(L, handle);
    usl_status st = usl_trainer_new(model, rows, eval, &opts, (usl_trainer **)&h->ptr);
    if (st == USL_ERR_NOMEM) {
        lua_gc(L, LUA_GCCOLLECT, 0);
        st = usl_trainer_new(model, rows, eval, &opts, (usl_trainer **)&h->ptr);
    }
    end_call(L, call, st);
    usl_plan plan;
    memset(&plan, 0, sizeof plan);
    plan.size = sizeof plan;
    usl_trainer_get_plan(h->ptr, &plan);
    ulua_account(L, plan.total);
    lua_settop(L, handle);
    return 1;
}

static void push_stats(lua_State *L, const usl_step_stats *s) {
    const struct {
        const char *name;
        int64_t value;
    } integers[] = { { "step", s->step },       { "total", s->total }, { "tokens", s->tokens },
                     { "counted", s->counted }, { "rows", s->rows },   { "passes", s->passes } };
    const struct {
        const char *name;
        double value;
    } numbers[] = { { "epoch", s->epoch },         { "loss", s->loss },       { "learning_rate", s->learning_rate },
                    { "grad_norm", s->grad_norm }, { "seconds", s->seconds }, { "flops", s->flops } };
    lua_createtable(L, 0, 12);
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++) {
        lua_pushinteger(L, integers[i].value);
        lua_setfield(L, -2, integers[i].name);
    }
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        lua_pushnumber(L, numbers[i].value);
        lua_setfield(L, -2, numbers[i].name);
    }
    lua_pushboolean(L, s->skipped);
    lua_setfield(L, -2, "skipped");
}

/* trainer:step() -> statistics, nil when all updates are done */
static int trainer_step(lua_State *L) {
    ulua_handle *h = ulua_check(L, 1, &ulua_trainer);
    lua_settop(L, 1);
    usl_step_stats stats;
    memset(&stats, 0, sizeof stats);
    stats.size = sizeof stats;
    rate_call *call = begin_call(L, 1);
    h->busy = 1;
    usl_status st = usl_trainer_step(h->ptr, &stats);
    h->busy = 0;
    if (st == USL_ERR_NOT_FOUND && !(call && call->failed)) return 0;
    end_call(L, call, st);
    push_stats(L, &stats);
    return 1;
}

static int trainer_evaluate(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    usl_step_stats stats;
    memset(&stats, 0, sizeof stats);
    stats.size = sizeof stats;
    ULUA_TRY(L, usl_trainer_evaluate(t, &stats));
    push_stats(L, &stats);
    return 1;
}

/* trainer:gradients(first, count): of rows counted from 1; then get_grad */
static int trainer_gradients(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    int64_t first = ulua_integer(L, 2, "gradients: the first row"),
            count = ulua_integer(L, 3, "gradients: the number of rows");
    if (first < 1) return ulua_fail(L, USL_ERR_INVALID, "gradients: rows count from 1, not %I", (LUAI_UACINT)first);
    usl_step_stats stats;
    memset(&stats, 0, sizeof stats);
    stats.size = sizeof stats;
    ULUA_TRY(L, usl_trainer_gradients(t, first - 1, count, &stats));
    push_stats(L, &stats);
    return 1;
}

static int trainer_get_grad(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    const char *name = luaL_checkstring(L, 2);
    ulua_handle *h = ulua_new(L, &ulua_tensor);
    ULUA_TRY(L, usl_trainer_get_grad(t, name, (usl_tensor **)&h->ptr));
    return 1;
}

/* trainer:set_learning_rate(rate): from the next update on; nil is the schedule again */
static int trainer_set_learning_rate(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    usl_trainer_set_learning_rate(t, luaL_optnumber(L, 2, -1.0));
    return 0;
}

/* trainer:set_rows(rows): other rows from the next update on */
static int trainer_set_rows(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    ULUA_TRY(L, usl_trainer_set_rows(t, ulua_ptr(L, 2, &ulua_rows)));
    return 0;
}

/* trainer:skip(updates): they count as done */
static int trainer_skip(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    ULUA_TRY(L, usl_trainer_skip(t, ulua_integer(L, 2, "skip: the number of updates")));
    return 0;
}

/* trainer:position() -> updates done, updates in all */
static int trainer_position(lua_State *L) {
    int64_t total = 0, done = usl_trainer_position(ulua_ptr(L, 1, &ulua_trainer), &total);
    lua_pushinteger(L, done);
    lua_pushinteger(L, total);
    return 2;
}

/* trainer:save(dir, extra): extra is text that resume gives back */
static int trainer_save(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    ULUA_TRY(L, usl_trainer_save(t, luaL_checkstring(L, 2), luaL_optstring(L, 3, NULL)));
    return 0;
}

static int trainer_resume(lua_State *L) {
    usl_trainer *t = ulua_ptr(L, 1, &ulua_trainer);
    const char *dir = luaL_checkstring(L, 2);
    void **extra = ulua_adopt(L);
    ULUA_TRY(L, usl_trainer_resume(t, dir, (char **)extra));
    lua_pushstring(L, *extra);
    return 1;
}

/* trainer:plan() -> { total, limit, capacity_tokens, ..., items = { { name, bytes }, ... } } */
static int trainer_plan(lua_State *L) {
    usl_plan p;
    memset(&p, 0, sizeof p);
    p.size = sizeof p;
    usl_trainer_get_plan(ulua_ptr(L, 1, &ulua_trainer), &p);
    const struct {
        const char *name;
        int64_t value;
    } fields[] = { { "total", (int64_t)p.total },
                   { "limit", (int64_t)p.limit },
                   { "capacity_tokens", p.capacity_tokens },
                   { "capacity_rows", p.capacity_rows },
                   { "recomputed_layers", p.recomputed_layers },
                   { "whole_layers", p.whole_layers },
                   { "layers", p.layers },
                   { "offloaded_inputs", p.offloaded_inputs },
                   { "piece_tokens", p.piece_tokens },
                   { "streamed_layers", p.streamed_layers },
                   { "host_total", (int64_t)p.host_total } };
    lua_createtable(L, 0, 12);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        lua_pushinteger(L, fields[i].value);
        lua_setfield(L, -2, fields[i].name);
    }
    lua_createtable(L, p.count, 0);
    for (int i = 0; i < p.count; i++) {
        lua_createtable(L, 0, 2);
        lua_pushstring(L, p.items[i].name);
        lua_setfield(L, -2, "name");
        lua_pushinteger(L, (lua_Integer)p.items[i].bytes);
        lua_setfield(L, -2, "bytes");
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "items");
    return 1;
}

static const luaL_Reg METHODS[] = { { "step", trainer_step },
                                    { "evaluate", trainer_evaluate },
                                    { "gradients", trainer_gradients },
                                    { "get_grad", trainer_get_grad },
                                    { "set_learning_rate", trainer_set_learning_rate },
                                    { "set_rows", trainer_set_rows },
                                    { "skip", trainer_skip },
                                    { "position", trainer_position },
                                    { "save", trainer_save },
                                    { "resume", trainer_resume },
                                    { "plan", trainer_plan },
                                    { NULL, NULL } };
const ulua_class ulua_trainer = { "unsloth.core.Trainer", release_trainer, METHODS, NULL, NULL };

void ulua_trainer_open(lua_State *L) {
    ulua_define(L, &ulua_trainer);
    lua_setfield(L, -2, "Trainer");
    lua_pushcfunction(L, trainer_new);
    lua_setfield(L, -2, "trainer_new");
}
