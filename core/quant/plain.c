/* Plain floating types behind the same two functions as the block types. */
#include "core/quant/codecs.h"

#include "core/base/dtype.h"

void usli_decode_f32(const void *src, float *dst, int64_t n) {
    usli_to_f32(src, USL_F32, dst, n);
}
void usli_encode_f32(const float *src, const float *importance, void *dst, int64_t n) {
    (void)importance;
    usli_from_f32(src, dst, USL_F32, n);
}

void usli_decode_f16(const void *src, float *dst, int64_t n) {
    usli_to_f32(src, USL_F16, dst, n);
}
void usli_encode_f16(const float *src, const float *importance, void *dst, int64_t n) {
    (void)importance;
    usli_from_f32(src, dst, USL_F16, n);
}

void usli_decode_bf16(const void *src, float *dst, int64_t n) {
    usli_to_f32(src, USL_BF16, dst, n);
}
void usli_encode_bf16(const float *src, const float *importance, void *dst, int64_t n) {
    (void)importance;
    usli_from_f32(src, dst, USL_BF16, n);
}

void usli_decode_f64(const void *src, float *dst, int64_t n) {
    const double *s = src;
    for (int64_t i = 0; i < n; i++) dst[i] = (float)s[i];
}
void usli_encode_f64(const float *src, const float *importance, void *dst, int64_t n) {
    (void)importance;
    double *d = dst;
    for (int64_t i = 0; i < n; i++) d[i] = (double)src[i];
}
