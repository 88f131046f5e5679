--- The chat templates that have names. Their texts lie in the folder templates/, one file each.
---   stop     the token that ends a turn ("eos_token": the tokenizer's own)
---   system   the default system message, which get_chat_template's system_message replaces
---   file     another name's text
local core = require "unsloth.core"
local errors = require "unsloth.errors"

local M = {}

local ALPACA_SYSTEM = "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
local VICUNA_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions."

M.list = {
  ["alpaca"] = { stop = "eos_token", system = ALPACA_SYSTEM },
  ["chatml"] = { stop = "<|im_end|>" },
  ["gemma"] = { stop = "<end_of_turn>" },
  ["gemma-2"] = { stop = "<end_of_turn>" },
  ["gemma-3"] = { stop = "<end_of_turn>" },
  ["llama"] = { stop = "eos_token" },
  ["llama-3"] = { stop = "<|eot_id|>" },
  ["llama-3.1"] = { stop = "<|eot_id|>" },
  ["llama-3.2"] = { stop = "<|eot_id|>", file = "llama-3.1" },
  ["llama-3.3"] = { stop = "<|eot_id|>", file = "llama-3.1" },
  ["mistral"] = { stop = "eos_token" },
  ["phi-3"] = { stop = "<|end|>" },
  ["phi-3.5"] = { stop = "<|end|>", file = "phi-3" },
  ["phi-4"] = { stop = "<|im_end|>" },
  ["qwen-2.5"] = { stop = "<|im_end|>", system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." },
  ["qwen-3"] = { stop = "<|im_end|>" },
  ["unsloth"] = { stop = "eos_token", system = "You are a helpful assistant to the user" },
  ["vicuna"] = { stop = "eos_token", system = VICUNA_SYSTEM },
  ["zephyr"] = { stop = "eos_token" },
}

-- Other spellings that are in use.
local ALIASES = {
  ["llama3"] = "llama-3", ["llama-31"] = "llama-3.1", ["llama3.1"] = "llama-3.1", ["llama-32"] = "llama-3.2", ["llama3.2"] = "llama-3.2",
  ["llama-33"] = "llama-3.3", ["llama3.3"] = "llama-3.3", ["gemma2"] = "gemma-2", ["gemma3"] = "gemma-3", ["phi-35"] = "phi-3.5",
  ["qwen-25"] = "qwen-2.5", ["qwen25"] = "qwen-2.5", ["qwen2.5"] = "qwen-2.5", ["qwen3"] = "qwen-3", ["llama-2"] = "llama", ["llama2"] = "llama",
}

local folder = debug.getinfo(1, "S").source:match "^@(.*)%.lua$" .. "/"

--- The entry and the text of a name.
function M.get(name)
  local key = ALIASES[name] or name
  local entry = M.list[key]
  if not entry then
    local names = {}
    for known in pairs(M.list) do names[#names + 1] = known end
    table.sort(names)
    local nearest = core.nearest(name, names)
    errors.invalid('get_chat_template does not know "%s"%s; it knows %s', name, nearest and (': did you mean "%s"?'):format(nearest) or "",
      table.concat(names, ", "))
  end
  local path = folder .. (entry.file or key) .. ".jinja"
  local file, why = io.open(path, "rb")
  if not file then errors.raise("USL_ERR_IO", "the template's file cannot be read: %s", why) end
  local text = file:read "a"
  file:close()
  return entry, text
end

return M
