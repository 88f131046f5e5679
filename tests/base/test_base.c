#include "tests/test.h"

#include <sys/stat.h>
#include <unistd.h>

#include "core/base/dtype.h"
#include "core/base/file.h"
#include "core/base/half.h"
#include "core/base/pool.h"
#include "core/base/rng.h"

static void test_half(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        float f = usli_f16_to_f32((uint16_t)h);
        if (isnan(f))
            CHECK(isnan(usli_f16_to_f32(usli_f32_to_f16(f))), "f16 %04x", h);
        else
            CHECK(usli_f32_to_f16(f) == h, "f16 %04x came back as %04x", h, usli_f32_to_f16(f));
        float b = usli_bf16_to_f32((uint16_t)h);
        if (!isnan(b)) CHECK(usli_f32_to_bf16(b) == h, "bf16 %04x", h);
    }
    CHECK(usli_f32_to_f16(65519.0f) == 0x7bff && usli_f32_to_f16(65520.0f) == 0x7c00, "f16 overflow");
    CHECK(usli_f32_to_f16(1.0f + 0x1p-11f) == 0x3c00 && usli_f32_to_f16(1.0f + 0x3p-11f) == 0x3c02, "f16 ties to even");
    CHECK(usli_f32_to_f16(0x1p-25f) == 0 && usli_f32_to_f16(0x1.8p-25f) == 1, "f16 subnormal ties");
    CHECK(usli_f32_to_bf16(usli_u32_as_float(0x3f808000)) == 0x3f80, "bf16 ties to even");
    CHECK(usli_f32_to_bf16(usli_u32_as_float(0x3f818000)) == 0x3f82, "bf16 ties to even, odd");
}

static void test_rng(void) {
    /* The known answers of Random123's kat_vectors for philox4x32-10. */
    uint32_t r[4];
    usli_philox(0, 0, 0, r);
    CHECK(r[0] == 0x6627e8d5 && r[1] == 0xe169c58d && r[2] == 0xbc57ac4c && r[3] == 0x9b00dbd8, "philox zero");
    usli_philox(UINT64_MAX, UINT64_MAX, UINT64_MAX, r);
    CHECK(r[0] == 0x408f276d && r[1] == 0x41c83b0e && r[2] == 0xa20bc7c6 && r[3] == 0x6d5451fd, "philox ones");
    usli_mt19937 mt;
    usli_mt19937_seed(&mt, 5489);
    uint32_t v = 0;
    for (int i = 0; i < 10000; i++) v = usli_mt19937_u32(&mt);
    CHECK(v == 4123659995u, "mt19937's 10000th value, %u", v); /* the C++ standard names it */
    usli_rng rng;
    usli_rng_seed(&rng, 7);
    double sum = 0, sq = 0;
    for (int i = 0; i < 100000; i++) {
        double z = usli_rng_normal(&rng);
        sum += z, sq += z * z;
    }
    CHECK(fabs(sum / 1e5) < 0.02 && fabs(sq / 1e5 - 1) < 0.02, "normal: mean %g, variance %g", sum / 1e5, sq / 1e5);
}

static void add_task(void *arg, int64_t task, int worker) {
    (void)worker;
    ((int64_t *)arg)[task] += task;
}

static void test_pool(void) {
    for (int threads = 1; threads <= 5; threads++) {
        usl_ctx_opts o = USL_CTX_OPTS_INIT;
        o.threads = threads;
        usl_ctx *ctx;
        CHECK(usl_ctx_new(&o, &ctx) == USL_OK, "context");
        int64_t seen[1000] = { 0 };
        for (int rep = 0; rep < 50; rep++) usli_pool_run(ctx->pool, 1000, add_task, seen);
        int bad = 0;
        for (int64_t i = 0; i < 1000; i++) bad += seen[i] != 50 * i;
        CHECK(bad == 0, "%d tasks of 1000 were lost or doubled with %d threads", bad, threads);
        usl_ctx_free(ctx);
    }
}

static void test_files(usl_ctx *ctx) {
    char dir[] = "/tmp/usl-base-XXXXXX", path[64], deep[80];
    CHECK(mkdtemp(dir) != NULL, "a temporary folder");
    snprintf(path, sizeof path, "%s/a.bin", dir);
    snprintf(deep, sizeof deep, "%s/x/y/z", dir);
    CHECK_OK(ctx, usli_write_file(ctx, path, "first", 5));
    usli_writer *w;
    CHECK_OK(ctx, usli_writer_open(ctx, path, &w));
    CHECK_OK(ctx, usli_writer_write(w, "second", 6));
    usli_writer_close(w); /* not committed: the old file stays, nothing else is left */
    char *text;
    size_t size;
    CHECK_OK(ctx, usli_read_file(ctx, path, &text, &size));
    CHECK(size == 5 && strcmp(text, "first") == 0, "%s", text);
    usli_free(ctx, text);
    CHECK_OK(ctx, usli_make_dirs(ctx, deep));
    CHECK_OK(ctx, usli_make_dirs(ctx, deep));
    char **names;
    size_t n;
    CHECK_OK(ctx, usli_list_dir(ctx, dir, &names, &n));
    CHECK(n == 2 && strcmp(names[0], "a.bin") == 0, "%zu names", n);
    usli_free_names(ctx, names, n);
    usli_map *map;
    CHECK(usli_map_open(ctx, "/nonexistent/x", &map) == USL_ERR_NOT_FOUND && !map, "missing file");
    CHECK(strstr(usl_ctx_errmsg(ctx), "/nonexistent/x") != NULL, "%s", usl_ctx_errmsg(ctx));
    CHECK(usli_make_dirs(ctx, path) != USL_OK, "a file is no folder");
    struct stat sb;
    CHECK_OK(ctx, usli_write_file(ctx, "/dev/null", "gone", 4));
    CHECK(stat("/dev/null", &sb) == 0 && S_ISCHR(sb.st_mode), "/dev/null is no device any more");
    CHECK(usli_free_disk("/dev/null") == UINT64_MAX, "a device that is full");
    char cmd[80];
    snprintf(cmd, sizeof cmd, "rm -r %s", dir);
    CHECK(system(cmd) == 0, "clean up");
}

int main(void) {
    usl_ctx *ctx;
    CHECK(usl_ctx_new(NULL, &ctx) == USL_OK, "context");
    test_half();
    test_rng();
    test_pool();
    test_files(ctx);
    CHECK_OK(ctx, usl_ctx_safe_point(ctx));
    usl_ctx_cancel(ctx);
    CHECK(usl_ctx_safe_point(ctx) == USL_ERR_CANCELLED, "a request is not answered");
    CHECK_OK(ctx, usl_ctx_safe_point(ctx)); /* once */
    CHECK(usl_dtype_parse("bfloat16") == USL_BF16 && usl_dtype_parse("q4_k") == USL_Q4_K, "names");
    CHECK(usl_dtype_parse("nonsense") == USL_DTYPE_AUTO, "unknown name");
    usl_ctx_free(ctx);
    return test_end("base");
}
