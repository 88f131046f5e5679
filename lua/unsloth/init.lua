--- unsloth: fine-tune large language models from Lua.
---
---     local unsloth = require "unsloth"
---     local model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = "model", load_in_4bit = true }
local core = require "unsloth.core"
local arguments = require "unsloth.arguments"
local chat = require "unsloth.chat"
local dataset = require "unsloth.dataset"
local gradcheck = require "unsloth.gradcheck"
local model = require "unsloth.model"
local plot = require "unsloth.plot"
local sft = require "unsloth.sft"
local tensor = require "unsloth.tensor"
local tokenizer = require "unsloth.tokenizer"
require "unsloth.inside"
require "unsloth.save"
require "unsloth.show"
require("unsloth.report").listen()

local M = { _VERSION = core.version }

M.FastLanguageModel = model.FastLanguageModel
M.FastModel = model.FastLanguageModel

M.AutoTokenizer = tokenizer.AutoTokenizer
M.add_new_tokens = model.add_new_tokens
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
M.zeros, M.ones, M.full, M.eye = tensor.zeros, tensor.ones, tensor.full, tensor.eye
M.arange, M.rand, M.randn, M.cat = tensor.arange, tensor.rand, tensor.randn, tensor.cat
M.gradcheck = gradcheck.gradcheck
M.plot = plot.plot
M.printable = core.printable
M.json = core.json
M.safetensors = { load = core.safetensors_load, save = core.safetensors_save }
M.quant = { quantize = core.quantize, dequantize = core.dequantize }

--- Prints what is known of a function, a class, a module, a value or an option.
---
---     unsloth.help(unsloth.plot)
---     unsloth.help "learning_rate"
---@param x any a value, or the name of a topic; nil lists what there is
function M.help(x)
  print(require("unsloth.doc").text(x))
end

--- bfloat16 computes everywhere here.
---
---     print(unsloth.is_bfloat16_supported())
function M.is_bfloat16_supported() return true end
M.is_bf16_supported = M.is_bfloat16_supported

return M
