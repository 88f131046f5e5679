/* Exports behind unsloth.h. */
#include "core/api/need.h"
#include "core/export/export.h"

usl_status usl_export_merged(usl_model *model, const usl_tokenizer *tok, const char *dir, usl_dtype dtype) {
    USLI_NEED_PATH(model->ctx, dir, USL_ACCESS_WRITE);
    return usli_export_merged(model, tok, dir, dtype);
}

usl_status usl_export_gguf(usl_model *model, const usl_tokenizer *tok, const char *path, const char *method) {
    USLI_NEED_PATH(model->ctx, path, USL_ACCESS_WRITE);
    USLI_NEED(model->ctx, method);
    return usli_export_gguf(model, tok, path, method);
}
