#define _GNU_SOURCE /* flock, O_TMPFILE */
#include "core/base/temporary.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/base/file.h"

static const char MARK[] = ".tmp-unsloth-";

enum { NAME_ROOM = sizeof MARK + 40, LONGEST = 4096, PATIENCE = 16 /* names tried */ };

/* No two of this process are the same; another's may be where processes are counted from 1 in every container. */
static void new_name(usli_temporary *t) {
    static atomic_uint serial; /* a name, not a state */
    snprintf(t->name + t->stem, NAME_ROOM, "%s%ld-%u", MARK, (long)getpid(), atomic_fetch_add(&serial, 1));
}

static usl_status begin(usl_ctx *ctx, const char *path, usli_temporary *t) {
    size_t stem = strlen(path);
    *t = (usli_temporary){ usli_malloc(ctx, stem + NAME_ROOM), stem, -1, false };
    if (!t->name) return usli_nomem(ctx, stem + NAME_ROOM);
    memcpy(t->name, path, stem);
    new_name(t);
    return USL_OK;
}

/* Nothing came of it: errno says why. */
static usl_status fail(usl_ctx *ctx, usli_temporary *t, const char *path) {
    usl_status st = usli_io_fail(ctx, path, "cannot be written");
    usli_free(ctx, t->name);
    *t = (usli_temporary){ NULL, 0, -1, false };
    return st;
}

static bool is_temporary(const char *name) {
    const char *at = name, *mark = NULL;
    while ((at = strstr(at, MARK))) mark = at++;
    if (!mark || mark == name) return false;
    at = mark + sizeof MARK - 1;
    size_t pid = strspn(at, "0123456789"), serial = at[pid] == '-' ? strspn(at + pid + 1, "0123456789") : 0;
    return pid && serial && !at[pid + 1 + serial];
}

/* The folder of path, as it is opened. */
static bool folder_of(const char *path, char dir[LONGEST]) {
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) + 1 : 0;
    if (n + 1 >= LONGEST) errno = ENAMETOOLONG;
    if (n + 1 >= LONGEST) return false;
    memcpy(dir, n ? path : ".", n ? n : 1);
    dir[n ? n : 1] = 0;
    return true;
}

/* What is open is still what has the name: nobody has removed it or renamed it. */
static bool has_name(int fd, const char *name) {
    struct stat open_one, named;
    return fstat(fd, &open_one) == 0 && lstat(name, &named) == 0 && open_one.st_ino == named.st_ino &&
           open_one.st_dev == named.st_dev;
}

/* Removes one whose process lives no more. */
static void remove_left(const char *path) {
    struct stat sb;
    if (lstat(path, &sb) != 0 || (!S_ISREG(sb.st_mode) && !S_ISDIR(sb.st_mode))) return;
    int fd = open(path, (S_ISDIR(sb.st_mode) ? O_RDONLY | O_DIRECTORY : O_RDWR) | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return;
    /* It is removed while it is locked: who has just made it and not locked it yet finds it gone and makes another. */
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 && has_name(fd, path)) usli_remove_quietly(path);
    close(fd);
}

static void remove_what_is_left(usl_ctx *ctx, const char *dir) {
    char path[LONGEST];
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!is_temporary(e->d_name)) continue;
        int n = snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        bool fits = n > 0 && n < LONGEST;
        if (fits && !(ctx->access_fn && ctx->access_fn(ctx->access_ud, path, USL_ACCESS_WRITE))) remove_left(path);
    }
    if (d) closedir(d);
}

/* ---- Files ---- */

static int give_name(int fd, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return linkat(AT_FDCWD, path, AT_FDCWD, name, AT_SYMLINK_FOLLOW);
}

/* Whether a file without a name could get one later is tried with another first: it must not turn out when all is
 * written. */
static int open_unnamed(const char *dir, const char *name) {
#if defined(O_TMPFILE)
    int other = open(dir, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
    bool good = other >= 0 && give_name(other, name) == 0 && unlink(name) == 0;
    if (other >= 0) close(other);
    if (good) return open(dir, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
#endif
    (void)dir;
    (void)name;
    return -1;
}

/* Locks what was opened under its name; false when somebody took it for something left. Where there are no locks nobody
 * takes anything; nor where what is open and its name never have one number, as on some file systems of programs:
 * there it is taken for kept in the end. */
static bool keep(int fd, const char *name) {
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) return errno != EWOULDBLOCK;
    return has_name(fd, name);
}

usl_status usli_temporary_file(usl_ctx *ctx, const char *path, usli_temporary *t) {
    char dir[LONGEST];
    USLI_TRY(begin(ctx, path, t));
    if (!folder_of(path, dir)) return fail(ctx, t, path);
    remove_what_is_left(ctx, dir);
    t->fd = open_unnamed(dir, t->name);
    /* Nobody can open it before it has its name. */
    if (t->fd >= 0) (void)!flock(t->fd, LOCK_EX | LOCK_NB);
    for (int attempt = 0; t->fd < 0; attempt++) {
        new_name(t);
        t->fd = open(t->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (t->fd < 0 && errno != EEXIST) return fail(ctx, t, path);
        t->named = t->fd >= 0 && (keep(t->fd, t->name) || attempt >= PATIENCE);
        if (t->fd < 0 || t->named) continue;
        close(t->fd);
        unlink(t->name);
        t->fd = -1;
    }
    return USL_OK;
}

usl_status usli_temporary_give_name(usl_ctx *ctx, usli_temporary *t) {
    for (; !t->named; new_name(t)) {
        t->named = give_name(t->fd, t->name) == 0;
        if (t->named) break;
        if (errno != EEXIST) return usli_io_fail(ctx, t->name, "cannot be made");
    }
    return USL_OK;
}

/* ---- Folders ---- */

usl_status usli_temporary_folder(usl_ctx *ctx, const char *path, usli_temporary *t) {
    char dir[LONGEST];
    USLI_TRY(begin(ctx, path, t));
    if (!folder_of(path, dir)) return fail(ctx, t, path);
    remove_what_is_left(ctx, dir);
    for (int attempt = 0; !t->named; new_name(t), attempt++) {
        if (mkdir(t->name, 0777) != 0) {
            if (errno != EEXIST) return fail(ctx, t, path);
            continue;
        }
        t->fd = open(t->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (t->fd < 0 && (errno != ENOENT || attempt >= PATIENCE)) {
            int why = errno;
            usli_remove_empty_dir(t->name);
            errno = why;
            return fail(ctx, t, path);
        }
        t->named = t->fd >= 0 && (keep(t->fd, t->name) || attempt >= PATIENCE);
        if (t->named) break;
        if (t->fd >= 0) close(t->fd);
        t->fd = -1;
        usli_remove_empty_dir(t->name);
    }
    return USL_OK;
}

void usli_temporary_close(usl_ctx *ctx, usli_temporary *t, bool kept) {
    if (!t->name) return;
    if (t->named && !kept) usli_remove_quietly(t->name);
    if (t->fd >= 0) close(t->fd);
    usli_free(ctx, t->name);
    *t = (usli_temporary){ NULL, 0, -1, false };
}

/* ---- Locks ---- */

usl_status usli_folder_lock(usl_ctx *ctx, const char *path, int *fd) {
    const struct timespec pause = { 0, 20000000 };
    *fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (*fd >= 0 && flock(*fd, LOCK_EX | LOCK_NB) != 0) {
        usl_status st = errno == EWOULDBLOCK || errno == EINTR ? usli_checkpoint(ctx) : USL_OK;
        if (st != USL_OK || (errno != EWOULDBLOCK && errno != EINTR)) {
            close(*fd);
            *fd = -1;
            return st;
        }
        nanosleep(&pause, NULL);
    }
    return USL_OK;
}

void usli_folder_unlock(int fd) {
    if (fd >= 0) close(fd);
}
