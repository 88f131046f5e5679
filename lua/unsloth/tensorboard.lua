--- Event files of TensorBoard: records of length, checksum, message, checksum; messages are protocol buffers of an Event each.
local M = {}

-- ---- CRC32C, as the records want it ---------------------------------------------------------------------------------

local TABLE = {}
for i = 0, 255 do
  local c = i
  for _ = 1, 8 do c = c & 1 == 1 and 0x82f63b78 ~ c >> 1 or c >> 1 end
  TABLE[i] = c
end

--- CRC32C (Castagnoli) of a text.
function M.crc32c(text)
  local c = 0xffffffff
  for i = 1, #text do c = TABLE[(c ~ text:byte(i)) & 255] ~ c >> 8 end
  return c ~ 0xffffffff
end

-- Turned and shifted, so that checksums of texts with checksums stay strong.
local function masked(text)
  local c = M.crc32c(text)
  return ((c >> 15 | c << 17) + 0xa282ead8) & 0xffffffff
end

--- One record of a file.
function M.record(message)
  local length = ("<I8"):pack(#message)
  return length .. ("<I4"):pack(masked(length)) .. message .. ("<I4"):pack(masked(message))
end

-- ---- Protocol buffers: a key of field and wire type, then the value --------------------------------------------------

local function varint(n)
  local out = {}
  repeat
    out[#out + 1] = string.char(n & 127 | (n > 127 and 128 or 0))
    n = n >> 7
  until n == 0
  return table.concat(out)
end

local function bytes_field(field, text)
  return varint(field << 3 | 2) .. varint(#text) .. text
end

-- Event: 1 wall_time double, 2 step int64, 3 file_version string, 5 summary. Summary: 1 value. Value: 1 tag, 2 simple_value.
local function event(time, step, rest)
  return varint(1 << 3 | 1) .. ("<d"):pack(time) .. (step and varint(2 << 3) .. varint(step) or "") .. rest
end

local function scalar(tag, value)
  return bytes_field(1, bytes_field(1, tag) .. varint(2 << 3 | 5) .. ("<f"):pack(value))
end

--- The record with which a file begins.
function M.version(time)
  return M.record(event(time, nil, bytes_field(3, "brain.Event:2")))
end

--- A record of numbers by tag at a step.
---@param values table { { tag, number }, ... }
function M.scalars(time, step, values)
  local parts = {}
  for i, pair in ipairs(values) do parts[i] = scalar(pair[1], pair[2]) end
  return M.record(event(time, step, bytes_field(5, table.concat(parts))))
end

return M
