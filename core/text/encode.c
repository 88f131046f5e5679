/* Text to ids. */
#include <string.h>

#include "core/base/pool.h"
#include "core/text/parts.h"

typedef struct encoder {
    usl_ctx *ctx;
    const usli_tokenizer *tok;
    usli_work work;
    usli_bpe_work bpe;
    usli_segments outer, inner;
    usli_buf normal;
    usli_ids ids;
} encoder;

/* Cuts text at the matches of each pattern in turn, and encodes what is left in the end. */
static usl_status encode_cut(encoder *e, int level, const char *text, size_t len) {
    if (level == e->tok->cut_count) return usli_bpe_encode(e->ctx, e->tok, &e->bpe, text, len, &e->ids);
    usli_scan_fn scan = e->tok->cuts[level];
    size_t last = 0;
    for (size_t at = 0, end; at < len; at = end) {
        end = scan(text, len, at);
        if (end == at) {
            end += usli_utf8_step(text[at]);
            continue;
        }
        if (at > last) USLI_TRY(encode_cut(e, level + 1, text + last, at - last));
        USLI_TRY(encode_cut(e, level + 1, text + at, end - at));
        last = end;
    }
    return len > last ? encode_cut(e, level + 1, text + last, len - last) : USL_OK;
}

/* Normalised text without added tokens. */
static usl_status encode_plain(encoder *e, const char *text, size_t len, bool from_start) {
    usli_work *w = &e->work;
    if (e->tok->direct) return encode_cut(e, 0, text, len);
    w->now.text.len = 0;
    w->now.spans.count = 0;
    w->from_start = from_start;
    USLI_TRY(usli_buf_add(e->ctx, &w->now.text, text, len));
    USLI_TRY(usli_spans_add(e->ctx, &w->now.spans, 0, len, false));
    USLI_TRY(usli_pre_tokenize(e->ctx, &e->tok->pre_tokenizer, w));
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span s = w->now.spans.items[i];
        USLI_TRY(usli_bpe_encode(e->ctx, e->tok, &e->bpe, w->now.text.data + s.start, s.end - s.start, &e->ids));
    }
    return USL_OK;
}

/* Text between added tokens that are looked for as it was written. */
static usl_status encode_raw(encoder *e, const char *text, size_t len, bool from_start) {
    usli_work *w = &e->work;
    w->now.text.len = 0;
    USLI_TRY(usli_buf_add(e->ctx, &w->now.text, text, len));
    USLI_TRY(usli_normalize(e->ctx, &e->tok->normalizer, w));
    usli_buf t = e->normal;
    e->normal = w->now.text;
    w->now.text = t;
    USLI_TRY(usli_added_split(e->ctx, &e->tok->normalized, e->normal.data, e->normal.len, &e->inner));
    for (size_t i = 0; i < e->inner.count; i++) {
        usli_segment s = e->inner.items[i];
        USLI_TRY(s.id >= 0 ? usli_ids_add(e->ctx, &e->ids, s.id)
                           : encode_plain(e, e->normal.data + s.start, s.end - s.start, from_start && s.start == 0));
    }
    return USL_OK;
}

static usl_status add_template(encoder *e, const usli_ids *ids, unsigned flags) {
    for (size_t i = 0; (flags & USLI_ENCODE_SPECIAL) && i < ids->count; i++)
        USLI_TRY(usli_ids_add(e->ctx, &e->ids, ids->items[i]));
    return USL_OK;
}

/* Appends the ids of one text. */
static usl_status encode_text(encoder *e, const char *text, size_t len, unsigned flags) {
    usl_ctx *ctx = e->ctx;
    /* Positions are 32 bits, and byte-level spelling doubles the text. */
    if (len > INT32_MAX / 4)
        return usli_fail(ctx, USL_ERR_INVALID, "a text of %zu bytes is too long to encode; cut it", len);
    size_t broken, valid = usli_utf8_valid(text, len, &broken);
    if (broken)
        return usli_fail(ctx, USL_ERR_INVALID, "the text is not valid UTF-8 at byte %zu; convert it first", valid + 1);
    USLI_TRY(usli_grow(ctx, &e->ids.items, &e->ids.cap, e->ids.count + len / 3 + 8, sizeof *e->ids.items));
    USLI_TRY(add_template(e, &e->tok->template_before, flags));
    USLI_TRY(usli_added_split(ctx, &e->tok->raw, text, len, &e->outer));
    for (size_t i = 0; i < e->outer.count; i++) {
        usli_segment s = e->outer.items[i];
        USLI_TRY(s.id >= 0 ? usli_ids_add(ctx, &e->ids, s.id)
                           : encode_raw(e, text + s.start, s.end - s.start, s.start == 0));
    }
    return add_template(e, &e->tok->template_after, flags);
}

static void encoder_free(encoder *e) {
    usli_work_free(e->ctx, &e->work);
    usli_bpe_work_free(e->ctx, &e->bpe);
    usli_free(e->ctx, e->outer.items);
    usli_free(e->ctx, e->inner.items);
    usli_free(e->ctx, e->normal.data);
    usli_free(e->ctx, e->ids.items);
    memset(e, 0, sizeof *e);
}

usl_status usli_tokenizer_encode(usl_ctx *ctx, const usli_tokenizer *tok, const char *text, size_t len, unsigned flags,
                                 int32_t **ids, size_t *count) {
    encoder e = { .ctx = ctx, .tok = tok };
    *ids = NULL;
    *count = 0;
    usl_status st = usli_bpe_work_new(ctx, &e.bpe, len);
    if (st == USL_OK) st = encode_text(&e, text, len, flags);
    if (st == USL_OK) {
        *ids = e.ids.items;
        *count = e.ids.count;
        e.ids.items = NULL;
    }
    encoder_free(&e);
    return st;
}

/* ---- Many texts at once
 * ----------------------------------------------------------------------------------------------------- */

/* Where a text's ids stand in what one worker has put out. */
typedef struct placed {
    size_t at, count;
    int worker;
} placed;

typedef struct batch {
    const char *const *texts;
    const size_t *lens;
    unsigned flags;
    size_t *first; /* (tasks + 1) the first text of each task */
    placed *where; /* (texts) */
    encoder *encoders;
    atomic_size_t failed; /* the first text that cannot be encoded */
    usl_status *status;   /* of each worker's worst text, with its number */
    size_t *bad;
} batch;

static void encode_task(void *arg, int64_t task, int worker) {
    batch *b = arg;
    encoder *e = &b->encoders[worker];
    for (size_t i = b->first[task]; i < b->first[task + 1]; i++) {
        /* Texts before the first bad one are still looked at: the error names the first, whoever is quicker. */
        if (i > atomic_load(&b->failed)) return;
        size_t at = e->ids.count;
        usl_status st = encode_text(e, b->texts[i], b->lens[i], b->flags);
        b->where[i] = (placed){ at, e->ids.count - at, worker };
        if (st == USL_OK) continue;
        size_t first = atomic_load(&b->failed);
        while (i < first && !atomic_compare_exchange_weak(&b->failed, &first, i)) continue;
        b->status[worker] = st;
        b->bad[worker] = i;
        return;
    }
}

/* Tasks of so many bytes that handing them out costs nothing beside them. */
static int64_t cut_tasks(batch *b, size_t count) {
    enum { TASK_BYTES = 65536 };
    int64_t tasks = 0;
    size_t bytes = 0;
    b->first[0] = 0;
    for (size_t i = 0; i < count; i++) {
        bytes += b->lens[i];
        if (bytes < TASK_BYTES && i + 1 < count) continue;
        b->first[++tasks] = i + 1;
        bytes = 0;
    }
    return tasks;
}

static usl_status gather(usl_ctx *ctx, const batch *b, size_t count, int32_t **ids, size_t **offsets) {
    size_t *at = usli_calloc(ctx, count + 1, sizeof *at);
    if (!at) return usli_nomem(ctx, (count + 1) * sizeof *at);
    for (size_t i = 0; i < count; i++) at[i + 1] = at[i] + b->where[i].count;
    int32_t *all = usli_calloc(ctx, at[count] + 1, sizeof *all);
    if (!all) {
        usli_free(ctx, at);
        return usli_nomem(ctx, (at[count] + 1) * sizeof *all);
    }
    for (size_t i = 0; i < count; i++)
        if (b->where[i].count)
            memcpy(all + at[i], b->encoders[b->where[i].worker].ids.items + b->where[i].at,
                   b->where[i].count * sizeof *all);
    *ids = all;
    *offsets = at;
    return USL_OK;
}

/* A worker's sentence about the first bad text becomes the caller's. */
static usl_status explain(usl_ctx *ctx, const batch *b, int workers) {
    size_t failed = atomic_load(&b->failed);
    for (int i = 0; i < workers; i++)
        if (b->status[i] != USL_OK && b->bad[i] == failed)
            return usli_fail(ctx, b->status[i], "text %zu of the batch: %s", failed + 1,
                             usl_ctx_errmsg(b->encoders[i].ctx));
    return USL_OK;
}

usl_status usli_tokenizer_encode_batch(usl_ctx *ctx, const usli_tokenizer *tok, const char *const *texts,
                                       const size_t *lens, size_t count, unsigned flags, int32_t **ids,
                                       size_t **offsets) {
    batch b = { .texts = texts, .lens = lens, .flags = flags };
    int workers = usli_pool_threads(ctx->pool);
    usli_workers *lent = NULL;
    size_t bytes = 0;
    usl_status st;
    *ids = NULL;
    *offsets = NULL;
    for (size_t i = 0; i < count; i++) bytes += lens[i];
    USLI_TRYGO(usli_workers_new(ctx, &lent));
    b.first = usli_calloc(ctx, count + 1, sizeof *b.first);
    b.where = usli_calloc(ctx, count + 1, sizeof *b.where);
    b.encoders = usli_calloc(ctx, (size_t)workers, sizeof *b.encoders);
    b.status = usli_calloc(ctx, (size_t)workers, sizeof *b.status);
    b.bad = usli_calloc(ctx, (size_t)workers, sizeof *b.bad);
    if (!b.first || !b.where || !b.encoders || !b.status || !b.bad) {
        st = usli_nomem(ctx, (count + 1) * sizeof *b.where);
        goto done;
    }
    atomic_init(&b.failed, SIZE_MAX);
    for (int i = 0; i < workers; i++) {
        b.encoders[i].ctx = usli_workers_ctx(lent, i);
        b.encoders[i].tok = tok;
        USLI_TRYGO(usli_bpe_work_new(ctx, &b.encoders[i].bpe, bytes / (size_t)workers));
    }
    usli_pool_run(ctx->pool, cut_tasks(&b, count), encode_task, &b);
    USLI_TRYGO(explain(ctx, &b, workers));
    st = gather(ctx, &b, count, ids, offsets);
done:
    for (int i = 0; b.encoders && i < workers; i++)
        if (b.encoders[i].ctx) encoder_free(&b.encoders[i]);
    usli_free(ctx, b.first);
    usli_free(ctx, b.where);
    usli_free(ctx, b.encoders);
    usli_free(ctx, b.status);
    usli_free(ctx, b.bad);
    usli_workers_free(lent);
    return st;
}
