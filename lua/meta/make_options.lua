-- Prints lua/meta/options.lua: a class for each table of options, from the very rules that the modules check with.
--
--     unsloth-lua lua/meta/make_options.lua > lua/meta/options.lua
local doc = require "unsloth.doc"

local CLASSES = {
  { "unsloth.LoadOptions", "unsloth.FastLanguageModel.from_pretrained" },
  { "unsloth.PeftOptions", "unsloth.FastLanguageModel.get_peft_model" },
  { "unsloth.TrainingArguments", "unsloth.TrainingArguments" },
  { "unsloth.SFTTrainerOptions", "unsloth.SFTTrainer" },
  { "unsloth.GenerateOptions", "Model.stream" },
  { "unsloth.LoadDatasetOptions", "unsloth.load_dataset" },
  { "unsloth.MapOptions", "Dataset.map" },
  { "unsloth.PlotOptions", "unsloth.plot" },
  { "unsloth.GradcheckOptions", "unsloth.gradcheck" },
}

local known = {}
for _, one in ipairs(doc.all()) do known[one.name] = one end

local lines = { "---@meta", "", "-- Made by lua/meta/make_options.lua from the rules in the modules. Do not edit.", "" }
for _, class in ipairs(CLASSES) do
  local spec = assert(doc.options_of(known[class[2]].value), class[2])
  local names = {}
  for name in pairs(spec) do names[#names + 1] = name end
  table.sort(names)
  lines[#lines + 1] = ("---Options of %s."):format(class[2])
  lines[#lines + 1] = "---@class " .. class[1]
  for _, name in ipairs(names) do
    local _, text = doc.option_text(name, spec[name])
    lines[#lines + 1] = ("---@field %s? %s %s"):format(name, spec[name][1], text)
  end
  lines[#lines + 1] = ""
end
local text = table.concat(lines, "\n")

if arg and arg[0] and arg[0]:find "make_options" then io.write(text) end
return text
