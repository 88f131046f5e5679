/* Every allocation fails in turn, jansson's too. */
#ifndef TESTS_DATA_FAILING_H
#define TESTS_DATA_FAILING_H

#include <jansson.h>

#include "tests/test.h"

/* jansson's allocator has no place for an argument, so the count stands alone. */
static struct {
    long long requests, live;
    long long failing; /* the request that fails, from 1; 0: none */
} count_of;

static void *counting_realloc(void *ud, void *ptr, size_t size) {
    (void)ud;
    if (!size) {
        count_of.live -= ptr != NULL;
        free(ptr);
        return NULL;
    }
    if (++count_of.requests == count_of.failing) return NULL;
    void *fresh = realloc(ptr, size);
    count_of.live += fresh && !ptr;
    return fresh;
}

static void *counting_malloc(size_t size) {
    return counting_realloc(NULL, NULL, size ? size : 1);
}

static void counting_free(void *ptr) {
    counting_realloc(NULL, ptr, 0);
}

static usl_status counted_run(usl_status (*run)(usl_ctx *), char *sentence, size_t size) {
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    opts.realloc_fn = counting_realloc;
    opts.threads = 1;
    usl_ctx *ctx;
    count_of.requests = count_of.live = 0;
    usl_status st = usl_ctx_new(&opts, &ctx);
    snprintf(sentence, size, "no context");
    if (st != USL_OK) return st;
    st = run(ctx);
    snprintf(sentence, size, "%s", usl_ctx_errmsg(ctx));
    usl_ctx_free(ctx);
    return st;
}

/* run: frees all it made, also on failure. */
static void test_failing(const char *name, usl_status (*run)(usl_ctx *)) {
    char sentence[512];
    json_set_alloc_funcs(counting_malloc, counting_free);
    count_of.failing = 0;
    usl_status st = counted_run(run, sentence, sizeof sentence);
    long long whole = count_of.requests;
    CHECK(st == USL_OK && count_of.live == 0, "%s: %s, %lld blocks left", name, sentence, count_of.live);
    for (long long n = 1; st == USL_OK && n <= whole; n++) {
        count_of.failing = n;
        usl_status got = counted_run(run, sentence, sizeof sentence);
        CHECK(got == USL_ERR_NOMEM, "%s: allocation %lld fails: %s: %s", name, n, usl_status_name(got), sentence);
        CHECK(count_of.live == 0, "%s: allocation %lld fails: %lld blocks leak", name, n, count_of.live);
    }
    printf("%s: each of %lld allocations failed once\n", name, whole);
    json_set_alloc_funcs(malloc, free);
}

#endif
