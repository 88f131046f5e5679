-- Trains a tiny model for four updates with report_to = "tensorboard" and "jsonl", a sample and an export: OUT.
local unsloth = require "unsloth"

local out = arg[1]
local model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = "examples/tiny-llama", max_seq_length = 128, load_in_4bit = true }
unsloth.FastLanguageModel.get_peft_model(model, { r = 4 })
local ds = unsloth.load_dataset("examples/instructions.json"):select { 1, 2, 3, 4, 5, 6, 7, 8 }
ds = ds:map(function(row) return { text = row.instruction .. "\n" .. row.output .. tokenizer.eos_token } end)
local trainer = unsloth.SFTTrainer { model = model, train_dataset = ds, eval_dataset = ds, args = { max_steps = 4, per_device_train_batch_size = 2,
  gradient_accumulation_steps = 1, learning_rate = 1e-3, save_strategy = "no", output_dir = out, report_to = { "tensorboard", "jsonl" },
  eval_strategy = "steps", eval_steps = 2 } }
trainer:train()
trainer:add_sample("Name three colors.", "before", model:generate("Name three colors.\n", { max_new_tokens = 8 }))
model:save_pretrained(out .. "/adapter")
