#!/usr/bin/env bash
# For the day an NVIDIA GPU is at hand. FOLDER is carried there; that machine needs the driver alone, and for `peer` a Python.
#
#   bench/gpu.sh pack FOLDER          where there is a Rust toolchain: stripped binaries, goldens and recipes into FOLDER
#   FOLDER/gpu.sh check FOLDER        on the GPU's machine: is all of it right; under 8 minutes
#   FOLDER/gpu.sh figures FOLDER      our rates and step times, to FOLDER/figures.jsonl
#   FOLDER/gpu.sh peer FOLDER PYTHON  PyTorch's on the same machine (PYTHON has torch and diffusers), to FOLDER/peer.jsonl
#   FOLDER/gpu.sh table FOLDER        both as one Markdown table (any python3)
set -euo pipefail

pack() {
    local out profile=${PROFILE:-release}
    out=$(realpath -m "$1")
    cd "$(dirname "$0")/.."
    mkdir -p "$out"
    built() {
        cargo build --profile "$profile" --message-format=json "$@" | sed -n -E 's/.*"executable":"([^"]+)".*/\1/p' | tail -1
    }
    cp "$(built -p flowtape --bin flowtape)" "$out/flowtape"
    cp "$(built -p flowtape-gpu --features cuda --test cuda)" "$out/cuda"
    cp "$(built -p flowtape-tests --test backends)" "$out/backends"
    strip "$out"/{flowtape,cuda,backends}
    cp -r tests/goldens recipes bench/gpu.sh bench/gpu_table.py bench/peer "$out/"
}

# The digits recipe to the end: its accuracy, and the same bits twice.
digits() {
    local runs accuracy
    runs=$(mktemp -d)
    for run in one two; do
        timeout 120 ./flowtape train recipes/digits.yaml --device cuda --set "run_dir=$runs/$run" --json | tail -1 >"$runs/$run.json"
    done
    cat "$runs/one.json"
    cmp "$runs"/{one,two}/checkpoints/LATEST/diffusion_pytorch_model.safetensors
    echo "two runs have the same bits"
    accuracy=$(sed -n -E 's/.*"accuracy":([0-9.]+).*/\1/p' "$runs/one.json")
    awk "BEGIN {exit !(${accuracy:-0} >= 0.97)}" || { echo "accuracy below 97 %" && return 1; }
    rm -r "$runs"
}

check() {
    cd "$1"
    export FLOWTAPE_REQUIRE=cuda FLOWTAPE_GOLDENS=$PWD/goldens FLOWTAPE_RECIPES=$PWD/recipes
    # The tests run on every device that they find: none of Vulkan's here.
    export WGPU_BACKEND=vulkan VK_DRIVER_FILES=/dev/null VK_ICD_FILENAMES=/dev/null
    ./flowtape devices
    timeout 120 ./cuda
    timeout 180 ./backends
    digits
    # Where it is there: no access out of bounds, no race in shared memory.
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 ./backends ops_in_bf16 || [ $? = 124 ]
        done
    fi
}

figures() {
    cd "$1"
    ./flowtape devices >&2
    {
        # The sizes of the peer's script.
        ./flowtape bench step --device cuda --dtype bf16 --config m --batch 32 --json
        ./flowtape bench step --device cuda --dtype bf16 --config l --batch 16 --json
        ./flowtape bench step --device cuda --dtype bf16 --config xl --json
        ./flowtape bench ops --device cuda --dtype bf16 --large --json
    } | tee figures.jsonl
}

# From where it was called: PYTHON may be a path from there.
peer() {
    local folder=$1 python=$2 mode
    {
        "$python" "$folder/peer/torch_gpu_step.py" --limits
        # Compiled ones last: they need a C compiler as well.
        for mode in "" --compile; do
            for config in M L XL; do
                "$python" "$folder/peer/torch_gpu_step.py" --config "$config" $mode
            done
        done
    } | tee "$folder/peer.jsonl"
}

case "${1:-} $#" in
"pack 2" | "check 2" | "figures 2" | "peer 3") "$@" ;;
"table 2") python3 "$2/gpu_table.py" "$2/figures.jsonl" "$2/peer.jsonl" ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
