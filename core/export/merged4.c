#include "core/export/merged4.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/pool.h"
#include "core/io/json.h"
#include "core/quant/nf4.h"

/* The tensors of a weight, in the order that they are written in. */
typedef enum part { CODES, ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP, STATE, PARTS } part;
static const char *const SUFFIX[PARTS] = {
    "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"
};
/* The largest error of a weight, relative, that NF4 explains: on normal values it is 0.093. */
static const double MOST_ERROR = 0.2;

bool usli_merged4_has(usli_slot slot) {
    return slot < USLI_LINEARS;
}

typedef struct packed {
    int64_t rows, cols, n;
    void *storage;
    usli_nf4 q;
    char state[512]; /* JSON */
    size_t bytes[PARTS];
    const void *data[PARTS];
} packed;

/* Of the state only its length is known before the weight is quantised: the offset has a fixed width, a space where a
 * sign would be. */
static void set_state(packed *p) {
    snprintf(p->state, sizeof p->state,
             "{\"quant_type\": \"nf4\", \"blocksize\": %d, \"dtype\": \"bfloat16\", \"shape\": [%lld, %lld], "
             "\"nested_blocksize\": %d, \"nested_dtype\": \"float32\", \"nested_offset\": % .9e}",
             USLI_NF4_BLOCK, (long long)p->rows, (long long)p->cols, USLI_NF4_NEST, (double)p->q.offset);
    p->data[STATE] = p->state;
    p->bytes[STATE] = strlen(p->state);
}

static void shape_of(const usl_model *m, usli_slot slot, int64_t layer, packed *p) {
    memset(p, 0, sizeof *p);
    usli_slot_shape(&m->config, slot, layer, &p->rows, &p->cols);
    p->n = p->rows * p->cols;
    p->bytes[CODES] = ((size_t)p->n + 1) / 2;
    p->bytes[ABSMAX] = (size_t)usli_nf4_blocks(p->n);
    p->bytes[QUANT_MAP] = sizeof usli_nf4_table;
    p->bytes[NESTED_ABSMAX] = (size_t)usli_nf4_nests(p->n) * sizeof(float);
    p->bytes[NESTED_MAP] = sizeof usli_dynamic_map;
    set_state(p);
}

uint64_t usli_merged4_bytes(const usl_model *m, usli_slot slot, int64_t layer) {
    packed p;
    uint64_t sum = 0;
    shape_of(m, slot, layer, &p);
    for (int i = 0; i < PARTS; i++) sum += p.bytes[i];
    return sum;
}

/* ---- Quantising ----------------------------------------------------------------------------------------------------
 */

typedef struct job {
    const usli_export_source *s;
    usli_slot slot;
    int64_t layer, cols;
    float *values;
} job;

static void row_task(void *arg, int64_t row, int worker) {
    const job *j = arg;
    (void)worker;
    usli_export_rows(j->s, j->slot, j->layer, row, 1, j->values + row * j->cols);
}

/* A weight that is NF4 already and has nothing merged goes out as it is. */
static usl_status quantise(const usli_export_source *s, usli_slot slot, int64_t layer, packed *p) {
    usl_ctx *ctx = s->m->ctx;
    const usli_matrix *w = &usli_export_weight(s, slot, layer)->m;
    bool merged = usli_export_is_merged(s, slot, layer);
    if (w->nf4 && !merged && w->nf4->absmax_q && w->nf4->map == usli_dynamic_map && w->nf4->table == usli_nf4_table) {
        p->q = *w->nf4;
    } else {
        size_t values = (size_t)(p->n + usli_nf4_blocks(p->n)) * sizeof(float);
        job j = { s, slot, layer, p->cols, usli_malloc_aligned(ctx, values) };
        p->storage = usli_malloc_aligned(ctx, usli_nf4_bytes(p->n));
        if (!j.values || !p->storage) {
            usli_free_aligned(ctx, j.values);
            return usli_nomem(ctx, values);
        }
        usli_pool_run(ctx->pool, p->rows, row_task, &j);
        usli_nf4_layout(p->storage, p->n, &p->q);
        usli_nf4_quantize(&p->q, j.values, p->n, j.values + p->n);
        usli_free_aligned(ctx, j.values);
    }
    p->data[CODES] = p->q.codes;
    p->data[ABSMAX] = p->q.absmax_q;
    p->data[QUANT_MAP] = usli_nf4_table;
    p->data[NESTED_ABSMAX] = p->q.absmax2;
    p->data[NESTED_MAP] = usli_dynamic_map;
    set_state(p);
    return USL_OK;
}

static usl_status describe(const usl_model *m, const char *name, const packed *p, usli_safetensors_writer *w,
                           const char *file, json_t *weight_map) {
    for (int i = 0; i < PARTS; i++) {
        char full[256];
        bool bytes = i == CODES || i == ABSMAX || i == STATE;
        int64_t shape[2] = { (int64_t)(p->bytes[i] / (bytes ? 1 : sizeof(float))), 1 };
        snprintf(full, sizeof full, "%s%s", name, SUFFIX[i]);
        USLI_TRY(usli_safetensors_add(w, full, bytes ? USL_U8 : USL_F32, i == CODES ? 2 : 1, shape));
        if (json_object_set_new(weight_map, full, json_string(file)) != 0) return usli_nomem(m->ctx, 0);
    }
    return USL_OK;
}

usl_status usli_merged4_put(const usli_export_source *s, usli_slot slot, int64_t layer, bool writing,
                            usli_safetensors_writer *w, const char *file, json_t *weight_map) {
    packed p;
    char name[160];
    shape_of(s->m, slot, layer, &p);
    usli_slot_name(&s->m->config, slot, layer, false, name, sizeof name);
    if (!writing) return describe(s->m, name, &p, w, file, weight_map);
    usl_status st = quantise(s, slot, layer, &p);
    for (int i = 0; i < PARTS && st == USL_OK; i++) st = usli_safetensors_write(w, p.data[i], p.bytes[i]);
    usli_free_aligned(s->m->ctx, p.storage);
    return st;
}

json_t *usli_merged4_config(void) {
    return json_pack("{s:s,s:b,s:b,s:s,s:s,s:s,s:b,s:s}", "quant_method", "bitsandbytes", "load_in_4bit", 1,
                     "load_in_8bit", 0, "bnb_4bit_quant_type", "nf4", "bnb_4bit_compute_dtype", "bfloat16",
                     "bnb_4bit_quant_storage", "uint8", "bnb_4bit_use_double_quant", 1, "_load_in_4bit", "true");
}

/* ---- Reading back --------------------------------------------------------------------------------------------------
 */

static usl_status find(usl_ctx *ctx, const usli_safetensors *file, const char *name, part i, size_t bytes,
                       const void **out) {
    char full[256];
    snprintf(full, sizeof full, "%s%s", name, SUFFIX[i]);
    const usli_file_tensor *t = usli_safetensors_find(file, full);
    if (!t || t->bytes != bytes)
        return usli_fail(ctx, USL_ERR_INTERNAL, "tensor \"%s\" is not in the file as it was written", full);
    *out = t->data;
    return USL_OK;
}

static usl_status compare(const usli_export_source *s, const usli_safetensors *file, usli_slot slot, int64_t layer,
                          float *rows, double *error, double *size) {
    usl_ctx *ctx = s->m->ctx;
    char name[160];
    packed p;
    const void *codes, *absmax, *absmax2, *state;
    shape_of(s->m, slot, layer, &p);
    usli_slot_name(&s->m->config, slot, layer, false, name, sizeof name);
    USLI_TRY(find(ctx, file, name, CODES, p.bytes[CODES], &codes));
    USLI_TRY(find(ctx, file, name, ABSMAX, p.bytes[ABSMAX], &absmax));
    USLI_TRY(find(ctx, file, name, NESTED_ABSMAX, p.bytes[NESTED_ABSMAX], &absmax2));
    USLI_TRY(find(ctx, file, name, STATE, p.bytes[STATE], &state));
    json_t *json;
    USLI_TRY(usli_json_parse(ctx, name, state, p.bytes[STATE], &json));
    p.q = (usli_nf4){ .codes = codes,
                      .absmax_q = absmax,
                      .offset = (float)json_number_value(json_object_get(json, "nested_offset")),
                      .table = usli_nf4_table,
                      .map = usli_dynamic_map };
    json_decref(json);
    /* Floats may stand anywhere in a file. */
    float *aligned = usli_malloc(ctx, p.bytes[NESTED_ABSMAX]);
    if (!aligned) return usli_nomem(ctx, p.bytes[NESTED_ABSMAX]);
    memcpy(aligned, absmax2, p.bytes[NESTED_ABSMAX]);
    p.q.absmax2 = aligned;
    double off = 0, sum = 0;
    for (int64_t r = 0; r < p.rows; r += 1 + p.rows / 64) {
        usli_export_rows(s, slot, layer, r, 1, rows);
        usli_nf4_decode(&p.q, r * p.cols, p.cols, rows + p.cols);
        for (int64_t c = 0; c < p.cols; c++) {
            double d = (double)rows[p.cols + c] - (double)rows[c];
            off += d * d;
            sum += (double)rows[c] * (double)rows[c];
        }
    }
    usli_free(ctx, aligned);
    *error += off;
    *size += sum;
    if (!(off <= MOST_ERROR * MOST_ERROR * sum))
        return usli_fail(ctx, USL_ERR_NUMERIC, "%s differs by %.2g from what was exported, more than 4 bits explain",
                         name, sqrt(off / sum));
    return USL_OK;
}

usl_status usli_merged4_check(const usli_export_source *s, const usli_tokenizer *tok, const char *path,
                              const char *name, usl_export_report *report) {
    usl_model *m = s->m;
    usl_ctx *ctx = m->ctx;
    usli_safetensors *file = NULL;
    usli_tokenizer *read = NULL;
    float *rows = NULL;
    double error = 0, size = 0;
    int64_t most = 0, shape[2];
    usl_status st;
    for (int k = 0; k < USLI_LINEARS; k++)
        if (usli_slot_shape(&m->config, (usli_slot)k, 0, &shape[0], &shape[1]) && shape[1] > most) most = shape[1];
    USLI_TRYGO(usli_safetensors_open(ctx, path, &file));
    if (!(rows = usli_malloc(ctx, 2 * (size_t)most * sizeof *rows))) {
        st = usli_nomem(ctx, 2 * (size_t)most * sizeof *rows);
        goto done;
    }
    for (int64_t i = 0; i < usli_export_slots(m); i++) {
        usli_slot slot;
        int64_t layer;
        if (!usli_export_slot(m, i, &slot, &layer) || !usli_merged4_has(slot)) continue;
        USLI_TRYGO(compare(s, file, slot, layer, rows, &error, &size));
    }
    if (tok) {
        USLI_TRYGO(usli_tokenizer_open(ctx, path, &read));
        USLI_TRYGO(usli_export_check_tokenizer(ctx, tok, read, name));
    }
    report->checked = 1;
    report->weights = size > 0 ? sqrt(error / size) : 0;
    report->logits = report->expected = NAN; /* four bits are not run here to see */
done:
    usli_tokenizer_release(read);
    usli_safetensors_close(file);
    usli_free(ctx, rows);
    return st == USL_ERR_NUMERIC ? usli_fail_prefix(ctx, "%s", name) : st;
}
