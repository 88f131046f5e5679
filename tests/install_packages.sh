#!/usr/bin/env bash
# Installs the Debian 12 packages that are missing, and nothing when none is.
#
#     tests/install_packages.sh [build | test]      default: build
#
# `build` is what the program needs, `test` adds what tests/run.sh needs. Works as root or with sudo.
set -euo pipefail

build_packages=(gcc libc6-dev make cmake ninja-build pkg-config ccache liblua5.4-dev libjansson-dev libpcre2-dev
    libutf8proc-dev libdnnl-dev libedit-dev ca-certificates)
test_packages=(g++ clang clang-format binutils dpkg-dev file debootstrap libopenblas-dev lua5.4 lua-busted lua-check luarocks python3-venv)

wanted=("${build_packages[@]}")
case "${1:-build}" in
build) ;;
test) wanted+=("${test_packages[@]}") ;;
*)
    echo "usage: $0 [build | test]" >&2
    exit 1
    ;;
esac

if ! command -v dpkg-query >/dev/null; then
    echo "This is not a Debian system: install the equivalents of these yourself: ${wanted[*]}"
    exit 0
fi

missing=()
for package in "${wanted[@]}"; do
    [[ $(dpkg-query -W -f='${Status}' "$package" 2>/dev/null) == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    echo "All packages are there."
    exit 0
fi

as_root=()
if ((EUID != 0)); then
    command -v sudo >/dev/null || {
        echo "Missing packages: ${missing[*]}. Run as root, or install sudo." >&2
        exit 1
    }
    as_root=(sudo)
fi

# Mirrors answer badly now and then: apt retries each file, and the whole is tried three times.
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3 "$@"
}
echo "Installing ${missing[*]}"
for attempt in 1 2 3; do
    if apt update && apt install -y --no-install-recommends "${missing[@]}"; then exit 0; fi
    echo "Attempt $attempt failed." >&2
done
exit 1
