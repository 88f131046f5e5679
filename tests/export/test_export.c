/* Exports: the mix of types, what the look at a file finds, and that nothing half-written is left. */
#include "tests/test.h"

#include <dirent.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/export/export.h"

static const char MODEL[] = "examples/tiny-llama";

typedef struct rig {
    usl_ctx *ctx;
    usl_model *m;
    usl_tokenizer *tok;
    char dir[64];
    uint64_t calls, stop_at; /* of progress; 0: never */
} rig;

static int on_progress(void *ud, const char *what, uint64_t done, uint64_t total) {
    rig *r = ud;
    (void)what;
    CHECK(done <= total, "progress goes past its end");
    return r->stop_at && ++r->calls >= r->stop_at;
}

#define OK(r, expr) CHECK((expr) == USL_OK, "%s: %s", #expr, usl_ctx_errmsg((r)->ctx))

static void open_rig(rig *r) {
    memset(r, 0, sizeof *r);
    snprintf(r->dir, sizeof r->dir, "/tmp/usl_test_export_XXXXXX");
    CHECK(mkdtemp(r->dir) != NULL, "no folder for tests");
    usl_ctx_opts ctx_opts = USL_CTX_OPTS_INIT;
    ctx_opts.progress_fn = on_progress;
    ctx_opts.progress_ud = r;
    CHECK(usl_ctx_new(&ctx_opts, &r->ctx) == USL_OK, "no context");
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    opts.device = "cpu";
    opts.dtype = USL_F32;
    OK(r, usl_model_open(r->ctx, MODEL, &opts, &r->m));
    OK(r, usl_tokenizer_open(r->ctx, MODEL, &r->tok));
}

static void close_rig(rig *r) {
    usl_path_remove(r->ctx, r->dir);
    usl_tokenizer_free(r->tok);
    usl_model_free(r->m);
    usl_ctx_free(r->ctx);
}

static void add_adapter(rig *r) {
    usl_lora_opts o = USL_LORA_OPTS_INIT;
    o.init = "random";
    o.rank = 4;
    o.alpha = 4;
    OK(r, usl_model_add_lora(r->m, &o));
}

static int entries(const char *path) {
    DIR *d = opendir(path);
    int n = 0;
    if (!d) return 0;
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void in_dir(const rig *r, const char *name, char path[128]) {
    snprintf(path, 128, "%s/%s", r->dir, name);
}

/* ---- The mix, as llama.cpp's quantiser makes it -------------------------------------------------------------------
 */

static void test_mix(void) {
    static const usli_mix_model SMALL = { .layers = 32, .heads = 32, .kv_heads = 32 },
                                SHARED = { .layers = 32, .heads = 32, .kv_heads = 8 },
                                TIED = { .layers = 16, .heads = 32, .kv_heads = 8, .tied = true },
                                LARGE = { .layers = 80, .heads = 64, .kv_heads = 8 },
                                EXPERTS = { .layers = 32, .heads = 32, .kv_heads = 8, .experts = 8 },
                                GUIDED = { .layers = 32, .heads = 32, .kv_heads = 8, .importance = true };
    static const struct {
        const char *method;
        const usli_mix_model *model;
        const char *tensor;
        int64_t layer, cols;
        usl_dtype type;
    } CASES[] = {
        { "q4_k_m", &SMALL, "blk.3.attn_v.weight", 3, 4096, USL_Q6_K },
        { "q4_k_m", &SMALL, "blk.4.attn_v.weight", 4, 4096, USL_Q4_K },
        { "q4_k_m", &SMALL, "blk.6.ffn_down.weight", 6, 4096, USL_Q6_K },
        { "q4_k_m", &SMALL, "blk.28.ffn_down.weight", 28, 4096, USL_Q6_K },
        { "Q4_K", &SMALL, "blk.5.attn_q.weight", 5, 4096, USL_Q4_K },
        { "q4_k_m", &SMALL, "output.weight", 0, 4096, USL_Q6_K },
        { "q4_k_m", &SMALL, "token_embd.weight", 0, 4096, USL_Q4_K },
        { "q4_k_m", &TIED, "token_embd.weight", 0, 2048, USL_Q6_K },
        { "q4_k_m", &SMALL, "output_norm.weight", 0, 0, USL_F32 },
        { "q4_k_s", &SMALL, "blk.3.attn_v.weight", 3, 4096, USL_Q5_K },
        { "q4_k_s", &SMALL, "blk.4.ffn_down.weight", 4, 4096, USL_Q4_K },
        { "q5_k_m", &SMALL, "blk.0.ffn_down.weight", 0, 4096, USL_Q6_K },
        { "q5_k", &SMALL, "blk.5.ffn_down.weight", 5, 4096, USL_Q5_K },
        { "q5_k_s", &SMALL, "blk.0.ffn_down.weight", 0, 4096, USL_Q5_K },
        { "q3_k_m", &SMALL, "blk.1.attn_v.weight", 1, 4096, USL_Q5_K },
        { "q3_k_m", &SMALL, "blk.2.attn_v.weight", 2, 4096, USL_Q4_K },
        { "q3_k_m", &SMALL, "blk.1.ffn_down.weight", 1, 4096, USL_Q5_K },
        { "q3_k_m", &SMALL, "blk.2.ffn_down.weight", 2, 4096, USL_Q4_K },
        { "q3_k_m", &SMALL, "blk.2.attn_output.weight", 2, 4096, USL_Q4_K },
        { "q3_k_l", &SMALL, "blk.9.ffn_down.weight", 9, 4096, USL_Q5_K },
        { "q3_k_s", &SMALL, "blk.9.ffn_down.weight", 9, 4096, USL_Q3_K },
        { "q2_k", &SMALL, "blk.9.attn_v.weight", 9, 4096, USL_Q3_K },
        { "q2_k", &SHARED, "blk.9.attn_v.weight", 9, 4096, USL_Q4_K },
        { "q2_k_l", &SHARED, "token_embd.weight", 0, 4096, USL_Q8_0 },
        { "q2_k_l", &SHARED, "blk.9.attn_output.weight", 9, 4096, USL_Q3_K },
        { "iq4_xs", &SHARED, "blk.9.attn_v.weight", 9, 4096, USL_Q5_K },
        { "iq4_xs", &SMALL, "blk.3.ffn_down.weight", 3, 4096, USL_Q5_K },
        { "iq4_xs", &GUIDED, "blk.3.ffn_down.weight", 3, 4096, USL_IQ4_XS },
        { "q4_0", &GUIDED, "blk.3.ffn_down.weight", 3, 4096, USL_Q4_1 },
        { "q4_k_m", &LARGE, "blk.20.attn_v.weight", 20, 8192, USL_Q5_K },
        { "q4_k_m", &EXPERTS, "blk.20.attn_k.weight", 20, 4096, USL_Q8_0 },
        { "q4_k_m", &EXPERTS, "blk.20.attn_output.weight", 20, 4096, USL_Q5_K },
        { "q4_k_m", &EXPERTS, "blk.20.ffn_gate_inp.weight", 20, 4096, USL_F32 },
        { "iq2_xs", &GUIDED, "blk.9.attn_v.weight", 9, 4096, USL_Q4_K },
        { "iq2_xs", &LARGE, "blk.20.attn_v.weight", 20, 8192, USL_Q4_K },
        { "iq2_m", &SMALL, "blk.3.ffn_down.weight", 3, 4096, USL_IQ3_S },
        { "iq1_s", &SMALL, "blk.4.attn_output.weight", 4, 4096, USL_IQ2_XXS },
        { "iq2_s", &SMALL, "output.weight", 0, 4096, USL_Q5_K },
        { "iq2_s", &TIED, "token_embd.weight", 0, 2048, USL_Q5_K },
        { "iq2_xxs", &SMALL, "token_embd.weight", 0, 4096, USL_Q2_K },
        { "q3_k_xs", &SMALL, "blk.4.ffn_up.weight", 4, 4096, USL_IQ3_XXS },
        { "iq3_xs", &SMALL, "blk.3.ffn_up.weight", 3, 4096, USL_IQ3_S },
        { "iq3_xxs", &SMALL, "blk.4.attn_k.weight", 4, 4096, USL_IQ2_S },
        { "iq3_m", &EXPERTS, "blk.30.ffn_down_exps.weight", 30, 4096, USL_Q4_K },
        { "iq1_m", &EXPERTS, "blk.20.attn_k.weight", 20, 4096, USL_Q4_K },
        { "iq2_xs", &SMALL, "blk.4.ffn_up.weight", 4, 576, USL_IQ4_NL },
        { "quantized", &SMALL, "blk.4.ffn_up.weight", 4, 576, USL_Q5_0 },
        { "q2_k", &SMALL, "blk.4.ffn_up.weight", 4, 576, USL_Q4_0 },
        { "q5_k_m", &SMALL, "blk.4.ffn_up.weight", 4, 576, USL_Q5_1 },
        { "iq4_xs", &SMALL, "blk.4.ffn_up.weight", 4, 576, USL_IQ4_NL },
        { "q6_k", &SMALL, "output.weight", 0, 576, USL_Q8_0 },
        { "q4_k_m", &SMALL, "blk.4.ffn_up.weight", 4, 100, USL_F16 },
        { "fast_quantized", &SMALL, "blk.4.ffn_up.weight", 4, 100, USL_F16 },
        { "not_quantized", &SMALL, "blk.4.ffn_up.weight", 4, 100, USL_BF16 },
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        const usli_method *method = usli_method_find(CASES[i].method);
        CHECK(method != NULL, "%s is not known", CASES[i].method);
        if (!method) continue;
        usl_dtype got = usli_mix_type(method, CASES[i].model, CASES[i].tensor, CASES[i].layer, CASES[i].cols);
        CHECK(got == CASES[i].type, "%s, %s: %s, not %s", CASES[i].method, CASES[i].tensor, usl_dtype_name(got),
              usl_dtype_name(CASES[i].type));
    }
    CHECK(usli_method_find("q9_z") == NULL && usl_export_method("Q5_K") &&
              strcmp(usl_export_method("Q5_K"), "q5_k_m") == 0,
          "names of methods");
}

/* ---- The look -----------------------------------------------------------------------------------------------------
 */

/* Every matrix of models of many shapes in every file type, against what llama.cpp's own rules say
 * (mix_reference.txt, by make_mix_reference.py). */
static void test_mixes(void) {
    static const char *const TENSORS[] = { "token_embd",  "output",   "attn_q", "attn_k",  "attn_v",
                                           "attn_output", "ffn_gate", "ffn_up", "ffn_down" };
    FILE *f = fopen("tests/export/mix_reference.txt", "r");
    if (!f) {
        SKIP("tests/export/mix_reference.txt: run from the root of the repository");
        return;
    }
    int type, layers, heads, kv, experts, tied, importance, cols, files = 0, matrices = 0;
    char types[96], name[64], blocks[8];
    while (fscanf(f, "%d %d %d %d %d %d %d %d", &type, &layers, &heads, &kv, &experts, &tied, &importance, &cols) ==
           8) {
        const usli_mix_model model = { layers, heads, kv, experts, tied, importance };
        const usli_method *method = NULL;
        char list[1024];
        usli_method_list(list, sizeof list);
        for (char *word = strtok(list, ", "); word; word = strtok(NULL, ", ")) {
            const usli_method *m = usli_method_find(word);
            if (m->file_type == (uint32_t)type && strcmp(m->name, "q2_k_l") != 0) method = m;
        }
        CHECK(method != NULL, "file type %d has no name", type);
        snprintf(blocks, sizeof blocks, "%s", experts ? "_exps" : "");
        bool wants = false;
        for (int k = 0; k < 9; k++) {
            bool read = fscanf(f, "%95s", types) == 1;
            CHECK(read, "the line of file type %d is cut off", type);
            for (int layer = 0; read && method && types[0] != '-' && types[layer]; layer++, matrices++) {
                if (k < 2)
                    snprintf(name, sizeof name, "%s.weight", TENSORS[k]);
                else
                    snprintf(name, sizeof name, "blk.%d.%s%s.weight", layer, TENSORS[k], k > 5 ? blocks : "");
                usl_dtype got = usli_mix_type(method, &model, name, layer, cols);
                wants |= usli_mix_wants_importance(method, name, got);
                CHECK((int)got == types[layer] - '0', "%s, %d layers, %d over %d heads, %d experts, %s: %s, not %d",
                      method->name, layers, heads, kv, experts, name, usl_dtype_name(got), types[layer] - '0');
            }
        }
        CHECK(!wants || importance, "%s: llama.cpp makes it without an importance matrix", method ? method->name : "?");
        files++;
    }
    printf("%d mixes of types, %d matrices as llama.cpp's\n", files, matrices);
    CHECK(feof(f) && files > 400, "only %d lines were read", files);
    fclose(f);
}

static void test_reports(rig *r) {
    char paths[3][128];
    in_dir(r, "a.gguf", paths[0]);
    in_dir(r, "b.gguf", paths[1]);
    in_dir(r, "c.gguf", paths[2]);
    const char *names[] = { paths[0], paths[1], paths[2] }, *methods[] = { "f32", "q8_0", "q2_k" };
    usl_export_report reports[3] = { { .size = sizeof *reports },
                                     { .size = sizeof *reports },
                                     { .size = sizeof *reports } };
    OK(r, usl_export_ggufs(r->m, r->tok, 3, names, methods, NULL, reports));
    for (int i = 0; i < 3; i++) {
        printf("%s: weights differ by %.2g, logits by %.2g of %.2g\n", methods[i], reports[i].weights,
               reports[i].logits, reports[i].expected);
        CHECK(reports[i].checked && reports[i].logits <= reports[i].expected, "%s is not checked", methods[i]);
    }
    CHECK(reports[0].logits < 1e-5 && reports[1].weights < 1e-2 && reports[2].weights > 5e-2, "figures of the reports");
    CHECK(entries(r->dir) == 3, "%d files, not 3", entries(r->dir));
}

/* What was written without the adapter is not what the model is with it, in whatever format: the look says so. */
static void test_wrong_file(rig *r) {
    static const char *const METHODS[] = { "f32", "q4_k_m", "q2_k" };
    char path[128];
    usli_export_source source;
    in_dir(r, "wrong.gguf", path);
    add_adapter(r);
    for (int i = 0; i < 3; i++) {
        OK(r, usl_model_set_adapter(r->m, NULL));
        OK(r, usl_export_gguf(r->m, r->tok, path, METHODS[i]));
        OK(r, usl_model_set_adapter(r->m, "default"));
        usl_export_report report = { .size = sizeof report };
        OK(r, usli_export_source_of(r->m, NULL, &source));
        usl_status st = usli_export_check(&source, r->tok, path, path, USL_F32, &report);
        CHECK(st == USL_ERR_NUMERIC && strstr(usl_ctx_errmsg(r->ctx), "wrong.gguf"), "%s without its adapter: %s",
              METHODS[i], usl_ctx_errmsg(r->ctx));
        OK(r, usl_export_gguf(r->m, r->tok, path, METHODS[i]));
        OK(r, usli_export_check(&source, r->tok, path, path, USL_F32, &report));
    }
}

/* Stopped at any moment, an export leaves what was there before. */
static void test_interrupted(rig *r) {
    char file[128], folder[128];
    in_dir(r, "stopped.gguf", file);
    in_dir(r, "stopped", folder);
    int before = entries(r->dir), stopped = 0;
    for (r->stop_at = 1; r->stop_at < 400; r->stop_at += 1 + r->stop_at / 4) {
        r->calls = 0;
        usl_status st = usl_export_gguf(r->m, r->tok, file, "q4_0");
        stopped += st == USL_ERR_CANCELLED;
        if (st == USL_OK) unlink(file);
        CHECK(entries(r->dir) == before, "stopped at %d: %d files, not %d", (int)r->stop_at, entries(r->dir), before);
        r->calls = 0;
        st = usl_export_merged(r->m, r->tok, folder, USL_BF16);
        stopped += st == USL_ERR_CANCELLED;
        if (st == USL_OK) usl_path_remove(r->ctx, folder);
        CHECK(entries(r->dir) == before, "stopped at %d: a folder is left", (int)r->stop_at);
    }
    r->stop_at = 0;
    CHECK(stopped > 20, "only %d exports were stopped", stopped);
}

/* A model in 4 bits with its adapter, merged onto the 16-bit weights, is the 16-bit model with that adapter. */
static void test_base(rig *r) {
    char merged[128], adapter[128];
    in_dir(r, "merged", merged);
    in_dir(r, "adapter", adapter);
    usl_model *four = NULL, *read = NULL;
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    usl_export_opts export_opts = USL_EXPORT_OPTS_INIT;
    usl_export_report report = { .size = sizeof report };
    opts.device = "cpu";
    opts.dtype = USL_F32;
    OK(r, usl_model_save_adapter(r->m, adapter, NULL));
    opts.load_in_4bit = 1;
    OK(r, usl_model_open(r->ctx, MODEL, &opts, &four));
    OK(r, usl_model_load_adapter(four, adapter, NULL));
    OK(r, usl_export_folder(four, r->tok, merged, USL_F32, NULL, &report));
    CHECK(report.weights < 1e-6, "merged onto its own weights they differ by %g", report.weights);
    export_opts.base = r->m;
    OK(r, usl_export_folder(four, r->tok, merged, USL_F32, &export_opts, &report));
    CHECK(report.weights > 1e-2 && report.weights < 0.2, "merged onto the 16-bit weights they differ by %g",
          report.weights);
    opts.load_in_4bit = 0;
    OK(r, usl_model_open(r->ctx, merged, &opts, &read));
    static const int32_t IDS[] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    usl_tensor *a = NULL, *b = NULL;
    OK(r, usl_model_logits(r->m, IDS, 8, &a));
    OK(r, usl_model_logits(read, IDS, 8, &b));
    double error = test_rel_error(usl_tensor_data(b), usl_tensor_data(a), usl_tensor_elements(a));
    CHECK(error < 1e-5, "logits differ by %g", error);
    usl_tensor_free(a);
    usl_tensor_free(b);
    usl_model_free(read);
    usl_model_free(four);
}

/* Quantised with an importance matrix, the logits of its own text are nearer to the model's. */
static void test_importance(rig *r) {
    static const char TEXT[] =
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
        "First Citizen:\nYou are all resolved rather to die than to famish?\n\nAll:\nResolved.";
    char path[128];
    usl_imatrix *im = NULL;
    usl_export_opts opts = USL_EXPORT_OPTS_INIT;
    int32_t *ids = NULL;
    size_t count = 0;
    double error[2] = { 0, 0 };
    in_dir(r, "importance.gguf", path);
    OK(r, usl_imatrix_new(r->m, r->tok, TEXT, sizeof TEXT - 1, &im));
    OK(r, usl_tokenizer_encode(r->ctx, r->tok, TEXT, sizeof TEXT - 1, 1, &ids, &count));
    usl_tensor *a = NULL;
    OK(r, usl_model_logits(r->m, ids, count, &a));
    for (int guided = 0; guided < 2; guided++) {
        const char *paths[] = { path }, *methods[] = { "q3_k_s" };
        opts.imatrix = guided ? im : NULL;
        OK(r, usl_export_ggufs(r->m, r->tok, 1, paths, methods, &opts, NULL));
        usl_model_opts model_opts = USL_MODEL_OPTS_INIT;
        usl_model *read = NULL;
        usl_tensor *b = NULL;
        model_opts.device = "cpu";
        model_opts.dtype = USL_F32;
        OK(r, usl_model_open(r->ctx, path, &model_opts, &read));
        OK(r, usl_model_logits(read, ids, count, &b));
        error[guided] = test_rel_error(usl_tensor_data(b), usl_tensor_data(a), usl_tensor_elements(a));
        usl_tensor_free(b);
        usl_model_free(read);
    }
    printf("q3_k_s: logits differ by %.3g, with an importance matrix by %.3g\n", error[0], error[1]);
    CHECK(error[1] < error[0], "the importance matrix does not help");
    usl_tensor_free(a);
    usl_free(r->ctx, ids);
    usl_imatrix_free(im);
}

/* Activations of any size make importances that quantisers can work with; those that overflow are refused. */
static void test_large_importances(rig *r) {
    static const char CONFIG[] =
        "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":256,\"intermediate_size\":256,"
        "\"num_hidden_layers\":1,\"num_attention_heads\":4,\"num_key_value_heads\":4,"
        "\"vocab_size\":80,\"max_position_embeddings\":64}";
    static const int32_t IDS[] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    usl_model *m = NULL;
    opts.device = "cpu";
    opts.dtype = USL_F32;
    OK(r, usl_model_random(r->ctx, CONFIG, 1, &opts, &m));
    float *norm = (float *)(uintptr_t)usli_model_weight(m, USLI_ATTN_NORM, 0)->m.data;
    static float once[256];
    for (int power = 0; power <= 100; power += 50) { /* 2^100 is more than a float's root */
        usli_imatrix *im = NULL;
        for (int i = 0; i < 256; i++) norm[i] = ldexpf(1, power);
        if (power == 100) {
            CHECK(usli_imatrix_new(m, IDS, 8, 8, &im) == USL_ERR_INVALID && strstr(usl_ctx_errmsg(r->ctx), "finite"),
                  "importances that are infinite: %s", usl_ctx_errmsg(r->ctx));
            break;
        }
        OK(r, usli_imatrix_new(m, IDS, 8, 8, &im));
        const float *f = usli_imatrix_of(im, USLI_Q, 0);
        float most = 0;
        for (int i = 0; i < 256; i++) most = fmaxf(most, f[i]);
        CHECK(most >= 0.5f && most <= 1.0f, "the largest importance is %g", (double)most);
        CHECK(!power || memcmp(once, f, sizeof once) == 0, "importances change with the size of the activations");
        memcpy(once, f, sizeof once);
        usli_imatrix_free(im);
    }
    usl_model_free(m);
}

static void test_refusals(rig *r) {
    char path[128];
    in_dir(r, "never.gguf", path);
    CHECK(usl_export_gguf(r->m, r->tok, path, "q9_z") == USL_ERR_UNSUPPORTED &&
              strstr(usl_ctx_errmsg(r->ctx), "iq4_xs"),
          "a method that is none: %s", usl_ctx_errmsg(r->ctx));
    for (int i = 0; i < 2; i++) {
        const char *blind = i ? "q2_k_s" : "iq2_xs";
        CHECK(usl_export_gguf(r->m, r->tok, path, blind) == USL_ERR_INVALID &&
                  strstr(usl_ctx_errmsg(r->ctx), "importance matrix"),
              "%s without an importance matrix: %s", blind, usl_ctx_errmsg(r->ctx));
    }
    CHECK(usl_export_gguf(r->m, NULL, path, "q8_0") == USL_ERR_INVALID, "no tokenizer: %s", usl_ctx_errmsg(r->ctx));
    CHECK(usl_export_folder(r->m, r->tok, path, USL_Q8_0, NULL, NULL) == USL_ERR_INVALID, "a folder of q8_0");
    CHECK(usli_export_check_disk(r->ctx, r->dir, UINT64_MAX) == USL_ERR_IO &&
              strstr(usl_ctx_errmsg(r->ctx), "free some"),
          "a disk that is too small: %s", usl_ctx_errmsg(r->ctx));
    usl_model *other = NULL;
    static const char CONFIG[] =
        "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64,\"intermediate_size\":96,"
        "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
        "\"vocab_size\":80,\"max_position_embeddings\":64}";
    OK(r, usl_model_random(r->ctx, CONFIG, 1, NULL, &other));
    usl_export_opts opts = USL_EXPORT_OPTS_INIT;
    opts.base = other;
    CHECK(usl_export_folder(r->m, r->tok, path, USL_F32, &opts, NULL) == USL_ERR_SHAPE, "a base of another shape");
    usl_model_free(other);
    CHECK(!usli_is_file(path) && !usli_is_dir(path), "something was written all the same");
}

/* ---- Without memory ----
 */

static int allocations, refused; /* refused: the how many-th; 0: none */

static void *refusing_realloc(void *ud, void *ptr, size_t size) {
    (void)ud;
    if (!size) {
        free(ptr);
        return NULL;
    }
    return ++allocations == refused ? NULL : realloc(ptr, size);
}

static size_t files_in(usl_ctx *ctx, const char *dir) {
    char **names;
    size_t count = 0;
    refused = 0;
    CHECK_OK(ctx, usli_list_dir(ctx, dir, &names, &count));
    usli_free_names(ctx, names, count);
    return count;
}

/* An export over an older one that runs out of memory at its end takes no file of the older one with it. */
static void test_no_memory(void) {
    enum { LAST = 48 };
    usl_ctx_opts ctx_opts = USL_CTX_OPTS_INIT;
    usl_export_opts how = USL_EXPORT_OPTS_INIT;
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    usl_ctx *ctx;
    usl_model *m;
    char dir[] = "/tmp/usl_test_memory_XXXXXX";
    CHECK(mkdtemp(dir) != NULL, "no folder");
    ctx_opts.threads = 1;
    ctx_opts.realloc_fn = refusing_realloc;
    CHECK(usl_ctx_new(&ctx_opts, &ctx) == USL_OK, "no context");
    opts.device = "cpu";
    how.verify = 0;
    CHECK_OK(ctx, usl_model_open(ctx, "examples/tiny-llama", &opts, &m));
    CHECK_OK(ctx, usl_export_folder(m, NULL, dir, USL_BF16, &how, NULL));
    allocations = 0;
    CHECK_OK(ctx, usl_export_folder(m, NULL, dir, USL_BF16, &how, NULL));
    int all = allocations;
    size_t files = files_in(ctx, dir);
    for (int k = all > LAST ? all - LAST : 1; k <= all; k++) {
        allocations = 0;
        refused = k;
        usl_status st = usl_export_folder(m, NULL, dir, USL_BF16, &how, NULL);
        CHECK(st == USL_OK || st == USL_ERR_NOMEM, "allocation %d of %d: %d", k, all, (int)st);
        CHECK(files_in(ctx, dir) == files, "allocation %d of %d: %zu files are left of %zu", k, all, files_in(ctx, dir),
              files);
    }
    usl_path_remove(ctx, dir);
    usl_model_free(m);
    usl_ctx_free(ctx);
}

int main(void) {
    rig r;
    test_mix();
    test_mixes();
    open_rig(&r);
    test_reports(&r);
    test_importance(&r);
    test_large_importances(&r);
    test_refusals(&r);
    test_wrong_file(&r);
    test_base(&r);
    test_interrupted(&r);
    close_rig(&r);
    test_no_memory();
    return test_end("export");
}
