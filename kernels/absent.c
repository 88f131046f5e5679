/* What stands in for the CUDA backend in a build without nvcc. */
#include "kernels/cuda.h"

int usli_cuda_count(void) {
    return 0;
}

usl_status usli_cuda_open_absent(usl_ctx *ctx, usli_exec *x) {
    (void)x;
    return usli_fail(
        ctx, USL_ERR_UNSUPPORTED,
        "device \"cuda\": this program was built without CUDA and does not know what its kernels need; plan "
        "with device = \"cpu\", or build it where nvcc is installed");
}

usl_status usli_cuda_open(usl_ctx *ctx, int device, usli_exec *x) {
    (void)x;
    return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                     "device \"cuda:%d\": this program was built without CUDA; use device = \"cpu\", or build it where "
                     "nvcc is installed",
                     device);
}
