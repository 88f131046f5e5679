#include "core/train/checkpoint.h"

#include <float.h>
#include <stdio.h>
#include <string.h>

#include "core/io/json.h"
#include "core/io/safetensors.h"
#include "core/quant/optim8.h"

enum { FORMAT = 1 };

/* ---- optimizer.safetensors: for each trained parameter NAME its NAME.m and NAME.v, with .m_absmax and .v_absmax; the
 * weights themselves as NAME, so that a resumed run needs no other file.
 * ------------------------------------------------------------ */

typedef struct piece {
    const char *suffix;
    usl_dtype dtype;
    void *data;
    int64_t n;
} piece;

static int pieces_of(const usli_param *p, piece out[5]) {
    int64_t blocks = (p->n + USLI_OPTIM8_BLOCK - 1) / USLI_OPTIM8_BLOCK;
    int count = 0;
    out[count++] = (piece){ "", USL_F32, p->w, p->n };
    out[count++] = (piece){ ".m", p->state, p->m, p->n };
    out[count++] = (piece){ ".v", p->state, p->v, p->n };
    if (p->state == USL_U8) {
        out[count++] = (piece){ ".m_absmax", USL_F32, p->m_absmax, blocks };
        out[count++] = (piece){ ".v_absmax", USL_F32, p->v_absmax, blocks };
    }
    return count;
}

/* Values of the device reach a file through a piece of host memory. */
enum { BOUNCE = 4 << 20 };

static usl_status write_values(usl_trainer *t, usli_safetensors_writer *w, const char *data, size_t bytes,
                               void *bounce) {
    usli_exec *x = &t->model->exec;
    if (x->backend->host) return usli_safetensors_write(w, data, bytes);
    for (size_t at = 0; at < bytes; at += BOUNCE) {
        size_t n = bytes - at < BOUNCE ? bytes - at : BOUNCE;
        USLI_TRY(x->backend->copy_out(x, bounce, data + at, n));
        USLI_TRY(usli_safetensors_write(w, bounce, n));
    }
    return USL_OK;
}

/* *out is new and wants to be committed. */
static usl_status write_state(usl_trainer *t, const char *path, usli_safetensors_writer **out) {
    usli_safetensors_writer *w;
    usl_status st = USL_OK;
    *out = NULL;
    void *bounce = usli_malloc(t->ctx, BOUNCE);
    if (!bounce) return usli_nomem(t->ctx, BOUNCE);
    if ((st = usli_safetensors_create(t->ctx, path, &w)) != USL_OK) {
        usli_free(t->ctx, bounce);
        return st;
    }
    for (int writing = 0; writing < 2; writing++) {
        if (writing) USLI_TRYGO(usli_safetensors_begin(w));
        for (int64_t i = 0; i < t->optimizer.count; i++) {
            usli_param_ref ref;
            piece pieces[5];
            usli_model_param(t->model, t->optimizer.ref[i], &ref);
            int n = pieces_of(&t->optimizer.params[i], pieces);
            for (int k = 0; k < n; k++) {
                char name[192];
                snprintf(name, sizeof name, "%s%s", ref.name, pieces[k].suffix);
                size_t bytes = (size_t)pieces[k].n * (pieces[k].dtype == USL_U8 ? 1 : sizeof(float));
                if (writing)
                    USLI_TRYGO(write_values(t, w, pieces[k].data, bytes, bounce));
                else
                    USLI_TRYGO(usli_safetensors_add(w, name, pieces[k].dtype, 1, &pieces[k].n));
            }
        }
    }
done:
    usli_free(t->ctx, bounce);
    if (st != USL_OK)
        usli_safetensors_abandon(w);
    else
        *out = w;
    return st;
}

/* All tensors are checked before the first is copied: a failed resume changes nothing. */
static usl_status read_state(usl_trainer *t, const char *path) {
    usli_safetensors *file;
    usl_status st = USL_OK;
    USLI_TRY(usli_safetensors_open(t->ctx, path, &file));
    for (int copying = 0; copying < 2; copying++) {
        for (int64_t i = 0; i < t->optimizer.count; i++) {
            usli_param_ref ref;
            piece pieces[5];
            usli_model_param(t->model, t->optimizer.ref[i], &ref);
            int n = pieces_of(&t->optimizer.params[i], pieces);
            for (int k = 0; k < n; k++) {
                char name[192];
                snprintf(name, sizeof name, "%s%s", ref.name, pieces[k].suffix);
                const usli_file_tensor *f = usli_safetensors_find(file, name);
                if (!f || f->dtype != pieces[k].dtype || f->ndim != 1 || f->shape[0] != pieces[k].n) {
                    st = usli_fail(t->ctx, USL_ERR_SHAPE,
                                   "%s: \"%s\" does not fit this run; resume with the model, r, target_modules "
                                   "and optim the checkpoint was made with",
                                   path, name);
                    goto done;
                }
                if (copying)
                    USLI_TRYGO(t->model->exec.backend->copy_in(&t->model->exec, pieces[k].data, f->data, f->bytes));
            }
        }
    }
    usli_model_touched(t->model);
    st = t->model->exec.backend->sync(&t->model->exec); /* the file is unmapped next */
done:
    usli_safetensors_close(file);
    return st;
}

/* ---- trainer_state.json
 * ------------------------------------------------------------------------------------------------------------ */

/* Whose arithmetic it is: others sum in another order. */
static void name_arithmetic(const usl_trainer *t, char *name, size_t room) {
    const usli_exec *x = &t->model->exec;
    snprintf(name, room, "%s, libraries: %s", x->backend->name,
             x->backend->libraries ? x->backend->libraries(x) : "none");
}

static json_t *state_json(const usl_trainer *t, const char *extra) {
    const usli_cursor *c = &t->cursor;
    char arithmetic[96];
    name_arithmetic(t, arithmetic, sizeof arithmetic);
    json_t *j =
        json_pack("{s:i,s:s,s:I,s:I,s:i,s:f,s:I,s:{s:I,s:I,s:I,s:I,s:b},s:{s:I,s:I,s:I,s:I,s:I,s:I},s:I,s:I}", "format",
                  FORMAT, "arithmetic", arithmetic, "global_step", (json_int_t)t->step, "max_steps",
                  (json_int_t)t->total, "adam_step", (int)t->update.step, "loss_scale", (double)t->update.loss_scale,
                  "good_steps", (json_int_t)t->good_steps, "cursor", "seed", (json_int_t)c->seed, "rows",
                  (json_int_t)c->rows, "epoch", (json_int_t)c->epoch, "position", (json_int_t)c->position, "shuffle",
                  c->shuffle, "plan", "tokens", (json_int_t)t->capacity.tokens, "rows", (json_int_t)t->capacity.rows,
                  "longest", (json_int_t)t->capacity.longest, "recomputed", (json_int_t)t->capacity.recomputed,
                  "offloaded", (json_int_t)t->capacity.offloaded, "piece", (json_int_t)t->capacity.piece, "batch",
                  (json_int_t)t->opts.batch, "accumulation", (json_int_t)t->opts.accumulation);
    if (j && extra && json_object_set_new(j, "extra", json_string(extra)) != 0) {
        json_decref(j);
        return NULL;
    }
    return j;
}

/* Everything is written under temporary names before the old checkpoint of that folder is given up: want of memory or
 * of disk leaves it as it was. Between the two commits the folder has no trainer_state.json and so is no checkpoint. */
static usl_status write_files(usl_trainer *t, const char *state, const char *tensors, const char *text, size_t len) {
    usli_safetensors_writer *numbers = NULL;
    usli_writer *words = NULL;
    usl_status st;
    USLI_TRYGO(write_state(t, tensors, &numbers));
    USLI_TRYGO(usli_writer_open(t->ctx, state, &words));
    USLI_TRYGO(usli_writer_write(words, text, len));
    USLI_TRYGO(usli_remove_file(t->ctx, state));
    USLI_TRYGO(usli_safetensors_commit(numbers));
    USLI_TRYGO(usli_writer_commit(words));
done:
    usli_safetensors_abandon(numbers);
    usli_writer_close(words);
    return st;
}

usl_status usli_checkpoint_save(usl_trainer *t, const char *dir, const char *extra) {
    usl_ctx *ctx = t->ctx;
    USLI_TRY(usli_model_check_weights(t->model));
    USLI_TRY(usli_make_dirs(ctx, dir));
    char *state = usli_path_join(ctx, dir, "trainer_state.json"),
         *tensors = usli_path_join(ctx, dir, "optimizer.safetensors");
    json_t *json = state_json(t, extra);
    char *text = NULL;
    size_t len;
    usl_status st = USL_OK;
    if (!state || !tensors || !json) {
        st = usli_nomem(ctx, 4096);
        goto done;
    }
    USLI_TRYGO(usli_json_dump(ctx, json, 2, &text, &len));
    if (!t->model->full) USLI_TRYGO(usli_model_save_adapter(t->model, dir, NULL, false));
    USLI_TRYGO(write_files(t, state, tensors, text, len));
done:
    usli_free(ctx, text);
    if (json) json_decref(json);
    usli_free(ctx, state);
    usli_free(ctx, tensors);
    return st;
}

static int64_t get_int(const json_t *j, const char *key) {
    return json_integer_value(json_object_get(j, key));
}

/* Of something that a run may go on counting. */
static bool is_count(int64_t n) {
    return n >= 0 && n <= 1 << 30;
}

/* What must be as it was, for the sums to come out the same. */
static usl_status check_state(usl_trainer *t, const char *path, const json_t *j) {
    const json_t *c = json_object_get(j, "cursor");
    int64_t position = get_int(c, "position"), adam = get_int(j, "adam_step");
    double scale = json_number_value(json_object_get(j, "loss_scale"));
    const struct {
        const char *what;
        int64_t saved, now;
    } same[] = {
        { "rows in the training set", get_int(c, "rows"), t->cursor.rows },
        { "seed", get_int(c, "seed"), (int64_t)t->cursor.seed },
        { "per_device_train_batch_size", get_int(j, "batch"), t->opts.batch },
        { "gradient_accumulation_steps", get_int(j, "accumulation"), t->opts.accumulation },
        { "shuffle", json_is_true(json_object_get(c, "shuffle")), t->cursor.shuffle },
    };
    if (get_int(j, "format") != FORMAT)
        return usli_fail(t->ctx, USL_ERR_FORMAT, "%s: is no checkpoint of this program's format %d", path, FORMAT);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (same[i].saved != same[i].now)
            return usli_fail(t->ctx, USL_ERR_INVALID,
                             "%s: the run had %s %lld, this one has %lld; resume with the same settings and data", path,
                             same[i].what, (long long)same[i].saved, (long long)same[i].now);
    bool counts = is_count(get_int(c, "epoch")) && is_count(get_int(j, "global_step")) && is_count(adam) &&
                  is_count(get_int(j, "good_steps"));
    if (!counts || position < 0 || position > t->cursor.rows || !(scale >= 1 && scale <= FLT_MAX))
        return usli_fail(t->ctx, USL_ERR_FORMAT, "%s: its numbers are not sensible; the file is damaged", path);
    return USL_OK;
}

/* Said, not refused: a run may well go on with another backend. */
static void compare_arithmetic(usl_trainer *t, const char *path, const json_t *j) {
    const char *saved = json_string_value(json_object_get(j, "arithmetic"));
    char now[96];
    name_arithmetic(t, now, sizeof now);
    if (saved && strcmp(saved, now) != 0)
        usli_log(t->ctx, USL_LOG_WARN,
                 "%s: was computed by %s, this run by %s; it goes on, but not with the bits that the other would have "
                 "had",
                 path, saved, now);
}

/* The checkpoint's plan in place of ours; a sentence when it does not fit any more. */
static usl_status replay_plan(usl_trainer *t, const char *path, const json_t *plan) {
    usli_capacity c = { .tokens = get_int(plan, "tokens"),
                        .rows = get_int(plan, "rows"),
                        .longest = get_int(plan, "longest"),
                        .recomputed = get_int(plan, "recomputed"),
                        .offloaded = get_int(plan, "offloaded"),
                        .piece = json_object_get(plan, "piece") ? get_int(plan, "piece") : 0,
                        .host_embed = t->capacity.host_embed,
                        .streamed = t->capacity.streamed,
                        .cached = t->capacity.cached,
                        .whole = t->capacity.whole };
    if (memcmp(&c, &t->capacity, sizeof c) == 0) return USL_OK;
    if (c.tokens < 1 || c.tokens > INT32_MAX || c.rows < 1 || c.rows > c.tokens || c.longest < 1 ||
        c.longest > c.tokens || c.recomputed < 0 || c.recomputed > t->model->config.layers || c.offloaded < 0 ||
        c.offloaded > 1 || c.piece < 0)
        return usli_fail(t->ctx, USL_ERR_FORMAT, "%s: its plan is not sensible", path);
    size_t bytes;
    bool fits;
    USLI_TRY(usli_plan_replay(t, &c, &bytes, &fits));
    if (!fits)
        return usli_fail(t->ctx, USL_ERR_NOMEM,
                         "%s: its plan needs %.2f GiB for a pass and this one has room for %.2f GiB, so the run could "
                         "not continue with the same bits; free some memory or start anew from the adapter",
                         path, (double)bytes / (1 << 30), (double)usli_plan_room(t, &c) / (1 << 30));
    return usli_trainer_set_capacity(t, &c, bytes);
}

usl_status usli_checkpoint_load(usl_trainer *t, const char *dir, char **extra) {
    usl_ctx *ctx = t->ctx;
    if (extra) *extra = NULL;
    USLI_TRY(usli_model_check_weights(t->model));
    char *state = usli_path_join(ctx, dir, "trainer_state.json"),
         *tensors = usli_path_join(ctx, dir, "optimizer.safetensors");
    json_t *j = NULL;
    usl_status st = USL_OK;
    if (!state || !tensors) {
        st = usli_nomem(ctx, 4096);
        goto done;
    }
    if (!usli_is_file(state)) {
        st = usli_fail(ctx, USL_ERR_NOT_FOUND,
                       "%s: is no whole checkpoint (trainer_state.json is missing); choose another one", dir);
        goto done;
    }
    USLI_TRYGO(usli_json_load(ctx, state, &j));
    USLI_TRYGO(check_state(t, state, j));
    const char *text = json_string_value(json_object_get(j, "extra"));
    if (extra && text && !(*extra = usli_strdup(ctx, text))) {
        st = usli_nomem(ctx, strlen(text));
        goto done;
    }
    compare_arithmetic(t, state, j);
    USLI_TRYGO(replay_plan(t, state, json_object_get(j, "plan")));
    USLI_TRYGO(read_state(t, tensors));
    const json_t *c = json_object_get(j, "cursor");
    t->step = get_int(j, "global_step");
    t->update.step = (int32_t)get_int(j, "adam_step");
    t->update.loss_scale = (float)json_number_value(json_object_get(j, "loss_scale"));
    t->good_steps = get_int(j, "good_steps");
    t->cursor.epoch = get_int(c, "epoch");
    t->cursor.position = get_int(c, "position");
done:
    if (st != USL_OK && extra) {
        usli_free(ctx, *extra);
        *extra = NULL;
    }
    if (j) json_decref(j);
    usli_free(ctx, state);
    usli_free(ctx, tensors);
    return st;
}
