--- Tokenizers: AutoTokenizer, and what transformers' tokenizers answer to.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local options = require "unsloth.options"

local M = {}
---@class unsloth.Tokenizer
local Tokenizer = core.Tokenizer

local OPEN = {
  use_fast = { "boolean", default = true, refuse = "there is one tokenizer, and it is the fast one" },
  trust_remote_code = { "boolean", default = false, refuse = "no code of a model is run" },
  token = { "string|boolean", note = "nothing is downloaded" },
  revision = { "string", note = "files are taken as they lie" },
  local_files_only = { "boolean", note = "nothing is downloaded" },
  padding_side = { "string", note = "nothing is padded" },
}

M.AutoTokenizer = {}

--- Opens a folder's tokenizer.json, such a file itself, or the tokenizer inside a .gguf.
---
---     local tok = unsloth.AutoTokenizer.from_pretrained("model")
---     print(table.concat(tok:encode("Hello"), " "))
function M.AutoTokenizer.from_pretrained(path, opts)
  if type(path) == "table" then path, opts = path[1], {} end
  if type(path) ~= "string" then errors.invalid "AutoTokenizer.from_pretrained wants the path of a folder or a file" end
  options.check("AutoTokenizer.from_pretrained", opts, OPEN)
  return core.tokenizer_open(path)
end

--- The ids of one token or of several, as in transformers.
---
---     print(tokenizer:convert_tokens_to_ids(tokenizer.eos_token))
function Tokenizer:convert_tokens_to_ids(tokens)
  if type(tokens) == "string" then return self:token_to_id(tokens) or self.unk_token_id end
  local ids = {}
  for i, token in ipairs(tokens) do ids[i] = self:token_to_id(token) or self.unk_token_id or false end
  return ids
end

--- The spelling of one id or of several, as in transformers.
---
---     print(tokenizer:convert_ids_to_tokens(5))
function Tokenizer:convert_ids_to_tokens(ids)
  if type(ids) == "number" then return self:id_to_token(ids) end
  local tokens = {}
  for i, id in ipairs(ids) do tokens[i] = self:id_to_token(id) or false end
  return tokens
end

--- Ids of a text with what the tokenizer adds around it, but never a second BOS: for the trainer and for generate.
---
---     print(#tokenizer:encode_once "Hello")
function Tokenizer:encode_once(text)
  local ids = self:encode(text)
  local bos = self.bos_token_id
  if bos and ids[1] == bos and ids[2] == bos then table.remove(ids, 1) end
  return ids
end

return M
