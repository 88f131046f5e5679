--- unsloth-lua bench: tokens a second, memory and the share of the machine's own matrix rate, on random weights of a real shape.
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local progress = require "unsloth.progress"
local run = require "unsloth.cli.run"
local unsloth = require "unsloth"

local options = { { "steps", "N", "updates measured", 10, within = { 1, 1 << 20 } },
  { "warmup", "N", "updates before", 2, within = { 0, 1 << 20 } }, { "json", "FILE", "also write the figures there" } }
for i, option in ipairs(run.options) do table.insert(options, i, option) end
local o = args.parse(arg, { name = "bench", words = "[MODEL]",
  about = "Trains random weights of a shape (or a model) on random tokens and reports speed and memory.", options = options })

-- Looked at before the work, which may take long.
local function open_json(mode)
  local file, why = io.open(o.json, mode)
  if not file then errors.raise("USL_ERR_IO", "bench: --json: %s; give another file", why) end
  return file
end
if o.json then open_json "a":close() end

local started = core.clock()
local model = run.model(o)
local loaded = core.clock() - started
local trainer = run.trainer(o, model, run.rows(o, model:info().vocab, o.warmup + o.steps), o.warmup + o.steps)
local plan = trainer:plan()

local seconds, stats, flops = {}, nil, 0
for i = 1, o.warmup + o.steps do
  stats = trainer:step()
  if i > o.warmup then
    seconds[#seconds + 1] = stats.seconds / stats.tokens
    flops = flops + stats.flops / stats.seconds / o.steps
  end
end
if not (stats.grad_norm > 0 and stats.grad_norm < math.huge) or stats.loss ~= stats.loss then
  errors.raise("USL_ERR_NUMERIC", "the gradient norm is %g and the loss %g: nothing was trained, so there is no figure", stats.grad_norm, stats.loss)
end
table.sort(seconds)
local rate = 1 / seconds[(#seconds + 1) // 2]
local memory, gemm = core.memory(model), core.gemm_rate(model)
local figures = unsloth.json.object({
  shape = o.shape or o[1], method = o.method, device = model:info().device, dtype = model:info().dtype, batch = o.batch, seq = o.seq, rows = o.rows,
  rank = o.rank, steps = o.steps, tokens_per_second = rate, peak_memory = memory, planned_memory = plan.total,
  recomputed_layers = plan.recomputed_layers, gemm_flops_per_second = gemm, share_of_gemm_rate = flops / gemm, loss = stats.loss,
  grad_norm = stats.grad_norm, load_seconds = loaded, threads = core.threads(),
}, { "shape", "method", "device", "dtype", "batch", "seq", "rows", "rank", "steps", "tokens_per_second", "peak_memory", "planned_memory" })
print(("%.0f tokens/s (median of %d updates of %d x %d tokens, %s, %s, %d threads)"):format(rate, o.steps, o.batch, o.seq, o.method,
  model:info().dtype, core.threads()))
print(("memory %s (%s), planned %s, %d of %d layers recomputed"):format(progress.bytes(memory),
  model:info().device == "cpu" and "peak, operating system" or "in use, the driver", progress.bytes(plan.total), plan.recomputed_layers, plan.layers))
print(("matrix products alone run at %.0f GFLOP/s here; the step reaches %.0f%% of that"):format(gemm / 1e9, 100 * flops / gemm))
print(("loss %.4f, gradient norm %.4f; weights made in %.1f s"):format(stats.loss, stats.grad_norm, loaded))
if o.json then
  local file <close> = open_json "w"
  file:write(unsloth.json.encode(figures), "\n")
end
