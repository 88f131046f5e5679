#include "core/model/pass.h"

#include <math.h>

#include "core/base/dtype.h"
#include "core/model/block.h"
#include "core/model/block_parts.h"

static size_t stream_bytes(const usl_model *m, int64_t tokens) {
    return (size_t)tokens * (size_t)m->config.hidden * usli_dtype_bytes(m->res_dtype);
}

size_t usli_pass_input_bytes(const usl_model *m, int64_t tokens) {
    return (stream_bytes(m, tokens) + 63) & ~(size_t)63;
}

/* Inputs of recomputed blocks travel to host memory behind the work and come back ahead of it. Two of them are on the
 * device at a time: a slot is written again only when its copy is done. */
static usl_status send_input(const usli_pass_state *s, int64_t layer) {
    usli_exec *x = s->exec;
    size_t bytes = usli_pass_input_bytes(s->model, s->batch->tokens);
    if (x->arena->dry || !s->inputs) return USL_OK;
    return x->backend->copy_beside(x, s->inputs + (size_t)layer * bytes, s->ring[layer % 2], bytes,
                                   USLI_INPUT_SLOT + (int)(layer % 2));
}

/* The last two are still there when the way back begins. */
static usl_status fetch_input(const usli_pass_state *s, int64_t layer) {
    usli_exec *x = s->exec;
    size_t bytes = usli_pass_input_bytes(s->model, s->batch->tokens);
    if (x->arena->dry || !s->inputs || layer < 0 || layer >= s->recomputed - 2) return USL_OK;
    return x->backend->copy_beside(x, s->ring[layer % 2], s->inputs + (size_t)layer * bytes, bytes,
                                   USLI_INPUT_SLOT + (int)(layer % 2));
}

static usl_status await_input(const usli_pass_state *s, int64_t layer) {
    usli_exec *x = s->exec;
    return x->arena->dry || !s->inputs ? USL_OK : x->backend->await_copy(x, USLI_INPUT_SLOT + (int)(layer % 2));
}

static size_t hidden_bytes(const usl_model *m, int64_t tokens) {
    return (size_t)tokens * (size_t)m->config.hidden * usli_dtype_bytes(m->dtype);
}

/* Rounded as transformers does, whose factor has the weights' type. */
static float embedding_scale(const usl_model *m) {
    if (!m->config.arch->scaled_embedding) return 1;
    float scale = sqrtf((float)m->config.hidden);
    char rounded[sizeof(float)];
    usli_from_f32(&scale, rounded, m->dtype, 1);
    usli_to_f32(rounded, m->dtype, &scale, 1);
    return scale;
}

usli_lora usli_pass_lora(const usl_model *m, const usli_lora_module *l) {
    const usli_twin *twin = &m->active->twin;
    if (!l->rank) return (usli_lora){ 0 };
    return (usli_lora){ .rank = l->rank,
                        .scale = l->scale,
                        .a = usli_twin_at(twin, l->a),
                        .b = usli_twin_at(twin, l->b),
                        .da = l->da,
                        .db = l->db,
                        .magnitude = l->magnitude ? usli_twin_at(twin, l->magnitude) : NULL,
                        .norm = l->norm,
                        .dmagnitude = l->dmagnitude };
}

usli_segment usli_pass_head(const usl_model *m) {
    const usli_weight *w = usli_model_head(m);
    usli_segment head = { .w = w->d, .dw = w->grad };
    if (m->active) head.lora = usli_pass_lora(m, usli_adapter_module(m, m->active, USLI_HEAD, 0));
    return head;
}

bool usli_pass_head_drops(const usl_model *m) {
    return m->active && m->active->dropout > 0 && usli_adapter_module(m, m->active, USLI_HEAD, 0)->rank;
}

/* The norms that DoRA divides by stand as long as what is trained does not change. */
static usl_status make_norm(usli_exec *x, const usl_model *m, usli_slot slot, int64_t layer) {
    const usli_lora_module *l = usli_adapter_module(m, m->active, slot, layer);
    if (!l->magnitude) return USL_OK;
    const usli_weight *w = slot == USLI_HEAD ? usli_model_head(m) : usli_model_weight(m, slot, layer);
    usli_dora_args a = { .w = w->d, .lora = usli_pass_lora(m, l), .norm = l->norm };
    return usli_op_dora(x, &a, USLI_FORWARD);
}

/* Of a layer whose weights are there. */
static usl_status make_norms(usli_exec *x, const usl_model *m, int64_t layer) {
    for (int s = 0; usli_model_norms_stale(m) && s < USLI_LINEARS; s++) USLI_TRY(make_norm(x, m, (usli_slot)s, layer));
    return USL_OK;
}

/* Once all layers have theirs. */
static usl_status end_norms(usli_exec *x, const usl_model *m) {
    if (!usli_model_norms_stale(m)) return USL_OK;
    USLI_TRY(make_norm(x, m, USLI_HEAD, 0));
    m->active->norms_fresh = !x->arena->dry;
    return USL_OK;
}

usl_status usli_pass_norms(usli_exec *x, const usl_model *m) {
    for (int64_t l = 0; l < m->config.layers; l++) USLI_TRY(make_norms(x, m, l));
    return end_norms(x, m);
}

static usl_status embed(usli_exec *x, const usl_model *m, const usli_batch *b, void *out) {
    const usli_weight *w = usli_model_weight(m, USLI_EMBED, 0);
    usli_embedding_args a = { .tokens = b->tokens,
                              .cols = m->config.hidden,
                              .dtype = m->res_dtype,
                              .table = w->d,
                              .scale = embedding_scale(m),
                              .ids = b->ids,
                              .y = out };
    if (m->active) a.lora = usli_pass_lora(m, usli_adapter_module(m, m->active, USLI_EMBED, 0));
    return usli_op_embedding(x, &a, USLI_FORWARD);
}

static usli_rmsnorm_args final_norm(const usl_model *m, int64_t tokens) {
    const usli_weight *w = usli_model_weight(m, USLI_FINAL_NORM, 0);
    return (usli_rmsnorm_args){ .rows = tokens,
                                .cols = m->config.hidden,
                                .eps = (float)m->config.norm_eps,
                                .weight_offset = m->config.arch->norm_offset,
                                .dtype = m->dtype,
                                .res_dtype = m->res_dtype,
                                .n_dtype = m->res_dtype,
                                .weight_dtype = USL_F32,
                                .weight = w->d.data,
                                .dweight = w->grad };
}

usl_status usli_pass_forward(usli_pass_state *s, void **hidden) {
    const usl_model *m = s->model;
    usli_exec *x = s->exec;
    int64_t t = s->batch->tokens, layers = m->config.layers;
    s->training = true;
    s->again = false;
    s->ldn = usli_gradient_stride(s);
    USLI_TAKE(s->x, x, true, hidden_bytes(m, t));
    USLI_TAKE(*hidden, x, false, (size_t)(t * s->ldn) * usli_dtype_bytes(m->dtype));
    size_t mark = x->arena->high;
    const void *res = NULL;
    void *stream = NULL; /* n2 of blocks that keep nothing */
    if (s->recomputed) USLI_TAKE(stream, x, false, stream_bytes(m, t));
    for (int i = 0; s->inputs && i < 2; i++) USLI_TAKE(s->ring[i], x, true, usli_pass_input_bytes(m, t));
    size_t inner = x->arena->high;
    for (int64_t l = 0; l < layers; l++) {
        USLI_TRY(usli_checkpoint(x->ctx));
        bool keep = l >= s->recomputed;
        usli_block_saved *b = &s->blocks[l];
        *b = (usli_block_saved){ .n2 = stream, .low = x->arena->low };
        bool sent = !keep && s->inputs;
        if (sent) {
            b->n1 = s->ring[l % 2];
            USLI_TRY(await_input(s, l));
        } else {
            USLI_TAKE(b->n1, x, true, stream_bytes(m, t));
        }
        if (keep) USLI_TAKE(b->n2, x, true, stream_bytes(m, t));
        if (l == 0) USLI_TRY(embed(x, m, s->batch, b->n1));
        USLI_TRY(usli_stream_layer(x, m, l, 1));
        USLI_TRY(make_norms(x, m, l));
        USLI_TRY(usli_block_forward(s, l, NULL, l ? res : b->n1, l ? s->x : NULL, keep, b));
        if (sent) USLI_TRY(send_input(s, l));
        x->arena->high = inner;
        res = b->n2;
    }
    USLI_TRY(end_norms(x, m));
    USLI_TAKE(s->final_n, x, true, stream_bytes(m, t));
    USLI_TAKE(s->final_rstd, x, true, (size_t)t * sizeof(float));
    usli_rmsnorm_args norm = final_norm(m, t);
    norm.res = res;
    norm.x = s->x;
    norm.res_out = s->final_n;
    norm.y = *hidden;
    norm.ldy = s->ldn;
    norm.rstd = s->final_rstd;
    USLI_TRY(usli_op_rmsnorm(x, &norm, USLI_FORWARD));
    x->arena->high = mark;
    return USL_OK;
}

/* The lowest block with anything to train: gradients go no further down than they must. */
static int64_t lowest_trained(const usl_model *m) {
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LAYER_SLOTS; s++) {
            if (usli_model_weight(m, (usli_slot)s, l)->grad) return l;
            if (s < USLI_LINEARS && m->active && usli_adapter_module(m, m->active, (usli_slot)s, l)->da) return l;
        }
    return m->config.layers;
}

static bool trains_embedding(const usl_model *m) {
    return usli_model_weight(m, USLI_EMBED, 0)->grad ||
           (m->active && usli_adapter_module(m, m->active, USLI_EMBED, 0)->da);
}

usl_status usli_pass_backward(usli_pass_state *s, void *dhidden) {
    const usl_model *m = s->model;
    usli_exec *x = s->exec;
    int64_t t = s->batch->tokens;
    bool dembed = trains_embedding(m);
    s->again = true;
    int64_t lowest = dembed ? 0 : lowest_trained(m);
    size_t mark = x->arena->high;
    void *dn = dhidden;
    if (m->res_dtype != m->dtype) USLI_TAKE(dn, x, false, (size_t)(t * s->ldn) * usli_dtype_bytes(m->res_dtype));
    usli_rmsnorm_args norm = final_norm(m, t);
    norm.n = s->final_n;
    norm.rstd = s->final_rstd;
    norm.dy = dhidden;
    norm.dn = dn;
    norm.lddy = norm.lddn = s->ldn;
    USLI_TRY(usli_op_rmsnorm(x, &norm, USLI_BACKWARD));
    for (int64_t l = m->config.layers - 1; l >= lowest; l--) {
        USLI_TRY(usli_checkpoint(x->ctx));
        usli_block_saved *b = &s->blocks[l];
        bool wants_input = l > lowest || dembed;
        USLI_TRY(usli_stream_layer(x, m, l, -1));
        if (l >= s->recomputed) {
            USLI_TRY(usli_block_backward(s, l, b, dn, wants_input));
            continue;
        }
        *b = (usli_block_saved){ .n1 = b->n1, .low = b->low };
        x->arena->low =
            b->low + (s->inputs ? 0 : usli_pass_input_bytes(m, t)); /* what later blocks kept is done with */
        USLI_TRY(await_input(s, l));
        USLI_TRY(fetch_input(s, l - 1));
        USLI_TRY(usli_block_again(s, l, b, dn, wants_input));
    }
    if (dembed) {
        const usli_weight *w = usli_model_weight(m, USLI_EMBED, 0);
        usli_embedding_args a = { .tokens = t,
                                  .cols = m->config.hidden,
                                  .dtype = m->res_dtype,
                                  .table = w->d,
                                  .scale = embedding_scale(m),
                                  .ids = s->batch->ids,
                                  .dy = dn,
                                  .lddy = s->ldn,
                                  .dtable = w->grad };
        if (m->active) a.lora = usli_pass_lora(m, usli_adapter_module(m, m->active, USLI_EMBED, 0));
        USLI_TRY(usli_op_embedding(x, &a, USLI_BACKWARD));
    }
    x->arena->high = mark;
    x->arena->low = s->blocks[0].low;
    return USL_OK;
}

static usl_status infer(usli_exec *x, const usl_model *m, const usli_batch *batch, const usli_cache *cache,
                        const usli_probe *probe, void **hidden) {
    usli_pass_state s = { .model = m, .batch = batch, .exec = x };
    int64_t t = batch->tokens;
    void *stream;
    USLI_TAKE(*hidden, x, false, hidden_bytes(m, t));
    size_t mark = x->arena->high;
    USLI_TAKE(s.x, x, false, hidden_bytes(m, t));
    USLI_TAKE(stream, x, false, stream_bytes(m, t));
    USLI_TRY(embed(x, m, batch, stream));
    size_t inner = x->arena->high;
    for (int64_t l = 0; l < m->config.layers; l++) {
        USLI_TRY(usli_checkpoint(x->ctx));
        usli_block_saved b = { .n1 = stream, .n2 = stream };
        USLI_TRY(usli_stream_layer(x, m, l, 1));
        USLI_TRY(make_norms(x, m, l));
        if (probe && probe->stream_fn) USLI_TRY(probe->stream_fn(probe->ud, x, l, stream, l ? s.x : NULL));
        USLI_TRY(usli_block_forward(&s, l, cache, stream, l ? s.x : NULL, false, &b));
        if (probe && probe->qkv_fn) USLI_TRY(probe->qkv_fn(probe->ud, x, l, b.qkv));
        x->arena->high = inner;
    }
    USLI_TRY(end_norms(x, m));
    usli_rmsnorm_args norm = final_norm(m, t);
    norm.res = stream;
    norm.x = s.x;
    norm.res_out = stream;
    norm.y = *hidden;
    USLI_TRY(usli_op_rmsnorm(x, &norm, USLI_FORWARD));
    x->arena->high = mark;
    return USL_OK;
}

usl_status usli_pass_infer(usli_exec *x, const usl_model *m, const usli_batch *batch, const usli_cache *cache,
                           void **hidden) {
    return infer(x, m, batch, cache, NULL, hidden);
}

usl_status usli_pass_probe(usli_exec *x, const usl_model *m, const usli_batch *batch, const usli_probe *probe,
                           void **hidden) {
    return infer(x, m, batch, NULL, probe, hidden);
}

usl_status usli_pass_final_norm(usli_exec *x, const usl_model *m, int64_t rows, const float *stream, void *normed) {
    usli_rmsnorm_args norm = final_norm(m, rows);
    norm.res_dtype = norm.n_dtype = USL_F32;
    norm.res = stream;
    norm.y = normed;
    return usli_op_rmsnorm(x, &norm, USLI_FORWARD);
}

usl_status usli_pass_logits(usli_exec *x, const usl_model *m, const void *hidden, int64_t rows, float *logits) {
    usli_segment head = usli_pass_head(m);
    usli_linear_args a = { .tokens = rows,
                           .in = m->config.hidden,
                           .out = m->config.vocab,
                           .segments = 1,
                           .segment = &head,
                           .dtype = m->dtype,
                           .y_dtype = USL_F32,
                           .x = hidden,
                           .y = logits };
    USLI_TRY(usli_op_linear(x, &a, USLI_FORWARD));
    usli_softcap_args cap = { .n = rows * m->config.vocab, .softcap = (float)m->config.logit_softcap, .z = logits };
    return cap.softcap > 0 ? usli_op_softcap(x, &cap, USLI_FORWARD) : USL_OK;
}
