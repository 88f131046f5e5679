/* Exports: one pass from the weights in hand, a piece of a tensor at a time, no temporary copy; the active adapter is
 * merged on the way (W + scale B A in float32, onto the weights that training saw). Everything is written beside and
 * renamed. */
#ifndef USLI_EXPORT_EXPORT_H
#define USLI_EXPORT_EXPORT_H

#include "core/model/model.h"
#include "core/text/tokenizer.h"

/* A folder that transformers loads: config.json, generation_config.json, model.safetensors (sharded above 5 GB), and
 * the tokenizer's files when tok is given. dtype: F32, BF16 or F16. */
usl_status usli_export_merged(usl_model *m, const usli_tokenizer *tok, const char *dir, usl_dtype dtype);
/* method: "f32", "f16", "bf16", "q8_0", "q4_k_m". */
usl_status usli_export_gguf(usl_model *m, const usli_tokenizer *tok, const char *path, const char *method);

/* pieces.c: rows of a tensor, converted, handed over in order. */
typedef usl_status (*usli_sink_fn)(void *ud, const void *data, size_t bytes);
/* piece: of what a checkpoint holds of the slot. gguf: as GGUF wants them, q and k in its order of rows, norms with the
 * family's offset added. Uses all threads; memory is bounded by a slab. */
usl_status usli_export_tensor(usl_model *m, usli_slot slot, int64_t layer, const usli_piece *piece, usl_dtype dtype,
                              bool gguf, usli_sink_fn sink, void *ud);
/* Refuses when `bytes` do not fit the disk that path lies on. */
usl_status usli_export_check_disk(usl_ctx *ctx, const char *path, uint64_t bytes);
/* Slot and layer of the i-th tensor in the published order; false past the end or when this model has none there. */
bool usli_export_slot(const usl_model *m, int64_t i, usli_slot *slot, int64_t *layer);
int64_t usli_export_slots(const usl_model *m);

#endif
