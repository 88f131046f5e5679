--- Judges a bfloat16 run of tests/golden.lua: each tensor within twice PyTorch's own bfloat16 error, or 2e-3 where twice
--- is less; losses of a training run at every step, the long real curve within 0.5%.
---
---     unsloth-lua tests/gpu/judge_bf16.lua CASE_DIR LOG DUMP.safetensors
local core = require "unsloth.core"

local case, log, dump = arg[1], arg[2], arg[3]
local LEAST, CURVE, CURVE_STEPS = 2e-3, 5e-3, 60

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "a"
  file:close()
  return text
end

local errors = {}
for line in io.lines(log) do
  local name, number = line:match "^(%S+)%s+(%S+)$"
  if name then errors[name] = tonumber(number) end
end

-- The largest relative distance of a loss, over the steps.
local function worst_step(ours, theirs)
  assert(#ours == #theirs, "the numbers of steps differ")
  local worst = 0
  for i = 1, #theirs do
    local e = math.abs(ours[i] / theirs[i] - 1)
    if not (e <= worst) then worst = e end -- a NaN too
  end
  return worst
end

local checked, bad, closest = 0, 0, 0

local function judge(name, e, limit)
  checked = checked + 1
  -- Written so that a NaN is bad too.
  if not (e and e <= limit) then
    bad = bad + 1
    print(("%s: %s"):format(name, e and ("error %.3e, allowed %.3e"):format(e, limit) or "not computed"))
  else
    closest = math.max(closest, e / limit)
  end
end

for name, theirs in pairs(core.json.decode(read(case .. "/bf16_error.json"), case .. "/bf16_error.json")) do
  local limit, run = math.max(2 * theirs, LEAST), name:match "^(.*)%.worst_step$"
  if run then
    local ours, golden = core.safetensors_load(dump)[run], core.safetensors_load(case .. "/golden.safetensors")[run]
    golden = golden:totable()
    judge(name, ours and worst_step(ours:totable(), golden), #golden >= CURVE_STEPS and CURVE or limit)
  else
    judge(name, errors[name], limit)
  end
end
print(("%d figures, %d bad, the others reach %.2f of what is allowed"):format(checked, bad, closest))
os.exit(checked > 0 and bad == 0, true)
