/* Philox4x32-10 (Salmon et al. 2011), one source for the CPU and the kernels. */
#ifndef USLI_BASE_PHILOX_H
#define USLI_BASE_PHILOX_H

#include <stdint.h>

#if defined(__CUDACC__) || defined(USLI_EMULATED)
#define USLI_BOTH __host__ __device__
#else
#define USLI_BOTH
#endif

/* Four words for a key and a counter of 128 bits. */
static inline USLI_BOTH void usli_philox_words(uint64_t key, uint64_t lo, uint64_t hi, uint32_t out[4]) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = (uint32_t)lo, c1 = (uint32_t)(lo >> 32), c2 = (uint32_t)hi, c3 = (uint32_t)(hi >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

#endif
