#include "core/ops/twin.h"

#include <string.h>

usl_status usli_twin_open(usli_exec *x, void *host, size_t bytes, usli_twin *out) {
    *out = (usli_twin){ .host = host, .device = host, .bytes = bytes };
    if (x->backend->host) return USL_OK;
    usl_status st = usli_device_alloc(x, bytes, &out->device);
    if (st != USL_OK) *out = (usli_twin){ 0 };
    return st;
}

void usli_twin_close(usli_exec *x, usli_twin *t) {
    if (t->device != t->host) usli_device_free(x, t->device);
    *t = (usli_twin){ 0 };
}

usl_status usli_twin_push(usli_exec *x, const usli_twin *t) {
    return t->device == t->host ? USL_OK : x->backend->copy_in(x, t->device, t->host, t->bytes);
}

usl_status usli_twin_pull(usli_exec *x, const usli_twin *t) {
    return t->device == t->host ? USL_OK : x->backend->copy_out(x, t->host, t->device, t->bytes);
}

usl_status usli_device_alloc(usli_exec *x, size_t bytes, void *out_ptr) {
    void *p = bytes ? x->backend->alloc(x, bytes) : NULL;
    memcpy(out_ptr, &p, sizeof p);
    return p || !bytes ? USL_OK : usli_nomem(x->ctx, bytes);
}

void usli_device_free(usli_exec *x, void *ptr) {
    if (ptr) x->backend->free(x, ptr);
}
