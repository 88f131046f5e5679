/* An importance matrix: of each linear weight's input, the mean square of every feature over a calibration text, in
 * proportion to the others; of a stack of experts one for all of them. What is multiplied by large numbers is quantised
 * with more care. */
#ifndef USLI_EXPORT_IMATRIX_H
#define USLI_EXPORT_IMATRIX_H

#include "core/model/model.h"

typedef struct usl_imatrix usli_imatrix;

struct usl_imatrix {
    usl_ctx *ctx;
    int64_t layers;
    float **features; /* by place in the model's weights, the largest of each about 1; NULL: no product was seen */
};

/* Runs the ids through the model, a row of at most `context` at a time. *out is new: usli_imatrix_free. */
usl_status usli_imatrix_new(usl_model *m, const int32_t *ids, int64_t count, int64_t context, usli_imatrix **out);
void usli_imatrix_free(usli_imatrix *im); /* NULL is fine */
/* (cols) of a weight; NULL when there are none. */
const float *usli_imatrix_of(const usli_imatrix *im, usli_slot slot, int64_t layer);

#endif
