--- Line charts and heat maps as SVG. Colours are CSS variables, so a page's light and dark sides both fit; alone, a chart brings
--- its own.
local M = {}

local WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 260, 64, 34, 28, 12

--- What a chart that stands alone says about its colours.
M.style = [[
:root { --ink: #1f2328; --soft: #656d76; --line: #d0d7de; --page: #ffffff; --one: #0969da; --two: #bc4c00; --three: #1a7f37 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #8d96a0; --line: #30363d; --page: #0d1117; --one: #58a6ff; --two: #f0883e; --three: #3fb950 } }]]

local COLOURS = { "var(--one)", "var(--two)", "var(--three)" }

--- Text for XML and HTML.
function M.escape(text)
  local out = tostring(text):gsub("[&<>\"']", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;", ["'"] = "&#39;" })
  -- Control characters are not allowed in XML; broken UTF-8 neither.
  out = out:gsub("[%z\1-\8\11\12\14-\31]", "\u{fffd}")
  if utf8.len(out) then return out end
  local parts, i = {}, 1
  while i <= #out do
    local last = utf8.len(out, i, -1) and #out or select(2, utf8.len(out, i)) - 1
    parts[#parts + 1] = out:sub(i, last)
    if last < #out then parts[#parts + 1] = "\u{fffd}" end
    i = last + 2
  end
  return table.concat(parts)
end

--- Round numbers that cover low to high, about `wanted` of them.
function M.ticks(low, high, wanted)
  local span = high - low
  if not (span > 0) then span = math.max(math.abs(high), 1) end
  local power = 10.0 ^ math.floor(math.log(span / wanted, 10))
  local step = power
  for _, factor in ipairs { 1, 2, 5, 10 } do
    step = power * factor
    if span / step <= wanted then break end
  end
  local out = {}
  for i = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) do out[#out + 1] = i * step end
  if #out == 0 then out[1] = low end
  return out
end

--- The smallest and largest finite x and y of series { { x = {}, y = {} }, ... }.
function M.range(series)
  local r = { math.huge, -math.huge, math.huge, -math.huge }
  for _, s in ipairs(series) do
    for i, y in ipairs(s.y) do
      local x = s.x[i]
      if y - y == 0 and x - x == 0 then
        r[1], r[2], r[3], r[4] = math.min(r[1], x), math.max(r[2], x), math.min(r[3], y), math.max(r[4], y)
      end
    end
  end
  if r[1] > r[2] then return 0, 1, 0, 1 end
  if r[3] == r[4] then
    local room = math.max(math.abs(r[3]) * 0.05, 1e-12)
    r[3], r[4] = r[3] - room, r[4] + room
  end
  if r[1] == r[2] then r[1], r[2] = r[1] - 0.5, r[2] + 0.5 end
  return table.unpack(r)
end

local function short(x)
  return (("%.4g"):format(x):gsub("e([+-])0", "e%1"))
end

-- The line of one series; what is not finite breaks it.
local function path_of(s, at)
  local parts, broken = {}, true
  for i, y in ipairs(s.y) do
    if y - y == 0 then
      parts[#parts + 1] = ("%s%.1f %.1f"):format(broken and "M" or "L", at(s.x[i], y))
      broken = false
    else
      broken = true
    end
  end
  return table.concat(parts)
end

--- A chart of series { { name, x = {}, y = {} }, ... }. opts: title, x (what lies below), format (of the numbers at the left),
--- alone (brings its style).
function M.chart(series, opts)
  opts = opts or {}
  local x0, x1, y0, y1 = M.range(series)
  local format = opts.format or short
  local function at(x, y)
    return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)
  end
  local out = { ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="%s" font-family="system-ui, sans-serif" '
    .. 'font-size="12">'):format(WIDTH, HEIGHT, M.escape(opts.title or "chart")) }
  local function add(...) out[#out + 1] = (...):format(select(2, ...)) end
  if opts.alone then
    add("<style>%s</style>", (M.style:gsub("%%", "%%%%")))
    add '<rect width="100%%" height="100%%" fill="var(--page)"/>'
  end
  if opts.title then add('<text x="%d" y="17" fill="var(--ink)" font-weight="600">%s</text>', LEFT, M.escape(opts.title)) end
  for _, y in ipairs(M.ticks(y0, y1, 5)) do
    local _, py = at(x0, y)
    add('<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="var(--line)"/>', LEFT, WIDTH - RIGHT, py, py)
    add('<text x="%d" y="%.1f" text-anchor="end" fill="var(--soft)">%s</text>', LEFT - 6, py + 4, M.escape(format(y)))
  end
  for _, x in ipairs(M.ticks(x0, x1, 8)) do
    add('<text x="%.1f" y="%d" text-anchor="middle" fill="var(--soft)">%s</text>', at(x, y0), HEIGHT - BOTTOM + 16, short(x))
  end
  if opts.x then
    add('<text x="%d" y="%d" text-anchor="end" fill="var(--soft)">%s</text>', WIDTH - RIGHT, HEIGHT - 4, M.escape(opts.x))
  end
  local right = WIDTH - RIGHT
  for i, s in ipairs(series) do
    local colour = COLOURS[(i - 1) % #COLOURS + 1]
    add('<path d="%s" fill="none" stroke="%s" stroke-width="1.8" stroke-linejoin="round"/>', path_of(s, at), colour)
    -- One point makes no line.
    for k = 1, #s.y == 1 and 1 or 0 do
      local cx, cy = at(s.x[k], s.y[k])
      if cy == cy then add('<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>', cx, cy, colour) end
    end
    if #series > 1 and s.name then
      add('<text x="%d" y="17" text-anchor="end" fill="%s">%s</text>', right, colour, M.escape(s.name))
      right = right - 9 * #s.name - 12
    end
  end
  out[#out + 1] = "</svg>"
  return table.concat(out, "\n")
end

--- A heat map of rows of numbers: darker is more. opts: title, alone.
function M.heat(rows, opts)
  opts = opts or {}
  local low, high = math.huge, -math.huge
  for _, row in ipairs(rows) do
    for _, v in ipairs(row) do
      if v - v == 0 then low, high = math.min(low, v), math.max(high, v) end
    end
  end
  local top, n, m = opts.title and 24 or 0, #rows, #(rows[1] or {})
  local cell = math.max(2, math.min(24, WIDTH // math.max(1, m)))
  local out = { ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="%s" font-family="system-ui, sans-serif" '
    .. 'font-size="12">'):format(math.max(m * cell, 240), n * cell + top, M.escape(opts.title or "heat map")) }
  if opts.alone then out[2] = ("<style>%s</style>\n"):format(M.style) .. '<rect width="100%" height="100%" fill="var(--page)"/>' end
  if opts.title then out[#out + 1] = ('<text x="0" y="16" fill="var(--ink)" font-weight="600">%s</text>'):format(M.escape(opts.title)) end
  for r, row in ipairs(rows) do
    for c, v in ipairs(row) do
      out[#out + 1] = ('<rect x="%d" y="%d" width="%d" height="%d" fill="var(--one)" fill-opacity="%.3f"/>'):format((c - 1) * cell,
        top + (r - 1) * cell, cell, cell, v - v == 0 and high > low and (v - low) / (high - low) or 0)
    end
  end
  out[#out + 1] = "</svg>"
  return table.concat(out, "\n")
end

return M
