#include "core/quant/nf4.h"

#include <math.h>
#include <string.h>

#include "core/quant/codecs.h"
#include "core/quant/optim8.h"

const float usli_nf4_table[16] = {
    -1.0f,      -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f, 0.1609302f,  0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.0f,
};

/* e2m1 with bitsandbytes' bias, divided by its largest value, 12; in the order of the bits. */
const float usli_fp4_table[16] = {
    0.0f, 0.0052083335f,  0.6666667f,  1.0f,  0.33333334f,  0.5f,  0.16666667f,  0.25f,
    0.0f, -0.0052083335f, -0.6666667f, -1.0f, -0.33333334f, -0.5f, -0.16666667f, -0.25f,
};

/* A table's codes by ascending value, and the middles between neighbours: a value's code is order[bounds below it]. */
typedef struct nearest4 {
    float bounds[15];
    uint8_t order[16];
} nearest4;

static nearest4 nearest4_of(const float table[16]) {
    nearest4 s;
    for (int i = 0; i < 16; i++) {
        int at = i;
        for (; at > 0 && table[s.order[at - 1]] > table[i]; at--) s.order[at] = s.order[at - 1];
        s.order[at] = (uint8_t)i;
    }
    for (int i = 0; i < 15; i++) s.bounds[i] = (table[s.order[i]] + table[s.order[i + 1]]) / 2;
    return s;
}

/* Codes of up to 64 values times scale. The bounds are the outer loop so that the inner one has no branch. */
USLI_WIDE static void block_codes(const nearest4 *s, const float *x, int n, float scale, bool divide, uint8_t *codes) {
    float scaled[USLI_NF4_BLOCK];
    uint8_t rank[USLI_NF4_BLOCK] = { 0 };
    for (int i = 0; i < n; i++) scaled[i] = divide ? x[i] / scale : x[i] * scale;
    for (int k = 0; k < 15; k++)
        for (int i = 0; i < n; i++) rank[i] = (uint8_t)(rank[i] + (s->bounds[k] < scaled[i]));
    for (int i = 0; i < n; i++) codes[i] = s->order[rank[i]];
}

USLI_WIDE static float absmax_of(const float *x, int n) {
    float max = 0;
    for (int i = 0; i < n; i++) max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    return max;
}

/* Codes and absmax of every block of 64. Full blocks are multiplied by a reciprocal while a last short one is divided
 * and keeps a floor under its absmax: the roundings are bitsandbytes'. */
void usli_nf4_quantize_plain(const float *table, const float *src, int64_t n, uint8_t *codes, float *absmax) {
    const float tiny = 1e-38f;
    nearest4 s = nearest4_of(table);
    uint8_t zero = s.order[0];
    for (int i = 0; i < 15 && s.bounds[i] < 0; i++) zero = s.order[i + 1];
    for (int64_t i = 0; i < n; i += USLI_NF4_BLOCK) {
        int count = n - i < USLI_NF4_BLOCK ? (int)(n - i) : USLI_NF4_BLOCK;
        bool full = count == USLI_NF4_BLOCK;
        float max = absmax_of(src + i, count), floored = max < tiny ? tiny : max;
        uint8_t block[USLI_NF4_BLOCK + 1];
        block_codes(&s, src + i, count, full ? 1.0f / floored : floored, !full, block);
        block[count] = zero; /* pairs with the last of an odd count */
        for (int j = 0; j < count; j += 2) codes[(i + j) / 2] = (uint8_t)(block[j] << 4 | block[j + 1]);
        *absmax++ = full ? max : floored;
    }
}

/* bitsandbytes looks codes up in a table of 65536 steps over -1 .. 1 on the CPU; this is the step's value. The product
 * is taken in double because its float one is fused with the sum. */
static float grid_step(float x) {
    x = x > 1 ? 1 : x < -1 ? -1 : x;
    int step = (int)(float)((double)((x + 1.0f) * 0.5f) * 65535.0 + 0.5);
    return -1.0f + 2.0f * (float)step / 65535.0f;
}

static void nest_absmax(const float *absmax, int64_t blocks, float offset, const float *map, uint8_t *codes,
                        float *absmax2) {
    float bounds[256];
    usli_map_bounds(map, bounds);
    for (int64_t i = 0; i < blocks; i += USLI_NF4_NEST) {
        int count = blocks - i < USLI_NF4_NEST ? (int)(blocks - i) : USLI_NF4_NEST;
        float centred[USLI_NF4_NEST];
        for (int j = 0; j < count; j++) centred[j] = absmax[i + j] - offset;
        float max = absmax_of(centred, count);
        *absmax2++ = max;
        float inverse = 1.0f / max;
        for (int j = 0; j < count; j++)
            codes[i + j] = max == 0 ? 0 : usli_map_code(bounds, grid_step(centred[j] * inverse));
    }
}

static int64_t aligned(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

size_t usli_nf4_bytes(int64_t n) {
    if (n < 0 || n > PTRDIFF_MAX / 2) return 0;
    return (size_t)(aligned((n + 1) / 2) + aligned(usli_nf4_nests(n) * (int64_t)sizeof(float)) +
                    aligned(usli_nf4_blocks(n)));
}

void usli_nf4_layout(void *storage, int64_t n, usli_nf4 *out) {
    uint8_t *codes = storage, *absmax2 = codes + aligned((n + 1) / 2);
    *out = (usli_nf4){
        .codes = codes,
        .absmax2 = (const float *)(const void *)absmax2,
        .absmax_q = absmax2 + aligned(usli_nf4_nests(n) * (int64_t)sizeof(float)),
        .table = usli_nf4_table,
        .map = usli_dynamic_map,
    };
}

void usli_nf4_quantize(usli_nf4 *q, const float *src, int64_t n, float *scratch) {
    usli_nf4_quantize_plain(q->table, src, n, (uint8_t *)q->codes, scratch);
    usli_nf4_nest(q, scratch, usli_nf4_blocks(n));
}

void usli_nf4_nest(usli_nf4 *q, const float *scratch, int64_t blocks) {
    /* In double the mean does not depend on the order that a float sum would be taken in. */
    double sum = 0;
    for (int64_t i = 0; i < blocks; i++) sum += (double)scratch[i];
    q->offset = blocks ? (float)(sum / (double)blocks) : 0;
    nest_absmax(scratch, blocks, q->offset, q->map, (uint8_t *)q->absmax_q, (float *)q->absmax2);
}

static float absmax_at(const usli_nf4 *q, int64_t block) {
    return q->absmax_q ? q->map[q->absmax_q[block]] * q->absmax2[block / USLI_NF4_NEST] + q->offset : q->absmax[block];
}

/* Both values of every byte. */
typedef struct pairs {
    float of[256][2];
} pairs;

static void make_pairs(const float table[16], pairs *p) {
    for (int byte = 0; byte < 256; byte++) {
        p->of[byte][0] = table[byte >> 4];
        p->of[byte][1] = table[byte & 15];
    }
}

/* Values first .. first + count - 1, all of one block. */
static void decode_part(const uint8_t *codes, const pairs *p, float absmax, int64_t first, int64_t count, float *dst) {
    int64_t i = 0;
    if (first % 2 && count) dst[i++] = p->of[codes[first / 2]][1] * absmax;
    const uint8_t *byte = codes + (first + i) / 2;
    for (; i + 2 <= count; i += 2, byte++) {
        dst[i] = p->of[*byte][0] * absmax;
        dst[i + 1] = p->of[*byte][1] * absmax;
    }
    if (i < count) dst[i] = p->of[*byte][0] * absmax;
}

void usli_nf4_decode(const usli_nf4 *q, int64_t first, int64_t count, float *dst) {
    pairs p;
    make_pairs(q->table, &p);
    for (int64_t done = 0; done < count;) {
        int64_t at = first + done, block = at / USLI_NF4_BLOCK, end = (block + 1) * USLI_NF4_BLOCK;
        int64_t part = end - at < count - done ? end - at : count - done;
        decode_part(q->codes, &p, absmax_at(q, block), at, part, dst + done);
        done += part;
    }
}

/* ---- As types of the traits table: codes of all n values, then their absmax as floats (no nesting) -----------------
 */

static void decode_plain(const float *table, const uint8_t *codes, float *dst, int64_t n) {
    pairs p;
    make_pairs(table, &p);
    for (int64_t i = 0; i < n; i += USLI_NF4_BLOCK) {
        float absmax;
        /* The floats behind n / 2 bytes need not be aligned. */
        memcpy(&absmax, codes + n / 2 + i / USLI_NF4_BLOCK * 4, sizeof absmax);
        decode_part(codes, &p, absmax, i, USLI_NF4_BLOCK, dst + i);
    }
}

static void encode_plain(const float *table, const float *src, uint8_t *codes, int64_t n) {
    for (int64_t i = 0; i < n; i += USLI_NF4_BLOCK) {
        float absmax;
        usli_nf4_quantize_plain(table, src + i, USLI_NF4_BLOCK, codes + i / 2, &absmax);
        memcpy(codes + n / 2 + i / USLI_NF4_BLOCK * 4, &absmax, sizeof absmax);
    }
}

void usli_decode_nf4(const void *src, float *dst, int64_t n) {
    decode_plain(usli_nf4_table, src, dst, n);
}
void usli_encode_nf4(const float *src, const float *importance, void *dst, int64_t n) {
    (void)importance;
    encode_plain(usli_nf4_table, src, dst, n);
}
void usli_decode_fp4(const void *src, float *dst, int64_t n) {
    decode_plain(usli_fp4_table, src, dst, n);
}
void usli_encode_fp4(const float *src, const float *importance, void *dst, int64_t n) {
    (void)importance;
    encode_plain(usli_fp4_table, src, dst, n);
}
