/* First values of adapters. PiSSA and LoftQ take something out of the base, which is changed for every adapter then, as
 * in PEFT. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/half.h"
#include "core/base/pool.h"
#include "core/base/rng.h"
#include "core/cpu/decode.h"
#include "core/model/adapter.h"
#include "core/model/load.h"

/* ---- The usual ways ------------------------------------------------------------------------------------------------
 */

static usli_rng stream(uint64_t seed, int64_t module) {
    usli_rng rng;
    usli_rng_seed(&rng, seed + (uint64_t)module * 0x9E3779B97F4A7C15u);
    return rng;
}

/* The embedding's A begins at 0 and its B does not, as PEFT's. */
static void start_embedding(usli_lora_module *l, usli_rng *rng, int64_t out, int64_t in, bool random) {
    for (int64_t k = 0; random && k < l->rank * in; k++) l->a[k] = (float)usli_rng_normal(rng);
    for (int64_t k = 0; k < l->rank * out; k++) l->b[k] = (float)usli_rng_normal(rng);
}

static void start_plain(const usl_model *m, usli_adapter *a, uint64_t seed) {
    bool gaussian = strcmp(a->init, "gaussian") == 0, random = strcmp(a->init, "random") == 0;
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        usli_lora_module *l = &a->modules[i];
        if (!l->rank) continue;
        int64_t out, in, layer;
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        usli_lora_shape(&m->config, slot, layer, &out, &in);
        usli_rng rng = stream(seed, i);
        if (slot == USLI_EMBED) {
            start_embedding(l, &rng, out, in, random);
            continue;
        }
        double bound = 1.0 / sqrt((double)in);
        for (int64_t k = 0; k < usli_lora_stack(&m->config, slot) * l->rank * in; k++)
            l->a[k] = (float)(gaussian ? usli_rng_normal(&rng) / l->rank : (2 * usli_rng_uniform(&rng) - 1) * bound);
        for (int64_t k = 0; random && k < l->rank * out; k++)
            l->b[k] = (float)((2 * usli_rng_uniform(&rng) - 1) / sqrt((double)l->rank));
    }
}

typedef struct rows_job {
    usl_model *m;
    const usli_adapter *a; /* NULL: the base alone */
    const usli_weight *w;
    usli_slot slot;
    int64_t layer;
    float *dst;     /* (rows, cols), or NULL */
    float *lengths; /* (rows), or NULL */
    float *scratch; /* (threads, cols), for lengths */
} rows_job;

static void row_task(void *arg, int64_t row, int worker) {
    const rows_job *j = arg;
    int64_t cols = j->w->m.cols;
    float *dst = j->dst ? j->dst + row * cols : j->scratch + worker * cols;
    usli_adapted_row(j->m, j->a, j->w, j->slot, j->layer, row, dst);
    if (!j->lengths) return;
    double sum = 0;
    for (int64_t c = 0; c < cols; c++) sum += (double)dst[c] * (double)dst[c];
    j->lengths[row] = (float)sqrt(sum);
}

static const usli_weight *base_of(const usl_model *m, usli_slot slot, int64_t layer) {
    const usli_weight *w = usli_base_weight(m, slot, layer);
    return slot == USLI_HEAD && !w->storage ? usli_base_weight(m, USLI_EMBED, 0) : w;
}

void usli_start_copies(usl_model *m, usli_adapter *a) {
    int64_t inside = m->config.layers * USLI_LAYER_SLOTS;
    for (int64_t i = 0; i < usli_weight_count(&m->config); i++) {
        if (!a->copies[i].storage) continue;
        usli_slot slot = i < inside ? (usli_slot)(i % USLI_LAYER_SLOTS) : (usli_slot)(USLI_EMBED + (i - inside));
        int64_t layer = i < inside ? i / USLI_LAYER_SLOTS : 0;
        rows_job j = { .m = m, .w = base_of(m, slot, layer), .slot = slot, .layer = layer };
        j.dst = (float *)(uintptr_t)a->copies[i].m.data;
        usli_pool_run(m->ctx->pool, j.w->m.rows, row_task, &j);
    }
}

usl_status usli_start_magnitudes(usl_model *m, usli_adapter *a) {
    if (!a->dora) return USL_OK;
    int64_t most = 0, out, in, layer;
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        usli_lora_shape(&m->config, slot, layer, &out, &in);
        if (a->modules[i].magnitude && in > most) most = in;
    }
    size_t bytes = (size_t)usli_pool_threads(m->ctx->pool) * (size_t)most * sizeof(float);
    float *scratch = usli_malloc(m->ctx, bytes);
    if (!scratch) return usli_nomem(m->ctx, bytes);
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        usli_lora_module *l = &a->modules[i];
        float *magnitude = l->magnitude;
        if (!magnitude) continue;
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        rows_job j = { .m = m, .a = a, .w = base_of(m, slot, layer), .slot = slot, .layer = layer };
        j.lengths = magnitude;
        j.scratch = scratch;
        l->magnitude = NULL; /* rows without it */
        usli_pool_run(m->ctx->pool, j.w->m.rows, row_task, &j);
        l->magnitude = magnitude;
    }
    usli_free(m->ctx, scratch);
    return USL_OK;
}

/* ---- PiSSA and LoftQ: a new base
 * --------------------------------------------------------------------------------------------------- */

static bool changes_base(const char *init) {
    return strncmp(init, "pissa", 5) == 0 || strcmp(init, "loftq") == 0;
}

bool usli_start_changes(const usli_adapter *a) {
    return changes_base(a->init);
}

/* -1: until it stands. */
static bool pissa_iterations(const char *init, int *out) {
    static const char NITER[] = "pissa_niter_";
    *out = -1;
    if (strcmp(init, "pissa") == 0) return true;
    if (strncmp(init, NITER, sizeof NITER - 1) != 0) return false;
    const char *p = init + sizeof NITER - 1;
    int n = 0;
    for (; *p >= '0' && *p <= '9' && n < 10000; p++) n = n * 10 + (*p - '0');
    *out = n;
    return !*p && p > init + sizeof NITER - 1;
}

usl_status usli_start_check(usl_model *m, const char *init) {
    static const char *const NAMES[] = { "default", "random", "gaussian", "loftq" };
    int iterations;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(init, NAMES[i]) == 0) return USL_OK;
    if (pissa_iterations(init, &iterations)) return USL_OK;
    return usli_fail(m->ctx, USL_ERR_INVALID,
                     "init_lora_weights: \"%s\" is not known; use true, false, \"gaussian\", \"pissa\", "
                     "\"pissa_niter_4\" (or another number) or \"loftq\"",
                     init);
}

static usl_status check_base(usl_model *m, const usli_adapter *a) {
    for (const usli_adapter *other = m->adapters; other; other = other->next)
        if (changes_base(other->init))
            return usli_fail(
                m->ctx, USL_ERR_INVALID,
                "the base was changed by init_lora_weights = \"%s\" of adapter \"%s\"; load the model anew "
                "for another adapter",
                other->init, other->name);
    if (!changes_base(a->init)) return USL_OK;
    if (usli_model_sharers(m))
        return usli_fail(
            m->ctx, USL_ERR_INVALID,
            "init_lora_weights = \"%s\" changes the base, which another model shares; open the model again "
            "for this adapter",
            a->init);
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        if (!a->modules[i].rank) continue;
        int64_t layer;
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        if (slot >= USLI_LINEARS)
            return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                             "init_lora_weights = \"%s\" is for the matrices of blocks; leave embed_tokens and lm_head "
                             "out of target_modules",
                             a->init);
        if (usli_slot_experts(&m->config, slot))
            return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                             "init_lora_weights = \"%s\" is for single matrices; leave the experts (%s) out of "
                             "target_modules",
                             a->init, usli_parameter_name(slot));
        usl_dtype type = usli_base_weight(m, slot, layer)->m.dtype;
        if (type != USL_F32 && type != USL_F16 && type != USL_BF16)
            return usli_fail(m->ctx, USL_ERR_INVALID,
                             "init_lora_weights = \"%s\" needs weights that are not quantised (these are %s); load the "
                             "model with load_in_4bit = false",
                             a->init, usl_dtype_name(type));
    }
    if (strcmp(a->init, "loftq") == 0 && ((a->loftq_bits != 4 && a->loftq_bits != 8) || a->loftq_iter < 1))
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "loftq_config: loftq_bits %d and loftq_iter %d; 4 or 8 bits and one pass or more are wanted",
                         a->loftq_bits, a->loftq_iter);
    return USL_OK;
}

/* A base weight that is to take another's place. */
typedef struct change {
    usli_storage *storage;
    usli_matrix m;
    usli_nf4 nf4;
} change;

typedef struct work {
    float *w, *rest, *u, *s, *v; /* (rows, cols) twice, (rows, rank), (rank), (rank, cols) */
} work;

/* rest = w - scale b a */
static void subtract(const work *k, int64_t rows, int64_t cols, int rank, float scale, const float *b, const float *a) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            float low = 0;
            for (int i = 0; i < rank; i++) low += b[r * rank + i] * a[i * cols + c];
            k->rest[r * cols + c] = k->w[r * cols + c] - scale * low;
        }
}

/* a = sqrt(s / scale) v, b = u sqrt(s / scale) */
static void split(const work *k, usli_lora_module *l, int64_t rows, int64_t cols, float scale) {
    for (int i = 0; i < l->rank; i++) {
        float root = sqrtf(k->s[i] / scale);
        for (int64_t c = 0; c < cols; c++) l->a[i * cols + c] = root * k->v[i * cols + c];
        for (int64_t r = 0; r < rows; r++) l->b[r * l->rank + i] = k->u[r * l->rank + i] * root;
    }
}

static usl_status pissa(usl_model *m, const usli_adapter *a, usli_lora_module *l, const usli_weight *w, const work *k,
                        change *out) {
    int iterations;
    int64_t rows = w->m.rows, cols = w->m.cols;
    pissa_iterations(a->init, &iterations);
    USLI_TRY(usli_svd(m->ctx, k->w, rows, cols, l->rank, iterations, k->u, k->s, k->v));
    split(k, l, rows, cols, l->scale);
    subtract(k, rows, cols, l->rank, l->scale, l->b, l->a);
    USLI_TRY(usli_storage_new(m->ctx, (size_t)(rows * cols) * usli_dtype_bytes(w->m.dtype), &out->storage));
    usli_from_f32(k->rest, out->storage->data, w->m.dtype, rows * cols);
    out->m = w->m;
    out->m.data = out->storage->data;
    return USL_OK;
}

/* NF4 without double quantisation: codes, then absmax. */
static void to_nf4(const float *src, int64_t n, change *out) {
    uint8_t *codes = out->storage->data;
    float *absmax = (float *)(void *)(codes + ((n + 1) / 2 + 63) / 64 * 64);
    usli_nf4_quantize_plain(usli_nf4_table, src, n, codes, absmax);
    out->nf4 = (usli_nf4){ .codes = codes, .absmax = absmax, .table = usli_nf4_table, .map = usli_dynamic_map };
}

/* Codes, then a scale for each row; values are rounded to float16 first, as bitsandbytes does. */
static void to_int8(const float *src, int64_t rows, int64_t cols, change *out) {
    int8_t *codes = out->storage->data;
    float *scales = (float *)(void *)((char *)out->storage->data + usli_int8_scales_at(rows, cols));
    for (int64_t r = 0; r < rows; r++) {
        const float *row = src + r * cols;
        float most = 0;
        for (int64_t c = 0; c < cols; c++) {
            float v = fabsf(usli_f16_to_f32(usli_f32_to_f16(row[c])));
            most = v > most ? v : most;
        }
        float factor = most > 0 ? 1.0f / most * 127.0f : 0; /* as torch divides a number by a tensor */
        scales[r] = most * USLI_INT8_STEP;
        for (int64_t c = 0; c < cols; c++)
            codes[r * cols + c] = (int8_t)rintf(usli_f16_to_f32(usli_f32_to_f16(row[c])) * factor);
    }
    out->m.data = codes;
    out->m.scale = scales;
}

/* In turn: what 4 or 8 bits leave over goes to the adapter, what the adapter leaves over into the bits. */
static usl_status loftq(usl_model *m, const usli_adapter *a, usli_lora_module *l, const usli_weight *w, const work *k,
                        change *out) {
    int64_t rows = w->m.rows, cols = w->m.cols, n = rows * cols;
    bool four = a->loftq_bits == 4;
    size_t bytes = four ? (size_t)(((n + 1) / 2 + 63) / 64 * 64) + (size_t)usli_nf4_blocks(n) * sizeof(float)
                        : usli_int8_scales_at(rows, cols) + (size_t)rows * sizeof(float);
    USLI_TRY(usli_storage_new(m->ctx, bytes, &out->storage));
    out->m = (usli_matrix){ .dtype = four ? USL_NF4 : USL_I8, .rows = rows, .cols = cols };
    memcpy(k->rest, k->w, (size_t)n * sizeof *k->rest);
    for (int i = 0; i < a->loftq_iter; i++) {
        if (i) subtract(k, rows, cols, l->rank, 1, l->b, l->a);
        if (four)
            to_nf4(k->rest, n, out);
        else
            to_int8(k->rest, rows, cols, out);
        usli_matrix now = out->m;
        now.nf4 = four ? &out->nf4 : NULL;
        for (int64_t r = 0; r < rows; r++) {
            float *rest = k->rest + r * cols;
            usli_matrix_read(&now, r, 0, cols, USL_F32, rest);
            for (int64_t c = 0; c < cols; c++) rest[c] = k->w[r * cols + c] - rest[c];
        }
        USLI_TRY(usli_svd(m->ctx, k->rest, rows, cols, l->rank, -1, k->u, k->s, k->v));
        split(k, l, rows, cols, 1);
    }
    return USL_OK;
}

static usl_status change_one(usl_model *m, usli_adapter *a, int64_t module, change *out) {
    usl_ctx *ctx = m->ctx;
    usli_lora_module *l = &a->modules[module];
    int64_t layer;
    usli_slot slot = usli_module_slot(&m->config, module, &layer);
    const usli_weight *w = usli_base_weight(m, slot, layer);
    size_t n = (size_t)(w->m.rows * w->m.cols), low = (size_t)l->rank * (size_t)(w->m.rows + w->m.cols + 1),
           bytes = (2 * n + low) * sizeof(float);
    float *room = usli_malloc(ctx, bytes);
    if (!room) return usli_nomem(ctx, bytes);
    work k = { room, room + n, room + 2 * n, NULL, NULL };
    k.s = k.u + w->m.rows * l->rank;
    k.v = k.s + l->rank;
    rows_job j = { .m = m, .w = w, .slot = slot, .layer = layer, .dst = k.w };
    usli_pool_run(ctx->pool, w->m.rows, row_task, &j);
    usl_status st = strcmp(a->init, "loftq") == 0 ? loftq(m, a, l, w, &k, out) : pissa(m, a, l, w, &k, out);
    usli_free(ctx, room);
    return st;
}

static void take_over(usl_model *m, int64_t module, change *c) {
    int64_t layer;
    usli_slot slot = usli_module_slot(&m->config, module, &layer);
    usli_weight *w = usli_base_weight(m, slot, layer);
    if (!c->storage) return;
    usli_storage_release(w->storage);
    w->storage = c->storage;
    w->m = c->m;
    w->nf4 = c->nf4;
    w->m.nf4 = c->m.dtype == USL_NF4 ? &w->nf4 : NULL;
    c->storage = NULL;
}

usl_status usli_start_base(usl_model *m, usli_adapter *a) {
    int64_t count = usli_module_count(&m->config);
    USLI_TRY(check_base(m, a));
    if (m->plan_only || !changes_base(a->init)) return USL_OK;
    change *changes = usli_calloc(m->ctx, (size_t)count, sizeof *changes);
    usl_status st = changes ? USL_OK : usli_nomem(m->ctx, (size_t)count * sizeof *changes);
    for (int64_t i = 0; st == USL_OK && i < count; i++) {
        st = usli_progress(m->ctx, a->init, (uint64_t)i, (uint64_t)count);
        if (st == USL_OK && a->modules[i].rank) st = change_one(m, a, i, &changes[i]);
    }
    if (st == USL_OK && strncmp(a->init, "pissa", 5) == 0 && !(a->start = usli_malloc(m->ctx, a->bytes)))
        st = usli_nomem(m->ctx, a->bytes);
    if (st == USL_OK && a->start) {
        memcpy(a->start, a->storage, a->bytes);
        for (int64_t i = 0; i < count; i++) {
            usli_lora_module *l = &a->modules[i];
            if (!l->rank) continue;
            l->start_a = a->start + (l->a - a->storage);
            l->start_b = a->start + (l->b - a->storage);
        }
    }
    bool change_now = st == USL_OK;
    if (change_now && !m->exec.backend->host) usli_model_unplace(m);
    for (int64_t i = 0; changes && i < count; i++) {
        if (change_now) take_over(m, i, &changes[i]);
        usli_storage_release(changes[i].storage);
    }
    usli_free(m->ctx, changes);
    m->placing++;
    return change_now ? usli_model_place(m) : st;
}

usl_status usli_start_values(usl_model *m, usli_adapter *a, uint64_t seed) {
    if (!changes_base(a->init)) start_plain(m, a, seed);
    return usli_start_base(m, a);
}
