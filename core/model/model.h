/* A model: config, weights (frozen ones immutable and shared), adapters, and what a pass needs. Floors above reach the
 * decoder through pass.h. */
#ifndef USLI_MODEL_MODEL_H
#define USLI_MODEL_MODEL_H

#include "core/model/config.h"
#include "core/ops/twin.h"
#include "core/tensor/tensor.h"

/* ---- Names: one row a tensor of a block or of the whole model (names.c)
 * --------------------------------------------------- */

typedef enum usli_slot {
    USLI_Q,
    USLI_K,
    USLI_V,
    USLI_O,
    USLI_GATE,
    USLI_UP,
    USLI_DOWN,
    USLI_QKV, /* instead of q, k, v and of gate, up where a family fuses them */
    USLI_GATE_UP,
    USLI_Q_A,
    USLI_KV_A,
    USLI_Q_B,
    USLI_KV_B,
    USLI_SHARED_GATE,
    USLI_EXPERTS_IN, /* a stack: gate, then up of each expert */
    USLI_EXPERTS_OUT,
    USLI_ROUTER, /* linear: adapters attach to all so far */
    USLI_LINEARS,
    USLI_ATTN_NORM = USLI_LINEARS,
    USLI_POST_ATTN_NORM,
    USLI_MLP_NORM,
    USLI_POST_MLP_NORM,
    USLI_Q_NORM,
    USLI_K_NORM,
    USLI_Q_A_NORM,
    USLI_KV_A_NORM,
    USLI_ROUTER_BIAS, /* never trained */
    USLI_Q_BIAS,
    USLI_K_BIAS,
    USLI_V_BIAS,
    USLI_O_BIAS,
    USLI_GATE_BIAS,
    USLI_UP_BIAS,
    USLI_DOWN_BIAS,
    USLI_LAYER_SLOTS,
    USLI_EMBED = USLI_LAYER_SLOTS,
    USLI_FINAL_NORM,
    USLI_HEAD,
    USLI_SLOTS
} usli_slot;

typedef struct usli_slot_info {
    const char *hf;   /* after "model.layers.N." for a layer's, else the whole name */
    const char *gguf; /* after "blk.N." */
    const char *peft; /* "q_proj": the word of target_modules; NULL when adapters do not attach */
} usli_slot_info;
extern const usli_slot_info usli_slots[USLI_SLOTS];

/* Rows and columns (0 columns: a vector) of a slot; false when this layer has no such tensor. */
bool usli_slot_shape(const usli_config *c, usli_slot slot, int64_t layer, int64_t *rows, int64_t *cols);
/* Writes its name in a model, and in a checkpoint that holds it whole: layer is ignored for the whole model's. */
void usli_slot_name(const usli_config *c, usli_slot slot, int64_t layer, bool gguf, char *buf, size_t size);
/* Experts whose matrices a slot stacks, 0: it is no stack. */
int64_t usli_slot_experts(const usli_config *c, usli_slot slot);

/* Checkpoints hold most slots whole. Stacks stand there expert by expert (PUBLISHED), or whole as tensors of three
 * dimensions; those of a GGUF keep gate and up apart. */
typedef enum usli_form { USLI_FORM_PUBLISHED, USLI_FORM_STACKED, USLI_FORM_GGUF } usli_form;
typedef struct usli_piece {
    char name[160];
    int ndim;
    int64_t shape[3];
    int64_t rows, first, run, stride; /* its row r is the slot's row first + r / run * stride + r % run */
} usli_piece;
int64_t usli_slot_pieces(const usli_config *c, usli_slot slot, usli_form form);
void usli_slot_piece(const usli_config *c, usli_slot slot, int64_t layer, usli_form form, int64_t i, usli_piece *out);
static inline int64_t usli_piece_row(const usli_piece *p, int64_t r) {
    return p->first + r / p->run * p->stride + r % p->run;
}
/* The i-th spelling of a tensor's name, from 0 on, as larger models that hold this one have it; false: no more. */
bool usli_name_spelling(int i, const char *name, char *buf, size_t size);
/* Its values multiply normed ones: in a GGUF they stand with the family's norm_offset added. */
bool usli_slot_is_norm(usli_slot slot);
/* q and k, whose rows a GGUF of the llama family orders otherwise. */
bool usli_slot_turns(usli_slot slot);
/* Row order of q and k in a GGUF of the llama family: hf row r stands at the returned row. */
int64_t usli_gguf_qk_row(int64_t hf_row, int64_t head_dim);

/* ---- Weights
 * ----------------------------------------------------------------------------------------------------------------------
 */

typedef struct usli_weight {
    usli_matrix m;         /* vectors are (1, n) and always F32 */
    usli_nf4 nf4;          /* m.nf4 points here for NF4 */
    usli_storage *storage; /* NULL: this config has no such tensor */
    usli_matrix d;         /* m as the device sees it: what passes read (place.c) */
    usli_nf4 d_nf4;
    float *grad; /* on the device, set by a trainer that trains it; NULL: frozen. F32 weights only */
} usli_weight;

/* One adapter on one matrix: scale * B A. The embedding's stands beside the table turned: in is the vocabulary. */
typedef struct usli_lora_module {
    int rank; /* 0: none here */
    double alpha;
    float scale;                    /* of B A */
    float *a, *b;                   /* (rank, in), (out, rank); of a stack one after the other */
    float *magnitude;               /* (out) DoRA; else NULL */
    float *norm;                    /* (out) on the device, with a magnitude: see usli_pass_norms */
    float *da, *db, *dmagnitude;    /* on the device, set by a trainer */
    const float *start_a, *start_b; /* what they began with, where the base was changed for it (PiSSA); else NULL */
} usli_lora_module;

typedef enum usli_bias_mode { USLI_BIAS_NONE, USLI_BIAS_ALL, USLI_BIAS_LORA } usli_bias_mode;

typedef struct usli_adapter {
    char *name;
    int rank; /* these two of modules that no pattern names */
    double alpha, dropout;
    bool rslora, dora, ties; /* ties: a tied head follows the trained copy of the embedding */
    usli_bias_mode bias;
    char init[24]; /* init_lora_weights as PEFT writes it */
    int loftq_bits, loftq_iter;
    usli_lora_module *modules; /* layers * USLI_LINEARS, then the embedding's and the head's */
    usli_weight *copies;       /* as the model's weights: trained float32 copies in their place; no storage: none */
    usli_storage *held;        /* all that is trained, one block */
    float *storage;
    size_t bytes;
    usli_twin twin; /* storage on the device */
    float *start;   /* storage as it began, or NULL */
    void *norms;    /* of magnitudes, on the device */
    bool norms_fresh;
    char *base; /* base_model_name_or_path of the folder it came from, or NULL */
    struct usli_adapter *next;
} usli_adapter;

/* Where a layer's weights are: one block, in the order of the slots, so that q, k, v and gate, up lie side by side. */
typedef struct usli_place {
    char *at;
    size_t bytes;
    size_t room;  /* of bytes: what stands there beside weights */
    bool on_host; /* memory that the GPU reads by itself */
} usli_place;

/* Two layers' room on the device: of the layers that are streamed, number i comes to half i % 2. */
typedef struct usli_ring {
    int64_t streamed;
    char *at;
    size_t half;
    int64_t holds[2]; /* numbers; -1: none */
} usli_ring;

/* Cosines and sines of the angles: (rows, rot_dim / 2) each, on the device. Row p is position p; see angles.c for those
 * behind the positions. */
typedef struct usli_rope_table {
    float *cos, *sin;
    int64_t rows;
} usli_rope_table;

struct usl_model {
    usl_ctx *ctx;
    atomic_int refs;
    struct usl_model *base; /* whose frozen weights these are, kept alive; NULL: its own */
    atomic_int sharers;     /* models whose base this is: what they read may not move */
    usli_config config;
    char *path;                       /* where it was opened; NULL for a random one */
    usli_weight *weights;             /* layers * USLI_LAYER_SLOTS, then EMBED, FINAL_NORM, HEAD */
    bool full;                        /* weights are trained */
    bool plan_only;                   /* weights and adapters have shapes and no numbers */
    usl_dtype dtype, res_dtype;       /* of activations and of the residual stream */
    int64_t context;                  /* max_seq_length in force */
    usli_rope_table rope, local_rope; /* local_rope: of layers with a window, where the family says so */
    void *placed, *tables;    /* the device's block of the last norm and the head, and of NF4's tables; NULL where d
                                 is m */
    void *embed, *host_embed; /* the embedding table's block, on the device or in host memory */
    usli_place *places;       /* (layers); NULL where d is m */
    usli_ring *ring;          /* through which layers in host memory come; NULL: there is none */
    int placing;              /* counts the changes of where passes find what they read */
    bool device_newer;        /* trained values on the device have not been pulled yet */
    float *rope_divisors;     /* (rot_dim / 2) from a GGUF, or NULL */
    usli_adapter *adapters, *active;
    usli_exec exec;  /* backend and its state; a pass sets the arena */
    char device[16]; /* "cpu", "cuda:1" */
    char name[160];  /* of the parameter last asked for */
    int trainers;    /* handles that hold gradients: adapters may not change meanwhile */
    int64_t resized; /* the vocabulary as it was opened, when it has another size now; 0: it has not */
};

/* path is recorded; opts as in unsloth.h (NULL: defaults). */
usl_status usli_model_open(usl_ctx *ctx, const char *path, const usl_model_opts *opts, usl_model **out);
usl_status usli_model_random(usl_ctx *ctx, const char *config_json, uint64_t seed, const usl_model_opts *opts,
                             usl_model **out);
/* Another model with base's frozen weights, as unsloth.h says. */
usl_status usli_model_share(usl_ctx *ctx, usl_model *base, usl_model **out);
/* Models beside one that hold the same frozen weights. */
static inline int usli_model_sharers(const usl_model *m) {
    return atomic_load(m->base ? &m->base->sharers : &m->sharers);
}
/* resize.c: another number of rows of the embedding table and the head; new ones are the mean of the first mean_of (0:
 * of all). Rows of a quantised table become floats of the model's type. */
usl_status usli_model_resize(usl_model *m, int64_t rows, int64_t mean_of);
/* Moves a row of both towards the mean of others: weight 1 makes it that mean. Of a resized model. */
usl_status usli_model_blend_row(usl_model *m, int64_t row, const int32_t *ids, size_t count, double weight);
usl_model *usli_model_retain(usl_model *m);
void usli_model_release(usl_model *m);

static inline int64_t usli_weight_count(const usli_config *c) {
    return c->layers * USLI_LAYER_SLOTS + (USLI_SLOTS - USLI_EMBED);
}
static inline int64_t usli_weight_index(const usli_config *c, usli_slot slot, int64_t layer) {
    return slot >= USLI_EMBED ? c->layers * USLI_LAYER_SLOTS + (slot - USLI_EMBED) : layer * USLI_LAYER_SLOTS + slot;
}
/* The frozen one, whatever adapter is active. */
static inline usli_weight *usli_base_weight(const usl_model *m, usli_slot slot, int64_t layer) {
    return &m->weights[usli_weight_index(&m->config, slot, layer)];
}
/* The one in force: the active adapter's trained copy (modules_to_save, bias), else the base's. */
static inline usli_weight *usli_model_weight(const usl_model *m, usli_slot slot, int64_t layer) {
    int64_t i = usli_weight_index(&m->config, slot, layer);
    return m->active && m->active->copies[i].storage ? &m->active->copies[i] : &m->weights[i];
}
/* The matrix that makes logits: the head, or the embedding table when they are tied. A copy of the embedding leaves a
 * tied head alone unless the adapter ties it, as in PEFT. */
static inline usli_weight *usli_model_head(const usl_model *m) {
    usli_weight *head = usli_model_weight(m, USLI_HEAD, 0);
    if (!m->config.tied || head->storage) return head;
    return m->active && m->active->ties ? usli_model_weight(m, USLI_EMBED, 0) : usli_base_weight(m, USLI_EMBED, 0);
}
static inline int64_t usli_module_count(const usli_config *c) {
    return c->layers * USLI_LINEARS + 2;
}
/* Slots with adapters: the linear ones of a block, the embedding and the head. */
static inline usli_lora_module *usli_adapter_module(const usl_model *m, const usli_adapter *a, usli_slot slot,
                                                    int64_t layer) {
    return &a->modules[slot < USLI_LINEARS ? layer * USLI_LINEARS + slot
                                           : m->config.layers * USLI_LINEARS + (slot == USLI_HEAD)];
}
static inline usli_slot usli_module_slot(const usli_config *c, int64_t i, int64_t *layer) {
    int64_t inside = c->layers * USLI_LINEARS;
    *layer = i < inside ? i / USLI_LINEARS : 0;
    return i < inside ? (usli_slot)(i % USLI_LINEARS) : i == inside ? USLI_EMBED : USLI_HEAD;
}
/* Whether the merged model has a head of its own where the base has none. */
static inline bool usli_model_unties(const usl_model *m) {
    const usli_adapter *a = m->active;
    if (!m->config.tied || !a) return false;
    bool adapted = usli_adapter_module(m, a, USLI_EMBED, 0)->rank || usli_adapter_module(m, a, USLI_HEAD, 0)->rank;
    return adapted || usli_model_head(m) != usli_model_weight(m, USLI_EMBED, 0);
}
/* What is trained has changed on the device. */
static inline void usli_model_touched(usl_model *m) {
    m->device_newer = true;
    if (m->active) m->active->norms_fresh = false;
}
/* The norms that DoRA divides by are to be made again, which recorded work does not do. */
static inline bool usli_model_norms_stale(const usl_model *m) {
    return m->active && m->active->dora && !m->active->norms_fresh;
}
/* The angles of a layer. */
static inline const usli_rope_table *usli_model_rope(const usl_model *m, int64_t layer) {
    return m->config.arch->local_rope && usli_layer_windowed(&m->config, layer) ? &m->local_rope : &m->rope;
}
/* "model.layers.0.self_attn.q_proj": where PEFT puts the adapter of a module. */
void usli_adapter_place(const usl_model *m, const usli_adapter *a, usli_slot slot, int64_t layer, char *buf,
                        size_t size);
/* angles.c: the tables of cosines and sines; their bytes with batches of so many tokens. */
usl_status usli_model_make_angles(usl_model *m);
void usli_model_drop_angles(usl_model *m);
uint64_t usli_model_rope_bytes(const usl_model *m, int64_t tokens);
/* Which row of the tables each token of a batch reads: its position, unless frequencies depend on how many tokens its
 * row has. All arrays are the host's: cu (rows + 1), position and angle (cu[rows]); lens (rows): a row's tokens with
 * those in a cache, NULL: there are none. It may change the tables, so the batch runs before the next is asked about.
 */
usl_status usli_model_angles(usl_model *m, int64_t rows, const int32_t *cu, const int32_t *lens,
                             const int32_t *position, int32_t *angle);
/* place.c: gives every weight its place on the device; releases it. */
usl_status usli_model_place(usl_model *m);
void usli_model_unplace(usl_model *m);
/* Moves the embedding table to host memory that the GPU reads by itself; 0 bytes: it is there, or must stay. */
size_t usli_model_embed_bytes(const usl_model *m);
usl_status usli_model_embed_to_host(usl_model *m);
/* Bytes of weights on the device when so many layers are streamed: they lie in host memory, spread evenly, and come
 * through a ring ahead of their use. Negative: as things are now. */
uint64_t usli_model_device_bytes(const usl_model *m, int64_t streamed, bool host_embed);
/* Bytes of weights that wait in host memory then. */
uint64_t usli_model_host_bytes(const usl_model *m, int64_t streamed, bool host_embed);
/* Layers that can be: 0 where memory is the host's, or weights are trained. */
int64_t usli_model_streamable(const usl_model *m);
/* stream.c: brings that about. 0: all layers are on the device. */
usl_status usli_model_stream(usl_model *m, int64_t streamed);
/* Without the ring: layers in host memory are read where they are. */
void usli_model_unstream(usl_model *m);
/* Before work on a layer: its weights are there; those of the one that follows (step 1) or precedes it (-1) are sent
 * for. */
usl_status usli_stream_layer(usli_exec *x, const usl_model *m, int64_t layer, int step);
/* place.c: passes find the layer's weights from `at` on. */
void usli_model_point(usl_model *m, int64_t layer, const char *at);
/* Copies the layer's weights to `at`, on the device or not. */
usl_status usli_model_fill_place(usl_model *m, int64_t layer, char *at, bool on_host);
/* The sentence when there is no memory for a layer. */
usl_status usli_refuse_place(const usl_model *m, int64_t layer, bool on_host);
/* Bytes of the first so many layers' linear weights decoded to the model's type; 0 when all of them are stored so, or
 * are trained. */
size_t usli_model_cache_bytes(const usl_model *m, int64_t layers);
/* Tells passes that the decoded weights of the first so many layers lie behind one another at base (which a dry run
 * does not touch); NULL: of none. */
void usli_model_set_cache(usl_model *m, void *base, int64_t layers);
/* Decodes them to where the cache is. */
usl_status usli_model_fill_cache(usl_model *m);
/* USL_ERR_INVALID with a sentence for a model that is only planned with. */
usl_status usli_model_check_weights(const usl_model *m);
usl_status usli_model_has_weights(usl_ctx *ctx, const usl_model *m); /* said to ctx */
/* The host's copy of trained values is made as new as the device's: before anything reads it. */
usl_status usli_model_pull(usl_model *m);

/* Decodes rows first .. first + count - 1 of a weight to float32, with the active adapter merged when merge is set
 * (its copy, or W + scale B A in float32, scaled to the magnitudes where there are any; a tied head may have become
 * one of its own). dst: (count, cols). For export: a piece of a tensor at a time. */
usl_status usli_model_rows(const usl_model *m, usli_slot slot, int64_t layer, bool merge, int64_t first, int64_t count,
                           float *dst);
uint64_t usli_model_weight_bytes(const usl_model *m);
/* As usl_model_gemm_rate (probe.c). */
usl_status usli_model_gemm_rate(usl_model *m, double *flops);

/* ---- Adapters
 * ------------------------------------------------------------------------------------------------------------------------
 */

usl_status usli_model_add_lora(usl_model *m, const usl_lora_opts *opts);
usl_status usli_model_load_adapter(usl_model *m, const char *dir, const char *name);
usl_status usli_model_set_adapter(usl_model *m, const char *name);
/* as_lora: what PiSSA made is written as plain LoRA of twice the rank, for the base as it was. */
usl_status usli_model_save_adapter(usl_model *m, const char *dir, const char *base, bool as_lora);

/* ---- Parameters by name
 * ----------------------------------------------------------------------------------------------------------------- */

/* i from 0: weights first (published names), then the active adapter's (PEFT's names). */
typedef struct usli_param_ref {
    char name[160];
    bool trainable; /* adapter weights when one is active, all weights when full */
    int ndim;
    int64_t shape[3], count; /* count: numbers */
    int64_t experts;         /* B of an adapter on a stack is published otherwise than it lies: usli_param_publish */
    float *data;             /* float32 masters of trainable ones on the host (see usli_model_pull), else NULL */
    float *device;           /* the same, on the device */
    float **grad;            /* where a trainer puts the gradient of a trainable one */
    usli_slot slot;
    int64_t layer;
    int part; /* 0: the weight, 1: lora_A, 2: lora_B, 3: DoRA's magnitude, 4: the adapter's copy of the weight */
} usli_param_ref;
bool usli_model_param(const usl_model *m, int64_t i, usli_param_ref *out);
/* Copies a parameter's numbers from where it lies to the order in which it is published; take: the other way. */
void usli_param_publish(const usli_param_ref *p, const float *from, float *to);
void usli_param_take(const usli_param_ref *p, const float *from, float *to);
bool usli_model_find_param(const usl_model *m, const char *name, usli_param_ref *out);

#endif
