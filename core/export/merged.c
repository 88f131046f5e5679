/* A merged model as a Hugging Face folder: written into a folder inside of it, looked at, then moved
 * to its place, config.json last. */
#include <stdio.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/temporary.h"
#include "core/export/export.h"
#include "core/io/json.h"
#include "core/export/merged4.h"
#include "core/io/safetensors.h"

static const uint64_t SHARD_BYTES = 5000000000u;

static uint64_t tensor_bytes(const usl_model *m, usli_slot slot, int64_t layer, usl_dtype dtype) {
    int64_t rows, cols;
    if (dtype == USL_NF4) {
        if (usli_merged4_has(slot)) return usli_merged4_bytes(m, slot, layer);
        dtype = USL_BF16;
    }
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

/* One tensor, or what bitsandbytes keeps of one: described, or written. */
static usl_status put_piece(const usli_export_source *s, usli_slot slot, int64_t layer, int64_t i, usl_dtype dtype,
                            bool writing, usli_safetensors_writer *w, const char *file, json_t *weight_map) {
    const usl_model *m = s->m;
    if (dtype == USL_NF4 && usli_merged4_has(slot))
        return usli_merged4_put(s, slot, layer, writing, w, file, weight_map);
    if (dtype == USL_NF4) dtype = USL_BF16;
    usli_piece p;
    usli_slot_piece(&m->config, slot, layer, USLI_FORM_PUBLISHED, i, &p);
    if (writing) {
        usli_export_out out = { dtype, sink, w };
        return usli_export_tensor(s, slot, layer, &p, false, &out, 1);
    }
    USLI_TRY(usli_safetensors_add(w, p.name, dtype, p.ndim, p.shape));
    return json_object_set_new(weight_map, p.name, json_string(file)) == 0 ? USL_OK : usli_nomem(m->ctx, 0);
}

static usl_status write_shard(const usli_export_source *src, const char *path, const char *file, int64_t first,
                              int64_t last, usl_dtype dtype, json_t *weight_map) {
    usl_model *m = src->m;
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
            for (int64_t k = 0; k < usli_slot_pieces(&m->config, slot, USLI_FORM_PUBLISHED); k++)
                USLI_TRYGO(put_piece(src, slot, layer, k, dtype, writing, w, file, weight_map));
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

static usl_status write_weights(const usli_export_source *src, const char *dir, usl_dtype dtype,
                                usl_export_report *report) {
    usl_model *m = src->m;
    usl_ctx *ctx = m->ctx;
    int shards = 0;
    uint64_t bytes, total = 0;
    for (int64_t i = 0; i < usli_export_slots(m); shards++) {
        i = shard_end(m, i, dtype, &bytes);
        total += bytes;
    }
    report->bytes = total;
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
        st = path ? write_shard(src, path, file, first, last, dtype, map) : usli_nomem(ctx, 0);
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
    const char *name = dtype == USL_F32 ? "float32" : dtype == USL_F16 ? "float16" : "bfloat16";
    if (!j) return NULL;
    json_object_del(j, "quantization_config"); /* how it was read is not how it is written */
    if (dtype == USL_NF4) json_object_set_new(j, "quantization_config", usli_merged4_config());
    /* transformers 5 writes "dtype" alone. 4 reads it too, or, before 4.56, keeps its default of float32. */
    json_object_del(j, "torch_dtype");
    json_object_set_new(j, "dtype", json_string(name));
    json_object_set_new(j, "tie_word_embeddings", json_boolean(m->config.tied && !usli_model_unties(m)));
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

static usl_status write_files(const usli_export_source *s, const usli_tokenizer *tok, const char *dir, usl_dtype dtype,
                              usl_export_report *report) {
    usl_ctx *ctx = s->m->ctx;
    USLI_TRY(usli_make_dirs(ctx, dir));
    USLI_TRY(write_weights(s, dir, dtype, report));
    if (tok) USLI_TRY(usli_tokenizer_save(ctx, tok, dir));
    json_t *config = config_json(s->m, dtype), *generation = generation_json(s->m, tok);
    usl_status st = write_json(ctx, dir, "generation_config.json", generation);
    if (st == USL_OK) st = write_json(ctx, dir, "config.json", config);
    if (config) json_decref(config);
    if (generation) json_decref(generation);
    return st;
}

/* Weights of an earlier export would be read in the place of these, and what belongs to its tokenizer beside the new
 * one. */
static bool is_stale(const char *name, bool tokenizer) {
    static const char *const WEIGHTS[] = { "config.json", "model.safetensors", "model.safetensors.index.json" };
    static const char *const WORDS[] = { "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
                                         "tokenizer.model",     "tokenizer_config.json",   "vocab.json",
                                         "merges.txt" };
    bool stale = strncmp(name, "model-", 6) == 0;
    for (size_t i = 0; i < sizeof WEIGHTS / sizeof *WEIGHTS; i++) stale = stale || strcmp(name, WEIGHTS[i]) == 0;
    for (size_t i = 0; i < sizeof WORDS / sizeof *WORDS && tokenizer; i++) stale = stale || strcmp(name, WORDS[i]) == 0;
    return stale;
}

/* Files of a folder, by their paths. */
typedef struct listing {
    char **names, **paths, **targets;
    size_t count;
} listing;

static void forget(usl_ctx *ctx, listing *l) {
    for (size_t i = 0; i < l->count; i++) {
        if (l->paths) usli_free(ctx, l->paths[i]);
        if (l->targets) usli_free(ctx, l->targets[i]);
    }
    usli_free(ctx, l->paths);
    usli_free(ctx, l->targets);
    if (l->names) usli_free_names(ctx, l->names, l->count);
}

/* targets: in another folder. */
static usl_status list(usl_ctx *ctx, const char *dir, const char *target, listing *l) {
    memset(l, 0, sizeof *l);
    USLI_TRY(usli_list_dir(ctx, dir, &l->names, &l->count));
    l->paths = usli_calloc(ctx, l->count + 1, sizeof *l->paths);
    l->targets = usli_calloc(ctx, l->count + 1, sizeof *l->targets);
    bool good = l->paths && l->targets;
    for (size_t i = 0; good && i < l->count; i++) {
        l->paths[i] = usli_path_join(ctx, dir, l->names[i]);
        l->targets[i] = usli_path_join(ctx, target, l->names[i]);
        good = l->paths[i] && l->targets[i];
    }
    return good ? USL_OK : usli_nomem(ctx, l->count * sizeof *l->paths);
}

/* Without config.json a folder is no model: it goes first and comes last. Memory is had before anything is moved. Of
 * two exports to one folder the later is whole there: each moves with the folder locked. */
static usl_status move_in(usl_ctx *ctx, const char *from, const char *dir) {
    listing old = { 0 }, new = { 0 };
    int lock;
    usl_status st = usli_folder_lock(ctx, dir, &lock);
    if (st == USL_OK) st = list(ctx, dir, dir, &old);
    if (st == USL_OK) st = list(ctx, from, dir, &new);
    bool listed = st == USL_OK, tokenizer = false; /* a list that is not whole says nothing of what was moved */
    for (size_t i = 0; i < new.count; i++) tokenizer = tokenizer || strcmp(new.names[i], "tokenizer.json") == 0;
    for (size_t i = 0; i < old.count && st == USL_OK; i++)
        if (is_stale(old.names[i], tokenizer)) st = usli_remove_file(ctx, old.paths[i]);
    for (int last = 0; last < 2; last++)
        for (size_t i = 0; i < new.count &&st == USL_OK; i++)
            if ((strcmp(new.names[i], "config.json") == 0) == last) st = usli_rename(ctx, new.paths[i], new.targets[i]);
    /* What was moved and is no whole model. */
    for (size_t i = 0; listed && i < new.count &&st != USL_OK; i++)
        if (!usli_is_file(new.paths[i])) usli_remove_quietly(new.targets[i]);
    forget(ctx, &old);
    forget(ctx, &new);
    usli_folder_unlock(lock);
    return st;
}

/* What killed exports left in it goes before the room on the disk is looked at. Another that fails just now may take
 * the empty folder away. */
static usl_status begin(usl_ctx *ctx, const char *dir, usli_temporary *t) {
    char *inside = usli_path_join(ctx, dir, "export");
    usl_status st = inside ? USL_ERR_NOT_FOUND : usli_nomem(ctx, strlen(dir));
    for (int attempt = 0; attempt < 3 && st == USL_ERR_NOT_FOUND; attempt++) {
        st = usli_make_dirs(ctx, dir);
        if (st == USL_OK) st = usli_temporary_folder(ctx, inside, t);
    }
    usli_free(ctx, inside);
    return st;
}

/* What would make another model of the folder, or leave less than there was. */
static usl_status check_folder(const usli_export_source *s, const char *dir) {
    const usl_model *m = s->m;
    char *adapter = usli_path_join(m->ctx, dir, "adapter_config.json");
    if (!adapter) return usli_nomem(m->ctx, strlen(dir));
    bool there = usli_is_file(adapter);
    usli_free(m->ctx, adapter);
    if (there)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "%s holds an adapter (adapter_config.json), which PEFT and transformers would apply to the "
                         "merged model once more; give another folder",
                         dir);
    bool shrunk = false;
    for (int64_t l = 0; l < m->config.layers && !m->config.quantised; l++)
        for (int slot = 0; slot < USLI_LINEARS; slot++)
            shrunk = shrunk || usli_base_weight(s->base, (usli_slot)slot, l)->m.nf4;
    if (shrunk && m->path && usli_is_same(m->path, dir))
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "%s holds the weights that were loaded in 4 bits: what is merged onto those would replace "
                         "better ones; give another folder",
                         dir);
    return USL_OK;
}

usl_status usli_export_merged(const usli_export_source *s, const usli_tokenizer *tok, const char *dir, usl_dtype dtype,
                              bool verify, usl_export_report *report) {
    usl_ctx *ctx = s->m->ctx;
    if (dtype != USL_F32 && dtype != USL_BF16 && dtype != USL_F16 && dtype != USL_NF4)
        return usli_fail(ctx, USL_ERR_INVALID, "a merged model is float32, bfloat16, float16 or nf4, not %s",
                         usl_dtype_name(dtype));
    if (dtype == USL_NF4 && s->m->config.arch->mixture)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "%s: a mixture of experts is not merged in 4 bits, since transformers keeps its experts in "
                         "tensors that bitsandbytes does not read; use merged_16bit",
                         dir);
    USLI_TRY(check_folder(s, dir));
    usl_export_report unread = { .size = sizeof unread };
    if (!report) report = &unread;
    bool was_there = usli_is_dir(dir);
    usli_temporary t = { .fd = -1 };
    usl_status st = begin(ctx, dir, &t);
    if (st == USL_OK) st = write_files(s, tok, t.name, dtype, report);
    if (st == USL_OK && verify)
        st = dtype == USL_NF4 ? usli_merged4_check(s, tok, t.name, dir, report)
                              : usli_export_check(s, tok, t.name, dir, dtype, report);
    if (st == USL_OK) st = move_in(ctx, t.name, dir);
    usli_temporary_close(ctx, &t, false);
    /* Another export may be at work in it. */
    if (st != USL_OK && !was_there) usli_remove_empty_dir(dir);
    return st;
}
