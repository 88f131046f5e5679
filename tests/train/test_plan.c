/* A plan made over shapes alone is the plan of the real thing, costs next to nothing, and can run nothing. */
#include "tests/test.h"

#include <unistd.h>

static const char SMALL[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":331,\"hidden_size\":128,\"intermediate_size\":352,"
    "\"num_hidden_layers\":5,\"num_attention_heads\":8,\"num_key_value_heads\":4,\"max_position_embeddings\":512,"
    "\"rms_norm_eps\":1e-5,\"tie_word_embeddings\":false}";

static const char GEMMA3[] =
    "{\"architectures\":[\"Gemma3ForCausalLM\"],\"vocab_size\":331,\"hidden_size\":128,\"intermediate_size\":352,"
    "\"num_hidden_layers\":5,\"num_attention_heads\":8,\"num_key_value_heads\":4,\"head_dim\":16,"
    "\"max_position_embeddings\":512,\"sliding_window\":40}";

static const char DEEPSEEK3[] =
    "{\"architectures\":[\"DeepseekV3ForCausalLM\"],\"vocab_size\":331,\"hidden_size\":128,\"intermediate_size\":352,"
    "\"num_hidden_layers\":3,\"num_attention_heads\":8,\"max_position_embeddings\":512,\"q_lora_rank\":48,"
    "\"kv_lora_rank\":32,\"qk_nope_head_dim\":16,\"qk_rope_head_dim\":8,\"v_head_dim\":16,\"n_group\":4,\"topk_group\":"
    "2,"
    "\"n_routed_experts\":8,\"num_experts_per_tok\":3,\"first_k_dense_replace\":1,\"moe_intermediate_size\":64}";

static const char LLAMA3_70B[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":128256,\"hidden_size\":8192,\"intermediate_size\":28672,"
    "\"num_hidden_layers\":80,\"num_attention_heads\":64,\"num_key_value_heads\":8,\"max_position_embeddings\":8192,"
    "\"rms_norm_eps\":1e-5,\"rope_theta\":500000.0,\"tie_word_embeddings\":false}";

typedef enum method { LORA, QLORA, FULL } method;
static const char *const METHODS[] = { "lora", "qlora", "full" };

typedef struct setup {
    const char *config, *path; /* one of the two */
    const char *device, *recompute;
    method method;
    usl_dtype dtype;
    uint64_t memory;
    int64_t seq;
    int rows;
} setup;

typedef struct outcome {
    usl_status st;
    char sentence[1024];
    usl_plan plan;
} outcome;

typedef struct run {
    usl_ctx *ctx;
    usl_model *model;
    usl_rows *rows;
    usl_trainer *trainer;
} run;

#define TRY(expr)                        \
    do {                                 \
        usl_status try_ = (expr);        \
        if (try_ != USL_OK) return try_; \
    } while (0)

static usl_status open_model(run *r, const setup *s, bool plan_only) {
    usl_model_opts mo = USL_MODEL_OPTS_INIT;
    mo.device = s->device;
    mo.dtype = s->dtype;
    mo.load_in_4bit = s->method == QLORA;
    mo.full_finetuning = s->method == FULL;
    mo.max_seq_length = s->seq;
    mo.plan_only = plan_only;
    TRY(s->path ? usl_model_open(r->ctx, s->path, &mo, &r->model)
                : usl_model_random(r->ctx, s->config, 7, &mo, &r->model));
    usl_lora_opts lo = USL_LORA_OPTS_INIT;
    if (s->method != FULL) TRY(usl_model_add_lora(r->model, &lo));
    TRY(usl_rows_new(r->ctx, 0, &r->rows));
    int32_t *ids = calloc((size_t)s->seq, sizeof *ids);
    usl_status st = USL_OK;
    for (int i = 0; i < s->rows && st == USL_OK; i++) st = usl_rows_add(r->rows, ids, NULL, (size_t)(s->seq - i));
    free(ids);
    return st;
}

static usl_status open_trainer(run *r, const setup *s) {
    usl_train_opts to = USL_TRAIN_OPTS_INIT;
    to.batch = s->rows;
    to.accumulation = 1;
    to.max_steps = 1;
    to.recompute = s->recompute;
    to.memory_limit = s->memory;
    return usl_trainer_new(r->model, r->rows, NULL, &to, &r->trainer);
}

static void end(run *r) {
    usl_trainer_free(r->trainer);
    usl_rows_free(r->rows);
    usl_model_free(r->model);
    usl_ctx_free(r->ctx);
}

static void plan_of(run *r, const setup *s, outcome *o) {
    memset(o, 0, sizeof *o);
    o->st = open_trainer(r, s);
    snprintf(o->sentence, sizeof o->sentence, "%s", o->st == USL_OK ? "" : usl_ctx_errmsg(r->ctx));
    o->plan.size = sizeof o->plan;
    if (o->st == USL_OK) usl_trainer_get_plan(r->trainer, &o->plan);
    usl_trainer_free(r->trainer);
    r->trainer = NULL;
}

/* Of a model that is planned only. */
static void plan_alone(const setup *s, outcome *o) {
    run r = { 0 };
    memset(o, 0, sizeof *o);
    CHECK(usl_ctx_new(NULL, &r.ctx) == USL_OK, "context");
    o->st = open_model(&r, s, true);
    if (o->st == USL_OK)
        plan_of(&r, s, o);
    else
        snprintf(o->sentence, sizeof o->sentence, "%s", usl_ctx_errmsg(r.ctx));
    end(&r);
}

static bool same_plan(const usl_plan *a, const usl_plan *b) {
    bool same = a->count == b->count && a->total == b->total && a->limit == b->limit &&
                a->capacity_tokens == b->capacity_tokens && a->capacity_rows == b->capacity_rows &&
                a->recomputed_layers == b->recomputed_layers && a->layers == b->layers;
    for (int i = 0; same && i < a->count; i++)
        same = strcmp(a->items[i].name, b->items[i].name) == 0 && a->items[i].bytes == b->items[i].bytes;
    return same;
}

static void print_plan(const char *what, const usl_plan *p) {
    printf("  %s: ", what);
    for (int i = 0; i < p->count; i++) printf("%s %llu, ", p->items[i].name, (unsigned long long)p->items[i].bytes);
    printf("%lld tokens, %lld rows, %lld recomputed\n", (long long)p->capacity_tokens, (long long)p->capacity_rows,
           (long long)p->recomputed_layers);
}

/* How many plans were refused, recomputed something or made several passes: the cases must not all be easy. */
static int refused, recomputed, split;

/* What is refused for real is planned at its smallest, which is too much, and which the sentence tells. */
static void compare_refusal(const char *what, const setup *s, const outcome *real, const outcome *dry) {
    char need[64] = "";
    for (int i = 0; i < dry->plan.count; i++)
        if (strncmp(dry->plan.items[i].name, "activations", 11) == 0)
            snprintf(need, sizeof need, "needs %.4g GiB", (double)dry->plan.items[i].bytes / (1 << 30));
    CHECK(dry->st == USL_OK && dry->plan.total > s->memory && need[0] && strstr(real->sentence, need) &&
              strstr(real->sentence, "does not fit"),
          "%s, %s, recompute %s, %llu bytes: \"%s\" for real; planned: %llu bytes, \"%s\"", what, METHODS[s->method],
          s->recompute, (unsigned long long)s->memory, real->sentence, (unsigned long long)dry->plan.total, need);
}

static void compare(const char *what, run runs[2], const setup *s, outcome *real) {
    outcome dry;
    plan_of(&runs[0], s, real);
    plan_of(&runs[1], s, &dry);
    if (real->st == USL_ERR_NOMEM) {
        refused++;
        compare_refusal(what, s, real, &dry);
        return;
    }
    CHECK(dry.st == real->st && strcmp(dry.sentence, real->sentence) == 0,
          "%s, %s, recompute %s, %llu bytes: \"%s\" for real, \"%s\" planned", what, METHODS[s->method], s->recompute,
          (unsigned long long)s->memory, real->sentence, dry.sentence);
    CHECK(same_plan(&dry.plan, &real->plan), "%s, %s, recompute %s, %llu bytes: plans differ", what, METHODS[s->method],
          s->recompute, (unsigned long long)s->memory);
    if (!same_plan(&dry.plan, &real->plan)) print_plan("real", &real->plan), print_plan("dry ", &dry.plan);
    if (real->st != USL_OK) return;
    CHECK(real->plan.total <= s->memory, "%llu bytes planned of %llu", (unsigned long long)real->plan.total,
          (unsigned long long)s->memory);
    recomputed += real->plan.recomputed_layers > 0;
    split += real->plan.capacity_tokens < s->rows * s->seq - s->rows * (s->rows - 1) / 2; /* row i is i shorter */
}

enum { PARTS = 24 };

/* From all that a run could use down to what is refused. */
static void compare_limits(const char *what, setup s) {
    static const char *const RECOMPUTE[] = { "auto", "none", "full", "offload" };
    run runs[2] = { { 0 }, { 0 } }; /* the real one, the planned one */
    for (int i = 0; i < 2; i++) {
        CHECK(usl_ctx_new(NULL, &runs[i].ctx) == USL_OK, "context");
        CHECK_OK(runs[i].ctx, open_model(&runs[i], &s, i == 1));
    }
    for (int i = 0; i < 4; i++) {
        outcome all, some;
        s.recompute = RECOMPUTE[i];
        s.memory = (uint64_t)1 << 40;
        compare(what, runs, &s, &all);
        CHECK(all.st == USL_OK, "%s: %s", what, all.sentence);
        uint64_t work = 0;
        for (int k = 0; k < all.plan.count; k++)
            if (strncmp(all.plan.items[k].name, "activations", 11) == 0) work = all.plan.items[k].bytes;
        for (uint64_t part = 1; part <= PARTS; part++) {
            s.memory = all.plan.total - work * part / PARTS;
            compare(what, runs, &s, &some);
        }
    }
    end(&runs[0]);
    end(&runs[1]);
}

static void made_shapes(const char *config) {
    static const usl_dtype DTYPES[] = { USL_F32, USL_BF16, USL_F16 };
    for (int k = 0; k < 3; k++)
        for (int d = 0; d < 3; d++) {
            setup s = {
                .config = config, .device = "cpu", .method = (method)k, .dtype = DTYPES[d], .seq = 96, .rows = 4
            };
            compare_limits(usl_dtype_name(DTYPES[d]), s);
        }
}

static void files(const char *what, const char *path) {
    for (int k = 0; k < 3; k++) {
        setup s = { .path = path, .device = "cpu", .method = (method)k, .seq = 64, .rows = 3 };
        compare_limits(what, s);
    }
}

/* Of a folder and of a GGUF only headers are read. */
static void real_files(void) {
    char dir[] = "/tmp/usl-plan-XXXXXX", path[512], cmd[64];
    CHECK(mkdtemp(dir) != NULL, "a folder");
    usl_ctx *ctx;
    usl_model *m;
    CHECK(usl_ctx_new(NULL, &ctx) == USL_OK, "context");
    CHECK_OK(ctx, usl_model_random(ctx, SMALL, 7, NULL, &m));
    CHECK_OK(ctx, usl_export_merged(m, NULL, dir, USL_BF16));
    usl_model_free(m);
    usl_ctx_free(ctx);
    files("a folder", dir);
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    CHECK(system(cmd) == 0, "%s", cmd);
    const char *shared = getenv("USL_SHARED");
    static const char *const GGUF[] = { "", "-BF16", "-Q8_0", "-Q4_K_M" };
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/data/stories260K/gguf/stories260K%s.gguf", shared ? shared : "../shared",
                 GGUF[i]);
        if (access(path, R_OK) == 0)
            files(i ? GGUF[i] + 1 : "F32", path);
        else
            SKIP("%s is not here", path);
    }
}

/* 140 GB of weights: planned where they would never fit. */
static void big_shape(void) {
    for (int k = 0; k < 3; k++) {
        setup s = { .config = LLAMA3_70B, .device = "cpu", .recompute = "auto", .method = (method)k };
        s.memory = (uint64_t)4 << 40;
        s.seq = 2048;
        s.rows = 2;
        double start = usl_clock();
        outcome o;
        plan_alone(&s, &o);
        CHECK(o.st == USL_OK, "llama3-70b, %s: %s", METHODS[k], o.sentence);
        printf("llama3-70b, %s: %.1f GiB planned in %.3f s; peak of the process %.0f MiB\n", METHODS[k],
               (double)o.plan.total / (1 << 30), usl_clock() - start, (double)usl_peak_memory() / (1 << 20));
    }
    CHECK(usl_peak_memory() < (uint64_t)300 << 20, "planning llama3-70b takes %.0f MiB",
          (double)usl_peak_memory() / (1 << 20));
}

/* A card to plan for: where there is none, only its size has to be said. */
static void other_card(void) {
    setup s = { .config = LLAMA3_70B, .device = "cuda", .recompute = "auto", .method = QLORA, .seq = 2048, .rows = 2 };
    int fit = 0;
    for (uint64_t gib = 140; gib >= 5; gib -= 3) {
        outcome o;
        s.memory = gib << 30;
        plan_alone(&s, &o);
        if (o.st == USL_ERR_UNSUPPORTED) {
            CHECK(strstr(o.sentence, "built without CUDA") != NULL, "%s", o.sentence);
            return;
        }
        CHECK(o.st == USL_OK, "%llu GiB: %s", (unsigned long long)gib, o.sentence);
        int fits = o.plan.total <= s.memory;
        fit += fits;
        /* Its weights are 37 GiB. */
        CHECK((o.plan.streamed_layers > 0) == (gib < 44), "%llu GiB: %lld layers are streamed", (unsigned long long)gib,
              (long long)o.plan.streamed_layers);
        CHECK(fits || (gib <= 8 && o.plan.count > 2), "%.2f GiB planned of %llu", (double)o.plan.total / (1 << 30),
              (unsigned long long)gib);
    }
    CHECK(fit > 20 && fit < 45, "llama3-70b fits %d of 46 cards", fit);
    printf("llama3-70b, qlora, fits %d of 46 GPUs of 5 to 140 GiB\n", fit);
}

static void refuse(usl_ctx *ctx, const char *what, usl_status st) {
    CHECK(st == USL_ERR_INVALID && strstr(usl_ctx_errmsg(ctx), "plan_only"), "%s: %s, %s", what, usl_status_name(st),
          usl_ctx_errmsg(ctx));
}

static void runs_nothing(void) {
    setup s = { .config = SMALL, .device = "cpu", .recompute = "auto", .seq = 32, .rows = 2 };
    run r = { 0 };
    char dir[] = "/tmp/usl-plan-XXXXXX", *extra;
    CHECK(mkdtemp(dir) != NULL, "a folder");
    CHECK(usl_ctx_new(NULL, &r.ctx) == USL_OK, "context");
    CHECK_OK(r.ctx, open_model(&r, &s, true));
    CHECK_OK(r.ctx, open_trainer(&r, &s));
    int32_t ids[4] = { 1, 2, 3, 4 }, *out;
    size_t count;
    double flops;
    usl_tensor *t = NULL;
    refuse(r.ctx, "step", usl_trainer_step(r.trainer, NULL));
    refuse(r.ctx, "gradients", usl_trainer_gradients(r.trainer, 0, 1, NULL));
    refuse(r.ctx, "save", usl_trainer_save(r.trainer, dir, NULL));
    refuse(r.ctx, "resume", usl_trainer_resume(r.trainer, dir, &extra));
    const char *a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    refuse(r.ctx, "get_grad", usl_trainer_get_grad(r.trainer, a, &t));
    refuse(r.ctx, "get_param", usl_model_get_param(r.model, a, &t));
    refuse(r.ctx, "logits", usl_model_logits(r.model, ids, 4, &t));
    refuse(r.ctx, "generate", usl_model_generate(r.model, ids, 4, NULL, &out, &count));
    refuse(r.ctx, "gemm_rate", usl_model_gemm_rate(r.model, &flops));
    refuse(r.ctx, "save_adapter", usl_model_save_adapter(r.model, dir, NULL));
    refuse(r.ctx, "merged", usl_export_merged(r.model, NULL, dir, USL_BF16));
    refuse(r.ctx, "set_adapter", (usl_trainer_free(r.trainer), usl_model_set_adapter(r.model, NULL)));
    r.trainer = NULL;
    end(&r);
    CHECK(rmdir(dir) == 0, "something was left in %s", dir);
}

/* ---- Every allocation fails in turn ---- */

typedef struct counter {
    int64_t requests, live, failing;
} counter;

static void *counting_realloc(void *ud, void *ptr, size_t size) {
    counter *c = ud;
    if (size == 0) {
        c->live -= ptr != NULL;
        free(ptr);
        return NULL;
    }
    if (++c->requests == c->failing) return NULL;
    void *fresh = realloc(ptr, size);
    c->live += fresh && !ptr;
    return fresh;
}

static void out_of_memory(void) {
    setup s = { .config = SMALL, .device = "cpu", .recompute = "auto", .method = QLORA, .seq = 32, .rows = 2 };
    int64_t tried = 0;
    for (bool failed = true; failed; tried++) {
        counter c = { .failing = tried + 1 };
        usl_ctx_opts co = USL_CTX_OPTS_INIT;
        co.realloc_fn = counting_realloc;
        co.realloc_ud = &c;
        co.threads = 1;
        run r = { 0 };
        usl_status st = usl_ctx_new(&co, &r.ctx);
        if (st == USL_OK) st = open_model(&r, &s, true);
        if (st == USL_OK) st = open_trainer(&r, &s);
        failed = c.requests >= c.failing;
        CHECK(st == (failed ? USL_ERR_NOMEM : USL_OK), "allocation %lld: %s", (long long)c.failing,
              usl_status_name(st));
        end(&r);
        CHECK(c.live == 0, "allocation %lld: %lld blocks are left", (long long)c.failing, (long long)c.live);
    }
    CHECK(tried > 50, "only %lld allocations", (long long)tried);
    printf("%lld allocations of a plan failed in turn\n", (long long)tried - 1);
}

int main(void) {
    big_shape(); /* first: the peak of the process is its own */
    other_card();
    made_shapes(SMALL);
    made_shapes(GEMMA3);
    made_shapes(DEEPSEEK3);
    real_files();
    CHECK(refused > 10 && recomputed > 10 && split > 10, "%d refused, %d recomputed, %d split: too easy", refused,
          recomputed, split);
    printf("%d plans refused, %d recompute, %d make several passes\n", refused, recomputed, split);
    runs_nothing();
    out_of_memory();
    return test_end("plan");
}
