--- unsloth-lua plan: the memory plan of a training run, made by a dry run of the very code that would run.
local args = require "unsloth.args"
local errors = require "unsloth.errors"
local progress = require "unsloth.progress"
local run = require "unsloth.cli.run"

local o = args.parse(arg, { name = "plan", words = "[MODEL]",
  about = "Prints where memory goes in a training run, and what the plan decides. Only shapes are needed: no weight is\n"
    .. "made or read. --device cuda --memory 24GiB plans for such a card where there is none (with an H100's kernels).\n"
    .. "What does not fit is shown at its smallest, and exits 1.",
  options = run.options })
local model = run.model(o, true)
local trainer = run.trainer(o, model, run.rows(o, model:info().vocab, 1), 1)
local plan = trainer:plan()
print(("%-30s %12s"):format("memory", "bytes"))
for _, item in ipairs(plan.items) do print(("%-30s %12s"):format(item.name, progress.bytes(item.bytes))) end
print(("%-30s %12s of %s"):format("total", progress.bytes(plan.total), progress.bytes(plan.limit)))
print(("one pass holds %d tokens in %d rows; %d of %d layers are recomputed, %d keep everything"):format(plan.capacity_tokens,
  plan.capacity_rows, plan.recomputed_layers, plan.layers, plan.whole_layers))
if plan.offloaded_inputs > 0 then print "inputs of recomputed layers are kept in host memory" end
if plan.piece_tokens > 0 then print(("recomputed MLPs run over %d tokens at a time"):format(plan.piece_tokens)) end
if plan.streamed_layers > 0 then
  print(("weights of %d layers are resident, those of %d are streamed from host memory"):format(plan.layers - plan.streamed_layers,
    plan.streamed_layers))
end
if plan.host_total > 0 then print(("host memory in use for that: %s"):format(progress.bytes(plan.host_total))) end
if plan.total > plan.limit then
  errors.raise("USL_ERR_NOMEM", "the plan does not fit: at its smallest, a row of %d tokens a pass, it takes %s of %s; lower --seq or --rank, %s",
    plan.capacity_tokens, progress.bytes(plan.total), progress.bytes(plan.limit), o.memory and "or raise --memory"
    or "take --method qlora, or say with --memory what another machine has")
end
