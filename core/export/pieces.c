#include <string.h>

#include "core/base/pool.h"
#include "core/export/device.h"
#include "core/export/export.h"
#include "core/model/adapter.h"
#include "core/quant/traits.h"

enum { SLAB = 1 << 22 /* values converted at a time, for all outputs together */, MOST_OUTPUTS = 64, ALIGN = 64 };

int64_t usli_export_slots(const usl_model *m) {
    return m->config.layers * USLI_LAYER_SLOTS + 3;
}

bool usli_export_slot(const usl_model *m, int64_t i, usli_slot *slot, int64_t *layer) {
    int64_t last = m->config.layers * USLI_LAYER_SLOTS + 1;
    *layer = 0;
    if (i == 0) {
        *slot = USLI_EMBED;
    } else if (i < last) {
        *layer = (i - 1) / USLI_LAYER_SLOTS;
        *slot = (usli_slot)((i - 1) % USLI_LAYER_SLOTS);
    } else {
        *slot = i == last ? USLI_FINAL_NORM : USLI_HEAD;
    }
    return usli_model_weight(m, *slot, *layer)->storage || (*slot == USLI_HEAD && usli_model_unties(m));
}

usl_status usli_export_check_disk(usl_ctx *ctx, const char *path, uint64_t bytes) {
    uint64_t room = usli_free_disk(path);
    if (room >= bytes) return USL_OK;
    return usli_fail(ctx, USL_ERR_IO,
                     "%s: the export needs %.2f GiB and the disk has %.2f GiB left; free some space or choose another "
                     "folder",
                     path, (double)bytes / (1 << 30), (double)room / (1 << 30));
}

/* ---- The source ----------------------------------------------------------------------------------------------------
 */

/* Where an adapter's beginning changed the base, it fits that one alone. */
static usl_status check_start(const usl_model *m, const usl_model *base) {
    const usli_adapter *a = m->active;
    bool changed = a && strcmp(a->init, "loftq") == 0;
    for (int64_t i = 0; a && i < usli_module_count(&m->config); i++) changed |= a->modules[i].start_a != NULL;
    if (!changed || base == m) return USL_OK;
    return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                     "adapter \"%s\" began with %s, which changed the weights that it belongs to: leave out base",
                     a->name, a->init);
}

usl_status usli_export_source_of(usl_model *m, const usl_export_opts *opts, usli_export_source *out) {
    *out = (usli_export_source){ .m = m,
                                 .base = opts && opts->base ? opts->base : m,
                                 .importance = opts ? opts->imatrix : NULL };
    USLI_TRY(usli_model_pull(m));
    USLI_TRY(check_start(m, out->base));
    if (out->base != m) USLI_TRY(usli_model_check_weights(out->base));
    bool same = m->config.arch == out->base->config.arch && m->config.layers == out->base->config.layers;
    for (int64_t i = 0; same && i < usli_export_slots(m); i++) {
        usli_slot slot;
        int64_t layer, rows[2], cols[2];
        if (!usli_export_slot(m, i, &slot, &layer) || !usli_base_weight(m, slot, layer)->storage) continue;
        usli_slot_shape(&m->config, slot, layer, &rows[0], &cols[0]);
        usli_slot_shape(&out->base->config, slot, layer, &rows[1], &cols[1]);
        same = usli_base_weight(out->base, slot, layer)->storage && rows[0] == rows[1] && cols[0] == cols[1];
    }
    if (!same)
        return usli_fail(m->ctx, USL_ERR_SHAPE,
                         "%s is another model than %s: give the 16-bit weights of the very model that was loaded",
                         out->base->path ? out->base->path : "base", m->path ? m->path : "the model");
    if (out->importance && out->importance->layers != m->config.layers)
        return usli_fail(m->ctx, USL_ERR_SHAPE, "the importance matrix is that of another model");
    return USL_OK;
}

const usli_weight *usli_export_weight(const usli_export_source *s, usli_slot slot, int64_t layer) {
    const usl_model *m = s->m;
    const usli_weight *w = slot == USLI_HEAD ? usli_model_head(m) : usli_model_weight(m, slot, layer);
    for (int i = 0; i < 2; i++) { /* a tied head's may be the embedding's */
        usli_slot from = i ? USLI_EMBED : slot;
        if (w == usli_base_weight(m, from, layer)) return usli_base_weight(s->base, from, layer);
    }
    return w; /* a copy that the adapter trained */
}

bool usli_export_is_merged(const usli_export_source *s, usli_slot slot, int64_t layer) {
    const usl_model *m = s->m;
    bool adapts = slot < USLI_LINEARS || slot == USLI_EMBED || slot == USLI_HEAD;
    return m->active && adapts && usli_adapter_module(m, m->active, slot, layer)->rank;
}

int usli_export_onto(const usli_export_source *s) {
    int onto = 0;
    usli_slot slot;
    int64_t layer;
    for (int64_t i = 0; i < usli_export_slots(s->m); i++) {
        if (!usli_export_slot(s->m, i, &slot, &layer) || !usli_export_is_merged(s, slot, layer)) continue;
        usl_dtype dtype = usli_export_weight(s, slot, layer)->m.dtype;
        if (dtype != USL_F32 && dtype != USL_BF16 && dtype != USL_F16 && dtype != USL_F64) return 2;
        onto = 1;
    }
    return onto;
}

bool usli_export_raw(const usli_export_source *s, usli_slot slot, int64_t layer, usl_dtype dtype) {
    const usli_matrix *w = &usli_export_weight(s, slot, layer)->m;
    return !usli_export_is_merged(s, slot, layer) && w->dtype == dtype && w->data;
}

void usli_export_rows(const usli_export_source *s, usli_slot slot, int64_t layer, int64_t first, int64_t count,
                      float *dst) {
    const usli_weight *w = usli_export_weight(s, slot, layer);
    for (int64_t r = 0; r < count; r++)
        usli_adapted_row(s->m, s->m->active, w, slot, layer, first + r, dst + r * w->m.cols);
}

/* ---- Rows ----------------------------------------------------------------------------------------------------------
 */

typedef struct job {
    const usli_export_source *s;
    const usli_piece *piece;
    usli_slot slot;
    int64_t layer, rows, cols, first;
    bool permuted;
    float offset; /* added to a vector's values */
    const float *importance;
    float *scratch;  /* (threads, cols) */
    char *to_device; /* rows of this type for it, instead of scratch; NULL: nothing goes there */
    usl_dtype to_dtype;
    int count;
    struct {
        usl_dtype dtype;
        bool raw, on_device;
        char *data;
        size_t row_bytes;
    } out[MOST_OUTPUTS];
} job;

/* The model's row that stands at row r of the file. */
static int64_t source_row(const job *j, int64_t r) {
    if (!j->permuted) return usli_piece_row(j->piece, r);
    int64_t d = j->s->m->config.head_dim, head = r / d, k = r % d;
    return head * d + k % 2 * (d / 2) + k / 2;
}

static void row_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    int64_t row = source_row(j, j->first + task);
    const char *stored = usli_export_weight(j->s, j->slot, j->layer)->m.data;
    size_t sent = j->to_device ? usli_row_bytes(j->to_dtype, j->cols) : 0;
    char *to = j->to_device ? j->to_device + (size_t)task * sent : (char *)(j->scratch + (int64_t)worker * j->cols);
    float *values = (float *)(void *)to;
    bool decoded = false, whole = !j->to_device || j->to_dtype == USL_F32;
    if (!whole) memcpy(to, stored + (size_t)row * sent, sent);
    for (int i = 0; i < j->count; i++) {
        size_t bytes = j->out[i].row_bytes;
        char *out = j->out[i].data + (size_t)task * bytes;
        if (j->out[i].raw) {
            memcpy(out, stored + (size_t)row * bytes, bytes);
            continue;
        }
        if (!decoded && whole) usli_export_rows(j->s, j->slot, j->layer, row, 1, values);
        decoded = true;
        if (!j->out[i].on_device) usli_traits_of(j->out[i].dtype)->encode(values, j->importance, out, j->cols);
    }
}

/* A vector as so many rows of one value: it is never blocked, and a bias may be permuted. */
static usl_status vector(const job *j, const usli_export_out *out) {
    const float *values = usli_export_weight(j->s, j->slot, j->layer)->m.data;
    char bytes[8];
    for (int64_t r = 0; r < j->rows; r++) {
        float value = values[source_row(j, r)] + j->offset;
        usli_traits_of(out->dtype)->encode(&value, NULL, bytes, 1);
        USLI_TRY(out->sink(out->ud, bytes, usli_row_bytes(out->dtype, 1)));
    }
    return USL_OK;
}

/* ---- With a device (device.c) -------------------------------------------------------------------------------------
 */

/* Whether a device quantises for some output. What goes there is 16 bits wide where nothing here wants floats. */
static bool asks_device(job *j) {
    const usli_matrix *w = &usli_export_weight(j->s, j->slot, j->layer)->m;
    bool asks = false, plain = usli_export_raw(j->s, j->slot, j->layer, w->dtype);
    if (!j->s->device || j->s->device->gone) return false;
    for (int i = 0; i < j->count; i++) {
        j->out[i].on_device = !j->out[i].raw && usli_quantiser_makes(j->out[i].dtype);
        asks |= j->out[i].on_device;
        plain &= j->out[i].on_device || j->out[i].raw;
    }
    j->to_dtype = plain && (w->dtype == USL_BF16 || w->dtype == USL_F16) ? w->dtype : USL_F32;
    return asks;
}

/* Rows of a slab; offsets get where the outputs' blocks lie in it. 0: not one row fits. */
static int64_t lay_out(const job *j, size_t offsets[MOST_OUTPUTS]) {
    size_t row = 0, at = 0;
    for (int i = 0; i < j->count; i++) row += j->out[i].row_bytes;
    const usli_quantiser *q = j->s->device;
    int64_t slab = ((int64_t)q->bytes - ALIGN * j->count) / (int64_t)row;
    if (slab > q->values / j->cols) slab = q->values / j->cols;
    if (slab < 1) return 0;
    for (int i = 0; i < j->count; i++) {
        offsets[i] = at;
        at += ((size_t)slab * j->out[i].row_bytes + ALIGN - 1) / ALIGN * ALIGN;
    }
    return slab;
}

static usl_status send(const job *j, int slab, int64_t rows, const size_t *offsets) {
    usli_quantiser *q = j->s->device;
    USLI_TRY(usli_quantiser_take(q, slab, rows, j->cols, j->to_dtype));
    for (int i = 0; i < j->count; i++)
        if (j->out[i].on_device)
            USLI_TRY(usli_quantiser_make(q, slab, rows, j->cols, j->to_dtype, j->out[i].dtype, offsets[i]));
    return USL_OK;
}

/* Hands rows from j->first on over, as far as the device goes: where it runs out of memory it is given up, and the CPU
 * does what is left. */
static usl_status by_device(job *j, const usli_export_out *out) {
    usl_ctx *ctx = j->s->m->ctx;
    usli_quantiser *q = j->s->device;
    size_t offsets[MOST_OUTPUTS];
    int64_t slab = lay_out(j, offsets), away = 0, done = 0; /* away: rows that the device has; done: handed over */
    usl_status st = USL_OK, asked = slab ? usli_quantiser_weigh(q, j->importance, j->cols) : USL_OK;
    for (int k = 0; slab && st == USL_OK && asked == USL_OK && (away || j->first < j->rows); k ^= 1) {
        int64_t n = j->rows - j->first < slab ? j->rows - j->first : slab;
        if ((st = usli_checkpoint(ctx)) != USL_OK) break;
        j->to_device = q->slab[k].rows;
        for (int i = 0; i < j->count; i++) j->out[i].data = q->slab[k].blocks + offsets[i];
        usli_pool_run(ctx->pool, n, row_task, j);
        asked = usli_quantiser_wait(q);
        if (asked == USL_OK && n) asked = send(j, k, n, offsets);
        if (asked != USL_OK) break;
        for (int i = 0; away && i < j->count && st == USL_OK; i++)
            st = out[i].sink(out[i].ud, q->slab[!k].blocks + offsets[i], (size_t)away * j->out[i].row_bytes);
        done += away;
        away = n;
        j->first += n;
    }
    if (st != USL_OK || asked != USL_OK) (void)usli_quantiser_wait(q); /* nothing of it goes on after this */
    j->to_device = NULL;
    j->first = done;
    for (int i = 0; i < j->count; i++) j->out[i].on_device = false, j->out[i].data = NULL;
    if (asked != USL_ERR_NOMEM) return st != USL_OK ? st : asked;
    q->gone = true;
    usli_log(ctx, USL_LOG_WARN, "there is no memory left for the GPU to quantise in: the CPU does the rest");
    return st;
}

static usl_status matrix(job *j, const usli_export_out *out) {
    usl_ctx *ctx = j->s->m->ctx;
    if (asks_device(j)) USLI_TRY(by_device(j, out));
    if (j->first == j->rows) return USL_OK;
    int64_t most = SLAB / j->count, slab = most / j->cols > 1 ? most / j->cols : 1;
    if (slab > j->rows) slab = j->rows;
    size_t bytes = (size_t)usli_pool_threads(ctx->pool) * (size_t)j->cols * sizeof(float);
    usl_status st = (j->scratch = usli_malloc_aligned(ctx, bytes)) ? USL_OK : usli_nomem(ctx, bytes);
    for (int i = 0; i < j->count && st == USL_OK; i++) {
        bytes = (size_t)slab * j->out[i].row_bytes;
        if (!(j->out[i].data = usli_malloc_aligned(ctx, bytes))) st = usli_nomem(ctx, bytes);
    }
    for (; st == USL_OK && j->first < j->rows; j->first += slab) {
        int64_t n = j->rows - j->first < slab ? j->rows - j->first : slab;
        if ((st = usli_checkpoint(ctx)) != USL_OK) break;
        usli_pool_run(ctx->pool, n, row_task, j);
        for (int i = 0; i < j->count && st == USL_OK; i++)
            st = out[i].sink(out[i].ud, j->out[i].data, (size_t)n * j->out[i].row_bytes);
    }
    usli_free_aligned(ctx, j->scratch);
    for (int i = 0; i < j->count; i++) usli_free_aligned(ctx, j->out[i].data);
    return st;
}

usl_status usli_export_tensor(const usli_export_source *s, usli_slot slot, int64_t layer, const usli_piece *piece,
                              bool gguf, const usli_export_out *out, int count) {
    const usli_arch *arch = s->m->config.arch;
    job j = { .s = s,
              .piece = piece,
              .slot = slot,
              .layer = layer,
              .permuted = gguf && arch->gguf_permuted && usli_slot_turns(slot),
              .offset = gguf && usli_slot_is_norm(slot) ? arch->norm_offset : 0,
              .importance = usli_imatrix_of(s->importance, slot, layer) };
    usli_slot_shape(&s->m->config, slot, layer, &j.rows, &j.cols);
    j.rows = piece->rows;
    for (int done = 0; done < count; done += j.count) {
        j.count = count - done < MOST_OUTPUTS ? count - done : MOST_OUTPUTS;
        if (!j.cols) j.count = 1;
        for (int i = 0; i < j.count; i++) {
            j.out[i].dtype = out[done + i].dtype;
            j.out[i].raw = usli_export_raw(s, slot, layer, j.out[i].dtype);
            j.out[i].row_bytes = usli_row_bytes(j.out[i].dtype, j.cols ? j.cols : 1);
            j.out[i].on_device = false;
            j.out[i].data = NULL;
        }
        j.first = 0;
        USLI_TRY(j.cols ? matrix(&j, out + done) : vector(&j, out + done));
    }
    return USL_OK;
}
