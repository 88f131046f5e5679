/* Exports behind unsloth.h. */
#include <string.h>

#include "core/api/need.h"
#include "core/export/export.h"

static void fill(usl_export_opts *o, const usl_export_opts *given) {
    *o = (usl_export_opts)USL_EXPORT_OPTS_INIT;
    if (given) memcpy(o, given, given->size < sizeof *o ? given->size : sizeof *o);
}

/* A caller's report may be older and shorter than ours. */
static void hand_over(usl_export_report *to, const usl_export_report *from) {
    size_t size = to->size < sizeof *from ? to->size : sizeof *from;
    if (size > sizeof to->size)
        memcpy((char *)to + sizeof to->size, (const char *)from + sizeof to->size, size - sizeof to->size);
}

usl_status usl_export_folder(usl_model *model, const usl_tokenizer *tok, const char *dir, usl_dtype dtype,
                             const usl_export_opts *given, usl_export_report *report) {
    usl_export_opts opts;
    usli_export_source source;
    usl_export_report own = { .size = sizeof own };
    USLI_NEED_PATH(model->ctx, dir, USL_ACCESS_WRITE);
    fill(&opts, given);
    USLI_TRY(usli_export_source_of(model, &opts, &source));
    own.merged_onto = usli_export_onto(&source);
    usl_status st = usli_export_merged(&source, tok, dir, dtype, opts.verify, &own);
    if (st == USL_OK && report) hand_over(report, &own);
    return st;
}

usl_status usl_export_ggufs(usl_model *model, const usl_tokenizer *tok, int count, const char *const *paths,
                            const char *const *methods, const usl_export_opts *given, usl_export_report *reports) {
    usl_ctx *ctx = model->ctx;
    usl_export_opts opts;
    usli_export_source source;
    fill(&opts, given);
    if (count < 1 || !paths || !methods)
        return usli_fail(ctx, USL_ERR_INVALID, "no quantization_method is given; give one");
    usli_gguf_target *targets = usli_calloc(ctx, (size_t)count, sizeof *targets);
    usl_export_report *own = usli_calloc(ctx, (size_t)count, sizeof *own);
    usl_status st = targets && own ? USL_OK : usli_nomem(ctx, (size_t)count * sizeof *own);
    for (int i = 0; i < count && st == USL_OK; i++) {
        if (!paths[i] || !methods[i]) {
            st = usli_fail(ctx, USL_ERR_INVALID, "%s is NULL; give one", paths[i] ? "method" : "path");
            continue;
        }
        if ((st = usli_may(ctx, paths[i], USL_ACCESS_WRITE)) != USL_OK) continue;
        targets[i] = (usli_gguf_target){ paths[i], usli_method_find(methods[i]) };
        if (targets[i].method) continue;
        char known[1024];
        usli_method_list(known, sizeof known);
        st = usli_fail(ctx, USL_ERR_UNSUPPORTED, "quantization_method \"%s\" is not supported; use one of %s",
                       methods[i], known);
    }
    if (st == USL_OK) st = usli_export_source_of(model, &opts, &source);
    if (st == USL_OK) st = usli_export_gguf(&source, tok, targets, count, opts.verify, own);
    for (int i = 0; st == USL_OK && reports && i < count; i++) {
        own[i].merged_onto = usli_export_onto(&source);
        hand_over(&reports[i], &own[i]);
    }
    usli_free(ctx, targets);
    usli_free(ctx, own);
    return st;
}

usl_status usl_export_merged(usl_model *model, const usl_tokenizer *tok, const char *dir, usl_dtype dtype) {
    return usl_export_folder(model, tok, dir, dtype, NULL, NULL);
}

usl_status usl_export_gguf(usl_model *model, const usl_tokenizer *tok, const char *path, const char *method) {
    USLI_NEED_PATH(model->ctx, path, USL_ACCESS_WRITE);
    USLI_NEED(model->ctx, method);
    return usl_export_ggufs(model, tok, 1, &path, &method, NULL, NULL);
}

usl_status usl_export_lora(usl_model *model, const char *path) {
    USLI_NEED_PATH(model->ctx, path, USL_ACCESS_WRITE);
    return usli_export_lora(model, path);
}

const char *usl_export_method(const char *name) {
    const usli_method *method = name ? usli_method_find(name) : NULL;
    return method ? method->name : NULL;
}

enum { CALIBRATION_CONTEXT = 512 };

usl_status usl_imatrix_new(usl_model *model, const usl_tokenizer *tok, const char *text, size_t len,
                           usl_imatrix **out) {
    int32_t *ids;
    size_t count;
    *out = NULL;
    USLI_NEED(model->ctx, tok);
    USLI_NEED(model->ctx, text);
    USLI_TRY(usli_tokenizer_encode(model->ctx, tok, text, len, USLI_ENCODE_SPECIAL, &ids, &count));
    usl_status st = usli_imatrix_new(model, ids, (int64_t)count, CALIBRATION_CONTEXT, out);
    usli_free(model->ctx, ids);
    return st;
}

void usl_imatrix_free(usl_imatrix *imatrix) {
    usli_imatrix_free(imatrix);
}
