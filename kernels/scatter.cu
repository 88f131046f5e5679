/* scatter: keys and values into their cache. */
#include "kernels/device.cuh"

namespace {

enum { THREADS = 128 };

template <typename Unit>
__global__ void __launch_bounds__(THREADS)
    put_rows(const Unit *x, Unit *y, const int32_t *index, int64_t units, int64_t ldx) {
    await_earlier();
    int64_t row = blockIdx.x;
    const Unit *from = x + row * ldx;
    Unit *to = y + index[row] * units;
    for (int64_t i = threadIdx.x; i < units; i += THREADS) to[i] = from[i];
}

template <typename Unit> void launch(usli_exec *x, const usli_scatter_args *a, int64_t bytes, int64_t ld_bytes) {
    USLI_LAUNCH_EARLY((unsigned)a->rows, THREADS, 0, x, put_rows<Unit>)
    (static_cast<const Unit *>(a->x), static_cast<Unit *>(a->y), a->index, bytes / (int64_t)sizeof(Unit),
     ld_bytes / (int64_t)sizeof(Unit));
}

usl_status run(usli_exec *x, void *args, usli_pass, void *) {
    const usli_scatter_args *a = static_cast<const usli_scatter_args *>(args);
    int64_t e = a->dtype == USL_F32 ? 4 : 2, bytes = a->cols * e, ld = (a->ldx ? a->ldx : a->cols) * e;
    if (!a->rows) return USL_OK;
    if (bytes % 16 == 0 && ld % 16 == 0 && usli_aligned16(a->x) && usli_aligned16(a->y))
        launch<uint4>(x, a, bytes, ld);
    else
        launch<uint16_t>(x, a, bytes, ld);
    return usli_launched(x, "scatter");
}

} // namespace

extern "C" const usli_op_impl usli_cuda_scatter = { run, nullptr };
