#!/usr/bin/env bash
# Installs into a temporary prefix, builds examples/embed against it through find_package and through pkg-config, runs
# each, and lets strangers at the sandbox.
#
#     tests/embed/run.sh [build folder]      default: build
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$PWD/${1:-build}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
prefix=$tmp/prefix by_cmake=$tmp/cmake by_make=$tmp/make
checks=0

# want TEXT COMMAND...: the command succeeds and prints that.
want() {
    local text=$1 said
    shift
    said=$("$@" 2>&1) || { echo "FAILED, status $?: $*" && echo "$said" && exit 1; }
    grep -qF -- "$text" <<<"$said" || { echo "FAILED: $* does not say \"$text\":" && echo "$said" && exit 1; }
    checks=$((checks + 1))
}

# ---- What is installed, moved to another place ----

DESTDIR='' cmake --install "$build" --prefix "$tmp/first" >"$tmp/install.log"
mv "$tmp/first" "$prefix"
model=$prefix/share/unsloth-lua/examples/tiny-llama
cd "$tmp"
want "unsloth-lua 0." "$prefix/bin/unsloth-lua" -v
want "$prefix/share/unsloth-lua/unsloth/model.lua" "$prefix/bin/unsloth-lua" -e 'print(package.searchpath("unsloth.model", package.path))'
(cd "$prefix/bin" && PATH=$prefix/bin:$PATH want "$prefix/share" unsloth-lua -e 'print(package.path)')
want "LlamaForCausalLM" "$prefix/bin/unsloth-lua" info "$model"
want "adapter: out" "$prefix/bin/unsloth-lua" "$prefix/share/unsloth-lua/recipes/llama3_alpaca.lua" --max-steps 2 --output out --no-gguf
want "$prefix/share" env LUA_PATH= LUA_CPATH="$prefix/lib/lua/5.4/?.so" lua5.4 -e 'require "unsloth" print(package.path)'

# ---- The examples ----

cmake -S "$OLDPWD/examples/embed" -B "$by_cmake" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_C_FLAGS="-Wall -Wextra -Werror" \
    -DCMAKE_CXX_FLAGS="-Wall -Wextra -Werror" >"$tmp/cmake.log" 2>&1 || { cat "$tmp/cmake.log" && exit 1; }
cmake --build "$by_cmake" -j "$(nproc)" >>"$tmp/cmake.log" 2>&1 || { tail -n 40 "$tmp/cmake.log" && exit 1; }
mkdir "$by_make"
PKG_CONFIG_PATH=$prefix/lib/pkgconfig make -s -j "$(nproc)" -C "$OLDPWD/examples/embed" OUT="$by_make" \
    CFLAGS="-O2 -Wall -Wextra -Werror" CXXFLAGS="-O2 -Wall -Wextra -Werror"
script=$OLDPWD/examples/embed/03_script.lua

requests='ask base The sky is
train blue The sky is blue and the sea is blue.
train red The sky is red and the sea is red.
memory
ask base The sea is
wait
ask blue The sky is
ask red The sky is
memory
ask base The sky is
ask green The sky is'

for dir in "$by_cmake" "$by_make"; do
    mkdir -p out
    want "blue" "$dir/01_train" "$model" out
    [[ -s out/adapter/adapter_model.safetensors && -s out/model.gguf ]]
    want "cancelled after" "$dir/01_train" "$model" out 0.2
    want "USL_ERR_INVALID: get_peft_model" "$dir/02_raii" "$model"
    want " 0 bytes of Lua left" "$dir/03_lua_host" "$model" "$script"
    want "thread 1: loss" "$dir/05_two_threads" "$model"
    mkdir -p service
    said=$("$dir/06_service" "$model" service <<<"$requests")
    for text in "2 models beside share them" "blue is trained" "red is trained" "blue: The sky is| blue" "red: The sky is| red" \
        '"green"' "0 models beside share them" "0 bytes held at the end"; do
        want "$text" echo "$said"
    done
    # The base says what it said before anything was trained.
    [[ $(grep -c "^$(grep -m 1 '^base: The sky is' <<<"$said")\$" <<<"$said") == 2 ]] || { echo "$said" && exit 1; }
done
want "blue" "$by_cmake/01_train_static" "$model" out
if ldd "$by_cmake/01_train_static" | grep libunsloth; then exit 1; fi
# A static link through pkg-config alone.
"${CC:-cc}" -std=c11 -o static "$OLDPWD/examples/embed/01_train.c" -pthread \
    $(PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config --static --cflags --libs unsloth | sed 's/-lunsloth/-l:libunsloth.a/')
want "blue" ./static "$model" out

# ---- Other things that hosts do ----

"${CC:-cc}" -std=c11 -Wall -Wextra -Werror -o hosts "$OLDPWD/tests/embed/hosts.c" \
    $(PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config --cflags --libs unsloth-lua lua5.4) -Wl,-rpath,"$prefix/lib"
want " 0 failed" ./hosts "$model"
# Not a word on standard output beside their own.
[[ $(./hosts "$model" 2>/dev/null | wc -l) == 1 ]]

# ---- The sandbox ----

lua5.4 "$OLDPWD/tests/embed/attacks.lua" "$by_make/04_sandbox" "$model" "$tmp/box" || exit 1

# ---- What --help says is what man pages and completions know ----

lua5.4 "$OLDPWD/tests/embed/check_docs.lua" "$prefix" || exit 1
bash -n "$prefix/share/bash-completion/completions/unsloth-lua"
complete_bash() {
    bash -c 'source "$0"; COMP_WORDS=(unsloth-lua "$@"); COMP_CWORD=$#; _unsloth_lua; printf "%s\n" "${COMPREPLY[@]}"' \
        "$prefix/share/bash-completion/completions/unsloth-lua" "$@"
}
want "--max-new-tokens" complete_bash generate --max
want "offload" complete_bash plan --recompute o
want "info" complete_bash in
if command -v zsh >/dev/null; then zsh -n "$prefix/share/zsh/site-functions/_unsloth-lua"; fi
if command -v fish >/dev/null; then fish -n "$prefix/share/fish/vendor_completions.d/unsloth-lua.fish"; fi
echo "$checks commands, all as wanted"
