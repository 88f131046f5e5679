-- Chat templates from Lua: rendering, applying, templates by name.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local templates = require "unsloth.templates"
local unsloth = require "unsloth"

local FastLanguageModel = unsloth.FastLanguageModel
local render = unsloth.chat_template.render
local TALK = { { role = "user", content = "Hi" }, { role = "assistant", content = "Yo" }, { role = "user", content = "Bye" } }

describe("a chat template", function()
  local dir, tok

  before_each(function()
    dir = support.temp_dir()
    support.write(dir .. "/tokenizer.json", support.tokenizer_json())
    support.write(dir .. "/tokenizer_config.json", unsloth.json.encode { bos_token = "<s>", eos_token = "</s>", pad_token = "<pad>" })
    tok = unsloth.AutoTokenizer.from_pretrained(dir)
  end)
  after_each(function() support.remove(dir) end)

  it("renders with Lua's values", function()
    assert.equals("Hi, Ann and Bob", render("{{ greeting }}, {{ names | join(' and ') }}", { greeting = "Hi", names = { "Ann", "Bob" } }))
    assert.equals("None False True", render("{{ n }} {{ f }} {{ u is undefined }}", { n = unsloth.json.null, f = false }))
    assert.equals("1 1.0", render("{{ i }} {{ x }}", { i = 1, x = 1.0 }))
    assert.equals("", render "")
    support.fails("USL_ERR_INVALID", "not today", render, "{{ raise_exception('not today') }}")
    support.fails("USL_ERR_FORMAT", "line 2", render, "a\n{{ 1 / 0 }}")
    support.fails("USL_ERR_INVALID", "template", render, 5)
  end)

  it("turns messages into text or ids", function()
    unsloth.get_chat_template(tok, "zephyr")
    local text = tok:apply_chat_template(TALK, { tokenize = false, add_generation_prompt = true })
    assert.equals("<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nBye</s>\n<|assistant|>\n", text)
    assert.same(tok:encode(text, { add_special_tokens = false }), tok:apply_chat_template(TALK, { add_generation_prompt = true }))
    assert.same({ text, text }, tok:apply_chat_template({ TALK, TALK }, { tokenize = false, add_generation_prompt = true }))
    assert.equals("3!", tok:apply_chat_template(TALK, { tokenize = false, mark = "!", chat_template = "{{ messages | length }}{{ mark }}" }))
    assert.equals('[{"name": "f"}]2', tok:apply_chat_template(TALK, { tokenize = false, tools = { { name = "f" } },
      documents = { { title = "a" }, { title = "b" } }, chat_template = "{{ tools | tojson }}{{ documents | length }}" }))
    local written = '[{"name": "f", "description": "d"}]'
    for _, tools in ipairs { written, unsloth.json.decode(written) } do
      assert.equals(written, tok:apply_chat_template(TALK, { tokenize = false, tools = tools, chat_template = "{{ tools | tojson }}" }))
    end
    support.fails("USL_ERR_INVALID", "no list", tok.apply_chat_template, tok, TALK, { tools = '{"name": "f"}' })
    support.fails("USL_ERR_FORMAT", "tools", tok.apply_chat_template, tok, TALK, { tools = '[{"name"' })
    assert.equals("<|user|>\nHi</s>\n<|assistant|>\nYo", tok:apply_chat_template({ TALK[1], TALK[2] }, { tokenize = false, continue_final_message = true }))
    support.fails("USL_ERR_INVALID", "add_generation_prompt", tok.apply_chat_template, tok, TALK, { add_generation_promt = true })
    support.fails("USL_ERR_INVALID", "messages", tok.apply_chat_template, tok)
  end)

  it("is asked for where there is none", function()
    support.fails("USL_ERR_INVALID", "get_chat_template", tok.apply_chat_template, tok, TALK, { tokenize = false })
    support.fails("USL_ERR_INVALID", 'did you mean "llama-3.1"', unsloth.get_chat_template, tok, "llama-3.11")
    support.fails("USL_ERR_INVALID", "tokenizer", unsloth.get_chat_template, {}, "chatml")
  end)

  it("exists under each name, and reads each conversation", function()
    for name in pairs(templates.list) do
      unsloth.get_chat_template(tok, { chat_template = name, map_eos_token = false })
      local text = tok:apply_chat_template(TALK, { tokenize = false, add_generation_prompt = true })
      for _, message in ipairs(TALK) do assert.is_truthy(text:find(message.content, 1, true), name) end
      assert.is_nil(text:find("{system_message}", 1, true), name)
    end
    for alias, name in pairs(templates.aliases) do assert.is_truthy(templates.list[name], alias) end
  end)

  it("takes a system message of the caller's", function()
    unsloth.get_chat_template(tok, { chat_template = "vicuna", system_message = "It's \\ 100%\n\"so\"" })
    assert.equals("<s>It's \\ 100%\n\"so\" USER: Hi ", tok:apply_chat_template({ TALK[1] }, { tokenize = false }))
    unsloth.get_chat_template(tok, { chat_template = { "{{ '{system_message}' }}|{{ messages[0].content }}", "</s>" }, system_message = "S" })
    assert.equals("S|Hi", tok:apply_chat_template(TALK, { tokenize = false }))
    support.fails("USL_ERR_INVALID", "system message", unsloth.get_chat_template, tok, { chat_template = "zephyr", system_message = "x" })
  end)

  it("reads a data set's own names", function()
    local usual = unsloth.get_chat_template(tok, "zephyr"):apply_chat_template(TALK, { tokenize = false })
    local mapping = { role = "from", content = "value", user = "human", assistant = "gpt" }
    unsloth.get_chat_template(tok, { chat_template = "zephyr", mapping = mapping })
    local rows = { { from = "human", value = "Hi" }, { from = "gpt", value = "Yo" }, { from = "human", value = "Bye" } }
    assert.equals(usual, tok:apply_chat_template(rows, { tokenize = false }))
    assert.equals(usual, tok:apply_chat_template(TALK, { tokenize = false }))
    unsloth.get_chat_template(tok, { chat_template = "zephyr", mapping = { user = "it's me" } })
    assert.equals("<|user|>\nx</s>\n", tok:apply_chat_template({ { role = "it's me", content = "x" } }, { tokenize = false }))
    support.fails("USL_ERR_INVALID", "speaker", unsloth.get_chat_template, tok, { chat_template = "zephyr", mapping = { speaker = "x" } })
  end)

  it("makes the end of a turn the end of the text", function()
    unsloth.get_chat_template(tok, { chat_template = { "{{ messages }}", "<pad>" } })
    assert.equals("<pad>", tok.eos_token)
    unsloth.get_chat_template(tok, { chat_template = { "{{ messages }}", "</s>" }, map_eos_token = false })
    assert.equals("<pad>", tok.eos_token)
  end)

  it("gives the end of the text the spelling of the end of a turn", function()
    local config = { bos_token = "<s>", eos_token = "</s>", pad_token = "</s>", add_bos_token = true,
      added_tokens_decoder = { ["257"] = { content = "</s>", special = true } } }
    support.write(dir .. "/tokenizer_config.json", unsloth.json.encode(config))
    tok = unsloth.AutoTokenizer.from_pretrained(dir)
    unsloth.get_chat_template(tok, { chat_template = "chatml" })
    local other = support.temp_dir()
    tok:save_pretrained(other)
    for _, one in ipairs { tok, unsloth.AutoTokenizer.from_pretrained(other) } do
      assert.equals("<|im_end|>", one.eos_token)
      assert.equals("<|im_end|>", one.pad_token)
      assert.equals(257, one.eos_token_id)
      assert.equals(259, #one)
      assert.same({ 72, 105, 257 }, one:encode("Hi<|im_end|>", { add_special_tokens = false }))
      assert.same({ 60, 47, 115, 62 }, one:encode("</s>", { add_special_tokens = false }))
      assert.equals("Hi<|im_end|>", one:decode { 72, 105, 257 })
      assert.equals("<|im_start|>user\nHi<|im_end|>\n", one:apply_chat_template({ TALK[1] }, { tokenize = false }))
    end
    local saved = support.read(other .. "/tokenizer.json") .. support.read(other .. "/tokenizer_config.json")
    assert.is_nil(saved:find('"</s>"', 1, true))
    support.fails("USL_ERR_INVALID", "another", tok.rename, tok, 257, "<s>")
    support.fails("USL_ERR_INVALID", "id", tok.rename, tok, 5000, "x")
    -- Twice, and what was saved is renamed too.
    tok:rename(257, "<end>")
    tok:save_pretrained(other)
    assert.equals("<end>", unsloth.AutoTokenizer.from_pretrained(other).eos_token)
    support.remove(other)
  end)

  it("tells where answers begin", function()
    local markers = require("unsloth.chat").markers
    for name, want in pairs { alpaca = { "### Instruction:\n", "### Response:\n" }, vicuna = { "USER:", "ASSISTANT:" },
      mistral = { "[INST]", " [/INST]" }, llama = { "<s>[INST]", " [/INST]" },
      ["llama-3.1"] = { "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n" },
      ["qwen3-thinking"] = { "<|im_start|>user\n", "<|im_start|>assistant\n" }, ["gemma-3"] = { "<start_of_turn>user\n", "<start_of_turn>model\n" } } do
      assert.same(want, { markers(unsloth.get_chat_template(tok, { chat_template = name, map_eos_token = false })) })
    end
  end)

  it("goes around what is trained and answered", function()
    local folder = support.tiny_folder()
    local model <close>, own = support.open(folder)
    FastLanguageModel.get_peft_model(model, { r = 4 })
    support.fails(nil, "get_chat_template", model.generate, model, { TALK[1] }, { max_new_tokens = 2 })
    unsloth.get_chat_template(own, "zephyr")
    local prompt = own:encode("<|user|>\nHi</s>\n<|assistant|>\n", { add_special_tokens = false })
    assert.equals(model:generate(prompt, { max_new_tokens = 4 }), model:generate({ TALK[1] }, { max_new_tokens = 4 }))
    local function stats(rows, args)
      support.write(folder .. "/rows.json", unsloth.json.encode(rows))
      local trainer = unsloth.SFTTrainer { model = model, tokenizer = own, args = unsloth.TrainingArguments { max_steps = 1, report_to = "none",
        output_dir = folder .. "/out" }, train_dataset = unsloth.load_dataset("json", { data_files = folder .. "/rows.json", split = "train" }) }
      if args then unsloth.train_on_responses_only(trainer, args) end
      return trainer.rows:stats()
    end
    local two = { TALK[1], TALK[2] }
    local text = own:apply_chat_template(two, { tokenize = false })
    local ids = own:encode(text, { add_special_tokens = false })
    local all = stats { { messages = two } }
    assert.equals(#ids, all.tokens)
    -- The answer, </s> and the line break behind it.
    assert.equals(4, stats({ { messages = two } }, {}).counted)
    assert.equals(4, stats({ { prompt = { TALK[1] }, completion = { TALK[2] } } }).counted)
    support.fails("USL_ERR_FORMAT", "row 2", stats, { { messages = two }, { messages = { { role = "user" } } } })
    support.remove(folder)
  end)

  it("is saved with the tokenizer", function()
    unsloth.get_chat_template(tok, "llama-3")
    local other = support.temp_dir()
    tok:save_pretrained(other)
    local again = unsloth.AutoTokenizer.from_pretrained(other)
    assert.equals(tok.chat_template, again.chat_template)
    assert.equals(support.read(other .. "/chat_template.jinja"), tok.chat_template)
    support.remove(other)
  end)

  it("goes into a GGUF", function()
    local folder = support.tiny_folder()
    local model <close>, own = support.open(folder)
    unsloth.get_chat_template(own, "zephyr")
    model:save_pretrained_gguf(folder .. "/gguf", own, { quantization_method = "f16" })
    local path = support.shell("ls %s/gguf/*.gguf", folder):match "%S+"
    assert.equals(own.chat_template, unsloth.AutoTokenizer.from_pretrained(path).chat_template)
    support.remove(folder)
  end)

  for _, name in ipairs { "qwen3", "llama3_1", "deepseek_v3" } do
    support.it_with("data/tokenizers/" .. name, "is the tokenizer's own: " .. name, function(path)
      local config = unsloth.json.decode(support.read(path .. "/tokenizer_config.json"))
      local count = 0
      for _, case in ipairs(support.json_lines(path .. "/chat_cases.jsonl")) do
        local vars = { messages = case.messages, add_generation_prompt = case.add_generation_prompt, tools = case.tools or unsloth.json.null }
        for key, value in pairs(case.vars) do vars[key] = value end
        local ok, text = pcall(render, config.chat_template, vars)
        if case.rendered and case.rendered ~= unsloth.json.null then
          assert.equals(case.rendered, text)
        else
          assert.is_false(ok)
          assert.is_truthy(tostring(text):find(case.error, 1, true))
        end
        count = count + 1
      end
      assert.is_true(count > 10)
    end)
  end
end)
