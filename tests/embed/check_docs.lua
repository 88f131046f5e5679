--- Every option that --help of the program or of a verb lists is in its man page and in all three completions, and no
--- other is.
---
---     lua5.4 tests/embed/check_docs.lua PREFIX
local prefix = arg[1]
local program = prefix .. "/bin/unsloth-lua"
local share = prefix .. "/share"
local failed, checked = 0, 0

local function read(path)
  local file <close> = assert(io.open(path))
  return file:read "a"
end

local function said(...)
  local pipe = assert(io.popen(("'%s' %s 2>&1"):format(program, table.concat({ ... }, " "))))
  local text = pipe:read "a"
  assert(pipe:close(), text)
  return text
end

local function check(ok, format, ...)
  checked = checked + 1
  if ok then return end
  failed = failed + 1
  print("FAILED: " .. format:format(...))
end

local function plain(roff) return (roff:gsub("\\%-", "-"):gsub("\\%(aq", "'"):gsub("\\&", ""):gsub("\\e", "\\")) end

local function count(set)
  local n = 0
  for _ in pairs(set) do n = n + 1 end
  return n
end

local bash, zsh = read(share .. "/bash-completion/completions/unsloth-lua"), read(share .. "/zsh/site-functions/_unsloth-lua")
local fish = read(share .. "/fish/vendor_completions.d/unsloth-lua.fish")

local function check_verb(verb)
  local help = said(verb, "--help")
  local page = plain(read(("%s/man/man1/unsloth-lua-%s.1"):format(share, verb)))
  local list = bash:match(("\n    %s%%).-compgen %%-W \"([^\"]*%%-%%-help)\""):format(verb))
  local zsh_part = zsh:match(("\n    %s%%) shift.-return ;;"):format(verb))
  check(list and zsh_part, "%s is not completed", verb)
  local options = {}
  for name, text in help:gmatch "\n  %-%-([%w-]+)[^\n]-%s%s+([^\n]+)" do
    options[name] = true
    local about = text:gsub(" %(default.*", "")
    local has = page:find("\n.B --" .. name .. " ", 1, true) or page:find("\n.B --" .. name .. "\n", 1, true)
    check(has and (name == "help" or page:find(about, 1, true)),
      "%s --%s is not in the man page as --help says it", verb, name)
    check((" " .. list .. " "):find(" --" .. name .. " ", 1, true), "%s --%s is not completed in bash", verb, name)
    check(zsh_part:find("'--" .. name .. "[", 1, true), "%s --%s is not completed in zsh", verb, name)
    check(fish:find(("__fish_seen_subcommand_from %s' -l %s "):format(verb, name), 1, true), "%s --%s is not completed in fish", verb, name)
  end
  local in_page = select(2, page:gsub("\n%.B %-%-", ""))
  local in_fish = select(2, fish:gsub("__fish_seen_subcommand_from " .. verb .. "' %-l ", ""))
  local in_list = select(2, list:gsub("%S+", ""))
  for where, n in pairs { ["its man page"] = in_page, bash = in_list, fish = in_fish } do
    check(n == count(options), "%s has %d options, %s knows %d", verb, count(options), where, n)
  end
end

local page = plain(read(share .. "/man/man1/unsloth-lua.1"))
for option in said("-h"):gmatch "\n  (%-%S*)" do
  check(page:find("\n.B " .. option, 1, true), "%s is not in the man page", option)
  check(bash:find(option, 1, true) and zsh:find("'" .. option .. "[", 1, true), "%s is not completed", option)
end
local verbs = 0
for verb in page:match "\n.SH VERBS(.*)\n.SH":gmatch "\n%.B (%S+)" do
  check_verb(verb)
  verbs = verbs + 1
end
local cli = {}
for verb in said("-h"):match "verb runs a built%-in tool: ([^(]+)":gmatch "[%l_]+" do cli[verb] = true end
check(verbs == count(cli), "%d verbs have pages, the usage names %d", verbs, count(cli))
print(("%d verbs, %d checks of pages and completions, %d failed"):format(verbs, checked, failed))
os.exit(failed == 0)
