--- What is typed at the prompt: a local of one line would be gone on the next, so those of the top level become globals.
local M = {}

local OPENS = { ["function"] = true, ["do"] = true, ["if"] = true, ["repeat"] = true }
local CLOSES = { ["end"] = true, ["until"] = true }

-- The end of the string, comment or number that begins at i, or nil when it is none of these.
local function literal_end(text, i)
  local dashes = text:match("^%-%-()", i)
  local level, inside = text:match("^%[(=*)%[()", dashes or i)
  if level then
    local _, last = text:find("]" .. level .. "]", inside, true)
    return last or #text
  end
  if dashes then return (text:find("\n", i, true) or #text + 1) - 1 end
  local quote = text:match("^[\"']", i)
  if quote then
    local k = i + 1
    while k <= #text and text:sub(k, k) ~= quote do k = k + (text:sub(k, k) == "\\" and 2 or 1) end
    return k
  end
  local number = text:match("^%.?%d[%w.]*()", i)
  return number and number - 1
end

-- "a <const>, b" behind a local: the names alone, and where what follows begins; nil for what must stay a local.
local function names_behind(text, at)
  local names = {}
  repeat
    local name, attribute, comma, behind
    name, at = text:match("^%s*([%a_][%w_]*)()", at)
    if not name or name == "_ENV" then return nil end
    names[#names + 1] = name
    attribute, behind = text:match("^%s*<%s*(%a+)%s*>()", at)
    if attribute == "close" then return nil end
    at = behind or at
    comma, behind = text:match("^%s*(,)()", at)
    at = behind or at
  until not comma
  return table.concat(names, ", "), at
end

-- What stands instead of the local whose keyword ends before `at`, and where the rest begins.
local function global_for(text, at)
  if text:find("^%s*function%f[^%w_]", at) then return "", at end
  local names, behind = names_behind(text, at)
  if not names then return "local", at end
  local breaks = text:sub(at, behind - 1):gsub("[^\n]", "") -- the lines of what follows stay what they are
  return names .. breaks .. (text:find("^%s*=[^=]", behind) and "" or " = nil"), behind
end

--- The chunk with its locals of the top level as globals, `local x <const> = 1` as `x = 1`; what is inside of blocks stays.
---
---     print(require("unsloth.toplevel").globals "local x = 7")
function M.globals(text)
  local out, depth, i = {}, 0, 1
  while i <= #text do
    local word, behind = text:match("^([%a_][%w_]*)()", i)
    local last = word and behind - 1 or literal_end(text, i) or i
    local kept = text:sub(i, last)
    if word == "local" and depth == 0 then
      kept, behind = global_for(text, behind)
      last = behind - 1
    end
    depth = depth + (OPENS[word] and 1 or CLOSES[word] and -1 or 0)
    out[#out + 1], i = kept, last + 1
  end
  return table.concat(out)
end

return M
