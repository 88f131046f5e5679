/* Three ways were weighed for the rows. The weights that stand on the device already would spare the link, but an
 * export merges adapters, takes another model's base, turns rows and adds offsets: all of it would be written a second
 * time, and to the bit. Float32 rows from the CPU's threads need none of that; Llama-3-8B's are 32 GB, 0.7 s of an
 * H100's link. So rows come from the threads as ever, and those of a 16-bit base that nothing is merged into go as they
 * are: half the bytes for the memory and the link, and decoding is exact anywhere.
 *
 * Two slabs take turns: threads fill one while the device has the other. Copies and kernels of one slab follow one
 * another, as the threads take longer than all of it. */
#include "core/export/device.h"

#include "core/quant/traits.h"

/* A slab: 16 MiB of rows, and as many for what is made of them. Smaller ones would be a launch's time. */
enum { VALUES = 1 << 22, BYTES = 1 << 24 };

bool usli_quantiser_makes(usl_dtype type) {
    switch (type) {
    case USL_Q2_K:
    case USL_Q3_K:
    case USL_Q4_K:
    case USL_Q5_K:
    case USL_Q6_K:
    case USL_Q4_0:
    case USL_Q4_1:
    case USL_Q5_0:
    case USL_Q5_1:
    case USL_Q8_0:
    case USL_IQ4_NL:
    case USL_IQ4_XS: return true;
    /* Plain types are quicker written than sent. The i-quants below four bits look up points of lattices in trees that
     * differ from value to value: they stay on the CPU's threads, which work on them meanwhile. */
    default: return false;
    }
}

static int64_t widest(const usl_model *m) {
    int64_t most = 0, rows, cols;
    for (int s = 0; s < USLI_SLOTS; s++)
        for (int64_t l = 0; l < (s < USLI_LAYER_SLOTS ? m->config.layers : 1); l++)
            if (usli_slot_shape(&m->config, (usli_slot)s, l, &rows, &cols) && cols > most) most = cols;
    return most;
}

static bool take_memory(usli_quantiser *q, int64_t cols) {
    usli_exec *x = &q->exec;
    size_t rows = (size_t)q->values * sizeof(float);
    if (!(q->importance = x->backend->alloc(x, (size_t)cols * sizeof(float)))) return false;
    for (int i = 0; i < 2; i++) {
        usli_slab *s = &q->slab[i];
        if (!(s->rows = x->backend->alloc_host(x, rows))) return false;
        if (!(s->blocks = x->backend->alloc_host(x, q->bytes))) return false;
        if (!(s->device_rows = x->backend->alloc(x, rows))) return false;
        if (!(s->device_blocks = x->backend->alloc(x, q->bytes))) return false;
    }
    return true;
}

usli_quantiser *usli_quantiser_open(usl_model *m) {
    if (m->exec.backend->host) return NULL;
    usli_quantiser *q = usli_calloc(m->ctx, 1, sizeof *q);
    if (!q) return NULL;
    q->exec = m->exec;
    q->exec.arena = &q->none;
    q->values = VALUES;
    q->bytes = BYTES;
    usli_arena_init(&q->none, NULL, 0);
    if (take_memory(q, widest(m))) return q;
    usli_quantiser_close(q);
    usli_log(m->ctx, USL_LOG_WARN, "there is no memory left for the GPU to quantise in: the CPU does it");
    return NULL;
}

void usli_quantiser_close(usli_quantiser *q) {
    if (!q) return;
    usli_exec *x = &q->exec;
    usli_device_free(x, q->importance);
    for (int i = 0; i < 2; i++) {
        usli_slab *s = &q->slab[i];
        if (s->rows) x->backend->free_host(x, s->rows);
        if (s->blocks) x->backend->free_host(x, s->blocks);
        usli_device_free(x, s->device_rows);
        usli_device_free(x, s->device_blocks);
    }
    usli_free(x->ctx, q);
}

usl_status usli_quantiser_weigh(usli_quantiser *q, const float *importance, int64_t cols) {
    usli_exec *x = &q->exec;
    q->weighted = importance != NULL;
    return importance ? x->backend->copy_in(x, q->importance, importance, (size_t)cols * sizeof *importance) : USL_OK;
}

usl_status usli_quantiser_take(usli_quantiser *q, int slab, int64_t rows, int64_t cols, usl_dtype dtype) {
    usli_exec *x = &q->exec;
    const usli_slab *s = &q->slab[slab];
    USLI_TRY(x->backend->copy_beside(x, s->device_rows, s->rows, usli_row_bytes(dtype, rows * cols),
                                     USLI_INPUT_SLOT + slab));
    return x->backend->await_copy(x, USLI_INPUT_SLOT + slab);
}

usl_status usli_quantiser_make(usli_quantiser *q, int slab, int64_t rows, int64_t cols, usl_dtype dtype, usl_dtype type,
                               size_t offset) {
    usli_exec *x = &q->exec;
    const usli_slab *s = &q->slab[slab];
    usli_quantize_args a = { .rows = rows,
                             .cols = cols,
                             .dtype = dtype,
                             .x = s->device_rows,
                             .importance = q->weighted ? q->importance : NULL,
                             .type = type,
                             .y = s->device_blocks + offset };
    USLI_TRY(usli_op_quantize(x, &a, USLI_FORWARD));
    USLI_TRY(x->backend->copy_beside(x, s->blocks + offset, s->device_blocks + offset,
                                     usli_row_bytes(type, rows * cols), USLI_WEIGHT_SLOT + slab));
    return x->backend->await_copy(x, USLI_WEIGHT_SLOT + slab);
}

usl_status usli_quantiser_wait(usli_quantiser *q) {
    return q->exec.backend->sync(&q->exec);
}
