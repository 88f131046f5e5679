-- Saving: the verb, the formats, what stands beside them.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local core = require "unsloth.core"
local modelfile = require "unsloth.modelfile"
local templates = require "unsloth.templates"
local unsloth = require "unsloth"

local PROGRAM = support.root .. "build/unsloth-lua"
local check = core.path_kind(PROGRAM) and it or function(title) pending(title .. ": build/unsloth-lua is not here") end

local function verb(format, ...)
  return support.shell(PROGRAM .. " export " .. format, ...)
end

local function distance(a, b)
  local sum, size = 0, 0
  for i, row in ipairs(a) do
    for k, x in ipairs(row) do
      sum, size = sum + (x - b[i][k]) ^ 2, size + b[i][k] ^ 2
    end
  end
  return math.sqrt(sum / size)
end

describe("the verb export", function()
  local dir, model_dir

  setup(function()
    dir, model_dir = support.temp_dir(), support.tiny_folder()
    local model <close> = support.open(model_dir)
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, lora_alpha = 4, init_lora_weights = false })
    model:save_pretrained(dir .. "/adapter")
  end)
  teardown(function()
    support.remove(dir)
    support.remove(model_dir)
  end)

  -- The tiny model with another file of JSON; the error output of exporting it, and the code.
  local function changed(file, change, formats)
    local place = support.temp_dir()
    for _, name in ipairs { "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json" } do
      support.write(place .. "/" .. name, support.read(model_dir .. "/" .. name))
    end
    local json = unsloth.json.decode(support.read(place .. "/" .. file))
    change(json)
    support.write(place .. "/" .. file, unsloth.json.encode(json))
    local _, err, code = verb("%s --to %s --output %s/out", place, formats, place)
    local written = core.path_kind(place .. "/out") and table.concat(core.list_dir(place .. "/out"), " ") or ""
    support.remove(place)
    return err, code, written
  end

  check("says that a .gguf leaves dynamic rope scaling out", function()
    local err, code = changed("config.json", function(config) config.rope_scaling = { rope_type = "dynamic", factor = 2 } end, "f16")
    assert.equals(0, code, err)
    assert.is_truthy(err:find("dynamic rope scaling has no name in a .gguf: its readers' answers differ beyond 256 tokens", 1, true), err)
    err = changed("config.json", function(config) config.rope_scaling = { rope_type = "linear", factor = 2 } end, "f16")
    assert.is_nil(err:find("no name", 1, true))
  end)

  check("refuses a .gguf of a tokenizer that none can express, before anything is written", function()
    local err, code, written = changed("tokenizer.json", function(json) json.pre_tokenizer = nil end, "q8_0,merged_16bit")
    assert.is_true(code ~= 0)
    for _, part in ipairs { "has no name in a .gguf", "--to merged_16bit" } do assert.is_truthy(err:find(part, 1, true), err) end
    assert.is_nil(err:find("report", 1, true))
    assert.equals("", written)
    err, code, written = changed("tokenizer.json", function(json) json.pre_tokenizer = nil end, "merged_16bit")
    assert.equals(0, code, err)
    assert.equals("merged_16bit", written)
  end)

  check("writes every kind, and says what it found", function()
    local out, err, code = verb("%s --adapter %s/adapter --to q8_0,f32,merged_16bit,merged_4bit,float32,lora,gguf-lora --output %s/all", model_dir, dir, dir)
    assert.equals(0, code, err)
    for _, name in ipairs { "unsloth.Q8_0.gguf", "unsloth.F32.gguf", "merged_16bit/model.safetensors", "merged_16bit/tokenizer.json",
      "merged_4bit/config.json", "float32/generation_config.json", "lora/adapter_model.safetensors", "lora/README.md", "adapter.gguf" } do
      assert.is_truthy(core.path_kind(dir .. "/all/" .. name), name)
    end
    for _, what in ipairs { "Q8_0.gguf: ", "checked: weights differ by ", "logits by ", "is what it costs" } do
      assert.is_truthy(out:find(what, 1, true), out)
    end
    assert.is_nil(support.shell("ls -a %s/all", dir):find "tmp%-")
    -- Merged is the model with its adapter, whichever way it comes back.
    local ids, logits = { 256, 72, 101, 108, 108, 111 }, {}
    local function answers(path, adapter)
      local model <close> = support.open(path)
      if adapter then model:load_adapter(adapter) end
      return model:logits(ids):totable()
    end
    logits.live = answers(model_dir, dir .. "/adapter")
    assert.is_true(distance(answers(dir .. "/all/float32"), logits.live) < 1e-5)
    assert.is_true(distance(answers(dir .. "/all/unsloth.F32.gguf"), logits.live) < 1e-5)
    assert.is_true(distance(answers(model_dir), logits.live) > 1e-2)
    local four = core.json.decode(support.read(dir .. "/all/merged_4bit/config.json"))
    assert.equals("nf4", four.quantization_config.bnb_4bit_quant_type)
  end)

  check("merges onto other weights when they are given", function()
    local out, err, code = verb("%s --load-in-4bit --adapter %s/adapter --to float32 --base %s --output %s/base", model_dir, dir, model_dir, dir)
    assert.equals(0, code, err)
    assert.is_truthy(out:find("merged onto the weights of " .. model_dir, 1, true), out)
    assert.is_true(tonumber(out:match "weights differ by (%S+),") > 1e-3, out)
  end)

  check("takes a calibration text, and can leave the check out", function()
    support.write(dir .. "/text.txt", ("To be, or not to be, that is the question. "):rep(20))
    local out, err, code = verb("%s --to iq4_nl --imatrix %s/text.txt --no-verify --output %s/im", model_dir, dir, dir)
    assert.equals(0, code, err)
    assert.is_truthy(out:find("not checked", 1, true), out)
  end)

  check("wants a text for types below four bits, and writes them with one", function()
    local model = support.root .. "examples/tiny-llama"
    local _, err, code = verb("%s --to q8_0,iq2_xs --output %s/blind", model, dir)
    assert.equals(1, code)
    assert.is_truthy(err:find("iq2_xs wants an importance matrix", 1, true) and err:find("--imatrix", 1, true), err)
    assert.equals("", (support.shell("find %s/blind -type f", dir)))
    support.write(dir .. "/text.txt", ("To be, or not to be, that is the question. "):rep(20))
    local out
    out, err, code = verb("%s --to iq2_xs,IQ3_M --imatrix %s/text.txt --output %s/small", model, dir, dir)
    assert.equals(0, code, err)
    assert.is_truthy(out:find "IQ2_XS%.gguf: .*checked" and out:find "IQ3_M%.gguf: .*checked", out)
    local read <close> = support.open(dir .. "/small/unsloth.IQ2_XS.gguf")
    assert.is_truthy(#read:generate("To be", { max_new_tokens = 4 }) > 0)
  end)

  check("leaves nothing under a file's name when the disk is full or it is killed", function()
    local model, lists = support.root .. "examples/tiny-llama", { "f32,f16,q8_0", "merged_32bit" }
    for i, list in ipairs(lists) do
      -- 200 blocks of 1 KiB or 512 bytes, and no room for more.
      local _, err, code = support.shell("ulimit -f 200; %s export %s --to %s --output %s/full%d", PROGRAM, model, list, dir, i)
      assert.equals(1, code, err)
      assert.is_truthy(err:find("cannot be written", 1, true), err)
      assert.equals("", (support.shell("find %s/full%d -type f", dir, i)))
      local place = ("%s/killed%d"):format(dir, i)
      support.shell([[mkdir %s; %s export %s --to %s --output %s & own=$!
        while kill -0 $own && [ -z "$(find /proc/$own/fd -lname '%s/*')" ]; do :; done; kill -KILL $own; wait $own]],
        place, PROGRAM, model, list, place, place)
      assert.equals("", (support.shell("find %s -type f ! -path '*.tmp-*'", place)))
      _, err, code = verb("%s --to %s --output %s", model, list, place)
      assert.equals(0, code, err)
      assert.equals("", (support.shell("find %s -name '*.tmp-*'", place)))
    end
  end)

  check("refuses with a sentence before it writes", function()
    for _, case in ipairs {
      { "%s --to q4_k_n --output %s/no", 'did you mean "q4_k_m"' }, { "%s --output %s/no", "--to FORMAT" },
      { "%s --to lora --output %s/no", "--adapter DIR" }, { "%s --to '' --output %s/no", "formats separated by commas" },
      { "%s --to f32 --imatrix /nowhere --output %s/no", "/nowhere" }, { "%s --to merged_16bit --imatrix x --output %s/no", "--imatrix is for" },
      { "%s --to f32 --adapter /nowhere --output %s/no", "/nowhere" }, { "%s --to float32 --base /nowhere --output %s/no", "/nowhere" } } do
      local _, err, code = verb(case[1], model_dir, dir)
      assert.equals(1, code, case[1])
      assert.is_truthy(err:find(case[2], 1, true), err)
    end
    assert.equals("", (support.shell("find %s/no -type f", dir)))
  end)
end)

describe("an export from a script", function()
  it("tells how far it is, and passes on what its listener raises", function()
    local model_dir, dir = support.tiny_folder(), support.temp_dir()
    local model <close>, tokenizer = support.open(model_dir)
    local last, calls = 0, 0
    core.export_gguf(model, tokenizer, { dir .. "/a.gguf" }, { "f16" }, { progress = function(_, done, total)
      calls, last = calls + 1, done / total
    end })
    assert.is_true(calls > 5 and last <= 1)
    local mine = {}
    assert.equals(mine, support.error_of(core.export_gguf, model, tokenizer, { dir .. "/b.gguf" }, { "f16" }, { progress = function() error(mine) end }))
    support.fails("USL_ERR_INVALID", "in use", core.export_gguf, model, tokenizer, { dir .. "/b.gguf" }, { "f16" }, {
      progress = function() model:info() end })
    assert.is_nil(core.path_kind(dir .. "/b.gguf"))
    support.remove(dir)
    support.remove(model_dir)
  end)

  it("takes Unsloth's names, once each", function()
    local model_dir, dir = support.tiny_folder(), support.temp_dir()
    local model <close>, tokenizer = support.open(model_dir)
    local paths, reports = model:save_pretrained_gguf(dir, tokenizer, { quantization_method = { "fast_quantized", "q8_0", "not_quantized", "q4_0" } })
    assert.same({ dir .. "/unsloth.Q8_0.gguf", dir .. "/unsloth.BF16.gguf", dir .. "/unsloth.Q4_0.gguf" }, paths)
    assert.is_true(reports[1].logits <= reports[1].expected and reports[3].weights > reports[1].weights)
    assert.is_nil(core.path_kind(dir .. "/Modelfile")) -- there is no chat template
    support.fails("USL_ERR_UNSUPPORTED", "calibration text", model.save_pretrained_gguf, model, dir, tokenizer, { imatrix_file = true })
    support.fails("USL_ERR_IO", "cannot be read", model.save_pretrained_gguf, model, dir, tokenizer, { imatrix_file = dir })
    support.write(dir .. "/empty.txt", "\n")
    support.fails("USL_ERR_INVALID", "there is none in it", model.save_pretrained_gguf, model, dir, tokenizer, { imatrix_file = dir .. "/empty.txt" })
    support.fails("USL_ERR_INVALID", "options are a table", model.push_to_hub, model, "me/name", tokenizer)
    support.remove(dir)
    support.remove(model_dir)
  end)

  it("makes no other model of a folder, and no lesser one", function()
    local model_dir, dir = support.tiny_folder(), support.temp_dir()
    local model <close>, tokenizer = support.open(model_dir)
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, init_lora_weights = false })
    model:save_pretrained(dir)
    support.fails("USL_ERR_INVALID", "once more; give another folder", model.save_pretrained_merged, model, dir, tokenizer)
    core.make_dir(dir .. "/merged")
    support.write(dir .. "/merged/chat_template.jinja", "of another model")
    assert.equals("float weights", model:save_pretrained_merged(dir .. "/merged", tokenizer).merged_onto)
    assert.is_nil(core.path_kind(dir .. "/merged/chat_template.jinja"))
    local before = support.read(model_dir .. "/model.safetensors")
    local small <close> = core.model_open(model_dir, { device = "cpu", load_in_4bit = true })
    support.fails("USL_ERR_INVALID", "loaded in 4 bits", small.save_pretrained_merged, small, model_dir .. "/.", tokenizer)
    assert.equals(before, support.read(model_dir .. "/model.safetensors"))
    assert.is_nil(small:save_pretrained_merged(dir .. "/small", tokenizer).merged_onto)
    unsloth.FastLanguageModel.get_peft_model(small, { r = 4, init_lora_weights = false })
    assert.equals("decoded weights", small:save_pretrained_merged(dir .. "/small", tokenizer).merged_onto)
    support.remove(dir)
    support.remove(model_dir)
  end)
end)

describe("a Modelfile", function()
  local TALK = { { role = "user", content = "Hi there" }, { role = "assistant", content = "Yo" }, { role = "user", content = "And now?" } }
  local NONE = { llama = true, ["qwen3-thinking"] = true, starling = true, vicuna = true, vicuna_old = true }

  it("says what the chat template says", function()
    for name in pairs(templates.list) do
      local tok = unsloth.AutoTokenizer.from_pretrained(support.root .. "examples/tiny-llama")
      unsloth.get_chat_template(tok, { chat_template = name, map_eos_token = false })
      local text = modelfile.make(tok, "m.gguf")
      assert.equals(not NONE[name], text ~= nil, name)
      if text then
        local p = modelfile.parts(tok)
        local function said(messages) return tok:apply_chat_template(messages, { tokenize = false, add_generation_prompt = true }) end
        assert.equals(said(TALK), modelfile.join(p, tok, TALK), name)
        if p.system then
          local told = { { role = "system", content = "Be brief." }, TALK[1] }
          assert.equals(said(told), modelfile.join(p, tok, told), name)
        end
      end
    end
  end)

  it("is what Ollama reads", function()
    local tok = unsloth.AutoTokenizer.from_pretrained(support.root .. "examples/tiny-llama")
    unsloth.get_chat_template(tok, { chat_template = "chatml", map_eos_token = false })
    assert.equals([[
# ollama create NAME -f Modelfile
FROM ./m.gguf
TEMPLATE """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
<|im_start|>user
{{ else }}<|im_start|>user
{{ end }}{{ .Prompt }}<|im_end|>
<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
PARAMETER stop "<|end_of_text|>"
]], modelfile.make(tok, "m.gguf"))
  end)

  it("keeps a BOS that is part of the template and that nobody else adds", function()
    local place = support.tiny_folder()
    local json = unsloth.json.decode(support.read(place .. "/tokenizer.json"))
    json.post_processor = nil
    support.write(place .. "/tokenizer.json", unsloth.json.encode(json))
    local tok = unsloth.AutoTokenizer.from_pretrained(place)
    local bos = tok.bos_token
    assert.not_equals(tok:token_to_id(bos), tok:encode "a"[1])
    local template = "{% if messages[0].role != 'system' %}BOSsystem: Be kind.;{% endif %}{% for m in messages %}BOS{{ m.role }}: {{ m.content }};"
      .. "{% endfor %}{% if add_generation_prompt %}BOSassistant: {% endif %}"
    unsloth.get_chat_template(tok, { chat_template = { (template:gsub("BOS", bos)), tok.eos_token }, map_eos_token = false })
    local text = modelfile.make(tok, "m.gguf")
    assert.is_truthy(text and text:find("{{ if .System }}" .. bos .. "system: {{ .System }};" .. bos .. "user: ", 1, true), text)
    support.remove(place)
  end)

  it("finds llama3's rope again in a GGUF, and writes any other as what it is", function()
    local _, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = support.root .. "examples/tiny-llama", device = "cpu" }
    local vocabulary = 1024 -- of tiny-llama
    for original, kind in pairs { [8192] = "llama3", [16] = "longrope" } do
      local dir = support.temp_dir()
      finally(function() support.remove(dir) end)
      local model = unsloth.FastLanguageModel.from_config({ architectures = { "LlamaForCausalLM" }, vocab_size = vocabulary, hidden_size = 64,
        intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 1, num_key_value_heads = 1, max_position_embeddings = 4 * original,
        rope_theta = 500000, initializer_range = 0.3, rope_scaling = { rope_type = "llama3", factor = 8, low_freq_factor = 1,
          high_freq_factor = 4, original_max_position_embeddings = original } }, { device = "cpu", dtype = "float32", max_seq_length = 64 })
      model:save_pretrained_gguf(dir .. "/gguf", tokenizer, { quantization_method = "f32" })
      local read = unsloth.FastLanguageModel.from_pretrained { model_name = dir .. "/gguf/unsloth.F32.gguf", device = "cpu", dtype = "float32",
        load_in_4bit = false }
      read:save_pretrained_merged(dir .. "/merged", tokenizer, { save_method = "merged_32bit" })
      local ids = {}
      for n = 1, 60 do ids[n] = n * 7 % vocabulary end
      local again = core.model_open(dir .. "/merged", { device = "cpu", dtype = "float32" })
      local far = again:logits(ids):distance(model:logits(ids))
      assert.is_true(far < 1e-5, kind .. ": " .. far)
      assert.matches('"' .. kind .. '"', support.read(dir .. "/merged/config.json"), 1, true)
    end
  end)
end)
