/* What the plan moves to host memory changes speed and not a bit: block inputs, the embedding table, weights that are
 * streamed. And the device holds what the plan says. For a GPU, or its emulation on the CPU. */
#include "tests/test.h"

#include <stdlib.h>

#include "core/model/model.h"
#include "kernels/cuda.h"

/* A GPU's driver hands out memory in pieces of 2 MiB, and its libraries take some when they are first called: there a
 * layer must be larger than that. The emulation counts every byte. And its library multiplies fewer tokens by another
 * algorithm, so where MLPs run piece by piece (the checkpoint says so, and resuming repeats it) bits are others. */
#ifdef USL_REAL_GPU
#define SIZES "\"vocab_size\":4096,\"hidden_size\":2048,\"intermediate_size\":5632,\"num_attention_heads\":16"
enum { LENGTH = 256, SLACK = 100 << 20, MARGIN = 8 << 20, MOST_STREAMED = 3, LEAST_LEVELS = 1, PIECES_DIFFER = 1 };
#else
#define SIZES "\"vocab_size\":67,\"hidden_size\":64,\"intermediate_size\":128,\"num_attention_heads\":4"
enum { LENGTH = 8, SLACK = 64 << 10, MARGIN = 0, MOST_STREAMED = 7, LEAST_LEVELS = 2, PIECES_DIFFER = 0 };
#endif

static const char CONFIG[] = "{\"architectures\":[\"LlamaForCausalLM\"]," SIZES ",\"num_hidden_layers\":7,"
                             "\"num_key_value_heads\":2,\"max_position_embeddings\":256,\"rms_norm_eps\":1e-5,"
                             "\"tie_word_embeddings\":false,\"initializer_range\":0.05}";

enum { STEPS = 2, ROWS = 2, NEW = 6 };

typedef struct outcome {
    double loss[STEPS], norm[STEPS], eval;
    int64_t passes;
    usl_plan plan;
    size_t used;
    int32_t with_ring[NEW], without[NEW]; /* generated beside the trainer, and after it */
} outcome;

static void add_rows(usl_ctx *ctx, usl_rows *rows) {
    for (int r = 0; r < ROWS; r++) {
        int32_t ids[LENGTH], labels[LENGTH];
        for (int i = 0; i < LENGTH; i++) ids[i] = labels[i] = (i * 7 + r * 31 + i * i) % 67;
        CHECK_OK(ctx, usl_rows_add(rows, ids, labels, LENGTH));
    }
}

static size_t in_use(usl_model *m) {
    size_t used = 0, total;
    CHECK_OK(m->ctx, m->exec.backend->memory(&m->exec, &used, &total));
    return used;
}

static usl_status train(usl_model *m, usl_rows *rows, uint64_t limit, double rate, outcome *o) {
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    usl_generate_opts greedy = USL_GENERATE_OPTS_INIT;
    static const int32_t PROMPT[] = { 1, 2, 3, 5, 8 };
    int32_t *ids;
    size_t count;
    usl_trainer *t;
    opts.max_steps = STEPS;
    opts.batch = ROWS;
    opts.accumulation = 1;
    opts.learning_rate = rate;
    opts.memory_limit = limit;
    greedy.max_new_tokens = NEW;
    memset(o, 0, sizeof *o);
    o->plan.size = sizeof o->plan;
    USLI_TRY(usl_trainer_new(m, rows, rows, &opts, &t));
    for (int i = 0; i < STEPS; i++) {
        usl_step_stats stats = { .size = sizeof stats };
        CHECK_OK(m->ctx, usl_trainer_step(t, &stats));
        o->loss[i] = stats.loss;
        o->norm[i] = stats.grad_norm;
        o->passes = stats.passes;
        CHECK_OK(m->ctx, usl_trainer_evaluate(t, &stats)); /* leaves the ring at its other end */
        o->eval = stats.loss;
    }
    usl_trainer_get_plan(t, &o->plan);
    o->used = in_use(m);
    if (rate > 0) {
        CHECK_OK(m->ctx, usl_model_generate(m, PROMPT, 5, &greedy, &ids, &count));
        CHECK(count == NEW, "%zu tokens", count);
        memcpy(o->with_ring, ids, sizeof o->with_ring);
        usl_free(m->ctx, ids);
    }
    usl_trainer_free(t);
    if (rate > 0) {
        CHECK_OK(m->ctx, usl_model_generate(m, PROMPT, 5, &greedy, &ids, &count));
        memcpy(o->without, ids, sizeof o->without);
        usl_free(m->ctx, ids);
    }
    return USL_OK;
}

/* Another algorithm's sums are not the same bits, but as close as rounding allows. */
static bool in_pieces(const outcome *o) {
    return PIECES_DIFFER && o->plan.piece_tokens;
}

static bool near(double a, double b) {
    return fabs(a - b) <= 1e-3 * fabs(b);
}

static void same_bits(const outcome *a, const outcome *b) {
    if (in_pieces(a) || in_pieces(b)) {
        CHECK(near(a->loss[0], b->loss[0]) && near(a->norm[0], b->norm[0]), "in pieces: loss %g and %g, norm %g and %g",
              a->loss[0], b->loss[0], a->norm[0], b->norm[0]);
        return;
    }
    for (int i = 0; i < STEPS; i++)
        CHECK(a->loss[i] == b->loss[i] && a->norm[i] == b->norm[i] && a->eval == b->eval,
              "%lld streamed, update %d: loss %.17g and %.17g, norm %.9g and %.9g, later %.17g and %.17g",
              (long long)b->plan.streamed_layers, i + 1, a->loss[i], b->loss[i], a->norm[i], b->norm[i], a->eval,
              b->eval);
}

static void agrees(const outcome *o) {
    double planned = (double)o->plan.total, used = (double)o->used;
    CHECK(fabs(planned - used) < SLACK + 0.03 * planned, "the plan says %.0f bytes, the device %.0f", planned, used);
}

static uint64_t item(const usl_plan *p, const char *name) {
    for (int i = 0; i < p->count; i++)
        if (strcmp(p->items[i].name, name) == 0) return p->items[i].bytes;
    return 0;
}

/* Less and less memory, one plan after the other, while the window stays one pass. Returns the tightest. */
static uint64_t limits(usl_ctx *ctx, usl_model *m, usl_rows *rows) {
    outcome free_run, o;
    CHECK_OK(ctx, train(m, rows, 0, 0, &free_run));
    CHECK(free_run.plan.streamed_layers == 0 && free_run.plan.recomputed_layers == 0 && free_run.plan.host_total == 0,
          "a plan without a limit moves things");
    agrees(&free_run);
    int64_t streamed = 0, offloaded = 0, levels = 0, whole_streamed = 0;
    uint64_t tightest = 0;
    for (uint64_t limit = free_run.plan.total - item(&free_run.plan, "decoded weights");;
         limit = o.plan.total - 1 - o.plan.total / (o.plan.host_total ? 40 : 4)) { /* plans alike are passed by */
        if (train(m, rows, limit, 0, &o) != USL_OK || o.passes > 1) break;
        agrees(&o);
        CHECK(o.plan.total <= limit, "%llu bytes planned of %llu", (unsigned long long)o.plan.total,
              (unsigned long long)limit);
        same_bits(&free_run, &o);
        CHECK(o.plan.host_total > 0 || !(o.plan.offloaded_inputs || o.plan.streamed_layers), "nothing on the host");
        offloaded += o.plan.offloaded_inputs;
        levels += o.plan.streamed_layers > streamed;
        if (o.plan.streamed_layers > streamed) streamed = o.plan.streamed_layers;
        whole_streamed += !in_pieces(&o) && o.plan.streamed_layers > 0;
        tightest = o.plan.total;
    }
    CHECK(offloaded > 0 && streamed >= MOST_STREAMED && levels >= LEAST_LEVELS && whole_streamed > 0,
          "%lld plans offload; %lld layers streamed at most, %lld levels, %lld times without pieces",
          (long long)offloaded, (long long)streamed, (long long)levels, (long long)whole_streamed);
    CHECK_OK(ctx, train(m, rows, 0, 0, &o)); /* everything comes back */
    CHECK(o.plan.streamed_layers == 0, "%lld layers stay in host memory", (long long)o.plan.streamed_layers);
    same_bits(&free_run, &o);
    return tightest;
}

static usl_model *make(usl_ctx *ctx, bool nf4) {
    usl_model_opts mo = USL_MODEL_OPTS_INIT;
    usl_lora_opts lo = USL_LORA_OPTS_INIT;
    usl_model *m;
    mo.dtype = nf4 ? USL_F32 : USL_BF16;
    mo.device = "cuda";
    mo.load_in_4bit = nf4;
    lo.rank = 2;
    lo.init = "random";
    CHECK_OK(ctx, usl_model_random(ctx, CONFIG, 7, &mo, &m));
    if (!m) exit(test_end("memory"));
    CHECK_OK(ctx, usl_model_add_lora(m, &lo));
    return m;
}

/* The adapters and what is generated with them. One model at a time, or the other one's memory would count. */
static void results(usl_ctx *ctx, usl_rows *rows, bool nf4, uint64_t limit) {
    outcome o[2];
    char *adapter[2];
    size_t bytes = 0;
    for (int i = 0; i < 2; i++) {
        usl_model *m = make(ctx, nf4);
        CHECK_OK(ctx, train(m, rows, i ? limit + MARGIN : 0, 0.01, &o[i]));
        CHECK_OK(ctx, usli_model_pull(m));
        bytes = m->active->bytes;
        if (!(adapter[i] = malloc(bytes))) exit(1);
        memcpy(adapter[i], m->active->storage, bytes);
        usl_model_free(m);
    }
    same_bits(&o[0], &o[1]);
    CHECK(o[0].loss[1] != o[0].loss[0] && o[1].plan.streamed_layers > 0, "nothing is trained, or streamed");
    if (!in_pieces(&o[1])) {
        CHECK(memcmp(adapter[0], adapter[1], bytes) == 0, "the adapters differ");
        CHECK(memcmp(o[0].with_ring, o[1].with_ring, sizeof o[0].with_ring) == 0, "through the ring other tokens come");
        CHECK(memcmp(o[0].without, o[1].without, sizeof o[0].without) == 0, "from host memory other tokens come");
    }
    for (int i = 0; i < 2; i++) free(adapter[i]);
}

int main(void) {
    if (!usli_cuda_count()) {
        SKIP("memory: there is no GPU here");
        return test_end("memory");
    }
    for (int round = 0; round < 2; round++) {
        usl_ctx_opts co = USL_CTX_OPTS_INIT;
        usl_ctx *ctx;
        usl_rows *rows;
        bool nf4 = round == 0;
        if (round) setenv("USL_EMULATE_LATE_COPIES", "1", 1);
        co.threads = 2;
        CHECK(usl_ctx_new(&co, &ctx) == USL_OK, "context");
        CHECK_OK(ctx, usl_rows_new(ctx, 0, &rows));
        add_rows(ctx, rows);
        usl_model *m = make(ctx, nf4);
        uint64_t tightest = limits(ctx, m, rows);
        usl_model_free(m);
        results(ctx, rows, nf4, tightest);
        usl_rows_free(rows);
        usl_ctx_free(ctx);
    }
    return test_end("memory");
}
