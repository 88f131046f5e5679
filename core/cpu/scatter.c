#include <string.h>

#include "core/base/dtype.h"
#include "core/cpu/cpu.h"

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)x, (void)pass, (void)ws;
    const usli_scatter_args *a = args;
    size_t e = usli_dtype_bytes(a->dtype), row = (size_t)a->cols * e, from = (size_t)(a->ldx ? a->ldx : a->cols) * e;
    for (int64_t i = 0; i < a->rows; i++)
        memcpy((char *)a->y + (size_t)a->index[i] * row, (const char *)a->x + (size_t)i * from, row);
    return USL_OK;
}

const usli_op_impl usli_cpu_scatter = { run, NULL };
