--- Exports a model with its trained adapter.
---
---     unsloth-lua tests/interop/export_adapter.lua ADAPTER_DIR OUT_DIR GGUF_METHOD ...
local unsloth = require "unsloth"

local model, tokenizer = unsloth.FastLanguageModel.from_pretrained {
  model_name = arg[1], dtype = "float32", load_in_4bit = false, device = "cpu",
}
for i = 3, #arg do model:save_pretrained_gguf(arg[2], tokenizer, { quantization_method = arg[i] }) end
