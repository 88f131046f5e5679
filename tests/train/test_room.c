/* Where base and adapters are one product, the adapters stand in the room beside matrices: what is kept decoded changes
 * speed and not a bit, and in matrices that are shared nobody but their owner writes. For a GPU, or its emulation. */
#include "tests/test.h"

#include <stdlib.h>

#include "core/model/model.h"
#include "kernels/cuda.h"

/* Large enough for a GPU's library to choose among its algorithms. */
#ifdef USL_REAL_GPU
#define SIZES "\"hidden_size\":1024,\"intermediate_size\":2816,\"num_attention_heads\":16"
enum { ROWS = 2, LENGTH = 200 };
#else
#define SIZES "\"hidden_size\":64,\"intermediate_size\":96,\"num_attention_heads\":4"
enum { ROWS = 2, LENGTH = 11 };
#endif

static const char CONFIG[] =
    "{\"architectures\":[\"Qwen2ForCausalLM\"],\"vocab_size\":67," SIZES ",\"num_hidden_layers\":2,"
    "\"num_key_value_heads\":2,\"max_position_embeddings\":256,\"rms_norm_eps\":1e-5,"
    "\"tie_word_embeddings\":false,\"initializer_range\":0.02}";

typedef struct outcome {
    double loss, norm;
    uint64_t total, decoded;
    int64_t pieces;
} outcome;

static void add_rows(usl_ctx *ctx, usl_rows *rows) {
    for (int r = 0; r < ROWS; r++) {
        int32_t ids[LENGTH], labels[LENGTH];
        for (int i = 0; i < LENGTH; i++) ids[i] = labels[i] = (i * 7 + r * 31 + i * i) % 67;
        CHECK_OK(ctx, usl_rows_add(rows, ids, labels, LENGTH));
    }
}

/* Of weights in the type that this GPU is fast in. */
static usl_model *make(usl_ctx *ctx, bool nf4) {
    static usl_dtype dtype = USL_DTYPE_AUTO;
    usl_model_opts mo = USL_MODEL_OPTS_INIT;
    usl_model *m;
    mo.dtype = dtype;
    mo.device = "cuda";
    mo.load_in_4bit = nf4;
    CHECK_OK(ctx, usl_model_random(ctx, CONFIG, 7, &mo, &m));
    if (!m) exit(test_end("room"));
    if (dtype != USL_DTYPE_AUTO) return m;
    dtype = m->dtype;
    usl_model_free(m);
    return make(ctx, nf4);
}

static usl_lora_opts lora(void) {
    usl_lora_opts o = USL_LORA_OPTS_INIT;
    o.rank = 5;
    o.alpha = 2;
    o.init = "random";
    return o;
}

/* An update that changes nothing. */
static outcome train(usl_model *m, usl_rows *rows, uint64_t limit) {
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    usl_step_stats stats = { .size = sizeof stats };
    usl_plan plan = { .size = sizeof plan };
    usl_trainer *t;
    outcome o = { 0 };
    opts.max_steps = 1;
    opts.batch = ROWS;
    opts.accumulation = 1;
    opts.learning_rate = 0;
    opts.memory_limit = limit;
    CHECK_OK(m->ctx, usl_trainer_new(m, rows, NULL, &opts, &t));
    if (!t) return o;
    CHECK_OK(m->ctx, usl_trainer_step(t, &stats));
    usl_trainer_get_plan(t, &plan);
    o = (outcome){ .loss = stats.loss, .norm = stats.grad_norm, .total = plan.total, .pieces = plan.piece_tokens };
    for (int i = 0; i < plan.count; i++)
        if (strcmp(plan.items[i].name, "decoded weights") == 0) o.decoded = plan.items[i].bytes;
    usl_trainer_free(t);
    return o;
}

/* With all matrices kept decoded, and with few or none. */
static void check_kept(usl_ctx *ctx, usl_rows *rows, const char *what, const usl_lora_opts *lo) {
    usl_model *m = make(ctx, true);
    CHECK_OK(ctx, usl_model_add_lora(m, lo));
    outcome all = train(m, rows, 0), few = train(m, rows, all.total - all.decoded / 2);
    CHECK(all.decoded > few.decoded && !few.pieces, "%s: %llu and %llu bytes decoded", what,
          (unsigned long long)all.decoded, (unsigned long long)few.decoded);
    CHECK(all.loss == few.loss && all.norm == few.norm, "%s: loss %.17g and %.17g, norm %.9g and %.9g", what, all.loss,
          few.loss, all.norm, few.norm);
    usl_model_free(m);
}

static void check_all_kept(usl_ctx *ctx, usl_rows *rows) {
    usl_lora_opts o = lora();
    check_kept(ctx, rows, "plain", &o);
    o.modules_to_save = "q_proj";
    check_kept(ctx, rows, "a matrix is trained", &o);
    o = lora();
    o.rank_pattern = "{\"layers.0.self_attn.q_proj\":40,\"layers.0.self_attn.k_proj\":30,\"up_proj\":17}";
    o.target_modules = "q_proj,k_proj,up_proj,down_proj";
    check_kept(ctx, rows, "many ranks and none", &o);
    o = lora();
    o.use_dora = 1;
    o.dropout = 0.2;
    check_kept(ctx, rows, "DoRA and dropout", &o);
}

/* All that is placed of a model's layers. New: free it. */
static char *placed(const usl_model *m, size_t *bytes) {
    *bytes = 0;
    for (int64_t l = 0; l < m->config.layers; l++) *bytes += m->places[l].bytes;
    char *all = malloc(*bytes), *to = all;
    for (int64_t l = 0; l < m->config.layers; to += m->places[l++].bytes)
        CHECK_OK(m->ctx,
                 m->exec.backend->copy_out((usli_exec *)(uintptr_t)&m->exec, to, m->places[l].at, m->places[l].bytes));
    return all;
}

static void check_shared(usl_ctx *ctx, usl_rows *rows) {
    usl_lora_opts lo = lora();
    usl_model *owner = make(ctx, false), *sharer = NULL;
    size_t bytes;
    CHECK_OK(ctx, usl_model_share(ctx, owner, &sharer));
    if (!sharer) exit(test_end("room"));
    CHECK_OK(ctx, usl_model_add_lora(owner, &lo));
    lo.seed++;
    CHECK_OK(ctx, usl_model_add_lora(sharer, &lo));
    outcome first = train(owner, rows, 0);
    char *before = placed(owner, &bytes);
    train(sharer, rows, 0);
    char *after = placed(owner, &bytes);
    CHECK(memcmp(before, after, bytes) == 0, "who shares matrices writes beside them");
    free(after);
    CHECK_OK(ctx, usl_model_add_lora(owner, &lo)); /* the sharer's */
    outcome mine = train(owner, rows, 0), theirs = train(sharer, rows, 0);
    after = placed(owner, &bytes);
    CHECK(memcmp(before, after, bytes) != 0, "their owner does not");
    CHECK(first.loss != mine.loss && fabs(mine.loss - theirs.loss) <= 1e-3 * mine.loss &&
              fabs(mine.norm - theirs.norm) <= 2e-2 * mine.norm,
          "loss %.9g, shared %.9g; norm %.9g, shared %.9g", mine.loss, theirs.loss, mine.norm, theirs.norm);
    free(before), free(after);
    usl_model_free(sharer);
    usl_model_free(owner);
}

/* A model whose weights are nowhere, since they did not find back, is refused by whoever reads them. */
static void check_nowhere(usl_ctx *ctx, usl_rows *rows) {
    static const int32_t IDS[] = { 1, 2, 3 };
    usl_model *m = make(ctx, true), *other = NULL;
    usl_lora_opts lo = lora();
    usl_generate_opts go = USL_GENERATE_OPTS_INIT;
    usl_trainer *t = NULL;
    usl_tensor *logits = NULL;
    int32_t *ids = NULL;
    size_t count;
    CHECK_OK(ctx, usl_model_add_lora(m, &lo));
    usli_model_unplace(m);
    CHECK(usl_model_share(ctx, m, &other) == USL_ERR_NOMEM, "it is shared");
    CHECK(usl_trainer_new(m, rows, NULL, NULL, &t) == USL_ERR_NOMEM, "it is trained");
    CHECK(usl_model_generate(m, IDS, 3, &go, &ids, &count) == USL_ERR_NOMEM, "it generates");
    CHECK(usl_model_logits(m, IDS, 3, &logits) == USL_ERR_NOMEM, "it makes logits");
    usl_model_free(m);
}

int main(void) {
    if (!usli_cuda_count()) {
        SKIP("room: there is no GPU here");
        return test_end("room");
    }
    usl_ctx_opts co = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    usl_rows *rows;
    co.threads = 2;
    CHECK(usl_ctx_new(&co, &ctx) == USL_OK, "context");
    CHECK_OK(ctx, usl_rows_new(ctx, 0, &rows));
    add_rows(ctx, rows);
    check_all_kept(ctx, rows);
    check_shared(ctx, rows);
    check_nowhere(ctx, rows);
    usl_rows_free(rows);
    usl_ctx_free(ctx);
    return test_end("room");
}
