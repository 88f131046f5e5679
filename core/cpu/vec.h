/* Rows of numbers: the inner loops of the ops, in plain C, compiled once per instruction set (vec.c) and picked at run
 * time (vec_table.c). Sums have one order for a given instruction set and length. */
#ifndef USLI_CPU_VEC_H
#define USLI_CPU_VEC_H

#include <stdint.h>

#include "core/unsloth.h"

/* What adamw's formula needs of an update: rest1 = 1 - beta1, root2 = sqrt(1 - beta2^t), step = lr / (1 - beta1^t),
 * decay = 1 - lr * weight decay. */
typedef struct usli_adamw_factors {
    float beta1, rest1, beta2, rest2, root2, eps, step, decay, clip;
} usli_adamw_factors;

typedef struct usli_vec {
    /* 16-bit rows; float32 rows need no conversion. */
    void (*bf16_to_f32)(const uint16_t *src, float *dst, int64_t n);
    void (*f32_to_bf16)(const float *src, uint16_t *dst, int64_t n);
    void (*f16_to_f32)(const uint16_t *src, float *dst, int64_t n);
    void (*f32_to_f16)(const float *src, uint16_t *dst, int64_t n);
    /* dst = scale * table[code], rounded to bfloat16 when round: n (even) 4-bit codes, the even value in the high half
     * of its byte. */
    void (*lut16)(const uint8_t *codes, const float *table, float scale, int round, float *dst, int64_t n);
    float (*dot)(const float *a, const float *b, int64_t n);
    float (*dot_bf16)(const uint16_t *a, const float *b, int64_t n);
    float (*dot3)(const float *a, const float *b, const float *c, int64_t n); /* sum a b c */
    /* y = x * keep, or 0 where the word of its feature is below threshold; x may be y. Words are usli_philox's: four
     * features a counter (group + i / 4, c1, c2, c3). */
    void (*drop)(uint64_t key, uint32_t group, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t threshold, float keep,
                 const float *x, float *y, int64_t n);
    float (*max)(const float *x, int64_t n);
    double (*squares)(const float *x, int64_t n);               /* their sum, squared in double */
    void (*axpy)(float s, const float *x, float *y, int64_t n); /* y += s x */
    void (*add)(const float *a, const float *b, float *y, int64_t n);
    void (*times)(float s, const float *a, const float *b, float *y, int64_t n);     /* y = s a b */
    void (*add_times)(float s, const float *a, const float *b, float *y, int64_t n); /* y += s a b */
    /* dx = rstd (dy w - x k); dx may be dy */
    void (*norm_backward)(float rstd, float k, const float *x, const float *w, const float *dy, float *dx, int64_t n);
    /* Turns the pairs (i, i + half) by angles, or back where sign is -1. */
    void (*rotate)(const float *cosine, const float *sine, float sign, float *x, int64_t half);
    void (*scale)(float s, float *y, int64_t n);
    /* x = exp(x - shift) in place, x - shift at most 88; returns the sum */
    float (*exp_sum)(float *x, float shift, int64_t n);
    /* act: 0 silu, 1 gelu (tanh), 2 gelu (erf).  h = act(g) * u */
    void (*glu)(int act, const float *g, const float *u, float *h, int64_t n);
    /* dg = dh u act'(g); du = dh act(g); h = act(g) u */
    void (*glu_backward)(int act, const float *g, const float *u, const float *dh, float *dg, float *du, float *h,
                         int64_t n);
    void (*tanh)(float *x, int64_t n);
    /* One update of n values: w, m, v change; g is 0 afterwards. */
    void (*adamw)(const usli_adamw_factors *f, float *w, float *g, float *m, float *v, int64_t n);
    /* Columns of a matrix (rows, n), packed: top[i] = max(top[i], column i). */
    void (*column_max)(const float *x, int64_t rows, int64_t n, float *top);
    /* x = exp(factor x - shift[i]) in place, of at most 88; sum[i] += column i when sum is given. */
    void (*column_exp)(float factor, float *x, int64_t rows, int64_t n, const float *shift, float *sum);
    /* dp = p * (dp - delta[i]) */
    void (*column_softmax_backward)(const float *p, float *dp, int64_t rows, int64_t n, const float *delta);
    /* c (m, n) = or += a (m, k) b (k, n); a's element (i, p) stands at a[i * ia + p * pa]; rows of b and c are ldb, ldc
     * apart. For tiles in cache; quickest where n is a multiple of lanes. */
    void (*mul)(int64_t m, int64_t n, int64_t k, const float *a, int64_t ia, int64_t pa, const float *b, int64_t ldb,
                float *c, int64_t ldc, int accumulate);
    /* dst (cols, rows) = src (rows, cols) transposed, rows ld and ldd apart: 32 bits each, whatever they are. */
    void (*transpose)(const float *src, int64_t rows, int64_t cols, int64_t ld, float *dst, int64_t ldd);
    /* Products of bfloat16 numbers, two of a sum in one word: row p of b in pairs holds rows 2 p (low half) and 2 p + 1
     * of b, where an odd number of rows ends with zeros. pair_rows makes it of bfloat16 rows ld apart, round_pairs of
     * packed float32 ones. mul_pairs: c (m, n) = or += a (m, 2 k) b (k, n words), rows of a lda values apart. */
    void (*pair_rows)(const uint16_t *x, int64_t rows, int64_t n, int64_t ld, uint32_t *dst);
    void (*round_pairs)(const float *x, int64_t rows, int64_t n, uint32_t *dst);
    void (*mul_pairs)(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint32_t *b, int64_t ldb,
                      float *c, int64_t ldc, int accumulate);
    int pairs; /* mul_pairs is at least as quick as mul here */
    int lanes; /* float32 values of a register */
} usli_vec;

/* The best this processor runs. */
const usli_vec *usli_vec_best(void);
/* These where the processor, and the compiler that built us, have them, or NULL. */
const usli_vec *usli_vec_amx_here(void);
const usli_vec *usli_vec_avx512bf16_here(void);

/* The row as float32: the row itself, or converted into buf. */
const float *usli_row_load(const usli_vec *v, const void *row, usl_dtype dtype, float *buf, int64_t n);
void usli_row_store(const usli_vec *v, const float *row, void *dst, usl_dtype dtype, int64_t n);

extern const usli_vec usli_vec_generic;
#if defined(__x86_64__)
extern const usli_vec usli_vec_avx2, usli_vec_avx512, usli_vec_avx512bf16, usli_vec_amx;
#endif

#endif
