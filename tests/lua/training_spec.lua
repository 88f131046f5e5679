-- Training on a tiny model: the trainer, its checkpoints, adapters, what is saved.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"
local core = require "unsloth.core"

local FastLanguageModel = unsloth.FastLanguageModel
local IDS = { 256, 72, 101, 108, 108, 111 }
local real_print = print

describe("training", function()
  local dir, temp, data

  setup(function()
    dir, temp = support.tiny_folder(), support.temp_dir()
    local lines = {}
    for i = 1, 24 do
      lines[i] = unsloth.json.encode { text = ("Q: what follows %d?\nA: %d</s>"):format(i, i + 1) }
    end
    data = unsloth.load_dataset("json", { data_files = support.write(temp .. "/rows.jsonl", table.concat(lines, "\n")), split = "train" })
    _G.print = function() end
  end)
  teardown(function()
    _G.print = real_print
    support.remove(dir)
    support.remove(temp)
  end)

  local function new_model(opts)
    return FastLanguageModel.get_peft_model((support.open(dir, opts)), { r = 8, lora_alpha = 16, random_state = 5 })
  end

  local function new_trainer(model, args, more)
    local given = { per_device_train_batch_size = 2, gradient_accumulation_steps = 2, max_steps = 12, learning_rate = 1e-2, warmup_steps = 2,
      optim = "adamw_8bit", save_strategy = "no", output_dir = temp .. "/out", disable_tqdm = true, seed = 3407 }
    for name, value in pairs(args or {}) do given[name] = value end
    local opts = { model = model, train_dataset = data, args = unsloth.TrainingArguments(given) }
    for name, value in pairs(more or {}) do opts[name] = value end
    return unsloth.SFTTrainer(opts)
  end

  it("makes the loss fall and keeps its history", function()
    local model <close> = new_model()
    local trainer = new_trainer(model)
    local stats = trainer:train()
    assert.equals(12, stats.global_step)
    assert.equals(12, #stats.log_history)
    local first, last = stats.log_history[1], stats.log_history[12]
    assert.is_true(last.loss < first.loss - 0.2, ("%g to %g"):format(first.loss, last.loss))
    assert.is_true(stats.training_loss < first.loss and stats.training_loss > last.loss)
    assert.equals(1, first.step)
    assert.equals(0.0, first.learning_rate)
    assert.is_true(math.abs(stats.log_history[3].learning_rate - 1e-2) < 1e-9)
    assert.is_true(first.grad_norm > 0)
  end)

  it("steps by hand, stops in the middle and goes on", function()
    local model <close>, seen = new_model(), {}
    local trainer = new_trainer(model)
    for step, s in trainer:steps() do
      seen[#seen + 1] = s.loss
      if step == 5 then break end
    end
    for _, s in trainer:steps() do seen[#seen + 1] = s.loss end
    local other <close> = new_model()
    local straight = new_trainer(other):train()
    assert.equals(12, #seen)
    for i = 1, 12 do assert.equals(straight.log_history[i].loss, seen[i]) end
  end)

  it("asks a function of Lua for the rate", function()
    local model <close>, calls = new_model(), {}
    local stats = new_trainer(model, { max_steps = 3, lr_scheduler_type = function(step, total, rate)
      calls[#calls + 1] = { step, total }
      return rate / (step + 1)
    end }):train()
    assert.same({ 0, 3 }, calls[1])
    for i = 1, 3 do assert.is_true(math.abs(stats.log_history[i].learning_rate - 1e-2 / i) < 1e-9) end
  end)

  it("evaluates", function()
    local model <close> = new_model()
    local split = data:train_test_split { test_size = 4, seed = 1 }
    local trainer = new_trainer(model, { max_steps = 4, eval_strategy = "steps", eval_steps = 2 },
      { train_dataset = split.train, eval_dataset = split.test })
    local before, history = trainer:evaluate().eval_loss, trainer:train().log_history
    local count, last = 0, nil
    for _, entry in ipairs(history) do
      if entry.eval_loss then count, last = count + 1, entry.eval_loss end
    end
    assert.equals(3, count)
    assert.is_true(last < before)
    assert.equals(last, trainer:evaluate().eval_loss)
  end)

  it("lets only answers count", function()
    local model <close> = new_model()
    local trainer = new_trainer(model, { max_steps = 1 })
    local all = trainer.rows:stats().counted
    assert.equals(trainer, unsloth.train_on_responses_only(trainer, { instruction_part = "Q:", response_part = "A:" }))
    local answers = trainer.rows:stats().counted
    assert.is_true(answers > 0 and answers < all / 2, ("%d of %d"):format(answers, all))
    assert.is_true(trainer:train().training_loss > 0)
  end)

  it("refuses a mask that leaves nothing", function()
    local model <close> = new_model()
    local trainer = new_trainer(model)
    support.fails(nil, "label", function()
      unsloth.train_on_responses_only(trainer, { instruction_part = "Q:", response_part = "nowhere" })
      trainer:train()
    end)
  end)

  it("says that numbers are not finite, and keeps the weights", function()
    local model <close> = new_model()
    local trainer = new_trainer(model, { learning_rate = 1e6, warmup_steps = 0, max_steps = 8, max_grad_norm = 0, lr_scheduler_type = "constant" })
    local ok, err = pcall(trainer.train, trainer)
    if not ok then assert.equals("USL_ERR_NUMERIC", err.code, tostring(err)) end
    model:save_pretrained(temp .. "/wild")
    for name, weight in pairs(unsloth.safetensors.load(temp .. "/wild/adapter_model.safetensors")) do
      local _, _, norm = weight:distance(weight)
      assert.is_true(norm < math.huge, name)
    end
    support.fails("USL_ERR_INVALID", "learning_rate", function() new_trainer(new_model(), { learning_rate = 1e30 }):train() end)
  end)

  -- A number of a weight is none: a damaged file.
  it("says that a model's weights are damaged", function()
    local damaged = support.tiny_folder()
    finally(function() support.remove(damaged) end)
    local weights, name = unsloth.safetensors.load(damaged .. "/model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    local values = weights[name]:totable()
    for _, wrong in ipairs { 0 / 0, math.huge, -math.huge } do
      values[3][5] = wrong
      weights[name] = unsloth.tensor(values)
      unsloth.safetensors.save(damaged .. "/model.safetensors", weights)
      support.fails("USL_ERR_FORMAT", { damaged, name, "not finite", "load_in_4bit" }, support.open, damaged, { load_in_4bit = true })
      local model <close> = support.open(damaged)
      FastLanguageModel.get_peft_model(model, { r = 4 })
      local trainer = new_trainer(model)
      support.fails("USL_ERR_NUMERIC", { "update 1", "loss is not a finite number", "weights are damaged" }, trainer.train, trainer)
      assert.equals(0, trainer.state.global_step)
      trainer:close()
      support.fails("USL_ERR_NUMERIC", "weights are damaged", model.generate, model, "Hello", { max_new_tokens = 2 })
      support.fails("USL_ERR_NUMERIC", { "live model", "damaged" }, model.save_pretrained_gguf, model, damaged .. "/gguf", model.tokenizer,
        { quantization_method = "q8_0" })
      assert.same({}, core.list_dir(damaged .. "/gguf"))
    end
  end)

  it("gives back what a callback raises, and stops when asked", function()
    local model <close>, raised = new_model(), { "mine" }
    assert.equals(raised, support.error_of(function() new_trainer(model, {}, { callbacks = { on_step = function() error(raised, 0) end } }):train() end))
    local stats = new_trainer(model, {}, { callbacks = { on_step = function(trainer, s)
      if s.step == 3 then trainer:stop() end
    end } }):train()
    assert.equals(3, stats.global_step)
    support.fails(nil, "on_step", new_trainer, model, {}, { callbacks = { on_stepp = print } })
  end)

  it("names the row whose text is missing", function()
    local model <close> = new_model()
    support.fails("USL_ERR_FORMAT", { "rows.jsonl", "line 1", "nothing" }, new_trainer, model, { dataset_text_field = "nothing" })
  end)

  it("encodes rows together, keeps their order, and names the one that cannot be", function()
    local lines = {}
    for i = 1, 1100 do lines[i] = unsloth.json.encode { n = i } end
    local many = unsloth.load_dataset("json", { data_files = support.write(temp .. "/many.jsonl", table.concat(lines, "\n")), split = "train" })
    local model <close>, tokenizer = new_model(), unsloth.AutoTokenizer.from_pretrained(dir)
    local function text_of(row) return ("row %d"):format(row.n):rep(1 + row.n % 3) end
    local trainer = new_trainer(model, nil, { train_dataset = many, formatting_func = text_of, tokenizer = tokenizer })
    assert.equals(1100, #trainer.rows)
    for _, i in ipairs { 1, 512, 513, 1024, 1025, 1100 } do assert.same(tokenizer:encode_once(text_of { n = i }), (trainer.rows:get(i))) end
    support.fails(nil, { "many.jsonl", "line 700", "byte 5" }, new_trainer, model, nil, { train_dataset = many, tokenizer = tokenizer,
      formatting_func = function(row) return row.n == 700 and "bad \xff" or text_of(row) end })
  end)

  it("continues bit for bit from a checkpoint", function()
    local function adapter_after(out, job)
      local model <close> = new_model { load_in_4bit = true }
      job(model, out)
      model:save_pretrained(out .. "/adapter")
      return support.read(out .. "/adapter/adapter_model.safetensors")
    end
    local whole
    local straight = adapter_after(temp .. "/straight", function(model, out)
      core.make_dir(out)
      whole = new_trainer(model, { max_steps = 8, output_dir = out }):train().training_loss
    end)
    local resumed = adapter_after(temp .. "/resumed", function(model, out)
      local args = { max_steps = 8, output_dir = out, save_strategy = "steps", save_steps = 3 }
      for step in new_trainer(model, args):steps() do
        if step == 4 then break end
      end
      local second <close> = new_model { load_in_4bit = true }
      local trainer = new_trainer(second, args)
      local stats = trainer:train { resume_from_checkpoint = true }
      assert.equals(8, stats.global_step)
      assert.equals(8, #stats.log_history)
      assert.equals(whole, stats.training_loss) -- the whole run's, whatever part was done here: also when none was left
      assert.equals(whole, new_trainer(second, args):train({ resume_from_checkpoint = true }).training_loss)
      second:save_pretrained(out .. "/adapter2")
    end)
    assert.are_not.equal(straight, resumed) -- the model left after four updates is not the one that went on
    assert.equals(straight, support.read(temp .. "/resumed/adapter2/adapter_model.safetensors"))
  end)

  it("keeps the newest checkpoints and passes over a broken one", function()
    local model <close>, out = new_model(), temp .. "/limited"
    local args = { max_steps = 6, output_dir = out, save_strategy = "steps", save_steps = 1, save_total_limit = 2 }
    new_trainer(model, args):train()
    assert.same({ "checkpoint-5", "checkpoint-6", "loss.svg", "report.html" }, core.list_dir(out))
    for _, name in ipairs(core.list_dir(out .. "/checkpoint-6")) do
      local path = out .. "/checkpoint-6/" .. name
      support.write(path, support.read(path):sub(1, 20))
    end
    args.max_steps = 7
    local other <close> = new_model()
    local ok, stats = pcall(function() return new_trainer(other, args):train { resume_from_checkpoint = true } end)
    assert.is_true(ok, tostring(stats))
    assert.equals(7, stats.global_step)
    support.fails("USL_ERR_NOT_FOUND", "no checkpoint", function()
      new_trainer(other, { output_dir = temp .. "/none" }):train { resume_from_checkpoint = true }
    end)
  end)

  it("passes over each kind of damage, and says when no checkpoint is whole", function()
    local out = temp .. "/damaged"
    local args = { max_steps = 3, output_dir = out, save_strategy = "steps", save_steps = 1 }
    local model <close> = new_model()
    new_trainer(model, args):train()
    args.max_steps = 4
    local function resume()
      local other <close> = new_model()
      return new_trainer(other, args):train({ resume_from_checkpoint = true }).log_history
    end
    local function cut(name, length)
      local path = ("%s/%s"):format(out, name)
      support.write(path, support.read(path):sub(1, length))
    end
    args.save_strategy = "no"
    local straight = resume()
    local size = #support.read(out .. "/checkpoint-3/optimizer.safetensors")
    for _, damage in ipairs { function() cut("checkpoint-3/optimizer.safetensors", size - 1) end,
      function() cut("checkpoint-3/optimizer.safetensors", 0) end, function() core.remove_path(out .. "/checkpoint-3/optimizer.safetensors") end,
      function() cut("checkpoint-3/trainer_state.json", 0) end } do
      damage()
      local history = resume()
      assert.equals(4, #history)
      assert.equals(straight[3].loss, history[3].loss)
    end
    core.remove_path(out .. "/checkpoint-2/trainer_state.json")
    cut("checkpoint-1/trainer_state.json", 30)
    support.fails("USL_ERR_FORMAT", { out, "none of its 3 checkpoints is whole" }, resume)
  end)

  it("hands on what callbacks raise, and trains on as if nothing had been", function()
    local model <close> = new_model()
    local other <close> = new_model()
    local straight = new_trainer(other, { max_steps = 3, lr_scheduler_type = function() return 1e-3 end }):train().log_history
    local wrong = { [0] = { "an object" }, [1] = "no number" }
    local trainer = new_trainer(model, { max_steps = 3, lr_scheduler_type = function(step)
      local value = wrong[step]
      wrong[step] = nil
      if type(value) == "table" then error(value, 0) end
      return value or 1e-3
    end })
    local object, seen = wrong[0], {}
    assert.equals(object, support.error_of(function() trainer:core():step() end))
    for _, stats in trainer:steps() do
      seen[#seen + 1] = stats.loss
      if #seen == 1 then
        assert.is_truthy(support.error_of(function() trainer:core():step() end):find("must return a number", 1, true))
      end
    end
    for i = 1, 3 do assert.equals(straight[i].loss, seen[i]) end
    assert.equals(object, support.error_of(function()
      new_trainer(other, { max_steps = 1 }, { callbacks = { on_step = function() error(object, 0) end } }):train()
    end))
    assert.is_true(new_trainer(other, { max_steps = 1 }):train().training_loss > 0)
  end)

  it("refuses callbacks that yield", function()
    local yield = function() coroutine.yield() end
    local function fails(job)
      local model <close> = new_model()
      support.fails("USL_ERR_INVALID", "a callback may not yield", coroutine.wrap(function() job(model) end))
    end
    fails(function(model) new_trainer(model, {}, { formatting_func = yield }) end)
    fails(function(model) new_trainer(model, { max_steps = 2, lr_scheduler_type = yield }):train() end)
    for _, name in ipairs { "on_train_begin", "on_step", "on_log", "on_save", "on_train_end" } do
      fails(function(model)
        local args = { max_steps = 1, logging_steps = 1, save_strategy = "steps", save_steps = 1, output_dir = temp .. "/yield" }
        new_trainer(model, args, { callbacks = { [name] = yield } }):train()
      end)
    end
  end)

  it("stops at a loss that is not a number: the weights and the last checkpoint stay", function()
    local model <close>, out = new_model(), temp .. "/nan"
    local names, trained = model:params()
    local spoilt, values, kept = nil, {}, nil
    local trainer = new_trainer(model, { max_steps = 4, output_dir = out, save_strategy = "steps", save_steps = 2, learning_rate = 1e-3 }, {
      callbacks = { on_save = function()
        for _, name in ipairs(names) do
          if trained[name] then
            values[name] = model:get_param(name):totable()
            spoilt = spoilt or name
          end
        end
        local bad = {}
        for i, row in ipairs(values[spoilt]) do
          bad[i] = {}
          for k = 1, #row do bad[i][k] = 0 / 0 end
        end
        model:set_param(spoilt, unsloth.tensor(bad))
        kept = support.read(out .. "/checkpoint-2/optimizer.safetensors")
      end } })
    support.fails("USL_ERR_NUMERIC", { "update 3", "loss is not a finite number", "learning_rate" }, trainer.train, trainer)
    for name, value in pairs(values) do
      if name ~= spoilt then assert.same(value, model:get_param(name):totable()) end
    end
    assert.equals(kept, support.read(out .. "/checkpoint-2/optimizer.safetensors"))
    local other <close> = new_model()
    assert.equals(4, new_trainer(other, { max_steps = 4, output_dir = out, learning_rate = 1e-3 }):train({ resume_from_checkpoint = true }).global_step)
  end)

  it("saves an adapter that loads with the same logits", function()
    local model <close> = new_model()
    local base = model:logits(IDS)
    new_trainer(model, { max_steps = 4 }):train()
    local trained = model:logits(IDS)
    assert.is_true(trained:distance(base) > 1e-3)
    model:save_pretrained(temp .. "/adapter")
    assert.is_not_nil(core.path_kind(temp .. "/adapter/adapter_config.json"))

    local name = model:disable_adapter()
    assert.equals(0.0, (model:logits(IDS):distance(base)))
    model:set_adapter(name)
    assert.equals(0.0, (model:logits(IDS):distance(trained)))
    support.fails(nil, "nobody", model.set_adapter, model, "nobody")

    local other <close> = support.open(dir)
    other:load_adapter(temp .. "/adapter")
    assert.equals(0.0, (other:logits(IDS):distance(trained)))
    local whole <close> = FastLanguageModel.from_pretrained { model_name = temp .. "/adapter", dtype = "float32", load_in_4bit = false }
    assert.equals(0.0, (whole:logits(IDS):distance(trained)))
  end)

  it("saves merged weights and GGUF files that say the same", function()
    local model <close>, tokenizer = new_model(), unsloth.AutoTokenizer.from_pretrained(dir)
    new_trainer(model, { max_steps = 4 }):train()
    local trained = model:logits(IDS)
    local function reload(path)
      local read <close>, tok = support.open(path)
      assert.same(IDS, tok:encode "Hello")
      return (read:logits(IDS):distance(trained))
    end
    model:save_pretrained_merged(temp .. "/merged", tokenizer, { save_method = "merged_32bit" })
    assert.is_true(reload(temp .. "/merged") < 1e-5)
    model:save_pretrained_merged(temp .. "/merged16", tokenizer, { save_method = "merged_16bit" })
    assert.is_true(reload(temp .. "/merged16") < 2e-2)
    local paths = model:save_pretrained_gguf(temp .. "/gguf", tokenizer, { quantization_method = { "f32", "q8_0" } })
    assert.equals(2, #paths)
    assert.is_true(reload(paths[1]) < 1e-5)
    assert.is_true(reload(paths[2]) < 2e-2)
    support.fails("USL_ERR_UNSUPPORTED", "q4_k_m", model.save_pretrained_gguf, model, temp, tokenizer, { quantization_method = "q1_x" })
    support.fails("USL_ERR_UNSUPPORTED", "merged_16bit", model.save_pretrained_merged, model, temp .. "/m", tokenizer, { save_method = "zip" })
  end)

  it("writes config.json as transformers 5 does, and ends its files with a line's end", function()
    local model <close> = new_model()
    model:save_pretrained_merged(temp .. "/config", nil, { save_method = "merged_16bit" })
    local text = support.read(temp .. "/config/config.json")
    assert.equals("}\n", text:sub(-2))
    local config = unsloth.json.decode(text)
    assert.equals("bfloat16", config.dtype)
    assert.is_nil(config.torch_dtype)
  end)

  it("exports no .gguf whose readers would cut text another way", function()
    local folder = temp .. "/strange"
    core.make_dir(folder)
    local tokenizer = unsloth.json.decode(support.tokenizer_json())
    tokenizer.pre_tokenizer = { type = "Sequence", pretokenizers = {
      { type = "Split", pattern = { Regex = "x|y" }, behavior = "Isolated", invert = false }, tokenizer.pre_tokenizer } }
    support.write(folder .. "/tokenizer.json", unsloth.json.encode(tokenizer))
    local model <close> = new_model()
    support.fails("USL_ERR_UNSUPPORTED", { "cuts text", "save_pretrained_merged" }, model.save_pretrained_gguf, model, folder,
      unsloth.AutoTokenizer.from_pretrained(folder), { quantization_method = "f32" })
    assert.same({ "tokenizer.json" }, core.list_dir(folder))
  end)

  it("trains all weights", function()
    local model <close> = support.open(dir, { full_finetuning = true })
    local stats = new_trainer(model, { max_steps = 8, learning_rate = 5e-3 }):train()
    assert.is_true(stats.log_history[8].loss < stats.log_history[1].loss - 0.3)
  end)
end)
