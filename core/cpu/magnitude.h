/* linear with a magnitude (DoRA): what comes before and after the plain product. */
#ifndef USLI_CPU_MAGNITUDE_H
#define USLI_CPU_MAGNITUDE_H

#include "core/ops/ops.h"

/* Bytes of `room`: z, float32 (tokens, out), and for backward also dy of the plain product, y_dtype (tokens, out). */
size_t usli_magnitude_room(const usli_linear_args *a, usli_pass pass);
/* The plain op that makes z in room, or takes its dy from there. segment: room for the segments. */
usli_linear_args usli_without_magnitude(const usli_linear_args *a, usli_segment *segment, usli_pass pass, void *room);
/* Whether a gradient of a magnitude is wanted. */
bool usli_wants_magnitude(const usli_linear_args *a);
/* y (+)= z * magnitude / norm + bias */
void usli_magnify(usli_exec *x, const usli_linear_args *a, void *room);
/* The gradients of magnitudes, from z, and of biases; dy of the plain product. */
void usli_magnify_backward(usli_exec *x, const usli_linear_args *a, void *room);

#endif
