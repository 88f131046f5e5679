--- Errors explained: the line they point at, and the name that was probably meant.
local M = {}

local function names_of(t)
  local names = {}
  for name in pairs(t) do names[#names + 1] = name end
  table.sort(names)
  return names
end

-- Locals and upvalues of the function at a level of the stack.
local function visible(level)
  local out = {}
  for i = 1, 250 do
    local name, value = debug.getlocal(level, i)
    if not name then break end
    if name:find "^[%a_]" then out[name] = value == nil and false or value end
  end
  local info = debug.getinfo(level, "f")
  for i = 1, 255 do
    local name, value = debug.getupvalue(info and info.func or print, i)
    if not name then break end
    if name:find "^[%a_]" and out[name] == nil then out[name] = value == nil and false or value end
  end
  return out
end

-- The chunk's own line: from its text, or from its file.
local function line_of(source, number)
  local mark = source:sub(1, 1)
  local text = mark == "=" and M.chunk or mark ~= "=" and mark ~= "@" and source or nil
  if mark == "@" then
    local file = io.open(source:sub(2), "rb")
    text = file and file:read "a"
    if file then file:close() end
  end
  local at = 0
  for line in ((text or "") .. "\n"):gmatch "(.-)\n" do
    at = at + 1
    if at == number then return line end
  end
end

-- Slips of the keys are rarely in the first letter: names that begin otherwise are not meant.
local function nearest(word, names)
  local alike = {}
  for _, name in ipairs(names) do
    if name ~= word and name:sub(1, 1):lower() == word:sub(1, 1):lower() then alike[#alike + 1] = name end
  end
  return require("unsloth.core").nearest(word, alike)
end

-- The names of all that is ours, for what cannot be told without running it: a call's result, a line that is not at hand.
local function of_ours(kind)
  local complete, doc, core = require "unsloth.complete", require "unsloth.doc", require "unsloth.core"
  local all = {}
  local function take(value)
    for name in pairs(complete.members(value)) do all[name] = true end
  end
  for _, class in pairs(doc.classes) do take(core[class.name]) end
  take(require("unsloth.sft").Trainer)
  if kind == "field" then
    take(require "unsloth")
    take(require("unsloth").FastLanguageModel)
  end
  return names_of(all)
end

-- "attempt to call a nil value (method 'generat')": what has such a name nearly.
local function near_name(message, line, names)
  local kind, name = message:match "attempt to [%a ]- a nil value %((%a+) '([%w_]+)'%)"
  if not kind then return nil end
  local complete = require "unsloth.complete"
  if kind == "global" then
    local all = complete.members(_G)
    for known in pairs(names) do all[known] = true end
    all[name] = nil
    return nearest(name, names_of(all))
  end
  if kind ~= "field" and kind ~= "method" then return nil end
  local chain = (line or ""):match("([%a_][%w_.:%[%]()]*)[.:]" .. name .. "%f[^%w_]")
  local value = chain and complete.value_of(chain, names)
  if value == nil or value == false then return nearest(name, of_ours(kind)) end
  return nearest(name, names_of(complete.members(value)))
end

-- The line, and a mark below where the name stands.
local function pointed(number, line, name)
  local plain = line:gsub("\t", " ")
  local text = ("    %d | %s"):format(number, plain)
  local at = name and plain:find("%f[%w_]" .. name .. "%f[^%w_]")
  if not at then return text end
  return text .. "\n" .. (" "):rep(#("    %d | "):format(number) + at - 1) .. ("^"):rep(#name)
end

--- More about an error's message: the message, the line it points at, and what was probably meant. `level` is the stack level, as
--- debug.getinfo counts for the caller, of the function in which it was raised.
function M.message(message, level)
  local info = debug.getinfo(level + 1, "Sl")
  local source, number = info and info.source, info and info.currentline
  if not number or number < 1 or source:find("/unsloth/", 1, true) then return message end
  local line = line_of(source, number)
  local _, name = message:match "%((%a+) '([%w_]+)'%)"
  local near = near_name(message, line, visible(level + 2))
  if near then message = ("%s: did you mean '%s'?"):format(message, near) end
  return line and message .. "\n" .. pointed(number, line, name) or message
end

--- What a line that names a global which is not there probably meant, or nil.
function M.absent()
  local name = (M.chunk or ""):match "^%s*=?%s*([%a_][%w_]*)%s*$"
  if not name or name == "nil" or rawget(_G, name) ~= nil then return nil end
  return nearest(name, names_of(require("unsloth.complete").members(_G)))
end

--- The same for a message of the compiler's, "stdin:2: unexpected symbol near 'x'", whose chunk is `text`.
function M.syntax(message, text)
  local number = math.tointeger(tonumber(message:match "^[^\n]-:(%d+): "))
  if not number then return message end
  local at = 0
  for line in (text .. "\n"):gmatch "(.-)\n" do
    at = at + 1
    if at == number then return message .. "\n" .. pointed(number, line, message:match "near '([%w_]+)'$") end
  end
  return message
end

return M
