--- Completion at the prompt: names, fields, methods, options inside { }, topics of help, files inside strings.
local core = require "unsloth.core"
local doc = require "unsloth.doc"
local inside = require "unsloth.inside"

--- globals: where names are looked up.
local M = { globals = _G }

local KEYWORDS = { "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if", "in", "local", "nil", "not",
  "or", "repeat", "return", "then", "true", "until", "while" }

-- ---- Where the cursor is --------------------------------------------------------------------------------------------

-- Reads a line from its beginning: the text of an open string, and the brackets that are open, each with where it stands.
local function scan(line)
  local open, i = {}, 1
  while i <= #line do
    local c = line:sub(i, i)
    if c == '"' or c == "'" then
      local k = i + 1
      while k <= #line and line:sub(k, k) ~= c do k = k + (line:sub(k, k) == "\\" and 2 or 1) end
      if k > #line then return line:sub(i + 1), line:sub(1, i - 1), open end
      i = k
    elseif line:find("^%-%-", i) then
      return nil, nil, {}
    elseif c:find "[({%[]" then
      open[#open + 1] = { c, i }
    elseif c:find "[)}%]]" then
      open[#open] = nil
    end
    i = i + 1
  end
  return nil, nil, open
end

-- ---- Values, without calling anything that does something ------------------------------------------------------------

local function class_of(value)
  local meta = debug.getmetatable(value)
  return type(meta) == "table" and doc.classes[meta.__name] or nil
end

-- What may be looked up under a value: a set of names -> whether they are functions.
local function members(value)
  local out = {}
  local function take(t)
    if type(t) ~= "table" then return end
    for key, v in next, t do
      if type(key) == "string" and key:find "^[%a_][%w_]*$" then out[key] = type(v) == "function" end
    end
  end
  local names = type(value) == "table" and inside.names(value)
  if names then
    for _, name in ipairs(names) do out[name] = false end
    return out
  end
  local class = class_of(value)
  if class then
    take(core[class.name])
    take((debug.getuservalue(value, 1)))
    for _, name in ipairs(class.fields) do out[name] = false end
    return out
  end
  if type(value) == "string" then
    take(string)
    return out
  end
  take(value)
  local meta = debug.getmetatable(value)
  if type(meta) == "table" and type(rawget(meta, "__index")) == "table" then take(rawget(meta, "__index")) end
  return out
end
M.members = members

local SAFE_CALLS = { layer = true, tree = true, info = true }

local function field(value, name)
  local class = class_of(value)
  if class and core[class.name][name] then return core[class.name][name] end
  if class or type(value) == "string" or type(value) == "table" and inside.names(value) then
    local ok, found = pcall(function() return value[name] end)
    return ok and found or nil
  end
  while type(value) == "table" do -- an __index that is a function may do anything
    local found = rawget(value, name)
    if found ~= nil then return found end
    local meta = debug.getmetatable(value)
    value = type(meta) == "table" and rawget(meta, "__index") or nil
  end
end

--- The value of a chain such as "model:layer(0).q_proj" as the globals and extra names have it; nil when it cannot be told without
--- running code of the user's.
function M.value_of(chain, extra)
  local name, rest = chain:match "^([%a_][%w_]*)(.*)$"
  if not name then return nil end
  local value = extra and extra[name]
  if value == nil then value = rawget(M.globals, name) end
  while rest ~= "" and value ~= nil do
    local sep, word, more = rest:match "^([.:])([%a_][%w_]*)(.*)$"
    if not sep then
      local position, behind = rest:match "^%[(%d+)%](.*)$"
      if not position then return nil end
      value, rest = field(value, math.tointeger(position)), behind
    else
      local args, behind = more:match "^%((%d*)%)(.*)$"
      if args and SAFE_CALLS[word] then
        local ok, result = pcall(field(value, word) or error, value, math.tointeger(args))
        value, more = ok and result or nil, behind
      else
        value = field(value, word)
      end
      rest = more
    end
  end
  return value
end

-- ---- Candidates -----------------------------------------------------------------------------------------------------

local function pick(out, names, prefix, before, after)
  for name, is_function in pairs(names) do
    local own = name:sub(1, 1) == "_" and prefix == ""
    if not own and name:sub(1, #prefix) == prefix then out[#out + 1] = before .. name .. (after and after(name, is_function) or "") end
  end
end

local function file_names(path, out)
  local dir, prefix = path:match "^(.*/)([^/]*)$"
  dir, prefix = dir or "", prefix or path
  local folder = dir == "" and "." or dir
  local ok, names = pcall(core.list_dir, folder)
  for _, name in ipairs(ok and names or {}) do
    if name:sub(1, #prefix) == prefix and (prefix ~= "" or name:sub(1, 1) ~= ".") then
      out[#out + 1] = dir .. name .. (core.path_kind(dir .. name) == "folder" and "/" or "")
    end
  end
end

local function option_names(line, open, prefix, out)
  local brace = open[#open]
  local before = line:sub(brace[2] + 1)
  local word_start = #before - #prefix
  if not before:sub(1, word_start):find "^%s*$" and not before:sub(1, word_start):find "[,;]%s*$" then return false end
  local left = line:sub(1, brace[2] - 1)
  local call = left:match "([%a_][%w_.:]*)%s*%(?%s*$" or left:match "([%a_][%w_.:]*)%s*%([^(){}]*$"
  local spec = call and doc.options_of(M.value_of(call) or false)
  if not spec then return false end
  for name, rule in pairs(spec) do
    if name:sub(1, #prefix) == prefix and not rule.refuse and not rule.alias then out[#out + 1] = name .. " = " end
  end
  return #out > 0
end

-- What stands before the last dot or colon: names, dots and whole brackets, as in "model:layer(0).q_proj".
local function chain_before(text)
  local sep = text:match "[.:]$"
  if not sep then return nil end
  local i, depth = #text - 1, 0
  while i > 0 do
    local c = text:sub(i, i)
    if c == ")" or c == "]" then
      depth = depth + 1
    elseif c == "(" or c == "[" then
      if depth == 0 then break end
      depth = depth - 1
    elseif depth == 0 and not c:find "[%w_.:]" then
      break
    end
    i = i - 1
  end
  return text:sub(i + 1, -2), sep
end

--- The whole words that may stand where the line ends, and where that word begins: candidates, first byte.
---@param line string all before the cursor
---@return string[] candidates, integer first
function M.complete(line)
  local out = {}
  local text, before, open = scan(line)
  if text then
    if before:find "help%s*%(?%s*$" then
      for _, topic in ipairs(doc.topics()) do
        if topic:sub(1, #text) == text then out[#out + 1] = topic end
      end
    else
      file_names(text, out)
    end
    table.sort(out)
    return out, #line - #text + 1
  end
  local prefix = line:match "[%a_][%w_]*$" or ""
  local object, sep = chain_before(line:sub(1, #line - #prefix))
  local first = #line - #prefix + 1
  if object then
    local value = M.value_of(object)
    if value ~= nil then
      local method = sep == ":"
      local names = members(value)
      if method then
        for name, is_function in pairs(names) do
          if not is_function then names[name] = nil end
        end
      end
      pick(out, names, prefix, "", method and function() return "(" end or nil)
    end
  elseif not (#open > 0 and open[#open][1] == "{" and option_names(line, open, prefix, out)) then
    pick(out, members(M.globals), prefix, "")
    for _, word in ipairs(KEYWORDS) do
      if prefix ~= "" and word:sub(1, #prefix) == prefix then out[#out + 1] = word end
    end
  end
  table.sort(out)
  return out, first
end

return M
