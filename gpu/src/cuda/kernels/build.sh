#!/usr/bin/env bash
# Compiles the kernels to PTX for sm_80 with the pinned compiler, and packs them into gpu/ptx:
#
#   kernels.bin   the texts, each a gzip file, one after the other
#   INDEX         a line for each in that order: name, packed bytes, hash of its sources and definitions
#   RESOURCES.md  what ptxas says of them
#
#   build.sh                    writes these files
#   build.sh --check            builds elsewhere, and fails where anything differs from what is checked in
#   build.sh --assemble FOLDER  lets ptxas read every printed kernel there (tests print them where FLOWTAPE_PTX says)
#
# NVCC_ROOT is the folder with bin/nvcc and bin/ptxas; otherwise the packages below are installed under target/.
set -euo pipefail
if [ "${1:-}" = --assemble ]; then FOLDER=$(realpath "$2"); fi
cd "$(dirname "$0")"
PACKED=$(realpath ../../../ptx)
PACKAGES=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85)
ARCHITECTURES=(sm_80 sm_90)

# name, source, definitions
KERNELS="gemm_f32 gemm.cu
gemm_bf16 gemm.cu -DTYPE=bf16
gemm_f16 gemm.cu -DTYPE=f16
norm_f32 norm.cu -DTYPE=float
norm_bf16 norm.cu -DTYPE=bf16
norm_f16 norm.cu -DTYPE=f16
index index.cu
quant quant.cu
random random.cu
$(for depth in 32 64 128 256; do
    echo "attention_f32_$depth attention_f32.cu -DDEPTH=$depth"
done)
$(for type in bf16 f16; do for depth in 32 64 128 256; do
    echo "attention_${type}_$depth attention.cu -DTYPE=$type -DDEPTH=$depth"
done; done)"

export work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${NVCC_ROOT:-}" ]; then
    venv=../../../../target/cuda-compiler
    if ! [ -e "$venv/complete" ]; then
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --no-deps "${PACKAGES[@]}"
        touch "$venv/complete"
    fi
    NVCC_ROOT=$(echo "$PWD/$venv"/lib/python3*/site-packages/nvidia/cu13)
fi
export NVCC_ROOT

# One kernel file to $work/ptx, and what ptxas says of it.
#
# The compiler orders some choices by addresses, which move with the lengths of its paths: one source has a few outputs
# of equal worth. So a check tries paths of other lengths until the output is the checked-in one.
compile() {
    local kernel=$1 source=$2 compiler=$work/$1
    shift 2
    for _ in $(seq "$ATTEMPTS"); do
        compiler+=+
        ln -s "$NVCC_ROOT" "$compiler"
        # Without a hint, the instructions are those of ISA 8.0: so drivers from CUDA 12.0 on take them; ptxas confirms it.
        "$compiler/bin/nvcc" -std=c++17 -O3 -arch=compute_80 "$@" -ptx "$source" -o "$work/$kernel.ptx"
        grep -vE '^\s*//|^\s*$|used_bytes_mask' "$work/$kernel.ptx" | sed -e 's/^\.version 9\.0$/.version 8.0/' >"$work/ptx/$kernel.ptx"
        if cmp --silent "$work/packed/$kernel.ptx" "$work/ptx/$kernel.ptx"; then break; fi
    done
    for arch in sm_80 sm_90; do
        "$NVCC_ROOT/bin/ptxas" "-arch=$arch" -v "$work/ptx/$kernel.ptx" -o "$work/$kernel.cubin" 2>"$work/$kernel.$arch" ||
            { cat "$work/$kernel.$arch" && return 1; }
    done
}

# The checked-in texts as files in $work/packed.
unpack() {
    local kernel bytes at=0
    mkdir "$work/packed"
    while read -r kernel bytes _; do
        dd if="$PACKED/kernels.bin" iflag=skip_bytes,count_bytes skip=$at count="$bytes" status=none |
            gzip -d >"$work/packed/$kernel.ptx"
        at=$((at + bytes))
    done <"$PACKED/INDEX"
}

# The hash of what a kernel is made from: its source, what sources may include, its definitions.
source_hash() {
    local source=$1
    shift
    { cat layout.h ./*.cuh "$source" && echo "$@"; } | sha256sum | cut -d' ' -f1
}

# A line for each kernel with its hash, and with the length of its packed text where that is asked for.
index() {
    local kernel source definitions
    while read -r kernel source definitions; do
        echo "$kernel ${1:+$(wc -c <"$work/ptx/$kernel.gz") }$(source_hash "$source" $definitions)"
    done <<<"$KERNELS"
}

# Prints the table of what kernels take.
resources() {
    echo "What each kernel takes, as ptxas says: registers of a thread, bytes of spills, bytes of static shared memory."
    echo
    echo "| kernel | sm_80 | | | sm_90 | | |"
    echo "|---|--:|--:|--:|--:|--:|--:|"
    for kernel in $(cut -d' ' -f1 <<<"$KERNELS"); do
        for arch in "${ARCHITECTURES[@]}"; do
            sed -n -E "s/.*Compiling entry function '([^']+)'.*/name \1/p; s/.* ([0-9]+) bytes spill stores.*/spill \1/p
                s/.*Used ([0-9]+) registers.*( ([0-9]+) bytes smem).*/use \1 \3/p; t; s/.*Used ([0-9]+) registers.*/use \1 0/p" \
                "$work/$kernel.$arch" |
                awk -v arch="$arch" -v module="$kernel" '$1 == "name" {n = module "." $2} $1 == "spill" {s = $2} $1 == "use" {print n, arch, $2, s, $3}'
        done
    done | LC_ALL=C sort | awk '$2 == "sm_80" {a = $3 " | " $4 " | " $5} $2 == "sm_90" {print "| `" $1 "` | " a " | " $3 " | " $4 " | " $5 " |"}'
}

# Printed kernels have one name and one header: a hundred of them make one file, each under a name of its own.
join() {
    awk 'FNR == 1 {n++} FNR > 3 || n == 1 {sub(/\.entry kernel\(/, ".entry kernel_" n "("); print}' "$@"
}

# Lets ptxas read some printed kernels; if it does not take them together, each by itself, to tell which.
assemble() {
    local batch
    batch=$(mktemp -p "$work" XXXXXX.ptx)
    join "$@" >"$batch"
    for arch in sm_80 sm_90; do
        "$NVCC_ROOT/bin/ptxas" "-arch=$arch" "$batch" -o "$batch.cubin" >"$batch.log" 2>&1 && continue
        for text in "$@"; do
            "$NVCC_ROOT/bin/ptxas" "-arch=$arch" "$text" -o "$batch.cubin" || { echo "$arch: $text" && cat "$text"; }
        done
        return 255
    done
}
export -f compile join assemble

if [ "${1:-}" = --assemble ]; then
    # Others there are checked-in ones, which --check lets ptxas read.
    printed=$(grep -lF '.entry kernel(' "$FOLDER"/*.ptx)
    xargs -P "$(nproc)" -n 100 bash -euo pipefail -c 'assemble "$@"' _ <<<"$printed"
    echo "ptxas takes $(wc -l <<<"$printed") printed kernels for ${ARCHITECTURES[*]}"
    exit
fi

mkdir "$work/ptx"
if [ -e "$PACKED/INDEX" ]; then unpack; fi
export ATTEMPTS=1
if [ "${1:-}" = --check ]; then
    diff <(cut -d' ' -f1,3 "$PACKED/INDEX") <(index) || { echo "the sources changed: run $0" && exit 1; }
    ATTEMPTS=32
fi
xargs -P "$(nproc)" -L 1 bash -euo pipefail -c 'compile "$@"' _ <<<"$KERNELS"
resources >"$work/RESOURCES.md"
if [ "${1:-}" = --check ]; then
    diff --recursive --brief "$work/packed" "$work/ptx"
    diff --brief "$PACKED/RESOURCES.md" "$work/RESOURCES.md" && echo "the kernels are those of their source"
else
    mkdir -p "$PACKED"
    cp "$work/RESOURCES.md" "$PACKED"
    for kernel in $(cut -d' ' -f1 <<<"$KERNELS"); do gzip -9 -n <"$work/ptx/$kernel.ptx" >"$work/ptx/$kernel.gz"; done
    index with_bytes >"$PACKED/INDEX"
    for kernel in $(cut -d' ' -f1 <<<"$KERNELS"); do cat "$work/ptx/$kernel.gz"; done >"$PACKED/kernels.bin"
fi
