#include "core/base/ctx.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/pool.h"

static void *default_realloc(void *ud, void *ptr, size_t size) {
    (void)ud;
    if (size == 0) {
        free(ptr);
        return NULL;
    }
    return realloc(ptr, size);
}

usl_status usl_ctx_new(const usl_ctx_opts *opts, usl_ctx **out) {
    usl_ctx_opts o = USL_CTX_OPTS_INIT;
    if (opts) memcpy(&o, opts, opts->size < sizeof o ? opts->size : sizeof o);
    *out = NULL;
    if (!o.realloc_fn) o.realloc_fn = default_realloc;
    usl_ctx *ctx = o.realloc_fn(o.realloc_ud, NULL, sizeof *ctx);
    if (!ctx) return USL_ERR_NOMEM;
    memset(ctx, 0, sizeof *ctx);
    ctx->realloc_fn = o.realloc_fn;
    ctx->realloc_ud = o.realloc_ud;
    ctx->log_fn = o.log_fn;
    ctx->log_ud = o.log_ud;
    ctx->progress_fn = o.progress_fn;
    ctx->progress_ud = o.progress_ud;
    ctx->access_fn = o.access_fn;
    ctx->access_ud = o.access_ud;
    atomic_init(&ctx->refs, 1);
    atomic_init(&ctx->cancelled, 0);
    usl_status st = usli_pool_new(ctx, o.threads, &ctx->pool);
    if (st != USL_OK) {
        o.realloc_fn(o.realloc_ud, ctx, 0);
        return st;
    }
    *out = ctx;
    return USL_OK;
}

void usli_ctx_retain(usl_ctx *ctx) {
    atomic_fetch_add(&ctx->refs, 1);
}

void usl_ctx_free(usl_ctx *ctx) {
    if (!ctx || atomic_fetch_sub(&ctx->refs, 1) != 1) return;
    usli_pool_free(ctx->pool);
    ctx->realloc_fn(ctx->realloc_ud, ctx, 0);
}

const char *usl_ctx_errmsg(const usl_ctx *ctx) {
    return ctx->errmsg;
}

usl_status usl_ctx_errcode(const usl_ctx *ctx) {
    return ctx->errcode;
}

void usl_ctx_cancel(usl_ctx *ctx) {
    atomic_store(&ctx->cancelled, 1);
}

void usl_ctx_uncancel(usl_ctx *ctx) {
    atomic_store(&ctx->cancelled, 0);
}

int usl_ctx_threads(const usl_ctx *ctx) {
    return usli_pool_threads(ctx->pool);
}

const char *usl_status_name(usl_status status) {
    switch (status) {
#define X(name, value, text) \
    case value: return "USL_" #name;
        USL_STATUS_MAP(X)
#undef X
    }
    return "USL_UNKNOWN";
}

usl_status usli_fail(usl_ctx *ctx, usl_status code, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    /* A sentence may quote the one before it, so it is built aside. */
    char text[sizeof ctx->errmsg];
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    memcpy(ctx->errmsg, text, sizeof text);
    ctx->errcode = code;
    return code;
}

usl_status usli_fail_prefix(usl_ctx *ctx, const char *fmt, ...) {
    char prefix[256], text[sizeof ctx->errmsg];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(prefix, sizeof prefix, fmt, ap);
    va_end(ap);
    memcpy(text, ctx->errmsg, sizeof text);
    return usli_fail(ctx, ctx->errcode, "%s: %s", prefix, text);
}

usl_status usli_nomem(usl_ctx *ctx, size_t bytes) {
    return usli_fail(ctx, USL_ERR_NOMEM,
                     "out of memory: %zu bytes could not be had; close other programs or use a smaller "
                     "batch, sequence length or model",
                     bytes);
}

void usli_log(usl_ctx *ctx, usl_log_level level, const char *fmt, ...) {
    if (!ctx->log_fn) return;
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    ctx->log_fn(ctx->log_ud, level, text);
}

usl_status usli_checkpoint(usl_ctx *ctx) {
    if (!atomic_load_explicit(&ctx->cancelled, memory_order_relaxed)) return USL_OK;
    atomic_store(&ctx->cancelled, 0);
    return usli_fail(ctx, USL_ERR_CANCELLED, "cancelled");
}

void usl_ctx_set_progress(usl_ctx *ctx, usl_progress_fn fn, void *ud) {
    ctx->progress_fn = fn;
    ctx->progress_ud = ud;
}

usl_status usli_progress(usl_ctx *ctx, const char *what, uint64_t done, uint64_t total) {
    if (ctx->progress_fn && ctx->progress_fn(ctx->progress_ud, what, done, total))
        return usli_fail(ctx, USL_ERR_CANCELLED, "%s: cancelled", what);
    return usli_checkpoint(ctx);
}

usl_status usli_may(usl_ctx *ctx, const char *path, usl_access access) {
    if (!ctx->access_fn || !ctx->access_fn(ctx->access_ud, path, access)) return USL_OK;
    return usli_fail(ctx, USL_ERR_IO, "%s: the host program does not allow it to be %s; choose a path that it allows",
                     path, access == USL_ACCESS_READ ? "read" : "written");
}

void *usli_malloc(usl_ctx *ctx, size_t size) {
    return ctx->realloc_fn(ctx->realloc_ud, NULL, size ? size : 1);
}

void *usli_calloc(usl_ctx *ctx, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return NULL;
    void *ptr = usli_malloc(ctx, count * size);
    if (ptr) memset(ptr, 0, count * size);
    return ptr;
}

void *usli_realloc(usl_ctx *ctx, void *ptr, size_t size) {
    return ctx->realloc_fn(ctx->realloc_ud, ptr, size ? size : 1);
}

void usli_free(usl_ctx *ctx, void *ptr) {
    if (ptr) ctx->realloc_fn(ctx->realloc_ud, ptr, 0);
}

char *usli_strndup(usl_ctx *ctx, const char *text, size_t len) {
    char *copy = usli_malloc(ctx, len + 1);
    if (!copy) return NULL;
    memcpy(copy, text, len);
    copy[len] = 0;
    return copy;
}

char *usli_strdup(usl_ctx *ctx, const char *text) {
    return usli_strndup(ctx, text, strlen(text));
}

/* [ raw ... | raw pointer | 64-byte aligned data ]: the pointer just below the data finds the block again. */
void *usli_malloc_aligned(usl_ctx *ctx, size_t size) {
    if (size > SIZE_MAX - 64 - sizeof(void *)) return NULL;
    char *raw = usli_malloc(ctx, size + 64 + sizeof(void *));
    if (!raw) return NULL;
    char *data = (char *)(((uintptr_t)raw + sizeof(void *) + 63) & ~(uintptr_t)63);
    memcpy(data - sizeof(void *), &raw, sizeof raw);
    return data;
}

void usli_free_aligned(usl_ctx *ctx, void *ptr) {
    if (!ptr) return;
    void *raw;
    memcpy(&raw, (char *)ptr - sizeof raw, sizeof raw);
    usli_free(ctx, raw);
}

usl_status usli_grow(usl_ctx *ctx, void *items_ptr, size_t *cap, size_t need, size_t elem_size) {
    if (need <= *cap) return USL_OK;
    size_t n = *cap ? *cap : 16;
    while (n < need) {
        if (n > SIZE_MAX / 2 / elem_size) return usli_nomem(ctx, SIZE_MAX);
        n *= 2;
    }
    void *old;
    memcpy(&old, items_ptr, sizeof old);
    void *grown = usli_realloc(ctx, old, n * elem_size);
    if (!grown) return usli_nomem(ctx, n * elem_size);
    memcpy(items_ptr, &grown, sizeof grown);
    *cap = n;
    return USL_OK;
}
