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

/* Matrices that a slot stacks. */
static int64_t stack_of(const usl_model *m, int64_t i) {
    int64_t experts = usli_slot_experts(&m->config, (usli_slot)(i % USLI_LINEARS));
    return experts ? experts : 1;
}

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
        numbers += (size_t)ranks[i] * (size_t)(rows + stack_of(m, i) * cols);
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
        l->b = l->a + stack_of(m, i) * l->rank * cols;
        next = l->b + (int64_t)l->rank * rows;
    }
    *out = a;
    return USL_OK;
}

static void set_scales(const usl_model *m, usli_adapter *a) {
    for (int64_t i = 0; i < m->config.layers * USLI_LINEARS; i++) {
        bool in = i % USLI_LINEARS == USLI_EXPERTS_IN;
        double rank = in ? a->in_rank : a->rank, alpha = in ? a->in_alpha : a->alpha;
        a->modules[i].scale = (float)(a->rslora ? alpha / sqrt(rank) : alpha / rank);
    }
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

/* What target_modules asks for. In a mixture, gate_proj, up_proj and down_proj (or the family's own words) are the
 * experts', as in PEFT: gate and up, which lie fused, share an adapter of twice the rank. */
typedef struct wanted_modules {
    bool slot[USLI_LINEARS], expert[3];
} wanted_modules;

/* In a mixture, their words mean the experts. */
static bool is_dense(int slot) {
    return slot == USLI_GATE || slot == USLI_UP || slot == USLI_DOWN;
}

static bool is_word(const char *item, size_t len, const char *word) {
    return strlen(word) == len && memcmp(word, item, len) == 0;
}

static bool expert_word(const usl_model *m, const char *item, size_t len, wanted_modules *t) {
    static const char *const USUAL[3] = { "gate_proj", "up_proj", "down_proj" };
    for (int i = 0; m->config.experts > 0 && i < 3; i++)
        if (is_word(item, len, USUAL[i]) || is_word(item, len, m->config.arch->mixture->words[i]))
            return t->expert[i] = true;
    return false;
}

/* target_parameters' words. */
static bool parameter_word(const usl_model *m, const char *item, size_t len, wanted_modules *t) {
    static const struct {
        const char *word;
        usli_slot slot;
    } WORDS[] = { { "mlp.experts.gate_up_proj", USLI_EXPERTS_IN },
                  { "mlp.experts.down_proj", USLI_EXPERTS_OUT },
                  { "mlp.gate.weight", USLI_ROUTER },
                  { "gate.weight", USLI_ROUTER } };
    for (size_t i = 0; m->config.experts > 0 && i < sizeof WORDS / sizeof *WORDS; i++)
        if (is_word(item, len, WORDS[i].word)) return t->slot[WORDS[i].slot] = true;
    return false;
}

static usl_status target_item(usl_model *m, const char *item, size_t len, void *ud) {
    wanted_modules *t = ud;
    if (expert_word(m, item, len, t) || parameter_word(m, item, len, t)) return USL_OK;
    for (int s = 0; s < USLI_LINEARS; s++) {
        if (!has_module(m, (usli_slot)s) || !is_word(item, len, usli_slots[s].peft)) continue;
        t->slot[s] = true;
        return USL_OK;
    }
    bool mixture = m->config.experts > 0;
    char words[256];
    size_t used = 0;
    for (int s = 0; s < USLI_LINEARS; s++)
        if (has_module(m, (usli_slot)s) && !usli_slot_experts(&m->config, (usli_slot)s) && !(mixture && is_dense(s)))
            used += (size_t)snprintf(words + used, sizeof words - used, "%s%s", used ? ", " : "", usli_slots[s].peft);
    if (mixture) snprintf(words + used, sizeof words - used, ", gate_proj, up_proj, down_proj");
    return usli_fail(m->ctx, USL_ERR_INVALID,
                     "target_modules: \"%.*s\" is no linear module of a %s block; use %s or \"all-linear\"", (int)len,
                     item, m->config.arch->name, words);
}

/* NULL: all but the gates of a mixture. */
static usl_status read_targets(usl_model *m, const char *text, wanted_modules *t) {
    bool all = text && strcmp(text, "all-linear") == 0;
    if (text && !all) {
        USLI_TRY(each_item(m, text, target_item, t));
        if (t->expert[0] != t->expert[1])
            return usli_fail(m->ctx, USL_ERR_INVALID,
                             "target_modules: %s of the experts is fused with %s, so name both or neither",
                             t->expert[0] ? "gate_proj" : "up_proj", t->expert[0] ? "up_proj" : "gate_proj");
        return USL_OK;
    }
    for (int s = 0; s < USLI_LINEARS; s++) {
        bool gate = s == USLI_ROUTER || s == USLI_SHARED_GATE;
        t->slot[s] = (all || !gate) && !(is_dense(s) && m->config.experts > 0) && s != USLI_EXPERTS_IN;
    }
    t->expert[0] = t->expert[1] = true;
    return USL_OK;
}

/* The rank at place i that t asks for; 0: none. */
static int wanted_rank(const usl_model *m, const wanted_modules *t, int64_t i, int rank) {
    usli_slot slot = (usli_slot)(i % USLI_LINEARS);
    int64_t rows, cols;
    if (!usli_slot_shape(&m->config, slot, i / USLI_LINEARS, &rows, &cols)) return 0;
    if (slot == USLI_EXPERTS_IN && t->expert[0]) return 2 * rank;
    return t->slot[slot] || (slot == USLI_EXPERTS_OUT && t->expert[2]) ? rank : 0;
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
        for (int64_t k = 0; k < stack_of(m, i) * l->rank * cols; k++)
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
    wanted_modules wants = { 0 };
    bool *wanted = usli_calloc(ctx, (size_t)layers, sizeof *wanted);
    int *ranks = usli_calloc(ctx, (size_t)layers * USLI_LINEARS, sizeof *ranks);
    usli_adapter *a = NULL;
    usl_status st = USL_OK;
    if (!wanted || !ranks) {
        st = usli_nomem(ctx, (size_t)layers * USLI_LINEARS * sizeof *ranks);
        goto done;
    }
    USLI_TRYGO(read_targets(m, o.target_modules, &wants));
    if (o.layers)
        USLI_TRYGO(each_item(m, o.layers, layer_item, wanted));
    else
        memset(wanted, true, (size_t)layers * sizeof *wanted);
    bool any = false;
    for (int64_t i = 0; i < layers * USLI_LINEARS; i++) {
        ranks[i] = wanted[i / USLI_LINEARS] ? wanted_rank(m, &wants, i, o.rank) : 0;
        any |= ranks[i] > 0;
    }
    if (!any) {
        st = usli_fail(ctx, USL_ERR_INVALID, "target_modules and layers_to_transform leave nothing to train");
        goto done;
    }
    USLI_TRYGO(adapter_new(m, o.name ? o.name : "default", ranks, &a));
    a->rank = o.rank;
    a->alpha = o.alpha;
    a->dropout = o.dropout;
    a->rslora = o.use_rslora;
    a->in_rank = wants.expert[0] ? 2 * o.rank : o.rank;
    a->in_alpha = wants.expert[0] ? 2 * o.alpha : o.alpha;
    set_scales(m, a);
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

/* Finds the tensor of one module at its place: PEFT writes "...lora_A.weight"; some tools keep the adapter's name in
 * between. */
static const usli_file_tensor *find_at(const usli_safetensors *file, const char *place, char part) {
    char base[160], name[224];
    static const char *const FORMS[] = { "base_model.model.%s.lora_%c.weight",
                                         "base_model.model.%s.lora_%c.default.weight", "%s.lora_%c.weight" };
    enum { COUNT = sizeof FORMS / sizeof *FORMS };
    for (int i = 0; usli_name_spelling(i / COUNT, place, base, sizeof base); i++) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(name, sizeof name, FORMS[i % COUNT], base, part);
#pragma GCC diagnostic pop
        const usli_file_tensor *t = usli_safetensors_find(file, name);
        if (t) return t;
    }
    return NULL;
}

/* The experts' two adapters are one inside the other, PEFT's ParamWrappers; a single one stands alone. */
static void place_of(const usli_config *c, usli_slot slot, int64_t layer, bool inner, char *buf, size_t size) {
    if (usli_slot_experts(c, slot)) {
        snprintf(buf, size, "model.layers.%lld.mlp.experts%s", (long long)layer, inner ? ".base_layer" : "");
        return;
    }
    usli_slot_name(c, slot, layer, false, buf, size);
    size_t len = strlen(buf), end = strlen(".weight");
    if (len > end) buf[len - end] = 0;
}

void usli_adapter_place(const usl_model *m, const usli_adapter *a, usli_slot slot, int64_t layer, char *buf,
                        size_t size) {
    place_of(&m->config, slot, layer,
             slot == USLI_EXPERTS_IN && usli_adapter_module(m, a, USLI_EXPERTS_OUT, layer)->rank, buf, size);
}

/* A and B of a module. */
typedef struct pair {
    const usli_file_tensor *a, *b;
} pair;

static pair pair_at(const usli_config *c, const usli_safetensors *file, usli_slot slot, int64_t layer, bool inner) {
    char place[128];
    place_of(c, slot, layer, inner, place, sizeof place);
    return (pair){ find_at(file, place, 'A'), find_at(file, place, 'B') };
}

/* The rank of a pair that fits a (rows, cols) weight, of `stack` experts; 0: it does not. */
static int rank_of(pair p, int64_t rows, int64_t cols, int64_t stack) {
    if (!p.a || !p.b || p.a->ndim != 2 || p.b->ndim != 2 || p.a->shape[1] != cols || p.b->shape[0] != rows ||
        p.a->shape[0] != p.b->shape[1] || p.a->shape[0] < 1 || p.a->shape[0] % stack || p.a->shape[0] / stack > 65536)
        return 0;
    return (int)(p.a->shape[0] / stack);
}

static pair find_pair(const usli_config *c, const usli_safetensors *file, usli_slot slot, int64_t layer) {
    int64_t rows, cols, experts = usli_slot_experts(c, slot);
    pair p = { NULL, NULL };
    if (!usli_slot_shape(c, slot, layer, &rows, &cols)) return p;
    if (slot == USLI_EXPERTS_IN) p = pair_at(c, file, slot, layer, true);
    if (p.a || p.b) return p;
    p = pair_at(c, file, slot, layer, false);
    /* Alone, it may be the other's. */
    if (experts && !rank_of(p, rows / experts, cols, experts)) p = (pair){ NULL, NULL };
    return p;
}

/* The adapter that an older PEFT put on matrix `part` of expert e: 0 gate, 1 up, 2 down. */
static pair find_expert(const usli_config *c, const usli_safetensors *file, int64_t layer, int64_t e, int part) {
    const usli_mixture *mix = c->arch->mixture;
    char place[128];
    snprintf(place, sizeof place, "model.layers.%lld.%s.experts.%lld.%s", (long long)layer, mix->folder, (long long)e,
             mix->words[part]);
    return (pair){ find_at(file, place, 'A'), find_at(file, place, 'B') };
}

/* PEFT's patterns hold the rank and alpha of the experts' fused gate and up. */
static double fused_pattern(const json_t *config, const char *key, double fallback) {
    const char *name;
    json_t *value, *patterns = json_object_get(config, key);
    json_object_foreach(patterns, name, value) if (strstr(name, "gate_up_proj") &&
                                                   json_is_number(value)) return json_number_value(value);
    return fallback;
}

static bool other_patterns(const json_t *patterns) {
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)patterns, name, value) if (!strstr(name, "gate_up_proj")) return true;
    return false;
}

static usl_status read_settings(usl_model *m, const char *path, const json_t *j, usli_adapter *a) {
    const json_t *r = json_object_get(j, "r"), *alpha = json_object_get(j, "lora_alpha"), *base;
    if (!json_is_integer(r) || !json_is_number(alpha) || json_integer_value(r) < 1)
        return usli_fail(m->ctx, USL_ERR_FORMAT, "%s: \"r\" or \"lora_alpha\" is missing", path);
    static const char *const REFUSED[] = { "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
                                           "fan_in_fan_out" };
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++) {
        const json_t *v = json_object_get(j, REFUSED[i]);
        if (json_is_object(v) && m->config.experts > 0 && !other_patterns(v)) continue;
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
    a->in_rank = (int)fused_pattern(j, "rank_pattern", a->rank);
    a->in_alpha = fused_pattern(j, "alpha_pattern", a->alpha);
    return USL_OK;
}

static usl_status refuse_shape(usl_model *m, const char *path, int64_t i, int64_t rows, int64_t cols) {
    return usli_fail(m->ctx, USL_ERR_SHAPE, "%s: the adapter of %s in layer %lld does not fit a %lldx%lld weight", path,
                     usli_slots[i % USLI_LINEARS].peft, (long long)(i / USLI_LINEARS), (long long)rows,
                     (long long)cols);
}

/* Adapters of single experts, as older versions of PEFT wrote them: *rank is what they come to when stacked. */
static usl_status read_expert_ranks(usl_model *m, const char *path, const usli_safetensors *file, int64_t i, int *rank,
                                    size_t *used) {
    int64_t rows, cols, layer = i / USLI_LINEARS, stack = stack_of(m, i);
    bool in = i % USLI_LINEARS == USLI_EXPERTS_IN;
    int first = in ? 0 : 2, parts = in ? 2 : 1, found = 0;
    usli_slot_shape(&m->config, (usli_slot)(i % USLI_LINEARS), layer, &rows, &cols);
    for (int64_t e = 0; e < stack; e++)
        for (int k = 0; k < parts; k++) {
            pair p = find_expert(&m->config, file, layer, e, first + k);
            bool none = !p.a && !p.b, absent = *rank == 0 && (e || k);
            if (none && (absent || (!e && !k))) continue;
            found = rank_of(p, rows / stack / parts, cols, 1);
            if (!found || absent || (*rank && found != *rank))
                return refuse_shape(m, path, i, rows / stack / parts, cols);
            *rank = found;
            *used += 2;
        }
    *rank *= parts;
    return USL_OK;
}

static usl_status read_ranks(usl_model *m, const char *path, const usli_safetensors *file, int *ranks) {
    size_t used = 0;
    for (int64_t i = 0; i < m->config.layers * USLI_LINEARS; i++) {
        usli_slot slot = (usli_slot)(i % USLI_LINEARS);
        int64_t rows, cols, stack = stack_of(m, i);
        if (!usli_slot_shape(&m->config, slot, i / USLI_LINEARS, &rows, &cols)) continue;
        pair p = find_pair(&m->config, file, slot, i / USLI_LINEARS);
        if (!p.a && !p.b) {
            if (usli_slot_experts(&m->config, slot)) USLI_TRY(read_expert_ranks(m, path, file, i, &ranks[i], &used));
            continue;
        }
        if (!(ranks[i] = rank_of(p, rows / stack, cols, stack))) return refuse_shape(m, path, i, rows, cols);
        used += 2;
    }
    if (used == 0) return usli_fail(m->ctx, USL_ERR_FORMAT, "%s: holds no adapter for this model", path);
    if (used != file->count)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: %zu of its %zu tensors belong to no module of this model",
                         path, file->count - used, file->count);
    return USL_OK;
}

static usl_status read_floats(usl_model *m, const char *path, const usli_file_tensor *t, float *dst) {
    if (t->dtype != USL_F32 && t->dtype != USL_BF16 && t->dtype != USL_F16)
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: tensor \"%s\" is no float tensor", path, t->name);
    if (!m->plan_only) usli_to_f32(t->data, t->dtype, dst, t->shape[0] * t->shape[1]);
    return USL_OK;
}

/* B of a stack is published otherwise than it lies. */
static usl_status read_stacked_b(usl_model *m, const char *path, const usli_file_tensor *t, int64_t stack, float *dst) {
    usli_param_ref p = { .experts = stack, .shape = { t->shape[0], t->shape[1] }, .count = t->shape[0] * t->shape[1] };
    float *values = usli_malloc(m->ctx, (size_t)p.count * sizeof *values);
    if (!values) return usli_nomem(m->ctx, (size_t)p.count * sizeof *values);
    usl_status st = read_floats(m, path, t, values);
    if (st == USL_OK && !m->plan_only) usli_param_take(&p, values, dst);
    usli_free(m->ctx, values);
    return st;
}

/* Single experts' adapters: A of gate over A of up, B of gate beside B of up, with zeros in the other corners. */
static usl_status read_experts(usl_model *m, const char *path, const usli_safetensors *file, int64_t i,
                               usli_lora_module *l) {
    int64_t rows, cols, layer = i / USLI_LINEARS, stack = stack_of(m, i);
    bool in = i % USLI_LINEARS == USLI_EXPERTS_IN;
    int first = in ? 0 : 2, parts = in ? 2 : 1;
    usli_slot_shape(&m->config, (usli_slot)(i % USLI_LINEARS), layer, &rows, &cols);
    int64_t rank = l->rank / parts, out = rows / stack / parts;
    float *values = usli_malloc(m->ctx, (size_t)(out * rank) * sizeof *values);
    usl_status st = values ? USL_OK : usli_nomem(m->ctx, (size_t)(out * rank) * sizeof *values);
    for (int64_t e = 0; st == USL_OK && e < stack * parts; e++) {
        int part = (int)(e % parts);
        pair p = find_expert(&m->config, file, layer, e / parts, first + part);
        st = read_floats(m, path, p.a, l->a + e * rank * cols);
        if (st == USL_OK) st = read_floats(m, path, p.b, values);
        for (int64_t o = 0; st == USL_OK && !m->plan_only && o < out; o++)
            memcpy(l->b + (e * out + o) * l->rank + part * rank, values + o * rank, (size_t)rank * sizeof *values);
    }
    usli_free(m->ctx, values);
    return st;
}

static usl_status read_module(usl_model *m, const char *path, const usli_safetensors *file, int64_t i,
                              usli_adapter *a) {
    usli_slot slot = (usli_slot)(i % USLI_LINEARS);
    usli_lora_module *l = &a->modules[i];
    int64_t experts = usli_slot_experts(&m->config, slot);
    if (l->rank != (slot == USLI_EXPERTS_IN ? a->in_rank : a->rank))
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED, "%s: ranks differ between modules, which is not supported", path);
    pair p = find_pair(&m->config, file, slot, i / USLI_LINEARS);
    if (!p.a) return read_experts(m, path, file, i, l);
    USLI_TRY(read_floats(m, path, p.a, l->a));
    return experts ? read_stacked_b(m, path, p.b, experts, l->b) : read_floats(m, path, p.b, l->b);
}

/* Gate and up of single experts were not fused when the settings were written. */
static void double_fused(const usl_model *m, const usli_safetensors *file, usli_adapter *a) {
    for (int64_t l = 0; l < m->config.layers; l++) {
        if (!usli_adapter_module(m, a, USLI_EXPERTS_IN, l)->rank || find_pair(&m->config, file, USLI_EXPERTS_IN, l).a)
            continue;
        a->in_rank = 2 * a->rank;
        a->in_alpha = 2 * a->alpha;
        return;
    }
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
    double_fused(m, file, a);
    set_scales(m, a);
    for (int64_t i = 0; i < m->config.layers * USLI_LINEARS; i++)
        if (ranks[i]) USLI_TRYGO(read_module(m, weights, file, i, a));
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

/* What PEFT reaches as a parameter, not as a module; NULL: a module. */
static const char *parameter_of(usli_slot slot) {
    return slot == USLI_EXPERTS_IN    ? "mlp.experts.gate_up_proj"
           : slot == USLI_EXPERTS_OUT ? "mlp.experts.down_proj"
           : slot == USLI_ROUTER      ? "mlp.gate.weight"
                                      : NULL;
}

static json_t *settings_json(const usl_model *m, const usli_adapter *a, const char *base) {
    json_t *targets = json_array(), *parameters = json_array(), *layers = json_array();
    json_t *ranks = json_object(), *alphas = json_object();
    if (base && !usli_utf8_is_text(base)) base = NULL; /* JSON cannot hold it: the adapter is saved without */
    int64_t used_layers = 0;
    for (int s = 0; s < USLI_LINEARS; s++)
        for (int64_t l = 0; l < m->config.layers; l++)
            if (usli_adapter_module(m, a, (usli_slot)s, l)->rank) {
                const char *parameter = parameter_of((usli_slot)s);
                if (parameter)
                    json_array_append_new(parameters, json_string(parameter));
                else
                    json_array_append_new(targets, json_string(usli_slots[s].peft));
                if (s == USLI_EXPERTS_IN && a->in_rank != a->rank)
                    json_object_set_new(ranks, ".*\\.gate_up_proj", json_integer(a->in_rank));
                if (s == USLI_EXPERTS_IN && a->in_alpha != a->alpha)
                    json_object_set_new(alphas, ".*\\.gate_up_proj", json_real(a->in_alpha));
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
    /* PEFT trains parameters without dropout only, and would not load another number. */
    double dropout = json_array_size(parameters) ? 0 : a->dropout;
    return json_pack("{s:s,s:i,s:f,s:f,s:s,s:o,s:o,s:o,s:b,s:s,s:s?,s:b,s:b,s:b,s:b,s:o,s:o,s:n,s:b}", "peft_type",
                     "LORA", "r", a->rank, "lora_alpha", a->alpha, "lora_dropout", dropout, "bias", "none",
                     "target_modules", targets, "target_parameters", parameters, "layers_to_transform", layers,
                     "use_rslora", a->rslora, "task_type", "CAUSAL_LM", "base_model_name_or_path", base,
                     "inference_mode", 1, "fan_in_fan_out", 0, "use_dora", 0, "init_lora_weights", 1, "rank_pattern",
                     ranks, "alpha_pattern", alphas, "modules_to_save", "lora_bias", 0);
}

static usl_status write_values(usl_model *m, usli_safetensors_writer *w, const usli_param_ref *p) {
    size_t bytes = (size_t)p->count * sizeof(float);
    if (!p->experts) return usli_safetensors_write(w, p->data, bytes);
    float *values = usli_malloc(m->ctx, bytes);
    if (!values) return usli_nomem(m->ctx, bytes);
    usli_param_publish(p, p->data, values);
    usl_status st = usli_safetensors_write(w, values, bytes);
    usli_free(m->ctx, values);
    return st;
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
                USLI_TRYGO(write_values(m, w, &p));
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
