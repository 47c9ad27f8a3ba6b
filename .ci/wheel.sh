#!/usr/bin/env bash
# Builds a wheel that carries the binary, installs it into an empty environment of Python's and trains the digits there for a few steps.
# Usage: .ci/wheel.sh [PROFILE], by default `dist`, as the wheel is handed out; CI names `dev`, whose parts its tests have built.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:-dist}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tools=${CARGO_TARGET_DIR:-target}/maturin
if ! [ -x "$tools/bin/maturin" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet maturin==1.16.0
fi
"$tools/bin/maturin" build --quiet --profile "$profile" --out "$work"
ls -l "$work"/*.whl
python3 -m venv "$work/empty"
"$work/empty/bin/pip" install --quiet --no-index "$work"/*.whl
cd "$work"
"$work/empty/bin/flowtape" train digits --quiet --set run_dir=run --set step_scheduler.max_steps=3 --set model.num_layers=1 \
    --set step_scheduler.local_batch_size=8 --set sampling.num_inference_steps=2 --set report.samples_per_class=1
[ -f "run/checkpoints/LATEST/diffusion_pytorch_model.safetensors" ]
"$work/empty/bin/flowtape" --version
