--- Scripts that try to leave the sandbox of examples/embed/04_sandbox.c, or to take more than they may.
---
---     lua5.4 tests/embed/attacks.lua PROGRAM MODEL FOLDER        FOLDER is made and is theirs; beside it lies what is not
local program, model, folder = table.unpack(arg, 1, 3)

-- Exit status: 0 ran to its end, 1 raised an error, 2 stopped by a limit. says: what must be printed.
local RAN, RAISED, STOPPED = 0, 1, 2

-- Each takes at most 64 MiB, 20 million instructions, 20 seconds unless it says otherwise.
local ATTACKS = {
  -- what is allowed works
  { "a recipe", RAN, says = "trained", mib = 512, instructions = 1000000000, [[
    local model, tok = unsloth.FastLanguageModel.from_pretrained { model_name = folder .. "/model", load_in_4bit = true, device = "cpu" }
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, lora_alpha = 4 })
    local ds = unsloth.dataset_from_list { { text = "one two" .. tok.eos_token } }
    ds = ds:map(function(row) return { text = row.text:gsub("one", "three") } end)
    local trainer = unsloth.SFTTrainer { model = model, tokenizer = tok, train_dataset = ds,
      args = { max_steps = 3, per_device_train_batch_size = 1, output_dir = folder .. "/out", save_strategy = "no" } }
    trainer:train()
    model:save_pretrained(folder .. "/adapter")
    tok = unsloth.get_chat_template(tok, "chatml")
    assert(#tok:apply_chat_template({ { role = "user", content = "x" } }, { tokenize = false }) > 1)
    print("trained", require "unsloth" == unsloth)]] },
  { "Lua's own", RAN, [[
    assert(("a,b"):gsub(",", ";") == "a;b" and #("x"):rep(10) == 10 and table.concat({ 1, 2 }, " ") == "1 2")
    local words = {}
    for w in ("one two three"):gmatch "%a+" do words[#words + 1] = w end
    assert(#words == 3 and select("#", table.unpack(words)) == 3)
    table.sort(words); table.insert(words, "x"); table.remove(words)
    local t = setmetatable({}, { __index = function(_, k) return k end })
    assert(t.x == "x" and getmetatable(t).__index and load("return 1 + 1")() == 2)
    local co = coroutine.wrap(function() coroutine.yield(1) end)
    assert(co() == 1 and not pcall(error, "x") and math.floor(1.5) == 1)]] },

  -- out of the sandbox
  { "no io", RAISED, [[io.open("/etc/passwd")]] },
  { "no os", RAISED, [[os.execute("true")]] },
  { "no package", RAISED, [[package.loadlib("x", "*")]] },
  { "no debug", RAISED, [[debug.getregistry()]] },
  { "no other module", RAISED, says = "unsloth alone", [[require "io"]] },
  { "names that are not there", RAN, [[
    for _, name in ipairs { "io", "os", "package", "debug", "dofile", "loadfile", "collectgarbage", "warn", "arg" } do
      assert(_G[name] == nil, name)
    end
    assert(string.dump == nil)
    for _, t in ipairs { _G, string, table, math, utf8, coroutine, unsloth } do
      for k, v in pairs(t) do assert(not (type(k) == "string" and k:find "^__"), k) end
    end]] },
  { "bytecode", RAN, [[
    local f, why = load("\27Lua\x54\0\x19\x93\r\n\x1a\n")
    assert(not f and why:find "binary", why)
    assert(not pcall(load, function() return "\27Lua" end))
    assert(not load("\27Lua", "x", "b"))]] },
  { "an environment of load's", RAN, [[
    assert(load("return io")() == nil and load("return _G")() == _G and load("x = 1", "x", "t", {}))
    assert(not pcall(load("return io.open", "x", "t", {})))]] },
  { "metatables", RAN, [[
    assert(not getmetatable("") and not getmetatable(unsloth.tensor { 1, 2 }))
    local ok, e = pcall(unsloth.load_dataset, "json", { data_files = folder .. "/none.json" })
    assert(not ok and not getmetatable(e))
    assert(getmetatable(unsloth.json.decode "{}") == false)
    assert(getmetatable(setmetatable({}, { __metatable = "mine" })) == "mine")]] },
  { "changed libraries", RAN, mib = 512, [[
    string.format, string.match, table.concat, error, pcall, setmetatable = nil, nil, nil, nil, nil, nil
    local model = unsloth.FastLanguageModel.from_pretrained { model_name = folder .. "/model", device = "cpu" }
    assert(model:generate("x", { max_new_tokens = 2 }))]] },

  -- files
  { "a file outside", RAISED, says = "does not allow", [[unsloth.load_dataset("json", { data_files = "/etc/passwd" })]] },
  { "no looking either", RAN, [[
    local function why(path)
      local _, e = pcall(unsloth.FastLanguageModel.from_pretrained, { model_name = path })
      return tostring(e):gsub("/[%w/]+", "")
    end
    assert(why "/etc" == why "/nowhere/at/all" and why "/etc/passwd" == why "/etc/none", why "/etc")]] },
  { "up and out", RAISED, says = "does not allow", [[unsloth.load_dataset("json", { data_files = folder .. "/../secret.json" })]] },
  { "up and out through nothing", RAISED, says = "does not allow", [[
    unsloth.safetensors.save(folder .. "/none/../../written.safetensors", { x = unsloth.tensor { 1 } })]] },
  { "through a link", RAISED, says = "does not allow", [[unsloth.load_dataset("json", { data_files = folder .. "/link/secret.json" })]] },
  { "through a link to nowhere", RAISED, says = "does not allow", [[
    unsloth.safetensors.save(folder .. "/dangling", { x = unsloth.tensor { 1 } })]] },
  { "a folder that begins alike", RAISED, says = "does not allow", [[unsloth.load_dataset("json", { data_files = folder .. "2/secret.json" })]] },
  { "shards elsewhere", RAISED, says = "plain name", [[
    unsloth.FastLanguageModel.from_pretrained { model_name = folder .. "/shards", device = "cpu" }]] },
  { "writing", RAISED, says = "does not allow", [[unsloth.safetensors.save("/tmp/attack.safetensors", { x = unsloth.tensor { 1 } })]] },
  { "a template of that path", RAISED, [[
    local tok = unsloth.AutoTokenizer.from_pretrained(folder .. "/model")
    unsloth.get_chat_template(tok, "../../../../etc/passwd")]] },

  -- instructions
  { "a loop", STOPPED, says = "instructions", [[while true do end]] },
  { "a loop that catches", STOPPED, says = "instructions", [[while true do pcall(function() while true do end end) end]] },
  { "a handler that loops", STOPPED, [[xpcall(function() while true do end end, function() while true do end end) while true do end]] },
  { "coroutines", STOPPED, [[
    while true do coroutine.wrap(function() for i = 1, 200 do end end)() end]] },
  { "a coroutine that catches", STOPPED, [[
    local co = coroutine.create(function() while true do pcall(function() while true do end end) end end)
    while true do coroutine.resume(co) end]] },
  { "__close", STOPPED, [[
    local function f() local x <close> = setmetatable({}, { __close = function() while true do end end }) error "x" end
    while true do pcall(f) end]] },
  { "__close of a coroutine", STOPPED, [[
    local function spin() while true do end end
    coroutine.wrap(function() local x <close> = setmetatable({}, { __close = spin }) spin() end)()]] },
  { "coroutine.close", STOPPED, [[
    local function spin() while true do end end
    local co = coroutine.create(function() local x <close> = setmetatable({}, { __close = spin }) spin() end)
    coroutine.resume(co)
    while true do pcall(coroutine.close, co) end]] },
  { "handlers and yields", RAN, [[
    local co = coroutine.wrap(function(a)
      local ok, b = xpcall(function(x) return coroutine.yield(x) + 1 end, error, a)
      local bad, why = xpcall(function() error("x", 0) end, function(e) return "handled " .. e end)
      assert(ok and not bad and why == "handled x")
      return b
    end)
    assert(co(1) == 1 and co(2) == 3)
    assert(not pcall(co))
    local _, e = pcall(coroutine.wrap(function() error("y", 0) end))
    assert(e == "y")]] },
  { "a finalizer", RAISED, says = "__gc", [[
    setmetatable({}, { __gc = function() while true do end end })]] },
  { "a finalizer through the library", RAN, [[
    local ok, e = pcall(unsloth.load_dataset, "json", { data_files = folder .. "/none.json" })
    for _, t in ipairs { e, unsloth.TrainingArguments {}, unsloth.json.decode '[{"a": 1}]', unsloth.json.decode '{"a": 1}' } do
      local mt = getmetatable(t)
      assert(not mt, type(mt))
      local class = t.__index
      if type(class) == "table" then class.__gc = function() while true do end end end
    end
    pcall(unsloth.TrainingArguments, {})
    for i = 1, 1000 do local t = {} end]] },
  { "a comparison", STOPPED, [[table.sort({ 1, 2, 3, 4 }, function() while true do end end)]] },
  { "an error that is asked for its words", STOPPED, [[error(setmetatable({}, { __tostring = function() while true do end end }))]] },
  { "a data set that does not end", STOPPED, [[
    unsloth.dataset_from_list { { text = "a" } }:map(function() while true do pcall(function() while true do end end) end end)]] },

  -- C that loops
  { "string.rep of nothing", RAISED, says = "string.rep", [[return ("").rep("", 1 << 60)]] },
  { "a pattern without end", RAISED, says = "pattern", [[
    return (("a"):rep(30000) .. "b"):find(".-.-.-.-.-c")]] },
  { "a pattern by another way", RAISED, says = "pattern", [[
    local ok, e = pcall(string.gsub, ("a"):rep(30000), ".-.-.-.-.-c", "")
    error(e, 0)]] },
  { "table.move", RAISED, says = "range", [[table.move({}, 1, math.maxinteger - 1, 2)]] },
  { "table.concat", RAISED, says = "range", [[table.concat(setmetatable({}, { __index = function() return "" end }), "", 1, 1 << 60)]] },
  { "a length that lies", RAISED, says = "__len", [[table.insert(setmetatable({}, { __len = function() return 1 << 60 end }), 1, 1)]] },
  { "the same for sort", RAISED, says = "__len", [[table.sort(setmetatable({}, { __len = function() return (1 << 31) - 2 end }), math.type)]] },
  { "long work in C, often", STOPPED, [[local s = ("a"):rep(8000) while true do s:find(".-b") end]] },

  -- memory
  { "a string", STOPPED, says = "memory", [[local s = "x" while true do s = s .. s end]] },
  { "a string, caught", STOPPED, says = "memory", [[while true do pcall(string.rep, "x", 9000000, "yyyyyyyyyyyyyyyyyyyy") end]] },
  { "a table", STOPPED, says = "memory", [[local t = {} for i = 1, 1 << 40 do t[i] = i end]] },
  { "caught and tried again", STOPPED, says = "memory", [[
    while true do pcall(function() local t = {} for i = 1, 1 << 40 do t[i] = { i } end end) end]] },
  { "a tensor", STOPPED, says = "memory", mib = 8, [[
    local row, held = {}, {}
    for i = 1, 10000 do row[i] = 0 end
    for i = 1, 10000 do held[i] = unsloth.tensor(row) end]] },
  { "garbage is fine", RAN, instructions = 2000000000, [[
    for i = 1, 60 do local s = ("x"):rep(1 << 20) .. i end
    for i = 1, 200 do unsloth.tensor { i } end]] },
  { "recursion", RAISED, says = "overflow", mib = 256, [[local function f() return 1 + f() end f()]] },

  -- time
  { "a training without end", STOPPED, says = "time", mib = 512, seconds = 1, instructions = 1 << 50, [[
    local model, tok = unsloth.FastLanguageModel.from_pretrained { model_name = folder .. "/model", device = "cpu" }
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, lora_alpha = 4 })
    local trainer = unsloth.SFTTrainer { model = model, tokenizer = tok, train_dataset = unsloth.dataset_from_list { { text = "a b c" } },
      args = { max_steps = 1 << 30, per_device_train_batch_size = 1, save_strategy = "no" } }
    while true do pcall(function() for _ in trainer:steps() do end end) end]] },
}

local function shell(...)
  local words = { ... }
  for i, word in ipairs(words) do words[i] = "'" .. tostring(word):gsub("'", "'\\''") .. "'" end
  return table.concat(words, " ")
end

local function run(command)
  assert(os.execute(command), command)
end

local function write(path, text)
  local file <close> = assert(io.open(path, "wb"))
  file:write(text)
end

-- What lies there: a model, and ways out.
local beside = folder:match "^(.*)/" or "."
run(shell("rm", "-rf", folder, folder .. "2", beside .. "/secret.json", beside .. "/written.safetensors"))
run(shell("mkdir", "-p", folder .. "/shards", folder .. "2"))
run(shell("cp", "-r", model, folder .. "/model"))
run(shell("cp", folder .. "/model/config.json", folder .. "/shards/config.json"))
write(folder .. "/shards/model.safetensors.index.json", '{"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../../secret.json"}}')
write(beside .. "/secret.json", '[{"text": "secret"}]')
write(folder .. "2/secret.json", '[{"text": "secret"}]')
run(shell("ln", "-s", "..", folder .. "/link"))
run(shell("ln", "-s", "../not-there", folder .. "/dangling"))

local failed = 0
for _, a in ipairs(ATTACKS) do
  local script = beside .. "/attack.lua"
  write(script, a[3])
  local started = os.time()
  local pipe = assert(io.popen("timeout 60 " ..
    shell(program, folder, script, a.mib or 64, a.instructions or 20000000, a.seconds or 20) .. " 2>&1"))
  local text = pipe:read "a"
  local _, how, status = pipe:close()
  local secret = text:find("secret\"", 1, true)
  if how ~= "exit" or status ~= a[2] or (a.says and not text:find(a.says, 1, true)) or secret then
    failed = failed + 1
    print(("FAILED %s: %s %d after %d s, %d%s was wanted:\n%s"):format(a[1], how, status, os.time() - started, a[2],
      a.says and (' and "' .. a.says .. '"') or "", text))
  end
end
local leaked = io.open(beside .. "/written.safetensors") or io.open(beside .. "/not-there") or io.open "/tmp/attack.safetensors"
if leaked then
  failed = failed + 1
  print "FAILED: a file was written outside"
end
print(("%d scripts, %d failed"):format(#ATTACKS, failed))
os.exit(failed == 0)
