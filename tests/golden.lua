--- Computes every tensor of a golden case and prints how far each lies from the recorded one.
---
---     unsloth-lua tests/golden.lua CASE_DIR --dump OUT.safetensors [--device cpu] [--dtype float32]
---
--- Only the names and shapes of the recorded answers are read for the computing; their values only for the errors.
local args = require "unsloth.args"
local core = require "unsloth.core"

local o = args.parse(arg, {
  name = "tests/golden.lua", words = "CASE_DIR", about = "Computes the tensors of a golden case and prints their errors.",
  options = {
    { "dump", "FILE", "where to write them (.safetensors)" },
    { "device", "NAME", "cpu or cuda", "cpu" },
    { "dtype", "NAME", "float32 or bfloat16", "float32" },
    { "limit", "X", "exit 1 when an error is larger" },
  },
})
local case = o[1] or error("give the folder of a case", 0)

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "a"
  file:close()
  return text
end

local meta = core.json.decode(read(case .. "/meta.json"), case .. "/meta.json")
local golden = core.safetensors_load(case .. "/golden.safetensors")

-- ---- Inputs ---------------------------------------------------------------------------------------------------------

-- batches[k][r] = { ids, labels }: batch 1 is the evaluation batch, 2 .. are the steps'. Padding is cut off.
local function read_batches()
  local ids, mask, labels = golden.input_ids:totable(), golden.attention_mask:totable(), golden.labels:totable()
  local batches = {}
  for k = 1, #ids do
    batches[k] = {}
    for r = 1, #ids[k] do
      local length = 0
      for _, m in ipairs(mask[k][r]) do length = length + m end
      batches[k][r] = { ids = table.move(ids[k][r], 1, length, 1, {}), labels = table.move(labels[k][r], 1, length, 1, {}) }
    end
  end
  return batches
end

local batches = read_batches()
local evaluation, width = batches[1], golden.input_ids.shape[3]

local function rows_of(first, last)
  local rows = core.rows_new(0)
  for k = first, last do
    for _, row in ipairs(batches[k]) do rows:add(row.ids, row.labels) end
  end
  assert(rows:stats().dropped == 0, "a row of the case has no label that counts")
  return rows
end

local function open(options)
  options.device, options.dtype = o.device, o.dtype
  local how = meta.open or {} -- a case whose rows are longer than the model's context says so
  return core.model_open(options.path or case .. "/" .. (meta.model or "model"), { device = o.device, dtype = o.dtype, full_finetuning = options.full,
    max_seq_length = how.max_seq_length, rope_scaling = how.rope_scaling })
end

-- ---- Computing ------------------------------------------------------------------------------------------------------

local result, failed = {}, 0

local function wanted(prefix)
  local names = {}
  for name in pairs(golden) do
    if name:sub(1, #prefix) == prefix then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

local function put(name, fn)
  if not golden[name] then return end
  local ok, value = pcall(fn)
  if ok then
    result[name] = value
  else
    failed = failed + 1
    print(("%-90s FAILED: %s"):format(name, value))
  end
end

-- (rows, width, vocabulary), zero where a row is padded
local function logits_of(model)
  local all, vocab = {}, model:info().vocab
  local nothing = {}
  for v = 1, vocab do nothing[v] = 0 end
  for r, row in ipairs(evaluation) do
    all[r] = model:logits(row.ids):totable()
    for t = #row.ids + 1, width do all[r][t] = nothing end
  end
  return core.tensor(all)
end

local hp = meta.hp

local function train_options(lr, steps)
  return { batch = #(batches[2] or evaluation), accumulation = 1, max_steps = steps, learning_rate = lr, weight_decay = hp.weight_decay,
    beta1 = hp.betas[1], beta2 = hp.betas[2], epsilon = hp.eps, max_grad_norm = hp.max_grad_norm, optimizer = "adamw",
    shuffle = false, recompute = "none", embedding_learning_rate = hp.embedding_lr,
    router_aux_loss_coef = meta.router_aux_loss_coef or 0 }
end

local function rate_function(lr, steps)
  local warmup = hp.warmup_steps
  return function(step)
    if step < warmup then return lr * step / warmup end
    return lr * (steps - step) / (steps - warmup)
  end
end

-- Loss and gradients of the evaluation batch. `prefix` names them; rename turns a golden name into a parameter's.
local function gradients(model, prefix, rename)
  local trainer <close> = core.trainer_new(model, rows_of(1, 1), nil, train_options(0, 1))
  local stats = trainer:gradients(1, #evaluation)
  put(prefix .. "loss", function() return core.tensor { stats.loss } end)
  for _, name in ipairs(wanted(prefix .. "grad.")) do
    put(name, function() return trainer:get_grad(rename(name:sub(#prefix + #"grad." + 1))) end)
  end
end

local function train(model, prefix, lr, steps)
  local losses, norms = {}, {}
  local trainer <close> = core.trainer_new(model, rows_of(2, 1 + steps), nil, train_options(lr, steps), rate_function(lr, steps))
  for i = 1, steps do
    local stats = trainer:step()
    losses[i], norms[i] = stats.loss, stats.grad_norm
  end
  put(prefix .. "losses", function() return core.tensor(losses) end)
  put(prefix .. "grad_norms", function() return core.tensor(norms) end)
end

local function greedy(model)
  local total = golden["base.greedy"].shape[2]
  local ids = table.move(evaluation[1].ids, 1, 8, 1, {})
  local generator <close> = model:generator(ids, { max_new_tokens = total - 8, stop_ids = {} })
  for id in generator.next, generator do ids[#ids + 1] = id end
  return core.tensor({ ids }, "int32")
end

if golden["base.logits"] then
  local model <close> = open { full = true }
  put("base.logits", function() return logits_of(model) end)
  put("base.greedy", function() return greedy(model) end)
  gradients(model, "base.", function(name) return name end)
  if golden["full.losses"] then train(model, "full.", meta.full_hp.lr, meta.full_hp.steps) end
end

-- PyTorch calls a parameter "...lora_A.default.weight", PEFT's files leave the adapter's name out.
local function published(name)
  name = name:gsub("%.modules_to_save%.default", ""):gsub("%.modules_to_save", "")
  name = name:gsub("%.default%.weight$", ".weight"):gsub("%.default$", "")
  return (name:gsub("lora_magnitude_vector%.weight$", "lora_magnitude_vector"))
end

local function merged_logits(model)
  local dir = os.tmpname()
  os.remove(dir)
  local removed <close> = setmetatable({}, { __close = function() core.remove_path(dir) end })
  core.export_merged(model, nil, dir, "float32")
  local merged <close> = open { path = dir }
  return logits_of(merged), removed
end

if golden["lora.losses"] or golden["lora.logits"] then
  local model <close> = open {}
  model:load_adapter(case .. "/adapter")
  put("lora.logits", function() return logits_of(model) end)
  gradients(model, "lora.", published)
  if golden["lora.losses"] then train(model, "lora.", hp.lr, hp.steps) end
  for _, name in ipairs(wanted "lora.final.") do
    put(name, function() return model:get_param(published(name:sub(#"lora.final." + 1))) end)
  end
  put("merged.final.logits", function() return (merged_logits(model)) end)
end

-- ---- Errors ---------------------------------------------------------------------------------------------------------

-- Padded positions of logits are left out.
local function logits_error(ours, theirs)
  local diff, norm = 0, 0
  for r, row in ipairs(evaluation) do
    local _, d, n = ours[r]:narrow(1, 1, #row.ids):distance(theirs[r]:narrow(1, 1, #row.ids))
    diff, norm = diff + d * d, norm + n * n
  end
  return math.sqrt(norm > 0 and diff / norm or diff)
end

if o.dump then core.safetensors_save(o.dump, result) end

local worst = 0
for _, name in ipairs(wanted "") do
  local ours = result[name]
  if ours then
    local distance = name:match "logits$" and logits_error(ours, golden[name]) or ours:distance(golden[name])
    worst = distance <= worst and worst or distance
    print(("%-90s %.3e"):format(name, distance))
  end
end
print(("%s: largest error %.3e, %d not computed"):format(meta.case or case, worst, failed))
if failed > 0 or (o.limit and not (worst <= o.limit)) then os.exit(false, true) end
