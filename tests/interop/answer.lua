--- What a model answers, for the comparisons with other programs.
---
---     unsloth-lua tests/interop/answer.lua MODEL OUT.safetensors COUNT ID ID ... [-- ADAPTER_DIR] [--4bit]
---
--- Writes `logits` (of the ids given) and `greedy` (COUNT ids that follow them).
local unsloth = require "unsloth"

local ids, adapter, four = {}, nil, arg[#arg] == "--4bit"
for i = 4, four and #arg - 1 or #arg do
  if arg[i] == "--" then
    adapter = arg[i + 1]
    break
  end
  ids[#ids + 1] = math.tointeger(tonumber(arg[i]))
end
local model = unsloth.FastLanguageModel.from_pretrained {
  model_name = arg[1], dtype = "float32", load_in_4bit = four, device = "cpu",
}
if adapter then model:load_adapter(adapter) end
local greedy = model:generate_ids(ids, { max_new_tokens = tonumber(arg[3]), temperature = 0 })
unsloth.safetensors.save(arg[2], { logits = model:logits(ids), greedy = unsloth.tensor(greedy) })
