/* From files to weights. */
#ifndef USLI_MODEL_LOAD_H
#define USLI_MODEL_LOAD_H

#include "core/model/model.h"

/* A checkpoint: one of the two is open. */
typedef struct usli_source {
    usli_safetensors *safetensors;
    usli_gguf *gguf;
} usli_source;

usl_status usli_source_open(usl_ctx *ctx, const char *path, usli_source *src, usli_config *config);
void usli_source_close(usli_source *src);
/* Every tensor that the config wants is there with its shape and a type that can be decoded. path is for errors. */
usl_status usli_source_check(usl_ctx *ctx, const char *path, const usli_source *src, const usli_config *config);
usl_status usli_load_weights(usl_model *m, const usli_source *src, bool load_in_4bit);
/* dtype: of the linear weights and the embedding (AUTO: BF16, or F32 when trained). */
usl_status usli_random_weights(usl_model *m, uint64_t seed, bool load_in_4bit, usl_dtype dtype);

/* An int8 weight with a scale for each row: where the scales begin behind the codes. */
static inline size_t usli_int8_scales_at(int64_t rows, int64_t cols) {
    return ((size_t)(rows * cols) + 63) & ~(size_t)63;
}
#define USLI_INT8_STEP 7.874015748031496e-3f /* 1 / 127, as bitsandbytes writes it */

#endif
