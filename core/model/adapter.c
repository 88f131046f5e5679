/* Adapters: LoRA beside matrices, DoRA's magnitudes, trained copies of weights. All that is trained is one block. */
#include "core/model/adapter.h"

#include <math.h>
#include <string.h>

#include "core/cpu/decode.h"
#include "core/quant/codecs.h"

/* ---- Shapes and names ----------------------------------------------------------------------------------------------
 */

void usli_lora_shape(const usli_config *c, usli_slot slot, int64_t layer, int64_t *out, int64_t *in) {
    int64_t rows, cols;
    usli_slot_shape(c, slot, layer, &rows, &cols);
    *out = slot == USLI_EMBED ? cols : rows;
    *in = slot == USLI_EMBED ? rows : cols;
}

int64_t usli_lora_stack(const usli_config *c, usli_slot slot) {
    int64_t experts = usli_slot_experts(c, slot);
    return experts ? experts : 1;
}

const char *usli_parameter_name(usli_slot slot) {
    return slot == USLI_EXPERTS_IN || slot == USLI_EXPERTS_OUT || slot == USLI_ROUTER ? usli_slots[slot].hf : NULL;
}

void usli_module_name(const usli_config *c, usli_slot slot, int64_t layer, char *buf, size_t size) {
    usli_slot_name(c, slot, layer, false, buf, size);
    if (usli_slot_experts(c, slot)) return;
    char *last = strrchr(buf, '.'); /* .weight or .bias */
    if (last) *last = 0;
}

/* The linear slot that a bias belongs to; USLI_LINEARS: it is no bias. */
static usli_slot owner_of(const usli_config *c, usli_slot slot, int64_t layer) {
    char name[128], linear[128];
    int64_t rows, cols;
    usli_slot_shape(c, slot, layer, &rows, &cols);
    if (slot < USLI_LINEARS || slot >= USLI_EMBED || slot == USLI_ROUTER_BIAS || cols) return USLI_LINEARS;
    usli_module_name(c, slot, layer, name, sizeof name);
    for (int s = 0; s < USLI_LINEARS; s++) {
        usli_module_name(c, (usli_slot)s, layer, linear, sizeof linear);
        if (strcmp(name, linear) == 0) return (usli_slot)s;
    }
    return USLI_LINEARS;
}

void usli_copy_name(const usl_model *m, const usli_adapter *a, usli_slot slot, int64_t layer, char *buf, size_t size) {
    char plain[128];
    usli_slot owner = owner_of(&m->config, slot, layer);
    usli_slot_name(&m->config, slot, layer, false, plain, sizeof plain);
    char *last = strrchr(plain, '.');
    *last = 0;
    bool wrapped = owner < USLI_LINEARS && usli_adapter_module(m, a, owner, layer)->rank;
    snprintf(buf, size, "base_model.model.%s.%s%s", plain, wrapped ? "base_layer." : "", last + 1);
}

/* The experts' two adapters are one inside the other, PEFT's ParamWrappers; a single one stands alone. */
void usli_adapter_place(const usl_model *m, const usli_adapter *a, usli_slot slot, int64_t layer, char *buf,
                        size_t size) {
    bool inner = slot == USLI_EXPERTS_IN && usli_adapter_module(m, a, USLI_EXPERTS_OUT, layer)->rank;
    usli_place_name(&m->config, slot, layer, inner, buf, size);
}

void usli_place_name(const usli_config *c, usli_slot slot, int64_t layer, bool inner, char *buf, size_t size) {
    if (usli_slot_experts(c, slot))
        snprintf(buf, size, "model.layers.%lld.mlp.experts%s", (long long)layer, inner ? ".base_layer" : "");
    else
        usli_module_name(c, slot, layer, buf, size);
}

/* ---- Making --------------------------------------------------------------------------------------------------------
 */

usl_status usli_adapter_shape_new(usl_model *m, usli_adapter_shape *s) {
    size_t modules = (size_t)usli_module_count(&m->config), weights = (size_t)usli_weight_count(&m->config);
    *s = (usli_adapter_shape){ .ranks = usli_calloc(m->ctx, modules, sizeof *s->ranks),
                               .alphas = usli_calloc(m->ctx, modules, sizeof *s->alphas),
                               .copies = usli_calloc(m->ctx, weights, sizeof *s->copies) };
    return s->ranks && s->alphas && s->copies ? USL_OK : usli_nomem(m->ctx, modules * 16 + weights);
}

void usli_adapter_shape_free(usl_model *m, usli_adapter_shape *s) {
    usli_free(m->ctx, s->ranks);
    usli_free(m->ctx, s->alphas);
    usli_free(m->ctx, s->copies);
}

/* Rows and columns of weight number i. */
static bool weight_shape(const usli_config *c, int64_t i, usli_slot *slot, int64_t *layer, int64_t *rows,
                         int64_t *cols) {
    int64_t inside = c->layers * USLI_LAYER_SLOTS;
    *layer = i < inside ? i / USLI_LAYER_SLOTS : 0;
    *slot = i < inside ? (usli_slot)(i % USLI_LAYER_SLOTS) : (usli_slot)(USLI_EMBED + (i - inside));
    return usli_slot_shape(c, *slot, *layer, rows, cols);
}

/* Lays everything out from `next` on, and the norms from `norm` on; returns the floats. */
static size_t lay_out(usl_model *m, usli_adapter *a, const usli_adapter_shape *s, float *next, float *norm,
                      size_t *norms) {
    const usli_config *c = &m->config;
    int64_t layer, out, in, rows, cols;
    usli_slot slot;
    float *first = next, *first_norm = norm;
    for (int64_t i = 0; i < usli_module_count(c); i++) {
        usli_lora_module *l = &a->modules[i];
        l->rank = s->ranks[i];
        l->alpha = s->alphas[i];
        if (!l->rank) continue;
        slot = usli_module_slot(c, i, &layer);
        usli_lora_shape(c, slot, layer, &out, &in);
        l->a = next;
        l->b = l->a + usli_lora_stack(c, slot) * l->rank * in;
        next = l->b + (int64_t)l->rank * out;
        if (!s->dora) continue;
        l->magnitude = next;
        l->norm = norm;
        next += out;
        norm += out;
    }
    for (int64_t i = 0; i < usli_weight_count(c); i++) {
        if (!s->copies[i]) continue;
        weight_shape(c, i, &slot, &layer, &rows, &cols);
        usli_weight *w = &a->copies[i];
        w->storage = a->held;
        w->m = (usli_matrix){ .dtype = USL_F32, .rows = cols ? rows : 1, .cols = cols ? cols : rows, .data = next };
        w->d = w->m;
        next += rows * (cols ? cols : 1);
    }
    *norms = (size_t)(norm - first_norm);
    return (size_t)(next - first);
}

usl_status usli_adapter_new(usl_model *m, const char *name, const usli_adapter_shape *s, usli_adapter **out) {
    usl_ctx *ctx = m->ctx;
    usl_status st = USL_OK;
    size_t norms, modules = (size_t)usli_module_count(&m->config), weights = (size_t)usli_weight_count(&m->config);
    usli_adapter *a = usli_calloc(ctx, 1, sizeof *a);
    *out = NULL;
    if (!a) return usli_nomem(ctx, sizeof *a);
    if (!(a->name = usli_strdup(ctx, name)) || !(a->modules = usli_calloc(ctx, modules, sizeof *a->modules)) ||
        !(a->copies = usli_calloc(ctx, weights, sizeof *a->copies))) {
        st = usli_nomem(ctx, modules * sizeof *a->modules);
        goto done;
    }
    a->dora = s->dora;
    a->bytes = lay_out(m, a, s, USLI_NOWHERE, USLI_NOWHERE, &norms) * sizeof(float);
    st = m->plan_only ? usli_storage_plan(ctx, a->bytes, &a->held) : usli_storage_new(ctx, a->bytes, &a->held);
    if (st != USL_OK) goto done;
    a->storage = m->plan_only ? USLI_NOWHERE : a->held->data;
    USLI_TRYGO(usli_twin_open(&m->exec, a->storage, a->bytes, &a->twin));
    USLI_TRYGO(usli_device_alloc(&m->exec, norms * sizeof(float), &a->norms));
    lay_out(m, a, s, a->storage, a->norms, &norms);
    for (size_t i = 0; i < weights; i++)
        if (a->copies[i].storage) a->copies[i].d.data = usli_twin_at(&a->twin, a->copies[i].m.data);
    if (!m->plan_only) memset(a->storage, 0, a->bytes);
    *out = a;
    a = NULL;
done:
    usli_adapter_free(m, a);
    return st;
}

void usli_adapter_free(usl_model *m, usli_adapter *a) {
    usl_ctx *ctx = m->ctx;
    if (!a) return;
    usli_twin_close(&m->exec, &a->twin);
    usli_device_free(&m->exec, a->norms);
    usli_free(ctx, a->name);
    usli_free(ctx, a->base);
    usli_free(ctx, a->modules);
    usli_free(ctx, a->copies);
    usli_free(ctx, a->start);
    usli_storage_release(a->held);
    usli_free(ctx, a);
}

void usli_adapter_set_scales(const usl_model *m, usli_adapter *a) {
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        usli_lora_module *l = &a->modules[i];
        if (l->rank) l->scale = (float)(l->alpha / (a->rslora ? sqrt((double)l->rank) : (double)l->rank));
    }
}

usl_status usli_adapter_check_free(usl_model *m, const char *what) {
    if (m->trainers)
        return usli_fail(m->ctx, USL_ERR_INVALID, "%s: a trainer is using the model; close it first (trainer:close())",
                         what);
    return USL_OK;
}

/* Adds it to the list in place of one of the same name, and makes it active. */
static void put(usl_model *m, usli_adapter *a) {
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

usl_status usli_adapter_attach(usl_model *m, usli_adapter *a) {
    if (!m->plan_only) USLI_TRY(usli_model_pull(m)); /* the one that is active till now */
    USLI_TRY(usli_twin_push(&m->exec, &a->twin));
    put(m, a);
    return USL_OK;
}

usl_status usli_model_set_adapter(usl_model *m, const char *name) {
    USLI_TRY(usli_adapter_check_free(m, "set_adapter"));
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

/* ---- Merging -------------------------------------------------------------------------------------------------------
 */

enum { STRIP = 512 };

/* dst += the sum of scale * b[k] times row k of a, in that order for every column; a strip of dst stays at hand. */
USLI_WIDE static void add_low_rank(float *restrict dst, float scale, const float *b, const float *restrict a, int rank,
                                   int64_t cols) {
    for (int64_t first = 0; first < cols; first += STRIP) {
        int64_t n = cols - first < STRIP ? cols - first : STRIP;
        for (int k = 0; k < rank; k++) {
            float factor = scale * b[k];
            for (int64_t c = first; c < first + n; c++) dst[c] += factor * a[k * cols + c];
        }
    }
}

void usli_adapted_row(const usl_model *m, const usli_adapter *a, const usli_weight *w, usli_slot slot, int64_t layer,
                      int64_t row, float *dst) {
    int64_t cols = w->m.cols;
    usli_matrix_read(&w->m, row, 0, cols, USL_F32, dst);
    if (!a || (slot >= USLI_LINEARS && slot != USLI_EMBED && slot != USLI_HEAD)) return;
    const usli_lora_module *l = usli_adapter_module(m, a, slot, layer);
    if (slot == USLI_EMBED) {
        for (int64_t c = 0; l->rank && c < cols; c++) {
            float low = 0;
            for (int k = 0; k < l->rank; k++) low += l->b[c * l->rank + k] * l->a[k * w->m.rows + row];
            dst[c] += l->scale * low;
        }
        return;
    }
    int64_t matrix = row / (w->m.rows / usli_lora_stack(&m->config, slot));
    if (!l->rank) return;
    add_low_rank(dst, l->scale, l->b + row * l->rank, l->a + matrix * l->rank * cols, l->rank, cols);
    if (!l->magnitude) return;
    double sum = 0;
    for (int64_t c = 0; c < cols; c++) sum += (double)dst[c] * (double)dst[c];
    float factor = l->magnitude[row] / (float)sqrt(sum);
    for (int64_t c = 0; c < cols; c++) dst[c] *= factor;
}

/* ---- Adding --------------------------------------------------------------------------------------------------------
 */

static usl_status check_opts(usl_model *m, const usl_lora_opts *o) {
    usl_ctx *ctx = m->ctx;
    if (m->full)
        return usli_fail(ctx, USL_ERR_INVALID, "an adapter cannot be added to a model loaded with full_finetuning");
    if (o->rank < 1 || o->rank > 4096)
        return usli_fail(ctx, USL_ERR_INVALID, "r is %d; a rank from 1 to 4096 is wanted", o->rank);
    if (!(o->dropout >= 0 && o->dropout < 1))
        return usli_fail(ctx, USL_ERR_INVALID, "lora_dropout is %g; a number from 0 to below 1 is wanted", o->dropout);
    if (!isfinite(o->alpha) || o->alpha <= 0)
        return usli_fail(ctx, USL_ERR_INVALID, "lora_alpha is %g; a positive number is wanted", o->alpha);
    return USL_OK;
}

static usl_status bias_mode(usl_model *m, const char *text, usli_bias_mode *out) {
    static const char *const NAMES[] = { "none", "all", "lora_only" };
    *out = USLI_BIAS_NONE;
    for (int i = 0; text && i < 3; i++)
        if (strcmp(text, NAMES[i]) == 0) {
            *out = (usli_bias_mode)i;
            return USL_OK;
        }
    return text ? usli_fail(m->ctx, USL_ERR_INVALID, "bias is \"%s\"; \"none\", \"all\" and \"lora_only\" are known",
                            text)
                : USL_OK;
}

static void add_biases(const usl_model *m, usli_bias_mode mode, usli_adapter_shape *s) {
    const usli_config *c = &m->config;
    int64_t layer, rows, cols;
    usli_slot slot;
    for (int64_t i = 0; mode != USLI_BIAS_NONE && i < usli_weight_count(c); i++) {
        if (!weight_shape(c, i, &slot, &layer, &rows, &cols)) continue;
        usli_slot owner = owner_of(c, slot, layer);
        if (owner == USLI_LINEARS) continue;
        if (mode == USLI_BIAS_ALL || s->ranks[layer * USLI_LINEARS + owner]) s->copies[i] = true;
    }
}

static usl_status check_shape(usl_model *m, const usli_adapter_shape *s) {
    bool any = false;
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) any |= s->ranks[i] > 0;
    for (int64_t i = 0; i < usli_weight_count(&m->config); i++) any |= s->copies[i];
    if (!any)
        return usli_fail(m->ctx, USL_ERR_INVALID, "target_modules and layers_to_transform leave nothing to train");
    if (s->dora && s->ranks[m->config.layers * USLI_LINEARS])
        return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                         "use_dora has no magnitudes for embed_tokens here; train it whole by modules_to_save");
    for (int64_t i = 0; s->dora && i < usli_module_count(&m->config); i++) {
        int64_t layer;
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        if (s->ranks[i] && usli_parameter_name(slot))
            return usli_fail(
                m->ctx, USL_ERR_UNSUPPORTED,
                "use_dora has no magnitudes for parameters (%s); leave the experts and their router out of "
                "target_modules, or use_dora",
                usli_parameter_name(slot));
    }
    return USL_OK;
}

static usl_status set_opts(usl_model *m, usli_adapter *a, const usl_lora_opts *o, usli_bias_mode bias) {
    a->rank = o->rank;
    a->alpha = o->alpha;
    a->dropout = o->dropout;
    a->rslora = o->use_rslora;
    a->ties = o->ensure_weight_tying && m->config.tied;
    a->bias = bias;
    a->loftq_bits = o->loftq_bits;
    a->loftq_iter = o->loftq_iter;
    snprintf(a->init, sizeof a->init, "%s", o->init ? o->init : "default");
    usli_adapter_set_scales(m, a);
    return USL_OK;
}

usl_status usli_model_add_lora(usl_model *m, const usl_lora_opts *given) {
    usl_lora_opts o = USL_LORA_OPTS_INIT;
    if (given) memcpy(&o, given, given->size < sizeof o ? given->size : sizeof o);
    USLI_TRY(usli_adapter_check_free(m, "get_peft_model"));
    USLI_TRY(check_opts(m, &o));
    USLI_TRY(usli_start_check(m, o.init ? o.init : "default"));
    usli_adapter_shape s = { .dora = false };
    usli_bias_mode bias;
    usli_adapter *a = NULL;
    usl_status st = USL_OK;
    USLI_TRY(bias_mode(m, o.bias, &bias));
    USLI_TRYGO(usli_adapter_shape_new(m, &s));
    s.dora = o.use_dora;
    USLI_TRYGO(usli_match_modules(m, &o, &s));
    add_biases(m, bias, &s);
    USLI_TRYGO(check_shape(m, &s));
    USLI_TRYGO(usli_adapter_new(m, o.name ? o.name : "default", &s, &a));
    USLI_TRYGO(set_opts(m, a, &o, bias));
    if (!m->plan_only) {
        usli_start_copies(m, a);
        USLI_TRYGO(usli_start_values(m, a, o.seed));
        USLI_TRYGO(usli_start_magnitudes(m, a));
    }
    USLI_TRYGO(usli_adapter_attach(m, a));
    a = NULL;
done:
    usli_adapter_free(m, a);
    usli_adapter_shape_free(m, &s);
    return st;
}
