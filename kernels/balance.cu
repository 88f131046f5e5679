/* balance: one block, since there are a few thousand numbers at most. */
#include "kernels/device.cuh"

namespace {

enum { THREADS = 256 };

/* The sums are in double and in the order of micro-batches and experts. */
__global__ void __launch_bounds__(THREADS) balance(usli_balance_args a) {
    double all = 0;
    for (int m = 0; m < a.micros; m++) {
        const int32_t *counts = a.counts + (int64_t)m * a.experts;
        const float *mass = a.mass + (int64_t)m * a.experts;
        double n = (double)a.layers * (a.micro[m + 1] - a.micro[m]), sum = 0;
        double factor = n > 0 ? (double)a.coefficient * a.experts / (n * n) : 0;
        for (int e = (int)threadIdx.x; e < a.experts; e += THREADS)
            a.dmass[(int64_t)m * a.experts + e] = (float)(factor * counts[e] * (double)a.update->loss_scale);
        for (int e = 0; threadIdx.x == 0 && e < a.experts; e++) sum += (double)counts[e] * (double)mass[e];
        all += factor * sum;
    }
    if (threadIdx.x == 0) a.update->balance += all;
}

usl_status run(usli_exec *x, void *args, usli_pass, void *) {
    const usli_balance_args *a = static_cast<const usli_balance_args *>(args);
    USLI_LAUNCH(1, THREADS, 0, x, balance)(*a);
    return usli_launched(x, "balance");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_balance = { run, nullptr };
