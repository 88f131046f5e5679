--- Checks the house: who may include whom, what a library may not do, what libunsloth.so shows to the world.
---
---     lua5.4 tests/floors.lua [build/libunsloth.so [build/libunsloth-lua.so]]        from the root of the repository
---
--- Without the libraries' paths the symbols are not checked. Exits 1 after printing every breach.

-- The one table of floors, lowest first. A file includes its own floor or lower ones; folders that share a line do not
-- know each other.
local FLOORS = {
  { "core/base" },
  { "core/quant" },
  { "core/tensor" },
  { "core/ops" },
  { "core/cpu", "kernels" },
  { "core/io" },
  { "core/text" },
  { "core/data" },
  { "core/model" },
  { "core/infer" },
  { "core/train" },
  { "core/export" },
  { "core/api" },
}

-- The only header that everybody may include, and what the folders above the library see of it.
local PUBLIC = "core/unsloth.h"
local ABOVE = { lua = { "core/unsloth.h", "lua/" }, examples = { "core/unsloth.h", "lua/unsloth_lua.h" } }

-- System and library headers that have one home: a folder, or one file.
local HOMES = {
  ["^pthread%.h$"] = "core/base/",
  ["^unistd%.h$"] = "core/base/",
  ["^fcntl%.h$"] = "core/base/",
  ["^dirent%.h$"] = "core/base/",
  ["^sched%.h$"] = "core/base/",
  ["^signal%.h$"] = "core/base/",
  ["^sys/"] = "core/base/",
  ["^oneapi/"] = "core/cpu/blas.c",
  ["^cblas%.h$"] = "core/cpu/blas.c",
  ["^pcre2%.h$"] = "core/text/",
  ["^cuda"] = "kernels/",
  ["^lua%.h$"] = "lua/",
  ["^lauxlib%.h$"] = "lua/",
}

-- What a library never does: end the process, print.
local FORBIDDEN_CALLS = { "exit", "_exit", "abort", "assert", "printf", "vprintf", "puts", "putchar", "perror" }
local FORBIDDEN_WORDS = { "stdout", "stderr" }

local breaches, files_read, includes_read = 0, 0, 0

local function breach(...)
  breaches = breaches + 1
  print(string.format(...))
end

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "a"
  file:close()
  return text
end

-- Returns the lines that a shell command prints.
local function lines_of(command)
  local pipe = assert(io.popen(command))
  local lines = {}
  for line in pipe:lines() do lines[#lines + 1] = line end
  assert(pipe:close(), "failed: " .. command)
  return lines
end

local floor_of = {}
for height, folders in ipairs(FLOORS) do
  for _, folder in ipairs(folders) do floor_of[folder] = height end
end

-- Returns the folder of FLOORS that holds a path of the repository.
local function folder_of(path)
  return path:match "^core/[^/]+" or path:match "^kernels"
end

local function check_own_include(path, line, header)
  if header == PUBLIC then return end
  local above = ABOVE[path:match "^[^/]+"]
  if above then
    for _, prefix in ipairs(above) do
      if header:sub(1, #prefix) == prefix then return end
    end
    return breach("%s:%d: includes %s; this folder sees only %s", path, line, header, table.concat(above, ", "))
  end
  local from, to = folder_of(path), folder_of(header)
  if not floor_of[from] then return breach("%s: its folder is on no floor of tests/floors.lua", path) end
  if not floor_of[to] then return breach("%s:%d: includes %s, which is on no floor", path, line, header) end
  if from ~= to and floor_of[to] >= floor_of[from] then
    breach("%s:%d: %s (floor %d) includes %s (floor %d)", path, line, from, floor_of[from], header, floor_of[to])
  end
end

local function check_system_include(path, line, header)
  for pattern, home in pairs(HOMES) do
    if header:find(pattern) and path:sub(1, #home) ~= home then
      breach("%s:%d: <%s> belongs to %s alone", path, line, header, home)
    end
  end
end

-- Returns C text with comments and the insides of literals blanked, line ends kept.
local function code_of(text)
  local out, i = {}, 1
  while i <= #text do
    local two, one = text:sub(i, i + 1), text:sub(i, i)
    local last
    if two == "/*" then
      last = select(2, text:find("*/", i + 2, true)) or #text
    elseif two == "//" then
      last = (text:find("\n", i, true) or #text + 1) - 1
    elseif one == '"' or one == "'" then
      last = i + 1
      while last <= #text and text:sub(last, last) ~= one do
        last = last + (text:sub(last, last) == "\\" and 2 or 1)
      end
    end
    if last then
      out[#out + 1] = " " .. text:sub(i, last):gsub("[^\n]", "")
      i = last + 1
    else
      local stop = text:find("[/\"']", i + 1) or #text + 1
      out[#out + 1] = text:sub(i, stop - 1)
      i = stop
    end
  end
  return table.concat(out)
end

local function check_manners(path, text)
  local number = 0
  for line in (code_of(text) .. "\n"):gmatch "(.-)\n" do
    number = number + 1
    for _, name in ipairs(FORBIDDEN_CALLS) do
      if line:find("%f[%w_]" .. name .. "%s*%(") then breach("%s:%d: a library never calls %s", path, number, name) end
    end
    for _, name in ipairs(FORBIDDEN_WORDS) do
      if line:find("%f[%w_]" .. name .. "%f[^%w_]") then breach("%s:%d: a library never touches %s", path, number, name) end
    end
  end
end

local sources = lines_of [[find . -type f | sed 's,^[.]/,,' | grep -E '^(core|kernels|lua|examples)/.*[.](c|h|cu|cuh)$' | sort]]
for _, path in ipairs(sources) do
  local text, number = read(path), 0
  files_read = files_read + 1
  local above = ABOVE[path:match "^[^/]+"]
  for line in (text .. "\n"):gmatch "(.-)\n" do
    number = number + 1
    local own = line:match '^%s*#%s*include%s*"(.-)"'
    local system = line:match "^%s*#%s*include%s*<(.-)>"
    includes_read = includes_read + ((own or system) and 1 or 0)
    if own then check_own_include(path, number, own) end
    if system and not above then check_system_include(path, number, system) end
  end
  if not above then check_manners(path, text) end
end
assert(read(PUBLIC):find '#include "' == nil, "core/unsloth.h includes files of its own")

-- ---- Symbols ----

local function check_symbols(library, path)
  local promised, shown = {}, {}
  local header = code_of(read(path)):gsub("\\\n", " "):gsub("#[^\n]*", "")
  for name in header:gmatch "USL_API%s[^;(]-([%w_]+)%s*%(" do promised[name] = true end
  for _, line in ipairs(lines_of("nm -D --defined-only '" .. library .. "'")) do
    local name = line:match "^%x*%s*%a%s+([^@%s]+)"
    if name then shown[name] = true end
  end
  for name in pairs(promised) do
    if not shown[name] then breach("%s: %s of %s is missing", library, name, path) end
  end
  for name in pairs(shown) do
    if not promised[name] then breach("%s: shows %s, which %s does not promise", library, name, path) end
  end
end

if arg[1] then check_symbols(arg[1], PUBLIC) end
if arg[2] then check_symbols(arg[2], "lua/unsloth_lua.h") end

print(("%d files, %d includes, %d breaches"):format(files_read, includes_read, breaches))
os.exit(breaches == 0 and files_read > 0)
