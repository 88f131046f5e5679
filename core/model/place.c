/* Where weights are for the passes. On the CPU: where they were loaded or mapped. On a GPU: one block, in the order of
 * the slots, so that q, k, v and gate, up lie side by side. */
#include <string.h>

#include "core/base/dtype.h"
#include "core/model/model.h"
#include "core/ops/planned.h"

enum { ALIGN = 256, TABLE = 16, MAP = 256 };

static int64_t weight_count(const usl_model *m) {
    return m->weights ? m->config.layers * USLI_LAYER_SLOTS + (USLI_SLOTS - USLI_EMBED) : 0;
}

static size_t aligned(size_t n) {
    return (n + ALIGN - 1) & ~(size_t)(ALIGN - 1);
}

static const void *moved(const void *p, const usli_storage *s, const char *to) {
    return p ? to + ((const char *)p - (const char *)s->data) : NULL;
}

/* The two tables that every quantised weight of a model shares. */
static usl_status place_tables(usl_model *m, const usli_nf4 *q) {
    usli_exec *x = &m->exec;
    if (m->tables) return USL_OK;
    USLI_TRY(usli_device_alloc(x, (TABLE + MAP) * sizeof(float), &m->tables));
    USLI_TRY(x->backend->copy_in(x, m->tables, q->table, TABLE * sizeof(float)));
    return x->backend->copy_in(x, (float *)m->tables + TABLE, q->map, MAP * sizeof(float));
}

static usl_status place_one(usl_model *m, usli_weight *w, char *to) {
    usli_exec *x = &m->exec;
    const usli_storage *s = w->storage;
    USLI_TRY(x->backend->copy_in(x, to, s->data, s->bytes));
    w->d = w->m;
    w->d.data = moved(w->m.data, s, to);
    w->d.scale = moved(w->m.scale, s, to);
    if (!w->m.nf4) return USL_OK;
    USLI_TRY(place_tables(m, w->m.nf4));
    w->d_nf4 = *w->m.nf4;
    w->d_nf4.codes = moved(w->m.nf4->codes, s, to);
    w->d_nf4.absmax_q = moved(w->m.nf4->absmax_q, s, to);
    w->d_nf4.absmax2 = moved(w->m.nf4->absmax2, s, to);
    w->d_nf4.absmax = moved(w->m.nf4->absmax, s, to);
    w->d_nf4.table = m->tables;
    w->d_nf4.map = (const float *)m->tables + TABLE;
    w->d.nf4 = &w->d_nf4;
    return USL_OK;
}

usl_status usli_model_place(usl_model *m) {
    int64_t count = weight_count(m);
    if (m->exec.backend->host) {
        for (int64_t i = 0; i < count; i++) m->weights[i].d = m->weights[i].m;
        return USL_OK;
    }
    usli_weight *embed = usli_model_weight(m, USLI_EMBED, 0);
    size_t bytes = 0;
    for (int64_t i = 0; i < count; i++)
        if (m->weights[i].storage && &m->weights[i] != embed) bytes += aligned(m->weights[i].storage->bytes);
    USLI_TRY(usli_device_alloc(&m->exec, bytes, &m->placed));
    USLI_TRY(usli_device_alloc(&m->exec, embed->storage->bytes, &m->embed));
    USLI_TRY(place_one(m, embed, m->embed));
    m->placed_bytes = bytes + embed->storage->bytes;
    char *to = m->placed;
    for (int64_t i = 0; i < count; i++) {
        usli_weight *w = &m->weights[i];
        if (!w->storage || w == embed) continue;
        if (i % USLI_LAYER_SLOTS == 0) USLI_TRY(usli_progress(m->ctx, "to the GPU", (uint64_t)i, (uint64_t)count));
        USLI_TRY(place_one(m, w, to));
        to += aligned(w->storage->bytes);
    }
    return m->exec.backend->sync(&m->exec);
}

void usli_model_unplace(usl_model *m) {
    usli_device_free(&m->exec, m->placed);
    usli_device_free(&m->exec, m->tables);
    usli_device_free(&m->exec, m->embed);
    if (m->host_embed) m->exec.backend->free_host(&m->exec, m->host_embed);
    m->placed = m->tables = m->embed = m->host_embed = NULL;
}

size_t usli_model_embed_bytes(const usl_model *m) {
    const usli_weight *w = usli_model_weight(m, USLI_EMBED, 0);
    bool stays = m->exec.backend->host || m->full || m->config.tied || !m->embed || w->m.nf4;
    return stays ? 0 : w->storage->bytes;
}

usl_status usli_model_embed_to_host(usl_model *m) {
    size_t bytes = usli_model_embed_bytes(m);
    usli_weight *w = usli_model_weight(m, USLI_EMBED, 0);
    if (!bytes) return USL_OK;
    if (!(m->host_embed = m->exec.backend->alloc_host(&m->exec, bytes))) return usli_nomem(m->ctx, bytes);
    memcpy(m->host_embed, w->storage->data, bytes);
    w->d.data = m->host_embed;
    w->d.scale = moved(w->m.scale, w->storage, m->host_embed);
    usli_device_free(&m->exec, m->embed);
    m->embed = NULL;
    m->placing++;
    m->placed_bytes -= bytes;
    return USL_OK;
}

size_t usli_model_host_bytes(const usl_model *m) {
    return m->host_embed ? usli_model_weight(m, USLI_EMBED, 0)->storage->bytes : 0;
}

usl_status usli_model_check_weights(const usl_model *m) {
    return m->plan_only ? usli_refuse_planned(m->ctx) : USL_OK;
}

usl_status usli_model_pull(usl_model *m) {
    USLI_TRY(usli_model_check_weights(m));
    if (!m->device_newer) return USL_OK;
    int64_t count = m->full ? weight_count(m) : 0;
    for (int64_t i = 0; i < count; i++) {
        usli_weight *w = &m->weights[i];
        if (w->storage && w->d.data != w->m.data)
            USLI_TRY(m->exec.backend->copy_out(&m->exec, w->storage->data, w->d.data, w->storage->bytes));
    }
    if (m->active) USLI_TRY(usli_twin_pull(&m->exec, &m->active->twin));
    m->device_newer = false;
    return USL_OK;
}

/* ---- Decoded copies ------------------------------------------------------------------------------------------------
 */

static size_t decoded_bytes(const usl_model *m, usli_slot slot) {
    const usli_weight *w = usli_model_weight(m, slot, 0);
    if (m->full || m->exec.backend->host || w->m.dtype == m->dtype) return 0;
    return aligned((size_t)(w->m.rows * w->m.cols) * usli_dtype_bytes(m->dtype));
}

size_t usli_model_cache_bytes(const usl_model *m) {
    size_t bytes = 0;
    for (int s = 0; s < USLI_LINEARS; s++) bytes += decoded_bytes(m, (usli_slot)s);
    return bytes;
}

void usli_model_set_cache(usl_model *m, void *base, int64_t layers) {
    char *at = base;
    m->placing++;
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++) {
            usli_weight *w = usli_model_weight(m, (usli_slot)s, l);
            size_t bytes = decoded_bytes(m, (usli_slot)s);
            bool there = base && l < layers && bytes;
            w->d.cached = there ? at : NULL;
            if (there) at += bytes;
        }
}

usl_status usli_model_fill_cache(usl_model *m) {
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++) {
            usli_weight *w = usli_model_weight(m, (usli_slot)s, l);
            usli_cast_args a = { .src = w->d, .dtype = m->dtype, .dst = (void *)(uintptr_t)w->d.cached };
            usli_arena none;
            usli_exec x = m->exec;
            usli_arena_init(&none, NULL, 0);
            x.arena = &none;
            if (w->d.cached) USLI_TRY(usli_op_cast(&x, &a, USLI_FORWARD));
        }
    return USL_OK;
}
