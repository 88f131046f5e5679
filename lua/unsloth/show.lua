--- Values as people read them: what `tostring` of tensors, models, data sets and trainers says, and what the prompt prints.
local core = require "unsloth.core"
local progress = require "unsloth.progress"

local M = {}

local FEW = 4 -- of a long dimension so many are shown at each end

-- ---- Widths: a terminal counts characters, Lua bytes ----------------------------------------------------------------

local function width(text)
  return utf8.len(text) or #text
end

local function pad(text, n, left)
  local space = (" "):rep(n - width(text))
  return left and space .. text or text .. space
end

local function clip(text, n)
  text = core.printable(text, true)
  if width(text) <= n then return text end
  local cut = utf8.offset(text, n) or n
  return text:sub(1, cut - 1) .. "…"
end

--- Rows of texts as a table; the first row is its head. Columns whose name is in `right` stand to the right.
function M.columns(rows, right)
  local widths = {}
  for _, row in ipairs(rows) do
    for i, text in ipairs(row) do widths[i] = math.max(widths[i] or 0, width(text)) end
  end
  local lines = {}
  for r, row in ipairs(rows) do
    local parts = {}
    for i, text in ipairs(row) do parts[i] = pad(text, widths[i], right and right[i]) end
    lines[#lines + 1] = (table.concat(parts, "  "):gsub("%s+$", ""))
    if r == 1 then
      for i = 1, #parts do parts[i] = ("-"):rep(widths[i]) end
      lines[#lines + 1] = table.concat(parts, "  ")
    end
  end
  return table.concat(lines, "\n")
end

-- ---- Numbers --------------------------------------------------------------------------------------------------------

local function number(x)
  if math.type(x) == "integer" then return ("%d"):format(x) end
  if x ~= x then return "nan" end
  return ("%.5g"):format(x)
end

--- 2230016 -> "2.23M".
function M.count(n)
  for _, unit in ipairs { { 1e12, "T" }, { 1e9, "B" }, { 1e6, "M" }, { 1e3, "k" } } do
    if n >= unit[1] then return ("%.3g%s"):format(n / unit[1], unit[2]) end
  end
  return ("%d"):format(n)
end

-- ---- Tensors --------------------------------------------------------------------------------------------------------

-- The parts of a dimension that are shown: { first, length } pairs.
local function ends(n)
  if n <= 2 * FEW then return { { 1, n } } end
  return { { 1, FEW }, { n - FEW + 1, FEW } }
end

-- The texts of a vector's ends; "..." between them.
local function cells(t)
  local out = {}
  for k, part in ipairs(ends(t.shape[1])) do
    if k == 2 then out[#out + 1] = "..." end
    if part[2] > 0 then
      for _, x in ipairs(t:narrow(1, part[1], part[2]):totable()) do out[#out + 1] = number(x) end
    end
  end
  return out
end

local function matrix_lines(t, lines)
  local rows, widest = {}, 0
  for k, part in ipairs(ends(t.shape[1])) do
    if k == 2 then rows[#rows + 1] = "..." end
    for i = part[1], part[1] + part[2] - 1 do
      rows[#rows + 1] = cells(t:select(i))
      for _, text in ipairs(rows[#rows]) do widest = math.max(widest, #text) end
    end
  end
  for _, row in ipairs(rows) do
    if row == "..." then
      lines[#lines + 1] = "  ..."
    else
      for i, text in ipairs(row) do row[i] = pad(text, widest, true) end
      lines[#lines + 1] = "  " .. table.concat(row, "  ")
    end
  end
end

-- Matrices of the last two dimensions, a few of them, each under its position.
local function block_lines(t, at, lines)
  if t.ndim == 2 then
    lines[#lines + 1] = ("(%s, :, :)"):format(table.concat(at, ", "))
    return matrix_lines(t, lines)
  end
  local n = t.shape[1]
  for _, i in ipairs(n <= 3 and { 1, 2, 3 } or { 1, 2, "...", n }) do
    if i == "..." then
      lines[#lines + 1] = "..."
    elseif i <= n then
      at[#at + 1] = i
      block_lines(t:select(i), at, lines)
      at[#at] = nil
    end
  end
end

--- A tensor as a matrix, long dimensions elided, with shape, type and device.
function M.tensor(t)
  local lines, shape = {}, t.shape
  if #shape == 0 then
    lines[1] = "  " .. number(t:item())
  elseif #shape == 1 then
    lines[1] = "  " .. table.concat(cells(t), "  ")
  elseif #shape == 2 then
    matrix_lines(t, lines)
  else
    block_lines(t, {}, lines)
  end
  lines[#lines + 1] = ("[tensor %s, %s, %s]"):format(#shape == 0 and "of one value" or table.concat(shape, "x"), t.dtype, t.device)
  return table.concat(lines, "\n")
end

-- ---- Models ---------------------------------------------------------------------------------------------------------

local inside = require "unsloth.inside"

-- Numbers, trained numbers and bytes below a node.
local function sum(node)
  local names, children, p = inside.parts(node)
  local total, trained, bytes = 0, 0, p and p.bytes or 0
  if p then
    total = 1
    for _, n in ipairs(p.shape) do total = total * n end
    trained = p.trainable and total or 0
  end
  for _, name in ipairs(names) do
    local a, b, c = sum(children[name])
    total, trained, bytes = total + a, trained + b, bytes + c
  end
  return total, trained, bytes
end

-- What two layers must share to stand in one line.
local function signature(node)
  local names, children, p = inside.parts(node)
  if p then return p.dtype .. table.concat(p.shape, "x") .. tostring(p.trainable) end
  local parts = {}
  for i, name in ipairs(names) do parts[i] = name .. "(" .. signature(children[name]) .. ")" end
  return table.concat(parts)
end

local function leaf_text(p)
  return ("%s %s"):format(table.concat(p.shape, "x"), p.dtype)
end

local tree_lines

local function add_line(node, label, depth, rows)
  local names, children, p = inside.parts(node)
  -- A module with one weight is one line; its adapter's matrices stand behind.
  local text = p and leaf_text(p) or ""
  local only_weight = not p
  for _, name in ipairs(names) do
    local q = select(3, inside.parts(children[name]))
    if name ~= "weight" and name ~= "bias" and not name:find "^lora_" then only_weight = false end
    if q and name == "weight" then text = leaf_text(q) end
    if q and name == "bias" then text = text .. ", bias" end
    if name == "lora_A" then
      local a = select(3, inside.parts(select(2, inside.parts(children[name])).weight))
      text = ("%s, LoRA of rank %d"):format(text, a.shape[1])
    end
  end
  local total, trained, bytes = sum(node)
  rows[#rows + 1] = { ("  "):rep(depth) .. label, M.count(total), progress.bytes(bytes), trained > 0 and M.count(trained) or "", text }
  if not p and not only_weight then tree_lines(node, depth + 1, rows) end
end

function tree_lines(node, depth, rows)
  local names, children = inside.parts(node)
  local i = 1
  while i <= #names do
    local first, same = names[i], 1
    while tonumber(first) and names[i + same] and signature(children[names[i + same]]) == signature(children[first]) do same = same + 1 end
    add_line(children[first], same > 1 and ("%s to %s: %d times"):format(first, names[i + same - 1], same) or first, depth, rows)
    i = i + same
  end
end

--- A tree of parameters: counts, bytes, what is trained. Layers that are alike stand in one line, with one layer's numbers.
function M.tree(node)
  local rows = { { "module", "numbers", "bytes", "trained", "shape" } }
  local path = select(4, inside.parts(node))
  if path == "" then
    tree_lines(node, 0, rows)
  else
    add_line(node, path, 0, rows)
  end
  return M.columns(rows, { false, true, true, true })
end

function M.model(model)
  local info = model:info()
  local adapter = model:active_adapter()
  return ("%s\n[%s, %s numbers, %s trained, weights %s, %s on %s, context %d%s]"):format(M.tree(model:tree()), info.architecture,
    M.count(info.parameters), info.trainable > 0 and M.count(info.trainable) or "none", progress.bytes(info.weight_bytes), info.dtype,
    info.device, info.context, adapter and (', adapter "%s"'):format(adapter) or "")
end

--- The logit lens as a table, a line for what goes into each layer.
function M.lens(lens)
  local rows = { { "after", "token", "id", "probability" } }
  for i, entry in ipairs(lens) do
    rows[i + 1] = { i == 1 and "embedding" or i == #lens and "the model" or ("layer %d"):format(i - 2),
      entry.token and clip(("%q"):format(entry.token), 24) or "", ("%d"):format(entry.id), ("%.4f"):format(entry.probability) }
  end
  return M.columns(rows, { false, false, true, true })
end

-- ---- Data sets, histories -------------------------------------------------------------------------------------------

local function cell(value)
  if type(value) == "table" then return clip(core.json.encode(value), 40) end
  return clip(type(value) == "number" and number(value) or tostring(value), 40)
end

-- The columns of some rows, in the order in which they come.
local function record_rows(list, names)
  local head = {}
  for k, name in ipairs(names) do head[k] = clip(name, 40) end
  local rows, right = { head }, {}
  for i, record in ipairs(list) do
    local row = {}
    for k, name in ipairs(names) do
      local value = record[name]
      row[k] = value == nil and "" or cell(value)
      right[k] = type(value) == "number" or right[k] and value == nil
    end
    rows[i + 1] = row
  end
  return rows, right
end

function M.dataset(ds)
  local n, list = #ds, {}
  for i = 1, math.min(n, 5) do list[i] = ds[i] end
  local names = ds:column_names()
  local rows, right = record_rows(list, names)
  return ("%s\n[data set: %d row%s, columns %s]"):format(M.columns(rows, right), n, n == 1 and "" or "s", table.concat(rows[1], ", "))
end

local BARS = { "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" }

--- Numbers as a line of bars, at most `most` of them (means of neighbours).
function M.sparkline(values, most)
  most = most or 60
  local picked = values
  if #values > most then
    picked = {}
    for i = 1, most do
      local from, to, total = (i - 1) * #values // most + 1, i * #values // most, 0
      for k = from, to do total = total + values[k] end
      picked[i] = total / (to - from + 1)
    end
  end
  local low, high = math.huge, -math.huge
  for _, v in ipairs(picked) do
    if v - v == 0 then low, high = math.min(low, v), math.max(high, v) end
  end
  local out = {}
  for i, v in ipairs(picked) do
    local share = high > low and (v - low) / (high - low) or 0
    out[i] = v - v == 0 and BARS[1 + (share * 7 + 0.5) // 1 | 0] or "?"
  end
  return table.concat(out)
end

--- The history of a training run: its loss as a line of bars, first and last entries as a table.
function M.history(list)
  local losses, evals = {}, {}
  for _, entry in ipairs(list) do
    if entry.loss then losses[#losses + 1] = entry.loss end
    if entry.eval_loss then evals[#evals + 1] = entry.eval_loss end
  end
  local lines = {}
  for _, line in ipairs { { "loss", losses }, { "eval_loss", evals } } do
    local values = line[2]
    if #values > 0 then
      lines[#lines + 1] = ("%s %s  %.4f -> %.4f"):format(pad(line[1], 9), M.sparkline(values), values[1], values[#values])
    end
  end
  lines[#lines + 1] = ("[training history: %d entries, step %d to %d]"):format(#list, list[1].step, list[#list].step)
  return table.concat(lines, "\n")
end

function M.trainer(trainer)
  local state, rows = trainer.state, trainer.rows:stats()
  local text = ("[trainer: step %d of %s, %d rows, %d tokens, %s]"):format(state.global_step,
    state.max_steps and ("%d"):format(state.max_steps) or "?", rows.rows, rows.tokens,
    state.learning_rate and ("learning rate %.3g"):format(state.learning_rate) or "not begun")
  return #trainer.log_history > 0 and M.history(trainer.log_history) .. "\n" .. text or text
end

function M.tokenizer(tok)
  return ("[tokenizer: %d tokens, bos %s, eos %s, %s]"):format(#tok, clip(tostring(tok.bos_token), 40), clip(tostring(tok.eos_token), 40),
    tok.chat_template and "with a chat template" or "no chat template")
end

-- ---- Tables ---------------------------------------------------------------------------------------------------------

local function is_history(t)
  return type(t[1]) == "table" and type(t[1].step) == "number" and (t[1].loss or t[1].eval_loss) ~= nil
end

-- Userdata always say what they are.
local function has_text(value)
  if type(value) == "userdata" then return true end
  local meta = getmetatable(value)
  return type(meta) == "table" and meta.__tostring ~= nil
end

local function key_text(key)
  if type(key) == "string" then
    return key:find "^[%a_][%w_]*$" and key or core.printable(("[%q]"):format(key))
  end
  return "[" .. tostring(key) .. "]"
end

local function sorted_keys(t)
  local keys, n = {}, #t
  for key in pairs(t) do
    if not (math.type(key) == "integer" and key >= 1 and key <= n) then keys[#keys + 1] = key end
  end
  table.sort(keys, function(a, b)
    if type(a) == type(b) and (type(a) == "number" or type(a) == "string") then return a < b end
    return tostring(a) < tostring(b)
  end)
  return keys
end

local pretty

local function scalar(value)
  if type(value) == "string" then
    local text = ("%q"):format(value):gsub("\\\n", "\\n")
    return core.printable(#text > 200 and clip(text, 200) or text)
  end
  if type(value) == "number" then return tostring(value) end
  if type(value) == "userdata" and has_text(value) then return (tostring(value):match "([^\n]*)$") end
  return tostring(value)
end

local MOST = 40 -- entries of one table

local function table_parts(t, indent, seen)
  local parts, left = {}, 0
  local function add(text)
    if #parts < MOST then parts[#parts + 1] = text else left = left + 1 end
  end
  for i = 1, #t do add(#parts < MOST and pretty(t[i], indent, seen) or "") end
  for _, key in ipairs(sorted_keys(t)) do
    add(#parts < MOST and key_text(key) .. " = " .. pretty(t[key], indent, seen) or "")
  end
  if left > 0 then parts[#parts + 1] = ("... %d more"):format(left) end
  return parts
end

function pretty(value, indent, seen)
  if type(value) ~= "table" or has_text(value) then return scalar(value) end
  if seen[value] then return "{ ... }" end
  if #indent > 12 then return "{ ... }" end
  seen[value] = true
  local parts = table_parts(value, indent .. "  ", seen)
  seen[value] = nil
  if #parts == 0 then return "{}" end
  local line = "{ " .. table.concat(parts, ", ") .. " }"
  if #indent + width(line) <= 100 and not line:find("\n", 1, true) then return line end
  return "{\n" .. indent .. "  " .. table.concat(parts, ",\n" .. indent .. "  ") .. "\n" .. indent .. "}"
end

--- Any value as the prompt prints it.
function M.value(value)
  if type(value) == "string" then return core.printable(value) end
  if type(value) == "table" and not has_text(value) then
    if is_history(value) then return M.history(value) end
    return pretty(value, "", {})
  end
  return tostring(value)
end

--- What the prompt prints for the results of a line: short ones side by side, as print does.
function M.results(...)
  local texts, n = {}, select("#", ...)
  if n == 1 and ... == require("unsloth").help then return require("unsloth.doc").text() end
  local near = n == 1 and ... == nil and require("unsloth.explain").absent()
  if near then return ("nil\t(there is no such global: did you mean '%s'?)"):format(near) end
  local long = false
  for i = 1, n do
    texts[i] = M.value((select(i, ...)))
    long = long or n > 1 and texts[i]:find("\n", 1, true) ~= nil
  end
  return table.concat(texts, long and "\n" or "\t")
end

-- What tostring says.
core.Tensor.describe = M.tensor
core.Model.describe = M.model
core.Dataset.describe = M.dataset
core.Tokenizer.describe = M.tokenizer

return M
