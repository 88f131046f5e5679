/* One block of memory for everything a pass needs, used from both ends: what lives until the backward pass grows from
 * the bottom, scratch comes and goes at the top. A dry arena hands out addresses that must not be touched and only
 * counts, so the memory plan is a dry run of the very code that will run: exact by construction. */
#ifndef USLI_TENSOR_ARENA_H
#define USLI_TENSOR_ARENA_H

#include "core/base/ctx.h"

/* What stands for memory in a dry run: never read, never written. */
#define USLI_NOWHERE ((void *)(uintptr_t)4096)

typedef struct usli_arena {
    char *base;       /* dry: a made-up address, 64-byte aligned */
    size_t cap;       /* dry: SIZE_MAX / 2 */
    size_t low, high; /* bytes used at the bottom and at the top */
    size_t peak;      /* largest low + high so far */
    bool dry;
} usli_arena;

void usli_arena_init(usli_arena *a, void *base, size_t cap);
void usli_arena_init_dry(usli_arena *a);
/* 64-byte aligned; NULL when it is full. */
void *usli_arena_keep(usli_arena *a, size_t bytes);
void *usli_arena_scratch(usli_arena *a, size_t bytes);
/* Marks are plain byte counts: `size_t m = a->high; ... a->high = m;` releases scratch taken since; likewise low. */

#endif
