#!/usr/bin/env bash
# Builds the program of tests/examples/platform.rs for other platforms, runs it there (natively or in an emulator) and prints a
# table: goldens, files of tensors exchanged both ways with this machine, 20 steps of the digits into a run folder, whose losses and
# weights are laid beside this machine's, time, size. docs/PLATFORMS.md has the last one.
#
#     bench/platforms.sh [--short] NAME…|all        names: i686 s390x aarch64 armv7 musl glibc wasip1 page
#
# Of a platform's lesser instruction sets, operations and one model alone are run. While one platform's program runs, the next one's is built.
#
# --short compares goldens and files alone, by a program that is soon built: engine, pipeline and models, without the trainer. The
# statistics of noise levels are left out, and in an emulator all but operations and what is of FLUX. This is what CI runs.
#
# `page` is that of `flowtape web`: it builds both modules of web/, for one thread and for several, and runs the tests that drive them in
# headless Chromium, one of which wants the same weights of both.
#
# It wants Debian 12 and fetches what is missing: Debian's own Rust (rustc-web), since it has the sources of the standard library and
# builds of it for other machines; cross compilers; qemu; wasmtime; zig. What it fetches and builds lies in target/platforms, or in
# FLOWTAPE_PLATFORMS. Each run has a folder of its own there for all else, which stays where something failed.
# FLOWTAPE_PLATFORMS_PROFILE names another profile of Cargo's, such as `dist` for the size of what is handed out.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
all=(i686 s390x aarch64 armv7 musl glibc wasip1 page)
short=
[ "${1-}" != --short ] || { short=yes && shift; }
[ $# -gt 0 ] || { sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 2; }
[ "$1" != all ] || set -- "${all[@]}"

export FLOWTAPE_PLATFORMS=${FLOWTAPE_PLATFORMS:-$here/target/platforms}
kept=$FLOWTAPE_PLATFORMS
profile=platform features=trainer
[ -z "$short" ] || profile=goldens features=
profile=${FLOWTAPE_PLATFORMS_PROFILE:-$profile}
mkdir -p "$kept"
out=$(mktemp -d "$kept/run.XXXXXX")
trap 'failed=$?; kill $(jobs -p) 2>/dev/null || true; [ $failed -eq 0 ] && rm -rf "$out" || echo "what failed lies in $out" >&2' EXIT
# Runs fetch and build one after another; each takes the programs with it.
exec {turn}>"$kept/lock"
need() { # PACKAGE…
    local missing=()
    for package in "$@"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
    [ ${#missing[@]} -eq 0 ] || { apt-get update -q && apt-get install --yes --no-install-recommends "${missing[@]}"; } >&2
}
flock "$turn"
need rustc-web cargo-web rust-web-src curl ca-certificates

mkdir "$out"/{few,emulated,short}
cp -r tests/goldens/{ops,flux_step} "$out/few"
cp -r tests/goldens/{ops,*flux*} "$out/emulated"
cp -r tests/{goldens,own_goldens} "$out/short"
rm "$out"/short/goldens/pipeline_math/sigma_statistics.*
# A model that is small enough for an emulator.
settings=(model.num_layers=1 model.num_single_layers=1 step_scheduler.local_batch_size=4 step_scheduler.max_steps=20
    sampling.num_inference_steps=2 report.samples_per_class=1)
weights=checkpoints/step_000020/diffusion_pytorch_model.safetensors
# Losses are as another machine's where no step's differs by more than this share: they are those of different orders of rounding.
near=1e-4

# The program for this machine, by the project's own compiler: the other side of each exchange, and of each comparison.
cargo build --quiet --workspace --example platform
native=$out/here.program
cp "${CARGO_TARGET_DIR:-target}/debug/examples/platform" "$native"
flock --unlock "$turn"
"$native" write "$out/here.safetensors"
[ "$short" ] || for set in $("$native" sets); do
    FLOWTAPE_ISA=$set "$native" train "$out/here.$set.run" "${settings[@]}" >"$out/here.$set.steps"
done

debian_std() { # ARCHITECTURE: the folder of a standard library that Debian has built for it, of the compiler's own version
    local uri folder
    uri=$(apt-get download --print-uris libstd-rust-web-dev | cut -d"'" -f2)
    uri=${uri/_amd64.deb/_$1.deb}
    folder=$kept/$(basename "$uri" .deb)
    if ! [ -d "$folder" ]; then
        curl --silent --show-error --fail --output "$out/deb" "$uri"
        rm -rf "$folder.partial"
        dpkg -x "$out/deb" "$folder.partial" && mv "$folder.partial" "$folder"
    fi
    echo "$folder"/usr/lib/rustlib/*/lib
}

python() { # PACKAGE…: into an environment of its own
    need python3-venv
    [ -d "$kept/python" ] || python3 -m venv "$kept/python"
    "$kept/python/bin/pip" install --quiet "$@"
}

# NAME: sets target (`here` for the parts that this machine's program is made of), linker (for those a folder with a `cc`), std
# (Debian's architecture, or `build`), flags of the compiler, how a program is run, what takes symbols out of it, whether the engine's
# tests are run, and whether the run happens in a folder without any other file as the system's root. The run is laid beside this
# machine's with the instruction set `like` (its own, if that is empty), which rounds a multiply-add as often; `same` wants the same
# bits of all weights.
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
        run=(qemu-arm -cpu max -L /usr/arm-linux-gnueabihf) how=qemu same=yes
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
        mkdir -p "$kept/musl"
        cp "$(gcc --print-file-name=libgcc_eh.a)" "$kept/musl/libunwind.a"
        echo 'int _dl_find_object(void *pc, void *result) { return -1; }' | gcc -c -x c -o "$kept/musl/found.o" -
        ar r "$kept/musl/libunwind.a" "$kept/musl/found.o" 2>/dev/null
        flags="-C link-self-contained=no -C relocation-model=static -L native=$kept/musl"
        ;;
    glibc)
        # Linked by zig, which knows what each glibc has; run with Debian 11's.
        python cargo-zigbuild==0.24.1 ziglang==0.17.1
        mkdir -p "$kept/zig"
        printf '#!/bin/sh\nPATH=%s:$PATH exec cargo-zigbuild zig cc -- -target x86_64-linux-gnu.2.31 "$@"\n' "$kept/python/bin" >"$kept/zig/cc"
        chmod +x "$kept/zig/cc"
        target=here linker=$kept/zig strip=strip
        libraries=$(bench/glibc.sh)
        run=("$libraries/ld-2.31.so" --library-path "$libraries")
        how="natively, glibc 2.31" like= same=yes
        ;;
    wasip1)
        need lld-22 wasi-libc
        python wasmtime==50.0.1
        target=wasm32-wasip1 linker=wasm-ld-22 strip=true std=build panic=panic_abort
        flags="-C target-feature=+simd128 -C link-self-contained=no -L /usr/lib/wasm32-wasi -C link-arg=/usr/lib/wasm32-wasi/crt1-command.o"
        run=("$kept/python/bin/python" bench/wasi.py) how=wasmtime same=yes
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
    env PATH="/usr/bin:$PATH" RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$kept" RUSTFLAGS="$rustflags" RUSTDOCFLAGS="$rustflags" \
        "${upper}_LINKER=$linker" "${upper}_RUNNER=${run[*]}" \
        cargo "$1" --quiet --profile "$profile" --target "$target" "${std_flags[@]}" "${@:2}" >&2
}

link_here() { # SOURCE PROGRAM FILE ARGUMENT…: a program of this machine's parts, by another `cc`, for which cargo builds no part again
    touch "$1"
    PATH=$linker:$PATH cargo build --quiet --workspace "${@:4}" >&2
    mv "${CARGO_TARGET_DIR:-target}/debug/$2" "$3"
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

page() { # a row of its own: what runs there is the page
    local before=$SECONDS built tests=passed
    need chromium lld-22
    web/build.sh >&2
    web/build.sh threads >&2
    built=$((SECONDS - before)) before=$SECONDS
    FLOWTAPE_REQUIRE=chromium,web,web-threads cargo test --quiet --workspace --test web >&2 || tests=FAILED failed=1
    size=$(du --bytes --summarize --exclude threads web/pkg | awk '{ print int($1 / 1000) }')
    rows+=("| page | headless Chromium, 1 to 3 threads | its tests $tests, in $((SECONDS - before)) s | | | $built s | $size kB |")
}

# What all rows of a platform end with.
row() { echo "| $name | $1 | $2 | ${3-} | ${4-} | $built s | $size kB |" >>"$out/$name.rows"; }

# The program's rows, once it is built. It fails where one of them does.
try() {
    local failed=0 exchange=yes set log before counts took steps= folders sets
    # Where instructions are many times as long, threads that wait for each other only take time.
    if [ "$how" = qemu ]; then export RAYON_NUM_THREADS=1; else unset RAYON_NUM_THREADS; fi
    sets=($("${run[@]}" "$program" sets))
    "${run[@]}" "$program" write "$out/$name.safetensors" && "${run[@]}" "$program" read "$out/here.safetensors" &&
        "$native" read "$out/$name.safetensors" && cmp "$out/here.safetensors" "$out/$name.safetensors" || exchange=FAILED
    for set in "${sets[@]}"; do
        export FLOWTAPE_ISA=$set
        log=$out/$name.$set before=$SECONDS
        if [ "$set" != "${sets[-1]}" ]; then
            folders=("$out/few")
        elif ! [ "$short" ]; then
            folders=("$here"/tests/{goldens,own_goldens})
        elif [ "$how" = qemu ]; then
            folders=("$out/emulated")
        else
            folders=("$out"/short/{goldens,own_goldens})
        fi
        "${run[@]}" "$program" goldens "${folders[@]}" >"$log.log" 2>&1 || grep FAILED "$log.log" | head -n 20 >&2 || true
        counts=$(grep -E '^[0-9]+ passed, ' "$log.log" || echo "FAILED: $(tail -n 1 "$log.log")")
        took=$((SECONDS - before))
        if ! [ "$short" ]; then
            if [ "$alone" ]; then
                rm -rf "$out/empty" && mkdir "$out/empty" && cp "$program" "$out/empty/platform"
                chroot "$out/empty" /platform train /run "${settings[@]}" >"$log.steps" && mv "$out/empty/run" "$log.run"
            else
                "${run[@]}" "$program" train "$log.run" "${settings[@]}" >"$log.steps"
            fi || tail -n 1 "$log.steps" >&2
            steps="$(beside "$name" "$set"), $(awk '{ print $8 }' "$log.steps" | sort -g | sed -n 10p) s a step"
        fi
        unset FLOWTAPE_ISA
        [[ "$counts $exchange $steps" != *FAILED* && "$counts" == *", 0 failed"* ]] || failed=1
        row "$how: $set" "$counts, in $took s" "$exchange" "$steps"
    done
    [ "$engine" ] && ! [ "$short" ] || return "$failed"
    # They start themselves again on other sets where none is named, which takes a system that can start them.
    for set in "${sets[@]}"; do
        log=$out/$name.$set.tests ended=
        FLOWTAPE_ISA=$set with_cargo test --package flowtape-engine 2>"$log" || { ended=" FAILED" failed=1 && tail -n 40 "$log" >&2; }
        # Their own times, since Cargo may wait for the next program's build.
        counts=$(awk '/^test result/ { passed += $4; failed += $6; took += $NF }
            END { printf "%d passed, %d failed, in %.0f s", passed, failed, took }' "$log")
        row "$how: $set" "the engine's tests$ended: $counts"
    done
    return "$failed"
}

# The page, whose rows are of its own tests.
page() {
    local before=$SECONDS tests=passed
    need chromium lld-22
    web/build.sh >&2
    web/build.sh threads >&2
    built=$((SECONDS - before)) before=$SECONDS
    FLOWTAPE_REQUIRE=chromium,web,web-threads cargo test --quiet --workspace --test web >&2 || tests=FAILED
    size=$(du --bytes --summarize --exclude threads web/pkg | awk '{ print int($1 / 1000) }')
    row "headless Chromium, 1 to 3 threads" "its tests $tests, in $((SECONDS - before)) s"
    [ "$tests" = passed ]
}

failed=0
tries=()
for name in "$@"; do
    flock "$turn"
    if [ "$name" = page ]; then
        page &
        wait $! || failed=1
        flock --unlock "$turn"
        continue
    fi
    platform "$name"
    before=$SECONDS
    program=$out/$name.program
    if [ "$target" = here ]; then
        link_here tests/examples/platform.rs examples/platform "$program" --example platform
        # The program that people have trains there, too.
        link_here cli/src/main.rs flowtape "$out/flowtape" --bin flowtape
        "${run[@]}" "$out/flowtape" train digits --quiet "${settings[@]/#/--set=}" --set "run_dir=$out/$name.run" >&2
    else
        with_cargo build --package flowtape-tests --no-default-features --features "$features" --example platform
        made=$kept/$target/$profile/examples/platform
        [ -f "$made" ] || made+=.wasm
        cp "$made" "$program"
        if [ "$engine" ] && ! [ "$short" ]; then with_cargo test --package flowtape-engine --no-run; fi
    fi
    built=$((SECONDS - before))
    flock --unlock "$turn"
    cp "$program" "$out/stripped"
    "${strip:-${linker%-gcc}-strip}" "$out/stripped"
    size=$(($(stat --format %s "$out/stripped") / 1000))
    # One program runs at a time.
    (exec {runs}>"$out/runs" && flock "$runs" && try) &
    tries+=($!)
done
for tried in "${tries[@]}"; do wait "$tried" || failed=1; done
echo "$(date --utc --iso-8601), $(PATH=/usr/bin:$PATH rustc --version | cut -d'(' -f1)of Debian"
echo
echo "| platform | run | goldens | files both ways, byte for byte | 20 steps | build | program |"
echo "|---|---|---|---|---|---|---|"
for name in "$@"; do cat "$out/$name.rows" || failed=1; done
exit "$failed"
