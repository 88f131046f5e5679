/* A service that fine-tunes on request and serves the result: one frozen base, held once, under a model that answers
 * and under models that train beside it, each with a context and a thread of its own.
 *
 *     06_service MODEL FOLDER        reads requests from standard input, a line each:
 *
 *     train NAME TEXT     trains adapter NAME on TEXT in the background; asking goes on meanwhile
 *     ask NAME PROMPT     the answer of adapter NAME; "base" is the model without one
 *     wait                until all trainings have ended
 *     memory              bytes held by all contexts, and models that share the base */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unsloth.h>

enum { MOST_JOBS = 8, LINE = 4096 };

typedef struct job {
    usl_ctx *ctx;
    usl_model *model;
    const char *path; /* of the model, for its tokenizer */
    char name[64], text[LINE], dir[512], error[1024];
    pthread_t thread;
    atomic_int done;
    int used;
} job;

typedef struct service {
    usl_ctx *ctx;
    usl_model *base;
    usl_tokenizer *tok;
    const char *folder;
    job jobs[MOST_JOBS];
} service;

/* ---- Memory of all contexts, counted: [ size | block ] ---- */

static atomic_size_t held;
enum { HEAD = 16 };

static void *counted(void *ud, void *ptr, size_t size) {
    char *block = ptr ? (char *)ptr - HEAD : NULL;
    size_t old = 0;
    (void)ud;
    if (block) memcpy(&old, block, sizeof old);
    if (size == 0) {
        free(block);
        atomic_fetch_sub(&held, old);
        return NULL;
    }
    if (!(block = realloc(block, size + HEAD))) return NULL;
    memcpy(block, &size, sizeof size);
    atomic_fetch_add(&held, size - old);
    return block + HEAD;
}

static usl_ctx *new_ctx(int threads) {
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    opts.realloc_fn = counted;
    opts.threads = threads;
    return usl_ctx_new(&opts, &ctx) == USL_OK ? ctx : NULL;
}

/* ---- Training, on a thread of its own ---- */

static usl_status train(job *j, usl_rows *rows) {
    usl_lora_opts lora = USL_LORA_OPTS_INIT;
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    usl_step_stats s = { .size = sizeof s };
    usl_trainer *trainer;
    opts.batch = opts.accumulation = 1;
    opts.max_steps = 30;
    opts.learning_rate = 5e-3;
    usl_status st = usl_model_add_lora(j->model, &lora);
    if (st == USL_OK) st = usl_trainer_new(j->model, rows, NULL, &opts, &trainer);
    if (st != USL_OK) return st;
    while (st == USL_OK) st = usl_trainer_step(trainer, &s);
    usl_trainer_free(trainer);
    return st == USL_ERR_NOT_FOUND ? usl_model_save_adapter(j->model, j->dir, NULL) : st;
}

static void *run_job(void *arg) {
    job *j = arg;
    usl_tokenizer *tok = NULL;
    usl_rows *rows = NULL;
    int32_t *ids = NULL;
    size_t count;
    usl_status st = usl_rows_new(j->ctx, 256, &rows);
    if (st == USL_OK) st = usl_tokenizer_open(j->ctx, j->path, &tok);
    if (st == USL_OK) st = usl_tokenizer_encode(j->ctx, tok, j->text, strlen(j->text), 1, &ids, &count);
    if (st == USL_OK) st = usl_rows_add(rows, ids, NULL, count);
    if (st == USL_OK) st = train(j, rows);
    snprintf(j->error, sizeof j->error, "%s", st == USL_OK ? "" : usl_ctx_errmsg(j->ctx));
    usl_free(j->ctx, ids);
    usl_rows_free(rows);
    usl_tokenizer_free(tok);
    usl_model_free(j->model);
    usl_ctx_free(j->ctx);
    atomic_store(&j->done, 1);
    return NULL;
}

static void begin_job(service *s, const char *path, const char *name, const char *text) {
    job *j = NULL;
    for (int i = 0; i < MOST_JOBS && !j; i++)
        if (!s->jobs[i].used) j = &s->jobs[i];
    if (!j) {
        printf("busy: %d trainings are under way\n", MOST_JOBS);
        return;
    }
    snprintf(j->name, sizeof j->name, "%s", name);
    snprintf(j->text, sizeof j->text, "%s", text);
    snprintf(j->dir, sizeof j->dir, "%s/%s", s->folder, j->name);
    j->path = path;
    atomic_store(&j->done, 0);
    if (!(j->ctx = new_ctx(1)) || usl_model_share(j->ctx, s->base, &j->model) != USL_OK) {
        printf("no memory for a training\n");
        usl_ctx_free(j->ctx);
        return;
    }
    j->used = 1;
    if (pthread_create(&j->thread, NULL, run_job, j) != 0) exit(1);
}

/* What has ended is put on the model that answers; all: what has not is waited for. */
static void take_results(service *s, int all) {
    for (int i = 0; i < MOST_JOBS; i++) {
        job *j = &s->jobs[i];
        if (!j->used || (!all && !atomic_load(&j->done))) continue;
        pthread_join(j->thread, NULL);
        j->used = 0;
        if (*j->error)
            printf("%s: %s\n", j->name, j->error);
        else if (usl_model_load_adapter(s->base, j->dir, j->name) != USL_OK)
            printf("%s: %s\n", j->name, usl_ctx_errmsg(s->ctx));
        else
            printf("%s is trained\n", j->name);
    }
}

/* ---- Answers ---- */

static usl_status answer(service *s, const char *name, const char *prompt) {
    usl_generate_opts opts = USL_GENERATE_OPTS_INIT;
    int32_t *ids = NULL, *out = NULL;
    size_t count, out_count, len;
    char *text = NULL;
    opts.max_new_tokens = 12;
    usl_status st = usl_model_set_adapter(s->base, strcmp(name, "base") == 0 ? NULL : name);
    if (st == USL_OK) st = usl_tokenizer_encode(s->ctx, s->tok, prompt, strlen(prompt), 1, &ids, &count);
    if (st == USL_OK) st = usl_model_generate(s->base, ids, count, &opts, &out, &out_count);
    if (st == USL_OK) st = usl_tokenizer_decode(s->ctx, s->tok, out, out_count, 1, &text, &len);
    if (st == USL_OK) printf("%s: %s|%s\n", name, prompt, text);
    usl_free(s->ctx, text);
    usl_free(s->ctx, out);
    usl_free(s->ctx, ids);
    return st;
}

int main(int argc, char **argv) {
    if (argc < 3) return fprintf(stderr, "usage: %s MODEL FOLDER\n", argv[0]), 1;
    static service s;
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    char line[LINE];
    opts.load_in_4bit = 1;
    s.folder = argv[2];
    if (!(s.ctx = new_ctx(1))) return 1;
    if (usl_model_open(s.ctx, argv[1], &opts, &s.base) != USL_OK ||
        usl_tokenizer_open(s.ctx, argv[1], &s.tok) != USL_OK)
        return fprintf(stderr, "%s\n", usl_ctx_errmsg(s.ctx)), 1;
    while (fgets(line, sizeof line, stdin)) {
        char name[64], rest[LINE] = "";
        usl_model_info info = { .size = sizeof info };
        take_results(&s, 0);
        line[strcspn(line, "\n")] = '\0';
        if (sscanf(line, "train %63s %4095[^\n]", name, rest) == 2) {
            begin_job(&s, argv[1], name, rest);
        } else if (sscanf(line, "ask %63s %4095[^\n]", name, rest) == 2) {
            if (answer(&s, name, rest) != USL_OK) printf("%s: %s\n", name, usl_ctx_errmsg(s.ctx));
        } else if (strcmp(line, "wait") == 0) {
            take_results(&s, 1);
        } else if (strcmp(line, "memory") == 0) {
            usl_model_get_info(s.base, &info);
            printf("%zu bytes held, %llu of them frozen weights, %d models beside share them\n", atomic_load(&held),
                   (unsigned long long)info.weight_bytes, info.shared);
        } else {
            printf("train NAME TEXT, ask NAME PROMPT, wait or memory is wanted\n");
        }
        fflush(stdout);
    }
    take_results(&s, 1);
    usl_tokenizer_free(s.tok);
    usl_model_free(s.base);
    usl_ctx_free(s.ctx);
    printf("%zu bytes held at the end\n", atomic_load(&held));
    return atomic_load(&held) != 0;
}
