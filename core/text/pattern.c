#define PCRE2_CODE_UNIT_WIDTH 8
#include "core/text/pattern.h"

#include <pcre2.h>

struct usli_pattern {
    usl_ctx *ctx;
    pcre2_general_context *memory;
    pcre2_code *code;
};

static void *take(PCRE2_SIZE size, void *ctx) {
    return usli_malloc(ctx, size);
}

static void give(void *ptr, void *ctx) {
    usli_free(ctx, ptr);
}

void usli_pattern_free(usli_pattern *p) {
    if (!p) return;
    pcre2_code_free(p->code);
    pcre2_general_context_free(p->memory);
    usli_free(p->ctx, p);
}

usl_status usli_pattern_new(usl_ctx *ctx, const char *what, const char *text, usli_pattern **out) {
    usli_pattern *p = usli_calloc(ctx, 1, sizeof *p);
    pcre2_compile_context *how = NULL;
    int error = 0;
    PCRE2_SIZE at;
    *out = NULL;
    if (!p) return usli_nomem(ctx, sizeof *p);
    p->ctx = ctx;
    if ((p->memory = pcre2_general_context_create(take, give, ctx))) how = pcre2_compile_context_create(p->memory);
    if (how)
        p->code = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED, PCRE2_ANCHORED | PCRE2_ENDANCHORED, &error,
                                &at, how);
    pcre2_compile_context_free(how);
    if (p->code) {
        *out = p;
        return USL_OK;
    }
    bool dry = !how || error == PCRE2_ERROR_HEAP_FAILED;
    usli_pattern_free(p);
    if (dry) return usli_nomem(ctx, sizeof *p);
    char why[128] = "";
    pcre2_get_error_message(error, (PCRE2_UCHAR *)why, sizeof why);
    return usli_fail(ctx, USL_ERR_INVALID, "%s: \"%s\" is no regular expression: %s", what, text, why);
}

usl_status usli_pattern_matches(const usli_pattern *p, const char *name, bool *out) {
    pcre2_match_data *data = pcre2_match_data_create(1, p->memory);
    *out = false;
    if (!data) return usli_nomem(p->ctx, 64);
    int found = pcre2_match(p->code, (PCRE2_SPTR)name, PCRE2_ZERO_TERMINATED, 0, 0, data, NULL);
    pcre2_match_data_free(data);
    *out = found >= 0;
    return found == PCRE2_ERROR_NOMEMORY ? usli_nomem(p->ctx, 64) : USL_OK;
}
