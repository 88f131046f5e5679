/* Loss of one pass: only rows whose label counts reach the head, a chunk of logits at a time, and the gradient of the
 * hidden states is made at once, so that whole logits never exist. */
#ifndef USLI_TRAIN_LOSS_H
#define USLI_TRAIN_LOSS_H

#include "core/train/graphs.h"

typedef struct usli_targets {
    int64_t count;
    const int32_t *index;  /* (count) tokens whose label counts, ascending */
    const int32_t *target; /* (count) */
    float *losses;         /* (count) written */
    /* Of the load-balancing loss of mixtures; coefficient 0: it is not wanted. */
    float balance;
    int micros;
    const int32_t *micro; /* (micros + 1) */
} usli_targets;

/* Adds to update->loss_sum, and to update->balance what is wanted of it; with_gradient also to the gradients of
 * everything trainable. s as usli_pass_forward wants; graphs may be NULL. Products of dead tokens are not counted.
 */
usl_status usli_loss_pass(usli_pass_state *s, usli_graphs *graphs, const usli_targets *t, usli_update *update,
                          bool with_gradient);

#endif
