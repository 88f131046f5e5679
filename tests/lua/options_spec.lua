-- Option tables, error objects, callbacks; data sets of Lua's making.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

describe("options", function()
  local arguments = unsloth.TrainingArguments

  it("that are not known name the nearest", function()
    support.fails("USL_ERR_INVALID", { "learning_rte", "learning_rate" }, arguments, { learning_rte = 1 })
    support.fails("USL_ERR_INVALID", { "max_sequence_len" }, unsloth.FastLanguageModel.from_pretrained, { max_sequence_len = 1 })
    support.fails("USL_ERR_INVALID", { "data_file", "data_files" }, unsloth.load_dataset, "json", { data_file = "x" })
  end)

  it("take integral floats as integers, and no others", function()
    assert.equals("integer", math.type(arguments({ max_steps = 60 / 2 }).max_steps))
    support.fails("USL_ERR_INVALID", { "max_steps", "1.5" }, arguments, { max_steps = 1.5 })
    support.fails("USL_ERR_INVALID", "max_steps", arguments, { max_steps = "60" })
    for _, none in ipairs { 1e300, math.huge, 0 / 0 } do
      support.fails("USL_ERR_INVALID", { "max_steps", "integer" }, arguments, { max_steps = none })
    end
  end)

  it("that go by two names are given once", function()
    for _ = 1, 10 do -- whatever the order of the table
      support.fails("USL_ERR_INVALID", { "eval_strategy", "evaluation_strategy" }, arguments,
        { eval_strategy = "no", evaluation_strategy = "steps" })
    end
    assert.equals("steps", arguments({ eval_strategy = "steps", evaluation_strategy = "steps" }).eval_strategy)
  end)

  it("of a schedule are used or refused", function()
    support.fails("USL_ERR_INVALID", { "num_cycels", "num_cycles" }, arguments,
      { lr_scheduler_type = "cosine", lr_scheduler_kwargs = { num_cycels = 1 } })
    support.fails("USL_ERR_INVALID", "power", arguments, { lr_scheduler_type = "linear", lr_scheduler_kwargs = { power = 2 } })
    local core_options = require("unsloth.arguments").core_options
    local _, rate = core_options(arguments { lr_scheduler_type = "cosine", lr_scheduler_kwargs = { num_cycles = 1 },
      learning_rate = 1, warmup_steps = 0 }, "auto")
    assert.is_true(math.abs(rate(25, 100) - 0.5) < 1e-12 and math.abs(rate(50, 100)) < 1e-12 and math.abs(rate(75, 100) - 0.5) < 1e-12)
    _, rate = core_options(arguments { lr_scheduler_type = "cosine" }, "auto")
    assert.is_nil(rate)
  end)

  it("have Unsloth's defaults, and false is Python's None", function()
    local o = arguments {}
    assert.equals("adamw_8bit", o.optim)
    assert.equals(3407, o.seed)
    assert.equals(5e-5, o.learning_rate)
    assert.equals("linear", o.lr_scheduler_type)
    assert.equals(2, o.gradient_accumulation_steps)
    assert.equals(o.learning_rate, arguments({ learning_rate = false }).learning_rate)
    assert.is_function(unsloth.SFTConfig)
  end)

  it("that cannot be had say what to do instead", function()
    support.fails("USL_ERR_UNSUPPORTED", { "push_to_hub", "save_pretrained" }, arguments, { push_to_hub = true })
    support.fails("USL_ERR_UNSUPPORTED", { "lion", "adamw_8bit" }, arguments, { optim = "lion" })
    support.fails("USL_ERR_UNSUPPORTED", { "wandb", "none" }, arguments, { report_to = "wandb" })
    assert.is_truthy(arguments { push_to_hub = false, report_to = "none" })
  end)

  it("of words name the word that was probably meant", function()
    for name, pair in pairs { lr_scheduler_type = { "cosin", "cosine" }, optim = { "adamw_8bits", "adamw_8bit" }, report_to = { "tensorbord", "tensorboard" },
      save_strategy = { "step", "steps" }, gradient_checkpointing = { "unslot", "unsloth" } } do
      support.fails(nil, { name, pair[1], ('did you mean "%s"?'):format(pair[2]) }, arguments, { [name] = pair[1] })
    end
    local model <close> = unsloth.FastLanguageModel.from_config(support.config, { full_finetuning = false, plan_only = true })
    support.fails(nil, { "bias", 'did you mean "lora_only"?' }, unsloth.FastLanguageModel.get_peft_model, model, { bias = "lora_onli" })
    support.fails(nil, { "q4_k_n", 'did you mean "q4_k_m"?' }, model.save_pretrained_gguf, model, "out", nil, { quantization_method = "q4_k_n" })
    support.fails(nil, { "merged_16bits", 'did you mean "merged_16bit"?' }, model.save_pretrained_merged, model, "out", nil,
      { save_method = "merged_16bits" })
  end)

  it("stay within their range", function()
    support.fails("USL_ERR_INVALID", { "learning_rate", "-1" }, arguments, { learning_rate = -1 })
    for _, rate in ipairs { 1e30, math.huge, -math.huge, 0 / 0 } do
      support.fails("USL_ERR_INVALID", "learning_rate", arguments, { learning_rate = rate })
      support.fails("USL_ERR_INVALID", "weight_decay", arguments, { weight_decay = rate })
    end
    for _, name in ipairs { "warmup_steps", "max_grad_norm", "num_train_epochs", "adam_beta1", "adam_epsilon", "eval_delay", "memory_limit" } do
      support.fails("USL_ERR_INVALID", name, arguments, { [name] = math.huge })
    end
    support.fails("USL_ERR_INVALID", "per_device_train_batch_size", arguments, { per_device_train_batch_size = 0 })
    support.fails("USL_ERR_INVALID", "save_strategy", arguments, { save_strategy = "sometimes" })
  end)
end)

describe("data sets", function()
  local dir, ds

  setup(function()
    dir = support.temp_dir()
    local lines = {}
    for i = 1, 10 do lines[i] = ('{"b":%d,"a":"row %d","none":null,"list":[1,null,2]}'):format(i, i) end
    ds = unsloth.load_dataset("json", { data_files = support.write(dir .. "/ten.jsonl", table.concat(lines, "\r\n") .. "\n\n"), split = "train" })
  end)
  teardown(function() support.remove(dir) end)

  local function column(d, name)
    local out = {}
    for row in d:rows() do out[#out + 1] = row[name] end
    return out
  end

  it("have rows, a length and numbers from 1; null is nil", function()
    assert.equals(10, #ds)
    assert.equals("row 1", ds[1].a)
    assert.is_nil(ds[1].none)
    assert.is_nil(ds[11])
    assert.same({ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 }, column(ds, "b"))
  end)

  it("map, filter, select", function()
    local mapped = ds:map(function(row, i) return { text = row.a .. "!", b = row.b * i } end)
    assert.equals("row 3!", mapped[3].text)
    assert.equals(9, mapped[3].b)
    assert.equals(3, ds[3].b)
    assert.same({ 2, 4, 6, 8, 10 }, column(ds:filter(function(row) return row.b % 2 == 0 end), "b"))
    assert.same({ 10, 1 }, column(ds:select { 10, 1 }, "b"))
    support.fails(nil, "11", ds.select, ds, { 11 })
    support.fails("USL_ERR_INVALID", "line 1", ds.map, ds, function() return 7 end)
  end)

  it("shuffle the same way for the same seed, and split", function()
    local one = column(ds:shuffle { seed = 1 }, "b")
    assert.same(one, column(ds:shuffle { seed = 1 }, "b"))
    assert.are_not.same(one, column(ds, "b"))
    table.sort(one)
    assert.same(column(ds, "b"), one)
    local split = ds:train_test_split { test_size = 0.2, seed = 4 }
    assert.equals(8, #split.train)
    assert.equals(2, #split.test)
    assert.equals(3, #unsloth.load_dataset("json", { data_files = dir .. "/ten.jsonl", split = "train[:3]" }))
  end)

  it("load the split that is asked for, and the range of it", function()
    local two = support.write(dir .. "/two.jsonl", '{"b":11}\n{"b":12}\n')
    local ten = dir .. "/ten.jsonl"
    local function load(split, files)
      return column(unsloth.load_dataset("json", { data_files = files or { train = ten, test = { two, two } }, split = split }), "b")
    end
    local function refused(texts, split, files)
      support.fails("USL_ERR_INVALID", texts, load, split, files)
    end
    assert.same({ 11, 12, 11, 12 }, load "test")
    assert.same({ 12, 11 }, load "test[1:3]")
    assert.equals(10, #load "train")
    assert.equals(10, #load())
    assert.same({ 11, 12 }, load(nil, { test = two }))
    assert.same({ 9, 10 }, load "train[8:]")
    assert.same({ 10 }, load "train[-1:]")
    assert.same({ 1, 2 }, load "train[:15%]") -- 1.5 and 2.5 go to the even one
    assert.same({ 3, 4, 5 }, load "train[25%:50%]")
    assert.equals(10, #load "train[:500]")
    refused({ '"tset"', 'did you mean "test"?', "train, test" }, "tset")
    refused({ '"test"', "train is the only one" }, "test", ten)
    refused({ "split = ", "test, validation" }, nil, { test = two, validation = ten })
    refused({ "train[500:]", "none of the 10 rows" }, "train[500:]")
    refused({ "train[3:3]", "none of the 10 rows" }, "train[3:3]")
    refused({ "train[:200%]", "100%" }, "train[:200%]")
    for _, split in ipairs { "train[5]", "train[:%]", "train[a:b]", "train[-:3]", "train[1:2]x" } do refused({ split, "train[:100]" }, split) end
    for _, files in ipairs { { 7 }, { train = 7 }, { ten, test = two }, { [7] = ten } } do refused({ "data_files is", "split" }, "train", files) end
    refused({ "names no file" }, "train", {})
    refused({ "names no file" }, "train", { train = {} })
  end)

  it("give back what a callback raises", function()
    local raised = {}
    assert.equals(raised, support.error_of(ds.map, ds, function() error(raised, 0) end))
    -- What is no user's own object says at which row it was.
    local function third(row) return row.b == 3 and row.missing.field or nil end
    for _, name in ipairs { "map", "filter" } do
      local err = support.error_of(ds[name], ds, third)
      assert.is_truthy(err:find("^" .. dir .. "/ten%.jsonl: line 3: .*attempt to index"), err)
      support.fails("USL_ERR_INVALID", { "line 3", "max_steps" }, ds[name], ds, function(row)
        if row.b == 3 then unsloth.TrainingArguments { max_steps = 0 } end
      end)
    end
    assert.equals(raised, support.error_of(coroutine.wrap(function() ds:filter(function() error(raised, 0) end) end)))
  end)

  it("refuse a callback that yields", function()
    local yield = function() coroutine.yield() end
    for _, method in ipairs { ds.map, ds.filter } do
      support.fails("USL_ERR_INVALID", "a callback may not yield", coroutine.wrap(function() method(ds, yield) end))
    end
  end)

  it("standardise the formats", function()
    local function load(text)
      return unsloth.standardize_data_formats(unsloth.load_dataset("json", { data_files = support.write(dir .. "/f.json", text), split = "train" }))
    end
    local alpaca = load '[{"instruction":"Add","input":"1 2","output":" 3 "},{"instruction":"Hi","input":"","output":"Ho"}]'
    assert.same({ "user", "Add\n\n1 2", "assistant", " 3 " },
      { alpaca[1].messages[1].role, alpaca[1].messages[1].content, alpaca[1].messages[2].role, alpaca[1].messages[2].content })
    assert.equals("Hi", alpaca[2].messages[1].content)
    local sharegpt = load '[{"conversations":[{"from":"system","value":"s"},{"from":"human","value":"h"},{"from":"gpt","value":"g"}]}]'
    assert.equals("system", sharegpt[1].messages[1].role)
    assert.equals("user", sharegpt[1].messages[2].role)
    assert.equals("assistant", sharegpt[1].messages[3].role)
    local openai = load '[{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"a"}]}]'
    assert.equals("a", openai[1].messages[2].content)
    support.fails(nil, { "f.json", "row 1" }, load, '[{"conversations":[]}]')
    support.fails(nil, { "f.json", "row 2" }, load,
      '[{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"a"}]},{"instruction":"a","output":"b"}]')
    support.fails(nil, "f.json", load, "[]")
  end)

  local MALFORMED = "data/datasets/malformed"
  support.it_with(MALFORMED, "that are malformed get what the manifest says", function(folder)
    for _, entry in ipairs(support.json_lines(folder .. "/MANIFEST.jsonl")) do
      local ok, result = pcall(function()
        local loaded = unsloth.load_dataset("json", { data_files = folder .. "/" .. entry.file, split = "train" })
        unsloth.standardize_data_formats(loaded)
        return loaded
      end)
      if entry.expect == "error" then assert.is_false(ok, entry.file) end
      if entry.expect == "ok" then assert.is_true(ok, entry.file .. ": " .. tostring(result)) end
      if ok then
        assert.equals(entry.rows, #result, entry.file)
      else
        local text = tostring(result)
        assert(text:find(entry.file, 1, true) and text:find(entry.where or "", 1, true), ("%s (%s): %s"):format(entry.file, entry.where, text))
      end
    end
  end)

  support.it_with("data/datasets", "from elsewhere load", function(folder)
    local ROWS = { ["alpaca_en_demo.json"] = 999, ["identity.json"] = 91, ["dpo_en_demo.json"] = 300, ["kto_en_demo.json"] = 300,
      ["glaive_toolcall_en_demo.json"] = 300, ["sharegpt_dummy_conversation.json"] = 500 }
    for name, rows in pairs(ROWS) do
      local loaded = unsloth.load_dataset("json", { data_files = folder .. "/" .. name, split = "train" })
      assert.equals(rows, #loaded, name)
      assert.equals(rows, #unsloth.standardize_data_formats(loaded), name)
    end
    for name, rows in pairs { ["c4_demo.jsonl"] = 300, ["seed_tasks.jsonl"] = 175, ["gsm8k_test.jsonl"] = 1319 } do
      assert.equals(rows, #unsloth.load_dataset("json", { data_files = folder .. "/" .. name, split = "train" }), name)
    end
    assert.is_true(#unsloth.load_dataset("text", { data_files = folder .. "/wiki_demo.txt", split = "train" }) > 10)
  end)

  it("mean what help says, and nothing is explained that is no option", function()
    local doc, count = require "unsloth.doc", 0
    for name, meaning in pairs(require "unsloth.meanings") do
      count = count + 1
      assert.matches(name .. " }: ", doc.text(name), 1, true)
      assert.matches("; " .. meaning, (doc.text(name):gsub("%s+", " ")), 1, true)
    end
    assert.is_true(count > 50)
  end)
end)
