/* Threads. Work is cut into tasks by its shape alone, never by the number of threads, so every result has the same bits
 * on any machine with the same instruction set. */
#ifndef USLI_BASE_POOL_H
#define USLI_BASE_POOL_H

#include "core/base/ctx.h"

/* worker is 0 .. usli_pool_threads - 1 and names the thread that runs the task (for per-thread scratch only). */
typedef void (*usli_task_fn)(void *arg, int64_t task, int worker);

usl_status usli_pool_new(usl_ctx *ctx, int threads, usli_pool **out);
void usli_pool_free(usli_pool *pool);
int usli_pool_threads(const usli_pool *pool);
/* Runs fn for task 0 .. tasks - 1, on the caller and the workers; returns when all are done. Tasks cannot fail and must
 * not call this again. */
void usli_pool_run(usli_pool *pool, int64_t tasks, usli_task_fn fn, void *arg);

/* A context for each thread of ctx's pool, for tasks that need memory: each has a sentence of its own, and their memory
 * is ctx's, one of them at a time. What they took may be freed with ctx once the tasks are done. */
typedef struct usli_workers usli_workers;
usl_status usli_workers_new(usl_ctx *ctx, usli_workers **out);
usl_ctx *usli_workers_ctx(usli_workers *w, int worker);
void usli_workers_free(usli_workers *w); /* NULL is fine */

/* Calls fn(arg) while the calling thread takes no signals: they wait until it is done. Those that its own instructions
 * raise come at once, as ever. Threads of a pool take no signals in any case. */
void usli_without_signals(void (*fn)(void *arg), void *arg);

#endif
