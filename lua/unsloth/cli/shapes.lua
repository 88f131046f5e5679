--- Published shapes, for bench and plan: random weights of the real sizes.
local function llama(t)
  return { architectures = { "LlamaForCausalLM" }, model_type = "llama", hidden_act = "silu", rms_norm_eps = 1e-5, vocab_size = t.vocab,
    hidden_size = t.hidden, intermediate_size = t.inter, num_hidden_layers = t.layers, num_attention_heads = t.heads,
    num_key_value_heads = t.kv_heads, head_dim = t.hidden // t.heads, max_position_embeddings = t.context,
    rope_theta = t.theta, tie_word_embeddings = t.tied or false }
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
  ["llama3-70b"] = llama { vocab = 128256, hidden = 8192, inter = 28672, layers = 80, heads = 64, kv_heads = 8, context = 8192,
    theta = 500000.0 },
}
