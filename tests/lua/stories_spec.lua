-- A real pretrained model beside a float64 reference: logits, losses, greedy text; quantised files beside it.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

local STORIES = "data/stories260K"

local function open(path)
  return unsloth.FastLanguageModel.from_pretrained { model_name = path, dtype = "float32", load_in_4bit = false }
end

local function mean_nll(logits, ids)
  local sum = 0
  for t = 1, #ids - 1 do
    local row = logits[t]:totable()
    local high, total = math.max(table.unpack(row)), 0
    for _, value in ipairs(row) do total = total + math.exp(value - high) end
    sum = sum + high + math.log(total) - row[ids[t + 1] + 1]
  end
  return sum / (#ids - 1)
end

local function check_case(model, case)
  local logits = model:logits(case.ids)
  local distance = logits[#case.ids]:distance(unsloth.tensor(case.last_logits))
  assert.is_true(distance < 1e-5, ("%s: logits differ by %g"):format(case.prompt, distance))
  if #case.ids > 1 and case.mean_nll ~= unsloth.json.null then
    assert.is_true(math.abs(mean_nll(logits, case.ids) - case.mean_nll) < 1e-4, case.prompt)
  end
  if case.greedy_min_margin > 1e-3 then
    local new = model:generate_ids(case.ids, { max_new_tokens = 64, temperature = 0, eos_token_id = 1 })
    for i, id in ipairs(new) do
      if id ~= 1 then assert.equals(case.greedy_64[i], id, ("%s: greedy token %d"):format(case.prompt, i)) end
    end
    assert.is_true(#new >= #case.greedy_64)
  end
end

describe("stories260K", function()
  for _, name in ipairs { "hf", "gguf/stories260K.gguf" } do
    support.it_with(STORIES .. "/" .. name, name .. " computes what the reference computes", function(path)
      local model <close>, tokenizer = open(path)
      for _, case in ipairs(support.json_lines(support.find(STORIES .. "/reference_cases.jsonl"))) do
        check_case(model, case)
        assert.same(table.move(case.ids, 1, #case.ids, 1, {}), tokenizer:encode(case.prompt))
      end
    end)
  end

  -- How far the last row of logits may be from float32's: what the rounding of the weights makes of it.
  local TOLERANCE = { F16 = 1e-3, BF16 = 1e-2, Q8_0 = 2e-2, Q6_K = 5e-2, Q5_K_M = 0.15, Q4_0 = 0.25, Q4_K_M = 0.2 }
  for kind, tolerance in pairs(TOLERANCE) do
    support.it_with(("%s/gguf/stories260K-%s.gguf"):format(STORIES, kind), kind .. " is near float32", function(path)
      local model <close> = open(path)
      local cases, worst, loss = support.json_lines(support.find(STORIES .. "/reference_cases.jsonl")), 0, 0
      for _, case in ipairs(cases) do
        local logits = model:logits(case.ids)
        worst = math.max(worst, (logits[#case.ids]:distance(unsloth.tensor(case.last_logits))))
        loss = math.max(loss, math.abs(#case.ids > 1 and mean_nll(logits, case.ids) - case.mean_nll or 0))
      end
      assert.is_true(worst < tolerance, ("logits differ by %g"):format(worst))
      assert.is_true(loss < 4 * tolerance, ("losses differ by %g"):format(loss))
    end)
  end
end)
