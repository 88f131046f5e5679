--- Gives a model an adapter of each kind and saves it in every way.
---
---     unsloth-lua tests/interop/export_kinds.lua MODEL OUT_DIR ID ID ...
---
--- Leaves OUT_DIR/KIND/adapter, OUT_DIR/KIND/merged (float32) and OUT_DIR/KIND/logits.safetensors: `logits` of the ids with the adapter,
--- `gguf` of a float32 GGUF of the merged model (where the model has a tokenizer), `base` of the model before.
local unsloth = require "unsloth"
local core = require "unsloth.core"
local FastLanguageModel = unsloth.FastLanguageModel

local source, out = arg[1], arg[2]
local ids = {}
for i = 3, #arg do ids[#ids + 1] = math.tointeger(tonumber(arg[i])) end

local KINDS = {
  plain = { r = 4, lora_alpha = 8, target_modules = "all-linear" },
  pattern = { r = 4, lora_alpha = 8, use_rslora = true, rank_pattern = { q_proj = 6, ["layers\\.0\\.mlp\\.up_proj"] = 2 },
    alpha_pattern = { down_proj = 3 }, layers_to_transform = { 1 }, layers_pattern = "layers" },
  regex = { r = 4, lora_alpha = 8, target_modules = [[.*\.[01]\.self_attn\.(q|v)_proj|.*\.2\.mlp\.up_proj]] },
  dora = { r = 4, lora_alpha = 8, use_dora = true },
  saved = { r = 4, lora_alpha = 8, modules_to_save = { "embed_tokens", "lm_head" } },
  saved_embed = { r = 4, lora_alpha = 8, modules_to_save = { "embed_tokens" } },
  saved_tied = { r = 4, lora_alpha = 8, modules_to_save = { "embed_tokens" }, ensure_weight_tying = true },
  embeddings = { r = 4, lora_alpha = 8, target_modules = { "q_proj", "lm_head", "embed_tokens" }, lora_embeddings = true },
  bias = { r = 4, lora_alpha = 8, bias = "all", target_modules = { "q_proj", "down_proj" } },
  bias_only = { r = 4, lora_alpha = 8, bias = "lora_only", target_modules = { "q_proj", "down_proj" } },
  pissa = { r = 4, lora_alpha = 8, init_lora_weights = "pissa" },
  pissa_niter = { r = 4, lora_alpha = 8, init_lora_weights = "pissa_niter_16" },
  loftq = { r = 4, lora_alpha = 4, init_lora_weights = "loftq", loftq_config = { loftq_bits = 4, loftq_iter = 2 } },
  -- extra: the vocabulary grows by so many rows first.
  resized = { r = 4, lora_alpha = 8, target_modules = { "q_proj" }, extra = 5 },
  resized_saved = { r = 4, lora_alpha = 8, modules_to_save = { "embed_tokens", "lm_head" }, extra = 5 },
  resized_saved_embed = { r = 4, lora_alpha = 8, modules_to_save = { "embed_tokens" }, extra = 5 },
  resized_saved_tied = { r = 4, lora_alpha = 8, modules_to_save = { "embed_tokens" }, ensure_weight_tying = true, extra = 5 },
  resized_embeddings = { r = 4, lora_alpha = 8, target_modules = { "q_proj", "lm_head", "embed_tokens" }, lora_embeddings = true, extra = 5 },
  loftq_8 = { r = 4, lora_alpha = 4, init_lora_weights = "loftq", loftq_config = { loftq_bits = 8 } },
}

-- Everything that is trained moves a little, as training would move it.
local function disturb(model)
  local names, trained = model:params()
  for k, name in ipairs(names) do
    if trained[name] then
      local flat, n = {}, 0
      for _, row in ipairs(model:get_param(name):totable()) do
        for _, v in ipairs(type(row) == "table" and row or { row }) do
          n = n + 1
          flat[n] = v + 0.05 * math.sin(n * 0.7 + k) * (math.abs(v) + 0.05)
        end
      end
      model:set_param(name, core.tensor(flat))
    end
  end
end

local function open(path)
  return FastLanguageModel.from_pretrained { model_name = path, dtype = "float32", load_in_4bit = false, device = "cpu" }
end

for kind, options in pairs(KINDS) do
  local model <close>, tokenizer = open(source)
  local dir = out .. "/" .. kind
  core.make_dir(dir)
  local prompt = { table.unpack(ids) }
  local result = { base = model:logits(prompt) }
  if options.init_lora_weights == nil then options.init_lora_weights = false end
  options.random_state = 1
  if options.extra then
    local first = model:info().vocab
    model:resize_token_embeddings(first + options.extra)
    for id = first, first + options.extra - 1 do model:blend_row(id, { id - first, 2 * (id - first) + 1 }, 0.7) end
    prompt[#prompt] = first + options.extra - 1
    result.base = model:logits(prompt)
    options.extra = nil
  end
  FastLanguageModel.get_peft_model(model, options)
  result.start = model:logits(prompt)
  disturb(model)
  result.logits = model:logits(prompt)
  model:save_pretrained(dir .. "/adapter")
  if kind:match "^pissa" then model:save_pretrained(dir .. "/as_lora", { path_initial_model_for_weight_conversion = true }) end
  model:save_pretrained_merged(dir .. "/merged", tokenizer, { save_method = "merged_32bit" })
  if tokenizer then
    local paths = model:save_pretrained_gguf(dir, tokenizer, { quantization_method = "f32" })
    local again <close> = open(paths[1])
    result.gguf = again:logits(prompt)
  end
  unsloth.safetensors.save(dir .. "/logits.safetensors", result)
end
