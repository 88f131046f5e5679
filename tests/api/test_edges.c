/* What hosts may do wrong, or have set: sizes beyond all bounds, damaged checkpoints, names that are no text, a locale
 * that writes commas, devices where files are wanted. Each is an error with a sentence, or changes nothing. */
#include "tests/test.h"

#include <locale.h>
#include <sys/stat.h>
#include <unistd.h>

static const char CONFIG[] = "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":64,\"hidden_size\":32,"
                             "\"intermediate_size\":48,\"num_hidden_layers\":1,\"num_attention_heads\":4,"
                             "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5,\"initializer_range\":0.5,"
                             "\"rope_theta\":12.5}";

static void refused(usl_ctx *ctx, usl_status st, usl_status want, const char *text) {
    CHECK(st == want, "%s and not %s", usl_status_name(st), usl_status_name(want));
    CHECK(strstr(usl_ctx_errmsg(ctx), text) != NULL, "\"%s\" does not say \"%s\"", usl_ctx_errmsg(ctx), text);
}

static void test_sizes(usl_ctx *ctx) {
    static const int64_t LENGTHS[] = { -1, ((int64_t)1 << 30) + 1, (int64_t)1 << 58, INT64_MAX };
    for (size_t i = 0; i < sizeof LENGTHS / sizeof *LENGTHS; i++) {
        usl_model *m;
        usl_model_opts o = USL_MODEL_OPTS_INIT;
        o.max_seq_length = LENGTHS[i];
        refused(ctx, usl_model_random(ctx, CONFIG, 1, &o, &m), USL_ERR_INVALID, "max_seq_length");
        CHECK(m == NULL, "a model all the same");
    }
}

/* A temperature that divides every logit into infinity is a greedy one; what is no probability is refused. */
static void test_sampling(usl_ctx *ctx) {
    usl_model *m;
    int32_t *greedy, *sampled, prompt[] = { 1, 2, 3 };
    size_t n, k;
    usl_generate_opts o = USL_GENERATE_OPTS_INIT;
    o.max_new_tokens = 8;
    o.stop_count = 0;
    CHECK_OK(ctx, usl_model_random(ctx, CONFIG, 1, NULL, &m));
    CHECK_OK(ctx, usl_model_generate(m, prompt, 3, &o, &greedy, &n));
    o.temperature = 1e-40;
    o.top_p = 0.9;
    CHECK_OK(ctx, usl_model_generate(m, prompt, 3, &o, &sampled, &k));
    CHECK(n == 8 && k == n && memcmp(greedy, sampled, n * sizeof *greedy) == 0, "a cold draw is not greedy");
    usl_free(ctx, greedy);
    usl_free(ctx, sampled);
    o.top_p = -0.5;
    refused(ctx, usl_model_generate(m, prompt, 3, &o, &sampled, &k), USL_ERR_INVALID, "top_p");
    o.top_p = 1;
    o.temperature = INFINITY;
    refused(ctx, usl_model_generate(m, prompt, 3, &o, &sampled, &k), USL_ERR_INVALID, "temperature");
    usl_model_free(m);
}

typedef struct run {
    usl_model *m;
    usl_rows *rows;
    usl_trainer *t;
} run;

static void begin(usl_ctx *ctx, const usl_train_opts *o, run *r) {
    usl_lora_opts lora = USL_LORA_OPTS_INIT;
    int32_t ids[] = { 1, 2, 3, 4, 5 };
    CHECK_OK(ctx, usl_model_random(ctx, CONFIG, 1, NULL, &r->m));
    CHECK_OK(ctx, usl_model_add_lora(r->m, &lora));
    CHECK_OK(ctx, usl_rows_new(ctx, 0, &r->rows));
    for (int i = 0; i < 3; i++) CHECK_OK(ctx, usl_rows_add(r->rows, ids, NULL, 5));
    CHECK_OK(ctx, usl_trainer_new(r->m, r->rows, NULL, o, &r->t));
}

static void end(run *r) {
    usl_trainer_free(r->t);
    usl_rows_free(r->rows);
    usl_model_free(r->m);
}

/* What is NULL and should not be is named; what may be NULL means the usual. */
static void test_nothing(usl_ctx *ctx) {
    usl_model *m = NULL;
    usl_tensor *t;
    int32_t *ids, prompt[] = { 1 };
    size_t n;
    refused(ctx, usl_model_open(ctx, NULL, NULL, &m), USL_ERR_INVALID, "path");
    refused(ctx, usl_model_random(ctx, NULL, 1, NULL, &m), USL_ERR_INVALID, "config_json");
    refused(ctx, usl_tensor_new(ctx, USL_F32, 2, NULL, &t), USL_ERR_INVALID, "shape");
    refused(ctx, usl_dir_make(ctx, NULL), USL_ERR_INVALID, "path");
    CHECK_OK(ctx, usl_model_random(ctx, CONFIG, 1, NULL, &m));
    refused(ctx, usl_model_get_param(m, NULL, &t), USL_ERR_INVALID, "name");
    refused(ctx, usl_export_gguf(m, NULL, "x.gguf", NULL), USL_ERR_INVALID, "method");
    usl_generate_opts g = USL_GENERATE_OPTS_INIT;
    g.stop_count = 2;
    refused(ctx, usl_model_generate(m, prompt, 1, &g, &ids, &n), USL_ERR_INVALID, "stop_ids");
    usl_model_free(m);
    usl_train_opts o = USL_TRAIN_OPTS_INIT;
    o.schedule = o.optimizer = o.recompute = NULL;
    run r;
    begin(ctx, &o, &r);
    CHECK_OK(ctx, usl_trainer_step(r.t, NULL));
    refused(ctx, usl_trainer_save(r.t, NULL, NULL), USL_ERR_INVALID, "dir");
    usl_trainer_set_learning_rate(r.t, NAN);
    refused(ctx, usl_trainer_step(r.t, NULL), USL_ERR_NUMERIC, "learning rate");
    usl_trainer_free(r.t);
    /* A label beyond the vocabulary is named itself, not the id it stands at. */
    int32_t ids3[] = { 1, 2, 3 }, labels[] = { 1, 2, 64 };
    CHECK_OK(ctx, usl_rows_add(r.rows, ids3, labels, 3));
    refused(ctx, usl_trainer_new(r.m, r.rows, NULL, &o, &r.t), USL_ERR_INVALID, "row 4 holds token 64");
    end(&r);
}

static void test_files(usl_ctx *ctx) {
    refused(ctx, usl_dir_make(ctx, ""), USL_ERR_INVALID, "empty");
    /* A pipe stands for the devices, which only root could lose. */
    char path[] = "/tmp/usl-edges-XXXXXX";
    CHECK(mkdtemp(path) != NULL, "a folder");
    char pipe[64];
    snprintf(pipe, sizeof pipe, "%s/pipe", path);
    CHECK(mkfifo(pipe, 0600) == 0, "a pipe");
    refused(ctx, usl_safetensors_save(ctx, pipe, 0, NULL, NULL, NULL), USL_ERR_IO, "regular file");
    struct stat sb;
    CHECK(stat(pipe, &sb) == 0 && S_ISFIFO(sb.st_mode), "the pipe is gone");
    usl_tensor *t;
    int64_t one = 1;
    const char *name = "\xff", *good = "a", *meta[] = { "k", "\xc3", NULL };
    char file[64];
    snprintf(file, sizeof file, "%s/t.safetensors", path);
    CHECK_OK(ctx, usl_tensor_new(ctx, USL_F32, 1, &one, &t));
    refused(ctx, usl_safetensors_save(ctx, file, 1, &name, &t, NULL), USL_ERR_INVALID, "UTF-8");
    refused(ctx, usl_safetensors_save(ctx, file, 1, &good, &t, meta), USL_ERR_INVALID, "UTF-8");
    CHECK_OK(ctx, usl_safetensors_save(ctx, file, 1, &good, &t, NULL));
    usl_tensor_free(t);
    CHECK_OK(ctx, usl_path_remove(ctx, path));
}

/* ---- Checkpoints
 * -------------------------------------------------------------------------------------------------------------------
 */

static char *slurp(const char *path) {
    FILE *f = fopen(path, "rb");
    char *text = calloc(1, 65536);
    if (f) {
        size_t n = fread(text, 1, 65535, f);
        text[n] = 0;
        fclose(f);
    }
    return text;
}

/* Replaces the number behind "key": in the state; keys stand once, or the n-th is meant. */
static void damage(const char *path, const char *text, const char *key, int nth, const char *number) {
    char mark[64];
    snprintf(mark, sizeof mark, "\"%s\": ", key);
    const char *at = text;
    for (int i = 0; i <= nth && at; i++) at = strstr(i ? at + 1 : at, mark);
    CHECK(at != NULL, "no %s in the state", key);
    if (!at) return;
    at += strlen(mark);
    FILE *f = fopen(path, "wb");
    fwrite(text, 1, (size_t)(at - text), f);
    fputs(number, f);
    fputs(at + strcspn(at, ",}\n"), f);
    fclose(f);
}

static void test_checkpoints(usl_ctx *ctx) {
    static const struct {
        const char *key;
        int nth;
        const char *number;
    } DAMAGE[] = {
        { "position", 0, "-100000" },
        { "position", 0, "4" },
        { "epoch", 0, "-1" },
        { "epoch", 0, "9223372036854775807" },
        { "global_step", 0, "-5" },
        { "adam_step", 0, "-1" },
        { "adam_step", 0, "2147483647" },
        { "loss_scale", 0, "0.0" },
        { "loss_scale", 0, "1e300" },
        { "good_steps", 0, "-1" },
        { "rows", 1, "4611686018427387904" },
        { "longest", 0, "99999999" },
        { "tokens", 0, "-1" },
    };
    char dir[] = "/tmp/usl-edges-XXXXXX", path[64];
    usl_train_opts o = USL_TRAIN_OPTS_INIT;
    usl_step_stats stats = { .size = sizeof stats };
    run r;
    CHECK(mkdtemp(dir) != NULL, "a folder");
    snprintf(path, sizeof path, "%s/trainer_state.json", dir);
    o.max_steps = 4;
    o.batch = 2;
    o.accumulation = 1;
    begin(ctx, &o, &r);
    CHECK_OK(ctx, usl_trainer_step(r.t, &stats));
    CHECK_OK(ctx, usl_trainer_save(r.t, dir, NULL));
    char *text = slurp(path), *extra;
    for (size_t i = 0; i < sizeof DAMAGE / sizeof *DAMAGE; i++) {
        damage(path, text, DAMAGE[i].key, DAMAGE[i].nth, DAMAGE[i].number);
        refused(ctx, usl_trainer_resume(r.t, dir, &extra), USL_ERR_FORMAT, "not sensible");
    }
    damage(path, text, "shuffle", 0, "false");
    refused(ctx, usl_trainer_resume(r.t, dir, &extra), USL_ERR_INVALID, "shuffle");
    damage(path, text, "max_steps", 0, "4");
    CHECK_OK(ctx, usl_trainer_resume(r.t, dir, &extra));
    CHECK_OK(ctx, usl_trainer_step(r.t, &stats));
    const int32_t *ids, *labels;
    size_t count;
    refused(ctx, usl_rows_get(r.rows, 3, &ids, &labels, &count), USL_ERR_INVALID, "no row 3");
    end(&r);
    free(text);
    /* A window of more rows than there are takes no memory for those that are not there. */
    o.batch = o.accumulation = 1 << 20;
    begin(ctx, &o, &r);
    CHECK_OK(ctx, usl_trainer_step(r.t, &stats));
    CHECK(stats.rows == 3, "%lld rows", (long long)stats.rows);
    end(&r);
    CHECK_OK(ctx, usl_path_remove(ctx, dir));
}

/* ---- A locale that writes 0,5
 * -------------------------------------------------------------------------------------------------------------------
 */

static int keep_real(void *ud, double value) {
    *(double *)ud = value;
    return 0;
}

static void test_locale(usl_ctx *ctx) {
    char dir[] = "/tmp/usl-edges-XXXXXX", cmd[160];
    CHECK(mkdtemp(dir) != NULL, "a folder");
    snprintf(cmd, sizeof cmd, "localedef -i de_DE -f UTF-8 %s/de_DE.UTF-8 >/dev/null 2>&1", dir);
    if (system(cmd) != 0) SKIP("no localedef or no de_DE here");
    setenv("LOCPATH", dir, 1);
    if (setlocale(LC_ALL, "de_DE.UTF-8") && localeconv()->decimal_point[0] == ',') {
        double v = 0;
        usl_json_visitor visitor = { .size = sizeof visitor, .real = keep_real };
        CHECK_OK(ctx, usl_json_visit(ctx, "text", "0.625", 5, &visitor, &v));
        CHECK(v == 0.625, "0.625 is read as %g", v);
        run r;
        usl_train_opts o = USL_TRAIN_OPTS_INIT;
        char path[96], *text;
        begin(ctx, &o, &r);
        CHECK_OK(ctx, usl_export_merged(r.m, NULL, dir, USL_F32));
        snprintf(path, sizeof path, "%s/config.json", dir);
        text = slurp(path);
        CHECK(strstr(text, "12.5") && strstr(text, "0.5") && !strstr(text, "12,5"), "%s", text);
        free(text);
        end(&r);
        setlocale(LC_ALL, "C");
    }
    CHECK_OK(ctx, usl_path_remove(ctx, dir));
}

int main(void) {
    usl_ctx *ctx;
    CHECK(usl_ctx_new(NULL, &ctx) == USL_OK, "context");
    test_sizes(ctx);
    test_nothing(ctx);
    test_sampling(ctx);
    test_files(ctx);
    test_checkpoints(ctx);
    test_locale(ctx);
    usl_ctx_free(ctx);
    return test_end("edges");
}
