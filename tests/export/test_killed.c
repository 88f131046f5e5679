/* Exports that are killed, and two at once. The other export is this program again, as a child that stops in the middle
 * until it is told to go on or is killed. */
#define _GNU_SOURCE
#include "tests/test.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/export/export.h"

static const char MODEL[] = "examples/tiny-llama";

/* ---- The system, as the library sees it ---- */

static bool no_unnamed;     /* as on a file system without files that have no name */
static bool other_numbers;  /* as where what is open has another number than its name */
static const char *watched; /* the folder whose temporaries are counted when the free disk is asked for */
static int seen = -1;

static int temporaries(const char *dir) {
    DIR *d = opendir(dir);
    int n = 0;
    for (struct dirent *e; d && (e = readdir(d));) n += strstr(e->d_name, ".tmp-") != NULL;
    if (d) closedir(d);
    return n;
}

int open(const char *path, int flags, ...);
int open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;
    va_end(args);
    if (no_unnamed && (flags & O_TMPFILE) == O_TMPFILE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int fstat(int fd, struct stat *out) {
    int (*real)(int, struct stat *);
    void *symbol = dlsym(RTLD_NEXT, "fstat");
    memcpy(&real, &symbol, sizeof real);
    int result = real(fd, out);
    if (other_numbers) out->st_ino ^= 1;
    return result;
}

int statvfs(const char *restrict path, struct statvfs *restrict out) {
    int (*real)(const char *, struct statvfs *);
    void *symbol = dlsym(RTLD_NEXT, "statvfs");
    memcpy(&real, &symbol, sizeof real);
    if (watched) seen = temporaries(watched);
    return real(path, out);
}

/* ---- Exports ---- */

struct child;

typedef struct rig {
    usl_ctx *ctx;
    usl_model *m;
    usl_tokenizer *tok;
    int calls, stop_at; /* of progress; 0: never */
    int (*on_stop)(struct rig *r);
    const char *path; /* for on_stop */
    struct child *other;
} rig;

/* In a child: says that it is there, and waits. */
static int wait_for_word(rig *r) {
    char byte = 's';
    (void)r;
    return write(STDOUT_FILENO, &byte, 1) != 1 || read(STDIN_FILENO, &byte, 1) != 1;
}

static int on_progress(void *ud, const char *what, uint64_t done, uint64_t total) {
    rig *r = ud;
    (void)what;
    (void)done;
    (void)total;
    return ++r->calls == r->stop_at && r->on_stop(r);
}

static void open_rig(rig *r, int stop_at) {
    memset(r, 0, sizeof *r);
    usl_ctx_opts ctx_opts = USL_CTX_OPTS_INIT;
    ctx_opts.progress_fn = on_progress;
    ctx_opts.progress_ud = r;
    CHECK(usl_ctx_new(&ctx_opts, &r->ctx) == USL_OK, "no context");
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    opts.device = "cpu";
    opts.dtype = USL_F32;
    CHECK_OK(r->ctx, usl_model_open(r->ctx, MODEL, &opts, &r->m));
    CHECK_OK(r->ctx, usl_tokenizer_open(r->ctx, MODEL, &r->tok));
    r->calls = 0;
    r->stop_at = stop_at;
    r->on_stop = wait_for_word;
}

static void close_rig(rig *r) {
    usl_tokenizer_free(r->tok);
    usl_model_free(r->m);
    usl_ctx_free(r->ctx);
}

static usl_status export_to(rig *r, const char *path, bool folder) {
    if (!folder) return usl_export_gguf(r->m, r->tok, path, "q8_0");
    return usl_export_folder(r->m, r->tok, path, USL_BF16, NULL, NULL);
}

/* What this program does as a child: 0 when the export is done. */
static int be_child(char **argv) {
    rig r;
    no_unnamed = atoi(argv[4]);
    open_rig(&r, atoi(argv[3]));
    usl_status st = export_to(&r, argv[2], strcmp(argv[1], "folder") == 0);
    close_rig(&r);
    return st != USL_OK;
}

/* ---- Children ---- */

typedef struct child {
    pid_t pid;
    int to, from;
} child;

/* Starts an export, and comes back when it has stopped at that call of progress. */
static child start(const char *path, bool folder, int stop_at, bool named) {
    int to[2], from[2];
    char stop[16], byte = 0;
    child c = { -1, -1, -1 };
    snprintf(stop, sizeof stop, "%d", stop_at);
    CHECK(pipe(to) == 0 && pipe(from) == 0, "no pipes");
    c.pid = fork();
    if (c.pid == 0) {
        dup2(to[0], STDIN_FILENO);
        dup2(from[1], STDOUT_FILENO);
        for (int fd = 3; fd < 256; fd++) close(fd);
        execl("/proc/self/exe", "test_killed", folder ? "folder" : "file", path, stop, named ? "1" : "0", (char *)NULL);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    c.to = to[1];
    c.from = from[0];
    CHECK(read(c.from, &byte, 1) == 1 && byte == 's', "the export to %s did not stop at %d", path, stop_at);
    return c;
}

/* Kills it, or lets it go on to its end. */
static int stop(child *c, bool killed) {
    int status = -1;
    if (killed)
        kill(c->pid, SIGKILL);
    else
        CHECK(write(c->to, "g", 1) == 1, "the child is gone");
    waitpid(c->pid, &status, 0);
    close(c->to);
    close(c->from);
    return status;
}

static bool opens(rig *r, const char *path) {
    usl_model *read = NULL;
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    opts.device = "cpu";
    usl_status st = usl_model_open(r->ctx, path, &opts, &read);
    usl_model_free(read);
    return st == USL_OK;
}

/* ---- Cases ---- */

enum { WRITING = 8, LOOKING = -1 };

/* The last call of progress before an export's end lies in the look at what was written. */
static int calls_of(rig *r, const char *path, bool folder) {
    r->calls = 0;
    CHECK_OK(r->ctx, export_to(r, path, folder));
    usl_path_remove(r->ctx, path);
    return r->calls;
}

static void test_case(rig *r, const char *dir, bool folder, bool named, bool looking) {
    char path[128], other[128];
    snprintf(path, sizeof path, "%s/model%s", dir, folder ? "" : ".gguf");
    snprintf(other, sizeof other, "%s/other.gguf", dir);
    const char *beside = folder ? path : dir, *next = folder ? path : other; /* next: to the same place */
    int at = looking ? calls_of(r, path, folder) : WRITING;
    int left = folder || named || looking ? 1 : 0;

    /* While one is at work another to the same place takes nothing from it, and both end well. */
    child c = start(path, folder, at, named);
    CHECK(temporaries(beside) == left, "%d temporaries in %s, not %d", temporaries(beside), beside, left);
    CHECK_OK(r->ctx, export_to(r, path, folder));
    CHECK(temporaries(beside) == left, "%d temporaries are left of the other, not %d", temporaries(beside), left);
    CHECK(opens(r, path), "the first does not open: %s", usl_ctx_errmsg(r->ctx));
    int status = stop(&c, false);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the other export failed");
    CHECK(opens(r, path) && temporaries(beside) == 0, "the other does not open, or is not tidy");
    usl_path_remove(r->ctx, path);

    /* What a killed one leaves is gone before the next asks for the free disk. */
    c = start(path, folder, at, named);
    status = stop(&c, true);
    CHECK(WIFSIGNALED(status), "the export was not killed");
    CHECK(temporaries(beside) == left, "%d temporaries of a killed one, not %d", temporaries(beside), left);
    CHECK(folder || !usli_is_file(path), "%s is half-written", path);
    watched = beside;
    CHECK_OK(r->ctx, export_to(r, next, folder));
    watched = NULL;
    /* A folder's own temporary is there by then, and no other. */
    CHECK(seen == (folder || no_unnamed), "the free disk is asked for with %d temporaries there", seen);
    CHECK(opens(r, next) && temporaries(beside) == 0, "%d temporaries are left for ever", temporaries(beside));
    usl_path_remove(r->ctx, next);
}

/* Whether this file system has files without names. */
static bool has_unnamed(const char *dir) {
    int fd = open(dir, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600);
    if (fd >= 0) close(fd);
    return fd >= 0;
}

/* Starts another export to the same folder, and fails. */
static int fail_beside_another(rig *r) {
    *r->other = start(r->path, true, WRITING, false);
    return 1;
}

/* A failed export does not take the folder that it made with it when another is at work there by then; and no export
 * takes what only looks like a temporary. */
static void test_failed(rig *r, const char *dir) {
    char path[128], file[160];
    child c;
    snprintf(path, sizeof path, "%s/shared", dir);
    snprintf(file, sizeof file, "%s/mine.tmp-1-2", path);
    r->path = path;
    r->other = &c;
    r->calls = 0;
    r->stop_at = WRITING;
    r->on_stop = fail_beside_another;
    CHECK(export_to(r, path, true) == USL_ERR_CANCELLED, "the first was not stopped");
    r->stop_at = 0;
    CHECK(temporaries(path) == 1, "%d temporaries, where the other has 1", temporaries(path));
    CHECK_OK(r->ctx, usli_write_file(r->ctx, file, "x", 1));
    int status = stop(&c, false);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the other export failed");
    CHECK(opens(r, path) && usli_is_file(file), "the other's folder or a stranger's file is gone");
    usl_path_remove(r->ctx, path);
}

/* Where nobody can tell whether a name is still its file's, an export is made all the same. */
static void test_numbers(rig *r, const char *dir) {
    char path[128];
    no_unnamed = other_numbers = true;
    for (int folder = 0; folder < 2; folder++) {
        snprintf(path, sizeof path, "%s/numbers%s", dir, folder ? "" : ".gguf");
        CHECK_OK(r->ctx, export_to(r, path, folder));
        CHECK(opens(r, path) && temporaries(folder ? path : dir) == 0, "%s does not open, or is not tidy", path);
        usl_path_remove(r->ctx, path);
    }
    no_unnamed = other_numbers = false;
}

int main(int argc, char **argv) {
    if (argc == 5) return be_child(argv);
    char dir[] = "/tmp/usl_test_killed_XXXXXX";
    rig r;
    CHECK(mkdtemp(dir) != NULL, "no folder for tests");
    open_rig(&r, 0);
    bool unnamed = has_unnamed(dir);
    if (!unnamed) SKIP("%s: this file system has no files without names", dir);
    for (int folder = 0; folder < 2; folder++)
        for (int named = !unnamed; named < 2; named++)
            for (int looking = 0; looking < 2; looking++) {
                no_unnamed = named;
                test_case(&r, dir, folder, named, looking);
            }
    no_unnamed = false;
    test_failed(&r, dir);
    test_numbers(&r, dir);
    usl_path_remove(r.ctx, dir);
    close_rig(&r);
    return test_end("killed");
}
