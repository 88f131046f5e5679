--- What the recipes share: their options, the rows of a chat data set, the settings of a training run, saving. What a recipe is about (the
--- model, its modules, its template) stands in the recipe itself.
local args = require "unsloth.args"
local errors = require "unsloth.errors"
local progress = require "unsloth.progress"
local unsloth = require "unsloth"

local M = {}

--- Reads the options of a recipe `recipes/<name>.lua` and makes its output folder. `defaults` may hold learning_rate and prompt.
---
---     local o = recipe.options(arg, "qwen3_chat", "Fine-tunes Qwen 3 on conversations.", { learning_rate = 2e-4 })
---@param words table the arguments
function M.options(words, name, about, defaults)
  local d = defaults or {}
  local o = args.parse(words, { name = ("recipes/%s.lua"):format(name), about = about, options = {
    { "model", "PATH", "a model folder or a .gguf" },
    { "dataset", "FILE", "JSON, JSON lines or .csv: conversations, or rows of instruction, input, output\n"
      .. "(default: examples/instructions.json)" },
    { "max-steps", "N", "updates", 60, within = { 1 } },
    { "output", "DIR", "where the adapter and the GGUF go", "outputs/" .. name },
    { "device", "NAME", "cpu, cuda, cuda:1 (default: the best there is)" },
    { "seed", "N", "of the adapter and the row order", 3407, within = { 0 } },
    { "learning-rate", "X", "the highest rate", d.learning_rate or 2e-4, within = { 0, 1 } },
    { "max-seq-length", "N", "the longest row in tokens (default: 2048, or the model's own when that is less)", 0, within = { 0 } },
    { "batch", "N", "rows of a batch", 2, within = { 1 } },
    { "accumulation", "N", "batches of an update", 4, within = { 1 } },
    { "save-steps", "N", "updates between checkpoints, of which the newest two are kept; 0: none", 0, within = { 0 } },
    { "resume", nil, "go on from the newest checkpoint in --output" },
    { "prompt", "TEXT", "what to ask in the end", d.prompt or "Name three colors." },
    { "gguf", "METHOD", "also save a GGUF: q4_k_m, q8_0, f16, bf16, f32" },
  } })
  if not o.model then errors.invalid("recipes/%s.lua wants --model PATH, a model folder or a .gguf", name) end
  if not o.dataset then
    local root = words[0]:match "^(.-)recipes/[^/]*$" or (words[0]:match "^(.*)/[^/]*$" or ".") .. "/../"
    o.dataset = root .. "examples/instructions.json"
  end
  args.output_dir(o.output)
  args.resume_dir(o.resume, o.output)
  return o
end

--- The rows of --dataset, each with `messages`, whatever format they came in.
function M.conversations(o)
  local kind = o.dataset:lower():find "%.csv$" and "csv" or "json"
  return unsloth.standardize_data_formats(unsloth.load_dataset(kind, { data_files = o.dataset, split = "train" }))
end

--- The settings of a run, those of Unsloth's notebooks; `more` adds to them.
function M.arguments(o, more)
  local settings = {
    per_device_train_batch_size = o.batch, gradient_accumulation_steps = o.accumulation, warmup_steps = math.min(5, o.max_steps - 1),
    max_steps = o.max_steps, learning_rate = o.learning_rate, logging_steps = 1, optim = "adamw_8bit", weight_decay = 0.01,
    lr_scheduler_type = "linear", seed = o.seed, output_dir = o.output, resume_from_checkpoint = o.resume,
    save_strategy = o.save_steps > 0 and "steps" or "no", save_steps = math.max(1, o.save_steps), save_total_limit = 2,
  }
  for key, value in pairs(more or {}) do settings[key] = value end
  return unsloth.TrainingArguments(settings)
end

--- Trains and says how it went.
function M.train(trainer)
  local stats = trainer:train()
  local log = stats.log_history
  print(("loss %.4f -> %.4f, %.0f s, peak memory %s"):format(log[1].loss, log[#log].loss, stats.metrics.train_runtime,
    progress.bytes(stats.metrics.peak_memory)))
  return stats
end

--- Asks the trained model `text`, the prompt of the recipe as its template writes it.
function M.ask(o, model, text)
  print(("\n--- Reply to: %s\n%s\n---\n"):format(o.prompt, unsloth.printable(model:generate(text, { max_new_tokens = 48 }))))
end

--- The adapter with its tokenizer, for PEFT and for us; a GGUF when --gguf asks for one.
function M.save(o, model, tokenizer)
  model:save_pretrained(o.output .. "/adapter")
  tokenizer:save_pretrained(o.output .. "/adapter")
  print("adapter: " .. o.output .. "/adapter")
  if not o.gguf then return end
  for _, path in ipairs(model:save_pretrained_gguf(o.output .. "/gguf", tokenizer, { quantization_method = o.gguf })) do
    print("gguf: " .. path)
  end
end

return M
