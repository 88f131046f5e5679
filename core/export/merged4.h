/* Linear weights in four bits, as bitsandbytes stores NF4 with double quantisation in a safetensors file: codes, and
 * beside them five small tensors. */
#ifndef USLI_EXPORT_MERGED4_H
#define USLI_EXPORT_MERGED4_H

#include <jansson.h>

#include "core/export/export.h"
#include "core/io/safetensors.h"

bool usli_merged4_has(usli_slot slot);
uint64_t usli_merged4_bytes(const usl_model *m, usli_slot slot, int64_t layer);
/* Describes the tensors of one weight, or writes them. */
usl_status usli_merged4_put(const usli_export_source *s, usli_slot slot, int64_t layer, bool writing,
                            usli_safetensors_writer *w, const char *file, json_t *weight_map);
/* The quantization_config of config.json; new. */
json_t *usli_merged4_config(void);
/* Reads the folder back and compares its weights with those of the source. */
usl_status usli_merged4_check(const usli_export_source *s, const usli_tokenizer *tok, const char *path,
                              const char *name, usl_export_report *report);

#endif
