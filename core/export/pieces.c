#include <string.h>

#include "core/base/pool.h"
#include "core/export/export.h"
#include "core/quant/traits.h"

enum { SLAB = 1 << 22 /* values converted at a time */ };

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

typedef struct job {
    usl_model *m;
    const usli_piece *piece;
    usli_slot slot;
    int64_t layer, rows, cols, first;
    usl_dtype dtype;
    bool permuted, raw;
    float offset;   /* added to a vector's values */
    float *scratch; /* (threads, cols) */
    char *out;
    size_t row_bytes;
} job;

/* The model's row that stands at row r of the file. */
static int64_t source_row(const job *j, int64_t r) {
    if (!j->permuted) return usli_piece_row(j->piece, r);
    int64_t d = j->m->config.head_dim, head = r / d, k = r % d;
    return head * d + k % 2 * (d / 2) + k / 2;
}

static void row_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    int64_t row = source_row(j, j->first + task);
    char *out = j->out + (size_t)task * j->row_bytes;
    if (j->raw) {
        const usli_weight *w =
            j->slot == USLI_HEAD ? usli_model_head(j->m) : usli_model_weight(j->m, j->slot, j->layer);
        memcpy(out, (const char *)w->m.data + (size_t)row * j->row_bytes, j->row_bytes);
        return;
    }
    float *values = j->scratch + (int64_t)worker * j->cols;
    usli_model_rows(j->m, j->slot, j->layer, true, row, 1, values);
    usli_traits_of(j->dtype)->encode(values, NULL, out, j->cols);
}

/* A vector as so many rows of one value: it is never blocked, and a bias may be permuted. */
static void set_shape(job *j) {
    usli_slot_shape(&j->m->config, j->slot, j->layer, &j->rows, &j->cols);
    if (j->cols) {
        j->rows = j->piece->rows;
        return;
    }
    j->cols = j->rows;
    j->rows = 1;
}

static usl_status vector(const job *j, usli_sink_fn sink, void *ud) {
    const float *values = usli_model_weight(j->m, j->slot, j->layer)->m.data;
    char out[8];
    for (int64_t r = 0; r < j->cols; r++) {
        float value = values[source_row(j, r)] + j->offset;
        usli_traits_of(j->dtype)->encode(&value, NULL, out, 1);
        USLI_TRY(sink(ud, out, usli_row_bytes(j->dtype, 1)));
    }
    return USL_OK;
}

usl_status usli_export_tensor(usl_model *m, usli_slot slot, int64_t layer, const usli_piece *piece, usl_dtype dtype,
                              bool gguf, usli_sink_fn sink, void *ud) {
    USLI_TRY(usli_model_pull(m));
    usl_ctx *ctx = m->ctx;
    const usli_arch *arch = m->config.arch;
    job j = { .m = m,
              .piece = piece,
              .slot = slot,
              .layer = layer,
              .dtype = dtype,
              .permuted = gguf && arch->gguf_permuted && usli_slot_turns(slot),
              .offset = gguf && usli_slot_is_norm(slot) ? arch->norm_offset : 0 };
    int64_t rows, cols;
    usli_slot_shape(&m->config, slot, layer, &rows, &cols);
    set_shape(&j);
    if (!cols) return vector(&j, sink, ud);
    bool adapts = m->active && (slot < USLI_LINEARS || slot == USLI_EMBED || slot == USLI_HEAD);
    bool merged = adapts && usli_adapter_module(m, m->active, slot, layer)->rank;
    const usli_weight *w = slot == USLI_HEAD ? usli_model_head(m) : usli_model_weight(m, slot, layer);
    j.raw = !merged && w->m.dtype == dtype && w->m.data; /* the very bytes of the base */
    j.row_bytes = usli_row_bytes(dtype, j.cols);
    int64_t slab = SLAB / j.cols > 1 ? SLAB / j.cols : 1;
    if (slab > j.rows) slab = j.rows;
    size_t scratch = (size_t)usli_pool_threads(ctx->pool) * (size_t)j.cols * sizeof(float),
           bytes = (size_t)slab * j.row_bytes;
    j.scratch = usli_malloc_aligned(ctx, scratch);
    j.out = usli_malloc_aligned(ctx, bytes);
    usl_status st = j.scratch && j.out ? USL_OK : usli_nomem(ctx, scratch + bytes);
    for (; st == USL_OK && j.first < j.rows; j.first += slab) {
        int64_t n = j.rows - j.first < slab ? j.rows - j.first : slab;
        if ((st = usli_checkpoint(ctx)) != USL_OK) break;
        usli_pool_run(ctx->pool, n, row_task, &j);
        st = sink(ud, j.out, (size_t)n * j.row_bytes);
    }
    usli_free_aligned(ctx, j.scratch);
    usli_free_aligned(ctx, j.out);
    return st;
}
