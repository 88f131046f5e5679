/* The one door to the matrix library: oneDNN, or any CBLAS. Row-major, single-threaded calls from any worker of the
 * pool; cutting work into such calls is gemm.c's. */
#ifndef USLI_CPU_BLAS_H
#define USLI_CPU_BLAS_H

#include "core/base/ctx.h"

typedef struct usli_blas usli_blas;

/* c (m, n) = or += op(a) (m, k) op(b) (k, n); ta: a is stored (k, m); tb: b is stored (n, k). c is float32. Filled with
 * zeros first (usli_blas_call c = { 0 }), since all of its bytes are a key. */
typedef struct usli_blas_call {
    int64_t m, n, k, lda, ldb, ldc;
    int32_t bf16; /* a and b: bfloat16 instead of float32 */
    int32_t ta, tb, accumulate;
} usli_blas_call;

/* *out is new: free with usli_blas_free. */
usl_status usli_blas_new(usl_ctx *ctx, usli_blas **out);
void usli_blas_free(usli_blas *b);

/* Whether calls with bf16 may be made on this processor. */
bool usli_blas_has_bf16(const usli_blas *b);
/* Whether long float32 products go quicker over copied blocks: oneDNN without AVX-512 reads its operands where they
 * are. */
bool usli_blas_wants_blocks(const usli_blas *b);
/* Makes what the call needs. Before the tasks that run it, from the thread that owns the context. Earlier preparations
 * hold until usli_blas_trim. */
usl_status usli_blas_prepare(usli_blas *b, const usli_blas_call *call);
/* Forgets old preparations when there are very many. Between batches only. */
void usli_blas_trim(usli_blas *b);
/* Runs a prepared call as `worker` of the pool. False when the library failed. */
bool usli_blas_run(usli_blas *b, const usli_blas_call *call, const void *left, const void *right, float *out,
                   int worker);

#endif
