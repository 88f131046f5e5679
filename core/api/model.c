/* Models and generation behind unsloth.h. */
#include <string.h>

#include "core/api/need.h"
#include "core/infer/generate.h"
#include "core/infer/look.h"

usl_status usl_model_open(usl_ctx *ctx, const char *path, const usl_model_opts *opts, usl_model **out) {
    *out = NULL;
    USLI_NEED_PATH(ctx, path, USL_ACCESS_READ);
    return usli_model_open(ctx, path, opts, out);
}

usl_status usl_model_random(usl_ctx *ctx, const char *config_json, uint64_t seed, const usl_model_opts *opts,
                            usl_model **out) {
    *out = NULL;
    USLI_NEED(ctx, config_json);
    return usli_model_random(ctx, config_json, seed, opts, out);
}

usl_status usl_model_share(usl_ctx *ctx, usl_model *base, usl_model **out) {
    *out = NULL;
    USLI_NEED(ctx, base);
    return usli_model_share(ctx, base, out);
}

uint64_t usl_model_memory(usl_model *m) {
    size_t used, total;
    if (m->exec.backend->host) return usl_peak_memory();
    return m->exec.backend->memory(&m->exec, &used, &total) == USL_OK ? used : 0;
}

void usl_model_free(usl_model *model) {
    usli_model_release(model);
}

void usl_model_get_info(const usl_model *m, usl_model_info *info) {
    usl_model_info i = { .architecture = m->config.arch->name,
                         .device = m->exec.backend->name,
                         .dtype = m->dtype,
                         .layers = m->config.layers,
                         .hidden = m->config.hidden,
                         .intermediate = m->config.inter,
                         .heads = m->config.heads,
                         .kv_heads = m->config.kv_heads,
                         .head_dim = m->config.head_dim,
                         .vocab = m->config.vocab,
                         .context = m->context,
                         .weight_bytes = usli_model_weight_bytes(m),
                         .tied = m->config.tied,
                         .shared = usli_model_sharers(m) };
    usli_param_ref p;
    for (int64_t k = 0; usli_model_param(m, k, &p); k++) {
        int64_t n = p.count;
        i.parameters += n;
        if (p.trainable) i.trainable += n;
    }
    size_t size = info->size < sizeof i ? info->size : sizeof i;
    i.size = info->size;
    memcpy(info, &i, size);
}

usl_status usl_model_add_lora(usl_model *model, const usl_lora_opts *opts) {
    return usli_model_add_lora(model, opts);
}

usl_status usl_model_load_adapter(usl_model *model, const char *dir, const char *name) {
    USLI_NEED_PATH(model->ctx, dir, USL_ACCESS_READ);
    return usli_model_load_adapter(model, dir, name);
}

usl_status usl_model_set_adapter(usl_model *model, const char *name) {
    return usli_model_set_adapter(model, name);
}

const char *usl_model_adapter(const usl_model *model) {
    return model->active ? model->active->name : NULL;
}

usl_status usl_model_save_adapter(usl_model *model, const char *dir, const char *base) {
    USLI_NEED_PATH(model->ctx, dir, USL_ACCESS_WRITE);
    return usli_model_save_adapter(model, dir, base, false);
}

usl_status usl_model_save_adapter_as_lora(usl_model *model, const char *dir, const char *base) {
    USLI_NEED_PATH(model->ctx, dir, USL_ACCESS_WRITE);
    return usli_model_save_adapter(model, dir, base, true);
}

usl_status usl_model_resize_vocab(usl_model *model, int64_t rows, int64_t mean_of) {
    return usli_model_resize(model, rows, mean_of);
}

usl_status usl_model_blend_row(usl_model *model, int64_t row, const int32_t *ids, size_t count, double weight) {
    if (count) USLI_NEED(model->ctx, ids);
    return usli_model_blend_row(model, row, ids, count, weight);
}

const char *usl_model_param_name(usl_model *m, int64_t i, int *trainable) {
    usli_param_ref p;
    if (i < 0 || !usli_model_param(m, i, &p)) return NULL;
    memcpy(m->name, p.name, sizeof m->name);
    if (trainable) *trainable = p.trainable;
    return m->name;
}

int usl_model_param_info(const usl_model *m, int64_t i, usl_param_info *info) {
    usli_param_ref p;
    if (i < 0 || !usli_model_param(m, i, &p)) return 0;
    usl_param_info out = { .ndim = p.ndim,
                           .shape = { p.shape[0], p.shape[1], p.shape[2] },
                           .dtype = USL_F32,
                           .bytes = (uint64_t)p.count * sizeof(float),
                           .trainable = p.trainable };
    if (p.part == 0) {
        const usli_weight *w = usli_base_weight(m, p.slot, p.layer);
        out.dtype = w->m.dtype;
        out.bytes = w->storage->bytes;
    }
    size_t size = info->size < sizeof out ? info->size : sizeof out;
    out.size = info->size;
    memcpy(info, &out, size);
    return 1;
}

static usl_status no_param(const usl_model *m, const char *name) {
    return usli_fail(m->ctx, USL_ERR_NOT_FOUND, "the model has no parameter \"%s\"", name);
}

usl_status usl_model_get_param(usl_model *m, const char *name, usl_tensor **out) {
    usli_param_ref p;
    *out = NULL;
    USLI_NEED(m->ctx, name);
    if (!usli_model_find_param(m, name, &p)) return no_param(m, name);
    USLI_TRY(usli_model_pull(m));
    USLI_TRY(usl_tensor_new(m->ctx, USL_F32, p.ndim, p.shape, out));
    float *dst = usl_tensor_data(*out);
    if (p.data)
        usli_param_publish(&p, p.data, dst);
    else
        usli_model_rows(m, p.slot, p.layer, false, 0, usli_base_weight(m, p.slot, p.layer)->m.rows, dst);
    return USL_OK;
}

usl_status usl_model_set_param(usl_model *m, const char *name, const usl_tensor *value) {
    USLI_NEED(m->ctx, name);
    USLI_NEED(m->ctx, value);
    usli_param_ref p;
    if (!usli_model_find_param(m, name, &p)) return no_param(m, name);
    if (!p.trainable)
        return usli_fail(m->ctx, USL_ERR_INVALID, "parameter \"%s\" is frozen; only trained ones can be set", name);
    if (usl_tensor_elements(value) != p.count)
        return usli_fail(m->ctx, USL_ERR_SHAPE, "parameter \"%s\" has %lld numbers; the tensor has %lld", name,
                         (long long)p.count, (long long)usl_tensor_elements(value));
    usl_tensor *copy;
    USLI_TRY(usl_tensor_to(m->ctx, value, USL_F32, &copy));
    usl_status st = usli_model_pull(m);
    if (st == USL_OK) usli_param_take(&p, usl_tensor_data(copy), p.data);
    if (st == USL_OK && p.device != p.data)
        st = m->exec.backend->copy_in(&m->exec, p.device, p.data, (size_t)p.count * sizeof(float));
    if (st == USL_OK && m->active) m->active->norms_fresh = false;
    usl_tensor_free(copy);
    return st;
}

/* The tensor goes again when what was to fill it failed. */
static usl_status keep_if(usl_status st, usl_tensor **out) {
    if (st == USL_OK) return st;
    usl_tensor_free(*out);
    *out = NULL;
    return st;
}

usl_status usl_model_logits(usl_model *m, const int32_t *ids, size_t count, usl_tensor **out) {
    int64_t shape[2] = { (int64_t)count, m->config.vocab };
    USLI_TRY(usl_tensor_new(m->ctx, USL_F32, 2, shape, out));
    return keep_if(usli_logits(m, ids, (int64_t)count, usl_tensor_data(*out)), out);
}

usl_status usl_model_hidden_states(usl_model *m, const int32_t *ids, size_t count, usl_tensor **out) {
    int64_t shape[3] = { m->config.layers + 1, (int64_t)count, m->config.hidden };
    USLI_TRY(usl_tensor_new(m->ctx, USL_F32, 3, shape, out));
    return keep_if(usli_hidden_states(m, ids, (int64_t)count, usl_tensor_data(*out)), out);
}

usl_status usl_model_attentions(usl_model *m, const int32_t *ids, size_t count, int64_t layer, usl_tensor **out) {
    int64_t shape[3] = { m->config.heads, (int64_t)count, (int64_t)count };
    USLI_TRY(usl_tensor_new(m->ctx, USL_F32, 3, shape, out));
    return keep_if(usli_attentions(m, ids, (int64_t)count, layer, usl_tensor_data(*out)), out);
}

usl_status usl_model_unembed(usl_model *m, const usl_tensor *states, usl_tensor **out) {
    *out = NULL;
    USLI_NEED(m->ctx, states);
    int64_t shape[2] = { usl_tensor_dim(states, 0), m->config.vocab };
    if (usl_tensor_ndim(states) != 2 || shape[0] < 1 || usl_tensor_dim(states, 1) != m->config.hidden)
        return usli_fail(m->ctx, USL_ERR_SHAPE, "hidden states have the shape (rows, %lld) in this model",
                         (long long)m->config.hidden);
    usl_tensor *dense;
    USLI_TRY(usl_tensor_to(m->ctx, states, USL_F32, &dense));
    usl_status st = usl_tensor_new(m->ctx, USL_F32, 2, shape, out);
    if (st == USL_OK) st = keep_if(usli_unembed(m, usl_tensor_data(dense), shape[0], usl_tensor_data(*out)), out);
    usl_tensor_free(dense);
    return st;
}

usl_status usl_model_generate(usl_model *m, const int32_t *ids, size_t count, const usl_generate_opts *opts,
                              int32_t **out, size_t *out_count) {
    usli_prompt prompt = { ids, (int64_t)count };
    usli_generated row;
    *out = NULL;
    *out_count = 0;
    USLI_TRY(usli_generate(m, &prompt, 1, opts, &row));
    *out = row.ids;
    *out_count = (size_t)row.count;
    return USL_OK;
}

usl_status usl_generator_new(usl_model *m, const int32_t *ids, size_t count, const usl_generate_opts *opts,
                             usl_generator **out) {
    usli_prompt prompt = { ids, (int64_t)count };
    return usli_generator_new(m, &prompt, 1, opts, out);
}

void usl_generator_free(usl_generator *generator) {
    usli_generator_free(generator);
}

usl_status usl_generator_next(usl_generator *generator, int32_t *id) {
    return usli_generator_next(generator, id);
}

usl_status usl_model_decode_rate(usl_model *model, int rows, int64_t prompt, int64_t new_tokens, usl_decode_rate *out) {
    USLI_NEED(model->ctx, out);
    return usli_decode_rate(model, rows, prompt, new_tokens, out);
}

usl_status usl_model_gemm_rate(usl_model *model, double *flops) {
    return usli_model_gemm_rate(model, flops);
}
