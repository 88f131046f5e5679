-- Two models over one frozen base.
local unsloth = require "unsloth"

describe("model:share", function()
  it("gives another model with the same weights and adapters of its own", function()
    local model, tok = unsloth.FastLanguageModel.from_pretrained { model_name = "examples/tiny-llama", load_in_4bit = true, device = "cpu" }
    local before = model:generate("The sky is", { max_new_tokens = 8 })
    local other = model:share()
    assert.equal(1, model:info().shared)
    assert.equal(model.max_seq_length, other.max_seq_length)
    unsloth.FastLanguageModel.get_peft_model(other, { r = 8, lora_alpha = 8 })
    local trainer = unsloth.SFTTrainer { model = other, tokenizer = tok,
      train_dataset = unsloth.dataset_from_list { { text = "The sky is blue." .. tok.eos_token } },
      args = { max_steps = 25, per_device_train_batch_size = 1, gradient_accumulation_steps = 1, learning_rate = 5e-3, save_strategy = "no" } }
    for _, stats in trainer:steps() do -- both at work, in turn
      if stats.step == 5 then assert.equal(before, model:generate("The sky is", { max_new_tokens = 8 })) end
    end
    assert.matches("^ blue", other:generate("The sky is", { max_new_tokens = 8 }))
    assert.equal(before, model:generate("The sky is", { max_new_tokens = 8 }))
    model:close()
    assert.matches("^ blue", other:generate("The sky is", { max_new_tokens = 8 }))
    assert.equal(0, other:share():info().trainable)
  end)

  it("refuses weights that are trained", function()
    local model = unsloth.FastLanguageModel.from_pretrained { model_name = "examples/tiny-llama", full_finetuning = true, load_in_4bit = false,
      device = "cpu" }
    local ok, err = pcall(model.share, model)
    assert.is_false(ok)
    assert.matches("full_finetuning", tostring(err))
  end)
end)
