--- Trains a byte-level BPE tokenizer in the manner of Llama 3 and writes it as Hugging Face files.
---
---     local bpe = require "unsloth.bpe_trainer"
---     bpe.write(dir, bpe.train(text, 1024), { model_max_length = 512 })
local core = require "unsloth.core"
local errors = require "unsloth.errors"

local M = {}

local json = core.json

--- The two special tokens, the last two ids.
M.BOS, M.EOS = "<|begin_of_text|>", "<|end_of_text|>"

-- Llama 3's pre-tokeniser, as tokenizer.json spells it.
local SPLIT = [[(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+]]

-- ---- Words ----------------------------------------------------------------------------------------------------------

local CONTRACTIONS = { ["'s"] = true, ["'t"] = true, ["'m"] = true, ["'d"] = true, ["'re"] = true, ["'ve"] = true, ["'ll"] = true }

local function contraction(text, at)
  for length = 2, 3 do
    if CONTRACTIONS[text:sub(at, at + length - 1):lower()] then return at + length - 1 end
  end
end

-- White space before a word leaves it the last blank.
local function blanks(text, at)
  local _, last = text:find("^%s+", at)
  if last and last > at and last < #text then return last - 1 end
  return last
end

-- SPLIT's alternatives in order, exact for ASCII; any byte beyond counts as a letter, which is near enough to count words by.
local PATTERNS = { "^[^\r\n%w\128-\255]?[%a\128-\255]+", "^%d%d?%d?", "^ ?[^%s%w\128-\255]+[\r\n]*", "^%s*[\r\n]+" }

local function word_end(text, at)
  local last = text:byte(at) == 39 and contraction(text, at)
  if last then return last end
  for _, pattern in ipairs(PATTERNS) do
    _, last = text:find(pattern, at)
    if last then return last end
  end
  return blanks(text, at)
end

--- The pieces that the pre-tokeniser cuts a text into, one after another.
function M.words(text)
  local at = 1
  return function()
    if at > #text then return nil end
    local first = at
    at = word_end(text, at) + 1
    return text:sub(first, at - 1)
  end
end

-- Each distinct word once: its symbols and how often it stands in the text. In the order of first sight, so that every run is the same.
local function count_words(text)
  local list, index = {}, {}
  for word in M.words(text) do
    local i = index[word]
    if not i then
      i = #list + 1
      index[word], list[i] = i, { count = 0, word:byte(1, -1) }
    end
    list[i].count = list[i].count + 1
  end
  return list
end

-- ---- Merges ---------------------------------------------------------------------------------------------------------

local SHIFT = 24

-- counts[pair] and where[pair], the set of words that hold or held it.
local function change(pairs_, a, b, w, by)
  local pair = a << SHIFT | b
  pairs_.counts[pair] = (pairs_.counts[pair] or 0) + by
  if by > 0 then
    local where = pairs_.where[pair]
    if not where then
      where = {}
      pairs_.where[pair] = where
    end
    where[w] = true
  end
end

local function best_pair(counts)
  local best, most = nil, 0
  for pair, count in pairs(counts) do
    if count > most or (count == most and best and pair < best) then best, most = pair, count end
  end
  return best, most
end

local function merge_word(pairs_, word, w, a, b, id)
  local out, i, n = {}, 1, #word
  while i <= n do
    if word[i] == a and word[i + 1] == b then
      out[#out + 1] = id
      i = i + 2
    else
      out[#out + 1] = word[i]
      i = i + 1
    end
  end
  if #out == n then return word end
  out.count = word.count
  for k = 1, n - 1 do change(pairs_, word[k], word[k + 1], w, -word.count) end
  for k = 1, #out - 1 do change(pairs_, out[k], out[k + 1], w, out.count) end
  return out
end

--- Learns merges until the vocabulary, bytes and special tokens included, has the size wanted, or until no pair stands twice.
--- Returns { tokens = { bytes of id 0, ... }, merges = { { id, id }, ... } }; ids count from 0, so tokens[id + 1].
---@param text string
---@param vocab_size integer 258 or more
function M.train(text, vocab_size)
  if vocab_size < 258 then errors.invalid("a vocabulary of %d is too small: 256 bytes and 2 special tokens are the least", vocab_size) end
  local words, pairs_ = count_words(text), { counts = {}, where = {} }
  for w, word in ipairs(words) do
    for k = 1, #word - 1 do change(pairs_, word[k], word[k + 1], w, word.count) end
  end
  local result, ids = { tokens = {}, merges = {} }, {}
  for byte = 0, 255 do result.tokens[byte + 1] = string.char(byte) end
  while #result.tokens < vocab_size - 2 do
    local pair, count = best_pair(pairs_.counts)
    if not pair or count < 2 then break end
    local a, b = pair >> SHIFT, pair & ((1 << SHIFT) - 1)
    local bytes = result.tokens[a + 1] .. result.tokens[b + 1]
    -- Another pair may have made the same bytes before: one token then, and two merges that lead to it.
    local id = ids[bytes] or #result.tokens
    result.merges[#result.merges + 1], result.tokens[id + 1], ids[bytes] = { a, b }, bytes, id
    local where = pairs_.where[pair]
    for w in pairs(where) do words[w] = merge_word(pairs_, words[w], w, a, b, id) end
    pairs_.counts[pair], pairs_.where[pair] = nil, nil
  end
  return result
end

-- ---- Files ----------------------------------------------------------------------------------------------------------

-- GPT-2's alphabet: every byte as a character that can be seen.
local function byte_alphabet()
  local map, next_free = {}, 256
  for byte = 0, 255 do
    local visible = (byte >= 33 and byte <= 126) or (byte >= 161 and byte <= 172) or byte >= 174
    map[string.char(byte)] = utf8.char(visible and byte or next_free)
    if not visible then next_free = next_free + 1 end
  end
  return map
end

local function object(...)
  local keys, value = {}, {}
  for i = 1, select("#", ...), 2 do
    local key, item = select(i, ...)
    keys[#keys + 1], value[key] = key, item
  end
  return json.object(value, keys)
end

local function special(id, content)
  return object("id", id, "content", content, "single_word", false, "lstrip", false, "rstrip", false, "normalized", false, "special", true)
end

local function byte_level()
  return object("type", "ByteLevel", "add_prefix_space", false, "trim_offsets", true, "use_regex", false)
end

-- Adds BOS before one text and before each of two.
local function add_bos(id)
  local function bos(type_id) return object("SpecialToken", object("id", M.BOS, "type_id", type_id)) end
  local function text(name, type_id) return object("Sequence", object("id", name, "type_id", type_id)) end
  return object("type", "TemplateProcessing", "single", json.array { bos(0), text("A", 0) },
    "pair", json.array { bos(0), text("A", 0), bos(1), text("B", 1) },
    "special_tokens", object(M.BOS, object("id", M.BOS, "ids", json.array { id }, "tokens", json.array { M.BOS })))
end

local function bpe_model(trained)
  local alphabet, spelled = byte_alphabet(), {}
  local vocab, merges = {}, {}
  for i, bytes in ipairs(trained.tokens) do
    spelled[i] = bytes:gsub(".", alphabet)
    vocab[spelled[i]] = i - 1
  end
  for i, merge in ipairs(trained.merges) do merges[i] = json.array { spelled[merge[1] + 1], spelled[merge[2] + 1] } end
  local null = json.null
  return object("type", "BPE", "dropout", null, "unk_token", null, "continuing_subword_prefix", null, "end_of_word_suffix", null,
    "fuse_unk", false, "byte_fallback", false, "ignore_merges", true, "vocab", json.object(vocab, spelled), "merges", json.array(merges))
end

local function tokenizer_json(trained)
  local bos, eos, null = #trained.tokens, #trained.tokens + 1, json.null
  local split = object("type", "Split", "pattern", object("Regex", SPLIT), "behavior", "Isolated", "invert", false)
  return object("version", "1.0", "truncation", null, "padding", null,
    "added_tokens", json.array { special(bos, M.BOS), special(eos, M.EOS) }, "normalizer", null,
    "pre_tokenizer", object("type", "Sequence", "pretokenizers", json.array { split, byte_level() }),
    "post_processor", add_bos(bos), "decoder", byte_level(), "model", bpe_model(trained))
end

local function write_file(path, value)
  local file, message = io.open(path, "wb")
  if not file then errors.raise("USL_ERR_IO", "%s", message) end
  local ok, why = file:write(json.encode(value), "\n")
  local closed, late = file:close()
  if not ok or not closed then errors.raise("USL_ERR_IO", "%s: %s", path, why or late) end
end

--- Writes tokenizer.json and tokenizer_config.json into a folder; returns the ids of BOS and EOS.
---@param opts table|nil model_max_length
function M.write(dir, trained, opts)
  core.make_dir(dir)
  write_file(dir .. "/tokenizer.json", tokenizer_json(trained))
  write_file(dir .. "/tokenizer_config.json", object("tokenizer_class", "PreTrainedTokenizerFast", "bos_token", M.BOS, "eos_token", M.EOS,
    "clean_up_tokenization_spaces", false, "model_max_length", opts and opts.model_max_length or 2048))
  return #trained.tokens, #trained.tokens + 1
end

return M
