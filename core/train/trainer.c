#include "core/train/trainer.h"

#include <math.h>
#include <string.h>

/* ---- Making
 * ------------------------------------------------------------------------------------------------------------------------
 */

static usl_status check_number(usl_ctx *ctx, const char *name, double value, double low, double high) {
    if (value >= low && value <= high) return USL_OK;
    return usli_fail(ctx, USL_ERR_INVALID, "%s is %.10g; a number from %.10g to %.10g is wanted", name, value, low,
                     high);
}

static usl_status check_opts(usl_trainer *t) {
    const usl_train_opts *o = &t->opts;
    usl_ctx *ctx = t->ctx;
    USLI_TRY(check_number(ctx, "per_device_train_batch_size", (double)o->batch, 1, 1 << 20));
    USLI_TRY(check_number(ctx, "gradient_accumulation_steps", (double)o->accumulation, 1, 1 << 20));
    USLI_TRY(check_number(ctx, "max_steps", (double)o->max_steps, 0, 1e12));
    USLI_TRY(check_number(ctx, "learning_rate", o->learning_rate, 0, 1e6));
    USLI_TRY(check_number(ctx, "embedding_learning_rate", o->embedding_learning_rate, 0, 1e6));
    USLI_TRY(check_number(ctx, "warmup_steps", (double)o->warmup_steps, 0, 1e12));
    USLI_TRY(check_number(ctx, "warmup_ratio", o->warmup_ratio, 0, 1));
    USLI_TRY(check_number(ctx, "weight_decay", o->weight_decay, 0, 1e3));
    USLI_TRY(check_number(ctx, "adam_beta1", o->beta1, 0, 0.9999999));
    USLI_TRY(check_number(ctx, "adam_beta2", o->beta2, 0, 0.9999999));
    USLI_TRY(check_number(ctx, "adam_epsilon", o->epsilon, 0, 1));
    USLI_TRY(check_number(ctx, "max_grad_norm", o->max_grad_norm, 0, 1e30));
    if (o->router_aux_loss_coef < 0) t->opts.router_aux_loss_coef = t->model->config.balance;
    USLI_TRY(check_number(ctx, "router_aux_loss_coef", o->router_aux_loss_coef, 0, 1e6));
    const usli_arch *arch = t->model->config.arch;
    if (o->router_aux_loss_coef > 0 && !(arch->mixture && arch->mixture->balanced))
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "router_aux_loss_coef: a %s has no load-balancing loss; leave it at 0", arch->name);
    if (!o->max_steps) USLI_TRY(check_number(ctx, "num_train_epochs", o->epochs, 1e-6, 1e9));
    char known[256];
    if (!(t->schedule = usli_schedule_find(t->schedule_name))) {
        usli_schedule_list(known, sizeof known);
        return usli_fail(ctx, USL_ERR_INVALID, "lr_scheduler_type \"%s\" is not known; known are %s", t->schedule_name,
                         known);
    }
    if (strcmp(t->optimizer_name, "adamw") != 0 && strcmp(t->optimizer_name, "adamw_8bit") != 0)
        return usli_fail(ctx, USL_ERR_INVALID, "optim \"%s\" is not known; use \"adamw_8bit\" or \"adamw\"",
                         t->optimizer_name);
    static const char *const RECOMPUTE[] = { "auto", "none", "full", "offload" };
    for (size_t i = 0; i < 4; i++)
        if (strcmp(t->recompute, RECOMPUTE[i]) == 0) return USL_OK;
    return usli_fail(ctx, USL_ERR_INVALID,
                     "recompute \"%s\" is not known; use \"auto\", \"none\", \"full\" or \"offload\"", t->recompute);
}

static bool eight_bit(const usl_trainer *t) {
    return strcmp(t->optimizer_name, "adamw_8bit") == 0;
}

/* The most tokens that one window can hold: the sum of its longest rows. */
static usl_status window_bounds(usl_trainer *t, int64_t window, int64_t *tokens, int64_t *longest) {
    usl_ctx *ctx = t->ctx;
    int64_t most = 0, n = usli_rows_count(t->rows);
    for (int64_t i = 0; i < n; i++) {
        int64_t len = usli_rows_length(t->rows, i);
        if (len > most) most = len;
    }
    int64_t *histogram = usli_calloc(ctx, (size_t)most + 1, sizeof *histogram);
    if (!histogram) return usli_nomem(ctx, (size_t)(most + 1) * sizeof *histogram);
    for (int64_t i = 0; i < n; i++) histogram[usli_rows_length(t->rows, i)]++;
    int64_t left = window < n ? window : n, sum = 0;
    for (int64_t len = most; len > 0 && left; len--) {
        int64_t take = histogram[len] < left ? histogram[len] : left;
        sum += take * len;
        left -= take;
    }
    usli_free(ctx, histogram);
    for (int64_t i = 0; t->eval && i < usli_rows_count(t->eval); i++)
        if (usli_rows_length(t->eval, i) > most) most = usli_rows_length(t->eval, i);
    *tokens = sum > most ? sum : most;
    *longest = most;
    return USL_OK;
}

static usl_status check_rows(usl_trainer *t, usli_rows *rows, const char *what) {
    if (!usli_rows_count(rows))
        return usli_fail(t->ctx, USL_ERR_INVALID,
                         "%s: no row has a label that counts; check the template, the response markers and "
                         "max_seq_length (rows may be cut before the answer begins)",
                         what);
    for (int64_t i = 0; i < usli_rows_count(rows); i++) {
        const int32_t *ids, *labels;
        int64_t n;
        usli_rows_at(rows, i, &ids, &labels, &n);
        if (n > t->model->context)
            return usli_fail(t->ctx, USL_ERR_INVALID, "%s: row %lld has %lld tokens; max_seq_length is %lld", what,
                             (long long)i + 1, (long long)n, (long long)t->model->context);
        for (int64_t k = 0; k < n; k++) {
            int32_t most = ids[k] > labels[k] ? ids[k] : labels[k];
            if (ids[k] < 0 || most >= t->model->config.vocab)
                return usli_fail(t->ctx, USL_ERR_INVALID,
                                 "%s: row %lld holds token %d, outside the model's vocabulary of %lld; does the "
                                 "tokenizer belong to the model?",
                                 what, (long long)i + 1, ids[k] < 0 ? ids[k] : most, (long long)t->model->config.vocab);
        }
    }
    return USL_OK;
}

/* ids, positions, angles, data-set rows, and of the counted labels index and target; cu, of one row more;
 * micro-batches; the update's number. */
enum { TOKEN_ARRAYS = 6 };

static size_t numbers_count(const usli_capacity *c) {
    return TOKEN_ARRAYS * (size_t)c->tokens + 2 * (size_t)c->rows + 4;
}

static void release_capacity(usl_trainer *t) {
    usli_exec *x = &t->model->exec;
    usli_graphs_forget(&t->graphs, x);
    if (t->cache_base) usli_model_set_cache(t->model, NULL, 0);
    if (t->inputs) x->backend->free_host(x, t->inputs);
    usli_device_free(x, t->cache_base);
    usli_device_free(x, t->arena_base);
    usli_device_free(x, t->losses);
    usli_twin_close(x, &t->numbers_twin);
    usli_free(t->ctx, t->numbers);
    t->cache_base = t->arena_base = t->inputs = NULL;
    t->losses = NULL;
    t->numbers = NULL;
}

/* What recorded work may take is not planned, since nobody knows it before: some of what the plan leaves, and so much
 * that the plan is still right to 3% and 100 MiB, other things' parts of that included. */
static size_t room_of_graphs(const usl_trainer *t) {
    enum { LEAST = 64 << 20, PART = 64, MOST = 256 << 20 };
    size_t all = t->arena_bytes + usli_model_cache_bytes(t->model, t->capacity.cached);
    size_t room = usli_plan_room(t, &t->capacity), most = LEAST + all / PART;
    if (most > MOST) most = MOST;
    return room < all ? 0 : room - all < most ? room - all : most;
}

static usl_status take_capacity(usl_trainer *t, const usli_capacity *c, size_t arena_bytes) {
    usli_exec *x = &t->model->exec;
    size_t count = numbers_count(c), input_bytes = usli_plan_input_bytes(t, c);
    t->capacity = *c;
    t->arena_bytes = arena_bytes;
    if (!(t->numbers = usli_calloc(t->ctx, count, sizeof *t->numbers)))
        return usli_nomem(t->ctx, count * sizeof *t->numbers);
    USLI_TRY(usli_twin_open(x, t->numbers, count * sizeof *t->numbers, &t->numbers_twin));
    USLI_TRY(usli_device_alloc(x, (size_t)c->tokens * sizeof *t->losses, &t->losses));
    if (c->host_embed) USLI_TRY(usli_model_embed_to_host(t->model));
    USLI_TRY(usli_model_stream(t->model, c->streamed));
    if (input_bytes && !(t->inputs = x->backend->alloc_host(x, input_bytes)))
        return usli_fail(t->ctx, USL_ERR_NOMEM,
                         "%.4g GiB of host memory for block inputs could not be pinned; lower max_seq_length",
                         (double)input_bytes / (1 << 30));
    USLI_TRY(usli_device_alloc(x, arena_bytes, &t->arena_base));
    USLI_TRY(usli_device_alloc(x, usli_model_cache_bytes(t->model, c->cached), &t->cache_base));
    usli_model_set_cache(t->model, t->cache_base, c->cached);
    usli_graphs_begin(&t->graphs, room_of_graphs(t));
    return usli_model_fill_cache(t->model);
}

usl_status usli_trainer_set_capacity(usl_trainer *t, const usli_capacity *c, size_t arena_bytes) {
    release_capacity(t); /* there may be no room for two */
    usl_status st = take_capacity(t, c, arena_bytes);
    if (st != USL_OK) release_capacity(t);
    return st;
}

static usl_status take_memory(usl_trainer *t) {
    int64_t window = t->opts.batch * t->opts.accumulation, most = usli_rows_count(t->rows);
    if (t->eval && usli_rows_count(t->eval) > most) most = usli_rows_count(t->eval);
    size_t n = (size_t)(window < most ? window : most);
    if (!(t->pick = usli_malloc(t->ctx, n * sizeof *t->pick))) return usli_nomem(t->ctx, n * sizeof *t->pick);
    usli_capacity c = t->capacity;
    return t->model->plan_only ? USL_OK : usli_trainer_set_capacity(t, &c, (size_t)t->arena_bytes);
}

/* What the plan may come to, and what is in use beside the plan's own items. */
static usl_status find_limit(usl_trainer *t) {
    usli_exec *x = &t->model->exec;
    if (x->backend->host) {
        uint64_t free_now = usli_free_memory();
        /* Weights may be mapped and not read yet, so what the limit is compared with counts them from the start. */
        t->limit = free_now ? free_now + usli_process_bytes() : UINT64_MAX;
        t->beside = USLI_HOST_SLACK;
    } else {
        size_t used, total;
        USLI_TRY(x->backend->memory(x, &used, &total));
        uint64_t ours = t->model->plan_only ? 0 : t->fixed_bytes + usli_model_device_bytes(t->model, -1, false);
        if (!total && !t->opts.memory_limit)
            return usli_fail(
                t->ctx, USL_ERR_INVALID,
                "there is no GPU here to plan for; say how much memory it would have (memory_limit; --memory 24GiB)");
        t->limit = total;
        t->beside = used > ours ? used - ours : 0;
    }
    if (t->opts.memory_limit) t->limit = t->opts.memory_limit;
    return USL_OK;
}

static usl_status make_plan(usl_trainer *t) {
    uint64_t weights, grads, states;
    usli_optimizer_bytes(t->model, eight_bit(t), &weights, &grads, &states);
    int64_t tokens = 0, longest = 0, window = t->opts.batch * t->opts.accumulation;
    USLI_TRY(window_bounds(t, window, &tokens, &longest));
    t->fixed_bytes = usli_model_rope_bytes(t->model, tokens) + (t->model->full ? 0 : weights) + grads + states;
    USLI_TRY(find_limit(t));
    int64_t rows = window < usli_rows_count(t->rows) ? window : usli_rows_count(t->rows), other;
    t->least_tokens = longest;
    if (t->opts.router_aux_loss_coef > 0) USLI_TRY(window_bounds(t, t->opts.batch, &t->least_tokens, &other));
    return usli_plan_make(t, tokens, rows, longest);
}

/* A failure leaves the trainer as it was: the old rows' plan is taken up again. */
usl_status usli_trainer_set_rows(usl_trainer *t, usli_rows *rows) {
    usl_trainer old = *t;
    USLI_TRY(check_rows(t, rows, "the training set"));
    int64_t window = t->opts.batch * t->opts.accumulation, n = usli_rows_count(rows);
    if (t->eval && usli_rows_count(t->eval) > n) n = usli_rows_count(t->eval);
    size_t most = (size_t)(window < n ? window : n);
    int64_t *pick = usli_malloc(t->ctx, most * sizeof *pick);
    if (!pick) return usli_nomem(t->ctx, most * sizeof *pick);
    release_capacity(t);
    t->rows = rows;
    usl_status st = make_plan(t);
    usli_capacity c = t->capacity;
    if (st == USL_OK && !t->model->plan_only) st = usli_trainer_set_capacity(t, &c, (size_t)t->arena_bytes);
    if (st != USL_OK) {
        usli_free(t->ctx, pick);
        t->rows = old.rows;
        t->limit = old.limit;
        t->beside = old.beside;
        t->arena_bytes = old.arena_bytes;
        /* The first failure is the one to tell; without memory the next update says so. */
        if (!t->model->plan_only) (void)usli_trainer_set_capacity(t, &old.capacity, (size_t)old.arena_bytes);
        t->capacity = old.capacity;
        return st;
    }
    usli_free(t->ctx, t->pick);
    t->pick = pick;
    usli_rows_retain(rows);
    usli_rows_release(old.rows);
    usli_cursor_init(&t->cursor, usli_rows_count(rows), (uint32_t)t->opts.seed, t->opts.shuffle);
    t->updates_per_epoch = usli_updates_per_epoch(usli_rows_count(rows), t->opts.batch, t->opts.accumulation);
    return USL_OK;
}

usl_status usli_trainer_skip(usl_trainer *t, int64_t updates) {
    int64_t count;
    if (updates < 0 || updates > t->total - t->step)
        return usli_fail(t->ctx, USL_ERR_INVALID, "%lld updates cannot be passed over: %lld are to come",
                         (long long)updates, (long long)(t->total - t->step));
    for (; updates > 0; updates--, t->step++)
        USLI_TRY(usli_cursor_window(t->ctx, &t->cursor, t->opts.batch * t->opts.accumulation, t->pick, &count));
    return USL_OK;
}

static usl_status init(usl_trainer *t) {
    usl_ctx *ctx = t->ctx;
    usl_train_opts *o = &t->opts;
    const usl_train_opts usual = USL_TRAIN_OPTS_INIT;
    t->schedule_name = usli_strdup(ctx, o->schedule ? o->schedule : usual.schedule);
    t->optimizer_name = usli_strdup(ctx, o->optimizer ? o->optimizer : usual.optimizer);
    t->recompute = usli_strdup(ctx, o->recompute ? o->recompute : usual.recompute);
    t->blocks = usli_calloc(ctx, (size_t)t->model->config.layers, sizeof *t->blocks);
    if (!t->schedule_name || !t->optimizer_name || !t->recompute || !t->blocks) return usli_nomem(ctx, 4096);
    o->schedule = t->schedule_name;
    o->optimizer = t->optimizer_name;
    o->recompute = t->recompute;
    USLI_TRY(check_opts(t));
    USLI_TRY(check_rows(t, t->rows, "the training set"));
    if (t->eval) USLI_TRY(check_rows(t, t->eval, "the evaluation set"));
    USLI_TRY(usli_optimizer_init(&t->optimizer, t->model, eight_bit(t), o->weight_decay));
    t->optimizer.beta1 = o->beta1;
    t->optimizer.beta2 = o->beta2;
    t->optimizer.epsilon = o->epsilon;
    usli_cursor_init(&t->cursor, usli_rows_count(t->rows), (uint32_t)o->seed, o->shuffle);
    t->updates_per_epoch = usli_updates_per_epoch(usli_rows_count(t->rows), o->batch, o->accumulation);
    t->total = o->max_steps ? o->max_steps : (int64_t)ceil(o->epochs * (double)t->updates_per_epoch);
    t->warmup = o->warmup_steps ? o->warmup_steps : (int64_t)ceil((double)t->total * o->warmup_ratio);
    t->rate = -1;
    t->update.loss_scale = t->model->dtype == USL_F16 ? 65536.0f : 1.0f;
    t->update.max_norm = (float)o->max_grad_norm;
    USLI_TRY(usli_twin_open(&t->model->exec, &t->update, sizeof t->update, &t->update_twin));
    USLI_TRY(make_plan(t));
    return take_memory(t);
}

usl_status usli_trainer_new(usl_model *model, usl_rows *rows, usl_rows *eval, const usl_train_opts *opts,
                            usl_trainer **out) {
    usl_ctx *ctx = model->ctx;
    *out = NULL;
    if (model->trainers)
        return usli_fail(ctx, USL_ERR_INVALID, "another trainer is using the model; close it first (trainer:close())");
    if (!model->plan_only) USLI_TRY(usli_model_check_weights(model));
    usl_trainer *t = usli_calloc(ctx, 1, sizeof *t);
    if (!t) return usli_nomem(ctx, sizeof *t);
    t->ctx = ctx;
    usli_ctx_retain(ctx);
    t->model = usli_model_retain(model);
    model->trainers++;
    t->rows = usli_rows_retain(rows);
    t->eval = usli_rows_retain(eval);
    t->opts = (usl_train_opts)USL_TRAIN_OPTS_INIT;
    if (opts) memcpy(&t->opts, opts, opts->size < sizeof t->opts ? opts->size : sizeof t->opts);
    usl_status st = init(t);
    if (st != USL_OK)
        usli_trainer_free(t);
    else
        *out = t;
    return st;
}

void usli_trainer_free(usl_trainer *t) {
    if (!t) return;
    usl_ctx *ctx = t->ctx;
    usli_optimizer_done(&t->optimizer);
    release_capacity(t);
    usli_model_unstream(t->model);
    usli_twin_close(&t->model->exec, &t->update_twin);
    t->model->trainers--;
    usli_model_release(t->model);
    usli_rows_release(t->rows);
    usli_rows_release(t->eval);
    usli_free(ctx, t->schedule_name);
    usli_free(ctx, t->optimizer_name);
    usli_free(ctx, t->recompute);
    usli_free(ctx, t->blocks);
    usli_free(ctx, t->pick);
    usli_free(ctx, t);
    usl_ctx_free(ctx);
}

/* ---- One window
 * -----------------------------------------------------------------------------------------------------------------------
 */

/* The arrays of a pass, on the device. The tail that fills a rounded one repeats its first tokens: token 0 may be one
 * that the model never learned, whose values overflow float16 where its data's do not. */
static usl_status send(usl_trainer *t, const usli_window *w, usli_batch *b, usli_targets *targets) {
    const usli_capacity *c = &t->capacity;
    const usli_twin *twin = &t->numbers_twin;
    size_t n = (size_t)c->tokens, used = (size_t)w->tokens * sizeof(int32_t);
    int32_t *ids = t->numbers, *position = ids + n, *angle = position + n, *row_of_token = angle + n;
    int32_t *index = row_of_token + n, *target = index + n, *cu = target + n, *micro = cu + c->rows + 2;
    int32_t *update = micro + c->rows + 1;
    memcpy(ids, w->ids, used);
    memcpy(position, w->positions, used);
    memcpy(cu, w->cu, ((size_t)w->rows + 1) * sizeof *cu);
    *update = (int32_t)t->step;
    USLI_TRY(usli_model_angles(t->model, w->rows, w->cu, NULL, position, angle));
    int64_t count = 0;
    int micros = 0;
    for (int64_t r = 0; r < w->rows; r++)
        if (!r || w->micro[r] != w->micro[r - 1]) micro[micros++] = w->cu[r];
    micro[micros] = (int32_t)w->tokens;
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t i = w->cu[r]; i < w->cu[r + 1]; i++) {
            row_of_token[i] = (int32_t)w->row_id[r];
            if (w->targets[i] < 0) continue;
            index[count] = (int32_t)i;
            target[count++] = w->targets[i];
        }
    usli_shape shape = usli_shape_of(t->model, (usli_shape){ c->tokens, c->rows, c->longest },
                                     (usli_shape){ w->tokens, w->rows, w->longest });
    int32_t *const repeated[] = { ids, position, angle, row_of_token };
    for (size_t k = 0; k < sizeof repeated / sizeof *repeated; k++)
        for (int64_t i = w->tokens; i < shape.tokens; i++) repeated[k][i] = repeated[k][i - w->tokens];
    for (int64_t r = w->rows; r < shape.rows; r++) cu[r + 1] = (int32_t)shape.tokens;
    *targets = (usli_targets){ .count = count,
                               .index = usli_twin_at(twin, index),
                               .target = usli_twin_at(twin, target),
                               .losses = t->losses,
                               .balance = (float)t->opts.router_aux_loss_coef,
                               .micros = micros,
                               .micro = usli_twin_at(twin, micro) };
    *b = (usli_batch){ .tokens = shape.tokens,
                       .rows = (int)shape.rows,
                       .dead = shape.tokens - w->tokens,
                       .ids = usli_twin_at(twin, ids),
                       .position = usli_twin_at(twin, position),
                       .angle = usli_twin_at(twin, angle),
                       .cu = usli_twin_at(twin, cu),
                       .longest = shape.longest,
                       .row_of_token = usli_twin_at(twin, row_of_token),
                       .update = usli_twin_at(twin, update),
                       .dropout_seed = t->opts.seed };
    return usli_twin_push(&t->model->exec, twin);
}

static usl_status run_pass(usl_trainer *t, const usli_window *w, bool with_gradient, double *flops) {
    usli_arena arena;
    usli_arena_init(&arena, t->arena_base, t->arena_bytes);
    usli_exec x = t->model->exec;
    x.arena = &arena;
    usli_batch b;
    usli_targets targets;
    USLI_TRY(send(t, w, &b, &targets));
    usli_pass_state s = { .model = t->model,
                          .batch = &b,
                          .exec = &x,
                          .recomputed = t->capacity.recomputed,
                          .piece = t->capacity.piece,
                          .whole = t->capacity.whole,
                          .any_order = !t->opts.deterministic,
                          .inputs = t->inputs,
                          .blocks = t->blocks };
    x.matmul_flops = 0;
    usl_status st = usli_loss_pass(&s, &t->graphs, &targets, t->update_twin.device, with_gradient);
    *flops += (double)x.matmul_flops;
    return st;
}

int usli_trainer_micros(const usl_trainer *t, int64_t rows) {
    int64_t micros = (rows + t->opts.batch - 1) / t->opts.batch;
    return (int)(micros > 1 ? micros : 1);
}

/* Rows from `first` on that a pass may take: whole micro-batches, where a loss is of micro-batches. */
static int64_t pass_rows(const usl_trainer *t, const usli_window *w, int64_t first) {
    const usli_capacity *c = &t->capacity;
    int64_t whole = 0;
    if (!(t->opts.router_aux_loss_coef > 0)) return c->rows;
    for (int64_t r = first + 1; r <= w->rows && r - first <= c->rows; r++) {
        if (w->cu[r] - w->cu[first] > c->tokens) break;
        if (r == w->rows || w->micro[r] != w->micro[r - 1]) whole = r - first;
    }
    return whole ? whole : c->rows;
}

/* Loss (and gradients) of the rows in pick, normalised by their own counted labels. Once update_twin has been pulled,
 * loss_of says which. */
static usl_status run_window(usl_trainer *t, usli_rows *rows, const int64_t *pick, int64_t count, bool with_gradient,
                             usl_step_stats *stats) {
    usli_window *w, *part;
    usl_status st = USL_OK;
    USLI_TRY(usli_model_check_weights(t->model));
    if (!t->numbers)
        return usli_fail(t->ctx, USL_ERR_INVALID,
                         "the trainer has no memory, since the plan of a checkpoint did not get it; make a new one");
    USLI_TRY(usli_window_build(t->ctx, rows, pick, count, t->opts.batch, &w));
    t->update.inv_counted = w->counted ? 1.0f / (float)w->counted : 0.0f;
    t->update.loss_sum = 0;
    t->update.correct = 0;
    t->update.balance = 0;
    if ((st = usli_twin_push(&t->model->exec, &t->update_twin)) != USL_OK) goto done;
    stats->tokens = w->tokens;
    stats->counted = w->counted;
    stats->rows = w->rows;
    stats->passes = 0;
    stats->flops = 0;
    for (int64_t first = 0; first < w->rows;) {
        USLI_TRYGO(usli_window_part(t->ctx, w, first, t->capacity.tokens, pass_rows(t, w, first), &part));
        first += part->rows;
        stats->passes++;
        st = run_pass(t, part, with_gradient, &stats->flops);
        usli_window_free(part);
        if (st != USL_OK) goto done;
    }
done:
    usli_window_free(w);
    return st;
}

static double loss_of(const usl_trainer *t, const usl_step_stats *s) {
    return s->counted ? t->update.loss_sum / (double)s->counted + t->update.balance : 0;
}

/* ---- Updates
 * ----------------------------------------------------------------------------------------------------------------------------
 */

static double rate_now(const usl_trainer *t) {
    if (!(t->rate < 0)) return t->rate; /* NaN too, which the update refuses */
    if (t->opts.lr_fn) return t->opts.lr_fn(t->opts.lr_ud, t->step, t->total);
    return t->opts.learning_rate * t->schedule(t->step, t->warmup, t->total);
}

static void give_stats(const usl_step_stats *from, usl_step_stats *to) {
    if (!to) return;
    size_t size = to->size;
    memcpy(to, from, size < sizeof *from ? size : sizeof *from);
    to->size = size;
}

/* float16: an overflow halves the scale and is no failure; 2000 good updates double it. */
static usl_status judge(usl_trainer *t, const usl_step_stats *s) {
    if (t->model->dtype == USL_F16) {
        if (!t->update.finite && t->update.loss_scale > 1) {
            t->update.loss_scale *= 0.5f;
            t->good_steps = 0;
            return USL_OK;
        }
        if (t->update.finite && ++t->good_steps >= 2000) {
            t->update.loss_scale *= 2;
            t->good_steps = 0;
        }
    }
    if (t->update.finite && isfinite(s->loss)) return USL_OK;
    if (t->step == 0 && !isfinite(s->loss))
        return usli_fail(
            t->ctx, USL_ERR_NUMERIC,
            "update 1: the loss is not a finite number, and nothing has been changed yet: the model's weights "
            "are damaged, or overflow in its type (dtype = \"float32\" may help)");
    return usli_fail(t->ctx, USL_ERR_NUMERIC,
                     "update %lld: the %s is not a finite number; the update was not made and the weights are "
                     "as before; lower learning_rate, or use dtype = \"float32\"",
                     (long long)t->step + 1, isfinite(s->loss) ? "gradient" : "loss");
}

/* *waited: seconds at the end, for the device. */
static usl_status optimize(usl_trainer *t, double *waited) {
    usli_arena arena;
    usli_arena_init(&arena, t->arena_base, t->arena_bytes);
    usli_exec x = t->model->exec;
    x.arena = &arena;
    USLI_TRY(usli_optimizer_step(&t->optimizer, &x, t->update_twin.device));
    usli_model_touched(t->model);
    double before = usli_now();
    usl_status st = usli_twin_pull(&x, &t->update_twin);
    *waited = usli_now() - before;
    return st;
}

usl_status usli_trainer_step(usl_trainer *t, usl_step_stats *out) {
    if (t->step >= t->total)
        return usli_fail(t->ctx, USL_ERR_NOT_FOUND, "all %lld updates are done", (long long)t->total);
    double start = usli_now();
    double rate = rate_now(t);
    if (!(rate >= 0) || !isfinite(rate))
        return usli_fail(t->ctx, USL_ERR_NUMERIC,
                         "update %lld: the learning rate is %g; a number of 0 or more is wanted",
                         (long long)t->step + 1, rate);
    usli_cursor before = t->cursor;
    usl_step_stats s = { .total = t->total };
    int64_t count, replays = t->graphs.replays;
    double waited = 0;
    usl_status st = usli_cursor_window(t->ctx, &t->cursor, t->opts.batch * t->opts.accumulation, t->pick, &count);
    double embed = t->opts.embedding_learning_rate;
    t->update.lr[0] = (float)rate;
    t->update.lr[1] = (float)(embed > 0 && t->opts.learning_rate > 0 ? rate * embed / t->opts.learning_rate : rate);
    t->update.step++;
    if (st == USL_OK) st = run_window(t, t->rows, t->pick, count, true, &s);
    if (st == USL_OK) st = optimize(t, &waited);
    if (st == USL_OK) s.loss = loss_of(t, &s);
    if (st != USL_OK || !t->update.finite) t->update.step--; /* Adam's clock counts updates that were made */
    if (st == USL_OK) st = judge(t, &s);
    if (st != USL_OK) {
        t->cursor = before;
        (void)usli_optimizer_zero(&t->optimizer); /* the first failure is the one to tell */
        return st;
    }
    t->step++;
    s.step = t->step;
    s.epoch = usli_cursor_epoch(&t->cursor);
    s.learning_rate = rate;
    s.grad_norm = t->update.grad_norm;
    s.skipped = !t->update.finite;
    s.seconds = usli_now() - start;
    if (t->graphs.replays == replays) usli_graphs_judge(&t->graphs, waited, s.seconds);
    give_stats(&s, out);
    return USL_OK;
}

usl_status usli_trainer_gradients(usl_trainer *t, int64_t first, int64_t count, usl_step_stats *out) {
    int64_t n = usli_rows_count(t->rows);
    if (first < 0 || count < 1 || count > n - first || count > t->opts.batch * t->opts.accumulation)
        return usli_fail(t->ctx, USL_ERR_INVALID,
                         "rows %lld to %lld are not in the training set of %lld, or more than one update's",
                         (long long)first + 1, (long long)(first + count), (long long)n);
    double start = usli_now();
    usl_step_stats s = { .step = t->step, .total = t->total };
    for (int64_t i = 0; i < count; i++) t->pick[i] = first + i;
    USLI_TRY(usli_optimizer_zero(&t->optimizer));
    USLI_TRY(run_window(t, t->rows, t->pick, count, true, &s));
    USLI_TRY(usli_twin_pull(&t->model->exec, &t->update_twin));
    s.loss = loss_of(t, &s);
    s.seconds = usli_now() - start;
    give_stats(&s, out);
    return USL_OK;
}

usl_status usli_trainer_evaluate(usl_trainer *t, usl_step_stats *out) {
    if (!t->eval) return usli_fail(t->ctx, USL_ERR_INVALID, "there is no evaluation set; give eval_dataset");
    double start = usli_now(), sum = 0;
    usl_step_stats all = { .step = t->step, .total = t->total, .epoch = usli_cursor_epoch(&t->cursor) }, s = { 0 };
    int64_t n = usli_rows_count(t->eval), window = t->opts.batch * t->opts.accumulation;
    for (int64_t first = 0; first < n; first += window) {
        USLI_TRY(usli_progress(t->ctx, "evaluating", (uint64_t)first, (uint64_t)n));
        int64_t count = n - first < window ? n - first : window;
        for (int64_t i = 0; i < count; i++) t->pick[i] = first + i;
        USLI_TRY(run_window(t, t->eval, t->pick, count, false, &s));
        USLI_TRY(usli_twin_pull(&t->model->exec, &t->update_twin));
        sum += t->update.loss_sum;
        all.tokens += s.tokens;
        all.counted += s.counted;
        all.rows += s.rows;
        all.passes += s.passes;
    }
    all.loss = all.counted ? sum / (double)all.counted : 0;
    all.seconds = usli_now() - start;
    give_stats(&all, out);
    return USL_OK;
}
