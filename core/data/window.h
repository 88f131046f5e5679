/* A window: the rows of one optimiser update behind one another, without padding. Targets are shifted inside each row,
 * so the last token of a row has none and no row sees another. */
#ifndef USLI_DATA_WINDOW_H
#define USLI_DATA_WINDOW_H

#include "core/data/rows.h"

typedef struct usli_window {
    usl_ctx *ctx;
    int64_t tokens, rows, counted, longest;
    int32_t *ids, *targets, *positions; /* (tokens); targets USLI_IGNORE where none counts */
    int32_t *cu;                        /* (rows + 1) where rows begin */
    int64_t *row_id;                    /* (rows) number of the row in the data set */
    int32_t *micro;                     /* (rows) micro-batch of the row, for losses that are per micro-batch */
} usli_window;

/* pick: (count) row numbers. *out is new: usli_window_free. */
usl_status usli_window_build(usl_ctx *ctx, const usli_rows *rows, const int64_t *pick, int64_t count,
                             int64_t micro_batch, usli_window **out);
/* The next pass of a window: rows from `first` on, as many as fit both capacities; a row that does not fit alone is an
 * error with the numbers. *out is new. */
usl_status usli_window_part(usl_ctx *ctx, const usli_window *w, int64_t first, int64_t capacity_tokens,
                            int64_t capacity_rows, usli_window **out);
void usli_window_free(usli_window *w);

#endif
