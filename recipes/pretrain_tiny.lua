-- Pretrains a small Llama-3-architecture model from random weights on a plain text, with a tokenizer of its own.
--
--     unsloth-lua recipes/pretrain_tiny.lua --text shakespeare.txt --output outputs/tiny-llama
--
-- examples/tiny-llama was made this way; its README gives the command.
local args = require "unsloth.args"
local bpe = require "unsloth.bpe_trainer"
local errors = require "unsloth.errors"
local unsloth = require "unsloth"

local o = args.parse(arg, {
  name = "recipes/pretrain_tiny.lua",
  about = "Trains a BPE tokenizer and a small Llama model from random weights on a plain text.",
  options = {
    { "text", "FILE", "the text to learn" },
    { "dataset", "FILE", "the same as --text" },
    { "model", "DIR", "go on from this model and its tokenizer instead of random weights" },
    { "output", "DIR", "where the model goes", "outputs/tiny-llama" },
    { "steps", "N", "updates", 1500 },
    { "max-steps", "N", "the same as --steps" },
    { "batch", "N", "rows of an update", 8 },
    { "learning-rate", "X", "the highest rate, after the warm-up", 2e-3 },
    { "vocab", "N", "size of the vocabulary", 1024 },
    { "hidden", "N", "width; a multiple of 256 lets GGUF's k-quants fit", 256 },
    { "layers", "N", "blocks", 3 },
    { "heads", "N", "query heads", 4 },
    { "kv-heads", "N", "key and value heads", 2 },
    { "intermediate", "N", "width of the MLP", 512 },
    { "context", "N", "longest text in tokens", 512 },
    { "row", "N", "characters of a training row", 800 },
    { "device", "NAME", "cpu, cuda, cuda:1 (default: the GPU when there is one)" },
    { "seed", "N", "of weights and row order", 3407 },
  },
})

local path = o.text or o.dataset
if not path then errors.invalid "pretrain_tiny.lua needs --text FILE, the text to learn" end
local file, message = io.open(path, "rb")
if not file then errors.raise("USL_ERR_NOT_FOUND", "%s; give --text the path of a plain text", message) end
local text = file:read "a"
file:close()
if text == "" then errors.invalid("%s is empty; give --text a plain text to learn", path) end
for _, name in ipairs { "hidden", "layers", "heads", "kv_heads", "intermediate", "context", "row" } do
  if o[name] < 1 then errors.invalid("--%s is %s; 1 or more is wanted", (name:gsub("_", "-")), o[name]) end
end
args.output_dir(o.output)

-- 1. The tokenizer: byte-level BPE as in Llama 3, learnt from the text.
local function train_tokenizer()
  local clock = os.clock()
  local trained = bpe.train(text, o.vocab)
  local bos, eos = bpe.write(o.output, trained, { model_max_length = o.context })
  print(("tokenizer: %d merges, vocabulary %d, %.1f s"):format(#trained.merges, eos + 1, os.clock() - clock))
  return unsloth.AutoTokenizer.from_pretrained(o.output), bos, eos
end

-- 2. The model: Llama 3's shape, small, with tied embeddings.
local function new_model()
  local tokenizer, bos, eos = train_tokenizer()
  local config = {
    architectures = { "LlamaForCausalLM" }, model_type = "llama", vocab_size = tokenizer.vocab_size, hidden_size = o.hidden,
    intermediate_size = o.intermediate, num_hidden_layers = o.layers, num_attention_heads = o.heads, num_key_value_heads = o.kv_heads,
    head_dim = o.hidden // o.heads, max_position_embeddings = o.context, rope_theta = 500000.0, rms_norm_eps = 1e-5, hidden_act = "silu",
    tie_word_embeddings = true, attention_bias = false, mlp_bias = false, attention_dropout = 0.0, initializer_range = 0.02,
    bos_token_id = bos, eos_token_id = eos, torch_dtype = "bfloat16",
  }
  return unsloth.FastLanguageModel.from_config(config, { random_state = o.seed, device = o.device }), tokenizer
end

local model, tokenizer
if o.model then
  model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = o.model, full_finetuning = true, device = o.device }
else
  model, tokenizer = new_model()
end
model:print_trainable_parameters()

-- 3. The rows: pieces of the text that end at the end of a line.
local rows, at = {}, 1
while at <= #text do
  local last = text:find("\n", at + o.row, true) or #text
  rows[#rows + 1] = { text = text:sub(at, last) .. tokenizer.eos_token }
  at = last + 1
end

-- 4. Training: all weights, cosine schedule.
local trainer = unsloth.SFTTrainer {
  model = model, tokenizer = tokenizer, train_dataset = unsloth.dataset_from_list(rows), dataset_text_field = "text",
  max_seq_length = o.context,
  args = unsloth.TrainingArguments {
    per_device_train_batch_size = o.batch, gradient_accumulation_steps = 1, max_steps = o.max_steps or o.steps, warmup_ratio = 0.03,
    learning_rate = o.learning_rate, lr_scheduler_type = "cosine", optim = "adamw_torch", adam_beta2 = 0.95, weight_decay = 0.1,
    logging_steps = 25, logging_first_step = true, save_strategy = "no", seed = o.seed, output_dir = o.output,
  },
}
model.tokenizer = tokenizer
local stats = trainer:train()
local log = stats.log_history
print(("loss %.4f -> %.4f, %.0f s"):format(log[1].loss, log[#log].loss, stats.metrics.train_runtime))

-- 5. A Hugging Face folder in bfloat16, and a taste of it.
model:save_pretrained_merged(o.output, tokenizer, { save_method = "merged_16bit" })
print("saved to " .. o.output)
print("--- What it says after \"My lord,\":")
print("My lord," .. model:generate("My lord,", { max_new_tokens = 60, temperature = 0.8, top_p = 0.95, seed = o.seed }))
