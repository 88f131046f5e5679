/* unsloth.h: fine-tune large language models from C.
 *
 * Simple use, in order: usl_ctx_new, usl_model_open, usl_model_add_lora, usl_rows_add, usl_trainer_new,
 * usl_trainer_step, usl_model_generate, usl_export_*. Everything that ends in _new or _open gives a new handle that the
 * function ending in _free releases; _free accepts NULL; children keep their parents alive, so any order is safe.
 *
 * Every function that can fail returns a usl_status; usl_ctx_errmsg(ctx) then holds one sentence that names the thing
 * and the remedy. The library never exits, prints or aborts. One context is used by one thread at a time (several
 * contexts may live on several threads); callbacks run on the calling thread; usl_ctx_cancel may be called from anywhere.
 *
 * Option structs carry their size first: write `usl_model_opts o = USL_MODEL_OPTS_INIT;` and change what you need.
 * Sizes are bytes, token ids are 0-based int32. */
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

/* ---- Status ------------------------------------------------------------------------------------------------------ */

#define USL_STATUS_MAP(X)                                                 \
    X(OK, 0, "success")                                                   \
    X(ERR_INVALID, 1, "an argument or option is not valid")               \
    X(ERR_NOMEM, 2, "out of memory")                                      \
    X(ERR_IO, 3, "a file could not be read or written")                   \
    X(ERR_FORMAT, 4, "a file does not hold what its format promises")     \
    X(ERR_SHAPE, 5, "shapes do not match")                                \
    X(ERR_UNSUPPORTED, 6, "not supported here")                           \
    X(ERR_NOT_FOUND, 7, "not found")                                      \
    X(ERR_CANCELLED, 8, "cancelled")                                      \
    X(ERR_NUMERIC, 9, "a number is not finite")                           \
    X(ERR_DEVICE, 10, "the device failed")                                \
    X(ERR_CALLBACK, 11, "a callback failed")                              \
    X(ERR_INTERNAL, 12, "internal error: please report it")

typedef enum usl_status {
#define X(name, value, text) USL_##name = value,
    USL_STATUS_MAP(X)
#undef X
} usl_status;

/* Returns "USL_ERR_IO" and the like; "USL_UNKNOWN" for a number that is no status. Never NULL, static. */
USL_API const char *usl_status_name(usl_status status);

/* ---- Types of numbers: values up to 63 are ggml's own ------------------------------------------------------------ */

#define USL_DTYPE_MAP(X)                                                                                  \
    X(F32, 0, "f32") X(F16, 1, "f16") X(Q4_0, 2, "q4_0") X(Q4_1, 3, "q4_1") X(Q5_0, 6, "q5_0")            \
    X(Q5_1, 7, "q5_1") X(Q8_0, 8, "q8_0") X(Q8_1, 9, "q8_1") X(Q2_K, 10, "q2_k") X(Q3_K, 11, "q3_k")      \
    X(Q4_K, 12, "q4_k") X(Q5_K, 13, "q5_k") X(Q6_K, 14, "q6_k") X(Q8_K, 15, "q8_k")                       \
    X(IQ2_XXS, 16, "iq2_xxs") X(IQ2_XS, 17, "iq2_xs") X(IQ3_XXS, 18, "iq3_xxs") X(IQ1_S, 19, "iq1_s")     \
    X(IQ4_NL, 20, "iq4_nl") X(IQ3_S, 21, "iq3_s") X(IQ2_S, 22, "iq2_s") X(IQ4_XS, 23, "iq4_xs")           \
    X(I8, 24, "i8") X(I16, 25, "i16") X(I32, 26, "i32") X(I64, 27, "i64") X(F64, 28, "f64")               \
    X(IQ1_M, 29, "iq1_m") X(BF16, 30, "bf16") X(MXFP4, 39, "mxfp4")                                       \
    X(NF4, 64, "nf4") X(FP4, 65, "fp4") X(F8_E4M3, 66, "f8_e4m3") X(F8_E5M2, 67, "f8_e5m2")               \
    X(U8, 68, "u8") X(U16, 69, "u16") X(U32, 70, "u32") X(U64, 71, "u64") X(BOOL, 72, "bool")

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

typedef struct usl_ctx_opts {
    size_t size;
    usl_realloc_fn realloc_fn; /* NULL: malloc's */
    void *realloc_ud;
    usl_log_fn log_fn; /* NULL: silence */
    void *log_ud;
    usl_progress_fn progress_fn; /* NULL: none */
    void *progress_ud;
    int threads; /* 0: the processors this process may run on */
} usl_ctx_opts;
#define USL_CTX_OPTS_INIT { sizeof(usl_ctx_opts), NULL, NULL, NULL, NULL, NULL, NULL, 0 }

/* *out is new: free with usl_ctx_free. opts may be NULL. Fails only for want of memory or threads. */
USL_API usl_status usl_ctx_new(const usl_ctx_opts *opts, usl_ctx **out);
/* Drops the caller's hold: the context goes when its last child has gone. */
USL_API void usl_ctx_free(usl_ctx *ctx);
/* Returns the sentence of the last failed call on ctx, "" before any. Valid until the next call. */
USL_API const char *usl_ctx_errmsg(const usl_ctx *ctx);
USL_API usl_status usl_ctx_errcode(const usl_ctx *ctx);
/* Asks the running operation to stop at its next safe point with USL_ERR_CANCELLED. Any thread, also a signal handler. */
USL_API void usl_ctx_cancel(usl_ctx *ctx);
/* Takes back a request nobody has answered yet. */
USL_API void usl_ctx_uncancel(usl_ctx *ctx);
USL_API int usl_ctx_threads(const usl_ctx *ctx);

#ifdef __cplusplus
}
#endif

#endif
