/* The decoders and encoders behind the traits table, one family a file. See traits.h for what they promise. */
#ifndef USLI_QUANT_CODECS_H
#define USLI_QUANT_CODECS_H

#include <stdint.h>

/* Before a function whose loops gain from wider vectors: it is compiled twice and the loader of glibc picks. Neither
 * version fuses products and sums, so both give the same bits. The sanitizers' start-up does not stand the loader's
 * picking. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define USLI_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define USLI_WIDE
#endif

#define USLI_CODEC(name)                                             \
    void usli_decode_##name(const void *src, float *dst, int64_t n); \
    void usli_encode_##name(const float *src, const float *importance, void *dst, int64_t n)

/* plain.c */
USLI_CODEC(f32);
USLI_CODEC(f16);
USLI_CODEC(bf16);
USLI_CODEC(f64);
/* legacy.c */
USLI_CODEC(q4_0);
USLI_CODEC(q4_1);
USLI_CODEC(q5_0);
USLI_CODEC(q5_1);
USLI_CODEC(q8_0);
/* kquants.c */
USLI_CODEC(q2_k);
USLI_CODEC(q3_k);
USLI_CODEC(q4_k);
USLI_CODEC(q5_k);
USLI_CODEC(q6_k);
/* iq4.c */
USLI_CODEC(iq4_nl);
USLI_CODEC(iq4_xs);
USLI_CODEC(mxfp4);
/* iquants.c */
USLI_CODEC(iq2_xxs);
USLI_CODEC(iq2_xs);
USLI_CODEC(iq2_s);
USLI_CODEC(iq3_xxs);
USLI_CODEC(iq3_s);
USLI_CODEC(iq1_s);
USLI_CODEC(iq1_m);
/* nf4.c */
USLI_CODEC(nf4);
USLI_CODEC(fp4);

#undef USLI_CODEC

#endif
