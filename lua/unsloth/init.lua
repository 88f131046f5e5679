--- unsloth: fine-tune large language models from Lua.
---
---     local unsloth = require "unsloth"
---     local model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = "model", load_in_4bit = true }
local core = require "unsloth.core"
local arguments = require "unsloth.arguments"
local chat = require "unsloth.chat"
local dataset = require "unsloth.dataset"
local model = require "unsloth.model"
require "unsloth.save"
local sft = require "unsloth.sft"
local tokenizer = require "unsloth.tokenizer"

local M = { _VERSION = core.version }

M.FastLanguageModel = model.FastLanguageModel
M.FastModel = model.FastLanguageModel

M.AutoTokenizer = tokenizer.AutoTokenizer
M.get_chat_template = chat.get_chat_template
M.chat_template = chat.chat_template

M.load_dataset = dataset.load_dataset
M.dataset_from_list = dataset.from_list
M.standardize_data_formats = dataset.standardize_data_formats
M.standardize_sharegpt = dataset.standardize_data_formats

M.SFTTrainer = sft.SFTTrainer
M.UnslothTrainer = sft.SFTTrainer
M.train_on_responses_only = sft.train_on_responses_only
M.TrainingArguments = arguments.new
M.SFTConfig = arguments.new
M.UnslothTrainingArguments = arguments.new
M.defaults = arguments.defaults

M.tensor = core.tensor
M.json = core.json
M.safetensors = { load = core.safetensors_load, save = core.safetensors_save }
M.quant = { quantize = core.quantize, dequantize = core.dequantize }

--- bfloat16 computes everywhere here.
function M.is_bfloat16_supported() return true end
M.is_bf16_supported = M.is_bfloat16_supported

return M
