--- A tiny model of random weights of each family, as a folder and as GGUF files, and an adapter for it in both layouts.
---
---     unsloth-lua tests/interop/families.lua OUT_DIR METHOD,METHOD,...|none [FAMILY ...]
---
--- Leaves OUT_DIR/FAMILY/model, OUT_DIR/FAMILY/*.gguf, OUT_DIR/FAMILY/adapter and OUT_DIR/FAMILY/adapter.gguf.
local core = require "unsloth.core"
local unsloth = require "unsloth"

local root = debug.getinfo(1, "S").source:match "^@(.*)tests/interop/families%.lua$"
local out, methods, only = arg[1], {}, {}
for method in arg[2]:gmatch "[^,]+" do methods[#methods + 1] = method ~= "none" and method or nil end
for i = 3, #arg do only[arg[i]] = true end

-- What differs from a plain decoder of two layers.
local FAMILIES = {
  llama = { architectures = { "LlamaForCausalLM" }, model_type = "llama" },
  mistral = { architectures = { "MistralForCausalLM" }, model_type = "mistral", num_key_value_heads = 1 },
  qwen2 = { architectures = { "Qwen2ForCausalLM" }, model_type = "qwen2", rope_theta = 1000000.0 },
  qwen3 = { architectures = { "Qwen3ForCausalLM" }, model_type = "qwen3", head_dim = 64 },
  gemma = { architectures = { "GemmaForCausalLM" }, model_type = "gemma", hidden_act = "gelu_pytorch_tanh",
    hidden_activation = "gelu_pytorch_tanh", tie_word_embeddings = true },
  gemma2 = { architectures = { "Gemma2ForCausalLM" }, model_type = "gemma2", hidden_activation = "gelu_pytorch_tanh", tie_word_embeddings = true,
    sliding_window = 6, query_pre_attn_scalar = 64, num_hidden_layers = 4 },
  gemma3 = { architectures = { "Gemma3ForCausalLM" }, model_type = "gemma3_text", hidden_activation = "gelu_pytorch_tanh",
    tie_word_embeddings = true, sliding_window = 6, sliding_window_pattern = 3, query_pre_attn_scalar = 64, num_hidden_layers = 4,
    rope_theta = 1000000.0, rope_local_base_freq = 10000.0 },
  -- Not "phi3", a name by which llama.cpp knows the tokenizer.
  fused = { architectures = { "Phi3ForCausalLM" }, model_type = "phi3", pad_token_id = 0 },
}

local function config(family)
  local c = { hidden_act = "silu", vocab_size = 1024, hidden_size = 256, intermediate_size = 256, num_hidden_layers = 2, num_attention_heads = 4,
    num_key_value_heads = 2, head_dim = 64, max_position_embeddings = 256, rms_norm_eps = 1e-6, rope_theta = 10000.0,
    tie_word_embeddings = false, initializer_range = 0.06, bos_token_id = 1022, eos_token_id = 1023 }
  for name, value in pairs(FAMILIES[family]) do c[name] = value end
  return c
end

-- Norms and biases are made to matter.
local function shake(model)
  local seed = 1
  local function random()
    seed = (seed * 1103515245 + 12345) % 2147483648
    return seed / 2147483648 - 0.5
  end
  for _, name in ipairs((model:params())) do
    if name:find "norm" or name:find "%.bias$" then
      local value = model:get_param(name)
      local numbers = value:totable()
      for i, x in ipairs(numbers) do numbers[i] = x + 0.4 * random() end
      model:set_param(name, unsloth.tensor(numbers))
    end
  end
end

local tokenizer = unsloth.AutoTokenizer.from_pretrained(root .. "examples/tiny-llama")
for family in pairs(FAMILIES) do
  if not next(only) or only[family] then
    local dir = out .. "/" .. family
    core.make_dir(dir)
    do
      local model <close> = unsloth.FastLanguageModel.from_config(config(family), { random_state = 5, dtype = "float32", device = "cpu" })
      shake(model)
      model:save_pretrained_merged(dir .. "/model", tokenizer, "merged_32bit")
    end
    local model <close> = unsloth.FastLanguageModel.from_pretrained { model_name = dir .. "/model", dtype = "float32", load_in_4bit = false, device = "cpu" }
    if #methods > 0 then model:save_pretrained_gguf(dir, tokenizer, { quantization_method = methods }) end
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, lora_alpha = 2, use_rslora = true, init_lora_weights = false, random_state = 1 })
    model:save_pretrained(dir .. "/adapter")
    model:save_pretrained_gguf(dir, tokenizer, { save_method = "lora" })
  end
end
