/* The trained parameters with their gradients and optimiser state: one list, two blocks of memory. */
#ifndef USLI_TRAIN_OPTIMIZER_H
#define USLI_TRAIN_OPTIMIZER_H

#include "core/model/model.h"

typedef struct usli_optimizer {
    usl_ctx *ctx;
    usl_model *model; /* borrowed */
    usli_param *params;
    int64_t *ref; /* each one's number for usli_model_param */
    int64_t count;
    float *grads; /* all gradients, on the device as the states are */
    size_t grad_bytes;
    char *states; /* all states */
    size_t state_bytes;
    double beta1, beta2, epsilon;
} usli_optimizer;

/* Finds what is trainable, takes memory, connects the gradients to the model. eight_bit: states of 4096 values and more
 * (embeddings aside) in blocks of 256, as bitsandbytes does. Weight decay touches adapters and matrices. */
usl_status usli_optimizer_init(usli_optimizer *o, usl_model *m, bool eight_bit, double weight_decay);
/* Bytes that init would take, for the plan. */
void usli_optimizer_bytes(const usl_model *m, bool eight_bit, uint64_t *parameters, uint64_t *gradients,
                          uint64_t *states);
void usli_optimizer_done(usli_optimizer *o); /* disconnects the gradients */
usl_status usli_optimizer_zero(usli_optimizer *o);
/* grad_norm and adamw over everything; update is on the device. */
usl_status usli_optimizer_step(usli_optimizer *o, usli_exec *x, usli_update *update);

#endif
