/* Jinja templates, the part of the language that chat templates use, rendered byte for byte as transformers renders
 * them: jinja2's ImmutableSandboxedEnvironment with trim_blocks, lstrip_blocks, break and continue, a plain `tojson`,
 * `raise_exception`, `strftime_now` and {% generation %}. Values have Python's text, arithmetic and comparisons.
 *
 * Templates come from strangers: steps, memory and depth are bounded, nothing outside the variables can be reached. */
#ifndef USLI_TEXT_JINJA_H
#define USLI_TEXT_JINJA_H

#include "core/base/ctx.h"

/* What {% generation %} blocks wrote: bytes begin .. end of the text, in order. */
typedef struct usli_jinja_span {
    size_t begin, end;
} usli_jinja_span;

typedef struct usli_jinja_result {
    char *text; /* new: usli_free; 0-terminated, len without it */
    size_t len;
    usli_jinja_span *spans; /* new: usli_free; NULL when there are none */
    size_t span_count;
} usli_jinja_result;

/* One variable: JSON text of its value, or a plain string. */
typedef struct usli_jinja_var {
    const char *name;
    const char *text;
    size_t len;
    enum {
        USLI_JINJA_JSON,
        USLI_JINJA_TEXT,
        USLI_JINJA_FIELDS
    } kind; /* FIELDS: an object whose members are variables */
} usli_jinja_var;

/* Later variables win over earlier ones of the same name. name: for errors ("chat template"). An error that
 * raise_exception makes is USL_ERR_INVALID and holds its text; every other is USL_ERR_FORMAT; all name the line. */
usl_status usli_jinja_render(usl_ctx *ctx, const char *name, const char *source, size_t len, const usli_jinja_var *vars,
                             size_t count, usli_jinja_result *out);
/* Frees and empties what a result holds. */
void usli_jinja_result_free(usl_ctx *ctx, usli_jinja_result *result);

#endif
