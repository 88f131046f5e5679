/* The hub for hosts and for the Lua modules. */
#include "core/io/hub.h"

#include "core/api/need.h"
#include "core/io/json.h"
#include "core/model/config.h"

int usl_hub_is_name(const char *name) {
    return name && usli_hub_is_name(name);
}

/* An adapter's base is judged by itself. */
static usl_status judge(usl_ctx *ctx, const char *name, const char *path) {
    json_t *json;
    usli_config config = { 0 };
    USLI_TRY(usli_json_load(ctx, path, &json));
    usl_status st = usli_config_from_json(ctx, name, json, NULL, &config);
    json_decref(json);
    usli_config_free(&config);
    return st;
}

usl_status usl_hub_get(usl_ctx *ctx, const char *name, const usl_hub_opts *opts, char **path) {
    *path = NULL;
    USLI_NEED(ctx, name);
    return usli_hub_get(ctx, name, opts, judge, path);
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
