--- unsloth-lua generate MODEL --prompt TEXT: one answer, shown as it comes.
local adapters = require "unsloth.model"
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local unsloth = require "unsloth"

local o = args.parse(arg, {
  name = "generate", words = "MODEL", about = "Continues a prompt with a model folder, an adapter folder or a .gguf.",
  options = {
    { "prompt", "TEXT", "the text to continue" },
    { "chat", nil, "the prompt is a message to answer: the model's chat template goes around it" },
    { "adapter", "DIR", "a PEFT folder to put on the model" },
    { "max-new-tokens", "N", "tokens at most", 128, within = { 1 } },
    { "temperature", "X", "0 is greedy", 0, within = { 0 } },
    { "top-k", "N", "draw from the K likeliest; 0: all", 0, within = { 0, math.maxinteger >> 32 } },
    { "top-p", "X", "draw from the likeliest that reach P together", 1.0, within = { 0, 1 } },
    { "min-p", "X", "leave out what is less likely than P times the likeliest", 0.0, within = { 0, 1 } },
    { "repetition-penalty", "X", "above 1 makes repeats less likely", 1.0, within = { 0 } },
    { "seed", "N", "of the draw", 3407, within = { 0 } },
    { "stop", "TEXT", "end before this text" },
    { "dtype", "NAME", "float32, bfloat16 or float16 (default: the best for this machine)", one_of = args.dtypes },
    { "load-in-4bit", nil, "quantise 16-bit weights to 4 bits" },
    { "device", "NAME", "cpu, cuda, cuda:1 (default: the GPU when there is one)" },
  },
})
if not o[1] or not o.prompt then errors.invalid "generate wants a model and --prompt TEXT; --help shows the options" end
if o[2] then errors.invalid('generate wants one model, and "%s" stands behind it; a prompt of several words goes in quotes', o[2]) end
if o.stop == "" then errors.invalid 'generate: --stop is ""; a text that is not empty is wanted' end
if o.adapter then adapters.check_adapter(o.adapter) end
local model, tokenizer = unsloth.FastLanguageModel.from_pretrained {
  model_name = o[1], load_in_4bit = o.load_in_4bit or false, dtype = o.dtype, device = o.device }
if not tokenizer then errors.raise("USL_ERR_NOT_FOUND", "%s has no tokenizer, so it cannot read a text", o[1]) end
if o.adapter then model:load_adapter(o.adapter) end
local prompt = o.chat and { { role = "user", content = o.prompt } } or o.prompt
for piece in model:stream(prompt, { max_new_tokens = o.max_new_tokens, temperature = o.temperature, top_k = o.top_k, top_p = o.top_p,
  min_p = o.min_p, repetition_penalty = o.repetition_penalty, seed = o.seed, stop = o.stop }) do
  io.write(core.is_terminal(1) and core.printable(piece) or piece)
  io.flush()
end
print()
