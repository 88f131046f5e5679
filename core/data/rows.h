/* Tokenised rows, ready to train: ids and labels of all rows in one blob. Labels are unshifted, as in transformers:
 * label t belongs to id t, -100 does not count; the shift happens when a window is packed. Rows in which nothing would
 * count are left out and counted. */
#ifndef USLI_DATA_ROWS_H
#define USLI_DATA_ROWS_H

#include "core/base/ctx.h"

enum { USLI_IGNORE = -100 };

typedef struct usl_rows usli_rows;

usl_status usli_rows_new(usl_ctx *ctx, int64_t max_length, usli_rows **out);
usli_rows *usli_rows_retain(usli_rows *rows); /* NULL is fine */
void usli_rows_release(usli_rows *rows);
usl_ctx *usli_rows_ctx(const usli_rows *rows);
/* labels NULL: every id counts. Cut to max_length from the end. */
usl_status usli_rows_add(usli_rows *rows, const int32_t *ids, const int32_t *labels, int64_t count);
int64_t usli_rows_count(const usli_rows *rows);
int64_t usli_rows_length(const usli_rows *rows, int64_t i);
void usli_rows_at(const usli_rows *rows, int64_t i, const int32_t **ids, const int32_t **labels, int64_t *count);
void usli_rows_stats(const usli_rows *rows, usl_rows_stats *stats);
/* train_on_responses_only: labels count from after each response marker to before the next instruction marker, or to
 * the end; what did not count before stays out. *out is new. */
usl_status usli_rows_mask_responses(const usli_rows *rows, const int32_t *instruction, int64_t instruction_count,
                                    const int32_t *response, int64_t response_count, bool last_only, usli_rows **out);

#endif
