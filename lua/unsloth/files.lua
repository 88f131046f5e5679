--- Small files: read and written whole.
local errors = require "unsloth.errors"

local M = {}

--- The text of a file, or nil when it cannot be read.
function M.read(path)
  local file = io.open(path, "rb")
  local text = file and file:read "a"
  if file then file:close() end
  return text
end

--- Writes a file beside its place and renames it, so that readers find the old one or the new one.
function M.write(path, text)
  local beside = ("%s.%x.tmp"):format(path, math.random(0))
  local file, why = io.open(beside, "wb")
  local ok = file and file:write(text)
  if file then
    local closed, reason = file:close()
    ok, why = ok and closed, why or reason
  end
  if ok then ok, why = os.rename(beside, path) end
  if ok then return end
  os.remove(beside)
  errors.raise("USL_ERR_IO", "%s: cannot be written (%s)", path, why and why:match ": ([^:]*)$" or why or "a full disk?")
end

return M
