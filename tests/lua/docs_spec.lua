-- Every block of code in the README and in the guide is run: a page is one script whose lines keep their numbers.
--   lua      runs, one block after the other, with the locals of those before
--   sh       runs, `unsloth-lua` being the program; behind <!-- checked only --> each first word must be a script
---            that bash can read, unsloth-lua with a verb that it has, or cmake with options that CMakeLists.txt has
--   c        stands behind <!-- from FILE --> and must be in that file, word for word
--   python   compiles, and its options are those of the page's Lua
-- <!-- lua: code --> is run and not shown. Blocks without a language are output.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local core = require "unsloth.core"
local doc = require "unsloth.doc"

local function pages()
  local list = { "README.md" }
  for _, name in ipairs(core.list_dir(support.root .. "examples/guide")) do list[#list + 1] = "examples/guide/" .. name end
  return list
end

-- The blocks of a page: { language, text, first line, note } where note is the comment in front; and hidden lines of Lua.
local function blocks_of(text)
  local blocks, hidden, open, note, number = {}, {}, nil, nil, 0
  for line in (text .. "\n"):gmatch "(.-)\n" do
    number = number + 1
    local fence = line:match "^%s*```(%w*)%s*$"
    if open and fence then
      open.text = table.concat(open.lines, "\n")
      blocks[#blocks + 1], open = open, nil
    elseif open then
      open.lines[#open.lines + 1] = line
    elseif fence then
      open, note = { language = fence, lines = {}, first = number + 1, note = note }, nil
    elseif line:find "^<!%-%- lua: " then
      hidden[number] = line:match "^<!%-%- lua: (.*) %-%->$"
    elseif line:find "%S" then
      note = line:match "^<!%-%- (.*) %-%->$"
    end
  end
  assert(not open, "a block is not closed")
  return blocks, hidden
end

-- The page as a script: Lua where it stands, shell blocks as calls.
local function script_of(blocks, hidden)
  local lines, last = {}, 0
  for number, code in pairs(hidden) do
    lines[number], last = code, math.max(last, number)
  end
  for _, block in ipairs(blocks) do
    local run = block.language == "lua" or block.language == "sh" and block.note ~= "checked only"
    if run then
      for i, line in ipairs(block.lines) do lines[block.first + i - 1] = line end
      last = math.max(last, block.first + #block.lines)
      if block.language == "sh" then
        lines[block.first - 1], lines[block.first + #block.lines] = "shell [=====[", "]=====]"
      end
    end
  end
  for i = 1, last do lines[i] = lines[i] or "" end
  return table.concat(lines, "\n")
end

-- What a page's script finds: shell(), and runs that are short whatever the page says.
local PROLOGUE = [[
  local arguments = require "unsloth.arguments"
  local new = arguments.new
  function arguments.new(o)
    local args = new(o)
    if args.max_steps > 4 then args.max_steps = 4 end
    return args
  end
  function shell(text)
    local ok, kind, code = os.execute("set -e\n" .. text:gsub("%-%-max%-steps %d+", "--max-steps 2"))
    if not ok then error(("the shell's %s %d"):format(kind, code), 2) end
  end
  dofile(arg[1])
]]

local function check_excerpt(page, block)
  local path = (block.note or ""):match "^from (.*)$"
  assert(path, ("%s:%d: a block of C says where it is from"):format(page, block.first))
  assert.is_truthy(support.read(support.root .. path):find(block.text, 1, true), ("%s:%d: %s does not hold this"):format(page, block.first, path))
end

local function check_scripts(block)
  for _, line in ipairs(block.lines) do
    local word, next_word = line:match "^(%S+)%s*(%S*)"
    if word == "cmake" then
      local build = support.read(support.root .. "CMakeLists.txt")
      for option in line:gmatch "%-D(%w+)=" do assert.is_truthy(build:find(option, 1, true), option) end
    else
      local path = support.quote(support.root .. word)
      local command = word == "unsloth-lua" and ("%s %s --help"):format(support.quote(support.program), next_word)
        or ("test -x %s && bash -n %s"):format(path, path)
      local _, err, code = support.shell("%s", command)
      assert.equals(0, code, line .. err)
    end
  end
end

-- "name=value" of Python and "name = value" of Lua, one a line, in one spelling.
local function options_in(text, pattern)
  local list = {}
  for line in (text .. "\n"):gmatch "(.-)\n" do
    local name, value = line:match(pattern)
    if name and not value:find "[({]$" then
      value = value:gsub("[%[{]%s*", "{"):gsub("%s*[%]}]", "}"):gsub("True", "true"):gsub("False", "false"):gsub("None", "nil")
      list[#list + 1] = name .. "=" .. value
    end
  end
  return list
end

local function check_python(blocks, block, dir)
  local path = support.write(dir .. "/script.py", block.text)
  local _, err, code = support.shell("python3 -m py_compile %s", path)
  assert.equals(0, code, err)
  for _, other in ipairs(blocks) do
    if other.language == "lua" then
      local python, lua = options_in(block.text, "^%s+([%w_]+)=(.-),$"), options_in(other.text, "^%s+([%w_]+) = (.-),$")
      assert.is_true(#python > 20)
      assert.same(python, lua)
    end
  end
end

describe("the documentation", function()
  local dir

  setup(function()
    dir = support.temp_dir()
    support.shell("root=$(realpath %s) && cd %s && ln -s $root/* . && rm -f build outputs && mkdir bin", support.quote(support.root .. "."), dir)
    if support.program then support.shell("ln -s $(realpath %s) %s/bin/unsloth-lua", support.quote(support.program), dir) end
    support.write(dir .. "/prologue.lua", PROLOGUE)
  end)
  teardown(function() support.remove(dir) end)

  for _, page in ipairs(pages()) do
    support.it_program(page .. " is true", function()
      local blocks, hidden = blocks_of(support.read(support.root .. page))
      for _, block in ipairs(blocks) do
        if block.language == "c" then check_excerpt(page, block) end
        if block.language == "python" then check_python(blocks, block, dir) end
        if block.language == "sh" and block.note == "checked only" then check_scripts(block) end
        assert.is_truthy(({ lua = 1, sh = 1, c = 1, python = 1, [""] = 1 })[block.language], page .. ": what is " .. block.language .. "?")
      end
      local script = support.write(dir .. "/page.lua", script_of(blocks, hidden))
      local out, err, code = support.shell("cd %s && PATH=$PWD/bin:$PATH unsloth-lua prologue.lua %s", dir, script)
      assert.equals(0, code, page .. " (line numbers are the page's): " .. err .. out:sub(-400))
    end)
    it(page .. " links to what is there", function()
      local folder = support.root .. (page:match "^(.*/)" or "")
      for target in support.read(support.root .. page):gmatch "%]%(([^)#]+)%)" do
        assert(target:find "^https?:" or core.path_kind(folder .. target), page .. ": there is no " .. target)
      end
    end)
  end
end)

describe("annotations", function()
  it("name the parameters that functions have, and known types", function()
    local wrong = {}
    for _, known in ipairs(doc.all()) do
      local entry = known.entry
      if entry and #entry.params > 0 then
        local names = {}
        for i, p in ipairs(entry.params) do names[i] = p.name end
        if table.concat(names, ", ") ~= entry.signature then wrong[#wrong + 1] = known.name .. "(" .. tostring(entry.signature) .. ")" end
        for _, p in ipairs(entry.params) do
          if p.type == "" then wrong[#wrong + 1] = known.name .. ": no type of " .. p.name end
        end
      end
    end
    assert.same({}, wrong)
  end)

  it("have examples that Lua can read", function()
    for _, known in ipairs(doc.all()) do
      local entry = known.entry
      if entry and #entry.example > 0 then
        local text = table.concat(entry.example, "\n")
        assert(load(text), known.name .. ": " .. text)
      end
    end
  end)

  it("have option classes that are as the modules check them", function()
    local text = assert(loadfile(support.root .. "lua/meta/make_options.lua"))()
    assert.equals(text, support.read(support.root .. "lua/meta/options.lua"), "run: lua/meta/make_options.lua > lua/meta/options.lua")
  end)

  support.it_program("give the reference", function()
    local out = support.temp_dir()
    finally(function() support.remove(out) end)
    local _, err, code = support.shell("%s %slua/reference.lua %s", support.program, support.root, out)
    assert.equals(0, code, err)
    local html = support.read(out .. "/index.html")
    for _, known in ipairs(doc.all()) do assert(html:find(('id="%s"'):format(known.name), 1, true), known.name) end
    assert.is_truthy(html:find("default 5e-05", 1, true))
  end)
end)
