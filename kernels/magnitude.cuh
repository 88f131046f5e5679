/* linear with a magnitude (DoRA): what comes before and after the plain product. */
#ifndef USLI_KERNELS_MAGNITUDE_CUH
#define USLI_KERNELS_MAGNITUDE_CUH

#include "kernels/device.cuh"

/* y (+)= z * magnitude / norm + bias; z (tokens, out) y_dtype, packed, or y itself where that is assigned. */
usl_status usli_magnify(usli_exec *x, const usli_linear_args *a, const void *z, int64_t ldz);
/* dmagnitude += sum over tokens of dy * z / norm;  dbias += sum over tokens of dy;  dz = dy * magnitude / norm, y_dtype
 * (tokens, out) packed. z may be NULL where no dmagnitude is wanted. */
usl_status usli_magnify_backward(usli_exec *x, const usli_linear_args *a, const void *z, void *dz);

#endif
