/* What a host must give and has not is an error of its call, not a crash. */
#ifndef USLI_API_NEED_H
#define USLI_API_NEED_H

#include "core/base/ctx.h"

#define USLI_NEED(ctx, what)                                                                               \
    do {                                                                                                   \
        if (!(what)) return usli_fail((ctx), USL_ERR_INVALID, "%s: %s is NULL; give it", __func__, #what); \
    } while (0)

#endif
