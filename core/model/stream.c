/* Layers whose weights do not fit on the device: they lie in pinned host memory and come, ahead of the work, through a
 * ring of two. Forward then backward is a mirror, so the last two need not come again. A block of Llama-3-70B in NF4 is
 * 0.46 GB, 9 ms at 50 GB/s; its products over 4096 tokens take 10 ms forward and 20 to 30 backward, so that the copies
 * hide. */
#include <string.h>

#include "core/model/model.h"

/* Streamed layers are spread evenly, so that the others' work hides their copies too. */
static bool is_streamed(const usl_model *m, int64_t streamed, int64_t layer) {
    return (layer + 1) * streamed / m->config.layers != layer * streamed / m->config.layers;
}

static int64_t number_of(const usl_model *m, int64_t streamed, int64_t layer) {
    return layer * streamed / m->config.layers;
}

/* The first layer whose number is not below. */
static int64_t layer_of(const usl_model *m, int64_t streamed, int64_t number) {
    return ((number + 1) * m->config.layers + streamed - 1) / streamed - 1;
}

static size_t largest(const usl_model *m, int64_t streamed) {
    size_t most = 0;
    for (int64_t l = 0; l < m->config.layers; l++)
        if (is_streamed(m, streamed, l) && m->places[l].bytes > most) most = m->places[l].bytes;
    return most;
}

int64_t usli_model_streamable(const usl_model *m) {
    return m->places && !m->full && !usli_model_sharers(m) ? m->config.layers : 0;
}

/* Wherever they are. */
static uint64_t placed_bytes(const usl_model *m) {
    uint64_t bytes = usli_model_weight_bytes(m);
    for (int64_t l = 0; m->places && l < m->config.layers; l++) bytes += m->places[l].room;
    return bytes;
}

uint64_t usli_model_device_bytes(const usl_model *m, int64_t streamed, bool host_embed) {
    uint64_t bytes = placed_bytes(m), embed = usli_base_weight(m, USLI_EMBED, 0)->storage->bytes;
    bool now = streamed < 0;
    if (m->host_embed || (!now && host_embed)) bytes -= embed;
    for (int64_t l = 0; m->places && l < m->config.layers; l++)
        if (now ? m->places[l].on_host : is_streamed(m, streamed, l)) bytes -= m->places[l].bytes;
    if (now) return bytes + (m->ring ? 2 * m->ring->half : 0);
    return bytes + (m->places ? 2 * largest(m, streamed) : 0);
}

uint64_t usli_model_host_bytes(const usl_model *m, int64_t streamed, bool host_embed) {
    uint64_t ring = m->places ? 2 * largest(m, streamed) : 0;
    return placed_bytes(m) + ring - usli_model_device_bytes(m, streamed, host_embed);
}

static void release(usl_model *m, char *at, bool on_host) {
    if (on_host)
        m->exec.backend->free_host(&m->exec, at);
    else
        m->exec.backend->free(&m->exec, at);
}

static usl_status move(usl_model *m, int64_t layer, bool to_host) {
    usli_exec *x = &m->exec;
    usli_place *p = &m->places[layer];
    if (p->on_host == to_host) return USL_OK;
    char *at = to_host ? x->backend->alloc_host(x, p->bytes) : x->backend->alloc(x, p->bytes);
    if (!at) return usli_refuse_place(m, layer, to_host);
    usl_status st = usli_model_fill_place(m, layer, at, to_host);
    if (st == USL_OK) st = x->backend->sync(x); /* nobody works with the old place any more */
    if (st != USL_OK) {
        release(m, at, to_host);
        return st;
    }
    release(m, p->at, p->on_host);
    p->at = at;
    p->on_host = to_host;
    m->placing++;
    usli_model_point(m, layer, at);
    return USL_OK;
}

static usl_status move_all(usl_model *m, int64_t streamed, bool to_host) {
    for (int64_t l = 0; l < m->config.layers; l++) {
        if (is_streamed(m, streamed, l) != to_host) continue;
        USLI_TRY(
            usli_progress(m->ctx, to_host ? "to host memory" : "to the GPU", (uint64_t)l, (uint64_t)m->config.layers));
        USLI_TRY(move(m, l, to_host));
    }
    return USL_OK;
}

static usl_status make_ring(usl_model *m, int64_t streamed) {
    usli_ring *r = usli_malloc(m->ctx, sizeof *r);
    if (!r) return usli_nomem(m->ctx, sizeof *r);
    *r = (usli_ring){ .streamed = streamed, .half = largest(m, streamed), .holds = { -1, -1 } };
    usl_status st = usli_device_alloc(&m->exec, 2 * r->half, &r->at);
    if (st != USL_OK) {
        usli_free(m->ctx, r);
        return st;
    }
    m->ring = r;
    m->placing++;
    for (int64_t l = 0; l < m->config.layers; l++)
        if (is_streamed(m, streamed, l))
            usli_model_point(m, l, r->at + (size_t)(number_of(m, streamed, l) % 2) * r->half);
    return USL_OK;
}

void usli_model_unstream(usl_model *m) {
    if (!m->ring) return;
    usli_device_free(&m->exec, m->ring->at); /* waits for what is under way */
    usli_free(m->ctx, m->ring);
    m->ring = NULL;
    m->placing++;
    for (int64_t l = 0; l < m->config.layers; l++) usli_model_point(m, l, m->places[l].at);
}

usl_status usli_model_stream(usl_model *m, int64_t streamed) {
    if (!m->places || usli_model_sharers(m) || (m->ring && m->ring->streamed == streamed)) return USL_OK;
    usli_model_unstream(m);
    USLI_TRY(move_all(m, streamed, true));
    if (streamed) USLI_TRY(make_ring(m, streamed));
    return move_all(m, streamed, false);
}

static usl_status bring(usli_exec *x, const usl_model *m, int64_t number) {
    usli_ring *r = m->ring;
    int half = (int)(number % 2);
    if (r->holds[half] == number) return USL_OK;
    const usli_place *p = &m->places[layer_of(m, r->streamed, number)];
    r->holds[half] = -1;
    USLI_TRY(x->backend->copy_beside(x, r->at + (size_t)half * r->half, p->at, p->bytes, USLI_WEIGHT_SLOT + half));
    r->holds[half] = number;
    return USL_OK;
}

usl_status usli_stream_layer(usli_exec *x, const usl_model *m, int64_t layer, int step) {
    const usli_ring *r = m->ring;
    if (!r || x->arena->dry || !is_streamed(m, r->streamed, layer)) return USL_OK;
    int64_t number = number_of(m, r->streamed, layer), next = number + step;
    USLI_TRY(bring(x, m, number));
    USLI_TRY(x->backend->await_copy(x, USLI_WEIGHT_SLOT + (int)(number % 2)));
    return next >= 0 && next < r->streamed ? bring(x, m, next) : USL_OK;
}
