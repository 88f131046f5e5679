/* JSON. Two ways in:
 *   - a pull reader, for tokenizer.json (tens of MB) and safetensors headers: one event at a time, nothing built;
 *   - jansson's DOM (usli_json_parse, usli_json_load) for everything small or row-shaped.
 * Both refuse invalid UTF-8, raw control characters, NaN, trailing text and nesting deeper than 512, with the place. */
#ifndef USLI_IO_JSON_H
#define USLI_IO_JSON_H

#include <jansson.h>

#include "core/base/ctx.h"

typedef enum usli_json_kind {
    USLI_JSON_END, /* of the text */
    USLI_JSON_NULL,
    USLI_JSON_BOOL,
    USLI_JSON_INT,
    USLI_JSON_FLOAT,
    USLI_JSON_STRING,
    USLI_JSON_ARRAY,
    USLI_JSON_ARRAY_END,
    USLI_JSON_OBJECT,
    USLI_JSON_KEY,
    USLI_JSON_OBJECT_END
} usli_json_kind;

typedef struct usli_json_reader {
    usl_ctx *ctx;
    const char *name; /* for errors: the file */
    const char *text, *pos, *end;
    /* The current event. str is UTF-8 with escapes resolved, not 0-terminated, may hold NUL; it points into the text
     * when there was no escape, else into scratch: valid until the next call. */
    usli_json_kind kind;
    const char *str; /* KEY, STRING */
    size_t len;
    int64_t i; /* INT, BOOL */
    double d;  /* FLOAT, INT */
    /* private */
    char *scratch;
    size_t scratch_cap;
    int depth;
    uint64_t in_object[8]; /* a bit a level */
    int state;
} usli_json_reader;

void usli_json_init(usli_json_reader *r, usl_ctx *ctx, const char *name, const char *text, size_t len);
void usli_json_done(usli_json_reader *r); /* frees scratch */
usl_status usli_json_next(usli_json_reader *r);
/* With the value's first event (or KEY: the value after it) current, passes over the whole value. */
usl_status usli_json_skip(usli_json_reader *r);
/* next, and an error that names `what` unless the event is of this kind. */
usl_status usli_json_expect(usli_json_reader *r, usli_json_kind kind, const char *what);
/* With a value's first event current, reads the whole value; *out is new: json_decref. */
usl_status usli_json_build(usli_json_reader *r, json_t **out);
/* True when the current KEY or STRING equals text. */
bool usli_json_is(const usli_json_reader *r, const char *text);

/* *out is new: json_decref. Any value at the top. Object keys keep their order. name is for errors ("file: line N:
 * ..."). */
usl_status usli_json_parse(usl_ctx *ctx, const char *name, const char *text, size_t len, json_t **out);
usl_status usli_json_load(usl_ctx *ctx, const char *path, json_t **out);
/* *out is new (usli_free); indent 0 is compact with ", " and ": " as Python's json.dumps writes it. */
usl_status usli_json_dump(usl_ctx *ctx, const json_t *value, int indent, char **out, size_t *len);

#endif
