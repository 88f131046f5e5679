--- unsloth-lua bench: tokens a second, memory and the share of the machine's own matrix rate, on random weights of a real shape.
local args = require "unsloth.args"
local core = require "unsloth.core"
local errors = require "unsloth.errors"
local progress = require "unsloth.progress"
local run = require "unsloth.cli.run"
local unsloth = require "unsloth"

local options = { { "steps", "N", "updates measured", 10, within = { 1, 1 << 20 } },
  { "warmup", "N", "updates before", 2, within = { 0, 1 << 20 } },
  { "decode", "N", "no training: N new tokens a row, greedily, with --batch rows", within = { 2, 1 << 20 } },
  { "prompt", "N", "tokens a row before them", 128, within = { 1, 1 << 24 } }, { "json", "FILE", "also write the figures there" } }
for i, option in ipairs(run.options) do table.insert(options, i, option) end
local o = args.parse(arg, { name = "bench", words = "[MODEL]",
  about = "Trains random weights of a shape (or a model) on random tokens and reports speed and memory. On a GPU passes whose size comes "
    .. "again are recorded; with USL_NO_GRAPHS=1 in the environment everything is launched anew, for the same bits.", options = options })

-- Looked at before the work, which may take long.
local function open_json(mode)
  local file, why = io.open(o.json, mode)
  if not file then errors.raise("USL_ERR_IO", "bench: --json: %s; give another file", why) end
  return file
end
if o.json then open_json "a":close() end

local RUNS = 3
local started = core.clock()
if o.decode then o.seq = math.max(o.seq, o.prompt + o.decode) end
local model = run.model(o)
local loaded = core.clock() - started

local function write_json(figures)
  if not o.json then return end
  local file <close> = open_json "w"
  file:write(unsloth.json.encode(figures), "\n")
end

local function bench_decode()
  local rates = {}
  for i = 1, RUNS do rates[i] = core.decode_rate(model, o.batch, o.prompt, o.decode) end
  table.sort(rates, function(a, b) return a.step_seconds < b.step_seconds end)
  local r = rates[(RUNS + 1) // 2]
  local first = math.huge -- the first run's prompt also loads kernels and fills caches
  for _, one in ipairs(rates) do first = math.min(first, one.first_seconds) end
  local figures = { shape = o.shape or o[1], method = o.method, device = model:info().device, dtype = model:info().dtype, batch = o.batch,
    prompt = o.prompt, new_tokens = o.decode, prompt_tokens_per_second = o.batch * o.prompt / first, tokens_per_second = o.batch / r.step_seconds,
    weight_bytes = r.step_bytes, weight_bytes_per_second = r.step_bytes / r.step_seconds, copy_bytes_per_second = r.copy_rate,
    memory = core.memory(model), load_seconds = loaded }
  print(("decode: %.1f tokens/s, %.3f ms a step (median of %d runs, %d rows, %d new tokens after %d, %s, %s)"):format(figures.tokens_per_second,
    1e3 * r.step_seconds, RUNS, o.batch, o.decode, o.prompt, o.method, figures.dtype))
  print(("prompt: %.0f tokens/s, %.1f ms to the first token"):format(figures.prompt_tokens_per_second, 1e3 * first))
  print(("a step reads %s of weights, %.0f GB/s; copies here run at %.0f GB/s"):format(progress.bytes(r.step_bytes),
    figures.weight_bytes_per_second / 1e9, r.copy_rate / 1e9))
  write_json(figures)
end
if o.decode then return bench_decode() end

local trainer = run.trainer(o, model, run.rows(o, model:info().vocab, o.warmup + o.steps), o.warmup + o.steps)
local plan = trainer:plan()

local seconds, stats, flops, first, tokens = {}, nil, 0, nil, 0
for i = 1, o.warmup + o.steps do
  stats = trainer:step()
  first = first or core.clock() - started
  if i > o.warmup then
    seconds[#seconds + 1] = stats.seconds / stats.tokens
    tokens = tokens + stats.tokens / o.steps
    flops = flops + stats.flops / stats.seconds / o.steps
  end
end
if not (stats.grad_norm > 0 and stats.grad_norm < math.huge) or stats.loss ~= stats.loss then
  errors.raise("USL_ERR_NUMERIC", "the gradient norm is %g and the loss %g: nothing was trained, so there is no figure", stats.grad_norm, stats.loss)
end
table.sort(seconds)
local rate = 1 / seconds[(#seconds + 1) // 2]
local memory = core.memory(model)
local recorded = 0 -- found in use, not planned
for _, item in ipairs(trainer:plan().items) do recorded = recorded + (item.name == "recorded passes" and item.bytes or 0) end
trainer:close() -- a plan may have taken all there is, and products want some to be measured in
local gemm = core.gemm_rate(model)
local figures = unsloth.json.object({
  shape = o.shape or o[1], method = o.method, device = model:info().device, dtype = model:info().dtype, batch = o.batch, seq = o.seq, rows = o.rows,
  rank = o.rank, steps = o.steps, tokens_per_second = rate, peak_memory = memory, planned_memory = plan.total,
  accumulation = o.accumulation, order = o.order, tokens_per_update = tokens, updates_per_second = rate / tokens,
  first_update_seconds = first, recomputed_layers = plan.recomputed_layers, whole_layers = plan.whole_layers,
  streamed_layers = plan.streamed_layers, host_memory = plan.host_total, recorded_memory = recorded,
  gemm_flops_per_second = gemm, share_of_gemm_rate = flops / gemm, loss = stats.loss,
  grad_norm = stats.grad_norm, load_seconds = loaded, threads = core.threads(),
}, { "shape", "method", "device", "dtype", "batch", "seq", "rows", "rank", "steps", "tokens_per_second", "peak_memory", "planned_memory" })
print(("%.0f tokens/s (median of %d updates of %d x %d tokens, %s, %s, %d threads)"):format(rate, o.steps, o.batch * o.accumulation, o.seq,
  o.method, model:info().dtype, core.threads()))
print(("%.2f updates/s of %.0f tokens on average; the first was done %.1f s after the start"):format(rate / tokens, tokens, first))
print(("memory %s (%s), planned %s, %d of %d layers recomputed, %d keep everything"):format(progress.bytes(memory),
  model:info().device == "cpu" and "peak, operating system" or "in use, the driver", progress.bytes(plan.total), plan.recomputed_layers, plan.layers,
  plan.whole_layers))
if recorded > 0 then print(("recorded passes take %s of it, which were not planned"):format(progress.bytes(recorded))) end
if plan.streamed_layers > 0 then
  print(("weights of %d layers resident, of %d streamed from host memory (%s there)"):format(plan.layers - plan.streamed_layers,
    plan.streamed_layers, progress.bytes(plan.host_total)))
end
print(("matrix products alone run at %.0f GFLOP/s here; the step reaches %.0f%% of that"):format(gemm / 1e9, 100 * flops / gemm))
print(("loss %.4f, gradient norm %.4f; weights made in %.1f s"):format(stats.loss, stats.grad_norm, loaded))
write_json(figures)
