#include "core/ops/planned.h"

typedef struct planned {
    usli_backend backend; /* first: what the exec points to */
    const usli_backend *real;
    usli_op_impl ops[USLI_OP_COUNT];
} planned;

usl_status usli_refuse_planned(usl_ctx *ctx) {
    return usli_fail(ctx, USL_ERR_INVALID,
                     "the model was opened for planning and holds no weights; open it with plan_only = false");
}

static usl_status no_run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)args, (void)pass, (void)ws;
    return usli_refuse_planned(x->ctx);
}

static void *no_alloc(usli_exec *x, size_t bytes) {
    (void)x, (void)bytes;
    return USLI_NOWHERE;
}

static void no_free(usli_exec *x, void *ptr) {
    (void)x, (void)ptr;
}

static usl_status no_copy_in(usli_exec *x, void *dst, const void *host, size_t bytes) {
    (void)x, (void)dst, (void)host, (void)bytes;
    return USL_OK;
}

static usl_status no_copy_out(usli_exec *x, void *host, const void *src, size_t bytes) {
    (void)host, (void)src, (void)bytes;
    return usli_refuse_planned(x->ctx);
}

static usl_status no_zero(usli_exec *x, void *dst, size_t bytes) {
    (void)x, (void)dst, (void)bytes;
    return USL_OK;
}

static usl_status no_wait(usli_exec *x) {
    (void)x;
    return USL_OK;
}

static usl_status no_copy_beside(usli_exec *x, void *dst, const void *src, size_t bytes, int slot) {
    (void)slot;
    return no_copy_in(x, dst, src, bytes);
}

static usl_status no_await(usli_exec *x, int slot) {
    (void)slot;
    return no_wait(x);
}

static void close_planned(usli_exec *x) {
    planned *p = (planned *)(uintptr_t)x->backend;
    x->backend = p->real;
    x->backend->close(x);
    usli_free(x->ctx, p);
}

usl_status usli_plan_only(usli_exec *x) {
    planned *p = usli_malloc(x->ctx, sizeof *p);
    if (!p) return usli_nomem(x->ctx, sizeof *p);
    p->real = x->backend;
    p->backend = *p->real;
    for (int i = 0; i < USLI_OP_COUNT; i++) {
        if (!p->real->ops[i]) continue;
        p->ops[i] = (usli_op_impl){ no_run, p->real->ops[i]->workspace };
        p->backend.ops[i] = &p->ops[i];
    }
    p->backend.alloc = p->backend.alloc_host = no_alloc;
    p->backend.free = p->backend.free_host = no_free;
    p->backend.copy_in = no_copy_in;
    p->backend.copy_out = no_copy_out;
    p->backend.zero = no_zero;
    p->backend.sync = no_wait;
    p->backend.copy_beside = no_copy_beside;
    p->backend.await_copy = no_await;
    p->backend.close = close_planned;
    x->backend = &p->backend;
    return USL_OK;
}
