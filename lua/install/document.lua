--- Man pages and completions for bash, zsh and fish, from what --help says: the option tables of the verbs, and the
--- program's own usage.
---
---     unsloth-lua lua/install/document.lua PROGRAM LUA_DIR OUT_DIR
local args = require "unsloth.args"
local core = require "unsloth.core"

local program, modules, out = table.unpack(arg, 1, 3)
assert(out, "usage: unsloth-lua document.lua PROGRAM LUA_DIR OUT_DIR")

-- ---- What there is to say ----

-- A verb hands its table to args.parse before it does anything else: here that is where it ends.
local function spec_of(path)
  local caught = {}
  local parse = args.parse
  args.parse = function(_, spec)
    caught.spec = spec
    error(caught, 0)
  end
  local chunk = assert(loadfile(path, "t", setmetatable({ arg = { [0] = path } }, { __index = _G })))
  local ok, what = pcall(chunk)
  args.parse = parse
  if not ok and what ~= caught then error(("%s: %s"):format(path, tostring(what)), 0) end
  return caught.spec
end

local function read_verbs()
  local verbs = {}
  local folder = modules .. "/unsloth/cli"
  for _, file in ipairs(core.list_dir(folder)) do
    local name = file:match "^([%w_]+)%.lua$"
    local spec = name and spec_of(folder .. "/" .. file)
    if spec then verbs[#verbs + 1] = { name = name, spec = spec } end
  end
  assert(#verbs > 0, "no verbs in " .. folder)
  return verbs
end

-- The lines "  -e stat   text" of the usage; the rest of it is words.
local function read_usage()
  local pipe = assert(io.popen("'" .. program:gsub("'", "'\\''") .. "' -h"))
  local text = pipe:read "a"
  assert(pipe:close(), program .. " -h failed")
  local usage = { options = {}, words = {} }
  for line in text:gmatch "[^\n]+" do
    local option, value, about = line:match "^  (%-%S*)(.-)%s%s+(%S.*)$"
    if option then
      value = value:match "^%s+(%S+)$"
      usage.options[#usage.options + 1] = { option, value, about }
    elseif line:find "^usage:" then
      usage.synopsis = line:match "^usage:%s*(.*)$"
    else
      usage.words[#usage.words + 1] = line
    end
  end
  assert(#usage.options > 0, "the program's usage lists no options")
  return usage
end

local verbs, usage = read_verbs(), read_usage()

-- ---- Man pages ----

local function roff(text)
  return (text:gsub("\\", "\\e"):gsub("%-", "\\-"):gsub("'", "\\(aq"):gsub("\n", " "):gsub("^%.", "\\&."))
end

local function first_sentence(text)
  return (text:match "^(.-)%.%s" or text:gsub("%.%s*$", "")):gsub("\n", " ")
end

local function head(lines, name, about)
  lines[#lines + 1] = ('.TH %s 1 "" "unsloth-lua %s"'):format(name:upper(), core.version)
  lines[#lines + 1] = ".SH NAME"
  lines[#lines + 1] = ("%s \\- %s"):format(roff(name), roff(about:sub(1, 1):lower() .. about:sub(2)))
end

local function entry(lines, left, text)
  lines[#lines + 1] = ".TP"
  lines[#lines + 1] = left
  lines[#lines + 1] = roff(text)
end

local function verb_page(verb)
  local spec, lines = verb.spec, {}
  local name = "unsloth-lua-" .. verb.name
  head(lines, name, first_sentence(spec.about))
  lines[#lines + 1] = ".SH SYNOPSIS"
  lines[#lines + 1] = (".B unsloth\\-lua %s\n[options]%s"):format(roff(verb.name), spec.words and " " .. roff(spec.words) or "")
  lines[#lines + 1] = ".SH DESCRIPTION"
  lines[#lines + 1] = roff(spec.about)
  lines[#lines + 1] = ".SH OPTIONS"
  for _, o in ipairs(spec.options) do
    local default = o[4] ~= nil and (" (default %s)"):format(o[4]) or ""
    local words = o.one_of and ("; one of " .. table.concat(o.one_of, ", ")) or ""
    entry(lines, (".B \\-\\-%s%s"):format(roff(o[1]), o[2] and " " .. roff(o[2]) or ""), o[3] .. default .. words)
  end
  entry(lines, ".B \\-\\-help", "show a summary of these options")
  lines[#lines + 1] = ".SH SEE ALSO\n.BR unsloth\\-lua (1)"
  return name, table.concat(lines, "\n") .. "\n"
end

local function main_page()
  local lines = {}
  head(lines, "unsloth-lua", "fine-tunes large language models, scripted in Lua")
  lines[#lines + 1] = ".SH SYNOPSIS\n.B " .. roff(usage.synopsis)
  lines[#lines + 1] = ".SH DESCRIPTION"
  lines[#lines + 1] = roff(table.concat(usage.words, "\n"))
  lines[#lines + 1] = ".SH OPTIONS"
  for _, o in ipairs(usage.options) do entry(lines, ".B " .. roff(o[1]) .. (o[2] and " " .. roff(o[2]) or ""), o[3]) end
  lines[#lines + 1] = ".SH VERBS"
  for _, verb in ipairs(verbs) do entry(lines, ".B " .. roff(verb.name), first_sentence(verb.spec.about)) end
  lines[#lines + 1] = ".SH SEE ALSO"
  for i, verb in ipairs(verbs) do
    lines[#lines + 1] = (".BR unsloth\\-lua\\-%s (1)%s"):format(roff(verb.name), i < #verbs and "," or "")
  end
  return table.concat(lines, "\n") .. "\n"
end

-- ---- Completions ----

-- What may stand behind an option: a list of words, "file", or nothing that can be told.
local PATHS = { PATH = true, DIR = true, FILE = true, MODEL = true }

local function values_of(option)
  if option.one_of then return option.one_of end
  return PATHS[option[2] or ""] and "file" or nil
end

local function names(list, of)
  local words = {}
  for i, item in ipairs(list) do words[i] = of(item) end
  return table.concat(words, " ")
end

local function own_options() return names(usage.options, function(o) return o[1] end) end
local function verb_names() return names(verbs, function(v) return v.name end) end
local function verb_options(verb)
  return names(verb.spec.options, function(o) return "--" .. o[1] end) .. " --help"
end

local function bash()
  local lines = { "# Completion of unsloth-lua in bash.", "_unsloth_lua() {",
    '  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb= i', "  COMPREPLY=()",
    "  for ((i = 1; i < COMP_CWORD; i++)); do", "    case ${COMP_WORDS[i]} in", "      -*) ;;", "      *) verb=${COMP_WORDS[i]}; break ;;",
    "    esac", "  done", "  case $verb in" }
  for _, verb in ipairs(verbs) do
    lines[#lines + 1] = ("    %s)"):format(verb.name)
    lines[#lines + 1] = "      case $prev in"
    for _, o in ipairs(verb.spec.options) do
      local values = values_of(o)
      if type(values) == "table" then
        lines[#lines + 1] = ('        --%s) COMPREPLY=($(compgen -W "%s" -- "$cur")); return ;;'):format(o[1], table.concat(values, " "))
      elseif values == "file" then
        lines[#lines + 1] = ('        --%s) COMPREPLY=($(compgen -f -- "$cur")); return ;;'):format(o[1])
      elseif o[2] then
        lines[#lines + 1] = ("        --%s) return ;;"):format(o[1])
      end
    end
    lines[#lines + 1] = "      esac"
    lines[#lines + 1] = ('      if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W "%s" -- "$cur")); return; fi ;;'):format(verb_options(verb))
  end
  for _, line in ipairs { '    "")',
    ('      if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W "%s" -- "$cur")); return; fi'):format(own_options()),
    ('      COMPREPLY=($(compgen -W "%s" -- "$cur")) ;;'):format(verb_names()), "  esac", '  COMPREPLY+=($(compgen -f -- "$cur"))', "}",
    "complete -o filenames -F _unsloth_lua unsloth-lua" } do
    lines[#lines + 1] = line
  end
  return table.concat(lines, "\n") .. "\n"
end

local function zsh_text(text)
  return (text:gsub("'", "'\\''"):gsub("[%[%]:]", "\\%0"):gsub("\n", " "))
end

local function zsh_option(o)
  local values = values_of(o)
  local action = ""
  if o[2] then
    local message = zsh_text(o[2])
    if type(values) == "table" then
      action = (":%s:(%s)"):format(message, table.concat(values, " "))
    else
      action = (":%s:%s"):format(message, values == "file" and "_files" or " ")
    end
  end
  return ("      '--%s[%s]%s'"):format(o[1], zsh_text(o[3]), action)
end

local function zsh()
  local lines = { "#compdef unsloth-lua", "# Completion of unsloth-lua in zsh.", "_unsloth_lua() {", "  local -a verbs; local state line", "  verbs=(" }
  for _, verb in ipairs(verbs) do lines[#lines + 1] = ("    '%s:%s'"):format(verb.name, zsh_text(first_sentence(verb.spec.about))) end
  lines[#lines + 1] = "  )"
  lines[#lines + 1] = "  case $words[2] in"
  for _, verb in ipairs(verbs) do
    lines[#lines + 1] = ("    %s) shift words; ((CURRENT--)); _arguments \\"):format(verb.name)
    for _, o in ipairs(verb.spec.options) do lines[#lines + 1] = zsh_option(o) .. " \\" end
    lines[#lines + 1] = "      '--help[show the options]' '*:file:_files'; return ;;"
  end
  lines[#lines + 1] = "  esac"
  lines[#lines + 1] = "  _arguments -C \\"
  for _, o in ipairs(usage.options) do
    lines[#lines + 1] = ("    '%s[%s]%s' \\"):format(o[1], zsh_text(o[3]), o[2] and (":%s: "):format(zsh_text(o[2])) or "")
  end
  for _, line in ipairs { "    '1:verb or script:->first' '*:file:_files'", "  if [[ $state == first ]]; then _describe verb verbs; _files; fi", "}",
    '_unsloth_lua "$@"' } do
    lines[#lines + 1] = line
  end
  return table.concat(lines, "\n") .. "\n"
end

local function fish_text(text)
  return (text:gsub("[\\']", "\\%0"):gsub("\n", " "))
end

local function fish()
  local none = "not __fish_seen_subcommand_from " .. verb_names()
  local lines = { "# Completion of unsloth-lua in fish." }
  for _, o in ipairs(usage.options) do
    local letter = o[1]:match "^%-(%a)$"
    if letter then
      lines[#lines + 1] = ("complete -c unsloth-lua -n '%s' -s %s %s-d '%s'"):format(none, letter, o[2] and "-x " or "", fish_text(o[3]))
    end
  end
  for _, verb in ipairs(verbs) do
    lines[#lines + 1] = ("complete -c unsloth-lua -n '%s' -a %s -d '%s'"):format(none, verb.name, fish_text(first_sentence(verb.spec.about)))
    local seen = "__fish_seen_subcommand_from " .. verb.name
    for _, o in ipairs(verb.spec.options) do
      local values, kind = values_of(o), ""
      if type(values) == "table" then
        kind = ("-x -a '%s' "):format(table.concat(values, " "))
      elseif o[2] then
        kind = values == "file" and "-r -F " or "-x "
      end
      lines[#lines + 1] = ("complete -c unsloth-lua -n '%s' -l %s %s-d '%s'"):format(seen, o[1], kind, fish_text(o[3]))
    end
    lines[#lines + 1] = ("complete -c unsloth-lua -n '%s' -l help -d 'show the options'"):format(seen)
  end
  return table.concat(lines, "\n") .. "\n"
end

-- ---- Writing ----

local function write(path, text)
  local file = assert(io.open(path, "w"))
  assert(file:write(text))
  assert(file:close())
end

core.remove_path(out)
core.make_dir(out .. "/man")
write(out .. "/man/unsloth-lua.1", main_page())
for _, verb in ipairs(verbs) do
  local name, page = verb_page(verb)
  write(("%s/man/%s.1"):format(out, name), page)
end
write(out .. "/unsloth-lua.bash", bash())
write(out .. "/_unsloth-lua", zsh())
write(out .. "/unsloth-lua.fish", fish())
