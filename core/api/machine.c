/* What the header says about the machine and memory: forwards to core/base. */
#include "core/base/ctx.h"
#include "core/base/file.h"

void usl_free(usl_ctx *ctx, void *ptr) {
    usli_free(ctx, ptr);
}

uint64_t usl_peak_memory(void) {
    return usli_process_peak_bytes();
}

double usl_clock(void) {
    return usli_now();
}
