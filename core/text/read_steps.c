/* Normalisers, pre-tokenisers and decoders as tokenizer.json describes them. */
#include <string.h>
#include <utf8proc.h>

#include "core/text/parts.h"

void usli_steps_free(usl_ctx *ctx, usli_steps *s) {
    for (size_t i = 0; i < s->count; i++) {
        usli_regex_free(s->items[i].regex);
        usli_free(ctx, s->items[i].text);
        usli_free(ctx, s->items[i].with);
    }
    usli_free(ctx, s->items);
    memset(s, 0, sizeof *s);
}

static usl_status missing(usl_ctx *ctx, const char *what, const char *field) {
    return usli_fail(ctx, USL_ERR_FORMAT, "%s needs a valid \"%s\"", what, field);
}

static usl_status read_text(usl_ctx *ctx, const json_t *from, const char *what, const char *field, char **out,
                            size_t *len) {
    const json_t *value = json_object_get(from, field);
    if (!json_is_string(value)) return missing(ctx, what, field);
    *len = json_string_length(value);
    *out = usli_strndup(ctx, json_string_value(value), *len);
    return *out ? USL_OK : usli_nomem(ctx, *len + 1);
}

/* An absent or null flag is the fallback. */
static usl_status read_flag(usl_ctx *ctx, const json_t *from, const char *what, const char *field, bool fallback,
                            bool *out) {
    const json_t *value = json_object_get(from, field);
    *out = fallback;
    if (!value || json_is_null(value)) return USL_OK;
    if (!json_is_boolean(value)) return missing(ctx, what, field);
    *out = json_is_true(value);
    return USL_OK;
}

static usl_status read_choice(usl_ctx *ctx, const json_t *from, const char *what, const char *field,
                              const char *const *names, int *out) {
    const json_t *value = json_object_get(from, field);
    for (int i = 0; names[i]; i++)
        if (json_is_string(value) && strcmp(json_string_value(value), names[i]) == 0) {
            *out = i;
            return USL_OK;
        }
    return missing(ctx, what, field);
}

/* {"String": "..."}, {"Regex": "..."} or, in old files, the text itself. */
static usl_status read_pattern(usl_ctx *ctx, const json_t *from, const char *what, usli_step *step) {
    const json_t *pattern = json_object_get(from, "pattern"), *text = pattern;
    bool regex = false;
    if (json_is_object(pattern)) {
        regex = json_object_get(pattern, "Regex") != NULL;
        text = json_object_get(pattern, regex ? "Regex" : "String");
    }
    if (!json_is_string(text) || json_string_length(text) == 0) return missing(ctx, what, "pattern");
    step->text_len = json_string_length(text);
    step->text = usli_strndup(ctx, json_string_value(text), step->text_len);
    if (!step->text) return usli_nomem(ctx, step->text_len + 1);
    return regex ? usli_regex_new(ctx, step->text, step->text_len, true, &step->regex) : USL_OK;
}

static usl_status read_prepend(usl_ctx *ctx, const json_t *from, const char *what, usli_step *step) {
    static const char *const NAMES[] = { "never", "first", "always", NULL };
    int scheme = USLI_PREPEND_ALWAYS;
    if (json_object_get(from, "prepend_scheme"))
        USLI_TRY(read_choice(ctx, from, what, "prepend_scheme", NAMES, &scheme));
    else if (json_is_false(json_object_get(from, "add_prefix_space")))
        scheme = USLI_PREPEND_NEVER;
    step->prepend = (usli_prepend)scheme;
    return USL_OK;
}

static usl_status read_behavior(usl_ctx *ctx, const json_t *from, const char *what, usli_step *step) {
    static const char *const NAMES[] = { "Removed",        "Isolated", "Contiguous", "MergedWithPrevious",
                                         "MergedWithNext", NULL };
    int behavior = USLI_ISOLATED;
    if (json_object_get(from, "behavior")) USLI_TRY(read_choice(ctx, from, what, "behavior", NAMES, &behavior));
    step->behavior = (usli_behavior)behavior;
    return USL_OK;
}

static usl_status read_unicode(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    (void)ctx, (void)json;
    step->unicode = UTF8PROC_STABLE | (what[2] == 'C' || what[3] == 'C' ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE);
    if (what[2] == 'K') step->unicode |= UTF8PROC_COMPAT;
    return USL_OK;
}

static usl_status read_put_before(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    return read_text(ctx, json, what, "prepend", &step->text, &step->text_len);
}

static usl_status read_replace(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    USLI_TRY(read_pattern(ctx, json, what, step));
    return read_text(ctx, json, what, "content", &step->with, &step->with_len);
}

static usl_status read_charsmap(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    const json_t *map = json_object_get(json, "precompiled_charsmap");
    if (!json_is_string(map)) return missing(ctx, what, "precompiled_charsmap");
    return usli_charsmap_read(ctx, json_string_value(map), json_string_length(map), step);
}

static usl_status read_strip_spaces(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    bool left, right;
    USLI_TRY(read_flag(ctx, json, what, "strip_left", true, &left));
    USLI_TRY(read_flag(ctx, json, what, "strip_right", true, &right));
    step->left = left;
    step->right = right;
    return USL_OK;
}

static usl_status read_strip(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    const json_t *left = json_object_get(json, "start"), *right = json_object_get(json, "stop");
    USLI_TRY(read_text(ctx, json, what, "content", &step->text, &step->text_len));
    if (step->text_len == 0 || usli_utf8_step(step->text[0]) != step->text_len) return missing(ctx, what, "content");
    if (!json_is_integer(left) || json_integer_value(left) < 0) return missing(ctx, what, "start");
    if (!json_is_integer(right) || json_integer_value(right) < 0) return missing(ctx, what, "stop");
    step->left = json_integer_value(left);
    step->right = json_integer_value(right);
    return USL_OK;
}

static usl_status read_split(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    USLI_TRY(read_pattern(ctx, json, what, step));
    USLI_TRY(read_behavior(ctx, json, what, step));
    return read_flag(ctx, json, what, "invert", false, &step->invert);
}

static usl_status read_byte_level(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    /* GPT-2's own pattern. */
    static const char WORDS[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
    bool use_regex;
    USLI_TRY(read_flag(ctx, json, what, "add_prefix_space", true, &step->add_prefix_space));
    USLI_TRY(read_flag(ctx, json, what, "use_regex", true, &use_regex));
    step->behavior = USLI_ISOLATED;
    return use_regex ? usli_regex_new(ctx, WORDS, sizeof WORDS - 1, true, &step->regex) : USL_OK;
}

static usl_status read_metaspace(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    USLI_TRY(read_text(ctx, json, what, "replacement", &step->text, &step->text_len));
    if (step->text_len == 0 || usli_utf8_step(step->text[0]) != step->text_len)
        return missing(ctx, what, "replacement");
    USLI_TRY(read_prepend(ctx, json, what, step));
    step->behavior = USLI_MERGED_NEXT;
    return read_flag(ctx, json, what, "split", true, &step->split);
}

static usl_status read_digits(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    USLI_TRY(read_flag(ctx, json, what, "individual_digits", false, &step->split));
    step->behavior = step->split ? USLI_ISOLATED : USLI_CONTIGUOUS;
    return USL_OK;
}

static usl_status read_spaces(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step) {
    (void)ctx, (void)json, (void)what;
    step->behavior = USLI_REMOVED;
    return USL_OK;
}

typedef usl_status (*reader_fn)(usl_ctx *ctx, const json_t *json, const char *what, usli_step *step);
typedef struct component {
    const char *type;
    usli_step_kind kind;
    reader_fn read; /* NULL: nothing but its type */
} component;

static const component NORMALIZERS[] = {
    { "Prepend", USLI_NORM_PREPEND, read_put_before },    { "Replace", USLI_NORM_REPLACE, read_replace },
    { "NFC", USLI_NORM_UNICODE, read_unicode },           { "NFD", USLI_NORM_UNICODE, read_unicode },
    { "NFKC", USLI_NORM_UNICODE, read_unicode },          { "NFKD", USLI_NORM_UNICODE, read_unicode },
    { "Lowercase", USLI_NORM_LOWERCASE, NULL },           { "Strip", USLI_NORM_STRIP, read_strip_spaces },
    { "Precompiled", USLI_NORM_CHARSMAP, read_charsmap }, { NULL, USLI_NORM_PREPEND, NULL },
};
static const component PRE_TOKENIZERS[] = {
    { "Split", USLI_PRE_SPLIT, read_split },
    { "ByteLevel", USLI_PRE_BYTE_LEVEL, read_byte_level },
    { "Metaspace", USLI_PRE_METASPACE, read_metaspace },
    { "Digits", USLI_PRE_DIGITS, read_digits },
    { "WhitespaceSplit", USLI_PRE_SPACES, read_spaces },
    { "Punctuation", USLI_PRE_PUNCTUATION, read_behavior },
    { NULL, USLI_PRE_SPLIT, NULL },
};
static const component DECODERS[] = {
    { "Replace", USLI_DEC_REPLACE, read_replace },
    { "ByteFallback", USLI_DEC_BYTE_FALLBACK, NULL },
    { "Fuse", USLI_DEC_FUSE, NULL },
    { "Strip", USLI_DEC_STRIP, read_strip },
    { "ByteLevel", USLI_DEC_BYTE_LEVEL, NULL },
    { "Metaspace", USLI_DEC_METASPACE, read_metaspace },
    { NULL, USLI_DEC_FUSE, NULL },
};

/* NFC and its like are told apart by their type alone, which the reader gets as `what`. */
static usl_status read_component(usl_ctx *ctx, const json_t *json, const char *group, const char *members,
                                 const component *known, usli_steps *out) {
    if (!json || json_is_null(json)) return USL_OK;
    const char *type = json_string_value(json_object_get(json, "type"));
    if (!type) return usli_fail(ctx, USL_ERR_FORMAT, "the %s has no type", group);
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(json, members);
        if (!json_is_array(list)) return missing(ctx, group, members);
        for (size_t i = 0; i < json_array_size(list); i++)
            USLI_TRY(read_component(ctx, json_array_get(list, i), group, members, known, out));
        return USL_OK;
    }
    for (; known->type; known++) {
        if (strcmp(known->type, type) != 0) continue;
        USLI_TRY(usli_grow(ctx, &out->items, &out->cap, out->count + 1, sizeof *out->items));
        /* Counted at once, so that whoever owns the list frees a step that was read by half. */
        usli_step *step = &out->items[out->count++];
        memset(step, 0, sizeof *step);
        step->kind = known->kind;
        return known->read ? known->read(ctx, json, known->type, step) : USL_OK;
    }
    return usli_fail(ctx, USL_ERR_UNSUPPORTED, "the %s %.100s is not supported", group, type);
}

usl_status usli_read_normalizer(usl_ctx *ctx, const json_t *json, usli_steps *out) {
    return read_component(ctx, json, "normalizer", "normalizers", NORMALIZERS, out);
}

usl_status usli_read_pre_tokenizer(usl_ctx *ctx, const json_t *json, usli_steps *out) {
    return read_component(ctx, json, "pre-tokenizer", "pretokenizers", PRE_TOKENIZERS, out);
}

usl_status usli_read_decoder(usl_ctx *ctx, const json_t *json, usli_steps *out) {
    return read_component(ctx, json, "decoder", "decoders", DECODERS, out);
}
