/* Downloads: what is the revision now, which files are wanted, what are they (a HEAD each), then their bytes. */
#include "core/io/hub.h"

#include <stdio.h>
#include <string.h>

#include "core/base/digest.h"
#include "core/base/store.h"
#include "core/io/http.h"
#include "core/io/json.h"

/* ---- What uploads need too ---- */

char *usli_hub_escape(usl_ctx *ctx, const char *text, bool all) {
    static const char PLAIN[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~",
                      HEX[] = "0123456789ABCDEF";
    char *out = usli_malloc(ctx, 3 * strlen(text) + 1), *p = out;
    if (!out) return NULL;
    for (; *text; text++) {
        if (strchr(PLAIN, *text) || (*text == '/' && !all)) {
            *p++ = *text;
        } else {
            *p++ = '%';
            *p++ = HEX[(unsigned char)*text >> 4];
            *p++ = HEX[*text & 15];
        }
    }
    *p = 0;
    return out;
}

usl_status usli_hub_may(const usli_hub *hub, usl_access access, const char *what) {
    if (hub->local_only)
        return usli_fail(hub->ctx, USL_ERR_NOT_FOUND, "%s: %s, and %s", hub->repo, what, hub->why_local);
    char *url = usli_hub_format(hub->ctx, "%s/%s", hub->endpoint, hub->repo);
    usl_status st = url ? usli_may(hub->ctx, url, access) : usli_nomem(hub->ctx, 0);
    usli_free(hub->ctx, url);
    return st;
}

static usl_status refused_login(const usli_hub *hub, const usli_request *r) {
    usl_ctx *ctx = hub->ctx;
    if (strcmp(r->code, "GatedRepo") == 0)
        return usli_fail(
            ctx, USL_ERR_IO,
            "%s is gated (%ld): accept its conditions at %s/%s, then set HF_TOKEN (or the option token) to a "
            "token of that account",
            hub->repo, r->status, hub->endpoint, hub->repo);
    if (!hub->token)
        return usli_fail(
            ctx, USL_ERR_NOT_FOUND,
            "%s: the hub knows no such repository, or it is private (%ld): check the name, or set HF_TOKEN "
            "(or the option token)",
            hub->repo, r->status);
    return usli_fail(ctx, USL_ERR_IO,
                     "%s: the hub does not let this token do that (%ld%s%.200s): check HF_TOKEN and its rights",
                     hub->repo, r->status, *r->message ? ", " : "", r->message);
}

static usl_status refused_name(const usli_hub *hub, const usli_request *r, const char *file) {
    usl_ctx *ctx = hub->ctx;
    if (strcmp(r->code, "RevisionNotFound") == 0)
        return usli_fail(ctx, USL_ERR_NOT_FOUND,
                         "%s: has no revision \"%s\" (404); give a branch, a tag or a commit of it", hub->repo,
                         hub->revision);
    if (file)
        return usli_fail(ctx, USL_ERR_NOT_FOUND, "%s: has no file %s at revision %s (404)", hub->repo, file,
                         hub->revision);
    return usli_fail(ctx, USL_ERR_NOT_FOUND,
                     "%s: there is no such repository at %s (404), and no path of that name here; check the name",
                     hub->repo, hub->endpoint);
}

usl_status usli_hub_refused(const usli_hub *hub, const usli_request *r, const char *file) {
    usl_ctx *ctx = hub->ctx;
    const char *what = file ? file : "";
    const char *space = file ? " " : "";
    if (r->status == 0)
        return usli_fail(
            ctx, USL_ERR_IO,
            "%s%s%s: %s does not answer (%s); check the network, or give the path of a folder or of a .gguf", hub->repo,
            space, what, hub->endpoint, *r->trouble ? r->trouble : "no connection");
    if (r->status == 401 || r->status == 403) return refused_login(hub, r);
    if (r->status == 404) return refused_name(hub, r, file);
    if (r->status == 429) {
        char when[64] = "later";
        if (r->retry_after >= 0) snprintf(when, sizeof when, "in %lld s", (long long)r->retry_after);
        return usli_fail(ctx, USL_ERR_IO, "%s%s%s: the hub takes no more requests for now (429): try again %s%s",
                         hub->repo, space, what, when, hub->token ? "" : ", or set HF_TOKEN, which allows more");
    }
    if (r->status >= 500)
        return usli_fail(ctx, USL_ERR_IO, "%s%s%s: the hub fails (%ld); try again later", hub->repo, space, what,
                         r->status);
    return usli_fail(ctx, USL_ERR_IO, "%s%s%s: the hub answers %ld%s%.300s", hub->repo, space, what, r->status,
                     *r->message ? ", " : "", *r->message ? r->message : "");
}

/* ---- The revision and its files ---- */

static usl_status read_revision(usli_hub *hub, const usli_request *r, char ***names, size_t *count) {
    usl_ctx *ctx = hub->ctx;
    json_t *answer;
    size_t cap = 0, i;
    json_t *one;
    USLI_TRY(usli_json_parse(ctx, r->url, r->text ? r->text : "", r->text_len, &answer));
    const char *sha = json_string_value(json_object_get(answer, "sha"));
    json_t *siblings = json_object_get(answer, "siblings");
    usl_status st = USL_OK;
    if (!sha || strlen(sha) != 40 || strspn(sha, "0123456789abcdef") != 40 || !json_is_array(siblings)) {
        st = usli_fail(ctx, USL_ERR_FORMAT, "%s: the answer names no commit and no files; is HF_ENDPOINT a hub?",
                       r->url);
    } else {
        memcpy(hub->commit, sha, sizeof hub->commit);
        json_array_foreach(siblings, i, one) {
            const char *name = json_string_value(json_object_get(one, "rfilename"));
            if (!name || !usli_hub_is_path(name)) continue;
            st = usli_grow(ctx, names, &cap, *count + 1, sizeof **names);
            if (st == USL_OK && !((*names)[*count] = usli_strdup(ctx, name))) st = usli_nomem(ctx, strlen(name));
            if (st != USL_OK) break;
            ++*count;
        }
    }
    json_decref(answer);
    return st;
}

usl_status usli_hub_resolve(usli_hub *hub, usli_http *http, char ***names, size_t *count) {
    usl_ctx *ctx = hub->ctx;
    char *revision = usli_hub_escape(ctx, hub->revision, true);
    usli_request r = { .method = "GET", .token = hub->token, .follow = true };
    if (revision) r.url = usli_hub_format(ctx, "%s/api/models/%s/revision/%s", hub->endpoint, hub->repo, revision);
    usl_status st = r.url ? usli_http_run(http, &r, 1, true, NULL, NULL) : usli_nomem(ctx, 0);
    if (st == USL_OK && !usli_http_good(&r)) st = usli_hub_refused(hub, &r, NULL);
    if (st == USL_OK) st = read_revision(hub, &r, names, count);
    usli_free(ctx, revision);
    usli_request_clear(ctx, &r);
    return st;
}

/* ---- One file ---- */

typedef struct download {
    usli_hub *hub;
    const char *name; /* borrowed */
    char etag[USLI_HTTP_NOTE];
    int64_t size; /* -1: the hub does not say */
    char *blob, *part, *lock_path;
    usli_lock *lock;
    usli_growing *file;
    usli_digest digest;
    bool checked; /* the etag is a checksum that digest can prove */
    uint64_t at;  /* bytes that are there */
} download;

/* Quotes and the mark of a weak tag go; what is left becomes a file's name. */
static bool read_etag(const usli_request *r, char *etag) {
    const char *text = *r->linked_etag ? r->linked_etag : r->etag;
    if (strncmp(text, "W/", 2) == 0) text += 2;
    text += *text == '"';
    size_t n = strcspn(text, "\"");
    if (n == 0 || n > 128 || *text == '.') return false;
    for (size_t i = 0; i < n; i++)
        if (!strchr("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_.", text[i])) return false;
    memcpy(etag, text, n);
    etag[n] = 0;
    return true;
}

static void begin_digest(download *d) {
    size_t n = strlen(d->etag);
    bool hex = strspn(d->etag, "0123456789abcdef") == n;
    d->checked = hex && (n == 64 || (n == 40 && d->size >= 0));
    if (n == 40)
        usli_digest_git_blob(&d->digest, (uint64_t)d->size);
    else
        usli_digest_init(&d->digest, USLI_SHA256);
    d->at = 0;
}

static usl_status set_paths(download *d) {
    usli_hub *hub = d->hub;
    d->blob = usli_hub_format(hub->ctx, "%s/blobs/%s", hub->dir, d->etag);
    d->part = usli_hub_format(hub->ctx, "%s/blobs/%s.incomplete", hub->dir, d->etag);
    d->lock_path = usli_hub_format(hub->ctx, "%s/%s.lock", hub->locks, d->etag);
    return d->blob && d->part && d->lock_path ? USL_OK : usli_nomem(hub->ctx, 0);
}

static void let_go(download *d) {
    usli_growing_close(d->file);
    usli_lock_release(d->lock);
    d->file = NULL;
    d->lock = NULL;
}

static void download_free(download *d) {
    let_go(d);
    usli_free(d->hub->ctx, d->blob);
    usli_free(d->hub->ctx, d->part);
    usli_free(d->hub->ctx, d->lock_path);
}

static bool is_whole(download *d) {
    uint64_t size;
    if (!usli_file_size(d->blob, &size) || (d->size >= 0 && size != (uint64_t)d->size)) return false;
    d->at = size;
    return true;
}

static usl_status begin_anew(download *d) {
    begin_digest(d);
    return usli_growing_clear(d->file);
}

/* What an earlier run has left counts, once it has gone through the checksum. */
static usl_status open_part(download *d) {
    usl_ctx *ctx = d->hub->ctx;
    usli_map *map;
    uint64_t size;
    begin_digest(d);
    USLI_TRY(usli_growing_open(ctx, d->part, &d->file, &size));
    if (d->size >= 0 && size > (uint64_t)d->size) return begin_anew(d);
    if (!size) return USL_OK;
    USLI_TRY(usli_map_open(ctx, d->part, &map));
    usl_status st = USL_OK;
    for (size_t i = 0; i < map->size && st == USL_OK; i += 1 << 26) {
        size_t n = map->size - i < (1 << 26) ? map->size - i : 1 << 26;
        usli_digest_add(&d->digest, map->data + i, n);
        st = usli_checkpoint(ctx);
    }
    d->at = map->size;
    usli_map_release(map);
    return st;
}

static bool is_proved(const download *d) {
    char hex[USLI_DIGEST_HEX];
    usli_digest copy = d->digest;
    if (!d->checked) return true;
    usli_digest_end(&copy, hex);
    return strcmp(hex, d->etag) == 0;
}

static usl_status keep(download *d) {
    USLI_TRY(usli_growing_commit(d->file, d->blob));
    let_go(d);
    return USL_OK;
}

static usl_status on_turn(void *ud, usli_request *r, usli_http_turn *turn) {
    download *d = ud;
    if (!d->lock) {
        *turn = USLI_HTTP_SKIP;
        if (is_whole(d)) return USL_OK;
        USLI_TRY(usli_lock_try(d->hub->ctx, d->lock_path, &d->lock));
        *turn = USLI_HTTP_LATER;
        if (!d->lock) return USL_OK;
        *turn = USLI_HTTP_SKIP;
        if (is_whole(d)) { /* somebody else has brought it meanwhile */
            let_go(d);
            return USL_OK;
        }
        USLI_TRY(open_part(d));
    }
    if (d->size >= 0 && d->at == (uint64_t)d->size) { /* there is nothing to ask for */
        *turn = USLI_HTTP_SKIP;
        if (is_proved(d)) return keep(d);
        USLI_TRY(begin_anew(d));
    }
    *turn = USLI_HTTP_GO;
    r->offset = d->at;
    return USL_OK;
}

static usl_status wrong_size(download *d, uint64_t came) {
    usl_ctx *ctx = d->hub->ctx;
    USLI_TRY(usli_growing_clear(d->file));
    return usli_fail(ctx, USL_ERR_FORMAT,
                     "%s %s: %llu bytes came%s where the hub says %lld; the file is refused, try again", d->hub->repo,
                     d->name, (unsigned long long)came, came > (uint64_t)d->size ? " or more" : "", (long long)d->size);
}

static usl_status on_bytes(void *ud, uint64_t at, const void *data, size_t size) {
    download *d = ud;
    if (at == 0 && d->at) USLI_TRY(begin_anew(d)); /* a server that knows no ranges */
    if (d->size >= 0 && d->at + size > (uint64_t)d->size) return wrong_size(d, d->at + size);
    USLI_TRY(usli_growing_write(d->file, data, size));
    usli_digest_add(&d->digest, data, size);
    d->at += size;
    return USL_OK;
}

static usl_status on_end(void *ud, usli_request *r) {
    download *d = ud;
    (void)r;
    if (d->size >= 0 && d->at != (uint64_t)d->size) return wrong_size(d, d->at);
    if (is_proved(d)) return keep(d);
    USLI_TRY(usli_growing_clear(d->file));
    return usli_fail(d->hub->ctx, USL_ERR_FORMAT,
                     "%s %s: the bytes that came have another checksum than the hub says; the file is "
                     "refused, try again",
                     d->hub->repo, d->name);
}

/* ---- Several files ---- */

typedef struct batch {
    usli_hub *hub;
    download *files;
    usli_request *requests;
    size_t count;
} batch;

static usl_status tell(void *ud) {
    batch *b = ud;
    uint64_t done = 0, total = 0;
    for (size_t i = 0; i < b->count; i++) {
        done += b->files[i].at;
        total += b->files[i].size > 0 ? (uint64_t)b->files[i].size : b->files[i].at;
    }
    return usli_progress(b->hub->ctx, "downloading", done, total);
}

static usl_status set_url(batch *b, size_t i) {
    usli_hub *hub = b->hub;
    char *name = usli_hub_escape(hub->ctx, b->files[i].name, false);
    if (name)
        b->requests[i].url =
            usli_hub_format(hub->ctx, "%s/%s/resolve/%s/%s", hub->endpoint, hub->repo, hub->commit, name);
    usli_free(hub->ctx, name);
    return b->requests[i].url ? USL_OK : usli_nomem(hub->ctx, 0);
}

/* A redirect within the hub leads to a repository's new name; one elsewhere leads to the bytes, and what is to be known
 * of them stands in the answer itself. */
static usl_status follow_within(batch *b, size_t i, bool *again) {
    usli_hub *hub = b->hub;
    usli_request *r = &b->requests[i];
    if (r->status < 300 || r->status >= 400 || *r->linked_etag || r->location[0] != '/' || r->location[1] == '/')
        return USL_OK;
    const char *host = strstr(hub->endpoint, "://") + 3, *slash = strchr(host, '/');
    int root = (int)(slash ? slash - hub->endpoint : (long)strlen(hub->endpoint));
    char *url = usli_hub_format(hub->ctx, "%.*s%s", root, hub->endpoint, r->location);
    if (!url) return usli_nomem(hub->ctx, 0);
    usli_free(hub->ctx, r->url);
    r->url = url;
    *again = true;
    return USL_OK;
}

static usl_status ask_about(batch *b, usli_http *http) {
    bool again = true;
    for (size_t i = 0; i < b->count; i++) {
        b->requests[i].method = "HEAD";
        b->requests[i].token = b->hub->token;
        b->requests[i].headers[0] = "Accept-Encoding: identity";
        USLI_TRY(set_url(b, i));
    }
    for (int hops = 0; again && hops < 4; hops++) {
        again = false;
        USLI_TRY(usli_http_run(http, b->requests, b->count, false, NULL, NULL));
        for (size_t i = 0; i < b->count; i++) USLI_TRY(follow_within(b, i, &again));
    }
    for (size_t i = 0; i < b->count; i++) {
        download *d = &b->files[i];
        const usli_request *r = &b->requests[i];
        if (r->status < 200 || r->status >= 400) return usli_hub_refused(b->hub, r, d->name);
        if (!read_etag(r, d->etag))
            return usli_fail(b->hub->ctx, USL_ERR_FORMAT,
                             "%s: the answer has no ETag that names the file; is HF_ENDPOINT a hub?", r->url);
        d->size = r->linked_size >= 0 ? r->linked_size : r->status < 300 ? r->length : -1;
        USLI_TRY(set_paths(d));
    }
    return USL_OK;
}

static usl_status check_disk(batch *b) {
    uint64_t wanted = 0, size, room = usli_free_disk(b->hub->cache);
    for (size_t i = 0; i < b->count; i++) {
        download *d = &b->files[i];
        if (d->size < 0 || is_whole(d)) continue;
        bool part = usli_file_size(d->part, &size) && size <= (uint64_t)d->size;
        wanted += (uint64_t)d->size - (part ? size : 0);
    }
    if (wanted <= room) return USL_OK;
    return usli_fail(
        b->hub->ctx, USL_ERR_IO,
        "%s: %.2f GiB are to come and %.2f GiB are free in %s; free some disk space, or set HF_HUB_CACHE to "
        "another folder",
        b->hub->repo, (double)wanted / (1 << 30), (double)room / (1 << 30), b->hub->cache);
}

static usl_status bring(batch *b, usli_http *http, size_t first, size_t count) {
    USLI_TRY(usli_http_run(http, b->requests + first, count, true, tell, b));
    for (size_t i = first; i < first + count; i++)
        if (!usli_http_good(&b->requests[i]) && (b->requests[i].status || *b->requests[i].trouble))
            return usli_hub_refused(b->hub, &b->requests[i], b->files[i].name);
    return USL_OK;
}

/* config.json comes before the others: weights that cannot be loaded are not worth the way. */
static usl_status judge_config(batch *b, usli_http *http) {
    usli_hub *hub = b->hub;
    for (size_t i = 0; hub->judge && !hub->tokenizer_only && i < b->count; i++) {
        if (strcmp(b->files[i].name, "config.json") != 0) continue;
        USLI_TRY(bring(b, http, i, 1));
        char *name = usli_path_join(hub->ctx, hub->repo, "config.json");
        usl_status st = name ? hub->judge(hub->ctx, name, b->files[i].blob) : usli_nomem(hub->ctx, 0);
        usli_free(hub->ctx, name);
        return st;
    }
    return USL_OK;
}

static usl_status fetch_bytes(batch *b, usli_http *http) {
    for (size_t i = 0; i < b->count; i++) {
        usli_request *r = &b->requests[i];
        r->method = "GET";
        r->follow = true;
        r->ud = &b->files[i];
        r->turn = on_turn;
        r->receive = on_bytes;
        r->finish = on_end;
    }
    USLI_TRY(judge_config(b, http));
    return bring(b, http, 0, b->count);
}

/* The file that makes a snapshot a model is linked last. */
static usl_status link_all(batch *b) {
    for (int last = 0; last < 2; last++)
        for (size_t i = 0; i < b->count; i++)
            if ((strcmp(b->files[i].name, "config.json") == 0) == last)
                USLI_TRY(usli_hub_link(b->hub, b->files[i].name, b->files[i].etag));
    return USL_OK;
}

/* Room for the files' requests; released also when it fails. */
static usl_status open_batch(usli_hub *hub, char *const *names, size_t count, batch *b) {
    usl_ctx *ctx = hub->ctx;
    *b = (batch){ hub, usli_calloc(ctx, count, sizeof *b->files), usli_calloc(ctx, count, sizeof *b->requests), count };
    for (size_t i = 0; i < count && b->files; i++) {
        b->files[i].hub = hub;
        b->files[i].name = names[i];
    }
    return b->files && b->requests ? USL_OK : usli_nomem(ctx, count * sizeof *b->requests);
}

static void close_batch(batch *b) {
    usl_ctx *ctx = b->hub->ctx;
    for (size_t i = 0; i < b->count && b->files; i++) download_free(&b->files[i]);
    for (size_t i = 0; i < b->count && b->requests; i++) usli_request_clear(ctx, &b->requests[i]);
    usli_free(ctx, b->files);
    usli_free(ctx, b->requests);
}

usl_status usli_hub_sizes(usli_hub *hub, usli_http *http, char *const *names, size_t count, int64_t *sizes) {
    batch b;
    usl_status st = open_batch(hub, names, count, &b);
    if (st == USL_OK) st = ask_about(&b, http);
    for (size_t i = 0; i < count && st == USL_OK; i++) sizes[i] = b.files[i].size;
    close_batch(&b);
    return st;
}

usl_status usli_hub_fetch(usli_hub *hub, usli_http *http, char *const *names, size_t count) {
    usl_ctx *ctx = hub->ctx;
    if (!count) return USL_OK;
    batch b;
    usl_status st = open_batch(hub, names, count, &b);
    char *blobs = usli_path_join(ctx, hub->dir, "blobs");
    if (st == USL_OK && !blobs) st = usli_nomem(ctx, 0);
    if (st == USL_OK) st = ask_about(&b, http);
    if (st == USL_OK) st = check_disk(&b);
    if (st == USL_OK) st = usli_make_dirs(ctx, blobs);
    if (st == USL_OK) st = usli_make_dirs(ctx, hub->locks);
    if (st == USL_OK) st = fetch_bytes(&b, http);
    if (st == USL_OK) st = link_all(&b);
    close_batch(&b);
    usli_free(ctx, blobs);
    return st;
}

/* ---- A repository ---- */

/* *gguf is borrowed from names. */
static usl_status fetch_wanted(usli_hub *hub, usli_http *http, char *const *names, size_t count, const char **gguf) {
    usl_ctx *ctx = hub->ctx;
    uint8_t *flags = usli_calloc(ctx, count + 1, 1);
    char **wanted = usli_calloc(ctx, count + 1, sizeof *wanted), **shards = NULL, *index = NULL;
    size_t n = 0, shard_count = 0;
    bool sharded = false;
    usl_status st = flags && wanted ? usli_hub_choose(hub, names, count, flags) : usli_nomem(ctx, count);
    for (size_t i = 0; i < count && st == USL_OK; i++) {
        if (flags[i]) wanted[n++] = names[i];
        if (flags[i] & USLI_HUB_GGUF) *gguf = names[i];
        sharded |= (flags[i] & USLI_HUB_INDEX) != 0;
    }
    if (st == USL_OK) st = usli_hub_fetch(hub, http, wanted, n);
    if (st == USL_OK && sharded) {
        index = usli_hub_snapshot(hub, "model.safetensors.index.json");
        st = index ? usli_hub_shards(hub, index, &shards, &shard_count) : usli_nomem(ctx, 0);
        if (st == USL_OK) st = usli_hub_fetch(hub, http, shards, shard_count);
    }
    usli_free_names(ctx, shards, shard_count);
    usli_free(ctx, index);
    usli_free(ctx, wanted);
    usli_free(ctx, flags);
    return st;
}

static usl_status download_all(usli_hub *hub, char **path) {
    usl_ctx *ctx = hub->ctx;
    usli_http *http;
    char **names = NULL, missing[256];
    const char *gguf = NULL;
    size_t count = 0;
    USLI_TRY(usli_may(ctx, hub->dir, USL_ACCESS_WRITE));
    USLI_TRY(usli_http_new(ctx, &http));
    usl_status st = usli_hub_resolve(hub, http, &names, &count);
    if (st == USL_OK) st = usli_hub_look(hub, path, missing);
    if (st == USL_OK && !*path) {
        st = fetch_wanted(hub, http, names, count, &gguf);
        if (st == USL_OK && !(*path = usli_hub_snapshot(hub, gguf ? gguf : ""))) st = usli_nomem(ctx, 0);
    }
    if (st == USL_OK) st = usli_hub_write_ref(hub);
    usli_http_free(http);
    usli_free_names(ctx, names, count);
    return st;
}

static usl_status get(usli_hub *hub, bool refresh, char **path) {
    char missing[256], what[512];
    if (usli_may(hub->ctx, hub->cache, USL_ACCESS_READ) != USL_OK)
        return usli_fail(
            hub->ctx, USL_ERR_NOT_FOUND,
            "%s: there is no such file or folder, and the host program does not allow the hub's cache to be read; "
            "give a path that it allows",
            hub->repo);
    if (!refresh || hub->local_only) {
        USLI_TRY(usli_hub_find_commit(hub));
        USLI_TRY(usli_hub_look(hub, path, missing));
        if (*path) return USL_OK;
        snprintf(what, sizeof what, "%.200s%s%.60s is not in the cache %.180s", missing,
                 *hub->commit ? " of revision " : " ", hub->revision, hub->cache);
    }
    USLI_TRY(usli_hub_may(hub, USL_ACCESS_READ, what));
    return download_all(hub, path);
}

usl_status usli_hub_get(usl_ctx *ctx, const char *name, const usl_hub_opts *opts, usli_hub_judge *judge, char **path) {
    usli_hub hub;
    *path = NULL;
    usl_status st = usli_hub_open(ctx, name, opts, &hub);
    hub.judge = judge;
    if (st == USL_OK) st = get(&hub, opts && opts->size > offsetof(usl_hub_opts, refresh) && opts->refresh, path);
    if (st != USL_OK) {
        usli_free(ctx, *path);
        *path = NULL;
    }
    usli_hub_close(&hub);
    return st;
}
