/* Files: mapped for reading, written beside, synced and renamed, so that a reader sees the old file or
 * the whole new one. The only floor with POSIX calls. */
#ifndef USLI_BASE_FILE_H
#define USLI_BASE_FILE_H

#include "core/base/ctx.h"

/* A sentence about path, from errno: what it cannot be, why, and the remedy. */
usl_status usli_io_fail(usl_ctx *ctx, const char *path, const char *what);

/* A read-only mapping, counted: weights keep their file alive. */
typedef struct usli_map {
    usl_ctx *ctx;
    const uint8_t *data; /* never NULL; size 0 points at nothing readable */
    size_t size;
    char *path;
    atomic_int refs;
} usli_map;
/* *out is new: drop with usli_map_release. A missing file is USL_ERR_NOT_FOUND, anything else USL_ERR_IO. */
usl_status usli_map_open(usl_ctx *ctx, const char *path, usli_map **out);
usli_map *usli_map_retain(usli_map *map);
void usli_map_release(usli_map *map);

/* Reads a whole file; *out is new (usli_free), has a 0 after its last byte; *size may be NULL. */
usl_status usli_read_file(usl_ctx *ctx, const char *path, char **out, size_t *size);

/* A file being written beside path, without a name or under another (temporary.h). Commit syncs and renames; close
 * without commit removes it. A device of characters, as /dev/null, is written to as it is. */
typedef struct usli_writer usli_writer;
usl_status usli_writer_open(usl_ctx *ctx, const char *path, usli_writer **out);
usl_status usli_writer_write(usli_writer *w, const void *data, size_t size); /* buffered */
usl_status usli_writer_pad(usli_writer *w, size_t alignment);                /* zeros up to a multiple of alignment */
uint64_t usli_writer_offset(const usli_writer *w);
/* The file is whole and has its temporary name, for a look before commit; nothing more is written. */
usl_status usli_writer_finish(usli_writer *w);
/* For what can be made again: a crash of the machine may leave a torn file. */
void usli_writer_leave_unsynced(usli_writer *w);
const char *usli_writer_temporary(const usli_writer *w);
usl_status usli_writer_commit(usli_writer *w); /* the handle still needs usli_writer_close */
void usli_writer_close(usli_writer *w);        /* NULL is fine */
/* Opens, writes, commits. */
usl_status usli_write_file(usl_ctx *ctx, const char *path, const void *data, size_t size);

/* A file or a folder takes another name; what had it, if a file, is replaced. */
usl_status usli_rename(usl_ctx *ctx, const char *from, const char *to);
/* Fine when there is none. */
usl_status usli_remove_file(usl_ctx *ctx, const char *path);
/* Only when nothing is in it. */
void usli_remove_empty_dir(const char *path);
bool usli_is_file(const char *path);
bool usli_is_dir(const char *path);
/* Both are there, and are one. */
bool usli_is_same(const char *a, const char *b);
/* Makes path and its parents; fine when it is there. */
usl_status usli_make_dirs(usl_ctx *ctx, const char *path);
/* Bytes that may still be written where path lies (its nearest existing parent); UINT64_MAX when unknown. */
uint64_t usli_free_disk(const char *path);
/* "dir/name", new (usli_free); NULL for want of memory. */
char *usli_path_join(usl_ctx *ctx, const char *dir, const char *name);
/* Names in a folder without "." and "..", sorted; *names and each name are new: usli_free_names. */
usl_status usli_list_dir(usl_ctx *ctx, const char *path, char ***names, size_t *count);
void usli_free_names(usl_ctx *ctx, char **names, size_t count);

/* Removes a file, or a folder with all in it; links are removed, not followed. Fine when nothing is there. */
usl_status usli_remove_tree(usl_ctx *ctx, const char *path);
/* The same without an error, and without memory: for what a failure leaves. */
void usli_remove_quietly(const char *path);
/* stream: 0, 1 or 2. */
bool usli_is_terminal(int stream);

/* Seconds of a clock that only goes forward. */
double usli_now(void);
/* Peak and current bytes of this process in memory, from the operating system; 0 when unknown. */
uint64_t usli_process_peak_bytes(void);
uint64_t usli_process_bytes(void);
/* Memory the machine can still give (MemAvailable, and the cgroup's limit); 0 when unknown. */
uint64_t usli_free_memory(void);

#endif
