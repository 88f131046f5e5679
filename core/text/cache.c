/* What a large tokenizer.json came to, kept for the next time: its tokens, its merges as ids, and what else it says.
 * The file goes by the path that was read and holds a hash of its bytes, so another tokenizer.json under the same path
 * is read anew. What it gives goes through the same doors as what the JSON gives, so that a broken or a hostile one can
 * do no harm beyond wrong tokens; whoever can write it can write the user's tokenizers too. Nothing here is an error.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/text/parts.h"

enum { LEAST = 1 << 18 }; /* bytes: smaller ones are read in no time */

/* Then come the tokens (id and length), the merges (three ids), the spellings and the rest of the JSON. */
typedef struct head {
    uint64_t magic, path, size, source; /* hashes, and the size of the file that was read */
    uint64_t tokens, merges, spellings, rest, sum;
} head;
typedef struct token {
    int32_t id;
    uint32_t len;
} token;
static const uint64_t MAGIC = 0x31306e656b6f7455; /* another byte order reads another number */

/* ---- Where --------------------------------------------------------------------------------------------------------
 */

static const char *env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

/* "FOLDER/tokenizers/HASH", new; NULL: there is no cache. A host that is asked about files is spared another one. */
static char *place(usl_ctx *ctx, const char *path, size_t source_size, bool make) {
    const char *given = env("UNSLOTH_LUA_CACHE"), *xdg = env("XDG_CACHE_HOME"), *home = env("HOME");
    const char *parts[4] = { given, "", "", "/tokenizers" };
    char name[32];
    usli_buf dir = { 0 };
    if (ctx->access_fn || source_size < LEAST || (given && strcmp(given, "0") == 0)) return NULL;
    if (!given && xdg && *xdg == '/') {
        parts[0] = xdg;
        parts[1] = "/unsloth-lua";
    } else if (!given && home) {
        parts[0] = home;
        parts[1] = "/.cache";
        parts[2] = "/unsloth-lua";
    }
    if (!parts[0]) return NULL;
    usl_status st = USL_OK;
    for (int i = 0; i < 4 && st == USL_OK; i++) st = usli_buf_text(ctx, &dir, parts[i]);
    if (st == USL_OK && make) st = usli_make_dirs(ctx, dir.data);
    snprintf(name, sizeof name, "%016llx", (unsigned long long)usli_hash_bytes(path, strlen(path)));
    char *out = st == USL_OK ? usli_path_join(ctx, dir.data, name) : NULL;
    usli_free(ctx, dir.data);
    return out;
}

/* What was said last before a call that may fail in silence. */
typedef struct said {
    char text[sizeof((usl_ctx *)0)->errmsg];
    usl_status code;
} said;

static said keep_said(const usl_ctx *ctx) {
    said s = { .code = ctx->errcode };
    memcpy(s.text, ctx->errmsg, sizeof s.text);
    return s;
}

static void say_again(usl_ctx *ctx, const said *s) {
    ctx->errcode = s->code;
    memcpy(ctx->errmsg, s->text, sizeof s->text);
}

/* ---- Reading ------------------------------------------------------------------------------------------------------
 */

/* Whether the parts fill the file; each is at most its size, so that nothing overflows. */
static bool fits(const head *h, size_t size) {
    if (h->magic != MAGIC || h->tokens > size || h->merges > size || h->spellings > size || h->rest > size)
        return false;
    return h->tokens * sizeof(token) + h->merges * 3 * sizeof(int32_t) + h->spellings + h->rest == size - sizeof *h;
}

static token token_at(const char *from, uint64_t i) {
    token t;
    memcpy(&t, from + i * sizeof t, sizeof t);
    return t;
}

static usl_status take_tokens(usl_ctx *ctx, usli_vocab *v, const head *h, const char *from, const char *text) {
    const char *end = text + h->spellings, *later = text;
    enum { AHEAD = 12 };
    size_t broken;
    USLI_TRY(usli_vocab_reserve(ctx, v, h->tokens));
    for (uint64_t i = 0, k = 0; i < h->tokens; i++) {
        for (token t; k < h->tokens && k < i + AHEAD; k++) {
            t = token_at(from, k);
            if (t.len > (size_t)(end - later)) return USL_ERR_FORMAT;
            usli_vocab_expect(v, later, t.len);
            later += t.len;
        }
        token t = token_at(from, i);
        if (usli_utf8_valid(text, t.len, &broken) != t.len) return USL_ERR_FORMAT;
        USLI_TRY(usli_vocab_add(ctx, v, text, t.len, t.id, false));
        text += t.len;
    }
    return USL_OK;
}

static usl_status take_merges(usl_ctx *ctx, usli_tokenizer *tok, const head *h, const char *from) {
    usli_merges *m = &tok->merges;
    size_t bytes = h->merges * 3 * sizeof *m->pairs;
    USLI_TRY(usli_grow(ctx, &m->pairs, &m->cap, h->merges, 3 * sizeof *m->pairs));
    memcpy(m->pairs, from, bytes);
    m->count = h->merges;
    for (size_t i = 0; i < 3 * m->count; i++) {
        int32_t id = m->pairs[i];
        if (id < 0 || (size_t)id >= tok->vocab.count || !tok->vocab.entries[id].used) return USL_ERR_FORMAT;
    }
    return USL_OK;
}

static usl_status take(usl_ctx *ctx, usli_tokenizer *tok, const head *h, const char *data, usli_buf *rest) {
    const char *merges = data + h->tokens * sizeof(token), *text = merges + h->merges * 3 * sizeof(int32_t);
    USLI_TRY(take_tokens(ctx, &tok->vocab, h, data, text));
    USLI_TRY(take_merges(ctx, tok, h, merges));
    return usli_buf_add(ctx, rest, text + h->spellings, h->rest);
}

bool usli_cache_load(usl_ctx *ctx, usli_tokenizer *tok, const char *path, usli_buf *rest) {
    said before = keep_said(ctx);
    char *data = NULL, *file = place(ctx, path, tok->source->size, false);
    size_t size;
    head h;
    if (!file) return false;
    usl_status st = usli_is_file(file) ? usli_read_file(ctx, file, &data, &size) : USL_ERR_NOT_FOUND;
    if (st == USL_OK && size >= sizeof h) {
        memcpy(&h, data, sizeof h);
        const char *after = data + sizeof h;
        bool good = fits(&h, size) && h.size == tok->source->size && h.path == usli_hash_bytes(path, strlen(path)) &&
                    h.sum == usli_hash_bytes(after, size - sizeof h) &&
                    h.source == usli_hash_bytes((const char *)tok->source->data, tok->source->size);
        st = good ? take(ctx, tok, &h, after, rest) : USL_ERR_FORMAT;
        if (st != USL_OK) {
            usli_vocab_free(ctx, &tok->vocab);
            usli_merges_free(ctx, &tok->merges);
            rest->len = 0;
        }
    } else {
        st = USL_ERR_NOT_FOUND;
    }
    say_again(ctx, &before);
    usli_free(ctx, data);
    usli_free(ctx, file);
    return st == USL_OK;
}

/* ---- Writing ------------------------------------------------------------------------------------------------------
 */

static usl_status put_tokens(usl_ctx *ctx, const usli_vocab *v, head *h, usli_buf *out) {
    for (size_t id = 0; id < v->count; id++) {
        token t = { (int32_t)id, (uint32_t)v->entries[id].len };
        if (!v->entries[id].used) continue;
        USLI_TRY(usli_buf_add(ctx, out, (const char *)&t, sizeof t));
        h->tokens++;
    }
    return USL_OK;
}

static usl_status put_spellings(usl_ctx *ctx, const usli_vocab *v, head *h, usli_buf *out) {
    for (size_t id = 0; id < v->count; id++) {
        const usli_entry *e = &v->entries[id];
        if (!e->used) continue;
        USLI_TRY(usli_buf_add(ctx, out, v->blob.data + e->at, e->len));
        h->spellings += e->len;
    }
    return USL_OK;
}

/* The JSON without its vocabulary and its merges. */
static usl_status put_rest(usl_ctx *ctx, const usli_map *source, const usli_cut *cuts, head *h, usli_buf *out) {
    const char *at = (const char *)source->data, *end = at + source->size;
    size_t before = out->len;
    int first = cuts[1].from && cuts[1].from < cuts[0].from;
    for (int i = 0; i < 2; i++) {
        const usli_cut *c = &cuts[i ? !first : first];
        if (!c->from) continue;
        USLI_TRY(usli_buf_add(ctx, out, at, (size_t)(c->from - at)));
        USLI_TRY(usli_buf_text(ctx, out, c == cuts ? "{}" : "[]"));
        at = c->to;
    }
    USLI_TRY(usli_buf_add(ctx, out, at, (size_t)(end - at)));
    h->rest = out->len - before;
    return USL_OK;
}

static usl_status write_unsynced(usl_ctx *ctx, const char *file, const usli_buf *b) {
    usli_writer *w;
    USLI_TRY(usli_writer_open(ctx, file, &w));
    usli_writer_leave_unsynced(w);
    usl_status st = usli_writer_write(w, b->data, b->len);
    if (st == USL_OK) st = usli_writer_commit(w);
    usli_writer_close(w);
    return st;
}

static usl_status put_all(usl_ctx *ctx, const usli_tokenizer *tok, const usli_cut *cuts, head *h, usli_buf *b) {
    const usli_merges *m = &tok->merges;
    h->merges = m->count;
    USLI_TRY(usli_buf_add(ctx, b, (const char *)h, sizeof *h));
    USLI_TRY(put_tokens(ctx, &tok->vocab, h, b));
    USLI_TRY(usli_buf_add(ctx, b, (const char *)m->pairs, m->count * 3 * sizeof *m->pairs));
    USLI_TRY(put_spellings(ctx, &tok->vocab, h, b));
    USLI_TRY(put_rest(ctx, tok->source, cuts, h, b));
    h->source = usli_hash_bytes((const char *)tok->source->data, tok->source->size);
    h->sum = usli_hash_bytes(b->data + sizeof *h, b->len - sizeof *h);
    memcpy(b->data, h, sizeof *h);
    return USL_OK;
}

void usli_cache_store(usl_ctx *ctx, const usli_tokenizer *tok, const char *path, const usli_cut cuts[2]) {
    said before = keep_said(ctx);
    usli_buf b = { 0 };
    char *file = place(ctx, path, tok->source->size, true);
    head h = { .magic = MAGIC, .path = usli_hash_bytes(path, strlen(path)), .size = tok->source->size };
    if (file && put_all(ctx, tok, cuts, &h, &b) == USL_OK) (void)write_unsynced(ctx, file, &b);
    say_again(ctx, &before);
    usli_free(ctx, b.data);
    usli_free(ctx, file);
}
