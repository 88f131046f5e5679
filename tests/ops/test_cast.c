/* cast: any storage type into the three that ops compute with, as a matrix and as one long row. */
#include "core/quant/traits.h"
#include "tests/ops/rig.h"

static void check_cast(rig *r, usl_dtype from, usl_dtype to, int64_t rows, int64_t cols) {
    usli_rng rng;
    usli_rng_seed(&rng, 3);
    const usli_traits *t = usli_traits_of(from);
    int64_t n = rows * cols;
    size_t bytes = (size_t)(n / t->block) * (size_t)t->block_bytes, to_bytes = (size_t)n * usli_dtype_bytes(to);
    uint8_t *src = malloc(bytes), *dst = malloc(to_bytes), *want = malloc(to_bytes);
    float *values = malloc(sizeof(float) * (size_t)n);
    for (size_t i = 0; i < bytes; i++) src[i] = usli_rng_u32(&rng) & 0x37;
    t->decode(src, values, n);
    usli_from_f32(values, want, to, n);
    usli_cast_args a = { .src = { .dtype = from, .rows = rows, .cols = cols, .data = src }, .dtype = to, .dst = dst };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_cast, &a, USLI_FORWARD));
    CHECK(memcmp(dst, want, to_bytes) == 0, "%s to %s, %lld x %lld", usl_dtype_name(from), usl_dtype_name(to),
          (long long)rows, (long long)cols);
    free(src), free(dst), free(want), free(values);
}

int main(void) {
    static const usl_dtype to[] = { USL_F32, USL_BF16, USL_F16 }, plain[] = { USL_F32, USL_BF16, USL_F16 },
                           blocks[] = { USL_Q4_0, USL_Q8_0, USL_Q4_K, USL_Q6_K };
    rig r;
    rig_open(&r, 2);
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < 3; i++) {
            check_cast(&r, plain[i], to[t], 1, 1);
            check_cast(&r, plain[i], to[t], 65, 17);
            check_cast(&r, plain[i], to[t], 1, 200001);
            check_cast(&r, plain[i], to[t], 2, 70000);
        }
        for (int i = 0; i < 4; i++) {
            check_cast(&r, blocks[i], to[t], 7, 256);
            check_cast(&r, blocks[i], to[t], 3, 65536 + 1024);
        }
    }
    float x;
    usli_cast_args a = { .src = { .dtype = USL_I32, .rows = 1, .cols = 1, .data = &x }, .dtype = USL_F32, .dst = &x };
    CHECK(rig_run(&r, USLI_OP_cast, &a, USLI_FORWARD) == USL_ERR_UNSUPPORTED, "%s", usl_ctx_errmsg(r.ctx));
    rig_close(&r);
    return test_end("test_cast");
}
