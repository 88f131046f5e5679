/* One decoder block, both passes. */
#ifndef USLI_MODEL_BLOCK_H
#define USLI_MODEL_BLOCK_H

#include "core/model/pass.h"

/* res: in, the stream before the block (NULL: x alone is the stream); *res out: n2. s->x in and out as pass.h says.
 * saved->n1 must be there (the pass keeps it); keep: take the other saved tensors from the arena's low end, else they
 * are scratch of the call. cache: inference. */
usl_status usli_block_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res, bool keep,
                              usli_block_saved *saved);
/* dn: (tokens, hidden) res_dtype, gradient of the stream after the block; becomes that before it. wants_input: false when
 * nothing below is trained. */
usl_status usli_block_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input);

#endif
