#include "core/base/digest.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static uint32_t rotl(uint32_t x, int n) {
    return x << n | x >> (32 - n);
}

static uint32_t rotr(uint32_t x, int n) {
    return x >> n | x << (32 - n);
}

static uint32_t load_be(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* FIPS 180-4, 4.2.2: the first 32 bits of the fractions of the cube roots of the first 64 primes. */
static const uint32_t K256[64] = { 0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
                                   0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
                                   0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
                                   0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
                                   0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
                                   0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
                                   0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
                                   0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
                                   0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
                                   0xc67178f2 };

static void sha256_block(uint32_t *h, const uint8_t *p) {
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++) w[i] = load_be(p + 4 * i);
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotr(a, 7) ^ rotr(a, 18) ^ a >> 3) + w[i - 7] + (rotr(b, 17) ^ rotr(b, 19) ^ b >> 10);
    }
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t e = s[4], a = s[0];
        uint32_t t = s[7] + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + K256[i] + w[i];
        uint32_t u = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t;
        s[0] = t + u;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

static void sha1_block(uint32_t *h, const uint8_t *p) {
    static const uint32_t K[4] = { 0x5a827999, 0x6ed9eba1, 0x8f1bbcdc, 0xca62c1d6 };
    uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (int i = 0; i < 16; i++) w[i] = load_be(p + 4 * i);
    for (int i = 16; i < 80; i++) w[i] = rotl(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    for (int i = 0; i < 80; i++) {
        uint32_t f = i < 20 ? (b & c) | (~b & d) : i >= 40 && i < 60 ? (b & c) | (b & d) | (c & d) : b ^ c ^ d;
        uint32_t t = rotl(a, 5) + f + e + K[i / 20] + w[i];
        e = d, d = c, c = rotl(b, 30), b = a, a = t;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
}

void usli_digest_init(usli_digest *d, usli_digest_kind kind) {
    static const uint32_t START[2][8] = { { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0 },
                                          { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c,
                                            0x1f83d9ab, 0x5be0cd19 } };
    d->kind = kind;
    d->size = 0;
    memcpy(d->state, START[kind], sizeof d->state);
}

static void mix(usli_digest *d, const uint8_t *block) {
    if (d->kind == USLI_SHA1)
        sha1_block(d->state, block);
    else
        sha256_block(d->state, block);
}

void usli_digest_add(usli_digest *d, const void *data, size_t size) {
    const uint8_t *p = data;
    size_t used = (size_t)(d->size % 64);
    d->size += size;
    if (used) {
        size_t n = 64 - used < size ? 64 - used : size;
        memcpy(d->block + used, p, n);
        if (used + n < 64) return;
        mix(d, d->block);
        p += n;
        size -= n;
    }
    for (; size >= 64; p += 64, size -= 64) mix(d, p);
    if (size) memcpy(d->block, p, size);
}

void usli_digest_end(usli_digest *d, char hex[USLI_DIGEST_HEX]) {
    static const uint8_t PAD[64] = { 0x80 };
    uint8_t bits[8];
    for (int i = 0; i < 8; i++) bits[i] = (uint8_t)(d->size * 8 >> (56 - 8 * i));
    usli_digest_add(d, PAD, 1 + (size_t)((119 - d->size % 64) % 64));
    usli_digest_add(d, bits, sizeof bits);
    for (int i = 0; i < (d->kind == USLI_SHA1 ? 5 : 8); i++) snprintf(hex + 8 * i, 9, "%08x", (unsigned)d->state[i]);
}

void usli_digest_git_blob(usli_digest *d, uint64_t size) {
    char head[32];
    int n = snprintf(head, sizeof head, "blob %llu", (unsigned long long)size);
    usli_digest_init(d, USLI_SHA1);
    usli_digest_add(d, head, (size_t)n + 1);
}
