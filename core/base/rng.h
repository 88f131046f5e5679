/* Random numbers. Philox for everything made in parallel (initial weights, dropout, sampling): a value depends on its
 * key and counter alone. MT19937 for the order of rows, which follows torch.randperm on the CPU. */
#ifndef USLI_BASE_RNG_H
#define USLI_BASE_RNG_H

#include <stdint.h>

/* Philox4x32-10 (Salmon et al., 2011): four random words from a 128-bit counter and a 64-bit key. */
void usli_philox(uint64_t key, uint64_t counter_lo, uint64_t counter_hi, uint32_t out[4]);

/* A plain stream over Philox. */
typedef struct usli_rng {
    uint64_t key, counter;
    uint32_t buffer[4];
    int left;
} usli_rng;
void usli_rng_seed(usli_rng *rng, uint64_t seed);
uint32_t usli_rng_u32(usli_rng *rng);
double usli_rng_uniform(usli_rng *rng); /* [0, 1), 53 bits */
double usli_rng_normal(usli_rng *rng);  /* mean 0, deviation 1 */

typedef struct usli_mt19937 {
    uint32_t state[624];
    int index;
} usli_mt19937;
void usli_mt19937_seed(usli_mt19937 *mt, uint32_t seed);
uint32_t usli_mt19937_u32(usli_mt19937 *mt);
/* The permutation that torch.randperm(n, generator seeded with seed) gives on the CPU. */
void usli_randperm(uint32_t seed, int64_t n, int64_t *out);

#endif
