--- Saving with Unsloth's words: adapters, merged folders, GGUF files; what is beside them (model card, Modelfile).
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local modelfile = require "unsloth.modelfile"
local options = require "unsloth.options"
local progress = require "unsloth.progress"

local Model = core.Model

local function read_text(path)
  local file, why = io.open(path, "rb")
  if not file then errors.raise("USL_ERR_NOT_FOUND", "%s: it cannot be read (%s)", path, why:match ": ([^:]*)$" or why) end
  local text, what = file:read "a"
  file:close()
  if not text then errors.raise("USL_ERR_IO", "%s: it cannot be read (%s)", path, what or "it is no file") end
  return text
end

local function write_text(path, text)
  local file, why = io.open(path .. ".tmp", "wb")
  if not file then errors.raise("USL_ERR_IO", "%s: it cannot be written (%s)", path, why:match ": ([^:]*)$" or why) end
  local ok = file:write(text)
  ok = file:close() and ok and os.rename(path .. ".tmp", path)
  if not ok then
    os.remove(path .. ".tmp")
    errors.raise("USL_ERR_IO", "%s: it cannot be written (a full disk?)", path)
  end
end

local function plain(dir)
  return (dir:gsub("(.)/+$", "%1"))
end

-- ---- What exports have in common ------------------------------------------------------------------------------------

local SHARED = {
  verify = { "boolean", default = true },   -- read back what was written and compare it before it gets its name
  base = { "string|userdata" },             -- merge onto the 16-bit weights there, not onto those that training saw
  maximum_memory_usage = { "number", note = "weights are written a piece at a time" },
  push_to_hub = { "boolean", default = false, refuse = "push_to_hub_merged and push_to_hub_gguf upload" },
  token = { "string|boolean", note = "nothing is uploaded" },
}

local function with_shared(spec)
  for name, rule in pairs(SHARED) do spec[name] = rule end
  return spec
end

-- Runs an export with its options in C; the base's handle, when one was opened here, is closed whatever happens.
local function run(o, body)
  local opened <close> = type(o.base) == "string" and core.model_open(o.base, { device = "cpu" }) or nil
  return body { verify = o.verify, base = opened or o.base }
end

-- A line about what was written: its size, and what the look at it found.
local function describe(report, base)
  local said = progress.bytes(report.bytes)
  if base then
    said = said .. (", merged onto the weights of %s"):format(type(base) == "string" and base or "the base given")
  elseif report.merged_onto then
    said = said .. ", merged onto the " .. report.merged_onto .. " that were loaded"
  end
  if not report.weights then return said .. ", not checked" end
  said = said .. (", checked: weights differ by %.1e"):format(report.weights)
  if not report.logits then return said end
  return said .. (", logits by %.1e (up to %.1e is what it costs)"):format(report.logits, report.expected)
end

-- What is returned is a table whose tostring is a line, since the prompt prints it.
local Report = { __tostring = function(report) return describe(report) end }
local List = { __tostring = function(list)
  local lines = {}
  for i, one in ipairs(list) do lines[i] = tostring(one) end
  return table.concat(lines, ", ")
end }

-- ---- Adapters -------------------------------------------------------------------------------------------------------

local CARD = [==[
---
base_model: %s
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- unsloth-lua
---

# LoRA adapter for %s

Rank %d, alpha %g, on %s. Trained with unsloth-lua %s.

```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

```lua
local model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = "this folder" }
```
]==]

local function targets_of(config)
  local list = {}
  for _, key in ipairs { "target_modules", "target_parameters", "modules_to_save" } do
    local value = config[key]
    if type(value) == "string" then value = { value } end
    if type(value) == "table" then table.move(value, 1, #value, #list + 1, list) end
  end
  return table.concat(list, ", ")
end

-- A card that somebody wrote stays.
local function write_card(dir)
  local path = dir .. "/README.md"
  if core.path_kind(path) then return end
  local config = core.json.decode(read_text(dir .. "/adapter_config.json"), dir .. "/adapter_config.json")
  local base = type(config.base_model_name_or_path) == "string" and config.base_model_name_or_path or "unknown"
  write_text(path, CARD:format(base, base:match "[^/]+$" or base, config.r, config.lora_alpha,
    targets_of(config), core.version))
end

local SAVE = {
  safe_serialization = { "boolean", default = true, refuse = "only safetensors are written" },
  path_initial_model_for_weight_conversion = { "boolean|string", default = false }, -- what an adapter began with is remembered: no path is read
}

--- The adapter as a PEFT folder with a model card when there is one, else the weights as a Hugging Face folder. An adapter that began with
--- init_lora_weights = "pissa" is for a base that PEFT changes in the same way when it loads it; with
--- path_initial_model_for_weight_conversion = true it becomes plain LoRA of twice the rank, for the base as it was.
---
---     model:save_pretrained "outputs/adapter"
function Model:save_pretrained(dir, opts)
  errors.method("model", "save_pretrained", self, "unsloth.Model")
  errors.want("save_pretrained", "dir", dir, "string", 'the folder to write, as in model:save_pretrained("outputs/adapter")')
  local o = options.check("save_pretrained", opts, SAVE)
  dir = plain(dir)
  if self:active_adapter() then
    core.make_dir(dir)
    self:save_adapter(dir, self.name_or_path ~= "" and self.name_or_path or nil, o.path_initial_model_for_weight_conversion and true)
    write_card(dir)
  else
    run({ verify = true }, function(how) return core.export_merged(self, nil, dir, self:info().dtype, how) end)
  end
end

-- ---- Merged folders -------------------------------------------------------------------------------------------------

local MERGED = with_shared {
  save_method = { "string", default = "merged_16bit" },
  max_shard_size = { "string", note = "files are cut at 5 GB" },
}

local MERGED_TYPES = { merged_16bit = "bf16", merged_32bit = "f32", float32 = "f32", merged_4bit = "nf4", merged_4bit_forced = "nf4" }

local function merged_type(model, method)
  if method == "merged_16bit" and model:info().dtype == "f16" then return "f16" end
  return MERGED_TYPES[method]
end

--- One folder of merged weights: save_method "merged_16bit" (the model's own 16-bit type, bfloat16 for a float32 one), "merged_32bit",
--- "merged_4bit" (bitsandbytes' NF4), or "lora" for the adapter alone. Prints and returns what the check found.
---
---     model:save_pretrained_merged("outputs/merged", tokenizer, { save_method = "merged_16bit" })
function Model:save_pretrained_merged(dir, tokenizer, opts)
  errors.method("model", "save_pretrained_merged", self, "unsloth.Model")
  errors.want("save_pretrained_merged", "dir", dir, "string", 'the folder to write, as in model:save_pretrained_merged("outputs/merged", tokenizer)')
  if type(opts) == "string" then opts = { save_method = opts } end
  local o = options.check("save_pretrained_merged", opts, MERGED)
  tokenizer = tokenizer or self.tokenizer
  dir = plain(dir)
  if o.save_method == "lora" then
    self:save_pretrained(dir)
    if tokenizer then tokenizer:save_pretrained(dir) end
    return
  end
  local dtype = merged_type(self, o.save_method)
  if not dtype then
    errors.unsupported('save_method "%s" is not built in%s; "merged_16bit", "merged_4bit", "merged_32bit" and "lora" are', o.save_method,
      options.meant(o.save_method, MERGED_TYPES))
  end
  local report = run(o, function(how) return core.export_merged(self, tokenizer, dir, dtype, how) end)
  progress.say("%s: %s", dir, describe(report, o.base))
  return setmetatable(report, Report)
end

-- ---- GGUF -----------------------------------------------------------------------------------------------------------

local GGUF = with_shared {
  quantization_method = { "string|table", default = "fast_quantized" },
  first_conversion = { "string", note = "weights go straight into the file" },
  imatrix_file = { "string|boolean", default = false }, -- a calibration text
  save_method = { "string", only = { merged_16bit = true, lora = true } },
}

local PLAIN = "f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_l, q3_k_m, q3_k_s, q2_k, q2_k_l, iq4_xs, iq4_nl, "
  .. "iq3_m, iq3_s, q4_0, q4_1, q5_0, q5_1"
local WEIGHED = "iq3_xs, iq3_xxs, iq2_m, iq2_s, iq2_xs, iq2_xxs, iq1_m, iq1_s, q2_k_s" -- by an importance matrix
local METHODS = {}
for name in (PLAIN .. " " .. WEIGHED):gmatch "[%w_]+" do METHODS[name] = true end

local function methods_of(wanted)
  local methods, seen = {}, {}
  for _, name in ipairs(type(wanted) == "table" and wanted or { wanted }) do
    local method = core.export_method(tostring(name))
    if not method then
      errors.unsupported('quantization_method "%s" is not built in%s; there are %s, and with imatrix_file %s', name,
        options.meant(name, METHODS), PLAIN, WEIGHED)
    end
    if not seen[method] then methods[#methods + 1] = method end
    seen[method] = true
  end
  if #methods == 0 then errors.invalid "save_pretrained_gguf: quantization_method is an empty list; name one method or several" end
  return methods
end

local function calibrate(model, tokenizer, path)
  if not path then return nil end
  if path == true then errors.unsupported "imatrix_file = true would download a file: give the path of a calibration text" end
  if not tokenizer then errors.invalid "an importance matrix is measured on a text, which wants a tokenizer" end
  local text = read_text(path)
  if not text:find "%S" then errors.invalid("%s: an importance matrix is measured on a text, and there is none in it", path) end
  return core.imatrix(model, tokenizer, text)
end

--- One .gguf in dir for each method, made in one pass over the weights, and a Modelfile for Ollama where the tokenizer has a chat template
--- that one can say. Prints what the checks found; returns the paths and that.
---
---     model:save_pretrained_gguf("outputs/gguf", tokenizer, { quantization_method = "q4_k_m" })
function Model:save_pretrained_gguf(dir, tokenizer, opts)
  errors.method("model", "save_pretrained_gguf", self, "unsloth.Model")
  errors.want("save_pretrained_gguf", "dir", dir, "string", 'the folder to write, as in model:save_pretrained_gguf("outputs/gguf", tokenizer)')
  if type(opts) == "string" then opts = { quantization_method = opts } end
  local o = options.check("save_pretrained_gguf", opts, GGUF)
  dir = plain(dir)
  tokenizer = tokenizer or self.tokenizer
  if o.save_method == "lora" then
    local path = dir .. "/adapter.gguf"
    core.make_dir(dir)
    core.export_lora(self, path)
    return setmetatable({ path }, List), setmetatable({}, List)
  end
  local methods, paths = methods_of(o.quantization_method), {}
  for i, method in ipairs(methods) do paths[i] = ("%s/unsloth.%s.gguf"):format(dir, method:upper()) end
  core.make_dir(dir)
  local reports = run(o, function(how)
    how.imatrix = calibrate(self, tokenizer, o.imatrix_file)
    return core.export_gguf(self, tokenizer, paths, methods, how)
  end)
  for i, path in ipairs(paths) do
    progress.say("%s: %s", path, describe(reports[i], o.base))
    setmetatable(reports[i], Report)
  end
  local text = tokenizer and modelfile.make(tokenizer, paths[1]:match "[^/]+$")
  if text then write_text(dir .. "/Modelfile", text) end
  return setmetatable(paths, List), setmetatable(reports, List)
end
