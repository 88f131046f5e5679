/* Generation: rows of different length together, without padding; keys and values in a cache; logits of whole rows. */
#ifndef USLI_INFER_GENERATE_H
#define USLI_INFER_GENERATE_H

#include "core/model/pass.h"

typedef struct usli_prompt {
    const int32_t *ids;
    int64_t count;
} usli_prompt;

typedef struct usli_generated {
    int32_t *ids; /* new: usli_free */
    int64_t count;
} usli_generated;

/* The same, a token at a time. Prompts and options are copied; the model is kept alive. *out is new:
 * usli_generator_free. */
usl_status usli_generator_new(usl_model *m, const usli_prompt *prompts, int rows, const usl_generate_opts *opts,
                              usl_generator **out);
void usli_generator_free(usl_generator *g); /* NULL is fine */
/* One more token of every row that still goes; *id: that of the first row, -1 when its text has ended. */
usl_status usli_generator_next(usl_generator *g, int32_t *id);
/* Continues every prompt. opts as in unsloth.h; on_token is called when there is one row only. out: (rows), the
 * caller's; on failure nothing in it needs freeing. */
usl_status usli_generate(usl_model *m, const usli_prompt *prompts, int rows, const usl_generate_opts *opts,
                         usli_generated *out);
/* As usl_model_decode_rate (rate.c). */
usl_status usli_decode_rate(usl_model *m, int rows, int64_t prompt, int64_t new_tokens, usl_decode_rate *out);
/* Runs fn on one row: first dry, to count its memory, then with memory. */
typedef usl_status (*usli_row_fn)(void *ud, usli_exec *x, const usl_model *m, const usli_batch *b);
usl_status usli_run_row(usl_model *m, const int32_t *ids, int64_t count, usli_row_fn fn, void *ud);
/* (count, vocab) float32 into out, which the caller owns. */
usl_status usli_logits(usl_model *m, const int32_t *ids, int64_t count, float *out);

#endif
