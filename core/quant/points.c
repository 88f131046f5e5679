/* Finding lattice points, built for several instruction sets under several names, as lanes.c.
 *
 * The scale is guessed, and solved for by least squares with the points that it leads to. Which points cost least with
 * a scale is found in eight bits (points_search.h), in a unit that suits the group; between scales the unrounded error
 * decides. Where the number of minuses must be even, the cheapest wrong sign is part of that search. */
#include "core/quant/lanes.h"

#include <float.h>

#include "core/base/half.h"
#include "core/quant/points_search.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
/* What all levels may be moved by, up or down. */
#define SHIFT 0.125f

enum { GROUPS = 4 /* of one scale at most */ };

/* ---- The values of one scale ---------------------------------------------------------------------------------------
 */

/* Points and signs, what they cost less what no choice changes, and the sums that solve for the scale: of w x v and of
 * w v v. */
typedef struct choice {
    float cost, wxv, wvv;
    uint16_t at[2 * GROUPS];
    uint8_t signs[GROUPS];
} choice;

/* Eight values, or magnitudes where signs stand apart. */
typedef struct group {
    lanes w, wx, two_wx;
    float weight; /* the sum of w */
    unsigned signs;
    bool odd; /* a sign must be wrong */
} group;

typedef struct job {
    void (*choose)(const struct job *j, float scale, choice *c);
    const usli_lattice *kind;
    const usli_runs *runs;
    int groups;
    group group[GROUPS];
    lanes magnitudes[GROUPS];
} job;

/* The levels of the digits of one point, or of two. */
INLINE lanes values_of(shape s, const job *j, const int *at, float shift) {
    const usli_grid *grid = j->kind->grid;
    uint32_t digits = grid->points[at[0]];
    if (s.bits == 3) digits |= (uint32_t)grid->points[at[1]] << 12;
#if defined(__AVX2__)
    const __m256i places =
        s.bits == 2 ? _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14) : _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
    __m256i d = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)digits), places),
                                 _mm256_set1_epi32((1 << s.bits) - 1));
    lanes v = (lanes)_mm256_permutevar8x32_ps(_mm256_loadu_ps(grid->levels), d);
#else
    lanes v;
    for (int k = 0; k < GROUP; k++) v[k] = grid->levels[digits >> (s.bits * k) & ((1u << s.bits) - 1)];
#endif
    return is_shifted(s.signs) ? v + shift : v;
}

/* A group's points: those that cost least with v, the levels times the scale. */
INLINE void nearest_points(shape s, const job *j, const group *g, const lanes *v, float unit, int *at) {
    costs plain[2], wrong[2];
    lanes raw[8], c[8], least;
    bool odd = s.signs == USLI_SIGNS_EVEN && g->odd;
    for (int l = 0; l < levels_of(s); l++) {
        raw[l] = v[l] * (g->w * v[l] - g->two_wx);
        least = l ? smaller(raw[l], least) : raw[l];
    }
    /* A unit that is too small for the best to be told apart is rare. */
    for (int attempt = 0; attempt < 8; attempt++, unit *= 8) {
        found f[2], with[2];
        bool again = false;
        lanes per_unit = splat(usli_inverse(unit)), limit = splat((float)MOST_COST);
        for (int l = 0; l < levels_of(s); l++) c[l] = smaller((raw[l] - least) * per_unit, limit);
        costs_of(s, c, false, plain);
        if (odd) {
            for (int l = 0; l < levels_of(s); l++) c[l] = smaller(2.0f * g->two_wx * v[l] * per_unit, limit);
            costs_of(s, c, true, wrong);
        }
        for (int p = 0; p < points_of(s); p++)
            search(s, j->kind->grid, j->runs, &plain[p], odd ? &wrong[p] : NULL,
                   odd && points_of(s) == 1 ? NULL : &f[p], &with[p]);
        if (odd && points_of(s) == 1) f[0] = with[0];
        if (odd && points_of(s) == 2) {
            int k = f[0].cost + with[1].cost < with[0].cost + f[1].cost;
            f[k] = with[k];
        }
        for (int p = 0; p < points_of(s); p++) {
            at[p] = f[p].at;
            again |= f[p].cost >= MOST_COST;
        }
        if (!again) return;
    }
}

/* What one of a cost stands for: of the weights and the square of the scale a part that leaves the best point's cost
 * (some dozens) room. */
INLINE float unit_of(shape s, const group *g, float scale) {
    return g->weight * scale * scale * (is_shifted(s.signs) ? 1.0f / 1024 : 1.0f / 128);
}

INLINE void scaled(shape s, const job *j, float scale, float shift, lanes v[8]) {
    for (int l = 0; l < levels_of(s); l++) v[l] = splat((j->kind->grid->levels[l] + shift) * scale);
}

/* The error, less what no choice changes. */
INLINE float cost_of(float scale, float wxv, float wvv) {
    return scale * (scale * wvv - 2.0f * wxv);
}

INLINE void choose_signed(shape s, const job *j, float scale, choice *c) {
    lanes v[8], wxv = splat(0), wvv = splat(0);
    scaled(s, j, scale, 0, v);
    for (int k = 0; k < j->groups; k++) {
        const group *g = &j->group[k];
        int at[2];
        nearest_points(s, j, g, v, unit_of(s, g, scale), at);
        for (int p = 0; p < points_of(s); p++) c->at[k * points_of(s) + p] = (uint16_t)at[p];
        lanes level = values_of(s, j, at, 0), gain = g->wx * level;
        unsigned signs = g->signs;
        if (s.signs == USLI_SIGNS_EVEN && g->odd) {
            const lanes_i places = { 0, 1, 2, 3, 4, 5, 6, 7 };
            int flipped = least_lane(gain);
            signs ^= 1u << flipped;
            gain = pick(places == flipped, -gain, gain);
        }
        c->signs[k] = (uint8_t)signs;
        wxv += gain;
        wvv += g->w * level * level;
    }
    c->wxv = sum(wxv);
    c->wvv = sum(wvv);
    c->cost = cost_of(scale, c->wxv, c->wvv);
}

/* What a group costs at least with v, wherever the points are: by lanes. */
INLINE lanes bound(shape s, const group *g, const lanes *v) {
    lanes least = v[0] * (g->w * v[0] - g->two_wx);
    for (int l = 1; l < levels_of(s); l++) least = smaller(v[l] * (g->w * v[l] - g->two_wx), least);
    return least;
}

/* Which shift it is the bounds decide: to find the points of both and compare gains a thousandth or two of the error,
 * and takes twice as long. */
INLINE void choose_shifted(shape s, const job *j, float scale, choice *c) {
    lanes v[2][8], wxv = splat(0), wvv = splat(0), differ[GROUPS], all = splat(0);
    for (int down = 0; down < 2; down++) scaled(s, j, scale, down ? -SHIFT : SHIFT, v[down]);
    for (int k = 0; k < j->groups; k++) {
        differ[k] = bound(s, &j->group[k], v[1]) - bound(s, &j->group[k], v[0]);
        all += differ[k];
    }
    for (int k = 0; k < j->groups; k++) {
        const group *g = &j->group[k];
        int at, down = sum(s.signs == USLI_SIGNS_SHIFT ? all : differ[k]) < 0;
        nearest_points(s, j, g, v[down], unit_of(s, g, scale), &at);
        lanes level = values_of(s, j, &at, down ? -SHIFT : SHIFT);
        wxv += g->wx * level;
        wvv += g->w * level * level;
        c->at[k] = (uint16_t)at;
        c->signs[k] = down ? 255 : 0;
    }
    c->wxv = sum(wxv);
    c->wvv = sum(wvv);
    c->cost = cost_of(scale, c->wxv, c->wvv);
}

#define SHAPE(name, ...)                                     \
    static void name(const job *j, float scale, choice *c) { \
        const shape s = { __VA_ARGS__ };                     \
        if (is_shifted(s.signs))                             \
            choose_shifted(s, j, scale, c);                  \
        else                                                 \
            choose_signed(s, j, scale, c);                   \
    }
SHAPE(choose_free_3, 3, USLI_SIGNS_FREE)
SHAPE(choose_free_2, 2, USLI_SIGNS_FREE)
SHAPE(choose_even_3, 3, USLI_SIGNS_EVEN)
SHAPE(choose_even_2, 2, USLI_SIGNS_EVEN)
SHAPE(choose_shift, 2, USLI_SIGNS_SHIFT)
SHAPE(choose_shifts, 2, USLI_SIGNS_SHIFTS)

/* ---- 256 values ----------------------------------------------------------------------------------------------------
 */

/* What the values of a scale are weighted by. An importance is measured on little text, so a quarter of it (of its
 * logarithm) is not believed; large values count a little more than small ones: a scale is shared with neighbours. Only
 * proportions count, so the largest importance is 1. */
INLINE void weigh(const float *x, const float *importance, float *w) {
    float size = 0, most = 0;
    for (int i = 0; i < 256; i++) {
        w[i] = importance[i] > 0 ? (importance[i] < FLT_MAX ? importance[i] : FLT_MAX) : 0;
        most = w[i] > most ? w[i] : most;
        size += x[i] * x[i];
    }
    for (int i = 0; i < 256; i++) {
        float given = most > 0 ? w[i] / most : 0;
        w[i] = __builtin_sqrtf(given) * __builtin_sqrtf(__builtin_sqrtf(given)) *
               __builtin_sqrtf(__builtin_sqrtf(size / 256 + x[i] * x[i]));
    }
}

/* The values of scale b. */
static void load_groups(job *j, const float *x, const float *w) {
    j->groups = j->kind->span / GROUP;
    for (int k = 0; k < j->groups; k++) {
        group *g = &j->group[k];
        lanes v = load(x + GROUP * k);
        g->w = load(w + GROUP * k);
        g->signs = 0;
        for (int i = 0; i < GROUP; i++) g->signs |= (unsigned)(v[i] < 0) << i;
        g->odd = __builtin_popcount(g->signs) & 1;
        if (!is_shifted(j->kind->signs)) v = pick(v < 0, -v, v);
        j->magnitudes[k] = v;
        g->wx = g->w * v;
        g->two_wx = 2.0f * g->wx;
        g->weight = sum(g->w);
    }
}

/* A scale of small error, unquantised. */
static float fit(const job *j) {
    lanes most = splat(0), size = splat(0);
    float weights = 0, best = 0, best_gain = 0, top = 0;
    choice c;
    for (int k = 0; k < j->groups; k++) {
        most = smaller(most, -j->magnitudes[k]);
        size += j->group[k].wx * j->magnitudes[k];
        weights += j->group[k].weight;
    }
    for (int i = 0; i < LANES; i++) top = -most[i] > top ? -most[i] : top;
    float all = sum(size);
    if (!(all > 0)) return 0;
    bool shifted = is_shifted(j->kind->signs);
    const float *levels = j->kind->grid->levels;
    float base = shifted ? 1.1f * __builtin_sqrtf(all / weights) : top / levels[j->kind->grid->bits == 2 ? 2 : 7];
    for (int k = 0; k < (shifted ? 1 : 2); k++) {
        j->choose(j, k ? 0.85f * base : base, &c);
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
    job j = { .choose = CHOOSE[kind->signs][kind->grid->bits == 3], .kind = kind, .runs = runs };
    for (int i = 0; i < 256; i++) {
        /* What a half of a scale cannot reach is cut off; a NaN is nothing. */
        xs[i] = x[i] > -1e8f ? (x[i] < 1e8f ? x[i] : 1e8f) : x[i] < 0 ? -1e8f : 0;
        w[i] = 1;
    }
    if (importance) weigh(xs, importance, w);
    for (int b = 0; b < spans; b++) {
        load_groups(&j, xs + b * kind->span, w + b * kind->span);
        scales[b] = fit(&j);
        most = scales[b] > most ? scales[b] : most;
    }
    memset(out, 0, sizeof *out);
    out->d = usli_scale_to_f16(most / (float)(2 * kind->top + 1));
    float d = usli_f16_to_f32(out->d), inverse = usli_inverse(d);
    for (int b = 0; b < spans; b++) {
        load_groups(&j, xs + b * kind->span, w + b * kind->span);
        /* The scales on either side of what was found: which is better, the points decide. Where levels are shifted
         * they are asked only in the middle. */
        float place = usli_clampf((scales[b] * inverse - 1.0f) * 0.5f, 0, (float)kind->top);
        float sure = is_shifted(kind->signs) ? 0.35f : 0, rest = place - (float)(int)place;
        choice best = { .cost = FLT_MAX }, c;
        for (int k = (int)place; k <= (int)place + 1 && k <= kind->top; k++) {
            if (k == (int)place ? 1 - rest < sure : rest < sure) continue;
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
