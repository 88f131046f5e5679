-- The report of a run, loss.svg, and the files of report_to.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local tensorboard = require "unsloth.tensorboard"
local unsloth = require "unsloth"

describe("the report", function()
  local dir, model, tokenizer

  setup(function()
    dir = support.tiny_folder()
    model, tokenizer = support.open(dir)
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4 })
  end)
  teardown(function()
    model:close()
    support.remove(dir)
  end)

  local function trainer(args, callbacks)
    local o = { max_steps = 4, save_strategy = "no", warmup_steps = 1, per_device_train_batch_size = 1, gradient_accumulation_steps = 2,
      output_dir = dir .. "/out", disable_tqdm = true }
    for name, value in pairs(args or {}) do o[name] = value end
    local ds = unsloth.dataset_from_list { { text = "<b>one</b> & " .. tokenizer.eos_token }, { text = "a longer row than the first" .. tokenizer.eos_token } }
    return unsloth.SFTTrainer { model = model, train_dataset = ds, eval_dataset = ds, callbacks = callbacks, args = o }
  end

  it("holds curves, samples, plan, settings, data set and checked exports, and needs nothing beside itself", function()
    local t = trainer { run_name = "a <run>", eval_strategy = "steps", eval_steps = 2 }
    t:train()
    t:add_sample("<prompt>", "before & after", "after\0\1\255")
    model:save_pretrained(dir .. "/adapter")
    model:save_pretrained_gguf(dir .. "/gguf", tokenizer, { quantization_method = { "f16", "q8_0" } })
    model:save_pretrained_merged(dir .. "/merged")
    local html = support.read(dir .. "/out/report.html")
    for _, text in ipairs { "/merged", "a &lt;run&gt;", "loss",
      "learning rate", "gradient norm", "tokens a second", "memory in use", "eval_loss", "&lt;prompt&gt;",
      "before &amp; after", "Memory plan", "activations and workspace", "gradient_accumulation_steps", "lora_alpha", "rows by length",
      "&lt;b&gt;one&lt;/b&gt;", "unsloth.F16.gguf", "unsloth.Q8_0.gguf", "adapter or weights", "prefers-color-scheme: dark", "width=device-width" } do
      assert.is_truthy(html:find(text, 1, true), text)
    end
    assert.equals(4, select(2, html:gsub("its structure was read back and is whole", "")))
    local plain = html:gsub('xmlns="http://www.w3.org/2000/svg"', "")
    assert.is_nil(plain:find("http", 1, true) or plain:find("<script", 1, true) or plain:find("src=", 1, true) or plain:find("@import", 1, true))
    assert.is_truthy(utf8.len(html), "it is UTF-8")
    assert.is_truthy(support.read(dir .. "/out/loss.svg"):find("<path", 1, true))
  end)

  it("says what is wrong with an export", function()
    local whole, text = require("unsloth.report").check(support.write(dir .. "/broken.gguf", "GGUF"))
    assert.is_false(whole)
    assert.is_truthy(text:find("broken.gguf", 1, true))
  end)

  it("tells of a run that failed, and goes on with the curves of a resumed one", function()
    local out = dir .. "/again"
    local t = trainer({ output_dir = out, save_strategy = "steps", save_steps = 2 }, { on_step = function(_, s)
      if s.step == 3 then error("the host <gives up>", 0) end
    end })
    assert.is_false(pcall(t.train, t))
    assert.is_truthy(support.read(out .. "/report.html"):find("the host &lt;gives up&gt;", 1, true))
    t:close()
    local second = trainer { output_dir = out, save_strategy = "steps", save_steps = 2 }
    second:train { resume_from_checkpoint = true }
    assert.same({ 1, 2, 3, 4 }, second.series.step)
    assert.is_nil(support.read(out .. "/report.html"):find("gives up", 1, true))
    second:close()
  end)

  it("is not written without an output_dir, or when it is not wanted", function()
    trainer({ output_dir = dir .. "/none", report = false }):train()
    assert.is_nil(io.open(dir .. "/none/report.html"))
    local t = trainer()
    t.args.output_dir = unsloth.TrainingArguments().output_dir
    assert.is_nil(require("unsloth.report").new(t))
  end)

  it("does not end the run when it cannot be written", function()
    support.write(dir .. "/file", "")
    local t = trainer { output_dir = dir .. "/file/out" }
    assert.equals(4, t:train().global_step)
  end)

  it("goes to JSON lines", function()
    local out = dir .. "/jsonl"
    trainer({ output_dir = out, report_to = "jsonl", eval_strategy = "steps", eval_steps = 4 }):train()
    local lines = support.json_lines(out .. "/log.jsonl")
    assert.equals(5, #lines)
    assert.same({ 4, true, true }, { lines[5].step, lines[5].eval_loss > 0, lines[4].loss > 0 })
    support.fails("USL_ERR_UNSUPPORTED", { "wandb", "tensorboard", "jsonl" }, unsloth.TrainingArguments, { report_to = { "jsonl", "wandb" } })
  end)

  it("goes to TensorBoard's event files", function()
    assert.equals(0xe3069283, tensorboard.crc32c "123456789") -- the check value that the algorithm is published with
    local out = dir .. "/board"
    trainer({ output_dir = out, report_to = { "tensorboard" } }):train()
    local names = require("unsloth.core").list_dir(out .. "/runs")
    assert.equals(1, #names)
    local text, at, records = support.read(out .. "/runs/" .. names[1]), 1, 0
    while at <= #text do
      local length = ("<I8"):unpack(text, at)
      at, records = at + 8 + 4 + length + 4, records + 1
    end
    assert.same({ 5, #text + 1 }, { records, at })
  end)
end)
