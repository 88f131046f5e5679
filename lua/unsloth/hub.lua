--- The Hugging Face hub: names that are no paths here, and uploads.
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local options = require "unsloth.options"

local M = {}

-- true stands for the token of the environment, as nil does.
local function token_of(token)
  if token == false then return "" end
  return token ~= true and token or nil
end

-- A name of the hub may have been meant as a path: says that none is here, and which one is near.
local function say_no_path(err, name)
  if type(err) ~= "table" or type(err.message) ~= "string" or err.code == "USL_ERR_CANCELLED" or err.code == "USL_ERR_NOMEM" then return end
  local path = name:gsub(":[^:/]*$", "")
  local dir, word = path:match "^(.*)/([^/]*)$"
  local ok, names = pcall(core.list_dir, dir)
  local near = ok and core.nearest(word, names)
  err.message = ("%s. There is no such path here either%s"):format(err.message, near and (": did you mean %s/%s?"):format(dir, near) or "")
end

--- What a function of the hub returns for a name; where it fails, that the name is no path here is said too.
---
---     print(require("unsloth.hub").ask(require("unsloth.core").hub_get, "org/name"))
function M.ask(fn, name, opts)
  local ok, found = pcall(fn, name, opts)
  if ok then return found end
  say_no_path(found, name)
  error(found, 0)
end

--- The path of what a name stands for: itself when it is a path here, else what the hub's cache holds of it, else what is downloaded.
---
---     print(require("unsloth.hub").find("examples/tiny-llama"))
---@param name string a path, "org/name", or "org/name:file.gguf"
---@param opts table|nil token, revision, local_files_only, tokenizer_only, refresh
---@return string path
function M.find(name, opts)
  if core.path_kind(name) then return name end
  if not core.hub_is_name(name) then
    errors.raise("USL_ERR_NOT_FOUND", "%s: there is no such file or folder, and a name of the hub is like org/name; give its path, of a folder "
      .. "(config.json, *.safetensors, tokenizer.json) or of a .gguf", name)
  end
  local o = opts or {}
  return M.ask(core.hub_get, name, { token = token_of(o.token), revision = o.revision or nil, local_files_only = o.local_files_only or nil,
    tokenizer_only = o.tokenizer_only, refresh = o.refresh })
end

-- ---- Uploads --------------------------------------------------------------------------------------------------------

local PUSH = {
  token = { "string|boolean" },
  private = { "boolean", default = false },
  commit_message = { "string" },
  revision = { "string" },
  temporary_location = { "string", default = "_unsloth_temporary_saved_buffers" },
  create_pr = { "boolean", default = false, refuse = "commits go to a branch, which revision names" },
  use_temp_dir = { "boolean", note = "temporary_location says where the files are made" },
}

-- What the upload takes of the options, and what is left for saving.
local function split(what, opts)
  local mine, rest = {}, {}
  if opts ~= nil and type(opts) ~= "table" then
    errors.invalid('%s: options are a table, as in { token = "hf_..." }; a tokenizer goes with push_to_hub_merged and push_to_hub_gguf', what)
  end
  for key, value in pairs(opts or {}) do
    if PUSH[key] then mine[key] = value else rest[key] = value end
  end
  return options.check(what, mine, PUSH), rest
end

-- save(dir) writes the files; they are removed when they are there, or when they are not.
local function push(what, name, o, save)
  if type(name) ~= "string" then errors.invalid("%s wants a name like user/name", what) end
  if not core.hub_is_name(name) or name:find(":", 1, true) then
    errors.invalid('%s: "%s" cannot be uploaded to; a name like user/name is wanted', what, name)
  end
  local dir = ("%s/%s"):format(o.temporary_location, name:gsub("/", "--"))
  local had = core.path_kind(o.temporary_location)
  core.remove_path(dir)
  local done <close> = setmetatable({}, { __close = function() core.remove_path(had and dir or o.temporary_location) end })
  core.make_dir(dir)
  save(dir)
  core.hub_push(name, dir, { token = token_of(o.token), revision = o.revision, private = o.private, commit_message = o.commit_message })
  return done and nil
end

---@class unsloth.Model
local Model = core.Model

--- Uploads what save_pretrained writes: the adapter when there is one, else the weights. A token that may write is needed.
---
---     model:push_to_hub("me/my-adapter", { token = "hf_..." })
---@param name string "user/name"; made when it is not there
---@param opts table|nil token, private, commit_message, revision
function Model:push_to_hub(name, opts)
  local o, rest = split("push_to_hub", opts)
  push("push_to_hub", name, o, function(dir) self:save_pretrained(dir, rest) end)
end

--- Uploads what save_pretrained_merged writes.
---
---     model:push_to_hub_merged("me/my-model", tokenizer, { save_method = "merged_16bit", token = "hf_..." })
function Model:push_to_hub_merged(name, tokenizer, opts)
  local o, rest = split("push_to_hub_merged", opts)
  push("push_to_hub_merged", name, o, function(dir) self:save_pretrained_merged(dir, tokenizer, rest) end)
end

--- Uploads what save_pretrained_gguf writes.
---
---     model:push_to_hub_gguf("me/my-model-GGUF", tokenizer, { quantization_method = "q4_k_m", token = "hf_..." })
function Model:push_to_hub_gguf(name, tokenizer, opts)
  if type(opts) == "string" then opts = { quantization_method = opts } end
  local o, rest = split("push_to_hub_gguf", opts)
  push("push_to_hub_gguf", name, o, function(dir) self:save_pretrained_gguf(dir, tokenizer, rest) end)
end

---@class unsloth.Tokenizer
local Tokenizer = core.Tokenizer

--- Uploads what save_pretrained writes.
---
---     tokenizer:push_to_hub("me/my-model", { token = "hf_..." })
function Tokenizer:push_to_hub(name, opts)
  local o = split("push_to_hub", opts)
  push("push_to_hub", name, o, function(dir) self:save_pretrained(dir) end)
end

return M
