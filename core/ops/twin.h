/* A block of host memory and the same block on the device. Where the device's memory is the host's, both are one. */
#ifndef USLI_OPS_TWIN_H
#define USLI_OPS_TWIN_H

#include "core/ops/exec.h"

typedef struct usli_twin {
    void *host; /* borrowed */
    void *device;
    size_t bytes;
} usli_twin;

/* Takes memory on the device; nothing is copied yet. The host's block must outlive the twin. */
usl_status usli_twin_open(usli_exec *x, void *host, size_t bytes, usli_twin *out);
void usli_twin_close(usli_exec *x, usli_twin *t);            /* a zeroed twin is fine */
usl_status usli_twin_push(usli_exec *x, const usli_twin *t); /* host to device */
usl_status usli_twin_pull(usli_exec *x, const usli_twin *t); /* device to host, after all that runs */

/* Where the device keeps what stands at `host` inside the block. */
static inline void *usli_twin_at(const usli_twin *t, const void *host) {
    return (char *)t->device + ((const char *)host - (const char *)t->host);
}

/* Memory of the device that has no host side; forwards USL_ERR_NOMEM. 0 bytes give NULL. */
usl_status usli_device_alloc(usli_exec *x, size_t bytes, void *out_ptr);
void usli_device_free(usli_exec *x, void *ptr); /* NULL is fine */

#endif
