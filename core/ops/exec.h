/* Where ops run: a context, a backend with its stream, an arena for scratch. */
#ifndef USLI_OPS_EXEC_H
#define USLI_OPS_EXEC_H

#include "core/tensor/arena.h"

typedef enum usli_op {
#define USLI_OP(name) USLI_OP_##name,
#include "core/ops/ops.def"
#undef USLI_OP
    USLI_OP_COUNT
} usli_op;

typedef enum usli_pass { USLI_FORWARD, USLI_BACKWARD } usli_pass;
/* How a gradient (or an output that may be a sum) is written. */
typedef enum usli_write { USLI_ASSIGN, USLI_ACCUMULATE } usli_write;

typedef struct usli_exec usli_exec;
struct usli_linear_args;

/* Slots of copies beside the work: of inputs, then of weights, which do not wait for one another. */
enum { USLI_INPUT_SLOT, USLI_WEIGHT_SLOT = 2, USLI_COPY_SLOTS = 4 };

typedef struct usli_op_impl {
    /* args: the op's struct. ws: workspace bytes of arena scratch, 64-byte aligned. */
    usl_status (*run)(usli_exec *x, void *args, usli_pass pass, void *ws);
    /* NULL: none. Depends on shapes and types alone, so a dry run counts it. */
    size_t (*workspace)(const usli_exec *x, const void *args, usli_pass pass);
} usli_op_impl;

typedef struct usli_backend {
    const char *name;                       /* "cpu", "cuda" */
    bool host;                              /* its memory is the host's: pointers are good on both sides */
    const usli_op_impl *ops[USLI_OP_COUNT]; /* NULL: not there */
    /* Memory of the device. alloc answers NULL when there is none. */
    void *(*alloc)(usli_exec *x, size_t bytes);
    void (*free)(usli_exec *x, void *ptr);
    /* copy_in: the host's memory may be used again at once. copy_out waits for all that came before. */
    usl_status (*copy_in)(usli_exec *x, void *dst, const void *host, size_t bytes);
    usl_status (*copy_out)(usli_exec *x, void *host, const void *src, size_t bytes);
    usl_status (*zero)(usli_exec *x, void *dst, size_t bytes);
    usl_status (*sync)(usli_exec *x);
    /* Host memory that the device reads and writes by itself; alloc_host answers NULL when there is none. */
    void *(*alloc_host)(usli_exec *x, size_t bytes);
    void (*free_host)(usli_exec *x, void *ptr);
    /* Copies between it and the device once all work so far is done, while later work goes on; await_copy makes later
     * work wait for the copies of a slot (below USLI_COPY_SLOTS). */
    usl_status (*copy_beside)(usli_exec *x, void *dst, const void *src, size_t bytes, int slot);
    usl_status (*await_copy)(usli_exec *x, int slot);
    /* Work between record (true: it goes on) and recorded is kept, not run; replay runs it as often as wanted, on what
     * its memory holds then. recorded answers NULL when the device would not keep it. All NULL: there is no such thing.
     */
    bool (*record)(usli_exec *x);
    void *(*recorded)(usli_exec *x);
    usl_status (*replay)(usli_exec *x, void *work);
    void (*forget)(usli_exec *x, void *work); /* NULL is fine */
    /* Bytes in use on the device by everybody, and its size, as its driver counts them; total 0: there is none, plans
     * are made for it. NULL: host memory. */
    usl_status (*memory)(usli_exec *x, size_t *used, size_t *total);
    usl_dtype (*fast_dtype)(const usli_exec *x); /* the shortest float type that it multiplies quickly */
    /* Libraries of others that its ops call, by name; a word for those that have not been needed yet is not there.
     * NULL: none. */
    const char *(*libraries)(const usli_exec *x);
    void (*close)(usli_exec *x); /* frees x->state */
} usli_backend;

struct usli_exec {
    usl_ctx *ctx;
    const usli_backend *backend;
    void *state;  /* the backend's own: caches, streams */
    void *stream; /* NULL on the CPU */
    void *comm;   /* communicator of several devices, or NULL */
    usli_arena *arena;
    uint64_t matmul_flops; /* counted by linear and attention, also when dry: for the benchmark's share of peak */
    /* Sees every linear op's inputs when its forward pass has run; NULL: nobody looks. */
    void (*observe)(usli_exec *x, const struct usli_linear_args *args);
    void *observer;
};

/* A piece of the arena, kept (low end) or scratch (high end); forwards USL_ERR_NOMEM. 0 bytes give NULL and are fine.
 */
#define USLI_TAKE(ptr, x, keep, bytes)                                                                          \
    do {                                                                                                        \
        size_t usli_bytes_ = (bytes);                                                                           \
        (ptr) = !usli_bytes_ ? NULL : ((keep) ? usli_arena_keep : usli_arena_scratch)((x)->arena, usli_bytes_); \
        if (!(ptr) && usli_bytes_) return usli_nomem((x)->ctx, usli_bytes_);                                    \
    } while (0)

/* Checks the args once, takes the workspace, runs; with a dry arena it stops before running. */
usl_status usli_run(usli_exec *x, usli_op op, void *args, usli_pass pass);

#endif
