/* What every storage type is: elements and bytes of a block, how to decode and encode a row. One table, read by
 * loading, export, the CPU backend and Lua. Block layouts themselves are in core/quant/blocks.h, shared with the
 * kernels. */
#ifndef USLI_QUANT_TRAITS_H
#define USLI_QUANT_TRAITS_H

#include "core/base/ctx.h"

/* Decoding gives ggml's values to the bit. Encoding searches for scales of small squared error, so its bytes are not
 * ggml's, its error is lower. A row of NF4 or FP4 is the codes of all its n values followed by their n / 64 absmax as
 * float32: unlike the other types it can only be decoded as it was encoded, not in parts (core/quant/nf4.h decodes
 * parts). */
typedef struct usli_traits {
    usl_dtype dtype;
    int block;       /* values in a block; 1 for plain types */
    int block_bytes; /* bytes of a block */
    /* n is a multiple of block. NULL: this program cannot. Plain float types have both. */
    void (*decode)(const void *src, float *dst, int64_t n);
    /* weights (n) of importance or NULL. Deterministic. */
    void (*encode)(const float *src, const float *importance, void *dst, int64_t n);
} usli_traits;

/* NULL for a number that is no type. Types without decode are there too, so that sizes can be checked. */
const usli_traits *usli_traits_of(usl_dtype dtype);
/* Bytes of n values; n must be a multiple of the block (else 0); 0 also when it would overflow. */
size_t usli_row_bytes(usl_dtype dtype, int64_t n);

#endif
