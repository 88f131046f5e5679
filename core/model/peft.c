/* PEFT's folder of an adapter, in and out. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/utf8.h"
#include "core/io/json.h"
#include "core/io/safetensors.h"
#include "core/model/adapter.h"

/* ---- Reading -------------------------------------------------------------------------------------------------------
 */

typedef struct folder {
    usl_model *m;
    char *config, *weights; /* paths */
    json_t *json;
    usli_safetensors *file;
    size_t used; /* tensors that belong somewhere */
} folder;

/* Some tools keep the adapter's name in a tensor's, or leave PEFT's own words out. */
static const usli_file_tensor *find(folder *f, const char *module, const char *part) {
    char base[160], name[288], head[64];
    size_t last = strcspn(part, ".");
    snprintf(head, sizeof head, "%.*s", (int)last, part);
    for (int i = 0; usli_name_spelling(i, module, base, sizeof base); i++)
        for (int form = 0; form < 3; form++) {
            const char *start = form == 2 ? "" : "base_model.model.";
            snprintf(name, sizeof name, "%s%s.%s%s%s", start, base, head, form == 1 ? ".default" : "", part + last);
            const usli_file_tensor *t = usli_safetensors_find(f->file, name);
            if (!t) continue;
            f->used++;
            return t;
        }
    return NULL;
}

static usl_status misfit(folder *f, const char *module, int64_t rows, int64_t cols) {
    return usli_fail(f->m->ctx, USL_ERR_SHAPE, "%s: the adapter of %s does not fit a %lldx%lld weight", f->weights,
                     module, (long long)rows, (long long)cols);
}

typedef struct parts {
    const usli_file_tensor *a, *b, *magnitude;
} parts;

static usl_status find_parts(folder *f, int64_t module, parts *p) {
    const usli_config *c = &f->m->config;
    int64_t layer, out, in;
    char name[128];
    usli_slot slot = usli_module_slot(c, module, &layer);
    bool table = slot == USLI_EMBED;
    usli_module_name(c, slot, layer, name, sizeof name);
    usli_lora_shape(c, slot, layer, &out, &in);
    p->a = find(f, name, table ? "lora_embedding_A" : "lora_A.weight");
    p->b = find(f, name, table ? "lora_embedding_B" : "lora_B.weight");
    p->magnitude = find(f, name, "lora_magnitude_vector");
    if (!p->magnitude) p->magnitude = find(f, name, "lora_magnitude_vector.weight");
    if (!p->a && !p->b && !p->magnitude) return USL_OK;
    const usli_file_tensor *a = p->a, *b = p->b, *g = p->magnitude;
    if (!a || !b || a->ndim != 2 || b->ndim != 2 || a->shape[1] != in || b->shape[0] != out ||
        a->shape[0] != b->shape[1] || a->shape[0] < 1 || a->shape[0] > 65536 ||
        (g && (g->ndim < 1 || g->ndim > 2 || g->shape[0] * (g->ndim > 1 ? g->shape[1] : 1) != out)))
        return misfit(f, name, out, in);
    return USL_OK;
}

/* A trained copy of a weight; of a bias beside an adapter the name says so. */
static usl_status find_copy(folder *f, usli_slot slot, int64_t layer, const usli_file_tensor **out) {
    static const char *const FORMS[] = { "", "base_layer.", "modules_to_save." };
    const usli_config *c = &f->m->config;
    char name[128], module[128], part[64];
    int64_t rows, cols;
    *out = NULL;
    bool there = usli_slot_shape(c, slot, layer, &rows, &cols);
    if (!there && slot != USLI_HEAD) return USL_OK;
    usli_slot_name(c, slot, layer, false, name, sizeof name);
    usli_module_name(c, slot, layer, module, sizeof module);
    for (size_t i = 0; i < sizeof FORMS / sizeof *FORMS && !*out; i++) {
        bool bias = strcmp(strrchr(name, '.'), ".bias") == 0;
        if (i == 1 && !bias) continue; /* what an adapter stands beside, not what is trained */
        snprintf(part, sizeof part, "%s%s", FORMS[i], strrchr(name, '.') + 1);
        *out = find(f, module, part);
    }
    const usli_file_tensor *t = *out;
    if (!t) return USL_OK;
    bool fits = cols ? t->ndim == 2 && t->shape[0] == rows && t->shape[1] == cols : t->ndim == 1 && t->shape[0] == rows;
    return fits ? USL_OK
                : usli_fail(f->m->ctx, USL_ERR_SHAPE, "%s: \"%s\" has another shape than the model's %lldx%lld",
                            f->weights, t->name, (long long)rows, (long long)(cols ? cols : 1));
}

/* PEFT writes the untouched tables beside adapters of embed_tokens and lm_head. */
static void pass_over(folder *f) {
    static const char *const MODULES[] = { "model.embed_tokens", "lm_head" };
    for (int i = 0; i < 2; i++) (void)find(f, MODULES[i], "base_layer.weight");
}

static bool is_tying(const folder *f) {
    return json_is_true(json_object_get(f->json, "ensure_weight_tying")) && f->m->config.tied;
}

typedef struct slots {
    usli_adapter_shape shape;
    bool any;
} slots;

static usl_status read_shape(folder *f, slots *s) {
    const usli_config *c = &f->m->config;
    bool all = true, some = false;
    for (int64_t i = 0; i < usli_module_count(c); i++) {
        parts p;
        USLI_TRY(find_parts(f, i, &p));
        if (!p.a) continue;
        s->shape.ranks[i] = (int)p.a->shape[0];
        s->any = true;
        *(p.magnitude ? &some : &all) = p.magnitude != NULL;
    }
    if (some && !all)
        return usli_fail(f->m->ctx, USL_ERR_FORMAT, "%s: some modules have lora_magnitude_vector and some have not",
                         f->weights);
    s->shape.dora = some;
    int64_t inside = c->layers * USLI_LAYER_SLOTS;
    for (int64_t i = 0; i < usli_weight_count(c); i++) {
        const usli_file_tensor *t;
        usli_slot slot = i < inside ? (usli_slot)(i % USLI_LAYER_SLOTS) : (usli_slot)(USLI_EMBED + (i - inside));
        USLI_TRY(find_copy(f, slot, i < inside ? i / USLI_LAYER_SLOTS : 0, &t));
        if (t) s->shape.copies[i] = s->any = true;
    }
    /* Of weights that are tied PEFT writes both. */
    if (is_tying(f) && s->shape.copies[usli_weight_index(c, USLI_EMBED, 0)])
        s->shape.copies[usli_weight_index(c, USLI_HEAD, 0)] = false;
    pass_over(f);
    if (!s->any) return usli_fail(f->m->ctx, USL_ERR_FORMAT, "%s: holds no adapter for this model", f->weights);
    if (f->used != f->file->count)
        return usli_fail(f->m->ctx, USL_ERR_UNSUPPORTED, "%s: %zu of its %zu tensors belong to no module of this model",
                         f->weights, f->file->count - f->used, f->file->count);
    return USL_OK;
}

static const char *text_of(const json_t *j, const char *key) {
    return json_string_value(json_object_get(j, key));
}

static usl_status refuse_settings(folder *f) {
    static const char *const REFUSED[] = {
        "fan_in_fan_out", "lora_bias",         "megatron_config",   "trainable_token_indices", "corda_config",
        "use_qalora",     "layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config"
    };
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++) {
        const json_t *v = json_object_get(f->json, REFUSED[i]);
        if (json_is_true(v) || (json_is_object(v) && json_object_size(v)) || (json_is_array(v) && json_array_size(v)))
            return usli_fail(f->m->ctx, USL_ERR_UNSUPPORTED, "%s: the adapter uses %s, which is not supported",
                             f->config, REFUSED[i]);
    }
    const char *type = text_of(f->json, "peft_type");
    if (type && strcmp(type, "LORA") != 0)
        return usli_fail(f->m->ctx, USL_ERR_UNSUPPORTED, "%s: the adapter is of type %s; LORA is supported", f->config,
                         type);
    return USL_OK;
}

/* Starts that changed the base are made again; the others left no trace. */
static usl_status read_init(folder *f, usli_adapter *a) {
    static const char *const CHANGING[] = { "olora", "corda", "lora_ga" };
    const char *init = text_of(f->json, "init_lora_weights");
    for (size_t i = 0; init && i < sizeof CHANGING / sizeof *CHANGING; i++)
        if (strcmp(init, CHANGING[i]) == 0)
            return usli_fail(
                f->m->ctx, USL_ERR_UNSUPPORTED,
                "%s: init_lora_weights = \"%s\" changed the base, which is not done here; save it from PEFT "
                "with path_initial_model_for_weight_conversion, as plain LoRA",
                f->config, init);
    bool changing = init && (strncmp(init, "pissa", 5) == 0 || strcmp(init, "loftq") == 0);
    snprintf(a->init, sizeof a->init, "%s", changing ? init : "default");
    const json_t *loftq = json_object_get(f->json, "loftq_config");
    a->loftq_bits =
        json_object_get(loftq, "loftq_bits") ? (int)json_integer_value(json_object_get(loftq, "loftq_bits")) : 4;
    a->loftq_iter =
        json_object_get(loftq, "loftq_iter") ? (int)json_integer_value(json_object_get(loftq, "loftq_iter")) : 1;
    return usli_start_check(f->m, a->init);
}

/* Alphas by pattern come through the same door as the options'. */
static usl_status read_alphas(folder *f, usli_adapter_shape *s) {
    const json_t *map = json_object_get(f->json, "alpha_pattern");
    if (!json_is_object(map) || !json_object_size(map)) return USL_OK;
    char *text = NULL;
    size_t len;
    USLI_TRY(usli_json_dump(f->m->ctx, map, 0, &text, &len));
    usl_status st = usli_match_alphas(f->m, text, s);
    usli_free(f->m->ctx, text);
    return st;
}

static usl_status read_settings(folder *f, usli_adapter *a) {
    usl_model *m = f->m;
    const json_t *base = json_object_get(f->json, "base_model_name_or_path");
    const char *bias = text_of(f->json, "bias");
    a->dropout = json_number_value(json_object_get(f->json, "lora_dropout"));
    a->rslora = json_is_true(json_object_get(f->json, "use_rslora"));
    a->ties = is_tying(f);
    a->bias = !bias || strcmp(bias, "none") == 0 ? USLI_BIAS_NONE
              : strcmp(bias, "all") == 0         ? USLI_BIAS_ALL
                                                 : USLI_BIAS_LORA;
    if (json_is_string(base) && !(a->base = usli_strdup(m->ctx, json_string_value(base))))
        return usli_nomem(m->ctx, 64);
    usli_adapter_set_scales(m, a);
    return read_init(f, a);
}

static usl_status read_alpha(folder *f, usli_adapter_shape *s, int *rank, double *alpha) {
    const json_t *r = json_object_get(f->json, "r"), *given = json_object_get(f->json, "lora_alpha");
    if (!json_is_integer(r) || !json_is_number(given) || json_integer_value(r) < 1)
        return usli_fail(f->m->ctx, USL_ERR_FORMAT, "%s: \"r\" or \"lora_alpha\" is missing", f->config);
    *rank = (int)json_integer_value(r);
    *alpha = json_number_value(given);
    for (int64_t i = 0; i < usli_module_count(&f->m->config); i++)
        if (s->ranks[i]) s->alphas[i] = *alpha;
    return read_alphas(f, s);
}

static usl_status fill(folder *f, const usli_file_tensor *t, float *dst) {
    int64_t n = 1;
    if (!t) return USL_OK;
    if (t->dtype != USL_F32 && t->dtype != USL_BF16 && t->dtype != USL_F16)
        return usli_fail(f->m->ctx, USL_ERR_UNSUPPORTED, "%s: tensor \"%s\" is no float tensor", f->weights, t->name);
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    if (!f->m->plan_only) usli_to_f32(t->data, t->dtype, dst, n);
    return USL_OK;
}

static usl_status read_values(folder *f, usli_adapter *a) {
    const usli_config *c = &f->m->config;
    int64_t inside = c->layers * USLI_LAYER_SLOTS;
    for (int64_t i = 0; i < usli_module_count(c); i++) {
        usli_lora_module *l = &a->modules[i];
        parts p;
        if (!l->rank) continue;
        USLI_TRY(find_parts(f, i, &p));
        USLI_TRY(fill(f, p.a, l->a));
        USLI_TRY(fill(f, p.b, l->b));
        USLI_TRY(fill(f, p.magnitude, l->magnitude));
    }
    for (int64_t i = 0; i < usli_weight_count(c); i++) {
        const usli_file_tensor *t;
        if (!a->copies[i].storage) continue;
        usli_slot slot = i < inside ? (usli_slot)(i % USLI_LAYER_SLOTS) : (usli_slot)(USLI_EMBED + (i - inside));
        USLI_TRY(find_copy(f, slot, i < inside ? i / USLI_LAYER_SLOTS : 0, &t));
        USLI_TRY(fill(f, t, (float *)(uintptr_t)a->copies[i].m.data));
    }
    return USL_OK;
}

usl_status usli_model_load_adapter(usl_model *m, const char *dir, const char *name) {
    usl_ctx *ctx = m->ctx;
    USLI_TRY(usli_adapter_check_free(m, "load_adapter"));
    folder f = { .m = m };
    slots s = { .any = false };
    usli_adapter *a = NULL;
    usl_status st = USL_OK;
    int rank = 0;
    double alpha = 0;
    f.config = usli_path_join(ctx, dir, "adapter_config.json");
    f.weights = usli_path_join(ctx, dir, "adapter_model.safetensors");
    if (!f.config || !f.weights) {
        st = usli_nomem(ctx, 4096);
        goto done;
    }
    USLI_TRYGO(usli_adapter_shape_new(m, &s.shape));
    USLI_TRYGO(usli_json_load(ctx, f.config, &f.json));
    USLI_TRYGO(usli_safetensors_open(ctx, f.weights, &f.file));
    USLI_TRYGO(refuse_settings(&f));
    USLI_TRYGO(read_shape(&f, &s));
    USLI_TRYGO(read_alpha(&f, &s.shape, &rank, &alpha));
    USLI_TRYGO(usli_adapter_new(m, name ? name : "default", &s.shape, &a));
    a->rank = rank;
    a->alpha = alpha;
    USLI_TRYGO(read_settings(&f, a));
    USLI_TRYGO(usli_start_base(m, a));
    USLI_TRYGO(read_values(&f, a));
    USLI_TRYGO(usli_adapter_attach(m, a));
    a = NULL;
done:
    usli_adapter_free(m, a);
    usli_adapter_shape_free(m, &s.shape);
    usli_safetensors_close(f.file);
    if (f.json) json_decref(f.json);
    usli_free(ctx, f.config);
    usli_free(ctx, f.weights);
    return st;
}

/* ---- Writing -------------------------------------------------------------------------------------------------------
 */

/* The end of a module's name that says which one it is: "layers.0.self_attn.q_proj". */
static const char *own_end(const char *name) {
    return strncmp(name, "model.", 6) == 0 ? name + 6 : name;
}

/* Names of kinds of modules, where every chosen layer has every chosen kind; else names of modules. */
static bool is_grid(const usl_model *m, const usli_adapter *a, const bool *kinds, const bool *layers) {
    for (int64_t l = 0; l < m->config.layers; l++)
        for (int s = 0; s < USLI_LINEARS; s++) {
            int64_t rows, cols;
            bool there = usli_slot_shape(&m->config, (usli_slot)s, l, &rows, &cols) && kinds[s] && layers[l];
            if (there != (usli_adapter_module(m, a, (usli_slot)s, l)->rank > 0)) return false;
        }
    return true;
}

/* target_modules and layers_to_transform, both new. */
static usl_status put_targets(const usl_model *m, const usli_adapter *a, json_t *targets, json_t **layers) {
    bool kinds[USLI_LINEARS] = { false }, ends = false, all = true;
    bool *used = usli_calloc(m->ctx, (size_t)m->config.layers, sizeof *used);
    if (!used) return usli_nomem(m->ctx, (size_t)m->config.layers);
    for (int64_t l = 0; l < m->config.layers; l++) {
        for (int s = 0; s < USLI_LINEARS; s++)
            if (usli_adapter_module(m, a, (usli_slot)s, l)->rank) kinds[s] = used[l] = true;
        all &= used[l];
    }
    for (int end = 0; end < 2; end++) ends |= usli_adapter_module(m, a, end ? USLI_HEAD : USLI_EMBED, 0)->rank > 0;
    bool grid = is_grid(m, a, kinds, used) && (all || !ends);
    for (int s = 0; grid && s < USLI_LINEARS; s++)
        if (kinds[s]) json_array_append_new(targets, json_string(usli_slots[s].peft));
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        int64_t layer;
        char name[128];
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        if (!a->modules[i].rank || (grid && slot < USLI_LINEARS)) continue;
        usli_module_name(&m->config, slot, layer, name, sizeof name);
        json_array_append_new(targets, json_string(own_end(name)));
    }
    *layers = grid && !all && json_array_size(targets) ? json_array() : json_null();
    for (int64_t l = 0; json_is_array(*layers) && l < m->config.layers; l++)
        if (used[l]) json_array_append_new(*layers, json_integer(l));
    usli_free(m->ctx, used);
    return USL_OK;
}

static void put_patterns(const usl_model *m, const usli_adapter *a, int times, json_t *ranks, json_t *alphas) {
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        const usli_lora_module *l = &a->modules[i];
        int64_t layer;
        char name[128];
        if (!l->rank) continue;
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
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
    if (base && !usli_utf8_is_text(base)) base = NULL; /* JSON cannot hold it: the adapter is saved without */
    usl_status st = put_targets(m, a, targets, &layers);
    int times = as_lora ? 2 : 1;
    double alpha = as_lora ? a->alpha * (a->rslora ? sqrt(2.0) : 2.0) : a->alpha;
    put_patterns(m, a, times, ranks, alphas);
    *out =
        json_pack("{s:s,s:i,s:f,s:f,s:s,s:o,s:o,s:b,s:s,s:s?,s:b,s:b,s:b,s:o,s:o,s:o,s:o,s:b,s:b}", "peft_type", "LORA",
                  "r", times * a->rank, "lora_alpha", alpha, "lora_dropout", a->dropout, "bias", BIAS[a->bias],
                  "target_modules", targets, "layers_to_transform", layers, "use_rslora", a->rslora, "task_type",
                  "CAUSAL_LM", "base_model_name_or_path", base, "inference_mode", 1, "fan_in_fan_out", 0, "use_dora",
                  a->dora, "init_lora_weights", init_json(a, as_lora), "rank_pattern", ranks, "alpha_pattern", alphas,
                  "modules_to_save", copied_modules(m, a), "lora_bias", 0, "ensure_weight_tying", a->ties);
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
    size_t bytes = (size_t)(p->shape[0] * p->shape[1]) * sizeof(float);
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

static usl_status write_tensors(usl_model *m, const char *path, bool as_lora) {
    usli_safetensors_writer *w;
    usl_status st;
    USLI_TRY(usli_safetensors_create(m->ctx, path, &w));
    USLI_TRYGO(usli_safetensors_meta(w, "format", "pt"));
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
                USLI_TRYGO(usli_safetensors_write(w, p.data, (size_t)(p.shape[0] * p.shape[1]) * sizeof(float)));
        }
        USLI_TRYGO(write_tied(m, w, writing));
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
