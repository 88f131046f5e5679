/* The CPU's attention as processors with AVX512_BF16 or AMX run it: bfloat16 operands in pairs, AMX's tiles in plain C.
 * For test_attention_pairs. */
#include "core/cpu/vec.h"

extern const usli_vec usli_vec_tiles;
#define USLI_ATTENTION_VEC (&usli_vec_tiles)
#define USLI_ATTENTION_NAME paired_attention
#include "core/cpu/attention.c"
