/* The C tests' own few words. A test is a program: main calls cases, CHECK counts, test_end prints and gives the exit
 * code. Data outside the repository stands in ../shared and may be absent: SKIP says so. */
#ifndef TESTS_TEST_H
#define TESTS_TEST_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/ctx.h"

static int test_checks, test_failures, test_skips;

#define CHECK(cond, ...)                                           \
    do {                                                           \
        test_checks++;                                             \
        if (!(cond)) {                                             \
            test_failures++;                                       \
            printf("FAIL %s:%d: %s: ", __FILE__, __LINE__, #cond); \
            printf(__VA_ARGS__);                                   \
            printf("\n");                                          \
        }                                                          \
    } while (0)
#define CHECK_OK(ctx, expr)                                                                    \
    do {                                                                                       \
        usl_status check_st_ = (expr);                                                         \
        CHECK(check_st_ == USL_OK, "%s: %s", usl_status_name(check_st_), usl_ctx_errmsg(ctx)); \
    } while (0)
#define SKIP(...)                    \
    do {                             \
        test_skips++;                \
        printf("SKIP " __VA_ARGS__); \
        printf("\n");                \
    } while (0)

/* ||a - b|| / ||b||, in double; infinite when a holds a NaN. */
static inline double test_rel_error(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        num += d * d;
        den += (double)b[i] * (double)b[i];
    }
    if (isnan(num)) return INFINITY;
    return den > 0 ? sqrt(num / den) : sqrt(num);
}

static inline int test_end(const char *name) {
    printf("%s: %d checks, %d failed, %d skipped\n", name, test_checks, test_failures, test_skips);
    if (test_failures) return 1;
    return test_checks == 0 && test_skips ? 77 : 0;
}

#endif
