-- Fine-tunes a model on instructions with LoRA on 4-bit weights, as Unsloth's own first tutorial does: load, adapt, train, ask, save.
--
--     unsloth-lua recipes/llama3_alpaca.lua                                   the small model and the instructions of this repository
--     unsloth-lua recipes/llama3_alpaca.lua --model SmolLM2.gguf --dataset alpaca.json
local args = require "unsloth.args"
local errors = require "unsloth.errors"
local progress = require "unsloth.progress"
local unsloth = require "unsloth"
local FastLanguageModel = unsloth.FastLanguageModel

local o = args.parse(arg, {
  name = "recipes/llama3_alpaca.lua",
  about = "Fine-tunes a model on rows of instruction, input and output, then saves the adapter and a GGUF.",
  options = {
    { "model", "PATH", "a model folder or a .gguf (default: examples/tiny-llama)" },
    { "dataset", "FILE", "JSON, JSON lines or .csv with instruction, input, output (default: examples/instructions.json)" },
    { "max-steps", "N", "updates", 60, within = { 1 } },
    { "output", "DIR", "where the adapter and the GGUF go", "outputs/llama3_alpaca" },
    { "device", "NAME", "cpu (default: the best there is)" },
    { "seed", "N", "of the adapter and the row order", 3407, within = { 0 } },
    { "learning-rate", "X", "the highest rate (default 2e-4; 5e-3 for examples/tiny-llama)", within = { 0, 1 } },
    { "batch", "N", "rows of a batch", 2, within = { 1 } },
    { "accumulation", "N", "batches of an update", 4, within = { 1 } },
    { "prompt", "TEXT", "the instruction to ask before and after", "Name three colors." },
    { "save-steps", "N", "updates between checkpoints, of which the newest two are kept; 0: none", 0, within = { 0 } },
    { "resume", nil, "go on from the newest checkpoint in --output" },
    { "no-gguf", nil, "leave the GGUF out" },
  },
})

-- Without --model: what the repository ships, found beside this script.
local root = arg[0]:match "^(.-)recipes/[^/]*$" or (arg[0]:match "^(.*)/[^/]*$" or ".") .. "/../"
local model_path, rate, max_seq_length = o.model, o.learning_rate or 2e-4, 2048
if not model_path then
  model_path = root .. "examples/tiny-llama"
  -- Two million weights learn little in 60 small steps: the small model takes larger ones.
  rate = o.learning_rate or 5e-3
  -- Its own context: a longer one would stretch its positions (linear rope scaling).
  max_seq_length = 512
  print "No --model was given: this is the small model that comes with unsloth-lua, which fits a machine without a GPU."
end
local dataset_path = o.dataset or root .. "examples/instructions.json"
args.output_dir(o.output)
args.resume_dir(o.resume, o.output)

-- 1. The model, its linear weights in 4 bits.
local model, tokenizer = FastLanguageModel.from_pretrained {
  model_name = model_path, max_seq_length = max_seq_length, dtype = nil, load_in_4bit = true, device = o.device,
}
print(("%s on %s"):format(model_path, model.device))

-- 2. LoRA on all seven linear modules of each block.
model = FastLanguageModel.get_peft_model(model, {
  r = 16, lora_alpha = 16, lora_dropout = 0, bias = "none", random_state = o.seed,
  target_modules = { "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj" },
  use_gradient_checkpointing = "auto", use_rslora = false, loftq_config = nil,
})

-- 3. The data: each row becomes one text that ends with EOS, or the model would never learn to stop.
local PREFACE = "Below is an instruction that describes a task%s. Write a response that appropriately completes the request.\n\n"

local function alpaca_prompt(instruction, input)
  local with_input = input and input ~= ""
  local preface = PREFACE:format(with_input and ", paired with an input that provides further context" or "")
  local middle = with_input and "### Input:\n" .. input .. "\n\n" or ""
  return preface .. "### Instruction:\n" .. instruction .. "\n\n" .. middle .. "### Response:\n"
end

local function check_row(row, place)
  for _, column in ipairs { "instruction", "input", "output" } do
    local kind = type(row[column])
    if kind ~= "string" and kind ~= "number" and not (kind == "nil" and column == "input") then
      errors.invalid('%s: "%s" is %s; a row needs the texts instruction and output, and may have input', place, column,
        kind == "nil" and "missing" or "a " .. kind)
    end
  end
end

local kind = dataset_path:lower():find "%.csv$" and "csv" or "json"
local dataset = unsloth.load_dataset(kind, { data_files = dataset_path, split = "train" })
dataset = dataset:map(function(row, i)
  check_row(row, dataset:where(i))
  return { text = alpaca_prompt(row.instruction, row.input) .. row.output .. tokenizer.eos_token }
end)

local function show_reply(when)
  local reply = model:generate(alpaca_prompt(o.prompt), { max_new_tokens = 48 })
  print(("\n--- Reply %s training to: %s\n%s\n---\n"):format(when, o.prompt, unsloth.printable(reply)))
  return reply
end

-- 4. Training.
local before = show_reply "before"
local trainer = unsloth.SFTTrainer {
  model = model, tokenizer = tokenizer, train_dataset = dataset, dataset_text_field = "text", max_seq_length = max_seq_length,
  args = unsloth.TrainingArguments {
    per_device_train_batch_size = o.batch, gradient_accumulation_steps = o.accumulation, warmup_steps = 5, max_steps = o.max_steps,
    learning_rate = rate, logging_steps = 1, optim = "adamw_8bit", weight_decay = 0.01, lr_scheduler_type = "linear", seed = o.seed,
    save_strategy = o.save_steps > 0 and "steps" or "no", save_steps = math.max(1, o.save_steps), save_total_limit = 2, output_dir = o.output,
  },
}
local stats = trainer:train { resume_from_checkpoint = o.resume }
local log = stats.log_history
print(("loss %.4f -> %.4f, %.0f s, peak memory %s"):format(log[1].loss, log[#log].loss, stats.metrics.train_runtime,
  progress.bytes(stats.metrics.peak_memory)))
trainer:add_sample(o.prompt, before, show_reply "after")

-- 5. Saving: the adapter for PEFT and for us, the GGUF for llama.cpp and its friends.
model:save_pretrained(o.output .. "/adapter")
tokenizer:save_pretrained(o.output .. "/adapter")
print("adapter: " .. o.output .. "/adapter")
if not o.no_gguf then
  for _, path in ipairs(model:save_pretrained_gguf(o.output .. "/gguf", tokenizer, { quantization_method = "q4_k_m" })) do
    print("gguf: " .. path)
  end
end
print("report: " .. o.output .. "/report.html")
