#include "core/train/schedule.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define PI 3.141592653589793

static double ramp(int64_t step, int64_t warmup) {
    return (double)step / (double)(warmup > 1 ? warmup : 1);
}

/* How far past the warm-up, 0 to 1. */
static double progress(int64_t step, int64_t warmup, int64_t total) {
    int64_t span = total - warmup;
    return (double)(step - warmup) / (double)(span > 1 ? span : 1);
}

static double positive(double x) {
    return x > 0 ? x : 0;
}

static double linear(int64_t step, int64_t warmup, int64_t total) {
    if (step < warmup) return ramp(step, warmup);
    int64_t span = total - warmup;
    return positive((double)(total - step) / (double)(span > 1 ? span : 1));
}

static double cosine(int64_t step, int64_t warmup, int64_t total) {
    if (step < warmup) return ramp(step, warmup);
    return positive(0.5 * (1 + cos(PI * progress(step, warmup, total))));
}

static double cosine_with_restarts(int64_t step, int64_t warmup, int64_t total) {
    if (step < warmup) return ramp(step, warmup);
    double p = progress(step, warmup, total);
    return p >= 1 ? 0 : positive(0.5 * (1 + cos(PI * fmod(p, 1.0))));
}

static double constant(int64_t step, int64_t warmup, int64_t total) {
    (void)step, (void)warmup, (void)total;
    return 1;
}

static double constant_with_warmup(int64_t step, int64_t warmup, int64_t total) {
    (void)total;
    return step < warmup ? ramp(step, warmup) : 1;
}

static double inverse_sqrt(int64_t step, int64_t warmup, int64_t total) {
    (void)total;
    if (step < warmup) return ramp(step, warmup);
    double scale = warmup > 0 ? (double)warmup : 10000;
    return 1 / sqrt(((double)step + scale - (double)warmup) / scale);
}

static const struct {
    const char *name;
    usli_schedule_fn fn;
} SCHEDULES[] = {
    { "linear", linear },
    { "cosine", cosine },
    { "cosine_with_restarts", cosine_with_restarts },
    { "constant", constant },
    { "constant_with_warmup", constant_with_warmup },
    { "inverse_sqrt", inverse_sqrt },
};

usli_schedule_fn usli_schedule_find(const char *name) {
    for (size_t i = 0; i < sizeof SCHEDULES / sizeof *SCHEDULES; i++)
        if (strcmp(SCHEDULES[i].name, name) == 0) return SCHEDULES[i].fn;
    return NULL;
}

void usli_schedule_list(char *buf, size_t size) {
    buf[0] = 0;
    for (size_t i = 0, used = 0; i < sizeof SCHEDULES / sizeof *SCHEDULES && used < size; i++) {
        int n = snprintf(buf + used, size - used, "%s%s", i ? ", " : "", SCHEDULES[i].name);
        used += n > 0 ? (size_t)n : 0;
    }
}
