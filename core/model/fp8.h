/* Checkpoints of 8-bit floats with a scale for each block, as DeepSeek V3 and R1 are published. */
#ifndef USLI_MODEL_FP8_H
#define USLI_MODEL_FP8_H

#include <jansson.h>

#include "core/model/load.h"

/* Whether t, some "....weight", is stored so. */
bool usli_fp8_is(const usli_source *src, const usli_file_tensor *t);
/* Its scales fit it. */
usl_status usli_fp8_check(const usl_model *m, const usli_source *src, const usli_file_tensor *t);
/* Decodes it, once it was checked, to `to` as bfloat16, or as float32 of the same numbers; its row r is row
 * usli_piece_row there, with piece NULL row r. */
usl_status usli_fp8_read(const usl_model *m, const usli_source *src, const usli_file_tensor *t, const usli_piece *piece,
                         usl_dtype dtype, void *to);
/* Reads quantization_config; a sentence with the remedy for other ways of scaling. */
usl_status usli_fp8_config(usl_ctx *ctx, const char *name, const json_t *quantization, usli_config *c);

#endif
