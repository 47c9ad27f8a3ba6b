#!/usr/bin/env bash
# Builds a program outside this workspace that depends on its library crates by path: with their default features, and with
# CUDA by the steps that the README documents. Usage: .ci/outside.sh [CARGO OPTIONS], such as --offline.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}/outside
# A toolkit that happens to be there must not be what makes it build.
unset CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR CUDA_LIBRARY_PATH
mkdir "$work/src"
cp "$root/Cargo.lock" "$work/"
cat >"$work/src/main.rs" <<'RUST'
use flowtape_engine::{DType, Device, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ones = Tensor::ones(&[2, 3], DType::F32, &Device::cpu())?;
    println!("{:?}", ones.mul_scalar(2.0)?.to_vec::<f32>()?);
    let names: Vec<_> = flowtape_models::MODELS.iter().map(|kind| kind.class).collect();
    println!("{names:?}");
    flowtape_gpu::reports().iter().for_each(|report| println!("{report}"));
    let recipe: fn(&std::path::Path, &[String]) -> flowtape_trainer::Result<flowtape_trainer::Recipe> =
        flowtape_trainer::Recipe::load;
    let _ = (recipe, flowtape_flowmatch::FlowMatchingConfig::default(), flowtape_data::Cursor::default());
    Ok(())
}
RUST
for features in '' '"cuda"'; do
    {
        printf '[package]\nname = "outside"\nversion = "0.0.0"\nedition = "2024"\n\n[workspace]\n\n[dependencies]\n'
        for crate in engine flowmatch models data trainer; do
            echo "flowtape-$crate = { path = \"$root/$crate\" }"
        done
        echo "flowtape-gpu = { path = \"$root/gpu\", features = [$features] }"
        if [ -n "$features" ]; then
            printf '\n[patch.crates-io]\nfind_cuda_helper = { path = "%s/gpu/find_cuda_helper" }\n' "$root"
        fi
    } >"$work/Cargo.toml"
    echo "outside program, features of flowtape-gpu: [$features]"
    cargo check --quiet --manifest-path "$work/Cargo.toml" "$@"
done
