/* A GPU records the work of passes whose shapes come again, and rounds shapes up so that they do. Recorded or not, the
 * bits are the same; rounded or not (the CPU does not round), the losses are, up to rounding. For a GPU, or its
 * emulation on the CPU, which keeps the launches of a recording with their arguments as they were. */
#include "tests/test.h"

#include <stdlib.h>
#include <unistd.h>

#include "core/train/trainer.h"
#include "kernels/cuda.h"

#define SIZES "\"vocab_size\":67,\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_layers\":2,"
#define HEADS "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"max_position_embeddings\":128,"
static const char LLAMA[] = "{\"architectures\":[\"LlamaForCausalLM\"]," SIZES HEADS
                            "\"rms_norm_eps\":1e-5,\"tie_word_embeddings\":true,\"initializer_range\":0.05}";
/* Norms behind the branches, norms of heads, a window that rows are longer than, two rope tables. */
static const char GEMMA3[] = "{\"architectures\":[\"Gemma3ForCausalLM\"]," SIZES HEADS
                             "\"head_dim\":8,\"sliding_window\":7,\"sliding_window_pattern\":2,"
                             "\"initializer_range\":0.05}";

enum { STEPS = 6, ROWS = 10, EVAL_ROWS = 2, BATCH = 1, ACCUMULATION = 2, LONGEST = 120, SHORT = 30 };

typedef struct setup {
    const char *config, *optimizer, *recompute, *device;
    usl_dtype dtype;
    bool four_bit, full, dora, embeds;
    double dropout;
    float scale; /* of the loss, to begin with; 0: as usual */
    int longest; /* row */
    size_t most; /* bytes for recorded work; 0: as planned */
    int stop_at; /* save there, close everything, resume in a new trainer; 0: straight on */
    const char *dir;
    bool cancels; /* each update is asked to stop at its first layer, also while it is recorded, and made then */
} setup;

typedef struct outcome {
    double loss[STEPS], norm[STEPS], eval[STEPS], flops[STEPS];
    float *params;
    size_t count;
    int64_t replays;
    int recorded; /* shapes */
    int skipped;  /* updates */
} outcome;

/* Windows of two rows come to less than a bucket and, with one of the long ones, to more: then to what the plan has
 * room for. Where the longest is short, all are rounded to that. */
static void add_rows(usl_ctx *ctx, usl_rows *rows, int count, int longest) {
    for (int r = 0; r < count; r++) {
        int32_t ids[LONGEST], labels[LONGEST];
        int n = r % 4 == 1 ? longest - r : 10 + r * 13 % (longest / 3);
        for (int i = 0; i < n; i++) ids[i] = (i * 7 + r * 31 + i * i) % 67, labels[i] = i < 3 ? -100 : ids[i];
        CHECK_OK(ctx, usl_rows_add(rows, ids, labels, (size_t)n));
    }
}

static void collect(usl_ctx *ctx, usl_model *m, outcome *o) {
    int trainable;
    const char *name;
    for (int64_t i = 0; (name = usl_model_param_name(m, i, &trainable)); i++) {
        usl_tensor *t;
        if (!trainable) continue;
        CHECK_OK(ctx, usl_model_get_param(m, name, &t));
        size_t n = (size_t)usl_tensor_elements(t);
        o->params = realloc(o->params, (o->count + n) * sizeof *o->params);
        memcpy(o->params + o->count, usl_tensor_data(t), n * sizeof *o->params);
        o->count += n;
        usl_tensor_free(t);
    }
}

static usl_model *make(usl_ctx *ctx, const setup *s) {
    usl_model_opts mo = USL_MODEL_OPTS_INIT;
    usl_lora_opts lo = USL_LORA_OPTS_INIT;
    usl_model *m;
    mo.dtype = s->dtype;
    mo.device = s->device;
    mo.load_in_4bit = s->four_bit;
    mo.full_finetuning = s->full;
    mo.max_seq_length = LONGEST;
    CHECK_OK(ctx, usl_model_random(ctx, s->config, 7, &mo, &m));
    if (!m) exit(test_end("graphs"));
    lo.rank = 4;
    lo.init = "random";
    lo.dropout = s->dropout;
    lo.use_dora = s->dora;
    if (s->embeds) lo.modules_to_save = "embed_tokens";
    if (!s->full) CHECK_OK(ctx, usl_model_add_lora(m, &lo));
    return m;
}

static usl_trainer *begin(usl_ctx *ctx, usl_model *m, usl_rows *rows, usl_rows *eval, const setup *s) {
    usl_train_opts to = USL_TRAIN_OPTS_INIT;
    usl_trainer *t;
    to.batch = BATCH;
    to.accumulation = ACCUMULATION;
    to.max_steps = STEPS;
    to.shuffle = 0;
    to.learning_rate = 1e-2;
    to.warmup_steps = 2;
    to.weight_decay = 0.01;
    to.optimizer = s->optimizer;
    to.recompute = s->recompute;
    CHECK_OK(ctx, usl_trainer_new(m, rows, eval, &to, &t));
    if (!t) exit(test_end("graphs"));
    if (s->most) usli_graphs_begin(&t->graphs, s->most);
    if (s->scale > 0) t->update.loss_scale = s->scale;
    return t;
}

static void train(const setup *s, bool recording, outcome *o) {
    usl_ctx_opts co = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    usl_rows *rows, *eval;
    co.threads = 2;
    memset(o, 0, sizeof *o);
    if (recording)
        unsetenv("USL_NO_GRAPHS");
    else
        setenv("USL_NO_GRAPHS", "1", 1);
    CHECK(usl_ctx_new(&co, &ctx) == USL_OK, "context");
    CHECK_OK(ctx, usl_rows_new(ctx, 0, &rows));
    CHECK_OK(ctx, usl_rows_new(ctx, 0, &eval));
    add_rows(ctx, rows, ROWS, s->longest);
    add_rows(ctx, eval, EVAL_ROWS, SHORT);
    usl_model *m = make(ctx, s);
    usl_trainer *t = begin(ctx, m, rows, eval, s);
    for (int i = 0; i < STEPS; i++) {
        usl_step_stats stats = { .size = sizeof stats };
        if (s->stop_at && i == s->stop_at) {
            CHECK_OK(ctx, usl_trainer_save(t, s->dir, NULL));
            usl_trainer_free(t);
            usl_model_free(m);
            m = make(ctx, s);
            t = begin(ctx, m, rows, eval, s);
            CHECK_OK(ctx, usl_trainer_resume(t, s->dir, NULL));
        }
        if (s->cancels) usl_ctx_cancel(ctx);
        if (s->cancels) CHECK(usl_trainer_step(t, &stats) == USL_ERR_CANCELLED, "an update that was cancelled is made");
        CHECK_OK(ctx, usl_trainer_step(t, &stats));
        o->loss[i] = stats.loss;
        o->norm[i] = stats.grad_norm;
        o->flops[i] = stats.flops;
        o->skipped += stats.skipped;
        if (i != 2) continue;
        CHECK_OK(ctx, usl_trainer_evaluate(t, &stats));
        o->eval[i] = stats.loss;
    }
    o->replays = t->graphs.replays;
    for (int i = 0; i < USLI_GRAPH_KEYS; i++) o->recorded += t->graphs.at[i].work[0] != NULL;
    collect(ctx, m, o);
    usl_trainer_free(t);
    usl_rows_free(rows);
    usl_rows_free(eval);
    usl_model_free(m);
    usl_ctx_free(ctx);
}

static void same(const char *what, const outcome *a, const outcome *b) {
    for (int i = 0; i < STEPS; i++)
        CHECK(a->loss[i] == b->loss[i] && !memcmp(&a->norm[i], &b->norm[i], sizeof a->norm[i]) &&
                  a->eval[i] == b->eval[i] && a->flops[i] == b->flops[i],
              "%s, update %d: loss %.17g and %.17g, norm %.9g and %.9g, later %.17g and %.17g, flops %g and %g", what,
              i + 1, a->loss[i], b->loss[i], a->norm[i], b->norm[i], a->eval[i], b->eval[i], a->flops[i], b->flops[i]);
    CHECK(a->count == b->count && a->count > 0 && !memcmp(a->params, b->params, a->count * sizeof *a->params),
          "%s: the weights differ", what);
}

/* limit: of what the CPU, which does not round shapes, has for losses; 0: it is not asked. *out: the recorded run's. */
static void case_of(const char *name, const setup *given, double limit, outcome *out) {
    setup s = *given;
    outcome plain, cpu;
    s.device = "cuda";
    train(&s, false, &plain);
    train(&s, true, out);
    CHECK(plain.replays == 0 && plain.recorded == 0, "%s: recorded against the user's will", name);
    CHECK(out->replays >= STEPS && out->recorded > 0, "%s: %lld halves replayed", name, (long long)out->replays);
    same(name, &plain, out);
    CHECK(plain.loss[STEPS - 1] != plain.loss[0] && plain.norm[STEPS - 1] > 0, "%s: nothing is trained", name);
    printf("%s: %lld halves replayed of %d shapes\n", name, (long long)out->replays, out->recorded);
    free(plain.params);
    if (limit <= 0) return;
    s.device = "cpu";
    train(&s, true, &cpu);
    for (int i = 0; i < STEPS; i++) {
        CHECK(fabs(cpu.loss[i] - out->loss[i]) <= limit * cpu.loss[i],
              "%s, update %d: the CPU's loss is %.9g, not %.9g", name, i + 1, cpu.loss[i], out->loss[i]);
        CHECK(fabs(cpu.norm[i] - out->norm[i]) <= 10 * limit * cpu.norm[i],
              "%s, update %d: the CPU's norm is %.9g, not %.9g", name, i + 1, cpu.norm[i], out->norm[i]);
        CHECK(cpu.flops[i] == out->flops[i], "%s, update %d: %g FLOP, of which the CPU does %g", name, i + 1,
              out->flops[i], cpu.flops[i]);
    }
    free(cpu.params);
}

/* The same run cut in two, with updates cancelled, and where recorded work has no room. */
static void others(setup s, const outcome *whole) {
    outcome other;
    char dir[] = "/tmp/usl-graphs-XXXXXX", cmd[64];
    CHECK(mkdtemp(dir) != NULL, "a folder");
    s.stop_at = 2;
    s.dir = dir;
    s.device = "cuda";
    train(&s, true, &other);
    same("resumed", whole, &other);
    free(other.params);
    s.stop_at = 0;
    s.cancels = true;
    train(&s, true, &other);
    same("cancelled", whole, &other);
    CHECK(other.recorded > 1, "%d shapes are recorded when updates are cancelled", other.recorded);
    free(other.params);
    s.cancels = false;
    s.most = 1;
    train(&s, true, &other);
    same("without room", whole, &other);
#ifndef USL_REAL_GPU /* whose driver takes memory for many at once, and counts none for the next */
    CHECK(other.recorded == 0 && other.replays < whole->replays, "%d shapes stay recorded without room",
          other.recorded);
#endif
    free(other.params);
    snprintf(cmd, sizeof cmd, "rm -r %s", dir);
    CHECK(system(cmd) == 0, "clean up");
}

/* A checkpoint's plan may know of shorter rows than an evaluation set that is new: windows of attention are compared
 * with what the longest row is said to be. */
static void test_longer(const setup *given) {
    usl_ctx_opts co = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    setup s = *given;
    s.device = "cuda";
    CHECK(usl_ctx_new(&co, &ctx) == USL_OK, "context");
    usl_model *m = make(ctx, &s);
    usli_shape to = usli_shape_of(m, (usli_shape){ 400, 2, 200 }, (usli_shape){ 330, 1, 330 });
    CHECK(to.tokens == 384 && to.rows == 3 && to.longest == 330, "%lld tokens, %lld rows, of at most %lld",
          (long long)to.tokens, (long long)to.rows, (long long)to.longest);
    usl_model_free(m);
    usl_ctx_free(ctx);
}

int main(void) {
    setup lora = {
        .config = LLAMA, .optimizer = "adamw_8bit", .recompute = "none", .dtype = USL_BF16, .longest = LONGEST
    };
    setup dora = { .config = LLAMA,
                   .optimizer = "adamw",
                   .recompute = "none",
                   .dtype = USL_F32,
                   .four_bit = true,
                   .dora = true,
                   .embeds = true,
                   .dropout = 0.1,
                   .longest = SHORT };
    setup half = { .config = GEMMA3,
                   .optimizer = "adamw_8bit",
                   .recompute = "full",
                   .dtype = USL_F16,
                   .longest = SHORT,
                   .scale = 0x1p19f };
    setup full = {
        .config = GEMMA3, .optimizer = "adamw", .recompute = "none", .dtype = USL_F32, .full = true, .longest = SHORT
    };
    outcome o;
    if (!usli_cuda_count()) {
        SKIP("graphs: there is no GPU here");
        return test_end("graphs");
    }
    test_longer(&lora);
    case_of("LoRA, bfloat16", &lora, 0, &o);
    CHECK(o.recorded > 1, "%d shapes are recorded", o.recorded);
    others(lora, &o);
    free(o.params);
    case_of("DoRA on NF4 with dropout and embeddings", &dora, 1e-5, &o);
    free(o.params);
    case_of("Gemma 3, LoRA, float16, recomputed", &half, 0, &o);
    CHECK(o.skipped > 0 && o.skipped < STEPS, "%d updates overflow", o.skipped);
    free(o.params);
    case_of("Gemma 3, full fine-tuning", &full, 1e-5, &o);
    free(o.params);
    return test_end("graphs");
}
