#include "core/quant/fit.h"

#include <math.h>

#define ONES8 1, 1, 1, 1, 1, 1, 1, 1
#define ONES64 ONES8, ONES8, ONES8, ONES8, ONES8, ONES8, ONES8, ONES8
const float usli_fit_ones[256] = { ONES64, ONES64, ONES64, ONES64 };

/* Weighted sums over one rounding of a block: of q x, q q and q. */
typedef struct sums {
    float qx, qq, q;
} sums;

static sums sums_of(const float *x, const float *w, int n, float inverse, float shift, float lo, float hi) {
    float qx[USLI_FIT_LANES] = { 0 }, qq[USLI_FIT_LANES] = { 0 }, q1[USLI_FIT_LANES] = { 0 };
    for (int i = 0; i < n; i += USLI_FIT_LANES)
        for (int k = 0; k < USLI_FIT_LANES; k++) {
            float q = usli_roundf(usli_clampf((x[i + k] - shift) * inverse, lo, hi)), wq = w[i + k] * q;
            qx[k] += wq * x[i + k];
            qq[k] += wq * q;
            q1[k] += wq;
        }
    return (sums){ usli_lane_sum(qx), usli_lane_sum(qq), usli_lane_sum(q1) };
}

static float stored(float scale, bool half) {
    return half ? usli_f16_to_f32(usli_scale_to_f16(scale)) : scale;
}

/* The value of the largest magnitude, with its sign. */
static float extreme_of(const float *x, int n) {
    float extreme = 0;
    for (int i = 0; i < n; i++) extreme = fabsf(x[i]) > fabsf(extreme) ? x[i] : extreme;
    return extreme;
}

float usli_fit_symmetric(const float *x, const float *w, int n, int lo, int hi, bool half) {
    float extreme = extreme_of(x, n), best = 0;
    double best_gain = 0;
    if (extreme == 0) return 0;
    /* The extreme goes to about lo, whose side has one code more; past it the extreme itself is clipped. */
    for (int step = -9; step <= 9; step++) {
        float inverse = ((float)lo + 0.1f * (float)step) / extreme;
        sums s = sums_of(x, w, n, inverse, 0, (float)lo, (float)hi);
        if (!(s.qq > 0)) continue;
        float scale = stored(s.qx / s.qq, half);
        double gain = (double)scale * (2.0 * (double)s.qx - (double)scale * (double)s.qq);
        if (gain > best_gain) {
            best_gain = gain;
            best = scale;
        }
    }
    return best != 0 ? best : stored(extreme / (float)lo, half);
}

/* Solves for scale and min given the sums; min is kept at or below 0 unless it is stored as it is. */
static void solve_affine(const sums *s, double sw, double sx, bool half, float *scale, float *min) {
    double det = sw * (double)s->qq - (double)s->q * (double)s->q;
    double m = det > 0 ? ((double)s->qq * sx - (double)s->q * (double)s->qx) / det : 0;
    double d = det > 0 ? (sw * (double)s->qx - (double)s->q * sx) / det : 0;
    if ((!half && m > 0) || det <= 0) {
        m = 0;
        d = s->qq > 0 ? (double)s->qx / (double)s->qq : 0;
    }
    *scale = stored((float)d, half);
    *min = half ? usli_f16_to_f32(usli_f32_to_f16((float)m)) : (float)m;
}

void usli_fit_affine(const float *x, const float *w, int n, int top, bool half, float *scale, float *min) {
    float low = x[0], high = x[0];
    double sw = 0, sx = 0, best_error = INFINITY;
    for (int i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sw += (double)w[i];
        sx += (double)w[i] * (double)x[i];
    }
    if (!half && low > 0) low = 0;
    *scale = stored((high - low) / (float)top, half);
    *min = half ? usli_f16_to_f32(usli_f32_to_f16(low)) : low;
    if (!(high > low)) {
        *scale = 0;
        return;
    }
    /* The low end is held while the high end is stretched or clipped. */
    for (int step = -10; step <= 10; step++) {
        float inverse = ((float)top + 0.1f * (float)step) / (high - low), d, m;
        sums s = sums_of(x, w, n, inverse, low, 0, (float)top);
        solve_affine(&s, sw, sx, half, &d, &m);
        if (!(d > 0)) continue;
        /* The error less its constant part, the sum of w x x. */
        double error = (double)d * ((double)d * (double)s.qq - 2.0 * (double)s.qx) +
                       (double)m * ((double)m * sw - 2.0 * sx + 2.0 * (double)d * (double)s.q);
        if (error < best_error) {
            best_error = error;
            *scale = d;
            *min = m;
        }
    }
}

uint16_t usli_super_scale(const float *scales, int count, int top) {
    return usli_scale_to_f16(extreme_of(scales, count) / (float)top);
}
