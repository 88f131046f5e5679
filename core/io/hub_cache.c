/* The hub's cache on this machine: whose layout is huggingface_hub's. Nothing here touches the network. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/store.h"
#include "core/io/hub.h"
#include "core/io/json.h"

/* ---- Names ---- */

static bool is_name_char(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-';
}

/* Length of the repository's part of a name; 0 when it is none. */
static size_t repo_length(const char *name, size_t *slashes) {
    size_t n = 0, start = 0;
    *slashes = 0;
    for (;; n++) {
        char c = name[n];
        if (is_name_char(c)) continue;
        if (n == start || name[start] == '.' || name[start] == '-' || name[n - 1] == '.' || name[n - 1] == '-')
            return 0;
        if (c != '/') break;
        ++*slashes;
        start = n + 1;
    }
    if (name[n] != 0 && name[n] != ':') return 0;
    for (size_t i = 0; i + 1 < n; i++)
        if ((name[i] == '.' && name[i + 1] == '.') || (name[i] == '-' && name[i + 1] == '-')) return 0;
    return n <= 96 && *slashes <= 1 ? n : 0;
}

bool usli_hub_is_path(const char *name) {
    if (!*name || *name == '/' || strlen(name) > 1024) return false;
    for (const char *part = name;; part++) {
        size_t n = strcspn(part, "/");
        if (n == 0 || (part[0] == '.' && (n == 1 || (n == 2 && part[1] == '.')))) return false;
        for (size_t i = 0; i < n; i++)
            if ((unsigned char)part[i] < 32 || part[i] == '\\' || part[i] == 127) return false;
        part += n;
        if (!*part) return true;
    }
}

bool usli_hub_is_name(const char *name) {
    size_t slashes, n = repo_length(name, &slashes);
    return n && slashes == 1 && (!name[n] || usli_hub_is_path(name + n + 1));
}

char *usli_hub_format(usl_ctx *ctx, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    char *text = n < 0 ? NULL : usli_malloc(ctx, (size_t)n + 1);
    if (!text) return NULL;
    va_start(ap, fmt);
    vsnprintf(text, (size_t)n + 1, fmt, ap);
    va_end(ap);
    return text;
}

/* ---- Where things are ---- */

static const char *env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static bool env_is_true(const char *name) {
    const char *value = env(name);
    static const char *const TRUE_WORDS[] = { "1", "on", "yes", "true" };
    for (size_t i = 0; value && i < sizeof TRUE_WORDS / sizeof *TRUE_WORDS; i++)
        if (strcasecmp(value, TRUE_WORDS[i]) == 0) return true;
    return false;
}

/* A folder that the environment names, with ~ for the home; NULL for want of memory. */
static char *folder(usl_ctx *ctx, const char *path, const char *below) {
    const char *home = env("HOME");
    bool tilde = path[0] == '~' && (path[1] == '/' || !path[1]) && home;
    return usli_hub_format(ctx, "%s%s%s", tilde ? home : "", tilde ? path + 1 : path, below);
}

static char *hub_home(usl_ctx *ctx) {
    const char *home = env("HF_HOME"), *xdg = env("XDG_CACHE_HOME");
    if (home) return folder(ctx, home, "");
    return xdg ? folder(ctx, xdg, "/huggingface") : folder(ctx, "~", "/.cache/huggingface");
}

static char *hub_cache(usl_ctx *ctx, const char *home) {
    const char *cache = env("HF_HUB_CACHE");
    if (!cache) cache = env("HUGGINGFACE_HUB_CACHE");
    return cache ? folder(ctx, cache, "") : folder(ctx, home, "/hub");
}

/* *token is new, or NULL when there is none. */
static usl_status find_token(usl_ctx *ctx, const char *home, const char *given, char **token) {
    const char *text = given ? given : env("HF_TOKEN"), *path = env("HF_TOKEN_PATH");
    char *file = NULL, *held = NULL;
    usl_status st = USL_OK;
    if (!text) text = env("HUGGING_FACE_HUB_TOKEN");
    if (!given && env_is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN")) return USL_OK;
    if (!text) {
        file = path ? folder(ctx, path, "") : folder(ctx, home, "/token");
        if (!file) return usli_nomem(ctx, 0);
        if (usli_is_file(file) && usli_read_file(ctx, file, &held, NULL) == USL_OK) text = held;
    }
    size_t len = 0;
    if (text) text += strspn(text, " \t\r\n");
    while (text && (unsigned char)text[len] > 32 && (unsigned char)text[len] < 127) len++;
    if (text && (text[len + strspn(text + len, " \t\r\n")] || len > 512))
        st = usli_fail(ctx, USL_ERR_INVALID,
                       "the hub's token holds a character that no token has; give it as it was made (HF_TOKEN, or %s)",
                       file ? file : "the option token");
    else if (len && !(*token = usli_strndup(ctx, text, len)))
        st = usli_nomem(ctx, len);
    usli_free(ctx, held);
    usli_free(ctx, file);
    return st;
}

static usl_status set_endpoint(usl_ctx *ctx, char **out) {
    const char *url = env("HF_ENDPOINT");
    if (!url) url = "https://huggingface.co";
    if (strncmp(url, "https://", 8) != 0 && strncmp(url, "http://", 7) != 0)
        return usli_fail(ctx, USL_ERR_INVALID, "HF_ENDPOINT is \"%s\"; an address that begins with https:// is wanted",
                         url);
    size_t n = strlen(url);
    while (n && url[n - 1] == '/') n--;
    return (*out = usli_strndup(ctx, url, n)) ? USL_OK : usli_nomem(ctx, n);
}

static usl_status set_folders(usli_hub *hub) {
    usl_ctx *ctx = hub->ctx;
    const char *slash = strchr(hub->repo, '/');
    int org = slash ? (int)(slash - hub->repo) : 0;
    hub->dir = usli_hub_format(ctx, "%s/models--%.*s%s%s", hub->cache, org, hub->repo, org ? "--" : "",
                               slash ? slash + 1 : hub->repo);
    if (!hub->dir) return usli_nomem(ctx, 0);
    hub->locks = usli_hub_format(ctx, "%s/.locks%s", hub->cache, hub->dir + strlen(hub->cache));
    return hub->locks ? USL_OK : usli_nomem(ctx, 0);
}

usl_status usli_hub_open(usl_ctx *ctx, const char *name, const usl_hub_opts *opts, usli_hub *hub) {
    usl_hub_opts o = USL_HUB_OPTS_INIT;
    size_t slashes, n = repo_length(name, &slashes);
    memset(hub, 0, sizeof *hub);
    hub->ctx = ctx;
    if (opts) memcpy(&o, opts, opts->size < sizeof o ? opts->size : sizeof o);
    if (!n || (name[n] && !usli_hub_is_path(name + n + 1)))
        return usli_fail(ctx, USL_ERR_INVALID,
                         "\"%s\" cannot be a repository of the hub; a name like org/name is wanted", name);
    const char *revision = o.revision && *o.revision ? o.revision : "main";
    if (!usli_hub_is_path(revision))
        return usli_fail(ctx, USL_ERR_INVALID, "%s: \"%s\" cannot be a revision; a branch, a tag or a commit is wanted",
                         name, revision);
    hub->local_only = o.local_files_only || env_is_true("HF_HUB_OFFLINE") || env_is_true("TRANSFORMERS_OFFLINE");
    hub->why_local = o.local_files_only ? "local_files_only is set" : "HF_HUB_OFFLINE is set";
    hub->tokenizer_only = o.tokenizer_only != 0;
    hub->repo = usli_strndup(ctx, name, n);
    hub->revision = usli_strdup(ctx, revision);
    if (!hub->repo || !hub->revision) return usli_nomem(ctx, n);
    if (name[n] && !(hub->file = usli_strdup(ctx, name + n + 1))) return usli_nomem(ctx, n);
    char *home = hub_home(ctx);
    if (home) hub->cache = hub_cache(ctx, home);
    usl_status st = hub->cache ? set_endpoint(ctx, &hub->endpoint) : usli_nomem(ctx, 0);
    if (st == USL_OK) st = set_folders(hub);
    if (st == USL_OK) st = find_token(ctx, home, o.token, &hub->token);
    usli_free(ctx, home);
    return st;
}

void usli_hub_close(usli_hub *hub) {
    char *const owned[] = { hub->repo,  hub->file,  hub->revision, hub->endpoint,
                            hub->token, hub->cache, hub->dir,      hub->locks };
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) usli_free(hub->ctx, owned[i]);
}

/* ---- What is there ---- */

static bool is_commit(const char *text) {
    return strlen(text) == 40 && strspn(text, "0123456789abcdef") == 40;
}

usl_status usli_hub_find_commit(usli_hub *hub) {
    hub->commit[0] = 0;
    if (is_commit(hub->revision)) {
        memcpy(hub->commit, hub->revision, sizeof hub->commit);
        return USL_OK;
    }
    char *path = usli_hub_format(hub->ctx, "%s/refs/%s", hub->dir, hub->revision), *text = NULL;
    if (!path) return usli_nomem(hub->ctx, 0);
    usl_status st = usli_may(hub->ctx, path, USL_ACCESS_READ);
    if (st == USL_OK && usli_is_file(path)) st = usli_read_file(hub->ctx, path, &text, NULL);
    if (st == USL_OK && text) {
        text[strcspn(text, " \t\r\n")] = 0;
        if (is_commit(text)) memcpy(hub->commit, text, sizeof hub->commit);
    }
    usli_free(hub->ctx, text);
    usli_free(hub->ctx, path);
    return st;
}

char *usli_hub_snapshot(const usli_hub *hub, const char *name) {
    return usli_hub_format(hub->ctx, "%s/snapshots/%s%s%s", hub->dir, hub->commit, *name ? "/" : "", name);
}

/* Is the file there, and what it links to? */
static usl_status has(usli_hub *hub, const char *name, bool *there) {
    char *path = usli_hub_snapshot(hub, name);
    if (!path) return usli_nomem(hub->ctx, 0);
    usl_status st = usli_may(hub->ctx, path, USL_ACCESS_READ);
    *there = st == USL_OK && usli_is_file(path);
    usli_free(hub->ctx, path);
    return st;
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), k = strlen(end);
    return n >= k && strcasecmp(text + n - k, end) == 0;
}

/* "org/name:Q4_K_M" is the file that says so before its ".gguf", "org/name:x.gguf" that file. */
static bool is_asked_for(const char *asked, const char *name) {
    if (!ends_with(name, ".gguf")) return false;
    if (!asked) return true;
    if (strcmp(asked, name) == 0) return true;
    size_t n = strlen(name) - 5, k = strlen(asked);
    if (k > n || strncasecmp(name + n - k, asked, k) != 0) return false;
    return k == n || !is_name_char(name[n - k - 1]) || strchr("._-", name[n - k - 1]);
}

static usl_status look_for_gguf(usli_hub *hub, char **found, char *missing) {
    usl_ctx *ctx = hub->ctx;
    char **names = NULL, *dir = usli_hub_snapshot(hub, "");
    size_t count = 0, hits = 0, hit = 0;
    bool there = false;
    usl_status st = dir ? USL_OK : usli_nomem(ctx, 0);
    if (st == USL_OK && hub->file) st = has(hub, hub->file, &there);
    if (st == USL_OK && there && !(*found = usli_hub_snapshot(hub, hub->file))) st = usli_nomem(ctx, 0);
    if (st == USL_OK && !there && usli_is_dir(dir)) st = usli_list_dir(ctx, dir, &names, &count);
    for (size_t i = 0; st == USL_OK && i < count; i++) {
        if (!is_asked_for(hub->file, names[i])) continue;
        st = has(hub, names[i], &there);
        if (there) hits++, hit = i;
    }
    if (st == USL_OK && hits == 1 && !(*found = usli_hub_snapshot(hub, names[hit]))) st = usli_nomem(ctx, 0);
    if (!*found)
        snprintf(missing, 256, "%.200s", hub->file ? hub->file : hits ? "the name of one .gguf" : "config.json");
    usli_free_names(ctx, names, count);
    usli_free(ctx, dir);
    return st;
}

/* Of a folder that holds a model: the first file that lacks. */
static usl_status look_for_weights(usli_hub *hub, char *missing) {
    static const char INDEX[] = "model.safetensors.index.json";
    bool there, adapter;
    USLI_TRY(has(hub, "adapter_config.json", &adapter));
    const char *weights = "model.safetensors";
    USLI_TRY(has(hub, weights, &there));
    if (there) return USL_OK;
    if (adapter) weights = "adapter_model.safetensors";
    if (adapter) USLI_TRY(has(hub, weights, &there));
    if (there) return USL_OK;
    snprintf(missing, 256, "%s", weights);
    USLI_TRY(has(hub, INDEX, &there));
    if (!there) return USL_OK;
    char **names, *path = usli_hub_snapshot(hub, INDEX);
    size_t count;
    if (!path) return usli_nomem(hub->ctx, 0);
    usl_status st = usli_hub_shards(hub, path, &names, &count);
    usli_free(hub->ctx, path);
    USLI_TRY(st);
    missing[0] = 0;
    for (size_t i = 0; i < count && st == USL_OK && !*missing; i++) {
        st = has(hub, names[i], &there);
        if (!there) snprintf(missing, 256, "%.200s", names[i]);
    }
    usli_free_names(hub->ctx, names, count);
    return st;
}

usl_status usli_hub_look(usli_hub *hub, char **path, char *missing) {
    bool config = false, adapter = false;
    *path = NULL;
    snprintf(missing, 256, "the revision");
    if (!*hub->commit) return USL_OK;
    missing[0] = 0;
    if (hub->file) return look_for_gguf(hub, path, missing);
    if (hub->tokenizer_only) {
        USLI_TRY(has(hub, "tokenizer.json", &config));
        if (!config) snprintf(missing, 256, "tokenizer.json");
    } else {
        USLI_TRY(has(hub, "config.json", &config));
        USLI_TRY(has(hub, "adapter_config.json", &adapter));
        if (!config && !adapter) return look_for_gguf(hub, path, missing);
        USLI_TRY(look_for_weights(hub, missing));
        if (*missing && !adapter) {
            char ignored[256];
            USLI_TRY(look_for_gguf(hub, path, ignored)); /* such repositories often keep the config of what they hold */
            if (*path) missing[0] = 0;
        }
    }
    if (!*path && !*missing && !(*path = usli_hub_snapshot(hub, ""))) return usli_nomem(hub->ctx, 0);
    return USL_OK;
}

/* ---- What is wanted ---- */

static bool among(const char *name, const char *const *list) {
    for (; *list; list++)
        if (strcmp(name, *list) == 0) return true;
    return false;
}

static const char *const TOKENIZER_FILES[] = { "tokenizer.json",
                                               "tokenizer_config.json",
                                               "special_tokens_map.json",
                                               "added_tokens.json",
                                               "chat_template.jinja",
                                               "chat_template.json",
                                               NULL };
static const char *const MODEL_FILES[] = { "config.json", "generation_config.json", "adapter_config.json",
                                           "adapter_model.safetensors", NULL };

static usl_status no_gguf(usli_hub *hub, char *const *names, size_t count, size_t hits) {
    char list[600] = "";
    size_t n = 0;
    for (size_t i = 0; i < count; i++)
        if (ends_with(names[i], ".gguf") && n + strlen(names[i]) + 8 < sizeof list)
            n += (size_t)snprintf(list + n, sizeof list - n, "%s%s", n ? ", " : "", names[i]);
    if (!n)
        return usli_fail(hub->ctx, USL_ERR_NOT_FOUND,
                         "%s: holds neither safetensors nor a .gguf; choose a repository that does, or convert it",
                         hub->repo);
    if (hub->file && !hits)
        return usli_fail(hub->ctx, USL_ERR_NOT_FOUND, "%s: has no file \"%s\"; there are %s", hub->repo, hub->file,
                         list);
    return usli_fail(hub->ctx, USL_ERR_INVALID, "%s: holds several .gguf files, give one as \"%s:FILE\": %s", hub->repo,
                     hub->repo, list);
}

usl_status usli_hub_choose(usli_hub *hub, char *const *names, size_t count, uint8_t *flags) {
    size_t hits = 0, hit = 0, whole = count, index = count;
    bool config = false, adapter = false, tokenizer = false;
    memset(flags, 0, count);
    for (size_t i = 0; i < count; i++) {
        const char *name = names[i];
        if (is_asked_for(hub->file, name)) hits++, hit = i;
        if (strcmp(name, "model.safetensors") == 0) whole = i;
        if (strcmp(name, "model.safetensors.index.json") == 0) index = i;
        config |= strcmp(name, "config.json") == 0;
        adapter |= strcmp(name, "adapter_config.json") == 0;
        tokenizer |= strcmp(name, "tokenizer.json") == 0;
        if (hub->file) continue;
        if (among(name, TOKENIZER_FILES) || (!hub->tokenizer_only && among(name, MODEL_FILES)))
            flags[i] = USLI_HUB_WANTED;
    }
    if (hub->tokenizer_only && !hub->file) {
        if (tokenizer) return USL_OK;
        return usli_fail(hub->ctx, USL_ERR_NOT_FOUND, "%s: has no tokenizer.json; choose a repository that has one",
                         hub->repo);
    }
    bool weights = config && (whole < count || index < count);
    if (!hub->file && (weights || adapter)) {
        if (weights && whole < count)
            flags[whole] = USLI_HUB_WANTED;
        else if (weights)
            flags[index] = USLI_HUB_WANTED | USLI_HUB_INDEX;
        return USL_OK;
    }
    if (hits != 1) return no_gguf(hub, names, count, hits);
    memset(flags, 0, count);
    flags[hit] = USLI_HUB_WANTED | USLI_HUB_GGUF;
    return USL_OK;
}

static usl_status add_shard(usl_ctx *ctx, char ***names, size_t *cap, size_t *count, const char *name) {
    for (size_t i = *count; i-- > 0;) /* most often the last one */
        if (strcmp((*names)[i], name) == 0) return USL_OK;
    USLI_TRY(usli_grow(ctx, names, cap, *count + 1, sizeof **names));
    if (!((*names)[*count] = usli_strdup(ctx, name))) return usli_nomem(ctx, strlen(name));
    ++*count;
    return USL_OK;
}

usl_status usli_hub_shards(usli_hub *hub, const char *index_path, char ***names, size_t *count) {
    usl_ctx *ctx = hub->ctx;
    json_t *index, *value;
    const char *key;
    size_t cap = 0;
    *names = NULL;
    *count = 0;
    USLI_TRY(usli_json_load(ctx, index_path, &index));
    json_t *map = json_object_get(index, "weight_map");
    usl_status st = USL_OK;
    if (!json_is_object(map)) st = usli_fail(ctx, USL_ERR_FORMAT, "%s: has no weight_map", index_path);
    json_object_foreach(map, key, value) {
        const char *name = json_string_value(value);
        if (!name || !usli_hub_is_path(name))
            st = usli_fail(ctx, USL_ERR_FORMAT, "%s: \"%s\" does not lie in a file of the repository", index_path, key);
        else
            st = add_shard(ctx, names, &cap, count, name);
        if (st != USL_OK) break;
    }
    json_decref(index);
    if (st == USL_OK) return USL_OK;
    usli_free_names(ctx, *names, *count);
    *names = NULL;
    *count = 0;
    return st;
}

/* ---- What is put there ---- */

static usl_status make_parent(usl_ctx *ctx, const char *path) {
    const char *slash = strrchr(path, '/');
    char *dir = usli_strndup(ctx, path, (size_t)(slash - path));
    if (!dir) return usli_nomem(ctx, strlen(path));
    usl_status st = usli_make_dirs(ctx, dir);
    usli_free(ctx, dir);
    return st;
}

usl_status usli_hub_link(usli_hub *hub, const char *name, const char *etag) {
    usl_ctx *ctx = hub->ctx;
    size_t depth = 0;
    for (const char *p = name; *p; p++) depth += *p == '/';
    char *path = usli_hub_snapshot(hub, name), *blob = usli_hub_format(ctx, "%s/blobs/%s", hub->dir, etag);
    char *target = usli_malloc(ctx, 3 * (depth + 2) + strlen(etag) + 8);
    usl_status st = path && blob && target ? make_parent(ctx, path) : usli_nomem(ctx, 0);
    if (st == USL_OK) {
        char *p = target;
        for (size_t i = 0; i < depth + 2; i++, p += 3) memcpy(p, "../", 3);
        snprintf(p, strlen(etag) + 8, "blobs/%s", etag);
        st = usli_make_link(ctx, path, target);
        if (st == USL_ERR_UNSUPPORTED) st = usli_rename(ctx, blob, path); /* then the file itself lies there */
    }
    usli_free(ctx, path);
    usli_free(ctx, blob);
    usli_free(ctx, target);
    return st;
}

usl_status usli_hub_write_ref(usli_hub *hub) {
    if (strcmp(hub->revision, hub->commit) == 0) return USL_OK;
    char *path = usli_hub_format(hub->ctx, "%s/refs/%s", hub->dir, hub->revision);
    usl_status st = path ? make_parent(hub->ctx, path) : usli_nomem(hub->ctx, 0);
    if (st == USL_OK) st = usli_write_file(hub->ctx, path, hub->commit, 40);
    usli_free(hub->ctx, path);
    return st;
}
