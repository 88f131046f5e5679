/* The memory plan: a dry run of the very pass that will run counts its bytes, so the plan cannot be wrong about them.
 * In order of preference: one pass that keeps everything; one pass with as few recomputed blocks as fit, their inputs
 * and then the embedding table in host memory when that makes them fewer; recomputed MLPs piece by piece; weights of as
 * few layers as fit streamed from host memory; fewer tokens a pass. What is left holds decoded weights, then what
 * backward would make again. Refused only when a single row does not fit with all of that; of a model of shapes alone
 * that smallest plan is given, to be looked at.
 */
#include "core/train/trainer.h"

#include <string.h>

usl_status usli_plan_arena(usl_trainer *t, const usli_capacity *c, size_t *bytes) {
    usli_arena arena;
    usli_arena_init_dry(&arena);
    usli_exec x = t->model->exec;
    x.arena = &arena;
    static const int32_t nothing; /* a dry run reads no array */
    usli_shape most = usli_shape_most(t->model, (usli_shape){ c->tokens, c->rows, c->longest });
    usli_batch b = { .tokens = most.tokens,
                     .rows = (int)most.rows,
                     .ids = &nothing,
                     .position = &nothing,
                     .angle = &nothing,
                     .cu = &nothing,
                     .longest = most.longest,
                     .row_of_token = &nothing,
                     .update = &nothing };
    usli_pass_state s = { .model = t->model,
                          .batch = &b,
                          .exec = &x,
                          .recomputed = c->recomputed,
                          .piece = c->piece,
                          .whole = c->whole,
                          .any_order = !t->opts.deterministic,
                          .inputs = c->offloaded ? (char *)t : NULL,
                          .blocks = t->blocks };
    float loss;
    usli_targets targets = { .count = c->tokens,
                             .index = &nothing,
                             .target = &nothing,
                             .losses = &loss,
                             .balance = (float)t->opts.router_aux_loss_coef,
                             .micros = usli_trainer_micros(t, c->rows),
                             .micro = &nothing };
    USLI_TRY(usli_loss_pass(&s, NULL, &targets, &t->update, true));
    *bytes = arena.peak;
    return USL_OK;
}

/* A dry run with as many layers cached as will be: where all are, nothing is decoded in the workspace. */
static usl_status arena_with_cache(usl_trainer *t, const usli_capacity *c, size_t *bytes) {
    usli_model_set_cache(t->model, USLI_NOWHERE, c->cached);
    usl_status st = usli_plan_arena(t, c, bytes);
    usli_model_set_cache(t->model, NULL, 0);
    return st;
}

/* The fewest recomputed blocks, from `from` on, that fit; layers + 1 when none does. */
static usl_status fewest_recomputed(usl_trainer *t, usli_capacity c, size_t room, int64_t from, int64_t *out) {
    int64_t low = from, high = t->model->config.layers + 1;
    while (low < high) {
        size_t bytes;
        c.recomputed = low + (high - low) / 2;
        if (c.recomputed > t->model->config.layers) break;
        USLI_TRY(usli_plan_arena(t, &c, &bytes));
        if (bytes <= room)
            high = c.recomputed;
        else
            low = c.recomputed + 1;
    }
    *out = low;
    return USL_OK;
}

/* Ways to place things, each a little dearer than the one before; taken when fewer blocks are recomputed for it. */
static const struct { int64_t offloaded, host_embed; } WAYS[] = { { 0, 0 }, { 1, 0 }, { 1, 1 } };

static bool is(const usl_trainer *t, const char *recompute) {
    return strcmp(t->recompute, recompute) == 0;
}

/* What the user asked for decides some of it; host memory is no other memory on the CPU. */
static bool allowed(const usl_trainer *t, size_t way) {
    if (WAYS[way].host_embed && !usli_model_embed_bytes(t->model)) return false;
    if (is(t, "offload")) return WAYS[way].offloaded;
    return !WAYS[way].offloaded || (is(t, "auto") && !t->model->exec.backend->host);
}

size_t usli_plan_input_bytes(const usl_trainer *t, const usli_capacity *c) {
    return c->offloaded ? (size_t)c->recomputed * usli_pass_input_bytes(t->model, c->tokens) : 0;
}

size_t usli_plan_room(const usl_trainer *t, const usli_capacity *c) {
    const usl_model *m = t->model;
    uint64_t weights = usli_model_device_bytes(m, c->streamed, c->host_embed && usli_model_embed_bytes(m));
    uint64_t used = t->fixed_bytes + weights + t->beside;
    return t->limit > used ? (size_t)(t->limit - used) : 0;
}

/* Sets c's way and recomputed blocks; *fits is false when no way does. */
static usl_status choose_way(usl_trainer *t, usli_capacity *c, bool *fits) {
    int64_t layers = t->model->config.layers, best = layers + 1, found = 0;
    usli_capacity tried = *c;
    for (size_t i = 0; i < sizeof WAYS / sizeof *WAYS; i++) {
        if (!allowed(t, i)) continue;
        tried.offloaded = WAYS[i].offloaded;
        tried.host_embed = WAYS[i].host_embed;
        size_t room = usli_plan_room(t, &tried);
        if (is(t, "none")) {
            size_t bytes;
            tried.recomputed = 0;
            USLI_TRY(usli_plan_arena(t, &tried, &bytes));
            found = bytes <= room ? 0 : layers + 1;
        } else {
            USLI_TRY(fewest_recomputed(t, tried, room, is(t, "auto") ? 0 : layers, &found));
        }
        if (found >= best) continue;
        best = found;
        *c = tried;
        c->recomputed = found;
    }
    *fits = best <= layers;
    return USL_OK;
}

static usl_status refuse(usl_trainer *t) {
    double gib = 1.0 / (1 << 30);
    const usli_capacity *c = &t->capacity;
    bool host_embed = c->host_embed && usli_model_embed_bytes(t->model);
    return usli_fail(t->ctx, USL_ERR_NOMEM,
                     "the plan does not fit: a single row of %lld tokens needs %.4g GiB beside %.4g GiB of "
                     "weights and optimiser, and %.4g GiB are left of %.4g GiB; lower max_seq_length or r, or raise "
                     "the memory limit",
                     (long long)c->longest, (double)t->arena_bytes * gib,
                     (double)(t->fixed_bytes + usli_model_device_bytes(t->model, c->streamed, host_embed)) * gib,
                     (double)usli_plan_room(t, c) * gib, (double)t->limit * gib);
}

/* The trainer's plan becomes the smallest that c's tokens have, which does not fit either. */
static usl_status smallest(usl_trainer *t, usli_capacity *c) {
    size_t bytes;
    if (c->piece >= c->tokens) c->piece = 0;
    c->recomputed = is(t, "none") ? 0 : t->model->config.layers;
    for (size_t i = 0; i < sizeof WAYS / sizeof *WAYS; i++) {
        if (!allowed(t, i)) continue;
        c->offloaded = WAYS[i].offloaded;
        c->host_embed = WAYS[i].host_embed;
    }
    USLI_TRY(usli_plan_arena(t, c, &bytes));
    t->capacity = *c;
    t->arena_bytes = bytes;
    return USL_OK;
}

/* What is left holds decoded weights. */
static usl_status add_cache(usl_trainer *t, usli_capacity *c, size_t room, size_t *bytes) {
    int64_t layers = t->model->config.layers;
    size_t all = usli_model_cache_bytes(t->model, layers);
    if (!all) return USL_OK;
    c->cached = layers;
    USLI_TRY(arena_with_cache(t, c, bytes));
    if (*bytes + all <= room) return USL_OK;
    c->cached = 0;
    USLI_TRY(usli_plan_arena(t, c, bytes));
    for (c->cached = layers - 1; usli_model_cache_bytes(t->model, c->cached) > room - *bytes;) c->cached--;
    return arena_with_cache(t, c, bytes);
}

/* What is left then holds what is cheap to make again: about 1 GB a millisecond of the step, as decoded weights. On the
 * CPU memory is the user's, and making it again costs little beside the products. */
static usl_status add_whole(usl_trainer *t, usli_capacity *c, size_t *bytes) {
    size_t room = usli_plan_room(t, c) - usli_model_cache_bytes(t->model, c->cached), need = *bytes;
    int64_t low = 0, high = t->model->config.layers - c->recomputed;
    if (t->model->exec.backend->host || c->streamed || !is(t, "auto")) return USL_OK;
    while (low < high) {
        c->whole = low + (high - low + 1) / 2;
        USLI_TRY(arena_with_cache(t, c, &need));
        if (need <= room)
            low = c->whole;
        else
            high = c->whole - 1;
    }
    c->whole = low;
    return arena_with_cache(t, c, bytes);
}

enum { PIECES = 64, PIECE_ALIGN = 64 };

/* A pass of c's tokens, its MLPs in as few pieces as fit, with c's streamed layers. */
static usl_status choose_pieces(usl_trainer *t, usli_capacity *c, bool *fits) {
    for (int64_t pieces = 1; pieces <= PIECES; pieces *= 2) {
        int64_t piece = (c->tokens + pieces - 1) / pieces;
        c->piece = pieces == 1 ? 0 : (piece + PIECE_ALIGN - 1) / PIECE_ALIGN * PIECE_ALIGN;
        if (c->piece >= c->tokens) break;
        USLI_TRY(choose_way(t, c, fits));
        if (*fits) return USL_OK;
    }
    return USL_OK;
}

/* As few layers streamed, from one on, as leave room for so many bytes; all of them when none do. */
static void fewest_streamed(const usl_trainer *t, usli_capacity *c, size_t bytes) {
    int64_t low = 1, high = usli_model_streamable(t->model);
    while (low < high) {
        c->streamed = low + (high - low) / 2;
        if (bytes <= usli_plan_room(t, c))
            high = c->streamed;
        else
            low = c->streamed + 1;
    }
    c->streamed = high;
}

/* When nothing fits with all layers on the device: as few streamed as fit, everything else at its smallest. */
static usl_status choose_streamed(usl_trainer *t, usli_capacity *c, bool *fits) {
    size_t bytes;
    int64_t most = usli_model_streamable(t->model);
    if (!most) return USL_OK;
    c->streamed = most;
    USLI_TRY(choose_pieces(t, c, fits));
    if (!*fits) return USL_OK;
    if (is(t, "auto")) {
        c->recomputed = most;
        c->offloaded = 1;
        c->host_embed = usli_model_embed_bytes(t->model) > 0;
    }
    USLI_TRY(usli_plan_arena(t, c, &bytes));
    fewest_streamed(t, c, bytes);
    return USL_OK;
}

usl_status usli_plan_replay(usl_trainer *t, usli_capacity *c, size_t *bytes, bool *fits) {
    c->host_embed = c->streamed = c->cached = c->whole = 0;
    USLI_TRY(usli_plan_arena(t, c, bytes));
    if (*bytes > usli_plan_room(t, c)) c->host_embed = usli_model_embed_bytes(t->model) > 0;
    if (*bytes > usli_plan_room(t, c)) fewest_streamed(t, c, *bytes);
    *fits = *bytes <= usli_plan_room(t, c);
    if (!*fits || c->streamed) return USL_OK;
    USLI_TRY(add_cache(t, c, usli_plan_room(t, c), bytes));
    return add_whole(t, c, bytes);
}

usl_status usli_plan_make(usl_trainer *t, int64_t tokens, int64_t rows, int64_t longest) {
    usli_capacity c = { .tokens = tokens, .rows = rows, .longest = longest };
    size_t bytes = 0;
    for (;;) {
        bool fits = false;
        c.streamed = 0;
        t->capacity = c;
        USLI_TRY(choose_pieces(t, &c, &fits));
        if (!fits) USLI_TRY(choose_streamed(t, &c, &fits));
        if (fits) {
            USLI_TRY(usli_plan_arena(t, &c, &bytes));
            if (!c.streamed) USLI_TRY(add_cache(t, &c, usli_plan_room(t, &c), &bytes));
            USLI_TRY(add_whole(t, &c, &bytes));
            t->capacity = c;
            t->arena_bytes = bytes;
            return USL_OK;
        }
        if (c.tokens <= t->least_tokens) {
            /* Of shapes alone the smallest plan may be looked at: its total is above the limit. */
            USLI_TRY(smallest(t, &c));
            return t->model->plan_only ? USL_OK : refuse(t);
        }
        c.tokens = c.tokens / 2 > t->least_tokens ? c.tokens / 2 : t->least_tokens;
        if (c.rows > c.tokens) c.rows = c.tokens;
    }
}

void usli_plan_get(const usl_trainer *t, usl_plan *out) {
    usl_plan p = { .size = out->size,
                   .limit = t->limit,
                   .capacity_tokens = t->capacity.tokens,
                   .capacity_rows = t->capacity.rows,
                   .recomputed_layers = t->capacity.recomputed,
                   .layers = t->model->config.layers,
                   .offloaded_inputs = t->capacity.offloaded != 0,
                   .piece_tokens = t->capacity.piece,
                   .whole_layers = t->capacity.whole,
                   .streamed_layers = t->capacity.streamed };
    const usl_model *m = t->model;
    uint64_t weights, grads, states;
    bool host_embed = t->capacity.host_embed && usli_model_embed_bytes(m); /* planned, not moved */
    p.host_total = usli_model_host_bytes(m, t->capacity.streamed, host_embed) + usli_plan_input_bytes(t, &t->capacity);
    usli_optimizer_bytes(m, t->optimizer_name[5] == '_', &weights, &grads, &states);
    const usl_plan_item items[] = {
        { m->full ? "weights, trained" : "weights, frozen",
          usli_model_device_bytes(m, t->capacity.streamed, host_embed) },
        { "adapter", m->full ? 0 : weights },
        { "gradients", grads },
        { "optimiser state", states },
        { "rope tables", usli_model_rope_bytes(m, t->capacity.tokens) },
        { "activations and workspace", t->arena_bytes },
        { "decoded weights", usli_model_cache_bytes(m, t->capacity.cached) },
        { "recorded passes", t->graphs.bytes > 0 ? (uint64_t)t->graphs.bytes : 0 }, /* none before the first */
        { "libraries and others", t->beside },
    };
    for (size_t i = 0; i < sizeof items / sizeof *items; i++) {
        if (!items[i].bytes) continue;
        p.items[p.count++] = items[i];
        p.total += items[i].bytes;
    }
    memcpy(out, &p, out->size < sizeof p ? out->size : sizeof p);
}
