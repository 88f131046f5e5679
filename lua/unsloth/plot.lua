--- Plots in the terminal, and as SVG.
---
---     print(unsloth.plot(trainer.log_history))
---     print(unsloth.plot(model:attentions("Hello", 0):mean(1)))
---     unsloth.plot({ 3, 1, 2 }, { title = "three numbers" }):svg "three.svg"
local errors = require "unsloth.errors"
local files = require "unsloth.files"
local options = require "unsloth.options"
local svg = require "unsloth.svg"

local M = {}

local SPEC = {
  title = { "string" },
  x = { "table|userdata" },
  width = { "integer", default = 60, check = options.between(4, 500) },
  height = { "integer", default = 12, check = options.between(2, 200) },
  style = { "string", default = "braille", only = { braille = true, blocks = true } },
}
M.SPEC = SPEC

local Plot = { __name = "unsloth.Plot" }
Plot.__index = Plot

-- ---- What may be drawn ----------------------------------------------------------------------------------------------

local function is_tensor(value)
  return type(value) == "userdata" and pcall(function() return value.ndim + 0 end)
end

local function numbers(value, what)
  local list = is_tensor(value) and value:totable() or value
  if type(list) ~= "table" then errors.invalid("plot: %s is a %s; an array of numbers or a vector is wanted", what, type(list)) end
  for i, x in ipairs(list) do
    if type(x) ~= "number" then errors.invalid("plot: value %d of %s is no number but a %s", i, what, type(x)) end
  end
  return list
end

local function count_up(n)
  local x = {}
  for i = 1, n do x[i] = i end
  return x
end

local function series_of(name, y, x)
  y = numbers(y, name)
  x = x and numbers(x, "x") or count_up(#y)
  if #x ~= #y then errors.invalid("plot: %d values and %d of x do not go together", #y, #x) end
  return { name = name, x = x, y = y }
end

-- A training history: its losses over its steps.
local function history(list)
  local out = {}
  for _, name in ipairs { "loss", "eval_loss" } do
    local s = { name = name, x = {}, y = {} }
    for _, entry in ipairs(list) do
      if entry[name] then s.x[#s.x + 1], s.y[#s.y + 1] = entry.step, entry[name] end
    end
    if #s.y > 0 then out[#out + 1] = s end
  end
  return out
end

-- Named series stand in the order of their names.
local function named(list, x)
  local names, out = {}, {}
  for name in pairs(list) do names[#names + 1] = name end
  table.sort(names, function(a, b) return tostring(a) < tostring(b) end)
  for i, name in ipairs(names) do out[i] = series_of(tostring(name), list[name], x) end
  return out
end

--- A plot of numbers; tostring draws it in characters, :svg(path) writes a file.
---
---     print(unsloth.plot({ loss = { 3, 2, 1.5 }, eval_loss = { 3.1, 2.3, 2 } }, { title = "two lines" }))
---@param values table|unsloth.Tensor numbers, named arrays of them, a training history, a vector, or a matrix (a heat map)
---@param opts unsloth.PlotOptions|nil title, x, width and height in characters, style "braille" or "blocks"
---@return table
function M.plot(values, opts)
  local o = options.check("plot", opts, SPEC)
  local self = setmetatable({ options = o }, Plot)
  if is_tensor(values) and values.ndim == 2 then
    self.rows = values:totable()
  elseif is_tensor(values) and values.ndim ~= 1 then
    errors.raise("USL_ERR_SHAPE", "plot: a tensor of %d dimensions; a vector or a matrix is wanted", values.ndim)
  elseif type(values) == "table" and type(values[1]) == "table" and values[1].step then
    self.series = history(values)
    o.title = o.title or "loss"
  elseif type(values) == "table" and values[1] == nil and next(values) ~= nil then
    self.series = named(values, o.x)
  else
    self.series = { series_of(o.title or "values", values, o.x) }
  end
  for _, s in ipairs(self.series or {}) do
    if #s.y == 0 then errors.invalid "plot: there is nothing to draw" end
  end
  return self
end

-- ---- In characters --------------------------------------------------------------------------------------------------

-- Bits of a braille cell by column and row of its dots.
local DOTS = { { 0x01, 0x02, 0x04, 0x40 }, { 0x08, 0x10, 0x20, 0x80 } }

local function new_canvas(width, height)
  return { width = width, height = height, cells = {} }
end

local function set(canvas, px, py)
  local column, row = px // 2, py // 4
  if column < 0 or column >= canvas.width or row < 0 or row >= canvas.height then return end
  local i = row * canvas.width + column
  canvas.cells[i] = (canvas.cells[i] or 0) | DOTS[px % 2 + 1][py % 4 + 1]
end

local function line(canvas, ax, ay, bx, by)
  local steps = math.max(math.abs(bx - ax), math.abs(by - ay), 1)
  for i = 0, steps do
    set(canvas, (ax + (bx - ax) * i / steps + 0.5) // 1 | 0, (ay + (by - ay) * i / steps + 0.5) // 1 | 0)
  end
end

local function draw_braille(canvas, s, at)
  local ax, ay
  for i, y in ipairs(s.y) do
    if y - y == 0 then
      local bx, by = at(s.x[i], y)
      line(canvas, ax or bx, ay or by, bx, by)
      ax, ay = bx, by
    else
      ax, ay = nil, nil
    end
  end
end

local BLOCKS = { " ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" }

-- Columns of blocks up to the mean of the values that fall into each.
local function block_rows(s, o, x0, x1, y0, y1)
  local sums, counts = {}, {}
  for i, y in ipairs(s.y) do
    if y - y == 0 then
      local column = math.min(o.width - 1, (s.x[i] - x0) / (x1 - x0) * o.width // 1 | 0)
      sums[column], counts[column] = (sums[column] or 0) + y, (counts[column] or 0) + 1
    end
  end
  local rows = {}
  for r = 1, o.height do
    local parts = {}
    for c = 0, o.width - 1 do
      local share = counts[c] and (sums[c] / counts[c] - y0) / (y1 - y0) * o.height - (o.height - r) or 0
      parts[c + 1] = BLOCKS[1 + (math.max(0, math.min(1, share)) * 8 + 0.5) // 1 | 0]
    end
    rows[r] = table.concat(parts)
  end
  return rows
end

local function line_rows(self, x0, x1, y0, y1)
  local o = self.options
  if o.style == "blocks" then return block_rows(self.series[1], o, x0, x1, y0, y1) end
  local canvas = new_canvas(o.width, o.height)
  local function at(x, y)
    return (x - x0) / (x1 - x0) * (2 * o.width - 1), (y1 - y) / (y1 - y0) * (4 * o.height - 1)
  end
  for _, s in ipairs(self.series) do draw_braille(canvas, s, at) end
  local rows = {}
  for r = 0, o.height - 1 do
    local parts = {}
    for c = 0, o.width - 1 do parts[c + 1] = utf8.char(0x2800 + (canvas.cells[r * o.width + c] or 0)) end
    rows[r + 1] = table.concat(parts)
  end
  return rows
end

local function label(y)
  return ("%10.4g"):format(y)
end

local function draw_lines(self)
  local o = self.options
  local x0, x1, y0, y1 = svg.range(self.series)
  local rows, lines = line_rows(self, x0, x1, y0, y1), {}
  if o.title then lines[1] = (" "):rep(11) .. o.title end
  for r, row in ipairs(rows) do
    local text = r == 1 and label(y1) or r == #rows and label(y0) or (" "):rep(10)
    lines[#lines + 1] = text .. " " .. row
  end
  local left, right = ("%.4g"):format(x0), ("%.4g"):format(x1)
  lines[#lines + 1] = (" "):rep(11) .. left .. (" "):rep(math.max(1, o.width - #left - #right)) .. right
  return table.concat(lines, "\n")
end

local SHADES = { " ", "░", "▒", "▓", "█" }

-- Two characters a value, so that a cell is about square; large ones are thinned out.
local function draw_heat(self)
  local rows, lines = self.rows, {}
  local low, high = math.huge, -math.huge
  for _, row in ipairs(rows) do
    for _, v in ipairs(row) do
      if v - v == 0 then low, high = math.min(low, v), math.max(high, v) end
    end
  end
  if self.options.title then lines[1] = self.options.title end
  local step_r, step_c = math.ceil(#rows / 40), math.ceil(#(rows[1] or {}) / 60)
  for r = 1, #rows, math.max(1, step_r) do
    local parts = {}
    for c = 1, #rows[r], math.max(1, step_c) do
      local v = rows[r][c]
      local share = v - v == 0 and high > low and (v - low) / (high - low) or 0
      parts[#parts + 1] = SHADES[1 + (share * 4 + 0.5) // 1 | 0]:rep(2)
    end
    lines[#lines + 1] = table.concat(parts)
  end
  lines[#lines + 1] = ("[%d x %d, %.4g to %.4g]"):format(#rows, #(rows[1] or {}), low, high)
  return table.concat(lines, "\n")
end

function Plot:__tostring()
  return self.rows and draw_heat(self) or draw_lines(self)
end

--- Writes the plot as an SVG file and returns its path; without a path returns the text.
---
---     unsloth.plot({ 3, 1, 2 }):svg "three.svg"
---@param path string|nil
---@return string
function Plot:svg(path)
  local o = { title = self.options.title, alone = true }
  local text = self.rows and svg.heat(self.rows, o) or svg.chart(self.series, o)
  if path == nil then return text end
  errors.want("svg", "path", path, "string", 'the file to write, as in plot:svg "plot.svg"')
  files.write(path, text)
  return path
end

M.Plot = Plot

return M
