--- unsloth-lua chat MODEL: a conversation, on a terminal or through a pipe.
local adapters = require "unsloth.model"
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local files = require "unsloth.files"
local unsloth = require "unsloth"

local o = args.parse(arg, {
  name = "chat", words = "MODEL",
  about = "Talks with a model folder, an adapter folder or a .gguf, through the model's own chat template.\n"
    .. "A line is a message, one that ends with \\ goes on in the next; /help lists the commands. Through a pipe the answers alone are printed.",
  options = {
    { "adapter", "DIR", "a PEFT folder to put on the model; /adapter off and on take it away and back" },
    { "system", "TEXT", "what the model is told first" },
    { "template", "NAME", "a chat template by name (chatml, llama-3.1, alpaca, ...) in place of the model's own" },
    { "max-new-tokens", "N", "tokens of an answer at most", 512, within = { 1 } },
    { "temperature", "X", "0 is greedy", 0, within = { 0 } },
    { "top-k", "N", "draw from the K likeliest; 0: all", 0, within = { 0, math.maxinteger >> 32 } },
    { "top-p", "X", "draw from the likeliest that reach P together", 1.0, within = { 0, 1 } },
    { "min-p", "X", "leave out what is less likely than P times the likeliest", 0.0, within = { 0, 1 } },
    { "repetition-penalty", "X", "above 1 makes repeats less likely", 1.0, within = { 0 } },
    { "seed", "N", "of the draw", 3407, within = { 0 } },
    { "max-seq-length", "N", "tokens of the whole conversation at most (default: 2048, or the model's limit when that is less)", within = { 16 } },
    { "dtype", "NAME", "float32, bfloat16 or float16 (default: the best for this machine)", one_of = args.dtypes },
    { "load-in-4bit", nil, "quantise 16-bit weights to 4 bits" },
    { "device", "NAME", "cpu, cuda, cuda:1 (default: the GPU when there is one)" },
  },
})
if #o ~= 1 then errors.invalid "chat wants one model; --help shows the options" end
if o.adapter then adapters.check_adapter(o.adapter) end

local model, tokenizer = unsloth.FastLanguageModel.from_pretrained {
  model_name = o[1], load_in_4bit = o.load_in_4bit or false, dtype = o.dtype, device = o.device, max_seq_length = o.max_seq_length }
if not tokenizer then errors.raise("USL_ERR_NOT_FOUND", "%s has no tokenizer, so it cannot read a text", o[1]) end
if o.adapter then model:load_adapter(o.adapter) end
if o.template then
  tokenizer = unsloth.get_chat_template(tokenizer, { chat_template = o.template })
elseif not tokenizer.chat_template then
  errors.raise("USL_ERR_NOT_FOUND", "%s has no chat template, so it does not know turns: give --template chatml (or alpaca, llama-3.1, ...), "
    .. "or continue texts with unsloth-lua generate", o[1])
end

local has_prompt, prompt = pcall(require, "unsloth.prompt")
local shows = core.is_terminal(1)
local terminal = has_prompt and core.is_terminal(0) and shows

local messages, system = {}, o.system
local adapter_name = model:active_adapter()
local seed = o.seed

local function reset()
  messages = system and { { role = "system", content = system } } or {}
end
reset()

local function say(format, ...)
  io.stderr:write(core.printable(select("#", ...) > 0 and format:format(...) or format), "\n")
end

-- ---- Answers --------------------------------------------------------------------------------------------------------

local function sampling()
  return { max_new_tokens = o.max_new_tokens, temperature = o.temperature, top_k = o.top_k, top_p = o.top_p, min_p = o.min_p,
    repetition_penalty = o.repetition_penalty, seed = seed }
end

-- Streams the answer to what messages hold and adds it. Ctrl-C keeps what has come; another error takes the question back.
local function answer()
  local pieces = {}
  -- The handler is Lua, so that an interrupt which the library has answered, and Lua not yet, ends in here too.
  local ok, err = xpcall(function()
    for piece in model:stream(messages, sampling()) do
      pieces[#pieces + 1] = piece
      io.write(shows and core.printable(piece) or piece)
      io.flush()
    end
  end, function(e) return e end)
  local stopped = not ok and type(err) == "table" and err.code == "USL_ERR_CANCELLED"
  if ok or stopped then
    print(stopped and " [stopped]" or "")
    messages[#messages + 1] = { role = "assistant", content = table.concat(pieces) }
    seed = seed + 1 -- drawn answers differ from turn to turn; the whole conversation repeats from its seed
    return
  end
  if type(err) ~= "table" then error(err, 0) end
  table.remove(messages)
  say("%s%s", tostring(err), tostring(err):find("max_seq_length", 1, true) and "; /reset begins anew" or "")
end

-- ---- Commands -------------------------------------------------------------------------------------------------------

local COMMANDS, HELP = {}, {}

local function command(name, words, text, fn)
  COMMANDS[name] = fn
  HELP[#HELP + 1] = ("  /%-24s %s"):format(name .. (words ~= "" and " " .. words or ""), text)
end

command("help", "", "this list", function() say(table.concat(HELP, "\n")) end)
command("reset", "", "forget the conversation; the system prompt stays", reset)
command("system", "[TEXT]", "tell the model something first, and begin anew; without TEXT: nothing", function(text)
  system = text ~= "" and text or nil
  reset()
end)
command("adapter", "on | off", "answer with the adapter, or with the model alone", function(word)
  if not adapter_name then return say "there is no adapter here: start with --adapter DIR" end
  if word == "on" then
    model:set_adapter(adapter_name)
  elseif word == "off" then
    model:disable_adapter()
  elseif word ~= "" then
    return say("/adapter %s: on or off is wanted", word)
  end
  say("the adapter is %s", model:active_adapter() and "on" or "off")
end)
command("retry", "", "answer the last message again", function()
  if #messages == 0 or messages[#messages].role ~= "assistant" then return say "there is no answer yet" end
  table.remove(messages)
  answer()
end)
command("undo", "", "forget the last message and its answer", function()
  for _ = 1, 2 do
    if #messages > 0 and messages[#messages].role ~= "system" then table.remove(messages) end
  end
  say("%d messages are left", #messages)
end)
command("history", "", "show the conversation", function()
  for _, m in ipairs(messages) do say("%s: %s", m.role, m.content) end
end)
command("save", "FILE", "write the conversation as JSON, a row of messages to train on", function(path)
  if path == "" then return say "/save wants a file's name" end
  files.write(path, unsloth.json.encode { messages = unsloth.json.array(messages) } .. "\n")
  say("%d messages in %s", #messages, path)
end)
command("load", "FILE", "go on with a conversation that /save has written", function(path)
  local text = files.read(path)
  if not text then return say("%s: there is no such file", path) end
  local row = unsloth.json.decode(text, path)
  if type(row) ~= "table" or type(row.messages) ~= "table" then return say("%s: holds no messages", path) end
  messages = {}
  for i, m in ipairs(row.messages) do messages[i] = { role = m.role, content = m.content } end
  system = messages[1] and messages[1].role == "system" and messages[1].content or nil
  say("%d messages from %s", #messages, path)
end)
command("temperature", "X", "0 is greedy", function(text)
  local value = tonumber(text)
  if not value or value < 0 or value - value ~= 0 then return say "/temperature wants a number of 0 or more" end
  o.temperature = value
end)
command("template", "", "show what the model reads", function()
  if #messages == 0 then return say "there is nothing yet" end
  local open = messages[#messages].role ~= "assistant"
  say("%s", tokenizer:apply_chat_template(messages, { tokenize = false, add_generation_prompt = open }))
end)
command("quit", "", "end; so does the end of input", function() return true end)
COMMANDS.exit, COMMANDS.clear = COMMANDS.quit, COMMANDS.reset -- as other programs call them

-- True when the conversation is to end.
local function run_command(line)
  local name, rest = line:match "^/(%a*)%s*(.-)%s*$"
  local fn = COMMANDS[name or ""]
  if fn then
    local ok, result = xpcall(fn, function(e) return e end, rest)
    if not ok and type(result) ~= "table" then error(result, 0) end
    if not ok then say("%s", tostring(result)) end
    return ok and result
  end
  local names = {}
  for known in pairs(COMMANDS) do names[#names + 1] = known end
  table.sort(names)
  local near = core.nearest(name or line, names)
  say("/%s is no command%s", name or line:sub(2), near and (": did you mean /%s?"):format(near) or "; /help lists them")
end

-- ---- The conversation -----------------------------------------------------------------------------------------------

-- A line; nil at the end, false when it was left with Ctrl-C.
local function read(text)
  if not terminal then return io.read "l" end
  local line = prompt.read(text)
  if line and line ~= "" then prompt.remember(line) end
  if line == false then print() end
  return line
end

local function read_message()
  local line = read "> "
  while line and line:sub(-1) == "\\" do
    local more = read ">> "
    if not more then return more end
    line = line:sub(1, -2) .. "\n" .. more
  end
  return line
end

if terminal then say("%s on %s%s; /help lists the commands, Ctrl-C stops an answer", o[1], model.device, adapter_name and ", with an adapter" or "") end
while true do
  local line = read_message()
  if line == nil then break end
  if line and line:sub(1, 1) == "/" then
    if run_command(line) then break end
  elseif line and line:find "%S" then
    messages[#messages + 1] = { role = "user", content = line }
    answer()
  end
end
if terminal then print() end
