/* Added tokens: spellings that become their id wherever they stand in a text. */
#include <stdlib.h>
#include <string.h>

#include "core/text/parts.h"

void usli_added_free(usl_ctx *ctx, usli_added_set *set) {
    for (size_t i = 0; i < set->count; i++)
        if (set->items[i].owned) usli_free(ctx, (char *)set->items[i].text);
    usli_free(ctx, set->items);
    memset(set, 0, sizeof *set);
}

usl_status usli_added_add(usl_ctx *ctx, usli_added_set *set, const usli_added *token) {
    USLI_TRY(usli_grow(ctx, &set->items, &set->cap, set->count + 1, sizeof *set->items));
    set->items[set->count++] = *token;
    return USL_OK;
}

static int by_bytes(const void *pa, const void *pb) {
    const usli_added *a = pa, *b = pb;
    int order = memcmp(a->text, b->text, a->len < b->len ? a->len : b->len);
    return order ? order : (a->len > b->len) - (a->len < b->len);
}

void usli_added_index(usli_added_set *set) {
    if (set->count) qsort(set->items, set->count, sizeof *set->items, by_bytes);
    size_t i = 0;
    for (int c = 0; c <= 256; c++) {
        while (i < set->count && (unsigned char)set->items[i].text[0] < c) i++;
        set->first[c] = i;
    }
}

/* The longest token at the start of text, NULL when there is none. Items that share a beginning stand together, the
 * shortest first, so every byte narrows the range. */
static const usli_added *longest(const usli_added_set *set, const char *text, size_t len) {
    unsigned char c = (unsigned char)text[0];
    size_t lo = set->first[c], hi = set->first[c + 1];
    const usli_added *best = NULL;
    for (size_t depth = 1; lo < hi; depth++) {
        for (; lo < hi && set->items[lo].len == depth; lo++) best = &set->items[lo];
        if (depth >= len) break;
        c = (unsigned char)text[depth];
        size_t a = lo, b = hi;
        while (a < b) {
            size_t mid = a + (b - a) / 2;
            if ((unsigned char)set->items[mid].text[depth] < c)
                a = mid + 1;
            else
                b = mid;
        }
        size_t end = a;
        for (b = hi; end < b;) {
            size_t mid = end + (b - end) / 2;
            if ((unsigned char)set->items[mid].text[depth] <= c)
                end = mid + 1;
            else
                b = mid;
        }
        lo = a;
        hi = end;
    }
    return best;
}

static size_t char_before(const char *text, size_t at) {
    do at--;
    while (at && ((unsigned char)text[at] & 0xC0) == 0x80);
    return at;
}

static usl_status add(usl_ctx *ctx, usli_segments *out, size_t start, size_t end, int32_t id) {
    USLI_TRY(usli_grow(ctx, &out->items, &out->cap, out->count + 1, sizeof *out->items));
    out->items[out->count++] = (usli_segment){ start, end, id };
    return USL_OK;
}

static bool stands_alone(const char *text, size_t len, size_t start, size_t end) {
    if (start && usli_is_word(usli_utf8_get(text + char_before(text, start)))) return false;
    return end == len || !usli_is_word(usli_utf8_get(text + end));
}

usl_status usli_added_split(usl_ctx *ctx, const usli_added_set *set, const char *text, size_t len, usli_segments *out) {
    size_t done = 0;
    out->count = 0;
    for (size_t at = 0; set->count && at < len;) {
        unsigned char c = (unsigned char)text[at];
        const usli_added *t = set->first[c] < set->first[c + 1] ? longest(set, text + at, len - at) : NULL;
        if (!t) {
            at++;
            continue;
        }
        size_t start = at, end = at + t->len;
        at = end;
        if (t->single_word && !stands_alone(text, len, start, end)) continue;
        if (t->lstrip)
            while (start > done) {
                size_t before = char_before(text, start);
                if (!usli_is_space(usli_utf8_get(text + before))) break;
                start = before;
            }
        if (t->rstrip)
            while (end < len && usli_is_space(usli_utf8_get(text + end))) end += usli_utf8_step(text[end]);
        /* A token of spaces may have been taken by the one before it. */
        if (start < done) start = done;
        if (end < start) end = start;
        if (start > done) USLI_TRY(add(ctx, out, done, start, -1));
        USLI_TRY(add(ctx, out, start, end, t->id));
        done = end;
    }
    return done < len ? add(ctx, out, done, len, -1) : USL_OK;
}
