/* Checkpoints that bitsandbytes quantised. */
#ifndef USLI_MODEL_BNB_H
#define USLI_MODEL_BNB_H

#include <jansson.h>

#include "core/model/load.h"

/* Whether t, some "....weight", is quantised: what belongs to it stands beside it. */
bool usli_bnb_is(const usli_source *src, const usli_file_tensor *t);
/* Checks everything that belongs to it; its rows and columns once it is decoded. */
usl_status usli_bnb_shape(const usl_model *m, const usli_source *src, const usli_file_tensor *t, int64_t *rows,
                          int64_t *cols);
/* Sets w, whose storage is new. */
usl_status usli_bnb_load(usl_model *m, const usli_source *src, const usli_file_tensor *t, usli_weight *w);
/* USL_OK for bitsandbytes' quantization_config; else a sentence with the remedy. */
usl_status usli_bnb_check_config(usl_ctx *ctx, const char *name, const json_t *quantization);

#endif
