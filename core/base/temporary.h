/* What is not finished: a file without a name where the file system has such, else a file, or a folder, whose name says
 * so ("NAME.tmp-unsloth-PID-N") and that its process has locked. A killed process leaves nothing of the first kind;
 * what it leaves of the second is known by its free lock, and the next temporary beside it removes it. */
#ifndef USLI_BASE_TEMPORARY_H
#define USLI_BASE_TEMPORARY_H

#include "core/base/ctx.h"

typedef struct usli_temporary {
    char *name;  /* what it is called, or will be */
    size_t stem; /* characters of it before what says so */
    int fd;      /* a file's is open for writing */
    bool named;
} usli_temporary;

/* A new file in the folder of path, or a new folder at path with more behind it. Each begins with the removal of what
 * killed processes left beside it. When it fails *t holds nothing. */
usl_status usli_temporary_file(usl_ctx *ctx, const char *path, usli_temporary *t);
usl_status usli_temporary_folder(usl_ctx *ctx, const char *path, usli_temporary *t);
/* A file without a name gets it. */
usl_status usli_temporary_give_name(usl_ctx *ctx, usli_temporary *t);
/* What has its name still is removed, unless it is kept: then it has another by now. */
void usli_temporary_close(usl_ctx *ctx, usli_temporary *t, bool kept);

/* Waits for the lock of a folder, for as long as nobody cancels; -1 where folders cannot be locked. */
usl_status usli_folder_lock(usl_ctx *ctx, const char *path, int *fd);
void usli_folder_unlock(int fd);

#endif
