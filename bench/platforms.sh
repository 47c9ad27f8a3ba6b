#!/usr/bin/env bash
# Builds the program of tests/examples/platform.rs for other platforms, runs it there (natively or in an emulator) and prints a
# table: goldens, files of tensors exchanged both ways with this machine, time, size. docs/PLATFORMS.md has the last one.
#
#     bench/platforms.sh NAME…|all        names: i686 aarch64 armv7 s390x
#
# It wants Debian 12 and fetches what is missing: Debian's own Rust (rustc-web), since it has the sources of the standard library and
# builds of it for other machines; cross compilers; qemu. What it builds lies in target/platforms.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
all=(i686 aarch64 armv7 s390x)
[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
[ "$1" != all ] || set -- "${all[@]}"

out=$here/target/platforms
mkdir -p "$out"
need() { # PACKAGE…
    local missing=()
    for package in "$@"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
    [ ${#missing[@]} -eq 0 ] || { apt-get update -q && apt-get install --yes --no-install-recommends "${missing[@]}"; } >&2
}
need rustc-web cargo-web rust-web-src curl ca-certificates

# The program for this machine, by the project's own compiler: the other side of each exchange.
cargo build --quiet --workspace --example platform
native=${CARGO_TARGET_DIR:-target}/debug/examples/platform
"$native" write "$out/here.safetensors"

debian_std() { # ARCHITECTURE: the folder of a standard library that Debian has built for it
    local folder=$out/std-$1 uri
    if ! [ -d "$folder" ]; then
        uri=$(apt-get download --print-uris libstd-rust-web-dev | cut -d"'" -f2)
        curl --silent --show-error --fail --output "$folder.deb" "${uri/_amd64.deb/_$1.deb}"
        dpkg -x "$folder.deb" "$folder.partial" && rm "$folder.deb" && mv "$folder.partial" "$folder"
    fi
    echo "$folder"/usr/lib/rustlib/*/lib
}

platform() { # NAME: sets target, linker, std (Debian's architecture, or `build`) and how to run a program
    case $1 in
    i686)
        need gcc-i686-linux-gnu libc6-dev-i386-cross
        target=i686-unknown-linux-gnu linker=i686-linux-gnu-gcc std=i386
        run=(/usr/i686-linux-gnu/lib/ld-linux.so.2 --library-path /usr/i686-linux-gnu/lib) how=natively
        ;;
    aarch64)
        need gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
        target=aarch64-unknown-linux-gnu linker=aarch64-linux-gnu-gcc std=arm64
        run=(qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu) how=qemu
        ;;
    armv7)
        need gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user
        target=armv7-unknown-linux-gnueabihf linker=arm-linux-gnueabihf-gcc std=armhf
        run=(qemu-arm -cpu max -L /usr/arm-linux-gnueabihf) how=qemu
        ;;
    s390x)
        need gcc-s390x-linux-gnu libc6-dev-s390x-cross qemu-user
        target=s390x-unknown-linux-gnu linker=s390x-linux-gnu-gcc std=build
        run=(qemu-s390x -L /usr/s390x-linux-gnu) how=qemu
        ;;
    *)
        echo "unknown platform $1: expected one of ${all[*]}" >&2
        exit 2
        ;;
    esac
}

build() { # with Debian's compiler, whatever the project's is
    local flags=() rustflags= upper=${target^^}
    if [ "$std" = build ]; then flags=(-Zbuild-std=std,panic_unwind); else rustflags="-L $(debian_std "$std")"; fi
    env PATH="/usr/bin:$PATH" RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$out" RUSTFLAGS="$rustflags" \
        "CARGO_TARGET_${upper//-/_}_LINKER=$linker" \
        cargo build --quiet --profile platform --target "$target" "${flags[@]}" \
        --package flowtape-tests --no-default-features --example platform >&2
}

rows=()
failed=0
for name in "$@"; do
    platform "$name"
    before=$SECONDS
    build
    built=$((SECONDS - before))
    program=$out/$target/platform/examples/platform
    before=$SECONDS
    verdict=yes
    log=$out/$name.log
    "${run[@]}" "$program" goldens tests/goldens tests/own_goldens >"$log" 2>&1 || verdict=FAILED
    goldens=$(tail -n 1 "$log" | grep -q '^failed' && tail -n 2 "$log" | head -n 1 || tail -n 1 "$log")
    took=$((SECONDS - before))
    exchange=yes
    "${run[@]}" "$program" write "$out/$name.safetensors" && "${run[@]}" "$program" read "$out/here.safetensors" &&
        "$native" read "$out/$name.safetensors" && cmp "$out/here.safetensors" "$out/$name.safetensors" || exchange=FAILED
    [ "$verdict$exchange" = yesyes ] || { failed=1; grep FAILED "$log" | head -n 20; }
    size=$(($(stat --format %s "$program") / 1000))
    rows+=("| $name | $how | $goldens | $exchange | $took s | $built s | $size kB |")
done
echo "$(date --utc --iso-8601), $(PATH=/usr/bin:$PATH rustc --version | cut -d'(' -f1) of Debian"
echo
echo "| platform | run | goldens | files both ways, byte for byte | time | build | program |"
echo "|---|---|---|---|---|---|---|"
printf '%s\n' "${rows[@]}"
exit "$failed"
