/* Weights are mapped, not read, wherever their bytes can be used as they are. Copied are: norms and biases (float32,
 * small), everything that is trained (float32), q and k of a GGUF whose rows are in interleaved order, what becomes
 * NF4. */
#include "core/model/load.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/base/rng.h"
#include "core/io/json.h"
#include "core/model/bnb.h"
#include "core/model/fp8.h"
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

/* What a source calls a slot's pieces. Stacks of experts are looked for whole first. */
static usli_form form_of(const usli_config *c, const usli_source *src, usli_slot slot, int64_t layer) {
    usli_piece p;
    if (src->gguf) return USLI_FORM_GGUF;
    if (!usli_slot_experts(c, slot)) return USLI_FORM_PUBLISHED;
    usli_slot_piece(c, slot, layer, USLI_FORM_STACKED, 0, &p);
    return find_named(src, p.name) ? USLI_FORM_STACKED : USLI_FORM_PUBLISHED;
}

static bool fits(const usli_piece *p, const usli_file_tensor *t) {
    bool same = t->ndim == p->ndim;
    for (int i = 0; same && i < p->ndim; i++) same = t->shape[i] == p->shape[i];
    return same;
}

static void write_shape(int ndim, const int64_t *shape, char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (int i = 0; i < ndim && used < size; i++) {
        int n = snprintf(buf + used, size - used, "%s%lld", i ? "x" : "", (long long)shape[i]);
        used += n > 0 ? (size_t)n : 0;
    }
}

/* Newer GGUFs hold kv_b_proj as two tensors, head by head: k's part transposed, and v's. */
typedef struct split_keys {
    const usli_file_tensor *k, *v; /* (heads, kv_lora, narrow), (heads, v_dim, kv_lora) */
} split_keys;

static bool find_split(const usli_config *c, const usli_source *src, usli_slot slot, int64_t layer, split_keys *s) {
    char name[64];
    if (slot != USLI_KV_B || !src->gguf) return false;
    snprintf(name, sizeof name, "blk.%lld.attn_k_b.weight", (long long)layer);
    s->k = usli_gguf_tensor(src->gguf, name);
    snprintf(name, sizeof name, "blk.%lld.attn_v_b.weight", (long long)layer);
    s->v = usli_gguf_tensor(src->gguf, name);
    const int64_t k[] = { c->heads, c->kv_lora, c->head_dim - c->rot_dim }, v[] = { c->heads, c->v_dim, c->kv_lora };
    if (!s->k || !s->v || s->k->ndim != 3 || s->v->ndim != 3) return false;
    return memcmp(s->k->shape, k, sizeof k) == 0 && memcmp(s->v->shape, v, sizeof v) == 0 &&
           usli_traits_of(s->k->dtype)->decode && usli_traits_of(s->v->dtype)->decode;
}

/* A matrix of bitsandbytes: its shape stands beside it. */
static usl_status find_bnb(const usl_model *m, const usli_source *src, usli_slot slot, const usli_piece *p,
                           const usli_file_tensor *t, const usli_file_tensor **out) {
    int64_t rows, cols;
    if (usli_slot_experts(&m->config, slot))
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "%s: the experts (\"%s\") are quantised by bitsandbytes, which is not supported for them; use "
                         "the 16-bit model with load_in_4bit, or a GGUF",
                         m->path, p->name);
    USLI_TRY(usli_bnb_shape(m, src, t, &rows, &cols));
    *out = t;
    if (rows == p->shape[0] && cols == p->shape[1]) return USL_OK;
    return usli_fail(m->ctx, USL_ERR_SHAPE, "%s: tensor \"%s\" has shape %lldx%lld; config says %lldx%lld", m->path,
                     p->name, (long long)rows, (long long)cols, (long long)p->shape[0], (long long)p->shape[1]);
}

static usl_status find_piece(const usl_model *m, const usli_source *src, usli_slot slot, int64_t layer, int64_t i,
                             usli_piece *p, const usli_file_tensor **out) {
    usli_slot_piece(&m->config, slot, layer, form_of(&m->config, src, slot, layer), i, p);
    const usli_file_tensor *t = find_named(src, p->name);
    if (!t && slot == USLI_HEAD && !src->gguf) /* a base that was saved tied, whatever its config says */
        t = find_named(src, "model.embed_tokens.weight");
    if (!t) return usli_fail(m->ctx, USL_ERR_FORMAT, "%s: tensor \"%s\" is missing", m->path, p->name);
    if (p->ndim > 1 && usli_bnb_is(src, t)) return find_bnb(m, src, slot, p, t, out);
    if (!fits(p, t)) {
        char is[96], wanted[96];
        write_shape(t->ndim, t->shape, is, sizeof is);
        write_shape(p->ndim, p->shape, wanted, sizeof wanted);
        return usli_fail(m->ctx, USL_ERR_SHAPE, "%s: tensor \"%s\" has shape %s; config says %s", m->path, p->name, is,
                         wanted);
    }
    const usli_traits *traits = usli_traits_of(t->dtype);
    if (usli_fp8_is(src, t)) {
        USLI_TRY(usli_fp8_check(m, src, t));
    } else if (!traits || !traits->decode)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: tensor \"%s\" has type %s, which cannot be decoded here",
                         m->path, p->name, usl_dtype_name(t->dtype));
    *out = t;
    return USL_OK;
}

static usl_status check_slot(const usl_model *m, const usli_source *src, usli_slot slot, int64_t layer) {
    int64_t rows, cols;
    const usli_file_tensor *t;
    usli_piece p;
    split_keys split;
    if (!usli_slot_shape(&m->config, slot, layer, &rows, &cols) || find_split(&m->config, src, slot, layer, &split))
        return USL_OK;
    int64_t count = usli_slot_pieces(&m->config, slot, form_of(&m->config, src, slot, layer));
    for (int64_t i = 0; i < count; i++) USLI_TRY(find_piece(m, src, slot, layer, i, &p, &t));
    return USL_OK;
}

usl_status usli_source_check(usl_ctx *ctx, const char *path, const usli_source *src, const usli_config *config) {
    usl_model m = { .ctx = ctx, .path = (char *)(uintptr_t)path, .config = *config };
    for (int64_t l = 0; l < config->layers; l++)
        for (int s = 0; s < USLI_LAYER_SLOTS; s++) USLI_TRY(check_slot(&m, src, (usli_slot)s, l));
    for (int s = USLI_EMBED; s < USLI_SLOTS; s++) USLI_TRY(check_slot(&m, src, (usli_slot)s, 0));
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

/* A stack, piece by piece: the pieces have one type, and rows go where they belong. */
static usl_status load_stack(usl_model *m, const usli_source *src, usli_slot slot, int64_t layer, usli_weight *w) {
    int64_t rows, cols;
    usli_slot_shape(&m->config, slot, layer, &rows, &cols);
    int64_t count = usli_slot_pieces(&m->config, slot, form_of(&m->config, src, slot, layer));
    usl_dtype dtype = USL_F32, kept = USL_F32;
    for (int64_t i = 0; i < count; i++) {
        usli_piece p;
        const usli_file_tensor *t = NULL;
        USLI_TRY(find_piece(m, src, slot, layer, i, &p, &t));
        if (i && t->dtype != dtype)
            return usli_fail(
                m->ctx, USL_ERR_UNSUPPORTED,
                "%s: tensor \"%s\" has type %s and others of its layer's experts have %s; only one type is "
                "supported",
                m->path, p.name, usl_dtype_name(t->dtype), usl_dtype_name(dtype));
        dtype = t->dtype;
        bool fp8 = usli_fp8_is(src, t);
        kept = m->full || dtype == USL_F64 ? USL_F32 : fp8 ? USL_BF16 : dtype;
        size_t from = fp8 ? 0 : usli_row_bytes(dtype, cols), to = usli_row_bytes(kept, cols);
        if (!i) USLI_TRY(new_storage(m, (size_t)rows * to, &w->storage));
        if (fp8) {
            USLI_TRY(usli_fp8_read(m, src, t, &p, kept, w->storage->data));
            continue;
        }
        for (int64_t r = 0; r < p.rows && !m->plan_only; r++) {
            const char *row = (const char *)t->data + (size_t)r * from;
            char *dst = (char *)w->storage->data + (size_t)usli_piece_row(&p, r) * to;
            if (kept == dtype)
                memcpy(dst, row, to);
            else
                usli_traits_of(dtype)->decode(row, (float *)(void *)dst, cols);
        }
    }
    set_plain(w, kept, rows, cols);
    return USL_OK;
}

/* In float32, since what is transposed cannot stay in its blocks. */
static usl_status load_split(usl_model *m, const split_keys *s, usli_weight *w) {
    const usli_config *c = &m->config;
    int64_t narrow = c->head_dim - c->rot_dim, each = narrow + c->v_dim, cols = c->kv_lora, rows = c->heads * each;
    USLI_TRY(new_storage(m, (size_t)(rows * cols) * sizeof(float), &w->storage));
    set_plain(w, USL_F32, rows, cols);
    if (m->plan_only) return USL_OK;
    float *values = usli_malloc(m->ctx, (size_t)narrow * sizeof *values), *out = w->storage->data;
    if (!values) return usli_nomem(m->ctx, (size_t)narrow * sizeof *values);
    size_t k_row = usli_row_bytes(s->k->dtype, narrow), v_row = usli_row_bytes(s->v->dtype, cols);
    for (int64_t h = 0; h < c->heads; h++) {
        float *head = out + h * each * cols;
        for (int64_t i = 0; i < cols; i++) {
            usli_traits_of(s->k->dtype)
                ->decode((const char *)s->k->data + (size_t)(h * cols + i) * k_row, values, narrow);
            for (int64_t r = 0; r < narrow; r++) head[r * cols + i] = values[r];
        }
        for (int64_t r = 0; r < c->v_dim; r++)
            usli_traits_of(s->v->dtype)
                ->decode((const char *)s->v->data + (size_t)(h * c->v_dim + r) * v_row, head + (narrow + r) * cols,
                         cols);
    }
    usli_free(m->ctx, values);
    return USL_OK;
}

static usl_status load_fp8(usl_model *m, const usli_source *src, const usli_file_tensor *t, usli_weight *w) {
    int64_t rows = t->shape[0], cols = t->shape[1];
    usl_dtype dtype = m->full ? USL_F32 : USL_BF16;
    USLI_TRY(new_storage(m, (size_t)(rows * cols) * usli_dtype_bytes(dtype), &w->storage));
    set_plain(w, dtype, rows, cols);
    return usli_fp8_read(m, src, t, NULL, dtype, w->storage->data);
}

static usl_status load_one(usl_model *m, const usli_source *src, usli_slot slot, int64_t layer) {
    int64_t rows, cols;
    if (!usli_slot_shape(&m->config, slot, layer, &rows, &cols)) return USL_OK;
    const usli_file_tensor *t = NULL;
    usli_piece p;
    usli_weight *w = usli_base_weight(m, slot, layer);
    split_keys split;
    if (find_split(&m->config, src, slot, layer, &split)) return load_split(m, &split, w);
    if (usli_slot_pieces(&m->config, slot, form_of(&m->config, src, slot, layer)) > 1)
        return load_stack(m, src, slot, layer, w);
    USLI_TRY(find_piece(m, src, slot, layer, 0, &p, &t));
    if (cols && usli_bnb_is(src, t)) return usli_bnb_load(m, src, t, w);
    if (cols && usli_fp8_is(src, t)) return load_fp8(m, src, t, w);
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

enum { CHUNK = 1 << 20 /* values quantised at a time: whole blocks */ };

typedef struct quantize_job {
    usli_weight **list;
    int64_t count;
    float **absmax;      /* of each of the list */
    float **scratch;     /* a worker's: CHUNK values */
    atomic_int *damaged; /* 1 + the number of one that holds what is no number; 0: none does */
} quantize_job;

static int64_t values_of(const usli_weight *w) {
    return w->m.rows * w->m.cols;
}

static int64_t chunks_of(const usli_weight *w) {
    return (values_of(w) + CHUNK - 1) / CHUNK;
}

static void decode_values(const usli_weight *w, int64_t first, int64_t count, float *dst) {
    usli_to_f32((const char *)w->m.data + (size_t)first * usli_dtype_bytes(w->m.dtype), w->m.dtype, dst, count);
}

/* A chunk of one of the weights. */
static void quantize_chunk(void *arg, int64_t task, int worker) {
    const quantize_job *job = arg;
    int64_t i = 0;
    for (; task >= chunks_of(job->list[i]); i++) task -= chunks_of(job->list[i]);
    const usli_weight *w = job->list[i];
    int64_t first = task * CHUNK, left = values_of(w) - first, n = left < CHUNK ? left : CHUNK;
    float *values = job->scratch[worker], wrong = 0;
    decode_values(w, first, n, values);
    for (int64_t k = 0; k < n; k++) wrong += values[k] * 0.0f; /* NaN when one is not finite */
    if (isnan(wrong)) atomic_store(job->damaged, (int)i + 1);
    usli_nf4_quantize_plain(w->nf4.table, values, n, (uint8_t *)(uintptr_t)w->nf4.codes + first / 2,
                            job->absmax[i] + first / USLI_NF4_BLOCK);
}

static void nest_weight(void *arg, int64_t task, int worker) {
    const quantize_job *job = arg;
    (void)worker;
    usli_nf4_nest(&job->list[task]->nf4, job->absmax[task], usli_nf4_blocks(values_of(job->list[task])));
}

/* The router decides, and is small. */
static bool wants_nf4(const usli_weight *w, usli_slot slot) {
    return slot != USLI_ROUTER && w->storage &&
           (w->m.dtype == USL_F32 || w->m.dtype == USL_F16 || w->m.dtype == USL_BF16);
}

/* Makes room for a weight's codes. On failure it is as before. */
static usl_status begin_weight(usl_model *m, usli_weight *w, usli_storage **made, float **absmax) {
    int64_t n = values_of(w);
    size_t bytes = (size_t)usli_nf4_blocks(n) * sizeof(float);
    USLI_TRY(new_storage(m, usli_nf4_bytes(n), made));
    if (!m->plan_only && !(*absmax = usli_malloc(m->ctx, bytes))) {
        usli_storage_release(*made);
        *made = NULL;
        return usli_nomem(m->ctx, bytes);
    }
    usli_nf4_layout((*made)->data, n, &w->nf4);
    return USL_OK;
}

/* Layer by layer, so that the 16-bit pages of a big checkpoint come and go. */
static usl_status quantize_layer(usl_model *m, int64_t layer, float **scratch) {
    usli_weight *list[USLI_LINEARS];
    usli_storage *made[USLI_LINEARS] = { NULL };
    float *absmax[USLI_LINEARS] = { NULL };
    atomic_int damaged;
    atomic_init(&damaged, 0);
    usli_slot slots[USLI_LINEARS];
    quantize_job job = { list, 0, absmax, scratch, &damaged };
    int64_t chunks = 0;
    usl_status st = USL_OK;
    for (int s = 0; st == USL_OK && s < USLI_LINEARS; s++) {
        usli_weight *w = usli_base_weight(m, (usli_slot)s, layer);
        if (!wants_nf4(w, (usli_slot)s)) continue;
        st = begin_weight(m, w, &made[job.count], &absmax[job.count]);
        if (st != USL_OK) break;
        chunks += chunks_of(w);
        slots[job.count] = (usli_slot)s;
        list[job.count++] = w;
    }
    if (st == USL_OK && !m->plan_only) {
        usli_pool_run(m->ctx->pool, chunks, quantize_chunk, &job);
        usli_pool_run(m->ctx->pool, job.count, nest_weight, &job);
    }
    if (st == USL_OK && atomic_load(&damaged)) {
        char name[160];
        usli_slot_name(&m->config, slots[atomic_load(&damaged) - 1], layer, false, name, sizeof name);
        st = usli_fail(m->ctx, USL_ERR_FORMAT,
                       "%s: %s holds a number that is not finite, which 4 bits cannot hold; the file is damaged "
                       "(load_in_4bit = false takes it as it is)",
                       m->path, name);
    }
    for (int64_t i = 0; i < job.count; i++) {
        usli_free(m->ctx, absmax[i]);
        usli_storage_release(st == USL_OK ? list[i]->storage : made[i]);
        if (st != USL_OK) continue;
        list[i]->storage = made[i];
        list[i]->m.dtype = USL_NF4;
        list[i]->m.data = NULL;
        list[i]->m.nf4 = &list[i]->nf4;
    }
    return st;
}

/* Scratch of every worker while layers are quantised; NULL when they are not. */
static usl_status quantize_begin(usl_model *m, bool wanted, float ***out) {
    int workers = usli_pool_threads(m->ctx->pool);
    *out = NULL;
    if (!wanted) return USL_OK;
    if (!(*out = usli_calloc(m->ctx, (size_t)workers, sizeof **out)))
        return usli_nomem(m->ctx, (size_t)workers * sizeof **out);
    for (int i = 0; i < workers && !m->plan_only; i++)
        if (!((*out)[i] = usli_malloc_aligned(m->ctx, CHUNK * sizeof(float))))
            return usli_nomem(m->ctx, CHUNK * sizeof(float));
    return USL_OK;
}

static void quantize_end(usl_model *m, float **scratch) {
    for (int i = 0; scratch && i < usli_pool_threads(m->ctx->pool); i++) usli_free_aligned(m->ctx, scratch[i]);
    usli_free(m->ctx, scratch);
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
    bool quantise = load_in_4bit && !m->config.quantised;
    float **scratch;
    usl_status st = quantize_begin(m, quantise, &scratch);
    for (int64_t l = 0; st == USL_OK && l < m->config.layers; l++) {
        st = usli_progress(m->ctx, quantise ? "quantising" : "loading", (uint64_t)l, (uint64_t)m->config.layers);
        for (int s = 0; st == USL_OK && s < USLI_LAYER_SLOTS; s++) st = load_one(m, src, (usli_slot)s, l);
        if (st == USL_OK && scratch) st = quantize_layer(m, l, scratch);
    }
    quantize_end(m, scratch);
    return st;
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
    usli_weight *w = usli_base_weight(m, slot, layer);
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

/* Layer l has the storages of another. */
static void share_layer(usl_model *m, int64_t from, int64_t l) {
    for (int s = 0; s < USLI_LAYER_SLOTS; s++) {
        usli_weight *w = usli_base_weight(m, (usli_slot)s, l);
        *w = *usli_base_weight(m, (usli_slot)s, from);
        if (w->storage) usli_storage_retain(w->storage);
        if (w->m.nf4) w->m.nf4 = &w->nf4;
    }
}

/* Frozen random weights serve benchmarks: on a GPU, where each layer gets memory of its own all the same, big layers
 * share the numbers of the first of their kind, which takes seconds instead of minutes. */
static int64_t layer_like(const usl_model *m, int64_t l) {
    int64_t rows, cols, most = 0, like = 0;
    for (int s = 0; s < USLI_LINEARS; s++)
        if (usli_slot_shape(&m->config, (usli_slot)s, l, &rows, &cols) && rows * cols > most) most = rows * cols;
    if (m->exec.backend->host || m->full || most <= SHARED_FROM) return l;
    while (usli_layer_sparse(&m->config, like) != usli_layer_sparse(&m->config, l)) like++;
    return like;
}

usl_status usli_random_weights(usl_model *m, uint64_t seed, bool load_in_4bit, usl_dtype dtype) {
    if (m->full)
        dtype = USL_F32;
    else if (dtype == USL_DTYPE_AUTO)
        dtype = USL_BF16;
    USLI_TRY(make_table(m));
    for (int s = USLI_EMBED; s < USLI_SLOTS; s++) USLI_TRY(random_one(m, (usli_slot)s, 0, seed, dtype));
    float **scratch;
    usl_status st = quantize_begin(m, load_in_4bit, &scratch);
    for (int64_t l = 0; st == USL_OK && l < m->config.layers; l++) {
        int64_t like = layer_like(m, l);
        if (like < l) {
            share_layer(m, like, l);
            continue;
        }
        st = usli_progress(m->ctx, "making weights", (uint64_t)l, (uint64_t)m->config.layers);
        for (int s = 0; st == USL_OK && s < USLI_LAYER_SLOTS; s++) st = random_one(m, (usli_slot)s, l, seed, dtype);
        if (st == USL_OK && scratch) st = quantize_layer(m, l, scratch);
    }
    quantize_end(m, scratch);
    return st;
}
