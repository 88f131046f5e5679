-- Fine-tunes Mixtral on conversations with LoRA on 4-bit weights: on attention and on every expert, with the loss that keeps their load even.
--
--     unsloth-lua recipes/mixtral_chat.lua --model Mixtral-8x7B-Instruct-v0.1 --dataset chats.jsonl
local recipe = require "unsloth.recipe"
local unsloth = require "unsloth"
local FastLanguageModel = unsloth.FastLanguageModel

local o = recipe.options(arg, "mixtral_chat", "Fine-tunes Mixtral on conversations, then saves the adapter.")

-- 1. The model, its linear weights in 4 bits, and LoRA on the modules of its blocks; those of the MLP are the experts'.
local model, tokenizer = FastLanguageModel.from_pretrained {
  model_name = o.model, max_seq_length = o.max_seq_length, dtype = nil, load_in_4bit = true, device = o.device,
}
model = FastLanguageModel.get_peft_model(model, {
  r = 16, lora_alpha = 16, lora_dropout = 0, bias = "none", random_state = o.seed, use_gradient_checkpointing = "auto",
  target_modules = { "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj" },
})

-- 2. The conversations, which the trainer writes in the model's own format.
tokenizer = unsloth.get_chat_template(tokenizer, "mistral")
local dataset = recipe.conversations(o)

-- 3. Training: only what the assistant says counts, and routing that leaves experts idle costs a little.
local arguments = recipe.arguments(o)
arguments.router_aux_loss_coef = 0.001
local trainer = unsloth.SFTTrainer { model = model, tokenizer = tokenizer, train_dataset = dataset, args = arguments }
recipe.train(unsloth.train_on_responses_only(trainer))

-- 4. A question, and saving.
local question = { { role = "user", content = o.prompt } }
recipe.ask(o, model, tokenizer:apply_chat_template(question, { tokenize = false, add_generation_prompt = true }))
recipe.save(o, model, tokenizer)
