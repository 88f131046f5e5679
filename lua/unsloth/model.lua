--- Models with Unsloth's words: FastLanguageModel, saving, adapters.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local hub = require "unsloth.hub"
local options = require "unsloth.options"
require "unsloth.generate"

local M = {}
---@class unsloth.Model
local Model = core.Model
local json = core.json

-- ---- Loading --------------------------------------------------------------------------------------------------------

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
  token = { "string|boolean" }, -- these three: of a name of the hub
  revision = { "string" },
  local_files_only = { "boolean" },
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

-- A PEFT folder names its base; returns the base's path and the adapter's.
local function split_adapter(path, opts)
  local text = core.path_kind(path) == "folder" and not core.path_kind(path .. "/config.json") and read_text(path .. "/adapter_config.json")
  if not text then return path, nil end
  local base = json.decode(text, path .. "/adapter_config.json").base_model_name_or_path
  if type(base) ~= "string" or base == "" then
    errors.raise("USL_ERR_FORMAT", "%s/adapter_config.json: base_model_name_or_path does not name the base model", path)
  end
  if not core.path_kind(base) and not core.hub_is_name(base) then
    errors.raise("USL_ERR_NOT_FOUND", "%s: the adapter's base model %s is not there; load the base and call model:load_adapter(dir)", path, base)
  end
  local ok, found = pcall(hub.find, base, { token = opts.token, local_files_only = opts.local_files_only })
  if not ok then errors.raise(found.code or "USL_ERR_NOT_FOUND", "%s: the adapter's base model: %s", path, tostring(found)) end
  return found, path
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

local function with_dot(name, first)
  if first == FastLanguageModel then errors.invalid("%s is no method: write FastLanguageModel.%s with a dot, not a colon", name, name) end
end

local function want_model(name, model)
  with_dot(name, model)
  errors.want(name, "model", model, "unsloth.Model", ("the model first, as in FastLanguageModel.%s(model)"):format(name))
end

--- Opens a model and its tokenizer.
---
---     local model, tokenizer = FastLanguageModel.from_pretrained { model_name = "SmolLM2.gguf", load_in_4bit = true }
---@param opts unsloth.LoadOptions|string options, or a path, or a name of the hub
---@param more unsloth.LoadOptions|nil behind a path
---@return unsloth.Model model
---@return unsloth.Tokenizer|nil tokenizer
function FastLanguageModel.from_pretrained(opts, more)
  with_dot("from_pretrained", opts)
  if type(opts) == "string" then
    local name = opts
    opts = {}
    for key, value in pairs(more or {}) do opts[key] = value end
    opts.model_name = name
  end
  local o = options.check("from_pretrained", opts, OPEN)
  if not o.model_name or o.model_name == "" then errors.invalid "from_pretrained needs model_name, the path of a folder or of a .gguf, or a name of the hub" end
  if o.load_in_16bit and o.full_finetuning then errors.invalid "from_pretrained: give load_in_16bit or full_finetuning, not both" end
  if opts.load_in_4bit and (o.load_in_16bit or o.full_finetuning) then
    errors.invalid "from_pretrained: load_in_4bit, load_in_16bit and full_finetuning exclude each other"
  end
  local base, adapter = split_adapter(hub.find(o.model_name, o), o)
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
  with_dot("from_config", config)
  errors.want("from_config", "config", config, "table|string", "the fields of a config.json as a table or as JSON text")
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
  bias = { "string", default = "none", only = { none = true, all = true, lora_only = true } },
  layers_to_transform = { "table|integer" },
  layers_pattern = { "table|string" },
  exclude_modules = { "table|string" },
  rank_pattern = { "table" },
  alpha_pattern = { "table" },
  finetune_last_n_layers = { "integer", check = options.at_least(1) },
  use_gradient_checkpointing = OPEN.use_gradient_checkpointing,
  random_state = { "integer", default = 3407, check = options.at_least(0) },
  max_seq_length = { "integer", note = "from_pretrained has set it" },
  use_rslora = { "boolean", default = false },
  modules_to_save = { "table|string" },
  init_lora_weights = { "boolean|string", default = true },
  loftq_config = { "table" },
  use_dora = { "boolean", default = false },
  qat_scheme = { "string", refuse = "quantisation-aware training is not built in" },
  target_parameters = { "table" }, -- of a mixture, as in PEFT: "mlp.experts.gate_up_proj"; without target_modules, these alone
  ensure_weight_tying = { "boolean", default = false },
  lora_embeddings = { "boolean", default = false }, -- PEFT's way with embed_tokens and lm_head among target_modules; else Unsloth's
  temporary_location = { "string", note = "no temporary files are written" },
  adapter_name = { "string" },
}
FastLanguageModel.peft_defaults = options.defaults(PEFT)

local INIT = { [true] = "default", [false] = "random" }
local EMBEDDINGS = { embed_tokens = true, lm_head = true }

-- Names separated by commas, as the core takes them; nil for none.
local function joined(option, value)
  if value == nil then return nil end
  local list = type(value) == "table" and value or { value }
  for _, name in ipairs(list) do
    if type(name) ~= "string" or name == "" or name:find(",", 1, true) then
      errors.invalid("get_peft_model: %s holds %s, which is no module's name", option, name == "" and '""' or tostring(name))
    end
  end
  return #list > 0 and table.concat(list, ",") or nil
end

-- { ["q_proj"] = 8 } as JSON. A table has no order and the first pattern that matches counts: longer ones come first.
local function pattern_json(option, map)
  if map == nil or next(map) == nil then return nil end
  local keys, parts = {}, {}
  for key in pairs(map) do
    if type(key) ~= "string" then errors.invalid("get_peft_model: %s wants names of modules as keys, not %s", option, tostring(key)) end
    keys[#keys + 1] = key
  end
  table.sort(keys, function(a, b)
    if #a ~= #b then return #a > #b end
    return a < b
  end)
  for i, key in ipairs(keys) do parts[i] = ("%s: %s"):format(json.encode(key), json.encode(map[key])) end
  return "{" .. table.concat(parts, ", ") .. "}"
end

-- As Unsloth does: embed_tokens and lm_head among target_modules are trained whole.
local function split_targets(o)
  local targets, saved = {}, type(o.modules_to_save) == "string" and { o.modules_to_save } or { table.unpack(o.modules_to_save or {}) }
  for _, name in ipairs(o.target_modules) do
    if EMBEDDINGS[name] and not o.lora_embeddings then
      errors.note("%s is trained whole, as modules_to_save does; lora_embeddings = true gives it LoRA", name)
      saved[#saved + 1] = name
    else
      targets[#targets + 1] = name
    end
  end
  return targets, saved
end

-- A string is "all-linear", a name, or as in PEFT a regular expression over whole names.
local function targets_of(o)
  if o.target_modules == nil then return nil, nil, joined("modules_to_save", o.modules_to_save) end
  if type(o.target_modules) == "table" then
    local targets, saved = split_targets(o)
    return joined("target_modules", targets), nil, joined("modules_to_save", saved)
  end
  local is_pattern = o.target_modules:find "[%.%*%[%]%(%)|\\^$+?]"
  if is_pattern then return nil, o.target_modules, joined("modules_to_save", o.modules_to_save) end
  return o.target_modules, nil, joined("modules_to_save", o.modules_to_save)
end

-- PEFT's parameters are names among the core's targets.
local function add_parameters(o, given)
  local list = o.target_parameters
  if not list or #list == 0 then return end
  for _, name in ipairs(list) do
    if type(name) ~= "string" or not (name:find "experts%.gate_up_proj$" or name:find "experts%.down_proj$" or name:find "gate%.weight$") then
      errors.invalid('get_peft_model: target_parameters holds %s; "mlp.experts.gate_up_proj", "mlp.experts.down_proj" and "gate.weight" of a '
        .. "mixture are parameters, and modules go to target_modules", type(name) == "string" and ('"%s"'):format(name) or tostring(name))
    end
  end
  if type(given) == "string" then
    errors.invalid "get_peft_model: target_modules is a list of names where target_parameters is given"
  end
  o.target_modules = table.move(list, 1, #list, #(given or {}) + 1, { table.unpack(given or {}) })
end

local LOFTQ = { loftq_bits = { "integer", default = 4 }, loftq_iter = { "integer", default = 1 } }

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
  want_model("get_peft_model", model)
  local o = options.check("get_peft_model", opts, PEFT)
  if model.full_finetuning then errors.invalid "get_peft_model: this model was loaded with full_finetuning, so it takes no adapter" end
  -- Not named: all of the family's but a mixture's gates, which are the seven where none is fused.
  if not (opts and opts.target_modules) then o.target_modules = nil end
  add_parameters(o, o.target_modules)
  if type(o.target_modules) == "table" and #o.target_modules == 0 then errors.invalid "get_peft_model: target_modules names no module" end
  model:release_trainer()
  local targets, pattern, saved = targets_of(o)
  if o.target_modules and not targets and not pattern then
    errors.invalid "get_peft_model: target_modules names no module beside those that are trained whole"
  end
  local loftq = options.check("loftq_config", o.loftq_config, LOFTQ)
  if o.loftq_config and next(o.loftq_config) ~= nil and o.init_lora_weights ~= "loftq" then
    errors.invalid 'get_peft_model: loftq_config is for init_lora_weights = "loftq"; give both or neither'
  end
  local layers = layer_list(o, model:info().layers)
  model:add_lora {
    name = o.adapter_name, rank = o.r, alpha = o.lora_alpha, dropout = o.lora_dropout, use_rslora = o.use_rslora,
    target_modules = targets, target_pattern = pattern, modules_to_save = saved, layers = layers,
    layers_pattern = joined("layers_pattern", o.layers_pattern), exclude_modules = joined("exclude_modules", o.exclude_modules),
    rank_pattern = pattern_json("rank_pattern", o.rank_pattern), alpha_pattern = pattern_json("alpha_pattern", o.alpha_pattern),
    bias = o.bias, use_dora = o.use_dora, ensure_weight_tying = o.ensure_weight_tying,
    init = INIT[o.init_lora_weights] or o.init_lora_weights, seed = o.random_state,
    loftq_bits = loftq.loftq_bits, loftq_iter = loftq.loftq_iter,
  }
  model.adapter_options = o -- for the report
  if opts and opts.use_gradient_checkpointing ~= nil then model.recompute = RECOMPUTE[o.use_gradient_checkpointing] end
  return model
end

--- Nothing to do here: a model answers as it is. Returns the model.
---
---     FastLanguageModel.for_inference(model)
function FastLanguageModel.for_inference(model)
  want_model("for_inference", model)
  return model
end

--- Nothing to do here: a model is trained as it is. Returns the model.
---
---     FastLanguageModel.for_training(model)
function FastLanguageModel.for_training(model)
  want_model("for_training", model)
  return model
end

--- A trainer that has done all its updates, or has raised, gives the model free: the base may be looked at, or trained anew.
---
---     model:release_trainer()
function Model:release_trainer()
  if self.trainer and self.trainer:is_over() then self.trainer:close() end
end

--- The folder of an adapter, which may be the hub's; raises when it is not there or is no adapter's.
function M.check_adapter(dir)
  errors.want("load_adapter", "dir", dir, "string", "the path of an adapter's folder")
  if not core.path_kind(dir) and core.hub_is_name(dir) then dir = hub.find(dir) end
  if core.path_kind(dir .. "/adapter_config.json") then return dir end
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
  errors.method("model", "load_adapter", self, "unsloth.Model")
  dir = M.check_adapter(dir)
  self:release_trainer()
  return load_adapter(self, dir, ...)
end

--- Makes an adapter active by name.
---
---     model:set_adapter "mine"
function Model:set_adapter(name)
  errors.method("model", "set_adapter", self, "unsloth.Model")
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

local RESIZE = {
  pad_to_multiple_of = { "integer" },
  mean_resizing = { "boolean", default = true, refuse = "new rows are the mean of the old ones" },
}

--- Gives the embeddings and the head rows for this many tokens; new ones are the mean of the old. Returns the number. What
--- is saved has them, an adapter's folder too.
---
---     tokenizer:add_tokens { "<think>" }
---     model:resize_token_embeddings(math.max(#tokenizer, model:info().vocab))
---@param n integer|nil nil: as many as there are
---@param opts { pad_to_multiple_of: integer }|nil
---@return integer
function Model:resize_token_embeddings(n, opts)
  errors.method("model", "resize_token_embeddings", self, "unsloth.Model")
  local o = options.check("resize_token_embeddings", opts, RESIZE)
  n = n or self:info().vocab
  if o.pad_to_multiple_of then n = (n + o.pad_to_multiple_of - 1) // o.pad_to_multiple_of * o.pad_to_multiple_of end
  self:release_trainer()
  self:resize_vocab(n)
  return n
end

local NEW_TOKENS = {
  new_tokens = { "table", default = {} },
  method = { "string", default = "mean" },
  interpolation = { "number", default = 0.5 },
}

--- Adds tokens to a tokenizer and rows for them to a model, before get_peft_model. With "mean" the rows are the mean of all
--- tokens', with "interpolation" they lie between that and the mean of the tokens that spelled the word before.
---
---     unsloth.add_new_tokens(model, tokenizer, { new_tokens = { "<think>", "</think>" }, method = "mean" })
---@param model unsloth.Model
---@param tokenizer unsloth.Tokenizer
---@param opts { new_tokens: string[], method: string, interpolation: number }
function M.add_new_tokens(model, tokenizer, opts)
  errors.want("add_new_tokens", "model", model, "unsloth.Model", "the model first, as in add_new_tokens(model, tokenizer, { new_tokens = ... })")
  errors.want("add_new_tokens", "tokenizer", tokenizer, "unsloth.Tokenizer", "the tokenizer behind the model")
  local o = options.check("add_new_tokens", opts, NEW_TOKENS)
  if o.method ~= "mean" and o.method ~= "interpolation" then
    errors.invalid('add_new_tokens: method is "%s"; "mean" and "interpolation" are known', o.method)
  end
  if o.interpolation < 0 or o.interpolation > 1 then errors.invalid "add_new_tokens: interpolation lies between 0 and 1" end
  if #o.new_tokens == 0 then errors.invalid "add_new_tokens: new_tokens names none" end
  local before, parts = #tokenizer, {}
  for i, token in ipairs(o.new_tokens) do
    if tokenizer:token_to_id(token) then errors.invalid('add_new_tokens: "%s" is a token already', token) end
    parts[i] = tokenizer:encode(token, { add_special_tokens = false })
  end
  model:release_trainer()
  local vocab = model:info().vocab
  local known = math.min(before, vocab)
  -- Before the tokenizer changes: what refuses leaves both as they were. Padding rows of the old size give way.
  model:resize_vocab(known, known)
  tokenizer:add_tokens(o.new_tokens)
  model:resize_vocab(math.max(#tokenizer, vocab), known)
  if o.method ~= "interpolation" then return end
  for i, token in ipairs(o.new_tokens) do
    if #parts[i] > 0 then model:blend_row(tokenizer:token_to_id(token), parts[i], o.interpolation) end
  end
end

--- Prints how many parameters are trained, in PEFT's words.
---
---     model:print_trainable_parameters()
function Model:print_trainable_parameters()
  errors.method("model", "print_trainable_parameters", self, "unsloth.Model")
  local info = self:info()
  print(("trainable params: %d || all params: %d || trainable%%: %.4f"):format(info.trainable, info.parameters,
    100 * info.trainable / info.parameters))
end

return M
