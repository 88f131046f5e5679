/* Data sets: files, formats, errors that name the place. */
#include <unistd.h>

#include "core/base/file.h"
#include "core/data/formats.h"
#include "core/io/json.h"
#include "tests/data/failing.h"

static char dir[] = "/tmp/usl-dataset-XXXXXX", path[64];

static usl_status load(usl_ctx *ctx, const char *kind, const char *text, size_t len, usli_dataset **out) {
    CHECK_OK(ctx, usli_write_file(ctx, path, text, len));
    const char *paths[] = { path };
    return usl_dataset_load(ctx, kind, paths, 1, out);
}

/* The row as Python's json.dumps writes it. */
static void check_row(usl_ctx *ctx, const usli_dataset *ds, int64_t i, const char *want) {
    char *text;
    if (i >= usli_dataset_rows(ds)) {
        CHECK(0, "there is no row %lld, wanted %s", (long long)i, want);
        return;
    }
    CHECK_OK(ctx, usli_json_dump(ctx, usli_dataset_row(ds, i), 0, &text, NULL));
    CHECK(strcmp(text, want) == 0, "row %lld is %s, not %s", (long long)i, text, want);
    usli_free(ctx, text);
}

/* ---- Reading
 * ------------------------------------------------------------------------------------------------------------ */

typedef struct good {
    const char *kind, *text;
    int64_t rows;
    const char *last, *where; /* of the last row */
} good;

static const good GOOD[] = {
    { "json", "[{\"a\": 1}, {\"a\": 2}]", 2, "{\"a\": 2}", "row 2" },
    { "json", "\xEF\xBB\xBF \r\n[\r\n{\"b\": null, \"a\": [1.5, true]}\r\n]\r\n\r\n", 1,
      "{\"b\": null, \"a\": [1.5, true]}", "row 1" },
    { "json", "{\"a\": 1}\n\n  \r\n{\"a\": 2}\r\n{\"a\": 3}", 3, "{\"a\": 3}", "line 5" },
    { "json", "\xEF\xBB\xBF\n{\"a\": 1}\n", 1, "{\"a\": 1}", "line 2" },
    { "json", "{\"version\": 1, \"data\": [{\"a\": 1}, {\"a\": 2}]}", 2, "{\"a\": 2}", "row 2" },
    { "json", "{\"data\": [\n{\"a\": 1},\n{\"a\": 2}\n]\n}\n", 2, "{\"a\": 2}", "row 2" },
    { "json", "{\n  \"a\": 1\n}\n", 1, "{\"a\": 1}", "row 1" },
    { "json", "{\"data\": [1]}\n{\"data\": [2]}", 2, "{\"data\": [2]}", "line 2" },
    { "json", "{\"a\": \"x\\u0000y\\ud83d\\ude00\\ud83d\"}", 1, "{\"a\": \"x\\u0000y\xF0\x9F\x98\x80\xEF\xBF\xBD\"}",
      "line 1" },
    { "text", "\xEF\xBB\xBFone\r\n\r\n \n  two \r\nthree", 3, "{\"text\": \"three\"}", "line 5" },
    { "text", " two \r\n", 1, "{\"text\": \" two \"}", "line 1" },
    { "csv", "a,b\r\n1,\"x, \"\"y\"\"\r\nz\"\r\n\r\n,\n", 2, "{\"a\": \"\", \"b\": \"\"}", "line 5" },
    { "csv", "\xEF\xBB\xBF\"a\",b\n1,\"x, \"\"y\"\"\nz\"", 1, "{\"a\": \"1\", \"b\": \"x, \\\"y\\\"\\nz\"}", "line 2" },
};

static void test_good(usl_ctx *ctx) {
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++) {
        const good *g = &GOOD[i];
        usli_dataset *ds;
        usl_status st = load(ctx, g->kind, g->text, strlen(g->text), &ds);
        CHECK(st == USL_OK, "case %zu: %s", i, usl_ctx_errmsg(ctx));
        if (st != USL_OK) continue;
        CHECK(usl_dataset_rows(ds) == g->rows, "case %zu: %lld rows", i, (long long)usl_dataset_rows(ds));
        check_row(ctx, ds, g->rows - 1, g->last);
        char where[200], want[200];
        snprintf(want, sizeof want, "%s: %s", path, g->where);
        usl_dataset_where(ds, g->rows - 1, where, sizeof where);
        CHECK(strcmp(where, want) == 0, "case %zu: %s, not %s", i, where, want);
        usl_dataset_free(ds);
    }
}

typedef struct bad {
    const char *kind, *text, *where, *says;
} bad;

static const bad BAD[] = {
    { "json", "", "", "no rows" },
    { "json", " \r\n\t", "", "no rows" },
    { "json", "\xEF\xBB\xBF", "", "no rows" },
    { "json", "[]", "", "no rows" },
    { "json", "{\"data\": []}", "", "no rows" },
    { "json", "42", "", "a number" },
    { "json", "\"text\"", "", "a string" },
    { "json", "null", "", "null" },
    { "json", "nonsense", "line 1", "" },
    { "json", "[{\"a\": 1}, \"b\"]", "row 2", "a string" },
    { "json", "[{\"a\": 1}, [1]]", "row 2", "a list" },
    { "json", "[{\"a\": 1},\n{\"a\": \"\xFF\"}]", "row 2: line 2", "UTF-8" },
    { "json", "[{\"a\": 1}", "row 2", "cut off" },
    { "json", "[{\"a\": 1}] x", "line 1", "more text" },
    { "json", "{\"data\": [{\"a\": 1}, 2]}", "row 2", "a number" },
    { "json", "{\"data\": [\n{\"a\": 1},\n{\"a\": }\n]}", "line 3", "a value is expected" },
    { "json", "{\"a\": 1}\n{\"a\": \"cut", "line 2", "cut off" },
    { "json", "{\"a\": 1}\n{\"a\": \n{\"a\": 3}\n", "line 2", "" },
    { "json", "{\"a\": 1\n{\"a\": 2}\n", "line 1", "cut off" },
    { "json", "{\"a\": 1}\n[1]\n", "line 2", "a list" },
    { "json", "{\"a\": 1}\n{\"a\": NaN}\n", "line 2", "NaN" },
    { "json", "{\"a\": 1} {\"a\": 2}\n", "line 1", "more text" },
    { "json", "\x1F\x8B\x08", "", "gunzip" },
    { "json", "PAR1....", "", "Parquet" },
    { "text", "\xFF\xFEh", "", "UTF-16" },
    { "text", "one\ntw\xC3(\n", "line 2", "UTF-8" },
    { "text", "\n \n", "", "no rows" },
    { "csv", "", "", "no rows" },
    { "csv", "a,b\n", "", "no rows" },
    { "csv", "a,b\n1,2\n\n3\n", "line 4", "1 fields" },
    { "csv", "a,b\n1,2,3\n", "line 2", "3 fields" },
    { "csv", "a,b\n1,2\n1,\"2\n3,4\n", "line 3", "no end" },
    { "csv", "a,b\n1,\"2\"x\n", "line 2", "closing quote" },
    { "csv", "a,b\n1,2\"\n", "line 2", "double quote" },
    { "csv", "a,,b\n1,2,3\n", "line 1", "no name" },
    { "csv", "a,b,a\n1,2,3\n", "line 1", "same name" },
};

static void test_bad(usl_ctx *ctx) {
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        const bad *b = &BAD[i];
        usli_dataset *ds;
        usl_status st = load(ctx, b->kind, b->text, strlen(b->text), &ds);
        const char *says = usl_ctx_errmsg(ctx);
        CHECK(st == USL_ERR_FORMAT && !ds, "case %zu was accepted: %s", i, b->text);
        CHECK(strstr(says, path) == says && strstr(says, b->where) && strstr(says, b->says), "case %zu: %s", i, says);
        usl_dataset_free(ds);
    }
    usli_dataset *ds;
    CHECK(load(ctx, "text", "a\nb\0c", 5, &ds) == USL_ERR_FORMAT && strstr(usl_ctx_errmsg(ctx), "line 2"),
          "NUL in text");
    const char *paths[] = { path, "/nonexistent/rows.json" };
    CHECK_OK(ctx, usli_write_file(ctx, path, "[{}]", 4));
    CHECK(usl_dataset_load(ctx, "json", paths, 2, &ds) == USL_ERR_NOT_FOUND && !ds, "a missing file");
    CHECK(strstr(usl_ctx_errmsg(ctx), paths[1]) != NULL, "%s", usl_ctx_errmsg(ctx));
    CHECK(usl_dataset_load(ctx, "parquet", paths, 1, &ds) == USL_ERR_INVALID && strstr(usl_ctx_errmsg(ctx), "\"csv\""),
          "kind");
    CHECK(usl_dataset_load(ctx, "json", paths, 0, &ds) == USL_ERR_INVALID, "no file");
    paths[1] = path;
    CHECK_OK(ctx, usl_dataset_load(ctx, "json", paths, 2, &ds));
    CHECK(usl_dataset_rows(ds) == 2, "two files, %lld rows", (long long)usl_dataset_rows(ds));
    usl_dataset_free(ds);
}

/* ---- The functions of unsloth.h
 * --------------------------------------------------------------------------------------------- */

static char seen[400];
static void see(const char *text, size_t len) {
    size_t n = strlen(seen);
    snprintf(seen + n, sizeof seen - n, "%.*s ", (int)len, text);
}
static int see_null(void *ud) {
    (void)ud;
    return see("null", 4), 0;
}
static int see_boolean(void *ud, int value) {
    (void)ud;
    return see(value ? "true" : "false", value ? 4 : 5), 0;
}
static int see_integer(void *ud, int64_t value) {
    char text[30];
    see(text, (size_t)snprintf(text, sizeof text, "i%lld", (long long)value));
    return ud != NULL && value == 13; /* stops where asked to */
}
static int see_real(void *ud, double value) {
    char text[30];
    (void)ud;
    return see(text, (size_t)snprintf(text, sizeof text, "r%g", value)), 0;
}
static int see_string(void *ud, const char *text, size_t len) {
    (void)ud;
    see("s", 1);
    return see(text, len), 0;
}
static int see_key(void *ud, const char *text, size_t len) {
    (void)ud;
    see("k", 1);
    return see(text, len), 0;
}
static int open_array(void *ud) {
    (void)ud;
    return see("[", 1), 0;
}
static int close_array(void *ud) {
    (void)ud;
    return see("]", 1), 0;
}
static int open_object(void *ud) {
    (void)ud;
    return see("{", 1), 0;
}
static int close_object(void *ud) {
    (void)ud;
    return see("}", 1), 0;
}

static void test_api(usl_ctx *ctx) {
    const usl_json_visitor v = { sizeof v,   see_null,    see_boolean, see_integer, see_real,    see_string,
                                 open_array, close_array, open_object, see_key,     close_object };
    static const char ROW[] = "{\"z\": [1, 2.5, true, null], \"a\": {\"s\": \"x\"}}", THIRTEEN[] = "{\"n\": 13}";
    usl_dataset *ds, *few, *all, *none;
    char where[40];
    CHECK_OK(ctx, usl_dataset_new(ctx, &ds));
    CHECK_OK(ctx, usl_dataset_append(ds, ROW, strlen(ROW)));
    CHECK_OK(ctx, usl_dataset_append(ds, THIRTEEN, strlen(THIRTEEN)));
    CHECK(usl_dataset_append(ds, "[1]", 3) == USL_ERR_FORMAT && strstr(usl_ctx_errmsg(ctx), "row 3"), "%s",
          usl_ctx_errmsg(ctx));
    CHECK(usl_dataset_append(ds, "{", 1) == USL_ERR_FORMAT && strstr(usl_ctx_errmsg(ctx), "row 3"), "%s",
          usl_ctx_errmsg(ctx));
    for (int i = 3; i <= 7; i++) CHECK_OK(ctx, usl_dataset_append(ds, "{}", 2));
    CHECK_OK(ctx, usl_dataset_visit(ds, 0, &v, NULL));
    CHECK(strcmp(seen, "{ k z [ i1 r2.5 true null ] k a { k s s x } } ") == 0, "visited %s", seen);
    CHECK(usl_dataset_visit(ds, 1, &v, &seen) == USL_ERR_CALLBACK, "a visitor that stops");
    CHECK(usl_dataset_visit(ds, 7, &v, NULL) == USL_ERR_INVALID &&
              usl_dataset_visit(ds, -1, &v, NULL) == USL_ERR_INVALID,
          "range");

    CHECK_OK(ctx, usl_dataset_select(ds, (int64_t[]){ 1, 0, 1 }, 3, &few));
    CHECK(usl_dataset_select(ds, (int64_t[]){ 7 }, 1, &none) == USL_ERR_INVALID && !none, "row 7 of 7");
    CHECK_OK(ctx, usl_dataset_shuffle(ds, 1, &all));
    /* torch.randperm(7) with seed 1, from randperm.json. */
    json_t *cases;
    CHECK_OK(ctx, usli_json_load(ctx, "tests/data/randperm.json", &cases));
    const json_t *order = json_object_get(json_array_get(cases, 2), "order");
    CHECK(json_array_size(order) == 7, "the third case has 7 rows");
    for (int64_t i = 0; i < 7; i++) {
        char want[40];
        snprintf(want, sizeof want, "row %lld", (long long)json_integer_value(json_array_get(order, (size_t)i)) + 1);
        CHECK(strcmp(usl_dataset_where(all, i, where, sizeof where), want) == 0, "shuffled %lld: %s, not %s",
              (long long)i, where, want);
    }
    json_decref(cases);
    usl_dataset_free(ds); /* the others keep the rows */
    CHECK(usl_dataset_rows(few) == 3, "three rows");
    check_row(ctx, few, 2, THIRTEEN);
    CHECK(strcmp(usl_dataset_where(few, 2, where, sizeof where), "row 2") == 0, "%s", where);
    CHECK(strcmp(usl_dataset_where(few, 3, where, sizeof where), "") == 0, "past the end: %s", where);
    usl_dataset_free(few);
    usl_dataset_free(all);
    CHECK_OK(ctx, load(ctx, "json", "[{}]", 4, &ds));
    CHECK(usl_dataset_append(ds, "{}", 2) == USL_ERR_INVALID, "rows of a file stay as they are");
    CHECK(strcmp(usl_dataset_where(ds, 0, where, 16) + 8, ": row 1") == 0, "a short buffer: %s", where);
    usl_dataset_free(ds);
    usl_dataset_free(NULL);
}

/* ---- Formats
 * ------------------------------------------------------------------------------------------------------------------ */

#define USER "{\"role\": \"user\", \"content\": \"q\"}"
#define BOT "{\"role\": \"assistant\", \"content\": \"a\"}"
#define SYSTEM "{\"role\": \"system\", \"content\": \"s\"}"

static const struct {
    const char *from, *to;
} STANDARD[] = {
    { "{\"instruction\": \"q\", \"input\": \"\", \"output\": \"a\"}", "{\"messages\": [" USER ", " BOT "]}" },
    { "{\"output\": \" a\\u0000\", \"input\": \"i\\n\", \"instruction\": \"q \", \"id\": 7}",
      "{\"messages\": [{\"role\": \"user\", \"content\": \"q \\n\\ni\\n\"}, {\"role\": \"assistant\", \"content\": \" "
      "a\\u0000\"}], \"id\": 7}" },
    { "{\"instruction\": \"q\", \"output\": \"a\", \"system\": \"s\"}",
      "{\"messages\": [" SYSTEM ", " USER ", " BOT "]}" },
    { "{\"conversations\": [{\"from\": \"human\", \"value\": \"q\"}, {\"from\": \"gpt\", \"value\": \"a\"}], "
      "\"system\": \"\", \"tools\": \"[]\"}",
      "{\"messages\": [" USER ", " BOT "], \"tools\": \"[]\"}" },
    { "{\"system\": \"s\", \"conversations\": [{\"from\": \"user\", \"value\": \"q\"}, {\"from\": \"function_call\", "
      "\"value\": \"a\"}, "
      "{\"from\": \"observation\", \"value\": \"t\"}]}",
      "{\"messages\": [" SYSTEM ", " USER ", " BOT ", {\"role\": \"tool\", \"content\": \"t\"}]}" },
    { "{\"conversations\": [" USER ", " BOT "]}", "{\"messages\": [" USER ", " BOT "]}" },
    { "{\"messages\": [{\"content\": \"s\", \"role\": \"developer\"}, " USER
      ", {\"role\": \"assistant\", \"content\": null, \"tool_calls\": [1]}]}",
      "{\"messages\": [" SYSTEM ", " USER ", {\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": [1]}]}" },
    { "{\"conversations\": [{\"from\": \"human\", \"value\": \"q\"}], \"chosen\": {\"from\": \"gpt\", \"value\": "
      "\"a\"}, "
      "\"rejected\": {\"from\": \"gpt\", \"value\": \"a\"}}",
      "{\"conversations\": [" USER "], \"chosen\": " BOT ", \"rejected\": " BOT "}" },
    { "{\"prompt\": \"q\", \"chosen\": \"a\", \"rejected\": [" BOT "], \"score\": 1, \"system\": \"s\"}",
      "{\"prompt\": [" SYSTEM ", " USER "], \"chosen\": [" BOT "], \"rejected\": [" BOT "], \"score\": 1}" },
    { "{\"chosen\": [" USER ", " BOT "], \"rejected\": [" USER ", " BOT "]}",
      "{\"chosen\": [" USER ", " BOT "], \"rejected\": [" USER ", " BOT "]}" },
    { "{\"messages\": [" USER ", " BOT "], \"label\": false}",
      "{\"messages\": [" USER ", " BOT "], \"label\": false}" },
    { "{\"prompt\": \"q\", \"completion\": \"a\", \"label\": true}",
      "{\"prompt\": [" USER "], \"completion\": [" BOT "], \"label\": true}" },
};

static void test_standard(usl_ctx *ctx) {
    for (size_t i = 0; i < sizeof STANDARD / sizeof *STANDARD; i++) {
        usl_dataset *ds, *made;
        CHECK_OK(ctx, load(ctx, "json", STANDARD[i].from, strlen(STANDARD[i].from), &ds));
        usl_status st = usl_dataset_standardize(ds, &made);
        CHECK(st == USL_OK, "case %zu: %s", i, usl_ctx_errmsg(ctx));
        char *before = NULL;
        if (st == USL_OK) check_row(ctx, made, 0, STANDARD[i].to);
        usl_dataset_free(made);
        /* The rows it came from are as they were. */
        CHECK_OK(ctx, usli_json_dump(ctx, usli_dataset_row(ds, 0), 0, &before, NULL));
        CHECK(strcmp(before, STANDARD[i].from) == 0, "case %zu changed its row: %s", i, before);
        usli_free(ctx, before);
        usl_dataset_free(ds);
    }
}

#define ALPACA "{\"instruction\": \"q\", \"input\": \"\", \"output\": \"a\"}\n"
#define SHARE "{\"conversations\": [{\"from\": \"human\", \"value\": \"q\"}]}\n"
#define DPO "{\"prompt\": \"q\", \"chosen\": \"a\", \"rejected\": \"b\"}\n"
#define KTO "{\"messages\": [" USER "], \"label\": true}\n"

/* Each begins with a good row, so that the second is meant: all but the first few. */
static const struct {
    const char *text, *where, *column, *says;
} REFUSED[] = {
    { "{\"text\": \"x\"}\n", "line 1", "\"messages\"", "no known format" },
    { "{\"instruction\": \"q\"}\n", "line 1", "\"output\"", "no known format" },
    { "[{\"conversations\": [{\"from\": \"human\", \"value\": \"q\"}]}, {\"conversations\": []}]", "row 2",
      "\"conversations\"", "empty" },
    { ALPACA "{\"instruction\": \"q\", \"input\": \"\"}\n", "line 2", "\"output\"", "missing" },
    { ALPACA "{\"instruction\": null, \"output\": \"a\"}\n", "line 2", "\"instruction\"", "null" },
    { ALPACA "{\"instruction\": \"q\", \"output\": 3}\n", "line 2", "\"output\"", "a number" },
    { ALPACA "{\"instruction\": \"q\", \"output\": \"a\", \"input\": [1]}\n", "line 2", "\"input\"", "a list" },
    { ALPACA "{\"instruction\": \"q\", \"output\": \"a\", \"system\": 1}\n", "line 2", "\"system\"", "a number" },
    { ALPACA SHARE, "line 2", "\"conversations\"", "two data sets" },
    { SHARE ALPACA, "line 2", "\"instruction\"", "two data sets" },
    { SHARE "{\"messages\": [" USER "]}\n", "line 2", "\"messages\"", "two data sets" },
    { SHARE "{\"conversations\": [" USER "]}\n", "line 2", "\"conversations\", message 1", "\"from\"" },
    { SHARE "{\"conversations\": null}\n", "line 2", "\"conversations\"", "null" },
    { SHARE "{\"conversations\": \"q\"}\n", "line 2", "\"conversations\"", "a string" },
    { SHARE "{\"conversations\": [\"q\"]}\n", "line 2", "\"conversations\", message 1", "a string" },
    { SHARE "{\"conversations\": [{\"from\": \"wizard\", \"value\": \"q\"}]}\n", "line 2",
      "\"conversations\", message 1", "wizard" },
    { SHARE "{\"conversations\": [{\"from\": \"user\\u0000\", \"value\": \"q\"}]}\n", "line 2", "\"conversations\"",
      "unknown role" },
    { SHARE "{\"conversations\": [{\"from\": null, \"value\": \"q\"}]}\n", "line 2", "\"from\"", "null" },
    { SHARE "{\"conversations\": [{\"value\": \"q\"}]}\n", "line 2", "\"from\"", "missing" },
    { SHARE "{\"conversations\": [{\"from\": \"human\", \"value\": null}]}\n", "line 2", "\"value\"", "null" },
    { SHARE "{\"conversations\": [{\"from\": \"human\"}]}\n", "line 2", "\"value\"", "missing" },
    { "{\"messages\": [" SYSTEM "], \"system\": \"s\"}\n", "line 1", "\"system\"", "keep one" },
    { DPO "{\"prompt\": \"q\", \"chosen\": \"a\"}\n", "line 2", "\"rejected\"", "missing" },
    { DPO "{\"prompt\": \"q\", \"chosen\": null, \"rejected\": \"b\"}\n", "line 2", "\"chosen\"", "null" },
    { DPO "{\"prompt\": \"q\", \"chosen\": {\"role\": \"user\", \"content\": \"a\"}, \"rejected\": \"b\"}\n", "line 2",
      "\"chosen\"", "assistant" },
    { DPO "{\"chosen\": \"a\", \"rejected\": \"b\"}\n", "line 2", "\"prompt\"", "missing" },
    { DPO KTO, "line 2", "\"label\"", "two data sets" },
    { KTO "{\"messages\": [" USER "]}\n", "line 2", "\"label\"", "missing" },
    { KTO "{\"messages\": [" USER "], \"label\": null}\n", "line 2", "\"label\"", "null" },
    { KTO "{\"messages\": [" USER "], \"label\": \"yes\"}\n", "line 2", "\"label\"", "a string" },
    { KTO "{\"messages\": [], \"label\": true}\n", "line 2", "\"messages\"", "empty" },
};

static void test_refused(usl_ctx *ctx) {
    usl_dataset *ds, *made;
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++) {
        usl_status st = load(ctx, "json", REFUSED[i].text, strlen(REFUSED[i].text), &ds);
        CHECK(st == USL_OK, "case %zu does not load: %s", i, usl_ctx_errmsg(ctx));
        if (st != USL_OK) continue;
        st = usl_dataset_standardize(ds, &made);
        const char *says = usl_ctx_errmsg(ctx);
        CHECK(st == USL_ERR_FORMAT && !made, "case %zu was accepted", i);
        CHECK(strstr(says, path) == says && strstr(says, REFUSED[i].where) && strstr(says, REFUSED[i].column) &&
                  strstr(says, REFUSED[i].says),
              "case %zu: %s", i, says);
        usl_dataset_free(made);
        usl_dataset_free(ds);
    }
    CHECK_OK(ctx, usl_dataset_new(ctx, &ds));
    CHECK(usl_dataset_standardize(ds, &made) == USL_ERR_FORMAT && strstr(usl_ctx_errmsg(ctx), "no rows"), "%s",
          usl_ctx_errmsg(ctx));
    usl_dataset_free(ds);
}

/* ---- Data outside the repository
 * ------------------------------------------------------------------------------------------------ */

static usl_status load_and_standardize(usl_ctx *ctx, const char *file, const char *kind, bool standard,
                                       usli_dataset **out) {
    usli_dataset *ds;
    *out = NULL;
    USLI_TRY(usl_dataset_load(ctx, kind, &file, 1, &ds));
    if (!standard) {
        *out = ds;
        return USL_OK;
    }
    usl_status st = usl_dataset_standardize(ds, out);
    usl_dataset_free(ds);
    return st;
}

static void test_shared(usl_ctx *ctx, const char *shared) {
    static const struct {
        const char *file, *kind;
        int64_t rows;
        bool standard;
        const char *columns;
    } FILES[] = {
        { "alpaca_en_demo.json", "json", 999, true, "messages" },
        { "identity.json", "json", 91, true, "messages" },
        { "dpo_en_demo.json", "json", 300, true, "conversations chosen rejected" },
        { "kto_en_demo.json", "json", 300, true, "messages label" },
        { "glaive_toolcall_en_demo.json", "json", 300, true, "messages tools" },
        { "sharegpt_dummy_conversation.json", "json", 500, true, "messages id" },
        { "c4_demo.jsonl", "json", 300, false, "text" },
        { "gsm8k_test.jsonl", "json", 1319, false, "question answer" },
        { "seed_tasks.jsonl", "json", 175, false, "id name instruction instances is_classification" },
        { "wiki_demo.txt", "text", 30, false, "text" },
        { "tinyshakespeare.txt", "text", 32777, false, "text" },
    };
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        char file[600], columns[200] = "";
        usli_dataset *ds;
        snprintf(file, sizeof file, "%s/data/datasets/%s", shared, FILES[i].file);
        usl_status st = load_and_standardize(ctx, file, FILES[i].kind, FILES[i].standard, &ds);
        CHECK(st == USL_OK, "%s: %s", FILES[i].file, usl_ctx_errmsg(ctx));
        if (st != USL_OK) continue;
        CHECK(usl_dataset_rows(ds) == FILES[i].rows, "%s: %lld rows", FILES[i].file, (long long)usl_dataset_rows(ds));
        const char *key;
        json_t *value;
        json_object_foreach((json_t *)(uintptr_t)usli_dataset_row(ds, 0), key, value) {
            size_t n = strlen(columns);
            snprintf(columns + n, sizeof columns - n, "%s%s", n ? " " : "", key);
        }
        CHECK(strcmp(columns, FILES[i].columns) == 0, "%s: columns %s", FILES[i].file, columns);
        usl_dataset_free(ds);
    }
}

static void test_malformed(usl_ctx *ctx, const char *shared) {
    char file[600];
    const char *manifest = file;
    usli_dataset *list, *ds;
    snprintf(file, sizeof file, "%s/data/datasets/malformed/MANIFEST.jsonl", shared);
    CHECK_OK(ctx, usl_dataset_load(ctx, "json", &manifest, 1, &list));
    for (int64_t i = 0; list && i < usl_dataset_rows(list); i++) {
        const json_t *row = usli_dataset_row(list, i), *rows = json_object_get(row, "rows");
        const char *name = json_string_value(json_object_get(row, "file")),
                   *expect = json_string_value(json_object_get(row, "expect"));
        const char *where = json_string_value(json_object_get(row, "where"));
        snprintf(file, sizeof file, "%s/data/datasets/malformed/%s", shared, name);
        usl_status st = load_and_standardize(ctx, file, "json", true, &ds);
        if (st == USL_OK) {
            CHECK(strcmp(expect, "error") != 0, "%s was accepted", name);
            CHECK(!rows || usl_dataset_rows(ds) == json_integer_value(rows), "%s: %lld rows", name,
                  (long long)usl_dataset_rows(ds));
        } else {
            const char *says = usl_ctx_errmsg(ctx);
            CHECK(strcmp(expect, "ok") != 0, "%s: %s", name, says);
            CHECK(strstr(says, name) && (!where || strstr(says, where)), "%s should say %s: %s", name,
                  where ? where : "its name", says);
        }
        usl_dataset_free(ds);
    }
    usl_dataset_free(list);
}

/* ---- No memory
 * -------------------------------------------------------------------------------------------------------------------
 */

static usl_status memory_run(usl_ctx *ctx) {
    static const char *const NAMES[] = { "list.json", "lines.jsonl", "dpo.json", "table.csv" };
    for (size_t i = 0; i < 4; i++) {
        char file[80];
        const char *paths[] = { file };
        usl_dataset *ds = NULL, *mixed = NULL, *made = NULL;
        snprintf(file, sizeof file, "%s/%s", dir, NAMES[i]);
        usl_status st = usl_dataset_load(ctx, i == 3 ? "csv" : "json", paths, 1, &ds);
        if (st == USL_OK) st = usl_dataset_shuffle(ds, 7, &mixed);
        if (st == USL_OK) st = usl_dataset_standardize(mixed, &made);
        usl_dataset_free(ds);
        usl_dataset_free(mixed);
        usl_dataset_free(made);
        if (st != USL_OK) return st;
    }
    usl_dataset *own;
    USLI_TRY(usl_dataset_new(ctx, &own));
    usl_status st = usl_dataset_append(own, ALPACA, strlen(ALPACA));
    usl_dataset_free(own);
    return st;
}

static void test_memory(usl_ctx *ctx) {
    static const char *const FILES[][2] = {
        { "list.json",
          "[{\"instruction\": \"q\\n\", \"input\": \"i\", \"output\": \"a\", \"system\": \"s\", \"id\": 1.5}]" },
        { "lines.jsonl",
          SHARE SHARE "{\"conversations\": [{\"from\": \"gpt\", \"value\": \"a\"}], \"system\": \"s\"}" },
        { "dpo.json", "[{\"prompt\": \"q\", \"chosen\": \"a\", \"rejected\": [" BOT "], \"system\": \"s\"}]" },
        { "table.csv", "instruction,output\nq,\"a\"\"b\"\n" },
    };
    char file[80];
    for (size_t i = 0; i < 4; i++) {
        snprintf(file, sizeof file, "%s/%s", dir, FILES[i][0]);
        CHECK_OK(ctx, usli_write_file(ctx, file, FILES[i][1], strlen(FILES[i][1])));
    }
    test_failing("data sets", memory_run);
    for (size_t i = 0; i < 4; i++) {
        snprintf(file, sizeof file, "%s/%s", dir, FILES[i][0]);
        remove(file);
    }
}

int main(void) {
    usl_ctx *ctx;
    if (!mkdtemp(dir) || usl_ctx_new(NULL, &ctx) != USL_OK) return 1;
    snprintf(path, sizeof path, "%s/rows.x", dir);
    test_good(ctx);
    test_bad(ctx);
    test_api(ctx);
    test_standard(ctx);
    test_refused(ctx);
    const char *shared = getenv("USL_SHARED") ? getenv("USL_SHARED") : "../shared";
    char there[600];
    snprintf(there, sizeof there, "%s/data/datasets", shared);
    if (usli_is_dir(there)) {
        test_shared(ctx, shared);
        test_malformed(ctx, shared);
    } else {
        SKIP("%s is not there", there);
    }
    test_memory(ctx);
    remove(path);
    rmdir(dir);
    usl_ctx_free(ctx);
    return test_end("dataset");
}
