#include "core/data/cursor.h"

#include <string.h>

#include "core/base/rng.h"

void usli_cursor_init(usli_cursor *c, int64_t rows, uint32_t seed, bool shuffle) {
    memset(c, 0, sizeof *c);
    c->rows = rows;
    c->seed = seed;
    c->shuffle = shuffle;
}

usl_status usli_cursor_window(usl_ctx *ctx, usli_cursor *c, int64_t window, int64_t *pick, int64_t *count) {
    if (c->position >= c->rows) {
        c->epoch++;
        c->position = 0;
    }
    int64_t left = c->rows - c->position, n = left < window ? left : window, *order = NULL;
    if (c->shuffle) {
        if (!(order = usli_malloc(ctx, (size_t)c->rows * sizeof *order)))
            return usli_nomem(ctx, (size_t)c->rows * sizeof *order);
        usli_randperm(c->seed + (uint32_t)c->epoch, c->rows, order);
    }
    for (int64_t i = 0; i < n; i++) pick[i] = order ? order[c->position + i] : c->position + i;
    usli_free(ctx, order);
    c->position += n;
    *count = n;
    return USL_OK;
}

double usli_cursor_epoch(const usli_cursor *c) {
    return (double)c->epoch + (c->rows ? (double)c->position / (double)c->rows : 0);
}

int64_t usli_updates_per_epoch(int64_t rows, int64_t batch, int64_t accumulation) {
    int64_t batches = (rows + batch - 1) / batch;
    return (batches + accumulation - 1) / accumulation;
}
