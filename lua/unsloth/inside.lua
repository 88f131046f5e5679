--- A look inside a model: its tree of parameters, hidden states, attention, and what each layer would say.
---
---     print(model:layer(3).q_proj.weight)
---     print(model:logit_lens "The capital of France is")
local core = require "unsloth.core"
local errors = require "unsloth.errors"

local M = {}
---@class unsloth.Model
local Model = core.Model

-- ---- The tree of parameters -----------------------------------------------------------------------------------------

-- A node knows its children by name, in the model's order; a leaf has a parameter. Adapters' matrices hang under the weight
-- they belong to.
local Node = { __name = "unsloth.Node" }

local function new_node(model, path)
  return setmetatable({ ["model "] = model, ["path "] = path, ["names "] = {}, ["children "] = {} }, Node)
end

local function child(node, name)
  local found = rawget(node, "children ")[name]
  if not found then
    local path = rawget(node, "path ")
    found = new_node(rawget(node, "model "), path == "" and name or path .. "." .. name)
    rawget(node, "children ")[name] = found
    local names = rawget(node, "names ")
    names[#names + 1] = name
  end
  return found
end

--- The tree of a model's parameters: node.children by name, leaves are parameters.
local function tree_of(model)
  local root = new_node(model, "")
  for _, p in ipairs(model:param_list()) do
    local node = root
    for word in p.name:gsub("^base_model%.model%.", ""):gmatch "[^.]+" do node = child(node, word) end
    rawset(node, "param ", p)
  end
  return root
end

-- A name may leave out what stands between: layer.q_proj is layer.self_attn.q_proj when only one is called so.
local function search(node, name)
  local children = rawget(node, "children ")
  if children[name] then return children[name] end
  for _, inner in ipairs(rawget(node, "names ")) do
    local found = search(children[inner], name)
    if found then return found end
  end
end

local function all_names(node, into)
  for _, name in ipairs(rawget(node, "names ")) do
    into[#into + 1] = name
    all_names(rawget(node, "children ")[name], into)
  end
  return into
end

-- A leaf is its tensor.
local function value_of(node)
  local p = rawget(node, "param ")
  return p and rawget(node, "model "):get_param(p.name) or node
end

function Node.__index(node, key)
  if type(key) == "number" then key = ("%d"):format(key) end
  local found = search(node, tostring(key))
  if found then return value_of(found) end
  local nearest = core.nearest(tostring(key), all_names(node, {}))
  local path = rawget(node, "path ")
  errors.raise("USL_ERR_NOT_FOUND", '%s has no part "%s"%s', path == "" and "the model" or path, key,
    nearest and (': did you mean "%s"?'):format(nearest) or "")
end

--- The names under a node, for completion.
function M.names(node)
  return getmetatable(node) == Node and all_names(node, {}) or nil
end

--- The children of a node in order, and its parameter: for printing.
function M.parts(node)
  return rawget(node, "names "), rawget(node, "children "), rawget(node, "param "), rawget(node, "path ")
end

function Node.__tostring(node)
  return require("unsloth.show").tree(node)
end

--- The tree of all parameters. Fields are their names; what stands between may be left out.
---
---     print(model:tree().embed_tokens.weight)
---@return table
function Model:tree()
  return tree_of(self)
end

--- A layer, counted from 0 as published names do. Its fields are modules, theirs are weights: each is a tensor, decoded.
---
---     print(model:layer(0).q_proj.weight)
---@param number integer from 0
---@return table
function Model:layer(number)
  local layers = self:info().layers
  if math.type(number) ~= "integer" or number < 0 or number >= layers then
    errors.invalid("layer(%s): this model has layers 0 to %d", number, layers - 1)
  end
  local node = rawget(search(tree_of(self), "layers"), "children ")
  return node[("%d"):format(number)]
end

-- ---- What layers do -------------------------------------------------------------------------------------------------

local function ids_of(model, prompt)
  if type(prompt) == "table" then return prompt end
  if not model.tokenizer then errors.invalid "this model came without a tokenizer: give an array of token ids" end
  return model.tokenizer:encode_once(prompt)
end

local hidden_states, attentions = Model.hidden_states, Model.attentions

--- What goes into each layer, and last what the final norm gives: a tensor of (layers + 1, tokens, hidden), as transformers'
--- output_hidden_states.
---
---     print(model:hidden_states("Hello").shape)
---@param prompt string|integer[] a text, or token ids
---@return unsloth.Tensor
function Model:hidden_states(prompt)
  return hidden_states(self, ids_of(self, prompt))
end

--- How much each token looks at each one before it: a tensor of (heads, tokens, tokens) for one layer.
---
---     print(model:attentions("Hello", 0):mean(1))
---@param prompt string|integer[] a text, or token ids
---@param layer integer from 0
---@return unsloth.Tensor
function Model:attentions(prompt, layer)
  return attentions(self, ids_of(self, prompt), layer)
end

local Lens = { __name = "unsloth.Lens" }

function Lens.__tostring(lens)
  return require("unsloth.show").lens(lens)
end

--- The logit lens: the token that each layer would say next, if it were the last one. lens[i] is what goes into layer i - 1:
--- { token, id, probability } for the last token of the prompt, lens.logits a tensor of (layers + 1, vocabulary).
---
---     print(model:logit_lens "Once upon a")
---@param prompt string|integer[] a text, or token ids
---@return table
function Model:logit_lens(prompt)
  local ids = ids_of(self, prompt)
  local states = hidden_states(self, ids)
  local layers = states.shape[1] - 1
  local logits = { self:unembed(states[{ { 1, layers }, #ids }]), self:logits(ids)[{ { #ids, #ids }, {} }] }
  local all = require("unsloth.tensor").cat(logits, 1)
  local lens = setmetatable({ logits = all, tokens = ids }, Lens)
  for i = 1, layers + 1 do
    local id = all[i]:argmax_id()
    lens[i] = { id = id, token = self.tokenizer and self.tokenizer:id_to_token(id), probability = all[i]:softmax()[id + 1] }
  end
  return lens
end

return M
