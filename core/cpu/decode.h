/* Reading a usli_matrix of any storage type as numbers. */
#ifndef USLI_CPU_DECODE_H
#define USLI_CPU_DECODE_H

#include "core/ops/ops.h"

/* USL_OK when w can be decoded; else a sentence that begins with `what`. */
usl_status usli_matrix_check(usl_ctx *ctx, const usli_matrix *w, const char *what);
/* n values of a row from column col on; col and n must be multiples of the type's block (NF4, FP4: any). round: BF16
 * for values rounded to it, F32 for values as they are. */
void usli_matrix_read(const usli_matrix *w, int64_t row, int64_t col, int64_t n, usl_dtype round, float *dst);
/* The same, times scale, rounded to F32, BF16 or F16. */
void usli_matrix_decode(const usli_matrix *w, int64_t row, int64_t col, int64_t n, float scale, void *dst,
                        usl_dtype dtype);
/* Where element (row, col) of a plain floating type stands. */
const void *usli_matrix_at(const usli_matrix *w, int64_t row, int64_t col);

#endif
