-- luacheck: std lua54+busted
-- What the specs share: where outside data lies, temporary folders, a tiny model, the program as a child.
local core = require "unsloth.core"
local unsloth = require "unsloth"

local M = {}

M.root = debug.getinfo(1, "S").source:match "^@(.*)tests/lua/support%.lua$"
if M.root == "" then M.root = "./" end
M.shared = os.getenv "USL_SHARED" or M.root .. "../shared"

--- The path of something in the shared data, or nil.
function M.find(name)
  local path = M.shared .. "/" .. name
  return core.path_kind(path) and path or nil
end

--- it(), pending with a sentence where the shared data is absent. The function gets the path.
function M.it_with(name, title, body)
  local path = M.find(name)
  it(title, function()
    if not path then
      pending(M.shared .. "/" .. name .. " is not here")
      return
    end
    body(path)
  end)
end

function M.read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "a"
  file:close()
  return text
end

function M.write(path, text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
  return path
end

--- The lines of a file of JSON lines, decoded.
function M.json_lines(path)
  local rows = {}
  for line in io.lines(path) do rows[#rows + 1] = unsloth.json.decode(line) end
  return rows
end

--- A new folder; the caller removes it with M.remove.
function M.temp_dir()
  local path = os.tmpname()
  os.remove(path)
  core.make_dir(path)
  return path
end

M.remove = core.remove_path

--- What fn raises; fails when it raises nothing.
function M.error_of(fn, ...)
  local ok, err = pcall(fn, ...)
  assert(not ok, "an error was expected")
  return err
end

--- Asserts that fn raises an error object with this code whose sentence holds each of the plain texts.
function M.fails(code, texts, fn, ...)
  local err = M.error_of(fn, ...)
  local text = tostring(err)
  assert(type(err) ~= "string", "an error object was expected, not the text: " .. text)
  if code then assert(err.code == code, ("%s was expected, not %s: %s"):format(code, tostring(err.code), text)) end
  assert(text == err.message and not text:find("\n", 1, true), "tostring must be the message, one sentence: " .. text)
  for _, part in ipairs(type(texts) == "table" and texts or { texts }) do
    assert(text:find(part, 1, true), ('"%s" does not mention "%s"'):format(text, part))
  end
  return err
end

M.config = { architectures = { "LlamaForCausalLM" }, model_type = "llama", hidden_act = "silu", rms_norm_eps = 1e-5, vocab_size = 259,
  hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, head_dim = 8,
  max_position_embeddings = 256, rope_theta = 10000.0, tie_word_embeddings = false, bos_token_id = 256, eos_token_id = 257 }

-- GPT-2's names of the 256 bytes: printable ones stand for themselves, the others for characters from U+0100 on.
local function byte_names()
  local names, extra = {}, 0
  for byte = 0, 255 do
    local plain = byte >= 33 and byte <= 126 or byte >= 161 and byte <= 172 or byte >= 174
    names[byte] = utf8.char(plain and byte or 256 + extra)
    if not plain then extra = extra + 1 end
  end
  return names
end

--- The text of a tokenizer.json in which each byte is a token; <s> is 256, </s> 257, <pad> 258.
function M.tokenizer_json()
  local json, vocab = unsloth.json, {}
  for byte, name in pairs(byte_names()) do vocab[name] = byte end
  local added = {}
  for i, content in ipairs { "<s>", "</s>", "<pad>" } do
    added[i] = { id = 255 + i, content = content, single_word = false, lstrip = false, rstrip = false, normalized = false, special = true }
  end
  return json.encode {
    version = "1.0", added_tokens = added,
    pre_tokenizer = { type = "ByteLevel", add_prefix_space = false, trim_offsets = true, use_regex = true },
    post_processor = { type = "TemplateProcessing",
      single = { { SpecialToken = { id = "<s>", type_id = 0 } }, { Sequence = { id = "A", type_id = 0 } } },
      pair = { { Sequence = { id = "A", type_id = 0 } }, { Sequence = { id = "B", type_id = 1 } } },
      special_tokens = { ["<s>"] = { id = "<s>", ids = { 256 }, tokens = { "<s>" } } } },
    decoder = { type = "ByteLevel", add_prefix_space = true, trim_offsets = true, use_regex = true },
    model = { type = "BPE", vocab = vocab, merges = json.array {} },
  }
end

--- A folder with a model of random weights and a tokenizer of bytes.
function M.tiny_folder()
  local dir = M.temp_dir()
  local model <close> = unsloth.FastLanguageModel.from_config(M.config, { random_state = 7, dtype = "float32" })
  model:save_pretrained(dir)
  M.write(dir .. "/tokenizer.json", M.tokenizer_json())
  M.write(dir .. "/tokenizer_config.json", unsloth.json.encode { bos_token = "<s>", eos_token = "</s>", pad_token = "<pad>" })
  return dir
end

--- That folder opened: model, tokenizer. opts are those of from_pretrained.
function M.open(dir, opts)
  local o = { model_name = dir, dtype = "float32", load_in_4bit = false }
  for name, value in pairs(opts or {}) do o[name] = value end
  return unsloth.FastLanguageModel.from_pretrained(o)
end

--- Runs a shell command; returns its standard output, its standard error and its exit status (signals: 128 and the number).
function M.shell(command, ...)
  local out, err = os.tmpname(), os.tmpname()
  local _, kind, code = os.execute(("( %s ) >%s 2>%s </dev/null"):format(command:format(...), out, err))
  local printed, complained = M.read(out), M.read(err)
  os.remove(out)
  os.remove(err)
  return printed, complained, kind == "signal" and 128 + code or code
end

--- A word for the shell.
function M.quote(text)
  return "'" .. text:gsub("'", [['\'']]) .. "'"
end

local function program_path()
  local least = 0
  while arg and arg[least - 1] do least = least - 1 end
  local name = arg and arg[least] or ""
  return name:find("unsloth-lua", 1, true) and name or nil
end

--- The program that runs this, or nil in a stock lua5.4.
M.program = program_path()

--- it(), pending where this is not our program.
function M.it_program(title, body)
  it(title, function()
    if not M.program then
      pending "this is not unsloth-lua"
      return
    end
    body()
  end)
end

--- Runs the program on a terminal, its history in dir; dialogue: { expected, typed } pairs as tests/lua/terminal.py has them.
function M.converse(dir, dialogue, words)
  local lines = {}
  for i, pair in ipairs(dialogue) do lines[i] = table.concat(pair, "|") end
  local path = M.write(dir .. "/dialogue", table.concat(lines, "\n"))
  local out, err, code = M.shell("HOME=%s python3 %s %s %s < %s", M.quote(dir), M.quote(M.root .. "tests/lua/terminal.py"), M.program, words or "",
    M.quote(path))
  return out .. err, code
end

return M
