/* One decoder block, both passes. */
#ifndef USLI_MODEL_BLOCK_H
#define USLI_MODEL_BLOCK_H

#include "core/model/pass.h"

/* res: the stream before the block; x: the branch output still to be added to it (NULL: none). saved->n1 and n2 are the
 * caller's (either may be res itself when nothing is kept). keep: take the other saved tensors from the arena's low
 * end; else they are scratch that the caller releases, and the MLP runs over s->piece tokens at a time. Leaves the
 * block's branch output in s->x. cache: inference. */
usl_status usli_block_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                              const void *x, bool keep, usli_block_saved *saved);
/* dn: (tokens, hidden) res_dtype, gradient of the stream after the block; becomes that before it. wants_input: false
 * when nothing below is trained. */
usl_status usli_block_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input);
/* The same when all that is left of the forward is saved->n1: the attention is made again whole, the MLP piece by
 * piece. */
usl_status usli_block_again(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input);

#endif
