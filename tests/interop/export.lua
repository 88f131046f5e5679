--- Gives a model an adapter of random weights (both halves, so that it changes the answers) and saves it in every way.
---
---     unsloth-lua tests/interop/export.lua MODEL OUT_DIR [GGUF_METHOD ...]
---
--- Leaves OUT_DIR/adapter, OUT_DIR/merged and OUT_DIR/METHOD/*.gguf.
local unsloth = require "unsloth"

local source, out = arg[1], arg[2]
local methods = table.move(arg, 3, #arg, 1, {})
local model, tokenizer = unsloth.FastLanguageModel.from_pretrained {
  model_name = source, dtype = "float32", load_in_4bit = false, device = "cpu",
}
-- Merged twice by some tests: a larger one makes scores so sharp that float32 itself is seen.
model = unsloth.FastLanguageModel.get_peft_model(model, { r = 4, lora_alpha = 2, target_modules = "all-linear", init_lora_weights = false, random_state = 1 })
model:save_pretrained(out .. "/adapter")
model:save_pretrained_merged(out .. "/merged", tokenizer, { save_method = "merged_16bit" })
for _, method in ipairs(methods) do
  model:save_pretrained_gguf(out .. "/" .. method, tokenizer, { quantization_method = method })
end
