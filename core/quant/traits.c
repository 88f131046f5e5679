#include "core/quant/traits.h"

#include "core/quant/blocks.h"
#include "core/quant/codecs.h"

#define CODEC(name) usli_decode_##name, usli_encode_##name
#define NONE NULL, NULL

static const usli_traits TRAITS[] = {
    { USL_F32, 1, 4, CODEC(f32) },
    { USL_F16, 1, 2, CODEC(f16) },
    { USL_BF16, 1, 2, CODEC(bf16) },
    { USL_F64, 1, 8, CODEC(f64) },
    { USL_Q4_0, 32, sizeof(usli_block_q4_0), CODEC(q4_0) },
    { USL_Q4_1, 32, sizeof(usli_block_q4_1), CODEC(q4_1) },
    { USL_Q5_0, 32, sizeof(usli_block_q5_0), CODEC(q5_0) },
    { USL_Q5_1, 32, sizeof(usli_block_q5_1), CODEC(q5_1) },
    { USL_Q8_0, 32, sizeof(usli_block_q8_0), CODEC(q8_0) },
    { USL_Q8_1, 32, sizeof(usli_block_q8_1), NONE },
    { USL_Q2_K, 256, sizeof(usli_block_q2_k), CODEC(q2_k) },
    { USL_Q3_K, 256, sizeof(usli_block_q3_k), CODEC(q3_k) },
    { USL_Q4_K, 256, sizeof(usli_block_q4_k), CODEC(q4_k) },
    { USL_Q5_K, 256, sizeof(usli_block_q5_k), CODEC(q5_k) },
    { USL_Q6_K, 256, sizeof(usli_block_q6_k), CODEC(q6_k) },
    { USL_Q8_K, 256, sizeof(usli_block_q8_k), NONE },
    { USL_IQ4_NL, 32, sizeof(usli_block_iq4_nl), CODEC(iq4_nl) },
    { USL_IQ4_XS, 256, sizeof(usli_block_iq4_xs), CODEC(iq4_xs) },
    { USL_MXFP4, 32, sizeof(usli_block_mxfp4), CODEC(mxfp4) },
    { USL_IQ2_XXS, 256, sizeof(usli_block_iq2_xxs), CODEC(iq2_xxs) },
    { USL_IQ2_XS, 256, sizeof(usli_block_iq2_xs), CODEC(iq2_xs) },
    { USL_IQ2_S, 256, sizeof(usli_block_iq2_s), CODEC(iq2_s) },
    { USL_IQ3_XXS, 256, sizeof(usli_block_iq3_xxs), CODEC(iq3_xxs) },
    { USL_IQ3_S, 256, sizeof(usli_block_iq3_s), CODEC(iq3_s) },
    { USL_IQ1_S, 256, sizeof(usli_block_iq1_s), CODEC(iq1_s) },
    { USL_IQ1_M, 256, sizeof(usli_block_iq1_m), CODEC(iq1_m) },
    { USL_NF4, 64, 36, CODEC(nf4) },
    { USL_FP4, 64, 36, CODEC(fp4) },
    { USL_I8, 1, 1, NONE },
    { USL_I16, 1, 2, NONE },
    { USL_I32, 1, 4, NONE },
    { USL_I64, 1, 8, NONE },
    { USL_U8, 1, 1, NONE },
    { USL_U16, 1, 2, NONE },
    { USL_U32, 1, 4, NONE },
    { USL_U64, 1, 8, NONE },
    { USL_BOOL, 1, 1, NONE },
    { USL_F8_E4M3, 1, 1, NONE },
    { USL_F8_E5M2, 1, 1, NONE },
};

const usli_traits *usli_traits_of(usl_dtype dtype) {
    for (size_t i = 0; i < sizeof TRAITS / sizeof *TRAITS; i++)
        if (TRAITS[i].dtype == dtype) return &TRAITS[i];
    return NULL;
}

size_t usli_row_bytes(usl_dtype dtype, int64_t n) {
    const usli_traits *t = usli_traits_of(dtype);
    if (!t || n < 0 || n % t->block != 0) return 0;
    uint64_t blocks = (uint64_t)(n / t->block);
    /* PTRDIFF_MAX, so that the result may also be subtracted and added to pointers. */
    if (blocks > (uint64_t)PTRDIFF_MAX / (uint64_t)t->block_bytes) return 0;
    return (size_t)blocks * (size_t)t->block_bytes;
}
