/* Which rows come next. Plain data, so a checkpoint can hold it. Per epoch e the order is torch.randperm with seed + e,
 * as transformers' Trainer has it through accelerate; an update never crosses the end of an epoch. */
#ifndef USLI_DATA_CURSOR_H
#define USLI_DATA_CURSOR_H

#include "core/base/ctx.h"

typedef struct usli_cursor {
    int64_t rows;
    uint32_t seed;
    int64_t epoch, position; /* rows of this epoch already given */
    bool shuffle;
} usli_cursor;

void usli_cursor_init(usli_cursor *c, int64_t rows, uint32_t seed, bool shuffle);
/* The rows of the next update: *count of at most `window`. */
usl_status usli_cursor_window(usl_ctx *ctx, usli_cursor *c, int64_t window, int64_t *pick, int64_t *count);
/* Epochs done, with the fraction of the current one. */
double usli_cursor_epoch(const usli_cursor *c);
/* Updates of one epoch: the last, partial one counts. */
int64_t usli_updates_per_epoch(int64_t rows, int64_t batch, int64_t accumulation);

#endif
