/* Which reader a path needs. */
#include <string.h>

#include "core/base/file.h"
#include "core/text/tokenizer.h"

usl_status usli_tokenizer_open(usl_ctx *ctx, const char *path, usli_tokenizer **out) {
    size_t len = strlen(path);
    if (len < 5 || strcmp(path + len - 5, ".gguf") != 0 || usli_is_dir(path))
        return usli_tokenizer_load(ctx, path, out);
    usli_gguf *file;
    *out = NULL;
    USLI_TRY(usli_gguf_open(ctx, path, &file));
    usl_status st = usli_tokenizer_from_gguf(ctx, file, out);
    usli_gguf_close(file);
    return st;
}
