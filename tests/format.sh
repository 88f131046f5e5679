#!/usr/bin/env bash
# Formats the C files after .clang-format; with --check only says which differ.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=(-i)
[[ ${1:-} == --check ]] && mode=(--dry-run -Werror)
find core kernels lua examples tests \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cc' \) -print0 | xargs -0 clang-format "${mode[@]}"
