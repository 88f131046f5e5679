/* Attention by cuDNN, opened at run time: 16 bits, causal, rows of one length. */
#ifndef USLI_KERNELS_CUDNN_ATTENTION_CUH
#define USLI_KERNELS_CUDNN_ATTENTION_CUH

#include "kernels/device.cuh"

/* On GPUs where it is the quicker one it takes what it can; USL_ATTENTION=own in the environment leaves
 * usli_cuda_of(x)->cudnn NULL, USL_ATTENTION=cudnn opens it on any GPU. NULL too where the library is not found or too
 * old: no error. */
usl_status usli_cudnn_open(usli_exec *x);
/* For plans where there is no device: only the workspace's size is asked. */
usl_status usli_cudnn_open_absent(usli_exec *x);
void usli_cudnn_close(usli_exec *x);
/* Whether it has taken an attention so far. */
bool usli_cudnn_used(const usli_exec *x);
/* Bytes that usli_cudnn_attention may want for these shapes, or for shorter rows and fewer; 0: it will take none. */
size_t usli_cudnn_attention_workspace(const usli_exec *x, const usli_attention_args *a, usli_pass pass);
/* false: not for cuDNN, use the own kernels. Rows that cuDNN took forward may go backward either way: lse is the op's
 * own. */
bool usli_cudnn_attention(usli_exec *x, const usli_attention_args *a, usli_pass pass, void *ws, usl_status *st);

#endif
