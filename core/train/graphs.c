#include "core/train/graphs.h"

/* ---- Shapes
 * ------------------------------------------------------------------------------------------------------------------------
 */

bool usli_shape_rounds(const usl_model *m) {
    return m->exec.backend->record && !m->config.arch->mixture;
}

usli_shape usli_shape_most(const usl_model *m, usli_shape most) {
    if (!usli_shape_rounds(m)) return most;
    most.rows++;
    if (most.longest < USLI_BUCKET) most.longest = USLI_BUCKET; /* the tail's */
    return most;
}

/* Whether the host needs as long to launch a pass as a quick device to run it: 70 kernels a block at 3 us each against
 * products forward and backward at 400 TFLOP/s. Of longer passes rounding makes nothing but still longer ones, by 4%
 * where rows are Alpaca's. An 8B model's are short below 96 tokens, a 135M model's below 5,900. */
static bool is_short(const usl_model *m, int64_t tokens) {
    const usli_config *c = &m->config;
    double heads = (double)((2 * c->heads + 2 * c->kv_heads) * c->head_dim), weights = (double)c->hidden * heads;
    weights += 3.0 * (double)c->hidden * (double)c->inter;
    return 4.0 * weights * (double)tokens / 400e12 < 70 * 3e-6;
}

usli_shape usli_shape_of(const usl_model *m, usli_shape most, usli_shape pass) {
    bool filled = pass.tokens % USLI_BUCKET == 0 && pass.rows * pass.longest == pass.tokens;
    if (!usli_shape_rounds(m) || filled || !is_short(m, pass.tokens)) return pass;
    usli_shape to = usli_shape_most(m, most);
    int64_t tokens = (pass.tokens + USLI_BUCKET - 1) / USLI_BUCKET * USLI_BUCKET;
    if (tokens < to.tokens) to.tokens = tokens;
    if (to.longest < pass.longest) to.longest = pass.longest; /* than the plan of a checkpoint knew of */
    return to;
}

/* ---- What is recorded
 * --------------------------------------------------------------------------------------------------------------
 */

static int64_t device_bytes(usli_exec *x) {
    size_t used = 0, total;
    return x->backend->memory && x->backend->memory(x, &used, &total) == USL_OK ? (int64_t)used : 0;
}

static bool has_work(const usli_graph *e) {
    return e->work[0] || e->work[1];
}

static int pairs_of(const usli_graphs *g) {
    int pairs = 0;
    for (int i = 0; i < USLI_GRAPH_KEYS; i++) pairs += has_work(&g->at[i]);
    return pairs;
}

/* What still runs would be freed later, and be counted as taken. */
static void forget(usli_graphs *g, usli_exec *x, usli_graph *e) {
    if (!has_work(e)) return;
    (void)x->backend->sync(x);
    int64_t before = device_bytes(x);
    for (int i = 0; i < USLI_GRAPH_HALVES; i++) {
        x->backend->forget(x, e->work[i]);
        e->work[i] = NULL;
    }
    g->bytes += device_bytes(x) - before; /* a driver may keep it for the next one */
}

/* Recording is guessed to take 7 ms of the host's. Each use after it saves the device the gaps between kernels, 1 ms or
 * so, and the host nearly all: where the device waits for the host, that pays at once. A host that is 1,024 launches
 * ahead is held up, so that its wait at the end is not all that it is ahead. */
enum { EARLY = 2, LATE = 8 };
static const double AHEAD = 0.3;

void usli_graphs_begin(usli_graphs *g, size_t most) {
    g->most = most;
    g->pairs = most ? USLI_GRAPH_PAIRS : 0;
    g->wanted = EARLY;
}

void usli_graphs_judge(usli_graphs *g, double waited, double took) {
    g->wanted = waited > AHEAD * took ? LATE : EARLY;
}

void usli_graphs_forget(usli_graphs *g, usli_exec *x) {
    for (int i = 0; i < USLI_GRAPH_KEYS; i++) {
        forget(g, x, &g->at[i]);
        g->at[i] = (usli_graph){ 0 };
    }
    g->refused = false;
}

/* The one that was used least among those that have something recorded, or have not. */
static usli_graph *least_used(usli_graphs *g, bool recorded) {
    usli_graph *least = NULL;
    for (usli_graph *e = g->at; e < g->at + USLI_GRAPH_KEYS; e++)
        if (has_work(e) == recorded && (!least || e->uses < least->uses)) least = e;
    return least;
}

static bool same_shape(usli_shape a, usli_shape b) {
    return a.tokens == b.tokens && a.rows == b.rows && a.longest == b.longest;
}

/* A pass's place in the table; NULL: it cannot be recorded. Copies between the host and the device, with which weights
 * and inputs come and go, have their own streams and state; MLPs that go piece by piece are of passes so long that the
 * device is never waiting, and are many launches. */
static usli_graph *place_of(usli_graphs *g, const usli_pass_state *s) {
    const usl_model *m = s->model;
    const usli_batch *b = s->batch;
    if (!g || g->refused || s->exec->arena->dry || s->inputs || s->piece || m->ring || !usli_shape_rounds(m))
        return NULL;
    if (g->placing != m->placing) {
        usli_graphs_forget(g, s->exec);
        g->placing = m->placing;
    }
    usli_shape shape = { b->tokens, b->rows, b->longest };
    bool drops = s->drops && m->active && m->active->dropout > 0;
    for (usli_graph *e = g->at; e < g->at + USLI_GRAPH_KEYS; e++)
        if (e->uses && same_shape(e->shape, shape) && e->drops == drops) return e;
    usli_graph *e = least_used(g, false); /* there are more places than pairs */
    *e = (usli_graph){ .shape = shape, .drops = drops };
    return e;
}

/* Whether there is room to record it. Of what comes more often than it, none is given up for it, and of the rest only
 * what it came twice as often as: recording costs as much as some plain passes. */
static bool may_record(usli_graphs *g, usli_exec *x, const usli_graph *e) {
    if (has_work(e) || pairs_of(g) < g->pairs) return true;
    usli_graph *least = g->pairs ? least_used(g, true) : NULL;
    if (!least || e->uses < 2 * least->uses) return false;
    forget(g, x, least);
    return true;
}

static usl_status walk(usli_pass_state *s, usli_pass half, void **hidden) {
    return half == USLI_FORWARD ? usli_pass_forward(s, hidden) : usli_pass_backward(s, *hidden);
}

/* What cannot be recorded (a device may refuse) runs plainly ever after. */
static usl_status record(usli_graphs *g, usli_graph *e, usli_pass_state *s, usli_pass half, void **hidden) {
    usli_exec *x = s->exec;
    const usli_arena arena = *x->arena;
    uint64_t flops = x->matmul_flops;
    int64_t before = device_bytes(x);
    usl_status st = USL_ERR_DEVICE;
    if (x->backend->record(x)) {
        st = walk(s, half, hidden);
        void *work = x->backend->recorded(x);
        if (st == USL_OK && work) {
            e->work[half] = work;
            st = x->backend->replay(x, work); /* which may take memory, the first time */
            g->bytes += device_bytes(x) - before;
            g->replays++;
            if (g->bytes <= (int64_t)g->most) return st;
            forget(g, x, e);
            g->pairs = pairs_of(g);
            return st;
        }
        x->backend->forget(x, work);
    }
    if (st != USL_OK && st != USL_ERR_DEVICE) return st;
    g->refused = true;
    *x->arena = arena;
    x->matmul_flops = flops;
    return walk(s, half, hidden);
}

/* The first pass of a shape runs plainly: libraries plan and load what they need, which cannot be recorded, and many a
 * shape never comes again. Where there is recorded work the pass is walked through on a dry arena, which leaves behind
 * what the other half, and who counts, want to know; then the device does it. */
static usl_status run(usli_graphs *g, usli_graph *e, usli_pass_state *s, usli_pass half, void **hidden) {
    usli_exec *x = s->exec;
    if (!e->seen[half] || (!e->work[half] && (e->uses < g->wanted || !may_record(g, x, e)))) {
        USLI_TRY(walk(s, half, hidden));
        e->seen[half] = true; /* not when it was cut short: not all is loaded then */
        return USL_OK;
    }
    if (!e->work[half]) return record(g, e, s, half, hidden);
    x->arena->dry = true;
    usl_status st = walk(s, half, hidden);
    x->arena->dry = false;
    g->replays++;
    return st == USL_OK ? x->backend->replay(x, e->work[half]) : st;
}

usl_status usli_graphs_forward(usli_graphs *g, usli_pass_state *s, void **hidden) {
    usli_graph *e = place_of(g, s);
    if (!e) return usli_pass_forward(s, hidden);
    e->uses++;
    USLI_TRY(usli_pass_norms(s->exec, s->model)); /* not each time */
    return run(g, e, s, USLI_FORWARD, hidden);
}

usl_status usli_graphs_backward(usli_graphs *g, usli_pass_state *s, void *dhidden) {
    usli_graph *e = place_of(g, s);
    return e ? run(g, e, s, USLI_BACKWARD, &dhidden) : usli_pass_backward(s, dhidden);
}
