// A C++ host: no free, no status is looked at, and an exception unwinds a training in the middle.
//
//     02_raii MODEL
#include "unsloth.hpp"

#include <cstdio>

static const char *const TEXTS[] = { "The sky is blue.", "The sea is blue.", "The grass is green.",
                                     "The sun is yellow." };

static void run(const std::string &path) {
    usl::context ctx;
    usl_model_opts mopts = USL_MODEL_OPTS_INIT;
    mopts.load_in_4bit = 1;
    auto tok = ctx.make<usl::tokenizer>(usl_tokenizer_open, path.c_str());
    auto model = ctx.make<usl::model>(usl_model_open, path.c_str(), &mopts);
    usl_lora_opts lora = USL_LORA_OPTS_INIT;
    ctx.check(usl_model_add_lora(model, &lora));

    auto rows = ctx.make<usl::rows>(usl_rows_new, int64_t(128));
    for (const char *text : TEXTS) {
        auto ids = ctx.encode(tok, text);
        ctx.check(usl_rows_add(rows, ids.data(), nullptr, ids.size()));
    }
    usl_train_opts opts = USL_TRAIN_OPTS_INIT;
    opts.batch = 4;
    opts.accumulation = 1;
    opts.max_steps = 30;
    opts.learning_rate = 5e-3;
    usl_trainer *raw;
    ctx.check(usl_trainer_new(model, rows, nullptr, &opts, &raw));
    usl::trainer trainer(raw);
    usl_step_stats s = {};
    s.size = sizeof s;
    double first = 0;
    while (usl_trainer_step(trainer, &s) == USL_OK)
        if (s.step == 1) first = s.loss;
    std::printf("loss %.3f -> %.3f\n", first, s.loss);
    std::printf("The sea is|%s\n", ctx.decode(tok, ctx.generate(model, ctx.encode(tok, "The sea is"), 12)).c_str());
    usl_lora_opts wrong = USL_LORA_OPTS_INIT;
    ctx.check(usl_model_add_lora(model, &wrong)); // refused, since the trainer uses the model: everything is freed
}

int main(int argc, char **argv) {
    if (argc < 2) return std::fprintf(stderr, "usage: %s MODEL\n", argv[0]), 1;
    try {
        run(argv[1]);
    } catch (const usl::error &e) {
        std::printf("%s: %s\n", usl_status_name(e.code), e.what());
        return e.code == USL_ERR_INVALID ? 0 : 1;
    }
    return 1;
}
