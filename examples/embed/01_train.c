/* A C host: loads a model, trains an adapter with a progress callback, can be cancelled from another thread, generates
 * piece by piece, saves and exports.
 *
 *     01_train MODEL OUT [SECONDS]       after SECONDS the training is cancelled; what it learned till then is kept */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unsloth.h>

static const char *const TEXTS[] = { "The sky is blue.", "The sea is blue.", "The grass is green.",
                                     "The sun is yellow." };
enum { TEXT_COUNT = sizeof TEXTS / sizeof *TEXTS };

/* Every call that can fail goes through here: the context knows the sentence. */
static void check(usl_ctx *ctx, usl_status st) {
    if (st == USL_OK) return;
    fprintf(stderr, "%s: %s\n", usl_status_name(st), usl_ctx_errmsg(ctx));
    exit(1);
}

/* Non-zero would cancel. */
static int on_progress(void *ud, const char *what, uint64_t done, uint64_t total) {
    int *calls = ud;
    if ((*calls)++ == 0) printf("%s %llu/%llu\n", what, (unsigned long long)done, (unsigned long long)total);
    return 0;
}

typedef struct alarm_clock {
    usl_ctx *ctx;
    double seconds;
} alarm_clock;

static void *cancel_later(void *arg) {
    alarm_clock *a = arg;
    struct timespec t = { (time_t)a->seconds, (long)((a->seconds - (double)(time_t)a->seconds) * 1e9) };
    nanosleep(&t, NULL);
    usl_ctx_cancel(a->ctx);
    return NULL;
}

static usl_rows *make_rows(usl_ctx *ctx, usl_tokenizer *tok) {
    usl_rows *rows;
    check(ctx, usl_rows_new(ctx, 128, &rows));
    for (int i = 0; i < TEXT_COUNT; i++) {
        int32_t *ids;
        size_t count;
        check(ctx, usl_tokenizer_encode(ctx, tok, TEXTS[i], strlen(TEXTS[i]), 1, &ids, &count));
        check(ctx, usl_rows_add(rows, ids, NULL, count));
        usl_free(ctx, ids);
    }
    return rows;
}

static void train(usl_ctx *ctx, usl_model *model, usl_rows *rows, int64_t updates) {
    usl_trainer *trainer;
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    usl_step_stats s = { .size = sizeof s };
    usl_status st;
    opts.batch = TEXT_COUNT;
    opts.accumulation = 1;
    opts.max_steps = updates;
    opts.learning_rate = 5e-3;
    check(ctx, usl_trainer_new(model, rows, NULL, &opts, &trainer));
    while ((st = usl_trainer_step(trainer, &s)) == USL_OK)
        if (s.step % 10 == 1) printf("step %lld  loss %.3f\n", (long long)s.step, s.loss);
    if (st == USL_ERR_CANCELLED)
        printf("cancelled after %lld updates\n", (long long)usl_trainer_position(trainer, NULL));
    else if (st != USL_ERR_NOT_FOUND) /* no update is left to do */
        check(ctx, st);
    usl_trainer_free(trainer);
}

static void speak(usl_ctx *ctx, usl_model *model, usl_tokenizer *tok, const char *prompt) {
    usl_generate_opts opts = USL_GENERATE_OPTS_INIT;
    usl_generator *generator;
    usl_text_stream *stream;
    const char *piece;
    int32_t *ids, id;
    size_t count, len;
    opts.max_new_tokens = 12;
    check(ctx, usl_tokenizer_encode(ctx, tok, prompt, strlen(prompt), 1, &ids, &count));
    check(ctx, usl_generator_new(model, ids, count, &opts, &generator));
    check(ctx, usl_text_stream_new(ctx, tok, ids, count, 1, &stream));
    printf("%s|", prompt);
    for (;;) {
        check(ctx, usl_generator_next(generator, &id));
        if (id < 0) break;
        check(ctx, usl_text_stream_push(stream, id, &piece, &len));
        fwrite(piece, 1, len, stdout);
    }
    check(ctx, usl_text_stream_end(stream, &piece, &len));
    printf("%.*s\n", (int)len, piece);
    usl_text_stream_free(stream);
    usl_generator_free(generator);
    usl_free(ctx, ids);
}

int main(int argc, char **argv) {
    if (argc < 3) return fprintf(stderr, "usage: %s MODEL OUT [SECONDS]\n", argv[0]), 1;
    if (usl_abi_version() != USL_ABI_VERSION) return fprintf(stderr, "built for another libunsloth\n"), 1;
    usl_ctx_opts copts = USL_CTX_OPTS_INIT;
    usl_model_opts mopts = USL_MODEL_OPTS_INIT;
    usl_lora_opts lopts = USL_LORA_OPTS_INIT;
    usl_ctx *ctx;
    usl_tokenizer *tok;
    usl_model *model;
    pthread_t thread;
    int calls = 0;
    copts.progress_fn = on_progress;
    copts.progress_ud = &calls;
    if (usl_ctx_new(&copts, &ctx) != USL_OK) return 1;
    mopts.load_in_4bit = 1;
    check(ctx, usl_model_open(ctx, argv[1], &mopts, &model));
    check(ctx, usl_tokenizer_open(ctx, argv[1], &tok));
    check(ctx, usl_model_add_lora(model, &lopts));
    usl_rows *rows = make_rows(ctx, tok);

    alarm_clock alarm = { ctx, argc > 3 ? atof(argv[3]) : 0 };
    if (argc > 3 && pthread_create(&thread, NULL, cancel_later, &alarm) != 0) return 1;
    train(ctx, model, rows, argc > 3 ? 1000000 : 40);
    if (argc > 3) pthread_join(thread, NULL);

    speak(ctx, model, tok, "The sky is");
    char path[4096];
    snprintf(path, sizeof path, "%s/adapter", argv[2]);
    check(ctx, usl_model_save_adapter(model, path, argv[1]));
    snprintf(path, sizeof path, "%s/model.gguf", argv[2]);
    check(ctx, usl_export_gguf(model, tok, path, "q8_0"));
    printf("%d progress calls; saved in %s\n", calls, argv[2]);
    usl_rows_free(rows);
    usl_model_free(model);
    usl_tokenizer_free(tok);
    usl_ctx_free(ctx);
    return 0;
}
