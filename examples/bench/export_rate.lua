--- Exporting Llama-3-8B's shape on the CPU's threads and, where there is one, with the GPU, in one call: seconds, million values a second,
--- how far memory rises above what the loaded model takes, and the GPU's part of the CPU's time. Weights are random, in bfloat16; of every
--- device the export comes twice, as they are and with an adapter of rank 16 merged, and each twice: the first one warms up.
---
---     unsloth-lua examples/bench/export_rate.lua [METHOD] [LAYERS] [PATH]     (q4_k_m, 4, /dev/null)
---
--- LAYERS are of 218 million values each, 0.45 GB in memory. With fewer than 32 embedding and head are left out (a tokenizer of 1024 tokens
--- has small ones), and the seconds of Llama-3-8B are those of its 8,030 million values at the same rate; with 32 it is all there, 16 GB
--- in memory, and nothing is scaled. No disk is in the figures: PATH takes it all in and forgets it. Files are not read back.
local core = require "unsloth.core"
local unsloth = require "unsloth"

local method, layers, path = arg[1] or "q4_k_m", math.tointeger(arg[2] or 4), arg[3] or "/dev/null"
local WHOLE, LAYER = 8030261248, 4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336 -- values of Llama-3-8B and of one of its layers

--- What /proc says of this process, in bytes.
local function memory(key)
  for line in io.lines "/proc/self/status" do
    local kib = line:match("^" .. key .. ":%s*(%d+)")
    if kib then return math.tointeger(kib) * 1024 end
  end
end

local tokenizer = unsloth.AutoTokenizer.from_pretrained "examples/tiny-llama"
local vocabulary = layers == 32 and 128256 or tokenizer.vocab_size
local values = layers * LAYER + 2 * vocabulary * 4096
local config = { architectures = { "LlamaForCausalLM" }, model_type = "llama", hidden_size = 4096, intermediate_size = 14336,
  num_hidden_layers = layers, num_attention_heads = 32, num_key_value_heads = 8, vocab_size = vocabulary,
  max_position_embeddings = 8192, rms_norm_eps = 1e-5, rope_theta = 500000.0 }
print(("%s to %s: %d layers, %.0f million values, %d threads"):format(method, path, layers, values / 1e6, core.threads()))

local function export(model, what)
  local loaded, best = memory "VmRSS", math.huge
  local times = {}
  for i = 1, 2 do
    local started = core.clock()
    core.export_gguf(model, tokenizer, { path }, { method }, { verify = false })
    times[i] = core.clock() - started
    best = math.min(best, times[i])
  end
  if not path:match "^/dev/null" then os.remove(path) end
  local whole = best * WHOLE / values
  print(("%-14s %.2f and %.2f s, %.0f million values a second; Llama-3-8B: %.1f s%s; memory +%.0f MiB"):format(what, times[1], times[2],
    values / best / 1e6, whole, layers == 32 and "" or " at that rate", math.max(0, memory "VmHWM" - loaded) / 2 ^ 20))
  return best
end

--- Seconds as they are, and merged.
local function measure(device)
  local model = unsloth.FastLanguageModel.from_config(config, { device = device, dtype = "bfloat16", full_finetuning = false, random_state = 1 })
  local _ <close> = model
  local plain = export(model, device)
  unsloth.FastLanguageModel.get_peft_model(model, { r = 16, init_lora_weights = false })
  return plain, export(model, device .. ", merged")
end

local cpu, cpu_merged = measure "cpu"
local there, gpu, gpu_merged = pcall(measure, "cuda")
if there then
  print(("the GPU takes %.2f of the CPU's time, %.2f merged"):format(gpu / cpu, gpu_merged / cpu_merged))
else
  print(("without a GPU: %s"):format(tostring(gpu)))
end
