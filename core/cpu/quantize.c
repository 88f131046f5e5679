#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/quant/traits.h"

enum { VALUES = 4096 }; /* of a task, a multiple of every type's block */

static void quantize_task(void *arg, int64_t task, int worker) {
    const usli_quantize_args *a = arg;
    int64_t pieces = (a->cols + VALUES - 1) / VALUES, row = task / pieces, col = task % pieces * VALUES;
    int64_t n = a->cols - col < VALUES ? a->cols - col : VALUES;
    const char *from = (const char *)a->x + (size_t)(row * a->cols + col) * usli_dtype_bytes(a->dtype);
    char *to = (char *)a->y + usli_row_bytes(a->type, row * a->cols + col);
    float values[VALUES];
    (void)worker;
    usli_to_f32(from, a->dtype, values, n);
    usli_traits_of(a->type)->encode(values, a->importance ? a->importance + col : NULL, to, n);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_quantize_args *a = args;
    (void)pass, (void)ws;
    usli_pool_run(x->ctx->pool, a->rows * ((a->cols + VALUES - 1) / VALUES), quantize_task, args);
    return USL_OK;
}

const usli_op_impl usli_cpu_quantize = { run, NULL };
