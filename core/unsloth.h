/* unsloth.h: fine-tune large language models from C.
 *
 * Simple use, in order: usl_ctx_new, usl_model_open, usl_model_add_lora, usl_rows_add, usl_trainer_new,
 * usl_trainer_step, usl_model_generate, usl_export_*. Everything that ends in _new or _open gives a new handle that the
 * function ending in _free releases; _free accepts NULL; children keep their parents alive, so any order is safe.
 *
 * Every function that can fail returns a usl_status; usl_ctx_errmsg(ctx) then holds one sentence that names the thing
 * and the remedy. The library never exits, prints or aborts. One context is used by one thread at a time (several
 * contexts may live on several threads); callbacks run on the calling thread; usl_ctx_cancel may be called from
 * anywhere.
 *
 * Option structs carry their size first: write `usl_model_opts o = USL_MODEL_OPTS_INIT;` and change what you need.
 * Sizes are bytes, token ids are 0-based int32. A path, name or
 * text that is NULL is an error, a handle that is NULL is not looked for. */
#ifndef UNSLOTH_H
#define UNSLOTH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define USL_API __attribute__((visibility("default")))
#else
#define USL_API
#endif

#define USL_VERSION "0.1.0"
/* Grows by one with every change that a program built against an older header would not survive. */
#define USL_ABI_VERSION 1

/* What the library at run time is: a host refuses to go on when usl_abi_version() is not its USL_ABI_VERSION. */
USL_API int usl_abi_version(void);
USL_API const char *usl_version(void);

/* ---- Status ------------------------------------------------------------------------------------------------------ */

#define USL_STATUS_MAP(X)                                             \
    X(OK, 0, "success")                                               \
    X(ERR_INVALID, 1, "an argument or option is not valid")           \
    X(ERR_NOMEM, 2, "out of memory")                                  \
    X(ERR_IO, 3, "a file could not be read or written")               \
    X(ERR_FORMAT, 4, "a file does not hold what its format promises") \
    X(ERR_SHAPE, 5, "shapes do not match")                            \
    X(ERR_UNSUPPORTED, 6, "not supported here")                       \
    X(ERR_NOT_FOUND, 7, "not found")                                  \
    X(ERR_CANCELLED, 8, "cancelled")                                  \
    X(ERR_NUMERIC, 9, "a number is not finite")                       \
    X(ERR_DEVICE, 10, "the device failed")                            \
    X(ERR_CALLBACK, 11, "a callback failed")                          \
    X(ERR_INTERNAL, 12, "internal error: please report it")

typedef enum usl_status {
#define X(name, value, text) USL_##name = value,
    USL_STATUS_MAP(X)
#undef X
} usl_status;

/* Returns "USL_ERR_IO" and the like; "USL_UNKNOWN" for a number that is no status. Never NULL, static. */
USL_API const char *usl_status_name(usl_status status);

/* ---- Types of numbers: values up to 63 are ggml's own ------------------------------------------------------------ */

/* clang-format off */
#define USL_DTYPE_MAP(X)                                                                          \
    X(F32, 0, "f32") X(F16, 1, "f16") X(Q4_0, 2, "q4_0") X(Q4_1, 3, "q4_1")                       \
    X(Q5_0, 6, "q5_0") X(Q5_1, 7, "q5_1") X(Q8_0, 8, "q8_0") X(Q8_1, 9, "q8_1")                   \
    X(Q2_K, 10, "q2_k") X(Q3_K, 11, "q3_k") X(Q4_K, 12, "q4_k") X(Q5_K, 13, "q5_k")               \
    X(Q6_K, 14, "q6_k") X(Q8_K, 15, "q8_k") X(IQ2_XXS, 16, "iq2_xxs") X(IQ2_XS, 17, "iq2_xs")     \
    X(IQ3_XXS, 18, "iq3_xxs") X(IQ1_S, 19, "iq1_s") X(IQ4_NL, 20, "iq4_nl") X(IQ3_S, 21, "iq3_s") \
    X(IQ2_S, 22, "iq2_s") X(IQ4_XS, 23, "iq4_xs") X(I8, 24, "i8") X(I16, 25, "i16")               \
    X(I32, 26, "i32") X(I64, 27, "i64") X(F64, 28, "f64") X(IQ1_M, 29, "iq1_m")                   \
    X(BF16, 30, "bf16") X(MXFP4, 39, "mxfp4") X(NF4, 64, "nf4") X(FP4, 65, "fp4")                 \
    X(F8_E4M3, 66, "f8_e4m3") X(F8_E5M2, 67, "f8_e5m2") X(U8, 68, "u8") X(U16, 69, "u16")         \
    X(U32, 70, "u32") X(U64, 71, "u64") X(BOOL, 72, "bool")
/* clang-format on */

typedef enum usl_dtype {
#define X(name, value, text) USL_##name = value,
    USL_DTYPE_MAP(X)
#undef X
        USL_DTYPE_AUTO = -1
} usl_dtype;

/* Returns ggml's name in lower case ("q4_k"), or "?" for a number that is no type. */
USL_API const char *usl_dtype_name(usl_dtype dtype);
/* Finds a type by that name, or by torch's ("float32", "bfloat16", "float16", "int32"); USL_DTYPE_AUTO when unknown. */
USL_API usl_dtype usl_dtype_parse(const char *name);

/* ---- Context ----------------------------------------------------------------------------------------------------- */

typedef struct usl_ctx usl_ctx;
typedef struct usl_tensor usl_tensor;

/* Like realloc; size 0 frees and returns NULL; ptr NULL allocates. Must be safe to call from the library's threads. */
typedef void *(*usl_realloc_fn)(void *ud, void *ptr, size_t size);

typedef enum usl_log_level { USL_LOG_DEBUG, USL_LOG_INFO, USL_LOG_WARN } usl_log_level;
typedef void (*usl_log_fn)(void *ud, usl_log_level level, const char *text);

/* What a long operation has done so far: total 0 means unknown. Return non-zero to cancel it. */
typedef int (*usl_progress_fn)(void *ud, const char *what, uint64_t done, uint64_t total);

/* Asked before the library reads, looks at or lists a path (READ), or makes, replaces or removes it (WRITE). Return
 * non-zero to refuse: the call fails with USL_ERR_IO. The path is as it was given: resolving it is the host's. Of the
 * hub its URL is asked too, before anything is contacted. */
typedef enum usl_access { USL_ACCESS_READ, USL_ACCESS_WRITE } usl_access;
typedef int (*usl_access_fn)(void *ud, const char *path, usl_access access);

typedef struct usl_ctx_opts {
    size_t size;
    usl_realloc_fn realloc_fn; /* NULL: malloc's */
    void *realloc_ud;
    usl_log_fn log_fn; /* NULL: silence */
    void *log_ud;
    usl_progress_fn progress_fn; /* NULL: none */
    void *progress_ud;
    int threads;             /* 0: the processors this process may run on */
    usl_access_fn access_fn; /* NULL: every path is allowed */
    void *access_ud;
} usl_ctx_opts;
#define USL_CTX_OPTS_INIT \
    { sizeof(usl_ctx_opts), NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL, NULL }

/* *out is new: free with usl_ctx_free. opts may be NULL. Fails only for want of memory or threads. */
USL_API usl_status usl_ctx_new(const usl_ctx_opts *opts, usl_ctx **out);
/* Drops the caller's hold: the context goes when its last child has gone. */
USL_API void usl_ctx_free(usl_ctx *ctx);
/* Another hold, with a usl_ctx_free of its own. Returns ctx. Any thread. */
USL_API usl_ctx *usl_ctx_retain(usl_ctx *ctx);
/* Returns the sentence of the last failed call on ctx, "" before any. Valid until the next call. */
USL_API const char *usl_ctx_errmsg(const usl_ctx *ctx);
USL_API usl_status usl_ctx_errcode(const usl_ctx *ctx);
/* Asks the running operation to stop at its next safe point with USL_ERR_CANCELLED. Any thread, also a signal handler.
 */
USL_API void usl_ctx_cancel(usl_ctx *ctx);
/* Answers a request: USL_ERR_CANCELLED once for each, else USL_OK. For a host's own long work. */
USL_API usl_status usl_ctx_safe_point(usl_ctx *ctx);
/* Takes back a request nobody has answered yet. */
USL_API void usl_ctx_uncancel(usl_ctx *ctx);
/* Another progress function from now on; NULL: none. Not while an operation runs. */
USL_API void usl_ctx_set_progress(usl_ctx *ctx, usl_progress_fn fn, void *ud);
USL_API int usl_ctx_threads(const usl_ctx *ctx);
/* Says something through log_fn, as the library does. Returns 0 when there is none. */
USL_API int usl_ctx_log(usl_ctx *ctx, usl_log_level level, const char *text);
/* USL_OK, or what access_fn's refusal of the path makes of a call. */
USL_API usl_status usl_ctx_may(usl_ctx *ctx, const char *path, usl_access access);

/* ---- Tensors: what goes in and out ------------------------------------------------------------------------------- */

/* *out is new: usl_tensor_free. Dense, row-major; contents undefined. ndim 0 to 8; plain types only. */
USL_API usl_status usl_tensor_new(usl_ctx *ctx, usl_dtype dtype, int ndim, const int64_t *shape, usl_tensor **out);
USL_API void usl_tensor_free(usl_tensor *t);
USL_API usl_dtype usl_tensor_dtype(const usl_tensor *t);
USL_API int usl_tensor_ndim(const usl_tensor *t);
USL_API int64_t usl_tensor_dim(const usl_tensor *t, int dim); /* dim from 0 */
USL_API int64_t usl_tensor_elements(const usl_tensor *t);
/* The bytes of a dense tensor; NULL when it is a view with gaps (usl_tensor_to makes it dense). Borrowed. */
USL_API void *usl_tensor_data(usl_tensor *t);
/* *out is new and shares the storage: element `index` (from 0) along dimension 0. */
USL_API usl_status usl_tensor_select(usl_ctx *ctx, usl_tensor *t, int64_t index, usl_tensor **out);
/* *out is new and shares the storage: start .. stop - 1 along dim. */
USL_API usl_status usl_tensor_narrow(usl_ctx *ctx, usl_tensor *t, int dim, int64_t start, int64_t stop,
                                     usl_tensor **out);
/* *out is new and shares the storage: without dim, whose length is 1. */
USL_API usl_status usl_tensor_squeeze(usl_ctx *ctx, usl_tensor *t, int dim, usl_tensor **out);
/* *out is new, dense, of the type wanted (floats and int32/int64 convert into each other). */
USL_API usl_status usl_tensor_to(usl_ctx *ctx, const usl_tensor *t, usl_dtype dtype, usl_tensor **out);

/* Named tensors of a .safetensors file, mapped. Calls fn for each in name order; the tensor is new and fn's to free;
 * fn returns non-zero to stop with USL_ERR_CALLBACK. */
typedef int (*usl_named_tensor_fn)(void *ud, const char *name, usl_tensor *t);
USL_API usl_status usl_safetensors_load(usl_ctx *ctx, const char *path, usl_named_tensor_fn fn, void *ud);
/* meta: key, value, key, value ..., NULL at the end; may be NULL. Written beside and renamed. */
USL_API usl_status usl_safetensors_save(usl_ctx *ctx, const char *path, size_t count, const char *const *names,
                                        usl_tensor *const *tensors, const char *const *meta);

/* Bytes of n values in a type; 0 when n is no multiple of its block. */
USL_API size_t usl_quant_bytes(usl_dtype dtype, int64_t n);
/* Quantises n floats into usl_quant_bytes(dtype, n) bytes. NF4's string is codes, absmax as float32 (no nesting). */
USL_API usl_status usl_quantize(usl_ctx *ctx, usl_dtype dtype, const float *src, int64_t n, void *dst);
USL_API usl_status usl_dequantize(usl_ctx *ctx, usl_dtype dtype, const void *src, size_t bytes, int64_t n, float *dst);

/* ---- JSON ----------------------------------------------------------------------------------------------------------
 */

/* A visitor over a JSON value, in order. A function returns non-zero to stop with USL_ERR_CALLBACK. Strings are UTF-8,
 * not 0-terminated, and may hold NUL. */
typedef struct usl_json_visitor {
    size_t size;
    int (*null)(void *ud);
    int (*boolean)(void *ud, int value);
    int (*integer)(void *ud, int64_t value);
    int (*real)(void *ud, double value);
    int (*string)(void *ud, const char *text, size_t len);
    int (*begin_array)(void *ud);
    int (*end_array)(void *ud);
    int (*begin_object)(void *ud);
    int (*key)(void *ud, const char *text, size_t len);
    int (*end_object)(void *ud);
} usl_json_visitor;
/* name stands in errors. Any value at the top; strict (no NaN, no invalid UTF-8, depth 512). */
USL_API usl_status usl_json_visit(usl_ctx *ctx, const char *name, const char *text, size_t len,
                                  const usl_json_visitor *v, void *ud);

/* ---- Tokenizers
 * -------------------------------------------------------------------------------------------------------- */

typedef struct usl_tokenizer usl_tokenizer;

/* path: a folder with tokenizer.json, such a file itself, or a .gguf. *out is new: usl_tokenizer_free. What a large
 * tokenizer.json came to is kept in the user's cache (XDG_CACHE_HOME, else ~/.cache, below unsloth-lua), unless the
 * context has an access_fn; UNSLOTH_LUA_CACHE names another folder, or none with "0". */
USL_API usl_status usl_tokenizer_open(usl_ctx *ctx, const char *path, usl_tokenizer **out);
USL_API void usl_tokenizer_free(usl_tokenizer *tok);
/* *ids is new: usl_free(ctx, ids). Special spellings in the text become their ids. */
USL_API usl_status usl_tokenizer_encode(usl_ctx *ctx, const usl_tokenizer *tok, const char *text, size_t len,
                                        int add_special, int32_t **ids, size_t *count);
/* Many texts on the context's threads, with the ids that each would have alone: those of text i stand at offsets[i] up
 * to offsets[i + 1] in ids. Both are new. */
USL_API usl_status usl_tokenizer_encode_batch(usl_ctx *ctx, const usl_tokenizer *tok, const char *const *texts,
                                              const size_t *lens, size_t count, int add_special, int32_t **ids,
                                              size_t **offsets);
/* *text is new: usl_free; 0-terminated, len without it. An id outside the vocabulary is an error. */
USL_API usl_status usl_tokenizer_decode(usl_ctx *ctx, const usl_tokenizer *tok, const int32_t *ids, size_t count,
                                        int skip_special, char **text, size_t *len);
/* Ids to text as a generator gives them: whole characters, together what decode gives behind the text of the ids
 * `before` (the prompt's; NULL and 0 at the beginning of a text), save beside broken bytes. *out is new:
 * usl_text_stream_free. A piece is borrowed until the next call, not 0-terminated, often empty; end gives what was held
 * back. */
typedef struct usl_text_stream usl_text_stream;
USL_API usl_status usl_text_stream_new(usl_ctx *ctx, usl_tokenizer *tok, const int32_t *before, size_t count,
                                       int skip_special, usl_text_stream **out);
USL_API void usl_text_stream_free(usl_text_stream *stream);
USL_API usl_status usl_text_stream_push(usl_text_stream *stream, int32_t id, const char **piece, size_t *len);
USL_API usl_status usl_text_stream_end(usl_text_stream *stream, const char **piece, size_t *len);
USL_API int64_t usl_tokenizer_vocab_size(const usl_tokenizer *tok);
/* -1 when there is none. which: "bos", "eos", "pad", "unk". */
USL_API int32_t usl_tokenizer_special(const usl_tokenizer *tok, const char *which);
/* The id of one token's exact spelling; -1 when there is none. */
USL_API int32_t usl_tokenizer_id(const usl_tokenizer *tok, const char *token, size_t len);
/* The spelling of an id, NULL when out of range; borrowed, 0-terminated. */
USL_API const char *usl_tokenizer_token(const usl_tokenizer *tok, int32_t id, size_t *len);
/* The model's own chat template (Jinja), NULL when it has none; borrowed. */
USL_API const char *usl_tokenizer_chat_template(const usl_tokenizer *tok);
/* Another one; what save writes follows. Not while another thread uses the tokenizer. */
USL_API usl_status usl_tokenizer_set_chat_template(usl_ctx *ctx, usl_tokenizer *tok, const char *text);
/* Another token for "bos", "eos", "pad" or "unk"; the same holds. */
USL_API usl_status usl_tokenizer_set_special(usl_ctx *ctx, usl_tokenizer *tok, const char *which, int32_t id);
/* Spellings that become an id wherever they stand in a text, as transformers adds them: new ones get the ids behind the
 * last, one that was added before is left alone; special ones are left out by skip_special. *added (may be NULL): how
 * many were not there. The same holds; a model's rows follow by usl_model_resize_vocab. */
USL_API usl_status usl_tokenizer_add_tokens(usl_ctx *ctx, usl_tokenizer *tok, const char *const *tokens,
                                            const size_t *lens, size_t count, int special, size_t *added);
/* Another spelling for a token, which no other token has; the same holds. */
USL_API usl_status usl_tokenizer_rename(usl_ctx *ctx, usl_tokenizer *tok, int32_t id, const char *text, size_t len);

/* Conversations to text, as transformers' apply_chat_template writes them. All JSON is 0-terminated text. */
typedef struct usl_chat_opts {
    size_t size;
    int add_generation_prompt;  /* end with what begins the assistant's turn */
    int continue_final_message; /* end where the last message does, without the mark of its end */
    const char *tools;          /* JSON array of tools' schemas; NULL: none */
    const char *documents;      /* JSON array; NULL: none */
    const char *chat_template;  /* Jinja text, or the name of one of the tokenizer's templates; NULL: its own */
    const char *variables;      /* JSON object of further variables (enable_thinking, date_string); NULL: none */
} usl_chat_opts;
#define USL_CHAT_OPTS_INIT \
    { sizeof(usl_chat_opts), 0, 0, NULL, NULL, NULL, NULL }
/* messages: a JSON array of { "role": ..., "content": ... }. *text is new: usl_free; 0-terminated, len without it.
 * spans may be NULL; else *spans is new (usl_free): begin and end, in bytes, of each of the *span_count parts of the
 * text that
 * {% generation %} marks as the assistant's; NULL when there are none. What the template's raise_exception says is an
 * error of USL_ERR_INVALID. opts may be NULL. */
USL_API usl_status usl_tokenizer_apply_chat_template(usl_ctx *ctx, const usl_tokenizer *tok, const char *messages,
                                                     const usl_chat_opts *opts, char **text, size_t *len,
                                                     size_t **spans, size_t *span_count);
/* Any chat template with any variables, a JSON object. */
USL_API usl_status usl_chat_template_render(usl_ctx *ctx, const char *source, size_t source_len, const char *variables,
                                            char **text, size_t *len);
/* Writes tokenizer.json and tokenizer_config.json into a folder. */
USL_API usl_status usl_tokenizer_save(usl_ctx *ctx, const usl_tokenizer *tok, const char *dir);

/* Releases memory that a function of this header called new without a _free of its own. */
USL_API void usl_free(usl_ctx *ctx, void *ptr);

/* ---- Data sets
 * ------------------------------------------------------------------------------------------------------------ */

typedef struct usl_dataset usl_dataset;

/* kind: "json" (an array, or JSON lines), "text", "csv". *out is new: usl_dataset_free. */
USL_API usl_status usl_dataset_load(usl_ctx *ctx, const char *kind, const char *const *paths, size_t count,
                                    usl_dataset **out);
USL_API usl_status usl_dataset_new(usl_ctx *ctx, usl_dataset **out);
USL_API void usl_dataset_free(usl_dataset *ds);
/* One JSON object. Only on a data set made by usl_dataset_new and not shared yet. */
USL_API usl_status usl_dataset_append(usl_dataset *ds, const char *json, size_t len);
USL_API int64_t usl_dataset_rows(const usl_dataset *ds);
/* Visits row i (from 0). */
USL_API usl_status usl_dataset_visit(const usl_dataset *ds, int64_t i, const usl_json_visitor *v, void *ud);
/* "FILE: line 12", "FILE: row 3" or "row 3": for messages about a row. Returns buf. */
USL_API const char *usl_dataset_where(const usl_dataset *ds, int64_t i, char *buf, size_t size);
/* *out is new and shares the rows. */
USL_API usl_status usl_dataset_select(const usl_dataset *ds, const int64_t *index, int64_t count, usl_dataset **out);
USL_API usl_status usl_dataset_shuffle(const usl_dataset *ds, uint32_t seed, usl_dataset **out);
/* alpaca, ShareGPT, OpenAI, DPO and KTO rows -> `messages`. */
USL_API usl_status usl_dataset_standardize(const usl_dataset *ds, usl_dataset **out);

/* Tokenised rows, ready to train. */
typedef struct usl_rows usl_rows;
typedef struct usl_rows_stats {
    size_t size;
    int64_t rows, tokens, counted, longest; /* kept rows; counted: labels that count after the shift */
    int64_t truncated, dropped;             /* rows cut to max_length; rows left out since no label counts */
} usl_rows_stats;
/* max_length 0: no limit. *out is new: usl_rows_free. */
USL_API usl_status usl_rows_new(usl_ctx *ctx, int64_t max_length, usl_rows **out);
USL_API void usl_rows_free(usl_rows *rows);
/* labels NULL: every id counts; -100: does not count. Unshifted, as in transformers. */
USL_API usl_status usl_rows_add(usl_rows *rows, const int32_t *ids, const int32_t *labels, size_t count);
USL_API void usl_rows_get_stats(const usl_rows *rows, usl_rows_stats *stats);
/* Borrowed until the next add. */
USL_API usl_status usl_rows_get(const usl_rows *rows, int64_t i, const int32_t **ids, const int32_t **labels,
                                size_t *count);
/* *out is new: the same rows whose labels count only between response and instruction markers
 * (train_on_responses_only). */
USL_API usl_status usl_rows_mask_responses(const usl_rows *rows, const int32_t *instruction, size_t instruction_count,
                                           const int32_t *response, size_t response_count, int last_only,
                                           usl_rows **out);

/* ---- Models
 * ------------------------------------------------------------------------------------------------------------------ */

typedef struct usl_model usl_model;

typedef struct usl_model_opts {
    size_t size;
    const char *device;       /* NULL: the best there is; "cpu", "cuda", "cuda:1" */
    usl_dtype dtype;          /* of computing: USL_DTYPE_AUTO, USL_F32, USL_BF16, USL_F16 */
    int load_in_4bit;         /* quantise 16- and 32-bit linear weights to NF4 with double quantisation */
    int full_finetuning;      /* every weight is trained, held in float32 */
    int64_t max_seq_length;   /* 0: 2048, or the config's limit when that is less; beyond the limit rope is stretched
                                 linearly */
    const char *rope_scaling; /* JSON object that replaces the config's, or NULL */
    int plan_only;            /* for usl_trainer_get_plan alone: no weight is made, read or held, nothing can be run.
                                 "cuda" needs no GPU then, and plans for an H100 where there is none */
} usl_model_opts;
#define USL_MODEL_OPTS_INIT \
    { sizeof(usl_model_opts), NULL, USL_DTYPE_AUTO, 0, 0, 0, NULL, 0 }

/* path: a Hugging Face folder or a .gguf file. *out is new: usl_model_free. */
USL_API usl_status usl_model_open(usl_ctx *ctx, const char *path, const usl_model_opts *opts, usl_model **out);
/* A model of random weights (normal, deviation config.initializer_range) from the text of a config.json. */
USL_API usl_status usl_model_random(usl_ctx *ctx, const char *config_json, uint64_t seed, const usl_model_opts *opts,
                                    usl_model **out);
/* Another model with the frozen weights of base, which are held once and counted: for ctx, which may be base's own or
 * one on another thread, where both work at the same time. Device, types and context length are base's; adapters, and
 * what trainers and generators need, are its own. Not while another thread uses base; base may be freed first. Trained
 * weights (full_finetuning) and layers that are streamed from host memory cannot be shared: USL_ERR_UNSUPPORTED. */
USL_API usl_status usl_model_share(usl_ctx *ctx, usl_model *base, usl_model **out);
USL_API void usl_model_free(usl_model *model);
/* Bytes of memory in use: on a GPU by everybody, as its driver counts them; on the CPU the process's peak, as the
 * operating system counts it. 0 when it cannot be told. */
USL_API uint64_t usl_model_memory(usl_model *model);

typedef struct usl_model_info {
    size_t size;
    const char *architecture, *device; /* "LlamaForCausalLM", "cpu"; live as long as the model */
    usl_dtype dtype;
    int64_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab,
        context;                   /* context: max_seq_length in force */
    int64_t parameters, trainable; /* numbers, adapters included */
    uint64_t weight_bytes;         /* frozen weights as stored, embeddings included */
    int tied;
    int shared; /* other models that hold the same frozen weights now */
} usl_model_info;
USL_API void usl_model_get_info(const usl_model *model, usl_model_info *info);

/* Describes what lies at path without reading a weight: a model folder, a .gguf or a bare .safetensors. The whole
 * structure is checked (offsets, overlaps, holes, sizes, names and shapes against the architecture). Visits one JSON
 * object: { "format", "files", "tensors": [{ "name", "dtype", "shape", "bytes" }], "metadata": {...}, "config": {...}
 * or null }. */
USL_API usl_status usl_inspect(usl_ctx *ctx, const char *path, const usl_json_visitor *v, void *ud);

typedef struct usl_lora_opts {
    size_t size;
    const char *name; /* of the adapter; NULL: "default" */
    int rank;
    double alpha, dropout;
    /* Names separated by commas, or "all-linear"; NULL: all of a decoder block but a mixture's gates. In a mixture
     * gate_proj, up_proj and down_proj are those of the experts, as in PEFT; "mlp.experts.gate_up_proj",
     * "mlp.experts.down_proj" and "gate.weight" are taken too, as in its target_parameters. */
    const char *target_modules;
    const char *layers; /* 0-based indices separated by commas; NULL: all */
    int use_rslora;
    const char *init; /* "default" (A Kaiming uniform, B zero), "gaussian", "random" (both: for tests); "pissa",
                         "pissa_niter_4" (or another number) and "loftq" change the base, which must not be quantised */
    uint64_t seed;
    const char *target_pattern;  /* a regular expression over whole names ("model.layers.0.self_attn.q_proj"), in place
                                    of target_modules; NULL: none */
    const char *exclude_modules; /* names or their ends, separated by commas; NULL: none */
    const char *layers_pattern;  /* the word before a layer's number, with layers only; NULL: any */
    const char *modules_to_save; /* modules trained whole, as float32 copies: "embed_tokens,lm_head"; NULL: none */
    const char *rank_pattern,
        *alpha_pattern;         /* JSON objects, { "pattern over an end of a name": number }; NULL: none */
    const char *bias;           /* "none" (NULL), "all", "lora_only" */
    int use_dora;               /* a magnitude for each row, Liu et al. 2024 */
    int ensure_weight_tying;    /* a tied head follows the trained copy of embed_tokens */
    int loftq_bits, loftq_iter; /* 4 or 8; passes */
} usl_lora_opts;
#define USL_LORA_OPTS_INIT                                                                                         \
    {                                                                                                              \
        sizeof(usl_lora_opts), NULL, 16, 16.0, 0.0, NULL, NULL, 0, NULL, 3407, NULL, NULL, NULL, NULL, NULL, NULL, \
            NULL, 0, 0, 4, 1                                                                                       \
    }
/* Adds an adapter and makes it the active one. */
USL_API usl_status usl_model_add_lora(usl_model *model, const usl_lora_opts *opts);
/* Reads a PEFT folder as adapter `name` (NULL: "default") and makes it active. */
USL_API usl_status usl_model_load_adapter(usl_model *model, const char *dir, const char *name);
/* NULL: none is active, the base answers. */
USL_API usl_status usl_model_set_adapter(usl_model *model, const char *name);
/* The active adapter's name, NULL when none is. */
USL_API const char *usl_model_adapter(const usl_model *model);
/* Writes adapter_config.json and adapter_model.safetensors. base: what to name as base_model_name_or_path, may be NULL.
 */
USL_API usl_status usl_model_save_adapter(usl_model *model, const char *dir, const char *base);
/* What began with "pissa" as plain LoRA of twice the rank, for the base as it was before. */
USL_API usl_status usl_model_save_adapter_as_lora(usl_model *model, const char *dir, const char *base);

/* Another number of rows of the embedding table and the head: new ones are the mean of the first mean_of old ones (0:
 * of all). Not while a trainer or other models use the weights. What is saved has the new size, an adapter's folder
 * both tables, as PEFT writes them. */
USL_API usl_status usl_model_resize_vocab(usl_model *model, int64_t rows, int64_t mean_of);
/* Of a resized model, row := (1 - weight) row + weight (mean of the rows of ids), in both tables. */
USL_API usl_status usl_model_blend_row(usl_model *model, int64_t row, const int32_t *ids, size_t count, double weight);

/* Named parameters, as published: "model.layers.0.self_attn.q_proj.weight", and of the active adapter
 * "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight". i from 0; NULL past the end. Borrowed
 * until the next call. */
USL_API const char *usl_model_param_name(usl_model *model, int64_t i, int *trainable);
/* Of parameter i: how it is held. False past the end. */
typedef struct usl_param_info {
    size_t size;
    int ndim;
    int64_t shape[3];
    usl_dtype dtype; /* as stored: USL_NF4, a block type of GGUF, ... */
    uint64_t bytes;
    int trainable;
} usl_param_info;
USL_API int usl_model_param_info(const usl_model *model, int64_t i, usl_param_info *info);
/* *out is new: a float32 copy (frozen ones decoded). */
USL_API usl_status usl_model_get_param(usl_model *model, const char *name, usl_tensor **out);
/* Trainable ones only. */
USL_API usl_status usl_model_set_param(usl_model *model, const char *name, const usl_tensor *value);

/* Logits of one row, (count, vocabulary) float32. *out is new. */
USL_API usl_status usl_model_logits(usl_model *model, const int32_t *ids, size_t count, usl_tensor **out);

/* A look inside, float32, for one row of ids. *out is new.
 * Hidden states, (layers + 1, count, hidden): what goes into each layer, then what the final norm gives. */
USL_API usl_status usl_model_hidden_states(usl_model *model, const int32_t *ids, size_t count, usl_tensor **out);
/* Of a layer (from 0), (heads, count, count): how much each token looks at each one up to itself. */
USL_API usl_status usl_model_attentions(usl_model *model, const int32_t *ids, size_t count, int64_t layer,
                                        usl_tensor **out);
/* The final norm and the head for hidden states of any layer, (rows, hidden) -> (rows, vocabulary). */
USL_API usl_status usl_model_unembed(usl_model *model, const usl_tensor *states, usl_tensor **out);

typedef struct usl_generate_opts {
    size_t size;
    int64_t max_new_tokens;
    double temperature; /* 0: greedy */
    int top_k;          /* 0: all */
    double top_p, min_p, repetition_penalty;
    uint64_t seed;
    const int32_t *stop_ids; /* replaces the generation config's end-of-text ids when stop_count >= 0 */
    int64_t stop_count;
    /* Called for each new token before it is kept; non-zero ends the row there (the token is kept). */
    int (*on_token)(void *ud, int32_t id);
    void *ud;
    /* Only ids below are drawn: the tokenizer's size, where a model's vocabulary is padded. 0: all of the model's. */
    int64_t vocab;
} usl_generate_opts;
#define USL_GENERATE_OPTS_INIT \
    { sizeof(usl_generate_opts), 128, 0.0, 0, 1.0, 0.0, 1.0, 3407, NULL, -1, NULL, NULL, 0 }
/* *out is new: usl_free. New ids only; an end-of-text id ends the text and is not part of it. */
USL_API usl_status usl_model_generate(usl_model *model, const int32_t *ids, size_t count, const usl_generate_opts *opts,
                                      int32_t **out, size_t *out_count);

/* The same token by token, for hosts that show text as it comes. Everything is copied, the model kept alive. *out is
 * new. */
typedef struct usl_generator usl_generator;
USL_API usl_status usl_generator_new(usl_model *model, const int32_t *ids, size_t count, const usl_generate_opts *opts,
                                     usl_generator **out);
USL_API void usl_generator_free(usl_generator *generator);
/* *id: the next token, -1 when the text has ended. */
USL_API usl_status usl_generator_next(usl_generator *generator, int32_t *id);

/* ---- Training
 * ---------------------------------------------------------------------------------------------------------------------
 */

typedef struct usl_trainer usl_trainer;

typedef struct usl_train_opts {
    size_t size;
    int64_t batch, accumulation; /* rows of a micro-batch, micro-batches of an update */
    double epochs;
    int64_t max_steps;                             /* 0: by epochs */
    double learning_rate, embedding_learning_rate; /* embedding 0: learning_rate */
    const char *schedule;                          /* "linear", "cosine", "constant", "constant_with_warmup" */
    int64_t warmup_steps;
    double warmup_ratio; /* used when warmup_steps is 0 */
    /* Replaces schedule: the rate of update `step` (from 0) of `total`. Runs on the calling thread. */
    double (*lr_fn)(void *ud, int64_t step, int64_t total);
    void *lr_ud;
    double weight_decay, beta1, beta2, epsilon, max_grad_norm; /* max_grad_norm 0: no clipping */
    const char *optimizer;                                     /* "adamw_8bit", "adamw" */
    uint64_t seed;
    int shuffle;
    const char *recompute; /* "auto", "none", "full", "offload": all, with the blocks' inputs in host memory */
    uint64_t memory_limit; /* bytes; 0: what is free */
    int deterministic;     /* 0: attention's gradients on a GPU may differ in the last bits from run to run */
    /* Times the load-balancing loss of each micro-batch, which is added to the loss, as transformers does with
     * output_router_logits; 0: none; negative: what the model's config says. Mixtral, Qwen2-MoE, Qwen3-MoE. */
    double router_aux_loss_coef;
} usl_train_opts;
#define USL_TRAIN_OPTS_INIT                                                                                        \
    {                                                                                                              \
        sizeof(usl_train_opts), 2, 4, 3.0, 0, 2e-4, 0.0, "linear", 0, 0.0, NULL, NULL, 0.0, 0.9, 0.999, 1e-8, 1.0, \
            "adamw_8bit", 3407, 1, "auto", 0, 1, -1.0                                                              \
    }

/* Everything is sized here: the plan is made, memory taken; a plan that cannot fit is refused with the numbers. eval
 * may be NULL. The model, its active adapter and the rows stay in use until usl_trainer_free. *out is new. */
USL_API usl_status usl_trainer_new(usl_model *model, usl_rows *rows, usl_rows *eval, const usl_train_opts *opts,
                                   usl_trainer **out);
USL_API void usl_trainer_free(usl_trainer *trainer);

typedef struct usl_step_stats {
    size_t size;
    int64_t step, total; /* updates done, and to do in all */
    double epoch, loss, learning_rate, grad_norm;
    int64_t tokens, counted, rows, passes;
    double seconds;
    int skipped;  /* the gradient was not finite: weights are as before */
    double flops; /* of matrix products, recomputed ones included */
} usl_step_stats;
/* One update. USL_ERR_NOT_FOUND when all are done; USL_ERR_CANCELLED leaves weights and position as before the update.
 */
USL_API usl_status usl_trainer_step(usl_trainer *trainer, usl_step_stats *stats);
/* Mean loss over the counted labels of the evaluation rows. */
USL_API usl_status usl_trainer_evaluate(usl_trainer *trainer, usl_step_stats *stats);
/* Loss and gradients of rows first .. first + count - 1, no update; then usl_trainer_get_grad. */
USL_API usl_status usl_trainer_gradients(usl_trainer *trainer, int64_t first, int64_t count, usl_step_stats *stats);
/* *out is new: a float32 copy. */
USL_API usl_status usl_trainer_get_grad(usl_trainer *trainer, const char *name, usl_tensor **out);
/* From the next update on, in place of the schedule; negative: the schedule again. */
USL_API void usl_trainer_set_learning_rate(usl_trainer *trainer, double rate);
/* Other rows from the next update on, from their beginning: the memory plan is made anew, weights, optimiser and
 * position stay. On failure the old rows stay too. */
USL_API usl_status usl_trainer_set_rows(usl_trainer *trainer, usl_rows *rows);
/* So many updates count as done: their rows pass by and the schedule goes on; weights and optimiser stay. */
USL_API usl_status usl_trainer_skip(usl_trainer *trainer, int64_t updates);
/* Updates done so far and in all. */
USL_API int64_t usl_trainer_position(const usl_trainer *trainer, int64_t *total);
/* A checkpoint folder: adapter or weights, optimiser, position, plan. extra: any JSON text the host wants back. */
USL_API usl_status usl_trainer_save(usl_trainer *trainer, const char *dir, const char *extra);
/* Continues bit for bit. *extra is new (usl_free), NULL when there was none. */
USL_API usl_status usl_trainer_resume(usl_trainer *trainer, const char *dir, char **extra);

/* The memory plan, item by item in print order. Of a model of plan_only whose smallest plan does not fit it is that
 * one: total is above limit. */
typedef struct usl_plan_item {
    const char *name;
    uint64_t bytes;
} usl_plan_item;
typedef struct usl_plan {
    size_t size;
    usl_plan_item items[16];
    int count;
    uint64_t total, limit;
    int64_t capacity_tokens, capacity_rows; /* of one pass */
    int64_t recomputed_layers, layers;
    int64_t offloaded_inputs; /* 1: what recomputed layers begin with waits in host memory */
    int64_t piece_tokens;     /* so many at a time go through recomputed layers' MLPs; 0: all of the pass */
    int64_t whole_layers;     /* keep also what is cheap to make again */
    int64_t streamed_layers;  /* their weights lie in host memory and come when they are needed */
    uint64_t host_total;      /* bytes of host memory for all that waits there */
} usl_plan;
USL_API void usl_trainer_get_plan(const usl_trainer *trainer, usl_plan *plan);

/* ---- Export
 * -------------------------------------------------------------------------------------------------------------------------
 */

/* How important each feature of each weight's input is, measured on a text: quantising takes more care where it is.
 * *out is new: usl_imatrix_free. */
typedef struct usl_imatrix usl_imatrix;
USL_API usl_status usl_imatrix_new(usl_model *model, const usl_tokenizer *tok, const char *text, size_t len,
                                   usl_imatrix **out);
USL_API void usl_imatrix_free(usl_imatrix *imatrix);

typedef struct usl_export_opts {
    size_t size;
    int verify;      /* read back what was written and compare it, before it gets its name: weights, tokens, template,
                        logits; what is worse than the format explains is an error, and nothing stands under the name */
    usl_model *base; /* merge onto this model's weights (the 16-bit ones of a model in 4 bits); NULL: the model's own */
    const usl_imatrix *imatrix; /* for quantised .gguf; NULL: none */
} usl_export_opts;
#define USL_EXPORT_OPTS_INIT \
    { sizeof(usl_export_opts), 1, NULL, NULL }

/* Root mean squares, relative. */
typedef struct usl_export_report {
    size_t size;
    uint64_t bytes;  /* of tensors */
    int checked;     /* the differences below are known */
    double weights;  /* of the exported weights from those of the live model with its adapter */
    double logits;   /* of the logits of a few prompts from the live model's */
    double expected; /* the most that the weights' difference and the model's arithmetic explain */
    int merged_onto; /* what the adapter was merged onto; 0: there was none, 1: float weights, 2: decoded blocks */
} usl_export_report;

/* Merges the active adapter into the weights, tensor by tensor. dtype USL_F32, USL_BF16 or USL_F16, or USL_NF4 for
 * bitsandbytes' layout with bfloat16 beside. tok, opts and report may be NULL. */
USL_API usl_status usl_export_folder(usl_model *model, const usl_tokenizer *tok, const char *dir, usl_dtype dtype,
                                     const usl_export_opts *opts, usl_export_report *report);
/* `count` .gguf files in one pass over the weights; merged like the above. methods: "f32", "f16", "bf16", "q8_0",
 * "q4_k_m" and llama.cpp's others, or Unsloth's names for them. On a GPU's model the GPU quantises, to the same bytes.
 * reports: (count) or NULL. */
USL_API usl_status usl_export_ggufs(usl_model *model, const usl_tokenizer *tok, int count, const char *const *paths,
                                    const char *const *methods, const usl_export_opts *opts,
                                    usl_export_report *reports);
/* The same with what is usual: one folder, one file. */
USL_API usl_status usl_export_merged(usl_model *model, const usl_tokenizer *tok, const char *dir, usl_dtype dtype);
USL_API usl_status usl_export_gguf(usl_model *model, const usl_tokenizer *tok, const char *path, const char *method);
/* The active adapter alone as a .gguf, which llama.cpp puts on a model's. */
USL_API usl_status usl_export_lora(usl_model *model, const char *path);
/* The method that a name stands for ("q4_k" -> "q4_k_m"), static; NULL when there is none. */
USL_API const char *usl_export_method(const char *name);

/* ---- Machine
 * ---------------------------------------------------------------------------------------------------------------------------
 */

/* Peak bytes of this process in memory, from the operating system. */
USL_API uint64_t usl_peak_memory(void);
/* Seconds of a clock that only goes forward. */
USL_API double usl_clock(void);
/* What this machine does in matrix products of the model's widths and type, alone: floating-point operations a second,
 * the best of several. For benchmarks. */
USL_API usl_status usl_model_gemm_rate(usl_model *model, double *flops);
/* Greedy continuation of `rows` prompts of `prompt` random tokens by new_tokens each, past any end of text: the time
 * to the first token of all rows, and of a step after it (the median). new_tokens is 2 or more. copy_rate: bytes read
 * and written a second by copies within the device's memory, the best of several. */
typedef struct usl_decode_rate {
    double first_seconds, step_seconds;
    uint64_t step_bytes; /* of weights and adapters, read by each step */
    double copy_rate;
} usl_decode_rate;
USL_API usl_status usl_model_decode_rate(usl_model *model, int rows, int64_t prompt, int64_t new_tokens,
                                         usl_decode_rate *out);

/* ---- The hub ------------------------------------------------------------------------------------------------------
 */

/* The Hugging Face hub, and its cache as huggingface_hub keeps it. The environment says where: HF_HOME, HF_HUB_CACHE,
 * XDG_CACHE_HOME, HF_ENDPOINT, HF_TOKEN (else the token file), HF_HUB_OFFLINE. */
typedef struct usl_hub_opts {
    size_t size;
    const char *revision; /* a branch, a tag or a commit; NULL: "main" */
    const char *token;    /* NULL: the environment's; "": none */
    int local_files_only; /* never contacts anybody */
    int refresh;          /* asks what the revision is now, also when the cache knows it */
    int tokenizer_only;   /* no weights */
    int is_private;       /* a repository that an upload makes */
    const char *message;  /* of an upload's commit; NULL: "Upload with unsloth-lua" */
} usl_hub_opts;
#define USL_HUB_OPTS_INIT \
    { sizeof(usl_hub_opts), NULL, NULL, 0, 0, 0, 0, NULL }

/* 1 when a name can be a repository's: "org/name", or "org/name:file.gguf" for one file of it; a name that is no path
 * here may be looked for there. */
USL_API int usl_hub_is_name(const char *name);
/* *path is new (usl_free): a folder that holds the model, or a .gguf. What the cache holds whole is taken without the
 * network; else the files that a model needs (no .bin, no second format) are downloaded, several at a time: parts go on
 * where they were cut, sizes and checksums are proved. */
USL_API usl_status usl_hub_get(usl_ctx *ctx, const char *name, const usl_hub_opts *opts, char **path);
/* As usl_hub_get for usl_inspect alone: what there is to know, without the weights. dir is a folder that is there, and
 * becomes the model's: small files are whole, files of weights have their size and their header (read by a request for
 * a part of them) and take no room beyond that. *path is dir, or a .gguf in it. */
USL_API usl_status usl_hub_outline(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts,
                                   char **path);
/* Uploads all files of a folder as one commit; makes the repository when there is none. A token is needed. */
USL_API usl_status usl_hub_push(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts);

/* What scripts need of the file system, since C and Lua have no word for folders. */
typedef enum usl_path_kind { USL_PATH_NONE, USL_PATH_FILE, USL_PATH_DIR } usl_path_kind;
/* Asks no access_fn, since it has no context: usl_ctx_may does. */
USL_API usl_path_kind usl_path_look(const char *path);
/* Calls fn with each name in a folder, sorted; fn returns non-zero to stop with USL_ERR_CALLBACK. */
USL_API usl_status usl_dir_list(usl_ctx *ctx, const char *path, int (*fn)(void *ud, const char *name), void *ud);
/* With its parents; fine when it is there. */
USL_API usl_status usl_dir_make(usl_ctx *ctx, const char *path);
/* Removes a file, or a folder with all in it; fine when nothing is there. */
USL_API usl_status usl_path_remove(usl_ctx *ctx, const char *path);
/* stream: 0, 1 or 2. */
USL_API int usl_is_terminal(int stream);

#ifdef __cplusplus
}
#endif

#endif
