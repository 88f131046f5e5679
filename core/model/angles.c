/* Tables of cosines and sines, and which of their rows the tokens of a batch read.
 *
 * Where frequencies depend on how many tokens a row has, a table holds two parts: angles of rows within the original
 * context, and behind them those of longer rows. longrope has one list of frequencies for all of these; dynamic has one
 * for each length, so that its second part is filled anew for every batch. */
#include <math.h>
#include <string.h>

#include "core/base/pool.h"
#include "core/model/model.h"

/* Positions of rows within the original context. */
static int64_t near_rows(const usl_model *m, const usli_rope_config *rope) {
    bool all = !usli_rope_by_length(rope) || rope->original_context >= m->context;
    return all ? m->context : rope->original_context;
}

/* Rows of the second part, given how many tokens of long rows a batch has at most. */
static int64_t far_rows(const usl_model *m, const usli_rope_config *rope, int64_t tokens) {
    if (!usli_rope_by_length(rope) || rope->original_context >= m->context) return 0;
    return rope->kind == USLI_ROPE_LONG ? m->context : tokens;
}

uint64_t usli_model_rope_bytes(const usl_model *m, int64_t tokens) {
    int64_t rows = near_rows(m, &m->config.rope) + far_rows(m, &m->config.rope, tokens);
    if (m->config.arch->local_rope) rows += m->context;
    return (uint64_t)rows * (uint64_t)m->config.rot_dim * sizeof(float);
}

/* ---- Filling -------------------------------------------------------------------------------------------------------
 */

enum { CHUNK = 256 };

typedef struct angles_job {
    const double *inv;
    const int32_t *position; /* NULL: 0, 1, ... */
    double attention;
    int64_t count, half;
    float *cos, *sin; /* (count, half) */
} angles_job;

static void angles_task(void *arg, int64_t task, int worker) {
    const angles_job *j = arg;
    (void)worker;
    for (int64_t r = task * CHUNK; r < (task + 1) * CHUNK && r < j->count; r++) {
        int64_t p = j->position ? j->position[r] : r;
        for (int64_t i = 0; i < j->half; i++) {
            /* The angle is rounded to float32 where transformers rounds it. */
            double angle = (double)((float)p * (float)j->inv[i]);
            j->cos[r * j->half + i] = (float)(cos(angle) * j->attention);
            j->sin[r * j->half + i] = (float)(sin(angle) * j->attention);
        }
    }
}

/* Angles of positions in rows of so many tokens, into the table from its row `first` on. */
static usl_status fill(usl_model *m, const usli_rope_config *rope, const float *divisors, int64_t tokens,
                       const int32_t *position, int64_t count, const usli_rope_table *table, int64_t first) {
    usl_ctx *ctx = m->ctx;
    const usli_backend *k = m->exec.backend;
    int64_t half = m->config.rot_dim / 2;
    size_t n = (size_t)(count * half), bytes = n * sizeof(float);
    usl_status st = USL_OK;
    double *inv = usli_malloc(ctx, (size_t)half * sizeof *inv);
    float *both = usli_malloc(ctx, 2 * bytes);
    if (!inv || !both) {
        st = usli_nomem(ctx, 2 * bytes);
        goto done;
    }
    angles_job job = { .inv = inv, .position = position, .count = count, .half = half, .cos = both, .sin = both + n };
    usli_rope_frequencies(rope, m->config.rot_dim, divisors, tokens, inv, &job.attention);
    usli_pool_run(ctx->pool, (count + CHUNK - 1) / CHUNK, angles_task, &job);
    USLI_TRYGO(k->copy_in(&m->exec, table->cos + first * half, job.cos, bytes));
    st = k->copy_in(&m->exec, table->sin + first * half, job.sin, bytes);
done:
    usli_free(ctx, inv);
    usli_free(ctx, both);
    return st;
}

/* The first part, and of longrope the second. */
static usl_status make_table(usl_model *m, const usli_rope_config *rope, const float *divisors, usli_rope_table *t) {
    int64_t close = near_rows(m, rope), far = far_rows(m, rope, 0);
    size_t bytes = (size_t)((close + far) * (m->config.rot_dim / 2)) * sizeof(float);
    t->rows = close + far;
    USLI_TRY(usli_device_alloc(&m->exec, bytes, &t->cos));
    USLI_TRY(usli_device_alloc(&m->exec, bytes, &t->sin));
    if (m->plan_only) return USL_OK;
    USLI_TRY(fill(m, rope, divisors, 0, NULL, close, t, 0));
    if (far) USLI_TRY(fill(m, rope, divisors, m->context, NULL, far, t, close));
    return m->exec.backend->sync(&m->exec);
}

static void drop_table(usl_model *m, usli_rope_table *t) {
    usli_device_free(&m->exec, t->cos);
    usli_device_free(&m->exec, t->sin);
    *t = (usli_rope_table){ 0 };
}

usl_status usli_model_make_angles(usl_model *m) {
    USLI_TRY(make_table(m, &m->config.rope, m->rope_divisors, &m->rope));
    return m->config.arch->local_rope ? make_table(m, &m->config.local_rope, NULL, &m->local_rope) : USL_OK;
}

void usli_model_drop_angles(usl_model *m) {
    drop_table(m, &m->rope);
    drop_table(m, &m->local_rope);
}

/* ---- Of a batch ----------------------------------------------------------------------------------------------------
 */

/* The table with a second part of at least so many rows. The first part is made again, which is rare: batches grow to
 * their largest soon. */
static usl_status reserve(usl_model *m, int64_t rows) {
    const usli_rope_config *rope = &m->config.rope;
    int64_t close = near_rows(m, rope);
    if (close + rows <= m->rope.rows) return USL_OK;
    USLI_TRY(m->exec.backend->sync(&m->exec));
    drop_table(m, &m->rope);
    m->placing++;
    size_t bytes = (size_t)((close + rows) * (m->config.rot_dim / 2)) * sizeof(float);
    USLI_TRY(usli_device_alloc(&m->exec, bytes, &m->rope.cos));
    USLI_TRY(usli_device_alloc(&m->exec, bytes, &m->rope.sin));
    m->rope.rows = close + rows;
    return fill(m, rope, m->rope_divisors, 0, NULL, close, &m->rope, 0);
}

static int64_t length_of(const int32_t *cu, const int32_t *lens, int64_t r) {
    return lens ? lens[r] : cu[r + 1] - cu[r];
}

usl_status usli_model_angles(usl_model *m, int64_t rows, const int32_t *cu, const int32_t *lens,
                             const int32_t *position, int32_t *angle) {
    const usli_rope_config *rope = &m->config.rope;
    int64_t close = near_rows(m, rope), own = 0;
    memcpy(angle, position, (size_t)cu[rows] * sizeof *angle);
    if (!far_rows(m, rope, 1)) return USL_OK;
    for (int64_t r = 0; r < rows; r++)
        if (length_of(cu, lens, r) > close) own += cu[r + 1] - cu[r];
    bool each = rope->kind == USLI_ROPE_DYNAMIC;
    if (each) USLI_TRY(reserve(m, own));
    own = 0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t n = cu[r + 1] - cu[r], length = length_of(cu, lens, r);
        if (length <= close) continue;
        if (each && n) USLI_TRY(fill(m, rope, m->rope_divisors, length, position + cu[r], n, &m->rope, close + own));
        for (int64_t i = 0; i < n; i++) angle[cu[r] + i] = (int32_t)(close + (each ? own + i : position[cu[r] + i]));
        own += n;
    }
    return USL_OK;
}
