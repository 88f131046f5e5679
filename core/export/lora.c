/* An adapter as a .gguf: two tensors beside the name of each weight that it changes. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/export/export.h"

/* What a piece of a weight is in the file's order of dimensions: those of a stack's experts come first. */
static usl_status add(usli_gguf_writer *w, const usli_piece *p, int64_t experts, int64_t cols, int64_t rank) {
    char full[sizeof p->name + 16];
    int64_t a[] = { experts, rank, cols }, b[] = { experts, p->rows / experts, rank };
    int skip = p->ndim == 3 ? 0 : 1;
    snprintf(full, sizeof full, "%s.lora_a", p->name);
    USLI_TRY(usli_gguf_add(w, full, USL_F32, 3 - skip, a + skip));
    snprintf(full, sizeof full, "%s.lora_b", p->name);
    return usli_gguf_add(w, full, USL_F32, 3 - skip, b + skip);
}

/* B's rows stand in the order of the weight's. Readers have one alpha for all modules: what this one's differs by is
 * multiplied into B. */
static usl_status put(const usl_model *m, usli_gguf_writer *w, const usli_piece *p, bool turned, int64_t experts,
                      int64_t cols, const usli_lora_module *l, float alpha) {
    int64_t d = m->config.head_dim;
    float more = l->scale * (float)l->rank / alpha;
    USLI_TRY(usli_gguf_write(w, l->a, (size_t)(experts * l->rank * cols) * sizeof(float)));
    for (int64_t r = 0; r < p->rows; r++) {
        int64_t k = r % d, from = turned ? r / d * d + k % 2 * (d / 2) + k / 2 : usli_piece_row(p, r);
        for (int c = 0; c < l->rank; c++) {
            float value = more * l->b[from * l->rank + c];
            USLI_TRY(usli_gguf_write(w, &value, sizeof value));
        }
    }
    return USL_OK;
}

/* llama.cpp multiplies by these without looking for an adapter. */
static bool is_unheard(const usli_config *c, usli_slot slot) {
    return c->arch->latent &&
           (slot == USLI_Q || slot == USLI_Q_A || slot == USLI_KV_A || slot == USLI_Q_B || slot == USLI_KV_B);
}

/* What a .gguf of LoRA has no place for. */
static usl_status check(const usl_model *m, const usli_adapter *a, const char *path) {
    const char *what = NULL;
    for (int64_t i = 0; i < usli_weight_count(&m->config); i++)
        if (a->copies[i].storage) what = "trained copies of weights (modules_to_save, bias)";
    for (int64_t i = 0; i < usli_module_count(&m->config); i++) {
        const usli_lora_module *l = &a->modules[i];
        int64_t layer;
        usli_slot slot = usli_module_slot(&m->config, i, &layer);
        if (!l->rank) continue;
        if (l->magnitude) what = "magnitudes (DoRA)";
        if (l->start_a) what = "a base that its beginning (PiSSA, LoftQ) changed";
        if (slot == USLI_EMBED) what = "an adapter of the embedding";
        if (slot == USLI_HEAD && m->config.tied) what = "an adapter of a head that is tied to the embedding";
    }
    if (strcmp(a->init, "loftq") == 0) what = "a base that its beginning (PiSSA, LoftQ) changed";
    if (!what) return USL_OK;
    return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                     "%s: adapter \"%s\" has %s, which LoRA in a .gguf cannot say; export the merged model", path,
                     a->name, what);
}

static usl_status each(const usl_model *m, usli_gguf_writer *w, const usli_adapter *a, float alpha, bool writing) {
    const usli_config *c = &m->config;
    for (int64_t i = 0; i < usli_module_count(c); i++) {
        int64_t layer, rows, cols;
        usli_slot slot = usli_module_slot(c, i, &layer);
        int64_t experts = usli_slot_experts(c, slot);
        const usli_lora_module *l = &a->modules[i];
        if (!l->rank) continue;
        if (is_unheard(c, slot))
            return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                             "the adapter changes %s, and llama.cpp applies none to the latent attention of a %s; "
                             "export the merged model, or train without it",
                             usli_slots[slot].peft, c->arch->name);
        if (!experts) experts = 1;
        usli_slot_shape(c, slot, layer, &rows, &cols);
        for (int64_t k = 0; k < usli_slot_pieces(c, slot, USLI_FORM_GGUF); k++) {
            usli_piece p;
            usli_slot_piece(c, slot, layer, USLI_FORM_GGUF, k, &p);
            bool turned = c->arch->gguf_permuted && usli_slot_turns(slot);
            USLI_TRY(writing ? put(m, w, &p, turned, experts, cols, l, alpha) : add(w, &p, experts, cols, l->rank));
        }
    }
    return USL_OK;
}

usl_status usli_export_lora(usl_model *m, const char *path) {
    const usli_adapter *a = m->active;
    usli_gguf_writer *w;
    usl_status st;
    if (!a)
        return usli_fail(m->ctx, USL_ERR_INVALID,
                         "%s: the model has no active adapter to export; add one with get_peft_model", path);
    USLI_TRY(usli_model_pull(m));
    USLI_TRY(check(m, a, path));
    USLI_TRY(usli_gguf_create(m->ctx, path, &w));
    USLI_TRYGO(usli_gguf_put_name(w, m));
    USLI_TRYGO(usli_gguf_put_string(w, "general.type", "adapter", 7));
    USLI_TRYGO(usli_gguf_put_string(w, "adapter.type", "lora", 4));
    /* Readers scale by alpha / rank. */
    float alpha = (float)(a->rslora ? a->alpha * sqrt(a->rank) : a->alpha);
    USLI_TRYGO(usli_gguf_put_f32(w, "adapter.lora.alpha", alpha));
    USLI_TRYGO(each(m, w, a, alpha, false));
    USLI_TRYGO(usli_gguf_begin(w));
    USLI_TRYGO(each(m, w, a, alpha, true));
    st = usli_gguf_commit(w);
done:
    usli_gguf_abandon(w);
    return st;
}
