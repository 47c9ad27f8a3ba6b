#!/usr/bin/env bash
# Compiles the kernels to PTX for sm_80 with the pinned compiler, and writes down their source's hash and what they take.
#
#   build.sh           writes ptx/*.ptx, ptx/HASH and ptx/RESOURCES.md
#   build.sh --check   builds elsewhere, and fails where anything differs from what is checked in
#   build.sh --check --assemble FOLDER   also lets ptxas read every *.ptx there
#
# NVCC_ROOT is the folder with bin/nvcc and bin/ptxas; otherwise the packages below are installed into a fresh folder.
set -euo pipefail
cd "$(dirname "$0")"
PACKAGES=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85)

# name, source, definitions
KERNELS="gemm_f32 gemm.cu
gemm_bf16 gemm.cu -DTYPE=bf16
gemm_f16 gemm.cu -DTYPE=f16
norm norm.cu
index index.cu
random random.cu
$(for type in bf16 f16; do for depth in 32 64 128 256; do
    echo "attention_${type}_$depth attention.cu -DTYPE=$type -DDEPTH=$depth"
done; done)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${NVCC_ROOT:-}" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --no-deps "${PACKAGES[@]}"
    NVCC_ROOT=$(echo "$work"/venv/lib/python3*/site-packages/nvidia/cu13)
fi
out="$work/ptx"
mkdir "$out"

while read -r kernel source definitions; do
    # Without a hint, the instructions are those of ISA 8.0: so drivers from CUDA 12.0 on take them; ptxas confirms it.
    "$NVCC_ROOT/bin/nvcc" -std=c++17 -O3 -arch=compute_80 $definitions -ptx "$source" -o "$work/$kernel.ptx"
    grep -vE '^\s*//|^\s*$|used_bytes_mask' "$work/$kernel.ptx" | sed -e 's/^\.version 9\.0$/.version 8.0/' >"$out/$kernel.ptx"
    for arch in sm_80 sm_90; do
        "$NVCC_ROOT/bin/ptxas" "-arch=$arch" -v "$out/$kernel.ptx" -o "$work/cubin" 2>"$work/$kernel.$arch" ||
            { cat "$work/$kernel.$arch" && exit 1; }
    done
done <<<"$KERNELS"
cat tile.cuh attention.cu gemm.cu index.cu norm.cu random.cu | sha256sum | cut -d' ' -f1 >"$out/HASH"

{
    echo "What each kernel takes, as ptxas says: registers of a thread, bytes of spills, bytes of static shared memory."
    echo
    echo "| kernel | sm_80 | | | sm_90 | | |"
    echo "|---|--:|--:|--:|--:|--:|--:|"
    for kernel in $(cut -d' ' -f1 <<<"$KERNELS"); do
        for arch in sm_80 sm_90; do
            sed -n -E "s/.*Compiling entry function '([^']+)'.*/name \1/p; s/.* ([0-9]+) bytes spill stores.*/spill \1/p
                s/.*Used ([0-9]+) registers.*( ([0-9]+) bytes smem).*/use \1 \3/p; t; s/.*Used ([0-9]+) registers.*/use \1 0/p" \
                "$work/$kernel.$arch" |
                awk -v arch=$arch -v module=$kernel '$1 == "name" {n = module "." $2} $1 == "spill" {s = $2} $1 == "use" {print n, arch, $2, s, $3}'
        done
    done | sort | awk '$2 == "sm_80" {a = $3 " | " $4 " | " $5} $2 == "sm_90" {print "| `" $1 "` | " a " | " $3 " | " $4 " | " $5 " |"}'
} >"$out/RESOURCES.md"

if [ "${1:-}" = --check ]; then
    diff -r ptx "$out" && echo "the kernels are those of their source"
else
    rm -rf ptx
    cp -r "$out" ptx
fi

if [ "${2:-}" = --assemble ]; then
    count=0
    for text in "$3"/*.ptx; do
        for arch in sm_80 sm_90; do
            "$NVCC_ROOT/bin/ptxas" "-arch=$arch" "$text" -o "$work/cubin"
        done
        count=$((count + 1))
    done
    echo "ptxas takes $count kernels for sm_80 and sm_90"
fi
