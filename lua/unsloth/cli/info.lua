--- unsloth-lua info PATH: what a model folder, a .gguf or a bare .safetensors holds. Reads no weights.
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local progress = require "unsloth.progress"

local o = args.parse(arg, {
  name = "info", words = "PATH",
  about = "Describes a model folder, a .gguf or a .safetensors file, and checks its whole structure without reading weights.",
  options = { { "tensors", nil, "list every tensor" } },
})
if #o ~= 1 then errors.invalid "info wants one path, of a folder, a .gguf or a .safetensors file" end

local function count(tensors)
  local total, bytes, types = 0, 0, {}
  for _, t in ipairs(tensors) do
    local n = 1
    for _, d in ipairs(t.shape) do n = n * d end
    total, bytes = total + n, bytes + t.bytes
    types[t.dtype] = (types[t.dtype] or 0) + t.bytes
  end
  return total, bytes, types
end

local function say(name, format, ...)
  print(("%-14s " .. format):format(name, ...))
end

local function say_types(types)
  local names = {}
  for name in pairs(types) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do names[i] = ("%s %s"):format(name, progress.bytes(types[name])) end
  say("types", "%s", table.concat(names, ", "))
end

local function say_tokenizer(path, meta)
  if meta["tokenizer.ggml.tokens"] then
    say("tokenizer", "%s, %d tokens (in the file)", meta["tokenizer.ggml.model"] or "?", meta["tokenizer.ggml.tokens"].length)
    say("chat template", "%s", meta["tokenizer.chat_template"] and "yes" or "none")
  elseif core.path_kind(path .. "/tokenizer.json") then
    local tok <close> = core.tokenizer_open(path)
    say("tokenizer", "tokenizer.json, %d tokens", #tok)
    say("chat template", "%s", tok.chat_template and "yes" or "none")
  else
    say("tokenizer", "none")
  end
end

local PLAIN = { f64 = true, f32 = true, bf16 = true, f16 = true }

local function is_quantised(types)
  for name in pairs(types) do
    if not PLAIN[name] then return true end
  end
  return false
end

-- Adapter, gradients and 8-bit states of r = 16 on all linear modules, with NF4 weights at 4.127 bits each.
local function say_memory(config, bytes, types)
  local c = config
  local rest = c.vocab * c.hidden * (c.tied and 1 or 2) * 2
  if is_quantised(types) then
    say("to load", "%s as stored: quantised weights stay in their own blocks, also in training", progress.bytes(bytes))
  else
    say("to load", "%s as stored, about %s with load_in_4bit", progress.bytes(bytes), progress.bytes(c.linear * 4.127 / 8 + rest))
  end
  say("to train", "about %s more for LoRA r = 16 on all linear modules, and activations: see unsloth-lua plan", progress.bytes(16 * c.adapter * 10))
end

local path = o[1]:gsub("(.)/+$", "%1")
if core.path_kind(path .. "/adapter_config.json") and not core.path_kind(path .. "/config.json") then
  errors.invalid("%s is an adapter: info takes its adapter_model.safetensors, or the model in its base_model_name_or_path", path)
end
local found = core.inspect(path)
local total, bytes, types = count(found.tensors)
say("path", "%s", path)
say("format", "%s, %d tensors in %d file%s", found.format, #found.tensors, found.files, found.files == 1 and "" or "s")
local c = found.config
if c then
  say("architecture", "%s", c.architecture)
  say("sizes", "%d layers, hidden %d, intermediate %d, %d heads over %d kv heads of %d", c.layers, c.hidden, c.intermediate, c.heads,
    c.kv_heads, c.head_dim)
  if c.experts > 0 then say("experts", "%d, of which a token meets %d", c.experts, c.chosen) end
  say("vocabulary", "%d%s", c.vocab, c.tied and ", head tied to the embedding" or "")
  say("context", "%d tokens", c.context)
end
if #found.tensors > 0 then
  say("parameters", "%d (%.3g billion)", total, total / 1e9)
  say_types(types)
else
  say("weights", "none: a vocabulary alone")
end
if found.format ~= "safetensors" then say_tokenizer(path, found.metadata) end
if c then say_memory(c, bytes, types) end
if o.tensors then
  for _, t in ipairs(found.tensors) do print(("%-60s %-6s %s"):format(t.name, t.dtype, table.concat(t.shape, " x "))) end
end
