/* Tokenised rows behind unsloth.h. */
#include "core/data/rows.h"

usl_status usl_rows_new(usl_ctx *ctx, int64_t max_length, usl_rows **out) {
    return usli_rows_new(ctx, max_length, out);
}

void usl_rows_free(usl_rows *rows) {
    usli_rows_release(rows);
}

usl_status usl_rows_add(usl_rows *rows, const int32_t *ids, const int32_t *labels, size_t count) {
    return usli_rows_add(rows, ids, labels, count > INT64_MAX ? INT64_MAX : (int64_t)count);
}

void usl_rows_get_stats(const usl_rows *rows, usl_rows_stats *stats) {
    usli_rows_stats(rows, stats);
}

usl_status usl_rows_get(const usl_rows *rows, int64_t i, const int32_t **ids, const int32_t **labels, size_t *count) {
    int64_t n;
    if (i < 0 || i >= usli_rows_count(rows))
        return usli_fail(usli_rows_ctx(rows), USL_ERR_INVALID, "there is no row %lld among %lld (counted from 0)",
                         (long long)i, (long long)usli_rows_count(rows));
    usli_rows_at(rows, i, ids, labels, &n);
    *count = (size_t)n;
    return USL_OK;
}

usl_status usl_rows_mask_responses(const usl_rows *rows, const int32_t *instruction, size_t instruction_count,
                                   const int32_t *response, size_t response_count, int last_only, usl_rows **out) {
    return usli_rows_mask_responses(rows, instruction, (int64_t)instruction_count, response, (int64_t)response_count,
                                    last_only, out);
}
