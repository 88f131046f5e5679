--- Option tables by data. A specification maps each name to a rule:
---   { kind, default = value }   kind: "integer", "number", "boolean", "string", "table", "any", or several with "|"
---   note = "why nothing is to be done"   accepted, and said once when it is given
---   refuse = "what to do instead"        an error when it is given, unless the value is the default or false
---   only = { value = true }              the values that are possible
---   check = function(value) -> nil or a sentence
---   alias = "other_name"                 stands for that option
--- `false` stands for Python's None: the default.
local core = require "unsloth.core"
local errors = require "unsloth.errors"

local M = {}

local function is_kind(kind, value)
  if kind == "any" then return true end
  if kind == "integer" then return type(value) == "number" and math.tointeger(value) ~= nil end
  return type(value) == kind
end

local function matches(kinds, value)
  for kind in kinds:gmatch "[^|]+" do
    if is_kind(kind, value) then return true end
  end
  return false
end

local function show(value)
  return type(value) == "string" and ("%q"):format(value) or tostring(value)
end

--- ': did you mean "x"?' for a word that is none of the keys of `known`; "" when none is near.
function M.meant(word, known)
  local names = {}
  for name in pairs(known) do
    if type(name) == "string" then names[#names + 1] = name end
  end
  table.sort(names)
  local nearest = type(word) == "string" and core.nearest(word, names)
  return nearest and (': did you mean "%s"?'):format(nearest) or ""
end

local function unknown(what, name, spec)
  errors.invalid('%s does not know the option "%s"%s', what, name, M.meant(tostring(name), spec))
end

local function one(what, name, value, rule)
  if value == rule.default then return value end
  if rule.refuse then
    if value == false and rule.default ~= true then return nil end
    errors.unsupported("%s: %s = %s is not possible here: %s", what, name, show(value), rule.refuse)
  end
  if value == false and not matches(rule[1], value) then return rule.default end
  if not matches(rule[1], value) then
    errors.invalid("%s: %s must be %s, not %s", what, name, rule[1]:gsub("|", " or "), show(value))
  end
  if rule[1]:find("integer", 1, true) and math.type(value) == "float" then value = math.tointeger(value) or value end
  if rule.only and not rule.only[value] then
    local names = {}
    for known in pairs(rule.only) do names[#names + 1] = show(known) end
    table.sort(names)
    errors.invalid("%s: %s is %s%s; one of %s is wanted", what, name, show(value), M.meant(value, rule.only),
      table.concat(names, ", "))
  end
  local complaint = rule.check and rule.check(value)
  if complaint then errors.invalid("%s: %s is %s; %s", what, name, show(value), complaint) end
  if rule.note and value ~= false then errors.note("%s is accepted; %s", name, rule.note) end
  return value
end

--- Returns a new table with every option checked, and the defaults of those not given.
function M.check(what, given, spec)
  local out = {}
  if given ~= nil and type(given) ~= "table" then errors.invalid("%s takes a table of options, not a %s", what, type(given)) end
  for name, value in pairs(given or {}) do
    local rule = spec[name]
    if not rule then unknown(what, name, spec) end
    local target = rule.alias or name
    if target ~= name and given[target] ~= nil and given[target] ~= value then
      errors.invalid("%s: %s and %s are two names of one option; give one of them", what, name, target)
    end
    out[target] = one(what, target, value, spec[target])
  end
  for name, rule in pairs(spec) do
    if out[name] == nil then out[name] = rule.default end
  end
  return out
end

--- The defaults alone, for users to look at.
function M.defaults(spec)
  local out = {}
  for name, rule in pairs(spec) do out[name] = rule.default end
  return out
end

--- Rules for numbers in a range.
function M.at_least(low)
  return function(value)
    if not (value >= low and value < math.huge) then return ("a number of %s or more, and no infinite one, is wanted"):format(low) end
  end
end

function M.between(low, high)
  return function(value)
    if not (value >= low and value <= high) then return ("%s to %s is wanted"):format(low, high) end
  end
end

return M
