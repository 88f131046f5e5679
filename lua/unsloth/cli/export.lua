--- unsloth-lua export MODEL --to FORMAT,... --output DIR: everything a model can be saved as, without a script.
local adapters = require "unsloth.model"
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local unsloth = require "unsloth"

local o = args.parse(arg, {
  name = "export", words = "MODEL",
  about = "Writes a model folder, an adapter folder or a .gguf in other formats: quantised .gguf files (f32, f16, bf16, q8_0, q6_k, q5_k_m,\n"
    .. "q4_k_m, q3_k_m, q2_k, iq4_xs, ...), merged_16bit, merged_4bit and float32 folders, and of an adapter lora and gguf-lora. All\n"
    .. "quantisations are made in one pass; each file is read back and compared before it gets its name.",
  options = {
    { "to", "LIST", "formats, separated by commas", list = true },
    { "output", "DIR", "where to" },
    { "adapter", "DIR", "a PEFT folder to merge" },
    { "base", "DIR", "merge onto the 16-bit weights there instead of the model's own" },
    { "imatrix", "FILE", "a text to measure on which weights matter; iq1 and iq2 types, iq3_xs, iq3_xxs and q2_k_s want one" },
    { "no-verify", nil, "do not read back what was written" },
    { "load-in-4bit", nil, "quantise 16-bit weights to 4 bits first, as training did" },
    { "dtype", "NAME", "float32, bfloat16 or float16 (default: the best for this machine)", one_of = args.dtypes },
    { "device", "NAME", "cpu, cuda, cuda:1 (default: the GPU when there is one)" },
  },
})
if not o[1] or not o.to or not o.output then errors.invalid "export wants a model, --to FORMAT,... and --output DIR; --help shows the options" end
if o[2] then errors.invalid('export wants one model, and "%s" stands behind it', o[2]) end

local MERGED = { merged_16bit = "merged_16bit", merged_4bit = "merged_4bit", merged_32bit = "merged_32bit", float32 = "merged_32bit" }
local LORA = { lora = true, ["gguf-lora"] = true }
local known = { "merged_16bit", "merged_4bit", "float32", "lora", "gguf-lora", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m",
  "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_l", "q2_k_s", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs",
  "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s" }

local ggufs, others = {}, {}
for word in o.to:gmatch "[^,%s]+" do
  local format = word:lower():gsub("^merged%-", "merged_"):gsub("^gguf_lora$", "gguf-lora")
  if MERGED[format] or LORA[format] then
    others[#others + 1] = format
  elseif core.export_method(format) then
    ggufs[#ggufs + 1] = format
  else
    local nearest = core.nearest(format, known)
    errors.invalid('export: --to "%s" is no format%s', word, nearest and (': did you mean "%s"?'):format(nearest)
      or "; one of " .. table.concat(known, ", ") .. " is")
  end
end
if #ggufs + #others == 0 then errors.invalid 'export: --to is ""; formats separated by commas are wanted' end
if o.adapter then adapters.check_adapter(o.adapter) end
if o.imatrix and #ggufs == 0 then errors.invalid "export: --imatrix is for .gguf files, and --to names none" end

local output = o.output:gsub("(.)/+$", "%1")
args.output_dir(output)
local model, tokenizer = unsloth.FastLanguageModel.from_pretrained {
  model_name = o[1], load_in_4bit = o.load_in_4bit or false, dtype = o.dtype, device = o.device }
if o.adapter then model:load_adapter(o.adapter) end
for _, format in ipairs(others) do
  if LORA[format] and not model:active_adapter() then errors.invalid("export: --to %s wants an adapter: give --adapter DIR", format) end
end
if #ggufs > 0 and not tokenizer then errors.raise("USL_ERR_NOT_FOUND", "%s has no tokenizer, which a .gguf holds", o[1]) end

if #ggufs > 0 then
  model:save_pretrained_gguf(output, tokenizer, { quantization_method = ggufs, verify = not o.no_verify, base = o.base, imatrix_file = o.imatrix })
  if core.path_kind(output .. "/Modelfile") then print(output .. "/Modelfile") end
end
for _, format in ipairs(others) do
  local dir = output .. "/" .. format
  if format == "lora" then
    model:save_pretrained(dir)
    if tokenizer then tokenizer:save_pretrained(dir) end
    print(dir)
  elseif format == "gguf-lora" then
    print(model:save_pretrained_gguf(output, tokenizer, { save_method = "lora" })[1])
  else
    model:save_pretrained_merged(dir, tokenizer, { save_method = MERGED[format], verify = not o.no_verify, base = o.base })
  end
end
