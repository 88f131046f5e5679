/* Tokenised rows, windows and the cursor. */
#include "core/base/rng.h"
#include "core/data/cursor.h"
#include "core/data/window.h"
#include "core/io/json.h"
#include "tests/data/failing.h"

#define IDS(...) (const int32_t[]){ __VA_ARGS__ }, (int64_t)(sizeof((int32_t[]){ __VA_ARGS__ }) / sizeof(int32_t))

static void check_ids(const char *what, const int32_t *got, const int32_t *want, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        CHECK(got[i] == want[i], "%s[%lld] is %d, not %d", what, (long long)i, got[i], want[i]);
}

static usl_rows_stats stats_of(const usli_rows *rows) {
    usl_rows_stats s = { .size = sizeof s };
    usli_rows_stats(rows, &s);
    return s;
}

static void add(usl_ctx *ctx, usli_rows *rows, const int32_t *ids, int64_t n) {
    CHECK_OK(ctx, usli_rows_add(rows, ids, NULL, n));
}

static void test_add(usl_ctx *ctx) {
    usli_rows *rows;
    CHECK(usli_rows_new(ctx, -1, &rows) == USL_ERR_INVALID && !rows, "a negative max_length");
    CHECK_OK(ctx, usli_rows_new(ctx, 4, &rows));
    add(ctx, rows, IDS(5, 6, 7));
    add(ctx, rows, IDS(1, 2, 3, 4, 5, 6));
    add(ctx, rows, IDS(9)); /* one token has no target */
    CHECK_OK(ctx, usli_rows_add(rows, (int32_t[]){ 1, 2, 3 }, (int32_t[]){ 1, -100, -100 },
                                3)); /* the first counts for nothing */
    CHECK_OK(ctx, usli_rows_add(rows, (int32_t[]){ 1, 2, 3 }, (int32_t[]){ -100, -100, 3 }, 3));
    usl_rows_stats s = stats_of(rows);
    CHECK(s.rows == 3 && s.tokens == 10 && s.longest == 4, "%lld rows, %lld tokens", (long long)s.rows,
          (long long)s.tokens);
    CHECK(s.counted == 2 + 3 + 1 && s.truncated == 1 && s.dropped == 2, "%lld counted, %lld cut, %lld left out",
          (long long)s.counted, (long long)s.truncated, (long long)s.dropped);
    const int32_t *ids, *labels;
    int64_t n;
    usli_rows_at(rows, 1, &ids, &labels, &n);
    CHECK(n == 4, "max_length 4, %lld tokens", (long long)n);
    check_ids("cut ids", ids, (int32_t[]){ 1, 2, 3, 4 }, 4);
    check_ids("cut labels", labels, (int32_t[]){ 1, 2, 3, 4 }, 4);
    usli_rows_at(rows, 2, &ids, &labels, &n);
    check_ids("labels", labels, (int32_t[]){ -100, -100, 3 }, 3);
    CHECK(usli_rows_add(rows, (int32_t[]){ 1, -1 }, NULL, 2) == USL_ERR_INVALID, "a negative id");
    CHECK(usli_rows_add(rows, (int32_t[]){ 1, 2 }, (int32_t[]){ 1, -3 }, 2) == USL_ERR_INVALID, "a label of -3");
    CHECK(stats_of(rows).rows == 3, "a refused row was kept");
    usli_rows_release(rows);
}

static void test_window(usl_ctx *ctx) {
    usli_rows *rows;
    usli_window *w, *p;
    CHECK_OK(ctx, usli_rows_new(ctx, 0, &rows));
    add(ctx, rows, IDS(10, 11, 12));
    CHECK_OK(ctx, usli_rows_add(rows, (int32_t[]){ 20, 21, 22, 23 }, (int32_t[]){ -100, -100, 22, 23 }, 4));
    add(ctx, rows, IDS(30, 31));
    CHECK_OK(ctx, usli_window_build(ctx, rows, (int64_t[]){ 2, 1, 0 }, 3, 2, &w));
    CHECK(w->tokens == 9 && w->rows == 3 && w->longest == 4 && w->counted == 1 + 2 + 2, "%lld tokens, %lld counted",
          (long long)w->tokens, (long long)w->counted);
    check_ids("ids", w->ids, (int32_t[]){ 30, 31, 20, 21, 22, 23, 10, 11, 12 }, 9);
    check_ids("targets", w->targets, (int32_t[]){ 31, -100, -100, 22, 23, -100, 11, 12, -100 }, 9);
    check_ids("positions", w->positions, (int32_t[]){ 0, 1, 0, 1, 2, 3, 0, 1, 2 }, 9);
    check_ids("cu", w->cu, (int32_t[]){ 0, 2, 6, 9 }, 4);
    check_ids("micro", w->micro, (int32_t[]){ 0, 0, 1 }, 3);
    CHECK(w->row_id[0] == 2 && w->row_id[1] == 1 && w->row_id[2] == 0, "row_id");

    CHECK_OK(ctx, usli_window_part(ctx, w, 0, 6, 8, &p));
    CHECK(p->rows == 2 && p->tokens == 6 && p->counted == 3, "two rows fill 6 tokens exactly, %lld",
          (long long)p->rows);
    usli_window_free(p);
    CHECK_OK(ctx, usli_window_part(ctx, w, 0, 5, 8, &p));
    CHECK(p->rows == 1 && p->tokens == 2, "the second row does not fit 5 tokens, %lld", (long long)p->rows);
    usli_window_free(p);
    CHECK_OK(ctx, usli_window_part(ctx, w, 0, 100, 2, &p));
    CHECK(p->rows == 2, "room for two rows, %lld", (long long)p->rows);
    usli_window_free(p);
    CHECK_OK(ctx, usli_window_part(ctx, w, 1, 7, 8, &p));
    CHECK(p->rows == 2 && p->tokens == 7 && p->counted == 4, "the rest, %lld rows", (long long)p->rows);
    check_ids("part ids", p->ids, (int32_t[]){ 20, 21, 22, 23, 10, 11, 12 }, 7);
    check_ids("part targets", p->targets, (int32_t[]){ -100, 22, 23, -100, 11, 12, -100 }, 7);
    check_ids("part positions", p->positions, (int32_t[]){ 0, 1, 2, 3, 0, 1, 2 }, 7);
    check_ids("part cu", p->cu, (int32_t[]){ 0, 4, 7 }, 3);
    check_ids("part micro", p->micro, (int32_t[]){ 0, 1 }, 2);
    CHECK(p->row_id[0] == 1 && p->row_id[1] == 0, "part row_id");
    usli_window_free(p);
    CHECK(usli_window_part(ctx, w, 1, 3, 8, &p) != USL_OK && !p, "four tokens in three");
    const char *says = usl_ctx_errmsg(ctx);
    CHECK(strstr(says, "row 2 ") && strstr(says, "4 tokens") && strstr(says, "room for 3") &&
              strstr(says, "max_seq_length"),
          "%s", says);
    usli_window_free(w);
    usli_rows_release(rows);
}

static void check_mask(usl_ctx *ctx, const usli_rows *rows, bool last_only, const int32_t *want, int64_t n) {
    usli_rows *masked;
    const int32_t *ids, *labels;
    int64_t got;
    CHECK_OK(ctx, usli_rows_mask_responses(rows, IDS(1, 2), IDS(8, 9), last_only, &masked));
    if (!want) {
        CHECK(usli_rows_count(masked) == 0 && stats_of(masked).dropped == 1, "nothing counts in this row");
    } else {
        usli_rows_at(masked, 0, &ids, &labels, &got);
        CHECK(got == n, "%lld tokens", (long long)got);
        check_ids(last_only ? "last answer" : "answers", labels, want, n);
    }
    usli_rows_release(masked);
}

/* Instruction marker 1 2, response marker 8 9. */
static void test_mask(usl_ctx *ctx) {
    static const struct {
        int64_t n;
        int32_t ids[16], all[16], last[16];
        bool none;
    } CASES[] = {
        /* two turns; the marker itself never counts, the end of the row closes the last answer */
        { 13,
          { 1, 2, 50, 8, 9, 60, 61, 1, 2, 51, 8, 9, 62 },
          { -100, -100, -100, -100, -100, 60, 61, -100, -100, -100, -100, -100, 62 },
          { -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, 62 },
          false },
        /* what stands before the first answer does not count, half a marker is text */
        { 8,
          { 3, 8, 9, 60, 8, 1, 61, 9 },
          { -100, -100, -100, 60, 8, 1, 61, 9 },
          { -100, -100, -100, 60, 8, 1, 61, 9 },
          false },
        /* an answer that ends in a question: no loss on it */
        { 7,
          { 8, 9, 60, 1, 2, 50, 51 },
          { -100, -100, 60, -100, -100, -100, -100 },
          { -100, -100, 60, -100, -100, -100, -100 },
          false },
        { 4, { 1, 2, 50, 51 }, { 0 }, { 0 }, true },
        /* the answer was cut off behind its marker */
        { 5, { 1, 2, 50, 8, 9 }, { 0 }, { 0 }, true },
    };
    usli_rows *rows, *masked;
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        CHECK_OK(ctx, usli_rows_new(ctx, 0, &rows));
        add(ctx, rows, CASES[i].ids, CASES[i].n);
        check_mask(ctx, rows, false, CASES[i].none ? NULL : CASES[i].all, CASES[i].n);
        check_mask(ctx, rows, true, CASES[i].none ? NULL : CASES[i].last, CASES[i].n);
        usli_rows_release(rows);
    }
    /* What did not count before stays out; no marker is an error; no rows are none. */
    CHECK_OK(ctx, usli_rows_new(ctx, 0, &rows));
    CHECK(usli_rows_mask_responses(rows, IDS(1), NULL, 0, false, &masked) == USL_ERR_INVALID && !masked,
          "an empty marker");
    CHECK_OK(ctx, usli_rows_mask_responses(rows, IDS(1), IDS(8), false, &masked));
    usli_rows_release(masked);
    CHECK_OK(ctx, usli_rows_add(rows, (int32_t[]){ 8, 9, 60, 61 }, (int32_t[]){ 8, 9, -100, 61 }, 4));
    check_mask(ctx, rows, false, (int32_t[]){ -100, -100, -100, 61 }, 4);
    usli_rows_release(rows);
}

/* tests/data/randperm.json is torch's own (make_randperm.py). */
static void test_order(usl_ctx *ctx) {
    json_t *cases, *one;
    size_t k;
    CHECK_OK(ctx, usli_json_load(ctx, "tests/data/randperm.json", &cases));
    json_array_foreach(cases, k, one) {
        uint32_t seed = (uint32_t)json_integer_value(json_object_get(one, "seed"));
        const json_t *order = json_object_get(one, "order");
        int64_t n = (int64_t)json_array_size(order), got[1000], pick[8], count, at = 0, wrong = 0;
        usli_randperm(seed, n, got);
        for (int64_t i = 0; i < n; i++) wrong += got[i] != json_integer_value(json_array_get(order, (size_t)i));
        CHECK(wrong == 0, "seed %u, %lld rows: %lld differ from torch.randperm", seed, (long long)n, (long long)wrong);
        usli_cursor c;
        usli_cursor_init(&c, n, seed, true);
        while (at < n) {
            CHECK_OK(ctx, usli_cursor_window(ctx, &c, 8, pick, &count));
            CHECK(count == (n - at < 8 ? n - at : 8), "a window of %lld at %lld of %lld", (long long)count,
                  (long long)at, (long long)n);
            for (int64_t i = 0; i < count; i++)
                CHECK(pick[i] == json_integer_value(json_array_get(order, (size_t)(at + i))), "seed %u, row %lld", seed,
                      (long long)(at + i));
            at += count;
        }
        CHECK(usli_cursor_epoch(&c) == 1.0, "epoch %g", usli_cursor_epoch(&c));
    }
    CHECK(json_array_size(cases) == 9, "%zu cases", json_array_size(cases));
    json_decref(cases);
}

static void test_cursor(usl_ctx *ctx) {
    enum { ROWS = 50, WINDOW = 8, UPDATES = 20 };
    int64_t pick[WINDOW], again[WINDOW], count, count_again, want[ROWS];
    usli_cursor c, saved = { 0 };
    usli_cursor_init(&c, ROWS, 3407, true);
    for (int u = 0; u < UPDATES; u++) {
        CHECK_OK(ctx, usli_cursor_window(ctx, &c, WINDOW, pick, &count));
        int in_epoch = u % 7;
        CHECK(count == (in_epoch == 6 ? 2 : 8), "update %d has %lld rows", u, (long long)count);
        usli_randperm(3407 + (uint32_t)(u / 7), ROWS, want); /* epoch e: seed + e */
        CHECK(memcmp(pick, want + in_epoch * WINDOW, (size_t)count * sizeof *pick) == 0, "update %d is out of order",
              u);
        if (u == 8) saved = c;
    }
    CHECK(fabs(usli_cursor_epoch(&c) - (2 + 48.0 / 50)) < 1e-12, "epoch %g", usli_cursor_epoch(&c));
    /* Going on from the copy gives the same rows. */
    usli_cursor_init(&c, ROWS, 3407, true);
    for (int u = 0; u < UPDATES; u++) {
        CHECK_OK(ctx, usli_cursor_window(ctx, &c, WINDOW, pick, &count));
        if (u <= 8) continue;
        CHECK_OK(ctx, usli_cursor_window(ctx, &saved, WINDOW, again, &count_again));
        CHECK(count == count_again && memcmp(pick, again, (size_t)count * sizeof *pick) == 0,
              "update %d after going on", u);
    }
    usli_cursor_init(&c, 5, 1, false);
    for (int u = 0; u < 4; u++) {
        CHECK_OK(ctx, usli_cursor_window(ctx, &c, 3, pick, &count));
        CHECK(count == (u % 2 ? 2 : 3) && pick[0] == (u % 2 ? 3 : 0), "in order: update %d", u);
    }
    CHECK(usli_updates_per_epoch(999, 2, 4) == 125, "%lld updates", (long long)usli_updates_per_epoch(999, 2, 4));
    CHECK(usli_updates_per_epoch(1, 2, 4) == 1 && usli_updates_per_epoch(8, 2, 4) == 1 &&
              usli_updates_per_epoch(9, 2, 4) == 2,
          "updates");
}

static usl_status small_run(usl_ctx *ctx) {
    usl_status st;
    usli_rows *rows = NULL, *masked = NULL;
    usli_window *w = NULL, *p = NULL;
    usli_cursor c;
    int64_t pick[4], count;
    int32_t ids[40];
    for (int32_t i = 0; i < 40; i++) ids[i] = i % 7;
    USLI_TRYGO(usli_rows_new(ctx, 0, &rows));
    for (int64_t i = 0; i < 4; i++) USLI_TRYGO(usli_rows_add(rows, ids, NULL, 40 - i));
    USLI_TRYGO(usli_rows_mask_responses(rows, IDS(1, 2), IDS(4, 5), false, &masked));
    usli_cursor_init(&c, 4, 1, true);
    USLI_TRYGO(usli_cursor_window(ctx, &c, 4, pick, &count));
    USLI_TRYGO(usli_window_build(ctx, masked, pick, count, 2, &w));
    st = usli_window_part(ctx, w, 1, 100, 2, &p);
done:
    usli_window_free(p);
    usli_window_free(w);
    usli_rows_release(masked);
    usli_rows_release(rows);
    return st;
}

int main(void) {
    usl_ctx *ctx;
    CHECK(usl_ctx_new(NULL, &ctx) == USL_OK, "context");
    test_add(ctx);
    test_window(ctx);
    test_mask(ctx);
    test_order(ctx);
    test_cursor(ctx);
    usl_ctx_free(ctx);
    test_failing("rows", small_run);
    return test_end("rows");
}
