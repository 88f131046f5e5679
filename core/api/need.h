/* What a host must give and has not is an error of its call, not a crash; a path that it refuses is not even looked at.
 */
#ifndef USLI_API_NEED_H
#define USLI_API_NEED_H

#include "core/base/ctx.h"

#define USLI_NEED(ctx, what)                                                                               \
    do {                                                                                                   \
        if (!(what)) return usli_fail((ctx), USL_ERR_INVALID, "%s: %s is NULL; give it", __func__, #what); \
    } while (0)
/* A path that the caller gives, and what is going to happen there. */
#define USLI_NEED_PATH(ctx, path, access)                         \
    do {                                                          \
        USLI_NEED(ctx, path);                                     \
        usl_status usli_may_ = usli_may((ctx), (path), (access)); \
        if (usli_may_ != USL_OK) return usli_may_;                \
    } while (0)

#endif
