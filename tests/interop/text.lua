--- What a model makes of a text, for the comparisons with other programs.
---
---     unsloth-lua tests/interop/text.lua MODEL OUT.json COUNT TEXT
---
--- Writes { ids = those of the text, text = the greedy answer of up to COUNT ids }.
local unsloth = require "unsloth"

local model, tokenizer = unsloth.FastLanguageModel.from_pretrained {
  model_name = arg[1], dtype = "float32", load_in_4bit = false, device = "cpu",
}
local text = model:generate(arg[4], { max_new_tokens = tonumber(arg[3]), temperature = 0 })
local file <close> = assert(io.open(arg[2], "w"))
file:write(unsloth.json.encode { ids = tokenizer:encode_once(arg[4]), text = text })
