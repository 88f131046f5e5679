#define _GNU_SOURCE
#include "core/base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "core/base/temporary.h"

usl_status usli_io_fail(usl_ctx *ctx, const char *path, const char *what) {
    int e = errno;
    const char *remedy = e == ENOSPC || e == EDQUOT  ? "; free some disk space or choose another folder"
                         : e == EACCES || e == EPERM ? "; check the permissions"
                                                     : "";
    return usli_fail(ctx, e == ENOENT ? USL_ERR_NOT_FOUND : USL_ERR_IO, "%s: %s: %s%s", path, what, strerror(e),
                     remedy);
}

usl_status usli_map_open(usl_ctx *ctx, const char *path, usli_map **out) {
    *out = NULL;
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_READ));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return usli_io_fail(ctx, path, "cannot be opened");
    struct stat sb;
    usl_status st = USL_OK;
    usli_map *map = NULL;
    if (fstat(fd, &sb) != 0) {
        st = usli_io_fail(ctx, path, "cannot be read");
    } else if (!S_ISREG(sb.st_mode)) {
        st = usli_fail(ctx, USL_ERR_IO, "%s: is not a regular file", path);
    } else if (!(map = usli_calloc(ctx, 1, sizeof *map)) || !(map->path = usli_strdup(ctx, path))) {
        st = usli_nomem(ctx, sizeof *map);
    } else {
        map->size = (size_t)sb.st_size;
        map->data = (const uint8_t *)"";
        if (map->size) {
            void *data = mmap(NULL, map->size, PROT_READ, MAP_PRIVATE, fd, 0);
            if (data == MAP_FAILED)
                st = usli_io_fail(ctx, path, "cannot be mapped");
            else
                map->data = data;
        }
    }
    close(fd);
    if (st != USL_OK) {
        if (map) usli_free(ctx, map->path);
        usli_free(ctx, map);
        return st;
    }
    map->ctx = ctx;
    usli_ctx_retain(ctx);
    atomic_init(&map->refs, 1);
    *out = map;
    return USL_OK;
}

usli_map *usli_map_retain(usli_map *map) {
    if (map) atomic_fetch_add(&map->refs, 1);
    return map;
}

void usli_map_release(usli_map *map) {
    if (!map || atomic_fetch_sub(&map->refs, 1) != 1) return;
    usl_ctx *ctx = map->ctx;
    if (map->size) munmap((void *)(uintptr_t)map->data, map->size);
    usli_free(ctx, map->path);
    usli_free(ctx, map);
    usl_ctx_free(ctx);
}

usl_status usli_read_file(usl_ctx *ctx, const char *path, char **out, size_t *size) {
    usli_map *map;
    *out = NULL;
    USLI_TRY(usli_map_open(ctx, path, &map));
    usl_status st = USL_OK;
    if ((*out = usli_malloc(ctx, map->size + 1))) {
        memcpy(*out, map->data, map->size);
        (*out)[map->size] = 0;
        if (size) *size = map->size;
    } else {
        st = usli_nomem(ctx, map->size + 1);
    }
    usli_map_release(map);
    return st;
}

enum { WRITE_BUFFER = 1 << 18 };

struct usli_writer {
    usl_ctx *ctx;
    char *path;
    usli_temporary t;
    uint64_t offset;
    size_t used;
    bool unsynced, finished, committed;
    bool device; /* one of characters, as /dev/null: written to as it is */
    char buffer[WRITE_BUFFER];
};

/* As a file that has its name already. */
static usl_status open_device(usl_ctx *ctx, const char *path, usli_temporary *t) {
    *t = (usli_temporary){ .name = usli_strdup(ctx, path), .fd = -1, .named = true };
    if (!t->name) return usli_nomem(ctx, strlen(path));
    t->fd = open(path, O_WRONLY | O_CLOEXEC);
    if (t->fd >= 0) return USL_OK;
    usl_status st = usli_io_fail(ctx, path, "cannot be written");
    usli_temporary_close(ctx, t, true);
    return st;
}

usl_status usli_writer_open(usl_ctx *ctx, const char *path, usli_writer **out) {
    struct stat sb;
    *out = NULL;
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    bool there = stat(path, &sb) == 0, device = there && S_ISCHR(sb.st_mode);
    /* The rename would put a file in the place of a disk or a pipe. */
    if (there && !S_ISREG(sb.st_mode) && !device)
        return usli_fail(ctx, USL_ERR_IO, "%s: is not a regular file and cannot be replaced by one", path);
    usli_writer *w = usli_malloc(ctx, sizeof *w);
    if (!w) return usli_nomem(ctx, sizeof *w);
    w->ctx = ctx;
    w->offset = w->used = 0;
    w->finished = w->unsynced = false;
    w->committed = w->device = device; /* there is nothing to rename or to remove */
    w->path = usli_strdup(ctx, path);
    usl_status st = !w->path ? usli_nomem(ctx, strlen(path))
                    : device ? open_device(ctx, path, &w->t)
                             : usli_temporary_file(ctx, path, &w->t);
    if (st != USL_OK) {
        usli_free(ctx, w->path);
        usli_free(ctx, w);
        return st;
    }
    *out = w;
    return USL_OK;
}

static usl_status write_all(usli_writer *w, const char *data, size_t size) {
    while (size) {
        ssize_t n = write(w->t.fd, data, size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return usli_io_fail(w->ctx, w->path, "cannot be written");
        data += n;
        size -= (size_t)n;
    }
    return USL_OK;
}

static usl_status flush(usli_writer *w) {
    usl_status st = write_all(w, w->buffer, w->used);
    w->used = 0;
    return st;
}

usl_status usli_writer_write(usli_writer *w, const void *data, size_t size) {
    if (size == 0) return USL_OK; /* data may be NULL then */
    w->offset += size;
    if (size > WRITE_BUFFER - w->used) USLI_TRY(flush(w));
    if (size >= WRITE_BUFFER) return write_all(w, data, size);
    memcpy(w->buffer + w->used, data, size);
    w->used += size;
    return USL_OK;
}

usl_status usli_writer_pad(usli_writer *w, size_t alignment) {
    static const char zeros[256];
    size_t left = (alignment - w->offset % alignment) % alignment;
    while (left) {
        size_t n = left < sizeof zeros ? left : sizeof zeros;
        USLI_TRY(usli_writer_write(w, zeros, n));
        left -= n;
    }
    return USL_OK;
}

uint64_t usli_writer_offset(const usli_writer *w) {
    return w->offset;
}

static void sync_parent(const char *path) {
    /* The rename itself must reach the disk; a file system that cannot sync folders is no error. */
    char dir[4096];
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) : 0;
    if (n >= sizeof dir) return;
    memcpy(dir, path, n);
    dir[n] = 0;
    int fd = open(!slash ? "." : n ? dir : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    (void)fsync(fd);
    close(fd);
}

/* It stays open, and so locked, until it is closed. */
usl_status usli_writer_finish(usli_writer *w) {
    if (w->finished) return USL_OK;
    USLI_TRY(flush(w));
    if (!w->unsynced && fsync(w->t.fd) != 0 && errno != EINVAL)
        return usli_io_fail(w->ctx, w->path, "cannot be synced");
    USLI_TRY(usli_temporary_give_name(w->ctx, &w->t));
    w->finished = true;
    return USL_OK;
}

void usli_writer_leave_unsynced(usli_writer *w) {
    w->unsynced = true;
}

const char *usli_writer_temporary(const usli_writer *w) {
    return w->t.name;
}

usl_status usli_writer_commit(usli_writer *w) {
    USLI_TRY(usli_writer_finish(w));
    if (w->device) return USL_OK;
    if (rename(w->t.name, w->path) != 0) return usli_io_fail(w->ctx, w->path, "cannot be renamed into place");
    w->committed = true;
    if (!w->unsynced) sync_parent(w->path);
    return USL_OK;
}

void usli_writer_close(usli_writer *w) {
    if (!w) return;
    usli_temporary_close(w->ctx, &w->t, w->committed);
    usli_free(w->ctx, w->path);
    usli_free(w->ctx, w);
}

usl_status usli_rename(usl_ctx *ctx, const char *from, const char *to) {
    USLI_TRY(usli_may(ctx, from, USL_ACCESS_WRITE));
    USLI_TRY(usli_may(ctx, to, USL_ACCESS_WRITE));
    if (rename(from, to) != 0) return usli_io_fail(ctx, to, "cannot be renamed into place");
    sync_parent(to);
    return USL_OK;
}

usl_status usli_write_file(usl_ctx *ctx, const char *path, const void *data, size_t size) {
    usli_writer *w;
    USLI_TRY(usli_writer_open(ctx, path, &w));
    usl_status st = usli_writer_write(w, data, size);
    if (st == USL_OK) st = usli_writer_commit(w);
    usli_writer_close(w);
    return st;
}

usl_status usli_remove_file(usl_ctx *ctx, const char *path) {
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    return unlink(path) == 0 || errno == ENOENT ? USL_OK : usli_io_fail(ctx, path, "cannot be removed");
}

void usli_remove_empty_dir(const char *path) {
    (void)rmdir(path);
}

bool usli_is_file(const char *path) {
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISREG(sb.st_mode);
}

bool usli_is_dir(const char *path) {
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

bool usli_is_same(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

usl_status usli_make_dirs(usl_ctx *ctx, const char *path) {
    if (!*path) return usli_fail(ctx, USL_ERR_INVALID, "the folder's name is empty; give a path, \".\" for this one");
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    char *copy = usli_strdup(ctx, path);
    if (!copy) return usli_nomem(ctx, strlen(path));
    usl_status st = USL_OK;
    for (char *p = copy + 1;; p++) {
        if (*p && *p != '/') continue;
        char c = *p;
        *p = 0;
        if (mkdir(copy, 0777) != 0 && errno != EEXIST) {
            st = usli_io_fail(ctx, path, "the folder cannot be made");
            break;
        }
        *p = c;
        if (!c) break;
    }
    usli_free(ctx, copy);
    if (st == USL_OK && !usli_is_dir(path))
        return usli_fail(ctx, USL_ERR_IO, "%s: is a file where a folder is wanted", path);
    return st;
}

uint64_t usli_free_disk(const char *path) {
    char dir[4096];
    size_t n = strlen(path);
    struct stat sb;
    if (n >= sizeof dir || (stat(path, &sb) == 0 && S_ISCHR(sb.st_mode))) return UINT64_MAX;
    memcpy(dir, path, n + 1);
    for (;;) {
        struct statvfs fs;
        if (statvfs(*dir ? dir : ".", &fs) == 0) return (uint64_t)fs.f_bavail * fs.f_frsize;
        char *slash = strrchr(dir, '/');
        if (!slash) {
            if (!*dir) return UINT64_MAX;
            *dir = 0;
        } else {
            slash[slash == dir] = 0;
        }
    }
}

char *usli_path_join(usl_ctx *ctx, const char *dir, const char *name) {
    size_t a = strlen(dir), b = strlen(name);
    char *path = usli_malloc(ctx, a + b + 2);
    if (!path) return NULL;
    memcpy(path, dir, a);
    if (a && dir[a - 1] != '/') path[a++] = '/';
    memcpy(path + a, name, b + 1);
    return path;
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

usl_status usli_list_dir(usl_ctx *ctx, const char *path, char ***names, size_t *count) {
    *names = NULL;
    *count = 0;
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_READ));
    DIR *dir = opendir(path);
    if (!dir) return usli_io_fail(ctx, path, "the folder cannot be read");
    size_t cap = 0;
    usl_status st = USL_OK;
    for (struct dirent *e; (e = readdir(dir));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        USLI_TRYGO(usli_grow(ctx, names, &cap, *count + 1, sizeof **names));
        if (!((*names)[*count] = usli_strdup(ctx, e->d_name))) {
            st = usli_nomem(ctx, strlen(e->d_name));
            goto done;
        }
        ++*count;
    }
    if (*count) qsort(*names, *count, sizeof **names, by_name);
done:
    closedir(dir);
    if (st != USL_OK) {
        usli_free_names(ctx, *names, *count);
        *names = NULL;
        *count = 0;
    }
    return st;
}

void usli_free_names(usl_ctx *ctx, char **names, size_t count) {
    for (size_t i = 0; names && i < count; i++) usli_free(ctx, names[i]);
    usli_free(ctx, names);
}

static usl_status remove_tree(usl_ctx *ctx, const char *path, int depth) {
    struct stat sb;
    USLI_TRY(usli_may(ctx, path, USL_ACCESS_WRITE));
    if (lstat(path, &sb) != 0) return errno == ENOENT ? USL_OK : usli_io_fail(ctx, path, "cannot be looked at");
    if (!S_ISDIR(sb.st_mode)) return unlink(path) == 0 ? USL_OK : usli_io_fail(ctx, path, "the file cannot be removed");
    if (depth == 0) return usli_fail(ctx, USL_ERR_IO, "%s: folders nest too deeply to be removed", path);
    char **names;
    size_t count;
    USLI_TRY(usli_list_dir(ctx, path, &names, &count));
    usl_status st = USL_OK;
    for (size_t i = 0; i < count && st == USL_OK; i++) {
        char *child = usli_path_join(ctx, path, names[i]);
        st = child ? remove_tree(ctx, child, depth - 1) : usli_nomem(ctx, strlen(path));
        usli_free(ctx, child);
    }
    usli_free_names(ctx, names, count);
    if (st == USL_OK && rmdir(path) != 0) st = usli_io_fail(ctx, path, "the folder cannot be removed");
    return st;
}

usl_status usli_remove_tree(usl_ctx *ctx, const char *path) {
    return remove_tree(ctx, path, 64);
}

/* path has room for `size` bytes; what is below is removed with the same memory. */
static void remove_quietly(char *path, size_t size, int depth) {
    struct stat sb;
    if (lstat(path, &sb) != 0) return;
    if (!S_ISDIR(sb.st_mode)) {
        unlink(path);
        return;
    }
    DIR *dir = depth ? opendir(path) : NULL;
    size_t len = strlen(path);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        if (len + strlen(e->d_name) + 2 > size) continue;
        path[len] = '/';
        memcpy(path + len + 1, e->d_name, strlen(e->d_name) + 1);
        remove_quietly(path, size, depth - 1);
        path[len] = 0;
    }
    if (dir) closedir(dir);
    rmdir(path);
}

void usli_remove_quietly(const char *path) {
    char buffer[4096];
    if (strlen(path) >= sizeof buffer) return;
    memcpy(buffer, path, strlen(path) + 1);
    remove_quietly(buffer, sizeof buffer, 8);
}

bool usli_is_terminal(int stream) {
    return isatty(stream) == 1;
}

double usli_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

uint64_t usli_process_peak_bytes(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (uint64_t)usage.ru_maxrss * 1024 : 0;
}

uint64_t usli_process_bytes(void) {
    unsigned long long total = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f) return 0;
    int n = fscanf(f, "%llu %llu", &total, &resident);
    fclose(f);
    return n == 2 ? (uint64_t)resident * (uint64_t)sysconf(_SC_PAGESIZE) : 0;
}

/* Of a file of lines "name number". */
static unsigned long long number_in(const char *path, const char *name) {
    FILE *f = fopen(path, "re");
    char line[256];
    unsigned long long n = 0;
    size_t len = strlen(name);
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, name, len) == 0 && sscanf(line + len, " %llu", &n) == 1) break;
    if (f) fclose(f);
    return n;
}

uint64_t usli_free_memory(void) {
    static const char *const GROUP = "/sys/fs/cgroup/memory.max", *const STAT = "/sys/fs/cgroup/memory.stat";
    uint64_t bytes = (uint64_t)number_in("/proc/meminfo", "MemAvailable:") * 1024;
    unsigned long long max = number_in(GROUP, ""), used = number_in("/sys/fs/cgroup/memory.current", "");
    /* Pages of files, as of a model's, give way. */
    unsigned long long files = number_in(STAT, "active_file") + number_in(STAT, "inactive_file");
    used -= files < used ? files : used;
    return max > used && max - used < bytes ? max - used : bytes;
}
