/* PEFT's ways to say which modules: names or ends of names, patterns over whole names, numbers of layers. */
#include <string.h>

#include "core/io/json.h"
#include "core/model/adapter.h"
#include "core/text/pattern.h"

/* ---- Lists ---------------------------------------------------------------------------------------------------------
 */

/* The next item of a comma-separated list; false at its end. */
static bool next_item(const char **list, const char **item, size_t *len) {
    while (*list && (**list == ',' || **list == ' ')) ++*list;
    if (!*list || !**list) return false;
    *item = *list;
    *len = strcspn(*item, ",");
    *list += *len;
    while (*len && (*item)[*len - 1] == ' ') --*len;
    return true;
}

/* The name itself, or its end behind a dot. */
static bool ends_with(const char *name, const char *item, size_t len) {
    size_t n = strlen(name);
    if (n < len || memcmp(name + n - len, item, len) != 0) return false;
    return n == len || name[n - len - 1] == '.';
}

static bool in_list(const char *list, const char *name) {
    const char *item;
    size_t len;
    while (next_item(&list, &item, &len))
        if (ends_with(name, item, len)) return true;
    return false;
}

/* Module i of the model: false when there is none. */
static bool module_at(const usl_model *m, int64_t i, usli_slot *slot, int64_t *layer, char *name, size_t size) {
    int64_t rows, cols;
    *slot = usli_module_slot(&m->config, i, layer);
    usli_module_name(&m->config, *slot, *layer, name, size);
    return usli_slot_shape(&m->config, *slot, *layer, &rows, &cols) || *slot == USLI_HEAD;
}

/* ---- Mixtures: what PEFT calls parameters ----
 * gate_proj, up_proj and down_proj, or the family's own words, are the experts', as in PEFT: gate and up, which lie
 * fused, share an adapter of twice the rank. */

/* 0 gate, 1 up, 2 down; -1: it is none of these words. */
static int expert_word(const usli_config *c, const char *item, size_t len) {
    static const char *const USUAL[3] = { "gate_proj", "up_proj", "down_proj" };
    for (int i = 0; c->experts > 0 && i < 3; i++) {
        const char *own = c->arch->mixture->words[i];
        if ((strlen(USUAL[i]) == len && memcmp(USUAL[i], item, len) == 0) ||
            (strlen(own) == len && memcmp(own, item, len) == 0))
            return i;
    }
    return -1;
}

/* In a mixture, their words mean the experts. */
static bool is_dense(int slot) {
    return slot == USLI_GATE || slot == USLI_UP || slot == USLI_DOWN;
}

/* Which of those words a list has. */
static void expert_words(const usli_config *c, const char *list, bool *words) {
    const char *item;
    size_t len;
    while (next_item(&list, &item, &len)) {
        int word = expert_word(c, item, len);
        if (word >= 0) words[word] = true;
    }
}

/* An item names the module, or the router's parameter. */
static bool item_names(const usli_config *c, usli_slot slot, const char *name, const char *item, size_t len) {
    char parameter[160];
    if (expert_word(c, item, len) >= 0) return false;
    if (ends_with(name, item, len)) return true;
    if (slot != USLI_ROUTER) return false;
    snprintf(parameter, sizeof parameter, "%s.weight", name);
    return ends_with(parameter, item, len);
}

/* The factor of rank and alpha with which words choose a module; 0: they do not. */
static int by_words(const bool *words, usli_slot slot) {
    return slot == USLI_EXPERTS_IN && words[0] ? 2 : slot == USLI_EXPERTS_OUT && words[2] ? 1 : 0;
}

/* Without a list: every linear module; of a mixture the experts stand for its MLPs, and the gates come with
 * "all-linear" alone. */
static int by_default(const usli_config *c, usli_slot slot, bool all) {
    bool gate = slot == USLI_ROUTER || slot == USLI_SHARED_GATE;
    if (slot >= USLI_LINEARS || (gate && !all) || (is_dense(slot) && c->experts > 0)) return 0;
    return slot == USLI_EXPERTS_IN ? 2 : 1;
}

static bool has_module(const usl_model *m, usli_slot slot) {
    int64_t rows, cols;
    for (int64_t l = 0; l < m->config.layers; l++)
        if (usli_slot_shape(&m->config, slot, l, &rows, &cols)) return true;
    return false;
}

static usl_status refuse_target(usl_model *m, const char *item, size_t len) {
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

/* Every item of the list names a module that adapters attach to. */
static usl_status check_targets(usl_model *m, const char *list) {
    const char *item;
    char name[128];
    size_t len;
    while (next_item(&list, &item, &len)) {
        bool found = expert_word(&m->config, item, len) >= 0;
        int64_t layer;
        usli_slot slot;
        for (int64_t i = 0; !found && i < usli_module_count(&m->config); i++)
            found = module_at(m, i, &slot, &layer, name, sizeof name) && item_names(&m->config, slot, name, item, len);
        if (!found) return refuse_target(m, item, len);
    }
    bool words[3] = { false };
    expert_words(&m->config, list, words);
    if (words[0] != words[1])
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "target_modules: %s of the experts is fused with %s, so name both or neither",
                         words[0] ? "gate_proj" : "up_proj", words[0] ? "up_proj" : "gate_proj");
    return USL_OK;
}

static usl_status wanted_layers(usl_model *m, const char *list, bool *wanted) {
    const char *item;
    size_t len;
    memset(wanted, !list, (size_t)m->config.layers * sizeof *wanted);
    while (list && next_item(&list, &item, &len)) {
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
    }
    return USL_OK;
}

/* A pattern over an end of a name, behind a dot. */
static usl_status by_end(usl_ctx *ctx, const char *option, const char *pattern, usli_pattern **out) {
    size_t size = strlen(pattern) + 32;
    char *text = usli_malloc(ctx, size);
    *out = NULL;
    if (!text) return usli_nomem(ctx, size);
    snprintf(text, size, "(?:.*\\.)?(?:%s)", pattern);
    usl_status st = usli_pattern_new(ctx, option, text, out);
    usli_free(ctx, text);
    return st;
}

/* The word before a layer's number, which is "layers" in every family here. */
static usl_status check_layers_pattern(usl_model *m, const usl_lora_opts *o) {
    const char *item, *list = o->layers_pattern;
    size_t len;
    bool any = false, found = false;
    if (list && !o->layers)
        return usli_fail(m->ctx, USL_ERR_INVALID, "layers_pattern is given without layers_to_transform; give both");
    while (next_item(&list, &item, &len)) {
        char text[128];
        usli_pattern *code;
        any = true;
        snprintf(text, sizeof text, "%.*s", (int)len, item);
        USLI_TRY(by_end(m->ctx, "layers_pattern", text, &code));
        bool hit;
        usl_status st = usli_pattern_matches(code, "model.layers", &hit);
        usli_pattern_free(code);
        USLI_TRY(st);
        found |= hit;
    }
    if (any && !found)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "layers_pattern: \"%s\" matches nothing; the layers of this model are called \"layers\"",
                         o->layers_pattern);
    return USL_OK;
}

/* ---- Ranks and alphas by pattern -----------------------------------------------------------------------------------
 */

typedef void (*found_fn)(usli_adapter_shape *s, int64_t module, double value);

static void set_rank(usli_adapter_shape *s, int64_t module, double value) {
    s->ranks[module] = (int)value;
}
static void set_alpha(usli_adapter_shape *s, int64_t module, double value) {
    s->alphas[module] = value;
}

/* The first pattern that matches a module counts for it. */
static usl_status by_pattern(usl_model *m, const char *option, const char *json, bool whole, found_fn set,
                             usli_adapter_shape *s) {
    json_t *map = NULL;
    const char *key;
    json_t *value;
    if (!json) return USL_OK;
    USLI_TRY(usli_json_parse(m->ctx, option, json, strlen(json), &map));
    bool *done = usli_calloc(m->ctx, (size_t)usli_module_count(&m->config), sizeof *done);
    usl_status st = done ? USL_OK : usli_nomem(m->ctx, 64);
    json_object_foreach(map, key, value) {
        double number = json_number_value(value);
        usli_pattern *code = NULL;
        if (st != USL_OK) break;
        if (!json_is_number(value) || !(number > 0) || (whole && (!json_is_integer(value) || number > 4096))) {
            st = usli_fail(m->ctx, USL_ERR_INVALID, "%s: \"%s\" is given no positive %s", option, key,
                           whole ? "whole number up to 4096" : "number");
            break;
        }
        st = by_end(m->ctx, option, key, &code);
        for (int64_t i = 0; st == USL_OK && i < usli_module_count(&m->config); i++) {
            char name[128];
            int64_t layer;
            usli_slot slot;
            bool hit = false;
            if (done[i] || !s->ranks[i] || !module_at(m, i, &slot, &layer, name, sizeof name)) continue;
            st = usli_pattern_matches(code, name, &hit);
            if (hit) set(s, i, number), done[i] = true;
        }
        usli_pattern_free(code);
    }
    usli_free(m->ctx, done);
    json_decref(map);
    return st;
}

/* ---- All of it -----------------------------------------------------------------------------------------------------
 */

/* For modules_to_save PEFT takes any end: "norm" is every norm. */
static bool ends_in(const char *name, const char *item, size_t len) {
    size_t n = strlen(name);
    return n >= len && memcmp(name + n - len, item, len) == 0;
}

static usl_status refuse_experts(usl_model *m, const char *item, size_t len) {
    return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                     "modules_to_save: \"%.*s\" are experts, which are trained by LoRA (target_modules) or with "
                     "full_finetuning",
                     (int)len, item);
}

/* modules_to_save: whole modules, weight and bias. */
static usl_status match_copies(usl_model *m, const char *list, usli_adapter_shape *s) {
    const usli_config *c = &m->config;
    const char *item;
    size_t len;
    while (next_item(&list, &item, &len)) {
        bool found = false;
        for (int64_t l = 0; l < c->layers; l++)
            for (int slot = 0; slot < USLI_LAYER_SLOTS; slot++) {
                char name[128];
                if (!usli_base_weight(m, (usli_slot)slot, l)->storage) continue;
                usli_module_name(c, (usli_slot)slot, l, name, sizeof name);
                if (!ends_in(name, item, len) || slot == USLI_ROUTER_BIAS) continue;
                if (usli_slot_experts(c, (usli_slot)slot)) return refuse_experts(m, item, len);
                s->copies[usli_weight_index(c, (usli_slot)slot, l)] = found = true;
            }
        for (int slot = USLI_EMBED; slot < USLI_SLOTS; slot++) {
            char name[128];
            usli_module_name(c, (usli_slot)slot, 0, name, sizeof name);
            if (!ends_in(name, item, len)) continue;
            s->copies[usli_weight_index(c, (usli_slot)slot, 0)] = found = true;
        }
        if (!found)
            return usli_fail(m->ctx, USL_ERR_INVALID,
                             "modules_to_save: the model has no module \"%.*s\"; embed_tokens, lm_head and norm are "
                             "usual",
                             (int)len, item);
    }
    return USL_OK;
}

static bool in_targets(const usli_config *c, const char *list, usli_slot slot, const char *name) {
    const char *item;
    size_t len;
    while (next_item(&list, &item, &len))
        if (item_names(c, slot, name, item, len)) return true;
    return false;
}

static usl_status match_targets(usl_model *m, const usl_lora_opts *o, const usli_pattern *pattern, const bool *wanted,
                                usli_adapter_shape *s) {
    bool words[3] = { false }, all = o->target_modules && strcmp(o->target_modules, "all-linear") == 0;
    bool linear = !pattern && (!o->target_modules || all);
    if (!linear && !pattern) {
        USLI_TRY(check_targets(m, o->target_modules));
        expert_words(&m->config, o->target_modules, words);
    }
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        char name[128];
        int64_t layer;
        usli_slot slot;
        if (!module_at(m, i, &slot, &layer, name, sizeof name)) continue;
        bool inside = slot < USLI_LINEARS, hit = false;
        int times = linear ? by_default(&m->config, slot, all) : by_words(words, slot);
        if (pattern)
            USLI_TRY(usli_pattern_matches(pattern, name, &hit));
        else if (!linear)
            hit = in_targets(&m->config, o->target_modules, slot, name);
        if (!times) times = hit;
        if (o->layers && !pattern && !(inside && wanted[layer])) times = 0;
        if (!times || in_list(o->exclude_modules, name) || in_list(o->modules_to_save, name)) continue;
        s->ranks[i] = times * o->rank;
        s->alphas[i] = times * o->alpha;
    }
    return USL_OK;
}

usl_status usli_match_alphas(usl_model *m, const char *alpha_pattern, usli_adapter_shape *s) {
    return by_pattern(m, "alpha_pattern", alpha_pattern, false, set_alpha, s);
}

usl_status usli_match_modules(usl_model *m, const usl_lora_opts *o, usli_adapter_shape *s) {
    bool *wanted = usli_calloc(m->ctx, (size_t)m->config.layers, sizeof *wanted);
    usli_pattern *pattern = NULL;
    usl_status st = wanted ? USL_OK : usli_nomem(m->ctx, (size_t)m->config.layers);
    if (st != USL_OK) return st;
    USLI_TRYGO(check_layers_pattern(m, o));
    USLI_TRYGO(wanted_layers(m, o->layers, wanted));
    if (o->target_pattern) USLI_TRYGO(usli_pattern_new(m->ctx, "target_modules", o->target_pattern, &pattern));
    USLI_TRYGO(match_targets(m, o, pattern, wanted, s));
    USLI_TRYGO(by_pattern(m, "rank_pattern", o->rank_pattern, true, set_rank, s));
    USLI_TRYGO(usli_match_alphas(m, o->alpha_pattern, s));
    st = match_copies(m, o->modules_to_save, s);
done:
    usli_pattern_free(pattern);
    usli_free(m->ctx, wanted);
    return st;
}
