--- Models with Unsloth's words: FastLanguageModel, saving, adapters.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local options = require "unsloth.options"
require "unsloth.generate"

local M = {}
---@class unsloth.Model
local Model = core.Model
local json = core.json

-- ---- Loading --------------------------------------------------------------------------------------------------------

local NO_DOWNLOAD = "nothing is downloaded"
local OPEN = {
  model_name = { "string" },
  max_seq_length = { "integer", default = 0, check = options.at_least(0) }, -- 0: 2048, or the model's limit when that is less
  dtype = { "string", only = { float32 = true, bfloat16 = true, float16 = true } },
  load_in_4bit = { "boolean", default = true },
  load_in_8bit = { "boolean", default = false, refuse = "use load_in_4bit or load_in_16bit" },
  load_in_16bit = { "boolean", default = false },
  load_in_fp8 = { "boolean", default = false, refuse = "use load_in_4bit or load_in_16bit" },
  full_finetuning = { "boolean", default = false },
  device = { "string" },
  rope_scaling = { "table" },
  token = { "string|boolean", note = NO_DOWNLOAD },
  revision = { "string", note = NO_DOWNLOAD .. ", files are taken as they lie" },
  local_files_only = { "boolean", note = NO_DOWNLOAD },
  trust_remote_code = { "boolean", default = false, refuse = "no code of a model is run; leave it out" },
  device_map = { "string", default = "sequential", note = "the model goes to one device, which `device` names" },
  use_gradient_checkpointing = { "string|boolean", default = "auto", only = { auto = true, unsloth = true, [true] = true, [false] = true } },
  fix_tokenizer = { "boolean", note = "tokenizers are taken as they are" },
  use_exact_model_name = { "boolean", note = "names are never changed" },
  random_state = { "integer", default = 3407, note = "loading draws nothing at random" },
  resize_model_vocab = { "integer", refuse = "the vocabulary stays as it is" },
  fast_inference = { "boolean", default = false, refuse = "generate runs in this process already; leave it out" },
  gpu_memory_utilization = { "number", note = "the memory plan takes what it needs" },
  max_lora_rank = { "integer", note = "any rank may be used" },
  float8_kv_cache = { "boolean", default = false, refuse = "keys and values are kept in the model's type" },
  offload_embedding = { "boolean", default = false, refuse = "embeddings stay with the model" },
  float32_mixed_precision = { "boolean", note = "trained weights are always float32" },
  unsloth_tiled_mlp = { "boolean", default = false, refuse = "the memory plan recomputes instead" },
  disable_log_stats = { "boolean", note = "there are no such statistics" },
  qat_scheme = { "string", refuse = "quantisation-aware training is not built in" },
  text_only = { "boolean", note = "models are text-only here" },
  return_logits = { "boolean", note = "model:logits gives them" },
  plan_only = { "boolean", default = false }, -- shapes without numbers, for a trainer's plan; no tokenizer
}

local RECOMPUTE = { auto = "auto", unsloth = "offload", [true] = "full", [false] = "none" }

local function read_text(path)
  local file = io.open(path, "rb")
  local text = file and file:read "a"
  if file then file:close() end
  return text
end

local function check_path(name)
  if core.path_kind(name) then return end
  errors.raise("USL_ERR_NOT_FOUND", '%s: there is no such file or folder; models are not downloaded: fetch it (config.json, *.safetensors, '
    .. "tokenizer.json, or a .gguf) and give its path", name)
end

-- A PEFT folder names its base; returns the base's path and the adapter's.
local function split_adapter(path)
  local text = core.path_kind(path) == "folder" and not core.path_kind(path .. "/config.json") and read_text(path .. "/adapter_config.json")
  if not text then return path, nil end
  local base = json.decode(text, path .. "/adapter_config.json").base_model_name_or_path
  if type(base) ~= "string" or base == "" then
    errors.raise("USL_ERR_FORMAT", "%s/adapter_config.json: base_model_name_or_path does not name the base model", path)
  end
  if not core.path_kind(base) then
    errors.raise("USL_ERR_NOT_FOUND", "%s: the adapter's base model %s is not there; load the base and call model:load_adapter(dir)", path, base)
  end
  return base, path
end

local function open_tokenizer(paths)
  for _, path in ipairs(paths) do
    if path:match "%.gguf$" or core.path_kind(path .. "/tokenizer.json") then return core.tokenizer_open(path) end
  end
  errors.note("%s has no tokenizer.json: there is no tokenizer, only ids work", paths[#paths])
  return nil
end

M.FastLanguageModel = {}
local FastLanguageModel = M.FastLanguageModel
FastLanguageModel.defaults = options.defaults(OPEN)

--- Opens a model and its tokenizer.
---
---     local model, tokenizer = FastLanguageModel.from_pretrained { model_name = "SmolLM2.gguf", load_in_4bit = true }
---@param opts unsloth.LoadOptions|string options, or a path
---@param more unsloth.LoadOptions|nil behind a path
---@return unsloth.Model model
---@return unsloth.Tokenizer|nil tokenizer
function FastLanguageModel.from_pretrained(opts, more)
  if type(opts) == "string" then
    local name = opts
    opts = {}
    for key, value in pairs(more or {}) do opts[key] = value end
    opts.model_name = name
  end
  local o = options.check("from_pretrained", opts, OPEN)
  if not o.model_name then errors.invalid "from_pretrained needs model_name, the path of a folder or of a .gguf" end
  if o.load_in_16bit and o.full_finetuning then errors.invalid "from_pretrained: give load_in_16bit or full_finetuning, not both" end
  if opts.load_in_4bit and (o.load_in_16bit or o.full_finetuning) then
    errors.invalid "from_pretrained: load_in_4bit, load_in_16bit and full_finetuning exclude each other"
  end
  check_path(o.model_name)
  local base, adapter = split_adapter(o.model_name)
  local model = core.model_open(base, {
    device = o.device, dtype = o.dtype, max_seq_length = o.max_seq_length, full_finetuning = o.full_finetuning,
    load_in_4bit = o.load_in_4bit and not o.load_in_16bit and not o.full_finetuning,
    rope_scaling = o.rope_scaling and json.encode(o.rope_scaling) or nil, plan_only = o.plan_only,
  })
  if adapter then model:load_adapter(adapter) end
  model.name_or_path = base
  model.full_finetuning = o.full_finetuning
  model.recompute = RECOMPUTE[o.use_gradient_checkpointing]
  local info = model:info()
  model.max_seq_length, model.device, model.dtype = info.context, info.device, info.dtype
  if o.plan_only then return model end
  model.tokenizer = open_tokenizer(adapter and { adapter, base } or { base })
  return model, model.tokenizer
end

--- Another model with the same frozen weights, which are held once; adapters are its own. One trains while the other answers.
---
---     local other = model:share()
function Model:share()
  local other = core.model_share(self)
  for _, field in ipairs { "name_or_path", "full_finetuning", "recompute", "dtype", "tokenizer" } do other[field] = self[field] end
  return other
end

--- A model of random weights from a configuration, for pretraining: all weights are trained. The option tokenizer becomes the model's.
---
---     local model = FastLanguageModel.from_config({ architectures = { "LlamaForCausalLM" }, hidden_size = 64, ... }, { random_state = 1 })
function FastLanguageModel.from_config(config, opts)
  local o = options.check("from_config", opts, {
    random_state = { "integer", default = 3407, check = options.at_least(0) },
    max_seq_length = { "integer", default = 0 }, dtype = OPEN.dtype, device = OPEN.device,
    full_finetuning = { "boolean", default = true }, load_in_4bit = { "boolean", default = false }, tokenizer = { "userdata" },
    plan_only = OPEN.plan_only,
  })
  local model = core.model_random(type(config) == "string" and config or json.encode(config), o.random_state, {
    device = o.device, dtype = o.dtype, max_seq_length = o.max_seq_length, full_finetuning = o.full_finetuning,
    load_in_4bit = o.load_in_4bit, plan_only = o.plan_only })
  model.full_finetuning, model.recompute, model.name_or_path = o.full_finetuning, "auto", ""
  local info = model:info()
  model.max_seq_length, model.device, model.dtype, model.tokenizer = info.context, info.device, info.dtype, o.tokenizer
  return model, o.tokenizer
end

-- ---- Adapters -------------------------------------------------------------------------------------------------------

local SEVEN = { "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj" }
local PEFT = {
  r = { "integer", default = 16, check = options.at_least(1) },
  target_modules = { "table|string", default = SEVEN },
  lora_alpha = { "number", default = 16 },
  lora_dropout = { "number", default = 0, check = options.between(0, 1) },
  bias = { "string", default = "none", refuse = 'only bias = "none" is built in' },
  layers_to_transform = { "table|integer" },
  layers_pattern = { "string", note = "layers are found by their number" },
  finetune_last_n_layers = { "integer", check = options.at_least(1) },
  use_gradient_checkpointing = OPEN.use_gradient_checkpointing,
  random_state = { "integer", default = 3407, check = options.at_least(0) },
  max_seq_length = { "integer", note = "from_pretrained has set it" },
  use_rslora = { "boolean", default = false },
  modules_to_save = { "table", refuse = "only the modules of a block are trained; use full_finetuning for the embeddings" },
  init_lora_weights = { "boolean|string", default = true, only = { [true] = true, [false] = true, gaussian = true } },
  loftq_config = { "table", refuse = "adapters start from the weights as they are; leave it out" },
  use_dora = { "boolean", default = false, refuse = "plain LoRA is built in; leave it out" },
  qat_scheme = { "string", refuse = "quantisation-aware training is not built in" },
  target_parameters = { "table", refuse = "it is for mixtures of experts" },
  ensure_weight_tying = { "boolean", note = "tied weights stay tied" },
  temporary_location = { "string", note = "no temporary files are written" },
  adapter_name = { "string" },
}
FastLanguageModel.peft_defaults = options.defaults(PEFT)

local INIT = { [true] = "default", [false] = "random", gaussian = "gaussian" }

local function layer_list(o, layers)
  local list = o.layers_to_transform
  if type(list) == "number" then list = { list } end
  if o.finetune_last_n_layers then
    if list then errors.invalid "get_peft_model: give layers_to_transform or finetune_last_n_layers, not both" end
    list = {}
    for i = math.max(0, layers - o.finetune_last_n_layers), layers - 1 do list[#list + 1] = i end
  end
  if not list then return nil end
  local names = {}
  for i, layer in ipairs(list) do
    local number = type(layer) == "number" and math.tointeger(layer)
    if not number or number < 0 or number >= layers then
      errors.invalid("get_peft_model: layer %s is not among 0 to %d", layer, layers - 1)
    end
    names[i] = ("%d"):format(number)
  end
  return table.concat(names, ",")
end

--- Adds a LoRA adapter. Returns the same model.
---
---     model = FastLanguageModel.get_peft_model(model, { r = 16, lora_alpha = 16 })
---@param model unsloth.Model
---@param opts unsloth.PeftOptions|nil
---@return unsloth.Model
function FastLanguageModel.get_peft_model(model, opts)
  local o = options.check("get_peft_model", opts, PEFT)
  if model.full_finetuning then errors.invalid "get_peft_model: this model was loaded with full_finetuning, so it takes no adapter" end
  if type(o.target_modules) == "table" and #o.target_modules == 0 then errors.invalid "get_peft_model: target_modules names no module" end
  -- Not named: all of the family's but a mixture's gates, which are the seven where none is fused.
  if not (opts and opts.target_modules) then o.target_modules = nil end
  model:release_trainer()
  model:add_lora {
    name = o.adapter_name, rank = o.r, alpha = o.lora_alpha, dropout = o.lora_dropout, use_rslora = o.use_rslora,
    target_modules = type(o.target_modules) == "table" and table.concat(o.target_modules, ",") or o.target_modules,
    layers = layer_list(o, model:info().layers), init = INIT[o.init_lora_weights], seed = o.random_state,
  }
  model.adapter_options = o -- for the report
  if opts and opts.use_gradient_checkpointing ~= nil then model.recompute = RECOMPUTE[o.use_gradient_checkpointing] end
  return model
end

--- Nothing to do here: a model answers as it is. Returns the model.
---
---     FastLanguageModel.for_inference(model)
function FastLanguageModel.for_inference(model) return model end

--- Nothing to do here: a model is trained as it is. Returns the model.
---
---     FastLanguageModel.for_training(model)
function FastLanguageModel.for_training(model) return model end

--- A trainer that has done all its updates, or has raised, gives the model free: the base may be looked at, or trained anew.
---
---     model:release_trainer()
function Model:release_trainer()
  if self.trainer and self.trainer:is_over() then self.trainer:close() end
end

--- Raises when the folder is not there or is no adapter's.
function M.check_adapter(dir)
  if type(dir) ~= "string" then errors.invalid("load_adapter wants the path of an adapter's folder, not a %s", type(dir)) end
  if core.path_kind(dir .. "/adapter_config.json") then return end
  errors.raise("USL_ERR_NOT_FOUND", "%s: %s; give the folder that save_pretrained or PEFT wrote (adapter_config.json, adapter_model.safetensors)",
    dir, core.path_kind(dir) and "holds no adapter_config.json" or "there is no such adapter")
end

local load_adapter = Model.load_adapter

--- Reads a PEFT folder as an adapter and makes it active.
---
---     model:load_adapter("outputs/adapter", "mine")
---@param dir string
---@param ... string|nil its name, default "default"
function Model:load_adapter(dir, ...)
  M.check_adapter(dir)
  self:release_trainer()
  return load_adapter(self, dir, ...)
end

--- Makes an adapter active by name.
---
---     model:set_adapter "mine"
function Model:set_adapter(name)
  if type(name) ~= "string" then errors.invalid "set_adapter wants a name; disable_adapter leaves the base alone" end
  self:release_trainer()
  self:activate(name)
end

--- Leaves the base alone; returns the name that was active, for set_adapter.
---
---     local name = model:disable_adapter()
function Model:disable_adapter()
  local name = self:active_adapter()
  self:release_trainer()
  self:activate(nil)
  return name
end

--- Prints how many parameters are trained, in PEFT's words.
---
---     model:print_trainable_parameters()
function Model:print_trainable_parameters()
  local info = self:info()
  print(("trainable params: %d || all params: %d || trainable%%: %.4f"):format(info.trainable, info.parameters,
    100 * info.trainable / info.parameters))
end

return M
