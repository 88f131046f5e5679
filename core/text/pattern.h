/* Regular expressions that users write, over whole names. */
#ifndef USLI_TEXT_PATTERN_H
#define USLI_TEXT_PATTERN_H

#include "core/base/ctx.h"

typedef struct usli_pattern usli_pattern;

/* what names the option in the sentence about a bad one. *out is new. */
usl_status usli_pattern_new(usl_ctx *ctx, const char *what, const char *text, usli_pattern **out);
void usli_pattern_free(usli_pattern *p); /* NULL is fine */
/* Whether all of the name matches. */
usl_status usli_pattern_matches(const usli_pattern *p, const char *name, bool *out);

#endif
