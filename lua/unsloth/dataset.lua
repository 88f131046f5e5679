--- Data sets: rows from files, with Hugging Face's words. A row is a table; JSON null is nil.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local options = require "unsloth.options"
local progress = require "unsloth.progress"

local M = {}
---@class unsloth.Dataset
local Dataset = core.Dataset

local LOAD = {
  data_files = { "string|table" },
  split = { "string" },
  streaming = { "boolean", default = false, refuse = "files are read whole; leave it out" },
  num_proc = { "integer", note = "one thread reads the file" },
  cache_dir = { "string", note = "nothing is cached" },
  token = { "string|boolean", refuse = "data sets are not downloaded; give data_files" },
}

local KIND_OF = { json = "json", jsonl = "json", txt = "text", text = "text", csv = "csv" }

local FORMS = 'data_files is a path, an array of paths, or a table of these by split: { train = "a.jsonl", test = "b.jsonl" }'

local function file_list(files)
  if type(files) == "string" then return { files } end
  if type(files) ~= "table" then errors.invalid("%s", FORMS) end
  for key, path in pairs(files) do
    if type(path) ~= "string" or math.type(key) ~= "integer" then errors.invalid("%s", FORMS) end
  end
  if #files == 0 then errors.invalid "data_files names no file" end
  return files
end

-- Split -> its files; without names all are train's, as in Hugging Face datasets. And the names, train first.
local function splits_of(files)
  if type(files) == "string" or files[1] ~= nil then return { train = file_list(files) }, { "train" } end
  local splits, names = {}, {}
  for name, list in pairs(files) do
    if type(name) ~= "string" or name == "" then errors.invalid("%s", FORMS) end
    splits[name], names[#names + 1] = file_list(list), name
  end
  if #names == 0 then errors.invalid "data_files names no file" end
  table.sort(names, function(x, y)
    if x == "train" or y == "train" then return x == "train" and y ~= "train" end
    return x < y
  end)
  return splits, names
end

-- "test[10:20]" -> "test", "[10:20]". Without a split it is train, or the only one that there is.
local function choose(split, splits, names)
  if not split then
    if #names > 1 and not splits.train then
      errors.invalid("load_dataset: data_files has %s; say which with split = %q", table.concat(names, ", "), names[1])
    end
    if #names > 1 then
      errors.note("load_dataset: data_files has %s, and no split was asked for: these are the rows of train", table.concat(names, ", "))
    end
    return names[1], ""
  end
  local name, range = split:match "^([^%[]*)(.*)$"
  if splits[name] then return name, range end
  errors.invalid("load_dataset: there is no split %q%s; %s", name, options.meant(name, splits), #names == 1 and names[1] .. " is the only one"
    or "there are " .. table.concat(names, ", "))
end

-- The number of rows before a share of n in percent: the nearest one, of two the even one, as Hugging Face datasets rounds.
local function share(n, percent)
  local low, rest = n * percent // 100, n * percent % 100
  return rest > 50 and low + 1 or rest == 50 and low + low % 2 or low
end

-- "[:100]", "[10:20]", "[:10%]", "[-5:]"; "" is all.
local function apply_range(ds, split, range)
  if range == "" then return ds end
  local from, from_percent, to, to_percent = range:match "^%[(%-?%d*)(%%?):(%-?%d*)(%%?)%]$"
  if not from or from == "-" or to == "-" or from == "" and from_percent ~= "" or to == "" and to_percent ~= "" then
    errors.invalid('split is %q; a range is written "train[:100]", "train[100:]" or "train[:10%%]"', split)
  end
  local n = #ds
  local function position(text, percent, default)
    local value = math.tointeger(tonumber(text))
    if not value then return default end
    if percent == "%" then
      if math.abs(value) > 100 then errors.invalid("split is %q; a share goes to 100%%", split) end
      value = share(n, value)
    end
    return math.min(n, value < 0 and math.max(0, n + value) or value)
  end
  local first, last, index = position(from, from_percent, 0), position(to, to_percent, n), {}
  for i = first + 1, last do index[#index + 1] = i end
  if #index == 0 then errors.invalid("split %q leaves none of the %d rows; choose a range within them", split, n) end
  return ds:pick(index)
end

--- Opens a data set.
---
---     local ds = unsloth.load_dataset("json", { data_files = "alpaca.json", split = "train[:100]" })
---     local test = unsloth.load_dataset("json", { data_files = { train = "a.jsonl", test = "b.jsonl" }, split = "test" })
---@param kind string "json" (an array or JSON lines), "text", "csv"; or the path of a file
---@param opts unsloth.LoadDatasetOptions|nil
---@return unsloth.Dataset
function M.load_dataset(kind, opts)
  if type(kind) ~= "string" then errors.invalid('load_dataset wants "json", "text" or "csv", or a file\'s path') end
  local o = options.check("load_dataset", opts, LOAD)
  if not o.data_files and core.path_kind(kind) == "file" then
    o.data_files, kind = kind, KIND_OF[(kind:match "%.(%w+)$" or ""):lower()] or "json"
  end
  if not KIND_OF[kind] then
    errors.unsupported('load_dataset cannot fetch "%s": download it and write load_dataset("json", { data_files = path })', kind)
  end
  if not o.data_files then errors.invalid('load_dataset("%s") needs data_files, the path of a file', kind) end
  local splits, names = splits_of(o.data_files)
  local name, range = choose(o.split, splits, names)
  return apply_range(core.dataset_load(KIND_OF[kind], splits[name]), o.split, range)
end

--- A data set from an array of rows.
---
---     local ds = unsloth.dataset_from_list { { text = "a row" } }
function M.from_list(rows)
  errors.want("dataset_from_list", "rows", rows, "table", 'an array of rows, as in dataset_from_list { { text = "a row" } }')
  local ds = core.dataset_new()
  for _, row in ipairs(rows) do ds:append(row) end
  return ds
end

--- Iterates over the rows in order: `for row in ds:rows() do`.
---
---     for row in ds:rows() do print(row.instruction) end
function Dataset:rows()
  local i, n = 0, #self
  return function()
    i = i + 1
    if i <= n then return self[i] end
  end
end

--- The keys of the first row, in file order.
---
---     print(table.concat(ds:column_names(), ", "))
function Dataset:column_names()
  local names = {}
  for name in pairs(self[1] or {}) do names[#names + 1] = name end
  return names
end

local MAP = {
  batched = { "boolean", default = false, refuse = "the function gets one row at a time; leave it out" },
  remove_columns = { "table|string" },
  num_proc = { "integer", note = "Lua functions run on one thread" },
  desc = { "string", note = "no progress bar is drawn here" },
  load_from_cache_file = { "boolean", note = "nothing is cached" },
  batch_size = { "integer", note = "the function gets one row at a time" },
}

local function set_of(names)
  local set = {}
  for _, name in ipairs(type(names) == "string" and { names } or names or {}) do set[name] = true end
  return set
end

local function want_function(name, self, fn, body)
  errors.method("ds", name, self, "unsloth.Dataset")
  errors.want(name, "fn", fn, "function", ("a function of a row, as in ds:%s(function(row) %s end)"):format(name, body))
end

-- For the functions of others that run on each row: an error of theirs, which stays what it is, says at which row.
local At = {}

function At.__close(at, err)
  if err == nil or not at.row then return end
  local where = at.dataset:where(at.row)
  if type(err) == "string" and not err:find(where, 1, true) then error(where .. ": " .. err, 0) end
  if type(err) ~= "table" or type(err.message) ~= "string" or err.code == "USL_ERR_CANCELLED" then return end
  if not err.message:find(where, 1, true) then err.message = where .. ": " .. err.message end
end

-- To be closed; its field `row` is the one that is looked at.
function M.at(ds)
  return setmetatable({ dataset = ds }, At)
end

--- A new data set whose rows are the old ones updated with what fn(row, i) returns, as in Hugging Face datasets: a column that the
--- returned table names is replaced or added, the others stay. false in it removes a column. nil keeps the row.
---
---     local texts = ds:map(function(row) return { text = row.instruction .. tokenizer.eos_token } end)
---@param fn fun(row: table, position: integer): table|nil
---@param opts unsloth.MapOptions|nil
---@return unsloth.Dataset
function Dataset:map(fn, opts)
  want_function("map", self, fn, "return { text = row.output }")
  local o = options.check("map", opts, MAP)
  local removed, out = set_of(o.remove_columns), core.dataset_new()
  local at <close> = M.at(self)
  for i in progress.count("mapping rows", #self) do
    local row = self[i]
    at.row = i
    local result = core.call(fn, row, i)
    if result ~= nil and type(result) ~= "table" then
      errors.invalid("map: the function returned a %s for %s; a table of columns is wanted", type(result), self:where(i))
    end
    for name in pairs(removed) do row[name] = nil end
    for name, value in pairs(result or {}) do row[name] = value end
    out:append(row)
  end
  at.row = nil
  return out
end

--- The rows for which fn(row, i) is true.
---
---     print(#ds:filter(function(row) return #row.output < 60 end))
function Dataset:filter(fn, opts)
  want_function("filter", self, fn, "return #row.output < 60")
  options.check("filter", opts, { num_proc = MAP.num_proc, desc = MAP.desc })
  local index = {}
  local at <close> = M.at(self)
  for i = 1, #self do
    at.row = i
    if core.call(fn, self[i], i) then index[#index + 1] = i end
  end
  at.row = nil
  return self:pick(index)
end

--- The rows in another order: shuffle { seed = 3407 }.
---
---     ds = ds:shuffle { seed = 1 }
function Dataset:shuffle(opts)
  return self:permute(options.check("shuffle", opts, { seed = { "integer", default = 3407, check = options.at_least(0) } }).seed)
end

--- The rows with these numbers, counted from 1.
---
---     print(#ds:select { 1, 2, 3 })
function Dataset:select(index)
  errors.method("ds", "select", self, "unsloth.Dataset")
  errors.want("select", "index", index, "table", "an array of row numbers, as in ds:select { 1, 2, 3 }")
  return self:pick(index)
end

local SPLIT = {
  test_size = { "number", default = 0.25, check = options.at_least(0) },
  seed = { "integer", default = 3407, check = options.at_least(0) },
  shuffle = { "boolean", default = true },
}

--- Returns { train = , test = }. test_size below 1 is a share, else a number of rows.
---
---     local parts = ds:train_test_split { test_size = 0.1 }
function Dataset:train_test_split(opts)
  if type(opts) == "number" then opts = { test_size = opts } end
  local o = options.check("train_test_split", opts, SPLIT)
  local n = #self
  local test = o.test_size < 1 and math.ceil(n * o.test_size) or math.tointeger(o.test_size)
  if not test or test < 1 or test >= n then
    errors.invalid("train_test_split: test_size %s of %d rows leaves one side empty", o.test_size, n)
  end
  local all, sides = o.shuffle and self:permute(o.seed) or self, { train = {}, test = {} }
  for i = 1, n do
    local side = (o.shuffle and i <= test or not o.shuffle and i > n - test) and sides.test or sides.train
    side[#side + 1] = i
  end
  return { train = all:pick(sides.train), test = all:pick(sides.test) }
end

--- Rows of alpaca, ShareGPT, OpenAI messages, DPO or KTO shape -> `messages`.
---
---     ds = unsloth.standardize_data_formats(ds)
function M.standardize_data_formats(ds)
  errors.want("standardize_data_formats", "ds", ds, "unsloth.Dataset", "the data set, as load_dataset returns it")
  return ds:standardize()
end

return M
