/* PEFT's folder of an adapter: reading. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/io/json.h"
#include "core/io/safetensors.h"
#include "core/model/adapter.h"

typedef struct folder {
    usl_model *m;
    char *config, *weights; /* paths */
    json_t *json;
    usli_safetensors *file;
    size_t used;                       /* tensors that belong somewhere */
    const usli_file_tensor *tables[2]; /* the base's embedding and head, where it was resized; else NULL */
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

/* The rank of a pair that fits a (out, in) matrix, or a stack of them; 0: it does not. */
static int rank_of(const parts *p, int64_t out, int64_t in, int64_t stack) {
    const usli_file_tensor *a = p->a, *b = p->b;
    if (!a || !b || a->ndim != 2 || b->ndim != 2 || a->shape[1] != in || b->shape[0] != out ||
        a->shape[0] != b->shape[1] || a->shape[0] < 1 || a->shape[0] % stack || a->shape[0] / stack > 65536)
        return 0;
    return (int)(a->shape[0] / stack);
}

static parts pair_at(folder *f, const char *place, bool table) {
    return (parts){ .a = find(f, place, table ? "lora_embedding_A" : "lora_A.weight"),
                    .b = find(f, place, table ? "lora_embedding_B" : "lora_B.weight") };
}

/* The experts' two adapters are one inside the other; a single one stands alone, and may be the other's. */
static parts find_stack(folder *f, usli_slot slot, int64_t layer) {
    const usli_config *c = &f->m->config;
    int64_t out, in, stack = usli_lora_stack(c, slot);
    char place[128];
    parts p = { NULL, NULL, NULL };
    usli_lora_shape(c, slot, layer, &out, &in);
    usli_place_name(c, slot, layer, true, place, sizeof place);
    if (slot == USLI_EXPERTS_IN) p = pair_at(f, place, false);
    if (p.a || p.b) return p;
    size_t used = f->used;
    usli_place_name(c, slot, layer, false, place, sizeof place);
    p = pair_at(f, place, false);
    if (rank_of(&p, out / stack, in, stack)) return p;
    f->used = used;
    return (parts){ NULL, NULL, NULL };
}

static usl_status find_parts(folder *f, int64_t module, parts *p, int *rank) {
    const usli_config *c = &f->m->config;
    int64_t layer, out, in, rows, cols;
    char name[128];
    usli_slot slot = usli_module_slot(c, module, &layer);
    *p = (parts){ NULL, NULL, NULL };
    *rank = 0;
    if (!usli_slot_shape(c, slot, layer, &rows, &cols) && slot != USLI_HEAD) return USL_OK;
    int64_t stack = usli_lora_stack(c, slot);
    usli_module_name(c, slot, layer, name, sizeof name);
    usli_lora_shape(c, slot, layer, &out, &in);
    *p = stack > 1 ? find_stack(f, slot, layer) : pair_at(f, name, slot == USLI_EMBED);
    if (stack == 1 && !(p->magnitude = find(f, name, "lora_magnitude_vector")))
        p->magnitude = find(f, name, "lora_magnitude_vector.weight");
    if (!p->a && !p->b && !p->magnitude) return USL_OK;
    const usli_file_tensor *g = p->magnitude;
    if (!(*rank = rank_of(p, out / stack, in, stack)) ||
        (g && (g->ndim < 1 || g->ndim > 2 || g->shape[0] * (g->ndim > 1 ? g->shape[1] : 1) != out)))
        return misfit(f, name, out, in);
    return USL_OK;
}

/* ---- Adapters of single experts, as older versions of PEFT wrote them ----------------------------------------------
 */

/* Matrices of each expert that a stack holds: gate and up, or down; the first one's number among the three. */
typedef struct single {
    usli_slot slot;
    int64_t layer, stack, out, in; /* out: of one of the parts */
    int first, parts;
} single;

static single single_of(const usli_config *c, int64_t module) {
    single s;
    int64_t out;
    s.slot = usli_module_slot(c, module, &s.layer);
    s.stack = usli_lora_stack(c, s.slot);
    s.first = s.slot == USLI_EXPERTS_IN ? 0 : 2;
    s.parts = s.slot == USLI_EXPERTS_IN ? 2 : 1;
    usli_lora_shape(c, s.slot, s.layer, &out, &s.in);
    s.out = out / s.stack / s.parts;
    return s;
}

/* part: 0 gate, 1 up, 2 down. */
static parts find_single(folder *f, const single *s, int64_t e, int part, char *place, size_t size) {
    const usli_mixture *mix = f->m->config.arch->mixture;
    snprintf(place, size, "model.layers.%lld.%s.experts.%lld.%s", (long long)s->layer, mix->folder, (long long)e,
             mix->words[part]);
    return pair_at(f, place, false);
}

/* *rank is what they come to when stacked; 0: there are none. */
static usl_status find_singles(folder *f, int64_t module, int *rank) {
    single s = single_of(&f->m->config, module);
    char place[128];
    *rank = 0;
    for (int64_t e = 0; e < s.stack; e++)
        for (int k = 0; k < s.parts; k++) {
            parts p = find_single(f, &s, e, s.first + k, place, sizeof place);
            bool none = !p.a && !p.b, begins = !e && !k;
            if (none && (begins || !*rank)) continue;
            int found = rank_of(&p, s.out, s.in, 1);
            if (!found || (!begins && found != *rank)) return misfit(f, place, s.out, s.in);
            *rank = found;
        }
    *rank *= s.parts;
    return USL_OK;
}

static bool is_tying(const folder *f) {
    return json_is_true(json_object_get(f->json, "ensure_weight_tying")) && f->m->config.tied;
}

/* ---- Tables ---------------------------------------------------------------------------------------------------------
 */

static const usli_slot TABLES[] = { USLI_EMBED, USLI_HEAD };

static bool is_table(usli_slot slot) {
    return slot == USLI_EMBED || slot == USLI_HEAD;
}

/* Whether modules_to_save names it. */
static bool is_saved(const folder *f, usli_slot slot) {
    const json_t *list = json_object_get(f->json, "modules_to_save");
    const char *word = slot == USLI_EMBED ? "embed_tokens" : "lm_head";
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i)), *dot = name ? strrchr(name, '.') : NULL;
        if (name && strcmp(dot ? dot + 1 : name, word) == 0) return true;
    }
    return slot == USLI_HEAD && is_tying(f) && is_saved(f, USLI_EMBED);
}

/* The tensor under the plain name is the base's table. */
static bool is_base(const folder *f, usli_slot slot) {
    return (f->tables[0] || f->tables[1]) && !is_saved(f, slot);
}

static const usli_file_tensor *look(folder *f, const char *module, const char *part) {
    size_t used = f->used;
    const usli_file_tensor *t = find(f, module, part);
    f->used = used;
    return t;
}

/* PEFT writes the base's tables beside the adapter where they were resized, and where the adapter changes them. */
static usl_status find_tables(folder *f) {
    static const char *const PARTS[] = { "base_layer.weight", "original_module.weight", "weight" };
    const usli_config *c = &f->m->config;
    const usli_file_tensor *found[2] = { NULL, NULL }, *shown = NULL;
    char module[128];
    for (int t = 0; t < 2; t++) {
        usli_module_name(c, TABLES[t], 0, module, sizeof module);
        for (int i = 0; i < (is_saved(f, TABLES[t]) ? 2 : 3) && !found[t]; i++) found[t] = look(f, module, PARTS[i]);
        if (found[t]) shown = found[t];
    }
    if (!shown || (shown->shape[0] == c->vocab && !f->m->resized)) return USL_OK;
    for (int t = 0; t < 2; t++) {
        const usli_file_tensor *g = found[t];
        bool is_float = g && (g->dtype == USL_F32 || g->dtype == USL_BF16 || g->dtype == USL_F16);
        if (g && (!is_float || g->ndim != 2 || g->shape[1] != c->hidden || g->shape[0] != shown->shape[0]))
            return usli_fail(f->m->ctx, USL_ERR_SHAPE, "%s: tensor \"%s\" is no embedding table of this model",
                             f->weights, g->name);
        f->tables[t] = g;
    }
    return USL_OK;
}

/* What stands in the file about tables and is no adapter and no copy. */
static void pass_over(folder *f) {
    char module[128];
    for (int t = 0; t < 2; t++) {
        usli_module_name(&f->m->config, TABLES[t], 0, module, sizeof module);
        (void)find(f, module, "base_layer.weight");
        (void)find(f, module, "original_module.weight");
        if (is_base(f, TABLES[t]))
            (void)find(f, module, "weight");
        else if (look(f, module, "weight"))
            (void)find(f, module, "modules_to_save.weight"); /* the same copy once more */
    }
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
    if (is_table(slot) && is_base(f, slot)) return USL_OK;
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
                : usli_fail(f->m->ctx, USL_ERR_SHAPE, "%s: \"%s\" has another shape than the model's %lldx%lld%s",
                            f->weights, t->name, (long long)rows, (long long)(cols ? cols : 1),
                            is_table(slot) ? "; model:resize_token_embeddings gives it as many rows" : "");
}

typedef struct slots {
    usli_adapter_shape shape;
    bool *single; /* (usli_module_count) stacks that stand there expert by expert */
    bool any;
} slots;

static usl_status read_shape(folder *f, slots *s) {
    const usli_config *c = &f->m->config;
    bool all = true, some = false;
    for (int64_t i = 0; i < usli_module_count(c); i++) {
        parts p;
        int64_t layer;
        int *rank = &s->shape.ranks[i];
        USLI_TRY(find_parts(f, i, &p, rank));
        if (!*rank && usli_slot_experts(c, usli_module_slot(c, i, &layer))) {
            USLI_TRY(find_singles(f, i, rank));
            if (*rank) s->single[i] = true;
        }
        if (!*rank) continue;
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

/* The model gets another size only once all of it fits. */
static usl_status read_shape_resized(folder *f, slots *s) {
    int64_t *vocab = &f->m->config.vocab, now = *vocab;
    for (int t = 0; t < 2; t++)
        if (f->tables[t]) *vocab = f->tables[t]->shape[0];
    usl_status st = read_shape(f, s);
    *vocab = now;
    return st;
}

static const char *text_of(const json_t *j, const char *key) {
    return json_string_value(json_object_get(j, key));
}

static usl_status refuse_settings(folder *f) {
    static const char *const REFUSED[] = { "fan_in_fan_out",    "lora_bias",
                                           "megatron_config",   "trainable_token_indices",
                                           "corda_config",      "use_qalora",
                                           "layer_replication", "alora_invocation_tokens",
                                           "arrow_config" };
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

static usl_status read_alpha(folder *f, slots *all, int *rank, double *alpha) {
    usli_adapter_shape *s = &all->shape;
    const json_t *r = json_object_get(f->json, "r"), *given = json_object_get(f->json, "lora_alpha");
    if (!json_is_integer(r) || !json_is_number(given) || json_integer_value(r) < 1)
        return usli_fail(f->m->ctx, USL_ERR_FORMAT, "%s: \"r\" or \"lora_alpha\" is missing", f->config);
    *rank = (int)json_integer_value(r);
    *alpha = json_number_value(given);
    for (int64_t i = 0; i < usli_module_count(&f->m->config); i++)
        if (s->ranks[i]) s->alphas[i] = *alpha;
    USLI_TRY(read_alphas(f, s));
    for (int64_t i = 0; i < usli_module_count(&f->m->config); i++)
        if (all->single[i]) s->alphas[i] *= single_of(&f->m->config, i).parts; /* as its rank */
    return USL_OK;
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

/* B of a stack is published otherwise than it lies. */
static usl_status fill_stacked(folder *f, const usli_file_tensor *t, int64_t stack, float *dst) {
    usli_param_ref p = { .experts = stack, .shape = { t->shape[0], t->shape[1] }, .count = t->shape[0] * t->shape[1] };
    float *values = usli_malloc(f->m->ctx, (size_t)p.count * sizeof *values);
    if (!values) return usli_nomem(f->m->ctx, (size_t)p.count * sizeof *values);
    usl_status st = fill(f, t, values);
    if (st == USL_OK && !f->m->plan_only) usli_param_take(&p, values, dst);
    usli_free(f->m->ctx, values);
    return st;
}

/* A of gate over A of up, B of gate beside B of up, with zeros in the other corners. */
static usl_status fill_singles(folder *f, int64_t module, usli_lora_module *l) {
    single s = single_of(&f->m->config, module);
    char place[128];
    int64_t rank = l->rank / s.parts;
    size_t bytes = (size_t)(s.out * rank) * sizeof(float);
    float *values = usli_malloc(f->m->ctx, bytes);
    usl_status st = values ? USL_OK : usli_nomem(f->m->ctx, bytes);
    for (int64_t e = 0; st == USL_OK && e < s.stack * s.parts; e++) {
        int part = (int)(e % s.parts);
        parts p = find_single(f, &s, e / s.parts, s.first + part, place, sizeof place);
        st = fill(f, p.a, f->m->plan_only ? l->a : l->a + e * rank * s.in);
        if (st == USL_OK) st = fill(f, p.b, values);
        for (int64_t o = 0; st == USL_OK && !f->m->plan_only && o < s.out; o++)
            memcpy(l->b + (e * s.out + o) * l->rank + part * rank, values + o * rank, (size_t)rank * sizeof *values);
    }
    usli_free(f->m->ctx, values);
    return st;
}

static usl_status read_module(folder *f, const slots *s, int64_t module, usli_lora_module *l) {
    int64_t layer, stack = usli_lora_stack(&f->m->config, usli_module_slot(&f->m->config, module, &layer));
    int rank;
    parts p;
    if (s->single[module]) return fill_singles(f, module, l);
    USLI_TRY(find_parts(f, module, &p, &rank));
    USLI_TRY(fill(f, p.a, l->a));
    USLI_TRY(stack > 1 ? fill_stacked(f, p.b, stack, l->b) : fill(f, p.b, l->b));
    return fill(f, p.magnitude, l->magnitude);
}

static usl_status read_values(folder *f, const slots *s, usli_adapter *a) {
    const usli_config *c = &f->m->config;
    int64_t inside = c->layers * USLI_LAYER_SLOTS;
    for (int64_t i = 0; i < usli_module_count(c); i++) {
        if (a->modules[i].rank) USLI_TRY(read_module(f, s, i, &a->modules[i]));
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

/* An adapter that was trained with stretched rope wants the same stretch. */
static void compare_rope(const folder *f) {
    const usli_config *c = &f->m->config;
    for (size_t i = 0; i < f->file->meta_count; i++) {
        if (strcmp(f->file->meta[2 * i], USLI_ADAPTER_LENGTH) != 0) continue;
        int64_t length = strtoll(f->file->meta[2 * i + 1], NULL, 10);
        double factor = (double)length / (double)c->context;
        bool same = c->rope.kind == USLI_ROPE_LINEAR && fabs(c->rope.factor - factor) <= 1e-6 * factor;
        if (length > c->context && !same)
            usli_log(f->m->ctx, USL_LOG_WARN,
                     "%s: the adapter was trained with max_seq_length %lld, which scaled rope linearly by %g, and this "
                     "model's rope is not scaled so: its answers differ; load the model with max_seq_length = %lld",
                     f->weights, (long long)length, factor, (long long)length);
    }
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
    s.single = usli_calloc(ctx, (size_t)usli_module_count(&m->config), sizeof *s.single);
    if (!f.config || !f.weights || !s.single) {
        st = usli_nomem(ctx, 4096);
        goto done;
    }
    USLI_TRYGO(usli_adapter_shape_new(m, &s.shape));
    USLI_TRYGO(usli_json_load(ctx, f.config, &f.json));
    USLI_TRYGO(usli_safetensors_open(ctx, f.weights, &f.file));
    USLI_TRYGO(refuse_settings(&f));
    USLI_TRYGO(find_tables(&f));
    USLI_TRYGO(read_shape_resized(&f, &s));
    USLI_TRYGO(read_alpha(&f, &s, &rank, &alpha));
    USLI_TRYGO(usli_model_put_tables(m, f.weights, f.tables));
    USLI_TRYGO(usli_adapter_new(m, name ? name : "default", &s.shape, &a));
    a->rank = rank;
    a->alpha = alpha;
    USLI_TRYGO(read_settings(&f, a));
    USLI_TRYGO(usli_start_base(m, a));
    USLI_TRYGO(read_values(&f, &s, a));
    USLI_TRYGO(usli_adapter_attach(m, a));
    a = NULL;
    if (!m->plan_only) compare_rope(&f);
done:
    usli_adapter_free(m, a);
    usli_adapter_shape_free(m, &s.shape);
    usli_free(ctx, s.single);
    usli_safetensors_close(f.file);
    if (f.json) json_decref(f.json);
    usli_free(ctx, f.config);
    usli_free(ctx, f.weights);
    return st;
}
