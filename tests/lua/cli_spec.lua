-- The program as a child: options, scripts, verbs, exit codes, Ctrl-C. A stock lua5.4 has no program of its own: pending there.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local core = require "unsloth.core"
local unsloth = require "unsloth"

local PROGRAM = support.program

local function check(title, body)
  it(title, function()
    if not PROGRAM then
      pending "this is not unsloth-lua"
      return
    end
    body()
  end)
end

local quote = support.quote

-- Runs the program with these words; returns standard output, standard error, exit status.
local function run(...)
  local words = { ... }
  for i, word in ipairs(words) do words[i] = quote(word) end
  return support.shell("%s %s", PROGRAM, table.concat(words, " "))
end

local function fails(texts, ...)
  local out, err, code = run(...)
  assert.equals(1, code, err)
  for _, text in ipairs(type(texts) == "table" and texts or { texts }) do assert(err:find(text, 1, true), err) end
  return out, err
end

describe("unsloth-lua", function()
  local dir

  setup(function() dir = support.tiny_folder() end)
  teardown(function() support.remove(dir) end)

  check("takes lua's options", function()
    assert.equals("3\n", (run("-e", "print(1 + 2)")))
    assert.equals("7\n", (run("-e", "x = 7", "-e", "print(x)")))
    assert.equals("[1]\n", (run("-l", "j=unsloth.core", "-e", "print(j.json.encode { 1 })")))
    assert.is_truthy(run("-v"):find("Lua 5.4", 1, true))
    assert.is_truthy(run("-h"):find("usage: unsloth-lua", 1, true))
    local out, _, code = support.shell("echo 'print(6 * 7, ...)' | %s - a b", PROGRAM)
    assert.equals("42\ta\tb\n", out)
    assert.equals(0, code)
    local _, err, wrong = run "-q"
    assert.equals(1, wrong)
    assert.is_truthy(err:find("usage", 1, true))
  end)

  check("names the row of a data set's error once, and draws no traceback for a sentence", function()
    local rows = support.write(dir .. "/short.jsonl", '{"instruction":"a","output":"b"}\n{"instruction":"a"}\n')
    local place = rows .. ": line 2: "
    local function said(...)
      local _, err, code = run(...)
      assert.equals(1, code, err)
      local _, times = err:gsub(rows, "")
      assert.equals(1, times, err)
      return err
    end
    local err = said(support.root .. "recipes/llama3_alpaca.lua", "--dataset", rows, "--output", dir .. "/short")
    assert.is_truthy(err:find('^unsloth%-lua: [^\n]+: line 2: "output" is missing; [^\n]+\n\t%(at [^\n]+llama3_alpaca.lua:%d+%)\n$'), err)
    local map = ("require('unsloth').load_dataset('json', { data_files = %q }):map(%%s)"):format(rows)
    err = said("-e", map:format "function(row) return { text = row.instruction .. row.output } end")
    assert.is_truthy(err:find(place .. "(command line):1: attempt to concatenate", 1, true), err)
    assert.equals(1, select(2, err:gsub("stack traceback", "")), err)
    err = said("-e", map:format "function(row) return not row.output and error(setmetatable({}, { __tostring = function() return 'mine' end })) or row end")
    assert.equals("unsloth-lua: " .. place .. "mine\n\t(at (command line):1)\n", err)
  end)

  check("says in a recipe's own words that nothing is left, and where to go on", function()
    local recipe, out = support.root .. "recipes/llama3_alpaca.lua", dir .. "/left"
    local words = { recipe, "--quiet", "--no-gguf", "--output", out, "--save-steps", "2", "--max-steps" }
    local function job(...)
      local all = table.move({ ... }, 1, select("#", ...), #words + 1, { table.unpack(words) })
      return select(2, run(table.unpack(all)))
    end
    assert.equals("", job "2")
    assert.equals(("unsloth: %s/checkpoint-2 has done 2 updates, and 1 are wanted: nothing is left to train; a larger --max-steps goes on\n"):format(out),
      job("1", "--resume"))
    support.write(out .. "/checkpoint-2/trainer_state.json", "")
    local err = job("3", "--resume")
    assert.is_truthy(err:find("leave --resume out", 1, true) and not err:find("resume_from_checkpoint", 1, true), err)
  end)

  check("names what was meant by a method or a field that is not there", function()
    local script = support.write(dir .. "/near.lua", [[
      local unsloth = require "unsloth"
      local FastLanguageModel, t = unsloth.FastLanguageModel, unsloth.zeros(2)
      local own = { first = print }
      local jobs = { function() t:softmx(1) end, function() FastLanguageModel.from_pretraind {} end, function() unsloth.zeros(2):softmx(1) end,
        function() local trainer = setmetatable({}, require("unsloth.sft").Trainer) trainer:trian() end, function() own.frist() end,
        function() own:softmx() end, function(o) o.inner:softmx() end }
      jobs[tonumber(arg[1])] { inner = t }
    ]])
    for i, meant in ipairs { "softmax", "from_pretrained", "softmax", "train", "first", false, "softmax" } do
      local _, err = run(script, tostring(i))
      if meant then
        assert.is_truthy(err:find(("did you mean '%s'?\n"):format(meant), 1, true), err)
      else
        assert.is_nil(err:find("did you mean", 1, true), err)
      end
    end
    fails("did you mean 'load_dataset'?", "-e", "local u = require 'unsloth' u.load_datset 'json'")
  end)

  check("takes the options of lua's that look at the environment", function()
    local out = support.shell("LUA_INIT='print(1)' %s -e 'print(2)'", PROGRAM)
    assert.equals("1\n2\n", out)
    out = support.shell("LUA_INIT='print(1)' LUA_PATH=nowhere %s -E -e 'print(package.path:find \"nowhere\")'", PROGRAM)
    assert.equals("nil\n", out)
    local _, err = support.shell("%s -e 'warn \"a\"' -W -e 'warn \"b\"'", PROGRAM)
    assert.equals("Lua warning: b\n", err)
    _, err = support.shell("%s -e 'error()'", PROGRAM)
    assert.is_truthy(err:find("nil value", 1, true) and err:find("stack traceback", 1, true), err)
    _, err = run "-q"
    assert.is_truthy(err:find("'-q'", 1, true), err)
  end)

  check("runs a script that can be read only once", function()
    local out, err = support.shell("mkfifo %s/once && (echo 'print(6 * 7, ...)' > %s/once & %s %s/once a)", dir, dir, PROGRAM, dir)
    os.remove(dir .. "/once")
    assert.equals("42\ta\n", out, err)
  end)

  check("says what a verb wants in one sentence", function()
    fails("quotes", "generate", dir, "Once", "--prompt", "a")
    fails('"b" stands behind it', "plan", dir, "b")
    fails("not both", "plan", dir, "--shape", "tiny")
    for _, words in ipairs { { "generate" }, { "info" }, { "info", "a", "b" }, { "generate", dir, "--prompt", "a", "--load-in-4bit=false" },
      { "bench", "--shape", "tiny", "--batch", "1e12" }, { "bench", "--shape", "tiny", "--steps", "0" }, { "plan", "--shape", "tiny", "--rows", "x" },
      { "plan", "--shape", "tiny", "--seq", "1.5" } } do
      local _, err, code = run(table.unpack(words))
      assert.equals(1, code, err)
      assert.is_truthy(err:find("^unsloth%-lua: [^\n]+\n[^\n]*\n?$") and not err:find("traceback", 1, true), err)
    end
  end)

  check("refuses values before a model is looked for", function()
    local value = "is \"%s\"; "
    for words, texts in pairs {
      ["generate none --prompt a --temperature foo"] = { "--temperature", value:format "foo", "a number of 0 or more" },
      ["generate none --prompt a --temperature inf"] = { "--temperature", value:format "inf" },
      ["generate none --prompt a --top-p 2"] = { "--top-p", value:format "2", "from 0 to 1" },
      ["generate none --prompt a --top-k 1.5"] = { "--top-k", value:format "1.5", "a whole number" },
      ["generate none --prompt a --dtype float99"] = { "--dtype", value:format "float99", "bfloat16" },
      ["generate none --prompt a --stop ''"] = { "--stop", value:format "" },
      ["generate none --prompt a --adapter /no/such"] = { "/no/such", "no such adapter", "adapter_config.json" },
      ["bench none --steps -1"] = { "--steps", value:format "-1", "from 1 to" },
      ["bench none --json /no/such/file"] = { "--json", "/no/such/file" },
      ["bench none --recompute some"] = { "--recompute", value:format "some", "offload" },
      ["plan none --memory 24XB"] = { "--memory", value:format "24XB", "24GiB" },
      ["plan none --memory 1.2.3"] = { "--memory", value:format "1.2.3" },
      [quote(support.root .. "recipes/llama3_alpaca.lua") .. " --max-steps 0 --model none"] = { "--max-steps", value:format "0" },
    } do
      local _, err, code = support.shell("%s %s", PROGRAM, words)
      assert.equals(1, code, words)
      for _, text in ipairs(texts) do assert(err:find(text, 1, true), err) end
      assert.is_nil(err:find("traceback", 1, true) or err:find("none:", 1, true), err)
    end
  end)

  check("answers a limit of a file's size with a sentence", function()
    local path = dir .. "/large.safetensors"
    local _, err, code = support.shell("ulimit -f 8; %s -e 'local u = require \"unsloth\" local t = {} for i = 1, 50000 do t[i] = i end "
      .. "u.safetensors.save(\"%s\", { a = u.tensor(t) })'", PROGRAM, path)
    assert.equals(1, code, err)
    assert.is_truthy(err:find("large.safetensors: cannot be written", 1, true), err)
    assert.is_nil(io.open(path))
  end)

  -- A limit of a file's size is met as a full disk is: in the midst of a write.
  check("loses nothing that was saved when a checkpoint or an export does not fit the disk", function()
    local script = support.write(dir .. "/disk.lua", ([[
      local unsloth, dir = require "unsloth", %q
      local model = unsloth.FastLanguageModel.from_pretrained { model_name = dir, dtype = "float32", load_in_4bit = false }
      unsloth.FastLanguageModel.get_peft_model(model, { r = 2 })
      local trainer = unsloth.SFTTrainer { model = model, train_dataset = unsloth.dataset_from_list { { text = "one row of text</s>" } },
        args = { max_steps = tonumber(arg[1]), output_dir = dir .. "/disk", save_steps = 1, warmup_steps = 0, lr_scheduler_type = "constant",
          learning_rate = 1e-3, logging_strategy = "no" } }
      trainer:train { resume_from_checkpoint = arg[2] == "resume" }
      model:save_pretrained_gguf(dir .. "/disk/gguf", model.tokenizer, { quantization_method = "f32" })
      print "all is saved"
    ]]):format(dir))
    local function job(limit, ...)
      return support.shell("ulimit -f %s; %s %s %s", limit, PROGRAM, script, table.concat({ ... }, " "))
    end
    local _, err, code = job("unlimited", "2")
    assert.equals(0, code, err)
    local file = dir .. "/disk/gguf/" .. core.list_dir(dir .. "/disk/gguf")[1]
    local exported = support.read(file)
    for _, case in ipairs { { 16, "checkpoint-3" }, { 200, file } } do
      local out
      out, err, code = job(case[1], "3", "resume")
      assert.equals(1, code, out .. err)
      assert.is_truthy(err:find(case[2], 1, true) and err:find("cannot be written", 1, true), err)
      assert.is_nil(err:find("traceback", 1, true) or out:find("all is saved", 1, true), err)
      assert.equals(exported, support.read(file))
      for _, name in ipairs(core.list_dir(dir .. "/disk/gguf")) do assert.is_nil(name:find("tmp", 1, true), name) end
      support.remove(dir .. "/disk/checkpoint-3")
    end
    local out
    out, err, code = job("unlimited", "3", "resume")
    assert.equals(0, code, err)
    assert.is_truthy(out:find("disk/checkpoint-2: step 2 of 3", 1, true), out)
  end)

  check("runs scripts with their words", function()
    local script = support.write(dir .. "/script.lua", "print(#arg, arg[0], ...) if arg[1] == 'fail' then error 'it failed' end")
    assert.equals("2\t" .. script .. "\tone\ttwo words\n", (run(script, "one", "two words")))
    fails({ "it failed", "script.lua:1" }, script, "fail")
    fails({ "/no/such/script.lua", "no such file" }, "/no/such/script.lua")
    fails({ dir .. " is a folder", "unsloth-lua info " .. dir }, dir)
    fails("name is empty", "")
    for _, words in ipairs { { "info", "" }, { "generate", "", "--prompt", "x" }, { "plan", dir, "--shape", "" } } do fails('""', table.unpack(words)) end
    fails({ '--model is ""', "a path is wanted" }, support.root .. "recipes/llama3_alpaca.lua", "--model", "")
    fails("unexpected symbol", "-e", "x = = 1")
    local _, err = fails("learning_rate", "-e", "require('unsloth').SFTConfig { learning_rte = 1 }")
    assert.is_nil(err:find("traceback", 1, true))
  end)

  check("has verbs, each with --help", function()
    for _, verb in ipairs { "info", "generate", "bench", "plan" } do
      local out, _, code = run(verb, "--help")
      assert.equals(0, code, verb)
      assert.is_truthy(out:find("usage: unsloth-lua " .. verb, 1, true))
    end
    fails("--promt", "generate", dir, "--promt", "x")
  end)

  check("says how many threads there are, and takes another number", function()
    local count = "-e 'print(require(\"unsloth.core\").threads())'"
    assert.is_truthy(run("--help"):find("UNSLOTH_LUA_THREADS", 1, true))
    assert.equals("3\n", (support.shell("UNSLOTH_LUA_THREADS=3 %s %s", PROGRAM, count)))
    assert.equals("1\n", (support.shell("taskset -c 0 %s %s", PROGRAM, count)))
    for _, wrong in ipairs { "0", "-1", "two", "1e3", "100000000000" } do
      local _, err, code = support.shell("UNSLOTH_LUA_THREADS=%s %s %s", wrong, PROGRAM, count)
      assert.equals(1, code)
      assert.is_truthy(err:find(('UNSLOTH_LUA_THREADS is "%s"'):format(wrong), 1, true), err)
    end
  end)

  check("info describes a folder, and refuses what it cannot load", function()
    local out, _, code = run("info", dir)
    assert.equals(0, code)
    assert.is_truthy(out:find("2 layers, hidden 32", 1, true))
    assert.is_truthy(out:find("as stored, %S+ %S+ with load_in_4bit"), out)
    assert.is_truthy(out:find "parameters +35168 %(35%.2k%)", out)
    for _, case in ipairs { "bnb_nf4", "bnb_int8" } do -- the model's numbers, not those that a file packs them in
      local packed = run("info", support.root .. "tests/golden/" .. case .. "/model")
      assert.is_truthy(packed:find "parameters +12616 ", packed)
    end
    -- What it says about training is what the planner says.
    local context = tonumber(out:match "context%s+(%d+) tokens")
    for name, words in pairs { ["LoRA, 4%-bit"] = "qlora", ["LoRA, 16%-bit"] = "lora", ["all weights"] = "full" } do
      local least, most = out:match(name .. "%s+(%d+ %a+) on %S+ when every layer is recomputed, (%d+ %a+) when none is")
      for recompute, said in pairs { full = least, none = most } do
        local plan = run("plan", dir, "--method", words, "--recompute", recompute, "--batch", "2", "--seq", tostring(math.min(context, 2048)))
        assert.equals(plan:match "total%s+(%d+ %a+) of", said, name)
      end
    end
    fails("/no/such/path", "info", "/no/such/path")
    local adapter = support.temp_dir()
    support.write(adapter .. "/adapter_config.json", "{}")
    fails("is an adapter", "info", adapter)
    support.remove(adapter)
    fails("script.txt", "info", support.write(dir .. "/script.txt", "text"))
    local other = support.temp_dir()
    support.write(other .. "/config.json", '{"architectures": ["Phi3SmallForCausalLM"]}')
    fails({ "Phi3SmallForCausalLM is not supported", "the nearest one that is: Phi3ForCausalLM", "supported are LlamaForCausalLM" }, "info", other)
    support.write(other .. "/config.json", '{"architectures": ["RWKVForCausalLM"]}')
    local _, err = fails("RWKVForCausalLM is not supported; supported are", "info", other)
    assert.is_nil(err:find("nearest", 1, true), err)
    support.remove(other)
  end)

  check("generates what the library generates", function()
    local out, err, code = run("generate", dir, "--prompt", "Hello", "--max-new-tokens", "8", "--dtype", "float32")
    assert.equals(0, code, err)
    local model <close> = support.open(dir)
    assert.equals(model:generate("Hello", { max_new_tokens = 8 }) .. "\n", out)
  end)

  check("plans over shapes alone", function()
    local out, err, code = run("plan", "--shape", "llama3-70b", "--memory", "4096GiB", "--seq", "2048")
    assert.equals(0, code, err)
    assert.is_truthy(out:find("of 4096.00 GiB", 1, true), out)
    assert.is_truthy(out:find("0 of 80 layers", 1, true), out)
    -- What does not fit is shown all the same.
    out = fails({ "the plan does not fit", "of 40.00 GiB" }, "plan", "--shape", "llama3-70b", "--method", "qlora", "--memory", "40GiB",
      "--device", "cpu", "--seq", "4096")
    local sum = 0
    for size, unit in out:gmatch "\n[%a, -]+ +([%d.]+) ([KMG]iB)%f[\n]" do
      sum = sum + tonumber(size) * ({ KiB = 2 ^ -20, MiB = 2 ^ -10, GiB = 1 })[unit]
    end
    local total = tonumber(out:match "total +([%d.]+) GiB of 40%.00 GiB")
    assert.is_true(total > 40 and math.abs(sum - total) < 0.1, out)
    local model <close> = unsloth.FastLanguageModel.from_pretrained { model_name = dir, plan_only = true }
    local ok, why = pcall(function() return model:logits { 1 } end)
    assert.is_false(ok)
    assert.is_truthy(tostring(why):find("plan_only", 1, true), tostring(why))
  end)

  check("plans and measures a tiny shape", function()
    local out, err, code = run("plan", "--shape", "tiny", "--batch", "1", "--seq", "32")
    assert.equals(0, code, err)
    assert.is_truthy(out:find("total", 1, true))
    local file = dir .. "/bench.json"
    out, err, code = run("bench", "--shape", "tiny", "--steps", "1", "--batch", "1", "--seq", "32", "--json", file)
    assert.equals(0, code, err)
    assert.is_truthy(out:find("tokens/s", 1, true))
    assert.is_truthy(support.read(file):find('"tokens_per_second":', 1, true))
    for _, method in ipairs { "qlora", "lora" } do
      out, err, code = run("bench", "--shape", "tiny", "--method", method, "--decode", "5", "--prompt", "7", "--batch", "3", "--json", file)
      assert.equals(0, code, err)
      assert.is_truthy(tonumber(out:match "decode: ([%d.]+) tokens/s") > 0 and out:find("3 rows, 5 new tokens after 7", 1, true), out)
      assert.is_truthy(tonumber(support.read(file):match '"weight_bytes":(%d+)') > 4 * 5 * 64 * 64 / 8)
    end
    fails("--decode", "bench", "--shape", "tiny", "--decode", "1")
    fails({ "tinny", "tiny" }, "bench", "--shape", "tinny")
  end)

  local MODELS = "data/malformed_models"
  check("info refuses malformed files as the manifest says", function()
    local folder = support.find(MODELS)
    if not folder then
      pending(MODELS .. " is not here")
      return
    end
    for _, entry in ipairs(support.json_lines(folder .. "/MANIFEST.jsonl")) do
      local path = folder .. "/" .. entry.file
      if path:find "%.gz$" then
        local plain = dir .. "/" .. entry.file:gsub("%.gz$", "")
        support.shell("gunzip -c %s > %s", quote(path), quote(plain))
        path = plain
      end
      local out, err, code = run("info", path)
      assert.equals(entry.expect == "ok" and 0 or 1, code, entry.file .. ": " .. out .. err)
      if code == 1 then assert.is_truthy(err:find(path, 1, true), err) end
      if path:find(dir, 1, true) then os.remove(path) end
    end
  end)

  for _, name in ipairs { "stories260K/hf", "stories260K/gguf/stories260K.gguf", "stories260K/gguf/stories260K-Q4_K_M.gguf",
    "gguf/llama-2-tiny-random.gguf", "malformed_models/good.safetensors" } do
    check("info describes " .. name, function()
      local path = support.find("data/" .. name)
      if not path then
        pending(name .. " is not here")
        return
      end
      local out, err, code = run("info", path)
      assert.equals(0, code, err)
      assert.is_truthy(out:find("tensors", 1, true))
      local quantised = name:find "Q4_K_M" ~= nil
      assert.equals(quantised, out:find("stay in their own blocks", 1, true) ~= nil, out)
      if quantised then assert.is_nil(out:find("load_in_4bit", 1, true)) end
    end)
  end

  check("stops at Ctrl-C with a sentence, and what was saved is whole", function()
    local script = support.write(dir .. "/train.lua", ([[
      local unsloth = require "unsloth"
      local dir = %q
      local model = unsloth.FastLanguageModel.from_pretrained { model_name = dir, dtype = "float32", load_in_4bit = false }
      unsloth.FastLanguageModel.get_peft_model(model, { r = 4 })
      io.open(dir .. "/rows.jsonl", "w"):write('{"text":"one row of text</s>"}\n'):close()
      local trainer = unsloth.SFTTrainer { model = model, train_dataset = unsloth.load_dataset("json", { data_files = dir .. "/rows.jsonl" }),
        args = { max_steps = 1000000, save_steps = 5, save_total_limit = 1, output_dir = dir .. "/out", logging_strategy = "no", warmup_steps = 0 },
        callbacks = { on_save = function(t) if t.state.global_step == 10 then
          local stat = io.open("/proc/self/stat"):read "n"
          io.popen("kill -INT " .. stat):close() -- os.execute would ignore the signal
        end end } }
      if arg[1] then trainer.args.max_steps = 12 end
      trainer:train { resume_from_checkpoint = arg[1] }
    ]]):format(dir))
    local _, err, code = run(script)
    assert.equals(130, code, err)
    assert.is_truthy(err:find("^unsloth%-lua: interrupted at step 10 of 1000000; [^\n]*\n$"), err)
    assert.is_truthy(err:find(('"%s/out/checkpoint-10"'):format(dir), 1, true), err)
    local out, resumed, status = run(script, dir .. "/out/checkpoint-10")
    assert.equals(0, status, resumed)
    assert.is_truthy(out:find(("going on from %s/out/checkpoint-10: step 10 of 12"):format(dir), 1, true), out)
  end)

  -- The program sends itself the signal when it has come to the n-th call of a function of core: loading, an answer, an update,
  -- saving, the export.
  local function interrupt_at(place, n)
    return support.shell([[%s -e '
      local core, place, n = require "unsloth.core", "%s", %d
      local class, name = place:match "^(%%a+)%%.([%%a_]+)$"
      local holder = class == "core" and core or core[class]
      local plain, count, own = holder[name], 0, io.open("/proc/self/stat"):read "n"
      holder[name] = function(...)
        count = count + 1
        if count == n then io.popen("kill -INT " .. own):close() end
        return plain(...)
      end
    ' %s --max-steps 3 --output %s]], PROGRAM, place, n, quote(support.root .. "recipes/llama3_alpaca.lua"), dir .. "/alpaca")
  end

  check("ends with 130 and one sentence wherever Ctrl-C comes", function()
    for _, case in ipairs { { "core.model_open", 1 }, { "Model.add_lora", 1 }, { "Model.generator", 1 }, { "Generator.next", 1 },
      { "Generator.next", 20 }, { "core.rows_new", 1 }, { "core.trainer_new", 1 }, { "Trainer.step", 1, 0 }, { "Trainer.step", 3, 2 },
      { "Model.generator", 2 }, { "Model.save_adapter", 1 }, { "core.export_gguf", 1 } } do
      local out, err, code = interrupt_at(case[1], case[2])
      local name = ("%s, call %d: %s%s"):format(case[1], case[2], out, err)
      assert.equals(130, code, name)
      assert.is_truthy(err:find("^unsloth%-lua: interrupted[^\n]+\n$"), name)
      assert.equals(case[3] ~= nil, err:find(("at step %d of 3; "):format(case[3] or 0), 1, true) ~= nil, name)
    end
    local _, err, code = run("-e", [[io.popen("kill -INT " .. io.open("/proc/self/stat"):read "n"):close() while true do end]])
    assert.equals(130, code, err)
    assert.equals("unsloth-lua: interrupted: what was saved before is whole\n", err)
    -- A script that catches it may go on, but not when it comes again at once.
    local out
    out, _, code = run("-e", [[local function stop() io.popen("kill -INT " .. io.open("/proc/self/stat"):read "n"):close() while true do end end
      print(pcall(stop)) pcall(stop) print "alive"]])
    assert.equals(130, code)
    assert.is_nil(out:find "alive")
  end)

  check("says that standard output cannot be written", function()
    for _, words in ipairs { "-e 'print(1)'", "generate --help", "-v", "info " .. quote(dir) } do
      local _, err, code = support.shell("%s %s > /dev/full", PROGRAM, words)
      assert.equals(1, code, words)
      assert.is_truthy(err:find("^unsloth%-lua: standard output cannot be written[^\n]+\n$"), err)
    end
    local _, err, code = support.shell("%s %s --max-steps 2 --no-gguf --output %s/full > /dev/full", PROGRAM,
      quote(support.root .. "recipes/llama3_alpaca.lua"), dir)
    assert.equals(1, code, err)
    local model <close> = unsloth.FastLanguageModel.from_pretrained { model_name = support.root .. "examples/tiny-llama" }
    model:load_adapter(dir .. "/full/adapter")
  end)

  -- A first trainer saves checkpoints; the updates of a second one last for seconds. words: what Lua runs before training.
  local function long_step()
    local rows = {}
    for i = 1, 3000 do rows[i] = ('{"text":"%s</s>"}'):format(("row %d "):format(i):rep(25)) end
    support.write(dir .. "/long.jsonl", table.concat(rows, "\n"))
    return support.write(dir .. "/long.lua", ([[
      local unsloth, dir, job = require "unsloth", %q, arg and arg[1]
      local function train(args, callbacks)
        local model = unsloth.FastLanguageModel.from_pretrained { model_name = dir, dtype = "float32", load_in_4bit = false }
        unsloth.FastLanguageModel.get_peft_model(model, { r = 4 })
        args.output_dir, args.warmup_steps, args.per_device_train_batch_size = dir .. "/long", 0, 1
        args.disable_tqdm, args.logging_strategy = true, "no"
        local data = unsloth.load_dataset("json", { data_files = dir .. "/long.jsonl", split = args.split })
        args.split = nil
        unsloth.SFTTrainer({ model = model, train_dataset = data, args = args, callbacks = callbacks }):train {
          resume_from_checkpoint = job == "resume" }
      end
      train { split = "train[:8]", gradient_accumulation_steps = 1, max_steps = job == "resume" and 3 or 2, save_steps = 2 }
      if job == "resume" then return end
      -- A child watches the processor time of this process, which core's update uses up, and sends the signal in its midst.
      local own = io.open("/proc/self/stat"):read "n"
      local function watch(_, _, rate)
        io.popen(([=[used() { set -- $(cat /proc/%%d/stat); echo $((${14} + ${15})); }
          first=$(used); while [ $(($(used) - first)) -lt 20 ]; do :; done; kill -INT %%d]=]):format(own, own))
        return rate
      end
      train({ gradient_accumulation_steps = 3000, max_steps = 2, save_strategy = "no", lr_scheduler_type = job ~= "calm" and watch or "constant" },
        { on_step = function() print "an update ended" end })
    ]]):format(dir))
  end

  check("stops at Ctrl-C in the middle of an update", function()
    local script = long_step()
    local out, err, code = run(script)
    assert.equals(130, code, out .. err)
    assert.equals('unsloth-lua: interrupted at step 0 of 2; save_strategy is "no", so there is no checkpoint to go on from\n', err)
    assert.is_nil(out:find("an update ended", 1, true))
    local _, complaint, status = run(script, "resume")
    assert.equals(0, status, complaint)
    assert.is_not_nil(unsloth.json.decode(support.read(dir .. "/long/checkpoint-2/trainer_state.json")))
  end)

  check("evaluates lines from a pipe", function()
    local function pipe(words, lines)
      return support.shell("printf '%%s\\n' %s | %s %s", table.concat(lines, " "), PROGRAM, words)
    end
    local lines = {}
    for i, line in ipairs { "1 + 1, 'two'", "= 6 * 7", "x = 5", "error 'it failed'", "for i = 1, 2 do", "print(x + i)", "end", "x" } do
      lines[i] = quote(line)
    end
    local out, err, code = pipe("-i", lines)
    assert.equals(0, code)
    for _, text in ipairs { "2\ttwo", "42", "6\n", "7\n", "5\n" } do assert.is_truthy(out:find(text, 1, true), out) end
    assert.is_truthy(err:find("it failed", 1, true), err)
    out = pipe("-i " .. quote(support.write(dir .. "/first.lua", "y = 9")), { quote "y * y" })
    assert.is_truthy(out:find("81", 1, true), out)
    local _, cut = pipe("-i", { quote "x =" }) -- the input ends before the statement does
    assert.is_truthy(cut:find("unexpected symbol near <eof>", 1, true) and cut:find("1 | x =", 1, true), cut)
  end)

  local function converse(dialogue)
    return support.converse(dir, dialogue)
  end

  check("talks on a terminal", function()
    local out, code = converse { { "> ", "6 * 7" }, { "42", "error 'it failed'" }, { "traceback", "for i = 1, 2 do" }, { ">> ", "print(i * 11) end" },
      { "22", "local x <const> = 8 return x * 8" }, { "64", "^D" } }
    assert.equals(0, code, out)
  end)

  check("leaves a line at Ctrl-C and takes any text", function()
    local out, code = converse { { "> ", "^C" }, { "> ", "for i = 1, 2 do" }, { ">> ", "^C" }, { "> ", "print(#'ä€', 'o' .. 'k')" },
      { "5\tok", "6 * 7" }, { "42", "^D" } }
    assert.equals(0, code, out)
  end)

  check("comes back to the prompt from coroutines, and at the second Ctrl-C from what catches errors", function()
    local loop = "n = (n or 0) + 1 print('turn ' .. n) while true do end"
    local out, code = converse { { "> ", ("coroutine.wrap(function() %s end)()"):format(loop) }, { "turn 1", "^C" },
      { "interrupted", ("print(coroutine.resume(coroutine.create(function() coroutine.wrap(function() %s end)() end)))"):format(loop) },
      { "turn 2", "^C" }, { "false\tinterrupted", ("while true do pcall(function() %s end) end"):format(loop) }, { "turn 3", "^C" },
      { "turn 4", "^C" }, { "interrupted", ("while true do coroutine.wrap(pcall)(function() %s end) end"):format(loop) },
      { "turn 5", "^C" }, { "turn 6", "^C" }, { "interrupted", ("while true do xpcall(function() %s end, print) end"):format(loop) },
      { "turn 7", "^C" }, { "turn 8", "^C" }, { "interrupted", "for i in coroutine.wrap(function() coroutine.yield(42) end) do print(i) end" },
      { "42", "^D" } }
    assert.equals(0, code, out)
    local _, err, status = run("-e", [[local own = io.open("/proc/self/stat"):read "n"
      coroutine.wrap(function() io.popen("kill -INT " .. own):close() while true do end end)()]])
    assert.equals(130, status, err)
    assert.equals("unsloth-lua: interrupted: what was saved before is whole\n", err)
  end)

  check("has coroutines that are Lua's", function()
    local script = support.write(dir .. "/coroutines.lua", [[
      local co = coroutine.create(function(...) local x = coroutine.yield(select("#", ...), ...) error("it failed " .. x, 0) end)
      print(coroutine.resume(co, 1, nil))
      print(coroutine.resume(co, "here"))
      print(coroutine.resume(co))
      print(coroutine.resume(coroutine.running()))
      local f = coroutine.wrap(function() local held <close> = setmetatable({}, { __close = function() print "closed" end }) error "no" end)
      print(pcall(function() f() end))
      print(pcall(f))
      print(pcall(coroutine.wrap, 1))
      print(pcall(coroutine.wrap(function() error({}) end)) == false)
      print(select("#", coroutine.wrap(function() return table.unpack({}, 1, 5000) end)()))
    ]])
    local own, err = run(script)
    local theirs = support.shell("lua5.4 %s", script)
    assert.equals(theirs, own, err)
  end)

  check("comes back to the prompt at Ctrl-C, from a loop of Lua and from an update", function()
    local script = long_step()
    local out, code = converse { { "> ", "print('a' .. 'b') while true do end" }, { "ab", "^C" }, { "interrupted", "6 * 7" },
      { "42", ("arg = { 'calm' } dofile %q"):format(script) }, { "1 x 3000 rows", "^C" }, { "interrupted", "60 + 4" },
      { "64", "^D" } }
    assert.equals(0, code, out)
    assert.is_nil(out:find("an update ended", 1, true))
  end)
end)
