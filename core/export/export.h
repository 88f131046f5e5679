/* Exports: one pass from the weights in hand, a piece of a tensor at a time, no temporary copy; the active adapter is
 * merged on the way (W + scale B A in float32). Everything is written beside, looked at, and renamed. */
#ifndef USLI_EXPORT_EXPORT_H
#define USLI_EXPORT_EXPORT_H

#include "core/export/imatrix.h"
#include "core/export/mix.h"
#include "core/text/tokenizer.h"

/* What is exported: the weights of base with m's active adapter merged. */
typedef struct usli_export_source {
    usl_model *m;
    usl_model *base;                /* m itself, or the same model with other weights: the 16-bit ones of a 4-bit m */
    const usli_imatrix *importance; /* NULL: none */
    struct usli_quantiser *device;  /* what quantises in the CPU's place; NULL: nothing does (device.h) */
} usli_export_source;

/* m with what opts names; refuses a base of another shape. opts may be NULL. */
usl_status usli_export_source_of(usl_model *m, const usl_export_opts *opts, usli_export_source *out);

/* A folder that transformers loads: config.json, generation_config.json, model.safetensors (sharded above 5 GB), and
 * the tokenizer's files when tok is given. dtype: F32, BF16, F16, or NF4 in bitsandbytes' layout (merged4.c). */
usl_status usli_export_merged(const usli_export_source *s, const usli_tokenizer *tok, const char *dir, usl_dtype dtype,
                              bool verify, usl_export_report *report);

typedef struct usli_gguf_target {
    const char *path;
    const usli_method *method;
} usli_gguf_target;
/* All of them in one pass over the weights. reports: (count) or NULL. */
usl_status usli_export_gguf(const usli_export_source *s, const usli_tokenizer *tok, const usli_gguf_target *targets,
                            int count, bool verify, usl_export_report *reports);
/* The active adapter as llama.cpp loads it beside a model (lora.c). */
usl_status usli_export_lora(usl_model *m, const char *path);

/* gguf_meta.c: everything a .gguf says before its tensors. */
usl_status usli_gguf_put_model(usli_gguf_writer *w, const usl_model *m, const usli_method *method);
usl_status usli_gguf_put_name(usli_gguf_writer *w, const usl_model *m);
usl_status usli_gguf_put_tokenizer(usli_gguf_writer *w, const usl_model *m, const usli_tokenizer *tok);

/* pieces.c: rows of a tensor, converted, handed over in order. */
typedef usl_status (*usli_sink_fn)(void *ud, const void *data, size_t bytes);
typedef struct usli_export_out {
    usl_dtype dtype;
    usli_sink_fn sink;
    void *ud;
} usli_export_out;
/* piece: of what a checkpoint holds of the slot. Each row is decoded and merged once and encoded for each of `count`
 * outputs. gguf: as GGUF wants them, q and k in its order of rows, norms with the family's offset added. Uses all
 * threads; memory is bounded by a slab. */
usl_status usli_export_tensor(const usli_export_source *s, usli_slot slot, int64_t layer, const usli_piece *piece,
                              bool gguf, const usli_export_out *out, int count);
/* Rows first .. of the merged weight, float32. */
void usli_export_rows(const usli_export_source *s, usli_slot slot, int64_t layer, int64_t first, int64_t count,
                      float *dst);
/* What goes out before anything is merged: base's, or the copy that the adapter trained in its place. */
const usli_weight *usli_export_weight(const usli_export_source *s, usli_slot slot, int64_t layer);
bool usli_export_is_merged(const usli_export_source *s, usli_slot slot, int64_t layer);
/* As usl_export_report's merged_onto. */
int usli_export_onto(const usli_export_source *s);
/* The stored bytes of base go out as they are: nothing is merged and the type is the same. */
bool usli_export_raw(const usli_export_source *s, usli_slot slot, int64_t layer, usl_dtype dtype);
/* Refuses when `bytes` do not fit the disk that path lies on. */
usl_status usli_export_check_disk(usl_ctx *ctx, const char *path, uint64_t bytes);
/* Slot and layer of the i-th tensor in the published order; false past the end or when this model has none there. */
bool usli_export_slot(const usl_model *m, int64_t i, usli_slot *slot, int64_t *layer);
int64_t usli_export_slots(const usl_model *m);

/* check.c: reads back what was written at path (a file or a folder) and compares it with its source: weights, tokens,
 * template, logits. vectors: the type that norms and biases were written in. name stands in errors. */
usl_status usli_export_check(const usli_export_source *s, const usli_tokenizer *tok, const char *path, const char *name,
                             usl_dtype vectors, usl_export_report *report);
/* Tokenizer and template of what was opened against those that were exported. */
usl_status usli_export_check_tokenizer(usl_ctx *ctx, const usli_tokenizer *tok, const usli_tokenizer *read,
                                       const char *name);

#endif
