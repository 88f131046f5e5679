--- Supervised fine-tuning: SFTTrainer, train_on_responses_only.
local arguments = require "unsloth.arguments"
local chat = require "unsloth.chat"
local core = require "unsloth.core"
local datasets = require "unsloth.dataset"
local errors = require "unsloth.errors"
local options = require "unsloth.options"
local progress = require "unsloth.progress"
local report = require "unsloth.report"
local reporters = require "unsloth.reporters"

local M = {}
local json = core.json

---@class unsloth.Trainer
local Trainer = { __name = "unsloth.SFTTrainer" }
Trainer.__index = Trainer
M.Trainer = Trainer

-- ---- Rows -----------------------------------------------------------------------------------------------------------

local function at_row(ds, i, format, ...)
  errors.raise("USL_ERR_FORMAT", "%s: " .. format, ds:where(i), ...)
end

-- Texts wait for one another, so that all threads encode: so many rows at a time.
local BATCH = 512

local function add_ids(self, rows, ids)
  local eos = self.tokenizer.eos_token_id -- a template may write a line's end behind it
  if ids[#ids] == eos or ids[#ids - 1] == eos then self.with_eos = self.with_eos + 1 end
  rows:add(ids)
end

-- Ids of one text, or of an array of them; nil and the error when it is about a text.
local function encode(self, texts)
  local ok, ids = pcall(self.tokenizer.encode_once, self.tokenizer, texts)
  if ok then return ids end
  if type(ids) ~= "table" and type(ids) ~= "userdata" or ids.code ~= "USL_ERR_INVALID" then error(ids, 0) end
  return nil, ids
end

local function add_waiting(self, rows, ds, waiting)
  if #waiting == 0 then return end
  local list = encode(self, waiting)
  for k, text in ipairs(waiting) do
    local ids, why = list and list[k]
    if not ids then ids, why = encode(self, text) end -- which of them it was
    if not ids then at_row(ds, waiting.rows[k], "%s", why) end
    add_ids(self, rows, ids)
    waiting[k], waiting.rows[k] = nil, nil
  end
end

local function add_text(self, rows, ds, i, text, waiting)
  if type(text) ~= "string" then
    at_row(ds, i, 'column "%s" is %s; a text is wanted (dataset_text_field or formatting_func says where it is)',
      self.args.dataset_text_field, text == nil and "missing" or "a " .. type(text))
  end
  waiting[#waiting + 1], waiting.rows[#waiting + 1] = text, i
  if #waiting == BATCH then add_waiting(self, rows, ds, waiting) end
end

-- Messages to ids by the tokenizer's chat template; tools are the row's.
local function chat_ids(self, ds, i, messages, add_generation_prompt)
  local tools = ds[i].tools
  if type(tools) == "string" then tools = json.decode(tools) end
  local ok, ids = pcall(self.tokenizer.apply_chat_template, self.tokenizer, messages,
    { add_generation_prompt = add_generation_prompt, tools = tools })
  if not ok then at_row(ds, i, "%s", ids) end
  return ids
end

local function add_messages(self, rows, ds, i, messages)
  if type(messages) ~= "table" then at_row(ds, i, 'the column "messages" is no array of messages') end
  local ids = chat_ids(self, ds, i, messages, false)
  -- A template may write a line break behind the token that ends the last turn.
  for k = #ids, math.max(#ids - 2, 1), -1 do
    if ids[k] == self.tokenizer.eos_token_id then
      self.with_eos = self.with_eos + 1
      break
    end
  end
  rows:add(ids)
end

-- Ids of prompt and completion together, and how many of them are the prompt's. Texts end with EOS, as TRL writes them.
local function completion_ids(self, ds, i, prompt, completion)
  if type(prompt) == "table" and type(completion) == "table" then
    local all = table.move(completion, 1, #completion, #prompt + 1, table.move(prompt, 1, #prompt, 1, {}))
    return chat_ids(self, ds, i, all, false), #chat_ids(self, ds, i, prompt, true)
  end
  if type(prompt) ~= "string" or type(completion) ~= "string" then
    at_row(ds, i, 'columns "prompt" and "completion" must both be texts, or both arrays of messages')
  end
  local eos = self.tokenizer.eos_token
  if eos and completion:sub(-#eos) ~= eos then completion = completion .. eos end
  return self.tokenizer:encode_once(prompt .. completion), #self.tokenizer:encode_once(prompt)
end

-- The prompt does not count unless completion_only_loss is false.
local function add_completion(self, rows, ds, i, row)
  local ids, prompt_count = completion_ids(self, ds, i, row.prompt, row.completion)
  local labels
  self.with_eos = self.with_eos + 1
  if self.args.completion_only_loss ~= false then
    labels = table.move(ids, 1, #ids, 1, {})
    for k = 1, math.min(prompt_count, #ids) do labels[k] = -100 end
  end
  rows:add(ids, labels)
end

local function tokenized(self, ds, formatting_func)
  local rows, waiting = core.rows_new(self.max_seq_length), { rows = {} }
  local field = self.args.dataset_text_field
  local at <close> = datasets.at(ds)
  for i in progress.count("tokenising", #ds) do
    local row = ds[i]
    if formatting_func then
      at.row = i
      local text = core.call(formatting_func, row)
      at.row = nil
      for _, one in ipairs(type(text) == "table" and text or { text or false }) do add_text(self, rows, ds, i, one, waiting) end
    elseif row[field] == nil and row.prompt ~= nil and row.completion ~= nil then
      add_waiting(self, rows, ds, waiting) -- rows keep their order
      add_completion(self, rows, ds, i, row)
    elseif row[field] == nil and row.messages ~= nil then
      add_waiting(self, rows, ds, waiting)
      add_messages(self, rows, ds, i, row.messages)
    else
      add_text(self, rows, ds, i, row[field], waiting)
    end
  end
  add_waiting(self, rows, ds, waiting)
  return rows
end

-- ---- Construction ---------------------------------------------------------------------------------------------------

local ARGS = arguments.SPEC
local SPEC = {
  model = { "userdata" },
  tokenizer = { "userdata" },
  processing_class = { "userdata", alias = "tokenizer" },
  train_dataset = { "userdata" },
  eval_dataset = { "userdata" },
  args = { "table" },
  formatting_func = { "function" },
  callbacks = { "table" },
  dataset_text_field = ARGS.dataset_text_field,
  max_seq_length = ARGS.max_seq_length,
  dataset_num_proc = ARGS.dataset_num_proc,
  packing = ARGS.packing,
  dataset_kwargs = ARGS.dataset_kwargs,
  dataset_batch_size = ARGS.dataset_batch_size,
  eval_packing = ARGS.eval_packing,
  data_collator = { "any", note = "rows are packed here; train_on_responses_only masks labels" },
  peft_config = { "table", refuse = "call FastLanguageModel.get_peft_model first" },
  model_init = { "function", refuse = "give the model itself" },
  compute_metrics = { "function", refuse = "logits are never kept; evaluate in callbacks with model:generate" },
  preprocess_logits_for_metrics = { "function", refuse = "logits are never kept; evaluate in callbacks with model:generate" },
  compute_loss_func = { "function", refuse = "the loss is cross-entropy over counted labels" },
  optimizers = { "table", refuse = "args.optim names the optimiser" },
}
SPEC.dataset_text_field = { "string" }
SPEC.packing = { "boolean", note = ARGS.packing.note }

local CALLBACKS = { on_train_begin = true, on_step = true, on_log = true, on_evaluate = true, on_save = true, on_train_end = true }
local CALLBACK_ALIAS = { on_step_end = "on_step" }

local function callback_list(callbacks)
  if not callbacks then return {} end
  local list = #callbacks > 0 and callbacks or { callbacks }
  local names, out = {}, {}
  for name in pairs(CALLBACKS) do names[#names + 1] = name end
  for i, one in ipairs(list) do
    out[i] = {}
    for name, fn in pairs(one) do
      local target = CALLBACK_ALIAS[name] or name
      if not CALLBACKS[target] then
        local nearest = core.nearest(tostring(name), names)
        errors.invalid('callbacks: "%s" is not known%s', name, nearest and (': did you mean "%s"?'):format(nearest) or "")
      end
      if type(fn) ~= "function" then errors.invalid("callbacks: %s must be a function, not a %s", name, type(fn)) end
      out[i][target] = fn
    end
  end
  return out
end

local function require_class(what, value, name)
  if value == nil then errors.invalid("SFTTrainer needs %s", what) end
  local meta = debug.getmetatable(value)
  if not meta or meta.__name ~= name then errors.invalid("SFTTrainer: %s is no %s", what, name) end
end

-- Numbers of each update, for the report: arrays of one length.
local SERIES = { "step", "loss", "learning_rate", "grad_norm", "tokens", "seconds" }

local function new_series()
  local series = { memory = {} }
  for _, name in ipairs(SERIES) do series[name] = {} end
  return series
end

local function add_to_series(self, stats)
  local n = #self.series.step + 1
  for _, name in ipairs(SERIES) do self.series[name][n] = stats[name] end
  self.series.memory[n] = core.memory(self.model)
end

--- Makes a trainer; rows are tokenised here.
---
---     local trainer = unsloth.SFTTrainer { model = model, tokenizer = tokenizer, train_dataset = dataset,
---       args = unsloth.TrainingArguments { max_steps = 60, learning_rate = 2e-4, output_dir = "outputs" } }
---@param opts unsloth.SFTTrainerOptions
---@return unsloth.Trainer
function M.SFTTrainer(opts)
  errors.want("SFTTrainer", "the argument", opts, "table", "a table, as in SFTTrainer { model = model, train_dataset = dataset }")
  for _, name in ipairs { "train_dataset", "eval_dataset" } do
    local given = opts[name]
    if type(given) == "table" then
      errors.invalid("SFTTrainer: %s is a table; %s", name, given.train and given.test and "give one side of it, its train or its test"
        or "unsloth.dataset_from_list(rows) makes a data set of an array of rows")
    end
  end
  local o = options.check("SFTTrainer", opts, SPEC)
  require_class("model", o.model, "unsloth.Model")
  require_class("train_dataset", o.train_dataset, "unsloth.Dataset")
  local tokenizer = o.tokenizer or o.model.tokenizer
  require_class("tokenizer", tokenizer, "unsloth.Tokenizer")
  local given = {}
  for name, value in pairs(o.args or {}) do given[name] = value end
  for _, name in ipairs { "dataset_text_field", "max_seq_length" } do
    if o[name] ~= nil then given[name] = o[name] end
  end
  local self = setmetatable({ model = o.model, tokenizer = tokenizer, args = arguments.new(given), callbacks = callback_list(o.callbacks),
    with_eos = 0, log_history = {}, history = {}, series = new_series(), formatting_func = o.formatting_func }, Trainer)
  self.max_seq_length = math.min(self.args.max_seq_length or math.maxinteger, o.model:info().context)
  self.rows = tokenized(self, o.train_dataset, o.formatting_func)
  if #o.train_dataset > 0 and self.with_eos == 0 and tokenizer.eos_token then
    errors.note("no training row ends with %s, so the model will not learn to stop; append tokenizer.eos_token to each text",
      tokenizer.eos_token)
  end
  if o.eval_dataset then
    require_class("eval_dataset", o.eval_dataset, "unsloth.Dataset")
    self.eval_rows = tokenized(self, o.eval_dataset, o.formatting_func)
  elseif self.args.eval_strategy ~= "no" then
    errors.invalid('SFTTrainer: eval_strategy = "%s" needs eval_dataset', self.args.eval_strategy)
  end
  self.state = { global_step = 0, epoch = 0, log_history = self.log_history }
  return self
end

local RESPONSES = {
  instruction_part = { "string" },
  response_part = { "string" },
  force_match = { "boolean", default = true, note = "markers are matched as token ids" },
  last_response_only = { "boolean", default = false },
  num_proc = { "integer", note = "rows are masked in this process" },
}

--- Lets only answers count: labels between a response marker and the next instruction marker. Returns the trainer. Markers
--- that are not given are those of the tokenizer's chat template.
---
---     unsloth.train_on_responses_only(trainer, { instruction_part = "### Instruction:\n", response_part = "### Response:\n" })
function M.train_on_responses_only(trainer, opts)
  errors.want("train_on_responses_only", "trainer", trainer, "unsloth.SFTTrainer", "the trainer first, as SFTTrainer returns it")
  local o = options.check("train_on_responses_only", opts, RESPONSES)
  if not o.instruction_part and not o.response_part and trainer.tokenizer.chat_template then
    o.instruction_part, o.response_part = chat.markers(trainer.tokenizer)
  end
  if not o.instruction_part or not o.response_part then
    errors.invalid "train_on_responses_only needs instruction_part and response_part, the texts that begin each"
  end
  if trainer.handle then errors.invalid "train_on_responses_only: the trainer has begun; call it before train" end
  local bare = { add_special_tokens = false }
  local instruction, response = trainer.tokenizer:encode(o.instruction_part, bare), trainer.tokenizer:encode(o.response_part, bare)
  trainer.rows = trainer.rows:mask_responses(instruction, response, o.last_response_only)
  if trainer.eval_rows then trainer.eval_rows = trainer.eval_rows:mask_responses(instruction, response, o.last_response_only) end
  return trainer
end

-- ---- The loop -------------------------------------------------------------------------------------------------------

local GRADIENT_CHECKPOINTING = { auto = "auto", unsloth = "offload", [true] = "full", [false] = "none" }

--- The core's trainer, made at the first use, when the rows are final.
---
---     print(trainer:core():plan().total)
function Trainer:core()
  if not self.handle then
    self.model:release_trainer()
    local recompute = GRADIENT_CHECKPOINTING[self.args.gradient_checkpointing] or self.model.recompute or "auto"
    local o, rate = arguments.core_options(self.args, recompute)
    self.handle = core.trainer_new(self.model, self.rows, self.eval_rows, o, rate)
    self.state.global_step, self.state.max_steps = self.handle:position()
    self.model.trainer, self.plan = self, self.handle:plan()
    self.report = self.report or report.new(self)
    self.model.trainer_report = self.report
  end
  return self.handle
end

local function call_back(self, name, ...)
  for _, callbacks in ipairs(self.callbacks) do
    if callbacks[name] then core.call(callbacks[name], self, ...) end
  end
end

local function log(self, entry, stats)
  self.log_history[#self.log_history + 1] = entry
  if self.bar then self.bar:log(entry, stats) end
  self.reporters = self.reporters or reporters.open(self.args)
  for _, sink in ipairs(self.reporters) do sink:log(entry) end
  call_back(self, "on_log", entry)
end

local function log_update(self, stats)
  local h, args = self.history, self.args
  h.loss, h.count, h.grad_norm = (h.loss or 0) + stats.loss, (h.count or 0) + 1, stats.grad_norm
  local first, last = args.logging_first_step and stats.step == 1, stats.step == stats.total
  local due = args.logging_strategy == "steps" and (stats.step % args.logging_steps == 0 or first)
    or args.logging_strategy == "epoch" and (stats.epoch // 1 > (h.epoch or 0) or last)
  h.epoch = stats.epoch // 1
  if not due then return end
  log(self, { step = stats.step, epoch = stats.epoch, loss = h.loss / h.count, grad_norm = h.grad_norm,
    learning_rate = stats.learning_rate }, stats)
  h.loss, h.count = 0, 0
end

--- The mean loss over the counted labels of eval_dataset: { eval_loss, eval_runtime, epoch, step }.
---
---     print(trainer:evaluate().eval_loss)
function Trainer:evaluate()
  errors.method("trainer", "evaluate", self, "unsloth.SFTTrainer")
  if not self.eval_rows then errors.invalid "evaluate: the trainer has no eval_dataset" end
  local start = core.clock()
  local handle = self:core()
  local stats
  do
    local task <close> = progress.task "evaluating"
    stats = handle:evaluate()
    task:update(stats.rows, stats.rows)
  end
  local entry = { step = self.state.global_step, epoch = self.state.epoch, eval_loss = stats.loss, eval_runtime = core.clock() - start }
  log(self, entry, stats)
  call_back(self, "on_evaluate", entry)
  return entry
end

local function crossed_epoch(self, stats)
  return stats.epoch // 1 > self.state.epoch // 1
end

local function is_due(strategy, steps, stats, new_epoch)
  return strategy == "steps" and stats.step % steps == 0 or strategy == "epoch" and new_epoch
end

function M.checkpoint_steps(dir)
  local steps = {}
  for _, name in ipairs(core.path_kind(dir) == "folder" and core.list_dir(dir) or {}) do
    local step = math.tointeger(tonumber(name:match "^checkpoint%-(%d+)$"))
    if step then steps[#steps + 1] = step end
  end
  table.sort(steps)
  return steps
end
local checkpoint_steps = M.checkpoint_steps

local function checkpoint_dir(dir, step)
  return ("%s/checkpoint-%d"):format(dir, step)
end

-- JSON has no word for what is not finite: null, which is NaN again when it is read.
local function series_to_json(series)
  local out = {}
  for name, values in pairs(series) do
    local list = json.array {}
    for i, v in ipairs(values) do list[i] = v - v == 0 and v or json.null end
    out[name] = list
  end
  return out
end

--- Writes output_dir/checkpoint-N and removes the oldest ones beyond save_total_limit.
---
---     print(trainer:save_checkpoint())
function Trainer:save_checkpoint()
  errors.method("trainer", "save_checkpoint", self, "unsloth.SFTTrainer")
  local args, step = self.args, self.state.global_step
  local dir = checkpoint_dir(args.output_dir, step)
  core.make_dir(args.output_dir)
  self:core():save(dir, json.encode { log_history = json.array(self.log_history), epoch = self.state.epoch, history = self.history,
    series = series_to_json(self.series) })
  self.saved = dir
  if args.save_total_limit then
    local steps = checkpoint_steps(args.output_dir)
    for i = 1, #steps - args.save_total_limit do
      if steps[i] ~= step then core.remove_path(checkpoint_dir(args.output_dir, steps[i])) end
    end
  end
  call_back(self, "on_save", dir)
  return dir
end

local one_update

--- The rate from the next update on; nil is the schedule again.
---
---     trainer:set_learning_rate(1e-4)
function Trainer:set_learning_rate(rate)
  errors.method("trainer", "set_learning_rate", self, "unsloth.SFTTrainer")
  if rate ~= nil then errors.want("set_learning_rate", "rate", rate, "number", "a number, as in trainer:set_learning_rate(1e-4), or nil for the schedule") end
  self:core():set_learning_rate(rate)
end

--- Other training rows from the next update on, from their beginning; weights, optimiser and schedule go on.
---
---     trainer:set_train_dataset(unsloth.load_dataset("json", { data_files = "more.jsonl" }))
---@param dataset unsloth.Dataset
---@param formatting_func function|nil as in SFTTrainer
function Trainer:set_train_dataset(dataset, formatting_func)
  errors.method("trainer", "set_train_dataset", self, "unsloth.SFTTrainer")
  require_class("train_dataset", dataset, "unsloth.Dataset")
  local rows = tokenized(self, dataset, formatting_func or self.formatting_func)
  if self.handle then self.handle:set_rows(rows) end
  self.rows = rows
end

--- Trains another adapter of the model from the next update on: the schedule and the rows go on, the optimiser begins anew.
---
---     trainer:set_adapter "second"
---@param name string an adapter that get_peft_model or load_adapter has added
function Trainer:set_adapter(name)
  errors.method("trainer", "set_adapter", self, "unsloth.SFTTrainer")
  local done, before = self.state.global_step, self.model:active_adapter()
  if self.handle then self.handle:close() end
  self.handle = nil
  if self.model.trainer == self then self.model.trainer = nil end
  local ok, err = pcall(self.model.set_adapter, self.model, name)
  if not ok then self.model:activate(before) end
  self:core():skip(done)
  self.state.global_step = self.handle:position()
  if not ok then error(err, 0) end
end

--- One update by hand. Returns its statistics; nil when all are done.
---
---     local stats = trainer:step()
---     print(stats.step, stats.loss)
---@return table|nil stats step, total, loss, learning_rate, grad_norm, tokens, seconds, ...
function Trainer:step()
  errors.method("trainer", "step", self, "unsloth.SFTTrainer")
  self.stopping = false
  return one_update(self)
end

--- Ends the loop after this update.
---
---     trainer:stop()
function Trainer:stop()
  errors.method("trainer", "stop", self, "unsloth.SFTTrainer")
  self.stopping = true
end

function one_update(self)
  if self.stopping then return nil end
  local args, stats = self.args, self:core():step()
  if not stats then return nil end
  local new_epoch = crossed_epoch(self, stats)
  self.state.global_step, self.state.epoch, self.state.learning_rate = stats.step, stats.epoch, stats.learning_rate
  if stats.skipped then errors.note("update %d had a gradient that is not finite and was skipped", stats.step) end
  if self.bar then self.bar:add(stats) end
  add_to_series(self, stats)
  log_update(self, stats)
  local last = stats.step == stats.total
  if is_due(args.eval_strategy, args.eval_steps or args.logging_steps, stats, new_epoch or last) and stats.step > args.eval_delay then
    self:evaluate()
  end
  if is_due(args.save_strategy, args.save_steps, stats, new_epoch or last) or (args.save_strategy == "steps" and last) then
    self:save_checkpoint()
  end
  if last and self.report then self.report:write() end
  call_back(self, "on_step", stats)
  return stats
end

-- How a new run goes on, in words of Lua or of the command line.
local IN_LUA = { from = "train { resume_from_checkpoint = %q } goes on from there", off = 'save_strategy is "no"', due = "save_steps, save_strategy",
  out = "leave resume_from_checkpoint out to begin anew", more = "max_steps" }
local IN_OPTIONS = { from = "--resume goes on from there", off = "--save-steps was not given", due = "--save-steps",
  out = "leave --resume out to begin anew", more = "--max-steps" }
local words = IN_LUA

--- Whether the person who trains does so by the options --resume, --save-steps and --max-steps of a script: sentences then name these.
function M.speak_of_options(are)
  words = are and IN_OPTIONS or IN_LUA
end

-- Ctrl-C: where it was, and what a new run can begin with.
local function explain_interrupt(self, err)
  if type(err) ~= "table" or err.code ~= "USL_ERR_CANCELLED" then return end
  local rest = self.saved and ("%s is whole: "):format(self.saved) .. words.from:format(self.saved)
    or self.args.save_strategy == "no" and words.off .. ", so there is no checkpoint to go on from"
    or ("no checkpoint was due yet (%s), so there is none to go on from"):format(words.due)
  self.state.global_step = self.handle:position() -- it may have come after an update, before that was noted
  err.message = ("interrupted at step %d of %d; %s"):format(self.state.global_step, self.state.max_steps, rest)
end

local Loop = { __close = function(loop, err) explain_interrupt(loop.trainer, err) end }

--- The loop by hand: `for step, stats in trainer:steps() do`. Leaving it early is fine; train() or another loop goes on from there.
---
---     for step, stats in trainer:steps() do print(step, stats.loss) end
function Trainer:steps()
  errors.method("trainer", "steps", self, "unsloth.SFTTrainer")
  self.stopping = false
  self:core()
  return function()
    local stats = one_update(self)
    if stats then return stats.step, stats end
  end, nil, nil, setmetatable({ trainer = self }, Loop)
end

-- ---- Resuming -------------------------------------------------------------------------------------------------------

local function resume_from(self, dir)
  local extra = self:core():resume(dir)
  self.saved = dir
  local kept = extra and json.decode(extra, dir) or {}
  self.state.global_step, self.state.max_steps = self.handle:position()
  self.state.epoch, self.history = kept.epoch or 0, kept.history or {}
  for i in ipairs(self.log_history) do self.log_history[i] = nil end
  for i, entry in ipairs(kept.log_history or {}) do self.log_history[i] = entry end
  self.series = new_series()
  for name, values in pairs(kept.series or {}) do
    for i, v in ipairs(self.series[name] and values or {}) do self.series[name][i] = v == json.null and 0 / 0 or v end
  end
end

-- What a damaged folder raises. Other settings, want of memory and Ctrl-C are no damage: an older checkpoint would not help.
local DAMAGED = { USL_ERR_FORMAT = true, USL_ERR_NOT_FOUND = true, USL_ERR_IO = true, USL_ERR_UNSUPPORTED = true }

-- The newest whole checkpoint: damaged ones are passed over, and said.
local function resume_newest(self)
  local dir = self.args.output_dir
  local steps = checkpoint_steps(dir)
  for i = #steps, 1, -1 do
    local ok, err = pcall(resume_from, self, checkpoint_dir(dir, steps[i]))
    if ok then return end
    if type(err) ~= "table" or not DAMAGED[err.code] then error(err, 0) end
    errors.note("%s is passed over: %s", checkpoint_dir(dir, steps[i]), err.message)
  end
  if #steps > 0 then
    errors.raise("USL_ERR_FORMAT", "%s: none of its %d checkpoints is whole: %s", dir, #steps, words.out)
  end
  errors.raise("USL_ERR_NOT_FOUND", "%s holds no checkpoint to resume from (%s makes them): %s", dir, words.due, words.out)
end

local function resume(self, from)
  if not from then return end
  if from == true then
    resume_newest(self)
  elseif type(from) == "string" then
    resume_from(self, from)
  else
    errors.invalid "resume_from_checkpoint is true for the newest one, or the path of a checkpoint"
  end
  local done, all = self.state.global_step, self.state.max_steps
  if done >= all then
    errors.note("%s has done %d updates, and %d are wanted: nothing is left to train; a larger %s goes on", self.saved, done, all, words.more)
  else
    progress.say("going on from %s: step %d of %d is done", self.saved, done, all)
  end
end

-- ---- train ----------------------------------------------------------------------------------------------------------

local function introduce(self)
  local s, info, plan = self.rows:stats(), self.model:info(), self:core():plan()
  local args = self.args
  progress.say("%d rows, %d tokens, %d counted, longest %d; %d cut to max_seq_length %d, %d left out since no label counts",
    s.rows, s.tokens, s.counted, s.longest, s.truncated, self.max_seq_length, s.dropped)
  progress.say("%d updates of %d x %d rows; %d of %d parameters trained; memory planned %s of %s; %d of %d layers computed again",
    self.state.max_steps, args.per_device_train_batch_size, args.gradient_accumulation_steps, info.trainable, info.parameters,
    progress.bytes(plan.total), progress.bytes(plan.limit), plan.recomputed_layers, plan.layers)
end

-- The mean loss of the whole run's updates, also of those before it was resumed; one that was not finite was skipped.
local function mean_loss(self)
  local sum, count = 0, 0
  for _, loss in ipairs(self.series.loss) do
    if loss - loss == 0 then sum, count = sum + loss, count + 1 end
  end
  return count > 0 and sum / count or 0
end

local function summary(self, count, start, rows, tokens)
  local seconds = core.clock() - start
  local per = function(n) return seconds > 0 and n / seconds or 0 end
  local metrics = { train_runtime = seconds, train_loss = mean_loss(self), train_samples_per_second = per(rows),
    train_steps_per_second = per(count), train_tokens_per_second = per(tokens), epoch = self.state.epoch, peak_memory = core.memory(self.model) }
  return { training_loss = metrics.train_loss, global_step = self.state.global_step, metrics = metrics, log_history = self.log_history }
end

--- Runs all updates. Returns { training_loss, global_step, metrics, log_history }; training_loss is the mean over all updates of the
--- run, also over those before it was resumed, metrics tell of this call's.
---
---     local stats = trainer:train { resume_from_checkpoint = true }
---@param opts table|nil resume_from_checkpoint: true for the newest one in output_dir, or a path
function Trainer:train(opts)
  errors.method("trainer", "train", self, "unsloth.SFTTrainer")
  local o = options.check("train", opts, { resume_from_checkpoint = { "string|boolean" } })
  self.stopping = false
  self:core()
  resume(self, o.resume_from_checkpoint or self.args.resume_from_checkpoint)
  introduce(self)
  local bar <close> = setmetatable({ bar = progress.new(self.state.max_steps, self.args.disable_tqdm, self.model) }, {
    __close = function(held, err)
      self.bar, self.failed = nil, err ~= nil
      held.bar:close()
      if err ~= nil and self.report then
        self.report.failure = tostring(err)
        self.report:write()
      end
    end })
  self.bar = bar.bar
  call_back(self, "on_train_begin")
  if self.args.eval_on_start then self:evaluate() end
  local start, count, rows, tokens = core.clock(), 0, 0, 0
  for _, stats in self:steps() do count, rows, tokens = count + 1, rows + stats.rows, tokens + stats.tokens end
  local result = summary(self, count, start, rows, tokens)
  if self.report then
    self.report.metrics, self.report.failure = result.metrics, nil
    self.report:write()
  end
  call_back(self, "on_train_end", result)
  return result
end

--- Puts a prompt with what the model answered before and after training into the report.
---
---     trainer:add_sample("Name three colors.", before, after)
---@param prompt string
---@param before string|nil
---@param after string|nil
function Trainer:add_sample(prompt, before, after)
  if not self.report then return end
  local samples = self.report.samples
  samples[#samples + 1] = { prompt = prompt, before = before, after = after }
  if self.report.written then self.report:write() end
end

--- Writes the model's adapter, or its weights, and the tokenizer.
---
---     trainer:save_model "outputs/model"
function Trainer:save_model(dir)
  errors.method("trainer", "save_model", self, "unsloth.SFTTrainer")
  dir = dir or self.args.output_dir
  self.model:save_pretrained(dir)
  self.tokenizer:save_pretrained(dir)
end

--- True when no further update will come: all are done, stop() was called, or one has raised.
---
---     print(trainer:is_over())
function Trainer:is_over()
  return self.stopping or self.failed or self.state.global_step >= self.state.max_steps
end

--- Frees the optimiser and the memory of the passes now; the model stays.
---
---     trainer:close()
function Trainer:close()
  if self.handle then self.handle:close() end
  if self.model.trainer == self then self.model.trainer = nil end
  self.handle = nil
end
Trainer.__close = Trainer.close

function Trainer:__tostring()
  return require("unsloth.show").trainer(self)
end

return M
