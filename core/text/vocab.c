/* Spellings to ids, pairs of ids to merges: open addressing, at most half full. */
#include <string.h>

#include "core/text/parts.h"

static uint64_t mix(uint64_t x) {
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93u;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93u;
    return x ^ x >> 32;
}

uint64_t usli_hash_bytes(const char *text, size_t len) {
    uint64_t h = 0x9e3779b97f4a7c15u ^ len, word = 0;
    const char *end = text + len;
    for (; end - text > 8; text += 8) {
        memcpy(&word, text, 8);
        h = mix(h ^ word);
    }
    /* The last bytes may be read twice: that is quicker than a copy of unknown length. */
    if (len >= 8) {
        memcpy(&word, end - 8, 8);
    } else if (len >= 4) {
        uint32_t low, high;
        memcpy(&low, text, 4);
        memcpy(&high, end - 4, 4);
        word = (uint64_t)high << 32 | low;
    } else if (len) {
        word = (uint64_t)(unsigned char)text[0] << 16 | (uint64_t)(unsigned char)text[len / 2] << 8 |
               (unsigned char)end[-1];
    }
    return mix(h ^ word);
}

void usli_vocab_free(usl_ctx *ctx, usli_vocab *v) {
    usli_free(ctx, v->blob.data);
    usli_free(ctx, v->entries);
    usli_free(ctx, v->slots);
    memset(v, 0, sizeof *v);
}

/* The slot where this spelling is or would be. */
static size_t vocab_slot(const usli_vocab *v, const char *text, size_t len) {
    uint64_t hash = usli_hash_bytes(text, len);
    size_t mask = v->slot_count - 1, i = hash & mask;
    for (; v->slots[2 * i]; i = (i + 1) & mask) {
        if (v->slots[2 * i + 1] != (uint32_t)(hash >> 32)) continue;
        const usli_entry *e = &v->entries[v->slots[2 * i] - 1];
        if (e->len == len && memcmp(v->blob.data + e->at, text, len) == 0) break;
    }
    return i;
}

static void vocab_put(usli_vocab *v, size_t slot, const char *text, size_t len, uint32_t id) {
    v->slots[2 * slot] = id + 1;
    v->slots[2 * slot + 1] = (uint32_t)(usli_hash_bytes(text, len) >> 32);
}

static usl_status vocab_widen(usl_ctx *ctx, usli_vocab *v, size_t least) {
    size_t old_count = v->slot_count, count = old_count ? old_count * 2 : 1024;
    while (count < least) count *= 2;
    uint32_t *old = v->slots, *slots = usli_calloc(ctx, count, 2 * sizeof *slots);
    if (!slots) return usli_nomem(ctx, count * 2 * sizeof *slots);
    v->slots = slots;
    v->slot_count = count;
    for (size_t i = 0; i < old_count; i++)
        if (old[2 * i]) {
            const usli_entry *e = &v->entries[old[2 * i] - 1];
            const char *text = v->blob.data + e->at;
            vocab_put(v, vocab_slot(v, text, e->len), text, e->len, old[2 * i] - 1);
        }
    usli_free(ctx, old);
    return USL_OK;
}

usl_status usli_vocab_reserve(usl_ctx *ctx, usli_vocab *v, size_t count) {
    if (count > SIZE_MAX / 64) return usli_nomem(ctx, SIZE_MAX);
    USLI_TRY(usli_grow(ctx, &v->entries, &v->cap, count, sizeof *v->entries));
    return 2 * count < v->slot_count ? USL_OK : vocab_widen(ctx, v, 2 * count + 1);
}

void usli_vocab_expect(const usli_vocab *v, const char *text, size_t len) {
    __builtin_prefetch(&v->slots[2 * (usli_hash_bytes(text, len) & (v->slot_count - 1))], 1);
}

usl_status usli_vocab_add(usl_ctx *ctx, usli_vocab *v, const char *text, size_t len, int64_t id, bool last_wins) {
    int shown = (int)(len < 100 ? len : 100);
    /* Ids may leave holes, yet a small file must not ask for a large table. */
    if (id < 0 || (uint64_t)id > 16 * (uint64_t)v->used + 65536)
        return usli_fail(ctx, USL_ERR_FORMAT, "token \"%.*s\" has the id %lld, which is out of range", shown, text,
                         (long long)id);
    if (v->used * 2 >= v->slot_count) USLI_TRY(vocab_widen(ctx, v, 0));
    size_t slot = vocab_slot(v, text, len);
    if (v->slots[2 * slot] && !last_wins)
        return usli_fail(ctx, USL_ERR_FORMAT, "token \"%.*s\" stands in the vocabulary twice", shown, text);
    size_t need = (size_t)id + 1;
    if (need > v->count) {
        USLI_TRY(usli_grow(ctx, &v->entries, &v->cap, need, sizeof *v->entries));
        memset(v->entries + v->count, 0, (need - v->count) * sizeof *v->entries);
        for (size_t i = v->count; i < need; i++) v->entries[i].kind = USLI_TOKEN_UNUSED;
        v->count = need;
    }
    usli_entry *e = &v->entries[id];
    if (e->used)
        return usli_fail(ctx, USL_ERR_FORMAT, "tokens \"%.100s\" and \"%.*s\" have the same id %lld",
                         v->blob.data + e->at, shown, text, (long long)id);
    *e = (usli_entry){ v->blob.len, len, 0, USLI_TOKEN_NORMAL, true, false };
    USLI_TRY(usli_grow(ctx, &v->blob.data, &v->blob.cap, v->blob.len + len + 1, 1));
    if (len) memcpy(v->blob.data + v->blob.len, text, len);
    v->blob.data[v->blob.len + len] = 0;
    v->blob.len += len + 1;
    vocab_put(v, slot, text, len, (uint32_t)id);
    v->used++;
    return USL_OK;
}

usl_status usli_vocab_rename(usl_ctx *ctx, usli_vocab *v, int32_t id, const char *text, size_t len) {
    usli_entry *e = &v->entries[id];
    USLI_TRY(usli_grow(ctx, &v->blob.data, &v->blob.cap, v->blob.len + len + 1, 1));
    /* The old spelling's slot stays: its entry no longer reads so. The new one's counts, or the table could fill up. */
    if (v->used * 2 >= v->slot_count) USLI_TRY(vocab_widen(ctx, v, 0));
    size_t slot = vocab_slot(v, text, len);
    memcpy(v->blob.data + v->blob.len, text, len);
    v->blob.data[v->blob.len + len] = 0;
    e->at = v->blob.len;
    e->len = len;
    v->blob.len += len + 1;
    vocab_put(v, slot, text, len, (uint32_t)id);
    v->used++;
    return USL_OK;
}

int32_t usli_vocab_find(const usli_vocab *v, const char *text, size_t len) {
    return v->slot_count ? (int32_t)v->slots[2 * vocab_slot(v, text, len)] - 1 : -1;
}

/* ---- Merges
 * -------------------------------------------------------------------------------------------------------------- */

void usli_merges_free(usl_ctx *ctx, usli_merges *m) {
    usli_free(ctx, m->pairs);
    usli_free(ctx, m->slots);
    usli_free(ctx, m->maybe);
    memset(m, 0, sizeof *m);
}

usl_status usli_merges_add(usl_ctx *ctx, usli_merges *m, int32_t left, int32_t right, int32_t result) {
    USLI_TRY(usli_grow(ctx, &m->pairs, &m->cap, m->count + 1, 3 * sizeof *m->pairs));
    int32_t *p = m->pairs + 3 * m->count++;
    p[0] = left;
    p[1] = right;
    p[2] = result;
    return USL_OK;
}

static unsigned bits_for(size_t count) {
    unsigned bits = 5;
    while (((size_t)1 << bits) < count) bits++;
    return bits;
}

/* The table is larger than the processor's caches: places are asked for before they are needed. */
enum { AHEAD = 12 };

usl_status usli_merges_index(usl_ctx *ctx, usli_merges *m) {
    unsigned bits = bits_for(m->count + m->count / 2), maybe_bits = bits_for(8 * m->count);
    size_t count = (size_t)1 << bits, words = ((size_t)1 << maybe_bits) / 32;
    m->slots = usli_calloc(ctx, count, sizeof *m->slots);
    m->maybe = usli_calloc(ctx, words, sizeof *m->maybe);
    if (!m->slots || !m->maybe) return usli_nomem(ctx, count * sizeof *m->slots);
    m->slot_count = count;
    m->slot_shift = 64 - bits;
    m->maybe_shift = 64 - maybe_bits;
    for (size_t i = 0; i < m->count; i++) {
        const int32_t *p = m->pairs + 3 * i, *later = m->pairs + 3 * (i + AHEAD < m->count ? i + AHEAD : i);
        __builtin_prefetch(&m->slots[usli_merge_hash(later[0], later[1]) >> m->slot_shift], 1);
        uint64_t hash = usli_merge_hash(p[0], p[1]);
        size_t bit = hash >> m->maybe_shift, at = hash >> m->slot_shift;
        m->maybe[bit / 32] |= (uint32_t)1 << (bit & 31);
        while (m->slots[at].rank1 && (m->slots[at].left != p[0] || m->slots[at].right != p[1]))
            at = (at + 1) & (count - 1);
        m->slots[at] = (usli_merge){ p[0], p[1], p[2], (uint32_t)i + 1 };
    }
    return USL_OK;
}
