--- Exporting a large shape on all threads: million values a second, the seconds that Llama-3-8B takes at that rate, and how far memory
--- rises above what the loaded model takes. The file goes to memory, so that no disk is in the figure; it is not read back.
---
---     unsloth-lua examples/bench/export_rate.lua [METHOD] [LAYERS] [DIR]     (q4_k_m, 4, /dev/shm)
---
--- The layers are Llama-3-8B's, 218 million values each, random, in bfloat16: 4 of them are 1.8 GB, and of the file half a gigabyte.
local core = require "unsloth.core"
local unsloth = require "unsloth"

local method, layers, dir = arg[1] or "q4_k_m", math.tointeger(arg[2] or 4), arg[3] or "/dev/shm"
local WHOLE = 8030261248 -- values of Llama-3-8B

--- What /proc says of this process, in bytes.
local function memory(key)
  for line in io.lines "/proc/self/status" do
    local kib = line:match("^" .. key .. ":%s*(%d+)")
    if kib then return math.tointeger(kib) * 1024 end
  end
end

local tokenizer = unsloth.AutoTokenizer.from_pretrained "examples/tiny-llama"
local config = { architectures = { "LlamaForCausalLM" }, model_type = "llama", hidden_size = 4096, intermediate_size = 14336,
  num_hidden_layers = layers, num_attention_heads = 32, num_key_value_heads = 8, vocab_size = tokenizer.vocab_size,
  max_position_embeddings = 8192, rms_norm_eps = 1e-5, rope_theta = 500000.0 }
local model <close> = core.model_random(unsloth.json.encode(config), 1, { device = "cpu", dtype = "bfloat16" })
local values = layers * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336) + 2 * tokenizer.vocab_size * 4096
local path = ("%s/unsloth-export-rate.%d.gguf"):format(dir, math.random(1 << 30))
local loaded, started = memory "VmRSS", core.clock()
core.export_gguf(model, tokenizer, { path }, { method }, { verify = false })
local seconds = core.clock() - started
os.remove(path)
print(("%s: %.0f million values in %.1f s on %d threads, %.0f million a second, %.1f a thread"):format(method, values / 1e6, seconds,
  core.threads(), values / seconds / 1e6, values / seconds / 1e6 / core.threads()))
print(("Llama-3-8B at that rate: %.1f s"):format(WHOLE / values * seconds))
print(("peak memory %.0f MiB above the loaded model; its largest tensor is %.0f MiB"):format((memory "VmHWM" - loaded) / 2 ^ 20,
  4096 * 14336 * 2 / 2 ^ 20))
