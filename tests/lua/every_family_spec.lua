-- The same for every family: a folder loads, answers, is trained in part and whole, generates, saves an adapter and loads it. That the
-- numbers are transformers' is for the golden cases; here no family may be left out of anything.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local core = require "unsloth.core"
local unsloth = require "unsloth"
local FastLanguageModel = unsloth.FastLanguageModel

local SMALL = { vocab_size = 259, hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2, num_attention_heads = 2, num_key_value_heads = 1,
  head_dim = 16, max_position_embeddings = 64, rope_theta = 10000.0, initializer_range = 0.3, bos_token_id = 256, eos_token_id = 257 }
local EXPERTS = { num_experts_per_tok = 2, moe_intermediate_size = 24, num_experts = 4 }
local LATENT = { num_key_value_heads = 2, q_lora_rank = 12, kv_lora_rank = 16, qk_nope_head_dim = 8, qk_rope_head_dim = 4, v_head_dim = 12,
  n_routed_experts = 4, num_experts_per_tok = 2, moe_intermediate_size = 24, n_shared_experts = 1, first_k_dense_replace = 1, n_group = 2, topk_group = 1 }

-- Each architecture, and what its configuration has beyond the small one. Llama's stands for Yi, SmolLM2, TinyLlama and R1's distills.
local FAMILIES = {
  LlamaForCausalLM = {},
  MistralForCausalLM = { sliding_window = 6 },
  MixtralForCausalLM = { num_local_experts = 4, num_experts_per_tok = 2 },
  GemmaForCausalLM = {},
  Gemma2ForCausalLM = { sliding_window = 6, query_pre_attn_scalar = 16 },
  Gemma3ForCausalLM = { sliding_window = 6, query_pre_attn_scalar = 16 },
  Qwen2ForCausalLM = {},
  Qwen2MoeForCausalLM = { EXPERTS, shared_expert_intermediate_size = 32 },
  Qwen3ForCausalLM = {},
  Qwen3MoeForCausalLM = { EXPERTS },
  Phi3ForCausalLM = { partial_rotary_factor = 0.5, original_max_position_embeddings = 64 },
  DeepseekV2ForCausalLM = { LATENT, topk_method = "group_limited_greedy" },
  DeepseekV3ForCausalLM = { LATENT },
}

local function config_of(name, more)
  local config = { architectures = { name } }
  for _, part in ipairs { SMALL, more[1] or {}, more } do
    for key, value in pairs(part) do
      if key ~= 1 then config[key] = value end
    end
  end
  return config
end

local function ids_of(first, count)
  local ids = {}
  for i = 1, count do ids[i] = (first * 31 + i * i * 7) % 250 end
  return ids
end

-- The loss before and after a few updates on four rows.
local function train(model, rate)
  local rows = core.rows_new(0)
  for i = 1, 4 do rows:add(ids_of(i, 8 + i)) end
  local trainer <close> = core.trainer_new(model, rows, nil, { batch = 2, accumulation = 2, max_steps = 6, learning_rate = rate, schedule = "constant",
    optimizer = "adamw" })
  local first, last
  for _ = 1, 6 do
    local stats = trainer:step()
    first, last = first or stats.loss, stats.loss
  end
  return first, last
end

-- The greedy continuation, token by token from the logits of the whole text.
local function by_logits(model, ids, count)
  local all, out = { table.unpack(ids) }, {}
  for i = 1, count do
    local last, best = model:logits(all):totable()[#all], 1
    for v, z in ipairs(last) do
      if z > last[best] then best = v end
    end
    out[i] = best - 1
    all[#all + 1] = best - 1
  end
  return out
end

describe("every family", function()
  local dir
  setup(function() dir = support.temp_dir() end)
  teardown(function() support.remove(dir) end)

  local function open(path, opts)
    opts = opts or {}
    opts.device = "cpu"
    return support.open(path, opts)
  end

  for name, more in pairs(FAMILIES) do
    it("loads, answers, trains, generates, saves: " .. name, function()
      local folder = ("%s/%s"):format(dir, name)
      do
        local made <close> = FastLanguageModel.from_config(config_of(name, more), { random_state = 3, device = "cpu", dtype = "float32" })
        made:save_pretrained_merged(folder, nil, { save_method = "merged_32bit", verify = false })
      end
      local ids = ids_of(9, 13)
      local model <close> = open(folder)
      local before = model:logits(ids)
      assert.same({ 13, 259 }, before.shape)
      local said, generator <close> = {}, model:generator(ids, { max_new_tokens = 8, stop_ids = {} })
      for id in generator.next, generator do said[#said + 1] = id end
      assert.same(by_logits(model, ids, 8), said)

      FastLanguageModel.get_peft_model(model, { r = 4, target_modules = "all-linear", random_state = 1 })
      local first, last = train(model, 1e-2)
      assert.is_true(last < first, ("LoRA: %g -> %g"):format(first, last))
      local after = model:logits(ids)
      assert.is_true((after - before):abs():max() > 1e-3)
      model:save_pretrained(folder .. "/adapter")
      local again <close> = open(folder)
      again:load_adapter(folder .. "/adapter")
      assert.is_true((again:logits(ids) - after):abs():max() < 1e-6)
      again:disable_adapter()
      assert.same(before:totable(), again:logits(ids):totable())

      local whole <close> = open(folder, { full_finetuning = true })
      first, last = train(whole, 3e-3)
      assert.is_true(last < first, ("all weights: %g -> %g"):format(first, last))

      local four <close> = open(folder, { load_in_4bit = true })
      assert.is_true((four:logits(ids) - before):abs():max() > 1e-3)

      local c = core.inspect(folder).config
      assert.same({ name, 2, 32, 259 }, { c.architecture, c.layers, c.hidden, c.vocab })
      if support.program then
        local out, err, code = support.shell("%s info %s", support.program, support.quote(folder))
        assert.equals(0, code, err)
        assert.matches("architecture +" .. name, out)
        assert.matches("LoRA, 4%-bit +[%d.]+ [KM]iB", out)
      end
    end)
  end

  it("that is none is refused by name, with the nearest", function()
    local nearest = { Llama4ForCausalLM = "LlamaForCausalLM", Gemma4ForCausalLM = "GemmaForCausalLM", Qwen9MoeForCausalLM = "Qwen",
      GPT2LMHeadModel = "supported are" }
    for name, near in pairs(nearest) do
      local folder = dir .. "/" .. name
      core.make_dir(folder)
      support.write(folder .. "/config.json", unsloth.json.encode(config_of(name, {})))
      support.write(folder .. "/model.safetensors", support.read(dir .. "/LlamaForCausalLM/model.safetensors"))
      support.fails("USL_ERR_UNSUPPORTED", { name, near, "MixtralForCausalLM" }, open, folder)
      support.fails("USL_ERR_UNSUPPORTED", { name, near }, core.inspect, folder)
    end
  end)
end)
