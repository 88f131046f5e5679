/* A look inside: what the layers of a model make of one row. All results are float32 on the host, the caller's. */
#ifndef USLI_INFER_LOOK_H
#define USLI_INFER_LOOK_H

#include "core/infer/generate.h"

/* out: (layers + 1, count, hidden): what goes into each layer, then what the final norm gives. */
usl_status usli_hidden_states(usl_model *m, const int32_t *ids, int64_t count, float *out);
/* out: (heads, count, count): how much each token, a line, looks at each earlier one. */
usl_status usli_attentions(usl_model *m, const int32_t *ids, int64_t count, int64_t layer, float *out);
/* stream: (rows, hidden). out: (rows, vocab): the final norm and the head. */
usl_status usli_unembed(usl_model *m, const float *stream, int64_t rows, float *out);

#endif
