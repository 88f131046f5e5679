/* LoRA adapters: making, PEFT's folder in and out. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "core/base/utf8.h"
#include "core/io/json.h"
#include "core/model/load.h"

/* ---- Making
 * -------------------------------------------------------------------------------------------------------------------
 */

/* ranks: (layers * USLI_LINEARS), 0 where no adapter attaches. */
static usl_status adapter_new(usl_model *m, const char *name, const int *ranks, usli_adapter **out) {
    usl_ctx *ctx = m->ctx;
    int64_t count = m->config.layers * USLI_LINEARS;
    usli_adapter *a = usli_calloc(ctx, 1, sizeof *a);
    *out = NULL;
    if (!a || !(a->name = usli_strdup(ctx, name)) ||
        !(a->modules = usli_calloc(ctx, (size_t)count, sizeof *a->modules))) {
        usli_adapter_free(m, a);
        return usli_nomem(ctx, (size_t)count * sizeof *a->modules);
    }
    size_t numbers = 0;
    int64_t rows, cols;
    for (int64_t i = 0; i < count; i++) {
        usli_slot_shape(&m->config, (usli_slot)(i % USLI_LINEARS), i / USLI_LINEARS, &rows, &cols);
        numbers += (size_t)ranks[i] * (size_t)(rows + cols);
    }
    a->bytes = numbers * sizeof(float);
    if (!(a->storage = m->plan_only ? USLI_NOWHERE : usli_malloc_aligned(ctx, a->bytes))) {
        size_t bytes = a->bytes;
        usli_adapter_free(m, a);
        return usli_nomem(ctx, bytes);
    }
    usl_status st = usli_twin_open(&m->exec, a->storage, a->bytes, &a->twin);
    if (st != USL_OK) {
        usli_adapter_free(m, a);
        return st;
    }
    if (!m->plan_only) memset(a->storage, 0, a->bytes);
    float *next = a->storage;
    for (int64_t i = 0; i < count; i++) {
        usli_slot_shape(&m->config, (usli_slot)(i % USLI_LINEARS), i / USLI_LINEARS, &rows, &cols);
        usli_lora_module *l = &a->modules[i];
        l->rank = ranks[i];
        l->a = next;
        l->b = l->a + (int64_t)l->rank * cols;
        next = l->b + (int64_t)l->rank * rows;
    }
    *out = a;
    return USL_OK;
}

static void set_scale(usli_adapter *a) {
    a->scale = (float)(a->rslora ? a->alpha / sqrt((double)a->rank) : a->alpha / (double)a->rank);
}

static usl_status check_free(usl_model *m, const char *what) {
    if (m->trainers)
        return usli_fail(m->ctx, USL_ERR_INVALID, "%s: a trainer is using the model; close it first (trainer:close())",
                         what);
    return USL_OK;
}

/* Adds it to the list in place of one of the same name, and makes it active. */
static void attach(usl_model *m, usli_adapter *a) {
    for (usli_adapter **p = &m->adapters; *p; p = &(*p)->next) {
        if (strcmp((*p)->name, a->name) != 0) continue;
        usli_adapter *old = *p;
        *p = old->next;
        usli_adapter_free(m, old);
        break;
    }
    a->next = m->adapters;
    m->adapters = m->active = a;
    m->placing++;
}

/* From the adapter that is active till now to a new one. */
static usl_status change_over(usl_model *m, usli_adapter *a) {
    if (!m->plan_only) USLI_TRY(usli_model_pull(m));
    USLI_TRY(usli_twin_push(&m->exec, &a->twin));
    attach(m, a);
    return USL_OK;
}

/* Calls fn for every item of a comma-separated list. */
typedef usl_status (*item_fn)(usl_model *m, const char *item, size_t len, void *ud);
static usl_status each_item(usl_model *m, const char *list, item_fn fn, void *ud) {
    for (const char *p = list; *p;) {
        size_t n = strcspn(p, ",");
        const char *start = p;
        size_t len = n;
        while (len && *start == ' ') start++, len--;
        while (len && start[len - 1] == ' ') len--;
        if (len) USLI_TRY(fn(m, start, len, ud));
        p += n + (p[n] == ',');
    }
    return USL_OK;
}

static bool has_module(const usl_model *m, usli_slot slot) {
    int64_t rows, cols;
    for (int64_t l = 0; l < m->config.layers; l++)
        if (usli_slot_shape(&m->config, slot, l, &rows, &cols)) return true;
    return false;
}

static usl_status target_item(usl_model *m, const char *item, size_t len, void *ud) {
    bool *wanted = ud;
    for (int s = 0; s < USLI_LINEARS; s++) {
        if (!has_module(m, (usli_slot)s)) continue;
        if (strlen(usli_slots[s].peft) != len || memcmp(usli_slots[s].peft, item, len) != 0) continue;
        wanted[s] = true;
        return USL_OK;
    }
    char words[256];
    size_t used = 0;
    for (int s = 0; s < USLI_LINEARS; s++)
        if (has_module(m, (usli_slot)s))
            used += (size_t)snprintf(words + used, sizeof words - used, "%s%s", used ? ", " : "", usli_slots[s].peft);
    return usli_fail(m->ctx, USL_ERR_INVALID,
                     "target_modules: \"%.*s\" is no linear module of a %s block; use %s or \"all-linear\"", (int)len,
                     item, m->config.arch->name, words);
}

static usl_status layer_item(usl_model *m, const char *item, size_t len, void *ud) {
    bool *wanted = ud;
    int64_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (item[i] < '0' || item[i] > '9' || i > 8)
            return usli_fail(m->ctx, USL_ERR_INVALID, "layers_to_transform: \"%.*s\" is no layer number", (int)len,
                             item);
        n = n * 10 + (item[i] - '0');
    }
    if (n >= m->config.layers)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "layers_to_transform: there is no layer %lld; the model has 0 to %lld", (long long)n,
                         (long long)m->config.layers - 1);
    wanted[n] = true;
    return USL_OK;
}

static usl_status init_values(usl_model *m, usli_adapter *a, const char *init, uint64_t seed) {
    bool gaussian = strcmp(init, "gaussian") == 0, random = strcmp(init, "random") == 0;
    if (!gaussian && !random && strcmp(init, "default") != 0)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "init_lora_weights: \"%s\" is not known; use true, false or \"gaussian\"", init);
    for (int64_t i = 0; i < m->config.layers * USLI_LINEARS; i++) {
        usli_lora_module *l = &a->modules[i];
        if (!l->rank) continue;
        int64_t rows, cols;
        usli_slot_shape(&m->config, (usli_slot)(i % USLI_LINEARS), i / USLI_LINEARS, &rows, &cols);
        usli_rng rng;
        usli_rng_seed(&rng, seed + (uint64_t)i * 0x9E3779B97F4A7C15u);
        double bound = 1.0 / sqrt((double)cols);
        for (int64_t k = 0; k < l->rank * cols; k++)
            l->a[k] = (float)(gaussian ? usli_rng_normal(&rng) / l->rank : (2 * usli_rng_uniform(&rng) - 1) * bound);
        for (int64_t k = 0; random && k < l->rank * rows; k++)
            l->b[k] = (float)((2 * usli_rng_uniform(&rng) - 1) / sqrt((double)l->rank));
    }
    return USL_OK;
}

usl_status usli_model_add_lora(usl_model *m, const usl_lora_opts *given) {
    usl_lora_opts o = USL_LORA_OPTS_INIT;
    if (given) memcpy(&o, given, given->size < sizeof o ? given->size : sizeof o);
    usl_ctx *ctx = m->ctx;
    USLI_TRY(check_free(m, "get_peft_model"));
    if (m->full)
        return usli_fail(ctx, USL_ERR_INVALID, "an adapter cannot be added to a model loaded with full_finetuning");
    if (o.rank < 1 || o.rank > 4096)
        return usli_fail(ctx, USL_ERR_INVALID, "r is %d; a rank from 1 to 4096 is wanted", o.rank);
    if (!(o.dropout >= 0 && o.dropout < 1))
        return usli_fail(ctx, USL_ERR_INVALID, "lora_dropout is %g; a number from 0 to below 1 is wanted", o.dropout);
    if (!isfinite(o.alpha) || o.alpha <= 0)
        return usli_fail(ctx, USL_ERR_INVALID, "lora_alpha is %g; a positive number is wanted", o.alpha);
    int64_t layers = m->config.layers;
    bool targets[USLI_LINEARS] = { false };
    bool *wanted = usli_calloc(ctx, (size_t)layers, sizeof *wanted);
    int *ranks = usli_calloc(ctx, (size_t)layers * USLI_LINEARS, sizeof *ranks);
    usli_adapter *a = NULL;
    usl_status st = USL_OK;
    if (!wanted || !ranks) {
        st = usli_nomem(ctx, (size_t)layers * USLI_LINEARS * sizeof *ranks);
        goto done;
    }
    if (!o.target_modules || strcmp(o.target_modules, "all-linear") == 0)
        memset(targets, true, sizeof targets);
    else
        USLI_TRYGO(each_item(m, o.target_modules, target_item, targets));
    if (o.layers)
        USLI_TRYGO(each_item(m, o.layers, layer_item, wanted));
    else
        memset(wanted, true, (size_t)layers * sizeof *wanted);
    bool any = false;
    int64_t rows, cols;
    for (int64_t i = 0; i < layers * USLI_LINEARS; i++)
        if (wanted[i / USLI_LINEARS] && targets[i % USLI_LINEARS] &&
            usli_slot_shape(&m->config, (usli_slot)(i % USLI_LINEARS), i / USLI_LINEARS, &rows, &cols))
            ranks[i] = o.rank, any = true;
    if (!any) {
        st = usli_fail(ctx, USL_ERR_INVALID, "target_modules and layers_to_transform leave nothing to train");
        goto done;
    }
    USLI_TRYGO(adapter_new(m, o.name ? o.name : "default", ranks, &a));
    a->rank = o.rank;
    a->alpha = o.alpha;
    a->dropout = o.dropout;
    a->rslora = o.use_rslora;
    set_scale(a);
    if (!m->plan_only) USLI_TRYGO(init_values(m, a, o.init ? o.init : "default", o.seed));
    USLI_TRYGO(change_over(m, a));
    a = NULL;
done:
    usli_adapter_free(m, a);
    usli_free(ctx, wanted);
    usli_free(ctx, ranks);
    return st;
}

usl_status usli_model_set_adapter(usl_model *m, const char *name) {
    USLI_TRY(check_free(m, "set_adapter"));
    USLI_TRY(usli_model_pull(m));
    if (!name) {
        m->active = NULL;
        m->placing++;
        return USL_OK;
    }
    for (usli_adapter *a = m->adapters; a; a = a->next) {
        if (strcmp(a->name, name) != 0) continue;
        m->active = a;
        m->placing++;
        return USL_OK;
    }
    return usli_fail(m->ctx, USL_ERR_NOT_FOUND, "the model has no adapter \"%s\"; load or add it first", name);
}

/* ---- PEFT's folder
 * ------------------------------------------------------------------------------------------------------------- */

/* Finds the tensor of one module: PEFT writes "...lora_A.weight"; some tools keep the adapter's name in between. */
static const usli_file_tensor *find_ab(const usli_config *c, const usli_safetensors *file, usli_slot slot,
                                       int64_t layer, char part) {
    char plain[128], base[160], name[224];
    usli_slot_name(c, slot, layer, false, plain, sizeof plain);
    plain[strlen(plain) - strlen(".weight")] = 0;
    static const char *const FORMS[] = { "base_model.model.%s.lora_%c.weight",
                                         "base_model.model.%s.lora_%c.default.weight", "%s.lora_%c.weight" };
    enum { COUNT = sizeof FORMS / sizeof *FORMS };
    for (int i = 0; usli_name_spelling(i / COUNT, plain, base, sizeof base); i++) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(name, sizeof name, FORMS[i % COUNT], base, part);
#pragma GCC diagnostic pop
        const usli_file_tensor *t = usli_safetensors_find(file, name);
        if (t) return t;
    }
    return NULL;
}

static usl_status read_settings(usl_model *m, const char *path, const json_t *j, usli_adapter *a) {
    const json_t *r = json_object_get(j, "r"), *alpha = json_object_get(j, "lora_alpha"), *base;
    if (!json_is_integer(r) || !json_is_number(alpha) || json_integer_value(r) < 1)
        return usli_fail(m->ctx, USL_ERR_FORMAT, "%s: \"r\" or \"lora_alpha\" is missing", path);
    static const char *const REFUSED[] = { "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
                                           "fan_in_fan_out" };
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++) {
        const json_t *v = json_object_get(j, REFUSED[i]);
        if (json_is_true(v) || (json_is_object(v) && json_object_size(v)) || (json_is_array(v) && json_array_size(v)))
            return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: the adapter uses %s, which is not supported", path,
                             REFUSED[i]);
    }
    const char *type = json_string_value(json_object_get(j, "peft_type")),
               *bias = json_string_value(json_object_get(j, "bias"));
    if (type && strcmp(type, "LORA") != 0)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: the adapter is of type %s; LORA is supported", path, type);
    if (bias && strcmp(bias, "none") != 0)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "%s: the adapter trains biases (bias = \"%s\"), which is not supported", path, bias);
    a->rank = (int)json_integer_value(r);
    a->alpha = json_number_value(alpha);
    a->dropout = json_number_value(json_object_get(j, "lora_dropout"));
    a->rslora = json_is_true(json_object_get(j, "use_rslora"));
    base = json_object_get(j, "base_model_name_or_path");
    if (json_is_string(base) && !(a->base = usli_strdup(m->ctx, json_string_value(base))))
        return usli_nomem(m->ctx, 64);
    set_scale(a);
    return USL_OK;
}

static usl_status read_ranks(usl_model *m, const char *path, const usli_safetensors *file, int *ranks) {
    size_t used = 0;
    for (int64_t i = 0; i < m->config.layers * USLI_LINEARS; i++) {
        usli_slot slot = (usli_slot)(i % USLI_LINEARS);
        const usli_file_tensor *a = find_ab(&m->config, file, slot, i / USLI_LINEARS, 'A'),
                               *b = find_ab(&m->config, file, slot, i / USLI_LINEARS, 'B');
        if (!a && !b) continue;
        int64_t rows, cols;
        usli_slot_shape(&m->config, slot, i / USLI_LINEARS, &rows, &cols);
        if (!a || !b || a->ndim != 2 || b->ndim != 2 || a->shape[1] != cols || b->shape[0] != rows ||
            a->shape[0] != b->shape[1] || a->shape[0] < 1 || a->shape[0] > 65536)
            return usli_fail(m->ctx, USL_ERR_SHAPE,
                             "%s: the adapter of %s in layer %lld does not fit a %lldx%lld weight", path,
                             usli_slots[slot].peft, (long long)(i / USLI_LINEARS), (long long)rows, (long long)cols);
        ranks[i] = (int)a->shape[0];
        used += 2;
    }
    if (used == 0) return usli_fail(m->ctx, USL_ERR_FORMAT, "%s: holds no adapter for this model", path);
    if (used != file->count)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: %zu of its %zu tensors belong to no module of this model",
                         path, file->count - used, file->count);
    return USL_OK;
}

usl_status usli_model_load_adapter(usl_model *m, const char *dir, const char *name) {
    usl_ctx *ctx = m->ctx;
    USLI_TRY(check_free(m, "load_adapter"));
    char *config = usli_path_join(ctx, dir, "adapter_config.json"),
         *weights = usli_path_join(ctx, dir, "adapter_model.safetensors");
    int *ranks = usli_calloc(ctx, (size_t)m->config.layers * USLI_LINEARS, sizeof *ranks);
    json_t *json = NULL;
    usli_safetensors *file = NULL;
    usli_adapter *a = NULL;
    usl_status st = USL_OK;
    if (!config || !weights || !ranks) {
        st = usli_nomem(ctx, 4096);
        goto done;
    }
    USLI_TRYGO(usli_json_load(ctx, config, &json));
    USLI_TRYGO(usli_safetensors_open(ctx, weights, &file));
    USLI_TRYGO(read_ranks(m, weights, file, ranks));
    USLI_TRYGO(adapter_new(m, name ? name : "default", ranks, &a));
    USLI_TRYGO(read_settings(m, config, json, a));
    for (int64_t i = 0; i < m->config.layers * USLI_LINEARS; i++) {
        if (!ranks[i]) continue;
        usli_slot slot = (usli_slot)(i % USLI_LINEARS);
        if (ranks[i] != a->rank) {
            st = usli_fail(ctx, USL_ERR_UNSUPPORTED, "%s: ranks differ between modules, which is not supported",
                           weights);
            goto done;
        }
        const usli_file_tensor *t[2] = { find_ab(&m->config, file, slot, i / USLI_LINEARS, 'A'),
                                         find_ab(&m->config, file, slot, i / USLI_LINEARS, 'B') };
        float *dst[2] = { a->modules[i].a, a->modules[i].b };
        for (int p = 0; p < 2; p++) {
            if (t[p]->dtype != USL_F32 && t[p]->dtype != USL_BF16 && t[p]->dtype != USL_F16) {
                st = usli_fail(ctx, USL_ERR_UNSUPPORTED, "%s: tensor \"%s\" is no float tensor", weights, t[p]->name);
                goto done;
            }
            if (!m->plan_only) usli_to_f32(t[p]->data, t[p]->dtype, dst[p], t[p]->shape[0] * t[p]->shape[1]);
        }
    }
    USLI_TRYGO(change_over(m, a));
    a = NULL;
done:
    usli_adapter_free(m, a);
    usli_safetensors_close(file);
    if (json) json_decref(json);
    usli_free(ctx, config);
    usli_free(ctx, weights);
    usli_free(ctx, ranks);
    return st;
}

static json_t *settings_json(const usl_model *m, const usli_adapter *a, const char *base) {
    json_t *targets = json_array(), *layers = json_array();
    if (base && !usli_utf8_is_text(base)) base = NULL; /* JSON cannot hold it: the adapter is saved without */
    int64_t used_layers = 0;
    for (int s = 0; s < USLI_LINEARS; s++)
        for (int64_t l = 0; l < m->config.layers; l++)
            if (usli_adapter_module(m, a, (usli_slot)s, l)->rank) {
                json_array_append_new(targets, json_string(usli_slots[s].peft));
                break;
            }
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++)
            if (usli_adapter_module(m, a, (usli_slot)s, l)->rank) {
                json_array_append_new(layers, json_integer(l));
                used_layers++;
                break;
            }
    if (used_layers == m->config.layers) {
        json_decref(layers);
        layers = json_null();
    }
    return json_pack("{s:s,s:i,s:f,s:f,s:s,s:o,s:o,s:b,s:s,s:s?,s:b,s:b,s:b,s:b,s:{},s:{},s:n,s:b}", "peft_type",
                     "LORA", "r", a->rank, "lora_alpha", a->alpha, "lora_dropout", a->dropout, "bias", "none",
                     "target_modules", targets, "layers_to_transform", layers, "use_rslora", a->rslora, "task_type",
                     "CAUSAL_LM", "base_model_name_or_path", base, "inference_mode", 1, "fan_in_fan_out", 0, "use_dora",
                     0, "init_lora_weights", 1, "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", 0);
}

static usl_status write_tensors(usl_model *m, const usli_adapter *a, const char *path) {
    usli_safetensors_writer *w;
    usl_status st;
    USLI_TRY(usli_safetensors_create(m->ctx, path, &w));
    USLI_TRYGO(usli_safetensors_meta(w, "format", "pt"));
    for (int writing = 0; writing < 2; writing++) {
        if (writing) USLI_TRYGO(usli_safetensors_begin(w));
        usli_param_ref p;
        for (int64_t i = 0; usli_model_param(m, i, &p); i++) {
            if (p.part == 0) continue;
            if (writing)
                USLI_TRYGO(usli_safetensors_write(w, p.data, (size_t)(p.shape[0] * p.shape[1]) * sizeof(float)));
            else
                USLI_TRYGO(usli_safetensors_add(w, p.name, USL_F32, 2, p.shape));
        }
    }
    st = usli_safetensors_commit(w);
done:
    (void)a;
    usli_safetensors_abandon(w);
    return st;
}

usl_status usli_model_save_adapter(usl_model *m, const char *dir, const char *base) {
    usl_ctx *ctx = m->ctx;
    const usli_adapter *a = m->active;
    if (!a)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "%s: the model has no active adapter to save; add one with get_peft_model", dir);
    USLI_TRY(usli_model_pull(m));
    USLI_TRY(usli_make_dirs(ctx, dir));
    char *config = usli_path_join(ctx, dir, "adapter_config.json"),
         *weights = usli_path_join(ctx, dir, "adapter_model.safetensors");
    char *text = NULL;
    size_t len;
    json_t *json = settings_json(m, a, base ? base : a->base ? a->base : m->path);
    usl_status st = USL_OK;
    if (!config || !weights || !json) {
        st = usli_nomem(ctx, 4096);
        goto done;
    }
    USLI_TRYGO(write_tensors(m, a, weights));
    USLI_TRYGO(usli_json_dump(ctx, json, 2, &text, &len));
    USLI_TRYGO(usli_write_file(ctx, config, text, len));
done:
    usli_free(ctx, text);
    if (json) json_decref(json);
    usli_free(ctx, config);
    usli_free(ctx, weights);
    return st;
}
