/* Learning-rate schedules, as transformers defines them: rate of update `step` (from 0) = base * factor. */
#ifndef USLI_TRAIN_SCHEDULE_H
#define USLI_TRAIN_SCHEDULE_H

#include "core/base/ctx.h"

/* NULL for a name that is none. */
typedef double (*usli_schedule_fn)(int64_t step, int64_t warmup, int64_t total);
usli_schedule_fn usli_schedule_find(const char *name);
/* "linear, cosine, ...": for messages. */
void usli_schedule_list(char *buf, size_t size);

#endif
