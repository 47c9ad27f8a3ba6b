#!/usr/bin/env bash
# The digits recipe's step, ours and PyTorch's, interleaved: medians of each round and their ratio.
# Usage: bench/digits.sh [ROUNDS] [PYTHON], where PYTHON has torch and diffusers.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5} python=${2:-python3}
cargo build --release --quiet
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
for round in $(seq "$rounds"); do
    "${CARGO_TARGET_DIR:-target}/release/flowtape" --threads 2 train recipes/digits.yaml --set run_dir="$run/$round" \
        --set step_scheduler.max_steps=60 --set report=null --set sampling.num_inference_steps=1 --json >/dev/null 2>&1
    ours=$(sed 's/.*"samples_per_sec"://; s/[,}].*//' "$run/$round/metrics.jsonl" | sort -n | awk '{v[NR] = 64 / $1} END {print v[int((NR + 1) / 2)]}')
    theirs=$("$python" bench/torch_digits.py 60 2 | awk '{print $2}')
    awk -v a="$ours" -v b="$theirs" -v r="$round" 'BEGIN {printf "round %d: flowtape %.4f s, torch %.4f s, ratio %.2f\n", r, a, b, a / b}'
done
