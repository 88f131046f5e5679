/* An adapter as a .gguf: two tensors beside the name of each weight that it changes. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/export/export.h"

static usl_status add(const usl_model *m, usli_gguf_writer *w, usli_slot slot, int64_t layer, int rank) {
    char name[160], full[176];
    int64_t rows, cols;
    usli_slot_shape(&m->config, slot, layer, &rows, &cols);
    usli_slot_name(&m->config, slot, layer, true, name, sizeof name);
    snprintf(full, sizeof full, "%s.lora_a", name);
    USLI_TRY(usli_gguf_add(w, full, USL_F32, 2, (const int64_t[]){ rank, cols }));
    snprintf(full, sizeof full, "%s.lora_b", name);
    return usli_gguf_add(w, full, USL_F32, 2, (const int64_t[]){ rows, rank });
}

/* B's rows stand in the order of the weight's. */
static usl_status put(const usl_model *m, usli_gguf_writer *w, usli_slot slot, int64_t layer,
                      const usli_lora_module *l) {
    int64_t rows, cols, d = m->config.head_dim;
    bool permuted = m->config.arch->gguf_permuted && usli_slot_turns(slot);
    usli_slot_shape(&m->config, slot, layer, &rows, &cols);
    USLI_TRY(usli_gguf_write(w, l->a, (size_t)l->rank * (size_t)cols * sizeof(float)));
    for (int64_t r = 0; r < rows; r++) {
        int64_t k = r % d, from = permuted ? r / d * d + k % 2 * (d / 2) + k / 2 : r;
        USLI_TRY(usli_gguf_write(w, l->b + from * l->rank, (size_t)l->rank * sizeof(float)));
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
    USLI_TRY(usli_gguf_create(m->ctx, path, &w));
    USLI_TRYGO(usli_gguf_put_name(w, m));
    USLI_TRYGO(usli_gguf_put_string(w, "general.type", "adapter", 7));
    USLI_TRYGO(usli_gguf_put_string(w, "adapter.type", "lora", 4));
    /* Readers scale by alpha / rank. */
    USLI_TRYGO(usli_gguf_put_f32(w, "adapter.lora.alpha", a->scale * (float)a->rank));
    for (int writing = 0; writing < 2; writing++) {
        if (writing) USLI_TRYGO(usli_gguf_begin(w));
        for (int64_t i = 0; i < m->config.layers * USLI_LINEARS; i++) {
            usli_slot slot = (usli_slot)(i % USLI_LINEARS);
            const usli_lora_module *l = usli_adapter_module(m, a, slot, i / USLI_LINEARS);
            if (!l->rank) continue;
            USLI_TRYGO(writing ? put(m, w, slot, i / USLI_LINEARS, l) : add(m, w, slot, i / USLI_LINEARS, l->rank));
        }
    }
    st = usli_gguf_commit(w);
done:
    usli_gguf_abandon(w);
    return st;
}
