/* Sizes of plain element types. Block types live one floor up, in core/quant/traits.h. */
#ifndef USLI_BASE_DTYPE_H
#define USLI_BASE_DTYPE_H

#include "core/unsloth.h"

/* Bytes of one element of a plain type (F32, F16, BF16, F64, integers, fp8, BOOL); 0 for block types. */
size_t usli_dtype_bytes(usl_dtype dtype);

/* Reads element i of a plain floating type (F32, F16, BF16, F64) as float. */
float usli_get_float(const void *data, usl_dtype dtype, int64_t i);
/* Converts n values between F32, F16 and BF16, rounding to nearest even. */
void usli_to_f32(const void *src, usl_dtype dtype, float *dst, int64_t n);
void usli_from_f32(const float *src, void *dst, usl_dtype dtype, int64_t n);

#endif
