--- Chat templates: apply_chat_template, get_chat_template, chat_template.render.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local named = require "unsloth.templates"
local options = require "unsloth.options"

local M = {}
local json = core.json
local Tokenizer = core.Tokenizer

-- ---- Applying -------------------------------------------------------------------------------------------------------

local APPLY = {
  tools = { "table|string" }, -- a string is JSON, whose keys keep their order
  documents = { "table" },
  chat_template = { "string" },
  add_generation_prompt = { "boolean", default = false },
  continue_final_message = { "boolean", default = false },
  tokenize = { "boolean", default = true },
  chat_template_kwargs = { "table" },
  padding = { "boolean", refuse = "nothing is padded" },
  truncation = { "boolean", refuse = "cut the ids yourself" },
  return_dict = { "boolean", refuse = "the ids themselves are returned" },
  return_tensors = { "string", refuse = "the ids are returned as a table" },
  return_assistant_tokens_mask = { "boolean", refuse = "train_on_responses_only masks labels" },
}

local function encode(list)
  if list == nil or list == false or list == json.null then return nil end
  if type(list) == "string" then
    if type(json.decode(list, "tools")) ~= "table" or not list:find "^%s*%[" then errors.invalid "tools is JSON text of no list" end
    return list
  end
  return json.encode(#list == 0 and json.array {} or list)
end

-- Options that are none of ours are variables of the template, as in transformers; one that the template does not name
-- and that looks like an option is a slip.
local function variables(o, opts, template)
  local out, any = {}, false
  for name, value in pairs(opts.chat_template_kwargs or {}) do out[name], any = value, true end
  local known = {}
  for name in pairs(APPLY) do known[#known + 1] = name end
  table.sort(known)
  for name, value in pairs(opts) do
    if APPLY[name] then
      o[name] = value
    else
      local nearest = core.nearest(tostring(name), known)
      if nearest and not (template and template:find(name, 1, true)) then
        errors.invalid('apply_chat_template does not know the option "%s": did you mean "%s"?', name, nearest)
      end
      out[name], any = value, true
    end
  end
  return any and json.encode(out) or nil
end

local function render(self, messages, o, vars)
  return self:render_chat(json.encode(#messages == 0 and json.array {} or messages), {
    add_generation_prompt = o.add_generation_prompt, continue_final_message = o.continue_final_message,
    tools = encode(o.tools), documents = encode(o.documents), chat_template = o.chat_template or nil, variables = vars })
end

--- The text of a conversation, or its ids: what the tokenizer's chat template (or the one given) makes of it. Options
--- that are none of apply_chat_template's are variables of the template. Several conversations give a table of results.
---
---     local text = tok:apply_chat_template({ { role = "user", content = "Hi" } }, { tokenize = false, add_generation_prompt = true })
function Tokenizer:apply_chat_template(messages, opts)
  if type(messages) ~= "table" then
    errors.invalid("apply_chat_template wants a table of messages, not %s", messages == nil and "nothing" or "a " .. type(messages))
  end
  if opts ~= nil and type(opts) ~= "table" then errors.invalid("apply_chat_template: the options are a table, not a %s", type(opts)) end
  local o = {}
  local vars = variables(o, opts or {}, opts and opts.chat_template or self.chat_template)
  o = options.check("apply_chat_template", o, APPLY)
  local function one(list)
    local text = render(self, list, o, vars)
    return o.tokenize and self:encode(text, { add_special_tokens = false }) or text
  end
  local first = messages[1]
  if type(first) ~= "table" or first.role ~= nil or type(first[1]) ~= "table" then return one(messages) end
  local out = {}
  for i, list in ipairs(messages) do out[i] = one(list) end
  return out
end

--- The texts with which a chat template begins an instruction and a response: what stands between two turns, less what
--- ends the first of them. Nil where the template does not write turns as they are. Spaces at the end belong to the words
--- that follow.
function M.markers(tokenizer)
  local words = { "aaUSERaa", "bbASSISTANTbb", "ccUSERcc" }
  local function text(count)
    local list = {}
    for i = 1, count do list[i] = { role = i % 2 == 1 and "user" or "assistant", content = words[i] } end
    return tokenizer:apply_chat_template(list, { tokenize = false })
  end
  local whole = text(3)
  local function marker(i)
    local between, turn_end = whole:match(words[i] .. "(.-)" .. words[i + 1]), text(i):match(words[i] .. "(.*)$")
    if not between or not turn_end then return nil end
    -- "[INST] ... [/INST]": what ends the instruction begins the response.
    local rest = between:sub(1, #turn_end) == turn_end and between:sub(#turn_end + 1) or between
    return ((rest:find "[^ ]" and rest or between):gsub(" +$", ""))
  end
  return marker(2), marker(1)
end

--- Renders any chat template with any variables; what its raise_exception says is raised.
---
---     unsloth.chat_template.render("{{ greeting }}, {{ names | join(' and ') }}", { greeting = "Hi", names = { "Ann", "Bob" } })
local function render_template(template, vars)
  if type(template) ~= "string" then errors.invalid("chat_template.render wants a template, not a %s", type(template)) end
  return core.chat_template_render(template, json.encode(vars or json.object {}))
end
M.chat_template = { render = render_template }

-- ---- Templates by name ----------------------------------------------------------------------------------------------

local GET = {
  chat_template = { "string|table", default = "chatml" },
  mapping = { "table" },
  map_eos_token = { "boolean", default = true },
  system_message = { "string" },
}

local function literal(text)
  return (text:gsub("[\\'\"]", "\\%0"):gsub("\r", "\\r"):gsub("\n", "\\n"))
end

local MAPPED = [[
{%- CONDITION %}
    {%- set mapped = namespace(messages=[]) %}
    {%- for message in messages %}
        {%- set role = { ROLES }.get(message['ROLE'], message['ROLE']) %}
        {%- set mapped.messages = mapped.messages + [dict(message, role=role, content=message['CONTENT'])] %}
    {%- endfor %}
    {%- set messages = mapped.messages %}
{%- endif %}
]]

-- `mapping` says under which names a data set keeps what a template calls role, content, user, assistant and system: such
-- messages are renamed before the template sees them. Those with the usual names stay as they are.
local function mapped(template, mapping)
  local roles, keys = {}, { role = "role", content = "content" }
  for name, other in pairs(mapping) do
    if type(other) ~= "string" then errors.invalid("get_chat_template: mapping.%s must be a string", name) end
    if keys[name] then
      keys[name] = literal(other)
    elseif name == "user" or name == "assistant" or name == "system" then
      roles[#roles + 1] = ("'%s': '%s'"):format(literal(other), name)
    else
      errors.invalid("get_chat_template: mapping knows role, content, user, assistant and system, not %s", tostring(name))
    end
  end
  table.sort(roles)
  local words = { CONDITION = keys.role == "role" and "if messages" or "if 'role' not in messages[0]", ROLES = table.concat(roles, ", "),
    ROLE = keys.role, CONTENT = keys.content }
  return MAPPED:gsub("%u%u%u%u+", words) .. template
end

-- The system message of conversations that bring none: the caller's, or the template's own.
local function with_system(template, entry, message)
  local found
  local text = message or entry and entry.system
  if text then
    template, found = template:gsub("{system_message}", (literal(text):gsub("%%", "%%%%")))
  end
  if message and found == 0 then
    errors.invalid "get_chat_template: this template has no system message of its own to replace; put it in the messages"
  end
  return template
end

-- The token that ends a turn becomes the one that ends generation. Where the tokenizer lacks it, its own end takes that
-- spelling, so that a token which the model knows stands there and no row is added to the embeddings.
local function map_eos(tokenizer, stop)
  if not stop or stop == "eos_token" then return end
  local id, eos = tokenizer:token_to_id(stop), tokenizer.eos_token_id
  if id then
    tokenizer:set_special("eos", id)
  elseif eos then
    errors.note("the tokenizer has no token %s: its own %s takes that name", stop, tokenizer.eos_token)
    tokenizer:rename(eos, stop)
  else
    errors.note("the tokenizer has neither %s nor an end-of-text token: the template writes it as text", stop)
  end
end

--- Gives a tokenizer a chat template by its name, or { template, end of a turn }. Returns the tokenizer.
---
---     tokenizer = unsloth.get_chat_template(tokenizer, "llama-3.1")
---     tokenizer = unsloth.get_chat_template(tokenizer, { chat_template = "chatml",
---       mapping = { role = "from", content = "value", user = "human", assistant = "gpt" } })
function M.get_chat_template(tokenizer, opts, more)
  local meta = debug.getmetatable(tokenizer)
  if not meta or meta.__name ~= "unsloth.Tokenizer" then errors.invalid "get_chat_template wants a tokenizer first" end
  if type(opts) == "string" or (type(opts) == "table" and opts[1]) then
    local all = { chat_template = opts }
    for name, value in pairs(more or {}) do all[name] = value end
    opts = all
  end
  local o = options.check("get_chat_template", opts, GET)
  local template, stop, entry
  if type(o.chat_template) == "table" then
    template, stop = o.chat_template[1], o.chat_template[2]
    if type(template) ~= "string" then errors.invalid "get_chat_template: a template of your own is { text, end of a turn }" end
  else
    entry, template = named.get(o.chat_template)
    stop = entry.stop
  end
  if o.mapping then template = mapped(template, o.mapping) end
  template = with_system(template, entry, o.system_message)
  tokenizer:set_chat_template(template)
  if o.map_eos_token then map_eos(tokenizer, stop) end
  return tokenizer
end

return M
