/* Weights as DeepSeek V3 is published:
 *
 *   NAME            float8_e4m3fn (rows, cols)
 *   NAME_scale_inv  float32 (rows / 128, cols / 128), rounded up: what a block is multiplied by
 *
 * The product becomes bfloat16, as in DeepSeek's own converter. Nothing multiplies 8-bit floats here: with load_in_4bit
 * they go on to NF4. */
#include "core/model/fp8.h"

#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"

static const usli_file_tensor *scales_of(const usli_source *src, const usli_file_tensor *t) {
    char name[256];
    snprintf(name, sizeof name, "%s_scale_inv", t->name);
    return usli_safetensors_find(src->safetensors, name);
}

bool usli_fp8_is(const usli_source *src, const usli_file_tensor *t) {
    return src->safetensors && t->dtype == USL_F8_E4M3 && scales_of(src, t);
}

static int64_t blocks(int64_t n, int64_t block) {
    return (n + block - 1) / block;
}

usl_status usli_fp8_check(const usl_model *m, const usli_source *src, const usli_file_tensor *t) {
    const usli_file_tensor *s = scales_of(src, t);
    const int64_t *block = m->config.fp8_block;
    if (!block[0])
        return usli_fail(m->ctx, USL_ERR_FORMAT,
                         "%s: tensor \"%s\" has scales, and config.json has no quantization_config with their "
                         "weight_block_size",
                         m->path, t->name);
    if (s->dtype == USL_F32 && t->ndim == 2 && s->ndim == 2 && s->shape[0] == blocks(t->shape[0], block[0]) &&
        s->shape[1] == blocks(t->shape[1], block[1]))
        return USL_OK;
    return usli_fail(m->ctx, USL_ERR_SHAPE,
                     "%s: tensor \"%s\" does not hold a float32 for each block of %lldx%lld of its weight; fetch the "
                     "file again",
                     m->path, s->name, (long long)block[0], (long long)block[1]);
}

/* 1 bit of sign, 4 of exponent, 3 of mantissa; no infinities. */
static float decode(uint8_t v) {
    int exponent = v >> 3 & 15, mantissa = v & 7;
    float size = exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
    if ((v & 127) == 127) size = NAN;
    return v & 128 ? -size : size;
}

static void read_row(const float table[256], const int64_t *block, const usli_file_tensor *t,
                     const usli_file_tensor *scales, int64_t r, float *dst) {
    int64_t cols = t->shape[1];
    const uint8_t *codes = (const uint8_t *)t->data + (size_t)(r * cols);
    const char *row = (const char *)scales->data + (size_t)(r / block[0] * scales->shape[1]) * sizeof(float);
    for (int64_t c = 0; c < cols; c += block[1], row += sizeof(float)) {
        float scale; /* at any address */
        memcpy(&scale, row, sizeof scale);
        for (int64_t i = c; i < c + block[1] && i < cols; i++) dst[i] = table[codes[i]] * scale;
    }
}

typedef struct job {
    float table[256];
    const int64_t *block;
    const usli_file_tensor *t, *scales;
    const usli_piece *piece; /* where its rows go; NULL: one after the other */
    usl_dtype dtype;
    char *to;
    float *rows; /* a worker's: two rows */
} job;

static void load_row(void *arg, int64_t r, int worker) {
    const job *j = arg;
    int64_t cols = j->t->shape[1], row = j->piece ? usli_piece_row(j->piece, r) : r;
    char *to = j->to + (size_t)(row * cols) * usli_dtype_bytes(j->dtype);
    float *values = j->rows + worker * 2 * cols;
    void *rounded = j->dtype == USL_BF16 ? (void *)to : values + cols;
    read_row(j->table, j->block, j->t, j->scales, r, values);
    usli_from_f32(values, rounded, USL_BF16, cols);
    if (j->dtype != USL_BF16) usli_to_f32(rounded, USL_BF16, (float *)(void *)to, cols);
}

usl_status usli_fp8_read(const usl_model *m, const usli_source *src, const usli_file_tensor *t, const usli_piece *piece,
                         usl_dtype dtype, void *to) {
    if (m->plan_only) return USL_OK;
    job j = { .block = m->config.fp8_block, .t = t, .scales = scales_of(src, t), .piece = piece, .dtype = dtype };
    size_t scratch = (size_t)usli_pool_threads(m->ctx->pool) * 2 * (size_t)t->shape[1] * sizeof(float);
    j.to = to;
    if (!(j.rows = usli_malloc(m->ctx, scratch))) return usli_nomem(m->ctx, scratch);
    for (int i = 0; i < 256; i++) j.table[i] = decode((uint8_t)i);
    usli_pool_run(m->ctx->pool, t->shape[0], load_row, &j);
    usli_free(m->ctx, j.rows);
    return USL_OK;
}

usl_status usli_fp8_config(usl_ctx *ctx, const char *name, const json_t *quantization, usli_config *c) {
    const json_t *block = json_object_get(quantization, "weight_block_size");
    const char *form = json_string_value(json_object_get(quantization, "fmt"));
    bool sound = json_array_size(block) == 2 && (!form || strcmp(form, "e4m3") == 0);
    for (int i = 0; i < 2 && sound; i++) {
        c->fp8_block[i] = json_integer_value(json_array_get(block, (size_t)i));
        sound = c->fp8_block[i] > 0 && c->fp8_block[i] <= 1 << 20;
    }
    if (sound) return USL_OK;
    return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                     "%s: the checkpoint holds fp8 weights without the scales of blocks (weight_block_size, e4m3) that "
                     "are read; use the 16-bit model with load_in_4bit = true, or a GGUF",
                     name);
}
