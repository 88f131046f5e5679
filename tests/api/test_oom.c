/* Every allocation of a small run fails in turn: the run must end with USL_ERR_NOMEM and a sentence, leak nothing, and
 * leave what was saved before as it was.
 *
 *   test_oom [STRIDE]      each STRIDE-th allocation; default $USL_OOM_STRIDE, else 41; 1 tries them all
 *
 * One thread, so that the order of allocations is the same in every run. */
#include "tests/test.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/unsloth.h"

/* ---- An allocator that counts, and fails once or from then on ---- */

typedef struct counter {
    int64_t requests, live; /* allocations asked for; blocks not yet freed */
    int64_t failing;        /* number of the request that fails, from 1; 0: none */
    int for_good;           /* every later one fails too */
} counter;

static void *counting_realloc(void *ud, void *ptr, size_t size) {
    counter *c = ud;
    if (size == 0) {
        c->live -= ptr != NULL;
        free(ptr);
        return NULL;
    }
    c->requests++;
    if (c->failing && (c->requests == c->failing || (c->for_good && c->requests > c->failing))) return NULL;
    void *fresh = realloc(ptr, size);
    c->live += fresh && !ptr;
    return fresh;
}

/* ---- The run ---- */

static const char CONFIG[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":96,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":80,"
    "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"hidden_act\":\"silu\","
    "\"tie_word_embeddings\":false}";

typedef struct run {
    const char *dir; /* what it saves */
    int tried_saving;
    usl_ctx *ctx;
    usl_model *model;
    usl_rows *rows;
    usl_trainer *trainer;
    usl_model *reopened, *shared;
    usl_tokenizer *tokenizer;
    usl_dataset *dataset, *messages;
    usl_tensor *logits;
    int32_t *ids;
    char *extra;
} run;

#define TRY(expr)                        \
    do {                                 \
        usl_status try_ = (expr);        \
        if (try_ != USL_OK) return try_; \
    } while (0)

static usl_status add_rows(run *r) {
    TRY(usl_rows_new(r->ctx, 0, &r->rows));
    for (int32_t i = 0; i < 4; i++) {
        int32_t ids[12];
        for (int32_t j = 0; j < 12; j++) ids[j] = (i * 17 + j * 5) % 80;
        TRY(usl_rows_add(r->rows, ids, NULL, (size_t)(12 - i)));
    }
    return USL_OK;
}

static usl_status train(run *r) {
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    opts.batch = 2;
    opts.accumulation = 1;
    opts.max_steps = 2;
    opts.memory_limit = 64 << 20;
    TRY(usl_trainer_new(r->model, r->rows, r->rows, &opts, &r->trainer));
    usl_step_stats stats = { .size = sizeof stats };
    for (int i = 0; i < 2; i++) TRY(usl_trainer_step(r->trainer, &stats));
    TRY(usl_trainer_set_rows(r->trainer, r->rows));
    return usl_trainer_evaluate(r->trainer, &stats);
}

static usl_status save(run *r) {
    char path[512];
    r->tried_saving = 1;
    snprintf(path, sizeof path, "%s/checkpoint", r->dir);
    TRY(usl_trainer_save(r->trainer, path, "{\"note\":1}"));
    TRY(usl_trainer_resume(r->trainer, path, &r->extra));
    usl_trainer_free(r->trainer);
    r->trainer = NULL;
    snprintf(path, sizeof path, "%s/adapter", r->dir);
    TRY(usl_model_save_adapter(r->model, path, "base"));
    TRY(usl_model_load_adapter(r->model, path, "again"));
    return USL_OK;
}

/* A byte-level BPE of 80 tokens: two special ones, the characters from "!" on, one merge. */
static int write_tokenizer(const char *path) {
    FILE *f = fopen(path, "w");
    if (!f) return 0;
    fprintf(f, "{\"version\":\"1.0\",\"added_tokens\":[");
    for (int i = 0; i < 2; i++)
        fprintf(f,
                "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
                "\"normalized\":false,\"special\":true}",
                i ? "," : "", i, i ? "</s>" : "<s>");
    fprintf(f, "],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
               "\"trim_offsets\":true,\"use_regex\":true},\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\"},"
               "\"model\":{\"type\":\"BPE\",\"vocab\":{\"<s>\":0,\"</s>\":1");
    for (int i = 2; i < 79; i++)
        fprintf(f, ",\"%s%c\":%d", '!' + i - 2 == '"' || '!' + i - 2 == '\\' ? "\\" : "", '!' + i - 2, i);
    fprintf(f, ",\"AB\":79},\"merges\":[\"A B\"]}}");
    return fclose(f) == 0;
}

/* Merged and as GGUF with its tokenizer, and read back. */
static usl_status export_all(run *r) {
    char path[512];
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    opts.device = "cpu";
    snprintf(path, sizeof path, "%s/tokenizer.json", r->dir);
    TRY(usl_tokenizer_open(r->ctx, path, &r->tokenizer));
    snprintf(path, sizeof path, "%s/merged", r->dir);
    TRY(usl_export_merged(r->model, r->tokenizer, path, USL_BF16));
    TRY(usl_model_open(r->ctx, path, &opts, &r->reopened));
    usl_model_free(r->reopened);
    r->reopened = NULL;
    TRY(usl_model_share(r->ctx, r->model, &r->shared));
    snprintf(path, sizeof path, "%s/model.gguf", r->dir);
    TRY(usl_export_gguf(r->model, r->tokenizer, path, "q8_0"));
    return usl_model_open(r->ctx, path, &opts, &r->reopened);
}

static usl_status read_data(run *r) {
    static const char row[] = "{\"instruction\":\"Add.\",\"input\":\"1, 2\",\"output\":\"3\"}";
    TRY(usl_dataset_new(r->ctx, &r->dataset));
    for (int i = 0; i < 3; i++) TRY(usl_dataset_append(r->dataset, row, sizeof row - 1));
    return usl_dataset_standardize(r->dataset, &r->messages);
}

/* Results are not kept. */
static usl_status look(run *r, const int32_t *prompt) {
    usl_tensor *t, *row, *logits;
    TRY(usl_model_attentions(r->model, prompt, 3, 0, &t));
    usl_tensor_free(t);
    TRY(usl_model_hidden_states(r->model, prompt, 3, &t));
    usl_status st = usl_tensor_select(r->ctx, t, 0, &row);
    usl_tensor_free(t);
    TRY(st);
    st = usl_model_unembed(r->model, row, &logits);
    usl_tensor_free(row);
    TRY(st);
    usl_tensor_free(logits);
    return USL_OK;
}

static usl_status everything(run *r, counter *c) {
    usl_ctx_opts ctx_opts = USL_CTX_OPTS_INIT;
    ctx_opts.realloc_fn = counting_realloc;
    ctx_opts.realloc_ud = c;
    ctx_opts.threads = 1;
    TRY(usl_ctx_new(&ctx_opts, &r->ctx));
    usl_model_opts model_opts = USL_MODEL_OPTS_INIT;
    model_opts.device = "cpu";
    model_opts.load_in_4bit = 1;
    TRY(usl_model_random(r->ctx, CONFIG, 1, &model_opts, &r->model));
    usl_lora_opts lora = USL_LORA_OPTS_INIT;
    lora.rank = 4;
    TRY(usl_model_add_lora(r->model, &lora));
    TRY(add_rows(r));
    TRY(train(r));
    TRY(save(r));
    TRY(export_all(r));
    TRY(read_data(r));
    static const int32_t prompt[] = { 1, 2, 3 };
    TRY(usl_model_logits(r->model, prompt, 3, &r->logits));
    TRY(look(r, prompt));
    usl_generate_opts generate = USL_GENERATE_OPTS_INIT;
    generate.max_new_tokens = 4;
    size_t count;
    return usl_model_generate(r->model, prompt, 3, &generate, &r->ids, &count);
}

/* Runs once; returns the status. The sentence is copied out before everything is freed. */
static usl_status run_once(const char *dir, counter *c, char *sentence, size_t size, int *tried_saving) {
    run r = { .dir = dir };
    usl_status st = everything(&r, c);
    snprintf(sentence, size, "%s", r.ctx ? usl_ctx_errmsg(r.ctx) : "no context");
    usl_tensor_free(r.logits);
    usl_trainer_free(r.trainer);
    usl_rows_free(r.rows);
    usl_tokenizer_free(r.tokenizer);
    usl_dataset_free(r.messages);
    usl_dataset_free(r.dataset);
    usl_model_free(r.reopened);
    usl_model_free(r.shared);
    usl_model_free(r.model);
    if (r.ctx) {
        usl_free(r.ctx, r.extra);
        usl_free(r.ctx, r.ids);
    }
    usl_ctx_free(r.ctx);
    *tried_saving = r.tried_saving;
    return st;
}

/* ---- What lies in the folder: names and bytes, folded into one number ---- */

static uint64_t fold(uint64_t h, const void *data, size_t n) {
    for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    return h;
}

/* The sum over entries does not depend on the order in which the folder lists them. */
static uint64_t fold_folder(const char *dir, int *entries) {
    uint64_t sum = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.' && (!e->d_name[1] || e->d_name[1] == '.')) continue;
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        uint64_t h = fold(14695981039346656037u, e->d_name, strlen(e->d_name));
        struct stat info;
        if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
            h ^= fold_folder(path, entries);
        } else {
            char buf[4096];
            FILE *f = fopen(path, "rb");
            for (size_t n; f && (n = fread(buf, 1, sizeof buf, f)) > 0;) h = fold(h, buf, n);
            if (f) fclose(f);
        }
        ++*entries;
        sum += h;
    }
    if (d) closedir(d);
    return sum;
}

static void remove_folder(const char *dir) {
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.' && (!e->d_name[1] || e->d_name[1] == '.')) continue;
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        struct stat info;
        if (stat(path, &info) == 0 && S_ISDIR(info.st_mode))
            remove_folder(path);
        else
            unlink(path);
    }
    if (d) closedir(d);
    rmdir(dir);
}

int main(int argc, char **argv) {
    const char *word = argc > 1 ? argv[1] : getenv("USL_OOM_STRIDE");
    int64_t stride = word ? atoll(word) : 41;
    if (stride < 1) stride = 1;
    char dir[] = "/tmp/usl_test_oom_XXXXXX", sentence[1024];
    if (!mkdtemp(dir)) return 1;

    char path[512];
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (!write_tokenizer(path)) return 1;

    counter whole = { 0 };
    int saving, entries = 0;
    usl_status st = run_once(dir, &whole, sentence, sizeof sentence, &saving);
    CHECK(st == USL_OK, "the run itself fails: %s", sentence);
    CHECK(whole.live == 0, "%lld blocks are left when nothing fails", (long long)whole.live);
    uint64_t saved = fold_folder(dir, &entries);
    CHECK(entries >= 4, "only %d entries were saved", entries);

    int64_t tried = 0, absorbed = 0;
    for (int for_good = 0; st == USL_OK && for_good < 2; for_good++) {
        for (int64_t n = 1; n <= whole.requests; n += stride) {
            counter c = { .failing = n, .for_good = for_good };
            tried++;
            usl_status got = run_once(dir, &c, sentence, sizeof sentence, &saving);
            const char *how = for_good ? "and all after it" : "alone";
            /* PCRE2's just-in-time compiler is a thing that the library does without when memory is short. */
            absorbed += got == USL_OK;
            CHECK(got == USL_ERR_NOMEM || (got == USL_OK && !for_good),
                  "allocation %lld %s fails: the run ends with %s: %s", (long long)n, how, usl_status_name(got),
                  sentence);
            CHECK(c.live == 0, "allocation %lld %s fails: %lld blocks leak", (long long)n, how, (long long)c.live);
            CHECK(got == USL_OK || sentence[0], "allocation %lld %s fails: there is no sentence", (long long)n, how);
            if (!saving) continue;
            int now = 0;
            uint64_t left = fold_folder(dir, &now);
            CHECK(left == saved && now == entries, "allocation %lld %s fails: %s holds something else", (long long)n,
                  how, dir);
            if (left != saved) run_once(dir, &(counter){ 0 }, sentence, sizeof sentence, &saving);
        }
    }
    CHECK(absorbed <= 1 + tried / 20, "%lld of %lld failures were passed over", (long long)absorbed, (long long)tried);
    printf("%lld of %lld allocations failed, alone and with all after them; %lld were done without\n",
           (long long)tried / 2, (long long)whole.requests, (long long)absorbed);
    remove_folder(dir);
    return test_end("test_oom");
}
