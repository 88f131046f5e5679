/* Chat templates against jinja2 and transformers. */
#include <unistd.h>

#include "core/base/file.h"
#include "core/io/json.h"
#include "core/text/chat.h"
#include "core/text/parts.h"
#include "tests/data/failing.h"
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
    const json_t *rendered = json_object_get(c, "rendered"), *tools = json_object_get(c, "tools"),
                 *vars = json_object_get(c, "vars");
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
        CHECK(st == USL_ERR_INVALID && error && strstr(usl_ctx_errmsg(ctx), error), "%s: line %zu: %s, want %s", what,
              line, st == USL_OK ? r.text : usl_ctx_errmsg(ctx), error ? error : "?");
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

/* Tokenizers' own templates: the file lies as it is, or compressed. */
static char *read_config(usl_ctx *ctx, const char *name) {
    char from[600], command[1400], to[] = "/tmp/usl-chat-XXXXXX", *text = NULL;
    size_t len;
    int file = mkstemp(to);
    if (file >= 0) close(file);
    snprintf(from, sizeof from, "%s/data/tokenizers/%s/tokenizer_config.json", shared(), name);
    snprintf(command, sizeof command, usli_is_file(from) ? "cat '%s' > '%s'" : "gzip -dc '%s.gz' > '%s'", from, to);
    CHECK(file >= 0 && system(command) == 0, "%s cannot be read", from);
    CHECK_OK(ctx, usli_read_file(ctx, to, &text, &len));
    remove(to);
    return text;
}

static void test_tokenizers(usl_ctx *ctx) {
    static const char *const NAMES[] = { "deepseek_v3", "gemma3", "llama3_1", "qwen3" };
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        char path[600];
        json_t *config = NULL;
        snprintf(path, sizeof path, "%s/data/tokenizers/%s/chat_cases.jsonl", shared(), NAMES[i]);
        if (!usli_is_file(path)) {
            SKIP("%s is not there", path);
            continue;
        }
        char *text = read_config(ctx, NAMES[i]);
        CHECK_OK(ctx, usli_json_parse(ctx, NAMES[i], text, strlen(text), &config));
        size_t count = check_cases(ctx, NAMES[i], json_string_value(json_object_get(config, "chat_template")), path);
        printf("%s: %zu cases\n", NAMES[i], count);
        json_decref(config);
        usli_free(ctx, text);
    }
}

/* ---- The language: jinja_cases.jsonl, made by make_jinja_cases.py ---- */

static void check_row(usl_ctx *ctx, const json_t *row, const char *vars) {
    const char *source = json_string_value(json_object_get(row, "template")),
               *error = json_string_value(json_object_get(row, "error"));
    const json_t *rendered = json_object_get(row, "rendered");
    const char *want = json_string_value(rendered);
    usli_jinja_result r;
    usl_status st = usli_chat_render(ctx, source, strlen(source), vars, &r);
    if (want)
        CHECK(st == USL_OK && r.len == json_string_length(rendered) && memcmp(r.text, want, r.len) == 0,
              "%s\n  gives %s, want %s", source, st == USL_OK ? r.text : usl_ctx_errmsg(ctx), want);
    else if (strcmp(error, "raise") == 0)
        CHECK(st == USL_ERR_INVALID && strstr(usl_ctx_errmsg(ctx), json_string_value(json_object_get(row, "text"))),
              "%s\n  gives %s", source, st == USL_OK ? r.text : usl_ctx_errmsg(ctx));
    else
        CHECK(st == USL_ERR_FORMAT, "%s\n  gives %s, want an error: %s", source,
              st == USL_OK ? r.text : usl_ctx_errmsg(ctx), error);
    usli_jinja_result_free(ctx, &r);
}

static void test_language(usl_ctx *ctx) {
    static const char PATH[] = "tests/text/jinja_cases.jsonl";
    char *text, *vars = NULL;
    size_t len, count = 0;
    CHECK_OK(ctx, usli_read_file(ctx, PATH, &text, &len));
    for (char *p = text, *end; p < text + len; p = end + 1) {
        json_t *row = NULL;
        end = memchr(p, '\n', (size_t)(text + len - p));
        CHECK_OK(ctx, usli_json_parse(ctx, PATH, p, (size_t)(end - p), &row));
        if (!vars) {
            CHECK_OK(ctx, usli_json_dump(ctx, json_object_get(row, "vars"), 0, &vars, NULL));
        } else {
            check_row(ctx, row, vars);
            count++;
        }
        json_decref(row);
    }
    printf("language: %zu templates\n", count);
    usli_free(ctx, vars);
    usli_free(ctx, text);
}

/* ---- Templates that mean harm ---- */

static void check_refused(usl_ctx *ctx, const char *what, const char *source, size_t len) {
    usli_jinja_result r;
    usl_status st = usli_chat_render(ctx, source, len, "{\"l\": [1, 2, 3], \"s\": \"text\"}", &r);
    CHECK(st == USL_ERR_FORMAT && usl_ctx_errmsg(ctx)[0], "%s: %s, %zu bytes", what, usl_status_name(st), r.len);
    usli_jinja_result_free(ctx, &r);
}

/* n times what, then the middle, then n times the end. */
static void check_nested(usl_ctx *ctx, const char *what, const char *middle, const char *end) {
    enum { TIMES = 200000 };
    size_t a = strlen(what), m = strlen(middle), e = strlen(end), len = 0;
    char *text = malloc((a + e) * TIMES + m + 1);
    for (int i = 0; i < TIMES; i++, len += a) memcpy(text + len, what, a);
    memcpy(text + len, middle, m);
    len += m;
    for (int i = 0; i < TIMES; i++, len += e) memcpy(text + len, end, e);
    check_refused(ctx, what, text, len);
    free(text);
}

static void test_hostile(usl_ctx *ctx) {
    static const char *const SOURCES[] = {
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% "
        "endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'xxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
        "{{ range(9999999999) | list }}",
        "{{ range(0, 9999999999999999, 1) }}",
        "{{ 'x' * 9999999999999 }}",
        "{{ ('x' * 99999) * 99999 }}",
        "{{ [1] * 99999999999 }}",
        "{{ ([1] * 99999) * 99999 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 99999999999999999999999999999 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | "
        "tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == "
        "[ns.x] + l }}{{ ns.x | string }}",
        "{% set ns = namespace() %}{% set ns.me = [ns] %}{{ ns.me | tojson }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(a) %}{{ m(a ~ a) }}{% endmacro %}{{ m('x') }}",
        "{% for i in l recursive %}{{ loop(l) }}{% endfor %}",
        "{{ '%999999999d' % 1 }}{{ '%.999999999f' % 1.0 }}",
        "{{ s | center(9999999999) }}",
        "{{ s.ljust(9999999999) }}",
        "{{ s | indent(9999999999, true) }}",
        "{{ [1] | batch(9999999999, 0) | list }}",
        "{{ l | slice(9999999999) | list }}",
        "{{ [[1]] | tojson(indent=9999999999) }}",
        "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
        "{{ (('a' * 100000) | list) | join('b' * 100000) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ strftime_now('%Y' * 999999999) }}",
    };
    for (size_t i = 0; i < sizeof SOURCES / sizeof *SOURCES; i++)
        check_refused(ctx, SOURCES[i], SOURCES[i], strlen(SOURCES[i]));
    check_nested(ctx, "{% if l %}", "x", "{% endif %}");
    check_nested(ctx, "{% for i in l %}", "x", "{% endfor %}");
    check_nested(ctx, "{% macro m() %}", "x", "{% endmacro %}");
    check_nested(ctx, "{% filter upper %}", "x", "{% endfilter %}");
    check_nested(ctx, "{{ ", "1", " }}");
    check_refused(ctx, "nothing but a beginning", "{{", 2);
    static const struct {
        const char *head, *what, *tail;
    } DEEP[] = { { "{{ ", "(", "" },
                 { "{{ ", "[", "" },
                 { "{{ ", "{1:", "" },
                 { "{{ ", "not ", "x }}" },
                 { "{{ ", "-", "1 }}" },
                 { "{{ 1", "|abs", " }}" },
                 { "{{ l", "[0]", " }}" },
                 { "{{ s", ".x", " }}" },
                 { "{{ 1", "**1", " }}" },
                 { "{{ s", "()", " }}" },
                 { "{{ 1", " if 1 else 1", " }}" } };
    for (size_t i = 0; i < sizeof DEEP / sizeof *DEEP; i++) {
        size_t h = strlen(DEEP[i].head), w = strlen(DEEP[i].what), t = strlen(DEEP[i].tail), len = h;
        char *text = malloc(h + 100000 * w + t);
        memcpy(text, DEEP[i].head, h);
        for (int k = 0; k < 100000; k++, len += w) memcpy(text + len, DEEP[i].what, w);
        memcpy(text + len, DEEP[i].tail, t);
        check_refused(ctx, DEEP[i].what, text, len + t);
        free(text);
    }
}

/* ---- What surrounds the template ---- */

static const char MESSAGES[] =
    "[{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Yo \"}]";
static const char CHAT[] =
    "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ tools | tojson }}{{ x }}";

static void test_apply(usl_ctx *ctx) {
    usli_tokenizer *tok;
    usli_jinja_result r;
    usl_chat_opts o = USL_CHAT_OPTS_INIT;
    char dir[] = "/tmp/usl-chat-XXXXXX", path[100];
    CHECK(mkdtemp(dir) != NULL, "no folder");
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    static const char JSON[] =
        "{\"added_tokens\": [], \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": []}}";
    CHECK_OK(ctx, usli_write_file(ctx, path, JSON, strlen(JSON)));
    CHECK_OK(ctx, usli_tokenizer_load(ctx, dir, &tok));
    CHECK(usli_chat_apply(ctx, tok, MESSAGES, NULL, &r) == USL_ERR_INVALID &&
              strstr(usl_ctx_errmsg(ctx), "no chat template"),
          "%s", usl_ctx_errmsg(ctx));
    CHECK_OK(ctx, usli_tokenizer_set_chat_template(ctx, tok, CHAT));
    o.add_generation_prompt = 1;
    o.tools = "[1]";
    o.variables = "{\"x\": \"!\"}";
    CHECK_OK(ctx, usli_chat_apply(ctx, tok, MESSAGES, &o, &r));
    CHECK(strcmp(r.text, "<user>Hi|<assistant>Yo |<assistant>[1]!") == 0, "%s", r.text);
    CHECK(r.span_count == 2 && r.spans[0].begin == 6 && r.spans[0].end == 8 && r.spans[1].begin == 20 &&
              r.spans[1].end == 23,
          "%zu spans", r.span_count);
    usli_jinja_result_free(ctx, &r);
    o.continue_final_message = 1;
    CHECK(usli_chat_apply(ctx, tok, MESSAGES, &o, &r) == USL_ERR_INVALID, "both are wanted");
    o.add_generation_prompt = 0;
    CHECK_OK(ctx, usli_chat_apply(ctx, tok, MESSAGES, &o, &r));
    CHECK(strcmp(r.text, "<user>Hi|<assistant>Yo ") == 0, "%s", r.text);
    usli_jinja_result_free(ctx, &r);
    CHECK(usli_chat_apply(ctx, tok, "{}", NULL, &r) == USL_ERR_INVALID, "messages that are no array");
    CHECK(usli_chat_apply(ctx, tok, "[1]", NULL, &r) == USL_ERR_INVALID, "a message that is no object");
    CHECK(usli_chat_apply(ctx, tok, "[", NULL, &r) != USL_OK, "no JSON");
    usli_tokenizer_release(tok);
    CHECK_OK(ctx, usli_remove_file(ctx, path));
    remove(dir);
}

static usl_status small_run(usl_ctx *ctx) {
    static const char SOURCE[] = "{% macro m(a) %}{{ a | upper }}{{ caller() }}{% endmacro %}{% set ns = "
                                 "namespace(n=0) %}{% for i in range(40) %}"
                                 "{% set ns.n = ns.n + i %}{% call m('x' ~ i) %}{% generation %}{{ d | "
                                 "tojson(indent=2) }}{% endgeneration %}{% endcall %}{% endfor %}"
                                 "{{ ('a' * 50000) | length }}{{ d.items() | list | sort | join(', ') }}{{ ns.n }}";
    usli_jinja_result r;
    USLI_TRY(usli_chat_render(ctx, SOURCE, strlen(SOURCE), "{\"d\": {\"a\": [1, 2.5, null], \"b\": \"\\u00fc\"}}", &r));
    usli_jinja_result_free(ctx, &r);
    return USL_OK;
}

static usl_status small_apply(usl_ctx *ctx) {
    usli_tokenizer *tok;
    usli_jinja_result r;
    usl_chat_opts o = USL_CHAT_OPTS_INIT;
    o.continue_final_message = 1;
    USLI_TRY(usli_tokenizer_new(ctx, &tok));
    usl_status st;
    USLI_TRYGO(usli_tokenizer_set_chat_template(ctx, tok, CHAT));
    USLI_TRYGO(usli_tokenizer_add_template(tok, "tool_use", 8, CHAT, strlen(CHAT)));
    USLI_TRYGO(
        usli_chat_apply(ctx, tok, "[{\"role\": \"assistant\", \"content\": \"Yo\", \"thinking\": \"hm\"}]", &o, &r));
    usli_jinja_result_free(ctx, &r);
done:
    usli_tokenizer_release(tok);
    return st;
}

static const char SMALL[] =
    "{\"added_tokens\": [{\"id\": 1, \"content\": \"</s>\", \"special\": true}, {\"id\": 2, \"content\": \"x\"}], "
    "\"normalizer\": {\"type\": \"Lowercase\"}, "
    "\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"</s>\": 1, \"x\": 2}, \"merges\": []}}";
static char small_dir[] = "/tmp/usl-chat-XXXXXX";

static usl_status small_rename(usl_ctx *ctx) {
    usli_tokenizer *tok;
    char to[100];
    snprintf(to, sizeof to, "%s/saved", small_dir);
    USLI_TRY(usli_tokenizer_load(ctx, small_dir, &tok));
    usl_status st;
    USLI_TRYGO(usli_tokenizer_rename(ctx, tok, 1, "<|im_end|>", 10));
    CHECK(usli_tokenizer_id(tok, "<|im_end|>", 10) == 1 && usli_tokenizer_id(tok, "</s>", 4) == -1, "renamed");
    USLI_TRYGO(usli_tokenizer_save(ctx, tok, to));
done:
    usli_tokenizer_release(tok);
    return st;
}

static void test_rename(usl_ctx *ctx) {
    char path[100];
    CHECK(mkdtemp(small_dir) != NULL, "no folder");
    snprintf(path, sizeof path, "%s/tokenizer.json", small_dir);
    CHECK_OK(ctx, usli_write_file(ctx, path, SMALL, strlen(SMALL)));
    snprintf(path, sizeof path, "%s/tokenizer_config.json", small_dir);
    CHECK_OK(ctx, usli_write_file(ctx, path, "{\"eos_token\": \"</s>\"}", 21));
    test_failing("another spelling", small_rename);
    static const char *const FILES[] = { "tokenizer.json", "tokenizer_config.json", "saved/tokenizer.json",
                                         "saved/tokenizer_config.json" };
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", small_dir, FILES[i]);
        remove(path);
    }
    snprintf(path, sizeof path, "%s/saved", small_dir);
    remove(path);
    remove(small_dir);
}

int main(void) {
    usl_ctx *ctx;
    if (usl_ctx_new(NULL, &ctx) != USL_OK) return 1;
    test_published(ctx);
    test_tokenizers(ctx);
    test_language(ctx);
    test_hostile(ctx);
    test_apply(ctx);
    test_rename(ctx);
    usl_ctx_free(ctx);
    test_failing("a template", small_run);
    test_failing("apply_chat_template", small_apply);
    return test_end("test_chat");
}
