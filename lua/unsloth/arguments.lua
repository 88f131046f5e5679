--- TrainingArguments and SFTConfig: the names of transformers and TRL with Unsloth's defaults. Each is implemented, or true by
--- construction here (`note`), or refused with the remedy.
local errors = require "unsloth.errors"
local options = require "unsloth.options"
local reporters = require "unsloth.reporters"

local M = {}

local at_least, between = options.at_least, options.between
local ONE_PROCESS = "one process trains"
local NO_UPLOAD = "nothing is uploaded; save_pretrained writes files"
local DISTRIBUTED = "several machines or devices are not built in yet; leave it out"

local SPEC = {
  -- the run
  output_dir = { "string", default = "trainer_output" },
  max_steps = { "integer", default = -1 },
  num_train_epochs = { "number", default = 3.0, check = between(0, 1e9) },
  per_device_train_batch_size = { "integer", default = 4, check = between(1, 1 << 20) },
  gradient_accumulation_steps = { "integer", default = 2, check = between(1, 1 << 20) },
  per_device_eval_batch_size = { "integer", default = 4, note = "evaluation packs rows as the memory plan allows" },
  eval_accumulation_steps = { "integer", note = "evaluation keeps no logits" },
  seed = { "integer", default = 3407, check = at_least(0) },
  data_seed = { "integer", check = at_least(0) },
  resume_from_checkpoint = { "string|boolean" },
  deterministic = { "boolean", default = true }, -- false: attention's gradients on a GPU may differ in the last bits
  dataloader_drop_last = { "boolean", default = false, refuse = "the last rows of an epoch are trained too" },
  -- the optimiser
  optim = { "string", default = "adamw_8bit" },
  optim_args = { "string", refuse = "give adam_beta1, adam_beta2, adam_epsilon" },
  learning_rate = { "number", default = 5e-5, check = between(0, 1e6) },
  embedding_learning_rate = { "number", check = between(0, 1e6) },
  weight_decay = { "number", default = 0.001, check = between(0, 1000) },
  adam_beta1 = { "number", default = 0.9, check = between(0, 0.9999999) },
  adam_beta2 = { "number", default = 0.999, check = between(0, 0.9999999) },
  adam_epsilon = { "number", default = 1e-8, check = between(0, 1) },
  max_grad_norm = { "number", default = 1.0, check = at_least(0) },
  lr_scheduler_type = { "string|function", default = "linear" },
  lr_scheduler_kwargs = { "table" },
  warmup_steps = { "number", default = 0, check = at_least(0) },
  warmup_ratio = { "number", check = between(0, 1) },
  adafactor = { "boolean", default = false, refuse = 'use optim = "adamw_8bit"' },
  optim_target_modules = { "table|string", refuse = "it belongs to GaLore, which is not built in" },
  q_galore_config = { "table", refuse = 'use optim = "adamw_8bit"' },
  router_aux_loss_coef = { "number", check = at_least(0) },
  label_smoothing_factor = { "number", default = 0, refuse = "the loss is plain cross-entropy" },
  neftune_noise_alpha = { "number", refuse = "no noise is added to embeddings" },
  -- memory
  gradient_checkpointing = { "boolean|string", only = { auto = true, unsloth = true, [true] = true, [false] = true } },
  gradient_checkpointing_kwargs = { "table", note = "the memory plan decides what is computed again" },
  activation_offloading = { "boolean", default = false, refuse = "activations are computed again instead" },
  auto_find_batch_size = { "boolean", note = "the memory plan splits an update into passes that fit" },
  memory_limit = { "number", check = at_least(0) },
  torch_empty_cache_steps = { "integer", note = "memory is taken once" },
  -- logging
  logging_strategy = { "string", default = "steps", only = { no = true, steps = true, epoch = true } },
  logging_steps = { "integer", default = 1, check = at_least(1) },
  logging_first_step = { "boolean", default = false },
  logging_dir = { "string" }, -- TensorBoard's files; output_dir/runs
  logging_nan_inf_filter = { "boolean", note = "an update that is not finite is skipped and said" },
  report_to = { "string|table", default = "none" },
  run_name = { "string" }, -- the report's title
  report = { "boolean", default = true }, -- report.html and loss.svg in output_dir
  disable_tqdm = { "boolean", default = false },
  log_level = { "string", note = "what matters is always said" },
  include_tokens_per_second = { "boolean", note = "tokens per second are always shown" },
  include_num_input_tokens_seen = { "boolean|string", note = "tokens are always counted" },
  skip_memory_metrics = { "boolean", note = "the peak of memory is always shown" },
  -- evaluation
  eval_strategy = { "string", default = "no", only = { no = true, steps = true, epoch = true } },
  evaluation_strategy = { "string", alias = "eval_strategy" },
  eval_steps = { "integer", check = at_least(1) },
  eval_on_start = { "boolean", default = false },
  eval_delay = { "number", default = 0, check = at_least(0) },
  load_best_model_at_end = { "boolean", default = false, refuse = "keep checkpoints with save_steps and load the one you want" },
  metric_for_best_model = { "string", note = "no checkpoint is chosen for you" },
  greater_is_better = { "boolean", note = "no checkpoint is chosen for you" },
  prediction_loss_only = { "boolean", note = "evaluation gives the loss" },
  -- checkpoints
  save_strategy = { "string", default = "steps", only = { no = true, steps = true, epoch = true } },
  save_steps = { "integer", default = 500, check = at_least(1) },
  save_total_limit = { "integer", check = at_least(1) },
  save_safetensors = { "boolean", default = true, refuse = "only safetensors are written" },
  save_only_model = { "boolean", default = false, refuse = "checkpoints are whole, so that a run can go on; use model:save_pretrained" },
  overwrite_output_dir = { "boolean", note = "checkpoints of the same step are replaced" },
  ignore_data_skip = { "boolean", default = false, refuse = "a resumed run goes on with the next rows" },
  restore_callback_states_from_checkpoint = { "boolean", note = "callbacks are Lua functions" },
  -- data
  dataset_text_field = { "string", default = "text" },
  max_seq_length = { "integer", check = at_least(2) },
  max_length = { "integer", alias = "max_seq_length" },
  completion_only_loss = { "boolean" },
  assistant_only_loss = { "boolean", default = false, refuse = "use train_on_responses_only(trainer, { instruction_part = , response_part = })" },
  packing = { "boolean", default = false, note = "rows of an update always go without padding, attention kept inside each" },
  packing_strategy = { "string", note = "rows are always packed whole" },
  padding_free = { "boolean", note = "nothing is ever padded" },
  eval_packing = { "boolean", note = "rows are always packed whole" },
  pad_to_multiple_of = { "integer", note = "nothing is ever padded" },
  pad_token = { "string", note = "nothing is ever padded" },
  eos_token = { "string", refuse = "put the token into the text itself" },
  chat_template_path = { "string", refuse = "give the tokenizer its template by get_chat_template" },
  dataset_num_proc = { "integer", note = "rows are tokenised in this process" },
  dataset_batch_size = { "integer", note = "rows are tokenised one by one" },
  dataset_kwargs = { "table", note = "there is nothing to pass on" },
  shuffle_dataset = { "boolean", default = false, refuse = "rows are shuffled every epoch; or call dataset:shuffle" },
  model_init_kwargs = { "table", refuse = "give them to from_pretrained" },
  loss_type = { "string", default = "nll", only = { nll = true } },
  remove_unused_columns = { "boolean", note = "only the text's column is read" },
  label_names = { "table", note = "labels come from the text" },
  group_by_length = { "boolean", default = false, refuse = "rows are packed, so their length does not matter" },
  length_column_name = { "string", note = "rows are packed, so their length does not matter" },
  dataloader_num_workers = { "integer", note = "rows are tokenised once, before the first step" },
  dataloader_prefetch_factor = { "integer", note = "rows are tokenised once, before the first step" },
  dataloader_pin_memory = { "boolean", note = "rows are tokenised once, before the first step" },
  dataloader_persistent_workers = { "boolean", note = "rows are tokenised once, before the first step" },
  -- numbers and machines
  fp16 = { "boolean", note = "from_pretrained's dtype decides" },
  bf16 = { "boolean", note = "from_pretrained's dtype decides" },
  fp16_full_eval = { "boolean", note = "from_pretrained's dtype decides" },
  bf16_full_eval = { "boolean", note = "from_pretrained's dtype decides" },
  fp16_opt_level = { "string", note = "from_pretrained's dtype decides" },
  half_precision_backend = { "string", note = "from_pretrained's dtype decides" },
  tf32 = { "boolean", note = "from_pretrained's dtype decides" },
  use_cpu = { "boolean", note = "from_pretrained's device decides" },
  no_cuda = { "boolean", note = "from_pretrained's device decides" },
  full_determinism = { "boolean", note = "the same run gives the same numbers, unless deterministic = false" },
  average_tokens_across_devices = { "boolean", note = "the loss is a mean over all counted labels of the update" },
  use_liger_kernel = { "boolean", note = "head and loss are fused already" },
  torch_compile = { "boolean", default = false, refuse = "there is nothing to compile" },
  torch_compile_backend = { "string", note = "there is nothing to compile" },
  torch_compile_mode = { "string", note = "there is nothing to compile" },
  deepspeed = { "table|string", refuse = DISTRIBUTED },
  fsdp = { "string|table", default = "", refuse = DISTRIBUTED },
  fsdp_config = { "table|string", refuse = DISTRIBUTED },
  parallelism_config = { "table", refuse = DISTRIBUTED },
  accelerator_config = { "table", note = ONE_PROCESS },
  local_rank = { "integer", default = -1, note = ONE_PROCESS },
  ddp_backend = { "string", note = ONE_PROCESS },
  ddp_find_unused_parameters = { "boolean", note = ONE_PROCESS },
  ddp_bucket_cap_mb = { "integer", note = ONE_PROCESS },
  ddp_broadcast_buffers = { "boolean", note = ONE_PROCESS },
  ddp_timeout = { "integer", note = ONE_PROCESS },
  push_to_hub = { "boolean", default = false, refuse = NO_UPLOAD },
  hub_model_id = { "string", refuse = NO_UPLOAD },
  hub_token = { "string", refuse = NO_UPLOAD },
  hub_strategy = { "string", note = NO_UPLOAD },
  hub_private_repo = { "boolean", note = NO_UPLOAD },
  do_train = { "boolean", note = "train() trains" },
  do_eval = { "boolean", note = "evaluate() evaluates" },
  do_predict = { "boolean", note = "model:generate answers" },
}
M.SPEC = SPEC
M.defaults = options.defaults(SPEC)

local OPTIM = {
  adamw_8bit = "adamw_8bit", adamw_bnb_8bit = "adamw_8bit", paged_adamw_8bit = "adamw_8bit",
  adamw = "adamw", adamw_torch = "adamw", adamw_torch_fused = "adamw", adamw_hf = "adamw", adamw_32bit = "adamw",
  paged_adamw = "adamw", paged_adamw_32bit = "adamw", adamw_apex_fused = "adamw",
}

-- ---- Schedules: the rate's factor after warmup. p is the share of what comes after it, from 0 to 1. -------------------------

local SCHEDULE = {}

-- What lr_scheduler_kwargs may hold for each.
local POSITIVE = { "number", check = at_least(0) }
local KWARGS = {
  cosine = { num_cycles = POSITIVE }, cosine_with_restarts = { num_cycles = POSITIVE },
  cosine_with_min_lr = { num_cycles = POSITIVE, min_lr = POSITIVE, min_lr_rate = POSITIVE },
  polynomial = { lr_end = POSITIVE, power = POSITIVE }, inverse_sqrt = { timescale = POSITIVE },
}

function SCHEDULE.cosine(p, k)
  return math.max(0, 0.5 * (1 + math.cos(math.pi * 2 * k.num_cycles * p)))
end

function SCHEDULE.cosine_with_restarts(p, k)
  if p >= 1 then return 0 end
  return math.max(0, 0.5 * (1 + math.cos(math.pi * ((k.num_cycles or 1) * p % 1))))
end

function SCHEDULE.cosine_with_min_lr(p, k, rate)
  local low = k.min_lr_rate or (k.min_lr or 0) / rate
  return math.max(0, 0.5 * (1 + math.cos(math.pi * 2 * (k.num_cycles or 0.5) * p)) * (1 - low) + low)
end

function SCHEDULE.polynomial(p, k, rate)
  local last = (k.lr_end or 1e-7) / rate
  if p >= 1 then return last end
  return (1 - last) * (1 - p) ^ (k.power or 1) + last
end

function SCHEDULE.inverse_sqrt(_, k, _, step, warmup)
  local scale = k.timescale or (warmup > 0 and warmup or 10000)
  return 1 / math.sqrt((step + scale - warmup) / scale)
end

local IN_CORE = { linear = true, cosine = true, constant = true, constant_with_warmup = true }

local SCHEDULES = {}
for _, list in ipairs { IN_CORE, SCHEDULE } do
  for name in pairs(list) do SCHEDULES[name] = true end
end

-- Schedules beyond the core's own four are functions of Lua: (step from 0, total) -> rate.
local function rate_function(o)
  local kind, rate, kwargs = o.lr_scheduler_type, o.learning_rate, o.lr_scheduler_kwargs or {}
  if type(kind) == "function" then
    return function(step, total) return kind(step, total, rate) end
  end
  local factor = SCHEDULE[kind]
  if not factor or kind == "cosine" and not kwargs.num_cycles then
    if IN_CORE[kind] then return nil end
    error(("no schedule %s"):format(kind)) -- M.new has refused it
  end
  return function(step, total)
    local warmup = o.warmup_steps > 0 and o.warmup_steps or math.ceil(total * o.warmup_ratio)
    if step < warmup then return rate * step / warmup end
    return rate * factor((step - warmup) / math.max(1, total - warmup), kwargs, rate, step, warmup)
  end
end

-- ---- Arguments ------------------------------------------------------------------------------------------------------

local Arguments = { __name = "unsloth.TrainingArguments" }

local function check_report(report)
  local names = type(report) == "table" and report or { report }
  for _, name in ipairs(names) do
    if not reporters.names[name] then
      errors.unsupported('report_to "%s" is not built in%s; "tensorboard", "jsonl" and "none" are, and callbacks = { on_log = '
        .. "function(trainer, log) ... end } gets the numbers", tostring(name), options.meant(name, reporters.names))
    end
  end
end

--- The arguments of training, checked: transformers' and TRL's names with Unsloth's defaults. Returns a table of all of them.
---
---     local args = unsloth.TrainingArguments { max_steps = 60, learning_rate = 2e-4, output_dir = "outputs" }
---@param opts unsloth.TrainingArguments|nil
---@return table
function M.new(opts)
  if getmetatable(opts) == Arguments then return opts end
  local o = options.check("TrainingArguments", opts, SPEC)
  check_report(o.report_to)
  if type(o.lr_scheduler_type) == "string" and not SCHEDULES[o.lr_scheduler_type] then
    errors.invalid('lr_scheduler_type "%s" is not known%s; linear, cosine, constant, constant_with_warmup, cosine_with_restarts, '
      .. "cosine_with_min_lr, polynomial, inverse_sqrt are, or a function(step, total, rate)", o.lr_scheduler_type,
      options.meant(o.lr_scheduler_type, SCHEDULES))
  end
  if o.lr_scheduler_kwargs then
    o.lr_scheduler_kwargs = options.check("lr_scheduler_kwargs", o.lr_scheduler_kwargs, KWARGS[o.lr_scheduler_type] or {})
  end
  if not OPTIM[o.optim] then
    errors.unsupported('optim "%s" is not built in%s; "adamw_8bit" and "adamw_torch" are', o.optim, options.meant(o.optim, OPTIM))
  end
  if o.warmup_steps > 0 and o.warmup_steps < 1 then -- transformers 5: a share
    o.warmup_steps, o.warmup_ratio = 0, o.warmup_steps
  end
  o.warmup_steps = math.tointeger(o.warmup_steps) or errors.invalid("warmup_steps is %s; an integer, or a share below 1, is wanted", o.warmup_steps)
  -- Unsloth warms up over a tenth of the steps unless told otherwise.
  if not o.warmup_ratio then o.warmup_ratio = opts and opts.warmup_steps and 0 or 0.1 end
  if o.max_steps == 0 or o.max_steps < -1 then errors.invalid("max_steps is %d; 1 or more is wanted, or -1 for num_train_epochs", o.max_steps) end
  return setmetatable(o, Arguments)
end

--- What the core's trainer takes, and the rate function or nil.
function M.core_options(o, recompute)
  return {
    batch = o.per_device_train_batch_size, accumulation = o.gradient_accumulation_steps, epochs = o.num_train_epochs,
    max_steps = math.max(0, o.max_steps), learning_rate = o.learning_rate, embedding_learning_rate = o.embedding_learning_rate,
    schedule = IN_CORE[o.lr_scheduler_type] and o.lr_scheduler_type or nil, warmup_steps = o.warmup_steps,
    warmup_ratio = o.warmup_ratio, weight_decay = o.weight_decay, beta1 = o.adam_beta1, beta2 = o.adam_beta2,
    epsilon = o.adam_epsilon, max_grad_norm = o.max_grad_norm, optimizer = OPTIM[o.optim], seed = o.data_seed or o.seed,
    router_aux_loss_coef = o.router_aux_loss_coef, recompute = recompute, deterministic = o.deterministic,
    memory_limit = o.memory_limit and math.tointeger(o.memory_limit // 1),
  }, rate_function(o)
end

return M
