#include "core/tensor/arena.h"

void usli_arena_init(usli_arena *a, void *base, size_t cap) {
    *a = (usli_arena){ .base = base, .cap = cap & ~(size_t)63 };
}

void usli_arena_init_dry(usli_arena *a) {
    *a = (usli_arena){ .base = USLI_NOWHERE, .cap = (SIZE_MAX / 2) & ~(size_t)63, .dry = true };
}

static bool take(usli_arena *a, size_t *bytes) {
    if (*bytes > a->cap) return false;
    *bytes = (*bytes + 63) & ~(size_t)63;
    if (*bytes > a->cap - a->low - a->high) return false;
    if (a->low + a->high + *bytes > a->peak) a->peak = a->low + a->high + *bytes;
    return true;
}

void *usli_arena_keep(usli_arena *a, size_t bytes) {
    if (!take(a, &bytes)) return NULL;
    char *p = a->base + a->low;
    a->low += bytes;
    return p;
}

void *usli_arena_scratch(usli_arena *a, size_t bytes) {
    if (!take(a, &bytes)) return NULL;
    a->high += bytes;
    return a->base + (a->cap - a->high);
}
