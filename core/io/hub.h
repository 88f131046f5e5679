/* The Hugging Face hub: its cache on this machine, downloads into it, uploads.
 *
 *   CACHE/models--ORG--NAME/refs/main                      the commit that "main" was
 *                          /blobs/ETAG                     bytes, by SHA-256 (large files) or git's SHA-1
 *                          /blobs/ETAG.incomplete          as far as they have come
 *                          /snapshots/COMMIT/config.json   -> ../../blobs/ETAG
 *   CACHE/.locks/models--ORG--NAME/ETAG.lock               held by whoever fetches that blob
 *
 * Layout, names and locks are huggingface_hub's, so that both may share one cache at the same time. */
#ifndef USLI_IO_HUB_H
#define USLI_IO_HUB_H

#include "core/base/file.h"

enum { USLI_HUB_COMMIT = 41 }; /* 40 hexadecimal digits and a 0 */

/* Whether the config.json in a file is of a model that can be loaded: asked before any weight comes. name: for errors.
 */
typedef usl_status usli_hub_judge(usl_ctx *ctx, const char *name, const char *path);

/* A repository and where its things are; everything is owned. */
typedef struct usli_hub {
    usl_ctx *ctx;
    char *repo;                   /* "org/name" */
    char *file;                   /* what stood behind "org/name:": a .gguf's name or a part of it; NULL: nothing */
    char *revision;               /* a branch, a tag, or a commit */
    char *endpoint, *token;       /* no slash at the end; NULL: no token */
    char *cache, *dir, *locks;    /* CACHE, CACHE/models--ORG--NAME, CACHE/.locks/models--ORG--NAME */
    char commit[USLI_HUB_COMMIT]; /* "" until it is known */
    bool local_only;              /* the network is not to be touched: */
    const char *why_local;        /* by what */
    bool tokenizer_only;
    usli_hub_judge *judge; /* NULL: none */
} usli_hub;

/* True when a name can be a repository's: "org/name", also with ":file.gguf" behind. */
bool usli_hub_is_name(const char *name);
/* Reads the environment: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_OFFLINE.
 * After it usli_hub_close is due, also when it fails. */
usl_status usli_hub_open(usl_ctx *ctx, const char *name, const usl_hub_opts *opts, usli_hub *hub);
void usli_hub_close(usli_hub *hub);

/* ---- The cache (hub_cache.c) ---- */

/* Sets commit from the revision when the cache knows it. */
usl_status usli_hub_find_commit(usli_hub *hub);
/* CACHE/.../snapshots/COMMIT/name, new; name "" is the folder. NULL for want of memory. */
char *usli_hub_snapshot(const usli_hub *hub, const char *name);
/* The snapshot's path when it has all that is wanted, a .gguf's when that is wanted; *path is new, or NULL; missing,
 * which has room for 256, names what is not there. */
usl_status usli_hub_look(usli_hub *hub, char **path, char *missing);
/* Which of a repository's files are wanted: bits of USLI_HUB_*. Fails with a sentence when none makes a model. */
enum { USLI_HUB_WANTED = 1, USLI_HUB_INDEX = 2, USLI_HUB_GGUF = 4 };
usl_status usli_hub_choose(usli_hub *hub, char *const *names, size_t count, uint8_t *flags);
/* The files that a model.safetensors.index.json names, each once; *names is new: usli_free_names. */
usl_status usli_hub_shards(usli_hub *hub, const char *index_path, char ***names, size_t *count);
/* Puts a link into the snapshot. */
usl_status usli_hub_link(usli_hub *hub, const char *name, const char *etag);
usl_status usli_hub_write_ref(usli_hub *hub);
/* False for what would lie outside the snapshot, or could not be a name. */
bool usli_hub_is_path(const char *name);

/* ---- The network (hub.c, hub_push.c) ---- */

struct usli_request;
/* The sentence for an answer that is no success. file may be NULL. */
usl_status usli_hub_refused(const usli_hub *hub, const struct usli_request *r, const char *file);
/* USL_OK, or why the network may not be touched; asks the host about the endpoint, as about a path. */
usl_status usli_hub_may(const usli_hub *hub, usl_access access, const char *what);
/* text with what an URL may not hold as %XX; slashes stay unless `all`. New; NULL for want of memory. */
char *usli_hub_escape(usl_ctx *ctx, const char *text, bool all);
/* As printf; new; NULL for want of memory. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
char *
usli_hub_format(usl_ctx *ctx, const char *fmt, ...);

struct usli_http;
/* The commit of the revision, and the names of its files; *names is new: usli_free_names. */
usl_status usli_hub_resolve(usli_hub *hub, struct usli_http *http, char ***names, size_t *count);
/* Brings files into the cache and links them into the snapshot. */
usl_status usli_hub_fetch(usli_hub *hub, struct usli_http *http, char *const *names, size_t count);
/* sizes: (count) bytes as the hub says; -1: it does not. */
usl_status usli_hub_sizes(usli_hub *hub, struct usli_http *http, char *const *names, size_t count, int64_t *sizes);

/* hub_outline.c: a repository without its weights in a folder that is there already. Small files are whole (and in the
 * cache); a file of weights has its size and begins as it does, as far as its header goes, and takes no more room than
 * that. *path is new: dir, or a .gguf in it. */
usl_status usli_hub_outline(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts, char **path);
/* Finds the repository in the cache, or downloads what is wanted of it. *path is new: the snapshot, or a .gguf in it.
 * judge may be NULL. */
usl_status usli_hub_get(usl_ctx *ctx, const char *name, const usl_hub_opts *opts, usli_hub_judge *judge, char **path);
/* Uploads the files of a folder and of the folders in it, but none whose name begins with a dot, as one commit. */
usl_status usli_hub_push(usl_ctx *ctx, const char *name, const char *dir, const usl_hub_opts *opts);

#endif
