/* The cheapest of all points: included by points.c, which is built for several instruction sets.
 *
 * What a value loses with each level of its digit, against the best level, comes here as eight bits, so that all points
 * are compared by table look-ups alone, 32 at a time. Every build finds the same point. */
#ifndef USLI_QUANT_POINTS_SEARCH_H
#define USLI_QUANT_POINTS_SEARCH_H

#include <stdbool.h>
#include <string.h>

#include "core/quant/fit.h"
#include "core/quant/points.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* Choosing points is one function for each shape of lattice. */
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8, GROUP = 8, PARTS = 4, MOST_COST = 255 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t lanes_i __attribute__((vector_size(LANES * sizeof(int32_t))));

/* What is known when this is compiled. */
typedef struct shape {
    int bits;
    usli_signs signs;
} shape;

INLINE int points_of(shape s) {
    return s.bits == 2 ? 1 : 2; /* in a group of eight values */
}
INLINE int levels_of(shape s) {
    return s.bits == 2 ? 3 : 8;
}
INLINE bool is_shifted(usli_signs signs) {
    return signs == USLI_SIGNS_SHIFT || signs == USLI_SIGNS_SHIFTS;
}
/* Many points are searched run by run. */
INLINE bool by_runs(shape s) {
    return is_shifted(s.signs);
}

INLINE lanes splat(float x) {
    return (lanes){ x, x, x, x, x, x, x, x };
}
INLINE lanes load(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE lanes pick(lanes_i mask, lanes a, lanes b) {
    return (lanes)((mask & (lanes_i)a) | (~mask & (lanes_i)b));
}
INLINE lanes smaller(lanes a, lanes b) {
#if defined(__AVX2__)
    return (lanes)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return pick(a < b, a, b);
#endif
}
INLINE float sum(lanes v) {
    float a[LANES];
    memcpy(a, &v, sizeof a);
    return usli_lane_sum(a);
}
/* The first of the lanes that are least. */
INLINE int least_lane(lanes v) {
#if defined(__AVX2__)
    lanes m = smaller(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    m = smaller(m, __builtin_shufflevector(m, m, 2, 3, 0, 1, 6, 7, 4, 5));
    m = smaller(m, __builtin_shufflevector(m, m, 1, 0, 3, 2, 5, 4, 7, 6));
    return __builtin_ctz((unsigned)_mm256_movemask_ps((__m256)(v == m)) | 1u << (LANES - 1));
#else
    int at = 0;
    for (int k = 1; k < LANES; k++) at = v[k] < v[at] ? k : at;
    return at;
#endif
}

/* Costs by what each part of a point is (core/quant/grids.h). */
typedef struct costs {
    uint8_t of[PARTS][16];
} costs;

typedef struct found {
    int cost, at;
} found;

#if !defined(__AVX2__)
INLINE uint8_t cost_of_both(int a, int b, bool lesser) {
    return (uint8_t)(lesser ? (a < b ? a : b) : a + b < MOST_COST ? a + b : MOST_COST);
}
#endif

/* c: of eight values by level, as whole numbers: to costs of the parts of their points. Pairs of digits make a part
 * where there are two bits: it costs what both do, or the lesser. */
INLINE void costs_of(shape s, const lanes *c, bool lesser, costs *out) {
#if defined(__AVX2__)
    const __m256i by_value = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5,
                                              9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i w[8], b[2];
    for (int l = 0; l < (s.bits == 2 ? 4 : 8); l++) w[l] = _mm256_cvtps_epi32((__m256)c[l < levels_of(s) ? l : 2]);
    for (int h = 0; h < (s.bits == 2 ? 1 : 2); h++) {
        b[h] = _mm256_packus_epi16(_mm256_packs_epi32(w[4 * h], w[4 * h + 1]),
                                   _mm256_packs_epi32(w[4 * h + 2], w[4 * h + 3]));
        b[h] = _mm256_shuffle_epi8(b[h], by_value);
    }
    if (s.bits == 3) {
        __m256i first = _mm256_unpacklo_epi32(b[0], b[1]), second = _mm256_unpackhi_epi32(b[0], b[1]);
        for (int p = 0; p < 2; p++) {
            __m128i a = p ? _mm256_extracti128_si256(first, 1) : _mm256_castsi256_si128(first);
            __m128i d = p ? _mm256_extracti128_si256(second, 1) : _mm256_castsi256_si128(second);
            _mm_storeu_si128((__m128i *)(void *)out[p].of[0], _mm_unpacklo_epi64(a, a));
            _mm_storeu_si128((__m128i *)(void *)out[p].of[1], _mm_unpackhi_epi64(a, a));
            _mm_storeu_si128((__m128i *)(void *)out[p].of[2], _mm_unpacklo_epi64(d, d));
            _mm_storeu_si128((__m128i *)(void *)out[p].of[3], _mm_unpackhi_epi64(d, d));
        }
        return;
    }
    for (int q = 0; q < 2; q++) {
        const __m256i low = _mm256_add_epi8(_mm256_set1_epi8((char)(8 * q)), _mm256_set1_epi32(0x03020100));
        const __m256i high = _mm256_add_epi8(
            _mm256_set1_epi8((char)(8 * q + 4)),
            _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0, 0x01010101, 0x02020202, 0x03030303));
        __m256i x = _mm256_shuffle_epi8(b[0], low), y = _mm256_shuffle_epi8(b[0], high);
        x = lesser ? _mm256_min_epu8(x, y) : _mm256_adds_epu8(x, y);
        _mm_storeu_si128((__m128i *)(void *)out->of[q], _mm256_castsi256_si128(x));
        _mm_storeu_si128((__m128i *)(void *)out->of[2 + q], _mm256_extracti128_si256(x, 1));
    }
#else
    uint8_t w[GROUP][8];
    for (int l = 0; l < (s.bits == 2 ? 4 : 8); l++)
        for (int k = 0; k < GROUP; k++) w[k][l] = (uint8_t)usli_roundf(c[l < levels_of(s) ? l : 2][k]);
    if (s.bits == 3) {
        for (int k = 0; k < GROUP; k++)
            for (int i = 0; i < 16; i += 8) memcpy(out[k / PARTS].of[k % PARTS] + i, w[k], sizeof w[k]);
        return;
    }
    for (int q = 0; q < PARTS; q++)
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 4; i++) {
                uint8_t a = w[2 * q][i], b = w[2 * q + 1][j];
                out->of[q][4 * j + i] = cost_of_both(a, b, lesser);
            }
#endif
}

#if defined(__AVX2__)
typedef __m256i bytes;

INLINE bytes load_bytes(const uint8_t *p) {
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}
/* What four parts cost, by table; the last two make the higher half. */
typedef struct tables {
    bytes of[PARTS];
} tables;
INLINE tables tables_of(const costs *c) {
    tables t;
    for (int q = 0; q < PARTS; q++)
        t.of[q] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)c->of[q]));
    return t;
}
INLINE int least_byte(bytes b) {
    __m128i m = _mm_min_epu8(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    return _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_min_epu8(m, _mm_srli_epi16(m, 8)))) & 255;
}
INLINE unsigned where_equal(bytes a, bytes b) {
    return (unsigned)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, b));
}
INLINE bytes splat_byte(int x) {
    return _mm256_set1_epi8((char)x);
}

/* The least so far, by lanes, and the multiple of 32 where it was. */
typedef struct lead {
    bytes cost, at;
} lead;
INLINE void follow(lead *l, bytes cost, int i) {
    bytes least = _mm256_min_epu8(l->cost, cost);
    l->at = _mm256_blendv_epi8(splat_byte(i / 32), l->at, _mm256_cmpeq_epi8(least, l->cost));
    l->cost = least;
}
/* The first. */
INLINE found leader(const lead *l) {
    int cost = least_byte(l->cost);
    bytes at = _mm256_or_si256(l->at, _mm256_xor_si256(_mm256_cmpeq_epi8(l->cost, splat_byte(cost)), splat_byte(255)));
    int block = least_byte(at);
    if (cost == MOST_COST) return (found){ cost, 0 };
    return (found){ cost, 32 * block + __builtin_ctz(where_equal(at, splat_byte(block))) };
}

/* All points are looked at; the first of the cheapest is found. */
INLINE void search_all(const usli_runs *runs, const costs *plain, const costs *wrong, found *best, found *with) {
    tables p = tables_of(plain), w = tables_of(wrong ? wrong : plain);
    lead without = { splat_byte(255), splat_byte(255) }, one = without;
    for (int i = 0; i < runs->points; i += 32) {
        bytes part[PARTS], c;
        for (int q = 0; q < PARTS; q++) part[q] = load_bytes(runs->part[q] + i);
        c = _mm256_adds_epu8(
            _mm256_adds_epu8(_mm256_shuffle_epi8(p.of[0], part[0]), _mm256_shuffle_epi8(p.of[1], part[1])),
            _mm256_adds_epu8(_mm256_shuffle_epi8(p.of[2], part[2]), _mm256_shuffle_epi8(p.of[3], part[3])));
        if (best) follow(&without, c, i);
        if (!wrong) continue;
        c = _mm256_adds_epu8(
            c, _mm256_min_epu8(
                   _mm256_min_epu8(_mm256_shuffle_epi8(w.of[0], part[0]), _mm256_shuffle_epi8(w.of[1], part[1])),
                   _mm256_min_epu8(_mm256_shuffle_epi8(w.of[2], part[2]), _mm256_shuffle_epi8(w.of[3], part[3]))));
        follow(&one, c, i);
    }
    if (best) *best = leader(&without);
    if (wrong) *with = leader(&one);
}

INLINE void look_at(const usli_runs *runs, const tables *p, const uint8_t *high, int run, found *best) {
    bytes c = _mm256_adds_epu8(_mm256_adds_epu8(_mm256_shuffle_epi8(p->of[0], load_bytes(runs->low[0][run])),
                                                _mm256_shuffle_epi8(p->of[1], load_bytes(runs->low[1][run]))),
                               splat_byte(high[run]));
    if (!where_equal(_mm256_min_epu8(c, splat_byte(best->cost - 1)), c)) return;
    best->cost = least_byte(c);
    best->at = runs->start[run] + __builtin_ctz(where_equal(c, splat_byte(best->cost)));
}

/* The run whose higher half costs least, then those whose higher half alone does not cost too much. */
INLINE void search_runs(const usli_runs *runs, const costs *plain, found *best) {
    enum { VECTORS = USLI_MOST_RUNS / 32 };
    tables p = tables_of(plain);
    uint8_t high[USLI_MOST_RUNS];
    bytes h[VECTORS];
    lead cheapest = { splat_byte(255), splat_byte(255) };
    for (int i = 0; i < VECTORS; i++) {
        h[i] = _mm256_adds_epu8(_mm256_shuffle_epi8(p.of[2], load_bytes(runs->high[0] + 32 * i)),
                                _mm256_shuffle_epi8(p.of[3], load_bytes(runs->high[1] + 32 * i)));
        _mm256_storeu_si256((__m256i *)(void *)(high + 32 * i), h[i]);
        follow(&cheapest, h[i], 32 * i);
    }
    *best = (found){ MOST_COST, 0 };
    look_at(runs, &p, high, leader(&cheapest).at, best);
    for (int i = 0; i < VECTORS && best->cost; i++) {
        unsigned left = where_equal(_mm256_min_epu8(h[i], splat_byte(best->cost - 1)), h[i]);
        for (; left; left &= left - 1) {
            int run = 32 * i + __builtin_ctz(left);
            if (high[run] < best->cost) look_at(runs, &p, high, run, best);
        }
    }
}

/* with: the same with the costs of one wrong sign added. Either may not be wanted. */
INLINE void search(shape s, const usli_grid *grid, const usli_runs *runs, const costs *plain, const costs *wrong,
                   found *best, found *with) {
    (void)grid;
    if (by_runs(s))
        search_runs(runs, plain, best);
    else
        search_all(runs, plain, wrong, best, with);
}
#else
/* What halves of points cost, the lower and the higher, by their bits. */
typedef struct halves {
    uint8_t low[256], high[256];
} halves;

INLINE void halves_of(shape s, const costs *c, bool lesser, halves *out) {
    int bits = s.bits == 2 ? 4 : 3;
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 1 << bits; j++)
            for (int i = 0; i < 1 << bits; i++) {
                int a = c->of[2 * h][i], b = c->of[2 * h + 1][j];
                (h ? out->high : out->low)[j << bits | i] = cost_of_both(a, b, lesser);
            }
}

INLINE void look_at(shape s, const usli_grid *grid, const usli_runs *runs, const halves *p, const halves *w, int run,
                    found *best) {
    int bits = s.bits == 2 ? 8 : 6, h = grid->points[runs->start[run]] >> bits, high = p->high[h];
    for (int i = runs->start[run]; high < best->cost && i < runs->start[run + 1]; i++) {
        int l = grid->points[i] & ((1 << bits) - 1), cost = high + p->low[l];
        if (w) cost += w->low[l] < w->high[h] ? w->low[l] : w->high[h];
        if (cost < best->cost) *best = (found){ cost, i };
    }
}

INLINE void search(shape s, const usli_grid *grid, const usli_runs *runs, const costs *plain, const costs *wrong,
                   found *best, found *with) {
    halves p, w;
    halves_of(s, plain, false, &p);
    if (wrong) halves_of(s, wrong, true, &w);
    if (by_runs(s)) {
        int first = 0, least = MOST_COST + 1;
        for (int r = 0; r < runs->count; r++) {
            int high = p.high[grid->points[runs->start[r]] >> 8];
            if (high < least) first = r;
            if (high < least) least = high;
        }
        *best = (found){ MOST_COST, 0 };
        look_at(s, grid, runs, &p, NULL, first, best);
    } else if (best) {
        *best = (found){ MOST_COST, 0 };
    }
    if (wrong) *with = (found){ MOST_COST, 0 };
    for (int r = 0; r < runs->count; r++) {
        if (best) look_at(s, grid, runs, &p, NULL, r, best);
        if (wrong) look_at(s, grid, runs, &p, &w, r, with);
    }
}
#endif

#endif
