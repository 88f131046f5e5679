/* cuBLASLt, opened at run time. */
#ifndef USLI_KERNELS_CUBLASLT_CUH
#define USLI_KERNELS_CUBLASLT_CUH

#include "kernels/gemm.cuh"

/* Sets usli_cuda_of(x)->blas, or leaves it NULL when the library is not here (or USL_NO_CUBLAS is set): no error. */
usl_status usli_cublaslt_open(usli_exec *x);
void usli_cublaslt_close(usli_exec *x);
/* false: the library has nothing for these shapes, use the own kernel. */
bool usli_cublaslt_gemm(usli_exec *x, const usli_gemm_args *g, usl_status *st);

#endif
