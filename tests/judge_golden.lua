--- Judges what tests/golden.lua printed: every recorded tensor but the inputs is there and within the limit.
---
---     lua5.4 tests/judge_golden.lua CASE_DIR/golden.safetensors LOG LIMIT
local golden, log, limit = arg[1], arg[2], tonumber(arg[3])
local INPUTS = { input_ids = true, attention_mask = true, labels = true }

-- Returns the names in the header of a .safetensors file.
local function names_of(path)
  local file = assert(io.open(path, "rb"))
  local header = file:read(string.unpack("<I8", file:read(8)))
  file:close()
  local names = {}
  for name in header:gmatch '"([^"]+)"%s*:%s*{%s*"dtype"' do names[#names + 1] = name end
  return names
end

local errors = {}
for line in io.lines(log) do
  local name, number = line:match "^(%S+)%s+(%S+)$"
  if name then errors[name] = tonumber(number) end
end

local checked, bad, worst = 0, 0, 0
for _, name in ipairs(names_of(golden)) do
  if not INPUTS[name] then
    checked = checked + 1
    local e = errors[name]
    -- Written so that a NaN is bad too.
    if not (e and e <= limit) then
      bad = bad + 1
      print(("%s: %s"):format(name, e and ("error %.3e"):format(e) or "not computed"))
    else
      worst = math.max(worst, e)
    end
  end
end
print(("%d tensors, %d bad, largest error of the others %.1e, limit %.0e"):format(checked, bad, worst, limit))
os.exit(checked > 0 and bad == 0)
