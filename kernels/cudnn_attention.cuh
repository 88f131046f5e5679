/* Attention by cuDNN, opened at run time: 16 bits, causal, rows of one length. */
#ifndef USLI_KERNELS_CUDNN_ATTENTION_CUH
#define USLI_KERNELS_CUDNN_ATTENTION_CUH

#include "kernels/device.cuh"

/* Sets usli_cuda_of(x)->cudnn where cuDNN may take attention: see USL_ATTENTION in the source. The library itself is
 * opened with the first attention that it may take. */
usl_status usli_cudnn_open(usli_exec *x);
void usli_cudnn_close(usli_exec *x);
/* Bytes that usli_cudnn_attention wants; 0: it will not take these shapes. Builds their plan, which reads no data. */
size_t usli_cudnn_attention_workspace(const usli_exec *x, const usli_attention_args *a, usli_pass pass);
/* false: not for cuDNN, use the own kernels. Rows that cuDNN took forward may go backward either way: lse is the op's
 * own. */
bool usli_cudnn_attention(usli_exec *x, const usli_attention_args *a, usli_pass pass, void *ws, usl_status *st);

#endif
