--- A Modelfile for Ollama from a tokenizer's chat template. Ollama's templates are of another kind (Go's), so the parts around messages
--- are found by rendering conversations of marked words; what was found must give what the template gives, or there is no Modelfile.
local core = require "unsloth.core"

local M = {}

-- Words that no template has.
local SYSTEM, ONE, TWO, THREE, YES, NO = "xSYSx", "xONEx", "xTWOx", "xTHREEx", "xYESx", "xNOx"

local function message(role, content)
  return { role = role, content = content }
end

local function render(tok, messages, generate)
  local ok, text = pcall(tok.apply_chat_template, tok, messages, { tokenize = false, add_generation_prompt = generate })
  return ok and text or nil
end

-- The text between two plain words.
local function between(text, from, to)
  local _, start = text:find(from, 1, true)
  local stop = to and start and text:find(to, start + 1, true)
  if not start or to and not stop then return nil end
  return text:sub(start + 1, to and stop - 1 or -1)
end

local function without_end(text, tail)
  if tail == "" then return text end
  return text:sub(-#tail) == tail and text:sub(1, -#tail - 1) or nil
end

local function without_start(text, head)
  return text:sub(1, #head) == head and text:sub(#head + 1) or nil
end

--- { user, reply, turn_end, system, middle }: what stands before a user's words, between them and the answer, behind the answer; before
--- the system's words, and between them and the first user's (nil where there is no place for them). opening: what comes first of all.
function M.parts(tok)
  local user = message("user", ONE)
  local asked = render(tok, { user }, true)
  local talk = render(tok, { user, message("assistant", YES), message("user", TWO), message("assistant", NO), message("user", THREE) }, true)
  if not asked or not talk then return nil end
  local reply = between(talk, ONE, YES)
  local again = between(talk, YES, TWO)
  local answered = render(tok, { user, message("assistant", YES) }, false)
  local turn_end = answered and between(answered, YES)
  if not reply or not again or not turn_end or between(asked, ONE) ~= reply then return nil end
  local p = { reply = reply, turn_end = turn_end }
  p.user = without_start(again, turn_end)
  if not p.user then
    -- Ends that only the last answer has: what is common to both is the end of a turn.
    local n = 0
    while n < #turn_end and turn_end:byte(n + 1) == again:byte(n + 1) do n = n + 1 end
    p.turn_end, p.user = turn_end:sub(1, n), again:sub(n + 1)
  end
  local head = asked:sub(1, asked:find(ONE, 1, true) - 1)
  p.opening = without_end(head, p.user)
  if not p.opening then return nil end
  -- What a runtime puts before everything by itself is left out; ChatML's first token may be a BOS that it does not.
  local bos = tok.bos_token
  local added = bos and tok:encode("a")[1] == tok:token_to_id(bos)
  p.adds_bos = added and p.opening:sub(1, #bos) == bos
  local said = p.adds_bos and p.opening:sub(#bos + 1) or p.opening
  local told = render(tok, { message("system", SYSTEM), user }, true)
  local before = told and told:find(SYSTEM, 1, true) and told:sub(1, told:find(SYSTEM, 1, true) - 1)
  local middle = told and between(told, SYSTEM, ONE)
  if before and middle and between(told, ONE) == reply then
    p.system = p.adds_bos and without_start(before, bos) or before
    p.middle = middle
    -- What is said where no system speaks is its default.
    local tail = without_end(middle, p.user)
    local default = said ~= "" and tail and without_start(said, p.system)
    p.default = default and without_end(default, tail) or nil
  end
  if said ~= "" and not p.default then return nil end
  return p
end

--- The same conversation from the parts, for tests: messages as apply_chat_template takes them, the last one a user's.
function M.join(p, tok, messages)
  local out = { p.adds_bos and tok.bos_token or "" }
  local system = messages[1].role == "system" and messages[1].content or p.default
  local first = true
  for _, m in ipairs(messages) do
    if m.role == "user" then
      out[#out + 1] = first and system and p.system .. system .. p.middle .. m.content .. p.reply or p.user .. m.content .. p.reply
      first = false
    elseif m.role == "assistant" then
      out[#out + 1] = m.content .. p.turn_end
    end
  end
  return table.concat(out)
end

local function go(text)
  return (text:gsub("{{", '{{ "{{" }}'))
end

-- Tokens that end an answer.
local function stops(tok)
  local out, seen = {}, {}
  for _, token in ipairs { tok.eos_token, "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>" } do
    if not seen[token] and tok:token_to_id(token) then out[#out + 1] = token end
    seen[token] = true
  end
  return out
end

--- The text of a Modelfile for the .gguf, or nil where the template cannot be said in it.
function M.make(tok, gguf)
  if not tok.chat_template then return nil end
  local p = M.parts(tok)
  if not p then return nil end
  local test = { message("user", ONE), message("assistant", YES), message("user", TWO) }
  if M.join(p, tok, test) ~= render(tok, test, true) then return nil end
  local asks = p.system and ("{{ if .System }}%s{{ .System }}%s{{ else }}%s{{ end }}"):format(go(p.system), go(p.middle), go(p.user)) or go(p.user)
  local template = asks .. "{{ .Prompt }}" .. go(p.reply) .. "{{ .Response }}" .. go(p.turn_end)
  if template:find('"""', 1, true) or p.default and p.default:find('"""', 1, true) then return nil end
  local lines = { "# ollama create NAME -f Modelfile", "FROM ./" .. gguf, 'TEMPLATE """' .. template .. '"""' }
  if p.default then lines[#lines + 1] = 'SYSTEM """' .. p.default .. '"""' end
  for _, token in ipairs(stops(tok)) do lines[#lines + 1] = "PARAMETER stop " .. core.json.encode(token) end
  return table.concat(lines, "\n") .. "\n"
end

return M
