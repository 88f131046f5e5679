/* Where weights are for the passes. On the CPU: where they were loaded or mapped. On a GPU: a block a layer, which may
 * be host memory that the GPU reads by itself where the device is too small. */
#include <string.h>

#include "core/base/dtype.h"
#include "core/model/block_parts.h"
#include "core/ops/planned.h"

enum { ALIGN = 256, TABLE = 16, MAP = 256 };
/* Where the tables of quantised weights stand, in floats: NF4's, FP4's, the map of double quantisation. */
enum { NF4_AT = 0, FP4_AT = TABLE, MAP_AT = 2 * TABLE, TABLES = 2 * TABLE + MAP };

static int64_t weight_count(const usl_model *m) {
    return m->weights ? m->config.layers * USLI_LAYER_SLOTS + (USLI_SLOTS - USLI_EMBED) : 0;
}

static size_t aligned(size_t n) {
    return (n + ALIGN - 1) & ~(size_t)(ALIGN - 1);
}

static const void *moved(const void *p, const usli_storage *s, const char *to) {
    return p ? to + ((const char *)p - (const char *)s->data) : NULL;
}

/* The tables that all quantised weights of a model share. */
static usl_status place_tables(usl_model *m) {
    usli_exec *x = &m->exec;
    if (m->tables) return USL_OK;
    USLI_TRY(usli_device_alloc(x, TABLES * sizeof(float), &m->tables));
    float *at = m->tables;
    USLI_TRY(x->backend->copy_in(x, at + NF4_AT, usli_nf4_table, TABLE * sizeof *at));
    USLI_TRY(x->backend->copy_in(x, at + FP4_AT, usli_fp4_table, TABLE * sizeof *at));
    return x->backend->copy_in(x, at + MAP_AT, usli_dynamic_map, MAP * sizeof *at);
}

/* Passes find w where a copy of its storage is. */
static void point(usl_model *m, usli_weight *w, const char *to) {
    const usli_storage *s = w->storage;
    const void *cached = w->d.cached;
    int64_t cached_ld = w->d.cached_ld;
    w->d = w->m;
    w->d.data = moved(w->m.data, s, to);
    w->d.scale = moved(w->m.scale, s, to);
    w->d.cached = cached;
    w->d.cached_ld = cached_ld;
    if (!w->m.nf4) return;
    w->d_nf4 = *w->m.nf4;
    w->d_nf4.codes = moved(w->m.nf4->codes, s, to);
    w->d_nf4.absmax_q = moved(w->m.nf4->absmax_q, s, to);
    w->d_nf4.absmax2 = moved(w->m.nf4->absmax2, s, to);
    w->d_nf4.absmax = moved(w->m.nf4->absmax, s, to);
    w->d_nf4.table = (const float *)m->tables + (w->m.nf4->table == usli_fp4_table ? FP4_AT : NF4_AT);
    w->d_nf4.map = (const float *)m->tables + MAP_AT;
    w->d.nf4 = &w->d_nf4;
}

/* Matrices that products take where they lie have room for adapters beside them, and behind the last of a group, so
 * that base and adapters are one product: a fiftieth more memory. `last`: it is that one. */
static int64_t room_of(const usl_model *m, usli_slot slot, int64_t layer, bool *last) {
    usli_slot group[4];
    int kind = 0, count = 0, i = 0;
    for (; slot < USLI_LINEARS && kind < USLI_GROUP_KINDS && i == count; kind++) {
        count = usli_group_slots(m, layer, (usli_group_kind)kind, group);
        for (i = 0; i < count && group[i] != slot;) i++;
    }
    if (i == count || m->full) return 0;
    *last = i == count - 1;
    for (i = 0; i < count; i++) {
        const usli_weight *w = usli_base_weight(m, group[i], layer);
        if (w->m.dtype != m->dtype || w->m.data != w->storage->data || w->m.cols % 16) return 0;
    }
    return usli_group_room(m, USLI_MOST_RANKS);
}

/* Of a weight where it is placed. */
static size_t place_bytes(const usl_model *m, usli_slot slot, int64_t layer) {
    const usli_weight *w = usli_base_weight(m, slot, layer);
    bool last = false;
    int64_t room = room_of(m, slot, layer, &last), ld = w->m.cols + room;
    if (!room) return aligned(w->storage->bytes);
    size_t bytes = (size_t)(w->m.rows * ld) * usli_dtype_bytes(m->dtype);
    return last ? aligned(bytes + (size_t)(room * ld) * usli_dtype_bytes(m->dtype)) : bytes;
}

static usl_status fill(usl_model *m, const usli_weight *w, char *to, bool on_host) {
    if (w->m.nf4) USLI_TRY(place_tables(m));
    if (!on_host) return m->exec.backend->copy_in(&m->exec, to, w->storage->data, w->storage->bytes);
    if (!m->plan_only) memcpy(to, w->storage->data, w->storage->bytes);
    return USL_OK;
}

/* The same, rows ld apart: on the device by way of scratch. */
static usl_status fill_rows(usl_model *m, const usli_weight *w, int64_t ld, char *to, bool on_host, void *scratch) {
    size_t e = usli_dtype_bytes(m->dtype), row = (size_t)w->m.cols * e;
    const char *from = w->storage->data;
    if (on_host) {
        for (int64_t r = 0; r < w->m.rows && !m->plan_only; r++)
            memcpy(to + (size_t)(r * ld) * e, from + (size_t)r * row, row);
        return USL_OK;
    }
    USLI_TRY(m->exec.backend->copy_in(&m->exec, scratch, from, w->storage->bytes));
    usli_cast_args a = { .src = w->m, .dtype = m->dtype, .dst = to, .ld = ld };
    usli_arena none;
    usli_exec x = m->exec;
    a.src.data = scratch;
    usli_arena_init(&none, NULL, 0);
    x.arena = &none;
    return m->plan_only ? USL_OK : usli_op_cast(&x, &a, USLI_FORWARD);
}

void usli_model_point(usl_model *m, int64_t layer, const char *at) {
    for (int s = 0; s < USLI_LAYER_SLOTS; s++) {
        usli_weight *w = usli_base_weight(m, (usli_slot)s, layer);
        bool last;
        if (!w->storage) continue;
        point(m, w, at);
        int64_t room = room_of(m, (usli_slot)s, layer, &last);
        if (room) w->d.ld = w->m.cols + room;
        at += place_bytes(m, (usli_slot)s, layer);
    }
}

usl_status usli_model_fill_place(usl_model *m, int64_t layer, char *at, bool on_host) {
    size_t most = 0;
    void *scratch = NULL;
    bool last;
    for (int s = 0; s < USLI_LAYER_SLOTS && !on_host; s++) {
        const usli_weight *w = usli_base_weight(m, (usli_slot)s, layer);
        if (w->storage && room_of(m, (usli_slot)s, layer, &last) && w->storage->bytes > most) most = w->storage->bytes;
    }
    USLI_TRY(usli_device_alloc(&m->exec, most, &scratch));
    usl_status st = USL_OK;
    for (int s = 0; s < USLI_LAYER_SLOTS && st == USL_OK; s++) {
        const usli_weight *w = usli_base_weight(m, (usli_slot)s, layer);
        if (!w->storage) continue;
        int64_t room = room_of(m, (usli_slot)s, layer, &last);
        st = room ? fill_rows(m, w, w->m.cols + room, at, on_host, scratch) : fill(m, w, at, on_host);
        at += place_bytes(m, (usli_slot)s, layer);
    }
    usli_device_free(&m->exec, scratch); /* waits for what is under way */
    return st;
}

usl_status usli_refuse_place(const usl_model *m, int64_t layer, bool on_host) {
    const char *what = on_host
                           ? "%.3g GiB of host memory for the weights of layer %lld, which do not fit the GPU, could "
                             "not be pinned; free some memory or take a smaller model"
                           : "the GPU has no %.3g GiB for the weights of layer %lld; take a smaller model, or load it "
                             "in 4 bits";
    return usli_fail(m->ctx, USL_ERR_NOMEM, what, (double)m->places[layer].bytes / (1 << 30), (long long)layer + 1);
}

/* What a device that is too small for all weights keeps free of them, for the work itself: one part of so many. */
enum { KEPT_FREE = 8 };

/* A layer goes to host memory when the device has no room for it; not when it is trained. */
static usl_status place_layer(usl_model *m, int64_t layer, size_t *room) {
    usli_exec *x = &m->exec;
    usli_place *p = &m->places[layer];
    for (int s = 0; s < USLI_LAYER_SLOTS; s++) {
        const usli_weight *w = usli_base_weight(m, (usli_slot)s, layer);
        if (!w->storage) continue;
        p->bytes += place_bytes(m, (usli_slot)s, layer);
        p->room += place_bytes(m, (usli_slot)s, layer) - aligned(w->storage->bytes);
    }
    if (m->full || p->bytes <= *room) p->at = x->backend->alloc(x, p->bytes);
    if (p->at) {
        *room -= p->bytes < *room ? p->bytes : *room;
    } else {
        p->on_host = !m->full;
        if (p->on_host) p->at = x->backend->alloc_host(x, p->bytes);
        if (!p->at) return usli_refuse_place(m, layer, p->on_host);
    }
    USLI_TRY(usli_model_fill_place(m, layer, p->at, p->on_host));
    usli_model_point(m, layer, p->at);
    return USL_OK;
}

static usl_status place_ends(usl_model *m) {
    usli_weight *embed = usli_base_weight(m, USLI_EMBED, 0);
    size_t bytes = 0;
    for (int s = USLI_FINAL_NORM; s < USLI_SLOTS; s++) {
        const usli_weight *w = usli_base_weight(m, (usli_slot)s, 0);
        if (w->storage) bytes += aligned(w->storage->bytes);
    }
    USLI_TRY(usli_device_alloc(&m->exec, bytes, &m->placed));
    USLI_TRY(usli_device_alloc(&m->exec, embed->storage->bytes, &m->embed));
    USLI_TRY(fill(m, embed, m->embed, false));
    point(m, embed, m->embed);
    char *to = m->placed;
    for (int s = USLI_FINAL_NORM; s < USLI_SLOTS; s++) {
        usli_weight *w = usli_base_weight(m, (usli_slot)s, 0);
        if (!w->storage) continue;
        USLI_TRY(fill(m, w, to, false));
        point(m, w, to);
        to += aligned(w->storage->bytes);
    }
    return USL_OK;
}

static usl_status place(usl_model *m) {
    usli_exec *x = &m->exec;
    int64_t layers = m->config.layers;
    if (!(m->places = usli_calloc(m->ctx, (size_t)layers, sizeof *m->places)))
        return usli_nomem(m->ctx, (size_t)layers * sizeof *m->places);
    USLI_TRY(place_ends(m));
    size_t used = 0, total = 0;
    USLI_TRY(x->backend->memory(x, &used, &total));
    size_t kept = total / KEPT_FREE, room = m->plan_only ? SIZE_MAX : total > used + kept ? total - used - kept : 0;
    for (int64_t l = 0; l < layers; l++) {
        USLI_TRY(usli_progress(m->ctx, "to the GPU", (uint64_t)l, (uint64_t)layers));
        USLI_TRY(place_layer(m, l, &room));
    }
    return x->backend->sync(x);
}

usl_status usli_model_place(usl_model *m) {
    if (m->exec.backend->host) {
        for (int64_t i = 0; i < weight_count(m); i++) m->weights[i].d = m->weights[i].m;
        return USL_OK;
    }
    usl_status st = place(m);
    if (st != USL_OK) usli_model_unplace(m); /* passes are refused from now on */
    return st;
}

void usli_model_unplace(usl_model *m) {
    usli_exec *x = &m->exec;
    usli_model_unstream(m);
    for (int64_t l = 0; m->places && l < m->config.layers; l++) {
        if (!m->places[l].on_host)
            usli_device_free(x, m->places[l].at);
        else if (m->places[l].at)
            x->backend->free_host(x, m->places[l].at);
    }
    usli_free(m->ctx, m->places);
    usli_device_free(x, m->placed);
    usli_device_free(x, m->tables);
    usli_device_free(x, m->embed);
    if (m->host_embed) x->backend->free_host(x, m->host_embed);
    m->places = NULL;
    m->placed = m->tables = m->embed = m->host_embed = NULL;
}

size_t usli_model_embed_bytes(const usl_model *m) {
    const usli_weight *w = usli_base_weight(m, USLI_EMBED, 0);
    bool stays = m->exec.backend->host || m->full || m->config.tied || !m->embed || w->m.nf4 || usli_model_sharers(m);
    return stays ? 0 : w->storage->bytes;
}

usl_status usli_model_embed_to_host(usl_model *m) {
    size_t bytes = usli_model_embed_bytes(m);
    usli_weight *w = usli_base_weight(m, USLI_EMBED, 0);
    if (!bytes) return USL_OK;
    if (!(m->host_embed = m->exec.backend->alloc_host(&m->exec, bytes))) return usli_nomem(m->ctx, bytes);
    memcpy(m->host_embed, w->storage->data, bytes);
    w->d.data = m->host_embed;
    w->d.scale = moved(w->m.scale, w->storage, m->host_embed);
    usli_device_free(&m->exec, m->embed);
    m->embed = NULL;
    m->placing++;
    return USL_OK;
}

usl_status usli_model_has_weights(usl_ctx *ctx, const usl_model *m) {
    if (m->plan_only) return usli_refuse_planned(ctx);
    bool placed = m->exec.backend->host || m->base || m->places;
    return placed ? USL_OK
                  : usli_fail(ctx, USL_ERR_NOMEM,
                              "the model's weights left the GPU and found no room to come back; close it and open it "
                              "again");
}

usl_status usli_model_check_weights(const usl_model *m) {
    return usli_model_has_weights(m->ctx, m);
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

static bool is_decoded(const usl_model *m, const usli_weight *w) {
    return w->m.dtype != m->dtype;
}

/* As the workspace has it, so that bits do not depend on what is kept. */
static int64_t cache_room(const usl_model *m, int64_t layer, const usli_slot *slot, int count) {
    int ranks = 0;
    for (int i = 0; i < count; i++) {
        const usli_weight *w = usli_base_weight(m, slot[i], layer);
        if (!is_decoded(m, w) || w->m.cols % 8 || usli_slot_experts(&m->config, slot[i])) return 0;
        if (m->active) ranks += usli_adapter_module(m, m->active, slot[i], layer)->rank;
    }
    return usli_linear_room(&m->exec, m->dtype, ranks);
}

/* Passes read a trained copy in one's place: the rest of such a group is decoded beside it, in the workspace. */
static bool has_copy(const usl_model *m, int64_t layer, const usli_slot *slot, int count) {
    for (int i = 0; i < count; i++)
        if (usli_model_weight(m, slot[i], layer) != usli_base_weight(m, slot[i], layer)) return true;
    return false;
}

/* Bytes of a layer's decoded matrices; points at them when they begin at `at`. */
static size_t layer_cache(const usl_model *m, int64_t layer, char *at) {
    size_t bytes = 0, e = usli_dtype_bytes(m->dtype);
    usli_slot slot[4];
    for (int k = 0; k < USLI_GROUP_KINDS && !m->full && !m->exec.backend->host; k++) {
        int count = usli_group_slots(m, layer, (usli_group_kind)k, slot);
        if (has_copy(m, layer, slot, count)) continue;
        int64_t room = cache_room(m, layer, slot, count), ld = 0;
        for (int i = 0; i < count; i++) {
            usli_weight *w = usli_base_weight(m, slot[i], layer);
            if (!is_decoded(m, w)) continue;
            ld = w->m.cols + room;
            if (at) w->d.cached = at + bytes, w->d.cached_ld = ld;
            bytes += (size_t)(w->m.rows * ld) * e;
            if (!room) bytes = aligned(bytes);
        }
        bytes = aligned(bytes + (size_t)(room * ld) * e);
    }
    return bytes;
}

size_t usli_model_cache_bytes(const usl_model *m, int64_t layers) {
    size_t bytes = 0;
    for (int64_t l = 0; l < layers; l++) bytes += layer_cache(m, l, NULL);
    return bytes;
}

void usli_model_set_cache(usl_model *m, void *base, int64_t layers) {
    char *at = base;
    m->placing++;
    for (int64_t l = 0; l < m->config.layers; l++) {
        for (int s = 0; s < USLI_LINEARS; s++) usli_base_weight(m, (usli_slot)s, l)->d.cached = NULL;
        if (base && l < layers) at += layer_cache(m, l, at);
    }
}

usl_status usli_model_fill_cache(usl_model *m) {
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++) {
            usli_weight *w = usli_base_weight(m, (usli_slot)s, l);
            usli_cast_args a = {
                .src = w->d, .dtype = m->dtype, .dst = (void *)(uintptr_t)w->d.cached, .ld = w->d.cached_ld
            };
            usli_arena none;
            usli_exec x = m->exec;
            usli_arena_init(&none, NULL, 0);
            x.arena = &none;
            if (w->d.cached) USLI_TRY(usli_op_cast(&x, &a, USLI_FORWARD));
        }
    return USL_OK;
}
