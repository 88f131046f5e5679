/* Weights that bitsandbytes quantised, as transformers publishes them:
 *
 *   4 bits   NAME            two codes a byte        NAME.quant_state.bitsandbytes__nf4 (or __fp4)  JSON
 *            NAME.absmax     float32, or codes of    NAME.nested_absmax, NAME.nested_quant_map and the state's offset
 *            NAME.quant_map  the 16 values
 *   8 bits   NAME  int8 (rows, cols)                 MODULE.SCB  float32, what 127 stands for in each row
 *
 * They are frozen weights as they are, never quantised again. Blocks of 64 values and nests of 256 are ours; others
 * become an absmax for each 64 values, which changes no number. */
#include "core/model/bnb.h"

#include <string.h>

#include "core/base/dtype.h"
#include "core/cpu/decode.h"
#include "core/io/json.h"

static const usli_file_tensor *beside(const usli_source *src, const usli_file_tensor *t, const char *suffix) {
    char name[256];
    snprintf(name, sizeof name, "%s%s", t->name, suffix);
    return usli_safetensors_find(src->safetensors, name);
}

/* "....q_proj.weight": "....q_proj.SCB" */
static const usli_file_tensor *scales_of(const usli_source *src, const usli_file_tensor *t) {
    char name[256];
    const char *last = strrchr(t->name, '.');
    if (!last) return NULL;
    snprintf(name, sizeof name, "%.*s.SCB", (int)(last - t->name), t->name);
    return usli_safetensors_find(src->safetensors, name);
}

bool usli_bnb_is(const usli_source *src, const usli_file_tensor *t) {
    if (!src->safetensors) return false;
    return beside(src, t, ".absmax") || (t->dtype == USL_I8 && scales_of(src, t));
}

/* ---- 4 bits --------------------------------------------------------------------------------------------------------
 */

typedef struct state {
    const float *table; /* usli_nf4_table or usli_fp4_table */
    int64_t block, nested_block, rows, cols;
    double offset;
    const usli_file_tensor *absmax, *nested_absmax, *nested_map;
    int64_t blocks, nests;
} state;

static usl_status bad(const usl_model *m, const usli_file_tensor *t, const char *what) {
    return usli_fail(m->ctx, USL_ERR_FORMAT, "%s: tensor \"%s\": %s; fetch the file again", m->path, t->name, what);
}

static usl_status read_json(const usl_model *m, const usli_file_tensor *t, const usli_file_tensor *text, state *s) {
    json_t *j;
    USLI_TRY(usli_json_parse(m->ctx, text->name, text->data, text->bytes, &j));
    const json_t *shape = json_object_get(j, "shape");
    const char *type = json_string_value(json_object_get(j, "quant_type"));
    s->block = json_integer_value(json_object_get(j, "blocksize"));
    s->nested_block = json_integer_value(json_object_get(j, "nested_blocksize"));
    s->offset = json_number_value(json_object_get(j, "nested_offset"));
    s->rows = json_integer_value(json_array_get(shape, 0));
    s->cols = json_integer_value(json_array_get(shape, 1));
    bool known = type && (strcmp(type, "nf4") == 0 || strcmp(type, "fp4") == 0);
    if (known) s->table = strcmp(type, "nf4") == 0 ? usli_nf4_table : usli_fp4_table;
    bool sound = known && json_array_size(shape) == 2 && s->rows > 0 && s->cols > 0 && s->rows < INT32_MAX &&
                 s->cols < INT32_MAX && s->block > 0 && s->block <= 1 << 20 && s->nested_block >= 0;
    json_decref(j);
    return sound ? USL_OK : bad(m, t, "its quant_state cannot be understood");
}

static bool is_floats(const usli_file_tensor *t, int64_t n) {
    return t && t->dtype == USL_F32 && t->bytes == (size_t)n * sizeof(float);
}

static usl_status read_state(const usl_model *m, const usli_source *src, const usli_file_tensor *t, state *s) {
    const usli_file_tensor *text = beside(src, t, ".quant_state.bitsandbytes__nf4");
    *s = (state){ .block = 0 };
    if (!text) text = beside(src, t, ".quant_state.bitsandbytes__fp4");
    if (!text) return bad(m, t, "there is no quant_state beside its absmax");
    USLI_TRY(read_json(m, t, text, s));
    int64_t n = s->rows * s->cols;
    s->absmax = beside(src, t, ".absmax");
    s->blocks = (n + s->block - 1) / s->block;
    if (t->bytes != (size_t)((n + 1) / 2)) return bad(m, t, "it has another length than its quant_state says");
    const usli_file_tensor *map = beside(src, t, ".quant_map");
    if (map && (!is_floats(map, 16) || memcmp(map->data, s->table, 16 * sizeof(float)) != 0))
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "%s: tensor \"%s\" has a quant_map that is neither NF4's nor FP4's; use the 16-bit model with "
                         "load_in_4bit = true",
                         m->path, t->name);
    if (s->absmax->dtype == USL_F32)
        return is_floats(s->absmax, s->blocks) ? USL_OK : bad(m, t, "its absmax has another length");
    s->nested_absmax = beside(src, t, ".nested_absmax");
    s->nested_map = beside(src, t, ".nested_quant_map");
    if (s->absmax->dtype != USL_U8 || s->absmax->bytes != (size_t)s->blocks || s->nested_block < 1)
        return bad(m, t, "its absmax has another length or type");
    s->nests = (s->blocks + s->nested_block - 1) / s->nested_block;
    if (!is_floats(s->nested_absmax, s->nests) || !is_floats(s->nested_map, 256))
        return bad(m, t, "its nested absmax has another length or type");
    return USL_OK;
}

/* Numbers in a file stand at any address. */
static float float_at(const usli_file_tensor *t, int64_t i) {
    float v;
    memcpy(&v, (const char *)t->data + (size_t)i * sizeof v, sizeof v);
    return v;
}

static float absmax_at(const state *s, int64_t block) {
    if (!s->nested_absmax) return float_at(s->absmax, block);
    float v = float_at(s->nested_map, ((const uint8_t *)s->absmax->data)[block]);
    return v * float_at(s->nested_absmax, block / s->nested_block) + (float)s->offset;
}

/* With our blocks, nests and map the bytes are ours already. */
static bool is_ours(const state *s) {
    if (!s->nested_absmax || s->block != USLI_NF4_BLOCK || s->nested_block != USLI_NF4_NEST) return false;
    return memcmp(s->nested_map->data, usli_dynamic_map, 256 * sizeof(float)) == 0;
}

static size_t codes_bytes(int64_t n) {
    return ((size_t)((n + 1) / 2) + 63) & ~(size_t)63;
}

static usl_status load_4bit(usl_model *m, const usli_source *src, const usli_file_tensor *t, usli_weight *w) {
    state s;
    USLI_TRY(read_state(m, src, t, &s));
    int64_t n = s.rows * s.cols, blocks = usli_nf4_blocks(n);
    bool ours = is_ours(&s);
    size_t bytes = ours ? usli_nf4_bytes(n) : codes_bytes(n) + (size_t)blocks * sizeof(float);
    USLI_TRY((m->plan_only ? usli_storage_plan : usli_storage_new)(m->ctx, bytes, &w->storage));
    char *to = w->storage->data;
    if (ours) {
        usli_nf4_layout(to, n, &w->nf4);
        w->nf4.offset = (float)s.offset;
    } else {
        w->nf4 =
            (usli_nf4){ .codes = (const uint8_t *)to, .absmax = (const float *)(const void *)(to + codes_bytes(n)) };
        w->nf4.map = usli_dynamic_map;
    }
    w->nf4.table = s.table;
    w->m = (usli_matrix){
        .dtype = s.table == usli_nf4_table ? USL_NF4 : USL_FP4, .rows = s.rows, .cols = s.cols, .nf4 = &w->nf4
    };
    if (m->plan_only) return USL_OK;
    memcpy(to, t->data, t->bytes);
    if (ours) {
        memcpy((void *)(uintptr_t)w->nf4.absmax_q, s.absmax->data, s.absmax->bytes);
        memcpy((void *)(uintptr_t)w->nf4.absmax2, s.nested_absmax->data, s.nested_absmax->bytes);
        return USL_OK;
    }
    for (int64_t b = 0; b < blocks; b++)
        ((float *)(uintptr_t)w->nf4.absmax)[b] = absmax_at(&s, b * USLI_NF4_BLOCK / s.block);
    return USL_OK;
}

/* ---- 8 bits --------------------------------------------------------------------------------------------------------
 */

static usl_status load_8bit(usl_model *m, const usli_source *src, const usli_file_tensor *t, usli_weight *w) {
    const usli_file_tensor *scb = scales_of(src, t);
    int64_t rows = t->shape[0], cols = t->shape[1];
    size_t at = usli_int8_scales_at(rows, cols);
    USLI_TRY(
        (m->plan_only ? usli_storage_plan : usli_storage_new)(m->ctx, at + (size_t)rows * sizeof(float), &w->storage));
    char *to = w->storage->data;
    float *scales = (float *)(void *)(to + at);
    w->m = (usli_matrix){ .dtype = USL_I8, .rows = rows, .cols = cols, .data = to, .scale = scales };
    if (m->plan_only) return USL_OK;
    memcpy(to, t->data, t->bytes);
    for (int64_t r = 0; r < rows; r++) scales[r] = float_at(scb, r) * USLI_INT8_STEP;
    return USL_OK;
}

/* ---- Both ----------------------------------------------------------------------------------------------------------
 */

usl_status usli_bnb_shape(const usl_model *m, const usli_source *src, const usli_file_tensor *t, int64_t *rows,
                          int64_t *cols) {
    if (t->dtype != USL_I8) {
        state s;
        USLI_TRY(read_state(m, src, t, &s));
        *rows = s.rows;
        *cols = s.cols;
        return USL_OK;
    }
    *rows = t->shape[0];
    *cols = t->ndim == 2 ? t->shape[1] : 0;
    if (t->ndim != 2 || !is_floats(scales_of(src, t), *rows)) return bad(m, t, "its SCB has another length or type");
    return USL_OK;
}

/* What is trained is float32. */
static usl_status decode(usl_model *m, usli_weight *w) {
    usli_storage *floats;
    int64_t rows = w->m.rows, cols = w->m.cols;
    size_t bytes = (size_t)(rows * cols) * sizeof(float);
    USLI_TRY((m->plan_only ? usli_storage_plan : usli_storage_new)(m->ctx, bytes, &floats));
    for (int64_t r = 0; r < rows && !m->plan_only; r++)
        usli_matrix_read(&w->m, r, 0, cols, USL_F32, (float *)floats->data + r * cols);
    usli_storage_release(w->storage);
    w->storage = floats;
    w->m = (usli_matrix){ .dtype = USL_F32, .rows = rows, .cols = cols, .data = floats->data };
    return USL_OK;
}

usl_status usli_bnb_load(usl_model *m, const usli_source *src, const usli_file_tensor *t, usli_weight *w) {
    if (t->dtype == USL_I8) {
        USLI_TRY(load_8bit(m, src, t, w));
        return m->full ? decode(m, w) : USL_OK;
    }
    state s;
    USLI_TRY(read_state(m, src, t, &s));
    if (s.block % USLI_NF4_BLOCK)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "%s: tensor \"%s\" has blocks of %lld values; blocks of 64 or a multiple are read: use the "
                         "16-bit model with load_in_4bit = true",
                         m->path, t->name, (long long)s.block);
    USLI_TRY(load_4bit(m, src, t, w));
    return m->full ? decode(m, w) : USL_OK;
}

usl_status usli_bnb_check_config(usl_ctx *ctx, const char *name, const json_t *quantization) {
    const char *method = json_string_value(json_object_get(quantization, "quant_method"));
    bool bits = json_is_true(json_object_get(quantization, "load_in_4bit")) ||
                json_is_true(json_object_get(quantization, "load_in_8bit"));
    if (method ? strcmp(method, "bitsandbytes") == 0 : bits) return USL_OK;
    return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                     "%s: the checkpoint is quantised by %s (quantization_config), which is not read; use the 16-bit "
                     "model with load_in_4bit = true, one that bitsandbytes quantised (-bnb-4bit), or a GGUF",
                     name, method ? method : "a method without a name");
}
