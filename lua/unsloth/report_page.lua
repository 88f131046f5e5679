--- The page of unsloth.report: HTML that needs nothing beside itself.
local arguments = require "unsloth.arguments"
local progress = require "unsloth.progress"
local show = require "unsloth.show"
local svg = require "unsloth.svg"

local M = {}
local escape = svg.escape

local STYLE = svg.style .. [[

* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 48px }
h1 { font-size: 1.6rem; margin: 8px 0 0 } h2 { font-size: 1.15rem; margin: 32px 0 8px }
p { margin: 4px 0 } .soft { color: var(--soft) } .bad { color: var(--two) } .good { color: var(--three) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin: 18px 0 }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; min-width: 0 }
.card b { display: block; font-size: 1.15rem; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px }
.charts svg, .wide svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px }
.half { max-width: 540px }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
td.n, th.n { text-align: right; white-space: nowrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 8px; padding: 10px; margin: 6px 0;
  max-height: 22em; overflow-y: auto }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px }
.bar { background: var(--line); height: 8px; border-radius: 4px; min-width: 80px }
.bar i { display: block; background: var(--one); height: 8px; border-radius: 4px }
details summary { cursor: pointer; color: var(--soft) }]]

local function add(out, format, ...)
  out[#out + 1] = select("#", ...) > 0 and format:format(...) or format
end

local function card(out, name, value)
  add(out, '<div class="card"><span class="soft">%s</span><b>%s</b></div>', escape(name), escape(value))
end

local function number(x)
  return x == x and ("%.4g"):format(x) or "nan"
end

local function head(out, d)
  local log = d.series.loss
  add(out, "<h1>%s</h1>", escape(d.title))
  add(out, '<p class="soft">%s, %s on %s, %s%s. unsloth-lua %s, begun %s.</p>', escape(d.name ~= "" and d.name or d.model.architecture),
    escape(d.model.architecture), escape(d.model.device), escape(d.model.dtype), d.adapter and (', adapter "%s"'):format(escape(d.adapter)) or "",
    escape(d.version), escape(d.started))
  if d.failure then add(out, '<p class="bad">The run did not end by itself: %s</p>', escape(d.failure)) end
  add(out, '<div class="cards">')
  card(out, "loss", ("%s → %s"):format(number(log[1]), number(log[#log])))
  card(out, "updates", ("%d of %d"):format(d.state.global_step, d.state.max_steps or d.state.global_step))
  local seconds, tokens = 0, 0
  for i, s in ipairs(d.series.seconds) do seconds, tokens = seconds + s, tokens + d.series.tokens[i] end
  card(out, "time in updates", progress.duration(seconds))
  card(out, "tokens a second", seconds > 0 and ("%.0f"):format(tokens / seconds) or "-")
  local peak = 0
  for _, m in ipairs(d.series.memory) do peak = math.max(peak, m) end
  card(out, "memory in use", progress.bytes(peak))
  card(out, "trained", ("%s of %s"):format(show.count(d.model.trainable), show.count(d.model.parameters)))
  add(out, "</div>")
end

local function mib(x) return progress.bytes(math.max(0, x // 1 | 0)) end

local function charts(out, d)
  local s = d.series
  local rates = {}
  for i, seconds in ipairs(s.seconds) do rates[i] = seconds > 0 and s.tokens[i] / seconds or 0 / 0 end
  add(out, '<h2>Curves</h2><div class="charts">')
  out[#out + 1] = svg.chart(require("unsloth.report").loss_series(s, d.log), { title = "loss", x = "step" })
  for _, one in ipairs { { "learning rate", s.learning_rate }, { "gradient norm", s.grad_norm }, { "tokens a second", rates },
    { "memory in use", s.memory, mib } } do
    out[#out + 1] = svg.chart({ { x = s.step, y = one[2] } }, { title = one[1], x = "step", format = one[3] })
  end
  add(out, "</div>")
end

local function samples(out, d)
  if #d.samples == 0 then return end
  add(out, "<h2>Samples before and after</h2>")
  for _, sample in ipairs(d.samples) do
    add(out, "<p><b>%s</b></p><div class=\"pair\"><div><span class=\"soft\">before</span><pre>%s</pre></div>"
      .. "<div><span class=\"soft\">after</span><pre>%s</pre></div></div>", escape(sample.prompt), escape(sample.before or ""), escape(sample.after or ""))
  end
end

local function plan(out, d)
  local p = d.plan
  if not p then return end
  add(out, '<h2>Memory plan</h2><div class="scroll"><table><tr><th>what</th><th class="n">bytes</th><th></th></tr>')
  for _, item in ipairs(p.items) do
    add(out, '<tr><td>%s</td><td class="n">%s</td><td><div class="bar"><i style="width:%.1f%%"></i></div></td></tr>', escape(item.name),
      progress.bytes(item.bytes), p.total > 0 and 100 * item.bytes / p.total or 0)
  end
  add(out, '<tr><th>total</th><th class="n">%s</th><th>of %s</th></tr></table></div>', progress.bytes(p.total), progress.bytes(p.limit))
  add(out, '<p class="soft">One pass holds %d tokens in %d rows; %d of %d layers are computed again%s.</p>', p.capacity_tokens, p.capacity_rows,
    p.recomputed_layers, p.layers, p.streamed_layers > 0 and (", the weights of %d are streamed from host memory"):format(p.streamed_layers) or "")
end

local function dataset(out, d)
  add(out, '<h2>Data set</h2><div class="scroll"><table>')
  local function row(name, value) add(out, '<tr><td>%s</td><td class="n">%s</td></tr>', escape(name), escape(value)) end
  for _, key in ipairs { "rows", "tokens", "counted", "longest", "truncated", "dropped" } do row(key, ("%d"):format(d.rows[key])) end
  if d.eval_rows then row("rows of the evaluation set", ("%d"):format(d.eval_rows.rows)) end
  add(out, "</table></div>")
  local x, y = {}, {}
  for i, n in ipairs(d.lengths.classes) do x[i], y[i] = (i - 0.5) * d.lengths.width, n end
  if #x > 1 then
    out[#out + 1] = '<div class="charts half">' .. svg.chart({ { x = x, y = y } }, { title = "rows by length", x = "tokens" }) .. "</div>"
  end
  if d.first_row then add(out, "<details><summary>the first row, as it is trained</summary><pre>%s</pre></details>", escape(d.first_row)) end
end

local function text_of(value)
  if type(value) ~= "table" then return tostring(value) end
  local words = {}
  for i, word in ipairs(value) do words[i] = tostring(word) end
  return table.concat(words, ", ")
end

-- What has a meaning here: options that are accepted without any, or refused, are left out.
local function add_settings(out, title, values, defaults)
  local names = {}
  for name, value in pairs(values) do
    local rule = arguments.SPEC[name]
    local idle = values == defaults or rule and (rule.note or rule.refuse)
    if type(value) ~= "function" and not idle then names[#names + 1] = name end
  end
  table.sort(names)
  add(out, '<p class="soft">%s</p><div class="scroll"><table>', title)
  for _, name in ipairs(names) do
    local changed = text_of(defaults[name]) ~= text_of(values[name])
    add(out, changed and "<tr><td><b>%s</b></td><td><b>%s</b></td></tr>" or "<tr><td>%s</td><td>%s</td></tr>", escape(name),
      escape(text_of(values[name])))
  end
  add(out, "</table></div>")
end

local function settings(out, d)
  add(out, "<h2>Settings</h2>")
  if d.adapter_options then add_settings(out, "adapter", d.adapter_options, d.adapter_defaults) end
  add_settings(out, "training", d.args, arguments.defaults)
  add(out, '<p class="soft">What differs from the defaults is bold. %d threads.</p>', d.threads)
end

local function exports(out, d)
  if #d.exports == 0 then return end
  add(out, '<h2>Exports</h2><div class="scroll"><table><tr><th>kind</th><th>path</th><th>check</th></tr>')
  for _, e in ipairs(d.exports) do
    add(out, '<tr><td>%s</td><td>%s</td><td class="%s">%s</td></tr>', escape(e.kind), escape(e.path), e.whole and "good" or "bad", escape(e.text))
  end
  add(out, "</table></div>")
end

--- The page of what unsloth.report has gathered.
function M.html(d)
  local out = { ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    .. '<meta name="color-scheme" content="light dark"><title>%s</title><style>'):format(escape(d.title)) .. STYLE .. "</style></head><body><main>" }
  for _, part in ipairs { head, charts, samples, exports, plan, dataset, settings } do part(out, d) end
  out[#out + 1] = "</main></body></html>\n"
  return table.concat(out, "\n")
end

return M
