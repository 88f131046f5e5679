--- Gradients against differences: for an op of one's own, and for a trainer's parameters.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local options = require "unsloth.options"

local M = {}

local SPEC = {
  eps = { "number", default = 1e-2, check = options.at_least(0) },
  samples = { "integer", default = 16, check = options.at_least(1) },
  rows = { "integer", default = 1, check = options.at_least(1) },
  seed = { "integer", default = 3407 },
}
M.SPEC = SPEC

-- Positions to try: all of a few, else `samples` drawn without regard to order.
local function positions(count, o)
  local list = {}
  if count <= o.samples then
    for i = 1, count do list[i] = i end
    return list
  end
  for i, u in ipairs(core.tensor_random({ o.samples }, o.seed, false):totable()) do list[i] = 1 + (u * count // 1 | 0) end
  return list
end

-- Compares a flat array of gradients with central differences of loss(values); returns the report. Errors are relative, but a
-- gradient far below the largest drowns in the rounding of the loss: it is measured by a tenth of that one.
local function compare(values, gradients, loss, o)
  local worst, at, largest = 0, nil, 0
  for _, g in ipairs(gradients) do largest = math.max(largest, math.abs(g)) end
  for _, i in ipairs(positions(#values, o)) do
    local kept = values[i]
    local eps = o.eps * math.max(1, math.abs(kept))
    values[i] = kept + eps
    local above = loss(values)
    values[i] = kept - eps
    local below = loss(values)
    values[i] = kept
    local wanted = (above - below) / (2 * eps)
    local err = math.abs(gradients[i] - wanted) / math.max(largest / 10, math.abs(wanted), math.abs(gradients[i]), 1e-12)
    if err > worst or err ~= err or not at then worst, at = err, { position = i, gradient = gradients[i], difference = wanted } end
  end
  return { error = worst, worst = at, ok = worst < 2e-2 }
end

local function flat(t)
  return core.tensor_reshape(t:to "float64", { -1 }):totable()
end

-- forward(x) -> y and backward(x, dy) -> dx: against differences of sum(y * dy) for one random dy.
local function check_op(op, x, o)
  if type(op.forward) ~= "function" or type(op.backward) ~= "function" then
    errors.invalid "gradcheck wants { forward = function(x) return y end, backward = function(x, dy) return dx end }"
  end
  local shape, exact = x.shape, x:to "float64"
  local dy = core.tensor_random(op.forward(exact).shape, o.seed, true):to "float64"
  local dx = op.backward(exact, dy)
  if table.concat(dx.shape, "x") ~= table.concat(shape, "x") then
    errors.raise("USL_ERR_SHAPE", "gradcheck: backward gives a gradient of another shape than x has")
  end
  return compare(flat(exact), flat(dx), function(values)
    return (op.forward(core.tensor_reshape(core.tensor(values, "float64"), shape)) * dy):sum()
  end, o)
end

-- The trainer's own gradient of a parameter against differences of the loss over its first rows.
local function check_trainer(trainer, name, o)
  local model, handle = trainer.model, trainer:core()
  handle:gradients(1, o.rows)
  local gradient, value = handle:get_grad(name), model:get_param(name)
  local shape = value.shape
  local report = compare(value:flatten():totable(), gradient:flatten():totable(), function(values)
    model:set_param(name, core.tensor_reshape(core.tensor(values), shape))
    return handle:gradients(1, o.rows).loss
  end, o)
  model:set_param(name, value)
  return report
end

--- Compares gradients with central differences. Returns { error, ok, worst = { position, gradient, difference } }; error is
--- the largest relative one; ok: it is below 2%.
---
---     local square = { forward = function(x) return x * x end, backward = function(x, dy) return 2 * x * dy end }
---     print(unsloth.gradcheck(square, unsloth.randn(3)).ok)
---@param op table { forward, backward }, or a trainer
---@param x unsloth.Tensor|string the input; for a trainer a parameter's name
---@param opts unsloth.GradcheckOptions|nil eps, samples (positions that are tried), rows (of the trainer), seed
---@return { error: number, ok: boolean, worst: table }
function M.gradcheck(op, x, opts)
  local o = options.check("gradcheck", opts, SPEC)
  if type(x) == "string" then return check_trainer(op, x, o) end
  return check_op(op, x, o)
end

return M
