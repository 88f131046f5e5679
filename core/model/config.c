#include "core/model/config.h"

#include <math.h>
#include <string.h>

#include "core/model/bnb.h"
#include "core/model/fp8.h"

/* ---- Reading fields: an absent or null one gives the fallback, one of the wrong kind is an error -------------------
 */

typedef struct fields {
    usl_ctx *ctx;
    const char *name;
    const json_t *json;
    usl_status st; /* the first failure */
} fields;

static const json_t *get(const fields *f, const char *key) {
    const json_t *v = json_object_get(f->json, key);
    return json_is_null(v) ? NULL : v;
}

static double get_real(fields *f, const char *key, double fallback) {
    const json_t *v = get(f, key);
    if (!v) return fallback;
    if (json_is_number(v)) return json_number_value(v);
    f->st = usli_fail(f->ctx, USL_ERR_FORMAT, "%s: \"%s\" is not a number", f->name, key);
    return fallback;
}

static int64_t get_int(fields *f, const char *key, int64_t fallback) {
    double d = get_real(f, key, (double)fallback);
    if (d == floor(d) && fabs(d) < 9e15) return (int64_t)d;
    f->st = usli_fail(f->ctx, USL_ERR_FORMAT, "%s: \"%s\" is not a whole number", f->name, key);
    return fallback;
}

static bool get_bool(fields *f, const char *key, bool fallback) {
    const json_t *v = get(f, key);
    if (!v) return fallback;
    if (json_is_boolean(v)) return json_is_true(v);
    f->st = usli_fail(f->ctx, USL_ERR_FORMAT, "%s: \"%s\" is not true or false", f->name, key);
    return fallback;
}

static const char *get_text(fields *f, const char *key) {
    const json_t *v = get(f, key);
    if (!v) return NULL;
    if (json_is_string(v)) return json_string_value(v);
    f->st = usli_fail(f->ctx, USL_ERR_FORMAT, "%s: \"%s\" is not a string", f->name, key);
    return NULL;
}

/* ---- config.json
 * -------------------------------------------------------------------------------------------------------- */

static void read_eos(const json_t *v, usli_config *c) {
    if (json_is_integer(v)) {
        c->eos[0] = (int32_t)json_integer_value(v);
        c->eos_count = 1;
    } else if (json_is_array(v)) {
        c->eos_count = 0;
        for (size_t i = 0; i < json_array_size(v) && c->eos_count < 8; i++)
            if (json_is_integer(json_array_get(v, i)))
                c->eos[c->eos_count++] = (int32_t)json_integer_value(json_array_get(v, i));
    }
}

static const struct {
    const char *name;
    usli_act act;
} ACTS[] = {
    { "silu", USLI_SILU },          { "swish", USLI_SILU },
    { "gelu", USLI_GELU },          { "gelu_pytorch_tanh", USLI_GELU_TANH },
    { "gelu_new", USLI_GELU_TANH },
};

static usl_status read_act(fields *f, usli_config *c) {
    c->act = c->arch->act;
    const char *text = get_text(f, "hidden_activation");
    if (!text) text = get_text(f, "hidden_act");
    if (!text) return f->st;
    for (size_t i = 0; i < sizeof ACTS / sizeof *ACTS; i++) {
        if (strcmp(ACTS[i].name, text) == 0) {
            c->act = ACTS[i].act == USLI_GELU && c->arch->gelu_is_tanh ? USLI_GELU_TANH : ACTS[i].act;
            return f->st;
        }
    }
    return usli_fail(f->ctx, USL_ERR_UNSUPPORTED, "%s: the activation \"%s\" is not supported; silu and gelu are",
                     f->name, text);
}

static const struct {
    const char *name;
    usli_rope_kind kind;
} ROPES[] = {
    { "default", USLI_ROPE_DEFAULT }, { "linear", USLI_ROPE_LINEAR },   { "llama3", USLI_ROPE_LLAMA3 },
    { "yarn", USLI_ROPE_YARN },       { "dynamic", USLI_ROPE_DYNAMIC }, { "longrope", USLI_ROPE_LONG },
    { "su", USLI_ROPE_LONG },
};

static usl_status check_rope(usl_ctx *ctx, const char *name, const usli_config *c, const usli_rope_config *r) {
    double least = r->kind == USLI_ROPE_LONG ? 1e-6 : 1; /* its factor is the ratio of two contexts */
    if (r->kind != USLI_ROPE_DEFAULT && !(r->factor >= least && r->factor < 1e6))
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: the rope scaling factor %g is not sensible", name, r->factor);
    if (r->original_context < 1 + usli_rope_by_length(r) || r->original_context > (int64_t)1 << 32)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: the original context %lld of its rope scaling is not sensible", name,
                         (long long)r->original_context);
    if (!usli_rope_by_length(r)) return USL_OK;
    if (c->arch->local_rope)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED, "%s: rope scaling \"%s\" is not supported for %s", name,
                         usli_rope_name(r->kind), c->arch->name);
    if (c->rot_dim < 4)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: %lld rotated values of a head are too few for its rope scaling",
                         name, (long long)c->rot_dim);
    for (int64_t i = 0; r->kind == USLI_ROPE_LONG && i < c->rot_dim / 2 * 2; i++) {
        float d = r->divisors[i % 2][i / 2];
        if (!(d > 0) || !isfinite(d))
            return usli_fail(ctx, USL_ERR_FORMAT, "%s: the %s factor %lld of its rope scaling is %g", name,
                             i % 2 ? "long" : "short", (long long)(i / 2 + 1), (double)d);
    }
    return USL_OK;
}

/* One number for each rotated pair. */
static usl_status read_divisors(fields *f, const char *key, const usli_config *c, float *out) {
    const json_t *list = get(f, key);
    int64_t half = c->rot_dim / 2;
    if (!json_is_array(list) || (int64_t)json_array_size(list) != half || half > USLI_MOST_FACTORS)
        return usli_fail(f->ctx, USL_ERR_FORMAT, "%s: \"%s\" of the rope scaling is no list of %lld numbers", f->name,
                         key, (long long)half);
    for (int64_t i = 0; i < half; i++) out[i] = (float)json_number_value(json_array_get(list, (size_t)i));
    return USL_OK;
}

static usl_status set_rope(usl_ctx *ctx, const char *name, const json_t *scaling, usli_config *c, usli_rope_config *r) {
    fields f = { ctx, name, scaling, USL_OK };
    double theta = r->theta;
    *r = (usli_rope_config){ .theta = theta };
    r->theta = get_real(&f, "rope_theta", theta);
    r->original_context = c->context;
    const char *kind = get_text(&f, "rope_type");
    if (!kind) kind = get_text(&f, "type");
    if (!kind) return f.st;
    bool known = false;
    for (size_t i = 0; i < sizeof ROPES / sizeof *ROPES && !known; i++)
        if ((known = strcmp(ROPES[i].name, kind) == 0)) r->kind = ROPES[i].kind;
    if (!known)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "%s: rope scaling \"%s\" is not supported; default, linear, dynamic, llama3, yarn and "
                         "longrope are",
                         name, kind);
    /* Phi-3 once called it yarn too. */
    if (r->kind == USLI_ROPE_YARN && get(&f, "short_factor")) r->kind = USLI_ROPE_LONG;
    /* What stands beside the scaling counts first, except that dynamic always starts from the whole context. */
    int64_t original = get_int(&f, "original_max_position_embeddings", c->context);
    if (c->original_context > 0) original = c->original_context;
    if (r->kind != USLI_ROPE_DYNAMIC) r->original_context = original;
    bool ratio = r->kind == USLI_ROPE_LONG && original > 0;
    r->factor = get_real(&f, "factor", ratio ? (double)c->context / (double)original : 1);
    if (r->kind == USLI_ROPE_LONG) {
        USLI_TRY(read_divisors(&f, "short_factor", c, r->divisors[0]));
        USLI_TRY(read_divisors(&f, "long_factor", c, r->divisors[1]));
    }
    r->low_freq_factor = get_real(&f, "low_freq_factor", 1);
    r->high_freq_factor = get_real(&f, "high_freq_factor", 4);
    r->beta_fast = get_real(&f, "beta_fast", 32);
    r->beta_slow = get_real(&f, "beta_slow", 1);
    r->attention_factor = get_real(&f, "attention_factor", 0);
    r->mscale = get_real(&f, "mscale", 0);
    r->mscale_all_dim = get_real(&f, "mscale_all_dim", 0);
    r->truncate = get_bool(&f, "truncate", true);
    USLI_TRY(f.st);
    return check_rope(ctx, name, c, r);
}

usl_status usli_config_set_rope(usl_ctx *ctx, const char *name, const json_t *scaling, usli_config *c) {
    return set_rope(ctx, name, scaling, c, &c->rope);
}

static void set_windowed(usli_config *c, int64_t layer) {
    c->windowed[layer / 8] |= (uint8_t)(1 << layer % 8);
}

/* The layers with a window by the family's rule. */
static void mark_windowed(usli_config *c, int64_t above, int64_t pattern) {
    for (int64_t l = 0; l < c->layers && l < USLI_MOST_LAYERS; l++) {
        bool windowed = false;
        switch (c->arch->window) {
        case USLI_NO_WINDOW: break;
        case USLI_WINDOW_ALL: windowed = true; break;
        case USLI_WINDOW_ABOVE: windowed = l >= above; break;
        case USLI_WINDOW_OTHER: windowed = l < above && l % 2 == 0; break;
        case USLI_WINDOW_PATTERN: windowed = pattern > 0 && (l + 1) % pattern != 0; break;
        }
        if (windowed) set_windowed(c, l);
    }
}

static usl_status read_windows(fields *f, usli_config *c) {
    const usli_arch *a = c->arch;
    if (a->window == USLI_NO_WINDOW) return USL_OK;
    bool used = !a->window_asked || get_bool(f, "use_sliding_window", false);
    c->window = used ? get_int(f, "sliding_window", get(f, "layer_types") ? 0 : a->sliding_window) : 0;
    if (c->window < 0)
        return usli_fail(f->ctx, USL_ERR_FORMAT, "%s: sliding_window is %lld; a number from 1 is wanted", f->name,
                         (long long)c->window);
    const json_t *types = get(f, "layer_types");
    if (!types) {
        mark_windowed(c, get_int(f, "max_window_layers", 28),
                      get_int(f, "sliding_window_pattern", get_int(f, "_sliding_window_pattern", a->window_pattern)));
        return f->st;
    }
    if (!json_is_array(types) || (int64_t)json_array_size(types) != c->layers)
        return usli_fail(f->ctx, USL_ERR_FORMAT, "%s: \"layer_types\" does not list %lld layers", f->name,
                         (long long)c->layers);
    for (int64_t l = 0; l < c->layers && l < USLI_MOST_LAYERS; l++) {
        const char *type = json_string_value(json_array_get(types, (size_t)l));
        if (type && strcmp(type, "sliding_attention") == 0)
            set_windowed(c, l);
        else if (!type || strcmp(type, "full_attention") != 0)
            return usli_fail(f->ctx, USL_ERR_UNSUPPORTED,
                             "%s: layer %lld is of type \"%s\"; full_attention and sliding_attention are supported",
                             f->name, (long long)l, type ? type : "?");
    }
    return f->st;
}

/* Old spelling: rope_theta, rope_local_base_freq, rope_scaling. New: rope_parameters, which may hold one for each type
 * of layer. */
static usl_status read_rope(fields *f, usli_config *c) {
    const usli_arch *a = c->arch;
    const json_t *all = get(f, "rope_parameters");
    const json_t *full = json_object_get(all, "full_attention"), *local = json_object_get(all, "sliding_attention");
    const json_t *scaling = full ? full : all ? all : get(f, "rope_scaling");
    c->rope.theta = get_real(f, "rope_theta", a->theta > 0 ? a->theta : 10000.0);
    c->local_rope.theta = get_real(f, "rope_local_base_freq", 10000.0);
    c->rope.original_context = c->local_rope.original_context = c->context;
    c->original_context = get_int(f, "original_max_position_embeddings", a->original_context);
    double partial = get_real(f, "partial_rotary_factor", 1);
    fields inner = { f->ctx, f->name, scaling, USL_OK };
    if (json_is_object(scaling)) partial = get_real(&inner, "partial_rotary_factor", partial);
    USLI_TRY(inner.st);
    if (!(partial > 0 && partial <= 1))
        return usli_fail(f->ctx, USL_ERR_FORMAT, "%s: partial_rotary_factor %g is not sensible", f->name, partial);
    if (!a->latent) c->rot_dim = (int64_t)((double)c->head_dim * partial);
    if (json_is_object(scaling)) USLI_TRY(usli_config_set_rope(f->ctx, f->name, scaling, c));
    if (json_is_object(local)) USLI_TRY(set_rope(f->ctx, f->name, local, c, &c->local_rope));
    return f->st;
}

/* ---- Mixtures ------------------------------------------------------------------------------------------------------
 */

static void set_sparse(usli_config *c, int64_t layer) {
    c->sparse[layer / 8] |= (uint8_t)(1 << layer % 8);
}

/* The first of the keys that is there. */
static int64_t first_int(fields *f, const char *const *keys, size_t count, int64_t fallback) {
    for (size_t i = 0; i < count; i++)
        if (get(f, keys[i])) return get_int(f, keys[i], fallback);
    return fallback;
}

/* Which layers are mixtures: from the first dense ones on, every so many-th, but for a list. */
static void read_sparse(fields *f, usli_config *c) {
    int64_t first = get_int(f, "first_k_dense_replace", c->arch->mixture->first_dense);
    int64_t step = get_int(f, "decoder_sparse_step", 1), frequency = get_int(f, "moe_layer_freq", 1);
    const json_t *dense = get(f, "mlp_only_layers"), *item;
    if (step < 1 || frequency < 1)
        f->st = usli_fail(f->ctx, USL_ERR_FORMAT, "%s: decoder_sparse_step or moe_layer_freq is below 1", f->name);
    for (int64_t l = 0; f->st == USL_OK && l < c->layers && l < USLI_MOST_LAYERS; l++) {
        bool listed = false;
        size_t i;
        json_array_foreach(dense, i, item) listed |= json_integer_value(item) == l;
        if (l >= first && (l + 1) % step == 0 && l % frequency == 0 && !listed) set_sparse(c, l);
    }
}

static usl_status read_groups(fields *f, usli_config *c) {
    const usli_mixture *m = c->arch->mixture;
    const char *method = get_text(f, "topk_method");
    c->groups = get_int(f, "n_group", m->groups);
    c->best_groups = get_int(f, "topk_group", m->best_groups);
    bool greedy = method && strcmp(method, "greedy") == 0,
         by_best = method && strcmp(method, "group_limited_greedy") == 0,
         biased = method && strcmp(method, "noaux_tc") == 0;
    if (method && !(m->biased ? biased : greedy || by_best))
        return usli_fail(f->ctx, USL_ERR_UNSUPPORTED, "%s: topk_method \"%s\" is not supported for a %s", f->name,
                         method, c->arch->name);
    if (!m->biased && !by_best) c->groups = 0;
    return f->st;
}

static usl_status check_mixture(usl_ctx *ctx, const char *name, const usli_config *c) {
    int64_t e = c->experts, g = c->groups > 1 ? c->groups : 1, best = c->groups > 1 ? c->best_groups : 1;
    if (e < 1 || e > USLI_MAX_EXPERTS || c->top_k < 1 || c->top_k > e)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: %lld of %lld experts is not sensible; up to %d are supported", name,
                         (long long)c->top_k, (long long)e, USLI_MAX_EXPERTS);
    if (g > USLI_MAX_GROUPS || e % g || best < 1 || best > g || c->top_k > e / g * best ||
        (c->arch->mixture->by_pairs && c->groups > 1 && e / g < 2))
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: %lld of %lld experts in %lld of %lld groups is not sensible", name,
                         (long long)c->top_k, (long long)e, (long long)best, (long long)g);
    if (c->expert_inter < 1 || c->expert_inter > 1 << 22 || c->shared_inter < 0 || c->shared_inter > 1 << 22 ||
        !(c->routed_scale > 0) || !isfinite(c->routed_scale))
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: experts of %lld and %lld values, scaled by %g, are not sensible",
                         name, (long long)c->expert_inter, (long long)c->shared_inter, c->routed_scale);
    return USL_OK;
}

static usl_status read_mixture(fields *f, usli_config *c) {
    const usli_mixture *m = c->arch->mixture;
    if (!m) return USL_OK;
    static const char *const COUNTS[] = { "num_local_experts", "num_experts", "n_routed_experts" };
    c->experts = first_int(f, COUNTS, sizeof COUNTS / sizeof *COUNTS, m->experts);
    c->top_k = get_int(f, "num_experts_per_tok", m->top_k);
    c->expert_inter = get_int(f, "moe_intermediate_size", m->inter ? m->inter : c->inter);
    int64_t shared = get_int(f, "n_shared_experts", 0);
    if (m->shared)
        c->shared_inter =
            shared ? shared * c->expert_inter : get_int(f, "shared_expert_intermediate_size", m->shared_inter);
    c->normalised = m->always_normalised || get_bool(f, "norm_topk_prob", m->normalised);
    c->routed_scale = m->scale > 0 ? get_real(f, "routed_scaling_factor", m->scale) : 1;
    if (m->balanced && get_bool(f, "output_router_logits", false))
        c->balance = get_real(f, "router_aux_loss_coef", 0.001);
    read_sparse(f, c);
    USLI_TRY(f->st);
    USLI_TRY(read_groups(f, c));
    return check_mixture(f->ctx, f->name, c);
}

/* ---- Latent attention ----------------------------------------------------------------------------------------------
 */

static usl_status read_latent(fields *f, usli_config *c) {
    const usli_arch *a = c->arch;
    c->v_dim = c->head_dim;
    if (!a->latent) return f->st;
    bool none = json_is_null(json_object_get(f->json, "q_lora_rank")) && json_object_get(f->json, "q_lora_rank");
    c->q_lora = none ? 0 : get_int(f, "q_lora_rank", a->q_lora);
    c->kv_lora = get_int(f, "kv_lora_rank", a->kv_lora);
    c->rot_dim = get_int(f, "qk_rope_head_dim", a->rope_dim);
    c->head_dim = c->rot_dim + get_int(f, "qk_nope_head_dim", a->nope_dim);
    c->v_dim = get_int(f, "v_head_dim", a->v_dim);
    c->kv_heads = c->heads;
    c->interleaved = get_bool(f, "rope_interleave", true);
    if (c->attention_bias)
        return usli_fail(f->ctx, USL_ERR_UNSUPPORTED, "%s: attention_bias is not supported with latent attention",
                         f->name);
    return f->st;
}

/* YaRN stretches the scores too. */
static double latent_scalar(const usli_config *c) {
    const usli_rope_config *r = &c->rope;
    double m = r->mscale_all_dim > 0 && r->factor > 1 ? 0.1 * r->mscale_all_dim * log(r->factor) + 1 : 1;
    return (double)c->head_dim / (m * m * m * m);
}

static usl_status check_latent(usl_ctx *ctx, const char *name, const usli_config *c) {
    if (!c->arch->latent) return USL_OK;
    if (c->q_lora < 0 || c->q_lora > 4096 || c->kv_lora < 1 || c->kv_lora > 4096 || c->v_dim < 1 ||
        c->v_dim > 1 << 12 || c->rot_dim >= c->head_dim)
        return usli_fail(
            ctx, USL_ERR_FORMAT,
            "%s: latent vectors of %lld and %lld values, heads of %lld with %lld rotated, and of %lld, are not "
            "sensible",
            name, (long long)c->q_lora, (long long)c->kv_lora, (long long)c->head_dim, (long long)c->rot_dim,
            (long long)c->v_dim);
    return USL_OK;
}

static usl_status check_config(usl_ctx *ctx, const char *name, const usli_config *c) {
    const struct {
        const char *what;
        int64_t value, most;
    } sizes[] = {
        { "vocab_size", c->vocab, 1 << 24 },          { "hidden_size", c->hidden, 1 << 20 },
        { "intermediate_size", c->inter, 1 << 22 },   { "num_hidden_layers", c->layers, USLI_MOST_LAYERS },
        { "num_attention_heads", c->heads, 1 << 14 }, { "num_key_value_heads", c->kv_heads, 1 << 14 },
        { "head_dim", c->head_dim, 1 << 12 },         { "max_position_embeddings", c->context, (int64_t)1 << 32 },
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value <= 0 || sizes[i].value > sizes[i].most)
            return usli_fail(ctx, USL_ERR_FORMAT, "%s: %s is %lld; a number from 1 to %lld is wanted", name,
                             sizes[i].what, (long long)sizes[i].value, (long long)sizes[i].most);
    if (c->heads % c->kv_heads)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: %lld attention heads cannot share %lld key-value heads", name,
                         (long long)c->heads, (long long)c->kv_heads);
    if (c->rot_dim % 2 || c->rot_dim < 2 || c->rot_dim > c->head_dim)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "%s: %lld of %lld values of a head are rotated; rope needs an even number of them", name,
                         (long long)c->rot_dim, (long long)c->head_dim);
    if (!(c->query_scalar > 0) || !(c->attention_softcap >= 0) || !(c->logit_softcap >= 0) ||
        !isfinite(c->query_scalar + c->attention_softcap + c->logit_softcap))
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: query_pre_attn_scalar %g or a soft-cap (%g, %g) is not sensible",
                         name, c->query_scalar, c->attention_softcap, c->logit_softcap);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1) || !(c->rope.theta > 0) || !isfinite(c->rope.theta) ||
        (c->arch->local_rope && (!(c->local_rope.theta > 0) || !isfinite(c->local_rope.theta))))
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: rms_norm_eps %g or rope_theta %g is not sensible", name, c->norm_eps,
                         c->rope.theta);
    return USL_OK;
}

static usl_status find_arch(fields *f, usli_config *c) {
    const json_t *list = get(f, "architectures");
    const char *name = json_string_value(json_array_get(list, 0));
    if (!name) name = get_text(f, "model_type");
    if (!name)
        return usli_fail(f->ctx, USL_ERR_FORMAT, "%s: names no architecture (\"architectures\" or \"model_type\")",
                         f->name);
    if ((c->arch = usli_arch_by_name(name))) return USL_OK;
    return usli_arch_refuse(f->ctx, f->name, name, strlen(name));
}

/* Here null says that there is none, and silence leaves the family's own. */
static double soft_cap(fields *f, const char *key, double fallback) {
    return json_is_null(json_object_get(f->json, key)) ? 0 : get_real(f, key, fallback);
}

static usl_status read_config(usl_ctx *ctx, const char *name, const json_t *json, const json_t *generation,
                              usli_config *c) {
    fields f = { ctx, name, json, USL_OK };
    const json_t *quantization = get(&f, "quantization_config");
    const char *method = json_string_value(json_object_get(quantization, "quant_method"));
    if (method && strcmp(method, "fp8") == 0) {
        USLI_TRY(usli_fp8_config(ctx, name, quantization, c));
    } else if (quantization) {
        USLI_TRY(usli_bnb_check_config(ctx, name, quantization));
        c->quantised = true;
    }
    USLI_TRY(find_arch(&f, c));
    const usli_arch *a = c->arch;
    c->vocab = get_int(&f, "vocab_size", a->vocab);
    c->hidden = get_int(&f, "hidden_size", 0);
    c->inter = get_int(&f, "intermediate_size", 0);
    c->layers = get_int(&f, "num_hidden_layers", 0);
    c->heads = get_int(&f, "num_attention_heads", a->heads);
    c->kv_heads = get_int(&f, "num_key_value_heads", a->kv_heads ? a->kv_heads : c->heads);
    c->head_dim = get_int(&f, "head_dim", a->head_dim ? a->head_dim : c->heads > 0 ? c->hidden / c->heads : 0);
    c->context = get_int(&f, "max_position_embeddings", a->context ? a->context : 2048);
    c->query_scalar =
        a->query_scalar > 0 ? get_real(&f, "query_pre_attn_scalar", a->query_scalar) : (double)c->head_dim;
    c->attention_softcap = soft_cap(&f, "attn_logit_softcapping", a->attention_softcap);
    c->logit_softcap = soft_cap(&f, "final_logit_softcapping", a->logit_softcap);
    c->norm_eps = get_real(&f, "rms_norm_eps", 1e-6);
    c->init_range = get_real(&f, "initializer_range", 0.02);
    c->tied = get_bool(&f, "tie_word_embeddings", a->tied);
    c->attention_bias = c->output_bias = get_bool(&f, "attention_bias", false);
    if (a->qkv_bias) c->attention_bias = true, c->output_bias = false;
    c->mlp_bias = get_bool(&f, "mlp_bias", false);
    if (a->fused) c->attention_bias = c->output_bias = c->mlp_bias = false;
    c->bos = (int32_t)(json_is_integer(get(&f, "bos_token_id")) ? get_int(&f, "bos_token_id", -1) : -1);
    c->pad = (int32_t)(json_is_integer(get(&f, "pad_token_id")) ? get_int(&f, "pad_token_id", -1) : -1);
    read_eos(get(&f, "eos_token_id"), c);
    if (generation) read_eos(json_object_get(generation, "eos_token_id"), c);
    const char *dtype = get_text(&f, "dtype");
    if (!dtype) dtype = get_text(&f, "torch_dtype");
    c->dtype = usl_dtype_parse(dtype);
    USLI_TRY(f.st);
    USLI_TRY(read_act(&f, c));
    USLI_TRY(read_latent(&f, c));
    USLI_TRY(read_rope(&f, c));
    if (a->latent) c->query_scalar = latent_scalar(c);
    USLI_TRY(check_config(ctx, name, c));
    USLI_TRY(check_latent(ctx, name, c));
    USLI_TRY(read_mixture(&f, c));
    return read_windows(&f, c);
}

/* The config.json of the part that reads text: what the larger model says about tokens and types counts for it. */
static json_t *unwrap(const json_t *json, const usli_arch *arch) {
    static const char *const SHARED[] = { "bos_token_id", "eos_token_id",        "pad_token_id",       "dtype",
                                          "torch_dtype",  "tie_word_embeddings", "quantization_config" };
    json_t *inner = json_deep_copy(json_object_get(json, "text_config"));
    if (!inner) return NULL;
    int bad = json_object_set_new(inner, "architectures", json_pack("[s]", arch->name));
    bad |= json_object_set_new(inner, "model_type", json_string(arch->model_type));
    for (size_t i = 0; i < sizeof SHARED / sizeof *SHARED; i++) {
        json_t *v = json_object_get(json, SHARED[i]), *own = json_object_get(inner, SHARED[i]);
        if (v && (!own || json_is_null(own))) bad |= json_object_set(inner, SHARED[i], v);
    }
    if (!bad) return inner;
    json_decref(inner);
    return NULL;
}

usl_status usli_config_from_json(usl_ctx *ctx, const char *name, const json_t *json, const json_t *generation,
                                 usli_config *c) {
    *c = (usli_config){ .bos = -1, .pad = -1 };
    if (!json_is_object(json)) return usli_fail(ctx, USL_ERR_FORMAT, "%s: is not a JSON object", name);
    const char *type = json_string_value(json_array_get(json_object_get(json, "architectures"), 0));
    const usli_arch *arch = type ? usli_arch_by_name(type) : NULL;
    bool wrapped = arch && arch->wrapper && strcmp(arch->wrapper, type) == 0;
    if (wrapped && !json_is_object(json_object_get(json, "text_config")))
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: is a %s without a text_config", name, type);
    if (!(c->source = wrapped ? unwrap(json, arch) : json_deep_copy(json))) return usli_nomem(ctx, 0);
    usl_status st = read_config(ctx, name, c->source, generation, c);
    if (st != USL_OK) usli_config_free(c);
    return st;
}

void usli_config_free(usli_config *c) {
    if (c->source) json_decref(c->source);
    c->source = NULL;
}

/* ---- GGUF
 * ---------------------------------------------------------------------------------------------------------------------
 */

static int64_t meta_int(const usli_gguf *g, const char *arch, const char *key, int64_t fallback) {
    char full[128];
    snprintf(full, sizeof full, "%s.%s", arch, key);
    return usli_gguf_int(g, full, fallback);
}

static double meta_float(const usli_gguf *g, const char *arch, const char *key, double fallback) {
    char full[128];
    snprintf(full, sizeof full, "%s.%s", arch, key);
    return usli_gguf_float(g, full, fallback);
}

static bool meta_bool(const usli_gguf *g, const char *arch, const char *key, bool fallback) {
    char full[128];
    snprintf(full, sizeof full, "%s.%s", arch, key);
    return usli_gguf_bool(g, full, fallback);
}

static const char *act_name(usli_act act) {
    for (size_t i = 0; i < sizeof ACTS / sizeof *ACTS; i++)
        if (ACTS[i].act == act) return ACTS[i].name;
    return "silu";
}

static json_t *divisors_as_json(const float *divisors, int64_t count) {
    json_t *list = json_array();
    for (int64_t i = 0; i < count; i++) json_array_append_new(list, json_real((double)divisors[i]));
    return list;
}

static json_t *real_above_0(double value) {
    return value > 0 ? json_real(value) : NULL;
}

static json_t *rope_as_json(const usli_config *c, const usli_rope_config *r) {
    if (r->kind == USLI_ROPE_DEFAULT &&
        r->divisors[0][0] > 0) /* a GGUF's own (read_divided_rope), whatever the length */
        return json_pack("{s:s,s:o,s:o,s:f,s:f}", "rope_type", "longrope", "short_factor",
                         divisors_as_json(r->divisors[0], c->rot_dim / 2), "long_factor",
                         divisors_as_json(r->divisors[0], c->rot_dim / 2), "factor", 1.0, "attention_factor", 1.0);
    if (r->kind == USLI_ROPE_LLAMA3)
        return json_pack("{s:s,s:f,s:f,s:f,s:I}", "rope_type", "llama3", "factor", r->factor, "low_freq_factor",
                         r->low_freq_factor, "high_freq_factor", r->high_freq_factor,
                         "original_max_position_embeddings", (json_int_t)r->original_context);
    if (r->kind == USLI_ROPE_LONG) /* transformers 4 wants no more than these, and makes the rest from the contexts */
        return json_pack("{s:s,s:o,s:o}", "type", "longrope", "short_factor",
                         divisors_as_json(r->divisors[0], c->rot_dim / 2), "long_factor",
                         divisors_as_json(r->divisors[1], c->rot_dim / 2));
    if (r->kind == USLI_ROPE_LINEAR) return json_pack("{s:s,s:f}", "rope_type", "linear", "factor", r->factor);
    if (r->kind == USLI_ROPE_YARN)
        return json_pack("{s:s,s:f,s:I,s:o*,s:o*,s:o*}", "rope_type", "yarn", "factor", r->factor,
                         "original_max_position_embeddings", (json_int_t)r->original_context, "attention_factor",
                         real_above_0(r->attention_factor), "mscale", real_above_0(r->mscale), "mscale_all_dim",
                         real_above_0(r->mscale_all_dim));
    return NULL;
}

static json_t *windows_as_json(const usli_config *c) {
    json_t *types = json_array();
    for (int64_t l = 0; l < c->layers; l++)
        json_array_append_new(types, json_string(usli_layer_windowed(c, l) ? "sliding_attention" : "full_attention"));
    return types;
}

/* In the words of all families at once: each reads its own. */
static int mixture_into_json(const usli_config *c, json_t *j) {
    const usli_mixture *m = c->arch->mixture;
    if (!m) return 0;
    const struct {
        const char *key;
        int64_t value;
    } sizes[] = {
        { "num_local_experts", c->experts },
        { "num_experts", c->experts },
        { "n_routed_experts", c->experts },
        { "num_experts_per_tok", c->top_k },
        { "moe_intermediate_size", c->expert_inter },
        { "shared_expert_intermediate_size", c->shared_inter },
        { "n_shared_experts", m->shared_gate ? 0 : c->shared_inter / c->expert_inter },
        { "n_group", c->groups > 1 ? c->groups : 1 },
        { "topk_group", c->groups > 1 ? c->best_groups : 1 },
    };
    int bad = 0;
    int64_t first = 0;
    while (first < c->layers && !usli_layer_sparse(c, first)) first++;
    json_t *dense = json_array();
    for (int64_t l = first; l < c->layers; l++)
        if (!usli_layer_sparse(c, l)) bad |= json_array_append_new(dense, json_integer(l));
    for (int64_t l = 0; !c->arch->latent && l < first; l++) bad |= json_array_append_new(dense, json_integer(l));
    bad |= json_object_set_new(j, "mlp_only_layers", dense);
    if (c->arch->latent) bad |= json_object_set_new(j, "first_k_dense_replace", json_integer(first));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value) bad |= json_object_set_new(j, sizes[i].key, json_integer(sizes[i].value));
    if (c->arch->latent && !m->biased)
        bad |= json_object_set_new(j, "topk_method", json_string(c->groups > 1 ? "group_limited_greedy" : "greedy"));
    bad |= json_object_set_new(j, "norm_topk_prob", json_boolean(c->normalised));
    return bad | json_object_set_new(j, "routed_scaling_factor", json_real(c->routed_scale));
}

static int latent_into_json(const usli_config *c, json_t *j) {
    if (!c->arch->latent) return 0;
    int bad = json_object_set_new(j, "q_lora_rank", c->q_lora ? json_integer(c->q_lora) : json_null());
    bad |= json_object_set_new(j, "kv_lora_rank", json_integer(c->kv_lora));
    bad |= json_object_set_new(j, "qk_rope_head_dim", json_integer(c->rot_dim));
    bad |= json_object_set_new(j, "qk_nope_head_dim", json_integer(c->head_dim - c->rot_dim));
    return bad | json_object_set_new(j, "v_head_dim", json_integer(c->v_dim));
}

/* The config.json that transformers would want for this file. */
static json_t *config_as_json(const usli_config *c) {
    json_t *j = json_pack(
        "{s:[s],s:s,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f,s:b,s:b,s:b,s:s}", "architectures", c->arch->name,
        "model_type", c->arch->model_type, "vocab_size", (json_int_t)c->vocab, "hidden_size", (json_int_t)c->hidden,
        "intermediate_size", (json_int_t)c->inter, "num_hidden_layers", (json_int_t)c->layers, "num_attention_heads",
        (json_int_t)c->heads, "num_key_value_heads", (json_int_t)c->kv_heads, "head_dim",
        (json_int_t)(c->arch->latent ? c->rot_dim : c->head_dim), "max_position_embeddings", (json_int_t)c->context,
        "rms_norm_eps", c->norm_eps, "rope_theta", c->rope.theta, "tie_word_embeddings", c->tied, "attention_bias",
        c->output_bias, "mlp_bias", c->mlp_bias, "hidden_act", act_name(c->act));
    if (!j) return NULL;
    const usli_arch *a = c->arch;
    int bad = 0;
    if (c->bos >= 0) bad |= json_object_set_new(j, "bos_token_id", json_integer(c->bos));
    if (c->eos_count) bad |= json_object_set_new(j, "eos_token_id", json_integer(c->eos[0]));
    if (c->pad >= 0) bad |= json_object_set_new(j, "pad_token_id", json_integer(c->pad));
    if (c->act != USLI_SILU) bad |= json_object_set_new(j, "hidden_activation", json_string(act_name(c->act)));
    if (c->rope.kind != USLI_ROPE_DEFAULT || c->rope.divisors[0][0] > 0)
        bad |= json_object_set_new(j, "rope_scaling", rope_as_json(c, &c->rope));
    if (c->rope.kind == USLI_ROPE_LONG)
        bad |= json_object_set_new(j, "original_max_position_embeddings", json_integer(c->rope.original_context));
    if (a->local_rope) bad |= json_object_set_new(j, "rope_local_base_freq", json_real(c->local_rope.theta));
    if (a->query_scalar > 0)
        bad |= json_object_set_new(j, "query_pre_attn_scalar", json_integer((json_int_t)c->query_scalar));
    bad |= mixture_into_json(c, j) | latent_into_json(c, j);
    if (c->rot_dim != c->head_dim && !c->arch->latent)
        bad |= json_object_set_new(j, "partial_rotary_factor", json_real((double)c->rot_dim / (double)c->head_dim));
    if (c->attention_softcap > 0)
        bad |= json_object_set_new(j, "attn_logit_softcapping", json_real(c->attention_softcap));
    if (c->logit_softcap > 0) bad |= json_object_set_new(j, "final_logit_softcapping", json_real(c->logit_softcap));
    if (c->window > 0) {
        bad |= json_object_set_new(j, "sliding_window", json_integer(c->window));
        if (a->window != USLI_WINDOW_ALL) bad |= json_object_set_new(j, "layer_types", windows_as_json(c));
    }
    if (!bad) return j;
    json_decref(j);
    return NULL;
}

static bool str_is(usli_gguf_str s, const char *text) {
    return s.data && s.len == strlen(text) && memcmp(s.data, text, s.len) == 0;
}

const char *const usli_gguf_divisors[2] = { "rope_factors_short.weight", "rope_factors_long.weight" };

double usli_gguf_query_scalar(const usli_config *c) {
    return (double)(c->layers == c->arch->gguf_wide_layers ? c->hidden / c->heads : c->head_dim);
}

double usli_gguf_yarn_attention(const usli_config *c) {
    return c->arch->latent && c->rope.mscale_all_dim > 0 ? 1 : usli_yarn_attention(c->rope.factor);
}

bool usli_gguf_has_windows(const usli_config *c) {
    usli_config usual = { .arch = c->arch, .layers = c->layers };
    mark_windowed(&usual, 0, c->arch->window_pattern);
    return memcmp(usual.windowed, c->windowed, sizeof usual.windowed) == 0;
}

/* longrope has no name in a GGUF: there are two tensors, and the factor on cos and sin is in the metadata, or 1. */
static usl_status read_long_rope(usl_ctx *ctx, const usli_gguf *g, usli_config *c) {
    int64_t half = c->rot_dim / 2;
    for (int i = 0; i < 2; i++) {
        const usli_file_tensor *t = usli_gguf_tensor(g, usli_gguf_divisors[i]);
        if (!t || t->dtype != USL_F32 || t->ndim != 1 || t->shape[0] != half || half > USLI_MOST_FACTORS)
            return usli_fail(ctx, USL_ERR_SHAPE, "%s: %s does not hold %lld float32 values", g->map->path,
                             usli_gguf_divisors[i], (long long)half);
        memcpy(c->rope.divisors[i], t->data, (size_t)half * sizeof(float));
    }
    c->rope.kind = USLI_ROPE_LONG;
    c->rope.factor = (double)c->context / (double)c->rope.original_context;
    if (!(c->rope.attention_factor > 0)) c->rope.attention_factor = 1;
    return USL_OK;
}

/* llama3's scaling has no name either: what it divides frequencies by stands in a tensor. Passes take the tensor as it
 * is; for what is written later the scaling of Meta's models is recognised, and what is none is kept as a list. */
static usl_status read_divided_rope(usl_ctx *ctx, const usli_gguf *g, usli_config *c) {
    const usli_file_tensor *t = usli_gguf_tensor(g, "rope_freqs.weight");
    int64_t half = c->rot_dim / 2;
    if (!t || c->rope.kind != USLI_ROPE_DEFAULT || half > USLI_MOST_FACTORS) return USL_OK;
    if (t->dtype != USL_F32 || t->ndim != 1 || t->shape[0] != half)
        return usli_fail(ctx, USL_ERR_SHAPE, "%s: rope_freqs.weight does not hold %lld float32 values", g->map->path,
                         (long long)half);
    usli_rope_config meta = { .kind = USLI_ROPE_LLAMA3,
                              .theta = c->rope.theta,
                              .low_freq_factor = 1,
                              .high_freq_factor = 4,
                              .original_context = 8192 };
    const float *divisors = t->data;
    double plain[USLI_MOST_FACTORS], scaled[USLI_MOST_FACTORS], attention;
    for (int64_t i = 0; i < half; i++) meta.factor = fmax(meta.factor, (double)divisors[i]);
    usli_rope_frequencies(&c->rope, c->rot_dim, NULL, 1, plain, &attention);
    usli_rope_frequencies(&meta, c->rot_dim, NULL, 1, scaled, &attention);
    bool same = meta.factor > 1;
    for (int64_t i = 0; i < half && same; i++)
        same = fabs(plain[i] / scaled[i] - (double)divisors[i]) <= 1e-5 * (double)divisors[i];
    if (same)
        c->rope = meta;
    else
        memcpy(c->rope.divisors[0], divisors, (size_t)half * sizeof *divisors);
    return USL_OK;
}

enum { GGUF_SIGMOID = 2 /* expert_gating_func */ };

static usl_status mixture_from_gguf(usl_ctx *ctx, const usli_gguf *g, usli_config *c) {
    const char *a = c->arch->gguf, *name = g->map->path;
    const usli_mixture *m = c->arch->mixture;
    if (!m) return USL_OK;
    c->experts = meta_int(g, a, "expert_count", 0);
    c->top_k = meta_int(g, a, "expert_used_count", m->top_k);
    c->expert_inter = meta_int(g, a, "expert_feed_forward_length", c->inter);
    int64_t shared = meta_int(g, a, "expert_shared_count", 0);
    if (m->shared) c->shared_inter = meta_int(g, a, "expert_shared_feed_forward_length", shared * c->expert_inter);
    c->groups = meta_int(g, a, "expert_group_count", m->groups);
    c->best_groups = meta_int(g, a, "expert_group_used_count", m->best_groups);
    c->routed_scale = m->scale > 0 ? meta_float(g, a, "expert_weights_scale", 1) : 1;
    c->normalised = m->always_normalised || meta_bool(g, a, "expert_weights_norm", m->gguf_normalised);
    for (int64_t l = 0; l < c->layers && l < USLI_MOST_LAYERS; l++) {
        char key[64];
        snprintf(key, sizeof key, "blk.%lld.ffn_gate_inp.weight", (long long)l);
        if (usli_gguf_tensor(g, key)) set_sparse(c, l);
    }
    return check_mixture(ctx, name, c);
}

static usl_status latent_from_gguf(usl_ctx *ctx, const usli_gguf *g, usli_config *c) {
    const char *a = c->arch->gguf;
    c->v_dim = c->head_dim;
    if (!c->arch->latent) return USL_OK;
    c->q_lora = meta_int(g, a, "attention.q_lora_rank", 0);
    c->kv_lora = meta_int(g, a, "attention.kv_lora_rank", 0);
    c->head_dim = meta_int(g, a, "attention.key_length_mla", c->head_dim);
    c->v_dim = meta_int(g, a, "attention.value_length_mla", meta_int(g, a, "attention.value_length", 0));
    c->kv_heads = c->heads;
    c->interleaved = true;
    /* 0.1 times mscale_all_dim; the same stands for mscale. */
    c->rope.mscale = c->rope.mscale_all_dim = 10 * meta_float(g, a, "rope.scaling.yarn_log_multiplier", 0);
    c->query_scalar = latent_scalar(c);
    return check_latent(ctx, g->map->path, c);
}

usl_status usli_config_from_gguf(usl_ctx *ctx, const usli_gguf *g, usli_config *c) {
    const char *name = g->map->path;
    *c = (usli_config){ .bos = -1, .pad = -1, .dtype = USL_DTYPE_AUTO, .init_range = 0.02 };
    usli_gguf_str arch = usli_gguf_string(g, "general.architecture");
    char key[128];
    snprintf(key, sizeof key, "%.*s.expert_count", (int)(arch.len < 64 ? arch.len : 64), arch.data ? arch.data : "");
    bool mixture = usli_gguf_int(g, key, 0) > 0;
    snprintf(key, sizeof key, "%.*s.expert_gating_func", (int)(arch.len < 64 ? arch.len : 64),
             arch.data ? arch.data : "");
    bool sigmoid = usli_gguf_int(g, key, 0) == GGUF_SIGMOID;
    if (!arch.data) return usli_fail(ctx, USL_ERR_FORMAT, "%s: its metadata names no general.architecture", name);
    if (!(c->arch = usli_arch_by_gguf(arch.data, arch.len, mixture, sigmoid)))
        return usli_arch_refuse(ctx, name, arch.data, arch.len);
    const char *a = c->arch->gguf;
    const usli_file_tensor *embd = usli_gguf_tensor(g, "token_embd.weight");
    if (!embd || embd->ndim != 2)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: has no token_embd.weight; it holds no model (a vocabulary only?)",
                         name);
    c->act = c->arch->act;
    c->vocab = embd->shape[0];
    c->hidden = meta_int(g, a, "embedding_length", 0);
    c->inter = meta_int(g, a, "feed_forward_length", 0);
    c->layers = meta_int(g, a, "block_count", 0);
    c->heads = meta_int(g, a, "attention.head_count", 0);
    c->kv_heads = meta_int(g, a, "attention.head_count_kv", c->heads);
    c->head_dim = meta_int(g, a, "attention.key_length", c->heads > 0 ? c->hidden / c->heads : 0);
    c->rot_dim = meta_int(g, a, "rope.dimension_count", c->head_dim);
    c->context = meta_int(g, a, "context_length", 2048);
    c->norm_eps = meta_float(g, a, "attention.layer_norm_rms_epsilon", 1e-5);
    c->tied = usli_gguf_tensor(g, "output.weight") == NULL;
    c->attention_bias = usli_gguf_tensor(g, "blk.0.attn_q.bias") != NULL;
    c->output_bias = usli_gguf_tensor(g, "blk.0.attn_output.bias") != NULL;
    c->mlp_bias = usli_gguf_tensor(g, "blk.0.ffn_gate.bias") != NULL;
    c->bos = (int32_t)usli_gguf_int(g, "tokenizer.ggml.bos_token_id", -1);
    c->pad = (int32_t)usli_gguf_int(g, "tokenizer.ggml.padding_token_id", -1);
    static const char *const ENDS[] = { "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id" };
    for (size_t i = 0; i < 2; i++) {
        int64_t id = usli_gguf_int(g, ENDS[i], -1);
        if (id >= 0 && !(c->eos_count && c->eos[0] == id)) c->eos[c->eos_count++] = (int32_t)id;
    }
    c->rope.theta = meta_float(g, a, "rope.freq_base", 10000.0);
    c->rope.factor = meta_float(g, a, "rope.scaling.factor", 1);
    c->rope.original_context = meta_int(g, a, "rope.scaling.original_context_length", c->context);
    c->rope.attention_factor = meta_float(g, a, "rope.scaling.attn_factor", 0);
    c->rope.beta_fast = meta_float(g, a, "rope.scaling.yarn_beta_fast", 32);
    c->rope.beta_slow = meta_float(g, a, "rope.scaling.yarn_beta_slow", 1);
    c->rope.truncate = true;
    snprintf(key, sizeof key, "%s.rope.scaling.type", a);
    usli_gguf_str scaling = usli_gguf_string(g, key);
    if (str_is(scaling, "linear"))
        c->rope.kind = USLI_ROPE_LINEAR;
    else if (str_is(scaling, "yarn"))
        c->rope.kind = USLI_ROPE_YARN;
    else if (scaling.data && !str_is(scaling, "none") && !str_is(scaling, "longrope"))
        return usli_fail(ctx, USL_ERR_UNSUPPORTED, "%s: rope scaling \"%.*s\" is not supported", name,
                         (int)(scaling.len < 64 ? scaling.len : 64), scaling.data);
    c->window = c->arch->window == USLI_NO_WINDOW ? 0 : meta_int(g, a, "attention.sliding_window", 0);
    if (c->window > 0) mark_windowed(c, 0, meta_int(g, a, "attention.sliding_window_pattern", c->arch->window_pattern));
    c->attention_softcap = meta_float(g, a, "attn_logit_softcapping", 0);
    c->logit_softcap = meta_float(g, a, "final_logit_softcapping", 0);
    c->query_scalar = usli_gguf_query_scalar(c);
    c->local_rope.theta = meta_float(g, a, "rope.freq_base_swa", 10000.0);
    USLI_TRY(latent_from_gguf(ctx, g, c));
    if (c->rope.kind == USLI_ROPE_YARN) c->rope.attention_factor *= usli_gguf_yarn_attention(c);
    USLI_TRY(check_config(ctx, name, c));
    USLI_TRY(mixture_from_gguf(ctx, g, c));
    if (str_is(scaling, "longrope") || usli_gguf_tensor(g, usli_gguf_divisors[1])) USLI_TRY(read_long_rope(ctx, g, c));
    USLI_TRY(read_divided_rope(ctx, g, c));
    USLI_TRY(check_rope(ctx, name, c, &c->rope));
    if (!(c->source = config_as_json(c))) return usli_nomem(ctx, 0);
    return USL_OK;
}
