-- The BPE trainer, and the recipes from end to end on tiny settings.
local bpe = require "unsloth.bpe_trainer"
local core = require "unsloth.core"
local unsloth = require "unsloth"

local TEXT = [[
The quick brown fox said: "I'll not go, and you shan't make me!"
They've gone 1234567 miles   over the hill, and we're late.

	O for a muse of fire, that would ascend the brightest heaven of invention;
a kingdom for a stage, princes to act, and monarchs to behold the swelling scene!
The naive cafe na\239ve caf\195\169 -- sung, singing, ringing, bringing, the thing.
]]

local function temp_dir()
  local path = os.tmpname()
  os.remove(path)
  core.make_dir(path)
  finally(function() core.remove_path(path) end)
  return path
end

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "a"
  file:close()
  return text
end

-- Runs a recipe in this very interpreter; returns what it printed and what it raised.
local function run(script, ...)
  local printed, old_print, old_arg = {}, print, arg
  _G.print = function(...) printed[#printed + 1] = table.concat({ ... }, "\t") end
  _G.arg = { [0] = script, ... }
  local ok, err = pcall(dofile, script)
  _G.print, _G.arg = old_print, old_arg
  return table.concat(printed, "\n"), not ok and tostring(err) or nil
end

describe("bpe_trainer", function()
  it("cuts words as Llama 3 does", function()
    local words = {}
    for word in bpe.words "I'll  go 12345!\n\n  now" do words[#words + 1] = word end
    assert.are.same({ "I", "'ll", " ", " go", " ", "123", "45", "!\n\n", " ", " now" }, words)
  end)

  it("merges the commonest pair first", function()
    local trained = bpe.train(("ab"):rep(10) .. " " .. ("abc "):rep(20), 260)
    assert.are.equal("ab", trained.tokens[257])
    assert.are.same({ 97, 98 }, trained.merges[1])
  end)

  it("gives the same vocabulary every time, and no token twice", function()
    local one, two, seen = bpe.train(TEXT, 330), bpe.train(TEXT, 330), {}
    assert.are.same(one, two)
    for _, token in ipairs(one.tokens) do
      assert.is_nil(seen[token])
      seen[token] = true
    end
  end)

  it("refuses a vocabulary without room for the bytes", function()
    local ok, err = pcall(bpe.train, TEXT, 100)
    assert.is_false(ok)
    assert.matches("too small", tostring(err))
  end)

  it("writes a tokenizer that loads, adds BOS, uses its merges and decodes to the same bytes", function()
    local dir = temp_dir()
    local bos, eos = bpe.write(dir, bpe.train(TEXT, 330), { model_max_length = 64 })
    local tok = unsloth.AutoTokenizer.from_pretrained(dir)
    assert.are.equal(bos, tok.bos_token_id)
    assert.are.equal(eos, tok.eos_token_id)
    assert.are.equal(eos + 1, tok.vocab_size)
    local text = TEXT:gsub("\239", "")
    local ids = tok:encode(text)
    assert.are.equal(bos, ids[1])
    assert.is_true(#ids < #text * 3 / 4)
    assert.are.equal(text, tok:decode(ids, { skip_special_tokens = true }))
    assert.are.same({ eos }, tok:encode("<|end_of_text|>", { add_special_tokens = false }))
  end)
end)

describe("examples/instructions.json", function()
  it("holds 100 rows or more of three plain ASCII texts, none twice", function()
    local rows, seen = unsloth.json.decode(read "examples/instructions.json"), {}
    assert.is_true(#rows >= 100)
    for i, row in ipairs(rows) do
      for _, key in ipairs { "instruction", "input", "output" } do
        assert.are.equal("string", type(row[key]), ("row %d, %s"):format(i, key))
        assert.is_nil(row[key]:find "[\128-\255]")
      end
      assert.is_true(row.instruction ~= "" and row.output ~= "")
      local task = row.instruction .. "\n" .. row.input
      assert.is_nil(seen[task], task)
      seen[task] = true
    end
  end)
end)

describe("recipes", function()
  it("pretrain_tiny makes a model whose loss falls, llama3_alpaca trains it and saves", function()
    local dir = temp_dir()
    local file = assert(io.open(dir .. "/text.txt", "wb"))
    file:write((TEXT:gsub("\239", ""):rep(6)))
    file:close()
    local said, err = run("recipes/pretrain_tiny.lua", "--text", dir .. "/text.txt", "--output", dir .. "/tiny", "--steps", "30",
      "--vocab", "300", "--hidden", "64", "--layers", "1", "--intermediate", "64", "--row", "200", "--learning-rate", "5e-3")
    assert.is_nil(err)
    local first, last = said:match "loss ([%d.]+) %-> ([%d.]+)"
    assert.is_true(tonumber(last) < tonumber(first) - 0.5, said)
    assert.is_truthy(core.path_kind(dir .. "/tiny/model.safetensors"))

    local again
    again, err = run("recipes/llama3_alpaca.lua", "--model", dir .. "/tiny", "--max-steps", "4", "--learning-rate", "1e-2",
      "--output", dir .. "/out")
    assert.is_nil(err)
    assert.matches("Reply before training", again)
    assert.matches("Reply after training", again)
    assert.is_truthy(core.path_kind(dir .. "/out/adapter/adapter_model.safetensors"))
    assert.is_truthy(core.path_kind(dir .. "/out/gguf/unsloth.Q4_K_M.gguf"))
    local model = unsloth.FastLanguageModel.from_pretrained { model_name = dir .. "/out/gguf/unsloth.Q4_K_M.gguf", load_in_4bit = false }
    assert.is_true(#model:generate_ids({ 1, 2, 3 }, { max_new_tokens = 2 }) > 0)
  end)

  it("llama3_alpaca finds the shipped model and data, says so, and learns the shape of an answer", function()
    local dir = temp_dir()
    local said, err = run("recipes/llama3_alpaca.lua", "--max-steps", "8", "--no-gguf", "--output", dir .. "/out")
    assert.is_nil(err)
    assert.matches("No --model was given", said, 1, true)
    local first, last = said:match "loss ([%d.]+) %-> ([%d.]+)"
    assert.is_true(tonumber(last) < tonumber(first) - 0.5, said)
    assert.is_nil(core.path_kind(dir .. "/out/gguf"))
  end)

  it("an unknown option is a sentence", function()
    local _, err = run("recipes/llama3_alpaca.lua", "--max-step", "3")
    assert.matches("did you mean %-%-max%-steps", err)
  end)

  it("rows that do not fit and an output that cannot be written are sentences, said before any work", function()
    local dir = temp_dir()
    local path = dir .. "/rows.jsonl"
    local function refused(row, ...)
      local file = assert(io.open(path, "wb"))
      file:write('{"instruction":"Say hi","output":"hi"}\n', row, "\n")
      file:close()
      local said, err = run("recipes/llama3_alpaca.lua", "--dataset", path, "--output", dir .. "/out", "--max-steps", "1")
      for _, text in ipairs { path, ... } do assert.matches(text, err, 1, true) end
      assert.is_nil(said:find("Reply before", 1, true))
    end
    refused('{"question":"a","answer":"b"}', "2", '"instruction" is missing')
    refused('{"instruction":"a","output":null}', '"output" is missing')
    refused('{"instruction":"a","input":["x"],"output":"b"}', '"input" is a table')
    local said, err = run("recipes/llama3_alpaca.lua", "--output", path) -- a file stands there
    assert.matches(path, err, 1, true)
    assert.is_nil(said:find("Reply before", 1, true))
  end)

  it("llama3_alpaca reads a .csv", function()
    local dir = temp_dir()
    local file = assert(io.open(dir .. "/rows.csv", "wb"))
    file:write('instruction,input,output\nSay hi,,hi\n"Say ""ho"", twice",loudly,1\n')
    file:close()
    local said, err = run("recipes/llama3_alpaca.lua", "--dataset", dir .. "/rows.csv", "--max-steps", "1", "--no-gguf", "--output", dir .. "/out")
    assert.is_nil(err)
    assert.is_truthy(core.path_kind(dir .. "/out/adapter/adapter_model.safetensors"))
    assert.matches("Reply after", said, 1, true)
  end)

  it("a missing model or text is a sentence", function()
    local _, err = run("recipes/llama3_alpaca.lua", "--model", "/nowhere/model")
    assert.matches("/nowhere/model", err, 1, true)
    _, err = run("recipes/pretrain_tiny.lua")
    assert.matches("needs %-%-text", err)
    _, err = run("recipes/pretrain_tiny.lua", "--text", "/nowhere/text")
    assert.matches("/nowhere/text", err, 1, true)
    _, err = run("recipes/pretrain_tiny.lua", "--text", "/dev/null")
    assert.matches("/dev/null is empty", err, 1, true)
    _, err = run("recipes/pretrain_tiny.lua", "--text", "README.md", "--kv-heads", "0")
    assert.matches("--kv-heads is 0", err, 1, true)
  end)
end)
