-- What is said of progress: plain lines in a pipe, one rewritten line on a terminal, JSON lines, nothing.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

describe("progress", function()
  local dir

  setup(function() dir = support.temp_dir() end)
  teardown(function() support.remove(dir) end)

  local RECIPE = support.quote(support.root .. "recipes/llama3_alpaca.lua")

  local function recipe(words)
    return support.shell("%s %s --max-steps 2 --no-gguf --output %s/out %s", support.program, RECIPE, dir, words)
  end

  support.it_program("is lines of JSON for programs, and nothing else", function()
    local out, err, code = recipe "--json"
    assert.equals(0, code, err)
    local seen = {}
    for line in out:gmatch "[^\n]+" do
      local event = unsloth.json.decode(line)
      seen[event.event] = seen[event.event] or {}
      table.insert(seen[event.event], event)
    end
    assert.equals(2, #seen.train)
    assert.same({ 2, 2 }, { seen.train[2].step, seen.train[2].total })
    assert.is_true(seen.train[2].loss > 0 and seen.train[2].tokens_per_second > 0 and seen.train[2].memory > 0)
    local finished = {}
    for _, event in ipairs(seen.progress) do
      if event.finished then finished[event.what] = event.total end
    end
    assert.equals(132, finished.tokenising)
    assert.is_truthy(next(seen.text))
    local _, complaint, status = recipe "--json --quiet"
    assert.equals(1, status)
    assert.is_truthy(complaint:find("not both", 1, true), complaint)
  end)

  support.it_program("is plain lines in a pipe, and none when quiet", function()
    local out, err = recipe ""
    assert.is_truthy(out:find("step 1/2  grad_norm", 1, true) and out:find("132 rows", 1, true), out)
    assert.equals("", err)
    out, err = recipe "--quiet"
    assert.is_nil(out:find("step 1/2", 1, true) or out:find("132 rows", 1, true))
    assert.is_truthy(out:find("adapter: ", 1, true))
    assert.equals("", err)
  end)

  -- patience = 0: every task is long. The row's function says how the line is drawn.
  local SCRIPT = [[
    local unsloth, progress = require "unsloth", require "unsloth.progress"
    progress.patience = 0
    local model = unsloth.FastLanguageModel.from_pretrained { model_name = arg[1], load_in_4bit = false, dtype = "float32" }
    unsloth.FastLanguageModel.get_peft_model(model, { r = 2 })
    local ds = unsloth.dataset_from_list { { text = "one</s>" }, { text = "two</s>" } }
    local trainer = unsloth.SFTTrainer { model = model, train_dataset = ds, eval_dataset = ds,
      args = { max_steps = 2, save_strategy = "no", output_dir = arg[1] .. "/out", warmup_steps = 0 } }
    trainer:train()
    trainer:evaluate()
    model:save_pretrained_gguf(arg[1] .. "/gguf", nil, { quantization_method = "f16" })
    progress.task("an error"):close "why"
    local bar = progress.bar()
    bar.tell("told by hand", 1, 2)
    bar.close()
    assert(not pcall(function() local task <close> = progress.task "broken" error "x" end))
    print "the end"
  ]]

  support.it_program("has a line for whatever takes long: loading, tokenising, evaluating, exporting", function()
    local model = support.tiny_folder()
    finally(function() support.remove(model) end)
    local script = support.write(dir .. "/script.lua", SCRIPT)
    local out, err, code = support.shell("%s %s %s", support.program, script, model)
    assert.equals(0, code, err)
    for _, text in ipairs { "loading " .. model, "tokenising", "evaluating", "exporting " .. model, "told by hand" } do
      assert.is_truthy(err:find(text, 1, true), text .. ": " .. err)
    end
    assert.is_nil(err:find("broken", 1, true) or err:find("an error", 1, true), err)
    assert.is_truthy(out:find("the end", 1, true))
    -- On a terminal each line is taken away again, and the training line is rewritten.
    out, code = support.converse(dir, {}, script .. " " .. model)
    assert.equals(0, code, out)
    assert.is_truthy(out:find("\rloading ", 1, true) and out:find("\rexporting ", 1, true), out)
    assert.is_truthy(out:find("\r2/2 [====================]", 1, true), out)
    assert.is_truthy(out:find "\r *\rthe end", out)
  end)

  it("hears of core's own steps", function()
    local core = require "unsloth.core"
    local model = support.tiny_folder()
    finally(function()
      support.remove(model)
      core.set_progress(nil)
      package.loaded["unsloth.progress"] = nil
      require "unsloth.progress"
    end)
    local heard = {}
    core.set_progress(function(what, done, total)
      heard[#heard + 1] = ("%s %d %d"):format(what, done, total)
      if #heard == 2 then error "it is nobody's business" end
    end)
    support.open(model):close()
    assert.same({ "loading 0 2", "loading 1 2" }, heard)
  end)
end)
