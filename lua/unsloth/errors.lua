--- Error objects for the Lua modules: errors.raise("USL_ERR_INVALID", "a sentence with %s", value).
local core = require "unsloth.core"

local M = {}

---@param code string a status name, such as "USL_ERR_INVALID"
---@param format string the sentence, for string.format
function M.raise(code, format, ...)
  error(core.error(code, select("#", ...) > 0 and format:format(...) or format), 0)
end

function M.invalid(format, ...)
  M.raise("USL_ERR_INVALID", format, ...)
end

function M.unsupported(format, ...)
  M.raise("USL_ERR_UNSUPPORTED", format, ...)
end

-- "nothing", "a number", "a tokenizer": what somebody gave.
local function called(value)
  if value == nil then return "missing" end
  local meta = debug.getmetatable(value)
  local class = type(meta) == "table" and type(meta.__name) == "string" and meta.__name:match "^unsloth%.(%w+)$"
  return class and "a " .. class or "a " .. type(value)
end

--- Raises unless an argument is what is wanted: errors.want("save_pretrained", "dir", dir, "string", "the folder to write, as in ...").
---@param kind string a type of Lua's, or a class of ours ("unsloth.Model"), or several with "|"
---@param remedy string what to give, behind "give"
function M.want(what, name, value, kind, remedy)
  local meta = debug.getmetatable(value)
  local own = type(meta) == "table" and meta.__name
  for one in kind:gmatch "[^|]+" do
    if type(value) == one or own == one then return end
  end
  M.invalid("%s: %s is %s; give %s", what, name, called(value), remedy)
end

--- Raises unless a method got its object: errors.method("model", "generate", self, "unsloth.Model").
function M.method(object, name, self, class)
  local meta = debug.getmetatable(self)
  if type(meta) == "table" and meta.__name == class then return end
  M.invalid("%s is a method: write %s:%s(...) with a colon", name, object, name)
end

local noted = {}

--- Tells the user something on stderr, once in a run.
function M.note(format, ...)
  local text = select("#", ...) > 0 and format:format(...) or format
  if noted[text] then return end
  noted[text] = true
  io.stderr:write("unsloth: ", core.printable(text), "\n")
end

return M
