/* The hub for hosts and for the Lua modules. */
#include "core/io/hub.h"

#include "core/api/need.h"

int usl_hub_is_name(const char *name) {
    return name && usli_hub_is_name(name);
}

usl_status usl_hub_get(usl_ctx *ctx, const char *name, const usl_hub_opts *opts, char **path) {
    *path = NULL;
    USLI_NEED(ctx, name);
    return usli_hub_get(ctx, name, opts, path);
}

usl_status usl_hub_outline(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts, char **path) {
    *path = NULL;
    USLI_NEED(ctx, name);
    USLI_NEED_PATH(ctx, dir, USL_ACCESS_WRITE);
    return usli_hub_outline(ctx, name, dir, opts, path);
}

usl_status usl_hub_push(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts) {
    USLI_NEED(ctx, name);
    USLI_NEED_PATH(ctx, dir, USL_ACCESS_READ);
    return usli_hub_push(ctx, name, dir, opts);
}
