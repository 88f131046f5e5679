-- What families do differently: rope that depends on a row's length, in packed batches and in generation; what is refused.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local core = require "unsloth.core"
local unsloth = require "unsloth"

local CASES = support.root .. "tests/golden/"

local function open(case)
  return core.model_open(CASES .. case .. "/model", { device = "cpu", dtype = "float32", max_seq_length = 28, full_finetuning = true })
end

local function row_of(first, count)
  local ids = {}
  for i = 1, count do ids[i] = 3 + (first * 31 + i * i * 7) % 60 end
  return ids
end

-- Sum of the losses of a row's tokens, and their number.
local function loss_of(model, ids)
  local logits, sum = model:logits(ids):totable(), 0
  for t = 1, #ids - 1 do
    local most, total = -math.huge, 0
    for _, z in ipairs(logits[t]) do most = math.max(most, z) end
    for _, z in ipairs(logits[t]) do total = total + math.exp(z - most) end
    sum = sum + most + math.log(total) - logits[t][ids[t + 1] + 1]
  end
  return sum, #ids - 1
end

describe("half precision", function()
  it("shows gradients as they are, not as its loss scale makes them", function()
    local gradient = {}
    for _, dtype in ipairs { "float32", "float16", "bfloat16" } do
      local model <close> = core.model_open(CASES .. "llama_odd/model", { device = "cpu", dtype = dtype, full_finetuning = true })
      local rows = core.rows_new(0)
      rows:add(row_of(1, 20))
      local trainer <close> = core.trainer_new(model, rows, nil, { batch = 1, accumulation = 1, max_steps = 1 })
      trainer:gradients(1, 1)
      gradient[dtype] = trainer:get_grad "model.layers.0.self_attn.q_proj.weight"
      if gradient.float32 ~= gradient[dtype] then
        local distance = gradient[dtype]:distance(gradient.float32)
        assert.is_true(distance < 0.05, dtype .. ": " .. distance)
      end
    end
  end)
end)

describe("rope that depends on a row's length", function()
  for _, case in ipairs { "phi3_long", "phi3_short", "llama_dynamic" } do
    it("is each row's own where rows are packed: " .. case, function()
      local model <close> = open(case)
      local lengths, rows, sum, count = { 28, 9, 22, 16, 20, 27 }, core.rows_new(0), 0, 0
      for i, n in ipairs(lengths) do
        local ids = row_of(i, n)
        local s, c = loss_of(model, ids)
        sum, count = sum + s, count + c
        rows:add(ids)
      end
      local trainer <close> = core.trainer_new(model, rows, nil, { batch = #lengths, accumulation = 1, max_steps = 1, learning_rate = 1e-3,
        shuffle = false })
      assert.is_near(sum / count, trainer:gradients(1, #lengths).loss, 2e-6)
    end)
  end

  it("makes the keys of a growing row again with longrope", function()
    -- Large weights and far angles: with the short ones' keys the answers are others.
    local model <close> = unsloth.FastLanguageModel.from_config({ architectures = { "Phi3ForCausalLM" }, vocab_size = 67, hidden_size = 32,
      intermediate_size = 32, num_hidden_layers = 2, num_attention_heads = 2, num_key_value_heads = 1, max_position_embeddings = 64,
      original_max_position_embeddings = 16, initializer_range = 0.6, rope_scaling = { type = "longrope",
        short_factor = { 1, 1, 1, 1, 1, 1, 1, 1 }, long_factor = { 4, 4, 4, 4, 4, 4, 4, 4 } } }, { device = "cpu", dtype = "float32" })
    for first = 1, 4 do
      local ids = row_of(first, 12)
      local generator <close> = model:generator(ids, { max_new_tokens = 10, stop_ids = {} })
      for id in generator.next, generator do
        local logits, best = model:logits(ids):totable()[#ids], 1
        for v, z in ipairs(logits) do
          if z > logits[best] then best = v end
        end
        assert.equals(best - 1, id)
        ids[#ids + 1] = id
      end
      assert.equals(22, #ids)
    end
  end)
end)

describe("the load-balancing loss", function()
  it("is the config's where no coefficient is given", function()
    local model <close> = open "qwen3_moe_experts" -- output_router_logits, router_aux_loss_coef = 0.5
    local rows = core.rows_new(0)
    rows:add(row_of(1, 20))
    local function loss(coefficient)
      local trainer <close> = core.trainer_new(model, rows, nil, { batch = 1, accumulation = 1, max_steps = 1, learning_rate = 1e-3,
        shuffle = false, router_aux_loss_coef = coefficient })
      return trainer:gradients(1, 1).loss
    end
    assert.equals(loss(0.5), loss(nil))
    assert.is_true(loss(nil) > loss(0) + 0.4)
    local plain <close> = open "mixtral_window"
    local trainer <close> = core.trainer_new(plain, rows, nil, { batch = 1, accumulation = 1, max_steps = 1 })
    assert.is_near(select(1, loss_of(plain, row_of(1, 20))) / 19, trainer:gradients(1, 1).loss, 2e-6)
  end)
end)

-- What DeepSeek's numbers are is checked by the golden case of that name.
describe("8-bit floats in blocks", function()
  local FOLDER = CASES .. "deepseek_v3_fp8/model"

  local function with(dir, change)
    core.make_dir(dir)
    local config = unsloth.json.decode(support.read(FOLDER .. "/config.json"))
    change(config.quantization_config)
    support.write(dir .. "/config.json", unsloth.json.encode(config))
    support.write(dir .. "/model.safetensors", support.read(FOLDER .. "/model.safetensors"))
    return dir
  end

  it("become bfloat16, trained or not, or NF4", function()
    local ids, dir = row_of(1, 12), support.temp_dir()
    finally(function() support.remove(dir) end)
    local full <close> = open "deepseek_v3_fp8"
    local frozen <close> = support.open(FOLDER, { device = "cpu" })
    local four <close> = support.open(FOLDER, { device = "cpu", load_in_4bit = true })
    local want = full:logits(ids)
    assert.is_true((frozen:logits(ids) - want):abs():max() < 1e-5)
    assert.is_true((four:logits(ids) - want):abs():max() > 1e-3)
    four:save_pretrained_merged(dir .. "/four", nil, { save_method = "merged_16bit" })
    frozen:save_pretrained_merged(dir .. "/merged", nil, { save_method = "merged_16bit" })
    local merged <close> = support.open(dir .. "/merged", { device = "cpu" })
    assert.is_true((merged:logits(ids) - want):abs():max() < 0.02)
    assert.is_nil(support.read(dir .. "/merged/config.json"):find "quantization_config")
  end)

  it("with other scales are refused", function()
    local dir = support.temp_dir()
    finally(function() support.remove(dir) end)
    local function refused(texts, change)
      support.fails(nil, texts, support.open, with(dir, change), { device = "cpu" })
    end
    refused({ "fp8", "weight_block_size", "16-bit" }, function(q) q.weight_block_size = nil end)
    refused({ "e4m3" }, function(q) q.fmt = "e5m2" end)
    refused({ "scale_inv", "128x128" }, function(q) q.weight_block_size = { 128, 128 } end)
    refused({ "scale_inv" }, function(q) q.weight_block_size = { 16, 11 } end)
    refused({ "gptq" }, function(q) q.quant_method = "gptq" end)
  end)
end)

describe("a configuration", function()
  local CONFIG = { architectures = { "Phi3ForCausalLM" }, vocab_size = 67, hidden_size = 24, intermediate_size = 26, num_hidden_layers = 2,
    num_attention_heads = 2, num_key_value_heads = 1, max_position_embeddings = 128, original_max_position_embeddings = 16 }
  local LIST = { 1, 1.1, 1.2, 1.3, 1.4, 1.5 }

  local function refused(texts, changes)
    local config = {}
    for key, value in pairs(CONFIG) do config[key] = value end
    for key, value in pairs(changes) do config[key] = value end
    support.fails(nil, texts, unsloth.FastLanguageModel.from_config, config)
  end

  it("of longrope that does not hold together is a sentence", function()
    local function scaling(t)
      t.rope_type = t.rope_type or "longrope"
      return { rope_scaling = t }
    end
    refused({ "long_factor", "6 numbers" }, scaling { short_factor = LIST, long_factor = { 1, 2 } })
    refused({ "short_factor", "6 numbers" }, scaling { long_factor = LIST })
    refused({ "long factor 3", "0" }, scaling { short_factor = LIST, long_factor = { 1, 1, 0, 1, 1, 1 } })
    refused({ '"longer" is not supported', "longrope" }, scaling { rope_type = "longer" })
    refused({ "factor 0.5" }, scaling { rope_type = "dynamic", factor = 0.5 })
    local local_bases = scaling { rope_type = "dynamic", factor = 2 }
    local_bases.architectures, local_bases.head_dim = { "Gemma3ForCausalLM" }, 12
    refused({ '"dynamic"', "Gemma3ForCausalLM" }, local_bases)
  end)

  it("is stretched to a longer max_seq_length, unless rope_scaling says otherwise", function()
    local function first(opts)
      opts.model_name, opts.dtype, opts.load_in_4bit, opts.device = CASES .. "llama_beyond/model", "float32", false, "cpu"
      local model <close> = unsloth.FastLanguageModel.from_pretrained(opts)
      return model:logits(row_of(1, 9)):totable()[9][1]
    end
    local own = first {}
    assert.equals(own, first { max_seq_length = 28, rope_scaling = { rope_type = "default" } })
    assert.is_true(math.abs(own - first { max_seq_length = 28 }) > 1e-4)
  end)

  it("that a GGUF cannot hold is refused at export", function()
    local tok = unsloth.AutoTokenizer.from_pretrained(support.root .. "examples/tiny-llama")
    local temp = support.temp_dir()
    finally(function() support.remove(temp) end)
    local function export(texts, architecture, changes)
      local config = { architectures = { architecture }, vocab_size = tok.vocab_size, hidden_size = 32, intermediate_size = 32,
        num_hidden_layers = 3, num_attention_heads = 2, num_key_value_heads = 2, head_dim = 16 }
      for key, value in pairs(changes) do config[key] = value end
      local model <close> = unsloth.FastLanguageModel.from_config(config)
      support.fails("USL_ERR_UNSUPPORTED", texts, model.save_pretrained_gguf, model, temp, tok, { quantization_method = "f32" })
    end
    export({ "query_pre_attn_scalar is 20", "16" }, "Gemma2ForCausalLM", { query_pre_attn_scalar = 20 })
    export({ "window of 8 tokens" }, "Qwen2ForCausalLM", { use_sliding_window = true, sliding_window = 8, max_window_layers = 1 })
  end)
end)
