#!/usr/bin/env bash
# Makes the Debian package and uses it.
#
#     tests/embed/package.sh [build folder] [bare]
#
# Unpacked beside the system (dpkg-deb -x) the program, a recipe, and `require` from a stock lua5.4 work. With `bare` it is
# installed on a Debian machine with nothing else (debootstrap, into a folder under the build folder; as root, needs a
# mirror), run there and removed again.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$PWD/${1:-build}
root=$build/package
rm -rf "$root" && mkdir -p "$root/made"
(cd "$build" && cpack -G DEB -B "$root/made" >"$root/cpack.log" 2>&1) || { cat "$root/cpack.log" && exit 1; }
deb=$(find "$root/made" -maxdepth 1 -name '*.deb')
depends=$(dpkg-deb -f "$deb" Depends)
for package in libc6 libjansson4 libpcre2-8-0 libutf8proc2; do
    grep -q "$package " <<<"$depends" || { echo "$deb does not depend on $package but on $depends" && exit 1; }
done

# use PREFIX [COMMAND...]: what a user does first; the command stands before each program.
use() {
    local usr=$1 out=/tmp/unsloth-lua-package-test
    shift
    "$@" "$usr/bin/unsloth-lua" -e 'print(package.path)' | grep "^$usr/share/unsloth-lua/?.lua" &&
        "$@" "$usr/bin/unsloth-lua" "$usr/share/unsloth-lua/recipes/llama3_alpaca.lua" --max-steps 2 --output "$out" &&
        "$@" "$usr/bin/unsloth-lua" info "$("$@" find "$out" -name '*.gguf')" | grep LlamaForCausalLM && "$@" rm -rf "$out"
}

if [[ ${2:-} != bare ]]; then
    unpacked=$(mktemp -d) # not in the build folder, where programs take the source's modules
    trap 'rm -rf "$unpacked"' EXIT
    dpkg-deb -x "$deb" "$unpacked"
    use "$unpacked/usr" env >"$root/log.txt" 2>&1 || { cat "$root/log.txt" && exit 1; }
    LUA_CPATH="$unpacked/usr/lib/lua/5.4/?.so" lua5.4 -e 'assert(require "unsloth"._VERSION)'
    echo "${deb##*/}: $(stat -c %s "$deb") bytes; depends on $depends"
    exit 0
fi

if ((EUID != 0)) || ! command -v debootstrap >/dev/null; then
    echo "a bare machine needs root and debootstrap (apt-get install debootstrap)"
    exit 77
fi
mirror=${USL_DEBIAN_MIRROR:-http://deb.debian.org/debian}
bare=$root/bare
debootstrap --variant=minbase "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$bare" "$mirror" >"$root/debootstrap.log" 2>&1 ||
    { tail -n 20 "$root/debootstrap.log" && exit 1; }
cp "$deb" "$bare/tmp/"
trap 'rm -rf "$bare"' EXIT
# /proc is there inside alone, and goes with the command.
inside() { unshare -m sh -c 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"' "$bare" "$@"; }
inside env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "/tmp/${deb##*/}" >"$root/apt.log" 2>&1 ||
    { tail -n 20 "$root/apt.log" && exit 1; }
use /usr inside >"$root/log.txt" 2>&1 || { cat "$root/log.txt" && exit 1; }
inside dpkg -r unsloth-lua >>"$root/apt.log" 2>&1
[[ ! -e $bare/usr/bin/unsloth-lua && ! -e $bare/usr/share/unsloth-lua ]] || { echo "something is left after removal" && exit 1; }
echo "installed, run and removed on $(cat "$bare/etc/debian_version"), which had $(inside dpkg-query -f '.\n' -W | wc -l) packages"
