/* Tokenizers against Hugging Face's `tokenizers` and llama.cpp. */
#include "core/base/file.h"
#include "core/io/json.h"
#include "core/text/tokenizer.h"
#include "tests/test.h"

static const char *shared(void) {
    const char *dir = getenv("USL_SHARED");
    return dir ? dir : "../shared";
}

/* ---- Case files
 * ----------------------------------------------------------------------------------------------------------- */

static bool same_ids(const json_t *want, const int32_t *ids, size_t count) {
    if (json_array_size(want) != count) return false;
    for (size_t i = 0; i < count; i++)
        if (json_integer_value(json_array_get(want, i)) != ids[i]) return false;
    return true;
}

static void check_encode(usl_ctx *ctx, const usli_tokenizer *tok, const char *what, size_t line, const json_t *text,
                         const json_t *want, unsigned flags) {
    int32_t *ids;
    size_t count;
    usl_status st =
        usli_tokenizer_encode(ctx, tok, json_string_value(text), json_string_length(text), flags, &ids, &count);
    CHECK(st == USL_OK, "%s: line %zu: %s", what, line, usl_ctx_errmsg(ctx));
    if (st != USL_OK) return;
    CHECK(same_ids(want, ids, count), "%s: line %zu: %zu ids, want %zu: \"%.60s\"", what, line, count,
          json_array_size(want), json_string_value(text));
    usli_free(ctx, ids);
}

static void check_decode(usl_ctx *ctx, const usli_tokenizer *tok, const char *what, size_t line, const json_t *array,
                         const json_t *want) {
    size_t count = json_array_size(array), len;
    int32_t *ids = malloc((count + 1) * sizeof *ids);
    char *text;
    for (size_t i = 0; i < count; i++) ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
    usl_status st = usli_tokenizer_decode(ctx, tok, ids, count, false, &text, &len);
    CHECK(st == USL_OK, "%s: line %zu: %s", what, line, usl_ctx_errmsg(ctx));
    if (st == USL_OK) {
        CHECK(len == json_string_length(want) && memcmp(text, json_string_value(want), len) == 0,
              "%s: line %zu: decoded \"%.60s\"", what, line, text);
        usli_free(ctx, text);
    }
    free(ids);
}

/* One JSON object a line: text, ids, and where they are there ids_special and decoded. */
static void check_cases(usl_ctx *ctx, const usli_tokenizer *tok, const char *path) {
    char *file;
    size_t size, line = 0;
    usl_status st = usli_read_file(ctx, path, &file, &size);
    CHECK(st == USL_OK, "%s", usl_ctx_errmsg(ctx));
    if (st != USL_OK) return;
    for (char *p = file, *end; p < file + size; p = end + 1) {
        end = memchr(p, '\n', (size_t)(file + size - p));
        if (!end) end = file + size;
        if (end == p) continue;
        json_t *row = NULL;
        line++;
        CHECK_OK(ctx, usli_json_parse(ctx, path, p, (size_t)(end - p), &row));
        const json_t *text = json_object_get(row, "text"), *ids = json_object_get(row, "ids");
        const json_t *special = json_object_get(row, "ids_special"), *decoded = json_object_get(row, "decoded");
        check_encode(ctx, tok, path, line, text, ids, 0);
        if (special) check_encode(ctx, tok, path, line, text, special, USLI_ENCODE_SPECIAL);
        if (decoded) check_decode(ctx, tok, path, line, ids, decoded);
        json_decref(row);
    }
    printf("%s: %zu lines\n", path, line);
    usli_free(ctx, file);
}

/* ---- Folders beside the repository: compressed files are unpacked into a folder of our own
 * ------------------------------ */

static char scratch[] = "/tmp/usl-text-XXXXXX";

/* Copies or unpacks the first of name and name.gz that is there. */
static bool fetch(const char *from, const char *to) {
    char command[2048];
    if (usli_is_file(from))
        snprintf(command, sizeof command, "cp '%s' '%s'", from, to);
    else
        snprintf(command, sizeof command, "gzip -dc '%s.gz' > '%s' 2>/dev/null", from, to);
    return system(command) == 0;
}

static void test_shared_tokenizer(usl_ctx *ctx, const char *name) {
    static const char *const FILES[] = { "tokenizer.json", "tokenizer_config.json" };
    char from[600], to[600], cases[600];
    snprintf(cases, sizeof cases, "%s/data/tokenizers/%s/cases.jsonl", shared(), name);
    if (!usli_is_file(cases)) {
        SKIP("%s is not there", cases);
        return;
    }
    for (int i = 0; i < 2; i++) {
        snprintf(from, sizeof from, "%s/data/tokenizers/%s/%s", shared(), name, FILES[i]);
        snprintf(to, sizeof to, "%s/%s", scratch, FILES[i]);
        CHECK(fetch(from, to), "%s cannot be read", from);
    }
    usli_tokenizer *tok;
    CHECK_OK(ctx, usli_tokenizer_load(ctx, scratch, &tok));
    if (tok) check_cases(ctx, tok, cases);
    usli_tokenizer_release(tok);
}

static void remove_scratch(void) {
    char command[100];
    snprintf(command, sizeof command, "rm -r '%s'", scratch);
    CHECK(system(command) == 0, "%s stays", scratch);
}

int main(int argc, char **argv) {
    static const char *const NAMES[] = { "stories260k", "llama2",      "mistral_v0_1", "llama3_1",
                                         "qwen3",       "deepseek_v3", "gemma3" };
    usl_ctx *ctx;
    if (usl_ctx_new(NULL, &ctx) != USL_OK || !mkdtemp(scratch)) return 1;
    if (argc == 3) {
        /* test_tokenizer TOKENIZER CASES.jsonl: by hand. */
        usli_tokenizer *tok;
        CHECK_OK(ctx, usli_tokenizer_open(ctx, argv[1], &tok));
        if (tok) check_cases(ctx, tok, argv[2]);
        usli_tokenizer_release(tok);
    } else {
        for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) test_shared_tokenizer(ctx, NAMES[i]);
    }
    remove_scratch();
    usl_ctx_free(ctx);
    return test_end("test_tokenizer");
}
