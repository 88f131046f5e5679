-- The hub: downloads, the cache and uploads, against an imitation of it on loopback (tests/hub/server.py).
local core = require "unsloth.core"
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

local top, port, local_answer
local quote = support.quote
local pwd = (support.shell "pwd"):gsub("\n", "")
local interpreter = support.program and support.program:gsub("^([^/].*/)", pwd .. "/%1") or "lua5.4"

local ASK = [[local u = require "unsloth"
local m = u.FastLanguageModel.from_pretrained { model_name = %q, load_in_4bit = false, dtype = "float32", device = "cpu" }
print(table.concat(m:generate_ids({ 256, 72, 105 }, { max_new_tokens = 8 }), " "))]]
local GET = [[print(require("unsloth.hub").find(%q, { %s }))]]

-- Runs Lua code in an interpreter of its own, with the hub's variables; more are words NAME=value.
local function child(code, more)
  return support.shell("cd %s && env -u HF_HUB_CACHE -u HUGGINGFACE_HUB_CACHE -u TRANSFORMERS_OFFLINE HF_HUB_OFFLINE= HF_TOKEN= no_proxy='*' "
    .. "HF_ENDPOINT=http://127.0.0.1:%s HF_HOME=%s %s %s -e %s", quote(top), port, quote(top .. "/home"), more or "", interpreter, quote(code))
end

local function get(name, opts, more) return child(GET:format(name, opts or ""), more) end

local function has(text, ...)
  for _, part in ipairs { ... } do assert.is_truthy(text:find(part, 1, true), ('"%s" is not in: %s'):format(part, text)) end
end

-- What get raises, a sentence that holds these.
local function refused(parts, ...)
  local out, err, code = get(...)
  assert.is_true(code ~= 0, out)
  has(err, table.unpack(parts))
  assert.is_nil(err:find("secret", 1, true))
end

local function faults(t) support.write(top .. "/faults.json", unsloth.json.encode(t)) end
local function log() return core.path_kind(top .. "/log") and support.read(top .. "/log") or "" end
local function count(pattern) return select(2, log():gsub(pattern, "")) end
local function blobs() return core.path_kind(top .. "/home/hub/models--org--one/blobs") and core.list_dir(top .. "/home/hub/models--org--one/blobs") or {} end

local function parts()
  local n = 0
  for _, name in ipairs(blobs()) do n = n + (name:find "%.incomplete$" and 1 or 0) end
  return n
end

-- org/two is org/one with its weights in two files and an index, and other folders that nobody wants.
local function make_sharded(from, to)
  core.make_dir(to .. "/onnx")
  for _, name in ipairs { "config.json", "tokenizer.json", "tokenizer_config.json" } do
    support.write(to .. "/" .. name, support.read(from .. "/" .. name))
  end
  local shards, map, i = { {}, {} }, {}, 0
  for name, t in pairs(unsloth.safetensors.load(from .. "/model.safetensors")) do
    i = i % 2 + 1
    shards[i][name], map[name] = t, ("model-0000%d-of-00002.safetensors"):format(i)
  end
  for k, shard in ipairs(shards) do unsloth.safetensors.save(("%s/model-0000%d-of-00002.safetensors"):format(to, k), shard) end
  support.write(to .. "/model.safetensors.index.json", unsloth.json.encode { metadata = { total_size = 1 }, weight_map = map })
  support.write(to .. "/pytorch_model.bin", ("x"):rep(1000))
  support.write(to .. "/onnx/model.safetensors", "y")
end

describe("the hub", function()
  setup(function()
    top = support.temp_dir()
    local folder = support.tiny_folder()
    core.make_dir(top .. "/models/org")
    assert(os.rename(folder, top .. "/models/org/one"))
    make_sharded(top .. "/models/org/one", top .. "/models/org/two")
    core.make_dir(top .. "/models/org/files")
    for _, name in ipairs { "a-Q4_K_M.gguf", "a-Q8_0.gguf" } do support.write(top .. "/models/org/files/" .. name, name:rep(100)) end
    core.make_dir(top .. "/models/org/bin")
    support.write(top .. "/models/org/bin/config.json", "{}")
    support.write(top .. "/models/org/bin/pytorch_model.bin", "x")
    port = support.shell("python3 %s %s", quote(support.root .. "tests/hub/server.py"), quote(top)):match "%d+"
    assert(port, "the imitation hub does not start")
    local model <close> = support.open(top .. "/models/org/one", { device = "cpu" })
    local_answer = table.concat(model:generate_ids({ 256, 72, 105 }, { max_new_tokens = 8 }), " ")
  end)

  teardown(function() support.remove(top) end) -- the server ends with its folder

  before_each(function()
    for _, name in ipairs { "home", "log", "faults.json", "go", "held", "pushed", "lfs" } do support.remove(top .. "/" .. name) end
  end)

  it("brings a model once, and never asks again", function()
    local out, err = child(ASK:format "org/one")
    assert.equals(local_answer .. "\n", out, err)
    assert.equals(1, count "GET /cdn")
    assert.equals(0, count "auth=B")
    local before = log()
    assert.equals(local_answer .. "\n", (child(ASK:format "org/one", "HF_HUB_OFFLINE=1")))
    assert.equals(local_answer .. "\n", (child(ASK:format "org/one")))
    has(get("org/one", "revision = 'main', local_files_only = true"), "/snapshots/")
    assert.equals(before, log())
    local ref = support.read(top .. "/home/hub/models--org--one/refs/main")
    local out2 = support.shell("readlink %s", quote(("%s/home/hub/models--org--one/snapshots/%s/config.json"):format(top, ref)))
    assert.matches("^%.%./%.%./blobs/%x+\n$", out2)
    has(get("org/one", "refresh = true"), ref) -- one question, and nothing comes anew
    assert.equals(1, count "GET /cdn")
  end)

  it("is read by huggingface_hub, where that is", function()
    local python = support.root .. "build/venv/bin/python"
    if not core.path_kind(python) or select(3, support.shell("%s -c 'import huggingface_hub'", python)) ~= 0 then
      pending "there is no huggingface_hub in build/venv"
      return
    end
    local path = get("org/one"):gsub("\n", "")
    local out, err = support.shell("HF_HOME=%s HF_HUB_OFFLINE=1 %s -c %s", quote(top .. "/home"), python, quote(
      "from huggingface_hub import scan_cache_dir, snapshot_download as s; c = scan_cache_dir(); "
      .. "print(s('org/one', local_files_only=True), len(c.warnings), [r.repo_id for r in c.repos])"))
    assert.equals(path .. " 0 ['org/one']\n", out, err)
  end)

  it("takes shards by their index, and nothing else", function()
    local out, err = child(ASK:format "org/two")
    assert.equals(local_answer .. "\n", out, err)
    assert.equals(0, count "pytorch_model")
    assert.equals(0, count "onnx")
    support.remove(get("org/two"):gsub("\n", "") .. "/model-00002-of-00002.safetensors")
    refused({ "model-00002-of-00002.safetensors", "HF_HUB_OFFLINE", "org/two" }, "org/two", nil, "HF_HUB_OFFLINE=1")
    assert.equals(local_answer .. "\n", (child(ASK:format "org/two")))
  end)

  it("takes one .gguf by name, or the tokenizer alone", function()
    refused({ "several .gguf", "a-Q8_0.gguf", "org/files:FILE" }, "org/files")
    has(get "org/files:Q4_K_M", "/a-Q4_K_M.gguf")
    has(get "org/files:a-Q8_0.gguf", "/a-Q8_0.gguf")
    has(get("org/files:q8_0", nil, "HF_HUB_OFFLINE=1"), "/a-Q8_0.gguf")
    refused({ 'has no file "Q2_K"' }, "org/files:Q2_K")
    local out, err = child [[print(#require("unsloth").AutoTokenizer.from_pretrained "org/one":encode "Hi")]]
    assert.equals("3\n", out, err)
    assert.equals(0, count "GET /cdn/org/one")
  end)

  -- Requests for bytes of weights name the part that they want; what comes is the header.
  it("is described without its weights", function()
    if not support.program then
      pending "the verbs are the program's"
      return
    end
    local function info(name, more)
      local out, err, code = support.shell("env -u HF_HUB_CACHE HF_HUB_OFFLINE= HF_TOKEN= no_proxy='*' HF_ENDPOINT=http://127.0.0.1:%s HF_HOME=%s %s %s "
        .. "info --tensors %s", port, quote(top .. "/home"), more or "", support.program, quote(name))
      return out:gsub("^path[^\n]*\n", ""), err, code
    end
    local models = top .. "/models/org/"
    if not core.path_kind(models .. "gguf") then
      local model <close>, tokenizer = support.open(models .. "one", { device = "cpu" })
      os.rename(model:save_pretrained_gguf(top, tokenizer, { quantization_method = "f32" })[1], top .. "/made.gguf")
      core.make_dir(models .. "gguf")
      os.rename(top .. "/made.gguf", models .. "gguf/made.gguf")
      -- A header longer than the first request: many tensors.
      core.make_dir(models .. "long")
      local tensors = {}
      for i = 1, 2000 do tensors[("a tensor whose name is as long as names can be, number %d"):format(i)] = unsloth.tensor { i } end
      unsloth.safetensors.save(models .. "long/adapter_model.safetensors", tensors)
      support.write(models .. "long/adapter_config.json", '{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    end
    for name, path in pairs { ["org/one"] = "one", ["org/two"] = "two", ["org/gguf"] = "gguf/made.gguf" } do
      support.remove(top .. "/log")
      local out, err, code = info(name)
      assert.equals(0, code, err)
      assert.equals((info(models .. path)), out)
      assert.is_true(count "GET /cdn" >= 1)
      assert.equals(count "GET /cdn", count "GET /cdn[^\n]* range=bytes=0%-%d")
      assert.equals(0, count "GET [^\n]*%.safetensors range= ", log())
      assert.is_true(select(3, info(name, "HF_HUB_OFFLINE=1")) ~= 0) -- nothing of it counts as a model
      faults { no_range = true }
      support.remove(top .. "/home")
      assert.equals(out, (info(name)))
      faults {}
    end
    local path = core.hub_outline and top .. "/outline"
    core.make_dir(path)
    local out, err, code = child(("print(require('unsloth.core').hub_outline('org/long', %q))"):format(path))
    assert.equals(0, code, out .. err)
    assert.equals(2000, #core.inspect(path .. "/adapter_model.safetensors").tensors)
    faults { status = { ["adapter_model.safetensors"] = { 404 } } }
    out, err, code = child(("print(require('unsloth.core').hub_outline('org/long', %q))"):format(path))
    assert.is_true(code ~= 0, out)
    has(err, "adapter_model.safetensors", "404")
    -- Also when only the second request for it is refused, by a server that had sent the whole file for the first.
    faults { no_range = true, status = { ["adapter_model.safetensors"] = { 0, 404 } } }
    out, err, code = child(("print(require('unsloth.core').hub_outline('org/long', %q))"):format(path))
    assert.is_true(code ~= 0, out)
    has(err, "adapter_model.safetensors", "404")
    faults {}
    get "org/one" -- held whole, it is not asked about
    support.remove(top .. "/log")
    assert.equals(0, select(3, info "org/one"))
    assert.equals("", log())
  end)

  it("refuses a model that cannot be loaded before its weights come", function()
    local function made(name, from, change)
      local config = unsloth.json.decode(support.read(top .. "/models/org/one/config.json"))
      change(config)
      core.make_dir(top .. "/models/org/" .. name)
      for _, file in ipairs(core.list_dir(top .. "/models/org/" .. from)) do
        if file:find "%.json$" or file:find "^model" then
          support.write(("%s/models/org/%s/%s"):format(top, name, file), support.read(("%s/models/org/%s/%s"):format(top, from, file)))
        end
      end
      support.write(("%s/models/org/%s/config.json"):format(top, name), unsloth.json.encode(config))
    end
    made("gptq", "one", function(config) config.quantization_config = { quant_method = "gptq", bits = 4 } end)
    made("falcon", "two", function(config) config.architectures = { "FalconForCausalLM" } end)
    for name, says in pairs { gptq = "load_in_4bit = true", falcon = "FalconForCausalLM is not supported" } do
      for _, code in ipairs { GET:format("org/" .. name, ""), ASK:format("org/" .. name) } do
        local out, err, status = child(code)
        assert.is_true(status ~= 0, out)
        has(err, ("org/%s/config.json"):format(name), says)
      end
      assert.equals(0, count "GET [^\n]*%.safetensors range=", log()) -- the weights' index may come, what it names may not
      has(get("org/" .. name, "tokenizer_only = true"), "/snapshots/")
      assert.is_true(core.path_kind(("%s/home/hub/models--org--%s"):format(top, name)) == "folder")
    end
    assert.equals(2, count "GET [^\n]*/config%.json range=", log())
  end)

  it("goes on where it was cut, and tries again what fails for a moment", function()
    faults { cut = { ["model.safetensors"] = { 30000, 20000 }, ["tokenizer.json"] = { 100 } }, status = { api = { 503 }, ["config.json"] = { 500, 429 } },
      retry_after = "0" }
    local out, err = child(ASK:format "org/one")
    assert.equals(local_answer .. "\n", out, err)
    has(log(), "range=bytes=30000-", "range=bytes=50000-", "range=bytes=100-")
    assert.equals(0, parts())
  end)

  it("begins anew at a hub that knows no ranges", function()
    faults { cut = { ["model.safetensors"] = { 30000 } }, no_range = true }
    local out, err = child(ASK:format "org/one")
    assert.equals(local_answer .. "\n", out, err)
  end)

  it("goes on in another run, from what was left", function()
    faults { cut = { ["model.safetensors"] = { 30000 } }, status = { ["model.safetensors"] = { 0, 404 } } }
    refused({ "model.safetensors", "404" }, "org/one")
    assert.is_true(parts() >= 1)
    support.remove(top .. "/log")
    faults {}
    assert.equals(local_answer .. "\n", (child(ASK:format "org/one")))
    has(log(), "/cdn/org/one/model.safetensors range=bytes=30000-")
    assert.equals(0, parts())
  end)

  it("refuses wrong sizes and wrong bytes, and keeps none of them", function()
    faults { lie = { ["model.safetensors"] = 7 } }
    refused({ "model.safetensors", "bytes came where the hub says" }, "org/one")
    faults { lie = { ["model.safetensors"] = -7 } }
    refused({ "model.safetensors", "or more" }, "org/one")
    faults { corrupt = { "model.safetensors" } }
    refused({ "model.safetensors", "checksum" }, "org/one")
    support.remove(top .. "/home") -- it came whole meanwhile
    faults { corrupt = { "tokenizer.json" } } -- small files by git's own name
    refused({ "tokenizer.json", "checksum" }, "org/one")
    refused({ "not in the cache" }, "org/one", nil, "HF_HUB_OFFLINE=1")
    faults {}
    assert.equals(local_answer .. "\n", (child(ASK:format "org/one")))
  end)

  it("says what the hub does not want", function()
    faults { gated = { "org/one" }, private = { "org/two" } }
    refused({ "org/one", "gated", "accept", "HF_TOKEN" }, "org/one")
    refused({ "org/two", "private", "HF_TOKEN" }, "org/two")
    refused({ "does not let this token" }, "org/two", "token = 'wrong'")
    refused({ "org/none", "404", "check the name" }, "org/none", "token = 'secret'")
    faults { status = { api = { 429, 429, 429, 429, 429 } }, retry_after = "0" }
    refused({ "429", "in 0 s" }, "org/one")
    faults { status = { api = { 429 } }, retry_after = "4000" }
    refused({ "429", "in 4000 s", "HF_TOKEN" }, "org/one")
    faults {}
    refused({ 'no revision "nope"', "404" }, "org/one", "revision = 'nope'")
    refused({ "safetensors" }, "org/bin")
    refused({ "org/one", "HF_HUB_OFFLINE", "cache" }, "org/one", nil, "HF_HUB_OFFLINE=1")
    refused({ "org/one", "local_files_only" }, "org/one", "local_files_only = true")
    refused({ "does not answer", "no such path here" }, "org/one", nil, "HF_ENDPOINT=http://127.0.0.1:1")
    local _, err = support.shell("cd %s && HF_HUB_OFFLINE=1 HF_HOME=%s %s info examples/tiny-lama", quote(support.root), quote(top .. "/home"),
      support.program or interpreter .. " lua/unsloth/cli/info.lua")
    if support.program then has(err, "HF_HUB_OFFLINE", "There is no such path here either: did you mean examples/tiny-llama?") end
    refused({ "cannot be a revision" }, "org/one", "revision = '../x'")
    refused({ "character that no token has" }, "org/one", "token = 'a\\nb'")
  end)

  it("sends the token to the hub, and to nobody else", function()
    faults { gated = { "org/one" } }
    has(get("org/one", "token = 'secret'"), "/snapshots/")
    assert.is_true(count "auth=Bearer secret" > 5)
    assert.equals(0, count "/cdn/[^\n]*secret")
    support.remove(top .. "/home")
    core.make_dir(top .. "/home")
    support.write(top .. "/home/token", "secret\n")
    has(get "org/one", "/snapshots/")
    support.remove(top .. "/home/hub")
    refused({ "gated" }, "org/one", "token = false")
  end)

  it("knows branches, tags, commits, and new names of old repositories", function()
    local path = get("org/one", "revision = 'v1'"):gsub("\n", "")
    assert.equals(path .. "\n", (get("org/one", "revision = 'refs/pr/1'")))
    assert.equals(path .. "\n", (get("org/one", ("revision = %q"):format(path:match "%x+$"))))
    assert.equals(1, count "GET /cdn")
    has(get "old/name", "models--old--name/snapshots/" .. path:match "%x+$")
    faults { hostile = { "../../escape", "/etc/passwd", "a\nb" } }
    has(get("org/two"), "/snapshots/")
    assert.equals(0, count "escape")
  end)

  it("brings a file once to two that want it at once", function()
    faults { hold = "model.safetensors" }
    local code = GET:format("org/one", "")
    local out, err = support.shell("env -u HF_HUB_CACHE HF_HUB_OFFLINE= HF_TOKEN= no_proxy='*' HF_ENDPOINT=http://127.0.0.1:%s HF_HOME=%s "
      .. "python3 %s pair %s %s -e %s", port, quote(top .. "/home"), quote(support.root .. "tests/hub/drive.py"), quote(top),
      interpreter, quote(code))
    local path, status, again, code2 = out:match "^(%S+) (%d+)\n(%S+) (%d+)\n$"
    assert.equals("0", status, err)
    assert.equals("0", code2)
    assert.equals(path, again)
    assert.equals(1, count "GET /cdn")
    assert.equals(0, parts())
  end)

  support.it_program("stops at Ctrl-C and goes on from there", function()
    faults { hold = "model.safetensors" }
    local out, err = support.shell("env -u HF_HUB_CACHE HF_HUB_OFFLINE= HF_TOKEN= no_proxy='*' HF_ENDPOINT=http://127.0.0.1:%s HF_HOME=%s "
      .. "python3 %s interrupt %s %s download org/one", port, quote(top .. "/home"), quote(support.root .. "tests/hub/drive.py"), quote(top),
      interpreter)
    assert.equals("130\n", out, err)
    assert.is_true(parts() >= 1)
    faults {}
    assert.equals(local_answer .. "\n", (child(ASK:format "org/one")))
    assert.matches("GET /cdn/org/one/model%.safetensors range=bytes=%d%d%d%d+%-", log())
  end)

  -- ---- Uploads ----

  local PUSH = [[local u = require "unsloth"
    local m, t = u.FastLanguageModel.from_pretrained { model_name = %q, load_in_4bit = false, dtype = "float32", device = "cpu" }
    %s]]

  local function upload(words, more)
    return child(PUSH:format(top .. "/models/org/one", words), "HF_TOKEN=secret " .. (more or ""))
  end

  local function same(pushed, bytes) assert.equals(bytes, support.read(top .. "/pushed/" .. pushed)) end

  it("uploads merged weights, a .gguf, a tokenizer and an adapter", function()
    local out, err, code = upload [[m:push_to_hub_merged("me/merged", t, { save_method = "merged_32bit", private = true, commit_message = "mine" })
      m:push_to_hub_gguf("me/gguf", t, "q8_0") t:push_to_hub "me/tok"
      u.FastLanguageModel.get_peft_model(m, { r = 4 }) m:push_to_hub("me/adapter") m:push_to_hub("me/adapter")]]
    assert.equals(0, code, out .. err)
    same("me/merged/model.safetensors", support.read(top .. "/models/org/one/model.safetensors"))
    has(support.read(top .. "/pushed/me/merged.header"), '"mine"')
    for _, name in ipairs { "merged/tokenizer.json", "merged/config.json", "tok/tokenizer.json", "adapter/adapter_model.safetensors",
      "adapter/adapter_config.json" } do assert.equals("file", core.path_kind(top .. "/pushed/me/" .. name), name) end
    core.inspect(top .. "/pushed/me/gguf/" .. core.list_dir(top .. "/pushed/me/gguf")[1])
    assert.is_nil(core.path_kind(top .. "/_unsloth_temporary_saved_buffers"))
    assert.equals(3, count "PUT ") -- the adapter's bytes were there the second time
    assert.equals(0, count "PUT [^\n]*secret")
  end)

  it("uploads in parts where the hub wants them", function()
    faults { chunk = 40000, status = { put = { 500, 503 }, commit = { 503 } }, retry_after = "0" }
    local out, err, code = upload [[m:push_to_hub_merged("me/parts", t, { save_method = "merged_32bit" })]]
    assert.equals(0, code, out .. err)
    same("me/parts/model.safetensors", support.read(top .. "/models/org/one/model.safetensors"))
  end)

  it("says why an upload is refused", function()
    local function fails(parts_, words, more, f)
      faults(f or {})
      local out, err, code = upload(words, more)
      assert.is_true(code ~= 0, out)
      has(err, table.unpack(parts_))
      assert.is_nil(err:find("secret", 1, true))
    end
    local MERGED = [[m:push_to_hub_merged("me/x", t)]]
    fails({ "model.safetensors", "422", "over quota" }, MERGED, nil, { refuse_lfs = "over quota" })
    fails({ "needs a token" }, MERGED, "HF_TOKEN=")
    fails({ "does not let this token", "401" }, MERGED, "HF_TOKEN=wrong")
    fails({ "me/x", "HF_HUB_OFFLINE" }, MERGED, "HF_HUB_OFFLINE=1")
    fails({ "user/name" }, [[m:push_to_hub "x"]])
    fails({ "model.safetensors", "400" }, MERGED, nil, { status = { put = { 400 } } })
    fails({ "403", "token" }, MERGED, nil, { status = { commit = { 403 } } })
    assert.is_nil(core.path_kind(top .. "/_unsloth_temporary_saved_buffers"))
  end)
end)
