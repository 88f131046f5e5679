--- What a run shows: one line that is rewritten on a terminal, plain lines in a pipe.
local core = require "unsloth.core"

local M = {}

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

local Progress = {}
Progress.__index = Progress

function M.new(total, quiet, model)
  local terminal = core.is_terminal(1) and not quiet
  return setmetatable({ total = total, terminal = terminal, start = core.clock(), model = model, tokens = 0, steps = 0, width = 0 }, Progress)
end

function Progress:add(stats)
  self.tokens = self.tokens + stats.tokens
  self.steps = self.steps + 1
  self.left = (core.clock() - self.start) / self.steps * (self.total - stats.step)
  if self.terminal then self:draw(stats) end
end

local function numbers(self, stats)
  local seconds = core.clock() - self.start
  return ("loss %.4f  lr %.2e  %.0f tok/s  %s  %s left"):format(stats.loss, stats.learning_rate,
    seconds > 0 and self.tokens / seconds or 0, M.bytes(core.memory(self.model)), M.duration(self.left))
end

function Progress:draw(stats)
  local filled = self.total > 0 and 20 * stats.step // self.total or 0
  local line = ("%d/%d [%s%s] %s"):format(stats.step, self.total, ("="):rep(filled), (" "):rep(20 - filled), numbers(self, stats))
  io.stdout:write("\r", line, (" "):rep(self.width - #line))
  self.width = #line
  io.stdout:flush()
end

--- A finished log entry: a line of its own in a pipe.
function Progress:log(entry, stats)
  if self.terminal then return end
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
  print(format:format(...))
end

function Progress:close()
  if self.terminal and self.width > 0 then io.stdout:write "\n" end
  self.width = 0
end

--- A line for long operations of the library, on a terminal alone: tell(what, done, total) draws it, close() takes it away.
function M.bar()
  local bar, drawn, width = {}, 0, 0
  if not core.is_terminal(2) then return { close = function() end } end
  function bar.tell(what, done, total)
    local now = core.clock()
    if now - drawn < 0.1 and done < total then return end
    drawn = now
    local filled = total > 0 and 30 * done // total or 0
    local line = ("%s [%s%s] %d%%"):format(what, ("="):rep(filled), (" "):rep(30 - filled), total > 0 and 100 * done // total or 0)
    io.stderr:write("\r", line, (" "):rep(width - #line))
    io.stderr:flush()
    width = #line
  end
  function bar.close()
    if width > 0 then io.stderr:write("\r", (" "):rep(width), "\r") end
    width = 0
  end
  return bar
end

return M
