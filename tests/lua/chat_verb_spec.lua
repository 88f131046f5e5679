-- unsloth-lua chat, on a terminal and through a pipe.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

describe("unsloth-lua chat", function()
  local dir, adapter

  setup(function()
    dir = support.tiny_folder()
    support.write(dir .. "/chat_template.jinja",
      "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    local model <close> = support.open(dir)
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, init_lora_weights = false })
    adapter = dir .. "/adapter"
    model:save_pretrained(adapter)
  end)
  teardown(function() support.remove(dir) end)

  local function chat(lines, words)
    for i, line in ipairs(lines) do lines[i] = support.quote(line) end
    return support.shell("printf '%%s\\n' %s | %s chat %s --max-new-tokens 6 --dtype float32 %s", table.concat(lines, " "), support.program, dir,
      words or "")
  end

  local function reply(messages, with_adapter)
    local model <close> = support.open(dir)
    if with_adapter then model:load_adapter(adapter) end
    return model:generate(messages, { max_new_tokens = 6 })
  end

  support.it_program("answers through the model's template, and remembers", function()
    local first = reply { { role = "user", content = "Hi" } }
    local second = reply { { role = "user", content = "Hi" }, { role = "assistant", content = first }, { role = "user", content = "And?" } }
    local out, err, code = chat { "Hi", "", "And?" }
    assert.equals(0, code, err)
    assert.equals(first .. "\n" .. second .. "\n", out)
    assert.equals("", err)
    out = chat { "Hi", "/reset", "Hi", "/undo", "Hi", "/retry" }
    assert.equals((first .. "\n"):rep(4), out)
    assert.equals((first .. "\n"):rep(2), (chat { "Hi", "/clear", "Hi", "/exit", "Hi" }))
  end)

  support.it_program("takes a system prompt, and an adapter on and off", function()
    local told = reply { { role = "system", content = "Be brief." }, { role = "user", content = "Hi" } }
    local plain, adapted = reply { { role = "user", content = "Hi" } }, reply({ { role = "user", content = "Hi" } }, true)
    assert.equals(told .. "\n", (chat({ "Hi" }, "--system 'Be brief.'")))
    local out, err = chat({ "/system Be brief.", "Hi", "/system", "Hi", "/template" })
    assert.equals(told .. "\n" .. plain .. "\n", out)
    assert.is_truthy(err:find("[user]Hi[assistant]", 1, true), err)
    out, err = chat({ "Hi", "/adapter off", "/reset", "Hi", "/adapter on", "/reset", "Hi" }, "--adapter " .. adapter)
    assert.equals(adapted .. "\n" .. plain .. "\n" .. adapted .. "\n", out)
    assert.is_truthy(err:find("the adapter is off\nthe adapter is on", 1, true), err)
    assert.is_true(plain ~= adapted)
  end)

  support.it_program("saves a conversation and goes on with it", function()
    local path = dir .. "/talk.json"
    local whole = chat { "Hi", "And?", "More?" }
    local _, err = chat { "Hi", "And?", "/save " .. path, "/quit", "never" }
    assert.is_truthy(err:find("4 messages", 1, true), err)
    assert.equals(whole:match "([^\n]*)\n$", (chat { "/load " .. path, "More?" }):match "([^\n]*)\n$")
    assert.equals(4, #unsloth.load_dataset(path)[1].messages)
  end)

  support.it_program("says what is wrong in a sentence and goes on", function()
    local out, err, code = chat { "/resett", "/adapter on", "/save", "/save /no/such/folder/x", "/temperature x", ("long "):rep(100), "/help", "Hi" }
    assert.equals(0, code, err)
    for _, text in ipairs { "did you mean /reset?", "--adapter DIR", "/save wants", "/no/such/folder/x", "number of 0 or more", "max_seq_length",
      "/reset begins anew", "/history" } do
      assert.is_truthy(err:find(text, 1, true), text .. ": " .. err)
    end
    assert.equals(reply { { role = "user", content = "Hi" } } .. "\n", out)
    local bare = support.tiny_folder()
    local _, complaint, status = support.shell("%s chat %s < /dev/null", support.program, bare)
    assert.equals(1, status)
    assert.is_truthy(complaint:find("--template chatml", 1, true), complaint)
    out, err, code = support.shell("echo Hi | %s chat %s --template chatml --max-new-tokens 2", support.program, bare)
    assert.equals(0, code, out .. err)
    support.remove(bare)
  end)

  support.it_program("on a terminal streams, stops an answer at Ctrl-C, and edits lines", function()
    -- Random weights go on for long: the context's end is far behind the interrupt.
    local out, code = support.converse(dir, { { "> ", "Hi\\" }, { ">> ", "there" }, { "> ", "/history" }, { "user: Hi", "/reset" }, { "> ", "^C" },
      { "> ", "/temperature 0.5" }, { "> ", "/history" }, { "> ", "^P" }, { "/history", "" }, { "> ", "^D" } },
      "chat " .. dir .. " --max-new-tokens 6 --dtype float32")
    assert.equals(0, code, out)
    assert.is_truthy(out:find("Ctrl-C stops an answer", 1, true))
  end)

  support.it_program("keeps what had come when Ctrl-C stopped an answer", function()
    -- The signal is sent at the third token.
    local out, err, code = support.shell([[printf '%%s\n' Hi /history | %s -e '
      local core, count = require "unsloth.core", 0
      local plain = core.Generator.next
      core.Generator.next = function(...)
        count = count + 1
        if count == 3 then io.popen("kill -INT " .. io.open("/proc/self/stat"):read "n"):close() end
        return plain(...)
      end' chat %s --max-new-tokens 6 --dtype float32]], support.program, dir)
    assert.equals(0, code, err)
    assert.is_truthy(out:find("[stopped]", 1, true), out .. err)
    assert.is_truthy(err:find("assistant: ", 1, true), err)
  end)
end)
