-- Fine-tunes Mistral on instructions with LoRA on 4-bit weights: no chat template, but the prompt that Alpaca's rows were made for.
--
--     unsloth-lua recipes/mistral_alpaca.lua --model Mistral-7B-v0.3 --dataset alpaca.json
local recipe = require "unsloth.recipe"
local unsloth = require "unsloth"
local FastLanguageModel = unsloth.FastLanguageModel

local o = recipe.options(arg, "mistral_alpaca", "Fine-tunes Mistral on instructions, then saves the adapter.")

-- 1. The model, its linear weights in 4 bits, and LoRA on the modules of its blocks.
local model, tokenizer = FastLanguageModel.from_pretrained {
  model_name = o.model, max_seq_length = o.max_seq_length, dtype = nil, load_in_4bit = true, device = o.device,
}
model = FastLanguageModel.get_peft_model(model, {
  r = 16, lora_alpha = 16, lora_dropout = 0, bias = "none", random_state = o.seed, use_gradient_checkpointing = "auto",
  target_modules = { "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj" },
})

-- 2. Each row becomes one text that ends with EOS, or the model would never learn to stop.
local INSTRUCTION, RESPONSE = "### Instruction:\n", "### Response:\n"

local function prompt_of(text)
  return "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    .. INSTRUCTION .. text .. "\n\n" .. RESPONSE
end

local dataset = recipe.conversations(o):map(function(row)
  local said = {}
  for _, message in ipairs(row.messages) do said[message.role] = said[message.role] or message.content end
  return { text = prompt_of(said.user) .. said.assistant .. tokenizer.eos_token }
end)

-- 3. Training: only the responses count.
local trainer = unsloth.SFTTrainer {
  model = model, tokenizer = tokenizer, train_dataset = dataset, dataset_text_field = "text", args = recipe.arguments(o),
}
recipe.train(unsloth.train_on_responses_only(trainer, { instruction_part = INSTRUCTION, response_part = RESPONSE }))

-- 4. A question, and saving.
recipe.ask(o, model, prompt_of(o.prompt))
recipe.save(o, model, tokenizer)
