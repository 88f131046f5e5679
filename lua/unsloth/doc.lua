--- The documentation in the annotations of these modules and of lua/meta: for help, completion, the reference.
---
---     help(unsloth.plot)
---     help "learning_rate"
local core = require "unsloth.core"
local files = require "unsloth.files"

local M = {}

-- ---- Reading annotations --------------------------------------------------------------------------------------------

-- Takes a block of comment lines apart: text, example, params, returns, class.
local function read_block(lines)
  local entry = { text = {}, example = {}, params = {}, returns = {}, fields = {} }
  for _, line in ipairs(lines) do
    local tag, rest = line:match "^@(%a+)%s*(.*)$"
    if tag == "param" or tag == "field" then
      local name, more = rest:match "^(%S+)%s*(.*)$"
      local list = tag == "param" and entry.params or entry.fields
      list[#list + 1] = { name = name, rest = more }
    elseif tag == "return" then
      entry.returns[#entry.returns + 1] = rest
    elseif tag == "class" then
      entry.class = rest:match "^[%w_.]+"
    elseif tag then
      entry[tag] = rest
    elseif line:find "^    " then
      entry.example[#entry.example + 1] = line:sub(5)
    else
      entry.text[#entry.text + 1] = line
    end
  end
  for _, list in ipairs { entry.params, entry.fields } do
    for _, p in ipairs(list) do p.type, p.text = M.split_type(p.rest) end
  end
  while entry.text[#entry.text] == "" do table.remove(entry.text) end
  return entry
end

--- A type in front of a text: types may hold spaces inside brackets, as in { a: number }.
function M.split_type(text)
  local depth, i = 0, 1
  while i <= #text do
    local c = text:sub(i, i)
    if c:find "[%[{(<]" then depth = depth + 1 end
    if c:find "[%]})>]" then depth = depth - 1 end
    if c == " " and depth == 0 and not text:sub(1, i - 1):find "[|:,]$" and not text:find("^ *|", i) then break end
    i = i + 1
  end
  return text:sub(1, i - 1), (text:sub(i):gsub("^%s+", ""))
end

-- What stands below a comment: "function A.b(x)", "function A:b(x)", "A.b = ", "local A = ".
local function read_definition(entry, line)
  local name, params = line:match "^function ([%w_.:]+)%s*%((.-)%)"
  entry.name = name or line:match "^local function ([%w_]+)" or line:match "^([%w_.]+)%s*=" or line:match "^local ([%w_]+)%s*="
  entry.signature = params
  entry.is_local = line:find "^local function" ~= nil
end

--- The entries of a Lua file, in order. The first may be the module's own.
function M.parse(path)
  local entries, block, number = {}, nil, 0
  local text = files.read(path) or ""
  for line in (text:gsub("\n*$", "\n")):gmatch "(.-)\n" do
    number = number + 1
    local comment = line:match "^%-%-%- ?(.*)$" or line:match "^%-%-%-$" and ""
    if comment then
      block = block or {}
      block[#block + 1] = comment
    elseif block then
      local entry = read_block(block)
      entry.file, entry.line = path, number
      entry.is_module = #entries == 0 and not line:find "^function" and not entry.class
      if not entry.is_module then read_definition(entry, line) end
      entries[#entries + 1] = entry
      block = nil
    elseif line:find "^function " then
      local entry = read_block {}
      entry.file, entry.line = path, number
      read_definition(entry, line)
      entries[#entries + 1] = entry
    end
  end
  return entries
end

-- ---- Which names there are ------------------------------------------------------------------------------------------

--- The folder that holds these modules.
function M.root()
  return (debug.getinfo(1, "S").source:match "^@(.*)/unsloth/doc%.lua$")
end

--- Classes of handles by their metatable's name, and the fields that are no methods.
M.classes = {
  ["unsloth.Tensor"] = { name = "Tensor", fields = { "shape", "dtype", "ndim", "device" } },
  ["unsloth.Model"] = { name = "Model", fields = { "tokenizer", "max_seq_length", "device", "dtype", "name_or_path" } },
  ["unsloth.Tokenizer"] = { name = "Tokenizer", fields = { "bos_token", "bos_token_id", "eos_token", "eos_token_id", "pad_token",
    "pad_token_id", "unk_token", "unk_token_id", "chat_template" } },
  ["unsloth.Dataset"] = { name = "Dataset", fields = {} },
  ["unsloth.Rows"] = { name = "Rows", fields = {} },
  ["unsloth.Generator"] = { name = "Generator", fields = {} },
}

-- What a class keeps for itself: the modules' own tools.
local HIDDEN = { ["Model.describe"] = true, ["Tensor.describe"] = true, ["Dataset.describe"] = true, ["Tokenizer.describe"] = true }

-- Public tables by the name under which help knows them.
local function public_tables()
  local unsloth = require "unsloth"
  local sft = require "unsloth.sft"
  local out = { { "unsloth", unsloth }, { "unsloth.FastLanguageModel", unsloth.FastLanguageModel },
    { "unsloth.AutoTokenizer", unsloth.AutoTokenizer }, { "unsloth.chat_template", unsloth.chat_template },
    { "unsloth.safetensors", unsloth.safetensors }, { "unsloth.quant", unsloth.quant }, { "unsloth.json", unsloth.json },
    { "Trainer", sft.Trainer }, { "Plot", require("unsloth.plot").Plot } }
  for _, class in pairs(M.classes) do out[#out + 1] = { class.name, core[class.name] } end
  return out
end

local index

-- Same functions under several names: the first is the one that help shows.
local ALIAS = { FastModel = true, standardize_sharegpt = true, UnslothTrainer = true, SFTConfig = true, UnslothTrainingArguments = true,
  is_bf16_supported = true }

--- Functions that stand in front of others (unsloth.report wraps what saves) -> those.
M.behind = setmetatable({}, { __mode = "k" })

local function source_key(file, line)
  return file:match "([^/]+/[^/]+)$" .. ":" .. line
end

local function build()
  index = { by_name = {}, by_value = {}, modules = {}, names = {} }
  local root, at, meta = M.root(), {}, {}
  local function read(path, module)
    for _, entry in ipairs(M.parse(path)) do
      if entry.is_module then
        index.modules[module] = entry
      elseif entry.name then
        at[source_key(path, entry.line)] = entry
        if path:find("/meta/", 1, true) then meta[entry.name:gsub(":", ".")] = entry end
      end
    end
  end
  for _, name in ipairs(core.list_dir(root .. "/unsloth")) do
    local module = name:match "^(.*)%.lua$"
    if module then read(root .. "/unsloth/" .. name, module == "init" and "unsloth" or module) end
  end
  for _, name in ipairs(core.path_kind(root .. "/meta") and core.list_dir(root .. "/meta") or {}) do
    if name:find "%.lua$" then read(root .. "/meta/" .. name, "meta") end
  end
  local in_core = {} -- what lua/meta/core.lua calls it
  for key, value in pairs(core) do in_core[value] = "core." .. key end
  for key, value in pairs(core.json) do in_core[value] = "core.json." .. key end
  for _, pair in ipairs(public_tables()) do
    for key, value in pairs(pair[2]) do
      if type(value) == "function" and type(key) == "string" and key:sub(1, 2) ~= "__" then
        local name = pair[1] .. "." .. key
        local real = M.behind[value] or value
        local info = debug.getinfo(real, "S")
        local entry
        if info.what == "C" then
          entry = meta[in_core[value] or name]
        else
          entry = at[source_key(info.source, info.linedefined)]
        end
        if not HIDDEN[name] then
          index.names[#index.names + 1] = name
          index.by_name[name] = { name = name, entry = entry, value = real }
          if not index.by_value[value] or ALIAS[index.by_value[value].key] then
            index.by_value[value] = { name = name, entry = entry, value = real, key = key }
            index.by_value[real] = index.by_value[value]
          end
        end
      end
    end
  end
  table.sort(index.names)
  return index
end

local function get_index()
  return index or build()
end

--- What is known of a function: { name, entry }, or nil.
function M.of(value)
  return get_index().by_value[value]
end

--- All public names with what is known of them, sorted.
function M.all()
  local out = {}
  for i, name in ipairs(get_index().names) do out[i] = get_index().by_name[name] end
  return out
end

--- Module names with their own text.
function M.modules()
  return get_index().modules
end

-- ---- Options --------------------------------------------------------------------------------------------------------

local function is_spec(t)
  local any = false
  for name, rule in pairs(t) do
    if type(name) ~= "string" or type(rule) ~= "table" or type(rule[1]) ~= "string" then return false end
    any = true
  end
  return any
end

-- Functions that hand their options on to another.
local HANDS_ON = { ["Model.generate"] = "Model.stream" }
-- Functions that share a table of rules with others, and take a part of it only.
local PART = { ["Dataset.filter"] = { num_proc = true, desc = true } }

--- The table of rules of a function's options (see unsloth.options), or nil. It is the one that the function checks with.
function M.options_of(value)
  local known = M.of(value)
  if known and HANDS_ON[known.name] then return M.options_of(get_index().by_name[HANDS_ON[known.name]].value) end
  value = M.behind[value] or value
  if type(value) ~= "function" or not debug.getupvalue then return nil end -- a host may not give it
  for i = 1, 255 do
    local name, upvalue = debug.getupvalue(value, i)
    if not name then return nil end
    if type(upvalue) == "table" and name:find "^%u+$" and is_spec(upvalue) then
      local part = known and PART[known.name]
      if not part then return upvalue end
      local spec = {}
      for key in pairs(part) do spec[key] = upvalue[key] end
      return spec
    end
  end
end

local MEANINGS = require "unsloth.meanings"

--- One line about an option.
function M.option_text(name, rule)
  local text = rule[1]:gsub("|", " or ")
  if rule.only then
    local words = {}
    for word in pairs(rule.only) do words[#words + 1] = type(word) == "string" and ("%q"):format(word) or tostring(word) end
    table.sort(words)
    text = table.concat(words, ", ")
  end
  if rule.default ~= nil and type(rule.default) ~= "table" then text = ("%s, default %s"):format(text,
    type(rule.default) == "string" and ("%q"):format(rule.default) or tostring(rule.default)) end
  if rule.alias then text = "the same as " .. rule.alias end
  if rule.note then text = text .. "; nothing to do: " .. rule.note end
  if rule.refuse then text = text .. "; not here: " .. rule.refuse end
  local meaning = not (rule.alias or rule.note or rule.refuse) and MEANINGS[name]
  if meaning then text = text .. "; " .. meaning end
  return name, text
end

local function sorted(t)
  local names = {}
  for name in pairs(t) do names[#names + 1] = name end
  table.sort(names)
  return names
end

-- ---- help -----------------------------------------------------------------------------------------------------------

local function signature_of(known)
  local entry = known.entry
  if not entry then return known.name .. "(...)" end
  local name = entry.name and entry.name:find(":", 1, true) and known.name:gsub("%.([%w_]+)$", ":%1") or known.name
  return ("%s(%s)"):format(name, entry.signature or "...")
end
M.signature_of = signature_of

local function add_options(lines, spec)
  local names = sorted(spec)
  lines[#lines + 1] = "options:"
  for _, name in ipairs(names) do
    local _, text = M.option_text(name, spec[name])
    lines[#lines + 1] = ("  %-28s %s"):format(name, text)
  end
end

-- The first sentence of a text, which may go on over several lines.
local function summary(entry)
  local text = table.concat(entry and entry.text or {}, " "):gsub("%s+", " ")
  return (text:match "^(.-[^.]%.)%f[%s\0]" or text)
end

-- Lines that end before the 120th column, all but the first behind so many spaces.
local function wrap(text, margin)
  local lines, line = {}, ""
  for word in text:gmatch "%S+" do
    if line ~= "" and margin + #line + #word >= 120 then
      lines[#lines + 1], line = line, ""
    end
    line = line == "" and word or line .. " " .. word
  end
  lines[#lines + 1] = line
  return table.concat(lines, "\n" .. (" "):rep(margin))
end

-- A name and a text beside it, which may take several lines.
local function beside(width, name, text)
  return ("  %-" .. width .. "s %s"):format(name, wrap(text, width + 3))
end

local function function_text(known)
  local lines, entry = { signature_of(known), "" }, known.entry
  for _, text in ipairs(entry and entry.text or {}) do lines[#lines + 1] = text end
  for _, p in ipairs(entry and entry.params or {}) do lines[#lines + 1] = ("  %-12s %s  %s"):format(p.name, p.type, p.text) end
  for _, r in ipairs(entry and entry.returns or {}) do lines[#lines + 1] = ("  %-12s %s"):format("returns", r) end
  if entry and #entry.example > 0 then
    lines[#lines + 1] = "example:"
    for _, text in ipairs(entry.example) do lines[#lines + 1] = "    " .. text end
  end
  local spec = M.options_of(known.value)
  if spec then add_options(lines, spec) end
  return table.concat(lines, "\n")
end

local function module_text(name, entry)
  local lines = {}
  for _, text in ipairs(entry.text) do lines[#lines + 1] = text end
  for _, text in ipairs(entry.example) do lines[#lines + 1] = "    " .. text end
  local inner = {}
  for _, known in ipairs(M.all()) do
    if known.entry and known.entry.file:match "([^/]+)%.lua$" == name then
      inner[#inner + 1] = beside(44, signature_of(known), summary(known.entry))
    end
  end
  if #inner > 0 then
    lines[#lines + 1] = ""
    table.move(inner, 1, #inner, #lines + 1, lines)
  end
  return table.concat(lines, "\n")
end

local function class_text(class)
  local lines = { class.name .. " has" }
  for _, known in ipairs(M.all()) do
    if known.name:find("^" .. class.name .. "%.") then
      lines[#lines + 1] = beside(44, signature_of(known), summary(known.entry))
    end
  end
  if #class.fields > 0 then lines[#lines + 1] = "  fields: " .. table.concat(class.fields, ", ") end
  return table.concat(lines, "\n")
end

-- Where an option is taken.
local function option_places(name)
  local lines = {}
  for _, known in ipairs(M.all()) do
    local spec = M.options_of(known.value)
    if spec and spec[name] and M.of(known.value).name == known.name then
      local _, text = M.option_text(name, spec[name])
      lines[#lines + 1] = ("%s { %s }: %s"):format(known.name, name, text)
    end
  end
  return #lines > 0 and table.concat(lines, "\n") or nil
end

local function overview()
  local lines = { 'help(x) or help "name" tells of a function, a class, a module or an option. There are', "" }
  for _, name in ipairs(sorted(M.modules())) do
    local entry = M.modules()[name]
    if name ~= "meta" then lines[#lines + 1] = beside(14, name, summary(entry)) end
  end
  lines[#lines + 1] = ""
  local classes = {}
  for _, class in pairs(M.classes) do classes[#classes + 1] = class.name end
  table.sort(classes)
  lines[#lines + 1] = "  classes: " .. table.concat(classes, ", ") .. ", Trainer"
  return table.concat(lines, "\n")
end

--- Every word that help knows, sorted: for completion and for what is near.
function M.topics()
  local set = { Trainer = true }
  for _, name in ipairs(get_index().names) do
    set[name], set[name:match "[^.]+$"] = true, true
  end
  for name in pairs(M.modules()) do set[name] = true end
  for _, class in pairs(M.classes) do set[class.name] = true end
  for _, known in ipairs(M.all()) do
    for name in pairs(M.options_of(known.value) or {}) do set[name] = true end
  end
  return sorted(set)
end

local function class_named(name)
  for _, class in pairs(M.classes) do
    if class.name == name then return class end
  end
  return name == "Trainer" and { name = "Trainer", fields = { "model", "args", "state", "log_history" } } or nil
end

-- A name with or without what stands before it: "plot", "unsloth.plot", "Model:generate", "generate".
local function find_name(topic)
  local names = get_index().by_name
  topic = topic:gsub(":", ".")
  for _, prefix in ipairs { "", "unsloth.", "unsloth.FastLanguageModel.", "Model.", "Tensor.", "Trainer.", "Dataset.", "Tokenizer." } do
    if names[prefix .. topic] then return names[prefix .. topic] end
  end
end

-- What people look for by another name: a line about it, and the names that help knows. Under lower-case words; a text of one word is
-- another subject.
local SUBJECTS = {
  gguf = { "GGUF is the file that llama.cpp, Ollama and LM Studio read. from_pretrained opens one as it opens a folder, model:save_pretrained_gguf "
    .. "writes one, and `unsloth-lua export` does so without a script.", "Model:save_pretrained_gguf", "quantization_method", "from_pretrained" },
  lora = { "LoRA trains a small adapter beside frozen weights: get_peft_model adds one, model:save_pretrained writes it, model:load_adapter "
    .. "or from_pretrained of its folder brings it back.", "get_peft_model", "Model:save_pretrained", "Model:load_adapter", "Model:set_adapter" },
  adapter = "lora", adapters = "lora", peft = "lora", qlora = "lora",
  resume = { "A run goes on from a checkpoint: save_strategy and save_steps make them in output_dir, trainer:train { resume_from_checkpoint = true } "
    .. "goes on from the newest one; recipes have --save-steps and --resume.", "Trainer:train", "save_steps", "save_total_limit", "resume_from_checkpoint" },
  checkpoint = "resume", checkpoints = "resume", resuming = "resume",
  training = { "SFTTrainer takes a model, a tokenizer, a data set and TrainingArguments; trainer:train() runs all updates, trainer:step() one.",
    "SFTTrainer", "TrainingArguments", "Trainer:train", "Trainer:step", "train_on_responses_only" },
  ["fine-tuning"] = "training", finetuning = "training", finetune = "training",
  export = { "What is trained leaves as an adapter, as a merged folder for transformers, or as a GGUF; `unsloth-lua export` does so without a script.",
    "Model:save_pretrained", "Model:save_pretrained_merged", "Model:save_pretrained_gguf", "Model:push_to_hub" },
  saving = "export", merge = "export",
  quit = { "Ctrl-D, quit or exit leaves the prompt; in a script os.exit(). Ctrl-C stops what runs and comes back.", "help" }, exit = "quit",
  data = { "Rows come from JSON, JSON lines, CSV or plain text, or from a table of Lua's.", "load_dataset", "dataset_from_list", "Dataset:map",
    "standardize_data_formats" }, datasets = "data",
  template = { "A chat template writes messages as the model's family does; `unsloth-lua chat PATH` talks with a model.", "get_chat_template",
    "Tokenizer:apply_chat_template", "Model:generate" }, templates = "template",
}

local function subject_text(topic)
  local subject = SUBJECTS[topic]
  while type(subject) == "string" do subject = SUBJECTS[subject] end
  if not subject then return nil end
  local names = {}
  for i = 2, #subject do names[#names + 1] = ("help %q"):format(subject[i]) end
  return wrap(subject[1], 0) .. "\n\n" .. wrap("more: " .. table.concat(names, ", "), 0)
end

-- A topic that is known under other letters, such as "trainer".
local function other_case(topic)
  for _, known in ipairs(M.topics()) do
    if known ~= topic and known:lower() == topic:lower() then return known end
  end
end

local topic_text

function topic_text(topic)
  local known = find_name(topic)
  if known then return function_text(known) end
  local class, module = class_named(topic), M.modules()[topic]
  if class then return class_text(class) end
  local places = option_places(topic)
  if places then return places end
  if module then return module_text(topic, module) end
  local subject = subject_text(topic:lower())
  if subject then return subject end
  local known_as = other_case(topic)
  if known_as then return topic_text(known_as) end
  local nearest = core.nearest(topic, M.topics())
  return ('there is no help on "%s"%s'):format(topic, nearest and (': did you mean "%s"?'):format(nearest) or "; help() lists what there is")
end

--- What is known of a value or a topic, as text.
function M.text(x)
  if x == nil then return overview() end
  if type(x) == "string" then return topic_text(x) end
  if M.of(x) then return function_text(M.of(x)) end
  local meta = debug.getmetatable(x)
  local class = type(meta) == "table" and (M.classes[meta.__name] or meta.__name == "unsloth.SFTTrainer" and class_named "Trainer")
  if class then return class_text(class) end
  for _, pair in ipairs(public_tables()) do
    if pair[2] == x then return module_text(pair[1]:match "[^.]+$", M.modules()[pair[1]:match "[^.]+$"] or { text = { pair[1] }, example = {} }) end
  end
  return ("nothing is written about this %s; help() lists what there is"):format(type(x))
end

return M
