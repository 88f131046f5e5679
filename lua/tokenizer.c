/* Tokenizers: text to ids and back. */
#include <limits.h>
#include <string.h>

#include "lua/binding.h"

static void release_tokenizer(void *ptr) {
    usl_tokenizer_free(ptr);
}

static void release_stream(void *ptr) {
    usl_text_stream_free(ptr);
}

static usl_tokenizer *check_tokenizer(lua_State *L, int idx) {
    return ulua_ptr(L, idx, &ulua_tokenizer);
}

static void check_options(lua_State *L, int idx, const char *what, const char *option) {
    const char *const also[] = { option, NULL };
    ulua_options(L, idx, what, NULL, 0, also, NULL);
}

/* tokenizer_open(path) */
static int tokenizer_open(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    ulua_handle *h = ulua_new(L, &ulua_tokenizer);
    ULUA_TRY(L, usl_tokenizer_open(unsloth_lua_ctx(L), path, (usl_tokenizer **)&h->ptr));
    return 1;
}

static int tokenizer_encode(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    size_t len, count;
    const char *text = luaL_checklstring(L, 2, &len);
    check_options(L, 3, "encode", "add_special_tokens");
    bool special = ulua_flag(L, 3, "add_special_tokens", true);
    void **ids = ulua_adopt(L);
    ULUA_TRY(L, usl_tokenizer_encode(unsloth_lua_ctx(L), tok, text, len, special, (int32_t **)ids, &count));
    ulua_push_ids(L, *ids, count);
    return 1;
}

/* The array of texts at idx; pushes the buffers that hold their places. Texts stay where they are as long as the array
 * holds them. */
static const char **check_texts(lua_State *L, int idx, const char *what, size_t **lens, size_t *count) {
    luaL_checktype(L, idx, LUA_TTABLE);
    *count = (size_t)luaL_len(L, idx);
    const char **texts = ulua_buffer(L, (*count + 1) * sizeof *texts);
    *lens = ulua_buffer(L, (*count + 1) * sizeof **lens);
    for (size_t i = 0; i < *count; i++) {
        if (lua_rawgeti(L, idx, (lua_Integer)i + 1) != LUA_TSTRING)
            ulua_fail(L, USL_ERR_INVALID, "%s: entry %I of the array is a %s; texts are wanted", what,
                      (LUAI_UACINT)i + 1, luaL_typename(L, -1));
        texts[i] = lua_tolstring(L, -1, *lens + i);
        lua_pop(L, 1);
    }
    return texts;
}

/* add_tokens(texts, special) -> how many are new */
static int tokenizer_extend(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    size_t *lens, count, added;
    bool special = lua_toboolean(L, 3);
    const char **texts = check_texts(L, 2, "add_tokens", &lens, &count);
    ULUA_TRY(L, usl_tokenizer_add_tokens(unsloth_lua_ctx(L), tok, texts, lens, count, special, &added));
    lua_pushinteger(L, (lua_Integer)added);
    return 1;
}

/* encode_batch(texts, opts) -> an array of arrays */
static int tokenizer_encode_batch(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    size_t *lens, count;
    check_options(L, 3, "encode_batch", "add_special_tokens");
    bool special = ulua_flag(L, 3, "add_special_tokens", true);
    const char **texts = check_texts(L, 2, "encode_batch", &lens, &count);
    void **ids = ulua_adopt(L), **offsets = ulua_adopt(L);
    ULUA_TRY(L, usl_tokenizer_encode_batch(unsloth_lua_ctx(L), tok, texts, lens, count, special, (int32_t **)ids,
                                           (size_t **)offsets));
    lua_createtable(L, count < INT_MAX ? (int)count : 0, 0);
    for (size_t i = 0; i < count; i++) {
        const size_t *at = *offsets;
        ulua_push_ids(L, (const int32_t *)*ids + at[i], at[i + 1] - at[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

/* tokenizer(text, opts): the method encode_plus, which is in Lua. */
static int tokenizer_call(lua_State *L) {
    lua_getfield(L, 1, "encode_plus");
    lua_insert(L, 1);
    lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
    return lua_gettop(L);
}

static int tokenizer_decode(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    check_options(L, 3, "decode", "skip_special_tokens");
    bool skip = ulua_flag(L, 3, "skip_special_tokens", false);
    size_t count, len;
    int32_t *ids;
    if (lua_type(L, 2) == LUA_TNUMBER) { /* one id, as in transformers */
        lua_createtable(L, 1, 0);
        lua_pushvalue(L, 2);
        lua_rawseti(L, -2, 1);
        lua_replace(L, 2);
    }
    ids = ulua_ids(L, 2, &count);
    void **text = ulua_adopt(L);
    ULUA_TRY(L, usl_tokenizer_decode(unsloth_lua_ctx(L), tok, ids, count, skip, (char **)text, &len));
    lua_pushlstring(L, *text, len);
    return 1;
}

/* token_to_id(spelling) -> id or nil */
static int tokenizer_token_to_id(lua_State *L) {
    size_t len;
    const usl_tokenizer *tok = check_tokenizer(L, 1);
    const char *token = luaL_checklstring(L, 2, &len);
    int32_t id = usl_tokenizer_id(tok, token, len);
    if (id < 0) return 0;
    lua_pushinteger(L, id);
    return 1;
}

/* id_to_token(id) -> spelling or nil */
static int tokenizer_id_to_token(lua_State *L) {
    const usl_tokenizer *tok = check_tokenizer(L, 1);
    int64_t id = ulua_integer(L, 2, "id_to_token: the id");
    size_t len = 0;
    const char *token = id >= 0 && id <= INT32_MAX ? usl_tokenizer_token(tok, (int32_t)id, &len) : NULL;
    if (!token) return 0;
    lua_pushlstring(L, token, len);
    return 1;
}

/* text_stream(ids before, skip_special_tokens) -> an object whose push(id) gives the text that is certain by then and
 * whose finish() gives the rest */
static int tokenizer_text_stream(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    bool skip = lua_toboolean(L, 3);
    size_t count;
    const int32_t *before = ulua_ids(L, 2, &count);
    ulua_handle *h = ulua_new(L, &ulua_text_stream);
    ULUA_TRY(L, usl_text_stream_new(unsloth_lua_ctx(L), tok, before, count, skip, (usl_text_stream **)&h->ptr));
    return 1;
}

static int stream_push(lua_State *L) {
    usl_text_stream *s = ulua_ptr(L, 1, &ulua_text_stream);
    int64_t id = ulua_integer(L, 2, "push: the id");
    const char *piece;
    size_t len;
    if (id < INT32_MIN || id > INT32_MAX) return ulua_fail(L, USL_ERR_INVALID, "push: there is no such token id");
    ULUA_TRY(L, usl_text_stream_push(s, (int32_t)id, &piece, &len));
    lua_pushlstring(L, piece, len);
    return 1;
}

static int stream_finish(lua_State *L) {
    usl_text_stream *s = ulua_ptr(L, 1, &ulua_text_stream);
    const char *piece;
    size_t len;
    ULUA_TRY(L, usl_text_stream_end(s, &piece, &len));
    lua_pushlstring(L, piece, len);
    return 1;
}

static int tokenizer_save(lua_State *L) {
    const usl_tokenizer *tok = check_tokenizer(L, 1);
    const char *dir = luaL_checkstring(L, 2);
    ULUA_TRY(L, usl_tokenizer_save(unsloth_lua_ctx(L), tok, dir));
    return 0;
}

/* render_chat(messages, options): JSON text in, the conversation's text out */
static int tokenizer_render_chat(lua_State *L) {
    static const ulua_option LIST[] = {
        { "add_generation_prompt", ULUA_BOOL, offsetof(usl_chat_opts, add_generation_prompt) },
        { "continue_final_message", ULUA_BOOL, offsetof(usl_chat_opts, continue_final_message) },
        { "tools", ULUA_STRING, offsetof(usl_chat_opts, tools) },
        { "documents", ULUA_STRING, offsetof(usl_chat_opts, documents) },
        { "chat_template", ULUA_STRING, offsetof(usl_chat_opts, chat_template) },
        { "variables", ULUA_STRING, offsetof(usl_chat_opts, variables) },
    };
    const usl_tokenizer *tok = check_tokenizer(L, 1);
    const char *messages = luaL_checkstring(L, 2);
    usl_chat_opts opts = USL_CHAT_OPTS_INIT;
    size_t len;
    ulua_options(L, 3, "render_chat", LIST, sizeof LIST / sizeof *LIST, NULL, &opts);
    void **text = ulua_adopt(L);
    ULUA_TRY(L, usl_tokenizer_apply_chat_template(unsloth_lua_ctx(L), tok, messages, &opts, (char **)text, &len, NULL,
                                                  NULL));
    lua_pushlstring(L, *text, len);
    return 1;
}

/* chat_template_render(template, variables as JSON text) -> text */
static int chat_template_render(lua_State *L) {
    size_t source_len, len;
    const char *source = luaL_checklstring(L, 1, &source_len), *variables = luaL_optstring(L, 2, NULL);
    void **text = ulua_adopt(L);
    ULUA_TRY(L, usl_chat_template_render(unsloth_lua_ctx(L), source, source_len, variables, (char **)text, &len));
    lua_pushlstring(L, *text, len);
    return 1;
}

static int tokenizer_set_chat_template(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    ULUA_TRY(L, usl_tokenizer_set_chat_template(unsloth_lua_ctx(L), tok, luaL_checkstring(L, 2)));
    return 0;
}

/* set_special("eos", id) */
static int tokenizer_set_special(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    const char *which = luaL_checkstring(L, 2);
    int64_t id = ulua_integer(L, 3, "set_special: the id");
    if (id < 0 || id > INT32_MAX) return ulua_fail(L, USL_ERR_INVALID, "set_special: there is no such token id");
    ULUA_TRY(L, usl_tokenizer_set_special(unsloth_lua_ctx(L), tok, which, (int32_t)id));
    return 0;
}

/* rename(id, spelling) */
static int tokenizer_rename(lua_State *L) {
    usl_tokenizer *tok = check_tokenizer(L, 1);
    int64_t id = ulua_integer(L, 2, "rename: the id");
    size_t len;
    const char *text = luaL_checklstring(L, 3, &len);
    if (id < 0 || id > INT32_MAX) return ulua_fail(L, USL_ERR_INVALID, "rename: there is no such token id");
    ULUA_TRY(L, usl_tokenizer_rename(unsloth_lua_ctx(L), tok, (int32_t)id, text, len));
    return 0;
}

static int tokenizer_len(lua_State *L) {
    lua_pushinteger(L, usl_tokenizer_vocab_size(check_tokenizer(L, 1)));
    return 1;
}

/* bos_token, bos_token_id and the like; vocab_size; chat_template. */
static bool tokenizer_get(lua_State *L, void *ptr, const char *key) {
    const usl_tokenizer *tok = ptr;
    static const char *const KINDS[] = { "bos", "eos", "pad", "unk" };
    if (!key) return false;
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        if (strncmp(key, KINDS[i], 3) != 0) continue;
        int32_t id = usl_tokenizer_special(tok, KINDS[i]);
        if (id < 0) return false;
        if (strcmp(key + 3, "_token_id") == 0) {
            lua_pushinteger(L, id);
            return true;
        }
        size_t len;
        const char *token = strcmp(key + 3, "_token") == 0 ? usl_tokenizer_token(tok, id, &len) : NULL;
        if (!token) return false;
        lua_pushlstring(L, token, len);
        return true;
    }
    if (strcmp(key, "vocab_size") == 0) {
        lua_pushinteger(L, usl_tokenizer_vocab_size(tok));
        return true;
    }
    const char *template = strcmp(key, "chat_template") == 0 ? usl_tokenizer_chat_template(tok) : NULL;
    if (template) lua_pushstring(L, template);
    return template != NULL;
}

static const luaL_Reg METHODS[] = { { "encode", tokenizer_encode },
                                    { "encode_batch", tokenizer_encode_batch },
                                    { "decode", tokenizer_decode },
                                    { "token_to_id", tokenizer_token_to_id },
                                    { "id_to_token", tokenizer_id_to_token },
                                    { "save_pretrained", tokenizer_save },
                                    { "text_stream", tokenizer_text_stream },
                                    { "render_chat", tokenizer_render_chat },
                                    { "set_chat_template", tokenizer_set_chat_template },
                                    { "set_special", tokenizer_set_special },
                                    { "rename", tokenizer_rename },
                                    { "extend", tokenizer_extend },
                                    { NULL, NULL } };
static const luaL_Reg META[] = { { "__len", tokenizer_len }, { "__call", tokenizer_call }, { NULL, NULL } };
const ulua_class ulua_tokenizer = { "unsloth.Tokenizer", release_tokenizer, METHODS, META, tokenizer_get };

static const luaL_Reg STREAM_METHODS[] = { { "push", stream_push }, { "finish", stream_finish }, { NULL, NULL } };
const ulua_class ulua_text_stream = { "unsloth.TextStream", release_stream, STREAM_METHODS, NULL, NULL };

void ulua_tokenizer_open(lua_State *L) {
    ulua_define(L, &ulua_text_stream);
    lua_pop(L, 1);
    ulua_define(L, &ulua_tokenizer);
    lua_setfield(L, -2, "Tokenizer");
    lua_pushcfunction(L, tokenizer_open);
    lua_setfield(L, -2, "tokenizer_open");
    lua_pushcfunction(L, chat_template_render);
    lua_setfield(L, -2, "chat_template_render");
}
