--- Makes small mixtures of random weights and saves each as a folder and as GGUF files.
---
---     unsloth-lua tests/interop/experts.lua OUT_DIR [SEED]
---
--- Leaves OUT_DIR/FAMILY/merged (float32), OUT_DIR/FAMILY/METHOD.gguf and an adapter on every product that llama.cpp adapts, as
--- OUT_DIR/FAMILY/adapter and lora.gguf.
local core = require "unsloth.core"
local unsloth = require "unsloth"

local tokenizer = core.tokenizer_open "examples/tiny-llama"
local base = { vocab_size = 1024, hidden_size = 64, intermediate_size = 96, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 4,
  max_position_embeddings = 256, rms_norm_eps = 1e-6, initializer_range = 0.1, bos_token_id = 1, eos_token_id = 2 }
local latent = { q_lora_rank = 32, kv_lora_rank = 64, qk_nope_head_dim = 32, qk_rope_head_dim = 16,
  v_head_dim = 32, moe_intermediate_size = 32, first_k_dense_replace = 1 }
local families = {
  mixtral = { { num_key_value_heads = 2, num_local_experts = 4, num_experts_per_tok = 2 } },
  qwen2_moe = { { num_experts = 4, num_experts_per_tok = 2, moe_intermediate_size = 32, shared_expert_intermediate_size = 64 } },
  qwen3_moe = { { num_experts = 8, num_experts_per_tok = 3, moe_intermediate_size = 32, norm_topk_prob = true, head_dim = 32,
    num_key_value_heads = 2 } },
  deepseek_v2 = { latent, { n_routed_experts = 4, num_experts_per_tok = 2, n_shared_experts = 2, topk_method = "greedy",
    routed_scaling_factor = 1.5 } },
  -- Scores that yarn stretches, and nothing left for cos and sin.
  deepseek_v2_yarn = { latent, { model_type = "deepseek_v2", n_routed_experts = 4, num_experts_per_tok = 2, n_shared_experts = 1,
    topk_method = "greedy", max_position_embeddings = 128, rope_scaling = { rope_type = "yarn", factor = 4, original_max_position_embeddings = 32,
      mscale = 0.7, mscale_all_dim = 0.7 } } },
  deepseek_v3 = { latent, { n_routed_experts = 8, num_experts_per_tok = 3, n_shared_experts = 1, n_group = 4, topk_group = 2,
    routed_scaling_factor = 2.5, norm_topk_prob = true } },
}

for family, parts in pairs(families) do
  local config = { model_type = family }
  for _, part in ipairs { base, table.unpack(parts) } do
    for key, value in pairs(part) do config[key] = value end
  end
  -- A seed with which eight bits turn no router's decision.
  local model <close> = core.model_random(core.json.encode(config), tonumber(arg[2] or 1), { device = "cpu", dtype = "float32" })
  local out = arg[1] .. "/" .. family
  core.export_merged(model, tokenizer, out .. "/merged", "float32")
  local paths, methods = {}, { "f32", "q8_0", "q4_k_m" }
  for i, method in ipairs(methods) do paths[i] = ("%s/%s.gguf"):format(out, method) end
  core.export_gguf(model, tokenizer, paths, methods)
  local adapted <close> = unsloth.FastLanguageModel.from_pretrained { model_name = out .. "/merged", dtype = "float32", load_in_4bit = false, device = "cpu" }
  local function adapt(modules)
    unsloth.FastLanguageModel.get_peft_model(adapted, { r = 4, lora_alpha = 8, init_lora_weights = false, random_state = 1, target_modules = modules })
    return pcall(core.export_lora, adapted, out .. "/lora.gguf")
  end
  local whole = adapt "all-linear"
  assert(whole ~= (family:find "^deepseek" ~= nil), "llama.cpp adapts all products but those of latent attention")
  if not whole then assert(adapt { "o_proj", "gate_proj", "up_proj", "down_proj" }) end
  adapted:save_pretrained(out .. "/adapter")
end
