#include "core/infer/generate.h"

#include <string.h>

#include "core/base/dtype.h"

/* A running generation's memory and state. The batch's arrays are the host's; passes read their twins. */
typedef struct usl_generator {
    usl_model *m; /* retained */
    usl_ctx *ctx;
    usli_exec exec; /* the model's, with an arena of our own */
    usli_arena arena;
    void *arena_base, *cache_base;
    usl_generate_opts opts;
    usli_prompt *prompts; /* copies, in given_ids */
    int32_t *given_ids, *stop_ids;
    usli_generated *out;
    int rows;
    bool started;
    int64_t vocab;   /* ids that may be drawn */
    int64_t rows_of; /* the model's vocabulary, which the arena was sized for */
    int64_t longest; /* tokens a row can come to */
    usli_cache cache;
    int32_t *numbers; /* one block for all the arrays below */
    usli_twin numbers_twin, offset_twin;
    int32_t *ids, *position, *angle, *store;              /* (tokens of a step) */
    int32_t *cu, *begin, *k_lens, *last, *cu_seen, *next; /* (rows + 1) */
    int32_t *seen;                                        /* (rows * longest) */
    int *live;                                            /* rows still going, by number */
    int live_count;
    uint64_t offset; /* steps sampled: Philox counter */
    struct {
        void *work; /* a recorded step of what follows, or NULL */
        bool seen, refused;
        int rows, placing;
        int64_t longest;
    } graph;
} session;

static int32_t *on_device(const session *s, const int32_t *array) {
    return usli_twin_at(&s->numbers_twin, array);
}

static bool penalised(const session *s) {
    return s->opts.repetition_penalty > 0 && s->opts.repetition_penalty != 1.0;
}

static usl_status check_ids(usl_model *m, const int32_t *ids, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= m->config.vocab)
            return usli_fail(m->ctx, USL_ERR_INVALID, "token id %d at position %lld is outside the vocabulary of %lld",
                             ids[i], (long long)i + 1, (long long)m->config.vocab);
    if (count > m->context)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "%lld tokens do not fit max_seq_length %lld; load the model with a larger "
                         "max_seq_length or shorten the text",
                         (long long)count, (long long)m->context);
    return USL_OK;
}

/* Hidden states of a batch, then logits of the tokens in `last`: (count, vocab). */
static usl_status forward(usli_exec *x, const usl_model *m, const usli_batch *b, const usli_cache *cache,
                          const int32_t *last, int64_t count, float **logits) {
    void *hidden, *picked;
    USLI_TAKE(*logits, x, false, (size_t)count * (size_t)m->config.vocab * sizeof(float));
    USLI_TRY(usli_pass_infer(x, m, b, cache, &hidden));
    USLI_TAKE(picked, x, false, (size_t)count * (size_t)m->config.hidden * usli_dtype_bytes(m->dtype));
    usli_gather_args g = { .rows = count,
                           .cols = m->config.hidden,
                           .x_rows = b->tokens,
                           .dtype = m->dtype,
                           .index = last,
                           .x = hidden,
                           .y = picked };
    USLI_TRY(usli_op_gather(x, &g, USLI_FORWARD));
    return usli_pass_logits(x, m, picked, count, *logits);
}

/* ---- Logits
 * ------------------------------------------------------------------------------------------------------------------------
 */

enum { LOGITS_CHUNK = 512 };

static usl_status logits_pass(void *ud, usli_exec *x, const usl_model *m, const usli_batch *b) {
    float *out = ud;
    void *hidden;
    float *logits;
    int64_t most = b->tokens < LOGITS_CHUNK ? b->tokens : LOGITS_CHUNK;
    USLI_TRY(usli_pass_infer(x, m, b, NULL, &hidden));
    USLI_TAKE(logits, x, false, (size_t)(most * m->config.vocab) * sizeof(float));
    size_t row = (size_t)m->config.hidden * usli_dtype_bytes(m->dtype);
    for (int64_t i = 0; i < b->tokens; i += most) {
        int64_t n = b->tokens - i < most ? b->tokens - i : most;
        USLI_TRY(usli_pass_logits(x, m, (char *)hidden + (size_t)i * row, n, logits));
        if (x->arena->dry) continue;
        USLI_TRY(
            x->backend->copy_out(x, out + i * m->config.vocab, logits, (size_t)(n * m->config.vocab) * sizeof(float)));
    }
    return USL_OK;
}

usl_status usli_run_row(usl_model *m, const int32_t *ids, int64_t count, usli_row_fn fn, void *ud) {
    usl_ctx *ctx = m->ctx;
    if (count < 1) return usli_fail(ctx, USL_ERR_INVALID, "at least one token id is needed (BOS, say)");
    USLI_TRY(usli_model_check_weights(m));
    USLI_TRY(check_ids(m, ids, count));
    size_t n = (size_t)count;
    size_t total = 3 * n + 2;
    int32_t *numbers = usli_malloc(ctx, total * sizeof *numbers); /* ids, positions, angles, cu */
    if (!numbers) return usli_nomem(ctx, total * sizeof *numbers);
    int32_t *position = numbers + n, *angle = position + n, *cu = angle + n;
    memcpy(numbers, ids, n * sizeof *ids);
    for (size_t i = 0; i < n; i++) position[i] = (int32_t)i;
    cu[0] = 0;
    cu[1] = (int32_t)count;
    usli_arena arena;
    usli_exec x = m->exec;
    usli_twin twin = { 0 };
    void *base = NULL;
    usl_status st;
    x.arena = &arena;
    usli_arena_init_dry(&arena);
    USLI_TRYGO(usli_model_angles(m, 1, cu, NULL, position, angle));
    USLI_TRYGO(usli_twin_open(&x, numbers, total * sizeof *numbers, &twin));
    USLI_TRYGO(usli_twin_push(&x, &twin));
    usli_batch b = { .tokens = count,
                     .rows = 1,
                     .ids = usli_twin_at(&twin, numbers),
                     .position = usli_twin_at(&twin, position),
                     .angle = usli_twin_at(&twin, angle),
                     .cu = usli_twin_at(&twin, cu),
                     .longest = count };
    USLI_TRYGO(fn(ud, &x, m, &b));
    size_t bytes = arena.peak;
    USLI_TRYGO(usli_device_alloc(&x, bytes, &base));
    usli_arena_init(&arena, base, bytes);
    st = fn(ud, &x, m, &b);
done:
    usli_device_free(&x, base);
    usli_twin_close(&x, &twin);
    usli_free(ctx, numbers);
    return st;
}

usl_status usli_logits(usl_model *m, const int32_t *ids, int64_t count, float *out) {
    return usli_run_row(m, ids, count, logits_pass, out);
}

/* ---- Generation
 * -----------------------------------------------------------------------------------------------------------------------
 */

/* With longrope, the keys of a row that outgrows the original context are made again with the frequencies of long rows,
 * as transformers does: so many tokens then, or 0. */
static int64_t again_length(const session *s) {
    const usli_rope_config *rope = &s->m->config.rope;
    return rope->kind == USLI_ROPE_LONG && s->longest > rope->original_context ? rope->original_context + 1 : 0;
}

static int64_t again_tokens(const session *s) {
    return s->rows * again_length(s);
}

static usl_status take_memory(session *s, int64_t prompt_tokens) {
    usl_ctx *ctx = s->ctx;
    const usli_config *c = &s->m->config;
    if (prompt_tokens < s->rows) prompt_tokens = s->rows;
    if (prompt_tokens < again_tokens(s)) prompt_tokens = again_tokens(s);
    size_t most = (size_t)prompt_tokens, rows = (size_t)s->rows + 1;
    size_t n = 4 * most + 6 * rows + (size_t)s->rows * (size_t)s->longest;
    s->numbers = usli_calloc(ctx, n, sizeof *s->numbers);
    s->live = usli_calloc(ctx, rows, sizeof *s->live);
    if (!s->numbers || !s->live) return usli_nomem(ctx, n * sizeof *s->numbers);
    int32_t *p = s->numbers, **long_ones[] = { &s->ids, &s->position, &s->angle, &s->store };
    for (int i = 0; i < 4; i++, p += most) *long_ones[i] = p;
    int32_t **short_ones[] = { &s->cu, &s->begin, &s->k_lens, &s->last, &s->cu_seen, &s->next };
    for (int i = 0; i < 6; i++, p += rows) *short_ones[i] = p;
    s->seen = p;
    USLI_TRY(usli_twin_open(&s->exec, s->numbers, n * sizeof *s->numbers, &s->numbers_twin));
    USLI_TRY(usli_twin_open(&s->exec, &s->offset, sizeof s->offset, &s->offset_twin));
    s->cache = (usli_cache){ .dtype = s->m->dtype,
                             .layers = c->layers,
                             .slots = s->rows,
                             .length = s->longest,
                             .width = c->kv_heads * c->head_dim,
                             .v_width = c->kv_heads * c->v_dim,
                             .store = on_device(s, s->store),
                             .begin = on_device(s, s->begin),
                             .k_lens = on_device(s, s->k_lens) };
    size_t cells = (size_t)(c->layers * s->rows * s->longest), e = usli_dtype_bytes(s->m->dtype);
    size_t keys = cells * (size_t)s->cache.width * e, values = cells * (size_t)s->cache.v_width * e;
    USLI_TRY(usli_device_alloc(&s->exec, keys + values, &s->cache_base));
    s->cache.k = s->cache_base;
    s->cache.v = (char *)s->cache_base + keys;
    return USL_OK;
}

/* Steps that differ in nothing else are cut alike and can be replayed; every backend counts so. */
static int64_t bucket_of(const session *s, int64_t keys) {
    int64_t bucket = 256;
    while (bucket < keys) bucket *= 2;
    return bucket < s->longest ? bucket : s->longest;
}

/* Fills the batch of the live rows: their whole prompts, or their last token (all of a row, when its keys are made
 * again). Returns whether every row has one token. */
static bool fill(session *s, bool prompts, usli_batch *b) {
    int64_t t = 0, longest = 0;
    s->cache.longest = 0;
    for (int i = 0; i < s->live_count; i++) {
        int row = s->live[i];
        int64_t given = s->prompts[row].count, have = given + s->out[row].count;
        int64_t first = prompts || have == again_length(s) ? 0 : have - 1;
        s->cu[i] = (int32_t)t;
        s->begin[i] = (int32_t)(row * s->longest);
        s->k_lens[i] = (int32_t)have;
        for (int64_t p = first; p < have; p++, t++) {
            s->ids[t] = p < given ? s->prompts[row].ids[p] : s->out[row].ids[p - given];
            s->position[t] = (int32_t)p;
            s->store[t] = (int32_t)(row * s->longest + p);
        }
        s->last[i] = (int32_t)(t - 1);
        if (have - first > longest) longest = have - first;
        if (have > s->cache.longest) s->cache.longest = have;
    }
    s->cache.longest = bucket_of(s, s->cache.longest);
    s->cu[s->live_count] = (int32_t)t;
    *b = (usli_batch){ .tokens = t,
                       .rows = s->live_count,
                       .ids = on_device(s, s->ids),
                       .position = on_device(s, s->position),
                       .angle = on_device(s, s->angle),
                       .cu = on_device(s, s->cu),
                       .longest = longest };
    return !prompts && longest == 1;
}

static usl_status forward_and_sample(session *s, const usli_batch *b) {
    const usl_generate_opts *o = &s->opts;
    bool penalty = penalised(s);
    float *logits;
    s->arena.high = s->arena.low = 0;
    USLI_TRY(forward(&s->exec, s->m, b, &s->cache, on_device(s, s->last), s->live_count, &logits));
    usli_sample_args sample = { .rows = s->live_count,
                                .cols = s->vocab,
                                .stride = s->m->config.vocab,
                                .logits = logits,
                                .temperature = (float)o->temperature,
                                .top_p = (float)o->top_p,
                                .min_p = (float)o->min_p,
                                .repetition_penalty = penalty ? (float)o->repetition_penalty : 1.0f,
                                .top_k = o->top_k,
                                .seen = on_device(s, s->seen),
                                .cu_seen = penalty ? on_device(s, s->cu_seen) : NULL,
                                .seed = o->seed,
                                .offset = s->offset_twin.device,
                                .out = on_device(s, s->next) };
    return usli_op_sample(&s->exec, &sample, USLI_FORWARD);
}

/* What cannot be recorded (a device may refuse) runs plainly ever after. */
static usl_status record(session *s, const usli_batch *b) {
    const usli_backend *k = s->exec.backend;
    if (!k->record(&s->exec)) {
        s->graph.refused = true;
        return USL_OK;
    }
    usl_status st = forward_and_sample(s, b);
    void *work = k->recorded(&s->exec);
    if (st == USL_OK) s->graph.work = work;
    s->graph.refused = !s->graph.work;
    return st == USL_ERR_DEVICE ? USL_OK : st;
}

/* A decode step of one shape is recorded when it comes for the second time: the first loads kernels, and many a text
 * ends there. All that changes from step to step is in the device's memory; a ring's state is not, so nothing is
 * recorded with one. */
static usl_status run_step(session *s, const usli_batch *b, bool single) {
    const usli_backend *k = s->exec.backend;
    if (!single || !k->record || s->graph.refused || s->m->ring) return forward_and_sample(s, b);
    bool same = s->graph.seen && !usli_model_norms_stale(s->m) && s->graph.rows == s->live_count &&
                s->graph.longest == s->cache.longest && s->graph.placing == s->m->placing;
    if (!same) {
        k->forget(&s->exec, s->graph.work);
        s->graph.work = NULL;
        s->graph.seen = true;
        s->graph.rows = s->live_count;
        s->graph.longest = s->cache.longest;
        s->graph.placing = s->m->placing;
        return forward_and_sample(s, b);
    }
    if (!s->graph.work) USLI_TRY(record(s, b));
    return s->graph.work ? k->replay(&s->exec, s->graph.work) : forward_and_sample(s, b);
}

/* The larger of the two kinds of step sizes the arena. */
static usl_status size_arena(session *s) {
    usli_batch b;
    usli_arena_init_dry(&s->arena);
    s->exec.arena = &s->arena;
    fill(s, true, &b);
    if (b.tokens < again_tokens(s)) b.tokens = again_tokens(s);
    if (b.longest < again_length(s)) b.longest = again_length(s);
    USLI_TRY(forward_and_sample(s, &b));
    fill(s, false, &b);
    s->cache.longest = s->longest; /* the cache at its fullest */
    USLI_TRY(forward_and_sample(s, &b));
    size_t bytes = s->arena.peak;
    USLI_TRY(usli_device_alloc(&s->exec, bytes, &s->arena_base));
    usli_arena_init(&s->arena, s->arena_base, bytes);
    return USL_OK;
}

static void collect_seen(session *s) {
    int64_t n = 0;
    for (int i = 0; i < s->live_count; i++) {
        const usli_prompt *p = &s->prompts[s->live[i]];
        const usli_generated *g = &s->out[s->live[i]];
        s->cu_seen[i] = (int32_t)n;
        memcpy(s->seen + n, p->ids, (size_t)p->count * sizeof(int32_t));
        memcpy(s->seen + n + p->count, g->ids, (size_t)g->count * sizeof(int32_t));
        n += p->count + g->count;
    }
    s->cu_seen[s->live_count] = (int32_t)n;
}

/* The ids that were seen, which stand last and may be many, are for the penalty alone. */
static usl_status push_numbers(session *s) {
    usli_twin t = s->numbers_twin;
    if (!penalised(s)) t.bytes = (size_t)((char *)s->seen - (char *)s->numbers);
    return usli_twin_push(&s->exec, &t);
}

static bool ends(const session *s, int32_t id) {
    const usl_generate_opts *o = &s->opts;
    int64_t count = o->stop_count >= 0 ? o->stop_count : s->m->config.eos_count;
    const int32_t *ids = o->stop_count >= 0 ? o->stop_ids : s->m->config.eos;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] == id) return true;
    return false;
}

static usl_status step(session *s, bool prompts) {
    const usl_generate_opts *o = &s->opts;
    usli_batch b;
    USLI_TRY(usli_checkpoint(s->ctx));
    bool single = fill(s, prompts, &b);
    USLI_TRY(usli_model_angles(s->m, b.rows, s->cu, s->k_lens, s->position, s->angle));
    if (penalised(s)) collect_seen(s);
    USLI_TRY(push_numbers(s));
    USLI_TRY(usli_twin_push(&s->exec, &s->offset_twin));
    USLI_TRY(run_step(s, &b, single));
    USLI_TRY(
        s->exec.backend->copy_out(&s->exec, s->next, on_device(s, s->next), (size_t)s->live_count * sizeof *s->next));
    s->offset++;
    int kept = 0;
    for (int i = 0; i < s->live_count; i++) {
        int row = s->live[i];
        int32_t id = s->next[i];
        if (id < 0)
            return usli_fail(s->ctx, USL_ERR_NUMERIC,
                             "the logits are not numbers; the weights are damaged or overflow in this dtype");
        if (ends(s, id)) continue;
        bool stop = s->rows == 1 && o->on_token && o->on_token(o->ud, id);
        s->out[row].ids[s->out[row].count++] = id;
        if (!stop && s->out[row].count < o->max_new_tokens && s->prompts[row].count + s->out[row].count < s->longest)
            s->live[kept++] = row;
    }
    s->live_count = kept;
    return USL_OK;
}

static usl_status check_request(usl_model *m, const usli_prompt *prompts, int rows, const usl_generate_opts *o) {
    if (o->max_new_tokens < 1)
        return usli_fail(m->ctx, USL_ERR_INVALID, "max_new_tokens is %lld; 1 or more is wanted",
                         (long long)o->max_new_tokens);
    if (!(o->temperature >= 0 && o->temperature <= 1e30))
        return usli_fail(m->ctx, USL_ERR_INVALID, "temperature is %g; a number from 0 (greedy) to 1e30 is wanted",
                         o->temperature);
    if (!(o->top_p >= 0 && o->top_p <= 1) || !(o->min_p >= 0 && o->min_p <= 1) || !(o->repetition_penalty > 0) ||
        o->top_k < 0 || o->vocab < 0)
        return usli_fail(
            m->ctx, USL_ERR_INVALID,
            "top_p %g and min_p %g must lie between 0 and 1, repetition_penalty %g above 0; top_k %d and vocab "
            "%lld must not be negative",
            o->top_p, o->min_p, o->repetition_penalty, o->top_k, (long long)o->vocab);
    if (o->stop_count > 0 && !o->stop_ids)
        return usli_fail(m->ctx, USL_ERR_INVALID, "stop_count is %lld and stop_ids is NULL", (long long)o->stop_count);
    for (int i = 0; i < rows; i++) {
        if (prompts[i].count < 1)
            return usli_fail(m->ctx, USL_ERR_INVALID, "the prompt is empty; give at least one token (BOS, say)");
        USLI_TRY(check_ids(m, prompts[i].ids, prompts[i].count));
        if (prompts[i].count >= m->context)
            return usli_fail(m->ctx, USL_ERR_INVALID,
                             "the prompt's %lld tokens fill max_seq_length %lld and leave no room to answer; "
                             "load the model with a larger max_seq_length",
                             (long long)prompts[i].count, (long long)m->context);
    }
    return USL_OK;
}

/* The caller's arrays need not outlive the call that starts a generation. */
static usl_status copy_request(session *s, const usli_prompt *prompts, int64_t total) {
    usl_ctx *ctx = s->ctx;
    usl_generate_opts *o = &s->opts;
    size_t rows = (size_t)s->rows, stops = o->stop_count > 0 ? (size_t)o->stop_count : 0;
    s->prompts = usli_calloc(ctx, rows, sizeof *s->prompts);
    s->out = usli_calloc(ctx, rows, sizeof *s->out);
    s->given_ids = usli_calloc(ctx, (size_t)total, sizeof *s->given_ids);
    s->stop_ids = usli_calloc(ctx, stops + 1, sizeof *s->stop_ids);
    if (!s->prompts || !s->out || !s->given_ids || !s->stop_ids)
        return usli_nomem(ctx, (size_t)total * sizeof *s->given_ids);
    int32_t *at = s->given_ids;
    for (int i = 0; i < s->rows; i++) {
        s->prompts[i] = (usli_prompt){ at, prompts[i].count };
        memcpy(at, prompts[i].ids, (size_t)prompts[i].count * sizeof *at);
        at += prompts[i].count;
    }
    if (stops) memcpy(s->stop_ids, o->stop_ids, stops * sizeof *s->stop_ids);
    o->stop_ids = s->stop_ids;
    return USL_OK;
}

static usl_status start(session *s, const usli_prompt *prompts) {
    usl_generate_opts *o = &s->opts;
    int64_t total = 0;
    USLI_TRY(check_request(s->m, prompts, s->rows, o));
    if (o->max_new_tokens > s->m->context) o->max_new_tokens = s->m->context;
    s->rows_of = s->m->config.vocab;
    s->vocab = o->vocab > 0 && o->vocab < s->rows_of ? o->vocab : s->rows_of;
    for (int i = 0; i < s->rows; i++) {
        int64_t most = prompts[i].count + o->max_new_tokens;
        if (most > s->m->context) most = s->m->context;
        if (most > s->longest) s->longest = most;
        total += prompts[i].count;
    }
    USLI_TRY(copy_request(s, prompts, total));
    for (int i = 0; i < s->rows; i++)
        if (!(s->out[i].ids = usli_malloc(s->ctx, (size_t)o->max_new_tokens * sizeof(int32_t))))
            return usli_nomem(s->ctx, (size_t)o->max_new_tokens * sizeof(int32_t));
    USLI_TRY(take_memory(s, total));
    s->live_count = s->rows;
    for (int i = 0; i < s->rows; i++) s->live[i] = i;
    return size_arena(s);
}

usl_status usli_generator_new(usl_model *m, const usli_prompt *prompts, int rows, const usl_generate_opts *given,
                              usl_generator **out) {
    usl_ctx *ctx = m->ctx;
    *out = NULL;
    USLI_TRY(usli_model_check_weights(m));
    session *s = usli_calloc(ctx, 1, sizeof *s);
    if (!s) return usli_nomem(ctx, sizeof *s);
    s->m = usli_model_retain(m);
    s->ctx = ctx;
    s->exec = m->exec;
    s->rows = rows;
    s->opts = (usl_generate_opts)USL_GENERATE_OPTS_INIT;
    if (given) memcpy(&s->opts, given, given->size < sizeof s->opts ? given->size : sizeof s->opts);
    usl_status st = start(s, prompts);
    if (st != USL_OK)
        usli_generator_free(s);
    else
        *out = s;
    return st;
}

void usli_generator_free(usl_generator *s) {
    if (!s) return;
    usl_model *m = s->m;
    usl_ctx *ctx = s->ctx;
    for (int i = 0; s->out && i < s->rows; i++) usli_free(ctx, s->out[i].ids);
    if (s->graph.work) s->exec.backend->forget(&s->exec, s->graph.work);
    usli_device_free(&s->exec, s->arena_base);
    usli_device_free(&s->exec, s->cache_base);
    usli_twin_close(&s->exec, &s->numbers_twin);
    usli_twin_close(&s->exec, &s->offset_twin);
    void *const blocks[] = { s->numbers, s->live, s->prompts, s->given_ids, s->stop_ids, s->out };
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) usli_free(ctx, blocks[i]);
    usli_free(ctx, s);
    usli_model_release(m);
}

usl_status usli_generator_next(usl_generator *s, int32_t *id) {
    *id = -1;
    if (!s->live_count) return USL_OK;
    if (s->m->config.vocab != s->rows_of)
        return usli_fail(s->ctx, USL_ERR_INVALID,
                         "the model's vocabulary has another size than when this generation began; begin it anew");
    int64_t had = s->out[0].count;
    USLI_TRY(step(s, !s->started));
    s->started = true;
    if (s->out[0].count > had) *id = s->out[0].ids[had];
    return USL_OK;
}

usl_status usli_generate(usl_model *m, const usli_prompt *prompts, int rows, const usl_generate_opts *opts,
                         usli_generated *out) {
    usl_generator *s;
    int32_t id;
    usl_status st = USL_OK;
    memset(out, 0, (size_t)rows * sizeof *out);
    USLI_TRY(usli_generator_new(m, prompts, rows, opts, &s));
    while (s->live_count && st == USL_OK) st = usli_generator_next(s, &id);
    for (int i = 0; i < rows && st == USL_OK; i++) {
        out[i] = s->out[i];
        s->out[i].ids = NULL;
    }
    usli_generator_free(s);
    return st;
}
