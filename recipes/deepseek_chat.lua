-- Fine-tunes DeepSeek V2 or V3 on conversations with LoRA on 4-bit weights. The distills of R1 are Llamas and Qwens: see their recipes.
--
--     unsloth-lua recipes/deepseek_chat.lua --model DeepSeek-V2-Lite-Chat --dataset chats.jsonl
local recipe = require "unsloth.recipe"
local unsloth = require "unsloth"
local FastLanguageModel = unsloth.FastLanguageModel

local o = recipe.options(arg, "deepseek_chat", "Fine-tunes DeepSeek on conversations, then saves the adapter.")

-- 1. The model, its linear weights in 4 bits, and LoRA on the modules of latent attention.
local model, tokenizer = FastLanguageModel.from_pretrained {
  model_name = o.model, max_seq_length = o.max_seq_length, dtype = nil, load_in_4bit = true, device = o.device,
}
model = FastLanguageModel.get_peft_model(model, {
  r = 16, lora_alpha = 16, lora_dropout = 0, bias = "none", random_state = o.seed, use_gradient_checkpointing = "auto",
  target_modules = [[.*\.self_attn\.\w*proj\w*]], -- whether queries have latent vectors or not
})

-- 2. The conversations, which the trainer writes in the model's own format; models that only continue texts have none.
if not tokenizer.chat_template then tokenizer = unsloth.get_chat_template(tokenizer, "chatml") end
local dataset = recipe.conversations(o)

-- 3. Training: only what the assistant says counts.
local trainer = unsloth.SFTTrainer { model = model, tokenizer = tokenizer, train_dataset = dataset, args = recipe.arguments(o) }
recipe.train(unsloth.train_on_responses_only(trainer))

-- 4. A question, and saving.
local question = { { role = "user", content = o.prompt } }
recipe.ask(o, model, tokenizer:apply_chat_template(question, { tokenize = false, add_generation_prompt = true }))
recipe.save(o, model, tokenizer)
