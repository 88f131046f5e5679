-- Kinds of adapters: what is chosen, what is refused, that training, saving and loading agree. Their numbers are PEFT's: tests/golden.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local core = require "unsloth.core"
local unsloth = require "unsloth"
local FastLanguageModel = unsloth.FastLanguageModel

local IDS = { 256, 72, 101, 108, 108, 111 }

describe("an adapter", function()
  local dir

  local real_print = print

  setup(function()
    dir = support.tiny_folder()
    _G.print = function() end
  end)
  teardown(function()
    _G.print = real_print
    support.remove(dir)
  end)

  local function with(opts, open_opts)
    local model = support.open(dir, open_opts)
    return FastLanguageModel.get_peft_model(model, opts)
  end

  local function trained(model)
    local list, trains = {}, select(2, model:params())
    for name, yes in pairs(trains) do
      if yes then list[#list + 1] = name end
    end
    table.sort(list)
    return list
  end

  local function distance(a, b) return (a:distance(b)) end

  it("says that rope is scaled for a longer max_seq_length, and wants it again", function()
    local out = support.temp_dir()
    finally(function() support.remove(out) end)
    local context = support.config.max_position_embeddings
    local function said(body)
      local _, err, code = support.shell("%s -e %s", support.program or "lua5.4", support.quote(([[local u = require "unsloth"
        local function open(n)
          return u.FastLanguageModel.from_pretrained { model_name = %q, max_seq_length = n, dtype = "float32",
            load_in_4bit = false, device = "cpu" }
        end ]]):format(dir) .. body))
      assert.equals(0, code, err)
      return err
    end
    local function names(text, ...)
      for _, part in ipairs { ... } do assert.is_truthy(text:find(part, 1, true), ('"%s" is not in: %s'):format(part, text)) end
    end
    names(said(([[u.FastLanguageModel.get_peft_model(open(%d), { r = 2 }):save_pretrained(%q)]]):format(4 * context, out)),
      ("max_seq_length %d is above the model's %d"):format(4 * context, context), "linearly by 4", "the same max_seq_length")
    assert.equals("", said(([[open(%d)]]):format(context)))
    names(said(([[open(%d):load_adapter(%q)]]):format(context, out)), "linearly by 4", ("load the model with max_seq_length = %d"):format(4 * context))
    assert.is_nil(said(([[open(%d):load_adapter(%q)]]):format(4 * context, out)):find("its answers differ", 1, true))
    names(said(([[open(%d):load_adapter(%q)]]):format(2 * context, out)), "linearly by 2", "its answers differ")
  end)

  it("attaches where a list, a pattern or layers say", function()
    local model <close> = with { r = 2, target_modules = { "self_attn.q_proj", "layers.1.mlp.up_proj" } }
    assert.equals(6, #trained(model))
    local pattern <close> = with { r = 2, target_modules = [[.*\.1\.self_attn\.(q|k)_proj]] }
    assert.equals(4, #trained(pattern))
    local layers <close> = with { r = 2, target_modules = { "q_proj" }, layers_to_transform = { 1 }, layers_pattern = { "layers" } }
    assert.same({ "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight" },
      trained(layers))
    local excluded <close> = with { r = 2, exclude_modules = { "layers.0.self_attn.q_proj" }, target_modules = { "q_proj" } }
    assert.equals(2, #trained(excluded))
  end)

  it("has ranks and alphas by pattern", function()
    local model <close> = with { r = 2, lora_alpha = 4, target_modules = { "q_proj", "v_proj" },
      rank_pattern = { q_proj = 5, ["layers.0.self_attn.q_proj"] = 3 } }
    local function rank(name) return model:get_param("base_model.model.model.layers." .. name .. ".lora_A.weight").shape[1] end
    assert.same({ 3, 5, 2 }, { rank "0.self_attn.q_proj", rank "1.self_attn.q_proj", rank "1.self_attn.v_proj" })
  end)

  it("trains embed_tokens and lm_head whole, as Unsloth does, or with LoRA, as PEFT does", function()
    local whole <close> = with { r = 2, target_modules = { "q_proj", "lm_head" }, modules_to_save = { "embed_tokens" } }
    local names = table.concat(trained(whole), " ")
    assert.truthy(names:find("model.lm_head.weight", 1, true) and names:find("model.embed_tokens.weight", 1, true))
    assert.is_nil(names:find("lm_head.lora", 1, true))
    local lora <close> = with { r = 2, target_modules = { "lm_head", "embed_tokens" }, lora_embeddings = true }
    names = table.concat(trained(lora), " ")
    assert.truthy(names:find("lm_head.lora_A", 1, true) and names:find("embed_tokens.lora_embedding_B", 1, true))
  end)

  it("refuses with a sentence", function()
    local function fails(code, texts, opts, open_opts)
      local model <close> = support.open(dir, open_opts)
      support.fails(code, texts, FastLanguageModel.get_peft_model, model, opts)
    end
    fails("USL_ERR_INVALID", { "bias", "lora_only" }, { bias = "some" })
    fails("USL_ERR_INVALID", { "rank_pattern", "(q" }, { rank_pattern = { ["(q"] = 3 } })
    fails("USL_ERR_INVALID", { "rank_pattern", "q_proj" }, { rank_pattern = { q_proj = 0 } })
    fails("USL_ERR_INVALID", { "layers_pattern", "layers_to_transform" }, { layers_pattern = "layers" })
    fails("USL_ERR_INVALID", { "layers_pattern", "blocks" }, { layers_pattern = "blocks", layers_to_transform = { 0 } })
    fails("USL_ERR_INVALID", { "modules_to_save", "nothing_here" }, { modules_to_save = { "nothing_here" } })
    fails("USL_ERR_INVALID", { "init_lora_weights", "eva" }, { init_lora_weights = "eva" })
    fails("USL_ERR_INVALID", { "pissa", "load_in_4bit = false" }, { init_lora_weights = "pissa" }, { load_in_4bit = true })
    fails("USL_ERR_INVALID", { "loftq_bits 3" }, { init_lora_weights = "loftq", loftq_config = { loftq_bits = 3 } })
    fails("USL_ERR_INVALID", { "64x32", "lower r" }, { init_lora_weights = "pissa", r = 40, target_modules = { "gate_proj" } })
    fails("USL_ERR_UNSUPPORTED", { "use_dora", "modules_to_save" }, { use_dora = true, target_modules = { "embed_tokens" }, lora_embeddings = true })
    local model <close> = with { r = 2, init_lora_weights = "pissa" }
    support.fails("USL_ERR_INVALID", { "load the model anew" }, FastLanguageModel.get_peft_model, model, { r = 2, adapter_name = "other" })
    support.fails("USL_ERR_INVALID", { "pissa" }, function()
      local plain <close> = with { r = 2 }
      plain:save_pretrained(dir .. "/none", { path_initial_model_for_weight_conversion = true })
    end)
  end)

  it("that begins with PiSSA changes nothing, and becomes plain LoRA when it is saved so", function()
    local base <close> = support.open(dir)
    local before = base:logits(IDS)
    local out = support.temp_dir()
    finally(function() support.remove(out) end)
    for _, way in ipairs { "pissa", "pissa_niter_8" } do
      local model <close> = with { r = 4, init_lora_weights = way }
      assert.truthy(distance(model:logits(IDS), before) < 1e-5)
      local name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
      local values = model:get_param(name):totable()
      values[1][1] = values[1][1] + 0.5
      model:set_param(name, core.tensor(values))
      local now = model:logits(IDS)
      assert.truthy(distance(now, before) > 1e-4)
      model:save_pretrained(out .. "/adapter")
      model:save_pretrained(out .. "/lora", { path_initial_model_for_weight_conversion = true })
      for _, folder in ipairs { "/adapter", "/lora" } do
        local again <close> = support.open(dir)
        again:load_adapter(out .. folder)
        assert.truthy(distance(again:logits(IDS), now) < 1e-5)
      end
    end
  end)

  it("that begins with LoftQ is nearer to the base than its bits alone", function()
    local base <close> = support.open(dir)
    local four <close> = support.open(dir, { load_in_4bit = true })
    local before = base:logits(IDS)
    local model <close> = with { r = 16, lora_alpha = 16, init_lora_weights = "loftq", loftq_config = { loftq_iter = 4 } }
    assert.truthy(distance(model:logits(IDS), before) < 0.8 * distance(four:logits(IDS), before))
  end)

  -- The trainer makes DoRA's norms anew after each update; what is saved must answer the same, whatever was made before.
  it("of every kind is trained, saved and loaded with the same answers", function()
    local kinds = {
      { use_dora = true, lora_dropout = 0.1 },
      { use_dora = true, target_modules = { "q_proj", "lm_head" }, lora_embeddings = true, lora_dropout = 0.1 },
      { modules_to_save = { "embed_tokens", "lm_head", "norm" } }, { target_modules = { "embed_tokens", "v_proj" }, lora_embeddings = true },
      { init_lora_weights = "loftq", loftq_config = { loftq_bits = 8 } },
    }
    for _, opts in ipairs(kinds) do
      opts.r, opts.lora_alpha = 4, 4
      local out = support.temp_dir()
      local model <close>, tokenizer = support.open(dir)
      FastLanguageModel.get_peft_model(model, opts)
      local before = model:logits(IDS)
      local lines = unsloth.json.encode { text = "Hello world, hello." } .. "\n" .. unsloth.json.encode { text = "What is this?" }
      local data = unsloth.load_dataset("json", { data_files = support.write(out .. "/rows.jsonl", lines), split = "train" })
      local trainer = unsloth.SFTTrainer { model = model, tokenizer = tokenizer, train_dataset = data, dataset_text_field = "text",
        args = unsloth.TrainingArguments { max_steps = 3, learning_rate = 1e-2, embedding_learning_rate = 1e-3, output_dir = out,
          report_to = "none", disable_tqdm = true, save_strategy = "no", gradient_checkpointing = true } }
      local first, last
      for _, stats in trainer:steps() do
        first, last = first or stats.loss, stats.loss
      end
      assert.truthy(last < first)
      local after = model:logits(IDS)
      assert.truthy(distance(after, before) > 1e-3)
      model:save_pretrained(out .. "/adapter")
      model:save_pretrained_merged(out .. "/merged", tokenizer, { save_method = "merged_32bit" })
      local again <close> = support.open(dir)
      local merged <close> = support.open(out .. "/merged")
      again:load_adapter(out .. "/adapter")
      assert.truthy(distance(again:logits(IDS), after) < 1e-6)
      assert.truthy(distance(merged:logits(IDS), after) < 1e-5)
      support.remove(out)
    end
  end)

  it("drops nothing when it is evaluated", function()
    local out, losses = support.temp_dir(), {}
    finally(function() support.remove(out) end)
    local data = unsloth.load_dataset("json", { split = "train",
      data_files = support.write(out .. "/rows.jsonl", unsloth.json.encode { text = "Hello world, hello." }) })
    for i, dropout in ipairs { 0, 0.9 } do
      local model <close>, tokenizer = support.open(dir)
      FastLanguageModel.get_peft_model(model, { r = 4, init_lora_weights = false, lora_dropout = dropout })
      local trainer = unsloth.SFTTrainer { model = model, tokenizer = tokenizer, train_dataset = data, eval_dataset = data,
        dataset_text_field = "text", args = unsloth.TrainingArguments { max_steps = 1, output_dir = out, disable_tqdm = true, save_strategy = "no" } }
      losses[i] = trainer:evaluate().eval_loss
      trainer:close()
    end
    assert.is_number(losses[1])
    assert.equals(losses[1], losses[2])
  end)

  it("goes beside weights that bitsandbytes quantised; other methods are refused with the remedy", function()
    local path = support.root .. "tests/golden/bnb_int8/model"
    -- load_in_4bit, the default, quantises nothing again.
    local model <close> = FastLanguageModel.from_pretrained { model_name = path, dtype = "float32" }
    local eight = model:info().weight_bytes
    assert.truthy(eight < 30000)
    local full <close> = FastLanguageModel.from_pretrained { model_name = path, dtype = "float32", full_finetuning = true }
    assert.truthy(distance(model:logits { 1, 5, 9 }, full:logits { 1, 5, 9 }) < 1e-6)
    local out = support.temp_dir()
    finally(function() support.remove(out) end)
    model:save_pretrained_merged(out, nil, { save_method = "merged_32bit" })
    assert.is_nil(support.read(out .. "/config.json"):find("quantization_config", 1, true))
    local merged <close> = FastLanguageModel.from_pretrained { model_name = out, dtype = "float32", load_in_4bit = false }
    assert.truthy(distance(model:logits { 1, 5, 9 }, merged:logits { 1, 5, 9 }) < 1e-6)
    local config = unsloth.json.decode(support.read(path .. "/config.json"))
    for _, method in ipairs { "gptq", "awq", "compressed-tensors" } do
      config.quantization_config = { quant_method = method, bits = 4 }
      support.write(out .. "/config.json", unsloth.json.encode(config))
      support.fails("USL_ERR_UNSUPPORTED", { method, "load_in_4bit = true", "GGUF" }, FastLanguageModel.from_pretrained, { model_name = out })
    end
  end)

  it("says what is wrong with a damaged checkpoint of bitsandbytes", function()
    local path, out = support.root .. "tests/golden/bnb_nf4/model", support.temp_dir()
    finally(function() support.remove(out) end)
    support.write(out .. "/config.json", support.read(path .. "/config.json"))
    local name = "model.layers.0.self_attn.q_proj.weight"
    local function damaged(suffix, value, text)
      local tensors = unsloth.safetensors.load(path .. "/model.safetensors")
      tensors[name .. suffix] = value
      unsloth.safetensors.save(out .. "/model.safetensors", tensors)
      support.fails(nil, { name, text }, FastLanguageModel.from_pretrained, { model_name = out })
    end
    damaged(".quant_state.bitsandbytes__nf4", nil, "quant_state")
    damaged(".absmax", unsloth.tensor { 1, 2, 3 }, "absmax")
    damaged(".nested_absmax", unsloth.tensor { 1, 2, 3 }, "nested absmax")
    damaged(".quant_map", unsloth.tensor { 1, 2, 3 }, "quant_map")
    damaged("", unsloth.tensor { 1, 2, 3 }, "length")
  end)
end)

describe("an adapter of a mixture", function()
  local function with(case, opts)
    local model = core.model_open(support.root .. "tests/golden/" .. case .. "/model", { device = "cpu", dtype = "float32" })
    return FastLanguageModel.get_peft_model(model, opts)
  end

  it("names experts by words, parameters or patterns", function()
    local seven <close> = with("qwen2_moe", { r = 2 })
    local stacked = seven:get_param "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert.equals(2 * 2 * 4, stacked.shape[1]) -- gate and up, rank, experts
    local one <close> = with("qwen2_moe", { r = 2, target_modules = { "mlp.experts.down_proj", "shared_expert.up_proj" }, rank_pattern = { down_proj = 3 } })
    local names = one:params()
    local found = {}
    for _, name in ipairs(names) do
      local kind = name:match "layers%.0%.(.*)%.lora_A"
      if kind then found[#found + 1] = kind end
    end
    assert.same({ "mlp.shared_expert.up_proj", "mlp.experts" }, found)
  end)

  it("takes the experts as PEFT's target_parameters", function()
    local function places(opts, kind)
      local out = support.temp_dir()
      local model <close> = with(kind or "qwen2_moe", opts)
      model:save_pretrained(out)
      local config = unsloth.json.decode(support.read(out .. "/adapter_config.json"))
      support.remove(out)
      table.sort(config.target_modules)
      table.sort(config.target_parameters)
      return table.concat(config.target_modules, " ") .. "; " .. table.concat(config.target_parameters, " ")
    end
    local both = { "mlp.experts.gate_up_proj", "mlp.experts.down_proj" }
    assert.equals("; mlp.experts.down_proj mlp.experts.gate_up_proj", places { r = 2, target_parameters = both })
    assert.equals("; mlp.gate.weight", places { r = 2, target_parameters = { "gate.weight" }, target_modules = {} })
    assert.equals("q_proj; mlp.experts.down_proj", places { r = 2, target_modules = { "q_proj" }, target_parameters = { "experts.down_proj" } })
    local model <close> = support.open(support.root .. "tests/golden/qwen2_moe/model")
    local function refuses(texts, opts) support.fails("USL_ERR_INVALID", texts, FastLanguageModel.get_peft_model, model, opts) end
    refuses({ "target_parameters", '"q_proj"', "target_modules" }, { target_parameters = { "q_proj" } })
    refuses({ "target_parameters", "list" }, { target_parameters = both, target_modules = "all-linear" })
    local dense <close> = support.open(support.root .. "tests/golden/llama_odd/model")
    support.fails("USL_ERR_INVALID", "mlp.experts.gate_up_proj", FastLanguageModel.get_peft_model, dense, { target_parameters = both })
  end)

  it("refuses what has no meaning for experts", function()
    local function refuses(texts, opts) support.fails(nil, texts, with, "qwen2_moe", opts) end
    refuses("name both or neither", { target_modules = { "gate_proj" } })
    refuses("no magnitudes", { use_dora = true })
    refuses("no magnitudes", { use_dora = true, target_modules = { "gate" } })
    refuses("single matrices", { init_lora_weights = "pissa" })
    refuses("trained by LoRA", { modules_to_save = { "mlp.experts.down_proj" } })
  end)

  it("has magnitudes beside experts and in latent attention", function()
    local model <close> = with("deepseek_v3", { r = 2, use_dora = true, init_lora_weights = false, target_modules =
      [[.*(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|shared_experts.*)]] })
    local ids, out = { 5, 7, 11, 3, 2, 9 }, support.temp_dir()
    finally(function() support.remove(out) end)
    local now = model:logits(ids)
    core.export_merged(model, nil, out .. "/merged", "float32")
    assert.is_true(core.model_open(out .. "/merged", { device = "cpu", dtype = "float32" }):logits(ids):distance(now) < 1e-5)
    model:save_adapter(out .. "/adapter")
    model:load_adapter(out .. "/adapter", "again")
    assert.is_true(model:logits(ids):distance(now) < 1e-6)
    local rows = core.rows_new(0)
    rows:add(ids)
    local trainer <close> = core.trainer_new(model, rows, nil, { batch = 1, accumulation = 1, max_steps = 1 }, nil)
    local checked = 0
    for _, name in ipairs(model:params()) do
      if name:find "layers.1.*magnitude" then
        checked = checked + 1
        trainer:gradients(1, 1)
        local value, gradient = model:get_param(name), trainer:get_grad(name):totable()
        local function loss(step)
          local list = value:totable()
          list[1] = list[1] + step
          model:set_param(name, core.tensor(list))
          return trainer:gradients(1, 1).loss
        end
        local difference = (loss(1e-2) - loss(-1e-2)) / 2e-2
        model:set_param(name, value)
        assert.is_true(math.abs(difference - gradient[1]) < 2e-4 + 2e-2 * math.abs(gradient[1]), name .. ": " .. difference .. " " .. gradient[1])
      end
    end
    assert.equals(8, checked)
  end)
end)
