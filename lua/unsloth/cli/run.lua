--- What bench and plan share: a model, rows of random tokens, a trainer.
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local shapes = require "unsloth.cli.shapes"
local unsloth = require "unsloth"

local M = {}

local names = {}
for name in pairs(shapes) do names[#names + 1] = name end
table.sort(names)

M.options = {
  { "shape", "NAME", "a published shape: " .. table.concat(names, ", ") },
  { "method", "NAME", "lora, qlora or full", "lora", one_of = { "lora", "qlora", "full" } },
  { "batch", "N", "rows of an update", 4, within = { 1, 1 << 16 } },
  { "accumulation", "N", "micro-batches of an update, which is one pass all the same when it fits", 1, within = { 1, 1 << 16 } },
  { "seq", "N", "tokens of a row", 512, within = { 2, 1 << 24 } },
  { "rows", "NAME", "full, or alpaca: row lengths like Alpaca's", "full", one_of = { "full", "alpaca" } },
  { "rank", "N", "of the adapter", 16, within = { 1, 4096 } },
  { "recompute", "NAME", "auto, none, full, or offload: full with block inputs in host memory", "auto",
    one_of = { "auto", "none", "full", "offload" } },
  { "order", "NAME", "of sums in attention's gradients on a GPU: fixed, or any: quicker, and other bits each time", "fixed",
    one_of = { "fixed", "any" } },
  { "memory", "SIZE", "the most to use, as 24GiB (default: what is free)" },
  { "dtype", "NAME", "float32, bfloat16 or float16 (default: the best for this machine)", one_of = args.dtypes },
  { "device", "NAME", "cpu, cuda, cuda:1 (default: the GPU when there is one)" },
  { "seed", "N", "of weights and tokens", 3407, within = { 0 } },
}

local UNITS = { B = 1, KIB = 1 << 10, MIB = 1 << 20, GIB = 1 << 30, KB = 1000, MB = 10 ^ 6, GB = 10 ^ 9 }

function M.bytes(text)
  if not text then return 0 end
  local number, unit = text:match "^([%d.]+)%s*(%a*)$"
  local factor = tonumber(number) and UNITS[unit:upper()] -- a bare number is a slip, not bytes
  local bytes = factor and math.tointeger(tonumber(number) * factor // 1)
  if not bytes or bytes == 0 then errors.invalid('--memory is "%s"; a size like 24GiB is wanted', text) end
  return bytes
end

--- The model of the options; with plan_only its shapes alone.
function M.model(o, plan_only)
  M.bytes(o.memory) -- a slip of the keys is said before anything is made
  if o[2] then errors.invalid('one model is wanted, and "%s" stands behind it', o[2]) end
  if o[1] and o.shape then errors.invalid("give a model's path or --shape NAME, not both") end
  local method = o.method
  local model
  if o[1] then
    model = unsloth.FastLanguageModel.from_pretrained { model_name = o[1], load_in_4bit = method == "qlora",
      full_finetuning = method == "full", dtype = o.dtype, device = o.device, max_seq_length = o.seq, plan_only = plan_only }
  else
    if not o.shape then errors.invalid "give a model's path, or --shape NAME" end
    local shape = shapes[o.shape]
    if not shape then
      local near = core.nearest(o.shape, names)
      errors.invalid('there is no shape "%s"%s; there are %s', o.shape, near and (': did you mean "%s"?'):format(near) or "",
        table.concat(names, ", "))
    end
    model = unsloth.FastLanguageModel.from_config(shape, { random_state = o.seed, full_finetuning = method == "full",
      load_in_4bit = method == "qlora", dtype = o.dtype, device = o.device, max_seq_length = o.seq, plan_only = plan_only })
  end
  if method ~= "full" then
    unsloth.FastLanguageModel.get_peft_model(model, { r = o.rank, lora_alpha = o.rank, random_state = o.seed })
  end
  return model
end

-- Lengths with Alpaca's mean and spread (about 200 tokens with Llama 3's tokenizer): a fixed sample, log-normal.
local function alpaca_length(random, most)
  local normal = math.sqrt(-2 * math.log(1 - random())) * math.cos(2 * math.pi * random())
  return math.max(40, math.min(most, math.exp(5.16 + 0.5 * normal) // 1 | 0))
end

function M.rows(o, vocab, updates)
  local state = o.seed
  local function random()
    state = (state * 6364136223846793005 + 1442695040888963407) & 0x7fffffffffffffff
    return (state >> 11) / (1 << 52)
  end
  local rows = core.rows_new(0)
  for _ = 1, o.batch * o.accumulation * updates do
    local n = o.rows == "alpaca" and alpaca_length(random, o.seq) or o.seq
    local ids = {}
    for i = 1, n do ids[i] = random() * vocab // 1 | 0 end
    rows:add(ids)
  end
  return rows
end

function M.trainer(o, model, rows, steps)
  return core.trainer_new(model, rows, nil, { batch = o.batch, accumulation = o.accumulation, max_steps = steps, learning_rate = 1e-4, schedule = "constant",
    optimizer = "adamw_8bit", seed = o.seed, shuffle = false, recompute = o.recompute, deterministic = o.order == "fixed",
    memory_limit = M.bytes(o.memory) })
end

return M
