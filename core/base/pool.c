#define _GNU_SOURCE
#include "core/base/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

enum { MAX_THREADS = 256, SPINS = 4000 };

struct usli_pool {
    usl_ctx *ctx;
    int threads; /* the caller included */
    pthread_t thread[MAX_THREADS];
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    bool quit;
    /* The job: generation moves when a new one is set; next hands out tasks; busy counts workers still inside. */
    atomic_uint generation;
    usli_task_fn fn;
    void *arg;
    int64_t tasks;
    atomic_llong next;
    atomic_int busy;
    atomic_int started;
};

static void drain(usli_pool *p, int worker) {
    for (;;) {
        int64_t task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (task >= p->tasks) return;
        p->fn(p->arg, task, worker);
    }
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void *worker_main(void *arg) {
    usli_pool *p = arg;
    int worker = atomic_fetch_add(&p->started, 1);
    unsigned seen = 0;
    for (;;) {
        /* Spin a moment, since ops follow each other closely, then sleep: a spinner would cost another process a core.
         */
        for (int i = 0; i < SPINS && atomic_load_explicit(&p->generation, memory_order_acquire) == seen; i++) relax();
        pthread_mutex_lock(&p->lock);
        while (atomic_load(&p->generation) == seen && !p->quit) pthread_cond_wait(&p->wake, &p->lock);
        bool quit = p->quit;
        seen = atomic_load(&p->generation);
        pthread_mutex_unlock(&p->lock);
        if (quit) return NULL;
        drain(p, worker);
        if (atomic_fetch_sub(&p->busy, 1) == 1) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->idle);
            pthread_mutex_unlock(&p->lock);
        }
    }
}

static int default_threads(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

usl_status usli_pool_new(usl_ctx *ctx, int threads, usli_pool **out) {
    *out = NULL;
    if (threads <= 0) threads = default_threads();
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    usli_pool *p = usli_calloc(ctx, 1, sizeof *p);
    if (!p) return usli_nomem(ctx, sizeof *p);
    p->ctx = ctx;
    p->threads = 1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->idle, NULL);
    atomic_init(&p->started, 1);
    /* Signals belong to the host's threads. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    /* A machine that gives fewer threads than asked still works. */
    while (p->threads < threads && pthread_create(&p->thread[p->threads], NULL, worker_main, p) == 0) p->threads++;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    *out = p;
    return USL_OK;
}

void usli_pool_free(usli_pool *p) {
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    p->quit = true;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->idle);
    usli_free(p->ctx, p);
}

int usli_pool_threads(const usli_pool *p) {
    return p->threads;
}

void usli_pool_run(usli_pool *p, int64_t tasks, usli_task_fn fn, void *arg) {
    if (tasks <= 0) return;
    if (p->threads == 1 || tasks == 1) {
        for (int64_t i = 0; i < tasks; i++) fn(arg, i, 0);
        return;
    }
    pthread_mutex_lock(&p->lock);
    p->fn = fn;
    p->arg = arg;
    p->tasks = tasks;
    atomic_store(&p->next, 0);
    atomic_store(&p->busy, p->threads - 1);
    atomic_fetch_add_explicit(&p->generation, 1, memory_order_release);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    drain(p, 0);
    for (int i = 0; i < SPINS && atomic_load_explicit(&p->busy, memory_order_acquire) > 0; i++) relax();
    pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->busy) > 0) pthread_cond_wait(&p->idle, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

struct usli_workers {
    usl_ctx *ctx;
    pthread_mutex_t lock;
    usl_ctx lent[];
};

/* The allocator that the context was given need not stand several threads. */
static void *locked_realloc(void *ud, void *ptr, size_t size) {
    usli_workers *w = ud;
    pthread_mutex_lock(&w->lock);
    void *out = NULL;
    if (size)
        out = usli_realloc(w->ctx, ptr, size);
    else
        usli_free(w->ctx, ptr);
    pthread_mutex_unlock(&w->lock);
    return out;
}

usl_status usli_workers_new(usl_ctx *ctx, usli_workers **out) {
    size_t bytes = sizeof(usli_workers) + (size_t)ctx->pool->threads * sizeof(usl_ctx);
    usli_workers *w = usli_calloc(ctx, 1, bytes);
    *out = w;
    if (!w) return usli_nomem(ctx, bytes);
    w->ctx = ctx;
    pthread_mutex_init(&w->lock, NULL);
    for (int i = 0; i < ctx->pool->threads; i++) {
        w->lent[i].realloc_fn = locked_realloc;
        w->lent[i].realloc_ud = w;
        atomic_init(&w->lent[i].refs, 1);
    }
    return USL_OK;
}

usl_ctx *usli_workers_ctx(usli_workers *w, int worker) {
    return &w->lent[worker];
}

void usli_workers_free(usli_workers *w) {
    if (!w) return;
    pthread_mutex_destroy(&w->lock);
    usli_free(w->ctx, w);
}

void usli_without_signals(void (*fn)(void *arg), void *arg) {
    static const int OF_ITS_OWN[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP };
    sigset_t deferred, before;
    sigfillset(&deferred);
    for (size_t i = 0; i < sizeof OF_ITS_OWN / sizeof *OF_ITS_OWN; i++) sigdelset(&deferred, OF_ITS_OWN[i]);
    pthread_sigmask(SIG_BLOCK, &deferred, &before);
    fn(arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
