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

local noted = {}

--- Tells the user something on stderr, once in a run.
function M.note(format, ...)
  local text = select("#", ...) > 0 and format:format(...) or format
  if noted[text] then return end
  noted[text] = true
  io.stderr:write("unsloth: ", core.printable(text), "\n")
end

return M
