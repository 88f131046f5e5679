/* cuBLASLt, opened at run time; where it is missing the own GEMM (gemm.cu) answers. */
#ifndef USLI_KERNELS_CUBLASLT_CUH
#define USLI_KERNELS_CUBLASLT_CUH

#include "kernels/device.cuh"

/* Sets usli_cuda_of(x)->blas, or leaves it NULL when the library is not here: no error. */
usl_status usli_cublaslt_open(usli_exec *x);
void usli_cublaslt_close(usli_exec *x);

#endif
