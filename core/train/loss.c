#include "core/train/loss.h"

#include "core/base/dtype.h"

/* A chunk of logits is at most so large; more would not make the product quicker. */
enum { HOST_CHUNK = 48 << 20, DEVICE_CHUNK = 256 << 20, HOST_ALIGN = 16, DEVICE_ALIGN = 128 };

/* On the CPU, where 16-bit products yield float32 at no cost, logits stay float32; on a GPU they have the model's type,
 * as in transformers, and half the bytes to move. */
static usl_dtype logits_dtype(const usl_model *m) {
    return m->exec.backend->host ? USL_F32 : m->dtype;
}

static int64_t chunk_rows(const usl_model *m, int64_t count, int64_t piece) {
    bool host = m->exec.backend->host;
    int64_t align = host ? HOST_ALIGN : DEVICE_ALIGN,
            row = m->config.vocab * (int64_t)usli_dtype_bytes(logits_dtype(m));
    int64_t rows = (host ? HOST_CHUNK : DEVICE_CHUNK) / row / align * align;
    if (rows < align) rows = align;
    if (piece && rows > piece) rows = piece;
    return rows < count ? rows : count;
}

typedef struct chunk {
    int64_t first, rows;
    void *x, *dx;                  /* (rows, hidden) */
    void *logits;                  /* (rows, vocab) */
    const int32_t *row, *position; /* (rows) where the head's adapter drops values, else NULL */
} chunk;

/* What stands at the counted tokens, for dropout's keys: 32 bits each, moved as they are. */
static usl_status pick(usli_pass_state *s, const usli_targets *t, const int32_t *from, const int32_t **out) {
    void *to;
    USLI_TAKE(to, s->exec, false, (size_t)t->count * sizeof **out);
    usli_gather_args g = {
        .rows = t->count, .cols = 1, .x_rows = s->batch->tokens, .dtype = USL_F32, .index = t->index, .x = from, .y = to
    };
    *out = to;
    return usli_op_gather(s->exec, &g, USLI_FORWARD);
}

static usl_status chunk_loss(usli_pass_state *s, const usli_targets *t, usli_update *update, const chunk *c,
                             bool with_gradient) {
    const usl_model *m = s->model;
    usli_segment head = usli_pass_head(m);
    usli_linear_args a = { .tokens = c->rows,
                           .in = m->config.hidden,
                           .out = m->config.vocab,
                           .segments = 1,
                           .segment = &head,
                           .dtype = m->dtype,
                           .y_dtype = logits_dtype(m),
                           .x = c->x,
                           .y = c->logits };
    if (c->row)
        a.dropout = (usli_dropout){ .p = (float)m->active->dropout,
                                    .seed = s->batch->dropout_seed,
                                    .update = s->batch->update,
                                    .row = c->row,
                                    .position = c->position,
                                    .layer = (uint32_t)m->config.layers };
    USLI_TRY(usli_op_linear(s->exec, &a, USLI_FORWARD));
    usli_cross_entropy_args ce = { .rows = c->rows,
                                   .cols = m->config.vocab,
                                   .dtype = logits_dtype(m),
                                   .logit_scale = 1,
                                   .softcap = (float)m->config.logit_softcap,
                                   .with_gradient = with_gradient,
                                   .logits = c->logits,
                                   .target = t->target + c->first,
                                   .losses = t->losses + c->first,
                                   .update = update };
    USLI_TRY(usli_op_cross_entropy(s->exec, &ce, USLI_FORWARD));
    if (!with_gradient) return USL_OK;
    a.dy = c->logits;
    a.dx = c->dx;
    return usli_op_linear(s->exec, &a, USLI_BACKWARD);
}

static int64_t mixtures_of(const usl_model *m) {
    int64_t layers = 0;
    for (int64_t l = 0; l < m->config.layers; l++) layers += usli_layer_sparse(&m->config, l);
    return layers;
}

/* Zeros to count in. */
static usl_status balance_begin(usli_pass_state *s, const usli_targets *t) {
    usli_balance *b = &s->balance;
    usli_exec *x = s->exec;
    size_t n = (size_t)t->micros * (size_t)s->model->config.experts * sizeof(float);
    *b = (usli_balance){ .micros = t->micros, .micro = t->micro };
    USLI_TAKE(b->counts, x, true, n);
    USLI_TAKE(b->mass, x, true, n);
    USLI_TAKE(b->dmass, x, true, n);
    if (x->arena->dry) return USL_OK;
    USLI_TRY(x->backend->zero(x, b->counts, n));
    return x->backend->zero(x, b->mass, n);
}

static usl_status balance_end(usli_pass_state *s, const usli_targets *t, usli_update *update) {
    const usli_balance *b = &s->balance;
    usli_balance_args a = { .micros = b->micros,
                            .experts = (int)s->model->config.experts,
                            .layers = mixtures_of(s->model),
                            .coefficient = t->balance,
                            .micro = b->micro,
                            .counts = b->counts,
                            .mass = b->mass,
                            .dmass = b->dmass,
                            .update = update };
    return usli_op_balance(s->exec, &a, USLI_FORWARD);
}

/* Of what was counted since, all of it tokens' share and share alike. */
static void count_live(const usli_pass_state *s, uint64_t before) {
    const usli_batch *b = s->batch;
    uint64_t each = (s->exec->matmul_flops - before) / (uint64_t)b->tokens;
    s->exec->matmul_flops -= each * (uint64_t)b->dead;
}

usl_status usli_loss_pass(usli_pass_state *s, usli_graphs *graphs, const usli_targets *t, usli_update *update,
                          bool with_gradient) {
    const usl_model *m = s->model;
    usli_exec *x = s->exec;
    size_t row = (size_t)m->config.hidden * usli_dtype_bytes(m->dtype), high = x->arena->high;
    void *hidden, *picked, *dpicked = NULL;
    bool balanced = t->balance > 0 && with_gradient;
    s->drops = with_gradient;
    if (balanced) USLI_TRY(balance_begin(s, t));
    uint64_t flops = x->matmul_flops;
    USLI_TRY(usli_graphs_forward(graphs, s, &hidden));
    count_live(s, flops);
    if (balanced) USLI_TRY(balance_end(s, t, update));
    size_t mark = x->arena->high;
    if (t->count) {
        int64_t most = chunk_rows(m, t->count, s->piece);
        void *logits;
        const int32_t *rows = NULL, *positions = NULL;
        if (with_gradient && usli_pass_head_drops(m)) {
            USLI_TRY(pick(s, t, s->batch->row_of_token, &rows));
            USLI_TRY(pick(s, t, s->batch->position, &positions));
        }
        USLI_TAKE(picked, x, false, (size_t)t->count * row);
        if (with_gradient) USLI_TAKE(dpicked, x, false, (size_t)t->count * row);
        USLI_TAKE(logits, x, false, (size_t)most * (size_t)m->config.vocab * usli_dtype_bytes(logits_dtype(m)));
        usli_gather_args g = { .rows = t->count,
                               .cols = m->config.hidden,
                               .x_rows = s->batch->tokens,
                               .dtype = m->dtype,
                               .index = t->index,
                               .x = hidden,
                               .y = picked,
                               .dy = dpicked,
                               .dx = hidden,
                               .ldx = s->ldn };
        USLI_TRY(usli_op_gather(x, &g, USLI_FORWARD));
        for (int64_t first = 0; first < t->count; first += most) {
            chunk c = { first,
                        t->count - first < most ? t->count - first : most,
                        (char *)picked + (size_t)first * row,
                        with_gradient ? (char *)dpicked + (size_t)first * row : NULL,
                        logits,
                        rows ? rows + first : NULL,
                        rows ? positions + first : NULL };
            USLI_TRY(usli_checkpoint(x->ctx));
            USLI_TRY(chunk_loss(s, t, update, &c, with_gradient));
        }
        if (with_gradient)
            USLI_TRY(usli_op_gather(x, &g, USLI_BACKWARD)); /* over the hidden states: nobody reads them again */
    }
    x->arena->high = mark;
    flops = x->matmul_flops;
    if (with_gradient && t->count) USLI_TRY(usli_graphs_backward(graphs, s, hidden));
    count_live(s, flops);
    s->balance.micros = 0;
    x->arena->high = high;
    x->arena->low = 0;
    return USL_OK;
}
