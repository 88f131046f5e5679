#include "core/cpu/decode.h"

#include "core/base/dtype.h"
#include "core/cpu/vec.h"
#include "core/quant/traits.h"

enum { CHUNK = 1024 }; /* a multiple of every type's block */

usl_status usli_matrix_check(usl_ctx *ctx, const usli_matrix *w, const char *what) {
    if (w->dtype == USL_NF4 || w->dtype == USL_FP4)
        return w->nf4 ? USL_OK : usli_fail(ctx, USL_ERR_INTERNAL, "%s: a 4-bit matrix has no constants", what);
    const usli_traits *t = usli_traits_of(w->dtype);
    if (!w->data) return usli_fail(ctx, USL_ERR_INTERNAL, "%s: a matrix has no data", what);
    if (w->dtype == USL_I8 ? !w->scale : !t || !t->decode)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         "%s: weights of type %s cannot be read here; use f32, bf16, f16, nf4 or a GGUF type", what,
                         usl_dtype_name(w->dtype));
    if (w->dtype != USL_I8 && w->cols % t->block != 0)
        return usli_fail(ctx, USL_ERR_SHAPE, "%s: rows of %lld values do not fill blocks of %d (%s)", what,
                         (long long)w->cols, t->block, usl_dtype_name(w->dtype));
    return USL_OK;
}

static float nf4_absmax(const usli_nf4 *q, int64_t block) {
    return q->absmax_q ? q->map[q->absmax_q[block]] * q->absmax2[block / USLI_NF4_NEST] + q->offset : q->absmax[block];
}

static void round_to_bf16(const usli_vec *v, float *values, int64_t n) {
    uint16_t rounded[CHUNK];
    for (int64_t i = 0; i < n; i += CHUNK) {
        int64_t count = n - i < CHUNK ? n - i : CHUNK;
        v->f32_to_bf16(values + i, rounded, count);
        v->bf16_to_f32(rounded, values + i, count);
    }
}

/* As usli_nf4_decode, whose own work is left to bits and pieces that begin or end inside a byte. A block has but 16
 * values: they are scaled and rounded before they are looked up. */
static void read_nf4(const usli_nf4 *q, int64_t first, int64_t n, usl_dtype round, float *dst) {
    const usli_vec *v = usli_vec_best();
    for (int64_t done = 0, part; done < n; done += part) {
        int64_t at = first + done, left = USLI_NF4_BLOCK - at % USLI_NF4_BLOCK;
        part = left < n - done ? left : n - done;
        if ((at | part) % 2) {
            usli_nf4_decode(q, at, part, dst + done);
            if (round == USL_BF16) round_to_bf16(v, dst + done, part);
            continue;
        }
        v->lut16(q->codes + at / 2, q->table, nf4_absmax(q, at / USLI_NF4_BLOCK), round == USL_BF16, dst + done, part);
    }
}

void usli_matrix_read(const usli_matrix *w, int64_t row, int64_t col, int64_t n, usl_dtype round, float *dst) {
    const usli_vec *v = usli_vec_best();
    if (w->dtype == USL_NF4 || w->dtype == USL_FP4) {
        read_nf4(w->nf4, (w->first_row + row) * w->cols + col, n, round, dst);
        return;
    }
    if (w->dtype == USL_BF16) {
        v->bf16_to_f32(usli_matrix_at(w, row, col), dst, n);
        return;
    }
    if (w->dtype == USL_I8) {
        const int8_t *q = (const int8_t *)w->data + (w->first_row + row) * w->cols + col;
        for (int64_t i = 0; i < n; i++) dst[i] = (float)q[i] * w->scale[w->first_row + row];
    } else if (w->dtype == USL_F16) {
        v->f16_to_f32(usli_matrix_at(w, row, col), dst, n);
    } else {
        const usli_traits *t = usli_traits_of(w->dtype);
        int64_t block = ((w->first_row + row) * w->cols + col) / t->block;
        t->decode((const char *)w->data + (size_t)block * (size_t)t->block_bytes, dst, n);
    }
    if (round == USL_BF16) round_to_bf16(v, dst, n);
}

void usli_matrix_decode(const usli_matrix *w, int64_t row, int64_t col, int64_t n, float scale, void *dst,
                        usl_dtype dtype) {
    const usli_vec *v = usli_vec_best();
    float chunk[CHUNK];
    for (int64_t i = 0; i < n; i += CHUNK) {
        int64_t count = n - i < CHUNK ? n - i : CHUNK;
        usli_matrix_read(w, row, col + i, count, USL_F32, chunk);
        if (scale != 1) v->scale(scale, chunk, count);
        usli_row_store(v, chunk, (char *)dst + (size_t)i * usli_dtype_bytes(dtype), dtype, count);
    }
}

const void *usli_matrix_at(const usli_matrix *w, int64_t row, int64_t col) {
    return (const char *)w->data + (size_t)((w->first_row + row) * w->cols + col) * usli_dtype_bytes(w->dtype);
}
