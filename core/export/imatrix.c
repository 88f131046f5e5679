#include "core/export/imatrix.h"

#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/infer/generate.h"

/* What a pass over the calibration text adds to. */
typedef struct watch {
    usl_model *m;
    usli_imatrix *im;
    float *row; /* (widest) */
    usl_status st;
} watch;

static int64_t place_count(const usl_model *m) {
    return m->config.layers * USLI_LAYER_SLOTS + (USLI_SLOTS - USLI_EMBED);
}

/* The weight that a product was with: its place in m->weights, or -1. */
static int64_t place_of(const usl_model *m, const usli_matrix *w) {
    for (int64_t i = 0; i < place_count(m); i++) {
        const usli_matrix *d = &m->weights[i].d;
        if (m->weights[i].storage && d->data == w->data && d->nf4 == w->nf4) return i;
    }
    return -1;
}

static void observe(usli_exec *x, const usli_linear_args *a) {
    watch *w = x->observer;
    int64_t ldx = a->ldx ? a->ldx : a->in;
    size_t size = usli_dtype_bytes(a->dtype);
    float *sums[USLI_MAX_SEGMENTS]; /* of the segments that are weights here: one input, read once */
    int count = 0;
    for (int i = 0; i < a->segments && w->st == USL_OK; i++) {
        int64_t place = place_of(w->m, &a->segment[i].w);
        if (place < 0) continue;
        float **kept = &w->im->features[place];
        if (!*kept && !(*kept = usli_calloc(x->ctx, (size_t)a->in, sizeof **kept))) {
            w->st = usli_nomem(x->ctx, (size_t)a->in * sizeof **kept);
            return;
        }
        sums[count++] = *kept;
    }
    for (int64_t t = 0; count && t < a->tokens; t++) {
        usli_to_f32((const char *)a->x + (size_t)(t * ldx) * size, a->dtype, w->row, a->in);
        for (int i = 0; i < count; i++)
            for (int64_t c = 0; c < a->in; c++) sums[i][c] += w->row[c] * w->row[c];
    }
}

/* Means; a feature that was never there still counts a little. Only the proportions count where they are used: the
 * largest is brought to between a half and 1, by a power of two, so that no sum of products of them overflows. */
static usl_status finish(const usl_model *m, usli_imatrix *im) {
    for (int64_t i = 0; i < place_count(m); i++) {
        float *f = im->features[i];
        int64_t n = m->weights[i].m.cols;
        double sum = 0, most = 0;
        int power;
        for (int64_t c = 0; f && c < n; c++) {
            sum += (double)f[c];
            most = fmax(most, (double)f[c]);
        }
        if (!isfinite(sum)) {
            int64_t layered = m->config.layers * USLI_LAYER_SLOTS;
            usli_slot slot = (usli_slot)(i < layered ? i % USLI_LAYER_SLOTS : i - layered + USLI_EMBED);
            char name[128];
            usli_slot_name(&m->config, slot, i < layered ? i / USLI_LAYER_SLOTS : 0, false, name, sizeof name);
            return usli_fail(
                m->ctx, USL_ERR_INVALID,
                "the importance of %s is not a finite number: the calibration text makes what it is "
                "multiplied by overflow; load the model with dtype = \"float32\", or look for broken weights",
                name);
        }
        frexp(most, &power);
        for (int64_t c = 0; f && c < n; c++) f[c] = (float)ldexp((double)f[c] + 1e-4 * sum / (double)n, -power);
    }
    return USL_OK;
}

usl_status usli_imatrix_new(usl_model *m, const int32_t *ids, int64_t count, int64_t context, usli_imatrix **out) {
    usl_ctx *ctx = m->ctx;
    *out = NULL;
    USLI_TRY(usli_model_pull(m));
    if (!m->exec.backend->host)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "an importance matrix is measured on the CPU; load the model with device = \"cpu\" for it");
    if (count < 1) return usli_fail(ctx, USL_ERR_INVALID, "the calibration text is empty");
    if (context > m->context) context = m->context;
    int64_t widest = m->config.hidden > m->config.inter ? m->config.hidden : m->config.inter, rows, cols;
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++)
            if (usli_slot_shape(&m->config, (usli_slot)s, l, &rows, &cols) && cols > widest) widest = cols;
    usli_imatrix *im = usli_calloc(ctx, 1, sizeof *im);
    float *row = usli_malloc(ctx, (size_t)widest * sizeof *row), *logits = NULL;
    usl_status st = USL_OK;
    if (im) {
        im->ctx = ctx;
        usli_ctx_retain(ctx);
        im->layers = m->config.layers;
        im->features = usli_calloc(ctx, (size_t)place_count(m), sizeof *im->features);
    }
    if (im && im->features && row) logits = usli_malloc(ctx, (size_t)(context * m->config.vocab) * sizeof *logits);
    if (!logits) st = usli_nomem(ctx, (size_t)(context * m->config.vocab) * sizeof *logits);
    watch w = { m, im, row, USL_OK };
    m->exec.observe = observe;
    m->exec.observer = &w;
    for (int64_t i = 0; i < count && st == USL_OK; i += context) {
        int64_t n = count - i < context ? count - i : context;
        st = usli_progress(ctx, "calibrating", (uint64_t)i, (uint64_t)count);
        if (st == USL_OK) st = usli_logits(m, ids + i, n, logits);
        if (st == USL_OK) st = w.st;
    }
    m->exec.observe = NULL;
    m->exec.observer = NULL;
    usli_free(ctx, row);
    usli_free(ctx, logits);
    if (st == USL_OK) st = finish(m, im);
    if (st == USL_OK)
        *out = im;
    else
        usli_imatrix_free(im);
    return st;
}

void usli_imatrix_free(usli_imatrix *im) {
    if (!im) return;
    usl_ctx *ctx = im->ctx;
    for (int64_t i = 0; im->features && i < im->layers * USLI_LAYER_SLOTS + (USLI_SLOTS - USLI_EMBED); i++)
        usli_free(ctx, im->features[i]);
    usli_free(ctx, im->features);
    usli_free(ctx, im);
    usl_ctx_free(ctx);
}

const float *usli_imatrix_of(const usli_imatrix *im, usli_slot slot, int64_t layer) {
    if (!im) return NULL;
    int64_t i =
        slot >= USLI_EMBED ? im->layers * USLI_LAYER_SLOTS + (slot - USLI_EMBED) : layer * USLI_LAYER_SLOTS + slot;
    return im->features[i];
}
