/* What the header says about the machine and memory: forwards to core/base. */
#include "core/api/need.h"
#include "core/base/ctx.h"
#include "core/base/file.h"

int usl_abi_version(void) {
    return USL_ABI_VERSION;
}

const char *usl_version(void) {
    return USL_VERSION;
}

usl_ctx *usl_ctx_retain(usl_ctx *ctx) {
    if (ctx) usli_ctx_retain(ctx);
    return ctx;
}

usl_status usl_ctx_safe_point(usl_ctx *ctx) {
    return usli_checkpoint(ctx);
}

int usl_ctx_log(usl_ctx *ctx, usl_log_level level, const char *text) {
    if (!ctx->log_fn) return 0;
    ctx->log_fn(ctx->log_ud, level, text);
    return 1;
}

usl_status usl_ctx_may(usl_ctx *ctx, const char *path, usl_access access) {
    USLI_NEED_PATH(ctx, path, access);
    return USL_OK;
}

void usl_free(usl_ctx *ctx, void *ptr) {
    usli_free(ctx, ptr);
}

uint64_t usl_peak_memory(void) {
    return usli_process_peak_bytes();
}

double usl_clock(void) {
    return usli_now();
}

usl_path_kind usl_path_look(const char *path) {
    return usli_is_dir(path) ? USL_PATH_DIR : usli_is_file(path) ? USL_PATH_FILE : USL_PATH_NONE;
}

usl_status usl_dir_list(usl_ctx *ctx, const char *path, int (*fn)(void *ud, const char *name), void *ud) {
    USLI_NEED(ctx, path);
    char **names;
    size_t count;
    USLI_TRY(usli_list_dir(ctx, path, &names, &count));
    usl_status st = USL_OK;
    for (size_t i = 0; i < count && st == USL_OK; i++)
        if (fn(ud, names[i])) st = usli_fail(ctx, USL_ERR_CALLBACK, "%s: the caller stopped at %s", path, names[i]);
    usli_free_names(ctx, names, count);
    return st;
}

usl_status usl_dir_make(usl_ctx *ctx, const char *path) {
    USLI_NEED(ctx, path);
    return usli_make_dirs(ctx, path);
}

usl_status usl_path_remove(usl_ctx *ctx, const char *path) {
    USLI_NEED(ctx, path);
    return usli_remove_tree(ctx, path);
}

int usl_is_terminal(int stream) {
    return usli_is_terminal(stream);
}
