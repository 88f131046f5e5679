/* A host that runs recipes of strangers: they reach `unsloth` and one folder, and whoever passes a limit is stopped.
 *
 *     04_sandbox FOLDER RECIPE.lua [MIB [INSTRUCTIONS [SECONDS]]]
 *
 * Exits 0 when the recipe ran to its end, 1 when it raised an error, 2 when a limit stopped it. */
#include <stdio.h>
#include <stdlib.h>
#include <unsloth_lua.h>

static void on_log(void *ud, usl_log_level level, const char *text) {
    (void)ud;
    printf("%s%s\n", level == USL_LOG_WARN ? "note: " : "", text);
}

static char *read_all(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    char *text = malloc(1 << 20);
    *len = f && text ? fread(text, 1, 1 << 20, f) : 0;
    if (f) fclose(f);
    if (!f) fprintf(stderr, "%s: cannot be read\n", path);
    return f ? text : NULL;
}

int main(int argc, char **argv) {
    if (argc < 3) return fprintf(stderr, "usage: %s FOLDER RECIPE.lua [MIB [INSTRUCTIONS [SECONDS]]]\n", argv[0]), 1;
    unsloth_sandbox_opts opts = UNSLOTH_SANDBOX_OPTS_INIT;
    unsloth_sandbox *box;
    char why[1024];
    size_t len;
    char *text = read_all(argv[2], &len);
    if (!text) return 1;
    opts.folder = argv[1];
    opts.log_fn = on_log;
    if (argc > 3) opts.memory = (uint64_t)atoll(argv[3]) << 20;
    if (argc > 4) opts.instructions = (uint64_t)atoll(argv[4]);
    if (argc > 5) opts.seconds = atof(argv[5]);
    if (unsloth_sandbox_new(&opts, &box, why, sizeof why) != USL_OK) return fprintf(stderr, "%s\n", why), 1;
    usl_status st = unsloth_sandbox_run(box, "recipe", text, len);
    if (st != USL_OK) printf("%s\n", unsloth_sandbox_errmsg(box));
    unsloth_sandbox_free(box);
    free(text);
    return st == USL_OK ? 0 : st == USL_ERR_CANCELLED ? 2 : 1;
}
