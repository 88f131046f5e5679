--- The chat templates that have names. Their texts lie in the folder templates/, one file each.
---   stop     the token that ends a turn ("eos_token": the tokenizer's own)
---   system   the default system message: it stands where the text says {system_message}
---   file     another name's text
local core = require "unsloth.core"
local errors = require "unsloth.errors"

local M = {}

local IM_END, EOT, END_OF_TURN = "<|im_end|>", "<|eot_id|>", "<end_of_turn>"

M.list = {
  ["alpaca"] = { stop = "eos_token",
    system = "Below are some instructions that describe some tasks. Write responses that appropriately complete each request." },
  ["chatml"] = { stop = IM_END },
  ["gemma"] = { stop = END_OF_TURN },
  ["gemma2"] = { stop = END_OF_TURN, file = "gemma" },
  ["gemma-3"] = { stop = END_OF_TURN },
  ["lfm-2"] = { stop = IM_END },
  ["llama"] = { stop = "eos_token" },
  ["llama-3"] = { stop = EOT },
  ["llama-3.1"] = { stop = EOT, system = "" },
  ["llama-3.2"] = { stop = EOT, system = "", file = "llama-3.1" },
  ["llama-3.3"] = { stop = EOT, system = "", file = "llama-3.1" },
  ["mistral"] = { stop = "eos_token" },
  ["phi-3"] = { stop = "<|end|>" },
  ["phi-4"] = { stop = IM_END },
  ["qwen-2.5"] = { stop = IM_END, system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." },
  ["qwen-3"] = { stop = IM_END },
  ["qwen3-instruct"] = { stop = IM_END },
  ["qwen3-thinking"] = { stop = IM_END },
  ["starling"] = { stop = "<|end_of_turn|>" },
  ["unsloth"] = { stop = "eos_token", system = "You are a helpful assistant to the user" },
  ["vicuna"] = { stop = "eos_token", system = "A chat between a curious user and an artificial intelligence assistant. "
    .. "The assistant gives helpful, detailed, and polite answers to the user's questions." },
  ["vicuna_old"] = { stop = "eos_token", system = "A chat between a curious human and an artificial intelligence assistant. "
    .. "The assistant gives helpful, detailed, and polite answers to the human's questions." },
  ["yi-chat"] = { stop = IM_END },
  ["zephyr"] = { stop = "eos_token" },
}

-- Other spellings that are in use.
M.aliases = {
  ["llama-2"] = "llama", ["llama2"] = "llama", ["llama3"] = "llama-3", ["llama-31"] = "llama-3.1", ["llama3.1"] = "llama-3.1",
  ["llama-32"] = "llama-3.2", ["llama3.2"] = "llama-3.2", ["llama-33"] = "llama-3.3", ["llama3.3"] = "llama-3.3",
  ["gemma-2"] = "gemma2", ["gemma3"] = "gemma-3", ["lfm-2.5"] = "lfm-2",
  ["phi3"] = "phi-3", ["phi-35"] = "phi-3", ["phi-3.5"] = "phi-3", ["phi4"] = "phi-4",
  ["qwen-25"] = "qwen-2.5", ["qwen25"] = "qwen-2.5", ["qwen2.5"] = "qwen-2.5", ["qwen3"] = "qwen-3",
  ["qwen-2.5-coder"] = "qwen-2.5", ["qwen-25-coder"] = "qwen-2.5", ["qwen2.5-coder"] = "qwen-2.5", ["qwen25-coder"] = "qwen-2.5",
  ["vicuna old"] = "vicuna_old",
}

local folder = debug.getinfo(1, "S").source:match "^@(.*)%.lua$" .. "/"

--- The entry and the text of a name.
function M.get(name)
  local key = M.aliases[name] or name
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
