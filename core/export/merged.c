/* A merged model as a Hugging Face folder. */
#include <stdio.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/export/export.h"
#include "core/io/json.h"
#include "core/io/safetensors.h"

static const uint64_t SHARD_BYTES = 5000000000u;

static uint64_t tensor_bytes(const usl_model *m, usli_slot slot, int64_t layer, usl_dtype dtype) {
    int64_t rows, cols;
    usli_slot_shape(&m->config, slot, layer, &rows, &cols);
    return (uint64_t)rows * (uint64_t)(cols ? cols : 1) * usli_dtype_bytes(dtype);
}

/* First tensor of the next shard, from `first` on; *total gets the shard's bytes. */
static int64_t shard_end(const usl_model *m, int64_t first, usl_dtype dtype, uint64_t *total) {
    int64_t i = first, layer;
    usli_slot slot;
    *total = 0;
    for (; i < usli_export_slots(m); i++) {
        if (!usli_export_slot(m, i, &slot, &layer)) continue;
        uint64_t bytes = tensor_bytes(m, slot, layer, dtype);
        if (*total && *total + bytes > SHARD_BYTES) break;
        *total += bytes;
    }
    return i;
}

static usl_status sink(void *ud, const void *data, size_t bytes) {
    return usli_safetensors_write(ud, data, bytes);
}

static usl_status write_shard(usl_model *m, const char *path, const char *file, int64_t first, int64_t last,
                              usl_dtype dtype, json_t *weight_map) {
    usli_safetensors_writer *w;
    usl_status st;
    USLI_TRY(usli_safetensors_create(m->ctx, path, &w));
    USLI_TRYGO(usli_safetensors_meta(w, "format", "pt"));
    for (int writing = 0; writing < 2; writing++) {
        if (writing) USLI_TRYGO(usli_safetensors_begin(w));
        for (int64_t i = first; i < last; i++) {
            usli_slot slot;
            int64_t layer;
            if (!usli_export_slot(m, i, &slot, &layer)) continue;
            if (writing) USLI_TRYGO(usli_progress(m->ctx, "exporting", (uint64_t)i, (uint64_t)usli_export_slots(m)));
            for (int64_t k = 0; k < usli_slot_pieces(&m->config, slot, USLI_FORM_PUBLISHED); k++) {
                usli_piece p;
                usli_slot_piece(&m->config, slot, layer, USLI_FORM_PUBLISHED, k, &p);
                if (writing) {
                    USLI_TRYGO(usli_export_tensor(m, slot, layer, &p, dtype, false, sink, w));
                    continue;
                }
                USLI_TRYGO(usli_safetensors_add(w, p.name, dtype, p.ndim, p.shape));
                if (json_object_set_new(weight_map, p.name, json_string(file)) != 0) {
                    st = usli_nomem(m->ctx, 0);
                    goto done;
                }
            }
        }
    }
    st = usli_safetensors_commit(w);
done:
    usli_safetensors_abandon(w);
    return st;
}

static usl_status write_json(usl_ctx *ctx, const char *dir, const char *name, const json_t *json) {
    char *text = NULL, *path = usli_path_join(ctx, dir, name);
    size_t len = 0;
    usl_status st = json && path ? usli_json_dump(ctx, json, 2, &text, &len) : usli_nomem(ctx, 0);
    if (st == USL_OK) st = usli_write_file(ctx, path, text, len);
    usli_free(ctx, text);
    usli_free(ctx, path);
    return st;
}

static usl_status write_weights(usl_model *m, const char *dir, usl_dtype dtype) {
    usl_ctx *ctx = m->ctx;
    int shards = 0;
    uint64_t bytes, total = 0;
    for (int64_t i = 0; i < usli_export_slots(m); shards++) {
        i = shard_end(m, i, dtype, &bytes);
        total += bytes;
    }
    USLI_TRY(usli_export_check_disk(ctx, dir, total));
    json_t *map = json_object(), *index = NULL;
    usl_status st = map ? USL_OK : usli_nomem(ctx, 0);
    int64_t first = 0;
    for (int s = 0; s < shards && st == USL_OK; s++) {
        char file[64];
        if (shards == 1)
            snprintf(file, sizeof file, "model.safetensors");
        else
            snprintf(file, sizeof file, "model-%05d-of-%05d.safetensors", s + 1, shards);
        int64_t last = shard_end(m, first, dtype, &bytes);
        char *path = usli_path_join(ctx, dir, file);
        st = path ? write_shard(m, path, file, first, last, dtype, map) : usli_nomem(ctx, 0);
        usli_free(ctx, path);
        first = last;
    }
    if (st == USL_OK && shards > 1) {
        index = json_pack("{s:{s:I},s:O}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
        st = write_json(ctx, dir, "model.safetensors.index.json", index);
    }
    if (map) json_decref(map);
    if (index) json_decref(index);
    return st;
}

static json_t *config_json(const usl_model *m, usl_dtype dtype) {
    json_t *j = json_deep_copy(m->config.source);
    const char *name = dtype == USL_F32 ? "float32" : dtype == USL_BF16 ? "bfloat16" : "float16";
    if (!j) return NULL;
    /* transformers 5 writes "dtype" alone. 4 reads it too, or, before 4.56, keeps its default of float32. */
    json_object_del(j, "torch_dtype");
    json_object_set_new(j, "dtype", json_string(name));
    json_object_set_new(j, "tie_word_embeddings", json_boolean(m->config.tied && !usli_model_unties(m)));
    json_object_del(j, "quantization_config"); /* what is written is not */
    return j;
}

/* The tokenizer's end of text counts beside the model's. */
static json_t *generation_json(const usl_model *m, const usli_tokenizer *tok) {
    json_t *j = json_object(), *eos = json_array();
    int32_t other = tok ? usli_tokenizer_special(tok, USLI_EOS) : -1;
    for (int i = 0; i < m->config.eos_count; i++) {
        json_array_append_new(eos, json_integer(m->config.eos[i]));
        if (m->config.eos[i] == other) other = -1;
    }
    if (other >= 0) json_array_append_new(eos, json_integer(other));
    if (m->config.bos >= 0) json_object_set_new(j, "bos_token_id", json_integer(m->config.bos));
    if (m->config.pad >= 0) json_object_set_new(j, "pad_token_id", json_integer(m->config.pad));
    if (json_array_size(eos) == 1)
        json_object_set(j, "eos_token_id", json_array_get(eos, 0));
    else if (json_array_size(eos))
        json_object_set(j, "eos_token_id", eos);
    json_decref(eos);
    return j;
}

usl_status usli_export_merged(usl_model *m, const usli_tokenizer *tok, const char *dir, usl_dtype dtype) {
    usl_ctx *ctx = m->ctx;
    if (dtype != USL_F32 && dtype != USL_BF16 && dtype != USL_F16)
        return usli_fail(ctx, USL_ERR_INVALID, "a merged model is float32, bfloat16 or float16, not %s",
                         usl_dtype_name(dtype));
    USLI_TRY(usli_make_dirs(ctx, dir));
    USLI_TRY(write_weights(m, dir, dtype));
    if (tok) USLI_TRY(usli_tokenizer_save(ctx, tok, dir));
    json_t *config = config_json(m, dtype), *generation = generation_json(m, tok);
    usl_status st = write_json(ctx, dir, "generation_config.json", generation);
    if (st == USL_OK) st = write_json(ctx, dir, "config.json", config); /* last: with it the folder is a model */
    if (config) json_decref(config);
    if (generation) json_decref(generation);
    return st;
}
