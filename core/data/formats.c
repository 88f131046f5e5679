#include "core/data/formats.h"

#include <stdio.h>
#include <string.h>

typedef enum format { UNKNOWN, ALPACA, SHAREGPT, OPENAI, DPO, KTO } format;

static const char *const FORMAT_TEXT[] = { "no known format",
                                           "alpaca (columns \"instruction\", \"output\")",
                                           "ShareGPT (column \"conversations\")",
                                           "OpenAI (column \"messages\")",
                                           "DPO (columns \"chosen\", \"rejected\")",
                                           "KTO (column \"label\", true or false)" };

/* Where a conversation stands, questions first; the last two make a DPO row. */
static const char *const TALK[] = { "conversations", "messages", "prompt", "completion", "chosen", "rejected" };
enum { QUESTIONS = 3, REQUIRED = 4, TALKS = 6 };
/* How a message spells its role and its content. */
static const char *const KEYS[2][2] = { { "from", "value" }, { "role", "content" } };

typedef struct work {
    usl_ctx *ctx;
    const usli_dataset *ds;
    int64_t row;
    format format;
    int keys; /* index into KEYS, of the whole data set; -1 before the first message */
} work;

static usl_status fail_at(const work *w, const char *text) {
    char where[USLI_WHERE_MAX];
    return usli_fail(w->ctx, USL_ERR_FORMAT, "%s: %s", usli_dataset_where(w->ds, w->row, where, sizeof where), text);
}

static usl_status fail_type(const work *w, const char *column, const json_t *value, const char *wanted) {
    char text[200];
    snprintf(text, sizeof text, "column \"%s\" is %s; %s is wanted; correct the row or take it out", column,
             usli_json_type_name(value), wanted);
    return fail_at(w, text);
}

/* ---- Making messages
 * ------------------------------------------------------------------------------------------------------ */

static const char *role_of(const char *name) {
    static const struct {
        const char *name, *role;
    } ROLES[] = {
        { "system", "system" },       { "developer", "system" },
        { "user", "user" },           { "human", "user" },
        { "input", "user" },          { "assistant", "assistant" },
        { "gpt", "assistant" },       { "output", "assistant" },
        { "bot", "assistant" },       { "function_call", "assistant" },
        { "tool_call", "assistant" }, { "tool", "tool" },
        { "function", "tool" },       { "observation", "tool" },
    };
    for (size_t i = 0; i < sizeof ROLES / sizeof *ROLES; i++)
        if (strcmp(name, ROLES[i].name) == 0) return ROLES[i].role;
    return NULL;
}

/* Takes content over, also on failure. */
static usl_status add_message(const work *w, json_t *list, const char *role, json_t *content) {
    json_t *message = json_object();
    int bad = !message || json_object_set_new_nocheck(message, "role", json_string(role)) != 0;
    bad = json_object_set_nocheck(message, "content", content) != 0 || bad;
    json_decref(content);
    if (!bad) return json_array_append_new(list, message) == 0 ? USL_OK : usli_nomem(w->ctx, 0);
    json_decref(message);
    return usli_nomem(w->ctx, 0);
}

/* What an OpenAI message carries besides is kept: chat templates read it. */
static usl_status keep_extras(const work *w, const json_t *from, json_t *to) {
    static const char *const EXTRAS[] = { "tool_calls", "tool_call_id", "name" };
    for (size_t i = 0; i < 3; i++) {
        json_t *value = json_object_get(from, EXTRAS[i]);
        if (value && !json_is_null(value) && json_object_set_nocheck(to, EXTRAS[i], value) != 0)
            return usli_nomem(w->ctx, 0);
    }
    return USL_OK;
}

static usl_status find_keys(work *w, const json_t *item, const char *place) {
    int keys = json_object_get(item, "from") ? 0 : json_object_get(item, "role") ? 1 : w->keys < 0 ? 1 : w->keys;
    char text[240];
    if (w->keys < 0) w->keys = keys;
    if (keys == w->keys) return USL_OK;
    snprintf(text, sizeof text, "%s has \"%s\" where the messages before it have \"%s\"; use one spelling in all rows",
             place, KEYS[keys][0], KEYS[w->keys][0]);
    return fail_at(w, text);
}

static usl_status read_message(work *w, const char *place, const json_t *item, json_t *list) {
    char text[400];
    if (!json_is_object(item)) {
        snprintf(text, sizeof text, "%s is %s; an object with \"role\" and \"content\" is wanted", place,
                 usli_json_type_name(item));
        return fail_at(w, text);
    }
    USLI_TRY(find_keys(w, item, place));
    const char *role_key = KEYS[w->keys][0], *content_key = KEYS[w->keys][1];
    const json_t *role = json_object_get(item, role_key);
    json_t *content = json_object_get(item, content_key);
    const char *name = json_string_value(role), *to = name ? role_of(name) : NULL;
    if (!name) {
        snprintf(text, sizeof text, "%s: \"%s\" is %s; a role like \"user\" or \"assistant\" is wanted", place,
                 role_key, usli_json_type_name(role));
        return fail_at(w, text);
    }
    if (!to || strlen(name) != json_string_length(role)) {
        snprintf(text, sizeof text,
                 "%s: \"%s\" is the unknown role \"%.40s\"; use system, user (human), assistant (gpt) or tool", place,
                 role_key, name);
        return fail_at(w, text);
    }
    /* An assistant that calls a tool may say nothing. */
    bool silent = (!content || json_is_null(content)) && json_array_size(json_object_get(item, "tool_calls"));
    if (!silent && !json_is_string(content)) {
        snprintf(text, sizeof text, "%s: \"%s\" is %s; a string is wanted", place, content_key,
                 usli_json_type_name(content));
        return fail_at(w, text);
    }
    USLI_TRY(add_message(w, list, to, silent ? json_string("") : json_incref(content)));
    return keep_extras(w, item, json_array_get(list, json_array_size(list) - 1));
}

/* The messages of a column, whatever form they have there; a bare string is one message of `role`. *out is new. */
static usl_status read_talk(work *w, const char *column, const json_t *value, const char *role, json_t **out) {
    json_t *list = *out = json_array();
    usl_status st = list ? USL_OK : usli_nomem(w->ctx, 0);
    char place[80];
    if (st == USL_OK && json_is_string(value) && role) {
        st = add_message(w, list, role, json_incref((json_t *)(uintptr_t)value));
    } else if (st == USL_OK && json_is_object(value) && role) {
        snprintf(place, sizeof place, "column \"%s\"", column);
        st = read_message(w, place, value, list);
    } else if (st == USL_OK && !json_is_array(value)) {
        st = fail_type(w, column, value, "a list of messages");
    } else if (st == USL_OK && !json_array_size(value)) {
        st = fail_type(w, column, value, "at least one message in it (it is empty)");
    } else {
        for (size_t i = 0; st == USL_OK && i < json_array_size(value); i++) {
            snprintf(place, sizeof place, "column \"%s\", message %zu", column, i + 1);
            st = read_message(w, place, json_array_get(value, i), list);
        }
    }
    if (st == USL_OK) return USL_OK;
    json_decref(list);
    *out = NULL;
    return st;
}

/* A column that may be absent, null or empty; *out is borrowed, NULL then. */
static usl_status optional_text(const work *w, const json_t *row, const char *column, json_t **out) {
    json_t *value = json_object_get(row, column);
    *out = NULL;
    if (!value || json_is_null(value)) return USL_OK;
    if (!json_is_string(value)) return fail_type(w, column, value, "a string");
    if (json_string_length(value)) *out = value;
    return USL_OK;
}

/* The column "system" becomes the first message. */
static usl_status put_system(const work *w, const json_t *row, json_t *list) {
    json_t *system;
    USLI_TRY(optional_text(w, row, "system", &system));
    if (!system) return USL_OK;
    const char *first = json_string_value(json_object_get(json_array_get(list, 0), "role"));
    if (first && strcmp(first, "system") == 0)
        return fail_at(
            w, "column \"system\" is set and the conversation begins with a system message too; keep one of them");
    USLI_TRY(add_message(w, list, "system", json_incref(system)));
    /* To the front; the list keeps its own hold. */
    size_t last = json_array_size(list) - 1;
    json_t *message = json_incref(json_array_get(list, last));
    json_array_remove(list, last);
    return json_array_insert_new(list, 0, message) == 0 ? USL_OK : usli_nomem(w->ctx, 0);
}

/* ---- The formats
 * ---------------------------------------------------------------------------------------------------------- */

static format detect(const json_t *row) {
    const json_t *label = json_object_get(row, "label");
    bool talks = json_object_get(row, "messages") || json_object_get(row, "conversations");
    if (json_object_get(row, "chosen") && json_object_get(row, "rejected")) return DPO;
    if ((talks || json_object_get(row, "completion")) && (json_is_boolean(label) || json_is_null(label))) return KTO;
    if (json_object_get(row, "messages")) return OPENAI;
    if (json_object_get(row, "conversations")) return SHAREGPT;
    return json_object_get(row, "instruction") && json_object_get(row, "output") ? ALPACA : UNKNOWN;
}

/* user = instruction and, when it is there, input after an empty line. *out is new. */
static usl_status alpaca_messages(work *w, const json_t *row, json_t **out) {
    json_t *instruction = json_object_get(row, "instruction"), *output = json_object_get(row, "output"), *input;
    *out = NULL;
    if (!json_is_string(instruction)) return fail_type(w, "instruction", instruction, "a string");
    if (!json_is_string(output)) return fail_type(w, "output", output, "a string");
    USLI_TRY(optional_text(w, row, "input", &input));
    json_t *user = json_incref(instruction);
    if (input) {
        size_t a = json_string_length(instruction), b = json_string_length(input);
        char *text = usli_malloc(w->ctx, a + b + 2);
        json_decref(user);
        if (!text) return usli_nomem(w->ctx, a + b + 2);
        memcpy(text, json_string_value(instruction), a);
        memcpy(text + a, "\n\n", 2);
        memcpy(text + a + 2, json_string_value(input), b);
        user = json_stringn_nocheck(text, a + b + 2);
        usli_free(w->ctx, text);
    }
    json_t *list = *out = json_array();
    usl_status st = add_message(w, list, "user", user);
    if (st == USL_OK) st = add_message(w, list, "assistant", json_incref(output));
    if (st == USL_OK) return USL_OK;
    json_decref(list);
    *out = NULL;
    return st;
}

/* Whether a column's content went into the messages. */
static bool consumed(format f, const char *column) {
    static const char *const ALPACA_COLUMNS[] = { "instruction", "input", "output" };
    if (strcmp(column, "system") == 0 || strcmp(column, "messages") == 0) return true;
    if (f == SHAREGPT) return strcmp(column, "conversations") == 0;
    for (size_t i = 0; f == ALPACA && i < 3; i++)
        if (strcmp(column, ALPACA_COLUMNS[i]) == 0) return true;
    return false;
}

/* A new row: messages first, then the columns that went into nothing. Takes messages over. */
static usl_status row_of_messages(const work *w, const json_t *row, json_t *messages, json_t **out) {
    json_t *fresh = *out = json_object(), *value;
    const char *key;
    int bad = json_object_set_new_nocheck(fresh, "messages", messages) != 0;
    json_object_foreach((json_t *)(uintptr_t)row, key, value) {
        if (!bad && !consumed(w->format, key)) bad = json_object_set_nocheck(fresh, key, value) != 0;
    }
    if (!bad) return USL_OK;
    json_decref(fresh);
    *out = NULL;
    return usli_nomem(w->ctx, 0);
}

static usl_status convert_chat(work *w, const json_t *row, json_t **out) {
    json_t *messages;
    const char *column = w->format == OPENAI ? "messages" : "conversations";
    if (w->format == ALPACA)
        USLI_TRY(alpaca_messages(w, row, &messages));
    else
        USLI_TRY(read_talk(w, column, json_object_get(row, column), NULL, &messages));
    usl_status st = put_system(w, row, messages);
    if (st == USL_OK) return row_of_messages(w, row, messages, out);
    json_decref(messages);
    return st;
}

/* An answer is the assistant's: its last message must be. */
static usl_status check_answer(const work *w, const char *column, const json_t *list) {
    const json_t *last = json_array_get(list, json_array_size(list) - 1);
    if (strcmp(json_string_value(json_object_get(last, "role")), "assistant") == 0) return USL_OK;
    char text[160];
    snprintf(text, sizeof text,
             "column \"%s\" does not end with a message of the assistant (gpt); an answer is wanted there", column);
    return fail_at(w, text);
}

/* One column of a preference row. An object stays an object, everything else becomes a list. */
static usl_status convert_talk(work *w, json_t *row, const char *column, bool answer) {
    const json_t *value = json_object_get(row, column);
    bool single = json_is_object(value);
    json_t *list;
    USLI_TRY(read_talk(w, column, value, answer ? "assistant" : "user", &list));
    usl_status st = answer ? check_answer(w, column, list) : USL_OK;
    if (st == USL_OK && json_object_set_nocheck(row, column, single ? json_array_get(list, 0) : list) != 0)
        st = usli_nomem(w->ctx, 0);
    json_decref(list);
    return st;
}

static usl_status convert_columns(work *w, json_t *row) {
    const json_t *label = json_object_get(row, "label"),
                 *answers = json_object_get(row, w->format == DPO ? "chosen" : "completion");
    const char *asked = NULL;
    if (w->format == KTO && !json_is_boolean(label)) return fail_type(w, "label", label, "true or false");
    for (size_t i = 0; i < QUESTIONS; i++)
        if (json_object_get(row, TALK[i])) asked = TALK[i];
    /* A list of messages may hold the question too. */
    if (!asked && !json_is_array(answers))
        return fail_at(w, "column \"prompt\" is missing; give the question there, as a string or a list of messages");
    for (size_t i = 0; i < TALKS; i++) {
        bool required = w->format == DPO && i >= REQUIRED;
        if (required || json_object_get(row, TALK[i])) USLI_TRY(convert_talk(w, row, TALK[i], i >= QUESTIONS));
    }
    json_t *system, *list = asked ? json_object_get(row, asked) : NULL;
    USLI_TRY(optional_text(w, row, "system", &system));
    if (!system || !asked) return USL_OK;
    if (!json_is_array(list)) return fail_type(w, asked, list, "a list of messages");
    USLI_TRY(put_system(w, row, list));
    json_object_del(row, "system");
    return USL_OK;
}

static usl_status convert_preference(work *w, const json_t *row, json_t **out) {
    json_t *fresh = *out = json_object(), *value;
    const char *key;
    usl_status st = fresh ? USL_OK : usli_nomem(w->ctx, 0);
    /* Not json_copy: it leaves out what it finds no memory for. */
    json_object_foreach((json_t *)(uintptr_t)row, key, value) {
        if (st == USL_OK && json_object_set_nocheck(fresh, key, value) != 0) st = usli_nomem(w->ctx, 0);
    }
    if (st == USL_OK) st = convert_columns(w, fresh);
    if (st == USL_OK) return USL_OK;
    json_decref(fresh);
    *out = NULL;
    return st;
}

static usl_status check_format(const work *w, format found) {
    char text[400];
    if (w->format == UNKNOWN)
        return fail_at(w, "the columns fit no known format; columns \"instruction\" and \"output\" (alpaca), "
                          "\"conversations\" (ShareGPT), "
                          "\"messages\" (OpenAI), \"prompt\", \"chosen\", \"rejected\" (DPO) or \"messages\", "
                          "\"label\" (KTO) are wanted");
    /* Columns that a row lacks are the converter's to name. */
    bool lacks = found == UNKNOWN || (w->format >= DPO && (found == OPENAI || found == SHAREGPT));
    if (found == w->format || lacks) return USL_OK;
    snprintf(text, sizeof text, "this row is %s, the first row is %s; load and standardise them as two data sets",
             FORMAT_TEXT[found], FORMAT_TEXT[w->format]);
    return fail_at(w, text);
}

usl_status usli_standardize(const usli_dataset *ds, usli_dataset **out) {
    usl_ctx *ctx = usli_dataset_ctx(ds);
    work w = { .ctx = ctx, .ds = ds, .keys = -1 };
    int64_t rows = usli_dataset_rows(ds);
    usli_dataset *made;
    *out = NULL;
    if (!rows) return usli_fail(ctx, USL_ERR_FORMAT, "the data set has no rows; there is nothing to standardise");
    w.format = detect(usli_dataset_row(ds, 0));
    USLI_TRY(usli_dataset_new(ctx, &made));
    usl_status st = USL_OK;
    for (; st == USL_OK && w.row < rows; w.row++) {
        const json_t *row = usli_dataset_row(ds, w.row);
        json_t *fresh = NULL;
        USLI_TRYGO(check_format(&w, detect(row)));
        USLI_TRYGO(usli_checkpoint(ctx));
        USLI_TRYGO(w.format >= DPO ? convert_preference(&w, row, &fresh) : convert_chat(&w, row, &fresh));
        st = usli_dataset_add(made, ds, w.row, fresh);
    }
done:
    if (st != USL_OK) {
        usli_dataset_release(made);
        return st;
    }
    *out = made;
    return USL_OK;
}
