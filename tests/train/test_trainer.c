/* The same run must give the same bits whatever the threads, the recomputation or an interruption in the middle. */
#include "tests/test.h"

#include <pthread.h>
#include <unistd.h>

static const char CONFIG[] = "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":131,\"hidden_size\":48,"
                             "\"intermediate_size\":80,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
                             "\"num_key_value_heads\":2,\"max_position_embeddings\":256,\"rms_norm_eps\":1e-5,"
                             "\"tie_word_embeddings\":true,\"initializer_range\":0.05}";
/* Norms behind the branches, norms of heads, a window that rows are longer than, two rope tables. */
static const char GEMMA3[] = "{\"architectures\":[\"Gemma3ForCausalLM\"],\"vocab_size\":131,\"hidden_size\":48,"
                             "\"intermediate_size\":80,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
                             "\"num_key_value_heads\":2,\"head_dim\":12,\"max_position_embeddings\":256,"
                             "\"sliding_window\":7,\"sliding_window_pattern\":2,\"initializer_range\":0.05}";

/* A mixture beside an expert with a gate, and a dense layer between. */
static const char QWEN2_MOE[] = "{\"architectures\":[\"Qwen2MoeForCausalLM\"],\"vocab_size\":131,\"hidden_size\":48,"
                                "\"intermediate_size\":80,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
                                "\"num_key_value_heads\":2,\"max_position_embeddings\":256,\"mlp_only_layers\":[1],"
                                "\"num_experts\":3,\"num_experts_per_tok\":2,\"moe_intermediate_size\":24,"
                                "\"shared_expert_intermediate_size\":40,\"initializer_range\":0.05}";
/* Latent attention, experts chosen by groups. */
static const char DEEPSEEK3[] = "{\"architectures\":[\"DeepseekV3ForCausalLM\"],\"vocab_size\":131,\"hidden_size\":48,"
                                "\"intermediate_size\":80,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
                                "\"max_position_embeddings\":256,\"q_lora_rank\":20,\"kv_lora_rank\":16,"
                                "\"qk_nope_head_dim\":8,\"qk_rope_head_dim\":4,\"v_head_dim\":12,\"n_group\":2,"
                                "\"topk_group\":1,\"n_routed_experts\":4,\"num_experts_per_tok\":2,"
                                "\"first_k_dense_replace\":1,\"moe_intermediate_size\":24,\"initializer_range\":0.05}";

typedef struct setup {
    const char *config; /* NULL: CONFIG */
    int threads, steps;
    const char *recompute, *optimizer;
    usl_dtype dtype;
    int four_bit, full;
    double dropout, balance;
    uint64_t memory;
    int stop_at; /* save there, close everything, resume in a new trainer; 0: straight on */
    const char *dir;
    bool cancels; /* another thread asks to stop all the while; updates are tried until they are made */
} setup;

typedef struct outcome {
    double loss[16], norm[16];
    float *params;
    size_t count;
    int64_t passes, recomputed, piece;
} outcome;

static void add_rows(usl_ctx *ctx, usl_rows *rows) {
    uint32_t state = 12345;
    for (int r = 0; r < 23; r++) {
        int32_t ids[64], labels[64];
        int n = 9 + r * 7 % 40;
        for (int i = 0; i < n; i++) {
            state = state * 1664525u + 1013904223u;
            ids[i] = (int32_t)(state >> 16) % 131;
            labels[i] = i < 3 ? -100 : ids[i];
        }
        CHECK_OK(ctx, usl_rows_add(rows, ids, labels, (size_t)n));
    }
}

static void collect(usl_ctx *ctx, usl_model *m, outcome *o) {
    int trainable;
    const char *name;
    o->params = NULL;
    o->count = 0;
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

enum { CANCELS = 60 };

/* Asks at moments that spread over several updates. */
static void *cancel_often(void *arg) {
    for (int i = 0; i < CANCELS; i++) {
        for (volatile int spin = 0; spin < 20000 * (i % 17); spin++) {
        }
        usl_ctx_cancel(arg);
    }
    return NULL;
}

static usl_status step(usl_ctx *ctx, usl_trainer *t, const setup *s, usl_step_stats *stats) {
    usl_status st;
    do st = usl_trainer_step(t, stats);
    while (st == USL_ERR_CANCELLED && s->cancels);
    CHECK_OK(ctx, st);
    return st;
}

static void count_warnings(void *ud, usl_log_level level, const char *text) {
    if (level == USL_LOG_WARN && strstr(text, "was computed by")) ++*(int *)ud;
}

/* As if another backend had written the checkpoint. */
static void disguise(const char *dir) {
    char path[128], text[4096];
    snprintf(path, sizeof path, "%s/trainer_state.json", dir);
    FILE *f = fopen(path, "r+b");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    text[n] = 0;
    char *name = strstr(text, "\"cpu, ");
    CHECK(name != NULL, "the checkpoint does not say whose arithmetic it is: %s", text);
    if (name) {
        fseek(f, name + 1 - text, SEEK_SET);
        fputc('g', f);
    }
    if (f) fclose(f);
}

static usl_status train(const setup *s, outcome *o) {
    usl_ctx_opts co = USL_CTX_OPTS_INIT;
    int warnings = 0;
    co.threads = s->threads;
    co.log_fn = count_warnings;
    co.log_ud = &warnings;
    usl_ctx *ctx;
    usl_model *m = NULL;
    usl_rows *rows = NULL;
    usl_trainer *t = NULL;
    CHECK(usl_ctx_new(&co, &ctx) == USL_OK, "context");
    usl_model_opts mo = USL_MODEL_OPTS_INIT;
    mo.dtype = s->dtype;
    mo.load_in_4bit = s->four_bit;
    mo.full_finetuning = s->full;
    const char *config = s->config ? s->config : CONFIG;
    CHECK_OK(ctx, usl_model_random(ctx, config, 7, &mo, &m));
    usl_lora_opts lo = USL_LORA_OPTS_INIT;
    lo.rank = 4;
    lo.dropout = s->dropout;
    lo.init = "random";
    if (!s->full) CHECK_OK(ctx, usl_model_add_lora(m, &lo));
    CHECK_OK(ctx, usl_rows_new(ctx, 0, &rows));
    add_rows(ctx, rows);
    usl_train_opts to = USL_TRAIN_OPTS_INIT;
    to.max_steps = s->steps;
    to.learning_rate = 2e-3;
    to.warmup_steps = 2;
    to.weight_decay = 0.01;
    to.optimizer = s->optimizer;
    to.recompute = s->recompute;
    to.memory_limit = s->memory;
    to.router_aux_loss_coef = s->balance;
    usl_status st = usl_trainer_new(m, rows, NULL, &to, &t);
    memset(o, 0, sizeof *o);
    pthread_t canceller;
    if (s->cancels) {
        usl_step_stats none = { .size = sizeof none };
        usl_ctx_cancel(ctx);
        CHECK(usl_trainer_step(t, &none) == USL_ERR_CANCELLED, "an update that was cancelled is made");
        CHECK(usl_trainer_position(t, NULL) == 0, "and counted");
        CHECK(pthread_create(&canceller, NULL, cancel_often, ctx) == 0, "no thread");
    }
    for (int i = 0; i < s->steps && st == USL_OK; i++) {
        if (s->stop_at && i == s->stop_at) {
            char *extra;
            CHECK_OK(ctx, usl_trainer_save(t, s->dir, "kept"));
            usl_trainer_free(t);
            usl_model_free(m);
            CHECK_OK(ctx, usl_model_random(ctx, config, 7, &mo, &m));
            if (!s->full) CHECK_OK(ctx, usl_model_add_lora(m, &lo));
            CHECK_OK(ctx, usl_trainer_new(m, rows, NULL, &to, &t));
            CHECK_OK(ctx, usl_trainer_resume(t, s->dir, &extra));
            CHECK(extra && strcmp(extra, "kept") == 0, "the host's text came back as %s", extra ? extra : "nothing");
            usl_free(ctx, extra);
            CHECK(warnings == 0, "the same arithmetic is said to be another");
            disguise(s->dir);
            CHECK_OK(ctx, usl_trainer_resume(t, s->dir, NULL));
            CHECK(warnings == 1, "another arithmetic is not said: %d", warnings);
        }
        usl_step_stats stats = { .size = sizeof stats };
        st = step(ctx, t, s, &stats);
        o->loss[i] = stats.loss;
        o->norm[i] = stats.grad_norm;
        o->passes = stats.passes;
    }
    if (s->cancels) {
        pthread_join(canceller, NULL);
        usl_ctx_uncancel(ctx);
    }
    if (st == USL_OK) {
        usl_plan plan = { .size = sizeof plan };
        usl_trainer_get_plan(t, &plan);
        o->recomputed = plan.recomputed_layers;
        o->piece = plan.piece_tokens;
        collect(ctx, m, o);
        usl_step_stats stats = { .size = sizeof stats };
        CHECK(usl_trainer_step(t, &stats) == USL_ERR_NOT_FOUND, "a finished run goes on");
    } else {
        printf("refused: %s\n", usl_ctx_errmsg(ctx));
    }
    usl_trainer_free(t);
    usl_rows_free(rows);
    usl_model_free(m);
    usl_ctx_free(ctx);
    return st;
}

static void same(const char *what, const outcome *a, const outcome *b, int steps) {
    CHECK(a->count == b->count && a->count > 0, "%s: %zu and %zu numbers", what, a->count, b->count);
    for (int i = 0; i < steps; i++)
        CHECK(a->loss[i] == b->loss[i] && a->norm[i] == b->norm[i],
              "%s, update %d: loss %.17g and %.17g, norm %.9g and %.9g", what, i + 1, a->loss[i], b->loss[i],
              a->norm[i], b->norm[i]);
    if (a->count == b->count)
        CHECK(memcmp(a->params, b->params, a->count * sizeof *a->params) == 0, "%s: the weights differ", what);
}

static void case_of(const char *name, setup s) {
    outcome base, other;
    char dir[] = "/tmp/usl-train-XXXXXX", cmd[64];
    CHECK(mkdtemp(dir) != NULL, "a folder");
    s.steps = 6;
    s.threads = 2;
    s.recompute = "none";
    CHECK(train(&s, &base) == USL_OK, "%s", name);
    CHECK(base.loss[5] < base.loss[0] + 1 && base.norm[0] > 0, "%s: loss %g to %g", name, base.loss[0], base.loss[5]);
    setup v = s;
    for (int threads = 1; threads <= 5; threads += 4) {
        v.threads = threads;
        train(&v, &other);
        same("threads", &base, &other, 6);
        free(other.params);
    }
    v = s;
    for (int i = 0; i < 2; i++) {
        v.recompute = i ? "offload" : "full";
        train(&v, &other);
        CHECK(other.recomputed == 3, "%lld blocks recomputed", (long long)other.recomputed);
        same(v.recompute, &base, &other, 6);
        free(other.params);
    }
    v = s;
    v.cancels = true;
    train(&v, &other);
    same("cancelled", &base, &other, 6);
    free(other.params);
    v = s;
    v.stop_at = 3;
    v.dir = dir;
    train(&v, &other);
    same("resume", &base, &other, 6);
    free(other.params);
    free(base.params);
    snprintf(cmd, sizeof cmd, "rm -r %s", dir);
    CHECK(system(cmd) == 0, "clean up");
}

/* Less memory: more recomputation, then MLPs in pieces, then smaller passes, whose sums agree up to rounding; then a
 * refusal with the numbers. */
static void memory_limits(void) {
    setup s = { .threads = 2, .steps = 3, .recompute = "auto", .optimizer = "adamw", .dtype = USL_F32, .dropout = 0.1 };
    outcome all, few;
    CHECK(train(&s, &all) == USL_OK && all.recomputed == 0 && all.passes == 1, "%lld passes", (long long)all.passes);
    int recomputed = 0, pieces = 0, split = 0, refused = 0;
    for (uint64_t limit = (uint64_t)36 << 20; limit > (uint64_t)32 << 20; limit -= 64 << 10) {
        s.memory = limit;
        if (train(&s, &few) != USL_OK) {
            refused++;
            break;
        }
        recomputed += few.recomputed > 0;
        pieces += few.piece > 0 && few.passes == 1;
        split += few.passes > 1;
        CHECK(fabs(few.loss[2] - all.loss[2]) < 1e-5 * all.loss[2], "with %.2f MiB the loss is %.9g, not %.9g",
              (double)limit / (1 << 20), few.loss[2], all.loss[2]);
        free(few.params);
    }
    CHECK(recomputed > 0 && pieces > 0 && split > 0 && refused == 1,
          "%d plans recompute, %d of them in pieces, %d split, %d refused", recomputed, pieces, split, refused);
    free(all.params);
}

int main(void) {
    case_of("LoRA, float32", (setup){ .optimizer = "adamw", .dtype = USL_F32 });
    case_of("LoRA on NF4, 8-bit AdamW", (setup){ .optimizer = "adamw_8bit", .dtype = USL_F32, .four_bit = 1 });
    case_of("LoRA with dropout, bfloat16", (setup){ .optimizer = "adamw", .dtype = USL_BF16, .dropout = 0.1 });
    case_of("full fine-tuning", (setup){ .optimizer = "adamw", .dtype = USL_F32, .full = 1 });
    case_of("Gemma 3, LoRA, float16", (setup){ .config = GEMMA3, .optimizer = "adamw", .dtype = USL_F16 });
    case_of("Gemma 3, full fine-tuning",
            (setup){ .config = GEMMA3, .optimizer = "adamw", .dtype = USL_F32, .full = 1 });
    case_of("Qwen2-MoE, LoRA with dropout on NF4, bfloat16", (setup){ .config = QWEN2_MOE,
                                                                      .optimizer = "adamw",
                                                                      .dtype = USL_BF16,
                                                                      .four_bit = 1,
                                                                      .dropout = 0.1,
                                                                      .balance = 0.1 });
    case_of("DeepSeek V3, full fine-tuning",
            (setup){ .config = DEEPSEEK3, .optimizer = "adamw", .dtype = USL_F32, .full = 1 });
    memory_limits();
    return test_end("trainer");
}
