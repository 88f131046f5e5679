/* linear's forward pass for a few tokens: weights are read once, as they are stored, and decoded in registers. */
#ifndef USLI_KERNELS_GEMV_CUH
#define USLI_KERNELS_GEMV_CUH

#include "kernels/device.cuh"

bool usli_cuda_gemv_fits(const usli_linear_args *a);
size_t usli_cuda_gemv_workspace(const usli_linear_args *a);
usl_status usli_cuda_gemv(usli_exec *x, const usli_linear_args *a, void *ws);

#endif
