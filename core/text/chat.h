/* Conversations to text by a tokenizer's chat template, as transformers' apply_chat_template does. */
#ifndef USLI_TEXT_CHAT_H
#define USLI_TEXT_CHAT_H

#include "core/text/jinja.h"
#include "core/text/tokenizer.h"

/* messages: a JSON array of objects. The template is opts' (the name of one of the tokenizer's, or Jinja text), else
 * the tokenizer's "tool_use" when there are tools, else its default. opts may be NULL. */
usl_status usli_chat_apply(usl_ctx *ctx, const usli_tokenizer *tok, const char *messages, const usl_chat_opts *opts,
                           usli_jinja_result *out);
/* Any template with any variables: a JSON object. */
usl_status usli_chat_render(usl_ctx *ctx, const char *source, size_t len, const char *variables,
                            usli_jinja_result *out);

#endif
