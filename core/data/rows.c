#include "core/data/rows.h"

#include <string.h>

struct usl_rows {
    usl_ctx *ctx;
    atomic_int refs;
    int64_t max_length;
    int32_t *ids, *labels; /* (used) */
    size_t ids_cap, labels_cap, used;
    int64_t *start; /* (count + 1) */
    size_t start_cap;
    int64_t count;
    int64_t counted, longest, truncated, dropped;
};

usl_status usli_rows_new(usl_ctx *ctx, int64_t max_length, usli_rows **out) {
    *out = NULL;
    if (max_length < 0)
        return usli_fail(ctx, USL_ERR_INVALID, "max_length is %lld; 0 (no limit) or more is wanted",
                         (long long)max_length);
    usli_rows *r = usli_calloc(ctx, 1, sizeof *r);
    if (!r) return usli_nomem(ctx, sizeof *r);
    usl_status st = usli_grow(ctx, &r->start, &r->start_cap, 1, sizeof *r->start);
    if (st != USL_OK) {
        usli_free(ctx, r);
        return st;
    }
    r->start[0] = 0;
    r->ctx = ctx;
    usli_ctx_retain(ctx);
    r->max_length = max_length;
    atomic_init(&r->refs, 1);
    *out = r;
    return USL_OK;
}

usli_rows *usli_rows_retain(usli_rows *r) {
    if (r) atomic_fetch_add(&r->refs, 1);
    return r;
}

void usli_rows_release(usli_rows *r) {
    if (!r || atomic_fetch_sub(&r->refs, 1) != 1) return;
    usl_ctx *ctx = r->ctx;
    usli_free(ctx, r->ids);
    usli_free(ctx, r->labels);
    usli_free(ctx, r->start);
    usli_free(ctx, r);
    usl_ctx_free(ctx);
}

usl_ctx *usli_rows_ctx(const usli_rows *r) {
    return r->ctx;
}

usl_status usli_rows_add(usli_rows *r, const int32_t *ids, const int32_t *labels, int64_t count) {
    usl_ctx *ctx = r->ctx;
    if (count > INT32_MAX) return usli_fail(ctx, USL_ERR_INVALID, "a row of %lld tokens is too long", (long long)count);
    bool cut = r->max_length && count > r->max_length;
    if (cut) count = r->max_length;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0) return usli_fail(ctx, USL_ERR_INVALID, "token id %d is negative", ids[i]);
    int64_t counted = 0;
    for (int64_t i = 1; i < count; i++) {
        int32_t label = labels ? labels[i] : ids[i];
        if (label < 0 && label != USLI_IGNORE)
            return usli_fail(ctx, USL_ERR_INVALID, "label %d is neither a token id nor -100", label);
        counted += label != USLI_IGNORE;
    }
    if (!counted) {
        r->dropped++;
        return USL_OK;
    }
    size_t need = r->used + (size_t)count;
    USLI_TRY(usli_grow(ctx, &r->ids, &r->ids_cap, need, sizeof *r->ids));
    USLI_TRY(usli_grow(ctx, &r->labels, &r->labels_cap, need, sizeof *r->labels));
    USLI_TRY(usli_grow(ctx, &r->start, &r->start_cap, (size_t)r->count + 2, sizeof *r->start));
    memcpy(r->ids + r->used, ids, (size_t)count * sizeof *ids);
    memcpy(r->labels + r->used, labels ? labels : ids, (size_t)count * sizeof *ids);
    r->used = need;
    r->start[++r->count] = (int64_t)need;
    r->counted += counted;
    r->truncated += cut;
    if (count > r->longest) r->longest = count;
    return USL_OK;
}

int64_t usli_rows_count(const usli_rows *r) {
    return r->count;
}

int64_t usli_rows_length(const usli_rows *r, int64_t i) {
    return r->start[i + 1] - r->start[i];
}

void usli_rows_at(const usli_rows *r, int64_t i, const int32_t **ids, const int32_t **labels, int64_t *count) {
    *ids = r->ids + r->start[i];
    if (labels) *labels = r->labels + r->start[i];
    *count = usli_rows_length(r, i);
}

void usli_rows_stats(const usli_rows *r, usl_rows_stats *out) {
    usl_rows_stats s = { out->size, r->count, (int64_t)r->used, r->counted, r->longest, r->truncated, r->dropped };
    memcpy(out, &s, out->size < sizeof s ? out->size : sizeof s);
}

static bool starts_with(const int32_t *ids, int64_t left, const int32_t *marker, int64_t count) {
    return count <= left && memcmp(ids, marker, (size_t)count * sizeof *ids) == 0;
}

/* Copies into labels what counts: from response marker to instruction marker. */
static void mask_row(const int32_t *ids, const int32_t *old, int64_t n, const int32_t *ins, int64_t n_ins,
                     const int32_t *res, int64_t n_res, bool last_only, int32_t *labels) {
    bool inside = false;
    for (int64_t i = 0; i < n; i++) labels[i] = USLI_IGNORE;
    for (int64_t i = 0; i < n;) {
        if (!inside && starts_with(ids + i, n - i, res, n_res)) {
            if (last_only)
                for (int64_t k = 0; k < i; k++) labels[k] = USLI_IGNORE;
            inside = true;
            i += n_res;
        } else if (inside && starts_with(ids + i, n - i, ins, n_ins)) {
            inside = false;
            i += n_ins;
        } else {
            if (inside) labels[i] = old[i];
            i++;
        }
    }
}

usl_status usli_rows_mask_responses(const usli_rows *r, const int32_t *ins, int64_t n_ins, const int32_t *res,
                                    int64_t n_res, bool last_only, usli_rows **out) {
    usl_ctx *ctx = r->ctx;
    *out = NULL;
    if (n_res < 1 || n_ins < 1)
        return usli_fail(ctx, USL_ERR_INVALID, "instruction_part and response_part must hold at least one token each");
    USLI_TRY(usli_rows_new(ctx, 0, out));
    int32_t *labels = usli_malloc(ctx, (size_t)r->longest * sizeof *labels);
    usl_status st = labels ? USL_OK : usli_nomem(ctx, (size_t)r->longest * sizeof *labels);
    for (int64_t i = 0; st == USL_OK && i < r->count; i++) {
        const int32_t *ids, *old;
        int64_t n;
        usli_rows_at(r, i, &ids, &old, &n);
        mask_row(ids, old, n, ins, n_ins, res, n_res, last_only, labels);
        st = usli_rows_add(*out, ids, labels, n);
    }
    usli_free(ctx, labels);
    if (st != USL_OK) {
        usli_rows_release(*out);
        *out = NULL;
        return st;
    }
    (*out)->truncated = r->truncated;
    (*out)->dropped += r->dropped;
    return USL_OK;
}
