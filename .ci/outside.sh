#!/usr/bin/env bash
# Builds programs outside this workspace that depend on its library crates by path. Usage: .ci/outside.sh [CARGO OPTIONS], such as
# --offline.
#
#  own      flowmatch/examples/own_model.rs: a model of its own on the engine and the pipeline alone, run
#  trainer  all library crates but that of GPUs, with default features: the tree holds nothing that only a command line or a GPU needs
#  cuda     the same with GPUs, CUDA's too, by the steps that the README documents
#
# Then the header of the library for C, which must be that of the source.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The crates of others are those that this workspace has checked, which takes its profile's settings.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target} CARGO_PROFILE_DEV_OPT_LEVEL=1
# A toolkit that happens to be there must not be what makes it build.
unset CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR CUDA_LIBRARY_PATH

# A program's folder with its manifest: its name, then its crates, each with features after a colon.
program() {
    local folder=$work/$1 crate
    mkdir -p "$folder/src"
    cp "$root/Cargo.lock" "$folder/"
    {
        printf '[package]\nname = "%s"\nversion = "0.0.0"\nedition = "2024"\n\n[workspace]\n\n[dependencies]\n' "$1"
        for crate in "${@:2}"; do
            echo "flowtape-${crate%:*} = { path = \"$root/${crate%:*}\", features = [$([[ $crate != *:* ]] || echo "\"${crate#*:}\"")] }"
        done
    } >"$folder/Cargo.toml"
}

program own engine flowmatch
cp "$root/flowmatch/examples/own_model.rs" "$work/own/src/main.rs"
[ "$(wc -l <"$work/own/src/main.rs")" -lt 70 ]
echo "outside program: a model of its own"
cargo run --quiet --manifest-path "$work/own/Cargo.toml" "$@"

program trainer engine flowmatch models data trainer
cat >"$work/trainer/src/main.rs" <<'RUST'
use flowtape_engine::{DType, Device, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ones = Tensor::ones(&[2, 3], DType::F32, &Device::cpu())?;
    println!("{:?}", ones.mul_scalar(2.0)?.to_vec::<f32>()?);
    let names: Vec<_> = flowtape_models::MODELS.iter().map(|kind| kind.class).collect();
    println!("{names:?}");
    let recipe: fn(&std::path::Path, &[String]) -> flowtape_trainer::Result<flowtape_trainer::Recipe> =
        flowtape_trainer::Recipe::load;
    let _ = (recipe, flowtape_flowmatch::FlowMatchingConfig::default(), flowtape_data::Cursor::default());
    Ok(())
}
RUST
echo "outside program: the trainer, with default features"
cargo check --quiet --manifest-path "$work/trainer/Cargo.toml" "$@"
# `normal` leaves out what only builds or tests need.
tree=$(cargo tree --manifest-path "$work/trainer/Cargo.toml" --edges normal --prefix none "$@")
for unwanted in wgpu naga plotters tokenizers image parquet indicatif clap signal-hook tiny_http cust; do
    if grep -q "^$unwanted v" <<<"$tree"; then
        echo "the trainer's tree holds $unwanted, which nobody asked for" >&2
        exit 1
    fi
done

program cuda engine flowmatch models data trainer gpu:cuda
sed 's/^    Ok(())/    flowtape_gpu::reports().iter().for_each(|report| println!("{report}"));\n&/' \
    "$work/trainer/src/main.rs" >"$work/cuda/src/main.rs"
printf '\n[patch.crates-io]\nfind_cuda_helper = { path = "%s/gpu/find_cuda_helper" }\n' "$root" >>"$work/cuda/Cargo.toml"
echo "outside program: with CUDA"
cargo check --quiet --manifest-path "$work/cuda/Cargo.toml" "$@"

echo "the header of the library for C"
cargo run --quiet --manifest-path "$root/capi/header/Cargo.toml" "$@" -- --check
