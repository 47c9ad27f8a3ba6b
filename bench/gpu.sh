#!/usr/bin/env bash
# For the day an NVIDIA GPU is at hand.
#
#   bench/gpu.sh pack FOLDER      where there is a Rust toolchain: test binaries, stripped, and the goldens, to carry along
#   bench/gpu.sh check FOLDER     on the GPU's machine: all of it, in release builds, under 8 minutes
#   bench/gpu.sh peer PYTHON      on the GPU's machine: PyTorch's ceilings and step times (PYTHON has torch and diffusers)
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
pack)
    mkdir -p "$2"
    binary() {
        cargo test --release --no-run --message-format=json "$@" |
            sed -n -E 's/.*"kind":\["test"\].*"executable":"([^"]+)".*/\1/p' | tail -1
    }
    cp "$(binary -p flowtape-gpu --features cuda --test cuda)" "$2/cuda"
    cp "$(binary -p flowtape-tests --test backends)" "$2/backends"
    strip "$2/cuda" "$2/backends"
    cp -r tests/goldens "$2/goldens"
    cp bench/gpu.sh "$2/"
    ;;
check)
    export FLOWTAPE_REQUIRE=cuda FLOWTAPE_GOLDENS="$2/goldens"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    for test in cuda backends; do
        timeout 240 "$2/$test"
    done
    # Where it is there: no access out of bounds, no race in shared memory.
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 1 "$2/cuda" cases_in_bf16
        done
    fi
    ;;
peer)
    "$2" bench/peer/torch_gpu_step.py --limits
    for config in M L XL; do
        "$2" bench/peer/torch_gpu_step.py --config "$config"
        "$2" bench/peer/torch_gpu_step.py --config "$config" --compile
    done
    ;;
*)
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
