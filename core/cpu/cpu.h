/* The CPU backend: complete, the reference for every other. One file an op, both passes in it. */
#ifndef USLI_CPU_CPU_H
#define USLI_CPU_CPU_H

#include "core/ops/ops.h"

/* Each op's file defines usli_cpu_NAME; cpu.c puts them into the table. */
#define USLI_OP(name) extern const usli_op_impl usli_cpu_##name;
#include "core/ops/ops.def"
#undef USLI_OP

/* Sets x up for the CPU: x->backend, x->state. x->arena is the caller's. Close with x->backend->close(x). */
usl_status usli_cpu_open(usl_ctx *ctx, usli_exec *x);

#endif
