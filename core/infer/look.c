#include "core/infer/look.h"

#include <math.h>

#include "core/base/dtype.h"

static usl_status check_count(usl_model *m, int64_t count) {
    if (count >= 1 && count <= m->context) return USL_OK;
    return usli_fail(m->ctx, USL_ERR_INVALID, "%lld tokens: from 1 to max_seq_length %lld are wanted", (long long)count,
                     (long long)m->context);
}

/* ---- Hidden states ---- */

typedef struct states {
    const usl_model *m;
    int64_t count;
    void *stream, *branch; /* on the host, as they come */
    float *sum, *out;
} states;

/* Copies `n` numbers from the device to host and decodes them into dst. */
static usl_status fetch(usli_exec *x, const void *src, usl_dtype dtype, int64_t n, void *host, float *dst) {
    USLI_TRY(x->backend->copy_out(x, host, src, (size_t)n * usli_dtype_bytes(dtype)));
    usli_to_f32(host, dtype, dst, n);
    return USL_OK;
}

static usl_status take_stream(void *ud, usli_exec *x, int64_t layer, const void *stream, const void *branch) {
    states *s = ud;
    int64_t n = s->count * s->m->config.hidden;
    float *dst = s->out + layer * n;
    if (x->arena->dry) return USL_OK;
    USLI_TRY(fetch(x, stream, s->m->res_dtype, n, s->stream, dst));
    if (!branch) return USL_OK;
    USLI_TRY(fetch(x, branch, s->m->dtype, n, s->stream, s->sum));
    for (int64_t i = 0; i < n; i++) dst[i] += s->sum[i];
    return USL_OK;
}

static usl_status states_pass(void *ud, usli_exec *x, const usl_model *m, const usli_batch *b) {
    states *s = ud;
    const usli_probe probe = { .stream_fn = take_stream, .ud = s };
    void *hidden;
    USLI_TRY(usli_pass_probe(x, m, b, &probe, &hidden));
    int64_t n = s->count * m->config.hidden;
    return x->arena->dry ? USL_OK : fetch(x, hidden, m->dtype, n, s->stream, s->out + m->config.layers * n);
}

usl_status usli_hidden_states(usl_model *m, const int32_t *ids, int64_t count, float *out) {
    USLI_TRY(check_count(m, count));
    states s = { .m = m, .count = count, .out = out };
    size_t n = (size_t)count * (size_t)m->config.hidden;
    s.stream = usli_malloc(m->ctx, n * sizeof(float));
    s.sum = usli_malloc(m->ctx, n * sizeof(float));
    usl_status st =
        s.stream && s.sum ? usli_run_row(m, ids, count, states_pass, &s) : usli_nomem(m->ctx, n * sizeof(float));
    usli_free(m->ctx, s.stream);
    usli_free(m->ctx, s.sum);
    return st;
}

/* ---- Attention ---- */

typedef struct looks {
    const usl_model *m;
    int64_t count, layer, width;
    void *host;
    float *qkv, *out;
} looks;

static usl_status take_qkv(void *ud, usli_exec *x, int64_t layer, const void *qkv) {
    looks *s = ud;
    if (x->arena->dry || layer != s->layer) return USL_OK;
    return fetch(x, qkv, s->m->dtype, s->count * s->width, s->host, s->qkv);
}

static usl_status looks_pass(void *ud, usli_exec *x, const usl_model *m, const usli_batch *b) {
    const usli_probe probe = { .qkv_fn = take_qkv, .ud = ud };
    void *hidden;
    return usli_pass_probe(x, m, b, &probe, &hidden);
}

static double score(const usli_config *c, const float *q, const float *k) {
    double dot = 0, cap = c->attention_softcap;
    for (int64_t i = 0; i < c->head_dim; i++) dot += (double)q[i] * k[i];
    dot /= sqrt(c->query_scalar);
    return cap > 0 ? cap * tanh(dot / cap) : dot;
}

/* One line: the softmax over the keys that query i sees; the others stay 0. */
static void attend(const looks *s, int64_t head, int64_t i, float *line) {
    const usli_config *c = &s->m->config;
    int64_t kv = head / (c->heads / c->kv_heads), first = 0;
    const float *q = s->qkv + i * s->width + head * c->head_dim;
    if (usli_layer_windowed(c, s->layer) && i - c->window + 1 > 0) first = i - c->window + 1;
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < s->count; j++) line[j] = 0;
    for (int64_t j = first; j <= i; j++) {
        double z = score(c, q, s->qkv + j * s->width + (c->heads + kv) * c->head_dim);
        line[j] = (float)z;
        if (z > most) most = z;
    }
    for (int64_t j = first; j <= i; j++) sum += exp(line[j] - most);
    for (int64_t j = first; j <= i; j++) line[j] = (float)(exp(line[j] - most) / sum);
}

usl_status usli_attentions(usl_model *m, const int32_t *ids, int64_t count, int64_t layer, float *out) {
    const usli_config *c = &m->config;
    if (layer < 0 || layer >= c->layers)
        return usli_fail(m->ctx, USL_ERR_INVALID, "there is no layer %lld: they count from 0 to %lld", (long long)layer,
                         (long long)c->layers - 1);
    USLI_TRY(check_count(m, count));
    looks s = {
        .m = m, .count = count, .layer = layer, .width = (c->heads + 2 * c->kv_heads) * c->head_dim, .out = out
    };
    size_t bytes = (size_t)count * (size_t)s.width * sizeof(float);
    s.host = usli_malloc(m->ctx, bytes);
    s.qkv = usli_malloc(m->ctx, bytes);
    usl_status st = s.host && s.qkv ? usli_run_row(m, ids, count, looks_pass, &s) : usli_nomem(m->ctx, bytes);
    for (int64_t h = 0; st == USL_OK && h < c->heads; h++)
        for (int64_t i = 0; i < count; i++) attend(&s, h, i, out + (h * count + i) * count);
    usli_free(m->ctx, s.host);
    usli_free(m->ctx, s.qkv);
    return st;
}

/* ---- The head, for any hidden state ---- */

static usl_status unembed_pass(usli_exec *x, const usl_model *m, const float *stream, int64_t rows, float *out) {
    size_t n = (size_t)rows * (size_t)m->config.hidden;
    void *in, *normed;
    float *logits;
    USLI_TAKE(in, x, false, n * sizeof(float));
    USLI_TAKE(normed, x, false, n * usli_dtype_bytes(m->dtype));
    USLI_TAKE(logits, x, false, (size_t)rows * (size_t)m->config.vocab * sizeof(float));
    if (!x->arena->dry) USLI_TRY(x->backend->copy_in(x, in, stream, n * sizeof(float)));
    USLI_TRY(usli_pass_final_norm(x, m, rows, in, normed));
    USLI_TRY(usli_pass_logits(x, m, normed, rows, logits));
    if (x->arena->dry) return USL_OK;
    return x->backend->copy_out(x, out, logits, (size_t)rows * (size_t)m->config.vocab * sizeof(float));
}

usl_status usli_unembed(usl_model *m, const float *stream, int64_t rows, float *out) {
    usli_arena arena;
    usli_exec x = m->exec;
    void *base = NULL;
    USLI_TRY(usli_model_check_weights(m));
    x.arena = &arena;
    usli_arena_init_dry(&arena);
    USLI_TRY(unembed_pass(&x, m, stream, rows, out));
    size_t bytes = arena.peak;
    USLI_TRY(usli_device_alloc(&x, bytes, &base));
    usli_arena_init(&arena, base, bytes);
    usl_status st = unembed_pass(&x, m, stream, rows, out);
    usli_device_free(&x, base);
    return st;
}
