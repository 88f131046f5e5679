--- Tensors to play with: made from tables, numbers or at random; arithmetic is element by element with broadcasting. Torch's
--- words, dimensions and positions from 1. Results are new tensors; none is changed in place.
---
---     local t = unsloth.randn(2, 3, { seed = 1 })
---     print((t * 2 + 1):softmax(), t[{ 1, { 2, 3 } }], t:sum(1))
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local options = require "unsloth.options"

local M = {}
---@class unsloth.Tensor
local Tensor = core.Tensor

-- ---- Making them ----------------------------------------------------------------------------------------------------

-- zeros(2, 3), zeros { 2, 3 } and with options behind: the lengths, and the options.
local function lengths(...)
  local words = { ... }
  local opts
  if type(words[1]) == "table" then return words[1], words[2] end
  if type(words[#words]) == "table" then opts = table.remove(words) end
  return words, opts
end

--- A tensor of zeros.
---
---     print(unsloth.zeros(2, 3))
---@param ... integer the lengths of its dimensions, or one array of them
---@return unsloth.Tensor
function M.zeros(...)
  return core.tensor_full(lengths(...), 0)
end

--- A tensor of ones.
---
---     print(unsloth.ones(2, 3) * 7)
---@param ... integer the lengths of its dimensions, or one array of them
---@return unsloth.Tensor
function M.ones(...)
  return core.tensor_full(lengths(...), 1)
end

--- A tensor that holds one value everywhere.
---
---     print(unsloth.full({ 2, 3 }, 0.5))
---@param shape integer[]
---@param value number
---@return unsloth.Tensor
function M.full(shape, value)
  return core.tensor_full(shape, value)
end

--- The numbers from first to last, both included.
---
---     print(unsloth.arange(0, 1, 0.25))
---@param first number
---@param last number|nil nil: from 1 to first
---@param step number|nil default 1
---@return unsloth.Tensor
function M.arange(first, last, step)
  if not last then first, last = 1, first end
  step = step or 1
  if step == 0 then errors.invalid "arange: a step of 0 goes nowhere" end
  return core.tensor_range(math.max(0, (last - first) / step + 1 + 1e-9) // 1, first, step)
end

--- The identity matrix.
---
---     print(unsloth.eye(3))
---@param n integer
---@return unsloth.Tensor
function M.eye(n)
  local rows = core.tensor_reshape(core.tensor_range(n, 1, 1), { n, 1 })
  return rows:eq(core.tensor_range(n, 1, 1))
end

local RANDOM = { seed = { "integer", default = 3407 } }

--- Numbers drawn from the normal distribution of mean 0 and deviation 1; the same seed gives the same numbers.
---
---     print(unsloth.randn(2, 3, { seed = 1 }))
---@param ... integer|table the lengths of its dimensions, or one array of them; then options: seed
---@return unsloth.Tensor
function M.randn(...)
  local shape, opts = lengths(...)
  return core.tensor_random(shape, options.check("randn", opts, RANDOM).seed, true)
end

--- Numbers drawn evenly between 0 and 1; the same seed gives the same numbers.
---
---     print(unsloth.rand(2, 3, { seed = 1 }))
---@param ... integer|table the lengths of its dimensions, or one array of them; then options: seed
---@return unsloth.Tensor
function M.rand(...)
  local shape, opts = lengths(...)
  return core.tensor_random(shape, options.check("rand", opts, RANDOM).seed, false)
end

--- Tensors one behind the other along a dimension; the other lengths must agree.
---
---     print(unsloth.cat({ unsloth.ones(1, 3), unsloth.zeros(2, 3) }, 1))
---@param list unsloth.Tensor[]
---@param dim integer|nil default 1
---@return unsloth.Tensor
function M.cat(list, dim)
  dim = dim or 1
  if #list == 0 then errors.invalid "cat wants an array of tensors" end
  -- Each with the dimension in front, flat, then back.
  local order, shape = { dim }, list[1].shape
  for i = 1, #shape do
    if i ~= dim then order[#order + 1] = i end
  end
  local rest = table.move(shape, 1, #shape, 1, {})
  table.remove(rest, dim)
  local values, total = {}, 0
  for _, t in ipairs(list) do
    local own = t.shape
    total = total + (table.remove(own, dim) or 0)
    if table.concat(own, "x") ~= table.concat(rest, "x") then errors.raise("USL_ERR_SHAPE", "cat: the tensors differ beside dimension %d", dim) end
    for _, value in ipairs(core.tensor_reshape(core.tensor_permute(t, order), { -1 }):totable()) do values[#values + 1] = value end
  end
  local back = {}
  for i, d in ipairs(order) do back[d] = i end
  return core.tensor_permute(core.tensor_reshape(core.tensor(values), { total, table.unpack(rest) }), back)
end

-- ---- Shapes ---------------------------------------------------------------------------------------------------------

--- The same values in another shape; one length may be -1.
---
---     print(unsloth.arange(6):reshape(2, -1))
---@param ... integer the lengths, or one array of them
---@return unsloth.Tensor
function Tensor:reshape(...)
  return core.tensor_reshape(self, (lengths(...)))
end

--- The same as reshape, in torch's other word.
---
---     print(unsloth.arange(6):view(3, 2))
---@param ... integer
---@return unsloth.Tensor
function Tensor:view(...)
  return core.tensor_reshape(self, (lengths(...)))
end

--- Its dimensions in another order.
---
---     print(unsloth.zeros(2, 3, 4):permute(3, 1, 2).shape)
---@param ... integer each dimension once
---@return unsloth.Tensor
function Tensor:permute(...)
  return core.tensor_permute(self, (lengths(...)))
end

--- Two dimensions exchanged.
---
---     print(unsloth.zeros(2, 3):transpose(1, 2).shape)
---@param a integer
---@param b integer
---@return unsloth.Tensor
function Tensor:transpose(a, b)
  local order = {}
  for i = 1, self.ndim do order[i] = i end
  order[a], order[b] = b, a
  return core.tensor_permute(self, order)
end

--- A matrix mirrored at its diagonal.
---
---     print(unsloth.randn(2, 3):t())
---@return unsloth.Tensor
function Tensor:t()
  if self.ndim ~= 2 then errors.raise("USL_ERR_SHAPE", "t() is for matrices; this tensor has %d dimensions: use transpose", self.ndim) end
  return core.tensor_permute(self, { 2, 1 })
end

--- A new dimension of length 1 before dimension dim.
---
---     print(unsloth.zeros(3):unsqueeze(1).shape)
---@param dim integer
---@return unsloth.Tensor
function Tensor:unsqueeze(dim)
  local shape = self.shape
  table.insert(shape, dim, 1)
  return core.tensor_reshape(self, shape)
end

--- Without its dimensions of length 1.
---
---     print(unsloth.zeros(1, 3, 1):squeeze().shape)
---@return unsloth.Tensor
function Tensor:squeeze()
  local shape = {}
  for _, n in ipairs(self.shape) do
    if n ~= 1 then shape[#shape + 1] = n end
  end
  return core.tensor_reshape(self, shape)
end

--- All its values in one dimension.
---
---     print(#unsloth.zeros(2, 3):flatten())
---@return unsloth.Tensor
function Tensor:flatten()
  return core.tensor_reshape(self, { -1 })
end

--- The K largest values of a vector and their positions from 1, largest first; `ids` are the positions from 0.
---
---     local top = unsloth.tensor({ 3, 9, 5 }):topk(2)
---     print(top.values[1], top.positions[1], top.ids[1])
---@param k integer
---@return { values: number[], positions: integer[], ids: integer[] }
function Tensor:topk(k)
  if self.ndim ~= 1 then errors.raise("USL_ERR_SHAPE", "topk is for vectors; this tensor has %d dimensions: take a row of it", self.ndim) end
  local values, order = self:totable(), {}
  for i = 1, #values do order[i] = i end
  table.sort(order, function(a, b)
    if values[a] == values[b] then return a < b end
    return values[a] > values[b]
  end)
  local top = { values = {}, positions = {}, ids = {} }
  for i = 1, math.min(k, #order) do
    top.values[i], top.positions[i], top.ids[i] = values[order[i]], order[i], order[i] - 1
  end
  return top
end

M.options = { randn = RANDOM, rand = RANDOM }

return M
