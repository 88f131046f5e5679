#include "core/quant/lanes.h"

const usli_lanes *usli_lanes_best(void) {
#if defined(__x86_64__)
    /* Whatever has AVX2 has F16C too. */
    if (__builtin_cpu_supports("avx2")) return &usli_lanes_avx2;
#endif
    return &usli_lanes_generic;
}
