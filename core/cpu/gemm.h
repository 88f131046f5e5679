/* Matrix products on the CPU. The output is cut into tiles by its shape alone and each tile is one thread's, so results
 * do not depend on the number of threads; the sum over k is never cut between threads. Everything accumulates in
 * float32 and is rounded once, at the store. Operands are F32, BF16 or F16; where the processor has no bfloat16
 * products, and for F16 and mixed operands, tiles are converted to float32 on the way. */
#ifndef USLI_CPU_GEMM_H
#define USLI_CPU_GEMM_H

#include "core/ops/ops.h"

/* c = beta c + alpha op(a) op(b):  op(a) (m, k), op(b) (k, n), c (m, n), row-major. c is F32, BF16 or F16. */
usl_status usli_gemm(usli_exec *x, bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const void *a,
                     usl_dtype adt, int64_t lda, const void *b, usl_dtype bdt, int64_t ldb, float beta, void *c,
                     usl_dtype cdt, int64_t ldc);

/* The general form, a sum of terms that is rounded once:
 *   c = beta c + mask(alpha (term 0 + ... + term scaled-1)) + the other terms + bias */
enum { USLI_MAX_TERMS = 2 * USLI_MAX_SEGMENTS };

typedef struct usli_term {
    bool ta, tb;
    int64_t k;
    const void *a, *b;
    usl_dtype adt, bdt;
    int64_t lda, ldb;
} usli_term;

/* Changes a tile (rows, cols) of the sum that begins at (row, col); rows ld apart. Called from tasks. */
typedef void (*usli_mask_fn)(void *ud, float *tile, int64_t ld, int64_t row, int64_t rows, int64_t col, int64_t cols);

typedef struct usli_product {
    int64_t m, n;
    int terms, scaled;
    usli_term term[USLI_MAX_TERMS];
    float alpha, beta;
    usli_mask_fn mask; /* NULL: none */
    void *mask_ud;
    const void *bias; /* (n) or NULL */
    usl_dtype bias_dtype;
    void *c;
    usl_dtype cdt;
    int64_t ldc;
} usli_product;

/* Runs independent products as one batch of tasks. */
usl_status usli_gemm_products(usli_exec *x, const usli_product *products, int count);
/* Whether products of two BF16 operands are made as they are; otherwise they are converted tile by tile. */
bool usli_gemm_has_bf16(const usli_exec *x);

/* What x->state is on the CPU. */
usl_status usli_gemm_open(usl_ctx *ctx, void **state);
void usli_gemm_close(void *state);

#endif
