/* softcap. A row of 256,000 logits: 2 MB in and out. */
#include "kernels/device.cuh"

namespace {

enum { THREADS = 256 };

__global__ void __launch_bounds__(THREADS) cap(usli_softcap_args a) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < a.n) a.z[i] = a.softcap * tanhf(a.z[i] / a.softcap);
}

usl_status run(usli_exec *x, void *args, usli_pass, void *) {
    const usli_softcap_args *a = static_cast<const usli_softcap_args *>(args);
    if (!a->n) return USL_OK;
    USLI_LAUNCH((unsigned)usli_ceil_div(a->n, THREADS), THREADS, 0, x, cap)(*a);
    return usli_launched(x, "softcap");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_softcap = { run, nullptr };
