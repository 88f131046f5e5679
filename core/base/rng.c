#include "core/base/rng.h"

#include <math.h>

#include "core/base/philox.h"

void usli_philox(uint64_t key, uint64_t lo, uint64_t hi, uint32_t out[4]) {
    usli_philox_words(key, lo, hi, out);
}

void usli_rng_seed(usli_rng *rng, uint64_t seed) {
    rng->key = seed;
    rng->counter = 0;
    rng->left = 0;
}

uint32_t usli_rng_u32(usli_rng *rng) {
    if (rng->left == 0) {
        usli_philox(rng->key, rng->counter++, 0, rng->buffer);
        rng->left = 4;
    }
    return rng->buffer[--rng->left];
}

double usli_rng_uniform(usli_rng *rng) {
    uint64_t hi = usli_rng_u32(rng) >> 5, lo = usli_rng_u32(rng) >> 6;
    return (double)(hi << 26 | lo) / 9007199254740992.0;
}

double usli_rng_normal(usli_rng *rng) {
    double u = 1.0 - usli_rng_uniform(rng), v = usli_rng_uniform(rng);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

void usli_mt19937_seed(usli_mt19937 *mt, uint32_t seed) {
    mt->state[0] = seed;
    for (uint32_t i = 1; i < 624; i++) mt->state[i] = 1812433253u * (mt->state[i - 1] ^ (mt->state[i - 1] >> 30)) + i;
    mt->index = 624;
}

uint32_t usli_mt19937_u32(usli_mt19937 *mt) {
    if (mt->index == 624) {
        for (int i = 0; i < 624; i++) {
            uint32_t y = (mt->state[i] & 0x80000000u) | (mt->state[(i + 1) % 624] & 0x7fffffffu);
            mt->state[i] = mt->state[(i + 397) % 624] ^ (y >> 1) ^ (y & 1u ? 0x9908b0dfu : 0u);
        }
        mt->index = 0;
    }
    uint32_t y = mt->state[mt->index++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

void usli_randperm(uint32_t seed, int64_t n, int64_t *out) {
    usli_mt19937 mt;
    usli_mt19937_seed(&mt, seed);
    for (int64_t i = 0; i < n; i++) out[i] = i;
    for (int64_t i = 0; i < n - 1; i++) {
        int64_t z = (int64_t)(usli_mt19937_u32(&mt) % (uint32_t)(n - i));
        int64_t t = out[i];
        out[i] = out[i + z];
        out[i + z] = t;
    }
}
