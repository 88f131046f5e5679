/* Finding lattice points, built for several instruction sets under several names, as lanes.c.
 *
 * For a given scale the point nearest to a group of values, each difference weighted, is found exactly: what every
 * level of every digit costs is summed up for all halves of points, and among the pairs of halves that are points the
 * cheapest is sought, run by run; runs whose higher half costs too much whatever stands below it are left out. Where
 * the number of minuses must be even, the cheapest wrong sign is part of that search. The scale itself is guessed, and
 * solved for by least squares with the points that it leads to. */
#include "core/quant/lanes.h"

#include <float.h>
#include <stdbool.h>
#include <string.h>

#include "core/base/half.h"
#include "core/quant/fit.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
/* Choosing points is one function for each shape of lattice. */
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8, GROUP = 8, MOST_SPAN = 32, MOST_HALVES = 176 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t lanes_i __attribute__((vector_size(LANES * sizeof(int32_t))));

/* What is known when this is compiled. */
typedef struct shape {
    int bits, digits;
    usli_signs signs;
} shape;

INLINE lanes splat(float x) {
    return (lanes){ x, x, x, x, x, x, x, x };
}
INLINE lanes load(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, lanes v) {
    memcpy(p, &v, sizeof v);
}
INLINE lanes smaller(lanes a, lanes b) {
    lanes_i mask = a < b;
    return (lanes)((mask & (lanes_i)a) | (~mask & (lanes_i)b));
}
/* A bit for every lane that is set. */
INLINE unsigned bits_of(lanes_i mask) {
#if defined(__AVX2__)
    return (unsigned)_mm256_movemask_ps((__m256)mask);
#else
    unsigned bits = 0;
    for (int k = 0; k < LANES; k++) bits |= (unsigned)(mask[k] & 1) << k;
    return bits;
#endif
}

/* ---- One point -----------------------------------------------------------------------------------------------------
 */

/* Costs of all halves of points, by their digits: with four of three levels some places stand for none and cost more
 * than any. least: of the lower ones. */
typedef struct halves {
    float low[MOST_HALVES], high[MOST_HALVES], least;
} halves;

typedef struct group {
    halves plain, wrong;                         /* the values as they are, and with one sign wrong */
    float cost[GROUP][LANES], add[GROUP][LANES]; /* of a value by level, and what the wrong sign adds */
    int nearest;                                 /* the higher half that costs least */
} group;

typedef struct found {
    float cost;
    int at;
} found;

INLINE int half_count(shape s) {
    return s.bits == 2 ? MOST_HALVES : 64;
}

/* The cost of half a point from those of its digits: their sum, or the minimum. */
INLINE void half_of(shape s, const float c[][LANES], bool minimum, float *out) {
    if (s.bits == 3) {
        lanes a = load(c[0]);
        for (int j = 0; j < 8; j++) store(out + 8 * j, minimum ? smaller(a, splat(c[1][j])) : a + splat(c[1][j]));
        return;
    }
    float pair[2][16];
    for (int p = 0; p < 2; p++)
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 4; i++) {
                float a = c[2 * p][i], b = c[2 * p + 1][j];
                pair[p][4 * j + i] = minimum ? (a < b ? a : b) : a + b;
            }
    lanes first = load(pair[0]), second = load(pair[0] + LANES);
    for (int j = 0; j < 11; j++) {
        lanes b = splat(pair[1][j]);
        store(out + 16 * j, minimum ? smaller(first, b) : first + b);
        store(out + 16 * j + LANES, minimum ? smaller(second, b) : second + b);
    }
}

INLINE float least_of(shape s, const float *costs) {
    lanes least = load(costs);
    for (int i = LANES; i < half_count(s); i += LANES) least = smaller(load(costs + i), least);
    float out = least[0];
    for (int k = 1; k < LANES; k++) out = least[k] < out ? least[k] : out;
    return out;
}

/* y: values, or magnitudes where signs stand apart; w: weights; both of one point. signs: wrong ones are asked for. */
INLINE void costs_of(shape s, const float *levels, const float *y, const float *w, float scale, bool signs, group *g) {
    const lanes beyond = { 0, 0, 0, FLT_MAX / 64, FLT_MAX / 64, FLT_MAX / 64, FLT_MAX / 64, FLT_MAX / 64 };
    lanes v = load(levels) * splat(scale);
    int half = s.digits / 2;
    g->nearest = 0;
    for (int i = 0; i < s.digits; i++) {
        lanes linear = splat(2.0f * w[i] * y[i]) * v, c = splat(w[i]) * v * v - linear, add = 2.0f * linear;
        if (s.bits == 2) {
            c += beyond;
            add += beyond;
        }
        store(g->cost[i], c);
        if (signs) store(g->add[i], add);
        if (i < half) continue;
        int at = 0;
        for (int l = 1; l < (s.bits == 2 ? 3 : 8); l++) at = g->cost[i][l] < g->cost[i][at] ? l : at;
        g->nearest |= at << (s.bits * (i - half));
    }
    half_of(s, (const float(*)[LANES])g->cost, false, g->plain.low);
    half_of(s, (const float(*)[LANES])g->cost + half, false, g->plain.high);
    g->plain.least = least_of(s, g->plain.low);
    if (!signs) return;
    half_of(s, (const float(*)[LANES])g->add, true, g->wrong.low);
    half_of(s, (const float(*)[LANES])g->add + half, true, g->wrong.high);
    for (int i = 0; i < half_count(s); i += LANES) {
        store(g->wrong.low + i, load(g->wrong.low + i) + load(g->plain.low + i));
        store(g->wrong.high + i, load(g->wrong.high + i) + load(g->plain.high + i));
    }
    g->wrong.least = least_of(s, g->wrong.low);
}

INLINE void scan(const usli_runs *runs, int run, const float *low, float high, found *best) {
    for (int k = runs->start[run]; k < runs->start[run + 1]; k++) {
        float cost = high + low[runs->low[k]];
        if (__builtin_expect(cost < best->cost, 0)) *best = (found){ cost, k };
    }
}

/* The cheapest of all points, if it is below best's. */
INLINE void search(shape s, const usli_runs *runs, const float *low, const float *high, float least, int nearest,
                   found *best) {
    int first = runs->of[nearest];
    if (first != USLI_NO_RUN) scan(runs, first, low, high[nearest], best);
    for (int i = 0; i < half_count(s); i += LANES) {
        unsigned bits = bits_of(load(high + i) + splat(least) < splat(best->cost));
        for (; bits; bits &= bits - 1) {
            int at = i + __builtin_ctz(bits), run = runs->of[at];
            if (run != USLI_NO_RUN && at != nearest) scan(runs, run, low, high[at], best);
        }
    }
}

INLINE found plain_point(shape s, const usli_runs *runs, const group *g) {
    found best = { FLT_MAX, 0 };
    search(s, runs, g->plain.low, g->plain.high, g->plain.least, g->nearest, &best);
    return best;
}

INLINE found wrong_point(shape s, const usli_runs *runs, const group *g) {
    found best = { FLT_MAX, 0 };
    search(s, runs, g->wrong.low, g->plain.high, g->wrong.least, g->nearest, &best);
    search(s, runs, g->plain.low, g->wrong.high, g->plain.least, g->nearest, &best);
    return best;
}

/* ---- The values of one scale ---------------------------------------------------------------------------------------
 */

/* Points and signs, what they cost, and the sums that solve for the scale: of w x v and of w v v. */
typedef struct choice {
    float cost, wxv, wvv;
    uint16_t at[MOST_SPAN / 4];
    uint8_t signs[MOST_SPAN / GROUP];
} choice;

typedef struct job {
    void (*choose)(const struct job *j, float scale, choice *c);
    const usli_lattice *kind;
    const usli_runs *runs;
    const float *x, *w;     /* (kind->span) */
    float levels[2][LANES]; /* as they are; or moved up and down */
} job;

INLINE int digit_of(shape s, const job *j, const int *at, int i) {
    return j->kind->grid->points[at[i / s.digits]] >> (s.bits * (i % s.digits)) & ((1 << s.bits) - 1);
}

INLINE void sum_up(shape s, const job *j, int i, const float *levels, const int *at, unsigned signs, choice *c) {
    for (int k = 0; k < GROUP; k++) {
        float v = levels[digit_of(s, j, at, k)];
        v = signs >> k & 1 ? -v : v;
        c->wxv += j->w[i + k] * j->x[i + k] * v;
        c->wvv += j->w[i + k] * v * v;
    }
}

/* Of eight values the one whose sign costs least when it is wrong. */
INLINE int wrong_value(shape s, const job *j, const group *g, const int *at) {
    float least = FLT_MAX;
    int value = 0;
    for (int k = 0; k < GROUP; k++) {
        float add = g[k / s.digits].add[k % s.digits][digit_of(s, j, at, k)];
        if (add < least) {
            least = add;
            value = k;
        }
    }
    return value;
}

INLINE void choose_signed(shape s, const job *j, int i, float scale, choice *c) {
    float y[GROUP];
    int at[2] = { 0, 0 };
    unsigned signs = 0;
    group g[2];
    found plain[2], wrong[2];
    for (int k = 0; k < GROUP; k++) {
        signs |= (unsigned)(j->x[i + k] < 0) << k;
        y[k] = j->x[i + k] < 0 ? -j->x[i + k] : j->x[i + k];
    }
    bool odd = s.signs == USLI_SIGNS_EVEN && (__builtin_popcount(signs) & 1);
    for (int p = 0; p < GROUP / s.digits; p++) {
        int from = p * s.digits;
        costs_of(s, j->levels[0], y + from, j->w + i + from, scale, odd, &g[p]);
        if (!odd || s.digits < GROUP) plain[p] = plain_point(s, j->runs, &g[p]);
        if (odd) wrong[p] = wrong_point(s, j->runs, &g[p]);
    }
    int second = odd && s.digits < GROUP && plain[0].cost + wrong[1].cost < wrong[0].cost + plain[1].cost;
    for (int p = 0; p < GROUP / s.digits; p++) {
        found f = odd && p == second ? wrong[p] : plain[p];
        at[p] = f.at;
        c->at[i / s.digits + p] = (uint16_t)f.at;
        c->cost += f.cost;
    }
    if (odd) signs ^= 1u << wrong_value(s, j, g, at);
    c->signs[i / GROUP] = (uint8_t)signs;
    sum_up(s, j, i, j->levels[0], at, signs, c);
}

INLINE found shifted(shape s, const job *j, int i, float scale, int down) {
    group g;
    costs_of(s, j->levels[down], j->x + i, j->w + i, scale, false, &g);
    return plain_point(s, j->runs, &g);
}

INLINE void choose_shifted(shape s, const job *j, float scale, choice *c) {
    found f[2][MOST_SPAN / GROUP];
    float cost[2] = { 0, 0 };
    for (int i = 0; i < j->kind->span; i += GROUP)
        for (int down = 0; down < 2; down++) {
            f[down][i / GROUP] = shifted(s, j, i, scale, down);
            cost[down] += f[down][i / GROUP].cost;
        }
    for (int i = 0; i < j->kind->span; i += GROUP) {
        int k = i / GROUP, down = s.signs == USLI_SIGNS_SHIFT ? cost[1] < cost[0] : f[1][k].cost < f[0][k].cost;
        c->at[k] = (uint16_t)f[down][k].at;
        c->signs[k] = down ? 255 : 0;
        c->cost += f[down][k].cost;
        sum_up(s, j, i, j->levels[down], &f[down][k].at, 0, c);
    }
}

INLINE bool is_shifted(usli_signs signs) {
    return signs == USLI_SIGNS_SHIFT || signs == USLI_SIGNS_SHIFTS;
}

#define SHAPE(name, ...)                                                                     \
    static void name(const job *j, float scale, choice *c) {                                 \
        const shape s = { __VA_ARGS__ };                                                     \
        memset(c, 0, sizeof *c);                                                             \
        if (is_shifted(s.signs))                                                             \
            choose_shifted(s, j, scale, c);                                                  \
        else                                                                                 \
            for (int i = 0; i < j->kind->span; i += GROUP) choose_signed(s, j, i, scale, c); \
    }
SHAPE(choose_free_3, 3, 4, USLI_SIGNS_FREE)
SHAPE(choose_free_2, 2, 8, USLI_SIGNS_FREE)
SHAPE(choose_even_3, 3, 4, USLI_SIGNS_EVEN)
SHAPE(choose_even_2, 2, 8, USLI_SIGNS_EVEN)
SHAPE(choose_shift, 2, 8, USLI_SIGNS_SHIFT)
SHAPE(choose_shifts, 2, 8, USLI_SIGNS_SHIFTS)

/* ---- 256 values ----------------------------------------------------------------------------------------------------
 */

/* What the values of a scale are weighted by. An importance is measured on little text, so a quarter of it (of its
 * logarithm) is not believed; large values count a little more than small ones: a scale is shared with neighbours. */
INLINE void weigh(const float *x, const float *importance, float *w) {
    float size = 0;
    for (int i = 0; i < 256; i++) size += x[i] * x[i];
    for (int i = 0; i < 256; i++) {
        float given = importance[i] > 0 && importance[i] < FLT_MAX ? importance[i] : 0;
        w[i] = __builtin_sqrtf(given * __builtin_sqrtf(given)) *
               __builtin_sqrtf(__builtin_sqrtf(size / 256 + x[i] * x[i]));
    }
}

/* A scale of small error, unquantised. */
static float fit(const job *j) {
    float most = 0, size = 0, weights = 0, best = 0, best_gain = 0;
    choice c;
    for (int i = 0; i < j->kind->span; i++) {
        float y = j->x[i] < 0 ? -j->x[i] : j->x[i];
        most = y > most ? y : most;
        size += j->w[i] * y * y;
        weights += j->w[i];
    }
    if (!(size > 0)) return 0;
    bool shifted = is_shifted(j->kind->signs);
    const float *levels = j->kind->grid->levels;
    float base = shifted ? __builtin_sqrtf(size / weights) : most / levels[j->kind->grid->bits == 2 ? 2 : 7];
    for (int k = 0; k < 2; k++) {
        j->choose(j, base * (shifted ? (k ? 1.2f : 0.9f) : (k ? 1.0f : 0.85f)), &c);
        float solved = c.wvv > 0 ? c.wxv / c.wvv : 0, gain = solved * c.wxv;
        if (solved > 0 && gain > best_gain) {
            best_gain = gain;
            best = solved;
        }
    }
    return best;
}

void JOIN(usli_points_, USLI_LANES_ISA)(const usli_lattice *kind, const usli_runs *runs, const float *x,
                                        const float *importance, usli_points *out) {
    static void (*const CHOOSE[][2])(const job *, float, choice *) = {
        [USLI_SIGNS_FREE] = { choose_free_2, choose_free_3 },
        [USLI_SIGNS_EVEN] = { choose_even_2, choose_even_3 },
        [USLI_SIGNS_SHIFT] = { choose_shift, NULL },
        [USLI_SIGNS_SHIFTS] = { choose_shifts, NULL },
    };
    float xs[256], w[256], scales[16], most = 0;
    int spans = 256 / kind->span, per = kind->span / kind->grid->digits, groups = kind->span / GROUP;
    job j = { CHOOSE[kind->signs][kind->grid->bits == 3], kind, runs, NULL, NULL, { { 0 } } };
    for (int l = 0; l < LANES; l++)
        for (int down = 0; down < 2; down++)
            j.levels[down][l] = kind->grid->levels[l] + (!is_shifted(kind->signs) ? 0 : down ? -0.125f : 0.125f);
    for (int i = 0; i < 256; i++) {
        /* What a half of a scale cannot reach is cut off; a NaN is nothing. */
        xs[i] = x[i] > -1e8f ? (x[i] < 1e8f ? x[i] : 1e8f) : x[i] < 0 ? -1e8f : 0;
        w[i] = 1;
    }
    if (importance) weigh(xs, importance, w);
    for (int b = 0; b < spans; b++) {
        j.x = xs + b * kind->span;
        j.w = w + b * kind->span;
        scales[b] = fit(&j);
        most = scales[b] > most ? scales[b] : most;
    }
    memset(out, 0, sizeof *out);
    out->d = usli_scale_to_f16(most / (float)(2 * kind->top + 1));
    float d = usli_f16_to_f32(out->d), inverse = usli_inverse(d);
    for (int b = 0; b < spans; b++) {
        j.x = xs + b * kind->span;
        j.w = w + b * kind->span;
        /* The scales on either side of what was found: which is better, the points decide. */
        int below = (int)usli_clampf((scales[b] * inverse - 1.0f) * 0.5f, 0, (float)kind->top);
        choice best = { .cost = FLT_MAX }, c;
        for (int k = below; k <= below + 1 && k <= kind->top; k++) {
            j.choose(&j, d * (float)(2 * k + 1), &c);
            if (c.cost < best.cost) {
                best = c;
                out->ls[b] = (uint8_t)k;
            }
        }
        memcpy(out->at + b * per, best.at, (size_t)per * sizeof *best.at);
        memcpy(out->signs + b * groups, best.signs, (size_t)groups);
    }
}
