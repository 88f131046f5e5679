/* What of the hub needs no network: checksums, names, and the cache as huggingface_hub lays it out. The network is
 * tests/lua/hub_spec.lua's. */
#include "tests/data/failing.h"

#include <unistd.h>

#include "core/base/digest.h"
#include "core/base/store.h"
#include "core/io/hub.h"

static void hash(usli_digest_kind kind, const char *text, size_t size, size_t piece, char *hex) {
    usli_digest d;
    usli_digest_init(&d, kind);
    for (size_t at = 0; at < size; at += piece) usli_digest_add(&d, text + at, size - at < piece ? size - at : piece);
    usli_digest_end(&d, hex);
}

/* The examples of FIPS 180, and a million times "a", in pieces of every kind. */
static void test_digest(void) {
    static const char LONG[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    static const struct {
        usli_digest_kind kind;
        const char *text, *hex;
    } CASES[] = {
        { USLI_SHA1, "", "da39a3ee5e6b4b0d3255bfef95601890afd80709" },
        { USLI_SHA1, "abc", "a9993e364706816aba3e25717850c26c9cd0d89d" },
        { USLI_SHA1, LONG, "84983e441c3bd26ebaae4aa1f95129e5e54670f1" },
        { USLI_SHA256, "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" },
        { USLI_SHA256, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" },
        { USLI_SHA256, LONG, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1" },
    };
    char hex[USLI_DIGEST_HEX];
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++)
        for (size_t piece = 1; piece < 70; piece++) {
            hash(CASES[i].kind, CASES[i].text, strlen(CASES[i].text), piece, hex);
            CHECK(strcmp(hex, CASES[i].hex) == 0, "\"%s\" in pieces of %zu: %s", CASES[i].text, piece, hex);
        }
    char *many = malloc(1000000);
    memset(many, 'a', 1000000);
    hash(USLI_SHA256, many, 1000000, 4093, hex);
    CHECK(strcmp(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0") == 0, "a million: %s", hex);
    hash(USLI_SHA1, many, 1000000, 4093, hex);
    CHECK(strcmp(hex, "34aa973cd4c4daa4f61eeb2bdbad27316534016f") == 0, "a million: %s", hex);
    free(many);
    usli_digest d;
    usli_digest_git_blob(&d, 6);
    usli_digest_add(&d, "hello\n", 6);
    usli_digest_end(&d, hex);
    CHECK(strcmp(hex, "ce013625030ba8dba906f756967f9e9ca394464a") == 0, "git's blob: %s", hex);
}

static void test_names(void) {
    static const char *const GOOD[] = { "org/name",        "a/b",       "meta-llama/Llama-3.1-8B", "o/n:x.gguf",
                                        "o/n:BF16/x.gguf", "o/n:Q4_K_M" };
    static const char *const BAD[] = { "",         "name", "/a/b",  "./a",    "../a",   "a/b/c",      "a/",      "/a",
                                       "a//b",     "a/.b", "-a/b",  "a/b-",   "a..b/c", "a--b/c",     "a b/c",   "a/b:",
                                       "a/b:../x", "~/a",  "a/b?c", "a/b:/x", "a\nb/c", "http://a/b", "a/b:x//y" };
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++) CHECK(usl_hub_is_name(GOOD[i]), "%s", GOOD[i]);
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) CHECK(!usl_hub_is_name(BAD[i]), "%s", BAD[i]);
    CHECK(!usl_hub_is_name(NULL), "NULL");
}

static const char COMMIT[] = "0123456789abcdef0123456789abcdef01234567";
static char home[] = "/tmp/usl-hub-XXXXXX";

static usl_status put(usl_ctx *ctx, const char *name, const char *text) {
    char *path = usli_path_join(ctx, home, name);
    char *dir = usli_strdup(ctx, path ? path : "");
    usl_status st = path && dir ? USL_OK : usli_nomem(ctx, 0);
    if (st == USL_OK) *strrchr(dir, '/') = 0;
    if (st == USL_OK) st = usli_make_dirs(ctx, dir);
    if (st == USL_OK) st = usli_write_file(ctx, path, text, strlen(text));
    usli_free(ctx, dir);
    usli_free(ctx, path);
    return st;
}

static usl_status find(usl_ctx *ctx) {
    usl_hub_opts o = USL_HUB_OPTS_INIT;
    char *path;
    o.local_files_only = 1;
    usl_status st = usl_hub_get(ctx, "org/name", &o, &path);
    CHECK((path != NULL) == (st == USL_OK), "a path and %s", usl_status_name(st));
    if (path) CHECK(strstr(path, COMMIT) != NULL, "%s", path);
    usl_free(ctx, path);
    return st;
}

static void test_cache(void) {
    usl_ctx *ctx;
    CHECK(usl_ctx_new(NULL, &ctx) == USL_OK, "context");
    CHECK(mkdtemp(home) != NULL, "%s", home);
    setenv("HF_HUB_CACHE", home, 1);
    setenv("HF_TOKEN", "none", 1);
    CHECK(find(ctx) == USL_ERR_NOT_FOUND, "an empty cache");
    CHECK(strstr(usl_ctx_errmsg(ctx), "org/name") && strstr(usl_ctx_errmsg(ctx), "local_files_only"), "%s",
          usl_ctx_errmsg(ctx));
    CHECK_OK(ctx, put(ctx, "models--org--name/refs/main", COMMIT));
    CHECK_OK(ctx, put(ctx, "models--org--name/snapshots/0123456789abcdef0123456789abcdef01234567/config.json", "{}"));
    CHECK(find(ctx) == USL_ERR_NOT_FOUND && strstr(usl_ctx_errmsg(ctx), "model.safetensors"), "%s",
          usl_ctx_errmsg(ctx));
    CHECK_OK(ctx,
             put(ctx,
                 "models--org--name/snapshots/0123456789abcdef0123456789abcdef01234567/model.safetensors.index.json",
                 "{\"weight_map\": {\"a\": \"s-1\", \"b\": \"s-2\", \"c\": \"s-1\"}}"));
    CHECK_OK(ctx, put(ctx, "models--org--name/blobs/one", "1"));
    usli_hub hub;
    CHECK_OK(ctx, usli_hub_open(ctx, "org/name", NULL, &hub));
    CHECK_OK(ctx, usli_hub_find_commit(&hub));
    CHECK_OK(ctx, usli_hub_link(&hub, "s-1", "one"));
    CHECK(find(ctx) == USL_ERR_NOT_FOUND && strstr(usl_ctx_errmsg(ctx), "s-2"), "%s", usl_ctx_errmsg(ctx));
    CHECK_OK(ctx, usli_hub_link(&hub, "s-2", "two")); /* a link to what is not there */
    CHECK(find(ctx) == USL_ERR_NOT_FOUND && strstr(usl_ctx_errmsg(ctx), "s-2"), "%s", usl_ctx_errmsg(ctx));
    CHECK_OK(ctx, usli_hub_link(&hub, "s-2", "one"));
    CHECK_OK(ctx, find(ctx));
    usli_hub_close(&hub);
    usl_ctx_free(ctx);
    test_failing("a model of the cache", find);
}

static void test_locks(void) {
    usl_ctx *ctx;
    usli_lock *one, *two;
    char path[64];
    CHECK(usl_ctx_new(NULL, &ctx) == USL_OK, "context");
    snprintf(path, sizeof path, "%s/lock", home);
    CHECK_OK(ctx, usli_lock_try(ctx, path, &one));
    CHECK_OK(ctx, usli_lock_try(ctx, path, &two));
    CHECK(one && !two, "a lock is held once");
    usli_lock_release(one);
    CHECK_OK(ctx, usli_lock_try(ctx, path, &two));
    CHECK(two != NULL, "and again when it is free");
    usli_lock_release(two);
    usli_remove_tree(ctx, home);
    usl_ctx_free(ctx);
}

int main(void) {
    test_digest();
    test_names();
    test_cache();
    test_locks();
    return test_end("test_hub");
}
