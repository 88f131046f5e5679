/* What the files about adapters share: adapter.c makes them, start.c gives them their first values, peft_read.c
 * and peft_write.c are PEFT's folder, match.c knows PEFT's ways to name modules. */
#ifndef USLI_MODEL_ADAPTER_H
#define USLI_MODEL_ADAPTER_H

#include "core/io/safetensors.h"
#include "core/model/model.h"

/* In the metadata of adapter_model.safetensors, since older versions of PEFT stop at keys of adapter_config.json that
 * they do not know: the max_seq_length that scaled rope in training. */
#define USLI_ADAPTER_LENGTH "unsloth_lua.max_seq_length"

/* ---- Shapes and names ---- */

/* out and in of the matrix that an adapter on a slot changes: the embedding's is the table turned. */
void usli_lora_shape(const usli_config *c, usli_slot slot, int64_t layer, int64_t *out, int64_t *in);
/* Matrices that a slot stacks, each with an adapter of its own: 1, or the experts. */
int64_t usli_lora_stack(const usli_config *c, usli_slot slot);
/* "model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head": what PEFT matches against; of stacks
 * "model.layers.0.mlp.experts.down_proj". */
void usli_module_name(const usli_config *c, usli_slot slot, int64_t layer, char *buf, size_t size);
/* What is a parameter to PEFT, and no module: "mlp.experts.down_proj". NULL: a module. */
const char *usli_parameter_name(usli_slot slot);
/* Where PEFT puts the adapter. inner: of the experts' two. */
void usli_place_name(const usli_config *c, usli_slot slot, int64_t layer, bool inner, char *buf, size_t size);
/* PEFT's name of a trained copy: of modules_to_save, or of a bias. */
void usli_copy_name(const usl_model *m, const usli_adapter *a, usli_slot slot, int64_t layer, char *buf, size_t size);

/* ---- Making ---- */

typedef struct usli_adapter_shape {
    int *ranks;     /* (usli_module_count) 0: none */
    double *alphas; /* the same */
    bool *copies;   /* (usli_weight_count) weights that are trained as copies */
    bool dora;
} usli_adapter_shape;

usl_status usli_adapter_shape_new(usl_model *m, usli_adapter_shape *s);
void usli_adapter_shape_free(usl_model *m, usli_adapter_shape *s);
/* All values 0. */
usl_status usli_adapter_new(usl_model *m, const char *name, const usli_adapter_shape *s, usli_adapter **out);
void usli_adapter_free(usl_model *m, usli_adapter *a);
/* Once alphas and rslora stand. */
void usli_adapter_set_scales(const usl_model *m, usli_adapter *a);
/* Pushes it to the device, puts it in place of one of the same name and makes it active. */
usl_status usli_adapter_attach(usl_model *m, usli_adapter *a);
/* The sentence while a trainer uses the model. */
usl_status usli_adapter_check_free(usl_model *m, const char *what);

/* Row of w in float32 with a's adapter merged; a NULL: as it is. */
void usli_adapted_row(const usl_model *m, const usli_adapter *a, const usli_weight *w, usli_slot slot, int64_t layer,
                      int64_t row, float *dst);

/* ---- The tables of a resized model (resize.c) ---- */

/* Beside the adapter in its file: announced or written. */
usl_status usli_resized_tensors(usl_model *m, const usli_adapter *a, usli_safetensors_writer *w, bool writing);
/* The embedding's and the head's from such a file, NULL: not there; the model gets their size. */
usl_status usli_model_put_tables(usl_model *m, const char *path, const usli_file_tensor *const tables[2]);

/* ---- First values (start.c) ---- */

/* Copies get the base's values. */
void usli_start_copies(usl_model *m, usli_adapter *a);
/* a->init names the way. What changes the base ("pissa", "loftq") does so at once. */
usl_status usli_start_values(usl_model *m, usli_adapter *a, uint64_t seed);
/* The part of that which changes the base, for an adapter whose values come from a file. */
usl_status usli_start_base(usl_model *m, usli_adapter *a);
/* Magnitudes are the lengths of the rows as they are. */
usl_status usli_start_magnitudes(usl_model *m, usli_adapter *a);
/* Whether it changed the base. */
bool usli_start_changes(const usli_adapter *a);
/* USL_OK for a name that usli_start_values knows. */
usl_status usli_start_check(usl_model *m, const char *init);

/* The rank largest singular values of w (rows, cols) and their vectors: u (rows, rank), s (rank), v (rank, cols).
 * iterations: of a randomised range finder; negative: as many as it takes. The same bits with any number of threads. */
usl_status usli_svd(usl_ctx *ctx, const float *w, int64_t rows, int64_t cols, int rank, int iterations, float *u,
                    float *s, float *v);

/* ---- Choosing modules (match.c) ---- */

/* Fills ranks, alphas and copies as the options say. */
usl_status usli_match_modules(usl_model *m, const usl_lora_opts *o, usli_adapter_shape *s);
/* The alphas of modules that have ranks already, by a JSON object of patterns. */
usl_status usli_match_alphas(usl_model *m, const char *alpha_pattern, usli_adapter_shape *s);

#endif
