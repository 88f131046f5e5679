#include "core/text/parts.h"
usl_status usli_tokenizer_from_gguf(usl_ctx *ctx, const usli_gguf *file, usli_tokenizer **out) {
    (void)file; *out = NULL;
    return usli_fail(ctx, USL_ERR_UNSUPPORTED, "tokenizers in GGUF files are not supported yet");
}
usl_status usli_tokenizer_save(usl_ctx *ctx, const usli_tokenizer *tok, const char *dir) {
    (void)tok; (void)dir;
    return usli_fail(ctx, USL_ERR_UNSUPPORTED, "saving a tokenizer is not supported yet");
}
