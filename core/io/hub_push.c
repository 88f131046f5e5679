/* Uploads: the repository is made, the hub says which files are large (LFS), those go to where it wants them, and one
 * commit names them all. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/digest.h"
#include "core/io/http.h"
#include "core/io/hub.h"
#include "core/io/json.h"

enum { AT_ONCE = 256, SAMPLE = 512, DEPTH = 16 };

typedef struct upload {
    char *path, *name; /* on this machine, and in the repository */
    usli_map *map;
    char oid[USLI_DIGEST_HEX];
    bool large, ignored;
} upload;

typedef struct push {
    usli_hub hub;
    usli_http *http;
    upload *files;
    size_t count, cap;
    uint64_t done, total;  /* bytes of large files */
    usli_request *running; /* of the bytes under way */
    size_t running_count;
} push;

/* ---- The folder ---- */

static usl_status add_file(push *p, char *path, char *name) {
    usl_ctx *ctx = p->hub.ctx;
    usl_status st = usli_grow(ctx, &p->files, &p->cap, p->count + 1, sizeof *p->files);
    usli_map *map = NULL;
    if (st == USL_OK) st = usli_map_open(ctx, path, &map);
    if (st != USL_OK) {
        usli_free(ctx, path);
        usli_free(ctx, name);
        return st;
    }
    upload *u = &p->files[p->count++];
    memset(u, 0, sizeof *u);
    u->path = path;
    u->name = name;
    u->map = map;
    return USL_OK;
}

static usl_status gather(push *p, const char *dir, const char *below, int depth) {
    usl_ctx *ctx = p->hub.ctx;
    char **names;
    size_t count;
    if (!depth) return usli_fail(ctx, USL_ERR_IO, "%s: folders nest too deeply to be uploaded", dir);
    USLI_TRY(usli_list_dir(ctx, dir, &names, &count));
    usl_status st = USL_OK;
    for (size_t i = 0; i < count && st == USL_OK; i++) {
        if (names[i][0] == '.') continue;
        char *path = usli_path_join(ctx, dir, names[i]), *name = usli_path_join(ctx, below, names[i]);
        if (!path || !name)
            st = usli_nomem(ctx, strlen(dir));
        else if (usli_is_dir(path))
            st = gather(p, path, name, depth - 1);
        else {
            st = add_file(p, path, name);
            continue;
        }
        usli_free(ctx, path);
        usli_free(ctx, name);
    }
    usli_free_names(ctx, names, count);
    return st;
}

/* ---- Words to the hub ---- */

static char *base64(usl_ctx *ctx, const uint8_t *data, size_t size) {
    static const char DIGITS[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *out = usli_malloc(ctx, (size + 2) / 3 * 4 + 1), *p = out;
    if (!out) return NULL;
    for (size_t i = 0; i < size; i += 3) {
        size_t n = size - i < 3 ? size - i : 3;
        uint32_t v = (uint32_t)data[i] << 16 | (n > 1 ? (uint32_t)data[i + 1] << 8 : 0) | (n > 2 ? data[i + 2] : 0);
        for (size_t k = 0; k < 4; k++) *p++ = k <= n ? DIGITS[v >> (18 - 6 * k) & 63] : '=';
    }
    *p = 0;
    return out;
}

/* Of the same origin as the hub: only such an address is told the token. */
static const char *token_for(const push *p, const char *url) {
    size_t n = strlen(p->hub.endpoint);
    return strncmp(url, p->hub.endpoint, n) == 0 && url[n] == '/' ? p->hub.token : NULL;
}

/* Posts a text. *answer, may be NULL, is new: json_decref; *status tells of a refusal when it is wanted, else a refusal
 * is a failure. */
static usl_status post_text(push *p, const char *url, const char *type, const char *text, size_t len, json_t **answer,
                            long *status) {
    usl_ctx *ctx = p->hub.ctx;
    usli_request r = { .method = "POST",
                       .headers = { type, "Accept: application/vnd.git-lfs+json, application/json" },
                       .token = token_for(p, url),
                       .body = text,
                       .body_size = len };
    if (answer) *answer = NULL;
    if (!(r.url = usli_strdup(ctx, url))) return usli_nomem(ctx, strlen(url));
    usl_status st = usli_http_run(p->http, &r, 1, true, NULL, NULL);
    if (st == USL_OK && status) *status = r.status;
    if (st == USL_OK && !usli_http_good(&r) && (!status || !r.status)) st = usli_hub_refused(&p->hub, &r, NULL);
    if (st == USL_OK && answer && usli_http_good(&r))
        st = usli_json_parse(ctx, url, r.text ? r.text : "", r.text_len, answer);
    usli_request_clear(ctx, &r);
    return st;
}

/* Takes body over. url is owned too, so that it may be made in the call. */
static usl_status post_json(push *p, char *url, json_t *body, const char *type, json_t **answer, long *status) {
    usl_ctx *ctx = p->hub.ctx;
    char *text = NULL;
    size_t len = 0;
    if (answer) *answer = NULL;
    usl_status st = url && body ? usli_json_dump(ctx, body, 0, &text, &len) : usli_nomem(ctx, 0);
    if (st == USL_OK) st = post_text(p, url, type, text, len, answer, status);
    if (body) json_decref(body);
    usli_free(ctx, text);
    usli_free(ctx, url);
    return st;
}

static const char JSON_TYPE[] = "Content-Type: application/json",
                  LFS_TYPE[] = "Content-Type: application/vnd.git-lfs+json";

static usl_status make_repo(push *p, bool is_private) {
    usli_hub *hub = &p->hub;
    const char *slash = strchr(hub->repo, '/');
    long status = 0;
    char *url = usli_hub_format(hub->ctx, "%s/api/repos/create", hub->endpoint);
    json_t *body = json_pack("{s:s,s:s%,s:s,s:b}", "name", slash + 1, "organization", hub->repo,
                             (size_t)(slash - hub->repo), "type", "model", "private", is_private);
    USLI_TRY(post_json(p, url, body, JSON_TYPE, NULL, &status));
    /* 409: it is there. Nor does it matter to a commit that this token may make none. */
    if ((status >= 200 && status < 300) || status == 409 || status == 403) return USL_OK;
    usli_request r = { .status = status };
    return usli_hub_refused(hub, &r, NULL);
}

/* ---- Which files are large ---- */

static usl_status ask_modes(push *p, size_t from, size_t to) {
    usl_ctx *ctx = p->hub.ctx;
    json_t *list = json_array(), *answer, *one;
    for (size_t i = from; i < to; i++) {
        const usli_map *m = p->files[i].map;
        char *sample = base64(ctx, m->data, m->size < SAMPLE ? m->size : SAMPLE);
        json_array_append_new(list, json_pack("{s:s,s:s,s:I}", "path", p->files[i].name, "sample", sample ? sample : "",
                                              "size", (json_int_t)m->size));
        usli_free(ctx, sample);
    }
    char *revision = usli_hub_escape(ctx, p->hub.revision, true);
    char *url =
        revision ? usli_hub_format(ctx, "%s/api/models/%s/preupload/%s", p->hub.endpoint, p->hub.repo, revision) : NULL;
    usli_free(ctx, revision);
    USLI_TRY(post_json(p, url, json_pack("{s:o}", "files", list), JSON_TYPE, &answer, NULL));
    size_t k;
    json_array_foreach(json_object_get(answer, "files"), k, one) {
        const char *path = json_string_value(json_object_get(one, "path"));
        const char *mode = json_string_value(json_object_get(one, "uploadMode"));
        for (size_t i = from; i < to && path && mode; i++) {
            if (strcmp(p->files[i].name, path) != 0) continue;
            p->files[i].large = strcmp(mode, "lfs") == 0 && p->files[i].map->size;
            p->files[i].ignored = json_is_true(json_object_get(one, "shouldIgnore"));
        }
    }
    json_decref(answer);
    return USL_OK;
}

static usl_status name_large(push *p) {
    for (size_t i = 0; i < p->count; i++) {
        upload *u = &p->files[i];
        if (!u->large || u->ignored) continue;
        usli_digest d;
        usli_digest_init(&d, USLI_SHA256);
        for (size_t at = 0; at < u->map->size; at += 1 << 26) {
            size_t left = u->map->size - at;
            usli_digest_add(&d, u->map->data + at, left < (1 << 26) ? left : 1 << 26);
            USLI_TRY(usli_progress(p->hub.ctx, "taking checksums", at, u->map->size));
        }
        usli_digest_end(&d, u->oid);
        p->total += u->map->size;
    }
    return USL_OK;
}

/* ---- Their bytes ---- */

static usl_status tell(void *ud) {
    push *p = ud;
    uint64_t done = p->done;
    for (size_t i = 0; i < p->running_count; i++) done += p->running[i].moved;
    return usli_progress(p->hub.ctx, "uploading", done, p->total);
}

static usl_status run_puts(push *p, usli_request *puts, size_t count, const upload *u) {
    p->running = puts;
    p->running_count = count;
    usl_status st = usli_http_run(p->http, puts, count, true, tell, p);
    p->running_count = 0;
    for (size_t i = 0; i < count && st == USL_OK; i++)
        if (!usli_http_good(&puts[i]) && (puts[i].status || *puts[i].trouble))
            st = usli_hub_refused(&p->hub, &puts[i], u->name);
    return st;
}

static bool is_url(const char *text) {
    return text && (strncmp(text, "https://", 8) == 0 || strncmp(text, "http://", 7) == 0);
}

static usl_status bad_action(push *p, const upload *u) {
    return usli_fail(p->hub.ctx, USL_ERR_FORMAT,
                     "%s %s: the hub does not say where the bytes are to go; try again later", p->hub.repo, u->name);
}

/* One PUT, with the lines that the hub wants in it. */
static usl_status put_whole(push *p, const upload *u, const char *href, json_t *header) {
    usl_ctx *ctx = p->hub.ctx;
    usli_request r = { .method = "PUT", .body = u->map->data, .body_size = u->map->size };
    char *lines[6] = { NULL };
    const char *key;
    json_t *value;
    size_t n = 0;
    r.headers[0] = "Content-Type:";
    usl_status st = (r.url = usli_strdup(ctx, href)) ? USL_OK : usli_nomem(ctx, strlen(href));
    json_object_foreach(header, key, value) {
        if (st != USL_OK || n == sizeof lines / sizeof *lines || !json_is_string(value)) continue;
        if (!(lines[n] = usli_hub_format(ctx, "%s: %s", key, json_string_value(value)))) st = usli_nomem(ctx, 0);
        r.headers[1 + n] = lines[n];
        n++;
    }
    if (st == USL_OK) st = run_puts(p, &r, 1, u);
    for (size_t i = 0; i < n; i++) usli_free(ctx, lines[i]);
    usli_request_clear(ctx, &r);
    return st;
}

/* Several PUTs, then their tags in one POST. The places stand in the header by number, "00001" and on. */
static usl_status put_parts(push *p, const upload *u, const char *href, json_t *header, size_t chunk) {
    usl_ctx *ctx = p->hub.ctx;
    size_t count = (u->map->size + chunk - 1) / chunk;
    usli_request *puts = usli_calloc(ctx, count, sizeof *puts);
    json_t *parts = json_array();
    usl_status st = puts && parts ? USL_OK : usli_nomem(ctx, count * sizeof *puts);
    for (size_t i = 0; i < count && st == USL_OK; i++) {
        const char *url = NULL, *key;
        json_t *value;
        json_object_foreach(header, key, value) if (key[0] >= '0' && key[0] <= '9' && strtoull(key, NULL, 10) == i + 1)
            url = json_string_value(value);
        size_t left = u->map->size - i * chunk;
        puts[i] = (usli_request){ .method = "PUT",
                                  .headers = { "Content-Type:" },
                                  .body = u->map->data + i * chunk,
                                  .body_size = left < chunk ? left : chunk };
        if (!is_url(url))
            st = bad_action(p, u);
        else if (!(puts[i].url = usli_strdup(ctx, url)))
            st = usli_nomem(ctx, strlen(url));
    }
    if (st == USL_OK) st = run_puts(p, puts, count, u);
    for (size_t i = 0; i < count && st == USL_OK; i++)
        json_array_append_new(parts, json_pack("{s:I,s:s}", "partNumber", (json_int_t)(i + 1), "etag", puts[i].etag));
    if (st == USL_OK)
        st = post_json(p, usli_strdup(ctx, href), json_pack("{s:s,s:O}", "oid", u->oid, "parts", parts), LFS_TYPE, NULL,
                       NULL);
    for (size_t i = 0; puts && i < count; i++) usli_request_clear(ctx, &puts[i]);
    if (parts) json_decref(parts);
    usli_free(ctx, puts);
    return st;
}

/* object: what the hub answers for one file. Without actions it has the bytes already. */
static usl_status put_large(push *p, const upload *u, json_t *object) {
    json_t *error = json_object_get(object, "error"), *actions = json_object_get(object, "actions");
    if (error) {
        const char *message = json_string_value(json_object_get(error, "message"));
        return usli_fail(p->hub.ctx, USL_ERR_IO, "%s %s: the hub does not take the file (%lld%s%.300s)", p->hub.repo,
                         u->name, (long long)json_integer_value(json_object_get(error, "code")), message ? ", " : "",
                         message ? message : "");
    }
    json_t *up = json_object_get(actions, "upload"), *verify = json_object_get(actions, "verify");
    if (up) {
        json_t *header = json_object_get(up, "header"), *chunk = json_object_get(header, "chunk_size");
        const char *href = json_string_value(json_object_get(up, "href"));
        if (!is_url(href)) return bad_action(p, u);
        long long size =
            json_is_string(chunk) ? strtoll(json_string_value(chunk), NULL, 10) : json_integer_value(chunk);
        if (chunk && size < 1) return bad_action(p, u);
        USLI_TRY(chunk ? put_parts(p, u, href, header, (size_t)size) : put_whole(p, u, href, header));
    }
    p->done += u->map->size;
    const char *href = json_string_value(json_object_get(verify, "href"));
    if (!is_url(href)) return USL_OK;
    return post_json(p, usli_strdup(p->hub.ctx, href),
                     json_pack("{s:s,s:I}", "oid", u->oid, "size", (json_int_t)u->map->size), LFS_TYPE, NULL, NULL);
}

static const upload *find_oid(const push *p, const char *oid) {
    for (size_t i = 0; oid && i < p->count; i++)
        if (p->files[i].large && !p->files[i].ignored && strcmp(p->files[i].oid, oid) == 0) return &p->files[i];
    return NULL;
}

static usl_status put_batch(push *p, json_t *objects) {
    usli_hub *hub = &p->hub;
    json_t *answer, *one;
    size_t asked = json_array_size(objects), answered = 0, k;
    char *url = usli_hub_format(hub->ctx, "%s/%s.git/info/lfs/objects/batch", hub->endpoint, hub->repo);
    json_t *body = json_pack("{s:s,s:[s,s],s:o,s:s,s:{s:s}}", "operation", "upload", "transfers", "basic", "multipart",
                             "objects", objects, "hash_algo", "sha256", "ref", "name", hub->revision);
    USLI_TRY(post_json(p, url, body, LFS_TYPE, &answer, NULL));
    usl_status st = USL_OK;
    json_array_foreach(json_object_get(answer, "objects"), k, one) {
        const upload *u = find_oid(p, json_string_value(json_object_get(one, "oid")));
        if (!u) continue;
        answered++;
        if ((st = put_large(p, u, one)) != USL_OK) break;
    }
    json_decref(answer);
    if (st == USL_OK && answered < asked)
        st = usli_fail(hub->ctx, USL_ERR_FORMAT,
                       "%s: the hub says nothing of %zu files that are to come; try again later", hub->repo,
                       asked - answered);
    return st;
}

static usl_status put_all(push *p) {
    json_t *objects = NULL;
    usl_status st = USL_OK;
    for (size_t i = 0; i < p->count && st == USL_OK; i++) {
        const upload *u = &p->files[i];
        if (!u->large || u->ignored || find_oid(p, u->oid) != u) continue; /* the same bytes go once */
        if (!objects && !(objects = json_array())) return usli_nomem(p->hub.ctx, 0);
        json_array_append_new(objects, json_pack("{s:s,s:I}", "oid", u->oid, "size", (json_int_t)u->map->size));
        if (json_array_size(objects) < AT_ONCE) continue;
        st = put_batch(p, objects);
        objects = NULL;
    }
    if (st == USL_OK && objects) return put_batch(p, objects);
    if (objects) json_decref(objects);
    return st;
}

/* ---- The commit: a line of JSON each ---- */

typedef struct lines {
    char *text;
    size_t len, cap;
} lines;

static usl_status add_line(push *p, lines *out, json_t *value) {
    usl_ctx *ctx = p->hub.ctx;
    char *text;
    size_t len;
    if (!value) return usli_nomem(ctx, 0);
    usl_status st = usli_json_dump(ctx, value, 0, &text, &len);
    json_decref(value);
    USLI_TRY(st);
    st = usli_grow(ctx, &out->text, &out->cap, out->len + len + 1, 1);
    if (st == USL_OK) {
        memcpy(out->text + out->len, text, len);
        out->text[out->len + len] = '\n';
        out->len += len + 1;
    }
    usli_free(ctx, text);
    return st;
}

static usl_status add_upload(push *p, lines *out, const upload *u) {
    if (u->large)
        return add_line(p, out,
                        json_pack("{s:s,s:{s:s,s:s,s:s,s:I}}", "key", "lfsFile", "value", "path", u->name, "algo",
                                  "sha256", "oid", u->oid, "size", (json_int_t)u->map->size));
    char *content = base64(p->hub.ctx, u->map->data, u->map->size);
    if (!content) return usli_nomem(p->hub.ctx, u->map->size);
    usl_status st = add_line(p, out,
                             json_pack("{s:s,s:{s:s,s:s,s:s}}", "key", "file", "value", "path", u->name, "encoding",
                                       "base64", "content", content));
    usli_free(p->hub.ctx, content);
    return st;
}

static usl_status commit(push *p, const char *message) {
    usl_ctx *ctx = p->hub.ctx;
    lines out = { NULL, 0, 0 };
    usl_status st = add_line(
        p, &out, json_pack("{s:s,s:{s:s,s:s}}", "key", "header", "value", "summary", message, "description", ""));
    for (size_t i = 0; i < p->count && st == USL_OK; i++)
        if (!p->files[i].ignored) st = add_upload(p, &out, &p->files[i]);
    char *revision = usli_hub_escape(ctx, p->hub.revision, true);
    char *url =
        revision ? usli_hub_format(ctx, "%s/api/models/%s/commit/%s", p->hub.endpoint, p->hub.repo, revision) : NULL;
    if (st == USL_OK && !url) st = usli_nomem(ctx, 0);
    if (st == USL_OK) st = post_text(p, url, "Content-Type: application/x-ndjson", out.text, out.len, NULL, NULL);
    usli_free(ctx, revision);
    usli_free(ctx, url);
    usli_free(ctx, out.text);
    return st;
}

/* ---- All of it ---- */

static usl_status run(push *p, const char *name, const char *dir, const usl_hub_opts *o) {
    usli_hub *hub = &p->hub;
    USLI_TRY(usli_hub_open(hub->ctx, name, o, hub));
    if (!strchr(hub->repo, '/') || hub->file)
        return usli_fail(hub->ctx, USL_ERR_INVALID, "\"%s\" cannot be uploaded to; a name like user/name is wanted",
                         name);
    USLI_TRY(usli_hub_may(hub, USL_ACCESS_WRITE, "nothing can be uploaded"));
    if (!hub->token)
        return usli_fail(hub->ctx, USL_ERR_INVALID,
                         "%s: an upload needs a token with the right to write: set HF_TOKEN (or the option token)",
                         hub->repo);
    USLI_TRY(gather(p, dir, "", DEPTH));
    if (!p->count) return usli_fail(hub->ctx, USL_ERR_NOT_FOUND, "%s: holds no file to upload", dir);
    USLI_TRY(usli_http_new(hub->ctx, &p->http));
    USLI_TRY(make_repo(p, o->is_private != 0));
    for (size_t i = 0; i < p->count; i += AT_ONCE)
        USLI_TRY(ask_modes(p, i, p->count - i < AT_ONCE ? p->count : i + AT_ONCE));
    USLI_TRY(name_large(p));
    USLI_TRY(put_all(p));
    return commit(p, o->message && *o->message ? o->message : "Upload with unsloth-lua");
}

usl_status usli_hub_push(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts) {
    usl_hub_opts o = USL_HUB_OPTS_INIT;
    push p;
    memset(&p, 0, sizeof p);
    p.hub.ctx = ctx;
    if (opts) memcpy(&o, opts, opts->size < sizeof o ? opts->size : sizeof o);
    usl_status st = run(&p, name, dir, &o);
    for (size_t i = 0; i < p.count; i++) {
        usli_map_release(p.files[i].map);
        usli_free(ctx, p.files[i].path);
        usli_free(ctx, p.files[i].name);
    }
    usli_free(ctx, p.files);
    usli_http_free(p.http);
    usli_hub_close(&p.hub);
    return st;
}
