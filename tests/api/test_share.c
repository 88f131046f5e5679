/* What hosts rely on: one frozen base under several contexts, counted in bytes, used on two threads at once, freed in
 * any order; and that no path is touched which the host refuses. */
#include "tests/test.h"

#include <pthread.h>
#include <unistd.h>

static const char CONFIG[] = "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":256,\"hidden_size\":512,"
                             "\"intermediate_size\":1024,\"num_hidden_layers\":5,\"num_attention_heads\":4,"
                             "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5,\"initializer_range\":0.05}";
static const int32_t IDS[] = { 5, 6, 7, 8, 9, 10, 11, 12 };
enum { COUNT = sizeof IDS / sizeof *IDS };

/* Counts what a context holds. */
typedef struct counted {
    pthread_mutex_t lock;
    size_t held, peak;
} counted;

static void *counted_realloc(void *ud, void *ptr, size_t size) {
    counted *c = ud;
    size_t *block = ptr ? (size_t *)ptr - 2 : NULL, old = block ? *block : 0;
    void *out = NULL;
    if (size == 0) {
        free(block);
    } else {
        size_t *grown = realloc(block, size + 2 * sizeof *grown);
        if (!grown) return NULL;
        *grown = size;
        out = grown + 2;
    }
    pthread_mutex_lock(&c->lock);
    c->held = c->held - old + size;
    if (c->held > c->peak) c->peak = c->held;
    pthread_mutex_unlock(&c->lock);
    return out;
}

static usl_ctx *new_ctx(counted *c) {
    usl_ctx_opts o = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    pthread_mutex_init(&c->lock, NULL);
    c->held = c->peak = 0;
    o.realloc_fn = counted_realloc;
    o.realloc_ud = c;
    o.threads = 1;
    CHECK(usl_ctx_new(&o, &ctx) == USL_OK, "no context");
    return ctx;
}

static usl_model_info info_of(const usl_model *m) {
    usl_model_info info = { .size = sizeof info };
    usl_model_get_info(m, &info);
    return info;
}

/* Trains an adapter on one row; runs on any thread, so it counts no checks. */
static usl_status train(usl_ctx *ctx, usl_model *m, int updates, double *loss) {
    usl_rows *rows = NULL;
    usl_trainer *t = NULL;
    usl_lora_opts lora = USL_LORA_OPTS_INIT;
    usl_train_opts o = USL_TRAIN_OPTS_INIT;
    usl_step_stats stats = { .size = sizeof stats };
    lora.rank = 4;
    o.batch = o.accumulation = 1;
    o.max_steps = updates;
    o.learning_rate = 1e-2;
    usl_status st = usl_model_add_lora(m, &lora);
    if (st == USL_OK) st = usl_rows_new(ctx, 0, &rows);
    if (st == USL_OK) st = usl_rows_add(rows, IDS, NULL, COUNT);
    if (st == USL_OK) st = usl_trainer_new(m, rows, NULL, &o, &t);
    for (int i = 0; i < updates && st == USL_OK; i++) st = usl_trainer_step(t, &stats);
    usl_trainer_free(t);
    usl_rows_free(rows);
    *loss = stats.loss;
    return st;
}

static usl_tensor *logits(usl_ctx *ctx, usl_model *m) {
    usl_tensor *out = NULL;
    CHECK_OK(ctx, usl_model_logits(m, IDS, COUNT, &out));
    return out;
}

static double difference(usl_tensor *a, usl_tensor *b) {
    return test_rel_error(usl_tensor_data(a), usl_tensor_data(b), (size_t)usl_tensor_elements(a));
}

typedef struct job {
    usl_model *model;
    usl_ctx *ctx;
    double loss;
    usl_status st;
} job;

static void *train_there(void *arg) {
    job *j = arg;
    j->st = train(j->ctx, j->model, 6, &j->loss);
    usl_model_free(j->model);
    usl_ctx_free(j->ctx);
    return NULL;
}

static void test_share(int load_in_4bit) {
    counted a, b, c;
    usl_ctx *one = new_ctx(&a), *two = new_ctx(&b), *three = new_ctx(&c);
    usl_model *base, *second, *third;
    usl_model_opts o = USL_MODEL_OPTS_INIT;
    o.load_in_4bit = load_in_4bit;
    o.device = "cpu";
    CHECK_OK(one, usl_model_random(one, CONFIG, 1, &o, &base));
    uint64_t weights = info_of(base).weight_bytes;
    CHECK(info_of(base).shared == 0, "%d others", info_of(base).shared);
    usl_tensor *before = logits(one, base);
    size_t held = b.held;
    CHECK_OK(two, usl_model_share(two, base, &second));
    CHECK_OK(three, usl_model_share(three, second, &third)); /* a model that shares is shared as well */
    printf("%llu bytes of weights; a model that shares them takes %zu\n", (unsigned long long)weights, b.held - held);
    CHECK(b.held - held < weights / 4, "%zu bytes for one that shares %llu", b.held - held,
          (unsigned long long)weights);
    CHECK(info_of(base).shared == 2 && info_of(third).shared == 2, "%d others", info_of(third).shared);
    CHECK(info_of(second).weight_bytes == weights, "other weights");

    /* Both train at once; the base, an adapter on it or not, says what it said. */
    job jobs[2] = { { second, two, 0, USL_OK }, { third, three, 0, USL_OK } };
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[i], NULL, train_there, &jobs[i]) == 0, "no thread");
    usl_tensor *during = logits(one, base);
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        CHECK(jobs[i].st == USL_OK, "thread %d: %s", i, usl_status_name(jobs[i].st));
    }
    usl_tensor *after = logits(one, base);
    CHECK(difference(during, before) == 0 && difference(after, before) == 0, "the base changed");
    CHECK(jobs[0].loss == jobs[1].loss && jobs[0].loss > 0, "losses %.9g and %.9g", jobs[0].loss, jobs[1].loss);
    CHECK(info_of(base).shared == 0, "%d others are left", info_of(base).shared);
    CHECK(b.held == 0 && c.held == 0, "%zu and %zu bytes are left", b.held, c.held);
    CHECK(load_in_4bit || b.peak < weights, "%zu bytes at the most beside %llu", b.peak, (unsigned long long)weights);

    /* The same work on the base itself gives the same loss: what is shared is what was there. */
    job alone = { base, one, 0, USL_OK };
    usl_ctx *four = new_ctx(&b);
    CHECK_OK(four, usl_model_share(four, base, &second));
    usl_tensor_free(before);
    usl_tensor_free(during);
    usl_tensor_free(after);
    train_there(&alone); /* frees the base and drops its context first */
    CHECK(alone.st == USL_OK, "%s", usl_status_name(alone.st));
    CHECK(alone.loss == jobs[0].loss, "%.9g alone, %.9g beside", alone.loss, jobs[0].loss);
    CHECK(a.held > weights, "the weights went with the base's handle: %zu bytes", a.held);
    usl_tensor *still = logits(four, second);
    CHECK(still != NULL, "no logits");
    usl_tensor_free(still);
    usl_model_free(second);
    usl_ctx_free(four);
    CHECK(a.held == 0 && b.held == 0, "%zu and %zu bytes are left", a.held, b.held);
}

static void test_refused(void) {
    counted a;
    usl_ctx *ctx = new_ctx(&a);
    usl_model *m, *s;
    usl_model_opts o = USL_MODEL_OPTS_INIT;
    o.device = "cpu";
    o.full_finetuning = 1;
    CHECK_OK(ctx, usl_model_random(ctx, CONFIG, 1, &o, &m));
    CHECK(usl_model_share(ctx, m, &s) == USL_ERR_UNSUPPORTED && !s, "trained weights were shared");
    CHECK(strstr(usl_ctx_errmsg(ctx), "full_finetuning") != NULL, "%s", usl_ctx_errmsg(ctx));
    usl_model_free(m);
    CHECK(usl_model_share(ctx, NULL, &s) == USL_ERR_INVALID, "no base");
    usl_ctx_free(ctx);
}

/* ---- Paths ---- */

typedef struct gate {
    char allowed[256]; /* what begins so */
    int asked, refused;
} gate;

static int may(void *ud, const char *path, usl_access access) {
    gate *g = ud;
    (void)access;
    g->asked++;
    bool ok = *g->allowed && strncmp(path, g->allowed, strlen(g->allowed)) == 0;
    g->refused += !ok;
    return !ok;
}

static void refused(usl_ctx *ctx, usl_status st, const gate *g) {
    CHECK(st == USL_ERR_IO && strstr(usl_ctx_errmsg(ctx), "does not allow"), "%s: %s", usl_status_name(st),
          usl_ctx_errmsg(ctx));
    CHECK(g->refused == 1, "%d refusals", g->refused);
}

static int ignore_name(void *ud, const char *name) {
    (void)ud, (void)name;
    return 0;
}

static int ignore_tensor(void *ud, const char *name, usl_tensor *t) {
    (void)ud, (void)name;
    usl_tensor_free(t);
    return 0;
}

/* Every function with a path, on a file that is there. */
static void test_paths(void) {
    gate g = { "", 0, 0 };
    usl_ctx_opts o = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    o.access_fn = may;
    o.access_ud = &g;
    o.threads = 1;
    CHECK(usl_ctx_new(&o, &ctx) == USL_OK, "no context");
    const char *model = "examples/tiny-llama", *file = "examples/tiny-llama/model.safetensors";
    const char *data = "examples/instructions.json", *out = "/tmp/usl-test-share-refused";
    usl_model *m, *random;
    usl_tokenizer *tok;
    usl_dataset *ds;
    usl_trainer *t;
    usl_rows *rows;
    usl_json_visitor v = { .size = sizeof v };
    usl_lora_opts lora = USL_LORA_OPTS_INIT;
    usl_model_opts mo = USL_MODEL_OPTS_INIT;
    mo.device = "cpu";
#define REFUSED(call) (g.refused = 0, refused(ctx, (call), &g))
    REFUSED(usl_model_open(ctx, model, NULL, &m));
    REFUSED(usl_tokenizer_open(ctx, model, &tok));
    REFUSED(usl_dataset_load(ctx, "json", &data, 1, &ds));
    REFUSED(usl_inspect(ctx, model, &v, NULL));
    REFUSED(usl_safetensors_load(ctx, file, ignore_tensor, NULL));
    REFUSED(usl_dir_list(ctx, model, ignore_name, NULL));
    REFUSED(usl_dir_make(ctx, out));
    REFUSED(usl_path_remove(ctx, out));
    REFUSED(usl_safetensors_save(ctx, out, 0, NULL, NULL, NULL));
    REFUSED(usl_ctx_may(ctx, out, USL_ACCESS_WRITE));
    CHECK_OK(ctx, usl_model_random(ctx, CONFIG, 1, &mo, &random));
    CHECK_OK(ctx, usl_model_add_lora(random, &lora));
    CHECK_OK(ctx, usl_rows_new(ctx, 0, &rows));
    CHECK_OK(ctx, usl_rows_add(rows, IDS, NULL, COUNT));
    CHECK_OK(ctx, usl_trainer_new(random, rows, NULL, NULL, &t));
    REFUSED(usl_trainer_save(t, out, NULL));
    REFUSED(usl_trainer_resume(t, out, NULL));
    usl_trainer_free(t);
    usl_rows_free(rows);
    REFUSED(usl_model_load_adapter(random, model, NULL));
    REFUSED(usl_model_save_adapter(random, out, NULL));
    REFUSED(usl_export_merged(random, NULL, out, USL_F32));
    REFUSED(usl_export_gguf(random, NULL, out, "f32"));
    usl_model_free(random);
    CHECK(access(out, F_OK) != 0, "%s was made", out);

    /* What is allowed goes on, and each of its files was asked for. */
    strcpy(g.allowed, model);
    g.refused = g.asked = 0;
    CHECK_OK(ctx, usl_model_open(ctx, model, &mo, &m));
    CHECK_OK(ctx, usl_tokenizer_open(ctx, model, &tok));
    CHECK(g.refused == 0 && g.asked >= 6, "asked %d times, refused %d", g.asked, g.refused);
    REFUSED(usl_tokenizer_save(ctx, tok, out));
    usl_tokenizer_free(tok);
    usl_model_free(m);
    usl_ctx_free(ctx);
}

int main(void) {
    CHECK(usl_abi_version() == USL_ABI_VERSION && strcmp(usl_version(), USL_VERSION) == 0, "another library");
    test_share(0);
    test_share(1);
    test_refused();
    test_paths();
    return test_end("share");
}
