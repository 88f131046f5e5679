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

-- A recipe for each family, on random weights of its kind.
local SMALL = { hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2, num_attention_heads = 2, num_key_value_heads = 1,
  head_dim = 16, max_position_embeddings = 512, rms_norm_eps = 1e-5, rope_theta = 10000.0 }
local FAMILIES = {
  llama3_chat = { "LlamaForCausalLM" },
  mistral_alpaca = { "MistralForCausalLM", sliding_window = 64 },
  qwen3_chat = { "Qwen3ForCausalLM" },
  gemma3_chat = { "Gemma3ForCausalLM", sliding_window = 64, query_pre_attn_scalar = 16 },
  phi4_chat = { "Phi3ForCausalLM", partial_rotary_factor = 0.5 },
  mixtral_chat = { "MixtralForCausalLM", num_local_experts = 4, num_experts_per_tok = 2, intermediate_size = 32 },
  deepseek_chat = { "DeepseekV2ForCausalLM", num_key_value_heads = 2, q_lora_rank = unsloth.json.null, kv_lora_rank = 32, qk_nope_head_dim = 16,
    qk_rope_head_dim = 8, v_head_dim = 16, n_routed_experts = 4, num_experts_per_tok = 2, n_shared_experts = 1, moe_intermediate_size = 32,
    first_k_dense_replace = 1 },
}
local FUSED = { "down_proj", "gate_up_proj", "o_proj", "qkv_proj" }
local LATENT = { "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj" }
local ATTENTION = { "k_proj", "o_proj", "q_proj", "v_proj" } -- beside the experts', which PEFT calls parameters
local SEVEN = { "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj" }

local function family_folder(dir, family)
  bpe.write(dir, bpe.train(TEXT, 300))
  local tok = unsloth.AutoTokenizer.from_pretrained(dir)
  local config = { architectures = { family[1] }, vocab_size = tok.vocab_size, bos_token_id = tok.bos_token_id, eos_token_id = tok.eos_token_id }
  for _, more in ipairs { SMALL, family } do
    for key, value in pairs(more) do
      if key ~= 1 then config[key] = value end
    end
  end
  local model <close> = unsloth.FastLanguageModel.from_config(config, { random_state = 7, device = "cpu", dtype = "float32" })
  model:save_pretrained_merged(dir, tok)
end

local function modules_of(adapter)
  local modules = unsloth.json.decode(read(adapter .. "/adapter_config.json")).target_modules
  table.sort(modules)
  return modules
end

describe("recipes of families", function()
  for name, family in pairs(FAMILIES) do
    it(name .. " trains a small " .. family[1] .. ", answers and saves what loads again", function()
      local dir = temp_dir()
      family_folder(dir .. "/model", family)
      local rows = {}
      for i = 1, 6 do
        rows[i] = unsloth.json.encode { messages = { { role = "user", content = "What follows " .. i .. "?" },
          { role = "assistant", content = "That is " .. i + 1 .. "." } } }
      end
      local file = assert(io.open(dir .. "/chats.jsonl", "wb"))
      file:write(table.concat(rows, "\n"))
      file:close()
      local script = ("recipes/%s.lua"):format(name)
      local said, err = run(script, "--model", dir .. "/model", "--dataset", dir .. "/chats.jsonl", "--max-steps", "2", "--device", "cpu",
        "--output", dir .. "/out", "--seed", "1", "--gguf", "q8_0")
      assert.is_nil(err)
      assert.matches("loss [%d.]+ %-> [%d.]+", said)
      assert.matches("Reply to: Name three colors.", said, 1, true)
      assert.is_truthy(core.path_kind(dir .. "/out/gguf/unsloth.Q8_0.gguf"))
      local modules = { phi4_chat = FUSED, mixtral_chat = ATTENTION, deepseek_chat = LATENT }
      assert.are.same(modules[name] or SEVEN, modules_of(dir .. "/out/adapter"))
      local model <close> = unsloth.FastLanguageModel.from_pretrained { model_name = dir .. "/out/adapter", load_in_4bit = false, dtype = "float32" }
      assert.is_true(#model:generate_ids({ 1, 2, 3 }, { max_new_tokens = 2 }) > 0)
      local _, why = run(script)
      assert.matches("wants %-%-model", why)
    end)
  end

  it("a module that the family has not is a sentence with those that it has", function()
    local dir = temp_dir()
    family_folder(dir, FAMILIES.phi4_chat)
    local model <close> = unsloth.FastLanguageModel.from_pretrained { model_name = dir, load_in_4bit = false }
    local ok, err = pcall(unsloth.FastLanguageModel.get_peft_model, model, { target_modules = { "q_proj", "o_proj" } })
    assert.is_false(ok)
    assert.matches('"q_proj" is no linear module of a Phi3ForCausalLM block; use o_proj, down_proj, qkv_proj, gate_up_proj', tostring(err), 1, true)
    unsloth.FastLanguageModel.get_peft_model(model) -- without a word about modules: all of them
    model:save_pretrained(dir .. "/adapter")
    assert.are.same(FUSED, modules_of(dir .. "/adapter"))
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

  it("llama3_alpaca goes on from its newest checkpoint", function()
    local dir = temp_dir()
    local words = { "--max-steps", "4", "--no-gguf", "--output", dir .. "/out", "--save-steps", "3" }
    local _, err = run("recipes/llama3_alpaca.lua", table.unpack(words))
    assert.is_nil(err)
    local straight = read(dir .. "/out/adapter/adapter_model.safetensors")
    core.remove_path(dir .. "/out/checkpoint-4")
    words[#words + 1] = "--resume"
    local said
    said, err = run("recipes/llama3_alpaca.lua", table.unpack(words))
    assert.is_nil(err)
    assert.matches("going on from " .. dir .. "/out/checkpoint-3: step 3 of 4", said, 1, true)
    assert.are.equal(straight, read(dir .. "/out/adapter/adapter_model.safetensors"))
    said, err = run("recipes/llama3_alpaca.lua", "--max-steps", "4", "--output", dir .. "/none", "--resume")
    assert.matches(dir .. "/none holds no checkpoint", err, 1, true)
    assert.matches("--save-steps", err, 1, true)
    assert.is_nil(said:find("Reply", 1, true) or err:find("resume_from_checkpoint", 1, true))
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
