-- The prompt on a real pseudo terminal: editing, completion, history, help, errors, Ctrl-C. And what it prints, without one.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"
local show = require "unsloth.show"
local complete = require "unsloth.complete"
local doc = require "unsloth.doc"

describe("the prompt on a terminal", function()
  local dir

  setup(function()
    dir = support.tiny_folder()
    support.write(dir .. "/only_file.txt", "")
  end)
  teardown(function() support.remove(dir) end)

  local function talk(dialogue)
    local out, code = support.converse(dir, dialogue)
    assert.equals(0, code, out)
    return out
  end

  support.it_program("completes names, fields, methods, options and files with the tab key", function()
    talk { { "> ", [[unsloth.FastLanguageModel.from_pre\t]] }, { "from_pretrained", [[ { load_in_4b\t]] }, { "load_in_4bit = ", "1 }" },
      { "load_in_4bit must be boolean", ([[model = unsloth.FastLanguageModel.from_pretrained { model_name = "%s" }]]):format(dir) },
      { "> ", [[model:print_tr\t]] }, { "print_trainable_parameters(", ")" }, { "trainable params", [[model:layer(1).down_p\t]] },
      { "down_proj", ".weight.shape" }, { "{ 32, 64 }", ([[#io.open("%s/only_\t]]):format(dir) }, { "only_file.txt", '"):read "a"' },
      { "0", [[help "learning_ra\t]] }, { "learning_rate", '"' }, { "default 5e-05", "^D" } }
  end)

  support.it_program("keeps locals for the lines that follow, and so takes a recipe that is pasted", function()
    talk { { "> ", "local x <const>, y = 6, 7" }, { "> ", "local function f()" }, { ">> ", "local hidden = x * y return hidden end local z" },
      { "> ", "f()" }, { "42", "print(hidden, z, 'local w')" }, { "nil\tnil\tlocal w", "^D" } }
    local recipe = support.read(support.root .. "README.md"):match "```lua\n(.-)```"
    recipe = recipe:gsub("examples/", support.root .. "examples/"):gsub("max_steps = %d+", "max_steps = 1"):gsub('"outputs', '"' .. dir .. "/outputs")
    local out, err, code = support.shell("%s -i < %s", support.program, support.quote(support.write(dir .. "/recipe", recipe)))
    assert.equals(0, code, err)
    assert.is_nil(err:find("nil value", 1, true) or err:find("traceback", 1, true), err)
    assert.is_truthy(support.read(dir .. "/outputs/adapter/adapter_config.json"), out)
  end)

  it("rewrites locals of the top level alone", function()
    local globals = require("unsloth.toplevel").globals
    for text, wanted in pairs {
      ["local a, b <const> = 1, 2 return a"] = " a, b = 1, 2 return a", ["local a"] = "a = nil", ["local a,\nb\n= 1"] = "a, b\n\n= 1",
      ["local function f() local x = 1 end local y = 2"] = " function f() local x = 1 end y = 2",
      ["local f <close> = g()"] = "local f <close> = g()", ["local _ENV = {}"] = "local _ENV = {}",
      ["if x then local y end local z = [[ local end ]] -- local w"] = "if x then local y end z = [[ local end ]] -- local w",
      ["repeat local x until x local s = 'it\\'s do' local t = 3"] = "repeat local x until x s = 'it\\'s do' t = 3",
      ["--[==[ do ]] ]==] local x = 0x1p4"] = "--[==[ do ]] ]==] x = 0x1p4", ["x.locally = a.locals"] = "x.locally = a.locals",
    } do
      local got = globals(text)
      assert.equals((wanted:gsub("^%s+", "")), (got:gsub("^%s+", "")))
      assert(load(got), got)
    end
  end)

  support.it_program("does what people mean by help, quit and exit", function()
    local out = talk { { "Ctrl-D or quit leaves", "help" }, { "tells of a function", "quit = 7" }, { "> ", "quit" }, { "7", "quit = nil" }, { "> ", "quit" } }
    assert.is_truthy(out:find("classes: ", 1, true), out)
    for _, word in ipairs { "exit", "exit()", " quit ();" } do talk { { "> ", word } } end
  end)

  support.it_program("says what was saved in a line", function()
    local out = talk { { "> ", ([[model = unsloth.FastLanguageModel.from_pretrained { model_name = "%s" }]]):format(dir) },
      { "> ", ([[model:save_pretrained_merged("%s/merged")]]):format(dir) },
      { "checked: weights", ([[model:save_pretrained_gguf("%s/gguf", nil, "f16")]]):format(dir) },
      { "unsloth.F16.gguf\t", ([[unsloth.plot({ 3, 1, 2 }):svg "%s/x.svg"]]):format(dir) }, { "x.svg", "#select(2, model:save_pretrained_gguf('"
        .. dir .. "/gguf', nil, { quantization_method = { 'f16', 'q8_0' } }))" }, { "2", "^D" } }
    assert.is_nil(out:find("bytes =", 1, true) or out:find("<path", 1, true), out)
    assert.is_truthy(support.read(dir .. "/x.svg"):find("<path", 1, true))
  end)

  support.it_program("lists what may come at the second tab", function()
    talk { { "> ", [[unsloth.ran\t]] }, { "rand", [[\t]] }, { "randn", "(2, { seed = 1 }).shape" }, { "{ 2 }", "^D" } }
  end)

  support.it_program("keeps a history over its end", function()
    talk { { "> ", "11 * 3" }, { "33", "for i = 1, 1 do" }, { ">> ", "print(i + 76) end" }, { "77", "^D" } }
    talk { { "> ", "^P" }, { "print(i + 76) end", "" }, { "77", "^P" }, { "print(i + 76) end", "" }, { "77", "^D" } }
    assert.is_truthy(support.read(dir .. "/.unsloth_lua_history"):find("11", 1, true))
  end)

  support.it_program("explains errors: the line, the name that was meant", function()
    local out = talk { { "> ", "modle = 7" }, { "> ", "model" }, { "did you mean 'modle'?", "for i = 1, 1 do" }, { ">> ", "unsloth.tenser {}" },
      { ">> ", "end" }, { "did you mean 'tensor'?", "x = = 1" }, { "unexpected symbol", "(1)()" }, { "attempt to call", "^D" } }
    assert.is_truthy(out:find("2 | unsloth.tenser {}", 1, true), out)
    assert.is_truthy(out:find("^^^^^^", 1, true), out)
    assert.is_truthy(out:find("1 | x = = 1", 1, true), out)
  end)

  -- A callback prints before the signal is sent, so that it comes in the midst of the work.
  support.it_program("comes back at Ctrl-C from loading, an answer and a step with everything intact", function()
    support.write(dir .. "/rows.jsonl", ('{"text":"one row of text</s>"}\n'):rep(64))
    local out = talk {
      { "> ", ([[model, tok = unsloth.FastLanguageModel.from_pretrained { model_name = "%s", dtype = "float32", load_in_4bit = false }]]):format(dir) },
      { "> ", "count = 0 while true do count = count + 1 for p in model:stream('Hello', { max_new_tokens = 200, eos_token_id = { -1 } }) do "
        .. "if count == 1 then print('go' .. 'ing') count = 2 end end end" },
      { "going", "^C" }, { "interrupted", "#model:generate('Hello', { max_new_tokens = 4 }) >= 0" },
      { "true", "unsloth.FastLanguageModel.get_peft_model(model, { r = 4 }).max_seq_length" },
      { "256", ([[t = unsloth.SFTTrainer { model = model, train_dataset = unsloth.load_dataset("json", { data_files = "%s/rows.jsonl" }), ]]):format(dir)
        .. ([[args = { max_steps = 1000000, output_dir = "%s/out", save_strategy = "no", logging_strategy = "no", warmup_steps = 0 }, ]]):format(dir)
        .. [[callbacks = { on_step = function(_, s) if s.step == 2 then print("st" .. "epping") end end } }]] },
      { "> ", "for step in t:steps() do end" }, { "stepping", "^C" }, { "interrupted at step", "at = t.state.global_step" },
      { "> ", "t:step().step == at + 1" }, { "true", "t" }, { "64 rows", "#model:generate('Hello', { max_new_tokens = 4 }) >= 0" },
      { "true", "while true do unsloth.FastLanguageModel.from_pretrained({ model_name = model.name_or_path }):close() "
        .. "if not once then once = print('load' .. 'ing') or true end end" },
      { "loading", "^C" }, { "interrupted", "6 * 7" }, { "42", "^D" } }
    assert.is_nil(out:find("traceback", 1, true), out)
  end)

  -- The prompt's text is made where nothing runs: a Ctrl-C that comes then leaves the line, and the program goes on.
  support.it_program("meets a Ctrl-C that comes between two calls", function()
    local path = support.write(dir .. "/lines", [[
      own = io.open("/proc/self/stat"):read "n"
      function raises(text) return setmetatable({}, { __tostring = function()
        if not sent then sent = io.popen("kill -INT " .. own):close() end return text end }) end
      _PROMPT = raises "> "
      print("first", 6 * 7, sent)
      sent, _PROMPT, _PROMPT2 = nil, nil, raises ">> "
      for i = 1, 1 do
      print("second", 6 * 7, sent)
      for i = 1, 1 do
      print("third", i) end
    ]])
    local out, err, code = support.shell("%s -i < %s", support.program, support.quote(path))
    assert.equals(0, code, out .. err)
    for _, text in ipairs { "first\t42\ttrue\n", "second\t42\ttrue\n", "third\t1\n" } do assert.is_truthy(out:find(text, 1, true), out .. err) end
    assert.equals("", err)
  end)
end)

describe("values", function()
  local dir, model, tokenizer

  setup(function()
    dir = support.tiny_folder()
    model, tokenizer = support.open(dir)
  end)
  teardown(function()
    model:close()
    support.remove(dir)
  end)

  it("print as people read them", function()
    local text = tostring(unsloth.zeros(20, 3))
    assert.is_truthy(text:find("[tensor 20x3, float32, cpu]", 1, true))
    assert.is_truthy(text:find("...", 1, true))
    assert.is_true(#text < 400, text)
    assert.equals("  1  2  3\n[tensor 3, int32, cpu]", tostring(unsloth.tensor({ 1, 2, 3 }, "int32")))
    assert.is_truthy(tostring(unsloth.zeros(2, 2, 2)):find("(2, :, :)", 1, true))
    assert.is_truthy(tostring(unsloth.zeros(0, 3)):find("0x3", 1, true))
    assert.equals("1\ttwo\tnil", show.results(1, "two", nil))
    assert.equals('{ 1, 2, a = { b = "x\\ny" } }', show.results { 1, 2, a = { b = "x\ny" } })
    local loop = {}
    loop.self = loop
    assert.equals("{ self = { ... } }", show.results(loop))
  end)

  it("show a model as a tree with counts and bytes", function()
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4 })
    local text = tostring(model)
    local info = model:info()
    assert.is_truthy(text:find("0 to 1: 2 times", 1, true), text)
    assert.is_truthy(text:find("64x32 f32, LoRA of rank 4", 1, true), text)
    assert.is_truthy(text:find(show.count(info.trainable) .. " trained", 1, true), text)
    local sum = 0
    for _, p in ipairs(model:param_list()) do
      local n = 1
      for _, d in ipairs(p.shape) do n = n * d end
      sum = sum + n
    end
    assert.equals(info.parameters, sum)
  end)

  it("show a data set as a table, a history as a line of bars", function()
    local ds = unsloth.dataset_from_list { { a = "x\ny", n = 1 }, { a = ("long "):rep(30), n = 22 } }
    local text = tostring(ds)
    assert.is_truthy(text:find("x\\ny", 1, true) and text:find("…", 1, true) and text:find("2 rows", 1, true), text)
    local history = {}
    for i = 1, 100 do history[i] = { step = i, loss = 100 / i } end
    text = show.results(history)
    assert.is_truthy(text:find("█", 1, true) and text:find("100.0000 -> 1.0000", 1, true), text)
    assert.equals("▁█?", show.sparkline { 0, 1, 0 / 0 })
    assert.is_truthy(tostring(tokenizer):find("259 tokens", 1, true))
  end)

  it("of strangers steer no terminal", function()
    local bad = "\27[31mred\r\u{9b}2J\x9b\127ü"
    local valid = bad:gsub("\x9b\127", "\127")
    local ds = unsloth.dataset_from_list { { [valid] = valid, n = { valid } } }
    for _, text in ipairs { tostring(ds), show.results(bad), show.results { bad, [bad] = 1 }, show.results(bad, 2) } do
      assert.is_nil(text:find "[%z\1-\8\11-\31\127]", text)
      assert.is_nil(text:find("\u{9b}", 1, true) or text:find("\x9b", 1, true), text)
      assert.is_truthy(text:find("31mred", 1, true) and text:find("ü", 1, true), text)
    end
    assert.equals([[a\x1B[0m\xC2\x9B€\xFF\n]], unsloth.printable("a\27[0m\u{9b}€\xff\n", true))
    assert.equals("one\n\ttwo", unsloth.printable "one\n\ttwo")
    local note = support.shell("%s -e %s 2>&1", support.program or "true", support.quote [[require("unsloth.errors").note("a\27[0m")]])
    assert.is_nil(note:find("\27", 1, true), note)
  end)

  it("complete without running anything of the user's", function()
    local ran = false
    local globals = complete.globals -- busted's own are others
    globals.trap, globals.unsloth = setmetatable({}, { __index = function() ran = true end }), unsloth
    finally(function() globals.trap, globals.unsloth = nil, nil end)
    complete.complete "trap."
    complete.complete "trap:x().y"
    assert.is_false(ran)
    local names, first = complete.complete "print(unsloth.load_d"
    assert.same({ "load_dataset" }, names)
    assert.equals(15, first)
    assert.same({}, (complete.complete "-- a comm"))
    assert.same({ "while" }, (complete.complete "whi"))
  end)
end)

describe("help", function()
  it("knows every public function, each with a text and an example", function()
    local bare = {}
    for _, known in ipairs(doc.all()) do
      if not known.entry or #known.entry.text == 0 or #known.entry.example == 0 then bare[#bare + 1] = known.name end
    end
    assert.same({}, bare)
  end)

  it("cuts no sentence", function()
    for _, topic in ipairs { "", "Tensor", "Model", "Dataset", "show", "sft", "doc" } do
      local entry
      for line in (doc.text(topic ~= "" and topic or nil) .. "\n"):gmatch "(.-)\n" do
        local more = line:match "^ +(%S.*)$"
        if line:find "^  %S+  +%S" or line:find "^  %S+%(.*%)  *%S" then
          if entry then assert.is_truthy(entry:find "[.]$", entry) end
          entry = not line:find "classes:" and line or nil
        elseif entry and more and line:find "^          " then
          entry = entry .. " " .. more
        else
          if entry then assert.is_truthy(entry:find "[.]$", entry) end
          entry = nil
        end
      end
    end
    assert.is_truthy(doc.text("Tensor"):find("argmax%(dim, keepdim%).-or along a%s+dimension%."))
  end)

  it("finds functions, methods, options, modules, and what is near", function()
    assert.is_truthy(doc.text(unsloth.plot):find("unsloth.plot(values, opts)", 1, true))
    assert.is_truthy(doc.text("Tensor:softmax"):find("softmax", 1, true))
    assert.is_truthy(doc.text("generate"):find("max_new_tokens", 1, true))
    assert.is_truthy(doc.text("lora_alpha"):find("get_peft_model", 1, true))
    assert.is_truthy(doc.text("plot"):find("example", 1, true))
    assert.is_truthy(doc.text(unsloth.tensor { 1 }):find("Tensor:matmul(other)", 1, true), doc.text(unsloth.tensor { 1 }))
    assert.is_truthy(doc.text("from_pretraned"):find("from_pretrained", 1, true))
    assert.is_truthy(doc.text("FROM_PRETRAINED"):find("max_seq_length", 1, true))
    for topic, texts in pairs { gguf = { "llama.cpp", '"Model:save_pretrained_gguf"' }, GGUF = { "llama.cpp" }, adapter = { '"get_peft_model"' },
      LoRA = { '"Model:load_adapter"' }, resume = { "--resume", '"save_steps"' }, training = { '"SFTTrainer"' }, trainer = { "Trainer:step" },
      quit = { "Ctrl-D" }, export = { "save_pretrained_merged", "unsloth-lua export" } } do
      local text = doc.text(topic)
      assert.is_nil(text:find("there is no help", 1, true), topic)
      for _, part in ipairs(texts) do assert.is_truthy(text:find(part, 1, true), text) end
      -- What a text leads to is there.
      for name in text:gmatch 'help "([^"]+)"' do assert.is_nil(doc.text(name):find("there is no help", 1, true), name) end
    end
    assert.is_truthy(doc.text():find("FastLanguageModel", 1, true) or doc.text():find("model", 1, true))
  end)
end)
