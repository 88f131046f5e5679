/* The families. Adding one: a row here, and names.c where its tensors are called otherwise. */
#include <stdio.h>
#include <string.h>

#include "core/model/config.h"

#define EXPERT_WORDS \
    { "gate_proj", "up_proj", "down_proj" }

static const usli_mixture MIXTRAL = { .folder = "block_sparse_moe",
                                      .words = { "w1", "w3", "w2" },
                                      .balanced = true,
                                      .always_normalised = true,
                                      .experts = 8,
                                      .top_k = 2 };

static const usli_mixture QWEN2_MOE = { .folder = "mlp",
                                        .words = EXPERT_WORDS,
                                        .balanced = true,
                                        .shared = "shared_expert",
                                        .shared_gate = true,
                                        .experts = 60,
                                        .top_k = 4,
                                        .inter = 1408,
                                        .shared_inter = 5632 };

static const usli_mixture QWEN3_MOE = { .folder = "mlp",
                                        .words = EXPERT_WORDS,
                                        .balanced = true,
                                        .gguf_normalised = true,
                                        .experts = 128,
                                        .top_k = 8,
                                        .inter = 768 };

static const usli_mixture DEEPSEEK2 = { .folder = "mlp",
                                        .words = EXPERT_WORDS,
                                        .shared = "shared_experts",
                                        .experts = 64,
                                        .top_k = 6,
                                        .inter = 1407,
                                        .shared_inter = 2 * 1407,
                                        .scale = 1 };

static const usli_mixture DEEPSEEK3 = { .folder = "mlp",
                                        .words = EXPERT_WORDS,
                                        .shared = "shared_experts",
                                        .sigmoid = true,
                                        .by_pairs = true,
                                        .biased = true,
                                        .normalised = true,
                                        .experts = 256,
                                        .top_k = 8,
                                        .inter = 2048,
                                        .shared_inter = 2048,
                                        .first_dense = 3,
                                        .groups = 8,
                                        .best_groups = 4,
                                        .scale = 2.5 };

static const usli_arch ARCHS[] = {
    { .name = "LlamaForCausalLM", .model_type = "llama", .gguf = "llama", .gguf_permuted = true },
    { .name = "MistralForCausalLM",
      .model_type = "mistral",
      .gguf = "llama",
      .gguf_permuted = true,
      .window = USLI_WINDOW_ALL },
    { .name = "Qwen2ForCausalLM",
      .model_type = "qwen2",
      .gguf = "qwen2",
      .qkv_bias = true,
      .window = USLI_WINDOW_ABOVE,
      .window_asked = true,
      .sliding_window = 4096 },
    { .name = "Qwen3ForCausalLM",
      .model_type = "qwen3",
      .gguf = "qwen3",
      .qk_norm = true,
      .window = USLI_WINDOW_ABOVE,
      .window_asked = true,
      .sliding_window = 4096,
      .head_dim = 128 },
    { .name = "MixtralForCausalLM",
      .model_type = "mixtral",
      .gguf = "llama",
      .gguf_permuted = true,
      .window = USLI_WINDOW_ALL,
      .mixture = &MIXTRAL,
      .kv_heads = 8,
      .context = 131072,
      .theta = 1e6 },
    { .name = "Qwen2MoeForCausalLM",
      .model_type = "qwen2_moe",
      .gguf = "qwen2moe",
      .qkv_bias = true,
      .window = USLI_WINDOW_OTHER,
      .window_asked = true,
      .sliding_window = 4096,
      .mixture = &QWEN2_MOE,
      .kv_heads = 16,
      .context = 32768 },
    { .name = "Qwen3MoeForCausalLM",
      .model_type = "qwen3_moe",
      .gguf = "qwen3moe",
      .qk_norm = true,
      .window = USLI_WINDOW_ALL,
      .window_asked = true,
      .sliding_window = 4096,
      .mixture = &QWEN3_MOE,
      .kv_heads = 4,
      .context = 32768 },
    { .name = "DeepseekV2ForCausalLM",
      .model_type = "deepseek_v2",
      .gguf = "deepseek2",
      .mixture = &DEEPSEEK2,
      .latent = true,
      .q_lora = 1536,
      .kv_lora = 512,
      .nope_dim = 128,
      .rope_dim = 64,
      .v_dim = 128 },
    { .name = "DeepseekV3ForCausalLM",
      .model_type = "deepseek_v3",
      .gguf = "deepseek2",
      .mixture = &DEEPSEEK3,
      .latent = true,
      .q_lora = 1536,
      .kv_lora = 512,
      .nope_dim = 128,
      .rope_dim = 64,
      .v_dim = 128,
      .context = 4096 },
    { .name = "GemmaForCausalLM",
      .model_type = "gemma",
      .gguf = "gemma",
      .act = USLI_GELU_TANH,
      .gelu_is_tanh = true,
      .norm_offset = 1,
      .scaled_embedding = true,
      .wide_stream = true,
      .tied = true,
      .vocab = 256000,
      .head_dim = 256,
      .context = 8192 },
    { .name = "Gemma2ForCausalLM",
      .model_type = "gemma2",
      .gguf = "gemma2",
      .act = USLI_GELU_TANH,
      .norm_offset = 1,
      .post_norms = true,
      .scaled_embedding = true,
      .wide_stream = true,
      .gguf_wide_layers = 46,
      .window = USLI_WINDOW_PATTERN,
      .tied = true,
      .vocab = 256000,
      .heads = 8,
      .kv_heads = 4,
      .head_dim = 256,
      .context = 8192,
      .sliding_window = 4096,
      .window_pattern = 2,
      .query_scalar = 256,
      .attention_softcap = 50,
      .logit_softcap = 30 },
    { .name = "Gemma3ForCausalLM",
      .model_type = "gemma3_text",
      .wrapper = "Gemma3ForConditionalGeneration",
      .gguf = "gemma3",
      .act = USLI_GELU_TANH,
      .norm_offset = 1,
      .post_norms = true,
      .qk_norm = true,
      .scaled_embedding = true,
      .local_rope = true,
      .wide_stream = true,
      .gguf_wide_layers = 62,
      .window = USLI_WINDOW_PATTERN,
      .tied = true,
      .vocab = 262208,
      .heads = 8,
      .kv_heads = 4,
      .head_dim = 256,
      .context = 131072,
      .sliding_window = 4096,
      .window_pattern = 6,
      .theta = 1e6,
      .query_scalar = 256 },
    { .name = "Phi3ForCausalLM",
      .model_type = "phi3",
      .gguf = "phi3",
      .fused = true,
      .window = USLI_WINDOW_ALL,
      .vocab = 32064,
      .context = 4096,
      .original_context = 4096 },
};

const usli_arch *usli_arch_by_name(const char *name) {
    for (size_t i = 0; i < sizeof ARCHS / sizeof *ARCHS; i++)
        if (strcmp(ARCHS[i].name, name) == 0 || strcmp(ARCHS[i].model_type, name) == 0 ||
            (ARCHS[i].wrapper && strcmp(ARCHS[i].wrapper, name) == 0))
            return &ARCHS[i];
    return NULL;
}

const usli_arch *usli_arch_by_gguf(const char *name, size_t len, bool mixture, bool sigmoid) {
    for (size_t i = 0; i < sizeof ARCHS / sizeof *ARCHS; i++) {
        const usli_mixture *own = ARCHS[i].mixture;
        if (strlen(ARCHS[i].gguf) == len && memcmp(ARCHS[i].gguf, name, len) == 0 && mixture == (own != NULL) &&
            (!own || sigmoid == own->sigmoid))
            return &ARCHS[i];
    }
    return NULL;
}

static size_t common_start(const char *a, const char *b, size_t len) {
    size_t n = 0;
    while (n < len && b[n] && (a[n] | 0x20) == (b[n] | 0x20)) n++;
    return n;
}

usl_status usli_arch_refuse(usl_ctx *ctx, const char *file, const char *name, size_t len) {
    char known[512], near_one[96] = "";
    size_t used = 0, best = 2; /* two letters in common say nothing */
    known[0] = 0;
    for (size_t i = 0; i < sizeof ARCHS / sizeof *ARCHS && used < sizeof known; i++) {
        size_t n = common_start(name, ARCHS[i].name, len);
        if (n > best) {
            best = n;
            snprintf(near_one, sizeof near_one, "the nearest one that is: %s; ", ARCHS[i].name);
        }
        int wrote = snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", ARCHS[i].name);
        used += wrote > 0 ? (size_t)wrote : 0;
    }
    return usli_fail(ctx, USL_ERR_UNSUPPORTED, "%s: the architecture %.*s is not supported; %ssupported are %s", file,
                     (int)(len < 64 ? len : 64), name, near_one, known);
}
