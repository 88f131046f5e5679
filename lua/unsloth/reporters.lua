--- Where the numbers of a run go beside the screen: report_to = "jsonl" and "tensorboard".
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local tensorboard = require "unsloth.tensorboard"

local M = {}

-- A file that grows while the run goes on, readable at any time.
local function open(path)
  local file, why = io.open(path, "ab")
  if not file then errors.raise("USL_ERR_IO", "%s: cannot be written (%s)", path, why:match ": ([^:]*)$" or why) end
  file:setvbuf "no"
  return file
end

local function write(sink, text)
  local ok, why = sink.file:write(text)
  if not ok then errors.raise("USL_ERR_IO", "%s: cannot be written (%s)", sink.path, why) end
end

local KEYS = { "step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "eval_runtime", "train_runtime", "train_loss",
  "train_tokens_per_second", "train_steps_per_second", "train_samples_per_second", "peak_memory" }

local KINDS = {}

--- Lines of JSON in output_dir/log.jsonl.
function KINDS.jsonl(args)
  local sink = { path = args.output_dir .. "/log.jsonl" }
  sink.file = open(sink.path)
  function sink:log(entry)
    local order, fields = {}, {}
    for _, key in ipairs(KEYS) do
      local value = entry[key]
      if value ~= nil then
        order[#order + 1] = key
        fields[key] = type(value) == "number" and value - value ~= 0 and core.json.null or value -- JSON knows no NaN
      end
    end
    write(self, core.json.encode(core.json.object(fields, order)) .. "\n")
  end
  return sink
end

-- transformers' tags: train/loss, eval/loss.
local function tag_of(key)
  local eval = key:match "^eval_(.*)$"
  return eval and "eval/" .. eval or "train/" .. key
end

--- An event file in logging_dir, output_dir/runs unless told otherwise.
function KINDS.tensorboard(args)
  local dir = args.logging_dir or args.output_dir .. "/runs"
  core.make_dir(dir)
  local base, n = ("%s/events.out.tfevents.%010d.unsloth"):format(dir, os.time()), 0
  while core.path_kind(("%s.%d"):format(base, n)) do n = n + 1 end
  local sink = { path = ("%s.%d"):format(base, n) }
  sink.file = open(sink.path)
  write(sink, tensorboard.version(os.time()))
  function sink:log(entry)
    local values = {}
    for _, key in ipairs(KEYS) do
      if key ~= "step" and type(entry[key]) == "number" then values[#values + 1] = { tag_of(key), entry[key] } end
    end
    write(self, tensorboard.scalars(os.time(), entry.step, values))
  end
  return sink
end

--- The names that report_to takes.
M.names = { jsonl = true, tensorboard = true, none = true }

--- What report_to names, opened.
function M.open(args)
  local out, report = {}, args.report_to
  for _, name in ipairs(type(report) == "table" and report or { report }) do
    if name ~= "none" then
      core.make_dir(args.output_dir)
      out[#out + 1] = KINDS[name](args)
    end
  end
  return out
end

return M
