/* Weights are mapped, not read, wherever their bytes can be used as they are. Copied are: norms and biases (float32,
 * small), everything that is trained (float32), q and k of a GGUF whose rows are in interleaved order, what becomes
 * NF4. */
#include "core/model/load.h"

#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/base/rng.h"
#include "core/io/json.h"
#include "core/model/bnb.h"
#include "core/quant/traits.h"

/* ---- Sources
 * ---------------------------------------------------------------------------------------------------------------- */

static usl_status open_folder(usl_ctx *ctx, const char *path, usli_source *src, usli_config *config) {
    char *config_path = usli_path_join(ctx, path, "config.json"),
         *gen_path = usli_path_join(ctx, path, "generation_config.json");
    json_t *json = NULL, *generation = NULL;
    usl_status st = USL_OK;
    if (!config_path || !gen_path) {
        st = usli_nomem(ctx, strlen(path));
        goto done;
    }
    if (!usli_is_file(config_path)) {
        st = usli_fail(ctx, USL_ERR_NOT_FOUND,
                       "%s: there is no config.json; give a Hugging Face model folder or a .gguf file", path);
        goto done;
    }
    USLI_TRYGO(usli_json_load(ctx, config_path, &json));
    if (usli_is_file(gen_path)) USLI_TRYGO(usli_json_load(ctx, gen_path, &generation));
    USLI_TRYGO(usli_config_from_json(ctx, config_path, json, generation, config));
    USLI_TRYGO(usli_safetensors_open(ctx, path, &src->safetensors));
done:
    if (json) json_decref(json);
    if (generation) json_decref(generation);
    usli_free(ctx, config_path);
    usli_free(ctx, gen_path);
    return st;
}

usl_status usli_source_open(usl_ctx *ctx, const char *path, usli_source *src, usli_config *config) {
    *src = (usli_source){ NULL, NULL };
    if (usli_is_dir(path)) return open_folder(ctx, path, src, config);
    if (!usli_is_file(path))
        return usli_fail(ctx, USL_ERR_NOT_FOUND, "%s: there is no such model folder or .gguf file", path);
    size_t n = strlen(path);
    if (n > 12 && strcmp(path + n - 12, ".safetensors") == 0)
        return usli_fail(ctx, USL_ERR_INVALID, "%s: give the folder that holds it together with config.json", path);
    USLI_TRY(usli_gguf_open(ctx, path, &src->gguf));
    return usli_config_from_gguf(ctx, src->gguf, config);
}

void usli_source_close(usli_source *src) {
    usli_safetensors_close(src->safetensors);
    usli_gguf_close(src->gguf);
}

/* ---- One tensor
 * ----------------------------------------------------------------------------------------------------------------- */

static const usli_file_tensor *find_named(const usli_source *src, const char *name) {
    char spelling[192];
    const usli_file_tensor *t = NULL;
    if (src->gguf) return usli_gguf_tensor(src->gguf, name);
    for (int i = 0; !t && usli_name_spelling(i, name, spelling, sizeof spelling); i++)
        t = usli_safetensors_find(src->safetensors, spelling);
    return t;
}

static usl_status find_tensor(usl_model *m, const usli_source *src, usli_slot slot, int64_t layer,
                              const usli_file_tensor **out) {
    char name[160];
    int64_t rows, cols;
    usli_slot_shape(&m->config, slot, layer, &rows, &cols);
    usli_slot_name(&m->config, slot, layer, src->gguf != NULL, name, sizeof name);
    const usli_file_tensor *t = find_named(src, name);
    if (!t && slot == USLI_HEAD && !src->gguf) /* a base that was saved tied, whatever its config says */
        t = find_named(src, "model.embed_tokens.weight");
    if (!t) return usli_fail(m->ctx, USL_ERR_FORMAT, "%s: tensor \"%s\" is missing", m->path, name);
    if (cols && usli_bnb_is(src, t)) {
        int64_t own_rows, own_cols;
        USLI_TRY(usli_bnb_shape(m, src, t, &own_rows, &own_cols));
        *out = t;
        if (own_rows == rows && own_cols == cols) return USL_OK;
        return usli_fail(m->ctx, USL_ERR_SHAPE, "%s: tensor \"%s\" has shape %lldx%lld; config says %lldx%lld", m->path,
                         name, (long long)own_rows, (long long)own_cols, (long long)rows, (long long)cols);
    }
    bool fits = cols ? t->ndim == 2 && t->shape[0] == rows && t->shape[1] == cols : t->ndim == 1 && t->shape[0] == rows;
    if (!fits)
        return usli_fail(m->ctx, USL_ERR_SHAPE, "%s: tensor \"%s\" has shape %lldx%lld; config says %lldx%lld", m->path,
                         name, (long long)(t->ndim > 0 ? t->shape[0] : 1), (long long)(t->ndim > 1 ? t->shape[1] : 1),
                         (long long)rows, (long long)(cols ? cols : 1));
    const usli_traits *traits = usli_traits_of(t->dtype);
    if (!traits || !traits->decode)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: tensor \"%s\" has type %s, which cannot be decoded here",
                         m->path, name, usl_dtype_name(t->dtype));
    *out = t;
    return USL_OK;
}

usl_status usli_source_check(usl_ctx *ctx, const char *path, const usli_source *src, const usli_config *config) {
    usl_model m = { .ctx = ctx, .path = (char *)(uintptr_t)path, .config = *config };
    const usli_file_tensor *t;
    int64_t rows, cols;
    for (int64_t l = 0; l < config->layers; l++)
        for (int s = 0; s < USLI_LAYER_SLOTS; s++)
            if (usli_slot_shape(config, (usli_slot)s, l, &rows, &cols))
                USLI_TRY(find_tensor(&m, src, (usli_slot)s, l, &t));
    for (int s = USLI_EMBED; s < USLI_SLOTS; s++)
        if (usli_slot_shape(config, (usli_slot)s, 0, &rows, &cols)) USLI_TRY(find_tensor(&m, src, (usli_slot)s, 0, &t));
    return USL_OK;
}

static void set_plain(usli_weight *w, usl_dtype dtype, int64_t rows, int64_t cols) {
    w->m = (usli_matrix){ .dtype = dtype, .rows = rows, .cols = cols, .data = w->storage->data };
}

static usl_status new_storage(usl_model *m, size_t bytes, usli_storage **out) {
    return m->plan_only ? usli_storage_plan(m->ctx, bytes, out) : usli_storage_new(m->ctx, bytes, out);
}

static usl_status load_float(usl_model *m, const usli_file_tensor *t, usli_weight *w, int64_t rows, int64_t cols) {
    USLI_TRY(new_storage(m, (size_t)(rows * cols) * sizeof(float), &w->storage));
    set_plain(w, USL_F32, rows, cols);
    if (m->plan_only) return USL_OK;
    size_t elem = usli_dtype_bytes(t->dtype);
    void *copy = NULL; /* where numbers stand at odd addresses */
    if (elem && (uintptr_t)t->data % elem) {
        if (!(copy = usli_malloc(m->ctx, t->bytes))) return usli_nomem(m->ctx, t->bytes);
        memcpy(copy, t->data, t->bytes);
    }
    usli_traits_of(t->dtype)->decode(copy ? copy : t->data, w->storage->data, rows * cols);
    usli_free(m->ctx, copy);
    return USL_OK;
}

static usl_status load_mapped(usl_model *m, const usli_file_tensor *t, usli_weight *w, int64_t rows, int64_t cols) {
    /* A safetensors file may put a float at any address; kernels want them aligned. */
    size_t elem = usli_dtype_bytes(t->dtype);
    if (m->plan_only) {
        USLI_TRY(usli_storage_plan(m->ctx, t->bytes, &w->storage));
    } else if (elem && (uintptr_t)t->data % elem) {
        USLI_TRY(usli_storage_new(m->ctx, t->bytes, &w->storage));
        memcpy(w->storage->data, t->data, t->bytes);
    } else {
        USLI_TRY(usli_storage_map(m->ctx, t->map, t->data, t->bytes, &w->storage));
    }
    set_plain(w, t->dtype, rows, cols);
    return USL_OK;
}

/* q and k of a llama GGUF: back to the order of half-split rope, row by row, whatever the block type. */
static usl_status unpermute(usl_model *m, usli_weight *w) {
    usli_storage *fixed;
    size_t row = w->storage->bytes / (size_t)w->m.rows;
    USLI_TRY(usli_storage_new(m->ctx, w->storage->bytes, &fixed));
    for (int64_t r = 0; r < w->m.rows; r++)
        memcpy((char *)fixed->data + (size_t)r * row,
               (const char *)w->storage->data + (size_t)usli_gguf_qk_row(r, m->config.head_dim) * row, row);
    usli_storage_release(w->storage);
    w->storage = fixed;
    w->m.data = fixed->data;
    return USL_OK;
}

static usl_status load_one(usl_model *m, const usli_source *src, usli_slot slot, int64_t layer) {
    int64_t rows, cols;
    if (!usli_slot_shape(&m->config, slot, layer, &rows, &cols)) return USL_OK;
    const usli_file_tensor *t = NULL;
    USLI_TRY(find_tensor(m, src, slot, layer, &t));
    usli_weight *w = usli_model_weight(m, slot, layer);
    if (cols && usli_bnb_is(src, t)) return usli_bnb_load(m, src, t, w);
    if (!cols)
        USLI_TRY(load_float(m, t, w, 1, rows));
    else if (m->full || t->dtype == USL_F64)
        USLI_TRY(load_float(m, t, w, rows, cols));
    else
        USLI_TRY(load_mapped(m, t, w, rows, cols));
    if (!src->gguf || m->plan_only) return USL_OK;
    for (int64_t i = 0; usli_slot_is_norm(slot) && i < rows; i++)
        ((float *)w->storage->data)[i] -= m->config.arch->norm_offset;
    if (m->config.arch->gguf_permuted && usli_slot_turns(slot)) {
        if (!cols) w->m.rows = rows; /* a bias: one value a row */
        USLI_TRY(unpermute(m, w));
        if (!cols) w->m.rows = 1;
    }
    return USL_OK;
}

/* ---- NF4
 * ----------------------------------------------------------------------------------------------------------------------------
 */

typedef struct quantize_job {
    usl_model *m;
    usli_weight **list;
    float **scratch; /* a worker's: decoded values, then absmax */
} quantize_job;

static void quantize_task(void *arg, int64_t task, int worker) {
    quantize_job *job = arg;
    usli_weight *w = job->list[task];
    int64_t n = w->m.rows * w->m.cols;
    float *values = job->scratch[worker];
    usli_traits_of(w->m.dtype)->decode(w->m.data, values, n);
    usli_nf4_quantize(&w->nf4, values, n, values + n);
}

static bool wants_nf4(const usli_weight *w) {
    return w->storage && (w->m.dtype == USL_F32 || w->m.dtype == USL_F16 || w->m.dtype == USL_BF16);
}

/* Layer by layer, so that the 16-bit pages of a big checkpoint come and go. */
static usl_status quantize_layer(usl_model *m, int64_t layer, float **scratch) {
    usli_weight *list[USLI_LINEARS];
    usli_storage *made[USLI_LINEARS];
    int64_t count = 0;
    for (int s = 0; s < USLI_LINEARS; s++) {
        usli_weight *w = usli_model_weight(m, (usli_slot)s, layer);
        if (!wants_nf4(w)) continue;
        usl_status st = new_storage(m, usli_nf4_bytes(w->m.rows * w->m.cols), &made[count]);
        if (st != USL_OK) {
            while (count) usli_storage_release(made[--count]);
            return st;
        }
        usli_nf4_layout(made[count]->data, w->m.rows * w->m.cols, &w->nf4);
        list[count++] = w;
    }
    quantize_job job = { m, list, scratch };
    if (!m->plan_only) usli_pool_run(m->ctx->pool, count, quantize_task, &job);
    for (int64_t i = 0; i < count; i++) {
        usli_storage_release(list[i]->storage);
        list[i]->storage = made[i];
        list[i]->m.dtype = USL_NF4;
        list[i]->m.data = NULL;
        list[i]->m.nf4 = &list[i]->nf4;
    }
    return USL_OK;
}

static usl_status quantize(usl_model *m, int64_t layers) {
    usl_ctx *ctx = m->ctx;
    int64_t most = 0, rows, cols;
    for (int64_t l = 0; l < layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++)
            if (usli_slot_shape(&m->config, (usli_slot)s, l, &rows, &cols) && rows * cols > most) most = rows * cols;
    int workers = usli_pool_threads(ctx->pool);
    size_t each = (size_t)(most + usli_nf4_blocks(most)) * sizeof(float);
    float **scratch = usli_calloc(ctx, (size_t)workers, sizeof *scratch);
    usl_status st = scratch ? USL_OK : usli_nomem(ctx, sizeof *scratch);
    for (int i = 0; st == USL_OK && i < workers && !m->plan_only; i++)
        if (!(scratch[i] = usli_malloc_aligned(ctx, each))) st = usli_nomem(ctx, each);
    for (int64_t l = 0; st == USL_OK && l < layers; l++) {
        st = usli_progress(ctx, "quantising", (uint64_t)l, (uint64_t)layers);
        if (st == USL_OK) st = quantize_layer(m, l, scratch);
    }
    for (int i = 0; scratch && i < workers; i++) usli_free_aligned(ctx, scratch[i]);
    usli_free(ctx, scratch);
    return st;
}

/* ---- All of them
 * ----------------------------------------------------------------------------------------------------------------------
 */

static usl_status make_table(usl_model *m) {
    size_t count = (size_t)m->config.layers * USLI_LAYER_SLOTS + (USLI_SLOTS - USLI_EMBED);
    m->weights = usli_calloc(m->ctx, count, sizeof *m->weights);
    return m->weights ? USL_OK : usli_nomem(m->ctx, count * sizeof *m->weights);
}

static usl_status load_divisors(usl_model *m, const usli_gguf *g) {
    const usli_file_tensor *t = usli_gguf_tensor(g, "rope_freqs.weight");
    if (!t) return USL_OK;
    int64_t half = m->config.rot_dim / 2;
    if (t->dtype != USL_F32 || t->ndim != 1 || t->shape[0] != half)
        return usli_fail(m->ctx, USL_ERR_SHAPE, "%s: rope_freqs.weight does not hold %lld float32 values", m->path,
                         (long long)half);
    if (!(m->rope_divisors = usli_malloc(m->ctx, (size_t)half * sizeof(float))))
        return usli_nomem(m->ctx, (size_t)half * 4);
    memcpy(m->rope_divisors, t->data, (size_t)half * sizeof(float));
    return USL_OK;
}

usl_status usli_load_weights(usl_model *m, const usli_source *src, bool load_in_4bit) {
    USLI_TRY(make_table(m));
    if (src->gguf) USLI_TRY(load_divisors(m, src->gguf));
    for (int s = USLI_EMBED; s < USLI_SLOTS; s++) USLI_TRY(load_one(m, src, (usli_slot)s, 0));
    for (int64_t l = 0; l < m->config.layers; l++) {
        USLI_TRY(usli_progress(m->ctx, "loading", (uint64_t)l, (uint64_t)m->config.layers));
        for (int s = 0; s < USLI_LAYER_SLOTS; s++) USLI_TRY(load_one(m, src, (usli_slot)s, l));
    }
    return load_in_4bit && !m->config.quantised ? quantize(m, m->config.layers) : USL_OK;
}

typedef struct random_job {
    usli_weight *w;
    uint64_t key;
    double deviation;
} random_job;

/* Values come in pairs from one Philox block each, by their place alone. */
static void random_row(void *arg, int64_t row, int worker) {
    const random_job *j = arg;
    (void)worker;
    int64_t cols = j->w->m.cols;
    size_t e = usli_dtype_bytes(j->w->m.dtype);
    char *dst = (char *)j->w->storage->data + (size_t)(row * cols) * e;
    for (int64_t i = 0; i < cols; i += 4) {
        uint32_t word[4];
        float v[4];
        usli_philox(j->key, (uint64_t)i, (uint64_t)row, word);
        for (int k = 0; k < 4; k += 2) {
            float u = ((float)(word[k] >> 8) + 0.5f) * 0x1p-24f,
                  angle = (float)(word[k + 1] >> 8) * (6.2831853f * 0x1p-24f);
            float radius = sqrtf(-2.0f * logf(u)) * (float)j->deviation;
            v[k] = radius * cosf(angle);
            v[k + 1] = radius * sinf(angle);
        }
        usli_from_f32(v, dst + (size_t)i * e, j->w->m.dtype, cols - i < 4 ? cols - i : 4);
    }
}

static usl_status random_one(usl_model *m, usli_slot slot, int64_t layer, uint64_t seed, usl_dtype dtype) {
    int64_t rows, cols;
    if (!usli_slot_shape(&m->config, slot, layer, &rows, &cols)) return USL_OK;
    usli_weight *w = usli_model_weight(m, slot, layer);
    if (!cols) {
        USLI_TRY(new_storage(m, (size_t)rows * sizeof(float), &w->storage));
        set_plain(w, USL_F32, 1, rows);
        if (m->plan_only) return USL_OK;
        for (int64_t i = 0; i < rows; i++)
            ((float *)w->storage->data)[i] = usli_slot_is_norm(slot) ? 1.0f - m->config.arch->norm_offset : 0.0f;
        return USL_OK;
    }
    USLI_TRY(new_storage(m, (size_t)(rows * cols) * usli_dtype_bytes(dtype), &w->storage));
    set_plain(w, dtype, rows, cols);
    if (m->plan_only) return USL_OK;
    random_job job = { w, seed ^ ((uint64_t)slot << 56) ^ ((uint64_t)layer << 40), m->config.init_range };
    usli_pool_run(m->ctx->pool, rows, random_row, &job);
    return USL_OK;
}

enum { SHARED_FROM = 1 << 24 };

/* Layer l has the storages of layer 0. */
static void share_layer(usl_model *m, int64_t l) {
    for (int s = 0; s < USLI_LAYER_SLOTS; s++) {
        usli_weight *w = usli_model_weight(m, (usli_slot)s, l);
        *w = *usli_model_weight(m, (usli_slot)s, 0);
        if (w->storage) usli_storage_retain(w->storage);
        if (w->m.nf4) w->m.nf4 = &w->nf4;
    }
}

usl_status usli_random_weights(usl_model *m, uint64_t seed, bool load_in_4bit, usl_dtype dtype) {
    if (m->full)
        dtype = USL_F32;
    else if (dtype == USL_DTYPE_AUTO)
        dtype = USL_BF16;
    int64_t cols;
    USLI_TRY(make_table(m));
    for (int s = USLI_EMBED; s < USLI_SLOTS; s++) USLI_TRY(random_one(m, (usli_slot)s, 0, seed, dtype));
    /* Frozen random weights serve benchmarks: on a GPU, where each layer gets memory of its own all the same, big
     * layers share the numbers of the first, which takes seconds instead of minutes. */
    int64_t first, distinct = m->config.layers;
    usli_slot_shape(&m->config, USLI_GATE, 0, &first, &cols);
    if (!m->exec.backend->host && !m->full && first * cols > SHARED_FROM) distinct = 1;
    for (int64_t l = 0; l < distinct; l++) {
        USLI_TRY(usli_progress(m->ctx, "making weights", (uint64_t)l, (uint64_t)distinct));
        for (int s = 0; s < USLI_LAYER_SLOTS; s++) USLI_TRY(random_one(m, (usli_slot)s, l, seed, dtype));
    }
    if (load_in_4bit) USLI_TRY(quantize(m, distinct));
    for (int64_t l = distinct; l < m->config.layers; l++) share_layer(m, l);
    return USL_OK;
}
