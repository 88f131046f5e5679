-- Writes the reference, one page of HTML, from the annotations of the modules and of lua/meta: what help() and editors show too.
--
--     unsloth-lua lua/reference.lua build/reference
local core = require "unsloth.core"
local doc = require "unsloth.doc"
local files = require "unsloth.files"
local svg = require "unsloth.svg"

local escape = svg.escape
local out, toc = {}, {}

local function add(format, ...)
  out[#out + 1] = select("#", ...) > 0 and format:format(...) or format
end

local function sorted(t)
  local names = {}
  for name in pairs(t) do names[#names + 1] = name end
  table.sort(names)
  return names
end

local function options(spec)
  add '<details><summary>options</summary><div class="scroll"><table>'
  for _, name in ipairs(sorted(spec)) do
    local _, text = doc.option_text(name, spec[name])
    add("<tr><td><code>%s</code></td><td>%s</td></tr>", escape(name), escape(text))
  end
  add "</table></div></details>"
end

local function one(known)
  local entry = known.entry
  add('<section id="%s"><h3><code>%s</code></h3>', escape(known.name), escape(doc.signature_of(known)))
  add("<p>%s</p>", escape(table.concat(entry.text, "\n")))
  if #entry.params + #entry.returns > 0 then
    add '<div class="scroll"><table>'
    for _, p in ipairs(entry.params) do
      add("<tr><td><code>%s</code></td><td><code>%s</code></td><td>%s</td></tr>", escape(p.name), escape(p.type), escape(p.text))
    end
    for _, r in ipairs(entry.returns) do add("<tr><td>returns</td><td colspan=2><code>%s</code></td></tr>", escape(r)) end
    add "</table></div>"
  end
  if #entry.example > 0 then add("<pre>%s</pre>", escape(table.concat(entry.example, "\n"))) end
  local spec = doc.options_of(known.value)
  if spec then options(spec) end
  add "</section>"
end

-- By what stands before the last dot: the module, its parts, classes.
local groups = {}
for _, known in ipairs(doc.all()) do
  local group = known.name:match "^(.*)%.[^.]*$"
  groups[group] = groups[group] or {}
  table.insert(groups[group], known)
end
for _, group in ipairs(sorted(groups)) do
  add('<h2 id="%s">%s</h2>', escape(group), escape(group))
  toc[#toc + 1] = ('<a href="#%s">%s</a>'):format(escape(group), escape(group))
  local entry = doc.modules()[group]
  if entry then add("<p>%s</p>", escape(table.concat(entry.text, "\n"))) end
  for _, known in ipairs(groups[group]) do one(known) end
end

local STYLE = svg.style .. [[

body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 900px; margin: 0 auto; padding: 16px } nav a { margin-right: 12px; color: var(--one) }
h2 { margin-top: 40px; border-bottom: 1px solid var(--line) } h3 { margin: 26px 0 4px; font-size: 1rem }
pre { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 8px; padding: 10px } .scroll { overflow-x: auto }
td { padding: 2px 12px 2px 0; vertical-align: top } p { white-space: pre-line }]]

local dir = arg[1] or "build/reference"
core.make_dir(dir)
files.write(dir .. "/index.html", table.concat({
  '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
  '<meta name="color-scheme" content="light dark"><title>unsloth-lua: reference</title><style>' .. STYLE .. "</style></head><body><main>",
  "<h1>unsloth-lua: reference</h1><nav>" .. table.concat(toc, " ") .. "</nav>", table.concat(out, "\n"), "</main></body></html>", "" }, "\n"))
print(("%d functions in %s/index.html"):format(#doc.all(), dir))
