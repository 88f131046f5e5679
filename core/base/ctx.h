/* The context: allocator, error sentence, log, threads. Every floor receives one; nothing in the library is global. */
#ifndef USLI_BASE_CTX_H
#define USLI_BASE_CTX_H

#include <stdarg.h>
#ifdef __cplusplus
#include <atomic>
using std::atomic_int;
#else
#include <stdatomic.h>
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/unsloth.h"

typedef struct usli_pool usli_pool;

struct usl_ctx {
    usl_realloc_fn realloc_fn;
    void *realloc_ud;
    usl_log_fn log_fn;
    void *log_ud;
    usl_progress_fn progress_fn;
    void *progress_ud;
    usl_access_fn access_fn;
    void *access_ud;
    usli_pool *pool;
    atomic_int refs;
    atomic_int cancelled;
    usl_status errcode;
    char errmsg[1024];
};

/* Sets the error sentence and returns code. The text names the thing and the remedy, without a final full stop. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
usl_status
usli_fail(usl_ctx *ctx, usl_status code, const char *fmt, ...);
/* Puts "prefix: " before the sentence that is already there; returns its code. For adding the file to a parser's error.
 */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
usl_status
usli_fail_prefix(usl_ctx *ctx, const char *fmt, ...);
usl_status usli_nomem(usl_ctx *ctx, size_t bytes);

/* Forwards a failure to the caller. */
#define USLI_TRY(expr)                             \
    do {                                           \
        usl_status usli_try_ = (expr);             \
        if (usli_try_ != USL_OK) return usli_try_; \
    } while (0)
/* Forwards a failure through the function's `done:` label, where it cleans up; needs `usl_status st`. */
#define USLI_TRYGO(expr)                        \
    do {                                        \
        if ((st = (expr)) != USL_OK) goto done; \
    } while (0)

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
void usli_log(usl_ctx *ctx, usl_log_level level, const char *fmt, ...);

/* USL_OK, or USL_ERR_CANCELLED (and the request is taken back) when somebody asked to stop. */
usl_status usli_checkpoint(usl_ctx *ctx);
/* Tells the host how far a long operation is; USL_ERR_CANCELLED when it or anybody asked to stop. */
usl_status usli_progress(usl_ctx *ctx, const char *what, uint64_t done, uint64_t total);

/* USL_OK, or USL_ERR_IO when the host refuses the path. Before every call of the system that takes one. */
usl_status usli_may(usl_ctx *ctx, const char *path, usl_access access);

/* Memory. NULL when there is none: the caller answers usli_nomem. Aligned for any scalar. */
void *usli_malloc(usl_ctx *ctx, size_t size);
void *usli_calloc(usl_ctx *ctx, size_t count, size_t size); /* NULL too when count * size overflows */
void *usli_realloc(usl_ctx *ctx, void *ptr, size_t size);   /* size > 0; the old block stays when it fails */
void usli_free(usl_ctx *ctx, void *ptr);                    /* NULL is fine */
char *usli_strdup(usl_ctx *ctx, const char *text);
char *usli_strndup(usl_ctx *ctx, const char *text, size_t len);
/* 64-byte aligned, for tensors; freed by usli_free_aligned only. */
void *usli_malloc_aligned(usl_ctx *ctx, size_t size);
void usli_free_aligned(usl_ctx *ctx, void *ptr);

void usli_ctx_retain(usl_ctx *ctx);

/* Grows an array so that it holds at least `need` elements; doubles. *items and *cap are updated. */
usl_status usli_grow(usl_ctx *ctx, void *items_ptr, size_t *cap, size_t need, size_t elem_size);

#endif
