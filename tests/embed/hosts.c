/* What hosts with Lua inside rely on beside the examples: a bare state is enough, words go to the log alone, files are
 * asked for, many states share one base, too little memory is an answer.
 *
 *     hosts MODEL */
#include <lauxlib.h>
#include <lualib.h>
#include <stdio.h>
#include <string.h>
#include <unsloth_lua.h>

static int checks, failures;

#define CHECK(cond, ...)                                           \
    do {                                                           \
        checks++;                                                  \
        if (!(cond)) {                                             \
            failures++;                                            \
            printf("FAIL %s:%d: %s: ", __FILE__, __LINE__, #cond); \
            printf(__VA_ARGS__);                                   \
            printf("\n");                                          \
        }                                                          \
    } while (0)

typedef struct host {
    int lines, warnings, reads, writes;
    char last[256];
} host;

static void on_log(void *ud, usl_log_level level, const char *text) {
    host *h = ud;
    h->lines++;
    h->warnings += level == USL_LOG_WARN;
    snprintf(h->last, sizeof h->last, "%s", text);
}

static int on_access(void *ud, const char *path, usl_access access) {
    host *h = ud;
    h->reads += access == USL_ACCESS_READ;
    h->writes += access == USL_ACCESS_WRITE;
    return strstr(path, "forbidden") != NULL;
}

static usl_ctx *new_ctx(host *h) {
    usl_ctx_opts o = USL_CTX_OPTS_INIT;
    usl_ctx *ctx = NULL;
    memset(h, 0, sizeof *h);
    o.log_fn = on_log;
    o.access_fn = on_access;
    o.log_ud = o.access_ud = h;
    o.threads = 1;
    CHECK(usl_ctx_new(&o, &ctx) == USL_OK, "no context");
    return ctx;
}

/* A state without io, os, package and debug. */
static int open_bare(lua_State *L) {
    static const luaL_Reg LIBRARIES[] = { { LUA_GNAME, luaopen_base },          { LUA_STRLIBNAME, luaopen_string },
                                          { LUA_TABLIBNAME, luaopen_table },    { LUA_MATHLIBNAME, luaopen_math },
                                          { LUA_COLIBNAME, luaopen_coroutine }, { LUA_UTF8LIBNAME, luaopen_utf8 } };
    for (size_t i = 0; i < sizeof LIBRARIES / sizeof *LIBRARIES; i++)
        luaL_requiref(L, LIBRARIES[i].name, LIBRARIES[i].func, 1);
    unsloth_lua_open(L, lua_touserdata(L, 1), NULL);
    lua_setglobal(L, "unsloth");
    return 0;
}

static lua_State *new_state(usl_ctx *ctx) {
    lua_State *L = luaL_newstate();
    lua_pushcfunction(L, open_bare);
    lua_pushlightuserdata(L, ctx);
    CHECK(lua_pcall(L, 1, 0, 0) == LUA_OK, "%s", lua_tostring(L, -1));
    return L;
}

static void run(lua_State *L, const char *text) {
    int status = luaL_dostring(L, text);
    CHECK(status == LUA_OK, "%s", luaL_tolstring(L, -1, NULL));
    lua_settop(L, 0);
}

static int push_base(lua_State *L) {
    return unsloth_lua_push_model(L, lua_touserdata(L, 1));
}

static void give_base(lua_State *L, usl_model *base) {
    lua_pushcfunction(L, push_base);
    lua_pushlightuserdata(L, base);
    CHECK(lua_pcall(L, 1, 1, 0) == LUA_OK, "%s", luaL_tolstring(L, -1, NULL));
    lua_setglobal(L, "model");
}

static int shared(usl_model *m) {
    usl_model_info info = { .size = sizeof info };
    usl_model_get_info(m, &info);
    return info.shared;
}

static void test_states(const char *path) {
    static const char TRAIN[] =
        "local tok = unsloth.AutoTokenizer.from_pretrained(path)\n"
        "model = unsloth.FastLanguageModel.get_peft_model(model, { r = 4, lora_alpha = 4 })\n"
        "local t = unsloth.SFTTrainer { model = model, tokenizer = tok, train_dataset = unsloth.dataset_from_list { { "
        "text = 'a b c' } },\n"
        "  args = { max_steps = 2, per_device_train_batch_size = 1, logging_steps = 1, save_strategy = 'no' } }\n"
        "t:train()\n"
        "assert(#model:generate('a', { max_new_tokens = 3, tokenizer = tok }) > 0)\n"
        "tok = unsloth.get_chat_template(tok, 'chatml')\n"
        "local ok, e = pcall(model.save_pretrained, model, 'forbidden/adapter')\n"
        "assert(not ok and tostring(e):find 'does not allow', tostring(e))\n"
        "ok, e = pcall(unsloth.load_dataset, 'json', { data_files = 'forbidden.json' })\n"
        "assert(not ok and tostring(e):find 'does not allow', tostring(e))\n"
        "assert(io == nil and os == nil and package == nil and debug == nil)";
    host h[3];
    usl_ctx *own = new_ctx(&h[0]), *ctx[2] = { new_ctx(&h[1]), new_ctx(&h[2]) };
    usl_model *base = NULL;
    usl_model_opts mo = USL_MODEL_OPTS_INIT;
    lua_State *L[2];
    mo.device = "cpu";
    CHECK(usl_model_open(own, path, &mo, &base) == USL_OK, "%s", usl_ctx_errmsg(own));
    for (int i = 0; i < 2; i++) {
        L[i] = new_state(ctx[i]);
        give_base(L[i], base);
        lua_pushstring(L[i], path);
        lua_setglobal(L[i], "path");
    }
    CHECK(shared(base) == 2, "%d others", shared(base));
    fflush(stdout);
    for (int i = 0; i < 2; i++) {
        run(L[i], TRAIN);
        CHECK(h[i + 1].lines >= 2 && h[i + 1].warnings >= 1, "%d lines, %d warnings", h[i + 1].lines,
              h[i + 1].warnings);
        CHECK(strchr(h[i + 1].last, '\n') == NULL, "\"%s\" is no line", h[i + 1].last);
        CHECK(h[i + 1].reads >= 2 && h[i + 1].writes >= 1, "%d reads, %d writes", h[i + 1].reads, h[i + 1].writes);
        CHECK(unsloth_lua_ctx(L[i]) == ctx[i], "another context");
    }
    lua_pushcfunction(L[0], open_bare);
    lua_pushlightuserdata(L[0], own);
    CHECK(lua_pcall(L[0], 1, 0, 0) != LUA_OK && strstr(lua_tostring(L[0], -1), "already"),
          "a second context was taken");
    usl_model_free(base); /* the states keep it */
    for (int i = 0; i < 2; i++) {
        usl_ctx_free(ctx[i]);
        lua_close(L[i]);
    }
    usl_ctx_free(own);
}

static void test_small_sandboxes(void) {
    static const char TEXT[] = "local t = {} for i = 1, 1e6 do t[i] = tostring(i) end";
    int made = 0, refused = 0;
    for (uint64_t memory = 0; memory < 1200000; memory += 29989) {
        unsloth_sandbox_opts o = UNSLOTH_SANDBOX_OPTS_INIT;
        unsloth_sandbox *box;
        char why[256] = "";
        o.memory = memory;
        o.threads = 1;
        if (unsloth_sandbox_new(&o, &box, why, sizeof why) != USL_OK) {
            refused++;
            CHECK(*why && !box, "no sentence");
            continue;
        }
        made++;
        for (int i = 0; i < 2; i++) {
            usl_status st = unsloth_sandbox_run(box, "recipe", TEXT, sizeof TEXT - 1);
            CHECK(st == USL_ERR_CANCELLED && strstr(unsloth_sandbox_errmsg(box), "memory"), "%s: %s",
                  usl_status_name(st), unsloth_sandbox_errmsg(box));
        }
        unsloth_sandbox_free(box);
    }
    CHECK(made && refused, "%d made, %d refused", made, refused);
}

int main(int argc, char **argv) {
    if (argc < 2) return 1;
    test_states(argv[1]);
    test_small_sandboxes();
    printf("hosts: %d checks, %d failed\n", checks, failures);
    return failures != 0;
}
