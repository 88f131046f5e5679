/* A backend for planning: it sizes as another does, hands out memory that is not there, copies nothing and runs
 * nothing. So a model of any size can be planned on any machine, by the code that would run it. */
#ifndef USLI_OPS_PLANNED_H
#define USLI_OPS_PLANNED_H

#include "core/ops/exec.h"

/* Puts it in place of x->backend, which it closes with itself. On failure x is as before. An op that is run, or a
 * copy to the host, is USL_ERR_INVALID with a sentence. */
usl_status usli_plan_only(usli_exec *x);
/* That sentence. */
usl_status usli_refuse_planned(usl_ctx *ctx);

#endif
