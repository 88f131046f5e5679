/* Two contexts on two threads at once: nothing is shared, so nothing has to be locked. Equal work gives equal numbers.
 *
 *     05_two_threads MODEL */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unsloth.h>

typedef struct job {
    const char *model;
    double loss;
    char error[1024];
} job;

/* One way out: what was not made is NULL, and every _free takes that. */
static void work(usl_ctx *ctx, job *j) {
    static const char TEXT[] = "Two heads are better than one.";
    usl_model *model = NULL;
    usl_tokenizer *tok = NULL;
    usl_rows *rows = NULL;
    usl_trainer *trainer = NULL;
    usl_lora_opts lora = USL_LORA_OPTS_INIT;
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    usl_step_stats s = { .size = sizeof s };
    int32_t *ids = NULL;
    size_t count;
    opts.batch = opts.accumulation = 1;
    opts.max_steps = 20;
    opts.learning_rate = 5e-3;
    usl_status st = usl_model_open(ctx, j->model, NULL, &model);
    if (st == USL_OK) st = usl_tokenizer_open(ctx, j->model, &tok);
    if (st == USL_OK) st = usl_model_add_lora(model, &lora);
    if (st == USL_OK) st = usl_rows_new(ctx, 0, &rows);
    if (st == USL_OK) st = usl_tokenizer_encode(ctx, tok, TEXT, strlen(TEXT), 1, &ids, &count);
    if (st == USL_OK) st = usl_rows_add(rows, ids, NULL, count);
    if (st == USL_OK) st = usl_trainer_new(model, rows, NULL, &opts, &trainer);
    while (st == USL_OK) st = usl_trainer_step(trainer, &s);
    j->loss = s.loss;
    if (st != USL_ERR_NOT_FOUND) snprintf(j->error, sizeof j->error, "%s", usl_ctx_errmsg(ctx));
    usl_trainer_free(trainer);
    usl_rows_free(rows);
    usl_free(ctx, ids);
    usl_tokenizer_free(tok);
    usl_model_free(model);
}

static void *run(void *arg) {
    job *j = arg;
    usl_ctx_opts opts = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    opts.threads = 1; /* each context brings threads of its own */
    if (usl_ctx_new(&opts, &ctx) != USL_OK) return snprintf(j->error, sizeof j->error, "no memory"), NULL;
    work(ctx, j);
    usl_ctx_free(ctx);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 2) return fprintf(stderr, "usage: %s MODEL\n", argv[0]), 1;
    job jobs[2] = { { argv[1], 0, "" }, { argv[1], 0, "" } };
    pthread_t threads[2];
    int failed = 0;
    for (int i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, run, &jobs[i]) != 0) return 1;
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        printf("thread %d: loss %.6f%s%s\n", i, jobs[i].loss, *jobs[i].error ? ", " : "", jobs[i].error);
        failed |= *jobs[i].error != 0;
    }
    return failed || jobs[0].loss != jobs[1].loss;
}
