#define _GNU_SOURCE /* flock */
#include "core/base/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- Files that grow ---- */

struct usli_growing {
    usl_ctx *ctx;
    char *path;
    int fd;
};

usl_status usli_growing_open(usl_ctx *ctx, const char *path, usli_growing **out, uint64_t *size) {
    struct stat sb;
    *out = NULL;
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    usli_growing *g = usli_calloc(ctx, 1, sizeof *g);
    if (!g || !(g->path = usli_strdup(ctx, path))) {
        usli_free(ctx, g);
        return usli_nomem(ctx, sizeof *g);
    }
    g->ctx = ctx;
    g->fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (g->fd < 0 || fstat(g->fd, &sb) != 0) {
        usl_status st = usli_io_fail(ctx, path, "cannot be written");
        usli_growing_close(g);
        return st;
    }
    *size = (uint64_t)sb.st_size;
    *out = g;
    return USL_OK;
}

usl_status usli_growing_write(usli_growing *g, const void *data, size_t size) {
    const char *p = data;
    while (size) {
        ssize_t n = write(g->fd, p, size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return usli_io_fail(g->ctx, g->path, "cannot be written");
        p += n;
        size -= (size_t)n;
    }
    return USL_OK;
}

usl_status usli_growing_clear(usli_growing *g) {
    return ftruncate(g->fd, 0) == 0 ? USL_OK : usli_io_fail(g->ctx, g->path, "cannot be emptied");
}

usl_status usli_growing_commit(usli_growing *g, const char *path) {
    USLI_TRY(usli_may(g->ctx, path, USL_ACCESS_WRITE));
    if (fsync(g->fd) != 0 && errno != EINVAL) return usli_io_fail(g->ctx, g->path, "cannot be synced");
    return rename(g->path, path) == 0 ? USL_OK : usli_io_fail(g->ctx, path, "cannot be renamed into place");
}

void usli_growing_close(usli_growing *g) {
    if (!g) return;
    if (g->fd >= 0) close(g->fd);
    usli_free(g->ctx, g->path);
    usli_free(g->ctx, g);
}

/* ---- Locks ---- */

struct usli_lock {
    usl_ctx *ctx;
    int fd;
};

usl_status usli_lock_try(usl_ctx *ctx, const char *path, usli_lock **out) {
    *out = NULL;
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    usli_lock *lock = usli_calloc(ctx, 1, sizeof *lock);
    if (!lock) return usli_nomem(ctx, sizeof *lock);
    lock->ctx = ctx;
    lock->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    usl_status st = USL_OK;
    if (lock->fd < 0) {
        st = usli_io_fail(ctx, path, "the lock cannot be made");
    } else if (flock(lock->fd, LOCK_EX | LOCK_NB) == 0) {
        *out = lock;
        return USL_OK;
    } else if (errno != EWOULDBLOCK && errno != EINTR) {
        st = usli_io_fail(ctx, path, "cannot be locked");
    }
    usli_lock_release(lock);
    return st;
}

void usli_lock_release(usli_lock *lock) {
    if (!lock) return;
    if (lock->fd >= 0) close(lock->fd);
    usli_free(lock->ctx, lock);
}

/* ---- Names ---- */

usl_status usli_make_link(usl_ctx *ctx, const char *path, const char *target) {
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    size_t len = strlen(path) + 32;
    char *beside = usli_malloc(ctx, len);
    if (!beside) return usli_nomem(ctx, len);
    snprintf(beside, len, "%s.link-%ld", path, (long)getpid());
    usl_status st = USL_OK;
    unlink(beside);
    if (symlink(target, beside) != 0) {
        st = errno == EPERM || errno == ENOSYS || errno == EOPNOTSUPP
                 ? usli_fail(ctx, USL_ERR_UNSUPPORTED, "%s: this file system has no symbolic links", path)
                 : usli_io_fail(ctx, path, "the link cannot be made");
    } else if (rename(beside, path) != 0) {
        st = usli_io_fail(ctx, path, "the link cannot be put into place");
        unlink(beside);
    }
    usli_free(ctx, beside);
    return st;
}

bool usli_file_size(const char *path, uint64_t *size) {
    struct stat sb;
    if (stat(path, &sb) != 0 || !S_ISREG(sb.st_mode)) return false;
    *size = (uint64_t)sb.st_size;
    return true;
}

usl_status usli_write_sparse(usl_ctx *ctx, const char *path, const void *data, size_t len, uint64_t size) {
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    bool bad = fd < 0;
    for (const char *at = data; len && !bad;) {
        ssize_t n = write(fd, at, len);
        if (n < 0 && errno == EINTR) continue;
        bad = n < 0;
        at += bad ? 0 : n;
        len -= bad ? 0 : (size_t)n;
    }
    bad = bad || ftruncate(fd, (off_t)size) != 0;
    int why = errno;
    if (fd >= 0) bad = close(fd) != 0 || bad;
    return bad ? usli_fail(ctx, USL_ERR_IO, "%s: cannot be written: %s", path, strerror(why)) : USL_OK;
}
