--- What a run shows of its progress: one line that is rewritten on a terminal, plain lines in a pipe, JSON lines for programs, or
--- nothing. Training speaks on standard output; loading, tokenising, evaluating and exporting speak on standard error.
---
---     unsloth-lua recipes/llama3_alpaca.lua --json     lines { "event": "train", "step": 1, "loss": ... }
---     unsloth-lua recipes/llama3_alpaca.lua --quiet
local core = require "unsloth.core"

local M = {}

--- "json", "quiet", or nil: by where the output goes.
M.mode = nil
--- What takes less than so many seconds is not worth a line in a pipe; a terminal waits a tenth of it.
M.patience = 2

--- 5025 -> "1:23:45", 83 -> "1:23"
function M.duration(seconds)
  local s = math.max(0, math.floor(seconds + 0.5))
  local h, m = s // 3600, s // 60 % 60
  if h > 0 then return ("%d:%02d:%02d"):format(h, m, s % 60) end
  return ("%d:%02d"):format(m, s % 60)
end

--- Bytes in the unit that reads best.
function M.bytes(n)
  if n >= 1 << 30 then return ("%.2f GiB"):format(n / (1 << 30)) end
  if n >= 1 << 20 then return ("%.0f MiB"):format(n / (1 << 20)) end
  return ("%.0f KiB"):format(n / (1 << 10))
end

-- ---- JSON lines -----------------------------------------------------------------------------------------------------

-- JSON knows no NaN.
local function plain(value)
  if type(value) == "number" and value - value ~= 0 then return core.json.null end
  return value
end

--- A line { "event": name, ... } in the mode "json"; nothing in others. Keys come in this order.
---@param name string
---@param keys string[]
---@param values table
function M.event(name, keys, values)
  if M.mode ~= "json" then return end
  local order, fields = { "event" }, { event = name }
  for i, key in ipairs(keys) do
    order[i + 1] = key
    fields[key] = plain(values[key])
  end
  io.stdout:write(core.json.encode(core.json.object(fields, order)), "\n")
  io.stdout:flush()
end

local print_before

-- What a script prints is an event too, or its lines would stand among the JSON.
local function print_event(...)
  local texts = table.pack(...)
  for i = 1, texts.n do texts[i] = tostring(texts[i]) end
  M.event("text", { "text" }, { text = table.concat(texts, "\t") })
end

--- Sets the mode: "json", "quiet" or nil. "json" also turns what scripts print into lines { "event": "text" }.
---@param mode string|nil
function M.set_mode(mode)
  M.mode = mode
  if not _G then return end -- a host's environment
  -- luacheck: push ignore
  if mode == "json" and _G.print ~= print_event then
    print_before, _G.print = _G.print, print_event
  elseif mode ~= "json" and _G.print == print_event then
    _G.print = print_before
  end
  -- luacheck: pop
end

--- Says something about the run itself, as introductions do; not in the mode "quiet".
function M.say(format, ...)
  if M.mode ~= "quiet" then print(select("#", ...) > 0 and format:format(...) or format) end
end

-- ---- Tasks: what takes long and is no training ----------------------------------------------------------------------

local Task = {}
Task.__index = Task

-- The innermost is shown.
local running = {}

local function line_of(task)
  local seconds = core.clock() - task.start
  local parts = { task.name }
  if task.total > 0 then
    parts[#parts + 1] = task.bytes and ("%s of %s"):format(M.bytes(task.done), M.bytes(task.total)) or ("%d/%d"):format(task.done, task.total)
    if task.done > 0 then parts[#parts + 1] = M.duration(seconds / task.done * (task.total - task.done)) .. " left" end
  end
  parts[#parts + 1] = M.bytes(core.peak_memory())
  return table.concat(parts, "  ")
end

local function draw(task, now)
  local text = line_of(task)
  io.stderr:write("\r", text, (" "):rep(task.width - #text))
  task.width, task.drawn = #text, now
end

--- Begins a task; close it when it ends, or put it into a variable of <close>.
---
---     local task <close> = progress.task("tokenising", #rows)
---@param name string
---@param total integer|nil nil: not known
function M.task(name, total)
  local task = setmetatable({ name = name, total = total or 0, done = 0, start = core.clock(), width = 0, drawn = 0, told = 0 }, Task)
  task.terminal = core.is_terminal(2) and core.is_terminal(1)
  running[#running + 1] = task
  return task
end

local KEYS = { "what", "done", "total", "seconds", "memory" }

function Task:tell(done, finished)
  M.event("progress", finished and { "what", "done", "total", "seconds", "memory", "finished" } or KEYS, { what = self.name, done = done,
    total = self.total, seconds = core.clock() - self.start, memory = core.peak_memory(), finished = finished })
end

--- So much is done.
---@param done integer
---@param total integer|nil when it was not known before
function Task:update(done, total)
  self.done, self.total = done, total or self.total
  if M.mode == "quiet" then return end
  local now = core.clock()
  if M.mode == "json" then
    if now - self.told >= 0.2 then
      self.told = now
      self:tell(done)
    end
  elseif self.terminal then
    if now - self.start >= M.patience / 10 and now - self.drawn >= 0.1 then draw(self, now) end
  elseif now - math.max(self.start, self.told) >= 10 * M.patience then
    self.told = now
    io.stderr:write(line_of(self), "\n")
  end
end

--- It has ended: the line is taken away on a terminal; a pipe gets one that says how long it took, when it was long.
function Task:close(err)
  for i = #running, 1, -1 do
    if running[i] == self then table.remove(running, i) end
  end
  if self.width > 0 then
    io.stderr:write("\r", (" "):rep(self.width), "\r")
    self.width = 0
  end
  if err ~= nil or M.mode == "quiet" then return end
  local seconds = core.clock() - self.start
  if M.mode == "json" then
    self:tell(self.total > 0 and self.total or self.done, true)
  elseif not self.terminal and seconds >= M.patience then
    io.stderr:write(("%s: %s, %s\n"):format(self.name, M.duration(seconds), M.bytes(core.peak_memory())))
  end
end
Task.__close = Task.close

--- A task for a function that wants to be told, tell(what, done, total), and then close().
function M.bar()
  local task = M.task "working"
  return {
    tell = function(what, done, total)
      task.name = what
      task:update(done, total)
    end,
    close = function() task:close() end,
  }
end

--- Rows one by one as a task: for i in progress.count("tokenising", n) do ... end
function M.count(name, n)
  local task, i = M.task(name, n), 0
  return function()
    if i % 16 == 0 then task:update(i) end
    i = i + 1
    if i <= n then return i end
  end, nil, nil, task
end

-- What core says it is doing belongs to the innermost task.
local function hear(what, done, total)
  local task = running[#running]
  if not task then return end
  if not task.title and what ~= "" then task.title, task.name = what, task.object and what .. " " .. task.object or what end
  task:update(done, total)
end

-- Functions of core that say how far they are: the name of their task, which argument names the object, whether they count bytes.
local LONG = { hub_get = { "downloading", 1, true }, hub_push = { "uploading", 1, true },
  model_open = { "loading", 1 }, model_random = { "making weights" }, export_merged = { "exporting", 3 }, export_gguf = { "exporting", 3 },
  imatrix = { "calibrating" } }

local function watch(name, kind, object, bytes)
  local inner = core[name]
  if not inner then return end
  core[name] = function(...)
    local how = select("#", ...) > 0 and select(select("#", ...), ...)
    if type(how) == "table" and how.progress then return inner(...) end -- the caller tells of it
    local path = object and select(object, ...)
    if type(path) == "table" then path = path[1] end
    local task <close> = M.task(type(path) == "string" and kind .. " " .. path or kind)
    task.bytes = bytes
    task.object = type(path) == "string" and path or nil
    return inner(...)
  end
end
for name, task in pairs(LONG) do watch(name, table.unpack(task)) end
core.set_progress(hear)

-- ---- Training -------------------------------------------------------------------------------------------------------

local Progress = {}
Progress.__index = Progress

function M.new(total, quiet, model)
  local silent = M.mode == "quiet"
  local terminal = core.is_terminal(1) and not quiet and not M.mode
  return setmetatable({ total = total, terminal = terminal, silent = silent, start = core.clock(), model = model, tokens = 0, steps = 0, width = 0 },
    Progress)
end

function Progress:add(stats)
  self.tokens = self.tokens + stats.tokens
  self.steps = self.steps + 1
  self.left = (core.clock() - self.start) / self.steps * (self.total - stats.step)
  if self.terminal then self:draw(stats) end
end

local function rate(self)
  local seconds = core.clock() - self.start
  return seconds > 0 and self.tokens / seconds or 0
end

local function numbers(self, stats)
  return ("loss %.4f  lr %.2e  %.0f tok/s  %s  %s left"):format(stats.loss, stats.learning_rate, rate(self),
    M.bytes(core.memory(self.model)), M.duration(self.left))
end

function Progress:draw(stats)
  local filled = self.total > 0 and 20 * stats.step // self.total or 0
  local line = ("%d/%d [%s%s] %s"):format(stats.step, self.total, ("="):rep(filled), (" "):rep(20 - filled), numbers(self, stats))
  io.stdout:write("\r", line, (" "):rep(self.width - #line))
  self.width = #line
  io.stdout:flush()
end

local TRAIN = { "step", "total", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second", "memory", "seconds_left" }
local EVAL = { "step", "total", "epoch", "eval_loss", "eval_runtime" }

local function log_event(self, entry)
  local values = setmetatable({ total = self.total, tokens_per_second = rate(self), memory = core.memory(self.model), seconds_left = self.left },
    { __index = entry })
  if entry.eval_loss then M.event("eval", EVAL, values) else M.event("train", TRAIN, values) end
end

--- A finished log entry: a line of its own in a pipe.
function Progress:log(entry, stats)
  if self.terminal or self.silent then return end
  if M.mode == "json" then return log_event(self, entry) end
  if entry.eval_loss then
    print(("step %d/%d  eval_loss %.4f"):format(entry.step, self.total, entry.eval_loss))
  else
    print(("step %d/%d  grad_norm %.4f  %s"):format(entry.step, self.total, entry.grad_norm,
      numbers(self, setmetatable({ loss = entry.loss }, { __index = stats }))))
  end
  io.stdout:flush()
end

--- Says something without spoiling the line.
function Progress:say(format, ...)
  if self.terminal and self.width > 0 then
    io.stdout:write("\r", (" "):rep(self.width), "\r")
    self.width = 0
  end
  M.say(format, ...)
end

function Progress:close()
  if self.terminal and self.width > 0 then io.stdout:write "\n" end
  self.width = 0
end

return M
