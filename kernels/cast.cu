#include "kernels/decode.cuh"

static usl_status run(usli_exec *x, void *args, usli_pass, void *) {
    const usli_cast_args *a = static_cast<const usli_cast_args *>(args);
    return usli_cuda_decode(x, &a->src, a->dtype, a->dst, a->ld ? a->ld : a->src.cols);
}

extern "C" const usli_op_impl usli_cuda_cast = { run, nullptr };
