/* PEFT's folder of an adapter: writing. */
#include <math.h>
#include <string.h>

#include "core/base/utf8.h"
#include "core/io/json.h"
#include "core/io/safetensors.h"
#include "core/model/adapter.h"

/* The end of a module's name that says which one it is: "layers.0.self_attn.q_proj". */
static const char *own_end(const char *name) {
    return strncmp(name, "model.", 6) == 0 ? name + 6 : name;
}

/* Chosen by a word of target_modules. In a mixture PEFT takes those of the MLP for the experts'. */
static bool has_word(const usli_config *c, usli_slot slot) {
    bool dense = slot == USLI_GATE || slot == USLI_UP || slot == USLI_DOWN;
    return slot < USLI_LINEARS && !usli_parameter_name(slot) && !(dense && c->experts > 0);
}

/* Names of kinds of modules, where every chosen layer has every chosen kind; else names of modules. */
static bool is_grid(const usl_model *m, const usli_adapter *a, const bool *kinds, const bool *layers) {
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++) {
            int64_t rows, cols;
            if (!has_word(&m->config, (usli_slot)s)) continue;
            bool there = usli_slot_shape(&m->config, (usli_slot)s, l, &rows, &cols) && kinds[s] && layers[l];
            if (there != (usli_adapter_module(m, a, (usli_slot)s, l)->rank > 0)) return false;
        }
    return true;
}

/* target_modules and layers_to_transform, both new. */
static usl_status put_targets(const usl_model *m, const usli_adapter *a, json_t *targets, json_t **layers) {
    bool kinds[USLI_LINEARS] = { false }, names = false, all = true;
    bool *used = usli_calloc(m->ctx, (size_t)m->config.layers, sizeof *used);
    int64_t count = usli_module_count(&m->config), layer;
    if (!used) return usli_nomem(m->ctx, (size_t)m->config.layers);
    for (int64_t i = 0; i < count; i++) {
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        if (!a->modules[i].rank || usli_parameter_name(slot)) continue;
        if (has_word(&m->config, slot))
            kinds[slot] = used[layer] = true;
        else
            names = true;
    }
    for (int64_t l = 0; l < m->config.layers; l++) all &= used[l];
    bool grid = is_grid(m, a, kinds, used) && (all || !names);
    for (int s = 0; grid && s < USLI_LINEARS; s++)
        if (kinds[s]) json_array_append_new(targets, json_string(usli_slots[s].peft));
    for (int64_t i = 0; i < count; i++) {
        char name[128];
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        if (!a->modules[i].rank || (grid && has_word(&m->config, slot)) || usli_parameter_name(slot)) continue;
        usli_module_name(&m->config, slot, layer, name, sizeof name);
        json_array_append_new(targets, json_string(own_end(name)));
    }
    *layers = grid && !all && json_array_size(targets) ? json_array() : json_null();
    for (int64_t l = 0; json_is_array(*layers) && l < m->config.layers; l++)
        if (used[l]) json_array_append_new(*layers, json_integer(l));
    usli_free(m->ctx, used);
    return USL_OK;
}

/* Every layer that has such a matrix has the same adapter on it. */
static bool everywhere(const usl_model *m, const usli_adapter *a, usli_slot slot) {
    const usli_lora_module *first = NULL;
    for (int64_t l = 0; l < m->config.layers; l++) {
        int64_t rows, cols;
        if (!usli_slot_shape(&m->config, slot, l, &rows, &cols)) continue;
        const usli_lora_module *o = usli_adapter_module(m, a, slot, l);
        if (!first) first = o;
        if (!o->rank || o->rank != first->rank || o->alpha != first->alpha) return false;
    }
    return first;
}

/* target_parameters, which know no layers_to_transform. */
static json_t *parameters_json(const usl_model *m, const usli_adapter *a) {
    json_t *names = json_array();
    for (int s = 0; s < USLI_LINEARS; s++) {
        const char *word = usli_parameter_name((usli_slot)s);
        char name[128];
        if (!word) continue;
        bool all = everywhere(m, a, (usli_slot)s);
        if (all) json_array_append_new(names, json_string(word));
        for (int64_t l = 0; !all && l < m->config.layers; l++) {
            if (!usli_adapter_module(m, a, (usli_slot)s, l)->rank) continue;
            usli_slot_name(&m->config, (usli_slot)s, l, false, name, sizeof name);
            json_array_append_new(names, json_string(own_end(name)));
        }
    }
    return names;
}

static void put_patterns(const usl_model *m, const usli_adapter *a, int times, json_t *ranks, json_t *alphas) {
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        const usli_lora_module *l = &a->modules[i];
        int64_t layer;
        char name[128];
        if (!l->rank) continue;
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        if (usli_slot_experts(&m->config, slot) && everywhere(m, a, slot))
            snprintf(name, sizeof name, ".*\\.%s", usli_slots[slot].peft);
        else if (usli_parameter_name(slot))
            usli_slot_name(&m->config, slot, layer, false, name, sizeof name);
        else
            usli_module_name(&m->config, slot, layer, name, sizeof name);
        if (l->rank != a->rank) json_object_set_new(ranks, own_end(name), json_integer((json_int_t)times * l->rank));
        if (l->alpha != a->alpha) json_object_set_new(alphas, own_end(name), json_real(times * l->alpha));
    }
}

/* Copies that are no biases; NULL without any. */
static json_t *copied_modules(const usl_model *m, const usli_adapter *a) {
    json_t *names = json_array();
    int64_t inside = m->config.layers * USLI_LAYER_SLOTS;
    for (int64_t i = 0; i < usli_weight_count(&m->config); i++) {
        char name[128];
        if (!a->copies[i].storage) continue;
        usli_slot slot = i < inside ? (usli_slot)(i % USLI_LAYER_SLOTS) : (usli_slot)(USLI_EMBED + (i - inside));
        usli_slot_name(&m->config, slot, i < inside ? i / USLI_LAYER_SLOTS : 0, false, name, sizeof name);
        if (a->bias != USLI_BIAS_NONE && strcmp(strrchr(name, '.'), ".bias") == 0) continue;
        *strrchr(name, '.') = 0;
        const char *last = slot >= USLI_EMBED ? strrchr(name, '.') : NULL;
        const char *word = last ? last + 1 : own_end(name);
        bool there = false;
        for (size_t k = 0; k < json_array_size(names); k++)
            there |= strcmp(json_string_value(json_array_get(names, k)), word) == 0;
        if (!there) json_array_append_new(names, json_string(word));
    }
    if (json_array_size(names)) return names;
    json_decref(names);
    return json_null();
}

static json_t *init_json(const usli_adapter *a, bool as_lora) {
    bool plain = as_lora || strcmp(a->init, "default") == 0;
    if (plain || strcmp(a->init, "random") == 0) return json_boolean(plain);
    return json_string(a->init);
}

static usl_status settings_json(const usl_model *m, const usli_adapter *a, const char *base, bool as_lora,
                                json_t **out) {
    static const char *const BIAS[] = { "none", "all", "lora_only" };
    json_t *targets = json_array(), *layers = NULL, *ranks = json_object(), *alphas = json_object();
    json_t *parameters = parameters_json(m, a);
    if (base && !usli_utf8_is_text(base)) base = NULL; /* JSON cannot hold it: the adapter is saved without */
    usl_status st = put_targets(m, a, targets, &layers);
    int times = as_lora ? 2 : 1;
    double alpha = as_lora ? a->alpha * (a->rslora ? sqrt(2.0) : 2.0) : a->alpha;
    put_patterns(m, a, times, ranks, alphas);
    /* PEFT trains parameters without dropout only, and would not load another number. */
    double dropout = json_array_size(parameters) ? 0 : a->dropout;
    *out = json_pack("{s:s,s:i,s:f,s:f,s:s,s:o,s:o,s:o,s:b,s:s,s:s?,s:b,s:b,s:b,s:o,s:o,s:o,s:o,s:b,s:b}", "peft_type",
                     "LORA", "r", times * a->rank, "lora_alpha", alpha, "lora_dropout", dropout, "bias", BIAS[a->bias],
                     "target_modules", targets, "target_parameters", parameters, "layers_to_transform", layers,
                     "use_rslora", a->rslora, "task_type", "CAUSAL_LM", "base_model_name_or_path", base,
                     "inference_mode", 1, "fan_in_fan_out", 0, "use_dora", a->dora, "init_lora_weights",
                     init_json(a, as_lora), "rank_pattern", ranks, "alpha_pattern", alphas, "modules_to_save",
                     copied_modules(m, a), "lora_bias", 0, "ensure_weight_tying", a->ties);
    if (*out && strcmp(a->init, "loftq") == 0 && !as_lora)
        json_object_set_new(*out, "loftq_config",
                            json_pack("{s:i,s:i}", "loftq_bits", a->loftq_bits, "loftq_iter", a->loftq_iter));
    return st != USL_OK ? st : *out ? USL_OK : usli_nomem(m->ctx, 4096);
}

/* B' = [B | -B0], row by row. */
static usl_status write_wide(const usli_lora_module *l, int64_t out, usli_safetensors_writer *w, float *row) {
    for (int64_t r = 0; r < out; r++) {
        for (int k = 0; k < l->rank; k++) {
            row[k] = l->b[r * l->rank + k];
            row[l->rank + k] = -l->start_b[r * l->rank + k];
        }
        USLI_TRY(usli_safetensors_write(w, row, 2 * (size_t)l->rank * sizeof *row));
    }
    return USL_OK;
}

/* A parameter as plain LoRA: A' = [A; A0], B' = [B | -B0]. */
static usl_status write_as_lora(usl_model *m, const usli_param_ref *p, usli_safetensors_writer *w) {
    const usli_lora_module *l = usli_adapter_module(m, m->active, p->slot, p->layer);
    size_t bytes = (size_t)p->count * sizeof(float);
    if (p->part == 1) {
        USLI_TRY(usli_safetensors_write(w, l->a, bytes));
        return usli_safetensors_write(w, l->start_a, bytes);
    }
    float *row = usli_malloc(m->ctx, 2 * (size_t)l->rank * sizeof *row);
    if (!row) return usli_nomem(m->ctx, 2 * (size_t)l->rank * sizeof *row);
    usl_status st = write_wide(l, p->shape[0], w, row);
    usli_free(m->ctx, row);
    return st;
}

/* Of weights that are tied PEFT wants both. */
static usl_status write_tied(usl_model *m, usli_safetensors_writer *w, bool writing) {
    const usli_weight *embed = &m->active->copies[usli_weight_index(&m->config, USLI_EMBED, 0)];
    char name[128];
    int64_t shape[2] = { embed->m.rows, embed->m.cols };
    if (!m->active->ties || !embed->storage) return USL_OK;
    usli_copy_name(m, m->active, USLI_HEAD, 0, name, sizeof name);
    return writing ? usli_safetensors_write(w, embed->m.data, (size_t)(shape[0] * shape[1]) * sizeof(float))
                   : usli_safetensors_add(w, name, USL_F32, 2, shape);
}

static usl_status write_values(usl_model *m, const usli_param_ref *p, usli_safetensors_writer *w) {
    size_t bytes = (size_t)p->count * sizeof(float);
    if (!p->experts) return usli_safetensors_write(w, p->data, bytes);
    float *values = usli_malloc(m->ctx, bytes);
    if (!values) return usli_nomem(m->ctx, bytes);
    usli_param_publish(p, p->data, values);
    usl_status st = usli_safetensors_write(w, values, bytes);
    usli_free(m->ctx, values);
    return st;
}

static usl_status write_tensors(usl_model *m, const char *path, bool as_lora) {
    usli_safetensors_writer *w;
    usl_status st;
    USLI_TRY(usli_safetensors_create(m->ctx, path, &w));
    USLI_TRYGO(usli_safetensors_meta(w, "format", "pt"));
    if (m->config.stretched) {
        char length[24];
        snprintf(length, sizeof length, "%lld", (long long)m->config.stretched);
        USLI_TRYGO(usli_safetensors_meta(w, USLI_ADAPTER_LENGTH, length));
    }
    for (int writing = 0; writing < 2; writing++) {
        if (writing) USLI_TRYGO(usli_safetensors_begin(w));
        usli_param_ref p;
        for (int64_t i = 0; usli_model_param(m, i, &p); i++) {
            if (p.part == 0) continue;
            bool wide = as_lora && (p.part == 1 || p.part == 2);
            int64_t shape[2] = { p.shape[0] * (wide && p.part == 1 ? 2 : 1),
                                 p.shape[1] * (wide && p.part == 2 ? 2 : 1) };
            if (!writing)
                USLI_TRYGO(usli_safetensors_add(w, p.name, USL_F32, p.ndim, shape));
            else if (wide)
                USLI_TRYGO(write_as_lora(m, &p, w));
            else
                USLI_TRYGO(write_values(m, &p, w));
        }
        USLI_TRYGO(write_tied(m, w, writing));
        USLI_TRYGO(usli_resized_tensors(m, m->active, w, writing));
    }
    st = usli_safetensors_commit(w);
done:
    usli_safetensors_abandon(w);
    return st;
}

static usl_status check_as_lora(usl_model *m, const usli_adapter *a) {
    bool patterned = false;
    for (int64_t i = 0; i < usli_module_count(&m->config); i++)
        patterned |= a->modules[i].rank && (a->modules[i].rank != a->rank || a->modules[i].alpha != a->alpha);
    if (!a->start)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "path_initial_model_for_weight_conversion is for adapters that began with "
                         "init_lora_weights = \"pissa\"; leave it out");
    if (a->rslora && patterned)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "path_initial_model_for_weight_conversion cannot be combined with use_rslora and rank_pattern "
                         "or alpha_pattern together; leave one of them out");
    if (a->dora)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "path_initial_model_for_weight_conversion cannot turn an adapter with use_dora into plain "
                         "LoRA; save it as it is");
    return USL_OK;
}

usl_status usli_model_save_adapter(usl_model *m, const char *dir, const char *base, bool as_lora) {
    usl_ctx *ctx = m->ctx;
    const usli_adapter *a = m->active;
    if (!a)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "%s: the model has no active adapter to save; add one with get_peft_model", dir);
    if (as_lora) USLI_TRY(check_as_lora(m, a));
    USLI_TRY(usli_model_pull(m));
    USLI_TRY(usli_make_dirs(ctx, dir));
    char *config = usli_path_join(ctx, dir, "adapter_config.json"),
         *weights = usli_path_join(ctx, dir, "adapter_model.safetensors");
    char *text = NULL;
    size_t len;
    json_t *json = NULL;
    usl_status st = USL_OK;
    if (!config || !weights) {
        st = usli_nomem(ctx, 4096);
        goto done;
    }
    USLI_TRYGO(settings_json(m, a, base ? base : a->base ? a->base : m->path, as_lora, &json));
    USLI_TRYGO(write_tensors(m, weights, as_lora));
    USLI_TRYGO(usli_json_dump(ctx, json, 2, &text, &len));
    USLI_TRYGO(usli_write_file(ctx, config, text, len));
done:
    usli_free(ctx, text);
    if (json) json_decref(json);
    usli_free(ctx, config);
    usli_free(ctx, weights);
    return st;
}
