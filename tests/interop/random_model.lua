--- Random weights of a configuration, whose vocabulary becomes that of a tokenizer, in float32.
---
---     unsloth-lua tests/interop/random_model.lua CONFIG.json TOKENIZER_DIR OUT_DIR
local core = require "unsloth.core"
local unsloth = require "unsloth"

local file <close> = assert(io.open(arg[1]))
local config = unsloth.json.decode(file:read "a")
local tokenizer = unsloth.AutoTokenizer.from_pretrained(arg[2])
config.vocab_size = tokenizer.vocab_size
config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
local model = unsloth.FastLanguageModel.from_config(config, { random_state = 7, device = "cpu", dtype = "float32" })
core.export_merged(model, tokenizer, arg[3], "float32")
