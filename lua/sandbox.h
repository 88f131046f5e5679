/* What the two files of the sandbox share. */
#ifndef ULUA_SANDBOX_H
#define ULUA_SANDBOX_H

#include <pthread.h>
#include <stdatomic.h>

#include "lua/binding.h"

typedef enum usandbox_reason {
    USANDBOX_RUNS,
    USANDBOX_MEMORY,
    USANDBOX_INSTRUCTIONS,
    USANDBOX_SECONDS,
    USANDBOX_STOPPED
} usandbox_reason;

struct unsloth_sandbox {
    unsloth_sandbox_opts opts;
    char *folder; /* its real path, or NULL */
    lua_State *L;
    usl_ctx *ctx;
    atomic_size_t held;   /* bytes */
    size_t refused;       /* what Lua was refused last */
    int lua_refusals;     /* how often it was */
    atomic_int refusals;  /* of the library's requests */
    uint64_t used;        /* instructions */
    atomic_int reason;    /* usandbox_reason */
    pthread_t watcher;    /* of a run */
    pthread_mutex_t lock; /* of running */
    pthread_cond_t ended;
    bool running;
    char message[1024];
};

static inline unsloth_sandbox *usandbox_of(lua_State *L) {
    return *(unsloth_sandbox **)lua_getextraspace(L);
}
/* The first reason counts. Any thread. */
void usandbox_stop(unsloth_sandbox *box, usandbox_reason reason);
static inline bool usandbox_is_stopped(unsloth_sandbox *box) {
    return atomic_load(&box->reason) != USANDBOX_RUNS;
}
/* Raises when a limit has been passed. */
void usandbox_check(lua_State *L);

/* Replaces, in the state's global libraries, what could run for long without a hook, or leave the sandbox. globals: the
 * index of the table that chunks of scripts get. */
void usandbox_guard(lua_State *L, int globals);

#endif
