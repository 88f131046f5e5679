--- Command lines of recipes and verbs.
---
---     local o = args.parse(arg, { name = "llama3_alpaca.lua", about = "Fine-tunes ...", options = {
---       { "model", "PATH", "folder or .gguf" }, { "max-steps", "N", "updates", 60 }, { "merge", nil, "also write merged weights" } } })
---     o.model, o.max_steps, o.merge, o[1] (words that are no options)
---
--- Of an option that is given twice the last counts; with `list = true` all do, joined by commas. N is a whole number and X any,
--- `within = { least, most }` limits them; `one_of = { ... }` lists the words that are taken. What does not fit is refused here, before any
--- work.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local progress = require "unsloth.progress"

local M = {}

-- What every recipe takes, and a verb with `progress = true`: how much is said.
local SAYING = {
  { "quiet", nil, "say nothing about progress" },
  { "json", nil, "progress as JSON lines, for programs; what is printed comes as { \"event\": \"text\" }" },
}

local function with_saying(spec)
  if not (spec.progress or spec.name:find "%.lua$") then return spec end
  local own, options = {}, {}
  for i, option in ipairs(spec.options) do
    own[option[1]], options[i] = true, option
  end
  for _, option in ipairs(SAYING) do
    if not own[option[1]] then options[#options + 1] = option end
  end
  return setmetatable({ options = options, says = not own.json and not own.quiet }, { __index = spec })
end

--- The words that --dtype takes.
M.dtypes = { "float32", "bfloat16", "float16" }

local function usage(spec)
  local lines = { ("usage: unsloth-lua %s [options]%s"):format(spec.name, spec.words and " " .. spec.words or ""), spec.about, "" }
  for _, option in ipairs(spec.options) do
    local left = "--" .. option[1] .. (option[2] and " " .. option[2] or "")
    local default = option[4] ~= nil and (" (default %s)"):format(option[4]) or ""
    lines[#lines + 1] = ("  %-26s %s%s"):format(left, option[3], default)
  end
  lines[#lines + 1] = ("  %-26s %s"):format("--help", "show this help")
  return table.concat(lines, "\n") .. "\n"
end

local function refuse(spec, option, text, wanted)
  errors.invalid('%s: --%s is "%s"; %s is wanted', spec.name, option[1], text, wanted)
end

local function range(option)
  local kind, limits = option[2] == "N" and "a whole number" or "a number", option.within
  if not limits then return kind end
  if not limits[2] then return ("%s of %s or more"):format(kind, limits[1]) end
  return ("%s from %s to %s"):format(kind, limits[1], limits[2])
end

local function number_of(spec, option, text)
  local number = tonumber(text)
  local whole = number and math.tointeger(number)
  local least, most = table.unpack(option.within or {})
  if not number or number - number ~= 0 or option[2] == "N" and not whole or number < (least or -math.huge) or number > (most or math.huge) then
    refuse(spec, option, text, range(option))
  end
  return whole or number
end

-- What is never empty.
local NAMES = { PATH = "a path", FILE = "a file's path", DIR = "a folder's path", NAME = "a name" }

local function convert(spec, option, text)
  if option[2] == "N" or option[2] == "X" then return number_of(spec, option, text) end
  if text == "" and NAMES[option[2]] then refuse(spec, option, text, NAMES[option[2]]) end
  if not option.one_of then return text end
  for _, word in ipairs(option.one_of) do
    if word == text then return text end
  end
  local near = core.nearest(text, option.one_of)
  refuse(spec, option, text, (near and ('did you mean "%s"? One of '):format(near) or "one of ") .. table.concat(option.one_of, ", "))
end

local function key(name)
  return (name:gsub("-", "_"))
end

local function find(spec, name)
  local names = {}
  for i, option in ipairs(spec.options) do
    if option[1] == name then return option end
    names[i] = option[1]
  end
  local nearest = core.nearest(name, names)
  errors.invalid("%s does not know --%s%s", spec.name, name, nearest and (": did you mean --%s?"):format(nearest) or "; --help lists what it knows")
end

--- Reads the words; --help prints and exits 0.
function M.parse(words, spec)
  spec = with_saying(spec)
  local out, given, i = {}, {}, 1
  for _, option in ipairs(spec.options) do out[key(option[1])] = option[4] end
  while i <= #words do
    local name, value = words[i]:match "^%-%-([^=]+)=?(.*)$"
    if words[i] == "--help" or words[i] == "-h" then
      io.write(usage(spec))
      os.exit(true, true)
    elseif not name then
      if words[i] == "" then errors.invalid('%s: "" is no %s; --help shows what is wanted', spec.name, spec.words or "option") end
      out[#out + 1] = words[i]
    else
      local option = find(spec, name)
      if not option[2] then
        if words[i]:find("=", 1, true) then errors.invalid("%s: --%s takes no value; give it or leave it out", spec.name, option[1]) end
        out[key(name)] = true
      else
        if not words[i]:find("=", 1, true) then
          i = i + 1
          value = words[i]
        end
        if value == nil then errors.invalid("%s: --%s wants %s behind it", spec.name, name, option[2]) end
        value = convert(spec, option, value)
        out[key(name)] = option.list and given[name] and out[key(name)] .. "," .. value or value
        given[name] = true
      end
    end
    i = i + 1
  end
  if spec.says then
    if out.json and out.quiet then errors.invalid("%s: give --json or --quiet, not both", spec.name) end
    progress.set_mode(out.json and "json" or out.quiet and "quiet" or nil)
  end
  if #out > 0 and not spec.words then errors.invalid('%s does not know what to do with "%s"; --help shows the options', spec.name, out[1]) end
  return out
end

--- Raises when --resume finds no checkpoint in the folder: before the work, not in its midst.
function M.resume_dir(resume, path)
  local sft = require "unsloth.sft"
  sft.speak_of_options(true)
  if not resume or #sft.checkpoint_steps(path) > 0 then return end
  errors.raise("USL_ERR_NOT_FOUND", "--resume: %s holds no checkpoint to go on from; leave --resume out to begin anew, and give --save-steps N, "
    .. "which makes checkpoints", path)
end

--- Makes the folder and tries to write there: an output that cannot be written is said before the work, not after it.
function M.output_dir(path)
  core.make_dir(path)
  local name = (".%x.tmp"):format(math.random(0))
  local probe = path .. "/" .. name
  local file, why = io.open(probe, "w")
  if not file then
    errors.raise("USL_ERR_IO", "%s: nothing can be written there (%s); give --output another folder", path, why:match ": ([^:]*)$" or why)
  end
  file:close()
  os.remove(probe)
end

return M
