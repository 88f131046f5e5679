/* The training loop's state. One update: window of rows -> passes -> gradients -> norm, clip, AdamW. */
#ifndef USLI_TRAIN_TRAINER_H
#define USLI_TRAIN_TRAINER_H

#include "core/data/cursor.h"
#include "core/data/rows.h"
#include "core/data/window.h"
#include "core/train/loss.h"
#include "core/train/optimizer.h"
#include "core/train/schedule.h"

/* What a process needs beside the plan's items: allocator slack, the GEMM library's buffers, tokens and rows. */
enum { USLI_HOST_SLACK = 32 << 20 };

/* What the plan decided; replayed on resume, since it decides the order of sums. */
typedef struct usli_capacity {
    int64_t tokens, rows; /* of one pass */
    int64_t longest;      /* row */
    int64_t recomputed;   /* blocks that keep their input only */
    int64_t offloaded;    /* 1: their inputs are kept in host memory */
    int64_t piece;        /* tokens at a time of their MLPs; 0: all of the pass */
    int64_t host_embed;   /* 1: the embedding table is too; changes speed only, as the next does */
    int64_t streamed;     /* layers whose weights come from host memory; likewise */
    int64_t cached;       /* layers whose decoded weights are kept: changes speed, not a bit of the result */
    int64_t whole;        /* blocks that keep also what is cheap to make again; likewise */
} usli_capacity;

struct usl_trainer {
    usl_ctx *ctx;
    usl_model *model;
    usli_rows *rows, *eval;
    usl_train_opts opts; /* strings are copies */
    char *schedule_name, *optimizer_name, *recompute;
    usli_schedule_fn schedule;
    usli_optimizer optimizer;
    usli_update update;    /* the host's side of update_twin */
    usli_twin update_twin; /* pushed before an update's passes, pulled after its optimiser */
    usli_cursor cursor;
    int64_t step, total, updates_per_epoch, warmup;
    int64_t good_steps; /* since the loss scale last moved (float16) */
    double rate;        /* set by hand; negative: the schedule's */
    usli_capacity capacity;
    int64_t least_tokens; /* that a pass must hold: a row, or a micro-batch where losses are of micro-batches */
    uint64_t limit, arena_bytes;
    uint64_t fixed_bytes; /* on the device whatever the plan, weights apart */
    uint64_t beside;      /* in use beside the plan's items: libraries, other programs on the GPU */
    void *arena_base;     /* on the device, as is cache_base: decoded weights */
    void *cache_base;
    void *inputs; /* host memory of offloaded inputs */
    usli_block_saved *blocks;
    int64_t *pick; /* (batch * accumulation) rows of the window */
    /* of one pass: its arrays in one block of the host, and on the device */
    int32_t *numbers;
    usli_twin numbers_twin;
    usli_graphs graphs;
    float *losses; /* on the device */
};

/* As unsloth.h describes usl_trainer_new, _free, _step, _gradients, _evaluate. */
usl_status usli_trainer_new(usl_model *model, usli_rows *rows, usli_rows *eval, const usl_train_opts *opts,
                            usl_trainer **out);
void usli_trainer_free(usl_trainer *t);
usl_status usli_trainer_step(usl_trainer *t, usl_step_stats *out);
usl_status usli_trainer_set_rows(usl_trainer *t, usli_rows *rows);
usl_status usli_trainer_skip(usl_trainer *t, int64_t updates);
usl_status usli_trainer_gradients(usl_trainer *t, int64_t first, int64_t count, usl_step_stats *out);
usl_status usli_trainer_evaluate(usl_trainer *t, usl_step_stats *out);

/* The most micro-batches that a pass of so many rows touches. */
int usli_trainer_micros(const usl_trainer *t, int64_t rows);
/* plan.c: decides the capacity for windows of at most (tokens, rows), or refuses with the numbers. */
usl_status usli_plan_make(usl_trainer *t, int64_t tokens, int64_t rows, int64_t longest);
/* Room of the arena and of decoded weights, given where c puts things. */
size_t usli_plan_room(const usl_trainer *t, const usli_capacity *c);
/* Host memory of the block inputs that wait there. */
size_t usli_plan_input_bytes(const usl_trainer *t, const usli_capacity *c);
/* Another run's plan: what does not change the bits, where weights are and how many are kept decoded, is chosen for
 * this one. bytes: of the arena. */
usl_status usli_plan_replay(usl_trainer *t, usli_capacity *c, size_t *bytes, bool *fits);
void usli_plan_get(const usl_trainer *t, usl_plan *out);
/* Arena bytes of a pass of that size. */
usl_status usli_plan_arena(usl_trainer *t, const usli_capacity *c, size_t *bytes);

/* Memory for another capacity (a checkpoint's). */
usl_status usli_trainer_set_capacity(usl_trainer *t, const usli_capacity *c, size_t arena_bytes);

#endif
