/* linear's forward pass for a few tokens, as in generation: rows of the weight are decoded one at a time and multiplied
 * at once, never the whole matrix. */
#ifndef USLI_CPU_GEMV_H
#define USLI_CPU_GEMV_H

#include "core/ops/ops.h"

enum { USLI_GEMV_TOKENS = 8 };

bool usli_gemv_fits(const usli_linear_args *a);
size_t usli_gemv_workspace(const usli_linear_args *a);
void usli_gemv_run(usli_exec *x, const usli_linear_args *a, void *ws);

#endif
