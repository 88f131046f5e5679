--- unsloth-lua info PATH: what a model folder, a .gguf or a bare .safetensors holds. Reads no weights.
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local hub = require "unsloth.hub"
local progress = require "unsloth.progress"
local run = require "unsloth.cli.run"
local show = require "unsloth.show"
local templates = require "unsloth.templates"

local o = args.parse(arg, {
  name = "info", words = "PATH",
  about = "Describes a model folder, a .gguf, a .safetensors file or a model of the hub, and checks its whole structure without reading weights.\n"
    .. "Of a name of the hub that the cache does not hold, the small files and the headers of the others are downloaded.",
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

-- What a file says may stand in it.
local function say(name, format, ...)
  print(core.printable(("%-14s " .. format):format(name, ...), true))
end

local function say_types(types)
  local names = {}
  for name in pairs(types) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do names[i] = ("%s %s"):format(name, progress.bytes(types[name])) end
  say("types", "%s", table.concat(names, ", "))
end

-- By name when it is one of those that have names.
local function say_template(text)
  local name
  for key in pairs(templates.list) do
    local _, body = templates.get(key)
    if text and body == text and (not name or key < name) then name = key end
  end
  say("chat template", "%s", not text and "none" or name or "its own")
end

local function say_tokenizer(path, meta)
  if meta["tokenizer.ggml.tokens"] then
    say("tokenizer", "%s, %d tokens (in the file)", meta["tokenizer.ggml.model"] or "?", meta["tokenizer.ggml.tokens"].length)
    say_template(meta["tokenizer.chat_template"])
  elseif core.path_kind(path .. "/tokenizer.json") then
    local tok <close> = core.tokenizer_open(path)
    say("tokenizer", "tokenizer.json, %d tokens", #tok)
    say_template(tok.chat_template)
  else
    say("tokenizer", "none")
  end
end

local PLAIN = { f64 = true, f32 = true, bf16 = true, f16 = true, f8_e4m3 = true }

local function is_quantised(types)
  for name in pairs(types) do
    if not PLAIN[name] then return true end
  end
  return false
end

-- ---- Memory: what the planner says ----------------------------------------------------------------------------------

local ROWS, TOKENS, RANK, UNLIMITED = 2, 2048, 16, "1048576GiB"

local function plan(path, config, method, recompute)
  local settings = { path, method = method, recompute = recompute, batch = ROWS, seq = math.min(TOKENS, config.context), rank = RANK,
    accumulation = 1, rows = "full", order = "fixed", memory = UNLIMITED, seed = 3407 }
  local model <close> = run.model(settings, true)
  local trainer <close> = run.trainer(settings, model, run.rows(settings, config.vocab, 1), 1)
  return trainer:plan(), model.device
end

local function say_training(path, config, name, method)
  local ok, least, device = pcall(plan, path, config, method, "full")
  if not ok then
    say(name, "%s", tostring(least))
    return
  end
  local most = plan(path, config, method, "none")
  say(name, "%s on %s when every layer is recomputed, %s when none is", progress.bytes(least.total), device, progress.bytes(most.total))
end

local function say_loading(path, config, bytes, quantised, fp8)
  if quantised then
    say("to load", "%s as stored: quantised weights stay in their own blocks, also in training", progress.bytes(bytes))
    return
  end
  local ok, four = pcall(plan, path, config, "qlora", "full")
  -- 8-bit floats are decoded to bfloat16 as they are loaded.
  local four_bits = ok and (", %s with load_in_4bit"):format(progress.bytes(four.items[1].bytes)) or ""
  say("to load", "%s%s%s", progress.bytes(bytes + fp8), fp8 > 0 and " decoded to bfloat16" or " as stored", four_bits)
end

local function say_memory(path, config, bytes, types)
  local quantised = is_quantised(types)
  say_loading(path, config, bytes, quantised, types.f8_e4m3 or 0)
  say("to train", "%d rows of %d tokens a pass, LoRA r = %d, 8-bit AdamW; see unsloth-lua plan for other settings", ROWS,
    math.min(TOKENS, config.context), RANK)
  if not quantised then say_training(path, config, "  LoRA, 4-bit", "qlora") end
  say_training(path, config, quantised and "  LoRA" or "  LoRA, 16-bit", "lora")
  say_training(path, config, "  all weights", "full")
end

local path = o[1]:gsub("(.)/+$", "%1")
local shown, outline = nil, nil

-- A name of the hub that the cache does not hold whole: its headers come, and no weights.
local function find(name)
  local ok, found = pcall(core.hub_get, name, { local_files_only = true })
  if ok then return found end
  outline = os.tmpname()
  os.remove(outline)
  core.make_dir(outline)
  shown = name .. ", whose weights are not here"
  return hub.ask(core.hub_outline, name, outline)
end

-- luacheck: ignore 211
local removal <close> = setmetatable({}, { __close = function()
  if outline then core.remove_path(outline) end
end })
if not core.path_kind(path) and core.hub_is_name(path) then path = find(path) end
if core.path_kind(path .. "/adapter_config.json") and not core.path_kind(path .. "/config.json") then
  errors.invalid("%s is an adapter: info takes its adapter_model.safetensors, or the model in its base_model_name_or_path", path)
end
local found = core.inspect(path)
local total, bytes, types = count(found.tensors)
say("path", "%s", shown or path)
say("format", "%s, %d tensors in %d file%s", found.format, #found.tensors, found.files, found.files == 1 and "" or "s")
local c = found.config
if c then
  say("architecture", "%s (%s)%s", c.architecture, c.family, c.dtype and ", published in " .. c.dtype or "")
  say("sizes", "%d layers, hidden %d, intermediate %d, %d heads over %d kv heads of %d", c.layers, c.hidden, c.intermediate, c.heads,
    c.kv_heads, c.head_dim)
  if c.experts > 0 then say("experts", "%d, of which a token meets %d", c.experts, c.chosen) end
  say("linear modules", "%d weights; LoRA adds %d for each rank", c.linear, c.adapter)
  say("vocabulary", "%d%s", c.vocab, c.tied and ", head tied to the embedding" or "")
  say("context", "%d tokens%s", c.context, c.windowed_layers > 0
    and (", %d of %d layers see the last %d"):format(c.windowed_layers, c.layers, c.window) or "")
  say("rope", "%s, theta %.9g%s", c.rope, c.rope_theta, c.rotated < c.head_dim
    and (", %d of %d values of a head turn"):format(c.rotated, c.head_dim) or "")
end
if #found.tensors > 0 then
  -- Of bitsandbytes' and of 8-bit floats the file holds scales too, and two numbers a byte.
  if c and (types.u8 or types.i8 or types.f8_e4m3) then total = c.parameters end
  say("parameters", total < 1000 and "%d" or "%d (%s)", total, show.count(total))
  say_types(types)
else
  say("weights", "none: a vocabulary alone")
end
if found.format ~= "safetensors" then say_tokenizer(path, found.metadata) end
if c then say_memory(path, c, bytes, types) end
if o.tensors then
  for _, t in ipairs(found.tensors) do
    print(core.printable(("%-60s %-6s %s"):format(t.name, t.dtype, table.concat(t.shape, " x ")), true))
  end
end
