#define _GNU_SOURCE
#include "core/base/processor.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Of asm/prctl.h, which older systems lack: permission for a feature of XCR0, for all threads of the process. */
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 }; /* leaf 7, edx */

bool usli_may_use_amx(void) {
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("avx512bf16") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & AMX_BF16) || !(d & AMX_TILE)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
bool usli_may_use_amx(void) {
    return false;
}
#endif
