/* The families. Adding one: a row here, and names.c where its tensors are called otherwise. */
#include <stdio.h>
#include <string.h>

#include "core/model/config.h"

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
      .sliding_window = 4096 },
    { .name = "Qwen3ForCausalLM",
      .model_type = "qwen3",
      .gguf = "qwen3",
      .qk_norm = true,
      .window = USLI_WINDOW_ABOVE,
      .sliding_window = 4096,
      .head_dim = 128 },
};

const usli_arch *usli_arch_by_name(const char *name) {
    for (size_t i = 0; i < sizeof ARCHS / sizeof *ARCHS; i++)
        if (strcmp(ARCHS[i].name, name) == 0 || strcmp(ARCHS[i].model_type, name) == 0) return &ARCHS[i];
    return NULL;
}

const usli_arch *usli_arch_by_gguf(const char *name, size_t len) {
    for (size_t i = 0; i < sizeof ARCHS / sizeof *ARCHS; i++)
        if (strlen(ARCHS[i].gguf) == len && memcmp(ARCHS[i].gguf, name, len) == 0) return &ARCHS[i];
    return NULL;
}

void usli_arch_list(char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (size_t i = 0; i < sizeof ARCHS / sizeof *ARCHS && used < size; i++) {
        int n = snprintf(buf + used, size - used, "%s%s", i ? ", " : "", ARCHS[i].name);
        used += n > 0 ? (size_t)n : 0;
    }
}
