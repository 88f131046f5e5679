#!/usr/bin/env bash
# luarocks makes the rock; a stock lua5.4 that knows nothing of the source tree loads it, answers, trains and asks for help.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v luarocks >/dev/null || { echo "luarocks is not here: apt-get install luarocks" && exit 77; }
tree=$PWD/build/rocktree root=$PWD
rm -rf "$tree"
# In the main build's folder, where everything is compiled already.
USL_ROCK_BUILD=build USL_ROCK_FLAGS='' luarocks make --lua-version 5.4 --tree "$tree" lua/unsloth-dev-1.rockspec >build/rock.log 2>&1 ||
    { tail -n 20 build/rock.log && exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export LUA_PATH="$tree/share/lua/5.4/?.lua;$tree/share/lua/5.4/?/init.lua" LUA_CPATH="$tree/lib/lua/5.4/?.so"
lua5.4 - "$root/examples/tiny-llama" <<'LUA'
local unsloth = require "unsloth"
assert(package.searchpath("unsloth", package.path):find("rocktree", 1, true))
local model, tokenizer = unsloth.FastLanguageModel.from_pretrained { model_name = arg[1], max_seq_length = 64 }
assert(#model:generate("Once", { max_new_tokens = 4 }) > 0)
unsloth.FastLanguageModel.get_peft_model(model, { r = 2 })
local ds = unsloth.dataset_from_list { { text = "one" .. tokenizer.eos_token } }
local stats = unsloth.SFTTrainer({ model = model, train_dataset = ds, args = { max_steps = 1, save_strategy = "no", output_dir = "out" } }):train()
assert(stats.global_step == 1)
assert(unsloth.get_chat_template(tokenizer, "chatml").chat_template)
assert(require("unsloth.doc").text("Tensor:softmax"):find("log_softmax", 1, true) == nil)
assert(require("unsloth.doc").text(unsloth.tensor):find("nested arrays", 1, true))
print "the rock answers, trains, and knows its documentation"
LUA
