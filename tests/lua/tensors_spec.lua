-- Tensors to play with, and a look inside models: hidden states and attention against transformers' own.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"
local tensor = unsloth.tensor

local function near(want, got, limit)
  local relative = got:distance(tensor(want))
  assert.is_true(relative < (limit or 1e-6), ("%g: %s"):format(relative, tostring(got)))
end

describe("arithmetic", function()
  local a = tensor { { 1, 2, 3 }, { 4, 5, 6 } }

  it("works element by element and repeats dimensions of length 1", function()
    near({ { 2, 4, 6 }, { 8, 10, 12 } }, a + a)
    near({ { 11, 22, 33 }, { 14, 25, 36 } }, a + tensor { 10, 20, 30 })
    near({ { 0, 1, 2 }, { 2, 3, 4 } }, a - tensor { { 1 }, { 2 } })
    near({ { 0.5, 1, 1.5 }, { 2, 2.5, 3 } }, a / 2)
    near({ { 1, 0.5, 1 / 3 }, { 0.25, 0.2, 1 / 6 } }, 1 / a)
    near({ { -1, -4, -9 }, { -16, -25, -36 } }, -a ^ 2)
    near({ { 0, 0, 1 }, { 1, 1, 1 } }, a:gt(2))
    near({ { 2, 2, 3 }, { 4, 5, 6 } }, a:maximum(2))
    support.fails("USL_ERR_SHAPE", { "(2, 3)", "(2)" }, function() return a + tensor { 1, 2 } end)
    assert.equals("float64", (tensor({ 1 }, "float64") + a).dtype)
    assert.equals("float32", (a + 1).dtype)
  end)

  it("multiplies matrices, vectors and batches", function()
    near({ { 14, 32 }, { 32, 77 } }, a:matmul(a:t()))
    near({ 14, 32 }, a:matmul(tensor { 1, 2, 3 }))
    near({ 9, 12, 15 }, tensor({ 1, 2 }):matmul(a))
    near({ { { 1, 2 } }, { { 3, 4 } } }, tensor({ { { 1, 2 } }, { { 3, 4 } } }):matmul(unsloth.eye(2)))
    support.fails("USL_ERR_SHAPE", "matmul", function() return a:matmul(a) end)
  end)

  it("reduces all, or one dimension", function()
    assert.equals(21, a:sum())
    near({ 5, 7, 9 }, a:sum(1))
    near({ { 6 }, { 15 } }, a:sum(-1, true))
    assert.equals(3.5, a:mean())
    near({ 1, 1 }, a:var(2))
    assert.equals(6, a:argmax())
    near({ 3, 3 }, a:argmax(2))
    assert.equals(1, a:min())
    assert.equals(math.sqrt(91), a:norm())
    support.fails("USL_ERR_SHAPE", "dimension 3", function() return a:sum(3) end)
    support.fails("USL_ERR_SHAPE", "empty", function() return unsloth.zeros(0):max() end)
    assert.equals(0, unsloth.zeros(0):sum())
  end)

  it("softmax neither overflows nor mixes lanes", function()
    near({ 0.5, 0.5 }, tensor({ 1000, 1000 }):softmax())
    near({ { 0.0179862, 0.0179862 }, { 0.9820138, 0.9820138 } }, tensor({ { 1, 2 }, { 5, 6 } }):softmax(1), 1e-5)
    near({ -0.6931472, -0.6931472 }, tensor({ 7, 7 }):log_softmax(), 1e-6)
  end)

  it("slices, with negative positions from the end", function()
    assert.equals(6, a[{ -1, -1 }])
    near({ 4, 5 }, a[{ 2, { 1, 2 } }])
    near({ 2, 5 }, a[{ {}, 2 }])
    near({ { 2, 3 }, { 5, 6 } }, a[{ {}, { 2 } }])
    near({ 4, 5, 6 }, a[{ 2 }])
    support.fails("USL_ERR_INVALID", "dimension 2", function() return a[{ 1, 4 }] end)
    support.fails("USL_ERR_SHAPE", "3 positions", function() return a[{ 1, 1, 1 }] end)
  end)

  it("changes shapes", function()
    near({ { 1, 2 }, { 3, 4 }, { 5, 6 } }, a:reshape(3, -1))
    near({ { 1, 4 }, { 2, 5 }, { 3, 6 } }, a:transpose(1, 2))
    assert.same({ 1, 2, 3 }, a:unsqueeze(1).shape)
    assert.same({ 2, 3 }, a:unsqueeze(1):squeeze().shape)
    assert.same({ 4, 2, 3 }, unsloth.zeros(2, 3, 4):permute(3, 1, 2).shape)
    near({ { 1, 2, 3 }, { 4, 5, 6 }, { 0, 0, 0 } }, unsloth.cat { a, unsloth.zeros(1, 3) })
    near({ { 1, 2, 3, 9 }, { 4, 5, 6, 9 } }, unsloth.cat({ a, unsloth.full({ 2, 1 }, 9) }, 2))
    support.fails("USL_ERR_SHAPE", "reshape", function() return a:reshape(4, 2) end)
    support.fails("USL_ERR_SHAPE", "permute", function() return a:permute(1, 1) end)
  end)

  it("makes numbers", function()
    near({ 0, 0.25, 0.5, 0.75, 1 }, unsloth.arange(0, 1, 0.25))
    assert.equals(3, #unsloth.arange(3))
    near({ { 1, 0 }, { 0, 1 } }, unsloth.eye(2))
    local r = unsloth.randn(100, 100)
    assert.is_true(math.abs(r:mean()) < 0.03 and math.abs(r:std() - 1) < 0.03)
    assert.equals(0, r:distance(unsloth.randn(100, 100)))
    assert.is_true(unsloth.rand(1000):max() < 1 and unsloth.rand(1000):min() > 0)
    assert.same({ 9, 5 }, tensor({ 3, 9, 5 }):topk(2).values)
  end)

  it("checks gradients", function()
    local gelu = { forward = function(x) return x:gelu() end }
    function gelu.backward(x, dy)
      local density = (x * x * -0.5):exp() * (1 / math.sqrt(2 * math.pi))
      return dy * (((x * math.sqrt(0.5)):erf() + 1) * 0.5 + x * density)
    end
    local report = unsloth.gradcheck(gelu, unsloth.randn(3, 2))
    assert.is_true(report.ok and report.error < 1e-3, tostring(report.error))
    gelu.backward = function(_, dy) return dy end
    assert.is_false(unsloth.gradcheck(gelu, unsloth.randn(3, 2)).ok)
  end)
end)

describe("plots", function()
  it("draw lines, blocks and heat maps, and write SVG", function()
    local dir = support.temp_dir()
    finally(function() support.remove(dir) end)
    local text = tostring(unsloth.plot({ 1, 2, 3, 2, 1 }, { title = "a hill", height = 4, width = 10 }))
    assert.is_truthy(text:find("a hill", 1, true) and text:find "[\u{2801}-\u{28ff}]")
    assert.is_truthy(tostring(unsloth.plot({ 1, 2 }, { style = "blocks" })):find("█", 1, true))
    assert.is_truthy(tostring(unsloth.plot(unsloth.eye(3))):find("██", 1, true))
    unsloth.plot({ a = { 1, 2 }, ["<b>"] = { 2, 0 / 0 } }, { title = "<&>" }):svg(dir .. "/plot.svg")
    local svg = support.read(dir .. "/plot.svg")
    assert.is_truthy(svg:find("&lt;&amp;&gt;", 1, true) and svg:find("prefers-color-scheme: dark", 1, true))
    assert.is_nil(svg:find "nan" or svg:find "inf")
    assert.is_truthy(tostring(unsloth.plot { { step = 1, loss = 2 }, { step = 2, loss = 1 } }):find("loss", 1, true))
    support.fails("USL_ERR_INVALID", "no number", unsloth.plot, { 1, "x" })
    support.fails("USL_ERR_INVALID", "nothing to draw", unsloth.plot, {})
  end)
end)

describe("inside a model", function()
  local truth = unsloth.safetensors.load(support.root .. "tests/lua/inside.safetensors")

  for _, case in ipairs { "llama_odd", "mistral_window" } do
    it("is what transformers sees: " .. case, function()
      local model <close> = unsloth.FastLanguageModel.from_pretrained { model_name = support.root .. "tests/golden/" .. case .. "/model",
        dtype = "float32", load_in_4bit = false }
      local ids = truth[case .. ".ids"]:totable()
      local relative = model:hidden_states(ids):distance(truth[case .. ".hidden"])
      assert.is_true(relative < 1e-5, ("hidden states: %g"):format(relative))
      for layer = 0, model:info().layers - 1 do
        relative = model:attentions(ids, layer):distance(truth[case .. ".attention"][layer + 1])
        assert.is_true(relative < 1e-5, ("attention of layer %d: %g"):format(layer, relative))
      end
      -- The last hidden state is normed already; what goes into the head of the layer before is not.
      local lens = model:logit_lens(ids)
      assert.equals(model:info().layers + 1, #lens)
      assert.equals(model:logits(ids)[#ids]:argmax_id(), lens[#lens].id)
      assert.is_truthy(tostring(lens):find("embedding", 1, true))
      support.fails("USL_ERR_INVALID", "layer 99", model.attentions, model, ids, 99)
      support.fails("USL_ERR_SHAPE", "hidden states", model.unembed, model, unsloth.zeros(2, 3))
    end)
  end

  it("is a tree of names", function()
    local dir = support.tiny_folder()
    local model <close> = support.open(dir)
    support.remove(dir)
    assert.same({ 32, 32 }, model:layer(1).q_proj.weight.shape)
    assert.equals(0, model:layer(1).q_proj.weight:distance(model:get_param "model.layers.1.self_attn.q_proj.weight"))
    assert.same({ 259, 32 }, model:tree().embed_tokens.weight.shape)
    support.fails("USL_ERR_NOT_FOUND", { "q_prj", "q_proj" }, function() return model:layer(0).q_prj end)
    support.fails("USL_ERR_INVALID", "layers 0 to 1", model.layer, model, 2)
    unsloth.FastLanguageModel.get_peft_model(model, { r = 3 })
    assert.same({ 3, 32 }, model:layer(0).q_proj.lora_A.weight.shape)
  end)
end)

describe("a trainer by hand", function()
  local dir, model, tokenizer

  setup(function()
    dir = support.tiny_folder()
    model, tokenizer = support.open(dir)
  end)
  teardown(function()
    model:close()
    support.remove(dir)
  end)

  local function rows(n)
    local list = {}
    for i = 1, n do list[i] = { text = ("row %d "):format(i):rep(i % 4 + 1) .. tokenizer.eos_token } end
    return unsloth.dataset_from_list(list)
  end

  it("is stepped, looked at, changed, and stepped on", function()
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, adapter_name = "one" })
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, adapter_name = "two" })
    model:set_adapter "one"
    local trainer = unsloth.SFTTrainer { model = model, train_dataset = rows(16), args = { max_steps = 10, learning_rate = 1e-3, warmup_steps = 0,
      save_strategy = "no", output_dir = dir .. "/out", per_device_train_batch_size = 2, gradient_accumulation_steps = 1 } }
    assert.is_truthy(tostring(trainer):find("not begun", 1, true))
    assert.equals(1, trainer:step().step)
    trainer:set_learning_rate(5e-4)
    assert.equals(5e-4, trainer:step().learning_rate)
    trainer:set_learning_rate(nil)
    -- Longer rows than those the plan was made for.
    trainer:set_train_dataset(unsloth.dataset_from_list { { text = ("a long row "):rep(20) .. tokenizer.eos_token } })
    local stats = trainer:step()
    assert.same({ 3, 1 }, { stats.step, stats.rows })
    assert.is_true(stats.tokens > 200)
    -- The learning rate is that of the schedule at this step.
    assert.is_true(math.abs(stats.learning_rate - 1e-3 * 8 / 10) < 1e-9)
    support.fails("USL_ERR_NOT_FOUND", "three", trainer.set_adapter, trainer, "three")
    assert.equals(4, trainer:step().step)
    local before = model:get_param "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    trainer:set_adapter "two"
    assert.equals(5, trainer:step().step)
    assert.equals("two", model:active_adapter())
    support.fails("USL_ERR_INVALID", "training set", trainer.set_train_dataset, trainer, rows(0))
    assert.equals(6, trainer:step().step)
    assert.is_truthy(tostring(trainer):find("step 6 of 10", 1, true))
    for _ = 7, 10 do trainer:step() end
    assert.is_nil(trainer:step())
    model:set_adapter "one"
    assert.equals(0, model:get_param("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"):distance(before))
  end)

  it("has gradients that differences confirm", function()
    unsloth.FastLanguageModel.get_peft_model(model, { r = 4, adapter_name = "three", init_lora_weights = "gaussian" })
    local trainer = unsloth.SFTTrainer { model = model, train_dataset = rows(4), args = { max_steps = 2, save_strategy = "no", output_dir = dir .. "/out" } }
    local report = unsloth.gradcheck(trainer, "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight", { rows = 2 })
    assert.is_true(report.ok, tostring(report.error))
    trainer:close()
  end)
end)
