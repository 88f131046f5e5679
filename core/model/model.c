/* Making, sharing and freeing a model; its small queries. Loading itself is in load.c. */
#include "core/model/model.h"

#include <math.h>
#include <string.h>

#include "core/cpu/cpu.h"
#include "core/io/json.h"
#include "core/model/adapter.h"
#include "core/model/load.h"
#include "core/ops/planned.h"
#include "kernels/cuda.h"

enum { MAX_CONTEXT = 1 << 30 }; /* positions are 32-bit, and a table has a row for each */

/* On a CPU a checkpoint of float32, and full fine-tuning, stay in float32. */
static usl_dtype default_dtype(const usl_model *m) {
    bool exact = m->exec.backend->host && (m->full || m->config.dtype == USL_F32);
    return exact ? USL_F32 : m->exec.backend->fast_dtype(&m->exec);
}

static usl_status open_device(usl_ctx *ctx, const char *device, bool plan_only, usli_exec *x) {
    if (strcmp(device, "cpu") == 0) return usli_cpu_open(ctx, x);
    int number = 0, end = 0;
    if (strcmp(device, "cuda") == 0 || (sscanf(device, "cuda:%3d%n", &number, &end) == 1 && !device[end]))
        return plan_only && !usli_cuda_count() ? usli_cuda_open_absent(ctx, x) : usli_cuda_open(ctx, number, x);
    return usli_fail(ctx, USL_ERR_INVALID, "device \"%s\" is not known; \"cpu\", \"cuda\" and \"cuda:1\" are", device);
}

/* Everything but the weights: what opening and making at random share. */
static usl_status begin(usl_ctx *ctx, const usl_model_opts *opts, usl_model **out) {
    *out = NULL;
    if (opts->dtype != USL_DTYPE_AUTO && opts->dtype != USL_F32 && opts->dtype != USL_BF16 && opts->dtype != USL_F16)
        return usli_fail(ctx, USL_ERR_INVALID, "dtype %s cannot be computed in; use float32, bfloat16 or float16",
                         usl_dtype_name(opts->dtype));
    if (opts->load_in_4bit && opts->full_finetuning)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "full_finetuning trains every weight and cannot be combined with load_in_4bit; "
                         "set load_in_4bit = false");
    if (opts->max_seq_length < 0 || opts->max_seq_length > MAX_CONTEXT)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "max_seq_length is %lld; a number from 1 to %d is wanted, or 0 for the model's own",
                         (long long)opts->max_seq_length, MAX_CONTEXT);
    usl_model *m = usli_calloc(ctx, 1, sizeof *m);
    if (!m) return usli_nomem(ctx, sizeof *m);
    m->ctx = ctx;
    usli_ctx_retain(ctx);
    atomic_init(&m->refs, 1);
    m->full = opts->full_finetuning;
    m->plan_only = opts->plan_only;
    const char *device = opts->device ? opts->device : usli_cuda_count() ? "cuda" : "cpu";
    usl_status st = open_device(ctx, device, m->plan_only, &m->exec);
    snprintf(m->device, sizeof m->device, "%s", device);
    if (st == USL_OK && opts->dtype == USL_BF16 && !m->exec.backend->host &&
        m->exec.backend->fast_dtype(&m->exec) == USL_F16)
        st = usli_fail(ctx, USL_ERR_UNSUPPORTED,
                       "%s: this GPU multiplies no bfloat16 (compute capability 8.0 and newer do); use dtype = "
                       "\"float16\", or leave dtype out",
                       device);
    if (st == USL_OK && m->plan_only) st = usli_plan_only(&m->exec);
    if (st != USL_OK) {
        usli_model_release(m);
        return st;
    }
    *out = m;
    return USL_OK;
}

static usl_status finish(usl_model *m, const usl_model_opts *opts) {
    const usli_config *c = &m->config;
    m->dtype = opts->dtype == USL_DTYPE_AUTO ? default_dtype(m) : opts->dtype;
    m->res_dtype = m->dtype == USL_F16 && c->arch->wide_stream ? USL_F32 : m->dtype;
    USLI_TRY(usli_model_place(m)); /* as products of that type want it */
    m->context = opts->max_seq_length > 0 ? opts->max_seq_length : c->context < 2048 ? c->context : 2048;
    return usli_model_make_angles(m);
}

/* What was changed at loading must stand in what is exported: the old spelling, which old and new transformers read. */
static usl_status record_rope(usl_ctx *ctx, usli_config *c, json_t *scaling) {
    json_object_del(c->source, "rope_parameters");
    int bad = json_object_set_new(c->source, "rope_theta", json_real(c->rope.theta));
    bad |= json_object_set(c->source, "rope_scaling", scaling);
    if (c->rot_dim != c->head_dim && !c->arch->latent)
        bad |= json_object_set_new(c->source, "partial_rotary_factor",
                                   json_real((double)c->rot_dim / (double)c->head_dim));
    return bad ? usli_nomem(ctx, 0) : USL_OK;
}

/* A length beyond the config's stretches rope linearly, as Unsloth does, unless rope_scaling says what to do. */
static usl_status stretch(usl_ctx *ctx, usli_config *c, const usl_model_opts *opts) {
    if (opts->max_seq_length <= c->context || c->rope.kind != USLI_ROPE_DEFAULT || opts->rope_scaling) return USL_OK;
    c->rope.kind = USLI_ROPE_LINEAR;
    c->rope.factor = (double)opts->max_seq_length / (double)c->context;
    c->stretched = opts->max_seq_length;
    if (!opts->plan_only)
        usli_log(ctx, USL_LOG_WARN,
                 "max_seq_length %lld is above the model's %lld: rope is scaled linearly by %g, which changes the "
                 "answers to short texts too; adapters trained so want the same max_seq_length when they are loaded",
                 (long long)opts->max_seq_length, (long long)c->context, c->rope.factor);
    json_t *scaling = json_pack("{s:s,s:f}", "rope_type", "linear", "factor", c->rope.factor);
    usl_status st = scaling ? record_rope(ctx, c, scaling) : usli_nomem(ctx, 0);
    if (scaling) json_decref(scaling);
    return st;
}

static usl_status override_rope(usl_ctx *ctx, usli_config *c, const char *text) {
    if (!text) return USL_OK;
    json_t *json;
    USLI_TRY(usli_json_parse(ctx, "rope_scaling", text, strlen(text), &json));
    usl_status st = json_is_object(json) ? usli_config_set_rope(ctx, "rope_scaling", json, c)
                                         : usli_fail(ctx, USL_ERR_INVALID, "rope_scaling is not a JSON object");
    if (st == USL_OK) st = record_rope(ctx, c, json);
    json_decref(json);
    return st;
}

static void fill_opts(usl_model_opts *o, const usl_model_opts *given) {
    *o = (usl_model_opts)USL_MODEL_OPTS_INIT;
    if (given) memcpy(o, given, given->size < sizeof *o ? given->size : sizeof *o);
}

usl_status usli_model_open(usl_ctx *ctx, const char *path, const usl_model_opts *given, usl_model **out) {
    usl_model_opts opts;
    fill_opts(&opts, given);
    usl_model *m;
    usl_status st;
    *out = NULL;
    USLI_TRY(begin(ctx, &opts, &m));
    usli_source src = { 0 };
    if (!(m->path = usli_strdup(ctx, path))) {
        st = usli_nomem(ctx, strlen(path));
        goto done;
    }
    USLI_TRYGO(usli_source_open(ctx, path, &src, &m->config));
    USLI_TRYGO(override_rope(ctx, &m->config, opts.rope_scaling));
    USLI_TRYGO(stretch(ctx, &m->config, &opts));
    USLI_TRYGO(usli_load_weights(m, &src, opts.load_in_4bit));
    USLI_TRYGO(finish(m, &opts));
done:
    usli_source_close(&src);
    if (st != USL_OK)
        usli_model_release(m);
    else
        *out = m;
    return st;
}

usl_status usli_model_random(usl_ctx *ctx, const char *config_json, uint64_t seed, const usl_model_opts *given,
                             usl_model **out) {
    usl_model_opts opts;
    fill_opts(&opts, given);
    usl_model *m;
    json_t *json = NULL;
    usl_status st;
    *out = NULL;
    USLI_TRY(begin(ctx, &opts, &m));
    USLI_TRYGO(usli_json_parse(ctx, "config", config_json, strlen(config_json), &json));
    USLI_TRYGO(usli_config_from_json(ctx, "config", json, NULL, &m->config));
    USLI_TRYGO(stretch(ctx, &m->config, &opts));
    USLI_TRYGO(usli_random_weights(m, seed, opts.load_in_4bit, opts.dtype));
    USLI_TRYGO(finish(m, &opts));
done:
    if (json) json_decref(json);
    if (st != USL_OK)
        usli_model_release(m);
    else
        *out = m;
    return st;
}

/* ---- Sharing: the table of weights is copied, what it points at is base's, which is kept ---- */

static usl_status check_shareable(usl_ctx *ctx, const usl_model *base) {
    USLI_TRY(usli_model_has_weights(ctx, base));
    if (base->full)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "the model's weights are trained (full_finetuning) and cannot be shared; open it without");
    for (const usli_adapter *a = base->adapters; a; a = a->next)
        if (usli_start_changes(a))
            return usli_fail(
                ctx, USL_ERR_INVALID,
                "the model's weights were changed by init_lora_weights = \"%s\" of adapter \"%s\" and cannot "
                "be shared; load the model anew",
                a->init, a->name);
    for (int64_t l = 0; base->places && l < base->config.layers; l++)
        if (base->places[l].on_host)
            return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                             "layers of the model wait in host memory, since the GPU is too small for them, and cannot "
                             "be shared; open it again for each use, or load it in 4 bits");
    return USL_OK;
}

static usl_status copy_facts(usl_model *m, const usl_model *base) {
    size_t divisors = (size_t)(base->config.rot_dim / 2) * sizeof(float);
    m->config = base->config;
    m->dtype = base->dtype;
    m->res_dtype = base->res_dtype;
    m->context = base->context;
    if (base->config.source && !(m->config.source = json_deep_copy(base->config.source))) return usli_nomem(m->ctx, 0);
    if (base->path && !(m->path = usli_strdup(m->ctx, base->path))) return usli_nomem(m->ctx, strlen(base->path));
    if (!base->rope_divisors) return USL_OK;
    if (!(m->rope_divisors = usli_malloc(m->ctx, divisors))) return usli_nomem(m->ctx, divisors);
    memcpy(m->rope_divisors, base->rope_divisors, divisors);
    return USL_OK;
}

static usl_status copy_table(usl_model *m, const usl_model *base) {
    size_t count = (size_t)usli_weight_count(&base->config);
    if (!(m->weights = usli_malloc(m->ctx, count * sizeof *m->weights)))
        return usli_nomem(m->ctx, count * sizeof *m->weights);
    for (size_t i = 0; i < count; i++) {
        usli_weight *w = &m->weights[i];
        *w = base->weights[i];
        w->grad = NULL;
        w->d.cached = NULL;
        if (w->m.nf4) w->m.nf4 = &w->nf4;
        if (w->d.nf4) w->d.nf4 = m->exec.backend->host ? &w->nf4 : &w->d_nf4;
    }
    return USL_OK;
}

usl_status usli_model_share(usl_ctx *ctx, usl_model *base, usl_model **out) {
    usl_model *m;
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    usl_status st;
    *out = NULL;
    if (base->base) base = base->base;
    USLI_TRY(check_shareable(ctx, base));
    opts.device = base->device;
    USLI_TRY(begin(ctx, &opts, &m));
    m->base = usli_model_retain(base);
    atomic_fetch_add(&base->sharers, 1);
    USLI_TRYGO(copy_facts(m, base));
    USLI_TRYGO(copy_table(m, base));
    USLI_TRYGO(usli_model_make_angles(m));
done:
    if (st != USL_OK)
        usli_model_release(m);
    else
        *out = m;
    return st;
}

usl_model *usli_model_retain(usl_model *m) {
    if (m) atomic_fetch_add(&m->refs, 1);
    return m;
}

void usli_model_release(usl_model *m) {
    if (!m || atomic_fetch_sub(&m->refs, 1) != 1) return;
    usl_ctx *ctx = m->ctx;
    for (usli_adapter *a = m->adapters, *next; a; a = next) {
        next = a->next;
        usli_adapter_free(m, a);
    }
    int64_t count = m->weights ? usli_weight_count(&m->config) : 0;
    for (int64_t i = 0; i < count && !m->base; i++) usli_storage_release(m->weights[i].storage);
    usli_free(ctx, m->weights);
    if (m->exec.backend) {
        usli_model_unplace(m);
        usli_model_drop_angles(m);
    }
    usli_free(ctx, m->rope_divisors);
    usli_free(ctx, m->path);
    usli_config_free(&m->config);
    if (m->exec.backend) m->exec.backend->close(&m->exec);
    if (m->base) {
        atomic_fetch_sub(&m->base->sharers, 1);
        usli_model_release(m->base);
    }
    usli_free(ctx, m);
    usl_ctx_free(ctx);
}

uint64_t usli_model_weight_bytes(const usl_model *m) {
    uint64_t bytes = 0;
    int64_t count = usli_weight_count(&m->config);
    for (int64_t i = 0; i < count; i++)
        if (m->weights[i].storage) bytes += m->weights[i].storage->bytes;
    return bytes;
}

usl_status usli_model_rows(const usl_model *m, usli_slot slot, int64_t layer, bool merge, int64_t first, int64_t count,
                           float *dst) {
    const usli_adapter *a = merge ? m->active : NULL;
    const usli_weight *w = usli_base_weight(m, slot, layer);
    if (slot == USLI_HEAD && !w->storage) w = usli_base_weight(m, USLI_EMBED, 0);
    if (a) w = slot == USLI_HEAD ? usli_model_head(m) : usli_model_weight(m, slot, layer);
    for (int64_t r = 0; r < count; r++) usli_adapted_row(m, a, w, slot, layer, first + r, dst + r * w->m.cols);
    return USL_OK;
}

/* ---- Parameters by name
 * ------------------------------------------------------------------------------------------------------- */

static void weight_param(const usl_model *m, usli_param_ref *out) {
    usli_weight *w = usli_base_weight(m, out->slot, out->layer);
    int64_t rows, cols, experts = usli_slot_experts(&m->config, out->slot);
    usli_slot_shape(&m->config, out->slot, out->layer, &rows, &cols);
    out->ndim = experts ? 3 : cols ? 2 : 1;
    out->count = rows * (cols ? cols : 1);
    out->experts = 0;
    out->shape[0] = experts ? experts : rows;
    out->shape[1] = experts ? rows / experts : cols ? cols : 1;
    out->shape[2] = experts ? cols : 1;
    out->trainable = m->full && out->slot != USLI_ROUTER_BIAS;
    out->data = out->trainable ? w->storage->data : NULL;
    out->device = out->trainable ? (float *)(uintptr_t)w->d.data : NULL;
    out->grad = out->trainable ? &w->grad : NULL;
    usli_slot_name(&m->config, out->slot, out->layer, false, out->name, sizeof out->name);
}

static void lora_param(const usl_model *m, usli_param_ref *out) {
    usli_lora_module *l = usli_adapter_module(m, m->active, out->slot, out->layer);
    int64_t rows, in, stack = usli_lora_stack(&m->config, out->slot);
    usli_lora_shape(&m->config, out->slot, out->layer, &rows, &in);
    const struct {
        const char *suffix;
        int ndim;
        int64_t shape[2];
        float *data, **grad;
    } parts[] = { { out->slot == USLI_EMBED ? "lora_embedding_A" : "lora_A.weight",
                    2,
                    { stack * l->rank, in },
                    l->a,
                    &l->da },
                  { out->slot == USLI_EMBED ? "lora_embedding_B" : "lora_B.weight",
                    2,
                    { rows / stack, stack * l->rank },
                    l->b,
                    &l->db },
                  { "lora_magnitude_vector", 1, { rows, 1 }, l->magnitude, &l->dmagnitude } },
      *p = &parts[out->part - 1];
    out->ndim = p->ndim;
    out->shape[0] = p->shape[0];
    out->shape[1] = p->shape[1];
    out->shape[2] = 1;
    out->count = p->shape[0] * p->shape[1];
    out->experts = stack > 1 && out->part == 2 ? stack : 0;
    out->trainable = true;
    out->data = p->data;
    out->device = usli_twin_at(&m->active->twin, out->data);
    out->grad = p->grad;
    char base[128];
    usli_adapter_place(m, m->active, out->slot, out->layer, base, sizeof base);
    snprintf(out->name, sizeof out->name, "base_model.model.%s.%s", base, p->suffix);
}

/* B of a stack lies expert by expert, (experts, out, rank); PEFT has it as (out, rank, experts). */
static int64_t published_at(const usli_param_ref *p, int64_t i) {
    int64_t rank = p->shape[1] / p->experts, out = p->shape[0], e = i / (out * rank), o = i / rank % out, r = i % rank;
    return (o * rank + r) * p->experts + e;
}

void usli_param_publish(const usli_param_ref *p, const float *from, float *to) {
    if (!p->experts) memcpy(to, from, (size_t)p->count * sizeof *to);
    for (int64_t i = 0; p->experts && i < p->count; i++) to[published_at(p, i)] = from[i];
}

void usli_param_take(const usli_param_ref *p, const float *from, float *to) {
    if (!p->experts) memcpy(to, from, (size_t)p->count * sizeof *to);
    for (int64_t i = 0; p->experts && i < p->count; i++) to[i] = from[published_at(p, i)];
}

static void copy_param(const usl_model *m, usli_param_ref *out) {
    usli_weight *w = &m->active->copies[usli_weight_index(&m->config, out->slot, out->layer)];
    int64_t cols;
    usli_slot_shape(&m->config, out->slot, out->layer, &out->shape[0], &cols);
    out->ndim = cols ? 2 : 1;
    out->shape[1] = cols ? cols : 1;
    out->shape[2] = 1;
    out->count = out->shape[0] * out->shape[1];
    out->experts = 0;
    out->trainable = true;
    out->data = (float *)(uintptr_t)w->m.data;
    out->device = (float *)(uintptr_t)w->d.data;
    out->grad = &w->grad;
    usli_copy_name(m, m->active, out->slot, out->layer, out->name, sizeof out->name);
}

/* The published order: embedding, layers, final norm, head. */
static usli_slot slot_at(const usl_model *m, int64_t i, int64_t *layer) {
    int64_t last = usli_weight_count(&m->config) - 2;
    bool inside = i > 0 && i < last;
    *layer = inside ? (i - 1) / USLI_LAYER_SLOTS : 0;
    if (inside) return (usli_slot)((i - 1) % USLI_LAYER_SLOTS);
    return i == 0 ? USLI_EMBED : i == last ? USLI_FINAL_NORM : USLI_HEAD;
}

enum { PARTS = 3 /* of a module */, COPY = 4 };

/* Weights, then the adapter's modules, then its copies. Sets slot, layer and part of place i; false when the model has
 * nothing there. */
static bool param_at(const usl_model *m, int64_t i, usli_param_ref *out) {
    int64_t weights = usli_weight_count(&m->config), modules = PARTS * usli_module_count(&m->config);
    if (i < weights) {
        out->slot = slot_at(m, i, &out->layer);
        out->part = 0;
        return usli_base_weight(m, out->slot, out->layer)->storage != NULL;
    }
    i -= weights;
    if (i < modules) {
        out->slot = usli_module_slot(&m->config, i / PARTS, &out->layer);
        out->part = 1 + (int)(i % PARTS);
        const usli_lora_module *l = usli_adapter_module(m, m->active, out->slot, out->layer);
        return out->part == PARTS ? l->magnitude != NULL : l->rank > 0;
    }
    out->slot = slot_at(m, i - modules, &out->layer);
    out->part = COPY;
    return m->active->copies[usli_weight_index(&m->config, out->slot, out->layer)].storage != NULL;
}

bool usli_model_param(const usl_model *m, int64_t index, usli_param_ref *out) {
    int64_t all = usli_weight_count(&m->config);
    if (m->active) all += all + PARTS * usli_module_count(&m->config);
    for (int64_t i = 0, seen = 0; i < all; i++) {
        if (!param_at(m, i, out) || seen++ < index) continue;
        if (out->part == 0)
            weight_param(m, out);
        else if (out->part == COPY)
            copy_param(m, out);
        else
            lora_param(m, out);
        return true;
    }
    return false;
}

bool usli_model_find_param(const usl_model *m, const char *name, usli_param_ref *out) {
    for (int64_t i = 0; usli_model_param(m, i, out); i++)
        if (strcmp(out->name, name) == 0) return true;
    return false;
}
