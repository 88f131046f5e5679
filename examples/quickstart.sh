#!/usr/bin/env bash
# From a bare Debian 12 machine to a fine-tuned model: installs what is missing (as root or with sudo), builds, runs the
# main recipe on the CPU.
#
#     examples/quickstart.sh [recipe options]
#
# Leaves the LoRA adapter and a .gguf in outputs/quickstart. Other options go to the recipe: --help lists them.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! mkdir -p build 2> /dev/null || [[ ! -w build ]]; then
  echo "quickstart.sh: $PWD/build cannot be written; copy the source to a folder of your own and start it there" >&2
  exit 1
fi

tests/install_packages.sh build
cmake -B build -DUSL_TESTS=OFF
cmake --build build -j "$(nproc)"

output=outputs/quickstart
build/unsloth-lua recipes/llama3_alpaca.lua --output "$output" "$@"

echo
echo "What the run left in $output:"
find "$output" -type f \( -name 'adapter_*' -o -name '*.gguf' \) -exec ls -l {} +
