#!/usr/bin/env bash
# Builds the program of tests/examples/platform.rs for other platforms, runs it there (natively or in an emulator) and prints a
# table: goldens, files of tensors exchanged both ways with this machine, 20 steps of the digits into a run folder, whose losses and
# weights are laid beside this machine's, time, size. docs/PLATFORMS.md has the last one.
#
#     bench/platforms.sh [--short] NAME…|all        names: i686 aarch64 armv7 s390x musl glibc wasip1
#
# --short leaves out the statistics of noise levels, which are longer than all the rest; of a platform's lesser instruction sets it
# runs operations and one model alone; and it runs no tests of the engine.
#
# It wants Debian 12 and fetches what is missing: Debian's own Rust (rustc-web), since it has the sources of the standard library and
# builds of it for other machines; cross compilers; qemu; wasmtime; zig. What it builds lies in target/platforms, or in
# FLOWTAPE_PLATFORMS; FLOWTAPE_PLATFORMS_PROFILE names another profile of Cargo's, such as `dist` for the size of what is handed out.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
all=(i686 aarch64 armv7 s390x musl glibc wasip1)
short=
[ "${1-}" != --short ] || { short=yes && shift; }
[ $# -gt 0 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
[ "$1" != all ] || set -- "${all[@]}"

out=${FLOWTAPE_PLATFORMS:-$here/target/platforms}
profile=${FLOWTAPE_PLATFORMS_PROFILE:-platform}
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
    data.num_workers=0 sampling.num_inference_steps=2 report.samples_per_class=1)
weights=checkpoints/step_000020/diffusion_pytorch_model.safetensors
# Losses are as another machine's where no step's differs by more than this share: they are those of different orders of rounding.
near=1e-4

# The program for this machine, by the project's own compiler: the other side of each exchange, and of each comparison.
cargo build --quiet --workspace --example platform
native=$out/here.program
cp "${CARGO_TARGET_DIR:-target}/debug/examples/platform" "$native"
"$native" write "$out/here.safetensors"
for set in $("$native" sets); do
    rm -rf "$out/here.$set.run"
    FLOWTAPE_ISA=$set "$native" train "$out/here.$set.run" "${settings[@]}" >"$out/here.$set.steps"
done

download() { # FILE URL [SHA256]
    [ -f "$1" ] && return
    curl --silent --show-error --fail --output "$1.partial" "$2"
    [ -z "${3-}" ] || sha256sum --check --quiet <<<"$3  $1.partial"
    mv "$1.partial" "$1"
}

unpacked() { # FOLDER URL [SHA256]: what lies in a package of Debian's, without installing it
    [ -d "$1" ] && return
    download "$1.deb" "${@:2}"
    dpkg -x "$1.deb" "$1.partial" && mv "$1.partial" "$1"
}

debian_std() { # ARCHITECTURE: the folder of a standard library that Debian has built for it
    local folder=$out/std-$1 uri
    uri=$(apt-get download --print-uris libstd-rust-web-dev | cut -d"'" -f2)
    unpacked "$folder" "${uri/_amd64.deb/_$1.deb}"
    echo "$folder"/usr/lib/rustlib/*/lib
}

python() { # PACKAGE…: into an environment of its own
    need python3-venv
    [ -d "$out/python" ] || python3 -m venv "$out/python"
    "$out/python/bin/pip" install --quiet "$@"
}

# NAME: sets target (`here` for the parts that this machine's program is made of), linker (for those a folder with a `cc`), std
# (Debian's architecture, or `build`), flags of the compiler, how a program is run, what takes symbols out of it, whether the engine's
# tests are run, and whether the run happens in a folder without any other file as the system's root. The run is laid beside this machine's with the instruction set `like` (its own, if that is empty), which rounds a multiply-add
# as often; `same` wants the same bits of all weights.
platform() {
    engine= alone= flags= panic=panic_unwind like=portable same= strip=
    case $1 in
    i686)
        need gcc-i686-linux-gnu libc6-dev-i386-cross
        target=i686-unknown-linux-gnu linker=i686-linux-gnu-gcc std=i386
        run=(/usr/i686-linux-gnu/lib/ld-linux.so.2 --library-path /usr/i686-linux-gnu/lib) how=natively same=yes
        ;;
    aarch64)
        need gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
        target=aarch64-unknown-linux-gnu linker=aarch64-linux-gnu-gcc std=arm64
        run=(qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu) how=qemu engine=yes like=avx2 same=yes
        ;;
    armv7)
        need gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user
        target=armv7-unknown-linux-gnueabihf linker=arm-linux-gnueabihf-gcc std=armhf
        run=(qemu-arm -cpu max -L /usr/arm-linux-gnueabihf) how=qemu
        ;;
    s390x)
        need gcc-s390x-linux-gnu libc6-dev-s390x-cross qemu-user
        target=s390x-unknown-linux-gnu linker=s390x-linux-gnu-gcc std=build
        run=(qemu-s390x -L /usr/s390x-linux-gnu) how=qemu same=yes
        ;;
    musl)
        need musl-tools binutils
        target=x86_64-unknown-linux-musl linker=musl-gcc strip=strip std=build run=(env) how="natively, without any other file" alone=yes like= same=yes
        # The unwinder is GCC's, which asks glibc for what musl does not have.
        mkdir -p "$out/musl"
        cp "$(gcc --print-file-name=libgcc_eh.a)" "$out/musl/libunwind.a"
        echo 'int _dl_find_object(void *pc, void *result) { return -1; }' | gcc -c -x c -o "$out/musl/found.o" -
        ar r "$out/musl/libunwind.a" "$out/musl/found.o" 2>/dev/null
        flags="-C link-self-contained=no -C relocation-model=static -L native=$out/musl"
        ;;
    glibc)
        # Linked by zig, which knows what each glibc has; run with Debian 11's.
        python cargo-zigbuild==0.24.1 ziglang==0.17.1
        mkdir -p "$out/zig"
        printf '#!/bin/sh\nPATH=%s:$PATH exec cargo-zigbuild zig cc -- -target x86_64-linux-gnu.2.31 "$@"\n' "$out/python/bin" >"$out/zig/cc"
        chmod +x "$out/zig/cc"
        unpacked "$out/glibc-2.31" https://deb.debian.org/debian/pool/main/g/glibc/libc6_2.31-13+deb11u11_amd64.deb \
            05f7264da867b37f4c5ce49266b558ea1e81e05a9464f623152fca70f3550282
        target=here linker=$out/zig strip=strip
        run=("$out"/glibc-2.31/lib/x86_64-linux-gnu/ld-2.31.so --library-path "$out/glibc-2.31/lib/x86_64-linux-gnu")
        how="natively, glibc 2.31" like= same=yes
        ;;
    wasip1)
        need lld-22 wasi-libc
        python wasmtime==50.0.1
        target=wasm32-wasip1 linker=wasm-ld-22 strip=true std=build panic=panic_abort
        flags="-C target-feature=+simd128 -C link-self-contained=no -L /usr/lib/wasm32-wasi -C link-arg=/usr/lib/wasm32-wasi/crt1-command.o"
        run=("$out/python/bin/python" bench/wasi.py) how=wasmtime
        ;;
    *)
        echo "unknown platform $1: expected one of ${all[*]}" >&2
        exit 2
        ;;
    esac
}

with_cargo() { # cargo's arguments: Debian's compiler, whatever the project's is
    local std_flags=() rustflags=$flags upper=${target^^}
    upper=CARGO_TARGET_${upper//-/_}
    if [ "$std" = build ]; then std_flags=("-Zbuild-std=std,$panic"); else rustflags+=" -L $(debian_std "$std")"; fi
    env PATH="/usr/bin:$PATH" RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$out" RUSTFLAGS="$rustflags" \
        "${upper}_LINKER=$linker" "${upper}_RUNNER=${run[*]}" \
        cargo "$1" --quiet --profile "$profile" --target "$target" "${std_flags[@]}" "${@:2}" >&2
}

link_here() { # SOURCE PROGRAM ARGUMENT…: a program of this machine's parts, by another `cc`, for which cargo builds no part again
    touch "$1"
    PATH=$linker:$PATH cargo build --quiet --workspace "${@:3}" >&2
    mv "${CARGO_TARGET_DIR:-target}/debug/$2" "$out/$name/"
    touch "$1" # so that the next build links it as ever
}

# NAME SET: the 20 steps beside this machine's, in words.
beside() {
    local like=${like:-$2} same=$same theirs=$out/$1.$2
    if ! [ -f "$out/here.$like.steps" ]; then # an older machine than most
        like=portable same=
    fi
    local ours=$out/here.$like
    if cmp --silent "$ours.run/$weights" "$theirs.run/$weights"; then
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
    if [ "$target" = here ]; then
        rm -rf "$out/$name" "$out/$name.run" && mkdir "$out/$name"
        link_here tests/examples/platform.rs examples/platform --example platform
        program=$out/$name/platform
        # The program that people have trains there, too.
        link_here cli/src/main.rs flowtape --bin flowtape
        "${run[@]}" "$out/$name/flowtape" train digits --quiet "${settings[@]/#/--set=}" --set "run_dir=$out/$name.run" >&2
    else
        with_cargo build --package flowtape-tests --no-default-features --features trainer --example platform
        program=$out/$target/$profile/examples/platform
        [ -f "$program" ] || program+=.wasm
    fi
    built=$((SECONDS - before))
    cp "$program" "$out/stripped"
    "${strip:-${linker%-gcc}-strip}" "$out/stripped"
    size=$(($(stat --format %s "$out/stripped") / 1000))
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
        "${run[@]}" "$program" goldens "${folders[@]}" >"$log.log" 2>&1 || grep FAILED "$log.log" | head -n 20 >&2 || true
        counts=$(grep -E '^[0-9]+ passed, ' "$log.log" || echo "FAILED: $(tail -n 1 "$log.log")")
        took=$((SECONDS - before))
        rm -rf "$log.run"
        if [ "$alone" ]; then
            rm -rf "$out/empty" && mkdir "$out/empty" && cp "$program" "$out/empty/platform"
            chroot "$out/empty" /platform train /run "${settings[@]}" >"$log.steps" && mv "$out/empty/run" "$log.run"
        else
            "${run[@]}" "$program" train "$log.run" "${settings[@]}" >"$log.steps"
        fi || tail -n 1 "$log.steps" >&2
        steps="$(beside "$name" "$set"), $(awk '{ print $8 }' "$log.steps" | sort -g | sed -n 10p) s a step"
        unset FLOWTAPE_ISA
        [[ "$counts $exchange $steps" != *FAILED* && "$counts" == *", 0 failed"* ]] || failed=1
        rows+=("| $name | $how: $set | $counts, in $took s | $exchange | $steps | $built s | $size kB |")
    done
    if [ "$engine" ] && ! [ "$short" ]; then
        before=$SECONDS
        tests=passed
        with_cargo test --package flowtape-engine || tests=FAILED failed=1
        rows+=("| $name | $how | the engine's tests $tests, in $((SECONDS - before)) s | | | | |")
    fi
done
echo "$(date --utc --iso-8601), $(PATH=/usr/bin:$PATH rustc --version | cut -d'(' -f1)of Debian"
echo
echo "| platform | run | goldens | files both ways, byte for byte | 20 steps | build | program |"
echo "|---|---|---|---|---|---|---|"
printf '%s\n' "${rows[@]}"
exit "$failed"
