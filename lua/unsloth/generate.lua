--- Text from a model: generate, stream, generate_ids.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local options = require "unsloth.options"

local M = {}
---@class unsloth.Model
local Model = core.Model

local SPEC = {
  max_new_tokens = { "integer", default = 128, check = options.at_least(1) },
  temperature = { "number", check = options.at_least(0) },
  do_sample = { "boolean" },
  top_k = { "integer", default = 0, check = options.at_least(0) },
  top_p = { "number", default = 1.0, check = options.between(0, 1) },
  min_p = { "number", default = 0.0, check = options.between(0, 1) },
  repetition_penalty = { "number", default = 1.0, check = options.at_least(0) },
  seed = { "integer", default = 3407, check = options.at_least(0) },
  stop = { "string|table" },
  stop_strings = { "string|table", alias = "stop" },
  eos_token_id = { "integer|table" },
  tokenizer = { "userdata" },
  skip_special_tokens = { "boolean", default = true },
  use_cache = { "boolean", default = true, refuse = "keys and values are always kept; leave it out" },
  num_beams = { "integer", default = 1, refuse = "there is no beam search; sample with temperature or leave it at 1" },
  num_return_sequences = { "integer", default = 1, refuse = "call generate once for each text" },
  max_length = { "integer", refuse = "give max_new_tokens, which does not count the prompt" },
  streamer = { "any", refuse = "write for piece in model:stream(prompt) do io.write(piece) end" },
  pad_token_id = { "integer", note = "nothing is padded" },
}
M.defaults = options.defaults(SPEC)

-- tokenizer: ids that it does not know, of a padded vocabulary, are never drawn.
local function core_options(o, tokenizer)
  local temperature = o.temperature or (o.do_sample and 1.0 or 0.0)
  if o.do_sample == false then temperature = 0.0 end
  local stop_ids = o.eos_token_id
  if type(stop_ids) == "number" then stop_ids = { stop_ids } end
  return { max_new_tokens = o.max_new_tokens, temperature = temperature, top_k = o.top_k, top_p = o.top_p, min_p = o.min_p,
    repetition_penalty = o.repetition_penalty, seed = o.seed, stop_ids = stop_ids,
    vocab = tokenizer and #tokenizer or 0 }
end

--- New ids only, as an array. ids must hold BOS if it is wanted. Stops after an end-of-text id or max_new_tokens. Any id of the
--- model may be drawn, unless the option tokenizer is given: then only those that it knows.
---
---     print(#model:generate_ids(tokenizer:encode("Once"), { max_new_tokens = 8 }))
function Model:generate_ids(ids, opts)
  errors.method("model", "generate_ids", self, "unsloth.Model")
  errors.want("generate_ids", "ids", ids, "table", "an array of token ids, as tokenizer:encode(text) returns it")
  local o = options.check("generate_ids", opts, SPEC)
  if o.stop then errors.invalid "generate_ids knows no text: stop strings are for generate" end
  local generator <close> = self:generator(ids, core_options(o, o.tokenizer))
  local out = {}
  for id in generator.next, generator do out[#out + 1] = id end
  return out
end

-- Where the first of the stop strings begins in text, and how much of its end might be the beginning of one.
local function find_stop(text, stops)
  local first
  for _, stop in ipairs(stops) do
    local at = text:find(stop, 1, true)
    if at and (not first or at < first) then first = at end
  end
  if first then return first, 0 end
  local held = 0
  for _, stop in ipairs(stops) do
    for n = math.min(#stop - 1, #text), held + 1, -1 do
      if text:sub(-n) == stop:sub(1, n) then
        held = n
        break
      end
    end
  end
  return nil, held
end

local function stop_list(stop)
  local list = type(stop) == "string" and { stop } or stop or {}
  for _, text in ipairs(list) do
    if type(text) ~= "string" or text == "" then errors.invalid "stop is a text or an array of texts, none of them empty" end
  end
  return list
end

local function prompt_ids(prompt, tokenizer)
  if type(prompt) == "string" then return tokenizer:encode_once(prompt) end
  if type(prompt) == "table" and type(prompt[1]) == "table" then
    return tokenizer:apply_chat_template(prompt, { add_generation_prompt = true })
  end
  if type(prompt) == "table" then return prompt end
  errors.want("generate", "prompt", prompt, "string|table", "a text, an array of messages or an array of token ids")
end

--- Iterates over pieces of the answer as they come; leaving the loop early frees everything.
---
---     for piece in model:stream("Once upon a time", { max_new_tokens = 32 }) do io.write(piece) end
---@param prompt string|table a text, messages, or token ids
---@param opts unsloth.GenerateOptions|nil
---@return fun(): string|nil
function Model:stream(prompt, opts)
  errors.method("model", "stream", self, "unsloth.Model")
  local o = options.check("generate", opts, SPEC)
  local tokenizer = o.tokenizer or self.tokenizer
  if not tokenizer then errors.invalid "this model came without a tokenizer: give one as the option tokenizer, or use generate_ids" end
  local ids, stops = prompt_ids(prompt, tokenizer), stop_list(o.stop)
  local text = tokenizer:text_stream(ids, o.skip_special_tokens)
  local generator = self:generator(ids, core_options(o, tokenizer))
  local pending, ended = "", false
  -- The tokenizer's own end counts beside the model's: get_chat_template may have set another one.
  local last = not o.eos_token_id and tokenizer.eos_token_id
  local function next_piece()
    while not ended do
      local id = generator:next()
      ended = id == nil or id == last
      pending = pending .. (id and text:push(id) or "") .. (ended and text:finish() or "")
      local at, held = find_stop(pending, stops)
      if at then
        ended = true
        pending = pending:sub(1, at - 1)
      end
      local ready = ended and #pending or #pending - held
      local piece = pending:sub(1, ready)
      pending = pending:sub(ready + 1)
      if ended then generator:close() end
      if piece ~= "" then return piece end
    end
  end
  return next_piece, nil, nil, generator
end

--- The answer: new text only. Messages, { { role = "user", content = "Hi" } }, go through the chat template. Greedy unless
--- temperature or do_sample says otherwise.
---
---     print(model:generate("### Instruction:\nName a colour.\n\n### Response:\n", { max_new_tokens = 16 }))
---@param prompt string|table a text, messages, or token ids
---@param opts unsloth.GenerateOptions|nil
---@return string
function Model:generate(prompt, opts)
  errors.method("model", "generate", self, "unsloth.Model")
  local pieces = {}
  for piece in self:stream(prompt, opts) do pieces[#pieces + 1] = piece end
  return table.concat(pieces)
end

return M
