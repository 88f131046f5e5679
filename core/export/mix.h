/* Which type each tensor of a .gguf gets: quantization methods by name, and the mix of types that llama.cpp's quantiser
 * makes of each. By names of tensors alone, so that families need no word here. */
#ifndef USLI_EXPORT_MIX_H
#define USLI_EXPORT_MIX_H

#include "core/base/ctx.h"

typedef struct usli_method {
    const char *name;
    usl_dtype matrix;   /* of most matrices */
    uint32_t file_type; /* general.file_type */
    const char *mix;    /* the method whose rules count; itself where NULL */
    /* Of the head (and tied embeddings) and of embeddings, where the method says so itself; else USL_DTYPE_AUTO. */
    usl_dtype head, embeddings;
} usli_method;

/* What the rules ask of a model. */
typedef struct usli_mix_model {
    int64_t layers, heads, kv_heads, experts;
    bool tied, importance; /* importance: an importance matrix is at hand */
} usli_mix_model;

/* By name or by one of Unsloth's other names for it, in any case; NULL: not known. */
const usli_method *usli_method_find(const char *name);
/* "f32, f16, ...": for refusals. */
void usli_method_list(char *buf, size_t size);
/* tensor: its name in the file ("blk.3.attn_v.weight"); layer: its number, ignored for the whole model's; cols: values
 * of a row, 0 for a vector. */
usl_dtype usli_mix_type(const usli_method *method, const usli_mix_model *model, const char *tensor, int64_t layer,
                        int64_t cols);
/* As llama.cpp has it: a tensor of so few bits must not be quantised blindly. */
bool usli_mix_wants_importance(const usli_method *method, const char *tensor, usl_dtype type);

#endif
