--- The report of a training run: report.html and loss.svg in output_dir, written at its end and again after each export.
---
---     trainer:train()
---     trainer:add_sample("Name three colors.", before, after)
---     model:save_pretrained_gguf("outputs/gguf", tokenizer, { quantization_method = "q4_k_m" })
local core = require "unsloth.core"
local doc = require "unsloth.doc"
local errors = require "unsloth.errors"
local files = require "unsloth.files"
local page = require "unsloth.report_page"
local svg = require "unsloth.svg"

local M = {}

local Report = {}
Report.__index = Report

local DEFAULT_DIR = require("unsloth.arguments").defaults.output_dir

--- The report of a trainer. A run that was given no output_dir, or `report = false`, has none: nil.
function M.new(trainer)
  local args = trainer.args
  if not args.report or args.output_dir == DEFAULT_DIR and core.path_kind(DEFAULT_DIR) ~= "folder" then return nil end
  return setmetatable({ trainer = trainer, samples = {}, exports = {}, started = os.date "%Y-%m-%d %H:%M" }, Report)
end

-- ---- What an export is found to be ----------------------------------------------------------------------------------

-- The file that holds the tensors: an adapter's folder is described by its safetensors.
local function weights_of(path)
  local adapter = path .. "/adapter_model.safetensors"
  return core.path_kind(adapter) == "file" and adapter or path
end

--- Looks an export through as `unsloth-lua info` does: the whole structure. Returns whether it is whole, and a sentence.
function M.check(path)
  local ok, found = pcall(core.inspect, weights_of(path))
  if not ok then return false, tostring(found) end
  local bytes = 0
  for _, t in ipairs(found.tensors) do bytes = bytes + t.bytes end
  return true, ("%s, %d tensors, %s; its structure was read back and is whole"):format(found.format, #found.tensors,
    require("unsloth.progress").bytes(bytes))
end

--- Notes an export, checks it, and writes the page again.
function Report:exported(kind, path)
  local whole, text = M.check(path)
  self.exports[#self.exports + 1] = { kind = kind, path = path, whole = whole, text = text }
  if self.written then self:write() end
end

-- ---- What is put together -------------------------------------------------------------------------------------------

local MOST_ROWS = 4000

-- How long rows are: a dozen classes of an even sample.
local function lengths(rows)
  local n, longest = #rows, rows:stats().longest
  local step, width = math.max(1, n // MOST_ROWS), math.max(1, math.ceil(longest / 12))
  local classes = {}
  for i = 1, math.ceil(longest / width) do classes[i] = 0 end
  for i = 1, n, step do
    local class = math.max(1, math.ceil(#rows:get(i) / width))
    classes[class] = classes[class] + 1
  end
  return { classes = classes, width = width }
end

local function first_row(trainer)
  if #trainer.rows == 0 then return nil end
  local ids = trainer.rows:get(1)
  return trainer.tokenizer:decode(table.move(ids, 1, math.min(#ids, 400), 1, {}))
end

--- All that the page shows.
function Report:gather()
  local t = self.trainer
  return { title = t.args.run_name or "Training run", started = self.started, model = t.model:info(), name = t.model.name_or_path,
    adapter = t.model:active_adapter(), state = t.state, series = t.series, log = t.log_history, plan = t.plan, args = t.args,
    rows = t.rows:stats(), eval_rows = t.eval_rows and t.eval_rows:stats(), lengths = lengths(t.rows), first_row = first_row(t),
    samples = self.samples, exports = self.exports, metrics = self.metrics, failure = self.failure, version = core.version,
    threads = core.threads(), adapter_options = t.model.adapter_options, adapter_defaults = require("unsloth.model").FastLanguageModel.peft_defaults }
end

-- Losses of single updates, and of evaluations, over steps.
local function loss_series(series, log)
  local out = { { name = "loss", x = series.step, y = series.loss } }
  local eval = { name = "eval_loss", x = {}, y = {} }
  for _, entry in ipairs(log) do
    if entry.eval_loss then eval.x[#eval.x + 1], eval.y[#eval.y + 1] = entry.step, entry.eval_loss end
  end
  if #eval.y > 0 then out[2] = eval end
  return out
end
M.loss_series = loss_series

--- Writes report.html and loss.svg. A page that cannot be written is said and ends nothing: the run's results are elsewhere.
function Report:write()
  local t = self.trainer
  if #t.series.step == 0 then return end
  local dir = t.args.output_dir
  local ok, err = pcall(function()
    core.make_dir(dir)
    files.write(dir .. "/report.html", page.html(self:gather()))
    files.write(dir .. "/loss.svg", svg.chart(loss_series(t.series, t.log_history), { title = "loss", x = "step", alone = true }))
  end)
  self.written = ok
  if ok then return end
  if type(err) == "table" and err.code ~= "USL_ERR_CANCELLED" then
    errors.note("the report was not written: %s", tostring(err))
  else
    error(err, 0)
  end
end

-- ---- What saves ------------------------------------------------------------------------------------------------------

local KINDS = { save_pretrained = "adapter or weights", save_pretrained_merged = "merged", save_pretrained_gguf = "GGUF" }

-- Puts a function in front of each of the model's that save: the report hears of it.
local function listen()
  for name, kind in pairs(KINDS) do
    local plain = core.Model[name]
    local function saving(self, dir, ...)
      errors.method("model", name, self, "unsloth.Model")
      local depth = self.saving_depth or 0
      self.saving_depth = depth + 1
      local results = table.pack(pcall(plain, self, dir, ...))
      self.saving_depth = depth
      if not results[1] then error(results[2], 0) end
      local report = self.trainer_report
      if report and depth == 0 then -- one that saves by way of another is one export
        local paths = kind == "GGUF" and results[2] or { dir }
        for _, path in ipairs(paths) do report:exported(kind, path) end
      end
      return table.unpack(results, 2, results.n)
    end
    doc.behind[saving] = plain
    core.Model[name] = saving
  end
end

M.listen = listen

return M
