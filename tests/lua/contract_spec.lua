-- The names that scripts rely on exist and work, on a tiny model of random weights.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

local FastLanguageModel = unsloth.FastLanguageModel

describe("the contract", function()
  local dir, model, tokenizer

  setup(function()
    dir = support.tiny_folder()
    model, tokenizer = support.open(dir)
  end)
  teardown(function()
    model:close()
    support.remove(dir)
  end)

  it("names the argument that is missing, and what to write", function()
    local other <close> = support.open(dir)
    local ds = unsloth.dataset_from_list { { text = "a</s>" } }
    local trainer = unsloth.SFTTrainer { model = other, tokenizer = tokenizer, train_dataset = ds, args = { max_steps = 1, output_dir = dir } }
    for _, case in ipairs {
      { { "model:save_pretrained(", "colon" }, model.save_pretrained, "x" },
      { { "dir is missing", 'save_pretrained("' }, model.save_pretrained, model }, { { "dir is a boolean" }, model.save_pretrained, model, true },
      { { "dir is missing", "save_pretrained_merged(" }, model.save_pretrained_merged, model },
      { { "dir is missing", "save_pretrained_gguf(" }, model.save_pretrained_gguf, model },
      { { "model is missing", "get_peft_model(model)" }, FastLanguageModel.get_peft_model },
      { { "model is a Tokenizer", "the model first" }, FastLanguageModel.for_inference, tokenizer },
      { { "model:generate(", "colon" }, model.generate, "x" }, { { "model:generate(", "colon" }, model.generate },
      { { "prompt is missing", "a text" }, model.generate, model }, { { "ids is a string", "tokenizer:encode" }, model.generate_ids, model, "x" },
      { { "trainer is missing", "SFTTrainer" }, unsloth.train_on_responses_only },
      { { "rate is a string", "set_learning_rate(1e-4)" }, trainer.set_learning_rate, trainer, "x" },
      { { "trainer:train(", "colon" }, trainer.train }, { { "trainer:step(", "colon" }, trainer.step, {} },
      { { "fn is missing", "function(row)" }, ds.map, ds }, { { "fn is a number", "function(row)" }, ds.filter, ds, 7 },
      { { "ds:map(", "colon" }, ds.map, print }, { { "rows is missing", "text" }, unsloth.dataset_from_list },
      { { "train_dataset is a table", "dataset_from_list" }, unsloth.SFTTrainer, { model = model, train_dataset = { { text = "a" } } } },
      { { "train_dataset is a table", "one side" }, unsloth.SFTTrainer, { model = model, train_dataset = { train = ds, test = ds } } },
      { { "missing", "train_dataset = " }, unsloth.SFTTrainer },
      { { "with a dot" }, FastLanguageModel.from_pretrained, FastLanguageModel, { model_name = dir } },
      { { "with a dot" }, FastLanguageModel.get_peft_model, FastLanguageModel, model },
    } do
      support.fails("USL_ERR_INVALID", table.unpack(case))
    end
    trainer:close()
  end)

  it("has its names", function()
    for _, name in ipairs { "load_dataset", "SFTTrainer", "TrainingArguments", "SFTConfig", "get_chat_template", "standardize_data_formats",
      "tensor", "train_on_responses_only" } do
      assert.is_function(unsloth[name], name)
    end
    for table_name, names in pairs { FastLanguageModel = { "from_pretrained", "get_peft_model" }, AutoTokenizer = { "from_pretrained" },
      safetensors = { "load", "save" }, quant = { "quantize", "dequantize" }, json = { "decode", "encode" }, chat_template = { "render" } } do
      for _, name in ipairs(names) do assert.is_function(unsloth[table_name][name], table_name .. "." .. name) end
    end
    assert.is_not_nil(unsloth.json.null)
    for _, name in ipairs { "generate", "stream", "generate_ids", "logits", "save_pretrained", "save_pretrained_merged",
      "save_pretrained_gguf", "set_adapter", "disable_adapter", "load_adapter", "close" } do
      assert.is_function(model[name], name)
    end
  end)

  it("loads with load_in_4bit by default", function()
    local four <close>, tok = FastLanguageModel.from_pretrained { model_name = dir, max_seq_length = 128 }
    assert.is_truthy(tok)
    assert.equals(128, four:info().context)
    local logits = four:logits { 256, 72, 105 }
    assert.same({ 3, 259 }, logits.shape)
    -- NF4 changes the weights, and not by much.
    local distance = logits:distance(model:logits { 256, 72, 105 })
    assert.is_true(distance > 1e-4 and distance < 0.5, tostring(distance))
  end)

  it("gives logits as float32 rows, counted from 1", function()
    local logits = model:logits { 256, 72, 105, 33 }
    assert.same({ 4, 259 }, logits.shape)
    assert.equals("float32", logits.dtype)
    assert.equals(4, #logits)
    local rows = logits:totable()
    assert.equals(4, #rows)
    assert.equals(259, #rows[4])
    assert.equals(rows[2][3], logits[2][3])
    assert.is_nil(logits[5])
    assert.is_nil(logits[0])
    -- An earlier position does not see later ones.
    assert.is_true(model:logits({ 256, 72 })[2]:distance(logits[2]) < 1e-5)
  end)

  it("generates greedily unless told otherwise", function()
    local ids = { 256, 72, 105 }
    local new = model:generate_ids(ids, { max_new_tokens = 12, eos_token_id = 258 })
    assert.equals(12, #new)
    assert.equals(3, #ids)
    local all = { 256, 72, 105 }
    for _, id in ipairs(new) do
      assert.equals(id, model:logits(all)[#all]:argmax_id())
      all[#all + 1] = id
    end
    assert.same(new, model:generate_ids({ 256, 72, 105 }, { max_new_tokens = 12, temperature = 0, eos_token_id = 258 }))
  end)

  it("stops after an end-of-text id, which is the last one", function()
    local new = model:generate_ids({ 256, 72, 105 }, { max_new_tokens = 6, eos_token_id = 258 })
    local first = 1
    while new[first] ~= new[3] do first = first + 1 end
    local cut = model:generate_ids({ 256, 72, 105 }, { max_new_tokens = 6, eos_token_id = { 258, new[3] } })
    assert.is_true(#cut == first or #cut == first - 1, tostring(#cut))
  end)

  it("repeats a draw of the same seed", function()
    local opts = { max_new_tokens = 16, temperature = 1.0, seed = 11, eos_token_id = 258 }
    local one = model:generate_ids({ 256, 72 }, opts)
    assert.same(one, model:generate_ids({ 256, 72 }, opts))
    opts.seed = 12
    assert.are_not.same(one, model:generate_ids({ 256, 72 }, opts))
    opts.top_k, opts.min_p, opts.top_p, opts.repetition_penalty = 1, 0.0, 0.9, 1.0
    assert.same(model:generate_ids({ 256, 72 }, { max_new_tokens = 16, eos_token_id = 258 }), model:generate_ids({ 256, 72 }, opts))
  end)

  it("streams the pieces of what generate gives", function()
    local opts = { max_new_tokens = 24, temperature = 1.0, seed = 3 }
    local pieces = {}
    for piece in model:stream("Hello", opts) do
      assert.is_string(piece)
      pieces[#pieces + 1] = piece
    end
    local text = model:generate("Hello", opts)
    assert.is_true(#pieces > 1)
    assert.equals(text, table.concat(pieces))
    assert.is_nil(text:find("Hello", 1, true))
    assert.is_string((model:stream("Hello", opts))()) -- leaving early is fine
  end)

  it("ends before a stop string", function()
    local opts = { max_new_tokens = 48, temperature = 1.0, seed = 5 }
    local text = model:generate("Hello", opts)
    local at = text:match "()[%w%p]" or 1
    opts.stop = text:sub(at + 1, at + 1)
    local cut = model:generate("Hello", opts)
    assert.equals(text:sub(1, text:find(opts.stop, 1, true) - 1), cut)
    opts.stop = { "no such text in it", opts.stop }
    assert.equals(cut, model:generate("Hello", opts))
    support.fails("USL_ERR_INVALID", "stop", model.generate, model, "Hello", { stop = "" })
  end)

  it("leaves out a second BOS in generate only", function()
    assert.same({ 256, 256, 72 }, tokenizer:encode "<s>H")
    assert.same({ 256, 72 }, tokenizer:encode("<s>H", { add_special_tokens = false }))
    assert.equals(model:generate("Hi", { max_new_tokens = 8 }), model:generate("<s>Hi", { max_new_tokens = 8 }))
  end)

  it("encodes and decodes any bytes of text", function()
    local text = "na\u{EF}ve\0 caf\u{E9} \u{1F600}\n"
    local ids = tokenizer:encode(text)
    assert.equals(256, ids[1])
    assert.equals("<s>" .. text, tokenizer:decode(ids))
    assert.equals(text, tokenizer:decode(ids, { skip_special_tokens = true }))
    assert.equals("</s>", tokenizer.eos_token)
    assert.equals(257, tokenizer.eos_token_id)
    assert.equals(256, tokenizer.bos_token_id)
  end)

  it("opens a tokenizer alone", function()
    local alone = support.temp_dir()
    finally(function() support.remove(alone) end)
    support.write(alone .. "/tokenizer.json", support.tokenizer_json())
    local tok = unsloth.AutoTokenizer.from_pretrained(alone)
    assert.same({ 256, 72, 105 }, tok:encode("Hi", { add_special_tokens = true }))
    support.fails("USL_ERR_NOT_FOUND", "nowhere", unsloth.AutoTokenizer.from_pretrained, "/nowhere")
  end)

  it("refuses ids outside the vocabulary and empty prompts", function()
    support.fails(nil, "259", model.logits, model, { 256, 259 })
    support.fails(nil, "-1", model.logits, model, { -1 })
    support.fails(nil, {}, model.generate_ids, model, {})
  end)

  it("takes texts longer than the context as an error", function()
    local ids = {}
    for i = 1, 257 do ids[i] = 65 end
    support.fails(nil, "256", model.generate_ids, model, ids)
  end)

  it("closes at once, and says so when used again", function()
    local other = support.open(dir)
    other:close()
    other:close()
    support.fails(nil, "closed", other.logits, other, { 1 })
    assert.is_string(tostring(other))
  end)

  it("adds an adapter to the same handle", function()
    local other <close> = support.open(dir)
    local before = other:logits { 256, 72 }
    local same = FastLanguageModel.get_peft_model(other, { r = 4, lora_alpha = 8, target_modules = "all-linear", random_state = 1 })
    assert.equals(other, same)
    assert.equals(0.0, (other:logits({ 256, 72 }):distance(before)))
    local info = other:info()
    -- Seven modules of two layers: r (in + out) each.
    local one = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3
    assert.equals(4 * 2 * one, info.trainable)
  end)

  it("refuses what cannot be an adapter", function()
    local other <close> = support.open(dir)
    local function add(opts) return FastLanguageModel.get_peft_model(other, opts) end
    support.fails("USL_ERR_INVALID", { "q_porj" }, add, { target_modules = { "q_porj" } })
    support.fails("USL_ERR_INVALID", { "r ", "0" }, add, { r = 0 })
    support.fails("USL_ERR_INVALID", { "layer 2", "0 to 1" }, add, { layers_to_transform = { 2 } })
    support.fails("USL_ERR_INVALID", "0.5", add, { layers_to_transform = { 0.5 } })
    support.fails("USL_ERR_INVALID", "q_prof", add, { layers_to_transform = { 2 / 2 }, target_modules = { "q_prof" } })
    support.fails("USL_ERR_INVALID", "loftq_config", add, { loftq_config = { loftq_bits = 4 } })
  end)

  it("names a model that is not there", function()
    support.fails("USL_ERR_NOT_FOUND", { "/no/such/model", "give its path" }, FastLanguageModel.from_pretrained, { model_name = "/no/such/model" })
    support.fails("USL_ERR_INVALID", "model_name", FastLanguageModel.from_pretrained, {})
    local empty = support.temp_dir()
    finally(function() support.remove(empty) end)
    support.fails("USL_ERR_NOT_FOUND", { empty, "config.json" }, FastLanguageModel.from_pretrained, { model_name = empty })
  end)

  it("refuses weights whose shape is not the configuration's", function()
    local wrong = support.temp_dir()
    finally(function() support.remove(wrong) end)
    for _, name in ipairs { "model.safetensors", "tokenizer.json" } do support.write(wrong .. "/" .. name, support.read(dir .. "/" .. name)) end
    local config = unsloth.json.decode(support.read(dir .. "/config.json"))
    config.intermediate_size = 96
    support.write(wrong .. "/config.json", unsloth.json.encode(config))
    support.fails(nil, "gate_proj", FastLanguageModel.from_pretrained, { model_name = wrong })
  end)

  it("survives any order of collection", function()
    for _ = 1, 3 do
      local m, tok = support.open(dir)
      local generator = m:stream("Hi", { max_new_tokens = 4 })
      generator()
      assert.equals(257, tok.eos_token_id)
      m, tok = nil, nil -- luacheck: ignore
      collectgarbage()
      generator()
    end
    collectgarbage()
  end)
end)

describe("a padded vocabulary", function()
  -- Random weights like all of their 512 ids alike; the tokenizer knows 259 of them.
  local dir, tokenizer, config

  setup(function()
    dir = support.tiny_folder()
    tokenizer = unsloth.AutoTokenizer.from_pretrained(dir)
    config = {}
    for key, value in pairs(support.config) do config[key] = value end
    config.vocab_size = 512
  end)
  teardown(function() support.remove(dir) end)

  local HOT = { max_new_tokens = 200, temperature = 5.0, eos_token_id = {} }
  local function largest(ids)
    return math.max(table.unpack(ids))
  end

  it("is drawn from whole without a tokenizer, and else only as far as that knows its ids", function()
    local model <close>, got = unsloth.FastLanguageModel.from_config(config, { dtype = "float32", tokenizer = tokenizer })
    assert.equals(tokenizer, model.tokenizer)
    assert.equals(tokenizer, got)
    assert.is_true(largest(model:generate_ids({ 1 }, HOT)) >= 259)
    HOT.tokenizer = tokenizer
    assert.is_true(largest(model:generate_ids({ 1 }, HOT)) < 259)
    HOT.tokenizer = nil
    for _, temperature in ipairs { 0, 5 } do
      HOT.temperature = temperature
      assert.is_string(model:generate("Hello", HOT))
    end
  end)
end)

describe("logits", function()
  it("need an id", function()
    local model <close> = unsloth.FastLanguageModel.from_config(support.config, { dtype = "float32" })
    support.fails("USL_ERR_INVALID", "at least one token id", model.logits, model, {})
    assert.is_nil(model.tokenizer)
  end)
end)
