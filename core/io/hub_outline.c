/* What a repository holds, without its weights: of those only the headers come, by requests for the first bytes. */
#include <string.h>

#include "core/base/store.h"
#include "core/io/gguf.h"
#include "core/io/http.h"
#include "core/io/hub.h"
#include "core/io/json.h"

enum { FIRST = 1 << 16, HEADER_LIMIT = 1 << 27 }; /* bytes: of the first request; of what a header may have */

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), k = strlen(end);
    return n >= k && strcmp(text + n - k, end) == 0;
}

static bool is_weights(const char *name) {
    return ends_with(name, ".safetensors") || ends_with(name, ".gguf");
}

static char *place(usl_ctx *ctx, const char *dir, const char *name) {
    const char *slash = strrchr(name, '/');
    return usli_path_join(ctx, dir, slash ? slash + 1 : name);
}

/* ---- The first bytes of a file ---- */

typedef struct start {
    usl_ctx *ctx;
    char *data;
    size_t len, wanted;
    bool enough; /* more came than was asked for: the server knows no ranges */
} start;

static usl_status on_bytes(void *ud, uint64_t at, const void *data, size_t size) {
    start *s = ud;
    if (at > s->len) return usli_fail(s->ctx, USL_ERR_IO, "bytes came that were not asked for");
    size_t room = s->wanted - (size_t)at, n = size < room ? size : room;
    memcpy(s->data + at, data, n);
    s->len = (size_t)at + n;
    s->enough = size > room;
    return s->enough ? USL_ERR_CANCELLED : USL_OK;
}

static usl_status read_start(usli_hub *hub, usli_http *http, const char *name, size_t wanted, start *s) {
    usl_ctx *ctx = hub->ctx;
    char *escaped = usli_hub_escape(ctx, name, false), *grown = usli_realloc(ctx, s->data, wanted);
    usli_request r = { .method = "GET",
                       .token = hub->token,
                       .follow = true,
                       .limit = wanted,
                       .receive = on_bytes,
                       .ud = s,
                       .headers = { "Accept-Encoding: identity" } };
    if (grown) s->data = grown;
    s->len = 0;
    s->wanted = wanted;
    s->enough = false;
    if (escaped) r.url = usli_hub_format(ctx, "%s/%s/resolve/%s/%s", hub->endpoint, hub->repo, hub->commit, escaped);
    usl_status st = grown && r.url ? usli_http_run(http, &r, 1, true, NULL, NULL) : usli_nomem(ctx, wanted);
    if (st != USL_OK && s->enough) st = USL_OK;
    if (st == USL_OK && !s->enough && !usli_http_good(&r)) st = usli_hub_refused(hub, &r, name);
    if (st == USL_OK && s->len < wanted)
        st = usli_fail(ctx, USL_ERR_IO, "%s %s: %zu bytes came where %zu were asked for; try again", hub->repo, name,
                       s->len, wanted);
    usli_free(ctx, escaped);
    usli_request_clear(ctx, &r);
    return st;
}

/* ---- Files of weights ---- */

/* Its header's length stands in front. */
static usl_status outline_safetensors(usli_hub *hub, usli_http *http, const char *name, uint64_t size, start *s) {
    uint64_t length = 0;
    for (int i = 0; i < 8 && s->len >= 8; i++) length |= (uint64_t)(unsigned char)s->data[i] << 8 * i;
    if (s->len < 8 || length > HEADER_LIMIT || length + 8 > size)
        return usli_fail(hub->ctx, USL_ERR_FORMAT, "%s %s: is no safetensors file", hub->repo, name);
    return length + 8 > s->len ? read_start(hub, http, name, (size_t)length + 8, s) : USL_OK;
}

/* How long its header is shows in reading it: twice as much each time. */
static usl_status outline_gguf(usli_hub *hub, usli_http *http, const char *name, const char *path, uint64_t size,
                               start *s) {
    for (;;) {
        usli_gguf *g = NULL;
        USLI_TRY(usli_write_sparse(hub->ctx, path, s->data, s->len, size));
        usl_status st = usli_gguf_open(hub->ctx, path, &g);
        usli_gguf_close(g);
        if (st == USL_OK || s->len >= size || s->len >= HEADER_LIMIT) return st;
        uint64_t more = 4 * (uint64_t)s->len < size ? 4 * (uint64_t)s->len : size;
        USLI_TRY(read_start(hub, http, name, (size_t)(more < HEADER_LIMIT ? more : HEADER_LIMIT), s));
    }
}

static usl_status outline_weights(usli_hub *hub, usli_http *http, const char *name, const char *dir, int64_t said) {
    usl_ctx *ctx = hub->ctx;
    if (said < 0)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s %s: the hub does not say how large it is; download it", hub->repo,
                         name);
    start s = { .ctx = ctx };
    uint64_t size = (uint64_t)said;
    char *path = place(ctx, dir, name);
    usl_status st = path ? read_start(hub, http, name, size < FIRST ? (size_t)size : FIRST, &s) : usli_nomem(ctx, 0);
    if (st == USL_OK && ends_with(name, ".gguf"))
        st = outline_gguf(hub, http, name, path, size, &s);
    else if (st == USL_OK)
        st = outline_safetensors(hub, http, name, size, &s);
    if (st == USL_OK) st = usli_write_sparse(ctx, path, s.data, s.len, size);
    usli_free(ctx, s.data);
    usli_free(ctx, path);
    return st;
}

static usl_status outline_files(usli_hub *hub, usli_http *http, char *const *names, size_t count, const char *dir) {
    int64_t *sizes = usli_calloc(hub->ctx, count + 1, sizeof *sizes);
    usl_status st = sizes ? usli_hub_sizes(hub, http, names, count, sizes) : usli_nomem(hub->ctx, count);
    for (size_t i = 0; i < count && st == USL_OK; i++) {
        st = outline_weights(hub, http, names[i], dir, sizes[i]);
        if (st == USL_OK) st = usli_progress(hub->ctx, "headers", i + 1, count);
    }
    usli_free(hub->ctx, sizes);
    return st;
}

/* ---- The others ---- */

static usl_status copy_small(usli_hub *hub, const char *name, const char *dir) {
    usl_ctx *ctx = hub->ctx;
    char *from = usli_hub_snapshot(hub, name), *to = place(ctx, dir, name), *data = NULL;
    size_t size;
    usl_status st = from && to ? usli_read_file(ctx, from, &data, &size) : usli_nomem(ctx, 0);
    if (st == USL_OK) st = usli_write_file(ctx, to, data, size);
    usli_free(ctx, data);
    usli_free(ctx, from);
    usli_free(ctx, to);
    return st;
}

/* The names of one kind, in order. */
static size_t pick(char *const *names, const uint8_t *flags, size_t count, bool weights, char **out) {
    size_t n = 0;
    for (size_t i = 0; i < count; i++)
        if (flags[i] && is_weights(names[i]) == weights) out[n++] = names[i];
    return n;
}

static usl_status outline_all(usli_hub *hub, usli_http *http, char *const *names, size_t count, const char *dir,
                              char **path) {
    usl_ctx *ctx = hub->ctx;
    uint8_t *flags = usli_calloc(ctx, count + 1, 1);
    char **some = usli_calloc(ctx, count + 1, sizeof *some), **shards = NULL, *index = NULL;
    size_t shard_count = 0, n;
    const char *gguf = NULL;
    usl_status st = flags && some ? USL_OK : usli_nomem(ctx, count);
    if (st == USL_OK) USLI_TRYGO(usli_hub_choose(hub, names, count, flags));
    USLI_TRYGO(st);
    n = pick(names, flags, count, false, some);
    USLI_TRYGO(usli_hub_fetch(hub, http, some, n));
    for (size_t i = 0; i < n; i++) USLI_TRYGO(copy_small(hub, some[i], dir));
    n = pick(names, flags, count, true, some);
    USLI_TRYGO(outline_files(hub, http, some, n, dir));
    for (size_t i = 0; i < count; i++) {
        if (flags[i] & USLI_HUB_GGUF) gguf = names[i];
        if (!(flags[i] & USLI_HUB_INDEX)) continue;
        if (!(index = usli_hub_snapshot(hub, names[i]))) st = usli_nomem(ctx, 0);
        if (index) st = usli_hub_shards(hub, index, &shards, &shard_count);
        USLI_TRYGO(st);
        USLI_TRYGO(outline_files(hub, http, shards, shard_count, dir));
        break;
    }
    *path = gguf ? place(ctx, dir, gguf) : usli_strdup(ctx, dir);
    st = *path ? USL_OK : usli_nomem(ctx, 0);
done:
    usli_free_names(ctx, shards, shard_count);
    usli_free(ctx, index);
    usli_free(ctx, some);
    usli_free(ctx, flags);
    return st;
}

static usl_status outline(usli_hub *hub, const char *dir, char **path) {
    usl_ctx *ctx = hub->ctx;
    usli_http *http;
    char **names = NULL;
    size_t count = 0;
    USLI_TRY(usli_hub_may(hub, USL_ACCESS_READ, "it is not in the cache"));
    USLI_TRY(usli_may(ctx, hub->dir, USL_ACCESS_WRITE));
    USLI_TRY(usli_http_new(ctx, &http));
    usl_status st = usli_hub_resolve(hub, http, &names, &count);
    if (st == USL_OK) st = outline_all(hub, http, names, count, dir, path);
    usli_http_free(http);
    usli_free_names(ctx, names, count);
    return st;
}

usl_status usli_hub_outline(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts, char **path) {
    usli_hub hub;
    *path = NULL;
    usl_status st = usli_hub_open(ctx, name, opts, &hub);
    if (st == USL_OK) st = outline(&hub, dir, path);
    usli_hub_close(&hub);
    return st;
}
