/* cast: any storage type into the three that ops compute with, as a matrix and as one long row. */
#include "core/quant/traits.h"
#include "tests/ops/rig.h"

static void check_cast(rig *r, usl_dtype from, usl_dtype to, int64_t rows, int64_t cols) {
    usli_rng rng;
    usli_rng_seed(&rng, 3);
    const usli_traits *t = usli_traits_of(from);
    int64_t n = rows * cols;
    size_t bytes = (size_t)(n / t->block) * (size_t)t->block_bytes, to_bytes = (size_t)n * usli_dtype_bytes(to);
    uint8_t *src = malloc(bytes), *dst = calloc(to_bytes, 1), *want = malloc(to_bytes);
    float *values = malloc(sizeof(float) * (size_t)n);
    for (size_t i = 0; i < bytes; i++) src[i] = usli_rng_u32(&rng) & 0x37;
    t->decode(src, values, n);
    usli_from_f32(values, want, to, n);
    for (int64_t gap = 0; gap <= 8; gap += gap ? 5 : 3) { /* 0, 3, 8: what stands behind the rows of dst */
        size_t row = (size_t)cols * usli_dtype_bytes(to), ld = row + (size_t)gap * usli_dtype_bytes(to);
        uint8_t *spread = rig_spread(dst, rows, row, ld);
        usli_cast_args a = { .src = { .dtype = from, .rows = rows, .cols = cols, .data = src },
                             .dtype = to,
                             .dst = spread,
                             .ld = gap ? cols + gap : 0 };
#ifdef USLI_RIG_CUDA /* and of src */
        char *longer = NULL;
        if (gap && usli_dtype_bytes(from) == 2) {
            a.src.ld = cols + gap;
            a.src.data = longer = rig_spread(src, rows, 2 * (size_t)cols, 2 * (size_t)a.src.ld);
        }
#endif
        CHECK_OK(r->ctx, rig_run(r, USLI_OP_cast, &a, USLI_FORWARD));
        rig_pack("dst", spread, rows, row, ld, dst);
        CHECK(memcmp(dst, want, to_bytes) == 0, "%s to %s, %lld x %lld, %lld apart", usl_dtype_name(from),
              usl_dtype_name(to), (long long)rows, (long long)cols, (long long)(cols + gap));
        free(spread);
#ifdef USLI_RIG_CUDA
        free(longer);
#endif
    }
    free(src), free(dst), free(want), free(values);
}

/* NF4 and FP4 with constants of both kinds: blocks of 64 go on from row to row. */
static void check_four_bits(rig *r, bool fp4, bool nested, usl_dtype to, int64_t rows, int64_t cols) {
    usli_rng rng;
    usli_rng_seed(&rng, 4);
    int64_t n = rows * cols;
    size_t to_bytes = (size_t)n * usli_dtype_bytes(to);
    float *v, *absmax = malloc(sizeof(float) * (size_t)usli_nf4_blocks(n)), *values = malloc(sizeof(float) * (size_t)n);
    free(rig_random(&rng, USL_F32, n, &v));
    void *storage = aligned_alloc(64, (usli_nf4_bytes(n) + 63) / 64 * 64), *dst = malloc(to_bytes),
         *want = malloc(to_bytes);
    usli_nf4 q;
    usli_nf4_layout(storage, n, &q);
    if (fp4) q.table = usli_fp4_table;
    usli_nf4_quantize(&q, v, n, absmax);
    float *table = rig_copy(q.table, 16 * sizeof *table);
    rig_nf4_tables(&q);
    q.table = table;
    if (!nested) q.absmax_q = NULL, q.absmax = absmax;
    usli_nf4_decode(&q, 0, n, values);
    usli_from_f32(values, want, to, n);
    int64_t ld = cols + (nested ? 24 : 0);
    size_t row = (size_t)cols * usli_dtype_bytes(to), apart = (size_t)ld * usli_dtype_bytes(to);
    void *spread = rig_spread(want, rows, row, apart);
    for (int64_t i = 0; i < rows; i++) memset((char *)spread + (size_t)i * apart, 0, row);
    usli_cast_args a = { .src = { .dtype = fp4 ? USL_FP4 : USL_NF4, .rows = rows, .cols = cols, .nf4 = &q },
                         .dtype = to,
                         .dst = spread,
                         .ld = nested ? ld : 0 };
    CHECK_OK(r->ctx, rig_run(r, USLI_OP_cast, &a, USLI_FORWARD));
    rig_pack("dst", spread, rows, row, apart, dst);
    CHECK(memcmp(dst, want, to_bytes) == 0, "%s to %s, %lld x %lld", fp4 ? "fp4" : "nf4", usl_dtype_name(to),
          (long long)rows, (long long)cols);
    free(v), free(absmax), free(values), free(storage), free(spread), free(dst), free(want), free(table);
}

int main(void) {
    static const usl_dtype to[] = { USL_F32, USL_BF16, USL_F16 }, plain[] = { USL_F32, USL_BF16, USL_F16 },
                           blocks[] = { USL_Q4_0, USL_Q4_1, USL_Q5_0,   USL_Q5_1,   USL_Q8_0,  USL_Q2_K, USL_Q3_K,
                                        USL_Q4_K, USL_Q5_K, USL_IQ4_NL, USL_IQ4_XS, USL_MXFP4, USL_Q6_K };
    rig r;
    rig_open(&r, 2);
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < 3; i++) {
            check_cast(&r, plain[i], to[t], 1, 1);
            check_cast(&r, plain[i], to[t], 65, 17);
            check_cast(&r, plain[i], to[t], 1, 200001);
            check_cast(&r, plain[i], to[t], 2, 70000);
        }
        for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) check_cast(&r, blocks[i], to[t], 7, 512);
        check_cast(&r, USL_Q8_0, to[t], 3, 65536 + 1024);
        check_cast(&r, USL_Q6_K, to[t], 3, 65536 + 1024);
        for (int fp4 = 0; fp4 < 2; fp4++)
            for (int nested = 0; nested < 2; nested++) {
                check_four_bits(&r, fp4, nested, to[t], 70, 320);
                check_four_bits(&r, fp4, nested, to[t], 5, 24);
                check_four_bits(&r, fp4, nested, to[t], 9, 17);
            }
    }
    float x;
    usli_cast_args a = { .src = { .dtype = USL_I32, .rows = 1, .cols = 1, .data = &x }, .dtype = USL_F32, .dst = &x };
    CHECK(rig_run(&r, USLI_OP_cast, &a, USLI_FORWARD) == USL_ERR_UNSUPPORTED, "%s", usl_ctx_errmsg(r.ctx));
    rig_close(&r);
    return test_end("test_cast");
}
