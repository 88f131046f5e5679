/* The CUDA backend's door for the floors above: opens a device, fills an exec. Built without nvcc, kernels/absent.c
 * answers instead and says so. */
#ifndef USLI_KERNELS_CUDA_H
#define USLI_KERNELS_CUDA_H

#include "core/ops/ops.h"

/* Devices that can be used now; 0 without a driver, without a GPU or without CUDA in the build. */
int usli_cuda_count(void);
/* "cuda" is device 0, "cuda:1" device 1: sets x->backend, x->state, x->stream. USL_ERR_UNSUPPORTED with a sentence when
 * there is none. Close with x->backend->close(x). */
usl_status usli_cuda_open(usl_ctx *ctx, int device, usli_exec *x);
/* No device at all, for planning where there is none: an H100's workspaces, nothing that could run or hold memory. */
usl_status usli_cuda_open_absent(usl_ctx *ctx, usli_exec *x);

#endif
