#!/usr/bin/env bash
# Checks and times everything on a machine with a GPU: logs to a folder, a short table last. Builds nothing.
#
#     kernels/lab/measure.sh BUILD LOGS [PART ...]
#
# Parts: ops golden memory attention speed more graphs big peer profile decode sanitize; default: the first five.
#
# Each part is bounded; what did not end in time says so.
set -uo pipefail
cd "$(dirname "$0")/../.."
build=$1 logs=$2
shift 2
parts=" ${*:-ops golden memory attention speed} "
program=$build/unsloth-lua
table=$logs/table.txt
mkdir -p "$logs/more"
: >"$table"

wants() { [[ $parts == *" $1 "* ]]; }
# bounded SECONDS NAME COMMAND...: its log is LOGS/more/NAME.log; one line of the table.
bounded() {
    local limit=$1 name=$2 log=$logs/more/$2.log before=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$log" 2>&1 </dev/null
    status=$?
    printf '%-34s status %-3d %3d s  %s\n' "$name" "$status" $((SECONDS - before)) "$(tail -n 1 "$log" | cut -c 1-120)" >>"$table"
    return $status
}

if wants ops; then
    export -f bounded
    export logs table
    ls "$build"/tests/test_*_gpu | grep -v -e memory -e graphs | xargs -P 6 -I{} bash -c 'bounded 100 "$(basename {})" {}'
    USL_ATTENTION=cudnn bounded 60 attention_cudnn "$build/tests/test_attention_gpu"
fi

# golden CASE DTYPE: the runner's log, then the judgement.
golden() {
    local case=$1 dtype=$2 out=$logs/more/golden_$(basename "$1")_$2
    "$program" tests/golden.lua "$case" --device cuda --dtype "$dtype" --dump "$out.safetensors" >"$out.txt" 2>&1
    local status=$?
    if ((status != 0)) && [[ ! -s $out.safetensors ]]; then tail -n 1 "$out.txt" && return $status; fi
    if [[ $dtype == float32 ]]; then
        "$program" tests/judge_golden.lua "$case/golden.safetensors" "$out.txt" 1e-4
    else
        "$program" tests/gpu/judge_bf16.lua "$case" "$out.txt" "$out.safetensors"
    fi
}
if wants golden; then
    export -f golden bounded
    export program logs table
    for case in tests/golden/*/ "${USL_SHARED:-../shared}"/golden/*/; do
        [[ -f $case/meta.json ]] || continue
        echo "${case%/} float32"
        [[ -f $case/bf16_error.json ]] && echo "${case%/} ${USL_GPU_DTYPE:-bfloat16}"
    done | xargs -P 6 -L 1 bash -c 'bounded 100 "golden_$(basename $0)_$1" bash -c "golden $0 $1"'
    rm -f "$logs"/more/golden_*.safetensors
fi

# By itself: what others use of the GPU would be counted.
if wants memory; then
    bounded 90 test_memory_gpu "$build/tests/test_memory_gpu" || true
    bounded 60 test_graphs_gpu "$build/tests/test_graphs_gpu" || true
fi

if wants attention; then bounded 90 time_attention "$build/tests/time_attention" && cat "$logs/more/time_attention.log" >>"$table"; fi

# bench NAME ARGUMENTS...
bench() {
    local name=$1
    shift
    bounded "${limit:-75}" "bench_$name" "$program" bench --shape "${shape:-llama3-8b}" --rank "${rank:-16}" --device cuda --json "$logs/more/bench_$name.json" "$@"
    sed 's/^/    /' "$logs/more/bench_$name.log" >>"$table"
}
if wants speed; then
    bench qlora_2x2048 --method qlora --batch 2 --seq 2048 --steps 20
    bench qlora_alpaca --method qlora --batch 2 --accumulation 4 --rows alpaca --steps 20
    bench decode --method qlora --decode 128 --batch 1
    bench qlora_1x8192 --method qlora --batch 1 --seq 8192 --steps 6
    bench qlora_lean --method qlora --batch 2 --seq 2048 --steps 6 --memory 6.4GiB
    bench lora_2x4096 --method lora --batch 2 --seq 4096 --steps 6
fi
if wants more; then
    bench qlora_2x2048_any --method qlora --batch 2 --seq 2048 --steps 10 --order any
    USL_ATTENTION=own bench qlora_2x2048_own --method qlora --batch 2 --seq 2048 --steps 10
    bench qlora_1x8192_any --method qlora --batch 1 --seq 8192 --steps 5 --order any
fi
if wants graphs; then
    # Short passes, recorded and not: the same loss to the last digit. First so many updates that most sizes are recorded.
    alpaca=(--method qlora --batch 2 --accumulation 4 --rows alpaca --warmup 200 --steps 60)
    for shape in smollm2-135m llama3.2-1b llama3-8b; do
        bench "recorded_$shape" "${alpaca[@]}"
        USL_NO_GRAPHS=1 bench "plain_$shape" "${alpaca[@]}"
        cmp <(grep -o '"loss":[^,]*' "$logs/more/bench_recorded_$shape.json") \
            <(grep -o '"loss":[^,]*' "$logs/more/bench_plain_$shape.json") >/dev/null || echo "    the losses differ" >>"$table"
    done
    shape=smollm2-135m bench recorded_one_row --method qlora --batch 1 --rows alpaca --warmup 200 --steps 100
    USL_NO_GRAPHS=1 shape=smollm2-135m bench plain_one_row --method qlora --batch 1 --rows alpaca --warmup 200 --steps 100
    unset shape
    bench recorded_2x512 --method qlora --batch 1 --accumulation 2 --seq 512 --warmup 5 --steps 20
    USL_NO_GRAPHS=1 bench plain_2x512 --method qlora --batch 1 --accumulation 2 --seq 512 --warmup 5 --steps 20
fi
if wants big; then
    shape=llama3-70b limit=120 bench 70b_streamed --method qlora --batch 2 --seq 2048 --steps 2 --warmup 1 --memory 24GiB
    shape=llama3-70b limit=120 bench 70b_resident --method qlora --batch 2 --seq 2048 --steps 2 --warmup 1
    rank=32 limit=200 bench context_118k --method qlora --batch 1 --seq 118000 --steps 1 --warmup 0 --memory 24GiB
fi
if wants peer; then
    bounded 150 peer_2x2048 python3 examples/bench/peer_hf.py --program "$program"
    cat "$logs/more/peer_2x2048.log" >>"$table"
fi

if wants profile || wants decode; then
    # Every kernel of one update, by its time: name, launches, milliseconds.
    profile() {
        local name=$1
        shift
        USL_NO_GRAPHS=1 bounded 110 "profile_$name" ncu --metrics gpu__time_duration.sum --clock-control none --csv \
            --log-file "$logs/more/profile_$name.csv" "$program" bench --shape llama3-8b --rank 16 --device cuda "$@"
        python3 - "$logs/more/profile_$name.csv" >"$logs/profile_$name.txt" <<'PY'
import csv, sys, collections
total, calls = collections.Counter(), collections.Counter()
lines = [l for l in open(sys.argv[1]) if l.startswith('"')]
for row in csv.DictReader(lines):
    key = (row["Kernel Name"].split("(")[0][:110], row["Grid Size"].replace(" ", ""))
    unit = {"ns": 1e-6, "us": 1e-3, "usecond": 1e-3, "nsecond": 1e-6, "ms": 1, "msecond": 1}.get(row["Metric Unit"], 1e-6)
    total[key] += float(row["Metric Value"].replace(",", "")) * unit
    calls[key] += 1
for key, ms in total.most_common(70):
    print(f"{ms:9.3f} ms {calls[key]:6d} x {1000 * ms / calls[key]:9.1f} us  {key[0]} {key[1]}")
PY
        head -n 45 "$logs/profile_$name.txt" >>"$table"
    }
    wants profile && profile 2x2048 --method qlora --batch 2 --seq 2048 --steps 1 --warmup 0
    wants decode && profile decode --method qlora --decode 2 --batch 1
fi

if wants sanitize; then
    for tool in memcheck racecheck; do
        for test in "$build"/tests/test_{rmsnorm,linear,attention,cross_entropy}_gpu; do
            bounded 100 "${tool}_$(basename "$test")" compute-sanitizer --tool "$tool" --error-exitcode 9 "$test" || true
        done
    done
fi
cat "$table"
