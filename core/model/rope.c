/* Rope frequencies, each kind as transformers' modeling_rope_utils defines it. */
#include <math.h>

#include "core/model/config.h"

#define TWO_PI 6.283185307179586

/* llama3 (Llama 3.1): long wavelengths are divided by factor, short ones kept, those between interpolated. */
static void llama3(const usli_rope_config *r, double *inv_freq, int64_t half) {
    double low = (double)r->original_context / r->low_freq_factor,
           high = (double)r->original_context / r->high_freq_factor;
    for (int64_t i = 0; i < half; i++) {
        double wavelength = TWO_PI / inv_freq[i];
        if (wavelength > low) {
            inv_freq[i] /= r->factor;
        } else if (wavelength >= high) {
            double smooth = ((double)r->original_context / wavelength - r->low_freq_factor) /
                            (r->high_freq_factor - r->low_freq_factor);
            inv_freq[i] = (1 - smooth) * inv_freq[i] / r->factor + smooth * inv_freq[i];
        }
    }
}

static double mscale(double scale, double m) {
    return scale <= 1 ? 1 : 0.1 * m * log(scale) + 1;
}

double usli_yarn_attention(double factor) {
    return mscale(factor, 1);
}

/* YaRN (Peng et al. 2023): a ramp over dimensions from interpolated to kept frequencies. */
static double yarn(const usli_rope_config *r, double *inv_freq, int64_t half) {
    double dim = 2 * (double)half, span = 2 * log(r->theta);
    double low = dim * log((double)r->original_context / (r->beta_fast * TWO_PI)) / span;
    double high = dim * log((double)r->original_context / (r->beta_slow * TWO_PI)) / span;
    if (r->truncate) low = floor(low), high = ceil(high);
    if (low < 0) low = 0;
    if (high > dim - 1) high = dim - 1;
    if (low == high) high += 0.001;
    for (int64_t i = 0; i < half; i++) {
        double ramp = ((double)i - low) / (high - low);
        double kept = 1 - (ramp < 0 ? 0 : ramp > 1 ? 1 : ramp);
        inv_freq[i] = inv_freq[i] / r->factor * (1 - kept) + inv_freq[i] * kept;
    }
    if (r->attention_factor > 0) return r->attention_factor;
    if (r->mscale > 0 && r->mscale_all_dim > 0)
        return mscale(r->factor, r->mscale) / mscale(r->factor, r->mscale_all_dim);
    return usli_yarn_attention(r->factor);
}

/* LongRoPE (Ding et al. 2024): a divisor for each frequency, one list for rows within the original context and one for
 * longer ones; the factor on cos and sin is the same for both. */
static double long_attention(const usli_rope_config *r) {
    if (r->attention_factor > 0) return r->attention_factor;
    return r->factor <= 1 ? 1 : sqrt(1 + log(r->factor) / log((double)r->original_context));
}

/* Dynamic NTK: a larger base, by how far a row is beyond the original context. */
static double dynamic_theta(const usli_rope_config *r, int64_t dim, int64_t tokens) {
    if (tokens <= r->original_context) return r->theta;
    double stretch = r->factor * (double)tokens / (double)r->original_context - (r->factor - 1);
    return r->theta * pow(stretch, (double)dim / (double)(dim - 2));
}

static void divide(double *inv_freq, const float *divisors, int64_t half) {
    for (int64_t i = 0; i < half; i++) inv_freq[i] /= (double)divisors[i];
}

const char *usli_rope_name(usli_rope_kind kind) {
    static const char *const NAMES[] = {
        [USLI_ROPE_DEFAULT] = "default", [USLI_ROPE_LINEAR] = "linear",   [USLI_ROPE_LLAMA3] = "llama3",
        [USLI_ROPE_YARN] = "yarn",       [USLI_ROPE_DYNAMIC] = "dynamic", [USLI_ROPE_LONG] = "longrope"
    };
    return NAMES[kind];
}

void usli_rope_frequencies(const usli_rope_config *r, int64_t dim, const float *divisors, int64_t tokens,
                           double *inv_freq, double *attention) {
    int64_t half = dim / 2;
    double theta = r->kind == USLI_ROPE_DYNAMIC ? dynamic_theta(r, dim, tokens) : r->theta;
    *attention = 1;
    for (int64_t i = 0; i < half; i++) inv_freq[i] = pow(theta, -2.0 * (double)i / (double)dim);
    if (divisors) {
        divide(inv_freq, divisors, half);
        return;
    }
    switch (r->kind) {
    case USLI_ROPE_DEFAULT: break;
    case USLI_ROPE_DYNAMIC: break;
    case USLI_ROPE_LINEAR:
        for (int64_t i = 0; i < half; i++) inv_freq[i] /= r->factor;
        break;
    case USLI_ROPE_LLAMA3: llama3(r, inv_freq, half); break;
    case USLI_ROPE_YARN: *attention = yarn(r, inv_freq, half); break;
    case USLI_ROPE_LONG:
        divide(inv_freq, r->divisors[tokens > r->original_context], half);
        *attention = long_attention(r);
        break;
    }
}
