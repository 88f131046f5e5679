/* What a shared folder of downloads needs of the system beyond core/base/file.h: files that grow over several runs,
 * symbolic links, and locks between processes. */
#ifndef USLI_BASE_STORE_H
#define USLI_BASE_STORE_H

#include "core/base/file.h"

/* A file that is written at its end and stays when it is closed. *size is what it holds already. */
typedef struct usli_growing usli_growing;
usl_status usli_growing_open(usl_ctx *ctx, const char *path, usli_growing **out, uint64_t *size);
usl_status usli_growing_write(usli_growing *g, const void *data, size_t size);
usl_status usli_growing_clear(usli_growing *g); /* back to nothing */
/* Syncs, and renames it to path. The handle still needs usli_growing_close. */
usl_status usli_growing_commit(usli_growing *g, const char *path);
void usli_growing_close(usli_growing *g); /* NULL is fine */

/* A lock on a file of its own, which is made and stays. *out is new, or NULL when another process (or another handle of
 * this one) holds it. */
typedef struct usli_lock usli_lock;
usl_status usli_lock_try(usl_ctx *ctx, const char *path, usli_lock **out);
void usli_lock_release(usli_lock *lock); /* NULL is fine */

/* Makes path a link to target, which is relative to path's folder; what lay there is replaced at once. Where the file
 * system has no such links USL_ERR_UNSUPPORTED. */
usl_status usli_make_link(usl_ctx *ctx, const char *path, const char *target);
/* A file of so many bytes, of which the first are given and the others take no room and read as zeros. */
usl_status usli_write_sparse(usl_ctx *ctx, const char *path, const void *data, size_t len, uint64_t size);
/* Of what a link leads to; false when there is no such file. */
bool usli_file_size(const char *path, uint64_t *size);

#endif
