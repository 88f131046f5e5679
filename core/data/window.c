#include "core/data/window.h"

#include <string.h>

static usl_status window_new(usl_ctx *ctx, int64_t tokens, int64_t rows, usli_window **out) {
    size_t t = (size_t)tokens, r = (size_t)rows;
    *out = NULL;
    if (tokens > INT32_MAX)
        return usli_fail(ctx, USL_ERR_INVALID, "an update of %lld tokens is too long; use a smaller batch",
                         (long long)tokens);
    size_t bytes = sizeof **out + r * sizeof(int64_t) + (3 * t + 2 * r + 1) * sizeof(int32_t);
    usli_window *w = usli_calloc(ctx, 1, bytes);
    if (!w) return usli_nomem(ctx, bytes);
    w->ctx = ctx;
    w->tokens = tokens;
    w->rows = rows;
    w->row_id = (int64_t *)(void *)(w + 1);
    w->ids = (int32_t *)(void *)(w->row_id + r);
    w->targets = w->ids + t;
    w->positions = w->targets + t;
    w->micro = w->positions + t;
    w->cu = w->micro + r;
    *out = w;
    return USL_OK;
}

void usli_window_free(usli_window *w) {
    if (w) usli_free(w->ctx, w);
}

static void note(usli_window *w, int64_t row) {
    int64_t n = w->cu[row + 1] - w->cu[row];
    if (n > w->longest) w->longest = n;
    for (int64_t i = w->cu[row]; i < w->cu[row + 1]; i++) w->counted += w->targets[i] != USLI_IGNORE;
}

usl_status usli_window_build(usl_ctx *ctx, const usli_rows *rows, const int64_t *pick, int64_t count,
                             int64_t micro_batch, usli_window **out) {
    int64_t tokens = 0;
    for (int64_t r = 0; r < count; r++) tokens += usli_rows_length(rows, pick[r]);
    usli_window *w;
    USLI_TRY(window_new(ctx, tokens, count, out));
    w = *out;
    for (int64_t r = 0; r < count; r++) {
        const int32_t *ids, *labels;
        int64_t n, at = w->cu[r];
        usli_rows_at(rows, pick[r], &ids, &labels, &n);
        memcpy(w->ids + at, ids, (size_t)n * sizeof *ids);
        for (int64_t i = 0; i < n; i++) {
            w->targets[at + i] = i + 1 < n ? labels[i + 1] : USLI_IGNORE;
            w->positions[at + i] = (int32_t)i;
        }
        w->cu[r + 1] = (int32_t)(at + n);
        w->row_id[r] = pick[r];
        w->micro[r] = (int32_t)(r / micro_batch);
        note(w, r);
    }
    return USL_OK;
}

usl_status usli_window_part(usl_ctx *ctx, const usli_window *w, int64_t first, int64_t capacity_tokens,
                            int64_t capacity_rows, usli_window **out) {
    int64_t last = first, base = w->cu[first];
    while (last < w->rows && last - first < capacity_rows && w->cu[last + 1] - base <= capacity_tokens) last++;
    *out = NULL;
    if (last == first)
        return usli_fail(ctx, USL_ERR_NOMEM, "row %lld has %lld tokens; a pass has room for %lld; lower max_seq_length",
                         (long long)w->row_id[first] + 1, (long long)(w->cu[first + 1] - base),
                         (long long)capacity_tokens);
    usli_window *p;
    USLI_TRY(window_new(ctx, w->cu[last] - base, last - first, out));
    p = *out;
    size_t bytes = (size_t)p->tokens * sizeof(int32_t);
    memcpy(p->ids, w->ids + base, bytes);
    memcpy(p->targets, w->targets + base, bytes);
    memcpy(p->positions, w->positions + base, bytes);
    for (int64_t r = 0; r < p->rows; r++) {
        p->cu[r + 1] = (int32_t)(w->cu[first + r + 1] - base);
        p->row_id[r] = w->row_id[first + r];
        p->micro[r] = w->micro[first + r];
        note(p, r);
    }
    return USL_OK;
}
