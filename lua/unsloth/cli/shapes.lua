--- Published shapes, for bench and plan: random weights of the real sizes.
local function llama(t)
  return { architectures = { "LlamaForCausalLM" }, model_type = "llama", hidden_act = "silu", rms_norm_eps = 1e-5, vocab_size = t.vocab,
    hidden_size = t.hidden, intermediate_size = t.inter, num_hidden_layers = t.layers, num_attention_heads = t.heads,
    num_key_value_heads = t.kv_heads, head_dim = t.hidden // t.heads, max_position_embeddings = t.context,
    rope_theta = t.theta, tie_word_embeddings = t.tied or false }
end

-- Families that have more to say: their own config.json, in so many words.
local function shape(model_type, t)
  t.model_type, t.hidden_act = model_type, "silu"
  t.rms_norm_eps, t.tie_word_embeddings = t.rms_norm_eps or 1e-6, t.tie_word_embeddings or false
  return t
end

return {
  ["tiny"] = llama { vocab = 512, hidden = 64, inter = 172, layers = 5, heads = 8, kv_heads = 4, context = 512, theta = 10000.0, tied = true },
  ["smollm2-135m"] = llama { vocab = 49152, hidden = 576, inter = 1536, layers = 30, heads = 9, kv_heads = 3, context = 8192,
    theta = 100000.0, tied = true },
  ["tinyllama-1.1b"] = llama { vocab = 32000, hidden = 2048, inter = 5632, layers = 22, heads = 32, kv_heads = 4, context = 2048,
    theta = 10000.0 },
  ["llama3.2-1b"] = llama { vocab = 128256, hidden = 2048, inter = 8192, layers = 16, heads = 32, kv_heads = 8, context = 131072,
    theta = 500000.0, tied = true },
  ["llama3.2-3b"] = llama { vocab = 128256, hidden = 3072, inter = 8192, layers = 28, heads = 24, kv_heads = 8, context = 131072,
    theta = 500000.0, tied = true },
  ["llama2-7b"] = llama { vocab = 32000, hidden = 4096, inter = 11008, layers = 32, heads = 32, kv_heads = 32, context = 4096,
    theta = 10000.0 },
  ["mistral-7b"] = llama { vocab = 32768, hidden = 4096, inter = 14336, layers = 32, heads = 32, kv_heads = 8, context = 32768,
    theta = 1000000.0 }, -- v0.3: no window
  ["llama3-8b"] = llama { vocab = 128256, hidden = 4096, inter = 14336, layers = 32, heads = 32, kv_heads = 8, context = 8192,
    theta = 500000.0 },
  ["mixtral-8x7b"] = shape("mixtral", { vocab_size = 32000, hidden_size = 4096, intermediate_size = 14336, num_hidden_layers = 32,
    num_attention_heads = 32, num_key_value_heads = 8, max_position_embeddings = 32768, rope_theta = 1000000.0, rms_norm_eps = 1e-5,
    num_local_experts = 8, num_experts_per_tok = 2 }),
  ["qwen3-30b-a3b"] = shape("qwen3_moe", { vocab_size = 151936, hidden_size = 2048, intermediate_size = 6144, num_hidden_layers = 48,
    num_attention_heads = 32, num_key_value_heads = 4, head_dim = 128, max_position_embeddings = 40960, rope_theta = 1000000.0,
    num_experts = 128, num_experts_per_tok = 8, moe_intermediate_size = 768, norm_topk_prob = true }),
  ["deepseek-v2-lite"] = shape("deepseek_v2", { vocab_size = 102400, hidden_size = 2048, intermediate_size = 10944,
    num_hidden_layers = 27, num_attention_heads = 16, max_position_embeddings = 163840, rope_theta = 10000.0,
    rope_scaling = { type = "yarn", factor = 40, original_max_position_embeddings = 4096, beta_fast = 32, beta_slow = 1,
      mscale = 0.707, mscale_all_dim = 0.707 },
    q_lora_rank = 0, kv_lora_rank = 512, qk_nope_head_dim = 128, qk_rope_head_dim = 64, v_head_dim = 128,
    n_routed_experts = 64, n_shared_experts = 2, num_experts_per_tok = 6, moe_intermediate_size = 1408, first_k_dense_replace = 1,
    topk_method = "greedy", norm_topk_prob = false, routed_scaling_factor = 1.0 }),
  ["llama3-70b"] = llama { vocab = 128256, hidden = 8192, inter = 28672, layers = 80, heads = 64, kv_heads = 8, context = 8192,
    theta = 500000.0 },
}
