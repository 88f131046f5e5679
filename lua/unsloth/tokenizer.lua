--- Tokenizers: AutoTokenizer, and what transformers' tokenizers answer to.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local hub = require "unsloth.hub"
local options = require "unsloth.options"

local M = {}
---@class unsloth.Tokenizer
local Tokenizer = core.Tokenizer

local OPEN = {
  use_fast = { "boolean", default = true, refuse = "there is one tokenizer, and it is the fast one" },
  trust_remote_code = { "boolean", default = false, refuse = "no code of a model is run" },
  token = { "string|boolean" }, -- these three: of a name of the hub
  revision = { "string" },
  local_files_only = { "boolean" },
  padding_side = { "string", note = "nothing is padded" },
}

M.AutoTokenizer = {}

--- Opens a folder's tokenizer.json, such a file itself, or the tokenizer inside a .gguf; or what a name of the hub stands for.
---
---     local tok = unsloth.AutoTokenizer.from_pretrained("model")
---     print(table.concat(tok:encode("Hello"), " "))
function M.AutoTokenizer.from_pretrained(path, opts)
  if type(path) == "table" then path, opts = path[1], {} end
  if type(path) ~= "string" then errors.invalid "AutoTokenizer.from_pretrained wants the path of a folder or a file" end
  local o = options.check("AutoTokenizer.from_pretrained", opts, OPEN)
  if not core.path_kind(path) and core.hub_is_name(path) then
    path = hub.find(path, { token = o.token, revision = o.revision, local_files_only = o.local_files_only, tokenizer_only = true })
  end
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

--- Adds tokens, which become their id wherever they stand in a text; returns how many are new. Rows of a model follow by
--- model:resize_token_embeddings(#tokenizer).
---
---     print(tokenizer:add_tokens { "<think>", "</think>" })
---@param tokens string|string[]
---@param special_tokens boolean|{ special_tokens: boolean }|nil true: decode leaves them out with skip_special_tokens
---@return integer
function Tokenizer:add_tokens(tokens, special_tokens)
  if type(special_tokens) == "table" then
    special_tokens = options.check("add_tokens", special_tokens, { special_tokens = { "boolean", default = false } }).special_tokens
  end
  return self:extend(type(tokens) == "string" and { tokens } or tokens, special_tokens)
end

local SPECIALS = { bos_token = "bos", eos_token = "eos", pad_token = "pad", unk_token = "unk" }
local SPECIAL_SPEC = { additional_special_tokens = { "table" } }
for name in pairs(SPECIALS) do SPECIAL_SPEC[name] = { "string" } end

--- Adds special tokens by what they are for; returns how many are new.
---
---     print(tokenizer:add_special_tokens { pad_token = "<|pad|>", additional_special_tokens = { "<|tool|>" } })
---@param tokens table bos_token, eos_token, pad_token, unk_token, additional_special_tokens
---@return integer
function Tokenizer:add_special_tokens(tokens)
  local o = options.check("add_special_tokens", tokens, SPECIAL_SPEC)
  local list = {}
  for _, name in ipairs { "bos_token", "eos_token", "unk_token", "pad_token" } do
    if o[name] then list[#list + 1] = o[name] end
  end
  for _, token in ipairs(o.additional_special_tokens or {}) do list[#list + 1] = token end
  local added = self:extend(list, true)
  for name, which in pairs(SPECIALS) do
    if o[name] then self:set_special(which, self:token_to_id(o[name])) end
  end
  return added
end

-- What the post-processor puts in front and behind.
local function around(self)
  local bare, whole = self:encode("a", { add_special_tokens = false }), self:encode "a"
  local before, after, from = {}, {}, 0
  while from < #whole - #bare and whole[from + 1] ~= bare[1] do from = from + 1 end
  table.move(whole, 1, from, 1, before)
  table.move(whole, from + #bare + 1, #whole, 1, after)
  return before, after
end

local CALL = {
  add_special_tokens = { "boolean", default = true },
  padding = { "boolean|string", default = false },
  truncation = { "boolean|string", default = false },
  max_length = { "integer" },
  padding_side = { "string", default = "right" },
  return_attention_mask = { "boolean", default = true },
  return_tensors = { "string|boolean", refuse = "ids are arrays; unsloth.tensor(ids) makes a tensor" },
}

local function cut(self, list, o)
  local before, after = {}, {}
  if o.add_special_tokens then before, after = around(self) end
  local room = o.max_length - #before - #after
  if room < 0 then errors.invalid("max_length is %d, and the tokenizer adds %d tokens", o.max_length, #before + #after) end
  for i, ids in ipairs(list) do
    if #ids > o.max_length then
      local kept = table.move(before, 1, #before, 1, {})
      table.move(ids, #before + 1, #before + room, #before + 1, kept)
      list[i] = table.move(after, 1, #after, #kept + 1, kept)
    end
  end
end

local function pad(self, list, masks, o)
  local length = 0
  for _, ids in ipairs(list) do length = math.max(length, #ids) end
  if o.padding == "max_length" then
    if not o.max_length then errors.invalid 'padding = "max_length" needs max_length' end
    length = o.max_length
  end
  local filler = self.pad_token_id
  if not filler then errors.invalid 'padding: the tokenizer has no pad token; set_special("pad", id) gives it one' end
  for i, ids in ipairs(list) do
    local missing = length - #ids
    if missing > 0 then
      local fill, zeros = {}, {}
      for k = 1, missing do fill[k], zeros[k] = filler, 0 end
      local left = o.padding_side == "left"
      list[i] = left and table.move(ids, 1, #ids, missing + 1, fill) or table.move(fill, 1, missing, #ids + 1, ids)
      masks[i] = left and table.move(masks[i], 1, #masks[i], missing + 1, zeros) or table.move(zeros, 1, missing, #masks[i] + 1, masks[i])
    end
  end
end

--- What transformers' tokenizers answer when they are called, and what tokenizer(text) is: { input_ids, attention_mask } of
--- a text, or of an array of them, whose ids are made on all threads. Options: add_special_tokens, padding (true or
--- "longest", "max_length"), truncation, max_length, padding_side ("right", "left"), return_attention_mask.
---
---     local batch = tokenizer({ "Hello", "Hello again" }, { truncation = true, max_length = 4 })
---     print(#batch.input_ids[1], #batch.input_ids[2])
---@param text string|string[]
---@param opts table|nil
---@return table
function Tokenizer:encode_plus(text, opts)
  local o = options.check("tokenizer(text)", opts, CALL)
  local one = type(text) == "string"
  local list = self:encode_batch(one and { text } or text, { add_special_tokens = o.add_special_tokens })
  if o.padding == "do_not_pad" then o.padding = false end
  if o.padding and o.padding ~= true and o.padding ~= "longest" and o.padding ~= "max_length" then
    errors.invalid('padding is "%s"; true, "longest", "max_length" and false are known', o.padding)
  end
  if o.padding_side ~= "right" and o.padding_side ~= "left" then errors.invalid('padding_side is "right" or "left"') end
  if o.truncation and o.truncation ~= "do_not_truncate" then
    if o.truncation ~= true and o.truncation ~= "longest_first" and o.truncation ~= "only_first" then
      errors.invalid('truncation is "%s"; true and false are known', o.truncation)
    end
    if not o.max_length then errors.invalid "truncation needs max_length" end
    cut(self, list, o)
  end
  local masks = {}
  for i, ids in ipairs(list) do
    masks[i] = {}
    for k = 1, #ids do masks[i][k] = 1 end
  end
  if o.padding then pad(self, list, masks, o) end
  local out = { input_ids = list }
  if o.return_attention_mask then out.attention_mask = masks end
  if one then
    for name, value in pairs(out) do out[name] = value[1] end
  end
  return out
end

local function once(self, ids)
  local bos = self.bos_token_id
  if bos and ids[1] == bos and ids[2] == bos then table.remove(ids, 1) end
  return ids
end

--- Ids of a text with what the tokenizer adds around it, but never a second BOS: for the trainer and for generate. Of an
--- array of texts, an array.
---
---     print(#tokenizer:encode_once "Hello")
function Tokenizer:encode_once(text)
  if type(text) == "string" then return once(self, self:encode(text)) end
  local list = self:encode_batch(text)
  for _, ids in ipairs(list) do once(self, ids) end
  return list
end

return M
