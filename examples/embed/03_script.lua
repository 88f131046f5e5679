-- What 03_lua_host runs: training on the host's rows, then on the answers that the host likes best.
local path = ...
local model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = path, load_in_4bit = true }
model = unsloth.FastLanguageModel.get_peft_model(model, { r = 8, lora_alpha = 8 })

local function train(rows, steps, rate)
  local trainer = unsloth.SFTTrainer { model = model, tokenizer = tokenizer, train_dataset = unsloth.dataset_from_list(rows),
    args = { per_device_train_batch_size = 4, gradient_accumulation_steps = 1, max_steps = steps, learning_rate = rate,
      logging_steps = 10, save_strategy = "no", report_to = "none" } }
  local last
  for _, s in trainer:steps() do last = s.loss end
  return last
end

local rows, i = {}, 1
for row in function() i = i + 1; return host_row(i - 1) end do rows[#rows + 1] = row end
print(("loss %.3f after the host's %d rows"):format(train(rows, 30, 5e-3), #rows))

-- Several answers to one prompt; the best teaches.
local function sample(n)
  local best, total = nil, 0
  for seed = 1, n do
    local text = model:generate("The sky is", { max_new_tokens = 8, temperature = 1.0, seed = seed })
    local reward = host_reward(text)
    total = total + reward
    if not best or reward > best.reward then best = { text = "The sky is" .. text, reward = reward } end
  end
  return best, total / n
end

local best, before = sample(6)
train({ best, best, best, best }, 15, 3e-3)
local _, after = sample(6)
print(("mean reward %.2f -> %.2f"):format(before, after))
assert(after >= before, "what the host likes was not learned")
