/* Matrix products: cuBLASLt where it is, an own kernel otherwise; the same numbers run after run. */
#ifndef USLI_KERNELS_GEMM_CUH
#define USLI_KERNELS_GEMM_CUH

#include "kernels/device.cuh"

/* c (m, n) = alpha * op(a) (m, k) op(b) (k, n) + beta * c, all row-major, sums in float32. A transposed a is stored
 * (k, m), a transposed b (n, k): the layout of weights. F32 is true float32. */
typedef struct usli_gemm_args {
    int64_t m, n, k;
    bool trans_a, trans_b;
    usl_dtype type, c_type; /* of a and b: F32, BF16, F16; of c: the same or F32 */
    const void *a, *b;
    void *c;
    int64_t lda, ldb, ldc;
    float alpha, beta;
    /* groups > 0: offsets (groups + 1, on the device, which alone knows them) cut the rows of a and c, and group i has
     * its own b, `stride` values after the one before; with trans_a they cut the k rows of a and b, and group i has its
     * own c. m, or k, counts the rows of all groups. */
    int groups;
    const int32_t *offsets;
    int64_t stride;
} usli_gemm_args;

usl_status usli_gemm(usli_exec *x, const usli_gemm_args *g);
/* The own kernel, for machines that have a driver and no toolkit. */
usl_status usli_own_gemm(usli_exec *x, const usli_gemm_args *g);

#endif
