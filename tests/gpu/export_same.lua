--- A .gguf does not depend on where it was made: the GPU's bytes are the CPU's, for every type that the GPU quantises to and one that it
--- leaves to the CPU, of 16-bit weights as they are and with an adapter merged. Exit status 77: there is no GPU.
---
---     unsloth-lua tests/gpu/export_same.lua [METHOD ...]
local core = require "unsloth.core"
local unsloth = require "unsloth"

local METHODS = { "q4_k_m", "q5_k_m", "q3_k_m", "q2_k", "q6_k", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "iq3_s", "bf16" }
local methods = arg[1] and { table.unpack(arg) } or METHODS

--- The files' contents by method, and the exporting seconds.
local function export(device, dtype, adapter)
  local model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = "examples/tiny-llama", load_in_4bit = false, device = device,
    dtype = dtype }
  local handle <close> = model
  if adapter then unsloth.FastLanguageModel.get_peft_model(model, { r = 4, init_lora_weights = false, random_state = 5 }) end
  local paths, contents = {}, {}
  for i = 1, #methods do paths[i] = os.tmpname() end
  local started = core.clock()
  local ok, message = pcall(core.export_gguf, handle, tokenizer, paths, methods, { verify = false })
  local seconds = core.clock() - started
  for i, path in ipairs(paths) do
    local file = ok and assert(io.open(path, "rb"))
    if file then
      contents[methods[i]] = file:read "a"
      file:close()
    end
    os.remove(path)
  end
  if not ok then error(message, 0) end
  return contents, seconds
end

if not pcall(unsloth.FastLanguageModel.from_pretrained, { model_name = "examples/tiny-llama", load_in_4bit = false, device = "cuda" }) then
  print "SKIP: no GPU is here"
  os.exit(77)
end
local failed = 0
for _, adapter in ipairs { false, true } do
  local dtype = adapter and "float32" or "float16"
  local cpu, cpu_seconds = export("cpu", dtype, adapter)
  local gpu, gpu_seconds = export("cuda", dtype, adapter)
  for _, method in ipairs(methods) do
    if cpu[method] ~= gpu[method] then
      failed = failed + 1
      print(("FAILED: %s%s: the GPU's file is not the CPU's"):format(method, adapter and ", merged" or ""))
    end
  end
  print(("%s: %d files, %.1f s on the CPU, %.1f s with the GPU"):format(adapter and "merged" or "16 bits", #methods, cpu_seconds, gpu_seconds))
end
print(("%d of %d files differ"):format(failed, 2 * #methods))
os.exit(failed == 0)
