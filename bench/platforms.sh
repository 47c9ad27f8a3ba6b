#!/usr/bin/env bash
# Builds the program of tests/examples/platform.rs for other platforms, runs it there (natively or in an emulator) and prints a
# table: goldens, files of tensors exchanged both ways with this machine, 20 steps of the digits beside this machine's, time, size.
# docs/PLATFORMS.md has the last one.
#
#     bench/platforms.sh [--short] NAME…|all        names: i686 aarch64 armv7 s390x
#
# --short leaves out the statistics of noise levels, which are longer than all the rest; of a platform's lesser instruction sets it
# runs operations and one model alone.
#
# It wants Debian 12 and fetches what is missing: Debian's own Rust (rustc-web), since it has the sources of the standard library and
# builds of it for other machines; cross compilers; qemu. What it builds lies in target/platforms, or in FLOWTAPE_PLATFORMS.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
all=(i686 aarch64 armv7 s390x)
short=
[ "${1-}" != --short ] || { short=yes && shift; }
[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
[ "$1" != all ] || set -- "${all[@]}"

out=${FLOWTAPE_PLATFORMS:-$here/target/platforms}
mkdir -p "$out"
need() { # PACKAGE…
    local missing=()
    for package in "$@"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
    [ ${#missing[@]} -eq 0 ] || { apt-get update -q && apt-get install --yes --no-install-recommends "${missing[@]}"; } >&2
}
need rustc-web cargo-web rust-web-src curl ca-certificates

goldens=(tests/goldens tests/own_goldens) few=("${goldens[@]}")
if [ "$short" ]; then
    goldens=("$out"/short/{goldens,own_goldens}) few=("$out/few")
    rm -rf "$out/short" "$out/few" && mkdir "$out/short" "$out/few"
    cp -r tests/{goldens,own_goldens} "$out/short"
    rm "$out"/short/goldens/pipeline_math/sigma_statistics.*
    cp -r tests/goldens/{ops,flux_step} "$out/few"
fi
# A model that is small enough for an emulator; not all platforms have threads that read ahead.
settings=(model.num_layers=1 model.num_single_layers=1 step_scheduler.local_batch_size=4 step_scheduler.max_steps=20
    data.num_workers=0)
# Losses are as another machine's where no step's differs by more than this share: they are those of different orders of rounding.
near=1e-4

# The program for this machine, by the project's own compiler: the other side of each exchange, and of each comparison.
cargo build --quiet --workspace --example platform
native=${CARGO_TARGET_DIR:-target}/debug/examples/platform
"$native" write "$out/here.safetensors"
for set in $("$native" sets); do
    FLOWTAPE_ISA=$set "$native" steps "$out/here.$set.weights" "${settings[@]}" >"$out/here.$set.steps"
done

debian_std() { # ARCHITECTURE: the folder of a standard library that Debian has built for it
    local folder=$out/std-$1 uri
    if ! [ -d "$folder" ]; then
        uri=$(apt-get download --print-uris libstd-rust-web-dev | cut -d"'" -f2)
        curl --silent --show-error --fail --output "$folder.deb" "${uri/_amd64.deb/_$1.deb}"
        dpkg -x "$folder.deb" "$folder.partial" && rm "$folder.deb" && mv "$folder.partial" "$folder"
    fi
    echo "$folder"/usr/lib/rustlib/*/lib
}

# NAME: sets target, linker, std (Debian's architecture, or `build`), how a program is run, and beside which of this machine's
# instruction sets the 20 steps are laid, where a multiply-add is rounded as often. `same` wants the same bits of all weights.
platform() {
    like=portable same=
    case $1 in
    i686)
        need gcc-i686-linux-gnu libc6-dev-i386-cross
        target=i686-unknown-linux-gnu linker=i686-linux-gnu-gcc std=i386
        run=(/usr/i686-linux-gnu/lib/ld-linux.so.2 --library-path /usr/i686-linux-gnu/lib) how=natively same=yes
        ;;
    aarch64)
        need gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
        target=aarch64-unknown-linux-gnu linker=aarch64-linux-gnu-gcc std=arm64
        run=(qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu) how=qemu like=avx2 same=yes
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
        --package flowtape-tests --no-default-features --features trainer --example platform >&2
}

# NAME SET: the 20 steps beside this machine's, in words.
beside() {
    local ours=$out/here.$like theirs=$out/$1.$2
    if ! [ -f "$ours.steps" ]; then # an older machine than most
        like=portable same= ours=$out/here.portable
    fi
    if cmp --silent "$ours.weights" "$theirs.weights"; then
        echo "the bits of x86-64 ($like)"
        return
    fi
    [ -z "$same" ] || echo -n "FAILED: other bits, "
    paste "$ours.steps" "$theirs.steps" | awk -v near="$near" -v like="$like" '
        { d = ($4 - $12) / $4; d = d < 0 ? -d : d; if (!(d <= worst)) worst = d }
        END { printf "%s x86-64 (%s) by %.0e\n", worst <= near && NR == 20 ? "within" : "FAILED: off", like, worst }'
}

rows=()
failed=0
for name in "$@"; do
    platform "$name"
    before=$SECONDS
    build
    built=$((SECONDS - before))
    program=$out/$target/platform/examples/platform
    size=$(($(stat --format %s "$program") / 1000))
    exchange=yes
    "${run[@]}" "$program" write "$out/$name.safetensors" && "${run[@]}" "$program" read "$out/here.safetensors" &&
        "$native" read "$out/$name.safetensors" && cmp "$out/here.safetensors" "$out/$name.safetensors" || exchange=FAILED
    sets=($("${run[@]}" "$program" sets))
    # Where instructions are many times as long, threads that wait for each other only take time.
    if [ "$how" = qemu ]; then export RAYON_NUM_THREADS=1; else unset RAYON_NUM_THREADS; fi
    for set in "${sets[@]}"; do
        export FLOWTAPE_ISA=$set
        log=$out/$name.$set
        before=$SECONDS
        if [ "$set" = "${sets[-1]}" ]; then folders=("${goldens[@]}"); else folders=("${few[@]}"); fi
        "${run[@]}" "$program" goldens "${folders[@]}" >"$log.log" 2>&1 || grep FAILED "$log.log" | head -n 20 || true
        counts=$(grep -E '^[0-9]+ passed, ' "$log.log" || echo "FAILED: $(tail -n 1 "$log.log")")
        took=$((SECONDS - before))
        before=$SECONDS
        rm -f "$log.weights"
        "${run[@]}" "$program" steps "$log.weights" "${settings[@]}" >"$log.steps" || tail -n 1 "$log.steps"
        steps=$(beside "$name" "$set")
        trained=$((SECONDS - before))
        unset FLOWTAPE_ISA
        [[ "$counts $exchange $steps" != *FAILED* && "$counts" == *", 0 failed"* ]] || failed=1
        rows+=("| $name | $how, $set | $counts, in $took s | $exchange | $steps, in $trained s | $built s | $size kB |")
    done
done
echo "$(date --utc --iso-8601), $(PATH=/usr/bin:$PATH rustc --version | cut -d'(' -f1)of Debian"
echo
echo "| platform | run | goldens | files both ways, byte for byte | 20 steps | build | program |"
echo "|---|---|---|---|---|---|---|"
printf '%s\n' "${rows[@]}"
exit "$failed"
