#include "core/cpu/cpu.h"

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_balance_args *a = args;
    (void)x, (void)pass, (void)ws;
    for (int m = 0; m < a->micros; m++) {
        const int32_t *counts = a->counts + (int64_t)m * a->experts;
        const float *mass = a->mass + (int64_t)m * a->experts;
        double n = (double)a->layers * (a->micro[m + 1] - a->micro[m]), sum = 0;
        double factor = n > 0 ? (double)a->coefficient * a->experts / (n * n) : 0;
        for (int e = 0; e < a->experts; e++) {
            sum += (double)counts[e] * (double)mass[e];
            a->dmass[(int64_t)m * a->experts + e] = (float)(factor * counts[e] * (double)a->update->loss_scale);
        }
        a->update->balance += factor * sum;
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_balance = { run, NULL };
