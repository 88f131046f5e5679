/* A larger vocabulary: rows are added to the embedding table and to the head. */
#include <stdio.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/model/adapter.h"
#include "core/quant/traits.h"

static bool is_float(usl_dtype t) {
    return t == USL_F32 || t == USL_BF16 || t == USL_F16;
}

/* Rows first .. first + count - 1, decoded, added to sum with a factor. */
static usl_status add_rows(const usl_model *m, usli_slot slot, int64_t first, int64_t count, double factor,
                           double *sum) {
    int64_t cols = m->config.hidden;
    float *row = usli_malloc(m->ctx, (size_t)cols * sizeof *row);
    if (!row) return usli_nomem(m->ctx, (size_t)cols * sizeof *row);
    usl_status st = USL_OK;
    for (int64_t r = first; r < first + count && st == USL_OK; r++) {
        st = usli_model_rows(m, slot, 0, false, r, 1, row);
        for (int64_t c = 0; st == USL_OK && c < cols; c++) sum[c] += factor * (double)row[c];
    }
    usli_free(m->ctx, row);
    return st;
}

static void put_row(const usli_weight *w, int64_t r, const double *values, float *scratch) {
    for (int64_t c = 0; c < w->m.cols; c++) scratch[c] = (float)values[c];
    char *to = (char *)w->storage->data + (size_t)r * usli_row_bytes(w->m.dtype, w->m.cols);
    usli_traits_of(w->m.dtype)->encode(scratch, NULL, to, w->m.cols);
}

/* Storage of its own with so many rows: the old ones, then their mean. Blocks become floats of the model's type. */
static usl_status grow(usl_model *m, usli_slot slot, int64_t rows, int64_t mean_of, usli_storage **out,
                       usl_dtype *dtype) {
    const usli_weight *w = usli_base_weight(m, slot, 0);
    int64_t cols = w->m.cols, kept = w->m.rows < rows ? w->m.rows : rows;
    usl_ctx *ctx = m->ctx;
    *dtype = is_float(w->m.dtype) ? w->m.dtype : m->dtype;
    size_t row_bytes = usli_row_bytes(*dtype, cols);
    double *mean = usli_calloc(ctx, (size_t)cols, sizeof *mean);
    float *scratch = usli_malloc(ctx, (size_t)cols * sizeof *scratch);
    usl_status st = mean && scratch ? USL_OK : usli_nomem(ctx, (size_t)cols * 12);
    if (st == USL_OK) st = usli_storage_new(ctx, (size_t)rows * row_bytes, out);
    if (st == USL_OK && rows > w->m.rows) st = add_rows(m, slot, 0, mean_of, 1.0 / (double)mean_of, mean);
    usli_weight grown = { .m = { .dtype = *dtype, .rows = rows, .cols = cols }, .storage = st == USL_OK ? *out : NULL };
    for (int64_t r = 0; r < kept && st == USL_OK; r++) {
        char *to = (char *)grown.storage->data + (size_t)r * row_bytes;
        if (w->m.dtype == *dtype) {
            memcpy(to, (const char *)w->m.data + (size_t)r * row_bytes, row_bytes);
            continue;
        }
        st = usli_model_rows(m, slot, 0, false, r, 1, scratch);
        if (st == USL_OK) usli_traits_of(*dtype)->encode(scratch, NULL, to, cols);
    }
    for (int64_t r = kept; r < rows && st == USL_OK; r++) put_row(&grown, r, mean, scratch);
    if (st != USL_OK) {
        usli_storage_release(*out);
        *out = NULL;
    }
    usli_free(ctx, mean);
    usli_free(ctx, scratch);
    return st;
}

/* Whether an adapter has a copy of a table, or stands beside it. */
static bool has_rows(const usl_model *m, const usli_adapter *a, usli_slot slot) {
    return a->copies[usli_weight_index(&m->config, slot, 0)].storage || usli_adapter_module(m, a, slot, 0)->rank;
}

static usl_status check_resizable(const usl_model *m) {
    USLI_TRY(usli_model_check_weights(m));
    if (m->trainers)
        return usli_fail(
            m->ctx, USL_ERR_INVALID,
            "the vocabulary cannot change while a trainer uses the model; close it first (trainer:close())");
    if (m->base || usli_model_sharers(m))
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "the vocabulary cannot change while other models share these weights; open the model anew");
    return USL_OK;
}

static int note_in_config(usl_model *m) {
    json_t *j = m->config.source, *inner = json_object_get(j, "text_config");
    if (json_is_object(inner)) j = inner;
    return j ? json_object_set_new(j, "vocab_size", json_integer(m->config.vocab)) : 0;
}

static const usli_slot TABLES[] = { USLI_EMBED, USLI_HEAD };

usl_status usli_model_resize(usl_model *m, int64_t rows, int64_t mean_of) {
    usli_storage *made[2] = { NULL, NULL };
    usl_dtype dtypes[2];
    usl_status st;
    USLI_TRY(check_resizable(m));
    if (rows < 1 || rows > 1 << 24)
        return usli_fail(m->ctx, USL_ERR_INVALID, "a vocabulary of %lld tokens cannot be made", (long long)rows);
    if (rows == m->config.vocab) return USL_OK;
    for (const usli_adapter *a = m->adapters; a; a = a->next)
        if (has_rows(m, a, USLI_EMBED) || has_rows(m, a, USLI_HEAD))
            return usli_fail(m->ctx, USL_ERR_INVALID,
                             "the vocabulary cannot change beside adapter \"%s\", which has rows of embed_tokens or "
                             "lm_head; resize before get_peft_model",
                             a->name);
    if (mean_of <= 0 || mean_of > m->config.vocab) mean_of = m->config.vocab;
    USLI_TRY(usli_model_pull(m));
    for (int i = 0; i < 2; i++)
        if (usli_base_weight(m, TABLES[i], 0)->storage)
            USLI_TRYGO(grow(m, TABLES[i], rows, mean_of, &made[i], &dtypes[i]));
    usli_model_unplace(m);
    if (!m->resized) m->resized = m->config.vocab;
    m->config.vocab = rows;
    for (int i = 0; i < 2; i++) {
        usli_weight *w = usli_base_weight(m, TABLES[i], 0);
        if (!made[i]) continue;
        usli_storage_release(w->storage);
        *w = (usli_weight){ .storage = made[i] };
        w->m = (usli_matrix){ .dtype = dtypes[i], .rows = rows, .cols = m->config.hidden, .data = made[i]->data };
        made[i] = NULL;
    }
    m->placing++;
    st = note_in_config(m) ? usli_nomem(m->ctx, 0) : usli_model_place(m);
done:
    for (int i = 0; i < 2; i++) usli_storage_release(made[i]);
    return st;
}

/* Passes on a device read a copy. */
static usl_status refresh(usl_model *m, const usli_weight *w, int64_t r) {
    size_t bytes = usli_row_bytes(w->m.dtype, w->m.cols);
    if (w->d.data == w->m.data) return USL_OK;
    return m->exec.backend->copy_in(&m->exec, (char *)(uintptr_t)w->d.data + (size_t)r * bytes,
                                    (const char *)w->storage->data + (size_t)r * bytes, bytes);
}

usl_status usli_model_blend_row(usl_model *m, int64_t row, const int32_t *ids, size_t count, double weight) {
    int64_t cols = m->config.hidden;
    USLI_TRY(check_resizable(m));
    if (!m->resized)
        return usli_fail(m->ctx, USL_ERR_INVALID, "only rows of a resized vocabulary can be set; resize it first");
    if (row < 0 || row >= m->config.vocab || !count || !(weight >= 0 && weight <= 1))
        return usli_fail(m->ctx, USL_ERR_INVALID, "row %lld cannot be made of %zu others with weight %g",
                         (long long)row, count, weight);
    for (size_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= m->config.vocab)
            return usli_fail(m->ctx, USL_ERR_INVALID, "token id %d is outside the vocabulary of %lld", (int)ids[i],
                             (long long)m->config.vocab);
    double *sum = usli_calloc(m->ctx, (size_t)cols, sizeof *sum);
    float *scratch = usli_malloc(m->ctx, (size_t)cols * sizeof *scratch);
    usl_status st = sum && scratch ? USL_OK : usli_nomem(m->ctx, (size_t)cols * 12);
    for (int t = 0; t < 2 && st == USL_OK; t++) {
        usli_weight *w = usli_base_weight(m, TABLES[t], 0);
        if (!w->storage) continue;
        memset(sum, 0, (size_t)cols * sizeof *sum);
        st = add_rows(m, TABLES[t], row, 1, 1 - weight, sum);
        for (size_t i = 0; i < count && st == USL_OK; i++)
            st = add_rows(m, TABLES[t], ids[i], 1, weight / (double)count, sum);
        if (st != USL_OK) break;
        put_row(w, row, sum, scratch);
        st = refresh(m, w, row);
    }
    usli_free(m->ctx, sum);
    usli_free(m->ctx, scratch);
    return st;
}

/* ---- In an adapter's folder ----------------------------------------------------------------------------------------
 */

/* PEFT's save_embedding_layers: where a copy or an adapter has the plain name, the table stands under another. */
static void saved_name(const usl_model *m, const usli_adapter *a, usli_slot slot, char *buf, size_t size) {
    char module[128];
    usli_module_name(&m->config, slot, 0, module, sizeof module);
    const char *part = usli_adapter_module(m, a, slot, 0)->rank ? "base_layer." : "original_module.";
    snprintf(buf, size, "base_model.model.%s.%sweight", module, has_rows(m, a, slot) ? part : "");
}

usl_status usli_resized_tensors(usl_model *m, const usli_adapter *a, usli_safetensors_writer *w, bool writing) {
    for (int t = 0; m->resized && t < 2; t++) {
        const usli_weight *weight = usli_base_weight(m, TABLES[t], 0);
        int64_t shape[2] = { weight->m.rows, weight->m.cols };
        char name[192];
        if (!weight->storage) continue;
        saved_name(m, a, TABLES[t], name, sizeof name);
        USLI_TRY(writing ? usli_safetensors_write(w, weight->storage->data, weight->storage->bytes)
                         : usli_safetensors_add(w, name, weight->m.dtype, 2, shape));
    }
    return USL_OK;
}

static bool is_same(const usli_weight *w, const usli_file_tensor *t) {
    return w->m.dtype == t->dtype && w->m.rows == t->shape[0] && !memcmp(w->storage->data, t->data, t->bytes);
}

/* Only rows from a file of PEFT's: those of a model that was resized the same way. */
static usl_status put_table(usl_model *m, usli_slot slot, const usli_file_tensor *t) {
    usli_weight *w = usli_base_weight(m, slot, 0);
    usli_storage *made;
    if (!t || !w->storage || is_same(w, t)) return USL_OK;
    usl_dtype dtype = m->full ? USL_F32 : t->dtype;
    USLI_TRY(usli_storage_new(m->ctx, (size_t)(t->shape[0] * t->shape[1]) * usli_dtype_bytes(dtype), &made));
    if (dtype == t->dtype)
        memcpy(made->data, t->data, t->bytes);
    else
        usli_to_f32(t->data, t->dtype, made->data, t->shape[0] * t->shape[1]);
    usli_model_unplace(m);
    usli_storage_release(w->storage);
    *w = (usli_weight){ .storage = made };
    w->m = (usli_matrix){ .dtype = dtype, .rows = t->shape[0], .cols = t->shape[1], .data = made->data };
    m->placing++;
    return usli_model_place(m);
}

usl_status usli_model_put_tables(usl_model *m, const char *path, const usli_file_tensor *const tables[2]) {
    bool same = true;
    int64_t rows = 0;
    for (int t = 0; t < 2; t++) {
        const usli_weight *w = usli_base_weight(m, TABLES[t], 0);
        if (!tables[t]) continue;
        rows = tables[t]->shape[0];
        same &= !w->storage || is_same(w, tables[t]);
    }
    if (same) return USL_OK;
    USLI_TRY(check_resizable(m));
    if (m->adapters && rows == m->config.vocab)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "%s: holds other rows of embed_tokens or lm_head than those that adapter \"%s\" stands on; "
                         "load it into a model of its own",
                         path, m->adapters->name);
    USLI_TRY(usli_model_resize(m, rows, 0));
    for (int t = 0; t < 2; t++) USLI_TRY(put_table(m, TABLES[t], tables[t]));
    return USL_OK;
}
