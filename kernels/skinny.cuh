/* Products with one narrow side: all adapters of a group together have 16 to 64 ranks, so these products are copies
 * with some arithmetic on the way, and bound by memory. For 16-bit types. Shapes as usli_skinny_fits says; tokens and
 * ranks are free. Sums have one order. */
#ifndef USLI_KERNELS_SKINNY_CUH
#define USLI_KERNELS_SKINNY_CUH

#include "kernels/device.cuh"

/* A wide matrix (tokens, cols) as these kernels take it. */
typedef struct usli_wide {
    void *data;
    int64_t tokens, cols, ld;
    const usli_dropout *dropout; /* NULL: none; else values are dropped on their way in (or, by expand, out) */
} usli_wide;

static inline bool usli_skinny_fits(const void *data, int64_t cols, int64_t ld) {
    return usli_aligned16(data) && cols % 8 == 0 && ld % 8 == 0;
}

/* out (tokens, ranks) = drop(x) a^T, a (ranks, cols), rows lda apart. also: where out is written a second time, rows
 * ld_also apart, with zeros up to a multiple of 16 columns; or NULL. room: floats, as many as usli_narrow_room says. */
int64_t usli_narrow_room(int64_t tokens, int64_t cols, int ranks);
usl_status usli_narrow(usli_exec *x, usl_dtype dtype, const usli_wide *w, const void *a, int64_t lda, int ranks,
                       void *out, void *also, int64_t ld_also, float *room);

/* y = bias + drop(p b^T), p (tokens, ranks), b (cols, ranks), or y += that. bias (cols) or NULL; ranks may be 0. */
usl_status usli_expand(usli_exec *x, usl_dtype dtype, const usli_wide *y, const void *p, const void *b, int ranks,
                       const float *bias, bool add);

/* Both products that read dy in one reading of it: dyb = dy b, as usli_narrow (b_turned (ranks, cols)), and parts
 * (cols, ranks) of dB = dy^T xa, over a share of the tokens each, as many as usli_dy_parts says. room: floats, as many
 * as usli_dy_room says. Where usli_dy_fits; a block holds what it needs in shared memory. */
bool usli_dy_fits(const usli_exec *x, int ranks);
int usli_dy_parts(int64_t tokens, int64_t cols);
int64_t usli_dy_room(int64_t tokens, int64_t cols, int ranks);
usl_status usli_dy_products(usli_exec *x, usl_dtype dtype, const usli_wide *dy, const void *b_turned, const void *xa,
                            int ranks, void *dyb, void *also, int64_t ld_also, float *db, float *room);

/* da: parts (ranks, in) of dyb^T drop(x), db: parts (out, ranks) of dy^T xa, over a share of the tokens each, as many
 * as usli_gradient_parts says of x's and of dy's columns. db NULL: not wanted. */
int usli_gradient_parts(int64_t tokens, int64_t cols);
usl_status usli_gradients(usli_exec *x, usl_dtype dtype, const usli_wide *in, const usli_wide *dy, const void *dyb,
                          const void *xa, int ranks, float *da, float *db);

#endif
