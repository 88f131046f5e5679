-- Batches, the call that transformers' tokenizers answer to, added tokens and resized embeddings.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

local MODEL = "examples/tiny-llama"
local TEXT = "hello <think> world </think><|tool|>"

local function open()
  return unsloth.FastLanguageModel.from_pretrained { model_name = MODEL, max_seq_length = 64, load_in_4bit = false }
end

describe("a batch of texts", function()
  local tok = unsloth.AutoTokenizer.from_pretrained(MODEL)

  it("has the ids that each text has alone, in their order", function()
    local texts = {}
    for i = 1, 3000 do texts[i] = ("word %d \u{e9}\u{4f60} <|end_of_text|> %s"):format(i, ("x y"):rep(i % 40)) end
    local batch = tok:encode_batch(texts)
    assert.equal(#texts, #batch)
    for i, text in ipairs(texts) do assert.same(tok:encode(text), batch[i]) end
    assert.same({}, tok:encode_batch {})
    assert.same(tok:encode("a", { add_special_tokens = false }), tok:encode_batch({ "a" }, { add_special_tokens = false })[1])
  end)

  it("names the first text that cannot be encoded", function()
    local texts = {}
    for i = 1, 500 do texts[i] = ("text "):rep(500) end
    texts[77], texts[400] = "broken \xff", "\xff"
    local ok, why = pcall(tok.encode_batch, tok, texts)
    assert.is_false(ok)
    assert.matches("text 77 of the batch: .*byte 8", tostring(why))
    ok, why = pcall(tok.encode_batch, tok, { "a", 1 })
    assert.is_false(ok)
    assert.matches("entry 2", tostring(why))
  end)

  it("is cut and filled up as asked", function()
    local filled = unsloth.AutoTokenizer.from_pretrained(MODEL)
    filled:add_special_tokens { pad_token = "<|pad|>" }
    local short, long = filled:encode "a", filled:encode "a longer text than that"
    local out = filled({ "a", "a longer text than that" }, { padding = true })
    assert.same(long, out.input_ids[2])
    assert.equal(#long, #out.input_ids[1])
    assert.equal(filled.pad_token_id, out.input_ids[1][#long])
    assert.equal(0, out.attention_mask[1][#long])
    assert.equal(1, out.attention_mask[1][#short])
    out = filled("a longer text than that", { truncation = true, max_length = 3 })
    assert.same({ long[1], long[2], long[3] }, out.input_ids)
    out = filled("a", { padding = "max_length", max_length = #short + 2, padding_side = "left" })
    assert.same({ 0, 0, 1 }, { table.unpack(out.attention_mask, 1, 3) })
    assert.has_error(function() filled("a", { truncation = true }) end)
    assert.has_error(function() filled("a", { padding = "most" }) end)
  end)
end)

describe("new tokens", function()
  -- Of transformers with the same calls on the same model: ids, and what decode leaves of special tokens.
  it("become ids as in transformers, and their files say so", function()
    local model, tok = open()
    local before = #tok
    unsloth.add_new_tokens(model, tok, { new_tokens = { "<think>", "</think>" } })
    assert.equal(2, tok:add_tokens { "<x>", "<y>", "<x>", "<think>" })
    assert.equal(2, tok:add_special_tokens { pad_token = "<|pad|>", additional_special_tokens = { "<|tool|>" } })
    assert.equal(before + 6, #tok)
    assert.equal("<|pad|>", tok.pad_token)
    local ids = { 1022, 257, 275, 111, 32, 1024, 878, 32, 1025, 1029 }
    assert.same(ids, tok:encode(TEXT))
    assert.equal("ab<x>c", tok:decode(tok:encode "a<|tool|>b<x>c", { skip_special_tokens = true }))
    assert.equal(1040, model:resize_token_embeddings(#tok, { pad_to_multiple_of = 16 }))
    local dir = support.temp_dir()
    model:save_pretrained_merged(dir, tok, { save_method = "merged_16bit" })
    local again, other = unsloth.FastLanguageModel.from_pretrained { model_name = dir, max_seq_length = 64, load_in_4bit = false }
    assert.equal(1040, again:info().vocab)
    assert.same(ids, other:encode(TEXT))
    assert.equal("<|pad|>", other.pad_token)
    support.remove(dir)
  end)

  it("have rows that are the mean, or lie between it and their parts'", function()
    local model, tok = open()
    local old = model:get_param("model.embed_tokens.weight"):totable()
    local parts = tok:encode("<think>", { add_special_tokens = false })
    unsloth.add_new_tokens(model, tok, { new_tokens = { "<think>" }, method = "interpolation", interpolation = 0.25 })
    local new = model:get_param("model.embed_tokens.weight"):totable()
    for c = 1, #old[1] do
      local mean, part = 0, 0
      for r = 1, #old do mean = mean + old[r][c] / #old end
      for _, id in ipairs(parts) do part = part + old[id + 1][c] / #parts end
      local want = 0.75 * mean + 0.25 * part
      assert.is_true(math.abs(new[#old + 1][c] - want) <= 0.01 * math.abs(want) + 1e-4)
      assert.equal(old[7][c], new[7][c])
    end
    assert.has_error(function() unsloth.add_new_tokens(model, tok, { new_tokens = { "<think>" } }) end)
    assert.has_error(function() unsloth.add_new_tokens(model, tok, { new_tokens = { "q" }, method = "median" }) end)
  end)

  it("go with an adapter of every kind, and with what is exported", function()
    local kinds = { { r = 4 }, { r = 4, modules_to_save = { "embed_tokens", "lm_head" } }, { r = 4, modules_to_save = { "lm_head" } },
      { r = 4, target_modules = { "q_proj", "embed_tokens", "lm_head" }, lora_embeddings = true } }
    for _, options in ipairs(kinds) do
      local model <close>, tok = open()
      unsloth.add_new_tokens(model, tok, { new_tokens = { "<think>", "</think>" } })
      options.init_lora_weights = false
      unsloth.FastLanguageModel.get_peft_model(model, options)
      local ids, dir = tok:encode(TEXT), support.temp_dir()
      local logits = model:logits(ids):totable()
      model:save_pretrained(dir)
      for _, before in ipairs { 0, #tok } do -- as it is opened, and with as many rows already
        local other <close> = open()
        if before > 0 then other:resize_token_embeddings(before) end
        other:load_adapter(dir)
        assert.equal(#tok, other:info().vocab)
        assert.same(logits, other:logits(ids):totable())
      end
      local path = model:save_pretrained_gguf(dir, tok, { quantization_method = "f32" })[1]
      local exported <close>, its = unsloth.FastLanguageModel.from_pretrained { model_name = path, load_in_4bit = false }
      assert.same(ids, its:encode(TEXT))
      assert.is_true((exported:logits(ids) - model:logits(ids)):abs():max() < 0.05)
      support.remove(dir)
    end
  end)

  it("come before adapters that have rows of their own, and before a trainer", function()
    local model <close> = open()
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, modules_to_save = { "embed_tokens" } })
    support.fails("USL_ERR_INVALID", { "before get_peft_model", "default" }, model.resize_token_embeddings, model, 2000)
    local plain <close> = open()
    unsloth.FastLanguageModel.get_peft_model(plain, { r = 4 })
    plain:resize_token_embeddings(2000)
    assert.equal(2000, plain:info().vocab)
    -- Rows that another adapter does not stand on.
    local first, second = support.temp_dir(), support.temp_dir()
    plain:save_pretrained(first)
    plain:blend_row(1999, { 5 }, 1)
    plain:save_pretrained(second)
    local other <close> = open()
    other:load_adapter(first, "one")
    support.fails("USL_ERR_INVALID", { "one", "a model of its own" }, other.load_adapter, other, second, "two")
    other:load_adapter(first, "three")
    support.remove(first)
    support.remove(second)
  end)

  it("end an answer that is under way, whose memory has the old size", function()
    for _, size in ipairs { 900, 5000 } do
      local model <close> = open()
      local generator <close> = model:generator({ 1, 5, 6 }, { max_new_tokens = 8 })
      assert.is_number(generator:next())
      model:resize_vocab(size)
      support.fails("USL_ERR_INVALID", { "another size", "begin it anew" }, generator.next, generator)
    end
  end)
end)
