/* The cache of large tokenizers: the same ids with it, without it, and with whatever stands in it. */
#include <dirent.h>
#include <sys/stat.h>

#include "core/base/file.h"
#include "core/text/parts.h"
#include "core/text/tokenizer.h"
#include "tests/test.h"

static char scratch[] = "/tmp/usl_cache_XXXXXX", source[64], folder[64];

/* All words of up to three of these letters, made of their parts; swapped: pairs are merged the other way round. */
static void write_source(bool swapped) {
    static const char LETTERS[] = "abcdefghijklmnopqrstuvwxyz";
    enum { N = 26 };
    FILE *f = fopen(source, "wb");
    CHECK(f, "%s cannot be written", source);
    if (!f) return;
    int id = 0;
    fprintf(f, "{\"normalizer\": {\"type\": \"Lowercase\"}, \"model\": {\"merges\": [");
    for (int a = 0; a < N; a++)
        for (int b = 0; b < N; b++) {
            int left = swapped ? N - 1 - a : a, right = swapped ? N - 1 - b : b;
            fprintf(f, "%s\"%c %c\"", a + b ? ", " : "", LETTERS[left], LETTERS[right]);
        }
    for (int w = 0; w < N * N * N; w++)
        fprintf(f, ", \"%c%c %c\"", LETTERS[w / N / N], LETTERS[w / N % N], LETTERS[w % N]);
    fprintf(f, "], \"type\": \"BPE\", \"vocab\": {");
    for (int a = 0; a < N; a++) fprintf(f, "%s\"%c\": %d", a ? ", " : "", LETTERS[a], id++);
    for (int w = 0; w < N * N; w++) fprintf(f, ", \"%c%c\": %d", LETTERS[w / N], LETTERS[w % N], id++);
    for (int w = 0; w < N * N * N; w++)
        fprintf(f, ", \"%c%c%c\": %d", LETTERS[w / N / N], LETTERS[w / N % N], LETTERS[w % N], id++);
    fprintf(f, "}}, \"added_tokens\": [{\"id\": %d, \"content\": \"<x>\", \"special\": true}]}", id);
    fclose(f);
}

/* The ids of a text in hexadecimal, or what went wrong. */
static void ids_of(usl_ctx *ctx, char *out, size_t size) {
    static const char TEXT[] = "<x>Helloworldthequickbrownfoxjumps<x>overthelazydogabcabcabc";
    usli_tokenizer *tok;
    int32_t *ids = NULL;
    size_t count = 0, at = 0;
    usl_status st = usli_tokenizer_load(ctx, source, &tok);
    if (st == USL_OK) st = usli_tokenizer_encode(ctx, tok, TEXT, sizeof TEXT - 1, 0, &ids, &count);
    if (st != USL_OK) snprintf(out, size, "%s", usl_ctx_errmsg(ctx));
    for (size_t i = 0; i < count && at + 16 < size; i++)
        at += (size_t)snprintf(out + at, size - at, "%x ", (unsigned)ids[i]);
    usli_free(ctx, ids);
    usli_tokenizer_release(tok);
}

static void use_cache(const char *where) {
    setenv("UNSLOTH_LUA_CACHE", where, 1);
}

/* The only file of the cache. */
static bool find_kept(char *path, size_t size) {
    char dir[100];
    snprintf(dir, sizeof dir, "%s/tokenizers", folder);
    DIR *d = opendir(dir);
    int found = 0;
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.') continue;
        snprintf(path, size, "%s/%s", dir, e->d_name);
        found++;
    }
    if (d) closedir(d);
    return found == 1;
}

static uint64_t number_at(const char *data, int i) {
    uint64_t n;
    memcpy(&n, data + 8 * i, 8);
    return n;
}

/* Makes a changed file look whole. */
static void seal(char *data, size_t size) {
    uint64_t sum = usli_hash_bytes(data + 72, size - 72);
    memcpy(data + 64, &sum, 8);
}

static void test_kept(usl_ctx *ctx) {
    char plain[600], first[600], second[600], path[400], *data;
    size_t size;
    write_source(false);
    use_cache("0");
    ids_of(ctx, plain, sizeof plain);
    use_cache(folder);
    CHECK(!find_kept(path, sizeof path), "a cache was written though there is none");
    ids_of(ctx, first, sizeof first);
    ids_of(ctx, second, sizeof second);
    CHECK(strcmp(plain, first) == 0 && strcmp(plain, second) == 0, "%s | %s | %s", plain, first, second);
    CHECK(find_kept(path, sizeof path), "nothing was kept");
    /* That it is used shows where it says something else: two letters change their ids. */
    CHECK_OK(ctx, usli_read_file(ctx, path, &data, &size));
    int32_t ids[2];
    memcpy(ids, data + 72, 4);
    memcpy(ids + 1, data + 72 + 8 * 4, 4);
    memcpy(data + 72, ids + 1, 4);
    memcpy(data + 72 + 8 * 4, ids, 4);
    seal(data, size);
    CHECK_OK(ctx, usli_write_file(ctx, path, data, size));
    ids_of(ctx, second, sizeof second);
    CHECK(strcmp(plain, second) != 0, "the cache is not read");
    usli_free(ctx, data);
}

static void test_stale(usl_ctx *ctx) {
    char plain[600], cached[600], before[600];
    use_cache("0");
    ids_of(ctx, before, sizeof before);
    write_source(true);
    ids_of(ctx, plain, sizeof plain);
    CHECK(strcmp(plain, before) != 0, "the other tokenizer is the same one");
    use_cache(folder);
    for (int i = 0; i < 2; i++) {
        ids_of(ctx, cached, sizeof cached);
        CHECK(strcmp(plain, cached) == 0, "of another file: %s | %s", plain, cached);
    }
}

/* Cut off, changed without its sum, changed with it: never an error, and right wherever the sum tells. */
static void test_broken(usl_ctx *ctx) {
    char plain[600], now[600], path[400], *data;
    size_t size;
    ids_of(ctx, plain, sizeof plain);
    CHECK(find_kept(path, sizeof path), "nothing was kept");
    CHECK_OK(ctx, usli_read_file(ctx, path, &data, &size));
    char *copy = malloc(size + 8);
    for (int i = 0; i < 24; i++) {
        size_t less = i < 10 ? (size_t)i * 8 : size * (size_t)i / 24;
        CHECK_OK(ctx, usli_write_file(ctx, path, data, less));
        ids_of(ctx, now, sizeof now);
        CHECK(strcmp(plain, now) == 0, "cut to %zu: %s", less, now);
    }
    for (uint32_t i = 0; i < 96; i++) {
        bool sealed = i % 2, head = i % 3 == 0;
        memcpy(copy, data, size);
        size_t at = head ? (i * 5) % 64 : 72 + (size_t)(i * 2654435761u) % (size - 72);
        copy[at] = (char)(copy[at] ^ (1 << i % 8));
        if (sealed) seal(copy, size);
        CHECK_OK(ctx, usli_write_file(ctx, path, copy, size));
        ids_of(ctx, now, sizeof now);
        if (!sealed || head) CHECK(strcmp(plain, now) == 0, "byte %zu: %s", at, now);
    }
    /* Numbers that would overflow, in a file whose sum is right. */
    for (int field = 4; field < 8; field++) {
        uint64_t huge = UINT64_MAX / 8 - number_at(data, field);
        memcpy(copy, data, size);
        memcpy(copy + 8 * field, &huge, 8);
        seal(copy, size);
        CHECK_OK(ctx, usli_write_file(ctx, path, copy, size));
        ids_of(ctx, now, sizeof now);
        CHECK(strcmp(plain, now) == 0, "field %d: %s", field, now);
    }
    CHECK(strcmp(usl_ctx_errmsg(ctx), "") == 0, "a cache is no error: %s", usl_ctx_errmsg(ctx));
    usli_free(ctx, data);
    free(copy);
}

static int allow(void *ud, const char *path, usl_access access) {
    (void)ud, (void)access;
    CHECK(!strstr(path, "tokenizers"), "a host was asked about %s", path);
    return 0;
}

/* Nothing is written for a host that is asked about files, nor where nothing can be. */
static void test_without(usl_ctx *ctx) {
    usl_ctx_opts o = USL_CTX_OPTS_INIT;
    char plain[600], now[600], path[400], nowhere[100];
    usl_ctx *host;
    CHECK(find_kept(path, sizeof path), "nothing was kept");
    CHECK_OK(ctx, usli_remove_file(ctx, path));
    o.access_fn = allow;
    CHECK(usl_ctx_new(&o, &host) == USL_OK, "no context");
    ids_of(ctx, plain, sizeof plain);
    CHECK_OK(ctx, usli_remove_file(ctx, path));
    ids_of(host, now, sizeof now);
    CHECK(strcmp(plain, now) == 0, "%s | %s", plain, now);
    CHECK(!find_kept(path, sizeof path), "a cache was written beside a host's own files");
    usl_ctx_free(host);
    snprintf(nowhere, sizeof nowhere, "%s/below", source);
    use_cache(nowhere);
    ids_of(ctx, now, sizeof now);
    CHECK(strcmp(plain, now) == 0, "%s | %s", plain, now);
    CHECK(strcmp(usl_ctx_errmsg(ctx), "") == 0, "a cache is no error: %s", usl_ctx_errmsg(ctx));
}

typedef struct failing {
    long left;
} failing;

static void *fail_at(void *ud, void *ptr, size_t size) {
    failing *f = ud;
    if (!size) {
        free(ptr);
        return NULL;
    }
    return f->left-- == 0 ? NULL : realloc(ptr, size);
}

/* Each allocation of a load from the cache fails once: it is loaded without, or there is no memory. */
static void test_no_memory(usl_ctx *ctx) {
    char plain[600], now[600];
    int whole = 0;
    use_cache(folder);
    ids_of(ctx, plain, sizeof plain);
    for (long i = 0; i < 60; i++) {
        failing f = { -1 };
        usl_ctx_opts o = USL_CTX_OPTS_INIT;
        usl_ctx *poor;
        o.realloc_fn = fail_at;
        o.realloc_ud = &f;
        o.threads = 1;
        if (usl_ctx_new(&o, &poor) != USL_OK) continue;
        f.left = i;
        ids_of(poor, now, sizeof now);
        whole += strcmp(plain, now) == 0;
        CHECK(strcmp(plain, now) == 0 || strstr(now, "memory"), "allocation %ld: %s", i, now);
        usl_ctx_free(poor);
    }
    CHECK(whole > 0, "no failure was survived");
}

int main(void) {
    usl_ctx *ctx;
    char command[100];
    if (usl_ctx_new(NULL, &ctx) != USL_OK || !mkdtemp(scratch)) return 1;
    snprintf(source, sizeof source, "%s/tokenizer.json", scratch);
    snprintf(folder, sizeof folder, "%s/cache", scratch);
    test_kept(ctx);
    test_stale(ctx);
    test_broken(ctx);
    test_without(ctx);
    test_no_memory(ctx);
    usl_ctx_free(ctx);
    snprintf(command, sizeof command, "rm -r '%s'", scratch);
    CHECK(system(command) == 0, "%s stays", scratch);
    return test_end("test_cache");
}
