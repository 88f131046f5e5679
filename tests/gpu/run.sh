#!/usr/bin/env bash
# Runs what needs a GPU: the tests of every op, and the golden cases in float32 and bfloat16 (USL_GPU_DTYPE=float16 for GPUs
# without bfloat16, or for code compiled for such: -DUSL_CUDA_ARCHS=75-virtual). One line a step; the last line counts them.
# Builds nothing.
#
#     cmake -B build -G Ninja -DUSL_CUDA=ON && cmake --build build && tests/gpu/run.sh [build]
#
# Data from outside the repository stands in ../shared (or $USL_SHARED); cases that are not there are skipped.
set -uo pipefail
cd "$(dirname "$0")/../.."

build=${1:-build}
shared=${USL_SHARED:-../shared}
program=$build/unsloth-lua
logs=$build/logs/gpu
half=${USL_GPU_DTYPE:-bfloat16}

passed=0 failed=0 skipped=0
# step NAME COMMAND...: exit status 77 is "skipped"; the last line of the log is shown, of a failure more.
step() {
    local name=$1 log="$logs/${1//[^A-Za-z0-9_.-]/_}.log" before=$SECONDS status
    shift
    "$@" >"$log" 2>&1 </dev/null
    status=$?
    local last
    last=$(tail -n 1 "$log" | cut -c 1-150)
    case $status in
    0) passed=$((passed + 1)) && echo "ok      $name: $last ($((SECONDS - before)) s)" ;;
    77) skipped=$((skipped + 1)) && echo "skipped $name: $last" ;;
    *)
        failed=$((failed + 1)) && echo "FAILED  $name: exit status $status, log in $log"
        tail -n 15 "$log" | sed 's/^/    /'
        ;;
    esac
}

if ! ls "$build"/tests/test_*_gpu >/dev/null 2>&1; then
    echo "SKIP: $build has no GPU tests; configure it with -DUSL_CUDA=ON where nvcc is"
    exit 0
fi
mkdir -p "$logs" || exit 1
"$build/tests/test_cast_gpu" >"$logs/probe.log" 2>&1
if (($? == 77)); then
    echo "SKIP: $(grep -m 1 SKIP "$logs/probe.log" | sed 's/^SKIP //')"
    exit 0
fi

for test in "$build"/tests/test_*_gpu; do step "${test##*/}" "$test"; done
step "test_attention_gpu, cuDNN" env USL_ATTENTION=cudnn "$build/tests/test_attention_gpu"

step "export_same" "$program" tests/gpu/export_same.lua

# golden CASE_DIR DTYPE
golden() {
    local case=$1 dtype=$2 out
    out=$logs/golden_${case##*/}_$dtype
    if [[ $dtype != float32 && ! -f $case/bf16_error.json ]]; then
        echo "$case has no bf16_error.json"
        return 77
    fi
    "$program" tests/golden.lua "$case" --device cuda --dtype "$dtype" --dump "$out.safetensors" >"$out.txt" 2>&1
    local status=$?
    tail -n 40 "$out.txt"
    if [[ $dtype == float32 ]]; then
        lua5.4 tests/judge_golden.lua "$case/golden.safetensors" "$out.txt" 1e-4 && ((status == 0))
    else
        ((status == 0)) && "$program" tests/gpu/judge_bf16.lua "$case" "$out.txt" "$out.safetensors"
    fi
}

for case in tests/golden/*/ "$shared"/golden/*/; do
    [[ -f $case/meta.json ]] || continue
    case=${case%/}
    for dtype in float32 "$half"; do step "golden ${case##*/} $dtype" golden "$case" "$dtype"; done
done
[[ -d $shared/golden ]] || echo "skipped the golden cases of $shared/golden: they are not here"

echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
