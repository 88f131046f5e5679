/* GGUF as llama.cpp reads it: tensor names and the order of q and k rows are those of its converter. */
#include <math.h>
#include <string.h>

#include "core/export/device.h"
#include "core/export/export.h"
#include "core/io/gguf.h"
#include "core/quant/traits.h"

static usl_status sink(void *ud, const void *data, size_t bytes) {
    return usli_gguf_write(ud, data, bytes);
}

static usl_dtype type_of(const usli_export_source *s, const usli_method *method, const usli_piece *p, int64_t layer) {
    const usli_config *c = &s->m->config;
    usli_mix_model mix = { .layers = c->layers,
                           .heads = c->heads,
                           .kv_heads = c->kv_heads,
                           .experts = c->experts,
                           .tied = c->tied && !usli_model_unties(s->m),
                           .importance = s->importance != NULL };
    return usli_mix_type(method, &mix, p->name, layer, p->ndim > 1 ? p->shape[p->ndim - 1] : 0);
}

/* Llama 3.1's scaling is a tensor of frequency divisors in GGUF. */
static bool has_divisors(const usl_model *m) {
    return m->rope_divisors || m->config.rope.kind == USLI_ROPE_LLAMA3;
}

static usl_status write_divisors(const usl_model *m, usli_gguf_writer *w) {
    int64_t half = m->config.rot_dim / 2;
    double *inv = usli_malloc(m->ctx, (size_t)half * sizeof *inv), attention;
    if (!inv) return usli_nomem(m->ctx, (size_t)half * sizeof *inv);
    usli_rope_frequencies(&m->config.rope, 2 * half, m->rope_divisors, 0, inv, &attention);
    usl_status st = USL_OK;
    for (int64_t i = 0; i < half && st == USL_OK; i++) {
        float d = (float)(pow(m->config.rope.theta, -(double)i / (double)half) / inv[i]);
        st = usli_gguf_write(w, &d, sizeof d);
    }
    usli_free(m->ctx, inv);
    return st;
}

static usl_status describe(const usli_export_source *s, const usli_method *method, usli_gguf_writer *w,
                           uint64_t *bytes) {
    const usl_model *m = s->m;
    usli_slot slot;
    int64_t layer;
    usli_piece p;
    for (int64_t i = 0; i < usli_export_slots(m); i++) {
        if (!usli_export_slot(m, i, &slot, &layer)) continue;
        for (int64_t k = 0; k < usli_slot_pieces(&m->config, slot, USLI_FORM_GGUF); k++) {
            usli_slot_piece(&m->config, slot, layer, USLI_FORM_GGUF, k, &p);
            usl_dtype t = type_of(s, method, &p, layer);
            if (!s->importance && usli_mix_wants_importance(method, p.name, t))
                return usli_fail(m->ctx, USL_ERR_INVALID,
                                 "%s wants an importance matrix (%s becomes %s): give a calibration text, imatrix_file "
                                 "= \"FILE\" or --imatrix FILE",
                                 method->name, p.name, usl_dtype_name(t));
            int64_t values = 1;
            for (int d = 0; d < p.ndim; d++) values *= p.shape[d];
            *bytes += usli_row_bytes(t, values);
            USLI_TRY(usli_gguf_add(w, p.name, t, p.ndim, p.shape));
        }
    }
    int64_t half = m->config.rot_dim / 2;
    for (int i = 0; i < 2 && m->config.rope.kind == USLI_ROPE_LONG; i++)
        USLI_TRY(usli_gguf_add(w, usli_gguf_divisors[i], USL_F32, 1, &half));
    return has_divisors(m) ? usli_gguf_add(w, "rope_freqs.weight", USL_F32, 1, &half) : USL_OK;
}

typedef struct job {
    const usli_export_source *s;
    const usli_gguf_target *targets;
    int count;
    usli_gguf_writer **writers;
    usli_export_out *outs;
} job;

static usl_status write_tensors(const job *j) {
    const usl_model *m = j->s->m;
    usli_slot slot;
    usli_piece p;
    int64_t layer, slots = usli_export_slots(m);
    for (int64_t i = 0; i < slots; i++) {
        USLI_TRY(usli_progress(m->ctx, "exporting", (uint64_t)i, (uint64_t)slots));
        if (!usli_export_slot(m, i, &slot, &layer)) continue;
        for (int64_t k = 0; k < usli_slot_pieces(&m->config, slot, USLI_FORM_GGUF); k++) {
            usli_slot_piece(&m->config, slot, layer, USLI_FORM_GGUF, k, &p);
            for (int t = 0; t < j->count; t++)
                j->outs[t] = (usli_export_out){ type_of(j->s, j->targets[t].method, &p, layer), sink, j->writers[t] };
            USLI_TRY(usli_export_tensor(j->s, slot, layer, &p, true, j->outs, j->count));
        }
    }
    size_t bytes = (size_t)m->config.rot_dim / 2 * sizeof(float);
    for (int t = 0; t < j->count; t++) {
        for (int i = 0; i < 2 && m->config.rope.kind == USLI_ROPE_LONG; i++)
            USLI_TRY(usli_gguf_write(j->writers[t], m->config.rope.divisors[i], bytes));
        if (has_divisors(m)) USLI_TRY(write_divisors(m, j->writers[t]));
    }
    return usli_progress(m->ctx, "exporting", (uint64_t)slots, (uint64_t)slots);
}

/* The device's memory is given back before what was written is looked at. */
static usl_status write_with_device(const job *j) {
    usli_export_source source = *j->s;
    job with = *j;
    with.s = &source;
    source.device = usli_quantiser_open(source.m);
    usl_status st = write_tensors(&with);
    usli_quantiser_close(source.device);
    return st;
}

static usl_status write_all(const job *j, const usli_tokenizer *tok, bool verify, usl_export_report *reports) {
    usl_model *m = j->s->m;
    uint64_t bytes, all = 0;
    for (int t = 0; t < j->count; t++) {
        bytes = 0;
        USLI_TRY(usli_gguf_create(m->ctx, j->targets[t].path, &j->writers[t]));
        USLI_TRY(usli_gguf_put_model(j->writers[t], m, j->targets[t].method));
        USLI_TRY(usli_gguf_put_tokenizer(j->writers[t], m, tok));
        USLI_TRY(describe(j->s, j->targets[t].method, j->writers[t], &bytes));
        if (reports) reports[t].bytes = bytes;
        all += bytes;
    }
    USLI_TRY(usli_export_check_disk(m->ctx, j->targets[0].path, all));
    for (int t = 0; t < j->count; t++) USLI_TRY(usli_gguf_begin(j->writers[t]));
    USLI_TRY(write_with_device(j));
    for (int t = 0; t < j->count; t++) {
        USLI_TRY(usli_gguf_finish(j->writers[t]));
        usl_export_report unread = { .size = sizeof unread };
        if (verify)
            USLI_TRY(usli_export_check(j->s, tok, usli_gguf_temporary(j->writers[t]), j->targets[t].path, USL_F32,
                                       reports ? &reports[t] : &unread));
    }
    for (int t = 0; t < j->count; t++) USLI_TRY(usli_gguf_commit(j->writers[t]));
    return USL_OK;
}

usl_status usli_export_gguf(const usli_export_source *s, const usli_tokenizer *tok, const usli_gguf_target *targets,
                            int count, bool verify, usl_export_report *reports) {
    usl_model *m = s->m;
    usl_ctx *ctx = m->ctx;
    if (count < 1) return usli_fail(ctx, USL_ERR_INVALID, "no quantization_method is given; give one");
    if (!tok) return usli_fail(ctx, USL_ERR_INVALID, "%s: a GGUF holds the tokenizer; give it", targets[0].path);
    if (usli_tokenizer_size(tok) > m->config.vocab)
        return usli_fail(ctx, USL_ERR_SHAPE,
                         "%s: the tokenizer has %lld tokens and the model %lld; they do not belong together",
                         targets[0].path, (long long)usli_tokenizer_size(tok), (long long)m->config.vocab);
    job j = { s, targets, count, usli_calloc(ctx, (size_t)count, sizeof *j.writers),
              usli_calloc(ctx, (size_t)count, sizeof *j.outs) };
    usl_status st =
        j.writers && j.outs ? write_all(&j, tok, verify, reports) : usli_nomem(ctx, (size_t)count * sizeof *j.outs);
    for (int t = 0; j.writers && t < count; t++) usli_gguf_abandon(j.writers[t]);
    usli_free(ctx, j.writers);
    usli_free(ctx, j.outs);
    return st;
}
