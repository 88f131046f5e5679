--- unsloth-lua download NAME: a repository of the hub into the cache; prints where it lies.
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"

local o = args.parse(arg, {
  name = "download", words = "ORG/NAME[:FILE.gguf]",
  about = "Downloads what a model needs (config, tokenizer, safetensors, or one .gguf) into the Hugging Face cache, and prints its path.\n"
    .. "config.json comes first: a model that cannot be loaded here is refused before its weights come.\n"
    .. "What the cache holds whole is not asked for again. HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count.",
  options = {
    { "revision", "NAME", "a branch, a tag or a commit (default: main)" },
    { "refresh", nil, "ask what the revision is now, also when the cache knows it" },
    { "tokenizer", nil, "the tokenizer alone" },
  },
})
if #o ~= 1 then errors.invalid "download wants one name, like org/name or org/name:file.gguf; --help shows the options" end
print(core.hub_get(o[1], { revision = o.revision, refresh = o.refresh or nil, tokenizer_only = o.tokenizer or nil }))
