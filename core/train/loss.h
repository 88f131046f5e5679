/* Loss of one pass: only rows whose label counts reach the head, a chunk of logits at a time, and the gradient of the
 * hidden states is made at once, so that whole logits never exist. */
#ifndef USLI_TRAIN_LOSS_H
#define USLI_TRAIN_LOSS_H

#include "core/model/pass.h"

typedef struct usli_targets {
    int64_t count;
    const int32_t *index;  /* (count) tokens whose label counts, ascending */
    const int32_t *target; /* (count) */
    float *losses;         /* (count) written */
} usli_targets;

/* Adds to update->loss_sum; with_gradient also to the gradients of everything trainable. s as usli_pass_forward wants.
 */
usl_status usli_loss_pass(usli_pass_state *s, const usli_targets *t, usli_update *update, bool with_gradient);

#endif
