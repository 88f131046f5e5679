#include "kernels/cublaslt.cuh"

usl_status usli_cublaslt_open(usli_exec *x) {
    usli_cuda_of(x)->blas = nullptr;
    return USL_OK;
}

void usli_cublaslt_close(usli_exec *x) {
    (void)x;
}
