/* Chat templates against jinja2 and transformers. */
#include "core/base/file.h"
#include "core/io/json.h"
#include "core/text/jinja.h"
#include "tests/test.h"

static const char *shared(void) {
    const char *dir = getenv("USL_SHARED");
    return dir ? dir : "../shared";
}

/* ---- Templates as they are published, with what transformers makes of them ---- */

static void add_json(usl_ctx *ctx, usli_jinja_var *v, const char *name, const json_t *value) {
    char *text;
    CHECK_OK(ctx, usli_json_dump(ctx, value, 0, &text, &v->len));
    v->text = text;
    v->name = name;
    v->kind = USLI_JINJA_JSON;
}

static void check_case(usl_ctx *ctx, const char *what, size_t line, const char *source, const json_t *c) {
    const json_t *rendered = json_object_get(c, "rendered"), *tools = json_object_get(c, "tools"), *vars = json_object_get(c, "vars");
    usli_jinja_var v[4];
    usli_jinja_result r;
    json_t *null = json_null();
    add_json(ctx, &v[0], "messages", json_object_get(c, "messages"));
    add_json(ctx, &v[1], "add_generation_prompt", json_object_get(c, "add_generation_prompt"));
    add_json(ctx, &v[2], "tools", tools ? tools : null);
    add_json(ctx, &v[3], "vars", vars);
    v[3].kind = USLI_JINJA_FIELDS;
    usl_status st = usli_jinja_render(ctx, "chat template", source, strlen(source), v, 4, &r);
    if (json_is_string(rendered)) {
        size_t want = json_string_length(rendered);
        CHECK(st == USL_OK && r.len == want && memcmp(r.text, json_string_value(rendered), want) == 0,
              "%s: line %zu: %s\n--- got\n%s\n--- want\n%s", what, line, st == USL_OK ? "" : usl_ctx_errmsg(ctx),
              st == USL_OK ? r.text : "", json_string_value(rendered));
    } else {
        const char *error = json_string_value(json_object_get(c, "error"));
        CHECK(st == USL_ERR_INVALID && error && strstr(usl_ctx_errmsg(ctx), error), "%s: line %zu: %s, want %s", what, line,
              st == USL_OK ? r.text : usl_ctx_errmsg(ctx), error ? error : "?");
    }
    usli_jinja_result_free(ctx, &r);
    for (int i = 0; i < 4; i++) usli_free(ctx, (void *)(uintptr_t)v[i].text);
}

static size_t check_cases(usl_ctx *ctx, const char *what, const char *source, const char *path) {
    char *text;
    size_t len, line = 0;
    CHECK_OK(ctx, usli_read_file(ctx, path, &text, &len));
    for (const char *p = text, *end = text + len; p < end;) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        json_t *c;
        if (!stop) stop = end;
        line++;
        CHECK_OK(ctx, usli_json_parse(ctx, path, p, (size_t)(stop - p), &c));
        check_case(ctx, what, line, source, c);
        json_decref(c);
        p = stop + 1;
    }
    usli_free(ctx, text);
    return line;
}

static void test_published(usl_ctx *ctx) {
    static const char *const NAMES[] = { "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
                                         "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
                                         "Qwen-Qwen2.5-7B-Instruct",
                                         "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
                                         "google-gemma-2-2b-it",
                                         "llama-cpp-deepseek-r1",
                                         "meetkai-functionary-medium-v3.1",
                                         "meetkai-functionary-medium-v3.2",
                                         "meta-llama-Llama-3.1-8B-Instruct",
                                         "meta-llama-Llama-3.2-3B-Instruct",
                                         "microsoft-Phi-3.5-mini-instruct",
                                         "mistralai-Mistral-Nemo-Instruct-2407" };
    size_t total = 0;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        char path[600];
        char *source;
        size_t len;
        snprintf(path, sizeof path, "%s/data/chat_templates/%s/template.jinja", shared(), NAMES[i]);
        if (!usli_is_file(path)) {
            SKIP("%s is not there", path);
            continue;
        }
        CHECK_OK(ctx, usli_read_file(ctx, path, &source, &len));
        snprintf(path, sizeof path, "%s/data/chat_templates/%s/chat_cases.jsonl", shared(), NAMES[i]);
        total += check_cases(ctx, NAMES[i], source, path);
        usli_free(ctx, source);
    }
    printf("published templates: %zu cases\n", total);
}

int main(void) {
    usl_ctx *ctx;
    if (usl_ctx_new(NULL, &ctx) != USL_OK) return 1;
    test_published(ctx);
    usl_ctx_free(ctx);
    return test_end("test_chat");
}
