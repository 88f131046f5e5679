/* Which values a dropout drops, the same on every backend. Each (token, feature) has a draw of its own:
 *
 *   key      seed ^ mix(layer, module)
 *   counter  feature / 4 | position | data-set row | update, 32 bits each, lowest first
 *   word     feature % 4 of Philox's four; dropped when word < p * 2^32, else the value is divided by 1 - p
 */
#ifndef USLI_OPS_DROPOUT_H
#define USLI_OPS_DROPOUT_H

#include "core/base/philox.h"
#include "core/ops/ops.h"

static inline USLI_BOTH uint64_t usli_dropout_key(const usli_dropout *d) {
    uint64_t z = ((uint64_t)d->layer << 32 | d->module) + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return d->seed ^ z ^ (z >> 31);
}

static inline USLI_BOTH uint32_t usli_dropout_threshold(float p) {
    return (uint32_t)((double)p * 4294967296.0);
}

/* The four words of features 4 * group .. 4 * group + 3 of a token. */
static inline USLI_BOTH void usli_dropout_words(const usli_dropout *d, uint64_t key, int64_t token, int64_t group,
                                                uint32_t words[4]) {
    uint64_t low = (uint64_t)(uint32_t)group | (uint64_t)(uint32_t)d->position[token] << 32;
    uint64_t high = (uint64_t)(uint32_t)d->row[token] | (uint64_t)(uint32_t)*d->update << 32;
    usli_philox_words(key, low, high, words);
}

#endif
